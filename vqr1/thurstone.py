"""Thurstone comparisons: the mathematics of reinforcement learning to rank.

B images, K completions per image. ``scores`` is (B, K); NaN marks an unparseable completion.
Equations: VisualQuality-R1, arXiv 2505.14460 v2, section 3. The two small constants are not in the
paper; gamma = eps = 1e-6 are the official code's (``grpo_jsonl.py`` lines 128-139).
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import log_ndtr

TIE = 1e-6
"""A predicted preference this close to 0.5 is a tie (``binary`` only): the mean of equal scores rounds."""


def comparative_probability(
    scores: torch.Tensor,
    variances: torch.Tensor,
    other_means: torch.Tensor,
    other_variances: torch.Tensor,
    gamma: float = 1e-6,
) -> torch.Tensor:
    """Return the probability that each completion of each image beats each other image (Thurstone).

    p_k(i, j) = Phi((s_ik - mean_j) / sqrt(var_i + var_j + gamma)), Phi the normal distribution function.

    Args:
        scores: (B, K), in score units.
        variances: (B,), in score units squared, ddof 1.
        other_means: (J,), in score units.
        other_variances: (J,), like `variances`.
        gamma: keeps the root positive; from the official code.

    Returns:
        (B, J, K), entry [i, j, k].

    Raises:
        ValueError: for other shapes, and unless gamma > 0.

    Source: the paper's p_k(x_i, x_j).

    >>> scores, variances = torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([0.5])
    >>> comparative_probability(scores, variances, torch.tensor([3.0]), torch.tensor([0.5]))
    tensor([[[0.1587, 0.5000, 0.8413]]])

    These are Phi(-1), Phi(0) and Phi(1).
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    shapes = [tuple(values.shape) for values in (scores, variances, other_means, other_variances)]
    if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1] or len(shapes[2]) != 1 or shapes[3] != shapes[2]:
        raise ValueError(f"the shapes must be (B, K), (B,), (J,) and (J,), got {shapes}")
    difference = scores[:, None, :] - other_means[None, :, None]  # (B, J, K)
    scale = torch.rsqrt(variances[:, None] + other_variances[None, :] + gamma)  # (B, J)
    return torch.special.ndtr(difference.mul_(scale[..., None]))  # in place: allocating (B, J, K) costs most


def fidelity(p_true, p_pred, eps: float = 1e-6) -> torch.Tensor:
    """Return how well a predicted preference matches the true one (1 is perfect, 0 is opposite).

    fidelity(p, q) = sqrt(p q + eps) + sqrt((1 - p)(1 - q) + eps); tensors or numbers in 0..1, which
    broadcast.

    Because of eps a perfect match gives 1.0010 and an opposite one 0.0020. Raises ValueError if eps < 0.
    Source: the paper's reward r_k; eps inside both roots from the official code.

    >>> fidelity(1.0, torch.tensor([1.0, 0.5, 0.0]))
    tensor([1.0010, 0.7081, 0.0020])
    >>> fidelity(0.5, torch.tensor(0.5))
    tensor(1.0000)
    """
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    p_true, p_pred = torch.as_tensor(p_true), torch.as_tensor(p_pred)
    both_prefer = (p_true * p_pred).add_(eps).sqrt_()
    neither_prefers = ((1 - p_true) * (1 - p_pred)).add_(eps).sqrt_()
    return both_prefer + neither_prefers


def true_preference(mos) -> torch.Tensor:
    """Return the preferences that the mean opinion scores state.

    p[i, j] = 1 if mos_i > mos_j, 0.5 if equal, 0 if less. ``mos`` is (B,), in any scale where higher is
    better (numbers that are not a tensor are read as float64); the result is (B, B). Raises ValueError if a
    MOS is not finite or the shape is not (B,). Source: the paper's p(x_i, x_j).

    >>> true_preference(torch.tensor([3.0, 1.0, 3.0]))
    tensor([[0.5000, 1.0000, 0.5000],
            [0.0000, 0.5000, 0.0000],
            [0.5000, 1.0000, 0.5000]])
    """
    mos = mos if torch.is_tensor(mos) else torch.from_numpy(np.array(mos, dtype=float))
    if mos.ndim != 1:
        raise ValueError(f"mos must have shape (B,), got {tuple(mos.shape)}")
    bad = (~torch.isfinite(mos)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"mos is not a finite number at {bad[:5]}")
    dtype = mos.dtype if mos.is_floating_point() else torch.get_default_dtype()
    more, equal = mos[:, None] > mos[None, :], mos[:, None] == mos[None, :]  # (B, B)
    return more.to(dtype) + 0.5 * equal.to(dtype)


def ranking_reward(
    scores: torch.Tensor,
    mos=None,
    dataset: Sequence[Hashable] | None = None,
    *,
    preference=None,
    binary: bool = False,
    average: bool = False,
    variance: float | None = None,
    gamma: float = 1e-6,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Return the reward of every completion: how well its score ranks its image among the others.

    r_ik = mean over j != i of fidelity(p(i, j), p_k(i, j)), over images j of the same data set.

    Either MOS state which image is better, or people who compared the two.

    Args:
        scores: (B, K), floating; NaN = unparseable. These take no part in their group's mean and variance.
        mos: (B,), higher is better; p(i, j) is their `true_preference`.
        dataset: B names, or None for one data set.
        preference: (B, B), in place of ``mos``: p(i, j), the share of people who prefer i to j, a tie counted
            half; NaN where nobody compared the two, who then are no partners. The diagonal is ignored.
        binary, average, variance: the variants below.
        gamma, eps: of `comparative_probability` and `fidelity`.

    Returns:
        (B, K), in the dtype and on the device of ``scores``, in 0.002..1.001; 0 where nothing was compared:
        an unparseable completion, and an image without a partner.

    A group with one parseable completion has variance 0; with none, its image is nobody's partner. A score
    so large that its square overflows counts as unparseable.

    The variants of the paper's Table 4:

    - ``binary``: 1 instead of the fidelity if p_k(i, j), thresholded at 0.5, agrees with p(i, j), else 0.
      The paper states no rule for ties; here the gain is 1 - |p - threshold(p_k)| with threshold(0.5) =
      0.5, so a tie on one side only gives 0.5, and ties on both give 1. From comparisons, the gain is the
      share of people who agree;
    - ``average``: p_k(i, j) is the mean over k' of Phi((s_ik - s_jk') / sqrt(var_i + var_j + gamma)) (Eq. 7);
    - ``variance``: this number in place of every var_i; 1.0 is Thurstone's Case V.

    Raises ValueError for shapes that disagree, K < 2, a MOS that is not finite, a negative variance or eps,
    gamma <= 0, both or neither of mos and preference, and a preference outside 0..1 or with p(i, j) + p(j, i)
    other than 1; TypeError if ``scores`` is not a floating tensor. Source: the paper's r_k(x_i); Table 4. The
    paper has MOS alone.

    >>> scores = torch.tensor([[4.1, 4.3], [2.0, float("nan")], [1.0, 3.0]])
    >>> ranking_reward(scores, [5.0, 3.0, 1.0])
    tensor([[0.9832, 0.9876],
            [0.8546, 0.0000],
            [0.9339, 0.6932]])
    >>> ranking_reward(scores, [5.0, 3.0, 1.0], binary=True)
    tensor([[1.0000, 1.0000],
            [0.7500, 0.0000],
            [1.0000, 0.5000]])

    Of five people, four prefer the first image to the third; nobody compared the second:

    >>> nan = float("nan")
    >>> ranking_reward(scores, preference=[[nan, nan, 0.8], [nan, nan, nan], [0.2, nan, nan]])
    tensor([[0.9808, 0.9733],
            [0.0000, 0.0000],
            [0.9383, 1.0000]])
    """
    scores = _checked(scores, mos, dataset, variance)
    p_true = _preference(len(scores), mos, preference)  # (B, B)
    compared = ~torch.isnan(p_true)
    p_true = torch.where(compared, p_true, 0.5).to(scores)[..., None]  # (B, B, 1)
    valid = torch.isfinite(scores * scores)  # (B, K)
    scores = torch.where(valid, scores, 0)
    mean, var = _moments(scores, valid)  # (B,), (B,)
    if variance is not None:
        var = torch.full_like(var, variance)
    if average:
        p_pred = _averaged_probability(scores, valid, var, gamma)
    else:
        p_pred = comparative_probability(scores, var, mean, var, gamma)  # (B, B, K)
    gain = _agreement(p_true, p_pred) if binary else fidelity(p_true, p_pred, eps)
    partners = _partners(valid, dataset) & compared.to(valid.device)  # (B, B)
    total = gain.mul_(partners[..., None]).sum(1)  # (B, K)
    return torch.where(valid, total / partners.sum(1).clamp(min=1)[:, None], 0)


def _checked(scores, mos, dataset, variance) -> torch.Tensor:
    if not (torch.is_tensor(scores) and scores.is_floating_point()):
        raise TypeError("scores must be a floating torch.Tensor of shape (B, K)")
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape (B, K), got {tuple(scores.shape)}")
    if scores.shape[1] < 2:
        raise ValueError(f"K = {scores.shape[1]}: ranking needs at least 2 completions per image")
    for name, values in (("mos", mos), ("dataset", dataset)):
        if values is not None and len(values) != len(scores):
            raise ValueError(f"{len(scores)} images but {len(values)} values of {name}")
    if variance is not None and not variance >= 0:
        raise ValueError(f"variance must not be negative, got {variance}")
    return scores


def _preference(images: int, mos, preference) -> torch.Tensor:
    """Return p(i, j), (B, B), NaN where nobody compared; checked where people stated it."""
    if (mos is None) == (preference is None):
        raise ValueError("give either mos or preference: one of the two says which image is better")
    if preference is None:
        return true_preference(mos)
    p = preference if torch.is_tensor(preference) else torch.from_numpy(np.array(preference, dtype=float))
    if p.shape != (images, images):
        raise ValueError(f"preference must have shape {(images, images)}, got {tuple(p.shape)}")
    p = p.to("cpu", torch.float64).where(~torch.eye(images, dtype=torch.bool), math.nan)
    for bad, wanted in (
        ((p < 0) | (p > 1), "a share of people is in 0..1"),
        (p.isnan() != p.T.isnan(), "give a share in both places, or NaN in both"),
        ((p + p.T - 1).abs() > 1e-6, "the two shares must add up to 1"),
    ):
        if bad.any():
            i, j = bad.nonzero()[0].tolist()
            said = f"preference[{i}, {j}] is {p[i, j]:.7g} and preference[{j}, {i}] is {p[j, i]:.7g}"
            raise ValueError(f"{said}; {wanted}")
    return p


def _moments(scores: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance (ddof 1) of the parseable completions; of one: variance 0, of none: both 0."""
    count = valid.sum(1)  # (B,)
    mean = scores.sum(1) / count.clamp(min=1)
    deviation = torch.where(valid, scores - mean[:, None], 0)
    return mean, deviation.square().sum(1) / (count - 1).clamp(min=1)


def _averaged_probability(scores, valid, var, gamma) -> torch.Tensor:
    b, k = scores.shape
    each = comparative_probability(
        scores, var, scores.flatten(), var.repeat_interleave(k), gamma
    )  # (B, B K', K)
    weight = valid.to(scores) / valid.sum(1, keepdim=True).clamp(min=1)  # (B, K')
    return torch.einsum("ijlk,jl->ijk", each.view(b, b, k, k), weight)


def _agreement(p_true: torch.Tensor, p_pred: torch.Tensor) -> torch.Tensor:
    side = p_pred - 0.5
    predicted = 0.5 + 0.5 * torch.sign(side) * (side.abs() > TIE)
    return 1 - (p_true - predicted).abs()


def _partners(valid: torch.Tensor, dataset) -> torch.Tensor:
    """(B, B): may image i be compared with image j?"""
    partners = valid.any(1)[None, :] & ~torch.eye(len(valid), dtype=torch.bool, device=valid.device)
    if dataset is None:
        return partners
    # A tensor's elements hash by identity; tolist() gives numbers.
    names = dataset.tolist() if torch.is_tensor(dataset) else list(dataset)
    code = {name: number for number, name in enumerate(dict.fromkeys(names))}
    codes = torch.tensor([code[name] for name in names], device=valid.device)
    return partners & (codes[:, None] == codes[None, :])


def thurstone_scale(wins) -> tuple[np.ndarray, np.ndarray]:
    """Return the quality of n items, and its standard error, from votes between pairs (Thurstone, Case V).

    The qualities maximise sum over i, j of (wins_ij + h_ij) log Phi((q_i - q_j) / sqrt(2)) with mean 0,
    where h_ij = 1/2 if i and j were compared, else 0 (without it, an item that won every vote would be
    infinitely good). Standard errors are the roots of the diagonal of the pseudo-inverse of the Fisher
    information of the votes cast.

    ``wins`` (n, n), not negative: wins[i, j] = how often i beat j (a tie is half a vote each way). Both
    results are (n,) float64 arrays. The unit is the standard deviation of one item's perceived quality, as in
    ``ranking_reward(variance=1.0)``; many texts use that of the *difference*: divide by sqrt(2) for
    theirs. Raises ValueError for a matrix that is not square, n < 2, a negative or non-finite entry, a vote
    of an item against itself, and items that no chain of comparisons connects.
    Source: Thurstone (1927), Case V.

    >>> quality, error = thurstone_scale([[0, 30], [10, 0]])     # 30.5 : 10.5 votes
    >>> (quality.round(4) + 0.0).tolist(), error.round(4).tolist()
    ([0.4635, -0.4635], [0.1516, 0.1516])
    """
    wins = _checked_wins(wins)
    compared = (wins + wins.T) > 0
    smoothed = wins + 0.5 * compared
    votes = smoothed + smoothed.T

    def loss(q):
        difference = (q[:, None] - q[None, :]) / np.sqrt(2)
        log_cdf = log_ndtr(difference)
        slope = smoothed * np.exp(_log_pdf(difference) - log_cdf) / np.sqrt(2)
        # The likelihood does not see a shift of all qualities; the last term holds the sum at 0.
        return 0.5 * q.sum() ** 2 - (smoothed * log_cdf).sum(), slope.sum(0) - slope.sum(1) + q.sum()

    found = minimize(
        loss,
        np.zeros(len(wins)),
        jac=True,
        hess=lambda q: _information(q, votes) + 1,
        method="trust-exact",
        options={"gtol": 1e-9 * max(1.0, votes.sum())},
    )
    quality = found.x - found.x.mean()
    covariance = np.linalg.pinv(_information(quality, wins + wins.T), hermitian=True)
    return quality, np.sqrt(np.diag(covariance))


def _log_pdf(x: np.ndarray) -> np.ndarray:
    return -0.5 * (x**2 + np.log(2 * np.pi))


def _information(q: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """Return the Fisher information about q of symmetric votes (n, n): Laplacian, singular along a shift."""
    difference = (q[:, None] - q[None, :]) / np.sqrt(2)
    log_weight = 2 * _log_pdf(difference) - log_ndtr(difference) - log_ndtr(-difference)
    weight = 0.5 * votes * np.exp(log_weight)
    return np.diag(weight.sum(1)) - weight


def _checked_wins(wins) -> np.ndarray:
    wins = np.asarray(wins, dtype=float)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or len(wins) < 2:
        raise ValueError(f"wins must be a square matrix of at least 2 items, got shape {wins.shape}")
    if not (np.isfinite(wins).all() and (wins >= 0).all()):
        raise ValueError("wins must hold finite numbers that are not negative")
    if np.diag(wins).any():
        raise ValueError(f"items {np.flatnonzero(np.diag(wins)).tolist()} have votes against themselves")
    number, label = connected_components(wins + wins.T, directed=False)
    if number > 1:
        groups = " and ".join(str(np.flatnonzero(label == n).tolist()) for n in range(number))
        raise ValueError(f"no comparison connects items {groups}: they have no common scale")
    return wins
