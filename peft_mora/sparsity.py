"""LoRI-D to LoRI-S: keep the entries of B that matter, over all modules together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .base import adapter_layers, check_in_memory, config_of
from .checks import check_field, is_number, listed
from .lori import LoriLinear, record_form, share_projection


@dataclass(frozen=True)
class SparsitySummary:
    """What `sparsify` did: entries of B kept and in all, the global threshold on |B|, share kept by module (0..1)."""

    kept: int
    total: int
    threshold: float
    share: dict[str, float]

    def __str__(self) -> str:
        low, high = min(self.share.values()), max(self.share.values())
        return (
            f"{self.kept:,} of {self.total:,} entries of B kept (|B| >= {self.threshold:.3g}), "
            f"{low:.1%} to {high:.1%} a module"
        )


@torch.no_grad()
def sparsify(
    model: nn.Module, sparsity: float = 0.9, adapter_name: str = "default", onto: str | None = None
) -> SparsitySummary:
    """Turn a calibrated LoRI-D adapter into LoRI-S: keep the largest entries of B over all modules, restarted at 0.

    A stays what it is. B is packed from here on, so its parameters are new objects: make a new optimizer (or use
    `LoriCalibrationCallback`, which does all of this inside one training run).

    Args:
        model: a PeftModel, or any model with an injected LORI adapter, trained densely for a while.
        sparsity: share of B's entries to drop, in [0, 1).
        adapter_name: which adapter.
        onto: name of a LORI adapter with the same A that holds an earlier task. The result starts from that adapter's
            update instead of from 0: entries of its B outside the new mask are kept and frozen, those inside go on
            training. Where the two have different alphas, B is scaled so that the update stays the same.

    Returns:
        A `SparsitySummary`; `print` it.

    Raises:
        ValueError: no such adapter, or a part of its model without the config; one that is packed already, merged,
            untrained (B = 0) or not finite; or `onto` has another A, or modules that the adapter has not. Nothing is
            changed then.
    """
    check_field(is_number(sparsity) and 0 <= sparsity < 1, "sparsity", sparsity, "a number in [0, 1)")
    layers = adapter_layers(model, adapter_name, LoriLinear)
    config_of(model, adapter_name)  # which is written last
    if any(layer.is_packed(adapter_name) for layer in layers.values()):
        raise ValueError(
            f"Adapter {adapter_name!r} is sparse already. Calibrate a new dense one (LoriConfig without `sparsity`) "
            "and sparsify that; pass onto=... to build on this one."
        )
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError("Cannot sparsify a merged adapter: call model.unmerge_adapter() first.")
    check_in_memory(layers, adapter_name)
    magnitudes = torch.cat(
        [layer.lori_B[adapter_name].weight.float().abs().flatten().cpu() for layer in layers.values()]
    )
    if not torch.isfinite(magnitudes).all():
        raise ValueError(
            "B has entries that are not finite: the calibration run has diverged. Lower its learning rate."
        )
    if not magnitudes.any():
        raise ValueError(
            "B is 0 everywhere, so there is nothing to choose by: train the dense adapter for some steps first, or "
            "use LoriCalibrationCallback."
        )
    if onto is not None:
        check_onto(model, adapter_name, onto)
    kept = max(1, round((1 - sparsity) * magnitudes.numel()))
    top = magnitudes.topk(kept)
    mask = torch.zeros(magnitudes.numel(), dtype=torch.bool)
    mask[top.indices.cpu()] = True
    masks = mask.split([layer.size(adapter_name) for layer in layers.values()])
    for layer, chosen in zip(layers.values(), masks, strict=True):
        old = layer.lori_B[adapter_name].weight
        start = torch.zeros(chosen.numel())
        if onto is not None:
            ratio = layer.scaling[onto] / layer.scaling[adapter_name]
            start = ratio * layer.matrix_B(onto, torch.float32).flatten().cpu()
        layer.set_packed(adapter_name, chosen, start[chosen], old.dtype)
        layer.lori_B[adapter_name].to(old.device).requires_grad_(old.requires_grad)
        rest = (start != 0) & ~chosen
        if rest.any():
            layer.set_frozen(adapter_name, rest, start[rest])
    record_form(model, adapter_name, sparsity)
    return SparsitySummary(
        kept=kept,
        total=magnitudes.numel(),
        threshold=top.values[-1].item(),
        share={name: chosen.float().mean().item() for name, chosen in zip(layers, masks, strict=True)},
    )


def check_onto(model: nn.Module, adapter_name: str, onto: str) -> None:
    """Refuse an earlier task's adapter that a LORI adapter cannot start from.

    Raises:
        ValueError: there is no such LORI adapter, or it has another A, or modules that the new one has not.
    """
    layers = adapter_layers(model, adapter_name, LoriLinear)
    names = {name for module in model.modules() if isinstance(module, LoriLinear) for name in module.r}
    if onto not in names or onto == adapter_name:
        others = sorted(names - {adapter_name})
        raise ValueError(
            f"`onto` is {onto!r}, and the model has no such LORI adapter beside {adapter_name!r} (it has "
            f"{listed(map(repr, others), 'and') if others else 'no other'}): give one of an earlier task, or leave it "
            "out."
        )
    beyond = adapter_layers(model, onto, LoriLinear).keys() - layers.keys()
    if beyond:
        raise ValueError(
            f"Adapter {onto!r} adapts {len(beyond)} modules that {adapter_name!r} does not (e.g. {min(beyond)!r}), "
            "and what it has learnt there would be missing. Give the new one the same `target_modules`."
        )
    for name, layer in layers.items():
        if onto not in layer.r or not share_projection(layer, [adapter_name, onto]):
            raise ValueError(
                f"Adapter {onto!r} has another projection A than {adapter_name!r} in module {name!r}, so their B's do "
                "not add up. Give both configs the same seed, r and target_modules."
            )
