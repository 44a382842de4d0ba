"""Policies: the embedded one, Qwen2.5-VL, Qwen3-VL; their processors; 4-bit and LoRA.

peft and bitsandbytes are imported only for adapters and quantised weights: each takes as long as scoring
a few pictures.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import namedtuple
from collections.abc import Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_torchvision_available

from vqr1 import quiet
from vqr1.places import EMBEDDED

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

LOG = logging.getLogger(__name__)
SHIPPED = ("people-ranker", "ranker", "tiny-policy")
"""Policies that come with the project: trained on people's ratings, on simulated ones, and untrained."""
VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
"""Tokens that stand for pictures and their borders: a prompt has them, an answer never."""
PATCH = 32 * 32
"""Most pixels that become one token: 32x32 in the embedded policy and Qwen3-VL, 28x28 in Qwen2.5-VL."""
BASE = "base.json"
"""File beside an adapter: was its base in 4 bits when it was trained, and which weights had it?"""
PROMPT = "vqr1.json"
"""File beside trained weights: the prompt's `thinking` and `picture_number` in training."""
CALIBRATION = "calibration.json"
"""File in a policy's folder: how far its scores may be off (`vqr1.calibration`)."""
FOR_VIDEOS = ("patch_size", "temporal_patch_size", "merge_size", "size", "image_mean", "image_std")
"""Settings that Qwen's processors of pictures and of videos have in common."""
LANGUAGE_LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
"""LoRA's targets: the language model alone, which every serving engine can load."""
VISION_LAYERS = r".*visual\.blocks.*\.(qkv|proj|gate_proj|up_proj|down_proj|linear_fc1|linear_fc2)"
"""The vision tower's linear layers, by Qwen2.5-VL's and Qwen3-VL's names."""


class Policy(namedtuple("Policy", ["model", "processor"])):
    """A model and its processor, which unpack as a pair.

    `name` says where they come from, `prompt` how they were asked in training (`trained_prompt`).

    >>> model, processor = policy = Policy("a model", "its processor", "tiny-policy")
    >>> model, policy.processor, policy.name
    ('a model', 'its processor', 'tiny-policy')
    """

    name: str
    prompt: dict[str, bool]

    def __new__(cls, model, processor, name: str = "the given policy"):
        policy = super().__new__(cls, model, processor)
        policy.name, policy.prompt = name, trained_prompt(name)
        return policy


class PictureProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor for still pictures: no video processor, and so no torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> list[str]:
        """Save it, and beside it the video processor's settings, without which vLLM does not load a policy.

        They are those for pictures. vLLM reads the whole of Qwen2.5-VL's processor, though no video comes.
        """
        saved = super().save_pretrained(save_directory, **kwargs)
        ours = json.loads(self.image_processor.to_json_string())
        video = {"video_processor_type": "Qwen2VLVideoProcessor"} | {key: ours[key] for key in FOR_VIDEOS}
        text = json.dumps(video, indent=2) + "\n"
        (Path(save_directory) / "video_preprocessor_config.json").write_text(text, encoding="utf-8")
        return saved


def policy_path(name: str | Path) -> Path:
    """Return the folder of a shipped policy, or any other name as a path.

    >>> policy_path("tiny-policy").parent.name, policy_path("runs/mine").parts
    ('data', ('runs', 'mine'))
    """
    return EMBEDDED / name if str(name) in SHIPPED else Path(name)


def trained_prompt(policy: str | Path | tuple) -> dict[str, bool]:
    """Return `thinking` and `picture_number` as a policy was trained; nothing where its folder does not say.

    Args:
        policy: what `as_policy` takes. A name on the hub and a pair of your own say nothing.

    >>> trained_prompt("tiny-policy")
    {}
    """
    if isinstance(policy, Policy):
        return policy.prompt
    record = None if isinstance(policy, tuple) else policy_path(policy) / PROMPT
    return json.loads(record.read_text(encoding="utf-8")) if record and record.is_file() else {}


def as_policy(
    policy: str | Path | tuple, quantize: bool | None = None, pixels: Sequence[int] | None = None
) -> Policy:
    """Return a `Policy`, loading it where only its name is given.

    Args:
        policy: a `Policy`, which is returned as it is; your own pair (model, processor); or what
            `load_policy` takes.
        quantize: for `load_policy`.
        pixels: for `load_policy`.

    Raises:
        ValueError: `quantize` or `pixels` is given for a policy that is loaded already.
    """
    if not isinstance(policy, tuple):
        return load_policy(policy, quantize, pixels=pixels)
    refuse_loaded(quantize, pixels)
    return policy if isinstance(policy, Policy) else Policy(*policy)


def refuse_loaded(quantize: bool | None, pixels: Sequence[int] | None) -> None:
    """Raise ValueError if what only loading can set is asked of a loaded policy."""
    if quantize is not None or pixels is not None:
        raise ValueError(
            "quantize and pixels are set when a policy is loaded, and this one is: give them to load_policy"
        )


@quiet()
def load_policy(
    name_or_path: str | Path = "tiny-policy",
    quantize: bool | None = None,
    dtype: torch.dtype | None = None,
    pixels: Sequence[int] | None = None,
) -> Policy:
    """Return a policy, as a pair (model, processor) that knows its name.

    Weights are read from safetensors alone, and no code that comes with them is run. An adapter's folder
    loads its base first, and the adapter can be trained on. Processors pad on the left.

    Args:
        name_or_path: one of `SHIPPED`, a folder of a model or an adapter, or a hub name:
            Qwen/Qwen2.5-VL-3B-Instruct, …-7B-Instruct, TianheWu/VisualQuality-R1-7B,
            Qwen/Qwen3-VL-2B-Instruct, …-4B…, …-8B….
        quantize: load the language model in 4-bit NF4. Default: as an adapter was trained, and not for a
            whole model. A base other than the trained one changes the scores, with a
            warning.
        dtype: of all other weights, default `default_dtype()`. Instead of fp16 the vision tower gets fp32,
            and with `quantize` all of them do: activations can leave fp16's range and become NaN.
        pixels: (smallest, largest) number of pixels that a picture is scaled to, default the processor's.

    Raises:
        FileNotFoundError: the folder holds no model; or the name is neither a folder nor on the hub.
        ValueError: `pixels` are no range that a picture fits in.
    """
    if pixels is not None:
        check_pixels(pixels)
    name, dtype = str(name_or_path), dtype or default_dtype()
    path = policy_path(name)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        return Policy(*_load_adapter(path, quantize, dtype, pixels), name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no model: no config.json and no adapter_config.json; "
            "give a folder that save_pretrained wrote"
        )
    if not path.is_dir() and (
        name.count("/") != 1 or path.is_absolute() or name.startswith(".") or path.parent.is_dir()
    ):
        raise FileNotFoundError(
            f"{name}: no such folder; give one of {', '.join(SHIPPED)}, a folder of a model or an adapter, "
            "or a hub name like Qwen/Qwen2.5-VL-7B-Instruct"
        )
    source = str(path) if path.is_dir() else name
    four_bits = {"quantization_config": four_bit(default_dtype() if dtype == torch.float32 else dtype)}
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
            **(four_bits if quantize else {}),
        )
    except OSError as error:
        if path.is_dir():
            raise
        raise FileNotFoundError(
            f"{name}: no such folder, and the hub gave no such model ({error})"
        ) from error
    if getattr(model, "is_quantized", False):
        disable_cpu_packing(model)
    return Policy(model, processor, name)


def _load_adapter(
    path: Path, quantize: bool | None, dtype: torch.dtype, pixels: Sequence[int] | None
) -> tuple[PeftModel, ProcessorMixin]:
    """Return an adapter on its base, both ready to be trained on, and the base's processor."""
    from peft import PeftModel

    if not (path / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(
            f"{path} holds no adapter_model.safetensors; other formats can run code when read, and are not"
        )
    model, processor = load_policy(base_name(path), _base_in_4_bits(path, quantize), dtype, pixels)
    return PeftModel.from_pretrained(model, path, is_trainable=True), processor


def base_name(folder: str | Path) -> str:
    """Return the name of an adapter's base.

    folder: of the adapter. Raises ValueError where the base has other weights than the adapter was trained
        on: their shapes may fit, and the scores would be wrong.
    """
    config, record = Path(folder) / "adapter_config.json", Path(folder) / BASE
    name = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    known = json.loads(record.read_text(encoding="utf-8")).get("weights") if record.is_file() else None
    if known and (found := weights_digest(name)) and found != known:
        raise ValueError(
            f"{folder} was trained on other weights than {name} has now: bring those back, or train it again"
        )
    return name


def weights_digest(name: str | Path) -> str | None:
    """Return a digest of a policy's weights, from samples all over its files; None for what is no folder.

    >>> len(weights_digest("tiny-policy")), weights_digest("Qwen/Qwen2.5-VL-7B-Instruct")
    (64, None)
    """
    files = sorted(policy_path(name).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(64):
                file.seek(max(0, (place + 1) * size // 64 - 4096))  # the last one ends with the file
                digest.update(file.read(4096))
    return digest.hexdigest() if files else None


def check_pixels(pixels: Sequence[int]) -> None:
    """Raise ValueError unless (smallest, largest) number of pixels is a range that holds one token.

    >>> check_pixels([3136, 401_408])
    """
    least, most = pixels
    if not 1 <= least <= most or most < PATCH:
        raise ValueError(
            f"pixels {least} to {most} are no range; give the smallest number of pixels first, and the "
            f"largest at least {PATCH}, one token of the policy"
        )


def load_processor(source: str, model_type: str, pixels: Sequence[int] | None = None) -> ProcessorMixin:
    """Return the processor, left-padded; `PictureProcessor` if saved, or for a Qwen-VL without torchvision.

    Args:
        source: a folder, or a hub name.
        model_type: as the model's configuration has it, "qwen2_5_vl" for one.
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


def default_dtype() -> torch.dtype:
    """Return fp32 on a CPU, bf16 on a GPU that computes in it, else fp16 (a T4 only emulates bf16)."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def _wide(dtype: torch.dtype, quantize: bool) -> torch.dtype | dict[str, torch.dtype]:
    """Return the dtype for `from_pretrained`: fp32 instead of fp16 for parts that can leave fp16's range."""
    if dtype != torch.float16:
        return dtype
    if quantize:
        return torch.float32
    return {"": torch.float16, "text_config": torch.float16, "vision_config": torch.float32}


def _device_map() -> dict[str, int] | None:
    """Return this process's GPU; None on a CPU or under DeepSpeed's ZeRO-3, which spreads the weights."""
    if not torch.cuda.is_available() or is_deepspeed_zero3_enabled():
        return None
    from accelerate import PartialState

    return {"": PartialState().local_process_index}


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the model itself, or what an adapter sits on, with the adapter's layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def never_sampled(processor: ProcessorMixin) -> dict[str, int]:
    """Return the tokens that no answer may hold, {text: id}: image placeholders and borders.

    A sampled placeholder has no picture, so the next forward over the answer fails, hours into a run. They
    are barred in sampling only: it renormalises the other tokens, while log-probabilities stay those of the
    whole vocabulary. Policy, old policy and reference are treated alike: the ratio of an on-policy step is
    exactly 1 and the KL term is unchanged. vLLM's log-probabilities are of the other tokens only; it samples
    from just these, so the importance weight that TRL makes of both is right.

    Args:
        processor: of the policy.

    Returns:
        transformers suppresses the ids, vLLM the texts (``bad_words``); both set the logit to -inf.
    """
    tokenizer = processor.tokenizer
    found = {text: tokenizer.convert_tokens_to_ids(text) for text in (processor.image_token, *VISION)}
    return {text: token for text, token in found.items() if token not in (None, tokenizer.unk_token_id)}


# 4 bits


def four_bit(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return 4-bit NF4 with double quantisation; the vision tower and the output layer stay as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )


@quiet()
def disable_cpu_packing(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on CPUs with AVX512-BF16.

    An eval-mode forward packs them in place, and every later training step has wrong gradients, silently.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


# Adapters


@quiet()
def lora_config(r: int = 16, alpha: int = 32, vision: bool = False) -> LoraConfig:
    """Return peft's configuration of a LoRA on the language model's linear layers.

    It has no dropout: TRL samples in train mode.

    Args:
        r: its rank.
        alpha: its scale; what it adds is alpha / r times B A.
        vision: also on the vision tower's layers, which vLLM does not serve by default.
    """
    from peft import LoraConfig

    layers = f"{LANGUAGE_LAYERS}|{VISION_LAYERS}" if vision else LANGUAGE_LAYERS
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules=layers, task_type="CAUSAL_LM")


def trained_in_4_bits(folder: str | Path) -> bool | None:
    """Return whether an adapter's base was in 4 bits in training; None if the folder does not say."""
    record = Path(folder) / BASE
    return json.loads(record.read_text(encoding="utf-8"))["quantize"] if record.is_file() else None


def _base_in_4_bits(folder: str | Path, quantize: bool | None) -> bool:
    """Tell whether to load a base in 4 bits: as asked, else as trained; warn where the two differ or may."""
    words, trained = {True: "in 4 bits", False: "in full"}, trained_in_4_bits(folder)
    if trained is None and quantize is None:
        LOG.warning(
            "%s does not say whether its base was in 4 bits (no %s): loaded in full; "
            "say quantize=True if it was",
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


@quiet()
def merge_adapter(folder: str | Path, output: str | Path, quantize: bool | None = None) -> Path:
    """Write the policy in an adapter's folder as one model, which needs neither peft nor bitsandbytes.

    Its weights are W + (alpha / r) B A, with the W of the training. A 4-bit W is written out in full first:
    rounding the sum to 4 bits again would lose most of the adapter.

    Args:
        folder: of the adapter.
        output: folder to write the model and its processor into.
        quantize: whether W was 4-bit, default as the adapter's folder says.

    Returns:
        `output`.
    """
    from peft import PeftModel

    quantize = _base_in_4_bits(folder, quantize)
    model, processor = load_policy(base_name(folder), quantize)
    model = PeftModel.from_pretrained(model.dequantize() if quantize else model, folder).merge_and_unload()
    if prompt := trained_prompt(folder):
        note(model, PROMPT, prompt)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    (Path(output) / CALIBRATION).unlink(missing_ok=True)  # of other weights
    return Path(output)


# What training saves


def save_native_names(model: torch.nn.Module) -> None:
    """Make checkpoints keep the model's own weight names, the only ones that Trainer can read.

    By default transformers 5 writes Qwen2.5-VL's older names; a resumed run would start anew, with a warning.
    """
    if isinstance(model, PreTrainedModel):  # an adapter's checkpoint holds its own names already
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)


def note_base(model: torch.nn.Module) -> None:
    """Make saved adapters say whether their base is in 4 bits, and which weights it has, for `load_policy`.

    A model without an adapter is left alone.
    """
    if (base := base_of(model)) is not model:
        weights = weights_digest(base.name_or_path)
        note(model, BASE, {"quantize": bool(getattr(base, "is_loaded_in_4bit", False)), "weights": weights})


def note(model: torch.nn.Module, name: str, record: dict) -> None:
    """Make a model write a record beside its weights, as JSON, wherever it is saved."""
    save = model.save_pretrained

    @wraps(save)
    def noted(folder, *args, **kwargs):
        save(folder, *args, **kwargs)
        Path(folder, name).write_text(json.dumps(record), encoding="utf-8")

    model.save_pretrained = noted
