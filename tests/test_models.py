"""Tiny random models of the real classes are loaded, trained (QLoRA, GRPO), saved and scored.

The configurations of the real models are checked too.
"""

import ast
import importlib.util
import inspect
import json
import re
import shutil
import types
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pandas as pd
import pytest
import torch
import trl
import yaml
from peft import PeftModel, get_peft_model
from PIL import Image
from test_environment import MODULES
from test_sharing import assert_same_gradients, learned
from torch.testing import assert_close
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vqr1 import policy, training
from vqr1.cards import model_card
from vqr1.config import CONFIGS, Settings, config_for_device, load_config, write_yaml
from vqr1.data.manifests import MANIFEST_COLUMNS, load_ratings
from vqr1.engines import transformers as engines
from vqr1.engines.answers import ANSWERS, OPEN
from vqr1.engines.transformers import Reached
from vqr1.experiments import memory
from vqr1.experiments.memory import memory_by_part, qwen_config
from vqr1.experiments.tiny import CHAT_TEMPLATE, SPECIAL
from vqr1.places import EMBEDDED
from vqr1.policy import PictureProcessor, base_of, load_policy, lora_config
from vqr1.prompts import messages
from vqr1.rewards import reward_functions
from vqr1.sharing import look_once, prompt_once
from vqr1.training import adapter_of, build_trainer, grpo_config, set_rows, train

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
REAL = [name for name in NAMES if load_config(name).model_name_or_path != "tiny-policy"]
TEXT = dict(
    vocab_size=640,
    hidden_size=256,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
    initializer_range=0.1,
)
"""Sizes are multiples of 64, which 4-bit layers need on CPUs."""


def qwen2_5(**ids):
    """Return published Qwen2.5-VL in small: windows and full attention, patches of 14, two frames."""
    config = qwen_config("3B")
    for key, value in TEXT.items():
        setattr(config.text_config, key, value)
    config.text_config.layer_types = ["full_attention"] * 3
    config.text_config.max_window_layers = 3
    for key, value in dict(
        hidden_size=64,
        intermediate_size=128,
        depth=2,
        num_heads=2,
        out_hidden_size=256,
        fullatt_block_indexes=[1],
    ).items():
        setattr(config.vision_config, key, value)
    for key, value in ids.items():
        setattr(config, key, value)
    return Qwen2_5_VLForConditionalGeneration(config), 14


def qwen3(**ids):
    """Return published Qwen3-VL in small: DeepStack from two layers, interleaved M-RoPE."""
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    config = Qwen3VLConfig(
        text_config=TEXT | dict(head_dim=128, rope_parameters=rope),
        vision_config=dict(
            depth=3,
            hidden_size=64,
            intermediate_size=128,
            num_heads=2,
            out_hidden_size=256,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        tie_word_embeddings=True,
        **ids,
    )
    return Qwen3VLForConditionalGeneration(config), 16


@pytest.fixture(scope="module", params=[qwen2_5, qwen3], ids=lambda build: build.__name__)
def folder(request, untrained, tmp_path_factory) -> Path:
    """Save a tiny model of the class with the embedded tokenizer; return its folder."""
    tokenizer = untrained[1].tokenizer
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL))))
    torch.manual_seed(0)
    model, patch = request.param(
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]
    )
    pictures = Qwen2VLImageProcessorPil(
        patch_size=patch,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 3136, "longest_edge": 12_845_056},
    )
    path = tmp_path_factory.mktemp(request.param.__name__)
    model.save_pretrained(path)
    PictureProcessor(pictures, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(path)
    return path


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in ((64, 64), (96, 128), (130, 60))
    ]


def asked(processor, images: list[Image.Image], start: str = "", **prompt) -> dict:
    text = (
        processor.apply_chat_template(messages(**prompt), add_generation_prompt=True, tokenize=False) + start
    )
    return processor(text=[text] * len(images), images=images, padding=True, return_tensors="pt")


def small(**grpo) -> Settings:
    """Return kadid-7b-qlora with 2 images x 3 completions of 6 tokens, on a CPU."""
    grpo = {
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "num_generations": 3,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
    } | grpo
    return load_config("kadid-7b-qlora").changed(
        sets=["sim-kadid"],
        validation={"rows": 2, "every": 9},
        min_pixels=3136,
        max_pixels=16_384,
        grpo=grpo,
    )


def length_reward(completions, **kwargs) -> list[float]:
    """Reward what a policy with random weights can earn."""
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def weights(model) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Return (output folder, model after, weights before) of two GRPO steps.

    The model is 4-bit, with an adapter, numbered prompts and a KL term.
    """
    output = tmp_path_factory.mktemp("trained")
    config = small().changed(model_name_or_path=str(folder), picture_number=True)
    model, processor = load_policy(folder, quantize=True, pixels=config.pixels)
    before = weights(model)
    rows = load_ratings("sim-kadid").query("split == 'train'").iloc[::900].reset_index(drop=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "reward_functions", lambda *args: [length_reward])
        train(config, output, policy=(model, processor), frame=rows)
    return output, model, before


# --- loading ------------------------------------------------------------------------------------


def test_the_class_is_the_published_one_and_needs_no_torchvision(folder):
    model, processor = load_policy(folder)
    assert model.config.model_type in ("qwen2_5_vl", "qwen3_vl") and model.config.model_type.replace(
        "_", ""
    ) in str(type(model)).lower().replace("_", "")
    assert type(processor) is PictureProcessor and processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("side", [500, 1000])
def test_pixel_limits_hold_and_are_saved(folder, side, tmp_path):
    _, processor = load_policy(folder, pixels=[3136, 40_000])
    processor.save_pretrained(tmp_path)
    for each in (processor, policy.load_processor(str(tmp_path), "qwen2_5_vl")):
        patches = each.image_processor(images=[Image.new("RGB", (side, side))])["image_grid_thw"][0].prod()
        assert 0.8 * 40_000 < patches * each.image_processor.patch_size**2 <= 40_000


@pytest.mark.parametrize("name", ["runs/nope", "Qwen/Qwen2.5-VL-0B-Instruct"])
def test_a_name_that_is_nothing_says_so(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}: no such folder"):
        load_policy(name)
    (tmp_path / name).parent.mkdir()
    with pytest.raises(FileNotFoundError, match=f"{name}: no such folder; give"):  # the hub is not asked
        load_policy(name)


def test_weights_in_a_format_that_can_run_code_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for file in folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "processor_config.json").write_bytes((folder / "processor_config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_policy(tmp_path)


def test_an_adapter_in_a_format_that_can_run_code_is_refused(folder, tmp_path):
    settings = {"base_model_name_or_path": str(folder), "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors"):
        load_policy(tmp_path)


def test_code_that_comes_with_weights_is_not_run(tmp_path):
    (tmp_path / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n", encoding="utf-8"
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_policy(tmp_path)
    assert not (tmp_path / "ran").exists()


# --- QLoRA and GRPO -----------------------------------------------------------------------------


def test_every_lora_weight_moves_and_no_frozen_one(trained):
    _, model, before = trained
    after = weights(model)
    fresh = {name: value for name, value in after.items() if ".lora_" in name}
    assert len(fresh) == 2 * 7 * 3 and all(".language_model." in name for name in fresh)
    assert all(
        value.dtype == torch.float32 and value.abs().max() > 0
        for name, value in fresh.items()
        if ".lora_B." in name
    )
    assert after.keys() - fresh.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name for name, value in before.items() if value.dtype == torch.uint8} == {
        name for name in before if re.search(r"language_model\.layers\..*_proj\.weight$", name)
    }


def test_every_lora_weight_gets_a_gradient_and_the_frozen_tower_none(folder, tmp_path, monkeypatch):
    """Gradient checkpointing is on, as in all configurations for a GPU."""
    monkeypatch.setattr(training, "reward_functions", lambda *args: [length_reward])
    rows = load_ratings("sim-kadid").query("split == 'train'").iloc[::900].reset_index(drop=True)
    config = small(max_steps=1).changed(model_name_or_path=str(folder), load_in_4bit=False)
    trainer = build_trainer(config, tmp_path, frame=rows)
    assert trainer.args.gradient_checkpointing
    for name, weight in trainer.model.named_parameters():
        if ".lora_B." in name:  # zeros, as they start, hide lora_A's gradient
            torch.nn.init.normal_(weight, std=0.1)
    inner, seen, before = trainer.model.get_base_model().model, [], weights(trainer.model)
    inner.visual.merger.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    trainer.train()
    assert seen and not any(seen)
    assert not inner.visual.patch_embed._forward_hooks
    after = weights(trainer.model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if ".lora_" in name
    }


def test_mixed_precision_keeps_the_adapter_in_fp32(folder, tmp_path, monkeypatch):
    """Validation, which the trainer's autocast does not wrap, runs on its weights too."""
    monkeypatch.setattr(training, "reward_functions", lambda *args: [length_reward])
    rows = load_ratings("sim-kadid").query("split == 'train'").iloc[::900].reset_index(drop=True)
    config = small(max_steps=1, bf16=True).changed(model_name_or_path=str(folder), dtype="bfloat16")
    seen = []
    monkeypatch.setattr(training, "build_trainer", lambda *args: seen.append(build_trainer(*args)) or seen[0])
    train(config, tmp_path, frame=rows)
    [trainer] = seen
    dtypes = {(".lora_" in name, weight.dtype) for name, weight in trainer.model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16), (False, torch.uint8)}
    assert all(
        weight.isfinite().all() for name, weight in trainer.model.named_parameters() if ".lora_" in name
    )
    assert any(
        weight.abs().max() > 0 for name, weight in trainer.model.named_parameters() if ".lora_B." in name
    )


@pytest.mark.parametrize("share", [False, True])
def test_on_a_t4_only_4_bit_layers_compute_in_half_precision(folder, tmp_path, monkeypatch, share):
    """Where prompts are not shared, the tower runs in the log-probabilities' pass too.

    A CPU answers "which dtype" as a T4 does. Accelerate has autocast to fp16 for GPUs alone: here it is
    prepared for bf16.
    """
    monkeypatch.setattr(policy, "default_dtype", lambda: torch.float16)
    monkeypatch.setattr(training, "reward_functions", lambda *args: [length_reward])

    def on_a_t4(grpo, output):
        args = grpo_config(grpo, output)
        args.fp16 = True
        return args

    monkeypatch.setattr(training, "grpo_config", on_a_t4)
    t4, rows = load_config("t4-3b"), load_ratings("sim-kadid").query("split == 'train'").iloc[::900]
    config = small(max_steps=1, bf16=True).changed(
        model_name_or_path=str(folder), dtype=t4.dtype, load_in_4bit=t4.load_in_4bit, share_prompts=share
    )
    assert t4.grpo["fp16"] and t4.share_prompts
    trainer = build_trainer(config, tmp_path, frame=rows.reset_index(drop=True))
    kinds = {(".visual." in name, weight.dtype) for name, weight in trainer.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.float32), (False, torch.uint8)}
    computed = set()

    def note(name, module, tensors):
        part = "visual" if ".visual." in name else type(module).__name__
        computed.update(
            (part, one.dtype) for one in tensors if torch.is_tensor(one) and one.is_floating_point()
        )

    for name, module in trainer.model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, args, out, name=name: note(name, m, (*args, out)))
    trainer.train()
    assert ("visual", torch.float32) in computed and ("Linear4bit", torch.float32) in computed
    assert {dtype for _, dtype in computed} == {torch.float32}
    layers = [m for m in trainer.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {torch.float16}


def test_saved_reloaded_and_merged_it_computes_the_same(trained, tmp_path):
    output, model, _ = trained
    four_bit, processor = load_policy(output / "policy")
    inputs = asked(processor, pictures())
    plain, _ = load_policy(output / "policy", quantize=False)
    with torch.no_grad():
        assert_close(four_bit.eval()(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=1e-4)
        with plain.eval().disable_adapter():
            base = plain(**inputs).logits
        expected = plain(**inputs).logits
        assert (expected - base).abs().max() > 0.1, "the adapter does something"
        merged = plain.merge_and_unload()
        assert not isinstance(merged, PeftModel)
        assert_close(merged(**inputs).logits, expected, rtol=0, atol=1e-3)
        merged.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        again, _ = load_policy(tmp_path)
        assert_close(again.eval()(**inputs).logits, expected, rtol=0, atol=1e-3)


def test_a_trained_folder_says_how_it_was_trained_and_is_loaded_so(trained, tmp_path, caplog):
    """Loaded by its path, it scores as trained; on the full-precision base it says that it does not."""

    def said():
        return [record.getMessage() for record in caplog.records if record.name == "vqr1.policy"]

    output, model, _ = trained
    folder = output / "policy"
    assert json.loads((folder / policy.BASE).read_text())["quantize"] is True
    _, processor = load_policy(folder)
    inputs = asked(processor, pictures())
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        assert_close(load_policy(folder)[0].eval()(**inputs).logits, expected, rtol=0, atol=1e-4)
        merged = load_policy(policy.merge_adapter(folder, tmp_path / "merged"))[
            0
        ]  # what it was trained on, by default
        assert_close(merged.eval()(**inputs).logits, expected, rtol=0, atol=1e-3)
        assert not said()
        other = load_policy(folder, quantize=False)[0]
        assert (other.eval()(**inputs).logits - expected).abs().max() > 0.05
    assert "was trained on a base in 4 bits and is loaded on one in full" in said()[-1]
    shutil.copytree(folder, tmp_path / "older")
    (tmp_path / "older" / policy.BASE).unlink()
    with torch.no_grad():
        assert_close(load_policy(tmp_path / "older")[0].eval()(**inputs).logits, other(**inputs).logits)
    assert f"{tmp_path / 'older'} does not say" in said()[-1] and len(said()) == 2


def test_an_adapter_in_the_vision_tower_is_trained_on_request(folder):
    model, processor = load_policy(folder)
    model = get_peft_model(model, lora_config(4, 8, vision=True))
    look_once(model)
    inputs = asked(processor, pictures())
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if ".lora_B." in name}
    blocks = [name for name in grads if ".visual.blocks." in name]
    linears = [
        name
        for name, m in model.get_base_model().model.visual.blocks.named_modules()
        if hasattr(m, "base_layer")
    ]
    assert len(blocks) == len(linears) >= 2 * 4 and len(grads) == len(blocks) + 7 * 3
    assert all(grad.abs().max() > 0 for grad in grads.values())


# --- scoring ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("answer", ["3.25", "1.07", "5.90"])
def test_the_answers_probabilities_are_those_of_writing_them_out(folder, answer):
    """The tree of 133 prefixes under a 4-D mask equals one forward per answer (3-D positions, DeepStack)."""
    model, processor = load_policy(folder)
    engine = engines.load((model.eval(), processor))
    prepared = [engine.prepare(picture).picture for picture in pictures()]
    prefilled = engine._prefill(prepared, engine._prompt(messages(False, numbered=True), OPEN))
    last = torch.full((3,), prefilled.ids.shape[1] - 1)
    reached = Reached(prefilled.ids, prefilled.mask, last, prefilled.cache)
    found = engine._answers(reached)[:, 0, ANSWERS.index(answer)]
    whole = asked(processor, pictures(), f"<answer>{answer}", thinking=False, numbered=True)
    logp = model(**whole).logits.log_softmax(-1)
    expected = sum(
        logp[:, -i - 1].gather(1, whole["input_ids"][:, -i, None])[:, 0] for i in range(1, 5)
    ).exp()
    assert_close(found, expected.double(), rtol=1e-3, atol=0)


@torch.no_grad()
def test_repeated_pictures_are_seen_once_with_the_same_answers(folder):
    model, processor = load_policy(folder)
    a, b, c = pictures()
    inputs = asked(processor, [a, b, a, c, b])
    expected, calls = model.eval().requires_grad_(False)(**inputs).logits, []
    model.model.visual.merger.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    look_once(model)
    tokens = (inputs["image_grid_thw"].prod(1) // 4).tolist()
    assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert calls == [tokens[0] + tokens[1] + tokens[3]]


# --- configurations -----------------------------------------------------------------------------


def on_cpu(name: str) -> Settings:
    return load_config(name).changed(grpo={"use_cpu": True, "bf16": False, "fp16": False})


@pytest.mark.parametrize("name", REAL)
def test_a_configuration_is_valid_for_the_installed_trl(name, tmp_path):
    config = on_cpu(name)
    args = grpo_config(config.grpo, tmp_path)
    assert isinstance(args, trl.GRPOConfig) and args.max_completion_length == 256
    assert args.per_device_train_batch_size * args.steps_per_generation % args.num_generations == 0, (
        "a group would be split between GPUs"
    )
    assert training.images_per_step(args) in (8, 16)
    assert args.gradient_accumulation_steps % args.steps_per_generation == 0
    rewards = reward_functions(config.reward, args.num_generations, config.thinking, config.reward_options)
    assert [reward.__name__ for reward in rewards] == ["ranking", "format_reward"]
    assert adapter_of(config) is None if name == "paper-7b-full" else adapter_of(config).r == 16
    assert load_config(name).grpo["bf16"] != load_config(name).grpo.get("fp16", False)


@pytest.mark.parametrize(
    ("name", "gib"), [("t4-3b", 14.5), ("l4-7b", 22), ("kadid-7b-qlora", 22), ("a100-7b", 39)]
)
def test_a_configuration_fits_its_gpu_as_far_as_computed(name, gib, tmp_path):
    config, args = load_config(name), grpo_config(on_cpu(name).grpo, tmp_path)
    size = re.search(r"-(\dB)-", config.model_name_or_path).group(1)
    parts = memory_by_part(
        qwen_config(size),
        config.load_in_4bit,
        config.lora_r,
        training.images_per_step(args),
        args.num_generations,
        args.max_completion_length,
        args.per_device_train_batch_size,
        dtype=getattr(torch, config.dtype or "bfloat16"),
    )
    assert parts["peak"] + memory.RESERVED < gib


def test_four_bit_takes_what_is_computed(folder):
    model, _ = load_policy(folder, quantize=True)
    layers = [p for p in model.parameters() if p.dtype == torch.uint8]
    states = [p.quant_state for p in layers]
    taken = sum(
        p.numel() + s.absmax.numel() * s.absmax.element_size() + s.state2.absmax.numel() * 4
        for p, s in zip(layers, states)
    )
    rest = sum(
        p.numel()
        for name, p in model.model.language_model.layers.named_parameters()
        if p.dtype != torch.uint8
    )
    computed = memory_by_part(model.config, lora=4)["language model"] * 2**30
    norm = model.model.language_model.norm.weight.numel()
    assert taken + (rest + norm) * (1 / 2 + 1 / 64) == pytest.approx(computed, rel=0.01)


def test_sizes_are_the_published_ones():
    """Qwen2.5-VL-7B has 8.29 billion parameters (the paper's Table 5), 3B 3.75."""
    totals = [sum(memory._parameters(qwen_config(size))[0].values()) / 1e9 for size in ("3B", "7B")]
    assert totals == pytest.approx([3.755, 8.292], abs=0.001)


@pytest.mark.parametrize(
    ("gib", "name"),
    [(8, "cpu"), (14.6, "t4-3b"), (15.8, "t4-3b"), (22.2, "l4-7b"), (39.4, "a100-7b"), (79.1, "a100-7b")],
)
def test_the_configuration_for_a_gpu_goes_by_its_memory(gib, name, monkeypatch):
    assert config_for_device() == "cpu" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=gib * 2**30)
    )
    assert config_for_device() == name and name in NAMES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", REAL)
def test_a_configuration_for_a_gpu_says_so_where_there_is_none(name, tmp_path):
    with pytest.raises(ValueError, match="for a GPU, and torch sees none"):
        train(load_config(name), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": "int4"}, "dtype 'int4'"), ({"lora_rank": 4}, "key 'lora_rank' is unknown")],
)
def test_a_wrong_setting_is_named(change, message, tmp_path):
    path = tmp_path / "mine.yaml"
    write_yaml(path, {"extends": "l4-7b", "sets": ["sim-kadid"]} | change)
    with pytest.raises(ValueError, match=message):
        build_trainer(load_config(path), tmp_path)


def test_sets_in_several_folders_are_trained_on_together(tmp_path):
    for name, gray in (("one", 10), ("two", 200)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), (gray,) * 3).save(tmp_path / name / "a.png")
        row = {"image": "a.png", "dataset": name, "mos": 3, "split": "train"}
        pd.DataFrame([row], columns=MANIFEST_COLUMNS).to_csv(tmp_path / name / "rows.csv", index=False)
    sets = [str(tmp_path / name / "rows.csv") for name in ("one", "two")]
    frame = set_rows(sets, None, "train")
    assert [image.getpixel((0, 0))[0] for image in training.pictures_of(frame)] == [10, 200]
    (tmp_path / "two" / "a.png").rename(tmp_path / "b.png")
    with pytest.raises(ValueError, match="a.png"):
        set_rows(sets, None, "train")


def test_logs_go_where_the_configuration_says(tmp_path):
    pytest.importorskip("tensorboard", reason="logging to it is optional")
    short = {"per_device_train_batch_size": 12, "max_steps": 1, "save_strategy": "no", "logging_steps": 1}
    config = load_config("cpu").changed(grpo=short | {"report_to": "tensorboard"})
    build_trainer(config, tmp_path, frame=load_ratings("sim-kadid").query("split == 'train'").head(4)).train()
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_the_prompt_with_the_pictures_number_is_the_official_inferences(untrained):
    render = untrained[1].apply_chat_template
    assert render(messages(numbered=True), tokenize=False) == render(
        messages(), tokenize=False, add_vision_id=True
    )
    assert "Picture" not in render(messages(), tokenize=False)


# --- the model card -----------------------------------------------------------------------------


def test_the_card_says_data_settings_results_and_limits(trained):
    output, *_ = trained
    card = (output / "policy" / "README.md").read_text(encoding="utf-8")
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "peft" and "base_model" not in yaml.safe_load(header)
    for part in (
        "`sim-kadid`",
        "simulated observers",
        "thinking prompt",
        "learning_rate: 0.01",
        f"trl {trl.__version__}",
        "## Limits",
    ):
        assert part in body


def test_the_card_gives_first_and_last_validation():
    log = pd.DataFrame(
        {"step": [0, 1, 2, 3], "val_srcc": [0.5, None, 0.6, 0.7123], "val_plcc": [0.4, None, 0.5, 0.6]}
    )
    card = model_card(load_config("cpu"), log, "a machine")
    assert "| 0 | 0.500 | 0.400 |\n| 3 | 0.712 | 0.600 |\n\n## Limits" in card and "190 rows" in card


def test_a_card_names_a_base_of_the_hub_and_only_simulated_sets_simulated():
    card = model_card(
        load_config("paper-7b-full"),
        pd.DataFrame({"step": [0], "val_srcc": [None], "val_plcc": [None]}),
        "a machine",
    )
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == "Qwen/Qwen2.5-VL-7B-Instruct" and header["library_name"] == "transformers"
    assert "No validation gave an SRCC" in card and "simulated" not in card


def test_a_card_names_the_sets_that_were_learned_from_comparisons():
    log = pd.DataFrame({"step": [0], "val_srcc": [None], "val_plcc": [None]})
    config = load_config("cpu").changed(sets=["sim-kadid", "pcuid"], comparisons=["pcuid"])
    said = "Of `pcuid` it learned from comparisons of pairs, not from MOS."
    assert said in model_card(config, log, "a machine")
    assert "not from MOS" not in model_card(load_config("cpu"), log, "a machine")


def learner(folder, trained: str, checkpointing: bool):
    """Return a model as TRL prepares it for log-probabilities, with an adapter that is not zero."""
    model, _ = load_policy(folder, quantize=trained == "adapter on 4 bits")
    trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    torch.manual_seed(0)
    if trained != "all weights":
        model = get_peft_model(model, lora_config())
        training.freeze(model, ["visual"])
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    if checkpointing:
        base_of(model).gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


@pytest.mark.parametrize(
    ("share", "trained", "checkpointing"),
    [
        (look_once, "adapter", False),
        (prompt_once, "adapter", False),
        (prompt_once, "adapter", True),
        (prompt_once, "adapter on 4 bits", True),
        (prompt_once, "all weights", True),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_sharing_keeps_log_probabilities_and_gradients(folder, share, trained, checkpointing):
    """It holds for both classes; tests/test_sharing.py has the embedded policy."""
    found, processor = [], load_policy(folder)[1]
    batch = asked(processor, [picture for picture in pictures() for _ in range(2)])
    mask = (torch.arange(4) < torch.tensor([4, 1, 3, 2, 4, 4])[:, None]).long()
    for shared in (False, True):
        model = learner(folder, trained, checkpointing)
        if shared:
            share(model)
        rows = torch.tensor([3, 0, 5, 1, 4])  # one prompt has one answer
        found.append(learned(model, batch, torch.arange(20, 44).view(6, 4), mask, rows))
    (stock, _, gradient), (shared, _, same) = found
    assert_close(shared, stock, rtol=0, atol=1e-5)
    assert any(".visual." in name for name in same) == (trained == "all weights")
    assert_same_gradients(same, gradient)


# --- the benchmark ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("gpu", Path(__file__).parent / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_runs_in_small_on_a_cpu(benchmark, tmp_path):
    row = benchmark.one_row("tiny", None, tmp_path)
    assert row["fits"] and row["how"] == "tiny" and set(row) <= set(benchmark.COLUMNS)
    parts = [row[part] for part in ("rollout_s", "reward_s", "update_s")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(row["step_s"])
    assert min(row["tokens_per_s"], row["images_per_s"], row["images_per_s_thinking"]) > 0


def test_the_committed_computed_memory_is_what_is_computed(benchmark):
    committed = pd.read_csv(EMBEDDED / "runs" / "gpu-computed.csv", comment="#")
    assert set(committed["how"]) == {"computed"}
    rows, _ = benchmark.computed()
    assert committed["peak_gib"].tolist() == pytest.approx([row["peak_gib"] for row in rows], rel=1e-3)
    page = (CONFIGS / "README.md").read_text(encoding="utf-8")
    for name, peak in committed.set_index("size")["peak_gib"].items():
        assert f"{peak:.1f} GiB" in page, name


def test_a_random_policy_for_the_benchmark_is_built_as_load_policy_builds_one(benchmark, folder):
    made, _ = benchmark.random_policy(benchmark.tiny_config(), torch.device("cpu"), torch.float32)
    assert made.is_loaded_in_4bit and made.config.quantization_config.bnb_4bit_use_double_quant
    kinds = {re.sub(r"\d+", "N", name): p.dtype for name, p in made.named_parameters()}
    loaded, _ = load_policy(folder, quantize=True)
    if loaded.config.model_type == "qwen2_5_vl":
        assert kinds == {re.sub(r"\d+", "N", name): p.dtype for name, p in loaded.named_parameters()}
    rope = made.model.language_model.rotary_emb.inv_freq
    assert_close(rope, 1e6 ** -(torch.arange(0, 128, 2) / 128))


# --- the libraries ------------------------------------------------------------------------------

LIBRARIES = ("trl", "transformers", "peft", "bitsandbytes", "accelerate")


def names_in(module: str, tree: ast.Module) -> dict:
    """Return a module's names and those that its functions import from the libraries."""
    names = dict(vars(importlib.import_module(module)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in LIBRARIES:
            exec(ast.unparse(node), names)
    return names


def library_calls() -> list:
    """List (file, line, callable, keyword) for every keyword passed to the libraries."""
    found = []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = names_in(name, tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.keywords:
                try:
                    called = eval(ast.unparse(node.func), names)
                except (NameError, AttributeError, TypeError, SyntaxError, RuntimeError):
                    continue  # a method of a local object, or of super()
                if str(getattr(called, "__module__", "")).partition(".")[0] in LIBRARIES:
                    given = [keyword.arg for keyword in node.keywords if keyword.arg]
                    found += [(path.name, node.lineno, called, keyword) for keyword in given]
    return found


def accepts(called, keyword: str) -> bool:
    """Check the signature; where it ends in **kwargs, check for the name in the code behind it."""
    parameters = inspect.signature(called).parameters
    if keyword in parameters or called is GenerationConfig and hasattr(GenerationConfig(), keyword):
        return True
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return False
    if "AutoModel" in str(getattr(called, "__self__", "")):
        called = PreTrainedModel.from_pretrained  # what it hands its arguments to
    owner = called if inspect.isclass(called) else getattr(called, "__self__", None) or called
    sources = [
        inspect.getsource(c)
        for c in getattr(owner, "__mro__", [owner])
        if c.__module__.partition(".")[0] in LIBRARIES
    ]
    return any(re.search(rf"\b{keyword}\b", source) for source in sources)


def test_every_keyword_given_to_a_library_exists():
    calls = library_calls()
    assert {"GRPOConfig", "GRPOTrainer", "LoraConfig", "BitsAndBytesConfig", "GenerationConfig"} <= {
        called.__name__ for _, _, called, _ in calls
    }
    assert {
        "dtype",
        "device_map",
        "use_safetensors",
        "trust_remote_code",
        "padding_side",
        "is_trainable",
    } <= {keyword for *_, keyword in calls}
    wrong = [
        f"{file}, line {line}: {called.__qualname__} has no {keyword}"
        for file, line, called, keyword in calls
        if not accepts(called, keyword)
    ]
    assert wrong == []


def test_a_keyword_that_does_not_exist_would_be_found():
    assert not accepts(trl.GRPOConfig, "max_prompt_length") and not accepts(trl.GRPOTrainer, "tokenizer")
    assert not accepts(policy.BitsAndBytesConfig, "load_in_3bit")
