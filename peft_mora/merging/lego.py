"""Merging by parts: rank-1 pieces of all adapters clustered, and adapters whose factors are added up row by row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_field, is_number
from ..lora_file import Lora


def lego(loras: Sequence[Lora], weights: Sequence[float], rank: int) -> Lora:
    """All rank-1 pairs (a_i, b_i) clustered to k centroids, each of its members' mean norm. LoRA-LEGO, arXiv
    2409.16167.

    A pair (a, b) is the same update as (-a, -b): distances are to the nearer of the two and members are turned before
    they are averaged. The result is multiplied by √(r / k), r the adapters' mean rank (two re-implementations of the
    paper disagree about that factor). k-means starts at the longest pair and then the ones farthest from those that
    it has, so nothing is drawn and the order of the adapters does not matter.

    Args:
        loras: A (r_t, I), B (O, r_t); in the core's coordinates or the full ones, the distances are the same.
        weights: w_t: both factors of a pair are multiplied by √|w_t|, b by its sign as well.
        rank: k.

    Returns:
        A (k', I), B (O, k'), k' <= k: no more than pairs that are not zero and not the same.
    """
    A = torch.cat([abs(w) ** 0.5 * lora.A for w, lora in zip(weights, loras, strict=True)])
    B = torch.cat([(-1) ** (w < 0) * abs(w) ** 0.5 * lora.B.T for w, lora in zip(weights, loras, strict=True)])
    pairs = torch.cat([A, B], dim=1)
    there = (A.norm(dim=1) > 0) & (B.norm(dim=1) > 0)
    counts = [int(part.sum()) for part in there.split([len(lora.A) for lora in loras]) if part.any()]
    if not counts:
        return Lora(A[:0], B[:0].T)
    centers = _cluster(pairs[there], min(rank, sum(counts)))
    centers = centers * (sum(counts) / len(counts) / len(centers)) ** 0.25  # on both factors: √ of √(r / k)
    return Lora(centers[:, : A.shape[1]], centers[:, A.shape[1] :].T)


def _cluster(pairs: Tensor, k: int, rounds: int = 100) -> Tensor:
    """At most (k, n) centroids of (m, n) pairs without sign, at the mean norm of their members; one for each where
    fewer than k differ."""
    chosen = [int(pairs.norm(dim=1).argmax())]
    same = 1e-12 * float(pairs.square().sum(1).max())  # squared distances are differences of such numbers
    while len(chosen) < k:
        away, farthest = _distances(pairs, pairs[chosen]).amin(1).max(0)
        if away <= same:
            break
        chosen.append(int(farthest))
    centers, old = pairs[chosen], None
    for _ in range(rounds):
        owner = _distances(pairs, centers).argmin(1)
        if old is not None and torch.equal(owner, old):
            break
        old, found = owner, []
        for i, center in enumerate(centers):
            members = pairs[owner == i]
            if not len(members):
                continue
            members = torch.where((members @ center)[:, None] < 0, -members, members)
            mean = members.mean(0)
            found.append(mean * (members.norm(dim=1).mean() / mean.norm().clamp_min(1e-300)))
        centers = torch.stack(found)
    return centers


def _distances(pairs: Tensor, centers: Tensor) -> Tensor:
    """(m, k) squared distances to the nearer of c and -c."""
    square = pairs.square().sum(1)[:, None] + centers.square().sum(1)
    return (square - 2 * (pairs @ centers.T).abs()).clamp_min(0)


def robust(loras: Sequence[Lora], weights: Sequence[float], *, density: float = 0.2) -> Lora:
    """(Σ B̃_t)(Σ Ã_t) of factors that keep their largest entries. RobustMerge, arXiv 2502.17159.

    Ã and B̃ keep the `density` largest entries of A_t and of B_t. Row i is scaled by Σ|A_i| / Σ|kept A_i|, divided
    by the sum of that over the adapters. Adding factors up has cross terms B_s A_t: it means something only for
    adapters whose A's have one origin, and warns where their rows do not point the same way.

    Args:
        loras: A (r, I), B (O, r) of one rank; adapters without the module (rank 0) are left out.
        weights: w_t multiplies B̃_t.
        density: share in (0, 1].

    Raises:
        ValueError: ranks differ.
    """
    check_field(is_number(density) and 0 < density <= 1, "density", density, "a share in (0, 1]")
    present = [(lora, w) for lora, w in zip(loras, weights, strict=True) if len(lora.A)]
    ranks = sorted({len(lora.A) for lora, _ in present})
    if len(ranks) != 1:
        raise ValueError(
            f"rule='robust' adds A's up row by row, and these have ranks {ranks}: take rule='lego' or 'tsv'."
        )
    if origin([lora.A for lora, _ in present]) < 0.3:
        warnings.warn(
            "rule='robust' adds up factors of adapters whose A's do not point the same way (mean cosine below .3): "
            "its cross terms are noise then. It is for adapters that were trained from one initialisation, with "
            "canonical=False.",
            stacklevel=2,
        )
    kept = [Lora(_largest(lora.A, density), _largest(lora.B, density)) for lora, _ in present]
    scale = torch.stack([
        lora.A.abs().sum(1) / few.A.abs().sum(1).clamp_min(1e-300) * (few.A != 0).any(1)
        for (lora, _), few in zip(present, kept, strict=True)
    ])  # fmt: skip
    scale = scale / scale.sum(0).clamp_min(1e-300)
    B = torch.stack([w * few.B * s for few, (_, w), s in zip(kept, present, scale, strict=True)]).sum(0)
    return Lora(torch.stack([few.A for few in kept]).sum(0), B)


def origin(As: Sequence[Tensor]) -> float:
    """Mean cosine of row i of A_s and row i of A_t over all rows and pairs of adapters; 1 for a single one."""
    rows = torch.nn.functional.normalize(torch.stack(list(As)), dim=-1)
    n = len(rows)
    return float((rows.sum(0).square().sum(-1).mean() - n) / (n * (n - 1))) if n > 1 else 1.0


def _largest(X: Tensor, density: float) -> Tensor:
    keep = max(1, int(density * X.numel()))
    return X * (X.abs() >= X.abs().flatten().kthvalue(X.numel() - keep + 1).values)
