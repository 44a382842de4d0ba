"""Evaluate a policy: score the rows of rated sets, and put agreement with MOS, intervals and oracles into
one table.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from vqr1.data.manifests import UNRATED, RenderedPictures, dominance_pairs, load_ratings
from vqr1.data.observers import oracle_scores
from vqr1.data.public_sets import PER_CONTENT
from vqr1.distortions import FAMILIES
from vqr1.experiments.pretraining import true_strength
from vqr1.metrics import content_agreement, frame_srcc, frame_within_level_srcc, paired_difference, summarize
from vqr1.prompts import format_ok, named_distortions, named_severity
from vqr1.scoring import Score, Scorer

SETS = ("sim-kadid", "sim-unseen", "sim-mixed")
FAMILY = {name: family for family, names in FAMILIES.items() for name in names}


class Rows(NamedTuple):
    """Rows of a manifest beside their pictures, one per row: rendered, or paths where nothing is rendered.

    Pictures in ``frame.attrs`` would be copied, every one, at nearly every step that pandas makes.
    """

    frame: pd.DataFrame
    images: Sequence[Image.Image | Path]


def evaluation_rows(
    names=SETS, split: str = "test", limit: int | None = None, root: str | Path | None = None
) -> dict[str, Rows]:
    """Return each set's rows of a split, with their pictures.

    split: "all" for every row. limit: at most so many rows of each set, a fixed sample, of whole contents
    where a set is rated per content. root: as for `load_ratings`. Raises ValueError for a set without such
    rows.
    """
    found = {}
    for name in names:
        frame = load_ratings(name, root)
        rows = frame[frame["split"] == split] if split != "all" else frame
        if rows.empty:
            raise ValueError(
                f"set {str(name)!r} has no rows with split {split!r}; it has {sorted(frame['split'].unique())}"
            )
        rows = _sample(rows, limit) if limit and limit < len(rows) else rows
        rows = rows.reset_index(drop=True)
        found[str(name)] = Rows(rows, _pictures(rows))
    return found


def _sample(rows: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Return a fixed sample in order; of sets rated per content the first whole contents, in a fixed order,
    that fit.
    """
    if not rows["dataset"].isin(PER_CONTENT).all():
        return rows.sample(limit, random_state=0).sort_index()
    mixed = rows.sample(frac=1, random_state=0)["reference"].drop_duplicates()
    upto = rows["reference"].value_counts()[mixed].cumsum()
    return rows[rows["reference"].isin([*mixed.iloc[:1], *upto.index[upto <= limit]])]


def _pictures(rows: pd.DataFrame) -> list:
    """Return the rows' pictures; where every one is as it is on disk, their paths: a public set would not
    fit into memory.
    """
    if rows["seed"].isna().all() and (rows["crop"] == "").all():
        return [Path(rows.attrs["root"]) / image for image in rows["image"]]
    return RenderedPictures(rows)


def score_rows(scorer: Scorer, rows: Rows, label: str = "scoring") -> pd.DataFrame:
    """Return the rows with the columns score, score_std, reasoning, answer, well_formed and error added.

    A progress bar with the label goes to stderr meanwhile.
    """
    scores: list[Score] = []
    with tqdm(total=len(rows.images), desc=label, unit=" pictures", dynamic_ncols=True, leave=False) as bar:
        for window in scorer.batches(rows.images):
            scores += window
            bar.update(len(window))
    return rows.frame.assign(
        score=[s.score for s in scores],
        score_std=[s.std for s in scores],
        reasoning=[s.reasoning for s in scores],
        answer=[s.answers[0] if s.answers else "" for s in scores],
        error=[s.error for s in scores],
        well_formed=[_well_formed(s, scorer.thinking) for s in scores],
    )


def unread(table: pd.DataFrame) -> list[str]:
    """Return why pictures of scored rows could not be read: the errors of rows without any answer."""
    return table.loc[(table["answer"] == "") & (table["error"] != ""), "error"].tolist()


def _well_formed(score: Score, thinking: bool) -> bool:
    """Tell whether the answer has the format; that of an expected score is kept up to the number, which has
    a `mass`.
    """
    if not score.answers or math.isnan(score.mass):
        return bool(score.answers) and format_ok(score.answers[0], thinking)
    return not score.error and format_ok(f"{score.answers[0]}{score.score:.2f}</answer>", thinking)


def agreement(table: pd.DataFrame) -> dict[str, float]:
    """Return one result row of scored rows: `summarize`, or for unrated sets the share of dominance pairs
    ordered right.

    Ties count half. A pair with an unparseable answer counts as wrong. Of sets rated per content, srcc and
    plcc are means over contents, their pooled values have columns of their own, and there is no fit. A set
    with subsets has the SRCC within each of them, srcc_SUBSET.
    """
    if table["dataset"].isin(UNRATED).all():
        pairs = dominance_pairs(table)
        score = table["score"].to_numpy()
        better, worse = score[pairs[:, 0]], score[pairs[:, 1]]
        right = (better > worse) + 0.5 * (better == worse)
        return {
            "rows": len(table),
            "unparseable": int(table["score"].isna().sum()),
            "photographs": table["reference"].nunique(),
            "dominance": _mean(right),
        }
    if table["dataset"].isin(PER_CONTENT).all():
        return summarize(table) | content_agreement(table) | {"plcc_fit": math.nan}
    subsets = table.groupby("subset") if "subset" in table else ()
    return summarize(table) | {f"srcc_{name}": frame_srcc(part) for name, part in subsets}


def oracles(frame: pd.DataFrame) -> dict[str, dict]:
    """Return the result rows of the oracle that knows the level alone and of the one that knows type and
    level.
    """
    names = "oracle: type and level", "oracle: level"
    return {name: summarize(frame.assign(score=score)) for name, score in zip(names, oracle_scores(frame))}


def naming(table: pd.DataFrame) -> dict[str, float]:
    """Return how often the reasoning names the right family, the exact distortion, and the right strength;
    and how many texts there are.

    Over rows where it is easy to see: levels 3-5, and 1 and 5 for mean shift and contrast change, whose
    level 3 is (nearly) the original. Rows without a single known distortion are left out.
    """
    rows = table[table["distortion"].isin(FAMILY)]
    signed, level = rows["distortion"].isin(["mean_shift", "contrast_change"]), rows["level"].astype(int)
    rows = rows[np.where(signed, level.isin([1, 5]), level >= 3)]
    named = [(named_distortions(text) or [""])[0] for text in rows["reasoning"]]
    family = [FAMILY.get(name) == FAMILY[truth] for name, truth in zip(named, rows["distortion"])]
    exact = [name == truth for name, truth in zip(named, rows["distortion"])]
    severity = [
        named_severity(text) == true_strength(*cell)
        for text, *cell in zip(rows["reasoning"], rows["distortion"], rows["level"].astype(int))
    ]
    return {
        "named_rows": len(rows),
        "family": _mean(family),
        "exact": _mean(exact),
        "severity": _mean(severity),
        "texts": table["reasoning"].nunique(),
    }


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def gain(after: pd.DataFrame, before: pd.DataFrame) -> dict[str, float]:
    """Return the paired gains in SRCC and within-level SRCC, each with its 95% interval over photographs."""
    row = {}
    for name, statistic in (("srcc", frame_srcc), ("srcc_within_level", frame_within_level_srcc)):
        columns = ["score", "mos", "reference", "level"]
        value, low, high = paired_difference(after[columns], before[columns], statistic)
        row |= {f"{name}_gain": value, f"{name}_gain_lo": low, f"{name}_gain_hi": high}
    return row


def evaluate(
    policy, sets: dict[str, Rows], estimates=("expected",), modes=(True, False), seed: int = 0
) -> tuple[pd.DataFrame, dict]:
    """Return (result rows, scored tables): every set by every estimate, thinking and not.

    policy: what `Scorer` takes; sets: from `evaluation_rows`. Tables are keyed by (set, estimate,
    thinking). An average over the rated sets follows for each estimate and mode.
    """
    rows, tables = [], {}
    pair = policy if isinstance(policy, tuple) else None
    for thinking in modes:
        for estimate in estimates:
            scorer = Scorer(pair or policy, thinking, estimate, seed=seed)
            pair = scorer.model, scorer.processor
            for name, own in sets.items():
                table = score_rows(
                    scorer, own, f"{name}, {estimate}, {'thinking' if thinking else 'non-thinking'}"
                )
                tables[name, estimate, thinking] = table
                rows.append({"set": name, "estimate": estimate, "thinking": thinking} | agreement(table))
    result = pd.DataFrame(rows)
    rated = result[result["srcc"].notna()] if "srcc" in result else result.iloc[:0]
    if rated["set"].nunique() > 1:
        means = (
            rated.groupby(["estimate", "thinking"], sort=False)[
                ["srcc", "srcc_within_level", "plcc", "plcc_fit"]
            ]
            .mean()
            .reset_index()
        )
        result = pd.concat([result, means.assign(set="average")], ignore_index=True)
    return result, tables


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown; numbers with three decimals, empty cells for NaN."""

    def cell(value) -> str:
        if isinstance(value, (float, np.floating)):
            return (
                ""
                if np.isnan(value)
                else f"{value:.3f}"
                if value != int(value) or abs(value) < 10
                else f"{value:.0f}"
            )
        return re.sub(r"[|\n]", " ", str(value))

    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join(
        lines + ["| " + " | ".join(map(cell, row)) + " |" for row in table.itertuples(index=False)]
    )


def save_scores(tables: dict, folder: Path) -> None:
    """Write every scored table as CSV: SET.ESTIMATE.thinking.csv or SET.ESTIMATE.plain.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for (name, estimate, thinking), table in tables.items():
        table.to_csv(
            folder / f"{Path(name).stem}.{estimate}.{'thinking' if thinking else 'plain'}.csv", index=False
        )
