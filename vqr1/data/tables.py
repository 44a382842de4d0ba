"""Tables as data sets publish them: CSV, text, Excel and MATLAB files, read as strings with file and line.

A table of `csv_columns`, `excel_columns` and `text_columns` has a column ``where`` with each row's file and
line, which `require` names in errors.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd


def require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it belongs to the annotation")


def text_columns(path: Path, fields: tuple[str, ...], separator: str | None = None) -> pd.DataFrame:
    """Return a text file without a header: one row per line, split at ``separator`` (None: white space)."""
    require_file(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from error
    rows = [
        (f"{path}, line {n}", *map(str.strip, line.split(separator)))
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]
    for where, *values in rows:
        if len(values) != len(fields):
            raise ValueError(
                f"{where}: {len(values)} fields; expected {len(fields)}: "
                f"{(separator or ' ').join(fields)}, no header"
            )
    return pd.DataFrame(rows, columns=["where", *fields], dtype=object)


def read_table(path: Path) -> pd.DataFrame:
    """Return a CSV's cells as stripped strings under its unchanged header; the index is the line.

    The CSV is UTF-8 with commas. Blank lines are dropped, and so are columns without a name, which a comma
    at the end of each line makes. Raises ValueError naming file and line for another separator, for a
    column that is there twice, and for a row with more fields than names.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            records = list(_records(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV in UTF-8 with a header ({error}); save it as one") from error
    if not records:
        raise ValueError(f"{path}: not a CSV in UTF-8 with a header (it is empty); save it as one")
    (line, names), *rows = records
    named = [name for name in names if name.strip()]
    for separator, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(named) == 1 and separator in named[0]:
            remedy = "save it with commas (and numbers with a point)"
            raise ValueError(f"{path}, line {line}: fields are separated by {called}; {remedy}")
    for name in named:
        if named.count(name) > 1:
            raise ValueError(f"{path}, line {line}: column {name!r} is there twice; rename one of the two")
    for line, cells in rows:
        if any(cells[len(names) :]):
            remedy = "put quotes around a field that holds a comma"
            raise ValueError(f"{path}, line {line}: {len(cells)} fields under {len(names)} names; {remedy}")
    cells = [(row + [""] * len(names))[: len(names)] for _, row in rows]
    table = pd.DataFrame(cells, index=[line for line, _ in rows], columns=names, dtype=object)
    return table[named]


def _records(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield each row's line in the file, counted from 1, and its cells; a quoted one may hold line breaks."""
    reader, line = csv.reader(lines, strict=True), 1
    for row in reader:
        if any(cell.strip() for cell in row):
            yield line, [cell.strip() for cell in row] if line > 1 else row
        line = reader.line_num + 1


def normalise(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def lacks(name: str, header: Iterable[str]) -> str:
    """Return an error text: the header lacks a column of this name, and which one may be meant.

    >>> print(lacks("mos", ["image", " MOS"]))
    column 'mos' is missing from the header image,  MOS; rename ' MOS' to 'mos'
    """
    like = meant(name, header)
    rename = f"; rename {like!r} to {name!r}" if like else ""
    return f"column {name!r} is missing from the header {', '.join(header)}{rename}"


def meant(name: str, header: Iterable[str]) -> str | None:
    """Return the column that differs from a name in capitals, spaces or punctuation alone, or None."""
    return next((other for other in header if normalise(other) == normalise(name)), None)


def csv_columns(path: Path, **columns: str) -> pd.DataFrame:
    require_file(path)
    table = read_table(path)
    return _pick(path, table, table.index, 1, columns)


def excel_columns(path: Path, sheet: str | int, header: int, **columns: str) -> pd.DataFrame:
    """Return columns of a sheet whose header is on line ``header``, counted from 1."""
    require_file(path)
    try:
        table = pd.read_excel(path, sheet_name=sheet, header=header - 1, dtype=object, engine="openpyxl")
    except ImportError as error:
        remedy = "pip install 'vqr1[excel]'"
        raise ValueError(f"{path}: Excel files are read with openpyxl, which is missing: {remedy}") from error
    except (BadZipFile, ValueError, KeyError) as error:  # no workbook; no such sheet; one without its parts
        raise ValueError(
            f"{path}: not an .xlsx workbook with sheet {sheet!r} ({error}); an old .xls must be saved "
            "as .xlsx"
        ) from error
    return _pick(path, table, range(header + 1, header + 1 + len(table)), header, columns)


def _pick(
    path: Path, table: pd.DataFrame, lines: Iterable[int], header: int, columns: dict[str, str]
) -> pd.DataFrame:
    """Return the columns ``ours=theirs`` as strings, with the line of each row and of the header."""
    table = table.set_axis([str(name).strip() for name in table.columns], axis=1)
    missing = [name for name in columns.values() if name not in table]
    if missing:
        raise ValueError(f"{path}, line {header}: {lacks(missing[0], table.columns)}")
    table = table[list(columns.values())].set_axis(list(columns), axis=1).fillna("").astype(str)
    table = table.apply(lambda column: column.str.strip())
    table.insert(0, "where", [f"{path}, line {line}" for line in lines])
    return table[(table.drop(columns="where") != "").any(axis=1)].reset_index(drop=True)


def matlab_array(path: Path, name: str) -> np.ndarray:
    from scipy.io import loadmat  # slow to import
    from scipy.io.matlab import MatReadError

    require_file(path)
    try:
        return loadmat(path)[name].ravel()
    except (ValueError, TypeError, NotImplementedError, MatReadError) as error:
        raise ValueError(f"{path}: not a MATLAB file ({error})") from error
    except KeyError as error:
        raise ValueError(f"{path}: holds no variable {name}") from error


def require(good: pd.Series, table: pd.DataFrame, column: str, problem: str) -> None:
    """Raise for the first row where ``good`` is false."""
    if not good.all():
        row = table.loc[(~good.astype(bool)).idxmax()]
        raise ValueError(f"{row['where']}: {column} {row[column]!r} {problem}")


def name_parts(table: pd.DataFrame, pattern: str, example: str) -> pd.DataFrame:
    """Return a pattern's named groups in the column name; ValueError for a name unlike the example."""
    parts = table["name"].str.extract(re.compile(pattern, re.IGNORECASE))
    require(parts.notna().all(axis=1), table, "name", f"is not like {example}")
    return parts
