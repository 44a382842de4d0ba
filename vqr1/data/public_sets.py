"""Read public image quality data sets from their published annotation into a manifest's columns.

An entry of `PUBLIC_SETS` says where a set can be had, what its files look like and what its numbers mean;
a short function reads its table. All sets pass the same checks: every mos is a number on the published
scale, every picture is there once, and higher is better where the file itself shows it. Sizes are those of
the archives in the Hub's chaofengc/IQA-PyTorch-Datasets. Three sets are a git clone away and were read
whole: biq2021, srij, pcuid (`vqr1.data.people_sets`). No other real set was read when this was written: the
tests make small ones in the official layout.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vqr1.data.people_sets import read_biq2021, read_pcuid, read_pcuid_pairs, read_srij
from vqr1.data.tables import (
    csv_columns,
    excel_columns,
    matlab_array,
    name_parts,
    normalise,
    require,
    text_columns,
)
from vqr1.distortions import DISTORTIONS

SPLITS = ("train", "val", "test")
SPLIT_SEED = 0
SPARED = 0.02
"""Share of a public set's pictures that may be missing unasked: some are too large to be fetched."""
TYPES = list(DISTORTIONS)  # in KADID-10k's order


@dataclass(frozen=True)
class PublicSet:
    """What is known of a set.

    files: patterns of its annotation below the set's folder; the first that matches is read.
    folders: of its pictures, in order of preference.
    scale: of the file's numbers, before ``flip``.
    """

    title: str
    rows: int
    source: str
    size: str
    licence: str
    files: tuple[str, ...]
    folders: tuple[str, ...]
    scale: tuple[float, float]
    note: str
    read: Callable[[list[Path]], pd.DataFrame]
    flip: float | None = None
    std_factor: float = 1.0
    variance: bool = False
    split: str = "seeded"  # by scene or reference; "official": the file's own; "test": nothing to train on
    per_content: bool = False
    compare: Callable[[Path], pd.DataFrame] | None = None  # folder -> where, first, second, preference

    @property
    def layout(self) -> str:
        """What the set's folder should hold, for messages."""
        folders = [
            {"": "this folder itself", "**": "any folder"}.get(folder, f"{folder}/")
            for folder in self.folders
        ]
        return f"{' or '.join(self.files)}, and the pictures in {' or '.join(folders)}"


# Readers: each returns strings in columns where (file and line), name, mos, reference and perhaps std,
# split, level, …


def _kadid(files: list[Path]) -> pd.DataFrame:
    table = csv_columns(files[0], name="dist_img", reference="ref_img", mos="dmos", std="var")
    parts = name_parts(table, r"^I\d\d_(?P<type>0[1-9]|1\d|2[0-5])_0(?P<level>[1-5])\.png$", "I01_01_01.png")
    return table.assign(
        distortion=[TYPES[int(number) - 1] for number in parts["type"]],
        level=parts["level"],
        severity=parts["level"],
    )


def _tid(files: list[Path]) -> pd.DataFrame:
    table, std = (
        text_columns(files[0], ("mos", "name")),
        text_columns(files[0].with_name("mos_std.txt"), ("std",)),
    )
    if len(table) != len(std):
        raise ValueError(
            f"{files[0]} has {len(table)} rows, mos_std.txt {len(std)}: they must be in the same "
            "order, one to one"
        )
    parts = name_parts(table, r"^I(?P<reference>\d\d)_\d\d_(?P<severity>[1-5])\.bmp$", "I01_01_1.bmp")
    return table.assign(std=std["std"], reference="I" + parts["reference"], severity=parts["severity"])


def _koniq(files: list[Path]) -> pd.DataFrame:
    columns = {"name": "image_name", "std": "SD", "mos": "MOS_zscore"}
    if (
        "sets" in files[0].name
    ):  # its column MOS is 0..100; the MOS of the other file is the mean of the votes 1..5
        columns |= {"mos": "MOS", "split": "set"}
    table = csv_columns(files[0], **columns)
    return table.replace({"split": {"training": "train", "validation": "val"}})


def _spaq(files: list[Path]) -> pd.DataFrame:
    return excel_columns(files[0], 0, 1, name="Image name", mos="MOS")


def _clive(files: list[Path]) -> pd.DataFrame:
    """Leave out the 7 pictures that observers were trained on (t1.bmp …), as everybody does."""
    names, mos, std = (
        matlab_array(files[0].with_name(f"{name}.mat"), name)
        for name in ("AllImages_release", "AllMOS_release", "AllStdDev_release")
    )
    if not len(names) == len(mos) == len(std):
        raise ValueError(
            f"{files[0].parent}: {len(names)} names, {len(mos)} MOS and {len(std)} deviations; the "
            "three files must agree"
        )
    where = [f"{files[0].parent}, entry {n}" for n in range(1, len(names) + 1)]
    table = pd.DataFrame(
        {"where": where, "name": [str(np.ravel(name)[0]) for name in names], "mos": mos, "std": std},
        dtype=object,
    )
    return table[~table["name"].str.fullmatch(r"t\d+\.\w+")].reset_index(drop=True)


def _bid(files: list[Path]) -> pd.DataFrame:
    table = excel_columns(files[0], 0, 1, name="Image Number", mos="Average Subjective Grade", std="std")
    require(table["name"].str.fullmatch(r"\d+(\.0)?"), table, "name", "is not an image number")
    return table.assign(name=[f"DatabaseImage{int(float(number)):04d}.JPG" for number in table["name"]])


def _pipal(files: list[Path]) -> pd.DataFrame:
    table = pd.concat([text_columns(file, ("name", "mos"), ",") for file in files], ignore_index=True)
    return table.assign(reference=table["name"].str.partition("_")[0])


CSIQ_FILES = {
    "noise": "AWGN",
    "blur": "BLUR",
    "contrast": "contrast",
    "fnoise": "fnoise",
    "jpeg": "JPEG",
    "jpeg 2000": "jpeg2000",
}
"""CSIQ's dst_type -> how its pictures are named: 1600.AWGN.1.png."""


def _csiq(files: list[Path]) -> pd.DataFrame:
    table = excel_columns(
        files[0],
        "all_by_image",
        4,
        image="image",
        type="dst_type",
        level="dst_lev",
        mos="dmos",
        std="dmos_std",
    )
    require(table["type"].isin(CSIQ_FILES), table, "type", f"is not one of {', '.join(CSIQ_FILES)}")
    image, level = (
        table[name].str.removesuffix(".0") for name in ("image", "level")
    )  # Excel's numbers: 1600 is a name here
    name = image + "." + table["type"].map(CSIQ_FILES) + "." + level + ".png"
    return table.drop(columns="level").assign(name=name, reference=image, severity=level)


def _official_list(files: list[Path]) -> pd.DataFrame:
    return text_columns(files[0], ("reference", "name", "mos"))


def _sriqa(files: list[Path]) -> pd.DataFrame:
    return pd.concat(
        [text_columns(file, ("name", "mos"), ",").assign(reference=file.stem) for file in files],
        ignore_index=True,
    )


def _agiqa(files: list[Path]) -> pd.DataFrame:
    return csv_columns(files[0], name="name", reference="prompt", mos="mos_quality", std="std_quality")


PUBLIC_SETS = {
    "kadid-10k": PublicSet(
        "KADID-10k (Lin, Hosu and Saupe 2019)",
        10125,
        "database.mmsp-kn.de/kadid-10k-database.html",
        "3.07 GB",
        "unknown",
        ("dmos.csv",),
        ("images",),
        (1, 5),
        read=_kadid,
        variance=True,
        note="the column dmos is a mean opinion, higher is better, in spite of its name: kept; var "
        "is a variance: std is its root",
    ),
    "tid2013": PublicSet(
        "TID2013 (Ponomarenko et al. 2015)",
        3000,
        "www.ponomarenko.info/tid2013.htm",
        "1.23 GB",
        "unknown",
        ("mos_with_names.txt",),
        ("distorted_images",),
        (0, 9),
        read=_tid,
        note="std from mos_std.txt, same order; upper and lower case of names are mixed on disk",
    ),
    "koniq-10k": PublicSet(
        "KonIQ-10k (Hosu et al. 2020)",
        10073,
        "database.mmsp-kn.de/koniq-10k-database.html; the sets file: github.com/subpic/koniq, metadata/",
        "6.35 GB",
        "unknown",
        (
            "koniq10k_distributions_sets.csv",
            "metadata/koniq10k_distributions_sets.csv",
            "koniq10k_scores_and_distributions.csv",
            "koniq10k_scores_and_distributions/koniq10k_scores_and_distributions.csv",
        ),
        ("1024x768", "512x384"),
        (0, 100),
        read=_koniq,
        std_factor=25.0,
        split="official",
        note="official split, in the sets file alone; MOS is 0..100 but SD is of the votes 1..5: std "
        "is 25 SD",
    ),
    "spaq": PublicSet(
        "SPAQ (Fang et al. 2020)",
        11125,
        "github.com/h4nwei/SPAQ",
        "34.8 GB",
        "unknown",
        ("Annotations/MOS and Image attribute scores.xlsx", "MOS and Image attribute scores.xlsx"),
        ("TestImage",),
        (0, 100),
        read=_spaq,
        note="no std in the sheet; native pictures are scored, of up to 12 million pixels and more "
        "(pyiqa resizes them to 448)",
    ),
    "clive": PublicSet(
        "LIVE In the Wild Image Quality Challenge (Ghadiyaram and Bovik 2016)",
        1162,
        "live.ece.utexas.edu/research/ChallengeDB",
        "326 MB",
        "free use, copying and changes with its copyright notice (its README)",
        ("Data/AllImages_release.mat",),
        ("Images",),
        (0, 100),
        read=_clive,
        note="the 7 training pictures t1..t7 are left out",
    ),
    "bid": PublicSet(
        "BID, blurred images (Ciancio et al. 2011)",
        586,
        "unknown",
        "unknown",
        "unknown",
        ("DatabaseGrades.xlsx",),
        ("ImageDatabase", ""),
        (0, 5),
        read=_bid,
        note="picture n is DatabaseImage000n.JPG",
    ),
    "pipal": PublicSet(
        "PIPAL (Gu et al. 2020)",
        23200,
        "github.com/HaomingCai/PIPAL-dataset",
        "5.84 GB",
        "unknown",
        ("Train_Label/*.txt",),
        ("Train_Dist", "Distortion_*", "Dist_Imgs"),
        (0, 3000),
        read=_pipal,
        note="Elo ratings, seen 916.7..1836.0; only the official training part has public labels: "
        "its 200 references are split here",
    ),
    "csiq": PublicSet(
        "CSIQ (Larson and Chandler 2010)",
        866,
        "s2.smu.edu/~eclarson/csiq.html",
        "379 MB",
        "unknown",
        ("csiq.DMOS.xlsx",),
        ("dst_imgs/*", "dst_imgs_all", "dst_imgs"),
        (0, 1),
        read=_csiq,
        flip=1.0,
        note="DMOS, lower is better in the file: flipped, mos = 1 - dmos",
    ),
    "liu13": PublicSet(
        "Liu13, deblurring (Liu et al. 2013)",
        1199,
        "pictures: unknown; list: github.com/TianheWu/VisualQuality-R1, datasets/test_data_label/",
        "unknown",
        "unknown",
        ("Deblur*.txt",),
        ("**",),
        (1, 5),
        read=_official_list,
        split="test",
        note="lines 'reference name mos' of the official VisualQuality-R1 repository, already "
        "brought to 1..5; no std",
    ),
    "min19": PublicSet(
        "Min19 (SHRQ), dehazing (Min et al. 2019)",
        600,
        "pictures: unknown; list: github.com/TianheWu/VisualQuality-R1, datasets/test_data_label/",
        "unknown",
        "unknown",
        ("Dehaz*.txt",),
        ("**",),
        (1, 5),
        read=_official_list,
        split="test",
        note="lines 'reference name mos' of the official VisualQuality-R1 repository, already "
        "brought to 1..5; no std",
    ),
    "sriqa-bench": PublicSet(
        "SRIQA-Bench, super-resolution (Chen et al. 2025)",
        1100,
        "github.com/ChrisDud0257/AFINE",
        "unknown",
        "non-commercial academic research only",
        ("MOS/*.txt",),
        ("images/*",),
        (0, 100),
        read=_sriqa,
        split="test",
        per_content=True,
        note="scaled to 0..100 within each content's 11 pictures: evaluated per content, never pooled",
    ),
    "agiqa-3k": PublicSet(
        "AGIQA-3K, generated pictures (Li et al. 2023)",
        2982,
        "github.com/lcysyzxdxc/AGIQA-3k-Database",
        "98 MB",
        "MIT (its repository)",
        ("data.csv",),
        ("", "AGIQA-3K", "images", "image"),
        (0, 5),
        read=_agiqa,
        note="mos_quality, not mos_align; split by prompt",
    ),
    "biq2021": PublicSet(
        "BIQ2021, authentic photographs (Ahmed and Asif 2022)",
        12000,
        "git clone --depth 1 https://github.com/nisarahmedrana/BIQ2021",
        "420 MB",
        'none stated; "freely available for use and benchmarking" (the paper), redistribution not granted',
        ("Test (Images and MOS).csv",),
        ("Images",),
        (0, 1),
        read=read_biq2021,
        split="official",
        note="official split without 208 test pictures that have a near twin in training "
        "(data/biq2021_twins.csv); a validation part comes from training, twins together; no std",
    ),
    "srij": PublicSet(
        "SRIJ, super-resolution (Beron et al. 2020)",
        640,
        "git clone --depth 1 https://github.com/juanpaberon/IQA_SR SRIJ",
        "161 MB",
        "none stated; its README asks to contact the author; redistribution not granted",
        ("Datasets/SRIJ/hScoresSRIJ.mat",),
        ("Datasets/SRIJ/Images", "Datasets/SRIJ/Images/GroundTruth"),
        (0, 100),
        read=read_srij,
        note="grey; 608 published scores, checked against 43 observers' votes, which also score the 32 "
        "originals (level empty) and give std; distortion is the algorithm, level its scale; split by "
        "scene",
    ),
    "pcuid": PublicSet(
        "PCUID, underwater photographs compared in pairs",
        300,
        "git clone --depth 1 https://github.com/JOU-UIP/PCUID",
        "75 MB",
        "none stated; use it locally, do not redistribute",
        ("MOS.xlsx",),
        ("300-*",),
        (0, 100),
        read=read_pcuid,
        compare=read_pcuid_pairs,
        note="mos is the share of wins over all others, checked against pair_label.xlsx; load_comparisons "
        "returns the 44,850 pairs; no std",
    ),
}
"""The public sets by their names, as `vqr1 data --list` prints them."""
PYIQA_NAMES = {"livec": "clive"}
"""pyiqa's name of a set, where it differs from ours by more than case and punctuation."""
PER_CONTENT = tuple(name for name, entry in PUBLIC_SETS.items() if entry.per_content)


# What all sets go through


def read_public(name: str, root: str | Path, strict: bool | None = None) -> pd.DataFrame:
    """Return a public set's rows: the columns of a manifest that it has, and an empty string for the rest.

    name: of `PUBLIC_SETS`.
    root: the set's folder, or one that has it under its name (case and punctuation do not matter: KADID10k).
    strict: whether a missing picture is an error (None: if more than `SPARED` are missing); the row of one
        that is not has no image.

    mos is on the published scale, higher is better. Lists ``splits/{train,val,test}.txt`` in the set's
    folder, a picture's name on every line (as in the official VisualQuality-R1 repository), override the
    split made here: 6:2:2 by reference, seeded. For KADID-10k that is the paper's 49/16/16 references,
    though not the same ones. ``frame.attrs`` keeps root and the names of missing pictures. Raises
    FileNotFoundError and ValueError naming file, line, value and the expected layout.
    """
    entry, folder = PUBLIC_SETS[name], find_folder(name, root)
    files = next(found for pattern in entry.files if (found := _found(folder, pattern)))
    table = entry.read(files)
    if table.empty:
        raise ValueError(f"{files[0]}: no rows; expected {entry.layout}")
    table = _checked(entry, table)
    images = _located(entry, folder, table["name"])
    missing = _missing(name, folder, table["name"], images, strict)
    frame = table.assign(
        dataset=name,
        image=images,
        split=_split(entry, folder, table),
        seed=pd.Series(pd.NA, table.index, "Int64"),
        crop="",
    )
    frame = frame.assign(**{column: "" for column in ("distortion", "level") if column not in frame})
    if (frame["level"] != "").all():
        frame["level"] = frame["level"].astype(int)
    frame.attrs |= {"root": str(folder), "missing": missing}
    return frame


def read_comparisons(name: str, root: str | Path, strict: bool | None = None) -> pd.DataFrame:
    """Return the pairs of pictures that people compared in a public set.

    name: of `PUBLIC_SETS`.
    root: as for `read_public`.
    strict: as for `read_public`; the pairs of a picture that may be missing are left out.

    Columns: first, second (paths below ``attrs["root"]``) and preference: 1 if the first looks better, 0.5
    for a tie, else 0. Raises ValueError for a set without comparisons, and what `read_public` raises.
    """
    entry, folder = PUBLIC_SETS[name], find_folder(name, root)
    if entry.compare is None:
        having = ", ".join(known for known, one in PUBLIC_SETS.items() if one.compare)
        raise ValueError(f"{name} has no comparisons; sets that have: {having}")
    table = entry.compare(folder)
    names = pd.Series(pd.unique(pd.concat([table["first"], table["second"]])))
    images = _located(entry, folder, names)
    missing = _missing(name, folder, names, images, strict)
    sides = table[["first", "second"]].apply(lambda side: side.map(dict(zip(names, images))))
    frame = sides.assign(preference=table["preference"])[(sides != "").all(axis=1)].reset_index(drop=True)
    frame.attrs |= {"root": str(folder), "missing": missing, "dataset": name}
    return frame


def _missing(name: str, folder: Path, names: pd.Series, images: pd.Series, strict: bool | None) -> list[str]:
    """Return the names of pictures that are not there, if so many may be missing.

    A few that nobody spoke of (``strict`` None) are warned of. Raises FileNotFoundError for too many.
    """
    missing = names[images == ""].tolist()
    if not missing or strict is False:
        return missing
    count, shown = f"{len(missing)} of {len(names)}", ", ".join(missing[:3])
    what = f"{folder}: {count} pictures of {name} are missing, first {shown}"
    if strict or len(missing) > SPARED * len(names):
        raise FileNotFoundError(f"{what}; expected {PUBLIC_SETS[name].layout}")
    warnings.warn(f"{what}; all is done without them", stacklevel=3)
    return missing


def public_name(name: str | Path) -> str | None:
    """Return our name of a public set given in any case and punctuation, or as pyiqa's; None if unknown.

    >>> public_name("KADID10k"), public_name("livec"), public_name("sim-kadid")
    ('kadid-10k', 'clive', None)
    """
    known = {normalise(known): known for known in PUBLIC_SETS} | PYIQA_NAMES
    return known.get(normalise(str(name)))


def find_folder(name: str, root: str | Path) -> Path:
    """Return the folder with a set's annotation: one below ``root`` that has its name, else ``root``."""
    root, entry = Path(root), PUBLIC_SETS[name]
    inside = sorted(root.iterdir()) if root.is_dir() else []
    for folder in [*(path for path in inside if path.is_dir() and public_name(path.name) == name), root]:
        if any(_found(folder, pattern) for pattern in entry.files):
            return folder
    raise FileNotFoundError(
        f"{name} is neither in {root} nor in a folder {name} of it; expected {entry.layout}. It can "
        f"be had from: {entry.source}"
    )


def _found(folder: Path, pattern: str) -> list[Path]:
    """Return what matches a pattern below a folder, sorted, ignoring case."""
    either = re.sub("[A-Za-z]", lambda letter: f"[{letter[0].lower()}{letter[0].upper()}]", pattern)
    return sorted(folder.glob(either))


def _checked(entry: PublicSet, table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with checked numbers, higher mos better.

    A mos may lie 1e-6 outside its scale, from rounding: SRIQA-Bench has 100.00000000000001. It is kept.
    """
    (low, high), mos = entry.scale, pd.to_numeric(table["mos"], errors="coerce")
    require(
        mos.between(low - 1e-6, high + 1e-6),
        table,
        "mos",
        f"is not a number from {low} to {high}, the published scale",
    )
    raw = table.get("std", pd.Series("", table.index)).astype(str)
    std = pd.to_numeric(raw, errors="coerce").astype(float)
    require((np.isfinite(std) & (std >= 0)) | (raw == ""), table, "std", "is not a number >= 0")
    require(~table["name"].str.lower().duplicated(), table, "name", "is there twice")
    std = (np.sqrt(std) if entry.variance else std) * entry.std_factor
    mos = (mos if entry.flip is None else entry.flip - mos).astype(float)
    if "severity" in table:
        by_severity = mos.groupby(table["severity"].astype(int)).mean()
        if by_severity.iloc[0] < by_severity.iloc[-1]:
            raise ValueError(
                f"{table['where'][0].rpartition(',')[0]}: the strongest distortions have the best "
                f"scores, {by_severity.iloc[-1]:.3g} after "
                f"{by_severity.iloc[0]:.3g}: the numbers run the wrong way. {entry.note}"
            )
    return table.assign(mos=mos, std=std, reference=table.get("reference", table["name"]))


def _located(entry: PublicSet, folder: Path, names: Iterable[str]) -> pd.Series:
    """Return each picture's path below the set's folder, ignoring case; "" if it is missing."""
    there: list[dict[str, list[str]]] = []
    for pattern in entry.folders:
        files = [
            file
            for inner in (_found(folder, pattern) if pattern else [folder])
            if inner.is_dir()
            for file in inner.iterdir()
        ]
        there.append({})
        for file in files:
            there[-1].setdefault(file.name.lower(), []).append(file.relative_to(folder).as_posix())
    return pd.Series([_one_of(there, name.lower(), folder) for name in names], dtype=object)


def _one_of(there: list[dict[str, list[str]]], name: str, folder: Path) -> str:
    for files in there:
        found = [
            path for path in files.get(name.rpartition("/")[2], []) if f"/{path.lower()}".endswith(f"/{name}")
        ]
        if len(found) > 1:
            raise ValueError(f"{folder}: which is the picture {name}: {' or '.join(found)}? Keep one of them")
        if found:
            return found[0]
    return ""


def _split(entry: PublicSet, folder: Path, table: pd.DataFrame) -> pd.Series:
    lists = [folder / "splits" / f"{split}.txt" for split in SPLITS]
    if any(path.is_file() for path in lists):
        return _listed_split(lists, table)
    if entry.split == "seeded":
        return seeded_split(table.get("scene", table["reference"]))
    split = table.get("split", pd.Series("test" if entry.split == "test" else "", table.index))
    require(split.isin([*SPLITS, ""]), table, "split", "is not training, validation or test")
    return split


def seeded_split(reference: pd.Series, seed: int = SPLIT_SEED) -> pd.Series:
    """Return train, val or test for each row: 6:2:2 by reference, no reference in two.

    Of 6 references or more, val and test have at least 2 each.

    >>> kadid = pd.Series([f"I{n:02d}.png" for n in range(1, 82)])
    >>> seeded_split(kadid).value_counts().tolist()
    [49, 16, 16]
    """
    names = np.random.default_rng(seed).permutation(sorted(set(reference)))
    fifth = max(round(0.2 * len(names)), min(2, len(names) // 3))
    of = (
        dict.fromkeys(names, "train")
        | dict.fromkeys(names[:fifth], "test")
        | dict.fromkeys(names[fifth : 2 * fifth], "val")
    )
    return reference.map(of)


def _listed_split(lists: list[Path], table: pd.DataFrame) -> pd.Series:
    """Return the split that lists give, "" for unlisted pictures; a line may hold more than the name."""
    of: dict[str, str] = {}
    known = set(table["name"].str.lower())
    for path, split in zip(lists, SPLITS):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; the split needs train.txt, val.txt and test.txt")
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            named = {field for field in re.split(r"[\s,]+", line.lower()) if field in known}
            if line.strip() and (len(named) != 1 or named & set(of)):
                raise ValueError(
                    f"{path}, line {number}: {line.strip()!r} does not name one picture of the set "
                    "that no earlier line has"
                )
            of |= dict.fromkeys(named, split)
    split = table["name"].str.lower().map(of).fillna("")
    mixed = split[split != ""].groupby(table["reference"]).nunique()
    if (mixed > 1).any():
        raise ValueError(
            f"{lists[0].parent}: reference {mixed.idxmax()!r} is in more than one of train.txt, "
            "val.txt and test.txt"
        )
    return split
