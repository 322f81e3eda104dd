"""One adapted parameter of a module that is no linear layer: the fused experts of a mixture, or a router's weight.

    W'_e = W_e + (alpha / r) · B_e A_e      for each expert e of W (E, O, I), or W (E, I, O) where the module says
                                            `is_transposed`; a matrix (O, I) is E = 1

as PEFT's ParamWrapper has it: the module computes with W' for the length of its forward. Which tokens reach which
expert is seen inside the module alone, so ΔW is all there is: methods that route by token cannot be had here, and no
row of a batch can have an adapter of its own.

Layout: A (E·r, I) and B (O, E·r) of a layer of the method at rank E·r, expert after expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils import get_quantization_kwargs
from peft.utils.other import _get_submodules
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from .base import AdapterLinear, AdapterModel, Trained, warn_of_rounding
from .lean import matrix_of
from .routing import without_autocast


class FourBit(NamedTuple):
    """A parameter as bitsandbytes' `replace_parameter_4bit` keeps it."""

    codes: Tensor
    state: Any  # its QuantState


class _Added(nn.Module):
    """W + ΔW, as a parametrization."""

    def __init__(self, factors: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, weight: Tensor) -> Tensor:
        left, right = (factor.to(weight.dtype) for factor in self.factors)
        with without_autocast(weight):  # a parameter keeps its dtype
            return torch.baddbmm(weight, left, right) if weight.dim() == 3 else torch.addmm(weight, left[0], right[0])


class ExpertWeights(AdapterLinear):
    """A method whose update is one ΔW, on one parameter. A method names its own:
    `class LoriExperts(ExpertWeights, LoriLinear)`. Where a module has several adapted parameters, one wraps the other.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, **kwargs: Any) -> None:
        self.parameter_name = self.weight_name = parameter_name
        super().__init__(base_layer, **kwargs)

    def _features(self) -> tuple[int, int]:
        shape = self.base_parameter().shape
        if len(shape) not in (2, 3):
            raise ValueError(
                f"The parameter {self.parameter_name!r} has {len(shape)} dimensions, {tuple(shape)}: adapted can be "
                "matrices (O, I) and stacks of them (experts, O, I). Leave it out of `target_parameters`."
            )
        self.experts = shape[0] if len(shape) == 3 else 1
        self.transposed = len(shape) == 3 and getattr(self.get_base_layer(), "is_transposed", False)
        in_features, out_features = shape[-2:] if self.transposed else shape[:-3:-1]
        return in_features, out_features

    def base_parameter(self) -> Tensor:
        """W, dequantised where it is kept in 4 bits."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        weight = self.base_parameter()
        return weight.device, weight.dtype

    def update_layer(self, adapter_name: str, r: int, alpha: float, *args: Any, **kwargs: Any) -> None:
        """Add an adapter of rank r for each expert."""
        super().update_layer(adapter_name, r * self.experts, alpha * self.experts, *args, **kwargs)

    def blocks_by_expert(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (E, R, I) and B (E, O, R), float32 or wider, differentiable; R: the ranks of all the adapter's tasks."""
        downs, ups, _ = self.parts(adapter_name)
        dtype = torch.promote_types(downs[-1].values.dtype, torch.float32)
        As = [matrix_of(*down, dtype).view(self.experts, -1, self.in_features) for down in downs]
        Bs = [matrix_of(*up, dtype).view(self.out_features, self.experts, -1).transpose(0, 1) for up in ups]
        return torch.cat(As, dim=1), torch.cat(Bs, dim=2)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (E·R, I), expert after expert, and B (O, R·E), rank after rank: as PEFT stores a LoRA of a parameter."""
        A, B = (factor.detach() for factor in self.blocks_by_expert(adapter_name))
        return A.reshape(-1, self.in_features), B.permute(1, 2, 0).reshape(self.out_features, -1)

    def update(self, adapter_names: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Two factors (E, ·, ·) of Σ (alpha / r) · B·A in the layout of W, float32 or wider."""
        found = [(self.scaling[name], *self.blocks_by_expert(name)) for name in adapter_names]
        B = torch.cat([scale * B for scale, _, B in found], dim=2)
        A = torch.cat([A for _, A, _ in found], dim=1)
        return (A.transpose(1, 2), B.transpose(1, 2)) if self.transposed else (B, A)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is not None and not self.disable_adapters:
            raise ValueError(
                f"Rows of a batch cannot have adapters of their own where a parameter ({self.parameter_name!r}) is "
                "adapted: the module computes with one weight for all. Set the adapter for the whole batch: "
                "model.set_adapter(NAME)."
            )
        if self.disable_adapters and self.merged:
            with onload_layer(self):  # accelerate may have the weight elsewhere
                self.unmerge()
        names = [name for name in self.active_adapters if name in self.r]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(*args, **kwargs)
        chain, given = self._chain(), (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        stored = self.base_parameter() if chain is None else chain.original
        if stored.is_meta and not any(x.is_meta for x in given):
            raise ValueError(
                f"{self.module_names[names[0]]} is offloaded by accelerate, which brings it where its module is "
                "called, after the update was added. Keep adapted experts on the device (`device_map`, a 4-bit base), "
                "or leave them out of `target_parameters`."
            )
        with self._added(_Added(self.update(names))):
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def _added(self, added: _Added) -> Iterator[None]:
        """The module has W + ΔW under the parameter's name for the length of the block."""
        module, name, chain = self.get_base_layer(), self.parameter_name, self._chain()
        if chain is not None:  # a property of its class, which nothing can stand in front of
            chain.append(added)
            parametrize._cache.pop((id(module), name), None)
            try:
                yield
            finally:
                del chain[len(chain) - 1]
                parametrize._cache.pop((id(module), name), None)
            return
        seen = vars(module)  # found before parameters are; a replica of nn.DataParallel has its tensors here
        before = seen.get(name)
        seen[name] = added(self.base_parameter())
        try:
            yield
        finally:
            del seen[name]
            if before is not None:
                seen[name] = before

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW (E, O, I), float32 or wider, in the layout of the parameter.

        Raises:
            ValueError: as for any layer.
        """
        if not self.is_static(adapter_name):
            raise ValueError(self.merge_refusal)
        left, right = self.update([adapter_name])
        delta = (left @ right).detach()
        return delta if self.base_parameter().dim() == 3 else delta[0]

    def get_base_weight(self) -> Tensor:
        return self.base_parameter().detach()

    def set_base_weight(self, weight_data: Tensor) -> None:
        held = self._four_bit()
        if held is None:
            self.get_base_layer()._parameters[self.parameter_name].data = weight_data  # type: ignore[union-attr]
            return
        from bitsandbytes.functional import quantize_4bit

        state = held.state
        codes, new = quantize_4bit(
            weight_data, blocksize=state.blocksize, compress_statistics=state.nested, quant_type=state.quant_type
        )
        self._put(FourBit(codes, new))

    def _chain(self) -> Any:
        """What the parameter is computed by, its `ParametrizationList`; None where it is not computed."""
        module: Any = self.get_base_layer()
        computed = parametrize.is_parametrized(module, self.parameter_name)
        return module.parametrizations[self.parameter_name] if computed else None

    def _four_bit(self) -> FourBit | None:
        chain = self._chain()
        return None if chain is None else FourBit(chain.original.data, chain[0].quant_state)

    def _put(self, held: FourBit) -> None:
        chain = self._chain()
        chain.original.data, chain[0].quant_state = held

    def check_merge(self, adapter_names: list[str]) -> None:
        super().check_merge(adapter_names)
        if self.shares_weight:
            raise ValueError(
                f"Cannot merge into {self.parameter_name!r}: another module has the very same parameter (tied "
                "embeddings), which would change as well. Keep the adapter unmerged."
            )
        chain = self._chain()
        if chain is not None and (len(chain) != 1 or not hasattr(chain[0], "quant_state")):
            by = ", ".join(type(part).__name__ for part in chain)
            raise ValueError(
                f"Cannot merge into {self.parameter_name!r}: it is computed by {by}, and not by bitsandbytes' 4-bit "
                "parameter alone. Keep the adapter unmerged."
            )

    def _keep_weight(self, weight: Tensor) -> Any:
        held = self._four_bit()
        if held is None:
            return weight
        warn_of_rounding("bitsandbytes in 4 bits")
        return held

    def _put_back(self, before: Any) -> None:
        if isinstance(before, FourBit):
            self._put(before)
        else:
            now = self.base_parameter()
            self.set_base_weight(before.to(now.device, now.dtype))

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without this wrapper and those inside of it, merged first if asked for; PEFT calls this."""
        layer: Any = self
        while isinstance(layer, ExpertWeights):
            if merge:
                layer.merge(safe_merge, adapter_names)
            layer = layer.base_layer
        return layer

    def trained(self, adapter_name: str) -> Trained | None:
        return None  # the inputs of an expert are seen inside the module alone

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT's converts linear layers; peft_mora.export writes it exactly

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"


class ExpertModel(AdapterModel):
    """A method that also adapts parameters, by its `expert_layer_cls`."""

    expert_layer_cls: type[ExpertWeights]

    def _check_new_adapter_config(self, config: Any) -> None:
        """A parameter's place among those that wrap one module is in its file's names, so that all adapters need the
        same ones.

        Raises:
            ValueError: another adapter has others.
        """
        super()._check_new_adapter_config(config)
        wanted = set(config.target_parameters or ())
        for name, other in self.peft_config.items():
            there = set(getattr(other, "target_parameters", None) or ())
            if other is not config and wanted and there and wanted != there:
                raise ValueError(
                    f"The new adapter has target_parameters={sorted(wanted)} and adapter {name!r} {sorted(there)}: "
                    "adapters of one model need the same ones, since files name a parameter by its place among them. "
                    "Give the same list, or put the adapter on a model of its own."
                )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        """Parameters alone where no modules are named, as PEFT's LoRA adapts a mixture."""
        if peft_config.target_modules is None and peft_config.target_parameters:
            peft_config.target_modules = set()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """PEFT's own tells its wrappers by their class's name, and finds a parameter in 4 bits by its full name only,
        for a first adapter only."""
        found = []
        for name, module in list(model.named_modules()):
            owner = without_wrappers(name)
            for parameter_name in () if isinstance(module, BaseTunerLayer) else parameter_names(module):
                key = f"{owner}.{parameter_name}"
                if any(f".{key}".endswith(f".{target}") for target in peft_config.target_parameters):
                    found.append(key)
                    with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                        self._adapt_parameter(peft_config, adapter_name, model, owner, parameter_name)
        return found

    def _adapt_parameter(
        self, config: Any, adapter_name: str, model: nn.Module, owner: str, parameter_name: str
    ) -> None:
        key = f"{owner}.{parameter_name}"
        if not owner:
            raise ValueError(
                f"The parameter {parameter_name!r} belongs to the model itself, which nothing can be put around. "
                "Leave it out of `target_parameters`."
            )
        parent, target, target_name = _get_submodules(model, owner)
        wrapper = target
        while isinstance(wrapper, ExpertWeights) and wrapper.parameter_name != parameter_name:
            wrapper = wrapper.base_layer
        if isinstance(wrapper, ExpertWeights):  # of an earlier adapter
            target = wrapper
        elif isinstance(target, (nn.Linear, Conv1D, BaseTunerLayer)) and not isinstance(target, ExpertWeights):
            raise ValueError(
                f"{key!r} is the weight of a linear module ({type(target).__name__}): name {owner!r} in "
                "`target_modules` instead of `target_parameters`."
            )
        self._create_and_replace(config, adapter_name, target, target_name, parent, key, parameter_name)

    def _wrap(self, target: nn.Module, config: Any, module_name: str, parameter_name: str | None) -> AdapterLinear:
        if parameter_name is None:
            return super()._wrap(target, config, module_name, None)
        return self.expert_layer_cls(target, parameter_name, **get_quantization_kwargs(self)).train(target.training)


def parameter_names(module: nn.Module) -> list[str]:
    """Its own, those that are computed (bitsandbytes' in 4 bits) included."""
    computed: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
    return [*module._parameters, *computed]


def without_wrappers(module_name: str) -> str:
    """A module's name in the base model, of one inside of the layers that adapt its parameters."""
    return ".".join(part for part in module_name.split(".") if part != "base_layer")
