"""Four answers to one question: which directions must the next task leave alone?

    inputs         what went into each module on this task (GPM, arXiv 2103.09762; InfLoRA, arXiv 2404.00228)
    gradients      where this task's gradients pointed (CoSO, arXiv 2505.11816)
    base_weights   what the base's own weights respond to and write to (OSFT, arXiv 2504.07097; OPLoRA, 2510.13003)
    past_adapters  the row space of the earlier adapters' A (O-LoRA, arXiv 2310.14152)

A source says what is protected from the first step on (`at_begin`, on top of the memory of earlier tasks), may look at
the gradients (`at_step`), and says what this task adds for the next (`at_end`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_mora.inputs import InputStatistics, input_statistics, layer_similarity, shared_inputs
from peft_mora.linalg import leading_directions, orthonormal, shrink_sketch

from .factors import Factors, base_weight
from .subspace import Subspace


@dataclass(frozen=True)
class Run:
    """What a source may look at."""

    model: nn.Module
    adapter_name: str
    factors: Mapping[str, Factors]  # module name -> its factors
    batches: Callable[[], Sequence[Mapping[str, Any]]]  # a few of this task's batches, the same at each call

    @property
    def layers(self) -> dict[str, nn.Module]:
        return {name: factors.layer for name, factors in self.factors.items()}

    def statistics(self, also: Mapping[str, nn.Module] | None = None) -> InputStatistics:
        """What goes into each module now, and into others by name, over `batches`."""
        return input_statistics(self.model, {**self.layers, **(also or {})}, self.batches())

    def remembered(self, subspace: Subspace) -> dict[str, nn.Module]:
        """The modules that any task so far has changed, or may change, by the memory.

        Raises:
            ValueError: the model has no such module.
        """
        modules = {n.removeprefix("base_model.model."): module for n, module in self.model.named_modules()}
        names = [name for group in subspace.groups.values() for name in group]
        if missing := [name for name in names if name not in modules]:
            raise ValueError(f"The memory is of a model with a module {missing[0]!r}, which this one has not.")
        return {name: modules[name] for name in names}


class Source:
    """What to protect. `energy` and `max_rank` as in `leading_directions`."""

    name: ClassVar[str]
    protects_from_start: ClassVar[bool] = False  # whether the first task is constrained as well
    knows_inputs: ClassVar[bool] = False  # whether the subspace remembers earlier tasks' inputs
    keeps_state: ClassVar[bool] = False  # whether a resumed run needs what `state` gave

    def __init__(self, energy: float | None, max_rank: int | None) -> None:
        self.energy, self.max_rank = energy, max_rank

    def check(self, run: Run, subspace: Subspace) -> None:
        """Raise before the training what would else be raised after it."""

    def at_begin(self, run: Run, subspace: Subspace) -> None:
        """Add to `subspace` what this run must leave alone from its first step on."""

    def at_step(self, run: Run) -> None:
        """See A's gradients, which the optimizer has just stepped by."""

    def at_end(self, run: Run, subspace: Subspace) -> None:
        """Add to `subspace` what the tasks after this one must leave alone."""

    def state(self) -> dict[str, Tensor]:
        """What `at_step` has gathered, for a checkpoint."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""


class Inputs(Source):
    """The leading directions of Σ x xᵀ over this task's training inputs, at the end of it.

    Of every module in the memory, also of one that this task leaves alone: earlier tasks have changed what it does,
    and a later one may change it again.
    """

    name = "inputs"
    knows_inputs = True

    def check(self, run: Run, subspace: Subspace) -> None:
        shared_inputs(run.model, {**run.layers, **run.remembered(subspace)}, run.batches()[0])

    def at_end(self, run: Run, subspace: Subspace) -> None:
        subspace.add_inputs(run.statistics(run.remembered(subspace)), self.energy, self.max_rank)


class Gradients(Source):
    """The leading right singular directions of all of A's gradients, by a Frequent Directions sketch of 2·r rows."""

    name = "gradients"
    keeps_state = True

    def __init__(self, energy: float | None, max_rank: int | None) -> None:
        super().__init__(energy, max_rank)
        self.sketches: dict[str, Tensor] = {}

    def check(self, run: Run, subspace: Subspace) -> None:
        if missing := [name for name in run.remembered(subspace) if name not in run.factors]:
            raise ValueError(
                f"Earlier tasks have adapted {len(missing)} modules that this adapter does not, e.g. {missing[0]!r}: "
                "without gradients there, a later task could not keep this one. Give this adapter the same "
                "target_modules, or use source='inputs'."
            )

    def at_step(self, run: Run) -> None:
        grads = {name: f.A.grad for name, f in run.factors.items() if f.A.grad is not None}
        if not grads:
            raise ValueError(
                "source='gradients' found no gradients after the step: an optimizer that steps inside backward "
                "(layer-wise, LOMO) has dropped them. Use another `optim`, or source='inputs'."
            )
        norms = torch.stack([grad.norm().cpu() for grad in grads.values()])
        if not norms.isfinite().all():
            broken = list(grads)[int(norms.isfinite().int().argmin())]
            raise ValueError(
                f"The gradient of A in module {broken!r} is NaN or inf, and the step was taken: the run has diverged. "
                "Start again with a lower learning rate."
            )
        for name, grad in grads.items():
            known = self.sketches.get(name, grad[:0]).to(grad.device, torch.float32)
            rows = torch.cat([known, grad.float()])
            # Shrunk only when twice as long, so that the decomposition is not paid at each step.
            size = max(64, 2 * len(grad))
            self.sketches[name] = rows if len(rows) < 2 * size else shrink_sketch(rows, size)

    def at_end(self, run: Run, subspace: Subspace) -> None:
        if missing := [name for name in run.factors if name not in self.sketches]:
            raise ValueError(
                f"A of {len(missing)} modules had no gradient in any step, e.g. in {missing[0]!r}, so what this task "
                "needs of them is not known. Leave them out of target_modules."
            )
        for name, rows in self.sketches.items():
            new = leading_directions(rows.T @ rows, self.energy, self.max_rank, subspace.right.get(name))
            subspace.append(name, new)

    def state(self) -> dict[str, Tensor]:
        return dict(self.sketches)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.sketches = dict(state)


class BaseWeights(Source):
    """Top singular directions of each frozen weight: right ones for A, left ones for B.

    With `energy`, so many that they hold that share of ‖W‖². With energy=None, OSFT's rule by layer: a share
    `0.1 + importance · 0.7` of the directions, at most 0.8, where importance is the mean cosine between a decoder
    layer's input and output, over its mean of all layers. (OSFT's cosine is between a weight's input and output, which
    only a square weight has.)
    """

    name = "base_weights"
    protects_from_start = True
    min_keep, max_keep = 0.1, 0.8

    def __init__(self, energy: float | None, max_rank: int | None) -> None:
        super().__init__(energy, max_rank)
        # () float64 of each module, of the run's start: a trained adapter has others
        self.shares: dict[str, Tensor] = {}

    def at_begin(self, run: Run, subspace: Subspace) -> None:
        if subspace.right:
            return  # the memory has them
        if self.energy is None and not self.shares:
            self.shares = {name: torch.tensor(x, dtype=torch.float64) for name, x in self._shares(run).items()}
        for name, factors in run.factors.items():
            weight = base_weight(factors.layer)
            if not weight.isfinite().all():
                raise ValueError(f"The base's weight of module {name!r} has NaN or inf: it has no directions to keep.")
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            if self.energy is None:
                k = round(float(self.shares[name]) * len(S))
            else:
                share = S.square().cumsum(0) / S.square().sum()
                k = int((share < self.energy).sum()) + 1
            k = min(k, len(S), self.max_rank or len(S))
            subspace.append(name, Vh[:k].T, outputs=U[:, :k])

    def state(self) -> dict[str, Tensor]:
        return dict(self.shares)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.shares = dict(state)

    def _shares(self, run: Run) -> dict[str, float]:
        layer_of = {name: found[1] if (found := re.match(r"(.*\.\d+)\.", name)) else "" for name in run.factors}
        modules = {n.removeprefix("base_model.model."): module for n, module in run.model.named_modules()}
        layers = {name: modules[name] for name in set(layer_of.values()) if name}
        similarity = layer_similarity(run.model, layers, run.batches()) if layers else {}
        mean = sum(similarity.values()) / max(1, len(similarity))
        importance = {name: similarity[layer] / mean if layer else 1.0 for name, layer in layer_of.items()}
        span = self.max_keep - self.min_keep
        return {n: min(self.max_keep, max(self.min_keep, self.min_keep + i * span)) for n, i in importance.items()}


class PastAdapters(Source):
    """The rows of every earlier adapter's A (MORA: of the frozen experts'), whatever `energy` says."""

    name = "past_adapters"
    protects_from_start = True

    def at_begin(self, run: Run, subspace: Subspace) -> None:
        for name, factors in run.factors.items():
            self._add(subspace, name, [A.detach().float().cpu() for A in factors.past_A])

    def at_end(self, run: Run, subspace: Subspace) -> None:
        for name, factors in run.factors.items():
            self._add(subspace, name, [factors.A.detach().float().cpu()])

    def _add(self, subspace: Subspace, name: str, rows: list[Tensor]) -> None:
        if rows:
            subspace.append(name, orthonormal(torch.cat(rows).T, subspace.right.get(name)))


SOURCES: dict[str, type[Source]] = {source.name: source for source in (Inputs, Gradients, BaseWeights, PastAdapters)}
