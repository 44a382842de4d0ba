"""The settings of a training run: a dataclass with defaults, filled from a YAML file.

A file says only what it decides. Every key is checked before anything is loaded.

    extends: cpu              # a name in vqr1/configs, or the path of a file; absent: only the defaults
    sets: [kadid10k]
    grpo: {max_steps: 100}    # keys of trl.GRPOConfig, on top of those that cpu sets
"""

import importlib.util
import math
import os
import re
import types
from collections.abc import Callable
from dataclasses import MISSING, InitVar, asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from vqr1 import quiet
from vqr1.data.public_sets import public_name
from vqr1.policy import PATCH
from vqr1.rewards import RankingReward
from vqr1.thurstone import ranking_reward

with quiet():
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )
    from trl import GRPOConfig

CONFIGS = Path(__file__).resolve().parent / "configs"


class Validation(TypedDict):
    """``rows`` val rows are scored every ``every`` steps."""

    rows: int
    every: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a training run, checked when they are made; names are TRL's where TRL has one.

    The sections ``reward_options``, ``validation`` and ``grpo`` are merged with their defaults key by key.

    Raises:
        ValueError: for the first invalid setting; it names file, key, value and remedy. Checking needs no
            model, data or GPU.

    >>> Settings(model_name_or_path="tiny-policy", sets="sim-kadid")
    Traceback (most recent call last):
        ...
    ValueError: configuration: sets 'sim-kadid' is not a list of text; write [sim-kadid]
    """

    model_name_or_path: str
    """tiny-policy, a folder of a model or an adapter, or a hub name."""
    load_in_4bit: bool = False
    """Load the language model in 4-bit NF4."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights that are not 4-bit; None: `default_dtype()`."""
    min_pixels: int | None = None
    """Images are scaled up to at least this many pixels; None: the processor's own limits."""
    max_pixels: int | None = None
    """Images are scaled down to at most this many pixels."""
    use_peft: bool = True
    """Train an adapter; False: all weights."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_vision: bool = False
    """The vision tower gets an adapter too, which vLLM does not serve by default."""
    frozen: list[str] = field(default_factory=lambda: ["visual"])
    """Parts that are not trained. The vision tower has learned to see; the language model judges."""
    sets: list[str]
    """Names of rated sets, or paths of manifests."""
    comparisons: list[str] = field(default_factory=list)
    """Which of the sets are learned from what people said of pairs, instead of their mos."""
    root: str | dict[str, str] | None = None
    """Folder of the public sets, or one per set, {kadid10k: /data/kadid10k}; None: VQR1_DATA, else data/."""
    thinking: bool = True
    """The policy reasons before it answers."""
    picture_number: bool = False
    """"Picture 1: " precedes the image, as in the official inference (not its training)."""
    reward: Literal["ranking", "threshold", "absolute", "format"] = "ranking"
    """threshold: Q-Insight's; absolute: minus the error; format: the form of the answer alone."""
    reward_options: dict = field(default_factory=lambda: {"bounded": True})
    """Of `RankingReward`: bounded (a score outside 1..5 counts as none), binary, average, variance, scope."""
    share_prompts: bool = True
    """Compute once what the K answers to one image share (vqr1/sharing.py); False: TRL's own way."""
    validation: dict = field(default_factory=lambda: {"rows": 190, "every": 25})
    """How many val rows are scored, and how often, in steps."""
    grpo: dict = field(
        default_factory=lambda: {
            "seed": 0,
            "num_generations": 6,  # K, as in the paper
            "temperature": 1.0,  # as in the official code
            "lr_scheduler_type": "linear",  # as in the paper
            "report_to": "none",  # tensorboard or trackio, after installing it
        }
    )
    """Keys of trl.GRPOConfig."""
    source: InitVar[str | Path] = "configuration"
    """What an error's text starts with, such as the file."""

    def __post_init__(self, source: str | Path) -> None:
        given = {name: getattr(self, name) for name in HINTS[""]}
        check_keys(source, given)
        for section in SECTIONS:
            object.__setattr__(self, section, DEFAULTS[section] | given[section])
        for check in (_check_numbers, _check_pixels, _check_sets, _check_trl, _check_batch):
            check(source, self)

    def changed(self, source: str | Path = "configuration", **changes) -> "Settings":
        """Return a copy with some settings changed, checked again.

        Args:
            source: what an error's text starts with.
            changes: by key; a section is merged key by key.

        >>> load_config("cpu").changed(thinking=False, grpo={"max_steps": 5}).grpo["num_generations"]
        6
        """
        check_keys(source, changes)
        return Settings(**merged(asdict(self), changes), source=source)

    @property
    def pixels(self) -> list[int] | None:
        """Return [min_pixels, max_pixels], None for the processor's own."""
        return None if self.max_pixels is None else [self.min_pixels, self.max_pixels]


SECTIONS = ("reward_options", "validation", "grpo")
REQUIRED = [one.name for one in fields(Settings) if one.default is one.default_factory is MISSING]
DEFAULTS = {
    one.name: one.default if one.default_factory is MISSING else one.default_factory()
    for one in fields(Settings)
    if one.name not in REQUIRED
}
RENAMED = {
    "policy": "model_name_or_path",
    "quantize": "load_in_4bit",
    "pixels": "min_pixels and max_pixels",
    "lora": "use_peft, lora_r, lora_alpha and lora_vision",
    "numbered": "picture_number",
    "variant": "reward_options",
    "share": "share_prompts",
}
"""Keys that configurations had before, and what they are called now."""


def _hints(function: Callable, *without: str) -> dict[str, Any]:
    """Return the annotations of what may be given to a function or class."""
    return {key: hint for key, hint in get_type_hints(function).items() if key not in ("return", *without)}


HINTS = {
    "": _hints(Settings, "source"),
    "validation": _hints(Validation),
    "reward_options": _hints(RankingReward.__init__, "num_generations", "comparisons")
    | _hints(ranking_reward, "scores", "dataset")
    | {"scope": Literal["local", "global"]},
    "grpo": _hints(GRPOConfig)
    | {
        "loss_type": Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"],
        "scale_rewards": Literal["group", "batch", "none"],
        "importance_sampling_level": Literal["token", "sequence"],
        "num_generations": int,
        "max_completion_length": int,
    },
}
"""Section of the settings -> its keys and types. TRL checks some words only after the first rollout."""
TRL_DEFAULTS = {one.name: one.default for one in fields(GRPOConfig)}

LEAST = {
    "lora_r": 1,
    "min_pixels": 1,
    "validation rows": 2,
    "validation every": 1,
    "grpo num_generations": 2,
    "grpo max_steps": 1,
    "grpo per_device_train_batch_size": 1,
    "grpo gradient_accumulation_steps": 1,
    "grpo steps_per_generation": 1,
    "grpo num_iterations": 1,
    "grpo max_completion_length": 1,
    "grpo save_total_limit": 1,
    "grpo seed": 0,
    "grpo warmup_steps": 0,
    "grpo beta": 0,
    "grpo top_k": 0,
    "grpo weight_decay": 0,
    "grpo max_grad_norm": 0,
}
"""The least value of a number. A group needs two answers, and a correlation two rows."""
POSITIVE = {
    "lora_alpha",
    "reward_options variance",
    "reward_options gamma",
    "reward_options eps",
    "grpo learning_rate",
    "grpo temperature",
    "grpo epsilon",
    "grpo logging_steps",
    "grpo save_steps",
}

RESERVED = {
    "output_dir": "--out says where",
    "num_train_epochs": "max_steps says how long",
    "shuffle_dataset": "rows come in batches of one set",
    "generation_batch_size": "steps_per_generation says it",
    "eval_strategy": "validation: says what is watched, and how often",
    "do_eval": "validation: says what is watched, and how often",
    "remove_unused_columns": "the rewards need all columns",
    "resume_from_checkpoint": "--resume goes on from the last checkpoint",
    "dataloader_num_workers": "the pictures stay in one process",
}
"""Keys of GRPOConfig that the project sets itself, and why they are not needed."""
PACKAGES = {"use_vllm": "vllm", "use_liger_kernel": "liger_kernel", "deepspeed": "deepspeed"}
"""Keys of GRPOConfig that need a package which ours does not install."""


# YAML 1.2: 1e-3 is a number, 010 is ten, 1:30 is no number of seconds, and yes, no, on and off are words


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # YAML 1.1's go

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        again = [key for key in keys if keys.count(key) > 1]
        if again:
            raise yaml.YAMLError(
                f"key {again[0]!r} is there twice in line {node.start_mark.line + 1} and below"
            )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quote a text that YAML 1.1 or 1.2 would read as something else."""


for _kind in (_Loader, _Dumper):
    for _tag, _pattern, _first in (
        ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", "[-+]?[0-9]+", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))  # 010 is not octal


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; ValueError, on one line, unless it is YAML that names no key twice."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML in UTF-8 ({' '.join(str(error).split())})") from error


def write_yaml(path: Path, content: Any) -> None:
    """Write a YAML file that `read_yaml` reads back; until it is whole, readers see the old one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False), encoding="utf-8")
    partial.replace(path)


# Reading and checking


def config_for_device() -> str:
    """Return the name of the configuration for the first GPU's memory, or "cpu" without a GPU.

    10 GiB (a T4 has 15): t4-3b; 20 GiB (L4, A10, RTX 4090): l4-7b; 38 GiB (A100, H100): a100-7b.
    """
    if not torch.cuda.is_available():
        return "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    made_for = ((38, "a100-7b"), (20, "l4-7b"), (10, "t4-3b"))
    return next((name for least, name in made_for if memory >= least), "cpu")


def load_config(config: str | Path | Settings, **changes) -> Settings:
    """Return the settings of a training run.

    Args:
        config: a name (cpu), the path of a YAML file, or settings, which are checked again.
        changes: by key, on top; a section is merged key by key.

    Raises:
        FileNotFoundError: lists the names.
        ValueError: names file, key, value and remedy.

    >>> load_config("cpu").grpo["num_generations"]
    6
    """
    if isinstance(config, Settings):
        return config.changed(**changes)
    path = find_config(config)
    values = merged(read_settings(path), changes)
    for key in REQUIRED:
        if key not in values:
            raise ValueError(f"{path}: key {key!r} is missing; give it, or a configuration to extend")
    return Settings(**values, source=path)


def find_config(name_or_path: str | Path, folder: str | Path = "") -> Path:
    """Return the file of a configuration by its name or its path, which may start from `folder`."""
    for path in (CONFIGS / f"{name_or_path}.yaml", Path(folder, name_or_path)):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    raise FileNotFoundError(
        f"no configuration {str(name_or_path)!r}; give one of {names}, or the path of a YAML file"
    )


def read_settings(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a YAML file sets, on top of what it extends; without the defaults.

    Args:
        path: the file.
        children: files that extend it.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a mapping of keys, with those of trl.GRPOConfig under grpo")
    parent = values.pop("extends", None)
    check_keys(path, values)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise _wrong(path, "extends", parent, "is not the name or path of a configuration")
    children = (*children, path.resolve())
    parent_path = find_config(parent, path.parent)
    if parent_path.resolve() in children:
        raise _wrong(path, "extends", parent, "leads back to this file; extend another one, or none")
    return merged(read_settings(parent_path, children), values)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return settings with others on top: a section is merged key by key, any other value replaced.

    >>> merged({"sets": ["a"], "grpo": {"seed": 0, "beta": 0.0}}, {"sets": ["b"], "grpo": {"seed": 1}})
    {'sets': ['b'], 'grpo': {'seed': 1, 'beta': 0.0}}
    """
    return below | {
        key: below.get(key, {}) | value if key in SECTIONS else value for key, value in above.items()
    }


def check_keys(source: str | Path, values: dict[str, Any]) -> None:
    """Raise ValueError for a key, also in a section, that is old, unknown, or not of the type in `HINTS`."""
    for key in values:
        if key in RENAMED:
            raise ValueError(f"{source}: key {key!r} is called {RENAMED[key]} now; rename it")
    _check_section(source, "", values)
    for section in SECTIONS:
        _check_section(source, section, values.get(section, {}))


def _check_section(source, section: str, values: dict) -> None:
    hints, where = HINTS[section], f" under {section}" if section else ""
    unknown = sorted(set(values) - set(hints), key=str)
    if unknown:
        known = f"the keys are {', '.join(sorted(hints))}" if section != "grpo" else "see trl.GRPOConfig"
        raise ValueError(f"{source}: key {unknown[0]!r}{where} is unknown; {known}")
    for key, value in values.items():
        if not fits(value, hints[key]):
            listed = f"; write [{value}]" if isinstance(value, str) and get_origin(hints[key]) is list else ""
            raise _wrong(source, f"{section} {key}", value, f"is not {wanted(hints[key])}{listed}")


def _wrong(source, key: str, value, why: str) -> ValueError:
    return ValueError(f"{source}: {key.strip()} {value!r} {why}")


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value has an annotated type; an integer is a float too, a boolean is no number.

    >>> fits("1e-3", float), fits(1, float), fits(True, int), fits(["a"], list[str] | None)
    (False, True, False, True)
    """
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        words = any(isinstance(part, type) and issubclass(part, Enum) for part in parts)
        return any(fits(value, part) for part in parts if not (words and part is str))
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind is list:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(
            fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items()
        )
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is int:
        return type(value) is int
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [member.value for member in hint]
    return isinstance(value, hint) if isinstance(hint, type) else True


def wanted(hint: Any) -> str:
    """Describe a type in words.

    >>> wanted(list[int] | None), wanted(Literal["a", "b"])
    ('a list of integers or null', 'one of a, b')
    """
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        words = [part for part in parts if isinstance(part, type) and issubclass(part, Enum)]
        return " or ".join(wanted(part) for part in parts if not (words and part is str))
    if kind is Literal:
        return "one of " + ", ".join(map(str, parts))
    if kind is list:
        return "a list of " + {int: "integers", float: "numbers", str: "text"}.get(parts[0], "values")
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    return names.get(hint, "a mapping" if dict in (hint, kind) else str(hint))


def _check_numbers(source, settings: Settings) -> None:
    values = {key: value for key, value in asdict(settings).items() if key not in SECTIONS}
    for section in SECTIONS:
        values |= {f"{section} {key}": value for key, value in getattr(settings, section).items()}
    for name, value in values.items():
        if value is None:
            continue
        if name in LEAST and value < LEAST[name]:
            raise _wrong(source, name, value, f"is below {LEAST[name]}, the least that makes sense")
        if name in POSITIVE and not value > 0:
            raise _wrong(source, name, value, "is not above 0")


def _check_pixels(source, settings: Settings) -> None:
    least, most = settings.min_pixels, settings.max_pixels
    if (least is None) != (most is None):
        given, missing = ("max_pixels", "min_pixels") if least is None else ("min_pixels", "max_pixels")
        raise _wrong(source, given, getattr(settings, given), f"needs {missing}; give both, or neither")
    if most is not None and most < max(least, PATCH):
        floor = f"min_pixels {least}" if least > PATCH else f"{PATCH}, one token of the policy"
        raise _wrong(source, "max_pixels", most, f"is below {floor}")


def _check_sets(source, settings: Settings) -> None:
    sets, root = settings.sets, settings.root
    if not sets:
        raise _wrong(source, "sets", sets, "names no set; name at least one, as in [kadid10k]")
    names = [public_name(name) or name for name in sets]
    again = [name for name in names if names.count(name) > 1]
    if again:
        raise _wrong(source, "sets", sets, f"names {again[0]} twice")
    for name in settings.comparisons:
        if name not in sets:
            raise _wrong(source, "comparisons", name, f"is none of the sets; they are {', '.join(sets)}")
    if settings.comparisons and settings.reward != "ranking":
        why = f"are of no use to the reward {settings.reward}; use reward: ranking, or leave them out"
        raise _wrong(source, "comparisons", settings.comparisons, why)
    for name in root if isinstance(root, dict) else ():
        if name not in sets:
            raise _wrong(source, "root", name, f"is none of the sets; they are {', '.join(sets)}")
        if name.startswith("sim-"):
            raise _wrong(source, "root", name, "comes with the project; leave it out")


def _check_trl(source, settings: Settings) -> None:
    grpo = settings.grpo
    for key, why in RESERVED.items():
        if key in grpo:
            raise _wrong(source, f"grpo {key}", grpo[key], f"is not yours to set: {why}; leave it out")
    for key, package in PACKAGES.items():
        if grpo.get(key) and importlib.util.find_spec(package) is None:
            raise _wrong(
                source, f"grpo {key}", grpo[key], f"needs the package {package}: install it, or leave it out"
            )
    named = grpo.get("report_to") or []
    there = {"none", "all", *get_available_reporting_integrations()}
    for name in [named] if isinstance(named, str) else named:
        if name not in {*INTEGRATION_TO_CALLBACK, *there}:
            raise _wrong(
                source,
                "grpo report_to",
                name,
                f"is unknown; use none, or of {', '.join(INTEGRATION_TO_CALLBACK)}",
            )
        if name not in there:
            raise _wrong(
                source, "grpo report_to", name, f"needs a package: pip install {name}, or report_to: none"
            )


def _check_batch(source, settings: Settings) -> None:
    """Require whole groups and at least two pictures per process."""
    grpo = TRL_DEFAULTS | settings.grpo
    k, batch = grpo["num_generations"], grpo["per_device_train_batch_size"]
    passes = grpo["steps_per_generation"] or grpo["gradient_accumulation_steps"]
    sampled = (
        f"grpo per_device_train_batch_size {batch} x steps_per_generation {passes} = {batch * passes} answers"
    )
    if batch * passes % k:
        raise ValueError(
            f"{source}: {sampled} are not divisible by num_generations {k}: a group would be split"
        )
    if batch * passes < 2 * k:
        raise ValueError(
            f"{source}: {sampled} are of one picture (num_generations {k}); ranking compares pictures, "
            f"use at least 2: {2 * k} answers"
        )
