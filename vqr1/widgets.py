"""Small ipywidgets applications, and the plain functions behind their controls.

`explorer`, `comparison`, `leaderboard`, `rating` and `own_rating` build an application; a control only calls
one of the functions above them and shows what it returns, so all of it runs and is tested without a browser.
Unusable input is reported on the application, in red. `make app` shows them as a page.
"""

import base64
import html
import io
import itertools
import os
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ipywidgets as w
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from vqr1.data.comparisons import comparisons_path
from vqr1.data.images import open_picture
from vqr1.data.manifests import CROP, folder_rows, render
from vqr1.data.public_sets import seeded_split
from vqr1.distortions import DISTORTIONS, distort
from vqr1.plots import bells, jpeg
from vqr1.prompts import PHRASES, SCORE_MAX, SCORE_MIN, parse_reasoning, parse_score
from vqr1.scoring import Score, Scorer
from vqr1.votes import CHOICES, Ballot, add_votes, load_votes, scale_votes, vote_agreement

SIDE = 512
"""Uploads are shrunk to this many px: the distortions' parameters are in px of 512x384 pictures."""
THUMBNAIL = 144
"""Side of a table's pictures, px."""
UPLOAD = "upload"
"""What a list of photographs has for the picture that was uploaded."""
VOTE_KEYS = {"1": "first", "2": "second", "0": "same"}
ROUNDS = 3
"""Pairs that `own_rating` asks for, as a multiple of the pictures: each is seen twice as often."""


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
    return _shrunk(open_picture(bytes(files[-1]["content"]), name=files[-1]["name"]), SIDE)


def degrade(image: Image.Image, distortion: str = "jpeg", level: int = 0, seed: int = 0) -> Image.Image:
    """Return the middle `CROP` px of the picture distorted at full size, as in the simulated sets.

    level: 1..5, or 0 for no distortion. Raises ValueError for an unknown distortion or level.

    >>> degrade(Image.new("RGB", (512, 384)), "jpeg", 3).size
    (192, 192)
    """
    image = distort(image, distortion, level, seed) if level else image
    return image.crop(middle(image.size))


def middle(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the box of the middle `CROP` px: left, upper, right, lower.

    >>> middle((512, 384)), middle((100, 384))
    ((160, 96, 352, 288), (0, 96, 100, 288))
    """
    x, y = (max(0, (side - CROP) // 2) for side in size)
    return x, y, min(size[0], x + CROP), min(size[1], y + CROP)


def outlined(image: Image.Image) -> Image.Image:
    """Return the picture with a line around its `middle`, white within black to be seen on any ground."""
    image = image.copy()
    left, upper, right, lower = middle(image.size)
    for away, colour in ((4, "black"), (2, "white")):
        box = left - away, upper - away, right + away - 1, lower + away - 1
        ImageDraw.Draw(image).rectangle(box, outline=colour, width=2)
    return image


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
    """Return sampled answers as a table: score (NaN = unparseable) and reasoning.

    If an answer is off the scale, a column note says which.
    """
    table = pd.DataFrame(
        {
            "score": [parse_score(a) for a in score.answers],
            "reasoning": [parse_reasoning(a) for a in score.answers],
        }
    )
    off = (table["score"] < SCORE_MIN) | (table["score"] > SCORE_MAX)
    return table.assign(note=np.where(off, "off the scale", "")) if off.any() else table


def rank_folder(scorer: Scorer, folder: str | Path) -> pd.DataFrame:
    """Return `Scorer.rank` of a folder's pictures, best first, with the file's name as ``image``.

    Files that cannot be read come last, with their error. Raises ValueError as `folder_rows` does.
    """
    names = folder_rows(folder)["image"].to_numpy()
    table = scorer.rank([Path(folder) / name for name in names])
    return table.assign(image=names[table["image"]])


# What is shown


def board(ranked: pd.DataFrame, root: str | Path | None = None, calibrated: bool = False) -> pd.DataFrame:
    """Return a ranking as a table to read: place, image, score, its interval, possible places, problem.

    root: the pictures' folder, to show thumbnails in HTML (file names are escaped then).
    calibrated: whether the intervals are; else they are the policy's own word, and are called so.
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
            "95% interval" if calibrated else "± 1.96 spreads": [
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


def farewell(frame: pd.DataFrame, cast: int, path: Path) -> str:
    """Return, as HTML, what a rater did, where it is kept, and what to do next."""
    command = f"<code>vqr1 train --set {html.escape(shlex.quote(str(path)))}</code>"
    then = command if (frame["split"] == "val").sum() > 1 else "section 5 of notebook 03"
    beside = html.escape(comparisons_path(path).name)
    return (
        f"<p><b>Thank you.</b> You voted on {cast} pairs. The votes are in "
        f"<code>{html.escape(str(path))}</code> and {beside} beside it. "
        f"To train a policy on them: {then}.</p>"
    )


def agreement(scale: pd.DataFrame, images: Sequence[Image.Image], model: Sequence[float], alike: dict) -> str:
    """Return, as HTML, the scale of the votes beside the model's scores, best picture first.

    scale, alike: what `scale_votes` and `vote_agreement` say.
    """
    table = scale.assign(picture=list(map(_thumb, images)), model=model, votes=scale["votes"].astype(int))
    table = table.rename(columns={"standard_error": "± standard error"})
    columns = ["picture", "quality", "± standard error", "votes", "model"]
    head = f"SRCC with the model: {alike['srcc']:.2f}. "
    head += f"It orders {alike['votes']:.0%} of the votes as people did."
    return head + _table(table.sort_values("quality", ascending=False)[columns], escape=False)


def _plot(*values) -> bytes:
    figure = Figure(figsize=(5.2, 2.4), layout="constrained", dpi=110)
    curves(figure.subplots(), *values)
    return jpeg(figure)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    small = image.copy()
    small.thumbnail((side, side))
    return small


def _thumb(image: Image.Image) -> str:
    code = base64.b64encode(_png(_shrunk(image, THUMBNAIL))).decode()
    return f'<img src="data:image/png;base64,{code}">'


def _table(frame: pd.DataFrame, escape: bool = True) -> str:
    table = frame.to_html(index=False, border=0, escape=escape, float_format="{:.2f}".format)
    for cell in ("th", "td"):
        table = table.replace(f"<{cell}>", f'<{cell} style="text-align: left; padding-right: 1em">')
    return table


def _guard(message: w.HTML, function: Callable[[], None], *stale: w.Widget) -> Callable:
    """Return an event handler that calls the function and shows its error as message, not as traceback.

    stale: what an error empties, because it no longer belongs to what is shown.
    """

    def handle(*_):
        message.value = ""
        try:
            function()
        except (ValueError, OSError) as error:
            for part in stale:
                part.value = part.trait_defaults("value")
            message.value = f'<span style="color: #b00020">{html.escape(str(error))}</span>'

    return handle


def _html(name: str) -> w.HTML:
    return w.HTML().add_class(f"vqr1-{name}")


def _button(text: str, name: str, style: str = "primary") -> w.Button:
    return w.Button(description=text, button_style=style).add_class(f"vqr1-{name}")


def _picture(side: int) -> w.Image:
    """Return a place for a picture of any shape, shown whole."""
    return w.Image(format="png", layout=w.Layout(width=f"{side}px", height=f"{side}px", object_fit="contain"))


# The applications; the classes vqr1-… are for the browser test


class _Chooser:
    """A picture, chosen or uploaded, with a distortion and a level; whole, and the part that is scored."""

    def __init__(
        self, photographs: Sequence[Path], distortion: str = "jpeg", level: int = 2, side: int = 270
    ):
        names = [(path.stem.replace("_", " "), path) for path in photographs]
        self.names, self.uploaded = names, None
        self.photograph = w.Dropdown(options=names, description="picture").add_class("vqr1-photograph")
        self.upload = w.FileUpload(accept="image/*,.heic,.heif", description="Upload").add_class(
            "vqr1-upload"
        )
        types = [(PHRASES[name], name) for name in DISTORTIONS]
        self.distortion = w.Dropdown(options=types, value=distortion, description="distortion")
        self.level = w.IntSlider(level, 0, 5, description="level", continuous_update=False).add_class(
            "vqr1-level"
        )
        self.whole, self.picture = _picture(side), _picture(side)
        shown = [
            (self.whole, "whole; what is outlined is scored"),
            (self.picture, "what is scored, enlarged"),
        ]
        self.pictures = w.HBox([w.VBox([picture, w.Label(text)]) for picture, text in shown])
        self.controls = w.VBox([w.HBox([self.photograph, self.upload]), self.distortion, self.level])

    def show(self) -> Image.Image:
        """Show the picture and return the part of it that is scored."""
        chosen = self.photograph.value
        whole = self.uploaded if chosen == UPLOAD else open_picture(chosen)
        if self.level.value:
            whole = distort(whole, self.distortion.value, self.level.value)
        part = whole.crop(middle(whole.size))
        self.whole.value, self.picture.value = _png(outlined(whole)), _png(part)
        return part

    def on_change(self, update: Callable, message: w.HTML) -> None:
        """Call a handler at every change; an upload is shown undamaged at first."""
        controls = (self.photograph, self.distortion, self.level)

        def take():
            self.uploaded = read_upload(self.upload.value)
            for control in controls:
                control.unobserve(update, "value")
            self.photograph.options = [*self.names, ("your upload", UPLOAD)]
            self.photograph.value, self.level.value = UPLOAD, 0
            observe()
            update()

        def observe():
            for control in controls:
                control.observe(update, "value")

        self.upload.observe(_guard(message, take), "value")
        observe()


def explorer(scorer: Scorer, photographs: Sequence[Path]) -> w.VBox:
    """Return the score explorer: choose or upload a picture, turn distortion and level, sample answers."""
    chooser, seed = _Chooser(photographs), itertools.count()
    k = w.IntSlider(6, 2, 24, description="answers", continuous_update=False).add_class("vqr1-k")
    again, plot = _button("Sample again", "sample"), w.Image(format="jpeg", width=440).add_class("vqr1-plot")
    text, answers, message = _html("score"), _html("answers"), _html("message")

    def show():
        score, sampled = explore(scorer, chooser.show(), k.value, next(seed))
        text.value = f"<b>score {score.score:.2f} {score.bar}</b><br>{html.escape(score.reasoning)}"
        head = f"{k.value} sampled answers: mean {sampled.score:.2f}, deviation {sampled.std:.2f}"
        head += f"; left out: {sampled.note}" if sampled.note else ""
        answers.value = f"{head}{_table(sampled_answers(sampled))}"
        plot.value = _plot([score], ["expected score"], sampled.answers)

    update = _guard(message, show, text, answers, plot)
    chooser.on_change(update, message)
    k.observe(update, "value")
    again.on_click(update)
    update()
    left = w.VBox([chooser.controls, k, again, message])
    return w.VBox([w.HBox([left, w.VBox([chooser.pictures, text])]), w.HBox([plot, answers])])


def comparison(scorer: Scorer, photographs: Sequence[Path]) -> w.VBox:
    """Return the comparison: two pictures with distortion and level, and P(A looks better than B)."""
    sides = [_Chooser(photographs, name, level, 210) for name, level in (("jpeg", 2), ("white_noise", 4))]
    text, plot, message = (
        _html("preference"),
        w.Image(format="jpeg", width=440).add_class("vqr1-plot"),
        _html("message"),
    )

    def show():
        pictures = [side.show() for side in sides]
        text.value = f"<b>P(A looks better than B) = {scorer.compare(*pictures):.3f}</b>"
        plot.value = _plot(scorer.score(pictures), "AB")

    update = _guard(message, show, text, plot)
    for side in sides:
        side.on_change(update, message)
    update()
    columns = [
        w.VBox([w.HTML(f"<b>{name}</b>"), side.pictures, side.controls]) for name, side in zip("AB", sides)
    ]
    return w.VBox([text, w.HBox(columns), message, plot])


def _of_folder(
    folder: str | Path, verb: str, name: str, show: Callable[[str], None], shown: w.Widget
) -> w.VBox:
    """Return a field for a folder, with a button, above what they show; Enter is as good as the button."""
    field = w.Text(str(folder), description="folder", layout=w.Layout(width="480px"), continuous_update=False)
    field.add_class("vqr1-folder")
    button, message = _button(verb, name), _html("message")
    update = _guard(message, lambda: show(field.value))
    field.observe(update, "value")  # told at Enter, not at every letter
    button.on_click(update)
    if folder:
        update()
    return w.VBox([w.HBox([field, button]), message, shown])


def leaderboard(scorer: Scorer, folder: str | Path = "") -> w.VBox:
    """Return the leaderboard: a folder's pictures, best first, with intervals of score and rank."""
    table = _html("board")

    def show(path):
        table.value = ""
        ranked = board(rank_folder(scorer, path), path, scorer.calibrated is not None)
        table.value = _table(ranked, escape=False)

    return _of_folder(folder, "Rank", "rank", show, table)


def own_rating(scorer: Scorer, folder: str | Path = "") -> w.VBox:
    """Return `rating` of the pictures in a folder of your own, where the votes go into my-votes.csv.

    It asks for `ROUNDS` rounds of pairs, first for those with the fewest votes in that file.
    """
    task = w.VBox()

    def show(path):
        task.children = []
        rows = folder_rows(path)
        rows["split"] = seeded_split(rows["image"])
        votes = Path(path) / "my-votes.csv"
        ballot = Ballot(len(rows), rounds=ROUNDS, before=load_votes(rows, votes))
        task.children = [rating(ballot, rows, scorer, votes)]

    return _of_folder(folder, "Rate", "rate", show, task)


def rating(ballot: Ballot, frame: pd.DataFrame, scorer: Scorer, path: str | Path = "my-votes.csv") -> w.VBox:
    """Return "rate it yourself": blind pairs of the frame, votes by click or key, at the end their scale.

    Votes go into ``ballot`` and, one by one, into the manifest ``path``, where they are added to those that
    it has. Raises ValueError where it has votes on other pictures, and for a picture that cannot be read.
    """
    path, rows = Path(os.path.abspath(path)), [row for _, row in frame.iterrows()]
    whole = partial(render, root=frame.attrs.get("root"))
    images, before = [_shrunk(whole(row), SIDE) for row in rows], load_votes(frame, path) - ballot.saved
    pictures = [_picture(384) for _ in range(2)]
    texts = ("This one (key 1)", "This one (key 2)", "The same (key 0)")
    buttons = {choice: _button(text, choice, "") for choice, text in zip(CHOICES, texts)}
    undo, done = _button("Undo (key u)", "undo", ""), _button("I am done", "finish")
    key = w.Text(placeholder="click here to vote by keys", layout=w.Layout(width="200px")).add_class(
        "vqr1-key"
    )
    bar = w.IntProgress(0, 0, len(ballot.pairs))
    progress, message, result = _html("progress"), _html("message"), _html("scale")

    def show():
        asked = "Which looks better?" if ballot.pair else "That was the last pair."
        there = f" Older votes in the file, which are kept: {before.sum():.0f}." if before.any() else ""
        progress.value = f"<b>{asked}</b> {ballot.cast} of {len(ballot.pairs)} pairs have your vote.{there}"
        bar.value, undo.disabled = ballot.cast, not ballot.cast
        for button in buttons.values():
            button.disabled = not ballot.pair
        for picture, i in zip(pictures, ballot.pair or ()):
            picture.value = _png(images[i])

    def act(change: Callable[[], None]):
        change()
        result.value = ""
        show()
        add_votes(frame, ballot, path)
        if not ballot.pair:
            finish()

    def press(change):
        key.value = ""
        pressed = change["new"][-1:].lower()
        if pressed in handlers:
            handlers[pressed]()

    def finish():
        wins = load_votes(frame, path)
        result.value = farewell(frame, ballot.cast, path) if wins.any() else ""
        scale = scale_votes(wins)  # says what is missing before the policy is asked
        model = [score.score for score in scorer.score(map(whole, rows))]
        result.value += agreement(scale, images, model, vote_agreement(wins, model))

    handlers = {key: _guard(message, partial(act, partial(ballot.vote, c))) for key, c in VOTE_KEYS.items()}
    handlers["u"] = _guard(message, partial(act, ballot.undo))
    for name, choice in VOTE_KEYS.items():
        buttons[choice].on_click(handlers[name])
    undo.on_click(handlers["u"])
    key.observe(press, "value")
    done.on_click(_guard(message, finish))
    show()
    columns = [w.VBox([picture, buttons[choice]]) for picture, choice in zip(pictures, CHOICES)]
    controls = w.HBox([buttons["same"], undo, key, done])
    side_by_side = w.HBox(columns, layout=w.Layout(grid_gap="20px"))
    return w.VBox([w.HBox([progress, bar]), side_by_side, controls, message, result])
