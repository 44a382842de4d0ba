"""A folder of pictures and a table of ratings become a manifest; what cannot is named."""

import os
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from vqr1.data.manifests import read_manifest
from vqr1.data.own import write_manifest


def draw(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, "png")
    return folder


@pytest.fixture
def trip(tmp_path) -> Path:
    """Return a folder of twelve pictures, two of them with one name."""
    names = [f"{letter}.jpg" for letter in "abcdefghij"]
    return draw(tmp_path / "trip", *names, "day1/market.JPG", "day2/market.jpg")


def ratings(folder: Path, *lines: str) -> Path:
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


EIGHT = [f"{letter},{n}" for n, letter in enumerate("abcdefgh")]


def test_what_is_missing_is_filled_in(trip):
    said = write_manifest(ratings(trip, "image,mos", *EIGHT, "day2/Market.jpg,9.5", "j,"))
    rows = read_manifest(trip / "manifest.csv")
    assert list(rows["image"]) == [*(f"{letter}.jpg" for letter in "abcdefgh"), "day2/market.jpg"]
    assert list(rows["mos"]) == [*range(8), 9.5] and set(rows["dataset"]) == {"trip"}
    assert rows["split"].value_counts().to_dict() == {"train": 5, "val": 2, "test": 2}
    assert (trip / "manifest.csv").read_text(encoding="utf-8").startswith("image,dataset,mos,split\n")
    assert said.splitlines() == [
        f"{trip / 'manifest.csv'}: 9 pictures",
        "columns     image from 'image', mos from 'mos'",
        "mos         0 to 9.5, higher is better",
        "splits      train 5, val 2, test 2",
        "left out    day1/market.JPG: no rating",
        "left out    i.jpg: no rating",
        "left out    j.jpg: no rating",
    ]


@pytest.mark.parametrize(
    ("head", "taken"),
    [
        ("File Name,Score", "image from 'File Name', mos from 'Score'"),
        ("path,rating", "image from 'path', mos from 'rating'"),
        ("Picture,MOS", "image from 'Picture', mos from 'MOS'"),
    ],
)
def test_columns_go_by_common_names(head, taken, trip):
    assert f"columns     {taken}\n" in write_manifest(ratings(trip, head, *EIGHT))
    assert len(read_manifest(trip / "manifest.csv")) == 8


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("i", "i.jpg"),
        ("I.JPG", "i.jpg"),
        ("./i.jpg", "i.jpg"),
        (r"C:\\photos\\trip\\i.jpg", "i.jpg"),
        ("day1/market", "day1/market.JPG"),
        ("trip/Day1/market.jpg", "day1/market.JPG"),
    ],
)
def test_endings_and_folders_may_be_missing_and_case_may_differ(written, meant, trip):
    write_manifest(ratings(trip, "image,mos", *EIGHT, f"{written},9"))
    assert read_manifest(trip / "manifest.csv")["image"].iloc[-1] == meant


def test_the_very_name_comes_before_a_likely_one(tmp_path):
    folder = draw(tmp_path / "trip", *(f"{letter}.jpg" for letter in "abcdefgh"), "day1/a.jpg", "B.jpg")
    write_manifest(ratings(folder, "image,mos", "a.jpg,1", "day1/a,2", "b.jpg,3", "B.jpg,4", "c,5", "d,6"))
    assert list(read_manifest(folder / "manifest.csv")["image"]) == [
        *("a.jpg", "day1/a.jpg", "b.jpg", "B.jpg", "c.jpg", "d.jpg")
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sea.jpg,3", r"line 10: image 'sea.jpg' is no picture in .*trip; correct the name, or take the row"),
        ("a.png,3", r"line 10: image 'a.png' is no picture in"),
        ("day3/a,3", None),
        ("day3/market,3", r"line 10: image 'day3/market' is no picture in"),
        ("market,3", r"line 10: image 'market' may be day1/market.JPG or day2/market.jpg; write which"),
        ("C.jpg,3", r"line 10: image 'C.jpg' has a rating on line 4 too; keep one row, with the mean"),
        ("i,good", r"line 10: mos 'good' is not a number; write it with a point, or leave it empty"),
        ('i,"3,5"', r"line 10: mos '3,5' is not a number"),
        ("i,nan", r"line 10: mos 'nan' is not a number"),
        (",3", r"line 10: image '' is no picture in"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(line, said, trip):
    lines = ["image,mos", *EIGHT, line] if said else ["image,mos", *EIGHT[1:], line]
    if said is None:  # the folder in front is not below ours, so only the name counts
        write_manifest(ratings(trip, *lines))
        return
    with pytest.raises(ValueError, match=rf"ratings\.csv, {said}"):
        write_manifest(ratings(trip, *lines))
    assert not (trip / "manifest.csv").exists()


def test_an_error_calls_columns_as_the_file_does(trip):
    with pytest.raises(ValueError, match="line 10: Score 'x' is not a number"):
        write_manifest(ratings(trip, "File,Score", *EIGHT, "i,x"))


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("photo,mos", "line 1: no column for the picture in the header photo, mos; call it one of image, "),
        ("image,dmos", "line 1: no column for its rating in the header image, dmos; call it one of mos, "),
    ],
)
def test_a_header_without_picture_or_rating_says_how_to_call_it(head, said, trip):
    """A dmos is lower for better pictures, so it is not taken for a mos."""
    with pytest.raises(ValueError, match=said):
        write_manifest(ratings(trip, head, *EIGHT))


@pytest.mark.parametrize("lines", [EIGHT[:5], [f"{row}," for row in "abcdefgh"]])
def test_too_few_ratings_say_how_many_are_needed(lines, trip):
    with pytest.raises(ValueError, match="rate at least 6 pictures"):
        write_manifest(ratings(trip, "image,mos", *lines))


def test_six_pictures_are_two_for_each_split(trip):
    write_manifest(ratings(trip, "image,mos", *EIGHT[:6]))
    assert set(read_manifest(trip / "manifest.csv")["split"].value_counts()) == {2}


def test_versions_of_a_picture_share_a_split(trip):
    """The original leaves its reference empty; a version names it as it likes."""
    rows = [
        f"{letter},{n},{'' if letter in 'aceg' else chr(ord(letter) - 1)}"
        for n, letter in enumerate("abcdefgh")
    ]
    write_manifest(ratings(trip, "image,mos,reference", *rows))
    frame = read_manifest(trip / "manifest.csv")
    assert list(frame["reference"]) == [f"{letter}.jpg" for letter in "aacceegg"]
    assert (frame.groupby("reference")["split"].nunique() == 1).all()
    assert frame["split"].nunique() == 3


def test_given_sets_and_splits_are_kept(trip):
    parts = ["train", "train", "val", "val", "test", "test", "", ""]
    rows = [f"{row},{'far' if n else ''},{part}" for n, (row, part) in enumerate(zip(EIGHT, parts))]
    write_manifest(ratings(trip, "image,mos,dataset,split", *rows))
    frame = read_manifest(trip / "manifest.csv")
    assert list(frame["split"][:6]) == parts[:6] and (frame["split"] != "").all()
    assert list(frame["dataset"]) == ["trip"] + ["far"] * 7


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("training", "line 10: split 'training' is not train, val or test; leave it empty to draw one"),
        ("val", "line 10: split 'val' is not that of another picture with the same reference"),
    ],
)
def test_splits_that_cannot_be_are_named(split, said, trip):
    rows = [f"{row},,train" if row[0] == "a" else f"{row},," for row in EIGHT]
    with pytest.raises(ValueError, match=said):
        write_manifest(ratings(trip, "image,mos,reference,split", *rows, f"i,3,a,{split}"))


def test_a_manifest_elsewhere_finds_the_pictures(trip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.rename(ratings(trip, "image,mos", *EIGHT) / "ratings.csv", tmp_path / "mine.csv")
    write_manifest("trip", "mine.csv", "made/trip.csv")
    assert read_manifest("made/trip.csv")["image"].iloc[0] == "../trip/a.jpg"
    write_manifest("trip", "mine.csv", "trip.csv")
    assert read_manifest("trip.csv")["image"].iloc[0] == "trip/a.jpg"


def test_no_file_is_overwritten_and_missing_ones_are_named(trip):
    with pytest.raises(FileNotFoundError, match="ratings.csv is missing; write a CSV with the columns image"):
        write_manifest(trip)
    write_manifest(ratings(trip, "image,mos", *EIGHT))
    before = (trip / "manifest.csv").read_bytes()
    with pytest.raises(
        FileExistsError, match="manifest.csv is there already; delete it, or give another --out"
    ):
        write_manifest(trip)
    assert (trip / "manifest.csv").read_bytes() == before
    with pytest.raises(ValueError, match="'nowhere' is not a folder"):
        write_manifest("nowhere")


def test_many_pictures_without_a_rating_are_counted(tmp_path):
    folder = draw(tmp_path / "trip", *(f"{n}.png" for n in range(40)))
    said = write_manifest(ratings(folder, "image,mos", *(f"{n},{n}" for n in range(10))))
    assert said.count(": no rating") == 20 and said.endswith("left out    10 more without a rating")
    assert pd.read_csv(folder / "manifest.csv").columns.tolist() == ["image", "dataset", "mos", "split"]
