"""Rivals of RL to rank: classical measures, a small CNN, the policy's vision tower, supervised fine-tuning.

All but the classical measures learn from the same rows, as a regressor of the MOS or as a ranker of pairs.
``vqr1 pretrain --cnn`` (`pretrain_cnn`) makes the small CNN again.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from vqr1 import quiet
from vqr1.data.batches import one_set_batches
from vqr1.data.manifests import CROP, EMBEDDED, open_picture
from vqr1.experiments.pretraining import (
    NAMING,
    naming_loss,
    pool_tokens,
    prompt_text,
    see_tokens,
    strengths,
    taught,
)
from vqr1.experiments.school import RECIPES, Picture, PictureStream
from vqr1.experiments.tiny import dct_basis
from vqr1.policy import base_of
from vqr1.records import write_table
from vqr1.scoring import Scorer
from vqr1.thurstone import comparative_probability, fidelity, true_preference
from vqr1.training import freeze

with quiet():
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer, TrainingArguments


CNN = EMBEDDED / "cnn" / "model.safetensors"
"""The pretrained CNN."""


# Classical measures


def file_size(paths: Sequence[Path]) -> np.ndarray:
    """Return the bytes of picture files, (N,): sharp pictures compress less, so a score has to beat this."""
    return np.array([path.stat().st_size for path in paths])


def opened(images: Iterable[Image.Image | Path]) -> Iterator[Image.Image]:
    """Yield pictures; those that are given as paths are read from disk, one after another."""
    return (image if isinstance(image, Image.Image) else open_picture(image) for image in images)


def brisque(images: Iterable[Image.Image | Path]) -> np.ndarray:
    """Return minus BRISQUE (Mittal et al., 2012), (N,), higher is better.

    It regresses LIVE's opinions on statistics of natural scenes: about 0 for a natural photograph, -100 for
    a bad picture. The parameters are those of the package ``brisque``.
    """
    measure = _classical("brisque").BRISQUE()
    scale = measure.scale_features
    measure.scale_features = lambda features: scale(
        [np.ravel(feature)[0] for feature in features]
    )  # some are arrays of one number
    return np.array([-measure.score(np.asarray(image)) for image in opened(images)])


def piqe(images: Iterable[Image.Image | Path]) -> np.ndarray:
    """Return minus PIQE (Venkatanath et al., 2015), (N,), -100..0, higher is better.

    It measures blockiness and noise of active blocks, without opinions or learned parameters. A picture
    without any active block gets the worst value.
    """
    measure = _classical("pypiqe").piqe
    return np.array([-measure(np.asarray(image))[0] for image in opened(images)])


def _classical(package: str) -> ModuleType:
    """Return a package of the extra "notebooks"; ValueError, saying what to do, where it is missing."""
    try:
        return import_module(package)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        remedy = (
            "pip install 'vqr1[notebooks]'; where libGL.so.1 is missing: apt-get install libgl1, "
            "or pip uninstall opencv-python and pip install opencv-python-headless"
        )
        raise ValueError(f"{package} cannot be imported ({reason}): {remedy}") from error


# A small CNN


class SmallCNN(nn.Module):
    """Four convolutions, the mean and the maximum of their maps, a linear layer: 92 thousand weights.

    Takes any picture size. The first layer starts as DCT filters and gives magnitudes, as the vision tower
    started from local energies.
    """

    def __init__(self, outputs: int = 1):
        super().__init__()
        layers = [nn.Conv2d(3, 24, 8, stride=2, padding=3, bias=False), nn.BatchNorm2d(24), Magnitude()]
        for ins, outs in ((24, 40), (40, 64), (64, 88)):
            layers += [
                nn.Conv2d(ins, outs, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outs),
                nn.ReLU(),
            ]
        layers[0].weight.data = dct_filters()
        self.maps, self.head = nn.Sequential(*layers), nn.Linear(2 * 88, outputs)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        maps = self.maps(pixels.contiguous(memory_format=torch.channels_last))  # (B, 88, H / 16, W / 16)
        return self.head(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))  # (B, outputs)


class Magnitude(nn.Module):
    """The absolute value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs()


def dct_filters() -> torch.Tensor:
    """Return 8 x 8 DCT filters of an RGB picture, (24, 3, 8, 8): 16 frequencies of luma, 4 of each chroma."""
    basis = dct_basis(8)
    colors = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))
    chosen = [
        (color, u, v)
        for color, waves in zip(colors, ((0, 1, 3, 7), (0, 3), (0, 3)))
        for u in waves
        for v in waves
    ]
    return torch.tensor(
        np.array([np.multiply.outer(color, np.outer(basis[u], basis[v])) for color, u, v in chosen]),
        dtype=torch.float32,
    )


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """Return RGB pictures as (B, 3, H, W) in -1..1, cut around their middles to the smallest W and H.

    >>> pixels([Image.new("RGB", (96, 64)), Image.new("RGB", (64, 80))]).shape
    torch.Size([2, 3, 64, 64])
    """
    size = np.min([image.size for image in images], axis=0)
    cut = [image.crop((*((image.size - size) // 2), *((image.size - size) // 2 + size))) for image in images]
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(model: nn.Module, losses: Iterable[torch.Tensor], steps: int, lr: float) -> None:
    """Take an AdamW step on each of `steps` losses; the rate rises for a tenth of them, then falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def pretrain_cnn(
    school: Sequence[Path] = (),
    output: Path = CNN,
    log: Path = EMBEDDED / "runs" / "pretrain-cnn.csv",
    steps: int = 400,
    batch: int = 16,
    lr: float = 2e-3,
    every: int = 50,
    seed: int = 0,
) -> None:
    """Teach the CNN to name flaws and the strongest one's strength, as the tower; write weights in fp16.

    Args:
        school: authentic photographs, as for `pretraining.pretrain`.
        output: file of the weights.
        log: table of the loss, and of `naming_accuracy` on 256 such pictures of the validation photographs.
        steps: optimizer steps.
        batch: sources per step; `RECIPES` pictures come from each.
        lr: highest learning rate.
        every: steps between two rows of the log.
        seed: of weights and pictures.
    """
    torch.manual_seed(seed)
    model = SmallCNN(NAMING)
    stream = iter(PictureStream(seed + 1, {CROP: 1.0}, school=school, sources=batch))
    unseen = PictureStream(seed + 2, {CROP: 1.0}, sources=256 // RECIPES, splits=("val",))
    unseen = flawed(next(iter(unseen)))
    start, rows, fast = time.time(), [], torch.cpu.get_capabilities().get("avx512_bf16", False)

    def losses():
        for step in range(1, steps + 1):
            seen, strength = flawed(next(stream))
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                logits = model(seen)
            loss = naming_loss(logits.float(), strength)
            yield loss
            if step % every == 0:
                rows.append({"step": step, "pictures": step * len(seen), "loss": loss.item()})
                rows[-1] |= naming_accuracy(model, *unseen)
                rows[-1]["seconds"] = round(time.time() - start, 1)
                write_table(log, pd.DataFrame(rows), seed)

    fit(model, losses(), steps, lr)
    output.parent.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict().items()
    save_file({name: own.half() if own.is_floating_point() else own for name, own in weights}, output)


def flawed(pictures: list[Picture]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pixels (B, 3, H, W) of pictures of one size, and the strengths (B, F) of their flaws."""
    shown = pixels([Image.fromarray(picture.pixels) for picture in pictures])
    return shown, torch.stack([strengths(picture.flaws) for picture in pictures])


def naming_accuracy(model: nn.Module, seen: torch.Tensor, strength: torch.Tensor) -> dict[str, float]:
    """Return how often the likeliest name is right, "none" among them, and the likeliest strength.

    seen: (B, 3, H, W).
    strength: (B, F) as from `strengths`; every flaw that is there is a right name, and the strength is the
        strongest one's.
    """
    model.eval()
    with torch.no_grad():
        logits = model(seen)
    model.train()
    strongest = strength.amax(1, keepdim=True)
    right = torch.cat([strongest == 0, strength > 0], 1)  # (B, 1 + F)
    named = right.gather(1, logits[:, :-6].argmax(1, keepdim=True))
    told = logits[:, -6:].argmax(1, keepdim=True) == strongest
    return {"type_accuracy": named.float().mean().item(), "strength_accuracy": told.float().mean().item()}


def load_cnn() -> SmallCNN:
    """Return the pretrained CNN with a new head of one output."""
    model = SmallCNN()
    stored = {name: tensor for name, tensor in load_file(CNN).items() if not name.startswith("head.")}
    model.load_state_dict(stored, strict=False)
    return model


def train_cnn(
    frame: pd.DataFrame,
    images: Sequence[Image.Image],
    *,
    ranker: bool,
    steps: int,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
) -> SmallCNN:
    """Return the pretrained CNN, all weights trained on rated rows; ranker and errors: `rating_losses`."""
    torch.manual_seed(seed)
    model = load_cnn()
    nn.init.constant_(model.head.bias, frame["mos"].mean())
    losses = rating_losses(
        lambda rows: model(pixels([images[i] for i in rows])), frame, ranker, steps, batch, seed
    )
    fit(model, losses, steps, lr)
    return model


def score_cnn(model: SmallCNN, images: Iterable[Image.Image | Path]) -> np.ndarray:
    """Return the scores (N,) of pictures of any size."""
    with torch.no_grad():
        return np.array([model(pixels([image])).item() for image in opened(images)])


# The policy's own vision tower


def tower_features(policy: tuple, images: Iterable[Image.Image | Path]) -> torch.Tensor:
    """Return what the policy's vision tower sees, pooled, (N, 2 * width)."""
    model, processor = policy
    visual = base_of(model).model.visual
    prepared = (processor.image_processor(images=[image], return_tensors="pt") for image in opened(images))
    with torch.no_grad():
        seen = [pool_tokens(see_tokens(visual, **one.to(model.device))) for one in prepared]
    return torch.cat(seen).cpu()


def train_head(
    policy: tuple,
    frame: pd.DataFrame,
    images: Sequence[Image.Image],
    *,
    ranker: bool,
    steps: int,
    batch: int = 16,
    lr: float = 3e-3,
    seed: int = 0,
) -> nn.Module:
    """Return a linear head trained on rated rows, on the policy's frozen vision tower: same eyes, no words.

    Each picture is looked at once. 300 steps suffice: on 480 rows of sim-kadid, seed 0, SRCC on 190
    validation rows was 0.64 (regressor) and 0.66 (ranker) after 100 steps, 0.675 (both) after 300. 1000
    steps or lr 1e-3 gained at most 0.005.

    Args:
        policy: whose tower.
        frame: rated rows.
        images: their pictures.
        ranker: pairs or MOS, see `rating_losses`.
        steps: optimizer steps.
        batch: pictures per step.
        lr: highest learning rate.
        seed: of weights and batches.
    """
    torch.manual_seed(seed)
    seen = tower_features(policy, images)
    head = nn.Sequential(nn.BatchNorm1d(seen.shape[1], affine=False), nn.Linear(seen.shape[1], 1))
    nn.init.constant_(head[1].bias, frame["mos"].mean())
    fit(head, rating_losses(lambda rows: head(seen[rows]), frame, ranker, steps, batch, seed), steps, lr)
    return head


def score_head(policy: tuple, head: nn.Module, images: Iterable[Image.Image | Path]) -> np.ndarray:
    """Return the scores (N,) of pictures of any size."""
    with torch.no_grad():
        return head(tower_features(policy, images))[:, 0].numpy()


# Regressor or ranker


def ranking_loss(scores: torch.Tensor, mos: torch.Tensor) -> torch.Tensor:
    """Return 1 - fidelity averaged over all pairs of a one-set batch, by Thurstone's law with variance 1.

    scores, mos: (B,). At best it is a little below 0, due to the fidelity's eps. Source: the loss of UNIQUE
    (Zhang et al., 2021) and LIQE (Zhang et al., 2023).

    >>> ranking_loss(torch.tensor([9.0, 5.0, 1.0]), torch.tensor([3.0, 2.0, 1.0]))
    tensor(-0.0002)
    >>> ranking_loss(torch.zeros(3), torch.tensor([3.0, 2.0, 1.0]))
    tensor(0.2919)
    """
    one = torch.ones_like(scores)
    predicted = comparative_probability(scores[:, None], one, scores, one)[..., 0]  # (B, B)
    pairs = ~torch.eye(len(scores), dtype=torch.bool)
    return (1 - fidelity(true_preference(mos), predicted))[pairs].mean()


def rating_losses(
    predict: Callable[[list[int]], torch.Tensor],
    frame: pd.DataFrame,
    ranker: bool,
    steps: int,
    batch: int,
    seed: int,
) -> Iterator[torch.Tensor]:
    """Yield the losses of `predict(row positions) -> (B, 1)` on `steps` batches of one data set each.

    A ranker's loss is `ranking_loss`, a regressor's the squared error to the MOS.
    Raises ValueError as `one_set_batches` does: for a set with fewer rows than a batch.
    """
    mos = torch.tensor(frame["mos"].to_numpy(), dtype=torch.float32)
    chunks = int((frame["dataset"].value_counts() // batch).sum())
    order = one_set_batches(frame, batch, seed, math.ceil(steps / max(1, chunks)))
    for start in range(0, steps * batch, batch):
        rows = order[start : start + batch]
        scores = predict(rows)[:, 0]
        yield ranking_loss(scores, mos[rows]) if ranker else nn.functional.mse_loss(scores, mos[rows])


# Supervised fine-tuning of the policy


class Opinions:
    """Collate pictures with the thinking prompt, the policy's own reasoning and the MOS.

    All but the prompt carries loss. A picture is read when its turn comes: prepared, all of them would not
    fit into memory.
    """

    def __init__(self, processor, images: Sequence[Image.Image]):
        self.processor, self.images = processor, images

    def text(self, row: dict, grid: torch.Tensor) -> tuple[str, str]:
        prompt = prompt_text(self.processor, grid, thinking=True)
        return prompt, f"{row['reasoning']}{row['mos']:.2f}</answer><|im_end|>"

    def __call__(self, rows: list[dict]) -> dict:
        pictures = [self.images[row["place"]] for row in rows]
        seen = self.processor.image_processor(images=pictures, return_tensors="pt")
        texts = [self.text(row, grid) for row, grid in zip(rows, seen["image_grid_thw"])]
        return dict(seen) | taught(self.processor, texts)


def supervised(
    policy: tuple,
    frame: pd.DataFrame,
    images: Sequence[Image.Image],
    *,
    steps: int,
    batch: int = 16,
    lr: float = 3e-4,
    seed: int = 0,
    adapter: LoraConfig | None = None,
) -> tuple:
    """Return (model, processor) fine-tuned to answer the MOS (1..5) after its own greedy reasoning.

    The reasoning is written once, before training, and learned with the MOS, which holds it in place: with
    the loss on the MOS alone, digits spilled into the reasoning. The vision tower is frozen; all other
    weights, or an adapter's, are trained in place, as by the configuration cpu. Rows whose reasoning reaches
    no answer are left out.
    """
    torch.manual_seed(seed)
    model, processor = policy
    thoughts = Scorer(policy, thinking=True).score(images)
    rows = [
        {"place": place, "reasoning": thought.answers[0], "mos": mos}
        for place, (thought, mos) in enumerate(zip(thoughts, frame["mos"], strict=True))
        if not thought.error
    ]
    freeze(model, ["visual"])
    model = get_peft_model(model, adapter) if adapter else model
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=lr,
            lr_scheduler_type="linear",
            warmup_steps=5,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=Opinions(processor, images))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model, processor
