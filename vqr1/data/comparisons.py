"""What people said of pairs of pictures: the file beside a manifest, and the pairs of one set by name.

The comparisons of ``ratings.csv`` are in ``ratings-comparisons.csv`` beside it: a CSV (UTF-8, commas, header)
with the columns first, second and preference (the share of people who prefer the first, 0..1, a tie counted
half) and, if known, votes (how many people compared the two). A picture goes by its name: the manifest's
column ``name``, or its ``image`` where that is missing or empty.
"""

import os
from collections.abc import Container, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from vqr1.data.tables import lacks, meant, read_table, require

PAIR_COLUMNS = ("first", "second", "preference")


def comparisons_path(manifest: str | Path) -> Path:
    """Return where a manifest's comparisons are.

    >>> comparisons_path("holiday/ratings.csv").as_posix()
    'holiday/ratings-comparisons.csv'
    """
    return Path(manifest).with_name(f"{Path(manifest).stem}-comparisons.csv")


def names_of(frame: pd.DataFrame) -> pd.Series:
    """Return the names by which comparisons call the pictures of manifest rows."""
    return frame["name"] if "name" in frame else frame["image"]


def read_pairs(path: Path, known: Container[str]) -> pd.DataFrame:
    """Return a file's comparisons: first, second, preference and, if there, votes.

    path: of the CSV.
    known: the names of the manifest's pictures; ``./a.png`` is ``a.png``.

    Raises ValueError naming file, line, value and remedy for the first mistake.
    """
    table = read_table(path)
    for name in (*PAIR_COLUMNS, "votes"):
        if name not in table and (name != "votes" or meant(name, table.columns)):
            raise ValueError(f"{path}, line 1: {lacks(name, table.columns)}")
    if table.empty:
        raise ValueError(f"{path}: no comparisons after the header; add at least one")
    table = table.assign(where=[f"{path}, line {line}" for line in table.index])
    for side in ("first", "second"):
        short = table[side].map(os.path.normpath)
        table[side] = table[side].where(table[side].isin(known), short)
        wanted = "is no picture of the manifest; correct the name, or give the picture a row"
        require(table[side].isin(known), table, side, wanted)
    return _checked(table.reset_index(drop=True))


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """Return comparisons as numbers; ``where`` says in errors what each row is."""
    for side in ("first", "second"):
        require(table[side].notna(), table, side, "names no picture; name it, or take the row out")
    require(table["first"] != table["second"], table, "second", "is compared with itself; take the row out")
    preference = pd.to_numeric(table["preference"], errors="coerce")
    wanted = "is not a number from 0 to 1; give the share of people who prefer the first"
    require(preference.between(0, 1), table, "preference", wanted)
    pairs = table[["first", "second"]].assign(preference=preference.astype(float))
    if "votes" not in table:
        return pairs
    votes = pd.to_numeric(table["votes"], errors="coerce")
    wanted = "is not a number above 0; say how many people compared the two, or leave out the column"
    require(np.isfinite(votes) & (votes > 0), table, "votes", wanted)
    return pairs.assign(votes=votes.astype(float))


class PairTable:
    """The comparisons of one set, to be looked up by name.

    A pair that is there several times, or in both directions, has the mean preference, weighted by votes.

    Args:
        pairs: columns first, second, preference and, if known, votes, as from `load_comparisons`.
        dataset: the set's name, for errors.

    Raises:
        ValueError: for a missing column, a preference outside 0..1, a picture compared with itself, and votes
            that are not above 0.

    >>> pairs = pd.DataFrame({"first": list("aab"), "second": list("bca"), "preference": [1, 0.5, 0.5]})
    >>> table = PairTable(pairs, "mine")
    >>> table.preference(table.codes(["a", "b", "c"]))
    array([[ nan, 0.75, 0.5 ],
           [0.25,  nan,  nan],
           [0.5 ,  nan,  nan]])
    """

    def __init__(self, pairs: pd.DataFrame, dataset: str):
        self.dataset = dataset
        for name in PAIR_COLUMNS:
            if name not in pairs:
                raise ValueError(f"the comparisons of {dataset!r}: {lacks(name, map(str, pairs.columns))}")
        if pairs.empty:
            raise ValueError(f"the comparisons of {dataset!r} are empty; give at least one")
        where = [f"the comparisons of {dataset!r}, row {n} (counted from 0)" for n in range(len(pairs))]
        pairs = _checked(pairs.reset_index(drop=True).astype(object).assign(where=where))
        codes, names = pd.factorize(pd.concat([pairs["first"], pairs["second"]]))
        self.names, n = pd.Index(names), len(names)
        first, second = codes.reshape(2, -1)
        share, votes = pairs["preference"].to_numpy(), pairs.get("votes", pd.Series(1.0, pairs.index))
        self.keys, place = np.unique(np.r_[first * n + second, second * n + first], return_inverse=True)
        total = np.bincount(place, np.r_[share, 1 - share] * np.r_[votes, votes])
        # Of those who prefer key // n to key % n; rounded, as a sum's last bit must not decide a tie.
        self.shares = (total / np.bincount(place, np.r_[votes, votes])).round(12)

    def codes(self, names: Sequence[str], rows: Sequence[int] | None = None) -> np.ndarray:
        """Return the pictures' numbers; ValueError, naming the row, for one that no comparison mentions."""
        names = list(names)
        found = self.names.get_indexer(names)
        if (found < 0).any():
            place = int(np.argmax(found < 0))
            row = place if rows is None else rows[place]
            raise ValueError(
                f"row {row} (counted from 0): {names[place]!r} is in no comparison of {self.dataset!r}; "
                "correct the name, add a comparison, or leave the row out"
            )
        return found

    def preference(self, codes: np.ndarray) -> np.ndarray:
        """Return the share who prefer picture i to j, (B, B) for B codes; NaN where nobody compared them."""
        wanted = codes[:, None] * len(self.names) + codes  # (B, B)
        place = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == wanted, self.shares[place], np.nan)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Each name's code, for look-ups by the thousand."""
        return {name: code for code, name in enumerate(self.names)}

    @cached_property
    def decided(self) -> tuple[np.ndarray, np.ndarray]:
        """The codes (better, worse), each (P,), of the pairs on which most people agree."""
        return np.divmod(self.keys[self.shares > 0.5], len(self.names))

    def right(self, score: Sequence[float], names: Sequence[str]) -> float:
        """Return the share of decided pairs that scores order as most people do: a `vqr1.metrics.Statistic`.

        score: (N,); equal scores count half, and a pair with one that is NaN is wrong.
        names: (N,) the pictures'. One that is there several times, as in a resample of pictures, always has
            the same score, and its pairs count as often; one that nobody compared is left out.

        NaN where no decided pair is there.

        >>> pairs = pd.DataFrame({"first": list("aab"), "second": list("bcc"), "preference": [1, 0, 0.5]})
        >>> table = PairTable(pairs, "mine")
        >>> table.right([3, 2, 1], list("abc")), round(table.right([3, 2, 2, 1], list("abbc")), 3)
        (0.5, 0.667)
        """
        codes = np.array([self.numbers.get(name, -1) for name in names], dtype=int)
        compared = codes >= 0
        codes, score = codes[compared], np.asarray(score, dtype=float)[compared]
        times = np.bincount(codes, minlength=len(self.names))  # (names,)
        of = np.full(len(self.names), np.nan)
        of[codes] = score
        better, worse = self.decided
        weights = times[better] * times[worse]
        if not weights.any():
            return float("nan")
        better, worse = of[better], of[worse]
        right = (better > worse) + 0.5 * (better == worse)
        return float(weights @ right / weights.sum())

    def alone(self, names: Sequence[str]) -> np.ndarray:
        """Return, (N,) bool, which of these pictures were compared with none of the others.

        Raises ValueError, as `codes` does, for a picture that no comparison mentions.

        >>> pairs = pd.DataFrame({"first": list("ac"), "second": list("bd"), "preference": [1, 0]})
        >>> PairTable(pairs, "mine").alone(list("abc"))
        array([False, False,  True])
        """
        codes = self.codes(names)
        here = np.isin(np.arange(len(self.names)), codes)
        one, other = np.divmod(self.keys, len(self.names))
        return ~np.isin(codes, one[here[one] & here[other]])

    def compared_with(self, code: int) -> np.ndarray:
        """Return the codes of the pictures that people compared with one."""
        n = len(self.names)
        start, stop = np.searchsorted(self.keys, [code * n, (code + 1) * n])
        return self.keys[start:stop] % n
