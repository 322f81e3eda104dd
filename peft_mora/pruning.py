"""Delete MORA or SMORA experts that hardly any token wakes: from the layers, the file and the config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import AdapterLinear, check_in_memory, config_of
from .checks import check_field, is_number
from .inputs import eval_mode
from .routed import record_routing, routed_layers
from .usage import Usage, expert_usage


class PruneSummary(dict[str, int]):
    """What `prune_experts` did: {module name: experts deleted}.

    Attributes:
        experts: how many there were before, over all modules.
        change: relative change of the model's outputs on `inputs`, ‖after − before‖ / ‖before‖; None without inputs.
    """

    def __init__(self, deleted: Mapping[str, int], experts: int, change: float | None = None) -> None:
        super().__init__(deleted)
        self.experts, self.change = experts, change

    def __str__(self) -> str:
        modules = sum(n > 0 for n in self.values())
        change = "" if self.change is None else f"; outputs on the given inputs changed by {self.change:.2%}"
        return f"{sum(self.values())} of {self.experts} experts deleted, in {modules} of {len(self)} modules{change}"


@torch.no_grad()
def prune_experts(
    model: nn.Module,
    below: float = 0.01,
    adapter_name: str = "default",
    *,
    inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
) -> PruneSummary:
    """Delete the experts of a MORA or SMORA adapter, frozen ones too, that acted for less than a share of the tokens.

    What is left keeps its scale (alpha / r of the original r) and trains on; MORA's `start_task` appends r as ever.
    A block may lose all of its experts. The trainable parameters are new objects: make a new trainer afterwards.

    Args:
        model: a PeftModel, or any model with such an adapter injected, whose usage was counted (`record_usage`, or
            `ActivationBudgetCallback`).
        below: usage share in (0, 1]; experts under it go.
        adapter_name: which adapter.
        inputs: a batch (keyword arguments of the model), or a list of them, to measure the change of outputs on.

    Returns:
        A `PruneSummary`, which is {module name: experts deleted}; `print` it.

    Raises:
        ValueError: no routing, a part of the adapter's model without the config, a method whose experts cannot be
            deleted, a merged adapter, or nothing counted. Nothing is changed then.
    """
    check_field(is_number(below) and 0 < below <= 1, "below", below, "a number in (0, 1]")
    layers: dict[str, Any] = routed_layers(model, adapter_name)
    config_of(model, adapter_name)  # which is written last
    if refusal := next((layer.prune_refusal for layer in layers.values() if layer.prune_refusal), ""):
        raise ValueError(f"Cannot prune adapter {adapter_name!r}: {refusal}")
    if any(layer.merged for layer in model.modules() if isinstance(layer, AdapterLinear)):
        raise ValueError("Cannot prune while an adapter is merged: call model.unmerge_adapter() first.")
    check_in_memory(layers, adapter_name)
    usage = expert_usage(model, adapter_name)
    batches = [] if inputs is None else [inputs] if isinstance(inputs, Mapping) else list(inputs)
    before = list(_outputs(model, batches, layers, adapter_name))
    size = sum(old.double().square().sum().item() for old in before)
    what = "batches with tokens that are no padding, or None"
    check_field(not batches or size != 0, "inputs", f"{len(batches)} without any", what)
    parts = {name: layer.without(adapter_name, usage[name] >= below) for name, layer in layers.items()}
    experts = {name: layer.expert_count(adapter_name) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.put(adapter_name, *parts[name])
    record_routing(model, adapter_name)
    after = _outputs(model, batches, layers, adapter_name)
    moved = sum((new.double() - old.double()).square().sum().item() for old, new in zip(before, after, strict=True))
    change = (moved / size) ** 0.5 if batches else None
    deleted = {name: experts[name] - layer.expert_count(adapter_name) for name, layer in layers.items()}
    return PruneSummary(deleted, sum(experts.values()), change)


def _outputs(
    model: nn.Module, batches: list[Mapping[str, Any]], layers: Mapping[str, Any], adapter_name: str
) -> Iterator[Tensor]:
    """Outputs, of tokens those that are real, batch by batch on the CPU, in eval mode and uncounted."""
    counters: list[Usage] = [layer.usage[adapter_name] for layer in layers.values() if adapter_name in layer.usage]
    for counter in counters:
        counter.meter.paused = True
    try:
        with eval_mode(model):
            for batch in batches:
                output = model(**batch)
                logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
                found: Tensor = output[0] if logits is None else logits  # the states of a model without a head
                mask = batch.get("attention_mask") if found.dim() > 2 else None  # a classifier's are of rows
                if mask is not None and found.shape[:2] == mask.shape:
                    found = found[mask.to(found.device).bool()]
                yield found.cpu()
    finally:
        for counter in counters:
            counter.meter.paused = False
