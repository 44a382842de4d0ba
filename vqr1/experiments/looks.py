"""What can be measured on any picture without asking anybody: sharpness, detail, light, colour, noise.

The embedded policy is taught to see these numbers before it learns from ratings, and to say three of them in
words. They follow classical measures that need no reference: gradients and their percentiles, and the
statistics of contrast-normalised pixels of BRISQUE (Mittal et al., 2012).
"""

import numpy as np
from scipy import ndimage

LUMA = np.float32([0.299, 0.587, 0.114])
"""Weights of R, G and B."""
GRADIENTS = (25, 50, 75, 90, 99)
SECOND = (10, 50, 90, 99)
"""Percentiles of first and second differences that are measured."""

EDGES = ("blurred", "soft", "clear", "crisp", "hard")
DETAIL = ("lost", "coarse", "plain", "fine", "grainy")
LIGHT = ("dark", "dim", "even", "bright", "glaring")
"""Words for the sharpness of edges, the fineness of detail, and the mean brightness."""
EDGE_LIMITS = (0.10, 0.17, 0.25, 0.36)
"""99th percentile of the luma's gradient, in 0..1 per pixel, at which the next word begins."""
DETAIL_LIMITS = (0.85, 1.05, 1.25, 1.45)
"""The same for the 90th percentile of second differences over that of gradients."""
LIGHT_LIMITS = (0.22, 0.36, 0.5, 0.65)
"""The same for mean luma in 0..1."""


def measure(picture: np.ndarray) -> np.ndarray:
    """Return a picture's measured statistics, (83,) float32.

    picture: uint8 (H, W, 3), at least 32 pixels a side.

    Of luma at full, half and quarter size: log percentiles of first and second differences, moments of
    contrast-normalised pixels and of the products of neighbours. Of the whole: light, contrast, colour,
    blocking.

    >>> grey = np.full((64, 64, 3), 128, np.uint8)
    >>> measure(grey).shape, bool(np.isfinite(measure(grey)).all())
    ((83,), True)
    """
    color = picture.astype(np.float32) / 255
    luma = color @ LUMA
    return np.float32(
        [*_texture(luma), *_texture(_half(luma)), *_texture(_half(_half(luma))), *_tone(color, luma)]
    )


def _half(x: np.ndarray) -> np.ndarray:
    h, w = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
    return x[:h, :w].reshape(h // 2, 2, w // 2, 2).mean((1, 3))


def _gradient(y: np.ndarray) -> np.ndarray:
    return np.hypot(y[:-1, 1:] - y[:-1, :-1], y[1:, :-1] - y[:-1, :-1])


def _second(y: np.ndarray) -> np.ndarray:
    return np.abs(4 * y[1:-1, 1:-1] - y[2:, 1:-1] - y[:-2, 1:-1] - y[1:-1, 2:] - y[1:-1, :-2])


def _percentiles(x: np.ndarray, at: tuple[int, ...]) -> np.ndarray:
    """Return percentiles of at most about 10,000 of the values."""
    few = x.ravel()[:: max(1, x.size // 10_000) | 1]
    ranks = [round(p / 100 * (len(few) - 1)) for p in at]
    return np.partition(few, ranks)[ranks]


def _texture(y: np.ndarray) -> list[float]:
    """Return 22 statistics of luma at one size."""
    first, second = _gradient(y), _second(y)
    p, q = _percentiles(first, GRADIENTS), _percentiles(second, SECOND)
    mean = ndimage.uniform_filter(y, 7)
    deviation = np.sqrt(np.maximum(ndimage.uniform_filter(y * y, 7) - mean * mean, 0))
    z = (y - mean) / (deviation + np.float32(1 / 255))
    power = float(np.square(z).mean())
    kurtosis = float((np.square(z) ** 2).mean()) / (power**2 + 1e-6)
    neighbours = (z[:, 1:] * z[:, :-1], z[1:] * z[:-1], z[1:, 1:] * z[:-1, :-1], z[1:, :-1] * z[:-1, 1:])
    spread = _percentiles(deviation, (5, 50))
    return [
        *np.log(p + 2e-3),
        *np.log(q + 2e-3),
        np.log(first.mean() + 1e-3),
        np.log(q[2] / (p[3] + 1e-3) + 0.05),
        np.abs(z).mean(),
        power,
        np.log(kurtosis + 0.1),
        *(n.mean() for n in neighbours),
        *(_skew(n) for n in neighbours[:2]),
        *np.log(spread + 1e-3),
    ]


def _skew(products: np.ndarray) -> float:
    """Return the log ratio of the deviations of the positive and of the negative products."""
    positive = np.sqrt(np.square(np.maximum(products, 0)).mean())
    negative = np.sqrt(np.square(np.minimum(products, 0)).mean())
    return np.log(positive / (negative + 1e-3) + 1e-3)


def _tone(color: np.ndarray, luma: np.ndarray) -> list[float]:
    """Return 17 statistics of light, contrast and colour, and of steps at every eighth pixel."""
    red, yellow = color[..., 0] - color[..., 1], color[..., :2].mean(2) - color[..., 2]
    across, down = np.abs(np.diff(luma, axis=1)), np.abs(np.diff(luma, axis=0))
    seams = across[:, 7::8].mean() + down[7::8].mean() + 1e-4
    return [
        luma.mean(),
        luma.std(),
        np.sqrt((luma < 0.04).mean()),
        np.sqrt((luma > 0.96).mean()),
        *(c.std() for c in (red, yellow)),
        *(c.mean() for c in (red, yellow)),
        *(np.abs(c).mean() for c in (red, yellow)),
        *_percentiles(luma, (5, 25, 75, 95)),
        *(np.log(_gradient(c).mean() + 1e-3) for c in (red, yellow)),
        np.log(seams / (across.mean() + down.mean() + 1e-4)),
    ]


def look(picture: np.ndarray) -> str:
    """Say in words how sharp, how detailed and how bright a picture is.

    picture: uint8 (H, W, 3).

    >>> look(np.full((64, 64, 3), 30, np.uint8))
    'edges blurred, detail lost, light dark'
    """
    luma = picture.astype(np.float32) @ LUMA / 255
    first, second = _gradient(luma), _second(luma)
    (p90, p99), (q90,) = _percentiles(first, (90, 99)), _percentiles(second, (90,))
    edges = EDGES[np.searchsorted(EDGE_LIMITS, p99)]
    detail = DETAIL[np.searchsorted(DETAIL_LIMITS, q90 / (p90 + 1e-3))]
    light = LIGHT[np.searchsorted(LIGHT_LIMITS, luma.mean())]
    return f"edges {edges}, detail {detail}, light {light}"
