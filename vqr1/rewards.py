"""Rewards in TRL's convention: called with columns of the batch, they return one number per completion.

TRL calls a reward once per generation batch with this process's completions, the completions of one prompt
side by side. A completion is ``[{"role": "assistant", "content": text}]`` or the text alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from vqr1.data.comparisons import PairTable
from vqr1.prompts import SCORE_MAX, SCORE_MIN, format_ok, parse_score
from vqr1.thurstone import ranking_reward, true_preference

Completion = str | list[dict]
LogMetric = Callable[[str, float], None]


def completion_text(completion: Completion) -> str:
    """Return the text of a completion: of its last message, or the string itself.

    >>> completion_text([{"role": "assistant", "content": "<answer>3.20</answer>"}])
    '<answer>3.20</answer>'
    """
    return completion if isinstance(completion, str) else completion[-1]["content"]


def scores_of(completions: Sequence[Completion], log_metric: LogMetric | None = None) -> list[float]:
    """Return the score in every completion, NaN where there is none.

    With ``log_metric`` (TRL's) it reports the shares of completions that are unparseable, and outside 1..5.

    >>> scores_of(["<answer>3.20</answer>", "good"], log_metric=print)
    unparseable 0.5
    out_of_range 0.0
    [3.2, nan]
    """
    scores = [parse_score(completion_text(completion)) for completion in completions]
    if log_metric and scores:
        outside = [score < SCORE_MIN or score > SCORE_MAX for score in scores]  # False for NaN
        log_metric("unparseable", sum(map(math.isnan, scores)) / len(scores))
        log_metric("out_of_range", sum(outside) / len(scores))
    return scores


class RankingReward:
    """The paper's reward: how well a completion's score ranks its image within its data set.

    r_k(x_i) = mean over j != i of fidelity(p(i, j), p_k(i, j)); see ``vqr1.thurstone.ranking_reward``. A
    completion without a score gets 0.0. The official code compares within one GPU (``grpo_trainer.py`` line
    775).

    Args:
        num_generations: K, TRL's own.
        scope: "local" compares the images of this process: with gradient accumulation the whole generation
            batch, as TRL passes it, not one micro-batch. "global" compares the images of all processes, which
            exchange (score, mos, dataset, name) rows in one collective per call: every process has to call
            it.
        bounded: a score outside 1..5 counts as unparseable. Otherwise nothing holds the scale: in a
            comparison 300 is as good as 5 (notebook 02, section 5).
        comparisons: data set -> what people said of its pairs, as from `load_comparisons`: columns first,
            second, preference and, if known, votes. p(i, j) of such a set is the share who prefer picture i,
            the mean over the pair's rows weighted by votes; a pair that is not there takes no part. Its rows
            need the column ``name``, as the comparisons spell it, and no ``mos``.
        variants: keyword arguments of `ranking_reward`: binary, average, variance, gamma, eps.

    Raises:
        ValueError: for K < 2, an unknown scope, or comparisons that `PairTable` refuses. When called: for a
            missing ``mos``, a number of completions on any process that K does not divide, a group with
            several MOS, data sets or names; with comparisons for a missing ``dataset`` or ``name``, and a
            name that no comparison of its set mentions.

    >>> reward = RankingReward(num_generations=2)
    >>> answers = [f"<answer>{score}</answer>" for score in (4.2, 4.4, 1.5, 1.1)]
    >>> [round(value, 4) for value in reward(completions=answers, mos=[80, 80, 20, 20])]
    [1.001, 1.001, 1.001, 1.001]
    >>> pairs = pd.DataFrame({"first": ["cat.jpg"], "second": ["dog.jpg"], "preference": [0.75]})
    >>> reward = RankingReward(num_generations=2, comparisons={"pets": pairs})
    >>> names = ["cat.jpg", "cat.jpg", "dog.jpg", "dog.jpg"]
    >>> [round(value, 4) for value in reward(completions=answers, dataset=["pets"] * 4, name=names)]
    [0.867, 0.867, 0.867, 0.867]
    """

    __name__ = "ranking"  # TRL logs a reward under this name

    def __init__(
        self,
        num_generations: int,
        scope: str = "local",
        bounded: bool = False,
        comparisons: Mapping[str, pd.DataFrame] | None = None,
        **variants,
    ):
        if num_generations < 2:
            raise ValueError(
                f"num_generations = {num_generations}: ranking needs at least 2 completions per image"
            )
        if scope not in ("local", "global"):
            raise ValueError(f"scope must be 'local' or 'global', got {scope!r}")
        ranking_reward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [1, 2], **variants)  # a bad variant fails now
        self.num_generations, self.scope = num_generations, scope
        self.bounded, self.variants = bounded, variants
        self.tables = {name: PairTable(pairs, name) for name, pairs in (comparisons or {}).items()}

    def __call__(
        self,
        prompts=None,
        completions=(),
        mos=None,
        dataset=None,
        name=None,
        log_metric=None,
        log_extra=None,
        **kwargs,
    ) -> list[float]:
        scores = scores_of(completions, log_metric)
        if self.bounded:
            scores = [score if SCORE_MIN <= score <= SCORE_MAX else math.nan for score in scores]
        columns = [scores, *(_or_none(column, scores) for column in (mos, dataset, name))]
        # One list of rows per process, in the order of ranks. Every check comes after this collective and
        # looks at the rows of all processes, so that all raise together and none is left waiting.
        everyone = gather_object([columns]) if self.scope == "global" else [columns]
        rewards = self._rewards(everyone, log_metric)  # (B, K), B images of all these processes
        rank = PartialState().process_index if self.scope == "global" else 0
        start = sum(len(columns[0]) for columns in everyone[:rank])
        self._log(scores, log_metric, log_extra)
        return rewards.flatten().tolist()[start : start + len(scores)]

    def _rewards(self, everyone: list[list[list]], log_metric=None) -> torch.Tensor:
        k = self.num_generations
        for rank, (scores, *labels) in enumerate(everyone):
            _check_columns(k, len(scores), *labels, self.tables, f" (process {rank} of {len(everyone)})")
        scores, *labels = (sum(column, []) for column in zip(*everyone))
        mos, dataset, name = (column[::k] for column in labels)
        scores = torch.tensor(scores, dtype=torch.float64).reshape(-1, k)  # (B, K)
        if not self.tables:
            return ranking_reward(scores, mos, dataset, **self.variants)
        preference = self._preference(mos, dataset, name)
        if log_metric:  # an image without a partner earns 0, whatever its answers say
            log_metric("compared", float(np.isfinite(preference).any(axis=1).mean()))
        return ranking_reward(scores, dataset=dataset, preference=preference, **self.variants)

    def _preference(self, mos: list, dataset: list, name: list) -> np.ndarray:
        """Return p(i, j), (B, B): of a set with comparisons what they say, of the others by their MOS."""
        learned = np.array([own in self.tables for own in dataset])
        p = true_preference(np.where(learned, 0.0, np.array(mos, dtype=float))).numpy()  # None becomes NaN
        p[learned] = p[:, learned] = np.nan
        for own, table in self.tables.items():
            rows = np.flatnonzero([other == own for other in dataset])
            codes = table.codes([name[row] for row in rows], (rows * self.num_generations).tolist())
            p[np.ix_(rows, rows)] = table.preference(codes)
        return p

    def _log(self, scores, log_metric, log_extra) -> None:
        if log_extra:
            log_extra("score", scores)
        if log_metric:
            groups = [
                scores[n : n + self.num_generations] for n in range(0, len(scores), self.num_generations)
            ]
            spreads = [std for std in map(_std, groups) if not math.isnan(std)]
            if spreads:  # TRL averages what is logged: a NaN would hide the rest, as would one answer of 40
                log_metric("score_std", median(spreads))


def _or_none(column, scores: list) -> list:
    return [None] * len(scores) if column is None else list(column)


def _check_columns(
    k: int, rows: int, mos: list, dataset: list, name: list, tables: Mapping[str, PairTable], where: str
) -> None:
    if rows == 0 or rows % k:
        raise ValueError(
            f"{rows} completions{where} are not whole groups of num_generations = {k}: a group would be "
            "split between batches or processes. Make per_device_train_batch_size * steps_per_generation a "
            "multiple of it"
        )
    for title, column in (("mos", mos), ("dataset", dataset), ("name", name)):
        if len(column) != rows:
            raise ValueError(f"{rows} completions but {len(column)} values of {title!r}{where}")
    if tables and None in dataset:
        raise ValueError(
            f"row {dataset.index(None)}{where} has no 'dataset', and comparisons are of {', '.join(tables)}; "
            "give the rows a column 'dataset'"
        )
    learned = [own in tables for own in dataset]
    if not all(own or _is_number(value) for own, value in zip(learned, mos)):
        raise ValueError(
            f"the ranking reward needs a number in column 'mos' for every row, got {mos[:3]}…{where}"
        )
    for row, (own, called) in enumerate(zip(learned, name)):
        if own and called is None:
            raise ValueError(
                f"row {row}{where} has no 'name', and set {dataset[row]!r} is learned from comparisons; give "
                "the rows a column 'name' with what the comparisons call the picture"
            )
    labels = list(zip([None if own else value for own, value in zip(learned, mos)], dataset, name))
    for start in range(0, rows, k):
        group = set(labels[start : start + k])
        if len(group) > 1:
            raise ValueError(
                f"rows {start}..{start + k - 1}{where} should be {k} completions of one image, but their "
                f"(mos, dataset, name) differ: {sorted(group, key=str)[:3]}. Is num_generations that of the "
                "trainer?"
            )


def _is_number(value) -> bool:
    return value is not None and math.isfinite(value)


def _std(scores: list[float]) -> float:
    values = torch.tensor([score for score in scores if math.isfinite(score)], dtype=torch.float64)
    return float(values.std()) if len(values) > 1 else math.nan


def format_reward(completions: Sequence[Completion], **kwargs) -> list[float]:
    """Return 1.0 if all of a completion is ``<think>…</think> <answer>…</answer>``, else 0.0.

    White space between the two is free. Source: the official code, which adds it to the ranking reward 1:1.

    >>> format_reward(["<think>sharp</think>\\n<answer>4.5</answer>", "<answer>4.5</answer>"])
    [1.0, 0.0]
    """
    return [float(format_ok(completion_text(completion))) for completion in completions]


def answer_format_reward(completions: Sequence[Completion], **kwargs) -> list[float]:
    """Return 1.0 where the whole completion is ``<answer>…</answer>``, else 0.0: the format without thinking.

    >>> answer_format_reward(["<think>sharp</think><answer>4.5</answer>", "<answer>4.5</answer>"])
    [0.0, 1.0]
    """
    return [float(format_ok(completion_text(completion), thinking=False)) for completion in completions]


class ThresholdReward:
    """Q-Insight's regression reward: 1 if |score - mos| < threshold, else 0; no score gives 0.

    Scores and MOS must be on one scale, 1..5. Source: Q-Insight, whose threshold is 0.35.

    Args:
        threshold: in units of the scale.

    Raises:
        ValueError: unless threshold > 0.

    >>> ThresholdReward()(["<answer>3.2</answer>", "<answer>3.4</answer>", "?"], mos=[3.0, 3.0, 3.0])
    [1.0, 0.0, 0.0]
    """

    __name__ = "threshold"

    def __init__(self, threshold: float = 0.35):
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold}")
        self.threshold = threshold

    def __call__(self, completions=(), mos=None, log_metric=None, **kwargs) -> list[float]:
        scores = scores_of(completions, log_metric)
        pairs = _pairs(scores, mos)
        return [float(abs(score - value) < self.threshold) for score, value in pairs]  # NaN < x is False


def absolute_error_reward(completions, mos=None, log_metric=None, **kwargs) -> list[float]:
    """Return -|score - mos|, but at least -4, the worst error possible on the scale 1..5; no score gives -4.

    Scores and MOS must be on the scale 1..5. The bound keeps a score of 300 from being worse than none.

    >>> absolute_error_reward(["<answer>3.5</answer>", "<answer>300</answer>", "?"], mos=[3.0, 3.0, 3.0])
    [-0.5, -4.0, -4.0]
    """
    worst = SCORE_MIN - SCORE_MAX
    scores = scores_of(completions, log_metric)
    return [
        worst if math.isnan(score) else max(worst, -abs(score - value))
        for score, value in _pairs(scores, mos)
    ]


def _pairs(scores: list[float], mos) -> list[tuple[float, float]]:
    mos = _or_none(mos, scores)
    if None in mos or len(mos) != len(scores):
        raise ValueError(f"{len(scores)} completions need as many values of 'mos', got {len(mos)}: {mos[:3]}")
    return list(zip(scores, mos))


def reward_functions(reward: str, num_generations: int, thinking: bool, options: dict) -> list[Callable]:
    """Return what a run learns from: the reward, and the format, 1:1 as in the official code.

    Args:
        reward: ranking, threshold, absolute, or format (nothing else).
        num_generations: K.
        thinking: the format has a part for reasoning.
        options: keyword arguments of `RankingReward`.

    >>> [one.__name__ for one in reward_functions("ranking", 6, True, {"bounded": True})]
    ['ranking', 'format_reward']
    """
    chosen = {
        "ranking": lambda: [RankingReward(num_generations, **options)],
        "threshold": lambda: [ThresholdReward()],
        "absolute": lambda: [absolute_error_reward],
        "format": lambda: [],
    }
    return [*chosen[reward](), format_reward if thinking else answer_format_reward]
