"""Evaluate a policy: score the rows of rated sets, and put agreement, intervals and oracles into a table."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from vqr1.calibration import Calibration, calibrate
from vqr1.data.comparisons import PairTable, names_of
from vqr1.data.manifests import (
    UNRATED,
    RenderedImages,
    dominance_pairs,
    has_comparisons,
    load_comparisons,
    load_ratings,
)
from vqr1.data.observers import oracle_scores
from vqr1.data.public_sets import PER_CONTENT
from vqr1.distortions import FAMILIES, true_strength
from vqr1.metrics import content_agreement, difference, srcc, srcc_by, summarize
from vqr1.policy import policy_path
from vqr1.prompts import format_ok, named_distortions, named_severity
from vqr1.scoring import Score, Scorer

EVALUATION_SETS = ("sim-kadid", "sim-unseen", "sim-mixed")
STATISTICS = (("srcc", srcc, ["mos"]), ("srcc_within_level", srcc_by, ["mos", "level"]))
"""Statistics that `gain` compares: name, function, its columns after the scores."""
FAMILY = {name: family for family, names in FAMILIES.items() for name in names}


class Rows(NamedTuple):
    """Rows of a manifest, their pictures, and what people said of their pairs, if they were asked.

    The pictures are rendered, or paths where nothing is. In ``frame.attrs``, pandas would copy every picture
    at nearly every step.
    """

    frame: pd.DataFrame
    images: Sequence[Image.Image | Path]
    pairs: pd.DataFrame | None = None

    def take(self, places: Sequence[int]) -> "Rows":
        """Return the rows at these places, in this order, with their pictures; pairs stay as they are."""
        images = [self.images[place] for place in places]
        return Rows(self.frame.iloc[places].reset_index(drop=True), images, self.pairs)


def evaluation_rows(
    names=EVALUATION_SETS, split: str = "test", limit: int | None = None, root: str | Path | None = None
) -> dict[str, Rows]:
    """Return each set's rows of a split, with their pictures and comparisons.

    Args:
        names: sets, or paths of manifests.
        split: "train", "val", "test", or "all" for every row.
        limit: at most so many rows of each set, a fixed sample; whole contents where ratings are per content.
        root: folder of the public sets, as for `load_ratings`.

    Raises:
        ValueError: a set has no rows of this split, or people said nothing about them.
    """
    found = {}
    for name in names:
        frame = load_ratings(name, root)
        rows = frame[frame["split"] == split] if split != "all" else frame
        if rows.empty:
            raise ValueError(
                f"set {str(name)!r} has no rows with split {split!r}; "
                f"it has {sorted(frame['split'].unique())}"
            )
        rows = _sample(rows, limit) if limit and limit < len(rows) else rows
        rows = rows.reset_index(drop=True)
        pairs = _pairs_of(name, root, rows)
        if rows["mos"].isna().all() and pairs is None and protocol(rows) != "dominance":
            raise ValueError(
                f"set {str(name)!r}: no row with split {split!r} has a mos, and nobody compared two of them; "
                "give them ratings, or comparisons with each other"
            )
        found[str(name)] = Rows(rows, _images_of(rows), pairs)
    return found


def _pairs_of(name: str | Path, root: str | Path | None, rows: pd.DataFrame) -> pd.DataFrame | None:
    """Return the comparisons of these rows with each other, or None if there are none."""
    if not has_comparisons(name):
        return None
    pairs, names = load_comparisons(name, root), set(names_of(rows))
    pairs = pairs[pairs["first"].isin(names) & pairs["second"].isin(names)]
    return pairs if len(pairs) else None


def _sample(rows: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Return a fixed sample, in order; where ratings are per content, the first whole contents that fit."""
    if protocol(rows) != "per content":
        return rows.sample(limit, random_state=0).sort_index()
    mixed = rows.sample(frac=1, random_state=0)["reference"].drop_duplicates()
    upto = rows["reference"].value_counts()[mixed].cumsum()
    return rows[rows["reference"].isin([*mixed.iloc[:1], *upto.index[upto <= limit]])]


def _images_of(rows: pd.DataFrame) -> Sequence[Image.Image | Path]:
    """Return the rows' pictures; paths where nothing is rendered: a public set would not fit into memory."""
    if rows["seed"].isna().all() and (rows["crop"] == "").all():
        return [Path(rows.attrs["root"]) / image for image in rows["image"]]
    return RenderedImages(rows)


def score_frame(scorer: Scorer, rows: Rows, label: str = "scoring") -> pd.DataFrame:
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
    """Tell whether the answer has the format.

    An expected score (it has a `mass`) keeps its answer up to the number, so the number is put in.
    """
    if not score.answers or math.isnan(score.mass):
        return bool(score.answers) and format_ok(score.answers[0], thinking)
    return not score.error and format_ok(f"{score.answers[0]}{score.score:.2f}</answer>", thinking)


def protocol(frame: pd.DataFrame) -> str:
    """Return how scores of these rows are judged, by their data sets.

    "pooled": by correlation with MOS over all rows. "per content": within each content, which has a scale of
    its own. "dominance": nobody rated them, and some pairs have a known order.

    >>> protocol(pd.DataFrame({"dataset": ["sim-mixed"]})), protocol(pd.DataFrame({"dataset": ["bid"]}))
    ('dominance', 'pooled')
    """
    names = set(frame["dataset"])
    if names <= set(UNRATED):
        return "dominance"
    return "per content" if names <= set(PER_CONTENT) else "pooled"


def agreement(table: pd.DataFrame, pairs: pd.DataFrame | None = None) -> dict[str, float]:
    """Return one result row for scored rows, by their `protocol`.

    Args:
        table: from `score_frame`.
        pairs: people's comparisons of these rows, as in `Rows`.

    Returns:
        pooled: `summarize`, and srcc_SUBSET, the SRCC within each subset if the set has any.
        per content: srcc and plcc are means over contents, their pooled values have columns of their own,
        and there is no fit.
        dominance: the share of pairs in the right order.
        with pairs: pairs_right, the share of decided pairs that the scores order as most people do.
        In both shares ties of the scores count half, and a pair with an unparseable answer is wrong.
    """
    row = _AGREEMENT[protocol(table)](table)
    if pairs is None:
        return row
    compared = PairTable(pairs, table["dataset"].iloc[0])
    return row | {"pairs_right": compared.right(table["score"], names_of(table))}


def _pooled(table: pd.DataFrame) -> dict[str, float]:
    subsets = table.groupby("subset") if "subset" in table else ()
    return summarize(table) | {f"srcc_{name}": srcc(part["score"], part["mos"]) for name, part in subsets}


def _per_content(table: pd.DataFrame) -> dict[str, float]:
    return summarize(table) | content_agreement(table) | {"plcc_fit": math.nan}


def _dominance(table: pd.DataFrame) -> dict[str, float]:
    pairs = dominance_pairs(table)
    better, worse = table["score"].to_numpy()[pairs.T]
    return {
        "rows": len(table),
        "unparseable": int(table["score"].isna().sum()),
        "photographs": table["reference"].nunique(),
        "dominance": _mean((better > worse) + 0.5 * (better == worse)),
    }


_AGREEMENT = {"pooled": _pooled, "per content": _per_content, "dominance": _dominance}


def oracles(frame: pd.DataFrame) -> dict[str, dict]:
    """Return the result rows of two oracles: one knows type and level, the other the level alone."""
    names = "oracle: type and level", "oracle: level"
    return {name: summarize(frame.assign(score=score)) for name, score in zip(names, oracle_scores(frame))}


def naming(table: pd.DataFrame) -> dict[str, float]:
    """Return how often the reasoning names what was done to the picture.

    It counts rows where that is easy to see: levels 3-5, and 1 and 5 for mean shift and contrast change,
    whose level 3 is (nearly) the original. Rows without a single known distortion are left out.

    Args:
        table: columns distortion, level and reasoning.

    Returns:
        named_rows: how many these are; family, exact, severity: the shares that are right; texts: how many
        different ones there are.
    """
    rows = table[table["distortion"].isin(FAMILY)]
    signed = rows["distortion"].isin(["mean_shift", "contrast_change"])
    level = rows["level"].astype(int)
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
    """Return the paired gains in SRCC and within-level SRCC, each with its 95% interval over photographs.

    Args:
        after: scored rows.
        before: the same rows in the same order, scored by another policy.

    Raises:
        ValueError: they are not the same rows.
    """
    same = ["reference", "mos", "level"]
    both = after[same].reset_index(drop=True)
    if not both.equals(before[same].reset_index(drop=True)):
        alone = sorted(map(str, set(after["reference"]) ^ set(before["reference"])))[:5]
        where = f"; in one of them only: {', '.join(alone)}" if alone else ""
        raise ValueError(
            f"a gain needs the same rows in the same order; "
            f"these are {len(after)} and {len(before)} others{where}"
        )
    both = both.assign(after=after["score"].to_numpy(), before=before["score"].to_numpy())
    row = {}
    for name, statistic, columns in STATISTICS:
        found = difference(both, ["after"], ["before"], statistic, columns)
        gained, low, high = (found[key] for key in ("difference", "lo", "hi"))
        row |= {f"{name}_gain": gained, f"{name}_gain_lo": low, f"{name}_gain_hi": high}
    return row


def evaluate(
    policy, sets: dict[str, Rows], estimates=("expected",), modes=(True, False), seed: int = 0, **settings
) -> tuple[pd.DataFrame, dict]:
    """Score every set by every estimate, thinking and not.

    Args:
        policy: what `Scorer` takes.
        sets: from `evaluation_rows`.
        estimates: of the Scorer.
        modes: thinking (True), not thinking (False).
        seed: of sampled answers.
        settings: others of the Scorer.

    Returns:
        (result rows, scored tables). An average over the rated sets follows for each estimate and mode;
        tables are keyed by (set, estimate, thinking).
    """
    rows, tables = [], {}
    asked = Scorer(policy, modes[0], estimates[0], seed=seed, **settings)
    for thinking in modes:
        for estimate in estimates:
            scorer = asked.with_(thinking=thinking, estimate=estimate)
            for name, own in sets.items():
                table = score_frame(
                    scorer, own, f"{name}, {estimate}, {'thinking' if thinking else 'non-thinking'}"
                )
                tables[name, estimate, thinking] = table
                row = {"set": name, "estimate": estimate, "thinking": thinking}
                rows.append(row | agreement(table, own.pairs))
    result = pd.DataFrame(rows)
    rated = result[result["srcc"].notna()] if "srcc" in result else result.iloc[:0]
    if rated["set"].nunique() > 1:
        averaged = ["srcc", "srcc_within_level", "plcc", "plcc_fit"]
        means = rated.groupby(["estimate", "thinking"], sort=False)[averaged].mean().reset_index()
        result = pd.concat([result, means.assign(set="average")], ignore_index=True)
    return result, tables


def calibrate_policy(
    policy: str | Path,
    rated: str | Path | pd.DataFrame,
    split: str = "val",
    limit: int | None = None,
    root: str | Path | None = None,
    **settings,
) -> Calibration:
    """Score rated pictures, fit the policy's error bars to them, and keep these in the policy's folder.

    From then on `Scorer(policy)` has intervals and calibrated probabilities, wherever it scores with the same
    settings. Pictures whose answer cannot be parsed are left out: they get no score, nor an interval.

    Args:
        policy: a shipped one, or a folder.
        rated: a set's name, the path of a manifest, or rows of `load_ratings`, which are all taken.
        split: of a set; not the one that the policy was trained on, where it errs less.
        limit: at most so many rows, a fixed sample.
        root: folder of the public sets, as for `load_ratings`.
        settings: of the `Scorer`, as ``thinking``.

    Returns:
        What is in calibration.json now.

    Raises:
        ValueError: as of `calibrate`; the policy has no folder; there is no MOS on one scale; a picture
            cannot be read.
    """
    folder = policy_path(policy)
    if not folder.is_dir():
        raise ValueError(f"{policy} is no folder that could keep a calibration; save the policy in one first")
    if isinstance(rated, pd.DataFrame):
        rows = Rows(rated, _images_of(rated))
    else:
        rows = evaluation_rows([rated], split, limit, root)[str(rated)]
    if protocol(rows.frame) != "pooled" or rows.frame["mos"].isna().any():
        raise ValueError(
            f"the rows of {rows.frame['dataset'].iloc[0]} have no MOS on one scale; give a set that has"
        )
    scorer = Scorer(policy, **settings)
    table = score_frame(scorer, rows)
    if failed := unread(table):
        raise ValueError(failed[0])
    calibration = calibrate(table[table["score"].notna()], scorer.settings())
    calibration.save(folder)
    return calibration


def save_scores(tables: dict, folder: Path) -> None:
    """Write every scored table as CSV: SET.ESTIMATE.thinking.csv or SET.ESTIMATE.plain.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for (name, estimate, thinking), table in tables.items():
        mode = "thinking" if thinking else "plain"
        table.to_csv(folder / f"{Path(name).stem}.{estimate}.{mode}.csv", index=False)
