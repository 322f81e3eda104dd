"""Two scorers: lm-eval's, for whatever it knows, and a quick one for a task's prompts and answers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.utils import has_file

from .base_model import load_base


def load(base: str, adapter: str | Path | None, device: str, name: str = "default") -> tuple[Any, Any]:
    """(model, tokenizer) with the adapter as it is on disk, in eval mode: what is scored is what was saved.

    The tokenizer is the adapter's where its folder has one: its chat template is the one that was trained with.
    """
    model, tokenizer = load_base(base, device, tokenizer=tokenizer_of(base, adapter))
    model = PeftModel.from_pretrained(model, adapter, name) if adapter is not None else model
    return model.eval(), tokenizer


def tokenizer_of(base: str, adapter: str | Path | None) -> str:
    """Folder or name: of the adapter where it brings a tokenizer, else of the base."""
    return str(adapter) if adapter is not None and has_file(str(adapter), "tokenizer_config.json") else str(base)


def plain_lm_eval(base: str, adapter: str | Path | None, names: list[str], folder: Any, device: str) -> str:
    """The `lm_eval` command for the tasks `names`, those of `folder` among them."""
    own = f",peft={adapter},tokenizer={tokenizer_of(base, adapter)}" if adapter is not None else ""
    arguments = shlex.quote(f"pretrained={base}{own},dtype=bfloat16,softmax_dtype=float32")
    where = f" --include_path {shlex.quote(str(folder))}" if folder else ""
    return f"lm_eval --model hf --model_args {arguments} --tasks {','.join(names)}{where} --device {device}"


def lm_eval(model: Any, tokenizer: Any, names: list[str], manager: Any, batch_size: int, **options: Any) -> Any:
    """All that lm-eval's own evaluator reports on the tasks `names`, with its configs and versions.

    Args:
        manager: lm-eval's TaskManager.
        options: further arguments of simple_evaluate.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # Else log-likelihoods are summed in the logits' own bfloat16, which has two or three digits.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    return simple_evaluate(lm, tasks=names, task_manager=manager, log_samples=False, **options)


def common_length(one: list[int], other: list[int]) -> int:
    """How far two lists are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def answers(
    model: Any, tokenizer: Any, records: list[dict[str, str]], batch_size: int, labels: list[str] | None = None
) -> dict[str, float]:
    """Share of prompts that are answered right, from one forward of each prompt with its answer.

    Args:
        records: prompt and answer.
        labels: all answers there are; their first tokens must differ.

    Returns:
        "greedy": greedy decoding would write the whole answer, all tokens being there to choose from. With labels
        also "label": the answer's first token scores highest among the labels' (chance is a floor), and "loss": the
        mean loss of that token, in nats.

    Raises:
        ValueError: two labels begin with the same token.
    """
    firsts = torch.tensor([tokenizer(f" {label}", add_special_tokens=False).input_ids[0] for label in labels or ()])
    if len(set(firsts.tolist())) < len(firsts):
        raise ValueError(f"two labels begin with the same token, and no first token tells them apart: {labels}")
    found = dict.fromkeys(("greedy", "label", "loss") if labels else ("greedy",), 0.0)
    records = sorted(records, key=lambda record: len(record["prompt"]))
    for start in range(0, len(records), batch_size):
        rows = records[start : start + batch_size]
        texts = [f"{row['prompt']} {row['answer']}" for row in rows]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        pairs = zip(tokenizer(texts).input_ids, tokenizer([row["prompt"] for row in rows]).input_ids, strict=True)
        lengths = [len(ids) - common_length(ids, prompt) for ids, prompt in pairs]  # as TRL masks
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(**batch, position_ids=positions, logits_to_keep=max(lengths) + 1).logits.float().cpu()
        for row, record, n in zip(range(len(rows)), rows, lengths, strict=True):
            scores = logits[row, -n - 1 : -1]
            found["greedy"] += torch.equal(scores.argmax(-1), batch["input_ids"][row, -n:].cpu())
            if labels:
                right = labels.index(record["answer"])
                found["label"] += int(scores[0, firsts].argmax()) == right
                found["loss"] -= scores[0].log_softmax(-1)[firsts[right]].item()
    return {name: value / len(records) for name, value in found.items()}
