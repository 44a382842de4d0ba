"""Draw data/runs/people-order.png, the README's first picture: `python tools/readme_picture.py`.

Left: photographs in ten groups, from those that people like least to those that they like most, and the mean
rank that the policy gives them, before RL and after (each seed). Right: SRCC during training.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from vqr1 import plots
from vqr1.records import read_table

RUNS = Path(__file__).resolve().parents[1] / "data" / "runs"
GROUPS = 10
BEFORE, AFTER = "before/0", [f"ranking/{seed}" for seed in range(5)]


def draw_order(ax: Axes, table: pd.DataFrame) -> None:
    """Draw the mean rank, in percent of the photographs, of each tenth by people's ratings."""
    tenth = pd.qcut(table["mos"].rank(method="first"), GROUPS, labels=False) + 1
    place = 100 * table[["mos", BEFORE, *AFTER]].rank(pct=True).groupby(tenth).mean()
    ax.plot(place["mos"], ":", color="black", label="people")
    ax.plot(place[BEFORE], "o-", color=plots.COLORS[1], label="before RL")
    for name in AFTER:
        label = "after RL, five seeds" if name == AFTER[0] else None
        ax.plot(place[name], "o-", color=plots.COLORS[0], label=label)
    ax.set(
        title=f"{len(table):,} photographs that it never saw",
        xlabel="tenth of the photographs, by people's ratings",
        ylabel="mean rank by the policy, % (100 = best)",
        xticks=range(1, GROUPS + 1),
        ylim=(0, 100),
    )
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)


def draw_training(ax: Axes, log: pd.DataFrame) -> None:
    """Draw each seed's SRCC on the validation photographs that training watched."""
    for _, own in log[log["variant"] == "ranking"].groupby("seed"):
        watched = own.dropna(subset="val_srcc")
        ax.plot(watched["step"], watched["val_srcc"], "o-", color=plots.COLORS[0])
    ax.set(
        title="during training, five seeds",
        xlabel="step",
        ylabel="SRCC, validation photographs",
        ylim=(0, 0.7),
    )
    ax.grid(alpha=0.3)


def main() -> int:
    plots.style()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[3, 2])
    draw_order(axes[0], read_table(RUNS / "people-scores.csv.gz"))
    draw_training(axes[1], read_table(RUNS / "people-log.csv"))
    figure.savefig(RUNS / "people-order.png", metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
