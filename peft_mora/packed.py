"""A matrix of which only some entries are kept: their values and their places, as bits on disk."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class PackedB(nn.Module):
    """The trained entries of a sparse B: `weight` (kept,), in row-major order of their places in (O, r)."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kept))

    def extra_repr(self) -> str:
        return f"kept={self.weight.numel()}"


class Packed(NamedTuple):
    """A sparse B (O, r) by the places of its trained entries and of those that an earlier task has frozen."""

    shape: tuple[int, int]
    places: Tensor
    frozen_places: Tensor | None
    frozen: Tensor | None

    def matrix(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        flat = values.new_zeros(self.shape[0] * self.shape[1], dtype=dtype)
        if self.frozen_places is not None and self.frozen is not None:
            flat = flat.index_copy(0, self.frozen_places, self.frozen.to(dtype))
        return flat.index_copy(0, self.places, values.to(dtype)).view(self.shape)

    def pack(self, grad: Tensor) -> Tensor:
        return grad.reshape(-1).index_select(0, self.places)


def pack_bits(mask: Tensor) -> Tensor:
    """(n,) bool -> (ceil(n / 8),) uint8, eight to a byte: a kept entry at sparsity 0.9 costs 1.25 bytes of index."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """Inverse of `pack_bits`: (n,) bool, on the device of `bits`. In torch, so that torch.compile can trace it."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).flatten()[:n].bool()
