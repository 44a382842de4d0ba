"""What given policies see, say and know of their errors; nothing is trained.

    vqr1 study eyes --root FOLDER     # a ridge on the frozen vision tower, on BIQ2021's validation rows
    vqr1 study words                  # flaws named right, one by one, on pictures with up to three
    vqr1 study error-bars --root FOLDER    # scores with their spread, on BIQ2021's validation and test rows

The first two look at validation pictures alone; test rows are for final tables.
"""

import math
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from vqr1.calibration import THURSTONE, calibrate, coverage, reliability
from vqr1.evaluation import Rows, evaluation_rows, score_frame
from vqr1.experiments.baselines import tower_features
from vqr1.experiments.school import Picture, PictureStream
from vqr1.metrics import bootstrap, srcc
from vqr1.places import EMBEDDED
from vqr1.policy import as_policy
from vqr1.prompts import named_distortions, named_severity
from vqr1.records import write_table
from vqr1.scoring import Scorer

PENALTIES = (10, 30, 100, 300, 1000, 3000)
"""Of the ridge; one is chosen on a fifth of the training rows."""
SHOWN = {256: 0.5, 512: 0.5}
"""Largest sides of the pictures whose flaws are to be named, px -> share; a licensed photograph has 384."""


def ridge(features: np.ndarray, mos: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Return the weights (D,) and the constant of a ridge regression.

    features: (N, D), standardised here; the weights are for the given scale.
    mos: (N,).

    >>> weights, constant = ridge(np.array([[0.0], [1.0], [2.0]]), np.array([1.0, 2.0, 3.0]), 1e-9)
    >>> round(float(weights[0]), 3), round(float(constant), 3)
    (1.0, 1.0)
    """
    center, scale = features.mean(0), features.std(0) + 1e-6
    x = (features - center) / scale
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (mos - mos.mean())) / scale
    return weights, float(mos.mean() - center @ weights)


def ridge_scores(seen: np.ndarray, mos: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Return the scores (M,) of unseen pictures by a ridge, its penalty chosen on a fifth of the seen.

    seen: (N, D) features of rated pictures, in random order.
    mos: (N,) their ratings.
    unseen: (M, D).
    """
    part = len(seen) * 4 // 5
    held = [seen[part:] @ ridge(seen[:part], mos[:part], penalty)[0] for penalty in PENALTIES]
    best = PENALTIES[int(np.argmax([srcc(scores, mos[part:]) for scores in held]))]
    weights, constant = ridge(seen, mos, best)
    return unseen @ weights + constant


def eyes(policies: Sequence[str], root: str | Path | None = None, rows: int = 3000) -> pd.DataFrame:
    """Write data/runs/eyes.csv: how much of people's ratings a ridge reads off each policy's frozen tower.

    policies: names or paths, as for `load_policy`.
    root: of BIQ2021, as for `load_ratings`.
    rows: of the training part, a fixed sample; the SRCC is of the validation part, whole pictures.
    """
    train = evaluation_rows(["biq2021"], "train", rows, root)["biq2021"]
    val = evaluation_rows(["biq2021"], "val", None, root)["biq2021"]
    order = np.random.default_rng(0).permutation(len(train.frame))
    results = []
    for policy in policies:
        seen, unseen = (_features(policy, part) for part in (train, val))
        scores = ridge_scores(seen[order], train.frame["mos"].to_numpy()[order], unseen)
        table = val.frame.assign(score=scores)
        low, high = bootstrap(table, srcc)
        row = {
            "policy": policy,
            "rows": len(table),
            "srcc": srcc(scores, table["mos"]),
            "lo": low,
            "hi": high,
        }
        subsets = {f"srcc_{name}": srcc(part["score"], part["mos"]) for name, part in table.groupby("subset")}
        results.append(row | subsets)
    return _written("eyes", results, 0)


def _features(policy: str, rows: Rows) -> np.ndarray:
    return tower_features(as_policy(policy), rows.images).numpy()


def words(policies: Sequence[str], count: int = 300, seed: int = 99) -> pd.DataFrame:
    """Write data/runs/words.csv: how many flaws each policy names right on pictures like its school's.

    policies: names or paths, as for `load_policy`.
    count: of pictures.
    seed: of the pictures and their flaws.

    found: share of the flaws of strength 2 or more that are named; true: share of the named flaws that are
    there; sound: share of the pictures without a flaw that are called so; texts: share of different texts.
    The pictures come from validation photographs and, some, from procedural ones.
    """
    stream = PictureStream(seed, SHOWN, splits=("val",))
    pictures = list(islice(chain.from_iterable(stream), count))
    results = []
    for policy in policies:
        scorer = Scorer(policy, thinking=True, estimate="greedy")
        scores = scorer.score([Image.fromarray(picture.pixels) for picture in pictures])
        texts = [score.reasoning for score in scores]
        results.append({"policy": policy, "pictures": len(pictures)} | named_right(pictures, texts))
    return _written("words", results, seed)


def error_bars(policies: Sequence[str], root: str | Path | None = None) -> pd.DataFrame:
    """Write data/runs/error-bars.csv.gz: BIQ2021's validation and test rows as each policy scores them.

    policies: names or paths, as for `load_policy`; they think first.
    root: of BIQ2021, as for `load_ratings`.

    Notebook 03 calibrates on the validation rows and looks whether the test rows bear it out. Returns the
    shares that it finds, a row for each policy: `held_by_spread`, of test pictures whose MOS, stretched to
    1..5, is within 1.96 spreads of the score; `held`, of those in the calibrated 95% interval; `gap` and
    `right`: the largest gap of ten bins of calibrated preference, and the share of pairs in order that it
    gives at least 0.95.
    """
    columns = ["policy", "split", "image", "dataset", "reference", "mos", "score", "score_std"]
    tables, found = [], []
    for policy in policies:
        scorer = Scorer(policy, thinking=True)
        own = {
            split: score_frame(scorer, evaluation_rows(["biq2021"], split, None, root)["biq2021"], policy)
            for split in ("val", "test")
        }
        tables += [table.assign(policy=policy, split=split)[columns] for split, table in own.items()]
        found.append({"policy": policy} | _honesty(own["val"], own["test"]))
    path = EMBEDDED / "runs" / "error-bars.csv.gz"
    write_table(path, pd.concat(tables, ignore_index=True), 0, "%.6g")
    return pd.DataFrame(found)


def _honesty(val: pd.DataFrame, test: pd.DataFrame) -> dict[str, float]:
    calibration = calibrate(val)
    pairs = reliability(calibration, test)
    sure = pairs[pairs["predicted"] >= 0.95]
    return {
        "held_by_spread": coverage(THURSTONE, test.assign(mos=1 + 4 * test["mos"])),
        "held": coverage(calibration, test),
        "gap": float(pairs["gap"].max()),
        "right": float(np.average(sure["observed"], weights=sure["pairs"])) if len(sure) else math.nan,
    }


def named_right(pictures: Sequence[Picture], texts: Sequence[str]) -> dict[str, float]:
    """Return the shares that `words` writes, for pictures whose flaws are known and a text on each.

    A share of nothing is NaN.
    """
    truths = [{flaw.name: flaw.strength for flaw in picture.flaws} for picture in pictures]
    named = [named_distortions(text) for text in texts]
    found = [name in names for truth, names in zip(truths, named) for name in truth if truth[name] > 1]
    true = [name in truth for truth, names in zip(truths, named) for name in names]
    clean = [not names and named_severity(text) == 0 for names, text in zip(named, texts)]
    sound = [said for truth, said in zip(truths, clean) if not truth]
    shares = {"found": found, "true": true, "sound": sound}
    shares = {name: float(np.mean(values)) if values else math.nan for name, values in shares.items()}
    return shares | {"flaws": len(found), "named": len(true), "texts": len(set(texts)) / len(texts)}


def _written(name: str, rows: list[dict], seed: int) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    write_table(EMBEDDED / "runs" / f"{name}.csv", table, seed)
    return table
