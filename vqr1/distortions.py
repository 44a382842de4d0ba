"""The 25 distortions of KADID-10k at five levels, seeded, in NumPy, SciPy and Pillow.

The numbers are from the authors' generator (`imdist_generator.m` of KADIS-700k, Lin, Hosu and Saupe); the
code is our own. As there, `mean_shift` and `contrast_change` run from plus to minus: their level is no
severity. Parameters in px are native pixels of KADID's 512x384 pictures: distort at full size, crop
afterwards. Unlike the generator, no picture is stretched to the full range of values before or after.
"""

import io
import math

import numpy as np
from PIL import Image, ImageDraw
from scipy import fft, interpolate, ndimage

LEVELS: dict[str, tuple[float, ...]] = {
    "gaussian_blur": (0.1, 0.5, 1, 2, 5),
    "lens_blur": (1, 2, 4, 6, 8),
    "motion_blur": (1, 2, 4, 6, 10),
    "color_diffusion": (1, 3, 6, 8, 12),
    "color_shift": (1, 3, 6, 8, 12),
    "color_quantization": (64, 48, 32, 16, 8),
    "color_saturation_1": (0.4, 0.2, 0.1, 0, -0.4),
    "color_saturation_2": (1, 2, 3, 6, 9),
    "jpeg2000": (16, 32, 45, 120, 400),
    "jpeg": (43, 36, 24, 7, 4),
    "white_noise": (0.001, 0.002, 0.003, 0.005, 0.01),
    "white_noise_color_component": (0.0001, 0.0005, 0.001, 0.002, 0.003),
    "impulse_noise": (0.001, 0.005, 0.01, 0.02, 0.03),
    "multiplicative_noise": (0.001, 0.005, 0.01, 0.02, 0.05),
    "denoise": (0.01, 0.03, 0.05, 0.1, 0.15),
    "brighten": (0.1, 0.2, 0.4, 0.7, 1.1),
    "darken": (0.05, 0.1, 0.2, 0.4, 0.8),
    "mean_shift": (0.15, 0.08, 0, -0.08, -0.15),
    "jitter": (0.05, 0.1, 0.2, 0.5, 1),
    "non_eccentricity_patch": (20, 40, 60, 80, 100),
    "pixelate": (0.01, 0.05, 0.1, 0.2, 0.5),
    "quantization": (20, 16, 13, 10, 7),
    "color_block": (2, 4, 6, 8, 10),
    "high_sharpen": (1, 2, 3, 6, 12),
    "contrast_change": (0.3, 0.15, 0, -0.4, -0.6),
}
"""Name -> parameter at levels 1..5, in KADID's order; each function below says the unit."""

DISTORTIONS: tuple[str, ...] = tuple(LEVELS)
FAMILIES: dict[str, tuple[str, ...]] = {
    "blur": DISTORTIONS[0:3],
    "color": DISTORTIONS[3:8],
    "compression": DISTORTIONS[8:10],
    "noise": DISTORTIONS[10:15],
    "brightness": DISTORTIONS[15:18],
    "spatial": DISTORTIONS[18:23],
    "sharpness_contrast": DISTORTIONS[23:25],
}

STRENGTH = {"mean_shift": (3, 2, 0, 2, 3), "contrast_change": (4, 3, 2, 2, 3)}
"""Strength of levels 1..5 where the level is not the strength."""

# sRGB <-> CIE Lab (D65) by table: powers and cube roots of every pixel would take most of the time.
_D65 = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
)
_XYZ = (_D65 / _D65.sum(axis=1, keepdims=True)).astype(np.float32)
_RGB = np.linalg.inv(_XYZ.astype(np.float64)).astype(np.float32)
_BYTE = np.linspace(0, 1, 256)
_UNIT = np.linspace(0, 1, 32769)
_LINEAR = np.where(_BYTE > 0.04045, ((_BYTE + 0.055) / 1.055) ** 2.4, _BYTE / 12.92).astype(np.float32)
_GAMMA = np.where(_UNIT > 0.0031308, 1.055 * _UNIT ** (1 / 2.4) - 0.055, 12.92 * _UNIT).astype(np.float32)
_ROOT = np.where(_UNIT > 0.008856, np.cbrt(_UNIT), 7.787 * _UNIT + 16 / 116).astype(np.float32)


def _index(x: np.ndarray, top: int) -> np.ndarray:
    return np.clip(x * top + 0.5, 0, top).astype(np.int32)


def _to_lab(x):
    fx, fy, fz = np.moveaxis(_ROOT[_index(_LINEAR[_index(x, 255)] @ _XYZ.T, 32768)], 2, 0)
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def _from_lab(lightness, a, b):
    fy = (lightness + 16) / 116
    f = np.stack([fy + a / 500, fy, fy - b / 200], axis=-1)
    xyz = np.where(f > 0.206893, f * f * f, (f - np.float32(16 / 116)) / np.float32(7.787))
    return _GAMMA[_index(xyz @ _RGB.T, 32768)]


def _to_picture(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(x * 255 + 0.5, 0, 255).astype(np.uint8))


def _from_picture(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _gaussian(x, sigma, radius):
    return ndimage.gaussian_filter(x, sigma, radius=radius, mode="nearest", axes=(0, 1))


def _convolve(x, kernel):
    """Convolve with a square kernel of odd size by FFT, edges repeated."""
    r = len(kernel) // 2
    padded = np.pad(x.transpose(2, 0, 1), ((0, 0), (r, r), (r, r)), mode="edge")
    shape = [fft.next_fast_len(n, real=True) for n in padded.shape[1:]]
    spectrum = fft.rfft2(padded, shape) * fft.rfft2(np.float32(kernel / kernel.sum()), shape)
    out = fft.irfft2(spectrum, shape)[:, 2 * r : 2 * r + x.shape[0], 2 * r : 2 * r + x.shape[1]]
    return out.transpose(1, 2, 0)


def _count(p, x):
    return max(1, round(p * min(1, x.shape[0] * x.shape[1] / (512 * 384))))


# One function per type: x is float32 (H, W, 3) in [0, 1], p its entry in LEVELS; distort() clips the result.
def _gaussian_blur(x, p, rng):
    """Gaussian blur; p: sigma in px."""
    return _gaussian(x, p, math.ceil(2 * p))


def _lens_blur(x, p, rng):
    """Mean over a disk; p: radius in px."""
    grid = np.arange(-p - 1, p + 2)
    return _convolve(x, np.clip(p + 0.5 - np.hypot(grid[:, None], grid), 0, 1))


def _motion_blur(x, p, rng):
    """Mean over a line at a random angle; p: length in px (1: nothing happens)."""
    angle, r = rng.uniform(0, math.pi), p // 2 + 1
    t = np.linspace(-(p - 1) / 2, (p - 1) / 2, 8 * p)
    grid = np.arange(-r, r + 1)
    rows = np.clip(1 - np.abs(grid[:, None] - t * math.sin(angle)), 0, 1)
    columns = np.clip(1 - np.abs(grid[:, None] - t * math.cos(angle)), 0, 1)
    return _convolve(x, rows @ columns.T)


def _color_diffusion(x, p, rng):
    """Blur a and b of Lab by sigma = 1.5 p + 2 px, at a quarter of the size; multiply them by p."""
    lightness, *ab = _to_lab(x)
    h, w = lightness.shape
    small = (math.ceil(w / 4), math.ceil(h / 4))
    sigma = (1.5 * p + 2) / 4
    for i, channel in enumerate(ab):
        low = np.asarray(Image.fromarray(channel).resize(small, Image.BOX))
        low = ndimage.gaussian_filter(low, sigma, radius=math.ceil(2 * sigma), mode="nearest")
        ab[i] = p * np.asarray(Image.fromarray(low).resize((w, h), Image.BILINEAR))
    return _from_lab(lightness, *ab)


def _color_shift(x, p, rng):
    """Move the green channel down and right by a random angle, mostly near edges; p: distance in px."""
    gray = x @ np.float32([0.299, 0.587, 0.114])
    edges = np.abs(np.diff(gray, axis=0, append=gray[-1:])) + np.abs(
        np.diff(gray, axis=1, append=gray[:, -1:])
    )
    edges = _gaussian(edges, 4, 8)
    low, high = np.percentile(edges[::4, ::4], (1, 99))
    weight = np.clip((edges - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
    angle = rng.uniform(0, math.pi / 2)
    (dy, dx), (h, w) = (round(p * math.sin(angle)), round(p * math.cos(angle))), gray.shape
    green = x[..., 1]
    moved = green[np.clip(np.arange(h) - dy, 0, None)][:, np.clip(np.arange(w) - dx, 0, None)]
    return np.stack([x[..., 0], green + weight * (moved - green), x[..., 2]], axis=-1)


def _color_quantization(x, p, rng):
    """Keep p colours (octree), with Floyd-Steinberg dither."""
    image = _to_picture(x)
    palette = image.quantize(p, method=Image.Quantize.FASTOCTREE)
    return _from_picture(image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).convert("RGB"))


def _color_saturation_1(x, p, rng):
    """Multiply S of HSV by p (negative: complementary hues); with H and V kept that is v - p (v - x)."""
    v = np.maximum(np.maximum(x[..., :1], x[..., 1:2]), x[..., 2:])
    return v - np.float32(p) * (v - x)


def _color_saturation_2(x, p, rng):
    """Multiply a and b of Lab by p (1: nothing happens)."""
    lightness, a, b = _to_lab(x)
    return _from_lab(lightness, p * a, p * b)


def _reopen(x, **options):
    buffer = io.BytesIO()
    _to_picture(x).save(buffer, **options)
    return _from_picture(Image.open(buffer))


def _jpeg2000(x, p, rng):
    """JPEG 2000 with its lossy wavelet and colour transform; p: compression ratio."""
    depth = min(6, int(math.log2(min(x.shape[:2]))) + 1)
    lossy = {"irreversible": True, "mct": 1, "num_resolutions": depth}
    return _reopen(x, format="JPEG2000", quality_mode="rates", quality_layers=[p], **lossy)


def _jpeg(x, p, rng):
    """JPEG with 4:2:0 chroma; p: quality."""
    return _reopen(x, format="JPEG", quality=p, subsampling=2)


def _normal(x, variance, rng):
    return np.float32(math.sqrt(variance)) * rng.standard_normal(x.shape, dtype=np.float32)


def _white_noise(x, p, rng):
    """Add Gaussian noise to R, G and B; p: variance."""
    return x + _normal(x, p, rng)


def _white_noise_color_component(x, p, rng):
    """Add Gaussian noise to Y, Cb and Cr (studio range, as MATLAB's); p: variance."""
    to_rgb = np.float32([[1.164, 1.164, 1.164], [0, -0.392, 2.017], [1.596, -0.813, 0]])
    return x + _normal(x, p, rng) @ to_rgb


def _impulse_noise(x, p, rng):
    """Set channel values to 0 or 1; p: share of the values."""
    u = rng.random(x.shape, dtype=np.float32)
    return np.where(u < p / 2, 0, np.where(u > 1 - p / 2, 1, x))


def _multiplicative_noise(x, p, rng):
    """Multiply by 1 + Gaussian noise; p: variance."""
    return x + x * _normal(x, p, rng)


def _denoise(x, p, rng):
    """Add Gaussian noise of variance p, then shrink three wavelet bands where they hold little but noise.

    KADID used a deep denoiser (DnCNN). This stand-in (undecimated bands between Gaussian blurs, Wiener gain
    from the energy nearby) is fast and leaves the same look: flat smears, soft blotches, edges kept where
    they are strong.
    """
    low, out = np.clip(x + _normal(x, p, rng), 0, 1), 0
    for sigma, spread in (
        (0.8, 0.79),
        (1.4, 0.24),
        (2.8, 0.12),
    ):  # spread: std of unit white noise in the band
        band = low - (low := _gaussian(low, sigma, math.ceil(2 * sigma)))
        energy = ndimage.uniform_filter(np.square(band).mean(axis=2), 5, mode="nearest") + 1e-9
        out = out + band * np.clip(1 - 1.5 * p * spread**2 / energy, 0, 1)[..., None]
    return low + out


def _curve(x, middle):
    """The parabola through (0, 0), (0.5, middle), (1, 1), clipped."""
    slope = np.float32(4 * middle - 1)
    return np.clip(x * (slope + (1 - slope) * x), 0, 1)


def _brighten(x, p, rng):
    """Lift mid-tones to 0.5 + p / 2: two parts a curve on R, G and B, one part the same curve on L of Lab."""
    lightness, a, b = _to_lab(x)
    return (2 * _curve(x, 0.5 + p / 2) + _from_lab(100 * _curve(lightness / 100, 0.5 + p / 2), a, b)) / 3


def _darken(x, p, rng):
    """Lower mid-tones to 0.5 - p / 2 by a curve on R, G and B."""
    return _curve(x, 0.5 - p / 2)


def _mean_shift(x, p, rng):
    """Add p to every value."""
    return x + np.float32(p)


def _jitter(x, p, rng):
    """Move every pixel at random, five times, bilinearly; p: standard deviation of one move in px."""
    h, w = x.shape[:2]
    x = np.pad(
        x.reshape(-1, 3), ((0, 0), (0, 1))
    )  # 16 bytes per pixel, so that one look-up fetches all channels
    for _ in range(5):
        moves = np.float32(p) * rng.standard_normal((2, h, w), dtype=np.float32)
        r, fr = _place(moves[0] + np.arange(h, dtype=np.float32)[:, None], h)
        c, fc = _place(moves[1] + np.arange(w, dtype=np.float32), w)
        corner, pixels = r * w + c, x.view(np.complex128).ravel()
        top, right, low, low_right = (
            pixels.take(corner + step).view(np.float32).reshape(-1, 4)
            for step in (0, min(w - 1, 1), w * min(h - 1, 1), w * min(h - 1, 1) + min(w - 1, 1))
        )
        top += fc * (right - top)
        low += fc * (low_right - low)
        x = top + fr * (low - top)
    return x[:, :3].reshape(h, w, 3)


def _place(position, length):
    """Clamp to the picture; return the cell's first index, and the second's share as a column."""
    position = np.clip(position, 0, length - 1)
    first = np.minimum(position.astype(np.intp), max(length - 2, 0))
    return first.ravel(), (position - first).astype(np.float32).reshape(-1, 1)


def _non_eccentricity_patch(x, p, rng):
    """Copy p patches of 16x16 px to places up to 8 px away; p is per 512x384, fewer (at least 1) on less."""
    (h, w), out = x.shape[:2], x.copy()
    size, n = min(16, h, w), _count(p, x)
    limit = (h - size, w - size)
    source = rng.integers(0, limit, (n, 2), endpoint=True)
    target = np.clip(source + rng.integers(-8, 8, (n, 2), endpoint=True), 0, limit)
    for (r, c), (i, j) in zip(source, target):
        out[i : i + size, j : j + size] = x[r : r + size, c : c + size]
    return out


def _pixelate(x, p, rng):
    """Shrink to 0.95 - p^0.6 of the size and back, nearest neighbour; p: strength."""
    image, z = _to_picture(x), 0.95 - p**0.6
    small = (max(1, int(z * image.width)), max(1, int(z * image.height)))
    return _from_picture(image.resize(small, Image.NEAREST).resize(image.size, Image.NEAREST))


def _quantization(x, p, rng):
    """Keep p equally spaced values per channel."""
    return np.minimum(np.floor(x * p), p - 1) / np.float32(p - 1)


def _color_block(x, p, rng):
    """Paint p blocks of 32x32 px in random colours; p is per 512x384, fewer (at least 1) on less."""
    (h, w), out = x.shape[:2], x.copy()
    size, n = min(32, h, w), _count(p, x)
    corners = rng.integers(0, (h - size, w - size), (n, 2), endpoint=True)
    for (r, c), color in zip(corners, rng.random((n, 3), dtype=np.float32)):
        out[r : r + size, c : c + size] = color
    return out


def _high_sharpen(x, p, rng):
    """Unsharp mask on L of Lab, radius 3 px; p: amount."""
    lightness, a, b = _to_lab(x)
    return _from_lab(lightness + p * (lightness - _gaussian(lightness, 3, 6)), a, b)


def _contrast_change(x, p, rng):
    """Bend tones by a cubic spline: 0.3 to 0.25 - p / 4, 0.7 to 0.75 + p / 4 (p = -0.2: identity)."""
    curve = interpolate.CubicSpline((0, 0.3, 0.5, 0.7, 1), (0, 0.25 - p / 4, 0.5, 0.75 + p / 4, 1))
    return curve(_BYTE).astype(np.float32)[_index(x, 255)]


_FUNCTIONS = {
    "gaussian_blur": _gaussian_blur,
    "lens_blur": _lens_blur,
    "motion_blur": _motion_blur,
    "color_diffusion": _color_diffusion,
    "color_shift": _color_shift,
    "color_quantization": _color_quantization,
    "color_saturation_1": _color_saturation_1,
    "color_saturation_2": _color_saturation_2,
    "jpeg2000": _jpeg2000,
    "jpeg": _jpeg,
    "white_noise": _white_noise,
    "white_noise_color_component": _white_noise_color_component,
    "impulse_noise": _impulse_noise,
    "multiplicative_noise": _multiplicative_noise,
    "denoise": _denoise,
    "brighten": _brighten,
    "darken": _darken,
    "mean_shift": _mean_shift,
    "jitter": _jitter,
    "non_eccentricity_patch": _non_eccentricity_patch,
    "pixelate": _pixelate,
    "quantization": _quantization,
    "color_block": _color_block,
    "high_sharpen": _high_sharpen,
    "contrast_change": _contrast_change,
}


def distort(image: Image.Image, name: str, level: int, seed: int = 0) -> Image.Image:
    """Return an RGB picture of the same size with one of KADID-10k's distortions.

    Args:
        image: RGB.
        name: one of `DISTORTIONS`.
        level: 1..5.
        seed: the same one gives the same pixels.

    Raises:
        ValueError: the name or level is unknown, or the image is not RGB.

    >>> grey = Image.new("RGB", (4, 2), (100, 100, 100))
    >>> distort(grey, "mean_shift", 1).getpixel((0, 0))
    (138, 138, 138)
    """
    if image.mode != "RGB":
        raise ValueError(f'distort needs an RGB picture, not mode {image.mode}: pass image.convert("RGB")')
    if name not in LEVELS:
        raise ValueError(f"unknown distortion {name!r}: use one of {', '.join(DISTORTIONS)}")
    if level not in range(1, 6):
        raise ValueError(f"level {level!r} of {name}: use a whole number from 1 to 5")
    x = _from_picture(image)
    return _to_picture(_FUNCTIONS[name](x, LEVELS[name][int(level) - 1], np.random.default_rng(seed)))


def true_strength(name: str, level: int) -> int:
    """Return how strong a distortion looks at a level, 1..5; 0 where nothing changes (mean shift, level 3).

    >>> true_strength("jpeg", 4), true_strength("mean_shift", 5)
    (4, 3)
    """
    return STRENGTH.get(name, (1, 2, 3, 4, 5))[level - 1]


def contact_sheet(image: Image.Image) -> Image.Image:
    """Return all 25 types (rows, named) at levels 1..5 (columns): the middle 160x120 px at native size."""
    w, h = min(160, image.width), min(120, image.height)
    x, y = (image.width - w) // 2, (image.height - h) // 2
    sheet = Image.new("RGB", (230 + 5 * (w + 4), 25 * (h + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(DISTORTIONS):
        draw.text((6, row * (h + 4) + h // 2 - 12), f"{name}\n{LEVELS[name]}", fill="black")
        for level in range(1, 6):
            cell = distort(image, name, level).crop((x, y, x + w, y + h))
            sheet.paste(cell, (230 + (level - 1) * (w + 4), row * (h + 4)))
    return sheet
