"""What cameras do to photographs: eight flaws of a strength, beside KADID-10k's distortions.

People rate photographs that went wrong in a camera: out of focus, shaken, too dark, noisy, enlarged.
KADID-10k's distortions are added to good photographs by a program. A policy that is to describe both needs
words for both.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from vqr1.data.manifests import TRAINED
from vqr1.distortions import distort

CAMERA = (
    "defocus", "camera_shake", "too_dark", "too_bright", "haze", "color_cast", "sensor_noise", "upscaling",
)  # fmt: skip
"""The camera's flaws."""

FLAWS = (*CAMERA, *TRAINED)
"""Every flaw that the embedded policy is taught to name."""

ORDER = (
    "defocus", "camera_shake", "gaussian_blur", "lens_blur", "too_dark", "too_bright", "haze", "color_cast",
    "color_saturation_1", "color_shift", "color_diffusion", "sensor_noise", "white_noise",
    "white_noise_color_component", "impulse_noise", "denoise", "brighten", "mean_shift", "contrast_change",
    "high_sharpen", "upscaling", "jitter", "quantization", "color_quantization", "non_eccentricity_patch",
    "color_block", "jpeg",
)  # fmt: skip
"""Lens, light, sensor, software, file: what comes first is applied first."""


def _blur(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve (H, W, 3) with a square kernel of odd size, edges repeated."""
    r = len(kernel) // 2
    padded = np.pad(x.transpose(2, 0, 1), ((0, 0), (r, r), (r, r)), mode="edge")
    shape = [fft.next_fast_len(n, real=True) for n in padded.shape[1:]]
    spectrum = fft.rfft2(padded, shape) * fft.rfft2(np.float32(kernel / kernel.sum()), shape)
    out = fft.irfft2(spectrum, shape)[:, 2 * r : 2 * r + x.shape[0], 2 * r : 2 * r + x.shape[1]]
    return np.ascontiguousarray(out.transpose(1, 2, 0))


def _defocus(x, t, rng):
    """Mean over a disk of radius 0.8 to 6.4 px."""
    radius = 0.8 * 8**t
    grid = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
    return _blur(x, np.clip(radius + 0.5 - np.hypot(grid[:, None], grid), 0, 1))


def _camera_shake(x, t, rng):
    """Mean over a bent path of 2.5 to 20 px, as a hand moves while the shutter is open."""
    length, points = 2.5 * 8**t, 64
    angle = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, rng.uniform(0.02, 0.2), points))
    path = np.cumsum(np.stack([np.sin(angle), np.cos(angle)]) * length / points, axis=1)
    path -= path.mean(1, keepdims=True)
    r = math.ceil(np.abs(path).max()) + 1
    grid = np.arange(-r, r + 1)
    rows = np.clip(1 - np.abs(grid[:, None] - path[0]), 0, 1)
    columns = np.clip(1 - np.abs(grid[:, None] - path[1]), 0, 1)
    return _blur(x, rows @ columns.T)


def _too_dark(x, t, rng):
    """Less light by 0.7 to 3.5 stops, and blacks that are lost."""
    return x * np.float32(2 ** (-(0.7 + 2.8 * t) / 2.2)) - np.float32(rng.uniform(0, 0.03) * t)


def _too_bright(x, t, rng):
    """More light by 0.5 to 2.5 stops; what is above white is lost."""
    return x * np.float32(2 ** ((0.5 + 2.0 * t) / 2.2)) + np.float32(rng.uniform(0, 0.05) * t)


def _haze(x, t, rng):
    """A veil of light over 12 to 70% of the contrast."""
    share, light = 0.12 + 0.58 * t, np.float32(rng.uniform(0.45, 0.95) + rng.normal(0, 0.03, 3))
    return x * np.float32(1 - share) + light * np.float32(share)


def _color_cast(x, t, rng):
    """A wrong white balance: the channels' gains differ by 0.1 to 0.8 stops."""
    gains = rng.normal(size=3)
    gains -= gains.mean()
    gains *= (0.1 + 0.7 * t) / (gains.max() - gains.min())
    return x * np.float32(2**gains)


def _sensor_noise(x, t, rng):
    """Noise of photons and of reading, 0.012 to 0.12 in mid-tones, often coarse and coloured."""
    level = 0.012 * 10**t
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    if rng.random() < 0.6:
        sigma = rng.uniform(0.4, 1.0)
        noise = ndimage.gaussian_filter(noise, (sigma, sigma, 0)) * np.float32(1 + 2.2 * sigma**1.5)
    mean = noise.mean(2, keepdims=True)
    noise = mean + np.float32(rng.uniform(0.5, 1.5)) * (noise - mean)
    read = rng.uniform(0.2, 0.8)
    return (
        x
        + np.float32(level)
        * np.sqrt(np.float32(read) + np.float32(2 * (1 - read)) * np.clip(x, 0, 1))
        * noise
    )


def _upscaling(x, t, rng):
    """Shrink by 1.3 to 4.5 and enlarge again."""
    image, factor = _picture(x), 1.3 * 3.5**t
    size = (max(8, round(image.width / factor)), max(8, round(image.height / factor)))
    down = (Image.BICUBIC, Image.LANCZOS, Image.BOX)[rng.integers(3)]
    up = (Image.BICUBIC, Image.BILINEAR, Image.LANCZOS)[rng.integers(3)]
    return _array(image.resize(size, down).resize(image.size, up))


_FUNCTIONS: dict[str, Callable] = {
    "defocus": _defocus, "camera_shake": _camera_shake, "too_dark": _too_dark, "too_bright": _too_bright,
    "haze": _haze, "color_cast": _color_cast, "sensor_noise": _sensor_noise, "upscaling": _upscaling,
}  # fmt: skip


def _picture(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(x * 255 + 0.5, 0, 255).astype(np.uint8))


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def add(x: np.ndarray, name: str, level: int, rng: np.random.Generator) -> np.ndarray:
    """Return the picture (H, W, 3), 0..1, with one flaw at level 1..5.

    Raises ValueError for a name that is not in `FLAWS` and for another level.

    >>> grey = np.full((8, 8, 3), 0.5, np.float32)
    >>> bool(add(grey, "too_dark", 5, np.random.default_rng(0)).mean() < 0.25)
    True
    """
    if name not in FLAWS:
        raise ValueError(f"unknown flaw {name!r}: use one of {', '.join(FLAWS)}")
    if level not in range(1, 6):
        raise ValueError(f"level {level!r} of {name}: use a whole number from 1 to 5")
    if name in _FUNCTIONS:
        return np.clip(_FUNCTIONS[name](x, (level - rng.random()) / 5, rng), 0, 1)
    return _array(distort(_picture(x), name, level, int(rng.integers(2**31))))
