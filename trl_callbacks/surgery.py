"""Tasks of one batch whose gradients pull against each other: take out of each what undoes another.

    g_i the gradient of task i's share of the loss: its tokens' losses over the number of tokens of the whole step
    "pcgrad": for each i, over the others j in random order, where g_i·g_j < 0: g_i <- g_i - (g_i·g_j / ‖g_j‖²) g_j
    the step takes Σ_i g_i, which without a conflict is the trainer's own gradient

Every rule here is a combination Σ_j λ_j g_j, whose λ follow from the products g_i·g_j alone.

Source: "Gradient Surgery for Multi-Task Learning" (PCGrad), arXiv 2001.06782, algorithm 1.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_mora.checks import check_field, is_int, is_number, listed
from peft_mora.inputs import base_of, placeholders, towers

from .host import HostCallback, StepInPlace, running_trainer
from .task_column import carry_column, check_carried, distinct, other_trainer, takes_tasks


def pcgrad(products: Tensor, generator: torch.Generator) -> Tensor:
    """λ of PCGrad.

    Args:
        products: (N, N) g_i·g_j.
        generator: draws, for each task, the order of the others.

    Returns:
        (N,) in the dtype of `products`; all 1 where no two tasks are in conflict.
    """
    own = torch.eye(len(products), dtype=products.dtype)  # each g_i as a combination of the g_j
    for i, row in enumerate(own):
        for j in torch.randperm(len(products), generator=generator).tolist():
            product = row @ products[j]
            if j != i and product < 0:
                row[j] -= product / products[j, j]
    return own.sum(0)


NEEDS = (
    "GradientSurgeryCallback needs a trainer whose loss is a sum over tokens, divided by their number in the step, as "
    "SFTTrainer's is, and a task for each record."
)
TEXT_ALONE = (
    "GradientSurgeryCallback takes batches apart by their rows, and images and sounds come as patches, or several to "
    "a row: whose they are nobody knows here."
)
MEDIA = re.compile("pixel|image|video|audio|vision|input_features|input_values|patch|frames")  # in names of inputs
Rule = Callable[[Tensor, torch.Generator], Tensor]
TORCHJD = {"cagrad": ("CAGradWeighting", "torchjd[cagrad]"), "mgda": ("MGDAWeighting", "torchjd")}


def of_torchjd(name: str, **options: Any) -> Rule:
    """A rule of torchjd's (MIT licence), whose λ are for the mean of the tasks' gradients: times N for their sum.

    Raises:
        ImportError: it, or what it needs for this rule, is not installed; with the line that installs it.
    """
    weighting, package = TORCHJD[name]
    try:
        find = getattr(importlib.import_module("torchjd.aggregation"), weighting)(**options)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f'rule={name!r} is torchjd\'s ({error}). Install it: pip install "{package}>=0.18"; or take '
            "rule='pcgrad', which needs nothing."
        ) from error
    return lambda products, _: len(products) * find(products)


class GradientSurgeryCallback(HostCallback):
    """Train on tasks that are mixed in the batches, with what each task's gradient would undo of another's taken out.

    For a plain SFTTrainer and any adapter of PEFT's or ours; the data needs a column with the task of each record, a
    name or a number. Each micro-batch goes through the trainer's own step in as many parts as it has tasks, so that
    there is a gradient for each; at the last micro-batch of a step they are combined, before clipping. What trains
    beside the adapter (`modules_to_save`) takes part. What other callbacks add to gradients at the start of a step is
    left as it is.

    Cost: N gradients of all that trains, in float32 (64-bit weights: in 64 bits), beside the usual one. Every token is
    computed once, as ever; parts of few rows use a GPU less well.

    The step of a batch in which all tasks agree is the one that it would have been, but for the randomness of dropout,
    and for FLYLORA's and SMORA's load-balance offset, which moves once for each part.
    Every logging step the logs get, over the steps since the last one, `gradient_conflicts` (share of pairs of tasks
    with g_i·g_j < 0) and `gradient_changed` (norm of what surgery changed, over that of Σ g_i).

    Args:
        rule: "pcgrad"; or "cagrad" (arXiv 2110.14048), "mgda" (Désidéri 2012) through torchjd if it is installed.
        column: the data's column of tasks.
        seed: of PCGrad's random orders, which are drawn anew for each step: a run that resumes repeats them.
        c: of "cagrad", how far the step may be from the mean gradient, in units of its norm, >= 0.

    Raises:
        ValueError: on construction for a wrong argument; at the trainer's construction for data without the column,
            with one task alone or with images, packing, a trainer of TRL's other than SFTTrainer, or a run of several
            processes; at the start of training for a trainer whose loss is no sum over tokens; in a step for a batch
            with images or sounds.
        ImportError: on construction, a rule of torchjd's without it.

    Example:
        >>> SFTTrainer(model, train_dataset=train_dataset, peft_config=LoraConfig(target_modules="all-linear"),
        ...            callbacks=[GradientSurgeryCallback()])
    """

    def __init__(self, rule: str = "pcgrad", *, column: str = "task", seed: int = 0, c: float = 0.5) -> None:
        names = ("pcgrad", *TORCHJD)
        check_field(rule in names, "rule", rule, listed(map(repr, names)))
        check_field(isinstance(column, str) and bool(column), "column", column, "a column's name")
        check_field(is_int(seed) and 0 <= seed < 2**31, "seed", seed, "an integer >= 0")
        check_field(is_number(c) and c >= 0, "c", c, "a number >= 0")
        self.column, self.seed = column, seed
        self.rule = pcgrad if rule == "pcgrad" else of_torchjd(rule, **({"c": c} if rule == "cagrad" else {}))
        self._gradients: dict[Any, dict[Any, Tensor]] = {}  # task -> parameter -> gradient
        self._others: dict[Any, Tensor] = {}  # of no task
        self._trainer: Any = None
        self._in_place = StepInPlace()
        self._seen = torch.zeros(4, dtype=torch.float64)  # conflicts, pairs, squared change, squared norm

    def refusals(self) -> dict[str, str]:
        alone = "Train in one process, or without the callback."
        several = (
            "Gradients of tasks would have to be averaged over the processes task by task before they are combined."
        )
        return {
            "deepspeed": f"DeepSpeed keeps gradients to itself, and steps inside backward. {alone}",
            "fsdp": f"FSDP holds gradients in pieces. {alone}",
            "processes": f"{several} {alone}",
            "data_parallel": f"{several} Make one GPU visible (CUDA_VISIBLE_DEVICES=0).",
            "layerwise": "An optimizer that steps inside backward (layer-wise, LOMO) would step by each task in turn. "
            "Use another `optim`.",
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.refuse(args)
        trainer = running_trainer()
        if name := other_trainer(trainer, ("SFTTrainer",)):
            raise ValueError(
                f"{NEEDS} {name}'s loss is another, or its batches have other rows than the records: pairs of "
                "answers, or answers of its own. Train with SFTTrainer, or leave the callback out."
            )
        pictures = {"image", "images"}.intersection(getattr(trainer.train_dataset, "column_names", None) or ())
        if pictures and towers(model):
            raise ValueError(
                f"{TEXT_ALONE} The data has {listed(map(repr, sorted(pictures)), 'and')}. Leave the callback out; or, "
                "to train on the text alone, the column: dataset.remove_columns(NAME)."
            )
        carry_column(trainer, self.column)
        tasks = distinct(trainer.train_dataset, self.column)
        if len(tasks) == 1:
            raise ValueError(
                f"All records are of one task, {tasks[0]!r}: there is nothing between tasks to resolve. Leave "
                "GradientSurgeryCallback out, or name the tasks apart."
            )
        there = model._forward_pre_hooks.values()  # of an earlier trainer of this model
        if not takes_tasks(model) and _without_task not in there:  # an evaluation's batches have the column, too
            model.register_forward_pre_hook(_without_task, with_kwargs=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        check_carried(self)
        trainer = running_trainer()
        sums = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        if not sums or getattr(trainer, "aux_loss_enabled", False):
            raise ValueError(
                f"{NEEDS} The load-balancing loss of a mixture (router_aux_loss_coef) is a mean of each batch. Leave "
                "it out, or the callback."
            )
        self._gradients, self._others, self._seen = {}, {}, torch.zeros_like(self._seen)
        self._trainer = trainer
        self._step = self._in_place.put(lambda whole, *args, **kwargs: self._step_by_task(*args, **kwargs))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._in_place.put_back()
        self._trainer, self._gradients, self._others = None, {}, {}

    def _step_by_task(
        self, model: Any, inputs: Mapping[str, Any], num_items_in_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        """The trainer's step of one micro-batch, part by part: its loss (), and, at the last one of an optimizer's
        step, the gradients."""
        if num_items_in_batch is None or "task" not in inputs:
            raise ValueError(
                f"{NEEDS} A batch has no labels to count, as those of preference trainers, or no `task`. Leave the "
                "callback out."
            )
        _check_text_alone(model, inputs)
        tasks = inputs["task"].tolist() if isinstance(inputs["task"], Tensor) else list(inputs["task"])
        _add(self._others, model)
        losses, found = [], sorted(set(tasks), key=str)
        steps = self._trainer.current_gradient_accumulation_steps
        self._trainer.current_gradient_accumulation_steps = steps * len(found)  # for losses that are means
        try:
            for task in found:
                rows = [row for row, own in enumerate(tasks) if own == task]
                part = {name: _rows(value, rows, len(tasks)) for name, value in inputs.items()}
                losses.append(self._step(model, part, num_items_in_batch, **kwargs))
                _add(self._gradients.setdefault(task, {}), model)
        finally:
            self._trainer.current_gradient_accumulation_steps = steps
        if self._trainer.accelerator.sync_gradients:
            self._combine()
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _combine(self) -> None:
        """Give each parameter the combined gradient of the step."""
        tasks = [self._gradients[task] for task in sorted(self._gradients, key=str)]
        parameters = {id(p): p for gradients in (*tasks, self._others) for p in gradients}.values()
        products = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
        for p in parameters:
            rows = torch.stack([g[p].flatten() if p in g else p.new_zeros(p.numel(), dtype=wide(p)) for g in tasks])
            products += (rows @ rows.T).double().cpu()
        generator = torch.Generator().manual_seed((self.seed << 32) + self._trainer.state.global_step)
        finite = bool(products.isfinite().all())  # an overflow of fp16 is the optimizer's to see
        weights = self.rule(products, generator) if finite else torch.ones(len(tasks), dtype=products.dtype)
        for p in parameters:
            parts = [(w, g[p]) for w, g in zip(weights.tolist(), tasks, strict=True) if p in g]
            if p in self._others:
                parts.append((1.0, self._others[p]))
            p.grad = torch.stack([w * g for w, g in parts]).sum(0).to(p.dtype)
        upper, change = products.triu(1), weights - 1
        self._seen += torch.stack([
            (upper < 0).sum().double(), torch.tensor(len(tasks) * (len(tasks) - 1) / 2, dtype=torch.float64),
            change @ products @ change, products.sum(),
        ])  # fmt: skip
        self._gradients, self._others = {}, {}

    def metrics(self) -> dict[str, float]:
        conflicts, pairs, change, norm = self._seen.tolist()
        self._seen = torch.zeros_like(self._seen)
        found = {"gradient_conflicts": conflicts / pairs} if pairs else {}
        return found | ({"gradient_changed": max(0.0, change / norm) ** 0.5} if norm > 0 else {})


def _without_task(model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {name: value for name, value in kwargs.items() if name != "task"}


def _add(gradients: dict[Any, Tensor], model: Any) -> None:
    """Move the model's gradients there, onto those that are there, in float32 or wider."""
    for p in model.parameters():
        if p.grad is not None:
            grad = p.grad.to(wide(p))
            gradients[p] = gradients[p] + grad if p in gradients else grad
            p.grad = None


def wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _check_text_alone(model: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse a batch with images or sounds.

    Raises:
        ValueError: it has some, by the names of its inputs or by tokens that stand for them.
    """
    found = [name for name, value in inputs.items() if value is not None and MEDIA.search(name)]
    ids, stand_ins = inputs.get("input_ids"), placeholders(base_of(model))
    if not found and stand_ins and isinstance(ids, Tensor):
        found = ["input_ids"] if bool(torch.isin(ids, torch.tensor(stand_ins, device=ids.device)).any()) else []
    if found:
        raise ValueError(
            f"{TEXT_ALONE} This batch has them in {listed(map(repr, found), 'and')}. Leave the callback out, or train "
            "on text alone."
        )


def _rows(value: Any, rows: list[int], count: int) -> Any:
    """Of what a batch has for each of `count` rows, those; anything else as it is."""
    if isinstance(value, Tensor) and value.dim() and len(value) == count:
        return value[rows]
    return [value[row] for row in rows] if isinstance(value, (list, tuple)) and len(value) == count else value
