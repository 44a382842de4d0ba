"""Score a folder or bucket of pictures with Ray Data, on several machines or in several processes of one.

    vqr1 score data/photos --actors 2 --out scores.csv
    vqr1 score s3://bucket/pictures --actors 8 --gpus 1 --out scores.parquet

Needs the extra "scale". The cluster is the one that the environment's RAY_ADDRESS names; without it, Ray
starts on this machine. Every node needs vqr1 and the policy, by hub name or at the same path. Each actor
holds one Scorer and fetches its own pictures; a picture that cannot be fetched is a row with an error. Rows
and their order are those of ``vqr1 score`` without ``--actors``: the same code writes them here as results
come, and the same command goes on where a killed one stopped. Ray's usage reports are off. A bucket has
been tried only as a local file system.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from vqr1.data.folders import is_picture, picture_endings
from vqr1.scoring import Scorer
from vqr1.serving.bulk import score_rows, utf8_name

TASK = 128
"""Pictures an actor is given at a time: two of the Scorer's windows. If its node dies, they are rescored."""
FETCHES = 16
"""Pictures that an actor fetches at a time."""


def filesystem_of(source: str) -> tuple:
    """Return (file system, path in it) of a folder or an address: ``s3://…``, ``gs://…``, ``hdfs://…``."""
    from pyarrow.fs import FileSystem

    try:
        return FileSystem.from_uri(source if "://" in source else Path(source).absolute().as_uri())
    except ValueError as error:  # pyarrow's for an unknown scheme
        raise ValueError(
            f"{source} is no place that can be read ({error}); give a folder or an address like s3://bucket/folder"
        ) from error


def pictures_in(source: str) -> list[str]:
    """Return the pictures in a folder or bucket as sorted paths below `source`, hidden ones left out.

    Raises ValueError where there are none, or no such place.
    """
    from pyarrow.fs import FileSelector, FileType

    files, folder = filesystem_of(source)
    try:
        found = files.get_file_info(FileSelector(folder, recursive=True))
    except OSError as error:
        raise ValueError(
            f"{source} cannot be listed ({error}); give a folder or an address like s3://bucket/folder"
        ) from error
    below = [PurePosixPath(info.path).relative_to(folder) for info in found if info.type == FileType.File]
    shown = [path for path in below if not any(part.startswith(".") for part in path.parts)]
    names = sorted(str(path) for path in shown if is_picture(path.name))
    if not names:
        raise ValueError(
            f"{source} holds no picture that Pillow reads ({', '.join(sorted(picture_endings()))})"
        )
    return names


class Rater:
    """What an actor does: fetch pictures, score them, return their rows."""

    def __init__(self, source: str, settings: dict, batch_size: int):
        self.source, self.settings = source, settings
        self.files, self.folder = filesystem_of(source)
        self.scorer = Scorer(**settings, batch_size=batch_size)

    def __call__(self, table):
        """Return the rows of a pyarrow table's pictures (column ``image``) as a pyarrow table."""
        import pyarrow

        return pyarrow.Table.from_pylist(self.rows(table["image"].to_pylist()))

    def rows(self, names: list[str]) -> list[dict]:
        """Return the rows of pictures named below the source, in order."""
        with TemporaryDirectory() as folder, ThreadPoolExecutor(FETCHES, "fetch") as pool:
            copies = [f"{folder}/{i:06d}" for i in range(len(names))]
            failures = list(pool.map(self.fetch, names, copies))
            rows = [row for some in score_rows(self.scorer, copies, self.settings) for row in some]
        for name, copy, failure, row in zip(names, copies, failures, rows):
            whole = utf8_name(f"{self.source}/{name}")
            row |= {
                "image": whole,
                "error": f"{whole} cannot be fetched ({failure})"
                if failure
                else row["error"].replace(copy, whole),
            }
        return rows

    def fetch(self, name: str, copy: str) -> str:
        """Copy a picture to this machine; return "", or why it could not be."""
        try:
            with (
                self.files.open_input_stream(f"{self.folder}/{name}", compression=None) as stream,
                open(copy, "wb") as file,
            ):
                shutil.copyfileobj(stream, file)
        except OSError as error:
            return str(error)
        return ""


def scored(
    source: str, names: list[str], settings: dict, batch_size: int, actors: int, gpus: float
) -> Iterator[list[dict]]:
    """Yield the rows of the pictures in order, some at a time, scored by the actors of a Ray cluster.

    source: a folder or an address.
    names: of the pictures below it (`pictures_in`).
    settings: of the rows: the Scorer's keywords.
    batch_size: pictures of one forward pass.
    actors: processes with a Scorer each.
    gpus: of each actor.

    Raises ValueError where Ray is missing, or the cluster is too small: actors would wait for ever.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext, from_items
    except ModuleNotFoundError as error:
        raise ValueError(f"Ray is missing ({error}); install the extra: pip install 'vqr1[scale]'") from error

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="WARNING")
    try:
        there = ray.cluster_resources()
        for kind, needed in (("CPU", actors), ("GPU", actors * gpus)):
            if there.get(kind, 0) < needed:
                raise ValueError(
                    f"{actors} actors need {needed:g} {kind}s, and the cluster has "
                    f"{there.get(kind, 0):g}; give fewer --actors"
                )
        context = DataContext.get_current()
        context.execution_options.preserve_order, context.enable_progress_bars = True, False
        tasks = max(min(actors, len(names)), -(-len(names) // TASK))
        table = from_items([{"image": name} for name in names], override_num_blocks=tasks).map_batches(
            Rater,
            fn_constructor_args=(source, settings, batch_size),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=gpus,
        )
        for batch in table.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield batch.to_pylist()
    finally:
        ray.shutdown()
