"""Manifests, rendering, TRL rows, batches and dominance; each test is named after what it holds."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vqr1 import policy
from vqr1.data import manifests as data
from vqr1.data import observers
from vqr1.data import people_sets as people
from vqr1.data.batches import one_set_batches, prompt_rows, realigned
from vqr1.data.images import open_picture
from vqr1.data.manifests import (
    MANIFEST_COLUMNS,
    NEEDED,
    LazyImages,
    RenderedImages,
    dominance_pairs,
    folder_rows,
    load_ratings,
    pictures_of,
    read_manifest,
    render,
    render_rows,
)
from vqr1.experiments import baselines
from vqr1.experiments.table2 import found_sets, published
from vqr1.places import EMBEDDED, data_root
from vqr1.prompts import messages

ROOT = EMBEDDED


@pytest.fixture
def small(tmp_path):
    """Return a folder with two photographs and the rows of a correct manifest; tests spoil one thing."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((240, 208), Image.BICUBIC).save(
            tmp_path / "photos" / f"{name}.jpg", quality=90
        )
    row = {
        "image": "photos/a.jpg",
        "dataset": "sim-small",
        "mos": "3.5",
        "std": "0.7",
        "reference": "photos/a.jpg",
        "distortion": "jpeg",
        "level": "3",
        "seed": "7",
        "crop": "16,0,192,192",
        "split": "train",
    }
    rows = [
        row,
        row | {"image": "photos/b.jpg", "level": "5"},
        row | {"distortion": "white_noise", "mos": "2"},
    ]
    return tmp_path, rows


def write(folder, rows, name="set.csv"):
    path = folder / name
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


# Rendering


def test_same_row_same_pixels_here_and_in_another_process():
    rows = load_ratings("sim-kadid").iloc[[0, 57, 83]]
    here = [render(row).tobytes() for _, row in rows.iterrows()]
    assert here == [image.tobytes() for image in render_rows(rows)]
    code = (
        "import hashlib; from vqr1.data.manifests import load_ratings, render_rows\n"
        "rows = load_ratings('sim-kadid').iloc[[0, 57, 83]]\n"
        "print(hashlib.sha256(b''.join(i.tobytes() for i in render_rows(rows))).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert there.stdout.strip() == hashlib.sha256(b"".join(here)).hexdigest()


def test_worker_processes_keep_the_order(small, monkeypatch):
    folder, rows = small
    frame = read_manifest(write(folder, [rows[seed % 2] | {"seed": str(seed)} for seed in range(70)]))
    noisy = frame.assign(distortion=["lens_blur", "white_noise"] * 35)
    alone = [image.tobytes() for image in render_rows(noisy, workers=1)]
    assert len(set(alone[1::2])) == 35
    monkeypatch.setattr(data, "SPAWN_FROM", 2)
    assert [image.tobytes() for image in render_rows(noisy, workers=2)] == alone


def test_pictures_without_a_seed_are_read_when_they_are_asked_for(tmp_path):
    rows = [
        {"image": f"{n}.png", "dataset": "mine", "mos": n, "split": "train", "crop": "8,0,16,24" if n else ""}
        for n in range(3)
    ]
    for n in range(3):
        Image.effect_noise((32, 24), 10 * n).convert("RGB").save(tmp_path / f"{n}.png")
    pd.DataFrame(rows, columns=MANIFEST_COLUMNS).to_csv(tmp_path / "rows.csv", index=False)
    frame = read_manifest(tmp_path / "rows.csv")
    lazy, now = pictures_of(frame), render_rows(frame)
    assert type(lazy) is LazyImages and len(lazy) == 3
    assert [p.tobytes() for p in lazy] == [p.tobytes() for p in lazy[0:3]] == [p.tobytes() for p in now]
    assert lazy[2] is lazy[2] and [picture.size for picture in lazy[1:]] == [(16, 24)] * 2
    again = pictures_of(frame)
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match="row 1 .*1.png is missing"):
        again[1]
    assert again[-1].tobytes() == now[-1].tobytes()
    assert type(pictures_of(frame.assign(seed=pd.array([1, 2, 3], "Int64"), image="0.png"))) is RenderedImages


def test_rendered_pictures_are_kept_at_three_bytes_a_pixel():
    """Pillow takes four. An index or slice gives the rendered picture, one object while it is kept."""
    frame = load_ratings("sim-kadid").iloc[[0, 7, 60]]
    kept, now = pictures_of(frame), render_rows(frame)
    assert len(kept) == 3 and kept[1] is kept[1] and kept[-1] is kept[2]
    assert (
        [image.tobytes() for image in kept[:]]
        == [image.tobytes() for image in kept]
        == [image.tobytes() for image in now]
    )
    with pytest.raises(IndexError):
        kept[3]


def test_crop_is_cut_after_the_photograph_was_distorted(small):
    folder, rows = small
    row = read_manifest(write(folder, rows)).iloc[0]
    whole = render({**row, "crop": ""}, folder)
    assert whole.size == (240, 208)
    assert render(row, folder).tobytes() == whole.crop((16, 0, 208, 192)).tobytes()


def test_composed_distortions_are_applied_in_order(small):
    folder, rows = small
    frame = read_manifest(write(folder, [rows[0] | {"distortion": "quantization+jpeg", "level": "5+4"}]))
    first = data.distort(open_picture(folder / "photos/a.jpg"), "quantization", 5, 7)
    both = data.distort(first, "jpeg", 4, 8).crop((16, 0, 208, 192))
    assert render(frame.iloc[0], folder).tobytes() == both.tobytes()


@pytest.mark.parametrize("change", [{"distortion": "", "level": "", "seed": ""}, {"seed": ""}])
def test_a_row_without_seed_is_the_picture_itself(small, change):
    folder, rows = small
    frame = read_manifest(write(folder, [rows[0] | change | {"crop": ""}]))
    assert render(frame.iloc[0], folder).tobytes() == open_picture(folder / "photos/a.jpg").tobytes()


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "lying.jpg", exif=exif)
    assert (
        open_picture(tmp_path / "lying.jpg").size == data.upright_size(tmp_path / "lying.jpg", "") == (10, 20)
    )


@pytest.mark.parametrize(
    "content, why",
    [
        (None, "is missing"),
        (b"", "has zero bytes"),
        (b"I am a text file", "cannot be read as a picture"),
        ("truncated", "cannot be read as a picture"),
        (b"\x89PNG\r\n\x1a\n broken", "cannot be read as a picture"),
    ],
)
def test_unreadable_pictures_are_named_with_their_row(small, content, why):
    folder, rows = small
    frame = read_manifest(write(folder, [row | {"crop": ""} for row in rows]))
    picture = folder / "photos/b.jpg"
    if content == "truncated":
        content = picture.read_bytes()[:2000]
    picture.unlink() if content is None else picture.write_bytes(content)
    for attempt in (lambda: render(frame.iloc[1], folder), lambda: render_rows(frame)):
        with pytest.raises(ValueError, match=rf"row 1 .*b\.jpg {why}.*replace the file"):
            attempt()


def test_worker_processes_name_the_unreadable_picture(small, monkeypatch):
    folder, rows = small
    frame = read_manifest(write(folder, rows))
    (folder / "photos/b.jpg").write_bytes(b"")
    monkeypatch.setattr(data, "SPAWN_FROM", 1)
    with pytest.raises(ValueError, match=r"row 1 .*b\.jpg has zero bytes"):
        render_rows(frame, workers=2)


# Reading


def test_a_right_manifest_is_read_with_its_types(small):
    folder, rows = small
    frame = read_manifest(write(folder, [row | {"comment": "dropped"} for row in rows]))
    assert tuple(frame.columns) == MANIFEST_COLUMNS and frame.index.tolist() == [0, 1, 2]
    assert (
        frame.mos.tolist() == [3.5, 3.5, 2.0]
        and frame.level.tolist() == [3, 5, 3]
        and frame.seed.dtype == "Int64"
    )
    assert [image.size for image in render_rows(frame)] == [(192, 192)] * 3


def test_blank_lines_and_a_byte_order_mark_do_no_harm(small):
    folder, rows = small
    path = write(folder, rows)
    spaced = path.read_text().replace("photos/b.jpg,sim", "\nphotos/b.jpg,sim", 1) + "\n\n"
    path.write_text(spaced, encoding="utf-8-sig")
    assert len(read_manifest(path)) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mos": "good"}, "mos 'good' is not a number"),
        ({"mos": "nan"}, "mos 'nan' is not a number"),
        ({"mos": "inf"}, "mos 'inf' is not a number"),
        ({"mos": ""}, "mos '' is not a number.*or what people said of pairs in set-comparisons.csv"),
        ({"std": "-1"}, "std '-1' is not a number >= 0"),
        ({"image": ""}, "image '' is empty"),
        ({"dataset": ""}, "dataset '' is empty"),
        ({"image": "photos/c.jpg"}, "image 'photos/c.jpg' is not there below"),
        ({"image": "photos"}, "image 'photos' is not there below"),
        ({"distortion": "snow"}, "distortion 'snow' is not known; use one of gaussian_blur"),
        ({"distortion": "jpeg+snow", "level": "1+2"}, r"distortion 'jpeg\+snow' is not known"),
        ({"level": "0"}, "level '0' is not one of 1, 2, 3, 4, 5"),
        ({"level": "6"}, "level '6' is not one of"),
        ({"level": "2.5"}, r"level '2\.5' is not one of"),
        ({"level": ""}, "level '' does not give one level for each"),
        ({"distortion": ""}, "level '5' does not give one level for each"),
        ({"level": "1+2"}, r"level '1\+2' does not give one level for each"),
        ({"seed": "-3"}, "seed '-3' is not an integer"),
        ({"seed": "x"}, "seed 'x' is not an integer"),
        ({"crop": "1,2,3"}, "crop '1,2,3' is not four integers"),
        ({"crop": "0.5,0,9,9"}, r"crop '0\.5,0,9,9' is not four integers"),
        ({"crop": "-16,0,192,192"}, "crop '-16,0,192,192' is not four integers"),
        ({"crop": "64,0,192,192"}, "crop '64,0,192,192' is empty or reaches outside"),
        ({"crop": "0,0,0,9"}, "crop '0,0,0,9' is empty or reaches outside"),
        ({"split": "dev"}, "split 'dev' is not train, val, test"),
    ],
)
def test_bad_values_are_refused_with_file_line_and_value(small, change, message):
    folder, rows = small
    rows[1] = rows[1] | change
    with pytest.raises(ValueError, match=rf"set\.csv, line 3: {message}"):
        read_manifest(write(folder, rows))


@pytest.mark.parametrize("column", NEEDED)
def test_a_missing_column_is_named(small, column):
    folder, rows = small
    path = write(folder, [{name: value for name, value in row.items() if name != column} for row in rows])
    with pytest.raises(
        ValueError,
        match=rf"set\.csv, line 1: column '{column}' is missing from the header .*; needed are "
        rf"image,dataset,mos, also",
    ):
        read_manifest(path)


# Tables of one's own


@pytest.fixture
def own(tmp_path):
    """Return own(text) -> path of a table with this text, beside pictures a.png, b.png and c.png."""
    for name in "abc":
        Image.effect_noise((16, 16), 50).convert("RGB").save(tmp_path / f"{name}.png")

    def table(text, encoding="utf-8"):
        (tmp_path / "own.csv").write_text(text, encoding=encoding)
        return tmp_path / "own.csv"

    return table


PLAIN = "image,dataset,mos\na.png,mine,1.5\nb.png,mine,4\n"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", ",\n"),  # a comma at the end of each line
        PLAIN.replace("\n", ",,\n"),
        PLAIN.replace("5\n", "5,\n").replace("4\n", "4,\n"),  # of each line but the header
        ",image,dataset,mos\n0,a.png,mine,1.5\n1,b.png,mine,4\n",  # pandas' own index
        "mos,votes,image,dataset\n1.5,7,a.png,mine\n4,9,./b.png,mine\n",
        'image,remark,dataset,mos\na.png,"one,\ntwo",mine, 1.5\n"b.png",,mine,4 \n',
        "image,dataset,mos\n\n./a.png,mine,1.5\n,,\n../own/b.png,mine,4\n",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_image_dataset_and_mos_are_enough(own, text, encoding):
    path = own(text.replace("../own", f"../{own('').parent.name}"), encoding)
    frame = read_manifest(path)
    assert (
        tuple(frame.columns) == MANIFEST_COLUMNS
        and frame["mos"].tolist() == [1.5, 4.0]
        and frame["dataset"].eq("mine").all()
    )
    assert frame["image"].tolist()[0] == "a.png" and frame["image"][1].endswith("b.png")
    assert frame["reference"].equals(frame["image"])  # nothing else is known to show the same
    assert (
        frame["std"].isna().all()
        and frame["seed"].isna().all()
        and (frame[["split", "crop", "level", "distortion"]] == "").all(axis=None)
    )
    assert len(render_rows(frame)) == 2
    assert load_ratings(path.rename(path.with_suffix(".CSV")))["mos"].tolist() == [1.5, 4.0]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            PLAIN.replace(",", ";").replace(".5", ",5"),
            "line 1: fields are separated by semicolons; save it with commas",
        ),
        (PLAIN.replace(",", "\t"), "line 1: fields are separated by tabs; save it with commas"),
        (PLAIN.replace("image", "Image"), "line 1: column 'image' is missing .*; rename 'Image' to 'image'"),
        (PLAIN.replace("mos", "MOS"), "line 1: column 'mos' is missing .*; rename 'MOS' to 'mos'"),
        (PLAIN.replace(",", ", "), "line 1: column 'dataset' is missing .*; rename ' dataset' to 'dataset'"),
        (
            PLAIN.replace("mos\n", "mos,Split\n"),
            "line 1: column 'split' is missing .*; rename 'Split' to 'split'",
        ),
        (PLAIN.replace("mos\n", "mos,mos\n"), "line 1: column 'mos' is there twice; rename one"),
        (PLAIN.replace(",1.5", ",1,5"), "line 2: 4 fields under 3 names; put quotes"),
        (PLAIN.replace("a.png", '"a.png'), "not a CSV in UTF-8 with a header"),
        (
            PLAIN.replace("a.png", "https://example.org/a.png"),
            "line 2: image 'https://example.org/a.png' is an address; download",
        ),
        (
            PLAIN.replace("b.png", "./a.png"),
            "line 3: image 'a.png' is on line 2 too, .*remove one of the two",
        ),
        (PLAIN.replace("b.png", "link.png"), "line 3: image 'link.png' is on line 2 too"),
    ],
)
def test_a_table_that_would_be_misread_is_refused(own, text, message):
    path = own(text)
    (path.parent / "link.png").symlink_to("a.png")
    with pytest.raises(ValueError, match=f"own.csv.*{message}"):
        read_manifest(path)


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            ["a.png,one,3,,,train", "b.png,one,3,,,test", "./a.png,one,4,,,test"],
            "line 4: image 'a.png' is in split test, and in train on line 2",
        ),
        (
            ["a.png,one,3,,,train", "b.png,one,3,,,test", "a.png,two,4,,,val"],
            "line 4: image 'a.png' is in split val, and in train on line 2",
        ),
        (
            ["a.png,one,3,r,,train", "b.png,one,3,s,,test", "c.png,one,4,r,,test"],
            "line 4: reference 'r' is in split test, and in train on line 2",
        ),
        (
            ["a.png,one,3,,,test", "b.png,one,3,./a.png,,train"],
            "line 3: reference 'a.png' is in split train, and in test on line 2",
        ),
        (
            ["a.png,one,3,,,test", "b.png,one,3,a.png,,train"],
            "line 3: reference 'a.png' is in split train, and in test on line 2",
        ),
        (["a.png,one,3,r,,train", "b.png,two,3,r,,test"], None),  # sets number their references alike
        (["a.png,one,3,r,,train", "b.png,one,3,r,,"], None),
    ],
)
def test_nothing_is_in_two_splits(own, rows, message):
    path = own("\n".join(["image,dataset,mos,reference,crop,split", *rows]))
    if message is None:
        assert len(read_manifest(path)) == len(rows)
        return
    with pytest.raises(ValueError, match=f"own.csv, {message}.*give both rows one split"):
        read_manifest(path)


def test_a_row_that_is_there_twice_is_refused(small):
    folder, rows = small
    with pytest.raises(
        ValueError, match=r"set\.csv, line 5: image 'photos/a.jpg' is on line 2 too, with the same distortion"
    ):
        read_manifest(write(folder, [*rows, rows[0] | {"mos": "1"}]))


def test_a_text_file_named_jpg_is_refused_before_anything_is_rendered(small):
    folder, rows = small
    (folder / "photos/b.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"set\.csv, line 3: .*b\.jpg cannot be read as a picture"):
        read_manifest(write(folder, rows))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a CSV"),
        (b"\xff\xfe\x00", "not a CSV"),
        (b"image,dataset\n1,2,3,4\n5,6\n", "4 fields under 2 names"),
        (",".join(MANIFEST_COLUMNS).encode() + b"\n", "no rows"),
    ],
)
def test_files_that_are_no_manifest_are_refused(tmp_path, content, message):
    (tmp_path / "set.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"set\.csv.*({message})"):
        read_manifest(tmp_path / "set.csv")


def test_a_missing_manifest_and_an_unknown_set_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.csv: no such manifest"):
        load_ratings(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="unknown set 'koniq'.* has: .*sim-kadid, sim-mixed, sim-unseen"):
        load_ratings("koniq", ROOT)


def test_data_root_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("VQR1_DATA", str(tmp_path))
    assert data_root() == tmp_path
    monkeypatch.setenv("VQR1_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone is not a folder; set VQR1_DATA to the one"):
        data_root()


def test_what_comes_with_the_project_is_there_whatever_vqr1_data_says(tmp_path, monkeypatch):
    """The README tells people to point VQR1_DATA at their public sets."""
    monkeypatch.setenv("VQR1_DATA", str(tmp_path))
    assert len(load_ratings("sim-kadid")) == len(load_ratings("sim-kadid", tmp_path)) == 7695
    rows = load_ratings("sim-unseen").head(2)
    rows.attrs = {}  # as after pandas' concat
    assert [image.size for image in render_rows(rows)] == [(192, 192)] * 2 and render(rows.iloc[0]).size == (
        192,
        192,
    )
    assert found_sets(None)[0] == {} and published(2) is not None
    with pytest.raises(FileNotFoundError, match=f"kadid-10k is neither in {tmp_path}"):
        load_ratings("kadid-10k")


def test_what_comes_with_the_project_has_one_folder():
    """Only places.py finds its own location, and only readers of public sets ask the environment."""
    places = [policy.policy_path("tiny-policy"), observers.TABLE, baselines.CNN, people.TWINS]
    assert all(path.exists() and path.is_relative_to(EMBEDDED) for path in places)
    package = Path(data.__file__).parents[1]
    texts = {path.name: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert [name for name, text in texts.items() if "parent.parent" in text] == ["places.py"]
    asking = {name for name, text in texts.items() if "data_root()" in text}
    assert asking == {"places.py", "manifests.py", "describe.py", "table2.py"}


def test_folder_rows_are_manifest_rows_that_render(tmp_path, photo):
    (tmp_path / "deep").mkdir()
    for name in ("good.png", "deep/bad.JPG", ".hidden.png"):
        photo.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    frame = folder_rows(tmp_path)
    assert frame["image"].tolist() == ["deep/bad.JPG", "good.png"]
    assert frame.attrs["root"] == str(tmp_path) and set(frame["dataset"]) == {tmp_path.name}
    assert [image.size for image in render_rows(frame)] == [photo.size] * 2


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        folder_rows(tmp_path)
    with pytest.raises(ValueError, match="'nowhere' is not a folder"):
        folder_rows("nowhere")


# Rows and batches for TRL


@pytest.fixture
def rows(small):
    frame = read_manifest(write(*small))
    return frame, render_rows(frame)


def test_rows_are_read_one_by_one_in_lists_and_by_column(rows):
    frame, images = rows
    dataset = prompt_rows(frame, images)
    assert dataset.column_names == ["prompt", "image", "mos", "dataset", "name", "uid"]
    assert dataset[1]["image"] is images[1]
    assert [dataset[1][key] for key in ("mos", "dataset", "uid")] == [3.5, "sim-small", 1]
    assert dataset["name"][:] == frame["image"].tolist()
    assert (
        dataset[[2, 2]]["image"][0] is dataset[[2, 2]]["image"][1] is images[2]
    )  # K repeats share one picture
    assert [row["uid"] for row in dataset.__getitems__([2, 0])] == [2, 0]  # as torch's DataLoader reads
    assert dataset["mos"][:] == [3.5, 3.5, 2.0] and dataset["image"][2] is images[2]


def test_the_prompt_stays_a_chat_without_added_keys(rows):
    for thinking in (True, False):
        dataset = prompt_rows(*rows, thinking=thinking)
        assert dataset[0]["prompt"] == dataset[[0]]["prompt"][0] == messages(thinking)
        assert {"type": "image"} in dataset[0]["prompt"][0]["content"]


def test_trl_fills_the_picture_into_the_prompt(rows):
    from trl.data_utils import is_conversational, prepare_multimodal_messages

    frame, images = rows
    row = prompt_rows(frame, images)[0]
    assert is_conversational({"prompt": row["prompt"]})
    filled = prepare_multimodal_messages(row["prompt"], images=[row["image"]])
    assert filled[0]["content"][0]["image"] is images[0]
    assert "image" not in prompt_rows(frame, images)[0]["prompt"][0]["content"][0]


def test_select_and_shuffle_keep_pictures_with_their_rows(rows):
    frame, images = rows
    for dataset in (prompt_rows(frame, images).select([2, 2, 0]), prompt_rows(frame, images).shuffle(seed=1)):
        assert all(row["image"] is images[row["uid"]] for row in dataset)


def test_rows_without_mos_or_picture_cannot_be_trained_on(rows):
    frame, images = rows
    with pytest.raises(ValueError, match="3 rows but 2 images"):
        prompt_rows(frame, images[:2])
    with pytest.raises(ValueError, match="row 1 .* has no mos"):
        prompt_rows(frame.assign(mos=[3.0, np.nan, 2.0]), images)


def test_rows_of_a_set_with_comparisons_need_no_mos_and_may_have_a_name(rows):
    frame, images = rows
    frame = frame.assign(mos=np.nan, name=["x", "y", "z"])
    dataset = prompt_rows(frame, images, compared=["sim-small"])
    assert dataset["name"][:] == ["x", "y", "z"] and np.isnan(dataset["mos"][:]).all()
    with pytest.raises(ValueError, match="row 0 .* has no mos; learn its set from comparisons"):
        prompt_rows(frame, images, compared=["other"])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=4),
    st.integers(2, 9),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_batches_hold_one_set_and_no_row_twice_per_epoch(sizes, size, epochs, seed):
    sizes = [max(n, size) for n in sizes]
    names = np.repeat([f"s{i}" for i in range(len(sizes))], sizes)
    frame = pd.DataFrame({"dataset": np.random.default_rng(seed).permutation(names)})
    order = one_set_batches(frame, size, seed, epochs)
    per_epoch = sum(n // size * size for n in sizes)
    assert len(order) == epochs * per_epoch and all(type(row) is int for row in order)
    assert all(frame.dataset.iloc[order[i : i + size]].nunique() == 1 for i in range(0, len(order), size))
    assert all(len(set(order[e * per_epoch : (e + 1) * per_epoch])) == per_epoch for e in range(epochs))
    assert order == one_set_batches(frame, size, seed, epochs)


def test_epochs_differ_and_chunks_of_sets_are_mixed():
    frame = pd.DataFrame({"dataset": ["a"] * 60 + ["b"] * 60})
    order = one_set_batches(frame, 6, seed=0, epochs=2)
    assert order[:120] != order[120:]
    names = frame.dataset.iloc[order[:120:6]].tolist()
    assert names != sorted(names)


@pytest.mark.parametrize(
    "size, message",
    [
        (1, "images_per_batch is 1: .* at least 2"),
        (4, "set 'b' has 3 rows, fewer than the 4"),
    ],
)
def test_batches_too_small_or_too_large_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        one_set_batches(pd.DataFrame({"dataset": list("aaaabbb")}), size, seed=0)


# One scale for several sets


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.floats(0.01, 1e3), st.floats(-1e3, 1e3))
def test_realigned_sets_reach_from_1_to_5_and_keep_their_order(mos, factor, shift):
    mos = np.round(mos, 3)
    if len(set(mos)) < 2:
        mos[0] += 1
    frame = pd.DataFrame(
        {"dataset": ["a"] * len(mos) + ["b"] * len(mos), "mos": [*mos, *(factor * mos + shift)], "std": 1.0}
    )
    for _, rows in realigned(frame).groupby("dataset"):
        assert (rows["mos"].min(), rows["mos"].max()) == pytest.approx((1, 5))
        np.testing.assert_allclose(rows["std"], 4 / np.ptp(frame["mos"][rows.index]))
        straight = 1 + 4 * (mos - mos.min()) / np.ptp(mos)
        np.testing.assert_allclose(rows["mos"], straight, atol=1e-6)  # any straight line gives the same


@pytest.mark.parametrize("mos", [[2, 2], [2, np.nan], [np.nan, np.nan]])
def test_a_set_with_one_mos_cannot_be_realigned(mos):
    with pytest.raises(ValueError, match="set 'b' has no two different mos"):
        realigned(pd.DataFrame({"dataset": list("aabb"), "mos": [1, 2, *mos], "std": 0.5}))


# Dominance


def test_dominance_needs_the_same_picture_types_and_no_better_component():
    rows = pd.DataFrame(
        [
            ("a", "", "jitter+jpeg", "1+1"),
            ("a", "", "jitter+jpeg", "1+3"),
            ("a", "", "jitter+jpeg", "2+2"),
            ("a", "", "jitter+jpeg", "1+1"),
            ("b", "", "jitter+jpeg", "5+5"),
            ("a", "", "brighten+jpeg", "5+5"),
            ("a", "0,0,9,9", "jitter+jpeg", "5+5"),
        ],
        columns=["image", "crop", "distortion", "level"],
    )
    assert sorted(map(tuple, dominance_pairs(rows).tolist())) == [(0, 1), (0, 2), (3, 1), (3, 2)]


def test_a_frame_without_pairs_gives_an_empty_array():
    rows = pd.DataFrame({"image": ["a"], "crop": "", "distortion": "jpeg", "level": [3]})
    assert dominance_pairs(rows).shape == (0, 2)
