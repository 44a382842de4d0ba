"""The scorer held against people on SRIJ: 32 originals, each shrunk and enlarged again in 19 ways.

    vqr1 study srij --root FOLDER --variants tiny-policy people-ranker

PSNR and SSIM stand beside it. They compare a picture with its original; the scorer sees the picture alone.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqr1.data.images import open_picture
from vqr1.evaluation import Rows, evaluation_rows, score_frame
from vqr1.experiments.yardstick import likeness
from vqr1.metrics import bootstrap, difference, srcc
from vqr1.places import EMBEDDED
from vqr1.records import write_table
from vqr1.scoring import Scorer

RIVALS = ("psnr", "ssim")
AN_ORIGINALS_PSNR = 200.0
"""In dB: above all others, for it is infinite, and has to have a rank."""


def srij(policies: Sequence[str], root: str | Path | None = None) -> pd.DataFrame:
    """Write data/runs/srij.csv: how well policies, PSNR and SSIM order SRIJ's pictures as people do.

    It writes srij-ways.csv too: people's mean rating of each way, and every yardstick's mean.

    policies: names or paths, as for `load_policy`; they think first.
    root: of SRIJ, as for `load_ratings`.

    Returns the table of `against_people`.
    """
    rows = whole_contents(evaluation_rows(["srij"], "all", root=root)["srij"])
    table = with_likeness(rows)
    for policy in policies:
        table[policy] = score_frame(Scorer(policy, thinking=True), rows, policy)["score"]
    found = against_people(table, policies)
    write_table(EMBEDDED / "runs" / "srij.csv", found)
    ways = table.groupby(["distortion", "level"], as_index=False)[["mos", *policies, *RIVALS]].mean()
    write_table(EMBEDDED / "runs" / "srij-ways.csv", ways)
    return found


def whole_contents(rows: Rows) -> Rows:
    """Return the rows of the contents that have all their pictures, as a mean over contents needs them."""
    size = rows.frame.groupby("reference")["image"].transform("size")
    return rows.take(np.flatnonzero(size == size.max()))


def with_likeness(rows: Rows) -> pd.DataFrame:
    """Return the rows with psnr (dB) and ssim of every picture against its content's original.

    The original is the row without a distortion. It has `AN_ORIGINALS_PSNR`, and an SSIM of 1.
    """
    frame, found = rows.frame, np.empty((len(rows.frame), 2))
    for content, places in frame.groupby("reference").indices.items():
        originals = [place for place in places if frame["distortion"].iloc[place] == ""]
        if len(originals) != 1:
            raise ValueError(f"content {content!r} has {len(originals)} originals, not 1; get the set again")
        original = open_picture(rows.images[originals[0]])
        for place in places:
            found[place] = likeness(open_picture(rows.images[place]), original)
    return frame.assign(psnr=np.minimum(found[:, 0], AN_ORIGINALS_PSNR), ssim=found[:, 1])


def against_people(table: pd.DataFrame, policies: Sequence[str]) -> pd.DataFrame:
    """Return how well yardsticks order pictures as people do: a row per order and yardstick.

    Args:
        table: rows with reference (the content), distortion ("" for an original), level, mos (people's
            scores), psnr, ssim, and a column of scores for every policy.
        policies: names of these columns.

    Returns:
        order: "within contents": SRCC over a content's pictures, its original among them, mean over contents;
            "ways": SRCC of the ways' mean scores over contents, without originals.
        variant: the yardstick.
        contents, rows, unparseable: how many there are.
        srcc, srcc_lo, srcc_hi: with its 95% bootstrap interval over scenes: two or three contents show one.
        minus_psnr, minus_ssim, each with _lo and _hi: how far a policy is above the rival, paired by scene.
            Those of the ways are rough: resampled means are noisier, and their SRCC is lower.
    """
    yardsticks = [*policies, *RIVALS]
    table = table.assign(scene=table["reference"].map(scene))
    within = pd.DataFrame(
        [
            {"reference": content, "scene": scene(content)}
            | {name: srcc(own[name], own["mos"]) for name in yardsticks}
            for content, own in table.groupby("reference")
        ]
    )
    ways = table[table["distortion"] != ""]
    ways = ways.assign(way=ways.groupby(["distortion", "level"]).ngroup())
    rows = []
    for order, scored, own, statistic, columns in (
        ("within contents", table, within, np.mean, []),
        ("ways", ways, ways, ways_srcc, ["mos", "way"]),
    ):
        for name in yardsticks:
            low, high = bootstrap(own, statistic, [name, *columns], by="scene")
            row = {
                "order": order,
                "variant": name,
                "contents": own["reference"].nunique(),
                "rows": len(scored),
                "unparseable": int(scored[name].isna().sum()),
                "srcc": float(statistic(*(own[column].to_numpy() for column in (name, *columns)))),
                "srcc_lo": low,
                "srcc_hi": high,
            }
            for rival in RIVALS if name in policies else ():
                gap = difference(own, [name], [rival], statistic, columns, by="scene")
                row |= {f"minus_{rival}{end}": gap[key] for end, key in GAP.items()}
            rows.append(row)
    return pd.DataFrame(rows)


def scene(content: str) -> str:
    """Return the scene that a content shows: the first word of its name.

    >>> scene("globe1"), scene("globe-fast2"), scene("tea-bottles1")
    ('globe', 'globe', 'tea')
    """
    return re.match("[^0-9-]*", content)[0]


GAP = {"": "difference", "_lo": "lo", "_hi": "hi"}


def ways_srcc(score: np.ndarray, mos: np.ndarray, way: np.ndarray) -> float:
    """Return Spearman's correlation of the ways' mean scores with their mean MOS.

    score, mos: (N,); a picture whose score is NaN takes no part.
    way: (N,) whole numbers from 0.

    >>> ways_srcc(np.array([1.0, 3, 4, 4]), np.array([50.0, 50, 20, 90]), np.array([0, 0, 1, 1]))
    1.0
    """
    there = np.isfinite(score)
    with np.errstate(invalid="ignore"):  # a way without any score has no mean
        score, mos = (
            np.bincount(way[there], values[there]) / np.bincount(way[there]) for values in (score, mos)
        )
    return srcc(score, mos)
