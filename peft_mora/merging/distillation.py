"""The merged adapter, taught to answer as each adapter answers its own prompts: each is a teacher, no label is needed.

    loss = Σ_t w_t (KL(p_t ‖ p) + mean_l ‖h_l - h_tl‖² / m_l) / Σ_t w_t,   m_l = mean_t E‖h_tl - h_0l‖²

over the tokens of adapter t's own greedy answer to a prompt of its own. p_t and p are the next token's probabilities
under adapter t and under the merged one; h_tl, h_l and h_0l what block l puts out there under adapter t, the merged
one and none; E is over adapter t's answers, and m_l one for all, so that one that changes little does not count most.
Distillation: arXiv 1503.02531; of merged models, layer by layer: 2502.12706. Each adapter answers once, before the
first step, and what is kept of p_t is its `TOP` likeliest tokens and the mass of all others, so that no second model
is in memory while one is trained; of h_tl, as many bytes as it has.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import GenerationConfig

from ..checks import check_field, is_int, is_number
from ..inputs import (
    contiguous_head,
    eval_mode,
    generating_by,
    left_padded,
    placeholders,
    removed_after,
    trainable_as_before,
    writes_text,
)
from ..lora_file import Lora
from ..sampling import ends_of
from .report import bar
from .scaling import block_name


TOP = 64
PROMPTS = 8  # a step
WARM_UP = 5  # steps


class Lesson(NamedTuple):
    """A prompt with an adapter's own answer.

    Args:
        ids: (S,) int64, prompt and answer.
        top: (n, k) int64, the likeliest tokens at each of the answer's n.
        mass: (n, k + 1) float32, their probabilities, and that of all others together.
        states: (L, n, H) in the model's dtype, what each of L blocks puts out where it says them; none is compared
            where there is none.
        moved: (L,) float32, what the adapter changes of them, ‖h_t - h_0‖², mean over n.
    """

    ids: Tensor
    top: Tensor
    mass: Tensor
    states: Tensor | None = None
    moved: Tensor | None = None


def check_lessons(model: Any, steps: int, learning_rate: float, answer_tokens: int) -> None:
    """Refuse arguments of `lessons` and `distill`.

    Raises:
        ValueError: one is out of range; the model does not write text one token after the other.
    """
    check_field(is_int(steps) and steps >= 0, "distill", steps, "a number of steps >= 0")
    check_field(is_number(learning_rate) and learning_rate > 0, "learning_rate", learning_rate, "a number > 0")
    check_field(is_int(answer_tokens) and answer_tokens >= 1, "answer_tokens", answer_tokens, "an integer >= 1")
    if steps and model is not None and not writes_text(model):
        raise ValueError(
            f"distill is for causal language models, whose answers can be compared; {type(model).__name__} is none: "
            "leave `distill` out."
        )


@torch.no_grad()
def lessons(
    model: PeftModel,
    prompts: Sequence[Tensor],
    tokenizer: Any,
    answer_tokens: int,
    batch_size: int = 8,
    blocks: Sequence[str] = (),
) -> list[Lesson]:
    """What a model with its adapter answers: greedily, up to what ends a text for the tokenizer or the model.

    Args:
        prompts: ids (S,) int64 of each.
        answer_tokens: most tokens of an answer.
        batch_size, blocks: as in `lessons_of`.
    """
    texts: list[Tensor] = []
    lengths: list[int] = []
    ends = ends_of(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=answer_tokens, eos_token_id=ends or None, pad_token_id=pad,
        suppress_tokens=placeholders(model.get_base_model()) or None,
    )  # fmt: skip
    with eval_mode(model), contiguous_head(model), generating_by(model, greedy):
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            batch = left_padded(some)
            written = model.generate(
                **{name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            )
            answers = [_until(row, ends) for row in written[:, batch["input_ids"].shape[1] :].cpu()]
            texts += [torch.cat(pair) for pair in zip(some, answers, strict=True)]
            lengths += map(len, answers)
    return lessons_of(model, texts, lengths, batch_size, blocks)


@torch.no_grad()
def lessons_of(
    model: PeftModel, texts: Sequence[Tensor], lengths: Sequence[int], batch_size: int = 8, blocks: Sequence[str] = ()
) -> list[Lesson]:
    """What a model with its adapter says of the last tokens of texts, as many as `lengths`.

    Args:
        texts: ids (S,) int64 of each.
        batch_size: texts at a time.
        blocks: modules of the base model whose outputs are kept.
    """
    found = []
    with eval_mode(model), contiguous_head(model):
        for start in range(0, len(texts), batch_size):
            asked = texts[start : start + batch_size], lengths[start : start + batch_size], blocks
            each, states = answer_states(model, *asked)
            with trainable_as_before(model), model.disable_adapter():
                plain = answer_states(model, *asked)[1] if blocks else states
            for ids, logits, with_it, without in zip(asked[0], each, states, plain, strict=True):
                top = logits.topk(min(TOP, logits.shape[-1] - 1), dim=-1).indices
                moved = (with_it.float() - without.float()).square().sum(-1).mean(-1)
                found.append(Lesson(ids, top.cpu(), log_mass(logits, top).exp().cpu(), with_it.cpu(), moved.cpu()))
    return found


def _until(answer: Tensor, ends: Sequence[int]) -> Tensor:
    """The answer with its first end."""
    over = torch.isin(answer, torch.tensor(ends)).nonzero()
    return answer[: int(over[0]) + 1] if len(over) else answer


def answer_logits(model: PeftModel, texts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """(n, V) float32 of each text: what the model gives for each of its last n tokens."""
    base: Any = model.get_base_model()
    accepted = inspect.signature(base.forward).parameters
    batch: dict[str, Any] = {**left_padded(texts), "use_cache": False, "logits_to_keep": max(lengths) + 1}
    given = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name in accepted
    }
    logits = model(**given).logits
    return [row[-n - 1 : -1].float() for row, n in zip(logits, lengths, strict=True)]


def answer_states(
    model: PeftModel, texts: Sequence[Tensor], lengths: Sequence[int], blocks: Sequence[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """`answer_logits`, and (L, n, H) of each text: what the blocks put out where the logits are of."""
    base: Any = model.get_base_model()
    with outputs_of(base.get_submodule(block) for block in blocks) as seen:
        logits = answer_logits(model, texts, lengths)
    width = max(map(len, texts))
    rows = [x for x in seen if x.dim() == 3 and x.shape[:2] == (len(texts), width)]  # of text, a row a token
    if not rows:
        return logits, [logits[0].new_zeros(0, 1, 1)] * len(texts)
    return logits, [torch.stack([x[i, -n - 1 : -1].to(model.device) for x in rows]) for i, n in enumerate(lengths)]


def blocks_of(names: Iterable[str]) -> list[str]:
    """The numbered modules that modules are in, each once: model.layers.3 of model.layers.3.mlp.up_proj."""
    return list(dict.fromkeys(block for name in names if (block := block_name(name)) is not None))


@contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that gets what the modules put out (the first, where it is several), in the order in which they run."""
    seen: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, args, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        for module in modules
    ]
    with removed_after(handles):
        yield seen


def log_mass(logits: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities (n, k + 1) of the tokens `top` (n, k) and of all others together, of logits (n, V)."""
    each = logits.log_softmax(-1)
    others = each.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([each.gather(-1, top), others], dim=-1)


def divergence(logits: Tensor, lesson: Lesson) -> Tensor:
    """KL(p_t ‖ p) in nats, mean over the answer's tokens."""
    found = log_mass(logits, lesson.top.to(logits.device))
    return kl_div(found, lesson.mass.to(found.device), reduction="batchmean")


def distance(states: Tensor, lesson: Lesson, moved: Tensor) -> Tensor:
    """‖h - h_t‖² / m, mean over tokens and over the blocks where m (L,) is not 0."""
    there = (moved > 0).to(states.device)
    if lesson.states is None or not there.any():
        return states.new_zeros(())
    far = (states.float() - lesson.states.to(states.device).float()).square().sum(-1).mean(-1)
    return (far[there] / moved.to(states.device)[there]).mean()


def mean_moved(courses: Sequence[Sequence[Lesson]], weights: Sequence[float]) -> Tensor:
    """m (L,) of the blocks: what an adapter changes of them, mean over its lessons, and over those that count."""
    each = [
        torch.stack([lesson.moved for lesson in course if lesson.moved is not None])
        for course, weight in zip(courses, weights, strict=True)
        if weight
    ]
    return torch.stack([moved.mean(0) for moved in each]).mean(0)


@torch.no_grad()
def divergences(model: PeftModel, courses: Sequence[Sequence[Lesson]], batch_size: int = 8) -> list[float]:
    """KL(p_t ‖ p) in nats of a model from what each adapter says, mean over the lessons of each.

    Args:
        batch_size: prompts at a time.
    """
    found = []
    with eval_mode(model), contiguous_head(model):
        for course in courses:
            total = 0.0
            for start in range(0, len(course), batch_size):
                some = course[start : start + batch_size]
                logits = answer_logits(model, [x.ids for x in some], [len(x.top) for x in some])
                total += sum(float(divergence(rows, x)) for rows, x in zip(logits, some, strict=True))
            found.append(total / len(course))
    return found


def in_turn(courses: Sequence[Sequence[Lesson]], seed: int) -> Iterator[tuple[int, Lesson]]:
    """(t, lesson) without end, one of each adapter in turn; each one's are shuffled, and again once all have been."""
    generator = random.Random(seed)
    decks: list[list[Lesson]] = [[] for _ in courses]
    while True:
        for t, (deck, course) in enumerate(zip(decks, courses, strict=True)):
            if not deck:
                deck.extend(generator.sample(list(course), len(course)))
            yield t, deck.pop()


def distill(
    model: PeftModel,
    names: Sequence[str],
    courses: Sequence[Sequence[Lesson]],
    weights: Sequence[float],
    *,
    steps: int,
    learning_rate: float,
    blocks: Sequence[str] = (),
    batch_size: int = 8,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Lora]:
    """Train a LoRA on the lessons of all adapters: AdamW, a rate that rises over `WARM_UP` steps and falls to 0, steps
    of `PROMPTS` prompts, in eval mode: nothing is dropped.

    Args:
        model: with the merged adapter, trainable. names: its modules in the base model.
        courses: the lessons of each adapter. weights: what each adapter's count, >= 0.
        blocks: those that the lessons have states of.
        batch_size: prompts that are in memory at a time; the gradients of a step's prompts add up.

    Raises:
        ValueError: it diverges.
    """
    base: Any = model.get_base_model()
    layers = {name: base.get_submodule(name) for name in names}
    parameters = [x["default"].weight for layer in layers.values() for x in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    shape = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / WARM_UP) * (1 - s / steps))
    scaler = torch.amp.GradScaler(model.device.type, init_scale=1024.0, enabled=model.dtype == torch.float16)
    order, moved = in_turn(courses, seed), mean_moved(courses, weights)
    with eval_mode(model):
        for step in bar(range(steps), "distill", progress):
            turns = list(islice(order, PROMPTS))
            total = max(1e-12, sum(weights[t] for t, _ in turns))
            for start in range(0, PROMPTS, batch_size):
                some = turns[start : start + batch_size]
                texts, lengths = [x.ids for _, x in some], [len(x.top) for _, x in some]
                loss = torch.zeros((), device=model.device)
                for logits, states, (t, x) in zip(*answer_states(model, texts, lengths, blocks), some, strict=True):
                    loss = loss + weights[t] / total * (divergence(logits, x) + distance(states, x, moved))
                if not loss.isfinite():
                    raise ValueError(f"Distillation diverged at step {step + 1}: give a lower learning_rate.")
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            shape.step()
            optimizer.zero_grad()
    found = {}
    for name, layer in layers.items():
        A, B = (x["default"].weight.detach().cpu() for x in (layer.lora_A, layer.lora_B))
        found[name] = Lora(A, layer.scaling["default"] * B)
    return found
