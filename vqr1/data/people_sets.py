"""What three sets of people's ratings need beyond the reading of a table.

BIQ2021 has near twins, which must not be in two parts of a split. SRIJ publishes its votes; they become
scores here, as in its authors' `reader.m`. PCUID compares every two pictures; its MOS is the share of wins.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vqr1.places import EMBEDDED

TWINS = EMBEDDED / "biq2021_twins.csv"
"""BIQ2021's pictures with a near twin: image, group, nearest; printed by `vqr1 data biq2021 --twins`."""
TWIN_BITS = 35
"""Near twins differ in at most so many of the 256 bits of their dHash,"""
TWIN_CORRELATION = 0.95
"""and their grey thumbnails of 16x16 px correlate by more than this."""
VALIDATION_SHARE = 0.045
"""Of BIQ2021's 10,000 training pictures: about 450 of them."""


# BIQ2021


def fingerprint(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return what `near_twins` compares: a picture's dHash, (256,) bool, and a grey thumbnail, (256,) uint8.

    path: a picture file. A JPEG is decoded at an eighth of its size: fast, and re-encoding hardly shows.

    Raises OSError for a file that is no picture.
    """
    with Image.open(path) as image:
        image.draft("L", (64, 64))
        grey = image.convert("L")
    fine = np.asarray(grey.resize((17, 16), Image.Resampling.BILINEAR))
    thumbnail = np.asarray(grey.resize((16, 16), Image.Resampling.BOX))
    return (fine[:, 1:] > fine[:, :-1]).ravel(), thumbnail.ravel()


def near_twins(paths: Sequence[Path], names: Sequence[str], trained: Sequence[bool]) -> pd.DataFrame:
    """Return the pictures that have a near twin: columns image, group, nearest.

    paths: N picture files.
    names: (N,) what to call them.
    trained: (N,) whether each belongs to the training part.

    Near twins are alike by `TWIN_BITS` and `TWIN_CORRELATION`. Twins of twins are in one group, which has the
    name of its first picture. nearest: for a picture outside training, the training picture with the nearest
    dHash if that is a twin, else "".
    """
    from scipy.sparse import coo_array  # slow to import
    from scipy.sparse.csgraph import connected_components

    names, trained = np.asarray(names, dtype=object), np.asarray(trained, dtype=bool)
    hashes, thumbs = (np.array(part, dtype=np.float32) for part in zip(*map(fingerprint, paths)))
    pairs, nearest = _twin_pairs(2 * hashes - 1, _unit(thumbs), trained)
    graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(names), len(names)))
    group = pd.Series(connected_components(graph, directed=False)[1])
    table = pd.DataFrame({"image": names, "group": pd.Series(names).groupby(group).transform("min")})
    table["nearest"] = ["" if n < 0 else names[n] for n in nearest]
    return table[group.duplicated(keep=False)].sort_values(["group", "image"], ignore_index=True)


def _twin_pairs(hashes: np.ndarray, thumbs: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (P, 2) positions of twins, each pair both ways, and (N,) the nearest training twin's or -1."""
    pairs, nearest, training = [], np.full(len(hashes), -1), np.flatnonzero(trained)
    for start in range(0, len(hashes), 1000):  # 12,000 x 12,000 at once would take gigabytes
        rows = np.arange(start, min(start + 1000, len(hashes)))
        bits = (256 - hashes[rows] @ hashes.T) / 2  # (1000, N): how many differ
        alike = (bits <= TWIN_BITS) & (thumbs[rows] @ thumbs.T > TWIN_CORRELATION)
        pairs.append(np.argwhere(alike & (rows[:, None] != np.arange(len(hashes)))) + [start, 0])
        if len(training):
            closest = training[bits[:, training].argmin(1)]
            found = alike[np.arange(len(rows)), closest] & ~trained[rows]
            nearest[rows[found]] = closest[found]
    return np.concatenate(pairs), nearest


def _unit(thumbs: np.ndarray) -> np.ndarray:
    """Return rows whose products are their correlations; a picture of one shade correlates with none."""
    centred = thumbs - thumbs.mean(1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)


def without_twins(table: pd.DataFrame) -> pd.DataFrame:
    """Return BIQ2021's rows with the columns reference and split; no reference is in two parts of the split.

    table: rows with the columns name, subset, and part: "train" or "test" as published.

    reference is a picture's group of near twins, or its own name. A test picture leaves (split "") if its
    nearest training picture is a twin, and a training picture if its group has a test picture that stays.
    Of the other training pictures, `VALIDATION_SHARE` of each subset becomes "val".
    """
    twins = pd.read_csv(TWINS, comment="#", keep_default_na=False)
    name, part = table["name"].str.lower(), table["part"]
    reference = name.map(dict(zip(twins["image"].str.lower(), twins["group"]))).fillna(table["name"])
    leaks = name.isin(twins.loc[twins["nearest"] != "", "image"].str.lower())
    tested = (part == "test") & ~leaks
    trained = (part == "train") & ~reference.isin(reference[tested])
    rows = table.assign(reference=reference, split=np.select([tested, trained], ["test", "train"], ""))
    return rows.assign(split=rows["split"].mask(trained & reference.isin(_validation(rows[trained])), "val"))


def _validation(rows: pd.DataFrame) -> set[str]:
    """Return the references that validate, drawn within each subset until its share is reached."""
    rng, chosen = np.random.default_rng(0), set()
    for _, part in rows.groupby("subset"):
        sizes = part["reference"].value_counts()
        upto = sizes[rng.permutation(sorted(sizes.index))].cumsum()
        chosen |= set(upto.index[upto <= round(VALIDATION_SHARE * len(part))])
    return chosen


# SRIJ


def screened_scores(votes: np.ndarray, rated: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each picture's mean score and its standard deviation over observers, on SRIJ's scale 0..100.

    votes: (O, N), what each observer gave each picture.
    rated: the number of pictures of which a share of outlying votes is taken.

    An observer's votes become z by their mean and deviation, and 100 (z + 3) / 6. An observer leaves with
    more than 5% outlying votes: 2 deviations from a picture's mean where the kurtosis of its votes is 2 to 4,
    else 4.47 (nearly the root of 20), much as in ITU-R BT.500. All deviations have ddof 1.
    Source: HumanStudy/reader.m of github.com/juanpaberon/IQA_SR, whose published scores it gives.

    >>> mean, std = screened_scores(np.array([[10, 20, 60], [0, 50, 100], [30, 40, 80]]), 3)
    >>> mean.round(2).tolist(), std.round(2).tolist()
    ([36.05, 45.8, 68.15], [2.35, 3.64, 1.29])
    """
    z = (votes - votes.mean(1, keepdims=True)) / votes.std(1, ddof=1, keepdims=True)
    away = z - z.mean(0)
    kurtosis = (away**4).mean(0) / np.maximum((away**2).mean(0) ** 2, 1e-12)
    limit = z.std(0, ddof=1) * np.where((kurtosis >= 2) & (kurtosis <= 4), 2, 4.47)
    kept = (np.abs(away) >= limit).sum(1) / rated <= 0.05
    scores = 100 * (z[kept] + 3) / 6
    return scores.mean(0), scores.std(0, ddof=1)


# PCUID


def win_share(pairs: pd.DataFrame) -> pd.Series:
    """Return each picture's share of wins in percent, ties counted half, by name.

    pairs: rows with the columns first, second, and preference: 1 where the first is better, 0.5 for a tie, 0.

    >>> pairs = pd.DataFrame({"first": list("aab"), "second": list("bcc"), "preference": [1, 0.5, 0]})
    >>> win_share(pairs).to_dict()
    {'a': 75.0, 'b': 0.0, 'c': 75.0}
    """
    name = pd.concat([pairs["first"], pairs["second"]])
    won = pd.concat([pairs["preference"], 1 - pairs["preference"]])
    return 100 * won.groupby(name).mean()
