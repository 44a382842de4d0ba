"""Distortions are seeded, take any size, and have the published numbers and the order people saw."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import color
from skimage.metrics import structural_similarity

from vqr1.distortions import DISTORTIONS, FAMILIES, LEVELS, contact_sheet, distort

DATA = Path(__file__).parents[1] / "data"
RANDOM = {
    "motion_blur",
    "color_shift",
    "white_noise",
    "white_noise_color_component",
    "impulse_noise",
    "multiplicative_noise",
    "denoise",
    "jitter",
    "non_eccentricity_patch",
    "color_block",
}
NOT_MONOTONE = {"mean_shift", "contrast_change"}  # their level 3 is (nearly) the original


@pytest.fixture(scope="module")
def photos():
    paths = sorted((DATA / "photos").glob("*.jpg"))
    assert len(paths) >= 4, "data/photos needs photographs"
    return [Image.open(path).convert("RGB") for path in paths[:: max(1, len(paths) // 4)][:4]]


@pytest.fixture(scope="module")
def human_means():
    with open(DATA / "kadid10k_type_level_mos.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    groups = itertools.groupby(rows, lambda row: row["type"])
    return {name: [float(row["mos_mean"]) for row in group] for name, group in groups}


def values(image):
    return np.asarray(image, dtype=np.float32)


def psnr(a, b):
    return 20 * np.log10(255) - 10 * np.log10(max(np.mean((values(a) - values(b)) ** 2), 1e-6))


def ssim(a, b):
    return structural_similarity(values(a.convert("L")), values(b.convert("L")), data_range=255)


def mean_over(photos, measure, name):
    return [
        np.mean(
            [
                measure(photo, distort(photo, name, level, seed=10 * level + i))
                for i, photo in enumerate(photos)
            ]
        )
        for level in range(1, 6)
    ]


def test_names_order_and_families_are_those_of_the_published_ratings(human_means):
    assert DISTORTIONS == tuple(human_means) == tuple(LEVELS)
    assert tuple(itertools.chain.from_iterable(FAMILIES.values())) == DISTORTIONS
    assert {len(parameters) for parameters in LEVELS.values()} == {5}


@pytest.mark.parametrize("name", DISTORTIONS)
def test_same_seed_same_pixels_and_only_random_types_depend_on_the_seed(photos, name):
    photo = photos[0].crop((100, 100, 260, 220))
    first, again, other = (values(distort(photo, name, 4, seed)) for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (name not in RANDOM)


@pytest.mark.parametrize("size", [(512, 384), (384, 512), (17, 33), (2, 5), (1, 1)])
def test_every_type_and_level_keeps_size_and_mode(photos, size):
    photo = photos[-1].resize(size)
    before = photo.tobytes()
    for name, level in itertools.product(DISTORTIONS, range(1, 6)):
        out = distort(photo, name, level, seed=level)
        assert (out.size, out.mode) == (size, "RGB"), (name, level)
    assert photo.tobytes() == before  # the input is left alone


@pytest.mark.parametrize("name", [name for name in DISTORTIONS if name not in NOT_MONOTONE])
def test_fidelity_falls_with_level_wherever_published_human_means_fall(photos, human_means, name):
    # PSNR of pasted blocks hangs on their chance colours; SSIM on the area they cover.
    measure = ssim if name in ("color_block", "non_eccentricity_patch") else psnr
    fidelity, mos = mean_over(photos, measure, name), human_means[name]
    for level in range(1, 5):
        if mos[level] < mos[level - 1]:  # all but color_shift 4 -> 5: 1.85, 1.86
            assert fidelity[level] < fidelity[level - 1], (level, fidelity)


def test_mean_shift_and_contrast_levels_run_from_plus_to_minus_as_people_saw(photos, human_means):
    # Brighter looks better than darker by the same amount (4.22 and 3.90, 4.52 and 4.37); SSIM sees it, PSNR
    # cannot.
    for mean in (mean_over(photos, ssim, "mean_shift"), human_means["mean_shift"]):
        assert mean[2] > mean[1] > mean[3] > mean[4] and mean[1] > mean[0] > mean[4]
    # 0 and -0.4 are both near the identity, -0.2; 0.15 is farther: 4.29, 4.14 and 3.86.
    contrast = mean_over(photos, psnr, "contrast_change")
    assert set(np.argsort(contrast)[3:]) == set(np.argsort(human_means["contrast_change"])[3:]) == {2, 3}


@pytest.mark.parametrize("name, level", [("motion_blur", 1), ("color_saturation_2", 1), ("mean_shift", 3)])
def test_levels_whose_parameter_is_the_identity_change_nothing(photos, name, level):
    assert np.abs(values(distort(photos[0], name, level)) - values(photos[0])).max() <= 1


@pytest.mark.filterwarnings("ignore:Conversion from CIE-LAB")  # doubled a, b leave the sRGB gamut, on purpose
def test_tabulated_lab_agrees_with_scikit_image(photos):
    lab = color.rgb2lab(np.asarray(photos[0])) * [1, 2, 2]
    expected = 255 * np.clip(color.lab2rgb(lab), 0, 1)
    error = np.abs(values(distort(photos[0], "color_saturation_2", 2)) - expected)
    assert np.mean(error) < 0.5 and np.quantile(error, 0.999) <= 2


@pytest.mark.parametrize("name", ["gaussian_blur", "lens_blur", "motion_blur"])
def test_blurs_spread_a_point_evenly_and_lose_no_light(name):
    point = np.zeros((65, 65, 3), np.uint8)
    point[30:35, 30:35] = 255
    out = values(distort(Image.fromarray(point), name, 5))
    assert out.sum() == pytest.approx(point.sum(), rel=0.05)
    assert np.abs(out - out[::-1, ::-1]).max() <= 1


def test_pictures_smaller_than_kadids_get_as_many_blocks_per_area():
    grey = Image.new("RGB", (512, 384), (128, 128, 128))
    for size, blocks in [((512, 384), 10), ((256, 192), 2)]:  # 10 / 4, rounded to even
        painted = np.mean(values(distort(grey.resize(size), "color_block", 5, seed=3)) != 128)
        assert painted == pytest.approx(blocks * 32 * 32 / (size[0] * size[1]), rel=0.3)


def test_errors_name_what_is_wrong_and_what_to_do():
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="blurr.*gaussian_blur"):
        distort(picture, "blurr", 1)
    for level in (0, 6, 2.5, "3"):
        with pytest.raises(ValueError, match=f"{level}.*jpeg.*1 to 5"):
            distort(picture, "jpeg", level)
    for mode in ("L", "RGBA", "P"):
        with pytest.raises(ValueError, match=rf'{mode}.*convert\("RGB"\)'):
            distort(picture.convert(mode), "jpeg", 1)


def test_contact_sheet_shows_every_type_and_level(photos):
    sheet = contact_sheet(photos[0].crop((0, 0, 64, 48)))
    assert sheet.mode == "RGB" and sheet.height == 25 * (48 + 4) and sheet.width > 5 * 64
