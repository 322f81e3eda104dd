"""What tells one base model from another, whatever it is quantised to. Looks at weights, changes nothing."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper


def fingerprint(model: Any, vocab_size: int | None = None) -> dict[str, Any]:
    """The type of a base model (transformers), its sizes and a hash of weights.

    The hash is over 64 rows of the input embeddings and all norms' weights, in bfloat16: those stay as they are when
    a model is quantised or loaded in another float dtype.

    Args:
        vocab_size: how many rows of the embeddings to look at, from the first; None is all. lm-eval cuts the spare
            ones off when it opens an adapter, which makes it no other model.
    """
    config = getattr(model, "config", None)
    table: Any = model.get_input_embeddings()
    while isinstance(table, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        table = table.get_base_layer() if isinstance(table, BaseTunerLayer) else table.original_module
    table = table.weight if hasattr(table, "weight") else next(table.parameters())  # pixels go through a convolution
    rows = len(table) if vocab_size is None else vocab_size
    weights = [table[:rows][:: max(1, rows // 64)]]
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and "modules_to_save" not in name:
            weights += list(module.parameters(recurse=False))
    digest = hashlib.sha256()
    for weight in weights:
        plain = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(plain.view(torch.int16).numpy().tobytes())
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "hidden_size": getattr(config, "hidden_size", None),
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
        "vocab_size": rows,
        "weights_sha256": digest.hexdigest(),
    }
