"""Photographs under KADID-10k's distortions, rated by simulated observers, not by people.

The observers are in `vqr1.data.observers`. ``vqr1 data --rebuild`` (`build_sim_sets`) writes the sets'
manifests again, bit for bit.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vqr1.data.images import upright_size
from vqr1.data.manifests import CROP, HELD_OUT, MANIFEST_COLUMNS, TRAINED
from vqr1.data.observers import SEED, photograph_rng, rate
from vqr1.data.photographs import photograph_splits
from vqr1.distortions import distort
from vqr1.places import EMBEDDED

MIX_STAGES = (
    ("brighten",),
    ("gaussian_blur", "lens_blur", "high_sharpen", "denoise"),
    ("color_diffusion", "color_quantization", "color_saturation_1"),
    ("jitter", "quantization"),
    ("white_noise", "white_noise_color_component", "impulse_noise"),
    ("jpeg",),
)
"""Trained types that get worse with every level, in the order sim-mixed applies them.

At most one per stage: sharpening would undo a blur, and a blur after noise would remove it, so that a
higher level of one component could look better. Moved patches and colour blocks are left out: a crop may
miss them.
"""
MIXTURE = {
    "sim-five": (
        (1, 2, 3, 4, 5),
        (
            "lens_blur",
            "color_saturation_1",
            "jpeg",
            "white_noise",
            "mean_shift",
            "color_block",
            "high_sharpen",
        ),
    ),
    "sim-hundred": (
        (1, 2, 3),
        (
            "color_quantization",
            "jpeg",
            "white_noise",
            "white_noise_color_component",
            "brighten",
            "mean_shift",
            "jitter",
            "non_eccentricity_patch",
            "quantization",
            "contrast_change",
        ),
    ),
    "sim-elo": (
        (3, 4, 5),
        (
            "gaussian_blur",
            "lens_blur",
            "color_diffusion",
            "color_shift",
            "color_saturation_1",
            "jpeg",
            "impulse_noise",
            "denoise",
            "brighten",
            "jitter",
            "high_sharpen",
        ),
    ),
}
"""Levels and types of the sets for training on several at once: all strengths, mostly mild, mostly strong."""


def sim_sets(root: str | Path | None = None, seed: int = SEED) -> dict[str, pd.DataFrame]:
    """Return the simulated sets for the photographs of ``root/photos.csv`` (columns image, split), by name.

    sim-kadid: every photograph x the 19 trained types x 5 levels, in the photograph's split.
    sim-unseen: test photographs x the 6 held-out types x 5 levels.
    sim-mixed: test photographs x 3 groups of four composed rows, without mos.
    sim-five, sim-hundred, sim-elo: rows of sim-kadid on other scales (`mixture_set`), each photograph in one.

    Crops are 192x192 at a random multiple of 16 (colour blocks: one that shows some). Every number depends
    on ``seed`` and the photograph's name and size alone.
    """
    root = Path(root or EMBEDDED)
    splits = photograph_splits(root)
    sizes = {name: upright_size(root / name, str(root / "photos.csv")) for name in splits.index}
    rows = pd.concat([_all_cells(name, sizes[name], seed) for name in splits.index])
    rows["split"] = rows["image"].map(splits)
    test = splits.index[splits == "test"]
    unseen = rows[rows["distortion"].isin(HELD_OUT) & (rows["split"] == "test")]
    kadid = rows[rows["distortion"].isin(TRAINED)]
    sets = {
        "sim-kadid": kadid,
        "sim-unseen": unseen,
        "sim-mixed": pd.DataFrame([row for name in test for row in _mixed_rows(name, sizes[name], seed)]),
    }
    turn = splits.groupby(splits).cumcount() % len(MIXTURE)  # the photographs of each split are dealt out
    for i, name in enumerate(MIXTURE):
        sets[name] = mixture_set(kadid[kadid["image"].isin(splits.index[turn == i])], name)
    return {
        name: frame.assign(dataset=name, reference=frame["image"])[list(MANIFEST_COLUMNS)]
        for name, frame in sets.items()
    }


def mixture_set(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the set's part of sim-kadid's rows, their MOS m (1..5) on the set's scale, higher is better.

    sim-five: m itself.
    sim-hundred: 0..100, linear from the set's lowest m to its highest, as raters use a whole scale for what
        they are shown (range equalisation). KonIQ-10k's 0..100 is stretched like this.
    sim-elo: 1500 + 400 log10 of the odds (m - 0.9) / (5.1 - m), about 850..1820 as in PIPAL, whose votes
        between pairs squeeze the middle and stretch the ends.

    All maps rise: no order within a set changes. std is empty where the unit is not m's.

    >>> rows = pd.DataFrame({"distortion": "jpeg", "level": 3, "mos": [2.0, 3.0, 4.0], "std": 0.8})
    >>> [mixture_set(rows, name).mos.round(1).tolist() for name in MIXTURE]
    [[2.0, 3.0, 4.0], [0.0, 50.0, 100.0], [1320.0, 1500.0, 1680.0]]
    """
    levels, types = MIXTURE[name]
    rows = rows[rows["level"].isin(levels) & rows["distortion"].isin(types)]
    if name == "sim-five":
        return rows
    mos = rows["mos"]
    if name == "sim-hundred":
        return rows.assign(mos=100 * (mos - mos.min()) / (mos.max() - mos.min()), std=np.nan)
    return rows.assign(mos=1500 + 400 * np.log10((mos - 0.9) / (5.1 - mos)), std=np.nan)


def build_sim_sets(root: str | Path | None = None, out: str | Path | None = None) -> dict[str, int]:
    """Write the manifests into ``out`` (default: ``root``), always the same bytes; return the row counts."""
    root = Path(root or EMBEDDED)
    sets = sim_sets(root)
    for name, frame in sets.items():
        path = Path(out or root) / f"{name}.csv"
        frame.to_csv(path, index=False, float_format="%.4f", lineterminator="\n", encoding="utf-8")
    return {name: len(frame) for name, frame in sets.items()}


def _all_cells(photograph: str, size: tuple[int, int], seed: int) -> pd.DataFrame:
    """Return the photograph's 125 rows of type and level with simulated ratings."""
    rng = photograph_rng(photograph, seed, stream=2)
    rows = rate([photograph], seed)
    rows["seed"] = rng.integers(2**31, size=len(rows))
    rows["crop"] = [_random_crop(size, rng) for _ in range(len(rows))]
    for i, row in rows[rows["distortion"] == "color_block"].iterrows():
        while not _shows_blocks(rows.at[i, "crop"], row["level"], row["seed"], size):
            rows.at[i, "crop"] = _random_crop(size, rng)
    return rows


def _shows_blocks(crop: str, level: int, seed: int, size: tuple[int, int]) -> bool:
    """Tell whether the crop is painted at least half as much as the whole picture, which was rated.

    Half of plainly random crops would show neither of the two blocks of level 1.
    """
    x, y, w, h = map(int, crop.split(","))
    painted = np.asarray(distort(Image.new("RGB", size, (128, 128, 128)), "color_block", level, seed)) != 128
    return painted[y : y + h, x : x + w].any(2).mean() >= painted.any(2).mean() / 2


def _random_crop(size: tuple[int, int], rng: np.random.Generator) -> str:
    x, y = (16 * int(rng.integers((side - CROP) // 16 + 1)) for side in size)
    return f"{x},{y},{CROP},{CROP}"


def _mixed_rows(photograph: str, size: tuple[int, int], seed: int) -> list[dict]:
    """Return three groups of four rows that share types (two, two and three) and crop.

    Levels: low < middle < high. The two middles raise different components by at least two levels, so each
    group has five dominance pairs.
    """
    rng, rows = photograph_rng(photograph, seed, stream=3), []
    for count in (2, 2, 3):
        stages = sorted(rng.choice(len(MIX_STAGES), count, replace=False))
        types, crop = (
            "+".join(str(rng.choice(MIX_STAGES[stage])) for stage in stages),
            _random_crop(size, rng),
        )
        low = rng.integers(1, 4, count)
        high = rng.integers(low + 2, 6)
        raised = rng.permutation(count) == 0
        for levels in (low, np.where(raised, high, low), np.where(raised, low, high), high):
            level = "+".join(map(str, levels))
            rows.append(
                {
                    "image": photograph,
                    "mos": np.nan,
                    "std": np.nan,
                    "distortion": types,
                    "level": level,
                    "seed": int(rng.integers(2**31 - 2)),
                    "crop": crop,
                    "split": "test",
                }
            )
    return rows
