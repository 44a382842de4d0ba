"""Correlations match scipy and hand calculation; intervals match simulated experiments."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vqr1 import metrics
from vqr1.metrics import (
    bootstrap,
    content_agreement,
    difference,
    plcc,
    plcc_fit,
    srcc,
    srcc_by,
    summarize,
)

NAN = float("nan")


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def table(rows=200, photographs=20, noise=1.0, seed=0):
    """Return rows of several photographs: score = mos + the photograph's error + the row's error."""
    rng = np.random.default_rng(seed)
    reference = np.arange(rows) % photographs
    mos = rng.normal(3, 1, rows)
    score = mos + noise * (rng.normal(size=photographs)[reference] + rng.normal(size=rows))
    names = [f"photos/{n}.png" for n in reference]
    return pd.DataFrame({"score": score, "mos": mos, "reference": names, "level": rng.integers(1, 6, rows)})


pairs = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=30)


@given(pairs)
def test_correlations_equal_scipy_with_ties(drawn):
    pred, mos = np.array(drawn, dtype=float).T
    if np.ptp(pred) and np.ptp(mos):
        assert srcc(pred, mos) == pytest.approx(stats.spearmanr(pred, mos).statistic, abs=1e-12)
        assert plcc(pred, mos) == pytest.approx(stats.pearsonr(pred, mos).statistic, abs=1e-12)
    else:
        assert math.isnan(srcc(pred, mos)) and math.isnan(plcc(pred, mos))


@given(pairs)
def test_srcc_depends_on_the_order_alone(drawn):
    pred, mos = np.array(drawn, dtype=float).T
    np.testing.assert_equal(srcc(np.exp(pred), mos**3), srcc(pred, mos))


@pytest.mark.parametrize("correlation", [srcc, plcc, plcc_fit])
def test_pairs_without_a_number_are_left_out(correlation):
    frame = table()
    holes = frame.copy()
    holes.loc[3, "score"], holes.loc[5, "mos"], holes.loc[8, "score"] = NAN, NAN, np.inf
    kept = frame.drop(index=[3, 5, 8])
    assert correlation(holes["score"], holes["mos"]) == correlation(kept["score"], kept["mos"])


@pytest.mark.parametrize("correlation", [srcc, plcc, plcc_fit])
@pytest.mark.parametrize(
    ("pred", "mos"),
    [([], []), ([1.0], [2.0]), ([3.0] * 6, range(6)), (range(6), [3.0] * 6), ([NAN] * 6, range(6))],
)
def test_correlation_that_is_not_defined_is_nan_without_a_warning(correlation, pred, mos):
    assert math.isnan(correlation(pred, mos))


@pytest.mark.parametrize("correlation", [srcc, plcc, plcc_fit])
def test_columns_of_different_length_are_an_error(correlation):
    with pytest.raises(ValueError, match="equally long"):
        correlation([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="equally long"):
        srcc_by([1, 2, 3], [1, 2, 3], [1, 2])


def test_fit_finds_a_logistic_relation_that_raw_plcc_does_not_see():
    x = np.linspace(1, 5, 60)
    mos = 10 + 80 / (1 + np.exp(-(x - 3.6) / 0.15))
    assert plcc(x, mos) < 0.92 and plcc_fit(x, mos) == pytest.approx(1, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=6, max_size=40))
def test_fit_never_correlates_less_than_the_raw_scores(drawn):
    pred, mos = np.array(drawn, dtype=float).T
    raw = plcc(pred, mos)
    assert (math.isnan(raw) and math.isnan(plcc_fit(pred, mos))) or abs(plcc_fit(pred, mos)) >= abs(
        raw
    ) - 1e-12


def test_fit_does_not_depend_on_the_unit_of_the_scores_and_keeps_the_sign():
    frame = table()
    value = plcc_fit(frame["score"], frame["mos"])
    assert plcc_fit(1e4 * frame["score"] - 7, frame["mos"]) == pytest.approx(value, abs=1e-6)
    assert plcc_fit(-frame["score"], frame["mos"]) == pytest.approx(-value, abs=1e-3)


def test_fit_that_does_not_converge_returns_the_raw_plcc(monkeypatch):
    frame, solve = table(), metrics.least_squares
    monkeypatch.setattr(metrics, "least_squares", lambda *args, **kw: solve(*args, **{**kw, "max_nfev": 1}))
    assert plcc_fit(frame["score"], frame["mos"]) == plcc(frame["score"], frame["mos"])


def test_fit_that_is_stuck_returns_the_raw_plcc():
    rng = np.random.default_rng(2836)
    size = rng.integers(5, 30)
    pred = rng.standard_cauchy(
        size
    )  # an outlier, and a falling relation: the solver stops at a correlation of 0.74
    mos = -pred + rng.normal(size=size)
    assert plcc_fit(pred, mos) == plcc(pred, mos) < -0.85


def test_fewer_than_five_pairs_return_the_raw_plcc():
    assert plcc_fit([1, 2, 3, 4], [1, 2, 3, 8]) == plcc([1, 2, 3, 4], [1, 2, 3, 8])


@pytest.mark.parametrize("correlation", [srcc, plcc, plcc_fit])
def test_one_enormous_score_does_not_break_a_correlation(correlation):
    frame = table()
    frame.loc[0, "score"] = 1e300
    assert abs(correlation(frame["score"], frame["mos"])) <= 1


def test_srcc_by_level_is_the_mean_over_levels_and_skips_undefined_ones():
    pred, mos = [1, 2, 3, 9, 8, 7, 5, 5], [1, 2, 3, 1, 2, 3, 1, 2]
    level = [1, 1, 1, 2, 2, 2, 3, 3]  # 1, -1, undefined
    assert srcc_by(pred, mos, level) == 0
    assert srcc_by(pred[:3], mos[:3], level[:3]) == 1
    assert srcc_by([*pred[:3], 9, 0], [*mos[:3], 1, 2], [1, 1, 1, None, None]) == 1


def test_score_that_follows_the_level_alone_has_no_within_level_srcc():
    frame = table()
    assert math.isnan(srcc_by(frame["level"], frame["mos"], frame["level"]))


def test_srcc_by_content_does_not_see_the_scale_of_a_content():
    frame = table(noise=0.3)
    shift = frame["reference"].map({name: 100.0 * n for n, name in enumerate(frame["reference"].unique())})
    assert srcc_by(frame["score"] + shift, frame["mos"], frame["reference"]) == pytest.approx(
        srcc_by(frame["score"], frame["mos"], frame["reference"])
    )


def test_bootstrap_has_a_seed_and_contains_the_estimate():
    frame = table()
    low, high = bootstrap(frame, srcc, n=300)
    assert low < srcc(frame["score"], frame["mos"]) < high
    assert (low, high) == bootstrap(frame, srcc, n=300) != bootstrap(frame, srcc, n=300, seed=1)


def test_bootstrap_equals_resampled_frames():
    frame, n = table(60, 6), 50
    names = sorted(frame["reference"].unique())
    draws = np.random.default_rng(0).integers(6, size=(n, 6))
    frames = [pd.concat([frame[frame["reference"] == names[d]] for d in draw]) for draw in draws]
    expected = np.percentile([stats.spearmanr(f["score"], f["mos"]).statistic for f in frames], [2.5, 97.5])
    assert bootstrap(frame, srcc, n=n) == pytest.approx(expected)


def test_bootstrap_by_photograph_is_wider_than_by_row_when_rows_of_a_photograph_are_alike():
    frame = table(noise=2.0).assign(row=range(200))
    by_photograph, by_row = (
        np.ptp(bootstrap(frame, np.mean, ["score"], by, n=500)) for by in ("reference", "row")
    )
    assert by_photograph > 1.3 * by_row


def test_interval_covers_the_truth_in_about_95_of_100_experiments():
    truth = (
        6 / math.pi * math.asin(1 / math.sqrt(1.5) / 2)
    )  # Spearman of a bivariate normal with r = 1 / sqrt(1.5)
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        mos = rng.normal(size=80)
        frame = pd.DataFrame({"score": mos + rng.normal(0, 0.5**0.5, 80), "mos": mos, "reference": range(80)})
        low, high = bootstrap(frame, srcc, n=200, seed=seed)
        hits += low <= truth <= high
    assert 51 <= hits <= 60


def test_a_statistic_is_given_the_arrays_of_its_columns_in_their_order():
    """Arrays index five times as fast as a frame, and there are a thousand resamples."""
    frame, given = table(), []
    bootstrap(frame, lambda *arrays: given.append(arrays) or 0.0, ["level", "mos"], n=5)
    assert len(given) == 5 and {type(array) for arrays in given for array in arrays} == {np.ndarray}
    assert all(set(level) <= set(range(1, 6)) and len(level) == len(mos) for level, mos in given)


def test_rows_without_a_photograph_are_photographs_of_their_own():
    frame = table(40, 4)
    alone = frame.assign(reference=[None] * 40)
    assert summarize(alone, n=20)["photographs"] == 40
    assert summarize(pd.concat([frame, alone]), n=20)["photographs"] == 44


def test_one_photograph_has_no_interval():
    frame = table(20, 1)
    assert np.isnan(bootstrap(frame, srcc)).all()
    found = difference(frame, ["score"], ["level"])
    assert np.isnan([found["lo"], found["hi"]]).all() and np.isfinite(found["difference"])


def test_a_paired_interval_is_narrower_than_that_of_one():
    after = table(noise=2.0)
    after["before"] = after["score"] + np.random.default_rng(1).normal(0, 0.3, len(after))
    found = difference(after, ["score"], ["before"], n=300)
    single = np.ptp(bootstrap(after, srcc, n=300))
    assert found["lo"] < found["difference"] < found["hi"] and found["hi"] - found["lo"] < single
    assert found["difference"] == srcc(after["score"], after["mos"]) - srcc(after["before"], after["mos"])


def test_a_difference_of_one_run_is_that_of_resampled_frames():
    """It takes percentiles of SRCC after minus SRCC before, over the same photographs in both."""
    frame, n = table(60, 6), 50
    frame["before"] = frame["score"].sample(frac=1, random_state=0).to_numpy()
    found = difference(frame, ["score"], ["before"], n=n)
    names = sorted(frame["reference"].unique())
    draws = np.random.default_rng(0).integers(6, size=(n, 6))
    frames = [pd.concat([frame[frame["reference"] == names[d]] for d in draw]) for draw in draws]
    gaps = [srcc(f["score"], f["mos"]) - srcc(f["before"], f["mos"]) for f in frames]
    assert (found["lo"], found["hi"]) == pytest.approx(tuple(np.percentile(gaps, [2.5, 97.5])))


def test_a_difference_does_not_depend_on_the_order_of_rows():
    frame = table(seed=0).assign(before=table(seed=0, noise=2.0)["score"])
    mixed = frame.sample(frac=1, random_state=0)
    one, two = (difference(rows, ["score"], ["before"], n=50) for rows in (frame, mixed))
    assert one == pytest.approx(two)


def test_a_difference_of_the_within_level_srcc():
    frame = table(noise=0.3)
    frame["before"] = np.random.default_rng(2).permutation(frame["score"])
    found = difference(frame, ["score"], ["before"], srcc_by, ["mos", "level"], n=100)
    assert found["difference"] > 0.5 and found["lo"] > 0


@pytest.mark.parametrize("column", ["before", "level", "reference"])
def test_a_column_that_a_difference_needs_is_named(column):
    frame = table().assign(before=0.0).drop(columns=column)
    with pytest.raises(ValueError, match=rf"\['{column}'\] are missing"):
        difference(frame, ["score"], ["before"], srcc_by, ["mos", "level"])


def test_summary_counts_unparseable_answers_and_never_replaces_them():
    frame = table()
    frame.loc[:9, "score"] = NAN
    frame.loc[10, "score"] = np.inf
    row = summarize(frame, n=50)
    assert (row["rows"], row["photographs"], row["unparseable"]) == (200, 20, 11)
    assert row["srcc"] == srcc(frame["score"][11:], frame["mos"][11:])
    assert set(row) == {
        "photographs",
        "rows",
        "unparseable",
        "srcc",
        "srcc_lo",
        "srcc_hi",
        "srcc_within_level",
        "plcc",
        "plcc_fit",
    }


def test_summary_of_nothing_parseable_is_nan_and_counted():
    row = summarize(table().assign(score=NAN), n=20)
    assert row["unparseable"] == row["rows"] == 200
    names = ("srcc", "srcc_lo", "srcc_hi", "srcc_within_level", "plcc", "plcc_fit")
    assert all(math.isnan(row[name]) for name in names)


def test_summary_of_a_set_without_levels_has_no_within_level_srcc():
    for level in (NAN, "", None):
        assert math.isnan(summarize(table().assign(level=level), n=20)["srcc_within_level"])


# Ratings that are scaled within each content


def by_content(contents=30, versions=11, noise=0.4, seed=0):
    """Return scores that follow quality; mos is scaled to 0..100 within each content.

    So contents cannot be compared.
    """
    rng = np.random.default_rng(seed)
    quality = rng.normal(rng.normal(0, 3, (contents, 1)), 1, (contents, versions))
    low, high = quality.min(1, keepdims=True), quality.max(1, keepdims=True)
    score = quality + noise * rng.normal(size=quality.shape)
    reference = np.repeat([f"c{n}" for n in range(contents)], versions)
    return pd.DataFrame(
        {
            "score": score.ravel(),
            "mos": (100 * (quality - low) / (high - low)).ravel(),
            "reference": reference,
        }
    )


def test_agreement_per_content_is_the_mean_over_contents():
    frame = by_content()
    row = content_agreement(frame, n=200)
    groups = [group for _, group in frame.groupby("reference")]
    assert row["srcc"] == pytest.approx(
        np.mean([stats.spearmanr(group["score"], group["mos"]).statistic for group in groups])
    )
    assert row["srcc"] == pytest.approx(srcc_by(frame["score"], frame["mos"], frame["reference"]))
    assert row["plcc"] == pytest.approx(
        np.mean([stats.pearsonr(group["score"], group["mos"]).statistic for group in groups])
    )
    assert (row["srcc_pooled"], row["plcc_pooled"]) == (
        srcc(frame["score"], frame["mos"]),
        plcc(frame["score"], frame["mos"]),
    )
    assert row["srcc"] > 0.8 and row["srcc_pooled"] < 0.5  # why such a set is not pooled
    assert row["srcc_lo"] < row["srcc"] < row["srcc_hi"] and row["plcc_lo"] < row["plcc"] < row["plcc_hi"]


def test_its_interval_is_as_wide_as_contents_differ():
    """The interval's width is compared with the standard error of a mean of 30 contents."""
    frame = by_content(noise=1.5)
    row = content_agreement(frame, n=500)
    each = [srcc(group["score"], group["mos"]) for _, group in frame.groupby("reference")]
    assert row["srcc_hi"] - row["srcc_lo"] == pytest.approx(
        2 * 1.96 * np.std(each, ddof=1) / np.sqrt(30), rel=0.15
    )


def test_a_content_without_a_correlation_is_left_out_of_the_mean():
    frame = by_content(3)
    frame.loc[frame["reference"] == "c1", "score"] = 2.5
    frame.loc[frame["reference"] == "c2", "score"] = NAN
    row = content_agreement(frame, n=20)
    first = frame[frame["reference"] == "c0"]
    assert row["srcc"] == srcc(first["score"], first["mos"]) and math.isnan(row["srcc_lo"])
    nothing = content_agreement(frame.assign(score=NAN), n=20)
    assert all(math.isnan(value) for value in nothing.values())
    with pytest.raises(ValueError, match="reference"):
        content_agreement(frame.drop(columns="reference"))


@pytest.mark.parametrize("column", ["score", "mos", "reference", "level"])
def test_missing_column_is_named(column):
    with pytest.raises(ValueError, match=column):
        summarize(table().drop(columns=column))
