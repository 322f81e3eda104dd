"""The core that all methods share, with a backward of its own that keeps next to nothing.

    h = x Aᵀ      u = s · gate(h)      y = y0 + u Bᵀ                       (several blocks of experts: y0 + Σ u_b B_bᵀ)
    dB = gᵀ u     dh = gate'(h)ᵀ (s · g B)      dA = dhᵀ x      dx = dh A                               (g = dL/dy)

Kept from forward to backward: x where an A trains, and what the gate needs, (T, R) or less. x is the caller's own
tensor, so q, k and v on one input keep it once; of a product whose factors autograd keeps anyhow, as in front of a
Llama's down_proj, nothing is kept at all. u is made again from that, and a dropout's mask from its seed. A and B are
cast to the dtype of x, never x to theirs, and the copies are dropped. The update is added into y0 where the caller
says that y0 is nobody else's, so that nothing of size (T, O) is made at all.

`add_update` is the fast path. `plain_add_update` is the same in operations that torch.compile, torch.export and
functorch can see into; it runs in their place, and for second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Form(Protocol):
    """How a matrix is stored, where it is not stored as one. Frozen values need no `pack`."""

    def dense(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix, differentiable with respect to `values`."""

    def pack(self, grad: Tensor) -> Tensor:
        """Of the matrix' gradient, that of `values`."""


class Block(NamedTuple):
    """Experts that are stored together: A (r, I) and B (O, r), or the values that their forms make these of."""

    A: Tensor
    B: Tensor
    A_form: Form | None = None
    B_form: Form | None = None


class Wanted(NamedTuple):
    """Whose gradients the backward is for: x, and A and B of each block."""

    x: bool
    A: list[bool]
    B: list[bool]

    @property
    def dh(self) -> list[bool]:
        """For which blocks it needs that of h."""
        return [self.x or A for A in self.A]


NOTHING = Wanted(False, [], [])
# The hooks on saved tensors that are in force; torch has no public way to ask.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


class Base(NamedTuple):
    """The frozen weight W (O, I) that an y0 was made with outside of autograd, or the form that holds it."""

    W: Tensor | None
    form: Form | None = None


class Gate:
    """What becomes of the projections: here nothing (w = 1). A method with routing overrides all but `done`."""

    def plain(self, hs: list[Tensor]) -> list[Tensor]:
        """(..., r) of each block to the same, in differentiable operations."""
        return hs

    def done(self, update: Tensor) -> Tensor:
        """The finished update (..., O) on its way to the output, on the plain path."""
        return update

    def forward(self, hs: list[Tensor], shape: torch.Size, wanted: Wanted) -> tuple[list[Tensor], list[Tensor | None]]:
        """The same without autograd.

        Args:
            hs: (T, r) projections of each block; may be written into if they are not kept.
            shape: the leading dimensions of the layer's input; their product is T.
            wanted: what `backward` will be asked for; its lists are empty where there will be no backward.

        Returns:
            (T, r) of each block, in the dtype of h; and the tensors that `backward` needs, in any number.
        """
        return hs, [h if wanted_B else None for h, wanted_B in zip(hs, wanted.B, strict=False)]

    def backward(
        self, kept: Sequence[Tensor | None], grads: list[Tensor | None], wanted: Wanted
    ) -> tuple[Sequence[Tensor | None], list[Tensor | None]]:
        """Args:
            kept: what `forward` returned.
            grads: (T, r) gradient of each block's output; None where no block needs it.
            wanted: as in `forward`.

        Returns:
            The outputs of `forward` again and the gradients of h, for each block; None where not wanted.
        """
        return kept, grads


DENSE = Gate()


def can_run(x: Tensor) -> bool:
    """Whether `add_update` may take this input; the plain path takes any."""
    return not (
        (type(x) is not Tensor and type(x) is not torch.nn.Parameter)  # DTensor, fake tensors
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    )  # fmt: skip


def plain_add_update(
    y0: Tensor,
    x: Tensor,
    blocks: Sequence[Block],
    gate: Gate,
    scale: float,
    dropout: float = 0.0,
    in_place: bool = False,
    base: None = None,
) -> Tensor:
    """The twin of `add_update`: same arguments, same result. It leaves y0 alone, whatever `in_place` permits, and y0
    comes with its own gradient. The mask of a dropout comes from the same generator, but is another one.
    """
    x = F.dropout(x, dropout)
    hs = [F.linear(x, _dense(b.A, b.A_form, x.dtype)) for b in blocks]
    # Block by block, and the newest last: with B = 0 it adds exact zeros, so growing changes no output.
    outputs = [
        F.linear(h, _dense(b.B, b.B_form, h.dtype)) for h, b in zip(gate.plain(hs), blocks, strict=True)
    ]  # fmt: skip
    update = gate.done(sum(outputs[1:], start=outputs[0]))
    return y0 + (update * scale).to(y0.dtype)


def add_update(
    y0: Tensor,
    x: Tensor,
    blocks: Sequence[Block],
    gate: Gate,
    scale: float,
    dropout: float = 0.0,
    in_place: bool = False,
    base: Base | None = None,
) -> Tensor:
    """y0 + scale · Σ_b gate(x A_bᵀ) B_bᵀ.

    Args:
        y0: (..., O) the base layer's output, any float dtype, kept.
        x: (..., I) input. The update is computed in its dtype, under autocast in autocast's.
        blocks: at least one.
        gate: what is done to the projections.
        scale: alpha / r.
        dropout: share of x's entries that are dropped, in [0, 1); 0 outside of training.
        in_place: y0 is contiguous, no view, and nobody else holds it: the update may be added into it.
        base: given if y0 = x Wᵀ (+ bias) carries no gradient: dx then has the base layer's part, g W, added up in one
            matrix product with ours instead of by autograd, (T, I) at a time.

    Returns:
        (..., O) in the dtype of y0; y0 itself with `in_place`.

    Raises:
        RuntimeError: in the backward, if it is to be differentiated once more.
    """
    weights = [tensor for b in blocks for tensor in (b.A, b.B)]
    core = _Core(x, blocks, gate, scale, dropout, in_place, base)
    if torch.is_grad_enabled():
        W = None if base is None else base.W
        return _AddUpdate.apply(y0, x, core, W, *weights)
    return core.forward(y0, x, weights)[0]


def _dense(values: Any, form: Form | None, dtype: torch.dtype) -> Tensor:
    # Contiguous, so that a block computes bit for bit what it did before it became a part of the bank.
    return values.to(dtype).contiguous() if form is None else form.dense(values, dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in on this input: x's, under autocast autocast's."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):  # autocast leaves float64 alone
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def index_dtype(experts: int) -> torch.dtype:
    """The smallest dtype that can number the experts."""
    return torch.uint8 if experts <= 256 else torch.int16 if experts <= 32768 else torch.int32


def dropout_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in x's shape and dtype: the same for the same seed and device."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)


def _kept_input(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x itself, or the two tensors whose product it is, if autograd holds both for the gradients of that product: to
    save these costs nothing, and multiplying again gives x bit for bit.

    Where hooks on saved tensors are or were in force (checkpointing, offloading), it is x: to look at what another
    node has saved would set off what they are for.
    """
    node = x.grad_fn
    # The name is all that Python sees of a built-in node's class. An x of a later version was written into since.
    if type(node).__name__ != "MulBackward0" or x._version or _saved_tensors_hooks(False):
        return x, None
    try:
        hooked = any(getattr(raw, "unpack_hook", True) for raw in (node._raw_saved_self, node._raw_saved_other))
        a, b = (None, None) if hooked else (node._saved_self, node._saved_other)
    except RuntimeError:  # a backward has freed them
        return x, None
    return (x, None) if a is None or b is None else (a.detach(), b.detach())


class _Core:
    """One call: what is no tensor of it, and the arithmetic of both directions without autograd.

    `weights` are A and B of each block in turn.
    """

    __slots__ = ("base", "dropout", "dtype", "forms", "gate", "in_place", "scale", "seed", "shape", "wanted")

    def __init__(
        self,
        x: Tensor,
        blocks: Sequence[Block],
        gate: Gate,
        scale: float,
        dropout: float,
        in_place: bool,
        base: Base | None,
    ) -> None:
        self.base = None if base is None else Base(None, base.form)  # W is saved by autograd
        self.forms = [(b.A_form, b.B_form) for b in blocks]
        self.gate, self.scale, self.dropout, self.in_place = gate, scale, dropout, in_place
        self.shape, self.dtype = x.shape, compute_dtype(x)
        # From the CPU's generator, which checkpointing puts back for its recomputation whatever the device.
        self.seed = int(torch.randint(2**62, ())) if dropout else 0
        self.wanted = NOTHING

    def rows(self, x: Tensor) -> Tensor:
        """(T, I) of x, after dropout."""
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        return rows * dropout_mask(rows, self.dropout, self.seed) if self.dropout else rows

    def forward(self, y0: Tensor, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor | None]]:
        """y, and what the gate keeps."""
        rows, dtype = self.rows(x), self.dtype
        As, Bs = weights[::2], weights[1::2]
        hs = [torch.mm(rows, _dense(A, form, dtype).t()) for A, (form, _) in zip(As, self.forms, strict=True)]
        gated, kept = self.gate.forward(hs, self.shape[:-1], self.wanted)
        y = y0 if self.in_place else None
        # Block by block, and the newest last: with B = 0 it adds exact zeros, so growing changes no output.
        for w, B, (_, form) in zip(gated, Bs, self.forms, strict=True):
            u, B_t = w * self.scale, _dense(B, form, dtype).t()
            if y0.dtype != dtype:
                y = y0.clone(memory_format=torch.contiguous_format) if y is None else y
                y.view(-1, y.shape[-1]).add_(torch.mm(u, B_t))
            elif y is None:
                y = torch.addmm(y0.reshape(-1, y0.shape[-1]), u, B_t).view(y0.shape)
            else:
                y.view(-1, y.shape[-1]).addmm_(u, B_t)
        assert y is not None
        return y, kept

    def backward(
        self,
        g: Tensor,
        W: Tensor | None,
        x: Tensor | None,
        weights: Sequence[Tensor],
        kept: Sequence[Tensor | None],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dx and the gradients of `weights`; None where not wanted. x is there where an A is trained."""
        dtype, wanted, scale = self.dtype, self.wanted, self.scale
        g = g.reshape(-1, g.shape[-1]).to(dtype)
        grads: list[Tensor | None] = [None] * len(self.forms)
        if any(wanted.dh):  # then all, as the gate may couple the blocks
            grads = [
                torch.mm(g, _dense(B, form, dtype)).mul_(scale)
                for B, (_, form) in zip(weights[1::2], self.forms, strict=True)
            ]
        gated, dhs = self.gate.backward(kept, grads, wanted)
        rows = None if x is None else self.rows(x)
        dx: Tensor | None = None
        d_weights: list[Tensor | None] = []
        for i, ((A_form, B_form), w, dh) in enumerate(zip(self.forms, gated, dhs, strict=True)):
            A, B, dA, dB = weights[2 * i], weights[2 * i + 1], None, None
            if wanted.A[i]:
                assert dh is not None and rows is not None
                dA = torch.mm(dh.t(), rows)
                dA = (dA if A_form is None else A_form.pack(dA)).to(A.dtype)
            if wanted.B[i]:
                assert w is not None
                dB = torch.mm(g.t(), w * scale)
                dB = (dB if B_form is None else B_form.pack(dB)).to(B.dtype)
            if wanted.x:
                assert dh is not None
                dense = _dense(A, A_form, dtype)
                dx = torch.mm(dh, dense) if dx is None else dx.addmm_(dh, dense)
            d_weights += [dA, dB]
        if dx is not None and self.dropout:
            dx.mul_(dropout_mask(dx, self.dropout, self.seed))
        if dx is not None and self.base is not None:
            dx.addmm_(g, _dense(W, self.base.form, dtype))
        return None if dx is None else dx.view(self.shape), d_weights


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y0: Tensor, x: Tensor, core: _Core, W: Tensor | None, *weights: Tensor) -> Tensor:
        _, x_wanted, _, _, *wanted = ctx.needs_input_grad
        core.wanted = Wanted(x_wanted, wanted[::2], wanted[1::2])
        y, kept = core.forward(y0, x, weights)
        ctx.core = core
        # The weights themselves and not their casts, which would be (R, I) and (O, R) more for each layer.
        a, b = _kept_input(x) if any(core.wanted.A) else (None, None)
        ctx.save_for_backward(W, a, b, *weights, *kept)
        if core.in_place:
            ctx.mark_dirty(y0)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The fast path of MORA, LORI and FLYLORA layers has first derivatives only. For second derivatives "
                "(create_graph=True) take the plain one: `peft_mora.base.AdapterLinear.lean = False`."
            )
        W, a, b, *saved = ctx.saved_tensors
        core, n = ctx.core, 2 * len(ctx.core.forms)
        device = g.device.type
        autocast = torch.is_autocast_enabled(device)  # the forward has settled the dtype
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            dx, d_weights = core.backward(g, W, a if b is None else a * b, saved[:n], saved[n:])
        return g if ctx.needs_input_grad[0] else None, dx, None, None, *d_weights
