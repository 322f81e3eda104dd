"""What an adapter trains in each module, whatever its method: A, B, and the frozen A's before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_mora import registry
from peft_mora.base import AdapterLinear, Trained, adapters_of
from peft_mora.checks import listed
from peft_mora.experts import ExpertWeights
from peft_mora.quantization import check_codes
from peft_mora.routing import at_least_float32


class Factors(NamedTuple):
    """One adapted module: its trainable A (r, I) and B (O, r), the frozen A's before them, what else it trains that
    changes nothing where A·x is 0, and the layer."""

    A: nn.Parameter
    B: nn.Parameter
    past_A: tuple[Tensor, ...]
    through: tuple[nn.Parameter, ...]
    layer: Any


def trainable_factors(model: Any, adapter_name: str | None) -> tuple[str, dict[str, Factors]]:
    """The adapter in training and, by module name in the base model, its A and B.

    Args:
        model: a PeftModel.
        adapter_name: which adapter; None is the one in training.

    Raises:
        ValueError: none or several adapters are in training, or one whose new update cannot be kept from old inputs.
    """
    configs = getattr(model, "peft_config", {})
    if not configs and adapters_of(model):
        raise ValueError(
            f"The adapter is of a model inside of this {type(model).__name__}, whose batches are no batches of that "
            "model's: what goes into it cannot be seen in advance. Train without OrthogonalProjectionCallback, or "
            "give a trainer the model inside."
        )
    found = _in_training(model, "old inputs cannot be kept from it")
    if adapter_name is None and len(found) > 1:
        raise ValueError(
            f"Several adapters are in training ({', '.join(map(repr, sorted(found)))}), of which one alone can be "
            "kept from the directions of earlier tasks. Freeze the others: model.set_requires_grad(NAME, "
            "requires_grad=False)."
        )
    name = adapter_name if adapter_name is not None else next(iter(found), None)
    if name is None or name not in found:
        kinds = {n: getattr(c.peft_type, "value", c.peft_type) for n, c in configs.items()}
        shown = ", ".join(f"{n!r} ({kind})" for n, kind in kinds.items()) or "none"
        methods = registry.registered.values()
        able = [m for m in methods if m.model.tuner_layer_cls.trained is not AdapterLinear.trained]
        usable = listed(method.config.__name__ for method in able)
        others = listed((method.config.method for method in methods if method not in able), "and")
        raise ValueError(
            f"OrthogonalProjectionCallback needs {'an adapter' if name is None else f'adapter {name!r}'} in training "
            f"whose A it can keep from old inputs; the model's adapters are: {shown}. Use {usable} (and start_task "
            f"for each further task), or a fresh LoraConfig adapter for each task. {others} have an A that is frozen "
            "and reads every input, or more than one pair of A and B; prompts change the inputs of all layers."
        )
    if isinstance(configs[name], LoraConfig):
        _check_biases(configs[name], name)
    return name, found[name]


def static_factors(model: Any, adapter_name: str | None, callback: str) -> tuple[str, dict[str, Factors]]:
    """As `trainable_factors`, of an adapter whose update in each module is scaling · B·A whatever the input.

    Args:
        callback: who asks, for errors.

    Raises:
        ValueError: none or several adapters are in training, or one whose update is more, or another, than B·A.
    """
    found = _in_training(model, f"{callback} works on B·A alone")
    shown = ", ".join(map(repr, sorted(found))) or "none"
    names = sorted(found) if adapter_name is None else [adapter_name]
    if len(names) != 1 or names[0] not in found:
        raise ValueError(
            f"{callback} needs one adapter in training that has an A and a B in every module; here {shown} has. Use "
            "LoraConfig or MoraConfig(routing='dense'), and where several are in training say which: "
            "adapter_name=NAME. A frozen A (LORI, FLYLORA) and prompts leave it nothing to work on."
        )
    name = names[0]
    for module, pair in found[name].items():
        if isinstance(pair.layer, AdapterLinear) and not pair.layer.is_static(name):
            raise ValueError(
                f"Adapter {name!r} chooses its experts by the input (module {module!r}), so that its update is no "
                f"B·A, which {callback} works on. Use MoraConfig(routing='dense'), or LoraConfig."
            )
        if pair.through:
            raise ValueError(
                f"Adapter {name!r} trains more than an A and a B (module {module!r}), and {callback} works on B·A "
                "alone. Use MoraConfig(routing='dense'), or LoraConfig."
            )
    return name, found[name]


def _in_training(model: Any, consequence: str) -> dict[str, dict[str, Factors]]:
    """Adapter name -> module name in the base model -> what of it is in training."""
    found: dict[str, dict[str, Factors]] = {}
    for module_name, layer in model.named_modules():
        for adapter in getattr(model, "peft_config", {}):
            name = module_name.removeprefix("base_model.model.")
            _check_linear(layer, adapter, name, consequence)
            if trained := trained_factors(layer, adapter):
                found.setdefault(adapter, {})[name] = Factors(*trained, layer)
    return found


def base_weight(layer: Any) -> Tensor:
    """W (O, I) of an adapted layer's frozen base, dequantised, float32 or wider.

    Raises:
        ValueError: it is quantised in a way that PEFT cannot read.
    """
    base = layer.get_base_layer()
    check_codes(base)
    # PEFT's own LoRA layers for bitsandbytes have no backend, and give their packed bytes.
    weight = dequantize_module_weight(base) if layer.quantization_backend is None else layer.get_base_weight()
    weight = weight.detach().T if isinstance(base, Conv1D) else weight.detach()
    if weight.shape != (layer.out_features, layer.in_features):
        raise ValueError(
            f"The weight of a base layer ({type(base).__name__}) cannot be read: it has shape {tuple(weight.shape)} "
            f"and not {(layer.out_features, layer.in_features)}. Quantise the base with bitsandbytes, or load it in "
            "16 bits."
        )
    return at_least_float32(weight)


def are_those(factors: Mapping[str, Factors], before: Mapping[str, Factors]) -> bool:
    """Whether they are the very parameters that there were before, of which there may have been none."""
    return factors.keys() == before.keys() and all(before[name].A is pair.A for name, pair in factors.items())


def trained_factors(layer: nn.Module, adapter_name: str) -> Trained | None:
    """A and B of an adapter on one layer, and the frozen A's before them; None where it trains none."""
    if isinstance(layer, AdapterLinear):
        return layer.trained(adapter_name) if adapter_name in layer.r else None
    if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
        return None
    downs: Any = layer.lora_A
    ups: Any = layer.lora_B
    A, B = downs[adapter_name].weight, ups[adapter_name].weight
    past = [downs[name].weight for name in layer.active_adapters if name != adapter_name and name in downs]
    return Trained(A, B, tuple(past)) if A.requires_grad or B.requires_grad else None


def _check_linear(layer: nn.Module, adapter: str, name: str, consequence: str) -> None:
    """Refuse a LoRA, or an adapter of ours, that trains where its update is not B·A·x of the layer's own input x.

    Raises:
        ValueError: naming the module, why, and what to leave out.
    """
    if not isinstance(layer, (LoraLayer, ExpertWeights)):
        return
    own = "lora_" if isinstance(layer, LoraLayer) else layer.prefix
    weights = [p for key, p in layer.named_parameters() if key.startswith(own) and adapter in key.split(".")]
    if not any(p.requires_grad for p in weights):
        return
    down = dict(getattr(layer, "lora_A", {}).items()).get(adapter)
    instead = "Use LoraConfig without it"
    if isinstance(layer, (ParamWrapper, ExpertWeights)):
        what = f"is on the parameter {layer.parameter_name!r}, whose input inside of the module cannot be seen"
        instead = "Leave out target_parameters, and modules that keep a fused weight"
    elif isinstance(layer, AdaLoraLayer):
        what, instead = "is of AdaLoRA, which changes singular values and ranks as it trains", "Use LoraConfig"
    elif isinstance(layer, Embedding) or down is None:
        what = "is on an embedding, whose input is a token and no vector that directions could be kept from"
        instead = "Leave embeddings out of target_modules"
    elif isinstance(layer, MultiheadAttention):
        what = "is merged into the attention's weights at each call, whose inputs cannot be seen"
        instead = "Leave nn.MultiheadAttention out of target_modules"
    elif variant := layer.lora_variant.get(adapter):
        what = f"has PEFT's {getattr(variant, '__name__', type(variant).__name__)}, which is more than B·A·x"
    elif not isinstance(down, nn.Linear) or down.in_features != layer.in_features:
        what, instead = f"has an A of type {type(down).__name__}", "Leave the module out of target_modules"
    else:
        return
    raise ValueError(f"Adapter {adapter!r} {what} (module {name!r}): {consequence}. {instead}.")


def _check_biases(config: LoraConfig, name: str) -> None:
    if config.lora_bias:
        raise ValueError(
            f"Adapter {name!r} has lora_bias=True, which adds a bias to every output, for old inputs too. Use "
            "LoraConfig without it."
        )
    if config.bias != "none":
        raise ValueError(f"Adapter {name!r} trains biases (bias={config.bias!r}): use bias='none'.")
