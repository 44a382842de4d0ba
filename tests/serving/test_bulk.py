"""Many pictures are found and scored; no row is lost or made twice."""

import csv
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vqr1.cli import main
from vqr1.data.folders import find_pictures
from vqr1.scoring import DEFAULTS
from vqr1.serving.bulk import ROW_COLUMNS, RowFile, shard

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {key: value for key, value in DEFAULTS.items() if key in ROW_COLUMNS} | {
    "k": 1,
    "thinking": True,
    "numbered": False,
}
SMALL = ["--batch-size", "1"]
"""Windows of 4 pictures, scored one by one, so that rows equal any other run's to the byte."""


def draw(folder: Path, *names: str) -> list[str]:
    """Write small pictures that all differ; return their paths."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).normal(128, 5 + number, (48, 64, 3)).clip(0, 255)
        Image.fromarray(noise.astype(np.uint8)).save(folder / name, "png")
    return [str(folder / name) for name in names]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Return a folder of 24 pictures."""
    draw(tmp_path / "photos", *(f"{number:02}.png" for number in range(24)))
    return tmp_path / "photos"


def row(image: str, **change) -> dict:
    return (
        {"image": image, "score": 3.25, "std": 0.5, "low": None, "high": None, "mass": 0.9}
        | SETTINGS
        | {"reasoning": "", "note": "", "error": ""}
        | change
    )


def read(path: Path) -> list[dict]:
    """Return a file's rows, with numbers as numbers."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()  # pandas would make None a NaN, which equals nothing
    if path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))


# Which pictures


def test_what_pillow_cannot_read_without_more_is_a_row_that_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    draw(tmp_path, "one.png")
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert main(["score", str(tmp_path), "https://example.org/a.jpg?size=1"]) == 1
    rows = {
        Path(row["image"]).name: row["error"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))
    }
    assert list(rows) == ["IMG_0001.HEIC", "one.png", "a.jpg?size=1"] and rows["one.png"] == ""
    assert (
        "pip install 'vqr1[heic]'" in rows["IMG_0001.HEIC"]
        and "is an address; download the picture first" in rows["a.jpg?size=1"]
    )


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("empty", "holds no picture that Pillow reads (.apng, .avif"),
        ("*.gif", "*.gif matches no picture"),
        ("-", "standard input lists no picture"),
    ],
)
def test_paths_without_a_picture_are_wrong_usage(path, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert main(["score", path]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes nobody for a moment, which only root can")
def test_a_folder_that_may_not_be_read_becomes_a_row_and_a_file_that_may_not_be_written_is_refused():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder, "one.png", "secret/two.png")
        (folder / "scores.csv").touch()
        folder.chmod(0o755), (folder / "secret").chmod(0o700)
        try:
            os.seteuid(65534)
            assert find_pictures([name]) == [f"{name}/one.png", f"{name}/secret"]
            for out in ("scores.csv", "new.jsonl", "new.parquet"):
                with pytest.raises(
                    ValueError, match=rf"{out} cannot be written \(Permission denied\); give another --out"
                ):
                    RowFile(folder / out, SETTINGS)
        finally:
            os.seteuid(0)


# Shards


@given(st.integers(0, 400), st.integers(1, 9), st.integers(1, 12))
@example(count=0, n=3, window=4)
def test_shards_are_disjoint_complete_in_order_and_even(count, n, window):
    pictures = [str(number) for number in range(count)]
    blocks = [shard(pictures, f"{i}/{n}", window) for i in range(1, n + 1)]
    assert sum(blocks, []) == pictures
    aligned = count >= 4 * n * window
    assert all(len(block) % window == 0 for block in blocks[:-1] if aligned)
    assert max(map(len, blocks)) - min(map(len, blocks)) <= (2 * window if aligned else 1)


@pytest.mark.parametrize("which", ["0/2", "3/2", "1", "1/0", "-1/2", "a/b", "1/2/3", "1.5/2", ""])
def test_a_wrong_shard_is_named(which):
    with pytest.raises(ValueError, match="is not i/n with 1 <= i <= n"):
        shard(["a"], which)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_merged_shards_are_the_single_run(kind, photos, tmp_path, capsys):
    """The README's merge is exact to the byte, even with an unreadable picture."""
    (photos / "07.png").write_text("a cat on a mat", encoding="utf-8")
    whole, parts = tmp_path / f"whole.{kind}", [tmp_path / f"part{i}.{kind}" for i in (1, 2, 3)]
    assert main(["score", str(photos), "--out", str(whole), *SMALL]) == 1
    codes = [
        main(["score", str(photos), "--shard", f"{i}/3", "--out", str(part), *SMALL])
        for i, part in enumerate(parts, 1)
    ]
    assert codes == [1, 0, 0]
    merge = ["cat"] if kind == "jsonl" else ["awk", "NR == 1 || FNR > 1"]
    assert subprocess.run([*merge, *parts], capture_output=True, check=True).stdout == whole.read_bytes()
    assert [Path(row["image"]).name for row in read(whole)] == [f"{number:02}.png" for number in range(24)]


def test_other_batches_change_a_score_by_less_than_it_is_rounded_to(photos, tmp_path, capsys):
    main(["score", str(photos), "--out", str(tmp_path / "a.csv"), "--batch-size", "5"])
    main(["score", str(photos), "--out", str(tmp_path / "b.csv"), *SMALL])
    one, two = pd.read_csv(tmp_path / "a.csv"), pd.read_csv(tmp_path / "b.csv")
    assert one["image"].tolist() == two["image"].tolist() and one["score"].nunique() > 12
    assert (one["score"] - two["score"]).abs().max() < 1.5e-4


# Rows


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5, unique_by=lambda pair: pair[0]),
    st.floats(0, 1),
    st.sampled_from([".csv", ".jsonl"]),
)
@example([('a"b\n', '"'), ("\r", '\n"",\n'), ("\0", ",")], 0.6, ".csv")
def test_a_file_cut_at_any_byte_goes_on_to_the_same_file(pairs, cut, kind):
    """A kill can end a write anywhere; names and texts hold quotes, line breaks and so on."""
    rows = [row(name, reasoning=text, error=text[::-1]) for name, text in pairs]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"scores{kind}"
        with RowFile(path, SETTINGS) as file:
            file.write(rows)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(cut * len(whole))])
        with RowFile(path, SETTINGS) as file:
            done = list(file.done)
            assert done == [name for name, _ in pairs][: len(done)] and (cut < 1 or len(done) == len(pairs))
            assert all(file.done[name] == bool(text) for name, text in pairs[: len(done)])
            file.write(rows[len(done) :])
        assert path.read_bytes() == whole
        assert [(found["image"], found["reasoning"]) for found in read(path)] == pairs


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_a_finished_file_takes_more_rows(kind, tmp_path):
    path = tmp_path / f"scores{kind}"
    for number in range(3):
        with RowFile(path, SETTINGS) as file:
            assert list(file.done) == [f"{n}.png" for n in range(number)]
            file.write(
                [row(f"{number}.png", score=None if number == 1 else number, error="torn" * (number == 1))]
            )
            file.finish()
    found = read(path)
    assert [list(r) for r in found] == [list(ROW_COLUMNS)] * 3 and [r["image"] for r in found] == [
        "0.png",
        "1.png",
        "2.png",
    ]
    assert [r["error"] for r in found] == ["", "torn", ""] and float(found[2]["score"]) == 2
    assert os.listdir(tmp_path) == [path.name]


def test_parquet_has_types_and_survives_a_kill_between_its_two_files(tmp_path):
    path, log = tmp_path / "scores.parquet", tmp_path / "scores.parquet.partial.jsonl"
    with RowFile(path, SETTINGS) as file:
        file.write([row("a.png"), row("b.png", score=None, std=None, error="gone")])
        rows = log.read_bytes()
        assert not path.exists()
        file.finish()
    log.write_bytes(rows + b'{"image": "c.p')  # the log was not removed yet, and its end is torn
    with RowFile(path, SETTINGS) as file:
        assert file.done == {"a.png": False, "b.png": True}
        file.finish()
    frame = pd.read_parquet(path)
    assert frame["score"].tolist()[0] == 3.25 and frame["score"].isna().tolist() == [False, True]
    assert frame["thinking"].tolist() == [True, True] and frame["k"].tolist() == [1, 1]


def test_no_rows_make_an_empty_table(tmp_path):
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        with RowFile(tmp_path / name, SETTINGS) as file:
            file.finish()
    assert (
        list(pd.read_parquet(tmp_path / "a.parquet"))
        == list(ROW_COLUMNS)
        == list(pd.read_csv(tmp_path / "a.csv"))
    )


@pytest.mark.parametrize(
    "change",
    [
        {"policy": "other"},
        {"estimate": "greedy"},
        {"k": 6},
        {"thinking": False},
        {"engine": "vllm"},
        {"quantize": True},
        {"pixels": [3136, 65536]},
        {"numbered": True},
        {"max_new_tokens": 512},
        {"repetition_penalty": 1.05},
    ],
)
@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_rows_of_other_settings_are_not_mixed(kind, change, tmp_path):
    path = tmp_path / f"scores{kind}"
    with RowFile(path, SETTINGS) as file:
        file.write([row("a.png")])
        file.finish()
    [(key, value)] = change.items()
    was = "unset" if SETTINGS[key] is None else SETTINGS[key]
    said = f"row 1, has {key} {was} where this command has {value}; give another --out"
    with pytest.raises(ValueError, match=re.escape(said)):
        RowFile(path, SETTINGS | change).__enter__()


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_rows_of_the_same_settings_are_added_to(kind, tmp_path):
    path, settings = tmp_path / f"scores{kind}", SETTINGS | {"quantize": True, "pixels": [3136, 65536]}
    for name in ("a.png", "b.png"):
        with RowFile(path, settings) as file:
            file.write([row(name, quantize=True, pixels=[3136, 65536])])
            file.finish()
    assert [one["image"] for one in read(path)] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"image,score\na.png,3\n"),
        ("a.csv", b"not even a table"),
        ("a.csv", ",".join(ROW_COLUMNS).encode() + b"\na.png,3\n"),
        ("a.jsonl", b'{"image": "a.png", "score": 3}\n'),
        ("a.jsonl", b'{"image": "a.png", oh\n'),
        ("a.jsonl", b"[1, 2]\n"),
        ("a.parquet", b"PAR1 no"),
        ("a.parquet", None),
    ],
)
def test_a_file_of_somebody_else_is_refused_and_left_alone(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content) if content else pd.DataFrame({"image": ["a.png"]}).to_parquet(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"was not written by vqr1 score|line 1, is damaged"):
        RowFile(path, SETTINGS).__enter__()
    assert path.read_bytes() == before and os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("scores.txt", "does not end with .csv, .jsonl or .parquet"),
        ("nowhere/scores.csv", "is missing; create it: mkdir -p"),
        ("folder.csv", "is not a file"),
        ("full.csv", "is not a file"),
    ],
)
def test_an_out_that_cannot_be_is_wrong_usage(out, said, photos, tmp_path, capsys):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "full.csv").symlink_to("/dev/full")
    assert main(["score", str(photos), "--out", str(tmp_path / out)]) == 2
    assert said in capsys.readouterr().err


def test_two_commands_do_not_write_to_one_file(photos, tmp_path, capsys):
    with RowFile(tmp_path / "scores.csv", SETTINGS):
        assert main(["score", str(photos), "--out", str(tmp_path / "scores.csv")]) == 2
    assert "another command is writing to" in capsys.readouterr().err


# The command


def test_any_picture_gets_a_row(tmp_path, photo, capsys):
    """One batch takes a folder of everything; files that are no pictures cost the others nothing."""
    folder, out = tmp_path / "some pictures", tmp_path / "scores.parquet"
    draw(folder, "naïve café \N{SNOWMAN}.png", "two\nlines.png", "0.png", os.fsdecode(b"caf\xe9.png"))
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("white", "red")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("P").save(folder / "palette.gif")
    photo.convert("RGBA").save(folder / "alpha.webp")
    Image.new("I;16", (30, 50), 40000).save(folder / "sixteen.png")
    Image.new("L", (1, 1)).save(folder / "one.png")
    Image.new("RGB", (5000, 4000), "green").save(folder / "large.jpg")
    good = len(os.listdir(folder))
    Image.new("L", (1, 4000)).save(folder / "thin.png")
    (folder / "truncated.jpg").write_bytes((ROOT / "data/photos/kitten.jpg").read_bytes()[:9000])
    (folder / "zero.png").touch()
    (folder / "text.jpg").write_text("a cat on a mat", encoding="utf-8")
    (folder / "broken.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    assert main(["score", str(folder), str(tmp_path / "missing.png"), "--out", str(out)]) == 1
    rows = {os.path.basename(row["image"]): row for row in read(out)}
    bad = {name for name, row in rows.items() if row["error"]}
    assert bad == {
        "thin.png",
        "truncated.jpg",
        "zero.png",
        "text.jpg",
        "broken.png",
        "pipe.png",
        "missing.png",
    }
    assert len(rows) == good + len(bad) and all(
        1 <= row["score"] < 6 for name, row in rows.items() if name not in bad
    )
    assert (
        rows["animated.gif"]["note"] == "frame 1 of several"
        and "shrunk from 5000x4000" in rows["large.jpg"]["note"]
    )
    assert rows["palette.gif"]["note"] == "" and {
        r"caf\xe9.png",
        "two\nlines.png",
        "naïve café \N{SNOWMAN}.png",
    } <= set(rows)
    assert f"{good + len(bad)} pictures; {len(bad)} without a score" in capsys.readouterr().out
    before = out.read_bytes()
    assert (
        main(["score", str(folder), str(tmp_path / "missing.png"), "--out", str(out)]) == 1
    )  # nothing left to do, still 1
    assert f"{len(rows)} of them from before" in capsys.readouterr().out and pd.read_parquet(out).equals(
        pd.read_parquet(io.BytesIO(before))
    )


@pytest.fixture
def start(started):
    """Start the command with SIGINT as in a terminal: a background runner ignores it.

    limit: bytes, the most that a file may hold.
    """

    def score(*arguments, limit: int = resource.RLIM_INFINITY, **options) -> subprocess.Popen:
        def prepare():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return started(
            [sys.executable, "-m", "vqr1.cli", "score", *map(str, arguments)], preexec_fn=prepare, **options
        )

    return score


def has_rows(path: Path, count: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= count


@pytest.mark.parametrize("out", ["scores.csv", "scores.parquet"])
def test_a_killed_run_goes_on_where_it_stopped(out, start, wait_until, tmp_path, capsys):
    """SIGKILL comes between or within windows.

    Pictures that have a row are then emptied, so a second look at one would show.
    """
    folder = tmp_path / "photos"
    pictures = draw(folder, *(f"{number:03}.png" for number in range(60)))
    log = tmp_path / (f"{out}.partial.jsonl" if out.endswith("parquet") else out)
    assert main(["score", str(folder), "--out", str(tmp_path / f"whole-{out}"), *SMALL]) == 0
    process = start(folder, "--out", tmp_path / out, *SMALL)
    wait_until(lambda: has_rows(log, 9), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    killed = log.read_bytes()
    assert killed.count(b"\n") < 60, "it was over before it was killed"
    with RowFile(tmp_path / out, SETTINGS) as file:
        done = set(file.done)
    assert 8 <= len(done) < 60
    for picture in done:
        open(picture, "w").close()
    capsys.readouterr()
    assert main(["score", str(folder), "--out", str(tmp_path / out), *SMALL]) == 0
    assert f"60 pictures, {len(done)} of them from before; 0 without" in capsys.readouterr().out
    assert (
        read(tmp_path / out) == read(tmp_path / f"whole-{out}")
        and [row["image"] for row in read(tmp_path / out)] == pictures
    )


def test_ctrl_c_says_what_is_kept(start, wait_until, tmp_path):
    draw(tmp_path / "photos", *(f"{number:03}.png" for number in range(60)))
    process = start(tmp_path / "photos", "--out", tmp_path / "scores.jsonl", *SMALL)
    wait_until(lambda: has_rows(tmp_path / "scores.jsonl", 1), process)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    rows = read(tmp_path / "scores.jsonl")
    assert process.returncode == 130 and "Traceback" not in said and 4 <= len(rows) < 60
    assert (
        f"Interrupted. {len(rows)} rows are in {tmp_path / 'scores.jsonl'}; the same command goes on "
        "from there." in said
    )
    assert "images/s" in said and "<" in said  # the bar: speed, and time gone < time left


def test_a_full_disk_keeps_the_rows_that_fit(photos, start, tmp_path, capsys):
    """A file-size limit ends a write in the middle, as a full disk does."""
    short = [*SMALL, "--no-thinking"]  # rows of some 130 bytes
    process = start(photos, "--out", tmp_path / "scores.csv", *short, limit=1000)
    said = process.communicate()[1]
    assert process.returncode == 1 and "Traceback" not in said
    assert "scores.csv: File too large." in said and "the same command goes on from there" in said
    content = (tmp_path / "scores.csv").read_bytes()
    assert 800 < len(content) <= 1000 and content.endswith(b"\n")
    rows = read(tmp_path / "scores.csv")
    assert main(["score", str(photos), "--out", str(tmp_path / "scores.csv"), *short]) == 0
    assert read(tmp_path / "scores.csv")[: len(rows)] == rows and len(read(tmp_path / "scores.csv")) == 24


def test_a_terminal_that_takes_no_more_is_no_crash(photos, start):
    with open("/dev/full", "w") as full:
        process = start(photos / "00.png", stdout=full)
        said = process.communicate()[1]
    assert process.returncode == 1 and said.endswith("vqr1 score: No space left on device\n")
