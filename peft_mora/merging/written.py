"""Texts that stand for an adapter's prompts where there is no data: what it writes itself.

An adapter that has learnt whole texts writes such, from their start on; one that has learnt answers alone writes what
its base does, more or less. Which it is shows in how much likelier the texts are under the adapter than without it:
those that are not are left out, and where most are, all are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..inputs import contiguous_head, eval_mode, room, seeded, text_tokenizer, trainable_as_before
from ..sampling import ROWS, check_writes, continued, ends_of, start_of
from .distillation import answer_logits


TEXTS = 128
LENGTH = 256  # tokens of one, at most
LIKELIER = 0.5  # nats a token: docs/merging-measured.md has what adapters of both kinds reach
SHARE = 0.25  # of all tokens that are written


def own_texts(
    model: PeftModel, tokenizer: Any, folder: str | Path, batch_size: int = 8, seed: int = 0
) -> list[Tensor]:
    """Token ids (S,) int64 of texts that an adapter writes and has learnt.

    Args:
        folder: of the adapter, for errors.
        batch_size: texts that are read at a time.

    Raises:
        ValueError: the model writes no text, or hardly any that the adapter has made likelier.
    """
    rows = written(model, tokenizer, TEXTS, LENGTH, seed)
    gains = likelier(model, rows, batch_size)
    found = [row for row, gain in zip(rows, gains, strict=True) if gain >= LIKELIER]
    share = sum(map(len, found)) / sum(map(len, rows))
    if share < SHARE:
        raise ValueError(
            f"What {folder} writes itself is no prompt of its own: {share:.0%} of it is in texts that are "
            f"{LIKELIER} nats a token likelier than without it, and {SHARE:.0%} have to be. It has learnt answers "
            "alone, or little: give a few dozen prompts, or merge by a rule that needs none."
        )
    return found


@torch.no_grad()
def written(model: PeftModel, tokenizer: Any, count: int, length: int, seed: int = 0) -> list[Tensor]:
    """Token ids (S,) int64, 2 <= S <= `length`, of `count` texts that a model writes at temperature 1: as its
    tokenizer gives them, and with the token that ends one where it has come to that. Shorter ones are left out.

    Raises:
        ValueError: the model writes no text, or none of two tokens; as `start_of`.
    """
    check_writes(model)
    tokenizer = text_tokenizer(tokenizer)
    start, end = start_of(tokenizer), tokenizer.eos_token_id
    begins = list(tokenizer("a")["input_ids"])[:1] == [start]
    most = min(length, room(model) or length) + (not begins)
    ends, found = ends_of(model, tokenizer), []
    with seeded(seed), eval_mode(model), contiguous_head(model):
        for done in range(0, count, ROWS):
            prompts = [[start]] * min(ROWS, count - done)
            for row in continued(model, tokenizer, prompts, most, stop=end is not None):
                ended = len(row) < most and int(row[-1]) not in ends
                text = torch.cat([row, torch.tensor([end])]) if ended else row
                found.append(text if begins else text[1:])
    found = [text for text in found if len(text) > 1]
    if not found:
        raise ValueError(f"The adapter writes no text itself: all of {count} end at once. Give prompts.")
    return found


@torch.no_grad()
def likelier(model: PeftModel, rows: Sequence[Tensor], batch_size: int = 8) -> list[float]:
    """Of each text, log p - log p_0 in nats, mean over its tokens but the first: under the adapter, and without it."""

    def log_likelihoods(some: Sequence[Tensor]) -> list[float]:
        logits = answer_logits(model, some, [len(row) - 1 for row in some])
        return [
            float(each.log_softmax(-1).gather(1, row[1:, None].to(each.device)).mean())
            for row, each in zip(some, logits, strict=True)
        ]

    found = []
    with eval_mode(model), contiguous_head(model):
        for begin in range(0, len(rows), batch_size):
            some = rows[begin : begin + batch_size]
            own = log_likelihoods(some)
            with trainable_as_before(model), model.disable_adapter():
                found += [x - y for x, y in zip(own, log_likelihoods(some), strict=True)]
    return found
