"""What tells one base model from another, whatever it is quantised to. Looks at weights, changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor


# Of the weights in bfloat16, which files of before have alone; and of what float16 leaves of those.
HASHES = ("weights_sha256", "weights_sha256_float16")


def fingerprint(model: Any, vocab_size: int | None = None) -> dict[str, Any]:
    """The type of a base model (transformers), its sizes and hashes of weights.

    The hashes are over 64 rows of the input embeddings and all norms' weights, which stay as they are when a model is
    quantised: in bfloat16, and in float16 after that. A checkpoint in bfloat16 or float16 has the same second hash in
    whatever float dtype it is loaded; the first is another in float16 where bfloat16 has weights below 2⁻¹⁴. One in
    float32 has both the same in bfloat16, neither in float16, which rounds the float32 itself.

    Args:
        vocab_size: how many rows of the embeddings to look at, from the first; None is all. lm-eval cuts the spare
            ones off when it opens an adapter, which makes it no other model.
    """
    config = getattr(model, "config", None)
    table: Any = model.get_input_embeddings()
    while isinstance(table, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        table = table.get_base_layer() if isinstance(table, BaseTunerLayer) else table.original_module
    digests = [hashlib.sha256() for _ in HASHES]

    def add(weight: Tensor) -> None:
        plain = weight.detach().to("cpu", torch.bfloat16).contiguous()
        for digest, values in zip(digests, (plain, plain.half().bfloat16()), strict=True):
            digest.update(values.view(torch.int16).numpy().tobytes())

    with align_module_device(table):  # accelerate may have it elsewhere
        first = table.weight if hasattr(table, "weight") else next(table.parameters())  # pixels: a convolution
        rows = len(first) if vocab_size is None else vocab_size
        add(first[:rows][:: max(1, rows // 64)])
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and "modules_to_save" not in name:
            with align_module_device(module):
                for weight in module.parameters(recurse=False):
                    add(weight)
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "hidden_size": getattr(config, "hidden_size", None),
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
        "vocab_size": rows,
        **{name: digest.hexdigest() for name, digest in zip(HASHES, digests, strict=True)},
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What the fingerprint `there` says otherwise than the one `here`, for an error; [] where both are of one model.

    Either hash of the one may be either of the other: the first of a model in float16 is its second in any dtype.
    """
    differs = [key for key, value in there.items() if key not in HASHES and value != here.get(key)]
    known, found = ({one[name] for name in HASHES if name in one} for one in (there, here))
    if known and known.isdisjoint(found):
        differs.append(HASHES[0])
    return [f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in differs]
