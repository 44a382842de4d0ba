"""Score many pictures: blocks of them, their rows, and a file of rows that survives a kill.

A row is written when its picture is scored and never changes. The same command reads what is there, drops
a half-written last row, and goes on with the pictures that have none.
"""

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from vqr1.scoring import Score, Scorer

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

ROW_COLUMNS = (
    "image",
    "score",
    "std",
    "low",
    "high",
    "mass",
    "policy",
    "estimate",
    "k",
    "thinking",
    "engine",
    "quantize",
    "pixels",
    "numbered",
    "max_new_tokens",
    "repetition_penalty",
    "reasoning",
    "note",
    "error",
)
NUMBERS = ("score", "std", "low", "high", "mass")
CSV_HEAD = ",".join(ROW_COLUMNS) + "\n"
TABLE_HEAD = "score          picture\n"
ENDINGS = (".csv", ".jsonl", ".parquet")


def shard(pictures: Sequence[str], which: str, window: int = 1) -> list[str]:
    """Return the i-th of n blocks of pictures, ``which`` = "i/n"; the blocks in order are the whole.

    window: pictures that are batched together. If every block has at least 4 windows, blocks begin where
    windows do (and differ little in size): then even what depends on the rest of a batch is as without
    shards.

    >>> shard("abcdefg", "1/3"), shard("abcdefg", "2/3"), shard("abcdefg", "3/3")
    (['a', 'b'], ['c', 'd'], ['e', 'f', 'g'])
    """
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", which)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise ValueError(f"--shard {which} is not i/n with 1 <= i <= n, as 2/8 for the second of eight")
    step = window if len(pictures) >= 4 * n * window > 0 else 1
    cuts = [len(pictures) if j == n else len(pictures) * j // n // step * step for j in (i - 1, i)]
    return list(pictures[slice(*cuts)])


def score_rows(scorer: Scorer, pictures: Sequence[str], settings: dict) -> Iterator[list[dict]]:
    """Yield rows (`ROW_COLUMNS`) in the order of the pictures, as many at a time as the scorer gives."""
    names = iter(pictures)
    for scores in scorer.batches(pictures):
        yield [_row(next(names), score, settings) for score in scores]


def _row(name: str, score: Score, settings: dict) -> dict:
    numbers = {key: getattr(score, key) for key in NUMBERS}
    texts = {key: utf8_name(getattr(score, key)) for key in ("reasoning", "note", "error")}
    return (
        {"image": utf8_name(name)}
        | {key: None if math.isnan(x) else round(x, 4) for key, x in numbers.items()}
        | settings
        | texts
    )


def utf8_name(text: str) -> str:
    r"""Return a file's name as UTF-8 can hold it: bytes of another encoding are written as ``\xe9``.

    >>> print(utf8_name(os.fsdecode(b"caf\xe9.png")), utf8_name("café.png"))
    caf\xe9.png café.png
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def to_table(rows: Iterable[dict]) -> str:
    """Return rows as a person reads them: score and error bar, picture, then its note and reasoning.

    The error bar is the 95% interval, or where that is unknown the spread.

    >>> row = dict.fromkeys(ROW_COLUMNS, "") | {"image": "a.png", "score": 4.1234, "std": 0.256}
    >>> row |= dict.fromkeys(("low", "high"))
    >>> print(to_table([row, row | {"image": "b.png", "score": None, "error": "b.png is missing"}]), end="")
    4.12 ± 0.26    a.png
    none           b.png is missing
    >>> print(to_table([row | {"low": 3.42, "high": 4.71}]), end="")
    4.12 (3.4-4.7) a.png
    """
    return "".join(map(_line, rows))


def _line(row: dict) -> str:
    if row["error"]:
        named = row["error"] if row["image"] in row["error"] else f"{row['image']}: {row['error']}"
        return f"{'none':<15}{named}\n"
    score = f"{row['score']:.2f}"
    if row["low"] is not None:
        score += f" ({row['low']:.1f}-{row['high']:.1f})"
    elif row["std"] is not None:
        score += f" ± {row['std']:.2f}"
    note = f" ({row['note']})" if row["note"] else ""
    reasoning = "".join(f"\n{'':15}{line}" for line in row["reasoning"].splitlines())
    return f"{score:<15}{row['image']}{note}{reasoning}\n"


def to_csv(rows: Iterable[dict]) -> str:
    """Return rows as lines of CSV without a header.

    >>> to_csv([dict.fromkeys(ROW_COLUMNS) | {"image": "a.png", "score": 3.5}])
    'a.png,3.5,,,,,,,,,,,,,,,,,\\n'
    """
    lines = []
    for row in rows:
        text = io.StringIO()
        csv.DictWriter(text, ROW_COLUMNS).writerow(
            row
        )  # with the line's end "\r\n", so that both characters are quoted in fields
        lines.append(text.getvalue()[:-2] + "\n")
    return "".join(lines)


def _as_text(setting) -> str:
    """Return a setting as a person reads it, in every kind of file: what is not set is empty in CSV."""
    return "unset" if setting in (None, "") else str(setting)


def _to_json(rows: Iterable[dict]) -> str:
    return "".join(
        json.dumps({key: row[key] for key in ROW_COLUMNS}, ensure_ascii=False) + "\n" for row in rows
    )


class RowFile:
    """A file of rows, CSV, JSONL or Parquet by its ending, to which rows are added safely.

    Parquet cannot grow: its rows are kept in ``NAME.parquet.partial.jsonl`` beside it, and `finish` makes
    the Parquet file of them. settings: what all rows have in common, the Scorer's own keywords.
    ``done`` maps the pictures that have a row to whether it is an error. Raises ValueError where the file
    cannot be written, is none of ours, or has rows of other settings.
    """

    def __init__(self, path: str | Path, settings: dict):
        self.path, self.settings, self.done = Path(path), settings, {}
        kind = self.path.suffix.lower()
        if kind not in ENDINGS:
            raise ValueError(
                f"{path} does not end with {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}, which tells "
                "how rows are written"
            )
        if not self.path.parent.is_dir():
            raise ValueError(f"the folder of {path} is missing; create it: mkdir -p {self.path.parent}")
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{path} is not a file; give another --out")
        self.csv, self.parquet = kind == ".csv", kind == ".parquet"
        self.head = CSV_HEAD.encode() if self.csv else b'{"image": "'
        self.log = self.path.with_name(self.path.name + ".partial.jsonl") if self.parquet else self.path
        try:
            if self.parquet and self.path.exists() and not self.log.exists():
                self._unpack()
            self.file = open(self.log, "a+b", buffering=0)  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise self._cannot(error) from error

    def _cannot(self, error: OSError) -> ValueError:
        return ValueError(f"{self.path} cannot be written ({error.strerror}); give another --out")

    def __enter__(self) -> "RowFile":
        try:
            self._lock()
            end = self._read()
            self.file.truncate(end)
            if self.csv and not end:
                self._append(self.head)
        except BaseException as error:
            self.file.close()
            if isinstance(error, OSError):
                raise self._cannot(error) from error
            raise
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def write(self, rows: list[dict]) -> None:
        """Add rows, on disk when this returns; else raise OSError, and keep the rows before."""
        try:
            self._append((to_csv if self.csv else _to_json)(rows).encode())
        except BaseException:  # also Ctrl-C: no half of a row stays behind
            self.file.truncate(self._read())
            raise
        self.done |= {row["image"]: bool(row["error"]) for row in rows}

    def finish(self) -> None:
        """Turn the rows into the Parquet file; the other kinds need nothing."""
        if not self.parquet:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = dict.fromkeys(NUMBERS, pa.float64()) | {
            "k": pa.int64(),
            "thinking": pa.bool_(),
            "quantize": pa.bool_(),
            "pixels": pa.list_(pa.int64()),
            "numbered": pa.bool_(),
            "max_new_tokens": pa.int64(),
            "repetition_penalty": pa.float64(),
        }
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in ROW_COLUMNS])
        rows, half = self._rows(self._whole()), self.path.with_name(self.path.name + ".tmp")
        with pq.ParquetWriter(half, schema) as writer:
            while chunk := list(islice(rows, 10_000)):
                writer.write_table(pa.Table.from_pylist(chunk, schema))
        os.replace(half, self.path)
        self.log.unlink()

    def _append(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self.file.write(left) :]
        os.fsync(self.file.fileno())

    def _lock(self) -> None:
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another command is writing to {self.path}; wait for it, or give another --out"
            ) from error
        except OSError:  # some network file systems have no locks
            pass

    def _read(self) -> int:
        """Fill ``done`` from the rows that are there; return where the last whole one ends."""
        foreign = f"{self.log} was not written by vqr1 score with these columns; give another --out"
        self.file.seek(0)
        begin = self.file.read(len(self.head))
        if not self.head.startswith(begin):
            raise ValueError(foreign)
        end = self._whole()
        for number, row in enumerate(self._rows(end), 1):
            if not isinstance(row, dict) or tuple(row) != ROW_COLUMNS or None in (row["image"], row["error"]):
                raise ValueError(f"{foreign} (row {number})")
            for key, value in self.settings.items():
                there, here = _as_text(row[key]), _as_text(value)
                if there != here:
                    raise ValueError(
                        f"{self.log}, row {number}, has {key} {there} where this command has {here}; "
                        "give another --out, or delete the file to begin anew"
                    )
            self.done[row["image"]] = bool(row["error"])
        return end

    def _whole(self) -> int:
        """Return where the last whole row ends. A line break inside quotes ends no row of CSV."""
        end = position = quotes = 0
        self.file.seek(0)
        for line in io.BufferedReader(io.FileIO(self.file.fileno(), closefd=False)):
            position += len(line)
            quotes += line.count(b'"') if self.csv else 0
            end = position if line.endswith(b"\n") and quotes % 2 == 0 else end
        return end

    def _rows(self, end: int) -> Iterator[dict]:
        def lines():
            position = 0
            with open(self.log, "rb") as file:
                while position < end:
                    line = file.readline()
                    position += len(line)
                    yield line.decode()

        if self.csv:
            yield from csv.DictReader(lines())
            return
        for number, line in enumerate(lines(), 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{self.log}, line {number}, is damaged ({error}); remove the line, and its "
                    "picture is scored again"
                ) from error

    def _unpack(self) -> None:
        """Put the rows of a finished Parquet file back where more can be added."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        half = self.log.with_name(self.log.name + ".tmp")
        try:
            with pq.ParquetFile(self.path) as table, open(half, "w", encoding="utf-8", newline="\n") as file:
                if tuple(table.schema_arrow.names) != ROW_COLUMNS:
                    raise ValueError("other columns")
                for batch in table.iter_batches():
                    file.write(_to_json(batch.to_pylist()))
        except (ValueError, pa.ArrowException) as error:
            half.unlink(missing_ok=True)
            raise ValueError(
                f"{self.path} was not written by vqr1 score with these columns ({error}); give another --out"
            ) from error
        os.replace(half, self.log)
