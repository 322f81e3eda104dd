"""Text that a model writes itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .inputs import (
    base_of,
    contiguous_head,
    device_of,
    eval_mode,
    generating_by,
    left_padded,
    placeholders,
    room,
    seeded,
    text_tokenizer,
    writes_text,
)


ROWS = 64  # texts at a time
TEXTS = 256
LENGTH = 256  # tokens of one, at most


@torch.no_grad()
def own_texts(model: Any, tokenizer: Any, count: int = TEXTS, length: int = LENGTH, seed: int = 0) -> list[Tensor]:
    """Token ids (S,) int64, 2 <= S <= `length`, of `count` texts that a model writes at temperature 1: as its
    tokenizer gives them, and with the token that ends one where it has come to that. Shorter ones are left out.

    Raises:
        ValueError: the model writes no text, or none of two tokens; as `start_of`.
    """
    base = base_of(model)
    if not writes_text(base):
        raise ValueError(
            f"'self' is text that a causal language model writes itself, and {type(base).__name__} writes none. Give "
            "texts in its place."
        )
    tokenizer = text_tokenizer(tokenizer)
    start, end = start_of(tokenizer), tokenizer.eos_token_id
    begins = list(tokenizer("a")["input_ids"])[:1] == [start]
    most = min(length, room(base) or length) + (not begins)
    found = []
    with seeded(seed), eval_mode(model), contiguous_head(model):
        for done in range(0, count, ROWS):
            prompts = [[start]] * min(ROWS, count - done)
            for row in continued(model, tokenizer, prompts, most, stop=True):
                ended = len(row) < most and end is not None
                text = torch.cat([row, torch.tensor([end])]) if ended else row
                found.append(text if begins else text[1:])
    found = [text for text in found if len(text) > 1]
    if not found:
        raise ValueError(
            f"The adapter writes no text of its own, all of {count} end at once. Give texts in their place."
        )
    return found


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
    the end of its text, S <= `length`, and without the token that ends it."""
    device = device_of(model)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    batch = left_padded([torch.tensor(row) for row in prompts], end)
    ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
    new = length - min(map(len, prompts))
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
        added = added[: added.index(end)] if stop and end in added else added
        rows.append(torch.tensor((prompt + added)[:length]))
    return rows
