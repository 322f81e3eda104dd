"""Layers that choose among their experts token by token: K of each module in the config, read and set on the layer.

Every routed method has this one small interface, so that budgets, counters and pruning need not know which it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from . import registry
from .base import AdapterConfig, AdapterLinear, adapters_of, check_patterns, config_of, matching_key, set_config
from .checks import check_field, is_int, listed


class Counter(Protocol):
    """What counts a layer's forwards, if anything does; see usage.py."""

    @property
    def is_open(self) -> bool:
        """Whether this very forward is to be counted."""

    @property
    def needed(self) -> bool:
        """Whether `add_need` is wanted too."""

    def add(self, weights: Tensor) -> None:
        """Count one call of the layer: (..., R) weights, an expert acts for a token where its weight is not 0."""

    def add_need(self, weights: Tensor) -> None:
        """Add up how spread the routing is: (..., R) weights before the choice, summing to 1."""


@dataclass
class RoutedConfig(AdapterConfig):
    """Fields of a method that chooses among its experts token by token."""

    routed_as: ClassVar[tuple[str, ...]] = ()  # how to write a config that does, if not all of them do

    top_k_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Module name or regular expression -> K, where it is not `top_k`; the longest match counts."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns("top_k_pattern", self.top_k_pattern)
        largest = max([self.r, *self.rank_pattern.values()])
        for key, k in self.top_k_pattern.items():
            check_field(
                is_int(k) and 1 <= k <= largest,
                f"top_k_pattern[{key!r}]",
                k,
                f"an integer from 1 to r (here {largest})",
            )


def module_top_k(config: Any, module_name: str, r: int) -> int:
    """K of one module of r experts: what `top_k_pattern` says of it, else `top_k` or r."""
    key = matching_key(config.top_k_pattern, module_name)
    k = config.top_k_pattern.get(key, config.top_k or r)
    check_field(k <= r, f"top_k_pattern[{key!r}]", k, f"<= r of module {module_name!r}, which is {r}")
    return k


class RoutedLinear(AdapterLinear):
    """A layer whose experts are chosen token by token."""

    prune_refusal: ClassVar[str] = ""  # why this method's experts cannot be deleted, and what to do instead

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.usage: dict[str, Any] = {}  # adapter name -> counters; empty unless something counts

    def is_routed(self, adapter_name: str) -> bool:
        """Whether the adapter chooses among its experts at all."""
        return True

    def expert_count(self, adapter_name: str) -> int:
        """R, frozen experts counted."""
        return self.r[adapter_name]

    def top_k(self, adapter_name: str) -> int:
        raise NotImplementedError

    def set_top_k(self, adapter_name: str, k: int) -> None:
        """Change K on the layer alone; `set_top_k` of this module does it for a model and writes the config."""
        raise NotImplementedError

    def choices(self, adapter_name: str) -> int:
        """How many experts `top_k` chooses among, and so the largest K that means anything."""
        return self.r[adapter_name]

    def largest_top_k(self, adapter_name: str) -> int:
        """The largest K that may be set; pruning leaves it as it is."""
        return self.r[adapter_name]

    def fixed_experts(self, adapter_name: str) -> int:
        """Experts that a token wakes in this layer whatever `top_k` is: those of frozen blocks."""
        return 0

    def block_fields(self, adapter_name: str) -> dict[str, Any]:
        """What the config says of this module alone, by field; None where the default says it."""
        return {}

    def counting(self, adapter_name: str) -> Counter | None:
        """The counter, if this very forward is to be counted.

        Raises:
            RuntimeError: this is a replica of `nn.DataParallel`; several threads would count in one place.
        """
        counter = self.usage.get(adapter_name)
        if counter is None or not counter.is_open:
            return None
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "Expert usage (record_usage, ActivationBudgetCallback) cannot be counted under nn.DataParallel, whose "
                "replicas run at once in one process. Use one GPU (CUDA_VISIBLE_DEVICES=0), or a process for each: "
                "`accelerate launch` or `torchrun`."
            )
        return counter


def routed_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, RoutedLinear]:
    """The routed layers that hold the adapter, by name in `model`.

    Raises:
        ValueError: no such adapter, or one without routing; the message says which configs have it.
    """
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, RoutedLinear) and adapter_name in m.r and m.is_routed(adapter_name)
    }
    if not layers:
        configs = adapters_of(model)
        if adapter_name in configs:
            config = configs[adapter_name]
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            kind += f" with routing={config.routing!r}" if hasattr(config, "routing") else ""
            what = f"Adapter {adapter_name!r} ({kind}) has no routing: every token wakes all of its experts."
        else:
            what = f"The model has no adapter named {adapter_name!r}; it has {sorted(configs) or 'none'}."
        routed = [m.config for m in registry.registered.values() if issubclass(m.config, RoutedConfig)]
        ways = [way for config in routed for way in config.routed_as or (config.__name__,)]
        raise ValueError(f"{what} Budgets and expert usage need {listed(ways)}.")
    return layers


def set_top_k(model: nn.Module, top_k: dict[str, int], adapter_name: str = "default") -> None:
    """Set K of the given modules (names as in `routed_layers`) and write it into the adapter's config.

    Raises:
        ValueError: no routing, a part of the adapter's model without the config, a module that is none of its layers,
            or a K outside 1..r. Nothing is changed then.
    """
    layers = routed_layers(model, adapter_name)
    config_of(model, adapter_name)  # which is written last
    for name, k in top_k.items():
        if name not in layers:
            raise ValueError(f"Module {name!r} has no routed adapter {adapter_name!r}.")
        most = layers[name].largest_top_k(adapter_name)
        check_field(is_int(k) and 1 <= k <= most, f"top_k[{name!r}]", k, f"an integer from 1 to r (here {most})")
    if all(layers[name].top_k(adapter_name) == k for name, k in top_k.items()):
        return
    for name, k in top_k.items():
        layers[name].set_top_k(adapter_name, k)
    record_routing(model, adapter_name)


def record_routing(model: Any, adapter_name: str) -> None:
    """Write what the layers hold into the adapter's config, into a copy of it: a twin may share the object."""
    config = copy.deepcopy(config_of(model, adapter_name))
    layers = [m for m in model.modules() if isinstance(m, RoutedLinear) and adapter_name in m.r]
    top_k = {layer.module_names[adapter_name]: layer.top_k(adapter_name) for layer in layers}
    most = {layer.module_names[adapter_name]: layer.largest_top_k(adapter_name) for layer in layers}
    if any(module_top_k(config, name, most[name]) != k for name, k in top_k.items()):
        differs = any(k != (config.top_k or most[name]) for name, k in top_k.items())
        config.top_k_pattern = top_k if differs else {}
    fields: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for name, value in layer.block_fields(adapter_name).items():
            entries = fields.setdefault(name, {})
            if value is not None:
                entries[layer.module_names[adapter_name]] = value
    for name, entries in fields.items():
        setattr(config, name, entries)
    set_config(model, adapter_name, config)
