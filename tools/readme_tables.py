"""Write the pages' result tables again from data/runs/*.csv: `python tools/readme_tables.py`. A test fails
while they disagree.

A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`, on one page or several.
"""

import re
import sys
from functools import partial
from pathlib import Path

import pandas as pd

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
    return pd.read_csv(RUNS / f"{name}.csv", comment="#")


def interval(row: pd.Series) -> str:
    """Return a difference and its 95% interval as text."""
    return f"{row['difference']:+.3f} [{row['lo']:.3f}, {row['hi']:.3f}]"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def gains(study: str) -> str:
    """The rated sets before and after RL to rank; gains over seeds and photographs, and each seed's SRCC."""
    rows, differences = read(study), read(f"{study}-differences").set_index(["set", "statistic"])
    lines = []
    for name in ("sim-kadid", "sim-unseen"):
        total, within = differences.loc[name, "srcc"], differences.loc[name, "srcc_within_level"]
        each = rows[(rows["variant"] == "ranking") & (rows["set"] == name)].sort_values("seed")["srcc"]
        lines.append(
            [
                f"`{name}`",
                f"{total['mean_than']:.3f}",
                f"**{total['mean']:.3f}** ({', '.join(f'{value:.3f}' for value in each)})",
                interval(total),
                f"{within['mean_than']:.3f} → {within['mean']:.3f}",
                interval(within),
            ]
        )
    return markdown(
        ["set", "SRCC before", "SRCC after (each seed)", "gain", "within-level SRCC", "gain"], lines
    )


def pretraining() -> str:
    """The demo's training from a second pretraining, by the paper's reward and bounded; each seed's SRCC."""
    rows = read("pretraining-long").sort_values("seed")
    rows["cell"] = rows["srcc"].map("{:.3f}".format).where(rows["srcc"].notna(), "left the scale")
    cells = rows.groupby(["set", "variant"])["cell"].agg(", ".join).unstack()
    lines = [[f"`{name}`", *cells.loc[name, ["before", "ranking", "bounded"]]] for name in cells.index]
    return markdown(["set", "SRCC before", "SRCC after, each seed", "with `bounded: true`"], lines)


def comparison() -> str:
    """Every variant of the comparison, by its SRCC."""
    rows, differences = (
        read("comparison"),
        read("comparison-differences").set_index(["variant", "set", "statistic"]),
    )
    by = rows.groupby(["variant", "set"]).agg(
        {"seed": "count", "srcc": "mean", "srcc_within_level": "mean", "family": "mean", "seconds": "mean"}
    )
    lines = []
    for name, row in (
        by.xs("sim-kadid", level="set").sort_values("srcc", ascending=False, kind="stable").iterrows()
    ):
        than = interval(differences.loc[name, "sim-kadid", "srcc"]) if name != "ranking" else ""
        numbers = [
            f"{row['srcc']:.3f}",
            f"{row['srcc_within_level']:.3f}",
            than,
            f"{by.loc[(name, 'sim-unseen'), 'srcc']:.3f}",
        ]
        more = [
            f"{row['family']:.0%}" if row["family"] == row["family"] else "",
            f"{row['seconds']:.0f}" if row["seconds"] == row["seconds"] else "",
        ]
        lines.append(
            [
                name if name != "ranking" else "**ranking** (the paper's reward)",
                f"{row['seed']:.0f}",
                *numbers,
                *more,
            ]
        )
    return markdown(
        [
            "variant",
            "seeds",
            "SRCC",
            "within-level",
            "minus ranking",
            "SRCC `sim-unseen`",
            "family named",
            "CPU s",
        ],
        lines,
    )


def mixture() -> str:
    """What training on three sets gives on each."""
    rows, differences = (
        read("mixture"),
        read("mixture-differences").set_index(["variant", "set", "statistic"]),
    )
    sets = list(dict.fromkeys(rows["set"]))
    lines = []
    for name in dict.fromkeys(rows["variant"]):
        own = rows[rows["variant"] == name]
        mean = own.groupby("set")["srcc"].mean()
        than = [interval(differences.loc[name, which, "srcc"]) if name != "mixture" else "" for which in sets]
        cells = [f"{mean[which]:.3f}" + (f" ({text})" if text else "") for which, text in zip(sets, than)]
        lines.append([name, str(own["seed"].nunique()), *cells, f"{mean.mean():.3f}"])
    return markdown(["trained on", "seeds", *(f"`{name}` (minus mixture)" for name in sets), "mean"], lines)


def step() -> str:
    """Seconds of one GRPO step by part, in TRL's stock way and with what K answers share computed once."""
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
    return markdown(
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
    """How time and memory of a step that shares grow with each quantity."""
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
    return markdown(["quantity", "from → to", "seconds", "exponent", "MB at the peak", "exponent"], lines)


TABLES = {
    "demo": partial(gains, "demo"),
    "pretraining-long": pretraining,
    "pretraining": partial(gains, "pretraining"),
    "comparison": comparison,
    "mixture": mixture,
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
