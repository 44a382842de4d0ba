"""Matplotlib helpers; each draws on the axes it is given."""

import io
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import norm


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
    figure = Figure(figsize=(10, 3), layout="constrained", dpi=100)
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
    figure = Figure(figsize=(3.6 * columns, 4.6 * rows), layout="constrained", dpi=100)
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


def strip(pictures: list[Image.Image], titles: list[str], width: float = 8) -> Figure:
    """Return pictures in one row, each with a title, of any lines; width in inches."""
    lines = 1 + max(title.count("\n") for title in titles)
    figure = Figure(figsize=(width, width / len(pictures) + 0.1 + 0.2 * lines), layout="constrained", dpi=72)
    for ax, picture, title in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, titles):
        ax.imshow(np.asarray(picture))
        ax.set_title(title, fontsize=9)
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
