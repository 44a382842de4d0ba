"""The scorer as a yardstick: how well scores find known or assumed orders, and what misleads them.

``vqr1 study progress`` makes missing networks (data/progress/) and tables (data/runs/progress*.csv).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from vqr1.data.manifests import CROP, EMBEDDED
from vqr1.data.photographs import photograph_splits, photographs
from vqr1.experiments import real_networks as real
from vqr1.experiments.dead_leaves import pink_textures
from vqr1.experiments.toy_networks import (
    FILTERS,
    SCALES,
    STORED,
    Enlarger,
    enlarge,
    leaf_picture,
    load_network,
    paint,
    retouch,
    shrink,
    train_network,
)
from vqr1.metrics import bootstrap, content_agreement, srcc
from vqr1.records import read_table, write_table
from vqr1.scoring import Scorer
from vqr1.thurstone import comparative_probability


def likeness(picture: Image.Image, original: Image.Image) -> tuple[float, float]:
    """Return (PSNR in dB, SSIM) of a picture against its original; PSNR is infinite for equal ones.

    SSIM as in Wang et al. (2004), Gaussian windows, mean over the three channels.

    >>> grey = Image.new("RGB", (16, 16), (100, 100, 100))
    >>> round(likeness(Image.new("RGB", (16, 16), (101, 101, 101)), grey)[0], 2)
    48.13
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # of the extra "notebooks"

    one, two = np.asarray(original), np.asarray(picture)
    if np.array_equal(one, two):
        return float("inf"), 1.0
    window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return float(peak_signal_noise_ratio(one, two)), float(
        structural_similarity(one, two, channel_axis=2, **window)
    )


def middles(split: str) -> dict[str, Image.Image]:
    """Return the middle 192x192 px of every photograph of a split, by name."""
    found = {}
    for name, image in photographs(split).items():
        x, y = ((side - CROP) // 2 for side in image.size)
        found[name] = image.crop((x, y, x + CROP, y + CROP))
    return found


# Rows of pictures to be measured: dicts with reference, scale, method, amount, picture, original


def upscalings(
    photos: dict[str, Image.Image],
    scales=SCALES,
    steps=STORED["upscaler"],
    others: dict[str, Enlarger] | None = None,
) -> list[dict]:
    """Return rows of photographs shrunk, then enlarged by `FILTERS`, the network at `steps`, or others.

    others: name -> what enlarges by the one scale there is.
    """
    methods = [(name, 0, name) for name in FILTERS]
    methods += [("network", step, load_network("upscaler", step)) for step in steps]
    methods += [(name, 0, how) for name, how in (others or {}).items()]
    rows = []
    for name, photo in photos.items():
        rows.append(dict(reference=name, scale=1, method="original", amount=0, picture=photo, original=photo))
        for scale in scales:
            small = shrink(photo, scale)
            rows += [
                dict(
                    reference=name,
                    scale=scale,
                    method=method,
                    amount=amount,
                    picture=enlarge(small, scale, how),
                    original=photo,
                )
                for method, amount, how in methods
            ]
    return rows


def paintings(
    count: int = 24, sampling=(1, 2, 4, 8, 16, 32), training=(0, *STORED["painter"]), size: int = 128
) -> list[dict]:
    """Return rows of what the painter makes of `count` noises, by sampling steps and by training.

    Rows by training use the most sampling steps. Method "original" is as many real dead leaves, of a seed
    it was not trained on. size: a multiple of 8; the network is convolutional, trained on 64. No row has an
    original to compare with.
    """
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    rng, textures = np.random.default_rng(1), pink_textures(np.random.default_rng(0))
    groups = {("original", 0): [leaf_picture(rng, textures, size) for _ in range(count)]}
    for steps in sampling:
        groups["sampling", steps] = paint(load_network("painter", max(STORED["painter"])), noise, steps)
    for step in training:
        done = step == max(STORED["painter"])
        groups["training", step] = (
            groups["sampling", max(sampling)]
            if done
            else paint(load_network("painter", step), noise, max(sampling))
        )
    return [
        dict(reference=f"noise {n}", scale=1, method=method, amount=amount, picture=picture, original=None)
        for (method, amount), pictures in groups.items()
        for n, picture in enumerate(pictures)
    ]


STRENGTHS = {"sharpen": (0.5, 1, 2, 4), "contrast": (0.1, 0.25, 0.5, 1), "grain": (2, 4, 8, 16)}


def retouchings(photos: dict[str, Image.Image], scale: int = 3) -> list[dict]:
    """Return rows of photographs, as they are (scale 1) and enlarged bicubically, each retouched one way."""
    rows = []
    for name, photo in photos.items():
        for factor, start in ((1, photo), (scale, enlarge(shrink(photo, scale), scale))):
            same = dict(reference=name, scale=factor, original=photo)
            rows.append(same | dict(method="nothing", amount=0, picture=start))
            rows += [
                same | dict(method=method, amount=amount, picture=retouch(start, **{method: amount}))
                for method, amounts in STRENGTHS.items()
                for amount in amounts
            ]
    return rows


# The yardstick


def measured(rows: list[dict], scorer: Scorer) -> pd.DataFrame:
    """Return the rows with score, std, psnr and ssim in place of their pictures; NaN where there is none."""
    table = pd.DataFrame(rows).drop(columns=["picture", "original"])
    scores = scorer.score([row["picture"] for row in rows])
    alike = [
        likeness(row["picture"], row["original"]) if row["original"] else (np.nan, np.nan) for row in rows
    ]
    return table.assign(
        score=[s.score for s in scores],
        std=[s.std for s in scores],
        psnr=[p for p, _ in alike],
        ssim=[s for _, s in alike],
    )


_UP, _LAST = "part == 'upscaling' and ", max(STORED["upscaler"])
ORDERS = {
    "scale": (_UP + "method in ['bicubic', 'original']", "scale", [4, 3, 2, 1]),
    **{
        f"method x{s}": (_UP + f"scale == {s} and amount in [0, {_LAST}]", "method", [*FILTERS, "network"])
        for s in SCALES
    },
    "upscaler training": (
        _UP + "scale == 3 and method in ['bicubic', 'network']",
        "amount",
        [0, *STORED["upscaler"]],
    ),
    "sampling steps": ("method == 'sampling'", "amount", [1, 2, 4, 8, 16, 32]),
    "painter training": ("method == 'training'", "amount", [0, *STORED["painter"]]),
}
"""Name -> (query, column, its values from worst to best). The last two orders are assumed, the rest known."""


def in_order(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the measured rows of one of `ORDERS`, with their place in it as column ``mos`` (0: worst)."""
    which, column, values = ORDERS[name]
    rows = table.query(which)
    return rows.assign(mos=rows[column].map({value: place for place, value in enumerate(values)}))


def agreement_with(table: pd.DataFrame, name: str, yardstick: str = "score") -> dict[str, float]:
    """Return how well a yardstick finds an order in measured rows.

    Args:
        table: measured rows.
        name: of `ORDERS`.
        yardstick: "score", "psnr" or "ssim".

    Returns:
        srcc: Spearman's correlation of yardstick and place, averaged over photographs (or noises).
        means: the same correlation of each place's mean yardstick.
        *_lo, *_hi: 95% bootstrap intervals of both.
        photographs, rows, unparseable: how many there are.
    """
    rows = in_order(table, name)
    rows = rows.assign(score=rows[yardstick].replace(np.inf, 200))  # an original is above all, and has a rank
    found = content_agreement(rows)
    low, high = bootstrap(rows, means_srcc)
    return {
        "photographs": rows["reference"].nunique(),
        "rows": len(rows),
        "unparseable": int(rows["score"].isna().sum()),
        **{key: found[key] for key in ("srcc", "srcc_lo", "srcc_hi")},
        "means": means_srcc(rows["score"], rows["mos"]),
        "means_lo": low,
        "means_hi": high,
    }


def means_srcc(score, place) -> float:
    """Return Spearman's correlation between the places of an order and the mean score at each place.

    >>> means_srcc([1, 4, 3, 3], [0, 0, 1, 1])
    1.0
    """
    score, place = np.asarray(score, dtype=float), np.asarray(place)
    return srcc([np.nanmean(score[place == value]) for value in np.unique(place)], np.unique(place))


def means(table: pd.DataFrame, by: str | list[str], column: str = "score") -> pd.DataFrame:
    """Return a column's mean for every value of ``by``, and its 95% interval: mean, low, high.

    The interval is a bootstrap over photographs.
    """
    rows = {}
    for value, own in table.groupby(by, sort=False):
        rows[value] = (np.nanmean(own[column]), *bootstrap(own, np.nanmean, [column]))
    return pd.DataFrame(rows, index=["mean", "low", "high"]).T


def preferred(one: pd.DataFrame, two: pd.DataFrame) -> tuple[float, float, float]:
    """Return Thurstone's P(first table's pictures look better than the second's), with its 95% interval.

    The interval is over photographs. Both tables have one measured row per reference; ValueError unless
    they hold the same ones.
    """
    pairs = one.merge(two, on="reference", validate="one_to_one", suffixes=("", "_two"))
    if not len(pairs) == len(one) == len(two):
        raise ValueError(
            f"{len(one)} and {len(two)} rows, but {len(pairs)} references in both: "
            "compare the same photographs"
        )
    columns = ("score", "std", "score_two", "std_two")
    mean, std, others, other_std = (torch.tensor(pairs[key].to_numpy()) for key in columns)
    p = comparative_probability(mean[:, None], std**2, others, other_std**2)  # (pairs, pairs, 1)
    pairs["p"] = p[..., 0].diagonal().numpy()
    return float(pairs["p"].mean()), *bootstrap(pairs, np.mean, ["p"])


def climb(
    scorer: Scorer, photos: dict[str, Image.Image], rounds: int = 40, scale: int = 3, seed: int = 0
) -> pd.DataFrame:
    """Climb to the retouching of enlarged photographs that the scorer likes best; return every round.

    Photographs are enlarged bicubically. Each round changes the best settings a little, and keeps the change
    if the mean score rises: a (1+1) evolution strategy. Columns: round, sharpen, contrast, grain, score,
    psnr, ssim (means over the photographs), kept.
    """
    rng, rows = np.random.default_rng(seed), []
    steps, best = {"sharpen": 0.5, "contrast": 0.1, "grain": 1.5}, dict.fromkeys(STRENGTHS, 0.0)
    for number in range(rounds + 1):
        tried = {
            key: max(0.0, value + steps[key] * rng.normal()) if number else 0.0 for key, value in best.items()
        }
        table = measured(retouched(photos, tried, scale), scorer)
        average = table[["score", "psnr", "ssim"]].mean().to_dict()
        kept = not rows or average["score"] > max(row["score"] for row in rows)
        best = tried if kept else best
        rows.append({"round": number} | tried | average | {"kept": kept})
    return pd.DataFrame(rows)


def retouched(photos: dict[str, Image.Image], settings: dict[str, float], scale: int = 3) -> list[dict]:
    """Return rows of every photograph, enlarged bicubically and retouched by the same settings."""
    return [
        dict(
            reference=name,
            scale=scale,
            method="climbed",
            amount=0,
            original=photo,
            picture=retouch(enlarge(shrink(photo, scale), scale), **settings),
        )
        for name, photo in photos.items()
    ]


# The study

POLICIES = ("tiny-policy", "people-ranker")
PARTS = ("retouching", "reward", "upscaling", "painting", "networks")
PICTURES, ROUNDS, TRAINING = "progress-pictures.csv", "progress-reward.csv", "progress-training.csv"


def make_networks(folder: Path, log: Path, seed: int = 0) -> None:
    """Train the networks whose weights `folder` lacks, on one thread, and write their losses into `log`."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, stored in STORED.items():
            if not all((folder / f"{name}-{step}.safetensors").is_file() for step in stored):
                _replace(log, train_network(name, folder, stored, seed), {"network": name}, seed)
    finally:
        torch.set_num_threads(threads)


def measure_part(part: str, name: str, scorer: Scorer, runs: Path) -> None:
    """Add a policy's rows of one of `PARTS` to the table of pictures, and climbing's to that of rounds."""
    if part == "reward":
        rounds = climb(scorer, middles("val"))
        _replace(runs / ROUNDS, rounds, {"part": part, "policy": name})
        rows = retouched(middles("test"), rounds[rounds["kept"]].iloc[-1][list(STRENGTHS)].to_dict())
    elif part == "upscaling":
        rows = upscalings(middles("test")) + upscalings(middles("val"), scales=(3,))
    elif part == "networks":
        rows = upscalings(middles("test"), (real.SCALE,), (_LAST,), real.real_networks())
    else:
        rows = paintings() if part == "painting" else retouchings(middles("test"))
    table = measured(rows, scorer)
    table["split"] = table["reference"].map(photograph_splits())
    _replace(runs / PICTURES, table, {"part": part, "policy": name})


def _replace(path: Path, table: pd.DataFrame, key: dict[str, str], seed: int = 0) -> None:
    """Put rows into a table on disk, with the columns of `key`, instead of those that have the same key."""
    old = read_table(path, columns=list(key))
    others = old[(old[list(key)] != pd.Series(key)).any(axis=1)]
    write_table(path, pd.concat([own for own in (others, table.assign(**key)) if len(own)]), seed)


def study_rows(pictures: pd.DataFrame) -> pd.DataFrame:
    """Return a row per order and yardstick: the policies, and PSNR and SSIM where originals exist."""
    test = dict(list(pictures[pictures["split"] != "val"].groupby("policy", sort=False)))
    yardsticks = [(policy, "score", own) for policy, own in test.items()]
    yardsticks += [(name, name, next(iter(test.values()))) for name in ("psnr", "ssim")]
    rows = [
        _row(variant, order, own, column)
        for variant, column, own in yardsticks
        for order in ORDERS
        if in_order(own, order)[column].notna().any()  # generated pictures have no PSNR
    ]
    return pd.DataFrame(rows)


def _row(variant: str, order: str, pictures: pd.DataFrame, yardstick: str) -> dict:
    start = {
        "study": "progress",
        "variant": variant,
        "seed": 0,
        "set": order,
        "estimate": "expected" if yardstick == "score" else "",
    }
    return start | agreement_with(pictures, order, yardstick)


def study(policies: Sequence[str] = POLICIES, runs: Path | None = None) -> pd.DataFrame:
    """Make missing networks and tables, policy by policy; write and return progress.csv.

    runs: folder of the tables, data/runs by default. Parts that have rows are not scored again.
    """
    runs = runs or EMBEDDED / "runs"
    make_networks(EMBEDDED / "progress", runs / TRAINING)
    done = read_table(runs / PICTURES, columns=["policy", "part"])
    todo = {(name, part) for name in policies for part in PARTS} - set(zip(done["policy"], done["part"]))
    if "networks" in {part for _, part in todo}:
        real.real_networks()  # says now, not after the other parts, that it is not installed
    print(f"{len(todo)} parts to be scored: about {len(todo)} minutes on two cores", flush=True)
    for name in (name for name in policies if any(policy == name for policy, _ in todo)):
        scorer = Scorer(name, thinking=True)
        for part in (part for part in PARTS if (name, part) in todo):
            measure_part(part, name, scorer, runs)
    rows = study_rows(read_table(runs / PICTURES))
    write_table(runs / "progress.csv", rows)
    return rows
