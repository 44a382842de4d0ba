"""Write the pages' result tables again from data/runs/*.csv: `python tools/readme_tables.py`.

A test fails while they disagree. A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`, on
one page or several.
"""

import re
import sys
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from vqr1.metrics import srcc
from vqr1.records import markdown, read_table

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "data" / "runs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data" / "README.md",
    RUNS / "README.md",
    ROOT / "vqr1" / "configs" / "README.md",
    ROOT / "vqr1" / "serving" / "README.md",
    ROOT / "tests" / "benchmarks" / "README.md",
]
"""What people read, the front page first."""


def read(name: str) -> pd.DataFrame:
    """Return a table of data/runs/."""
    return read_table(RUNS / f"{name}.csv")


def digits(value: float) -> str:
    """Return a value with three digits, rounded as pandas rounds in the notebooks: halves to even."""
    return f"{np.round(value, 3):.3f}"


def interval(row: Mapping[str, float]) -> str:
    """Return a difference and its 95% interval as text."""
    difference, low, high = np.round([row["difference"], row["lo"], row["hi"]], 3)
    return f"{difference:+.3f} [{low:.3f}, {high:.3f}]"


def printed(header: list[str], rows: list[list[str]]) -> str:
    """Return rows of cells as a table in Markdown."""
    return markdown(pd.DataFrame(rows, columns=header))


def gains(study: str) -> str:
    """Tabulate the rated sets before and after RL to rank, gains over seeds and photographs, seeds' SRCC."""
    rows, differences = read(study), read(f"{study}-differences").set_index(["set", "statistic"])
    means = rows.groupby(["variant", "set"])[["srcc", "srcc_within_level"]].mean()
    lines = []
    for name in ("sim-kadid", "sim-unseen"):
        each = rows[(rows["variant"] == "ranking") & (rows["set"] == name)].sort_values("seed")["srcc"]
        before, after = means.loc["before", name], means.loc["ranking", name]
        lines.append(
            [
                f"`{name}`",
                digits(before["srcc"]),
                f"**{digits(after['srcc'])}** ({', '.join(map(digits, each))})",
                interval(differences.loc[name, "srcc"]),
                f"{digits(before['srcc_within_level'])} → {digits(after['srcc_within_level'])}",
                interval(differences.loc[name, "srcc_within_level"]),
            ]
        )
    return printed(
        ["set", "SRCC before", "SRCC after (each seed)", "gain", "within-level SRCC", "gain"], lines
    )


SAID = {
    "ranking": "RL to rank",
    "threshold": "RL, Q-Insight's reward",
    "supervised": "supervised fine-tuning",
    "tower ridge": "ridge on the frozen tower",
    "CNN ranker": "a small CNN, trained to rank",
    "CNN regressor": "a small CNN, by squared error",
    "permuted": "control: ratings permuted",
    "format": "control: format alone",
    "before": "before training",
}
"""What pages call a variant of study people."""
FRONT = ("tower ridge", "CNN ranker", "ranking", "permuted", "supervised", "threshold", "file size", "before")
"""Those on the front page."""


def people(only: Collection[str] | None = None) -> str:
    """Tabulate SRCC with people's ratings, best first: of all pictures, and within the subsets.

    only: variants, and the subsets' mean alone; default all, each subset, and the oracle that knows it.
    """
    rows = read("people")
    within = ["srcc_ss01", "srcc_ss02", "srcc_ss03"]
    rows["within"] = rows[within].mean(axis=1)
    means = rows.groupby("variant")[["srcc", "within", *within]].mean().sort_values("within", ascending=False)
    lines = []
    for name, mean in means.iterrows():
        if only and name not in only:
            continue
        each = rows[rows["variant"] == name].sort_values("seed")["srcc"].map(digits)
        seeds = f" ({len(each) if only else ', '.join(each)})" if len(each) > 1 else ""
        total, inside, *parts = map(digits, mean)
        kind, comma, how = name.partition(",")
        cells = [f"{SAID.get(kind, kind)}{comma}{how}", f"{total}{seeds}", f"**{inside}**"]
        lines.append(cells if only else [*cells, *parts])
    if not only:
        scores = read_table(RUNS / "people-scores.csv.gz")
        known = scores.groupby("subset")["mos"].transform("mean")
        lines.append(["oracle: knows only the subset", digits(srcc(known, scores["mos"])), "", "", "", ""])
    if only:
        return printed(["scored by", "SRCC (seeds)", "within subsets"], lines)
    return printed(["scored by", "SRCC (each seed)", "within subsets", "ss01", "ss02", "ss03"], lines)


def comparison() -> str:
    """Tabulate the comparison's variants by SRCC."""
    rows = read("comparison")
    differences = read("comparison-differences").set_index(["variant", "set", "statistic"])
    by = rows.groupby(["variant", "set"]).agg(
        {"seed": "count", "srcc": "mean", "srcc_within_level": "mean", "family": "mean", "seconds": "mean"}
    )
    lines = []
    kadid = by.xs("sim-kadid", level="set").sort_values("srcc", ascending=False, kind="stable")
    for name, row in kadid.iterrows():
        gap = interval(differences.loc[name, "sim-kadid", "srcc"]) if name != "ranking" else ""
        cells = [
            name if name != "ranking" else "**ranking** (the paper's reward)",
            f"{row['seed']:.0f}",
            digits(row["srcc"]),
            digits(row["srcc_within_level"]),
            gap,
            digits(by.loc[(name, "sim-unseen"), "srcc"]),
            f"{row['family']:.0%}" if pd.notna(row["family"]) else "",
            f"{row['seconds']:.0f}" if pd.notna(row["seconds"]) else "",
        ]
        lines.append(cells)
    header = ["variant", "seeds", "SRCC", "within-level", "minus ranking", "SRCC `sim-unseen`"]
    return printed([*header, "family named", "CPU s"], lines)


def mixture(study: str) -> str:
    """Tabulate what training on three sets gives on each: SRCC, and the share of people's pairs in order."""
    rows = read(study)
    differences = read(f"{study}-differences").query("baseline == 'mixture'")
    differences = differences.set_index(["variant", "set", "statistic"])
    columns = [(which, "srcc") for which in rows["set"].unique()]
    if "pairs_right" in rows:
        compared = rows["set"][rows["pairs_right"].notna()].unique()
        columns += [(which, "pairs_right") for which in compared]
    lines = []
    for name in dict.fromkeys(rows["variant"]):
        own = rows[rows["variant"] == name]
        cells = []
        for which, kind in columns:
            mean = own.loc[own["set"] == which, kind].mean()
            gap = f" ({interval(differences.loc[name, which, kind])})" if name != "mixture" else ""
            cells.append(digits(mean) + gap)
        mean = own.groupby("set")["srcc"].mean().mean()
        lines.append([name, str(own["seed"].nunique()), *cells, digits(mean)])
    heads = [f"`{which}`{' pairs right' if kind == 'pairs_right' else ''}" for which, kind in columns]
    return printed(["trained on", "seeds", *(f"{head} (minus mixture)" for head in heads), "mean"], lines)


def srij() -> str:
    """Tabulate how policies, PSNR and SSIM order SRIJ's pictures as people do."""
    rows = read("srij")
    lines = []
    for name, own in rows.groupby("variant", sort=False):
        cells = [name]
        for _, row in own.iterrows():
            cells.append(f"{digits(row['srcc'])} [{digits(row['srcc_lo'])}, {digits(row['srcc_hi'])}]")
            for minus in ("minus_psnr", "minus_ssim"):
                gap = {"difference": row[minus], "lo": row[f"{minus}_lo"], "hi": row[f"{minus}_hi"]}
                cells.append(interval(gap) if pd.notna(row[minus]) else "")
        lines.append(cells)
    heads = ["yardstick"]
    for order in rows["order"].unique():
        heads += [f"SRCC, {order}", "minus PSNR", "minus SSIM"]
    return printed(heads, lines)


STARTS = {
    ("demo", "before"): "the demo: embedded policy",
    ("pretraining", "before"): "the demo from a second pretraining",
    ("comparison", "before"): "the comparison: first embedded policy",
    ("comparison", "before, non-thinking"): "the same, not thinking",
}
"""Study and variant -> where its untrained policy is met."""


def starts() -> str:
    """Tabulate what untrained policies have on the test rows of sim-kadid, by study."""
    lines = []
    for (study, variant), where in STARTS.items():
        rows = read(study)
        row = rows[(rows["variant"] == variant) & (rows["set"] == "sim-kadid")].iloc[0]
        lines.append([where, f"{row['rows']:.0f}", digits(row["srcc"])])
    return printed(["before training, in", "test rows", "SRCC"], lines)


def step() -> str:
    """Tabulate a GRPO step's seconds by part: stock TRL, and with what K answers share computed once."""
    rows = read("step")
    settings = [name for name in dict.fromkeys(rows["setting"]) if name.startswith("embedded")]
    by, lines = rows.set_index(["setting", "part"]), []
    for part in dict.fromkeys(rows["part"]):
        cells = [part]
        for setting in settings:
            row = by.loc[setting, part]
            cells += [
                f"{row['stock']:.2f}",
                f"{row['shared']:.2f}",
                f"{row['stock_over_shared']:.1f}x" if row["unit"] == "s" else "",
            ]
        lines.append(cells)
    return printed(
        [
            "",
            *(
                text
                for setting in settings
                for text in (f"{setting.removeprefix('embedded, ')}: stock", "shared", "ratio")
            ),
        ],
        lines,
    )


def growth() -> str:
    """Tabulate how a sharing step's time and memory grow with each quantity."""
    rows, lines = read("growth"), []
    for axis, own in rows.groupby("axis", sort=False):
        first, last = own.iloc[0], own.iloc[-1]
        cells = [f"{first[key]:.3g} → {last[key]:.3g}" for key in ("seconds", "peak_mb")]
        lines.append(
            [
                axis,
                f"{first['value']:.0f} → {last['value']:.0f}",
                cells[0],
                f"{first['time_exponent']:.2f}",
                cells[1],
                f"{first['memory_exponent']:.2f}",
            ]
        )
    return printed(["quantity", "from → to", "seconds", "exponent", "MB at the peak", "exponent"], lines)


TABLES = {
    "people-front": partial(people, FRONT),
    "people": people,
    "demo": partial(gains, "demo"),
    "pretraining": partial(gains, "pretraining"),
    "starts": starts,
    "comparison": comparison,
    "mixture": partial(mixture, "mixture"),
    "people-mixture": partial(mixture, "people-mixture"),
    "srij": srij,
    "step": step,
    "growth": growth,
}


TABLE = re.compile(r"<!-- table (\S+) -->\n.*?<!-- end \1 -->", re.DOTALL)


def renewed(text: str) -> str:
    """Return a page with every table on it made again; KeyError for a table that nobody makes."""
    return TABLE.sub(
        lambda found: f"<!-- table {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end {found[1]} -->", text
    )


def renew() -> None:
    """Write every page again; exit with the tables that no page has a place for."""
    homeless = set(TABLES)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        homeless -= set(TABLE.findall(text))
        page.write_text(renewed(text), encoding="utf-8")
    if homeless:
        sys.exit(
            f"no page has a place for the tables {', '.join(sorted(homeless))}: "
            "put <!-- table NAME --> and <!-- end NAME --> there"
        )


if __name__ == "__main__":
    renew()
