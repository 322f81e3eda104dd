"""FURINA: experts without a router, one direction each and one magnitude for all, which merge into a plain LoRA.

    W_e = B_e A_e        d_e = row norms of W_e = sqrt(diag(B_e (A_e A_eᵀ) B_eᵀ))        Ŵ_e = diag(1 / (d_e + ε)) W_e
    y = base(x) + (alpha / r) · (B_0 A_0 x + Σ_e diag(v) Ŵ_e x)                                    e = 1 .. E
Expert 0 is shared; v (O,) is one trained vector a module. Nothing is chosen: how strongly an expert answers is the
angle between x and its rows, and so B̃_e = diag(v / (d_e + ε)) B_e makes it a LoRA of rank (E + 1)·r, exactly.
While it trains, two losses a module (`selection_loss`) ask each token for a few strong experts, and all experts for
an even load. They come with the gradient of the layer, so that they arrive in every trainer (`LossGate`).

Source: "FURINA: Free from Unmergeable Router via LINear Aggregation of mixed experts", arXiv 2509.14900. The losses
are reconstructed. The start is ours: B_0 = 0 and v = 0, with directions at random, since a direction has no gradient
that could be used at B_e = 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import replicate

from .balance import MaskedModel
from .base import AdapterConfig, AdapterLinear
from .checks import check_field, is_int, is_number
from .inputs import LatestMask, recomputing, rows_of
from .lean import NO_GATE, Gate, Parts, Wanted, Weight, can_run, compute_dtype
from .routing import at_least_float32, selection_loss, selection_loss_backward, without_autocast


EPS = 1e-6  # ε: below it a row of W_e has no direction
TINY = 1e-24  # under the root: a row of zeros has the gradient 0 and not NaN


@dataclass
class FurinaConfig(AdapterConfig):
    """Config of a FURINA adapter.

    Example:
        >>> FurinaConfig(r=8, experts=3, target_modules="all-linear")
    """

    method: ClassVar[str] = "FURINA"
    by_input: ClassVar[str] = "while it trains, its losses look at the layer's input"

    r: int = field(default=8, metadata={"help": "Rank of each expert; the adapter's is (experts + 1) · r."})
    experts: int = field(default=3, metadata={"help": "E: experts of a module besides the one that is shared."})
    selected: int = field(
        default=1, metadata={"help": "K: experts that the selection loss wants for a token, 1 <= selected <= experts."}
    )
    selection_weight: float = field(default=0.01, metadata={"help": "Weight of the selection loss, >= 0; 0 is off."})
    balance_weight: float = field(default=0.01, metadata={"help": "Weight of the balance loss, >= 0; 0 is off."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(is_int(self.experts) and self.experts >= 1, "experts", self.experts, "an integer >= 1")
        rule = f"an integer from 1 to `experts` (here {self.experts})"
        check_field(is_int(self.selected) and 1 <= self.selected <= self.experts, "selected", self.selected, rule)
        for name in ("selection_weight", "balance_weight"):
            value = getattr(self, name)
            check_field(is_number(value) and value >= 0, name, value, "a number >= 0")


class Losses(NamedTuple):
    """The fields of the two losses as a layer uses them."""

    selected: int
    selection: float
    balance: float


def directions(
    A: Tensor, B: Tensor, v: Tensor, experts: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The factors' plain twin B̃, with B̃·A the whole update before scaling, and the experts' Gram matrices.

    Args:
        A: ((E + 1)·r, I), expert 0 first. B: (O, (E + 1)·r). v: (O, 1). Any float dtype.
        experts: E.
        dtype: to which A, B and v are rounded first: of two adapters whose weights are the same in the dtype that the
            layer computes in, one has been cast to it and one has not (TRL's "ref").

    Returns:
        (O, (E + 1)·r) B̃ and (E, r, r) Ĝ_e = B̂_eᵀ B̂_e of B̂_e = diag(1 / (d_e + ε)) B_e, float32 or wider.
    """
    with without_autocast(A):
        A, B, v = (at_least_float32(weight.to(dtype or weight.dtype)) for weight in (A, B, v))
        r = len(A) // (experts + 1)
        # Copies: what comes from a file may start anywhere in memory, and CPU kernels round by how it is aligned.
        shared, own = B[:, :r], B[:, r:].contiguous().unflatten(1, (experts, r))
        A = A[r:].clone().unflatten(0, (experts, r))
        squares = torch.einsum("oer,ers,oes->oe", own, A @ A.transpose(1, 2), own)
        unit = own / ((squares.clamp_min(0) + TINY).sqrt() + EPS)[..., None]
        return torch.cat([shared, (v[..., None] * unit).flatten(1)], dim=1), torch.einsum("oer,oes->ers", unit, unit)


class _Directions(torch.autograd.Function):
    """`directions` computed again in the backward: autograd would keep four matrices of B's size in float32."""

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, B: Tensor, v: Tensor, experts: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(A, B, v)
        ctx.how = experts, dtype
        return directions(A, B, v, experts, dtype)

    @staticmethod
    def backward(ctx: Any, dB: Tensor, dG: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            given = A, B, v = tuple(t.detach().requires_grad_() for t in ctx.saved_tensors)
            found = directions(A, B, v, *ctx.how)
        grads = torch.autograd.grad(found, given, (dB, dG))
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None


def loss_scale() -> float:
    """What the loss of the forward that runs now is multiplied by before its backward: 1 / the micro-batches of the
    optimizer's step, fp16's loss scale, and 1 / the replicas that `nn.DataParallel` makes now, which each have a loss.

    A layer sees none of them, and its own loss has to be scaled alike. transformers' Trainer knows, and TRL's, which
    are that one: it is on the stack. Where none is, only the replicas count.

    Raises:
        ValueError: fp16 without a scaler that could be asked.
    """
    if torch.compiler.is_compiling():
        return 1.0
    frame: Any = sys._getframe(1)
    replicas = 1
    while frame is not None:
        if frame.f_code is replicate.__code__:
            replicas = len(frame.f_locals["devices"])
        trainer: Any = frame.f_locals.get("self") if frame.f_code.co_name == "training_step" else None
        if hasattr(trainer, "current_gradient_accumulation_steps"):
            scaler = getattr(trainer.accelerator, "scaler", None)
            if scaler is None and trainer.accelerator.mixed_precision == "fp16":
                raise ValueError(
                    "FURINA's losses have to be scaled as fp16 scales the task's, and DeepSpeed does not say how much "
                    "that is. Train in bf16, or without them: FurinaConfig(selection_weight=0, balance_weight=0)."
                )
            batches = trainer.current_gradient_accumulation_steps * replicas
            return (1.0 if scaler is None else scaler.get_scale()) / batches
        frame = frame.f_back
    return 1.0 / replicas


class _WithLoss(torch.autograd.Function):
    """Identity of h; in its backward the loss gets the gradient `scale`, as if it were part of the model's."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype = scale, loss.dtype
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, grad.new_full((), ctx.scale, dtype=ctx.dtype), None


class LossGate(Gate):
    """Leaves h as it is, and adds the losses' gradient to its own: a loss that is added to the model's output has no
    effect in SFTTrainer, which makes its own of the hidden states.

    Args:
        G: (E, r, r) of `directions`.
        losses: the fields.
        scale: of `loss_scale`.
        masks: `LatestMask.by_device`; padding does not count.
    """

    def __init__(self, G: Tensor, losses: Losses, scale: float, masks: Any) -> None:
        self.tensors, self.losses, self.scale, self.masks = [G], losses, scale, masks
        self.real: Tensor | None = None

    def _own(self, h: Tensor, G: Tensor) -> Tensor:
        """(T, E, r) of h (T, (E + 1)·r): without the shared expert's."""
        return h[:, G.shape[-1] :].unflatten(1, (len(G), G.shape[-1]))

    def plain(self, hs: list[Tensor]) -> list[Tensor]:
        (h,), (G,) = hs, self.tensors
        real = rows_of(self.masks, h.device, h.shape[:-1])
        loss = selection_loss(self._own(h.reshape(-1, h.shape[-1]), G), G, *self.losses, real)
        return [_WithLoss.apply(h, loss, self.scale)]

    def forward(
        self, hs: list[Tensor], tensors: Sequence[Tensor], shape: torch.Size, wanted: Wanted
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        self.real = rows_of(self.masks, hs[0].device, shape)
        needed = wanted.any_dh or any(wanted.ups) or any(wanted.gate)
        return hs, [hs[0] if needed else None]

    def backward(
        self,
        saved: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        grads: list[Tensor | None],
        wanted: Wanted,
    ) -> tuple[Sequence[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        (h,), (G,), (du,) = saved, tensors, grads
        if du is None or h is None:
            return saved, [None], [None]
        dh, dG = selection_loss_backward(self._own(h, G), G, *self.losses, self.real)
        du[:, G.shape[-1] :].add_(dh.flatten(1), alpha=self.scale)
        return saved, [du], [(dG * self.scale).to(G.dtype) if wanted.gate[0] else None]


class FurinaLinear(AdapterLinear):
    """`furina_A` ((E + 1)·r, I), `furina_B` (O, (E + 1)·r), the shared expert first, and `furina_v` (O, 1)."""

    furina_A: Any
    furina_B: Any
    furina_v: Any
    prefix = "furina_"
    adapter_layer_names = ("furina_A", "furina_B", "furina_v")
    other_param_names = (
        "furina_experts", "furina_losses", "furina_scale", "module_names", "r", "scaling", "dropout",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.furina_A = nn.ModuleDict()
        self.furina_B = nn.ModuleDict()
        self.furina_v = nn.ModuleDict()
        self.furina_experts: dict[str, int] = {}
        self.furina_losses: dict[str, Losses] = {}
        self.furina_scale: dict[str, float] = {}  # `loss_scale` of the latest forward
        self.latest_mask = LatestMask()  # the model's, where it is part of one

    def create_weights(self, adapter_name: str, config: FurinaConfig, module_name: str, original: str | None) -> None:
        r = self.r[adapter_name]
        rank = (config.experts + 1) * r
        self.furina_experts[adapter_name] = config.experts
        self.furina_losses[adapter_name] = Losses(config.selected, config.selection_weight, config.balance_weight)
        self.furina_A[adapter_name] = self.new_linear(self.in_features, rank, zero=False)
        self.furina_B[adapter_name] = self.new_linear(rank, self.out_features, zero=False)
        self.furina_v[adapter_name] = self.new_linear(1, self.out_features, zero=config.init_weights)
        if config.init_weights:
            self.furina_B[adapter_name].weight.data[:, :r] = 0

    def parts(self, adapter_name: str, dtype: torch.dtype | None = None) -> Parts:
        A, B, v = self.weights(adapter_name)
        fast = self.lean and can_run(A) and torch.is_grad_enabled()
        made = (_Directions.apply if fast else directions)(A, B, v, self.furina_experts[adapter_name], dtype)
        return Parts([Weight(A)], [Weight(made[0])], self._gate(adapter_name, made[1]))

    def _add(self, result: Tensor, adapter_name: str, x: Tensor, *args: Any, parts: Parts | None = None) -> Tensor:
        parts = parts or self.parts(adapter_name, compute_dtype(x))
        return super()._add(result, adapter_name, x, *args, parts=parts)

    def of_row(self, name: str) -> Any:
        return (name, None) if name in self.r else None  # `_add` makes the parts, which knows x

    def _adds_losses(self, adapter_name: str) -> bool:
        losses = self.furina_losses[adapter_name]
        trains = any(weight.requires_grad for weight in self.weights(adapter_name))
        return self.training and trains and (losses.selection > 0 or losses.balance > 0)

    def _gate(self, adapter_name: str, G: Tensor) -> Gate:
        if not self._adds_losses(adapter_name):
            return NO_GATE
        # No trainer is above a recomputation in the backward, nor above a replica's thread.
        if not (recomputing() or getattr(self, "_is_replica", False)):
            self.furina_scale[adapter_name] = loss_scale()
        if not torch.is_grad_enabled():
            return NO_GATE
        losses, scale = self.furina_losses[adapter_name], self.furina_scale[adapter_name]
        return LossGate(G, losses, scale, self.latest_mask.by_device)

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        replica.furina_scale = {name: loss_scale() for name in self.r if self._adds_losses(name)}
        return replica

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        A, B, v = (weight.detach() for weight in self.weights(adapter_name))
        return at_least_float32(A), directions(A, B, v, self.furina_experts[adapter_name])[0]


class FurinaModel(MaskedModel):
    """A model with FURINA layers; made by `get_peft_model(model, FurinaConfig(...))`."""

    prefix = "furina_"
    tuner_layer_cls = FurinaLinear
