"""The paper's Table 2, zero-shot on eight sets, beside what was measured here; cost beside its Table 5."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from vqr1.data.manifests import EMBEDDED, data_root
from vqr1.data.public_sets import PUBLIC_SETS
from vqr1.evaluation import Rows, agreement, evaluation_rows, save_scores, score_frame, unread
from vqr1.metrics import bootstrap, plcc
from vqr1.policy import as_policy
from vqr1.records import machine_line, markdown, read_table
from vqr1.scoring import Scorer

NAMES = ("bid", "clive", "koniq-10k", "spaq", "liu13", "sriqa-bench", "min19", "agiqa-3k")
"""The sets of Table 2, in its order."""
GIB = 2**30


def published(table: int) -> pd.DataFrame:
    """Return the rows of the paper's Table 2 or 5, author-reported.

    >>> published(2).query("metric == 'srcc' and method == 'VisualQuality-R1'")["koniq-10k"].item()
    0.83
    """
    return read_table(EMBEDDED / f"table{table}.csv")


def found_sets(root: str | Path | None, limit: int | None = None) -> tuple[dict[str, Rows], dict[str, str]]:
    """Return (rows of the sets that are there, why each other one is not run).

    All splits are taken: the paper tests zero-shot.
    """
    root, sets, missing = root or data_root(), {}, {}
    for name in NAMES:
        try:
            sets |= evaluation_rows([name], "all", limit, root)
        except (FileNotFoundError, ValueError) as error:  # not there, or not as published
            missing[name] = str(error)
    return sets, missing


def measure(
    policy,
    sets: dict[str, Rows],
    estimates=("expected",),
    modes=(True, False),
    out: Path | None = None,
    **settings,
) -> pd.DataFrame:
    """Return one row per set, estimate and mode: agreement with intervals, and what it cost.

    Args:
        policy: what `Scorer` takes.
        sets: rows with their pictures, by name.
        estimates: of the Scorer.
        modes: thinking (True), not thinking (False).
        out: folder that gets the scores as soon as a set is done.
        settings: others of the Scorer.

    Returns:
        Columns of `evaluation.agreement`, and:
        seconds: per picture.
        memory: GiB, torch's peak on the GPU during the set, or without a GPU the process's peak until then.
        unread: how many pictures cannot be read.
    """
    asked, rows = Scorer(policy, modes[0], estimates[0], **settings), []
    for thinking in modes:
        for estimate in estimates:
            scorer = asked.with_(thinking=thinking, estimate=estimate)
            for name, own in sets.items():
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                table = score_frame(scorer, own, f"{name}, {_mode(thinking)}, {estimate}")
                cost = {"seconds": (time.perf_counter() - start) / len(table), "memory": peak_memory()}
                low, high = bootstrap(table, plcc)  # a set per content has an interval of its own
                row = {
                    "set": name,
                    "thinking": thinking,
                    "estimate": estimate,
                    "plcc_lo": low,
                    "plcc_hi": high,
                }
                rows.append(row | agreement(table, own.pairs) | cost | {"unread": len(unread(table))})
                if out:
                    save_scores({(name, estimate, thinking): table}, out)
    return pd.DataFrame(rows)


def peak_memory() -> float:
    """Return GiB: torch's peak on the GPU since its last reset, else the process's peak."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    import resource  # not on Windows

    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB
    )


def side_by_side(measured: pd.DataFrame, metric: str, label: str) -> pd.DataFrame:
    """Return Table 2 for a metric, the paper's rows first, the mean over the measured sets last."""
    sets = [name for name in NAMES if name in set(measured["set"])]
    paper = published(2).query("metric == @metric")
    rows = [
        {"method": f"paper: {row['method']}"}
        | {name: f"{row[name]:.3f}" for name in NAMES}
        | {"mean of 8": f"{row['mean']:.3f}", f"mean of {len(sets)} measured": f"{row[sets].mean():.3f}"}
        for _, row in paper.iterrows()
    ]
    for (thinking, estimate), group in measured.groupby(["thinking", "estimate"], sort=False):
        cells = {
            row["set"]: _number(row[metric], row[f"{metric}_lo"], row[f"{metric}_hi"])
            for _, row in group.iterrows()
        }
        mean = _number(
            group[metric].mean(skipna=False)
        )  # an undefined set makes the mean undefined, not better
        means = {f"mean of {len(sets)} measured": mean} | (
            {"mean of 8": mean} if len(sets) == len(NAMES) else {}
        )
        rows.append({"method": f"measured: {label}, {_mode(thinking)}, {estimate}"} | cells | means)
    table = pd.DataFrame(rows).fillna("")
    return table if len(sets) < len(NAMES) else table.drop(columns=f"mean of {len(NAMES)} measured")


def _number(value: float, *interval: float) -> str:
    if pd.isna(value):
        return "undefined"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _mode(thinking: bool) -> str:
    return "thinking" if thinking else "non-thinking"


def cost(measured: pd.DataFrame, label: str, parameters: int) -> pd.DataFrame:
    """Return Table 5's parameters, seconds per picture and memory, the paper's rows first."""
    rows = [
        {
            "method": f"paper: {row.method}",
            "parameters": row.parameters,
            "seconds": f"{row.seconds:.2f}",
            "memory": f"{row.memory:.4g} G",
        }
        for row in published(5).itertuples()
    ]
    for (thinking, estimate), group in measured.groupby(["thinking", "estimate"], sort=False):
        seconds = (group["seconds"] * group["rows"]).sum() / group["rows"].sum()
        rows.append(
            {
                "method": f"measured: {label}, {_mode(thinking)}, {estimate}",
                "parameters": f"{parameters / 1e6:,.2f}M",
                "seconds": f"{seconds:.3f}",
                "memory": f"{group['memory'].max():.2f} GiB",
            }
        )
    return pd.DataFrame(rows)


def table2(
    policy,
    root: str | Path | None = None,
    estimates=("expected",),
    limit: int | None = None,
    out: str | Path | None = None,
    quantize: bool | None = None,
    pixels: Sequence[int] | None = None,
    **settings,
) -> str:
    """Measure a policy on the sets of Table 2 that are below ``root``, and return the report in Markdown.

    policy: name, path or (model, processor).
    limit: at most so many rows of each set.
    out: a folder for the scores, the report and measured.csv.
    quantize, pixels: as for `load_policy`.
    settings: others of the Scorer; the engine is that of transformers.

    Raises FileNotFoundError when none of the sets is there.
    """
    sets, missing = found_sets(root, limit)
    if not sets:
        raise FileNotFoundError(
            f"none of the sets of Table 2 can be read: {missing[NAMES[0]]} "
            "(`vqr1 data --list` says where each is)"
        )
    policy = as_policy(policy, quantize, pixels)
    measured = measure(policy, sets, estimates, out=Path(out) if out else None, **settings)
    report = _report(measured, missing, Path(policy.name).name, policy.model.num_parameters(), limit)
    if out:
        (Path(out) / "table2.md").write_text(report, encoding="utf-8")
        measured.to_csv(Path(out) / "measured.csv", index=False)
    return report


def _report(
    measured: pd.DataFrame, missing: dict[str, str], label: str, parameters: int, limit: int | None
) -> str:
    order = [
        "set",
        "thinking",
        "estimate",
        "rows",
        "unparseable",
        "unread",
        "srcc",
        "srcc_lo",
        "srcc_hi",
        "plcc",
        "plcc_lo",
        "plcc_hi",
        "plcc_fit",
        "srcc_pooled",
        "plcc_pooled",
        "seconds",
        "memory",
    ]
    sample = f" At most {limit} rows of each set: a sample, not comparable with the paper." if limit else ""
    not_run = "\n".join(f"- {name} ({PUBLIC_SETS[name].title}): {why}" for name, why in missing.items())
    parts = [
        "# Table 2 of the paper, and what was measured here",
        'Rows that start with "paper:" are its authors\' (arXiv 2505.14460 v2, Tables 2 and 5; '
        "data/table2.csv, data/table5.csv). "
        f"Measured: {label}; {machine_line(0)}.{sample}",
        "In brackets: 95% bootstrap intervals over references. PLCC is raw, plcc_fit after the 4-parameter "
        "logistic; the paper does not say which it has. sriqa-bench is evaluated per content, as it is "
        "scaled; pooled values are in the last table. A set that the policy was trained on is not zero-shot.",
        "## SRCC",
        markdown(side_by_side(measured, "srcc", label)),
        "## PLCC",
        markdown(side_by_side(measured, "plcc", label)),
        "## Cost per picture",
        markdown(cost(measured, label, parameters)),
        "The paper's: 512x384 pixels, hardware not restated. Measured: reading included, pictures of each "
        "set as they are; memory: peak of the "
        f"{'GPU' if torch.cuda.is_available() else 'whole process'}.",
        "## Measured, set by set",
        "unparseable: rows without a score, left out of the correlations; unread, among them: pictures that "
        "cannot be read (error in the score tables).",
        markdown(measured.reindex(columns=order).dropna(axis=1, how="all")),
        "## Not run",
        not_run or "None: all eight were there.",
    ]
    return "\n\n".join(parts) + "\n"
