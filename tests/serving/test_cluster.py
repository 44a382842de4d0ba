"""Two actors of a local Ray cluster equal one process; an actor's work is tested without Ray, too."""

import csv
import sys
from pathlib import Path

import pytest

from vqr1.cli import main
from vqr1.data.folders import find_pictures
from vqr1.scoring import DEFAULTS, Scorer
from vqr1.serving.bulk import ROW_COLUMNS, RowFile, score_rows
from vqr1.serving.cluster import Rater, pictures_in

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {key: value for key, value in DEFAULTS.items() if key in ROW_COLUMNS} | {
    "k": 1,
    "thinking": True,
    "numbered": False,
}


@pytest.fixture
def pictures(tmp_path, photo):
    """Return a folder with eleven pictures in two folders, two of them broken, and two other files."""
    folder = tmp_path / "some pictures"
    (folder / "more").mkdir(parents=True)
    for i in range(9):
        photo.crop((20 * i, 10 * i, 20 * i + 64 + 32 * (i % 3), 10 * i + 64)).save(
            folder / ("more" if i % 2 else "") / f"bîld {i}.png"
        )
    (folder / "cut.png").write_bytes((folder / "bîld 0.png").read_bytes()[:2000])
    (folder / "more" / "empty.JPG").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    return str(folder)


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def single_run(folder, out):
    """Return the rows of one process."""
    names = find_pictures([folder])
    with RowFile(out, SETTINGS) as file:
        for rows in score_rows(Scorer(), names, SETTINGS):
            file.write(rows)
    return read(out)


def same(rows, others):
    """Compare rows exactly, except scores: these to 1e-4, to which they are rounded."""
    numbers = ("score", "std", "mass")
    assert [{k: v for k, v in row.items() if k not in numbers} for row in rows] == [
        {k: v for k, v in row.items() if k not in numbers} for row in others
    ]
    for key in numbers:
        assert [float(row[key] or -1) for row in rows] == pytest.approx(
            [float(row[key] or -1) for row in others], abs=1.5e-4
        )


@pytest.fixture
def ray(monkeypatch):
    """Start Ray on this machine; its processes end with the test, however it ends."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of its workers
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow  # starts Ray
def test_two_actors_give_the_rows_of_one_process(ray, pictures, tmp_path, capsys):
    out = tmp_path / "rows.csv"
    while True:
        try:
            assert main(["score", pictures, "--out", str(out), "--actors", "2", "--batch-size", "2"]) == 1
            break
        except (
            Exception
        ) as error:  # Ray gives its own processes 30 s to start, which a loaded machine can miss
            if "timed out during startup" not in str(error):
                raise
    assert "11 pictures; 2 without a score" in capsys.readouterr().out and not ray.is_initialized()
    rows = read(out)
    assert (
        len(rows) == 11
        and tuple(rows[0]) == ROW_COLUMNS
        and len({row["score"] for row in rows if row["score"]}) > 5
    )
    same(rows, single_run(pictures, tmp_path / "single.csv"))


def test_an_actors_rows_are_those_of_one_process(pictures, tmp_path):
    names = pictures_in(pictures)
    rater = Rater(pictures, SETTINGS, 4)
    with RowFile(tmp_path / "rows.csv", SETTINGS) as file:
        for i in range(0, len(names), 5):
            file.write(rater.rows(names[i : i + 5]))
    same(read(tmp_path / "rows.csv"), single_run(pictures, tmp_path / "single.csv"))


def test_a_picture_that_cannot_be_fetched_is_a_row_with_its_error(pictures):
    row, other = Rater(pictures, SETTINGS, 4).rows(["gone.png", "bîld 0.png"])
    assert row["image"] == f"{pictures}/gone.png" and row["score"] is None
    assert row["error"].startswith(f"{pictures}/gone.png cannot be fetched (") and not other["error"]


def test_what_is_there_is_not_scored_again_and_ray_not_started(pictures, tmp_path, capsys):
    rows = single_run(pictures, tmp_path / "rows.csv")
    assert main(["score", pictures, "--out", str(tmp_path / "rows.csv"), "--actors", "2"]) == 1
    assert (
        "11 pictures, 11 of them from before; 2 without a score" in capsys.readouterr().out
        and read(tmp_path / "rows.csv") == rows
    )


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("", "rows.csv", "holds no picture"),
        ("nowhere", "rows.csv", "cannot be listed"),
        ("bad://x", "rows.csv", "no place"),
    ],
)
def test_what_cannot_be_used_is_named(source, out, message, tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    source = source if "://" in source else str(tmp_path / "rows" / source)
    assert main(["score", source, "--out", str(tmp_path / out), "--actors", "2"]) == 2
    assert message in capsys.readouterr().err


def test_without_ray_the_message_says_what_to_install(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["score", pictures, "--out", str(tmp_path / "rows.csv"), "--actors", "2"]) == 2
    assert "pip install 'vqr1[scale]'" in capsys.readouterr().err
