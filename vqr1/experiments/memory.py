"""Compute a GRPO step's GPU memory at a published size from the architecture; nothing is measured."""

import re
from collections import Counter

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vqr1.policy import LANGUAGE_LAYERS

_TEXT = {
    "3B": dict(
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ),
    "7B": dict(
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
        tie_word_embeddings=False,
    ),
}
PROMPT_TOKENS = 120
"""About what the paper's question and the chat layout take in Qwen's own tokens."""
FP32 = 4
"""Bytes."""
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes: a code of 4 bits, 8 bits for each block of 64, fp32 for each 256 blocks."""
RESERVED = 3
"""GiB, at most, that a GPU needs beyond what is allocated: expected, neither computed nor measured.

CUDA's context, fragmentation as the KV cache grows, 4-bit weights written out while they are used.
"""


def qwen_config(size: str) -> Qwen2_5_VLConfig:
    """Return Qwen2.5-VL's architecture in size "3B" or "7B", without weights, from its config.json.

    >>> qwen_config("7B").text_config.num_hidden_layers
    28
    """
    text = _TEXT[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(
        text_config=dict(**text, rms_norm_eps=1e-6, max_position_embeddings=128_000, rope_parameters=rope),
        vision_config=dict(
            hidden_size=1280,
            intermediate_size=3420,
            depth=32,
            num_heads=16,
            out_hidden_size=text["hidden_size"],
        ),
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def _parameters(config: PretrainedConfig) -> tuple[dict[str, int], int]:
    """Return the parameters of each part of a model, never allocated, and those of an adapter per rank."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    count = Counter()
    for name, weight in model.named_parameters():  # a tied output layer is listed once
        tower = "vision tower" if ".visual." in name else "language model"
        table = "embed_tokens" in name or "lm_head" in name
        count["embeddings and output layer" if table else tower] += weight.numel()
    adapted = [module for name, module in model.named_modules() if re.fullmatch(LANGUAGE_LAYERS, name)]
    return count, sum(module.in_features + module.out_features for module in adapted)


def memory_by_part(
    config: PretrainedConfig,
    quantize: bool = True,
    lora: int = 16,
    images: int = 8,
    k: int = 6,
    new_tokens: int = 256,
    micro_batch: int = 6,
    size: tuple[int, int] = (512, 384),
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = True,
) -> dict[str, float]:
    """Return a GRPO step's GPU memory in GiB, by part: what is *allocated*, computed and not measured.

    The GPU also needs what is reserved beyond it, `RESERVED`. Not counted either: a second model as reference
    (full fine-tuning with a KL term).

    Args:
        config: `qwen_config`, or a model's own.
        quantize: whether the language model is in 4-bit NF4.
        lora: rank of an adapter on the language model; 0 trains every weight.
        images: sampled in one go, as TRL does.
        k: answers to each image.
        new_tokens: of each answer.
        micro_batch: answers learned from at a time.
        size: (width, height) of the pictures in px.
        dtype: of activations and of weights that are neither quantised nor trained.
        checkpointing: whether gradients are checkpointed.

    Returns:
        Of what stays:
        language model: its weights, in NF4 if quantised.
        embeddings and output layer: the two tables, one where they are tied.
        vision tower: its weights.
        adapter: its weights, fp32.
        optimizer: AdamW's two moments of what is trained, fp32.
        pixels: patches of all pictures, repeated for each answer, fp32.
        Of sampling:
        KV cache: keys and values of all answers with their prompts.
        activations, sampling: one layer's, of the prefill or of the tower.
        Of learning:
        gradients: of what is trained, fp32.
        activations, learning: each layer's input and all of one layer; without checkpointing all of every
            layer.
        In all:
        peak: what stays, plus the larger of sampling and learning.

    >>> parts = memory_by_part(qwen_config("7B"))
    >>> [round(parts[part], 1) for part in ("language model", "vision tower", "KV cache", "peak")]
    [3.1, 1.3, 1.6, 9.1]
    """
    text, bytes_ = config.text_config, dtype.itemsize
    patches = _patches(config, size)
    prompt = patches // config.vision_config.spatial_merge_size**2 + PROMPT_TOKENS
    answers, whole = images * k, prompt + new_tokens
    count, per_rank = _parameters(config)
    adapter = lora * per_rank
    trained = adapter or sum(count.values())
    stays = _weights(count, adapter, quantize, bytes_) | {
        "optimizer": 2 * FP32 * trained,
        "pixels": FP32 * answers * patches * _values_per_patch(config),
    }
    sampling = {
        "KV cache": answers * whole * _cache_per_token(text) * bytes_,
        "activations, sampling": bytes_ * _sampling_values(config, images, prompt, patches),
    }
    learning = {
        "gradients": FP32 * trained,
        "activations, learning": bytes_ * _learning_values(text, micro_batch * whole, checkpointing),
    }
    peak = sum(stays.values()) + max(sum(sampling.values()), sum(learning.values()))
    return {part: taken / 2**30 for part, taken in (stays | sampling | learning | {"peak": peak}).items()}


def _patches(config: PretrainedConfig, size: tuple[int, int]) -> int:
    """Return the patches that the image processor makes of a picture of (width, height) px."""
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    height, width = smart_resize(size[1], size[0], side, 4 * side**2, 10**8)
    return height * width // vision.patch_size**2


def _values_per_patch(config: PretrainedConfig) -> int:
    vision = config.vision_config
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def _weights(count: dict[str, int], adapter: int, quantize: bool, bytes_: int) -> dict[str, float]:
    """Return the bytes of the weights, by part; all are fp32 where there is no adapter to train."""
    weight = bytes_ if adapter else FP32
    return {
        "language model": count["language model"] * (NF4 if quantize else weight),
        "embeddings and output layer": count["embeddings and output layer"] * weight,
        "vision tower": count["vision tower"] * weight,
        "adapter": FP32 * adapter,
    }


def _cache_per_token(text: PretrainedConfig) -> int:
    """Return how many numbers one token's keys and values hold, over all layers."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head


def _sampling_values(config: PretrainedConfig, images: int, prompt: int, patches: int) -> int:
    """Return the activations alive while one layer runs: of the prefill, or of the tower if that is more.

    Each prompt is prefilled once (`vqr1.sharing.prefill_once`), and each picture looked at once.
    """
    prefill, look = (
        images * length * (3 * part.intermediate_size + 4 * part.hidden_size)
        for part, length in ((config.text_config, prompt), (config.vision_config, patches))
    )
    return max(prefill, look)


def _learning_values(text: PretrainedConfig, tokens: int, checkpointing: bool) -> int:
    """Return the activations that a backward pass over so many tokens needs.

    All of one layer, and each layer's input; without checkpointing, all of every layer.
    """
    layer = tokens * (6 * text.intermediate_size + 16 * text.hidden_size)
    inputs = tokens * text.hidden_size * text.num_hidden_layers
    return layer + inputs if checkpointing else layer * text.num_hidden_layers
