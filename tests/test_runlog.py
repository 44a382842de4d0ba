"""Check the folder of a run: what its log says, and when a run resumes."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import TrainerState

from vqr1.config import HINTS, Settings, fits, load_config, read_yaml, write_yaml
from vqr1.data.manifests import load_ratings
from vqr1.runlog import FREE, LivePlot, RunLog, last_checkpoint, resume_from, same_settings, save_settings
from vqr1.scoring import Score


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Return six training rows of several photographs, types and levels."""
    return load_ratings("sim-kadid").query("split == 'train'").iloc[:1866:311].reset_index(drop=True)


def read_log(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "log.csv", comment="#")


class Fake:
    """Score with rising numbers."""

    seed, thinking = 0, False

    def score(self, images):
        return [Score(score=float(n)) for n in range(len(images))]


def at(step: int, **more) -> TrainerState:
    return TrainerState(global_step=step, max_steps=7, **more)


def test_a_validation_between_two_logs_keeps_its_own_step(tmp_path, rows):
    log = RunLog(tmp_path / "log.csv", Fake(), rows[:4], every=3)
    log.on_train_begin(None, at(0), None)
    for step in range(1, 8):
        log.on_step_end(None, at(step), None)
        if step % 2 == 0:
            log.on_log(
                None, at(step), None, logs={"reward": step / 10, "rewards/answer_format_reward/mean": 0.5}
            )
    log.on_log(None, at(7), None, logs={"train_runtime": 1.0})  # the Trainer's last words are no step
    table = read_log(tmp_path).set_index("step")
    assert list(table.index) == [0, 2, 3, 4, 6, 7]
    assert list(table.index[table["val_srcc"].notna()]) == [0, 3, 6, 7]
    assert table["reward"].dropna().to_dict() == {2: 0.2, 4: 0.4, 6: 0.6}
    assert table["format"].dropna().to_dict() == {2: 0.5, 4: 0.5, 6: 0.5}


def test_validation_never_compares_across_data_sets(tmp_path, rows):
    """Each of two sets is in the scorer's order; pooled, the second's small numbers would spoil it."""
    frame = rows[:6].assign(dataset=list("aaabbb"), mos=[500.0, 600, 700, 1, 2, 3])
    log = RunLog(tmp_path / "log.csv", Fake(), frame, every=1)
    log.on_train_begin(None, at(0), None)
    table = read_log(tmp_path)
    assert table["val_srcc"].tolist() == [1.0] and table["val_plcc"].tolist() == [1.0]


def test_validation_counts_the_rows_without_a_score(tmp_path, rows):
    scorer = Fake()
    scorer.score = lambda images: [
        Score(score=2.0),
        Score(error="no score"),
        Score(score=1.0),
        Score(error="no score"),
    ]
    log = RunLog(tmp_path / "log.csv", scorer, rows[:4], every=1)
    log.on_train_begin(None, at(0), None)
    assert read_log(tmp_path)["val_unscored"].tolist() == [2]


def test_only_the_first_of_several_processes_validates_and_writes(tmp_path, rows):
    log = RunLog(tmp_path / "log.csv", Fake(), rows[:2], every=1)
    second = at(0, is_world_process_zero=False)
    log.on_train_begin(None, second, None)
    log.on_step_end(None, second, None)
    log.on_log(None, second, None, logs={"reward": 1.0})
    assert not list(tmp_path.iterdir())


def test_outside_jupyter_the_live_plot_is_a_line_with_the_last_values(tmp_path, capsys):
    log = pd.DataFrame(
        {"step": [0, 5], "ranking": [np.nan, 0.75], "val_srcc": [0.5, np.nan], "seconds": [1.0, 9.6]}
    )
    log.to_csv(tmp_path / "log.csv", index=False)
    LivePlot(tmp_path / "log.csv").on_log(None, None, None, {"reward": 1.7})
    assert capsys.readouterr().out == "step 5  ranking 0.750  val_srcc 0.500  10 s\n"


# --- going on -----------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path):
    """Return (folder, settings) of a run that stopped at step 50."""
    config, folder = load_config("cpu"), tmp_path / "run"
    checkpoint = folder / "checkpoints" / "checkpoint-50"
    checkpoint.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt"):
        (checkpoint / name).touch()
    save_settings(folder, config)
    return folder, config


def changed(config: Settings, key: str, value) -> Settings:
    """Return settings with another value at a dotted key."""
    section, _, name = key.rpartition(".")
    return config.changed(**({section: {name: value}} if section else {key: value}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("grpo.num_generations", 4, "grpo.num_generations was 6, now 4"),
        ("grpo.seed", 1, "grpo.seed was 0, now 1"),
        ("grpo.temperature", 0.7, "grpo.temperature was 1.0, now 0.7"),
        ("grpo.epsilon", 0.3, "grpo.epsilon was 0.2, now 0.3"),  # 0.2 is TRL's default
        ("reward", "threshold", "reward was 'ranking', now 'threshold'"),
        ("reward_options.bounded", False, "reward_options.bounded was True, now False"),
        ("reward_options.binary", True, "reward_options.binary was None, now True"),
        ("sets", ["sim-five"], r"sets was \['sim-kadid'\], now \['sim-five'\]"),
        ("lora_r", 8, "lora_r was 16, now 8"),
        ("use_peft", False, "use_peft was True, now False"),
        ("model_name_or_path", "runs/p/policy", "model_name_or_path was 'tiny-policy', now 'runs/p/policy'"),
        ("load_in_4bit", True, "load_in_4bit was False, now True"),
        ("thinking", False, "thinking was True, now False"),
        ("frozen", [], r"frozen was \['visual'\], now \[\]"),
        ("validation.rows", 57, "validation.rows was 190, now 57"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(key, value, said, begun):
    folder, config = begun
    with pytest.raises(
        ValueError,
        match=f"{folder} was begun with other settings: .*{said}.*Go on with those of .*config.yaml",
    ):
        resume_from(folder, True, changed(config, key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("grpo.max_steps", 400),
        ("grpo.logging_steps", 1),
        ("grpo.save_steps", 10),
        ("grpo.save_total_limit", 5),
        ("grpo.report_to", "none"),
        ("grpo.epsilon", 0.2),
        ("grpo.gradient_checkpointing", True),
        ("root", "/data"),
        ("validation.every", 5),
        ("share_prompts", False),
    ],
)
def test_a_run_goes_on_longer_and_with_other_logging(key, value, begun):
    folder, config = begun
    assert resume_from(folder, True, changed(config, key, value)) == folder / "checkpoints" / "checkpoint-50"
    assert fits(value, HINTS["grpo"].get(key.partition(".")[2], object))


def test_what_may_change_are_keys():
    known = [f"{section}.{key}".strip(".") for section, keys in HINTS.items() for key in keys]
    assert [start for start in FREE if not any(key.startswith(start) for key in known)] == []


def test_a_run_goes_on_with_the_settings_in_its_own_folder(begun):
    folder, config = begun
    assert load_config(folder / "config.yaml") == config
    assert resume_from(folder, True, load_config(folder / "config.yaml")).name == "checkpoint-50"


def test_a_run_that_was_begun_with_old_keys_says_so(begun):
    folder, config = begun
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(text.replace("share_prompts:", "share:"), encoding="utf-8")
    with pytest.raises(ValueError, match="config.yaml: key 'share' is called share_prompts now; rename it"):
        resume_from(folder, True, config)


def test_a_setting_that_was_added_since_counts_as_its_default(begun):
    folder, config = begun
    settings = read_yaml(folder / "config.yaml")
    del settings["lora_vision"]
    write_yaml(folder / "config.yaml", settings)
    assert resume_from(folder, True, config).name == "checkpoint-50"
    with pytest.raises(ValueError, match="lora_vision was False, now True"):
        resume_from(folder, True, config.changed(lora_vision=True))


def test_other_settings_than_a_trainings_are_compared_too(tmp_path):
    save_settings(tmp_path, {"batch": 32, "seed": 0})
    same_settings(tmp_path, {"batch": 32, "seed": 0})
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        same_settings(tmp_path, {"batch": 32, "seed": 1})


def test_what_was_begun_with_nobody_knows_what_does_not_go_on(begun):
    folder, config = begun
    os.remove(folder / "config.yaml")
    with pytest.raises(ValueError, match="config.yaml is missing, so nothing says with which settings"):
        resume_from(folder, True, config)


def test_a_run_does_not_go_on_past_its_last_step(begun):
    folder, config = begun
    with pytest.raises(ValueError, match="is at checkpoint-50, past max_steps 40"):
        resume_from(folder, True, changed(config, "grpo.max_steps", 40))


def test_a_checkpoint_without_optimizer_does_not_go_on(begun):
    folder, config = begun
    checkpoint = folder / "checkpoints" / "checkpoint-50"
    (checkpoint / "optimizer.pt").unlink()
    said = f"no state of the optimizer .* from its weights as a new run: model_name_or_path: {checkpoint}"
    with pytest.raises(ValueError, match=said):
        resume_from(folder, True, config)
    (checkpoint / "global_step50").mkdir()  # DeepSpeed keeps it there
    assert resume_from(folder, True, config) == checkpoint


def test_last_checkpoint_is_the_newest_whole_one(tmp_path):
    assert last_checkpoint(tmp_path / "no such folder") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-20"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    assert last_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10"):  # the Trainer writes this file last
        (tmp_path / name / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
