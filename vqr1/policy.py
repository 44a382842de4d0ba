"""Policies: the embedded one, Qwen2.5-VL, Qwen3-VL; their processors; 4-bit and LoRA."""

import json
import logging
import math
import re
from collections import Counter
from functools import partial, wraps
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.utils import is_torchvision_available

from vqr1 import quiet
from vqr1.places import EMBEDDED
from vqr1.prompts import NON_THINKING, QUESTION, THINKING

with quiet():
    import bitsandbytes as bnb
    from peft import LoraConfig, PeftConfig, PeftModel

LOG = logging.getLogger(__name__)
TINY = EMBEDDED / "tiny-policy"
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
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VISION = SPECIAL[3:]
"""Tokens that stand for pictures and their borders: a prompt has them, an answer never."""
BASE = "base.json"
"""Beside an adapter: whether the base it was trained on was in 4 bits."""


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


def build_policy(
    texts: list[str], seed: int = 0
) -> tuple[Qwen2_5_VLForConditionalGeneration, PictureProcessor]:
    """Build the untrained embedded policy: Qwen2.5-VL's class with 3.5 million weights.

    Pictures above 256x256 pixels are shrunk: it was taught on crops of that size.
    Every linear layer's sizes are multiples of 64, which bitsandbytes' 4-bit layers need on CPUs.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(texts)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL))))
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            hidden_size=192,
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
            hidden_size=192,
            intermediate_size=384,
            num_heads=3,
            patch_size=PATCH,
            temporal_patch_size=1,
            spatial_merge_size=2,
            window_size=8 * PATCH,
            out_hidden_size=192,
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
        size={"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
    )
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


def start_from_energies(model: Qwen2_5_VLForConditionalGeneration, patches: torch.Tensor) -> None:
    """Let the untrained vision tower see local energies: what tells blur, noise and blocking apart.

    The patch embedding becomes DCT filters, each scaled to unit deviation on sample `patches`, which are
    (n, 3 * PATCH * PATCH) as the image processor gives them. Luma has two 8x8 blocks, low frequencies of 16x16, and
    jumps at the seam between 8x8 blocks and beside it; chroma has 16x16. The first block's SwiGLU starts as
    silu(x) x + silu(-x) (-x) = x^2 for every channel; a constant in the last channel keeps its RMS norm from
    dividing the contrast out.
    """
    filters = np.zeros((192, 3, PATCH, PATCH), np.float32)
    luma, blue, red = (0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081)
    block = _dct_filters(8, 64)
    spatial = np.zeros((192, PATCH, PATCH))
    spatial[:64, :8, :8] = block
    spatial[64:112, 8:, 8:] = block[:48]
    spatial[112:136] = _dct_filters(PATCH, 24)
    for i, (at, half) in enumerate((at, half) for at in (4, 8, 6, 10) for half in (0, 8)):
        step = np.zeros((PATCH, PATCH))
        step[at - 2 : at + 2, half : half + 8] = np.array([1, -3, 3, -1])[:, None]
        spatial[136 + 2 * i], spatial[137 + 2 * i] = step, step.T
    chroma = _dct_filters(PATCH, 256)[[*range(12), *range(12, 256, 31)]]  # low ones and a few of every band
    spatial[152:172], spatial[172:192] = chroma, chroma
    colors = np.array([luma] * 152 + [blue] * 20 + [red] * 20)
    filters = torch.tensor(colors[:, :, None, None] * spatial[:, None], dtype=torch.float32)
    deviation = (patches @ filters.flatten(1).T).std(0)
    filters /= (deviation + 0.05 * deviation.median())[:, None, None, None]
    filters[-1] = 0
    first, eye = model.model.visual.blocks[0], torch.eye(192)
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.copy_(filters.unsqueeze(2))
        first.attn.proj.bias[-1] = math.sqrt(192)
        first.mlp.gate_proj.weight.copy_(torch.cat([eye, -eye]))
        first.mlp.up_proj.weight.copy_(torch.cat([eye, -eye]))
        mix = torch.nn.init.orthogonal_(torch.empty(192, 192)) * 0.3
        first.mlp.down_proj.weight.copy_(torch.cat([mix, mix], 1))


LANGUAGE_LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
"""LoRA's targets: the language model alone, which every serving engine can load."""
VISION_LAYERS = r".*visual\.blocks.*\.(qkv|proj|gate_proj|up_proj|down_proj|linear_fc1|linear_fc2)"
"""The vision tower's linear layers, by Qwen2.5-VL's and Qwen3-VL's names."""


def lora_config(r: int = 16, alpha: int = 32, vision: bool = False) -> LoraConfig:
    """Return a LoRA on the language model's linear layers, without dropout: TRL samples in train mode.

    `vision` adds the vision tower's, which vLLM does not serve by default.
    """
    layers = f"{LANGUAGE_LAYERS}|{VISION_LAYERS}" if vision else LANGUAGE_LAYERS
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=layers, task_type="CAUSAL_LM")


def four_bit(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return 4-bit NF4 with double quantisation; the vision tower and the output layer stay as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )


def keep_gradients(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on CPUs with AVX512-BF16.

    An eval-mode forward packs them in place, and every later training step has wrong gradients, silently.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def never_sampled(processor: ProcessorMixin) -> dict[str, int]:
    """Return the tokens that no answer may hold, {text: id}: the picture's placeholder and its kin.

    A sampled placeholder has no picture, and the next forward over the answer fails, hours into a run. They
    are barred where answers are sampled and nowhere else: log-probabilities remain those of the whole
    vocabulary, so sampling renormalises what is left and log-probabilities do not. Policy, old policy and
    reference are treated alike: the ratio of an on-policy step is exactly 1 and the KL term is what it was.
    vLLM's log-probabilities are of what is left; as it samples from just that, the importance weight that
    TRL makes of both is right.

    Args:
        processor: of the policy.

    Returns:
        for transformers the ids (to suppress), for vLLM the texts (``bad_words``); both get the logit -inf.
    """
    tokenizer = processor.tokenizer
    found = {text: tokenizer.convert_tokens_to_ids(text) for text in (processor.image_token, *VISION)}
    return {text: token for text, token in found.items() if token not in (None, tokenizer.unk_token_id)}


def default_dtype() -> torch.dtype:
    """Return fp32 on a CPU, bf16 on a GPU that computes in it, else fp16 (a T4 only emulates bf16)."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def load_policy(
    name_or_path: str | Path = "tiny-policy",
    quantize: bool | None = None,
    dtype: torch.dtype | None = None,
    pixels: list[int] | None = None,
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Return (model, processor) of the embedded policy, a local folder, an adapter's folder or a hub name.

    Hub names: Qwen/Qwen2.5-VL-3B-Instruct, …-7B-Instruct, TianheWu/VisualQuality-R1-7B,
    Qwen/Qwen3-VL-2B-Instruct, …-4B…, …-8B…. `quantize` loads the language model in 4-bit NF4; default: as
    an adapter was trained, and not for a whole model. A base that an adapter was not trained on gives other
    scores, and a warning. dtype: of all other weights, default `default_dtype`; in place of fp16 it is fp32
    for the vision tower, and with `quantize` for all of them: activations there can leave fp16's range, and
    give NaN. pixels: (smallest, largest) number of pixels a picture is scaled to, default the processor's
    own. A folder with an adapter loads its base first, and the adapter can be trained on. Processors pad on
    the left. Weights are read from safetensors alone, and no code that comes with them is run. Raises
    FileNotFoundError for a folder without a model, and for a name that is neither a folder nor to be had
    from the hub.
    """
    name, dtype = str(name_or_path), dtype or default_dtype()
    path = TINY if name == "tiny-policy" else Path(name)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(path).base_model_name_or_path
        if not (path / "adapter_model.safetensors").is_file():
            raise FileNotFoundError(
                f"{path} holds no adapter_model.safetensors; other formats can run code when read, and are not"
            )
        model, processor = load_policy(base, _base_in_4_bits(path, quantize), dtype, pixels)
        return PeftModel.from_pretrained(model, path, is_trainable=True), processor
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no model: no config.json and no adapter_config.json; give a folder that save_pretrained wrote"
        )
    if not path.is_dir() and (
        name.count("/") != 1 or path.is_absolute() or name.startswith(".") or path.parent.is_dir()
    ):
        raise FileNotFoundError(
            f"{name}: no such folder; give 'tiny-policy', a folder of a model or an adapter, or a hub name like Qwen/Qwen2.5-VL-7B-Instruct"
        )
    source = str(path) if path.is_dir() else name
    more = (
        {"quantization_config": four_bit(default_dtype() if dtype == torch.float32 else dtype)}
        if quantize
        else {}
    )
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        processor = load_processor(source, config.model_type, pixels)
        model = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=_wide(dtype, quantize),
            device_map=_device_map(),
            use_safetensors=True,
            trust_remote_code=False,
            **more,
        )
    except OSError as error:
        if path.is_dir():
            raise
        raise FileNotFoundError(
            f"{name}: no such folder, and the hub gave no such model ({error})"
        ) from error
    keep_gradients(model)
    return model, processor


def _wide(dtype: torch.dtype, quantize: bool) -> torch.dtype | dict[str, torch.dtype]:
    """Return what `from_pretrained` takes as dtype: where it would be fp16, the parts that can leave fp16's
    range are fp32.
    """
    if dtype != torch.float16:
        return dtype
    return (
        torch.float32
        if quantize
        else {"": torch.float16, "text_config": torch.float16, "vision_config": torch.float32}
    )


def _device_map() -> dict[str, int] | None:
    """Return this process's GPU; None on a CPU, and under DeepSpeed's ZeRO-3, which spreads the weights
    itself.
    """
    if not torch.cuda.is_available() or is_deepspeed_zero3_enabled():
        return None
    return {"": PartialState().local_process_index}


def load_processor(source: str, model_type: str, pixels: list[int] | None = None) -> ProcessorMixin:
    """Return the processor, left-padded; the one for still pictures if it was saved, or for a Qwen-VL
    without torchvision.

    pixels: (smallest, largest) number of pixels, default as saved.
    """
    still = model_type in ("qwen2_5_vl", "qwen3_vl") and not is_torchvision_available()
    saved = Path(source) / "processor_config.json"  # AutoProcessor does not know our class
    ours = (
        saved.is_file()
        and json.loads(saved.read_text(encoding="utf-8")).get("processor_class") == "PictureProcessor"
    )
    kind = PictureProcessor if still or ours else AutoProcessor
    processor = kind.from_pretrained(source, padding_side="left", trust_remote_code=False)
    if pixels:
        processor.image_processor.size = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    return processor


def trained_in_4_bits(folder: str | Path) -> bool | None:
    """Return whether an adapter's base was in 4 bits when it was trained; None where the folder does not
    say.
    """
    record = Path(folder) / BASE
    return json.loads(record.read_text(encoding="utf-8"))["quantize"] if record.is_file() else None


def _base_in_4_bits(folder: str | Path, quantize: bool | None) -> bool:
    """Return how to load an adapter's base: as asked for, else as it was trained; warn where the two differ
    or may.
    """
    words, trained = {True: "in 4 bits", False: "in full"}, trained_in_4_bits(folder)
    if trained is None and quantize is None:
        LOG.warning(
            "%s does not say whether its base was in 4 bits (no %s): loaded in full; say quantize=True if it was",
            folder,
            BASE,
        )
    if None not in (trained, quantize) and trained != quantize:
        LOG.warning(
            "%s was trained on a base %s and is loaded on one %s: its scores differ",
            folder,
            words[trained],
            words[quantize],
        )
    return bool(trained if quantize is None else quantize)


def merge_adapter(folder: str | Path, output: str | Path, quantize: bool | None = None) -> Path:
    """Write the policy in an adapter's folder as one model, which needs neither peft nor bitsandbytes;
    return `output`.

    W + (alpha / r) B A, with the W that the adapter was trained on: `quantize` says whether that was 4-bit,
    by default as the folder says. It is written out in full first, for in 4-bit weights the sum would be
    rounded again, and most of the adapter with it.
    """
    quantize = _base_in_4_bits(folder, quantize)
    model, processor = load_policy(PeftConfig.from_pretrained(folder).base_model_name_or_path, quantize)
    model = model.dequantize() if quantize else model
    PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(output)
    processor.save_pretrained(output)
    return Path(output)


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the model itself, or what an adapter sits on, with the adapter's layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def own_names(model: torch.nn.Module) -> None:
    """Let checkpoints keep the model's own weight names, the only ones by which Trainer reads them again.

    By default transformers 5 writes Qwen2.5-VL's older names, and a resumed run would start anew, with a
    warning.
    """
    if isinstance(model, PreTrainedModel):  # an adapter's checkpoint holds its own names already
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)


def note_base(model: torch.nn.Module) -> None:
    """Let whatever is saved of an adapter in training say whether its base is in 4 bits, for `load_policy`
    to read.
    """
    if not isinstance(model, PeftModel):
        return
    save, record = (
        model.save_pretrained,
        {"quantize": bool(getattr(base_of(model), "is_loaded_in_4bit", False))},
    )

    @wraps(save)
    def noted(folder, *args, **kwargs):
        save(folder, *args, **kwargs)
        Path(folder, BASE).write_text(json.dumps(record), encoding="utf-8")

    model.save_pretrained = noted


# The published sizes, and what they take

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


def qwen_config(size: str) -> Qwen2_5_VLConfig:
    """Return the architecture of Qwen2.5-VL in size "3B" or "7B", without weights; source: the published
    config.json.

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
    """Return the parameters of each part of a model that is never allocated, and those of an adapter, per
    rank.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    count = Counter()
    for name, weight in model.named_parameters():  # a tied output layer is listed once
        tower = "vision tower" if ".visual." in name else "language model"
        count["embeddings and output layer" if "embed_tokens" in name or "lm_head" in name else tower] += (
            weight.numel()
        )
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
    """Return what one GRPO step takes on a GPU, by part and in all ("peak"), in GiB: computed, not measured.

    config: `qwen_config` or a model's own. lora: rank of an adapter on the language model; 0 trains every
    weight. images x k answers of `new_tokens` are sampled in one go, as TRL does, and learned from
    `micro_batch` at a time. size: (width, height) of the pictures in px. What is trained, its gradient and
    AdamW's two moments are fp32. Activations are the tensors known to be large: those of one layer's MLP
    while sampling, and while learning each layer's input and all of one layer's (of every layer without
    checkpointing). Peak is what stays, plus the larger of sampling and learning. Not counted: CUDA's own
    context, fragmentation, a second model as reference (full fine-tuning with a KL term).

    >>> parts = memory_by_part(qwen_config("7B"))
    >>> [round(parts[part], 1) for part in ("language model", "vision tower", "KV cache", "peak")]
    [3.1, 1.3, 1.6, 9.1]
    """
    count, per_rank = _parameters(config)
    text, vision, bytes_ = config.text_config, config.vision_config, dtype.itemsize
    side = vision.patch_size * vision.spatial_merge_size
    high, wide = smart_resize(size[1], size[0], side, 4 * side**2, 10**8)
    patches = high * wide // vision.patch_size**2
    tokens = patches // vision.spatial_merge_size**2 + PROMPT_TOKENS
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    trained = lora * per_rank or sum(count.values())
    weight = bytes_ if lora else 4
    nf4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # a code, 8 bits per block of 64, fp32 per 256 blocks
    mlp, row = text.intermediate_size * bytes_, text.hidden_size * bytes_
    prefill = images * tokens * (3 * mlp + 4 * row)  # each prompt once, see `prefill_once`
    look = images * patches * (3 * vision.intermediate_size + 4 * vision.hidden_size) * bytes_
    learned = micro_batch * (tokens + new_tokens)
    layer = learned * (6 * mlp + 16 * row)
    parts = {
        "language model": count["language model"] * (nf4 if quantize else weight),
        "embeddings and output layer": count["embeddings and output layer"] * weight,
        "vision tower": count["vision tower"] * weight,
        "adapter": 4 * lora * per_rank,
        "optimizer": 8 * trained,
        "pixels": 4
        * images
        * k
        * patches
        * vision.in_channels
        * vision.temporal_patch_size
        * vision.patch_size**2,
        "KV cache": images
        * k
        * (tokens + new_tokens)
        * text.num_hidden_layers
        * 2
        * text.num_key_value_heads
        * head
        * bytes_,
        "activations, sampling": max(prefill, look),
        "gradients": 4 * trained,
        "activations, learning": layer + learned * row * text.num_hidden_layers
        if checkpointing
        else layer * text.num_hidden_layers,
    }
    sampling, learning = (
        parts["KV cache"] + parts["activations, sampling"],
        parts["gradients"] + parts["activations, learning"],
    )
    stays = sum(list(parts.values())[:6])
    return {
        part: taken / 2**30 for part, taken in (parts | {"peak": stays + max(sampling, learning)}).items()
    }
