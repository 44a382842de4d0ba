"""The engines that a policy answers through: transformers, and vLLM.

An engine is one file here, named in `ENGINES`; its `load(policy, quantize, pixels)` returns an `Engine`.
Nothing else knows about engines: the `Scorer` hands pictures over and makes scores of the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image

    from vqr1.engines.answers import Answer, Prepared

ENGINES = ("transformers", "vllm")


class Engine(Protocol):
    """What an engine must offer.

    A `chat` is a list of messages with one image, as `vqr1.prompts.messages` gives it. Answers come back in
    the order of the pictures; a picture that the engine cannot answer for has an `error`, and the others keep
    their answers. The engine may split what it is given into batches of at most `batch_size`.
    """

    def check(self, estimate: str) -> None:
        """Raise ValueError, saying what else to use, if this policy cannot be asked for this estimate."""

    def prepare(self, image: Image.Image) -> Prepared:
        """Return an RGB image as the model takes it, and its bytes. Several threads call it at a time.

        Raises ValueError for an image that the model does not take.
        """

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
        """Return k completions of each picture, in `Answer.texts`.

        Greedy if k is 1, else sampled at temperature 1, neither top-k nor top-p.
        penalty: what the logits of tokens in prompt and completion are divided by, or multiplied if negative.
        """

    def distributions(
        self, chat: list[dict], prepared: list[Prepared], thinking: bool, max_tokens: int, batch_size: int
    ) -> list[Answer]:
        """Return each picture's text before its answer, all answers' probabilities, and the likeliest answer.

        thinking: generate greedily up to the opening tag first, in at most `max_tokens`; otherwise the prompt
            ends in the tag.
        """


def load_engine(
    name: str,
    policy: str | Path | tuple,
    quantize: bool | None = None,
    pixels: Sequence[int] | None = None,
) -> Engine:
    """Return the engine of this name with a policy in it.

    Args:
        name: one of `ENGINES`.
        policy: what the engine's own `load` takes.
        quantize: as for `load_policy`.
        pixels: as for `load_policy`.

    Raises:
        ValueError: there is no such engine, or it cannot load the policy so.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r} is unknown; use one of {', '.join(ENGINES)}")
    return import_module(f"{__name__}.{name}").load(policy, quantize, pixels)
