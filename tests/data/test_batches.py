"""Batches that grow along compared pairs: each row at most once an epoch, and pairs where there are any."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqr1.data.batches import one_set_batches
from vqr1.data.comparisons import PairTable


def compared(*pairs: tuple[str, str]) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["first", "second"]).assign(preference=1.0)


def rows(names, dataset: str = "mine") -> pd.DataFrame:
    return pd.DataFrame({"image": list(names), "dataset": dataset})


def chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("comparisons", [None, {}, {"elsewhere": compared(("x", "y"))}])
def test_without_comparisons_of_its_sets_the_order_is_what_it_was(comparisons):
    frame = pd.DataFrame({"dataset": list("aaaaabbbb")})
    order = [5, 7, 1, 3, 4, 2, 8, 6, 5, 6, 4, 2, 0, 1, 8, 7]
    assert one_set_batches(frame, 2, seed=3, epochs=2, comparisons=comparisons) == order


@st.composite
def graphs(draw):
    """Return a frame of a set with comparisons and one without, rows mixed, and the pairs."""
    n = draw(st.integers(4, 14))
    names = [f"p{i}" for i in range(n)]
    others = st.integers(1, n - 1)
    pairs = [(names[i], names[(i + draw(others)) % n]) for i in range(n)]  # all are mentioned
    frame = pd.concat([rows(names), rows("abcde", "rated")]).sample(frac=1, random_state=n)
    return frame.reset_index(drop=True), compared(*pairs)


@settings(max_examples=60)
@given(graphs(), st.integers(2, 4), st.integers(0, 99))
def test_batches_grow_along_compared_pairs_with_no_row_twice_an_epoch(drawn, size, seed):
    """A picture joins a batch without a partner in it only if the rows left over have no partner there."""
    frame, pairs = drawn
    order = one_set_batches(frame, size, seed, 2, {"mine": pairs})
    assert order == one_set_batches(frame, size, seed, 2, {"mine": pairs})
    epoch = sum(n // size * size for n in frame["dataset"].value_counts())
    assert len(order) == 2 * epoch and all(type(row) is int for row in order)
    table = PairTable(pairs, "mine")
    for part in (order[:epoch], order[epoch:]):
        assert len(set(part)) == epoch
        left = set(frame.index[frame["dataset"] == "mine"]) - set(part)
        for chunk in chunks(part, size):
            assert frame["dataset"].iloc[chunk].nunique() == 1
            if frame["dataset"].iloc[chunk[0]] == "mine":
                known = ~np.isnan(table.preference(table.codes(frame["image"].iloc[[*chunk, *left]])))
                for n in range(1, size):
                    assert known[n, :n].any() or not known[size:, :n].any()


def test_two_islands_are_never_mixed_while_they_last():
    """Pictures of a and b were compared within their letter alone; each fills whole batches."""
    a, b = [f"a{i}" for i in range(8)], [f"b{i}" for i in range(8)]
    ring = [(side[i], side[(i + 1) % 8]) for side in (a, b) for i in range(8)]
    frame = rows([*a, *b]).sample(frac=1, random_state=0).reset_index(drop=True)
    letters = frame["image"].str[0]
    whole = [
        letters.iloc[chunk].nunique() == 1
        for seed in range(10)
        for chunk in chunks(one_set_batches(frame, 4, seed, comparisons={"mine": compared(*ring)}), 4)
    ]
    at_random = [
        letters.iloc[chunk].nunique() == 1
        for seed in range(10)
        for chunk in chunks(one_set_batches(frame, 4, seed), 4)
    ]
    assert np.mean(whole) > np.mean(at_random) + 0.3


def test_a_batch_starts_afresh_when_nothing_more_was_compared():
    """Three couples in batches of four: two couples each time, never a picture without its partner."""
    frame = rows("aAbBcC")
    pairs = compared(("a", "A"), ("b", "B"), ("c", "C"))
    for seed in range(20):
        [batch] = chunks(one_set_batches(frame, 4, seed, comparisons={"mine": pairs}), 4)
        names = sorted(frame["image"].iloc[batch], key=str.lower)
        assert names[0].lower() == names[1].lower() and names[2].lower() == names[3].lower()


def test_all_batches_of_a_dense_set_are_drawn_at_random():
    names = [f"p{i}" for i in range(12)]
    pairs = compared(*((a, b) for i, a in enumerate(names) for b in names[:i]))
    orders = [one_set_batches(rows(names), 4, seed, comparisons={"mine": pairs}) for seed in range(300)]
    where = np.array([np.argsort(order) // 4 for order in orders])  # (300, 12): the batch of each row
    together = [(where[:, 0] == where[:, row]).mean() for row in range(1, 12)]
    assert np.abs(np.array(together) - 3 / 11).max() < 0.1


def test_a_row_is_found_by_its_name_and_refused_if_no_comparison_mentions_it():
    frame = rows(["/one.jpg", "/two.jpg", "/three.jpg"]).assign(name=["one", "two", "three"])
    pairs = compared(("one", "two"), ("three", "one"), ("test", "two"))
    assert sorted(one_set_batches(frame, 3, 0, comparisons={"mine": pairs})) == [0, 1, 2]
    with pytest.raises(
        ValueError, match=r"row 2 .*: 'three' is in no comparison of 'mine'; correct the name"
    ):
        one_set_batches(frame, 3, 0, comparisons={"mine": pairs.drop(index=1)})
