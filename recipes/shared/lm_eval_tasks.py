"""Tasks of labels, and passages, as files that lm-eval reads (`--include_path`)."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

from .base_model import EMBEDDED
from .data import read_records
from .general_passages import HELD_OUT


def write_lm_eval_tasks(tasks: list[dict[str, Any]], folder: str | Path) -> list[str]:
    """Write tasks for lm-eval (`--include_path folder`) and return their names.

    Two appear for each: NAME scores the labels against each other (acc), NAME_greedy generates and wants the label
    first (exact_match), which has no chance floor. A model that always answers right has 1.0 in both. JSON is YAML, so
    the files need no YAML writer; the records are parquet, which keeps text as it is (in JSON a date is a timestamp).

    Raises:
        ValueError: as `check_tasks`.
    """
    names = check_tasks(tasks)
    for task, name in zip(tasks, names, strict=True):
        _write_task(task, name, Path(folder).resolve())
    return names


def check_tasks(tasks: list[dict[str, Any]]) -> list[str]:
    """The tasks' names in lm-eval.

    Raises:
        ValueError: two tasks have one name in lm-eval, a label is no single line, or there twice.
    """
    # the prefix keeps clear of lm-eval's own names
    names = ["peft_mora_" + re.sub(r"\W+", "_", task["name"]).lower() for task in tasks]
    taken: dict[str, str] = {}
    for task, name in zip(tasks, names, strict=True):
        for written in (name, f"{name}_greedy"):
            other = taken.setdefault(written, task["name"])
            if other is not task["name"]:
                raise ValueError(
                    f"the tasks {other!r} and {task['name']!r} would both be {written} in lm-eval: rename one"
                )
    for task in tasks:
        for label in task["labels"]:
            if len(label.splitlines()) != 1 or label != label.strip() or task["labels"].count(label) > 1:
                raise ValueError(
                    f"task {task['name']!r}: the label {label!r} cannot be scored; labels are one line each, with no "
                    "space around them, and all different"
                )
    return names


def _write_task(task: dict[str, Any], name: str, folder: Path) -> None:
    labels = task["labels"]
    files = {}
    for split in ("train", "test"):
        records = [{**r, "label": labels.index(r["answer"]), "labels": labels} for r in task[split]]
        files[split] = _write_records(records, folder / f"{name}_{split}.parquet")
    # Columns by their names: a template would evaluate what looks like a number, a list or a template in a record.
    common = {
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "prompt",
        "target_delimiter": " ",
        "metadata": {"version": 2.0},
    }
    choice = {
        "task": name,
        "output_type": "multiple_choice",
        "doc_to_choice": "labels",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    longest_first = sorted(labels, key=len, reverse=True)
    # A word ends where the label does; a label that ends in a sign ends by itself.
    ends = [re.escape(label) + (r"(?!\w)" if re.match(r"\w", label[-1]) else "") for label in longest_first]
    pattern = rf"^\s*({'|'.join(ends)})".encode("ascii", "backslashreplace").decode()
    regex = {"function": "regex", "regex_pattern": pattern, "group_select": 0, "fallback": ""}
    longest = max(len(label.encode()) for label in labels)  # no tokenizer needs more tokens than bytes
    greedy = {
        "task": f"{name}_greedy",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": max(8, longest + 2)},
        "filter_list": [{"name": "label", "filter": [regex, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for config in (choice, greedy):
        _write_config({**config, **common}, folder)


def write_lm_eval_perplexity(file: str | Path, folder: str | Path) -> str:
    """Write a perplexity task over the passages of a file (`read_passages`) for lm-eval; return its name.

    Perplexity of text that no task is about says whether a model keeps its general language.
    """
    texts, file, folder = read_passages(file), Path(file), Path(folder).resolve()
    name = "peft_mora_perplexity_" + re.sub(r"\W+", "_", f"{file.parent.name}_{file.stem}").strip("_").lower()
    path = _write_records([{"text": text} for text in texts], folder / f"{name}.parquet")
    metrics = dict.fromkeys(("word_perplexity", "byte_perplexity"), "weighted_perplexity")
    metrics["bits_per_byte"] = "bits_per_byte"
    config = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": path}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": m, "aggregation": a, "higher_is_better": False} for m, a in metrics.items()],
        "metadata": {"version": 1.0},
    }
    _write_config(config, folder)
    return name


def names_in_lm_eval(name: str, manager: Any) -> list[str]:
    """The tasks and groups that a name, a tag or a pattern (`arc_*`) stands for; [] where lm-eval knows none.

    A tag has no score, and its tasks have; a group may have one. What is in a group that is there is not there twice:
    lm-eval refuses it.
    """
    found = [name] if name in manager.task_index else manager.match_tasks([name])
    tags = {tag: sorted(manager.task_index[tag].tags) for tag in found if tag in manager.all_tags}
    found = list(dict.fromkeys(chain.from_iterable(tags.get(one, [one]) for one in found)))
    groups = [manager.task_index[one].cfg for one in found if one in manager.all_groups]
    inside = set().union(*(_members(group, manager) for group in groups))
    return [one for one in found if one not in inside]


def _members(group: dict[str, Any], manager: Any) -> set[str]:
    """Names of the tasks and groups in a group, by its config, and in the groups and tags among them."""
    found: set[str] = set()
    parts = group.get("task", [])
    for part in [parts] if isinstance(parts, str) else parts:
        part = {"task": part} if isinstance(part, str) else part
        name = part.get("group", part.get("task"))
        entry = manager.task_index.get(name)
        found.add(name)
        if "group" in part or name in manager.all_groups:
            found |= _members(part if "group" in part else entry.cfg, manager)
        elif name in manager.all_tags:
            found |= entry.tags
    return found


def read_passages(file: str | Path) -> list[str]:
    """Of a JSONL file, the field `text` or `page` of each record; of "embedded", the passages that are here."""
    if str(file) == EMBEDDED:
        return list(HELD_OUT)
    texts = []
    for number, record in read_records(Path(file)):
        text = record.get("text", record.get("page"))
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{file}:{number}: no passage; write a non-empty string in the field 'text' or 'page'")
        texts.append(text)
    if not texts:
        raise ValueError(f"{file} has no passages: write one JSON object a line, with 'text' or 'page'")
    return texts


def _write_records(records: list[dict[str, Any]], path: Path) -> str:
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(records).to_parquet(path)
    return str(path)


def _write_config(config: dict[str, Any], folder: Path) -> None:
    path = folder / f"{config['task']}.yaml"
    path.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
