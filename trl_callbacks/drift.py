"""How far has training carried the model from its base, on text that no task is about? And, if wanted, no further."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_mora import use_exact_4bit_kernels
from peft_mora.checks import check_field, is_int, is_number
from peft_mora.inputs import eval_mode

from .general_text import Batch, read, sample
from .host import HostCallback


ROWS = 4  # sequences whose logits are there at a time: (4, 256, V) twice


@torch.no_grad()
def drift(model: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Perplexity with and without the adapters, and KL(base ‖ adapted), over the next tokens of `batches`.

    The base is the same model with its adapters switched off: a second forward and no second model.

    Args:
        model: a PEFT model; it is in eval mode during the call, and as before after it.
        batches: input_ids and attention_mask, (B, S) each.

    Returns:
        "perplexity", "base_perplexity" and "kl", the mean over tokens in nats, from logits in float32.
    """
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    device = next(p.device for p in model.parameters() if p.device.type != "meta")
    rows = (
        (ids.to(device), mask.to(device))
        for batch in batches
        for ids, mask in zip(batch["input_ids"].split(ROWS), batch["attention_mask"].split(ROWS), strict=True)
    )
    with eval_mode(model):
        for ids, mask in rows:
            wanted = (mask[:, 1:] & mask[:, :-1]).bool()
            target = ids[:, 1:][wanted]
            options = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            new = model(**options).logits[:, :-1][wanted].float().log_softmax(-1)
            with model.disable_adapter():
                old = model(**options).logits[:, :-1][wanted].float().log_softmax(-1)
            kl = F.kl_div(new, old, reduction="batchmean", log_target=True)
            sums += len(target) * torch.stack([F.nll_loss(new, target), F.nll_loss(old, target), kl]).cpu()
            count += len(target)
    means = sums / count
    after, before = means[:2].exp().tolist()  # infinite beyond 709 nats, where math.exp raises
    mean_kl = max(float(means[2]), 0.0)  # 0 but for rounding; NaN stays
    return {"perplexity": after, "base_perplexity": before, "kl": mean_kl}


class DriftCallback(HostCallback):
    """Log how general text fares while a task is learnt and, with `max_kl`, hold the adapter where it fares well.

    Every `interval` steps, and at the last one, `drift_perplexity`, `drift_base_perplexity` and `drift_kl` go into the
    logs. With `max_kl`, weights that have gone beyond it come back, on the straight line to where they were at the
    last measurement within it, by halves until they are within it, or all the way; `drift_kept` logs the share of the
    way that is left. Constraints of OrthogonalProjectionCallback are linear and hold on that line as well.

    A measurement costs two forwards of `tokens` tokens; with `max_kl`, four more where it is exceeded, and a copy of
    the trainable weights all the time.

    Args:
        source: text that no task is about, as for `protect`, but other text than is protected. "self" samples from
            another seed than `protect` does.
        interval: steps from one measurement to the next.
        tokens: how many tokens to measure on.
        max_kl: most KL(base ‖ adapted), in nats a token; None only measures.
        tokenizer: None is the trainer's.

    Raises:
        ValueError: a wrong argument; at the start of training, no adapter that can be switched off, or no text.

    Example:
        >>> callbacks = [OrthogonalProjectionCallback(protect="self"), DriftCallback("pages.jsonl")]
        >>> SFTTrainer(model, args=args, train_dataset=train_dataset, callbacks=callbacks)
    """

    def __init__(
        self,
        source: Any = "self",
        *,
        interval: int = 50,
        tokens: int = 2048,
        max_kl: float | None = None,
        tokenizer: Any = None,
    ) -> None:
        check_field(is_int(interval) and interval >= 1, "interval", interval, "an integer >= 1")
        check_field(is_int(tokens) and tokens >= 2, "tokens", tokens, "an integer >= 2")
        check_field(max_kl is None or (is_number(max_kl) and max_kl > 0), "max_kl", max_kl, "a number > 0, or None")
        self.source, self.interval, self.tokens, self.max_kl = source, interval, tokens, max_kl
        self.holds_weights = max_kl is not None
        self.tokenizer = tokenizer
        self._batches: list[Batch] = []
        self._within: list[Tensor] = []  # the trainable weights at the last measurement within max_kl
        self._found: dict[str, float] = {}
        self._unlogged: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                "DriftCallback compares a PEFT model with its base, by switching the adapter off, and this model has "
                "none, or inside of it (sentence-transformers). Give the trainer a peft_config, or a model from "
                "get_peft_model."
            )
        use_exact_4bit_kernels(model)
        tokenizer = self.tokenizer if self.tokenizer is not None else kwargs.get("processing_class")
        if self.source == "self":
            with model.disable_adapter():
                self._batches = sample(model, tokenizer, self.tokens, seed=1)
        else:
            self._batches = read(self.source, tokenizer, self.tokens, model)
        self._found = self._unlogged = {}
        if self.max_kl is not None:
            self._within = [p.detach().clone() for p in _trainable(model)]

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.interval and state.global_step < state.max_steps:
            return
        found, kept = self._measure(model), 1.0
        if self.max_kl is not None:
            if math.isnan(found["kl"]):
                raise ValueError(
                    f"At step {state.global_step} the adapter's answers to general text are not finite: training has "
                    "diverged, and so has the optimizer's state, so nothing leads back to within max_kl. Train again "
                    "with a lower learning rate, from a checkpoint before it if there is one."
                )
            reached = [p.detach().clone() for p in _trainable(model)] if found["kl"] > self.max_kl else []
            for kept in (0.5, 0.25, 0.125, 0.0) if reached else ():
                for p, start, end in zip(_trainable(model), self._within, reached, strict=True):
                    p.copy_(torch.lerp(start, end, kept))
                found = self._measure(model)
                if found["kl"] <= self.max_kl:
                    break
            self._within = [p.detach().clone() for p in _trainable(model)]
            found["kept"] = kept
        self._found = found
        self._unlogged = {f"drift_{name}": value for name, value in found.items()}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._batches, self._within = [], []
        if self._found and state.is_world_process_zero:
            print(
                "general text: perplexity {base_perplexity:.2f} -> {perplexity:.2f}, KL {kl:.4f} nats a token".format(
                    **self._found
                )
            )

    def metrics(self) -> dict[str, float]:
        found, self._unlogged = self._unlogged, {}
        return found

    def _measure(self, model: Any) -> dict[str, float]:
        found = drift(model, self._batches)
        if dist.is_available() and dist.is_initialized():  # all ranks must decide alike
            values = torch.tensor(list(found.values()), dtype=torch.float64).to(next(model.parameters()).device)
            dist.broadcast(values, 0)
            found = dict(zip(found, values.tolist(), strict=True))
        return found


def _trainable(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]
