"""Four small ipywidgets applications, and the plain functions behind their controls.

`explorer`, `comparison`, `leaderboard` and `rating` build an application; a control only calls one of the
functions above them and shows what it returns, so all of it runs and is tested without a browser. Unusable
input is reported on the application, in red.
"""

import base64
import html
import io
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ipywidgets as w
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vqr1.data.images import open_picture
from vqr1.data.manifests import CROP, folder_rows, render_rows
from vqr1.distortions import DISTORTIONS, distort
from vqr1.plots import bells, jpeg
from vqr1.prompts import PHRASES, parse_reasoning, parse_score
from vqr1.scoring import Score, Scorer
from vqr1.votes import CHOICES, Ballot, save_votes, scale_votes, vote_agreement

SIDE = 512
"""Uploads are shrunk to this many px: the distortions' parameters are in px of 512x384 pictures."""
VOTE_KEYS = {"1": "first", "2": "second", "0": "same"}


# The functions behind the controls


def read_upload(value) -> Image.Image:
    """Return the newest picture of a FileUpload's value, RGB, at most `SIDE` px wide and high.

    value: a tuple of {"name", "content"} (ipywidgets 8) or a mapping from names to {"content"} (7, as on
    Colab). Raises ValueError saying why the file cannot be used, and when nothing was uploaded.
    """
    files = (
        [{"name": name} | file for name, file in value.items()] if isinstance(value, dict) else list(value)
    )
    if not files:
        raise ValueError("nothing was uploaded; choose a JPEG, PNG or WebP file")
    image = open_picture(bytes(files[-1]["content"]), name=files[-1]["name"])
    image.thumbnail((SIDE, SIDE))
    return image


def degrade(image: Image.Image, distortion: str = "jpeg", level: int = 0, seed: int = 0) -> Image.Image:
    """Return the middle `CROP` px of the picture distorted at full size, as in the simulated sets.

    level: 1..5, or 0 for no distortion. Raises ValueError for an unknown distortion or level.

    >>> degrade(Image.new("RGB", (512, 384)), "jpeg", 3).size
    (192, 192)
    """
    image = distort(image, distortion, level, seed) if level else image
    x, y = (max(0, (side - CROP) // 2) for side in image.size)
    return image.crop((x, y, min(image.width, x + CROP), min(image.height, y + CROP)))


def explore(scorer: Scorer, image: Image.Image, k: int = 6, seed: int = 0) -> tuple[Score, Score]:
    """Return the scorer's own score and that of k sampled answers (thinking), whose `answers` hold them.

    Raises ValueError where there is no score.
    """
    sampler = scorer.with_(thinking=True, estimate="sample", k=k, seed=seed)
    scores = scorer.score([image]) + sampler.score([image])
    for score in scores:
        if score.error:
            raise ValueError(score.error)
    return tuple(scores)


def curves(ax: Axes, scores: Sequence[Score], labels: Sequence[str], sampled: Sequence[str] = ()) -> None:
    """Draw the scores' normal curves, as in Thurstone's law; sampled: answers, ticks under the first one."""
    labels = [f"{label}: {score.score:.2f} ± {score.std:.2f}" for label, score in zip(labels, scores)]
    ticks = [[parse_score(answer) for answer in sampled]] + [[]] * (len(scores) - 1)
    bells(ax, [score.score for score in scores], [score.std for score in scores], labels, ticks)
    ax.set(xlabel="score (1 very poor … 5 excellent)", xlim=(0.5, 5.5), yticks=[])


def sampled_answers(score: Score) -> pd.DataFrame:
    """Return sampled answers as a table: score (NaN = unparseable) and reasoning."""
    return pd.DataFrame(
        {
            "score": [parse_score(a) for a in score.answers],
            "reasoning": [parse_reasoning(a) for a in score.answers],
        }
    )


def rank_folder(scorer: Scorer, folder: str | Path) -> pd.DataFrame:
    """Return `Scorer.rank` of a folder's pictures, best first, with the file's name as ``image``.

    Files that cannot be read come last, with their error. Raises ValueError as `folder_rows` does.
    """
    names = folder_rows(folder)["image"].to_numpy()
    table = scorer.rank([Path(folder) / name for name in names])
    return table.assign(image=names[table["image"]])


# What is shown


def board(ranked: pd.DataFrame, root: str | Path | None = None) -> pd.DataFrame:
    """Return a ranking as a table to read: place, image, score, its 95% interval, possible places, problem.

    root: the pictures' folder, to show thumbnails in HTML (file names are escaped then).
    """
    good = ranked["error"] == ""
    table = pd.DataFrame(
        {
            "place": np.where(good, (np.arange(len(ranked)) + 1).astype(str), ""),
            "image": ranked["image"],
            "score": [
                f"{score:.2f} ± {std:.2f}" if ok else ""
                for score, std, ok in zip(ranked["score"], ranked["std"], good)
            ],
            "95% interval": [
                f"{low:.2f} … {high:.2f}" if ok else ""
                for low, high, ok in zip(ranked["lo"], ranked["hi"], good)
            ],
            "places": [
                f"{low:.0f}–{high:.0f}" if ok else ""
                for low, high, ok in zip(ranked["rank_lo"], ranked["rank_hi"], good)
            ],
        }
    )
    if not good.all():
        table["problem"] = ranked["error"]
    if root is None:
        return table
    table = table.map(html.escape)
    table.insert(
        1,
        "",
        [_thumb(open_picture(Path(root) / name)) if ok else "" for name, ok in zip(ranked["image"], good)],
    )
    return table


def _plot(*values) -> bytes:
    figure = Figure(figsize=(5.2, 2.4), layout="constrained", dpi=100)
    curves(figure.subplots(), *values)
    return jpeg(figure)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _thumb(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((72, 72))
    return f'<img src="data:image/png;base64,{base64.b64encode(_png(small)).decode()}">'


def _table(frame: pd.DataFrame, escape: bool = True) -> str:
    table = frame.to_html(index=False, border=0, escape=escape, float_format="{:.2f}".format)
    for cell in ("th", "td"):
        table = table.replace(f"<{cell}>", f'<{cell} style="text-align: left; padding-right: 1em">')
    return table


def _guard(message: w.HTML, function: Callable[[], None]) -> Callable:
    """Return an event handler that calls the function and shows its error as message, not as traceback."""

    def handle(*_):
        message.value = ""
        try:
            function()
        except (ValueError, OSError) as error:
            message.value = f'<span style="color: #b00020">{html.escape(str(error))}</span>'

    return handle


def _html(name: str) -> w.HTML:
    return w.HTML().add_class(f"vqr1-{name}")


def _button(text: str, name: str, style: str = "primary") -> w.Button:
    return w.Button(description=text, button_style=style).add_class(f"vqr1-{name}")


# The applications; the classes vqr1-… are for the browser test


class _Chooser:
    """A picture: chosen or uploaded, with a distortion and a level."""

    def __init__(self, photographs: Sequence[Path], distortion: str = "jpeg", level: int = 2):
        names = [(path.stem.replace("_", " "), path) for path in photographs]
        self.photograph = w.Dropdown(options=[*names, ("your upload", None)], description="picture")
        self.upload = w.FileUpload(accept="image/*,.heic,.heif", description="Upload")
        types = [(PHRASES[name], name) for name in DISTORTIONS]
        self.distortion = w.Dropdown(options=types, value=distortion, description="distortion")
        self.level = w.IntSlider(level, 0, 5, description="level", continuous_update=False).add_class(
            "vqr1-level"
        )
        self.picture = w.Image(format="png", width=270, height=270)
        self.controls = w.VBox([w.HBox([self.photograph, self.upload]), self.distortion, self.level])

    def show(self) -> Image.Image:
        """Show the picture and return it."""
        whole = (
            open_picture(self.photograph.value) if self.photograph.value else read_upload(self.upload.value)
        )
        shown = degrade(whole, self.distortion.value, self.level.value)
        self.picture.value = _png(shown)
        return shown

    def on_change(self, handler: Callable) -> None:
        def uploaded(change):
            if self.photograph.value is None:
                handler()
            else:
                self.photograph.value = None  # which calls the handler

        self.upload.observe(uploaded, "value")
        for control in (self.photograph, self.distortion, self.level):
            control.observe(handler, "value")


def explorer(scorer: Scorer, photographs: Sequence[Path]) -> w.VBox:
    """Return the score explorer: choose or upload a picture, turn distortion and level, sample answers."""
    chooser, seed = _Chooser(photographs), itertools.count()
    k = w.IntSlider(6, 2, 24, description="K", continuous_update=False).add_class("vqr1-k")
    again, plot = _button("Sample again", "sample"), w.Image(format="jpeg", width=440)
    text, answers, message = _html("score"), _html("answers"), _html("message")

    def show():
        score, sampled = explore(scorer, chooser.show(), k.value, next(seed))
        plot.value = _plot([score], ["expected score"], sampled.answers)
        text.value = f"<b>score {score.score:.2f} {score.bar}</b><br>{html.escape(score.reasoning)}"
        head = f"{k.value} sampled answers: mean {sampled.score:.2f}, deviation {sampled.std:.2f}"
        answers.value = f"{head}{_table(sampled_answers(sampled))}"

    update = _guard(message, show)
    chooser.on_change(update)
    k.observe(update, "value")
    again.on_click(update)
    update()
    left = w.VBox([chooser.controls, k, again, message])
    return w.VBox([w.HBox([left, chooser.picture]), w.HBox([w.VBox([text, plot]), answers])])


def comparison(scorer: Scorer, photographs: Sequence[Path]) -> w.VBox:
    """Return the comparison: two pictures with distortion and level, and P(A looks better than B)."""
    sides = [_Chooser(photographs, "jpeg", 2), _Chooser(photographs, "white_noise", 4)]
    text, plot, message = _html("preference"), w.Image(format="jpeg", width=440), _html("message")

    def show():
        pictures = [side.show() for side in sides]
        text.value = f"<b>P(A looks better than B) = {scorer.compare(*pictures):.3f}</b>"
        plot.value = _plot(scorer.score(pictures), "AB")

    update = _guard(message, show)
    for side in sides:
        side.on_change(update)
    update()
    columns = [
        w.VBox([w.HTML(f"<b>{name}</b>"), side.picture, side.controls]) for name, side in zip("AB", sides)
    ]
    return w.VBox([w.HBox(columns), message, text, plot])


def leaderboard(scorer: Scorer, folder: str | Path = "") -> w.VBox:
    """Return the leaderboard: a folder's pictures, best first, with 95% intervals of score and rank."""
    path = w.Text(str(folder), description="folder", layout=w.Layout(width="480px"))
    rank, table, message = _button("Rank", "rank"), _html("board"), _html("message")

    def show():
        table.value = ""
        table.value = _table(board(rank_folder(scorer, path.value), path.value), escape=False)

    rank.on_click(_guard(message, show))
    return w.VBox([w.HBox([path, rank]), message, table])


def rating(ballot: Ballot, frame: pd.DataFrame, scorer: Scorer, path: str | Path = "my-votes.csv") -> w.VBox:
    """Return "rate it yourself": blind pairs of the frame, votes by click or key, their scale, the manifest.

    Votes go into ``ballot``; path: the manifest that "Save as manifest" writes.
    """
    images = render_rows(frame)
    pictures = [w.Image(format="png", width=250, height=250) for _ in range(2)]
    texts = ("This one (key 1)", "This one (key 2)", "The same (key 0)")
    buttons = {choice: _button(text, choice, "") for choice, text in zip(CHOICES, texts)}
    key = w.Text(placeholder="click here to vote by keys", layout=w.Layout(width="200px")).add_class(
        "vqr1-key"
    )
    scale, save = _button("Scale the votes", "finish"), _button("Save as manifest", "save", "")
    progress, message, result = _html("progress"), _html("message"), _html("scale")

    def show():
        count = f"{ballot.cast} of {len(ballot.pairs)} pairs have your vote"
        progress.value = (
            f"<b>Which looks better?</b> {count}."
            if ballot.pair
            else f"<b>Thank you.</b> {count}: scale them."
        )
        for picture, i in zip(pictures, ballot.pair or ()):
            picture.value = _png(images[i])

    def vote(choice):
        ballot.vote(choice)
        show()

    def press(change):
        key.value = ""
        if change["new"][-1:] in VOTE_KEYS:
            _guard(message, partial(vote, VOTE_KEYS[change["new"][-1]]))()

    def finish():
        result.value = ""
        table = scale_votes(ballot.wins).assign(
            picture=[_thumb(i) for i in images], model=[score.score for score in scorer.score(images)]
        )
        table = table.sort_values("quality", ascending=False)[
            ["picture", "quality", "standard_error", "votes", "model"]
        ]
        alike = vote_agreement(ballot.wins, table["model"].sort_index())
        head = f"SRCC with the model: {alike['srcc']:.2f}. "
        head += f"It orders {alike['votes']:.0%} of your votes as you did."
        result.value = head + _table(table, escape=False)

    def store():
        saved = save_votes(frame, ballot.wins, path)
        result.value = f"{len(saved)} rated pictures: {html.escape(str(path))}"

    for choice, button in buttons.items():
        button.on_click(_guard(message, partial(vote, choice)))
    key.observe(press, "value")
    scale.on_click(_guard(message, finish))
    save.on_click(_guard(message, store))
    show()
    columns = [w.VBox([picture, buttons[choice]]) for picture, choice in zip(pictures, CHOICES)]
    return w.VBox(
        [progress, w.HBox(columns), w.HBox([buttons["same"], key]), w.HBox([scale, save]), message, result]
    )
