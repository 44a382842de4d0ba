"""The folder of a run: which checkpoint it goes on from, and whether it may with the settings that are
given.
"""

from pathlib import Path
from typing import Any

from vqr1.config import TRL_DEFAULTS, read_yaml, write_yaml

FREE = (
    "root",
    "share",
    "validation.every",
    "grpo.max_steps",
    "grpo.log",
    "grpo.save_",
    "grpo.report_to",
    "grpo.run_name",
    "grpo.project",
    "grpo.trackio_",
    "grpo.hub_",
    "grpo.push_to_hub",
    "grpo.disable_tqdm",
    "grpo.dataloader_",
    "grpo.ddp_timeout",
    "grpo.gradient_checkpointing",
    "grpo.vllm_gpu_memory_utilization",
)
"""Settings that may change when a run goes on, by how their names start: for how long, what is logged, kept
and shown, where the data are, and how memory is used. With more `max_steps`, the learning rate follows the
longer schedule from there."""


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint; one that a kill left half written has no trainer_state.json yet."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """Return the step of a checkpoint, 0 for None.

    >>> step_of(Path("run/checkpoints/checkpoint-50"))
    50
    """
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def resume_from(output: Path, resume: bool, config: dict | None = None) -> Path | None:
    """Return the checkpoint that a training run's folder goes on from, None for a new run.

    config: the settings to go on with; None: they are not compared yet. Raises FileExistsError if there is
    a checkpoint and `resume` was not asked for, and ValueError if it cannot go on exactly: its settings are
    others (`same_settings`), it is past the last step, or it has no state of the optimizer.
    """
    found = last_checkpoint(output / "checkpoints")
    if found and not resume:
        raise FileExistsError(
            f"{output} already holds a run, at {found.name}; go on with it by --resume, or give another folder"
        )
    if not found or config is None:
        return found
    same_settings(output, config)
    last = config["grpo"].get("max_steps", -1)
    if step_of(found) > last:
        raise ValueError(
            f"{output} is at {found.name}, past max_steps {last}; give more steps, or another folder"
        )
    if not any(found.glob("optimizer*")) and not any(found.glob("global_step*")):  # the second: DeepSpeed's
        raise ValueError(
            f"{found} has no state of the optimizer (save_only_model: true), so the run cannot go on as it was; "
            f"train on from its weights as a new run: policy: {found}, and another folder"
        )
    return found


def same_settings(output: Path, settings: dict) -> None:
    """Raise ValueError, naming every difference, unless config.yaml in a run's folder has these settings
    but for `FREE` ones.

    A key of GRPOConfig that is not given counts as its default.
    """
    path = output / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, so nothing says with which settings {output} was begun; give another folder"
        )
    old, new = _flat(read_yaml(path)), _flat(settings)
    changed = sorted(
        key for key in old | new if _value(old, key) != _value(new, key) and not key.startswith(FREE)
    )
    if changed:
        named = "; ".join(f"{key} was {_value(old, key)!r}, now {_value(new, key)!r}" for key in changed)
        raise ValueError(
            f"{output} was begun with other settings: {named}. Go on with those of {path}, or give another folder"
        )


def save_settings(output: Path, settings: dict) -> None:
    """Write the settings of a run into its folder, as config.yaml."""
    output.mkdir(parents=True, exist_ok=True)
    write_yaml(output / "config.yaml", settings)


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys; an empty mapping has none."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _value(flat: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return flat.get(key, TRL_DEFAULTS.get(name) if section == "grpo" else None)
