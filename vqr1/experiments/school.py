"""The pictures that the embedded policy learns to see by: sources without known flaws, and flaws added.

Sources are photographs of BIQ2021's training part where that set is there, the licensed photographs that come
with the project, and procedural pictures. Their ratings are not used.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from vqr1.data.images import open_picture
from vqr1.data.manifests import TRAINED, load_ratings
from vqr1.data.photographs import photographs
from vqr1.distortions import true_strength
from vqr1.experiments.damage import CAMERA, ORDER, add
from vqr1.experiments.dead_leaves import dead_leaves, pink_textures
from vqr1.experiments.tiny import LARGEST

INVISIBLE_DB = 45.0
"""A flaw that changes a picture by less than this PSNR is not counted."""
TILE = 32
"""Sides of pictures are multiples of this: the policy's merged patches."""
LICENSED = 0.25
"""Share of the photographs that are licensed ones; the others come from BIQ2021, if it is there."""
RECIPES = 2
"""Pictures made of each source."""
ALTERNATIVES = (("too_dark", "too_bright"), ("defocus", "camera_shake"), ("gaussian_blur", "lens_blur"))
"""Flaws that one picture does not have together; the first one stays."""


class Flaw(NamedTuple):
    """A flaw of a picture: its name, its strength 1..5, and the picture before and after it came, in 0..1."""

    name: str
    strength: int
    before: np.ndarray
    after: np.ndarray


class Picture(NamedTuple):
    """Pixels, uint8 (H, W, 3), and the flaws added to them; None for an authentic picture."""

    pixels: np.ndarray
    flaws: tuple[Flaw, ...] | None


def find_school(root: str | Path | None = None) -> list[Path]:
    """Return the pictures of BIQ2021's training part: no validation or test picture, none of their twins.

    root: where the set is, as for `load_ratings`, whose errors it raises. Without a root, and without the set
        where it is looked for, there are none, and that is printed.
    """
    try:
        rows = load_ratings("biq2021", root, strict=False)
    except FileNotFoundError as error:
        if root:
            raise
        print(f"Taught without BIQ2021's photographs: {error}")
        return []
    return [Path(rows.attrs["root"]) / image for image in rows.loc[rows["split"] == "train", "image"]]


@lru_cache(maxsize=1)
def _licensed(splits: tuple[str, ...]) -> list[np.ndarray]:
    return [np.asarray(image) for image in photographs(*splits).values()]


Recipe = list[tuple[str, int]]
"""Flaws with their levels 1..5, in the order in which they are added."""


def one_flaw(rng: np.random.Generator) -> Recipe:
    """Return a recipe of one flaw: a trained distortion of KADID-10k.

    >>> one_flaw(np.random.default_rng(5))
    [('mean_shift', 5)]
    """
    return [(str(rng.choice(TRAINED)), int(rng.integers(1, 6)))]


def several_flaws(rng: np.random.Generator) -> Recipe:
    """Return a recipe of up to three flaws: most often one of KADID-10k's, else none, or those of a camera.

    >>> several_flaws(np.random.default_rng(5))
    [('color_cast', 5), ('jpeg', 1)]
    """
    share = rng.random()
    if share < 0.6:
        return one_flaw(rng)
    if share < 0.68:
        names = []
    elif share < 0.8:
        names = [rng.choice(CAMERA)]
    elif share < 0.95:
        names = list(rng.choice(CAMERA, int(rng.integers(2, 4)), replace=False))
        names[-1] = "jpeg" if rng.random() < 0.3 else names[-1]  # many cameras save JPEG files
    else:
        names = list(rng.choice(TRAINED, 2, replace=False))
    chosen = set(map(str, names))
    chosen -= {second for first, second in ALTERNATIVES if first in chosen}
    return [(name, int(rng.integers(1, 6))) for name in sorted(chosen, key=ORDER.index)]


class PictureStream(IterableDataset):
    """An endless stream of lists of pictures, `RECIPES` of each source, each by a recipe of its own.

    Some lists have crops of authentic pictures instead, as they are.

    Args:
        seed: of everything drawn; each worker draws others.
        sizes: side in pixels -> probability. A list has one size.
        lesson: draws the recipe of a picture: `one_flaw` or `several_flaws`.
        school: files of authentic photographs; without any, the licensed ones take their share.
        procedural: share of the sources that are procedural pictures.
        sources: per list.
        authentic: share of the lists whose pictures stay as they are.
        splits: of the licensed photographs.
        oblong: share of the lists whose pictures are lower or narrower than the size.
    """

    def __init__(
        self,
        seed: int,
        sizes: dict[int, float],
        lesson: Callable[[np.random.Generator], Recipe] = several_flaws,
        school: Sequence[Path] = (),
        procedural: float = 0.15,
        sources: int = 1,
        authentic: float = 0.0,
        splits: tuple[str, ...] = ("train",),
        oblong: float = 0.0,
    ):
        self.seed, self.sizes, self.lesson, self.sources = seed, sizes, lesson, sources
        self.school, self.procedural = school, procedural
        self.authentic, self.splits, self.oblong = authentic if school else 0.0, splits, oblong

    def __iter__(self) -> Iterator[list[Picture]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        self.licensed = _licensed(self.splits)
        self.textures = pink_textures(np.random.default_rng(0))
        sides, chances = list(self.sizes), list(self.sizes.values())
        while True:
            side = int(rng.choice(sides, p=chances))
            shape = [side, side]
            if rng.random() < self.oblong:
                shape[rng.integers(2)] = TILE * int(rng.integers(4, side // TILE + 1))
            make = self._as_they_are if rng.random() < self.authentic else self._damaged
            yield [picture for _ in range(self.sources) for picture in make(rng, shape)]

    def _as_they_are(self, rng: np.random.Generator, shape: list[int]) -> list[Picture]:
        photo = _turned(rng, self._photograph(rng))
        crops = [np.ascontiguousarray(photo[_window(rng, photo, shape)]) for _ in range(RECIPES)]
        return [Picture(crop, None) for crop in crops]

    def _photograph(self, rng: np.random.Generator) -> np.ndarray:
        return np.asarray(open_picture(self.school[rng.integers(len(self.school))]))

    def _damaged(self, rng: np.random.Generator, shape: list[int]) -> list[Picture]:
        clean = self.source(rng, min(max(shape) + 32, LARGEST)).astype(np.float32) / 255
        pictures = []
        for _ in range(RECIPES):
            done, stages = self.lesson(rng), [clean]
            for name, level in done:
                stages.append(add(stages[-1], name, level, rng))
            pictures.append(self._crop(rng, shape, done, stages))
        return pictures

    def source(self, rng: np.random.Generator, side: int) -> np.ndarray:
        """Return a picture without known flaws, uint8 (side, side, 3), or smaller where its photograph is."""
        if rng.random() < self.procedural:
            return np.round(dead_leaves(rng, self.textures, min(side, 440)) * 255).astype(np.uint8)
        if not self.school or rng.random() < LICENSED:
            photo = self.licensed[rng.integers(len(self.licensed))]
        else:
            photo = _reduced(rng, self._photograph(rng), side)
        side = min(side, *photo.shape[:2])
        photo = _turned(rng, photo[_window(rng, photo, [side, side])])
        return np.ascontiguousarray(photo[..., rng.permutation(3)] if rng.random() < 0.1 else photo)

    def _crop(self, rng, shape: list[int], done: list[tuple[str, int]], stages: list[np.ndarray]) -> Picture:
        window = _window(rng, stages[0], shape, step=8 if rng.random() < 0.7 else 1)
        cuts = [stage[window] for stage in stages]
        flaws = [
            Flaw(name, true_strength(name, level), before, after)
            for (name, level), before, after in zip(done, cuts, cuts[1:])
            if np.square(before - after).mean() > 10 ** (-INVISIBLE_DB / 10)
        ]
        pixels = np.clip(cuts[-1] * 255 + 0.5, 0, 255).astype(np.uint8)
        return Picture(pixels, tuple(flaw for flaw in flaws if flaw.strength))


def _reduced(rng: np.random.Generator, photo: np.ndarray, side: int) -> np.ndarray:
    """Return an authentic photograph, mostly made smaller, by half at most: that hides its own flaws."""
    least = max(side / min(photo.shape[:2]), 0.5)
    if least >= 1 or rng.random() < 0.3:
        return photo
    scale, image = rng.uniform(least, 1), Image.fromarray(photo)
    return np.asarray(image.resize([round(n * scale) for n in image.size], Image.Resampling.LANCZOS))


def _turned(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    photo = photo[:, ::-1] if rng.random() < 0.5 else photo
    return np.rot90(photo, int(rng.integers(4))) if rng.random() < 0.15 else photo


def _window(
    rng: np.random.Generator, photo: np.ndarray, shape: list[int], step: int = 1
) -> tuple[slice, slice]:
    """Return a random window of a shape, or of the largest whole number of tiles that fits."""
    window = []
    for whole, wanted in zip(photo.shape[:2], shape):
        side = min(wanted, whole // TILE * TILE)
        start = step * int(rng.integers(0, (whole - side) // step + 1))
        window.append(slice(start, start + side))
    return tuple(window)
