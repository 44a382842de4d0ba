"""The runs behind the claims: the demo, its seeds, and its controls. One row per variant and seed."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vqr1.data import load_ratings
from vqr1.evaluation import SETS, agreement, evaluate, evaluation_rows, gain, markdown, naming, oracles, save_scores
from vqr1.plots import gallery, scatter, training_figure
from vqr1.policy import load_policy
from vqr1.training import load_config, machine_line, resume_from, train

CONTROLS = ("permuted", "format")
COLUMNS = [
    "study", "variant", "seed", "set", "estimate", "photographs", "rows", "unparseable", "srcc", "srcc_lo", "srcc_hi",
    "srcc_within_level", "plcc", "plcc_fit", "dominance", "seconds", "srcc_before", "srcc_within_level_before", "dominance_before",
    "srcc_gain", "srcc_gain_lo", "srcc_gain_hi", "srcc_within_level_gain", "srcc_within_level_gain_lo", "srcc_within_level_gain_hi",
]  # fmt: skip
"""Of a study's CSV. after - before = gain, with its 95% interval paired over photographs."""


def control(config: dict, kind: str) -> tuple[dict, pd.DataFrame | None]:
    """Return (config, frame) of a control that must not learn quality.

    permuted: each photograph's MOS are dealt anew to its pairs of distortion and level. format: the format reward alone.
    """
    if kind == "format":
        return config | {"reward": "format"}, None
    frame = load_ratings("sim-kadid").query("split == 'train'").reset_index(drop=True)
    rng = np.random.default_rng(config["grpo"]["seed"])
    return config, frame.assign(mos=frame.groupby("reference")["mos"].transform(rng.permutation))


def run(config: dict, output: Path, frames: dict, kind: str | None = None, resume: bool = True) -> tuple[dict, float]:
    """Train one variant, or go on with it, and return (scored tables by set, estimate and mode; seconds of training)."""
    frame = None
    if kind:
        config, frame = control(config, kind)
    start = time.time()
    policy = train(config, output, resume=resume, frame=frame)
    seconds = time.time() - start
    return evaluate(policy, frames, modes=(config["thinking"],))[1], seconds


def study(name: str, seeds: list[int], output: Path, csv: Path, config: str = "cpu", limit: int | None = None) -> pd.DataFrame:
    """Make the rows of a study (demo: the real reward; controls: what must not learn) and append them to `csv`.

    Rows that are already there are not made again. Each holds before, after and the paired gain of a set.
    """
    variants = [None] if name == "demo" else list(CONTROLS)
    done = pd.read_csv(csv, comment="#") if csv.is_file() else pd.DataFrame(columns=COLUMNS)
    todo = [(v, s) for v in variants for s in seeds if not ((done["variant"] == (v or "ranking")) & (done["seed"] == s)).any()]
    if not todo:
        return done
    settings = load_config(config)
    frames = evaluation_rows(SETS, limit=limit)
    before = evaluate(settings["policy"], frames, modes=(settings["thinking"],))[1]
    for variant, seed in todo:
        settings["grpo"]["seed"] = seed
        after, seconds = run(settings, output / f"{variant or 'ranking'}-{seed}", frames, variant)
        rows = [
            {"study": name, "variant": variant or "ranking", "seed": seed, "set": key[0], "estimate": key[1]}
            | _compared(before[key], after[key]) | {"seconds": round(seconds, 1)}
            for key in after
        ]  # fmt: skip
        done = pd.concat([done, pd.DataFrame(rows)]) if len(done) else pd.DataFrame(rows)
        done = done.reindex(columns=COLUMNS).convert_dtypes()
        _write(csv, done)
    return done


def _write(csv: Path, table: pd.DataFrame) -> None:
    csv.parent.mkdir(parents=True, exist_ok=True)
    partial = csv.with_suffix(".tmp")
    seeds = ", ".join(map(str, sorted(set(table["seed"]))))
    partial.write_text(f"# {machine_line(seeds)}\n{table.to_csv(index=False, float_format='%.4f')}", encoding="utf-8")
    partial.replace(csv)


def _compared(before: pd.DataFrame, after: pd.DataFrame) -> dict:
    old, new = agreement(before), agreement(after)
    row = {f"{key}_before": old[key] for key in ("srcc", "srcc_within_level", "dominance") if key in old}
    return row | new | (gain(after, before) if "srcc" in new else {})


def demo(output: str | Path, config: str = "cpu", resume: bool = False, steps: int | None = None, limit: int | None = None) -> str:
    """Evaluate the policy, train it by RL to rank, evaluate again; write everything into `output`, return the report.

    steps, limit: fewer training steps and test rows than the configuration's, for a quick look.
    """
    output, settings = Path(output), load_config(config)
    resume_from(output, resume)  # before minutes of evaluation
    if steps:
        settings["grpo"]["max_steps"] = steps
    start = time.time()
    print("Rendering the test pictures and scoring them before training.", flush=True)
    frames = evaluation_rows(SETS, limit=limit)
    before, old = evaluate(settings["policy"], frames)
    evaluated = time.time()
    print(f"Rendered and evaluated in {evaluated - start:.0f} s. Training for {settings['grpo']['max_steps']} steps.", flush=True)
    policy = train(settings, output, resume=resume)
    trained = time.time()
    print(f"Trained in {trained - evaluated:.0f} s. Evaluating again.", flush=True)
    after, new = evaluate(load_policy(policy), frames)
    save_scores(old, output / "before")
    save_scores(new, output / "after")
    figures(output, frames, old, new, settings["thinking"])
    report = demo_report(before, after, old, new, frames, settings, trained - evaluated)
    (output / "report.md").write_text(report, encoding="utf-8")
    return report


def demo_report(before: pd.DataFrame, after: pd.DataFrame, old: dict, new: dict, frames: dict, settings: dict, seconds: float) -> str:
    """Return the report of a demo in Markdown."""
    columns = ["set", "thinking", "rows", "unparseable", "srcc", "srcc_lo", "srcc_hi", "srcc_within_level", "plcc", "plcc_fit", "dominance"]
    lines = []
    for key in old:
        if "srcc" in agreement(old[key]):
            lines.append({"set": key[0], "thinking": key[2]} | gain(new[key], old[key]))
    gold = [{"set": name, "oracle": oracle} | row for name, frame in frames.items() if name != "sim-mixed" for oracle, row in oracles(frame).items()]
    names = [{"policy": which, "well_formed": table["well_formed"].mean()} | naming(table) for which, table in
             (("before", old["sim-kadid", "expected", True]), ("after", new["sim-kadid", "expected", True]))]  # fmt: skip
    parts = [
        "# From photographs to a trained ranker",
        "Ratings are simulated (`sim-`): made from published human means of KADID-10k's types and levels, not from people who saw these pictures.",
        f"{machine_line(settings['grpo']['seed'])}; training {seconds:.0f} s",
        "## Before", markdown(before.reindex(columns=columns)),
        "## After", markdown(after.reindex(columns=columns)),
        "## Gain, paired over the same photographs (95% intervals)", markdown(pd.DataFrame(lines)),
        "## What knowing the level, or type and level, would give", markdown(pd.DataFrame(gold)[["set", "oracle", "srcc", "srcc_within_level", "plcc"]]),
        "## What the reasoning names", markdown(pd.DataFrame(names).drop(columns="named_rows")),
        "![curves](training.png)", "![scores against simulated MOS](scatter.png)", "![six pictures](pictures.png)",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def figures(output: Path, frames: dict, old: dict, new: dict, thinking: bool) -> None:
    """Write training.png, scatter.png and pictures.png: six pictures with what was thought of them before and after."""
    training_figure(pd.read_csv(output / "log.csv", comment="#")).savefig(output / "training.png")
    key = ("sim-kadid", "expected", thinking)
    one, two = old[key], new[key]
    figure = scatter_pair(one, two)
    figure.savefig(output / "scatter.png")
    varied = one[one["level"] > 1].sample(frac=1, random_state=0)
    chosen = varied.drop_duplicates("reference").drop_duplicates("distortion").index[:6]
    captions = [
        f"before {one.score[i]:.2f}: {one.reasoning[i]}\nafter {two.score[i]:.2f}: {two.reasoning[i]}" for i in chosen
    ]
    titles = [f"{one.distortion[i]}, level {one.level[i]}\nsimulated MOS {one.mos[i]:.2f}" for i in chosen]
    gallery([frames["sim-kadid"].attrs["images"][i] for i in chosen], titles, captions).savefig(output / "pictures.png")


def scatter_pair(one: pd.DataFrame, two: pd.DataFrame):
    """Return scores against MOS before and after, side by side."""
    figure = Figure(figsize=(8, 4.4), layout="constrained", dpi=100)
    for ax, table, title in zip(figure.subplots(1, 2), (one, two), ("before", "after")):
        scatter(ax, table["mos"], table["score"], title)
    return figure
