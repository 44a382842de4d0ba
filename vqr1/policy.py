"""Policies: the embedded one, Qwen2.5-VL, Qwen3-VL; their processors; 4-bit and LoRA."""

import math
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vqr1.prompts import NON_THINKING, QUESTION, THINKING

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny-policy"
"""The embedded policy."""

PATCH = 16
"""Pixels; two of KADID-10k's 8x8 JPEG blocks a side, and 512x384 is a whole number of merged patches."""

CHAT_TEMPLATE = (
    "{% set pictures = namespace(n=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set pictures.n = pictures.n + 1 %}"
    "{% if add_vision_id %}Picture {{ pictures.n }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's chat layout for pictures and text."""

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


class PictureProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor for still pictures: no video processor, and so no torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_tokenizer(texts: list[str], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen's special tokens, one token per digit and per answer tag.

    The paper's question is one added token each way it is asked: the prompt is 6 times shorter.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\d| ?[^\W\d]+| ?[^\w\s]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [f" {THINKING}", f" {NON_THINKING}", QUESTION, "<think>", "</think>", "<answer>", "</answer>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]), padding_side="left", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_policy(texts: list[str], seed: int = 0) -> tuple[Qwen2_5_VLForConditionalGeneration, PictureProcessor]:
    """Build the untrained embedded policy: Qwen2.5-VL's class with 3.5 million weights.

    Every linear layer's sizes are multiples of 64, which 4-bit layers need on CPUs
    (facts: bitsandbytes 0.50).
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(texts)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL))))
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64, hidden_size=192, intermediate_size=448,
            num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]},
            bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=3, hidden_size=192, intermediate_size=384, num_heads=3, patch_size=PATCH, temporal_patch_size=1,
            spatial_merge_size=2, window_size=8 * PATCH, out_hidden_size=192, fullatt_block_indexes=[0, 1, 2],
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    pictures = Qwen2VLImageProcessorPil(
        patch_size=PATCH, temporal_patch_size=1, merge_size=2,
        size={"shortest_edge": 64 * 64, "longest_edge": 512 * 384},
    )  # fmt: skip
    return model, PictureProcessor(pictures, tokenizer, chat_template=CHAT_TEMPLATE)


def _dct(n: int) -> np.ndarray:
    """Return the orthonormal DCT-II basis, (frequency, n)."""
    k, x = np.arange(n)[:, None], np.arange(n)[None]
    basis = np.cos(math.pi * (2 * x + 1) * k / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def _dct_filters(n: int, count: int) -> np.ndarray:
    """Return the first `count` 2-D DCT filters of n x n pixels in order of frequency, (count, n, n)."""
    basis = _dct(n)
    pairs = sorted(((u, v) for u in range(n) for v in range(n)), key=lambda uv: (sum(uv), uv))[:count]
    return np.stack([np.outer(basis[u], basis[v]) for u, v in pairs])


def start_from_dct(model: Qwen2_5_VLForConditionalGeneration, patches: torch.Tensor) -> None:
    """Set the patch embedding to DCT filters, each scaled to unit deviation on sample `patches`.

    A SwiGLU can square a coefficient: that is the local energy which tells blur, noise and blocking apart.
    Luma has two 8x8 blocks and one 16x16 (its odd frequencies see the seam between blocks), chroma 16x16.
    patches: (n, 3 * PATCH * PATCH), as the image processor gives them.
    """
    filters = np.zeros((192, 3, PATCH, PATCH), np.float32)
    luma, blue, red = (0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081)
    block = _dct_filters(8, 64)
    spatial = np.zeros((192, PATCH, PATCH))
    spatial[:64, :8, :8] = block
    spatial[64:112, 8:, 8:] = block[:48]
    spatial[112:152] = _dct_filters(PATCH, 40)
    chroma = _dct_filters(PATCH, 256)[[*range(12), *range(12, 256, 31)]]  # low ones and a few of every band
    spatial[152:172], spatial[172:192] = chroma, chroma
    colors = np.array([luma] * 152 + [blue] * 20 + [red] * 20)
    filters = torch.tensor(colors[:, :, None, None] * spatial[:, None], dtype=torch.float32)
    deviation = (patches @ filters.flatten(1).T).std(0)
    filters /= (deviation + 0.05 * deviation.median())[:, None, None, None]
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.copy_(filters.unsqueeze(2))
