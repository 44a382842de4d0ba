"""Notebook 03's applications run without a browser: plain functions, and controls set as by a click."""

import io
import sys
from datetime import datetime

import ipywidgets as w
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vqr1 import widgets
from vqr1.data.manifests import load_ratings, render_rows
from vqr1.places import EMBEDDED
from vqr1.prompts import parse_score
from vqr1.scoring import Score, Scorer
from vqr1.votes import Ballot, load_votes, vote_agreement


@pytest.fixture(scope="module")
def scorer():
    return Scorer("tiny-policy", thinking=True)


@pytest.fixture
def rated() -> pd.DataFrame:
    """Return six training rows, one type each."""
    rows = load_ratings("sim-kadid").query("split == 'train'").groupby("distortion").sample(1, random_state=0)
    return rows.sample(6, random_state=0)


@pytest.fixture
def photographs():
    return [EMBEDDED / "photos" / name for name in ("kitten.jpg", "dolphin.jpg")]


@pytest.fixture
def folder(photo, tmp_path):
    """Return a folder: two pictures, one file that is none, and one never asked about."""
    widgets.degrade(photo).save(tmp_path / "good.png")
    widgets.degrade(photo, "jpeg", 5).save(tmp_path / "bad.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def upload(name: str, content: bytes) -> tuple:
    return (
        {
            "name": name,
            "type": "",
            "size": len(content),
            "content": memoryview(content),
            "last_modified": datetime.now(),
        },
    )


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def parts(widget: w.Widget) -> list[w.Widget]:
    """Return a widget and everything in it."""
    return [widget, *(part for child in getattr(widget, "children", ()) for part in parts(child))]


def named(app: w.Widget, name: str) -> w.Widget:
    """Return the part whose class the browser test looks for."""
    return next(part for part in parts(app) if f"vqr1-{name}" in getattr(part, "_dom_classes", ()))


def shown(app: w.Widget) -> list[w.Image]:
    """Return the pictures, plots left out."""
    return [part for part in parts(app) if isinstance(part, w.Image) and part.format == "png"]


def pixels(picture: w.Image) -> bytes:
    return Image.open(io.BytesIO(picture.value)).tobytes()


def described(app: w.Widget, text: str) -> w.Widget:
    return next(part for part in parts(app) if getattr(part, "description", None) == text)


# --- pictures -----------------------------------------------------------------------------------


def test_an_upload_is_read_in_the_form_of_ipywidgets_8_and_of_7():
    content = png(Image.new("RGB", (20, 10), "red"))
    for value in (upload("a.png", content), {"a.png": {"metadata": {}, "content": content}}):
        image = widgets.read_upload(value)
        assert image.mode == "RGB" and image.size == (20, 10) and image.getpixel((0, 0)) == (255, 0, 0)


def test_a_large_upload_is_shrunk_to_the_size_the_distortions_are_made_for():
    assert widgets.read_upload(upload("a.png", png(Image.new("L", (1024, 768))))).size == (512, 384)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("notes.txt", b"text", r"no format that Pillow reads"),
        ("empty.png", b"", r"it has zero bytes"),
        ("half.png", png(Image.effect_noise((64, 64), 50))[:1000], r"truncated"),
        ("line.png", png(Image.new("L", (1, 900))), r"1x900 pixels are thinner than 1:200; crop or pad"),
        ("phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"it is HEIC, .*pip install 'vqr1\[heic\]'"),
    ],
)
def test_an_upload_that_cannot_be_used_says_why_by_its_name(name, content, why, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=rf"^{name} cannot be read as a picture \(.*{why}"):
        widgets.read_upload(upload(name, content))


def test_nothing_uploaded_is_said():
    with pytest.raises(ValueError, match="nothing was uploaded"):
        widgets.read_upload(())


def test_degrade_makes_the_pixels_of_a_manifest_row(photo):
    """It distorts at full size, then crops: the other order would cut 8x8 blocks elsewhere."""
    from vqr1.distortions import distort

    x, y = (photo.width - 192) // 2, (photo.height - 192) // 2
    expected = distort(photo, "jpeg", 4, 0).crop((x, y, x + 192, y + 192))
    assert widgets.degrade(photo, "jpeg", 4).tobytes() == expected.tobytes()
    assert widgets.degrade(photo).tobytes() == photo.crop((x, y, x + 192, y + 192)).tobytes()
    assert widgets.degrade(photo.crop((0, 0, 100, 250))).size == (100, 192)


# --- scores -------------------------------------------------------------------------------------


def test_explore_gives_the_expected_score_and_k_samples(scorer, photo):
    picture = widgets.degrade(photo, "jpeg", 4)
    score, sampled = widgets.explore(scorer, picture, k=4, seed=1)
    assert score.score == scorer.score([picture])[0].score and len(sampled.answers) == 4
    table = widgets.sampled_answers(sampled)
    assert np.isclose(table["score"].mean(), sampled.score) and table["reasoning"].str.len().min() > 0
    again, other = widgets.explore(scorer, picture, k=4, seed=2)
    assert again.score == score.score and other.answers != sampled.answers


def test_explore_says_why_there_is_no_score(scorer, photo, monkeypatch):
    monkeypatch.setattr(scorer, "score", lambda images: [Score(error="no <answer> in 256 tokens")])
    with pytest.raises(ValueError, match="no <answer> in 256 tokens"):
        widgets.explore(scorer, photo)


def test_sampled_answers_show_what_cannot_be_parsed():
    table = widgets.sampled_answers(Score(answers=["<think>sharp</think><answer>4.10</answer>", "five"]))
    assert (
        table["score"].iloc[0] == 4.1
        and np.isnan(table["score"].iloc[1])
        and table["reasoning"].tolist() == ["sharp", ""]
    )


def test_sampled_answers_off_the_scale_are_marked():
    table = widgets.sampled_answers(Score(answers=["<answer>4.10</answer>", "<answer>685</answer>"]))
    assert table["note"].tolist() == ["", "off the scale"]


def test_curves_are_the_scores_normal_ones_with_the_samples_below():
    ax, sampled = Figure().subplots(), ["<answer>2.5</answer>", "<answer>3.5</answer>"]
    widgets.curves(ax, [Score(3.0, 0.5), Score(4.0, 0.2)], "AB", sampled)
    curve = ax.lines[0]
    assert np.isclose(curve.get_xdata()[curve.get_ydata().argmax()], 3.0, atol=0.02)
    assert [parse_score(a) for a in sampled] in [list(line.get_xdata()) for line in ax.lines]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["A: 3.00 ± 0.50", "B: 4.00 ± 0.20"]
    assert "score" in ax.get_xlabel() and ax.get_ylabel()


# --- folders ------------------------------------------------------------------------------------


def test_rank_folder_names_the_files_and_puts_the_unreadable_last(scorer, folder):
    ranked = widgets.rank_folder(scorer, folder)
    score = {name: scorer.score([folder / name])[0].score for name in ("good.png", "bad.png")}
    assert ranked["image"].tolist() == [*sorted(score, key=score.get, reverse=True), "broken.jpg"]
    assert (
        np.allclose(ranked["score"][:2], sorted(score.values(), reverse=True), atol=1e-3)
        and "broken.jpg" in ranked["error"].iloc[2]
    )


def test_what_a_folder_holds_of_heic_is_named_with_its_problem(scorer, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    ranked = widgets.rank_folder(scorer, folder).set_index("image")["error"]
    assert "pip install 'vqr1[heic]'" in ranked["phone.HEIC"] and ranked["good.png"] == ""


def test_board_can_be_read(scorer, folder):
    ranked = widgets.rank_folder(scorer, folder)
    table = widgets.board(ranked)
    assert table["place"].tolist() == ["1", "2", ""] and table["places"].iloc[2] == ""
    low, high = ranked["rank_lo"].iloc[0], ranked["rank_hi"].iloc[0]
    assert table["places"].iloc[0] == f"{low:.0f}–{high:.0f}" and "broken" in table["problem"].iloc[2]
    assert "problem" not in widgets.board(ranked.iloc[:2])


def test_board_calls_intervals_95_percent_only_where_they_are_calibrated(scorer, folder):
    ranked = widgets.rank_folder(scorer, folder)
    assert "± 1.96 spreads" in widgets.board(ranked) and "95% interval" not in widgets.board(ranked)
    assert "95% interval" in widgets.board(ranked, calibrated=True)


def test_board_with_pictures_escapes_what_files_are_called(scorer, folder):
    (folder / "good.png").rename(folder / "<b>good.png")
    table = widgets.board(widgets.rank_folder(scorer, folder), folder)
    assert sorted(table["image"])[0] == "&lt;b&gt;good.png"
    assert [cell[:14] for cell in table[""]] == ['<img src="data'] * 2 + [""]


# --- the applications ---------------------------------------------------------------------------


def test_the_explorer_follows_slider_and_button(scorer, photographs):
    app = widgets.explorer(scorer, photographs)
    score, answers = named(app, "score"), named(app, "answers")
    before = score.value
    assert before.startswith("<b>score ") and "6 sampled answers" in answers.value

    named(app, "level").value = 5
    part = widgets.degrade(widgets.open_picture(photographs[0]), "jpeg", 5)
    assert f"<b>score {scorer.score([part])[0].score:.2f} ±" in score.value and score.value != before
    assert pixels(shown(app)[1]) == part.tobytes()

    before, sampled = score.value, answers.value
    named(app, "sample").click()
    assert score.value == before and answers.value != sampled
    named(app, "k").value = 3
    assert "3 sampled answers" in answers.value


def test_an_upload_is_shown_whole_and_undamaged_and_can_be_left_again(scorer, photographs, photo):
    app = widgets.explorer(scorer, photographs)
    whole, part = shown(app)
    calls = []
    named(app, "score").observe(calls.append, "value")
    named(app, "upload").value = upload("mine.png", png(photo))
    assert len(calls) == 1, "it is scored once"
    assert named(app, "level").value == 0 and described(app, "picture").label == "your upload"
    assert pixels(part) == widgets.degrade(photo).tobytes()
    assert pixels(whole) == widgets.outlined(photo).tobytes() != photo.tobytes()
    named(app, "level").value = 5
    assert pixels(part) == widgets.degrade(photo, "jpeg", 5).tobytes()
    described(app, "picture").value = photographs[1]
    assert pixels(part) == widgets.degrade(widgets.open_picture(photographs[1]), "jpeg", 5).tobytes()
    described(app, "picture").value = widgets.UPLOAD
    assert pixels(part) == widgets.degrade(photo, "jpeg", 5).tobytes() and named(app, "message").value == ""


def test_the_outline_is_around_what_is_scored(photo):
    both = np.asarray(photo), np.asarray(widgets.outlined(photo))
    rows, columns = np.nonzero((both[0] != both[1]).any(axis=2))
    left, upper, right, lower = widgets.middle(photo.size)
    assert (rows.min(), rows.max()) == (upper - 4, lower + 3)
    assert (columns.min(), columns.max()) == (left - 4, right + 3)
    inside = [pixels[upper:lower, left:right] for pixels in both]
    assert (inside[0] == inside[1]).all()


def test_a_refused_upload_leaves_the_picture_and_its_score(scorer, photographs):
    app = widgets.explorer(scorer, photographs)
    before = [named(app, "score").value, *map(pixels, shown(app))]
    named(app, "upload").value = upload("<i>.txt", b"text")
    assert "&lt;i&gt;.txt cannot be read as a picture" in named(app, "message").value
    assert [named(app, "score").value, *map(pixels, shown(app))] == before
    assert described(app, "picture").value == photographs[0]
    described(app, "picture").value = photographs[1]
    assert named(app, "message").value == ""


def test_no_score_stays_beside_another_picture(scorer, photographs, monkeypatch):
    app = widgets.explorer(scorer, photographs)
    monkeypatch.setattr(scorer, "score", lambda images: [Score(error="no <answer> in 256 tokens")])
    named(app, "level").value = 4
    assert named(app, "score").value == named(app, "answers").value == ""
    assert "no &lt;answer&gt;" in named(app, "message").value


def test_the_comparison_prints_the_scorers_probability(scorer, photographs):
    app = widgets.comparison(scorer, photographs)
    whole = widgets.open_picture(photographs[0])
    pictures = widgets.degrade(whole, "jpeg", 2), widgets.degrade(whole, "white_noise", 4)
    assert f"= {scorer.compare(*pictures):.3f}<" in named(app, "preference").value
    before = named(app, "preference").value
    named(app, "level").value = 5  # of A, the first
    assert named(app, "preference").value != before


def test_the_leaderboard_ranks_a_folder_and_refuses_others(scorer, folder, tmp_path):
    app = widgets.leaderboard(scorer)
    assert named(app, "board").value == named(app, "message").value == ""
    named(app, "folder").value = str(folder)
    table = named(app, "board").value
    assert table.count("<img") == 2 and max(
        table.index(f"{name}.png") for name in ("good", "bad")
    ) < table.index("broken.jpg")
    assert named(widgets.leaderboard(scorer, folder), "board").value == table
    named(app, "folder").value = str(tmp_path / "none")
    named(app, "rank").click()
    assert "is not a folder" in named(app, "message").value and named(app, "board").value == ""


# --- rating -------------------------------------------------------------------------------------


def test_voting_by_click_and_key_to_the_end(scorer, rated, tmp_path):
    ballot, path = Ballot(len(rated)), tmp_path / "new" / "votes.csv"
    app = widgets.rating(ballot, rated, scorer, path)
    images = render_rows(rated)
    assert list(map(pixels, shown(app))) == [images[i].tobytes() for i in ballot.pair]

    named(app, "finish").click()
    assert "0 votes on 6 pictures" in named(app, "message").value and named(app, "scale").value == ""
    named(app, "first").click()
    for key in "x20":
        named(app, "key").value = key
        assert named(app, "key").value == ""
    assert ballot.choices == ["first", "second", "same"]
    assert "3 of 15" in named(app, "progress").value and named(app, "message").value == ""
    named(app, "finish").click()
    assert "3 votes on 6 pictures" in named(app, "message").value and str(path) in named(app, "scale").value

    while ballot.pair:
        assert not named(app, "second").disabled
        named(app, "second").click()
    assert named(app, "first").disabled and named(app, "same").disabled
    text, model = named(app, "scale").value, [score.score for score in scorer.score(images)]
    assert "You voted on 15 pairs" in text and str(path) in text and "section 5 of notebook 03" in text
    assert f"{vote_agreement(ballot.wins, model)['srcc']:.2f}" in text
    assert text.count("<img") == 6 and named(app, "message").value == ""
    assert load_ratings(path, EMBEDDED)["mos"].notna().all()
    assert (load_votes(rated, path) == ballot.wins).all()


def test_undo_takes_back_the_vote_and_what_was_saved_of_it(scorer, rated, tmp_path):
    ballot, path = Ballot(len(rated)), tmp_path / "votes.csv"
    app = widgets.rating(ballot, rated, scorer, path)
    assert named(app, "undo").disabled
    named(app, "first").click()
    first, pair = ballot.wins, list(map(pixels, shown(app)))
    named(app, "second").click()
    named(app, "undo").click()
    assert (ballot.wins == first).all() and list(map(pixels, shown(app))) == pair
    assert (load_votes(rated, path) == first).all() and "1 of 15" in named(app, "progress").value
    named(app, "key").value = "u"
    assert ballot.cast == 0 and named(app, "undo").disabled and not list(tmp_path.iterdir())
    named(app, "key").value = "u"
    assert "no vote to take back" in named(app, "message").value


def test_undo_leads_back_from_the_end(scorer, rated, tmp_path):
    ballot = Ballot(len(rated), rounds=1)
    app = widgets.rating(ballot, rated, scorer, tmp_path / "votes.csv")
    for _ in range(6):
        named(app, "first").click()
    assert "last pair" in named(app, "progress").value and named(app, "scale").value
    named(app, "undo").click()
    assert not named(app, "first").disabled and named(app, "scale").value == ""


def test_votes_of_two_people_are_added_up(scorer, rated, tmp_path):
    path = tmp_path / "votes.csv"
    ballots = [Ballot(len(rated), seed) for seed in (0, 1)]
    apps = [widgets.rating(ballot, rated, scorer, path) for ballot in ballots]
    for app in (apps[0], apps[1], apps[1], apps[0]):
        named(app, "first").click()
    named(apps[1], "undo").click()
    assert (load_votes(rated, path) == ballots[0].wins + ballots[1].wins).all()
    again = widgets.rating(ballots[0], rated, scorer, path)
    assert "Older votes in the file, which are kept: 1." in named(again, "progress").value
    named(again, "first").click()
    assert load_votes(rated, path).sum() == 4


def test_votes_on_other_pictures_are_not_overwritten(scorer, rated, tmp_path):
    path = tmp_path / "votes.csv"
    named(widgets.rating(Ballot(6), rated, scorer, path), "first").click()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"votes.csv has votes on .* move the file away"):
        widgets.rating(Ballot(4), rated.iloc[:4], scorer, path)
    assert path.read_bytes() == before


def test_a_folder_of_your_own_is_rated_and_then_trains(scorer, photo, tmp_path):
    for level in range(6):
        widgets.degrade(photo.resize((400, 300)), "jpeg", level).save(tmp_path / f"{level}.png")
    app = widgets.own_rating(scorer)
    named(app, "folder").value = str(tmp_path)
    assert "0 of 15" in named(app, "progress").value
    for _ in range(15):
        named(app, "first").click()
    text, path = named(app, "scale").value, tmp_path / "my-votes.csv"
    assert f"vqr1 train --set {path}" in text
    assert set(load_ratings(path)["split"]) == {"train", "val", "test"}
    named(app, "rate").click()
    assert "which are kept: 15." in named(app, "progress").value


def test_a_folder_that_cannot_be_rated_says_why(scorer, folder, tmp_path):
    app = widgets.own_rating(scorer, folder)
    assert "broken.jpg cannot be read as a picture" in named(app, "message").value
    (folder / "broken.jpg").unlink()
    (folder / "bad.png").unlink()
    named(app, "rate").click()
    assert "a comparison needs at least 2" in named(app, "message").value
