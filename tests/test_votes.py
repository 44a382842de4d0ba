"""Check votes on blind pairs: order, count, scale, and the manifest that training takes."""

import numpy as np
import pandas as pd
import pytest

from vqr1.config import Settings, load_config
from vqr1.data.comparisons import names_of
from vqr1.data.manifests import folder_rows, load_comparisons, load_ratings, render_rows
from vqr1.data.observers import pairwise_votes
from vqr1.places import EMBEDDED
from vqr1.training import train
from vqr1.votes import (
    Ballot,
    add_votes,
    blind_pairs,
    load_votes,
    save_votes,
    scale_votes,
    vote_agreement,
)


@pytest.fixture
def rated() -> pd.DataFrame:
    """Return six training rows, one type each."""
    rows = load_ratings("sim-kadid").query("split == 'train'").groupby("distortion").sample(1, random_state=0)
    return rows.sample(6, random_state=0)


@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_blind_pairs_are_all_pairs_once_and_connected_after_the_first_round(n):
    pairs = blind_pairs(n, seed=1)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == n * (n - 1) // 2
    reached = {0}
    for _ in range(n):
        reached |= {i for pair in pairs[:n] if set(pair) & reached for i in pair}
    assert reached == set(range(n))


def test_blind_pairs_tell_nothing_by_their_side():
    left = [i < j for seed in range(40) for i, j in blind_pairs(6, seed)]
    assert 0.4 < np.mean(left) < 0.6
    assert blind_pairs(6, 1) == blind_pairs(6, 1) != blind_pairs(6, 2)
    with pytest.raises(ValueError, match="at least 2"):
        blind_pairs(1)


def test_a_ballot_counts_votes_until_all_pairs_had_one():
    ballot = Ballot(3)
    (a, b), (c, d), (e, f) = ballot.pairs
    for choice in ("first", "second", "same"):
        ballot.vote(choice)
    expected = np.zeros((3, 3))
    expected[a, b], expected[d, c], expected[e, f], expected[f, e] = 1, 1, 0.5, 0.5
    assert (ballot.wins == expected).all() and ballot.pair is None
    with pytest.raises(ValueError, match="all 3 pairs"):
        ballot.vote("first")
    with pytest.raises(ValueError, match="'left' is unknown"):
        Ballot(3).vote("left")


def test_a_ballot_takes_votes_back():
    ballot = Ballot(3)
    with pytest.raises(ValueError, match="no vote to take back"):
        ballot.undo()
    ballot.vote("first")
    first, pair = ballot.wins, ballot.pair
    ballot.vote("same")
    ballot.undo()
    assert (ballot.wins == first).all() and ballot.pair == pair and ballot.cast == 1


def test_a_ballot_of_some_rounds_begins_where_votes_are_few():
    full = Ballot(6)
    for _ in range(8):
        full.vote("first")
    rest = Ballot(6, rounds=2, before=full.wins)
    assert rest.pairs[:7] == full.pairs[8:] and rest.pairs[7:] == full.pairs[:5]


def test_scale_votes_finds_the_order_and_narrows_with_votes():
    few, many = (scale_votes(pairwise_votes([4.0, 3.0, 2.0, 1.0], n)) for n in (4, 64))
    assert few["quality"].is_monotonic_decreasing and many["quality"].is_monotonic_decreasing
    assert (many["standard_error"] < few["standard_error"] / 3).all() and few["votes"].tolist() == [12] * 4


def test_too_few_votes_and_disconnected_pictures_are_refused():
    ballot = Ballot(4)
    ballot.vote("first")
    with pytest.raises(ValueError, match="1 vote on 4 pictures: .* at least 3; vote on more pairs"):
        scale_votes(ballot.wins)
    apart = np.zeros((4, 4))
    apart[0, 1] = apart[2, 3] = 5
    with pytest.raises(ValueError, match=r"items \[0, 1\] and \[2, 3\].*; vote on more pairs"):
        scale_votes(apart)


def test_vote_agreement_counts_ties_half_and_nan_wrong():
    wins = [[0, 3, 3], [1, 0, 3], [1, 1, 0]]
    assert vote_agreement(wins, [3, 2, 1])["votes"] == 0.75
    assert vote_agreement(wins, [1, 2, 3]) == {"srcc": -1.0, "votes": 0.25}
    assert vote_agreement(wins, [1, 1, 1])["votes"] == 0.5
    assert vote_agreement(wins, [3, 2, np.nan])["votes"] == 3 / 12


def test_votes_become_a_manifest_of_the_same_pictures(rated, tmp_path):
    wins = pairwise_votes(rated["mos"], 5, seed=0)
    saved = save_votes(rated, wins, tmp_path / "new" / "votes.csv", "simulated-votes")
    assert np.allclose(saved["mos"], scale_votes(wins)["quality"], atol=1e-4)
    assert saved["dataset"].unique().tolist() == ["simulated-votes"] and saved["std"].isna().all()
    again = load_ratings(tmp_path / "new" / "votes.csv", EMBEDDED)
    assert [i.tobytes() for i in render_rows(again)] == [i.tobytes() for i in render_rows(rated)]


def test_votes_on_a_folder_become_a_manifest(photo, tmp_path):
    for name in ("bad.png", "good.png"):
        photo.save(tmp_path / name)
    frame = folder_rows(tmp_path)
    saved = save_votes(frame, [[0, 3], [1, 0]], tmp_path / "votes.csv")
    assert (
        saved["image"].tolist() == ["bad.png", "good.png"] and saved["mos"].iloc[0] > 0 > saved["mos"].iloc[1]
    )
    assert len(render_rows(saved)) == 2


def test_votes_are_saved_as_comparisons_of_the_pairs_that_were_shown(rated, tmp_path):
    """Six pictures in three couples, which no chain of votes connects, so they have no common scale."""
    wins = np.zeros((6, 6))
    wins[0, 1], wins[1, 0], wins[2, 3] = 3, 1, 2
    wins[4, 5] = wins[5, 4] = 0.5
    saved = save_votes(rated, wins, tmp_path / "votes.csv", scaled=False)
    assert saved["mos"].isna().all() and len(saved) == 6
    name = names_of(saved)
    pairs = load_comparisons(tmp_path / "votes.csv", EMBEDDED)
    assert pairs[["first", "second"]].to_numpy().tolist() == [
        [name[0], name[1]],
        [name[2], name[3]],
        [name[4], name[5]],
    ]
    assert pairs["preference"].tolist() == [0.75, 1.0, 0.5] and pairs["votes"].tolist() == [4, 2, 1]
    with pytest.raises(ValueError, match="vote on more pairs"):
        save_votes(rated, wins, tmp_path / "votes.csv")
    with pytest.raises(ValueError, match="no pair has a vote"):
        save_votes(rated, np.zeros((6, 6)), tmp_path / "votes.csv", scaled=False)


def test_votes_are_added_once_and_taken_back(rated, tmp_path):
    path, earlier, ballot = tmp_path / "votes.csv", Ballot(6, 1), Ballot(6)
    for one in (earlier, ballot):
        for choice in ("first", "same", "second"):
            one.vote(choice)
        add_votes(rated, one, path)
    both = earlier.wins + ballot.wins
    assert (add_votes(rated, ballot, path) == both).all() and (load_votes(rated, path) == both).all()
    ballot.undo()
    assert (add_votes(rated, ballot, path) == earlier.wins + ballot.wins).all()
    bigger = pd.concat([rated.iloc[::-1], load_ratings("sim-kadid").head(1)])
    more = load_votes(bigger, path)  # the same pictures at other places, and one more
    assert (more[5::-1, 5::-1] == earlier.wins + ballot.wins).all() and not more[6].any()


def test_votes_on_other_pictures_are_refused(rated, tmp_path):
    ballot, path = Ballot(6), tmp_path / "votes.csv"
    assert not load_votes(rated, path).any()
    ballot.vote("first")
    add_votes(rated, ballot, path)
    assert load_ratings(path, EMBEDDED)["mos"].isna().all()  # one vote makes no scale
    with pytest.raises(ValueError, match=r"votes.csv has votes on 'photos/.*', which is not among these 3"):
        load_votes(rated.iloc[:3], path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="votes.csv"):
        add_votes(rated, Ballot(6), path)


def test_votes_on_one_photograph_tell_its_distortions_apart(tmp_path):
    frame = load_ratings("sim-kadid").query("image == image[0]").head(3)
    saved = save_votes(frame, [[0, 2, 2], [0, 0, 2], [1, 0, 0]], tmp_path / "votes.csv")
    image = frame["image"].iloc[0]
    assert saved["name"].tolist() == [f"0: {image}", f"1: {image}", f"2: {image}"]
    pairs = load_comparisons(tmp_path / "votes.csv", EMBEDDED)
    assert pairs["second"].tolist() == [f"{n}: {image}" for n in (1, 2, 2)]


def test_training_takes_votes_as_they_are(rated, tmp_path):
    """Blind pairs -> votes -> comparisons -> two training steps, with no scale in between."""
    ballot = Ballot(len(rated))
    while len(ballot.pairs) - ballot.cast > 3:
        ballot.vote("first" if ballot.pair[0] < ballot.pair[1] else "same")
    path = tmp_path / "votes.csv"
    frame = save_votes(rated, ballot.wins, path, "simulated-votes", scaled=False)
    comparisons = {"simulated-votes": load_comparisons(path, EMBEDDED)}
    train(short(), tmp_path / "run", frame=frame, comparisons=comparisons)
    log = pd.read_csv(tmp_path / "run" / "log.csv", comment="#")
    assert log["ranking"].dropna().between(0.01, 1.01).sum() == 2
    with pytest.raises(ValueError, match="row 0 .* has no mos; learn its set from comparisons"):
        train(short(), tmp_path / "again", frame=frame)
    with pytest.raises(ValueError, match="comparisons teach the reward ranking alone, not absolute"):
        train(short(reward="absolute"), tmp_path / "again", frame=frame, comparisons=comparisons)


def short(**changes) -> Settings:
    small = {"max_steps": 2, "per_device_train_batch_size": 6, "num_generations": 2, "logging_steps": 1}
    return load_config("cpu").changed(grpo=small, validation={"rows": 4, "every": 2}, **changes)


def test_training_takes_votes_from_blind_pairs(rated, tmp_path):
    """Blind pairs -> votes -> scale -> manifest -> two training steps."""
    observer, ballot = pairwise_votes(rated["mos"], 1, seed=0), Ballot(len(rated))
    while ballot.pair:
        ballot.vote("first" if observer[ballot.pair] else "second")
    assert (ballot.wins == observer).all()
    frame = save_votes(rated, ballot.wins, tmp_path / "votes.csv", "simulated-votes")
    assert (train(short(), tmp_path / "run", frame=frame) / "adapter_config.json").is_file()
    log = pd.read_csv(tmp_path / "run" / "log.csv", comment="#")
    assert log["ranking"].dropna().between(0.01, 1.01).sum() == 2
