"""Manifests of rated pictures, and the rendering of their rows.

A manifest is a CSV (UTF-8, commas, header) with the columns of `MANIFEST_COLUMNS`, all but `NEEDED` optional.
``image`` is a path relative to the set's root. A row with a ``seed`` is rendered: photograph ->
``distort(distortion, level, seed)`` at full size -> crop ``x,y,w,h`` in native pixels (empty = whole).
Several distortions in turn are written ``jitter+jpeg`` at level ``3+4``. A row without a seed is the
picture as it is on disk: its distortion and level, if there, only describe it. ``mos`` is in the set's own
scale, higher is better.

The embedded sets (``sim-…``) are made by `vqr1.data.simulated`: rated by simulated observers, not by people.
"""

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from vqr1.data.comparisons import comparisons_path, names_of, read_pairs
from vqr1.data.folders import pictures_below
from vqr1.data.images import is_address, open_picture, upright_size
from vqr1.data.public_sets import (
    PUBLIC_SETS,
    public_name,
    read_comparisons,
    read_public,
)
from vqr1.data.tables import lacks, meant, read_table
from vqr1.distortions import DISTORTIONS, distort
from vqr1.places import EMBEDDED, data_root

MANIFEST_COLUMNS = (
    "image",
    "dataset",
    "mos",
    "std",
    "reference",
    "distortion",
    "level",
    "seed",
    "crop",
    "split",
)
NEEDED = MANIFEST_COLUMNS[:3]
"""What a manifest must have; the other columns may be missing or empty."""
EXTRA = ("subset",)
"""Columns that only some sets have: groups within which pictures are also compared separately."""
NAME = "name"
"""Column that only some manifests have: what comparisons call the row's picture, where not by its image."""
HELD_OUT = ("motion_blur", "color_saturation_2", "jpeg2000", "multiplicative_noise", "darken", "pixelate")
"""No row that is trained, validated or pretrained on has one of these types."""
TRAINED = tuple(name for name in DISTORTIONS if name not in HELD_OUT)
UNRATED = ("sim-mixed",)
"""Sets rated by dominance between rows: their mos is empty. So may be that of a manifest with comparisons."""
CROP = 192
"""Side of the simulated sets' pictures, px."""
SPAWN_FROM = 64
"""Fewer rows than this are rendered in this process: starting workers would take longer."""

_CROP = re.compile(r"\d+,\d+,\d+,\d+")


# Reading a set


def load_ratings(
    name: str | Path, root: str | Path | None = None, strict: bool | None = None
) -> pd.DataFrame:
    """Return a set's rows: one per rated picture, with the columns `MANIFEST_COLUMNS`.

    name: of an embedded set ("sim-kadid"), of a public one in any spelling ("KADID10k", pyiqa's "livec"), or
        the path of a manifest.
    root: where the images are, by default `data_root` for a public set and the manifest's own folder for a
        path; a public set may be in a folder of its name below it. An embedded set is always in `EMBEDDED`.
    strict: whether a missing picture of a public set is an error; else its row is left out. None: at most
        2% of a set's pictures may be missing (`vqr1.data.public_sets.SPARED`), and a warning counts and
        names them.

    ``frame.attrs["root"]`` keeps the images' folder for `render_rows`. Raises ValueError for an unknown name,
    and whatever `read_manifest` and `read_public` raise.

    >>> rows = load_ratings("sim-kadid")
    >>> len(rows), float(rows["mos"].min()), float(rows["mos"].max())
    (7695, 1.0, 5.0)
    """
    if is_manifest(name):
        return read_manifest(name, root)
    if public := public_name(name):
        frame = read_public(public, Path(root or data_root()), strict)
        return _kept_columns(frame[frame["image"] != ""].reset_index(drop=True))
    known = sorted(path.stem for path in EMBEDDED.glob("sim-*.csv"))
    if name not in known:
        raise ValueError(
            f"unknown set {str(name)!r}; {EMBEDDED} has: {', '.join(known) or 'none'}. Public sets: "
            f"{', '.join(PUBLIC_SETS)}. "
            "Or give a manifest's path, ….csv"
        )
    return read_manifest(EMBEDDED / f"{name}.csv")


def load_comparisons(name: str, root: str | Path | None = None, strict: bool | None = None) -> pd.DataFrame:
    """Return the pairs of pictures that people compared in a set.

    name: "pcuid", the one public set that has them, or the path of a manifest with comparisons beside it
        (`vqr1.data.comparisons`).
    root: as for `load_ratings`.
    strict: as for `load_ratings`; the pairs of a picture that may be missing are left out.

    Columns: first, second (`names_of` the rows: images as in `load_ratings`, or a manifest's own names),
    preference (share of people who prefer the first, a tie counted half) and, if known, votes.
    ``attrs["dataset"]`` keeps the set's name. Raises FileNotFoundError for a manifest without comparisons,
    ValueError for another set without them and for the file's first mistake, and what `load_ratings` raises.
    """
    if is_manifest(name):
        return _manifest_comparisons(Path(name), root)
    if not (public := public_name(name)):
        raise ValueError(f"unknown set {str(name)!r}; public sets: {', '.join(PUBLIC_SETS)}")
    return read_comparisons(public, root or data_root(), strict)


def has_comparisons(name: str | Path) -> bool:
    """Tell whether people compared pictures of a set: `load_comparisons` has its pairs.

    >>> has_comparisons("pcuid"), has_comparisons("kadid-10k"), has_comparisons("missing.csv")
    (True, False, False)
    """
    if is_manifest(name):
        return comparisons_path(name).is_file()
    public = public_name(name)
    return public is not None and PUBLIC_SETS[public].compare is not None


def is_manifest(name: str | Path) -> bool:
    """Tell whether this is the path of a manifest, and no set's name."""
    return str(name).lower().endswith(".csv")


def _manifest_comparisons(path: Path, root: str | Path | None) -> pd.DataFrame:
    file = comparisons_path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; write what people said of the pairs of {path.name} there: "
            "first,second,preference"
        )
    frame = read_manifest(path, root)
    names, datasets = names_of(frame), frame["dataset"].unique()
    again = names[names.duplicated()]
    if len(again):
        raise ValueError(
            f"{path}: two rows are called {again.iloc[0]!r}, so comparisons cannot tell them apart; give "
            f"every row a name of its own in a column {NAME}"
        )
    if len(datasets) > 1:
        raise ValueError(
            f"{path}: comparisons need a manifest of one data set, and this one has {', '.join(datasets)}; "
            "split it"
        )
    pairs = read_pairs(file, set(names))
    pairs.attrs["dataset"] = datasets[0]
    return pairs


def _kept_columns(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[[*MANIFEST_COLUMNS, *(name for name in EXTRA if name in frame)]]


# Reading a manifest


def read_manifest(path: str | Path, root: str | Path | None = None) -> pd.DataFrame:
    """Return a manifest's rows after checking every one of them; columns that are not ours are dropped.

    path: of a CSV; image, dataset and mos are needed, the other `MANIFEST_COLUMNS` may be missing or empty.
        mos may be empty where comparisons are beside it (`vqr1.data.comparisons`).
    root: where the images are, by default the manifest's folder.

    ``./a.png`` becomes ``a.png``. A missing reference becomes the image. No picture may be in two splits,
    nor a reference of one data set. mos and std are floats (NaN = empty). seed is Int64 (<NA> = not
    rendered). level is an integer, or a string ("3+4", "") in a set with composed or undistorted rows. The
    rest are strings ("" = empty). Raises FileNotFoundError when the manifest is missing, and ValueError
    naming file, line (the header is line 1), value and remedy for the first mistake.
    """
    path = Path(path)
    root = Path(root) if root else path.parent
    text = _read_text(path, root)  # index = line in the file
    _check_labels(path, text)
    _check_renders(path, text)
    _check_images(path, text, root)
    _check_splits(path, text, root)
    single = text["level"].str.fullmatch(r"\d").all()
    frame = text.assign(
        mos=pd.to_numeric(text["mos"]).astype(float),
        std=pd.to_numeric(text["std"]).astype(float),
        seed=pd.to_numeric(text["seed"]).astype("Int64"),
        level=text["level"].astype(int) if single else text["level"],
    ).reset_index(drop=True)
    frame.attrs["root"] = str(root)
    return frame


def _read_text(path: Path, root: Path) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such manifest; give the path of a CSV (`vqr1 manifest FOLDER` writes one)"
        )
    text = read_table(path)
    for name in (*MANIFEST_COLUMNS, *EXTRA):
        if name not in text and (name in NEEDED or meant(name, text.columns)):
            known = (
                f"needed are {','.join(NEEDED)}, also known {','.join(MANIFEST_COLUMNS[3:])}; `vqr1 manifest "
                f"FOLDER --ratings {path.name}` fills in what is missing"
            )
            raise ValueError(f"{path}, line 1: {lacks(name, text.columns)}; {known}")
    known = [*MANIFEST_COLUMNS, *(name for name in (*EXTRA, NAME) if name in text)]
    text = text.reindex(columns=known, fill_value="")
    text = text[(text != "").any(axis=1)]  # rows of other columns alone
    if text.empty:
        raise ValueError(f"{path}: no rows after the header; add at least one")
    names = pd.unique(text[["image", "reference"]].to_numpy().ravel())
    short = {name: os.path.normpath(name) if os.path.isfile(root / name) else name for name in names}
    image, reference = text["image"].map(short), text["reference"].map(short)  # a reference may be no path
    text = text.assign(image=image, reference=reference.where(reference != "", image))
    return text.assign(name=text[NAME].where(text[NAME] != "", image)) if NAME in text else text


def _require(path: Path, good: pd.Series, values: pd.Series, problem: str) -> None:
    """Raise for the first line where ``good`` is false; ``problem`` says what is wrong and what to do."""
    if not good.all():
        line = (~good).idxmax()
        raise ValueError(f"{path}, line {line}: {values.name} {values[line]!r} {problem}")


def _check_labels(path: Path, text: pd.DataFrame) -> None:
    for name in ("image", "dataset"):
        _require(path, text[name] != "", text[name], "is empty; every row needs one")
    mos, std = (pd.to_numeric(text[name], errors="coerce") for name in ("mos", "std"))
    unrated = text["dataset"].isin(UNRATED) | comparisons_path(path).is_file()
    rated = np.isfinite(mos) | ((text["mos"] == "") & unrated)
    wanted = (
        "is not a number; give the mean opinion score, or what people said of pairs in "
        f"{comparisons_path(path).name}"
    )
    _require(path, rated, text["mos"], wanted)
    wanted = "is not a number >= 0; give the standard deviation or leave it empty"
    _require(path, (np.isfinite(std) & (std >= 0)) | (text["std"] == ""), text["std"], wanted)
    known = text["split"].isin(["train", "val", "test", ""])
    _require(path, known, text["split"], "is not train, val, test or empty; use one of them")


def _check_renders(path: Path, text: pd.DataFrame) -> None:
    types, levels = text["distortion"].str.split("+"), text["level"].str.split("+")
    known = types.map(lambda parts: parts == [""] or set(parts) <= set(DISTORTIONS)) | (text["seed"] == "")
    wanted = f"is not known; use one of {', '.join(DISTORTIONS)}, several joined by +, or leave it empty"
    _require(path, known, text["distortion"], wanted)
    valid = levels.map(lambda parts: parts == [""] or set(parts) <= set("12345"))
    _require(path, valid, text["level"], "is not one of 1, 2, 3, 4, 5 (several joined by +)")
    paired = (types.map(len) == levels.map(len)) & ((text["distortion"] == "") == (text["level"] == ""))
    _require(path, paired, text["level"], "does not give one level for each distortion of its row")
    seeded = text["seed"].map(lambda seed: seed == "" or (seed.isdecimal() and int(seed) < 2**31))
    wanted = "is not an integer from 0 to 2147483647; leave it empty if the picture is already as rated"
    _require(path, seeded, text["seed"], wanted)


def _check_images(path: Path, text: pd.DataFrame, root: Path) -> None:
    wanted = "is an address; download the pictures first, and give their files"
    _require(path, ~text["image"].map(is_address), text["image"], wanted)
    there = text["image"].map({name: (root / name).is_file() for name in text["image"].unique()})
    wanted = f"is not there below {root}; correct the path, or give the folder of the images as root"
    _require(path, there, text["image"], wanted)
    cropped = text[text["crop"] != ""]
    whole = cropped["crop"].map(lambda crop: bool(_CROP.fullmatch(crop)))
    _require(
        path,
        whole,
        cropped["crop"],
        "is not four integers x,y,w,h; give pixels, or leave it empty for the whole",
    )
    firsts = cropped["image"].drop_duplicates()
    sizes = {name: upright_size(root / name, f"{path}, line {line}") for line, name in firsts.items()}
    inside = [_fits(crop, sizes[name]) for crop, name in zip(cropped["crop"], cropped["image"])]
    wanted = "is empty or reaches outside its picture; x,y,w,h are pixels of the whole photograph"
    _require(path, pd.Series(inside, cropped.index, dtype=bool), cropped["crop"], wanted)


def _check_splits(path: Path, text: pd.DataFrame, root: Path) -> None:
    """Refuse a picture or reference in two splits, and a row given twice; paths to one file are equal."""
    files = {name: os.path.realpath(root / name) for name in text["image"].unique()}
    text = text.assign(file=text["image"].map(files))
    used = text[text["split"] != ""]
    for column, keys in (("image", ["file"]), ("reference", ["dataset", "reference"])):
        groups = used.groupby(keys)
        first = groups["split"].transform("first")
        if (first != used["split"]).any():
            line = (first != used["split"]).idxmax()
            other = groups.get_group(tuple(used.loc[line, keys])).index[0]
            raise ValueError(
                f"{path}, line {line}: {column} {text.at[line, column]!r} is in split "
                f"{text.at[line, 'split']}, "
                f"and in {text.at[other, 'split']} on line {other}: what is learned there would be "
                "tested here; give both rows one split"
            )
    same = ["file", "distortion", "level", "seed", "crop"]
    again = text.duplicated(same)
    if again.any():
        line = again.idxmax()
        other = (text[same] == text.loc[line, same]).all(axis=1).idxmax()
        raise ValueError(
            f"{path}, line {line}: image {text.at[line, 'image']!r} is on line {other} too, "
            "with the same distortion, level, seed and crop; remove one of the two"
        )


def _fits(crop: str, size: tuple[int, int]) -> bool:
    x, y, w, h = map(int, crop.split(","))
    return w > 0 and h > 0 and x + w <= size[0] and y + h <= size[1]


def folder_rows(folder: str | Path) -> pd.DataFrame:
    """Return the pictures of a folder and all below it as unrated manifest rows, by name.

    folder: the path; ``attrs["root"]`` keeps it.

    Raises ValueError where there is no folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder; give the path of one with pictures in it")
    names = [Path(path).relative_to(folder).as_posix() for path in pictures_below(str(folder))]
    if not names:
        raise ValueError(f"{folder} holds no pictures (JPEG, PNG, WebP, …); give another folder")
    frame = pd.DataFrame({"image": names}, columns=MANIFEST_COLUMNS).fillna("")
    frame = frame.assign(mos=np.nan, std=np.nan, seed=pd.NA, reference=names, split="train")
    frame["dataset"] = folder.resolve().name
    frame.attrs["root"] = str(folder)
    return frame


# Pictures


def render(row: pd.Series | dict, root: str | Path | None = None) -> Image.Image:
    """Return the row's picture: photograph, distorted at full size, then cropped; the same every time.

    row: of a frame of `read_manifest`.
    root: the folder of its images, by default `EMBEDDED`.

    Raises ValueError as `open_picture` does, naming the row by its index in the frame.
    """
    where = f"row {row.name} (counted from 0)" if isinstance(row, pd.Series) and row.name is not None else ""
    return _render(dict(row), Path(root or EMBEDDED), where)


def _render(row: dict, root: Path, where: str) -> Image.Image:
    image = open_picture(root / row["image"], where, shrink=False)  # crops are in native pixels
    if row["distortion"] and not pd.isna(row["seed"]):
        steps = zip(row["distortion"].split("+"), str(row["level"]).split("+"), strict=True)
        for place, (name, level) in enumerate(steps):
            image = distort(image, name, int(level), int(row["seed"]) + place)
    if not row["crop"]:
        return image
    x, y, w, h = map(int, row["crop"].split(","))
    return image.crop((x, y, x + w, y + h))


def render_rows(
    frame: pd.DataFrame, root: str | Path | None = None, workers: int | None = None
) -> list[Image.Image]:
    """Return the pictures of all rows, in order.

    frame: rows of `load_ratings`.
    root: the folder of their images, by default the one in ``frame.attrs``, else `EMBEDDED`.
    workers: processes that render, by default one per core; fewer than `SPAWN_FROM` rows, or ``workers=1``,
        are rendered in this process.

    Raises ValueError as `render` does.
    """
    return list(_rendered(frame, root, workers))


def _rendered(
    frame: pd.DataFrame, root: str | Path | None = None, workers: int | None = None
) -> Iterator[Image.Image]:
    root = Path(root or frame.attrs.get("root") or EMBEDDED)
    rows = frame.to_dict("records")
    names = [f"row {label} (counted from 0)" for label in frame.index]
    workers = workers or os.cpu_count() or 1
    if workers == 1 or len(rows) < SPAWN_FROM:
        yield from map(_render, rows, repeat(root), names)
        return
    try:  # spawn: a fork of a process in which torch runs threads can hang
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            rendered = pool.map(_render, rows, repeat(root), names, chunksize=32)
            yield from tqdm(
                rendered, "rendering", len(rows), unit=" pictures", dynamic_ncols=True, leave=False
            )
    except BrokenProcessPool as error:
        raise RuntimeError(
            'worker processes died: put the script\'s calls under `if __name__ == "__main__":`, or '
            "pass workers=1"
        ) from error


class _Images(Sequence):
    """Pictures that are made when they are asked for, by ``read(i)``; the last 64 are remembered."""

    def __init__(self, count: int, read: Callable[[int], Image.Image]):
        self.count, self._read = count, lru_cache(64)(read)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int | slice) -> Image.Image | list[Image.Image]:
        return (
            [self._read(j) for j in range(*i.indices(len(self)))]
            if isinstance(i, slice)
            else self._read(range(self.count)[i])
        )


class LazyImages(_Images):
    """The pictures of rows that are not rendered, each read when it is asked for; the last 64 are remembered.

    A thousand photographs of 12 megapixels would take 36 GB of memory. ``root`` and errors as for
    `render_rows`.
    """

    def __init__(self, frame: pd.DataFrame, root: str | Path | None = None):
        root = Path(root or frame.attrs.get("root") or EMBEDDED)
        super().__init__(len(frame), lambda i: render(frame.iloc[i], root))


class RenderedImages(_Images):
    """The rendered pictures of rows, kept at three bytes a pixel (Pillow takes four).

    Arguments and errors as for `render_rows`.
    """

    def __init__(self, frame: pd.DataFrame, root: str | Path | None = None):
        kept = [(image.mode, image.size, image.tobytes()) for image in _rendered(frame, root)]
        super().__init__(len(kept), lambda i: Image.frombytes(*kept[i]))


def pictures_of(frame: pd.DataFrame) -> Sequence[Image.Image]:
    """Return the rows' pictures: rendered now if one has a seed, else read from disk as they are needed."""
    return RenderedImages(frame) if frame["seed"].notna().any() else LazyImages(frame)


# Rows that nobody need rate


def dominance_pairs(frame: pd.DataFrame) -> np.ndarray:
    """Return (P, 2) row positions (better, worse) of rows whose order needs no ratings.

    Both rows show the same crop of the same photograph with the same types; the worse one's levels are all
    at least as high, and one is higher. Only for types that get worse with every level
    (`vqr1.data.simulated.MIX_STAGES`).

    >>> rows = {"image": "a.jpg", "crop": "", "distortion": "jitter+jpeg", "level": ["1+2", "1+4", "3+1"]}
    >>> dominance_pairs(pd.DataFrame(rows)).tolist()
    [[0, 1]]
    """
    groups = frame.groupby(["image", "crop", "distortion"], sort=False).indices.values()
    pairs = [rows[_dominates(frame["level"].iloc[rows])] for rows in groups]
    return np.concatenate([np.empty((0, 2), int), *pairs])


def _dominates(level: pd.Series) -> np.ndarray:
    levels = np.array([[int(part) for part in str(text).split("+")] for text in level])  # (rows, components)
    no_worse = (levels[:, None] <= levels[None, :]).all(2)
    return np.argwhere(no_worse & (levels[:, None] < levels[None, :]).any(2))  # (P, 2)
