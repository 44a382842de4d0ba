"""The yardstick has seeded networks, pictures of known order, agreement and effects of a reward."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vqr1.data.manifests import EMBEDDED
from vqr1.experiments import toy_networks as imaging
from vqr1.experiments import yardstick as progress
from vqr1.experiments.dead_leaves import dead_leaves, pink_textures
from vqr1.records import read_table
from vqr1.scoring import Scorer


@pytest.fixture(scope="module")
def photos() -> dict[str, Image.Image]:
    return dict(list(progress.middles("val").items())[:3])


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer("tiny-policy", thinking=True)


def table(**columns) -> pd.DataFrame:
    return pd.DataFrame({"reference": ["a", "b", "c"], "score": [3.0, 3.5, 4.0], "std": 0.5} | columns)


# --- networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", imaging.NETWORKS)
def test_training_is_repeated_by_its_seed_and_moves_every_weight(name, tmp_path, monkeypatch):
    kind, batches, loss = imaging.NETWORKS[name]
    few = {"painter": lambda seed: batches(seed, count=4, batch=2), "upscaler": batches}[name]
    monkeypatch.setitem(imaging.NETWORKS, name, (kind, few, loss))
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        imaging.train_network(name, folder, (1, 4))
    one, two = (
        load_file(folder / f"{name}-4.safetensors") for folder in (tmp_path / "one", tmp_path / "two")
    )
    before = imaging.load_network(name, 0).state_dict()
    assert set(one) == set(before) and {value.dtype for value in one.values()} == {torch.float16}
    assert all(
        torch.equal(one[key], two[key]) and not torch.equal(one[key], before[key].half()) for key in one
    )


def test_the_stored_weights_are_there_and_small():
    folder = EMBEDDED / "progress"
    expected = {f"{name}-{step}.safetensors" for name, steps in imaging.STORED.items() for step in steps}
    assert {path.name for path in folder.iterdir()} == expected
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 300_000


def test_an_upscaler_before_training_adds_nothing(photos):
    small = imaging.shrink(next(iter(photos.values())), 3)
    assert (
        imaging.enlarge(small, 3, imaging.load_network("upscaler", 0)).tobytes()
        == imaging.enlarge(small, 3).tobytes()
    )


def test_a_step_that_is_not_stored_is_named():
    with pytest.raises(
        FileNotFoundError, match="painter-7.safetensors: no such weights; stored steps of painter: 0, "
    ):
        imaging.load_network("painter", 7)


def test_loading_a_network_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    imaging.load_network("painter", 0)
    assert torch.equal(torch.rand(1), expected)


def test_training_batches_are_of_the_training_split_alone(monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(imaging.Image, "open", lambda path: opened.append(str(path)) or real(path))
    enlarged, original = next(imaging.upscaler_batches(0))
    splits = pd.read_csv(EMBEDDED / "photos.csv").set_index("image")["split"]
    assert {splits["photos/" + path.rsplit("/", 1)[1]] for path in opened} == {"train"}
    assert enlarged.shape == original.shape == (8, 3, 72, 72) and 0 < (enlarged - original).abs().mean() < 0.2


def test_the_painter_paints_any_size_and_the_same_again():
    network, noise = (
        imaging.load_network("painter", max(imaging.STORED["painter"])),
        torch.randn(2, 3, 40, 64),
    )
    one, two = (imaging.paint(network, noise, 2) for _ in range(2))
    assert [picture.size for picture in one] == [(64, 40)] * 2 and one[0].tobytes() == two[
        0
    ].tobytes() != one[1].tobytes()


def test_painting_with_a_perfect_guess_gives_the_guess():
    target = torch.full((1, 3, 8, 8), 0.5)
    painted = imaging.paint(lambda x, t: target, torch.randn(1, 3, 8, 8), 4)
    assert np.unique(np.asarray(painted[0])).tolist() == [round(0.75 * 255)]


def test_the_trained_painter_guesses_better_than_the_untrained():
    rng = np.random.default_rng(9)
    leaves = np.stack([dead_leaves(rng, pink_textures(np.random.default_rng(0), 2), 64) for _ in range(8)])
    pictures = torch.from_numpy(leaves).float().permute(0, 3, 1, 2) * 2 - 1
    losses = []
    for step in (0, *imaging.STORED["painter"]):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(float(imaging.painter_loss(imaging.load_network("painter", step), pictures)))
    assert losses == sorted(losses, reverse=True)


# --- pictures -----------------------------------------------------------------------------------


def test_larger_scales_lose_more_and_filters_are_in_order(photos):
    rows = pd.DataFrame(progress.upscalings(photos, steps=()))
    rows["psnr"] = [progress.likeness(row["picture"], row["original"])[0] for _, row in rows.iterrows()]
    mean = rows.groupby(["scale", "method"])["psnr"].mean().unstack("scale")
    assert (mean.loc["bicubic", [2, 3, 4]].diff().dropna() < 0).all()
    assert all(mean.loc[list(imaging.FILTERS), scale].is_monotonic_increasing for scale in imaging.SCALES)
    assert len(rows) == 3 * (1 + 3 * 4) and {picture.size for picture in rows["picture"]} == {(192, 192)}


def test_likeness_of_equal_pictures_is_infinite(photos):
    photo = next(iter(photos.values()))
    assert progress.likeness(photo, photo) == (np.inf, 1.0)


def test_retouch_does_nothing_at_zero_and_each_way_its_own(photos):
    photo = next(iter(photos.values()))
    assert imaging.retouch(photo).tobytes() == photo.tobytes()
    x = {
        key: np.asarray(imaging.retouch(photo, **{key: value}), float)
        for key, value in (("sharpen", 1), ("contrast", 0.3), ("grain", 6))
    }
    detail = {key: np.abs(np.diff(value, axis=1)).mean() for key, value in x.items()}
    assert all(value > np.abs(np.diff(np.asarray(photo, float), axis=1)).mean() for value in detail.values())
    flat = Image.new("RGB", (64, 64), (100, 100, 100))
    assert imaging.retouch(flat, sharpen=3).tobytes() == flat.tobytes()
    assert np.unique(imaging.retouch(flat, contrast=0.1)).tolist() == [97]  # 127.5 - 1.1 * 27.5 = 97.25
    assert 5.5 < np.asarray(imaging.retouch(flat, grain=6), float).std() < 6.5


# --- the yardstick ------------------------------------------------------------------------------


def sampling_rows(score) -> pd.DataFrame:
    places = [
        (f"noise {n}", steps, place) for n in range(6) for place, steps in enumerate((1, 2, 4, 8, 16, 32))
    ]
    return pd.DataFrame(
        [
            dict(
                part="painting",
                reference=name,
                method="sampling",
                amount=steps,
                scale=1,
                score=score(place, n),
                psnr=np.nan,
            )
            for n, (name, steps, place) in enumerate(places)
        ]
    )


def test_agreement_is_one_for_scores_in_order_and_minus_one_for_reversed():
    for sign in (1, -1):
        rows = sampling_rows(lambda place, n, sign=sign: sign * place)
        found = progress.agreement_with(rows, "sampling steps")
        assert {found[key] for key in ("srcc", "srcc_lo", "srcc_hi", "means", "means_lo", "means_hi")} == {
            sign
        }
    assert (found["photographs"], found["rows"], found["unparseable"]) == (6, 36, 0)


def test_a_score_that_is_missing_is_counted_and_left_out():
    found = progress.agreement_with(
        sampling_rows(lambda place, n: np.nan if n == 3 else place), "sampling steps"
    )
    assert found["unparseable"] == 1 and found["srcc"] == found["means"] == 1.0


def test_equal_scores_have_no_correlation():
    assert np.isnan(progress.agreement_with(sampling_rows(lambda place, n: 3.0), "sampling steps")["means"])


def test_orders_find_their_rows(photos, scorer):
    measured = progress.measured(progress.upscalings(photos), scorer).assign(part="upscaling")
    found = {name: progress.in_order(measured, name) for name in list(progress.ORDERS)[:-2]}
    assert {name: len(rows) for name, rows in found.items()} == {
        "scale": 12,
        "method x2": 15,
        "method x3": 15,
        "method x4": 15,
        "upscaler training": 15,
    }
    assert all(rows["mos"].notna().all() for rows in found.values())
    scale = found["scale"].groupby("mos")["scale"].first()
    assert (
        scale.tolist() == [4, 3, 2, 1] and progress.agreement_with(measured, "scale", "psnr")["srcc"] == 1.0
    )


def test_preference_is_one_half_against_itself_and_symmetric():
    one, two = table(), table(score=[2.0, 4.0, 4.5])
    assert progress.preferred(one, one)[0] == pytest.approx(0.5)
    (p, low, high), (q, *_) = progress.preferred(one, two), progress.preferred(two, one)
    assert p + q == pytest.approx(1) and low <= p <= high


def test_preference_wants_the_same_photographs():
    with pytest.raises(ValueError, match="3 and 2 rows, but 2 references in both"):
        progress.preferred(table(), table().iloc[:2])


def test_climbing_never_goes_down_and_repeats(photos, scorer):
    one, two = (progress.climb(scorer, photos, rounds=3) for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
    kept = one[one["kept"]]
    assert (
        kept["score"].is_monotonic_increasing
        and one["kept"].iloc[0]
        and (one.loc[0, list(progress.STRENGTHS)] == 0).all()
    )
    assert (one[list(progress.STRENGTHS)] >= 0).all(axis=None)


@pytest.mark.slow
def test_the_study_scores_no_policy_twice_and_makes_its_rows_again(tmp_path, monkeypatch):
    """Nothing is trained or scored again: the stored rows must follow from the stored pictures."""
    runs = EMBEDDED / "runs"
    monkeypatch.setattr(progress, "measure_part", lambda *a: pytest.fail("scored again"))
    (tmp_path / progress.PICTURES).write_bytes((runs / progress.PICTURES).read_bytes())
    policies = read_table(runs / progress.PICTURES)["policy"].unique()
    progress.study(policies, tmp_path)
    written, stored = (read_table(folder / "progress.csv") for folder in (tmp_path, runs))
    pd.testing.assert_frame_equal(written, stored, check_exact=False, atol=2e-4)


def test_measuring_again_replaces_a_part_alone(tmp_path, monkeypatch, photos, scorer):
    rows = [
        dict(reference=name, scale=1, method="as it is", amount=0, picture=photo, original=photo)
        for name, photo in photos.items()
    ]
    monkeypatch.setattr(progress, "retouchings", lambda *a: rows)
    monkeypatch.setattr(progress, "paintings", lambda *a: rows[:1])
    for part in ("retouching", "painting", "retouching"):
        progress.measure_part(part, "tiny-policy", scorer, tmp_path)
    table = read_table(tmp_path / progress.PICTURES)
    assert table["part"].value_counts().to_dict() == {"retouching": 3, "painting": 1}
    assert (
        set(table["policy"]) == {"tiny-policy"}
        and set(table["split"]) == {"val"}
        and np.isinf(table["psnr"]).all()
    )
