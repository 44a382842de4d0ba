"""The file of comparisons beside a manifest, and the look-up of its pairs."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vqr1.cli import main
from vqr1.data.comparisons import PairTable
from vqr1.data.manifests import load_comparisons, load_ratings, read_manifest
from vqr1.metrics import clusters, difference

MANIFEST = "image,dataset,mos,split\na.png,mine,,train\nb.png,mine,,train\nc.png,mine,4.5,val\n"
PAIRS = "first,second,preference\na.png,b.png,0.75\nb.png,./c.png,0.5\n"


@pytest.fixture
def written(tmp_path):
    """Return written(manifest, comparisons or None) -> the manifest's path, beside pictures a, b and c."""
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")

    def write(manifest: str, pairs: str | None):
        (tmp_path / "ratings.csv").write_text(manifest, encoding="utf-8")
        if pairs is not None:
            (tmp_path / "ratings-comparisons.csv").write_text(pairs, encoding="utf-8")
        return tmp_path / "ratings.csv"

    return write


def test_comparisons_are_read_from_beside_a_manifest_whose_mos_may_be_empty(written):
    path = written(MANIFEST, PAIRS)
    pairs = load_comparisons(path)
    assert pairs.to_numpy().tolist() == [["a.png", "b.png", 0.75], ["b.png", "c.png", 0.5]]
    assert pairs.attrs["dataset"] == "mine"
    frame = load_ratings(path)
    assert frame["mos"].isna().tolist() == [True, True, False] and "name" not in frame
    path = written(MANIFEST, "first,second,preference,votes,who\na.png,b.png,0.75,4,all\n")
    assert load_comparisons(path)["votes"].tolist() == [4]


def test_without_the_file_an_empty_mos_names_it(written):
    path = written(MANIFEST, None)
    with pytest.raises(ValueError, match=r"ratings.csv, line 2: mos '' .* pairs in ratings-comparisons.csv"):
        read_manifest(path)
    with pytest.raises(FileNotFoundError, match=r"ratings-comparisons.csv is missing; write .*first,second"):
        load_comparisons(path)
    assert main(["data", str(path)]) == 2


def test_a_manifests_own_names_tell_rows_of_one_picture_apart(written):
    head = "image,dataset,mos,distortion,level,seed,split,name\n"
    rows = "a.png,mine,,jpeg,1,0,train,mild\na.png,mine,,jpeg,5,0,train,strong\nb.png,mine,,,,,train,\n"
    path = written(head + rows, "first,second,preference\nmild,strong,1\nb.png,strong,1\n")
    assert load_ratings(path)["name"].tolist() == ["mild", "strong", "b.png"]
    assert load_comparisons(path)["first"].tolist() == ["mild", "b.png"]
    path = written(head.replace(",name", "") + rows.replace("mild", "").replace("strong", ""), PAIRS)
    with pytest.raises(ValueError, match="two rows are called 'a.png'.* in a column name"):
        load_comparisons(path)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            PAIRS.replace("b.png,0.75", "d.png,0.75"),
            "line 2: second 'd.png' is no picture of the manifest; corr",
        ),
        (PAIRS.replace("0.5", "1.5"), "line 3: preference '1.5' is not a number from 0 to 1; give the share"),
        (PAIRS.replace("0.5", "-1"), "line 3: preference '-1' is not a number from 0 to 1"),
        (PAIRS.replace("0.5", "nan"), "line 3: preference 'nan' is not a number from 0 to 1"),
        (PAIRS.replace("0.5", ""), "line 3: preference '' is not a number from 0 to 1"),
        (PAIRS.replace("./c.png", "b.png"), "line 3: second 'b.png' is compared with itself; take"),
        (PAIRS.replace("./c.png", "./b.png"), "line 3: second 'b.png' is compared with itself"),
        (
            PAIRS.replace("second", "Second"),
            "line 1: column 'second' is missing .*rename 'Second' to 'second'",
        ),
        (PAIRS.replace("preference", "label"), "line 1: column 'preference' is missing from the header"),
        ("first,second,preference,Votes\na.png,b.png,1,2\n", "line 1: .*rename 'Votes' to 'votes'"),
        ("first,second,preference,votes\na.png,b.png,1,0\n", "line 2: votes '0' is not a number above 0"),
        ("first,second,preference,votes\na.png,b.png,1,\n", "line 2: votes '' is not a number above 0"),
        (PAIRS.replace(",", ";"), "line 1: fields are separated by semicolons"),
        ("first,second,preference\n", "no comparisons after the header"),
    ],
)
def test_a_mistake_is_named_with_file_line_and_value(written, pairs, message):
    with pytest.raises(ValueError, match=f"ratings-comparisons.csv(, |: ){message}"):
        load_comparisons(written(MANIFEST, pairs))


def test_comparisons_are_of_one_data_set(written):
    with pytest.raises(ValueError, match="ratings.csv: .* one data set, and this one has mine, yours; split"):
        load_comparisons(written(MANIFEST.replace("c.png,mine", "c.png,yours"), PAIRS))


def test_vqr1_data_describes_the_comparisons(written, capsys):
    again = "b.png,a.png,0.25\n"  # the first pair, turned
    assert main(["data", str(written(MANIFEST, PAIRS + again))]) == 0
    assert "compared    2 of 3 pairs (67%), 1 of them ties (50%)" in capsys.readouterr().out
    assert main(["data", str(written(MANIFEST.replace("4.5", ""), PAIRS))]) == 0
    assert "mos         none\n" in capsys.readouterr().out


# The table


votes = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 4), st.integers(1, 9)).filter(
        lambda vote: vote[0] != vote[1]
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=60)
@given(votes, st.permutations(range(6)))
def test_a_pair_has_its_mean_preference_by_votes_whichever_way_it_was_written(drawn, asked):
    pairs = pd.DataFrame(drawn, columns=["first", "second", "preference", "votes"])
    pairs["preference"] /= 4
    mentioned = {*pairs["first"], *pairs["second"]}
    asked = [name for name in asked if name in mentioned]
    table = PairTable(pairs, "mine")
    found = table.preference(table.codes(asked))
    for (i, a), (j, b) in itertools.product(enumerate(asked), repeat=2):
        won = [(p / 4, n) for x, y, p, n in drawn if (x, y) == (a, b)]
        won += [(1 - p / 4, n) for x, y, p, n in drawn if (x, y) == (b, a)]
        expected = sum(p * n for p, n in won) / sum(n for _, n in won) if won else np.nan
        np.testing.assert_allclose(found[i, j], expected, atol=1e-12)
    near = {name: set(table.names[table.compared_with(code)]) for code, name in enumerate(table.names)}
    assert all(
        (b in near[a]) == ((a, b) in {(x, y) for x, y, *_ in drawn} | {(y, x) for x, y, *_ in drawn})
        for a, b in itertools.product(mentioned, repeat=2)
    )


# The share of pairs that scores order as people do


def looped(score, names, pairs):
    """Count, two drawn pictures at a time, what `PairTable.right` counts."""
    preferred = {}
    for a, b, p, n in pairs.itertuples(index=False):
        for pair, share in (((a, b), p), ((b, a), 1 - p)):
            won, votes = preferred.get(pair, (0.0, 0))
            preferred[pair] = won + share * n, votes + n
    right = []
    for i, j in itertools.permutations(range(len(names)), 2):
        won, votes = preferred.get((names[i], names[j]), (0.0, 1))
        if won / votes > 0.5:
            right.append(1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0)
    return sum(right) / len(right) if right else np.nan


@settings(max_examples=100)
@given(
    votes,
    st.lists(st.integers(0, 7), max_size=12),
    st.lists(st.sampled_from([1.0, 2.0, 2.5, 4.0, np.nan]), min_size=8, max_size=8),
)
def test_the_share_of_pairs_right_is_that_of_a_plain_loop(drawn, names, scores):
    """Pictures are drawn with repeats; 6 and 7 were never compared."""
    pairs = pd.DataFrame(drawn, columns=["first", "second", "preference", "votes"])
    pairs["preference"] /= 4
    score = [scores[name] for name in names]
    found = PairTable(pairs, "mine").right(score, names)
    np.testing.assert_allclose(found, looped(score, names, pairs), rtol=0, atol=1e-12)


def judged(pictures: int, runs: dict[str, np.ndarray], rng: np.random.Generator, truth: np.ndarray):
    """Return scores by run, and what people, whose judgement of a pair has noise of its own, said of all."""
    first, second = np.triu_indices(pictures, 1)
    felt = truth[first] - truth[second] + PEOPLE * 2**0.5 * rng.normal(size=len(first))
    pairs = pd.DataFrame({"first": first, "second": second, "preference": (felt > 0).astype(float)})
    return pd.DataFrame(runs).assign(name=range(pictures), reference=range(pictures)), pairs


PEOPLE = 0.35
"""Deviation of people's noise; with 1 for the pictures they follow the true order in 89% of pairs."""


def test_a_paired_difference_of_pairs_right_resamples_pictures():
    """It equals a loop over the same draws: pictures with replacement, and the pairs among those drawn."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=9)
    noise = {run: truth + rng.normal(size=9) for run in ("a/0", "a/1", "b/0")}
    frame, pairs = judged(9, noise, rng, truth)
    table, runs = PairTable(pairs, "mine"), (["a/0", "a/1"], ["b/0", "b/0"])
    found = difference(frame, *runs, table.right, ["name"], n=40, seed=3)
    pairs = pairs.assign(votes=1)
    by = [rows[0] for rows in clusters(frame)]
    gaps = []
    for draw in np.random.default_rng(3).integers(9, size=(40, 9)):
        rows = frame.iloc[[by[place] for place in draw]]
        share = {run: looped(rows[run].to_numpy(), rows["name"].to_numpy(), pairs) for run in noise}
        gaps.append((share["a/0"] + share["a/1"]) / 2 - share["b/0"])
    whole = {run: looped(frame[run].to_numpy(), frame["name"].to_numpy(), pairs) for run in noise}
    gap = (whole["a/0"] + whole["a/1"]) / 2 - whole["b/0"]
    low, high = np.percentile(gaps, [2.5, 97.5])
    seeds = 12.7062 * abs(whole["a/0"] - whole["a/1"]) / 2  # t of one degree of freedom, two runs
    assert found["difference"] == pytest.approx(gap, abs=1e-9)
    assert found["lo"] == pytest.approx(gap - np.hypot(gap - low, seeds), abs=1e-5)
    assert found["hi"] == pytest.approx(gap + np.hypot(high - gap, seeds), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_seeds", "why"), [(0.8, "seeds dominate"), (0.35, "alike"), (0.1, "photographs dominate")]
)
def test_95_of_100_intervals_of_pairs_right_cover_the_truth(of_seeds, why):
    """Three runs a side score 60 pictures with noise, the better side 0.6 and the other 0.9 on average.

    of_seeds: the deviation of the logarithm of a run's noise. Two differences of correlation r have one sign
    with probability 1/2 + asin(r) / pi (Sheppard, 1899), which gives the true shares. Of 200
    intervals of 95% 10 would miss; these are wider: 3, 2 and 1 do. One without end would miss none.
    """
    rng, hits = np.random.default_rng(0), 0
    sides = {"a": 0.6, "b": 0.9}
    runs = {side: [f"{side}/{seed}" for seed in range(3)] for side in sides}
    of = {side: noise * np.exp(of_seeds * rng.normal(size=100_000)) for side, noise in sides.items()}
    share = {
        side: np.mean(0.5 + np.arcsin(((1 + noise**2) * (1 + PEOPLE**2)) ** -0.5) / np.pi)
        for side, noise in of.items()
    }
    for _ in range(200):
        truth, scores = rng.normal(size=60), {}
        for side, names in runs.items():
            shared = rng.normal(size=60)  # what all runs of a side see wrongly
            for name in names:
                noise = rng.choice(of[side])
                scores[name] = truth + noise * (0.8 * shared + 0.6 * rng.normal(size=60))
        frame, pairs = judged(60, scores, rng, truth)
        found = difference(frame, runs["a"], runs["b"], PairTable(pairs, "mine").right, ["name"], n=200)
        hits += found["lo"] <= share["a"] - share["b"] <= found["hi"]
    assert 193 <= hits < 200, f"{why}: {hits}"


def test_votes_that_are_not_known_weigh_the_same():
    pairs = pd.DataFrame({"first": ["a", "b"], "second": ["b", "a"], "preference": [1, 1]})
    table = PairTable(pairs, "mine")
    assert table.preference(table.codes(["a", "b"]))[0, 1] == 0.5
    table = PairTable(pairs.assign(votes=[3, 1]), "mine")
    assert table.preference(table.codes(["a", "b"]))[0, 1] == 0.75


def test_votes_that_cancel_decide_nothing():
    """0.65 + 0.55 against 0.7 and 0.5: a tie, whose sum in binary is a little above one half."""
    pairs = pd.DataFrame({"first": list("aab"), "second": list("bba"), "preference": [0.65, 0.55, 0.7]})
    table = PairTable(pairs, "mine")
    assert table.shares.tolist() == [0.5, 0.5] and len(table.decided[0]) == 0
    assert np.isnan(table.right([2, 1], ["a", "b"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": [1.0, 1.2]}, r"the comparisons of 'mine', row 1 .*: preference 1.2 is not a number"),
        ({"second": ["b", "c"]}, r"row 1 .*: second 'c' is compared with itself"),
        ({"first": ["a", None]}, r"row 1 .*: first nan names no picture; name it, or take the row out"),
        ({"second": [np.nan, "a"]}, r"row 0 .*: second nan names no picture"),
        ({"votes": [1, -1]}, "row 1 .*: votes -1 is not a number above 0"),
    ],
)
def test_pairs_given_in_python_are_checked_as_well(change, message):
    pairs = pd.DataFrame({"first": ["a", "c"], "second": ["b", "a"], "preference": [1.0, 0.5]})
    with pytest.raises(ValueError, match=message):
        PairTable(pairs.assign(**change), "mine")
    with pytest.raises(ValueError, match="the comparisons of 'mine': column 'second' is missing"):
        PairTable(pairs.drop(columns="second"), "mine")
    with pytest.raises(ValueError, match="the comparisons of 'mine' are empty"):
        PairTable(pairs.iloc[:0], "mine")
