"""The core that all methods share, with a backward of its own that saves next to nothing.

    h_i = x A_iᵀ        u_1 .. u_n = gate(h_1 .. h_m; G)        y = y0 + s · Σ_j u_j B_jᵀ
    dB_j = s · gᵀ u_j    du_j = s · g B_j    dh, dG = gate'(du)    dA_i = dh_iᵀ x    dx = Σ_i dh_i A_i    (g = dL/dy)

*downs* are the A_i (r_i, I), *ups* the B_j (O, r_j), and the gate says what becomes of the projections in between: as
many activations as there are ups, of as many projections as there are downs, with trainable tensors G of its own if it
has any. Experts in blocks are `downs=[A1, A2], ups=[B1, B2]`; a learned router `downs=[A, W], ups=[B]`; several
up-projections of one A `downs=[A], ups=[B1, .., Bn]` with their mixing weights in G.

Saved from forward to backward: x where a down trains, and what the gate needs, (T, R) or less. x is the caller's own
tensor, so q, k and v on one input save it once; of a product whose factors autograd holds anyhow, as in front of a
Llama's down_proj, nothing is saved at all. u is made again from that, and a dropout's mask from its seed. Downs and
ups are cast to the dtype of x, never x to theirs, and the copies are dropped. The update is added into y0 where the
caller says that y0 is nobody else's, so that nothing of size (T, O) is made at all.

`add_update` is the fast path. `plain_add_update`, its twin, is the same in operations that torch.compile, torch.export
and functorch can see into; it runs in their place, and for second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


class Form(Protocol):
    """How a matrix is stored, where it is not stored as one. Frozen values need no `pack`."""

    def matrix(self, values: Any, dtype: torch.dtype) -> Tensor:
        """The matrix, differentiable with respect to `values`."""

    def pack(self, grad: Tensor) -> Tensor:
        """Of the matrix' gradient, that of `values`."""


class Weight(NamedTuple):
    """A down (r, I) or an up (O, r), or the values that its form makes it of."""

    values: Tensor
    form: Form | None = None


class Wanted(NamedTuple):
    """Whose gradients the backward is for: x, each down, each up, each tensor of the gate."""

    x: bool
    downs: Sequence[bool]
    ups: Sequence[bool]
    gate: Sequence[bool]

    @property
    def dh(self) -> list[bool]:
        """For which projections it needs theirs."""
        return [self.x or down for down in self.downs]

    @property
    def any_dh(self) -> bool:
        return self.x or any(self.downs)


NOTHING = Wanted(False, [], [], [])
# The hooks on saved tensors that are in force, and whether any autocast is; torch has no public way to ask.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
_is_any_autocast_enabled = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


class Base(NamedTuple):
    """The frozen weight W (O, I) that an y0 was made with outside of autograd, or the form that holds it."""

    W: Tensor | None
    form: Form | None = None


class Gate:
    """What becomes of the projections: here nothing, one up for each down. A method that routes overrides all but
    `done`, and `tensors` where it trains any."""

    tensors: Sequence[Tensor] = ()  # its own trainable ones; `plain` takes them from here, the others as an argument

    def plain(self, hs: list[Tensor]) -> list[Tensor]:
        """(..., r_i) of each down to (..., r_j) for each up, in differentiable operations."""
        return hs

    def done(self, update: Tensor) -> Tensor:
        """The finished update (..., O) on its way to the output, on the plain path."""
        return update

    def forward(
        self, hs: list[Tensor], tensors: Sequence[Tensor], shape: torch.Size, wanted: Wanted
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The same without autograd.

        Args:
            hs: (T, r_i) projections of each down; may be written into if they are not saved.
            tensors: those of the gate.
            shape: the leading dimensions of the layer's input; their product is T.
            wanted: what `backward` will be asked for; its lists are empty where there will be no backward.

        Returns:
            (T, r_j) for each up, in the dtype of h; and the tensors that `backward` needs, in any number.
        """
        return hs, [h if up else None for h, up in zip(hs, wanted.ups, strict=False)]

    def backward(
        self,
        saved: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        grads: list[Tensor | None],
        wanted: Wanted,
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Args:
            saved: what `forward` returned.
            tensors: those of the gate.
            grads: (T, r_j) gradient for each up; None where nothing before the ups needs one.
            wanted: as in `forward`.

        Returns:
            The activations again, for each up; the gradients of h, for each down; those of `tensors`. None where not
            wanted.
        """
        return saved, grads, ()


NO_GATE = Gate()


class Parts(NamedTuple):
    """What an adapter adds to its layer's output, before scaling. A (r_i, I) each down, (O, r_j) each up."""

    downs: Sequence[Weight]
    ups: Sequence[Weight]
    gate: Gate = NO_GATE


def can_run(x: Tensor) -> bool:
    """Whether `add_update` may take this input; the plain path takes any."""
    return not (
        (type(x) is not Tensor and type(x) is not torch.nn.Parameter)  # DTensor, fake tensors
        or x.is_meta  # autocast knows no such device
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()  # selective checkpointing keeps what is written into here
    )  # fmt: skip


def plain_add_update(
    y0: Tensor,
    x: Tensor,
    downs: Sequence[Weight],
    ups: Sequence[Weight],
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
    us = gate.plain([F.linear(x, matrix_of(*down, x.dtype)) for down in downs])
    # Up by up, and the newest last: with B = 0 it adds exact zeros, so growing changes no output.
    outputs = [F.linear(u, matrix_of(*up, u.dtype)) for u, up in zip(us, ups, strict=True)]
    update = gate.done(sum(outputs[1:], start=outputs[0]))
    return y0 + (update * scale).to(y0.dtype)


def add_update(
    y0: Tensor,
    x: Tensor,
    downs: Sequence[Weight],
    ups: Sequence[Weight],
    gate: Gate,
    scale: float,
    dropout: float = 0.0,
    in_place: bool = False,
    base: Base | None = None,
) -> Tensor:
    """y0 + scale · Σ_j u_j B_jᵀ with u = gate(x A_1ᵀ, ..).

    Args:
        y0: (..., O) the base layer's output, in any float dtype.
        x: (..., I) input. The update is computed in its dtype, under autocast in autocast's.
        downs: A_i (r_i, I), at least one.
        ups: B_j (O, r_j), at least one.
        gate: what is done to the projections in between.
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
    core = _Core(x, downs, ups, gate, scale, dropout, in_place, base)
    tensors = [*(down.values for down in downs), *(up.values for up in ups), *gate.tensors]
    if torch.is_grad_enabled():
        W = None if base is None else base.W
        return _AddUpdate.apply(y0, x, core, W, *tensors)
    return core.forward(y0, x, tensors)[0]


def matrix_of(values: Any, form: Form | None, dtype: torch.dtype) -> Tensor:
    # Contiguous, so that a block computes bit for bit what it did before it became a part of the bank.
    return _cast(values, dtype).contiguous() if form is None else form.matrix(values, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # which takes 0.8 µs where there is nothing to do


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in on this input: x's, under autocast autocast's."""
    if _autocasts(x) and x.dtype != torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is: to ask for any device first takes 0.1 µs, for x's own 0.4."""
    return _is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def index_dtype(experts: int) -> torch.dtype:
    """The smallest dtype that can number the experts."""
    return torch.uint8 if experts <= 256 else torch.int16 if experts <= 32768 else torch.int32


def dropout_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in x's shape and dtype: the same for the same seed and device."""
    generator = torch.Generator(x.device).manual_seed(seed)
    # Contiguous: the order of memory is that of the draws, and a transposed x meets its gradient in another order.
    mask = torch.empty_like(x, memory_format=torch.contiguous_format)
    return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)


def _saved_input(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x itself, or the two tensors whose product it is, if autograd holds both for the gradients of that product: to
    save these costs nothing, and multiplying again gives x bit for bit.

    Where hooks on saved tensors are or were in force (checkpointing, offloading), it is x: to look at what another
    node has saved would set off what they are for. A change of x through `.data` cannot be seen.
    """
    node: Any = x.grad_fn
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

    `tensors` are the values of the downs, those of the ups, and the gate's own.
    """

    __slots__ = (
        "base", "downs", "dropout", "dtype", "gate", "in_place", "scale", "seed", "shape", "ups", "wanted",
    )  # fmt: skip

    def __init__(
        self,
        x: Tensor,
        downs: Sequence[Weight],
        ups: Sequence[Weight],
        gate: Gate,
        scale: float,
        dropout: float,
        in_place: bool,
        base: Base | None,
    ) -> None:
        self.base = None if base is None else Base(None, base.form)  # W is saved by autograd
        self.downs, self.ups = [down.form for down in downs], [up.form for up in ups]
        self.gate, self.scale, self.dropout, self.in_place = gate, scale, dropout, in_place
        self.shape, self.dtype = x.shape, compute_dtype(x)
        # From the CPU's generator, which checkpointing puts back for its recomputation whatever the device.
        self.seed = int(torch.randint(2**62, ())) if dropout else 0
        self.wanted = NOTHING

    def rows(self, x: Tensor) -> Tensor:
        """(T, I) of x, after dropout."""
        rows = _cast(x.reshape(-1, x.shape[-1]), self.dtype)
        return rows * dropout_mask(rows, self.dropout, self.seed) if self.dropout else rows

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """Those of the downs, of the ups, of the gate."""
        m, n = len(self.downs), len(self.downs) + len(self.ups)
        return tensors[:m], tensors[m:n], tensors[n:]

    def forward(self, y0: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor | None]]:
        """y, and what the gate saves."""
        rows, dtype = self.rows(x), self.dtype
        As, Bs, own = self.split(tensors)
        hs = [torch.mm(rows, matrix_of(A, form, dtype).t()) for A, form in zip(As, self.downs, strict=True)]
        us, saved = self.gate.forward(hs, own, self.shape[:-1], self.wanted)
        y = y0 if self.in_place else None
        # Up by up, and the newest last: with B = 0 it adds exact zeros, so growing changes no output.
        for u, B, form in zip(us, Bs, self.ups, strict=True):
            u, B_t = u * self.scale, matrix_of(B, form, dtype).t()
            if y0.dtype != dtype:
                y = y0.clone(memory_format=torch.contiguous_format) if y is None else y
                y.view(-1, y.shape[-1]).add_(torch.mm(u, B_t))
            elif y is None:
                y = torch.addmm(y0.reshape(-1, y0.shape[-1]), u, B_t).view(y0.shape)
            else:
                y.view(-1, y.shape[-1]).addmm_(u, B_t)
        assert y is not None
        return y, saved

    def backward(
        self,
        g: Tensor,
        W: Tensor | None,
        x: Tensor | None,
        tensors: Sequence[Tensor],
        saved: Sequence[Tensor | None],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dx and the gradients of `tensors`; None where not wanted. x is there where a down is trained."""
        dtype, wanted, scale = self.dtype, self.wanted, self.scale
        if not (wanted.any_dh or any(wanted.ups) or any(wanted.gate)):  # y0's alone
            return None, [None] * len(tensors)
        As, Bs, own = self.split(tensors)
        g = _cast(g.reshape(-1, g.shape[-1]), dtype)
        grads: list[Tensor | None] = [None] * len(self.ups)
        if wanted.any_dh or any(wanted.gate):  # then all, as the gate may couple them
            grads = [torch.mm(g, matrix_of(B, form, dtype)).mul_(scale) for B, form in zip(Bs, self.ups, strict=True)]
        us, dhs, d_own = self.gate.backward(saved, own, grads, wanted)
        rows = None if x is None else self.rows(x)
        dx: Tensor | None = None
        dAs: list[Tensor | None] = [None] * len(self.downs)
        dBs: list[Tensor | None] = [None] * len(self.ups)
        for j, (B, form, u) in enumerate(zip(Bs, self.ups, us, strict=True)):
            if wanted.ups[j]:
                assert u is not None
                dB = torch.mm(g.t(), u * scale)
                dB = _cast(dB if form is None else form.pack(dB), B.dtype)  # a packed one's whole goes here
                dBs[j] = dB
        for i, (A, form, dh) in enumerate(zip(As, self.downs, dhs, strict=True)):
            if wanted.downs[i]:
                assert dh is not None and rows is not None
                dA = torch.mm(dh.t(), rows)
                dA = _cast(dA if form is None else form.pack(dA), A.dtype)
                dAs[i] = dA
            if wanted.x:
                assert dh is not None
                matrix = matrix_of(A, form, dtype)
                dx = torch.mm(dh, matrix) if dx is None else dx.addmm_(dh, matrix)
        if dx is not None and self.dropout:
            dx.mul_(dropout_mask(dx, self.dropout, self.seed))
        if dx is not None and self.base is not None:
            dx.addmm_(g, matrix_of(W, self.base.form, dtype))
        return None if dx is None else dx.view(self.shape), [*dAs, *dBs, *d_own]


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y0: Tensor, x: Tensor, core: _Core, W: Tensor | None, *tensors: Tensor) -> Tensor:
        _, x_wanted, _, _, *wanted = ctx.needs_input_grad
        core.wanted = Wanted(x_wanted, *core.split(wanted))
        y, saved = core.forward(y0, x, tensors)
        ctx.core, ctx.count = core, len(tensors)
        # The weights themselves and not their casts, which would be (R, I) and (O, R) more for each layer.
        a, b = _saved_input(x) if any(core.wanted.downs) else (None, None)
        ctx.save_for_backward(W, a, b, *tensors, *saved)
        if core.in_place:
            ctx.mark_dirty(y0)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The fast path of peft_mora's layers has first derivatives only. For second derivatives "
                "(create_graph=True) take the plain one: `peft_mora.base.AdapterLinear.lean = False`."
            )
        W, a, b, *saved = ctx.saved_tensors
        # The forward has settled the dtype.
        with torch.autocast(g.device.type, enabled=False) if _autocasts(g) else nullcontext():
            x = a if b is None else a * b
            dx, grads = ctx.core.backward(g, W, x, saved[: ctx.count], saved[ctx.count :])
        return g if ctx.needs_input_grad[0] else None, dx, None, None, *grads
