"""A memory of general text, made without training: what the base model does with it is kept from the first task on.

The inputs that a text brings to each module are what an earlier task's inputs are: directions that a later task must
leave alone. So protected text is a `Subspace` like any other, with the text in the place of a task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_mora import use_exact_4bit_kernels
from peft_mora.checks import check_field, is_int, is_number
from peft_mora.fingerprint import fingerprint
from peft_mora.inputs import (
    base_of,
    contiguous_head,
    eval_mode,
    input_statistics,
    load_tokenizer,
    placeholders,
    right_padded,
    room,
    seeded,
    text_tokenizer,
    visit,
)
from peft_mora.json_lines import read_jsonl
from peft_mora.sampling import ROWS, check_writes, continued, ends_of, start_of

from .subspace import Subspace


# SmolLM2-135M in NF4 on WikiText pages: docs/projection.md has what it gives.
ENERGY = 0.95
TOKENS = 10_240
LENGTH = 256  # tokens of one text, at most: many short ones say more than a few long ones
Batch = dict[str, Tensor]


def protect(
    model: Any,
    source: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    energy: float = ENERGY,
    tokens: int = TOKENS,
    adapter_name: str | None = None,
    whole: bool = False,
) -> Subspace:
    """Write a memory of `source` for `OrthogonalProjectionCallback(memory=folder)`. Trains nothing, changes nothing.

    Args:
        model: a base model, in any precision, or a PEFT model: then it is protected as it is with its active adapters.
        source: text to keep the model's behaviour on: a list of strings, of conversations (lists of role and content)
            or of records, a `datasets.Dataset`, the path of a JSON Lines file; or "self": text that the model samples
            itself, half of it through the chat template where there is one that leaves room. Records have "text" (or
            "page"), "messages", or "prompt" and "completion".
        folder: where the memory goes, in place of an earlier one.
        tokenizer: of the model, or its processor; None loads it from where the model came from.
        energy: share of the inputs' squared norm that the bases hold, in (0, 1].
        tokens: how many tokens to look at; texts are cut to 256 each and taken in their order.
        adapter_name: protect the inputs of the modules that this adapter adapts; None is every linear layer but the
            output head, which serves adapters with any `target_modules`.
        whole: remember the inputs in all directions, for `start="osrm"`, and not to .98 of their energy.

    Returns:
        What was written.

    Raises:
        ValueError: a wrong argument, a record without text or with images, no text at all, a module whose inputs are
            not seen.
        FileNotFoundError: `source` is a path, and nothing is there.
        FileExistsError: `folder` holds other files than a memory.

    Example:
        >>> protect(model, "self", "out/general")
        >>> OrthogonalProjectionCallback("out/general")
    """
    check_arguments(energy, tokens)
    Subspace.check_folder(folder)
    use_exact_4bit_kernels(model)
    base = base_of(model)
    subspace = Subspace("inputs", fingerprint(base))
    if whole:
        subspace.seen_energy = 1.0
    add_text(subspace, model, linear_layers(model, adapter_name), source, tokenizer, energy, tokens)
    subspace.save(folder)
    return subspace


def tokenizer_for(model: Any, tokenizer: Any) -> Any:
    """The one given, or else the one that lies with the model.

    Raises:
        ValueError: there is none.
    """
    if tokenizer is not None:
        return tokenizer
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    try:
        return load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Text is to be read or written, and there is no tokenizer: none was given, and none lies with the model "
            f"({name!r}). Give the trainer one, processing_class=tokenizer; to `protect`, tokenizer=tokenizer."
        ) from error


def check_arguments(energy: Any, tokens: Any) -> None:
    check_field(is_number(energy) and 0 < energy <= 1, "energy", energy, "a number in (0, 1]")
    check_field(is_int(tokens) and tokens >= 1, "tokens", tokens, "an integer >= 1")


def add_text(
    subspace: Subspace,
    model: Any,
    layers: Mapping[str, nn.Module],
    source: Any,
    tokenizer: Any,
    energy: float | None,
    tokens: int,
    max_rank: int | None = None,
) -> None:
    """Add what `source` needs of `layers` to a subspace, once: a text that is in there already is not added again."""
    if source == "self" and any(task.get("text") == "self" for task in subspace.tasks):
        return
    batches = sample(model, tokenizer, tokens) if source == "self" else read(source, tokenizer, tokens, model)
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch["input_ids"].cpu().numpy().tobytes())
    text = "self" if source == "self" else digest.hexdigest()
    if any(task.get("text") == text for task in subspace.tasks):
        return
    seen = sum(int(batch["attention_mask"].sum()) for batch in batches)
    subspace.add_inputs(input_statistics(model, layers, batches), energy, max_rank)
    subspace.tasks.append(
        {"name": "general text", "text": text, "tokens": seen, "energy": energy, "max_rank": max_rank}
    )


def read(source: Any, tokenizer: Any, tokens: int, model: Any = None) -> list[Batch]:
    """The first `tokens` tokens of a source, as batches of one sequence each, for `model` to read.

    Raises:
        ValueError: there is no text, a record has none, or images that the model would have to see.
    """
    batches: list[Batch] = []
    left, images, length = tokens, placeholders(model), _length(model)
    for ids in _encoded(source, text_tokenizer(tokenizer_for(model, tokenizer))):
        ids = ids[: min(length, left)]
        if not set(images).isdisjoint(ids):
            raise ValueError(_images("the text stands for images"))
        if len(ids) > 1:  # a beginning-of-text token alone is no text
            batches.append(right_padded([ids]))
            left -= len(ids)
        if left <= 1:
            break
    if not batches:
        raise ValueError(
            "There is no text of two tokens and more: nothing would be looked at. Give texts, or, to protect, 'self'."
        )
    return batches


def check_source(source: Any, base: str, tokens: int = TOKENS) -> None:
    """Refuse a file that `protect` cannot read, before a model is opened; what is no file is not looked at.

    Args:
        base: folder or name of the model, for its tokenizer.

    Raises:
        ValueError: as `read`. FileNotFoundError: nothing is there.
    """
    if isinstance(source, (str, Path)) and source != "self":
        read(source, load_tokenizer(base), tokens)


def _length(model: Any) -> int:
    """Tokens of one text, of a model that may have room for fewer."""
    return min(LENGTH, (room(model) if model is not None else None) or LENGTH)


def _images(what: str) -> str:
    return (
        f"General text is without images, which are not shown to the model here, and {what}: leave those out. What a "
        "task with images needs, OrthogonalProjectionCallback sees in its own training data."
    )


def _encoded(source: Any, tokenizer: Any) -> Iterator[list[int]]:
    for number, record in enumerate(_records(source)):
        pictures = [record.get(key) for key in ("image", "images")] if isinstance(record, Mapping) else []
        if any(found is not None and found != [] for found in pictures):
            raise ValueError(_images(f"record {number} has images"))
        if isinstance(record, Mapping) and isinstance(record.get("messages"), Sequence):
            record = record["messages"]
        if isinstance(record, Mapping):
            prompt, completion = record.get("prompt"), record.get("completion", record.get("answer"))
            if "completion" not in record and isinstance(completion, str):
                completion = " " + completion.strip()  # an answer, as the recipes' records are learnt
            if isinstance(prompt, str) and isinstance(completion, str):
                record = prompt + completion
            elif isinstance(prompt, list) and isinstance(completion, list):
                record = [*prompt, *completion]
            else:
                record = next((record[key] for key in ("text", "page") if isinstance(record.get(key), str)), record)
        if isinstance(record, str):
            yield tokenizer(record).input_ids
        elif isinstance(record, list) and record and all(isinstance(m, Mapping) and "role" in m for m in record):
            if tokenizer.chat_template is None:
                raise ValueError(
                    "The general text has messages, and the tokenizer has no chat template to write them with."
                )
            yield tokenizer(tokenizer.apply_chat_template(record, tokenize=False), add_special_tokens=False).input_ids
        else:
            has = f"fields {sorted(record)}" if isinstance(record, Mapping) else f"type {type(record).__name__}"
            raise ValueError(
                f"Record {number} of the general text ({has}) is no text: give strings, messages (lists of role and "
                "content) or records with 'text', 'messages', or 'prompt' and 'completion'."
            )


def _records(source: Any) -> Iterable[Any]:
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"General text is asked for from {str(source)!r}, and there is no such file. Give the path of a JSON "
                "Lines file, a list of texts, a data set, or 'self' for text that the model samples itself."
            )
        yield from (record for _, record in read_jsonl(path))
    else:
        if not isinstance(source, Iterable):
            raise ValueError(f"General text is texts, a data set, a file, or 'self', got {source!r}.")
        yield from source


@torch.no_grad()
def sample(model: Any, tokenizer: Any, tokens: int, seed: int = 0) -> list[Batch]:
    """Text that the model samples itself, at temperature 1 from the start of a text: up to (64, 256) a batch.

    With a chat template of no more than half of that, every second sequence is a conversation: the user's turn is the
    model's own too, sampled behind what the template puts before it (Magpie, arXiv 2406.08464), and then the answer.

    Raises:
        ValueError: it writes none, or there is no tokenizer, or none that begins a text.
    """
    check_writes(model)
    tokenizer = text_tokenizer(tokenizer_for(model, tokenizer))
    start = start_of(tokenizer)
    length, turns = _length(model), _turns(tokenizer)
    if turns is not None and sum(map(len, turns)) > length // 2:  # no room for what is said
        turns = None
    batches, left = [], max(1, tokens // length)
    with seeded(seed), eval_mode(model), contiguous_head(model):
        while left > 0:
            rows = min(ROWS, left)
            talks = rows // 2 if turns is not None else 0
            batches.append(right_padded(continued(model, tokenizer, [[start]] * (rows - talks), length)))
            if turns is not None and talks:
                before, between = turns
                asked = continued(model, tokenizer, [before] * talks, len(before) + length // 4, stop=True)
                ends = ends_of(model, tokenizer)  # where the user's turn came to one of the model's, it is over, too
                ids = [row[: len(row) - (int(row[-1]) in ends)].tolist() + between for row in asked]
                batches.append(right_padded(continued(model, tokenizer, ids, length)))
            left -= rows
    return batches


def _turns(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """The tokens that the chat template puts before a user's words, and those between them and the answer."""
    if tokenizer.chat_template is None:
        return None
    mark = "¤"
    user = [{"role": "user", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template that wants more than a user: its text alone is sampled
        return None
    if text.count(mark) != 1:
        return None
    before, between = (tokenizer(part, add_special_tokens=False).input_ids for part in text.split(mark))
    return (before, between) if before and between else None


def linear_layers(model: Any, adapter_name: str | None = None) -> dict[str, nn.Module]:
    """Module name in the base model -> layer: those of an adapter, or the linear ones that text reaches (no head)."""
    head = model.get_output_embeddings()
    found: dict[str, nn.Module] = {}
    inside = "\n"  # the wrapper that the walk is in; no name begins so
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        layer = module
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = name + "."
            layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if adapter_name is not None:
            wanted = isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters()
        else:
            wanted = isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
        if wanted:
            found[name.removeprefix("base_model.model.")] = module
    if adapter_name is not None:
        check_field(bool(found), "adapter_name", adapter_name, f"one of {sorted(getattr(model, 'peft_config', {}))}")
        return found
    reached: set[str] = set()
    visit(model, found, [right_padded([[0, 0]])], lambda name, *_: reached.add(name))
    return {name: layer for name, layer in found.items() if name in reached}
