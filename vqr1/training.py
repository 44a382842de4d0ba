"""Reinforcement learning to rank: a configured `trl.GRPOTrainer`, validated by the Scorer, logged to a CSV."""

import math
import os
import platform
import subprocess
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import yaml
from peft import LoraConfig
from transformers import ProcessorMixin, ProgressCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from trl import GRPOConfig, GRPOTrainer

from vqr1.cards import model_card
from vqr1.data import load_ratings, one_set_batches, pictures_of, prompt_rows
from vqr1.evaluation import naming
from vqr1.metrics import plcc, srcc
from vqr1.policy import base_of, load_policy, lora_config, never_sampled, note_base, own_names
from vqr1.rewards import RankingReward, ThresholdReward, absolute_error_reward, answer_format_reward, format_reward
from vqr1.scoring import Scorer
from vqr1.sharing import SHARED, process_once, share

CONFIGS = Path(__file__).resolve().parent / "configs"
KEYS = {
    "policy", "quantize", "dtype", "pixels", "lora", "frozen", "sets", "root", "thinking", "numbered", "reward", "variant",
    "share", "validation", "grpo",
}  # fmt: skip
LOG = {
    "step": "step", "reward": "reward", "ranking": "rewards/ranking/mean", "format": "format", "reward_std": "reward_std",
    "length": "completions/mean_length", "kl": "kl", "unparseable": "unparseable", "score_std": "score_std",
    "val_srcc": "val_srcc", "val_plcc": "val_plcc", "val_family": "val_family", "val_unscored": "val_unscored", "seconds": "seconds",
}  # fmt: skip
"""Column of log.csv -> key in TRL's logs."""


def load_config(name_or_path: str | Path) -> dict:
    """Return a training configuration by its name (cpu) or its path, checked.

    Raises FileNotFoundError listing the names, and ValueError naming the file and a key that is missing or unknown,
    in it or among GRPOConfig's under ``grpo``.

    >>> load_config("cpu")["grpo"]["num_generations"]
    6
    """
    path = CONFIGS / f"{name_or_path}.yaml"
    path = path if path.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise FileNotFoundError(f"no configuration {str(name_or_path)!r}; give one of {names}, or the path of a YAML file")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML in UTF-8 ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("grpo", {}), dict):
        raise ValueError(f"{path}: not a mapping of keys, with one of trl.GRPOConfig's under grpo")
    for problem, keys in (("is missing", KEYS - set(config)), ("is unknown", set(config) - KEYS)):
        if keys:
            raise ValueError(f"{path}: key {sorted(keys)[0]!r} {problem}; the keys are {', '.join(sorted(KEYS))}")
    unknown = set(config["grpo"]) - {field.name for field in fields(GRPOConfig)}
    if unknown:
        raise ValueError(f"{path}: key {sorted(unknown)[0]!r} under grpo is unknown to trl.GRPOConfig")
    if config["dtype"] not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"{path}: dtype {config['dtype']!r} is not one of float32, bfloat16, float16, null")
    return config


def config_for_device() -> str:
    """Return the name of the configuration made for the first GPU's memory, and "cpu" where there is none.

    10 GiB (a T4 has 15): t4-3b; 20 GiB (L4, A10, RTX 4090): l4-7b; 38 GiB (A100, H100): a100-7b.
    """
    if not torch.cuda.is_available():
        return "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return next((name for least, name in ((38, "a100-7b"), (20, "l4-7b"), (10, "t4-3b")) if memory >= least), "cpu")


def grpo_config(config: dict, output: Path) -> GRPOConfig:
    """Return TRL's settings for a configuration; ValueError for those that cannot rank or need a GPU that is not there."""
    grpo = {"report_to": "none"} | config["grpo"]
    if grpo.get("num_generations", 8) < 2:
        raise ValueError(f"num_generations is {grpo['num_generations']}: a group needs at least 2 answers to have a mean and a variance")
    if not grpo.get("use_cpu") and not torch.cuda.is_available():
        raise ValueError(
            "this configuration is for a GPU, and torch sees none; on a CPU use --config cpu, or set use_cpu: true and bf16: false under grpo"
        )
    args = GRPOConfig(output_dir=str(output / "checkpoints"), num_train_epochs=1, shuffle_dataset=False, **grpo)
    if args.max_steps < 1:
        raise ValueError(f"max_steps is {args.max_steps}: say under grpo, or by --steps, for how many steps to train")
    return args


def rewards(config: dict) -> list:
    """Return the reward functions of a configuration: what is to be learned, and the format, 1:1 as in the official code."""
    form = format_reward if config["thinking"] else answer_format_reward
    k = config["grpo"].get("num_generations", 8)  # TRL's default
    chosen = {
        "ranking": lambda: [_ranking(k, config["variant"])],
        "threshold": lambda: [ThresholdReward()],
        "absolute": lambda: [absolute_error_reward],
        "format": lambda: [],
    }
    if config["reward"] not in chosen:
        raise ValueError(f"reward {config['reward']!r} is unknown; use one of {', '.join(chosen)}")
    return chosen[config["reward"]]() + [form]


def _ranking(k: int, variant: dict) -> RankingReward:
    try:
        return RankingReward(k, **variant)
    except TypeError as error:
        raise ValueError(f"variant {variant}: {error}") from error


def images_per_step(args: GRPOConfig) -> int:
    """Return how many images are sampled, and compared, for one generation on all processes."""
    return args.generation_batch_size // args.num_generations


def training_rows(config: dict, args: GRPOConfig, frame: pd.DataFrame | None = None):
    """Return TRL's dataset in the order of training: chunks of one data set, only rows that will be used."""
    if frame is None:
        frame = set_rows(config, "train")
    count = images_per_step(args)
    passes = -(-args.max_steps * args.gradient_accumulation_steps // (args.steps_per_generation * args.num_iterations))
    epochs = -(-passes * count // max(1, len(frame) - count * frame["dataset"].nunique() + 1))
    order = one_set_batches(frame, count, args.seed, max(1, epochs))[: passes * count]
    used = sorted(set(order))
    place = {row: i for i, row in enumerate(used)}
    rows = frame.iloc[used]
    return prompt_rows(rows, pictures_of(rows), config["thinking"], config["numbered"]).select([place[row] for row in order])


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

    Validation rows are a fixed sample of the sets' val rows, scored with the prompt that is trained; val_unscored counts those
    that got no score and so are not in the other columns. Of several
    processes the first one writes, and scores unless the weights are spread over all (sharded): then all must take part.
    """

    def __init__(self, path: Path, scorer: Scorer, frame: pd.DataFrame, every: int, resumed_at: int, sharded: bool = False):
        self.path, self.scorer, self.frame, self.every, self.sharded = path, scorer, frame, every, sharded
        self.images, self.start = pictures_of(frame), time.time()
        self.rows = []
        if resumed_at and path.is_file():
            old = pd.read_csv(path, comment="#")
            self.rows = old[old["step"] <= resumed_at].to_dict("records")
            self.start -= self.rows[-1]["seconds"] if self.rows else 0
        self.header = machine_line(self.scorer.seed)

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
            family = naming(self.frame.assign(reasoning=[score.reasoning for score in found]))["family"] if self.scorer.thinking else None
            sets = list(self.frame.assign(score=scores).groupby("dataset"))  # each has its own scale: means over sets
            values = {f"val_{key}": sum(f(rows["score"], rows["mos"]) for _, rows in sets) / len(sets) for key, f in (("srcc", srcc), ("plcc", plcc))}
            self._write(state.global_step, values | {"val_family": family, "val_unscored": sum(map(math.isnan, scores))})

    def _write(self, step: int, logs: dict) -> None:
        logs = logs | {"step": step, "seconds": round(time.time() - self.start, 1)}
        row = {column: logs[key] for column, key in LOG.items() if logs.get(key) is not None}
        if self.rows and self.rows[-1]["step"] == step:  # validation and training log the same step
            self.rows[-1] |= row
        else:
            self.rows.append(row)
        partial = self.path.with_suffix(".tmp")
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(f"# {self.header}\n")
            pd.DataFrame(self.rows, columns=list(LOG)).to_csv(file, index=False, float_format="%.5g")
        partial.replace(self.path)


class Progress(ProgressCallback):
    """The Trainer's progress bar with the reward and the last validation beside it, instead of every log entry."""

    def __init__(self, log: RunLog):
        super().__init__()
        self.log = log

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and self.log.rows:
            table = pd.DataFrame(self.log.rows, columns=["reward", "val_srcc"]).ffill().iloc[-1].dropna()
            self.training_bar.set_postfix({key: f"{value:.3f}" for key, value in table.items()})


def machine_line(seed: int | str) -> str:
    """Return one line that says on what, with which versions, seed and commit a log was made."""
    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    root = Path(__file__).resolve().parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    commit = git.stdout.strip() or "unknown"
    return f"{where}; Python {platform.python_version()}, {versions}; seed {seed}; commit {commit}; {time.strftime('%Y-%m-%d')}"


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint; one that a kill left half written has no trainer_state.json yet."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def resume_from(output: Path, resume: bool) -> Path | None:
    """Return the checkpoint of a run's folder to go on from; FileExistsError if there is one and `resume` was not asked for."""
    found = last_checkpoint(output / "checkpoints")
    if found and not resume:
        raise FileExistsError(f"{output} already holds a run, at {found.name}; go on with it by --resume, or give another folder")
    return found


def freeze(model: torch.nn.Module, names: list[str]) -> None:
    """Stop training the parameters with one of `names` in their path.

    A frozen vision tower must not ask for input gradients either: with gradient checkpointing the backward pass would
    run through all of it for nothing.
    """
    for name, parameter in model.named_parameters():
        if any(part in name.split(".") for part in names):
            parameter.requires_grad = False
    if "visual" in names:
        base_of(model).model.visual.get_input_embeddings = lambda: None


def build_trainer(config: dict, output: Path, policy=None, frame: pd.DataFrame | None = None) -> GRPOTrainer:
    """Return the configured trainer: TRL's own, with our rewards, rows and settings.

    policy: (model, processor), default the configuration's. frame: manifest rows to train on instead of the sets'.
    Raises ValueError for settings that cannot rank (K = 1, one image per batch, an unknown reward) before the model is loaded.
    """
    args, functions, adapter = grpo_config(config, output), rewards(config), _adapter(config)
    rows = training_rows(config, args, frame)
    dtype = getattr(torch, config["dtype"]) if config["dtype"] else None
    model, processor = policy or load_policy(config["policy"], config["quantize"], dtype, config["pixels"])
    bar(args, processor)
    freeze(model, config["frozen"])
    if adapter:
        model.name_or_path = str(config["policy"])  # what peft notes as an adapter's base: the name given, not its folder
    trainer = GRPOTrainer(
        model=model, reward_funcs=functions, args=args, train_dataset=rows, processing_class=processor, peft_config=adapter
    )
    own_names(trainer.model)
    note_base(trainer.model)
    if sharded(trainer):  # DeepSpeed and FSDP keep their own fp32 weights, and every process must make the same calls
        return trainer
    if config["share"] and base_of(trainer.model).config.model_type in SHARED:
        process_once(processor)
        for model in filter(None, (trainer.model, trainer.ref_model)):
            share(model, prompts=not args.gradient_checkpointing)
        if trainer.ref_model is not None and "visual" in config["frozen"]:  # the same frozen tower: one look serves both
            trainer.ref_model.model.visual = trainer.model.model.visual
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes adapters bf16, in which steps below 1e-4 are rounded away; fp16 training needs fp32, too
            parameter.data = parameter.data.float()
    return trainer


def bar(args: GRPOConfig, processor: ProcessorMixin) -> None:
    """Keep TRL from sampling tokens that only a prompt may hold, in the words of what samples: vLLM or transformers."""
    tokens, own = never_sampled(processor), args.generation_kwargs or {}
    key, never = ("bad_words", list(tokens)) if args.use_vllm else ("suppress_tokens", list(tokens.values()))
    args.generation_kwargs = own | {key: [*(own.get(key) or []), *never]}


def _adapter(config: dict) -> LoraConfig | None:
    try:
        return lora_config(**config["lora"]) if config["lora"] else None
    except TypeError as error:
        raise ValueError(f"lora {config['lora']}: {error}") from error


def sharded(trainer: GRPOTrainer) -> bool:
    """Tell whether the weights are spread over the processes."""
    return trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled


def validation_rows(config: dict) -> pd.DataFrame:
    """Return the fixed sample of val rows that training is watched on."""
    frame = set_rows(config, "val")
    return frame.sample(min(len(frame), config["validation"]["rows"]), random_state=0)


def train(
    config: dict, output: str | Path, resume: bool = False, policy=None, frame: pd.DataFrame | None = None, shown: TrainerCallback | None = None
) -> Path:
    """Train and return the folder of the trained policy; see `build_trainer` for policy and frame.

    Writes config.yaml, log.csv, checkpoints/ and policy/ (with a model card) into `output`. `resume` goes on from the last checkpoint.
    shown: a callback that shows how far it is, instead of the progress bar.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    found = resume_from(output, resume)
    (output / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    trainer = build_trainer(config, output, policy, frame)
    scorer = Scorer(
        (trainer.model, trainer.processing_class), config["thinking"], numbered=config["numbered"],
        max_new_tokens=trainer.args.max_completion_length, seed=trainer.args.seed,
    )  # fmt: skip
    resumed_at = int(found.name.split("-")[1]) if found else 0
    rows = validation_rows(config)
    log = RunLog(output / "log.csv", scorer, rows, config["validation"]["every"], resumed_at, sharded(trainer))
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # another class in notebooks
    trainer.add_callback(log)
    trainer.add_callback(shown or Progress(log))
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    trainer.save_model(str(output / "policy"))
    trainer.processing_class.save_pretrained(output / "policy")
    if trainer.is_world_process_zero():
        (output / "policy" / "README.md").write_text(model_card(config, pd.DataFrame(log.rows, columns=list(LOG)), log.header), encoding="utf-8")
    return output / "policy"
