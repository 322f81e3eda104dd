"""A plain LoRA from an adapter of this package, for tools that know nothing else.

    static ΔW (MORA "dense", LORI):  lora_A = A, lora_B = (alpha / r)·B, at the adapter's own rank; nothing is lost.
    routed (MORA "task", "bank"; FLYLORA; SMORA):  no LoRA equals it. Per module, the rank-k map closest on the inputs:
        min over rank(M) <= k of |Y - X Mᵀ|² + λ|M|²        X (T, I) inputs, Y (T, O) what the adapter adds there
solved in closed form from XᵀX and XᵀY (reduced-rank ridge regression). How close that comes is measured on other
inputs: `lora_errors` module by module, `effect_error` at the logits.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import registry
from .base import AdapterLinear, check_in_memory
from .checks import check_field, is_int, is_number, listed
from .experts import ExpertWeights
from .files import check_new
from .inputs import base_of, eval_mode, parts, real_rows, removed_after, trainable_as_before, visit, writes_text
from .linalg import reduced_rank_regression
from .lora_file import Lora, check_finite, write_lora
from .quantization import dequantized, save_plain


TOKENS = 64  # whose logits are in float32 at a time


def exact_lora(model: nn.Module, adapter_name: str = "default") -> dict[str, Lora]:
    """Each module's ΔW as it is.

    Raises:
        ValueError: the adapter's update is not one ΔW or not finite, or it trains more than linear modules.
    """
    loras = {}
    for name, layer in exportable_layers(model, adapter_name).items():
        if not layer.is_static(adapter_name):
            raise ValueError(
                layer.lora_refusal(adapter_name)
                or f"No LoRA equals adapter {adapter_name!r}: which experts are active depends on the input. fit_lora "
                "gives the closest one on given inputs, and lora_errors says how close that is."
            )
        A, B = layer.factors(adapter_name)
        loras[name] = Lora(A, layer.scaling[adapter_name] * B)
    _check_finite(loras.items(), adapter_name)
    return loras


def fit_lora(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    ridge: float = 1e-4,
    gram_bytes: int = 2**32,
) -> dict[str, Lora]:
    """Each module's closest LoRA on given inputs.

    Args:
        model: a PeftModel, or any model with an injected adapter of this package, and only that adapter active.
        batches: what the model is called with, `attention_mask` included; a list, if one pass is not enough.
        adapter_name: which adapter.
        rank: k. None takes as many as a module has experts: more cannot help, the output has no other directions.
        ridge: damping, as a share of the inputs' mean square, >= 0.
        gram_bytes: memory for XᵀX of the modules that are fitted in one pass, half of it at least, and for solving one
            of them, which takes three more of its size. One module takes what it takes.

    Raises:
        ValueError: as `exportable_layers`, or a wrong rank, a module that sees no input, or numbers that are not
            finite.
    """
    check_field(rank is None or (is_int(rank) and rank >= 1), "rank", rank, "an integer >= 1, or None")
    check_field(is_number(ridge) and ridge >= 0, "ridge", ridge, "a number >= 0")
    loras = {}
    layers = exportable_layers(model, adapter_name)
    _check_finite(((name, layer.factors(adapter_name)) for name, layer in layers.items()), adapter_name)
    sizes = {n: 8 * layer.in_features**2 for n, layer in layers.items()}
    for names in parts(sizes, max(gram_bytes - 3 * max(sizes.values()), gram_bytes // 2)):
        group = {n: layers[n] for n in names}
        # Y lies in the span of B's columns: regressing R coordinates there is the same problem as regressing all O.
        bases = {n: torch.linalg.qr(layer.factors(adapter_name)[1].double()).Q for n, layer in group.items()}
        sums: dict[str, tuple[Tensor, Tensor]] = {}

        def add(name: str, x: Tensor, y: Tensor, bases: Any = bases, sums: Any = sums) -> None:
            x, z = x.double(), y.double() @ bases[name]
            if name not in sums:
                sums[name] = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], z.shape[1])
            xx, xz = sums[name]
            xx.addmm_(x.T, x)
            xz.addmm_(x.T, z)

        _visit(model, group, batches, adapter_name, add)
        for name in list(sums):
            xx, xz = sums.pop(name)
            if not (xx.isfinite().all() and xz.isfinite().all()):
                raise ValueError(
                    f"What goes into module {name!r}, or what the adapter adds there, is not finite (NaN, inf), so "
                    "that no LoRA is near: look at the base's weights and dtype, and at the adapter's."
                )
            if not xx.any():  # nothing but padding, or zeros
                continue
            try:
                A, C = reduced_rank_regression(xx, xz, min(rank or xz.shape[1], xz.shape[1]), ridge)
            except torch.linalg.LinAlgError as error:
                raise ValueError(
                    f"What goes into module {name!r} does not say what the adapter does in all directions ({error}): "
                    f"give a larger `ridge` than {ridge:g}, or more text."
                ) from error
            loras[name] = Lora(A.float(), (bases[name] @ C).float())
    if unseen := [name for name in layers if name not in loras]:
        raise ValueError(
            f"{len(unseen)} of {len(layers)} adapted modules saw no input, or zeros alone, e.g. {unseen[0]!r}, so "
            "that no LoRA can be fitted there: give batches that reach them all (a tower needs images), as a list, "
            "which can be gone through several times."
        )
    _check_finite(loras.items(), adapter_name)
    return loras


def lora_errors(
    model: nn.Module, loras: dict[str, Lora], batches: Iterable[dict[str, Tensor]], adapter_name: str = "default"
) -> dict[str, float]:
    """How far each module's LoRA is from the adapter there on given inputs: |Y - X·Aᵀ·Bᵀ| / |Y| over all tokens.

    A few tokens with outputs a hundred times the others' decide these; `effect_error` is what reaches the output.

    Raises:
        ValueError: as `exportable_layers` and `check_alike`, or outputs that are not finite.
    """
    layers = exportable_layers(model, adapter_name)
    check_alike(layers, loras)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in loras}

    def add(name: str, x: Tensor, y: Tensor) -> None:
        error = y - x @ loras[name].A.T @ loras[name].B.T
        sums[name] += torch.stack([error.square().sum(), y.square().sum()]).double().cpu()

    _visit(model, layers, batches, adapter_name, add)
    if wrong := next((name for name, both in sums.items() if not both.isfinite().all()), None):
        raise ValueError(
            f"What the adapter or the LoRA adds in module {wrong!r} is not finite (NaN, inf) on these inputs, so that "
            "there is no error: look at the base's weights and dtype, and at the adapter's."
        )
    return {name: _share(*both.tolist()) ** 0.5 for name, both in sums.items()}


class Effect(NamedTuple):
    """`error`: |LoRA's logits - adapter's| / |base's logits - adapter's|; 1 is no better than no adapter at all.
    `same_token`, `same_token_base`: share of tokens (0..1) after which LoRA, or base, would write what the adapter
    would."""

    error: float
    same_token: float
    same_token_base: float


@torch.no_grad()
def effect_error(
    model: Any, loras: dict[str, Lora], batches: Iterable[dict[str, Tensor]], adapter_name: str = "default"
) -> Effect:
    """How much of the adapter's effect on the model's logits the LoRAs miss, over all tokens of given inputs.

    Logits count less their mean over the vocabulary, which no probability depends on. Those of one batch by two models
    are in memory at a time, in the model's dtype.

    Raises:
        ValueError: as `exportable_layers` and `check_alike`, a model that writes no text, no token, or logits that are
            not finite.
    """
    layers = exportable_layers(model, adapter_name)
    _check_linear(layers)
    check_alike(layers, loras)
    if not writes_text(base := base_of(model)):
        raise ValueError(
            f"How close a LoRA comes is measured by next tokens, and {type(base).__name__} gives none: compare its "
            "outputs yourself."
        )
    missed, effect = torch.zeros(2, 2, dtype=torch.float64)
    count = 0

    def logits(batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).logits.flatten(0, 1)

    def add_lora(lora: Lora) -> Callable[[Any, Any, Tensor], Tensor]:
        return lambda layer, args, y: y + (args[0].float() @ lora.A.T @ lora.B.T).to(y.dtype)

    with eval_mode(model):
        for batch in batches:
            adapter, mask = logits(batch), batch.get("attention_mask")
            real = torch.arange(len(adapter)) if mask is None else mask.flatten().nonzero().squeeze(1)
            with trainable_as_before(model), model.disable_adapter():
                effect += _compared(logits(batch), adapter, real)
                hooks = [layer.register_forward_hook(add_lora(loras[name])) for name, layer in layers.items()]
                with removed_after(hooks):
                    missed += _compared(logits(batch), adapter, real)
            count += len(real)
    if not count:
        raise ValueError("The batches have no token to measure the LoRA's error on.")
    if not (missed.isfinite().all() and effect.isfinite().all()):
        whose = "the LoRA" if effect.isfinite().all() else "the adapter, or the base alone,"
        raise ValueError(
            f"The logits of the model with {whose} are not finite (NaN, inf), so that no error can be measured: look "
            "at the base's weights and dtype, and at the adapter's."
        )
    (error, same_lora), (size, same_base) = missed.tolist(), effect.tolist()
    return Effect(_share(error, size) ** 0.5, same_lora / count, same_base / count)


def _share(error: float, size: float) -> float:
    """error / size; of nothing, nothing is no error and anything infinitely much."""
    return error / size if size else math.inf if error else 0.0


def _compared(logits: Tensor, others: Tensor, tokens: Tensor) -> Tensor:
    """|logits - others|² of some rows of (T, V), each less its mean, and how many have the same likeliest token."""
    found = torch.zeros(2, dtype=torch.float64)
    for some in tokens.split(TOKENS):
        x, y = logits[some].float(), others[some].float()
        same = (x.argmax(-1) == y.argmax(-1)).sum()
        x -= y
        x -= x.mean(-1, keepdim=True)
        found += torch.stack([x.square().sum(), same]).double().cpu()
    return found


def save_lora(
    model: Any,
    loras: dict[str, Lora],
    folder: str | Path,
    adapter_name: str = "default",
    *,
    base: str | Path | None = None,
) -> LoraConfig:
    """Write LoRAs as PEFT writes a LoRA, at one rank and lora_alpha = r (see `write_lora`).

    Args:
        base: the model that it says it is for, a folder or a name; None: the one that the adapter names.

    Raises:
        ValueError: the LoRAs are not those of the adapter's modules, each one. FileExistsError: the folder exists.
    """
    source = model.peft_config[adapter_name]
    layers = exportable_layers(model, adapter_name)
    check_alike(layers, loras)
    parameters = {name: layer for name, layer in layers.items() if isinstance(layer, ExpertWeights)}
    paths = {id(module): path.removeprefix("base_model.model.") for path, module in model.named_modules()}
    keys = {name: paths[id(layer)] for name, layer in parameters.items()}
    return write_lora(
        folder,
        {keys.get(name, name): lora for name, lora in loras.items()},
        experts={keys[name]: layer.experts for name, layer in parameters.items()},
        target_modules=_short_names(model, loras.keys() - keys.keys()),
        target_parameters=sorted(keys) or None,
        fan_in_fan_out=all(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        base_model_name_or_path=source.base_model_name_or_path if base is None else str(base),
        revision=source.revision if base is None else None,
        task_type=source.task_type,
    )


def save_base(
    model: Any, output: str | Path, adapter: str | Path | None = None, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the weights that a quantised base computes with, in 16 bits: what servers of LoRA files are to load for an
    adapter that was trained over it. The model that was quantised has other weights, and gives other answers.

    Args:
        model: the base without an adapter, quantised as in training; it is dequantised here.
        output: folder of the model, with the adapter's tokenizer, or the base's.
        adapter: folder of the adapter, for its tokenizer.

    Raises:
        ValueError: the model is not quantised. FileExistsError: `output` exists.
    """
    check_copy(model, output)
    save_plain(dequantized(model, dtype), output, model.config.name_or_path, adapter)


def check_copy(model: Any, output: str | Path) -> None:
    """Refuse a copy of a base, before the model is changed.

    Raises:
        ValueError: the model is not quantised. FileExistsError: `output` exists.
    """
    if getattr(model, "hf_quantizer", None) is None:
        name = model.config.name_or_path
        raise ValueError(f"{name} is not quantised, so a server loads it as it is: leave out the copy of the base.")
    check_new(output)


def save_with_base(
    model: Any, loras: dict[str, Lora], folder: str | Path, base_folder: str | Path, adapter: str | Path
) -> LoraConfig:
    """`save_lora` and `save_base`, both or neither: the LoRA says that it is for the base that is written beside it.

    Args:
        model: the PeftModel, of which the base is taken off and dequantised. adapter: its folder, for its tokenizer.

    Raises:
        ValueError: the LoRA would be in the base's folder, or the base is not quantised.
        FileExistsError: one of the folders exists.
    """
    check_apart(folder, base_folder)
    check_copy(base_of(model), base_folder)
    base = Path(base_folder).resolve()
    config = save_lora(model, loras, folder, base=base)
    try:
        save_base(model.unload(), base, adapter)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return config


def check_alike(layers: Mapping[str, Any], loras: Mapping[str, Any]) -> None:
    """Refuse LoRAs that are not those of an adapter's modules, each one.

    Raises:
        ValueError: naming a module.
    """
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    if differs := dict(sizes.items() ^ {(name, (A.shape[1], len(B))) for name, (A, B) in loras.items()}):
        raise ValueError(
            f"The adapter has {len(layers)} modules, and there are {len(loras)} LoRAs, not alike in {min(differs)!r}: "
            "what it does there would be lost. Give those of exact_lora or fit_lora as they are."
        )


def check_apart(folder: str | Path, base_folder: str | Path) -> None:
    """Refuse a LoRA's folder that is its base's, or is in it: a folder is written as a whole.

    Raises:
        ValueError: it is.
    """
    if Path(folder).resolve().is_relative_to(Path(base_folder).resolve()):
        raise ValueError(f"The LoRA, {folder}, would be in its base's folder, {base_folder}: give a folder for each.")


def check_linear_alone(config: Mapping[str, Any], what: str) -> None:
    """Refuse an adapter's config that has more than updates of modules.

    Raises:
        ValueError: naming the field.
    """
    for field in ("modules_to_save", "trainable_token_indices"):
        if config.get(field):
            raise ValueError(
                f"{what} has {field}={config[field]!r}, and a plain LoRA file has no place for that which all its "
                "readers know. Train without it to export."
            )


def exportable_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, AdapterLinear]:
    """The adapted layers, by their names in the base model.

    Raises:
        ValueError: there is none, another adapter is active beside this one or instead of it, the adapter trains more
            than linear modules, or one whose weight is the embeddings' too.
    """
    layers = [m for m in model.modules() if isinstance(m, AdapterLinear) and adapter_name in m.r]
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if not layers or config is None:
        methods = listed(name.upper() for name in registry.registered)
        raise ValueError(f"The model has no {methods} adapter named {adapter_name!r}.")
    check_linear_alone(vars(config), f"Adapter {adapter_name!r}")
    if any(layer.active_adapters != [adapter_name] or layer.disable_adapters or layer.merged for layer in layers):
        raise ValueError(
            f"Adapter {adapter_name!r} is to be exported as it works alone: call model.set_adapter({adapter_name!r}) "
            "first, unmerged and enabled."
        )
    by_name = {layer.module_names[adapter_name]: layer for layer in layers}
    check_in_memory(by_name, adapter_name)
    get_embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)
    shared = getattr(get_embeddings(), "weight", None)
    tied = [n for n, layer in by_name.items() if shared is getattr(layer.get_base_layer(), "weight", layer)]
    if tied:
        raise ValueError(
            f"Adapter {adapter_name!r} adapts {tied[0]!r}, whose weight is the embeddings' too, and no server of LoRA "
            "files opens that. Train without it in `target_modules`; or, if it merges, serve the merged model "
            "(merge_and_unload gives the module a weight of its own)."
        )
    return by_name


def _check_finite(loras: Iterable[tuple[str, tuple[Tensor, Tensor]]], adapter_name: str) -> None:
    for name, factors in loras:
        whose, instead = f"Adapter {adapter_name!r}", "take a checkpoint from before, or train it again"
        check_finite(name, factors, whose, instead)


def _visit(
    model: nn.Module,
    layers: dict[str, AdapterLinear],
    batches: Iterable[dict[str, Tensor]],
    adapter_name: str,
    look: Callable[[str, Tensor, Tensor], None],
) -> None:
    """look(name, x (T, I), y (T, O)) for each layer and batch: its inputs without padding, what it adds; float32."""
    _check_linear(layers)

    def see(name: str, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        x, layer = real_rows(x, mask, name).float(), layers[name]
        look(name, x, layer._add(x.new_zeros(len(x), layer.out_features), adapter_name, x))

    visit(model, layers, batches, see)


def _check_linear(layers: dict[str, AdapterLinear]) -> None:
    if experts := [name for name, layer in layers.items() if isinstance(layer, ExpertWeights)]:
        raise ValueError(
            f"What reaches the experts of {experts[0]!r} is seen inside of their module alone, so nothing can be "
            "measured or fitted there. exact_lora and save_lora need neither."
        )


def _short_names(model: nn.Module, names: set[str]) -> list[str]:
    """Endings such as "q_proj" where they stand for exactly the given modules, else the full names."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    everywhere = {name.removeprefix("base_model.model.") for name, _ in model.named_modules()}
    meant = {n for n in everywhere if n.rsplit(".", 1)[-1] in endings}
    return endings if meant == names else sorted(names)
