"""LoRI-D for some steps, then LoRI-S, in one training run."""

from __future__ import annotations

from typing import Any
from weakref import ref

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_mora import sparsify
from peft_mora.base import adapter_layers
from peft_mora.checks import check_field, is_int, is_number
from peft_mora.lori import LoriLinear
from peft_mora.sparsity import check_onto

from .host import HostCallback, keep_stopped


class LoriCalibrationCallback(HostCallback):
    """Train a LORI adapter densely for `calibration_steps`, call `sparsify`, and go on with the packed one.

    The optimizer keeps its hyperparameters and the schedule goes on; its state (moments) starts fresh, since the
    parameters are new. A new trainer resumes from a checkpoint on either side of the switch: the file says which form
    the adapter has.

    Args:
        sparsity: share of B's entries to drop, in [0, 1).
        calibration_steps: optimizer steps of dense training before the switch, >= 1.
        adapter_name: which adapter; it must be dense when training starts.
        onto: see `peft_mora.sparsify`.

    Raises:
        ValueError: on construction for a wrong argument; at the start of training when the model has no such LORI
            adapter, when it has been trained already (the switch starts B from 0), when the run is too short to reach
            the switch, or when it is distributed; at the end when the run was stopped before the switch.

    Example:
        >>> callback = LoriCalibrationCallback(sparsity=0.9, calibration_steps=200)
        >>> SFTTrainer(..., peft_config=LoriConfig(r=32, target_modules="all-linear"), callbacks=[callback])
    """

    replaces_weights = True

    def __init__(
        self,
        sparsity: float = 0.9,
        calibration_steps: int = 100,
        *,
        adapter_name: str = "default",
        onto: str | None = None,
    ) -> None:
        check_field(is_number(sparsity) and 0 <= sparsity < 1, "sparsity", sparsity, "a number in [0, 1)")
        check_field(
            is_int(calibration_steps) and calibration_steps >= 1,
            "calibration_steps",
            calibration_steps,
            "an integer >= 1",
        )
        check_field(isinstance(adapter_name, str), "adapter_name", adapter_name, "an adapter's name")
        check_field(onto is None or isinstance(onto, str), "onto", onto, "an adapter's name, or None")
        self.sparsity = sparsity
        self.calibration_steps = calibration_steps
        self.adapter_name = adapter_name
        self.onto = onto
        self._weights: list[ref[nn.Parameter]] = []  # the B's that this callback has seen last
        self._running = False

    def refusals(self) -> dict[str, str]:
        replaces = (
            "LoriCalibrationCallback replaces parameters in the middle of a run, which DDP, FSDP and DeepSpeed do not "
            "allow. Calibrate in a run of its own, then call peft_mora.sparsify(model) and train again."
        )
        return {
            "processes": replaces,
            "deepspeed": replaces,
            "fsdp": replaces,
            "layerwise": "An optimizer that steps within the backward (layer-wise, LOMO) would not know the "
            "parameters after the switch: nothing more would be learnt. Use another `optim`.",
            "best_model": "load_best_model_at_end could bring back the dense adapter from before the switch. Leave it "
            "out, or calibrate in a run of its own, call peft_mora.sparsify(model) and train again.",
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        weights = self._all_B(model)
        packed = self._is_packed(model)
        if self.onto is not None and not packed:
            check_onto(model, self.adapter_name, self.onto)  # now, not at the switch
        own = len(weights) == len(self._weights) and all(a is b() for a, b in zip(weights, self._weights, strict=True))
        # The trainer begins anew, with a smaller batch, where memory has run out: B is as this very run left it.
        again = own and self._running
        self._weights, self._running = list(map(ref, weights)), True
        if not packed and state.global_step >= self.calibration_steps:
            raise ValueError(
                f"The run resumes at step {state.global_step}, after the switch at {self.calibration_steps}, with an "
                "adapter that is still dense: its checkpoint is of a run without this callback. Call "
                "peft_mora.sparsify(model) and train without the callback, or raise calibration_steps."
            )
        if packed and own and not again and state.global_step == 0:
            raise ValueError(
                f"Adapter {self.adapter_name!r} has been calibrated by this callback in an earlier train(). To train "
                "it further take the callback out: trainer.remove_callback(LoriCalibrationCallback)."
            )
        if packed and not again and state.global_step < self.calibration_steps:
            raise ValueError(
                f"Adapter {self.adapter_name!r} is sparse already, so there is nothing to calibrate. Leave `sparsity` "
                "out of LoriConfig, or leave this callback out."
            )
        if not packed and not again and state.global_step == 0 and any(bool(B.detach().any()) for B in weights):
            raise ValueError(
                f"Adapter {self.adapter_name!r} has been trained already, and the switch would start B from 0: all "
                "that it has learnt would be lost. Call peft_mora.sparsify(model), which takes its mask from what was "
                "learnt, and train without this callback; or add a fresh adapter."
            )
        if not packed and state.max_steps <= self.calibration_steps:
            raise ValueError(
                f"The run has {state.max_steps} steps and calibration_steps={self.calibration_steps}: the adapter "
                "would never be trained sparse. Lower calibration_steps or train for longer."
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step != self.calibration_steps or self._is_packed(model):
            return
        before = self._all_B(model)
        summary = sparsify(model, self.sparsity, self.adapter_name, self.onto)
        after = self._all_B(model)
        self._weights = list(map(ref, after))
        successor = {id(old): new for old, new in zip(before, after, strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [successor.get(id(parameter), parameter) for parameter in group["params"]]
        for parameter in before:
            optimizer.state.pop(parameter, None)
        if state.is_world_process_zero:
            print(f"step {state.global_step}: {summary}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._running = False
        if not self._is_packed(model):
            kept = keep_stopped(model, args, state)
            raise ValueError(
                f"The run was stopped at step {state.global_step}, before the switch at {self.calibration_steps}: the "
                f"adapter is dense, and kept as it is in {kept}. Resume from a checkpoint, or open it, call "
                "peft_mora.sparsify(model) and train without this callback."
            )

    def _all_B(self, model: Any) -> list[nn.Parameter]:
        layers = adapter_layers(model, self.adapter_name, LoriLinear).values()
        return [layer.lori_B[self.adapter_name].weight for layer in layers]

    def _is_packed(self, model: Any) -> bool:
        layers = adapter_layers(model, self.adapter_name, LoriLinear).values()
        return any(layer.is_packed(self.adapter_name) for layer in layers)
