"""Which task each row of a batch is of, on its way from the model's call to its layers.

A call says it in `task`, a name or a number for each row. A hook takes it out before the model sees it, the layers ask
here. In the backward the hook of a forward's output brings that forward's rows back, so that gradient checkpointing
computes each block again by what it was computed by, also where several forwards come before their backwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .checks import listed
from .inputs import before_backward, recomputing


class Rows:
    """The tasks of one batch.

    Args:
        names: a task's name or number for each row, or one for all; None where the call does not say.
        lengths: how many tokens each sequence of the batch has in all its rows, for layers that see them as (T, I).
        repeated: whether a layer may see each row several times, as in beam search.
    """

    def __init__(self, names: Any = None, lengths: Sequence[int] = (), repeated: bool = False) -> None:
        names = names.tolist() if hasattr(names, "tolist") else names  # of torch or NumPy
        names = [names] if is_one(names) else names
        self.names: list[Any] | None = None if names is None else list(names)
        self.lengths, self.repeated = set(lengths), repeated
        self.found: dict[tuple, int | Tensor] = {}

    def places(self, tasks: Sequence[str], device: torch.device) -> int | Tensor | None:
        """Where in `tasks` each row's is: (rows,) int64 on the device, one number if they are all of one task, None if
        the call does not say.

        Raises:
            ValueError: one is not in `tasks`.
        """
        if self.names is None:
            return None
        key = (*tasks, device)
        if key not in self.found:
            places = [place(name, tasks) for name in self.names]
            one = len(set(places)) == 1
            self.found[key] = places[0] if one else torch.tensor(places, dtype=torch.int64, device=device)
        return self.found[key]

    def check(self, shape: Sequence[int], what: str = "an input of a layer") -> None:
        """Refuse a layer's input whose tokens cannot be told apart by the rows' tasks, which are of several.

        Args:
            shape: the input's without its last axis: (B, S, ..), or (B·S,).
            what: it is, for the error.

        Raises:
            ValueError: the first axis is neither the batch's rows nor all of its tokens.
        """
        assert self.names is not None
        rows = len(self.names)
        if len(shape) > 1:
            fits = shape[0] == rows or (self.repeated and shape[0] % rows == 0)
        else:
            fits = len(shape) == 1 and shape[0] in self.lengths and shape[0] % rows == 0
        if not fits:
            raise ValueError(
                f"`task` names the tasks of {rows} rows, and {what} is of shape {tuple(shape)} before the features: "
                "other rows than those. Give one task for each row of the batch; leave modules that see other rows "
                "(experts of a mixture, vision towers, poolers) out of `target_modules`, or put rows of one task into "
                "a batch."
            )


def is_one(task: Any) -> bool:
    """Whether this names one task, for all rows: a name or a number, of torch or NumPy too."""
    return isinstance(task, (str, Integral)) or getattr(task, "ndim", 1) == 0


def place(name: Any, tasks: Sequence[str]) -> int:
    """The number of a task that is given by its name or its number.

    Raises:
        ValueError: it is not one of `tasks`.
    """
    if isinstance(name, str) and name in tasks:
        return list(tasks).index(name)
    if isinstance(name, Integral) and not isinstance(name, bool) and 0 <= int(name) < len(tasks):
        return int(name)
    raise ValueError(
        f"Task {name!r} is none of this adapter's: {listed(map(repr, tasks), 'and')}. Name one of them, or give its "
        f"number, 0 to {len(tasks) - 1}."
    )


def the_only(adapters: Sequence[str], name: str) -> str | None:
    """The adapter that a row's "adapter/task" names; None where there is none.

    Raises:
        ValueError: several have a task of that name.
    """
    if len(adapters) > 1:
        raise ValueError(
            f"Row name {name!r} is of a task of {listed(map(repr, adapters), 'and')}: which one is not said. Give one "
            "of these adapters another name, without '/'."
        )
    return adapters[0] if adapters else None


class RowTasks:
    """The rows of the forward, or the recomputation, that a model is in.

    Attributes:
        rows: those of now.
    """

    def __init__(self) -> None:
        self.rows = self.resting = Rows()  # in between forwards: not said, but while an answer is generated
        self.called = ""  # "model" or "stack" while it runs, the outer one
        self.handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        """Take `task` out of each call of the model, and of the stack that a trainer may call in its place."""
        stack = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
        self.handles.append(model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        self.handles.append(model.register_forward_hook(partial(self._leave, "model"), always_call=True))
        if isinstance(stack, nn.Module) and stack is not model:
            self.handles.append(stack.register_forward_pre_hook(self._enter_stack, with_kwargs=True))
            self.handles.append(stack.register_forward_hook(partial(self._leave, "stack"), always_call=True))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @contextmanager
    def answering(self, task: Any, prompts: Tensor | None) -> Iterator[None]:
        """All forwards of the block are of these rows, each perhaps several times, unless they say otherwise.

        Args:
            prompts: (B, ..) what is answered, a row each.

        Raises:
            ValueError: the tasks are not one for all, nor one for each.
        """
        if prompts is not None and not is_one(task):
            Rows(task).check(prompts.shape[:2], "the prompts' batch")
        before = self.resting
        self.rows = self.resting = Rows(task, repeated=True)
        try:
            yield
        finally:
            self.rows = self.resting = before

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        task = kwargs.get("task")
        if task is None and self.resting.names is None:
            self.rows = self.resting
        else:
            if getattr(module, "_is_replica", False):
                raise ValueError(
                    "Rows of several tasks cannot be told apart under nn.DataParallel, whose replicas run at once in "
                    "one process. Use one GPU (CUDA_VISIBLE_DEVICES=0), or a process for each: `accelerate launch`."
                )
            inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 1]
            names = self.resting.names if task is None else task
            self.rows = Rows(names, [t.shape[0] * t.shape[1] for t in inputs], repeated=task is None)
            if task is not None and not is_one(task) and inputs:
                self.rows.check(inputs[0].shape[:2], "the batch")
        return (args, {k: v for k, v in kwargs.items() if k != "task"}) if "task" in kwargs else None

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.called = "model"
        return self._enter(module, args, kwargs)

    def _enter_stack(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # It is the whole call where `task` says so, or where no model called it and no backward computes it again.
        if "task" not in kwargs and (self.called or recomputing()):
            return None
        self.called = self.called or "stack"
        return self._enter(module, args, kwargs)

    def _leave(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self.called != name:
            return
        rows, self.called = self.rows, ""
        before_backward(module, output, lambda: setattr(self, "rows", rows))
        # A trainer goes on with the head after the stack, and a backward with parts of what it computed again.
        if name == "model" and not recomputing():
            self.rows = self.resting

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": Rows(), "resting": Rows(), "called": ""}
