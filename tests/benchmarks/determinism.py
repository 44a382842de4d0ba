"""How many texts and scores change when a picture is scored in another batch size, order or company.

    python tests/benchmarks/determinism.py                   # --pictures 16 is quicker
    python tests/benchmarks/determinism.py --csv data/runs   # writes determinism.csv there

Scores are promised to 1e-4 for fp32, non-thinking: the reference. Thinking generates words greedily, and a
word may flip where two are almost equally likely; bf16 compares in 8 bits. Changes are counted against the
same pictures in batches of 16 in their first order.
"""

import random

import torch
from scoring import BATCH, MODES, TOKENS, arguments, crops, publish

from vqr1.policy import load_policy
from vqr1.scoring import Scorer

TOLERANCE = 1e-4


def changes(count: int, rng: random.Random) -> dict[str, tuple[list[int], int]]:
    """Return {what changes: (positions of pictures to score, batch size)}."""
    shuffled = rng.sample(range(count), count)
    return {
        "nothing (run again)": (list(range(count)), BATCH),
        "batch size 1": (list(range(count)), 1),
        "batch size 5": (list(range(count)), 5),
        "order": (shuffled, BATCH),
        "company: half of them": (shuffled[: count // 2], BATCH),
    }


def rows(policy: str, dtype: torch.dtype, count: int) -> list[dict]:
    loaded, pictures, found = load_policy(policy, dtype=dtype), crops(count, (64, 96, 160, 224)), []
    for mode, thinking in MODES.items():

        def scored(order: list[int], size: int, thinking: bool = thinking) -> list:
            return Scorer(loaded, thinking, batch_size=size, max_new_tokens=TOKENS).score(
                [pictures[i] for i in order]
            )

        before = scored(list(range(count)), BATCH)
        for change, (order, size) in changes(count, random.Random(0)).items():
            pairs = [(score, before[i]) for i, score in zip(order, scored(order, size))]
            both = [(one, two) for one, two in pairs if not one.error and not two.error]
            difference = torch.tensor([abs(one.score - two.score) for one, two in both])
            found.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "mode": mode,
                    "changed": change,
                    "pictures": len(pairs),
                    "texts_changed": sum(one.answers != two.answers for one, two in pairs) / len(pairs),
                    "scores_changed": float((difference > TOLERANCE).float().mean()),
                    "mean_difference": float(difference.mean()),
                    "largest_difference": float(difference.max()),
                    "errors_changed": sum(bool(one.error) != bool(two.error) for one, two in pairs)
                    / len(pairs),
                }
            )
    return found


def main() -> None:
    args = arguments(__doc__)
    table = [
        row for dtype in (torch.float32, torch.bfloat16) for row in rows(args.policy, dtype, args.pictures)
    ]
    title = f"{args.policy}; shares of texts, and of scores by more than {TOLERANCE:g}, that change"
    publish(table, title, args.csv and args.csv / "determinism.csv")


if __name__ == "__main__":
    main()
