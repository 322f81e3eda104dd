"""What our callbacks stand on: what no event of the trainer's tells or does.

refusals     kinds of run that a callback cannot work in, as one table
metrics      into the logs before a tracker gets them
sidecar      a callback's tensors in a file of its own in the folder of each checkpoint
frames       what the trainer knows and passes to no event, read from its variables
batches      a few of the training data's, without moving the trainer's own order
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from peft_mora.checks import listed
from peft_mora.files import whole_file
from peft_mora.inputs import unmoved


def _through(backend: str) -> Callable[[TrainingArguments], bool]:
    """Whether a run uses a backend, by its arguments or by `accelerate launch`."""
    variable = f"ACCELERATE_USE_{backend.upper()}"
    return lambda args: bool(getattr(args, backend, None)) or os.environ.get(variable, "") in ("true", "1")


def _within_backward(args: TrainingArguments) -> bool:
    """Whether the optimizer steps there, each parameter by itself."""
    name = str(getattr(args.optim, "value", args.optim))
    return bool({"layerwise", "lomo", "adalomo"}.intersection(name.split("_")))


def _samples(args: TrainingArguments) -> bool:
    """Whether the trainer writes completions within a training step: GRPO, RLOO, Online DPO, GKD unless all of its
    answers are the data's. ORPO and CPO cut completions only, and distillation has a temperature only."""
    lengths = ("max_completion_length", "max_new_tokens")
    samples = hasattr(args, "temperature") and any(hasattr(args, length) for length in lengths)
    return samples and getattr(args, "lmbda", 1.0) > 0


KINDS: dict[str, Callable[[TrainingArguments], bool]] = {
    "deepspeed": _through("deepspeed"),
    "fsdp": _through("fsdp"),
    "processes": lambda args: args.world_size > 1,
    "data_parallel": lambda args: args.n_gpu > 1,
    "best_model": lambda args: bool(args.load_best_model_at_end),
    "layerwise": _within_backward,
    "generates": _samples,
}


class HostCallback(TrainerCallback):
    """The base of our callbacks; each says what it refuses, logs and keeps."""

    sidecar: str  # the name of the file in a checkpoint's folder that has `kept`
    several: str = "Give the trainer one of them."  # what to do instead of several; "": there may be several
    holds_weights: bool = False  # whether it goes wrong where another callback replaces the adapter's parameters
    sets_weights: bool = False  # whether it moves the adapter's weights itself, to where it holds them
    replaces_weights: bool = False  # whether it puts other parameters in the place of the adapter's
    turn: int = 0  # among ours: 1 measures the model and may bring it back, 2 looks at what all others leave

    @property
    def slot(self) -> str:
        """Where it keeps and logs what it knows, which in one run is one callback's."""
        return getattr(self, "sidecar", f"{type(self).__name__} {getattr(self, 'adapter_name', None)}")

    @property
    def logs(self) -> bool:
        """Whether it has numbers for the logs."""
        return type(self).metrics is not HostCallback.metrics

    def refusals(self) -> dict[str, str]:
        """Kind of run (of `KINDS`) -> why it cannot be and what to do instead."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Numbers for the logs of a training step; {} for none. Called once for each."""
        return {}

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this callback, for `saved` to find; {} writes no file."""
        return {}

    def refuse(self, args: TrainingArguments) -> None:
        """Refuse a run of a kind that the callback cannot work in.

        Raises:
            ValueError: with the refusal.
        """
        for kind, message in self.refusals().items():
            if KINDS[kind](args):
                raise ValueError(message)

    def saved(self, args: TrainingArguments, state: TrainerState) -> dict[str, Tensor] | None:
        """`kept` of the checkpoint that the run resumes from, or None.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.sidecar_path(args, state)
        try:
            return load_file(path) if path.is_file() else None
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): resume from another checkpoint.") from error

    def saved_here(self, args: TrainingArguments, state: TrainerState) -> dict[str, Tensor]:
        """`saved`, of a run that must have had this callback from its begin.

        Raises:
            ValueError: it has not.
        """
        kept = self.saved(args, state)
        if kept is None:
            raise ValueError(
                f"The run resumes at step {state.global_step}, but the checkpoint has no {self.sidecar}: it was "
                "trained without this callback, or stopped while it was saved. Resume with the callbacks that the run "
                "began with, from a checkpoint that is whole."
            )
        return kept

    def sidecar_path(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Of the checkpoint that the run resumes from."""
        folder = caller_local("resume_from_checkpoint")
        if not isinstance(folder, (str, Path)):
            folder = checkpoint_folder(args, state)
        return Path(folder) / self.sidecar

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.refuse(args)
        self._check_alone()
        if args.load_best_model_at_end:
            check_best(running_trainer().model)
        own = any(KINDS[kind](args) for kind in ("deepspeed", "fsdp", "layerwise"))  # an optimizer of copies or pieces
        if not own and (handler := _handler_of(self)) is not None:
            check_optimizer(handler.model, handler.optimizer)
        if self.logs:
            ahead_of_reporters(self)

    def _check_alone(self) -> None:
        """Refuse a second callback of the same slot.

        Raises:
            ValueError: naming both.
        """
        handler = _handler_of(self)
        ours = [c for c in handler.callbacks if isinstance(c, HostCallback)] if handler is not None else []
        same = [type(callback).__name__ for callback in ours if callback.slot == self.slot]
        if len(same) > 1 and self.several:
            raise ValueError(
                f"The run has {listed(same, 'and')} for one adapter, which log under the same names and keep the same "
                f"file: what one says would be lost. {self.several}"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        metrics = self.metrics()
        logs.update(metrics)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = checkpoint_folder(args, state)
        if args.should_save and folder.is_dir() and (kept := self.kept()):
            with whole_file(folder / self.sidecar) as written:
                save_file({name: t.detach().cpu().contiguous() for name, t in kept.items()}, written)


def check_best(model: Any) -> None:
    """Refuse a run whose adapter the trainer would replace by another one at its end: it loads what lies in the best
    checkpoint itself, which is the adapter "default", into the first active one, whatever that is called.

    Raises:
        ValueError: there is a "default" beside it.
    """
    active = model.active_adapters if isinstance(model, PeftModel) else []
    if active and active[0] != "default" and "default" in model.peft_config:
        raise ValueError(
            f"load_best_model_at_end loads the weights of adapter 'default' of the best checkpoint into "
            f"{active[0]!r}, which is in training: all that it has learnt would be lost. Leave it out, and open the "
            f"best checkpoint yourself, CHECKPOINT/{active[0]}; or train an adapter that is named 'default'."
        )


def check_optimizer(model: Any, optimizer: Any) -> None:
    """Refuse an optimizer of an earlier `train()` that steps parameters which the adapter does not have any more.

    Raises:
        ValueError: what is in training is not in it, and what is in it is not in the model.
    """
    stepped = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    there = {id(p): p.requires_grad for p in model.parameters()}
    if stepped - there.keys() and any(trained and key not in stepped for key, trained in there.items()):
        raise ValueError(
            "The trainer's optimizer is of an earlier train(), after which the adapter got other parameters (experts "
            "were deleted, B was packed, ranks have grown, or a checkpoint of another form was loaded): they would "
            "learn nothing. Make a new trainer, and resume with it."
        )


def keep_stopped(model: Any, args: TrainingArguments, state: TrainerState, alone: bool = False) -> Path:
    """Save the adapter as it is, for a run that is about to end in an error: nothing that was learnt is lost.

    Args:
        alone: only the process that saves calls this. Else it is called by all, which wait for it: what ends first
            would end it.
    """
    folder = output_folder(args) / f"stopped-{state.global_step}"
    if args.should_save:
        model.save_pretrained(folder)
    if not alone:
        wait_for_all()
    return folder


@contextmanager
def adapter_kept(model: Any, args: TrainingArguments, state: TrainerState) -> Iterator[None]:
    """What one process writes at a run's end: if that fails, the adapter is saved first, and the error says where."""
    try:
        yield
    except Exception as error:
        kept = keep_stopped(model, args, state, alone=True)
        raise RuntimeError(f"{type(error).__name__}: {error}. The adapter is in {kept}.") from error


def wait_for_all() -> None:
    """Until every process of the run is here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the checkpoint of this step is."""
    return output_folder(args) / f"checkpoint-{state.global_step}"


def output_folder(args: TrainingArguments) -> Path:
    assert args.output_dir is not None  # transformers fills it in
    return Path(args.output_dir)


def begin_first(callback: TrainerCallback) -> None:
    """Move `callback` to the front of the trainer's callbacks; call it from its `on_init_end`. It begins ahead of all
    others then: callbacks that average weights, or remember them, begin with what it has placed."""
    if (handler := _handler_of(callback)) is not None:
        # The handler is iterating over this very list: what stands behind `callback` keeps its place.
        handler.callbacks[:] = [callback, *(other for other in handler.callbacks if other is not callback)]


def ahead_of_reporters(callback: TrainerCallback) -> None:
    """Move ours that log to the front of the trainer's callbacks, by their `turn`, else in the order that they have;
    call it as they begin.

    The reporters (TensorBoard, W&B, …) stand before every callback of the user, so what a user's `on_log` writes into
    `logs` comes too late for them.
    """
    if (handler := _handler_of(callback)) is not None:
        ours = [other for other in handler.callbacks if isinstance(other, HostCallback) and other.logs]
        ours.sort(key=lambda one: one.turn)
        # Another list: the handler is iterating over the one that is there, and none may be left out.
        handler.callbacks = [*ours, *(other for other in handler.callbacks if other not in ours)]


def behind_ours(callback: TrainerCallback) -> None:
    """Move `callback` behind the last of our others, so that it sees what they leave; call it from one of its own
    events. Callbacks of the user that stand behind them all stay behind."""
    if (handler := _handler_of(callback)) is not None:
        others = [other for other in handler.callbacks if other is not callback]
        own = handler.callbacks.index(callback)
        last = max([own, *(i + 1 for i, other in enumerate(others) if isinstance(other, HostCallback))])
        handler.callbacks = [*others[:last], callback, *others[last:]]  # another list, as above


def _handler_of(callback: TrainerCallback) -> CallbackHandler | None:
    """What holds the list in which `callback` is, which is passed to no event: it is the caller."""
    for frame in _callers():
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and any(other is callback for other in handler.callbacks):
            return handler
    return None


def running_trainer() -> Any:
    """The trainer that has called the event of ours that is asking: no event gets it.

    Raises:
        ValueError: none has.
    """
    for frame in _callers():
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
    raise ValueError("No trainer has called this callback: pass it to the trainer's constructor, callbacks=[...].")


class StepInPlace:
    """Another `training_step` in the place of a trainer's, for one run of it."""

    def __init__(self) -> None:
        self._replaced: tuple[Any, Any, Any] | None = None  # a trainer, its training_step, ours in its place

    def put(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Let the running trainer call step(whole, *args, **kwargs) from now on, `whole` being its own training_step,
        which is given back. One that is there is put back first: an error has ended its run within a step, or the run
        begins anew."""
        self.put_back()
        trainer = running_trainer()
        whole: Callable[..., Tensor] = trainer.training_step
        state = trainer.state

        def ours(*args: Any, **kwargs: Any) -> Tensor:
            this_run = trainer.state is state  # an interrupt may leave it to a run without the callback
            return step(whole, *args, **kwargs) if this_run else whole(*args, **kwargs)

        trainer.training_step = ours
        self._replaced = trainer, whole, ours
        return whole

    def put_back(self) -> None:
        if self._replaced is not None:
            trainer, whole, ours = self._replaced
            if trainer.training_step is ours:
                trainer.training_step = whole
            self._replaced = None


def callbacks_that(what: str) -> list[str]:
    """Classes of the trainer's callbacks of ours that say so of themselves: "holds_weights", "sets_weights" or
    "replaces_weights"."""
    callbacks = running_trainer().callback_handler.callbacks
    return [type(c).__name__ for c in callbacks if isinstance(c, HostCallback) and getattr(c, what)]


def caller_local(name: str) -> Any:
    """The innermost caller's local variable of that name, or None. The trainer tells no event which checkpoint it
    resumes from, which may be in any folder; `resume_from_checkpoint` is a variable of its training loop."""
    return next((frame.f_locals[name] for frame in _callers() if name in frame.f_locals), None)


def _callers() -> Iterator[FrameType]:
    """The frames of the function that asks and of all that have called it, from the inside out."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextmanager
def unmoved_generators() -> Iterator[None]:
    """The global generators of Python, NumPy and torch go on after the block as if it had drawn nothing."""
    ours, numpys = random.getstate(), np.random.get_state()
    try:
        with unmoved():
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


def calibration_batches(
    loader: DataLoader, args: TrainingArguments, count: int, otherwise: str, needs: str = "input_ids"
) -> Callable[[], list[dict[str, Any]]]:
    """A function that returns the same `count` batches at each call, and leaves the trainer's own order and the global
    generators alone (a loader draws a seed, some collators and data sets draw too).

    Args:
        loader: the trainer's; its data set and collator are used, each process draws its own share.
        count: most batches; fewer where the data ends.
        otherwise: what to do where batches are not what the model gets, as a sentence.
        needs: what the model gets first, its `main_input_name`.

    Raises:
        ValueError: by that function: the batches do not have what the model needs, or there are none.
    """
    drawn: list[dict[str, Any]] = []

    @unmoved_generators()
    def batches() -> list[dict[str, Any]]:
        if drawn:
            return drawn
        rank = args.process_index
        options: dict[str, Any] = {"batch_size": args.per_device_train_batch_size, "collate_fn": loader.collate_fn}
        skipped = 0
        if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
            # Else accelerate has cut each process its share.
            skipped = rank * count if isinstance(loader, DataLoaderDispatcher) else 0
        else:
            generator = torch.Generator().manual_seed(args.seed + rank)
            options["sampler"] = RandomSampler(loader.dataset, generator=generator)
        for batch in islice(DataLoader(loader.dataset, **options), skipped, skipped + count):
            if not isinstance(batch, Mapping) or needs not in batch:
                has = f"but {listed(sorted(batch), 'and')}" if isinstance(batch, Mapping) else "but records"
                raise ValueError(
                    f"The trainer's batches have no {needs}, {has}: the trainer makes the model's inputs of them in "
                    f"each step, so that the inputs of this task cannot be seen in advance. {otherwise}"
                )
            drawn.append(dict(batch))
        if not drawn:
            raise ValueError("The training data gave no batch to find directions with.")
        return drawn

    return batches
