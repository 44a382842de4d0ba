"""Matplotlib helpers; each draws on the axes it is given."""

import io
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from scipy.stats import norm

COLORS = ("#0072B2", "#E69F00", "#404040", "#CC79A7")
"""Blue, orange, grey and pink, which colour-blind readers tell apart. Source: Okabe and Ito (2008)."""

LOOP = {
    "pictures": ("B pictures", "of one data set"),
    "answers": ("K answers", "sampled for\neach picture"),
    "moments": ("mean and\nvariance", r"$\mu_i,\ \sigma_i^2$ of the" + "\nK scores"),
    "probability": ("P(i beats j)", r"$p_k = \Phi(\ldots)$" + "\nfor every pair"),
    "fidelity": ("fidelity", r"$F(p,\ p_k)$"),
    "reward": ("reward", "mean over the\nother pictures"),
    "advantage": ("advantage", "compared with the\nother K − 1"),
    "update": ("update", "of the policy"),
}
"""The steps of reinforcement learning to rank: what stands in the box of each, and under it."""


def style() -> None:
    """Set what the plots of a notebook share: resolution, layout, and the colours `COLORS`.

    Call it before the first plot: from then on Jupyter also shows a Figure that a cell returns.
    """
    plt.switch_backend(plt.get_backend())  # loaded at the first plot otherwise
    shared = {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "axes.prop_cycle": plt.cycler(color=COLORS),
    }
    plt.rcParams.update(shared)


def loop(*highlight: str) -> Figure:
    """Return the loop of reinforcement learning to rank as a row of boxes.

    Args:
        highlight: names of steps in `LOOP`. These are filled, and only the boxes are drawn, as a strip that
            says where a section is. Without any, the whole picture is drawn.

    Raises:
        ValueError: for a step that `LOOP` does not have.
    """
    unknown = [step for step in highlight if step not in LOOP]
    if unknown:
        raise ValueError(f"the loop has no step {unknown[0]!r}; its steps are {', '.join(LOOP)}")
    low, high = (-0.4, 0.4) if highlight else (-1.75, 1.55)
    figure = Figure(figsize=(10, 0.55 * (high - low)), dpi=110)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(-0.5, len(LOOP) - 0.5), ylim=(low, high))
    ax.axis("off")
    for place, (step, (name, below)) in enumerate(LOOP.items()):
        fill, ink = (COLORS[0], "white") if step in highlight else ("#E8F1F7", "black")
        ax.add_patch(Rectangle((place - 0.43, -0.35), 0.86, 0.7, facecolor=fill, edgecolor=COLORS[0]))
        ax.text(place, 0, name, color=ink, fontsize=10, ha="center", va="center")
        if place:
            _arrow(ax, (place - 0.57, 0), (place - 0.43, 0))
        if not highlight:
            ax.text(place, -0.48, below, fontsize=9, ha="center", va="top")
    if not highlight:
        _loop_surroundings(ax)
    return figure


def _loop_surroundings(ax: Axes) -> None:
    """Draw what enters the loop from people, and the way back."""
    steps = list(LOOP)
    fidelity, answers, update = map(steps.index, ("fidelity", "answers", "update"))
    ax.text(fidelity, 1.2, r"people: $p$ = who looks better?", fontsize=10, ha="center", color=COLORS[0])
    _arrow(ax, (fidelity, 1.12), (fidelity, 0.35))
    ax.plot([update, update, answers], [-0.85, -1.6, -1.6], color="0.3", linewidth=1.2)
    _arrow(ax, (answers, -1.6), (answers, -1.12))
    ax.text(
        (answers + update) / 2, -1.47, "the next answers come from the new policy", ha="center", fontsize=9
    )


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0})


def curve(ax: Axes, log: pd.DataFrame, column: str, label: str | None = None, window: int = 1) -> None:
    """Draw a column of log.csv against the step, as a running mean over `window` logged values."""
    rows = log[["step", column]].dropna()
    values = rows[column].rolling(window, min_periods=1, center=True).mean()
    ax.plot(rows["step"], values, marker="o" if len(rows) < 20 else None, markersize=3, label=label)
    ax.set_xlabel("training step")
    ax.set_ylabel(column)
    ax.grid(alpha=0.3)


def training_figure(log: pd.DataFrame, sets: str = "sim-kadid") -> Figure:
    """Return the curves of a run: ranking reward, validation SRCC, and the spread of a picture's K scores."""
    figure = Figure(figsize=(9, 2.8), layout="constrained", dpi=110)
    for ax, column, label, window in zip(
        figure.subplots(1, 3),
        ("ranking", "val_srcc", "score_std"),
        ("ranking reward (training batches)", f"SRCC ({sets} validation)", "deviation of a picture's scores"),
        (5, 1, 5),
    ):
        curve(ax, log, column, window=window)
        ax.set_ylabel(label)
    return figure


def scatter(ax: Axes, mos: np.ndarray, score: np.ndarray, title: str = "") -> None:
    """Draw scores against (simulated) MOS."""
    ax.scatter(mos, score, s=4, alpha=0.35, linewidths=0)
    ax.set(xlabel="simulated MOS", ylabel="score", xlim=(0.9, 5.1), ylim=(0.9, 5.1), title=title)
    ax.grid(alpha=0.3)


def gallery(pictures: list[Image.Image], titles: list[str], captions: list[str], columns: int = 3) -> Figure:
    """Return pictures in a grid, each with a title above and a caption below."""
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(3.4 * columns, 4.4 * rows), layout="constrained", dpi=110)
    for ax, picture, title, caption in zip(
        figure.subplots(rows, columns, squeeze=False).flat, pictures, titles, captions
    ):
        ax.imshow(np.asarray(picture))
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(
            "\n".join(line for part in caption.split("\n") for line in textwrap.wrap(part, 46)),
            fontsize=8,
            loc="left",
        )
        ax.set(xticks=[], yticks=[])
    for ax in figure.axes[len(pictures) :]:
        ax.axis("off")
    return figure


def jpeg(figure: Figure, quality: int = 85) -> bytes:
    """Return a figure as JPEG and close it; photographs as PNG make a notebook several times larger."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=figure.dpi, pil_kwargs={"quality": quality})
    plt.close(figure)
    return buffer.getvalue()


def bells(ax: Axes, means, stds, labels, samples=None) -> None:
    """Draw a normal density per label; samples, one row each, are ticks under them."""
    means, stds = np.asarray(means), np.asarray(stds)
    x = np.linspace((means - 3.5 * stds).min(), (means + 3.5 * stds).max(), 400)
    for row, (mean, std, label) in enumerate(zip(means, stds, labels)):
        (line,) = ax.plot(x, norm.pdf(x, mean, std), label=label)
        ax.fill_between(x, norm.pdf(x, mean, std), alpha=0.15, color=line.get_color())
        if samples is not None:
            ax.plot(
                samples[row],
                np.full(len(samples[row]), -0.06 * (row + 1)),
                "|",
                color=line.get_color(),
                markersize=9,
                mew=2,
            )
    ax.set(xlabel="quality, in points of the scale", ylabel="density")
    ax.legend(frameon=False)


def spread(ax: Axes, scores: np.ndarray, label: str | None = None, limit: float = 2.0) -> None:
    """Draw how far each picture's K sampled scores, (N, K) with NaN, are from their mean, cut at `limit`."""
    away = scores - np.nanmean(scores, axis=1, keepdims=True)
    away = np.clip(away[np.isfinite(away)], -limit, limit)
    ax.hist(away, bins=np.linspace(-limit, limit, 41), weights=np.full(len(away), 1 / len(away)))
    ax.set(xlabel="score - mean of the picture's K", ylabel="share of answers", title=label)
    ax.grid(alpha=0.3)


def reliability(ax: Axes, table: pd.DataFrame, label: str | None = None) -> None:
    """Draw how often the likelier picture is the better one, by `vqr1.calibration.reliability`.

    On the dashed line, probabilities come true; below it, they promise too much. A point's area goes by its
    pairs.
    """
    ax.plot([0.5, 1], [0.5, 1], linestyle="--", color="0.6", linewidth=1)
    (line,) = ax.plot(table["predicted"], table["observed"], label=label)
    area = 10 + 90 * table["pairs"] / table["pairs"].max()
    ax.scatter(table["predicted"], table["observed"], area, color=line.get_color(), zorder=3)
    ax.set(xlabel="predicted: A looks better than B", ylabel="share of pairs where raters agree")
    ax.grid(alpha=0.3)


def rounding(ax: Axes, weight: np.ndarray, levels: np.ndarray) -> None:
    """Draw the distribution of weights, divided by their block's largest, and the levels 4 bits can keep."""
    ax.hist(weight, bins=np.linspace(-1, 1, 81), color="0.7")
    for level in levels:
        ax.axvline(level, color="tab:red", linewidth=0.8)
    ax.set(xlabel="weight / largest of its block of 64", ylabel="weights", xlim=(-1.02, 1.02))


def strip(pictures: list[Image.Image], titles: list[str], width: float = 5.6) -> Figure:
    """Return pictures in one row, each with a title, of any lines; width in inches."""
    lines = 1 + max(title.count("\n") for title in titles)
    figure = Figure(figsize=(width, width / len(pictures) + 0.1 + 0.2 * lines), layout="constrained", dpi=110)
    for ax, picture, title in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, titles):
        ax.imshow(np.asarray(picture))
        ax.set_title(title, fontsize=8)
        ax.set(xticks=[], yticks=[])
    return figure


def intervals(ax: Axes, table: pd.DataFrame, label: str | None = None, shift: float = 0.0) -> None:
    """Draw means with their intervals (columns mean, low, high), row by row, `shift` to the right."""
    place, around = (
        np.arange(len(table)) + shift,
        np.abs(table[["low", "high"]].to_numpy().T - table["mean"].to_numpy()),
    )
    ax.errorbar(place, table["mean"], around, marker="o", markersize=4, capsize=3, label=label)
    ax.set_xticks(np.arange(len(table)), table.index)
    ax.grid(alpha=0.3)
