"""The Scorer: one picture, one score with its uncertainty, the same every time. There is no second way to a score."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from vqr1.data import open_picture
from vqr1.policy import load_policy
from vqr1.prompts import messages, parse_reasoning, parse_score
from vqr1.thurstone import comparative_probability

ESTIMATES = ("expected", "greedy", "sample")
OPEN = "<answer>"

# The scores d.dd as one tree of 61 tokens after the prefix: its last token, 5 first digits, 5 points, 50 second digits.
_DEPTH = torch.tensor([0] + [1] * 5 + [2] * 5 + [3] * 50)
_PARENT = torch.tensor([0] + [0] * 5 + [1 + d for d in range(5)] + [6 + d for d in range(5) for _ in range(10)])
_DIGITS = torch.arange(10, dtype=torch.float64)
_FIRST, _SECOND = _DIGITS[1:6], _DIGITS[1:6, None] + _DIGITS / 10  # (5,), (5, 10)
_VALUES = torch.cat([(_SECOND[..., None] + _DIGITS / 100).flatten(), _SECOND.flatten(), _FIRST])  # (555,)


def _ancestors() -> torch.Tensor:
    """Return which token of the tree sees which: itself and its ancestors, (61, 61) bool."""
    sees = torch.eye(61, dtype=torch.bool)
    for node in range(1, 61):
        sees[node] |= sees[_PARENT[node]]
    return sees


_SEES = _ancestors()


@dataclass
class Score:
    """A picture's score (1..5, higher is better) and its standard deviation.

    answers: the completions it was read from (up to the number for an expected score); mass: the probability of answers
    between 1 and 5.99, of which the expected score is the mean (NaN for other estimates); error: why there is no score.
    """

    score: float = math.nan
    std: float = math.nan
    answers: list[str] = field(default_factory=list)
    reasoning: str = ""
    mass: float = math.nan
    error: str = ""


class Scorer:
    """Score pictures with a policy.

    estimate="expected": the mean and deviation of the model's own distribution over the answers d.dd, d.d and d with
    a first digit of 1..5, exact, from token probabilities; with thinking, given the greedy reasoning. "greedy": the parsed greedy answer.
    "sample": mean and deviation (ddof 1) of the parseable ones among k answers sampled at temperature 1, the
    paper's; `seed` makes them repeatable. A picture that cannot be read or whose answer cannot be parsed has a NaN
    score and an error. policy: a name or path for `load_policy`, or a (model, processor) pair.
    """

    def __init__(
        self, policy: str | Path | tuple[PreTrainedModel, ProcessorMixin] = "tiny-policy", thinking: bool = False,
        estimate: str = "expected", k: int = 6, batch_size: int = 16, max_new_tokens: int = 256, seed: int = 0,
    ):  # fmt: skip
        if estimate not in ESTIMATES:
            raise ValueError(f"estimate {estimate!r} is unknown; use one of {', '.join(ESTIMATES)}")
        if estimate == "sample" and k < 2:
            raise ValueError(f"k is {k}: a mean and a deviation need at least 2 samples")
        self.model, self.processor = policy if isinstance(policy, tuple) else load_policy(policy)
        self.thinking, self.estimate, self.k, self.seed = thinking, estimate, k, seed
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        if estimate == "expected":
            self.digits, self.point, self.end = _answer_tokens(self.processor.tokenizer)

    def score(self, images: Sequence[Image.Image | str | Path]) -> list[Score]:
        """Return one Score per picture (PIL image or path), in order."""
        return [score for batch in self.batches(images) for score in batch]

    def batches(self, images: Sequence[Image.Image | str | Path]) -> Iterator[list[Score]]:
        """Yield the scores of one batch of pictures after the other."""
        for start in range(0, len(images), self.batch_size):
            yield self._batch(images[start : start + self.batch_size])

    def compare(self, a: Image.Image | str | Path, b: Image.Image | str | Path) -> float:
        """Return P(a looks better than b) under Thurstone's law, from both score distributions."""
        one, two = self.score([a, b])
        if one.error or two.error:
            raise ValueError(f"cannot compare: {one.error or two.error}")
        if math.isnan(one.std + two.std):
            raise ValueError("cannot compare scores without a deviation: use estimate='expected', or 'sample' with two parseable answers")
        mean, variance = torch.tensor([[one.score], [two.score]]), torch.tensor([one.std**2, two.std**2])
        return float(comparative_probability(mean, variance, mean[:, 0], variance)[0, 1, 0])

    def rank(self, images: Sequence[Image.Image | str | Path]) -> list[int]:
        """Return the positions of the pictures from best to worst; those without a score come last."""
        scores = self.score(images)
        return sorted(range(len(scores)), key=lambda i: (bool(scores[i].error), -scores[i].score if not scores[i].error else 0))

    def describe(self, image: Image.Image | str | Path) -> str:
        """Return the policy's reasoning about a picture; raises ValueError where it gives none."""
        thinker = Scorer((self.model, self.processor), thinking=True, max_new_tokens=self.max_new_tokens)
        score = thinker.score([image])[0]
        if score.error:
            raise ValueError(score.error)
        return score.reasoning

    def _batch(self, images: Sequence[Image.Image | str | Path]) -> list[Score]:
        scores = [Score() for _ in images]
        pictures = []
        for image, score in zip(images, scores):
            try:
                pictures.append(image.convert("RGB") if isinstance(image, Image.Image) else open_picture(image))
            except (OSError, ValueError) as error:  # OSError: a PIL image that was opened but cannot be decoded
                score.error = str(error)
        good = [score for score in scores if not score.error]
        if good:
            with torch.no_grad(), _evaluating(self.model):
                (self._expected if self.estimate == "expected" else self._parsed)(pictures, good)
        return scores

    def _inputs(self, pictures: list[Image.Image], start: str = "") -> dict:
        prompt = self.processor.apply_chat_template(messages(self.thinking), add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=[prompt + start] * len(pictures), images=pictures, padding=True, return_tensors="pt")
        return inputs.to(self.model.device)

    def _generate(self, inputs: dict, **options):
        own = self.model.generation_config
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, repetition_penalty=1.0, return_dict_in_generate=True,
            eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, **options,
        )  # fmt: skip
        return self.model.generate(**inputs, generation_config=config, tokenizer=self.processor.tokenizer)

    def _parsed(self, pictures: list[Image.Image], scores: list[Score]) -> None:
        inputs = self._inputs(pictures)
        options = {"do_sample": False}
        if self.estimate == "sample":
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": self.k}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            ids = self._generate(inputs, **options).sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for score, answers in zip(scores, _chunks(texts, len(texts) // len(scores))):
            values = torch.tensor([parse_score(text) for text in answers], dtype=torch.float64)
            values = values[~values.isnan()]
            score.answers, score.reasoning = answers, parse_reasoning(answers[0])
            if not len(values):
                score.error = f"no score in the answer {answers[0][:200]!r}"
            else:
                score.score = float(values.mean())
                score.std = float(values.std()) if len(values) > 1 else math.nan

    def _expected(self, pictures: list[Image.Image], scores: list[Score]) -> None:
        if self.thinking:
            inputs = self._inputs(pictures)
            out = self._generate(inputs, do_sample=False, stop_strings=[OPEN])
            ids, length = out.sequences, inputs["input_ids"].shape[1]
            pad = self.model.generation_config.pad_token_id
            lengths = (ids[:, length:] != pad).long().cumsum(1).argmax(1) + 1  # up to the last token that is no padding
            texts = [self.processor.tokenizer.decode(row[length : length + n], skip_special_tokens=True) for row, n in zip(ids, lengths)]
            kept = torch.arange(ids.shape[1] - length, device=ids.device) < lengths[:, None]
            mask = torch.cat([inputs["attention_mask"], kept.long()], 1)
            last = length + lengths - 1
        else:
            inputs = self._inputs(pictures, OPEN)
            out = self.model(**inputs, use_cache=True, logits_to_keep=1)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            texts, last = [OPEN] * len(scores), torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        probability = self._answers(ids, mask, last, out.past_key_values)  # (B, 555)
        for score, text, p in zip(scores, texts, probability.double().cpu()):
            score.answers, score.reasoning = [text], parse_reasoning(text)
            score.mass = float(p.sum())
            if not text.endswith(OPEN):
                score.error = f"no {OPEN} in {self.max_new_tokens} tokens: {text[:200]!r}"
            elif score.mass < 0.5:
                score.error = f"only {score.mass:.2f} of the probability is on scores between 1 and 5.99 after {text[-200:]!r}"
            else:
                mean = float((p * _VALUES).sum()) / score.mass
                score.score, score.std = mean, math.sqrt(max(0.0, float((p * (_VALUES - mean) ** 2).sum()) / score.mass))

    def _answers(self, ids: torch.Tensor, mask: torch.Tensor, last: torch.Tensor, cache) -> torch.Tensor:
        """Return the probability of each of `_VALUES` after each row's `last` token, (B, 555), in one forward.

        All 5 x 10 beginnings are one tree under a 4-D mask: every token sees the prefix and its ancestors.
        ids, mask: (B, T) prefix tokens and which are real; last: (B,) position of the last real one.
        """
        rows, size, device = len(ids), cache.get_seq_length(), ids.device
        digits, point = self.digits.to(device), self.point
        tail = torch.cat([digits[1:6], torch.full((5,), point, device=device), digits.repeat(5)])
        tree = torch.cat([ids.gather(1, last[:, None]), tail.expand(rows, -1)], 1)  # (B, 61)
        before = torch.arange(mask.shape[1], device=device) < last[:, None]  # the last token is fed again
        before = (mask.bool() & before)[:, :size]
        sees = torch.cat([before[:, None].expand(-1, 61, -1), _SEES.to(device).expand(rows, -1, -1)], 2)
        bias = torch.zeros(sees.shape, dtype=self.model.dtype, device=device).masked_fill(~sees, torch.finfo(self.model.dtype).min)
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        position = before.sum(1, keepdim=True) + inner.model.rope_deltas + _DEPTH.to(device)  # (B, 61)
        logits = self.model(
            input_ids=tree, attention_mask=bias[:, None], position_ids=position.expand(3, -1, -1), past_key_values=cache, use_cache=True
        ).logits  # (B, 61, V)
        p = logits.float().softmax(-1)
        first, dot = p[:, 0, digits[1:6]], p[:, 1:6, point]  # (B, 5)
        second = p[:, 6:11][..., digits]  # (B, 5, 10)
        third = p[:, 11:61][..., digits].reshape(rows, 5, 10, 10)
        one, two = first * p[:, 1:6, self.end], (first * dot)[..., None] * second  # "d</", "d.d"
        short = two * p[:, 11:61, self.end].reshape(rows, 5, 10)  # "d.d</"
        return torch.cat([(two[..., None] * third).flatten(1), short.flatten(1), one], 1)


def _answer_tokens(tokenizer) -> tuple[torch.Tensor, int, int]:
    """Return the ids of the ten digits, of the point, and of what ends a number; each digit must be one token."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in "0123456789."]
    if any(len(i) != 1 for i in ids):
        raise ValueError("this tokenizer has no token of its own for every digit: use estimate='greedy' or 'sample'")
    return torch.tensor([i[0] for i in ids[:10]]), ids[10][0], tokenizer.encode("</answer>", add_special_tokens=False)[0]


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@contextmanager
def _evaluating(model: torch.nn.Module):
    """Put the model into eval mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
