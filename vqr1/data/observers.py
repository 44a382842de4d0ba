"""Simulated observers: latent quality -> votes on a 5-point scale -> MOS and its standard deviation.

No person rated the embedded pictures. The ratings are simulated, and anchored to people through
``data/kadid10k_type_level_mos.csv``: for each of KADID-10k's 125 pairs of type and level, the mean of
the published human ratings over 81 pictures, and the observers' standard deviation (computed from the
ratings of H. Lin, V. Hosu, D. Saupe, "KADID-10k: A Large-scale Artificially Distorted IQA Database",
QoMEX 2019).

    latent quality = published mean of (type, level)
                   + content effect of the photograph                  sd 0.126
                   + interaction of photograph, type and level         sd 0.296

On the real ratings, an oracle that knows type and level reaches SRCC 0.942, one that knows the level
alone 0.676. With these two standard deviations, 81 simulated photographs give 0.944 and 0.676.

Thurstone's law of comparative judgment: an observer's internal response to a picture is normal around
the picture's value, with the published standard deviation of its (type, level). The response is
rounded to the categories 1..5. Rounding and clipping would pull the ends inwards (by 0.13 at a mean of
1.3), so the value is placed where the *expected rounded* rating equals the latent quality, found by
bisection. Latent qualities are first limited to 1.02..4.98, which lifts the worst cells by about 0.04.
Clipping also narrows the spread of votes: their standard deviation is 0.78 on average, where the
published one is 0.86.
"""

import functools
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtr

from vqr1.places import EMBEDDED

CONTENT_SD = 0.126
INTERACTION_SD = 0.296
OBSERVERS = 30
OBSERVER_SD = 0.86
"""Mean of the published observers' standard deviations, in points of the 5-point scale."""
SEED = 20190605
MEAN_LIMITS = (1.02, 4.98)
TABLE = EMBEDDED / "kadid10k_type_level_mos.csv"


@functools.cache
def human_cells(path: Path = TABLE) -> pd.DataFrame:
    """Return KADID-10k's 125 pairs of type and level with the published human means; do not change it.

    Columns type_id, type, level, n_images, mos_mean, mos_std_between_images, observer_std_mean.
    Raises FileNotFoundError when the table is not there.

    >>> human_cells().query("type == 'gaussian_blur'").mos_mean.tolist()
    [4.6122, 4.3817, 2.9111, 1.873, 1.3027]
    """
    return pd.read_csv(path)


def photograph_rng(photograph: str, seed: int, stream: int) -> np.random.Generator:
    """Return a generator that depends on the photograph's name alone, not on which others there are.

    ``stream`` separates independent uses: adding a photograph changes no number of another one.

    >>> a, b = (photograph_rng("photos/a.jpg", 1, 0).integers(100) for _ in range(2))
    >>> bool(a == b)
    True
    """
    return np.random.default_rng([seed, zlib.crc32(photograph.encode()), stream])


def latent_quality(photograph: str, seed: int = SEED) -> np.ndarray:
    """Return the photograph's 125 simulated latent qualities, (125,), in the order of `human_cells`.

    Points of the 5-point scale, higher is better; may leave 1..5.

    >>> latent_quality("photos/a.jpg").shape
    (125,)
    """
    rng = photograph_rng(photograph, seed, stream=0)
    means = human_cells().mos_mean.to_numpy()  # (125,)
    content = rng.normal(0, CONTENT_SD)
    return means + content + rng.normal(0, INTERACTION_SD, means.shape)


def expected_rating(value: np.ndarray, observer_std: np.ndarray) -> np.ndarray:
    """Return the mean rating of observers whose response is N(value, observer_std), rounded to 1..5.

    E = 1 + sum over k = 1..4 of P(response > k + 1/2). Shapes broadcast.

    >>> expected_rating(np.array([1.0, 3.0, 5.0]), 0.8).round(2).tolist()
    [1.3, 3.0, 4.7]
    """
    cuts = np.arange(1.5, 5)  # (4,)
    return 1 + ndtr((np.asarray(value)[..., None] - cuts) / np.asarray(observer_std)[..., None]).sum(-1)


def internal_value(latent: np.ndarray, observer_std: np.ndarray) -> np.ndarray:
    """Return the value whose expected rounded rating is ``latent`` (limited to 1.02..4.98), by bisection.

    >>> value = internal_value(np.array([1.3, 3.0]), 0.7)
    >>> expected_rating(value, 0.7).round(6).tolist()
    [1.3, 3.0]
    """
    wanted = np.clip(latent, *MEAN_LIMITS)
    low, high = np.full(wanted.shape, -10.0), np.full(wanted.shape, 16.0)
    for _ in range(50):
        middle = (low + high) / 2
        below = expected_rating(middle, observer_std) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def votes(latent, observer_std=OBSERVER_SD, n_observers: int = OBSERVERS, seed=SEED) -> np.ndarray:
    """Return simulated category ratings 1..5 of N pictures by ``n_observers`` observers: (N, n) integers.

    latent: (N,) points of the 5-point scale.
    observer_std: scalar or (N,).
    seed: anything that ``numpy.random.default_rng`` takes.

    The mean of a row tends to the latent quality.

    >>> votes([1.5, 4.5], n_observers=4, seed=0).tolist()
    [[1, 1, 2, 1], [4, 5, 5, 5]]
    """
    latent = np.asarray(latent, dtype=float)
    spread = np.broadcast_to(observer_std, latent.shape)
    noise = np.random.default_rng(seed).normal(size=(*latent.shape, n_observers))
    response = internal_value(latent, spread)[..., None] + spread[..., None] * noise  # (N, n)
    return np.clip(np.rint(response), 1, 5).astype(int)


def pairwise_votes(
    latents, n_observers: int = OBSERVERS, seed=SEED, observer_std: float = OBSERVER_SD
) -> np.ndarray:
    """Return simulated comparisons of all pairs: integer wins (N, N), for `vqr1.thurstone.thurstone_scale`.

    wins[i, j] = how many of ``n_observers`` prefer i to j, each with Thurstone's Case V probability
    Phi((q_i - q_j) / (observer_std sqrt 2)). wins + wins.T = n_observers off the diagonal, 0 on it.

    >>> pairwise_votes([4.0, 3.0, 1.0], n_observers=10, seed=0).tolist()
    [[0, 9, 10], [1, 0, 9], [0, 1, 0]]
    """
    latents = np.asarray(latents, dtype=float)
    preference = ndtr((latents[:, None] - latents[None, :]) / (observer_std * np.sqrt(2)))  # (N, N)
    upper = np.triu(np.random.default_rng(seed).binomial(n_observers, preference), 1)
    return upper + np.tril(n_observers - upper.T, -1)


def rate(photographs: list[str], seed: int = SEED) -> pd.DataFrame:
    """Return simulated ratings of each photograph under each of the 125 pairs of type and level.

    Columns image, distortion, level, latent, mos, std; 125 rows per photograph. MOS and std (ddof 1)
    are those of 30 simulated observers, rounded to 4 decimals.

    >>> rate(["photos/a.jpg"]).shape
    (125, 6)
    """
    return pd.concat([_rate_one(name, seed) for name in photographs], ignore_index=True)


def _rate_one(photograph: str, seed: int) -> pd.DataFrame:
    cells, latent = human_cells(), latent_quality(photograph, seed)
    ratings = votes(
        latent, cells.observer_std_mean.to_numpy(), seed=photograph_rng(photograph, seed, stream=1)
    )
    return pd.DataFrame(
        {
            "image": photograph,
            "distortion": cells.type,
            "level": cells.level,
            "latent": latent,
            "mos": ratings.mean(1).round(4),
            "std": ratings.std(1, ddof=1).round(4),
        }
    )


def oracle_scores(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return two oracles' scores of rows, (N,) each: the published mean of (type, level), and of the level.

    Both know the labels and see no picture; every result table prints their SRCC. Raises ValueError
    for a row whose type and level are not one of the 125.

    >>> rows = pd.DataFrame({"distortion": ["jpeg", "jitter"], "level": [1, 5]})
    >>> [scores.round(2).tolist() for scores in oracle_scores(rows)]
    [[4.34, 1.34], [4.08, 2.01]]
    """
    cells = human_cells()
    keys = pd.MultiIndex.from_frame(frame[["distortion", "level"]])
    both = cells.set_index(["type", "level"]).mos_mean.reindex(keys).to_numpy()
    if np.isnan(both).any():
        bad = keys[int(np.isnan(both).argmax())]
        raise ValueError(
            f"no oracle for distortion {bad[0]!r} at level {bad[1]!r}: not one of KADID-10k's 125 pairs"
        )
    return both, cells.groupby("level").mos_mean.mean().reindex(frame["level"]).to_numpy()
