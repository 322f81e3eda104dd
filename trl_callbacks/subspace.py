"""Directions of each module's input that later training must leave alone: grow, save, load.

    V (I, k)  orthonormal columns, float32: what is protected of an input space of I dimensions
    A (r, I)  the down-projection of a fresh adapter; with A·V = 0 its ΔW = s·B·A gives 0 for every input in span V

No trainer in this file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_mora.files import check_own, whole_folder
from peft_mora.fingerprint import differences
from peft_mora.inputs import InputStatistics
from peft_mora.linalg import Spectrum, leading_directions, orthonormal, spectrum, upper_bound


VERSION = 1
TENSORS, DESCRIPTION = "basis.safetensors", "subspace.json"
# Share of all inputs that is kept by direction. The ratio of new to old inputs that contrast finds in a complement of
# .95: 5.2 with .95, 5.9 with .98, 6.2 with all (SmolLM2, three tasks, held-out batches).
SEEN_ENERGY = 0.98


@dataclass
class Subspace:
    """Bases of what the tasks so far need, and where they came from.

    Args:
        source: name of the rule that found them: one of `SOURCES`.
        model: `fingerprint` of the base model.
        tasks: one dict a task learned: its name, energy, max_rank.
        groups: group -> modules that share its input; a group is named after one of them.
        right: group -> (I, k) orthonormal, float32: directions of inputs.
        left: module -> (O, k) orthonormal, float32: directions of outputs; only `base_weights` has them.
        seen: group -> F (I, n) with F·Fᵀ nearly a bound on each task's C / tr C; only `inputs` has them. In files of
            before, and where `seen_energy` is 1, their sum, which is a bound as well, if a looser one.
        weights: group -> trace of that bound: 1 for one task, of several between 1 (all alike) and their number.
        seen_energy: share of the bound that `remember` keeps by direction; the rest counts as alike in all others.
    """

    source: str
    model: dict[str, Any]
    tasks: list[dict[str, Any]] = field(default_factory=list)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    seen_energy: float = SEEN_ENERGY

    def append(
        self, group: str, directions: Tensor, modules: Sequence[str] = (), outputs: Tensor | None = None
    ) -> None:
        """Put directions behind those of a group.

        Args:
            group: one that is there, or a new one.
            directions: (I, k) orthonormal, orthogonal to `right[group]`, any float dtype and device.
            modules: of a new group; none are the module that it is named after.
            outputs: (O, k) orthonormal, the module's directions in `left`, in the place of those there.
        """
        directions = directions.float().cpu().contiguous()
        self.groups.setdefault(group, tuple(modules) or (group,))
        held = self.right.get(group)
        self.right[group] = directions if held is None else torch.cat([held, directions], dim=1)
        if outputs is not None:
            self.left[group] = outputs.float().cpu().contiguous()

    def add_inputs(self, found: InputStatistics, energy: float | None, max_rank: int | None) -> None:
        """Add what a task's inputs need beyond what is held (`leading_directions`), and remember the inputs.

        Modules that share a tensor in one task may get copies of it in another: each group of the memory learns of
        every input that goes into one of its modules, and counts the task once.
        """
        fed: dict[str, list[str]] = {}  # group -> the inputs that go into its modules
        fresh: dict[str, tuple[str, ...]] = {}
        for name, modules in found.groups.items():
            unknown = tuple(module for module in modules if self.group_of(module) is None)
            for group in sorted({self.group_of(module) or unknown[0] for module in modules}):
                fed.setdefault(group, []).append(name)
                fresh[group] = unknown
        for group, covariances in zip(fed, found.each(list(fed.values())), strict=True):
            # Where nothing is held, one decomposition, which is what this costs, says what to hold and to remember.
            known = None if group in self.right else spectrum(covariances[0])
            for covariance in covariances:
                new = leading_directions(covariance, energy, max_rank, self.right.get(group), known)
                self.append(group, new, fresh[group])
            total = covariances[0] / covariances[0].trace()
            for further in covariances[1:]:
                total += further / further.trace()
            known = known if len(covariances) == 1 else None
            self.remember(group, total, known=known and Spectrum(known.values / known.values.sum(), known.vectors))

    def remember(self, group: str, covariance: Tensor, weight: float = 1, known: Spectrum | None = None) -> None:
        """Add a task's inputs (I, I) to what is known of all: the least bound on them and on what there was, so that
        others hide no task by their number (`upper_bound`). With `seen_energy` 1 the sum, which is what OSRM wants.

        Args:
            covariance: Σ x xᵀ of any scale; it gets the trace `weight`.
            weight: 1 for one task; of another memory's bound, its own.
            known: the spectrum of a new group's covariance with trace 1.
        """
        if not covariance.trace() > 0:
            raise ValueError(
                f"All inputs of module {group!r} are 0 or padding, so what must be kept of them cannot be known. Look "
                "at the training data's attention_mask, or leave the module out of `target_modules`."
            )
        whole = self.seen_energy >= 1
        total = weight * covariance / covariance.trace()
        if whole:  # the last directions are the point, which are lost in float32's rounding of the first
            total, known = total.double(), None
        if group in self.seen:
            old, known = self.old_covariance(group, total.dtype).to(total), None
            total = total + old if whole else upper_bound(total, old)
            weight = weight + self.weights[group] if whole else float(total.trace())
        values, vectors = known or spectrum(total)
        kept = len(values) if whole else int((values.cumsum(0) < self.seen_energy * values.sum()).sum()) + 1
        self.seen[group] = (vectors[:, :kept] * values[:kept].sqrt()).float().cpu().contiguous()
        self.weights[group] = weight

    def old_covariance(self, group: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """(I, I) what is known of all tasks' inputs, each of trace 1: F·Fᵀ, and what F has left out alike in all other
        directions."""
        F = self.seen[group].to(dtype)
        Q = torch.linalg.qr(F)[0]
        known = F @ F.T
        rest = (self.weights[group] - known.trace()).clamp_min(0) / max(1, len(F) - Q.shape[1])
        return known + rest * (torch.eye(len(F), dtype=dtype) - Q @ Q.T)

    def reach(self, group: str, A: Tensor) -> float:
        """Mean of ‖A x‖² over inputs x of mean square 1 that are spread as `old_covariance` C says (of a sum: over all
        tasks alike): tr(A C Aᵀ) / tr C; C is not formed. A (r, I)."""
        A, F = A.detach().to("cpu", torch.float32), self.seen[group]  # columns of F are orthogonal
        norms = F.norm(dim=0)
        rest = (self.weights[group] - norms.square().sum()).clamp_min(0) / max(1, len(F) - F.shape[1])
        known = A @ F
        inside = known / norms.clamp_min(torch.finfo(F.dtype).tiny)
        outside = (A.square().sum() - inside.square().sum()).clamp_min(0)
        return float(known.square().sum() + rest * outside) / self.weights[group]

    def save(self, folder: str | Path) -> None:
        """Write FOLDER/basis.safetensors and FOLDER/subspace.json, in place of an earlier save.

        Raises:
            FileExistsError: the folder holds other files.
        """
        self.check_folder(folder)
        tensors = {f"right.{name}": V.float().cpu().contiguous() for name, V in self.right.items()}
        tensors |= {f"left.{name}": U.float().cpu().contiguous() for name, U in self.left.items()}
        tensors |= {f"seen.{name}": F.to("cpu", torch.float16).contiguous() for name, F in self.seen.items()}
        text = {
            "version": VERSION,
            "source": self.source,
            "model": self.model,
            "tasks": self.tasks,
            "groups": {
                name: {
                    "modules": list(modules),
                    "dimensions": self.right[name].shape[0],
                    "rank": self.right[name].shape[1],
                    "tasks_seen": self.weights.get(name, 0),
                }
                for name, modules in self.groups.items()
            },
        }
        with whole_folder(folder, replace=True) as written:
            save_file(tensors, written / TENSORS)
            (written / DESCRIPTION).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def check_folder(folder: str | Path) -> None:
        """Refuse a folder that `save` would not replace.

        Raises:
            FileExistsError: it holds other files.
        """
        check_own(folder, (TENSORS, DESCRIPTION))

    @classmethod
    def load(cls, folder: str | Path) -> Subspace:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing. ValueError: the files are no subspace, or not of one run.
        """
        folder = Path(folder)
        for name in (TENSORS, DESCRIPTION):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing. `memory` is the folder that OrthogonalProjectionCallback wrote at "
                    "the end of an earlier task's training: <its output_dir>/subspace."
                )
        try:
            text = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            version = text["version"]
            if version != VERSION:
                raise ValueError(f"{folder} has version {version}, this release reads {VERSION}.")
            tensors = load_file(folder / TENSORS)
            groups = {name: tuple(entry["modules"]) for name, entry in text["groups"].items()}
            right = {name: tensors.pop(f"right.{name}") for name in groups}
            left = {name.removeprefix("left."): U for name, U in tensors.items() if name.startswith("left.")}
            weights = {name: entry["tasks_seen"] for name, entry in text["groups"].items() if entry["tasks_seen"]}
            seen = {name: tensors[f"seen.{name}"].float() for name in weights}
            shapes = {name: (entry["dimensions"], entry["rank"]) for name, entry in text["groups"].items()}
            subspace = cls(text["source"], text["model"], text["tasks"], groups, right, left, seen, weights)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"{folder} does not hold a subspace: {type(error).__name__}: {error}.") from error
        if any(tuple(right[name].shape) != shape for name, shape in shapes.items()):
            raise ValueError(f"{folder / TENSORS} and {folder / DESCRIPTION} are not of the same run.")
        return subspace

    @classmethod
    def join(cls, subspaces: Sequence[Subspace], seen_energy: float = SEEN_ENERGY) -> Subspace:
        """One memory of several of one base model: what any of them holds, of the inputs that all of them know.

        Inputs that one does not know are left out, so that an adapter of modules with such inputs is refused.

        Raises:
            ValueError: they are of different sources or models, hold outputs, or group a module's input differently.
        """
        first = subspaces[0]
        joined = cls(first.source, first.model, seen_energy=seen_energy)
        known = set.intersection(*({name for group in s.groups.values() for name in group} for s in subspaces))
        for one in subspaces:
            joined.check_model(one.model, "a `memory` behind the first")
            if one.source != first.source or one.left:
                raise ValueError(
                    f"Memories of source {first.source!r} and {one.source!r} cannot be joined: give several only "
                    "where all are of one source, and that is not 'base_weights'."
                )
            for group, modules in one.groups.items():
                if known.isdisjoint(modules):
                    continue
                place = joined.group_of(modules[0]) or group
                if set(joined.groups.get(place, modules)) != set(modules):
                    raise ValueError(
                        f"The memories group the modules that share an input differently: {joined.groups[place]} and "
                        f"{modules}. Make them with the same target_modules."
                    )
                joined.append(place, orthonormal(one.right[group], joined.right.get(place)), modules)
                if group in one.seen:
                    joined.remember(place, one.old_covariance(group), one.weights[group])
            joined.tasks += one.tasks
        return joined

    def check_model(self, model: dict[str, Any], folder: str | Path) -> None:
        """Refuse another base model than the one the bases were found on.

        Raises:
            ValueError: naming what differs.
        """
        if differs := differences(self.model, model):
            raise ValueError(
                f"The subspace in {folder} is of another base model ({', '.join(differs)}). Directions of one model "
                "mean nothing to another: train on the model that it was made with, or learn the first task again "
                "with memory=None."
            )

    def group_of(self, module: str) -> str | None:
        """The group whose input the module shares, or None."""
        return next((group for group, modules in self.groups.items() if module in modules), None)
