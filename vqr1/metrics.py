"""How well scores agree with mean opinion scores (MOS): SRCC, PLCC, and intervals by photograph.

Pairs with a score or a MOS that is not a finite number are left out of every correlation; ``summarize``
counts the scores among them as unparseable. What is not defined (a constant side, fewer than two pairs) is
NaN, without a warning. Scores and MOS have the same direction: higher is better.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from scipy.optimize import least_squares
from scipy.special import expit
from scipy.stats import rankdata
from scipy.stats import t as student_t

Statistic = Callable[[Mapping], float]
"""A number from columns: called with {column name: array}, or with the frame itself."""


def srcc(pred, mos) -> float:
    """Return Spearman's rank correlation: Pearson's correlation of the ranks, equal values sharing their
    mean rank.

    ``pred`` and ``mos`` are (N,); the result is in -1..1, or NaN. Raises ValueError if the lengths differ.

    >>> srcc([1, 2, 3, 4], [1.2, 1.1, 4.0, 4.9])
    0.8
    >>> srcc([2, 2, 2], [1, 2, 3]), srcc([1, 2, float("nan"), 4], [1, 2, 0, 3])
    (nan, 1.0)
    """
    pred, mos = _finite_pairs(pred, mos)
    return _pearson(rankdata(pred), rankdata(mos))


def plcc(pred, mos) -> float:
    """Return Pearson's linear correlation of the raw scores, without a fitted curve.

    ``pred`` and ``mos`` are (N,); the result is in -1..1, or NaN. Raises ValueError if the lengths differ.

    >>> round(plcc([1, 2, 3, 4], [1, 2, 3, 8]), 4)
    0.9135
    """
    return _pearson(*_finite_pairs(pred, mos))


def plcc_fit(pred, mos) -> float:
    """Return Pearson's correlation after the monotone 4-parameter logistic fit of scores to MOS (VQEG).

    f(x) = b2 + (b1 - b2) / (1 + exp(-(x - b3) / |b4|)), least squares, from b1 = max(mos), b2 = min(mos),
    b3 = mean(x), b4 = std(x) / 4. Where the fit falls (b1 < b2) the result is negative, so that reversed
    scores stay visible; common IQA toolboxes give it without the sign.

    The raw PLCC is returned if there are fewer than 5 pairs, if the fit does not converge, or if it is
    stuck where it correlates less than the raw scores. Raises ValueError if the lengths differ. Source:
    VQEG, Final report on the validation of objective models of video quality assessment (2000).

    >>> x = np.linspace(1, 5, 20)
    >>> mos = 1 + 4 / (1 + np.exp(-(x - 3) / 0.2))
    >>> round(plcc(x, mos), 3), round(plcc_fit(x, mos), 3), round(plcc_fit(-x, mos), 3)
    (0.934, 1.0, -1.0)
    """
    pred, mos = _finite_pairs(pred, mos)
    raw = _pearson(pred, mos)
    fit = logistic_fit(pred, mos)
    fitted = _pearson(fit, mos)
    if not fitted >= abs(raw):
        return raw
    return fitted if _pearson(fit, pred) >= 0 else -fitted


def logistic_fit(pred, mos) -> np.ndarray:
    """Return what the fit of `plcc_fit` makes of every score: its MOS on the curve, (N,).

    NaN throughout if there are fewer than 5 pairs, one side is constant, or the fit does not converge; the
    arguments must be finite.

    >>> x = np.linspace(1, 5, 20)
    >>> logistic_fit(x, 1 + 4 / (1 + np.exp(-(x - 3) / 0.2)))[[0, 9, 19]].round(2)
    array([1.  , 2.49, 5.  ])
    """
    pred, mos = np.asarray(pred, dtype=float), np.asarray(mos, dtype=float)
    if len(pred) < 5 or np.isnan(_pearson(pred, mos)):
        return np.full(len(pred), np.nan)
    x = _standardised(pred) * np.sqrt(len(pred))  # the fit does not depend on the unit of x; the solver does
    start = [mos.max(), mos.min(), 0.0, 0.25]
    found = least_squares(lambda b: _logistic(x, *b) - mos, start, method="lm", max_nfev=2000)
    return _logistic(x, *found.x) if found.success else np.full(len(pred), np.nan)


def within_level_srcc(pred, mos, level) -> float:
    """Return the mean over levels of the SRCC across the rows of one level.

    It asks how a mild colour shift compares with a mild blur: an oracle that knows the level alone scores
    every row of a level alike, and gets NaN. Levels without a defined SRCC, and rows without a level, are
    left out. All arguments are (N,); raises ValueError if the lengths differ.

    >>> within_level_srcc([1, 2, 3, 3, 2, 1], [1, 2, 3, 4, 5, 6], [1, 1, 1, 2, 2, 2])
    0.0
    """
    return _mean_srcc_by(pred, mos, level)


def per_content_srcc(pred, mos, content) -> float:
    """Return the mean over contents of the SRCC across the versions of one picture.

    It is the SRCC to report where each content has a scale of its own (SRIQA-Bench). Contents without a
    defined SRCC are left out. All arguments are (N,); raises ValueError if the lengths differ.

    >>> mos = [0, 50, 100, 0, 50, 100]
    >>> per_content_srcc([1, 2, 3, 4, 5, 6], mos, list("aaabbb")), round(srcc([1, 2, 3, 4, 5, 6], mos), 3)
    (1.0, 0.478)
    """
    return _mean_srcc_by(pred, mos, content)


def _finite_pairs(pred, mos, *others):
    pred, mos = np.asarray(pred, dtype=float), np.asarray(mos, dtype=float)
    if pred.ndim != 1 or any(np.shape(values)[:1] != pred.shape for values in (mos, *others)):
        shapes = [np.shape(values) for values in (pred, mos, *others)]
        raise ValueError(f"the columns must be one-dimensional and equally long, got shapes {shapes}")
    keep = np.isfinite(pred) & np.isfinite(mos)
    return pred[keep], mos[keep], *(np.asarray(values)[keep] for values in others)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    r = _standardised(x) @ _standardised(y)
    return float(np.clip(r, -1, 1).round(15))  # 1.0000000000000002 and 0.9999999999999999 are 1


def _standardised(x: np.ndarray) -> np.ndarray:
    x = x / np.abs(x).max()  # an answer of 1e200 must not overflow when squared
    x = x - x.mean()
    return x / np.linalg.norm(x)


def _logistic(x, b1, b2, b3, b4):
    return b2 + (b1 - b2) * expit((x - b3) / max(abs(b4), 1e-9))


def _mean_srcc_by(pred, mos, group) -> float:
    pred, mos, group = _finite_pairs(pred, mos, group)
    codes, names = pd.factorize(group)
    rows = [codes == code for code in range(len(names))]
    each = np.array([_pearson(rankdata(pred[own]), rankdata(mos[own])) for own in rows])
    each = each[np.isfinite(each)]
    return float(each.mean()) if len(each) else float("nan")


def frame_srcc(frame: Mapping) -> float:
    """Return the SRCC of the columns ``score`` and ``mos``: a statistic for ``bootstrap``.

    >>> frame_srcc(pd.DataFrame({"score": [1, 2, 3], "mos": [2, 3, 9]}))
    1.0
    """
    return srcc(frame["score"], frame["mos"])


def frame_plcc(frame: Mapping) -> float:
    """Return the raw PLCC of the columns ``score`` and ``mos``: a statistic for ``bootstrap``.

    >>> frame_plcc(pd.DataFrame({"score": [1, 2, 3], "mos": [2, 4, 6]}))
    1.0
    """
    return plcc(frame["score"], frame["mos"])


def frame_within_level_srcc(frame: Mapping) -> float:
    """Return the within-level SRCC of the columns ``score``, ``mos`` and ``level``: a statistic for
    ``bootstrap``.

    >>> frame_within_level_srcc(pd.DataFrame({"score": [1, 2, 9, 8], "mos": [2, 3, 1, 0], "level": [1, 1, 2, 2]}))
    1.0
    """
    return within_level_srcc(frame["score"], frame["mos"], frame["level"])


def over_sets(frame: Mapping) -> float:
    """Return the mean over data sets (column ``set``) of the SRCC of ``score`` and ``mos``: a statistic for
    several sets with scales of their own.

    >>> over_sets(pd.DataFrame({"set": list("aabb"), "score": [1, 2, 3, 4], "mos": [1, 5, 900, 1400]}))
    1.0
    """
    return per_content_srcc(frame["score"], frame["mos"], frame["set"])


def bootstrap(
    frame: pd.DataFrame, statistic: Statistic, by: str = "reference", n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95% percentile interval of a statistic, resampling whole photographs with replacement.

    ``statistic`` is called with {column name: array} for each of the ``n`` resamples, e.g. ``frame_srcc``.
    The rows of one photograph are alike, so that resampling single rows would give an interval that is too
    narrow. A row whose ``by`` is missing is its own photograph. Fewer than two photographs: (nan, nan).
    Raises ValueError if the column is not there. Source: Efron & Tibshirani (1993), percentile interval.

    >>> mos = [n // 2 * 2 + n % 2 * 9 for n in range(40)]
    >>> frame = pd.DataFrame({"reference": range(40), "score": range(40), "mos": mos})
    >>> low, high = bootstrap(frame, frame_srcc)
    >>> low < frame_srcc(frame) < high
    True
    """
    return _interval(_resampled(frame, statistic, by, n, seed))


def paired_difference(
    frame_a: pd.DataFrame,
    frame_b: pd.DataFrame,
    statistic: Statistic,
    by: str = "reference",
    n: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return statistic(frame_a) - statistic(frame_b), and its 95% interval by bootstrap over shared
    photographs.

    Every resample takes the same photographs from both frames, so that what makes a photograph hard for
    both cancels: ``paired_difference(after, before, frame_srcc)`` is the gain. Returns (difference, low,
    high). Raises ValueError if the frames do not hold the same photographs or a photograph has no name.

    >>> before = pd.DataFrame({"reference": list("aabbcc"), "score": [1, 2, 2, 1, 1, 2], "mos": [1, 2, 3, 4, 5, 6]})
    >>> paired_difference(before.assign(score=before["mos"]), before, frame_srcc)[0] > 0
    True
    >>> paired_difference(before, before, frame_srcc)
    (0.0, 0.0, 0.0)
    """
    different = _photographs(frame_a, by) ^ _photographs(frame_b, by)
    if different:
        raise ValueError(f"photographs in one frame only: {sorted(map(str, different))[:5]}")
    difference = statistic(frame_a) - statistic(frame_b)
    pairs = zip(_resampled(frame_a, statistic, by, n, seed), _resampled(frame_b, statistic, by, n, seed))
    return difference, *_interval([a - b for a, b in pairs])


def seed_difference(
    frame: pd.DataFrame,
    a: list[str],
    b: list[str],
    statistic: Statistic,
    by: str = "reference",
    n: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Return how far the mean of a statistic over runs a is above that over runs b, with a 95% interval
    over photographs and seeds.

    The interval has two parts: [l, h], of `paired_difference`, is that of the mean difference d of these k
    pairs of runs over other photographs; t s / sqrt(k) is what other seeds would change, with s the
    standard deviation (ddof 1) of the k differences and t the 97.5% quantile of Student's t with k - 1
    degrees of freedom (4.30 for three seeds). Squares add up:

        lo = d - sqrt((d - l)^2 + (t s)^2 / k),  hi = d + sqrt((h - d)^2 + (t s)^2 / k)

    In simulations of 24 photographs it covers the truth in 94 to 98% where seeds dominate, weigh as much,
    or less than photographs, for k = 3 and 5; in 92% where seeds change nothing, as the bootstrap by
    itself. A bootstrap over so few seeds covers it in 73 to 92%. One pair of runs says nothing of other
    seeds: the interval is then that of photographs alone.

    frame: one row per picture, with the columns mos, ``by``, those that the statistic needs, and one of
    scores per run. a, b: k columns each, one per seed, paired in this order; a column may come again. n:
    resamples. Returns the keys mean, mean_than, difference, lo and hi; NaN where a run has no value, the
    interval too. Raises ValueError if a column is missing, or a and b differ in length. Source: Zou &
    Donner (2008), variance estimates recovery, for the sum of the two parts.

    >>> frame = pd.DataFrame({"reference": list("aabbcc"), "mos": [1, 2, 3, 4, 5, 6], "x/0": [1, 2, 3, 4, 5, 6], "y/0": [2, 1, 4, 3, 6, 5]})
    >>> found = seed_difference(frame, ["x/0"], ["y/0"], frame_srcc, n=100)
    >>> round(found["mean"], 3), round(found["difference"], 3), found["lo"] > 0
    (1.0, 0.171, True)
    """
    _require(frame, [*a, *b, by, "mos"])
    if len(a) != len(b):
        raise ValueError(
            f"{len(a)} runs cannot be paired with {len(b)}: give one column per seed on both sides"
        )
    runs = list(dict.fromkeys([*a, *b]))
    one, two = ([runs.index(name) for name in side] for side in (a, b))

    def values(columns: Mapping) -> np.ndarray:
        return np.array([statistic({**columns, "score": columns[name]}) for name in runs])  # (runs,)

    found = values({name: frame[name].to_numpy() for name in frame})
    drawn = np.reshape(
        _resampled(frame, values, by, n, seed), (-1, len(runs))
    )  # (n, runs): the same photographs for all
    mean, mean_than = float(found[one].mean()), float(found[two].mean())
    difference = mean - mean_than
    low, high = _interval((drawn[:, one] - drawn[:, two]).mean(axis=1))
    seeds = _seed_error(found[one] - found[two])
    low, high = (
        difference - math.hypot(difference - low, seeds),
        difference + math.hypot(high - difference, seeds),
    )
    return {"mean": mean, "mean_than": mean_than, "difference": difference, "lo": low, "hi": high}


def _seed_error(gaps: np.ndarray) -> float:
    """Half the 95% interval of the mean gap over seeds by Student's t; 0 for one seed, which does not show
    it.
    """
    k = len(gaps)
    return float(student_t.ppf(0.975, k - 1) * np.std(gaps, ddof=1) / math.sqrt(k)) if k > 1 else 0.0


def content_agreement(frame: pd.DataFrame, n: int = 1000, seed: int = 0) -> dict[str, float]:
    """Return the mean over contents of SRCC and PLCC, with 95% bootstrap intervals over contents, and both
    pooled.

    For sets whose ratings are scaled within each content (column reference). Contents where a correlation
    is not defined are left out of its mean. Columns needed: score, mos, reference; raises ValueError if one
    is missing.

    >>> mos, scores = [0, 50, 100, 0, 50, 100], [1, 2, 3, 4, 6, 5]
    >>> row = content_agreement(pd.DataFrame({"score": scores, "mos": mos, "reference": list("aaabbb")}))
    >>> row["srcc"], round(row["srcc_pooled"], 3)
    (0.75, 0.359)
    """
    _require(frame, ["score", "mos", "reference"])
    contents = [group for _, group in frame.groupby("reference")]
    row = {}
    for name, statistic in (("srcc", frame_srcc), ("plcc", frame_plcc)):
        each = pd.DataFrame(
            {"reference": range(len(contents)), "value": [statistic(group) for group in contents]}
        ).dropna()
        low, high = bootstrap(each, lambda columns: float(np.mean(columns["value"])), n=n, seed=seed)
        row |= {
            name: float(each["value"].mean()),
            f"{name}_lo": low,
            f"{name}_hi": high,
            f"{name}_pooled": statistic(frame),
        }
    return row


def _clusters(frame: pd.DataFrame, by: str) -> list[np.ndarray]:
    """Row numbers of every photograph, sorted by its name; then the rows without a name, one by one."""
    _require(frame, [by])
    codes, names = pd.factorize(frame[by], sort=True)
    nameless = codes < 0
    codes = np.where(nameless, len(names) + np.cumsum(nameless), codes)
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []


def _photographs(frame: pd.DataFrame, by: str) -> set:
    _require(frame, [by])
    if frame[by].isna().any():
        raise ValueError(f"{int(frame[by].isna().sum())} rows have no {by!r}: they cannot be paired")
    return set(frame[by])


def _resampled(frame: pd.DataFrame, statistic: Callable, by: str, n: int, seed: int) -> list:
    """The statistic of n resamples; [] for fewer than two photographs. One seed draws the same photographs."""
    clusters = _clusters(frame, by)
    if len(clusters) < 2:
        return []
    columns = {
        name: frame[name].to_numpy() for name in frame
    }  # arrays are five times as fast to index as a frame
    draws = np.random.default_rng(seed).integers(len(clusters), size=(n, len(clusters)))
    resamples = (np.concatenate([clusters[cluster] for cluster in draw]) for draw in draws)
    return [statistic({name: values[rows] for name, values in columns.items()}) for rows in resamples]


def _interval(values: list[float]) -> tuple[float, float]:
    values = np.array(values)[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _require(frame: pd.DataFrame, columns: list[str]) -> None:
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"columns {missing} are missing; there are {list(frame.columns)}")


def summarize(frame: pd.DataFrame, n: int = 1000, seed: int = 0) -> dict[str, float]:
    """Return one result row for a table of scores, under the names of the study columns.

    Columns needed: score, mos, reference, level (level may be empty: the within-level SRCC is then NaN);
    one row is one picture. ``rows`` counts all rows, ``unparseable`` those whose score is not a finite
    number; the correlations are over the others. ``srcc_lo`` and ``srcc_hi`` are the 95% bootstrap interval
    over photographs, from ``n`` resamples. Raises ValueError if a column is missing.

    >>> frame = pd.DataFrame({"score": [1, 2, np.nan, 4], "mos": [1, 3, 2, 5], "reference": list("aabb")})
    >>> row = summarize(frame.assign(level=1))
    >>> row["srcc"], row["rows"], row["photographs"], row["unparseable"]
    (1.0, 4, 2, 1)
    """
    _require(frame, ["score", "mos", "reference", "level"])
    columns = frame[["score", "mos", "reference", "level"]].replace({"level": {"": None}})
    low, high = bootstrap(columns, frame_srcc, n=n, seed=seed)
    return {
        "photographs": len(_clusters(columns, "reference")),
        "rows": len(frame),
        "unparseable": int((~np.isfinite(np.asarray(frame["score"], dtype=float))).sum()),
        "srcc": frame_srcc(columns),
        "srcc_lo": low,
        "srcc_hi": high,
        "srcc_within_level": frame_within_level_srcc(columns),
        "plcc": plcc(frame["score"], frame["mos"]),
        "plcc_fit": plcc_fit(frame["score"], frame["mos"]),
    }
