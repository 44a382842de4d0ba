"""vLLM behind the Scorer: `Scorer("Qwen/Qwen2.5-VL-7B-Instruct", engine="vllm", batch_size=256)`.

NOT RUN HERE: vLLM needs a GPU. What is tested is how requests are built and what is made of the
log-probabilities that come back, with the embedded policy's own, from transformers. The names are those of
vLLM 0.31. It wants an older transformers than the rest of this package, and so an environment of its own
(`INSTALL`). vLLM prepares pictures with the checkpoint's own image processor and computes in bf16: its
scores are near the transformers engine's, not equal, and may differ a little with the company in the batch.
"""

import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, ProcessorMixin

from vqr1.engines.answers import (
    BEGINNINGS,
    COLUMNS,
    OPENINGS,
    RARE,
    closed,
    columns,
    likeliest,
    probabilities,
)
from vqr1.policy import TINY, VISION, load_processor, never_sampled, trained_in_4_bits

INSTALL = (
    "python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm==0.31.0 peft==0.21.2 bitsandbytes==0.50.2 pandas scipy scikit-image"
    " && .venv-vllm/bin/pip install --no-deps -e ."
)
MAX_TOKENS = 20_480
"""Of one request: Qwen's processors make at most 16,384 tokens of a picture; the rest is for prompt and
reasoning.
"""
RANKS = (8, 16, 32, 64, 128, 256)
"""The LoRA ranks that vLLM can be set to."""

FLOOR = 1e-8
"""Beginnings less likely than this are not asked for; 133 of them change a mean by 2e-5 at most."""


class Refused(ValueError):
    """vLLM takes none of a call's requests, because of one of them."""


Tree = dict[str, dict[str, float]]
"""What follows each beginning: {beginning: {character: probability}}."""


def chance(tree: Tree, text: str) -> float:
    """Return the probability that the answer begins with `text`, by the chain rule; 0 where the tree does
    not reach.

    >>> chance({"": {"3": 0.5, "4": 0.5}, "3": {".": 0.9, "<": 0.1}}, "3.")
    0.45
    """
    return math.prod(tree.get(text[:i], {}).get(character, 0.0) for i, character in enumerate(text))


def unasked(tree: Tree) -> list[str]:
    """Return the beginnings to ask for next: likely enough by what is known; none when the tree is complete.

    >>> unasked({}), unasked({"": {"3": 0.5, "4": 0.5, "7": 1e-9}})
    ([''], ['3', '4'])
    """
    openings = [opening for opening in OPENINGS if not opening or chance(tree, opening) >= RARE]
    asked = [opening + text for opening in openings for text in BEGINNINGS]
    return [text for text in asked if text not in tree and chance(tree, text) >= FLOOR]


def following(logprobs: Mapping[int, object], tokens: Mapping[str, int]) -> dict[str, float]:
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


def request(prompt: list[int], picture: Image.Image, name: str, more: Sequence[int] = ()) -> dict:
    """Return a ``vllm.TokensPrompt``: the prompt with one image token, which vLLM repeats as the picture
    needs, and `more`.

    name: the picture's, unique in the engine's life: its cache knows the picture again by it without
    hashing pixels.
    """
    return {
        "prompt_token_ids": [*prompt, *more],
        "multi_modal_data": {"image": picture},
        "multi_modal_uuids": {"image": [name]},
    }


def reading(tokens: Mapping[str, int]) -> dict:
    """Return the sampling settings that read off the log-probabilities of these tokens as they are, before
    any truncation.
    """
    return {
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": len(tokens),
        "logprob_token_ids": list(tokens.values()),
        "detokenize": False,
    }


def llm_options(policy: str | Path) -> tuple[dict, str | None]:
    """Return the keywords for ``vllm.LLM`` and the path of the adapter, if `policy` is the folder of one.

    The base serves in bf16, the adapter on top of it: nothing is merged. An adapter that was trained on a
    base in 4 bits is refused: on another base it gives other scores.
    """
    options = {
        "max_model_len": MAX_TOKENS,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "enable_prefix_caching": True,
    }
    path = TINY if str(policy) == "tiny-policy" else Path(policy)
    if not (path / "adapter_config.json").is_file():
        return options | {"model": str(path)}, None
    adapter = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    base, rank = (
        adapter["base_model_name_or_path"],
        min((r for r in RANKS if r >= adapter["r"]), default=None),
    )
    if rank is None:
        raise ValueError(
            f"{path}: vLLM serves adapters up to rank {RANKS[-1]}, and this one has {adapter['r']}; use engine='transformers'"
        )
    if trained_in_4_bits(path):
        raise ValueError(
            f"{path}: this adapter was trained on a base in 4 bits, and vLLM serves the base in bf16, with which its scores differ; "
            "write out what it was trained on, vqr1.policy.merge_adapter(folder, output), and serve that; or use engine='transformers'"
        )
    return options | {"model": base, "enable_lora": True, "max_lora_rank": rank}, str(path)


def load_vllm(policy: str | Path | tuple) -> tuple["Vllm", ProcessorMixin]:
    """Return (engine, processor) of a model's or an adapter's folder, of a hub name, or of a pair
    (``vllm.LLM``, processor) of your own.

    Raises ModuleNotFoundError, saying how to install it, where vLLM is missing.
    """
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"engine='vllm' needs vLLM ({error}). It runs on a GPU and wants its own environment: {INSTALL}; or use engine='transformers'"
        ) from error
    if isinstance(policy, tuple):
        return Vllm(policy[0], SamplingParams, never=never_sampled(policy[1])), policy[1]
    options, adapter = llm_options(policy)
    lora = LoRARequest("vqr1", 1, adapter) if adapter else None
    processor = load_processor(options["model"], AutoConfig.from_pretrained(options["model"]).model_type)
    return Vllm(LLM(**options), SamplingParams, lora, never_sampled(processor)), processor


class Vllm:
    """What the Scorer asks of a model, asked of vLLM: texts, or the distribution of the answer."""

    def __init__(self, llm, sampling_params, lora=None, never: Iterable[str] = VISION):
        self.llm, self.sampling_params, self.lora, self.never = llm, sampling_params, lora, list(never)

    def texts(
        self, prompt: list[int], pictures: list[Image.Image], k: int, max_tokens: int, seed: int
    ) -> list[str]:
        """Return k completions of each picture, one picture after the other: greedy if k is 1, else sampled
        at temperature 1.
        """
        how = {"n": k, "temperature": 1.0, "seed": seed} if k > 1 else {"temperature": 0.0}
        rows = [request(prompt, picture, uuid.uuid4().hex) for picture in pictures]
        outputs = self._run(rows, max_tokens=max_tokens, bad_words=self.never, **how)
        return [answer.text for output in outputs for answer in output.outputs]

    def distributions(
        self,
        prompt: list[int],
        pictures: list[Image.Image],
        tokens: Mapping[str, int],
        stop: str = "",
        tag: int = -1,
        max_tokens: int = 0,
        ahead: int = 12,
    ) -> tuple[list[str], torch.Tensor, list[str]]:
        """Return the text before each picture's answer, the probability of each answer after it, (B, 3,
        1231), and the likeliest one.

        tokens: those of `answers.tokens_of`. With `stop`, whose last token is `tag`, text is generated
        greedily up to it first; where it does not come within `max_tokens`, the probabilities are 0. All
        pictures go down the tree together, in at most six calls, the last one of which follows the
        likeliest number for `ahead` tokens.
        """
        names = [uuid.uuid4().hex for _ in pictures]
        texts, more = [""] * len(pictures), [[]] * len(pictures)
        if stop:
            first = [request(prompt, picture, name) for picture, name in zip(pictures, names)]
            outputs = self._run(
                first,
                temperature=0.0,
                max_tokens=max_tokens,
                stop=[stop],
                include_stop_str_in_output=True,
                bad_words=self.never,
            )
            texts, more = (
                [output.outputs[0].text for output in outputs],
                [[*output.outputs[0].token_ids[:-1], tag] for output in outputs],
            )
        trees: list[Tree] = [{} for _ in pictures]
        ready = [i for i, text in enumerate(texts) if text.endswith(stop)]
        while asked := [(i, text) for i in ready for text in unasked(trees[i])]:
            rows = [
                request(prompt, pictures[i], names[i], more[i] + [tokens[c] for c in text])
                for i, text in asked
            ]
            for (i, text), output in zip(asked, self._run(rows, **reading(tokens))):
                trees[i][text] = following(output.outputs[0].logprobs[0], tokens)
        probability = torch.stack([distribution(tree) for tree in trees])
        starts, written = [likeliest(p) for p in probability], [""] * len(pictures)
        rows = [
            request(prompt, pictures[i], names[i], more[i] + [tokens[c] for c in starts[i]]) for i in ready
        ]
        how = {
            "temperature": 0.0,
            "max_tokens": ahead,
            "stop": ["</"],
            "include_stop_str_in_output": True,
            "bad_words": self.never,
        }
        for i, output in zip(ready, self._run(rows, **how) if rows else []):
            answer = output.outputs[0]
            written[i] = closed(starts[i] + answer.text, answer.finish_reason == "length")
        return texts, probability, written

    def _run(self, requests: list[dict], **settings) -> list:
        """Return vLLM's outputs; raise Refused where it finds fault with a request, which it does before it
        computes anything.
        """
        try:
            return self.llm.generate(
                requests, self.sampling_params(**settings), use_tqdm=False, lora_request=self.lora
            )
        except ValueError as error:
            raise Refused(str(error)) from error
