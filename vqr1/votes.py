"""Votes between pictures, and the scale that follows from them: blind pairs, Thurstone's scale, a manifest.

ballot = Ballot(len(frame))
while ballot.pair:
    ballot.vote(ask(*ballot.pair))  # "first", "second" or "same"
add_votes(frame, ballot, "my-votes.csv")  # to those that are there
"""

from pathlib import Path

import numpy as np
import pandas as pd

from vqr1.data.comparisons import comparisons_path, names_of
from vqr1.data.manifests import MANIFEST_COLUMNS, load_comparisons, read_manifest
from vqr1.metrics import srcc
from vqr1.thurstone import thurstone_scale

CHOICES = {"first": (1.0, 0.0), "second": (0.0, 1.0), "same": (0.5, 0.5)}
"""A vote -> what the first and the second picture of the pair get."""


def blind_pairs(n: int, seed: int = 0) -> list[tuple[int, int]]:
    """Return all n (n - 1) / 2 pairs in voting order, left and right at random.

    Round d shows each picture beside its d-th neighbour in a shuffled circle. After n pairs every picture was
    seen twice and all are connected, so voting may stop then or later. Raises ValueError for n < 2.

    >>> len(blind_pairs(6)), sorted(i for pair in blind_pairs(6)[:6] for i in pair)
    (15, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    """
    if n < 2:
        raise ValueError(f"{n} picture(s): a comparison needs at least 2")
    rng, pairs = np.random.default_rng(seed), []
    circle = rng.permutation(n)
    for d in range(1, n // 2 + 1):
        starts = rng.permutation(n // 2 if 2 * d == n else n)
        pairs += [(int(circle[i]), int(circle[(i + d) % n])) for i in starts]
    return [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs]


class Ballot:
    """Blind pairs of n pictures, and votes, of which the last can be taken back.

    n: how many pictures.
    seed: of the pairs' order.
    rounds: how many times n pairs are asked for; None = all pairs.
    before: votes of earlier ballots, (n, n) like `wins`; pairs that have fewest of them come first.
    """

    def __init__(self, n: int, seed: int = 0, rounds: int | None = None, before=None):
        pairs = blind_pairs(n, seed)
        if before is not None:
            pairs.sort(key=lambda pair: before[pair] + before[pair[::-1]])
        self.pairs = pairs[: rounds * n] if rounds else pairs
        self.choices: list[str] = []
        self.saved = np.zeros((n, n))
        """The part of `wins` that `add_votes` has put in a file."""

    @property
    def cast(self) -> int:
        return len(self.choices)

    @property
    def wins(self) -> np.ndarray:
        """How often picture i looked better than picture j, (n, n)."""
        wins = np.zeros_like(self.saved)
        for (i, j), choice in zip(self.pairs, self.choices):
            wins[i, j] += CHOICES[choice][0]
            wins[j, i] += CHOICES[choice][1]
        return wins

    @property
    def pair(self) -> tuple[int, int] | None:
        """The two pictures to show now; None when all pairs have had their vote."""
        return self.pairs[self.cast] if self.cast < len(self.pairs) else None

    def vote(self, choice: str) -> None:
        """Count a vote on the pair (first, second, same: half a vote each) and go on to the next one.

        >>> ballot = Ballot(2)
        >>> ballot.vote("same")
        >>> ballot.wins.tolist(), ballot.pair
        ([[0.0, 0.5], [0.5, 0.0]], None)
        """
        if choice not in CHOICES:
            raise ValueError(f"vote {choice!r} is unknown; use one of {', '.join(CHOICES)}")
        if self.pair is None:
            raise ValueError(f"all {len(self.pairs)} pairs have had their vote")
        self.choices.append(choice)

    def undo(self) -> None:
        """Take the last vote back, so that its pair is asked again."""
        if not self.choices:
            raise ValueError("there is no vote to take back")
        self.choices.pop()


def scale_votes(wins) -> pd.DataFrame:
    """Return Thurstone's scale of the votes: columns quality, standard_error and votes, one row per picture.

    wins: (n, n), how often the one looked better than the other.

    Raises ValueError, saying what is missing, for too few votes or pictures that no chain of votes connects.
    """
    wins = np.asarray(wins, dtype=float)
    needed = len(wins) - 1
    if wins.sum() < needed:
        votes = "1 vote" if wins.sum() == 1 else f"{wins.sum():.0f} votes"
        raise ValueError(
            f"{votes} on {len(wins)} pictures: a common scale needs at least {needed}; vote on more pairs"
        )
    try:
        quality, error = thurstone_scale(wins)
    except ValueError as problem:
        raise ValueError(f"{problem}; vote on more pairs") from problem
    return pd.DataFrame({"quality": quality, "standard_error": error, "votes": wins.sum(0) + wins.sum(1)})


def vote_agreement(wins, scores) -> dict[str, float]:
    """Return how well scores agree with votes: SRCC with their scale, and the share of votes ordered alike.

    wins: (n, n), how often the one looked better than the other.
    scores: (n,), higher is better.

    Equal scores count half, a NaN counts as wrong. Raises ValueError as `scale_votes` does.

    >>> vote_agreement([[0, 3, 4], [1, 0, 2], [0, 2, 0]], [4.5, 3.0, 2.0])
    {'srcc': 1.0, 'votes': 0.75}
    """
    wins, scores = np.asarray(wins, dtype=float), np.asarray(scores, dtype=float)
    alike = (scores[:, None] > scores) + 0.5 * (scores[:, None] == scores)  # (n, n)
    return {
        "srcc": srcc(scores, scale_votes(wins)["quality"]),
        "votes": float((wins * alike).sum() / wins.sum()),
    }


def save_votes(
    frame: pd.DataFrame, wins, path: str | Path, name: str = "my-votes", scaled: bool = True
) -> pd.DataFrame:
    """Write a manifest that training reads, and the votes as comparisons beside it; return its rows.

    frame: the pictures' rows, in the order of ``wins``.
    wins: (n, n), how often the one looked better than the other.
    path: of the manifest; the votes are in `comparisons_path` of it.
    name: the data set's.
    scaled: whether ``mos`` is the scaled quality; else it is empty, and training needs the comparisons.

    The unit is Thurstone's; any will do, as rewards compare within a set. The columns standard_error and
    votes are for people; std stays empty. Rows that share a photograph get a column name, such as
    ``3: a.jpg``. Raises ValueError for no votes at all and, if ``scaled``, as `scale_votes` does.
    """
    pairs = vote_pairs(wins)
    rows = frame.reset_index(drop=True).assign(dataset=name, mos="", std="")[list(MANIFEST_COLUMNS)]
    if rows["image"].duplicated().any():
        rows["name"] = [f"{n}: {image}" for n, image in enumerate(rows["image"])]
    if scaled:
        scale = scale_votes(wins).round(4)
        rows = rows.assign(mos=scale["quality"]).join(scale[["standard_error", "votes"]])
    named = pairs.assign(**{side: pairs[side].map(names_of(rows)) for side in ("first", "second")})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    for table, file in ((rows, path), (named, comparisons_path(path))):
        table.to_csv(file, index=False, lineterminator="\n", encoding="utf-8")
    return read_manifest(path, frame.attrs.get("root"))


def load_votes(frame: pd.DataFrame, path: str | Path) -> np.ndarray:
    """Return the votes that `save_votes` has written on these pictures: wins (n, n), 0 where no file is.

    frame: the pictures' rows; the file may lack some of them.
    path: of the manifest.

    Raises ValueError for a picture in the file that is none of these, and as `load_comparisons` does.
    """
    wins = np.zeros((len(frame), len(frame)))
    if not (Path(path).exists() or comparisons_path(path).exists()):
        return wins
    root = frame.attrs.get("root")
    rows, pairs = read_manifest(path, root), load_comparisons(path, root)
    places = {picture: place for place, picture in enumerate(_pictures(frame))}
    for picture in _pictures(rows):
        if picture not in places:
            raise ValueError(
                f"{path} has votes on {picture[0]!r}, which is not among these {len(frame)} pictures; "
                "move the file away, or give another one for these votes"
            )
    place = dict(zip(names_of(rows), map(places.get, _pictures(rows))))
    first, second = (pairs[side].map(place) for side in ("first", "second"))
    votes = pairs.get("votes", 1.0)  # one each, where the file does not say how many
    np.add.at(wins, (first, second), votes * pairs["preference"])
    np.add.at(wins, (second, first), votes * (1 - pairs["preference"]))
    return wins.round(6)


def _pictures(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    """Return what tells the rows' pictures apart."""
    parts = frame[["image", "distortion", "level", "seed", "crop"]].astype(str)
    return list(parts.itertuples(index=False, name=None))


def add_votes(frame: pd.DataFrame, ballot: Ballot, path: str | Path) -> np.ndarray:
    """Add a ballot's votes, each of them once, to those in a file; return all of them, (n, n).

    Votes that were taken back since are taken from the file, too, which goes with its last one. The manifest
    has a scale as soon as the votes have.

    frame, path: as for `save_votes`. Raises ValueError as `load_votes` does; the file is then as it was.
    """
    wins = ballot.wins
    total = np.maximum(load_votes(frame, path) + wins - ballot.saved, 0)
    if total.any():
        save_votes(frame, total, path, scaled=_have_scale(total))
    else:
        for file in (Path(path), comparisons_path(path)):
            file.unlink(missing_ok=True)
    ballot.saved = wins
    return total


def _have_scale(wins: np.ndarray) -> bool:
    try:
        scale_votes(wins)
    except ValueError:
        return False
    return True


def vote_pairs(wins) -> pd.DataFrame:
    """Return votes as comparisons: the places first and second, preference (share for the first), and votes.

    wins: (n, n), how often the one looked better than the other.

    Raises ValueError if there are no votes.

    >>> vote_pairs([[0, 3, 0], [1, 0, 0], [0, 0.5, 0]]).to_numpy().tolist()
    [[0.0, 1.0, 0.75, 4.0], [1.0, 2.0, 0.0, 0.5]]
    """
    wins = np.asarray(wins, dtype=float)
    votes = np.triu(wins + wins.T, 1)
    first, second = np.nonzero(votes)
    if not len(first):
        raise ValueError("no pair has a vote; vote on at least one")
    votes = votes[first, second]
    return pd.DataFrame(
        {"first": first, "second": second, "preference": wins[first, second] / votes, "votes": votes}
    )
