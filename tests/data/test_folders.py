"""Pictures are found in folders, globs and lists."""

import io
import os
import sys
from pathlib import Path

from PIL import Image

from vqr1.data.folders import find_pictures, picture_endings


def draw(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, "png")


def test_paths_stand_for_pictures_in_their_order_each_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(
        tmp_path,
        "b.png",
        "a b.JPG",
        "deep/er/ü.webp",
        "deep/z.tif",
        "deep/.hidden.png",
        ".cache/c.png",
        "x[1].png",
        "x1.png",
    )
    for name in ("notes.txt", "deep/clip.mpg", "deep/page.pdf"):
        (tmp_path / name).touch()
    assert find_pictures(["b.png", "deep", "./b.png", "deep/z.tif", "nowhere.png"]) == [
        "b.png",
        "deep/er/ü.webp",
        "deep/z.tif",
        "nowhere.png",
    ]
    assert find_pictures(["."]) == [
        "./a b.JPG",
        "./b.png",
        "./deep/er/ü.webp",
        "./deep/z.tif",
        "./x1.png",
        "./x[1].png",
    ]
    assert find_pictures(["*.png"]) == ["b.png", "x1.png", "x[1].png"]
    assert find_pictures(["x[1].png"]) == ["x[1].png"]  # a file of that name comes before a glob
    assert find_pictures(["**/*.t?f", "de*"]) == ["deep/z.tif", "deep/er/ü.webp"]
    assert find_pictures(["https://example.org/a.jpg?size=1"]) == ["https://example.org/a.jpg?size=1"]
    assert find_pictures(["notes.txt"]) == ["notes.txt"]  # named by hand: gets a row that says what it is


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    draw(tmp_path, "all/one.png", "elsewhere/two.png")
    (tmp_path / "all" / "loop").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "gone.png").symlink_to(tmp_path / "nowhere")
    found = find_pictures([str(tmp_path / "all")])
    assert [os.path.relpath(name, tmp_path / "all") for name in found] == [
        "gone.png",
        "link/two.png",
        "one.png",
    ]


def test_standard_input_gives_one_file_per_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a b.png\n\n*.png\r\ncaf\xe9.png\nlast")))
    names = find_pictures(["first.png", "-"])
    assert names == ["first.png", "a b.png", "*.png", "caf\udce9.png", "last"]


def test_endings_are_those_that_pillow_decodes():
    assert {
        ".heic",
        ".heif",
        ".hif",
        ".jpg",
        ".jpeg",
        ".png",
        ".gif",
        ".webp",
        ".avif",
        ".tif",
        ".tiff",
        ".bmp",
        ".jp2",
    } <= picture_endings()
    assert not {".pdf", ".mpg", ".eps", ".h5", ".txt"} & picture_endings()
