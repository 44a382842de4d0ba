"""Policies, PSNR and SSIM are held against people, within contents and by the ways of enlarging."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter
from scipy.stats import spearmanr
from test_public_sets import CROPS
from test_public_sets import srij as write_srij

from vqr1.evaluation import Rows
from vqr1.experiments import srij as study
from vqr1.experiments.srij import against_people, srij, ways_srcc, whole_contents, with_likeness
from vqr1.records import read_table

WAYS = [("bicubic", "2"), ("bicubic", "4"), ("srgan", "4"), ("SRCNN", "3"), ("SRCNN", "4")]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Return 12 contents of six scenes, in five ways each: the policy follows people, PSNR hardly."""
    rng, rows = np.random.default_rng(0), []
    for content in range(12):
        ease = 30 * content  # a content's own height, which is no matter within it
        for quality, (distortion, level) in enumerate([*WAYS, ("", "")]):
            mos = 10 * quality + ease + rng.normal()
            rows.append(
                {
                    "reference": f"{'abcdef'[content // 2]}{content % 2 + 1}",
                    "distortion": distortion,
                    "level": level,
                    "mos": mos,
                    "policy": mos / 100 + 0.03 * rng.normal(),
                    "psnr": 30 + 5 * rng.normal() if distortion else study.AN_ORIGINALS_PSNR,
                    "ssim": 0.9 + mos / 1e4,
                }
            )
    return pd.DataFrame(rows)


def test_both_orders_are_those_of_a_plain_loop(table):
    found = against_people(table, ["policy"]).set_index(["order", "variant"])
    for name in ("policy", "psnr", "ssim"):
        each = [spearmanr(own[name], own["mos"]).statistic for _, own in table.groupby("reference")]
        row = found.loc["within contents", name]
        assert row["srcc"] == pytest.approx(np.mean(each), abs=1e-12)
        assert (row["rows"], row["contents"], row["unparseable"]) == (72, 12, 0)
        means = [
            table[(table["distortion"] == distortion) & (table["level"] == level)][[name, "mos"]].mean()
            for distortion, level in WAYS
        ]
        row = found.loc["ways", name]
        assert row["srcc"] == pytest.approx(spearmanr(pd.DataFrame(means)).statistic, abs=1e-12)
        assert (row["rows"], row["contents"]) == (60, 12)
    assert (found["srcc_lo"] <= found["srcc"]).all() and (found["srcc"] <= found["srcc_hi"]).all()


def test_a_policy_is_compared_with_its_rivals_content_by_content(table):
    found = against_people(table, ["policy"]).set_index(["order", "variant"])
    for order in ("within contents", "ways"):
        row = found.loc[order, "policy"]
        for rival in ("psnr", "ssim"):
            assert row[f"minus_{rival}"] == pytest.approx(row["srcc"] - found.loc[order, rival]["srcc"])
            assert row[f"minus_{rival}_lo"] <= row[f"minus_{rival}"] <= row[f"minus_{rival}_hi"]
        assert np.isnan(found.loc[order, "psnr"]["minus_ssim"])
    assert found.loc["within contents", "policy"]["minus_psnr_lo"] > 0
    assert found.loc["within contents", "policy"]["minus_ssim_hi"] <= 0, "SSIM is always right here"


def test_contents_of_one_scene_are_drawn_together(table):
    """With each content twice, the interval is that of the contents, not that of twice as many."""
    other = table.assign(reference=table["reference"].str.replace("1", "3").str.replace("2", "4"))
    once, twice = (against_people(rows, ["policy"]) for rows in (table, pd.concat([table, other])))
    columns = ["srcc", "srcc_lo", "srcc_hi", "minus_psnr_lo", "minus_psnr_hi"]
    pd.testing.assert_frame_equal(once[columns], twice[columns])


def test_a_policy_against_itself_is_no_better(table):
    """A rival with the policy's scores differs by nothing, whatever contents are drawn."""
    found = against_people(table.assign(ssim=table["policy"]), ["policy"])
    gaps = found.loc[found["variant"] == "policy", ["minus_ssim", "minus_ssim_lo", "minus_ssim_hi"]]
    assert gaps.abs().to_numpy().max() == 0


def test_a_picture_without_a_score_is_counted_and_left_out_of_its_ways_mean(table):
    lost = table["reference"].eq("b2") & table["distortion"].eq("srgan")
    found = against_people(table.assign(policy=table["policy"].mask(lost)), ["policy"])
    assert found.set_index(["order", "variant"])["unparseable"].to_dict() == {
        (order, name): int(name == "policy")
        for order in ("within contents", "ways")
        for name in ("policy", "psnr", "ssim")
    }
    score, mos = np.array([1.0, np.nan, 2.0, 2.0]), np.array([1.0, 99.0, 2.0, 2.0])
    assert ways_srcc(score, mos, np.array([0, 0, 1, 1])) == 1, "else way 0 would have the higher mean mos"


@pytest.fixture
def pictures(tmp_path) -> Rows:
    """Return two contents, the rows in no order: an original, a picture as it, a blurred and a noisy one."""
    rng, rows, paths = np.random.default_rng(0), [], []
    for content in "ab":
        original = Image.fromarray(rng.integers(60, 200, (32, 32), np.uint8)).convert("RGB")
        noisy = np.asarray(original) + rng.integers(-9, 9, (32, 32, 1))
        made = {
            "same": original,
            "blur": original.filter(ImageFilter.GaussianBlur(2)),
            "": original,
            "noise": Image.fromarray(noisy.astype(np.uint8)),
        }
        for distortion, picture in made.items():
            paths.append(tmp_path / f"{content}-{distortion}.png")
            picture.save(paths[-1])
            rows.append({"image": paths[-1].name, "reference": content, "distortion": distortion})
    order = rng.permutation(len(rows))
    return Rows(pd.DataFrame(rows).iloc[order].reset_index(drop=True), [paths[place] for place in order])


def test_every_picture_is_compared_with_the_original_of_its_content(pictures):
    found = with_likeness(pictures)
    assert found["image"].tolist() == pictures.frame["image"].tolist()
    for _, own in found.set_index("distortion").groupby("reference"):
        assert own.loc["", "psnr"] == own.loc["same", "psnr"] == 200 and own.loc["", "ssim"] == 1
        assert own.loc["blur", "psnr"] < own.loc["noise", "psnr"] < 45
        assert own.loc["blur", "ssim"] < own.loc["noise", "ssim"] < 1


def test_a_content_that_lacks_a_picture_is_left_out_whole(pictures):
    gone = pictures.frame.index[pictures.frame["image"] == "a-.png"][0]
    frame = pictures.frame.drop(gone).reset_index(drop=True)
    part = Rows(frame, [path for place, path in enumerate(pictures.images) if place != gone])
    kept = whole_contents(part)
    assert set(kept.frame["reference"]) == {"b"}
    assert [path.name for path in kept.images] == kept.frame["image"].tolist()
    with pytest.raises(ValueError, match="content 'a' has 0 originals, not 1; get the set again"):
        with_likeness(part)


@pytest.mark.slow
def test_the_study_writes_its_table(tmp_path, monkeypatch):
    """On a set of seven contents in SRIJ's layout, each picture larger and worse by its way."""
    monkeypatch.setattr(study, "EMBEDDED", tmp_path / "data")
    rng = np.random.default_rng(0)
    plain = {crop: rng.integers(50, 200, (48, 48)) for crop in CROPS}
    for image in write_srij(tmp_path / "SRIJ"):
        by, _, crop = Path(image).stem.split("-", 2)
        shift = {"HD": 0, "Yang10": 4, "SRCNN": 40}[by]
        noisy = plain[crop] + rng.integers(-shift, shift + 1, (48, 48))
        Image.fromarray(noisy.astype(np.uint8)).save(tmp_path / "SRIJ" / image)
    made = srij(["tiny-policy"], tmp_path)
    stored = read_table(tmp_path / "data" / "runs" / "srij.csv")
    assert stored["variant"].tolist() == ["tiny-policy", "psnr", "ssim"] * 2
    assert stored["rows"].tolist() == [21] * 3 + [14] * 3 and (stored["contents"] == 7).all()
    rivals = made[made["variant"] != "tiny-policy"]
    assert (rivals["srcc"] == 1).all(), "people's scores, PSNR and SSIM all fall with the noise"
    assert made["unparseable"].max() == 0 and made["srcc"].between(-1, 1).all()
