"""Base layers: whose insides are known, and keeping bitsandbytes' 4-bit ones on the kernels that training uses.

On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a `Linear4bit` at its first forward in eval mode. The packed weight
has no correct backward: gradients through it are wrong by 44-99 % without an error, merges read garbage, and scores
differ by 2 % from the training path. Clearing one flag on the layer keeps it unpacked.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext
from transformers import BitsAndBytesConfig

from .files import whole_folder
from .inputs import load_tokenizer
from .lean import Base, compute_dtype


def use_exact_4bit_kernels(model: nn.Module) -> int:
    """Make every bitsandbytes `Linear4bit` in `model` compute the same thing in training and in evaluation.

    Every adapter of this package does this when it is added to a model. Call it yourself on a bare 4-bit model
    that you evaluate before the adapter exists.

    A layer that has already been repacked is unpacked. Its 4-bit codes come back exactly; bitsandbytes rounded the
    block scales to bfloat16 when it packed them and that cannot be undone, so a warning says to reload the base where
    bit-exactness matters.

    Args:
        model: any module tree.

    Returns:
        How many `Linear4bit` layers the model has. 0 where bitsandbytes is not in use.
    """
    if "bitsandbytes" not in sys.modules:  # then no layer can be one of its classes
        return 0
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    unpacked = sum(_unpack(layer) for layer in layers)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    if unpacked:
        warnings.warn(
            f"{unpacked} 4-bit layers had been repacked by an evaluation on this CPU before the adapter was added. "
            "They are unpacked again, with block scales that bitsandbytes has rounded to bfloat16 (relative error up "
            "to 0.4 %). Where that matters, reload the base model and call peft_mora.use_exact_4bit_kernels(model) "
            "before the first evaluation.",
            stacklevel=2,
        )
    return len(layers)


def nf4_config() -> BitsAndBytesConfig:
    """NF4 with double quantisation and bf16 compute: the 4-bit base of every program here."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def dequantized(model: Any, dtype: torch.dtype) -> Any:
    """The same model with plain weights: those of quantised layers as they compute with them, in `dtype`; one that is
    not quantised is left as it is.

    Args:
        model: of transformers. dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: as `check_codes`.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return model
    check_codes(model)
    model = model.dequantize(dtype)
    for parameter in model.parameters():  # what was not quantised has its file's dtype, whatever was asked for
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.to(dtype)
    return model


def check_codes(model: nn.Module) -> None:
    """Refuse 8-bit layers of bitsandbytes that keep their weight itself and quantise it at each forward: PEFT and
    transformers take it for codes.

    Raises:
        ValueError: naming the argument that makes such layers.
    """
    for layer in model.modules():
        weight: Any = getattr(layer, "weight", None)
        if type(weight).__name__ == "Int8Params" and weight.is_floating_point():
            raise ValueError(
                f"An 8-bit layer keeps its weight in {str(weight.dtype).removeprefix('torch.')} and quantises it at "
                "each forward (llm_int8_has_fp16_weight=True). PEFT and transformers read it as codes, and what comes "
                "out would be another model. Load the base without that, or in 16 bits."
            )


def save_plain(
    model: Any, output: str | Path, base: str | Path, adapter: str | Path | None = None, **revision: str
) -> None:
    """Write a model that is not quantised, or no longer, for `from_pretrained`; whole or not at all. Beside it goes
    the tokenizer of the adapter's folder where it has one, else that of the base (at its revision), if that has one.

    Raises:
        FileExistsError: `output` exists.
    """
    # transformers 5 would write the keys of the checkpoint that it loaded, and refuses where that was quantised.
    known = inspect.signature(model.save_pretrained).parameters
    options: dict[str, Any] = {"save_original_format": False} if "save_original_format" in known else {}
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    with whole_folder(output) as folder:
        model.save_pretrained(folder, **options)
        try:
            tokenizer = load_tokenizer(adapter if own else base, **({} if own else revision))
        except (OSError, ValueError):  # a base without a tokenizer is one without
            if own:
                raise
        else:
            tokenizer.save_pretrained(folder)


class FourBit(NamedTuple):
    """The weight (O, I) of a bitsandbytes `Linear4bit`; a `Form` of lean.py that holds its values itself."""

    weight: Tensor
    state: Any  # its QuantState

    def matrix(self, values: None, dtype: torch.dtype) -> Tensor:
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(self.weight.view(-1, 1), self.state).to(dtype)

    def pack(self, grad: Tensor) -> Tensor:
        raise NotImplementedError("a 4-bit weight is not trained")


def _unpack(layer: Any) -> bool:
    """Undo the CPU packing of one `Linear4bit` in place; say whether there was anything to undo."""
    state: Any = getattr(layer.weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return False
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    # The inverse would quantise the already rounded scales a second time: keep them as they are instead.
    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False
    layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    state.absmax = scales
    layer.weight.quant_state = layer.quant_state = state
    return True


def is_bare(layer: nn.Module) -> bool:
    """Whether a base layer is one of two classes whose insides are known, and nobody sees its output: no hook on it,
    no forward put in its place, the class's own and `F.linear` not wrapped, no mode that follows torch's functions.
    Then the output may be written into, and its gradient is g W. Others pay for one more tensor (T, O)."""
    kind, own = type(layer), layer.__dict__
    return (
        (kind is nn.Linear or (kind.__name__ == "Linear4bit" and kind.__module__ == "bitsandbytes.nn.modules"))
        and "forward" not in own
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (own["_backward_hooks"] or own["_backward_pre_hooks"])
        and not _has_any_global_hook()
        # The module that a function was written in; functools.wraps copies all but that.
        and kind.forward.__globals__["__name__"] == kind.__module__
        and kind.__call__.__globals__ is _has_any_global_hook.__globals__
        and F.linear is torch._C._nn.linear
        and not _follows_functions()
    )


def _follows_functions() -> bool:
    """Whether a function mode is on that is not torch's own default device."""
    modes = torch._C._len_torch_function_stack()
    return modes > 0 and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(modes))


def frozen_base(layer: Any, x: Tensor) -> Base | None:
    """The weight of a bare base layer that computes in the dtype of x and is not trained."""
    # Not `layer.weight`, which takes 0.5 µs. In a replica of nn.DataParallel they are no parameters.
    held = layer._parameters if "weight" in layer._parameters else layer.__dict__
    weight, bias = held["weight"], held.get("bias")
    if bias is not None and bias.requires_grad:
        return None
    if type(layer) is nn.Linear:
        plain = type(weight) in (nn.Parameter, Tensor)  # torchao's quantised weights are classes of their own
        return Base(weight) if plain and not weight.requires_grad and weight.dtype == compute_dtype(x) else None
    state = getattr(weight, "quant_state", None)  # attributes of tensors proper take 5 µs each on bitsandbytes' class
    return Base(None, FourBit(weight, state)) if state and layer.compute_dtype == x.dtype == compute_dtype(x) else None
