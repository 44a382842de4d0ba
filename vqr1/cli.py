"""The command line: vqr1 demo, train, score, compare, describe, evaluate, data, sheet, pretrain, study."""

import argparse
import os
import sys
from pathlib import Path

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

SCORE_HELP = """\
With --out, rows are on disk as soon as they are scored: after a kill, Ctrl-C or a full disk the same command goes on
where it stopped and scores no picture twice. Rows with an error are kept too; delete such a row to try its picture again.
Parquet cannot grow, so its rows wait in NAME.parquet.partial.jsonl until all are there.

examples:
  vqr1 score photos --out scores.csv                      a folder and all below it
  vqr1 score 'shoot/**/*.tif' portrait.jpg --thinking     a glob and a file, to the terminal
  find /data -name '*.jpg' -mtime -1 | vqr1 score - --out scores.parquet

on several machines, each with the same pictures, then together again, as if one had done it all:
  vqr1 score photos --shard 1/2 --out part1.csv           vqr1 score photos --shard 2/2 --out part2.csv
  awk 'NR == 1 || FNR > 1' part1.csv part2.csv > scores.csv
  (JSONL: cat part1.jsonl part2.jsonl > scores.jsonl; Parquet: pandas.read_parquet of the folder of parts)
  Sampled answers depend on the pictures in the same batch: --estimate sample needs --batch-size 1 for the same scores.

exit code: 0 all have a score, 1 some have not (their rows say why), 2 wrong usage, 130 interrupted"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqr1", description="Image quality assessment by reinforcement learning to rank."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, more: str | None = None) -> argparse.ArgumentParser:
        shape = argparse.RawDescriptionHelpFormatter if more else argparse.HelpFormatter
        return commands.add_parser(name, help=text, description=text, epilog=more, formatter_class=shape)

    demo = command(
        "demo", "Evaluate the embedded policy, train it by RL to rank, evaluate again; write a report."
    )
    demo.add_argument(
        "--out", default="runs/demo", help="folder for log, checkpoints, plots and report.md (%(default)s)"
    )
    demo.add_argument("--config", default="cpu", help="name or path of a configuration (%(default)s)")
    demo.add_argument(
        "--resume", action="store_true", help="go on with an interrupted demo from its last checkpoint"
    )
    demo.add_argument("--steps", type=_count, help="train fewer steps than the configuration says")
    demo.add_argument("--limit", type=_count, help="evaluate at most so many rows of each set")

    train = command("train", "Train a policy by RL to rank.")
    train.add_argument("--config", default="cpu", help="name or path of a configuration (%(default)s)")
    train.add_argument("--out", default="runs/train", help="folder of the run (%(default)s)")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    train.add_argument("--steps", type=_count, help="train fewer steps than the configuration says")
    train.add_argument("--seed", type=int, help="another seed than the configuration's")

    score = command(
        "score", "Score pictures: 1 (very poor) to 5 (excellent), with a standard deviation.", SCORE_HELP
    )
    score.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="pictures, folders, 'globs' (** for any depth), or - for a list on standard input",
    )
    _policy(score)
    score.add_argument(
        "--estimate",
        choices=("expected", "greedy", "sample"),
        default="expected",
        help="how the score is read off (%(default)s)",
    )
    score.add_argument(
        "--k", type=int, default=6, help="answers per picture for --estimate sample (%(default)s)"
    )
    score.add_argument("--thinking", action="store_true", help="let the policy reason first")
    score.add_argument(
        "--batch-size", type=int, default=16, help="pictures at a time; fewer need less memory (%(default)s)"
    )
    score.add_argument("--out", help="add rows to this .csv, .jsonl or .parquet file instead of printing CSV")
    score.add_argument(
        "--shard",
        default="1/1",
        metavar="I/N",
        help="only the i-th of n blocks of the pictures (%(default)s)",
    )

    compare = command("compare", "Print the probability that the first picture looks better than the second.")
    compare.add_argument("images", nargs=2, metavar="IMAGE", help="picture files")
    _policy(compare)

    describe = command("describe", "Print what the policy thinks of a picture.")
    describe.add_argument("images", nargs=1, metavar="IMAGE", help="picture file")
    _policy(describe)

    evaluate = command("evaluate", "Score rated sets and print SRCC, PLCC and intervals beside the oracles.")
    _policy(evaluate)
    what = evaluate.add_mutually_exclusive_group()
    what.add_argument(
        "--sets",
        nargs="+",
        default=["sim-kadid", "sim-unseen", "sim-mixed"],
        help="names or manifests (%(default)s)",
    )
    what.add_argument(
        "--suite",
        choices=("table2",),
        help="the paper's rows beside those of the public sets that are there, all splits",
    )
    _root(evaluate)
    evaluate.add_argument("--split", default="test", help="of --sets: train, val, test or all (%(default)s)")
    evaluate.add_argument(
        "--estimates",
        nargs="+",
        choices=("expected", "greedy", "sample"),
        help="how scores are read off (all three; of a suite: expected)",
    )
    evaluate.add_argument("--limit", type=_count, help="at most so many rows of each set, a fixed sample")
    evaluate.add_argument("--out", help="write the tables into this folder")

    data = command(
        "data", "Check a data set: rows, range, splits, missing pictures; or list the public sets."
    )
    data.add_argument(
        "name", nargs="?", metavar="NAME", help="a public or embedded set, or the path of a manifest"
    )
    twins = "find biq2021's near twins again: prints data/biq2021_twins.csv"
    data.add_argument("--twins", action="store_true", help=twins)
    data.add_argument(
        "--list", action="store_true", help="say where each public set can be had, its size and licence"
    )
    _root(data)

    sheet = command("sheet", "Draw all 25 distortions at 5 levels of a picture.")
    sheet.add_argument("images", nargs=1, metavar="IMAGE", help="picture file")
    sheet.add_argument("--out", default="sheet.png", help="the PNG to write (%(default)s)")

    pretrain = command(
        "pretrain", "Make the embedded policy again: about an hour on two CPU cores. Resumes by itself."
    )
    pretrain.add_argument("--out", default="runs/pretrain", help="folder of the run (%(default)s)")
    pretrain.add_argument(
        "--steps", type=_count, nargs=2, metavar=("SEE", "SPEAK"), help="optimizer steps of the two stages"
    )
    pretrain.add_argument("--seed", type=int, default=0, help="of weights and pictures (%(default)s)")

    study = command(
        "study", "Make the rows of a study, one per variant, seed and set; rows that are there are kept."
    )
    study.add_argument(
        "name",
        choices=("demo", "controls", "comparison", "mixture", "pretraining", "pretraining-long", "progress"),
        help="which; data/runs/NAME.csv has its rows",
    )
    study.add_argument("--seeds", type=int, nargs="+", help="only these (default: all of the study's)")
    study.add_argument(
        "--variants",
        nargs="+",
        metavar="VARIANT",
        help="only these (default: all of the study's); of progress: policies",
    )
    study.add_argument(
        "--steps",
        type=_count,
        help="train fewer steps than the study says, for a look; needs a --csv of its own",
    )
    study.add_argument("--out", default="runs/study", help="folder of the runs (%(default)s)")
    study.add_argument("--csv", help="table to add to (data/runs/NAME.csv)")
    return parser


def _count(text: str) -> int:
    """Return a number of steps or rows: 0 would be taken for none given."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def _policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        default="tiny-policy",
        help="tiny-policy, a folder of a model or an adapter, or a hub name (%(default)s)",
    )


def _root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root",
        metavar="DIR",
        help="where the public sets are: a set's folder, or one that holds folders of sets (VQR1_DATA)",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0, 1 when something failed, 2 for wrong usage, 130 when interrupted."""
    args = _parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may be no text in the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.command not in ("data", "sheet"):
            from transformers.utils import logging

            logging.disable_progress_bar()  # of loading and saving weights; the training's bar stays
        return globals()[f"_{args.command}"](args)
    except KeyboardInterrupt:
        trains = args.command in ("demo", "train")
        print(
            "\nInterrupted."
            + " What was saved up to the last checkpoint is kept: --resume goes on from there." * trains,
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:  # what the user gave cannot be used; the text says what and why
        print(f"vqr1 {args.command}: {error}", file=sys.stderr)
        return EXIT_USAGE


def _demo(args) -> int:
    from vqr1.experiments.demo import demo

    print(demo(args.out, args.config, args.resume, args.steps, args.limit))
    print(f"Written to {args.out}: report.md, log.csv, policy/, training.png, scatter.png, pictures.jpg")
    return EXIT_OK


def _train(args) -> int:
    from vqr1.config import load_config
    from vqr1.training import train

    config = load_config(args.config)
    config["grpo"] |= {
        key: value for key, value in (("max_steps", args.steps), ("seed", args.seed)) if value is not None
    }
    print(f"The trained policy is in {train(config, args.out, args.resume)}")
    return EXIT_OK


def _score(args) -> int:
    import warnings

    from vqr1.scoring import WINDOW, Scorer
    from vqr1.serving.bulk import RowFile, find_pictures, shard

    warnings.filterwarnings(
        "ignore", module="PIL"
    )  # what it says of damaged or large files stands in their rows
    pictures = shard(find_pictures(args.paths), args.shard, WINDOW * args.batch_size)
    settings = {
        "policy": args.policy,
        "estimate": args.estimate,
        "k": args.k if args.estimate == "sample" else 1,
        "thinking": args.thinking,
    }

    def scorer() -> Scorer:
        return Scorer(args.policy, args.thinking, args.estimate, args.k, args.batch_size)

    if not args.out:
        return _print_scores(scorer(), pictures, settings)
    with RowFile(args.out, settings) as file:
        return _write_scores(file, scorer, pictures)


def _print_scores(scorer, pictures: list[str], settings: dict) -> int:
    from vqr1.serving.bulk import COLUMNS, score_rows, to_csv

    failed = False
    try:
        print(",".join(COLUMNS))
        for rows in score_rows(scorer, pictures, settings):
            print(to_csv(rows), end="", flush=True)
            failed |= any(row["error"] for row in rows)
    except OSError as error:  # the disk is full, or who reads has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"vqr1 score: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_FAILED if failed else EXIT_OK


def _write_scores(file, scorer, pictures: list[str]) -> int:
    from tqdm import tqdm

    from vqr1.serving.bulk import plain, score_rows

    left = [picture for picture in pictures if plain(picture) not in file.done]
    here = len(pictures) - len(left)
    model = scorer() if left else None
    try:
        with tqdm(total=len(pictures), initial=here, unit=" images", dynamic_ncols=True) as bar:
            for rows in score_rows(model, left, file.settings) if left else ():
                file.write(rows)
                bar.update(len(rows))
        file.finish()
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. {len(file.done)} rows are in {file.log}; the same command goes on from there.",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    except OSError as error:
        print(
            f"\nvqr1 score: {file.path}: {error.strerror}. The rows in {file.log} are whole; the same command goes on from there.",
            file=sys.stderr,
        )
        return EXIT_FAILED
    failed = sum(file.done[plain(picture)] for picture in pictures)
    before = f", {here} of them from before" if here else ""
    print(
        f"{file.path}: {len(pictures)} pictures{before}; {failed} without a score"
        + (" (see column error)" if failed else "")
    )
    return EXIT_FAILED if failed else EXIT_OK


def _compare(args) -> int:
    from vqr1.scoring import Scorer

    probability = Scorer(args.policy).compare(*args.images)
    print(f"P({args.images[0]} looks better than {args.images[1]}) = {probability:.3f}")
    return EXIT_OK


def _describe(args) -> int:
    from vqr1.scoring import Scorer

    print(Scorer(args.policy).describe(args.images[0]))
    return EXIT_OK


def _evaluate(args) -> int:
    import pandas as pd

    from vqr1.evaluation import FAMILY, evaluate, evaluation_rows, oracles, save_scores, unread
    from vqr1.records import markdown

    if args.suite:
        from vqr1.experiments.table2 import table2

        print(table2(args.policy, args.root, args.estimates or ["expected"], args.limit, args.out))
        return EXIT_OK
    sets = evaluation_rows(args.sets, args.split, args.limit, args.root)
    result, tables = evaluate(args.policy, sets, args.estimates or ["expected", "greedy", "sample"])
    known = {name: rows.frame for name, rows in sets.items() if rows.frame["distortion"].isin(FAMILY).all()}
    rated = {name: frame for name, frame in known.items() if frame["mos"].notna().all()}
    gold = pd.DataFrame(
        [
            {"set": name, "estimate": oracle} | row
            for name, frame in rated.items()
            for oracle, row in oracles(frame).items()
        ]
    )
    print(markdown(pd.concat([result, gold], ignore_index=True)))
    if args.out:
        save_scores(tables, Path(args.out))
        result.to_csv(Path(args.out) / "result.csv", index=False)
    failed = dict.fromkeys(error for table in tables.values() for error in unread(table))
    for error in failed:
        print(f"vqr1 evaluate: {error}", file=sys.stderr)
    return EXIT_FAILED if failed else EXIT_OK


def _data(args) -> int:
    from vqr1.data.manifests import data_root, load_ratings
    from vqr1.data.public_sets import SETS, public_name, read_public

    if args.list or not args.name:
        print(
            *(
                f"{name}: {s.title}; {s.rows} pictures\n    where: {s.source}\n    size: {s.size}; licence: {s.licence}\n    expected: {s.layout}\n"
                f"    {s.note}"
                for name, s in SETS.items()
            ),
            sep="\n",
        )
        return EXIT_OK
    known = public_name(args.name)
    public = SETS.get(known)
    if args.twins:
        return _twins(known, args.root or data_root())
    frame = (
        read_public(known, args.root or data_root(), strict=False)
        if public
        else load_ratings(args.name, args.root)
    )
    missing = frame.attrs.get("missing", [])
    splits = frame["split"].replace("", "none").value_counts()
    print(f"{known or args.name}, in {frame.attrs['root']}")
    print(
        f"pictures    {len(frame) - len(missing)}"
        + (f", {len(missing)} missing" if missing else "")
        + (f"; published: {public.rows}" if public else "")
    )
    print(f"mos         {frame['mos'].min():.4g} to {frame['mos'].max():.4g}, higher is better")
    print(
        f"std         {frame['std'].min():.4g} to {frame['std'].max():.4g}"
        if frame["std"].notna().any()
        else "std         none"
    )
    print(f"references  {frame['reference'].nunique()}")
    print("splits      " + ", ".join(f"{split} {count}" for split, count in splits.items()))
    if "subset" in frame:
        counts = frame["subset"].value_counts().sort_index().items()
        print("subsets     " + ", ".join(f"{name} {count}" for name, count in counts))
    if public:
        print(f"note        {public.note}")
    for name in missing[:10]:
        print(f"missing: {name}")
    if missing:
        print(f"expected: {public.layout}", file=sys.stderr)
    return EXIT_FAILED if missing else EXIT_OK


def _twins(name: str | None, root: str | Path) -> int:
    from vqr1.data.people_sets import TWIN_BITS, TWIN_CORRELATION, near_twins
    from vqr1.data.public_sets import read_public

    if name != "biq2021":
        raise ValueError("--twins is for biq2021 alone: its official split is known to have them")
    frame = read_public(name, root)
    paths = [Path(frame.attrs["root"], image) for image in frame["image"]]
    twins = near_twins(paths, frame["name"], frame["part"] == "train")
    rule = f"dHash <= {TWIN_BITS} of 256 bits, thumbnails' correlation > {TWIN_CORRELATION}"
    print(f"# near twins of BIQ2021: {rule}; nearest: training picture; made by vqr1 data biq2021 --twins")
    print(twins.to_csv(index=False, lineterminator="\n"), end="")
    return EXIT_OK


def _sheet(args) -> int:
    from vqr1.data.manifests import open_picture
    from vqr1.distortions import contact_sheet

    contact_sheet(open_picture(args.images[0])).save(args.out)
    print(f"Drawn: {args.out}")
    return EXIT_OK


def _pretrain(args) -> int:
    from vqr1.experiments.pretraining import pretrain

    options = {"steps": tuple(args.steps)} if args.steps else {}
    print(f"The policy is in {pretrain(args.out, seed=args.seed, **options)}")
    return EXIT_OK


def _study(args) -> int:
    if args.name == "progress":  # no grid of trainings
        return _progress(args)

    from vqr1.experiments.studies import study
    from vqr1.records import markdown

    print(markdown(study(args.name, args.seeds, args.out, args.csv, args.variants, args.steps)))
    return EXIT_OK


def _progress(args) -> int:
    from vqr1.experiments.yardstick import POLICIES, study
    from vqr1.records import markdown

    if args.seeds or args.steps or args.csv:
        raise ValueError(
            "study progress has neither seeds, steps nor another table; only --variants, the policies, can be given"
        )
    print(markdown(study(args.variants or POLICIES)))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
