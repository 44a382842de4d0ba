"""Calibrated error bars come true on new pictures, and refuse what they cannot know."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shared import ROOT

from vqr1.calibration import THURSTONE, Calibration, calibrate, coverage, reliability
from vqr1.cli import main
from vqr1.evaluation import calibrate_policy, evaluation_rows, score_frame
from vqr1.policy import CALIBRATION
from vqr1.scoring import Scorer


def rated(n: int = 300, seed: int = 0, noise=8.0, spread=(0.02, 0.1)) -> pd.DataFrame:
    """Return scored rows: MOS 0..100, logistic in the score; noise: its deviation, or that by the spread."""
    rng = np.random.default_rng(seed)
    score, std = rng.uniform(1, 5, n), rng.uniform(*spread, n)
    deviation = noise(std) if callable(noise) else noise
    mos = 100 / (1 + np.exp(-(score - 3) / 0.8)) + deviation * rng.normal(size=n)
    rows = {"score": score, "score_std": std, "mos": mos, "reference": range(n)}
    return pd.DataFrame(rows).assign(dataset="mine", image=[f"{i}.png" for i in range(n)])


# Error bars


@pytest.mark.parametrize("n", [20, 60, 300])
def test_intervals_hold_95_percent_of_new_pictures(n):
    """The mean over fits is within four standard errors of a coverage's beta law, or above by 1 / (n + 1)."""
    fits = 30
    covered = np.mean([coverage(calibrate(rated(n, i)), rated(1000, 1000 + i)) for i in range(fits)])
    error = 4 * math.sqrt(0.95 * 0.05 / n / fits)
    assert 0.95 - error - 0.01 < covered < 0.95 + error + 1 / (n + 1)


@pytest.mark.parametrize("noise", [8.0, lambda std: 200 * std], ids=["alike", "by spread"])
def test_probabilities_come_true(noise):
    table = reliability(calibrate(rated(600, noise=noise)), rated(2000, 1, noise=noise))
    assert len(table) == 10 and table["predicted"].between(0.5, 1).all()
    assert table["gap"].max() < 0.04
    assert table["gap"].tolist() == pytest.approx((table["predicted"] - table["observed"]).abs().tolist())


def test_tails_are_as_heavy_as_the_errors():
    """Errors that are normal need no tails; rare large ones do, and then the probabilities come true."""
    draws = np.random.default_rng(2)
    normal, new = rated(800), rated(2000, 1)
    heavy, new_heavy = (
        frame.assign(mos=frame["mos"] + 25 * draws.standard_t(2, len(frame))) for frame in (normal, new)
    )
    found = calibrate(heavy)
    assert calibrate(normal).tails > 20 > 6 > found.tails
    assert reliability(found, new_heavy)["gap"].max() < 0.05
    for score, other in ((4.5, 1.5), (3.2, 3.0)):
        both = found.probability(score, 0.1, other, 0.1) + found.probability(other, 0.1, score, 0.1)
        assert both == pytest.approx(1)


def test_a_calibration_without_tails_is_the_normal_one(tmp_path):
    """Files from before tails were fitted mean what they meant."""
    found = calibrate(rated())
    file = found.save(tmp_path)
    known = json.loads(file.read_text())
    del known["tails"]
    file.write_text(json.dumps(known))
    p = Calibration.load(tmp_path).probability(3.4, 0.1, 3.0, 0.1)
    distance = (found.mos(3.4) - found.mos(3.0)) / (found.noise * np.hypot(*found.error([0.1, 0.1])))
    assert p == pytest.approx((1 + math.erf(distance / math.sqrt(2))) / 2)


def test_a_spread_much_too_small_is_corrected():
    """RL to rank draws the answers together: what the policy says of itself is far from true."""
    frame, new = rated(300, spread=(0.01, 0.02)), rated(2000, 1, spread=(0.01, 0.02))
    own = new.assign(mos=1 + new["mos"] / 25)  # on the score's scale, as its own word needs
    assert coverage(THURSTONE, own) < 0.4 and reliability(THURSTONE, own)["gap"].max() > 0.2
    found = calibrate(frame)
    assert 0.92 < coverage(found, new) < 0.98 and reliability(found, new)["gap"].max() < 0.05


def test_the_spread_is_used_only_where_it_tells_the_error():
    alike, by_spread = calibrate(rated(600)), calibrate(rated(600, noise=lambda std: 200 * std))
    assert alike.typical_spread is None and alike.held_out["constant"] < alike.held_out["spread"]
    assert by_spread.held_out["spread"] < by_spread.held_out["constant"]
    assert by_spread.error(0.1) > by_spread.error(0.02) and alike.error(0.1) == alike.error(0.02) == 1


def test_scores_without_a_spread_have_error_bars_too():
    found = calibrate(rated().assign(score_std=np.nan))
    assert found.typical_spread is None and "spread" not in found.held_out
    assert np.isfinite(found.interval(3.0, np.nan)).all()


def test_photographs_not_rows_are_held_out():
    """Forty photographs, each with an error of its own that all its rows share: rows alone would hide it."""
    rng = np.random.default_rng(0)
    score, error = np.repeat(rng.uniform(1, 5, 5), 40), np.repeat(rng.normal(0, 10, 5), 40)
    frame = pd.DataFrame({"score": score + rng.normal(0, 0.01, 200), "score_std": 0.1, "dataset": "mine"})
    frame = frame.assign(mos=20 * score + error, reference=np.repeat(list("abcde"), 40))
    apart, together = calibrate(frame.assign(reference=range(200))), calibrate(frame)
    assert together.quantile > 1.2 * apart.quantile


@given(
    st.floats(0.01, 5), st.floats(1, 5), st.floats(0.1, 60), st.lists(st.floats(0, 6), min_size=2, max_size=9)
)
def test_the_curve_rises_and_the_interval_holds_the_score(width, middle, quantile, scores):
    scores = np.sort(scores)
    found = Calibration((90, 10, middle, width), quantile, 5.0)
    low, high = found.interval(scores, np.full(len(scores), 0.1))
    assert (np.diff(found.mos(scores)) >= 0).all()
    assert (np.diff(low) >= 0).all() and (np.diff(high) >= 0).all()
    assert (low <= scores).all() and (scores <= high).all()
    assert (low >= np.minimum(scores, 1)).all() and (high <= np.maximum(scores, 5)).all()


@given(st.floats(1, 5), st.floats(0.01, 1), st.floats(1, 5), st.floats(0.01, 1))
def test_probabilities_of_both_ways_round_sum_to_1(a, std_a, b, std_b):
    for found in (Calibration((90, 10, 3, 1), 9, 5.0), Calibration((90, 10, 3, 1), 9, 50.0, 0.1)):
        there, back = found.probability(a, std_a, b, std_b), found.probability(b, std_b, a, std_a)
        assert there + back == pytest.approx(1) and (there >= 0.5) == (found.mos(a) >= found.mos(b))


def test_the_interval_in_scores_is_that_of_the_mos():
    found = calibrate(rated())
    score = np.linspace(2, 4, 5)
    low, high = found.mos_interval(score, np.full(5, 0.05))
    ends = found.interval(score, np.full(5, 0.05))
    inside = [(end > 1) & (end < 5) for end in ends]
    assert inside[0].any() and inside[1].any()
    for end, mos, within in zip(ends, (low, high), inside):
        assert found.mos(end[within]) == pytest.approx(mos[within])


# What is refused


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (rated(19), "19 rated rows: a 95% interval needs at least 20"),
        (rated().assign(score=3.0), "every score is 3.0"),
        (rated().assign(mos=50.0), "every mos is 50.0"),
        (
            rated().assign(score=lambda f: f["score"].where(f.index != 7)),
            "1 of 300 rows have no score (7.png)",
        ),
        (
            rated().assign(mos=lambda f: f["mos"].where(f.index > 8)),
            "9 of 300 rows have no mos (0.png, 1.png",
        ),
        (rated().assign(mos=lambda f: -f["mos"]), "scores do not rise with the ratings"),
        (rated().assign(reference="a.png"), "all rows show one photograph"),
        (rated().assign(dataset=lambda f: np.where(f.index < 9, "mine", "other")), "mine, other have each"),
        (rated().drop(columns="score_std"), "columns ['score_std'] are missing"),
    ],
    ids=["few", "score", "mos", "no-score", "no-mos", "falling", "photograph", "sets", "column"],
)
def test_what_cannot_be_calibrated_is_named(frame, said):
    with pytest.raises(ValueError) as refused:
        calibrate(frame)
    assert said in str(refused.value)


def test_coverage_refuses_another_scale_and_reliability_does_not():
    found, other = calibrate(rated()), rated(300, 1).assign(dataset="other")
    with pytest.raises(ValueError, match="on the scale of mine, and rows are of other"):
        coverage(found, other)
    both = pd.concat([rated(50, 1), other.head(50)])
    assert reliability(found, both)["pairs"].sum() == 2 * 50 * 49 // 2  # no pair across sets


def test_ties_count_half_whichever_way_round():
    frame = rated(40).assign(mos=50.0)
    assert reliability(THURSTONE, frame)["observed"].unique().tolist() == [0.5]


# The file


def test_the_file_gives_the_same_calibration_again(tmp_path):
    for noise in (8.0, lambda std: 200 * std):
        found = calibrate(rated(noise=noise), {"estimate": "expected", "thinking": False})
        found.save(tmp_path)
        assert Calibration.load(tmp_path) == found


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"curve": [1, 2, 3, 4], "quantile": 1, "slope": 2}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / CALIBRATION).write_text(text)
    with pytest.raises(ValueError, match="calibration.json is no calibration.*vqr1 calibrate"):
        Calibration.load(tmp_path)


# A policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded policy, calibrated on 24 rows."""
    folder = tmp_path_factory.mktemp("policy") / "tiny"
    shutil.copytree(ROOT / "data" / "tiny-policy", folder)
    calibrate_policy(folder, "sim-kadid", limit=24)
    return folder


@pytest.fixture(scope="module")
def pictures(folder) -> list[Image.Image]:
    return list(evaluation_rows(["sim-kadid"], "test", 4)["sim-kadid"].images)


def test_a_calibrated_policy_scores_compares_and_ranks_by_it(folder, pictures):
    scorer, plain = Scorer(folder), Scorer("tiny-policy")
    found = Calibration.load(folder)
    for calibrated, bare in zip(scorer.score(pictures), plain.score(pictures), strict=True):
        assert (calibrated.score, calibrated.std) == pytest.approx((bare.score, bare.std))
        assert 1 <= calibrated.low < calibrated.score < calibrated.high <= 5
        assert math.isnan(bare.low) and math.isnan(bare.high) and bare.bar.startswith("±")
        assert calibrated.bar == f"(95%: {calibrated.low:.1f} to {calibrated.high:.1f})"
    one, two = scorer.score(pictures[:2])
    expected = float(found.probability(one.score, one.std, two.score, two.std))
    assert scorer.compare(*pictures[:2]) == pytest.approx(expected)
    ranked = scorer.rank(pictures)
    best = scorer.score([pictures[ranked["image"][0]]])[0]
    assert (ranked["lo"][0], ranked["hi"][0]) == pytest.approx((best.low, best.high), abs=1e-4)
    assert (ranked["rank_lo"] <= ranked.index + 1).all() and (ranked["rank_hi"] > ranked.index).all()


def test_scores_read_off_otherwise_have_no_error_bar(folder, pictures):
    scorer = Scorer(folder)
    for settings in ({"thinking": not scorer.thinking}, {"estimate": "greedy"}, {"numbered": True}):
        score = scorer.with_(**settings).score(pictures[:1])[0]
        assert math.isnan(score.low) and not score.error
    for loaded in ({"quantize": True}, {"pixels": [1024, 16_384]}):
        assert Scorer(folder, **loaded).calibrated is None
    assert scorer.calibrated
    assert Scorer((scorer.engine.model, scorer.engine.processor)).calibration is None


def test_the_command_calibrates_and_score_writes_the_error_bar(folder, pictures, tmp_path, capsys):
    own, picture = tmp_path / "own", tmp_path / "a.png"
    shutil.copytree(folder, own)
    (own / CALIBRATION).unlink()
    pictures[0].save(picture)
    assert main(["score", str(picture), "--policy", str(own)]) == 0
    assert ",,," in capsys.readouterr().out
    assert main(["calibrate", "--policy", str(own), "--sets", "sim-kadid", "--limit", "24"]) == 0
    assert "Calibrated on 24 rows of sim-kadid: 95% of MOS are within ±" in capsys.readouterr().out
    made, kept = (json.loads((path / CALIBRATION).read_text()) for path in (own, folder))
    assert made.pop("held_out") == pytest.approx(kept.pop("held_out"))  # the fit ends a rounding apart
    assert made.pop("curve") == pytest.approx(kept.pop("curve"))
    assert made.pop("quantile") == pytest.approx(kept.pop("quantile"))
    assert made.pop("noise") == pytest.approx(kept.pop("noise"))
    assert made == kept
    out = tmp_path / "scores.csv"
    assert main(["score", str(picture), "--policy", str(own), "--out", str(out)]) == 0
    row = pd.read_csv(out).iloc[0]
    assert 1 <= row["low"] < row["score"] < row["high"] <= 5


def test_rows_of_ones_own_are_taken_whole(folder):
    rows = evaluation_rows(["sim-kadid"], "val", 24)["sim-kadid"]
    found = calibrate_policy(folder, rows.frame)
    assert found == Calibration.load(folder) and found.rows == 24
    assert 0.9 <= coverage(found, score_frame(Scorer(folder), rows)) <= 1


def test_a_policy_without_a_folder_or_a_set_without_mos_is_refused(folder):
    with pytest.raises(ValueError, match="Qwen/Qwen2.5-VL-3B-Instruct is no folder"):
        calibrate_policy("Qwen/Qwen2.5-VL-3B-Instruct", "sim-kadid")
    with pytest.raises(ValueError, match="sim-mixed have no MOS on one scale"):
        calibrate_policy(folder, "sim-mixed", split="all", limit=24)
