"""Probes read what is planted, choose by what they may see, and write their table."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from test_public_sets import biq_lists

from vqr1.experiments import probes
from vqr1.experiments.probes import PENALTIES, error_bars, eyes, named_right, ridge, ridge_scores, words
from vqr1.experiments.school import Flaw, Picture, PictureStream
from vqr1.metrics import srcc
from vqr1.prompts import CLEAN
from vqr1.records import read_table


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch) -> Path:
    """The folder that probes write into, instead of the project's."""
    monkeypatch.setattr(probes, "EMBEDDED", tmp_path / "data")
    return tmp_path / "data" / "runs"


def planted(count: int = 200, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (count, 6) features of several scales, and ratings that are a linear rule of three of them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 6)) * [1, 10, 0.1, 1, 5, 1] + 3
    return features, features @ [1.0, -0.2, 4.0, 0, 0, 0] + 2 + noise * rng.normal(size=count)


# The ridge


def test_without_a_penalty_the_ridge_finds_the_planted_rule():
    weights, constant = ridge(*planted(), 1e-9)
    assert weights == pytest.approx([1.0, -0.2, 4.0, 0, 0, 0], abs=1e-4) and constant == pytest.approx(
        2, abs=1e-3
    )


@pytest.mark.parametrize("penalty", [1e-3, 10, 1000])
def test_the_ridge_is_the_closed_form_on_standardised_features(penalty):
    """It is the least-squares fit of rows for the penalty added below the data."""
    features, mos = planted(noise=1.0)
    x = (features - features.mean(0)) / features.std(0)
    rows = np.vstack([x, math.sqrt(penalty) * np.eye(6)])
    expected = np.linalg.lstsq(rows, np.append(mos - mos.mean(), np.zeros(6)), rcond=None)[0]
    weights, constant = ridge(features, mos, penalty)
    assert weights * features.std(0) == pytest.approx(expected, abs=1e-4)
    assert features @ weights + constant == pytest.approx(x @ expected + mos.mean(), abs=1e-3)


def test_a_feature_that_never_changes_has_no_weight():
    features, mos = planted()
    features[:, 3] = 7
    weights, constant = ridge(features, mos, 1)
    assert weights[3] == 0 and np.isfinite(weights).all() and np.isfinite(constant)


def test_ridge_scores_follow_the_rule_on_unseen_pictures():
    (seen, mos), (unseen, truth) = planted(seed=1), planted(seed=2)
    assert ridge_scores(seen, mos, unseen) == pytest.approx(truth, abs=1.0)
    assert srcc(ridge_scores(seen, mos, unseen), truth) > 0.99


def test_the_penalty_is_chosen_by_seen_rows_alone(monkeypatch):
    """Four fifths are fitted and the last fifth chooses, then all are fitted; the unseen are only scored."""
    seen, mos = planted(100, noise=3.0)
    fitted = []
    monkeypatch.setattr(
        probes, "ridge", lambda x, y, penalty: fitted.append((len(x), penalty)) or ridge(x, y, penalty)
    )
    one = ridge_scores(seen, mos, np.zeros((4, 6)))
    assert fitted[:-1] == [(80, penalty) for penalty in PENALTIES] and fitted[-1][0] == 100
    chosen = fitted[-1][1]
    held = [srcc(seen[80:] @ ridge(seen[:80], mos[:80], penalty)[0], mos[80:]) for penalty in PENALTIES]
    assert held[PENALTIES.index(chosen)] == max(held)
    other = ridge_scores(seen, mos, np.vstack([np.zeros((4, 6)), 1e6 * np.ones((50, 6))]))
    assert fitted[-1][1] == chosen and other[:4] == pytest.approx(one)


def test_noise_in_many_features_asks_for_a_larger_penalty(monkeypatch):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(100, 60))
    chosen = []
    monkeypatch.setattr(probes, "ridge", lambda x, y, penalty: chosen.append(penalty) or ridge(x, y, penalty))
    for noise in (0.0, 6.0):
        ridge_scores(features, features.sum(1) + noise * rng.normal(size=100), features[:1])
    plain, noisy = chosen[len(PENALTIES)], chosen[-1]
    assert plain == PENALTIES[0] < noisy


# Words


def picture(**flaws: int) -> Picture:
    blank = np.zeros((32, 32, 3), np.float32)
    return Picture(
        np.zeros((32, 32, 3), np.uint8), tuple(Flaw(*flaw, blank, blank) for flaw in flaws.items())
    )


def test_named_right_counts_flaws_one_by_one():
    pictures = [picture(jpeg=3, haze=1), picture(defocus=2), picture(), picture(), picture(haze=5, jpeg=4)]
    texts = [
        "moderate jpeg blocking, slight color cast; edges clear",  # found one of one that counts; 1 of 2 true
        "slight haze; edges soft",  # found none of one; 0 of 1
        f"{CLEAN}; edges clear",  # sound
        "faint haze; edges clear",  # not sound; 0 of 1
        "severe haze, strong jpeg blocking; edges clear",  # found two of two; 2 of 2
    ]
    found = named_right(pictures, texts)
    assert found == {
        "found": 3 / 4,
        "true": 3 / 6,
        "sound": 1 / 2,
        "flaws": 4,
        "named": 6,
        "texts": 1.0,
    }


def test_a_faint_flaw_may_be_named_or_not():
    """Strength 1 is not missed when it is not named, and not wrong when it is."""
    faint = [picture(haze=1), picture(haze=1)]
    found = named_right(faint, ["faint haze", CLEAN])
    assert math.isnan(found["found"]) and found["true"] == 1.0 and math.isnan(found["sound"])


def test_a_policy_that_says_one_thing_has_few_texts_and_finds_little():
    pictures = [picture(jpeg=3), picture(haze=3), picture(), picture()]
    for text, sound in (("", 0), ("edges clear", 0), (CLEAN, 1), (f"{CLEAN}, but haze", 0)):
        found = named_right(pictures, [text] * 4)
        assert (found["sound"], found["texts"]) == (sound, 0.25), text  # to say nothing is not to say so
        if "haze" not in text:
            assert (found["found"], found["named"]) == (0, 0) and math.isnan(found["true"])


def test_words_are_of_validation_pictures_and_written(runs, monkeypatch):
    streams = []

    class Seen(PictureStream):
        def __init__(self, *args, **options):
            streams.append((args, options))
            super().__init__(*args, **options)

    monkeypatch.setattr(probes, "PictureStream", Seen)
    monkeypatch.setattr(probes, "SHOWN", {64: 1.0})
    told = []
    monkeypatch.setattr(
        probes, "named_right", lambda shown, texts: told.append((shown, texts)) or named_right(shown, texts)
    )
    table = words(["tiny-policy"], count=5, seed=7)
    assert streams == [((7, {64: 1.0}), {"splits": ("val",)})]
    assert list(table) == ["policy", "pictures", "found", "true", "sound", "flaws", "named", "texts"]
    assert table["policy"].tolist() == ["tiny-policy"] and table["pictures"].tolist() == [5]
    [(shown, texts)] = told
    assert len(texts) == len({picture.pixels.tobytes() for picture in shown}) == 5
    shares = table.loc[0, ["found", "true", "sound"]].dropna()  # of nothing: NaN
    assert shares.between(0, 1).all() and 0.2 <= table["texts"][0] <= 1
    pd.testing.assert_frame_equal(read_table(runs / "words.csv"), table, check_exact=False, atol=1e-4)
    assert "seed 7" in (runs / "words.csv").read_text().splitlines()[0]


# Eyes


def few(folder: Path, each: int = 60) -> Path:
    """Write a small BIQ2021 of noise, smoother the lower it is rated; return its folder."""
    rng, rated = np.random.default_rng(0), {}
    (folder / "Images").mkdir(parents=True)
    for subset in ("ss01", "ss02", "ss03"):
        for number in range(100_001, 100_001 + each):  # no picture of that number has a twin
            name, mos = f"{subset} ({number}).jpg", float(rng.uniform(0, 1).__round__(3))
            noise = gaussian_filter(rng.normal(size=(64, 64, 3)), (3 - 2.5 * mos, 3 - 2.5 * mos, 0))
            shown = np.clip(128 + 40 * noise / noise.std(), 0, 255).astype(np.uint8)
            Image.fromarray(shown).save(folder / "Images" / name, quality=95)
            rated[name] = mos
    test = {name: rated.pop(name) for name in list(rated)[:3]}
    biq_lists(folder, {"Test": test, "Train": rated})
    return folder


def test_eyes_read_what_the_tower_sees_on_validation_rows(tmp_path, runs, untrained_folder):
    policies = ["tiny-policy", str(untrained_folder)]
    table = eyes(policies, few(tmp_path / "biq2021"), rows=120)
    assert table["policy"].tolist() == policies and (table["rows"] == 9).all()
    assert (table["lo"] <= table["srcc"]).all() and (table["srcc"] <= table["hi"]).all()
    assert table["srcc"][0] > 0.8
    assert list(table)[-3:] == ["srcc_ss01", "srcc_ss02", "srcc_ss03"]
    pd.testing.assert_frame_equal(read_table(runs / "eyes.csv"), table, check_exact=False, atol=1e-4)


def test_error_bars_are_of_validation_and_test_rows(tmp_path, runs):
    """A wide interval holds nearly all; what is written is what the policy says of each row."""
    found = error_bars(["tiny-policy"], few(tmp_path / "biq2021", 300))
    rows = read_table(runs / "error-bars.csv.gz")
    assert set(rows["split"]) == {"val", "test"} and not set(rows["image"]) & {"", None}
    assert rows["mos"].between(0, 1).all() and rows["score"].between(1, 5).all()
    assert 0.5 < found["held"].item() <= 1 and 0 <= found["held_by_spread"].item() <= 1
    assert 0 <= found["gap"].item() <= 1


def test_eyes_need_the_whole_set(tmp_path):
    folder = few(tmp_path / "biq2021")
    for number in range(4):  # fewer than one in fifty would be a warning
        (folder / "Images" / f"ss02 (10000{number + 1}).jpg").unlink()
    with pytest.raises(FileNotFoundError, match="4 of 180 pictures of biq2021 are missing"):
        eyes(["tiny-policy"], folder)


@pytest.mark.slow
def test_eyes_read_what_is_there_of_the_real_set(real_sets, tmp_path):
    """The lists name some pictures that are there, so that the set is whole."""
    folders = [path for path in real_sets.iterdir() if path.name.lower() == "biq2021"]
    if not folders:
        pytest.skip(f"BIQ2021 is not in {real_sets}")
    there = {path.name.lower() for path in (folders[0] / "Images").iterdir()}
    (tmp_path / "Images").symlink_to(folders[0] / "Images", target_is_directory=True)
    for part in ("Train", "Test"):
        table = pd.read_csv(folders[0] / f"{part} (Images and MOS).csv")
        table = table[table["Image Name"].str.lower().isin(there)]
        table = table.groupby(table["Image Name"].str[:4].str.lower()).head(60)
        table.to_csv(tmp_path / f"{part} (Images and MOS).csv", index=False)
    table = eyes(["tiny-policy"], tmp_path, rows=60)
    assert table["rows"][0] >= 6 and -1 <= table["lo"][0] <= table["hi"][0] <= 1
