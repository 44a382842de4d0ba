"""The command line: vqr1 demo, train, score, compare, describe, evaluate, sheet, pretrain, study."""

import argparse
import csv
import sys
from pathlib import Path

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vqr1", description="Image quality assessment by reinforcement learning to rank.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    demo = command("demo", "Evaluate the embedded policy, train it by RL to rank, evaluate again; write a report.")
    demo.add_argument("--out", default="runs/demo", help="folder for log, checkpoints, plots and report.md (%(default)s)")
    demo.add_argument("--config", default="cpu", help="name or path of a configuration (%(default)s)")
    demo.add_argument("--resume", action="store_true", help="go on with an interrupted demo from its last checkpoint")
    demo.add_argument("--steps", type=int, help="train fewer steps than the configuration says")
    demo.add_argument("--limit", type=int, help="evaluate at most so many rows of each set")

    train = command("train", "Train a policy by RL to rank.")
    train.add_argument("--config", default="cpu", help="name or path of a configuration (%(default)s)")
    train.add_argument("--out", default="runs/train", help="folder of the run (%(default)s)")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    train.add_argument("--steps", type=int, help="train fewer steps than the configuration says")
    train.add_argument("--seed", type=int, help="another seed than the configuration's")

    score = command("score", "Score pictures: 1 (very poor) to 5 (excellent), with a standard deviation.")
    score.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    _policy(score)
    score.add_argument("--estimate", choices=("expected", "greedy", "sample"), default="expected", help="how the score is read off (%(default)s)")
    score.add_argument("--thinking", action="store_true", help="let the policy reason first")
    score.add_argument("--out", help="write CSV rows to this file instead of the terminal")

    compare = command("compare", "Print the probability that the first picture looks better than the second.")
    compare.add_argument("images", nargs=2, metavar="IMAGE", help="picture files")
    _policy(compare)

    describe = command("describe", "Print what the policy thinks of a picture.")
    describe.add_argument("images", nargs=1, metavar="IMAGE", help="picture file")
    _policy(describe)

    evaluate = command("evaluate", "Score rated sets and print SRCC, PLCC and intervals beside the oracles.")
    _policy(evaluate)
    evaluate.add_argument("--sets", nargs="+", default=["sim-kadid", "sim-unseen", "sim-mixed"], help="names or manifests (%(default)s)")
    evaluate.add_argument("--split", default="test", help="train, val, test or all (%(default)s)")
    evaluate.add_argument("--estimates", nargs="+", choices=("expected", "greedy", "sample"), default=["expected", "greedy", "sample"], help="how scores are read off (%(default)s)")
    evaluate.add_argument("--limit", type=int, help="at most so many rows of each set, a fixed sample")
    evaluate.add_argument("--out", help="write the tables into this folder")

    sheet = command("sheet", "Draw all 25 distortions at 5 levels of a picture.")
    sheet.add_argument("images", nargs=1, metavar="IMAGE", help="picture file")
    sheet.add_argument("--out", default="sheet.png", help="the PNG to write (%(default)s)")

    pretrain = command("pretrain", "Make the embedded policy again: about an hour on two CPU cores. Resumes by itself.")
    pretrain.add_argument("--out", default="runs/pretrain", help="folder of the run (%(default)s)")
    pretrain.add_argument("--steps", type=int, nargs=2, metavar=("SEE", "SPEAK"), help="optimizer steps of the two stages")
    pretrain.add_argument("--seed", type=int, default=0, help="of weights and pictures (%(default)s)")

    study = command("study", "Make the rows of a study, one per variant and seed; rows that are there are kept.")
    study.add_argument("name", choices=("demo", "controls"), help="demo: seeds of the demo; controls: what must not learn quality")
    study.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (%(default)s)")
    study.add_argument("--out", default="runs/study", help="folder of the runs (%(default)s)")
    study.add_argument("--csv", help="table to append to (data/runs/NAME.csv)")
    study.add_argument("--limit", type=int, help="evaluate at most so many rows of each set")
    return parser


def _policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", default="tiny-policy", help="tiny-policy, a folder of a model or an adapter, or a hub name (%(default)s)")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0, 1 when something failed, 2 for wrong usage, 130 when interrupted."""
    args = _parser().parse_args(arguments)
    try:
        if args.command != "sheet":
            from transformers.utils import logging

            logging.disable_progress_bar()  # of loading and saving weights; the training's bar stays
        return globals()[f"_{args.command}"](args)
    except KeyboardInterrupt:
        print("\nInterrupted. What a training run saved up to its last checkpoint is kept: --resume goes on from there.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # what the user gave cannot be used; the text says what and why
        print(f"vqr1 {args.command}: {error}", file=sys.stderr)
        return EXIT_USAGE


def _demo(args) -> int:
    from vqr1.studies import demo

    print(demo(args.out, args.config, args.resume, args.steps, args.limit))
    print(f"Written to {args.out}: report.md, log.csv, policy/, training.png, scatter.png, pictures.png")
    return EXIT_OK


def _train(args) -> int:
    from vqr1.training import load_config, train

    config = load_config(args.config)
    config["grpo"] |= {key: value for key, value in (("max_steps", args.steps), ("seed", args.seed)) if value is not None}
    print(f"The trained policy is in {train(config, args.out, args.resume)}")
    return EXIT_OK


def _score(args) -> int:
    from vqr1.scoring import Scorer

    scorer = Scorer(args.policy, args.thinking, args.estimate)
    out = open(args.out, "w", newline="", encoding="utf-8") if args.out else sys.stdout
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["image", "score", "std", "estimate", "thinking", "reasoning", "error"])
    failed = 0
    try:
        for start, batch in zip(range(0, len(args.images), scorer.batch_size), scorer.batches(args.images)):
            for image, score in zip(args.images[start:], batch):
                numbers = ["", ""] if score.error else [f"{score.score:.4f}", f"{score.std:.4f}"]
                rows.writerow([image, *numbers, args.estimate, args.thinking, score.reasoning, score.error])
                failed += bool(score.error)
            out.flush()
    finally:
        if args.out:
            out.close()
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

    from vqr1.evaluation import evaluate, evaluation_rows, markdown, oracles, save_scores

    frames = evaluation_rows(args.sets, args.split, args.limit)
    result, tables = evaluate(args.policy, frames, args.estimates)
    rated = {name: frame for name, frame in frames.items() if frame["mos"].notna().all() and frame["distortion"].ne("").all()}
    gold = pd.DataFrame([{"set": name, "estimate": oracle} | row for name, frame in rated.items() for oracle, row in oracles(frame).items()])
    print(markdown(pd.concat([result, gold], ignore_index=True)))
    if args.out:
        save_scores(tables, Path(args.out))
        result.to_csv(Path(args.out) / "result.csv", index=False)
    return EXIT_OK


def _sheet(args) -> int:
    from vqr1.data import open_picture
    from vqr1.distortions import contact_sheet

    contact_sheet(open_picture(args.images[0])).save(args.out)
    print(f"Drawn: {args.out}")
    return EXIT_OK


def _pretrain(args) -> int:
    from vqr1.pretraining import pretrain

    options = {"steps": tuple(args.steps)} if args.steps else {}
    print(f"The policy is in {pretrain(args.out, seed=args.seed, **options)}")
    return EXIT_OK


def _study(args) -> int:
    from vqr1.evaluation import markdown
    from vqr1.studies import study

    csv_path = Path(args.csv or f"data/runs/{args.name}.csv")
    print(markdown(study(args.name, args.seeds, Path(args.out), csv_path, limit=args.limit)))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
