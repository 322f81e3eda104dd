"""Records of any form for SFTTrainer, each of them checked.

>>> dataset = read_dataset("my_data/train.jsonl")  # or a folder, a Hub name, the name of an embedded task
my_data/train.jsonl: 500 records, columns prompt, answer
  the first: {"prompt": "Is a zebra striped? Answer:", "answer": "yes"}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from peft_mora.json_lines import read_jsonl

from .embedded_tasks import TASKS, make_task


# The columns of a record, the most specific first: ultrachat has `messages` and a `prompt`.
FORMS = (("messages",), ("prompt", "completion"), ("prompt", "answer"), ("text",))
# What else SFTTrainer reads, or our callbacks.
BESIDE = ("tools", "chat_template_kwargs", "images", "image", "task")


def read_dataset(
    source: str | Path,
    split: str = "train",
    config: str | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> Any:
    """A datasets.Dataset in a form that SFTTrainer takes, every record checked; prints what it has read.

    Records have prompt and answer, prompt and completion (text, or lists of messages), messages, or text; `tools`,
    `chat_template_kwargs` and images are kept, what other columns are dropped is printed. An answer becomes a
    completion with a space before it, `tools` as JSON and content in parts of text what they stand for. A tool call
    keeps the arguments that it has: no null for those of other records' calls.

    Args:
        source: a file of JSON lines (also gzipped) or parquet, a folder with SPLIT.jsonl, a folder that
            `datasets` wrote (save_to_disk), an embedded task, or what else `datasets.load_dataset` takes: a name on
            the Hub, a folder of parquet or csv files.
        split: which part; a single file has only "train".
        config: the data set's configuration, where it is one on the Hub.
        tokenizer: with max_length, records are refused that truncation would leave no token of an answer.
        max_length: tokens that the trainer keeps of a record.

    Raises:
        ValueError: nothing to read, or a record is empty, has no label, cannot be read or rendered, or would lose its
            label to truncation; names file and line, or data set and row.
    """
    from datasets import Dataset, __version__

    if "on_mixed_types" not in signature(Dataset.from_list).parameters:
        raise ImportError(
            f"datasets {__version__} gives a tool call all others' arguments, as nulls: pip install 'datasets>=5'"
        )
    records, name = _open(source, split, config)
    first = next(records, None)
    if first is None:
        raise ValueError(f"{name} has no records: there is nothing to train on")
    columns = dict.fromkeys(first[1])
    form = next((form for form in FORMS if set(form) <= set(columns)), None)
    if form is None:
        raise ValueError(
            f"{first[0]}: the columns are {', '.join(columns)}; "
            "write prompt and answer (or completion), messages, or text"
        )
    rows = []
    for place, record in chain([first], records):
        columns |= dict.fromkeys(record)
        check_record(record, form, place)
        row = {key: record[key] for key in form} | _beside(record, place)
        if "answer" in row:
            row["completion"] = " " + row.pop("answer").strip()
        if not {"images", "image"} & set(row):
            _join_parts(row)
        if tokenizer is not None and max_length is not None:
            _check_length(row, tokenizer, max_length, place)
        rows.append(row)
    beside = {key: {} if key == "chat_template_kwargs" else None for row in rows for key in row.keys() & set(BESIDE)}
    rows = [beside | row for row in rows]  # the first row's keys are all that from_list sees
    sample = json.dumps({key: first[1][key] for key in form}, ensure_ascii=False, default=str)
    print(f"{name}: {len(rows)} records, columns {', '.join(columns)}")
    dropped = [key for key in columns if key not in (*form, *BESIDE)]
    if dropped:
        print(f"  not used: {', '.join(dropped)}")
    print(f"  the first: {sample if len(sample) <= 300 else sample[:300] + ' …'}", flush=True)
    return Dataset.from_list(rows, on_mixed_types="use_json")  # else one struct for all rows: foreign keys, as nulls


def _open(source: str | Path, split: str, config: str | None) -> tuple[Iterator[tuple[str, dict[str, Any]]], str]:
    """(place, record) one after the other, the place as a person looks it up; and the name of it all."""
    path = Path(source)
    if path.is_file() and split != "train":
        raise ValueError(
            f"{path} is one file, without a {split!r} part: give a folder with train.jsonl and test.jsonl"
        )
    table = path.is_file() and path.suffix == ".parquet"
    if not table and (path.is_file() or (path / f"{split}.jsonl").is_file()):
        path = path if path.is_file() else path / f"{split}.jsonl"
        return ((f"{path}:{number}", record) for number, record in read_records(path)), str(path)
    name = str(path) if table else f"{source}[{split}]"
    if not path.exists() and source in TASKS:
        return ((f"{name}, row {i}", r) for i, r in enumerate(make_task(str(source))[split])), name
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    if table:
        try:
            dataset = load_dataset("parquet", data_files={"train": str(path)}, split="train")
        except (DatasetsError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as parquet ({error.__cause__ or error})") from error
    elif any((path / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
        try:
            dataset = load_from_disk(path)
        except IndexError:  # datasets 5.2 on a folder that was saved without a single row
            return iter(()), name
        parts = dataset if isinstance(dataset, DatasetDict) else {"train": dataset}
        if split not in parts:
            raise ValueError(f"{path} has no split {split!r}, but {', '.join(parts)}")
        dataset = parts[split]
    else:
        try:
            dataset = load_dataset(str(source), config, split=split)
        except ValueError as error:  # no such split, no such config
            raise ValueError(
                f"{source!r} gives no {split!r} records ({error}). A folder of yours has {split}.jsonl in it."
            ) from error
        except OSError as error:  # not found, no network
            raise ValueError(
                f"{source!r} is not a file or a folder here, and `datasets` could not get it from the Hub ({error}). "
                "Give a JSONL file, a folder with train.jsonl, a folder that save_to_disk wrote, or a data set's name."
            ) from error
    return ((f"{name}, row {i}", _own_keys(record, dataset.features)) for i, record in enumerate(dataset)), name


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, record) of a file with one JSON object a line, gzipped or not.

    Raises:
        ValueError: as `read_jsonl`; a line is no object.
    """
    for number, record in read_jsonl(path):
        if not isinstance(record, dict):
            line = json.dumps(record, ensure_ascii=False)
            raise ValueError(f'{path}:{number}: {line[:40]!r} is no object; write one a line, as {{"text": "…"}}')
        yield number, record


def _own_keys(record: dict[str, Any], features: Any) -> dict[str, Any]:
    """The record without the nulls that Arrow puts where a dict lacks a key that others of its column have."""

    def own(value: Any, feature: Any) -> Any:
        if isinstance(feature, dict) and value is not None:
            kept = {key for key in value if value[key] is not None or (key == "content" and "role" in feature)}
            return {key: own(value[key], feature[key]) for key in value if key in kept}
        if isinstance(value, list) and hasattr(feature, "feature"):
            return [own(item, feature.feature) for item in value]
        return value

    return {key: own(value, features[key]) for key, value in record.items()}


def check_record(record: dict[str, Any], form: tuple[str, ...], place: str) -> None:
    """Refuse a record with nothing in one of the columns of `form`, or with messages that hold no answer."""
    for key in form:
        value = record.get(key)
        wanted = "a list of messages" if key == "messages" else "a non-empty string"
        if value is None or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"{place}: {key!r} is missing or empty; write {wanted}")
        if isinstance(value, list) and key in ("messages", "prompt", "completion"):
            turns = [turn for turn in value if isinstance(turn, dict) and isinstance(turn.get("role"), str)]
            if not value or len(turns) < len(value):
                raise ValueError(f"{place}: {key!r} must be messages with role and content, not {str(value)[:80]!r}")
            answers = [turn for turn in turns if turn["role"] == "assistant" and _says_something(turn)]
            if key != "prompt" and not answers:
                raise ValueError(f"{place}: no assistant message in {key!r} says anything: nothing to learn")
        elif key == "messages" or not isinstance(value, str):
            shown = json.dumps(value, ensure_ascii=False, default=str)[:80]
            example = f", as {json.dumps(shown)}" if isinstance(value, (int, float)) else ""
            raise ValueError(f"{place}: {key!r} is {shown}; write {wanted}{example}")
    if len({type(record[key]) for key in form}) > 1:
        raise ValueError(
            f"{place}: one of {' and '.join(form)} is text, the other messages; write both as one of them"
        )


def _says_something(turn: dict[str, Any]) -> bool:
    content = turn.get("content")
    if isinstance(content, list):
        return any(
            not isinstance(p, dict) or p.get("type") != "text" or str(p.get("text", "")).strip() for p in content
        )
    return bool(content.strip() if isinstance(content, str) else content) or bool(turn.get("tool_calls"))


def _beside(record: dict[str, Any], place: str) -> dict[str, Any]:
    """The columns of BESIDE that the record has, `tools` read where it is JSON."""
    row = {key: record[key] for key in BESIDE if record.get(key) is not None}
    if isinstance(row.get("tools"), str):
        try:
            row["tools"] = json.loads(row["tools"])
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: 'tools' is a string that is not JSON ({error}); write a list") from error
    for key, kind, name in (("tools", list, "a list"), ("chat_template_kwargs", dict, "an object")):
        if not isinstance(row.get(key, kind()), kind):
            raise ValueError(f"{place}: {key!r} is {json.dumps(row[key])[:80]}; write {name}")
    return row


def _join_parts(row: dict[str, Any]) -> None:
    """Content that is parts of text, all of it, becomes that text: most models' templates take nothing else."""
    for key in ("messages", "prompt", "completion"):
        if isinstance(row.get(key), list):
            row[key] = [
                {**turn, "content": "".join(part["text"] for part in turn["content"])}
                if isinstance(turn.get("content"), list)
                and all(set(part) == {"type", "text"} for part in turn["content"])
                else turn
                for turn in row[key]
            ]


def _check_length(row: dict[str, Any], tokenizer: Any, max_length: int, place: str) -> None:
    """Refuse a record whose answer lies wholly behind the first max_length tokens, which are all that TRL keeps."""
    before = row.get("prompt", row.get("messages"))  # a text has no part of its own that is learnt
    if isinstance(before, list):
        if tokenizer.chat_template is None:
            raise ValueError(f"{place}: messages, but the tokenizer has no chat template; give one, or write text")
        options = {"tools": row.get("tools"), "tokenize": False, **row.get("chat_template_kwargs", {})}
        roles = [turn["role"] for turn in before]
        whole = before + row.get("completion", [])
        before = before[: roles.index("assistant")] if "messages" in row else before
        try:
            tokenizer.apply_chat_template(whole, **options)
            text = tokenizer.apply_chat_template(before, add_generation_prompt=True, **options) if before else None
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"{place}: the tokenizer's chat template does not take this record ({error})") from error
        used = len(tokenizer(text, add_special_tokens=False).input_ids) if text else 0
    else:
        used = len(tokenizer(before).input_ids) if before else 0
    if used >= max_length:
        raise ValueError(
            f"{place}: the prompt alone has {used} tokens: truncation to {max_length} leaves nothing of the answer; "
            "give a larger max_length, or shorten the prompt"
        )
