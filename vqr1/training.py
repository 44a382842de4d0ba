"""Reinforcement learning to rank: a configured `trl.GRPOTrainer`, validated by the Scorer, logged to a CSV."""

import math
import time
from pathlib import Path

import pandas as pd
import torch

from vqr1 import quiet
from vqr1.cards import model_card
from vqr1.config import TRL_DEFAULTS, check_config
from vqr1.data.batches import one_set_batches, prompt_rows
from vqr1.data.manifests import load_ratings, pictures_of
from vqr1.evaluation import naming
from vqr1.metrics import plcc, srcc
from vqr1.policy import base_of, load_policy, lora_config, never_sampled, note_base, own_names
from vqr1.records import machine_line, read_table, write_table
from vqr1.rewards import (
    RankingReward,
    ThresholdReward,
    absolute_error_reward,
    answer_format_reward,
    format_reward,
)
from vqr1.runs import resume_from, save_settings, step_of
from vqr1.scoring import Scorer
from vqr1.sharing import SHARED, process_once, share

with quiet():
    from transformers import ProcessorMixin, ProgressCallback, TrainerCallback
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
    from trl import GRPOConfig, GRPOTrainer


LOG = {
    "step": "step",
    "reward": "reward",
    "ranking": "rewards/ranking/mean",
    "format": "format",
    "reward_std": "reward_std",
    "length": "completions/mean_length",
    "kl": "kl",
    "unparseable": "unparseable",
    "score_std": "score_std",
    "val_srcc": "val_srcc",
    "val_plcc": "val_plcc",
    "val_family": "val_family",
    "val_unscored": "val_unscored",
    "seconds": "seconds",
}
"""Column of log.csv -> key in TRL's logs."""


def config_for_device() -> str:
    """Return the name of the configuration made for the first GPU's memory, and "cpu" where there is none.

    10 GiB (a T4 has 15): t4-3b; 20 GiB (L4, A10, RTX 4090): l4-7b; 38 GiB (A100, H100): a100-7b.
    """
    if not torch.cuda.is_available():
        return "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return next(
        (name for least, name in ((38, "a100-7b"), (20, "l4-7b"), (10, "t4-3b")) if memory >= least), "cpu"
    )


@quiet()
def grpo_config(config: dict, output: Path) -> GRPOConfig:
    """Return TRL's settings for a configuration; ValueError for what TRL does not take, or a GPU that is not
    there.
    """
    grpo = {"report_to": "none"} | config["grpo"]
    if "max_steps" not in grpo:
        raise ValueError("max_steps is missing: say under grpo, or by --steps, for how many steps to train")
    if not grpo.get("use_cpu") and not torch.cuda.is_available():
        raise ValueError(
            "this configuration is for a GPU, and torch sees none; on a CPU use --config cpu, or set use_cpu: true and bf16: false under grpo"
        )
    try:
        return GRPOConfig(
            output_dir=str(output / "checkpoints"), num_train_epochs=1, shuffle_dataset=False, **grpo
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"trl.GRPOConfig does not take what is under grpo: {' '.join(str(error).split())}"
        ) from error


def rewards(config: dict) -> list:
    """Return the reward functions of a configuration: what is to be learned, and the format, 1:1 as in the
    official code.
    """
    form = format_reward if config["thinking"] else answer_format_reward
    k = config["grpo"].get("num_generations", TRL_DEFAULTS["num_generations"])
    chosen = {
        "ranking": lambda: [RankingReward(k, **config["variant"])],
        "threshold": lambda: [ThresholdReward()],
        "absolute": lambda: [absolute_error_reward],
        "format": lambda: [],
    }
    return chosen[config["reward"]]() + [form]


def images_per_step(args: GRPOConfig) -> int:
    """Return how many images are sampled, and compared, for one generation on all processes."""
    return args.generation_batch_size // args.num_generations


def training_rows(config: dict, args: GRPOConfig, frame: pd.DataFrame | None = None):
    """Return TRL's dataset in the order of training: chunks of one data set, only rows that will be used."""
    if frame is None:
        frame = set_rows(config, "train")
    count = images_per_step(args)
    passes = -(
        -args.max_steps
        * args.gradient_accumulation_steps
        // (args.steps_per_generation * args.num_iterations)
    )
    epochs = -(-passes * count // max(1, len(frame) - count * frame["dataset"].nunique() + 1))
    order = one_set_batches(frame, count, args.seed, max(1, epochs))[: passes * count]
    used = sorted(set(order))
    place = {row: i for i, row in enumerate(used)}
    rows = frame.iloc[used]
    return prompt_rows(rows, pictures_of(rows), config["thinking"], config["numbered"]).select(
        [place[row] for row in order]
    )


def set_rows(config: dict, split: str) -> pd.DataFrame:
    """Return the rows of a split of all the configuration's sets, each image by its absolute path.

    `root` is one folder for all sets, or one for each by name; None: where `load_ratings` looks.
    """
    root = config["root"]
    roots = root if isinstance(root, dict) else dict.fromkeys(config["sets"], root)
    frames = [_of_split(load_ratings(name, roots.get(name)), split) for name in config["sets"]]
    return pd.concat([frame.assign(image=_absolute(frame)) for frame in frames], ignore_index=True)


def _absolute(frame: pd.DataFrame) -> list[str]:
    return [str(Path(frame.attrs["root"], name).absolute()) for name in frame["image"]]


def _of_split(frame: pd.DataFrame, split: str) -> pd.DataFrame:
    rows = frame[frame["split"] == split]
    if rows.empty:
        raise ValueError(f"set {frame['dataset'].iloc[0]!r} has no rows with split {split!r}")
    return rows


class RunLog(TrainerCallback):
    """Write log.csv as training goes, with validation by the Scorer every so many steps.

    Validation rows are a fixed sample of the sets' val rows, scored with the prompt that is trained;
    val_unscored counts those that got no score and so are not in the other columns. Of several processes
    the first one writes, and scores unless the weights are spread over all (sharded): then all must take
    part.
    """

    def __init__(
        self,
        path: Path,
        scorer: Scorer,
        frame: pd.DataFrame,
        every: int,
        resumed_at: int,
        sharded: bool = False,
    ):
        self.path, self.scorer, self.frame, self.every, self.sharded = path, scorer, frame, every, sharded
        self.images, self.start = pictures_of(frame), time.time()
        self.rows = []
        if resumed_at and path.is_file():
            old = read_table(path)
            self.rows = old[old["step"] <= resumed_at].to_dict("records")
            self.start -= self.rows[-1]["seconds"] if self.rows else 0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._validate(state)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._validate(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs and state.is_world_process_zero:
            form = [value for key, value in logs.items() if key.endswith("format_reward/mean")]
            self._write(state.global_step, logs | {"format": form[0] if form else None})

    def _validate(self, state) -> None:
        if not (state.is_world_process_zero or self.sharded):
            return
        found = self.scorer.score(self.images)
        if state.is_world_process_zero:
            scores = [score.score for score in found]
            family = (
                naming(self.frame.assign(reasoning=[score.reasoning for score in found]))["family"]
                if self.scorer.thinking
                else None
            )
            sets = list(
                self.frame.assign(score=scores).groupby("dataset")
            )  # each has its own scale: means over sets
            values = {
                f"val_{key}": sum(f(rows["score"], rows["mos"]) for _, rows in sets) / len(sets)
                for key, f in (("srcc", srcc), ("plcc", plcc))
            }
            self._write(
                state.global_step,
                values | {"val_family": family, "val_unscored": sum(map(math.isnan, scores))},
            )

    def _write(self, step: int, logs: dict) -> None:
        logs = logs | {"step": step, "seconds": round(time.time() - self.start, 1)}
        row = {column: logs[key] for column, key in LOG.items() if logs.get(key) is not None}
        if self.rows and self.rows[-1]["step"] == step:  # validation and training log the same step
            self.rows[-1] |= row
        else:
            self.rows.append(row)
        write_table(self.path, pd.DataFrame(self.rows, columns=list(LOG)), self.scorer.seed, "%.5g")


class Progress(ProgressCallback):
    """The Trainer's progress bar with the reward and the last validation beside it, instead of every log
    entry.
    """

    def __init__(self, log: RunLog):
        super().__init__()
        self.log = log

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and self.log.rows:
            table = pd.DataFrame(self.log.rows, columns=["reward", "val_srcc"]).ffill().iloc[-1].dropna()
            self.training_bar.set_postfix({key: f"{value:.3f}" for key, value in table.items()})


def freeze(model: torch.nn.Module, names: list[str]) -> None:
    """Stop training the parameters with one of `names` in their path; ValueError for a name that none has.

    A frozen vision tower must not ask for input gradients either: with gradient checkpointing the backward
    pass would run through all of it for nothing.
    """
    parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
    unknown = set(names) - parts
    if unknown:
        raise ValueError(
            f"frozen {sorted(unknown)[0]!r} is no part of the policy; name visual, language_model, …"
        )
    for name, parameter in model.named_parameters():
        if any(part in name.split(".") for part in names):
            parameter.requires_grad = False
    if "visual" in names:
        base_of(model).model.visual.get_input_embeddings = lambda: None


@quiet()
def build_trainer(config: dict, output: Path, policy=None, frame: pd.DataFrame | None = None) -> GRPOTrainer:
    """Return the configured trainer: TRL's own, with our rewards, rows and settings.

    policy: (model, processor), default the configuration's. frame: manifest rows to train on instead of the
    sets'. Raises ValueError for settings that cannot be meant (`check_config`) before the model is loaded.
    """
    check_config(config)
    args, functions = grpo_config(config, output), rewards(config)
    adapter = None if config["lora"] is None else lora_config(**config["lora"])
    rows = training_rows(config, args, frame)
    dtype = getattr(torch, config["dtype"]) if config["dtype"] else None
    model, processor = policy or load_policy(config["policy"], config["quantize"], dtype, config["pixels"])
    bar(args, processor)
    freeze(model, config["frozen"])
    if not adapter and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"frozen {config['frozen']} leaves nothing to train; freeze less, or give lora")
    if adapter:
        model.name_or_path = str(
            config["policy"]
        )  # what peft notes as an adapter's base: the name given, not its folder
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=functions,
        args=args,
        train_dataset=rows,
        processing_class=processor,
        peft_config=adapter,
    )
    own_names(trainer.model)
    note_base(trainer.model)
    if sharded(
        trainer
    ):  # DeepSpeed and FSDP keep their own fp32 weights, and every process must make the same calls
        return trainer
    if config["share"] and base_of(trainer.model).config.model_type in SHARED:
        process_once(processor)
        for model in filter(None, (trainer.model, trainer.ref_model)):
            share(model, prompts=not args.gradient_checkpointing)
        if (
            trainer.ref_model is not None and "visual" in config["frozen"]
        ):  # the same frozen tower: one look serves both
            trainer.ref_model.model.visual = trainer.model.model.visual
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes adapters bf16, in which steps below 1e-4 are rounded away; fp16 training needs fp32, too
            parameter.data = parameter.data.float()
    return trainer


def bar(args: GRPOConfig, processor: ProcessorMixin) -> None:
    """Keep TRL from sampling tokens that only a prompt may hold, in the words of what samples: vLLM or
    transformers.
    """
    tokens, own = never_sampled(processor), args.generation_kwargs or {}
    key, never = ("bad_words", list(tokens)) if args.use_vllm else ("suppress_tokens", list(tokens.values()))
    args.generation_kwargs = own | {key: [*(own.get(key) or []), *never]}


def sharded(trainer: GRPOTrainer) -> bool:
    """Tell whether the weights are spread over the processes."""
    return trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled


def validation_rows(config: dict) -> pd.DataFrame:
    """Return the fixed sample of val rows that training is watched on."""
    frame = set_rows(config, "val")
    return frame.sample(min(len(frame), config["validation"]["rows"]), random_state=0)


@quiet()
def train(
    config: dict,
    output: str | Path,
    resume: bool = False,
    policy=None,
    frame: pd.DataFrame | None = None,
    shown: TrainerCallback | None = None,
) -> Path:
    """Train and return the folder of the trained policy; see `build_trainer` for policy and frame.

    Writes config.yaml, log.csv, checkpoints/ and policy/ (with a model card) into `output`. `resume` goes
    on from the last checkpoint, with the settings that the run was begun with (`vqr1.runs.resume_from`;
    rows given as `frame` are not compared). shown: a callback that shows how far it is, instead of the
    progress bar.
    """
    output = Path(output)
    check_config(config)
    found = resume_from(output, resume, config)
    save_settings(output, config)
    trainer = build_trainer(config, output, policy, frame)
    scorer = Scorer(
        (trainer.model, trainer.processing_class),
        config["thinking"],
        numbered=config["numbered"],
        max_new_tokens=trainer.args.max_completion_length,
        seed=trainer.args.seed,
    )
    rows = validation_rows(config)
    log = RunLog(
        output / "log.csv", scorer, rows, config["validation"]["every"], step_of(found), sharded(trainer)
    )
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # another class in notebooks
    trainer.add_callback(log)
    trainer.add_callback(shown or Progress(log))
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    trainer.save_model(str(output / "policy"))
    trainer.processing_class.save_pretrained(output / "policy")
    if trainer.is_world_process_zero():
        (output / "policy" / "README.md").write_text(
            model_card(config, pd.DataFrame(log.rows, columns=list(LOG)), machine_line(log.scorer.seed)),
            encoding="utf-8",
        )
    return output / "policy"
