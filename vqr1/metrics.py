"""How well scores agree with mean opinion scores (MOS): SRCC, PLCC, and intervals by photograph.

Pairs with a score or a MOS that is not a finite number are left out of every correlation; ``summarize``
counts the scores among them as unparseable. Undefined values (a constant side, fewer than two pairs) are NaN,
without a warning. Scores and MOS have the same direction: higher is better.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy.optimize import least_squares
from scipy.special import expit
from scipy.stats import rankdata
from scipy.stats import t as student_t

Statistic = Callable[..., float]
"""A number from columns, called with one array for each: `srcc`, `plcc`, `srcc_by`, numpy.mean."""


def srcc(pred, mos) -> float:
    """Return Spearman's rank correlation, Pearson's of the ranks; equal values share their mean rank.

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
    """Return each score's MOS on the curve that `plcc_fit` fits, (N,).

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
    return logistic(x, *logistic_parameters(x, mos))


def logistic_parameters(x: np.ndarray, mos: np.ndarray) -> np.ndarray:
    """Return b1, b2, b3, b4 of the least-squares `logistic`, (4,); NaN if the fit does not converge.

    x: (N,) scores of mean 0 and standard deviation 1.
    mos: (N,) mean opinion scores; both finite and not constant.
    """
    start = [mos.max(), mos.min(), 0.0, 0.25]
    found = least_squares(lambda b: logistic(x, *b) - mos, start, method="lm", max_nfev=2000)
    return found.x if found.success else np.full(4, np.nan)


def srcc_by(pred, mos, group) -> float:
    """Return the mean over groups of the SRCC within one group.

    By level it asks how a mild colour shift compares with a mild blur: an oracle that knows only the level
    scores every row of a level alike and gets NaN. Group by content where each content has its own scale, by
    data set where there are several sets.

    Args:
        pred: (N,) scores.
        mos: (N,) mean opinion scores.
        group: (N,) levels, contents or sets; rows without one are left out.

    Returns:
        -1..1, the mean over the groups whose SRCC is defined; NaN if there is none.

    Raises:
        ValueError: the lengths differ.

    >>> srcc_by([1, 2, 3, 3, 2, 1], [1, 2, 3, 4, 5, 6], [1, 1, 1, 2, 2, 2])
    0.0
    >>> mos = [0, 50, 100, 0, 50, 100]
    >>> srcc_by([1, 2, 3, 4, 5, 6], mos, list("aaabbb")), round(srcc([1, 2, 3, 4, 5, 6], mos), 3)
    (1.0, 0.478)
    """
    pred, mos, group = _finite_pairs(pred, mos, group)
    codes, names = pd.factorize(group)
    rows = [codes == code for code in range(len(names))]
    each = np.array([_pearson(rankdata(pred[own]), rankdata(mos[own])) for own in rows])
    each = each[np.isfinite(each)]
    return float(each.mean()) if len(each) else float("nan")


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


def logistic(x, b1: float, b2: float, b3: float, b4: float):
    """Return VQEG's curve at x: from b2 (far left) to b1 (far right), steepest at b3, of width |b4|.

    >>> float(logistic(3.0, 5, 1, 3, 0.5))
    3.0
    """
    return b2 + (b1 - b2) * expit((x - b3) / max(abs(b4), 1e-9))


def bootstrap(
    frame: pd.DataFrame,
    statistic: Statistic,
    columns: Sequence[str] = ("score", "mos"),
    by: str = "reference",
    n: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95% percentile interval of a statistic, resampling whole photographs with replacement.

    Rows of one photograph are alike, so resampling single rows would make the interval too narrow. Source:
    Efron & Tibshirani (1993), percentile interval.

    Args:
        frame: one row per picture.
        statistic: called with the arrays of `columns` for each resample.
        columns: what the statistic takes, in its order.
        by: column that names the photograph; a row without a name is its own photograph.
        n: resamples.
        seed: of the resamples; one seed draws the same photographs for every statistic.

    Returns:
        (low, high), over the resamples where the statistic is defined; NaN for fewer than two photographs.

    Raises:
        ValueError: a column is missing.

    >>> mos = [n // 2 * 2 + n % 2 * 9 for n in range(40)]
    >>> frame = pd.DataFrame({"reference": range(40), "score": range(40), "mos": mos})
    >>> low, high = bootstrap(frame, srcc)
    >>> low < srcc(frame["score"], frame["mos"]) < high
    True
    """
    return _interval(_resampled(frame, statistic, columns, by, n, seed))


def difference(
    frame: pd.DataFrame,
    runs: Sequence[str],
    baseline: Sequence[str],
    statistic: Statistic = srcc,
    columns: Sequence[str] = ("mos",),
    by: str = "reference",
    n: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Return how far the runs' mean of a statistic exceeds the baseline's, with a 95% interval.

    All score the same photographs, so what makes a photograph hard for both cancels. The interval has two
    parts. Other photographs would move the mean difference d of these k pairs within [l, h] (bootstrap).
    Other seeds would move it by t s / sqrt(k): s is the standard deviation (ddof 1) of the k differences, t
    the 97.5% quantile of Student's t with k - 1 degrees of freedom (4.30 for three seeds). Squares add up:

        lo = d - sqrt((d - l)^2 + (t s)^2 / k),  hi = d + sqrt((h - d)^2 + (t s)^2 / k)

    In simulations (24 photographs, k = 3 and 5) it covers the truth in 94 to 98% where seeds matter more than
    photographs, as much, or less. Where seeds change nothing it is 92%, as for the bootstrap alone. A
    bootstrap over so few seeds covers 73 to 92%. Of the share of people's pairs that are in order
    (`vqr1.data.comparisons.PairTable.right`; all pairs of 60 pictures, k = 3) it covers 98.5 to 99.5%, wider
    than need be: where a resample has two pictures twice, it counts their pair four times. One pair of runs
    says nothing of other seeds: its interval is over photographs alone. Source: Zou & Donner (2008), variance
    estimates recovery, for the sum of the two parts.

    Args:
        frame: one row per picture, with a column of scores per run.
        runs: k columns of scores, one per seed; a column may repeat.
        baseline: k columns, paired with `runs` in this order.
        statistic: called with the scores of a run and the arrays of `columns`.
        columns: what the statistic takes after the scores.
        by: column that names the photograph.
        n: resamples.
        seed: of the resamples.

    Returns:
        mean, mean_baseline, difference, lo and hi; where a run has no value, all that uses it is NaN.

    Raises:
        ValueError: a column is missing, or the sides differ in number.

    >>> frame = pd.DataFrame({"reference": list("aabbcc"), "mos": [1, 2, 3, 4, 5, 6]})
    >>> frame["x/0"], frame["y/0"] = [1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5]
    >>> found = difference(frame, ["x/0"], ["y/0"], n=100)
    >>> round(found["mean"], 3), round(found["difference"], 3), found["lo"] > 0
    (1.0, 0.171, True)
    """
    if len(runs) != len(baseline):
        raise ValueError(
            f"{len(runs)} runs cannot be paired with {len(baseline)}: give one column per seed on both sides"
        )
    names = list(dict.fromkeys([*runs, *baseline]))
    one, two = ([names.index(name) for name in side] for side in (runs, baseline))

    def values(*arrays) -> np.ndarray:
        scores, others = arrays[: len(names)], arrays[len(names) :]
        return np.array([statistic(own, *others) for own in scores])  # (runs,)

    require(frame, [*names, *columns])
    found = values(*(frame[name].to_numpy() for name in (*names, *columns)))
    drawn = _resampled(frame, values, (*names, *columns), by, n, seed)  # the same photographs for all
    drawn = np.reshape(drawn, (-1, len(names)))  # (n, runs)
    mean, mean_baseline = float(found[one].mean()), float(found[two].mean())
    gap = mean - mean_baseline
    low, high = _interval((drawn[:, one] - drawn[:, two]).mean(axis=1))
    seeds = _seed_error(found[one] - found[two])
    return {
        "mean": mean,
        "mean_baseline": mean_baseline,
        "difference": gap,
        "lo": gap - math.hypot(gap - low, seeds),
        "hi": gap + math.hypot(high - gap, seeds),
    }


def _seed_error(gaps: np.ndarray) -> float:
    """Return half the 95% interval of the mean gap over seeds, by Student's t; 0 for one seed."""
    k = len(gaps)
    return float(student_t.ppf(0.975, k - 1) * np.std(gaps, ddof=1) / math.sqrt(k)) if k > 1 else 0.0


def content_agreement(frame: pd.DataFrame, n: int = 1000, seed: int = 0) -> dict[str, float]:
    """Return the mean over contents of SRCC and PLCC, their 95% intervals over contents, and both pooled.

    For sets whose ratings are scaled within each content. A correlation's mean omits contents where it is
    undefined.

    Args:
        frame: columns score, mos and reference, which names the content.
        n: resamples.
        seed: of the resamples.

    Returns:
        srcc, srcc_lo, srcc_hi, srcc_pooled; likewise plcc.

    Raises:
        ValueError: a column is missing.

    >>> mos, scores = [0, 50, 100, 0, 50, 100], [1, 2, 3, 4, 6, 5]
    >>> row = content_agreement(pd.DataFrame({"score": scores, "mos": mos, "reference": list("aaabbb")}))
    >>> row["srcc"], round(row["srcc_pooled"], 3)
    (0.75, 0.359)
    """
    require(frame, ["score", "mos", "reference"])
    contents = [(group["score"], group["mos"]) for _, group in frame.groupby("reference")]
    row = {}
    for name, statistic in (("srcc", srcc), ("plcc", plcc)):
        each = pd.DataFrame({"value": [statistic(*content) for content in contents]}).dropna()
        each["reference"] = range(len(each))
        low, high = bootstrap(each, np.mean, ["value"], n=n, seed=seed)
        row |= {
            name: float(each["value"].mean()),
            f"{name}_lo": low,
            f"{name}_hi": high,
            f"{name}_pooled": statistic(frame["score"], frame["mos"]),
        }
    return row


def clusters(frame: pd.DataFrame, by: str = "reference") -> list[np.ndarray]:
    """Return row numbers by photograph, sorted by name; then the rows without a name, one by one.

    >>> [rows.tolist() for rows in clusters(pd.DataFrame({"reference": ["b", "a", "b", None]}))]
    [[1], [0, 2], [3]]
    """
    require(frame, [by])
    codes, names = pd.factorize(frame[by], sort=True)
    nameless = codes < 0
    codes = np.where(nameless, len(names) + np.cumsum(nameless), codes)
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []


def _resampled(
    frame: pd.DataFrame, statistic: Callable, columns: Sequence[str], by: str, n: int, seed: int
) -> list:
    """The statistic of n resamples; [] for fewer than two photographs."""
    require(frame, columns)
    photographs = clusters(frame, by)
    if len(photographs) < 2:
        return []
    arrays = [frame[name].to_numpy() for name in columns]  # five times as fast to index as a frame
    draws = np.random.default_rng(seed).integers(len(photographs), size=(n, len(photographs)))
    resamples = (np.concatenate([photographs[place] for place in draw]) for draw in draws)
    return [statistic(*(values[rows] for values in arrays)) for rows in resamples]


def _interval(values: list[float]) -> tuple[float, float]:
    values = np.array(values)[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def require(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raise ValueError naming the columns that a table lacks."""
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"columns {missing} are missing; there are {list(frame.columns)}")


def summarize(frame: pd.DataFrame, n: int = 1000, seed: int = 0) -> dict[str, float]:
    """Return one result row for a table of scores, under the names of the study columns.

    Args:
        frame: one row per picture, with the columns score, mos, reference and level; level may be empty.
        n: resamples of photographs.
        seed: of the resamples.

    Returns:
        photographs; rows, all of them; unparseable, those whose score is not a finite number. Over the
        others: srcc with its 95% bootstrap interval over photographs, srcc_lo and srcc_hi;
        srcc_within_level, NaN without levels; plcc and plcc_fit.

    Raises:
        ValueError: a column is missing.

    >>> frame = pd.DataFrame({"score": [1, 2, np.nan, 4], "mos": [1, 3, 2, 5], "reference": list("aabb")})
    >>> row = summarize(frame.assign(level=1))
    >>> row["srcc"], row["rows"], row["photographs"], row["unparseable"]
    (1.0, 4, 2, 1)
    """
    require(frame, ["score", "mos", "reference", "level"])
    score, mos = frame["score"], frame["mos"]
    low, high = bootstrap(frame, srcc, n=n, seed=seed)
    return {
        "photographs": len(clusters(frame, "reference")),
        "rows": len(frame),
        "unparseable": int((~np.isfinite(np.asarray(score, dtype=float))).sum()),
        "srcc": srcc(score, mos),
        "srcc_lo": low,
        "srcc_hi": high,
        "srcc_within_level": srcc_by(score, mos, frame["level"].replace({"": None})),
        "plcc": plcc(score, mos),
        "plcc_fit": plcc_fit(score, mos),
    }
