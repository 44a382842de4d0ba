"""Two small networks and some filters that make pictures of known, or at least assumed, quality order.

An `Upscaler` (super-resolution) learned from training photographs, a `Painter` (generation) from dead
leaves. Their weights are in data/progress/ (fp16); ``vqr1 study progress`` trains them again.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter
from torch import nn

from vqr1.data.manifests import EMBEDDED
from vqr1.data.photographs import photographs
from vqr1.experiments.dead_leaves import dead_leaves, pink_textures

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Interpolations from worst to best, by PSNR."""
Enlarger = Callable[[Image.Image], Image.Image]
SCALES = (2, 3, 4)
STORED = {"upscaler": (50, 200, 1000, 3000), "painter": (200, 1000, 6000)}
"""Training steps whose weights are in data/progress/; step 0 follows from the seed and needs no file."""


class Upscaler(nn.Module):
    """Add what a bicubically enlarged picture lacks, at any scale; untrained it adds nothing.

    (B, 3, H, W) in 0..1 to the same. Residual super-resolution as in Kim, Lee and Lee, VDSR (2016), with
    8,611 weights.
    """

    def __init__(self, width: int = 16):
        super().__init__()
        near = dict(padding="same", padding_mode="replicate")
        inner = [layer for _ in range(3) for layer in (nn.GELU(), nn.Conv2d(width, width, 3, **near))]
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 5, **near), *inner, nn.GELU(), nn.Conv2d(width, 3, 3, **near)
        )
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x - 0.5)


class Block(nn.Module):
    """A residual block: convolve each channel (5x5), add the time's embedding, mix the channels (1x1)."""

    def __init__(self, width: int, times: int = 16):
        super().__init__()
        self.near = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm, self.time = nn.GroupNorm(1, width), nn.Linear(times, width)
        self.mix = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.norm(self.near(x)) + self.time(time)[..., None, None])


class Painter(nn.Module):
    """Guess the clean picture in (1 - t) picture + t noise: a U-Net of three sizes, 34,604 weights.

    x: (B, 3, H, W) with pictures in -1..1, sides divisible by 8; t: (B,) in 0..1, the share of noise.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.into, self.out = nn.Conv2d(12, width, 1), nn.Conv2d(width, 12, 1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(6))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] * torch.pi * 2.0 ** torch.arange(-1, 7, device=t.device)  # (B, 8)
        time, (one, two, three, four, five, six) = torch.cat([angle.sin(), angle.cos()], 1), self.blocks
        fine = one(self.into(nn.functional.pixel_unshuffle(x, 2)), time)
        middle = two(nn.functional.avg_pool2d(fine, 2), time)
        coarse = four(three(nn.functional.avg_pool2d(middle, 2), time), time)
        middle = five(middle + nn.functional.interpolate(coarse, scale_factor=2.0), time)
        fine = six(fine + nn.functional.interpolate(middle, scale_factor=2.0), time)
        return nn.functional.pixel_shuffle(self.out(fine), 2)


# How the networks were trained


def upscaler_batches(
    seed: int, size: int = 72, batch: int = 8
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (enlarged, original) pieces of training photographs, (B, 3, size, size), at a random scale."""
    rng = np.random.default_rng(seed)
    photos = list(photographs("train").values())
    while True:
        pieces, scale = [], int(rng.choice(SCALES))
        for photo in (photos[i] for i in rng.integers(len(photos), size=batch)):
            x, y = (int(rng.integers(0, side - size + 1)) for side in photo.size)
            piece = photo.crop((x, y, x + size, y + size)).transpose(Image.Transpose(int(rng.integers(7))))
            pieces.append((enlarge(shrink(piece, scale), scale), piece))
        yield tuple(torch.cat([_tensor(picture) for picture in pictures]) for pictures in zip(*pieces))


def painter_batches(seed: int, count: int = 3000, size: int = 64, batch: int = 16) -> Iterator[torch.Tensor]:
    """Yield dead leaves, (B, 3, size, size) in -1..1: turned pieces of `count` pictures."""
    rng = np.random.default_rng(seed)
    textures = pink_textures(np.random.default_rng(0))
    leaves = torch.from_numpy(
        np.stack([dead_leaves(rng, textures, 96) for _ in range(count)]).astype(np.float32)
    )
    leaves = leaves.permute(0, 3, 1, 2) * 2 - 1
    while True:
        (y, x), turns = rng.integers(0, 96 - size + 1, 2), int(rng.integers(4))
        pictures = leaves[rng.integers(count, size=batch), :, y : y + size, x : x + size]
        yield pictures.rot90(turns, (2, 3))[:, rng.permutation(3)]


def upscaler_loss(network: Upscaler, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean squared error, whose logarithm is PSNR."""
    enlarged, original = batch
    return (network(enlarged) - original).square().mean()


def painter_loss(network: Painter, pictures: torch.Tensor) -> torch.Tensor:
    """Return the squared error of the guess over t^2: the error of the velocity (flow matching)."""
    t, noise = torch.rand(len(pictures)), torch.randn_like(pictures)
    share = t[:, None, None, None]
    guess = network((1 - share) * pictures + share * noise, t)
    return ((guess - pictures).square() / share.clamp(min=0.1) ** 2).mean()


NETWORKS = {
    "upscaler": (Upscaler, upscaler_batches, upscaler_loss),
    "painter": (Painter, painter_batches, painter_loss),
}


def train_network(name: str, folder: Path, stored: tuple[int, ...], seed: int = 0) -> pd.DataFrame:
    """Train a network, store its weights at the `stored` steps, and return its log.

    Weights are a running mean (decay 0.99). Adam's learning rate falls along a cosine to 0. One thread on
    one machine repeats it by its seed. Columns: network, step, loss (mean of the last 50), seconds.
    """
    torch.manual_seed(seed)
    kind, batches, loss_of = NETWORKS[name]
    network, steps = kind().to(memory_format=torch.channels_last), max(stored)  # faster on CPUs
    mean = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    log, losses, start = [], [], time.time()
    for step, batch in zip(range(1, steps + 1), batches(seed)):
        optimizer.zero_grad()
        loss = loss_of(network, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean.update_parameters(network)
        losses.append(loss.item())
        if step in stored:
            save_file(
                {key: value.half().contiguous() for key, value in mean.module.state_dict().items()},
                folder / f"{name}-{step}.safetensors",
            )
        if step % 50 == 0:
            log.append((name, step, np.mean(losses[-50:]), time.time() - start))
    return pd.DataFrame(log, columns=["network", "step", "loss", "seconds"])


def load_network(name: str, step: int, seed: int = 0) -> nn.Module:
    """Return a network as it was after some training steps, in fp32.

    Args:
        name: "upscaler" or "painter".
        step: one of `STORED`; 0: before training, as its seed started it.
        seed: of the weights at step 0.

    Raises:
        FileNotFoundError: this step is not stored.
    """
    path = EMBEDDED / "progress" / f"{name}-{step}.safetensors"
    if step and not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such weights; stored steps of {name}: 0, {', '.join(map(str, STORED[name]))}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name][0]()
    if step:
        network.load_state_dict(load_file(path))
    return network.float().eval()


# Pictures


def shrink(picture: Image.Image, scale: int) -> Image.Image:
    """Return the picture at 1/scale of its sides (scale must divide them), bicubic with antialiasing."""
    return picture.resize((picture.width // scale, picture.height // scale), Image.Resampling.BICUBIC)


def enlarge(picture: Image.Image, scale: int, method: str | Upscaler | Enlarger = "bicubic") -> Image.Image:
    """Return the picture at scale times its sides.

    method: one of `FILTERS`; or a network, which mends what bicubic makes; or what enlarges by itself.
    """
    size = picture.width * scale, picture.height * scale
    if isinstance(method, str):
        return picture.resize(size, FILTERS[method])
    if not isinstance(method, Upscaler):
        return method(picture)
    with torch.no_grad():
        return to_pil(method(_tensor(picture.resize(size, Image.Resampling.BICUBIC))))[0]


def paint(network: Painter, noise: torch.Tensor, steps: int) -> list[Image.Image]:
    """Return what the network makes of noise (B, 3, H, W) in `steps` equal steps of Euler's method.

    Each step from t to t' keeps t'/t of the distance between picture and guess.
    """
    x, times = noise, torch.linspace(1, 0, steps + 1)
    with torch.no_grad():
        for now, then in zip(times[:-1], times[1:]):
            guess = network(x, now.expand(len(x)))
            x = guess + (then / now) * (x - guess)
    return to_pil((x + 1) / 2)


def leaf_picture(rng: np.random.Generator, textures: np.ndarray, size: int) -> Image.Image:
    """Return one picture of dead leaves."""
    return Image.fromarray((dead_leaves(rng, textures, size) * 255).round().astype(np.uint8))


def _tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]  # (1, 3, H, W)


def to_pil(x: torch.Tensor) -> list[Image.Image]:
    """Return pictures from (B, 3, H, W) in 0..1."""
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(one) for one in pixels.numpy()]


def retouch(
    picture: Image.Image, sharpen: float = 0.0, contrast: float = 0.0, grain: float = 0.0, seed: int = 0
) -> Image.Image:
    """Return the picture with an unsharp mask (radius 1.5 px), contrast around mid-grey, and noise added.

    sharpen: share of detail that is added (0: nothing).
    contrast: share of the distance from mid-grey that is added.
    grain: deviation in grey levels of 255.
    """
    x = np.asarray(picture, dtype=np.float32)
    x = x + sharpen * (x - gaussian_filter(x, (1.5, 1.5, 0)))
    x = (
        127.5
        + (1 + contrast) * (x - 127.5)
        + grain * np.random.default_rng(seed).standard_normal(x.shape, dtype=np.float32)
    )
    return Image.fromarray(np.clip(x + 0.5, 0, 255).astype(np.uint8))
