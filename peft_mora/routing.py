"""Routing rules as pure functions: tensors in, tensors out.

Letters as in the docs: T tokens (any leading shape), R rank-1 experts, K active experts a token.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


# Below this norm a token has no direction among the experts; scores go to 0 instead of to infinity.
NORM_EPS = 1e-12


def at_least_float32(h: Tensor) -> Tensor:
    """Scores live in float32 (or wider): at temperature 0.01 logits reach 100, where bfloat16 has steps of 0.5."""
    return h.to(torch.promote_types(h.dtype, torch.float32))


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """For what is to be computed in the dtypes that it has, where t is."""
    if t.is_meta or not torch.is_autocast_enabled(t.device.type):
        return nullcontext()
    return torch.autocast(t.device.type, enabled=False)


def expert_scores(h: Tensor) -> Tensor:
    """Signed share of each expert in a token's projection (MoRAM, arXiv 2506.21035, self-activation).

    `s = h / max(||h||_2, eps)`, the norm taken over the experts.

    Args:
        h: (..., R) projections x·Aᵀ, any float dtype.

    Returns:
        (..., R) scores in [-1, 1], float32 (float64 for float64 input).
    """
    h = at_least_float32(h)
    return h / torch.linalg.vector_norm(h, dim=-1, keepdim=True).clamp_min(NORM_EPS)


def softmax_gate(h: Tensor, top_k: int, temperature: float, threshold: float = 0.0) -> Tensor:
    """Weights of the experts that activate themselves: top-k of the signed scores, then a softmax over those kept.

    Args:
        h: (..., R) projections x·Aᵀ, any float dtype.
        top_k: K, how many experts a token may wake; K >= R keeps all.
        temperature: softmax temperature, > 0.
        threshold: experts whose score is below get weight 0, without renormalising; 0 turns this off. For inference
            only: pass 0 in training.

    Returns:
        (..., R) weights, float32 (float64 for float64 input), at most K of them non-zero, summing to 1 (less with
        `threshold`).
    """
    scores = expert_scores(h)
    if top_k < scores.shape[-1]:
        kept, index = scores.topk(top_k, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, index, torch.softmax(kept / temperature, dim=-1))
    else:
        weights = torch.softmax(scores / temperature, dim=-1)
    if threshold > 0:
        weights = torch.where(scores < threshold, 0.0, weights)
    return weights


def gated_softmax(
    h: Tensor, top_k: int, temperature: float, threshold: float = 0.0, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """w·h with w = softmax_gate(h, ...), without autograd and in half as many operations.

    Args:
        h: (..., R) projections; the rest as in `softmax_gate`.
        fused: as one Triton kernel (kernels.py) where that takes h, which is on a card, of at most 32 bits and 256
            experts; elsewhere, and under torch.compile, as without.

    Returns:
        (..., R) w·h in the dtype of h; (..., R) w, float32 or wider; (..., K) which experts the top-k kept (int64, the
        kernel's uint8), None where it kept them all. Of experts that are level any are kept, by the kernel the first.

    Raises:
        ImportError: `fused`, and there is no Triton.
    """
    if fused and (kernels := _kernels(h)):
        return kernels.gated_softmax(h, top_k, temperature, threshold)
    norm = _norm(h)
    logits = h / (norm * temperature)
    index = None
    if top_k < h.shape[-1]:
        kept, index = logits.topk(top_k, dim=-1)
        weights = torch.zeros_like(logits).scatter_(-1, index, torch.softmax(kept, dim=-1))
    else:
        weights = torch.softmax(logits, dim=-1)
    if threshold > 0:
        weights.masked_fill_(h / norm < threshold, 0.0)
    return torch.mul(weights, h, out=torch.empty_like(h)), weights, index


def gated_softmax_backward(
    h: Tensor, index: Tensor | None, grad: Tensor, temperature: float, threshold: float = 0.0, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """The result of `gated_softmax` again, and the gradient of h from its gradient, written out by hand.

    With w = m·p, p the softmax over the experts kept, m = 0 below the threshold, else 1, n = max(||h||_2, eps):
        dp = m·grad·h        ds = p (dp - Σ p dp) / temperature        dh = w·grad + (ds - s Σ s ds) / n
    where the last sum is left out for a norm below eps.

    Args:
        h: (..., R) projections.
        index: which experts were kept, in any integer dtype, or None.
        grad: (..., R) gradient of w·h.
        temperature, threshold: as they were there.
        fused: as there; either may be without when the other is with.

    Returns:
        (..., R) w·h and (..., R) dh, both in the dtype of h.
    """
    if fused and (kernels := _kernels(h)):
        return kernels.gated_softmax_backward(h, index, grad, temperature, threshold)
    norm = _norm(h)
    scores = h / norm
    if index is None:
        p = torch.softmax(scores / temperature, dim=-1)
    else:
        index = index.long()
        p = torch.softmax(scores.gather(-1, index).div_(temperature), dim=-1)
        p = torch.zeros_like(scores).scatter_(-1, index, p)
    w = p
    if threshold > 0:
        below = scores < threshold
        grad, w = grad.masked_fill(below, 0.0), p.masked_fill(below, 0.0)
    grad = at_least_float32(grad)
    ds = torch.ops.aten._softmax_backward_data(grad * h, p, -1, p.dtype)  # one pass where it takes four
    along = (scores * ds).sum(-1, keepdim=True).mul_(norm > NORM_EPS)
    ds.addcmul_(scores, along, value=-1)
    gated = torch.mul(w, h, out=torch.empty_like(h))
    return gated, w.mul_(grad).addcdiv_(ds, norm.mul_(temperature)).to(h.dtype)


def _kernels(h: Tensor) -> Any:
    """The module of them if it takes h."""
    if torch.compiler.is_compiling():  # which makes kernels of the operations themselves
        return None
    from . import kernels

    return kernels if kernels.can_run(h) else None


def _norm(h: Tensor) -> Tensor:
    """(..., 1) max(||h||_2, eps), float32 or wider."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=wide).clamp_min_(NORM_EPS)


def select_by_magnitude(h: Tensor, offset: Tensor, k: int) -> Tensor:
    """For each token, the k experts with the largest |h| + offset (FlyLoRA, arXiv 2510.08396, eq. 8-9).

    The offset is outside of the absolute value: inside, it raises an expert's share whichever way it moves, and
    balancing makes the load less even (spread of the counts 0.19 -> 0.32 in 400 steps of 1e-3 on Gaussian inputs with
    32 experts, 8 active; outside 0.19 -> 0.08).

    Args:
        h: (..., R) projections x·Aᵀ, any float dtype; compared in float32 or wider.
        offset: (R,) load-balance offset; ranks only, never multiplies the output.
        k: active experts a token, 1 <= k <= R.

    Returns:
        (..., k) indices, int64.
    """
    return (at_least_float32(h.detach()).abs() + offset).topk(k, dim=-1).indices


def select_by_sign(h: Tensor, offset: Tensor, k: int) -> Tensor:
    """As `select_by_magnitude`, by the largest h + offset: the rule of FlyLoRA's released code."""
    return (at_least_float32(h.detach()) + offset).topk(k, dim=-1).indices


def balance_step(offset: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Raise the offset of experts that are chosen less than the mean, lower that of the others (FlyLoRA, eq. 10).

    Args:
        offset: (R,) float32.
        counts: (R,) how often each expert was chosen.
        rate: step size, >= 0.

    Returns:
        (R,) the new offset.
    """
    return torch.add(offset, torch.sub(counts.sum(), counts, alpha=counts.numel()).sign_(), alpha=rate)


def sigmoid_gate(scores: Tensor, offset: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights by a learned router: the K best of many sigmoids, over their sum (SMoRA, arXiv 2501.15103).

    `q = sigmoid(scores) + offset`; of the K largest q, `q / Σ q`. The offset is inside of the weights, as in the
    released code; it is balanced by `balance_step` and never trained.

    Args:
        scores: (..., E) router's projections x·Wᵀ, any float dtype; sigmoid and sum are float32 or wider.
        offset: (E,) load-balance offset.
        top_k: K, how many experts a token wakes; K >= E keeps all.

    Returns:
        (..., E) weights, float32 or wider, summing to 1; (..., K) int64 which experts they are of.
    """
    q = torch.sigmoid(at_least_float32(scores)) + offset
    index = q.detach().topk(min(top_k, q.shape[-1]), dim=-1).indices
    kept = q.gather(-1, index)
    return torch.zeros_like(q).scatter(-1, index, kept / _nonzero(kept.sum(-1, keepdim=True))), index


def kept_sigmoids(scores: Tensor, offset: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the experts that `sigmoid_gate` has kept, without autograd, what its backward needs.

    Args:
        scores: (T, K) their scores.
        offset: (E,) as it was there.
        index: (T, K) int64, which they are.

    Returns:
        (T, K) sigmoids p, (T, K) weights g = q / Σ q, (T, 1) the sums; float32 or wider.
    """
    p = torch.sigmoid(at_least_float32(scores))
    q = p + offset[index]
    total = _nonzero(q.sum(-1, keepdim=True))
    return p, q / total, total


def kept_sigmoids_backward(p: Tensor, g: Tensor, total: Tensor, dg: Tensor) -> Tensor:
    """Gradient of the scores (T, K) from that of the weights: ds = p (1 - p) (dg - Σ dg g) / Σ q.

    Args:
        p, g, total: of `kept_sigmoids`.
        dg: (T, K) gradient of g.
    """
    return (dg - (dg * g).sum(-1, keepdim=True)) / total * p * (1 - p)


def _nonzero(total: Tensor) -> Tensor:
    """Sums whose sigmoids have all underflown (scores below -100) go to eps: the weights are 0 then."""
    return torch.where(total.abs() < NORM_EPS, NORM_EPS, total)


def selection_loss(
    h: Tensor, G: Tensor, top_k: int, selection: float, balance: float, real: Tensor | None = None
) -> Tensor:
    """What sends tokens to few experts, and all experts to work, where no router does (FURINA, arXiv 2509.14900;
    reconstructed, its formulas could not be read).

        n_te = ||Ŵ_e x_t|| = sqrt(h_teᵀ G_e h_te)        s_te = n_te / Σ_e n_te        M_te = 1 for the K largest
        selection · (1 - mean_t Σ_e M_te s_te)  +  balance · E Σ_e F_e P_e,    F = mean_t M / K,  P = mean_t s

    Args:
        h: (T, E, r) projections x·A_eᵀ, any float dtype; computed in float32 or wider.
        G: (E, r, r) of Ŵ_e = B̂_e A_e: B̂_eᵀ B̂_e.
        top_k: K, 1 <= K <= E.
        selection, balance: the weights of the two; `balance` alone is at least 1 where the load is even.
        real: (T, 1) bool, tokens that count; None: all.

    Returns:
        () the loss.
    """
    with without_autocast(h):
        return _selection(at_least_float32(h), at_least_float32(G), top_k, selection, balance, real)[0]


def selection_loss_backward(
    h: Tensor, G: Tensor, top_k: int, selection: float, balance: float, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of `selection_loss` for h (T, E, r) and G (E, r, r), float32 or wider, by hand, F being constant:
    ds = (balance E F - selection M) / T      dn = (ds - Σ ds s) / Σ n      dh = dn/n G h      dG = Σ_t dn/2n h hᵀ."""
    wide, G = at_least_float32(h), at_least_float32(G)
    _, n, s, c = _selection(wide, G, top_k, selection, balance, real)
    a = (c - (c * s).sum(-1, keepdim=True)) / n.sum(-1, keepdim=True) / n
    dG = torch.einsum("te,ter,tes->ers", a / 2, wide, wide)
    return a[..., None] * torch.einsum("tes,ers->ter", wide, _symmetric(G)), dG


def _selection(
    h: Tensor, G: Tensor, top_k: int, selection: float, balance: float, real: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """() the loss; (T, E) norms n, shares s, and the gradient of s."""
    squares = (torch.einsum("tes,ers->ter", h, _symmetric(G)) * h).sum(-1)
    n = (squares.clamp_min(0) + NORM_EPS).sqrt()
    s = n / n.sum(-1, keepdim=True)
    chosen = torch.zeros_like(s).scatter(-1, s.detach().topk(top_k, dim=-1).indices, 1)
    weight = torch.ones_like(s[:, :1]) if real is None else real.to(s.dtype)
    weight = weight / weight.sum().clamp_min(1)
    load = (chosen * weight).sum(0) * (s.shape[-1] / top_k)  # E·F
    c = weight * (balance * load - selection * chosen)
    return selection * weight.sum() + (c * s).sum(), n, s, c


def _symmetric(G: Tensor) -> Tensor:
    return (G + G.transpose(-1, -2)) / 2
