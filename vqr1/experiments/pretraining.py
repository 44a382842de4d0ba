"""Teach the embedded policy to see and to answer in format, but nothing about quality.

It takes three stages on endless streams of pictures. In two of them the vision tower alone learns to name
flaws, and to measure what can be measured: first one flaw at a time, on procedural pictures and the licensed
photographs, then several on photographs of all kinds. Then the language model learns to write what the tower
sees and a score. The score follows from the severity words alone, by one rule for all flaws; no rating is
read here.
"""

import math
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers.modeling_utils import load_state_dict

from vqr1 import quiet
from vqr1.experiments.damage import FLAWS
from vqr1.experiments.looks import DETAIL, EDGES, LIGHT, look, measure
from vqr1.experiments.school import Flaw, Picture, PictureStream, one_flaw
from vqr1.experiments.tiny import build_policy, start_from_energies
from vqr1.policy import save_native_names
from vqr1.prompts import CLEAN, PHRASES, SEVERITY, messages
from vqr1.runlog import last_checkpoint, same_settings, save_settings, step_of

with quiet():
    from transformers import Trainer, TrainingArguments

SEE_SIZES = {160: 0.15, 192: 0.55, 224: 0.2, 256: 0.08, 448: 0.02}
SPEAK_SIZES = {192: 0.4, 256: 0.25, 384: 0.2, 512: 0.15}
"""Side of the pictures in px -> share, for the tower and for the language model."""

AUTHENTIC = 0.1
"""Share of the second stage's lists whose photographs stay as they are: nobody knows their flaws."""
LOOKS = 3
"""Weight of measuring looks beside naming flaws."""
NAMING = len(FLAWS) + 1 + 6
"""How many logits `naming_loss` takes: of each flaw and of none, and of the strongest one's strength 0..5."""

SCORES = (4.75, 4.25, 3.5, 2.75, 2.0, 1.4)
"""Centre of the warm start's score for one flaw of strength 0 (clean) .. 5: the one rule for all flaws."""
SCORE_NOISE = 0.35

PLACES = ("in the flat areas", "in the textures", "along the edges")


# The words


def where(clean: np.ndarray, distorted: np.ndarray) -> str:
    """Say in words where the difference lies: flat areas, textures, edges; "" if all over.

    Regions are the terciles of local deviation of the clean picture, over 8x8 blocks.

    >>> flat = np.zeros((64, 64, 3), np.float32)
    >>> where(flat, flat + 0.1)
    ''
    """

    def blocks(x: np.ndarray) -> np.ndarray:
        h, w = x.shape[0] // 8 * 8, x.shape[1] // 8 * 8
        return x[:h, :w].reshape(h // 8, 8, w // 8, 8).swapaxes(1, 2).reshape(-1, 64)

    activity = blocks(clean.mean(2)).std(1)
    error = blocks(np.abs(distorted - clean).mean(2)).mean(1)
    region = np.argsort(np.argsort(activity, kind="stable"), kind="stable") * 3 // len(activity)
    means = np.array([error[region == r].mean() for r in range(3)])
    return "" if means.max() < 1.6 * means.min() else PLACES[means.argmax()]


def reasoning(flaws: Sequence[tuple[str, int, str]], looks: str) -> str:
    """Return what a perfect observer would think: the flaws, the strongest first, and how the picture looks.

    flaws: (name, strength 1..5, place or "") of each.
    looks: of `look`.

    >>> reasoning([("jpeg", 2, "in the flat areas"), ("defocus", 4, "")], "edges soft, light dim")
    'strong defocus, slight jpeg blocking in the flat areas; edges soft, light dim'
    """
    ordered = sorted(flaws, key=lambda flaw: -flaw[1])
    words = [f"{SEVERITY[strength - 1]} {PHRASES[name]} {place}".strip() for name, strength, place in ordered]
    return f"{', '.join(words) or CLEAN}; {looks}"


def first_score(strengths: Sequence[int]) -> float:
    """Return the centre of the warm start's score: each flaw takes its share of what is left above 1.

    >>> first_score([]), first_score([4]), round(first_score([4, 2]), 2)
    (4.75, 2.0, 1.67)
    """
    best = SCORES[0] - 1
    return 1 + best * math.prod((SCORES[strength] - 1) / best for strength in strengths)


def answer(strengths: Sequence[int], rng: np.random.Generator) -> str:
    """Return the warm start's answer: a score from the strengths alone, with a little noise."""
    return f"<answer>{np.clip(rng.normal(first_score(strengths), SCORE_NOISE), 1, 5):.2f}</answer>"


def corpus() -> list[str]:
    """Return texts that hold every word of the reasoning, for the tokenizer."""
    looks = [f"edges {e}, detail {d}, light {n}" for e, d, n in zip(EDGES, DETAIL, LIGHT)]
    texts = [
        reasoning([(name, strength, place), (name, strength, "")], looks[(strength + n) % 5])
        for n, name in enumerate(PHRASES)
        for strength in range(1, 6)
        for place in PLACES
    ]
    chat = " system\nYou are a helpful assistant. \n user\n assistant\n"  # without the special tokens
    return texts + [reasoning([], text) for text in looks] * 20 + [chat] * 100


# The eyes


def strengths(flaws: Sequence[Flaw] | None) -> torch.Tensor:
    """Return the strength of every flaw of `FLAWS`, 0 where it is absent; all -1 where nobody knows."""
    found = torch.full((len(FLAWS),), -1.0 if flaws is None else 0.0)
    for flaw in flaws or ():
        found[FLAWS.index(flaw.name)] = flaw.strength
    return found


def naming_loss(logits: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of naming flaws plus that of the strongest one's strength, a mean over rows.

    logits: (B, 1 + F + 6): no flaw or which of F; the strength 0..5 of the strongest.
    strength: (B, F) as from `strengths`. Several flaws have equal shares; a row of -1 takes no part.

    Who knows that both of two flaws are there, and that the stronger one is 5, is left with log 2:

    >>> logits = torch.tensor([[-99.0, 0, 0, -99, -99, -99, -99, -99, 0]])
    >>> round(float(naming_loss(logits, torch.tensor([[2.0, 5.0]]))), 2)
    0.69
    """
    known = strength[:, 0] >= 0
    logits, strength = logits[known], strength[known]
    present = (strength > 0).float()
    named = torch.cat([1 - present.amax(1, keepdim=True), present], 1)
    shares = named / named.sum(1, keepdim=True)
    kind, strongest = logits[:, :-6], logits[:, -6:]
    kinds = nn.functional.cross_entropy(kind, shares, reduction="sum")
    told = nn.functional.cross_entropy(strongest, strength.amax(1).long(), reduction="sum")
    return (kinds + told) / max(1, len(strength))  # 0 where nothing is known


def see_tokens(visual: nn.Module, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> list:
    """Return each picture's tokens from a vision tower, B tensors (tokens, width)."""
    tokens = visual(pixel_values, image_grid_thw).pooler_output.float()  # (tokens of all pictures, width)
    return tokens.split((image_grid_thw.prod(1) // visual.spatial_merge_unit).tolist())


def pool_tokens(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean and the maximum of each picture's tokens, (B, 2 * width)."""
    return torch.stack([torch.cat([tokens.mean(0), tokens.amax(0)]) for tokens in pictures])


class Perception(nn.Module):
    """The vision tower with heads, discarded later, on the mean and the maximum of its picture tokens.

    Args:
        visual: the tower.
        looks: (N, L) measured statistics of some pictures; they give the scale of each.
    """

    def __init__(self, visual: nn.Module, looks: torch.Tensor):
        super().__init__()
        patches = visual.patch_embed  # a convolution whose stride is its size: a product is faster
        patches.forward = lambda pixels: nn.functional.linear(pixels, patches.proj.weight.flatten(1))
        pooled = 2 * visual.config.out_hidden_size
        self.visual, self.flaws = visual, nn.Linear(pooled, NAMING)
        self.looks = nn.Linear(pooled, looks.shape[1])
        self.register_buffer("center", looks.mean(0))
        self.register_buffer("scale", looks.std(0) + 1e-3)

    def forward(self, pixel_values, image_grid_thw, strength, looks) -> dict:
        pooled = pool_tokens(see_tokens(self.visual, pixel_values, image_grid_thw))
        truth = ((looks - self.center) / self.scale).clamp(-4, 4)
        measured = nn.functional.smooth_l1_loss(self.looks(pooled[::2]), truth, beta=0.5)
        return {"loss": naming_loss(self.flaws(pooled), strength) + LOOKS * measured}


class Sights:
    """Collate lists of pictures for `Perception`; every second one, one of each source, is measured."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, lists: list[list[Picture]]) -> dict:
        pictures = [picture for several in lists for picture in several]
        return pixels(self.processor, pictures) | {
            "strength": torch.stack([strengths(picture.flaws) for picture in pictures]),
            "looks": torch.from_numpy(np.stack([measure(picture.pixels) for picture in pictures[::2]])),
        }


def pixels(processor, pictures: list[Picture]) -> dict:
    """Return pixel_values (patches, 3 * PATCH * PATCH) and image_grid_thw (B, 3)."""
    return dict(processor.image_processor(images=[p.pixels for p in pictures], return_tensors="pt"))


# The mouth


def prompt_text(processor, grid: torch.Tensor, thinking: bool) -> str:
    """Return the chat prompt with as many placeholders as a picture has tokens; grid: (3,)."""
    prompt = processor.apply_chat_template(messages(thinking), add_generation_prompt=True, tokenize=False)
    tokens = int(grid.prod() // processor.image_processor.merge_size**2)
    return prompt.replace("<|image_pad|>", "<|image_pad|>" * tokens)


def taught(processor, texts: Sequence[tuple[str, str]]) -> dict:
    """Return what the language model takes for (prompt, answer) texts; only the answers carry loss."""
    tokenizer = processor.tokenizer
    batch = tokenizer([prompt + answer for prompt, answer in texts], padding=True, return_tensors="pt")
    ids = batch.input_ids
    lengths = torch.tensor([len(tokenizer(answer).input_ids) for _, answer in texts])
    position = torch.arange(ids.shape[1])  # padding is on the left: answers end at the right border
    labels = ids.masked_fill(position < ids.shape[1] - lengths[:, None], -100)
    kinds = (ids == processor.image_token_id).long()
    return dict(input_ids=ids, attention_mask=batch.attention_mask, mm_token_type_ids=kinds, labels=labels)


class Answers:
    """Collate lists of pictures with the chat prompt and the answer a perfect but naive observer gives.

    Three in four rows think first.
    """

    def __init__(self, processor, seed: int, thinking: float = 0.75):
        self.processor, self.thinking, self.rng = processor, thinking, np.random.default_rng(seed)

    def text(self, picture: Picture, grid: torch.Tensor) -> tuple[str, str]:
        flaws, thinking = picture.flaws, self.rng.random() < self.thinking
        words = [(flaw.name, flaw.strength, where(flaw.before, flaw.after)) for flaw in flaws]
        think = f"<think>{reasoning(words, look(picture.pixels))}</think>" if thinking else ""
        score = answer([flaw.strength for flaw in flaws], self.rng)
        return prompt_text(self.processor, grid, thinking), f"{think}{score}<|im_end|>"

    def __call__(self, lists: list[list[Picture]]) -> dict:
        pictures = [picture for several in lists for picture in several]
        seen = pixels(self.processor, pictures)
        texts = [self.text(picture, grid) for picture, grid in zip(pictures, seen["image_grid_thw"])]
        return seen | taught(self.processor, texts)


# Training


CARD = """\
# The embedded policy, before any reinforcement learning

A Qwen2.5-VL of {weights:.1f} million weights. It was taught to see and to answer in format, not to judge: its
scores follow from the severity words alone, by one rule for all flaws. No rating was used.

It learned on procedural pictures and on the licensed photographs that come with the project (those that
train). {school}`vqr1 pretrain` makes it again: seed {seed}, {steps[0]} steps of the tower on one flaw at a
time, {steps[1]} on up to three, {steps[2]} of the language model.

It sees pictures up to 512x512 px without shrinking them, and names up to three flaws. It may name what is not
there.
"""
"""What is said of the policy in its folder."""
SCHOOL = """\
It also saw {count} photographs of BIQ2021's training part, without their ratings: no validation or test
picture, and none of their near twins. BIQ2021 grants no redistribution, so its pictures are not here.
"""


def _train(
    model: nn.Module,
    stream: IterableDataset,
    collate,
    output: Path,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> None:
    found = last_checkpoint(output)
    done = step_of(found)
    if done >= steps:
        model.load_state_dict(
            load_state_dict(f"{found}/model.safetensors"), strict=False
        )  # tied weights are there once
        return
    stream.seed += 1000 * done  # go on with new pictures
    bf16 = torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16", False)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        seed=seed,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps * 3 // 10, "decay_type": "1-sqrt"},
        warmup_steps=min(100, steps // 10),
        weight_decay=0.02,
        max_grad_norm=1.0,
        adam_beta2=0.98,
        bf16=bf16,
        logging_steps=50,
        save_steps=250,
        save_total_limit=1,
        report_to=[],
        dataloader_num_workers=max(1, (os.cpu_count() or 2) - 1),
        dataloader_prefetch_factor=4,
        remove_unused_columns=False,
        ignore_data_skip=True,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=stream, data_collator=collate)
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    pd.DataFrame(trainer.state.log_history).to_csv(output / "log.csv", index=False)


def pretrain(
    output: str | Path,
    steps: tuple[int, int, int] = (2400, 2400, 800),
    school: Sequence[Path] = (),
    batch: int = 16,
    seed: int = 0,
) -> Path:
    """Make the embedded policy again and return the folder of its fp16 checkpoint.

    output: folder that receives config.yaml, see/, see-more/, speak/ (checkpoints, log.csv) and policy/.
    steps: optimizer steps of the three stages: the vision tower alone on one flaw at a time, the same on up
        to three, then the language model on what the tower sees.
    school: authentic photographs, as from `find_school`, for the last two stages; without any, the licensed
        ones take their place.
    batch: sources per step; `RECIPES` pictures come from each.
    seed: of weights and pictures.

    It resumes where it stopped. Raises ValueError for a folder that was begun with other settings.
    """
    output, settings = Path(output), {"batch": batch, "seed": seed, "school": len(school)}
    if last_checkpoint(output / "see"):
        same_settings(output, settings)
    save_settings(output, settings)
    model, processor = build_policy(corpus(), seed)
    sights = Sights(processor)
    start = sights(list(islice(PictureStream(seed, SEE_SIZES, one_flaw, procedural=1.0), 32)))
    start_from_energies(model, start["pixel_values"])
    torch.manual_seed(seed)
    tower = Perception(model.model.visual, start["looks"])
    stream = PictureStream(seed + 1, SEE_SIZES, one_flaw, procedural=0.4)
    _train(tower, stream, sights, output / "see", steps[0], batch, 1e-3, seed)
    stream = PictureStream(seed + 2, SEE_SIZES, school=school, authentic=AUTHENTIC)
    _train(tower, stream, sights, output / "see-more", steps[1], batch, 6e-4, seed)
    model.model.visual.requires_grad_(False)
    save_native_names(model)
    stream = PictureStream(seed + 3, SPEAK_SIZES, school=school, sources=batch, oblong=0.3)
    _train(model, stream, Answers(processor, seed), output / "speak", steps[2], 1, 1e-3, seed)
    model.half().save_pretrained(output / "policy")
    processor.save_pretrained(output / "policy")
    weights = sum(weight.numel() for weight in model.parameters()) / 1e6
    authentic = SCHOOL.format(count=len(school)) if school else ""
    card = CARD.format(weights=weights, school=authentic, seed=seed, steps=steps)
    (output / "policy" / "README.md").write_text(card, encoding="utf-8")
    return output / "policy"
