"""Simulated sets have the right rows and scales, and are rebuilt bit for bit."""

import numpy as np
import pandas as pd
import pytest

from vqr1.data.images import open_picture
from vqr1.data.manifests import HELD_OUT, TRAINED, dominance_pairs, load_ratings, read_manifest, render_rows
from vqr1.data.observers import human_cells, oracle_scores
from vqr1.data.simulated import MIX_STAGES, MIXTURE, build_sim_sets
from vqr1.metrics import srcc
from vqr1.places import EMBEDDED

ROOT = EMBEDDED
SETS = ("sim-kadid", "sim-unseen", "sim-mixed", *MIXTURE)
ROW = ["image", "distortion", "level", "seed", "crop"]


@pytest.fixture(scope="module")
def sets():
    return {name: load_ratings(name) for name in SETS}


def test_no_row_of_sim_kadid_has_a_held_out_type(sets):
    assert len(HELD_OUT) == 6 and len(TRAINED) == 19 and not set(HELD_OUT) & set(TRAINED)
    assert set(sets["sim-kadid"].distortion) == set(TRAINED)
    assert set(sets["sim-unseen"].distortion) == set(HELD_OUT)
    assert not {part for types in sets["sim-mixed"].distortion for part in types.split("+")} & set(HELD_OUT)
    assert set().union(*(sets[name].distortion for name in MIXTURE)) == set(TRAINED)


def test_splits_share_no_photograph(sets):
    photos = pd.read_csv(ROOT / "photos.csv").set_index("image").split
    rows = pd.concat(list(sets.values()))
    assert (rows.split == rows.image.map(photos)).all()
    assert rows.groupby("reference").split.nunique().max() == 1
    assert set(sets["sim-unseen"].split) == set(sets["sim-mixed"].split) == {"test"}


def test_every_photograph_has_every_type_and_level_once(sets):
    photos = pd.read_csv(ROOT / "photos.csv")
    assert len(sets["sim-kadid"]) == len(photos) * 19 * 5
    assert len(sets["sim-unseen"]) == (photos.split == "test").sum() * 6 * 5
    assert not sets["sim-kadid"].duplicated(["image", "distortion", "level"]).any()


def test_manifests_are_rebuilt_bit_for_bit(tmp_path, sets):
    counts = build_sim_sets(ROOT, out=tmp_path)
    for name in SETS:
        assert (tmp_path / f"{name}.csv").read_bytes() == (ROOT / f"{name}.csv").read_bytes(), name
        assert counts[name] == len(sets[name])


def test_oracles_on_the_rows_are_near_those_on_real_ratings(sets):
    """0.942 and 0.676 hold for 25 types, so trained and held-out rows are taken together."""
    rows = pd.concat([sets["sim-kadid"].query("split == 'test'"), sets["sim-unseen"]])
    both, level = (srcc(score, rows["mos"]) for score in oracle_scores(rows))
    print(f"oracle SRCC: type and level {both:.3f}, level {level:.3f}")
    assert both == pytest.approx(0.942, abs=0.02)
    assert level == pytest.approx(0.676, abs=0.04)


def test_seeds_say_nothing_of_type_or_level(sets):
    rows = sets["sim-kadid"]
    assert rows.seed.nunique() > 0.999 * len(rows)
    assert abs(np.corrcoef(rows.seed.astype(float), rows.level)[0, 1]) < 0.05
    assert (
        rows.groupby("distortion")
        .seed.apply(lambda s: s.astype(float).mean() / 2**31)
        .between(0.35, 0.65)
        .all()
    )


def test_crops_are_192_px_at_multiples_of_16(sets):
    crops = pd.concat(list(sets.values())).crop.str.split(",", expand=True).astype(int)
    assert (crops[[2, 3]] == 192).all(axis=None) and (crops[[0, 1]] % 16 == 0).all(axis=None)


def test_every_crop_with_colour_blocks_shows_some(sets):
    rows = sets["sim-kadid"].query("distortion == 'color_block'").iloc[::15]
    for (_, row), image in zip(rows.iterrows(), render_rows(rows, workers=1)):
        x, y, w, h = map(int, row["crop"].split(","))
        plain = open_picture(ROOT / row["image"]).crop((x, y, x + w, y + h))
        assert (np.asarray(image) != np.asarray(plain)).any(2).mean() > 0.004, row["image"]


def test_a_new_photograph_changes_no_row_of_another(tmp_path, sets):
    photos = pd.read_csv(ROOT / "photos.csv")
    (tmp_path / "photos").symlink_to(ROOT / "photos")
    photos.iloc[[5, 2]].to_csv(tmp_path / "photos.csv", index=False)
    build_sim_sets(tmp_path)
    few, name = read_manifest(tmp_path / "sim-kadid.csv"), photos.image[5]
    full = sets["sim-kadid"]
    assert few[few.image == name].to_csv(index=False) == full[full.image == name].to_csv(index=False)


def test_mixed_rows_have_no_mos_and_five_pairs_per_group(sets):
    rows = sets["sim-mixed"]
    pairs = dominance_pairs(rows)
    assert rows.mos.isna().all() and len(rows) == 12 * rows.image.nunique()
    assert len(pairs) >= 15 * rows.image.nunique()
    better, worse = rows.iloc[pairs[:, 0]], rows.iloc[pairs[:, 1]]
    for column in ("image", "distortion", "crop"):
        assert (better[column].to_numpy() == worse[column].to_numpy()).all()


def test_mixed_types_get_worse_with_every_level_for_people_too():
    for name in sum(MIX_STAGES, ()):
        assert name in TRAINED
        assert human_cells().query("type == @name").mos_mean.is_monotonic_decreasing, name


# Several sets at once


def test_no_photograph_is_in_two_sets_of_the_mixture(sets):
    rows = pd.concat([sets[name] for name in MIXTURE])
    assert rows.groupby("image").dataset.nunique().max() == 1 and rows.image.nunique() == 81
    counts = rows.groupby(["dataset", "split"]).agg(rows=("mos", "size"), photographs=("image", "nunique"))
    assert (counts.loc[(slice(None), "test"), "photographs"] == 8).all() and (
        counts.loc[(slice(None), "test"), "rows"] >= 240
    ).all()
    assert counts.loc[(slice(None), "train"), "rows"].between(300, 600).all()


def test_the_sets_differ_in_types_and_levels_and_share_some(sets):
    types = [set(sets[name].distortion) for name in MIXTURE]
    assert all(a - b and a & b for a in types for b in types if a is not b)
    assert [sorted(set(sets[name].level)) for name in MIXTURE] == [[1, 2, 3, 4, 5], [1, 2, 3], [3, 4, 5]]


@pytest.mark.parametrize(
    "name, low, high", [("sim-five", 1, 5), ("sim-hundred", 0, 100), ("sim-elo", 800, 1850)]
)
def test_each_set_has_a_scale_of_its_own_with_the_order_of_sim_kadid(name, low, high, sets):
    rows = sets[name].merge(sets["sim-kadid"], on=ROW, suffixes=("", "_five"), validate="1:1")
    assert len(rows) == len(sets[name]) and (rows.split == rows.split_five).all()
    assert low <= rows.mos.min() and rows.mos.max() <= high
    assert (rows.mos.rank() == rows.mos_five.rank()).all()  # ties too
    assert sets[name]["std"].notna().all() == (name == "sim-five")


def test_the_mild_set_uses_its_whole_scale_and_the_strong_one_is_curved(sets):
    five = {name: sets[name].merge(sets["sim-kadid"], on=ROW, suffixes=("", "_five")) for name in MIXTURE}
    mild, strong = five["sim-hundred"], five["sim-elo"]
    assert (mild.mos.min(), mild.mos.max()) == (0, 100) and mild.mos_five.min() > 2
    assert (
        np.corrcoef(mild.mos, mild.mos_five)[0, 1]
        > 0.9999
        > 0.99
        > np.corrcoef(strong.mos, strong.mos_five)[0, 1]
    )
    odds = 10 ** ((strong.mos - 1500) / 400)
    np.testing.assert_allclose((0.9 + 5.1 * odds) / (1 + odds), strong.mos_five, atol=1e-3)
    assert strong.mos_five.median() < 2 < 3.9 < mild.mos_five.median()
