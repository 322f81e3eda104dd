"""Rules that merge: cores of one module in, one core out. Pure; float64 in and out; no data, no model.

cores: M_t (p, q) of each adapter t = 1..N; zeros where an adapter lacks the module
weights: w_t, one an adapter. Every rule multiplies the cores by them, except where it says otherwise
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from peft.utils import merge_utils
from torch import Tensor

from ..checks import check_field, is_int, is_number
from ..inputs import seeded
from .core import svd


Cores = Sequence[Tensor]
Weights = Sequence[float]


def sum_cores(cores: Cores, weights: Weights) -> Tensor:
    """Σ w_t M_t. Task arithmetic, arXiv 2212.04089; by PEFT's function."""
    return merge_utils.task_arithmetic(list(cores), torch.tensor(weights, dtype=cores[0].dtype))


def mean_cores(cores: Cores, weights: Weights) -> Tensor:
    """Σ w_t M_t / Σ w_t.

    Raises:
        ValueError: the weights add up to 0.
    """
    if sum(weights) == 0:
        raise ValueError("The weights add up to 0, so there is no mean: take rule='sum', or other weights.")
    return sum_cores(cores, weights) / sum(weights)


def ties(cores: Cores, weights: Weights, thresholds: Sequence[float]) -> Tensor:
    """Keep large entries, elect a sign for each, take the mean of those that agree. TIES, arXiv 2306.01708 §3.

    The sign is that of Σ M_t; the weights multiply what is left of each adapter after that (both as in PEFT, whose
    functions do it).

    Args:
        thresholds: of each adapter: entries with |m| below it are dropped. `density_threshold` finds it over all
            modules of the adapter, as the paper does.
    """
    kept = torch.stack([core * (core.abs() >= least) for core, least in zip(cores, thresholds, strict=True)])
    agree = merge_utils.calculate_majority_sign_mask(kept, method="total")
    weighted = kept * merge_utils.reshape_weight_task_tensors(kept, torch.tensor(weights, dtype=kept.dtype))
    return merge_utils.disjoint_merge(weighted, agree)


def density_threshold(sizes: Tensor, density: float) -> float:
    """The |entry| (n,) from which on `int(density · n)` of them lie; infinity where that is none."""
    keep = int(density * len(sizes))
    return sizes.kthvalue(len(sizes) - keep + 1).values.item() if keep else math.inf


def dare(cores: Cores, weights: Weights, seeds: Sequence[int], *, drop: float = 0.5, then: str = "sum") -> Tensor:
    """Drop entries at random, scale the rest by 1 / (1 - drop), then add up. DARE, arXiv 2311.03099; by PEFT's
    function.

    Args:
        seeds: of each adapter's draw.
        drop: probability, in [0, 1).
        then: "sum", or "ties" without a threshold of its own.
    """
    check_field(is_number(drop) and 0 <= drop < 1, "drop", drop, "a probability in [0, 1)")
    check_field(then in ("sum", "ties"), "then", then, "'sum' or 'ties'")
    kept = []
    for core, seed in zip(cores, seeds, strict=True):
        with seeded(seed):
            kept.append(merge_utils.prune(core, 1 - drop, "random", rescale=True) if drop else core)
    return sum_cores(kept, weights) if then == "sum" else ties(kept, weights, [0.0] * len(kept))


def tsv(cores: Cores, weights: Weights, *, factor: float = 1.0) -> Tensor:
    """Singular vectors of all adapters made orthogonal together: `factor · U⊥ diag(S) V⊥ᵀ`. TSV-Merge, arXiv
    2412.00081.

    U = [U_t], S = [S_t], V = [V_t] of each adapter's SVD at its full rank; U⊥ and V⊥ are their polar factors.
    """
    check_field(is_number(factor), "factor", factor, "a number")
    lefts, values, rights = zip(*map(svd, scaled(cores, weights)), strict=True)
    U, V = polar(torch.cat(lefts, dim=1)), polar(torch.cat(rights).T)
    return factor * (U * torch.cat(values)) @ V.T


def iso_c(cores: Cores, weights: Weights, *, factor: float = 1.0) -> Tensor:
    """`factor ·` Σ w_t M_t with all singular values replaced by their mean. Iso-C, arXiv 2502.04959.

    The mean is over the values that are there: over min(O, I), as the code for dense weights does, it would be 0
    almost.

    Args:
        factor: of the result; the paper's α.
    """
    check_field(is_number(factor), "factor", factor, "a number")
    U, S, Vh = svd(sum_cores(cores, weights))
    return factor * (U * _isotropic(S)) @ Vh


def iso_cts(cores: Cores, weights: Weights, *, common: float = 0.8, factor: float = 1.0) -> Tensor:
    """Iso-C where the weakest common directions make room for each adapter's own. Iso-CTS, arXiv 2502.04959,
    Algorithm 2.

    Args:
        common: share of the directions that stay those of the sum, in (0, 1]; the others are divided evenly: for each
            adapter, the leading ones of its residual outside of the common left directions, one at least where it is
            below 1.
        factor: as in `iso_c`.
    """
    check_field(is_number(common) and 0 < common <= 1, "common", common, "a share in (0, 1]")
    check_field(is_number(factor), "factor", factor, "a number")
    updates = scaled(cores, weights)
    U, S, Vh = svd(sum_cores(cores, weights))
    own = int((1 - common) * len(S) / len(cores) + 1e-9)  # a fifth of 10 is 1.99…
    own = max(own, int(common < 1 and len(S) > len(cores)))
    k = len(S) - own * len(cores)
    found = [(U[:, :k], S[:k], Vh[:k])]
    for update in updates:
        u, s, vh = svd(update - U[:, :k] @ (U[:, :k].T @ update))
        found.append((u[:, :own], s[:own], vh[:own]))
    lefts, values, rights = zip(*found, strict=True)
    U, V = polar(torch.cat(lefts, dim=1)), polar(torch.cat(rights).T)
    return factor * (U * _isotropic(torch.cat(values))) @ V.T


def least_squares(cores: Cores, weights: Weights, *, ridge: float = 0.1) -> Tensor:
    """The update closest to every adapter's on that adapter's own row space, in closed form.

    `M = (Σ w_t M_t M_tᵀ M_t + λ·mean)(Σ w_t M_tᵀ M_t + λI)⁻¹`: what WUDI (arXiv 2503.08099) descends to, which is
    RegMean with the Gram matrix ΔW_tᵀΔW_t. The ridge pulls towards the weighted mean. Without it, adapters with
    nearly equal A blow up 50 to 400 times. The weights count errors, they do not scale updates.

    Args:
        ridge: λ as a share of the mean of the leading eigenvalues, as many as the largest rank of an adapter; > 0.

    Raises:
        ValueError: a negative weight, or all zero.
    """
    check_field(is_number(ridge) and ridge > 0, "ridge", ridge, "a number > 0")
    check_losses(weights)
    weighted = torch.tensor(weights, dtype=cores[0].dtype)[:, None, None]
    stacked = torch.stack(list(cores))
    grams = weighted * (stacked.mT @ stacked)
    gram = grams.sum(0)
    rank = max([1, *(len(svd(core)[1]) for core in cores)])
    lam = ridge * torch.linalg.eigvalsh(gram)[-rank:].mean()
    if lam <= 0:
        return gram.new_zeros(cores[0].shape)
    right = (stacked @ grams).sum(0) + lam * mean_cores(cores, weights)
    damped = gram + lam * torch.eye(len(gram), dtype=gram.dtype)
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(damped)).T


def lore(
    cores: Cores, weights: Weights, *, threshold: float = 0.1, amount: float | None = None, rounds: int = 20
) -> Tensor:
    """A common update and a low-rank rest of each adapter: `C + amount · mean D`. LoRE-Merging, arXiv 2502.10749.

    In turn, C ← mean(M_t - D_t) and D_t ← M_t - C with its singular values lowered by μ (those below it become 0).

    Args:
        threshold: μ as a share of the largest singular value of any adapter, >= 0.
        amount: how much of the mean of the rests is added; None is N, every rest in full. 1 would be the plain mean.
        rounds: of the two steps.
    """
    check_field(is_number(threshold) and threshold >= 0, "threshold", threshold, "a number >= 0")
    check_field(amount is None or is_number(amount), "amount", amount, "a number, or None")
    check_field(is_int(rounds) and rounds >= 1, "rounds", rounds, "an integer >= 1")
    updates = torch.stack(scaled(cores, weights))
    mu = threshold * torch.linalg.matrix_norm(updates, ord=2).max()
    rests = torch.zeros_like(updates)
    for _ in range(rounds):
        shared = (updates - rests).mean(0)
        U, S, Vh = torch.linalg.svd(updates - shared, full_matrices=False)
        rests = (U * (S - mu).clamp_min(0)[:, None, :]) @ Vh
    return (updates - rests).mean(0) + (len(cores) if amount is None else amount) * rests.mean(0)


def _isotropic(S: Tensor) -> Tensor:
    """The mean for each value; larger ones ahead by less than 1e-6 of it, for a cut to a rank to know what stays."""
    ahead = S.argsort().argsort().to(S) / max(1, len(S))
    return S.mean() * (1 + 1e-6 * ahead) if len(S) else S


def scaled(cores: Cores, weights: Weights) -> list[Tensor]:
    return [weight * core for weight, core in zip(weights, cores, strict=True)]


def polar(X: Tensor) -> Tensor:
    """The nearest matrix to X (n, m) with orthonormal columns (rows, if m > n; a partial isometry, if X has less
    rank)."""
    U, _, Vh = svd(X)
    return U @ Vh


def check_losses(weights: Weights) -> None:
    """Refuse weights that cannot count squared errors.

    Raises:
        ValueError: one is negative, or all are zero.
    """
    if min(weights) < 0 or max(weights) <= 0:
        raise ValueError(
            f"This rule weighs squared errors, so weights are >= 0 and one is > 0; got {list(weights)}. To subtract "
            "an adapter take rule='sum'."
        )
