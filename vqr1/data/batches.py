"""Rows of rated pictures as TRL trains on them: a dataset of prompts and pictures, and batches of one set."""

import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from vqr1.data.comparisons import PairTable, names_of
from vqr1.prompts import messages

if TYPE_CHECKING:
    import datasets


class PromptTransform:
    """The dataset's transform: adds prompt and picture to a batch when it is read.

    datasets pickles its transforms to hash them, at every ``select``. This one pickles to a token, not to
    hundreds of megabytes: copies in one process (and its forks) share the pictures.
    """

    def __init__(self, images: Sequence[Image.Image], prompt: Callable[[], list[dict]]):
        self.images, self.prompt, self.token = images, prompt, uuid.uuid4().hex
        _LIVE[self.token] = self

    def __call__(self, batch: dict) -> dict:
        if "prompt" in batch:
            batch["prompt"] = [self.prompt() for _ in batch["prompt"]]
        if "image" in batch:
            batch["image"] = [self.images[i] for i in batch["image"]]
        return batch

    def __reduce__(self):
        return _same_transform, (self.token,)


_LIVE: weakref.WeakValueDictionary[str, PromptTransform] = weakref.WeakValueDictionary()


def _same_transform(token: str) -> PromptTransform:
    if token not in _LIVE:
        raise RuntimeError("the pictures of prompt_rows stay in their process; use dataloader_num_workers=0")
    return _LIVE[token]


def prompt_rows(
    frame: pd.DataFrame,
    images: Sequence[Image.Image],
    thinking: bool = True,
    numbered: bool = False,
    compared: Iterable[str] = (),
) -> "datasets.Dataset":
    """Return the rows as TRL's GRPOTrainer takes them: columns prompt, image, mos, dataset, name and uid.

    frame: rows of `load_ratings`, N of them.
    images: their N pictures (`pictures_of`).
    thinking: whether the prompt asks for reasoning first.
    numbered: whether it gives the picture a number, as the official code does.
    compared: data sets that are learned from comparisons; their rows need no mos.

    Pictures and messages are put in by a transform when a row is read: all repeats of a row share one
    picture, nothing is encoded, and the image placeholder stays ``{"type": "image"}`` (Arrow would fill the
    keys of its neighbours in with None). uid is the row's position in ``frame``; it survives ``select`` and
    ``shuffle``. name is what comparisons call the picture (`names_of`). Raises ValueError when the lengths
    differ or a mos is missing.
    """
    from datasets import Dataset  # slow to import; the worker processes of `render_rows` do without

    if len(frame) != len(images):
        raise ValueError(
            f"{len(frame)} rows but {len(images)} images; pass render_rows(frame) of the same frame"
        )
    needy = ~frame["dataset"].isin(list(compared))
    unrated = frame.index[frame["mos"].isna() & needy]
    if len(unrated):
        raise ValueError(
            f"row {unrated[0]} (counted from 0) has no mos; learn its set from comparisons (setting "
            "comparisons), or leave it out: rows rated by dominance cannot be trained on"
        )
    uid = list(range(len(frame)))
    mos, dataset = frame["mos"].astype(float).tolist(), frame["dataset"].astype(str).tolist()
    name = names_of(frame).astype(str).tolist()
    columns = {"prompt": uid, "image": uid, "mos": mos, "dataset": dataset, "name": name, "uid": uid}
    return Dataset.from_dict(columns).with_transform(
        PromptTransform(images, partial(messages, thinking, numbered))
    )


def one_set_batches(
    frame: pd.DataFrame,
    images_per_batch: int,
    seed: int,
    epochs: int = 1,
    comparisons: Mapping[str, pd.DataFrame] | None = None,
) -> list[int]:
    """Return row positions in an order in which each batch holds a single data set.

    frame: rows with a column dataset.
    images_per_batch: at least 2.
    seed: of the order.
    epochs: how often each row comes; each epoch is shuffled anew, within sets and among batches.
    comparisons: data set -> its pairs, as `vqr1.rewards.RankingReward` takes them. A batch of such a set
        grows along them: a random picture, then pictures that were compared with one of the batch, as long as
        there are any that the epoch has not had, then another random picture.

    Use it in ``dataset.select(order)`` with ``GRPOConfig(shuffle_dataset=False, num_train_epochs=1)``.
    Scores of different data sets are never compared: a mixed batch would waste comparisons. Rows that do
    not fill a batch are left out of that epoch. Raises ValueError for fewer than two images per batch, for
    a set smaller than a batch, and for a row that no comparison of its set mentions.

    >>> frame = pd.DataFrame({"dataset": list("aaabbbb")})
    >>> order = one_set_batches(frame, 2, seed=0)
    >>> sorted(map(str, frame["dataset"].iloc[order[::2]])), len(order)
    (['a', 'b', 'b'], 6)
    """
    if images_per_batch < 2:
        raise ValueError(f"images_per_batch is {images_per_batch}: ranking compares pictures, use at least 2")
    sets = frame.groupby("dataset", sort=True).indices
    for name, rows in sets.items():
        if len(rows) < images_per_batch:
            raise ValueError(
                f"set {name!r} has {len(rows)} rows, fewer than the {images_per_batch} images of a batch; "
                "lower per_device_train_batch_size (images x num_generations) or leave the set out; "
                "`vqr1 train --set` makes the batch fit"
            )
    rng = np.random.default_rng(seed)
    partners = {
        name: _partners(frame, sets[name], PairTable(pairs, name))
        for name, pairs in (comparisons or {}).items()
        if name in sets
    }
    chunks = [chunk for _ in range(epochs) for chunk in _one_epoch(sets, partners, images_per_batch, rng)]
    return [int(row) for chunk in chunks for row in chunk]


def _one_epoch(
    sets: dict[str, np.ndarray],
    partners: dict[str, list[np.ndarray]],
    size: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    chunks = []
    for name, rows in sets.items():
        whole = len(rows) // size * size
        mixed = rows[_grown(partners[name], size, rng)] if name in partners else rng.permutation(rows)
        chunks.append(mixed[:whole].reshape(-1, size))
    return list(rng.permutation(np.concatenate(chunks)))


def _partners(frame: pd.DataFrame, rows: np.ndarray, table: PairTable) -> list[np.ndarray]:
    """Return, for each row of a set, which of these rows people compared it with (places in ``rows``)."""
    codes = table.codes(names_of(frame).iloc[rows], rows.tolist())
    place = np.full(len(table.names), -1)
    place[codes] = np.arange(len(rows))
    near = (place[table.compared_with(code)] for code in codes)
    return [found[found >= 0] for found in near]


def _grown(partners: list[np.ndarray], size: int, rng: np.random.Generator) -> list[int]:
    """Return all places in an order in which each chunk of ``size`` grows along compared pairs."""
    free, order = np.ones(len(partners), bool), []
    for n in range(len(partners)):
        if n % size == 0:
            near = np.zeros(len(partners), bool)
        choice = np.flatnonzero(near & free)
        order.append(int(rng.choice(choice if len(choice) else np.flatnonzero(free))))
        free[order[-1]] = False
        near[partners[order[-1]]] = True
    return order


def realigned(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with each data set's mos stretched linearly, lowest to 1, highest to 5; std to scale.

    Regression on several sets needs one scale; the official code does this to its label files
    (datasets/make_data.py). It assumes that the worst and the best picture of every set look alike. Raises
    ValueError for a set without two different mos.

    >>> rows = pd.DataFrame({"dataset": list("aabbb"), "mos": [3, 5, 0, 25, 100], "std": 0.5})
    >>> realigned(rows)[["mos", "std"]].to_numpy().T.tolist()
    [[1.0, 5.0, 1.0, 2.0, 5.0], [1.0, 1.0, 0.02, 0.02, 0.02]]
    """
    sets = frame.groupby("dataset")["mos"]
    low, span = sets.transform("min"), sets.transform("max") - sets.transform("min")
    if not (span > 0).all():
        name = frame["dataset"][~(span > 0)].iloc[0]
        raise ValueError(f"set {name!r} has no two different mos to stretch to 1..5; leave it out")
    return frame.assign(mos=1 + 4 * (frame["mos"] - low) / span, std=frame["std"] * 4 / span)
