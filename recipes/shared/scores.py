"""Two scorers: lm-eval's, for whatever it knows, and a quick one for a task's prompts and answers."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils import collect_env
from transformers.utils import has_file

from peft_mora.inputs import contiguous_head, positions
from peft_mora.opening import with_adapter

from .base_model import load_base


METRICS = ("greedy", "label")  # of a task

ENVIRONMENT = functools.cache(collect_env.get_pretty_env_info)  # lm-eval asks at each call, and pip takes a second


def load(base: str, adapter: str | Path | None, device: str, name: str = "default") -> tuple[Any, Any]:
    """(model, tokenizer) with the adapter as it is on disk, in eval mode: what is scored is what was saved.

    The tokenizer is the adapter's where its folder has one: its chat template is the one that was trained with.
    """
    model, tokenizer = load_base(base, device, tokenizer=tokenizer_of(base, adapter))
    model = with_adapter(model, adapter, name) if adapter is not None else model
    return model.eval(), tokenizer


def tokenizer_of(base: str, adapter: str | Path | None) -> str:
    """Folder or name: of the adapter where it brings a tokenizer, else of the base."""
    own = adapter is not None and has_file(str(adapter), "tokenizer_config.json")
    return str(adapter) if own else str(base)


def plain_lm_eval(
    base: str, adapter: str | Path | None, names: list[str], folder: Any, device: str, limit: int | None = None
) -> str:
    """The `lm_eval` command for the tasks `names`, those of `folder` among them, `limit` samples of each."""
    own = f",peft={adapter},tokenizer={tokenizer_of(base, adapter)}" if adapter is not None else ""
    arguments = shlex.quote(f"pretrained={base}{own},dtype=bfloat16,softmax_dtype=float32")
    where = f" --include_path {shlex.quote(str(folder))}" if folder else ""
    most = f" --limit {limit}" if limit else ""
    return f"lm_eval --model hf --model_args {arguments} --tasks {','.join(names)}{where} --device {device}{most}"


def lm_eval(model: Any, tokenizer: Any, names: list[str], manager: Any, batch_size: int, **options: Any) -> Any:
    """All that lm-eval's own evaluator reports on the tasks `names`, with its configs and versions.

    Args:
        manager: lm-eval's TaskManager.
        options: further arguments of simple_evaluate, which logs no samples here unless told to.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # Else log-likelihoods are summed in the logits' own bfloat16, which has two or three digits.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    with contiguous_head(model), mock.patch.object(collect_env, "get_pretty_env_info", ENVIRONMENT):
        return simple_evaluate(lm, tasks=names, task_manager=manager, **{"log_samples": False, **options})


def common_length(one: list[int], other: list[int]) -> int:
    """How far two lists are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def answers(
    model: Any, tokenizer: Any, records: list[dict[str, str]], batch_size: int, labels: list[str] | None = None
) -> dict[str, float]:
    """Share of prompts that are answered right, from one forward of each prompt with its answer.

    Args:
        records: prompt and answer.
        labels: all answers there are. Where two begin with the same token, each prompt is run with each of them.

    Returns:
        "greedy": greedy decoding would write the whole answer, all tokens being there to choose from. With labels
        also "label": the answer's first token scores highest among the labels', or the whole answer among the whole
        labels where first tokens do not tell them apart (chance is a floor), and "loss": the mean loss of the first
        token, in nats.
    """
    firsts = [tokenizer(f" {label}", add_special_tokens=False).input_ids[0] for label in labels or ()]
    told_apart = len(set(firsts)) == len(firsts)
    found = dict.fromkeys(("greedy", "label", "loss") if labels else ("greedy",), 0.0)
    records = sorted(records, key=lambda record: len(record["prompt"]))
    for start in range(0, len(records), batch_size):
        rows = records[start : start + batch_size]
        prompts = [row["prompt"] for row in rows]
        found_here = answer_scores(model, tokenizer, prompts, [row["answer"] for row in rows])
        for row, (scores, ids) in zip(rows, found_here, strict=True):
            found["greedy"] += torch.equal(scores.argmax(-1), ids)
            if labels:
                found["loss"] -= scores[0, ids[0]].item()
                if told_apart:
                    found["label"] += int(scores[0, firsts].argmax()) == labels.index(row["answer"])
        if labels and not told_apart:
            whole = torch.tensor([
                [float(scores.gather(1, ids[:, None]).sum()) for scores, ids in
                 answer_scores(model, tokenizer, prompts, [label] * len(rows))]
                for label in labels
            ])  # fmt: skip
            right = torch.tensor([labels.index(row["answer"]) for row in rows])
            found["label"] += int((whole.argmax(0) == right).sum())
    return {name: value / len(records) for name, value in found.items()}


@torch.no_grad()
def answer_scores(
    model: Any, tokenizer: Any, prompts: list[str], answers: list[str]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each prompt with its answer: log-probabilities (n, V) before each of the answer's n tokens, float32, and
    these tokens (n,), on the CPU; from one forward."""
    texts = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    pairs = zip(tokenizer(texts).input_ids, tokenizer(prompts).input_ids, strict=True)
    lengths = [len(ids) - common_length(ids, prompt) for ids, prompt in pairs]  # as TRL masks
    given = {**batch, "position_ids": positions(batch.attention_mask), "logits_to_keep": max(lengths) + 1}
    with contiguous_head(model):
        logits = model(**given).logits.float().cpu()
    ids = batch["input_ids"].cpu()
    return [(logits[i, -n - 1 : -1].log_softmax(-1), ids[i, -n:]) for i, n in enumerate(lengths)]


def word_perplexity(model: Any, tokenizer: Any, name: str, manager: Any, batch_size: int) -> float:
    """lm-eval's, of a task that `write_lm_eval_perplexity` wrote."""
    found = lm_eval(model, tokenizer, [name], manager, batch_size, bootstrap_iters=0)
    return float(found["results"][name]["word_perplexity,none"])
