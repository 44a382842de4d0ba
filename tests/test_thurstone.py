"""Vectorised Thurstone mathematics equals plain loops written from the paper's equations."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqr1.config import load_config
from vqr1.rewards import reward_functions
from vqr1.thurstone import comparative_probability, fidelity, ranking_reward, thurstone_scale, true_preference

NAN = float("nan")
VARIANTS = [
    {},
    {"binary": True},
    {"average": True},
    {"variance": 1.0},
    {"variance": 0.0},
    {"binary": True, "average": True, "variance": 1.0},
    {"gamma": 0.1, "eps": 0.0},
]


def phi(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def loop_reward(
    scores,
    mos,
    dataset=None,
    *,
    preference=None,
    binary=False,
    average=False,
    variance=None,
    gamma=1e-6,
    eps=1e-6,
):
    """Compute the paper's section 3 with Python loops over i, j and k; vqr1 shares none of it."""
    parsed = [[s for s in group if not math.isnan(s)] for group in scores]
    mean = [sum(group) / len(group) if group else 0.0 for group in parsed]
    var = [
        sum((s - m) ** 2 for s in group) / (len(group) - 1) if len(group) > 1 else 0.0
        for group, m in zip(parsed, mean)
    ]
    if variance is not None:
        var = [variance] * len(scores)
    rewards = []
    for i, group in enumerate(scores):
        rewards.append([])
        for s in group:
            gains = []
            for j in range(len(scores)):
                if i == j or not parsed[j] or (dataset is not None and dataset[i] != dataset[j]):
                    continue
                if preference is not None and math.isnan(preference[i][j]):
                    continue
                if preference is not None:
                    p = preference[i][j]
                else:
                    p = 1.0 if mos[i] > mos[j] else 0.5 if mos[i] == mos[j] else 0.0
                root = math.sqrt(var[i] + var[j] + gamma)
                if average:
                    q = sum(phi((s - other) / root) for other in parsed[j]) / len(parsed[j])
                else:
                    q = phi((s - mean[j]) / root)
                if binary:
                    decided = 0.5 if abs(q - 0.5) <= 1e-6 else float(q > 0.5)
                    gains.append(1 - abs(p - decided))
                else:
                    gains.append(math.sqrt(p * q + eps) + math.sqrt((1 - p) * (1 - q) + eps))
            rewards[-1].append(0.0 if math.isnan(s) or not gains else sum(gains) / len(gains))
    return rewards


def batch(b, k, seed):
    """Return random scores with ties, NaN, zero-variance groups, and groups with one or no score."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(1, 5, (b, k)).round(1)  # one decimal: ties
    scores[rng.random((b, k)) < 0.15] = NAN
    for row, kind in enumerate(rng.integers(0, 6, b)):
        if kind == 0:
            scores[row] = scores[row, 0]  # zero variance, or nothing parseable
        if kind == 1:
            scores[row, 1:] = NAN
    mos = rng.integers(1, 8, b) / 2  # ties
    dataset = rng.choice(["kadid", "koniq", "spaq"], b).tolist()
    return scores, mos.tolist(), dataset


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("b", "k"), [(1, 2), (2, 2), (3, 5), (8, 6), (17, 3), (33, 16)])
def test_reward_equals_the_triple_loop(b, k, variant):
    scores, mos, dataset = batch(b, k, seed=b * 100 + k)
    for names in (None, dataset):
        reward = ranking_reward(torch.tensor(scores), mos, names, **variant)
        expected = torch.tensor(loop_reward(scores.tolist(), mos, names, **variant), dtype=torch.float64)
        torch.testing.assert_close(reward, expected, atol=1e-6, rtol=0)


def test_reward_equals_the_triple_loop_for_64_images_of_16_completions():
    scores, mos, dataset = batch(64, 16, seed=0)
    expected = torch.tensor(loop_reward(scores.tolist(), mos, dataset), dtype=torch.float64)
    torch.testing.assert_close(
        ranking_reward(torch.tensor(scores), mos, dataset), expected, atol=1e-6, rtol=0
    )


@st.composite
def batches(draw):
    b, k = draw(st.integers(1, 9)), draw(st.integers(2, 6))
    score = st.one_of(st.integers(10, 50).map(lambda n: n / 10), st.just(NAN))
    scores = draw(st.lists(st.lists(score, min_size=k, max_size=k), min_size=b, max_size=b))
    mos = draw(st.lists(st.integers(0, 6).map(float), min_size=b, max_size=b))
    dataset = draw(st.lists(st.sampled_from("ab"), min_size=b, max_size=b))
    return torch.tensor(scores, dtype=torch.float64), mos, dataset


def permuted(values, order):
    return [values[n] for n in order]


few = settings(max_examples=40, deadline=None)
variants = st.sampled_from(VARIANTS)


@few
@given(batches(), variants)
def test_reward_equals_the_triple_loop_on_drawn_batches(drawn, variant):
    scores, mos, dataset = drawn
    expected = torch.tensor(loop_reward(scores.tolist(), mos, dataset, **variant), dtype=torch.float64)
    torch.testing.assert_close(ranking_reward(scores, mos, dataset, **variant), expected, atol=1e-6, rtol=0)


@st.composite
def comparisons(draw):
    """Return a batch with the shares of 1 to 5 votes on some of its pairs in place of mos."""
    scores, _, dataset = draw(batches())
    preference = np.full((len(scores), len(scores)), NAN)
    for i, j in itertools.combinations(range(len(scores)), 2):
        votes = draw(st.integers(0, 5))
        if votes:
            preference[i, j] = draw(st.integers(0, 2 * votes)) / (2 * votes)  # ties are half a vote each
            preference[j, i] = 1 - preference[i, j]
    return scores, preference, dataset


@few
@given(comparisons(), variants)
def test_reward_from_comparisons_equals_the_triple_loop(drawn, variant):
    scores, preference, dataset = drawn
    for names in (None, dataset):
        reward = ranking_reward(scores, dataset=names, preference=preference, **variant)
        expected = loop_reward(scores.tolist(), None, names, preference=preference.tolist(), **variant)
        torch.testing.assert_close(reward, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@few
@given(batches(), variants)
def test_preferences_made_from_mos_give_the_reward_of_mos(drawn, variant):
    scores, mos, dataset = drawn
    reward = ranking_reward(scores, dataset=dataset, preference=true_preference(mos), **variant)
    assert torch.equal(reward, ranking_reward(scores, mos, dataset, **variant))


def test_a_pair_that_nobody_compared_takes_no_part():
    """Whatever the third image's scores are, the first two are rewarded as if alone."""
    preference = np.array([[NAN, 0.75, NAN], [0.25, NAN, NAN], [NAN, NAN, NAN]])
    for third in (1.0, 5.0):
        scores = torch.tensor([[4.0, 3.0], [3.0, 2.5], [third, third]], dtype=torch.float64)
        reward = ranking_reward(scores, preference=preference)
        assert torch.equal(reward[:2], ranking_reward(scores[:2], preference=preference[:2, :2]))
        assert not reward[2].any() and reward[:2].min() > 0


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        (
            [[0.5, 0.7], [0.4, 0.5]],
            r"preference\[0, 1\] is 0.7 and preference\[1, 0\] is 0.4; .* add up to 1",
        ),
        ([[0.5, 1.2], [-0.2, 0.5]], r"preference\[0, 1\] is 1.2 .* in 0..1"),
        ([[0.5, float("inf")], [NAN, 0.5]], r"preference\[0, 1\] is inf .* in 0..1"),
        (
            [[0.5, NAN], [0.4, 0.5]],
            r"preference\[0, 1\] is nan and preference\[1, 0\] is 0.4; .* NaN in both",
        ),
        ([[0.5, 0.5, 0.5]] * 3, r"shape \(2, 2\), got \(3, 3\)"),
        (None, "give either mos or preference"),
    ],
)
def test_preferences_that_contradict_themselves_are_named(preference, message):
    with pytest.raises(ValueError, match=message):
        ranking_reward(torch.ones(2, 2), preference=preference)


def test_mos_and_preference_together_are_refused():
    with pytest.raises(ValueError, match="give either mos or preference"):
        ranking_reward(torch.ones(2, 2), [1.0, 2.0], preference=[[0.5, 0.5], [0.5, 0.5]])


def test_the_diagonal_of_a_preference_is_ignored():
    scores = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    known = [ranking_reward(scores, preference=[[x, 1.0], [0.0, x]]) for x in (0.5, NAN, 7.0)]
    assert torch.equal(known[0], known[1]) and torch.equal(known[0], known[2])


@few
@given(batches(), variants, st.randoms(use_true_random=False))
def test_permuted_images_have_permuted_rewards(drawn, variant, random):
    scores, mos, dataset = drawn
    order = random.sample(range(len(mos)), len(mos))
    reward = ranking_reward(scores, mos, dataset, **variant)
    again = ranking_reward(scores[order], permuted(mos, order), permuted(dataset, order), **variant)
    torch.testing.assert_close(again, reward[order], atol=1e-9, rtol=0)


@few
@given(batches(), variants, st.randoms(use_true_random=False))
def test_permuted_completions_have_permuted_rewards(drawn, variant, random):
    scores, mos, dataset = drawn
    order = random.sample(range(scores.shape[1]), scores.shape[1])
    reward = ranking_reward(scores, mos, dataset, **variant)
    again = ranking_reward(scores[:, order], mos, dataset, **variant)
    # Variance 0 magnifies the rounding of the mean by 1 / sqrt(gamma).
    torch.testing.assert_close(again, reward[:, order], atol=1e-9, rtol=0)


@few
@given(batches(), variants)
def test_only_the_order_of_mos_within_a_data_set_matters(drawn, variant):
    scores, mos, dataset = drawn
    stretched = [math.exp(m) if name == "a" else 1000 + m**3 for m, name in zip(mos, dataset)]
    reward = ranking_reward(scores, mos, dataset, **variant)
    assert torch.equal(ranking_reward(scores, stretched, dataset, **variant), reward)


@few
@given(batches())
def test_data_sets_are_rewarded_as_if_alone(drawn):
    scores, mos, dataset = drawn
    reward = ranking_reward(scores, mos, dataset)
    for name in set(dataset):
        own = [n for n, other in enumerate(dataset) if other == name]
        torch.testing.assert_close(
            reward[own], ranking_reward(scores[own], permuted(mos, own)), atol=1e-12, rtol=0
        )


@few
@given(batches(), variants)
def test_reward_is_finite_and_within_its_bounds(drawn, variant):
    reward = ranking_reward(*drawn, **variant)
    assert torch.isfinite(reward).all() and reward.min() >= 0 and reward.max() <= 1.0011


def test_perfect_ranking_gives_the_official_maximum():
    scores = torch.tensor([[5.0, 5.0], [3.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    best = math.sqrt(1 + 1e-6) + math.sqrt(1e-6)  # 1.0010
    reward = ranking_reward(scores, [90, 50, 10])
    torch.testing.assert_close(reward, torch.full_like(reward, best), atol=1e-12, rtol=0)
    assert torch.all(ranking_reward(scores, [90, 50, 10], binary=True) == 1)


def test_reversed_ranking_gives_two_roots_of_eps():
    scores = torch.tensor([[1.0, 1.0], [5.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(ranking_reward(scores, [2, 1]), torch.full((2, 2), 2e-3, dtype=torch.float64))


def test_rewards_worked_out_by_hand():
    # var = 0.5 and 0.5, so the root is 1 but for gamma: p = Phi(4 - 2.5), Phi(3 - 2.5) against the mean 2.5.
    scores = torch.tensor([[4.0, 3.0], [3.0, 2.0]], dtype=torch.float64)
    reward = ranking_reward(scores, [2, 1], eps=0.0)
    expected = [[0.966019, 0.831542], [0.831542, 0.966019]]
    torch.testing.assert_close(reward, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_binary_reward_of_ties_is_half_on_one_side_and_one_on_both():
    scores = torch.tensor([[3.0, 3.0], [3.0, 3.0], [4.0, 4.0]], dtype=torch.float64)
    reward = ranking_reward(scores, [1.0, 1.0, 1.0], binary=True)
    assert reward[:, 0].tolist() == [0.75, 0.75, 0.5]


def test_binary_tie_survives_the_rounding_of_the_mean():
    scores = torch.tensor([[3.7] * 3, [3.7] * 3], dtype=torch.float64)  # their mean is 3.7000000000000006
    assert ranking_reward(scores, [1.0, 1.0], binary=True).tolist() == [[1.0] * 3] * 2


def test_unparseable_completion_gets_zero_and_leaves_the_rest_as_if_it_were_not_there():
    scores = torch.tensor([[4.0, 3.5, NAN], [2.0, 2.5, 1.0]], dtype=torch.float64)
    reward = ranking_reward(scores, [2.0, 1.0])
    others = loop_reward([[4.0, 3.5], [2.0, 2.5, 1.0]], [2.0, 1.0])
    assert reward[0].tolist() == pytest.approx([*others[0], 0.0]) and reward[1].tolist() == pytest.approx(
        others[1]
    )


def test_group_without_any_score_is_nobodys_partner():
    scores = torch.tensor([[4.0, 4.2], [NAN, NAN], [2.0, 2.1]], dtype=torch.float64)
    reward = ranking_reward(scores, [3.0, 2.0, 1.0])
    assert torch.equal(reward[[0, 2]], ranking_reward(scores[[0, 2]], [3.0, 1.0])) and not reward[1].any()


@pytest.mark.parametrize("value", [NAN, float("inf"), 1e200])
def test_scores_that_are_no_usable_number_never_poison_a_batch(value):
    scores = torch.tensor([[4.0, value], [value, value], [2.0, 2.1]], dtype=torch.float64)
    reward = ranking_reward(scores, [3.0, 2.0, 1.0])
    assert torch.isfinite(reward).all() and reward[0, 1] == 0 and reward[0, 0] > 0.99


@pytest.mark.parametrize("dataset", [None, ["a", "b"]])
def test_image_without_a_partner_gets_zero(dataset):
    images = 1 if dataset is None else 2
    assert not ranking_reward(torch.full((images, 3), 3.0), [1.0] * images, dataset).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reward_keeps_the_dtype_of_the_scores(dtype):
    assert ranking_reward(torch.ones(2, 2, dtype=dtype), [1.0, 2.0]).dtype == dtype


def test_close_mos_in_a_list_are_not_rounded_to_a_tie():
    scores = torch.tensor([[4.0, 4.0], [2.0, 2.0]])
    assert ranking_reward(scores, [3.0 + 1e-9, 3.0]).min() > 1


def test_data_set_names_may_be_tensor_or_array():
    scores, mos = torch.rand(4, 3, dtype=torch.float64), [1.0, 2.0, 3.0, 4.0]
    reward = ranking_reward(scores, mos, ["a", "b", "a", "b"])
    for names in (torch.tensor([0, 1, 0, 1]), np.array(["a", "b", "a", "b"])):
        assert torch.equal(ranking_reward(scores, mos, names), reward)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scores": [[1.0, 2.0]]}, TypeError, "floating torch.Tensor"),
        ({"scores": torch.ones(2, 2, dtype=torch.long)}, TypeError, "floating torch.Tensor"),
        ({"scores": torch.ones(4)}, ValueError, r"\(B, K\), got \(4,\)"),
        ({"scores": torch.ones(2, 1)}, ValueError, "K = 1"),
        ({"mos": [1.0]}, ValueError, "2 images but 1 values of mos"),
        ({"mos": [1.0, NAN]}, ValueError, r"not a finite number at \[1\]"),
        ({"mos": [[1.0], [2.0]]}, ValueError, r"shape \(B,\)"),
        ({"dataset": ["a", "a", "b"]}, ValueError, "2 images but 3 values of dataset"),
        ({"variance": -1.0}, ValueError, "variance must not be negative"),
        ({"gamma": 0.0}, ValueError, "gamma must be positive"),
        ({"eps": -1e-6}, ValueError, "eps must not be negative"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ranking_reward(**{"scores": torch.ones(2, 2), "mos": [1.0, 2.0], **arguments})


def test_comparative_probability_is_phi_of_the_standardised_difference():
    scores, variances = torch.tensor([[4.0, 2.0], [1.0, 5.0]]), torch.tensor([0.3, 0.1])
    means, other_variances = torch.tensor([3.0, 2.5, 1.5]), torch.tensor([0.7, 0.0, 0.2])
    p = comparative_probability(scores, variances, means, other_variances, gamma=0.5)
    assert p.shape == (2, 3, 2)
    for i, j, k in np.ndindex(2, 3, 2):
        root = math.sqrt(variances[i] + other_variances[j] + 0.5)
        assert p[i, j, k].item() == pytest.approx(phi((scores[i, k] - means[j]) / root), abs=1e-6)


@pytest.mark.parametrize("wrong", range(4))
def test_comparative_probability_names_shapes_that_disagree(wrong):
    arguments = [torch.ones(2, 3), torch.ones(2), torch.ones(4), torch.ones(4)]
    arguments[wrong] = torch.ones(5, 1)
    with pytest.raises(ValueError, match=r"must be \(B, K\), \(B,\), \(J,\) and \(J,\), got .*\(5, 1\)"):
        comparative_probability(*arguments)


@given(st.floats(0, 1), st.floats(0, 1))
def test_fidelity_is_symmetric_and_greatest_where_both_agree(p, q):
    p, q = torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    assert fidelity(p, q) == fidelity(q, p) and fidelity(p, q) <= fidelity(p, p) + 3e-3
    assert fidelity(p, p, eps=0.0) == pytest.approx(1.0)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
def test_preferences_of_a_pair_add_up_to_one(mos):
    p = true_preference(mos)
    assert torch.equal(p + p.T, torch.ones_like(p))


def test_scale_recovers_known_qualities_within_its_standard_errors():
    true, votes = np.array([-1.3, -0.4, 0.1, 0.5, 1.1]), 4000
    rng = np.random.default_rng(0)
    chance = np.vectorize(phi)((true[:, None] - true) / math.sqrt(2))
    wins = np.triu(rng.binomial(votes, chance), 1)
    wins = wins + np.tril(votes - wins.T, -1)
    quality, error = thurstone_scale(wins)
    assert np.abs(quality - true).max() < 0.05 and quality.sum() == pytest.approx(0, abs=1e-12)
    assert (np.abs(quality - true) < 4 * error).all() and (error < 0.02).all()


def test_standard_error_is_the_spread_of_repeated_experiments():
    true, votes, rng = np.array([0.5, 0.0, -0.5]), 100, np.random.default_rng(1)
    chance = np.vectorize(phi)((true[:, None] - true) / math.sqrt(2))
    qualities = []
    for _ in range(200):
        upper = np.triu(rng.binomial(votes, chance), 1)
        quality, error = thurstone_scale(upper + np.tril(votes - upper.T, -1))
        qualities.append(quality)
    np.testing.assert_allclose(np.std(qualities, axis=0), error, rtol=0.2)


def test_two_items_have_the_closed_form():
    quality, _ = thurstone_scale([[0, 30], [10, 0]])
    assert phi((quality[0] - quality[1]) / math.sqrt(2)) == pytest.approx(30.5 / 41, abs=1e-9)


def test_symmetric_votes_give_equal_quality_and_error():
    quality, error = thurstone_scale(7 * (np.ones((4, 4)) - np.eye(4)))
    np.testing.assert_allclose(quality, 0, atol=1e-9)
    np.testing.assert_allclose(error, error[0])


def test_an_item_that_wins_every_vote_stays_finite():
    quality, error = thurstone_scale([[0, 1e6, 0], [0, 0, 1e6], [0, 0, 0]])
    assert np.isfinite(quality).all() and np.isfinite(error).all() and (np.diff(quality) < 0).all()


@few
@given(st.integers(2, 6), st.randoms(use_true_random=False))
def test_scale_does_not_depend_on_the_order_of_items(n, random):
    wins = np.array(
        [[0 if i == j else random.randint(0, 9) for j in range(n)] for i in range(n)], dtype=float
    )
    wins += np.eye(n, k=1) + np.eye(n, k=-1)  # connected
    order = random.sample(range(n), n)
    for one, other in zip(thurstone_scale(wins), thurstone_scale(wins[np.ix_(order, order)])):
        np.testing.assert_allclose(one[order], other, atol=1e-6)


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        ([[0, 1, 2], [1, 0, 1]], r"square matrix.*\(2, 3\)"),
        ([[0]], "at least 2 items"),
        ([[0, -1], [1, 0]], "not negative"),
        ([[0, NAN], [1, 0]], "finite"),
        ([[3, 1], [1, 0]], r"items \[0\] have votes against themselves"),
        ([[0, 0, 2, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 3, 0, 0]], r"items \[0, 2\] and \[1, 3\]"),
    ],
)
def test_votes_that_allow_no_scale_are_named(wins, message):
    with pytest.raises(ValueError, match=message):
        thurstone_scale(wins)


# --- the paper's setting ------------------------------------------------------------------------


def test_the_papers_run_is_one_configuration_away():
    """Section 4.1 and the official code set AdamW, lr 1e-6, linear, K = 6 and beta = 0.04.

    They take 8 images a GPU and 10 epochs of 6,125 images.
    """
    config = load_config("paper-7b-full")
    grpo = config.grpo
    exact = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "linear",
        "num_generations": 6,
        "beta": 0.04,
        "temperature": 1.0,
        "top_k": 50,
        "epsilon": 0.2,
        "loss_type": "grpo",
        "scale_rewards": "group",
        "max_completion_length": 256,
        "use_bias_correction_kl": False,
        "optim": "adamw_torch",
    }
    assert {key: grpo[key] for key in exact} == exact
    assert config.model_name_or_path == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (config.use_peft, config.frozen, config.sets) == (False, [], ["kadid10k"])
    assert config.reward_options == {"bounded": False}
    sampled = grpo["per_device_train_batch_size"] * grpo["steps_per_generation"]  # by one GPU at a time
    assert sampled == 8 * 6
    a_step = (
        8 * grpo["per_device_train_batch_size"] * grpo["gradient_accumulation_steps"] // 6
    )  # images, on 8 GPUs
    assert a_step == 16 * 8 and grpo["max_steps"] == round(10 * 6125 / a_step, -1)


def test_the_papers_reward_is_its_equations_to_the_digit():
    """Answers as text go through the configuration's reward and through plain loops.

    One answer in ten cannot be parsed, and MOS have ties.
    """
    config = load_config("paper-7b-full")
    ranking, form = reward_functions(config.reward, 6, config.thinking, config.reward_options)
    rng = np.random.default_rng(0)
    scores = rng.uniform(1, 5, (8, 6)).round(2)
    scores[rng.random(scores.shape) < 0.1] = NAN
    mos = rng.integers(1, 6, 8).astype(float).tolist()
    texts = [f"<think>x</think><answer>{score:.2f}</answer>" for score in scores.flatten()]
    got = ranking(completions=texts, mos=np.repeat(mos, 6).tolist())
    assert got == pytest.approx(np.ravel(loop_reward(scores.tolist(), mos)).tolist(), abs=1e-9)
    assert np.isnan(scores).any() and form(texts) == [1.0] * 48
