"""The embedded policy is tested: architecture, tokens, prompt, 4-bit and LoRA."""

import copy
import json
import math
import re
import subprocess
import sys

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from torch.testing import assert_close
from transformers import Qwen2_5_VLForConditionalGeneration

from vqr1 import policy
from vqr1.experiments.tiny import PATCH, WIDTH, build_policy, start_from_energies
from vqr1.places import EMBEDDED
from vqr1.policy import PictureProcessor, Policy, as_policy, load_policy, load_processor, lora_config
from vqr1.prompts import NON_THINKING, QUESTION, THINKING, messages
from vqr1.scoring import Scorer


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt(processor, thinking=True, **options):
    return processor.apply_chat_template(
        messages(thinking), add_generation_prompt=True, tokenize=False, **options
    )


def asked(processor, *pictures):
    return processor(
        text=[prompt(processor)] * len(pictures), images=list(pictures), padding=True, return_tensors="pt"
    )


# Architecture


def test_the_policy_is_qwens_class_and_small(untrained):
    model, _ = untrained
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert 1_000_000 < sum(weight.numel() for weight in model.parameters()) <= 3_700_000


def test_every_linear_layer_suits_4_bit_on_cpus(untrained):
    layers = [module for module in untrained[0].modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) > 40
    assert not [layer for layer in layers if layer.in_features % 64 or layer.out_features % 64]


def test_the_same_seed_builds_the_same_weights(untrained):
    again, _ = build_policy(["strong jpeg blocking"], 0)
    other, _ = build_policy(["strong jpeg blocking"], 1)
    name = "model.visual.blocks.0.mlp.gate_proj.weight"
    assert_close(again.get_parameter(name), untrained[0].get_parameter(name), rtol=0, atol=0)
    assert not torch.equal(again.get_parameter(name), other.get_parameter(name))


# Tokens and prompt


@pytest.mark.parametrize("score", ["1.00", "4.25", "5.99", "3.7", "0123456789."])
def test_every_digit_and_the_point_is_one_token(untrained, score):
    tokenizer = untrained[1].tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(f"<answer>{score}</answer>")) == [
        "<answer>",
        *score,
        "</answer>",
    ]


@pytest.mark.parametrize(("thinking", "request_"), [(True, THINKING), (False, NON_THINKING)])
def test_the_question_is_one_token_and_survives_decoding(untrained, thinking, request_):
    tokenizer = untrained[1].tokenizer
    ids = tokenizer.encode(f"{QUESTION} {request_}")
    assert len(ids) == 2 and len(tokenizer.encode(QUESTION)) == 1
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"{QUESTION} {request_}"
    assert len(tokenizer.encode(prompt(untrained[1], thinking))) < 30  # in words it would be over 100


def test_answers_survive_decoding(untrained):
    tokenizer = untrained[1].tokenizer
    text = "<think>strong jpeg blocking in the flat areas, edges intact</think><answer>2.75</answer>"
    assert tokenizer.decode(tokenizer.encode(text + "<|im_end|>"), skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode("Größe: ½ 像")) == "Größe: ½ 像"  # bytes: any text


def test_the_chat_layout_is_qwen2_5s(untrained):
    assert prompt(untrained[1]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        f"{QUESTION} {THINKING}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_conversation_keeps_its_own_system_message_and_answers(untrained):
    chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    assert untrained[1].apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
    )


def test_pictures_can_be_numbered(untrained):
    two = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}],
        }
    ]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    text = untrained[1].apply_chat_template(two, tokenize=False, add_vision_id=True)
    assert f"user\nPicture 1: {picture}Picture 2: {picture}Which?<|im_end|>" in text
    assert f"Picture 1: {picture}You are doing" in prompt(untrained[1], add_vision_id=True)


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [(64, 64, 4), (192, 192, 36), (512, 384, 192), (512, 512, 256), (1024, 768, 234), (20, 20, 4)],
)
def test_a_picture_takes_a_token_per_32_pixels_square(untrained, width, height, tokens):
    ids = asked(untrained[1], noise(width, height)).input_ids
    assert (ids == untrained[1].image_token_id).sum() == tokens


def test_the_processor_needs_no_torchvision(untrained, untrained_folder, monkeypatch):
    monkeypatch.setattr(policy, "is_torchvision_available", lambda: True)  # then, too, ours is ours
    for processor in (untrained[1], load_processor(str(untrained_folder), "qwen2_5_vl")):
        assert type(processor) is PictureProcessor and not hasattr(processor, "video_processor")
        assert processor.tokenizer.padding_side == "left"
    assert sys.modules.get("torchvision") is None or policy.is_torchvision_available()


# Forward, saving and loading


@torch.no_grad()
def test_left_padding_changes_no_logits(untrained):
    model, processor = untrained
    pictures = [noise(64, 64), noise(160, 96, 1)]
    together = asked(processor, *pictures)
    assert together.attention_mask[0, 0] == 0 and together.attention_mask[:, -1].all()
    batched = model(**together, logits_to_keep=1).logits[:, 0]
    single = torch.cat(
        [model(**asked(processor, picture), logits_to_keep=1).logits[:, 0] for picture in pictures]
    )
    assert_close(batched, single, rtol=0, atol=1e-4)
    assert (single[0] - single[1]).abs().max() > 1e-3  # the picture matters


@torch.no_grad()
def test_saved_in_fp16_and_loaded_in_fp32_it_computes_the_same(untrained, untrained_folder):
    assert sum(file.stat().st_size for file in untrained_folder.glob("*.safetensors")) <= 7_500_000
    model, processor = load_policy(untrained_folder, dtype=torch.float32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    inputs, same = asked(processor, noise(96, 64)), asked(untrained[1], noise(96, 64))
    assert all(torch.equal(inputs[name], same[name]) for name in same)
    rounded = copy.deepcopy(untrained[0])
    for weight in rounded.parameters():  # not the buffers, which are computed anew in fp32
        weight.copy_(weight.half().float())
    loaded = model(**inputs.to(model.device)).logits.cpu()
    assert_close(loaded, rounded(**same).logits, rtol=0, atol=1e-4)
    assert_close(loaded, untrained[0](**same).logits, rtol=0, atol=0.05)  # what fp16 rounds away
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_an_adapter_is_loaded_with_its_base_and_can_be_trained_on(untrained_folder, tmp_path):
    base, processor = load_policy(untrained_folder)
    adapted = get_peft_model(base, lora_config())
    torch.nn.init.normal_(
        adapted.get_parameter(next(name for name, _ in adapted.named_parameters() if "lora_B" in name))
    )
    adapted.save_pretrained(tmp_path)
    loaded, _ = load_policy(tmp_path)
    inputs = asked(processor, noise(64, 64)).to(base.device)
    with torch.no_grad():
        assert_close(loaded(**inputs).logits, adapted(**inputs).logits)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(**inputs).logits, adapted(**inputs).logits, atol=1e-3)
    assert all(("lora" in name) == weight.requires_grad for name, weight in loaded.named_parameters())


@pytest.mark.parametrize(("make", "message"), [(False, "no such folder"), (True, "holds no model")])
def test_a_folder_without_a_model_is_named(tmp_path, make, message):
    path = tmp_path / "a policy"
    if make:
        path.mkdir()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(path))}.*{message}"):
        load_policy(path)


# 4-bit and LoRA


@pytest.fixture
def four_bit_lora(untrained_folder):
    model, processor = load_policy(untrained_folder, quantize=True)
    model = get_peft_model(model, lora_config())
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # they start as zeros, and lora_A would get no gradient
            torch.nn.init.normal_(weight, std=0.02)
    return model, processor


def gradients(model, inputs):
    model.train()
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {
        name: weight.grad.flatten().clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def test_an_eval_pass_leaves_every_4_bit_lora_gradient_as_it_was(four_bit_lora):
    """On AVX512-BF16 CPUs bitsandbytes packs weights in an eval-mode forward.

    Gradients after it would be silently wrong.
    """
    model, processor = four_bit_lora
    inputs = asked(processor, noise(64, 64), noise(96, 64, 1)).to(model.device)
    before = gradients(model, inputs)
    model.eval()
    with torch.no_grad():
        model(**inputs)
    after = gradients(model, inputs)
    assert len(after) == 2 * 7 * 4  # A and B of the seven projections of four layers
    assert [name for name in after if not after[name].abs().max() > 0] == []
    assert [name for name in after if torch.cosine_similarity(before[name], after[name], 0) < 0.999] == []


def test_only_the_language_model_is_quantised(four_bit_lora):
    model = four_bit_lora[0].get_base_model()
    quantised = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(quantised) == 7 * 4 and all("language_model" in name for name in quantised)
    assert not isinstance(model.lm_head, bnb.nn.Linear4bit)
    assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"


# The vision tower


def test_the_first_block_starts_with_squares(untrained):
    """silu(x) x + silu(-x) (-x) = x^2, channel by channel, before they are mixed."""
    model = copy.deepcopy(untrained[0])
    torch.manual_seed(0)
    patches = torch.randn(500, 3 * PATCH**2)
    start_from_energies(model, patches)
    x, mlp = torch.randn(9, WIDTH) * 2, model.model.visual.blocks[0].mlp
    mix = mlp.down_proj.weight[:, :WIDTH]
    with torch.no_grad():
        assert_close(mlp(x), x.square() @ mix.T, rtol=1e-4, atol=1e-4)
        assert_close(mlp(-x), mlp(x), rtol=1e-4, atol=1e-4)  # energies have no sign
        embedded = model.model.visual.patch_embed(patches)  # (500, WIDTH)
    assert torch.linalg.matrix_rank(mix) == WIDTH
    deviation = embedded.std(0)
    assert deviation[:-1].min() > 0.8 and deviation[:-1].max() < 1.001 and not embedded[:, -1].any()


@pytest.mark.parametrize("quantize", [False, True])
def test_on_a_gpu_without_bf16_the_vision_tower_is_no_half_precision(untrained_folder, monkeypatch, quantize):
    """A CPU loads what a T4 would: only the answer to "which dtype" is replaced."""
    monkeypatch.setattr(policy, "default_dtype", lambda: torch.float16)
    model, processor = load_policy(untrained_folder, quantize=quantize)
    kinds = {(".visual." in name, weight.dtype) for name, weight in model.named_parameters()}
    assert (
        kinds == {(True, torch.float32), (False, torch.float32), (False, torch.uint8)}
        if quantize
        else {(True, torch.float32), (False, torch.float16)}
    )
    if not quantize:  # its features go on in the language model's precision
        score = Scorer((model, processor)).score([Image.new("RGB", (64, 64), "gray")])[0]
        assert not math.isnan(score.mass)


# The pair


def test_a_policy_is_a_pair_that_knows_its_name(untrained_folder):
    model, processor = loaded = load_policy(untrained_folder)
    assert loaded.model is model and loaded.processor is processor and loaded.name == str(untrained_folder)
    assert as_policy(loaded) is loaded and as_policy(untrained_folder).name == loaded.name
    own = as_policy((model, processor))
    assert own.model is model and own.name == "the given policy"
    copied = copy.deepcopy(Policy("a", "b", "c"))
    assert copied == ("a", "b") and copied.name == "c"


@pytest.mark.parametrize(
    "policy, needed", [("tiny-policy", []), ("people-ranker", ["bitsandbytes", "pandas", "peft"])]
)
def test_scoring_imports_neither_what_quantises_nor_what_trains(policy, needed):
    """Importing either takes as long as scoring a few pictures. An adapter needs peft, which imports both;
    its calibration needs pandas."""
    code = (
        "import sys; from vqr1.scoring import Scorer; "
        f"print(Scorer({policy!r}).score('data/photos/kitten.jpg')[0].score > 1, "
        "sorted({'bitsandbytes', 'peft', 'pandas', 'trl', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=EMBEDDED.parent, check=True
    )
    assert ran.stdout == f"True {needed}\n"


def test_an_adapter_is_refused_on_other_weights_than_it_was_trained_on(untrained, tmp_path):
    """The shapes fit, so only a digest can tell: a changed weight is enough."""
    model, processor = untrained
    for kept in (model, processor):
        kept.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(load_policy(tmp_path / "base")[0], lora_config(4, 8))
    policy.note_base(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    load_policy(tmp_path / "adapter")
    weights = tmp_path / "base" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="adapter was trained on other weights than .*base has now"):
        load_policy(tmp_path / "adapter")
    weights.write_bytes(content)
    load_policy(tmp_path / "adapter")
    record = tmp_path / "adapter" / policy.BASE
    record.write_text(json.dumps({"quantize": False}))  # older adapters do not say
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    load_policy(tmp_path / "adapter")
