"""Measure the Scorer beside the official way, where its time goes, and a picture's cost among many.

    python tests/benchmarks/scoring.py                                # a few minutes on two cores
    python tests/benchmarks/scoring.py --pictures 16 --repeats 1 --counts 20 40
    python tests/benchmarks/scoring.py --full --csv data/runs         # 10,000 pictures, too; writes a CSV

The official way is that of the official README: pictures are opened one by one, the whole prompt is
repeated for each, one answer is sampled (top_k 50), and a regular expression takes the number out. Both
ways use the same model, files, batch size and token limit and take turns; the fastest repeat counts (the
others were disturbed). Memory is the process's growth at its peak (Linux), on a GPU torch's peak. Aims: 3
times as fast as the official way, at most 1.5 plain forward passes.
"""

import argparse
import ctypes
import math
import random
import re
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from vqr1 import scoring  # noqa: E402
from vqr1.engines.answers import OPEN, Answer  # noqa: E402
from vqr1.policy import base_of, load_policy  # noqa: E402
from vqr1.prompts import messages  # noqa: E402
from vqr1.records import machine_line, markdown, write_table  # noqa: E402
from vqr1.scoring import Scorer  # noqa: E402

BATCH, TOKENS = 16, 256
MODES = {"non-thinking": False, "thinking": True}


def photographs(count: int) -> list[Path]:
    """Return `count` photographs, 512x384 or 384x512, starting over when they are used up."""
    files = sorted((ROOT / "data" / "photos").glob("*.jpg"))
    return [files[i % len(files)] for i in range(count)]


def crops(count: int, sides: tuple[int, ...]) -> list[Image.Image]:
    """Return `count` crops of photographs, of these sides in turn, the same every time."""
    rng, files = np.random.default_rng(0), photographs(81)
    whole = {file: Image.open(file).convert("RGB") for file in files}
    pictures = []
    for i in range(count):
        picture, side = whole[files[rng.integers(len(files))]], sides[i % len(sides)]
        x, y = (int(rng.integers(length - side + 1)) for length in picture.size)
        pictures.append(picture.crop((x, y, x + side, y + side)))
    return pictures


def official(policy: tuple, files: list[Path], thinking: bool) -> list[float]:
    """Score in the official README's way; NaN where it would draw a random score."""
    model, processor = policy
    torch.manual_seed(0)
    scores = []
    for start in range(0, len(files), BATCH):
        pictures = [Image.open(file).convert("RGB") for file in files[start : start + BATCH]]
        text = [
            processor.apply_chat_template(messages(thinking), tokenize=False, add_generation_prompt=True)
            for _ in pictures
        ]
        inputs = processor(text=text, images=pictures, padding=True, return_tensors="pt").to(model.device)
        with torch.no_grad():
            ids = model.generate(
                **inputs, use_cache=True, max_new_tokens=TOKENS, do_sample=True, top_k=50, top_p=1.0
            )
        texts = processor.tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for answer in texts:
            tagged = re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL)
            number = re.search(r"\d+(\.\d+)?", tagged[-1] if tagged else answer)
            scores.append(float(number.group()) if number else math.nan)
    return scores


@contextmanager
def peak():
    """Yield a list that afterwards holds the peak growth, in MB, of the process or of torch on the GPU.

    NaN elsewhere.
    """
    grown = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield grown
        grown.append((torch.cuda.max_memory_allocated() - before) / 1e6)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what was freed is given back, so that the next to run pays for its own
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        yield grown
        grown.append((_status("VmHWM") - before) / 1e3)
    else:
        yield grown
        grown.append(math.nan)


def _status(key: str) -> int:
    return int(
        re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE).group(1)
    )


def timed(function, repeats: int = 1) -> tuple[float, float, list]:
    """Return the fastest run's seconds, its memory in MB, and the last result."""
    runs = []
    for _ in range(repeats):
        with peak() as grown:
            start = time.perf_counter()
            result = function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        runs.append((seconds, grown[0]))
    return *min(runs), result


def row(
    part: str,
    mode: str,
    count: int,
    seconds: float,
    memory: float = math.nan,
    relative: float = math.nan,
    meaning: str = "",
) -> dict:
    return {
        "part": part,
        "mode": mode,
        "pictures": count,
        "seconds": seconds,
        "images_per_s": count / seconds if seconds else math.nan,
        "ms_per_picture": 1e3 * seconds / count,
        "peak_mb": memory,
        "relative": relative,
        "relative_to": meaning,
    }


def unanswered(policy: tuple, files: list[Path]) -> list:
    """Read, see and prefill the pictures as the Scorer does, and ask for no answer."""
    scorer = Scorer(policy, batch_size=BATCH)
    engine = scorer.engine

    def ask_nothing(chat, prepared, thinking, max_tokens, batch_size):
        def ask(prefilled):
            return [Answer([], error="not asked")] * len(prefilled.ids)

        return engine._in_batches(ask, chat, OPEN, prepared, batch_size)

    engine.distributions = ask_nothing
    return scorer.score(files)


def speed(policy: tuple, files: list[Path], repeats: int) -> list[dict]:
    """Measure the Scorer and the official way in turn, and what no way can leave out."""
    rows = []
    for mode, thinking in MODES.items():
        ways = {
            "official": lambda thinking=thinking: official(policy, files, thinking),
            "Scorer": lambda thinking=thinking: [
                score.score
                for score in Scorer(policy, thinking, batch_size=BATCH, max_new_tokens=TOKENS).score(files)
            ],
        }
        for way in ways.values():
            way() if repeats > 1 else None  # once without a clock
        best = {name: (math.inf, math.nan) for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                seconds, memory, scores = timed(way)
                best[name] = min(best[name], (seconds, memory))
                if np.isnan(scores).all():
                    raise RuntimeError(f"{name}, {mode}: not one score")
        theirs, ours = best["official"], best["Scorer"]
        rows.append(row("official way", mode, len(files), *theirs))
        rows.append(
            row(
                "Scorer, expected",
                mode,
                len(files),
                *ours,
                theirs[0] / ours[0],
                "times as fast as the official way",
            )
        )
    unanswered(policy, files) if repeats > 1 else None  # once without a clock
    seconds, memory, _ = timed(lambda: unanswered(policy, files), repeats)
    limit = rows[0]["seconds"] / seconds
    what = "times as fast as the official way: no way to ask can be faster"
    rows.append(row("Scorer without an answer", "non-thinking", len(files), seconds, memory, limit, what))
    return rows


class Stages:
    """Measure seconds in calls by stage, those of background threads apart."""

    def __init__(self):
        self.seconds, self.main = {}, threading.get_ident()

    def watch(self, stage: str, owner: object, name: str) -> None:
        """Measure the calls of ``owner.name``; a call inside another one is of both."""
        function = getattr(owner, name)

        def measured(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            place = stage if threading.get_ident() == self.main else f"{stage} (in background threads)"
            self.seconds[place] = self.seconds.get(place, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, name, measured)


def profile(policy: tuple, files: list[Path]) -> list[dict]:
    """Measure where the Scorer's time goes, by its own methods.

    Background threads work meanwhile, so their time is not part of the whole.
    """
    rows = []
    for mode, thinking in MODES.items():
        scorer, stages = Scorer(policy, thinking, batch_size=BATCH, max_new_tokens=TOKENS), Stages()
        engine = scorer.engine
        tower, processor = base_of(engine.model).model.visual, engine.processor.image_processor
        kept = scoring.read_picture, tower.forward, type(processor).__call__
        stages.watch("decode", scoring, "read_picture")
        stages.watch("image processor", type(processor), "__call__")
        stages.watch("vision tower", tower, "forward")
        stages.watch("prefill", engine, "_prefill")
        stages.watch("generate", engine, "_generate")
        stages.watch("tree", engine, "_answers")
        try:
            seconds, _, _ = timed(partial(scorer.score, files))
        finally:
            scoring.read_picture, tower.forward, type(processor).__call__ = kept
        took = {
            stage: stages.seconds.get(stage, 0.0) for stage in ("vision tower", "prefill", "generate", "tree")
        }
        took["prefill"] -= took["vision tower"]
        took["other, and waiting for pictures"] = seconds - sum(took.values())
        took |= {stage: s for stage, s in stages.seconds.items() if stage not in took}
        rows += [
            row(
                f"profile: {stage}", mode, len(files), s, relative=s / seconds, meaning="of the Scorer's time"
            )
            for stage, s in took.items()
        ]
    return rows


def forward(policy: tuple, files: list[Path], repeats: int) -> list[dict]:
    """Time one plain forward pass of a prepared batch, and the expected scores from the same pixels."""
    model, processor = policy
    scorer = Scorer(policy, batch_size=BATCH)
    batch = [scorer.engine.prepare(scoring.read_picture(file)) for file in files[:BATCH]]
    text = processor.apply_chat_template(messages(False), tokenize=False, add_generation_prompt=True)
    pictures = [scoring.read_picture(file) for file in files[:BATCH]]
    inputs = processor(text=[text] * len(batch), images=pictures, padding=True, return_tensors="pt").to(
        model.device
    )

    def plain():
        with torch.no_grad():
            return model(**inputs, logits_to_keep=1, use_cache=True)

    def expected():
        scorer.engine.distributions(messages(False), batch, False, TOKENS, BATCH)

    plain(), expected()  # once without a clock
    pairs = [(timed(plain)[0], timed(expected)[0]) for _ in range(5 * repeats)]
    one, ours = (min(times) for times in zip(*pairs))
    return [
        row("one plain forward pass", "non-thinking", len(batch), one),
        row(
            "expected score",
            "non-thinking",
            len(batch),
            ours,
            relative=ours / one,
            meaning="plain forward passes",
        ),
    ]


def growth(policy: tuple, counts: list[int]) -> list[dict]:
    """Measure the Scorer on so many small files; a picture's cost should not depend on their number."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        distinct = min(max(counts), 500)
        for i, picture in enumerate(crops(distinct, (64, 96, 128))):
            picture.save(f"{folder}/{i}.png")
        scorer = Scorer(policy, batch_size=BATCH)
        scorer.score([f"{folder}/{i}.png" for i in range(min(64, distinct))])
        for count in counts:
            seconds, memory, _ = timed(
                lambda count=count: [
                    len(window)
                    for window in scorer.batches(f"{folder}/{i % distinct}.png" for i in range(count))
                ]
            )
            first = rows[0]["ms_per_picture"] if rows else 1e3 * seconds / count
            rows.append(
                row(
                    f"{count} small files",
                    "non-thinking",
                    count,
                    seconds,
                    memory,
                    1e3 * seconds / count / first,
                    f"times a picture's cost among {counts[0]}",
                )
            )
    return rows


def arguments(description: str) -> argparse.Namespace:
    """Parse what the benchmarks take: `make bench` hands all the same; each ignores what is another's."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="tiny-policy", help="as for vqr1 score (%(default)s)")
    parser.add_argument("--pictures", type=int, default=81, help="pictures to score (%(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs, of which the fastest counts (%(default)s)"
    )
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[100, 1000], help="numbers of small files (%(default)s)"
    )
    parser.add_argument("--full", action="store_true", help="10,000 small files, too")
    parser.add_argument("--small", action="store_true", help="step.py in a minute, to see that it runs")
    parser.add_argument("--csv", type=Path, help="write the table into this folder")
    return parser.parse_known_args()[0]


def publish(rows: list[dict], title: str, path: Path | None) -> None:
    """Print the table with machine and versions, and write it."""
    table, about = pd.DataFrame(rows), f"{title}; {torch.get_num_threads()} threads"
    print(f"{about}; {machine_line(0)}\n\n{markdown(table)}")
    if path:
        write_table(path, table, about=about)


def main() -> None:
    args = arguments(__doc__)
    random.seed(0)
    policy, files = load_policy(args.policy), photographs(args.pictures)
    counts = args.counts + [10_000] * args.full
    rows = (
        speed(policy, files, args.repeats)
        + profile(policy, files)
        + forward(policy, files, args.repeats)
        + growth(policy, counts)
    )
    title = f"{args.policy}, {policy[0].dtype}, batches of {BATCH}, photographs of 512x384".replace(
        "torch.", ""
    )
    publish(rows, title, args.csv and args.csv / "scoring-bench.csv")


if __name__ == "__main__":
    main()
