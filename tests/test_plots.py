"""Plot helpers: what is drawn is the data, on the axes that were given."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vqr1.plots import (
    COLORS,
    LOOP,
    bells,
    curve,
    gallery,
    intervals,
    jpeg,
    loop,
    reliability,
    rounding,
    scatter,
    spread,
    style,
    training_figure,
)


def axes():
    return Figure().subplots()


def test_curve_leaves_out_steps_without_a_value():
    ax, log = axes(), pd.DataFrame({"step": [1, 2, 3], "val_srcc": [0.1, np.nan, 0.5]})
    curve(ax, log, "val_srcc", label="policy")
    assert ax.lines[0].get_xdata().tolist() == [1, 3] and ax.lines[0].get_ydata().tolist() == [0.1, 0.5]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.lines[0].get_label()) == (
        "training step",
        "val_srcc",
        "policy",
    )


def test_curve_is_a_centred_running_mean():
    ax, log = axes(), pd.DataFrame({"step": range(5), "reward": [0.0, 3.0, 6.0, 9.0, 30.0]})
    curve(ax, log, "reward", window=3)
    assert ax.lines[0].get_ydata().tolist() == [1.5, 3.0, 6.0, 15.0, 19.5]


def test_training_figure_shows_reward_validation_and_spread():
    log = pd.DataFrame(
        {
            "step": range(3),
            "ranking": [0.7, 0.7, 0.8],
            "val_srcc": [0.1, np.nan, 0.4],
            "score_std": [0.5, 0.4, 0.3],
        }
    )
    drawn = training_figure(log).axes
    assert [len(ax.lines[0].get_xdata()) for ax in drawn] == [3, 2, 3]
    assert "sim-kadid" in drawn[1].get_ylabel() and drawn[2].lines[0].get_ydata()[1] == np.mean(
        [0.5, 0.4, 0.3]
    )


def test_scatter_draws_mos_across_and_score_up():
    ax = axes()
    scatter(ax, np.array([1.0, 4.0]), np.array([2.0, 3.0]), "after")
    assert ax.collections[0].get_offsets().tolist() == [[1.0, 2.0], [4.0, 3.0]]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("simulated MOS", "score", "after")


def test_gallery_shows_every_picture_and_hides_the_empty_places():
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue", "white")]
    figure = gallery(pictures, list("abcd"), ["one\ntwo", "", "word " * 30, "d"])
    figure.canvas.draw()
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "d", "", ""]
    assert [ax.axison for ax in figure.axes] == [True] * 4 + [False] * 2
    assert (figure.axes[0].images[0].get_array()[0, 0] == [255, 0, 0]).all()
    captions = [ax.get_xlabel() for ax in figure.axes[:3]]
    assert captions[:2] == ["one\ntwo", ""] and max(map(len, captions[2].split("\n"))) <= 46


def test_jpeg_is_the_figure_at_its_own_resolution():
    figure = Figure(figsize=(3, 2), dpi=80, facecolor="red")
    with Image.open(io.BytesIO(jpeg(figure))) as image:
        assert image.format == "JPEG" and image.size == (240, 160)
        assert image.getpixel((5, 5))[0] > 240 and max(image.getpixel((5, 5))[1:]) < 15


def test_bells_peak_at_the_means_with_areas_of_one_and_samples_below():
    ax = axes()
    bells(ax, [2.0, 4.0], [0.5, 1.0], ["a", "b"], samples=[[2.1, 1.8], [4.5]])
    curves = [line for line in ax.lines if len(line.get_xdata()) == 400]
    for line, mean in zip(curves, (2.0, 4.0)):
        x, y = line.get_data()
        assert abs(x[y.argmax()] - mean) < 0.03 and abs(np.trapezoid(y, x) - 1) < 1e-2
    ticks = [line for line in ax.lines if line not in curves]
    assert [list(line.get_xdata()) for line in ticks] == [[2.1, 1.8], [4.5]] and all(
        (line.get_ydata() < 0).all() for line in ticks
    )
    assert [line.get_color() for line in ticks] == [line.get_color() for line in curves]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_spread_is_around_each_pictures_own_mean_and_leaves_out_what_has_no_score():
    ax = axes()
    spread(ax, np.array([[1.0, 1.3, np.nan], [4.0, 4.3, 4.16]]), "step 0")
    drawn = {round(bar.get_x(), 2): round(bar.get_height(), 2) for bar in ax.patches if bar.get_height() > 0}
    assert drawn == {-0.2: 0.4, 0.0: 0.2, 0.1: 0.4}
    assert (ax.get_title(), ax.get_ylabel()) == ("step 0", "share of answers")


def test_spread_counts_what_is_far_away_at_the_limit():
    ax = axes()
    spread(ax, np.array([[1.0, 41.0]]), limit=2.0)
    assert [round(bar.get_height(), 2) for bar in (ax.patches[0], ax.patches[-1])] == [0.5, 0.5]


def test_rounding_draws_a_line_per_level():
    ax = axes()
    rounding(ax, np.array([-1.0, 0.1, 0.1]), np.linspace(-1, 1, 16))
    assert len(ax.lines) == 16 and sum(bar.get_height() for bar in ax.patches) == 3


def test_intervals_are_drawn_around_their_means_in_the_tables_order():
    ax = axes()
    intervals(
        ax,
        pd.DataFrame({"mean": [2.0, 1.0], "low": [1.5, 0.0], "high": [3.0, 1.25]}, ["b", "a"]),
        "score",
        shift=0.1,
    )
    line, _, (bars,) = ax.containers[0].lines
    assert line.get_xydata().tolist() == [[0.1, 2.0], [1.1, 1.0]] and [
        label.get_text() for label in ax.get_xticklabels()
    ] == ["b", "a"]
    assert [bar[:, 1].tolist() for bar in bars.get_segments()] == [[1.5, 3.0], [0.0, 1.25]]


def test_reliability_is_drawn_beside_the_line_where_probabilities_come_true():
    ax = axes()
    table = pd.DataFrame({"predicted": [0.55, 0.97], "observed": [0.5, 0.85], "pairs": [10, 40]})
    reliability(ax, table, "before")
    truth, line = ax.lines
    assert np.array_equal(truth.get_xdata(), truth.get_ydata())
    assert line.get_xydata().tolist() == [[0.55, 0.5], [0.97, 0.85]] and line.get_label() == "before"
    small, large = ax.collections[0].get_sizes()
    assert small < large


def filled(figure):
    """Return the names in the boxes that are highlighted, and in all boxes from left to right."""
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    names = [name for name, _ in LOOP.values()]
    assert len(boxes) == len(names)
    written = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert [written[(place, 0)] for place in range(len(names))] == names
    return [name for box, name in zip(boxes, names) if to_hex(box.get_facecolor()) == COLORS[0].lower()]


def test_the_loop_shows_every_step_with_what_it_computes():
    figure = loop()
    assert filled(figure) == []
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert all(below in shown for _, below in LOOP.values())
    assert any("people" in text for text in shown)


def test_a_highlighted_loop_is_a_low_strip_that_marks_only_these_steps():
    figure = loop("answers", "moments")
    assert filled(figure) == ["K answers", "mean and\nvariance"]
    assert figure.get_figheight() < loop().get_figheight() / 3
    assert not any("people" in text.get_text() for text in figure.axes[0].texts)


def test_a_step_that_the_loop_does_not_have_is_named_with_those_it_has():
    with pytest.raises(ValueError, match="no step 'loss'; its steps are pictures, answers, .* update"):
        loop("fidelity", "loss")


def test_everything_in_the_loop_stays_inside_the_picture():
    figure = loop()
    figure.canvas.draw()
    frame = figure.bbox
    for text in figure.axes[0].texts:
        if text.get_text():
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, (
                text
            )


def test_style_sets_the_colours_of_the_lines():
    with plt.rc_context():
        style()
        figure, ax = plt.subplots()
        assert [ax.plot([0, 1])[0].get_color() for _ in COLORS] == list(COLORS)
        assert figure.dpi == 110
        plt.close(figure)
