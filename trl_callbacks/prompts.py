"""A later task's prompt moves only where earlier tasks' input embeddings are not.

PEFT's prompt tuning puts n trained rows P (n, I) before the input embeddings. With V (I, k) the directions in which
the input embeddings of earlier tasks lie, the *realised* step of the whole run is held out of them,
    P <- P0 + (P - P0) (I - V Vᵀ)           after optimizer.step, P0 the prompt that the task began with
and, if asked, inside what V leaves of the pretrained embeddings' span, U: (P - P0) W Wᵀ, W an orthonormal basis of
(I - V Vᵀ) U. Each direction of U has lost its part in V, so that where V is not in U, W is not either.

After Fwd-Prompt (arXiv 2401.09181), reconstructed from its abstract: the gradient goes to the residual space of old
tasks (against forgetting) and onto the pretrained space (forward transfer). Its pool of prompts is not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftType
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_mora.checks import check_field, is_int, is_number
from peft_mora.fingerprint import fingerprint
from peft_mora.inputs import real_rows
from peft_mora.linalg import leading_directions, orthonormal

from .constraint import Constraint, as_evaluated, averages
from .host import HostCallback, adapter_kept, begin_first, calibration_batches, output_folder, wait_for_all
from .subspace import Subspace


GROUP = "prompt"


class PromptProjectionCallback(HostCallback):
    """Keep a prompt in training out of what earlier tasks' input embeddings span (PEFT's `PromptTuningConfig`).

    At the end of training `<output_dir>/subspace` holds the directions of all tasks so far; give it to the next task's
    callback. The prompt may go on from the last task's or start afresh: what is held is its change since the task
    began, ‖(P - P0) V‖ / ‖P - P0‖ <= 1e-5 in float32, after every step and where it is saved, whatever the optimizer
    and its weight decay; where P has hardly moved, what rounding leaves: 1e-7 · ‖P‖ / ‖P - P0‖.

    Pass it to the trainer's constructor, where it puts the prompt back to float32 before the optimizer is made: TRL
    casts it to bfloat16 on a quantised base. A run that resumes needs P0, which its checkpoints have.

    Args:
        memory: the folder that an earlier task's training wrote, or None for the first task.
        energy: share of the input embeddings' squared norm that the directions hold, in (0, 1].
        max_rank: most directions, all tasks together; None for no limit.
        calibration_batches: batches of the training data to look at, on each process.
        pretrained: share of the squared norm of the vocabulary's embeddings, in (0, 1]: the prompt's change stays
            inside what is left of their leading directions without their parts in V; None lets it go anywhere outside
            of V.
        adapter_name: which adapter; None is the active one.

    Raises:
        ValueError: on construction for a wrong argument; at the start of training for another PEFT type, an
            encoder-decoder, further trainable weights, a memory of another model or kind, or no direction left.

    Example:
        >>> callback = PromptProjectionCallback("out/task1/subspace")
        >>> SFTTrainer(model, args=args, train_dataset=train_dataset, callbacks=[callback],
        ...            peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20))
    """

    sidecar = "prompt_projection.safetensors"
    turn = 2

    def __init__(
        self,
        memory: str | Path | None = None,
        *,
        energy: float = 0.95,
        max_rank: int | None = None,
        calibration_batches: int = 8,
        pretrained: float | None = None,
        adapter_name: str | None = None,
    ) -> None:
        check_field(memory is None or isinstance(memory, (str, Path)), "memory", memory, "a folder, or None")
        check_field(is_number(energy) and 0 < energy <= 1, "energy", energy, "a number in (0, 1]")
        check_field(
            max_rank is None or (is_int(max_rank) and max_rank >= 1), "max_rank", max_rank, "an integer >= 1, or None"
        )
        count = calibration_batches
        check_field(is_int(count) and count >= 1, "calibration_batches", count, "an integer >= 1")
        check_field(
            pretrained is None or (is_number(pretrained) and 0 < pretrained <= 1),
            "pretrained",
            pretrained,
            "a number in (0, 1], or None",
        )
        self.memory = None if memory is None else Path(memory)
        self.energy, self.max_rank, self.calibration_batches = energy, max_rank, calibration_batches
        self.pretrained, self.adapter_name = pretrained, adapter_name
        self._prompt: nn.Parameter | None = None
        self._start: Tensor | None = None  # P0 (n, I), where anything is held
        self._constraint: Constraint | None = None
        self._optimizer: Any = None

    def refusals(self) -> dict[str, str]:
        return {
            "deepspeed": "DeepSpeed steps inside backward, before a callback can project the prompt's step. Use DDP "
            "or one GPU.",
            "fsdp": "FSDP holds the prompt in pieces, which cannot be projected one by one. Use DDP or one GPU.",
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.refuse(args)
        begin_first(self)
        prompt = the_prompt(model, self.adapter_name)[1]
        prompt.data = prompt.data.float()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        super().on_train_begin(args, state, control)
        self._name, prompt = the_prompt(model, self.adapter_name)
        base = model.get_base_model()
        self._embeddings, self._optimizer = base.get_input_embeddings(), optimizer
        self._batches = calibration_batches(
            train_dataloader, args, self.calibration_batches, "Train with SFTTrainer, or without this callback."
        )
        self._batches()  # now, not when all is learnt
        self._subspace = self._remembered(args, fingerprint(base), prompt)
        self._constraint = self._held(prompt)
        again, self._prompt = prompt is self._prompt, prompt
        if self._constraint is None:
            self._start = None
            return
        _check_alone(model, prompt)
        if state.global_step > 0:
            kept = self.saved(args, state)
            if kept is None:
                raise ValueError(
                    f"The run resumes at step {state.global_step}, but the checkpoint has no {self.sidecar}, which "
                    "says where the prompt began. Resume from a checkpoint that was trained with this callback, or "
                    "start the task again."
                )
            self._start = kept["start"].to(prompt)
            self._check_saved()
        elif not again or self._start is None:
            self._start = prompt.detach().clone()

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._constraint is not None and self._prompt is not None and self._prompt.grad is not None:
            self._constraint.apply([self._prompt.grad])

    @torch.no_grad()
    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        start = self._start
        if self._constraint is None or self._prompt is None or start is None:
            return
        for rows in (self._prompt.data, *averages(optimizer, [self._prompt])):
            rows.copy_(start + self._constraint.held(rows - start))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check_saved()
        super().on_save(args, state, control, **kwargs)

    def metrics(self) -> dict[str, float]:
        V = self._subspace.right.get(GROUP) if self._prompt is not None else None
        if V is None or self._start is None or self._prompt is None:
            return {}
        with as_evaluated(self._optimizer):
            moved = self._prompt.detach() - self._start
        size = moved.norm()
        leakage = float((moved @ V.to(moved)).norm() / size) if size > 0 else 0.0
        return {"prompt_protected_rank": float(V.shape[1]), "prompt_leakage": leakage}

    def kept(self) -> dict[str, Tensor]:
        return {} if self._start is None else {"start": self._start}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._prompt is None:
            return
        self._check_saved()
        covariance = embedding_covariance(self._embeddings, self._batches())
        held = self._subspace.right.get(GROUP)
        self._subspace.append(GROUP, leading_directions(covariance, self.energy, self.max_rank, held))
        self._subspace.tasks.append({"name": self._name, "energy": self.energy, "max_rank": self.max_rank})
        self._prompt = self._constraint = self._start = self._optimizer = None
        if state.is_world_process_zero:
            folder = output_folder(args) / "subspace"
            with adapter_kept(model, args, state):
                self._subspace.save(folder)
            V = self._subspace.right[GROUP]
            print(
                f"subspace of {len(self._subspace.tasks)} task(s) written to {folder}: {V.shape[1]} of {V.shape[0]} "
                "directions of the prompt are protected"
            )
        wait_for_all()

    def _remembered(self, args: TrainingArguments, known: dict[str, Any], prompt: Tensor) -> Subspace:
        output = output_folder(args) / "subspace"
        Subspace.check_folder(output)
        if self.memory is None:
            return Subspace("prompts", known)
        if self.memory.resolve() == output.resolve():
            raise ValueError(
                f"`memory` is {output}, where this run will write its own: an interrupted run would lose it. Give "
                "each task an output_dir of its own."
            )
        subspace = Subspace.load(self.memory)
        if subspace.source != "prompts":
            raise ValueError(
                f"{self.memory} holds directions of modules' inputs (source={subspace.source!r}), not of prompts. It "
                "is for OrthogonalProjectionCallback."
            )
        subspace.check_model(known, self.memory)
        V = subspace.right[GROUP]
        if V.shape[0] != prompt.shape[1]:
            raise ValueError(
                f"The directions in {self.memory} have {V.shape[0]} dimensions and the prompt {prompt.shape[1]}. They "
                "are of another model."
            )
        if V.shape[1] >= V.shape[0]:
            raise ValueError(
                f"The protected directions fill all {V.shape[0]} dimensions: the prompt could not move. Learn the "
                "earlier tasks with a lower energy or with max_rank."
            )
        return subspace

    def _held(self, prompt: nn.Parameter) -> Constraint | None:
        V = self._subspace.right.get(GROUP)
        if self.pretrained is None:
            return None if V is None else Constraint(V.to(prompt.device), (prompt,))
        with torch.no_grad():
            table = self._embeddings(torch.arange(self._embeddings.num_embeddings, device=prompt.device)).float()
        U = leading_directions(table.T @ table, self.pretrained)
        W = orthonormal(U, None if V is None else V.to(U))
        if not W.shape[1]:
            raise ValueError(
                f"The {U.shape[1]} directions of the pretrained embeddings (pretrained={self.pretrained:g}) are all "
                "protected: the prompt could not move. Raise `pretrained`, or leave it out."
            )
        return Constraint(W, (prompt,), inside=True)

    def _check_saved(self) -> None:
        """Refuse a prompt that something has put in the place of the one that was projected."""
        if self._constraint is None or self._prompt is None or self._start is None:
            return
        moved = self._prompt.detach() - self._start
        rounding = 4 * torch.finfo(self._start.dtype).eps * self._start.norm()  # of P; more than a small first step
        if not (moved - self._constraint.held(moved)).norm() <= 1e-3 * moved.norm() + rounding:
            raise ValueError(
                "The prompt has moved where it must not: it was trained without this callback or with another memory, "
                "something averages unprojected steps, or it is NaN. Resume with the callback that the run began "
                "with, and average after each step, in a callback behind this one."
            )


def the_prompt(model: Any, adapter_name: str | None) -> tuple[str, nn.Parameter]:
    """The adapter's name and its prompt (n, I).

    Raises:
        ValueError: it is no prompt of PEFT's prompt tuning in training, or the model has two sequences.
    """
    configs = getattr(model, "peft_config", {})
    name = adapter_name if adapter_name is not None else getattr(model, "active_adapter", None)
    kind = getattr(configs.get(name), "peft_type", None) if isinstance(name, str) else None
    if kind != PeftType.PROMPT_TUNING:
        what = f"adapter {name!r} is of type {getattr(kind, 'value', kind)}" if kind is not None else "there is none"
        raise ValueError(
            "PromptProjectionCallback holds a prompt of PEFT's prompt tuning, whose rows stand beside the input "
            f"embeddings; here {what}. Use PromptTuningConfig; for LoRA and MORA OrthogonalProjectionCallback. "
            "What P-tuning, prefix tuning and multitask prompt tuning train is no row of the input."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "An encoder-decoder's prompt stands before two sequences, of which the embeddings of one would be held. "
            "Use a decoder-only model."
        )
    weight = model.prompt_encoder[name].embedding.weight
    if not weight.requires_grad:
        raise ValueError(f"The prompt of adapter {name!r} is not in training: add a fresh one for this task.")
    return str(name), weight


def embedding_covariance(embeddings: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Σ e eᵀ (I, I), float32, over the embeddings of the batches' real tokens; over all processes."""
    device = next(embeddings.parameters()).device
    total: Tensor | None = None
    with torch.no_grad():
        for batch in batches:
            if images := next((name for name in batch if name.startswith(("pixel_values", "input_features"))), None):
                raise ValueError(
                    f"The batches have images or sounds (`{images}`), which go into the model as embeddings that are "
                    "no token's, so the prompt cannot be kept out of their span. Use LoRA or MORA with "
                    "OrthogonalProjectionCallback."
                )
            rows = embeddings(batch["input_ids"].to(device))
            rows = real_rows(rows, batch.get("attention_mask"), "the input embeddings").float()
            total = rows.T @ rows if total is None else total.addmm_(rows.T, rows)
    assert total is not None  # there is a batch
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def _check_alone(model: nn.Module, prompt: nn.Parameter) -> None:
    others = [name for name, p in model.named_parameters() if p.requires_grad and p is not prompt]
    if others:
        raise ValueError(
            f"{len(others)} more parameters are trainable, e.g. {others[0]!r}, and change the model for old inputs: "
            "freeze them."
        )
    if prompt.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The prompt is in {prompt.dtype}, in which its step cannot be held. Pass the callback to the trainer's "
            "constructor (callbacks=[...]), where it restores float32 before the optimizer is made."
        )
