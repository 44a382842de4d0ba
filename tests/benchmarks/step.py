"""Measure where a GRPO step's time goes, stock and sharing, and how its time and memory grow.

    python tests/benchmarks/step.py                     # some 7 minutes on two idle cores
    python tests/benchmarks/step.py --csv data/runs     # writes step.csv, growth.csv and growth.png there
    python tests/benchmarks/step.py --small             # the same code in a minute: its numbers mean nothing

*Step*: the embedded policy by configs/cpu.yaml with a KL term (beta = 0.04), 16 images at 112 px and 4 at
448 px, K = 6, the latter with gradient checkpointing too; on a GPU also a randomly initialised 3B as in
gpu.py. One trainer alternates the stock way (``share_prompts: false``, each repeat of a picture through the
image processor, as TRL does with Qwen's own) and the sharing way, which computes once what K answers share.
The two steps of a pair have the same pictures and seed, and, at a learning rate of practically 0, the same
answers. Each pair has new pictures: nothing is remembered. Medians exclude a warm-up pair. A part's seconds
exclude the parts inside it.
*Floor*, right after each step: its own model calls again, in the same way, and nothing else: `generate`
with the prepared inputs, then per micro-batch one forward for the log-probabilities of its answers, and the
backward of their sum. It has no image processing, reference, reward, optimizer, metrics or logs. The
overhead leaves out the reference model: it is the price of beta > 0.

*Growth*, in the sharing way: from 8 images of 112 px, K = 6, 32 new tokens (no answer ends earlier), one
quantity is changed; the second of two steps is timed. Ranks are processes with gloo and one thread each, 8
images on each and comparisons over all, so equal time is linear. Memory is the process's growth at its
peak. The exponent is the slope of a straight line through the logarithms: 1 is linear; below 1, fixed costs
still weigh.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from gpu import Clock, configuration, photographs, qwen_config, random_policy
from matplotlib.figure import Figure
from scoring import arguments, peak, publish, timed
from transformers import PrinterCallback, ProcessorMixin, TrainerCallback
from trl.models.utils import disable_gradient_checkpointing

from vqr1.config import Settings, load_config
from vqr1.policy import base_of, default_dtype
from vqr1.sharing import process_once, share
from vqr1.thurstone import ranking_reward
from vqr1.training import build_trainer, images_per_step, keep_together

PARTS = (
    "image processing",
    "vision tower, rollouts",
    "prefill",
    "decoding",
    "reward",
    "vision tower, log-probabilities",
    "reference log-probabilities",
    "policy log-probabilities",
    "backward",
)
GROWTH = {
    "images": (4, 8, 16, 32),
    "K": (3, 6, 12, 24),
    "new tokens": (16, 32, 64, 128),
    "pixels": (112**2, 224**2, 336**2, 448**2),
}
START = {"images": 8, "K": 6, "new tokens": 32, "pixels": 112**2}


def squares(count: int, side: int) -> pd.DataFrame:
    """Return rows of `count` photographs cut to squares; above 384 px the processor enlarges them."""
    side = min(side, 384)
    return photographs(count, tiny=True).assign(crop=f"0,0,{side},{side}")


def embedded(images: int, k: int, side: int, steps: int, **grpo) -> Settings:
    """Return cpu.yaml's settings for one step's images of side x side px."""
    sizes = {"per_device_train_batch_size": images * k, "num_generations": k, "max_steps": steps}
    rest = {"save_strategy": "no", "logging_steps": 1, "warmup_steps": 0, "disable_tqdm": True}
    return load_config("cpu").changed(min_pixels=side**2, max_pixels=side**2, grpo=sizes | rest | grpo)


STILL = 1e-12
"""A learning rate that leaves the weights as they are: all steps cost the same."""

# Where the time goes


class Turns(TrainerCallback):
    """Alternate a trainer's steps, stock and sharing; note the seconds of each by part, and its floor."""

    def __init__(self, trainer):
        self.trainer, self.model, self.clock, self.steps = trainer, trainer.model, Clock(), []
        self.base, self.processor = base_of(trainer.model), trainer.processing_class
        plain = functools.partial(ProcessorMixin._process_images, self.processor)
        owners = (
            (self.model, "generate"),
            (self.base, "forward"),
            (self.base.model, "forward"),
            (self.base.model.visual, "forward"),
            (trainer, "_prepare_inputs"),
        )
        self.stock = [(owner, name, getattr(owner, name)) for owner, name in owners] + [
            (self.processor, "_process_images", plain)
        ]
        clock, accelerator = self.clock.around, trainer.accelerator
        trainer.reward_funcs = [clock("reward", function) for function in trainer.reward_funcs]
        trainer._get_per_token_logps_and_entropies = clock(
            self._whose, trainer._get_per_token_logps_and_entropies
        )
        accelerator.backward = clock("backward", accelerator.backward)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)

    def way(self, shared: bool) -> None:
        """Make the model's calls stock or shared, with nothing remembered and no clocks."""
        for owner, name, function in self.stock:
            setattr(owner, name, function)
        if shared:
            process_once(self.processor)
            keep_together(self.trainer)
            share(self.model)

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = Clock.now()

    def on_step_begin(self, args, state, control, **kwargs):
        pair, second = divmod(state.global_step, 2)
        self.shared = bool((pair + second) % 2)
        self.clock.on_step_begin()
        self.way(self.shared)
        self.asked, self.learned = [], []
        self._watch(self.model, "generate", "decoding", self.asked)
        self._watch(self.base, "forward", lambda **inputs: None, self.learned)
        self._watch(self.base.model, "forward", self._prefill)
        self._watch(self.base.model.visual, "forward", self._tower)
        self._watch(self.processor, "_process_images", "image processing")
        torch.manual_seed(pair)

    def on_step_end(self, args, state, control, **kwargs):
        whole = Clock.now() - self.start
        parts = {part: self.clock.seconds[part] for part in PARTS}
        sums = {
            "everything else": whole - sum(parts.values()),
            "rollouts": self.clock.total["decoding"],
            "whole step": whole,
        }
        self.steps.append({"shared": self.shared} | parts | sums | {"floor": self.floor()})
        self.start = Clock.now()

    def floor(self) -> float:
        """Return the seconds of the step's model calls, once more."""
        self.way(self.shared)
        start = Clock.now()
        options = self.trainer.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, options):  # as TRL samples
            for inputs in self.asked:
                self.model.generate(**inputs)
        for inputs in self.learned:
            with self.trainer.accelerator.autocast():
                (-self.model(**inputs).log_probs.sum()).backward()
        took = Clock.now() - start
        self.model.zero_grad()
        return took

    def _watch(self, owner, name: str, part, calls: list | None = None) -> None:
        """Put a clock around a method and keep its inputs, those of the forward only where it learns."""
        function = self.clock.around(part, getattr(owner, name))

        @functools.wraps(function)  # `generate` reads signatures
        def watched(*args, **inputs):
            if calls is not None and (
                name == "generate" or inputs.get("fused_lm_head") and torch.is_grad_enabled()
            ):
                calls.append(inputs)
            return function(*args, **inputs)

        setattr(owner, name, watched)

    def _inside(self, part: str) -> bool:
        return any(name == part for name, _ in self.clock.open)

    def _whose(self, *args, **kwargs) -> str:
        return "policy log-probabilities" if torch.is_grad_enabled() else "reference log-probabilities"

    def _tower(self, *args, **kwargs) -> str:
        return "vision tower, rollouts" if self._inside("decoding") else "vision tower, log-probabilities"

    def _prefill(self, *args, **inputs) -> str | None:
        """Name a call within `generate` with more than one token a row; the others decode."""
        given = next(
            value for value in (inputs.get("input_ids"), inputs.get("inputs_embeds")) if value is not None
        )
        return "prefill" if self._inside("decoding") and given.shape[1] > 1 else None


def step_rows(name: str, config: Settings, frame: pd.DataFrame, repeats: int, policy=None) -> list[dict]:
    """Return per part the median seconds of a stock and a sharing step, and their ratio."""
    with tempfile.TemporaryDirectory() as out:
        trainer = build_trainer(config.changed(share_prompts=False), Path(out), policy, frame)
        size = images_per_step(trainer.args)
        order = [pair * size + i for pair in range(repeats + 1) for _ in range(2) for i in range(size)]
        trainer.train_dataset = trainer.train_dataset.select(order)
        turns = Turns(trainer)
        trainer.train()
    table = pd.DataFrame(turns.steps[2:]).groupby("shared").median()
    rest = table["whole step"] - table["reference log-probabilities"]
    table["overhead over the floor (without the reference)"] = rest / table["floor"]
    table["overhead over the floor (with it)"] = table["whole step"] / table["floor"]
    parts = [*PARTS, *(part for part in table if part not in PARTS)]
    units = {part: "ratio" if part.startswith("overhead") else "s" for part in parts}
    return [
        {
            "setting": name,
            "part": part,
            "unit": units[part],
            "stock": stock,
            "shared": shared,
            "stock_over_shared": stock / shared if shared else np.nan,
        }
        for part, (stock, shared) in table[parts].items()
    ]


def where_the_time_goes(repeats: int, small: bool) -> list[dict]:
    rows, steps = [], 2 * (repeats + 1)
    sizes = ((64, 2), (96, 2)) if small else ((112, 16), (448, 4))
    for side, images, checkpointing in (*((*size, False) for size in sizes), (*sizes[-1], True)):
        name = f"embedded, {images} images of {side} px" + ", checkpointing" * checkpointing
        options = {"beta": 0.04, "learning_rate": STILL, "gradient_checkpointing": checkpointing}
        config = embedded(images, 6, side, steps, **options)
        rows += step_rows(name, config, squares(images * (repeats + 1), side), repeats)
    if not torch.cuda.is_available():
        print("No GPU here: no row of a randomly initialised 3B.\n")
        return rows
    config = configuration(False, steps)
    config = config.changed(grpo={"learning_rate": STILL, "logging_steps": 1, "disable_tqdm": True})
    policy = random_policy(qwen_config("3B"), torch.device("cuda", 0), default_dtype())
    return rows + step_rows(
        "random 3B in 4 bits, 8 images of 512x384 px",
        config,
        photographs(8 * (repeats + 1), False),
        repeats,
        policy,
    )


# Growth


def point(settings: dict, scope: str = "local") -> dict:
    """Return the second step's seconds, in all and by part, and MB by which the process grows at its peak."""
    side, tokens = round(settings["pixels"] ** 0.5), settings["new tokens"]
    more = {"max_completion_length": tokens, "generation_kwargs": {"min_new_tokens": tokens}}
    config = embedded(settings["images"], settings["K"], side, 2, **more)
    config = config.changed(reward_options={"scope": scope})
    with tempfile.TemporaryDirectory() as out:
        trainer, clock = build_trainer(config, Path(out), frame=squares(64, side)), Clock()
        trainer.model.generate = clock.around("rollouts", trainer.model.generate)
        trainer.training_step = clock.around("step", trainer.training_step)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        with peak() as grown:
            trainer.train()
    return {"seconds": clock.total["step"], "rollouts_s": clock.total["rollouts"], "peak_mb": grown[0]}


def of_reward(images: int) -> dict:
    """Time the pairwise reward alone, K = 6."""
    seconds, memory, _ = timed(
        lambda: ranking_reward(1 + 4 * torch.rand(images, 6), torch.rand(images)), repeats=9
    )
    return {"seconds": seconds, "peak_mb": memory}


def of_ranks(count: int, small: bool) -> dict:
    """Return the slowest and largest of `count` processes, each with START's images."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        __file__,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command + ["--small"] * small, env=environment, capture_output=True, text=True)
    lines = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("RANK ")]
    if done.returncode or len(lines) != count:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return pd.DataFrame(lines).max().to_dict()


def rank(small: bool) -> None:
    """Be one of the processes of `of_ranks`."""
    import torch.distributed as dist

    found = point(START | {"images": 2, "new tokens": 4} if small else START, scope="global")
    print("RANK " + json.dumps(found) + "\n", end="", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def growth(small: bool) -> list[dict]:
    """Return a row per quantity and value, with exponents of time and memory."""
    rows, start = [], START | {"images": 2, "new tokens": 8} if small else START
    base = point(start)
    for axis, values in GROWTH.items():
        values = (start[axis], 2 * start[axis]) if small else values
        rows += [
            {"axis": axis, "value": value} | (base if value == start[axis] else point(start | {axis: value}))
            for value in values
        ]
    rows += [{"axis": "ranks", "value": count} | of_ranks(count, small) for count in (1, 2)]
    rows += [
        {"axis": "images, reward alone", "value": count} | of_reward(count) for count in (64, 128, 256, 512)
    ]
    table = pd.DataFrame(rows)
    for column, name in (("seconds", "time_exponent"), ("peak_mb", "memory_exponent")):
        found = {
            axis: np.polyfit(np.log(part["value"]), np.log(part[column].clip(lower=1e-3)), 1)[0]
            for axis, part in table.groupby("axis")
        }
        table[name] = table["axis"].map(found)
    return table.to_dict("records")


def growth_figure(table: pd.DataFrame) -> Figure:
    """Plot time above and memory below against each quantity, on logarithmic axes; dashed: linear."""
    axes = list(table["axis"].unique())
    figure = Figure(figsize=(2.4 * len(axes), 4.8), layout="constrained", dpi=100)
    for column, axis in enumerate(axes):
        part = table[table["axis"] == axis]
        for row, (name, exponent, label) in enumerate(
            (("seconds", "time_exponent", "s per step"), ("peak_mb", "memory_exponent", "MB at the peak"))
        ):
            ax = figure.add_subplot(2, len(axes), row * len(axes) + column + 1)
            growing = part["value"] ** (axis != "ranks")
            ideal = part[name].iloc[0] * growing / growing.iloc[0]
            ax.loglog(part["value"], part[name], "o-", markersize=4)
            ax.loglog(part["value"], ideal, "--", color="0.6", linewidth=1)
            ax.set_xticks(
                part["value"],
                [f"{value**0.5:.0f}²" if axis == "pixels" else value for value in part["value"]],
            )
            low, high = part[name].min(), part[name].max()
            shown = [low, high] if high > 1.1 * low else [high]
            ax.set_ylim(low / 2, 2 * max(high, ideal.max()))  # what hardly changes looks flat
            ax.set_yticks(shown, [f"{value:.2g}" if value < 10 else f"{value:.0f}" for value in shown])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            ax.set_title(f"exponent {part[exponent].iloc[0]:.2f}", fontsize=9)
            ax.set(xlabel=axis, ylabel=label if column == 0 else None)
    return figure


def main() -> None:
    args = arguments(__doc__)
    if "LOCAL_RANK" in os.environ:
        return rank(args.small)
    repeats = 1 if args.small else args.repeats
    title = f"one GRPO step, K = 6, median of {repeats}"
    publish(where_the_time_goes(repeats, args.small), title, args.csv and args.csv / "step.csv")
    rows = growth(args.small)
    publish(rows, "one GRPO step that shares, embedded policy", args.csv and args.csv / "growth.csv")
    if args.csv:
        growth_figure(pd.DataFrame(rows)).savefig(args.csv / "growth.png")


if __name__ == "__main__":
    main()
