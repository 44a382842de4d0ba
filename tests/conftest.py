"""Make every test run offline, quiet, on few threads and the same each time, before torch is imported."""

import copy
import csv
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models, and `make test` runs two processes

# The same examples in every run, and no deadline: a slow machine is not a failure.
settings.register_profile("vqr1", derandomize=True, deadline=None)
settings.load_profile("vqr1")


LONGEST = (
    "02_qlora_grpo_training.ipynb",
    "03_interactive_evaluation.ipynb",
    "04_multi_dataset_training.ipynb",
    "06_baselines_and_ablations.ipynb",
    "05_measuring_progress.ipynb",
    "test_studies.py",
    "test_cluster.py",
    "test_training.py",
    "test_bulk.py",
    "test_cli.py",
    "test_yardstick.py",
    "test_scoring.py",
)
"""Files that take longest go first, so that no process starts one when the others are done."""


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        if "started" in getattr(item, "fixturenames", ()):  # it starts another interpreter
            item.add_marker("slow")


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a command in a process group, all of which is killed however the test ends."""
    processes = []

    def start(command: list[str], **options) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(
            subprocess.Popen(command, text=True, cwd=ROOT, start_new_session=True, **pipes | options)
        )
        return processes[-1]

    yield start
    for process in processes:
        with process, suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool], subprocess.Popen], None]:
    """Wait for a condition as long as it takes; fail if the process ends before."""

    def wait(condition: Callable[[], bool], process: subprocess.Popen) -> None:
        while not condition():
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """Return the first test photograph of data/photos.csv: RGB, 512x384 or 384x512."""
    with open(ROOT / "data" / "photos.csv", newline="", encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["split"] == "test")
    with Image.open(ROOT / "data" / row["image"]) as image:
        return image.convert("RGB")


@pytest.fixture(scope="session")
def real_sets() -> Path:
    """Return the folder of all or some real sets: VQR1_REAL, else shared/real beside the repository."""
    folder = Path(os.environ.get("VQR1_REAL") or ROOT.parent / "shared" / "real")
    if not folder.is_dir():
        pytest.skip(f"{folder} is no folder: clone real sets (vqr1 data --list), name theirs in VQR1_REAL")
    return folder


@pytest.fixture(scope="session")
def tiny():
    """The embedded policy as `load_policy` gives it, in fp32. Shared: copy the model to change it."""
    import torch

    from vqr1.policy import load_policy

    return load_policy("tiny-policy", dtype=torch.float32)


@pytest.fixture(scope="session")
def untrained():
    """(model, processor) of the embedded policy before any training. Shared: copy the model to change it."""
    from vqr1.experiments.pretraining import corpus
    from vqr1.experiments.tiny import build_policy

    model, processor = build_policy(corpus(), 0)
    return model.eval(), processor


@pytest.fixture(scope="session")
def untrained_folder(untrained, tmp_path_factory) -> Path:
    """The untrained policy as `vqr1 pretrain` saves one, in fp16."""
    model, processor = untrained
    folder = tmp_path_factory.mktemp("untrained")
    copy.deepcopy(model).half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
