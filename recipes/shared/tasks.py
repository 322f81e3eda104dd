"""Tasks of prompts and labels: from a folder, or embedded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .data import check_record, read_records
from .embedded_tasks import TASKS, make_task


def cut_passage(prompt: str, max_words: int) -> str:
    """Keep the question (the first line, and the `Option` line) and `Answer:`; cut what is between to max_words words.

    A passage is also cut at 8 * max_words characters, else one unbroken run of signs is 1,400 tokens (yahoo has it).
    """
    prompt = prompt.rstrip() if prompt.rstrip().endswith("Answer:") else prompt
    body, answer = (prompt[: -len("Answer:")], "Answer:") if prompt.endswith("Answer:") else (prompt, "")
    head = re.match(r"[^\n]*\n(?:[ \t]*Options?:[^\n]*\n)?", body)
    start = head.end() if head else 0
    words = list(re.finditer(r"\S+", body[start:]))
    if len(words) <= max_words and len(body) - start <= 8 * max_words:
        return prompt
    length = min(words[:max_words][-1].end() if words else 0, 8 * max_words)
    return body[: start + length].rstrip() + ("\n" if head else " ") + answer


PART = re.compile(r"(.+)-(\d+)of(\d+)")


def is_task(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether `find_task` looks for a task under that name, or a part of it."""
    part = PART.fullmatch(name)
    folder = bool(data_dir) and (Path(str(data_dir)) / name).is_dir()
    return folder or name in TASKS or (part is not None and is_task(part[1], data_dir))


def find_task(name: str, data_dir: str | Path | None = None, max_passage_words: int = 48, seed: int = 0) -> Any:
    """The task of `read_task` where DATA_DIR/NAME is a folder, else the embedded one; a list of names may mix them.

    NAME-KofN is the part of task NAME with every N-th of its labels, from the K-th on: one data set is N tasks.

    Args:
        max_passage_words: as `read_task`.
        seed: draws an embedded task's records: a test prompt of one seed may be learnt with another.

    Raises:
        ValueError: there is neither, or no such part; else as `read_task`.
    """
    if data_dir and (Path(data_dir) / name).is_dir():
        return read_task(data_dir, name, max_passage_words)
    if name in TASKS:
        return make_task(name, seed=seed)
    if part := PART.fullmatch(name):
        return _part(find_task(part[1], data_dir, max_passage_words, seed), name, int(part[2]), int(part[3]))
    if data_dir:
        raise ValueError(
            f"{Path(data_dir) / name} is no folder, and no embedded task has that name: write "
            f"{Path(data_dir) / name}/{{train,test}}.jsonl, or choose one of {', '.join(TASKS)}"
        )
    return make_task(name, seed=seed)


def _part(task: dict[str, Any], name: str, k: int, n: int) -> dict[str, Any]:
    if not 1 <= k <= n <= len(task["labels"]):
        raise ValueError(
            f"{name}: {task['name']} has {len(task['labels'])} labels; write {task['name']}-KofN with 1 <= K <= N <= "
            f"{len(task['labels'])}"
        )
    labels = task["labels"][k - 1 :: n]
    records = {split: [r for r in task[split] if r["answer"] in labels] for split in ("train", "test")}
    if empty := next((split for split, found in records.items() if not found), None):
        raise ValueError(f"{name} has no {empty} records: none is labelled {' or '.join(labels)}")
    return {"name": name, "labels": labels, **records}


def read_task(data_dir: str | Path, name: str, max_passage_words: int = 48) -> dict[str, Any]:
    """Read DATA_DIR/NAME/{train,test}.jsonl (fields prompt, answer) and labels.json into make_task's layout.

    Passages are cut to so many words (`cut_passage`); 0: not at all.

    Raises:
        FileNotFoundError: a split is missing. ValueError: a record is empty or wrong, with its file and line number.
    """
    folder = Path(data_dir) / name
    task: dict[str, Any] = {"name": name}
    labels_file = folder / "labels.json"
    try:
        labels = json.loads(labels_file.read_text(encoding="utf-8-sig")) if labels_file.exists() else None
    except ValueError as error:
        raise ValueError(f"{labels_file} is no JSON in UTF-8 ({error})") from error
    if labels is not None and not (isinstance(labels, list) and all(isinstance(x, str) and x.strip() for x in labels)):
        raise ValueError(f"{labels_file} is {str(labels)[:80]}; write a list of the answers, as strings")
    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: a task is a folder with train.jsonl and test.jsonl (and labels.json, if you like)"
            )
        task[split] = []
        for number, record in read_records(path):
            check_record(record, ("prompt", "answer"), f"{path}:{number}")
            prompt, answer = record["prompt"], record["answer"].strip()
            if labels is not None and answer not in labels:
                raise ValueError(f"{path}:{number}: answer {answer!r} is not in {labels_file}: {labels}")
            prompt = cut_passage(prompt, max_passage_words) if max_passage_words else prompt
            task[split].append({"prompt": prompt, "answer": answer})
        if not task[split]:
            raise ValueError(f"{path} has no records: write one JSON object a line, with prompt and answer")
    task["labels"] = labels if labels is not None else sorted({r["answer"] for r in task["train"] + task["test"]})
    return task


def to_dataset(records: list[dict[str, str]]) -> Any:
    """A datasets.Dataset with TRL's prompt and completion columns: SFTTrainer then puts the loss on the completion.

    A record's `task` is a column, too.
    """
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"prompt": r["prompt"], "completion": " " + r["answer"], **{key: r[key] for key in ("task",) if key in r}}
            for r in records
        ]
    )
