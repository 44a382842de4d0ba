"""Simulated observers match the published means, are seeded, and are never called people."""

import numpy as np
import pytest

from vqr1.data.observers import (
    expected_rating,
    human_cells,
    internal_value,
    latent_quality,
    oracle_scores,
    pairwise_votes,
    rate,
    votes,
)
from vqr1.metrics import srcc
from vqr1.thurstone import thurstone_scale


@pytest.fixture(scope="module")
def ratings():
    return rate([f"photos/{i}.jpg" for i in range(81)])


def test_the_table_has_all_125_pairs_of_81_pictures():
    cells = human_cells()
    assert len(cells) == 125 and (cells.n_images == 81).all()
    assert cells.groupby("type")["level"].apply(list).map(lambda levels: levels == [1, 2, 3, 4, 5]).all()


def test_oracles_reach_what_they_reach_on_real_ratings(ratings):
    both, level = (srcc(score, ratings["mos"]) for score in oracle_scores(ratings))
    print(f"oracle SRCC: type and level {both:.3f} (people 0.942), level {level:.3f} (people 0.676)")
    assert both == pytest.approx(0.942, abs=0.02)
    assert level == pytest.approx(0.676, abs=0.04)


def test_cell_means_follow_the_published_means(ratings):
    bias = ratings.groupby(["distortion", "level"], sort=False).mos.mean().to_numpy() - human_cells().mos_mean
    assert abs(bias.mean()) < 0.05
    assert np.abs(bias).max() < 0.2  # four standard errors of 81 photographs are 0.15


def test_without_placement_the_ends_would_be_pulled_in():
    means, spread = human_cells()[["mos_mean", "observer_std_mean"]].to_numpy().T
    assert np.abs(expected_rating(means, spread) - means).max() > 0.1
    np.testing.assert_allclose(expected_rating(internal_value(means, spread), spread), means, atol=1e-6)


def test_expected_rating_is_the_mean_of_many_votes():
    latent = np.array([1.2, 2.5, 4.8])
    many = votes(latent, 0.8, n_observers=200_000, seed=3)
    np.testing.assert_allclose(many.mean(1), latent, atol=0.01)
    assert set(np.unique(many)) == {1, 2, 3, 4, 5}


def test_mos_is_the_mean_of_30_whole_votes(ratings):
    np.testing.assert_allclose(ratings.mos * 30, np.rint(ratings.mos * 30), atol=2e-3)
    assert ratings.mos.between(1, 5).all() and ratings["std"].between(0, 2.1).all()


def test_a_photograph_is_rated_alike_in_any_company():
    alone, together = rate(["photos/b.jpg"]), rate(["photos/a.jpg", "photos/b.jpg"])
    assert alone.mos.tolist() == together[together.image == "photos/b.jpg"].mos.tolist()
    assert not np.array_equal(latent_quality("photos/a.jpg"), latent_quality("photos/b.jpg"))
    assert not np.array_equal(latent_quality("photos/a.jpg", seed=1), latent_quality("photos/a.jpg", seed=2))


def test_pairwise_votes_are_whole_and_complete():
    wins = pairwise_votes([4.5, 3.0, 2.9, 1.0], n_observers=12, seed=1)
    assert wins.dtype.kind == "i" and (np.diag(wins) == 0).all()
    np.testing.assert_array_equal(wins + wins.T, 12 * (1 - np.eye(4, dtype=int)))


def test_thurstone_scaling_of_pairwise_votes_recovers_the_latents():
    latents = np.array([1.5, 2.2, 3.0, 3.4, 4.1])
    quality, error = thurstone_scale(pairwise_votes(latents, n_observers=2000, seed=0, observer_std=0.86))
    np.testing.assert_allclose(quality * 0.86, latents - latents.mean(), atol=0.1)


def test_oracle_refuses_what_is_not_one_of_the_pairs(ratings):
    row = ratings.head(1).assign(distortion="gaussian_blur+jpeg")
    with pytest.raises(ValueError, match="gaussian_blur.jpeg.*125 pairs"):
        oracle_scores(row)
