"""The Scorer: one picture, one score with its uncertainty, the same every time.

It opens pictures, asks an engine (`vqr1.engines`) for answers, and reads scores off them: the expected, the
greedy or the sampled one.
"""

from __future__ import annotations

import copy
import html
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vqr1.data import ahead
from vqr1.data.images import TAKEN, Picture, is_one, listed, read_picture
from vqr1.engines import load_engine
from vqr1.engines.answers import NOT_NUMBERS, OPEN, VALUES, Answer, Prepared
from vqr1.policy import CALIBRATION, policy_path, trained_prompt
from vqr1.prompts import SCORE_MAX, SCORE_MIN, messages, named_distortions, parse_reasoning, parse_score
from vqr1.thurstone import comparative_probability

if TYPE_CHECKING:
    import pandas as pd

    from vqr1.calibration import Calibration

SETTINGS = (
    "thinking",
    "estimate",
    "k",
    "batch_size",
    "max_new_tokens",
    "seed",
    "numbered",
    "repetition_penalty",
)
"""What may change once a policy is loaded."""
OFFICIAL = {"estimate": "greedy", "numbered": True, "max_new_tokens": 2048, "repetition_penalty": 1.05}
"""Settings of VisualQuality-R1's own inference, thinking or not: ``Scorer(policy, **OFFICIAL)``.

It samples at the checkpoint's temperature of 1e-6, which is greedy. Source: the official README, and
generation_config.json of Qwen2.5-VL, from which the checkpoint is derived.
"""
ESTIMATES = ("expected", "greedy", "sample")
WINDOW = 4
"""Most batches that are decoded and scored together."""
DRAWS = 10_000
"""Draws of all scores, for rank intervals."""


@dataclass
class Score:
    """A picture's score (1..5, higher is better), and how its answers spread.

    std: the spread, the standard deviation of the policy's answers. It says how sure the policy is, not how
        far it is off: no error bar.
    answers: the completions it was read from (expected score: the text before the number).
    reasoning: what the first of them thinks.
    mass: the probability of the answers that an expected score is the mean of; NaN for other estimates.
    note: what was done to read the picture, as "frame 1 of several", and whether answers were off the scale.
    error: why there is no score.
    low, high: the error bar, where the policy is calibrated, else NaN: 95% of pictures' mean opinion scores,
        on the score's scale, are within it (`vqr1.calibration.Calibration.interval`).
    """

    score: float = math.nan
    std: float = math.nan
    answers: list[str] = field(default_factory=list)
    reasoning: str = ""
    mass: float = math.nan
    note: str = ""
    error: str = ""
    low: float = math.nan
    high: float = math.nan

    @property
    def bar(self) -> str:
        """How certain the score is, in words: its 95% interval, or the spread where that is unknown.

        >>> Score(3.2, 0.4).bar, Score(3.2, 0.4, low=2.5, high=3.7).bar
        ('± 0.40', '(95%: 2.5 to 3.7)')
        """
        return f"± {self.std:.2f}" if math.isnan(self.low) else f"(95%: {self.low:.1f} to {self.high:.1f})"


@dataclass
class Description:
    """A policy's words on a picture, the KADID-10k distortions in them, and the score given these words."""

    text: str
    distortions: list[str]
    score: Score

    def __str__(self) -> str:
        if self.score.error:
            return self.score.error
        named = f"\nnames: {', '.join(self.distortions)}" if self.distortions else ""
        return f"{self.text}{named}\nscore {self.score.score:.2f} {self.score.bar}"

    def _repr_html_(self) -> str:
        if self.score.error:
            return f"<p>{html.escape(self.score.error)}</p>"
        named = ", ".join(self.distortions) or "none"
        return (
            f"<p><em>{html.escape(self.text)}</em></p><p>distortions named: {html.escape(named)}<br>"
            f"score <b>{self.score.score:.2f}</b> {self.score.bar} (1 very poor, 5 excellent)</p>"
        )


class Scorer:
    """Score pictures with a policy.

    Pictures are decoded ahead in background threads. One that cannot be read, whose answer cannot be parsed,
    or for which the model gives NaN has a NaN score and an error.

    Estimates:
        "expected": exact mean and deviation, by token probabilities, of the model's own distribution over the
            answers that `parse_score` reads and that begin with their number: 0 to 10, up to two decimals
            (`vqr1.engines.answers`). A number counts where no digit, point or sign of doubt follows it. What
            comes later is not looked at, so `mass` is too large by the probability of answers such as
            `3.5 or 4`. Only the likeliest answer is followed to its end: if `parse_score` does not read it,
            the row is an error. With thinking, the reasoning is generated greedily first. The score is
            conditional on it: other reasoning would give another mean, which ``std`` does not show.
        "greedy": the parsed greedy answer; ``note`` says when it is off the scale.
        "sample": mean and deviation (ddof 1) of the answers between 1 and 5 among k sampled at temperature 1;
            ``note`` says how many were off the scale. The paper takes the mean of all, where one 9000 would
            dominate.

    Args:
        policy: a name or path for `load_policy`, or a pair (model, processor); for vLLM, and what of it was
            not run, see `vqr1.engines.vllm`.
        thinking: whether the model reasons before it answers. None: as it was trained, where its folder says
            so (`vqr1.policy.PROMPT`), else not.
        estimate: "expected", "greedy" or "sample".
        k: completions of each picture, at least 2, for "sample".
        batch_size: pictures the model sees together, at most; fewer if they are large.
        max_new_tokens: of a completion, or of a reasoning.
        seed: makes samples repeatable in the same batch.
        engine: "transformers" or "vllm".
        numbered: "Picture 1: " before the picture (`prompts.messages`). None: as for `thinking`.
        quantize: 4-bit weights, as for `load_policy`.
        pixels: (smallest, largest) number of pixels that a picture is scaled to, as for `load_policy`.
        repetition_penalty: of "greedy" and "sample": logits of tokens that are in the prompt or were said are
            divided by it (if negative, multiplied). An expected score is of the model's own distribution.

    Where the policy's folder has a calibration (`vqr1 calibrate`) for scores read off in this way, they have
    an error bar, and `compare` and `rank` go by it. A loaded policy gets none by itself, as it may have been
    trained on since: set ``scorer.calibration = Calibration.load(folder)``.
    """

    lower_better = False
    score_range = (SCORE_MIN, SCORE_MAX)

    def __init__(
        self,
        policy: str | Path | tuple = "people-ranker",
        thinking: bool | None = None,
        estimate: str = "expected",
        k: int = 6,
        batch_size: int = 16,
        max_new_tokens: int = 256,
        seed: int = 0,
        engine: str = "transformers",
        numbered: bool | None = None,
        quantize: bool | None = None,
        pixels: Sequence[int] | None = None,
        repetition_penalty: float = 1.0,
    ):
        trained = trained_settings(policy)
        self.thinking = trained["thinking"] if thinking is None else thinking
        self.numbered = trained["numbered"] if numbered is None else numbered
        self.estimate, self.k, self.seed = estimate, k, seed
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.quantize, self.pixels, self.repetition_penalty = quantize, pixels, repetition_penalty
        self._check()
        self.calibration = None if isinstance(policy, tuple) else _calibration(policy)
        self.engine = load_engine(engine, policy, quantize, pixels)
        self.engine.check(estimate)

    def _check(self) -> None:
        if self.estimate not in ESTIMATES:
            raise ValueError(f"estimate {self.estimate!r} is unknown; use one of {', '.join(ESTIMATES)}")
        if self.estimate == "sample" and self.k < 2:
            raise ValueError(f"k is {self.k}: a mean and a deviation need at least 2 samples")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: score at least one picture at a time")

    def settings(self) -> dict:
        """Return how scores are read off, which a calibration must have in common with them."""
        how = {"estimate": self.estimate, "thinking": self.thinking, "numbered": self.numbered}
        loaded = {"quantize": self.quantize, "pixels": self.pixels and list(self.pixels)}
        how |= {
            key: value for key, value in loaded.items() if value is not None
        }  # not as the policy is saved
        if self.estimate != "expected" and self.repetition_penalty != 1:
            how["repetition_penalty"] = self.repetition_penalty
        return how | {"k": self.k} if self.estimate == "sample" else how

    @property
    def calibrated(self) -> Calibration | None:
        """The calibration, if it holds for these settings."""
        holds = self.calibration is not None and self.calibration.settings == self.settings()
        return self.calibration if holds else None

    def with_(self, **settings) -> Scorer:
        """Return a scorer of the same loaded policy with other settings: ``scorer.with_(estimate="sample")``.

        Raises TypeError for an unknown setting, ValueError as the constructor does.
        """
        for name in settings:
            if name not in SETTINGS:
                raise TypeError(f"{name} is no setting of a loaded scorer; use {', '.join(SETTINGS)}")
        other = copy.copy(self)
        vars(other).update(settings)
        other._check()
        other.engine.check(other.estimate)
        return other

    def score(self, images: Picture | Iterable[Picture] | torch.Tensor) -> list[Score]:
        """Return one Score per picture, in order; of one picture a list of one.

        A list's item that cannot be read, or is no picture, gets a NaN score and an error.

        Args:
            images: a path, a file opened in binary mode or its bytes, a PIL image, a numpy array (H, W) or
                (H, W, 3 or 4), a tensor (3, H, W); a list or any iterable of these; or a batch, an array
                (B, H, W, 3) or a tensor (B, 3, H, W). Pixels are uint8 0..255 or floats 0..1 (`images.SLACK`
                outside is clipped).

        Raises:
            TypeError: `images` is no picture and no list.
            ValueError: an array or tensor has another shape or range, or NaN.
        """
        return [score for window in self.batches(images) for score in window]

    def batches(self, images: Picture | Iterable[Picture] | torch.Tensor) -> Iterator[list[Score]]:
        """Yield scores in the order of the pictures (as `score` takes them), a window at a time.

        A window is `WINDOW` batches, or as many pictures as take `ahead.HELD` bytes. While it is scored the
        next one is being decoded.
        """
        most = WINDOW * self.batch_size
        with closing(ahead.windows(listed(images), self._open, _held, most)) as windows:
            for opened in windows:
                scores = self._window(opened)
                opened.clear()
                yield scores

    def __call__(self, images: Picture | Iterable[Picture] | torch.Tensor) -> torch.Tensor:
        """Return the scores (B,) as a tensor, without gradients, as a reward for other training.

        images: as for `score`; diffusers' pipelines return a tensor (B, 3, H, W) in 0..1.
        A picture without a score is NaN. Raises TypeError and ValueError as `score` does.
        """
        return torch.tensor([score.score for score in self.score(images)])

    def compare(self, a: Picture | torch.Tensor, b: Picture | torch.Tensor) -> float:
        """Return P(a looks better than b): the calibrated one, else by Thurstone's law from both spreads.

        a, b: one picture each, as for `score`. Raises TypeError for anything else, ValueError where one has
        no score.
        """
        for picture in (a, b):
            if not is_one(picture):
                raise TypeError(f"{type(picture).__name__} is not one picture; give {TAKEN}")
        one, two = self.score([a, b])
        if one.error or two.error:
            raise ValueError(f"cannot compare: {one.error or two.error}")
        if self.calibrated and not math.isnan(one.low + two.low):
            return float(self.calibrated.probability(one.score, one.std, two.score, two.std))
        if math.isnan(one.std + two.std):
            raise ValueError(
                "cannot compare scores without a deviation: use estimate='expected', or 'sample' with two "
                "parseable answers"
            )
        mean, variance = torch.tensor([[one.score], [two.score]]), torch.tensor([one.std**2, two.std**2])
        return float(comparative_probability(mean, variance, mean[:, 0], variance)[0, 1, 0])

    def rank(self, images: Picture | Iterable[Picture] | torch.Tensor) -> pd.DataFrame:
        """Return the pictures from best to worst; those without a score come last.

        images: as for `score`, and so are errors. Columns: image (position in the input), score, std, lo
        and hi (the score's 95% interval: calibrated, else under Thurstone's normal law), rank_lo and rank_hi
        (95% interval of the rank, 1 = best, over `DRAWS` joint draws of all scores by the same), error.
        """
        import pandas as pd  # takes as long as scoring a few pictures

        scores = self.score(images)
        table = pd.DataFrame(
            {"image": range(len(scores))}
            | {key: [getattr(s, key) for s in scores] for key in ("score", "std", "error")}
        )
        good = table[table["error"] == ""].sort_values("score", ascending=False, kind="stable")
        center, std = good["score"].to_numpy(), good["std"].to_numpy()
        low, high = center - 1.96 * std, center + 1.96 * std
        if self.calibrated:
            low, high = self.calibrated.interval(center, std)
            center, std = self.calibrated.mos(center), self.calibrated.noise * self.calibrated.error(std)
        drawn = (
            np.random.default_rng(self.seed).normal(center, std, (DRAWS, len(good)))
            if len(good)
            else np.empty((1, 0))
        )
        ranks = 1 + np.argsort(np.argsort(-drawn, axis=1), axis=1)  # (DRAWS, pictures)
        best, worst = np.quantile(ranks, (0.025, 0.975), axis=0, method="nearest")
        good = good.assign(lo=low, hi=high, rank_lo=best, rank_hi=worst)
        ranked = pd.concat([good, table[table["error"] != ""]], ignore_index=True)
        columns = ["image", "score", "std", "lo", "hi", "rank_lo", "rank_hi", "error"]
        return ranked.reindex(columns=columns).astype({"rank_lo": "Int64", "rank_hi": "Int64"})

    def describe(self, images: Picture | Iterable[Picture] | torch.Tensor) -> Description | list[Description]:
        """Return what the policy thinks of a picture, and its score; for many, a list in order.

        images: as for `score`. One picture without a score raises ValueError; in a list, its description says
            why.
        """
        scores = self.with_(thinking=True, estimate="expected").score(images)
        described = [
            Description(score.reasoning, named_distortions(score.reasoning), score) for score in scores
        ]
        if not is_one(images):
            return described
        if scores[0].error:
            raise ValueError(scores[0].error)
        return described[0]

    def _open(self, image: Picture | torch.Tensor) -> tuple[Score, Prepared | None]:
        """Return a picture's empty score, with note or error, and the picture as the engine takes it."""
        try:
            picture = read_picture(image)
            return Score(note=picture.info.get("note", "")), self.engine.prepare(picture)
        except (TypeError, ValueError) as error:
            return Score(error=str(error)), None

    def _window(self, opened: list[tuple[Score, Prepared | None]]) -> list[Score]:
        ready = [(score, prepared) for score, prepared in opened if prepared is not None]
        if ready:
            answers = self._ask([prepared for _, prepared in ready])
            for (score, _), answer in zip(ready, answers, strict=True):
                self._read(score, answer)
                if self.calibrated and not score.error:
                    score.low, score.high = map(float, self.calibrated.interval(score.score, score.std))
        return [score for score, _ in opened]

    def _ask(self, prepared: list[Prepared]) -> list[Answer]:
        chat = messages(self.thinking, self.numbered)
        if self.estimate == "expected":
            return self.engine.distributions(
                chat, prepared, self.thinking, self.max_new_tokens, self.batch_size
            )
        k = self.k if self.estimate == "sample" else 1
        return self.engine.texts(
            chat, prepared, k, self.max_new_tokens, self.seed, self.batch_size, self.repetition_penalty
        )

    def _read(self, score: Score, answer: Answer) -> None:
        """Fill in a score from what the engine said."""
        score.answers, score.error = answer.texts, answer.error
        if not answer.texts:
            return
        score.reasoning = parse_reasoning(answer.texts[0])
        if self.estimate == "expected":
            self._read_distribution(score, answer)
        else:
            self._read_texts(score, answer.texts)

    def _read_texts(self, score: Score, texts: list[str]) -> None:
        """Take the mean of the completions; off the scale, only a greedy one counts."""
        values = torch.tensor([parse_score(text) for text in texts], dtype=torch.float64)
        values = values[~values.isnan()]
        inside = values[(values >= SCORE_MIN) & (values <= SCORE_MAX)]
        outside = len(values) - len(inside)
        off = f"{outside} of {len(texts)} answers off the scale {SCORE_MIN:.0f} to {SCORE_MAX:.0f}"
        if outside:
            score.note = "; ".join(filter(None, [score.note, off]))
        kept = inside if self.estimate == "sample" else values
        if score.error:
            return
        if not len(kept):
            score.error = f"no score in the answer {texts[0][:200]!r}" + f", and {off}" * bool(outside)
            return
        score.score = float(kept.mean())
        score.std = float(kept.std()) if len(kept) > 1 else math.nan

    def _read_distribution(self, score: Score, answer: Answer) -> None:
        """Take mean and deviation of the answers after a text."""
        text, p = answer.texts[0], answer.probability.sum(0)
        score.mass = float(p.sum())
        if score.error:
            return
        if not text.endswith(OPEN):
            score.error = f"no {OPEN} in {self.max_new_tokens} tokens: {text[:200]!r}"
        elif math.isnan(score.mass):
            score.error = NOT_NUMBERS
        elif not score.mass >= 0.5:
            score.error = (
                f"only {score.mass:.2f} of the probability is on numbers after {text[-200:]!r}; "
                f"the likeliest answer is {answer.likeliest!r}"
            )
        elif math.isnan(parse_score(OPEN + answer.likeliest)):
            score.error = f"the likeliest answer is not one number: {answer.likeliest!r}"
        else:
            mean = float((p * VALUES).sum()) / score.mass
            variance = float((p * (VALUES - mean) ** 2).sum()) / score.mass
            score.score, score.std = mean, math.sqrt(max(0.0, variance))


DEFAULTS = {name: one.default for name, one in inspect.signature(Scorer).parameters.items()}
"""The Scorer's settings where none is given."""


def trained_settings(policy: str | Path | tuple) -> dict[str, bool]:
    """Return `thinking` and `numbered` as a policy was trained; False where its folder does not say.

    >>> trained_settings("tiny-policy")
    {'thinking': False, 'numbered': False}
    """
    trained = trained_prompt(policy)
    return {"thinking": trained.get("thinking", False), "numbered": trained.get("picture_number", False)}


def _calibration(policy: str | Path) -> Calibration | None:
    """Return the calibration in a policy's folder, if there is one."""
    folder = policy_path(policy)
    if not (folder / CALIBRATION).is_file():
        return None
    from vqr1.calibration import Calibration  # it imports pandas, which takes as long as some pictures

    return Calibration.load(folder)


def _held(opened: tuple[Score, Prepared | None]) -> int:
    """Return the bytes that an opened picture takes."""
    return opened[1].nbytes if opened[1] else 0
