"""Texts that stand for an adapter's prompts where there is no data: what it writes itself.

An adapter that has learnt whole texts writes such, from their start on. One that has learnt answers alone writes what
its base does, or answers at once. Which it is shows at the start of a text, where a base that does not know the task
is surprised and the adapter is not: texts that begin otherwise are left out, and where most do, all are refused.
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
LIKELIER = 1 / 3  # of what a token surprises the base: docs/merging-measured.md has what adapters of both kinds reach
START = 8  # tokens
MOST = 0.5  # of the texts


def own_texts(
    model: PeftModel, tokenizer: Any, folder: str | Path, batch_size: int = 8, seed: int = 0
) -> list[Tensor]:
    """Token ids (S,) int64 of texts that an adapter writes and whose start it has learnt; where most of these come to
    their end, only those that do.

    Args:
        folder: of the adapter, for errors.
        batch_size: texts that are read at a time.

    Raises:
        ValueError: the model writes no text, or mostly such as the adapter has not learnt.
    """
    rows = written(model, tokenizer, TEXTS, LENGTH, seed)
    read = zip(rows, surprises(model, rows, batch_size), strict=True)
    found = [row for row, both in read if learnt(*both) >= START]
    if len(found) < MOST * TEXTS:
        raise ValueError(
            f"What {folder} writes itself is no prompt of its own: of {len(found)} of {TEXTS} texts the first {START} "
            "tokens or more surprise the adapter at least a third less than its base, and half have to be so. It has "
            "learnt answers alone, texts shorter than that, or little: give a few dozen prompts, or merge by a rule "
            "that needs none."
        )
    ends = ends_of(model, text_tokenizer(tokenizer))
    ended = [row for row in found if int(row[-1]) in ends]
    return ended if len(ended) >= MOST * len(found) else found


def learnt(own: Tensor, base: Tensor) -> int:
    """How many tokens from the first on an adapter has learnt: up to where Σ ((1 - `LIKELIER`)·base - own) is largest;
    0 where that is nowhere above 0.

    Args:
        own, base: (S - 1,) nats, -log p of each token of a text but the first under the adapter, and without it.
    """
    ahead = ((1 - LIKELIER) * base - own).cumsum(0)
    return int(ahead.argmax()) + 2 if ahead.max() > 0 else 0


@torch.no_grad()
def written(model: PeftModel, tokenizer: Any, count: int, length: int, seed: int = 0) -> list[Tensor]:
    """Token ids (S,) int64, 2 <= S <= `length`, of `count` texts that a model writes at temperature 1: with the
    token that the tokenizer begins a text by, and the one that ends it where it has come to that. Where the tokenizer
    begins a text by none of its own, nothing has been learnt of the first token: the base writes it, without the
    adapter.

    Raises:
        ValueError: the model writes no text; as `start_of`.
    """
    check_writes(model)
    tokenizer = text_tokenizer(tokenizer)
    start, end = start_of(tokenizer), tokenizer.eos_token_id
    begins = list(tokenizer("a")["input_ids"])[:1] == [start]
    most = min(length, room(model) or length)
    ends, found = ends_of(model, tokenizer), []
    with seeded(seed), eval_mode(model), contiguous_head(model):
        for done in range(0, count, ROWS):
            prompts = [[start]] * min(ROWS, count - done)
            if not begins:
                with trainable_as_before(model), model.disable_adapter():
                    prompts = [row[1:].tolist() for row in continued(model, tokenizer, prompts, 2)]
            for row in continued(model, tokenizer, prompts, most, stop=end is not None):
                ended = len(row) < most and int(row[-1]) not in ends
                found.append(torch.cat([row, torch.tensor([end])]) if ended else row)
    return [text for text in found if len(text) > 1]


@torch.no_grad()
def surprises(model: PeftModel, rows: Sequence[Tensor], batch_size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Of each text (S,), -log p in nats of each token but the first, (S - 1,) float32: under the adapter, and without
    it."""

    def of(some: Sequence[Tensor]) -> list[Tensor]:
        logits = answer_logits(model, some, [len(row) - 1 for row in some])
        return [
            -each.log_softmax(-1).gather(1, row[1:, None].to(each.device))[:, 0].cpu()
            for row, each in zip(some, logits, strict=True)
        ]

    found: list[tuple[Tensor, Tensor]] = []
    with eval_mode(model), contiguous_head(model):
        for begin in range(0, len(rows), batch_size):
            some = rows[begin : begin + batch_size]
            own = of(some)
            with trainable_as_before(model), model.disable_adapter():
                found += zip(own, of(some), strict=True)
    return found
