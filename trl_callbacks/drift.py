"""How far has training carried the model from its base, on text that no task is about? And, if wanted, no further."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_mora import MtlLoraLinear, use_exact_4bit_kernels
from peft_mora.checks import check_field, is_int, is_number, listed
from peft_mora.inputs import base_of, device_of, eval_mode, trainable_as_before, writes_text
from peft_mora.lora_file import check_base_kept

from .constraint import as_evaluated, averages
from .general_text import Batch, read, sample
from .host import HostCallback, callbacks_that


SECOND = " (z)"  # behind a parameter's name
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

    Raises:
        ValueError: an adapter has changed the base (PiSSA), which is not there to compare with.
    """
    check_base_kept(model.peft_config)
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    device = device_of(model)
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
            behind = slice(-ids.shape[1], -1)  # a soft prompt, which has places of its own
            new = model(**options).logits[:, behind][wanted].float().log_softmax(-1)
            with trainable_as_before(model), model.disable_adapter():
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

    Every `interval` steps, and at step `max_steps`, `drift_perplexity`, `drift_base_perplexity` and `drift_kl` go into
    the logs, in an entry of that step whatever `logging_steps`. With `max_kl`, weights that have gone beyond it come
    back, on the straight line to where they were at the last measurement within it, by halves until they are within
    it, or all the way; `drift_kept` logs the share of the way that is left. Constraints of
    OrthogonalProjectionCallback are linear and hold on that line as well. A run that ends at another step (early
    stopping), or with an earlier checkpoint's weights (`load_best_model_at_end`), is measured and held at its end too;
    checkpoints of steps between two measurements are as training left them.

    A measurement costs two forwards of `tokens` tokens; with `max_kl`, up to eight more where it is exceeded, and a
    copy of the trainable weights all the time, also in each checkpoint (`drift.safetensors`): a resumed run has the
    bound of the run that it goes on with.

    Args:
        source: text that no task is about, as for `protect`, but other text than is protected. "self" samples from
            another seed than `protect` does.
        interval: steps from one measurement to the next.
        tokens: how many tokens to measure on.
        max_kl: most KL(base ‖ adapted), in nats a token; None only measures.
        tokenizer: None is the trainer's.

    Raises:
        ValueError: a wrong argument; at the start of training, a second DriftCallback, no adapter that can be switched
            off, one that has changed the base (PiSSA), one that has to be told tasks and has no default, no causal
            language model, or no text. With `max_kl` also an adapter that is beyond it before the first step, a
            checkpoint that was trained without it, DeepSpeed or FSDP, and later an adapter that diverges or whose
            parameters are replaced.

    Example:
        >>> callbacks = [OrthogonalProjectionCallback(protect="self"), DriftCallback("pages.jsonl")]
        >>> SFTTrainer(model, args=args, train_dataset=train_dataset, callbacks=callbacks)
    """

    sidecar = "drift.safetensors"
    turn = 1
    several = "Give all texts to one, DriftCallback([*TEXTS, *OTHERS])."

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
        self.holds_weights = self.sets_weights = max_kl is not None
        self.tokenizer = tokenizer
        self._batches: list[Batch] = []
        self._held: dict[str, nn.Parameter] = {}  # what is trained
        self._within: dict[str, Tensor] = {}  # what `_moving` gave at the last measurement within max_kl
        self._found: dict[str, float] = {}
        self._measured = -1  # the step that this is of
        self._unlogged: dict[str, float] = {}

    def refusals(self) -> dict[str, str]:
        if self.max_kl is None:
            return {}
        instead = "cannot be brought back to within max_kl. Use DDP or one GPU, or leave max_kl out, and only measure."
        return {
            "deepspeed": f"DeepSpeed steps copies of the weights, which {instead}",
            "fsdp": f"FSDP holds the weights in pieces, which {instead}",
        }

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
        base = base_of(model)
        if not writes_text(base):
            raise ValueError(
                f"DriftCallback measures the next tokens of a causal language model, and {type(base).__name__} gives "
                "none. Train without it."
            )
        if self.max_kl is not None and (replacing := callbacks_that("replaces_weights")):
            raise ValueError(
                f"{replacing[0]} puts other parameters in the place of the adapter's: DriftCallback(max_kl=...) could "
                "not go back to earlier ones, or not say that those which are saved are within the bound. Train with "
                "one of the two (experts can be deleted afterwards: peft_mora.prune_experts), or without max_kl, "
                "which only measures."
            )
        check_base_kept(model.peft_config)
        _check_default_task(model)
        use_exact_4bit_kernels(model)
        tokenizer = self.tokenizer if self.tokenizer is not None else kwargs.get("processing_class")
        if self.source == "self":
            with trainable_as_before(model), model.disable_adapter():
                self._batches = sample(model, tokenizer, self.tokens, seed=1)
        else:
            self._batches = read(self.source, tokenizer, self.tokens, model)
        self._found = self._unlogged = {}
        self._measured = -1
        if self.max_kl is None:
            return
        before, self._held = self._held, _trainable(model)
        # The trainer begins anew, with a smaller batch, where memory has run out: the bound is this very run's.
        again = bool(self._within) and _are_those(self._held, before)
        if state.global_step > 0:
            self._within = self._restored(args, state, self.max_kl)
        elif not again:
            kl = self._measure(model)["kl"]
            if not kl <= self.max_kl:  # NaN is beyond all
                raise ValueError(
                    f"Before the first step the adapter is {kl:.4g} nats a token from its base on general text, and "
                    f"max_kl is {self.max_kl:g}: no weights within it are known, to come back to. Begin with a fresh "
                    "adapter, or give a larger max_kl: what earlier tasks have moved counts as well."
                )
            self._within = _copies(self._held)

    def _restored(self, args: TrainingArguments, state: TrainerState, max_kl: float) -> dict[str, Tensor]:
        """The weights within `max_kl` that the checkpoint keeps."""
        kept = self.saved(args, state)
        if kept is None:
            raise ValueError(
                f"The run resumes at step {state.global_step}, but the checkpoint has no {self.sidecar}, in which "
                f"this callback keeps weights that are within max_kl ({self.sidecar_path(args, state)} would be it). "
                "Resume from a checkpoint that this release wrote with max_kl, or start the run again."
            )
        bound = float(kept.pop("max_kl"))
        if bound > max_kl:
            raise ValueError(
                f"The run resumes with max_kl={max_kl:g}, but the weights that its checkpoint keeps are within "
                f"{bound:g}. Resume with max_kl={bound:g}, or start the run again."
            )
        within = {name.removeprefix("within."): t for name, t in kept.items()}
        if others := sorted({name.removesuffix(SECOND) for name in within} ^ self._held.keys()):
            raise ValueError(
                f"The run resumes with other parameters in training than its checkpoint was trained with, e.g. "
                f"{others[0]!r}. Resume with the adapter that it began with. Of several active ones a trainer that "
                "resumes trains the first: model.base_model.set_adapter([NAME, OLD])."
            )
        return {name: t.to(self._held[name.removesuffix(SECOND)]) for name, t in within.items()}

    def kept(self) -> dict[str, Tensor]:
        if self.max_kl is None:
            return {}
        within = {f"within.{name}": t for name, t in self._within.items()}
        return {"max_kl": torch.tensor(self.max_kl, dtype=torch.float64), **within}

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self.interval and state.global_step < state.max_steps:
            return
        with as_evaluated(optimizer):
            self._hold(model, state, optimizer, _trainable(model))
        self._unlogged = {f"drift_{name}": value for name, value in self._found.items()}
        control.should_log = True

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        best = args.load_best_model_at_end
        if self._measured != state.global_step or best:
            # The best checkpoint's weights may be frozen by now: what is held are the same parameters.
            parameters = {name: p for name, p in model.named_parameters() if name in self._held}
            with nullcontext() if best else as_evaluated(optimizer):
                self._hold(model, state, None if best else optimizer, parameters)
        self._batches, self._held, self._within = [], {}, {}
        if state.is_world_process_zero:
            said = "general text: perplexity {base_perplexity:.2f} -> {perplexity:.2f}, KL {kl:.4f} nats a token"
            if self._found.get("kept", 1.0) < 1:
                said += f" (brought back to within max_kl={self.max_kl:g}: {{kept:g}} of the way)"
            print(said.format(**self._found))

    @torch.no_grad()
    def _hold(self, model: Any, state: TrainerState, optimizer: Any, parameters: dict[str, nn.Parameter]) -> None:
        """Measure and, with `max_kl`, bring `parameters`, which have to be those that are held, back to within it."""
        found = self._measure(model)
        if self.max_kl is not None:
            if math.isnan(found["kl"]):
                raise ValueError(
                    f"At step {state.global_step} the adapter's answers to general text are not finite: training has "
                    "diverged, and so has the optimizer's state, so nothing leads back to within max_kl. Train again "
                    "with a lower learning rate, from a checkpoint before it if there is one."
                )
            if not _are_those(parameters, self._held):
                raise ValueError(
                    f"At step {state.global_step} the parameters in training are not those that the run began with, "
                    "whose weights within max_kl are kept: another callback has replaced, frozen or added some. Train "
                    "without that callback, or without max_kl."
                )
            moving = self._moving(optimizer)
            kept, reached = 1.0, _copies(moving) if found["kl"] > self.max_kl else {}
            for kept in (0.5, 0.25, 0.125, 0.0) if reached else ():
                for name, t in moving.items():
                    begin = self._within.get(name)  # z begins as the weights do
                    within = self._within[name.removesuffix(SECOND)] if begin is None else begin
                    t.copy_(torch.lerp(within, reached[name], kept))
                found = self._measure(model)
                if found["kl"] <= self.max_kl:
                    break
            self._within = _copies(moving)
            found["kept"] = kept
        self._found, self._measured = found, state.global_step

    def _moving(self, optimizer: Any) -> dict[str, Tensor]:
        """What is trained, and the second sequence z of a schedule-free optimizer, under its parameter's name and
        `SECOND`: what that steps next lies between both."""
        second = {f"{name}{SECOND}": z for name, p in self._held.items() for z in averages(optimizer, [p])}
        return {**self._held, **second}

    def metrics(self) -> dict[str, float]:
        found, self._unlogged = self._unlogged, {}
        return found

    def _measure(self, model: Any) -> dict[str, float]:
        found = drift(model, self._batches)
        if dist.is_available() and dist.is_initialized():  # all ranks must decide alike
            values = torch.tensor(list(found.values()), dtype=torch.float64).to(device_of(model))
            dist.broadcast(values, 0)
            found = dict(zip(found, values.tolist(), strict=True))
        return found


def _trainable(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _check_default_task(model: nn.Module) -> None:
    """Refuse an adapter that has to be told the task of each row: general text is of none.

    Raises:
        ValueError: it acts, and has no default task.
    """
    for layer in (module for module in model.modules() if isinstance(module, MtlLoraLinear)):
        for name in layer.active_adapters:
            rule = layer.mtllora_rule.get(name)
            if rule is not None and rule.default is None:
                raise ValueError(
                    f"DriftCallback measures on text that no task is about, and adapter {name!r} has a part for each "
                    f"of {listed(map(repr, rule.tasks), 'and')} and no default task to read it by. Choose one, "
                    "peft_mora.set_task(model, NAME) or MtlLoraConfig(default_task=NAME): batches that say their "
                    "tasks are learnt by those all the same. Or train without DriftCallback."
                )


def _are_those(parameters: dict[str, nn.Parameter], before: dict[str, nn.Parameter]) -> bool:
    return parameters.keys() == before.keys() and all(p is before[name] for name, p in parameters.items())


def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}
