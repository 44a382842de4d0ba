"""The engine of transformers: `Scorer(policy)`.

A batch of pictures is prefilled once. The beginnings of all numbers are then one tree, and one more forward
gives the probability of every answer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

from vqr1.engines import Engine, answers
from vqr1.engines.answers import AHEAD, NOT_NUMBERS, OPEN, OPENINGS, RARE, Answer, Prepared
from vqr1.policy import Policy, as_policy, base_of, never_sampled
from vqr1.sharing import prefill

PATCHES = 2**16
"""Most patches of a batch, with padding; a single picture may have more (12 megapixels: 61,204)."""
TOO_LARGE = (
    "does not fit into the GPU's memory; use a smaller model, quantize it, or limit the processor's pixels"
)


def load(
    policy: str | Path | tuple, quantize: bool | None = None, pixels: Sequence[int] | None = None
) -> Transformers:
    """Return the engine with a policy; the arguments are those of `as_policy`."""
    return Transformers(as_policy(policy, quantize, pixels))


class Prompt(NamedTuple):
    """A prompt's tokens before its picture, their cache (which all pictures share), and the tokens after."""

    before: torch.Tensor
    cache: Cache
    after: torch.Tensor


class Prefilled(NamedTuple):
    """A batch of prompts in the model: ids and mask, (B, T), and the cache of all tokens but the last."""

    ids: torch.Tensor
    mask: torch.Tensor
    cache: Cache


class Reached(NamedTuple):
    """A batch before its answers: ids and mask, (B, T), the cache, and each row's last real place, (B,)."""

    ids: torch.Tensor
    mask: torch.Tensor
    last: torch.Tensor
    cache: Cache


class Transformers(Engine):
    """Ask a model of transformers; see `vqr1.engines.Engine`.

    Pictures are batched by size, so that little is padded: `batch_size` at most, fewer if they are large or
    do not fit into memory. Each goes through the vision tower once. The model is in eval mode meanwhile.
    """

    def __init__(self, policy: Policy):
        self.model, self.processor = policy

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The token of every character that may follow the beginning of a number."""
        return answers.tokens_of(self.processor.tokenizer)

    @cached_property
    def barred(self) -> list[int]:
        """The tokens that no answer may hold."""
        return list(never_sampled(self.processor).values())

    def check(self, estimate: str) -> None:
        if estimate == "expected":
            answers.tokens_of(self.processor.tokenizer)

    def prepare(self, image: Image.Image) -> Prepared:
        picture = dict(self.processor.image_processor(images=[image], return_tensors="pt"))
        return Prepared(picture, picture["pixel_values"].nbytes)

    def texts(
        self,
        chat: list[dict],
        prepared: list[Prepared],
        k: int,
        max_tokens: int,
        seed: int,
        batch_size: int,
        penalty: float = 1.0,
    ) -> list[Answer]:
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if k > 1 else {}
        options["repetition_penalty"] = penalty

        def ask(prefilled: Prefilled) -> list[Answer]:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                out, failed = self._generate(prefilled, max_tokens, k, **options)
            written = out.sequences[:, prefilled.ids.shape[1] :]
            texts = _chunks(self.processor.tokenizer.batch_decode(written, skip_special_tokens=True), k)
            return [Answer(found, error=_error(any(bad))) for found, bad in zip(texts, _chunks(failed, k))]

        return self._in_batches(ask, chat, "", prepared, batch_size)

    def distributions(
        self, chat: list[dict], prepared: list[Prepared], thinking: bool, max_tokens: int, batch_size: int
    ) -> list[Answer]:
        def ask(prefilled: Prefilled) -> list[Answer]:
            if thinking:
                texts, reached, failed = self._think(prefilled, max_tokens)
            else:
                count, length = prefilled.ids.shape
                last = torch.full((count,), length - 1, device=prefilled.ids.device)
                texts, failed = [OPEN] * count, [False] * count
                reached = Reached(prefilled.ids, prefilled.mask, last, prefilled.cache)
            probability = self._answers(reached).cpu()
            starts = [
                answers.likeliest(p) if text.endswith(OPEN) else None for text, p in zip(texts, probability)
            ]
            followed = self._follow(reached, starts)
            return [
                Answer([text], p, likeliest, _error(bad))
                for text, p, likeliest, bad in zip(texts, probability, followed, failed)
            ]

        return self._in_batches(ask, chat, "" if thinking else OPEN, prepared, batch_size)

    def _in_batches(
        self,
        ask: Callable[[Prefilled], list[Answer]],
        chat: list[dict],
        end: str,
        prepared: list[Prepared],
        batch_size: int,
    ) -> list[Answer]:
        """Return all pictures' answers, in order, by batches; one too large for the memory is halved."""
        patches = [len(picture["pixel_values"]) for picture, _ in prepared]
        order, found = sorted(range(len(prepared)), key=patches.__getitem__), {}
        with torch.no_grad(), _evaluating(self.model):
            prompt = self._prompt(chat, end)

            def ask_some(pictures: list[dict]) -> list[Answer]:
                return ask(self._prefill(pictures, prompt))

            for batch in _batched(order, [patches[i] for i in order], batch_size):
                pictures = [prepared[i].picture for i in batch]
                some = answers.by_halves(ask_some, pictures, torch.OutOfMemoryError, TOO_LARGE)
                found |= zip(batch, some)
        return [found[i] for i in range(len(prepared))]

    def _prompt(self, chat: list[dict], end: str) -> Prompt:
        before, after = map(torch.tensor, answers.around_image(self.processor, chat, end))
        ids = before[None].to(self.model.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        inner = base_of(self.model).model
        return Prompt(
            before, inner(input_ids=ids, position_ids=positions, use_cache=True).past_key_values, after
        )

    def _prefill(self, pictures: list[dict], prompt: Prompt) -> Prefilled:
        """Prefill the pictures' prompts; a row is the shared beginning, padding, picture, question."""
        grid = torch.cat([picture["image_grid_thw"] for picture in pictures])
        pixels = torch.cat([picture["pixel_values"] for picture in pictures])
        sizes = (grid.prod(1) // self.processor.image_processor.merge_size**2).tolist()
        image, pad = self.processor.image_token_id, self.model.generation_config.pad_token_id
        rows = [
            torch.cat(
                [prompt.before, torch.full((max(sizes) - n,), pad), torch.full((n,), image), prompt.after]
            )
            for n in sizes
        ]
        ids, place, start = torch.stack(rows), torch.arange(len(rows[0])), len(prompt.before)
        mask = ((place < start) | (place >= start + max(sizes) - torch.tensor(sizes)[:, None])).long()
        ids, mask, pixels, grid = (tensor.to(self.model.device) for tensor in (ids, mask, pixels, grid))
        cache = copy.deepcopy(prompt.cache)
        cache.batch_repeat_interleave(len(ids))
        return Prefilled(ids, mask, prefill(self.model, ids, mask, pixels, grid, cache))

    def _generate(self, prefilled: Prefilled, max_tokens: int, k: int = 1, **options):
        """Return `generate`'s output for k copies of every prefilled row, and which of them met NaN."""
        (ids, mask, cache), inner = prefilled, base_of(self.model).model
        own, tokenizer = self.model.generation_config, self.processor.tokenizer
        if k > 1:
            cache.batch_repeat_interleave(k)
            ids, mask, inner.rope_deltas = (
                tensor.repeat_interleave(k, 0) for tensor in (ids, mask, inner.rope_deltas)
            )
        config = GenerationConfig(
            max_new_tokens=max_tokens,
            return_dict_in_generate=True,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
            **{"do_sample": False, "repetition_penalty": 1.0} | options,  # not those of the checkpoint
        )
        numbers = OnlyNumbers(tokenizer.eos_token_id)
        never = SuppressTokensLogitsProcessor(self.barred, device=ids.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=config,
            tokenizer=tokenizer,
            logits_processor=LogitsProcessorList([numbers, never]),  # NaN is looked for first
        )
        return out, numbers.failed or [False] * len(ids)

    def _think(self, prefilled: Prefilled, max_tokens: int) -> tuple[list[str], Reached, list[bool]]:
        """Return greedy texts up to the opening tag, where the rows stand then, and which of them failed."""
        length = prefilled.ids.shape[1]
        out, failed = self._generate(prefilled, max_tokens, stop_strings=[OPEN])
        ids, pad = out.sequences, self.model.generation_config.pad_token_id
        real = (ids[:, length:] != pad).long()
        lengths = real.cumsum(1).argmax(1) + 1  # up to the last token that is no padding
        kept = torch.arange(ids.shape[1] - length, device=ids.device) < lengths[:, None]
        mask, last = torch.cat([prefilled.mask, kept.long()], 1), length + lengths - 1
        texts = [self._thoughts(row[length : n + 1]) for row, n in zip(ids, last.tolist())]
        return texts, Reached(ids, mask, last, out.past_key_values), failed

    def _thoughts(self, ids: torch.Tensor) -> str:
        """Return the text of generated ids; a last tag token with white space becomes the plain one."""
        tokenizer = self.processor.tokenizer
        if tokenizer.decode(ids, skip_special_tokens=True).rstrip().endswith(OPEN):
            ids[-1] = answers.tag_token(tokenizer)  # it is fed again
        return tokenizer.decode(ids, skip_special_tokens=True)

    def _answers(self, reached: Reached) -> torch.Tensor:
        """Return the probability of each of `ANSWERS` after each of `OPENINGS`, (B, 3, 1231).

        All beginnings of a number are one tree and one forward, plus one each for a space or newline before
        it that is not `RARE`.
        """
        count, device = len(reached.ids), reached.ids.device
        listed = torch.tensor(list(self.tokens.values()), device=device)
        following = torch.zeros(
            count, len(OPENINGS), len(answers.BEGINNINGS), len(answers.COLUMNS), dtype=torch.float64
        )
        tail = [self.tokens[text[-1]] for text in answers.BEGINNINGS[1:]]
        for i, opening in enumerate(OPENINGS):
            if opening and (following[:, 0, 0, answers.COLUMNS.index(opening)] < RARE).all():
                continue
            chain = torch.tensor([[self.tokens[character] for character in opening] + tail] * count)
            logits = self._branch(reached, chain, *answers.tree(len(opening)))[:, len(opening) :]
            rows = [row.float().softmax(-1)[:, listed] for row in logits]  # one at a time, for memory
            following[:, i] = answers.columns(torch.stack(rows).double()).cpu()  # (B, 133, 14)
        return answers.probabilities(following)

    def _follow(self, reached: Reached, starts: list[str | None]) -> list[str]:
        """Return each answer, continued greedily to its end or for `AHEAD` tokens; "" without a start."""
        tokenizer = self.processor.tokenizer
        chains = [[self.tokens[character] for character in start or ""] for start in starts]
        going = [i for i, start in enumerate(starts) if start is not None]
        for _ in range(AHEAD):
            if not going:
                break
            width = max(map(len, chains))
            padded = [chain + [0] * (width - len(chain)) for chain in chains]
            fed = torch.tensor(padded, dtype=torch.long).reshape(len(chains), width)
            one_after_another = torch.ones(width + 1, width + 1).tril().bool()
            logits = self._branch(reached, fed, torch.arange(width + 1), one_after_another)
            logits[..., self.barred] = -math.inf
            for i in going:
                chains[i].append(int(logits[i, len(chains[i])].argmax()))
            going = [
                i
                for i in going
                if chains[i][-1] != tokenizer.eos_token_id and "</" not in tokenizer.decode(chains[i])
            ]
        return [answers.closed(tokenizer.decode(chain), i in going) for i, chain in enumerate(chains)]

    def _branch(
        self, reached: Reached, tail: torch.Tensor, depth: torch.Tensor, sees: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits (B, 1 + N, V) of each row's last token and the tail after it; keep the cache.

        A 4-D mask makes them a tree: a token sees the prefix, and those that `sees` names.

        tail: (B, N).
        sees: (1 + N, 1 + N).
        depth: (1 + N,).
        """
        ids, mask, last, cache = reached
        size, device = cache.get_seq_length(), ids.device
        branch = torch.cat([ids.gather(1, last[:, None]), tail.to(device)], 1)
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
            input_ids=branch,
            attention_mask=bias[:, None],
            position_ids=position.expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).logits
        cache.crop(-len(depth))
        return logits


class OnlyNumbers(LogitsProcessor):
    """End a completion where the logits are no numbers: sampling from them would stop the whole batch.

    failed: whether it happened, row by row.
    """

    def __init__(self, end: int):
        self.end, self.failed = end, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bad = ~scores.logsumexp(-1).isfinite()
        self.failed = [before or now for before, now in zip(self.failed or [False] * len(bad), bad.tolist())]
        scores = scores.masked_fill(bad[:, None], -math.inf)
        scores[bad, self.end] = 0
        return scores


def _error(failed: bool) -> str:
    return NOT_NUMBERS if failed else ""


def _batched(items: list, sizes: list[int], most: int) -> list[list]:
    """Split items into batches of at most `most`, and of at most `PATCHES` after padding to the largest.

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
