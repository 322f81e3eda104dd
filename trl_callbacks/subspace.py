"""Directions of each module's input that later training must leave alone: find, grow, apply, save, load.

    V (I, k)  orthonormal columns, float32: what is protected of an input space of I dimensions
    A (r, I)  the down-projection of a fresh adapter; with A·V = 0 its ΔW = s·B·A gives 0 for every input in span V

No trainer in this file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_mora.inputs import eval_mode, real_rows


# Inputs of modules


@dataclass(frozen=True)
class InputStatistics:
    """Σ x xᵀ of each distinct input, float32 on the model's device, and the modules that share it."""

    covariance: dict[str, Tensor]  # group -> (I, I); a group is named after the first module called with it
    groups: dict[str, tuple[str, ...]]


@torch.no_grad()
def input_statistics(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Any]],
    budget_gib: float = 4.0,
) -> InputStatistics:
    """Stream batches through the model and add up Σ x xᵀ of what goes into each module, over real tokens.

    Modules that are called with the very same tensor (q/k/v; gate/up) share one matrix. Each matrix takes 4·I² bytes
    and all of them at once would not fit beside a large model, so the batches go through the model as often as
    `budget_gib` asks for. Nothing but the matrices is kept.

    Args:
        model: any model; it is in eval mode during the call, and as before after it.
        modules: name -> module whose first argument is the input (..., I).
        batches: keyword arguments of the model's forward; labels are left out. `attention_mask` (B, S) marks padding.
        budget_gib: GiB of matrices held at a time; at least one is.

    Raises:
        ValueError: a module was never called, or its tokens are not those of the attention mask.
    """
    groups, sizes = shared_inputs(model, modules, batches[0])
    covariance: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def add(name: str, x: Tensor) -> None:
        rows = real_rows(x, mask, name).float()
        if name not in covariance:
            covariance[name] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        covariance[name].addmm_(rows.T, rows)

    done: dict[str, Tensor] = {}
    for part in _parts(sizes, budget_gib * 2**30):
        with _observed(model, {name: modules[name] for name in part}, add):
            for batch in batches:
                mask = batch.get("attention_mask")
                _forward(model, batch)
        for name in part:
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(covariance[name])
            done[name] = covariance.pop(name)
    return InputStatistics(done, groups)


@torch.no_grad()
def shared_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """Which modules are called with the very same tensor, by one forward: group -> modules, and group -> I.

    Raises:
        ValueError: as `input_statistics`.
    """
    groups: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    group_of: dict[str, str] = {}
    seen: dict[int, tuple[weakref.ref, str]] = {}

    def look(name: str, x: Tensor) -> None:
        real_rows(x, batch.get("attention_mask"), name)
        reference, group = seen.get(id(x), (None, name))
        if reference is None or reference() is not x:  # an id is given again once its tensor is gone
            group = group_of.get(name, name)
            seen[id(x)] = (weakref.ref(x), group)
        if name not in group_of:
            group_of[name] = group
            groups.setdefault(group, []).append(name)
            sizes[group] = x.shape[-1]

    with _observed(model, modules, look):
        _forward(model, batch)
    missing = [name for name in modules if name not in group_of]
    if missing:
        raise ValueError(
            f"{len(missing)} adapted modules saw no input in a forward of the training data, e.g. {missing[0]!r}, so "
            "what they must keep cannot be known. Leave them out of `target_modules`."
        )
    return {name: tuple(members) for name, members in groups.items()}, sizes


@torch.no_grad()
def layer_similarity(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Mean cosine, over real tokens, between what goes into each decoder layer and what comes out of it."""
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in layers}
    mask: Tensor | None = None

    def see(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        x, y = (real_rows(rows, mask, name).float() for rows in (x, y))
        cosine = torch.cosine_similarity(x, y, dim=-1)
        sums[name] += torch.stack([cosine.sum(), torch.ones_like(cosine).sum()]).double().cpu()

    handles = [layer.register_forward_hook(partial(see, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with eval_mode(model):
            for batch in batches:
                mask = batch.get("attention_mask")
                _forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if dist.is_available() and dist.is_initialized():
        stacked = torch.stack(list(sums.values()))
        stacked = stacked.to(next(p.device for p in model.parameters()))
        dist.all_reduce(stacked)
        sums = dict(zip(sums, stacked.cpu(), strict=True))
    return {name: float(total / count) for name, (total, count) in sums.items()}


@contextmanager
def _observed(model: nn.Module, modules: Mapping[str, nn.Module], see: Any) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        with eval_mode(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(model: nn.Module, batch: Mapping[str, Any]) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    accepted = inspect.signature(base.forward).parameters
    # Sequence lengths of padding-free batches go through **kwargs to the attention.
    inputs = {
        k: v
        for k, v in batch.items()
        if (k in accepted and k not in ("labels", "shift_labels")) or k.startswith(("cu_seq_lens", "max_length"))
    }
    device = next(p.device for p in model.parameters() if p.device.type != "meta")
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1  # the logits are not wanted
    model(**inputs, use_cache=False)


def _parts(sizes: Mapping[str, int], budget: float) -> Iterable[list[str]]:
    part: list[str] = []
    used = 0.0
    for name, size in sizes.items():
        if part and used + 4 * size**2 > budget:
            yield part
            part, used = [], 0.0
        part.append(name)
        used += 4 * size**2
    if part:
        yield part


# What is kept between tasks


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one base model from another, whatever it is quantised to: its type, sizes and a hash of weights.

    The hash is over 64 rows of the input embeddings and all norms' weights, in bfloat16: those stay as they are when
    a model is quantised or loaded in another float dtype.
    """
    config = getattr(model, "config", None)
    table = model.get_input_embeddings()
    while not hasattr(table, "weight") or isinstance(table, BaseTunerLayer):  # PEFT's wrappers
        table = table.get_base_layer() if isinstance(table, BaseTunerLayer) else table.original_module
    weights = [table.weight[:: max(1, len(table.weight) // 64)]]
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and "modules_to_save" not in name:
            weights += list(module.parameters(recurse=False))
    digest = hashlib.sha256()
    for weight in weights:
        plain = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(plain.view(torch.int16).numpy().tobytes())
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "hidden_size": getattr(config, "hidden_size", None),
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
        "vocab_size": len(table.weight),
        "weights_sha256": digest.hexdigest(),
    }


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
        seen: group -> F (I, n) with F·Fᵀ nearly the sum of all tasks' C / tr C; only `inputs` has them.
        weights: group -> how many tasks that sum is of, and so its trace.
    """

    source: str
    model: dict[str, Any]
    tasks: list[dict[str, Any]] = field(default_factory=list)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def remember(self, group: str, covariance: Tensor) -> None:
        """Add a task's inputs (I, I) to what is known of all tasks' inputs, every task with the same weight."""
        total = covariance / covariance.trace()
        if group in self.seen:
            total = total + self.old_covariance(group).to(total)
        values, vectors = torch.linalg.eigh(total)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        kept = int((values.cumsum(0) < SEEN_ENERGY * values.sum()).sum()) + 1
        self.seen[group] = (vectors[:, :kept] * values[:kept].sqrt()).float().cpu().contiguous()
        self.weights[group] = self.weights.get(group, 0) + 1

    def old_covariance(self, group: str) -> Tensor:
        """(I, I) what is known of all tasks' inputs: F·Fᵀ, and what F has left out alike in all other directions."""
        F = self.seen[group]
        Q = torch.linalg.qr(F)[0]
        known = F @ F.T
        rest = (self.weights[group] - known.trace()).clamp_min(0) / max(1, len(F) - Q.shape[1])
        return known + rest * (torch.eye(len(F)) - Q @ Q.T)

    def save(self, folder: str | Path) -> None:
        """Write FOLDER/basis.safetensors and FOLDER/subspace.json; what was there before is replaced as a whole."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            tensors = {f"right.{name}": V.float().cpu().contiguous() for name, V in self.right.items()}
            tensors |= {f"left.{name}": U.float().cpu().contiguous() for name, U in self.left.items()}
            tensors |= {f"seen.{name}": F.to("cpu", torch.float16).contiguous() for name, F in self.seen.items()}
            save_file(tensors, temporary / TENSORS)
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
            (temporary / DESCRIPTION).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
            temporary.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

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

    def check_model(self, model: dict[str, Any], folder: str | Path) -> None:
        """Refuse another base model than the one the bases were found on.

        Raises:
            ValueError: naming what differs.
        """
        differs = [key for key in self.model if self.model[key] != model.get(key)]
        if differs:
            shown = ", ".join(f"{key} {self.model[key]!r} there, {model.get(key)!r} here" for key in differs)
            raise ValueError(
                f"The subspace in {folder} is of another base model ({shown}). Directions of one model mean nothing "
                "to another: train on the model that it was made with, or learn the first task again with memory=None."
            )

    def group_of(self, module: str) -> str | None:
        """The group whose input the module shares, or None."""
        return next((group for group, modules in self.groups.items() if module in modules), None)
