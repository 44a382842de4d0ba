"""The Scorer: one picture, one score with its uncertainty, the same every time. There is no second way to a
score.
"""

import copy
import html
import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    SuppressTokensLogitsProcessor,
)

from vqr1.data.images import TAKEN, Picture, is_one, listed, read_picture
from vqr1.engines import answers
from vqr1.engines.answers import OPENINGS, RARE, VALUES
from vqr1.engines.vllm import Refused, Vllm, load_vllm
from vqr1.policy import base_of, load_policy, never_sampled
from vqr1.prompts import SCORE_MAX, SCORE_MIN, messages, named_distortions, parse_reasoning, parse_score
from vqr1.sharing import prefill
from vqr1.thurstone import comparative_probability

ESTIMATES = ("expected", "greedy", "sample")
ENGINES = ("transformers", "vllm")
OPEN = "<answer>"
WINDOW = 4
"""Batches that are decoded, sorted by size and scored together, at most."""
HELD = 2**30
"""Bytes of decoded pictures at which a window is full: four of 12 megapixels as Qwen's processor makes them,
288 MB each.
"""
PATCHES = 2**16
"""Of a batch, padding included, at most; a single picture may have more. A picture of 12 megapixels has
61,204.
"""
THREADS = 4
"""Pictures decoded at a time."""
DRAWS = 10_000
"""Of all scores, for the intervals of ranks."""

NOT_NUMBERS = "the model's output holds NaN or infinity; in fp16, load the policy with dtype=torch.float32"
AHEAD = 12
"""Tokens that an answer is followed for, to see what it is."""


@dataclass
class Score:
    """A picture's score (1..5, higher is better) and its standard deviation.

    answers: the completions it was read from (up to the number for an expected score); mass: the
    probability of the answers that the expected score is the mean of (NaN for other estimates); note: what
    was done to the picture to read it, as "frame 1 of several", and whether answers were off the scale;
    error: why there is no score.
    """

    score: float = math.nan
    std: float = math.nan
    answers: list[str] = field(default_factory=list)
    reasoning: str = ""
    mass: float = math.nan
    note: str = ""
    error: str = ""


@dataclass
class Description:
    """What the policy thinks of a picture: its words, the KADID-10k distortions they name, and the score
    given these words.
    """

    text: str
    distortions: list[str]
    score: Score

    def __str__(self) -> str:
        if self.score.error:
            return self.score.error
        named = f"\nnames: {', '.join(self.distortions)}" if self.distortions else ""
        return f"{self.text}{named}\nscore {self.score.score:.2f} ± {self.score.std:.2f}"

    def _repr_html_(self) -> str:
        if self.score.error:
            return f"<p>{html.escape(self.score.error)}</p>"
        named = ", ".join(self.distortions) or "none"
        return (
            f"<p><em>{html.escape(self.text)}</em></p><p>distortions named: {html.escape(named)}<br>"
            f"score <b>{self.score.score:.2f}</b> ± {self.score.std:.2f} (1 very poor, 5 excellent)</p>"
        )


class Scorer:
    """Score pictures with a policy.

    estimate="expected": the mean and deviation of the model's own distribution over the answers that
    `parse_score` reads and that begin with their number: 0 to 10 with up to two decimals
    (`vqr1.engines.answers`), exact, from token probabilities. A number counts where no digit, point or sign
    of doubt follows it; what comes later is not looked at, so `mass` is too large by the probability of
    answers as `3.5 or 4`, and the likeliest answer alone is followed to its end: if `parse_score` does not
    read it, the row is an error. With thinking, the reasoning is generated greedily first, and mean and
    deviation are given that reasoning: another reasoning would have another mean, which ``std`` does not
    show. "greedy": the parsed greedy answer; ``note`` says when it is off the scale. "sample": mean and
    deviation (ddof 1) of the answers between 1 and 5 among k sampled at temperature 1; the paper takes the
    mean of all, but one answer of 9000 would be the score. ``note`` says how many were off the scale.
    `seed` makes them repeatable in the same batch. A picture that cannot be read, whose answer cannot be
    parsed, or for which the model gives NaN has a NaN score and an error. policy: a name or path for
    `load_policy`, or a (model, processor) pair. numbered: "Picture 1: " before the picture
    (`prompts.messages`).

    engine="vllm" asks vLLM instead of transformers; see `vqr1.engines.vllm`, also for what was not run.

    Pictures are decoded ahead in background threads, sorted by size into batches (`batch_size` pictures at
    most, fewer if they are large), and each goes through the vision tower once.
    """

    def __init__(
        self,
        policy: str | Path | tuple[PreTrainedModel, ProcessorMixin] = "tiny-policy",
        thinking: bool = False,
        estimate: str = "expected",
        k: int = 6,
        batch_size: int = 16,
        max_new_tokens: int = 256,
        seed: int = 0,
        engine: str = "transformers",
        numbered: bool = False,
    ):
        if estimate not in ESTIMATES:
            raise ValueError(f"estimate {estimate!r} is unknown; use one of {', '.join(ESTIMATES)}")
        if estimate == "sample" and k < 2:
            raise ValueError(f"k is {k}: a mean and a deviation need at least 2 samples")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: score at least one picture at a time")
        if engine not in ENGINES:
            raise ValueError(f"engine {engine!r} is unknown; use one of {', '.join(ENGINES)}")
        if engine == "vllm":
            policy = load_vllm(policy)
        self.model, self.processor = policy if isinstance(policy, tuple) else load_policy(policy)
        self.thinking, self.estimate, self.k, self.seed = thinking, estimate, k, seed
        self.batch_size, self.max_new_tokens, self.numbered = batch_size, max_new_tokens, numbered
        if estimate == "expected":
            self.tokens = answers.tokens_of(self.processor.tokenizer)
            self.tag = self.processor.tokenizer.encode(OPEN, add_special_tokens=False)[-1]  # what ends `OPEN`
        prompt = self.processor.apply_chat_template(
            messages(thinking, numbered), add_generation_prompt=True, tokenize=False
        )
        texts = prompt.split(self.processor.image_token)  # before and after the picture
        self.answered = (
            estimate == "expected" and not thinking
        )  # the answer's tag can be put in the model's mouth
        self.before, self.after = (
            torch.tensor(self.processor.tokenizer(text).input_ids)
            for text in (texts[0], texts[1] + OPEN * self.answered)
        )

    def score(self, images: Picture | Iterable[Picture] | torch.Tensor) -> list[Score]:
        """Return one Score per picture, in order; of one picture a list of one.

        images: a path, a file opened in binary mode or its bytes, a PIL image, a numpy array (H, W) or
            (H, W, 3 or 4), a tensor (3, H, W); a list or any iterable of these; or a batch, an array (B, H, W, 3) or
            a tensor (B, 3, H, W). Pixels are uint8 0..255 or floats 0..1 (`pictures.SLACK` outside is clipped).
        A picture of a list that cannot be read, or is none, has a NaN score and an error. Raises TypeError
        where `images` is no picture and no list, ValueError for an array or tensor of another shape or
        range, or with NaN.
        """
        return [score for window in self.batches(images) for score in window]

    def batches(self, images: Picture | Iterable[Picture] | torch.Tensor) -> Iterator[list[Score]]:
        """Yield scores in the order of the pictures (as `score` takes them), a window at a time.

        A window is `WINDOW` batches, or as many pictures as take `HELD` bytes.

        While a window is scored the next one is being decoded: in memory are two windows, one more picture
        per thread, and what was handed over as pictures. The pictures of a window are batched by size, so
        that little is padded.
        """
        images, room, most = enumerate(listed(images)), _Room(2 * HELD), WINDOW * self.batch_size
        queue = deque()  # of what is decoded or will be, in order
        with ThreadPoolExecutor(THREADS, "decode") as pool:

            def ask() -> None:
                queue.extend(
                    pool.submit(self._decode, room, *item) for item in islice(images, most - len(queue))
                )

            try:
                ask()
                prefix = self._prefix() if queue and not isinstance(self.model, Vllm) else None
                while queue:
                    opened, held = [], 0
                    while queue and len(opened) < most and held < HELD:
                        opened.append(queue.popleft().result())
                        held += _bytes(opened[-1])
                    ask()
                    scores = self._window(opened, prefix)
                    del opened
                    room.leave(held)
                    yield scores
            finally:
                room.close()
                pool.shutdown(cancel_futures=True)

    def _decode(self, room: "_Room", place: int, image: Picture) -> dict | str:
        """Return what `_open` does, once there is room for it."""
        if not room.enter(place):
            return "not decoded: scoring has ended"
        opened = self._open(image)
        room.take(_bytes(opened))
        return opened

    def __call__(self, images: Picture | Iterable[Picture] | torch.Tensor) -> torch.Tensor:
        """Return the scores (B,) as a tensor, without gradients: a reward for other people's training.

        images: as for `score`; diffusers' pipelines return a tensor (B, 3, H, W) in 0..1.
        A picture without a score is NaN. Raises TypeError and ValueError as `score` does.
        """
        return torch.tensor([score.score for score in self.score(images)])

    def compare(self, a: Picture | torch.Tensor, b: Picture | torch.Tensor) -> float:
        """Return P(a looks better than b) under Thurstone's law, from both score distributions.

        a, b: one picture each, as for `score`. Raises TypeError for anything else, ValueError where one has
        no score.
        """
        for picture in (a, b):
            if not is_one(picture):
                raise TypeError(f"{type(picture).__name__} is not one picture; give {TAKEN}")
        one, two = self.score([a, b])
        if one.error or two.error:
            raise ValueError(f"cannot compare: {one.error or two.error}")
        if math.isnan(one.std + two.std):
            raise ValueError(
                "cannot compare scores without a deviation: use estimate='expected', or 'sample' with two parseable answers"
            )
        mean, variance = torch.tensor([[one.score], [two.score]]), torch.tensor([one.std**2, two.std**2])
        return float(comparative_probability(mean, variance, mean[:, 0], variance)[0, 1, 0])

    def rank(self, images: Picture | Iterable[Picture] | torch.Tensor) -> pd.DataFrame:
        """Return the pictures from best to worst; those without a score come last.

        images: as for `score`, and so are errors. Columns: image (position in the input), score, std, lo
        and hi (the score's 95% interval under Thurstone's normal law), rank_lo and rank_hi (95% interval of
        the rank, 1 = best, over `DRAWS` joint draws of all scores), error.
        """
        scores = self.score(images)
        table = pd.DataFrame(
            {"image": range(len(scores))}
            | {key: [getattr(s, key) for s in scores] for key in ("score", "std", "error")}
        )
        good = table[table["error"] == ""].sort_values("score", ascending=False, kind="stable")
        std = good["std"].to_numpy()
        drawn = (
            np.random.default_rng(self.seed).normal(good["score"], std, (DRAWS, len(good)))
            if len(good)
            else np.empty((1, 0))
        )
        ranks = 1 + np.argsort(np.argsort(-drawn, axis=1), axis=1)  # (DRAWS, pictures)
        low, high = np.quantile(ranks, (0.025, 0.975), axis=0, method="nearest")
        good = good.assign(
            lo=good["score"] - 1.96 * std, hi=good["score"] + 1.96 * std, rank_lo=low, rank_hi=high
        )
        ranked = pd.concat([good, table[table["error"] != ""]], ignore_index=True)
        columns = ["image", "score", "std", "lo", "hi", "rank_lo", "rank_hi", "error"]
        return ranked.reindex(columns=columns).astype({"rank_lo": "Int64", "rank_hi": "Int64"})

    def describe(self, images: Picture | Iterable[Picture] | torch.Tensor) -> Description | list[Description]:
        """Return what the policy thinks of a picture, and its score; of many a list, in order.

        images: as for `score`. One picture without a score raises ValueError; of many, its description says
        why.
        """
        thinker = Scorer(
            (self.model, self.processor),
            thinking=True,
            max_new_tokens=self.max_new_tokens,
            numbered=self.numbered,
        )
        scores = thinker.score(images)
        described = [
            Description(score.reasoning, named_distortions(score.reasoning), score) for score in scores
        ]
        if not is_one(images):
            return described
        if scores[0].error:
            raise ValueError(scores[0].error)
        return described[0]

    def _open(self, image: Picture | torch.Tensor) -> dict | str:
        """Return the picture as the processor gives it, with a note, or why it cannot be."""
        try:
            picture = read_picture(image)
            note = {"note": picture.info.get("note", "")}
            if isinstance(self.model, Vllm):  # it has an image processor of its own
                return {"picture": picture, "pixel_values": ()} | note
            return dict(self.processor.image_processor(images=[picture], return_tensors="pt")) | note
        except (TypeError, ValueError) as error:
            return str(error)

    def _window(self, opened: list[dict | str], prefix: Cache) -> list[Score]:
        scores = [
            Score(error=picture) if isinstance(picture, str) else Score(note=picture["note"])
            for picture in opened
        ]
        good = sorted(
            (i for i, score in enumerate(scores) if not score.error),
            key=lambda i: len(opened[i]["pixel_values"]),
        )
        if isinstance(self.model, Vllm):
            self._serve([opened[i]["picture"] for i in good], [scores[i] for i in good])
            return scores
        for batch in _batched(good, [len(opened[i]["pixel_values"]) for i in good], self.batch_size):
            self._batch([opened[i] for i in batch], [scores[i] for i in batch], prefix)
        return scores

    def _serve(self, pictures: list[Image.Image], scores: list[Score]) -> None:
        """Let vLLM answer for a window of pictures; where it refuses one of them, for each half, and so on
        down to that one.
        """
        if not scores:
            return
        try:
            self._ask(pictures, scores)
            return
        except Refused as error:
            why = str(error)
        if len(pictures) == 1:
            scores[0].error = f"vLLM does not take this picture: {why}"
            return
        half = len(pictures) // 2
        self._serve(pictures[:half], scores[:half])
        self._serve(pictures[half:], scores[half:])

    def _ask(self, pictures: list[Image.Image], scores: list[Score]) -> None:
        prompt = [*self.before.tolist(), self.processor.image_token_id, *self.after.tolist()]
        if self.estimate != "expected":
            k = self.k if self.estimate == "sample" else 1
            self._read_texts(scores, self.model.texts(prompt, pictures, k, self.max_new_tokens, self.seed))
            return
        stop = ("", -1) if self.answered else (OPEN, self.tag)
        texts, probability, written = self.model.distributions(
            prompt, pictures, self.tokens, *stop, self.max_new_tokens, AHEAD
        )
        self._read_distributions(
            scores, [OPEN] * len(scores) if self.answered else texts, probability, written
        )

    def _batch(self, pictures: list[dict], scores: list[Score], prefix: Cache) -> None:
        try:
            with torch.no_grad(), _evaluating(self.model):
                (self._expected if self.estimate == "expected" else self._parsed)(
                    scores, *self._prefill(pictures, prefix)
                )
            return
        except torch.OutOfMemoryError:
            pass  # go on outside of this clause: in it, the traceback keeps every tensor of the failed try
        torch.cuda.empty_cache()
        if len(pictures) == 1:
            scores[
                0
            ].error = "does not fit into the GPU's memory; use a smaller model, quantize it, or limit the processor's pixels"
            return
        half = len(pictures) // 2
        self._batch(pictures[:half], scores[:half], prefix)
        self._batch(pictures[half:], scores[half:], prefix)

    def _prefix(self) -> Cache:
        """Return the cache of the prompt before the picture, which is the same for all."""
        ids = self.before[None].to(self.model.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        with torch.no_grad(), _evaluating(self.model):
            return (
                base_of(self.model)
                .model(input_ids=ids, position_ids=positions, use_cache=True)
                .past_key_values
            )

    def _prefill(self, pictures: list[dict], prefix: Cache) -> tuple[torch.Tensor, torch.Tensor, Cache]:
        """Return ids and mask of the prompts, (B, T) each, and the cache of all but their last token.

        A row is the shared beginning, padding, picture, question.
        """
        grid = torch.cat([picture["image_grid_thw"] for picture in pictures])
        pixels = torch.cat([picture["pixel_values"] for picture in pictures])
        sizes = (grid.prod(1) // self.processor.image_processor.merge_size**2).tolist()
        image, pad = self.processor.image_token_id, self.model.generation_config.pad_token_id
        rows = [
            torch.cat([self.before, torch.full((max(sizes) - n,), pad), torch.full((n,), image), self.after])
            for n in sizes
        ]
        ids, place, start = torch.stack(rows), torch.arange(len(rows[0])), len(self.before)
        mask = ((place < start) | (place >= start + max(sizes) - torch.tensor(sizes)[:, None])).long()
        ids, mask, pixels, grid = (tensor.to(self.model.device) for tensor in (ids, mask, pixels, grid))
        cache = copy.deepcopy(prefix)
        cache.batch_repeat_interleave(len(ids))
        return ids, mask, prefill(self.model, ids, mask, pixels, grid, cache)

    def _generate(
        self, scores: list[Score], ids: torch.Tensor, mask: torch.Tensor, cache: Cache, k: int = 1, **options
    ):
        """Return what `generate` makes of k copies of every prefilled row; a row of which the model makes
        NaN gets an error.
        """
        own, inner, numbers = (
            self.model.generation_config,
            base_of(self.model).model,
            OnlyNumbers(self.processor.tokenizer.eos_token_id),
        )
        if k > 1:
            cache.batch_repeat_interleave(k)
            ids, mask, inner.rope_deltas = (
                tensor.repeat_interleave(k, 0) for tensor in (ids, mask, inner.rope_deltas)
            )
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=1.0,
            return_dict_in_generate=True,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
            **options,
        )
        never = SuppressTokensLogitsProcessor(list(never_sampled(self.processor).values()), device=ids.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=config,
            tokenizer=self.processor.tokenizer,
            logits_processor=LogitsProcessorList([numbers, never]),  # NaN is looked for first
        )
        for score, copies in zip(scores, _chunks(numbers.failed, k)):
            score.error = NOT_NUMBERS if any(copies) else ""
        return out

    def _parsed(self, scores: list[Score], ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> None:
        k, options = 1, {"do_sample": False}
        if self.estimate == "sample":
            k, options = self.k, {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            out = self._generate(scores, ids, mask, cache, k, **options).sequences[:, ids.shape[1] :]
        texts = self.processor.tokenizer.batch_decode(out, skip_special_tokens=True)
        self._read_texts(scores, texts)

    def _read_texts(self, scores: list[Score], texts: list[str]) -> None:
        """Fill in the scores of completions, equally many for each; one that is off the scale counts only if
        it is the only one.
        """
        for score, found in zip(scores, _chunks(texts, len(texts) // len(scores))):
            score.answers, score.reasoning = found, parse_reasoning(found[0])
            values = torch.tensor([parse_score(text) for text in found], dtype=torch.float64)
            values = values[~values.isnan()]
            inside = values[(values >= SCORE_MIN) & (values <= SCORE_MAX)]
            off = f"{len(values) - len(inside)} of {len(found)} answers off the scale {SCORE_MIN:.0f} to {SCORE_MAX:.0f}"
            if len(inside) < len(values):
                score.note = "; ".join(filter(None, [score.note, off]))
            kept = inside if self.estimate == "sample" else values
            if score.error:
                continue
            if not len(kept):
                score.error = f"no score in the answer {found[0][:200]!r}" + f", and {off}" * bool(
                    len(values)
                )
                continue
            score.score = float(kept.mean())
            score.std = float(kept.std()) if len(kept) > 1 else math.nan

    def _expected(self, scores: list[Score], ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> None:
        length = ids.shape[1]
        if self.answered:
            texts, last = [OPEN] * len(scores), torch.full((len(ids),), length - 1, device=ids.device)
        else:
            out = self._generate(scores, ids, mask, cache, do_sample=False, stop_strings=[OPEN])
            ids, cache = out.sequences, out.past_key_values
            pad = self.model.generation_config.pad_token_id
            lengths = (ids[:, length:] != pad).long().cumsum(1).argmax(
                1
            ) + 1  # up to the last token that is no padding
            kept = torch.arange(ids.shape[1] - length, device=ids.device) < lengths[:, None]
            mask, last = torch.cat([mask, kept.long()], 1), length + lengths - 1
            texts = [self._thoughts(row[length : n + 1]) for row, n in zip(ids, last.tolist())]
        probability = self._answers(ids, mask, last, cache).cpu()  # (B, 3, 1231)
        starts = [
            answers.likeliest(p) if text.endswith(OPEN) else None for text, p in zip(texts, probability)
        ]
        self._read_distributions(scores, texts, probability, self._written(ids, mask, last, cache, starts))

    def _thoughts(self, ids: torch.Tensor) -> str:
        """Return the text of generated ids, whose last token is made the tag's own where white space clings
        to it.
        """
        decode = self.processor.tokenizer.decode
        if decode(ids, skip_special_tokens=True).rstrip().endswith(OPEN):
            ids[-1] = self.tag  # it is fed again
        return decode(ids, skip_special_tokens=True)

    def _read_distributions(
        self, scores: list[Score], texts: list[str], probability: torch.Tensor, written: list[str]
    ) -> None:
        """Fill in the scores of the texts up to the answer, the probabilities of the answers after them, (B,
        3, 1231), and what follows.
        """
        for score, text, p, answer in zip(scores, texts, probability.sum(1), written):
            score.answers, score.reasoning = [text], parse_reasoning(text)
            score.mass = float(p.sum())
            if score.error:
                continue
            if not text.endswith(OPEN):
                score.error = f"no {OPEN} in {self.max_new_tokens} tokens: {text[:200]!r}"
            elif math.isnan(score.mass):
                score.error = NOT_NUMBERS
            elif not score.mass >= 0.5:
                score.error = f"only {score.mass:.2f} of the probability is on numbers after {text[-200:]!r}; the likeliest answer is {answer!r}"
            elif math.isnan(parse_score(OPEN + answer)):
                score.error = f"the likeliest answer is not one number: {answer!r}"
            else:
                mean = float((p * VALUES).sum()) / score.mass
                score.score, score.std = (
                    mean,
                    math.sqrt(max(0.0, float((p * (VALUES - mean) ** 2).sum()) / score.mass)),
                )

    def _answers(
        self, ids: torch.Tensor, mask: torch.Tensor, last: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """Return the probability of each of `ANSWERS` after each of `OPENINGS` after each row's `last`
        token, (B, 3, 1231).

        All beginnings of a number are one tree, and one forward; another one where a space or newline
        before it is not `RARE`. ids, mask: (B, T) prefix tokens and which are real; last: (B,) position of
        the last real one.
        """
        listed = torch.tensor(list(self.tokens.values()), device=ids.device)
        following = torch.zeros(
            len(ids), len(OPENINGS), len(answers.BEGINNINGS), len(answers.COLUMNS), dtype=torch.float64
        )
        tail = [self.tokens[text[-1]] for text in answers.BEGINNINGS[1:]]
        for i, opening in enumerate(OPENINGS):
            if opening and (following[:, 0, 0, answers.COLUMNS.index(opening)] < RARE).all():
                continue
            chain = [self.tokens[character] for character in opening] + tail
            logits = self._branch(
                ids, mask, last, cache, torch.tensor([chain] * len(ids)), *answers.tree(len(opening))
            )[:, len(opening) :]
            p = torch.stack(
                [row.float().softmax(-1)[:, listed] for row in logits]
            )  # (B, 133, tokens); a row at a time, for memory
            following[:, i] = answers.columns(p.double()).cpu()
        return answers.probabilities(following)

    def _written(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        last: torch.Tensor,
        cache: Cache,
        starts: list[str | None],
    ) -> list[str]:
        """Return how each answer goes on greedily to its end, or for `AHEAD` tokens; "" where there is no
        start.
        """
        tokenizer, chains = (
            self.processor.tokenizer,
            [[self.tokens[character] for character in start or ""] for start in starts],
        )
        going = [i for i, start in enumerate(starts) if start is not None]
        for _ in range(AHEAD):
            if not going:
                break
            width = max(map(len, chains))
            fed = torch.tensor(
                [chain + [0] * (width - len(chain)) for chain in chains], dtype=torch.long
            ).reshape(len(chains), width)
            logits = self._branch(
                ids,
                mask,
                last,
                cache,
                fed,
                torch.arange(width + 1),
                torch.ones(width + 1, width + 1).tril().bool(),
            )
            logits[..., list(never_sampled(self.processor).values())] = -math.inf
            for i in going:
                chains[i].append(int(logits[i, len(chains[i])].argmax()))
            going = [
                i
                for i in going
                if chains[i][-1] != tokenizer.eos_token_id and "</" not in tokenizer.decode(chains[i])
            ]
        return [answers.closed(tokenizer.decode(chain), i in going) for i, chain in enumerate(chains)]

    def _branch(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        last: torch.Tensor,
        cache: Cache,
        tail: torch.Tensor,
        depth: torch.Tensor,
        sees: torch.Tensor,
    ) -> torch.Tensor:
        """Return the logits (B, 1 + N, V) of each row's `last` token and the N of `tail`, (B, N), after it;
        the cache stays as it was.

        A 4-D mask makes them a tree: a token sees the prefix, and those of which `sees`, (1 + N, 1 + N),
        says so. depth: (1 + N,).
        """
        size, device = cache.get_seq_length(), ids.device
        tree = torch.cat([ids.gather(1, last[:, None]), tail.to(device)], 1)
        before = torch.arange(mask.shape[1], device=device) < last[:, None]  # the last token is fed again
        before = (mask.bool() & before)[:, :size]
        seen = torch.cat(
            [before[:, None].expand(-1, len(depth), -1), sees.to(device).expand(len(ids), -1, -1)], 2
        )
        bias = torch.zeros(seen.shape, dtype=self.model.dtype, device=device).masked_fill(
            ~seen, torch.finfo(self.model.dtype).min
        )
        position = before.sum(1, keepdim=True) + base_of(self.model).model.rope_deltas + depth.to(device)
        logits = self.model(
            input_ids=tree,
            attention_mask=bias[:, None],
            position_ids=position.expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).logits
        cache.crop(-len(depth))
        return logits


class OnlyNumbers(LogitsProcessor):
    """Ends a completion where the logits are no numbers, and remembers which: sampling from them would stop
    the whole batch.

    failed: of each row, whether it happened.
    """

    def __init__(self, end: int):
        self.end, self.failed = end, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bad = ~scores.logsumexp(-1).isfinite()
        self.failed = [before or now for before, now in zip(self.failed or [False] * len(bad), bad.tolist())]
        scores = scores.masked_fill(bad[:, None], -math.inf)
        scores[bad, self.end] = 0
        return scores


class _Room:
    """Lets threads decode while fewer than `limit` bytes are held, in the order of the pictures.

    In order, so that a picture that is waited for is never kept out by later ones.
    """

    def __init__(self, limit: int):
        self.limit, self.held, self.turn, self.open, self.changed = limit, 0, 0, True, threading.Condition()

    def enter(self, place: int) -> bool:
        """Wait for the turn of this place, and for room; False when there is nothing to be decoded any more."""
        with self.changed:
            self.changed.wait_for(lambda: not self.open or (self.turn == place and self.held < self.limit))
            self.turn += 1
            self.changed.notify_all()
            return self.open

    def take(self, size: int) -> None:
        with self.changed:
            self.held += size

    def leave(self, size: int) -> None:
        with self.changed:
            self.held -= size
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.open = False
            self.changed.notify_all()


def _bytes(opened: dict | str) -> int:
    """Return the memory that a picture takes as `_open` gives it."""
    if isinstance(opened, str):
        return 0
    return 3 * math.prod(opened["picture"].size) if "picture" in opened else opened["pixel_values"].nbytes


def _batched(items: list, sizes: list[int], most: int) -> list[list]:
    """Split items into batches of at most `most`, and of at most `PATCHES` when each is padded to the
    largest.

    sizes: their patches, ascending.

    >>> _batched(["a", "b", "c", "d", "e"], [1000, 1000, 30_000, 30_000, 99_000], most=3)
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    batches: list[list] = []
    for item, size in zip(items, sizes):
        if not batches or len(batches[-1]) == most or (len(batches[-1]) + 1) * size > PATCHES:
            batches.append([])
        batches[-1].append(item)
    return batches


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
