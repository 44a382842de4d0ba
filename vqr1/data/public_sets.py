"""The public image quality data sets, read from their annotation files as published, into a manifest's
columns.

One entry of `SETS` says where a set can be had, what its files look like and what its numbers mean; one
short function reads its table. What is checked afterwards is the same for all: every mos is a number on the
published scale, every picture is there once, higher is better where the file itself shows it. Sizes are
those of the archives of the Hub's chaofengc/IQA-PyTorch-Datasets. Three sets are a git clone away, and were
read whole: biq2021, srij, pcuid. No other real set was read when this was written: the tests make small
ones in the official layout.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from vqr1.data.people_sets import screened_scores, win_share, without_twins
from vqr1.distortions import DISTORTIONS

SPLITS = ("train", "val", "test")
SPLIT_SEED = 0
TYPES = list(DISTORTIONS)  # in KADID-10k's order


@dataclass(frozen=True)
class PublicSet:
    """What is known of a set. ``files``: its annotation, patterns below the set's folder, the first that is
    there; ``folders``: of its pictures, in order of preference; ``scale``: of the file's numbers, before
    ``flip`` - mos.
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


# Tables: every reader returns strings in columns where (file and line), name, mos, reference and perhaps std,
# split, level, …


def _present(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it belongs to the annotation")


def _lines(path: Path, fields: tuple[str, ...], separator: str | None = None) -> pd.DataFrame:
    """Return a text file without a header: one row per line, split at ``separator`` (None: white space)."""
    _present(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from error
    rows = [
        (f"{path}, line {n}", *map(str.strip, line.split(separator)))
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]
    for where, *values in rows:
        if len(values) != len(fields):
            raise ValueError(
                f"{where}: {len(values)} fields; expected {len(fields)}: {(separator or ' ').join(fields)}, no header"
            )
    return pd.DataFrame(rows, columns=["where", *fields], dtype=object)


def read_table(path: Path) -> pd.DataFrame:
    """Return a CSV's cells as stripped strings under its header as it stands; the index is the line in the
    file.

    Separated by commas, in UTF-8. Blank lines are dropped, and so are columns without a name, which a comma
    at the end of each line makes. Raises ValueError naming file and line for another separator, for a
    column that is there twice, and for a row with more fields than names.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            records = list(_records(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV in UTF-8 with a header ({error}); save it as one") from error
    if not records:
        raise ValueError(f"{path}: not a CSV in UTF-8 with a header (it is empty); save it as one")
    (line, names), *rows = records
    named = [name for name in names if name.strip()]
    for separator, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(named) == 1 and separator in named[0]:
            remedy = "save it with commas (and numbers with a point)"
            raise ValueError(f"{path}, line {line}: fields are separated by {called}; {remedy}")
    for name in named:
        if named.count(name) > 1:
            raise ValueError(f"{path}, line {line}: column {name!r} is there twice; rename one of the two")
    for line, cells in rows:
        if any(cells[len(names) :]):
            remedy = "put quotes around a field that holds a comma"
            raise ValueError(f"{path}, line {line}: {len(cells)} fields under {len(names)} names; {remedy}")
    cells = [(row + [""] * len(names))[: len(names)] for _, row in rows]
    table = pd.DataFrame(cells, index=[line for line, _ in rows], columns=names, dtype=object)
    return table[named]


def _records(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield each row's line in the file, counted from 1, and its cells; a quoted cell may hold line breaks."""
    reader, line = csv.reader(lines, strict=True), 1
    for row in reader:
        if any(cell.strip() for cell in row):
            yield line, [cell.strip() for cell in row] if line > 1 else row
        line = reader.line_num + 1


def lacks(name: str, header: Iterable[str]) -> str:
    """Return how to say that a header has no column of this name, and which of its columns may be meant.

    >>> print(lacks("mos", ["image", " MOS"]))
    column 'mos' is missing from the header image,  MOS; rename ' MOS' to 'mos'
    """
    like = meant(name, header)
    rename = f"; rename {like!r} to {name!r}" if like else ""
    return f"column {name!r} is missing from the header {', '.join(header)}{rename}"


def meant(name: str, header: Iterable[str]) -> str | None:
    """Return the column that differs from a name in capitals, spaces or punctuation alone, or None."""
    return next((other for other in header if _plain(other) == _plain(name)), None)


def _csv(path: Path, **columns: str) -> pd.DataFrame:
    _present(path)
    table = read_table(path)
    return _pick(path, table, table.index, 1, columns)


def _excel(path: Path, sheet: str | int, header: int, **columns: str) -> pd.DataFrame:
    """Return columns of a sheet whose header is on line ``header``, counted from 1."""
    _present(path)
    try:
        table = pd.read_excel(path, sheet_name=sheet, header=header - 1, dtype=object)
    except (
        BadZipFile,
        ValueError,
        KeyError,
    ) as error:  # no workbook; no such sheet; a workbook without its parts
        raise ValueError(
            f"{path}: not an .xlsx workbook with sheet {sheet!r} ({error}); an old .xls must be saved as .xlsx"
        ) from error
    return _pick(path, table, range(header + 1, header + 1 + len(table)), header, columns)


def _pick(
    path: Path, table: pd.DataFrame, lines: Iterable[int], header: int, columns: dict[str, str]
) -> pd.DataFrame:
    """Return the columns ``ours=theirs`` as strings, with the line of each row and of the header."""
    table = table.set_axis([str(name).strip() for name in table.columns], axis=1)
    missing = [name for name in columns.values() if name not in table]
    if missing:
        raise ValueError(f"{path}, line {header}: {lacks(missing[0], table.columns)}")
    table = table[list(columns.values())].set_axis(list(columns), axis=1).fillna("").astype(str)
    table = table.apply(lambda column: column.str.strip())
    table.insert(0, "where", [f"{path}, line {line}" for line in lines])
    return table[(table.drop(columns="where") != "").any(axis=1)].reset_index(drop=True)


def _matlab(path: Path, name: str) -> np.ndarray:
    from scipy.io import loadmat  # slow to import
    from scipy.io.matlab import MatReadError

    _present(path)
    try:
        return loadmat(path)[name].ravel()
    except (ValueError, TypeError, NotImplementedError, MatReadError) as error:
        raise ValueError(f"{path}: not a MATLAB file ({error})") from error
    except KeyError as error:
        raise ValueError(f"{path}: holds no variable {name}") from error


def _parts(table: pd.DataFrame, pattern: str, example: str) -> pd.DataFrame:
    """Return the named groups of a pattern in the column name; ValueError for a name that is not like the
    example.
    """
    parts = table["name"].str.extract(re.compile(pattern, re.IGNORECASE))
    _require(parts.notna().all(axis=1), table, "name", f"is not like {example}")
    return parts


def _kadid(files: list[Path]) -> pd.DataFrame:
    table = _csv(files[0], name="dist_img", reference="ref_img", mos="dmos", std="var")
    parts = _parts(table, r"^I\d\d_(?P<type>0[1-9]|1\d|2[0-5])_0(?P<level>[1-5])\.png$", "I01_01_01.png")
    return table.assign(
        distortion=[TYPES[int(number) - 1] for number in parts["type"]],
        level=parts["level"],
        severity=parts["level"],
    )


def _tid(files: list[Path]) -> pd.DataFrame:
    table, std = _lines(files[0], ("mos", "name")), _lines(files[0].with_name("mos_std.txt"), ("std",))
    if len(table) != len(std):
        raise ValueError(
            f"{files[0]} has {len(table)} rows, mos_std.txt {len(std)}: they must be in the same order, one to one"
        )
    parts = _parts(table, r"^I(?P<reference>\d\d)_\d\d_(?P<severity>[1-5])\.bmp$", "I01_01_1.bmp")
    return table.assign(std=std["std"], reference="I" + parts["reference"], severity=parts["severity"])


def _koniq(files: list[Path]) -> pd.DataFrame:
    columns = {"name": "image_name", "std": "SD", "mos": "MOS_zscore"}
    if (
        "sets" in files[0].name
    ):  # its column MOS is 0..100; the MOS of the other file is the mean of the votes 1..5
        columns |= {"mos": "MOS", "split": "set"}
    table = _csv(files[0], **columns)
    return table.replace({"split": {"training": "train", "validation": "val"}})


def _spaq(files: list[Path]) -> pd.DataFrame:
    return _excel(files[0], 0, 1, name="Image name", mos="MOS")


def _clive(files: list[Path]) -> pd.DataFrame:
    """The 7 pictures on which observers were trained (t1.bmp …) are left out, as everybody does."""
    names, mos, std = (
        _matlab(files[0].with_name(f"{name}.mat"), name)
        for name in ("AllImages_release", "AllMOS_release", "AllStdDev_release")
    )
    if not len(names) == len(mos) == len(std):
        raise ValueError(
            f"{files[0].parent}: {len(names)} names, {len(mos)} MOS and {len(std)} deviations; the three files must agree"
        )
    where = [f"{files[0].parent}, entry {n}" for n in range(1, len(names) + 1)]
    table = pd.DataFrame(
        {"where": where, "name": [str(np.ravel(name)[0]) for name in names], "mos": mos, "std": std},
        dtype=object,
    )
    return table[~table["name"].str.fullmatch(r"t\d+\.\w+")].reset_index(drop=True)


def _bid(files: list[Path]) -> pd.DataFrame:
    table = _excel(files[0], 0, 1, name="Image Number", mos="Average Subjective Grade", std="std")
    _require(table["name"].str.fullmatch(r"\d+(\.0)?"), table, "name", "is not an image number")
    return table.assign(name=[f"DatabaseImage{int(float(number)):04d}.JPG" for number in table["name"]])


def _pipal(files: list[Path]) -> pd.DataFrame:
    table = pd.concat([_lines(file, ("name", "mos"), ",") for file in files], ignore_index=True)
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
    table = _excel(
        files[0],
        "all_by_image",
        4,
        image="image",
        type="dst_type",
        level="dst_lev",
        mos="dmos",
        std="dmos_std",
    )
    _require(table["type"].isin(CSIQ_FILES), table, "type", f"is not one of {', '.join(CSIQ_FILES)}")
    image, level = (
        table[name].str.removesuffix(".0") for name in ("image", "level")
    )  # Excel's numbers: 1600 is a name here
    name = image + "." + table["type"].map(CSIQ_FILES) + "." + level + ".png"
    return table.drop(columns="level").assign(name=name, reference=image, severity=level)


def _official_list(files: list[Path]) -> pd.DataFrame:
    return _lines(files[0], ("reference", "name", "mos"))


def _sriqa(files: list[Path]) -> pd.DataFrame:
    return pd.concat(
        [_lines(file, ("name", "mos"), ",").assign(reference=file.stem) for file in files], ignore_index=True
    )


def _agiqa(files: list[Path]) -> pd.DataFrame:
    return _csv(files[0], name="name", reference="prompt", mos="mos_quality", std="std_quality")


def _biq2021(files: list[Path]) -> pd.DataFrame:
    parts = {"train": files[0].with_name("Train (Images and MOS).csv"), "test": files[0]}
    rows = [_csv(path, name="Image Name", mos="MOS").assign(part=part) for part, path in parts.items()]
    table = pd.concat(rows, ignore_index=True)
    subset = _parts(table, r"^(?P<subset>ss0[123]) \(\d+\)\.jpg$", "ss01 (1).jpg")["subset"]
    return without_twins(table.assign(subset=subset.str.lower()))


def _srij(files: list[Path]) -> pd.DataFrame:
    """The published scores follow the order of the addresses, which has the originals, HD-1-…, too."""
    path, scores = files[0].with_name("addressesSRIJ.mat"), _matlab(files[0], "hScoresSRIJ")
    names = [str(np.ravel(name)[0]) for name in _matlab(path, "addressesSRIJ")]
    where = [f"{path}, entry {n}" for n in range(1, len(names) + 1)]
    table = pd.DataFrame({"where": where, "name": names}, dtype=object)
    parts = _parts(table, r"^(?P<by>\w+)-(?P<scale>[1-4])-(?P<crop>.+)\.tif$", "SRCNN-2-dolls1.tif")
    original = parts["by"] == "HD"
    if len(scores) != (~original).sum():
        others = f"{(~original).sum()} pictures of {path.name} that are not HD-1-…"
        raise ValueError(f"{files[0]}: {len(scores)} scores for {others}; get the set again")
    votes = _srij_votes(files[0].parents[2] / "HumanStudy" / "HumanScores", len(names))
    voted, std = screened_scores(votes, len(scores))
    table["mos"] = voted
    table.loc[~original, "mos"] = scores
    agrees = (table["mos"] - voted).abs() < 0.01
    _require(agrees, table, "mos", "is not what the votes in HumanStudy/HumanScores give; get the set again")
    scene = parts["crop"].str.replace(r"(-fast)?\d+$", "", regex=True)  # several crops of one photograph
    described = {"distortion": parts["by"].mask(original, ""), "level": parts["scale"].mask(original, "")}
    return table.assign(std=std, severity=parts["scale"], reference=parts["crop"], scene=scene, **described)


def _srij_votes(folder: Path, pictures: int) -> np.ndarray:
    """Return (observers, pictures). In a file, column 1 counts pictures from 1, column 2 has the votes."""
    files = sorted(folder.glob("*.mat"))
    if len(files) < 2:
        raise FileNotFoundError(f"{folder}: {len(files)} files of votes; they belong to the annotation")
    votes = np.empty((len(files), pictures))
    for row, path in zip(votes, files):
        values = _matlab(path, "quality")
        table = values.reshape(pictures, -1) if len(values) % pictures == 0 else np.empty((0, 0))
        if table.shape[1] < 2 or sorted(table[:, 0]) != list(range(1, pictures + 1)):
            raise ValueError(f"{path}: column 1 of quality is not 1 to {pictures}, once each; get it again")
        row[table[:, 0].astype(int) - 1] = table[:, 1]
        if not ((row >= 0) & (row <= 100)).all():
            raise ValueError(f"{path}: a vote is not a number from 0 to 100; get it again")
        if row.min() == row.max():
            raise ValueError(f"{path}: all votes are {row[0]}, which orders nothing; take the file away")
    return votes


PCUID_PAIRS = {
    "first": "图像1",
    "second": "图像2",
    "label": "标签（-1为图像2质量优于图像1；0为图像1和图像2质量差不多；1为图像1质量优于图像2）",
}
"""The header of pair_label.xlsx: picture 1, picture 2, label (-1: 2 is better, 0: alike, 1: 1 is better)."""


def _pcuid(files: list[Path]) -> pd.DataFrame:
    """Every two pictures are compared, and mos = 100 (wins + ties / 2) / (pictures - 1)."""
    table = _excel(files[0], 0, 1, name="image_id", mos="MOS")
    table["name"] = _pcuid_names(table, "name")
    pairs = _pcuid_pairs(files[0].parent)
    met = table["name"].map(pd.concat([pairs["first"], pairs["second"]]).value_counts())
    whole = "is not compared once with every other picture in pair_label.xlsx; get the set again"
    _require(met == len(table) - 1, table, "name", whole)
    off = pd.to_numeric(table["mos"], errors="coerce") - table["name"].map(win_share(pairs))
    _require(off.abs() < 1e-6, table, "mos", "is not the share of wins in pair_label.xlsx; get the set again")
    return table


def _pcuid_pairs(folder: Path) -> pd.DataFrame:
    table = _excel(folder / "pair_label.xlsx", 0, 1, **PCUID_PAIRS)
    preference = table["label"].str.removesuffix(".0").map({"1": 1.0, "0": 0.5, "-1": 0.0})
    _require(preference.notna(), table, "label", "is not -1, 0 or 1")
    first, second = (_pcuid_names(table, column) for column in ("first", "second"))
    _require(first != second, table, "second", "is compared with itself")
    again = pd.DataFrame({"a": np.minimum(first, second), "b": np.maximum(first, second)}).duplicated()
    _require(~again, table, "second", "was compared with the first on an earlier line")
    return table.assign(first=first, second=second, preference=preference)


def _pcuid_names(table: pd.DataFrame, column: str) -> pd.Series:
    number = table[column].str.removesuffix(".0")  # a cell of Excel may be a whole number or not
    _require(number.str.fullmatch(r"\d+"), table, column, "is not a picture's number")
    return "图片" + number + ".jpg"


SETS = {
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
        note="the column dmos is a mean opinion, higher is better, in spite of its name: kept; var is a variance: std is its root",
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
        note="official split, in the sets file alone; MOS is 0..100 but SD is of the votes 1..5: std is 25 SD",
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
        note="no std in the sheet; native pictures are scored, of up to 12 million pixels and more (pyiqa resizes them to 448)",
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
        note="Elo ratings, seen 916.7..1836.0; only the official training part has public labels: its 200 references are split here",
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
        note="lines 'reference name mos' of the official VisualQuality-R1 repository, already brought to 1..5; no std",
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
        note="lines 'reference name mos' of the official VisualQuality-R1 repository, already brought to 1..5; no std",
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
        read=_biq2021,
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
        read=_srij,
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
        read=_pcuid,
        compare=_pcuid_pairs,
        note="mos is the share of wins over all others, checked against pair_label.xlsx; load_comparisons "
        "returns the 44,850 pairs; no std",
    ),
}
"""The public sets by their names, as `vqr1 data --list` prints them."""
PER_CONTENT = tuple(name for name, entry in SETS.items() if entry.per_content)


# What all sets go through


def read_public(name: str, root: str | Path, strict: bool = True) -> pd.DataFrame:
    """Return a public set's rows: the columns of a manifest that it has, and an empty string for the rest.

    ``root`` is the set's folder, or one that has it under its name (case and punctuation do not matter:
    KADID10k). mos is on the published scale, higher is better. Lists ``splits/{train,val,test}.txt`` in the
    set's folder, with a picture's name on every line (as the official VisualQuality-R1 repository has
    them), go before the split made here: 6:2:2 by reference, seeded, which is the paper's 49/16/16
    references for KADID-10k, though not the same ones. ``frame.attrs`` keeps root and the names of missing
    pictures. Raises FileNotFoundError and ValueError naming file, line, value and the expected layout; for
    a missing picture only if ``strict``, else its image is empty.
    """
    entry, folder = SETS[name], home(name, root)
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


def read_comparisons(name: str, root: str | Path, strict: bool = True) -> pd.DataFrame:
    """Return the pairs of pictures that people compared in a public set.

    name: of `SETS`.
    root: as for `read_public`.
    strict: whether a missing picture is an error; else its pairs are left out.

    Columns: first, second (paths below ``attrs["root"]``) and preference: 1 where the first looks better, 0.5
    for a tie, 0. Raises ValueError for a set without comparisons, and what `read_public` raises.
    """
    entry, folder = SETS[name], home(name, root)
    if entry.compare is None:
        having = ", ".join(known for known, one in SETS.items() if one.compare)
        raise ValueError(f"{name} has no comparisons; sets that have: {having}")
    table = entry.compare(folder)
    names = pd.Series(pd.unique(pd.concat([table["first"], table["second"]])))
    images = _located(entry, folder, names)
    missing = _missing(name, folder, names, images, strict)
    sides = table[["first", "second"]].apply(lambda side: side.map(dict(zip(names, images))))
    frame = sides.assign(preference=table["preference"])[(sides != "").all(axis=1)].reset_index(drop=True)
    frame.attrs |= {"root": str(folder), "missing": missing}
    return frame


def _missing(name: str, folder: Path, names: pd.Series, images: pd.Series, strict: bool) -> list[str]:
    """Return the names of pictures that are not there; FileNotFoundError if there are any and ``strict``."""
    missing = names[images == ""].tolist()
    if missing and strict:
        count, shown = f"{len(missing)} of {len(names)}", ", ".join(missing[:3])
        what = f"{count} pictures of {name} are missing, first {shown}; expected {SETS[name].layout}"
        raise FileNotFoundError(f"{folder}: {what}")
    return missing


def public_name(name: str | Path) -> str | None:
    """Return the name of a public set in whatever case and punctuation, None if there is no such set.

    >>> public_name("KADID10k"), public_name("sim-kadid")
    ('kadid-10k', None)
    """
    return {_plain(known): known for known in SETS}.get(_plain(str(name)))


def home(name: str, root: str | Path) -> Path:
    """Return the folder of a set: one below ``root`` that has its name, else ``root``, if the annotation is
    in it.
    """
    root, entry = Path(root), SETS[name]
    inside = sorted(root.iterdir()) if root.is_dir() else []
    for folder in [*(path for path in inside if path.is_dir() and _plain(path.name) == _plain(name)), root]:
        if any(_found(folder, pattern) for pattern in entry.files):
            return folder
    raise FileNotFoundError(
        f"{name} is neither in {root} nor in a folder {name} of it; expected {entry.layout}. It can be had from: {entry.source}"
    )


def _found(folder: Path, pattern: str) -> list[Path]:
    """Return what matches a pattern below a folder, sorted; upper and lower case do not matter."""
    either = re.sub("[A-Za-z]", lambda letter: f"[{letter[0].lower()}{letter[0].upper()}]", pattern)
    return sorted(folder.glob(either))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _require(good: pd.Series, table: pd.DataFrame, column: str, problem: str) -> None:
    """Raise for the first row where ``good`` is false."""
    if not good.all():
        row = table.loc[(~good.astype(bool)).idxmax()]
        raise ValueError(f"{row['where']}: {column} {row[column]!r} {problem}")


def _checked(entry: PublicSet, table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with numbers, all of them checked, and higher mos better.

    A mos may lie 1e-6 outside its scale, from somebody's rounding, and is kept: SRIQA-Bench has
    100.00000000000001.
    """
    (low, high), mos = entry.scale, pd.to_numeric(table["mos"], errors="coerce")
    _require(
        mos.between(low - 1e-6, high + 1e-6),
        table,
        "mos",
        f"is not a number from {low} to {high}, the published scale",
    )
    raw = table.get("std", pd.Series("", table.index)).astype(str)
    std = pd.to_numeric(raw, errors="coerce").astype(float)
    _require((np.isfinite(std) & (std >= 0)) | (raw == ""), table, "std", "is not a number >= 0")
    _require(~table["name"].str.lower().duplicated(), table, "name", "is there twice")
    std = (np.sqrt(std) if entry.variance else std) * entry.std_factor
    mos = (mos if entry.flip is None else entry.flip - mos).astype(float)
    if "severity" in table:
        by_severity = mos.groupby(table["severity"].astype(int)).mean()
        if by_severity.iloc[0] < by_severity.iloc[-1]:
            raise ValueError(
                f"{table['where'][0].rpartition(',')[0]}: the strongest distortions have the best scores, {by_severity.iloc[-1]:.3g} after "
                f"{by_severity.iloc[0]:.3g}: the numbers run the wrong way. {entry.note}"
            )
    return table.assign(mos=mos, std=std, reference=table.get("reference", table["name"]))


def _located(entry: PublicSet, folder: Path, names: Iterable[str]) -> pd.Series:
    """Return the path of each picture below the set's folder, "" if it is missing; upper and lower case do
    not matter.
    """
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
    _require(split.isin([*SPLITS, ""]), table, "split", "is not training, validation or test")
    return split


def seeded_split(reference: pd.Series, seed: int = SPLIT_SEED) -> pd.Series:
    """Return train, val or test for each row, 6:2:2 of the references, no reference in two of them.

    >>> seeded_split(pd.Series([f"I{n:02d}.png" for n in range(1, 82)])).value_counts().tolist()  # KADID-10k's 81
    [49, 16, 16]
    """
    names = np.random.default_rng(seed).permutation(sorted(set(reference)))
    fifth = round(0.2 * len(names))
    of = (
        dict.fromkeys(names, "train")
        | dict.fromkeys(names[:fifth], "test")
        | dict.fromkeys(names[fifth : 2 * fifth], "val")
    )
    return reference.map(of)


def _listed_split(lists: list[Path], table: pd.DataFrame) -> pd.Series:
    """Return the split of lists; a line may hold more than the picture's name, and pictures that none has
    get "".
    """
    of: dict[str, str] = {}
    known = set(table["name"].str.lower())
    for path, split in zip(lists, SPLITS):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; the split needs train.txt, val.txt and test.txt")
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            named = {field for field in re.split(r"[\s,]+", line.lower()) if field in known}
            if line.strip() and (len(named) != 1 or named & set(of)):
                raise ValueError(
                    f"{path}, line {number}: {line.strip()!r} does not name one picture of the set that no earlier line has"
                )
            of |= dict.fromkeys(named, split)
    split = table["name"].str.lower().map(of).fillna("")
    mixed = split[split != ""].groupby(table["reference"]).nunique()
    if (mixed > 1).any():
        raise ValueError(
            f"{lists[0].parent}: reference {mixed.idxmax()!r} is in more than one of train.txt, val.txt and test.txt"
        )
    return split
