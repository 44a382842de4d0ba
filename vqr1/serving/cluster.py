"""Score a folder or a bucket of pictures on a Ray cluster, with Ray Data: several machines, or several
processes of one.

    python -m vqr1.serving.cluster data/photos scores.csv --actors 2
    python -m vqr1.serving.cluster s3://bucket/pictures scores.parquet --actors 8 --gpus 1 --policy Qwen/Qwen2.5-VL-7B-Instruct

Needs the extra "scale". The cluster is the one that the environment's RAY_ADDRESS names; without it, Ray
starts on this machine. Every node needs vqr1 and the policy, by hub name or at the same path. Each actor
holds one Scorer and fetches its pictures itself, so that one that cannot be fetched is a row with an error.
Rows and their order are those of ``vqr1 score SOURCE --out OUT``, for they are written by the same code;
OUT is written here, as results come, and the same command goes on where a killed one stopped. Ray's usage
reports are off. A bucket has been tried only as a local file system.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from vqr1.scoring import Scorer
from vqr1.serving.bulk import RowFile, picture_endings, plain, score_rows

TASK = 128
"""Pictures that an actor is given at a time: two windows of the Scorer's. What is lost when a node dies is
scored again.
"""
FETCHES = 16
"""Pictures that an actor fetches at a time."""


def place(source: str) -> tuple:
    """Return (file system, path in it) of a folder, or of a bucket's address: ``s3://…``, ``gs://…``,
    ``hdfs://…``.
    """
    from pyarrow.fs import FileSystem

    try:
        return FileSystem.from_uri(source if "://" in source else Path(source).absolute().as_uri())
    except ValueError as error:  # pyarrow's for an unknown scheme
        raise ValueError(
            f"{source} is no place that can be read ({error}); give a folder or an address like s3://bucket/folder"
        ) from error


def pictures_in(source: str) -> list[str]:
    """Return the pictures below a folder or in a bucket, as paths below `source`, sorted, hidden ones left
    out.

    Raises ValueError where there are none, or no such place.
    """
    from pyarrow.fs import FileSelector, FileType

    files, folder = place(source)
    try:
        found = files.get_file_info(FileSelector(folder, recursive=True))
    except OSError as error:
        raise ValueError(
            f"{source} cannot be listed ({error}); give a folder or an address like s3://bucket/folder"
        ) from error
    below = [PurePosixPath(info.path).relative_to(folder) for info in found if info.type == FileType.File]
    endings = picture_endings()
    names = sorted(
        str(path)
        for path in below
        if path.suffix.lower() in endings and not any(part.startswith(".") for part in path.parts)
    )
    if not names:
        raise ValueError(f"{source} holds no picture that Pillow reads ({', '.join(sorted(endings))})")
    return names


class Rater:
    """What an actor does: fetch pictures, score them, return their rows."""

    def __init__(self, source: str, settings: dict, batch_size: int):
        self.source, self.settings, (self.files, self.folder) = source, settings, place(source)
        self.scorer = Scorer(
            settings["policy"], settings["thinking"], settings["estimate"], batch_size=batch_size
        )

    def __call__(self, table):
        """Return the rows of the pictures in a pyarrow table's column ``image``, as another."""
        import pyarrow

        return pyarrow.Table.from_pylist(self.rows(table["image"].to_pylist()))

    def rows(self, names: list[str]) -> list[dict]:
        """Return the rows of pictures named below the source, in order."""
        with TemporaryDirectory() as folder, ThreadPoolExecutor(FETCHES, "fetch") as pool:
            copies = [f"{folder}/{i:06d}" for i in range(len(names))]
            failures = list(pool.map(self.fetch, names, copies))
            rows = [row for some in score_rows(self.scorer, copies, self.settings) for row in some]
        for name, copy, failure, row in zip(names, copies, failures, rows):
            whole = plain(f"{self.source}/{name}")
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
    """Yield the rows of the pictures in order, some at a time, scored by so many actors of a Ray cluster,
    each with so many GPUs.

    Raises ValueError where Ray is missing, or the cluster too small for the actors, which would wait for
    ever.
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
                    f"{actors} actors need {needed:g} {kind}s, and the cluster has {there.get(kind, 0):g}; give fewer --actors"
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


def main(arguments: list[str] | None = None) -> int:
    """Score what the command line names; return 0, 1 when a picture has no score, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m vqr1.serving.cluster",
        description="Score a folder or a bucket of pictures on a Ray cluster.",
    )
    parser.add_argument("source", help="folder, or address like s3://bucket/folder")
    parser.add_argument("out", help="rows: .csv, .jsonl or .parquet")
    parser.add_argument("--actors", type=int, default=2, help="processes with a Scorer each (%(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each actor (%(default)s)")
    parser.add_argument("--policy", default="tiny-policy", help="as for vqr1 score (%(default)s)")
    parser.add_argument("--thinking", action="store_true", help="let the policy reason first")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="pictures of one forward pass (%(default)s)"
    )
    args = parser.parse_args(arguments)
    settings = {"policy": args.policy, "estimate": "expected", "k": 1, "thinking": args.thinking}
    source = args.source.rstrip("/") or "/"
    try:
        names = pictures_in(source)
        with RowFile(args.out, settings) as file:
            left = [name for name in names if plain(f"{source}/{name}") not in file.done]
            for rows in (
                scored(source, left, settings, args.batch_size, args.actors, args.gpus) if left else ()
            ):
                file.write(rows)
                print(f"{len(file.done)} of {len(names)} pictures", file=sys.stderr)
            file.finish()
            failed = sum(file.done.values())
    except (ValueError, OSError) as error:
        print(f"vqr1.serving.cluster: {error}", file=sys.stderr)
        return 2
    print(f"{len(names)} pictures, {failed} without a score: {args.out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
