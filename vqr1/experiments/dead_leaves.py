"""Procedural pictures with the edges and the spectrum of photographs: dead leaves with 1/f textures."""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage


def dead_leaves(rng: np.random.Generator, textures: np.ndarray, size: int) -> np.ndarray:
    """Return a procedural picture (size, size, 3) in 0..1: overlapping shapes with 1/f texture and gradients.

    Occlusion and scale invariance give it the edges and the spectrum of photographs (Lee, Mumford and
    Huang, 2001).
    """
    count = int(rng.integers(20, 200))
    leaves = Image.new("L", (size, size))
    draw = ImageDraw.Draw(leaves)
    radii = size * 0.5 * (1 - rng.random(count)) ** 1.5 + 2
    for i, (x, y, r, kind) in enumerate(
        zip(*rng.uniform(0, size, (2, count)), np.sort(radii)[::-1], rng.random(count))
    ):
        corners = r * np.exp(1j * (rng.uniform(0, 6.3) + np.sort(rng.uniform(0, 6.3, 5))))
        if kind < 0.4:
            draw.ellipse((x - r, y - r * rng.uniform(0.3, 1), x + r, y + r * rng.uniform(0.3, 1)), fill=i)
        elif kind < 0.9:
            draw.polygon([(x + c.real, y + c.imag) for c in corners], fill=i)
        else:
            draw.line([(x + c.real, y + c.imag) for c in corners], fill=i, width=int(rng.integers(1, 5)))
    index = np.asarray(leaves)
    hue = rng.normal(0, rng.uniform(0.03, 0.2), (count, 3)).astype(np.float32)
    base = rng.beta(1.2, 1.4, (count, 1)).astype(np.float32) * rng.uniform(0.6, 1) + hue
    ramp = rng.normal(0, 0.3, (2, count)).astype(np.float32)
    grain = (rng.random(count) ** 2 * rng.uniform(0, 0.3)).astype(np.float32)
    t = textures[rng.integers(len(textures))]
    dy, dx = rng.integers(0, t.shape[0] - size + 1, 2)
    line = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    shade = (
        ramp[0][index] * line[:, None]
        + ramp[1][index] * line[None]
        + grain[index] * t[dy : dy + size, dx : dx + size]
    )
    picture = np.clip(base[index] + shade[..., None], 0, 1)
    soft = rng.uniform(0.3, 0.6)  # a lens: hard steps would give every distortion away
    return ndimage.gaussian_filter(picture, (soft, soft, 0)) if rng.random() < 0.8 else picture


def pink_textures(rng: np.random.Generator, count: int = 12, size: int = 512) -> np.ndarray:
    """Return 1/f noise fields of unit deviation, (count, size, size)."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    f[0, 0] = 1
    slope = rng.uniform(0.6, 1.4, (count, 1, 1))
    fields = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(count, size, size))) / f**slope)
    return (fields / fields.std((1, 2), keepdims=True)).astype(np.float32)
