"""The school opens only what trains, reads no rating, and knows what was done to every picture."""

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_public_sets import BIQ, biq2021, biq_lists

from vqr1.data import observers
from vqr1.data.manifests import EMBEDDED, HELD_OUT, TRAINED, load_ratings
from vqr1.distortions import STRENGTH
from vqr1.experiments import school
from vqr1.experiments.damage import CAMERA, FLAWS, ORDER
from vqr1.experiments.dead_leaves import dead_leaves, pink_textures
from vqr1.experiments.school import ALTERNATIVES, PictureStream, find_school, one_flaw, several_flaws


def draw(stream, count: int) -> list:
    """Return the pictures of the stream's first lists."""
    return [picture for several in itertools.islice(stream, count) for picture in several]


def same(one: list, two: list) -> bool:
    """Tell whether pictures and what is known of their flaws are the same."""
    return all(
        np.array_equal(a.pixels, b.pixels)
        and (a.flaws and [flaw[:2] for flaw in a.flaws]) == (b.flaws and [flaw[:2] for flaw in b.flaws])
        for a, b in zip(one, two, strict=True)
    )


@pytest.fixture
def quick(monkeypatch):
    """Replace sources by grey squares and every flaw by a little more light; return the calls of `add`."""
    calls = []

    def brighter(x, name, level, rng):
        calls.append((name, level, int(rng.integers(2**31))))
        return x + np.float32(0.1)

    monkeypatch.setattr(school, "add", brighter)
    monkeypatch.setattr(school, "pink_textures", lambda rng: None)
    grey = lambda self, rng, side: np.full((side, side, 3), 64, np.uint8)  # noqa: E731
    monkeypatch.setattr(PictureStream, "source", grey)
    return calls


@pytest.fixture(scope="module")
def authentic(tmp_path_factory) -> list[Path]:
    """Files of two photographs whose every pixel says where it is: R the row, G the column, B the file."""
    folder = tmp_path_factory.mktemp("authentic")
    paths = []
    for number, (height, width) in enumerate(((250, 200), (160, 240))):
        place = np.zeros((height, width, 3), np.uint8)
        place[..., 0], place[..., 1] = np.indices((height, width))
        place[..., 2] = 100 + number
        paths.append(folder / f"{number}.png")
        Image.fromarray(place).save(paths[-1])
    return paths


# What is opened


def test_only_training_photographs_and_no_ratings_are_read(monkeypatch):
    opened, tables, open_, read_csv = set(), set(), Image.open, pd.read_csv

    def seen(file):  # a distortion opens the JPEG that it has in memory
        if not hasattr(file, "read"):
            opened.add(Path(file))
        return open_(file)

    monkeypatch.setattr(Image, "open", seen)
    monkeypatch.setattr(
        pd, "read_csv", lambda path, **options: tables.add(Path(path).name) or read_csv(path, **options)
    )
    monkeypatch.setattr(observers, "human_cells", lambda *_: pytest.fail("the table of human means was read"))
    school._licensed.cache_clear()
    draw(PictureStream(0, {96: 1.0}), 5)
    photos = read_csv(EMBEDDED / "photos.csv")
    assert tables == {"photos.csv"} and set(photos["split"]) == {"train", "val", "test"}
    assert opened == {EMBEDDED / name for name in photos.loc[photos["split"] == "train", "image"]}


def in_school(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in find_school(folder)}


def test_the_school_is_what_trains_of_biq2021(tmp_path):
    """ss01 (1372) is published for training; its near twin, ss01 (1373), for the test."""
    biq2021(tmp_path)
    taught = {name.lower() for name in in_school(tmp_path)}  # one file on disk is called .JPG
    assert taught == {f"images/{name}" for name in BIQ["Train"]}
    twins = tmp_path / "twins"
    biq_lists(twins, {"Test": {"ss01 (1373).jpg": 0.5}, "Train": {"ss01 (1372).jpg": 0.5, "ss01 (5).jpg": 1}})
    (twins / "Images").mkdir()
    for name in ("ss01 (1373).jpg", "ss01 (1372).jpg", "ss01 (5).jpg"):
        Image.new("RGB", (8, 6)).save(twins / "Images" / name)
    assert in_school(twins) == {"Images/ss01 (5).jpg"}


def test_without_the_set_there_is_no_school_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VQR1_DATA", str(tmp_path))
    assert find_school() == []
    said = capsys.readouterr().out
    assert (
        said.startswith("Taught without BIQ2021's photographs: biq2021 is neither in") and "git clone" in said
    )
    with pytest.raises(FileNotFoundError, match="biq2021 is neither in"):
        find_school(tmp_path)  # somebody said that it is there


def test_the_set_is_found_where_all_sets_are(tmp_path, monkeypatch):
    biq2021(tmp_path / "BIQ2021")
    monkeypatch.setenv("VQR1_DATA", str(tmp_path))
    assert len(find_school()) == len(BIQ["Train"]) and all(path.is_file() for path in find_school())


def test_a_set_that_is_not_as_published_is_no_missing_one(tmp_path, monkeypatch):
    biq2021(tmp_path)
    biq_lists(tmp_path, {"Train": {"ss01 (2).jpg": "good"}})
    monkeypatch.setenv("VQR1_DATA", str(tmp_path))
    for root in (None, tmp_path):
        with pytest.raises(ValueError, match="mos 'good' is not a number"):
            find_school(root)


@pytest.fixture(scope="module")
def biq(real_sets) -> Path:
    folders = [path for path in real_sets.iterdir() if path.name.lower() == "biq2021"]
    return folders[0] if folders else pytest.skip(f"BIQ2021 is not in {real_sets}")


def test_no_picture_that_validates_or_tests_and_no_near_twin_of_one_is_in_the_real_school(biq):
    rows = load_ratings("biq2021", biq, strict=False)
    taught = rows["image"].isin(in_school(biq))
    assert taught.any() and set(rows.loc[taught, "split"]) == {"train"}
    kept = rows.loc[rows["split"].isin(["val", "test"]), "reference"]  # twins share their reference
    assert len(kept) and not set(rows.loc[taught, "reference"]) & set(kept)
    published = pd.read_csv(biq / "Train (Images and MOS).csv")["Image Name"].str.lower()
    assert {Path(name).name.lower() for name in rows.loc[taught, "image"]} <= set(published)


def test_ratings_have_no_influence_on_the_real_school(biq, tmp_path):
    """The same pictures come in the same order when the MOS of all are dealt anew."""
    (tmp_path / "Images").symlink_to(biq / "Images", target_is_directory=True)
    deal = np.random.default_rng(0).permutation
    for path in biq.glob("*.csv"):
        table = pd.read_csv(path, dtype=str)
        dealt = table.assign(MOS=deal(table["MOS"]))
        assert (dealt["MOS"] != table["MOS"]).mean() > 0.9
        dealt.to_csv(tmp_path / path.name, index=False)
    plain, other = find_school(biq), find_school(tmp_path)
    assert [path.relative_to(biq) for path in plain] == [path.relative_to(tmp_path) for path in other]
    streams = [PictureStream(3, {128: 1.0}, school=files, authentic=0.5) for files in (plain, other)]
    assert same(*(draw(stream, 12) for stream in streams))


# What is done to a picture


def test_the_first_lesson_is_one_trained_distortion_at_any_level():
    rng = np.random.default_rng(0)
    recipes = [one_flaw(rng) for _ in range(3000)]
    assert {len(done) for done in recipes} == {1}
    counts = Counter(done[0] for done in recipes)
    assert set(counts) == set(itertools.product(TRAINED, range(1, 6)))
    assert max(counts.values()) < 3 * min(counts.values())  # about 32 of each


def test_a_recipe_is_up_to_three_flaws_in_the_order_in_which_they_come():
    rng = np.random.default_rng(0)
    recipes = [several_flaws(rng) for _ in range(3000)]
    names = [[name for name, _ in done] for done in recipes]
    assert all(sorted(set(own), key=ORDER.index) == own for own in names)
    assert {level for done in recipes for _, level in done} == {1, 2, 3, 4, 5}
    counts = Counter(map(len, names))
    assert set(counts) == {0, 1, 2, 3} and counts[0] / 3000 == pytest.approx(0.08, abs=0.02)
    assert counts[1] / 3000 == pytest.approx(0.72, abs=0.04)  # some lose an alternative
    assert not any({first, second} <= set(own) for own in names for first, second in ALTERNATIVES)
    alone = [own[0] for own in names if len(own) == 1]
    assert np.mean([name in CAMERA for name in alone]) == pytest.approx(0.17, abs=0.04)


def test_a_picture_has_the_flaws_of_the_lesson(quick):
    stream = PictureStream(0, {64: 1.0}, lambda rng: [("haze", int(rng.integers(2, 4))), ("jpeg", 5)])
    told = {tuple(flaw[:2] for flaw in picture.flaws) for picture in draw(stream, 20)}
    assert told == {(("haze", 2), ("jpeg", 5)), (("haze", 3), ("jpeg", 5))}


def test_every_flaw_occurs_and_held_out_types_never(quick):
    pictures = draw(PictureStream(0, {64: 1.0}), 500)
    names = {name for name, *_ in quick}
    assert names == set(FLAWS) and not names & set(HELD_OUT)
    assert {flaw.name for picture in pictures for flaw in picture.flaws} == names
    assert {level for _, level, _ in quick} == {1, 2, 3, 4, 5}
    assert len({seed for *_, seed in quick}) == len(quick)  # no noise pattern is a cue


def test_flaws_are_told_in_the_order_in_which_they_came_with_the_pictures_before_and_after():
    pictures = draw(PictureStream(1, {96: 1.0}), 100)
    several = [picture for picture in pictures if len(picture.flaws) > 1]
    assert len(several) > 20
    for picture in several:
        flaws = picture.flaws
        assert [flaw.name for flaw in flaws] == sorted((flaw.name for flaw in flaws), key=ORDER.index)
        for flaw in flaws:
            assert flaw.before.shape == flaw.after.shape == picture.pixels.shape
            assert np.square(flaw.before - flaw.after).mean() > 10**-4.5
    last = [picture.flaws[-1].after for picture in several]
    shown = [np.abs(picture.pixels / 255 - after).max() for picture, after in zip(several, last)]
    assert np.mean(np.array(shown) < 0.51 / 255) > 0.9  # what came last is what is seen, if it was visible


def test_a_flaw_comes_on_top_of_those_before_it(quick):
    pictures = draw(PictureStream(1, {64: 1.0}), 80)
    light = [(picture.pixels.mean() / 255 - 64 / 255) / 0.1 for picture in pictures]
    counts = [len(picture.flaws) for picture in pictures]  # a mean shift of level 3 has no strength
    assert max(counts) == 3 and all(n - 0.05 < more < n + 1.05 for n, more in zip(counts, light))


def test_strength_follows_the_level_but_for_signed_changes(quick):
    pictures = draw(PictureStream(1, {64: 1.0}), 2000)
    told = {(flaw.name, flaw.strength) for picture in pictures for flaw in picture.flaws}
    levels = range(1, 6)
    expected = {(name, own) for name in FLAWS for own in STRENGTH.get(name, levels) if own}
    assert told == expected and ("mean_shift", 0) not in told


@pytest.mark.parametrize(("step", "told"), [(0.9, False), (1.6, True)])
def test_what_nobody_sees_is_not_told(quick, step, told, monkeypatch):
    """45 dB are a step of 1.43 in 255."""
    monkeypatch.setattr(school, "add", lambda x, *_: x + np.float32(step / 255))
    pictures = draw(PictureStream(1, {64: 1.0}), 20)
    assert any(picture.flaws for picture in pictures) == told
    assert school.INVISIBLE_DB == 45


# What is drawn


def test_two_crops_of_a_source_have_each_a_recipe_of_their_own(quick, monkeypatch):
    ramp = np.indices((160, 160)).astype(np.uint8)
    places = np.stack([*ramp, np.zeros((160, 160), np.uint8)], 2)
    monkeypatch.setattr(PictureStream, "source", lambda self, rng, side: places)
    monkeypatch.setattr(school, "add", lambda x, name, level, rng: x + np.float32(level / 100) + 0)
    corners, other = [], []
    for one, two in itertools.islice(PictureStream(0, {64: 1.0}), 400):
        other.append([flaw[:2] for flaw in one.flaws] != [flaw[:2] for flaw in two.flaws])
        corners += [picture.pixels[0, 0, :2].tolist() for picture in (one, two) if not picture.flaws]
    assert np.mean(other) > 0.9  # they may be the same by chance
    assert len(set(map(tuple, corners))) > len(corners) / 2 > 5
    aligned = np.mean([row % 8 == column % 8 == 0 for row, column in corners])
    assert 0.5 < aligned < 0.95  # most on the grid of JPEG's blocks, not all


def test_as_many_sources_come_in_a_list_as_asked_for(quick):
    lists = itertools.islice(PictureStream(0, {64: 1.0}, sources=3), 2)
    assert [len(several) for several in lists] == [6, 6]


def test_the_same_seed_gives_the_same_stream(authentic):
    def stream(seed):
        return draw(PictureStream(seed, {96: 1.0}, school=authentic, authentic=0.3), 16)

    one, two, other = stream(3), stream(3), stream(4)
    assert same(one, two)
    assert not any(np.array_equal(a.pixels, b.pixels) for a, b in zip(one, other))


def test_workers_see_different_pictures(quick, monkeypatch):
    calls = []
    for number in (0, 1):
        monkeypatch.setattr(school, "get_worker_info", lambda number=number: SimpleNamespace(id=number))
        draw(PictureStream(0, {64: 1.0}), 16)
        calls.append({seed for *_, seed in quick})
        quick.clear()
    assert all(calls) and not calls[0] & calls[1]


def test_sides_are_whole_merged_patches_and_as_likely_as_asked_for(quick):
    sizes = [
        several[0].pixels.shape[:2]
        for several in itertools.islice(PictureStream(2, {64: 0.2, 192: 0.7, 256: 0.1}), 150)
    ]
    assert {side for height, side in sizes} == {64, 192, 256} and all(h == w for h, w in sizes)
    assert sizes.count((192, 192)) == pytest.approx(105, abs=15)


def test_oblong_pictures_too_have_whole_merged_patches(quick):
    sizes = [picture.pixels.shape[:2] for picture in draw(PictureStream(2, {256: 1.0}, oblong=0.5), 200)]
    assert all(height % 32 == width % 32 == 0 and min(height, width) >= 128 for height, width in sizes)
    assert all(max(size) == 256 for size in sizes)
    lower = np.mean([height < width for height, width in sizes])
    narrower = np.mean([height > width for height, width in sizes])
    assert 0.1 < lower < 0.3 and 0.1 < narrower < 0.3  # some of the half are square


def test_a_picture_is_no_larger_than_its_source(authentic):
    """The licensed photographs are 512x384, those below 250x200 and 240x160: none is enlarged."""
    for several in itertools.islice(PictureStream(0, {512: 1.0}, school=authentic, authentic=0.3), 24):
        sizes = {picture.pixels.shape[:2] for picture in several}
        assert all(
            size[0] % 32 == size[1] % 32 == 0 and 128 <= min(size) <= max(size) <= 448 for size in sizes
        )


# Authentic photographs


def test_authentic_photographs_stay_as_they_are(authentic):
    stream = PictureStream(0, {96: 1.0}, school=authentic, authentic=1.0)
    shown = set()
    for two in itertools.islice(stream, 40):
        assert [picture.flaws for picture in two] == [None] * 2
        [file] = {value for picture in two for value in picture.pixels[..., 2].ravel()}
        shown.add(file)
        for picture in two:  # a window of neighbouring pixels, maybe turned
            assert picture.pixels.shape == (96, 96, 3)
            for channel in (picture.pixels[..., 0].astype(int), picture.pixels[..., 1].astype(int)):
                across, down = np.diff(channel, axis=1), np.diff(channel, axis=0)
                assert {abs(across).max(), abs(down).max()} == {0, 1} == {abs(across).min(), abs(down).min()}
    assert shown == {100, 101}


def test_as_many_lists_are_authentic_as_asked_for(authentic, quick):
    lists = list(itertools.islice(PictureStream(0, {64: 1.0}, school=authentic, authentic=0.3), 200))
    assert np.mean([two[0].flaws is None for two in lists]) == pytest.approx(0.3, abs=0.08)


def test_without_authentic_photographs_no_list_has_them(quick):
    assert all(picture.flaws is not None for picture in draw(PictureStream(0, {64: 1.0}, authentic=1.0), 30))


def test_authentic_photographs_are_sources_of_flaws_too(authentic, monkeypatch):
    opened = Counter()
    photograph = PictureStream._photograph
    monkeypatch.setattr(
        PictureStream, "_photograph", lambda self, rng: opened.update("x") or photograph(self, rng)
    )
    draw(PictureStream(0, {64: 1.0}, school=authentic), 100)
    assert opened["x"] == pytest.approx(64, abs=12)  # of the 85 photographs, three in four


# Procedural pictures


@pytest.mark.parametrize(("share", "drawn"), [(0.0, 0), (0.4, 16), (1.0, 40)])
def test_as_many_sources_are_procedural_as_asked_for(share, drawn, authentic, monkeypatch):
    sizes = []
    grey = lambda rng, textures, side: sizes.append(side) or np.full((side, side, 3), 0.5)  # noqa: E731
    monkeypatch.setattr(school, "dead_leaves", grey)
    draw(PictureStream(0, {64: 1.0}, one_flaw, school=authentic, procedural=share), 40)
    assert len(sizes) == pytest.approx(drawn, abs=9 if 0 < share < 1 else 0)


def test_dead_leaves_are_pictures_and_the_same_for_a_seed():
    textures = pink_textures(np.random.default_rng(0), count=2, size=64)
    assert textures.shape == (2, 64, 64) and textures.std((1, 2)) == pytest.approx(np.ones(2), abs=1e-3)
    pictures = [dead_leaves(np.random.default_rng(seed), textures, 48) for seed in range(12)]
    for picture in pictures:
        assert picture.shape == (48, 48, 3) and picture.min() >= 0 and picture.max() <= 1
        assert picture.std() > 0.02
    np.testing.assert_array_equal(dead_leaves(np.random.default_rng(3), textures, 48), pictures[3])
    assert not np.array_equal(pictures[3], pictures[4])
