"""vLLM behind the Scorer: `Scorer("Qwen/Qwen2.5-VL-7B-Instruct", engine="vllm", batch_size=256)`.

NOT RUN HERE: vLLM needs a GPU. Tests cover how requests are built and how log-probabilities are read,
with the embedded policy's, from transformers. The names are those of vLLM 0.31. It wants an older
transformers than the rest of this package, and so an environment of its own (`INSTALL`). vLLM prepares
pictures with the checkpoint's own image processor and computes in bf16: its scores are near the transformers
engine's, not equal, and may differ a little with the rest of the batch.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, ProcessorMixin

from vqr1.engines import Engine
from vqr1.engines.answers import (
    AHEAD,
    BEGINNINGS,
    COLUMNS,
    OPEN,
    OPENINGS,
    RARE,
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
    load_processor,
    never_sampled,
    policy_path,
    refuse_loaded,
    trained_in_4_bits,
)

INSTALL = (
    "python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm==0.31.0 peft==0.21.2 bitsandbytes==0.50.2 "
    "pandas scipy scikit-image"
    " && .venv-vllm/bin/pip install --no-deps -e ."
)
MAX_TOKENS = 20_480
"""Most tokens of a request: up to 16,384 of a picture by Qwen's processors, then prompt and reasoning."""
RANKS = (8, 16, 32, 64, 128, 256)
"""The LoRA ranks that vLLM can be set to."""

FLOOR = 1e-8
"""Beginnings less likely than this are not asked for; 133 of them change a mean by 2e-5 at most."""


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


def open_prefixes(tree: Tree) -> list[str]:
    """Return the beginnings to ask for next: likely enough by what is known; none when the tree is complete.

    >>> open_prefixes({}), open_prefixes({"": {"3": 0.5, "4": 0.5, "7": 1e-9}})
    ([''], ['3', '4'])
    """
    openings = [opening for opening in OPENINGS if not opening or answer_probability(tree, opening) >= RARE]
    prefixes = [opening + text for opening in openings for text in BEGINNINGS]
    return [text for text in prefixes if text not in tree and answer_probability(tree, text) >= FLOOR]


def next_characters(logprobs: Mapping[int, object], tokens: Mapping[str, int]) -> dict[str, float]:
    """Return the probability of each of `COLUMNS` from vLLM's {token: Logprob} of one position."""
    listed = torch.tensor([logprobs[token].logprob for token in tokens.values()], dtype=torch.float64).exp()
    return dict(zip(COLUMNS, columns(listed).tolist()))


def distribution(tree: Tree) -> torch.Tensor:
    """Return the probability of each of `ANSWERS` after each of `OPENINGS`, (3, 1231)."""
    nothing = dict.fromkeys(COLUMNS, 0.0)
    following = [
        [list(tree.get(opening + text, nothing).values()) for text in BEGINNINGS] for opening in OPENINGS
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


def logprob_settings(tokens: Mapping[str, int]) -> dict:
    """Return the sampling settings that read these tokens' log-probabilities before any truncation."""
    return {
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": len(tokens),
        "logprob_token_ids": list(tokens.values()),
        "detokenize": False,
    }


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
            f"engine='vllm' needs vLLM ({error}). It runs on a GPU and wants its own environment: {INSTALL}; "
            "or use engine='transformers'"
        ) from error
    if isinstance(policy, tuple):
        refuse_loaded(quantize, pixels)
        return Vllm(*policy, SamplingParams)
    options, adapter = llm_options(policy, quantize, pixels)
    lora = LoRARequest("vqr1", 1, adapter) if adapter else None
    processor = load_processor(options["model"], AutoConfig.from_pretrained(options["model"]).model_type)
    return Vllm(LLM(**options), processor, SamplingParams, lora)


class Vllm(Engine):
    """Ask vLLM; see `vqr1.engines.Engine`. It makes its own batches, so `batch_size` changes nothing."""

    def __init__(self, llm, processor: ProcessorMixin, sampling_params: type, lora=None):
        self.llm, self.processor, self.sampling_params, self.lora = llm, processor, sampling_params, lora
        self.barred = list(never_sampled(processor))

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
            probability = [distribution(tree) for tree in trees]
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
        """Return the trees of `count` pictures, asked together in at most five calls; empty if not ready."""
        trees: list[Tree] = [{} for _ in range(count)]
        while asked := [(i, text) for i in ready for text in open_prefixes(trees[i])]:
            outputs = self._run([row(i, text) for i, text in asked], **logprob_settings(self.tokens))
            for (i, text), output in zip(asked, outputs):
                trees[i][text] = next_characters(output.outputs[0].logprobs[0], self.tokens)
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

    def _run(self, requests: list[dict], **settings) -> list:
        """Return vLLM's outputs; raise Refused if it rejects a request, which it does before computing."""
        try:
            return self.llm.generate(
                requests, self.sampling_params(**settings), use_tqdm=False, lora_request=self.lora
            )
        except ValueError as error:
            raise Refused(str(error)) from error
