"""Time the ranking reward of B = 64 images x K = 16 completions against two plain loops.

    python tests/benchmarks/reward.py

The first loop is the same formula with Python floats and ``math.erf``. The second uses torch scalars and a
new ``torch.distributions.Normal`` per pair, as the official code does (``grpo_jsonl.py`` lines 128-208).
Both run in full. We must be at least 20 times as fast as the first and 1,000 times as the second, else the
exit status is 1.
"""

import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from vqr1.thurstone import ranking_reward  # noqa: E402

B, K, EPS = 64, 16, 1e-6


def float_loop(scores: list[list[float]], mos: list[float]) -> list[list[float]]:
    mean = [statistics.fmean(group) for group in scores]
    var = [sum((s - m) ** 2 for s in group) / (K - 1) for group, m in zip(scores, mean)]
    rewards = []
    for i in range(B):
        rewards.append([])
        for k in range(K):
            total = 0.0
            for j in range(B):
                if i == j:
                    continue
                p = 1.0 if mos[i] > mos[j] else 0.5 if mos[i] == mos[j] else 0.0
                q = 0.5 * (1 + math.erf((scores[i][k] - mean[j]) / math.sqrt(2 * (var[i] + var[j] + EPS))))
                total += math.sqrt(p * q + EPS) + math.sqrt((1 - p) * (1 - q) + EPS)
            rewards[-1].append(total / (B - 1))
    return rewards


def torch_scalar_loop(scores: torch.Tensor, mos: torch.Tensor) -> list[list[torch.Tensor]]:
    mean, var = scores.mean(1), scores.var(1)
    rewards = []
    for i in range(B):
        rewards.append([])
        for k in range(K):
            total = torch.zeros(())
            for j in range(B):
                if i == j:
                    continue
                p = torch.tensor(1.0 if mos[i] > mos[j] else 0.5 if mos[i] == mos[j] else 0.0)
                normal = torch.distributions.Normal(0.0, 1.0)
                q = normal.cdf((scores[i, k] - mean[j]) / torch.sqrt(var[i] + var[j] + EPS))
                total = total + torch.sqrt(p * q + EPS) + torch.sqrt((1 - p) * (1 - q) + EPS)
            rewards[-1].append(total / (B - 1))
    return rewards


def timed(function, repeats: int = 1) -> tuple[float, torch.Tensor | list]:
    """Return seconds of the fastest run (others were disturbed), and the result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the loops have one, too; and two threads wait for each other on a busy machine
    scores = 1 + 4 * torch.rand(B, K, dtype=torch.float64)
    mos = torch.randint(2, 10, (B,)) / 2
    ours, expected = timed(lambda: ranking_reward(scores, mos), repeats=300)
    floats, by_floats = timed(lambda: float_loop(scores.tolist(), mos.tolist()), repeats=5)
    scalars, by_scalars = timed(lambda: torch_scalar_loop(scores, mos))
    for other in (by_floats, by_scalars):
        torch.testing.assert_close(torch.tensor(other, dtype=torch.float64), expected, atol=1e-6, rtol=0)

    print(f"B = {B}, K = {K}, float64, torch {torch.__version__}, one thread; all agree to 1e-6")
    print(f"ranking_reward     {ours * 1e3:10.2f} ms")
    print(f"float loop         {floats * 1e3:10.2f} ms  {floats / ours:8.0f} x   (required: 20)")
    print(f"torch-scalar loop  {scalars * 1e3:10.2f} ms  {scalars / ours:8.0f} x   (required: 1000)")
    return 0 if floats >= 20 * ours and scalars >= 1000 * ours else 1


if __name__ == "__main__":
    sys.exit(main())
