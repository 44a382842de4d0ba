"""Photographs have their form and licence, and no near-duplicates across the splits."""

import csv
import hashlib
import io
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy.fft import dctn

DATA = Path(__file__).resolve().parents[2] / "data"
LICENCES = {
    "LicenseRef-public-domain",
    "CC0-1.0",
    *(f"CC-BY-{v}" for v in ("2.0", "3.0", "4.0")),
    *(f"CC-BY-SA-{v}" for v in ("2.0", "2.5", "3.0", "4.0")),
}
MAX_BYTES = 8_000_000
NEAR = 10  # of 64 bits: unrelated photographs differ in about 32


def read_splits() -> dict[str, str]:
    with open(DATA / "photos.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == ["image", "split"]
    assert len(dict(rows[1:])) == len(rows) - 1, "an image is listed twice"
    return dict(rows[1:])


SPLITS = read_splits()


def phash(image: Image.Image) -> np.ndarray:
    """Return 64 bits: which of the 32x32 grey picture's 8x8 lowest DCT coefficients exceed their median."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    low = dctn(grey, norm="ortho")[:8, :8].ravel()
    return low > np.median(low)


def distance(image: Image.Image, other: Image.Image) -> int:
    """Return the Hamming distance of the hashes, the smaller for `other` as it is and mirrored."""
    bits = phash(image)
    return min(int(np.sum(bits != phash(o))) for o in (other, ImageOps.mirror(other)))


def altered_copy(image: Image.Image) -> Image.Image:
    """Return the picture mirrored, re-cropped by 2%, made smaller and re-encoded at quality 40."""
    dx, dy = image.width // 50, image.height // 50
    copy = ImageOps.mirror(image).crop((dx, dy, image.width - dx // 2, image.height))
    out = io.BytesIO()
    copy.resize((300, 300)).save(out, "JPEG", quality=40)
    return Image.open(out)


@pytest.fixture(scope="module")
def images() -> dict[str, Image.Image]:
    return {name: Image.open(DATA / name) for name in SPLITS}


@pytest.fixture(scope="module")
def attribution() -> dict[str, list[str]]:
    """Map each file name to the cells of its row in ATTRIBUTION.md."""
    text = (DATA / "photos" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if ".jpg |" in line
    ]
    assert len({row[0] for row in rows}) == len(rows), "a file has two rows"
    return {row[0]: row for row in rows}


def test_list_and_folder_hold_the_same_photographs():
    assert list(SPLITS) == sorted(SPLITS)
    assert set(SPLITS) == {f"photos/{p.name}" for p in (DATA / "photos").glob("*.jpg")}


def test_photographs_have_kadid_size_in_rgb_without_metadata(images):
    for name, image in images.items():
        assert image.format == "JPEG" and image.mode == "RGB", name
        assert image.size in {(512, 384), (384, 512)}, name
        assert not image.getexif() and "icc_profile" not in image.info, name
        assert "comment" not in image.info and "xmp" not in image.info, name


def test_photographs_are_small_enough_for_the_repository():
    assert sum((DATA / name).stat().st_size for name in SPLITS) <= MAX_BYTES


def test_every_photograph_is_attributed_under_an_allowed_licence(attribution):
    assert set(attribution) == {Path(name).name for name in SPLITS}
    for name, (_, title, author, licence, origin, _, digest) in attribution.items():
        assert title and author and origin, name
        assert licence in LICENCES, (name, licence)
        assert digest == hashlib.sha256((DATA / "photos" / name).read_bytes()).hexdigest(), name


def test_splits_are_six_to_one_to_three_with_at_least_twelve_for_test():
    count, total = Counter(SPLITS.values()), len(SPLITS)
    assert set(count) == {"train", "val", "test"} and count["test"] >= 12
    shares = (6, 1, 3) if total >= 60 else (5, 1, 4)
    for split, share in zip(("train", "val", "test"), shares):
        assert abs(count[split] - total * share / 10) < 1, (split, count)


def test_no_photograph_has_a_near_duplicate(images):
    # Across splits it would leak; within one it would count twice.
    bits = {name: (phash(image), phash(ImageOps.mirror(image))) for name, image in images.items()}
    near = [
        (a, b)
        for a, b in combinations(bits, 2)
        if min(np.sum(bits[a][0] != other) for other in bits[b]) < NEAR
    ]
    assert near == []


def test_near_duplicate_detector_fires_on_an_altered_copy(images):
    missed = [n for n, image in images.items() if distance(image, altered_copy(image)) >= NEAR]
    assert len(missed) <= len(images) // 20, missed
