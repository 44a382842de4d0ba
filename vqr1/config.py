"""The settings of a training run: a YAML file, read as YAML 1.2 and checked key by key before anything is
loaded.
"""

import importlib.util
import math
import os
import re
import types
from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

import yaml

from vqr1 import quiet
from vqr1.data.public_sets import public_name
from vqr1.policy import lora_config
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


class Settings(TypedDict):
    """The keys of a configuration, all of them required; `vqr1/configs/cpu.yaml` says what each is."""

    policy: str
    quantize: bool
    dtype: Literal["float32", "bfloat16", "float16"] | None
    pixels: list[int] | None
    lora: dict | None
    frozen: list[str]
    sets: list[str]
    root: str | dict[str, str] | None
    thinking: bool
    numbered: bool
    reward: Literal["ranking", "threshold", "absolute", "format"]
    variant: dict
    share: bool
    validation: dict
    grpo: dict


KEYS = set(Settings.__annotations__)


def _hints(function: Callable, *without: str) -> dict[str, Any]:
    """Return the annotations of what may be given to a function or class."""
    return {key: hint for key, hint in get_type_hints(function).items() if key not in ("return", *without)}


HINTS = {
    "": _hints(Settings),
    "validation": _hints(Validation),
    "lora": _hints(lora_config),
    "variant": _hints(RankingReward.__init__, "num_generations")
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
"""Section of a configuration -> its keys and their types. TRL checks some of its words only after the first
rollout.
"""
TRL_DEFAULTS = {field.name: field.default for field in fields(GRPOConfig)}

LEAST = {
    "validation.rows": 2,
    "validation.every": 1,
    "lora.r": 1,
    "grpo.num_generations": 2,
    "grpo.max_steps": 1,
    "grpo.per_device_train_batch_size": 1,
    "grpo.gradient_accumulation_steps": 1,
    "grpo.steps_per_generation": 1,
    "grpo.num_iterations": 1,
    "grpo.max_completion_length": 1,
    "grpo.save_total_limit": 1,
    "grpo.seed": 0,
    "grpo.warmup_steps": 0,
    "grpo.beta": 0,
    "grpo.top_k": 0,
    "grpo.weight_decay": 0,
    "grpo.max_grad_norm": 0,
}
"""The least value of a number. A group needs two answers, and a correlation two rows."""
POSITIVE = {
    "lora.alpha",
    "variant.variance",
    "variant.gamma",
    "variant.eps",
    "grpo.learning_rate",
    "grpo.temperature",
    "grpo.epsilon",
    "grpo.logging_steps",
    "grpo.save_steps",
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
"""Keys of GRPOConfig that need a package which is not installed with ours."""
PATCH = 32 * 32
"""Pixels that a policy sees as one token, at most: 32x32 of the embedded policy and Qwen3-VL, 28x28 of
Qwen2.5-VL.
"""


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
    """Quotes a text that YAML 1.1 or 1.2 would read as something else."""


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
    """Return what a YAML file holds; ValueError, on one line, for a file that is none or names a key twice."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML in UTF-8 ({' '.join(str(error).split())})") from error


def write_yaml(path: Path, content: Any) -> None:
    """Write a YAML file that `read_yaml` reads as the same; whoever reads it meanwhile sees the old one
    whole.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False), encoding="utf-8")
    partial.replace(path)


# Reading and checking


def load_config(name_or_path: str | Path) -> dict:
    """Return a training configuration by its name (cpu) or its path, checked by `check_config`.

    Raises FileNotFoundError that lists the names, and ValueError that names file, key, value and remedy.

    >>> load_config("cpu")["grpo"]["num_generations"]
    6
    """
    path = CONFIGS / f"{name_or_path}.yaml"
    path = path if path.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise FileNotFoundError(
            f"no configuration {str(name_or_path)!r}; give one of {names}, or the path of a YAML file"
        )
    config = read_yaml(path)
    check_config(config, path)
    return config


def check_config(config: dict, source: str | Path = "configuration") -> None:
    """Raise ValueError for the first setting that cannot be meant; it needs no model, no data and no GPU.

    config: what `load_config` returns, perhaps changed since.
    source: the file or whatever else the message starts with.

    >>> check_config(load_config("cpu") | {"sets": "sim-kadid"})
    Traceback (most recent call last):
        ...
    ValueError: configuration: sets 'sim-kadid' is not a list of text; write [sim-kadid]
    """
    if not isinstance(config, dict) or not isinstance(config.get("grpo", {}), dict):
        raise ValueError(f"{source}: not a mapping of keys, with those of trl.GRPOConfig under grpo")
    _check_keys(source, "", config, required=True)
    _check_keys(source, "grpo", config["grpo"])
    _check_keys(source, "validation", config["validation"], required=True)
    _check_keys(source, "lora", config["lora"] or {})
    _check_keys(source, "variant", config["variant"])
    _check_numbers(source, config)
    for check in (_check_pictures, _check_sets, _check_trl, _check_batch):
        check(source, config)


def _check_keys(source, section: str, values: dict, required: bool = False) -> None:
    """Hold the keys of a section and the types of their values against `HINTS`."""
    hints, where = HINTS[section], f" under {section}" if section else ""
    known = f"the keys are {', '.join(sorted(hints))}" if section != "grpo" else "see trl.GRPOConfig"
    for problem, keys in (("is missing", set(hints) - set(values)), ("is unknown", set(values) - set(hints))):
        if keys and (required or problem == "is unknown"):
            raise ValueError(f"{source}: key {sorted(keys, key=str)[0]!r}{where} {problem}; {known}")
    for key, value in values.items():
        if not fits(value, hints[key]):
            listed = f"; write [{value}]" if isinstance(value, str) and get_origin(hints[key]) is list else ""
            raise _wrong(source, f"{section} {key}", value, f"is not {wanted(hints[key])}{listed}")


def _wrong(source, key: str, value, why: str) -> ValueError:
    return ValueError(f"{source}: {key.strip()} {value!r} {why}")


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of an annotated type; an integer is a float too, and a truth value is no
    number.

    >>> fits("1e-3", float), fits(1, float), fits(True, int), fits(["a"], list[str] | None), fits("linaer", str)
    (False, True, False, True, True)
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
    """Return what a type wants, in words.

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


def _check_numbers(source, config: dict) -> None:
    if config["lora"] == {}:
        raise _wrong(source, "lora", {}, "is empty; give {r: 16, alpha: 32}, or null to train all weights")
    for section in ("validation", "lora", "variant", "grpo"):
        for key, value in (config[section] or {}).items():
            name = f"{section}.{key}"
            if value is not None and value < LEAST.get(name, value):
                raise _wrong(
                    source, f"{section} {key}", value, f"is below {LEAST[name]}, the least that makes sense"
                )
            if value is not None and name in POSITIVE and not value > 0:
                raise _wrong(source, f"{section} {key}", value, "is not above 0")


def _check_pictures(source, config: dict) -> None:
    pixels = config["pixels"]
    if pixels is not None and not (len(pixels) == 2 and 0 < pixels[0] <= pixels[1] and pixels[1] >= PATCH):
        raise _wrong(
            source, "pixels", pixels, f"is not [smallest, largest], with a largest of at least {PATCH}"
        )


def _check_sets(source, config: dict) -> None:
    sets, root = config["sets"], config["root"]
    if not sets:
        raise _wrong(source, "sets", sets, "names no set; name at least one, as in [kadid10k]")
    names = [public_name(name) or name for name in sets]
    again = [name for name in names if names.count(name) > 1]
    if again:
        raise _wrong(source, "sets", sets, f"names {again[0]} twice")
    for name in root if isinstance(root, dict) else ():
        if name not in sets:
            raise _wrong(source, "root", name, f"is none of the sets; they are {', '.join(sets)}")
        if name.startswith("sim-"):
            raise _wrong(source, "root", name, "comes with the project; leave it out")


def _check_trl(source, config: dict) -> None:
    grpo = config["grpo"]
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


def _check_batch(source, config: dict) -> None:
    """Each process samples whole groups, and ranks at least two pictures."""
    grpo = TRL_DEFAULTS | config["grpo"]
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
