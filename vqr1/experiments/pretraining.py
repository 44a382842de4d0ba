"""Teach the embedded policy to see and to answer in format, but nothing about quality.

First the vision tower alone learns to name the distortion and its strength, on an endless stream of
distorted pictures. Then the whole policy learns to write what it sees and a score. The score follows from
the severity word alone, by one rule for all distortions; no MOS, observer or KADID-10k table is read here.
"""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info
from transformers.modeling_utils import load_state_dict

from vqr1 import quiet
from vqr1.data.manifests import CROP, TRAINED
from vqr1.data.photographs import photographs
from vqr1.distortions import distort, true_strength
from vqr1.experiments.dead_leaves import dead_leaves, pink_textures
from vqr1.experiments.tiny import build_policy, start_from_energies
from vqr1.policy import save_native_names
from vqr1.prompts import CLEAN, PHRASES, SEVERITY, messages
from vqr1.runlog import last_checkpoint, same_settings, save_settings, step_of

with quiet():
    from transformers import Trainer, TrainingArguments

INVISIBLE_DB = 45.0
"""Above this PSNR a distorted picture is called clean."""

SCORES = (4.75, 4.25, 3.5, 2.75, 2.0, 1.4)
"""Centre of the warm start's score for strength 0 (clean) .. 5: the one rule for all distortions."""
SCORE_NOISE = 0.35

REGIONS = ("flat areas", "textures", "edges")
PLACES = ("in the flat areas", "in the textures", "along the edges")


def where(clean: np.ndarray, distorted: np.ndarray) -> str:
    """Say in words where the difference lies: flat areas, textures, edges, or all over.

    Regions are the terciles of local deviation of the clean picture, over 8x8 blocks.

    >>> flat = np.zeros((64, 64, 3), np.float32)
    >>> where(flat, flat + 0.1)
    'all over the picture'
    """

    def blocks(x: np.ndarray) -> np.ndarray:
        h, w = x.shape[0] // 8 * 8, x.shape[1] // 8 * 8
        return x[:h, :w].reshape(h // 8, 8, w // 8, 8).swapaxes(1, 2).reshape(-1, 64)

    activity = blocks(clean.mean(2)).std(1)
    error = blocks(np.abs(distorted - clean).mean(2)).mean(1)
    region = np.argsort(np.argsort(activity, kind="stable"), kind="stable") * 3 // len(activity)
    means = np.array([error[region == r].mean() for r in range(3)])
    most, least = int(means.argmax()), int(means.argmin())
    if means[most] < 1.6 * means[least]:
        return "all over the picture"
    suffix = f", {REGIONS[least]} intact" if means[least] < 0.25 * means[most] else ""
    return f"{PLACES[most]}{suffix}"


def reasoning(name: str, strength: int, place: str) -> str:
    """Return what a perfect observer would think.

    >>> reasoning("jpeg", 4, "in the flat areas, edges intact")
    'strong jpeg blocking in the flat areas, edges intact'
    """
    return f"{SEVERITY[strength - 1]} {PHRASES[name]} {place}" if strength else CLEAN


def answer(strength: int, rng: np.random.Generator) -> str:
    """Return the warm start's answer: a score from the strength alone, with a little noise."""
    return f"<answer>{np.clip(rng.normal(SCORES[strength], SCORE_NOISE), 1, 5):.2f}</answer>"


def corpus() -> list[str]:
    """Return texts that hold every word of the reasoning, for the tokenizer."""
    places = [f"{a}, {b} intact" for a in PLACES for b in REGIONS] + ["all over the picture"]
    texts = [reasoning(n, s, p) for n in PHRASES for s in range(6) for p in places]
    chat = " system\nYou are a helpful assistant. \n user\n assistant\n"  # without the special tokens
    return texts + [chat] * 100


@lru_cache(maxsize=1)
def _photographs(splits: tuple[str, ...]) -> list[np.ndarray]:
    return [np.asarray(image) for image in photographs(*splits).values()]


class DistortionStream(IterableDataset):
    """An endless stream of distorted pictures, each with what a perfect observer would see.

    Clean pictures are crops of the photographs of `splits` (flipped, turned, channels swapped) or dead
    leaves. Rows: pixel_values (patches, 3 * PATCH * PATCH), image_grid_thw (1, 3), name, level, strength,
    place.
    """

    def __init__(self, processor, seed: int, splits: tuple[str, ...] = ("train",), procedural: float = 0.4):
        self.processor, self.seed, self.splits, self.procedural = processor, seed, splits, procedural

    def clean(self, rng: np.random.Generator, size: int) -> np.ndarray:
        if rng.random() < self.procedural:
            return np.round(dead_leaves(rng, self.textures, size) * 255).astype(np.uint8)
        photo = self.photographs[rng.integers(len(self.photographs))]
        y, x = (int(rng.integers(0, n - size + 1)) for n in photo.shape[:2])
        crop = np.rot90(photo[y : y + size, x : x + size], int(rng.integers(4)))
        crop = crop[:, ::-1] if rng.random() < 0.5 else crop
        return np.ascontiguousarray(crop[..., rng.permutation(3)] if rng.random() < 0.3 else crop)

    def example(self, rng: np.random.Generator) -> dict:
        size = CROP if rng.random() < 0.8 else 32 * int(rng.integers(4, 9))
        width = min(size + 64, 384)
        clean = self.clean(rng, width)
        name, level = str(rng.choice(TRAINED)), int(rng.integers(1, 6))
        distorted = np.asarray(distort(Image.fromarray(clean), name, level, int(rng.integers(2**31))))
        step = 16 if rng.random() < 0.8 else 1
        y, x = (int(v) * step for v in rng.integers(0, (width - size) // step + 1, 2))
        a, b = (p[y : y + size, x : x + size].astype(np.float32) / 255 for p in (clean, distorted))
        visible = np.square(a - b).mean() > 10 ** (-INVISIBLE_DB / 10)
        strength = true_strength(name, level) if visible else 0
        pictures = self.processor.image_processor(
            images=[distorted[y : y + size, x : x + size]], return_tensors="pt"
        )
        return dict(
            pictures, name=name, level=level, strength=strength, place=where(a, b) if strength else ""
        )

    def __iter__(self):
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        self.photographs = _photographs(self.splits) if self.procedural < 1 else []
        self.textures = pink_textures(np.random.default_rng(0))
        while True:
            yield self.example(rng)


def _stack(rows: list[dict]) -> dict:
    return {key: torch.cat([row[key] for row in rows]) for key in ("pixel_values", "image_grid_thw")}


def perception_batch(rows: list[dict]) -> dict:
    """Return the vision tower's batch: pixels, distortion (0 = none visible) and strength 0..5."""
    kind = [TRAINED.index(row["name"]) + 1 if row["strength"] else 0 for row in rows]
    return _stack(rows) | {
        "kind": torch.tensor(kind),
        "strength": torch.tensor([row["strength"] for row in rows]),
    }


def pool_tokens(visual: nn.Module, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
    """Return the mean and the maximum of each picture's tokens from a vision tower, (B, 2 * width)."""
    tokens = visual(pixel_values, image_grid_thw).pooler_output.float()  # (tokens of all pictures, width)
    pictures = tokens.split((image_grid_thw.prod(1) // visual.spatial_merge_unit).tolist())
    return torch.stack([torch.cat([p.mean(0), p.amax(0)]) for p in pictures])


def naming_loss(logits: torch.Tensor, kind: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of distortion plus that of strength 0..5; logits are (B, kinds + 6)."""
    return nn.functional.cross_entropy(logits[:, :-6], kind) + nn.functional.cross_entropy(
        logits[:, -6:], strength
    )


class Perception(nn.Module):
    """The vision tower with a linear head, discarded later, on the mean and maximum of its picture tokens."""

    def __init__(self, visual: nn.Module, width: int = 192):
        super().__init__()
        self.visual, self.head = visual, nn.Linear(2 * width, len(TRAINED) + 7)

    def forward(self, pixel_values, image_grid_thw, kind, strength) -> dict:
        logits = self.head(pool_tokens(self.visual, pixel_values, image_grid_thw))
        return {"loss": naming_loss(logits, kind, strength), "logits": logits}


class Answers:
    """Collate pictures with the chat prompt and the answer a perfect but naive observer gives.

    Three in four rows think first; the prompt carries no loss.
    """

    def __init__(self, processor, seed: int, thinking: float = 0.75):
        self.processor, self.thinking, self.rng = processor, thinking, np.random.default_rng(seed)

    def prompt(self, row: dict, thinking: bool) -> str:
        prompt = self.processor.apply_chat_template(
            messages(thinking), add_generation_prompt=True, tokenize=False
        )
        tokens = int(row["image_grid_thw"].prod() // self.processor.image_processor.merge_size**2)
        return prompt.replace("<|image_pad|>", "<|image_pad|>" * tokens)

    def text(self, row: dict) -> tuple[str, str]:
        thinking = self.rng.random() < self.thinking
        think = f"<think>{reasoning(row['name'], row['strength'], row['place'])}</think>" if thinking else ""
        return self.prompt(row, thinking), f"{think}{answer(row['strength'], self.rng)}<|im_end|>"

    def __call__(self, rows: list[dict]) -> dict:
        prompts, answers = zip(*map(self.text, rows))
        tokenizer = self.processor.tokenizer
        batch = tokenizer([p + a for p, a in zip(prompts, answers)], padding=True, return_tensors="pt")
        ids, mask = batch.input_ids, batch.attention_mask
        lengths = torch.tensor([len(tokenizer(a).input_ids) for a in answers])
        position = torch.arange(ids.shape[1])  # padding is on the left: answers end at the right border
        labels = ids.masked_fill(position < ids.shape[1] - lengths[:, None], -100)
        kinds = (ids == self.processor.image_token_id).long()
        return _stack(rows) | dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, labels=labels)


def _train(
    model: nn.Module,
    stream: DistortionStream,
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
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        weight_decay=0.01,
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
    output: str | Path, steps: tuple[int, int] = (2400, 700), batch: int = 32, seed: int = 0
) -> Path:
    """Make the embedded policy again and return the folder of its fp16 checkpoint.

    Two stages of `steps` optimizer steps: the vision tower alone, then the language model on what the tower
    sees. Resumes where it stopped; `output` receives config.yaml, see/, speak/ (checkpoints, log.csv) and
    policy/. Raises ValueError for a folder that was begun with another batch or seed.
    """
    output, settings = Path(output), {"batch": batch, "seed": seed}
    if last_checkpoint(output / "see"):
        same_settings(output, settings)
    save_settings(output, settings)
    model, processor = build_policy(corpus(), seed)
    rows = [row for row, _ in zip(DistortionStream(processor, seed, procedural=1.0), range(64))]
    start_from_energies(model, _stack(rows)["pixel_values"])
    torch.manual_seed(seed)
    tower, collate = Perception(model.model.visual), Answers(processor, seed)
    _train(
        tower,
        DistortionStream(processor, seed + 1),
        perception_batch,
        output / "see",
        steps[0],
        batch,
        1e-3,
        seed,
    )
    model.model.visual.requires_grad_(False)
    save_native_names(model)
    _train(
        model, DistortionStream(processor, seed + 2), collate, output / "speak", steps[1], batch, 1e-3, seed
    )
    model.half().save_pretrained(output / "policy")
    processor.save_pretrained(output / "policy")
    return output / "policy"
