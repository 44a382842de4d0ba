"""Bad settings are refused on one line before anything is loaded; a run goes on with its own."""

import inspect
import re

import pytest
import trl
import yaml

from vqr1 import training
from vqr1.cli import main
from vqr1.config import (
    CONFIGS,
    HINTS,
    RENAMED,
    RESERVED,
    Settings,
    fits,
    load_config,
    read_yaml,
    write_yaml,
)

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def with_line(key: str, value: str) -> str:
    """Return a configuration that extends cpu by one key, which goes under grpo if it is TRL's."""
    return (
        f"extends: cpu\n{key}: {value}\n" if key in HINTS[""] else f"extends: cpu\ngrpo:\n  {key}: {value}\n"
    )


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
    assert training.grpo_config(load_config(path).grpo, tmp_path).learning_rate == 0.0002


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
        ("min_pixels", "401408\nmax_pixels: 3136", "max_pixels 3136 is below min_pixels 401408"),
        ("min_pixels", "-5\nmax_pixels: 3136", "min_pixels -5 is below 1"),
        ("min_pixels", "0\nmax_pixels: 3136", "min_pixels 0 is below 1"),
        ("min_pixels", "3136", "min_pixels 3136 needs max_pixels; give both, or neither"),
        ("max_pixels", "3136", "max_pixels 3136 needs min_pixels; give both, or neither"),
        ("min_pixels", "10\nmax_pixels: 1023", "max_pixels 1023 is below 1024, one token of the policy"),
        ("min_pixels", "3136\nmax_pixels: 4e5", "max_pixels 400000.0 is not an integer or null"),
        ("min_pixels", "[3136, 401408]", "min_pixels [3136, 401408] is not an integer or null"),
        ("dtype", "int4", "dtype 'int4' is not one of float32, bfloat16, float16 or null"),
        ("load_in_4bit", "4", "load_in_4bit 4 is not true or false"),
        ("thinking", "yes", "thinking 'yes' is not true or false"),
        ("share_prompts", "maybe", "share_prompts 'maybe' is not true or false"),
        ("frozen", "visual", "frozen 'visual' is not a list of text; write [visual]"),
        ("frozen", "[3]", "frozen [3] is not a list of text"),
        ("model_name_or_path", "7", "model_name_or_path 7 is not text"),
        ("reward", "rank", "reward 'rank' is not one of ranking, threshold, absolute, format"),
        (
            "reward_options",
            "{binray: true}",
            "key 'binray' under reward_options is unknown; the keys are average, binary, bounded",
        ),
        ("reward_options", "{bounded: no}", "reward_options bounded 'no' is not true or false"),
        ("reward_options", "{variance: 0}", "reward_options variance 0 is not above 0"),
        (
            "reward_options",
            "{scope: everywhere}",
            "reward_options scope 'everywhere' is not one of local, global",
        ),
        ("reward_options", "bounded", "reward_options 'bounded' is not a mapping"),
        ("lora_r", "0", "lora_r 0 is below 1"),
        ("lora_alpha", "0", "lora_alpha 0 is not above 0"),
        ("lora_r", "4.5", "lora_r 4.5 is not an integer"),
        ("use_peft", "null", "use_peft None is not true or false"),
        (
            "use_peft",
            "true\nlora_rank: 4",
            "key 'lora_rank' is unknown; the keys are comparisons, dtype, frozen",
        ),
        ("validation", "{rows: 0, every: 25}", "validation rows 0 is below 2"),
        ("validation", "{rows: -1, every: 25}", "validation rows -1 is below 2"),
        ("validation", "{rows: 190, every: 0}", "validation every 0 is below 1"),
        ("validation", "{row: 190}", "key 'row' under validation is unknown; the keys are every, rows"),
        ("validation", "null", "validation None is not a mapping"),
        ("comparisons", "[pcuid]", "comparisons 'pcuid' is none of the sets; they are sim-kadid"),
        ("comparisons", "sim-kadid", "comparisons 'sim-kadid' is not a list of text; write [sim-kadid]"),
        (
            "comparisons",
            "[sim-kadid]\nreward: threshold",
            "comparisons ['sim-kadid'] are of no use to the reward threshold; use reward: ranking",
        ),
        ("reward_options", "{comparisons: {}}", "key 'comparisons' under reward_options is unknown"),
        ("reward_options", "{preference: []}", "key 'preference' under reward_options is unknown"),
        ("root", "{kadid10k: /data}", "root 'kadid10k' is none of the sets; they are sim-kadid"),
        ("root", "{sim-kadid: /data}", "root 'sim-kadid' comes with the project; leave it out"),
        ("root", "[/data]", "root ['/data'] is not text or a mapping or null"),
        ("seed", "-1", "grpo seed -1 is below 0"),
        ("max_steps", "9\n  max_steps: 5", "key 'max_steps' is there twice"),
        ("thinking", "true\nextends: cpu", "key 'extends' is there twice"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named_before_anything_is_loaded(
    key, value, said, tmp_path, capsys, monkeypatch
):
    for name in ("load_policy", "load_ratings"):
        monkeypatch.setattr(training, name, lambda *args: pytest.fail("something was loaded"))
    path = tmp_path / "mine.yaml"
    path.write_text(with_line(key, value), encoding="utf-8")
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
    with pytest.raises(
        ValueError, match=f"grpo {key} .* needs the package {package}: install it, or leave it out"
    ):
        load_config("cpu").changed(grpo={key: value})


def test_settings_changed_in_python_are_checked_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load_policy", lambda *args: pytest.fail("the policy was loaded"))
    with pytest.raises(ValueError, match="configuration: thinking 'yes' is not true or false"):
        load_config("cpu").changed(thinking="yes")
    config = load_config("cpu")
    config.grpo["max_steps"] = 0
    with pytest.raises(ValueError, match="configuration: grpo max_steps 0 is below 1"):
        training.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_trl_does_not_take_is_one_line(tmp_path):
    config = load_config("cpu").changed(grpo={"auto_find_batch_size": True})
    with pytest.raises(
        ValueError,
        match="^trl.GRPOConfig does not take what is under grpo: auto_find_batch_size is not supported",
    ) as found:
        training.grpo_config(config.grpo, tmp_path)
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("frozen", "said"),
    [
        (["vision"], "frozen 'vision' is no part of the policy; name visual"),
        (["model"], "leaves nothing to train"),
    ],
)
def test_frozen_names_are_parts_and_leave_something(frozen, said, tmp_path):
    frame = training.set_rows(["sim-kadid"], None, "train").iloc[::300]
    small = {"per_device_train_batch_size": 12, "max_steps": 1}
    config = load_config("cpu").changed(frozen=frozen, use_peft=False, grpo=small)
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
    assert {name for name in NAMES if not load_config(name).reward_options["bounded"]} == {"paper-7b-full"}


# --- what a file decides, and what it extends ---------------------------------------------------


def test_a_file_shows_only_what_it_decides(tmp_path):
    decided = {"model_name_or_path": "tiny-policy", "sets": ["sim-five"]}
    decided["grpo"] = {"per_device_train_batch_size": 12}
    write_yaml(tmp_path / "mine.yaml", decided)
    found = load_config(tmp_path / "mine.yaml")
    assert found == Settings(**decided) and found.grpo["num_generations"] == 6
    assert (found.lora_r, found.frozen, found.reward_options) == (16, ["visual"], {"bounded": True})


def test_a_file_extends_another_key_by_key(tmp_path):
    """It names its parent, or gives its path from its own folder; lists are replaced."""
    (tmp_path / "below").mkdir()
    write_yaml(tmp_path / "one.yaml", {"extends": "cpu", "grpo": {"seed": 3}, "validation": {"rows": 8}})
    more = {"extends": "../one.yaml", "grpo": {"beta": 0.1}, "sets": ["sim-five"]}
    write_yaml(tmp_path / "below" / "two.yaml", more)
    base, found = load_config("cpu"), load_config(tmp_path / "below" / "two.yaml")
    assert found.grpo == base.grpo | {"seed": 3, "beta": 0.1}
    assert found == base.changed(grpo=found.grpo, validation={"rows": 8}, sets=["sim-five"])


@pytest.mark.parametrize(
    ("parent", "error", "said"),
    [
        ("mine.yaml", ValueError, "mine.yaml: extends 'mine.yaml' leads back to this file"),
        ("other.yaml", ValueError, "other.yaml: extends 'mine.yaml' leads back to this file"),
        ("nothing", FileNotFoundError, "no configuration 'nothing'; give one of a100-7b, cpu,"),
        (["cpu"], ValueError, "mine.yaml: extends ['cpu'] is not the name or path of a configuration"),
        ("wrong.yaml", ValueError, "wrong.yaml: thinking 'no' is not true or false"),
    ],
)
def test_what_cannot_be_extended_is_named_with_its_file(parent, error, said, tmp_path):
    write_yaml(tmp_path / "mine.yaml", {"extends": parent})
    write_yaml(tmp_path / "other.yaml", {"extends": "mine.yaml"})
    write_yaml(tmp_path / "wrong.yaml", {"extends": "cpu", "thinking": "no"})
    with pytest.raises(error, match=re.escape(said)):
        load_config(tmp_path / "mine.yaml")


@pytest.mark.parametrize("key", RENAMED)
def test_an_old_key_is_named_with_the_new_one(key, tmp_path):
    write_yaml(tmp_path / "mine.yaml", {"extends": "cpu", key: None})
    with pytest.raises(ValueError, match=f"mine.yaml: key '{key}' is called {RENAMED[key]} now; rename it"):
        load_config(tmp_path / "mine.yaml")
    new = RENAMED[key].replace(" and", ",").split(", ")
    assert key not in HINTS[""] and set(new) <= set(HINTS[""])


def test_a_file_may_be_given_wherever_settings_are(tmp_path):
    write_yaml(tmp_path / "mine.yaml", {"extends": "cpu"})
    assert load_config("cpu") == load_config(str(tmp_path / "mine.yaml")) == load_config(load_config("cpu"))


def test_all_configurations_together_are_short():
    texts = {name: (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8") for name in NAMES}
    assert sum(len(text.splitlines()) for text in texts.values()) <= 150
    assert {name for name, text in texts.items() if "extends:" not in text} == {"cpu", "l4-7b"}
