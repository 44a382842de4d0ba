"""What K answers share is computed once and changes nothing else.

Features, samples, log-probabilities, gradients and a whole step stay the same.
"""

import copy
import inspect

import numpy as np
import pytest
import torch
import trl
from peft import get_peft_model
from PIL import Image
from torch.testing import assert_close
from transformers import GenerationConfig, ProcessorMixin

from vqr1.config import load_config
from vqr1.data.manifests import load_ratings
from vqr1.policy import base_of, load_policy, load_processor, lora_config
from vqr1.prompts import messages
from vqr1.sharing import look_once, prefill_once, process_once, prompt_once
from vqr1.training import build_trainer


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


A, B, C, D = noise(64, 64, 1), noise(96, 64, 2), noise(96, 64, 3), noise(64, 128, 4)
PATCHES = {"A": 16, "B": 24, "C": 24, "D": 32}


def asked(processor, *pictures):
    text = processor.apply_chat_template(messages(True), add_generation_prompt=True, tokenize=False)
    return processor(text=[text] * len(pictures), images=list(pictures), padding=True, return_tensors="pt")


# One processing per picture


@pytest.fixture
def worked(monkeypatch):
    """Return (a processor that processes once, the batch sizes that its image processor was given)."""
    processor, batches = load_policy("tiny-policy")[1], []
    stock = type(processor)._process_images

    def counted(self, images, **kwargs):
        batches.append(len(images))
        return stock(self, images, **kwargs)

    monkeypatch.setattr(type(processor), "_process_images", counted)
    process_once(processor)
    return processor, batches


def test_repeated_pictures_are_processed_once_to_the_same_inputs(worked):
    processor, batches = worked
    asked_for = [B, A, B, C, A, B.copy()]
    expected = asked(load_policy("tiny-policy")[1], *asked_for)
    batches.clear()
    for _ in range(2):  # the second time, all are remembered
        found = asked(processor, *asked_for)
        assert found.keys() == expected.keys() and all(
            torch.equal(found[name], expected[name]) for name in expected
        )
    assert batches == [4]  # B's copy is a picture of its own
    asked(processor, A, D)
    asked(processor, A, D.copy())
    asked(processor, A, D)
    assert batches == [4, 2, 2, 2]  # of batches, the last one is remembered


def test_other_settings_are_processed_anew(worked):
    processor, batches = worked
    limits = ({"shortest_edge": 4096, "longest_edge": most} for most in (4096, 8192))
    few, all_ = (
        processor(text=["<|image_pad|>"], images=[D], size=limit, return_tensors="pt")["pixel_values"]
        for limit in limits
    )
    assert batches == [1, 1] and len(few) < len(all_)


def test_a_processor_that_processes_once_can_be_saved(worked, tmp_path):
    processor, _ = worked
    expected = asked(processor, A, A)
    processor.save_pretrained(tmp_path)
    found = asked(load_processor(str(tmp_path), "qwen2_5_vl"), A, A)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# One look per picture


class Looks:
    """Hold a LoRA policy whose frozen tower encodes each picture once.

    `patches` lists how many each call of the tower got.
    """

    def __init__(self, untrained):
        self.model, self.processor = get_peft_model(copy.deepcopy(untrained[0]), lora_config()), untrained[1]
        self.inner, self.patches = self.model.get_base_model().model, []
        forward = self.inner.visual.forward
        self.features = lambda batch: torch.cat(self.inner.get_image_features(**batch).pooler_output)

        def counted(hidden_states, grid_thw, **kwargs):
            self.patches.append(len(hidden_states))
            return forward(hidden_states, grid_thw, **kwargs)

        self.inner.visual.forward = counted

    def batch(self, *pictures):
        return dict(self.processor.image_processor(images=list(pictures), return_tensors="pt"))


@pytest.fixture
def looks(untrained):
    return Looks(untrained)


def test_repeated_pictures_are_seen_once_with_the_same_features(looks):
    batch = looks.batch(B, A, B, C, A, D, C, B)  # B and C have one size, and different pixels
    expected = looks.features(batch)
    assert looks.patches.pop() == 2 * 16 + 5 * 24 + 32
    look_once(looks.model)
    found = looks.features(batch)
    assert looks.patches == [sum(PATCHES.values())]
    assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_last_batch_is_remembered_and_no_other(looks):
    expected = looks.features(looks.batch(C, D, A))
    look_once(looks.model)
    looks.features(looks.batch(A, B, C, D))
    looks.patches.clear()
    assert_close(looks.features(looks.batch(C, D, A)), expected, rtol=0, atol=1e-6)
    assert looks.patches == []
    looks.features(looks.batch(C, A))
    looks.features(looks.batch(A, B))  # B is no longer of the last batch
    assert looks.patches == [PATCHES["B"]]


def test_a_changed_pixel_is_seen_anew(looks):
    changed = A.copy()
    changed.putpixel((40, 9), tuple(255 - value for value in A.getpixel((40, 9))))
    expected = looks.features(looks.batch(changed, D))
    look_once(looks.model)
    looks.features(looks.batch(A, D))
    looks.patches.clear()
    assert_close(looks.features(looks.batch(changed, D)), expected, rtol=0, atol=1e-6)
    assert looks.patches == [PATCHES["A"]]


def test_a_tower_in_training_is_left_alone(looks):
    batch, weight = looks.batch(A, B, A), looks.inner.visual.blocks[0].mlp.up_proj.weight
    weight.requires_grad_(True)
    looks.features(batch).square().sum().backward()
    expected, weight.grad = weight.grad, None
    look_once(looks.model)
    looks.features(batch).square().sum().backward()
    assert looks.patches == [2 * 16 + 24] * 2 and expected.abs().max() > 0
    assert_close(weight.grad, expected)


def test_a_policy_that_looks_once_answers_the_same(looks):
    pictures = A, B, A
    inputs = asked(looks.processor, *pictures)
    with torch.no_grad():
        expected = looks.model(**inputs).logits
        look_once(looks.model)
        assert_close(looks.model(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert looks.patches == [56, 40]


# One prefill per prompt


def repeated(processor, photo, k=3):
    """Return a batch as TRL makes it: three pictures of two sizes, each k times."""
    pictures = [photo.crop(box) for box in ((0, 0, 96, 64), (100, 60, 228, 156), (0, 0, 64, 96))]
    text = processor.apply_chat_template(messages(True), add_generation_prompt=True, tokenize=False)
    images = [picture for picture in pictures for _ in range(k)]
    return processor(text=[text] * len(images), images=images, padding=True, return_tensors="pt")


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sharing_the_prefill_changes_no_sample(photo, temperature):
    model, processor = load_policy("tiny-policy")
    batch = repeated(processor, photo)
    config = GenerationConfig(
        max_new_tokens=12,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
    )
    seen = []
    model.model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    torch.manual_seed(3)
    expected = model.generate(**batch, generation_config=config)
    prefill_once(model)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**batch, generation_config=config), expected)
    assert seen[0] == 3 * seen[1]  # each picture went through the tower once
    assert len({tuple(row) for row in expected.tolist()}) > 3  # the answers of one picture differ


def test_checkpointing_in_train_mode_keeps_no_cache_and_samples_the_stock_way(photo):
    model, processor = load_policy("tiny-policy")
    batch = repeated(processor, photo)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    model.train()
    model.gradient_checkpointing_enable()
    expected = model.generate(**batch, **greedy)
    prefill_once(model)
    assert torch.equal(model.generate(**batch, **greedy), expected)


def test_prompts_that_are_not_alike_in_any_order_keep_their_own_cache(photo):
    model, processor = load_policy("tiny-policy")
    batch = repeated(processor, photo, k=1)
    shuffled = repeated(processor, photo, k=2)
    config = GenerationConfig(
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
    )
    once = model.generate(**batch, generation_config=config)
    prefill_once(model)
    assert torch.equal(model.generate(**shuffled, generation_config=config), once.repeat_interleave(2, 0))


# One forward and backward per prompt


def adapted(seed=0):
    """Return the embedded policy with an adapter that is not zero, prepared as GRPOTrainer prepares it."""
    model, processor = load_policy("tiny-policy")
    trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    torch.manual_seed(seed)
    model = get_peft_model(model, lora_config())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    for weight in base_of(model).model.visual.parameters():
        weight.requires_grad_(False)
    return model, processor


def learned(model, batch, completions, mask, order):
    """Return log-probabilities and entropies (N, C), and a weighted sum's gradient, by TRL's own call."""
    rows = {
        name: value[order]
        for name, value in batch.items()
        if name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    }
    patches = batch["pixel_values"].split(batch["image_grid_thw"].prod(1).tolist())
    ids, attention = (
        torch.cat([rows.pop(name), more[order]], 1)
        for name, more in (("input_ids", completions), ("attention_mask", mask))
    )
    kinds = torch.nn.functional.pad(rows.pop("mm_token_type_ids"), (0, completions.shape[1]))
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, : -completions.shape[1]] = -100
    model.zero_grad()
    out = model(
        input_ids=ids,
        attention_mask=attention,
        pixel_values=torch.cat([patches[i] for i in order]),
        image_grid_thw=rows["image_grid_thw"],
        mm_token_type_ids=kinds,
        labels=labels,
        fused_lm_head=True,
    )
    log_probs, entropy = (value[:, -completions.shape[1] :] for value in (out.log_probs, out.entropy))
    weights = torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)
    (weights * log_probs).sum().backward()
    gradient = {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }
    return log_probs.detach(), entropy.detach(), gradient


@pytest.fixture(scope="module")
def answered(photo):
    """Return three pictures of two sizes (padded prompts) x 4 answers of different lengths, unordered."""
    model, processor = adapted()
    batch = repeated(processor, photo, k=4)
    torch.manual_seed(1)
    lengths = torch.tensor([3, 9, 1, 6] * 3)
    completions = torch.randint(20, 300, (12, 9))
    mask = (torch.arange(9) < lengths[:, None]).long()
    return (
        batch,
        completions.masked_fill(mask == 0, model.generation_config.pad_token_id),
        mask,
        torch.randperm(12),
    )


def assert_same_gradients(found, expected):
    """Compare each trained weight's gradient, to 1e-5 of its size."""
    assert expected.keys() == found.keys() and len(found) > 0
    apart = {
        name: float((found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
        for name, gradient in expected.items()
    }
    assert max(apart.values()) < 1e-5, max(apart, key=apart.get)


def learning(checkpointing: bool):
    """Return `adapted`'s model in training, prepared for gradient checkpointing as TRL does it."""
    model, _ = adapted()
    if checkpointing:
        base_of(model).gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def watched(model) -> list[tuple[int, int]]:
    """Note (rows, tokens in a row) of every call of the first decoder layer."""
    shapes = []
    base_of(model).model.language_model.layers[0].register_forward_hook(
        lambda module, args, out: shapes.append(tuple(args[0].shape[:2]))
    )
    return shapes


@pytest.mark.parametrize(("rows", "checkpointing"), [(12, False), (12, True), (5, True), (1, True)])
def test_sharing_the_prompt_keeps_log_probabilities_and_gradients(answered, rows, checkpointing):
    batch, completions, mask, order = answered
    order = order[:rows]
    model = learning(checkpointing)
    expected = learned(model, batch, completions, mask, order)
    prompt_once(model)
    found = learned(model, batch, completions, mask, order)
    assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    assert len(found[2]) == 2 * 7 * 4
    assert_same_gradients(found[2], expected[2])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_distinct_prompt_is_run_once(answered, checkpointing):
    """Prompts, but for their last tokens, are computed 3 times, where TRL computes them 12 times."""
    batch, completions, mask, order = answered
    prompt, answer = batch["input_ids"].shape[1], completions.shape[1]
    model = learning(checkpointing)
    shapes = watched(model)
    learned(model, batch, completions, mask, order)
    prompt_once(model)
    learned(model, batch, completions, mask, order)
    assert shapes == [(12, prompt + answer), (3, prompt - 1 + 4 * (1 + answer))]


def test_an_answer_sees_no_other(answered):
    batch, completions, mask, order = answered
    model = learning(True)
    prompt_once(model)
    before, entropy, _ = learned(model, batch, completions, mask, order)
    row = int(order[0])
    others = torch.where(torch.arange(12)[:, None] == row, completions, (completions - 13) % 280 + 20)
    after, changed, _ = learned(model, batch, others, mask, order)
    assert torch.equal(after[0], before[0]) and torch.equal(changed[0], entropy[0])
    assert not torch.equal(after[1:], before[1:])


def test_one_text_about_two_pictures_is_two_prompts(answered):
    model = learning(True)
    processor = load_policy("tiny-policy")[1]
    batch = asked(processor, B, C, B)  # of one size
    _, completions, mask, _ = answered
    given = batch, completions[:3], mask[:3], torch.arange(3)
    expected = learned(model, *given)
    prompt_once(model)
    shapes = watched(model)
    found = learned(model, *given)
    assert [rows for rows, _ in shapes] == [2]
    assert_close(found[0], expected[0], rtol=0, atol=1e-5)


def eager(model):
    model.set_attn_implementation("eager")


def windows(model):
    text = model.model.language_model
    text.has_sliding_layers, text.config.sliding_window = True, 4096
    text.config.layer_types = ["sliding_attention"] * 4


@pytest.mark.parametrize("change", [eager, windows])
def test_attention_that_takes_no_mask_of_ours_goes_the_stock_way(answered, change):
    batch, completions, mask, order = answered
    model = learning(True)
    change(base_of(model))
    prompt_once(model)
    shapes = watched(model)
    learned(model, batch, completions, mask, order)
    assert shapes == [(12, batch["input_ids"].shape[1] + completions.shape[1])]


def test_other_calls_of_forward_are_left_alone(photo):
    model, processor = adapted()
    batch = asked(processor, photo)
    with torch.no_grad():
        expected = model(**batch).logits
        prompt_once(model)
        assert torch.equal(model(**batch).logits, expected)


# A whole step of the trainer


def one_step(tmp_path, share, policy=None, **grpo):
    """Run two steps on pictures of three sizes, so that prompts are padded."""
    config = load_config("cpu").changed(lora_r=4, lora_alpha=8, share_prompts=share)
    small = {
        "max_steps": 2,
        "per_device_train_batch_size": 12,
        "num_generations": 3,
        "learning_rate": 1e-3,
        "max_completion_length": 48,
        "save_strategy": "no",
        "warmup_steps": 0,
        "logging_steps": 1,
    } | grpo
    rows = load_ratings("sim-kadid").query("split == 'train'").iloc[::150]
    crops = ["0,0,96,64", "8,0,64,128", "100,60,112,112"]
    trainer = build_trainer(
        config.changed(grpo=small),
        tmp_path,
        policy,
        rows.assign(crop=[crops[i % 3] for i in range(len(rows))]),
    )
    trainer.train()
    weights = {
        name: weight.detach().clone()
        for name, weight in trainer.model.named_parameters()
        if weight.requires_grad
    }
    return weights, [entry for entry in trainer.state.log_history if "entropy" in entry], trainer


def patched(trainer) -> list[bool]:
    """List which seams are not TRL's and transformers' own."""
    owners = {
        "generate": trainer.model,
        "forward": base_of(trainer.model).model.visual,
        "_process_images": trainer.processing_class,
    }
    return [name in vars(owner) for name, owner in owners.items()]


MICRO = {"per_device_train_batch_size": 6, "steps_per_generation": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    "grpo",
    [
        {},
        {"beta": 0.1},
        MICRO | {"num_iterations": 2},
        MICRO | {"beta": 0.1, "gradient_checkpointing": True},
    ],
    ids=["plain", "KL", "micro-batches, each learned from twice", "micro-batches, checkpointing, KL"],
)
def test_a_run_that_shares_is_the_stock_run(tmp_path, grpo):
    """The same seed gives the same samples, rewards and weights after two steps."""
    stock, stock_log, before = one_step(tmp_path / "stock", share=False, **grpo)
    shared, shared_log, after = one_step(tmp_path / "shared", share=True, **grpo)
    assert not any(patched(before)) and all(patched(after))  # the switch
    assert len(stock_log) == len(shared_log) == 2
    keys = ["loss", "grad_norm", "reward", "completions/mean_length"]
    if "steps_per_generation" not in grpo:
        keys.append("entropy")  # else a mean of micro-batches' means, and they hold other answers
    for key in keys:  # a step that learns from old samples logs the last alone
        expected, found = ([entry[key] for entry in log if key in entry] for log in (stock_log, shared_log))
        assert len(expected) > 0 and found == pytest.approx(expected, abs=1e-5)
    start, end = (
        {name: weights[name] for name in weights if "lora_B" in name} for weights in (stock, shared)
    )
    assert len(start) == 28 and all(weight.abs().max() > 0 for weight in start.values())
    for name in start:  # adapters' B starts at zero: it is what was learned
        assert torch.cosine_similarity(start[name].flatten(), end[name].flatten(), 0) > 0.999, name


@pytest.mark.parametrize("grpo", [{}, MICRO], ids=["one batch", "micro-batches"])
@pytest.mark.parametrize("share", [False, True])
def test_with_checkpointing_in_bf16_the_first_steps_kl_is_0(tmp_path, share, grpo):
    """Policy and reference are then one model on one path; 4-bit base, pictures of three sizes."""
    policy = load_policy("tiny-policy", quantize=True, dtype=torch.bfloat16)
    options = {"bf16": True, "gradient_checkpointing": True, "beta": 0.1, "max_steps": 1} | grpo
    _, [log], trainer = one_step(tmp_path, share, policy, **options)
    assert log["kl"] == 0.0
    assert patched(trainer) == [share] * 3


@pytest.mark.parametrize(("share", "rows"), [(True, [2, 2]), (False, [6, 6])])
def test_the_answers_to_a_picture_are_learned_from_together(tmp_path, share, rows):
    """Each of two micro-batches holds the 3 answers to 2 of 4 pictures; shuffled, it would hold more."""
    model, processor = load_policy("tiny-policy")
    found = []
    model.model.language_model.layers[0].register_forward_hook(
        lambda module, args, out: found.append(len(args[0])) if torch.is_grad_enabled() else None
    )
    options = MICRO | {"gradient_checkpointing": True, "max_steps": 1}
    one_step(tmp_path, share, (model, processor), **options)
    assert found == rows


def test_a_step_processes_each_picture_once(worked, tmp_path):
    model, _ = load_policy("tiny-policy")
    one_step(tmp_path, True, (model, worked[0]), max_steps=1)
    assert worked[1] == [4]  # of 12 answers, for rollouts and log-probabilities


def test_model_classes_that_it_was_not_shown_for_go_the_stock_way(tmp_path):
    model, processor = load_policy("tiny-policy")
    model.config.model_type = "another"
    _, log, trainer = one_step(tmp_path, True, (model, processor), max_steps=1)
    assert not any(patched(trainer)) and len(log) == 1


def test_trl_still_has_the_seams():
    """If TRL moved them, nothing would be shared and nothing would fail, so this must notice."""
    source = inspect.getsource(trl.GRPOTrainer._get_per_token_logps_and_entropies)
    assert "model(**model_inputs, labels=labels, fused_lm_head=True)" in source
    assert 'model_inputs["image_grid_thw"]' in source and "labels[:, :-logits_to_keep] = -100" in source
    assert "shuffle_sequence_dict(" in inspect.getsource(trl.GRPOTrainer._prepare_inputs)
    assert ".generate(" in inspect.getsource(trl.GRPOTrainer._generate_single_turn)
    assert "self._process_images(images, **" in inspect.getsource(ProcessorMixin.__call__)
