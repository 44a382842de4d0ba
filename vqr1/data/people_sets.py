"""Three public sets that a git clone brings, and what they need besides reading a table.

BIQ2021 has near twins, which must not be in two parts of a split. SRIJ publishes its votes; they become
scores here, as in its authors' `reader.m`. PCUID compares every two pictures; its MOS is the share of wins.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vqr1.data.comparisons import PairTable
from vqr1.data.tables import csv_columns, excel_columns, matlab_array, name_parts, require
from vqr1.places import EMBEDDED

TWINS = EMBEDDED / "biq2021_twins.csv"
"""BIQ2021's pictures with a near twin: image, group, nearest; printed by `vqr1 data biq2021 --twins`."""
TWIN_BITS = 35
"""Near twins differ in at most this many of the 256 bits of their dHash."""
TWIN_CORRELATION = 0.95
"""Near twins' grey thumbnails of 16x16 px correlate by more than this."""
VALIDATION_SHARE = 0.045
"""Share of BIQ2021's 10,000 training pictures that validates: about 450."""


# BIQ2021


def read_biq2021(files: list[Path]) -> pd.DataFrame:
    parts = {"train": files[0].with_name("Train (Images and MOS).csv"), "test": files[0]}
    rows = [csv_columns(path, name="Image Name", mos="MOS").assign(part=part) for part, path in parts.items()]
    table = pd.concat(rows, ignore_index=True)
    subset = name_parts(table, r"^(?P<subset>ss0[123]) \(\d+\)\.jpg$", "ss01 (1).jpg")["subset"]
    return without_twins(table.assign(subset=subset.str.lower()))


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
    """Return BIQ2021's rows with the columns reference and split; no reference is in two splits.

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


def read_srij(files: list[Path]) -> pd.DataFrame:
    """Match the published scores to the addresses, in order; the originals, HD-1-…, have none."""
    path, scores = files[0].with_name("addressesSRIJ.mat"), matlab_array(files[0], "hScoresSRIJ")
    names = [str(np.ravel(name)[0]) for name in matlab_array(path, "addressesSRIJ")]
    where = [f"{path}, entry {n}" for n in range(1, len(names) + 1)]
    table = pd.DataFrame({"where": where, "name": names}, dtype=object)
    parts = name_parts(table, r"^(?P<by>\w+)-(?P<scale>[1-4])-(?P<crop>.+)\.tif$", "SRCNN-2-dolls1.tif")
    original = parts["by"] == "HD"
    if len(scores) != (~original).sum():
        others = f"{(~original).sum()} pictures of {path.name} that are not HD-1-…"
        raise ValueError(f"{files[0]}: {len(scores)} scores for {others}; get the set again")
    votes = _srij_votes(files[0].parents[2] / "HumanStudy" / "HumanScores", len(names))
    voted, std = screened_scores(votes, len(scores))
    table["mos"] = voted
    table.loc[~original, "mos"] = scores
    agrees = (table["mos"] - voted).abs() < 0.01
    require(agrees, table, "mos", "is not what the votes in HumanStudy/HumanScores give; get the set again")
    scene = parts["crop"].str.replace(r"(-fast)?\d+$", "", regex=True)  # several crops of one photograph
    described = {"distortion": parts["by"].mask(original, ""), "level": parts["scale"].mask(original, "")}
    return table.assign(std=std, severity=parts["scale"], reference=parts["crop"], scene=scene, **described)


def _srij_votes(folder: Path, pictures: int) -> np.ndarray:
    """Return votes (observers, pictures). In a file, column 1 numbers pictures from 1, column 2 has votes."""
    files = sorted(folder.glob("*.mat"))
    if len(files) < 2:
        raise FileNotFoundError(f"{folder}: {len(files)} files of votes; they belong to the annotation")
    votes = np.empty((len(files), pictures))
    for row, path in zip(votes, files):
        values = matlab_array(path, "quality")
        table = values.reshape(pictures, -1) if len(values) % pictures == 0 else np.empty((0, 0))
        if table.shape[1] < 2 or sorted(table[:, 0]) != list(range(1, pictures + 1)):
            raise ValueError(f"{path}: column 1 of quality is not 1 to {pictures}, once each; get it again")
        row[table[:, 0].astype(int) - 1] = table[:, 1]
        if not ((row >= 0) & (row <= 100)).all():
            raise ValueError(f"{path}: a vote is not a number from 0 to 100; get it again")
        if row.min() == row.max():
            raise ValueError(f"{path}: all votes are {row[0]}, which orders nothing; take the file away")
    return votes


def screened_scores(votes: np.ndarray, rated: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each picture's mean score and its standard deviation over observers, on SRIJ's scale 0..100.

    votes: (O, N), what each observer gave each picture.
    rated: the number of pictures that the share of outlying votes refers to.

    Each observer's votes are standardised to z and mapped to 100 (z + 3) / 6. Observers with more than 5%
    outliers are dropped. An outlier lies 2 or more deviations off its picture's mean where the kurtosis of
    the picture's votes is 2 to 4, else 4.47 (about root 20), much as in ITU-R BT.500. Deviations: ddof 1.
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


PCUID_PAIRS = {
    "first": "图像1",
    "second": "图像2",
    "label": "标签（-1为图像2质量优于图像1；0为图像1和图像2质量差不多；1为图像1质量优于图像2）",
}
"""The header of pair_label.xlsx: picture 1, picture 2, label (-1: 2 is better, 0: alike, 1: 1 is better)."""


def read_pcuid(files: list[Path]) -> pd.DataFrame:
    """Check the scores against all pairs: mos = 100 (wins + ties / 2) / (pictures - 1)."""
    table = excel_columns(files[0], 0, 1, name="image_id", mos="MOS")
    table["name"] = _pcuid_names(table, "name")
    pairs = read_pcuid_pairs(files[0].parent)
    met = table["name"].map(pd.concat([pairs["first"], pairs["second"]]).value_counts())
    whole = "is not compared once with every other picture in pair_label.xlsx; get the set again"
    require(met == len(table) - 1, table, "name", whole)
    off = pd.to_numeric(table["mos"], errors="coerce") - table["name"].map(win_share(pairs))
    require(off.abs() < 1e-6, table, "mos", "is not the share of wins in pair_label.xlsx; get the set again")
    return table


def read_pcuid_pairs(folder: Path) -> pd.DataFrame:
    table = excel_columns(folder / "pair_label.xlsx", 0, 1, **PCUID_PAIRS)
    preference = table["label"].str.removesuffix(".0").map({"1": 1.0, "0": 0.5, "-1": 0.0})
    require(preference.notna(), table, "label", "is not -1, 0 or 1")
    first, second = (_pcuid_names(table, column) for column in ("first", "second"))
    require(first != second, table, "second", "is compared with itself")
    again = pd.DataFrame({"a": np.minimum(first, second), "b": np.maximum(first, second)}).duplicated()
    require(~again, table, "second", "was compared with the first on an earlier line")
    return table.assign(first=first, second=second, preference=preference)


def _pcuid_names(table: pd.DataFrame, column: str) -> pd.Series:
    number = table[column].str.removesuffix(".0")  # a cell of Excel may be a whole number or not
    require(number.str.fullmatch(r"\d+"), table, column, "is not a picture's number")
    return "图片" + number + ".jpg"


def win_share(pairs: pd.DataFrame) -> pd.Series:
    """Return each picture's share of wins in percent, ties counted half, by name.

    pairs: as for `PairTable`. Each pair weighs the same, as in the reward: one that is there several times
        counts once, with the mean preference.

    >>> pairs = pd.DataFrame({"first": list("aabb"), "second": list("bcca"), "preference": [1, 0.5, 0, 0]})
    >>> win_share(pairs).to_dict()
    {'a': 75.0, 'b': 0.0, 'c': 75.0}
    """
    table = PairTable(pairs, "these pictures")
    winner = table.names[table.keys // len(table.names)]
    return 100 * pd.Series(table.shares).groupby(winner).mean()
