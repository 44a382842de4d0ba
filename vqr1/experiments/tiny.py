"""Build the embedded policy that `vqr1 pretrain` teaches: its tokenizer, its sizes, its tower's start."""

import math

import numpy as np
import torch
from scipy.fft import dct
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vqr1.policy import VISION, PictureProcessor, Policy
from vqr1.prompts import NON_THINKING, QUESTION, THINKING

PATCH = 16
"""Pixels a side: two of KADID-10k's 8x8 JPEG blocks; 512x384 is a whole number of merged patches."""

WIDTH = 192
"""Of the policy's layers, and so the number of filters in its patch embedding."""
LARGEST = 512
"""Side of the largest square that it sees without shrinking, px."""
LUMA, BLUE, RED = (0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081)
"""Weights of R, G and B: JPEG's luma and chroma."""

CHAT_TEMPLATE = (
    "{% set pictures = namespace(n=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set pictures.n = pictures.n + 1 %}"
    "{% if add_vision_id %}Picture {{ pictures.n }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's chat layout for pictures and text."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION)
"""Qwen's special tokens."""


def build_tokenizer(texts: list[str], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen's special tokens, one token per digit and per answer tag.

    Each form of the paper's question is one added token: the prompt is 6 times shorter.

    Args:
        texts: what it is to encode.
        vocab_size: tokens in all.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\d| ?[^\W\d]+| ?[^\w\s]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
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
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_policy(texts: list[str], seed: int = 0) -> Policy:
    """Build the untrained embedded policy: Qwen2.5-VL's class with 3.5 million weights.

    Pictures above 512x512 pixels are shrunk: it was taught on none larger. The sizes of all linear
    layers are multiples of 64, which bitsandbytes' 4-bit layers need on CPUs.

    Args:
        texts: what its tokenizer is trained on.
        seed: of its weights.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(texts)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL))))
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            hidden_size=WIDTH,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]},
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
            tie_word_embeddings=True,
            initializer_range=0.05,
        ),
        vision_config=dict(
            depth=3,
            hidden_size=WIDTH,
            intermediate_size=384,
            num_heads=3,
            patch_size=PATCH,
            temporal_patch_size=1,
            spatial_merge_size=2,
            window_size=8 * PATCH,
            out_hidden_size=WIDTH,
            fullatt_block_indexes=[0, 1, 2],
            initializer_range=0.06,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    pictures = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=1,
        merge_size=2,
        size={"shortest_edge": 64 * 64, "longest_edge": LARGEST * LARGEST},
    )
    processor = PictureProcessor(pictures, tokenizer, chat_template=CHAT_TEMPLATE)
    return Policy(model, processor, "tiny-policy, untrained")


def dct_basis(n: int) -> np.ndarray:
    """Return the orthonormal DCT-II basis, (frequency, n).

    >>> dct_basis(2)
    array([[ 0.71,  0.71],
           [ 0.71, -0.71]])
    """
    return dct(np.eye(n), axis=0, norm="ortho")


def _dct_filters(n: int, count: int) -> np.ndarray:
    """Return the first `count` 2-D DCT filters of n x n pixels in order of frequency, (count, n, n)."""
    basis = dct_basis(n)
    pairs = sorted(((u, v) for u in range(n) for v in range(n)), key=lambda uv: (sum(uv), uv))[:count]
    return np.stack([np.outer(basis[u], basis[v]) for u, v in pairs])


def _seams() -> list[np.ndarray]:
    """Return 16 filters of third differences: across the seam between 8x8 blocks and beside it, both ways."""
    filters = []
    for center in (4, 8, 6, 10):
        for half in (slice(0, 8), slice(8, 16)):
            jump = np.zeros((PATCH, PATCH))
            jump[center - 2 : center + 2, half] = np.array([1, -3, 3, -1])[:, None]
            filters += [jump, jump.T]
    return filters


def _energy_filters() -> torch.Tensor:
    """Return the filters of `start_from_energies`, (192, 3, 16, 16).

    Luma: two 8x8 blocks' DCT, low frequencies of 16x16, and the seams. Each chroma: low frequencies of
    16x16, and a few of every band.
    """
    block = _dct_filters(8, 64)
    corners = np.zeros((64 + 48, PATCH, PATCH))
    corners[:64, :8, :8], corners[64:, 8:, 8:] = block, block[:48]
    chroma = _dct_filters(PATCH, 256)[[*range(12), *range(12, 256, 31)]]
    luma = [*corners, *_dct_filters(PATCH, 24), *_seams()]
    weights = np.array([LUMA] * len(luma) + [BLUE] * len(chroma) + [RED] * len(chroma))
    spatial = np.stack([*luma, *chroma, *chroma])
    return torch.tensor(weights[:, :, None, None] * spatial[:, None], dtype=torch.float32)


def start_from_energies(model: Qwen2_5_VLForConditionalGeneration, patches: torch.Tensor) -> None:
    """Let the untrained vision tower see local energies, which tell blur, noise and blocking apart.

    The patch embedding becomes DCT filters, each scaled to unit deviation on sample patches. The first
    block's SwiGLU starts as silu(x) x + silu(-x) (-x) = x^2 for every channel; a constant in the last
    channel keeps its RMS norm from dividing the contrast out.

    Args:
        model: of `build_policy`; it is changed in place.
        patches: (n, 3 * PATCH * PATCH), as the image processor gives them.
    """
    filters = _energy_filters()
    deviation = (patches @ filters.flatten(1).T).std(0)
    filters /= (deviation + 0.05 * deviation.median())[:, None, None, None]
    filters[-1] = 0
    first, eye = model.model.visual.blocks[0], torch.eye(WIDTH)
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.copy_(filters.unsqueeze(2))
        first.attn.proj.bias[-1] = math.sqrt(WIDTH)
        first.mlp.gate_proj.weight.copy_(torch.cat([eye, -eye]))
        first.mlp.up_proj.weight.copy_(torch.cat([eye, -eye]))
        mix = torch.nn.init.orthogonal_(torch.empty(WIDTH, WIDTH)) * 0.3
        first.mlp.down_proj.weight.copy_(torch.cat([mix, mix], 1))
