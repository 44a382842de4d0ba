"""The folder of a run: log (written and shown as training goes), settings, checkpoint to go on from."""

import io
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from vqr1 import quiet
from vqr1.config import DEFAULTS, TRL_DEFAULTS, Settings, merged, read_settings, read_yaml, write_yaml
from vqr1.data.manifests import pictures_of
from vqr1.evaluation import naming
from vqr1.metrics import plcc, srcc
from vqr1.records import read_table, write_table
from vqr1.scoring import Scorer

with quiet():
    from transformers import ProgressCallback, TrainerCallback

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


class RunLog(TrainerCallback):
    """Write log.csv as training goes, with validation by the Scorer every so many steps.

    val_unscored counts the validation rows without a score, which the other columns leave out. Of several
    processes the first one writes and scores; if the weights are spread over all, all take part.

    Args:
        path: of the log.
        scorer: asks with the training's prompt.
        frame: manifest rows to validate on.
        every: steps from one validation to the next.
        resumed_at: step that the run goes on from; rows of the log up to it are kept.
        sharded: the weights are spread over the processes.
    """

    def __init__(
        self,
        path: Path,
        scorer: Scorer,
        frame: pd.DataFrame,
        every: int,
        resumed_at: int = 0,
        sharded: bool = False,
    ):
        self.path, self.scorer, self.frame = path, scorer, frame
        self.every, self.sharded = every, sharded
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

    def table(self) -> pd.DataFrame:
        """Return the log so far."""
        return pd.DataFrame(self.rows, columns=list(LOG))

    def _validate(self, state) -> None:
        if not (state.is_world_process_zero or self.sharded):
            return
        found = self.scorer.score(self.images)
        if not state.is_world_process_zero:
            return
        scores = [score.score for score in found]
        values = {"val_unscored": sum(map(math.isnan, scores))}
        if self.scorer.thinking:
            reasons = [score.reasoning for score in found]
            values["val_family"] = naming(self.frame.assign(reasoning=reasons))["family"]
        each = [rows for _, rows in self.frame.assign(score=scores).groupby("dataset")]
        for key, agreement in (("val_srcc", srcc), ("val_plcc", plcc)):  # each set has its own scale
            values[key] = sum(agreement(rows["score"], rows["mos"]) for rows in each) / len(each)
        self._write(state.global_step, values)

    def _write(self, step: int, logs: dict) -> None:
        logs = logs | {"step": step, "seconds": round(time.time() - self.start, 1)}
        row = {column: logs[key] for column, key in LOG.items() if logs.get(key) is not None}
        if self.rows and self.rows[-1]["step"] == step:  # validation and training log the same step
            self.rows[-1] |= row
        else:
            self.rows.append(row)
        write_table(self.path, self.table(), self.scorer.seed, "%.5g")


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar with the reward and the last validation beside it; no log entries."""

    def __init__(self, log: RunLog):
        super().__init__()
        self.log = log

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and self.log.rows:
            last = self.log.table()[["reward", "val_srcc"]].ffill().iloc[-1].dropna()
            self.training_bar.set_postfix({key: f"{value:.3f}" for key, value in last.items()})


class LivePlot(TrainerCallback):
    """Draw a run's curves from log.csv as training goes: a picture in Jupyter, a line per entry elsewhere."""

    def __init__(self, path: str | Path, sets: str = "sim-kadid"):
        self.path, self.sets, self.handle = Path(path), sets, None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:  # the summary at the end
            return
        log = read_table(self.path)
        if _in_jupyter():
            self._draw(log)
            return
        last = log[["step", "ranking", "val_srcc", "seconds"]].ffill().iloc[-1]
        values = [f"{name} {value:.3f}" for name, value in last[1:3].items()]
        print("  ".join([f"step {last['step']:.0f}", *values, f"{last['seconds']:.0f} s"]))

    def _draw(self, log: pd.DataFrame) -> None:
        from IPython.display import Image, display

        from vqr1.plots import training_figure

        picture = io.BytesIO()
        training_figure(log, self.sets).savefig(picture, format="png", dpi=75)
        shown = Image(picture.getvalue())
        if self.handle is None:
            self.handle = display(shown, display_id=True)
        else:
            self.handle.update(shown)


def _in_jupyter() -> bool:
    """Tell whether this runs in a notebook's kernel, without importing IPython where it is not in use."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


# Settings and checkpoints

FREE = (
    "root",
    "share_prompts",
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
"""Prefixes of the settings that may change when a run goes on.

They say for how long, what is logged, kept and shown, where the data are, and how memory is used. With more
`max_steps`, the learning rate follows the longer schedule from there."""


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


def resume_from(output: Path, resume: bool, settings: Settings) -> Path | None:
    """Return the checkpoint that a run goes on from, None for a new run.

    Args:
        output: folder of the run.
        resume: whether going on was asked for.
        settings: to go on with.

    Raises:
        FileExistsError: there is a checkpoint, and `resume` was not asked for.
        ValueError: the run cannot go on exactly: its settings differ, it is past the last step, or it has no
            state of the optimizer.
    """
    found = last_checkpoint(output / "checkpoints")
    if found and not resume:
        raise FileExistsError(
            f"{output} already holds a run, at {found.name}; go on with it by --resume, or give another "
            "folder"
        )
    if not found:
        return None
    same_settings(output, asdict(settings), lambda path: merged(DEFAULTS, read_settings(path)))
    last = settings.grpo.get("max_steps", -1)
    if step_of(found) > last:
        raise ValueError(
            f"{output} is at {found.name}, past max_steps {last}; give more steps, or another folder"
        )
    if not any(found.glob("optimizer*")) and not any(found.glob("global_step*")):  # the second: DeepSpeed's
        raise ValueError(
            f"{found} has no state of the optimizer (save_only_model: true), so the run cannot go on as it "
            "was; "
            f"train on from its weights as a new run: model_name_or_path: {found}, and another folder"
        )
    return found


def same_settings(output: Path, settings: dict, read: Callable[[Path], dict] = read_yaml) -> None:
    """Raise ValueError, naming each difference, unless a run's config.yaml has the same settings.

    `FREE` settings may differ. A key of GRPOConfig that is not given counts as its default.

    Args:
        output: folder of the run.
        settings: to compare with those of its config.yaml.
        read: reads config.yaml.
    """
    path = output / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, so nothing says with which settings {output} was begun; give another folder"
        )
    old, new = _flat(read(path)), _flat(settings)
    changed = [key for key in sorted(old | new) if _value(old, key) != _value(new, key)]
    changed = [key for key in changed if not key.startswith(FREE)]
    if changed:
        named = "; ".join(f"{key} was {_value(old, key)!r}, now {_value(new, key)!r}" for key in changed)
        raise ValueError(
            f"{output} was begun with other settings: {named}. Go on with those of {path}, or "
            "give another folder"
        )


def save_settings(output: Path, settings: Settings | dict) -> None:
    """Write the settings of a run into its folder, as config.yaml."""
    output.mkdir(parents=True, exist_ok=True)
    write_yaml(output / "config.yaml", asdict(settings) if isinstance(settings, Settings) else settings)


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys; an empty mapping has none."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _value(flat: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return flat.get(key, TRL_DEFAULTS.get(name) if section == "grpo" else None)
