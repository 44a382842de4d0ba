"""`vqr1 demo`: evaluate the embedded policy, train it by RL to rank, evaluate again, report in pictures."""

import time
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from vqr1.config import Settings, load_config
from vqr1.evaluation import (
    EVALUATION_SETS,
    Rows,
    evaluate,
    evaluation_rows,
    gain,
    naming,
    oracles,
    protocol,
    save_scores,
)
from vqr1.plots import gallery, jpeg, scatter, training_figure
from vqr1.policy import load_policy
from vqr1.records import machine_line, markdown, read_table
from vqr1.runlog import resume_from
from vqr1.training import train


def demo(
    output: str | Path,
    config: str = "cpu",
    resume: bool = False,
    steps: int | None = None,
    limit: int | None = None,
) -> str:
    """Evaluate the policy, train it by RL to rank, evaluate again; return the report.

    Args:
        output: folder that gets everything: run, scores, figures, report.md.
        config: name or path of the configuration.
        resume: go on with the run that is in the folder.
        steps: fewer training steps than the configuration's, for a quick look.
        limit: at most so many test rows of each set, for a quick look.
    """
    output, settings = Path(output), load_config(config)
    if steps:
        settings = settings.changed(grpo={"max_steps": steps})
    resume_from(output, resume, settings)  # before minutes of evaluation
    start = time.time()
    print("Rendering the test pictures and scoring them before training.", flush=True)
    sets = evaluation_rows(EVALUATION_SETS, limit=limit)
    before, old = evaluate(settings.model_name_or_path, sets)
    evaluated = time.time()
    print(
        f"Rendered and evaluated in {evaluated - start:.0f} s. "
        f"Training for {settings.grpo['max_steps']} steps.",
        flush=True,
    )
    policy = train(settings, output, resume=resume)
    trained = time.time()
    print(f"Trained in {trained - evaluated:.0f} s. Evaluating again.", flush=True)
    after, new = evaluate(load_policy(policy), sets)
    save_scores(old, output / "before")
    save_scores(new, output / "after")
    figures(output, sets["sim-kadid"], old, new, settings.thinking)
    report = demo_report(before, after, old, new, settings, trained - evaluated)
    (output / "report.md").write_text(report, encoding="utf-8")
    return report


def demo_report(
    before: pd.DataFrame, after: pd.DataFrame, old: dict, new: dict, settings: Settings, seconds: float
) -> str:
    """Return the report of a demo in Markdown."""
    columns = [
        "set",
        "thinking",
        "rows",
        "unparseable",
        "srcc",
        "srcc_lo",
        "srcc_hi",
        "srcc_within_level",
        "plcc",
        "plcc_fit",
        "dominance",
    ]
    rated = {key: table for key, table in old.items() if protocol(table) != "dominance"}
    lines = [
        {"set": name, "thinking": thinking} | gain(new[name, estimate, thinking], table)
        for (name, estimate, thinking), table in rated.items()
    ]
    known = {name: table for (name, _, _), table in rated.items()}
    oracle_rows = [
        {"set": name, "oracle": oracle} | row
        for name, table in known.items()
        for oracle, row in oracles(table).items()
    ]
    thoughts = {
        which: tables["sim-kadid", "expected", True] for which, tables in (("before", old), ("after", new))
    }
    names = [
        {"policy": which, "well_formed": table["well_formed"].mean()} | naming(table)
        for which, table in thoughts.items()
    ]
    parts = [
        "# From photographs to a trained ranker",
        "Ratings are simulated (`sim-`): made from published human means of KADID-10k's types and levels, "
        "not from people who saw these pictures.",
        f"{machine_line(settings.grpo['seed'])}; training {seconds:.0f} s",
        "## Before",
        markdown(before.reindex(columns=columns)),
        "## After",
        markdown(after.reindex(columns=columns)),
        "## Gain, paired over the same photographs (95% intervals)",
        markdown(pd.DataFrame(lines)),
        "## What knowing the level, or type and level, would give",
        markdown(pd.DataFrame(oracle_rows)[["set", "oracle", "srcc", "srcc_within_level", "plcc"]]),
        "## What the reasoning names",
        markdown(pd.DataFrame(names).drop(columns="named_rows")),
        "![curves](training.png)",
        "![scores against simulated MOS](scatter.png)",
        "![six pictures](pictures.jpg)",
    ]
    return "\n\n".join(parts) + "\n"


def figures(output: Path, rows: Rows, old: dict, new: dict, thinking: bool) -> None:
    """Write training.png, scatter.png, and pictures.jpg: six pictures with the policy's reasoning."""
    training_figure(read_table(output / "log.csv")).savefig(output / "training.png")
    key = ("sim-kadid", "expected", thinking)
    one, two = old[key], new[key]
    figure = scatter_pair(one, two)
    figure.savefig(output / "scatter.png")
    varied = one[one["level"] > 1].sample(frac=1, random_state=0)
    chosen = varied.drop_duplicates("reference").drop_duplicates("distortion").index[:6]
    captions = [
        f"before {one.score[i]:.2f}: {one.reasoning[i]}\nafter {two.score[i]:.2f}: {two.reasoning[i]}"
        for i in chosen
    ]
    titles = [f"{one.distortion[i]}, level {one.level[i]}\nsimulated MOS {one.mos[i]:.2f}" for i in chosen]
    (output / "pictures.jpg").write_bytes(
        jpeg(gallery([rows.images[i] for i in chosen], titles, captions), quality=92)
    )


def scatter_pair(one: pd.DataFrame, two: pd.DataFrame):
    """Return scores against MOS before and after, side by side."""
    figure = Figure(figsize=(8, 4.4), layout="constrained", dpi=110)
    for ax, table, title in zip(figure.subplots(1, 2), (one, two), ("before", "after")):
        scatter(ax, table["mos"], table["score"], title)
    return figure
