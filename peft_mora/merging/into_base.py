"""An adapter into its base model's weights, in 16 or 32 bits: W + ΔW, added in float32 and rounded.

A quantised base is dequantised first and stays so. Quantised again, each weight would move by about half a step of its
code, and ΔW is smaller than a step: `requantize=True` measures ‖requant(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..checks import check_field
from ..files import check_new
from ..lora_file import PREFIX, Lora, read_lora
from ..quantization import dequantized, save_plain
from .report import bar


NF4 = {"quant_type": "nf4", "compress_statistics": True}


@dataclass(frozen=True)
class IntoBase:
    """What `merge_into_base` did.

    Args:
        folder: what was written. dtype: of its weights. dequantized: whether the base was quantised.
        loss: module -> ‖requant(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖, if it was asked for; infinity where ΔW is 0.
        total: the same over all modules.
    """

    folder: Path
    dtype: torch.dtype
    dequantized: bool
    modules: int
    loss: dict[str, float] = field(default_factory=dict)
    total: float | None = None

    def __str__(self) -> str:
        where = " into the dequantised base" if self.dequantized else ""
        lines = [f"{self.modules} modules merged in {self.dtype}{where}: {self.folder}"]
        if self.total is not None:
            worst = sorted(self.loss, key=lambda name: -self.loss[name])[:3]
            shown = ", ".join(f"{name} {self.loss[name]:.2f}" for name in worst)
            lines.append(f"quantised to 4 bits again it would be off by {self.total:.2f} of ‖ΔW‖ (most: {shown})")
        return "\n".join(lines)


def merge_into_base(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    requantize: bool = False,
    device: str = "cpu",
    progress: bool | None = None,
) -> IntoBase:
    """Write a model with an adapter in its weights, for `AutoModelForCausalLM.from_pretrained`. Never a quantised one.

    Args:
        adapter: folder of a LoRA, LORI, FURINA or MORA "dense", or of what `merge_adapters` wrote.
        output: folder of the model and its tokenizer; whole or not at all.
        base: folder or name of the model, in 16 bits or quantised; None is the one that the adapter names. Give the
            16-bit model where the adapter was trained on its 4-bit copy and you have it: it has not lost what the
            copy has.
        dtype: of the weights: float32, bfloat16 or float16; a base of a wider one is rounded to it before ΔW is added,
            so that float32 keeps more of a float32 base.
        requantize: measure what quantising the result again would lose, in bitsandbytes' 4 bits as the base has them,
            or else in NF4 with double quantisation (also for a base in 8 bits).
        device: where to compute.
        progress: show a bar; None: in a terminal.

    Raises:
        ValueError: an adapter that is not one ΔW a module, that is for another task, or not of this base.
        FileExistsError: `output` exists.
    """
    check_field(
        dtype in (torch.float32, torch.bfloat16, torch.float16), "dtype", dtype, "a torch dtype of 16 or 32 bits"
    )
    if not isinstance(base, str | Path | None):
        raise ValueError(f"`base` must be the folder or the name of a model, got a {type(base).__name__}.")
    file = read_lora(adapter)
    kind = file.config.get("task_type") or (file.config.get("auto_mapping") or {}).get("base_model_class")
    if kind not in (None, "CAUSAL_LM") and not str(kind).endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"{adapter} is for {kind}: this writes causal language models.")
    name = base or file.config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{adapter} does not say which model it is for: give it as `base`.")
    check_new(output)  # before the model is loaded
    revision = {"revision": file.config["revision"]} if not base and file.config.get("revision") else {}
    found: Any = AutoModelForCausalLM.from_pretrained(
        str(name), dtype=dtype, device_map=device, output_loading_info=True, **revision
    )
    model, missing = found[0], sorted(found[1]["missing_keys"])
    if missing:
        raise ValueError(f"{name} has no {missing[0]!r}: it is no causal language model, which this writes.")
    if not_here := [key for key, weight in model.named_parameters() if weight.is_meta]:
        raise ValueError(
            f"{device=} leaves {len(not_here)} weights of {name} out of memory ({not_here[0]!r}, …), where nothing "
            'can be added to them: give a device that has room for all of it, as "cpu".'
        )
    settings = _four_bit_settings(model)
    quantized = getattr(model, "hf_quantizer", None) is not None
    coded = _coded(model) if requantize else set()
    model = dequantized(model, dtype)
    losses: dict[str, float] = {}
    off = whole = 0.0
    for module in bar(file.loras, "into the base", progress):
        merged, delta = _add(model, module, file.loras[module], name)
        if module in coded:
            rows = merged.T if isinstance(model.get_submodule(module), Conv1D) else merged  # as bitsandbytes has it
            lost, size = float((_requantized(rows, settings) - rows.float()).norm()), float(delta.norm())
            losses[module] = lost / size if size else float("inf")
            off, whole = off + lost**2, whole + size**2
    for key, tensor in file.saved.items():
        module, _, kind = key.removeprefix(PREFIX).rpartition(".")
        own = _own(model, module, kind, name)
        if own.shape != tensor.shape:
            raise ValueError(
                f"{key.removeprefix(PREFIX)!r} is {_size(own)} in {name}, and {_size(tensor)} in the adapter, which "
                "was trained on another vocabulary or is of another model: save the base as it was trained "
                "(resize_token_embeddings) and give that folder as `base`."
            )
        own.copy_(tensor)
    save_plain(model, output, name, file.folder, **revision)
    total = (off / whole) ** 0.5 if whole else None
    return IntoBase(Path(output), dtype, quantized, len(file.loras), losses, total)


@torch.no_grad()
def _add(model: Any, module: str, lora: Lora, base: Any) -> tuple[Tensor, Tensor]:
    """Add ΔW to a weight in place, in float32; (the weight, (O, I) or as a Conv1D has it, and ΔW float32)."""
    weight = _own(model, module, "weight", base)
    delta = lora.B.to(weight.device, torch.float32) @ lora.A.to(weight.device, torch.float32)
    if isinstance(model.get_submodule(module), Conv1D):
        delta = delta.T
    if delta.shape != weight.shape:
        raise ValueError(
            f"Module {module!r} is {_size(weight)} in {base}, and its update {_size(delta)}: the adapter is of "
            "another model."
        )
    weight.copy_(weight.float() + delta)
    if not weight.isfinite().all():
        narrow = weight.dtype == torch.float16
        raise ValueError(
            f"Module {module!r} of {base} with its update has values that are not finite in {weight.dtype}: "
            + ("give dtype=torch.bfloat16 or torch.float32." if narrow else "the base or the adapter is damaged.")
        )
    return weight, delta


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _own(model: Any, module: str, name: str, base: Any) -> Tensor:
    """A module's parameter, with memory of its own: an output head and the embeddings are untied where they are tied,
    as what comes is of one of them alone.

    Raises:
        ValueError: the model has none of that name.
    """
    try:
        owner = model.get_submodule(module)
        weight = getattr(owner, name)
    except AttributeError as error:
        raise ValueError(f"{base} has no {module}.{name}: the adapter is of another model.") from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if all(end is not None and weight is end.weight for end in ends):
        weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        setattr(owner, name, weight)
        model.config.tie_word_embeddings = False
    return weight.requires_grad_(False)


def _coded(model: Any) -> set[str]:
    """The linear layers whose weights the model's quantisation packs; of a model in 16 bits those that NF4 would, all
    but the output head."""
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    packed = {name for name, weight in weights.items() if type(weight).__name__ in ("Params4bit", "Int8Params")}
    head = model.get_output_embeddings()
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    return packed or {name for name, module in linear if module is not head}


def _four_bit_settings(model: Any) -> dict[str, Any]:
    """How bitsandbytes has quantised the model; NF4 where it has not."""
    config: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if not getattr(config, "load_in_4bit", False):
        return dict(NF4)
    return {"quant_type": config.bnb_4bit_quant_type, "compress_statistics": config.bnb_4bit_use_double_quant}


def _requantized(weight: Tensor, settings: dict[str, Any]) -> Tensor:
    """float32, through bitsandbytes' 4 bits and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.contiguous(), **settings)
    return dequantize_4bit(codes, state).float()
