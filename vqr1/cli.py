"""The command line: vqr1 manifest, train, score, evaluate and the others that ``vqr1 --help`` lists.

Each command has two functions: one adds its options (`_score_options`), one runs it (`_score`) and imports
what it needs. So ``vqr1 --help``, ``data`` and ``sheet`` start without torch.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from vqr1.engines import ENGINES

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0, 1 when something failed, 2 for wrong usage, 130 when interrupted."""
    args = _parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may be unable to print a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.command not in ("manifest", "data", "sheet"):
            from transformers.utils import logging

            logging.disable_progress_bar()  # for loading and saving weights; training keeps its bar
        return args.run(args)
    except KeyboardInterrupt:
        saved = "What was saved up to the last checkpoint is kept: --resume goes on from there."
        print("\nInterrupted.", saved if args.command in ("demo", "train") else "", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError) as error:  # unusable; the text says what and why
        print(f"vqr1 {args.command}: {error}", file=sys.stderr)
        return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqr1", description="Image quality assessment by reinforcement learning to rank."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text, options, run, more in (
        ("demo", DEMO, _demo_options, _demo, None),
        ("manifest", MANIFEST, _manifest_options, _manifest, None),
        ("train", "Train a policy by RL to rank.", _train_options, _train, None),
        ("score", SCORE, _score_options, _score, SCORE_HELP),
        ("compare", COMPARE, _compare_options, _compare, None),
        ("describe", "Print what the policy thinks of a picture.", _describe_options, _describe, None),
        ("evaluate", EVALUATE, _evaluate_options, _evaluate, None),
        ("calibrate", CALIBRATE, _calibrate_options, _calibrate, None),
        ("data", DATA, _data_options, _data, None),
        ("sheet", "Draw all 25 distortions at 5 levels of a picture.", _sheet_options, _sheet, None),
        ("pretrain", PRETRAIN, _pretrain_options, _pretrain, None),
        ("study", STUDY, _study_options, _study, None),
    ):
        shape = argparse.RawDescriptionHelpFormatter if more else argparse.HelpFormatter
        command = commands.add_parser(name, help=text, description=text, epilog=more, formatter_class=shape)
        options(command.add_argument)
        command.set_defaults(run=run)
    return parser


Add = Callable[..., argparse.Action]
"""A parser's add_argument."""


def _count(text: str) -> int:
    """Return a number of steps or rows; 0 would count as not given."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def _policy(add: Add) -> None:
    kinds = (
        "people-ranker, ranker, tiny-policy, a folder of a model or an adapter, or a hub name (%(default)s)"
    )
    add("--policy", default="people-ranker", help=kinds)
    what = "vllm has an environment of its own, which make test-vllm builds for CPUs (transformers)"
    add("--engine", choices=ENGINES, help=what)
    what = "load the language model in 4 bits (as an adapter was trained; a whole model is not)"
    add("--quantize", action=argparse.BooleanOptionalAction, help=what)
    what = "scale pictures to so many pixels; fewer need less memory (the policy's own limits)"
    add("--pixels", type=_count, nargs=2, metavar=("MIN", "MAX"), help=what)
    what = 'put "Picture 1: " before the picture'
    add("--numbered", action=argparse.BooleanOptionalAction, help=what)
    what = "longest answer or reasoning, in tokens (256)"
    add("--max-new-tokens", type=_count, metavar="N", help=what)
    what = (
        "score as VisualQuality-R1's own inference does: numbered, greedy, at most 2048 tokens, "
        "repetition penalty 1.05; flags that are given win"
    )
    add("--preset", choices=("official",), help=what)


def _settings(args) -> dict:
    """Return what a score depends on: the flags that are given, else the preset's, else the Scorer's.

    The prompt's own are as the policy was trained, where its folder says so.
    """
    from vqr1.scoring import DEFAULTS, OFFICIAL, trained_settings

    preset = OFFICIAL if args.preset == "official" else {}
    given = {key: value for key, value in vars(args).items() if key in DEFAULTS and value is not None}
    settings = DEFAULTS | trained_settings(args.policy) | preset | given
    return {key: value for key, value in settings.items() if key not in ("batch_size", "seed")}


def _root(add: Add) -> None:
    where = "where the public sets are: a set's folder, or one that holds folders of sets (VQR1_DATA)"
    add("--root", metavar="DIR", help=where)


def _thinking(add: Add) -> None:
    what = "let the policy reason first, or not (as it was trained, where its folder says so; else not)"
    add("--thinking", action=argparse.BooleanOptionalAction, help=what)


def _run_options(add: Add) -> None:
    add("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    add("--steps", type=_count, help="train fewer steps than the configuration says")


# Training


MANIFEST = "Write the manifest of a folder of your own pictures and their ratings, to train on and evaluate."


def _manifest_options(add: Add) -> None:
    add("folder", metavar="FOLDER", help="the pictures are in it and below it")
    what = "CSV with a column for the picture and one for its rating (FOLDER/ratings.csv)"
    add("--ratings", metavar="CSV", help=what)
    add("--out", metavar="CSV", help="the manifest to write (FOLDER/manifest.csv)")


def _manifest(args) -> int:
    from vqr1.data.own import write_manifest

    print(write_manifest(args.folder, args.ratings, args.out))
    return EXIT_OK


DEMO = "Evaluate the embedded policy, train it by RL to rank, evaluate again; write a report."


def _demo_options(add: Add) -> None:
    what = "folder for log, checkpoints, plots and report.md (%(default)s)"
    add("--out", default="runs/demo", help=what)
    add("--config", default="cpu", help="name or path of a configuration (%(default)s)")
    _run_options(add)
    add("--limit", type=_count, help="evaluate at most so many rows of each set")


def _demo(args) -> int:
    from vqr1.experiments.demo import demo

    print(demo(args.out, args.config, args.resume, args.steps, args.limit))
    print(f"Written to {args.out}: report.md, log.csv, policy/, training.png, scatter.png, pictures.jpg")
    return EXIT_OK


def _train_options(add: Add) -> None:
    add("--out", default="runs/train", help="folder of the run (%(default)s)")
    what = "name or path of a configuration (cpu; with --set, the one for the GPU at hand)"
    add("--config", help=what)
    what = (
        "manifest or name of a set, instead of the configuration's; batch and steps are made to fit; repeat"
    )
    add("--set", action="append", dest="sets", metavar="SET", help=what)
    _run_options(add)
    add("--seed", type=int, help="another seed than the configuration's")


def _train(args) -> int:
    from vqr1.config import config_for_device, load_config
    from vqr1.training import fitted, train

    name = args.config or (config_for_device() if args.sets else "cpu")
    config = fitted(load_config(name, sets=args.sets)) if args.sets else load_config(name)
    given = {"max_steps": args.steps, "seed": args.seed}
    config = config.changed(grpo={key: value for key, value in given.items() if value is not None})
    if args.sets:
        keys = "per_device_train_batch_size", "steps_per_generation", "num_generations", "max_steps"
        said = ", ".join(f"{key} {config.grpo[key]}" for key in keys)
        print(f"Configuration {name}, made to fit: {said}. --config and --steps change it.", flush=True)
    print(f"The trained policy is in {train(config, args.out, args.resume)}")
    return EXIT_OK


# Scoring


SCORE = "Score pictures: 1 (very poor) to 5 (excellent), with their spread and, if calibrated, an error bar."
SCORE_HELP = """\
On a terminal the scores are a table to read; into a pipe they are written as rows of CSV.

With --out, rows are on disk as soon as they are scored: after a kill, Ctrl-C or a full disk the same command
goes on where it stopped and scores no picture twice. Rows with an error are kept too; delete such a row to
try its picture again. Parquet cannot grow: its rows wait in NAME.parquet.partial.jsonl until all are there.

examples:
  vqr1 score photos --out scores.csv                      a folder and all below it
  vqr1 score 'shoot/**/*.tif' portrait.jpg --thinking     a glob and a file
  find /data -name '*.jpg' -mtime -1 | vqr1 score - --out scores.parquet

on a Ray cluster, whose nodes all need vqr1 and the policy, or in several processes here (extra "scale"):
  vqr1 score s3://bucket/pictures --actors 8 --gpus 1 --out scores.parquet

on several machines, each with the same pictures, then together again, as if one had done it all:
  vqr1 score photos --shard 1/2 --out part1.csv           vqr1 score photos --shard 2/2 --out part2.csv
  awk 'NR == 1 || FNR > 1' part1.csv part2.csv > scores.csv
  (JSONL: cat part1.jsonl part2.jsonl > scores.jsonl; Parquet: pandas.read_parquet of the folder of parts)
  Sampled answers depend on the pictures in the same batch: for the same scores, --estimate sample needs
  --batch-size 1.

exit code: 0 all have a score, 1 some have not (their rows say why), 2 wrong usage, 130 interrupted"""


def _score_options(add: Add) -> None:
    what = "pictures, folders, 'globs' (** for any depth), or - for a list on standard input"
    add("paths", nargs="+", metavar="PATH", help=what)
    _policy(add)
    kinds = ("expected", "greedy", "sample")
    add("--estimate", choices=kinds, help="how the score is read off (expected)")
    add("--k", type=int, default=6, help="answers per picture for --estimate sample (%(default)s)")
    _thinking(add)
    what = "pictures at a time; fewer need less memory (%(default)s)"
    add("--batch-size", type=int, default=16, help=what)
    add("--out", help="add rows to this .csv, .jsonl or .parquet file instead of printing them")
    what = "only the i-th of n blocks of the pictures (%(default)s)"
    add("--shard", default="1/1", metavar="I/N", help=what)
    what = "score a folder or a bucket by so many processes of a Ray cluster, each with a policy; needs --out"
    add("--actors", type=_count, metavar="N", help=what)
    add("--gpus", type=float, default=0, help="GPUs of each of the --actors (%(default)s)")


def _score(args) -> int:
    import warnings

    settings = _settings(args)
    if settings["estimate"] != "sample":
        settings["k"] = 1
    if settings["estimate"] == "expected":
        settings["repetition_penalty"] = 1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # on damaged or large files; their rows say it
        return (_score_on_cluster if args.actors else _score_here)(args, settings)


def _score_here(args, settings: dict) -> int:
    from vqr1.data.folders import find_pictures
    from vqr1.scoring import WINDOW, Scorer
    from vqr1.serving.bulk import RowFile, score_rows, shard

    pictures = shard(find_pictures(args.paths), args.shard, WINDOW * args.batch_size)

    def scorer() -> Scorer:
        return Scorer(**settings, batch_size=args.batch_size)

    if not args.out:
        return _print_scores(score_rows(scorer(), pictures, settings))
    with RowFile(args.out, settings) as file:
        return _write_scores(file, pictures, lambda left: score_rows(scorer(), left, settings))


def _score_on_cluster(args, settings: dict) -> int:
    from vqr1.serving.bulk import RowFile
    from vqr1.serving.cluster import pictures_in, scored

    if len(args.paths) > 1 or not args.out or args.shard != "1/1":
        raise ValueError("--actors takes one folder or bucket, and --out, and no --shard")
    source = args.paths[0].rstrip("/") or "/"
    pictures = [f"{source}/{name}" for name in pictures_in(source)]

    def rows(left: list[str]):
        names = [picture.removeprefix(f"{source}/") for picture in left]
        return scored(source, names, settings, args.batch_size, args.actors, args.gpus)

    with RowFile(args.out, settings) as file:
        return _write_scores(file, pictures, rows)


def _print_scores(rows) -> int:
    """Print rows as they come: a table for people on a terminal, CSV for programs."""
    from vqr1.serving.bulk import CSV_HEAD, TABLE_HEAD, to_csv, to_table

    head, form = (TABLE_HEAD, to_table) if sys.stdout.isatty() else (CSV_HEAD, to_csv)
    failed = False
    try:
        print(head, end="")
        for some in rows:
            print(form(some), end="", flush=True)
            failed |= any(row["error"] for row in some)
    except OSError as error:  # the disk is full, or the reader has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"vqr1 score: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_FAILED if failed else EXIT_OK


def _write_scores(file, pictures: list[str], score: Callable) -> int:
    """Score the pictures that have no row in the file yet; score: their list -> iterator of lists of rows."""
    from tqdm import tqdm

    from vqr1.serving.bulk import utf8_name

    left = [picture for picture in pictures if utf8_name(picture) not in file.done]
    here = len(pictures) - len(left)
    scored = score(left) if left else ()
    try:
        with tqdm(total=len(pictures), initial=here, unit=" images", dynamic_ncols=True) as bar:
            for rows in scored:
                file.write(rows)
                bar.update(len(rows))
        file.finish()
    except KeyboardInterrupt:
        kept = f"{len(file.done)} rows are in {file.log}; the same command goes on from there."
        print(f"\nInterrupted. {kept}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        kept = f"The rows in {file.log} are whole; the same command goes on from there."
        print(f"\nvqr1 score: {file.path}: {error.strerror}. {kept}", file=sys.stderr)
        return EXIT_FAILED
    failed = sum(file.done[utf8_name(picture)] for picture in pictures)
    before = f", {here} of them from before" if here else ""
    column = " (see column error)" if failed else ""
    print(f"{file.path}: {len(pictures)} pictures{before}; {failed} without a score{column}")
    return EXIT_FAILED if failed else EXIT_OK


COMPARE = "Print the probability that the first picture looks better than the second."


def _compare_options(add: Add) -> None:
    add("images", nargs=2, metavar="IMAGE", help="picture files")
    _policy(add)
    _thinking(add)


def _compare(args) -> int:
    from vqr1.scoring import Scorer

    scorer = Scorer(**_settings(args) | {"estimate": "expected"})  # a greedy score has no deviation
    probability = scorer.compare(*args.images)
    print(f"P({args.images[0]} looks better than {args.images[1]}) = {probability:.3f}")
    return EXIT_OK


def _describe_options(add: Add) -> None:
    add("image", metavar="IMAGE", help="picture file")
    _policy(add)


def _describe(args) -> int:
    from vqr1.scoring import Scorer

    print(Scorer(**_settings(args)).describe(args.image))
    return EXIT_OK


# Evaluation, studies


SETS = ("sim-kadid", "sim-unseen", "sim-mixed")
EVALUATE = "Score rated sets and print SRCC, PLCC and intervals beside the oracles."


def _evaluate_options(add: Add) -> None:
    _policy(add)
    add("--sets", nargs="+", help=f"names or manifests ({', '.join(SETS)})")
    what = "instead of --sets: the paper's rows beside those of the public sets that are there, all splits"
    add("--suite", choices=("table2",), help=what)
    _root(add)
    add("--split", default="test", help="of --sets: train, val, test or all (%(default)s)")
    what = "the prompt of --sets (as the policy was trained, where its folder says so; else both)"
    add("--thinking", action=argparse.BooleanOptionalAction, help=what)
    what = "how scores are read off (all three; of a suite: expected; of a preset: its own)"
    add("--estimates", nargs="+", choices=("expected", "greedy", "sample"), help=what)
    add("--limit", type=_count, help="at most so many rows of each set, a fixed sample")
    add("--out", help="write the tables into this folder")


def _evaluate(args) -> int:
    import pandas as pd

    from vqr1.evaluation import FAMILY, evaluate, evaluation_rows, oracles, save_scores, unread
    from vqr1.policy import trained_prompt
    from vqr1.records import markdown

    if args.suite and args.sets:
        raise ValueError("--suite has its own sets; give --suite or --sets")
    if args.suite and args.thinking is not None:
        raise ValueError("--suite measures both prompts, as the paper does; leave --[no-]thinking out")
    settings = _settings(args)
    estimates = args.estimates or ([settings["estimate"]] if args.preset else None)
    reading = {
        key: value for key, value in settings.items() if key not in ("policy", "estimate", "k", "thinking")
    }
    if args.suite:
        from vqr1.experiments.table2 import table2

        if reading.pop("engine") != "transformers":
            raise ValueError("--suite measures the engine of transformers; leave out --engine")
        estimates = estimates or ["expected"]
        print(table2(args.policy, args.root, estimates, args.limit, args.out, **reading))
        return EXIT_OK
    sets = evaluation_rows(args.sets or SETS, args.split, args.limit, args.root)
    asked = trained_prompt(args.policy).get("thinking") if args.thinking is None else args.thinking
    modes = (True, False) if asked is None else (asked,)
    estimates = estimates or ["expected", "greedy", "sample"]
    result, tables = evaluate(args.policy, sets, estimates, modes, **reading)
    known = {name: rows.frame for name, rows in sets.items() if rows.frame["distortion"].isin(FAMILY).all()}
    rated = {name: frame for name, frame in known.items() if frame["mos"].notna().all()}
    oracle_rows = []
    for name, frame in rated.items():
        oracle_rows += [{"set": name, "estimate": oracle} | row for oracle, row in oracles(frame).items()]
    print(markdown(pd.concat([result, pd.DataFrame(oracle_rows)], ignore_index=True)))
    if args.out:
        save_scores(tables, Path(args.out))
        result.to_csv(Path(args.out) / "result.csv", index=False)
    failed = dict.fromkeys(error for table in tables.values() for error in unread(table))
    for error in failed:
        print(f"vqr1 evaluate: {error}", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_OK


CALIBRATE = "Fit a policy's error bars to rated pictures; they are kept in its folder, and scoring uses them."


def _calibrate_options(add: Add) -> None:
    add("--policy", required=True, metavar="FOLDER", help="a policy that may be written to")
    add("--sets", required=True, metavar="SET", help="one set, by name or manifest, that people rated")
    what = "rows to calibrate on: val, or others that the policy was not trained on (%(default)s)"
    add("--split", default="val", help=what)
    add("--limit", type=_count, help="at most so many rows, a fixed sample")
    _thinking(add)
    _root(add)


def _calibrate(args) -> int:
    from vqr1.evaluation import calibrate_policy

    found = calibrate_policy(
        args.policy, args.sets, args.split, args.limit, args.root, thinking=args.thinking
    )
    half = found.quantile * float(found.error(found.typical_spread or 0.0))
    print(
        f"Calibrated on {found.rows} rows of {found.dataset}: 95% of MOS are within ± {half:.3g} of what the "
        f"score says{', at the median spread' * (found.typical_spread is not None)}. Kept in {args.policy}"
    )
    return EXIT_OK


PROBES = ("progress", "eyes", "words", "error-bars", "srij")
"""Studies of given policies, which train nothing."""
ROOTED = ("eyes", "error-bars", "srij")
"""Those that take the folder of their set."""
STUDY = "Make the rows of a study, one per variant, seed and set; rows that are there are kept."


def _study_options(add: Add) -> None:
    names = (
        "demo",
        "people",
        "people-mixture",
        "controls",
        "comparison",
        "mixture",
        "pretraining",
        *PROBES,
    )
    add("name", choices=names, help="which; data/runs/NAME.csv has its rows")
    add("--seeds", type=int, nargs="+", help="only these (default: all of the study's)")
    what = f"only these (default: all of the study's); of {', '.join(PROBES)}: policies"
    add("--variants", nargs="+", metavar="VARIANT", help=what)
    what = "train fewer steps than the study says, for a look; needs a --csv of its own"
    add("--steps", type=_count, help=what)
    add("--out", default="runs/study", help="folder of the runs (%(default)s)")
    add("--csv", help="table to add to (data/runs/NAME.csv)")
    _root(add)


def _study(args) -> int:
    if args.root and args.name not in ROOTED:
        raise ValueError(f"--root is for {', '.join(ROOTED)}; for study {args.name}, set VQR1_DATA")
    if args.name in PROBES:  # no grid of trainings
        return _probe(args)

    from vqr1.experiments.studies import study
    from vqr1.records import markdown

    print(markdown(study(args.name, args.seeds, args.out, args.csv, args.variants, args.steps)))
    return EXIT_OK


def _probe(args) -> int:
    from vqr1.experiments import probes, srij, yardstick
    from vqr1.records import markdown

    if args.seeds or args.steps or args.csv:
        raise ValueError(
            f"study {args.name} has neither seeds, steps nor another table; it takes --variants, policies"
        )
    policies = args.variants or yardstick.POLICIES
    probe = {
        "progress": lambda: yardstick.study(policies),
        "eyes": lambda: probes.eyes(policies, args.root),
        "words": lambda: probes.words(policies),
        "error-bars": lambda: probes.error_bars(policies, args.root),
        "srij": lambda: srij.srij(policies, args.root),
    }
    print(markdown(probe[args.name]()))
    return EXIT_OK


# Data


DATA = "Check a data set: rows, range, splits, missing pictures; or list the public sets."


def _data_options(add: Add) -> None:
    what = "a public or embedded set, or the path of a manifest"
    add("name", nargs="?", metavar="NAME", help=what)
    what = "say where each public set can be had, its size and licence"
    add("--list", action="store_true", help=what)
    _root(add)
    what = "find biq2021's near twins again: prints data/biq2021_twins.csv"
    add("--twins", action="store_true", help=what)
    what = "write the simulated sets, data/sim-*.csv, again: the same bytes"
    add("--rebuild", action="store_true", help=what)


def _data(args) -> int:
    from vqr1.data.describe import describe_rows, list_sets, twins_table

    if args.rebuild:
        from vqr1.data.simulated import build_sim_sets

        for name, rows in build_sim_sets().items():
            print(f"{name}: {rows} rows")
        return EXIT_OK
    if args.list or not args.name:
        print(list_sets())
        return EXIT_OK
    if args.twins:
        print(twins_table(args.name, args.root), end="")
        return EXIT_OK
    text, expected = describe_rows(args.name, args.root)
    print(text)
    if expected:
        print(f"expected: {expected}", file=sys.stderr)
    return EXIT_FAILED if expected else EXIT_OK


def _sheet_options(add: Add) -> None:
    add("image", metavar="IMAGE", help="picture file")
    add("--out", default="sheet.png", help="the PNG to write (%(default)s)")


def _sheet(args) -> int:
    from vqr1.data.images import open_picture
    from vqr1.distortions import contact_sheet

    contact_sheet(open_picture(args.image)).save(args.out)
    print(f"Drawn: {args.out}")
    return EXIT_OK


PRETRAIN = "Make a policy like the embedded one: about 90 minutes on two CPU cores. Resumes by itself."


def _pretrain_options(add: Add) -> None:
    add("--out", default="runs/pretrain", help="folder of the run (%(default)s)")
    _root(add)
    what = "optimizer steps of the three stages"
    add("--steps", type=_count, nargs=3, metavar=("SEE", "SEE_MORE", "SPEAK"), help=what)
    add("--seed", type=int, default=0, help="of weights and pictures (%(default)s)")
    what = "instead: make the small CNN of the comparison again, data/cnn, with its log"
    add("--cnn", action="store_true", help=what)


def _pretrain(args) -> int:
    from vqr1.experiments.school import find_school

    school = find_school(args.root)
    if args.cnn:
        from vqr1.experiments.baselines import CNN, pretrain_cnn

        pretrain_cnn(school)
        print(f"The CNN is in {CNN}")
        return EXIT_OK

    from vqr1.experiments.pretraining import pretrain

    options = {"steps": tuple(args.steps)} if args.steps else {}
    print(f"The policy is in {pretrain(args.out, school=school, seed=args.seed, **options)}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
