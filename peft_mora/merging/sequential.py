"""One adapter after the other, in memory that does not grow with their number. The order matters, and is kept.

>>> merged = Opcm(rank=16)
>>> for lora in loras_of_one_module:
...     merged.add(lora)
>>> merged.result()
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import check_field, is_int, is_number
from ..lora_file import Lora
from .core import check_size, core_space, norm_of, reduced, svd, to_lora


class Opcm:
    """What is merged so far is protected: the part of a new update along its leading directions is left out.

    With the merged update's SVD UΣVᵀ and P = Uᵀ ΔW V, the diagonal of P and its top block (as many directions as hold
    half of Σσ) become 0, what is left is added, and the result is scaled to the mean of all ‖ΔW_t‖. OPCM, arXiv
    2501.09522. The diagonal counts as far as the merged update has directions; beyond, the choice of a basis would
    decide.

    Args:
        rank: budget: what is merged so far is truncated to it after each adapter; None keeps all.
        block: share of Σσ in the protected block, 0..1.
    """

    def __init__(self, rank: int | None = None, block: float = 0.5) -> None:
        check_field(is_number(block) and 0 <= block <= 1, "block", block, "a share in [0, 1]")
        check_field(rank is None or (is_int(rank) and rank >= 1), "rank", rank, "an integer >= 1, or None")
        self.rank, self.block = rank, block
        self.total: Lora | None = None  # unscaled, in its SVD gauge
        self.norms = 0.0
        self.count = 0

    def add(self, lora: Lora, weight: float = 1.0) -> None:
        check_size(lora, self.total)
        self.count += 1
        new = Lora(lora.A.double(), weight * lora.B.double())
        if self.total is None:
            self.total = reduced(new, self.rank)
            self.norms += norm_of(new)
            return
        space, (old, core) = core_space([self.total, new])
        self.norms += float(core.norm())
        U, S, Vh = torch.linalg.svd(old, full_matrices=True)
        k = len(svd(old)[1])
        P = U.T @ core @ Vh.T
        P.diagonal()[:k] = 0
        protected = int((S.cumsum(0) < self.block * S.sum()).sum()) + 1 if k and self.block else 0
        P[:protected, :protected] = 0
        self.total = to_lora(space, old + U @ P @ Vh, self.rank)

    def result(self) -> Lora:
        """A (k, I), B (O, k) float64."""
        if self.total is None:
            raise ValueError("Nothing was added: call add(lora) first.")
        norm = norm_of(self.total)
        scale = (self.norms / self.count / norm) ** 0.5 if norm > 0 else 1.0
        return Lora(scale * self.total.A, scale * self.total.B)


class Slao:
    """A of the newest adapter, B moved towards it by 1 / √t. For adapters that were trained from one another: their
    factors have to be in one gauge. SLAO, arXiv 2512.23017."""

    def __init__(self) -> None:
        self.total: Lora | None = None
        self.count = 0

    def add(self, lora: Lora, weight: float = 1.0) -> None:
        A, B = lora.A.double(), weight * lora.B.double()
        check_size(lora, self.total)
        self.count += 1
        if self.total is None:
            self.total = Lora(A, B)
            return
        if A.shape != self.total.A.shape:
            raise ValueError(
                f"rule='slao' goes on from one adapter to the next in its own factors, and A is {tuple(A.shape)} "
                f"after {tuple(self.total.A.shape)}: it is for adapters of one rank and the same modules. Take "
                "rule='opcm'."
            )
        self.total = Lora(A, self.total.B + (B - self.total.B) / self.count**0.5)

    def result(self) -> Lora:
        """A (r, I), B (O, r) float64."""
        if self.total is None:
            raise ValueError("Nothing was added: call add(lora) first.")
        return self.total


def opcm(loras: Sequence[Lora], weights: Sequence[float], rank: int | None = None, *, block: float = 0.5) -> Lora:
    """`Opcm` over adapters in their order."""
    merged = Opcm(rank, block)
    for lora, weight in zip(loras, weights, strict=True):
        merged.add(lora, weight)
    return merged.result()


def slao(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """`Slao` over adapters in their order."""
    merged = Slao()
    for lora, weight in zip(loras, weights, strict=True):
        merged.add(lora, weight)
    return merged.result()
