"""A load-balance offset that moves once for each backward in training, whatever recomputes the forward.

d_i += rate · sign(mean(c) - c_i)        c_i how often expert i was chosen        (FlyLoRA, arXiv 2510.08396, eq. 10)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from .routed import RoutedLinear
from .routing import balance_step


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


class BalancedLinear(RoutedLinear):
    """A layer whose choice of experts is evened out by `<prefix>offset` (R,), a float32 buffer of each adapter."""

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        setattr(self, f"{self.prefix}offset", BufferDict(persistent=True))
        self.balance: dict[str, Balance] = {}
        self.register_state_dict_pre_hook(_settle_all)

    def balance_rate(self, adapter_name: str) -> float:
        """Step of the offset; 0 is off."""
        raise NotImplementedError

    @property
    def offset(self) -> BufferDict:
        """adapter name -> (R,) offset."""
        return getattr(self, f"{self.prefix}offset")

    def create_offset(self, adapter_name: str, original: str | None) -> None:
        """0 for a new adapter, or what the original has."""
        fresh = torch.zeros(self.r[adapter_name])
        offset = self.offset[original].clone() if original in self.offset else fresh
        self.offset[adapter_name] = offset.to(self._weight_placement()[0])
        self.balance[adapter_name] = Balance()

    def step(self, adapter_name: str, trains: bool) -> Step | None:
        """A forward begins: the step that its backward will take, if it takes one.

        Args:
            adapter_name: whose offset.
            trains: whether what the experts do is in training.
        """
        offset, rate = self.offset[adapter_name], self.balance_rate(adapter_name)
        if not (self.training and trains and rate > 0):
            return None
        balance = None if torch.compiler.is_compiling() else self.balance[adapter_name]
        recomputed = balance.enter(offset, rate) if balance is not None else False
        return Step(offset, rate, balance, recomputed) if torch.is_grad_enabled() else None

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
        balance.settle(layer.offset[name], layer.balance_rate(name))
