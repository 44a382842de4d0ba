"""Every public set is read from small files in the official layout, and what is wrong in them is named.

The builders below write the annotation as published (names, columns, header, separators, cells) with a few
rows and pictures of 8x6 pixels; `test_real_sets.py` reads real sets where they are there.
"""

import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from openpyxl import Workbook, load_workbook
from PIL import Image
from scipy.io import loadmat, savemat

from vqr1.cli import main
from vqr1.data.manifests import MANIFEST_COLUMNS, load_comparisons, load_ratings
from vqr1.data.observers import human_cells
from vqr1.data.people_sets import PCUID_PAIRS, TWINS, near_twins, screened_scores
from vqr1.data.public_sets import PER_CONTENT, PUBLIC_SETS, read_public, seeded_split
from vqr1.distortions import DISTORTIONS

NAN = float("nan")


def picture(path: Path, shade: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 90, 60)).save(path)


def text(path: Path, lines: list[str], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((end.join(lines) + end).encode())


def sheet(path: Path, rows: list[list], title: str = "Sheet1") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    book = Workbook()
    book.active.title = title
    for row in rows:
        book.active.append(row)
    book.save(path)


# The official layouts. Each builder returns {picture's path: (mos as the frame must have it, std)}.


def kadid(root: Path) -> dict:
    rows = {}
    for number in range(1, 6):
        for level, (dmos, var) in enumerate(
            [("4.57", "0.496"), ("4.10", "0.81"), ("2.63", "1.0"), ("1.50", "0.25"), ("1.00", "0.0")], 1
        ):
            rows[f"I{number:02d}_03_0{level}.png"] = (f"I{number:02d}.png", dmos, var)
    text(
        root / "dmos.csv",
        ["dist_img,ref_img,dmos,var", *(",".join([name, *row]) for name, row in rows.items())],
    )
    for name in (
        *rows,
        *(row[0] for row in rows.values()),
    ):  # the references lie beside them, and are not rated
        picture(root / "images" / name)
    return {f"images/{name}": (float(dmos), float(var) ** 0.5) for name, (_, dmos, var) in rows.items()}


def tid(root: Path) -> dict:
    names = [f"I0{ref}_01_{level}.bmp" for ref in (1, 2) for level in (1, 5)] + [
        "i25_24_1.bmp",
        "I25_24_5.bmp",
    ]
    mos, std = (
        ["5.51429", "3.1", "6.0", "0.24242", "5.2", "2.0"],
        ["0.13013", "0.2", "0.1", "0.15", "0.11", "0.12"],
    )
    text(root / "mos_with_names.txt", [f"{m} {name}" for m, name in zip(mos, names)], end="\r\n")
    text(root / "mos_std.txt", std, end="\r\n")
    on_disk = [*names[:3], "i02_01_5.BMP", *names[4:]]  # names differ in case between file and disk
    for name in on_disk:
        picture(root / "distorted_images" / name)
    picture(root / "reference_images" / "i25.bmp")
    return {f"distorted_images/{name}": (float(m), float(s)) for name, m, s in zip(on_disk, mos, std)}


KONIQ = "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD"


def koniq(root: Path) -> dict:
    rows = [
        (
            "10004473376.jpg,0.0,0.0,0.238095238095,0.695238095238,0.0666666666667,105,77.3836206897,0.527277894494",
            "training",
        ),
        (
            "10007357496.jpg,0.0,0.03125,0.46875,0.489583333333,0.0104166666667,96,68.7285714286,0.580003024795",
            "test",
        ),
        (
            "10043785683.jpg,0.0,0.0,0.433962264151,0.566037735849,0.0,106,71.2043269231,0.497974333332",
            "validation",
        ),
        ("10058760545.jpg,0.45,0.48,0.07,0.0,0.0,100,15.2293577982,0.615949624072", "training"),
    ]
    text(root / "koniq10k_distributions_sets.csv", [f"{KONIQ},set", *(",".join(row) for row in rows)])
    fields = [row.split(",") for row, _ in rows]
    for name, *_ in fields:
        picture(root / "1024x768" / name)
        picture(root / "512x384" / name)  # the same names, half the size
    return {f"1024x768/{row[0]}": (float(row[7]), 25 * float(row[8])) for row in fields}


def spaq(root: Path) -> dict:
    header = ["Image name", "MOS", "Brightness", "Colorfulness", "Contrast", "Noisiness", "Sharpness"]
    rows = [
        ["00001.jpg", 58.5, 60.0, 57.2, 61.0, 55.3, 49.8],
        ["00002.jpg", 36, 40, 30, 35, 20, 31],
        ["00914.jpg", 74.0, 70, 70, 70, 70, 70],
    ]
    sheet(root / "Annotations" / "MOS and Image attribute scores.xlsx", [header, *rows])
    for name, *_ in rows:
        picture(root / "TestImage" / name)
    return {f"TestImage/{row[0]}": (float(row[1]), NAN) for row in rows}


def matlab(root: Path, names: list[str], mos: list[float], std: list[float]) -> None:
    """Write cells (N, 1) of names and rows (1, N) of numbers, as in ChallengeDB_release."""
    cells = np.empty((len(names), 1), dtype=object)
    cells[:, 0] = names
    (root / "Data").mkdir(parents=True, exist_ok=True)
    savemat(root / "Data" / "AllImages_release.mat", {"AllImages_release": cells})
    savemat(root / "Data" / "AllMOS_release.mat", {"AllMOS_release": np.array([mos])})
    savemat(root / "Data" / "AllStdDev_release.mat", {"AllStdDev_release": np.array([std])})


def clive(root: Path) -> dict:
    names = [f"t{n}.bmp" for n in range(1, 8)] + ["3.bmp", "4.bmp", "1024.JPG"]
    mos, std = [50.0] * 7 + [63.9634, 25.3353, 92.43], [20.0] * 7 + [20.2, 16.1, 13.3]
    matlab(root, names, mos, std)
    for name in names[:7]:
        picture(root / "Images" / "trainingImages" / name)
    for name in names[7:]:
        picture(root / "Images" / name)
    return {f"Images/{name}": row for name, *row in zip(names[7:], mos[7:], std[7:])}


def bid(root: Path) -> dict:
    rows = [[1, 3.25, 0.9, 3, 3.5], [2, 0.164, 0.2, 0.1, 0.2], [586, 4.92, 0.1, 5, 4.8]]
    sheet(
        root / "DatabaseGrades.xlsx",
        [["Image Number", "Average Subjective Grade", "std", "User 1", "User 2"], *rows],
    )
    for number, *_ in rows:
        picture(
            root
            / "ImageDatabase"
            / f"DatabaseImage{number:04d}.JPG".replace("JPG", "jpg" if number == 2 else "JPG")
        )
    names = ["DatabaseImage0001.JPG", "DatabaseImage0002.jpg", "DatabaseImage0586.JPG"]
    return {f"ImageDatabase/{name}": (row[1], row[2]) for name, row in zip(names, rows)}


def pipal(root: Path) -> dict:
    rows = {
        "A0001_00_00.bmp": "1520.0648",
        "A0001_00_01.bmp": "1397.2",
        "A0002_00_00.bmp": "1466.4372",
        "A0002_06_26.bmp": "916.7",
    }
    for reference in ("A0001", "A0002"):
        text(
            root / "Train_Label" / f"{reference}.txt",
            [f"{name},{elo}" for name, elo in rows.items() if name.startswith(reference)],
        )
        picture(root / "Train_Ref" / f"{reference}.bmp")
    for place, name in enumerate(rows):
        picture(root / f"Distortion_{place % 2 + 1}" / name)
    return {
        f"Distortion_{place % 2 + 1}/{name}": (float(elo), NAN)
        for place, (name, elo) in enumerate(rows.items())
    }


CSIQ = [  # image, dst_idx, dst_type, dst_lev, dmos_std, dmos, file
    (1600, 1, "noise", 1, 0.03, 0.062, "awgn/1600.AWGN.1.png"),
    (1600, 1, "noise", 5, 0.1, 0.7, "awgn/1600.AWGN.5.png"),
    ("sunset_sparrow", 3, "jpeg 2000", 4, 0.12, 0.512, "jpeg2000/sunset_sparrow.jpeg2000.4.png"),
    ("sunset_sparrow", 2, "jpeg", 1, 0.02, 0.011, "jpeg/sunset_sparrow.JPEG.1.png"),
    ("aerial_city", 6, "blur", 5, 0.05, 0.93, "blur/aerial_city.BLUR.5.png"),
    ("aerial_city", 5, "contrast", 1, 0.04, 0.1, "contrast/aerial_city.contrast.1.png"),
    ("aerial_city", 4, "fnoise", 2, 0.06, 0.2, "fnoise/aerial_city.fnoise.2.png"),
]


def csiq(root: Path) -> dict:
    head = [
        [],
        ["CSIQ image quality database"],
        [],
        [None] * 3 + ["image", "dst_idx", "dst_type", "dst_lev", "dmos_std", "dmos"],
    ]
    sheet(
        root / "csiq.DMOS.xlsx",
        [*head, *([None] * 3 + list(row[:6]) for row in CSIQ), [None] * 9],
        "all_by_image",
    )
    for *_, name in CSIQ:
        picture(root / "dst_imgs" / name)
    picture(root / "src_imgs" / "1600.png")
    return {f"dst_imgs/{row[6]}": (1 - row[5], row[4]) for row in CSIQ}


def listed(file: str, names: list[str]):
    def build(root: Path) -> dict:
        mos = [1.0, 3.25, 5.0, 2.5]
        text(
            root / file,
            [f"{name.split('_')[0]}.png {name} {value}" for name, value in zip(names, mos, strict=True)],
        )
        for place, name in enumerate(names):
            picture(root / f"part{place % 2}" / name)
        return {
            f"part{place % 2}/{name}": (value, NAN) for place, (name, value) in enumerate(zip(names, mos))
        }

    return build


METHODS = ("Original", "SwinIR", "SeeSR")
SRIQA = {
    "online50": (66.2, 0.0, 100.00000000000001),
    "realworld23": (100.0, 34.5, 0.0),
    "srtest9": (80.0, 0.0, 100.0),
}


def sriqa(root: Path) -> dict:
    """Write MOS/x.txt in falling order; a picture in LRImages has the same name as the rated original."""
    rated = {}
    for content, scores in SRIQA.items():
        names = [f"{content}_{method}{'' if method == 'Original' else 'x4'}.png" for method in METHODS]
        text(
            root / "MOS" / f"{content}.txt",
            [f"{name},{score}" for score, name in sorted(zip(scores, names), reverse=True)],
        )
        picture(root / "LRImages" / f"{content}_Original.png")
        for method, name, score in zip(METHODS, names, scores):
            picture(root / "images" / method / name)
            rated[f"images/{method}/{name}"] = (score, NAN)
    return rated


def agiqa(root: Path) -> dict:
    rows = {
        "AttnGAN_normal_000.jpg": ("statue of a man,,,", 0.965602553, 0.223270101),
        "AttnGAN_normal_060.jpg": (
            '"artwork with only triangles, anime style",,,anime style',
            0.919776796,
            0.719282241,
        ),
        "sd1.5_000.jpg": ("statue of a man,,,", 3.1, 0.5),
        "xl_000.jpg": ("a cat,,,", 4.489, 0.1),
    }
    lines = [
        f"{name},{prompt},{mos},{std},0.40889324,0.615607722" for name, (prompt, mos, std) in rows.items()
    ]
    text(
        root / "data.csv", ["name,prompt,adj1,adj2,style,mos_quality,std_quality,mos_align,std_align", *lines]
    )
    for name in rows:
        picture(root / name)
    return {name: row[1:] for name, row in rows.items()}


BIQ = {  # no picture here has a near twin in the set
    "Train": {
        "ss01 (5).jpg": 0.29,
        "ss02 (1014).jpg": 0.3562,
        "ss03 (3753).jpg": 0.85,
        "ss03 (961).jpg": 0.65,
    },
    "Test": {"ss01 (10).jpg": 0.0, "ss03 (10).jpg": 1.0},
}


def biq_lists(root: Path, parts: dict) -> None:
    """Write a header with two nameless columns."""
    for part, rows in parts.items():
        lines = [f"{name},{mos},," for name, mos in rows.items()]
        text(root / f"{part} (Images and MOS).csv", ["Image Name,MOS,,", *lines])


def biq2021(root: Path) -> dict:
    """One file on disk is called .JPG."""
    biq_lists(root, BIQ)
    rated = BIQ["Train"] | BIQ["Test"]
    on_disk = {name: name.replace("(1014).jpg", "(1014).JPG") for name in rated}
    for name in on_disk.values():
        picture(root / "Images" / name)
    return {f"Images/{on_disk[name]}": (mos, NAN) for name, mos in rated.items()}


CROPS = ("coffee1", "dolls1", "dolls2", "globe-fast1", "globe1", "loader3", "tea-bottles2")


def srij(root: Path) -> dict:
    """Write names (1, N), originals in the middle; scores (n, 1) of the others; a vote file per observer."""
    names = [f"{kind}-{crop}.tif" for kind in ("Yang10-2", "HD-1", "SRCNN-4") for crop in CROPS]
    originals = np.array([name.startswith("HD-1-") for name in names])
    truth = np.repeat([55.0, 80.0, 20.0], len(CROPS)) + np.tile(np.arange(len(CROPS)), 3)
    rng = np.random.default_rng(0)
    votes = truth + rng.normal(0, 3, (5, len(names)))
    z = pd.DataFrame(votes.T).apply(lambda votes: (votes - votes.mean()) / votes.std())  # per observer
    score = 100 * (z + 3) / 6
    published = score.mean(axis=1).to_numpy()[~originals]
    cells = np.empty((1, len(names)), dtype=object)
    cells[0] = names
    for folder in ("Datasets/SRIJ/Images/GroundTruth", "HumanStudy/HumanScores"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    savemat(root / "Datasets/SRIJ/addressesSRIJ.mat", {"addressesSRIJ": cells})
    savemat(root / "Datasets/SRIJ/hScoresSRIJ.mat", {"hScoresSRIJ": published[:, None]})
    for observer, row in zip((2, 3, 10, 11, 45), votes):
        order = rng.permutation(len(names))
        light = np.full(len(names), 271.0)  # further columns tell of the room
        quality = np.column_stack([order + 1, row[order], light])
        savemat(root / f"HumanStudy/HumanScores/{observer}.mat", {"quality": quality})
    paths = [f"Datasets/SRIJ/Images/{name}" for name in names]
    paths = [path.replace("HD-1-", "GroundTruth/HD-1-") for path in paths]
    for path in paths:
        picture(root / path)
    return dict(zip(paths, zip(score.mean(axis=1), score.std(axis=1))))


PAIRS = [(1, 3, 1), (1, 2, -1), (2, 3, 0), (4, 1, -1), (4, 2, -1)]
PAIRS += [(3, 4, 1), (5, 1, 1), (2, 5, 1), (3, 5, 1), (5, 4, 1)]
SHARES = {1: 50.0, 2: 87.5, 3: 62.5, 4: 0.0, 5: 50.0}
"""Each in 4 comparisons: 2 won; 3 and a tie; 2 and a tie; none; 2 won."""


def pcuid(root: Path) -> dict:
    sheet(root / "MOS.xlsx", [["image_id", "MOS"], *SHARES.items()])
    sheet(root / "pair_label.xlsx", [list(PCUID_PAIRS.values()), *map(list, PAIRS)])
    paths = [f"300-{1 + number // 3}/图片{number}.jpg" for number in SHARES]
    for path in paths:
        picture(root / path)
    return {path: (share, NAN) for path, share in zip(paths, SHARES.values())}


BUILD = {
    "kadid-10k": kadid,
    "tid2013": tid,
    "koniq-10k": koniq,
    "spaq": spaq,
    "clive": clive,
    "bid": bid,
    "pipal": pipal,
    "csiq": csiq,
    "liu13": listed("Deblur_test_all.txt", ["a_1.png", "a_2.png", "b_1.png", "b_2.png"]),
    "min19": listed("dehaze_test_all.txt", ["01_1.bmp", "01_2.bmp", "02_1.bmp", "02_2.bmp"]),
    "sriqa-bench": sriqa,
    "agiqa-3k": agiqa,
    "biq2021": biq2021,
    "srij": srij,
    "pcuid": pcuid,
}


@pytest.fixture
def made(tmp_path):
    """Return a function that writes a set into a folder of its name; it gives (folder, rows to be read)."""
    return lambda name: (tmp_path / name, BUILD[name](tmp_path / name))


def refused(name, root, message, error=ValueError):
    with pytest.raises(error, match=message):
        load_ratings(name, root)


# What every reader gives


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_a_set_in_the_official_layout_is_read(name, made):
    folder, expected = made(name)
    frame = load_ratings(name, folder)
    assert tuple(frame.columns) == MANIFEST_COLUMNS + ("subset",) * (name == "biq2021")
    assert frame["dataset"].eq(name).all() and frame.attrs["root"] == str(folder)
    read = {row.image: (row.mos, row.std) for row in frame.itertuples()}
    assert set(read) == set(expected)
    for image, numbers in expected.items():
        assert read[image] == pytest.approx(tuple(numbers), nan_ok=True, rel=1e-12), image
        assert (folder / image).is_file()
    assert (
        frame["mos"].dtype == frame["std"].dtype == float
        and frame["seed"].isna().all()
        and frame["seed"].dtype == "Int64"
    )
    assert (
        frame["crop"].eq("").all()
        and frame["split"].isin(["train", "val", "test"]).all()
        and frame["reference"].ne("").all()
    )


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_a_set_is_found_by_its_name_in_a_folder_of_sets(name, made):
    folder, expected = made(name)
    other = folder.with_name(name.replace("-", "").upper())
    folder.rename(other)
    assert len(load_ratings(name, other.parent)) == len(expected)
    assert load_ratings(name, other.parent).attrs["root"] == str(other)


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_a_set_as_read_is_a_manifest(name, made):
    """It can be written as a CSV and read again, as users do with their own folder and CSV."""
    folder, _ = made(name)
    frame = load_ratings(name, folder)
    frame.to_csv(folder / "set.csv", index=False)
    again = load_ratings(folder / "set.csv")
    pd.testing.assert_frame_equal(
        again.astype({"level": str}), frame.astype({"level": str}), check_dtype=False
    )


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_a_missing_annotation_says_what_is_expected_and_where_it_can_be_had(name, tmp_path):
    entry = PUBLIC_SETS[name]
    refused(
        name,
        tmp_path,
        f"{name} is neither in .*{re.escape(entry.files[0])}.*It can be had from: {re.escape(entry.source)}",
        FileNotFoundError,
    )
    refused(name, tmp_path / "nowhere", f"{name} is neither in", FileNotFoundError)
    assert "**" not in entry.layout and "in /" not in entry.layout


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_missing_pictures_are_counted_and_named(name, made):
    folder, expected = made(name)
    gone = list(expected)[1:3]
    for image in gone:
        (folder / image).unlink()
        (folder / image.replace("1024x768", "512x384")).unlink(missing_ok=True)
    with pytest.raises(
        FileNotFoundError, match=rf"2 of {len(expected)} pictures of {name} are missing, first .*; expected "
    ) as said:
        load_ratings(name, folder)
    assert all(re.search(re.escape(Path(image).name), str(said.value), re.IGNORECASE) for image in gone)
    frame = read_public(name, folder, strict=False)
    assert (frame["image"] == "").sum() == len(frame.attrs["missing"]) == 2


def test_every_entry_says_where_what_and_how():
    for name, entry in PUBLIC_SETS.items():
        assert entry.rows >= 300 and entry.source and entry.size and entry.licence and entry.note, name
        assert entry.split in ("seeded", "official", "test") and entry.scale[0] < entry.scale[1]
    assert {name for name, entry in PUBLIC_SETS.items() if entry.flip is not None} == {
        "csiq"
    } and PER_CONTENT == ("sriqa-bench",)
    assert {name for name, entry in PUBLIC_SETS.items() if "unknown" in entry.source} == {
        "bid",
        "liu13",
        "min19",
    }  # not guessed


def test_a_name_may_be_spelt_in_any_way(made):
    folder, _ = made("kadid-10k")
    for name in ("KADID-10k", "kadid10k", "Kadid_10K"):
        assert load_ratings(name, folder)["dataset"].unique().tolist() == ["kadid-10k"]


def test_an_unknown_name_lists_the_public_sets(tmp_path):
    refused("koniq", tmp_path, "unknown set 'koniq'.*Public sets: kadid-10k, .*agiqa-3k")


# Direction


def test_kadid_is_not_flipped_although_its_column_is_called_dmos(made):
    frame = load_ratings("kadid-10k", made("kadid-10k")[0])
    assert frame.groupby("level")["mos"].mean().is_monotonic_decreasing and frame["mos"].max() == 4.57


def test_csiq_is_flipped_and_says_so(made):
    frame = load_ratings("csiq", made("csiq")[0]).set_index("image")["mos"]
    assert frame["dst_imgs/awgn/1600.AWGN.1.png"] == pytest.approx(1 - 0.062)
    assert frame["dst_imgs/awgn/1600.AWGN.5.png"] == pytest.approx(1 - 0.7)
    assert "flipped" in PUBLIC_SETS["csiq"].note


def reverse_kadid(folder):
    lines = (folder / "dmos.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    text(folder / "dmos.csv", [lines[0], *(f"{a},{b},{6 - float(c):.2f},{d}" for a, b, c, d in rows)])


def reverse_tid(folder):
    lines = [line.split() for line in (folder / "mos_with_names.txt").read_text().splitlines()]
    text(folder / "mos_with_names.txt", [f"{9 - float(mos)} {name}" for mos, name in lines])


def reverse_csiq(folder):
    book = load_workbook(folder / "csiq.DMOS.xlsx")
    for row in range(5, 5 + len(CSIQ)):
        cell = book["all_by_image"].cell(row, 9)
        cell.value = 1 - cell.value
    book.save(folder / "csiq.DMOS.xlsx")


@pytest.mark.parametrize(
    ("name", "reverse"), [("kadid-10k", reverse_kadid), ("tid2013", reverse_tid), ("csiq", reverse_csiq)]
)
def test_numbers_that_run_the_wrong_way_are_refused(name, reverse, made):
    """Where a file names a distortion's strength, the strongest must be the worst."""
    folder, _ = made(name)
    reverse(folder)
    refused(name, folder, "the strongest distortions have the best scores.*run the wrong way")


# The traps of single sets


def test_kadids_types_are_those_of_the_distortions():
    assert human_cells()["type"].drop_duplicates().tolist() == list(DISTORTIONS)


def test_kadids_types_and_levels_are_named(made):
    frame = load_ratings("kadid-10k", made("kadid-10k")[0])
    assert set(frame["distortion"]) == {"motion_blur"} and frame["level"].tolist() == [1, 2, 3, 4, 5] * 5
    assert frame["reference"].nunique() == 5


def test_tids_references_do_not_depend_on_case(made):
    assert load_ratings("tid2013", made("tid2013")[0])["reference"].tolist() == [
        "I01",
        "I01",
        "I02",
        "I02",
        "I25",
        "I25",
    ]


def test_koniq_keeps_its_official_split(made):
    folder, _ = made("koniq-10k")
    assert load_ratings("koniq-10k", folder)["split"].tolist() == ["train", "test", "val", "train"]
    (folder / "metadata").mkdir()
    (folder / "koniq10k_distributions_sets.csv").rename(
        folder / "metadata" / "koniq10k_distributions_sets.csv"
    )
    assert load_ratings("koniq-10k", folder)["split"].tolist() == ["train", "test", "val", "train"]


def test_koniqs_other_file_has_another_mos_column_and_no_split(made):
    """There, MOS is the mean vote 1..5 and MOS_zscore is 0..100."""
    folder, _ = made("koniq-10k")
    (folder / "koniq10k_distributions_sets.csv").unlink()
    row = "10004473376.jpg,0,0,25,73,7,105,3.828571,0.527278,77.3836206897"
    text(folder / "koniq10k_scores_and_distributions.csv", [f"{KONIQ},MOS_zscore", row])
    frame = load_ratings("koniq-10k", folder)
    assert frame["mos"].tolist() == [77.3836206897] and frame["split"].tolist() == [""]


def test_koniqs_smaller_pictures_serve_where_the_larger_are_not_there(made):
    folder, _ = made("koniq-10k")
    for path in (folder / "1024x768").iterdir():
        path.unlink()
    assert load_ratings("koniq-10k", folder)["image"].str.startswith("512x384/").all()


def test_clives_training_pictures_are_left_out(made):
    assert not load_ratings("clive", made("clive")[0])["image"].str.contains(r"/t\d").any()


def test_sriqas_low_resolution_inputs_are_never_taken_for_the_original(made):
    folder, _ = made("sriqa-bench")
    for path in (folder / "images" / "Original").iterdir():
        path.unlink()
    refused("sriqa-bench", folder, "3 of 9 pictures", FileNotFoundError)


def test_two_pictures_of_one_name_are_not_chosen_between(made):
    folder, _ = made("min19")
    picture(folder / "aerial" / "01_1.bmp")
    refused(
        "min19", folder, r"which is the picture 01_1\.bmp: aerial/01_1\.bmp or part0/01_1\.bmp\? Keep one"
    )


def test_a_list_may_name_pictures_by_their_path(made):
    folder, _ = made("min19")
    picture(folder / "aerial" / "01_1.bmp")
    lines = (folder / "dehaze_test_all.txt").read_text().replace("01_1.bmp", "part0/01_1.bmp").splitlines()
    text(folder / "dehaze_test_all.txt", lines)
    assert load_ratings("min19", folder)["image"][0] == "part0/01_1.bmp"


@pytest.mark.parametrize("name", ["biq2021", "pcuid"])
def test_what_is_there_of_a_set_can_be_read_when_asked_for(name, made):
    folder, expected = made(name)
    gone, *kept = expected
    (folder / gone).unlink()
    frame = load_ratings(name, folder, strict=False)
    assert frame["image"].tolist() == kept and frame.attrs["root"] == str(folder)
    refused(name, folder, f"1 of {len(expected)} pictures of {name} are missing", FileNotFoundError)


@pytest.fixture
def sixty(tmp_path) -> Path:
    """Return the folder of a PCUID of 60 pictures, all compared: the one with the lower number is better."""
    numbers = range(1, 61)
    pairs = [[one, two, 1] for one in numbers for two in numbers if one < two]
    shares = [[number, 100 * (60 - number) / 59] for number in numbers]
    sheet(tmp_path / "MOS.xlsx", [["image_id", "MOS"], *shares])
    sheet(tmp_path / "pair_label.xlsx", [list(PCUID_PAIRS.values()), *pairs])
    for number in numbers:
        picture(tmp_path / f"300-1/图片{number}.jpg")
    return tmp_path


def test_a_set_that_lacks_a_few_pictures_is_used_with_a_warning(sixty):
    """One picture of 60 is less than 2%: its row and its pairs are left out, and the others are as before."""
    rows, pairs = load_ratings("pcuid", sixty), load_comparisons("pcuid", sixty)
    gone = "300-1/图片7.jpg"
    (sixty / gone).unlink()
    said = "1 of 60 pictures of pcuid are missing, first 图片7.jpg; all is done without them"
    with pytest.warns(UserWarning, match=said):
        fewer = load_ratings("pcuid", sixty)
    pd.testing.assert_frame_equal(fewer, rows[rows["image"] != gone].reset_index(drop=True))
    with pytest.warns(UserWarning, match=said):
        fewer = load_comparisons("pcuid", sixty)
    assert len(pairs) - len(fewer) == 59 and gone not in {*fewer["first"], *fewer["second"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_ratings("pcuid", sixty, strict=False)) == 59, "asked for"


def test_more_than_a_few_missing_pictures_are_an_error_and_so_is_one_where_all_are_needed(sixty):
    (sixty / "300-1/图片7.jpg").unlink()
    for load in (load_ratings, load_comparisons):
        with pytest.raises(FileNotFoundError, match="1 of 60 pictures of pcuid are missing"):
            load("pcuid", sixty, strict=True)
    (sixty / "300-1/图片9.jpg").unlink()
    for load in (load_ratings, load_comparisons):
        with pytest.raises(FileNotFoundError, match="2 of 60 pictures of pcuid are missing, first 图片7.jpg"):
            load("pcuid", sixty)


# People's sets: twins, subsets, votes, comparisons


def twins(folder: Path, test: dict, train: dict) -> pd.DataFrame:
    biq_lists(folder, {"Test": test, "Train": train})
    for name in test | train:
        picture(folder / "Images" / name)
    return load_ratings("biq2021", folder).set_index("image")


def test_biq2021s_near_twins_are_never_in_two_parts(tmp_path):
    """ss01 (1373) has a twin that is not its nearest: it stays in the test part; its twin leaves training."""
    test = {"SS03 (6873).jpg": 0.78, "ss01 (1373).jpg": 0.5, "ss01 (10).jpg": 0.4}
    frame = twins(tmp_path, test, {"ss03 (5557).jpg": 0.75, "ss01 (1372).jpg": 0.5, "ss01 (5).jpg": 0.3})
    assert frame["split"].to_dict() == {
        "Images/ss03 (5557).jpg": "train",
        "Images/ss01 (1372).jpg": "",
        "Images/ss01 (5).jpg": "train",
        "Images/SS03 (6873).jpg": "",
        "Images/ss01 (1373).jpg": "test",
        "Images/ss01 (10).jpg": "test",
    }
    reference = frame["reference"]
    assert reference["Images/SS03 (6873).jpg"] == reference["Images/ss03 (5557).jpg"]
    assert reference["Images/ss01 (1373).jpg"] == reference["Images/ss01 (1372).jpg"]
    assert reference["Images/ss01 (5).jpg"] == "ss01 (5).jpg"
    assert frame["subset"].tolist() == ["ss03", "ss01", "ss01", "ss03", "ss01", "ss01"]


def test_the_list_of_twins_has_208_test_pictures_that_leave():
    table = pd.read_csv(TWINS, comment="#", keep_default_na=False)
    assert (table["nearest"] != "").sum() == 208 and table["image"].is_unique
    groups = table.groupby("group")["image"]
    assert (groups.transform("min") == table["group"]).all() and (groups.transform("size") > 1).all()
    assert set(table["nearest"]) - {""} <= set(table["image"])


def test_near_twins_are_found_by_how_they_look(tmp_path, photo):
    """A copy coded again and one a little smaller are twins; a mirrored one and flat ones are not."""
    mirrored = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    small = photo.resize((photo.width * 9 // 10, photo.height * 9 // 10))
    flat = Image.new("RGB", photo.size)
    pictures = {"a.jpg": photo, "b.jpg": mirrored, "c.jpg": photo, "d.jpg": small}
    pictures |= {"e.jpg": flat, "f.jpg": flat}
    for name, image in pictures.items():
        image.save(tmp_path / name, quality=95 if name == "a.jpg" else 60)
    trained = [name in ("b.jpg", "c.jpg") for name in pictures]
    table = near_twins([tmp_path / name for name in pictures], list(pictures), trained)
    assert table["image"].tolist() == ["a.jpg", "c.jpg", "d.jpg"] and table["group"].eq("a.jpg").all()
    assert table["nearest"].tolist() == ["c.jpg", "", "c.jpg"]


def test_vqr1_data_twins_needs_the_whole_set_and_prints_its_list(made, capsys):
    folder, expected = made("biq2021")
    assert main(["data", "biq2021", "--twins", "--root", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["image,group,nearest"]  # one shade is nobody's twin
    (folder / list(expected)[0]).unlink()
    assert main(["data", "biq2021", "--twins", "--root", str(folder)]) == 2
    assert "1 of 6 pictures" in capsys.readouterr().err
    assert main(["data", "pcuid", "--twins", "--root", str(folder)]) == 2
    assert "for biq2021 alone" in capsys.readouterr().err


def test_srijs_algorithms_scales_and_scenes(made):
    frame = load_ratings("srij", made("srij")[0])
    original = frame["image"].str.contains("HD-1-")
    assert frame[original][["distortion", "level"]].eq("").all(axis=None)
    made_by = frame.loc[~original, ["distortion", "level"]].drop_duplicates()
    assert made_by.to_numpy().tolist() == [["Yang10", "2"], ["SRCNN", "4"]]
    assert set(frame["reference"]) == set(CROPS)
    part = frame.drop_duplicates("reference").set_index("reference")["split"]
    assert part["dolls1"] == part["dolls2"] and part["globe1"] == part["globe-fast1"]
    assert set(part) == {"train", "val", "test"}


def test_an_observer_who_votes_against_all_others_is_left_out():
    rng = np.random.default_rng(0)
    votes = np.linspace(10, 90, 60) + rng.normal(0, 1, (30, 60))
    z = (votes - votes.mean(1, keepdims=True)) / votes.std(1, ddof=1, keepdims=True)
    mean, std = screened_scores(np.vstack([votes, 100 - votes[0]]), 60)
    np.testing.assert_allclose(mean, 100 * (z.mean(0) + 3) / 6, rtol=0, atol=1e-9)
    np.testing.assert_allclose(std, 100 * z.std(0, ddof=1) / 6, rtol=0, atol=1e-9)


def test_pcuids_comparisons_name_its_pictures(made):
    folder, expected = made("pcuid")
    frame = load_comparisons("PCUID", folder)
    image = dict(zip(SHARES, expected))
    assert frame.to_numpy().tolist() == [[image[a], image[b], (label + 1) / 2] for a, b, label in PAIRS]
    assert set(frame["first"]) | set(frame["second"]) <= set(load_ratings("pcuid", folder)["image"])
    (folder / image[4]).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 5 pictures of pcuid are missing, first 图片4.jpg"):
        load_comparisons("pcuid", folder)
    assert len(load_comparisons("pcuid", folder, strict=False)) == 6


def test_a_set_without_comparisons_says_so(made):
    with pytest.raises(ValueError, match="kadid-10k has no comparisons; sets that have: pcuid"):
        load_comparisons("kadid-10k", made("kadid-10k")[0])
    with pytest.raises(ValueError, match="unknown set 'sim-kadid'; public sets: kadid-10k, "):
        load_comparisons("sim-kadid")


@pytest.mark.parametrize("end", [",", ",,", ";"])
def test_a_comma_at_the_end_of_each_line_shifts_nothing(end, made):
    """If rows have one field more than the header, pandas takes the first column as the index."""
    folder, expected = made("kadid-10k")
    lines = (folder / "dmos.csv").read_text().splitlines()
    for header in (lines[0], lines[0] + end):
        text(folder / "dmos.csv", [header, *(line + end for line in lines[1:])])
        if end == ";":
            refused("kadid-10k", folder, "dmos.csv, line")
            continue
        frame = load_ratings("kadid-10k", folder)
        assert {row.image: row.mos for row in frame.itertuples()} == {
            image: mos for image, (mos, _) in expected.items()
        }


def test_another_separator_is_named(made):
    folder, _ = made("kadid-10k")
    content = (folder / "dmos.csv").read_text()
    for separator, called in ((";", "semicolons"), ("\t", "tabs")):
        (folder / "dmos.csv").write_text(content.replace(",", separator))
        refused("kadid-10k", folder, f"dmos.csv, line 1: fields are separated by {called}")


@pytest.mark.parametrize(
    ("name", "new"), [("agiqa-3k", "AGIQA-3K"), ("agiqa-3k", "Images"), ("pipal", "Dist_Imgs")]
)
def test_pictures_are_found_in_the_folders_of_the_archives(name, new, made):
    folder, expected = made(name)
    (folder / new).mkdir()
    for image in expected:
        (folder / image).rename(folder / new / Path(image).name)
    found = load_ratings(name, folder).set_index("image")["mos"]
    assert found.to_dict() == {f"{new}/{Path(image).name}": mos for image, (mos, _) in expected.items()}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("min19", "dehaze_test_all.txt", "Dehazing.TXT"),
        ("kadid-10k", "dmos.csv", "DMOS.csv"),
        ("sriqa-bench", "MOS", "mos"),
    ],
)
def test_upper_and_lower_case_of_annotations_do_not_matter(name, old, new, made):
    folder, expected = made(name)
    (folder / old).rename(folder / new)
    assert len(load_ratings(name, folder)) == len(expected)


def test_a_mos_beyond_its_scale_by_more_than_rounding_is_refused(made):
    folder, _ = made("sriqa-bench")
    change("MOS/online50.txt", "100.00000000000001", "100.001")(folder)
    refused("sriqa-bench", folder, r"online50\.txt, line 1: mos '100\.001' is not a number from 0 to 100")


# Splits


@pytest.mark.parametrize(
    ("references", "each", "counts"),
    [
        (81, 125, (6125, 2000, 2000)),
        (25, 120, (1800, 600, 600)),
        (30, 29, (522, 174, 174)),
        (200, 116, (13920, 4640, 4640)),
        (586, 1, (352, 117, 117)),
    ],
    ids=["kadid-10k: the paper's counts", "tid2013", "csiq", "pipal", "bid"],
)
def test_the_seeded_split_is_by_reference(references, each, counts):
    rows = pd.Series(np.repeat([f"R{n}" for n in range(references)], each))
    split = seeded_split(rows)
    assert tuple(split.value_counts()[["train", "val", "test"]]) == counts
    assert split.groupby(rows).nunique().max() == 1
    assert (
        split == seeded_split(rows.sample(frac=1, random_state=1)).sort_index()
    ).all()  # whatever the order of the rows
    assert (split != seeded_split(rows, seed=1)).any()


@pytest.mark.parametrize("name", [name for name, entry in PUBLIC_SETS.items() if entry.split == "seeded"])
def test_no_reference_is_in_two_splits(name, made):
    frame = load_ratings(name, made(name)[0])
    assert frame.groupby("reference")["split"].nunique().max() == 1


def test_sets_that_are_test_sets_have_nothing_to_train_on(made):
    for name in ("liu13", "min19", "sriqa-bench"):
        assert set(load_ratings(name, made(name)[0])["split"]) == {"test"}


def splits(folder, **lists):
    for name in ("train", "val", "test"):
        text(folder / "splits" / f"{name}.txt", lists.get(name, []))


def kadid_lines(*references):
    """Return lines as the official VisualQuality-R1 repository has them: name mos std."""
    return [f"I0{ref}_03_0{level}.png 3.0 0.7" for ref in references for level in range(1, 6)]


def test_lists_of_an_official_split_go_before_the_seeded_one(made):
    folder, _ = made("kadid-10k")
    splits(
        folder,
        train=kadid_lines(2, 4),
        val=kadid_lines(5),
        test=[f"I01.png {line}" for line in kadid_lines(1)],
    )
    frame = load_ratings("kadid-10k", folder)
    found = frame.drop_duplicates("reference").set_index("reference")["split"].to_dict()
    assert found == {
        "I01.png": "test",
        "I02.png": "train",
        "I03.png": "",
        "I04.png": "train",
        "I05.png": "val",
    }


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            {"train": kadid_lines(1), "test": kadid_lines(1)},
            r"test\.txt, line 1: .* that no earlier line has",
        ),
        (
            {"train": kadid_lines(1)[:3], "test": kadid_lines(1)[3:]},
            r"reference 'I01\.png' is in more than one",
        ),
        (
            {"val": ["I09_03_01.png"]},
            r"val\.txt, line 1: 'I09_03_01\.png' does not name one picture of the set",
        ),
        ({"val": ["I01_03_01.png I01_03_02.png"]}, r"val\.txt, line 1: .*does not name one picture"),
    ],
)
def test_lists_that_leak_or_name_nothing_are_refused(lists, message, made):
    folder, _ = made("kadid-10k")
    splits(folder, **lists)
    refused("kadid-10k", folder, message)


def test_a_split_needs_its_three_lists(made):
    folder, _ = made("kadid-10k")
    splits(folder)
    (folder / "splits" / "val.txt").unlink()
    refused("kadid-10k", folder, r"val\.txt is missing", FileNotFoundError)


# Wrong files


def change(path: str, old: str, new: str):
    """Return a fault that replaces a text in a file, which must contain it."""

    def fault(folder: Path) -> None:
        content = (folder / path).read_bytes().decode()
        assert old in content
        (folder / path).write_bytes(content.replace(old, new, 1).encode())

    return fault


def cell(path: str, row: int, column: int, value):
    def fault(folder: Path) -> None:
        book = load_workbook(folder / path)
        book.active.cell(row, column).value = value
        book.save(folder / path)

    return fault


def mat(**values):
    def fault(folder: Path) -> None:
        matlab(folder, **({"names": ["1.bmp", "2.bmp"], "mos": [3.0, 4.0], "std": [1.0, 1.0]} | values))

    return fault


def bytes_of(path: str, content: bytes):
    return lambda folder: (folder / path).write_bytes(content)


def without(path: str):
    return lambda folder: (folder / path).unlink()


def votes(columns: list):
    quality = np.array(columns, dtype=float).T
    return lambda folder: savemat(folder / "HumanStudy/HumanScores/10.mat", {"quality": quality})


def rolled_scores(folder):
    """Make an easy mistake: give the scores of the 608 to the first 608 names."""
    path = folder / "Datasets/SRIJ/hScoresSRIJ.mat"
    savemat(path, {"hScoresSRIJ": np.roll(loadmat(path)["hScoresSRIJ"], 3)})


def scores_of_all(folder):
    savemat(folder / "Datasets/SRIJ/hScoresSRIJ.mat", {"hScoresSRIJ": np.ones((21, 1))})


def a_pair_again(folder):
    cell("pair_label.xlsx", 3, 1, 3)(folder)
    cell("pair_label.xlsx", 3, 2, 1)(folder)


SPAQ_FILE = "Annotations/MOS and Image attribute scores.xlsx"
FAULTS = {
    "kadid: the header of a std that is a variance": (
        "kadid-10k",
        change("dmos.csv", "dmos,var", "dmos,std"),
        r"dmos\.csv, line 1: column 'var' is missing from the header dist_img, ref_img, dmos, std",
    ),
    "kadid: no header": (
        "kadid-10k",
        change("dmos.csv", "dist_img,ref_img,dmos,var\n", ""),
        r"line 1: column 'dist_img' is missing",
    ),
    "kadid: a word for a number": (
        "kadid-10k",
        change("dmos.csv", "4.10", "good"),
        r"dmos\.csv, line 3: mos 'good' is not a number from 1 to 5",
    ),
    "kadid: no number": ("kadid-10k", change("dmos.csv", "4.10", ""), r"line 3: mos '' is not a number"),
    "kadid: another scale": (
        "kadid-10k",
        change("dmos.csv", "4.10", "82"),
        r"line 3: mos '82' is not a number from 1 to 5, the published scale",
    ),
    "kadid: a negative variance": (
        "kadid-10k",
        change("dmos.csv", "0.496", "-0.5"),
        r"line 2: std '-0\.5' is not a number >= 0",
    ),
    "kadid: a type that there is not": (
        "kadid-10k",
        change("dmos.csv", "I01_03_01.png", "I01_26_01.png"),
        r"line 2: name 'I01_26_01\.png' is not like I01_01_01\.png",
    ),
    "kadid: a picture twice": (
        "kadid-10k",
        change("dmos.csv", "I01_03_02.png", "I01_03_01.png"),
        r"line 3: name 'I01_03_01\.png' is there twice",
    ),
    "kadid: empty": ("kadid-10k", bytes_of("dmos.csv", b""), r"dmos\.csv: not a CSV in UTF-8 with a header"),
    "kadid: a header alone": (
        "kadid-10k",
        bytes_of("dmos.csv", b"dist_img,ref_img,dmos,var\n"),
        r"dmos\.csv: no rows; expected dmos\.csv, and the pictures in images/",
    ),
    "kadid: not text": (
        "kadid-10k",
        bytes_of("dmos.csv", b"dist_img,ref_img,dmos,var\n\xff\xfe,,,\n"),
        r"dmos\.csv: not a CSV in UTF-8",
    ),
    "tid: name first": (
        "tid2013",
        change("mos_with_names.txt", "5.51429 I01_01_1.bmp", "I01_01_1.bmp 5.51429"),
        r"mos_with_names\.txt, line 1: name '5\.51429' is not like",
    ),
    "tid: mos.txt without names": (
        "tid2013",
        change("mos_with_names.txt", " I01_01_1.bmp", ""),
        r"line 1: 1 fields; expected 2: mos name, no header",
    ),
    "tid: deviations are missing": (
        "tid2013",
        without("mos_std.txt"),
        r"mos_std\.txt is missing; it belongs to the annotation",
    ),
    "tid: one deviation too few": (
        "tid2013",
        change("mos_std.txt", "0.13013\r\n", ""),
        r"mos_with_names\.txt has 6 rows, mos_std\.txt 5",
    ),
    "tid: not text": (
        "tid2013",
        bytes_of("mos_std.txt", b"\xff\xfe"),
        r"mos_std\.txt: not a text file in UTF-8",
    ),
    "koniq: a set of another name": (
        "koniq-10k",
        change("koniq10k_distributions_sets.csv", ",test", ",dev"),
        r"sets\.csv, line 3: split 'dev' is not training, validation or test",
    ),
    "koniq: no sets in the sets file": (
        "koniq-10k",
        change("koniq10k_distributions_sets.csv", "SD,set", "SD,part"),
        r"line 1: column 'set' is missing",
    ),
    "spaq: another header": (
        "spaq",
        cell(SPAQ_FILE, 1, 2, "Score"),
        r"line 1: column 'MOS' is missing from the header Image name, Score, Brightness",
    ),
    "spaq: a word for a number": (
        "spaq",
        cell(SPAQ_FILE, 3, 2, "n/a?"),
        r"scores\.xlsx, line 3: mos 'n/a\?' is not a number from 0 to 100",
    ),
    "spaq: no workbook": (
        "spaq",
        bytes_of(SPAQ_FILE, b"Image name,MOS\n"),
        r"scores\.xlsx: not an \.xlsx workbook with sheet 0 .*save",
    ),
    "clive: lengths differ": ("clive", mat(mos=[3.0]), r"Data: 2 names, 1 MOS and 2 deviations"),
    "clive: not a number": (
        "clive",
        mat(mos=[3.0, NAN]),
        r"Data, entry 2: mos nan is not a number from 0 to 100",
    ),
    "clive: another file": (
        "clive",
        bytes_of("Data/AllMOS_release.mat", b"no MATLAB file at all, but long enough to have a header " * 4),
        r"AllMOS_release\.mat: not a MATLAB file",
    ),
    "clive: an empty file": (
        "clive",
        bytes_of("Data/AllMOS_release.mat", b""),
        r"AllMOS_release\.mat: not a MATLAB file",
    ),
    "clive: another variable": (
        "clive",
        lambda folder: savemat(folder / "Data/AllMOS_release.mat", {"mos": np.ones((1, 10))}),
        r"AllMOS_release\.mat: holds no variable AllMOS_release",
    ),
    "clive: deviations are missing": (
        "clive",
        without("Data/AllStdDev_release.mat"),
        r"AllStdDev_release\.mat is missing",
    ),
    "bid: a name for a number": (
        "bid",
        cell("DatabaseGrades.xlsx", 2, 1, "one"),
        r"DatabaseGrades\.xlsx, line 2: name 'one' is not an image number",
    ),
    "bid: another header": (
        "bid",
        cell("DatabaseGrades.xlsx", 1, 2, "Grade"),
        r"column 'Average Subjective Grade' is missing",
    ),
    "pipal: spaces for commas": (
        "pipal",
        change("Train_Label/A0002.txt", ",", " "),
        r"A0002\.txt, line 1: 1 fields; expected 2: name,mos, no header",
    ),
    "pipal: an infinite rating": (
        "pipal",
        change("Train_Label/A0001.txt", "1397.2", "inf"),
        r"A0001\.txt, line 2: mos 'inf' is not a number from 0 to 3000",
    ),
    "csiq: another type": (
        "csiq",
        cell("csiq.DMOS.xlsx", 5, 6, "rain"),
        r"csiq\.DMOS\.xlsx, line 5: type 'rain' is not one of noise, blur",
    ),
    "csiq: DMOS of 0..100": (
        "csiq",
        cell("csiq.DMOS.xlsx", 6, 9, 70),
        r"csiq\.DMOS\.xlsx, line 6: mos '70' is not a number from 0 to 1",
    ),
    "csiq: the header moved": (
        "csiq",
        lambda folder: sheet(
            folder / "csiq.DMOS.xlsx", [["image", "dst_type"], [1], [2], [3], [4]], "all_by_image"
        ),
        r"csiq\.DMOS\.xlsx, line 4: column 'image' is missing",
    ),
    "csiq: another sheet": (
        "csiq",
        lambda folder: sheet(folder / "csiq.DMOS.xlsx", [[1]], "all_by_distortion"),
        r"not an \.xlsx workbook with sheet 'all_by_image'",
    ),
    "liu13: name and mos alone": (
        "liu13",
        change("Deblur_test_all.txt", "a.png a_1.png", "a_1.png"),
        r"Deblur_test_all\.txt, line 1: 2 fields; expected 3: reference name mos",
    ),
    "sriqa: a header": (
        "sriqa-bench",
        change("MOS/online50.txt", "online50", "name,score\nonline50"),
        r"online50\.txt, line 1: mos 'score' is not a number from 0 to 100",
    ),
    "biq: the training part is missing": (
        "biq2021",
        without("Train (Images and MOS).csv"),
        r"Train \(Images and MOS\)\.csv is missing; it belongs to the annotation",
    ),
    "biq: another header": (
        "biq2021",
        change("Test (Images and MOS).csv", "Image Name", "Name"),
        r"Test .*\.csv, line 1: column 'Image Name' is missing",
    ),
    "biq: a MOS of 0..100": (
        "biq2021",
        change("Train (Images and MOS).csv", "0.3562", "35.62"),
        r"Train .*\.csv, line 3: mos '35\.62' is not a number from 0 to 1",
    ),
    "biq: a name of the workbook": (
        "biq2021",
        change("Train (Images and MOS).csv", "ss01 (5).jpg", "Images (5).jpg"),
        r"Train .*\.csv, line 2: name 'Images \(5\)\.jpg' is not like ss01 \(1\)\.jpg",
    ),
    "biq: a picture in both parts": (
        "biq2021",
        change("Test (Images and MOS).csv", "ss03 (10).jpg", "ss03 (961).jpg"),
        r"Test .*\.csv, line 3: name 'ss03 \(961\)\.jpg' is there twice",
    ),
    "srij: scores of other pictures": (
        "srij",
        rolled_scores,
        r"addressesSRIJ\.mat, entry 1: mos .* is not what the votes in HumanStudy/HumanScores give",
    ),
    "srij: scores of the originals too": (
        "srij",
        scores_of_all,
        r"hScoresSRIJ\.mat: 21 scores for 14 pictures",
    ),
    "srij: names are missing": (
        "srij",
        without("Datasets/SRIJ/addressesSRIJ.mat"),
        r"addressesSRIJ\.mat is missing",
    ),
    "srij: one vote too few": (
        "srij",
        votes([range(1, 21), range(20)]),
        r"10\.mat: column 1 of quality is not 1 to 21, once each",
    ),
    "srij: a picture is voted on twice": (
        "srij",
        votes([[1, *range(1, 21)], range(21)]),
        r"10\.mat: column 1 of quality is not 1 to 21",
    ),
    "srij: a vote that is no number": (
        "srij",
        votes([range(1, 22), [NAN, *range(20)]]),
        r"10\.mat: a vote is not a number from 0 to 100",
    ),
    "srij: an observer who does not care": (
        "srij",
        votes([range(1, 22), [50] * 21]),
        r"10\.mat: all votes are 50\.0",
    ),
    "pcuid: comparisons are missing": ("pcuid", without("pair_label.xlsx"), r"pair_label\.xlsx is missing"),
    "pcuid: another header": (
        "pcuid",
        cell("pair_label.xlsx", 1, 3, "label"),
        r"pair_label\.xlsx, line 1: column '标签.* is missing",
    ),
    "pcuid: a label that there is not": (
        "pcuid",
        cell("pair_label.xlsx", 3, 3, 2),
        r"pair_label\.xlsx, line 3: label '2' is not -1, 0 or 1",
    ),
    "pcuid: a picture with itself": (
        "pcuid",
        cell("pair_label.xlsx", 2, 2, 1),
        r"pair_label\.xlsx, line 2: second '1' is compared with itself",
    ),
    "pcuid: a pair twice": (
        "pcuid",
        a_pair_again,
        r"pair_label\.xlsx, line 3: second '1' was compared with the first on an earlier line",
    ),
    "pcuid: a name for a number": (
        "pcuid",
        cell("pair_label.xlsx", 4, 1, "two"),
        r"pair_label\.xlsx, line 4: first 'two' is not a picture's number",
    ),
    "pcuid: a pair is missing": (
        "pcuid",
        cell("pair_label.xlsx", 11, 2, 6),
        r"MOS\.xlsx, line 5: name '图片4\.jpg' is not compared once with every other picture",
    ),
    "pcuid: a MOS that the labels do not give": (
        "pcuid",
        cell("MOS.xlsx", 3, 2, 78.5),
        r"MOS\.xlsx, line 3: mos '78\.5' is not the share of wins",
    ),
    "agiqa: the alignment alone": (
        "agiqa-3k",
        change("data.csv", "mos_quality", "mos"),
        r"data\.csv, line 1: column 'mos_quality' is missing",
    ),
}


@pytest.mark.parametrize(("name", "fault", "message"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_file_is_named_with_line_and_value(name, fault, message, made):
    folder, _ = made(name)
    fault(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_ratings(name, folder)


def test_blank_lines_and_a_byte_order_mark_do_no_harm(made):
    folder, expected = made("kadid-10k")
    content = (folder / "dmos.csv").read_text().replace("\nI02_03_01", "\n\nI02_03_01")
    (folder / "dmos.csv").write_text(content + "\n\n", encoding="utf-8-sig")
    assert len(load_ratings("kadid-10k", folder)) == len(expected)
    folder, expected = made("tid2013")
    (folder / "mos_with_names.txt").write_bytes((folder / "mos_with_names.txt").read_bytes() + b"\r\n\r\n")
    assert len(load_ratings("tid2013", folder)) == len(expected)


# vqr1 data


def test_vqr1_data_lists_every_public_set(capsys):
    assert main(["data", "--list"]) == 0
    said = capsys.readouterr().out
    for name, entry in PUBLIC_SETS.items():
        assert f"{name}: {entry.title}; {entry.rows} pictures" in said
        assert (
            f"where: {entry.source}" in said
            and f"size: {entry.size}; licence: {entry.licence}" in said
            and entry.note in said
        )


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_vqr1_data_describes_a_set(name, made, capsys, monkeypatch):
    folder, expected = made(name)
    assert main(["data", name, "--root", str(folder.parent)]) == 0
    said = capsys.readouterr().out
    assert (
        f"{name}, in {folder}" in said
        and f"pictures    {len(expected)}; published: {PUBLIC_SETS[name].rows}" in said
        and PUBLIC_SETS[name].note in said
    )
    mos = [numbers[0] for numbers in expected.values()]
    assert f"mos         {min(mos):.4g} to {max(mos):.4g}, higher is better" in said
    counts = dict(re.findall(r"(train|val|test) (\d+)", said.partition("splits ")[2].splitlines()[0]))
    assert sum(map(int, counts.values())) == len(expected)
    monkeypatch.setenv("VQR1_DATA", str(folder.parent))
    assert main(["data", name]) == 0 and capsys.readouterr().out == said


def test_vqr1_data_counts_what_is_missing(made, capsys):
    folder, _ = made("kadid-10k")
    for level in range(1, 4):
        (folder / "images" / f"I01_03_0{level}.png").unlink()
    assert main(["data", "kadid-10k", "--root", str(folder)]) == 1
    said = capsys.readouterr()
    assert "pictures    22, 3 missing; published: 10125" in said.out and "missing: I01_03_02.png" in said.out
    assert "expected: dmos.csv, and the pictures in images/" in said.err


def test_vqr1_data_names_what_is_wrong(made, capsys):
    folder, _ = made("kadid-10k")
    change("dmos.csv", "4.10", "good")(folder)
    assert main(["data", "kadid-10k", "--root", str(folder)]) == 2
    assert "dmos.csv, line 3: mos 'good' is not a number" in capsys.readouterr().err
    assert main(["data", "kadid", "--root", str(folder)]) == 2
    assert "unknown set 'kadid'" in capsys.readouterr().err


def test_vqr1_data_describes_a_manifest_and_an_embedded_set(tmp_path, capsys):
    picture(tmp_path / "a.png")
    text(tmp_path / "mine.csv", [",".join(MANIFEST_COLUMNS), "a.png,mine,3.5,,a,,,,,"])
    assert main(["data", str(tmp_path / "mine.csv")]) == 0
    assert (
        "pictures    1\nmos         3.5 to 3.5" in (said := capsys.readouterr().out)
        and "std         none" in said
        and "splits      none 1" in said
    )
    assert main(["data", "sim-unseen"]) == 0
    assert "splits      test 720" in capsys.readouterr().out


def test_without_openpyxl_an_excel_set_says_what_to_install(made, monkeypatch):
    folder, _ = made("spaq")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match=r"xlsx: Excel .* openpyxl, .*pip install 'vqr1\[excel\]'"):
        load_ratings("spaq", folder)


def test_pyiqas_name_of_a_set_is_known(made):
    folder, _ = made("clive")
    folder = folder.rename(folder.with_name("LIVEC"))
    frame = load_ratings("livec", folder.parent)
    assert set(frame["dataset"]) == {"clive"} and frame.attrs["root"] == str(folder)
