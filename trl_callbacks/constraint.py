"""What an optimizer's steps are held to: each A out of a span or inside one, each B out of a span of outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_mora.linalg import project_out

from .factors import Factors
from .subspace import Subspace


@dataclass(frozen=True)
class Constraint:
    """What some parameters, stacked by rows (or columns), are held to: out of a span, or inside one."""

    basis: Tensor  # (I, k) orthonormal, float32, on the parameters' device
    parameters: tuple[nn.Parameter, ...]
    columns: bool = False
    inside: bool = False

    def held(self, rows: Tensor) -> Tensor:
        """The part of each row (n, I) that the constraint allows."""
        return rows @ self.basis @ self.basis.T if self.inside else project_out(rows, self.basis)

    def stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes as rows (n, I), a copy."""
        return torch.cat([t.T if self.columns else t for t in tensors])

    def apply(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Project tensors (parameters or their gradients) in place; returns them stacked, (n, I), before and after."""
        before = self.stacked(tensors)
        after = self.held(before)
        views = [t.T if self.columns else t for t in tensors]
        for view, rows in zip(views, after.split([len(v) for v in views]), strict=True):
            view.copy_(rows)
        return before, after

    def violation(self) -> float:
        """Share of the parameters' norm that is where it must not be, 0..1."""
        rows = self.stacked([p.detach() for p in self.parameters])
        return float((rows - self.held(rows)).norm() / rows.norm().clamp_min(torch.finfo(rows.dtype).tiny))


def sharing(subspace: Subspace, factors: Mapping[str, Factors]) -> dict[tuple[str, torch.device], list[str]]:
    """(group, device of A) -> the modules there that share the group's input; modules without a basis are left out."""
    found: dict[tuple[str, torch.device], list[str]] = {}
    for name, pair in factors.items():
        group = subspace.group_of(name)
        if group is not None:
            found.setdefault((group, pair.A.device), []).append(name)
    return found


def constraints(
    subspace: Subspace, factors: Mapping[str, Factors], room: Mapping[str, Tensor]
) -> Iterator[Constraint]:
    """One constraint for all modules that share an input, so that one product projects them all."""
    for (group, device), names in sharing(subspace, factors).items():
        basis = room.get(group, subspace.right[group])
        if basis.shape[1]:
            parameters = tuple(factors[name].A for name in names)
            yield Constraint(basis.to(device, torch.float32), parameters, inside=group in room)
    for name, U in subspace.left.items():
        if name in factors:
            yield Constraint(U.to(factors[name].B.device, torch.float32), (factors[name].B,), columns=True)


def are_held(constraints: Sequence[Constraint]) -> bool:
    """Whether all weights are where they may be. NaN is nowhere."""
    return all(constraint.violation() <= 1e-3 for constraint in constraints)


def averages(optimizer: Any, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The second sequence z of a schedule-free optimizer (arXiv 2405.15682), of the parameters that have one. What it
    evaluates and saves lies on the line through the stepped weights and z."""
    state = getattr(getattr(optimizer, "optimizer", optimizer), "state", {})  # accelerate's wrapper has it inside
    return [state[p]["z"] for p in parameters if "z" in state.get(p, ())]


@contextmanager
def as_evaluated(optimizer: Any) -> Iterator[None]:
    """The weights that are evaluated and saved, for the length of a block, where the optimizer steps others."""
    inner = getattr(optimizer, "optimizer", optimizer)
    swaps = all(callable(getattr(inner, name, None)) for name in ("train", "eval"))
    swaps = swaps and all(group.get("train_mode", True) for group in inner.param_groups)
    if swaps:
        inner.eval()
    try:
        yield
    finally:
        if swaps:
            inner.train()
