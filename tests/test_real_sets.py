"""Public sets that anyone can clone are read, whole or in part, where they are present."""

import numpy as np
import pandas as pd
import pytest

from vqr1.cli import main
from vqr1.config import load_config
from vqr1.data.comparisons import comparisons_path
from vqr1.data.images import open_picture
from vqr1.data.manifests import load_comparisons, load_ratings, render
from vqr1.data.people_sets import TWINS
from vqr1.data.public_sets import PUBLIC_SETS, find_folder, read_public
from vqr1.metrics import srcc
from vqr1.training import train


@pytest.fixture(scope="module")
def whole(real_sets):
    """Return a function: name -> the set's folder, its rows (image "" if missing), whether all are there."""

    def read(name: str):
        try:
            folder = find_folder(name, real_sets)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        frame = read_public(name, folder, strict=False)
        return folder, frame, not frame.attrs["missing"]

    return read


def test_biq2021_is_read_with_its_split(whole):
    folder, frame, _ = whole("biq2021")
    assert frame["split"].value_counts().to_dict() == {"train": 9535, "test": 1792, "val": 452, "": 221}
    test = frame[frame["part"] == "test"]
    assert test["subset"].value_counts().to_dict() == {"ss03": 1321, "ss02": 344, "ss01": 335}
    parts = frame[frame["split"] != ""].groupby("reference")["split"].nunique()
    assert parts.max() == 1
    train = frame[frame["split"].isin(["train", "val"])]
    share = (train["split"] == "val").groupby(train["subset"]).mean()
    assert share.between(0.04, 0.05).all()
    means = frame.groupby("subset")["mos"].mean()
    assert means.round(3).to_dict() == {"ss01": 0.425, "ss02": 0.489, "ss03": 0.737}


def test_what_is_there_of_biq2021_can_be_opened(whole):
    folder, frame, complete = whole("biq2021")
    rows = load_ratings("biq2021", folder, strict=False)
    assert len(rows) == (frame["image"] != "").sum() and (rows["image"] != "").all()
    if complete:
        assert (rows["image"] == "Images/ss02 (1014).JPG").sum() == 1
    image = render(rows.iloc[0], folder)
    assert image.mode == "RGB" and min(image.size) >= 249


def test_the_files_size_tells_of_the_quality_of_biq2021(whole):
    """SRCC 0.392 over all 12,000 pictures shows that paths have the right ratings."""
    folder, _, complete = whole("biq2021")
    rows = load_ratings("biq2021", folder, strict=False)
    value = srcc([(folder / image).stat().st_size for image in rows["image"]], rows["mos"])
    assert value == pytest.approx(0.392, abs=0.001 if complete else 0.06)


def test_twins_of_biq2021_are_found_again(whole, capsys):
    folder, _, complete = whole("biq2021")
    if not complete:
        pytest.skip(f"{folder} is a part of BIQ2021; the rule needs all pictures")
    assert main(["data", "biq2021", "--twins", "--root", str(folder)]) == 0
    assert capsys.readouterr().out == TWINS.read_text(encoding="utf-8")


def test_pcuid_is_read_with_its_comparisons(whole):
    folder, frame, _ = whole("pcuid")
    assert len(frame) == 300
    assert frame["mos"].agg(["min", "max"]).tolist() == pytest.approx([100 / 299, 100 * 292.5 / 299])
    assert frame["split"].value_counts().to_dict() == {"train": 180, "val": 60, "test": 60}
    there = load_ratings("pcuid", folder, strict=False)
    pairs = load_comparisons("pcuid", folder, strict=False)
    assert len(pairs) == len(there) * (len(there) - 1) / 2
    assert set(pairs["first"]) | set(pairs["second"]) == set(there["image"])
    mos = there.set_index("image")["mos"]
    decided = pairs[pairs["preference"] != 0.5]
    higher = mos[decided["first"]].to_numpy() > mos[decided["second"]].to_numpy()
    assert (higher == (decided["preference"] == 1)).mean() == pytest.approx(0.913, abs=0.05)


@pytest.fixture
def pairs_alone(whole, tmp_path):
    """Return a manifest of what is there of PCUID, small, without mos, and its comparisons."""
    folder, _, _ = whole("pcuid")
    rows = load_ratings("pcuid", folder, strict=False)
    pairs = load_comparisons("pcuid", folder, strict=False)
    for name in rows["image"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        open_picture(folder / name).resize((96, 64)).save(tmp_path / name)
    path = tmp_path / "pairs.csv"
    rows.assign(dataset="underwater", mos="", std="").to_csv(path, index=False)
    pairs.to_csv(comparisons_path(path), index=False)
    return path


@pytest.mark.slow
def test_ten_steps_learn_from_the_comparisons_of_pcuid_alone(pairs_alone, tmp_path):
    """The same run has the same rewards again, and others once the pairs' preferences are permuted.

    So the comparisons are what is learned from.
    """

    def rewards(folder: str) -> pd.Series:
        named = {"sets": [str(pairs_alone)], "comparisons": [str(pairs_alone)]}
        small = {"max_steps": 10, "per_device_train_batch_size": 8, "num_generations": 2, "logging_steps": 1}
        small |= {"save_strategy": "no", "max_completion_length": 48}
        config = load_config("cpu").changed(**named, grpo=small, validation={"rows": 8, "every": 10})
        train(config, tmp_path / folder)
        log = pd.read_csv(tmp_path / folder / "log.csv", comment="#").set_index("step")
        assert np.isfinite(log["val_srcc"].dropna()).sum() == 2  # watched by shares of wins, before and after
        assert log["ranking"].max() > 0
        return log["ranking"].loc[1:]

    learned = rewards("people")
    assert len(learned) == 10 and rewards("again").iloc[0] == learned.iloc[0]
    path = comparisons_path(pairs_alone)
    pairs = pd.read_csv(path)
    mixed = np.random.default_rng(0).permutation(pairs["preference"])
    pairs.assign(preference=mixed).to_csv(path, index=False)
    assert rewards("mixed").iloc[0] != learned.iloc[0]


def test_srij_is_read_with_its_originals(whole):
    _, frame, _ = whole("srij")
    original = frame["distortion"] == ""
    assert (
        len(frame) == PUBLIC_SETS["srij"].rows and original.sum() == 32 and frame["reference"].nunique() == 32
    )
    means = frame.groupby("level")["mos"].mean()
    assert means[["", "2", "3", "4"]].is_monotonic_decreasing and means[""] == pytest.approx(79.36, abs=0.01)
    assert frame["mos"][~original].agg(["min", "max"]).round(1).tolist() == [25.5, 76.6]
    assert frame["std"].between(4, 15).all()
    assert frame["split"].value_counts().to_dict() == {"train": 440, "val": 100, "test": 100}
    assert (frame["image"] != "").all() and np.isfinite(frame["std"]).all()
