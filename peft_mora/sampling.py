"""Text that a model writes itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .inputs import base_of, device_of, generating_by, left_padded, placeholders, writes_text


ROWS = 64  # texts at a time


def check_writes(model: Any) -> None:
    """Refuse a model that writes no text, where it is asked for some of its own.

    Raises:
        ValueError: naming the model's class.
    """
    base = base_of(model)
    if not writes_text(base):
        raise ValueError(
            f"'self' is text that a causal language model samples itself, and {type(base).__name__} writes none. Give "
            "texts in its place."
        )


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text for the tokenizer or the model, which may have several."""
    of_model = getattr(base_of(model).generation_config, "eos_token_id", None)
    known = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
    return sorted({end for end in known if end is not None})


def start_of(tokenizer: Any) -> int:
    """The token that a text is written behind.

    Raises:
        ValueError: the tokenizer has none that begins or ends one.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            "'self' is text that the model writes itself, and the tokenizer has no token that begins or ends one: "
            "give texts in its place."
        )
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def continued(model: Any, tokenizer: Any, prompts: list[list[int]], length: int, stop: bool = False) -> list[Tensor]:
    """Each prompt with what the model samples behind it at temperature 1: (S,) int64, S = `length`; with `stop`, to
    the end of its text, S <= `length`, without the tokenizer's token that ends it (another one of the model's stays).
    """
    device = device_of(model)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    batch = left_padded([torch.tensor(row) for row in prompts], end)
    ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
    new, ends = length - min(map(len, prompts)), ends_of(model, tokenizer)
    base = base_of(model)
    plain = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=end, max_new_tokens=new,
        min_new_tokens=None if stop else new, suppress_tokens=placeholders(base) or None,
        eos_token_id=base.generation_config.eos_token_id, use_cache=True,
    )  # fmt: skip
    with generating_by(model, plain):
        out = model.generate(input_ids=ids, attention_mask=mask)
    rows = []
    for row, prompt in zip(out.tolist(), prompts, strict=True):
        added = row[ids.shape[1] :]
        over = next((i for i, token in enumerate(added) if token in ends), None) if stop else None
        if over is not None:
            added = added[: over + (added[over] != tokenizer.eos_token_id)]
        rows.append(torch.tensor((prompt + added)[:length]))
    return rows
