"""A manifest of your own rated pictures, made from a folder and the ratings as people keep them.

from vqr1.data.own import write_manifest

print(write_manifest("holiday"))    # reads holiday/ratings.csv, writes holiday/manifest.csv
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from vqr1.data.manifests import folder_rows
from vqr1.data.public_sets import SPLITS, seeded_split
from vqr1.data.tables import csv_columns, normalise, read_table, require

COLUMNS = {
    "image": ("image", "filename", "file", "name", "picture", "path", "image_name"),
    "mos": ("mos", "rating", "score"),
    "dataset": ("dataset",),
    "reference": ("reference",),
    "split": ("split",),
}
"""A manifest's column -> what tables of ratings call it, in any case; the first that is there is taken."""
SHOWN = 20
"""Most pictures without a rating that are named one by one."""
LEAST = 2
"""Fewest pictures of a split: one has no order to learn or to measure."""


def write_manifest(
    folder: str | Path, ratings: str | Path | None = None, path: str | Path | None = None
) -> str:
    """Write the manifest of a folder's rated pictures; return, as text, what was taken and what was left out.

    Missing columns are filled in: the dataset is the folder's name, the reference the picture itself, and
    the split is drawn by reference, 6:2:2, always in the same way.

    Args:
        folder: the pictures are in it and below it.
        ratings: CSV with a column for the picture and one for its rating, see `COLUMNS`; default
            ratings.csv in the folder. A picture's ending and folders may be missing, and its case may differ.
        path: of the manifest, default manifest.csv in the folder.

    Raises:
        FileNotFoundError: the ratings are missing.
        FileExistsError: the manifest is there already.
        ValueError: for the first rating without a picture, picture with two ratings, or rating that is no
            number (it names file, line, value and remedy), and for too few pictures to split.
    """
    folder = Path(folder)
    ratings, path = Path(ratings or folder / "ratings.csv"), Path(path or folder / "manifest.csv")
    if path.exists():
        raise FileExistsError(f"{path} is there already; delete it, or give another --out")
    pictures = folder_rows(folder)["image"].tolist()
    if not ratings.is_file():
        raise FileNotFoundError(
            f"{ratings} is missing; write a CSV with the columns image and rating there, or say by --ratings "
            "where it is"
        )
    taken = _taken(ratings)
    rated = _rated(ratings, taken, pictures, folder)
    rows = _filled(ratings, rated, folder)
    unrated = sorted(set(pictures) - set(rows["image"]))
    there = Path(os.path.relpath(folder, path.parent))
    for column in ("image", "reference"):
        named = rows[column].isin(pictures)
        rows[column] = rows[column].mask(named, [(there / name).as_posix() for name in rows[column]])
    columns = ["image", "dataset", "mos", "split"]
    columns += [] if (rows["reference"] == rows["image"]).all() else ["reference"]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows[columns].to_csv(path, index=False, lineterminator="\n", encoding="utf-8")
    return _told(path, rows, taken, unrated)


def _taken(ratings: Path) -> dict[str, str]:
    """Return the manifest's columns that the ratings have, and what they are called there."""
    header = {normalise(name): name.strip() for name in read_table(ratings).columns}
    found = {
        ours: [header[normalise(name)] for name in names if normalise(name) in header]
        for ours, names in COLUMNS.items()
    }
    for ours, what in (("image", "the picture"), ("mos", "its rating")):
        if not found[ours]:
            raise ValueError(
                f"{ratings}, line 1: no column for {what} in the header {', '.join(header.values())}; "
                f"call it one of {', '.join(COLUMNS[ours])}"
            )
    return {ours: names[0] for ours, names in found.items() if names}


def _rated(ratings: Path, taken: dict[str, str], pictures: list[str], folder: Path) -> pd.DataFrame:
    """Return the rows with a rating: columns of `taken` and where; image is one of the pictures."""
    table = csv_columns(ratings, **taken)
    table = table[table["mos"] != ""].reset_index(drop=True)
    if table.empty:
        raise ValueError(f"{ratings}: no row has a rating; rate at least {3 * LEAST} pictures")
    mos, theirs = pd.to_numeric(table["mos"], errors="coerce"), table.rename(columns=taken)
    wanted = "is not a number; write it with a point, or leave it empty for a picture without a rating"
    require(np.isfinite(mos), theirs, taken["mos"], wanted)
    find = _finder(pictures)
    found = table["image"].map(find)
    wanted = f"is no picture in {folder}; correct the name, or take the row out"
    require(found.map(len) > 0, theirs, taken["image"], wanted)
    for row in np.flatnonzero(found.map(len) > 1)[:1]:
        wanted = f"may be {' or '.join(found[row])}; write which"
        require(found.map(len) == 1, theirs, taken["image"], wanted)
    image = found.str[0]
    for row in np.flatnonzero(image.duplicated())[:1]:
        other = table["where"][(image == image[row]).idxmax()].rpartition(", ")[2]
        wanted = f"has a rating on {other} too; keep one row, with the mean of the two"
        require(~image.duplicated(), theirs, taken["image"], wanted)
    if "reference" in table:  # the original's own row may leave it empty, and then has its own name
        own = [find(name) if name else [] for name in table["reference"]]
        names = zip(table["reference"], own, strict=True)
        table["reference"] = [found[0] if len(found) == 1 else name for name, found in names]
    return table.assign(image=image, mos=mos)


def _finder(pictures: list[str]) -> Callable[[str], list[str]]:
    """Return a function: a name as written -> the pictures that it may mean.

    >>> find = _finder(["beach.jpg", "day1/Market.JPG", "day2/market.jpg"])
    >>> find("Beach"), find(r"C:\\photos\\day1\\market.jpg"), find("market"), find("sea")
    (['beach.jpg'], ['day1/Market.JPG'], ['day1/Market.JPG', 'day2/market.jpg'], [])
    """
    places: dict[str, list[str]] = {}
    for picture in pictures:
        name = picture.rpartition("/")[2].casefold()
        for key in {name, os.path.splitext(name)[0]}:
            places.setdefault(key, []).append(picture)

    def find(written: str) -> list[str]:
        parts = [part for part in written.replace("\\", "/").split("/") if part not in ("", ".")]
        *folders, name = [part.casefold() for part in parts] or [""]
        near = [picture for picture in places.get(name, []) if _agree(folders, picture)]
        exact = "/".join(parts)
        low = exact.casefold()
        for same in (  # the whole path as written, in any case, without its ending
            [picture for picture in near if picture == exact],
            [picture for picture in near if picture.casefold() == low],
            [picture for picture in near if os.path.splitext(picture)[0].casefold() == low],
        ):
            if len(same) == 1:
                return same
        return near

    return find


def _agree(folders: list[str], picture: str) -> bool:
    """Tell whether the folders in front of a name are the last of the picture's folders, or the other way."""
    own = picture.casefold().split("/")[:-1]
    shared = min(len(folders), len(own))
    return folders[len(folders) - shared :] == own[len(own) - shared :]


def _filled(ratings: Path, rated: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Return the rows with dataset, reference and split, given or filled in."""
    blank = pd.Series("", rated.index)
    dataset, reference, given = (rated.get(name, blank) for name in ("dataset", "reference", "split"))
    reference = reference.where(reference != "", rated["image"])
    rows = rated.assign(dataset=dataset.where(dataset != "", folder.resolve().name), reference=reference)
    rows = rows.assign(split=given)
    require(given.isin([*SPLITS, ""]), rows, "split", "is not train, val or test; leave it empty to draw one")
    first = given.where(given != "").groupby(reference).transform("first")
    wanted = "is not that of another picture with the same reference; give both one split"
    require((given == "") | (given == first), rows, "split", wanted)
    rows = rows.assign(split=first.fillna(seeded_split(reference)))
    for split in SPLITS:
        count = int((rows["split"] == split).sum())
        if count < LEAST:
            raise ValueError(
                f"{ratings}: {len(rows)} rated pictures of {reference.nunique()} references leave {count} "
                f"for {split}, which needs {LEAST}; rate at least {3 * LEAST} pictures of as many references"
            )
    return rows


def _told(path: Path, rows: pd.DataFrame, taken: dict[str, str], unrated: list[str]) -> str:
    counts = ", ".join(f"{split} {(rows['split'] == split).sum()}" for split in SPLITS)
    columns = ", ".join(f"{ours} from {theirs!r}" for ours, theirs in taken.items())
    left = [f"left out    {name}: no rating" for name in unrated[:SHOWN]]
    left += [f"left out    {len(unrated) - SHOWN} more without a rating"] if len(unrated) > SHOWN else []
    lines = [
        f"{path}: {len(rows)} pictures",
        f"columns     {columns}",
        f"mos         {rows['mos'].min():.4g} to {rows['mos'].max():.4g}, higher is better",
        f"splits      {counts}",
    ]
    return "\n".join([*lines, *left])
