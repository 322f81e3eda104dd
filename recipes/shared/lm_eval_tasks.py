"""Tasks of labels, and passages, as files that lm-eval reads (`--include_path`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .data import read_jsonl


def write_lm_eval_task(task: dict[str, Any], folder: str | Path) -> str:
    """Write the task for lm-eval (`--include_path folder`) and return its name.

    Two tasks appear: NAME scores the labels against each other (acc), NAME_greedy generates and wants the label first
    (exact_match), which has no chance floor. JSON is YAML, so the files need no YAML writer.
    """
    name = "peft_mora_" + re.sub(r"\W+", "_", task["name"]).lower()  # the prefix keeps clear of lm-eval's own names
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split in ("train", "test"):
        path = folder / f"{name}_{split}.jsonl"
        records = [{**r, "label": task["labels"].index(r["answer"])} for r in task[split]]
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        files[split] = str(path)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "target_delimiter": " ",
        "metadata": {"version": 1.0},
    }
    choice = {
        "task": name,
        "output_type": "multiple_choice",
        "doc_to_choice": task["labels"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    longest_first = sorted(map(re.escape, task["labels"]), key=len, reverse=True)
    pattern = rf"^\s*({'|'.join(longest_first)})\b"
    regex = {"function": "regex", "regex_pattern": pattern, "group_select": 0, "fallback": "[none]"}
    greedy = {
        "task": f"{name}_greedy",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
        "filter_list": [{"name": "label", "filter": [regex, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for config in (choice, greedy):
        path = folder / f"{config['task']}.yaml"
        path.write_text(json.dumps({**config, **common}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return name


def write_lm_eval_perplexity(file: str | Path, folder: str | Path) -> str:
    """Write a perplexity task over a JSONL file's passages (field `text` or `page`) for lm-eval; return its name.

    Perplexity of text that no task is about says whether a model keeps its general language.
    """
    file = Path(file)
    name = "peft_mora_perplexity_" + re.sub(r"\W+", "_", f"{file.parent.name}_{file.stem}").strip("_").lower()
    texts = []
    for number, record in read_jsonl(file):
        text = record.get("text", record.get("page"))
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{file}:{number}: no passage; write a non-empty string in the field 'text' or 'page'")
        texts.append(text)
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    metrics = dict.fromkeys(("word_perplexity", "byte_perplexity"), "weighted_perplexity")
    metrics["bits_per_byte"] = "bits_per_byte"
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": m, "aggregation": a, "higher_is_better": False} for m, a in metrics.items()],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return name
