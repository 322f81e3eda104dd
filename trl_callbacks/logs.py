"""What no event tells a callback: how to get numbers to the trackers, and where a run resumes from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler


def ahead_of_reporters(callback: TrainerCallback) -> None:
    """Move `callback` to the front of the trainer's callbacks; call it from one of its own events.

    The reporters (TensorBoard, W&B, …) stand before every callback of the user, so what a user's `on_log` writes into
    `logs` comes too late for them. No event gets the handler that holds the list: it is the caller.
    """
    for frame in _callers():
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and any(other is callback for other in handler.callbacks):
            # The handler is iterating over this very list: what stands behind `callback` keeps its place.
            handler.callbacks[:] = [callback, *(other for other in handler.callbacks if other is not callback)]
            return


def add_to_logs(metrics: dict[str, float], logs: dict[str, Any], state: TrainerState) -> None:
    """Write metrics into the logs that reporters are about to get, and into the trainer's history."""
    logs.update(metrics)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(metrics)


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
