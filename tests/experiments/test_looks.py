"""Looks are finite for every picture, follow what is done to it, and mix with no other words."""

from itertools import product

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from vqr1.experiments.looks import (
    DETAIL,
    DETAIL_LIMITS,
    EDGE_LIMITS,
    EDGES,
    LIGHT,
    LIGHT_LIMITS,
    look,
    measure,
)
from vqr1.prompts import CLEAN, PHRASES, SEVERITY, named_distortions, named_severity

LOOKS = [f"edges {e}, detail {d}, light {n}" for e, d, n in product(EDGES, DETAIL, LIGHT)]


@pytest.fixture(scope="module")
def clean(photo) -> np.ndarray:
    """A part of a photograph, (192, 256, 3) uint8."""
    return np.asarray(photo.crop((64, 64, 320, 256)))


def rounded(x: np.ndarray) -> np.ndarray:
    return np.clip(np.round(x), 0, 255).astype(np.uint8)


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    return rounded(gaussian_filter(picture.astype(float), (sigma, sigma, 0)))


def noisy(picture: np.ndarray, deviation: float) -> np.ndarray:
    return rounded(picture + np.random.default_rng(0).normal(0, deviation, picture.shape))


def ranks(picture: np.ndarray) -> tuple[int, int, int]:
    """Return the places of the three words in their lists."""
    edges, detail, light = (part.split()[1] for part in look(picture).split(", "))
    return EDGES.index(edges), DETAIL.index(detail), LIGHT.index(light)


# Numbers


@pytest.mark.parametrize("shape", [(32, 32), (32, 64), (192, 256), (65, 97)])
def test_what_is_measured_is_finite(shape):
    rng = np.random.default_rng(0)
    pictures = [np.full((*shape, 3), shade, np.uint8) for shade in (0, 128, 255)]
    pictures += [rng.integers(0, 256, (*shape, 3), dtype=np.uint8)]
    pictures += [rng.integers(0, 2, (*shape, 3), dtype=np.uint8) * 255]
    for picture in pictures:
        found = measure(picture)
        assert found.shape == (83,) and found.dtype == np.float32 and np.isfinite(found).all()
        assert look(picture) in LOOKS


def test_numbers_tell_flaws_apart(clean):
    """Each change moves some numbers by a good part of their size, and another change other ones."""
    kinds = {"blur": blurred(clean, 2), "noise": noisy(clean, 20), "dark": clean // 3, "grey": clean.copy()}
    kinds["grey"][:] = clean.mean(2, keepdims=True)
    moved = {name: measure(picture) - measure(clean) for name, picture in kinds.items()}
    assert all(np.abs(change).max() > 0.2 for change in moved.values())
    unit = np.array([change / np.linalg.norm(change) for change in moved.values()])
    assert (unit @ unit.T)[~np.eye(len(unit), dtype=bool)].max() < 0.7


def test_blocks_of_eight_pixels_are_seen():
    """The last number is the share of steps at every eighth pixel; the same blocks elsewhere are none."""
    shades = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    blocks = np.repeat(np.kron(shades, np.ones((8, 8), np.uint8))[..., None], 3, axis=2)
    assert measure(blocks)[-1] > 1.5 > 0 > measure(np.roll(blocks, 4, (0, 1)))[-1]


def test_numbers_hardly_depend_on_the_size(clean):
    """Statistics are means and percentiles: four times the picture has nearly the same."""
    whole = np.tile(clean, (2, 2, 1))
    assert np.abs(measure(whole) - measure(clean)).max() < 0.3


# Words


def test_there_is_a_word_for_every_step():
    for words, limits in ((EDGES, EDGE_LIMITS), (DETAIL, DETAIL_LIMITS), (LIGHT, LIGHT_LIMITS)):
        assert len(words) == len(limits) + 1 == 5 and sorted(limits) == list(limits)
    assert len({*EDGES, *DETAIL, *LIGHT}) == 15  # a word has one meaning


def test_blur_takes_edges(clean):
    places = [ranks(blurred(clean, sigma))[0] for sigma in (0, 0.7, 1.5, 4)]
    assert sorted(places, reverse=True) == places and places[0] > places[-1] == 0


def test_noise_gives_detail(clean):
    places = [ranks(noisy(clean, deviation))[1] for deviation in (0, 10, 30)]
    assert sorted(places) == places and places[0] < places[-1] == 4


def test_less_light_is_darker(clean):
    places = [ranks(rounded(clean.astype(float) * gain))[2] for gain in (2, 1, 0.5, 0.2)]
    assert sorted(places, reverse=True) == places and places[0] > places[1] > places[-1] == 0


def test_no_look_names_a_flaw_or_its_strength():
    for text in LOOKS:
        assert named_distortions(text) == [] and named_severity(text) is None, text
        assert named_severity(f"{CLEAN}; {text}") == 0 and named_distortions(f"{CLEAN}; {text}") == [], text


def test_looks_do_not_change_what_is_named_before_them():
    for text, (name, phrase), strength in product(LOOKS[::7], PHRASES.items(), range(1, 6)):
        said = f"{SEVERITY[strength - 1]} {phrase} along the edges; {text}"
        assert named_distortions(said) == [name] and named_severity(said) == strength, said
