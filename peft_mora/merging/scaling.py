"""Before and after a rule: updates brought to one length, shared directions shrunk, singular values calibrated, layers
weighted by depth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from ..lora_file import Lora
from .core import NOISE, norm_of, reduced, thin_svd


def norm(loras: Sequence[Lora]) -> list[Lora]:
    """Each ΔW_t of a module at the mean length of those that are not 0."""
    mean = mean_norm(loras)
    return [Lora(A, B * (mean / length) if (length := norm_of(Lora(A, B))) > 0 else B) for A, B in loras]


def pico(loras: Sequence[Lora]) -> list[Lora]:
    """Output directions that N adapters share shrunk by 1 / (1 + (N - 1) c_j), so that their sum counts them once.

    With Q_t an orthonormal basis of B_t's columns, the squared singular values of [Q_1 … Q_N] are 1 of a direction
    that one adapter alone has and N of one that all have, whence c_j = (σ_j² - 1) / (N - 1), 0..1. After Pico, arXiv
    2604.16826; sharing is measured by spans, which do not depend on an adapter's gauge.
    """
    U, S, _ = thin_svd(torch.cat([thin_svd(B)[0] for _, B in loras], dim=1))
    shrink = 1 / S.square().clamp_min(1)
    return [Lora(A, B - (U * (1 - shrink)) @ (U.T @ B)) for A, B in loras]


def mean_norm(loras: Sequence[Lora]) -> float:
    """Mean of ‖ΔW_t‖ over those that are not 0; 0 if none is."""
    norms = [length for lora in loras if (length := norm_of(lora)) > 0]
    return sum(norms) / len(norms) if norms else 0.0


def match(merged: Lora, loras: Sequence[Lora]) -> Lora:
    """‖ΔW‖ of a module brought to the mean of ‖ΔW_t‖; an update of 0 stays."""
    length = norm_of(merged)
    return Lora(merged.A, merged.B * (mean_norm(loras) / length)) if length > 0 else merged


def svc(merged: Lora, loras: Sequence[Lora], *, alpha: float = 0.1) -> Lora:
    """Output directions that aligned updates have counted several times over, or that a mean has shrunk, at the length
    that the updates have there.

    For σ_r, u_r of the merged update, a = u_rᵀ ΔW and a_t = u_rᵀ ΔW_t: σ_r is divided by the mean over t of
    ⟨a, a_t⟩ / ‖a_t‖², or by `alpha` where that is more; where one of the updates does not point that way,
    ⟨a, a_t⟩ <= 0, σ_r stays. An update of 0 has no say. SVC, arXiv 2602.05536; the released code's `alpha`.

    Returns:
        A (k, I), B (O, k) float64 in its SVD gauge, largest first, k the merged update's rank.
    """
    A, B = reduced(merged)
    root = A.norm(dim=1)  # √σ, which A's rows and B's columns have
    along = []
    for lora in loras:
        if (length := norm_of(lora)) > 0:
            own = (B / root).T @ lora.B.double() @ lora.A.double()
            square = own.square().sum(dim=1)
            inner = (root[:, None] * A * own).sum(dim=1)
            along.append(torch.where(square > (NOISE * length) ** 2, inner / square, 0))
    if not along:
        return Lora(A, B)
    share = torch.stack(along)
    gamma = torch.where(share.gt(0).all(dim=0), share.mean(dim=0).clamp_min(alpha), 1).sqrt()
    order = (root / gamma).argsort(descending=True, stable=True)
    return Lora((A / gamma[:, None])[order], (B / gamma)[:, order])


def lines(blocks: Mapping[str, int | None], alpha: float, *, beta: float = 1.0) -> dict[str, float]:
    """Layer-wise factors α + β·l / (L - 1), l = 0..L-1 the block that a module is in. LiNeS, arXiv 2410.17146.

    Modules outside of the blocks (a head) get α + β.
    """
    last = max([1, *(block for block in blocks.values() if block is not None)])
    return {name: alpha + beta * (1.0 if block is None else block / last) for name, block in blocks.items()}


def block_of(module: str) -> int | None:
    """The number in a module's name: 3 of "model.layers.3.mlp.up_proj"."""
    name = block_name(module)
    return int(name.rpartition(".")[2]) if name is not None else None


def block_name(module: str) -> str | None:
    """The numbered module that a module is in: model.layers.3 of model.layers.3.mlp.up_proj."""
    found = re.match(r"(.*?(?:^|\.)\d+)\.", module)
    return found[1] if found else None


def sum_of_entries(lora: Lora, rows: int = 512) -> float:
    """‖B·A‖₁ over entries, `rows` rows of ΔW at a time."""
    A = lora.A.float()
    return sum(float((part @ A).abs().sum()) for part in lora.B.float().split(rows))
