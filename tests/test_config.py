"""Settings that cannot be meant are refused on one line, before anything is loaded; a run goes on with its
own.
"""

import copy
import inspect
import os

import pytest
import trl
import yaml

from vqr1 import training
from vqr1.cli import main
from vqr1.config import CONFIGS, HINTS, RESERVED, check_config, fits, load_config, read_yaml, write_yaml
from vqr1.runs import FREE, last_checkpoint, resume_from, save_settings

CPU = (CONFIGS / "cpu.yaml").read_text(encoding="utf-8")
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def with_line(key: str, value: str) -> str:
    """The text of cpu.yaml with another value of a key, or with the key added under grpo, where it ends."""
    lines = CPU.splitlines()
    for i, line in enumerate(lines):
        if line.strip().startswith(f"{key}:"):
            lines[i] = line[: line.index(":")] + f": {value}"
            return "\n".join(lines)
    return "\n".join([*lines, f"  {key}: {value}"])


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),  # PyYAML reads it as text
        ("1.0e-3", 0.001),
        ("1E-3", 0.001),
        ("+1e3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-2.5", -2.5),
        ("010", 10),  # PyYAML: 8
        ("-3", -3),
        ("0", 0),
        ("1:30", "1:30"),  # PyYAML: 90
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),  # PyYAML: a truth value
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("~", None),
        ('"1e-3"', "1e-3"),
    ],
)
def test_what_yaml_says_is_what_is_read(text, value, tmp_path):
    (tmp_path / "one.yaml").write_text(f"key: {text}\n", encoding="utf-8")
    found = read_yaml(tmp_path / "one.yaml")["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "value", [1e-6, 0.5, 10, True, None, "1e-3", "010", "no", "1:30", "", "é", [1, 2.5], {"a": []}]
)
def test_what_is_written_is_read_as_the_same_by_us_and_by_pyyaml(value, tmp_path):
    write_yaml(tmp_path / "one.yaml", {"key": value})
    assert read_yaml(tmp_path / "one.yaml") == {"key": value}
    assert yaml.safe_load((tmp_path / "one.yaml").read_text(encoding="utf-8")) == {"key": value}
    assert [path.name for path in tmp_path.iterdir()] == ["one.yaml"]


def test_a_learning_rate_without_a_point_trains_as_one_with(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(with_line("learning_rate", "2e-4"), encoding="utf-8")
    assert training.grpo_config(load_config(path), tmp_path).learning_rate == 0.0002


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("learning_rate", "1e-3x", "grpo learning_rate '1e-3x' is not a number"),
        ("learning_rate", "-1e-3", "grpo learning_rate -0.001 is not above 0"),
        ("learning_rate", '"1e-3"', "grpo learning_rate '1e-3' is not a number"),
        ("max_steps", "2e2", "grpo max_steps 200.0 is not an integer"),
        ("max_steps", "0", "grpo max_steps 0 is below 1"),
        ("max_steps", "1_000", "grpo max_steps '1_000' is not an integer"),
        ("max_steps", "true", "grpo max_steps True is not an integer"),
        ("bf16", "no", "grpo bf16 'no' is not true or false"),
        ("temperature", "0", "grpo temperature 0 is not above 0"),
        ("num_generations", "1", "grpo num_generations 1 is below 2"),
        ("num_generations", "7", "= 96 answers are not divisible by num_generations 7"),
        (
            "num_generations",
            "96",
            "96 answers are of one picture (num_generations 96); ranking compares pictures",
        ),
        ("lr_scheduler_type", "linaer", "grpo lr_scheduler_type 'linaer' is not one of linear, cosine"),
        ("loss_type", "gpro", "grpo loss_type 'gpro' is not one of grpo, bnpo"),
        ("scale_rewards", "groups", "grpo scale_rewards 'groups' is not one of group, batch, none"),
        ("save_strategy", "step", "grpo save_strategy 'step' is not one of no, steps"),
        (
            "output_dir",
            "runs/mine",
            "grpo output_dir 'runs/mine' is not yours to set: --out says where; leave it out",
        ),
        ("num_train_epochs", "3", "grpo num_train_epochs 3 is not yours to set: max_steps says how long"),
        ("shuffle_dataset", "true", "grpo shuffle_dataset True is not yours to set"),
        ("eval_strategy", "steps", "grpo eval_strategy 'steps' is not yours to set: validation: says"),
        ("dataloader_num_workers", "4", "grpo dataloader_num_workers 4 is not yours to set"),
        ("report_to", "wandbb", "grpo report_to 'wandbb' is unknown; use none, or of"),
        (
            "report_to",
            "[none, azure_ml]",
            "grpo report_to 'azure_ml' needs a package: pip install azure_ml, or report_to: none",
        ),
        ("sets", "sim-kadid", "sets 'sim-kadid' is not a list of text; write [sim-kadid]"),
        ("sets", "[]", "sets [] names no set; name at least one"),
        ("sets", "null", "sets None is not a list of text"),
        ("sets", "[kadid10k, KADID-10k]", "sets ['kadid10k', 'KADID-10k'] names kadid-10k twice"),
        ("pixels", "[401408, 3136]", "pixels [401408, 3136] is not [smallest, largest]"),
        ("pixels", "[-5, 3136]", "pixels [-5, 3136] is not [smallest, largest]"),
        ("pixels", "[0, 3136]", "pixels [0, 3136] is not [smallest, largest]"),
        ("pixels", "3136", "pixels 3136 is not a list of integers or null"),
        ("pixels", "[3136]", "pixels [3136] is not [smallest, largest]"),
        (
            "pixels",
            "[10, 1023]",
            "pixels [10, 1023] is not [smallest, largest], with a largest of at least 1024",
        ),
        ("pixels", "[3136, 4e5]", "pixels [3136, 400000.0] is not a list of integers"),
        ("dtype", "int4", "dtype 'int4' is not one of float32, bfloat16, float16 or null"),
        ("quantize", "4", "quantize 4 is not true or false"),
        ("thinking", "yes", "thinking 'yes' is not true or false"),
        ("share", "maybe", "share 'maybe' is not true or false"),
        ("frozen", "visual", "frozen 'visual' is not a list of text; write [visual]"),
        ("frozen", "[3]", "frozen [3] is not a list of text"),
        ("policy", "7", "policy 7 is not text"),
        ("reward", "rank", "reward 'rank' is not one of ranking, threshold, absolute, format"),
        (
            "variant",
            "{binray: true}",
            "key 'binray' under variant is unknown; the keys are average, binary, bounded",
        ),
        ("variant", "{bounded: no}", "variant bounded 'no' is not true or false"),
        ("variant", "{variance: 0}", "variant variance 0 is not above 0"),
        ("variant", "{scope: everywhere}", "variant scope 'everywhere' is not one of local, global"),
        ("variant", "bounded", "variant 'bounded' is not a mapping"),
        ("lora", "{r: 0, alpha: 32}", "lora r 0 is below 1"),
        ("lora", "{r: 16, alpha: 0}", "lora alpha 0 is not above 0"),
        ("lora", "{rank: 4}", "key 'rank' under lora is unknown; the keys are alpha, r, vision"),
        ("lora", "{r: 4.5}", "lora r 4.5 is not an integer"),
        ("lora", "{}", "lora {} is empty; give {r: 16, alpha: 32}, or null"),
        ("validation", "{rows: 0, every: 25}", "validation rows 0 is below 2"),
        ("validation", "{rows: -1, every: 25}", "validation rows -1 is below 2"),
        ("validation", "{rows: 190, every: 0}", "validation every 0 is below 1"),
        ("validation", "{rows: 190}", "key 'every' under validation is missing"),
        ("root", "{kadid10k: /data}", "root 'kadid10k' is none of the sets; they are sim-kadid"),
        ("root", "{sim-kadid: /data}", "root 'sim-kadid' comes with the project; leave it out"),
        ("root", "[/data]", "root ['/data'] is not text or a mapping or null"),
        ("seed", "-1", "grpo seed -1 is below 0"),
        ("  max_steps", "9\n  max_steps: 5", "key 'max_steps' is there twice"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named_before_anything_is_loaded(
    key, value, said, tmp_path, capsys, monkeypatch
):
    for name in ("load_policy", "load_ratings"):
        monkeypatch.setattr(training, name, lambda *args: pytest.fail("something was loaded"))
    path = tmp_path / "mine.yaml"
    path.write_text(with_line(key.strip(), value), encoding="utf-8")
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"vqr1 train: {path}: ") and said in found and len(found.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "package"),
    [
        ("use_vllm", True, "vllm"),
        ("use_liger_kernel", True, "liger_kernel"),
        ("deepspeed", "ds.json", "deepspeed"),
    ],
)
def test_a_package_that_is_missing_is_named(key, value, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load_config("cpu")
    config["grpo"][key] = value
    with pytest.raises(
        ValueError, match=f"grpo {key} .* needs the package {package}: install it, or leave it out"
    ):
        check_config(config)


def test_settings_changed_in_python_are_checked_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load_policy", lambda *args: pytest.fail("the policy was loaded"))
    with pytest.raises(ValueError, match="configuration: thinking 'yes' is not true or false"):
        training.train(load_config("cpu") | {"thinking": "yes"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_trl_does_not_take_is_one_line(tmp_path):
    config = load_config("cpu")
    config["grpo"] |= {"auto_find_batch_size": True}
    with pytest.raises(
        ValueError,
        match="^trl.GRPOConfig does not take what is under grpo: auto_find_batch_size is not supported",
    ) as found:
        training.grpo_config(config, tmp_path)
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("frozen", "said"),
    [
        (["vision"], "frozen 'vision' is no part of the policy; name visual"),
        (["model"], "leaves nothing to train"),
    ],
)
def test_frozen_names_are_parts_and_leave_something(frozen, said, tmp_path):
    frame = training.set_rows(load_config("cpu"), "train").iloc[::300]
    config = load_config("cpu") | {"frozen": frozen, "lora": None}
    config["grpo"] |= {"per_device_train_batch_size": 12, "max_steps": 1}
    with pytest.raises(ValueError, match=said):
        training.build_trainer(config, tmp_path, frame=frame)


def test_keys_and_words_are_trls():
    assert set(RESERVED) <= set(HINTS["grpo"])
    source = inspect.getsource(trl.GRPOTrainer)
    for key in ("loss_type", "scale_rewards", "importance_sampling_level"):
        for word in HINTS["grpo"][key].__args__:
            assert f'"{word}"' in source, f"{key}: {word}"
    defaults = {
        name: value
        for name, value in vars(trl.GRPOConfig(output_dir="unused", use_cpu=True, bf16=False)).items()
        if name in HINTS["grpo"]
        and name in ("loss_type", "scale_rewards", "beta", "seed", "report_to", "optim")
    }
    assert defaults and all(fits(value, HINTS["grpo"][name]) for name, value in defaults.items())


def test_every_configuration_is_bounded_but_the_papers():
    assert {name for name in NAMES if not load_config(name)["variant"].get("bounded")} == {"paper-7b-full"}


# --- going on -----------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path):
    """(folder, settings) of a run that stopped at step 50."""
    config, folder = load_config("cpu"), tmp_path / "run"
    checkpoint = folder / "checkpoints" / "checkpoint-50"
    checkpoint.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt"):
        (checkpoint / name).touch()
    save_settings(folder, config)
    return folder, config


def changed(config: dict, key: str, value) -> dict:
    """A copy of the settings with another value at a dotted key."""
    config = copy.deepcopy(config)
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    return config


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("grpo.num_generations", 4, "grpo.num_generations was 6, now 4"),
        ("grpo.seed", 1, "grpo.seed was 0, now 1"),
        ("grpo.temperature", 0.7, "grpo.temperature was 1.0, now 0.7"),
        ("grpo.epsilon", 0.3, "grpo.epsilon was 0.2, now 0.3"),  # 0.2 is TRL's default
        ("reward", "threshold", "reward was 'ranking', now 'threshold'"),
        ("variant", {}, "variant.bounded was True, now None"),
        ("sets", ["sim-five"], r"sets was \['sim-kadid'\], now \['sim-five'\]"),
        ("lora", {"r": 8, "alpha": 32}, "lora.r was 16, now 8"),
        ("lora", None, "lora.alpha was 32, now None; lora.r was 16, now None"),
        ("policy", "runs/pretrain/policy", "policy was 'tiny-policy', now 'runs/pretrain/policy'"),
        ("pixels", [3136, 401408], r"pixels was None, now \[3136, 401408\]"),
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
        ("share", False),
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
    with pytest.raises(
        ValueError,
        match=f"no state of the optimizer .*train on from its weights as a new run: policy: {checkpoint}",
    ):
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
