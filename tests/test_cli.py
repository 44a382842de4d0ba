"""The commands as a user types them: what they say, what they write, and their exit codes."""

import csv
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from vqr1 import training
from vqr1.cli import _parser, main
from vqr1.config import config_for_device, load_config, write_yaml
from vqr1.data.manifests import MANIFEST_COLUMNS
from vqr1.experiments import demo
from vqr1.runlog import last_checkpoint
from vqr1.scoring import DEFAULTS, OFFICIAL
from vqr1.training import fitted

ROOT = Path(__file__).resolve().parents[1]
PHOTO = ROOT / "data" / "photos" / "kitten.jpg"
COMMANDS = _parser()._subparsers._group_actions[0].choices
READING = {key: value for key, value in DEFAULTS.items() if key not in ("batch_size", "seed")} | {
    "thinking": True,
    "numbered": False,
}
"""Settings that score as the shipped ranker was trained."""


# --- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_lists_every_option_and_says_what_it_does(name, capsys):
    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0 and COMMANDS[name].description in said.replace("\n", " ")
    for action in COMMANDS[name]._actions:
        assert action.help, f"vqr1 {name}: {action.dest} has no help"
        assert (action.option_strings or action.choices or [action.metavar])[-1] in said


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0 and all(name in said for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["score"],
        ["score", "a.png", "--estimate", "best"],
        ["score", "a.png", "--k", "few"],
        ["train", "--steps", "few"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2 and "usage: vqr1" in capsys.readouterr().err


def refused(arguments: list[str], capsys) -> str:
    """Run a command that must be refused; return its one-line error."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"vqr1 {arguments[0]}: ") and "Traceback" not in said
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--config", "nope"], "no configuration 'nope'; give one of"),
        (["demo", "--config", "nope"], "no configuration 'nope'; give one of"),
        (["evaluate", "--sets", "sim-nothing"], "unknown set 'sim-nothing'"),
        (
            ["evaluate", "--sets", "sim-unseen", "--split", "train"],
            "no rows with split 'train'; it has ['test']",
        ),
        (["evaluate", "--sets", "nowhere.csv"], "nowhere.csv: no such manifest"),
        (
            ["evaluate", "--sets", "sim-unseen", "--limit", "2", "--policy", "nowhere"],
            "nowhere: no such folder",
        ),
        (["score", str(PHOTO), "--shard", "3/2"], "--shard 3/2 is not i/n"),
        (["score", str(PHOTO), "--estimate", "sample", "--k", "1"], "need at least 2 samples"),
        (["score", str(PHOTO), "--batch-size", "0"], "at least one picture at a time"),
        (["score", str(PHOTO), "--policy", "nowhere"], "nowhere: no such folder"),
        (["score", str(PHOTO), "--pixels", "9000", "4000"], "pixels 9000 to 4000 are no range"),
        (["evaluate", "--suite", "table2", "--engine", "vllm"], "leave out --engine"),
        (["score", str(PHOTO), "--policy", str(ROOT / "tests")], "holds no model"),
        (["sheet", "nowhere.png"], "nowhere.png is missing"),
        (["sheet", __file__], "cannot be read as a picture"),
        (["describe", "nowhere.png"], "nowhere.png is missing"),
        (["compare", str(PHOTO), "nowhere.png"], "nowhere.png is missing"),
    ],
)
def test_what_cannot_be_used_is_named(arguments, said, capsys):
    assert said in refused(arguments, capsys)


WORKERS = [
    (["demo", "--out", "o", "--steps", "3"], "experiments.demo.demo", ("o", "cpu", False, 3, None)),
    (
        ["train", "--seed", "5", "--out", "o"],
        "training.train",
        (load_config("cpu").changed(grpo={"seed": 5}), "o", False),
    ),
    (["manifest", "f", "--ratings", "r.csv"], "data.own.write_manifest", ("f", "r.csv", None)),
    (
        ["train", "--set", "sim-five", "--set", "sim-elo", "--steps", "3"],
        "training.train",
        (
            fitted(load_config(config_for_device(), sets=["sim-five", "sim-elo"])).changed(
                grpo={"max_steps": 3}
            ),
        ),
    ),
    (
        ["train", "--config", "cpu-study", "--set", "sim-five"],
        "training.train",
        (fitted(load_config("cpu-study", sets=["sim-five"])),),
    ),
    (
        ["calibrate", "--policy", "mine", "--sets", "my.csv", "--limit", "9"],
        "evaluation.calibrate_policy",
        ("mine", "my.csv", "val", 9, None),
    ),
    (
        ["compare", "a.png", "b.png", "--policy", "p", "--no-thinking"],
        "scoring.Scorer",
        (READING | {"policy": "p", "thinking": False},),
    ),
    (["score", str(PHOTO)], "scoring.Scorer", (READING | {"k": 1, "batch_size": 16},)),
    (
        ["score", str(PHOTO), "--preset", "official", "--thinking"],
        "scoring.Scorer",
        (READING | OFFICIAL | {"k": 1, "thinking": True, "batch_size": 16},),
    ),
    (
        [
            *("score", str(PHOTO), "--preset", "official", "--estimate", "expected", "--no-numbered"),
            *("--max-new-tokens", "9", "--pixels", "3136", "65536", "--quantize", "--engine", "vllm"),
        ],
        "scoring.Scorer",
        (
            READING
            | {"k": 1, "max_new_tokens": 9, "pixels": [3136, 65536], "quantize": True, "engine": "vllm"}
            | {"batch_size": 16},
        ),
    ),
    (["compare", "a.png", "b.png"], "scoring.Scorer", (READING,)),
    (
        ["compare", "a.png", "b.png", "--preset", "official"],
        "scoring.Scorer",
        (READING | OFFICIAL | {"estimate": "expected"},),
    ),
    (
        ["describe", "a.png", "--policy", "p"],
        "scoring.Scorer",
        (READING | {"policy": "p", "thinking": False},),
    ),
    (["evaluate", "--sets", "sim-unseen", "--limit", "1"], "evaluation.evaluate", (DEFAULTS["policy"],)),
    (
        ["evaluate", "--suite", "table2", "--root", "r"],
        "experiments.table2.table2",
        (DEFAULTS["policy"], "r", ["expected"], None, None),
    ),
    (["data", "sim-unseen"], "data.describe.load_ratings", ("sim-unseen", None)),
    (["data", "kadid10k", "--root", "r"], "data.describe.read_public", ("kadid-10k", "r")),
    (["data", "--rebuild"], "data.simulated.build_sim_sets", ()),
    (["sheet", str(PHOTO)], "distortions.contact_sheet", ()),
    (["pretrain"], "experiments.school.find_school", (None,)),
    (["pretrain", "--cnn", "--root", "r"], "experiments.school.find_school", ("r",)),
    (
        ["score", str(PHOTO.parent), "--actors", "2", "--gpus", "1", "--out", os.devnull + ".csv"],
        "serving.cluster.pictures_in",
        (str(PHOTO.parent),),
    ),
    (
        ["study", "demo", "--seeds", "1"],
        "experiments.studies.study",
        ("demo", [1], "runs/study", None, None, None),
    ),
    (["study", "progress"], "experiments.yardstick.study", (("tiny-policy", "people-ranker"),)),
    (["study", "progress", "--variants", "ranker"], "experiments.yardstick.study", (["ranker"],)),
    (["study", "eyes", "--root", "r"], "experiments.probes.eyes", (("tiny-policy", "people-ranker"), "r")),
    (["study", "words", "--variants", "ranker"], "experiments.probes.words", (["ranker"],)),
    (
        ["study", "error-bars", "--variants", "p", "--root", "r"],
        "experiments.probes.error_bars",
        (["p"], "r"),
    ),
    (["study", "srij", "--root", "r"], "experiments.srij.srij", (("tiny-policy", "people-ranker"), "r")),
    (
        ["study", "people-mixture", "--seeds", "1"],
        "experiments.studies.study",
        ("people-mixture", [1], "runs/study", None, None, None),
    ),
]
"""A call, the function that does its work, and the first arguments that it gets."""


@pytest.mark.parametrize(("arguments", "worker", "given"), WORKERS, ids=[" ".join(row[0]) for row in WORKERS])
def test_every_command_hands_its_arguments_to_its_worker(arguments, worker, given, monkeypatch):
    """The worker is replaced: what it does has its own tests."""

    class Called(Exception):
        pass

    def work(*args, **kwargs):
        raise Called(*(args or [kwargs]))

    module, _, name = worker.rpartition(".")
    monkeypatch.setattr(importlib.import_module(f"vqr1.{module}"), name, work)
    monkeypatch.setattr(sys, "argv", ["vqr1", *arguments])
    with pytest.raises(Called) as called:
        main(arguments)
    assert called.value.args[: len(given)] == given


def test_no_command_is_left_out():
    assert {arguments[0] for arguments, *_ in WORKERS} == set(COMMANDS)


@pytest.mark.parametrize("name", ["progress", "eyes", "words", "srij"])
def test_a_study_of_policies_refuses_what_it_would_not_heed(name, capsys):
    for option in (["--seeds", "1"], ["--steps", "3"], ["--csv", "a.csv"]):
        said = refused(["study", name, *option], capsys)
        assert f"study {name} has neither seeds, steps nor another table" in said


@pytest.mark.parametrize("name", ["people", "progress", "words"])
def test_studies_that_have_no_root_refuse_one(name, capsys):
    said = refused(["study", name, "--root", "r"], capsys)
    assert f"--root is for eyes, error-bars, srij; for study {name}, set VQR1_DATA" in said


@pytest.mark.parametrize(
    ("arguments", "worker", "given"),
    [
        (
            ["--out", "o", "--steps", "3", "2", "1"],
            "pretraining.pretrain",
            (("o",), {"seed": 0, "steps": (3, 2, 1)}),
        ),
        (["--seed", "3"], "pretraining.pretrain", (("runs/pretrain",), {"seed": 3})),
        (["--cnn"], "baselines.pretrain_cnn", ((), {})),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_pretraining_gets_the_school_that_is_found(arguments, worker, given, monkeypatch, capsys):
    school, called = [Path("a.jpg"), Path("b.jpg")], []
    module, _, name = worker.rpartition(".")
    monkeypatch.setattr("vqr1.experiments.school.find_school", lambda root: school)
    monkeypatch.setattr(
        importlib.import_module(f"vqr1.experiments.{module}"), name, lambda *a, **k: called.append((a, k))
    )
    assert main(["pretrain", *arguments]) == 0
    positional, named = given
    expected = (positional, named | {"school": school}) if name == "pretrain" else ((school,), {})
    assert called == [expected] and " is in " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--steps", "0"],
        ["demo", "--limit", "0"],
        ["train", "--steps", "-1"],
        ["evaluate", "--limit", "0"],
    ],
)
def test_a_number_that_would_be_taken_for_none_given_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2 and "is below 1" in capsys.readouterr().err


# --- pictures -----------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """Return a good picture, four unreadable ones and another good one."""
    Image.effect_noise((64, 64), 40).save(tmp_path / "good.png")
    whole = PHOTO.read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "zero.png").touch()
    (tmp_path / "text.png").write_text("a cat on a mat", encoding="utf-8")
    names = ["good.png", "missing.png", "truncated.jpg", "zero.png", "text.png"]
    return [str(tmp_path / name) for name in names] + [str(PHOTO)]


def read_rows(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


def test_score_gives_every_picture_a_row_and_exits_with_1_if_one_failed(pictures, capsys):
    assert main(["score", *pictures]) == 1
    rows = read_rows(capsys.readouterr().out)
    assert [row["image"] for row in rows] == pictures
    assert list(rows[0]) == [
        "image",
        "score",
        "std",
        "low",
        "high",
        "mass",
        "policy",
        "estimate",
        "k",
        "thinking",
        "engine",
        "quantize",
        "pixels",
        "numbered",
        "max_new_tokens",
        "repetition_penalty",
        "reasoning",
        "note",
        "error",
    ]
    reasons = ["", "is missing", "truncated", "has zero bytes", "cannot be read as a picture", ""]
    for row, reason in zip(rows, reasons, strict=True):
        if reason:
            assert (
                row["image"] in row["error"] and reason in row["error"] and row["score"] == row["std"] == ""
            )
        else:
            assert row["error"] == "" and 1 <= float(row["score"]) < 6 and float(row["std"]) > 0


def test_score_writes_the_same_rows_into_a_file(pictures, tmp_path, capsys):
    good = [pictures[0], pictures[-1]]
    assert main(["score", *good]) == 0
    shown = capsys.readouterr().out
    assert main(["score", *good, "--out", str(tmp_path / "scores.csv")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'scores.csv'}: 2 pictures; 0 without a score\n"
    assert (tmp_path / "scores.csv").read_text(encoding="utf-8") == shown


def test_on_a_terminal_the_scores_are_a_table(pictures, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["score", pictures[0], pictures[1], "--policy", "tiny-policy", "--thinking"]) == 1
    head, good, reasoning, missing = capsys.readouterr().out.splitlines()
    assert head.split() == ["score", "picture"]
    assert re.fullmatch(rf"\d\.\d\d ± \d\.\d\d +{re.escape(pictures[0])}", good)
    assert re.fullmatch(r" +\w.*", reasoning)
    assert re.fullmatch(rf"none +{re.escape(pictures[1])} is missing.*", missing)


@pytest.mark.parametrize(
    "more",
    [["--actors", "2"], ["other", "--actors", "2", "--out", "a.csv"], ["--actors", "2", "--shard", "1/2"]],
)
def test_a_cluster_takes_one_folder_and_a_file(more, capsys):
    assert "--actors takes one folder or bucket" in refused(["score", "photos", *more], capsys)


def test_what_needs_no_policy_starts_without_torch():
    """It takes fresh processes: this one has imported everything."""
    code = (
        "import sys; from vqr1.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    for arguments in (
        ["--help"],
        ["score", "--help"],
        ["data"],
        ["data", "sim-unseen"],
        ["manifest", "--help"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout, (arguments, done.stderr[-2000:])


def test_score_with_thinking_gives_the_reasoning(pictures, capsys):
    assert main(["score", pictures[-1], "--thinking", "--estimate", "greedy"]) == 0
    [row] = read_rows(capsys.readouterr().out)
    assert row["reasoning"] and row["thinking"] == "True" and row["estimate"] == "greedy"


@pytest.mark.parametrize(
    ("trained", "more", "asked"),
    [
        (None, [], False),
        (None, ["--thinking"], True),
        (True, [], True),
        (True, ["--no-thinking"], False),
        (False, [], False),
    ],
)
def test_score_and_evaluate_think_as_trained_unless_told(trained, more, asked, tmp_path, monkeypatch, capsys):
    """A plain policy is scored without thinking, and evaluated both ways."""
    policy = tmp_path / "policy"
    policy.symlink_to(ROOT / "data" / "tiny-policy") if trained is None else policy.mkdir()
    if trained is not None:
        for path in (ROOT / "data" / "tiny-policy").iterdir():
            (policy / path.name).symlink_to(path)
        (policy / "vqr1.json").write_text(json.dumps({"thinking": trained, "picture_number": False}))
    assert main(["score", str(PHOTO), "--policy", str(policy), *more]) == 0
    [row] = read_rows(capsys.readouterr().out)
    assert row["thinking"] == str(asked) and bool(row["reasoning"]) == asked
    seen = []
    monkeypatch.setattr("vqr1.evaluation.evaluate", lambda *given, **more: seen.append(given[-1]) or 1 / 0)
    arguments = ["evaluate", "--sets", "sim-unseen", "--limit", "1", "--policy", str(policy), *more]
    with pytest.raises(ZeroDivisionError):
        main(arguments)
    assert seen == [(asked,) if more or trained is not None else (True, False)]


def test_a_suite_has_both_prompts(capsys):
    said = refused(["evaluate", "--suite", "table2", "--thinking"], capsys)
    assert "--suite measures both prompts" in said


def test_compare_is_even_for_one_picture_twice(capsys):
    assert main(["compare", str(PHOTO), str(PHOTO)]) == 0
    assert capsys.readouterr().out.strip().endswith("= 0.500")


def test_sheet_draws_a_png(pictures, tmp_path, capsys):
    assert main(["sheet", pictures[0], "--out", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.format == "PNG" and image.height > 25 * 64 and image.width > 5 * 64
    assert "sheet.png" in capsys.readouterr().out


# --- manifests ----------------------------------------------------------------------------------


def manifest(folder: Path, rows: list[dict], columns=MANIFEST_COLUMNS) -> str:
    """Write a manifest of the user's own and its pictures; return its path."""
    for number in range(4):
        Image.effect_noise((64, 64), 20 * number + 5).convert("RGB").save(folder / f"{number}.png")
    path = folder / "mine.csv"
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return str(path)


def own_rows() -> list[dict]:
    return [
        {"image": f"{n}.png", "dataset": "mine", "mos": mos, "reference": f"{n}.png", "split": "test"}
        for n, mos in enumerate((80, 61.5, 40, 22))
    ]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"mos": "good"}, "mos 'good' is not a number"),
        ({"image": "nowhere.png"}, "image 'nowhere.png' is not there below"),
        ({"distortion": "gausian_blur", "level": "3", "seed": "1"}, "distortion 'gausian_blur' is not known"),
        ({"distortion": "jpeg", "level": "0", "seed": "1"}, "level '0' is not one of 1, 2, 3, 4, 5"),
        ({"distortion": "jpeg", "level": "6", "seed": "1"}, "level '6' is not one of 1, 2, 3, 4, 5"),
    ],
)
def test_evaluate_names_the_line_of_a_bad_manifest(change, value, tmp_path, capsys):
    rows = own_rows()
    rows[2] |= change
    path = manifest(tmp_path, rows)
    assert f"{path}, line 4: {value}" in refused(["evaluate", "--sets", path], capsys)


def test_evaluate_names_a_missing_column(tmp_path, capsys):
    path = manifest(tmp_path, own_rows(), [name for name in MANIFEST_COLUMNS if name != "mos"])
    assert f"{path}, line 1: column 'mos' is missing" in refused(["evaluate", "--sets", path], capsys)


def test_evaluate_names_a_picture_that_cannot_be_read(tmp_path, capsys):
    path = manifest(tmp_path, own_rows())
    (tmp_path / "2.png").write_text("a cat on a mat", encoding="utf-8")
    assert main(["evaluate", "--sets", path, "--estimates", "expected"]) == 1  # the others are scored
    said = capsys.readouterr()
    assert said.err.count("2.png cannot be read as a picture") == 1  # beside the bar
    assert said.out.count("| expected | True | 4 | 4 | 1 |") == 1  # photographs, rows, unparseable


def test_evaluate_takes_pictures_of_the_users_own(tmp_path, capsys):
    path, out = manifest(tmp_path, own_rows()), str(tmp_path / "out")
    asked = ["evaluate", "--policy", "tiny-policy", "--sets", path, "--estimates", "expected", "--out", out]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert said.count("mine.csv | expected") == 2  # thinking and not
    result = pd.read_csv(tmp_path / "out" / "result.csv")
    assert list(result["thinking"]) == [True, False] and (result["rows"] == 4).all()
    scores = pd.read_csv(tmp_path / "out" / "mine.expected.plain.csv")
    assert list(scores["mos"]) == [80, 61.5, 40, 22] and scores["score"].notna().all()


# --- training -----------------------------------------------------------------------------------


def small_config(folder: Path, **grpo) -> str:
    """Write the cpu configuration with smaller batches and validation; return its path."""
    small = {"per_device_train_batch_size": 24, "num_generations": 3, "warmup_steps": 0} | grpo
    write_yaml(folder / "small.yaml", {"extends": "cpu", "validation": {"rows": 16}, "grpo": small})
    return str(folder / "small.yaml")


@pytest.mark.parametrize("command", ["train", "demo"])
def test_a_run_is_not_overwritten(command, tmp_path, capsys, monkeypatch):
    """The refusal comes before anything is loaded, rendered or evaluated."""
    for module in (demo, training):
        monkeypatch.setattr(module, "load_policy", lambda *args: pytest.fail("the policy was loaded"))
    monkeypatch.setattr(demo, "evaluation_rows", lambda *args, **kwargs: pytest.fail("an evaluation began"))
    (tmp_path / "checkpoints" / "checkpoint-30").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-30" / "trainer_state.json").touch()
    said = refused([command, "--out", str(tmp_path)], capsys)
    assert f"{tmp_path} already holds a run, at checkpoint-30" in said and "--resume" in said


@pytest.mark.parametrize("command", ["train", "demo"])
def test_a_run_with_other_settings_is_not_resumed(command, tmp_path, capsys, monkeypatch):
    """This refusal, too, comes before anything is loaded, rendered or evaluated."""
    for module in (demo, training):
        monkeypatch.setattr(module, "load_policy", lambda *args: pytest.fail("the policy was loaded"))
    monkeypatch.setattr(demo, "evaluation_rows", lambda *args, **kwargs: pytest.fail("an evaluation began"))
    (tmp_path / "checkpoints" / "checkpoint-30").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-30" / "trainer_state.json").touch()
    write_yaml(tmp_path / "config.yaml", {"extends": "cpu", "lora_r": 8})
    said = refused([command, "--resume", "--out", str(tmp_path)], capsys)
    assert "lora_r was 8, now 16" in said


def test_ctrl_c_ends_with_a_hint_and_whole_checkpoints(tmp_path, started, wait_until):
    """The process gets SIGINT in the middle of training; its next step would take as long as the last."""
    settings, folder = small_config(tmp_path, max_steps=60, logging_steps=1, save_steps=1), tmp_path / "run"
    command = [sys.executable, "-m", "vqr1.cli", "train", "--config", settings, "--out", str(folder)]
    process = started(
        command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )  # a runner in the background ignores it
    wait_until(lambda: last_checkpoint(folder / "checkpoints"), process)
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said
    whole = last_checkpoint(folder / "checkpoints")
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {
        path.name for path in whole.iterdir()
    }
    assert not (folder / "policy").exists()
    steps = pd.read_csv(folder / "log.csv", comment="#")["step"]
    assert list(steps) == list(range(len(steps))) and len(steps) > 1


@pytest.mark.slow
def test_demo_writes_what_it_promises(tmp_path, capsys):
    """The demo is whole, but short: two steps, and a fixed sample of each test set."""
    folder, config = tmp_path / "demo", small_config(tmp_path)
    assert main(["demo", "--config", config, "--steps", "2", "--limit", "66", "--out", str(folder)]) == 0
    said, report = capsys.readouterr().out, (folder / "report.md").read_text(encoding="utf-8")
    assert report in said
    for heading in (
        "## Before",
        "## After",
        "## Gain, paired",
        "## What knowing the level",
        "## What the reasoning names",
    ):
        assert heading in report
    tables = [block for block in report.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 5 and all(
        len(set(line.count("|") for line in table.splitlines())) == 1 for table in tables
    )
    for name in ("sim-kadid", "sim-unseen", "sim-mixed", "average"):
        assert f"| {name} |" in tables[0] and f"| {name} |" in tables[1]
    assert "simulated" in report and "oracle: level" in report
    for name in ("training.png", "scatter.png", "pictures.jpg"):
        assert f"]({name})" in report
        with Image.open(folder / name) as image:
            assert image.format == {"png": "PNG", "jpg": "JPEG"}[name[-3:]] and image.width > 400
    log = pd.read_csv(folder / "log.csv", comment="#")
    assert list(log["step"]) == [0, 2] and log["val_srcc"].notna().all() and log["reward"].notna().iloc[1]
    for name in (
        "policy/adapter_model.safetensors",
        "policy/tokenizer.json",
        "config.yaml",
        "before/sim-kadid.expected.thinking.csv",
    ):
        assert (folder / name).is_file(), name
    assert len(pd.read_csv(folder / "after" / "sim-unseen.expected.plain.csv")) == 66


def test_an_engine_that_is_not_installed_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    said = refused(["score", str(PHOTO), "--policy", "tiny-policy", "--engine", "vllm"], capsys)
    assert "engine='vllm' needs vLLM" in said and "pip install vllm==" in said
