"""A load-balance offset that moves once for each backward in training, whatever recomputes the forward.

d_i += rate · sign(mean(c) - c_i)        c_i how often expert i was chosen        (FlyLoRA, arXiv 2510.08396, eq. 10)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from .base import REFERENCE, AdapterModel
from .inputs import LatestMask, recomputing, rows_of, watched
from .lean import Gate
from .routed import Counter, RoutedLinear
from .routing import balance_step


Masks = Mapping[torch.device, list[tuple[torch.Size, Tensor | None]]]  # LatestMask.by_device


class Balance:
    """Steps of one adapter's offset on one layer that wait for their moment.

    Under gradient checkpointing a forward is computed again in the backward, and must find the offset that it had. So
    the offset moves once the last of the forwards that are still to be differentiated has had its backward. Gradient
    caching first runs all forwards without gradients, then each again with its backward: they must find one offset
    too. Where the last backward cannot be known, the offset moves at the first forward after the optimizer's step.

    Args:
        doubts: an adapter that was opened for inference may get gradients from a trainer whose optimizer does not hold
            it. Then the offset moves no earlier than its weight.
    """

    def __init__(self, doubts: bool) -> None:
        self.doubts = doubts
        # Training forwards still to be differentiated: with gradients, and without. The latter are the first passes of
        # reentrant checkpointing and of gradient caching, or forwards that nobody will differentiate.
        self.forwards = {True: 0, False: 0}
        self.steps: list[list[Tensor]] = []  # the counts of each; of several where replicas share a batch
        self.version = -1  # of the weight in the latest forward
        self.moved: Tensor | None = None  # by how much the offset did when the latest replicas were made
        self.sample: Tensor | None = None  # of the weight before them: fused optimizers leave its version as it is

    def begin(self, weight: nn.Parameter) -> None:
        """A training forward begins that is no recomputation."""
        self.version = weight._version
        if self.doubts and not any(self.steps):
            self.sample = _sample(weight).clone()

    def add(self, counts: Tensor, offset: Tensor, rate: float, recomputed: bool) -> None:
        """A backward has come through; `recomputed` if its forward was a recomputation (reentrant checkpointing)."""
        self.steps.append([counts])
        self.forwards[True] -= not recomputed
        self.forwards[False] = max(0, self.forwards[False] - 1)
        if max(self.forwards.values()) <= 0 and not self.doubts:
            self.settle(offset, rate)

    def is_due(self, weight: nn.Parameter) -> bool:
        """Whether steps wait, and the optimizer has made its own or has dropped the gradient."""
        return any(self.steps) and (weight.grad is None or weight._version != self.version)

    def settle(self, offset: Tensor, rate: float, weight: Tensor | None = None) -> None:
        """Take the steps that wait; where there is doubt, if the weight has changed."""
        before = offset.clone() if self.doubts else None
        for step in self.steps:
            parts = [part.to(offset.device) for part in step if part.is_meta == offset.is_meta]
            if parts:
                counts = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
                offset.copy_(balance_step(offset, counts, rate))
        if before is not None and self.sample is not None and weight is not None:  # decided on the device
            changed = (_sample(weight) != self.sample.to(weight.device)).any()
            offset.copy_(torch.where(changed, offset, before))
        self.drop()

    def drop(self) -> None:
        """No step waits any longer."""
        self.forwards = {True: 0, False: 0}
        self.steps = []


def _sample(weight: Tensor) -> Tensor:
    """A thousand entries of B (O, r), of all experts."""
    return weight.detach()[: 1 + 1024 // weight.shape[1]]


class Step(NamedTuple):
    """The step of the offset that this forward's backward takes."""

    offset: Tensor
    rate: float
    balance: Balance | None  # None under torch.compile: a backward is traced once and keeps no Python state
    recomputed: bool
    shared: list[Tensor] | None  # where a replica puts its counts
    masks: Masks

    def real_rows(self, chosen: Tensor, shape: torch.Size) -> Tensor | None:
        """(T, 1) bool, which of the layer's tokens, in the shape that they came in, are no padding; None: all."""
        return rows_of(self.masks, chosen.device, shape)

    def take(self, counts: Tensor) -> None:
        """Hand over how often each expert was chosen, (R,), once per micro-batch."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            counts = counts.clone()
            dist.all_reduce(counts)
        if self.shared is not None:
            self.shared.append(counts)
        elif self.balance is not None:
            self.balance.add(counts, self.offset, self.rate, self.recomputed)
        else:
            self.offset.copy_(balance_step(self.offset, counts, self.rate))

    def taken_in_backward_of(self, update: Tensor, counts: Tensor) -> Tensor:
        """`update`, whose backward takes this step: for paths whose backward is autograd's."""
        return _CountOnBackward.apply(update, counts, *self)


class _CountOnBackward(torch.autograd.Function):
    """Identity that hands the counts over when the gradient comes through it: once per micro-batch, whatever
    recomputes the forward.

    The counts are a saved tensor on purpose: under non-reentrant checkpointing, reading them recomputes the block
    first, with the offset that the forward used.
    """

    @staticmethod
    def forward(ctx: Any, update: Tensor, counts: Tensor, offset: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(counts)
        ctx.step = Step(offset, *rest)
        return update.view_as(update)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (counts,) = ctx.saved_tensors
        if ctx.step.balance is None:
            # torch.compile does in the forward all that needs no gradient, and of two forwards before their backwards
            # both would start from one offset. A sum of no element needs the gradient.
            counts = counts + grad.flatten()[:0].sum()
        ctx.step.take(counts)
        return grad, None, None, None, None, None, None, None


class BalancedGate(Gate):
    """A gate whose choices the offset's step counts. `plain` sets `chosen`; `backward` calls `count_choices`.

    Args:
        step: what `BalancedLinear.step` gave for this forward.
        usage: what counts this forward, if anything does.
    """

    def __init__(self, step: Step | None, usage: Counter | None) -> None:
        self.step, self.usage = step, usage
        self.chosen: Tensor | None = None  # (..., R) 1 where an expert was chosen, on the plain path
        self.real: Tensor | None = None  # (T, 1) the tokens that are no padding

    def done(self, update: Tensor) -> Tensor:
        if self.step is None or self.chosen is None:
            return update
        counts = torch.atleast_2d(self.chosen != 0).flatten(0, -2)  # bincount would wait for the GPU
        real = self.step.real_rows(self.chosen, self.chosen.shape[:-1])
        counts = (counts if real is None else counts & real).sum(0)
        return self.step.taken_in_backward_of(update, counts)

    def count_choices(self, chosen: Tensor) -> None:
        """In the backward: (T, R), 1 where an expert was chosen, else 0."""
        if self.step is not None:
            real = chosen if self.real is None else chosen * self.real
            self.step.take(real.sum(0, dtype=torch.float32))  # counts to 16 M exactly


class BalancedLinear(RoutedLinear):
    """A layer whose choice of experts is evened out by `<prefix>offset` (R,), a float32 buffer of each adapter.

    A replica of `nn.DataParallel` chooses by a copy of the offset; the layer itself takes the step, by the counts of
    all replicas.
    """

    shared: dict[str, list[Tensor]] | None = None  # adapter name -> where a replica puts its counts
    late: Mapping[str, Tensor] = {}  # adapter name -> what a replica's copy of the offset lacks

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        setattr(self, f"{self.prefix}offset", BufferDict(persistent=True))
        self.balance: dict[str, Balance] = {}
        self.latest_mask = LatestMask()  # the model's, where it is part of one
        self.register_state_dict_pre_hook(_settle_all)
        self.register_load_state_dict_pre_hook(_drop_loaded)

    def balance_rate(self, adapter_name: str) -> float:
        """Step of the offset; 0 is off."""
        raise NotImplementedError

    def balanced_weight(self, adapter_name: str) -> nn.Parameter:
        """What the experts learn: while it is in training, the offset moves."""
        return getattr(self, f"{self.prefix}B")[adapter_name].weight

    @property
    def offset(self) -> BufferDict:
        """adapter name -> (R,) offset."""
        return getattr(self, f"{self.prefix}offset")

    def current_offset(self, adapter_name: str) -> Tensor:
        """(R,) the offset to choose by."""
        offset = self.offset[adapter_name]
        late = self.late.get(adapter_name)
        return offset if late is None else offset + late.to(offset.device)

    def create_offset(self, adapter_name: str, original: str | None, inference_mode: bool) -> None:
        """0 for a new adapter, or what a reference's original has; opened for inference, it waits for the weight."""
        copied = adapter_name == REFERENCE and original in self.offset
        count = self.expert_count(adapter_name)
        offset = self.offset[original].clone() if copied else torch.zeros(count, dtype=torch.float32)
        self.offset[adapter_name] = offset.to(self._weight_placement()[0])
        self.balance[adapter_name] = Balance(doubts=inference_mode)

    def step(self, adapter_name: str, offset: Tensor, weight: nn.Parameter) -> Step | None:
        """A forward begins: the step that its backward will take, if it takes one.

        Args:
            offset, weight: the adapter's `current_offset` and `balanced_weight`.
        """
        rate = self.balance_rate(adapter_name)
        trains, differentiated = self.training and weight.requires_grad and rate > 0, torch.is_grad_enabled()
        masks: Masks = self.latest_mask.by_device
        if torch.compiler.is_compiling() or self.shared is not None:
            shared = None if self.shared is None else self.shared[adapter_name]
            return Step(offset, rate, None, False, shared, masks) if trains and differentiated else None
        balance = self.balance[adapter_name]
        recomputed = recomputing()
        if not recomputed:
            if balance.is_due(weight):
                balance.settle(offset, rate, weight)
            if trains:
                balance.begin(weight)
                balance.forwards[differentiated] += 1
        return Step(offset, rate, balance, recomputed, None, masks) if trains and differentiated else None

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()
        replica.shared, replica.late = {}, {}
        for name, balance in self.balance.items():
            weight = self.balanced_weight(name)
            before = self.offset[name].clone()
            if balance.is_due(weight):
                balance.settle(self.offset[name], self.balance_rate(name), weight)
            balance.begin(weight)
            if not balance.steps or balance.steps[-1]:
                balance.steps.append([])  # of all replicas of this forward, whose buffers torch has copied before
                balance.moved = self.offset[name] - before
            replica.shared[name], replica.late[name] = balance.steps[-1], balance.moved
        return replica

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves go through, casts stop at the offset: its steps of 1e-3 are nothing to a 16-bit number."""
        before = dict(self.offset.items())
        super()._apply(fn, recurse)
        for name, offset in before.items():
            if self.offset[name].dtype != offset.dtype:
                self.offset[name] = offset.to(self.offset[name].device)
        return self


def _settle_all(layer: BalancedLinear, *_: Any) -> None:
    """Before saving: no step may be left waiting."""
    for name, balance in layer.balance.items():
        balance.settle(layer.offset[name], layer.balance_rate(name), layer.balanced_weight(name))


def _drop_loaded(layer: BalancedLinear, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: steps that wait are not for an offset that comes from a file."""
    for name, balance in layer.balance.items():
        if f"{prefix}{layer.prefix}offset.{name}" in state_dict:
            balance.drop()


class MaskedModel(AdapterModel):
    """Lets its layers see the attention mask (`latest_mask`), so that padding does not count."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        layers: list[Any] = [module for module in model.modules() if isinstance(module, self.tuner_layer_cls)]
        latest = next((layer.latest_mask for layer in layers if layer.latest_mask.handles), None) or watched(model)
        for layer in layers:
            if not layer.in_tower:  # a tower's patches are all real
                layer.latest_mask = latest

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        layers: Any = (module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls))
        masks = {id(layer.latest_mask): layer.latest_mask for layer in layers}
        base = super()._unload_and_optionally_merge(*args, **kwargs)  # may refuse
        for mask in masks.values():
            mask.remove()
        return base
