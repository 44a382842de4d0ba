"""Score the photographs with both engines, side by side, and write how far they differ: data/runs/vllm.csv.

VLLM_ENABLE_V1_MULTIPROCESSING=0 .venv-vllm/bin/python tools/vllm_scores.py

`make test-vllm` builds the environment. A row is a policy, thinking or not.
"""

import argparse
import time
from pathlib import Path

import pandas as pd

from vqr1.engines.vllm import load
from vqr1.records import markdown, write_table
from vqr1.scoring import Scorer

ROOT = Path(__file__).resolve().parents[1]
ABOUT = (
    "engine vllm against engine transformers over the photographs, in fp32 on a CPU, expected scores; "
    "differences are of the score (1..5), the largest; requests with those for reasoning and ending"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", default="people-ranker")
    parser.add_argument("--limit", type=int, help="only so many photographs")
    parser.add_argument("--out", default=ROOT / "data" / "runs" / "vllm.csv")
    args = parser.parse_args()
    photos = sorted((ROOT / "data" / "photos").glob("*.jpg"))[: args.limit]
    engine = load(args.policy)
    ours = Scorer(args.policy)
    theirs = Scorer((engine.llm, engine.processor), engine="vllm", numbered=ours.numbered)
    theirs.engine = engine
    rows = [compare(args.policy, ours, theirs, photos, thinking) for thinking in (False, True)]
    write_table(args.out, pd.DataFrame(rows), numbers="%.7f", about=ABOUT)
    print(markdown(pd.DataFrame(rows)))


def compare(policy: str, ours: Scorer, theirs: Scorer, photos: list[Path], thinking: bool) -> dict:
    """Return one row of the table."""
    start = time.perf_counter()
    one = ours.with_(thinking=thinking).score(photos)
    middle, before = time.perf_counter(), theirs.engine.requests
    two = theirs.with_(thinking=thinking).score(photos)
    end = time.perf_counter()

    def largest(what: str) -> float:
        return max(abs(getattr(a, what) - getattr(b, what)) for a, b in zip(one, two, strict=True))

    return {
        "policy": policy,
        "thinking": thinking,
        "pictures": len(photos),
        "errors": sum(bool(score.error) for score in one + two),
        "difference": largest("score"),
        "difference_std": largest("std"),
        "difference_mass": largest("mass"),
        "texts_equal": sum(a.answers == b.answers for a, b in zip(one, two)),
        "requests": (theirs.engine.requests - before) / len(photos),
        "seconds_transformers": round(middle - start, 1),
        "seconds_vllm": round(end - middle, 1),
    }


if __name__ == "__main__":
    main()
