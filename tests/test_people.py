"""RL to rank on people's ratings, on the part of BIQ2021 that is there; skipped where there is none."""

from pathlib import Path

import pandas as pd
import pytest

from vqr1.config import load_config
from vqr1.data.manifests import load_ratings
from vqr1.evaluation import agreement
from vqr1.metrics import srcc
from vqr1.records import read_table
from vqr1.scoring import Scorer
from vqr1.training import train


@pytest.fixture(scope="module")
def rated(real_sets) -> pd.DataFrame:
    """Return the rows of BIQ2021 whose pictures are there, each picture by its absolute path."""
    rows = load_ratings("biq2021", real_sets, strict=False)
    return rows.assign(image=[str(Path(rows.attrs["root"]) / image) for image in rows["image"]])


@pytest.mark.slow
def test_ten_live_steps_on_peoples_ratings(rated, tmp_path):
    """The validation part may not be there: a few training pictures stand in for it."""
    rows = rated[rated["split"] == "train"].sample(180, random_state=0)
    rows = rows.assign(split=["val"] * 20 + ["train"] * 160, dataset="part")
    rows.to_csv(tmp_path / "part.csv", index=False)
    short = {"max_steps": 10, "per_device_train_batch_size": 24, "logging_steps": 1, "save_strategy": "no"}
    settings = load_config("people").changed(
        sets=[str(tmp_path / "part.csv")], validation={"rows": 20, "every": 10}, grpo=short
    )
    train(settings, tmp_path / "run")
    log = read_table(tmp_path / "run" / "log.csv")
    assert log["step"].max() == 10 and log["format"].dropna().min() > 0.8
    assert log["val_srcc"].dropna().between(-1, 1).all() and log["val_srcc"].notna().sum() >= 2


@pytest.mark.slow
def test_the_shipped_ranker_orders_peoples_pictures(rated):
    rows = rated[rated["split"] == "test"].reset_index(drop=True)
    scores = Scorer().score(rows["image"])
    assert not any(score.error for score in scores)
    found = agreement(rows.assign(score=[score.score for score in scores]))
    sizes = [Path(path).stat().st_size for path in rows["image"]]
    assert found["srcc"] > 0.55 > srcc(sizes, rows["mos"])
