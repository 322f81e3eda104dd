"""Training task t leaves what the tasks before it taught alone: A moves only where their inputs are not.

A fresh adapter has ΔW = s·B·A with B = 0. Whatever B becomes, ΔW V = s·B·(A V) is 0 as long as A·V = 0, for the
orthonormal V (I, k) of directions to protect. So A starts in the complement of V, and every *realised* step is
projected
    A <- A - (A V) Vᵀ                       after optimizer.step
since Adam's rescaling, its momentum and weight decay carry A out of the complement even when every gradient was
projected. The gradient is projected as well, before the step, which keeps the moments clean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_mora import use_exact_4bit_kernels
from peft_mora.base import REFERENCE
from peft_mora.checks import check_field, is_int, is_number
from peft_mora.fingerprint import fingerprint
from peft_mora.inputs import base_of, trainable_as_before
from peft_mora.linalg import (
    contrast_directions,
    leading_directions,
    project_out,
    update_norms,
    weakest_directions,
)

from .constraint import Constraint, are_held, as_evaluated, averages, constraints, sharing
from .factors import Factors, are_those, trainable_factors
from .general_text import TOKENS, add_text
from .host import (
    KINDS,
    HostCallback,
    adapter_kept,
    begin_first,
    calibration_batches,
    output_folder,
    wait_for_all,
)
from .sources import SOURCES, Run
from .subspace import SEEN_ENERGY, Subspace


Start = Literal["random", "inputs", "contrast", "osrm"]
SHORT = 0.1  # less than this share of a module's input space left: say so


class OrthogonalProjectionCallback(HostCallback):
    """Keep what earlier tasks taught: train a fresh adapter only in directions that their inputs do not use.

    Works for MORA (any routing) after `start_task`, and for a fresh PEFT LoRA adapter beside frozen older ones (the
    one in training first, `model.base_model.set_adapter([NAME, OLD])`: a trainer that resumes trains the first). At
    the end of training `<output_dir>/subspace` holds what all tasks so far need; give it to the next task's callback.

    The guarantee is about weights: ‖ΔW V‖ / ‖ΔW‖ <= 1e-5 for the float32 weights of the new experts, in every module,
    after every step and where they are saved, whatever the optimizer. What the bases do not hold (1 - energy of the
    inputs) is not protected: after eight tasks on tiny models old logits had drifted by about half of the adapters'
    effect at energy .95, by a third at .99. And routing "bank" chooses among old and new experts together, which no
    projection keeps as it was.

    Pass it to the trainer's constructor: it puts the adapter's trainable weights back to float32, which TRL has cast
    to bfloat16 on a quantised base, before the optimizer is made (in bfloat16, A·V could only be 0 to about 1e-3).

    Args:
        memory: the folder that an earlier task's training, or `protect`, wrote; several, which are joined; or None for
            the first task.
        protect: text on which the model is to stay as it is from this task on: what `trl_callbacks.protect` takes,
            "self" too. A text that the memory holds already is not looked at again, so that every task may have it.
        source: how directions are found: "inputs", "gradients", "base_weights" or "past_adapters".
        energy: share of the inputs' (gradients', weight's) squared norm that the bases hold, in (0, 1]. None: all, up
            to max_rank; for "base_weights" a share that depends on the layer.
        max_rank: most protected directions a module, of all tasks and protected text together; None for no limit.
        calibration_batches: batches of the training data to find the directions with, on each process.
        start: which directions of the complement the new task gets: "contrast", those in which its inputs are strong
            and the earlier tasks' are weak; "inputs", those in which its inputs are strong (InfLoRA, arXiv
            2404.00228); "random", all of them, and A starts anywhere (GPM). None is "contrast" where the source
            knows the earlier inputs ("inputs"), else "random". And "osrm" (OSRM, arXiv 2505.22934), for adapters that
            are to be merged: `memory` is of the *other* tasks, A starts in the r directions in which their inputs are
            weakest, and nothing is held afterwards; the logs get `osrm_ratio`, ‖A x_k‖ / ‖A x_t‖ of their inputs and
            this task's, all of mean square 1.
        room: how many directions "contrast" and "inputs" give; A moves inside them for the whole run. None is 2·r.
        adapter_name: which adapter; None is the one in training.

    Raises:
        ValueError: on construction for a wrong argument; at the start of training for an adapter or a trainer that it
            cannot protect, or a memory of another model. The message says what would work.

    Example:
        >>> start_task(model, "task2")
        >>> callback = OrthogonalProjectionCallback("out/task1/subspace")
        >>> SFTTrainer(model, args=args, train_dataset=train_dataset, callbacks=[callback])
    """

    sidecar = "orthogonal_projection.safetensors"
    turn = 2
    holds_weights = True

    def __init__(
        self,
        memory: str | Path | Sequence[str | Path] | None = None,
        *,
        protect: Any = None,
        source: str = "inputs",
        energy: float | None = 0.95,
        max_rank: int | None = None,
        calibration_batches: int = 8,
        start: Start | None = None,
        room: int | None = None,
        adapter_name: str | None = None,
    ) -> None:
        folders = [memory] if isinstance(memory, (str, Path)) else memory
        several = (
            isinstance(folders, (list, tuple))
            and bool(folders)
            and all(isinstance(f, (str, Path)) and str(f) for f in folders)
        )
        check_field(memory is None or several, "memory", memory, "a folder, a list of folders, or None")
        check_field(
            isinstance(source, str) and source in SOURCES, "source", source, "one of " + ", ".join(map(repr, SOURCES))
        )
        check_field(
            energy is None or (is_number(energy) and 0 < energy <= 1), "energy", energy, "a number in (0, 1], or None"
        )
        check_field(
            max_rank is None or (is_int(max_rank) and max_rank >= 1), "max_rank", max_rank, "an integer >= 1, or None"
        )
        check_field(
            is_int(calibration_batches) and calibration_batches >= 1,
            "calibration_batches",
            calibration_batches,
            "an integer >= 1",
        )
        check_field(max_rank is None or source != "past_adapters", "max_rank", max_rank, "None with this source")
        self.source = SOURCES[source](energy, max_rank)
        start = start if start is not None else "contrast" if self.source.knows_inputs else "random"
        check_field(start in get_args(Start), "start", start, "'contrast', 'inputs', 'random', 'osrm' or None")
        check_field(
            start not in ("contrast", "osrm") or self.source.knows_inputs,
            "start",
            start,
            "'inputs' or 'random' with this source: only source='inputs' knows the earlier tasks' inputs",
        )
        check_field(
            start != "osrm" or bool(folders) or protect is not None,
            "memory",
            memory,
            "the other tasks' memories with start='osrm': what their runs, or `protect(model, texts, folder, "
            "whole=True)`, wrote",
        )
        check_field(room is None or (is_int(room) and room >= 1), "room", room, "an integer >= 1, or None")
        check_field(
            room is None or start in ("contrast", "inputs"),
            "room",
            room,
            "None with start='random' and 'osrm', which give all",
        )
        check_field(protect is None or self.source.knows_inputs, "protect", protect, "None with this source")
        self.memory, self.protect = [Path(folder) for folder in folders or []], protect
        self.calibration_batches, self.adapter_name = calibration_batches, adapter_name
        self.start, self.room = start, room
        self.sets_weights = start != "osrm" and (
            bool(self.memory) or protect is not None or self.source.protects_from_start
        )
        self._run: Run | None = None
        self._optimizer: Any = None
        self._constraints: list[Constraint] = []
        self._room: dict[str, Tensor] = {}  # group -> (I, m) the directions that A may move in, if not all
        self._now: Subspace | None = None  # this task's inputs alone, for "osrm"
        self._given: list[str] = []  # the active adapters, as the trainer was given them
        self._active: dict[str, Tensor] = {}  # adapter -> (2,): its place among the active ones, whether it is trained

    def refusals(self) -> dict[str, str]:
        return {
            "deepspeed": "DeepSpeed steps inside backward, before a callback can project the gradient or the step. "
            "Use DDP or one GPU, or LoriConfig, whose frozen projection needs no callback.",
            "fsdp": "FSDP holds A in pieces, which cannot be projected one by one. Use DDP or one GPU: the trainable "
            "part is small and the 4-bit base is not sharded anyway.",
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.refuse(args)
        begin_first(self)
        self._given = list(model.active_adapters) if isinstance(model, PeftModel) else []
        _, factors = trainable_factors(model, self.adapter_name)
        if self.sets_weights:
            for pair in factors.values():
                for parameter in (pair.A, pair.B):
                    parameter.data = parameter.data.float()

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
        self._optimizer = optimizer
        several = isinstance(model, PeftModel) and len(model.peft_config) > 1
        if several and state.global_step > 0:
            self._activate(args, state, model)
        active = model.active_adapters if several else []
        if len(active) > 1 and REFERENCE in model.peft_config:
            raise ValueError(
                f"Adapters {active} are active together, and the trainer compares with a reference adapter, "
                f"{REFERENCE!r}, for which it sets another one active: the one in training would not be trained on. "
                "Merge the frozen ones into the base first (model.merge_and_unload()), or use MORA, whose tasks are "
                "one adapter (start_task)."
            )
        adapter_name, factors = trainable_factors(model, self.adapter_name)
        self._active = {name: torch.tensor([place, name == adapter_name]) for place, name in enumerate(active)}
        output = output_folder(args) / "subspace"
        Subspace.check_folder(output)
        if self.protect is not None:
            Subspace.check_folder(output.with_name("protected"))
        if any(folder.resolve() == output.resolve() for folder in self.memory):
            raise ValueError(
                f"`memory` is {output}, where this run will write its own subspace: an interrupted run would "
                "lose it. Give each task an output_dir of its own."
            )
        use_exact_4bit_kernels(model)  # forwards in eval mode follow, which would repack 4-bit weights on a CPU
        base = base_of(model)
        needs = getattr(base, "main_input_name", "input_ids")
        batches = calibration_batches(
            train_dataloader, args, self.calibration_batches, "Use source='gradients' or 'past_adapters'.", needs
        )
        run = Run(model, adapter_name, factors, batches)
        # The trainer begins anew, with a smaller batch, where memory has run out: the weights are this run's already.
        again = self._run is not None and are_those(factors, self._run.factors)
        resumed = again or state.global_step > 0
        subspace = self._remembered(args, state, run, resumed, kwargs.get("processing_class"))
        if state.global_step > 0:
            self._restore(args, state)
        elif not again:
            self._room = {}
            self.source.restore({})
        self.source.check(run, subspace)
        self.source.at_begin(run, subspace)
        if not self.source.protects_from_start:
            _report_full(subspace, self.source.max_rank)
        self._subspace, self._run = subspace, run
        self._constraints, self._now = [], None
        if self.start == "osrm":
            self._begin_weakest(run, resumed)
        elif any(V.shape[1] for V in subspace.right.values()):
            init = getattr(model.peft_config[adapter_name], "init_lora_weights", True)
            _check_protectable(model, factors, subspace, resumed, init)
            if not resumed:
                self._place(run)
            self._constraints = list(constraints(subspace, factors, self._room))
            if resumed and not are_held(self._constraints):
                raise ValueError(
                    "The checkpoint's A is not in the complement of the protected directions: it was trained without "
                    "this callback, or with another memory. Resume with the callback that the run began with."
                )
            _report_room(subspace, "left to this task")
        self._removed = self._total = torch.zeros((), device=next(iter(factors.values())).A.device)

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        assert self._run is not None
        within = KINDS["layerwise"](args)  # the backward has stepped by them, and the realised step is projected
        if not within and all(p.grad is None for pair in self._run.factors.values() for p in (pair.A, pair.B)):
            now = list(getattr(model, "active_adapters", []))
            raise ValueError(
                f"No weight of adapter {self._run.adapter_name!r} has a gradient in step {state.global_step + 1}: it "
                f"is not active any more (now active: {now}), or no batch reaches its modules. Nothing would be "
                "learnt. Keep it active, alone or with the frozen ones."
            )
        for constraint in self._constraints:
            grads = [p.grad for p in constraint.parameters if p.grad is not None]
            if not grads:
                continue
            before, after = constraint.apply(grads)
            total = before.square().sum()
            self._total = self._total + total.to(self._total.device)
            self._removed = self._removed + (total - after.square().sum()).to(self._total.device)

    @torch.no_grad()
    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert self._run is not None
        # A step that was skipped (fp16 overflow) has moved nothing, and projecting twice is projecting once.
        for constraint in self._constraints:
            constraint.apply([p.data for p in constraint.parameters])
            if further := averages(optimizer, constraint.parameters):
                constraint.apply(further)
        if not getattr(optimizer, "step_was_skipped", False):
            self.source.at_step(self._run)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check_saved()
        super().on_save(args, state, control, **kwargs)

    def _check_saved(self) -> None:
        """Refuse weights that something has put in the place of those that were projected."""
        if not are_held(self._constraints):
            raise ValueError(
                "The weights that are saved are not those that were projected, and reach the protected directions: an "
                "average (EMA, SWA) of unprojected steps, or NaN. Average after each step, in a callback behind this "
                "one, or train without it."
            )

    def metrics(self) -> dict[str, float]:
        if self._run is not None and self._now is not None:
            return {"osrm_ratio": self._ratio(self._run.factors, self._now)}
        if self._run is None or not self._constraints:
            return {}
        ranks = [V.shape[1] for V in self._subspace.right.values()]
        found = {
            "protected_rank_mean": sum(ranks) / len(ranks),
            "protected_rank_max": float(max(ranks)),
        }
        with as_evaluated(self._optimizer):
            found["leakage"] = self.leakage()
        removed, total = float(self._removed), float(self._total)
        if math.isfinite(total) and total > 0:  # a skipped fp16 step has gradients that are not finite
            found["gradient_removed"] = math.sqrt(max(0.0, removed) / total)
        self._removed, self._total = torch.zeros_like(self._removed), torch.zeros_like(self._total)
        return found

    def kept(self) -> dict[str, Tensor]:
        source = {f"source.{name}": t for name, t in self.source.state().items()}
        active = {f"active.{name}": t for name, t in self._active.items()}
        return source | active | {f"room.{group}": U for group, U in self._room.items()}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        run, self._run, self._optimizer = self._run, None, None
        if run is None:
            return
        self._check_saved()
        self._constraints, self._room, self._now = [], {}, None
        subspace = self._subspace
        self.source.at_end(run, subspace)
        config = model.peft_config[run.adapter_name]
        name = config.tasks[-1] if hasattr(config, "tasks") else run.adapter_name
        subspace.tasks.append({"name": name, "energy": self.source.energy, "max_rank": self.source.max_rank})
        if state.is_world_process_zero:
            folder = output_folder(args) / "subspace"
            with adapter_kept(model, args, state):
                subspace.save(folder)
            ranks = [V.shape[1] for V in subspace.right.values()]
            mean = sum(ranks) / max(1, len(ranks))
            print(
                f"subspace of {len(subspace.tasks)} task(s) written to {folder}: {mean:.0f} protected directions a "
                f"module, at most {max(ranks, default=0)}"
            )
        wait_for_all()
        _report_room(subspace, "left to the next task")

    def leakage(self) -> float:
        """‖ΔW V‖ / ‖ΔW‖ over all constrained modules together, 0..1; 0 while ΔW is 0. Only while training."""
        assert self._run is not None
        inside, whole = [], []  # summed in the end: one wait for the GPU, not two a module
        for (group, device), names in sharing(self._subspace, self._run.factors).items():
            V = self._subspace.right[group].to(device)
            for name in names:
                A, B = self._run.factors[name].A.detach(), self._run.factors[name].B.detach().to(V.dtype)
                protected, size = update_norms(A, B, V)
                if name in self._subspace.left:
                    U = self._subspace.left[name].to(device)
                    protected = torch.maximum(protected, update_norms(B.T, A.T, U)[0])
                inside.append(protected.to(self._total.device))
                whole.append(size.to(self._total.device))
        total = float(torch.stack(whole).sum()) if whole else 0.0
        return math.sqrt(float(torch.stack(inside).sum()) / total) if total != 0 else 0.0

    @torch.no_grad()
    def _place(self, run: Run) -> None:
        """Start A inside the complement, with the row norms that it was initialised with."""
        if self.start != "random":
            for group, names, covariance in self._inputs(run):
                r = max(len(run.factors[name].A) for name in names)
                # In rows, as a checkpoint gives them back: products of another layout differ in their last bits.
                self._room[group] = self._directions(group, covariance, self.room or 2 * r).contiguous()
        for (group, device), names in sharing(self._subspace, run.factors).items():
            V = self._subspace.right[group].to(device)
            for name in names:
                A = run.factors[name].A.data
                norms = A.norm(dim=1, keepdim=True)
                rows = project_out(project_out(A, V), V)
                if group in self._room:
                    U = self._room[group].to(A)
                    rows = rows @ U @ U.T
                rows = rows * (norms / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny))
                A.copy_(project_out(rows, V))

    @torch.no_grad()
    def _begin_weakest(self, run: Run, resumed: bool) -> None:
        """OSRM: start A where the other tasks' inputs are weakest, with rows of norm 1."""
        for (group, _), names in sharing(self._subspace, run.factors).items():
            if group not in self._subspace.seen:
                raise ValueError(
                    f"No `memory` says what goes into module {names[0]!r} on the other tasks, so start='osrm' has no "
                    "weakest directions there. Write them with `protect(model, texts, folder, whole=True)`."
                )
        self._now = Subspace(self.source.name, {})
        for group, _, covariance in self._inputs(run):
            self._now.remember(group, covariance)
        for (group, _), names in () if resumed else sharing(self._subspace, run.factors).items():
            C = self._subspace.old_covariance(group, torch.float64)
            for name in names:
                pair = run.factors[name]
                _check_fresh(name, pair)
                near = pair.A.detach().to(C)
                pair.A.copy_(weakest_directions(C, len(near), near).T)

    def _inputs(self, run: Run) -> Iterator[tuple[str, list[str], Tensor]]:
        """Σ x xᵀ of this task for each group of the memory with its modules, one at a time: A is to stay meanwhile, on
        which the model's outputs may depend even while B is 0 (MORA "bank")."""
        groups: dict[str, list[str]] = {}
        for (group, _), names in sharing(self._subspace, run.factors).items():
            groups.setdefault(group, []).extend(names)
        found = run.statistics()
        lead = {module: group for group, modules in found.groups.items() for module in modules}
        each = found.each([[lead[names[0]]] for names in groups.values()])
        for (group, names), (covariance,) in zip(groups.items(), each, strict=True):
            yield group, names, covariance

    def _ratio(self, factors: Mapping[str, Factors], now: Subspace) -> float:
        """‖A x_k‖ / ‖A x_t‖ over all modules together, x_k of the other tasks and x_t of this one."""
        groups = {name: group for (group, _), names in sharing(self._subspace, factors).items() for name in names}
        others, own = (
            sum(memory.reach(group, factors[name].A) for name, group in groups.items())
            for memory in (self._subspace, now)
        )
        return math.sqrt(others / own) if own > 0 else math.nan

    def _remembered(
        self, args: TrainingArguments, state: TrainerState, run: Run, resumed: bool, tokenizer: Any
    ) -> Subspace:
        """What the memories and the protected text hold. A resumed run cannot see the text as the untrained adapter
        did: with a text, what is found goes to `<output_dir>/protected`, and comes from there, or from beside the
        checkpoint where that is in another folder."""
        found = output_folder(args) / "protected"
        if self.protect is not None and resumed and not found.exists():
            found = self.sidecar_path(args, state).parent.parent / "protected"
            if not found.exists():
                raise FileNotFoundError(
                    f"The run resumes, and what it protects of `protect` is neither in {output_folder(args)} nor in "
                    f"{found.parent}: its folder 'protected' is missing. Copy it here, or start the run again."
                )
        model: Any = run.model
        base = base_of(model)
        known, subspace = fingerprint(base), None
        folders = self.memory if self.protect is None or not resumed else [found]
        if folders:
            subspaces = [Subspace.load(folder) for folder in folders]
            for folder, one in zip(folders, subspaces, strict=True):
                one.check_model(known, folder)
                _check_memory(one, self.source.name, run.factors, folder)
            kept = 1.0 if self.start == "osrm" else SEEN_ENERGY
            subspace = subspaces[0] if len(subspaces) == 1 else Subspace.join(subspaces, kept)
        subspace = subspace or Subspace(self.source.name, known)
        if self.start == "osrm":
            subspace.seen_energy = 1.0
        if self.protect is not None and not resumed:
            add_text(
                subspace, model, run.layers, self.protect, tokenizer, self.source.energy, TOKENS, self.source.max_rank
            )
            if args.process_index == 0:
                subspace.save(found)
        return subspace

    def _directions(self, group: str, new: Tensor, count: int) -> Tensor:
        V = self._subspace.right[group].to(new)
        if self.start == "inputs" or group not in self._subspace.seen:
            return leading_directions(new, None, V.shape[1] + count, held=V)
        return contrast_directions(new, self._subspace.old_covariance(group).to(new), V, count)

    def _activate(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Make those adapters active that were so when the checkpoint was written: a trainer that resumes leaves the
        first one alone active, and trains that."""
        kept = self.saved(args, state) or {}
        active = {name.removeprefix("active."): t.tolist() for name, t in kept.items() if name.startswith("active.")}
        if not active:
            if len(self._given) == 1:
                return
            raise ValueError(
                f"The run resumes at step {state.global_step}, but the checkpoint does not say which of the model's "
                f"adapters ({', '.join(map(repr, model.peft_config))}) were active: it was trained without this "
                "callback, or by an older release of it. Start the task again."
            )
        names = sorted(active, key=lambda name: active[name])
        trained, first = next(name for name in names if active[name][1]), model.active_adapters[0]
        if first != trained:
            order = [trained, *(name for name in names if name != trained)]
            raise ValueError(
                f"The checkpoint is of a run that trains adapter {trained!r}. A trainer that resumes trains the first "
                f"of the active adapters, here {first!r}, and has given it the optimizer's state of {trained!r}. Make "
                f"the model again with model.base_model.set_adapter({order}), and resume from the same checkpoint."
            )
        if names != list(model.active_adapters):
            with trainable_as_before(model):
                model.base_model.set_adapter(names)

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        placed = self.start in ("contrast", "inputs")
        needed = self.source.keeps_state or ((self.memory or self.protect is not None) and placed)
        tensors = self.saved(args, state)
        if tensors is None and needed:
            raise ValueError(
                f"The run resumes at step {state.global_step}, but the checkpoint has no {self.sidecar}, in which "
                f"this callback keeps the directions of the run ({self.sidecar_path(args, state)} would be it). "
                "Resume from a checkpoint that was trained with this callback, or start the task again."
            )
        tensors = tensors or {}
        self.source.restore({n.removeprefix("source."): t for n, t in tensors.items() if n.startswith("source.")})
        self._room = {n.removeprefix("room."): t for n, t in tensors.items() if n.startswith("room.")}


def _check_memory(subspace: Subspace, source: str, factors: Mapping[str, Factors], folder: Path) -> None:
    if subspace.source != source:
        raise ValueError(
            f"The subspace in {folder} was found by source={subspace.source!r}: go on with that, not {source!r}."
        )
    for name, pair in factors.items():
        group = subspace.group_of(name)
        if group is None:
            raise ValueError(
                f"The subspace in {folder} has no basis for module {name!r}, which earlier tasks did not adapt: what "
                "they need of it is not known. Give this adapter the same target_modules as theirs."
            )
        if subspace.right[group].shape[0] != pair.A.shape[1]:
            raise ValueError(
                f"The subspace in {folder} has directions of {subspace.right[group].shape[0]} dimensions for module "
                f"{name!r}, whose input has {pair.A.shape[1]}. It is of another model."
            )


def _check_protectable(
    model: nn.Module, factors: Mapping[str, Factors], subspace: Subspace, resumed: bool, init: bool | str
) -> None:
    bases = {("input", names[0]): subspace.right[group] for (group, _), names in sharing(subspace, factors).items()}
    bases |= {("output", name): subspace.left[name] for name in factors if name in subspace.left}
    full = next(((*at, len(V)) for at, V in bases.items() if V.shape[1] >= V.shape[0]), None)
    if full is not None:
        side, name, size = full
        raise ValueError(
            f"The protected directions fill all {size} dimensions of the {side} of module {name!r}: nothing could be "
            "learned there. Protect with a lower energy or with max_rank, or leave the module out (exclude_modules)."
        )
    own = {id(p) for pair in factors.values() for p in (pair.A, pair.B, *pair.through)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        heads = [name.partition(".modules_to_save.")[0] for name in others if ".modules_to_save." in name]
        raise ValueError(
            f"{len(others)} more parameters are trainable, e.g. {others[0]!r}, and change the model for old inputs. "
            "Leave out modules_to_save and trainable_token_indices, and freeze earlier adapters; a classifier's head, "
            "which PEFT saves with the adapter and a first task trains without `protect`, by "
            f"model.{next(iter(heads), 'base_model.model.classifier')}.requires_grad_(False)."
        )
    for name, pair in factors.items():
        if pair.A.dtype != torch.float32:
            raise ValueError(
                f"A of module {name!r} is in {pair.A.dtype}, in which it cannot be kept orthogonal. Pass the callback "
                "to the trainer's constructor (callbacks=[...]), where it restores float32 before the optimizer is "
                "made; add_callback comes too late."
            )
        if not resumed and init not in (True, "gaussian", "eva") and bool(pair.B.detach().any()):
            raise ValueError(
                f"The adapter has init_lora_weights={init!r}, with which B is not 0 from the start: its update would "
                "change old inputs before any step. Use LoraConfig(init_lora_weights=True)."
            )
        if not resumed:
            _check_fresh(name, pair)


def _check_fresh(name: str, pair: Factors) -> None:
    if bool(pair.B.detach().any()):
        raise ValueError(
            f"The adapter has been trained already (B of module {name!r} is not 0): while its B is trainable, no "
            "constraint on A keeps what it does now. Freeze it and train fresh weights: with MORA "
            "start_task(model, NAME); with LoRA model.add_adapter(NAME, config), "
            "model.base_model.set_adapter([NAME, OLD]), model.set_requires_grad(OLD, requires_grad=False)."
        )


def _report_full(subspace: Subspace, max_rank: int | None) -> None:
    full = [group for group, V in subspace.right.items() if max_rank is not None and V.shape[1] >= max_rank]
    if full:
        warnings.warn(
            f"max_rank={max_rank} is reached by what is protected already of {len(full)} of {len(subspace.right)} "
            f"module inputs, e.g. {full[0]!r}: what this task needs there will not be protected from the next. Give a "
            "larger max_rank, which counts the tasks before and the protected text too.",
            stacklevel=2,
        )


def _report_room(subspace: Subspace, when: str) -> None:
    left = {group: 1 - V.shape[1] / V.shape[0] for group, V in subspace.right.items()}
    short = {group: share for group, share in left.items() if share < SHORT}
    if short:
        least = min(short, key=lambda group: short[group])
        warnings.warn(
            f"{len(short)} of {len(left)} module inputs have less than {SHORT:.0%} of their dimensions {when}, least "
            f"{least!r} with {short[least]:.1%}. It may not learn well: use a lower energy or max_rank for the next "
            "run of an earlier task, fewer target_modules, or a larger base model.",
            stacklevel=2,
        )
