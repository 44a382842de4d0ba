"""Set before anything imports torch or the Hub: offline, quiet, few threads, the same every time."""

import csv
import os
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))  # tiny models: more is slower

# The same examples in every run, and no deadline: a slow machine is not a failure.
settings.register_profile("vqr1", derandomize=True, deadline=None)
settings.load_profile("vqr1")


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """The first test photograph of data/photos.csv, RGB, 512x384 or 384x512."""
    with open(ROOT / "data" / "photos.csv", newline="", encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["split"] == "test")
    with Image.open(ROOT / "data" / row["image"]) as image:
        return image.convert("RGB")
