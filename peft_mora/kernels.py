"""MORA's gate in one Triton kernel each way: rows of h stay in registers from the norm to the weighted projections.

`gated_softmax` and `gated_softmax_backward` are those of routing.py, the same arguments and results; they take the
place of about ten and twenty small kernels there. A program has some rows whole, padded to a power of two. The K
largest are found by K times taking the largest away, on h itself, in whose order the scores are, so that no rounding
decides: exactly K experts, of equal ones the first.

Imported by nobody but routing.py, and only when it is asked for: this is the one module that needs Triton.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "`fused_gate` is a Triton kernel, and Triton is not installed. A torch with CUDA brings it on Linux; "
        "elsewhere try `pip install triton`, or leave `fused_gate` False, which computes the same."
    ) from error


LARGEST = 256  # experts of a group, which uint8 can number; a row is in the registers of one program
ELEMENTS = 128  # of h in a program, if a row is no longer. One warp has it all, so no sum needs shared memory
EPS = tl.constexpr(1e-12)  # routing.NORM_EPS


def can_run(h: Tensor) -> bool:
    """Whether the kernels take this: on a card (in Triton's interpreter on the CPU), 16 or 32 bits, R <= 256."""
    there = h.is_cuda or (INTERPRETED and h.device.type == "cpu")
    return there and h.dtype in (torch.float32, torch.bfloat16, torch.float16) and 0 < h.shape[-1] <= LARGEST


def gated_softmax(h: Tensor, top_k: int, temperature: float, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """(..., R) h to (..., R) w·h, (..., R) w in float32, and (..., K) uint8 which experts were kept, the largest
    first, or None."""
    h = h.contiguous()
    R = h.shape[-1]
    gated, weights = torch.empty_like(h), torch.empty_like(h, dtype=torch.float32)
    index = h.new_empty(*h.shape[:-1], top_k, dtype=torch.uint8) if top_k < R else None
    _launch(_forward, h, gated, weights, index, top_k, temperature, threshold)
    return gated, weights, index


def gated_softmax_backward(
    h: Tensor, index: Tensor | None, grad: Tensor, temperature: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """(..., R) w·h again and (..., R) dh, in the dtype of h, from the (..., R) gradient of w·h in any of the three."""
    h, grad = h.contiguous(), grad.contiguous()
    gated, dh = torch.empty_like(h), torch.empty_like(h)
    top_k = 0 if index is None else index.shape[-1]
    index = None if index is None else index.contiguous()
    _launch(_backward, h, grad, gated, dh, index, top_k, temperature, threshold)
    return gated, dh


def _launch(kernel: Any, h: Tensor, *arguments: Any) -> None:
    *tensors, index, top_k, temperature, threshold = arguments
    rows = h.numel() // h.shape[-1]
    constants = tile(h.shape[-1])
    if rows:
        with _on(h):
            kernel[(triton.cdiv(rows, constants["BLOCK"]),)](
                h, *tensors, h if index is None else index, rows, top_k, float(temperature), float(threshold),
                SELECTS=index is not None, CUTS=threshold > 0, num_warps=1, **constants,
            )  # fmt: skip


def tile(R: int) -> dict[str, int]:
    """Of a program: R, the columns that it has room for, its rows."""
    padded = triton.next_power_of_2(R)
    return {"R": R, "PADDED": padded, "BLOCK": max(1, ELEMENTS // padded)}


def _on(h: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current card, torch's operations where their tensors are."""
    return torch.cuda.device(h.device) if h.is_cuda else nullcontext()


@triton.jit
def _places(rows, R: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK, 1) rows of this program, (1, PADDED) columns, where each entry is, and which there are."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    column = tl.arange(0, PADDED)[None, :]
    return row, column, row * R + column, (row < rows) & (column < R)


@triton.jit
def _norm(h):
    return tl.maximum(tl.sqrt(tl.sum(h * h, axis=1, keep_dims=True)), EPS)


@triton.jit
def _softmax(logits):
    """Over each row, 0 where a logit is -inf."""
    p = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
    return p / tl.sum(p, axis=1, keep_dims=True)


@triton.jit(do_not_specialize=["rows", "top_k"])
def _forward(
    h_ptr, gated_ptr, weights_ptr, index_ptr, rows, top_k, temperature, threshold,
    R: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SELECTS: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    row, column, at, there = _places(rows, R, PADDED, BLOCK)
    h = tl.load(h_ptr + at, mask=there, other=0.0).to(tl.float32)
    norm = _norm(h)
    kept = column < R
    if SELECTS:
        left = tl.where(column < R, tl.where(h == h, h, float("inf")), float("-inf"))  # NaN as the largest
        kept = (row < 0) & (column < 0)  # none
        for k in range(top_k):
            best = tl.argmax(left, axis=1, tie_break_left=True, keep_dims=True)
            tl.store(index_ptr + row * top_k + k, best.to(tl.uint8), mask=row < rows)
            kept = kept | (column == best)
            left = tl.where(column == best, float("-inf"), left)
    weights = _softmax(tl.where(kept, h / (norm * temperature), float("-inf")))
    if CUTS:
        weights = tl.where(h / norm < threshold, 0.0, weights)
    tl.store(weights_ptr + at, weights, mask=there)
    tl.store(gated_ptr + at, (weights * h).to(gated_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows", "top_k"])
def _backward(
    h_ptr, grad_ptr, gated_ptr, dh_ptr, index_ptr, rows, top_k, temperature, threshold,
    R: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SELECTS: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    row, column, at, there = _places(rows, R, PADDED, BLOCK)
    h = tl.load(h_ptr + at, mask=there, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=there, other=0.0).to(tl.float32)
    norm = _norm(h)
    scores = h / norm
    kept = column < R
    if SELECTS:
        kept = (row < 0) & (column < 0)  # none
        for k in range(top_k):
            kept = kept | (column == tl.load(index_ptr + row * top_k + k, mask=row < rows, other=0).to(tl.int32))
    p = _softmax(tl.where(kept, scores / temperature, float("-inf")))
    weights = p
    if CUTS:
        weights = tl.where(scores < threshold, 0.0, p)
        grad = tl.where(scores < threshold, 0.0, grad)
    dp = grad * h
    ds = p * (dp - tl.sum(p * dp, axis=1, keep_dims=True))
    along = tl.sum(scores * ds, axis=1, keep_dims=True)
    ds -= scores * tl.where(norm > EPS, along, 0.0)
    dh = weights * grad + ds / (norm * temperature)
    tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=there)
    tl.store(gated_ptr + at, (weights * h).to(gated_ptr.dtype.element_ty), mask=there)


INTERPRETED = not isinstance(_forward, triton.JITFunction)  # TRITON_INTERPRET=1 before Triton was imported
