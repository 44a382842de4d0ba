"""What a real model takes on a GPU: one GRPO step of Qwen2.5-VL 3B and 7B in 4 bits, and batch scoring.

    python tests/benchmarks/gpu.py                      # measured on a GPU; without one computed, and said so
    python tests/benchmarks/gpu.py --csv gpu.csv        # and write the rows
    python tests/benchmarks/gpu.py --tiny               # the same code on a CPU: its numbers mean nothing

The architectures are exact, the weights random: nothing is downloaded, and time and memory do not depend on
them. A random model does not stop early, so all 256 tokens are sampled: with thinking, an upper bound. A
step has 8 images of 512x384 x 6 completions x 256 tokens, by the kadid-7b-qlora configuration with one
generation per step; the second of two steps is timed. Each row is a process of its own, with the GPU's
memory capped; "fits" says whether it ran. "peak_gib" is what was reserved; of a computed row, what is
allocated. A capped large GPU shows a smaller one's memory, not its speed,
nor fp16 on a T4.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import wraps
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import bitsandbytes as bnb  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForImageTextToText, TrainerCallback  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer  # noqa: E402

from vqr1.config import Settings, load_config  # noqa: E402
from vqr1.data.manifests import load_ratings, render_rows  # noqa: E402
from vqr1.experiments.memory import PROMPT_TOKENS, RESERVED, memory_by_part, qwen_config  # noqa: E402
from vqr1.experiments.tiny import CHAT_TEMPLATE, SPECIAL  # noqa: E402
from vqr1.policy import (  # noqa: E402
    PictureProcessor,
    default_dtype,
    disable_cpu_packing,
    four_bit,
    load_processor,
    policy_path,
)
from vqr1.records import machine_line, write_table  # noqa: E402
from vqr1.scoring import Scorer  # noqa: E402
from vqr1.training import build_trainer  # noqa: E402

CAPS = (None, 40, 22, 14.5)
"""GiB; a T4 has about 14.6 for programs, an L4 22, the smaller A100 39."""
COLUMNS = [
    "how",
    "size",
    "cap_gib",
    "fits",
    "peak_gib",
    "step_s",
    "rollout_s",
    "reward_s",
    "update_s",
    "tokens_per_s",
    "images_per_s",
    "images_per_s_thinking",
]


def tiny_config():
    """Qwen2.5-VL's architecture in small; every size a multiple of 64, which 4-bit layers need on CPUs."""
    config = qwen_config("3B")
    text = dict(
        hidden_size=256,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=640,
    )
    vision = dict(
        hidden_size=64,
        intermediate_size=128,
        depth=2,
        num_heads=2,
        out_hidden_size=256,
        fullatt_block_indexes=[1],
    )
    for part, sizes in (
        (config.text_config, text | {"layer_types": ["full_attention"] * 2}),
        (config.vision_config, vision),
    ):
        for key, value in sizes.items():
            setattr(part, key, value)
    return config


def random_policy(config, device: torch.device, dtype: torch.dtype):
    """Return (model, processor) with random weights made on the device, one matrix at a time.

    The language model's are quantised to 4 bits at once.
    """
    processor = random_processor(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    quantizer = Bnb4BitHfQuantizer(four_bit(dtype), pre_quantized=False)
    quantizer.preprocess_model(model, device_map={"": device})
    torch.manual_seed(0)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            norm = weight.ndim == 1 and name == "weight"
            data = (
                torch.ones(weight.shape, dtype=dtype, device=device)
                if norm
                else torch.randn(weight.shape, dtype=dtype, device=device) * 0.02
            )
            if isinstance(module, bnb.nn.Linear4bit) and name == "weight":
                made = bnb.nn.Params4bit(
                    data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
                ).to(device)
            else:
                made = torch.nn.Parameter(data)
            setattr(module, name, made)
        buffers = dict(module.named_buffers(recurse=False))
        for name, buffer in buffers.items():
            module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
        if buffers:  # rotary frequencies
            model._init_weights(module)
    model.tie_weights()
    quantizer.postprocess_model(model)
    model.hf_quantizer, model.hf_device_map = (
        quantizer,
        {"": device.index or 0 if device.type == "cuda" else "cpu"},
    )
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = (
        config.text_config.pad_token_id,
        config.text_config.eos_token_id,
    )
    disable_cpu_packing(model)
    return model, processor


def random_processor(config) -> PictureProcessor:
    """Return the embedded tokenizer with Qwen's picture processor; prompts are padded to Qwen's length."""
    tokenizer = load_processor(str(policy_path("tiny-policy")), "qwen2_5_vl").tokenizer
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL))))
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config.vision_start_token_id, config.vision_end_token_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
    config.text_config.eos_token_id, config.text_config.pad_token_id = ids["<|im_end|>"], ids["<|endoftext|>"]
    pictures = Qwen2VLImageProcessorPil(
        patch_size=config.vision_config.patch_size, temporal_patch_size=2, merge_size=2
    )
    filled = CHAT_TEMPLATE.replace(
        "You are a helpful assistant.", "strong" + " strong" * (PROMPT_TOKENS - 20)
    )
    return PictureProcessor(pictures, tokenizer, chat_template=filled)


class Clock(TrainerCallback):
    """Measure the seconds that functions take in the current step, by name; the GPU is waited for.

    Watched functions inside another count in its `total`, not in its `seconds`.
    """

    def __init__(self):
        self.seconds, self.total, self.open = (
            Counter(),
            Counter(),
            [],
        )  # open: [name, seconds of what is inside] of the calls that are running

    def on_step_begin(self, *args, **kwargs):
        self.seconds, self.total = Counter(), Counter()

    def around(self, name, function):
        """Return the function with a clock.

        name: of what it does, or a function of a call's arguments that returns it, or None for no clock.
        """

        @wraps(function)
        def timed(*args, **kwargs):
            part = name if isinstance(name, str) else name(*args, **kwargs)
            if part is None:
                return function(*args, **kwargs)
            start = self.now()
            self.open.append([part, 0.0])
            try:
                return function(*args, **kwargs)
            finally:
                took, (_, inside) = self.now() - start, self.open.pop()
                self.seconds[part] += took - inside
                self.total[part] += took
                if self.open:
                    self.open[-1][1] += took

        return timed

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def one_row(size: str, cap: float | None, out: Path) -> dict:
    """Measure one size under one cap, in this process."""
    tiny = size == "tiny"
    device = torch.device("cpu") if tiny else torch.device("cuda", 0)
    if cap:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        )
    row = {"how": "tiny" if tiny else "measured", "size": size, "cap_gib": cap, "fits": False}
    try:
        model, processor = random_policy(
            tiny_config() if tiny else qwen_config(size), device, torch.float32 if tiny else default_dtype()
        )
        row |= grpo_step(model, processor, tiny, out) | {"fits": True}
        row["peak_gib"] = None if tiny else torch.cuda.max_memory_reserved() / 2**30
        if not cap:
            row["images_per_s"] = images_per_second(model, processor, False, tiny)
            row["images_per_s_thinking"] = images_per_second(model, processor, True, tiny)
    except torch.OutOfMemoryError:
        pass
    return row


def photographs(count: int, tiny: bool) -> pd.DataFrame:
    rows = load_ratings("sim-kadid").drop_duplicates("image").head(count).reset_index(drop=True)
    return rows if tiny else rows.assign(crop="")  # whole: 512x384


def configuration(tiny: bool, steps: int) -> Settings:
    """Return kadid-7b-qlora with one generation per step, for this GPU, or in small for a CPU."""
    config = load_config("kadid-7b-qlora")
    change = {
        "max_steps": steps,
        "gradient_accumulation_steps": config.grpo["steps_per_generation"],
        "save_strategy": "no",
    }
    if tiny:
        change |= {
            "per_device_train_batch_size": 2,
            "steps_per_generation": 2,
            "gradient_accumulation_steps": 2,
            "num_generations": 2,
            "max_completion_length": 4,
            "use_cpu": True,
            "bf16": False,
        }
    elif default_dtype() == torch.float16:
        change |= {"bf16": False, "fp16": True}
    return config.changed(grpo=change)


def grpo_step(model, processor, tiny: bool, out: Path) -> dict:
    """Return the seconds of the second of two steps, by part, and the tokens per second of rollout."""
    config = configuration(tiny, 2)
    trainer, clock = build_trainer(config, out, (model, processor), photographs(8, tiny)), Clock()
    trainer.model.generate = clock.around("rollout", trainer.model.generate)
    trainer.reward_funcs = [clock.around("reward", function) for function in trainer.reward_funcs]
    trainer.training_step = clock.around("step", trainer.training_step)
    trainer.add_callback(clock)
    trainer.train()
    last, args = clock.total, trainer.args
    tokens = args.per_device_train_batch_size * args.steps_per_generation * args.max_completion_length
    assert all(p.isfinite().all() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "step_s": last["step"],
        "rollout_s": last["rollout"],
        "reward_s": last["reward"],
        "update_s": clock.seconds["step"],
        "tokens_per_s": tokens / last["rollout"],
    }


def images_per_second(model, processor, thinking: bool, tiny: bool) -> float:
    """Return how many pictures of 512x384 the Scorer takes in a second, after one batch to warm up."""
    model.requires_grad_(False)
    pictures = render_rows(photographs(2 if tiny else 32, tiny), workers=1)
    scorer = Scorer((model, processor), thinking, batch_size=16, max_new_tokens=4 if tiny else 256)
    scorer.score(pictures[:16])
    start = Clock.now()
    scorer.score(pictures)
    return len(pictures) / (Clock.now() - start)


def measured(sizes: list[str], caps: tuple) -> list[dict]:
    """Run every size and cap in a process of its own."""
    rows = []
    for size in sizes:
        for cap in caps:
            command = [sys.executable, __file__, "--one", size, str(cap or "")]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
            if not lines:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
            rows.append(json.loads(lines[-1][4:]))
    return rows


def of_configuration(name: str) -> dict[str, float]:
    """Return the computed memory by part of a configuration for one GPU."""
    config = load_config(name)
    grpo, size = config.grpo, "3B" if "-3B-" in config.model_name_or_path else "7B"
    batch, k = grpo["per_device_train_batch_size"], grpo["num_generations"]
    images, dtype = batch * grpo["steps_per_generation"] // k, getattr(torch, config.dtype or "bfloat16")
    return memory_by_part(
        qwen_config(size),
        config.load_in_4bit,
        config.lora_r,
        images,
        k,
        grpo["max_completion_length"],
        batch,
        dtype=dtype,
    )


def computed() -> tuple[list[dict], pd.DataFrame]:
    """Return one row per size and cap, and the memory by part, from the architectures alone."""
    parts = pd.DataFrame({size: memory_by_part(qwen_config(size)) for size in ("3B", "7B")})
    for name in ("t4-3b", "l4-7b", "a100-7b", "kadid-7b-qlora"):
        parts[name] = of_configuration(name)
    rows = [
        {
            "how": "computed",
            "size": size,
            "cap_gib": cap,
            "fits": parts[size]["peak"] + RESERVED < (cap or float("inf")),
            "peak_gib": parts[size]["peak"],
        }
        for size in parts
        for cap in (CAPS if size in ("3B", "7B") else (None,))
    ]
    return rows, parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    parser.add_argument("--tiny", action="store_true", help="the same code on the CPU, with a tiny model")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "CAP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as out:
            print("ROW " + json.dumps(one_row(args.one[0], float(args.one[1] or 0) or None, Path(out))))
        return 0
    if args.tiny:
        rows = measured(["tiny"], (None,))
    elif torch.cuda.is_available():
        rows = measured(["3B", "7B"], CAPS)
    else:
        rows, parts = computed()
        print(
            "No GPU here: nothing below was measured. "
            "GiB allocated, COMPUTED from the architectures (vqr1.experiments.memory.memory_by_part); "
            f"up to {RESERVED} GiB more are expected to be reserved:\n"
        )
        print(parts.round(2).to_string(), "\n")
    table, about = pd.DataFrame(rows, columns=COLUMNS), f"bitsandbytes {bnb.__version__}"
    print(f"{about}; {machine_line(0)}")
    print("8 images of 512x384 x 6 completions x 256 tokens, 4-bit NF4, LoRA rank 16")
    print(table.dropna(axis=1, how="all").round(2).to_string(index=False))
    if args.csv:
        write_table(args.csv, table, numbers="%.4g", about=about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
