"""Error bars that are true: an interval and a preference, calibrated on rows that people rated.

The spread of a policy's answers is no measure of its error: RL to rank draws the answers together and leaves
the error. So the error is measured, on rated rows that the policy was not trained on:

    mos = f(score) + h e,    h = 1, or m + spread where that is better on held-out photographs

f rises: a straight line, or VQEG's logistic where that is better on held-out photographs. The 95% interval is
conformal: f(score) +- q h with q the finite-sample quantile of held-out |mos - f(score)| / h. The probability
that A looks better than B is Thurstone's, with Student's distribution in the place of the normal one,
T_nu((f(s_A) - f(s_B)) / (t sqrt(h_A^2 + h_B^2))); t and nu are the likeliest over pairs. Where some errors
are far larger than most, the normal distribution is too sure of a great distance and not sure enough of a
middling one; a small nu keeps the rare error in mind (robit regression, Liu 2004).

    from vqr1.evaluation import calibrate_policy

    calibrate_policy("runs/mine/policy", "mine.csv")    # now Scorer("runs/mine/policy") knows its error
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import logit, stdtr

from vqr1.metrics import clusters, logistic, logistic_parameters, require
from vqr1.policy import CALIBRATION
from vqr1.prompts import SCORE_MAX, SCORE_MIN

ALPHA = 0.05
"""The share of pictures that an interval may miss."""
LEAST = 20
"""Fewest rows: a 95% quantile of fewer than 19 residuals is infinite."""
FOLDS = 10
PAIRS = 200_000
"""Most pairs that are looked at; of more, a sample."""
WIDE = 1e4
"""A logistic curve so wide is a straight line."""
TAILS = (2.0, 100.0)
"""Fewest and most degrees of freedom of a preference: with 100, Student's distribution is the normal one."""
TINY = 1e-3
"""Keeps the error of a picture without any spread above 0: the root of Thurstone's gamma."""


@dataclass(frozen=True)
class Calibration:
    """What a score says about people's ratings, and how far it may be off.

    curve: b1, b2, b3, b4 of `vqr1.metrics.logistic`, from scores to the raters' scale.
    quantile: q, half the interval where h is 1, on the raters' scale.
    noise: t, the scale of a preference's noise where h is 1, on the raters' scale.
    typical_spread: m, the median spread, in points of the score; None: h is 1 for all pictures.
    tails: nu, the degrees of freedom of a preference's noise; infinite: it is normal.
    dataset, rows: what it was fitted on.
    settings: how the rows were scored (`Scorer.settings`); for other scores it does not hold.
    held_out: what was compared on held-out photographs: root mean square error by curve, and mean interval
        score (Gneiting & Raftery 2007; smaller is better) by h, on the raters' scale.
    """

    curve: tuple[float, float, float, float]
    quantile: float
    noise: float
    typical_spread: float | None = None
    tails: float = math.inf
    dataset: str = ""
    rows: int = 0
    settings: dict = field(default_factory=dict)
    held_out: dict = field(default_factory=dict)

    def mos(self, score):
        """Return f(score), the mean opinion score that is expected, on the raters' scale."""
        return logistic(np.asarray(score, dtype=float), *self.curve)

    def error(self, std):
        """Return h, how large a picture's error is by its spread."""
        std = np.asarray(std, dtype=float)
        if self.typical_spread is None:
            return np.ones_like(std)
        return np.maximum(self.typical_spread + std, TINY)

    def mos_interval(self, score, std) -> tuple[np.ndarray, np.ndarray]:
        """Return (low, high), each like score, that hold 95% of mean opinion scores, on the raters' scale."""
        half = self.quantile * self.error(std)
        return self.mos(score) - half, self.mos(score) + half

    def interval(self, score, std) -> tuple[np.ndarray, np.ndarray]:
        """Return the interval (low, high) in points of the score, so that it holds the score.

        The policy's scale is its own, and a picture that raters give 70 of 100 may well score 4.6. So the
        interval on the raters' scale is sent back through the curve: low and high are the scores that
        the curve gives the interval's ends for, cut at 1 and 5. Wherever the mean opinion score is in its
        interval, the score that stands for it is in this one.

        >>> straight = Calibration(THURSTONE.curve, quantile=0.5, noise=0.3)
        >>> [round(float(end), 2) for end in straight.interval(4.7, 0.1)]
        [4.2, 5.0]
        """
        b1, b2, b3, b4 = self.curve
        score = np.asarray(score, dtype=float)
        low, high = (
            b3 + abs(b4) * logit(np.clip((mos - b2) / (b1 - b2), 0, 1))
            for mos in self.mos_interval(score, std)
        )
        within = np.minimum(score, SCORE_MIN), np.maximum(score, SCORE_MAX)
        return np.clip(np.minimum(low, score), *within), np.clip(np.maximum(high, score), *within)

    def probability(self, score, std, other_score, other_std):
        """Return the probability that people rate the one higher than the other.

        >>> even = Calibration(THURSTONE.curve, quantile=1.0, noise=0.5)
        >>> round(float(even.probability(4.0, 0.1, 3.0, 0.1)), 4)  # Phi(1 / (0.5 sqrt(2)))
        0.9214
        >>> rare = Calibration(THURSTONE.curve, quantile=1.0, noise=0.5, tails=3.0)
        >>> round(float(rare.probability(4.0, 0.1, 3.0, 0.1)), 4)
        0.8739
        """
        error = np.hypot(self.error(std), self.error(other_std))
        return stdtr(self.tails, (self.mos(score) - self.mos(other_score)) / (self.noise * error))

    def save(self, folder: str | Path) -> Path:
        """Write calibration.json into a policy's folder; return the file."""
        file = Path(folder) / CALIBRATION
        file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return file

    @classmethod
    def load(cls, folder: str | Path) -> "Calibration":
        """Read the calibration of a policy's folder.

        Raises ValueError for a file that `save` did not write.
        """
        file = Path(folder) / CALIBRATION
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return cls(**found | {"curve": tuple(found["curve"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file} is no calibration ({error}); delete it, and run vqr1 calibrate again"
            ) from error


THURSTONE = Calibration((3 + 2 * WIDE, 3 - 2 * WIDE, 3.0, WIDE), quantile=1.96, noise=1.0, typical_spread=0.0)
"""The policy's own word, uncalibrated: score +- 1.96 spreads on a scale of 1 to 5, and Thurstone's law."""


def calibrate(frame: pd.DataFrame, settings: dict | None = None, seed: int = 0) -> Calibration:
    """Return the calibration of scores, from pictures of one set that the policy was not trained on.

    The residuals are cross-conformal: photographs are dealt to `FOLDS` folds, and each row is judged by a
    curve fitted without its fold. The interval holds 95% of new pictures like these; where many rows show one
    photograph, photographs are what there must be many of.

    Args:
        frame: columns score, score_std, mos, reference and dataset, as `evaluation.score_frame` gives them.
        settings: how they were scored, kept with the result.
        seed: of folds and sampled pairs.

    Raises:
        ValueError: a column is missing; there are fewer than `LEAST` rows, fewer than 2 photographs or
            several sets; a score or MOS is not a number, or all are equal; scores fall where ratings rise.

    >>> rng = np.random.default_rng(0)
    >>> frame = pd.DataFrame({"score": rng.uniform(1, 5, 400), "score_std": 0.1, "dataset": "mine"})
    >>> frame = frame.assign(mos=20 * frame["score"] + rng.normal(0, 5, 400), reference=range(400))
    >>> found = calibrate(frame)
    >>> round(found.quantile), round(found.noise), round(float(found.mos(3)))  # 1.96 times 5; 5; 20 times 3
    (10, 5, 60)
    """
    frame = _rated(frame)
    _check(frame)
    score, mos, std = (frame[name].to_numpy(dtype=float) for name in ("score", "mos", "score_std"))
    folds = _folds(frame, seed)
    held_out, predicted = {}, {}
    for name, curve in CURVES.items():
        predicted[name] = _held_out(curve, score, mos, folds)
        held_out[name] = float(np.sqrt(np.mean((mos - predicted[name]) ** 2)))
    best = min(CURVES, key=held_out.get)
    curve, expected = CURVES[best](score, mos), predicted[best]
    if not curve[0] > curve[1]:
        raise ValueError("scores do not rise with the ratings: train the policy before it is calibrated")
    spreads = {"constant": None}
    if np.isfinite(std).all() and np.median(std) > 0:
        spreads["spread"] = float(np.median(std))
    error = {name: Calibration(curve, 1, 1, spread).error(std) for name, spread in spreads.items()}
    held_out |= {name: _interval_score(np.abs(mos - expected), error[name], folds) for name in spreads}
    chosen = min(spreads, key=held_out.get)
    noise, tails = _preference(expected, error[chosen], mos, seed)
    return Calibration(
        curve,
        _quantile(np.abs(mos - expected) / error[chosen]),
        noise,
        spreads[chosen],
        tails,
        str(frame["dataset"].iloc[0]),
        len(frame),
        settings or {},
        held_out,
    )


def coverage(calibration: Calibration, frame: pd.DataFrame) -> float:
    """Return the share of rows whose MOS lies in its 95% interval.

    Args:
        calibration: also `THURSTONE`, for what the policy says of itself.
        frame: columns as for `calibrate`.

    Raises:
        ValueError: a column, score or MOS is missing, or the rows are of a set with another scale.
    """
    frame = _rated(frame)
    other = sorted(set(frame["dataset"]) - {calibration.dataset})
    if calibration.dataset and other:
        raise ValueError(
            f"the intervals are on the scale of {calibration.dataset}, and rows are of {', '.join(other)}; "
            "calibrate on that set"
        )
    low, high = calibration.mos_interval(frame["score"], frame["score_std"])
    return float(np.mean((low <= frame["mos"]) & (frame["mos"] <= high)))


def reliability(calibration: Calibration, frame: pd.DataFrame, bins: int = 10, seed: int = 0) -> pd.DataFrame:
    """Return how often the likelier picture of a pair is the better one, by predicted probability.

    Pairs of one set, each the way round whose probability is at least 0.5; equal MOS count half.

    Args:
        calibration: also `THURSTONE`, for what the policy says of itself.
        frame: columns as for `calibrate`, of any sets.
        bins: of equal width between 0.5 and 1; empty ones are left out.
        seed: of the sample, where there are more than `PAIRS` pairs.

    Returns:
        One row per bin: predicted and observed (means), pairs, and gap, how far the two are apart.

    Raises:
        ValueError: a column, score or MOS is missing.
    """
    frame = _rated(frame)
    first, second = _pairs(len(frame), seed)
    same = frame["dataset"].to_numpy()[first] == frame["dataset"].to_numpy()[second]
    first, second = first[same], second[same]
    score, std, mos = (frame[name].to_numpy(dtype=float) for name in ("score", "score_std", "mos"))
    probability = calibration.probability(score[first], std[first], score[second], std[second])
    better = _better(mos, first, second)
    turned = probability < 0.5
    table = pd.DataFrame(
        {
            "predicted": np.where(turned, 1 - probability, probability),
            "observed": np.where(turned, 1 - better, better),
        }
    )
    place = np.minimum((table["predicted"] - 0.5) * 2 * bins + 1e-9, bins - 1).astype(int)
    table = table.groupby(place).agg(
        predicted=("predicted", "mean"), observed=("observed", "mean"), pairs=("observed", "size")
    )
    return table.assign(gap=(table["predicted"] - table["observed"]).abs()).reset_index(drop=True)


def _rated(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows, numbered anew; name those without a score or a MOS."""
    require(frame, ["score", "score_std", "mos", "reference", "dataset"])
    for column, remedy in (("score", "leave them out, or see why"), ("mos", "rate them, or leave them out")):
        bad = ~np.isfinite(frame[column].to_numpy(dtype=float))
        if bad.any():
            names = frame["image"] if "image" in frame else frame.index.to_series()
            shown = ", ".join(map(str, names[bad][:5])) + (", …" if bad.sum() > 5 else "")
            raise ValueError(f"{bad.sum()} of {len(frame)} rows have no {column} ({shown}); {remedy}")
    return frame.reset_index(drop=True)


def _check(frame: pd.DataFrame) -> None:
    if len(frame) < LEAST:
        raise ValueError(
            f"{len(frame)} rated rows: a 95% interval needs at least {LEAST}; rate more pictures, or give "
            "more rows the split val"
        )
    sets = sorted(map(str, frame["dataset"].unique()))
    if len(sets) > 1:
        raise ValueError(f"{', '.join(sets)} have each a scale of their own; calibrate on one of them")
    if len(clusters(frame)) < 2:
        raise ValueError("all rows show one photograph; calibrate on several (column reference)")
    for column in ("score", "mos"):
        if frame[column].nunique() == 1:
            raise ValueError(f"every {column} is {frame[column].iloc[0]}: nothing can be calibrated by it")


def _line(score: np.ndarray, mos: np.ndarray) -> tuple[float, ...]:
    """Return the least-squares straight line, as the middle of a logistic curve `WIDE` scores wide."""
    center = score.mean()
    slope = np.mean((score - center) * mos) / max(score.var(), 1e-12)
    half = 2 * WIDE * slope
    return tuple(map(float, (mos.mean() + half, mos.mean() - half, center, WIDE)))


def _logistic(score: np.ndarray, mos: np.ndarray) -> tuple[float, ...]:
    """Return the least-squares logistic curve; the line where it does not converge, or falls."""
    center, scale = score.mean(), score.std()
    if scale == 0:
        return _line(score, mos)
    b1, b2, b3, b4 = logistic_parameters((score - center) / scale, mos)
    found = tuple(map(float, (b1, b2, center + scale * b3, scale * abs(b4))))
    return found if b1 > b2 else _line(score, mos)


CURVES = {"line": _line, "logistic": _logistic}


def _folds(frame: pd.DataFrame, seed: int) -> np.ndarray:
    """Return each row's fold, (N,); rows of one photograph share theirs."""
    photographs, folds = clusters(frame), np.empty(len(frame), dtype=int)
    for place, photograph in enumerate(np.random.default_rng(seed).permutation(len(photographs))):
        folds[photographs[photograph]] = place % FOLDS
    return folds


def _held_out(curve, score: np.ndarray, mos: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Return each row's expected MOS, (N,), by the curve fitted to the other folds."""
    expected = np.empty(len(score))
    for fold in np.unique(folds):
        own = folds == fold
        expected[own] = logistic(score[own], *curve(score[~own], mos[~own]))
    return expected


def _quantile(residuals: np.ndarray) -> float:
    """Return the ceil((N + 1) 0.95)-th smallest of N residuals: so many hold a new one in 95%."""
    place = min(len(residuals), math.ceil((len(residuals) + 1) * (1 - ALPHA)))
    return float(np.sort(residuals)[place - 1])


def _interval_score(residuals: np.ndarray, error: np.ndarray, folds: np.ndarray) -> float:
    """Return the mean of width + 2 / alpha times the miss, of intervals by the other folds' quantile."""
    half = np.empty(len(residuals))
    for fold in np.unique(folds):
        own = folds == fold
        half[own] = error[own] * _quantile(residuals[~own] / error[~own])
    return float(np.mean(2 * half + 2 / ALPHA * np.maximum(0, residuals - half)))


def _preference(expected: np.ndarray, error: np.ndarray, mos: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the t and nu of the likeliest order of all pairs."""
    first, second = _pairs(len(mos), seed)
    away = (expected[first] - expected[second]) / np.hypot(error[first], error[second])
    right = np.where(away < 0, _better(mos, second, first), _better(mos, first, second))
    away, unit = np.abs(away), np.std(mos) / np.median(error)

    def loss(exponents: np.ndarray) -> float:
        scale, tails = np.exp(exponents)
        miss = np.maximum(stdtr(tails, -away / (unit * scale)), np.finfo(float).tiny)
        return -np.mean(right * np.log1p(-miss) + (1 - right) * np.log(miss))

    bounds = ((-7, 7), np.log(TAILS))
    scale, tails = np.exp(minimize(loss, (0, np.log(10)), bounds=bounds, options={"ftol": 1e-12}).x)
    return float(unit * scale), float(tails)


def _pairs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of n rows, as two arrays; a sample with replacement if there are more than `PAIRS`."""
    if n * (n - 1) // 2 <= PAIRS:
        return np.triu_indices(n, 1)
    rng = np.random.default_rng(seed)
    first = rng.integers(n, size=PAIRS)
    return first, (first + rng.integers(1, n, size=PAIRS)) % n


def _better(mos: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return 1 where the first is rated higher, 0.5 for a tie, 0 where the second is."""
    return (1 + np.sign(mos[first] - mos[second])) / 2
