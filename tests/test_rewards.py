"""Call the rewards as TRL does, in one process and in two.

Run by torchrun, this file is the worker of the two-process test.
"""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from vqr1.rewards import (
    RankingReward,
    ThresholdReward,
    absolute_error_reward,
    answer_format_reward,
    completion_text,
    format_reward,
    scores_of,
)
from vqr1.thurstone import ranking_reward, true_preference

NAN = float("nan")
K = 3


def answer(score):
    text = "a dull picture" if math.isnan(score) else f"<think>so so</think><answer>{score:.2f}</answer>"
    return [{"role": "assistant", "content": text}]


def batch(images=8, seed=0):
    """Return rows as TRL gives them: an image's K completions side by side, sets mixed, some unparseable."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.5, 5.5, (images, K)).round(2)
    scores[rng.random(scores.shape) < 0.2] = NAN
    scores[1] = NAN
    mos = rng.permutation(images) / 2
    dataset = [("kadid", "koniq")[n % 2] for n in range(images)]
    columns = {
        "prompts": [[{"role": "user", "content": "?"}]] * (images * K),
        "completions": [answer(score) for score in scores.flatten()],
        "mos": np.repeat(mos, K).tolist(),
        "dataset": np.repeat(dataset, K).tolist(),
    }
    return columns, torch.tensor(scores), mos.tolist(), dataset


def split(columns, start, stop):
    return {name: column[start:stop] for name, column in columns.items()}


def test_reward_is_the_thurstone_reward_of_the_parsed_scores():
    columns, scores, mos, dataset = batch()
    reward = RankingReward(K)(**columns)
    assert reward == ranking_reward(scores, mos, dataset).flatten().tolist()
    assert all(type(value) is float for value in reward) and any(math.isnan(s) for s in scores.flatten())


@pytest.mark.parametrize(
    "variant", [{"binary": True}, {"average": True}, {"variance": 1.0}, {"gamma": 0.1, "eps": 0.0}]
)
def test_variants_reach_the_mathematics(variant):
    columns, scores, mos, dataset = batch()
    reward = RankingReward(K, **variant)(**columns)
    assert reward == ranking_reward(scores, mos, dataset, **variant).flatten().tolist()
    assert reward != RankingReward(K)(**columns)


def test_without_a_data_set_column_all_images_are_compared():
    columns, scores, mos, dataset = batch()
    del columns["dataset"]
    reward = RankingReward(K)(**columns)
    assert reward == ranking_reward(scores, mos).flatten().tolist()
    assert reward != ranking_reward(scores, mos, dataset).flatten().tolist()


def compared():
    """Return `batch` with kadid learned from comparisons of some pairs: its columns, and the comparisons.

    Its rows have no mos. Pair (0, 2) was compared twice, the second time the other way round.
    """
    columns, scores, mos, dataset = batch()
    columns["name"] = np.repeat([f"{n}.jpg" for n in range(8)], K).tolist()
    columns["mos"] = [None if own == "kadid" else m for own, m in zip(columns["dataset"], columns["mos"])]
    pairs = [("0.jpg", "2.jpg", 1.0, 3), ("2.jpg", "0.jpg", 0.5, 1), ("4.jpg", "6.jpg", 0.2, 5)]
    pairs += [("6.jpg", "0.jpg", 0.5, 2), ("0.jpg", "elsewhere.jpg", 1.0, 1)]
    return columns, {"kadid": pd.DataFrame(pairs, columns=["first", "second", "preference", "votes"])}


def test_a_set_with_comparisons_is_learned_from_them_and_another_from_its_mos():
    columns, comparisons = compared()
    reward = RankingReward(K, comparisons=comparisons)(**columns)
    _, scores, mos, dataset = batch()
    preference = true_preference(mos).numpy()
    kadid = np.array([own == "kadid" for own in dataset])
    preference[kadid] = preference[:, kadid] = NAN
    for i, j, share in ((0, 2, (3 + 0.5) / 4), (4, 6, 0.2), (6, 0, 0.5)):
        preference[i, j], preference[j, i] = share, 1 - share
    assert reward == ranking_reward(scores, dataset=dataset, preference=preference).flatten().tolist()
    plain = batch()[0]
    by_mos = RankingReward(K)(**plain)
    same = [a == b for a, b in zip(reward, by_mos)]
    assert [own for own, equal in zip(plain["dataset"], same) if not equal].count("kadid") > 4
    assert all(equal for own, equal in zip(plain["dataset"], same) if own == "koniq")


def test_comparisons_made_from_mos_give_the_reward_of_mos():
    columns, scores, mos, dataset = batch()
    columns["name"] = np.repeat([f"{n}.jpg" for n in range(8)], K).tolist()
    pairs = [(f"{i}.jpg", f"{j}.jpg", float(true_preference(mos)[i, j])) for i in range(8) for j in range(i)]
    pairs = pd.DataFrame(pairs, columns=["first", "second", "preference"])
    expected = RankingReward(K)(**columns)
    columns["mos"] = None
    assert RankingReward(K, comparisons={"kadid": pairs, "koniq": pairs})(**columns) == expected


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "row 0 .*process 0 of 1.* has no 'name', and set 'mine' is .*a column 'name'"),
        ({"dataset": None}, "row 0 .* has no 'dataset', and comparisons are of mine; give .*'dataset'"),
        ({"name": ["a"] * 5}, "6 completions but 5 values of 'name'"),
        ({"name": ["a"] * 3 + ["z"] * 3}, "row 3 .*: 'z' is in no comparison of 'mine'; correct the name"),
        ({"name": ["a"] * 4 + ["b"] * 2}, r"rows 3..5.*one image.*\(mos, dataset, name\) differ"),
        ({"dataset": ["mine"] * 3 + ["rated"] * 3}, "needs a number in column 'mos'"),
    ],
)
def test_rows_that_comparisons_cannot_be_looked_up_for_are_named(change, message, scope):
    pairs = pd.DataFrame({"first": ["a"], "second": ["b"], "preference": [1.0]})
    columns = {
        "completions": ["<answer>3.00</answer>"] * 6,
        "mos": [NAN] * 6,
        "dataset": ["mine"] * 6,
        "name": ["a"] * 3 + ["b"] * 3,
    }
    reward = RankingReward(3, scope, comparisons={"mine": pairs})
    assert min(reward(**columns)) > 0.7
    with pytest.raises(ValueError, match=message):
        reward(**{**columns, **change})


def test_wrong_comparisons_fail_before_training():
    pairs = pd.DataFrame({"first": ["a"], "second": ["b"], "preference": [75]})
    with pytest.raises(
        ValueError, match="the comparisons of 'mine', row 0 .*: preference 75 is not a number"
    ):
        RankingReward(2, comparisons={"mine": pairs})


def test_reward_takes_the_other_keywords_of_trl_and_has_a_name():
    columns, *_ = batch()
    reward = RankingReward(K)
    expected = reward(**columns)
    assert reward(**columns, completion_ids=[], trainer_state=None, image=[], level=[]) == expected
    assert (
        reward(**{**columns, "completions": [completion_text(c) for c in columns["completions"]]}) == expected
    )
    names = [reward.__name__, ThresholdReward().__name__, format_reward.__name__]
    assert names == ["ranking", "threshold", "format_reward"]


def test_a_bounded_reward_takes_a_score_out_of_range_for_none():
    columns, scores, mos, dataset = batch()
    inside = scores.where((scores >= 1) & (scores <= 5), NAN)
    assert not torch.equal(inside.isnan(), scores.isnan())
    reward = RankingReward(K, bounded=True)(**columns)
    assert reward == ranking_reward(inside, mos, dataset).flatten().tolist() != RankingReward(K)(**columns)


def test_out_of_range_pays_unless_bounded():
    """An answer of 300 to the better of two pictures widens its group until the sound answers lose.

    Bounded, it earns nothing.
    """
    completions = [answer(score) for score in (300, 4.5, 4.4, 1.4, 1.5, 1.6)]
    free, held = (
        RankingReward(K, bounded=bounded)(completions=completions, mos=[2] * K + [1] * K)
        for bounded in (False, True)
    )
    assert free[0] > free[1] + 0.2 and held[0] == 0.0 and held[1] > 0.99


def test_unparseable_and_out_of_range_answers_are_counted():
    metrics, extra = {}, {}
    completions = [answer(score) for score in (4.0, 5.5, NAN, NAN, 0.2, 1.2)]
    RankingReward(2)(
        completions=completions,
        mos=[3, 3, 2, 2, 1, 1],
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
    )
    assert metrics["unparseable"] == pytest.approx(2 / 6) and metrics["out_of_range"] == pytest.approx(2 / 6)
    assert metrics["score_std"] == pytest.approx((1.5 / 2**0.5 + 1.0 / 2**0.5) / 2)  # the median of two
    assert list(extra) == ["score"] and extra["score"][:2] == [4.0, 5.5] and math.isnan(extra["score"][2])


def test_nothing_parseable_logs_no_nan():
    metrics = {}
    assert (
        RankingReward(2)(completions=["?"] * 4, mos=[1, 1, 2, 2], log_metric=metrics.__setitem__) == [0.0] * 4
    )
    assert metrics == {"unparseable": 1.0, "out_of_range": 0.0}


def test_score_outside_the_range_is_kept_as_it_stands():
    assert scores_of(["<answer>-3</answer>", "<answer>80</answer>"]) == [-3.0, 80.0]


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": ["?"] * 5}, "5 completions.*not whole groups of num_generations = 3.*split"),
        ({"completions": []}, "0 completions"),
        ({"mos": None}, "needs a number in column 'mos'"),
        ({"mos": [NAN] * 6}, "needs a number in column 'mos'"),
        ({"mos": [1.0] * 5}, "6 completions but 5 values of 'mos'"),
        ({"dataset": ["a"] * 7}, "6 completions but 7 values of 'dataset'"),
        ({"mos": [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]}, r"rows 0..2.*one image.*differ"),
        ({"dataset": ["a", "a", "a", "a", "b", "b"]}, r"rows 3..5.*one image.*differ"),
    ],
)
def test_groups_that_cannot_be_ranked_are_named(change, message, scope):
    columns = {
        "completions": ["<answer>3.00</answer>"] * 6,
        "mos": [1.0] * 3 + [2.0] * 3,
        "dataset": ["a"] * 6,
    }
    with pytest.raises(ValueError, match=message):
        RankingReward(3, scope)(**{**columns, **change})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_generations": 1}, ValueError, "at least 2"),
        ({"num_generations": 2, "scope": "everywhere"}, ValueError, "'everywhere'"),
        ({"num_generations": 2, "variance": -1.0}, ValueError, "variance"),
        ({"num_generations": 2, "gamma": 0.0}, ValueError, "gamma"),
        ({"num_generations": 2, "binray": True}, TypeError, "binray"),
    ],
)
def test_wrong_settings_fail_before_training(arguments, error, message):
    with pytest.raises(error, match=message):
        RankingReward(**arguments)


GOOD = "<think>sharp, little noise</think><answer>4.20</answer>"
FORMATS = [  # text, with thinking, without
    (GOOD, 1.0, 0.0),
    ("<think>sharp</think>\n\n<answer>\n4.20\n</answer>", 1.0, 0.0),
    ("<think></think><answer>fine</answer>", 1.0, 0.0),  # any content
    ("<answer>4.20</answer>", 0.0, 1.0),
    ("4.20", 0.0, 0.0),
    ("<think>sharp</think>4.20", 0.0, 0.0),
    ("<think>sharp<answer>4.20</answer>", 0.0, 0.0),  # think not closed
    ("<answer>4.20</answer><think>sharp</think>", 0.0, 0.0),  # wrong order
    ("<think>sharp</think>so<answer>4.20</answer>", 0.0, 0.0),  # text between
    (GOOD + " and more", 0.0, 0.0),
    (GOOD + "<answer>1.00</answer>", 0.0, 0.0),  # two answers
    ("", 0.0, 0.0),
]


@pytest.mark.parametrize(("text", "thinking", "plain"), FORMATS)
def test_format_rewards(text, thinking, plain):
    for completion in (text, [{"role": "assistant", "content": text}]):
        assert format_reward([completion], mos=[3.0]) == [thinking]
        assert answer_format_reward(completions=[completion], mos=[3.0]) == [plain]


def test_threshold_reward_is_q_insights():
    completions = [answer(score) for score in (3.0, 3.34, 3.36, 2.66, 2.64, NAN)]
    assert ThresholdReward()(completions=completions, mos=[3.0] * 6) == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert ThresholdReward(0.5)(completions=completions, mos=[3.0] * 6) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_absolute_error_reward_is_never_below_that_of_no_score():
    completions = [answer(score) for score in (3.5, 1.0, 900.0, NAN)]
    assert absolute_error_reward(completions=completions, mos=[3.0, 5.0, 3.0, 3.0]) == [
        -0.5,
        -4.0,
        -4.0,
        -4.0,
    ]


@pytest.mark.parametrize("reward", [ThresholdReward(), absolute_error_reward])
def test_regression_rewards_log_and_need_mos(reward):
    metrics = {}
    reward(completions=[answer(3.0), answer(NAN)], mos=[3.0, 3.0], log_metric=metrics.__setitem__)
    assert metrics == {"unparseable": 0.5, "out_of_range": 0.0}
    with pytest.raises(ValueError, match="'mos'"):
        reward(completions=[answer(3.0)])


def test_two_processes_reward_the_same_completions_exactly_as_one(tmp_path, started):
    """Two gloo processes get equal and unequal shares of one batch, and a split group."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")])
    )
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, __file__, str(tmp_path)]
    process = started(command, env=environment)
    said = process.communicate()[1]
    assert process.returncode == 0, said[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    columns, *_ = batch()
    for variant in ({}, {"average": True}):
        expected = RankingReward(K, "global", **variant)(**columns)
        for cut in (12, 6):
            name = f"{cut}{variant}"
            assert ranks[0][name] + ranks[1][name] == expected
    named, comparisons = compared()
    expected = RankingReward(K, "global", comparisons=comparisons)(**named)
    assert ranks[0]["compared"] + ranks[1]["compared"] == expected
    halves = [split(columns, 0, 12), split(columns, 12, 24)]
    assert [rank["local"] for rank in ranks] == [RankingReward(K)(**half) for half in halves]
    assert ranks[0]["local"] + ranks[1]["local"] != ranks[0]["12{}"] + ranks[1]["12{}"]
    for rank in ranks:  # both raise; neither waits for the other
        assert "10 completions (process 0 of 2) are not whole groups" in rank["split"]


def worker(folder: str) -> None:
    import torch.distributed as dist
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    columns, *_ = batch()

    def own(cut):
        return split(columns, 0, cut) if rank == 0 else split(columns, cut, 24)

    found = {
        f"{cut}{variant}": RankingReward(K, "global", **variant)(**own(cut))
        for variant in ({}, {"average": True})
        for cut in (12, 6)
    }
    named, comparisons = compared()
    share = split(named, 0, 6) if rank == 0 else split(named, 6, 24)
    found["compared"] = RankingReward(K, "global", comparisons=comparisons)(**share)
    found["local"] = RankingReward(K)(**own(12))
    try:
        RankingReward(K, "global")(**own(10))
    except ValueError as error:
        found["split"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(sys.argv[1])
