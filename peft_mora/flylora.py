"""FLYLORA: the frozen sparse projection is the router.

    h = x Aᵀ                         A frozen: each row has p = round(density · I) non-zeros ~ N(0, 1 / r²)
    S = the K experts with the largest |h_i| + d_i                              ("signed": the largest h_i + d_i)
    y = base(x) + (alpha / r) · Σ_{i in S} h_i B_i
    d_i += balance_rate · sign(mean(c) - c_i)       once per backward in training; c_i = how often i was chosen
d only ranks; it never multiplies the output. The gradient flows to x through the selected experts.

Source: "FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise Mixture-of-Experts",
arXiv 2510.08396, whose text selects by magnitude (the default here) and whose code selects by sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from .base import check_field, is_int, is_number
from .lean import Block, Gate, Wanted, index_dtype
from .routing import balance_step, select_by_magnitude, select_by_sign
from .seeded import SeededConfig, SeededLinear, SeededModel, as_projection, generator
from .usage import RoutedConfig, RoutedLinear, Usage, module_top_k


Selection = Literal["magnitude", "signed"]


@dataclass
class FlyLoraConfig(SeededConfig, RoutedConfig):
    """Config of a FLYLORA adapter.

    Example:
        >>> FlyLoraConfig(r=32, top_k=8, target_modules="all-linear")
    """

    method: ClassVar[str] = "FLYLORA"

    r: int = field(default=32, metadata={"help": "Rank: how many rank-1 experts a module has."})
    alpha: float = field(default=64, metadata={"help": "The update is scaled by alpha / r."})
    top_k: int = field(default=8, metadata={"help": "K: experts that are active for a token, 1 <= top_k <= r."})
    density: float | None = field(
        default=None, metadata={"help": "Share of non-zeros in each row of A, in (0, 1]. None is top_k / r."}
    )
    selection: Selection = field(
        default="magnitude",
        metadata={"help": "Select by |h| + d ('magnitude', the paper) or h + d ('signed', its code)."},
    )
    balance_rate: float = field(default=1e-3, metadata={"help": "Step of the load-balance offset d, >= 0; 0 is off."})

    def __post_init__(self) -> None:
        super().__post_init__()
        smallest = min([self.r, *self.rank_pattern.values()])
        check_field(is_int(self.top_k) and self.top_k >= 1, "top_k", self.top_k, "an integer >= 1")
        check_field(self.top_k <= smallest, "top_k", self.top_k, f"<= r (here {smallest} at the least)")
        check_field(
            self.density is None or (is_number(self.density) and 0 < self.density <= 1),
            "density",
            self.density,
            "a number in (0, 1], or None for top_k / r",
        )
        check_field(self.selection in get_args(Selection), "selection", self.selection, "'magnitude' or 'signed'")
        check_field(
            is_number(self.balance_rate) and self.balance_rate >= 0, "balance_rate", self.balance_rate, "a number >= 0"
        )


class Balance:
    """Steps of the load-balance offset that wait for their moment.

    Under gradient checkpointing a forward is computed again in the backward, and must find the offset that it had. So
    the offset moves once the last of the forwards that are still to be differentiated has had its backward; where
    that cannot be known (a forward without a backward), at the next forward.
    """

    def __init__(self) -> None:
        # Training forwards still to be differentiated: with gradients, and without. The latter are the first passes of
        # reentrant checkpointing, or forwards that nobody will differentiate.
        self.forwards = {True: 0, False: 0}
        self.counts: list[Tensor] = []

    def enter(self, offset: Tensor, rate: float) -> bool:
        """A training forward begins. Returns whether it is a recomputation, which moves nothing."""
        if torch._C._current_graph_task_id() != -1:
            return True
        self.settle(offset, rate)
        self.forwards[torch.is_grad_enabled()] += 1
        return False

    def add(self, counts: Tensor, offset: Tensor, rate: float, recomputed: bool) -> None:
        """A backward has come through; `recomputed` if its forward was a recomputation (reentrant checkpointing)."""
        self.counts.append(counts)
        self.forwards[not recomputed] -= 1
        if self.forwards[not recomputed] <= 0:
            self.settle(offset, rate)

    def settle(self, offset: Tensor, rate: float) -> None:
        """Take the steps that wait."""
        if self.counts:
            for counts in self.counts:
                offset.copy_(balance_step(offset, counts, rate))
            self.forwards = {True: 0, False: 0}
            self.counts = []


class Step(NamedTuple):
    """The step of the offset that this forward's backward takes."""

    offset: Tensor
    rate: float
    balance: Balance | None  # None under torch.compile: a backward is traced once and keeps no Python state
    recomputed: bool

    def take(self, counts: Tensor) -> None:
        """Hand over how often each expert was chosen, (R,), once per micro-batch."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            counts = counts.clone()
            dist.all_reduce(counts)
        if self.balance is None:
            self.offset.copy_(balance_step(self.offset, counts, self.rate))
        else:
            self.balance.add(counts, self.offset, self.rate, self.recomputed)


class _CountOnBackward(torch.autograd.Function):
    """Identity that hands the counts over when the gradient comes through it: once per micro-batch, whatever
    recomputes the forward.

    The counts are a saved tensor on purpose: under non-reentrant checkpointing, reading them recomputes the block
    first, with the offset that the forward used.
    """

    @staticmethod
    def forward(
        ctx: Any,
        update: Tensor,
        counts: Tensor,
        offset: Tensor,
        rate: float,
        balance: Balance | None,
        recomputed: bool,
    ) -> Tensor:
        ctx.save_for_backward(counts)
        ctx.step = Step(offset, rate, balance, recomputed)
        return update.view_as(update)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (counts,) = ctx.saved_tensors
        ctx.step.take(counts)
        return grad, None, None, None, None, None


class Columns(NamedTuple):
    """A sparse A (r, I) by the columns `index` (r, p) of its values."""

    index: Tensor
    in_features: int

    def dense(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        zeros = values.new_zeros(len(values), self.in_features, dtype=dtype)
        return zeros.scatter_(1, self.index.long(), values.to(dtype))


class Dense(NamedTuple):
    """A (r, I), made of these values as of this version of them."""

    of: Tensor
    version: int
    A: Tensor


class Kept(NamedTuple):
    """A layer's A, as the layer keeps it."""

    layer: FlyLoraLinear
    adapter_name: str

    def dense(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return self.layer.dense_A(self.adapter_name, dtype)

    def pack(self, grad: Tensor) -> Tensor:
        raise NotImplementedError("A is frozen")


class SelectionGate(Gate):
    """The K selected projections of one forward, the others 0.

    What is kept is K values and their experts. Where that is more than all of h, it is h, and the offset as it is
    now, by which the backward selects again.
    """

    def __init__(self, selection: Selection, k: int, offset: Tensor, step: Step | None, usage: Usage | None) -> None:
        self.selection, self.k, self.offset, self.step, self.usage = selection, k, offset, step, usage
        self.chosen: Tensor | None = None

    def _select(self, h: Tensor, offset: Tensor) -> Tensor:
        return (select_by_magnitude if self.selection == "magnitude" else select_by_sign)(h, offset, self.k)

    def plain(self, hs: list[Tensor]) -> list[Tensor]:
        (h,) = hs
        self.chosen = torch.zeros_like(h).scatter_(-1, self._select(h, self.offset), 1)
        self._count(h, self.chosen)
        return [h * self.chosen]

    def done(self, update: Tensor) -> Tensor:
        if self.step is None or self.chosen is None:
            return update
        counts = (self.chosen != 0).flatten(0, -2).sum(0)  # bincount would wait for the GPU
        return _CountOnBackward.apply(update, counts, *self.step)

    def forward(self, hs: list[Tensor], shape: torch.Size, wanted: Wanted) -> tuple[list[Tensor], list[Tensor | None]]:
        (h,) = hs
        index = self._select(h, self.offset)
        values = h.gather(-1, index)
        gated = torch.zeros_like(h).scatter_(-1, index, values)
        if self.usage is not None:
            chosen = torch.zeros_like(h).scatter_(-1, index, 1)
            self._count(h.view(*shape, -1), chosen.view(*shape, -1))
        if not (any(wanted.dh) or any(wanted.B)):
            return [gated], []
        dtype = index_dtype(h.shape[-1])
        if self.k * (h.element_size() + dtype.itemsize) < h.shape[-1] * h.element_size():
            return [gated], [values, index.to(dtype)]
        return [gated], [h, self.offset.clone()]

    def backward(
        self, kept: Sequence[Tensor | None], grads: list[Tensor | None], wanted: Wanted
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        values, index = kept
        assert values is not None and index is not None
        if index.is_floating_point():
            index = self._select(values, index)
            values = values.gather(-1, index)
        index = index.long()
        zeros = values.new_zeros(len(values), len(self.offset))
        chosen = zeros.scatter(-1, index, 1)
        if self.step is not None:
            self.step.take(chosen.sum(0, dtype=torch.float32))  # counts to 16 M exactly
        (grad,) = grads
        return [zeros.scatter_(-1, index, values)], [None if grad is None else grad.mul_(chosen)]

    def _count(self, h: Tensor, chosen: Tensor) -> None:
        if self.usage is None:
            return
        self.usage.add(chosen)
        if self.usage.meter.need:
            self.usage.add_need(F.normalize(h.detach().float().abs(), p=1, dim=-1))


class FlyLoraLinear(SeededLinear, RoutedLinear):
    """`flylora_A` (r, p) values and `flylora_index` (r, p) their columns, frozen; `flylora_B` (O, r) trained;
    `flylora_offset` (r,) the load-balance offset d, float32."""

    prefix = "flylora_"
    adapter_layer_names = ("flylora_B",)
    projection_names = ("flylora_A", "flylora_index")
    other_param_names = (
        "flylora_A", "flylora_index", "flylora_checksum", "flylora_offset", "flylora_rule",
        "flylora_balance", "flylora_dense", "module_names", "usage",
        "r", "scaling", "dropout",
    )  # fmt: skip
    merge_refusal = (
        "Cannot merge a FLYLORA adapter: which experts are active depends on the input, so no single weight equals "
        "it. Keep it unmerged (model.unload() gives the base back), or train with LoriConfig, whose frozen projection "
        "merges exactly."
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.flylora_offset = BufferDict(persistent=True)
        self.flylora_balance: dict[str, Balance] = {}
        self.flylora_dense: dict[str, Dense] = {}
        self.register_state_dict_pre_hook(_settle_all)
        self.flylora_rule: dict[str, tuple[Selection, int, float]] = {}

    def create_weights(self, adapter_name: str, config: FlyLoraConfig, module_name: str, twin: str | None) -> None:
        r = self.r[adapter_name]
        top_k = module_top_k(config, module_name, r)
        self.flylora_rule[adapter_name] = (config.selection, top_k, config.balance_rate)
        self.create_projection(adapter_name, config, module_name, twin)
        self.flylora_B[adapter_name] = self.new_linear(r, self.out_features, zero=config.init_weights)
        offset = torch.zeros(r) if twin not in self.flylora_offset else self.flylora_offset[twin].clone()
        self.flylora_balance[adapter_name] = Balance()
        self.flylora_offset[adapter_name] = offset.to(self._weight_placement()[0])

    def draw_projection(self, adapter_name: str, config: FlyLoraConfig, module_name: str) -> tuple[Tensor, ...]:
        r = self.r[adapter_name]
        density = config.top_k / r if config.density is None else config.density
        p = max(1, round(density * self.in_features))
        if config.seed is None:
            return torch.zeros(r, p), torch.zeros(r, p, dtype=torch.int32)
        random = generator(config.seed, module_name)
        columns = np.stack([np.sort(random.permutation(self.in_features)[:p]) for _ in range(r)])
        return as_projection(random.standard_normal((r, p)) / r), torch.from_numpy(columns.astype(np.int32))

    def top_k(self, adapter_name: str) -> int:
        return self.flylora_rule[adapter_name][1]

    def set_top_k(self, adapter_name: str, k: int) -> None:
        selection, _, rate = self.flylora_rule[adapter_name]
        self.flylora_rule[adapter_name] = (selection, k, rate)

    def dense_A(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """A (r, I) in `dtype`. Stored sparse; at densities of 1/4 a dense product is the faster one, and A in 16 bits
        takes no more than its float32 values with their columns: it is made once, not in every forward and backward.
        """
        values, index = self.flylora_A[adapter_name], self.flylora_index[adapter_name]
        if torch.compiler.is_compiling() or values.is_inference():
            return Columns(index, self.in_features).dense(values, dtype)
        made = self.flylora_dense.get(adapter_name)
        if made is None or made.of is not values or made.version != values._version or made.A.dtype != dtype:
            with torch.inference_mode(False):  # training goes on with it after an evaluation made it
                made = Dense(values, values._version, Columns(index, self.in_features).dense(values.clone(), dtype))
            self.flylora_dense[adapter_name] = made
        return made.A

    def parts(self, adapter_name: str) -> tuple[list[Block], Gate]:
        selection, k, rate = self.flylora_rule[adapter_name]
        offset, B = self.flylora_offset[adapter_name], self.flylora_B[adapter_name].weight
        step = None
        if self.training and B.requires_grad and rate > 0:
            balance = None if torch.compiler.is_compiling() else self.flylora_balance[adapter_name]
            recomputed = balance.enter(offset, rate) if balance is not None else False
            step = Step(offset, rate, balance, recomputed) if torch.is_grad_enabled() else None
        block = Block(self.flylora_A[adapter_name], B, A_form=Kept(self, adapter_name))
        return [block], SelectionGate(selection, k, offset, step, self.counting(adapter_name))

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.dense_A(adapter_name, torch.float32), self.flylora_B[adapter_name].weight.detach().float()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves go through, casts stop at the offset: its steps of 1e-3 are nothing to a 16-bit number."""
        before = dict(self.flylora_offset.items())
        super()._apply(fn, recurse)
        for name, offset in before.items():
            if self.flylora_offset[name].dtype != offset.dtype:
                self.flylora_offset[name] = offset.to(self.flylora_offset[name].device)
        return self


def _settle_all(layer: FlyLoraLinear, *_: Any) -> None:
    """Before saving: no step may be left waiting."""
    for name, balance in layer.flylora_balance.items():
        balance.settle(layer.flylora_offset[name], layer.flylora_rule[name][2])


class FlyLoraModel(SeededModel):
    """A model with FLYLORA layers; made by `get_peft_model(model, FlyLoraConfig(...))`."""

    prefix = "flylora_"
    tuner_layer_cls = FlyLoraLinear
