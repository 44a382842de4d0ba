"""Scored rows become result rows and tables: agreement, dominance, oracles, gains and names."""

import copy
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vqr1 import evaluation
from vqr1.data.manifests import MANIFEST_COLUMNS, open_picture
from vqr1.evaluation import (
    Rows,
    agreement,
    evaluate,
    evaluation_rows,
    gain,
    naming,
    oracles,
    protocol,
    save_scores,
    score_frame,
)
from vqr1.places import EMBEDDED
from vqr1.prompts import CLEAN
from vqr1.scoring import OPEN, Score

NAN = math.nan


def test_a_set_has_one_protocol():
    """Several sets use the protocol they share; otherwise they are pooled."""
    wanted = {
        ("sim-mixed",): "dominance",
        ("sriqa-bench",): "per content",
        ("sim-kadid", "bid"): "pooled",
        ("sim-mixed", "sim-kadid"): "pooled",
        ("sriqa-bench", "bid"): "pooled",
    }
    assert {names: protocol(pd.DataFrame({"dataset": names})) for names in wanted} == wanted


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    for name in ("summarize", "difference"):
        monkeypatch.setattr(evaluation, name, partial(getattr(evaluation, name), n=50))


def rated(scores, mos=None, name="sim-kadid"):
    """Return rows of photographs a, b, c in turn, with rising MOS unless it is given."""
    count = len(scores)
    return pd.DataFrame(
        {
            "dataset": name,
            "score": scores,
            "mos": mos or [1 + n / count for n in range(count)],
            "reference": [f"{'abc'[n % 3]}.jpg" for n in range(count)],
            "level": [1 + n // 3 % 2 for n in range(count)],
            "distortion": "jpeg",
        }
    )


# Agreement


def test_agreement_with_ratings_is_correlation():
    row = agreement(rated([1.0, 2.0, 3.0, 4.0, 5.0, 9.0]))
    assert (row["srcc"], row["srcc_within_level"], row["rows"], row["photographs"]) == (1.0, 1.0, 6, 3)
    assert agreement(rated([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))["srcc"] == -1.0
    assert "dominance" not in row


def test_a_set_with_subsets_has_the_correlation_within_each():
    """Over all rows the subset decides the order; within ss02 it is reversed."""
    row = agreement(rated([1.0, 2.0, 3.0, 6.0, 5.0, 4.0]).assign(subset=["ss01"] * 3 + ["ss02"] * 3))
    assert (row["srcc_ss01"], row["srcc_ss02"]) == (1.0, -1.0) and row["srcc"] > 0.7
    assert not any(name.startswith("srcc_ss") for name in agreement(rated([1.0, 2.0, 3.0])))


def test_an_unparseable_answer_is_counted_and_not_replaced():
    row = agreement(rated([1.0, 2.0, NAN, 4.0, NAN, 6.0]))
    assert (row["unparseable"], row["rows"], row["srcc"]) == (2, 6, 1.0)


def mixed(*scores):
    """Return four rows of one crop: in five pairs one is worse in every component that differs."""
    return pd.DataFrame(
        {
            "dataset": "sim-mixed",
            "image": "a.jpg",
            "reference": "a.jpg",
            "crop": "0,0,64,64",
            "mos": NAN,
            "distortion": "jitter+jpeg",
            "level": ["1+1", "1+3", "3+1", "3+3"],
            "score": scores,
        }
    )


@pytest.mark.parametrize(
    ("scores", "share", "why"),
    [
        ((4, 3, 2, 1), 1.0, "all in order"),
        ((4, 2, 3, 1), 1.0, "the two in the middle are no pair"),
        ((1, 2, 3, 4), 0.0, "all reversed"),
        ((4, 4, 3, 2), 0.9, "one tie counts half"),
        ((3, 3, 3, 3), 0.5, "only ties"),
        ((4, 3, 2, NAN), 0.4, "three pairs without an answer are wrong"),
        ((NAN, NAN, NAN, NAN), 0.0, "no answers: no ties either"),
    ],
)
def test_dominance_is_the_share_of_pairs_in_order(scores, share, why):
    row = agreement(mixed(*map(float, scores)))
    assert row["dominance"] == pytest.approx(share), why
    assert row["unparseable"] == np.isnan(scores).sum() and "srcc" not in row


def test_without_a_pair_there_is_no_dominance():
    assert math.isnan(agreement(mixed(4.0, 3.0, 2.0, 1.0).iloc[1:3])["dominance"])


def compared(*scores):
    """Return five rows without a mos and their pairs: a to d in order by majority, one pair undecided."""
    table = pd.DataFrame({"dataset": "mine", "image": list("abcde"), "reference": list("abcde")})
    said = {"ab": 0.9, "bc": 0.6, "dc": 0.1, "da": 0.2, "ae": 0.5, "ea": 0.5}
    pairs = [(*names, share) for names, share in said.items()]
    return table.assign(score=scores, mos=NAN, level=0), pd.DataFrame(
        pairs, columns=["first", "second", "preference"]
    )


@pytest.mark.parametrize(
    ("scores", "share", "why"),
    [
        ((5, 4, 3, 2, 1), 1.0, "all in order"),
        ((2, 3, 4, 5, 1), 0.0, "all reversed"),
        ((5, 4, 4, 4, 9), 0.75, "two ties count half, and the undecided pair not at all"),
        ((5, 4, 3, NAN, 1), 0.5, "two of four pairs without an answer are wrong"),
    ],
)
def test_pairs_right_is_the_share_of_decided_pairs_in_the_majoritys_order(scores, share, why):
    row = agreement(*compared(*map(float, scores)))
    assert row["pairs_right"] == pytest.approx(share), why
    assert math.isnan(row["srcc"]) and "pairs_right" not in agreement(compared(*scores)[0])


def test_a_pair_that_is_there_twice_counts_once_by_its_votes():
    table, _ = compared(5.0, 4.0, 3.0, 2.0, 1.0)
    pairs = pd.DataFrame({"first": list("aba"), "second": list("bac"), "preference": [1, 1, 1.0]})
    assert agreement(table, pairs.assign(votes=[1, 3, 1]))["pairs_right"] == 0.5
    assert agreement(table, pairs.assign(votes=[3, 1, 1]))["pairs_right"] == 1.0


def test_rows_come_with_their_comparisons_of_each_other(tmp_path):
    rows = pd.DataFrame({"image": [f"photos/{name}.jpg" for name in ("koala", "kitten", "wall_clock")]})
    path = tmp_path / "mine.csv"
    rows.assign(dataset="mine", mos="", split=["test", "test", "train"]).to_csv(path, index=False)
    koala, kitten, clock = rows["image"]
    pairs = pd.DataFrame([(koala, clock, 1), (koala, kitten, 1)], columns=["first", "second", "preference"])
    pairs.iloc[:1].to_csv(tmp_path / "mine-comparisons.csv", index=False)
    with pytest.raises(ValueError, match="'test' has a mos, and nobody"):
        evaluation_rows([path], root=EMBEDDED)
    pairs.to_csv(tmp_path / "mine-comparisons.csv", index=False)
    found = evaluation_rows([path], root=EMBEDDED)[str(path)].pairs
    assert found["second"].tolist() == ["photos/kitten.jpg"]


def test_a_set_rated_per_content_is_not_pooled():
    """Both contents have scores in order, but the MOS of each starts at 0."""
    table = rated([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 50.0, 100.0, 0.0, 50.0, 100.0], "sriqa-bench").assign(
        reference=list("aaabbb")
    )
    row = agreement(table)
    assert (row["srcc"], row["rows"], row["photographs"]) == (1.0, 6, 2) and row["srcc_pooled"] < 0.5
    assert row["plcc"] == 1.0 and row["plcc_pooled"] < 0.5 and math.isnan(row["plcc_fit"])
    assert agreement(table.assign(dataset="bid"))["srcc"] == row["srcc_pooled"]


def test_the_oracle_of_type_and_level_knows_more_than_that_of_the_level():
    frame = pd.DataFrame(
        {
            "distortion": ["color_shift", "gaussian_blur", "jitter"] * 2,
            "level": [1] * 3 + [5] * 3,
            "mos": [4.5, 4.6, 4.0, 2.2, 1.3, 1.5],
            "reference": list("aabbcc"),
        }
    )
    rows = oracles(frame)
    assert list(rows) == ["oracle: type and level", "oracle: level"]
    assert rows["oracle: type and level"]["srcc"] > rows["oracle: level"]["srcc"] > 0.5
    assert math.isnan(rows["oracle: level"]["srcc_within_level"])
    assert "score" not in frame


# Gains


def test_a_gain_is_after_minus_before():
    better, worse = rated([1.0, 2.0, 3.0, 4.0, 5.0, 6.0] * 2), rated([6.0, 5.0, 4.0, 3.0, 2.0, 1.0] * 2)
    better["mos"] = worse["mos"] = better["score"]
    up, down = gain(better, worse), gain(worse, better)
    assert up["srcc_gain"] == 2.0 and up["srcc_gain_lo"] > 0.5 and up["srcc_within_level_gain"] == 2.0
    assert down["srcc_gain"] == -2.0 and down["srcc_gain_hi"] < -0.5
    assert set(gain(better, better).values()) == {0.0}
    assert up["srcc_gain_lo"] <= up["srcc_gain"] <= up["srcc_gain_hi"]


def test_a_gain_needs_the_same_photographs():
    rows = rated([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="these are 3 and 2 others; in one of them only: a.jpg"):
        gain(rows, rows.iloc[1:])
    with pytest.raises(ValueError, match="the same rows in the same order"):
        gain(rows, rows.iloc[::-1])


# Naming


def test_naming_counts_family_and_type_where_they_are_easy_to_see():
    rows = [  # distortion, level, reasoning
        ("jpeg", 4, "strong jpeg blocking in the flat areas"),  # exact
        ("gaussian_blur", 3, "moderate lens blur all over the picture"),  # the family alone
        ("jitter", 5, "severe pixel jitter along the edges, then white noise"),  # the first name counts
        ("white_noise", 5, "severe jpeg blocking, or white noise"),  # the first name is wrong
        ("white_noise", 3, CLEAN),  # wrong
        ("lens_blur", 3, ""),  # no reasoning: wrong
        ("mean_shift", 1, "moderate brightness shift"),  # exact: its ends are levels 1 and 5
        ("contrast_change", 5, "moderate contrast change"),  # exact
        ("jpeg", 2, "slight white noise"),  # too faint to count, like the next three
        ("mean_shift", 3, CLEAN),
        ("mean_shift", 4, "slight contrast change"),
        ("contrast_change", 2, CLEAN),
    ]
    table = pd.DataFrame(rows, columns=["distortion", "level", "reasoning"])
    assert naming(table) == {"named_rows": 8, "family": 5 / 8, "exact": 4 / 8, "severity": 6 / 8, "texts": 10}


def test_naming_without_rows_is_nan():
    row = naming(pd.DataFrame({"distortion": ["jpeg"], "level": [1], "reasoning": [""]}))
    assert row["named_rows"] == 0 and math.isnan(row["family"]) and math.isnan(row["exact"])


# Rows and scores


@pytest.fixture
def manifest(tmp_path):
    rows = []
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
        split = "train" if number == 7 else "test"
        rows.append([f"{number}.png", "mine", 1 + number / 2, "", f"{number}.png", "", "", "", "", split])
    pd.DataFrame(rows, columns=list(MANIFEST_COLUMNS)).to_csv(tmp_path / "mine.csv", index=False)
    return str(tmp_path / "mine.csv")


def reds(rows):
    return [open_picture(path).getpixel((0, 0))[0] // 30 for path in rows.images]


def test_evaluation_rows_are_those_of_the_split_with_their_pictures(manifest):
    frames = evaluation_rows([manifest])
    assert list(frames) == [manifest] and reds(frames[manifest]) == [0, 1, 2, 3, 4, 5, 6]
    assert reds(evaluation_rows([manifest], "train")[manifest]) == [7]
    assert len(evaluation_rows([manifest], "all")[manifest].images) == 8


def test_a_limit_takes_a_fixed_sample_in_order(manifest):
    rows = evaluation_rows([manifest], limit=3)[manifest]
    assert rows.frame.index.tolist() == [0, 1, 2]
    assert reds(rows) == sorted(reds(rows)) == [int(name[0]) for name in rows.frame["image"]] != [0, 1, 2]
    assert reds(evaluation_rows([manifest], limit=3)[manifest]) == reds(rows)
    assert len(evaluation_rows([manifest], limit=99)[manifest].frame) == 7


def test_a_limit_takes_whole_contents_where_ratings_are_scaled_within_them(tmp_path):
    for content in "abcd":
        (tmp_path / "MOS").mkdir(exist_ok=True)
        names = [f"{content}_{method}.png" for method in ("Original", "SwinIRx4", "SeeSRx4")]
        (tmp_path / "MOS" / f"{content}.txt").write_text(
            "".join(f"{name},{50 * n}\n" for n, name in enumerate(names))
        )
        for name in names:
            folder = tmp_path / "images" / name.split("_")[1]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(folder / name)
    for limit, contents in ((1, 1), (3, 1), (7, 2), (11, 3), (12, 4), (99, 4)):
        frame, images, _ = evaluation_rows(["sriqa-bench"], limit=limit, root=tmp_path)["sriqa-bench"]
        assert frame["reference"].value_counts().tolist() == [3] * contents, limit
        assert images == [tmp_path / image for image in frame["image"]]


def test_a_split_without_rows_is_named(manifest):
    with pytest.raises(
        ValueError, match=r"mine.csv' has no rows with split 'val'; it has \['test', 'train'\]"
    ):
        evaluation_rows([manifest], "val")


class Told:
    """Stand in for the Scorer: a picture is its score as a number; thinking adds half a point."""

    made, asked = [], []

    def __init__(self, policy, thinking, estimate, seed=0):
        self.made.append((policy, thinking, estimate, seed))
        self.thinking = thinking

    def with_(self, thinking, estimate):
        self.asked.append((thinking, estimate))
        other = copy.copy(self)
        other.thinking = thinking
        return other

    def batches(self, images):
        for image in images:
            yield [Score(image + self.thinking / 2, 0.1, [f"<answer>{image}</answer>"], "seen")]


def with_images(frame, images):
    frame.attrs["root"] = "here"
    return Rows(frame.drop(columns="score"), images)


@pytest.mark.parametrize("name", ["sim-kadid", "sim-mixed"])
def test_rendered_pictures_stand_beside_the_rows(name):
    """If they were in attrs, pandas would copy all of them at nearly every step."""
    frame, images, _ = evaluation_rows([name], limit=4)[name]
    assert len(frame) == len(images) == 4 and all(isinstance(image, Image.Image) for image in images[:])
    for table in (
        frame,
        frame.assign(score=1.0),
        score_frame(Told(None, False, "greedy"), Rows(frame, [1.0, 2.0, 3.0, 4.0])),
    ):
        assert all(isinstance(value, str) for value in table.attrs.values())


def test_a_bar_on_stderr_counts_the_pictures(capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "tqdm", partial(evaluation.tqdm, mininterval=0))
    score_frame(
        Told(None, False, "greedy"), with_images(rated([0, 0, 0]), [1.0, 2.0, 3.0]), "some set, greedy"
    )
    said = capsys.readouterr()
    assert "some set, greedy" in said.err and "3/3" in said.err and not said.out


def test_scored_rows_hold_every_picture_in_order(monkeypatch):
    scores = [
        Score(3.0, 0.5, ["<answer>3.00</answer>"]),
        Score(answers=["<think>dull</think>"], reasoning="dull", error="no score"),
        Score(error="b.jpg is missing"),
    ]
    scorer = Told(None, False, "greedy")
    monkeypatch.setattr(scorer, "batches", lambda images: [scores[:2], scores[2:]], raising=False)
    table = score_frame(scorer, with_images(rated([0, 0, 0]), ["p", "q", "r"]))
    assert table["score"].tolist() == pytest.approx([3.0, NAN, NAN], nan_ok=True)
    assert table["error"].tolist() == ["", "no score", "b.jpg is missing"]
    assert table["answer"].tolist() == ["<answer>3.00</answer>", "<think>dull</think>", ""]
    assert table["well_formed"].tolist() == [True, False, False] and table["reasoning"].tolist() == [
        "",
        "dull",
        "",
    ]
    assert agreement(table)["unparseable"] == 2


@pytest.mark.parametrize(
    ("thinking", "score", "well_formed"),
    [
        (True, Score(3.0, answers=[f"<think>dull</think>{OPEN}"], mass=0.99), True),
        (False, Score(3.0, answers=[OPEN], mass=0.99), True),
        (True, Score(3.0, answers=[f"dull{OPEN}"], mass=0.99), False),  # no think block
        (
            True,
            Score(answers=[f"<think>dull</think>{OPEN}"], mass=0.2, error="only 0.20"),
            False,
        ),  # no number follows
        (True, Score(answers=["<think>dull and"], mass=0.0, error="no <answer>"), False),
        (
            True,
            Score(3.0, answers=["<think>dull</think><answer>3.00</answer>"]),
            True,
        ),  # greedy: the whole answer
        (True, Score(3.0, answers=["<answer>3.00</answer>"]), False),
    ],
)
def test_an_expected_score_is_well_formed_up_to_its_number(monkeypatch, thinking, score, well_formed):
    scorer = Told(None, thinking, "expected")
    monkeypatch.setattr(scorer, "batches", lambda images: [[score]], raising=False)
    assert score_frame(scorer, with_images(rated([0]), ["p"]))["well_formed"].tolist() == [well_formed]


def test_every_set_is_scored_by_every_estimate_in_every_mode(monkeypatch):
    monkeypatch.setattr(evaluation, "Scorer", Told)
    Told.made.clear()
    Told.asked.clear()
    frames = {
        "one": with_images(rated([0] * 6), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        "two": with_images(rated([0] * 6, name="two"), [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]),
        "sim-mixed": with_images(mixed(0, 0, 0, 0), [4.0, 3.0, 2.0, 1.0]),
    }
    result, tables = evaluate("a policy", frames, estimates=("expected", "greedy"), seed=3)
    assert Told.made == [("a policy", True, "expected", 3)]  # loaded once
    assert Told.asked == [(mode, estimate) for mode in (True, False) for estimate in ("expected", "greedy")]
    assert set(tables) == {
        (name, estimate, thinking)
        for name in frames
        for estimate in ("expected", "greedy")
        for thinking in (True, False)
    }
    assert tables["one", "greedy", True]["score"].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]
    found = result.set_index(["set", "estimate", "thinking"])
    assert (
        found.loc[("one", "greedy", False), "srcc"] == 1.0
        and found.loc[("two", "greedy", False), "srcc"] == -1.0
    )
    assert found.loc[("sim-mixed", "greedy", False), "dominance"] == 1.0
    average = result[result["set"] == "average"]
    assert average["srcc"].tolist() == [0.0] * 4 and average["dominance"].isna().all()
    assert len(result) == 4 * 4


def test_one_rated_set_has_no_average(monkeypatch):
    monkeypatch.setattr(evaluation, "Scorer", Told)
    result, _ = evaluate("a policy", {"one": with_images(rated([0] * 3), [1.0, 2.0, 3.0])}, modes=(False,))
    assert result["set"].tolist() == ["one"]
    result, _ = evaluate(
        "a policy", {"sim-mixed": with_images(mixed(0, 0, 0, 0), [4.0, 3.0, 2.0, 1.0])}, modes=(False,)
    )
    assert result["dominance"].tolist() == [1.0]


# Writing


def test_scores_are_saved_by_set_estimate_and_mode(tmp_path):
    table = rated([1.0, NAN, 3.0])
    save_scores(
        {("sim-kadid", "expected", True): table, ("my/sets/koniq.csv", "greedy", False): table},
        tmp_path / "new" / "before",
    )
    assert sorted(path.name for path in (tmp_path / "new" / "before").iterdir()) == [
        "koniq.greedy.plain.csv",
        "sim-kadid.expected.thinking.csv",
    ]
    back = pd.read_csv(tmp_path / "new" / "before" / "koniq.greedy.plain.csv")
    pd.testing.assert_frame_equal(back, table)
