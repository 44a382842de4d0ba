"""vLLM behind the Scorer: `Scorer("Qwen/Qwen2.5-VL-7B-Instruct", engine="vllm", batch_size=256)`.

`make test-vllm` runs it with vLLM 0.32 on a CPU (`INSTALL`); names and arguments are the same in 0.31, the
newest that TRL 1.16 takes. It was not run on a GPU. vLLM wants an older transformers than the rest of this
package, and so an environment of its own. It prepares pictures with the checkpoint's own image processor. In
fp32 its scores are the transformers engine's but for `TOLERANCE` (data/runs/vllm.csv); in bf16 they are
near, not equal, and may differ a little with the rest of the batch.

A score takes few requests: one goes on greedily from a beginning of a number, and tells what may follow at
each place on its way. Beginnings are asked for until those left could move the score by no more than
`TOLERANCE`, whichever numbers they go on to (`stakes`, which bounds the error for any distribution, too).
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from transformers import AutoConfig, PretrainedConfig, ProcessorMixin

from vqr1.engines import Engine
from vqr1.engines.answers import (
    AHEAD,
    ANSWERS,
    BEGINNINGS,
    COLUMNS,
    END,
    OPEN,
    OPENINGS,
    RARE,
    VALUES,
    Answer,
    Prepared,
    around_image,
    by_halves,
    closed,
    columns,
    likeliest,
    probabilities,
    tag_token,
    tokens_of,
)
from vqr1.policy import (
    base_name,
    check_pixels,
    default_dtype,
    load_processor,
    never_sampled,
    policy_path,
    refuse_loaded,
    trained_in_4_bits,
)

VERSIONS = ("0.31", "0.32")
"""vLLM's versions that this is written for: 0.31 is the newest that TRL 1.16 takes; 0.32 is run by tests."""
INSTALL = (
    "python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm==0.32.0 peft==0.21.2 bitsandbytes==0.50.2 "
    "pandas scipy scikit-image"
    " && .venv-vllm/bin/pip install --no-deps -e ."
)
MAX_TOKENS = 20_480
"""Most tokens of a request: up to 16,384 of a picture by Qwen's processors, then prompt and reasoning."""
RANKS = (8, 16, 32, 64, 128, 256)
"""The LoRA ranks that vLLM can be set to."""

TOLERANCE = 2e-4
"""How far a score may be from the exact one by beginnings that were not asked for, if numbers follow them."""
TOGETHER, CACHE = 4, 2**28
"""On a CPU there is room for the keys and values of so many requests of full length, and so many bytes."""
LONGEST = max(map(len, BEGINNINGS))
"""Characters of the longest beginnings, as "3.4": no more are asked for."""


class Below(NamedTuple):
    """What is assumed of a beginning that was not asked for.

    even: the shares of `ANSWERS`, (1231,): the same for each number with two decimals that begins so.
    centre: their mean.
    off: the farthest that the mean of any numbers that begin so can be from it.
    """

    even: torch.Tensor
    centre: float
    off: float


def _below(text: str) -> Below:
    under = torch.tensor([answer.startswith(text) for answer in ANSWERS])
    long = under & torch.tensor([END not in answer for answer in ANSWERS])
    even = (long if long.any() else under).double()
    even /= even.sum()
    centre = float(even @ VALUES)
    return Below(even, centre, float((VALUES[under] - centre).abs().max()))


BELOW = {text: _below(text) for text in BEGINNINGS}
"""By beginning: of "3.4" the numbers 3.40 to 3.49, around 3.445, and at most 0.045 off."""

REFUSED = "vLLM does not take this picture: {}"


class Refused(ValueError):
    """vLLM takes none of a call's requests, because of one of them."""


Tree = dict[str, dict[str, float]]
"""What follows each beginning: {beginning: {character: probability}}."""


def answer_probability(tree: Tree, text: str) -> float:
    """Return the probability that the answer begins with `text`, by the chain rule; 0 beyond the tree.

    >>> answer_probability({"": {"3": 0.5, "4": 0.5}, "3": {".": 0.9, "<": 0.1}}, "3.")
    0.45
    """
    return math.prod(tree.get(text[:i], {}).get(character, 0.0) for i, character in enumerate(text))


def unasked(tree: Tree) -> dict[str, float]:
    """Return each beginning that was not asked for and its probability, where that is above 0.

    Those after an opening that is `RARE` do not count: no engine follows it.

    >>> unasked({}), unasked({"": {"3": 0.5, "4": 0.5, " ": 1e-9}})
    ({'': 1.0}, {'3': 0.5, '4': 0.5})
    """
    openings = [opening for opening in OPENINGS if not opening or answer_probability(tree, opening) >= RARE]
    likely = {
        opening + text: answer_probability(tree, opening + text)
        for opening in openings
        for text in BEGINNINGS
        if opening + text not in tree
    }
    return {text: float(p) for text, p in likely.items() if p > 0}


def estimate(tree: Tree) -> torch.Tensor:
    """Return the probability of each of `ANSWERS` after each of `OPENINGS`, (3, 1231).

    They are exact where they are known. What begins otherwise is spread evenly over the numbers with two
    decimals below that beginning.

    >>> p = estimate({"": {"4": 0.5, "3": 0.5}, "3": {".": 1.0}, "3.": {"5": 1.0}, "3.5": {"0": 1.0}})[0]
    >>> p[ANSWERS.index("3.50")], p[ANSWERS.index("4.17")]
    (tensor(0.5000, dtype=torch.float64), tensor(0.0050, dtype=torch.float64))
    """
    p = distribution(tree)
    for text, likely in unasked(tree).items():
        p[_opening(text)] += likely * BELOW[text.lstrip()].even
    return p


def _opening(text: str) -> int:
    return OPENINGS.index(text[: len(text) - len(text.lstrip())])


def stakes(tree: Tree) -> tuple[dict[str, float], float]:
    """Return what each beginning not asked for may add to the score's error, and the error's bound.

    The score m is the mean of `estimate`. Let known answers have the probability M and the sum of values S.
    Beginnings b that were not asked for are likely r_b, R in all, and assumed to have the mean c_b, so that
    m = (S + sum r_b c_b) / (M + R). In truth the share q_b of r_b is on no number, and the rest has the mean
    v_b, at most h_b from c_b. The exact score is (S + sum (1 - q_b) r_b v_b) / (M + sum (1 - q_b) r_b). Put
    S = m (M + R) - sum r_b c_b into it, and subtract m:

        error = sum r_b ((1 - q_b) (v_b - c_b) - q_b (c_b - m)) / (M + sum (1 - q_b) r_b)

    So its size is at most sum r_b max(h_b, abs(c_b - m)) / M, for any distribution: the mass left unasked
    bounds it. Where all of that mass goes on to numbers, it is at most sum r_b h_b / (M + R).

    Args:
        tree: what is known.

    Returns:
        (stake of each beginning: r_b (h_b + q abs(c_b - m)), where q is the share of what is known that is
        on no number, and 1 after an opening or a first character, as much may go on to no number there;
        the bound for any distribution, infinite where no answer is known).

    >>> tree = {"": {"3": 0.98, "4": 0.02}, "3": {".": 1.0}, "3.": {"5": 1.0}, "3.5": {"0": 1.0}}
    >>> stakes(tree)  # 4.00 to 4.99 is 0.495 off 4.495 at most, and 0.9751 from the score, 3.5199
    ({'4': 0.0294}, 0.0199)
    """
    left, p = unasked(tree), estimate(tree).sum(0)
    mass, unknown = float(p.sum()), sum(left.values())
    known, mean = mass - unknown, float(p @ VALUES) / mass if mass else math.nan
    doubt = max(0.0, 1 - mass) / (1 - unknown) if unknown < 1 else 0.0
    below = {text: BELOW[text.lstrip()] for text in left}
    apart = {text: abs(one.centre - mean) for text, one in below.items()}
    stake = {
        text: likely * (below[text].off + (doubt if len(text.lstrip()) > 1 else 1) * apart[text])
        for text, likely in left.items()
    }
    worst = sum(likely * max(below[text].off, apart[text]) for text, likely in left.items())
    return stake, worst / known if known > 1e-9 else math.inf


def open_prefixes(tree: Tree) -> list[str]:
    """Return the beginnings to ask for next; none where all stakes together are within `TOLERANCE`.

    Those that matter least are left out, as many as may be.

    >>> open_prefixes({}), open_prefixes({"": {"3": 0.5, "4": 0.5, "7": 1e-9}})
    ([''], ['3', '4'])
    """
    stake, _ = stakes(tree)
    spare, skipped = TOLERANCE * float(estimate(tree).sum()), set()
    for text in sorted(stake, key=stake.__getitem__):
        spare -= stake[text]
        if spare < 0:
            break
        skipped.add(text)
    return [text for text in stake if text not in skipped]


def next_characters(logprobs: Mapping[int, object], tokens: Mapping[str, int]) -> dict[str, float]:
    """Return the probability of each of `COLUMNS` from vLLM's {token: Logprob} of one position."""
    listed = torch.tensor([logprobs[token].logprob for token in tokens.values()], dtype=torch.float64).exp()
    return dict(zip(COLUMNS, columns(listed).tolist()))


def distribution(tree: Tree) -> torch.Tensor:
    """Return the probability of each of `ANSWERS` after each of `OPENINGS`, (3, 1231)."""
    following = [
        [[tree.get(opening + text, {}).get(c, 0.0) for c in COLUMNS] for text in BEGINNINGS]
        for opening in OPENINGS
    ]
    return probabilities(torch.tensor(following, dtype=torch.float64))


def image_prompt(prompt: list[int], image: Image.Image, name: str, more: Sequence[int] = ()) -> dict:
    """Return a ``vllm.TokensPrompt``.

    Args:
        prompt: its tokens, with one image token, which vLLM repeats as the image needs.
        image: RGB.
        name: the image's, unique in the engine's life: its cache recognises the image by it, without hashing
            pixels.
        more: tokens that have been said since.
    """
    return {
        "prompt_token_ids": [*prompt, *more],
        "multi_modal_data": {"image": image},
        "multi_modal_uuids": {"image": [name]},
    }


def logprob_settings(tokens: Mapping[str, int], text: str) -> dict:
    """Return the sampling settings that read these tokens' log-probabilities before any truncation.

    They are read after `text`, and then after each character that goes on greedily, down to `LONGEST`.
    `logprobs` stays unset: vLLM refuses more than its `max_logprobs`, 20 by default, and these are up to 21.
    """
    return {
        "max_tokens": LONGEST + 1 - len(text.lstrip()),
        "temperature": 0.0,
        "logprob_token_ids": list(tokens.values()),
        "detokenize": False,
    }


def grow(tree: Tree, text: str, said: Sequence[int], listed: Sequence[Mapping], tokens: Mapping) -> None:
    """Put into a tree what one request found.

    Args:
        tree: of the picture; what it knows stays.
        text: the beginning that was asked for.
        said: the tokens with which it went on.
        listed: vLLM's {token: Logprob} of each of them.
        tokens: of each character.
    """
    characters = {token: character for character, token in tokens.items() if character in COLUMNS[:-1]}
    for token, logprobs in zip(said, listed):
        if text.lstrip() not in BELOW:
            return
        tree.setdefault(text, next_characters(logprobs, tokens))
        text += characters.get(token, END)


def llm_options(
    policy: str | Path, quantize: bool | None = None, pixels: Sequence[int] | None = None
) -> tuple[dict, str | None]:
    """Return the keywords for ``vllm.LLM`` and the path of the adapter, if `policy` is the folder of one.

    The base serves in bf16, the adapter on top of it: nothing is merged. An adapter that was trained on a
    base in 4 bits is refused: on another base it gives other scores. `quantize` is refused too.
    """
    if quantize:
        raise ValueError(f"{policy}: vLLM serves in bf16, not in 4 bits; use engine='transformers'")
    options = {
        "max_model_len": MAX_TOKENS,
        "dtype": str(default_dtype()).removeprefix("torch."),
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "enable_prefix_caching": True,
    }
    if pixels is not None:
        check_pixels(pixels)
        options["mm_processor_kwargs"] = {"min_pixels": pixels[0], "max_pixels": pixels[1]}
    path = policy_path(policy)
    if not (path / "adapter_config.json").is_file():
        return options | {"model": str(path)}, None
    adapter = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    base = str(policy_path(base_name(path)))
    rank = min((r for r in RANKS if r >= adapter["r"]), default=None)
    if rank is None:
        raise ValueError(
            f"{path}: vLLM serves adapters up to rank {RANKS[-1]}, and this one has {adapter['r']}; "
            "use engine='transformers'"
        )
    if trained_in_4_bits(path):
        raise ValueError(
            f"{path}: this adapter was trained on a base in 4 bits, and vLLM serves the base in bf16, with "
            "which its scores differ; write out what it was trained on, vqr1.policy.merge_adapter(folder, "
            "output), and serve that; or use engine='transformers'"
        )
    return options | {"model": base, "enable_lora": True, "max_lora_rank": rank}, str(path)


def load(
    policy: str | Path | tuple, quantize: bool | None = None, pixels: Sequence[int] | None = None
) -> Vllm:
    """Return the engine with a policy.

    Args:
        policy: a model's or an adapter's folder, a hub name, or a pair (``vllm.LLM``, processor) of your own.
        quantize: not True: vLLM serves in bf16.
        pixels: (smallest, largest) number of pixels that a picture is scaled to, default the processor's.

    Raises:
        ModuleNotFoundError: vLLM is missing; the message says how to install it.
        ValueError: for what vLLM does not serve.
    """
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"engine='vllm' needs vLLM ({error}) in an environment of its own. On a GPU: {INSTALL}; "
            "on a CPU: make .venv-vllm/.installed; or use engine='transformers'"
        ) from error
    if isinstance(policy, tuple):
        refuse_loaded(quantize, pixels)
        return Vllm(*policy, SamplingParams)
    options, adapter = llm_options(policy, quantize, pixels)
    config = AutoConfig.from_pretrained(options["model"])
    options |= limits(config.get_text_config())
    lora = LoRARequest("vqr1", 1, adapter) if adapter else None
    processor = load_processor(options["model"], config.model_type)
    return Vllm(LLM(**options), processor, SamplingParams, lora)


def limits(config: PretrainedConfig) -> dict:
    """Return the keywords for ``vllm.LLM`` that depend on the language model's size.

    A request may not be longer than the model has positions. On a CPU vLLM would compile, for minutes, and
    take nearly all memory for keys and values: here it does not compile, and has room for `TOGETHER` requests
    of full length, at least `CACHE` bytes.

    config: of the language model.
    """
    longest = min(MAX_TOKENS, config.max_position_embeddings)
    if torch.cuda.is_available():
        return {"max_model_len": longest}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head  # bytes, in fp32
    cache = max(CACHE, TOGETHER * longest * token)
    return {"max_model_len": longest, "enforce_eager": True, "kv_cache_memory_bytes": cache}


class Vllm(Engine):
    """Ask vLLM; see `vqr1.engines.Engine`. It makes its own batches, so `batch_size` changes nothing."""

    def __init__(self, llm, processor: ProcessorMixin, sampling_params: type, lora=None):
        self.llm, self.processor, self.sampling_params, self.lora = llm, processor, sampling_params, lora
        self.barred = list(never_sampled(processor))
        self.requests = 0  # that vLLM has answered

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The token of every character that may follow the beginning of a number."""
        return tokens_of(self.processor.tokenizer)

    def check(self, estimate: str) -> None:
        if estimate == "expected":
            tokens_of(self.processor.tokenizer)

    def prepare(self, image: Image.Image) -> Prepared:
        return Prepared(image, 3 * image.width * image.height)  # vLLM has an image processor of its own

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
        prompt = self._prompt(chat)
        how = {"n": k, "temperature": 1.0, "seed": seed} if k > 1 else {"temperature": 0.0}
        how["repetition_penalty"] = penalty

        def ask(images: list[Image.Image]) -> list[Answer]:
            rows = [image_prompt(prompt, image, uuid.uuid4().hex) for image in images]
            outputs = self._run(rows, max_tokens=max_tokens, bad_words=self.barred, **how)
            return [Answer([completion.text for completion in output.outputs]) for output in outputs]

        return by_halves(ask, [picture for picture, _ in prepared], Refused, REFUSED)

    def distributions(
        self, chat: list[dict], prepared: list[Prepared], thinking: bool, max_tokens: int, batch_size: int
    ) -> list[Answer]:
        prompt = self._prompt(chat, "" if thinking else OPEN)

        def ask(images: list[Image.Image]) -> list[Answer]:
            names = [uuid.uuid4().hex for _ in images]
            texts, more = [OPEN] * len(images), [[]] * len(images)
            if thinking:
                rows = [image_prompt(prompt, image, name) for image, name in zip(images, names)]
                texts, more = self._think(rows, max_tokens)

            def row(i: int, text: str) -> dict:
                return image_prompt(prompt, images[i], names[i], more[i] + [self.tokens[c] for c in text])

            ready = [i for i, text in enumerate(texts) if text.endswith(OPEN)]
            trees = self._trees(row, ready, len(images))
            probability = [estimate(tree) if tree else distribution(tree) for tree in trees]
            followed = self._follow(row, {i: likeliest(probability[i]) for i in ready})
            return [
                Answer([text], p, followed.get(i, "")) for i, (text, p) in enumerate(zip(texts, probability))
            ]

        return by_halves(ask, [picture for picture, _ in prepared], Refused, REFUSED)

    def _prompt(self, chat: list[dict], end: str = "") -> list[int]:
        before, after = around_image(self.processor, chat, end)
        return [*before, self.processor.image_token_id, *after]

    def _think(self, rows: list[dict], max_tokens: int) -> tuple[list[str], list[list[int]]]:
        """Return what is generated greedily up to the opening tag: texts, and tokens ending in the tag's."""
        how = {"stop": [OPEN], "include_stop_str_in_output": True, "bad_words": self.barred}
        outputs = self._run(rows, temperature=0.0, max_tokens=max_tokens, **how)
        written, tag = [output.outputs[0] for output in outputs], tag_token(self.processor.tokenizer)
        return [one.text for one in written], [[*one.token_ids[:-1], tag] for one in written]

    def _trees(self, row: Callable[[int, str], dict], ready: list[int], count: int) -> list[Tree]:
        """Return the trees of `count` pictures, asked together in few calls; empty if not ready."""
        trees: list[Tree] = [{} for _ in range(count)]
        while asked := [(i, text) for i in ready for text in open_prefixes(trees[i])]:
            how = [logprob_settings(self.tokens, text) for _, text in asked]
            outputs = self._run([row(i, text) for i, text in asked], *how)
            for (i, text), output in zip(asked, outputs):
                said = output.outputs[0]
                grow(trees[i], text, said.token_ids, said.logprobs, self.tokens)
        return trees

    def _follow(self, row: Callable[[int, str], dict], starts: dict[int, str]) -> dict[int, str]:
        """Return how the likeliest answers go on greedily, for `AHEAD` tokens at most."""
        if not starts:
            return {}
        how = {"stop": ["</"], "include_stop_str_in_output": True, "bad_words": self.barred}
        rows = [row(i, start) for i, start in starts.items()]
        outputs = self._run(rows, temperature=0.0, max_tokens=AHEAD, **how)
        followed = {}
        for (i, start), output in zip(starts.items(), outputs):
            answer = output.outputs[0]
            followed[i] = closed(start + answer.text, answer.finish_reason == "length")
        return followed

    def _run(self, requests: list[dict], *each: dict, **settings) -> list:
        """Return vLLM's outputs; raise Refused if it rejects a request, which it does before computing.

        each: the settings of each request, where they differ.
        """
        params = [self.sampling_params(**one) for one in each] or self.sampling_params(**settings)
        try:
            found = self.llm.generate(requests, params, use_tqdm=False, lora_request=self.lora)
        except ValueError as error:
            raise Refused(str(error)) from error
        self.requests += len(found)
        return found
