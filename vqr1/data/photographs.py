"""The photographs that come with the project, and which of them train, validate and test."""

from pathlib import Path

import pandas as pd
from PIL import Image

from vqr1.places import EMBEDDED


def photograph_splits(root: str | Path = EMBEDDED) -> pd.Series:
    """Return the split of every photograph in root/photos.csv, by its name in the order of the file.

    >>> photograph_splits().value_counts().to_dict()
    {'train': 49, 'test': 24, 'val': 8}
    """
    return pd.read_csv(Path(root) / "photos.csv", dtype=str).set_index("image")["split"]


def photographs(*splits: str) -> dict[str, Image.Image]:
    """Return the RGB photographs of some splits, whole, by name.

    >>> len(photographs("val")), photographs("val")["photos/calf.jpg"].size
    (8, (512, 384))
    """
    names = photograph_splits()
    return {name: Image.open(EMBEDDED / name).convert("RGB") for name in names[names.isin(splits)].index}
