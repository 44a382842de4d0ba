"""Train the embedded policy for a few steps on a few pictures, as users do.

Run by torchrun, this file is the worker of the two-process test.
"""

import ast
import dataclasses
import hashlib
import inspect
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import trl
import yaml
from huggingface_hub import constants
from PIL import Image
from shared import pushed

from vqr1 import rewards, training
from vqr1.cli import main
from vqr1.config import CONFIGS, Settings, load_config, write_yaml
from vqr1.data.comparisons import comparisons_path, names_of
from vqr1.data.manifests import load_ratings, render
from vqr1.places import EMBEDDED
from vqr1.policy import CALIBRATION, load_policy, merge_adapter, never_sampled
from vqr1.prompts import NON_THINKING, THINKING
from vqr1.runlog import LOG, LivePlot, RunLog, last_checkpoint
from vqr1.scoring import Scorer
from vqr1.training import (
    build_trainer,
    fitted,
    grpo_config,
    set_rows,
    train,
    training_rows,
    with_win_shares,
)
from vqr1.votes import save_votes

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def tiny(**grpo) -> Settings:
    """Return the cpu configuration with 4 pictures x 3 completions and all weights trained.

    Adam's first step moves each weight by the learning rate.
    """
    small = {"per_device_train_batch_size": 12, "num_generations": 3, "max_steps": 3}
    small |= {"warmup_steps": 0, "logging_steps": 1, "save_steps": 2} | grpo
    return load_config("cpu").changed(use_peft=False, validation={"rows": 4, "every": 2}, grpo=small)


def some_rows() -> pd.DataFrame:
    return load_ratings("sim-kadid").query("split == 'train'").iloc[::311].reset_index(drop=True)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Return 16 training rows of many photographs, types and levels."""
    return some_rows()


def weights(model) -> dict[str, torch.Tensor]:
    """Return copies of all weights, by their names without an adapter."""
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    """Return (folder, weights before, weights after) of a run of three steps."""
    folder = tmp_path_factory.mktemp("run")
    model, processor = load_policy()
    before = weights(model)
    assert train(tiny(), folder, policy=(model, processor), frame=rows) == folder / "policy"
    return folder, before, weights(model)


def read_log(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "log.csv", comment="#")


# --- what moves ---------------------------------------------------------------------------------


def test_every_trained_weight_moves_and_no_frozen_one(run):
    folder, before, after = run
    assert (read_log(folder)["reward_std"].dropna() > 0).all(), (
        "without reward differences nothing could move"
    )
    frozen = {name for name in before if ".visual." in name}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert frozen and moved == set(before) - frozen
    assert all(value.isfinite().all() for value in after.values())


def test_the_trained_policy_is_what_was_saved(run):
    folder, _, after = run
    model, processor = load_policy(folder / "policy")
    saved = weights(model)
    assert saved.keys() == after.keys() and all(torch.equal(saved[name], after[name]) for name in after)
    assert processor.tokenizer.padding_side == "left"


def test_a_kl_term_is_that_of_the_untrained_policy_and_costs_no_second_look(rows, tmp_path):
    trainer = build_trainer(tiny(beta=0.5, max_steps=2, learning_rate=1e-3), tmp_path, frame=rows)
    looks = []
    trainer.model.model.visual.patch_embed.register_forward_hook(
        lambda module, args, out: looks.append(len(out))
    )
    reference = weights(trainer.ref_model)
    trainer.train()
    assert len(looks) == 2  # one a step, for rollouts, log-probabilities and reference
    first, second = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert first == pytest.approx(0, abs=1e-5) and second > 1e-3
    assert all(torch.equal(p, reference[name]) for name, p in weights(trainer.ref_model).items())


@pytest.fixture(scope="module")
def adapter(rows, tmp_path_factory):
    """Return (folder, model after, weights before, [(gradients, dtypes) of each step]).

    It trains LoRA on 4-bit NF4 and validates before each step.
    """
    seen = []

    class Watching(RunLog):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            seen.append(
                (
                    {name: float(p.grad.abs().max()) for name, p in trained.items()},
                    {p.dtype for p in trained.values()},
                )
            )

    config = tiny(max_steps=3, learning_rate=1e-3).changed(
        load_in_4bit=True, use_peft=True, lora_r=4, lora_alpha=8, validation={"every": 1}
    )
    folder = tmp_path_factory.mktemp("adapter")
    write_yaml(folder / "mine.yaml", dataclasses.asdict(config))
    model, processor = load_policy("tiny-policy", quantize=True)
    before = weights(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "RunLog", Watching)
        train(folder / "mine.yaml", folder, policy=(model, processor), frame=rows)
    return folder, model, before, seen


def test_lora_on_4_bit_has_every_gradient_after_a_validation_pass(adapter):
    """lora_B starts at zero, so only in the first step is lora_A's gradient zero."""
    folder, _, _, steps = adapter
    assert read_log(folder)["val_srcc"].notna().sum() == 4 and len(steps) == 3
    for number, (gradients, dtypes) in enumerate(steps):
        assert dtypes == {torch.float32}
        assert gradients and all(".lora_" in name and ".language_model." in name for name in gradients)
        expected = {name for name in gradients if number > 0 or ".lora_B." in name}
        assert {name for name, size in gradients.items() if size > 0} == expected


def test_lora_on_4_bit_moves_the_adapter_and_not_the_base(adapter):
    _, model, before, steps = adapter
    after = weights(model)
    assert after.keys() - before.keys() == {name.removeprefix("base_model.model.") for name in steps[0][0]}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.abs().max() > 0 for name, value in after.items() if ".lora_B." in name)
    four_bit = [name for name, value in before.items() if value.dtype == torch.uint8]
    assert four_bit and all(".language_model." in name for name in four_bit)


@pytest.fixture(scope="module")
def question(rows):
    """Return one picture and the paper's question, as the model takes it."""

    def inputs(processor) -> dict:
        asked = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        prompt = f"{asked}<|im_start|>assistant\n"
        return processor(text=[prompt], images=[render(rows.iloc[0])], return_tensors="pt")

    return inputs


def test_a_validation_pass_leaves_the_gradients_of_a_4_bit_model_as_they_were(adapter, question):
    """In an eval-mode forward bitsandbytes packs weights for inference, and never unpacks them."""
    folder, *_ = adapter
    model, processor = load_policy(folder / "policy", quantize=True)
    inputs = question(processor)
    both = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        both.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        Scorer((model, processor)).score([Image.new("RGB", (64, 64), "gray")])
    first, second = both
    assert first and all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_an_adapter_loads_as_it_was_trained_and_names_its_base_portably(adapter, question):
    folder, model, *_ = adapter
    settings = json.loads((folder / "policy" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "tiny-policy"
    assert str(ROOT) not in json.dumps(settings)
    assert not list((folder / "policy").glob("model*.safetensors")), "an adapter's folder holds no base"
    loaded, processor = load_policy(folder / "policy", quantize=True)
    inputs = question(processor)
    with torch.no_grad():
        expected, found = (m.eval()(**inputs).logits for m in (model, loaded))
        with loaded.disable_adapter():
            base = loaded(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - base).abs().max() > 1e-3, "the adapter does something"


def test_an_adapter_can_be_trained_further(adapter, rows, tmp_path):
    folder, model, *_ = adapter
    config = tiny(max_steps=1, save_strategy="no").changed(model_name_or_path=str(folder / "policy"))
    with pytest.raises(ValueError, match="policy is an adapter already: set use_peft: false"):
        build_trainer(config.changed(use_peft=True), tmp_path, frame=rows)
    trainer = build_trainer(config, tmp_path, frame=rows)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert {name for name in after if not torch.equal(before[name], after[name])} == {
        n
        for n in after
        if ".lora_" in n and ".ref." not in n  # the reference is where training started
    }


@pytest.mark.parametrize(("share", "checkpointing"), [(True, True), (False, False), (False, True)])
def test_a_policy_that_wants_to_write_a_picture_never_does(share, checkpointing, rows, tmp_path, monkeypatch):
    """A sampled placeholder has no picture, so log-probabilities would fail late in a run."""
    model, processor = load_policy()
    barred, seen = pushed(model, processor), []
    generate = trl.GRPOTrainer._generate_single_turn

    def watched(*args, **kwargs):
        found = generate(*args, **kwargs)
        seen.extend(found[0])
        return found

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", watched)
    config = tiny(gradient_checkpointing=checkpointing, save_strategy="no", max_completion_length=6)
    config = config.changed(use_peft=True, share_prompts=share)
    trainer = build_trainer(config, tmp_path, (model, processor), rows)
    trainer.train()
    assert len(seen) == 3 * 12 and not barred & {token for row in seen for token in row}
    ratios = [
        value for entry in trainer.state.log_history for key, value in entry.items() if "clip_ratio" in key
    ]
    assert ratios and not any(ratios)  # log-probabilities are of the whole vocabulary, before and now


@pytest.mark.parametrize(
    ("vllm", "key", "never"), [(True, "bad_words", list), (False, "suppress_tokens", dict.values)]
)
def test_what_must_not_be_sampled_is_told_to_what_samples(untrained, vllm, key, never):
    args = SimpleNamespace(use_vllm=vllm, generation_kwargs={"min_new_tokens": 2, key: ["own"]})
    training.bar(args, untrained[1])
    assert args.generation_kwargs == {"min_new_tokens": 2, key: ["own", *never(never_sampled(untrained[1]))]}
    assert set(never_sampled(untrained[1])) == {
        f"<|{name}|>" for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    }


def test_a_colocated_vllm_gets_one_token_per_picture():
    """vLLM repeats it itself; two pictures have borders between them, and other tokens stay."""
    seen = []
    vllm = SimpleNamespace(generate=lambda prompts, images, num_generations: seen.append(prompts))
    training.one_token_per_picture(vllm, image=9)
    vllm.generate(prompts=[[1, 1, 9, 9, 9, 2], [9, 2, 9, 9]], images=[None] * 2, num_generations=2)
    assert seen == [[[1, 1, 9, 2], [9, 2, 9]]]


def test_trl_has_every_argument_that_a_run_with_vllm_hands_over():
    """What of it vLLM takes, `make test-vllm` says."""
    from trl.generation.vllm_generation import VLLMGeneration

    generate, built = (
        inspect.signature(method).parameters for method in (VLLMGeneration.generate, VLLMGeneration.__init__)
    )
    assert list(generate)[:4] == ["self", "prompts", "images", "num_generations"]
    assert built["mode"].default == "colocate" and "generation_kwargs" in built
    ours = [key for key in load_config("a100-7b").grpo if "vllm" in key]
    assert len(ours) == 5 and set(ours) <= {one.name for one in dataclasses.fields(trl.GRPOConfig)}
    handed = inspect.getsource(trl.GRPOTrainer)
    for key in set(ours) - {"use_vllm"}:
        assert f"=args.{key}" in handed, key
    assert "generation_kwargs=args.generation_kwargs" in handed and "prompts=prompt_ids" in handed


# --- the log ------------------------------------------------------------------------------------


def test_log_has_its_header_columns_steps_and_validation(run):
    folder, *_ = run
    lines = (folder / "log.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and f"torch {torch.__version__.partition('+')[0]}" in lines[0]
    assert f"trl {trl.__version__}" in lines[0] and "seed 0" in lines[0] and "commit " in lines[0]
    assert lines[1] == ",".join(LOG)
    log = read_log(folder).set_index("step")
    assert list(log.index) == [0, 1, 2, 3]
    assert list(log.index[log["val_srcc"].notna()]) == [0, 2, 3]  # before, every 2, and the last
    assert log["seconds"].is_monotonic_increasing
    logged = ["reward", "ranking", "format", "reward_std", "length", "unparseable", "score_std"]
    assert log.loc[1:, logged].notna().all(axis=None) and log.loc[0, logged].isna().all()


def test_run_folder_says_how_it_was_made(run):
    folder, *_ = run
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) == dataclasses.asdict(tiny())


# --- interrupted, and resumed -------------------------------------------------------------------


def training_command(config: Settings, folder: Path) -> list[str]:
    """Return `vqr1 train` into folder/run."""
    settings = folder / "tiny.yaml"
    write_yaml(settings, dataclasses.asdict(config))
    return [
        sys.executable,
        "-m",
        "vqr1.cli",
        "train",
        "--config",
        str(settings),
        "--out",
        str(folder / "run"),
    ]


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(tmp_path, capsys, started, wait_until):
    config = tiny(max_steps=4, save_steps=2)
    folder, settings = tmp_path / "run", tmp_path / "tiny.yaml"
    process = started(training_command(config, tmp_path))
    wait_until((folder / "checkpoints" / "checkpoint-2" / "trainer_state.json").exists, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not (folder / "policy").exists(), "the kill came after the end"
    kept = (folder / "log.csv").read_text(encoding="utf-8").splitlines()[1:5]  # header, steps 0 to 2
    half = folder / "checkpoints" / "checkpoint-3"
    half.mkdir(exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half")

    assert main(["train", "--config", str(settings), "--out", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "already holds a run, at checkpoint-2" in said and "--resume" in said

    assert main(["train", "--config", str(settings), "--out", str(folder), "--resume"]) == 0
    assert last_checkpoint(folder / "checkpoints").name == "checkpoint-4"
    lines = (folder / "log.csv").read_text(encoding="utf-8").splitlines()
    assert lines[1:5] == kept
    assert list(read_log(folder)["step"]) == [0, 1, 2, 3, 4]
    assert (folder / "policy" / "model.safetensors").is_file()


def test_what_is_shown_takes_the_place_of_the_progress_bar(rows, tmp_path, capsys):
    train(tiny(max_steps=2), tmp_path, frame=rows, shown=LivePlot(tmp_path / "log.csv"))
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("step")] == [
        ["step", "1"],
        ["step", "2"],
    ]
    assert "| 2/2 [" not in err


def rerun(config: Settings, folder: Path, frame: pd.DataFrame) -> dict[str, torch.Tensor]:
    """Resume the run in the folder; return all of its weights at the end."""
    model, processor = load_policy("tiny-policy", config.load_in_4bit)
    train(config, folder, resume=True, policy=(model, processor), frame=frame)
    return weights(model)


def test_resuming_a_finished_run_trains_no_further(run, rows, tmp_path):
    folder, _, after = run
    again = Path(shutil.copytree(folder, tmp_path / "run"))
    found = rerun(tiny(), again, rows)
    assert all(torch.equal(found[name], value) for name, value in after.items())
    assert read_log(again).equals(read_log(folder))


def test_a_resumed_run_ends_where_the_uninterrupted_one_ended(run, rows, tmp_path):
    """Weights, optimizer, schedule, rows and random numbers continue from checkpoint-2."""
    folder, _, after = run
    again = Path(shutil.copytree(folder, tmp_path / "run"))
    shutil.rmtree(again / "checkpoints" / "checkpoint-3")
    (again / "policy" / CALIBRATION).touch()
    found = rerun(tiny(), again, rows)
    assert not (again / "policy" / CALIBRATION).exists()  # it was of other weights
    for name, value in after.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    columns = [name for name in LOG if name != "seconds"]
    pd.testing.assert_frame_equal(read_log(again)[columns], read_log(folder)[columns], rtol=1e-3)


def test_a_merged_adapter_scores_as_it_was_trained_and_needs_no_4_bit_layer(adapter, rows, tmp_path):
    folder, *_ = adapter
    pictures = [render(row) for _, row in rows.head(3).iterrows()]
    merged = merge_adapter(folder / "policy", tmp_path / "merged")
    model, processor = load_policy(merged)
    assert not any("lora" in name or weight.dtype == torch.uint8 for name, weight in model.named_parameters())

    def scores(policy) -> list[float]:
        return [score.score for score in Scorer(policy, thinking=True).score(pictures)]

    trained = scores(load_policy(folder / "policy", quantize=True))
    assert scores((model, processor)) == pytest.approx(trained, abs=1e-3)
    assert scores(folder / "policy") == pytest.approx(
        trained, abs=1e-3
    )  # the folder says that its base is in 4 bits
    assert scores(load_policy(folder / "policy", False)) != pytest.approx(trained, abs=1e-3), (
        "weights before rounding are others"
    )


def test_a_resumed_adapter_goes_on_as_it_was(adapter, rows, tmp_path):
    folder, model, *_ = adapter
    again = Path(shutil.copytree(folder, tmp_path / "run"))
    found = rerun(load_config(folder / "config.yaml"), again, rows)
    assert all(torch.equal(found[name], value) for name, value in weights(model).items())


def test_a_run_of_weights_alone_does_not_go_on_but_can_be_trained_from(rows, tmp_path):
    config = tiny(max_steps=2, save_steps=1, save_only_model=True)
    train(config, tmp_path, frame=rows)
    found = last_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(
        ValueError, match=f"no state of the optimizer .* model_name_or_path: {found}, and another folder"
    ):
        train(config, tmp_path, resume=True, frame=rows)
    model, _ = load_policy(found)
    saved = weights(load_policy(tmp_path / "policy")[0])
    assert all(torch.equal(saved[name], value) for name, value in weights(model).items())


# --- what cannot be trained ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grpo": {"num_generations": 1}}, "num_generations 1 is below 2"),
        ({"grpo": {"per_device_train_batch_size": 3}}, "ranking compares pictures, use at least 2"),
        ({"grpo": {"per_device_train_batch_size": 10}}, "divisible by num_generations"),
        ({"grpo": {"max_steps": 0}}, "max_steps 0 is below 1"),
        ({"grpo": {"per_device_train_batch_size": 600}}, "fewer than the 200 images of a batch"),
        ({"reward": "rank"}, "reward 'rank' is not one of ranking, threshold"),
        ({"reward_options": {"binray": True}}, "binray"),
        ({"reward_options": {"scope": "everywhere"}}, "everywhere"),
    ],
)
def test_what_cannot_rank_is_refused_before_the_policy_is_loaded(
    changes, message, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "load_policy", lambda *args: pytest.fail("the policy was loaded"))
    with pytest.raises(ValueError, match=message):
        train(tiny().changed(**changes), tmp_path, frame=rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [("sim-nothing", "unknown set 'sim-nothing'"), ("sim-unseen", "no rows with split 'train'")],
)
def test_a_set_without_training_rows_is_refused_before_the_policy_is_loaded(
    name, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "load_policy", lambda *args: pytest.fail("the policy was loaded"))
    with pytest.raises(ValueError, match=message):
        train(tiny().changed(sets=[name]), tmp_path)


def test_an_unknown_configuration_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=f"'nope'.*{', '.join(NAMES)}"):
        train("nope", "runs/nope")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace("sets:", "frozen:"),
            "mine.yaml: key 'sets' is missing; give it, or a configuration to extend",
        ),
        (lambda text: text + "\nrewrad: ranking\n", "mine.yaml: key 'rewrad' is unknown"),
        (
            lambda text: text.replace("  max_steps:", "  max_step:"),
            "mine.yaml: key 'max_step' under grpo is unknown",
        ),
        (lambda text: "", "mine.yaml: not a mapping"),
        (lambda text: "a list\n", "mine.yaml: not a mapping"),
        (lambda text: text[: text.index("\ngrpo:")] + "\ngrpo:\n", "mine.yaml: grpo None is not a mapping"),
        (lambda text: "grpo: {seed: 0", "mine.yaml: not YAML"),
    ],
)
def test_a_configuration_with_a_mistake_is_named_with_it(change, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(change((CONFIGS / "cpu.yaml").read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_config(path)


# --- rows and rewards ---------------------------------------------------------------------------


def arguments(**grpo) -> trl.GRPOConfig:
    return trl.GRPOConfig(output_dir="unused", **tiny(**grpo).grpo)


@pytest.mark.parametrize("thinking", [True, False])
def test_rows_are_in_batches_of_one_set_and_only_used_ones_are_rendered(thinking, rows, monkeypatch):
    """A picture's gray value is its row, which shows that picture and MOS belong together."""
    frame = rows.assign(dataset=["one", "two"] * (len(rows) // 2) + ["one"] * (len(rows) % 2))
    rendered = []

    def gray(part):
        rendered.extend(part.index)
        return [Image.new("RGB", (8, 8), (label,) * 3) for label in part.index]

    monkeypatch.setattr(training, "pictures_of", gray)
    dataset = training_rows(frame, arguments(max_steps=3), thinking)
    assert len(dataset) == 3 * 4  # steps x pictures
    batches = [dataset[n : n + 4] for n in range(0, 12, 4)]
    assert all(len(set(batch["dataset"])) == 1 for batch in batches)
    shown = [image.getpixel((0, 0))[0] for batch in batches for image in batch["image"]]
    assert sorted(rendered) == sorted(set(shown))
    assert [mos for batch in batches for mos in batch["mos"]] == frame["mos"].iloc[shown].tolist()
    text = batches[0]["prompt"][0][0]["content"][1]["text"]
    assert text.endswith(THINKING if thinking else NON_THINKING)


@pytest.mark.parametrize(
    ("settings", "generations"),
    [
        ({"max_steps": 3, "gradient_accumulation_steps": 2}, 3),
        ({"max_steps": 4, "num_iterations": 2}, 2),
        ({"max_steps": 3, "num_iterations": 2}, 2),  # the last one is used for one step
        ({"max_steps": 1, "steps_per_generation": 2}, 1),
        ({"max_steps": 9}, 9),  # more than the rows last: another epoch
    ],
)
def test_as_many_pictures_are_drawn_as_will_be_shown(settings, generations, rows, monkeypatch):
    monkeypatch.setattr(training, "pictures_of", lambda part: [Image.new("RGB", (8, 8))] * len(part))
    args = arguments(**settings)
    drawn = training_rows(rows, args)
    assert len(drawn) == generations * training.images_per_step(args)


def test_with_gradient_accumulation_all_images_of_the_generation_batch_are_compared(
    rows, tmp_path, monkeypatch
):
    calls = []

    class Spy(rewards.RankingReward):
        def __call__(self, *args, completions=(), mos=None, **kwargs):
            calls.append((len(completions), mos))
            return super().__call__(*args, completions=completions, mos=mos, **kwargs)

    monkeypatch.setattr(rewards, "RankingReward", Spy)
    config = tiny(
        max_steps=1, per_device_train_batch_size=6, gradient_accumulation_steps=4, save_strategy="no"
    )
    build_trainer(config, tmp_path, frame=rows).train()
    [(count, mos)] = calls
    assert count == 24 and len(set(mos)) == 8  # one call per step: 8 images x 3 answers


def test_the_setting_comparisons_says_which_sets_are_learned_from_them(rows, tmp_path):
    """The votes turn the order of the mos upside down, and so does what is rewarded."""
    path = tmp_path / "votes.csv"
    wins = np.triu(np.ones((len(rows), len(rows))), 1)  # the earlier row looked better
    saved = save_votes(rows, wins, path, scaled=False)
    place = {name: n for n, name in enumerate(names_of(saved))}
    pd.read_csv(path).assign(mos=range(len(rows))).to_csv(path, index=False)
    found = {}
    for learned in ([], [str(path)]):
        config = tiny(max_steps=2).changed(sets=[str(path)], root=str(EMBEDDED), comparisons=learned)
        trainer = build_trainer(config, tmp_path / "run")
        batch = trainer.train_dataset[:4]
        columns = {key: list(np.repeat(batch[key], 3)) for key in ("mos", "dataset", "name")}
        scores = [f"<answer>{5 - place[name] / 5:.2f}</answer>" for name in columns["name"]]
        found[bool(learned)] = trainer.reward_funcs[0](completions=scores, **columns)
    assert min(found[True]) > 1 and max(found[False]) < 0.01


def test_rows_without_mos_are_watched_by_their_share_of_wins():
    frame = pd.DataFrame({"dataset": list("aaab"), "name": list("xyzx"), "mos": [None, None, 7.0, None]})
    pairs = pd.DataFrame({"first": ["x", "x"], "second": ["y", "z"], "preference": [0.5, 1.0]})
    assert with_win_shares(frame, {"a": pairs})["mos"].iloc[:3].tolist() == [75.0, 50.0, 7.0]
    assert with_win_shares(frame, {"a": pairs})["mos"].isna().tolist() == [False] * 3 + [True]
    voted = with_win_shares(frame, {"a": pairs.assign(votes=[3, 1])})
    assert voted["mos"].iloc[:2].tolist() == [75.0, 50.0]  # each pair counts once, as in the reward


# --- the libraries ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_configuration_is_one_of_trls(name):
    known = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    config = load_config(name)
    assert set(config.grpo) <= known and config.grpo["max_steps"] > 0


@pytest.mark.parametrize("called", ["GRPOTrainer", "GRPOConfig"])
def test_every_keyword_given_to_trl_exists(called):
    tree = ast.parse(Path(training.__file__).read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == called
    ]
    given = {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}
    assert given and given <= set(inspect.signature(getattr(trl, called)).parameters)


def test_nobody_is_told_that_a_training_starts(rows, tmp_path, monkeypatch):
    """Telemetry is off while a trainer is built, even where no environment variable says so."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    seen = []

    class Watched(trl.GRPOTrainer):
        def __init__(self, *args, **kwargs):
            seen.append(constants.HF_HUB_DISABLE_TELEMETRY)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(training, "GRPOTrainer", Watched)
    build_trainer(tiny(), tmp_path, frame=rows)
    assert seen == [True] and not constants.HF_HUB_DISABLE_TELEMETRY


# --- two processes ------------------------------------------------------------------------------


def test_a_step_on_two_processes_ends_with_equal_weights(tmp_path, started):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, __file__, str(tmp_path)]
    process = started(command, env=environment)
    said = process.communicate()[1]
    assert process.returncode == 0, said[-3000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert one["world"] == two["world"] == 2
    assert one["before"] == two["before"] and one["after"] == two["after"] != one["before"]
    assert (
        one["compared"] == two["compared"] == [[6, 6]] * 3
    )  # a call per step; each knows both processes' completions
    assert one["sets"] == two["sets"] and sorted(one["sets"]) == [
        ["one"],
        ["two"],
        ["two"],
    ]  # one data set per comparison
    assert list(read_log(tmp_path / "run")["step"]) == [0, 1, 2, 3]
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()


def worker(folder: Path) -> None:
    import torch.distributed as dist
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    compared, sets = [], []

    class Spy(rewards.RankingReward):
        def _rewards(self, everyone, log_metric=None):
            compared.append([len(columns[0]) for columns in everyone])
            sets.append(sorted({name for columns in everyone for name in columns[2]}))
            return super()._rewards(everyone, log_metric)

    def digest(model) -> str:
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in weights(model).values())).hexdigest()

    rewards.RankingReward = Spy
    model, processor = load_policy()
    found = {"world": dist.get_world_size(), "before": digest(model)}
    config = tiny(max_steps=3, per_device_train_batch_size=6).changed(reward_options={"scope": "global"})
    frame = some_rows().head(12)
    train(
        config,
        folder / "run",
        policy=(model, processor),
        frame=frame.assign(dataset=["one", "two", "two"] * 4),
    )
    found |= {"after": digest(model), "compared": compared, "sets": sets}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


# --- sets of one's own ------------------------------------------------------------------------


def own_set(folder: Path, train: int, mos: bool = True, dataset: str = "mine") -> str:
    """Write a manifest with some train rows, two val and two test rows, and comparisons of neighbours."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["train"] * train + ["val"] * 2 + ["test"] * 2
    names = [f"{n}.png" for n in range(len(parts))]
    for n, name in enumerate(names):
        Image.effect_noise((64, 64), 4 * n + 5).convert("RGB").save(folder / name)
    rows = {"image": names, "dataset": dataset, "mos": range(len(parts)) if mos else "", "split": parts}
    pd.DataFrame(rows).to_csv(folder / "mine.csv", index=False)
    pairs = {"first": names, "second": names[1:] + names[:1], "preference": 0.75}
    pd.DataFrame(pairs).to_csv(folder / "mine-comparisons.csv", index=False)
    return str(folder / "mine.csv")


def sizes(settings: Settings) -> tuple[int, ...]:
    """Return images of a generation, answers of a pass, passes of a generation and of a step, and steps."""
    grpo = settings.grpo
    batch, passes = grpo["per_device_train_batch_size"], grpo["steps_per_generation"]
    return (
        batch * passes // grpo["num_generations"],
        batch,
        passes,
        grpo["gradient_accumulation_steps"],
        grpo["max_steps"],
    )


@pytest.mark.parametrize(
    ("name", "train", "expected"),
    [
        ("cpu", 2, (2, 12, 1, 1, 30)),
        ("cpu", 7, (4, 24, 1, 1, 53)),
        ("cpu", 8, (8, 48, 1, 1, 30)),
        ("cpu", 16, (16, 96, 1, 1, 30)),
        ("cpu", 130, (16, 96, 1, 1, 200)),
        ("t4-3b", 7, (4, 2, 12, 12, 53)),
        ("l4-7b", 7, (4, 6, 4, 4, 53)),
        ("a100-7b", 9, (8, 12, 4, 4, 34)),
        ("kadid-7b-qlora", 7, (4, 6, 4, 64, 4)),  # 16 generations a step
    ],
)
def test_batch_and_steps_fit_a_small_set(name, train, expected, tmp_path):
    """Each picture is looked at some 30 times, and every group of answers stays whole."""
    assert sizes(fitted(load_config(name, sets=[own_set(tmp_path, train)]))) == expected


def test_a_fitted_configuration_of_the_smallest_set_trains(tmp_path):
    sets = [own_set(tmp_path / "a", 3, dataset="a"), own_set(tmp_path / "b", 9, dataset="b")]
    settings = fitted(load_config("cpu", sets=sets, grpo={"max_steps": 2, "num_generations": 3}))
    assert sizes(settings) == (2, 6, 1, 1, 2)
    folder = train(settings, tmp_path / "run")
    assert json.loads((folder / "vqr1.json").read_text()) == {"thinking": True, "picture_number": False}
    assert Scorer(folder).thinking and not Scorer(folder).numbered


def test_a_manifest_with_comparisons_beside_it_is_learned_from_these(tmp_path):
    """Whether it has a mos or not, as votes with a scale have; without comparisons, the mos teaches."""
    scaled = own_set(tmp_path / "a", 4, dataset="a")
    compared = own_set(tmp_path / "b", 4, mos=False, dataset="b")
    rated = own_set(tmp_path / "c", 4, dataset="c")
    (tmp_path / "c" / "mine-comparisons.csv").unlink()
    settings = fitted(load_config("cpu", sets=[scaled, compared, rated, "sim-five"]))
    assert settings.comparisons == [scaled, compared]


def test_rows_that_no_other_train_row_was_compared_with_are_left_out(tmp_path):
    """Of five train rows, 3 was compared with a val picture alone, and 4 with a test picture."""
    path = own_set(tmp_path, 5, mos=False)
    sides = {"first": [0, 2, 3, 4], "second": [1, 1, 5, 7]}
    pairs = pd.DataFrame(sides).map("{}.png".format).assign(preference=1.0)
    pairs.to_csv(comparisons_path(path), index=False)
    settings = fitted(load_config("cpu", sets=[path], grpo={"max_steps": 1}))
    assert sizes(settings)[0] == 2  # the largest power of two that three rows fill
    args, rows = grpo_config(settings.grpo, tmp_path), set_rows([path], None, "train")
    with pytest.warns(UserWarning, match="2 of 5 train rows are left out: nobody compared them"):
        chosen = training_rows(rows, args, comparisons={"mine": pairs})
    assert set(chosen["name"]) <= {"0.png", "1.png", "2.png"}
    for own, given, message in (
        (rows, {"mine": pairs.iloc[:3]}, "'4.png' is in no comparison of 'mine'"),
        (rows.iloc[3:], {"mine": pairs}, "'mine': no two of its 2 train rows were compared"),
        (rows, {"my-vote": pairs}, "comparisons of 'my-vote', and no rows of it; the rows are of mine"),
    ):
        with pytest.raises(ValueError, match=message):
            training_rows(own.reset_index(drop=True), args, comparisons=given)


def test_sets_that_cannot_be_compared_are_refused(tmp_path):
    same = [own_set(tmp_path / "a", 4), own_set(tmp_path / "b", 4)]
    with pytest.raises(ValueError, match="two sets are called 'mine'; rename one of them"):
        fitted(load_config("cpu", sets=same))
    with pytest.raises(ValueError, match="'mine' has 1 row with split 'train'"):
        fitted(load_config("cpu", sets=[own_set(tmp_path / "c", 1)]))
    with pytest.raises(ValueError, match=r"mine.csv' has no rows with split 'train'; .* `vqr1 manifest`"):
        fitted(load_config("cpu", sets=[own_set(tmp_path / "d", 0)]))


@pytest.mark.parametrize("use_peft", [True, False])
def test_what_is_saved_keeps_the_prompt_and_so_does_what_is_merged(use_peft, rows, tmp_path):
    config = tiny(max_steps=1, save_steps=1).changed(use_peft=use_peft, thinking=False, picture_number=True)
    folder = train(config, tmp_path, frame=rows)
    kept = {"thinking": False, "picture_number": True}
    for saved in (folder, last_checkpoint(tmp_path / "checkpoints")):
        assert json.loads((saved / "vqr1.json").read_text()) == kept
    assert load_policy(folder).prompt == kept
    for policy in (folder, str(folder), load_policy(folder)):
        asked, told = Scorer(policy), Scorer(policy, thinking=True, numbered=False)
        assert (asked.thinking, asked.numbered) == (False, True)
        assert (told.thinking, told.numbered) == (True, False)
    assert not Scorer(tuple(load_policy(folder))).numbered  # a pair of one's own says nothing
    if use_peft:
        merged = merge_adapter(folder, tmp_path / "merged")
        assert load_policy(merged).prompt == kept


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
