"""Every flaw changes a picture, the more the higher its level, and does what its name says."""

import numpy as np
import pytest
from PIL import Image

from vqr1.data.manifests import HELD_OUT, TRAINED
from vqr1.distortions import STRENGTH, distort, true_strength
from vqr1.experiments.damage import CAMERA, FLAWS, ORDER, add

SEEDS = range(3)


@pytest.fixture(scope="module")
def clean(photo) -> np.ndarray:
    """A part of a photograph, (192, 256, 3) in 0..1, of all shades and with room above and below."""
    return np.asarray(photo.crop((64, 64, 320, 256)), dtype=np.float32) / 255 * 0.9 + 0.05


def flawed(x: np.ndarray, name: str, level: int, seed: int = 0) -> np.ndarray:
    return add(x, name, level, np.random.default_rng(seed))


def change(x: np.ndarray, name: str, level: int) -> float:
    """Return the mean square of the difference, over several seeds."""
    return np.mean([np.square(flawed(x, name, level, seed) - x).mean() for seed in SEEDS])


# All flaws


def test_flaws_are_the_cameras_and_those_distortions_that_train():
    assert FLAWS == CAMERA + TRAINED and len(set(FLAWS)) == len(FLAWS)
    assert not set(FLAWS) & set(HELD_OUT)


def test_the_order_names_every_flaw_once():
    assert sorted(ORDER) == sorted(FLAWS)
    assert (
        ORDER.index("defocus") < ORDER.index("too_dark") < ORDER.index("sensor_noise") < ORDER.index("jpeg")
    )


@pytest.mark.parametrize("name", FLAWS)
def test_a_flaw_gives_a_picture_of_the_same_shape(name, clean):
    for x in (clean, clean[:32, :48], np.zeros((32, 32, 3), np.float32), np.ones((32, 32, 3), np.float32)):
        for level in (1, 5):
            y = flawed(x, name, level)
            assert y.shape == x.shape and y.dtype == np.float32 and y.min() >= 0 and y.max() <= 1


@pytest.mark.parametrize("name", FLAWS)
def test_a_flaw_changes_more_at_higher_levels(name, clean):
    """Two distortions of KADID-10k have signed levels, and blocks are few on a small picture."""
    changes = [change(clean, name, level) for level in range(1, 6)]
    assert max(changes) > 1e-3
    if name in STRENGTH:
        assert changes[0] > changes[1] > changes[2] and changes[4] > changes[3] > changes[2]
    elif name == "color_block":
        assert sorted(changes) == changes and changes[4] > changes[0]
    else:
        assert all(np.diff(changes) > 0), changes


@pytest.mark.parametrize("name", FLAWS)
def test_the_same_seed_gives_the_same_flaw(name, clean):
    before = clean.copy()
    one, two = flawed(clean, name, 4, seed=7), flawed(clean, name, 4, seed=7)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(clean, before)  # what was given is left alone


@pytest.mark.parametrize("name", CAMERA)
def test_a_cameras_flaw_varies_within_its_level(name, clean):
    """A level is a fifth of the whole range, not a point in it."""
    changes = [np.square(flawed(clean, name, 3, seed) - clean).mean() for seed in range(5)]
    assert len(set(changes)) == 5
    assert true_strength(name, 3) == 3


@pytest.mark.parametrize("name", TRAINED)
def test_distortions_are_those_of_the_simulated_sets(name, clean):
    image = Image.fromarray(np.round(clean * 255).astype(np.uint8))
    seed = int(np.random.default_rng(5).integers(2**31))
    expected = np.asarray(distort(image, name, 4, seed), dtype=np.float32) / np.float32(255)
    np.testing.assert_array_equal(flawed(clean, name, 4, seed=5), expected)


@pytest.mark.parametrize("name", ["defocuss", "", "motion"])
def test_an_unknown_flaw_is_named(name, clean):
    with pytest.raises(ValueError, match=f"unknown flaw '{name}': use one of defocus, camera_shake, .*jpeg"):
        flawed(clean, name, 3)


@pytest.mark.parametrize("name", ["haze", "jpeg"])
@pytest.mark.parametrize("level", [0, 6, 2.5])
def test_an_unknown_level_is_named(name, level, clean):
    with pytest.raises(ValueError, match=f"level {level} of {name}: use a whole number from 1 to 5"):
        flawed(clean, name, level)


# What each does


def edges(x: np.ndarray) -> float:
    return np.abs(np.diff(x, axis=0)).mean() + np.abs(np.diff(x, axis=1)).mean()


@pytest.mark.parametrize("name", ["defocus", "camera_shake", "upscaling"])
def test_a_blur_keeps_the_mean_and_takes_edges(name, clean):
    for seed in SEEDS:
        y = flawed(clean, name, 4, seed)
        assert y.mean((0, 1)) == pytest.approx(clean.mean((0, 1)), abs=0.01)
        assert edges(y) < 0.7 * edges(clean)


@pytest.mark.parametrize("name", ["defocus", "camera_shake", "upscaling"])
def test_a_blur_leaves_a_flat_picture_as_it_is(name):
    grey = np.full((48, 64, 3), 0.4, np.float32)
    assert flawed(grey, name, 5) == pytest.approx(grey, abs=0.5 / 255)


def test_a_point_out_of_focus_is_a_disk_and_a_shaken_one_a_path():
    point = np.zeros((65, 65, 3), np.float32)
    point[32, 32] = 1
    disk, path = flawed(point, "defocus", 5)[..., 0], flawed(point, "camera_shake", 5)[..., 0]
    assert disk == pytest.approx(disk[::-1], abs=1e-5) and disk == pytest.approx(disk.T, abs=1e-5)
    assert disk.sum() == pytest.approx(1, abs=1e-3) == path.sum()
    assert (disk > 1e-3).sum() > 60 and path != pytest.approx(path.T, abs=1e-3)
    assert (path > 1e-3).sum() < 65  # thin


def test_less_light_darkens_and_more_light_brightens(clean):
    for seed in SEEDS:
        assert flawed(clean, "too_dark", 5, seed).mean() < 0.5 * clean.mean()
        assert flawed(clean, "too_bright", 5, seed).mean() > min(0.8, 1.5 * clean.mean())
    assert (flawed(clean, "too_dark", 1) <= clean).all() and (flawed(clean, "too_bright", 1) >= clean).all()


def test_haze_takes_contrast_and_a_cast_moves_colours_apart(clean):
    grey = np.repeat(clean.mean(2, keepdims=True), 3, axis=2)
    for seed in SEEDS:
        assert flawed(clean, "haze", 5, seed).std() < 0.6 * clean.std()
        cast = flawed(grey, "color_cast", 5, seed).mean((0, 1))
        assert np.ptp(cast) > 0.1 and np.ptp(flawed(grey, "color_cast", 1, seed).mean((0, 1))) < np.ptp(cast)


def test_sensor_noise_is_stronger_in_the_light_and_has_no_bias():
    picture = np.full((64, 128, 3), 0.25, np.float32)
    picture[:, 64:] = 0.75
    for seed in SEEDS:
        noise = flawed(picture, "sensor_noise", 2, seed) - picture
        assert noise.mean() == pytest.approx(0, abs=0.005)
        assert noise[:, 64:].std() > noise[:, :64].std() > 0.01
