"""The `task` column of a data set, on its way past the trainer to the model.

TRL takes out of the data all columns that it does not know, and its collators build batches of those that they know.
The trainer's list of columns and its collator are the two places that a column has to be named at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_mora import MtlLoraLinear
from peft_mora.base import REFERENCE
from peft_mora.checks import check_field, is_int, listed
from peft_mora.row_tasks import place

from .host import HostCallback, running_trainer


ONE_ROW = ("SFTTrainer", "KTOTrainer")  # of TRL's, those whose batches have one row for each record


class TaskColumnCallback(HostCallback):
    """Bring the data set's column of tasks to an adapter that has a part for each (`MtlLoraConfig`).

    Give it to the constructor of an SFTTrainer, a KTOTrainer or transformers' Trainer. The batches of training and of
    evaluation then have `task`, a name or number for each row, if their data has the column.

    Args:
        column: the column's name; its values are names of the config's `tasks`, or places in that list.

    Raises:
        ValueError: at the trainer's construction: a model that takes no tasks, a training set without the column or
            with tasks that the adapter does not know, packing, also of the evaluation, which puts several records
            into one row, a trainer whose batches have other rows than the records (DPO, Reward, GRPO, RLOO), or
            KTO's precompute_ref_log_probs with an adapter that has learnt before; at the start of training where
            add_callback came after it.

    Example:
        >>> SFTTrainer(model, train_dataset=train_dataset, callbacks=[TaskColumnCallback()],
        ...            peft_config=MtlLoraConfig(tasks=["maths", "code"], target_modules="all-linear"))
    """

    several = ""  # a second one of a column changes nothing

    def __init__(self, column: str = "task") -> None:
        check_field(isinstance(column, str) and bool(column), "column", column, "a column's name")
        self.column = column

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not takes_tasks(model):
            raise ValueError(
                "TaskColumnCallback is for an adapter that has a part for each task, and this model's has none: use "
                "peft_config=MtlLoraConfig(tasks=[...]), or leave the callback out."
            )
        trainer = running_trainer()
        if getattr(args, "precompute_ref_log_probs", False) and REFERENCE in getattr(model, "peft_config", {}):
            raise ValueError(
                "precompute_ref_log_probs asks the reference adapter without the column of tasks: it would answer all "
                "by its default task. Train with precompute_ref_log_probs=False."
            )
        if name := other_trainer(trainer, ONE_ROW):
            raise ValueError(
                f"TaskColumnCallback needs batches with one row for each record, as {listed(ONE_ROW, 'and')} make "
                f"them, and {name} makes others: pairs of answers, or answers of its own. Train with SFTTrainer, "
                "or one task at a time without the callback: MtlLoraConfig(default_task=...), or "
                "peft_mora.set_task(model, NAME) before each."
            )
        carry_column(trainer, self.column)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        check_carried(self)


def check_carried(callback: HostCallback) -> None:
    """Refuse a run whose batches have no tasks, as the trainer was made without this callback.

    Raises:
        ValueError: naming it.
    """
    if not isinstance(running_trainer().data_collator, WithTask):
        raise ValueError(
            f"{type(callback).__name__} has to be given to the trainer's constructor (callbacks=[...]): add_callback "
            "comes too late for the data's column of tasks."
        )


def takes_tasks(model: nn.Module) -> bool:
    """Whether the model's forward takes `task`."""
    return any(isinstance(module, MtlLoraLinear) for module in model.modules())


def other_trainer(trainer: Any, known: Sequence[str]) -> str:
    """The name of TRL's trainer that this one is, where it is none of those that are known; else ""."""
    of_trl = [cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")]
    return of_trl[0] if of_trl and not any(name in known for name in of_trl) else ""


def carry_column(trainer: Any, column: str) -> None:
    """Let a trainer's batches have a column of its data as `task`; a second call changes nothing.

    Raises:
        ValueError: as `TaskColumnCallback`.
    """
    if isinstance(trainer.data_collator, WithTask):
        check_field(column == trainer.data_collator.column, "column", column, "the same in all callbacks of a run")
        return
    args, data = trainer.args, trainer.train_dataset
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        raise ValueError(
            "packing and padding_free put several records into one row, which then has no task of its own. Train with "
            "packing=False and padding_free=False."
        )
    if getattr(args, "eval_packing", False) and trainer.eval_dataset is not None and takes_tasks(trainer.model):
        raise ValueError(
            "eval_packing puts several records into one row, and TRL drops the column: all would be measured by the "
            "default task. Train with eval_packing=False, or leave the evaluation out."
        )
    columns = getattr(data, "column_names", None)
    if columns is not None and column not in columns:
        raise ValueError(
            f"The training data has no column {column!r}; it has {', '.join(columns)}. Add one with the name or "
            "number of each record's task: dataset.add_column('task', [...])."
        )
    for task in distinct(data, column):
        for module in trainer.model.modules():
            if isinstance(module, MtlLoraLinear):
                for name in module.active_adapters:
                    if name in module.mtllora_rule:
                        place(task, module.mtllora_rule[name].tasks)
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, column]
    trainer.data_collator = WithTask(trainer.data_collator, column)


def distinct(data: Any, column: str) -> list[Any]:
    """The values of a column, each once; [] where the data is a stream."""
    return data.unique(column) if hasattr(data, "unique") else []


class WithTask:
    """A collator, and `task` beside what it makes: (rows,) int64, or a list of names."""

    def __init__(self, collator: Any, column: str) -> None:
        self.collator, self.column = collator, column

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator([{k: v for k, v in record.items() if k != self.column} for record in records])
        tasks = [record.get(self.column) for record in records]
        if all(task is None for task in tasks):
            return batch  # an evaluation on other data
        names = all(isinstance(task, str) for task in tasks)
        if not names and not all(is_int(task) for task in tasks):
            raise ValueError(
                f"Column {self.column!r} has {tasks} in one batch: give each record the name of its task, or its "
                "number."
            )
        batch["task"] = tasks if names else torch.tensor(tasks)
        return batch
