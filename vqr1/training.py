"""Reinforcement learning to rank: a configured `trl.GRPOTrainer`, validated by the Scorer, logged to a CSV.

from vqr1.training import train

train("cpu", "runs/mine")    # a name in vqr1/configs, the path of a YAML file, or Settings
"""

import math
import warnings
from collections.abc import Mapping
from functools import wraps
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from vqr1 import quiet
from vqr1.cards import model_card
from vqr1.config import TRL_DEFAULTS, Settings, load_config
from vqr1.data.batches import one_set_batches, prompt_rows
from vqr1.data.comparisons import PairTable, names_of
from vqr1.data.manifests import (
    has_comparisons,
    is_manifest,
    load_comparisons,
    load_ratings,
    pictures_of,
)
from vqr1.data.people_sets import win_share
from vqr1.policy import (
    CALIBRATION,
    PROMPT,
    base_of,
    load_policy,
    lora_config,
    never_sampled,
    note,
    note_base,
    save_native_names,
)
from vqr1.records import machine_line
from vqr1.rewards import reward_functions
from vqr1.runlog import ProgressBar, RunLog, resume_from, save_settings, step_of
from vqr1.scoring import Scorer
from vqr1.sharing import SHARED, process_once, share

with quiet():
    from accelerate.utils import AutocastKwargs
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
    from trl import GRPOConfig, GRPOTrainer
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.trainer import grpo_trainer


@quiet()
def train(
    config: str | Path | Settings,
    output: str | Path,
    resume: bool = False,
    policy: tuple[PreTrainedModel, ProcessorMixin] | None = None,
    frame: pd.DataFrame | None = None,
    shown: TrainerCallback | None = None,
    comparisons: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """Train a policy and return its folder.

    Args:
        config: a name in vqr1/configs, the path of a YAML file, or Settings.
        output: folder that gets config.yaml, log.csv, checkpoints/ and policy/ (with a model card).
        resume: go on from the last checkpoint, with the settings that the run was begun with
            (`vqr1.runlog.resume_from`; rows given as `frame` are not compared).
        policy: (model, processor) to train, default the configuration's.
        frame: manifest rows to train on, default those of the configuration's sets.
        shown: a callback that shows how far training is, instead of the progress bar.
        comparisons: data set -> the pairs that its rows are learned from, default those of the
            configuration's ``comparisons``; for `RankingReward`.

    Validation rows without a mos are watched by their share of wins.

    Raises:
        ValueError: for invalid settings, before the model is loaded.
        FileExistsError: for a folder with a run, unless `resume` is given.
    """
    settings, output = load_config(config), Path(output)
    found = resume_from(output, resume, settings)
    save_settings(output, settings)
    if comparisons is None:
        comparisons = set_comparisons(settings.comparisons, settings.root)
    trainer = build_trainer(settings, output, policy, frame, comparisons)
    scorer = Scorer(
        (trainer.model, trainer.processing_class),
        settings.thinking,
        numbered=settings.picture_number,
        max_new_tokens=trainer.args.max_completion_length,
        seed=trainer.args.seed,
    )
    watched = with_win_shares(set_rows(settings.sets, settings.root, "val"), comparisons)
    watched = watched.sample(min(len(watched), settings.validation["rows"]), random_state=0)
    log = RunLog(
        output / "log.csv",
        scorer,
        watched,
        settings.validation["every"],
        step_of(found),
        sharded(trainer),
    )
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # another class in notebooks
    trainer.add_callback(log)
    trainer.add_callback(shown or ProgressBar(log))
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    trainer.save_model(str(output / "policy"))
    trainer.processing_class.save_pretrained(output / "policy")
    if trainer.is_world_process_zero():
        card = model_card(settings, log.table(), machine_line(trainer.args.seed))
        (output / "policy" / "README.md").write_text(card, encoding="utf-8")
        (output / "policy" / CALIBRATION).unlink(missing_ok=True)  # of the weights before
    return output / "policy"


@quiet()
def build_trainer(
    config: str | Path | Settings,
    output: Path,
    policy: tuple[PreTrainedModel, ProcessorMixin] | None = None,
    frame: pd.DataFrame | None = None,
    comparisons: Mapping[str, pd.DataFrame] | None = None,
) -> GRPOTrainer:
    """Return TRL's trainer with our rewards, rows and settings; arguments as for `train`.

    Raises:
        ValueError: for invalid settings, before the model is loaded.
    """
    settings = load_config(config)
    args = grpo_config(settings.grpo, output)
    if comparisons is None:
        comparisons = set_comparisons(settings.comparisons, settings.root)
    if comparisons and settings.reward != "ranking":
        raise ValueError(f"comparisons teach the reward ranking alone, not {settings.reward}; leave them out")
    options = settings.reward_options | {"comparisons": comparisons}
    rewards = reward_functions(settings.reward, args.num_generations, settings.thinking, options)
    if frame is None:
        frame = set_rows(settings.sets, settings.root, "train")
    rows = training_rows(frame, args, settings.thinking, settings.picture_number, comparisons)
    model, processor = policy or _load(settings)
    if settings.use_peft and hasattr(model, "peft_config"):
        raise ValueError(
            f"{settings.model_name_or_path} is an adapter already: set use_peft: false to train it further"
        )
    freeze(model, settings.frozen)
    if not settings.use_peft and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"frozen {settings.frozen} leaves nothing to train; freeze less, or use_peft: true")
    trainer = _trainer(
        model, processor, args, rewards, rows, adapter_of(settings), settings.model_name_or_path
    )
    note(trainer.model, PROMPT, {key: getattr(settings, key) for key in ("thinking", "picture_number")})
    if not sharded(trainer):  # DeepSpeed and FSDP keep fp32 weights, and processes must make the same calls
        if settings.share_prompts:
            _share(trainer, one_tower="visual" in settings.frozen)
        _widen(trainer.model)
    if args.fp16:
        _no_autocast(trainer)
    return trainer


def _load(settings: Settings) -> tuple[PreTrainedModel, ProcessorMixin]:
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    return load_policy(settings.model_name_or_path, settings.load_in_4bit, dtype, settings.pixels)


def adapter_of(settings: Settings) -> LoraConfig | None:
    """Return the adapter that is trained, None where all weights are."""
    if not settings.use_peft:
        return None
    return lora_config(settings.lora_r, settings.lora_alpha, settings.lora_vision)


def _trainer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    args: GRPOConfig,
    rewards: list,
    rows: Dataset,
    adapter: LoraConfig | None,
    name: str,
) -> GRPOTrainer:
    bar(args, processor)
    if adapter:
        model.name_or_path = name  # peft notes it as the adapter's base: the name given, not its folder
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=args,
        train_dataset=rows,
        processing_class=processor,
        peft_config=adapter,
    )
    if args.use_vllm and args.vllm_mode == "colocate":
        one_token_per_picture(trainer.vllm_generation, processor.image_token_id)
    save_native_names(trainer.model)
    note_base(trainer.model)
    return trainer


def _share(trainer: GRPOTrainer, one_tower: bool) -> None:
    """Compute once what the K answers to an image share; one_tower: the reference uses the policy's."""
    if base_of(trainer.model).config.model_type not in SHARED:
        return
    process_once(trainer.processing_class)
    keep_together(trainer)
    for model in filter(None, (trainer.model, trainer.ref_model)):
        share(model)
    if trainer.ref_model is not None and one_tower:
        trainer.ref_model.model.visual = trainer.model.model.visual


def keep_together(trainer: GRPOTrainer) -> None:
    """Let the K answers to a prompt stay in one micro-batch: only there can `prompt_once` share it.

    TRL shuffles all answers of a generation before it cuts them into micro-batches; here they stay in order.
    A step that learns from a whole generation adds up the same gradients in another order. The reference was
    computed for the same micro-batches, so in bf16 it rounds as the policy does, and the first KL term is 0.
    """
    prepare, shuffle = trainer._prepare_inputs, grpo_trainer.shuffle_sequence_dict

    def in_order(rows: dict) -> dict:
        shuffle(rows)  # draws random numbers: the next samples are the stock ones
        return rows

    def together(rows):
        grpo_trainer.shuffle_sequence_dict = in_order
        try:
            return prepare(rows)
        finally:
            grpo_trainer.shuffle_sequence_dict = shuffle

    trainer._prepare_inputs = together


def _widen(model: torch.nn.Module) -> None:
    """Train in fp32: TRL makes adapters bf16, which rounds steps below 1e-4 away; fp16 needs it, too."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _no_autocast(trainer: GRPOTrainer) -> None:
    """Compute in the weights' own types: autocast would put all of a fp32 model, its tower too, into fp16.

    4-bit layers compute in fp16 by themselves (`four_bit`); the gradient scaler of fp16 stays, for them.
    """
    trainer.accelerator.autocast_handler = AutocastKwargs(enabled=False)


@quiet()
def grpo_config(grpo: dict, output: Path) -> GRPOConfig:
    """Return TRL's settings.

    Args:
        grpo: keys of GRPOConfig.
        output: folder of the run.

    Raises:
        ValueError: for what TRL does not take, or a missing GPU.
    """
    if "max_steps" not in grpo:
        raise ValueError("max_steps is missing: say under grpo, or by --steps, for how many steps to train")
    if not grpo.get("use_cpu") and not torch.cuda.is_available():
        raise ValueError(
            "this configuration is for a GPU, and torch sees none; on a CPU use --config cpu, or set "
            "use_cpu: true and bf16: false under grpo"
        )
    folder = str(output / "checkpoints")
    try:
        return GRPOConfig(output_dir=folder, num_train_epochs=1, shuffle_dataset=False, **grpo)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"trl.GRPOConfig does not take what is under grpo: {said}") from error


def images_per_step(args: GRPOConfig) -> int:
    """Return how many images are sampled, and compared, for one generation on all processes."""
    return args.generation_batch_size // args.num_generations


def training_rows(
    frame: pd.DataFrame,
    args: GRPOConfig,
    thinking: bool = True,
    picture_number: bool = False,
    comparisons: Mapping[str, pd.DataFrame] | None = None,
) -> Dataset:
    """Return TRL's dataset in the order of training: batches of one data set, only rows that will be used.

    A row that was compared with no other row here would earn 0 whatever it says: it is left out, with a
    warning. Raises ValueError for comparisons of a set that no row is of, and for a set of such rows alone.
    """
    comparisons = comparisons or {}
    alone = _alone(frame, comparisons)
    if alone.any():
        said = "left out: nobody compared them with another train row"
        warnings.warn(f"{alone.sum()} of {len(frame)} train rows are {said}", stacklevel=2)
        frame = frame[~alone].reset_index(drop=True)
    images = images_per_step(args)
    learned = args.max_steps * args.gradient_accumulation_steps  # batches, counting a repeated one again
    batches = math.ceil(learned / (args.steps_per_generation * args.num_iterations))
    left_out = images * frame["dataset"].nunique() - 1  # rows of an epoch, at most: they fill no batch
    epochs = math.ceil(batches * images / max(1, len(frame) - left_out))
    order = one_set_batches(frame, images, args.seed, max(1, epochs), comparisons)[: batches * images]
    used = sorted(set(order))
    place = {row: i for i, row in enumerate(used)}
    rows = frame.iloc[used]
    dataset = prompt_rows(rows, pictures_of(rows), thinking, picture_number, comparisons)
    return dataset.select([place[row] for row in order])


def _alone(frame: pd.DataFrame, comparisons: Mapping[str, pd.DataFrame]) -> np.ndarray:
    """Return, (N,) bool, which rows of sets with comparisons were compared with no other row here."""
    there = list(frame["dataset"].unique())
    alone = np.zeros(len(frame), dtype=bool)
    for dataset, pairs in comparisons.items():
        if dataset not in there:
            raise ValueError(
                f"there are comparisons of {dataset!r}, and no rows of it; the rows are of "
                f"{', '.join(there)}: correct the name, or leave the comparisons out"
            )
        own = (frame["dataset"] == dataset).to_numpy()
        alone[own] = PairTable(pairs, dataset).alone(names_of(frame[own]))
        if alone[own].all():
            raise ValueError(
                f"set {dataset!r}: no two of its {own.sum()} train rows were compared; compare more"
            )
    return alone


def set_rows(sets: list[str], root: str | dict[str, str] | None, split: str) -> pd.DataFrame:
    """Return the rows of several sets, each image by its absolute path; name is what comparisons call it.

    Args:
        sets: names, or paths of manifests.
        root: one folder for all sets, or one for each by name; None: where `load_ratings` looks.
        split: train, val or test.

    Raises:
        ValueError: for a set without rows of the split, and for two sets of one data set's name: their
            scales, or their pictures' names, would be mixed.
    """
    frames, taken = [], set()
    for name in sets:
        ratings = load_ratings(name, _root_of(name, root))
        rows = ratings[ratings["split"] == split]
        if rows.empty:
            raise ValueError(
                f"set {name!r} has no rows with split {split!r}; fill its column split with train, val and "
                "test, or let `vqr1 manifest` draw it"
            )
        if again := taken & set(rows["dataset"]):
            raise ValueError(f"two sets are called {min(again)!r}; rename one of them in its column dataset")
        taken |= set(rows["dataset"])
        paths = [str(Path(ratings.attrs["root"], image).absolute()) for image in rows["image"]]
        frames.append(rows.assign(name=names_of(rows), image=paths))
    return pd.concat(frames, ignore_index=True)


LOOKS = 30
"""How often, on average, a picture of your own is looked at: a small set is soon known by heart."""


def fitted(settings: Settings) -> Settings:
    """Return the settings with a batch that the smallest set fills, and no more steps than `LOOKS` take.

    A set with fewer train rows than a batch has images gets the largest power of two. A manifest with
    comparisons beside it is learned from these; its mos, if it has any, only validates.

    Raises:
        ValueError: for a set with one train row, and as `set_rows` does.
    """
    frame = set_rows(settings.sets, settings.root, "train")
    rows = frame["dataset"].value_counts()  # by data set
    if rows.min() < 2:
        raise ValueError(
            f"set {rows.idxmin()!r} has 1 row with split 'train'; a comparison needs 2: rate more"
        )
    beside = {name for name in settings.sets if is_manifest(name) and has_comparisons(name)}
    learned = sorted({*settings.comparisons, *beside})
    rows = frame["dataset"][~_alone(frame, set_comparisons(learned, settings.root))].value_counts()
    grpo = TRL_DEFAULTS | settings.grpo
    k, batch, accumulated = (
        grpo[key] for key in ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps")
    )
    passes = grpo["steps_per_generation"] or accumulated
    images = batch * passes // k
    if rows.min() < images:
        images = 1 << (int(rows.min()).bit_length() - 1)
        batch = math.gcd(batch, images * k)
        passes, before = images * k // batch, passes
        accumulated = max(1, accumulated * passes // before)
    steps = math.ceil(LOOKS * rows.sum() * passes / (images * accumulated))
    changes = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulated,
        "steps_per_generation": passes,
        "max_steps": min(steps, settings.grpo.get("max_steps", steps)),
    }
    return settings.changed(grpo=changes, comparisons=learned)


def _root_of(name: str, root: str | dict[str, str] | None) -> str | None:
    return root.get(name) if isinstance(root, dict) else root


def set_comparisons(sets: list[str], root: str | dict[str, str] | None) -> dict[str, pd.DataFrame]:
    """Return data set -> its comparisons, arguments as for `set_rows`; errors as of `load_comparisons`."""
    loaded = [load_comparisons(name, _root_of(name, root)) for name in sets]
    return {pairs.attrs["dataset"]: pairs for pairs in loaded}


def with_win_shares(frame: pd.DataFrame, comparisons: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of `set_rows`; those without a mos get their share of wins, in percent."""
    mos = frame["mos"]
    for dataset, pairs in comparisons.items():
        share = frame["name"].map(win_share(pairs))
        mos = mos.where(mos.notna() | (frame["dataset"] != dataset), share)
    return frame.assign(mos=mos)


def freeze(model: torch.nn.Module, names: list[str]) -> None:
    """Stop training some parts of a model.

    A frozen vision tower must not ask for input gradients either: with gradient checkpointing the backward
    pass would run through all of it for nothing.

    Args:
        model: its parameters stop requiring gradients.
        names: parts of the parameters' paths.

    Raises:
        ValueError: for a name that no parameter has.
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


def bar(args: GRPOConfig, processor: ProcessorMixin) -> None:
    """Keep TRL from sampling tokens that only a prompt may hold, by vLLM's or transformers' setting."""
    tokens, own = never_sampled(processor), args.generation_kwargs or {}
    key, never = ("bad_words", list(tokens)) if args.use_vllm else ("suppress_tokens", list(tokens.values()))
    args.generation_kwargs = own | {key: [*(own.get(key) or []), *never]}


def one_token_per_picture(vllm: VLLMGeneration, image: int) -> None:
    """Hand prompts to a colocated vLLM with one token per picture, which it repeats as the picture needs.

    TRL 1.16 hands over prompts in which they are repeated already. vLLM repeats the first of them again, and
    the policy would be asked about other tokens than it is trained on, without an error
    (https://github.com/huggingface/trl/issues/6294). A server wants them repeated.

    Args:
        vllm: of the trainer.
        image: the token that stands for pictures; two pictures never touch, as each has borders.
    """
    generate = vllm.generate

    @wraps(generate)
    def once(prompts: list[list[int]], *args, **kwargs):
        single = [[t for t, before in zip(row, [None, *row]) if not t == before == image] for row in prompts]
        return generate(single, *args, **kwargs)

    vllm.generate = once


def sharded(trainer: GRPOTrainer) -> bool:
    """Tell whether the weights are spread over the processes."""
    return trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
