"""The core space of several updates of one module: small matrices that hold all of them, and the way back to factors.

    ΔW_t = B_t A_t (O, I), t = 1..N
    V (I, q), U (O, p): orthonormal bases of the rows of [A_1; …; A_N] and of the columns of [B_1 … B_N]
    M_t = Uᵀ ΔW_t V, at most (Σr, Σr), loses nothing: U M_t Vᵀ = ΔW_t
Everything is float64; an (O, I) matrix is never formed. Source: Core Space Merging, arXiv 2509.17786.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..lora_file import Lora


# Directions below this share of the longest are rounding: adapters with one A in common have a smaller joint rank.
NOISE = 1e-6


class Space(NamedTuple):
    """U (O, p) and V (I, q), orthonormal columns, float64; strongest directions of the stacked factors first."""

    U: Tensor
    V: Tensor


def check_size(lora: Lora, other: Lora | None) -> None:
    """Refuse an update that cannot be added to another.

    Raises:
        ValueError: their sizes differ.
    """
    sizes = [(len(one.B), one.A.shape[1]) for one in (lora, other) if one is not None]
    if len(set(sizes)) > 1:
        new, old = (f"{rows} x {columns}" for rows, columns in sizes)
        raise ValueError(f"An update of {new} cannot follow one of {old}: add those of one module alone.")


def thin_svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (n, k), S (k,), Vᵀ (k, m) of a tall matrix (n, m) by QR first, without what is below `NOISE`."""
    Q, R = torch.linalg.qr(X)
    U, S, Vh = svd(R)
    return Q @ U, S, Vh


def support(S: Tensor) -> int:
    """How many singular values (falling) are more than rounding; 0 of a zero matrix."""
    return int(S.gt(NOISE * S[0]).sum()) if len(S) else 0


def svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (p, k), S (k,), Vᵀ (k, q) of a core, without what is below `NOISE`."""
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    k = support(S)
    return U[:, :k], S[:k], Vh[:k]


def canonical(lora: Lora) -> Lora:
    """The same ΔW in its SVD gauge: rows of A and columns of B orthogonal, of norms √σ falling, signs by A's largest
    entries. What depends on the gauge (B·G, G⁻¹·A) of an adapter then depends on its function only. Rank as
    before."""
    (Ua, Sa, Va), (Ub, Sb, Vb) = thin_svd(lora.A.double().T), thin_svd(lora.B.double())
    U, S, Vh = svd((Sb[:, None] * Vb) @ (Sa[:, None] * Va).T)
    A, B = S.sqrt()[:, None] * (Vh @ Ua.T), (Ub @ U) * S.sqrt()
    sign = A.gather(1, A.abs().argmax(1, keepdim=True)).sign() if len(A) else A[:, :1]
    rest = len(lora.A) - len(A)
    return Lora(nn.functional.pad(sign * A, (0, 0, 0, rest)), nn.functional.pad(B * sign.T, (0, rest)))


def core_space(loras: Sequence[Lora]) -> tuple[Space, list[Tensor]]:
    """The space and each update's core in it.

    Args:
        loras: of one module; A (r_t, I), B (O, r_t), r_t >= 0, any float dtype.

    Returns:
        Space, and M_t (p, q) float64.
    """
    V, Sa, Va = thin_svd(torch.cat([lora.A.double() for lora in loras]).T)
    U, Sb, Vb = thin_svd(torch.cat([lora.B.double() for lora in loras], dim=1))
    ranks = [len(lora.A) for lora in loras]
    rows, columns = (Sa[:, None] * Va).T.split(ranks), (Sb[:, None] * Vb).split(ranks, dim=1)  # A_t V and Uᵀ B_t
    return Space(U, V), [left @ right for left, right in zip(columns, rows, strict=True)]


def to_lora(space: Space, core: Tensor, rank: int | None = None) -> Lora:
    """U M Vᵀ as factors of its rank, or of the nearest update of rank <= `rank` (Eckart-Young); √σ on either side."""
    left, S, right = svd(core)
    left, S, right = left[:, :rank], S[:rank], right[:rank]
    return Lora(S.sqrt()[:, None] * (right @ space.V.T), (space.U @ left) * S.sqrt())


def reduced(lora: Lora, rank: int | None = None) -> Lora:
    """The same for any factors B·A, in float64."""
    space, (core,) = core_space([lora])
    return to_lora(space, core, rank)


def single(lora: Lora) -> Lora:
    """In float32, as it is written."""
    A, B = lora
    return Lora(A.float().contiguous(), B.float().contiguous())


def norm_of(lora: Lora) -> float:
    """‖B·A‖ (Frobenius) of any factors."""
    return float(((lora.B.T @ lora.B) * (lora.A @ lora.A.T)).sum().clamp_min(0).sqrt())
