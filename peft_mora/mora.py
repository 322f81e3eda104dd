"""MORA: rank-1 experts that activate themselves. No router, no router parameters.

Every row of A with its column of B is one expert; for each token, over the R experts of a group:
    h = x Aᵀ                                    s = h / max(||h||_2, eps)             (float32)
    w = softmax over the K largest s of s / temperature, else 0                      (eval: 0 where s < threshold)
    y = base(x) + (alpha / r) · Σ_i w_i h_i B_i
A new task freezes the experts and appends r fresh ones with B = 0. `routing` says what a group is: "task", the r
experts of each task on their own; "bank", all experts together (the paper's rule); "dense", no gate at all (w = 1).

Source: "Little By Little: Continual Learning via Self-Activated Sparse Mixture-of-Rank Adaptive Learning",
arXiv 2506.21035 (MoRAM from its third version). Not the high-rank "MoRA" of arXiv 2405.12130.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import set_requires_grad
from torch import Tensor, nn

from .base import REFERENCE, Trained, adapter_layers, check_in_memory, config_of, set_config
from .checks import check_field, is_int, is_number, task_names
from .experts import ExpertModel, ExpertWeights
from .inputs import unmoved
from .lean import NO_GATE, Gate, Parts, Wanted, Weight, index_dtype
from .routed import Counter, RoutedConfig, RoutedLinear, module_top_k, record_routing
from .routing import at_least_float32, gated_softmax, gated_softmax_backward, softmax_gate
from .row_tasks import the_only


Routing = Literal["task", "bank", "dense"]


@dataclass
class MoraConfig(RoutedConfig):
    """Config of a MORA adapter. All that routing depends on is in here, and so in adapter_config.json.

    Example:
        >>> MoraConfig(r=16, target_modules="all-linear")
    """

    method: ClassVar[str] = "MORA"
    on_parameters: ClassVar[str] = "MoraConfig(routing='dense')"
    routed_as: ClassVar[tuple[str, ...]] = ("MoraConfig(routing='task')", "MoraConfig(routing='bank')")

    top_k: int | None = field(
        default=None,
        metadata={"help": "K: experts that a token may wake, a task's block each ('bank': in all). None is r."},
    )
    routing: Routing = field(
        default="task",
        metadata={
            "help": "'task' gates the r experts of each task on their own; 'bank' gates all experts together, as the "
            "paper does; 'dense' has no gate: a LoRA that grows, mergeable."
        },
    )
    temperature: float = field(default=0.1, metadata={"help": "Softmax temperature of the gate, > 0."})
    threshold: float = field(
        default=0.0, metadata={"help": "In eval mode, experts that score below do nothing. In [0, 1]; 0 is off."}
    )
    tasks: list[str] = field(
        default_factory=lambda: ["initial"],
        metadata={"help": "Names of the tasks learned, the one in training last. `start_task` appends to it."},
    )
    block_sizes: dict[str, list[int]] = field(
        default_factory=dict,
        metadata={"help": "Module name -> experts left of each task, where `prune_experts` has deleted some."},
    )
    frozen_top_k: dict[str, list[int]] = field(
        default_factory=dict,
        metadata={
            "help": "Module name -> K of each frozen task, where it is not that of the task in training: with routing "
            "'task' a frozen block keeps the K that it was trained with."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self.routing in get_args(Routing), "routing", self.routing, "'task', 'bank' or 'dense'")
        if self.top_k is not None:
            check_field(is_int(self.top_k) and self.top_k >= 1, "top_k", self.top_k, "an integer >= 1, or None for r")
            smallest = min([self.r, *self.rank_pattern.values()])
            check_field(self.top_k <= smallest, "top_k", self.top_k, f"<= r (here {smallest} at the least)")
        check_field(
            is_number(self.temperature) and self.temperature > 0, "temperature", self.temperature, "a number > 0"
        )
        check_field(
            is_number(self.threshold) and 0 <= self.threshold <= 1, "threshold", self.threshold, "a number in [0, 1]"
        )
        self.tasks = task_names(self.tasks)
        for name, least, tasks in (("block_sizes", 0, len(self.tasks)), ("frozen_top_k", 1, len(self.tasks) - 1)):
            check_field(isinstance(getattr(self, name), dict), name, getattr(self, name), "a dict by module name")
            for key, values in getattr(self, name).items():
                ok = (
                    isinstance(values, list) and len(values) == tasks and all(is_int(v) and v >= least for v in values)
                )
                check_field(ok, f"{name}[{key!r}]", values, f"a list of {tasks} integers >= {least}")

    def parameters_refusal(self) -> str:
        if self.routing == "dense":
            return ""
        return (
            f"MORA with routing={self.routing!r} cannot adapt `target_parameters`: which of its experts are active "
            "depends on the input, which is seen inside of the module alone. Give routing='dense'."
        )


class Rule(NamedTuple):
    """The routing fields of an adapter as one of its layers uses them."""

    routing: Routing
    top_k: int
    temperature: float
    threshold: float


class SoftmaxGate(Gate):
    """w·h of one forward.

    Args:
        top_k: K of each group of experts.
        sizes: experts of each block, which are one group then; None: each block is a group.
        usage: what counts this forward, if anything does.
        fused: whether a group is one kernel.
    """

    def __init__(
        self, top_k: list[int], temperature: float, threshold: float, sizes: list[int] | None, usage: Counter | None,
        fused: bool = False,
    ) -> None:  # fmt: skip
        self.top_k, self.temperature, self.threshold = top_k, temperature, threshold
        self.sizes, self.usage, self.fused = sizes, usage, fused

    def plain(self, hs: list[Tensor]) -> list[Tensor]:
        groups = self._groups(hs)
        weights = [
            softmax_gate(h, k, self.temperature, self.threshold) for h, k in zip(groups, self.top_k, strict=True)
        ]
        self._count(groups, weights)
        return self._blocks([(w * h).to(h.dtype) for w, h in zip(weights, groups, strict=True)])

    def forward(
        self, hs: list[Tensor], tensors: Sequence[Tensor], shape: torch.Size, wanted: Wanted
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        groups = self._groups(hs)
        found = [
            gated_softmax(h, k, self.temperature, self.threshold, self.fused)
            for h, k in zip(groups, self.top_k, strict=True)
        ]
        if self.usage is not None:
            self._count([h.view(*shape, -1) for h in groups], [w.view(*shape, -1) for _, w, _ in found])
        saved: list[Tensor | None] = []
        for (_, _, index), h, needed in zip(found, groups, self._needed(wanted), strict=False):
            saved += [h, None if index is None else index.to(index_dtype(h.shape[-1]))] if needed else [None, None]
        return self._blocks([gated for gated, _, _ in found]), saved

    def backward(
        self,
        saved: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        grads: list[Tensor | None],
        wanted: Wanted,
    ) -> tuple[list[Tensor | None], list[Tensor | None], tuple[()]]:
        gated: list[Tensor | None] = []
        dhs: list[Tensor | None] = []
        groups = [None] * len(self.top_k) if grads[0] is None else self._groups(grads)
        for h, index, grad in zip(saved[::2], saved[1::2], groups, strict=True):
            if h is None:
                gated.append(None)
                dhs.append(None)
                continue
            grad = torch.zeros_like(h) if grad is None else grad
            w_h, dh = gated_softmax_backward(h, index, grad, self.temperature, self.threshold, self.fused)
            gated.append(w_h)
            dhs.append(dh)
        return self._blocks(gated), self._blocks(dhs), ()

    def _needed(self, wanted: Wanted) -> list[bool]:
        """Which groups have a backward."""
        blocks = [dh or up for dh, up in zip(wanted.dh, wanted.ups, strict=True)]
        return blocks if self.sizes is None else [any(blocks)]

    def _groups(self, blocks: list[Any]) -> list[Any]:
        return blocks if self.sizes is None else [torch.cat(blocks, dim=-1)]

    def _blocks(self, groups: list[Any]) -> list[Any]:
        if self.sizes is None:
            return groups
        return [None] * len(self.sizes) if groups[0] is None else list(groups[0].split(self.sizes, dim=-1))

    def _count(self, groups: list[Tensor], weights: list[Tensor]) -> None:
        if self.usage is None:
            return
        self.usage.add(torch.cat(weights, dim=-1) if len(weights) > 1 else weights[0])
        if self.usage.needed:
            every = groups[-1].shape[-1]
            self.usage.add_need(softmax_gate(groups[-1].detach(), every, self.temperature))


class MoraLinear(RoutedLinear):
    """`mora_A` (r, I) and `mora_B` (O, r) are this task's experts; `mora_bank_A` (R - r, I) and `mora_bank_B`
    (O, R - r) the frozen ones of earlier tasks, oldest first. No bank entry during the first task."""

    mora_A: Any
    mora_B: Any
    # The gate as one Triton kernel each way, where kernels.py can; of a layer, or of the class. Off: not timed yet.
    fused_gate: ClassVar[bool] = False
    prefix = "mora_"
    adapter_layer_names = ("mora_A", "mora_B")
    other_param_names = (
        "mora_bank_A", "mora_bank_B", "mora_rule", "mora_sizes", "mora_frozen_top_k", "mora_tasks", "module_names",
        "usage", "r", "scaling", "dropout",
    )  # fmt: skip
    merge_refusal = (
        "Cannot merge a MORA adapter with routing 'task' or 'bank': which experts are active depends on the input, so "
        "no single weight equals it. Keep it unmerged (model.unload() gives the base back), or train with "
        "MoraConfig(routing='dense'), which merges exactly."
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.mora_A = nn.ModuleDict()
        self.mora_B = nn.ModuleDict()
        self.mora_bank_A = BufferDict(persistent=True)
        self.mora_bank_B = BufferDict(persistent=True)
        self.mora_rule: dict[str, Rule] = {}
        self.mora_sizes: dict[str, list[int]] = {}  # experts of each task, r unless pruned
        self.mora_frozen_top_k: dict[str, list[int]] = {}  # K of each frozen task
        self.mora_tasks: dict[str, dict[str, int]] = {}  # "adapter/task" -> blocks that were there when it was learnt

    def create_weights(self, adapter_name: str, config: MoraConfig, module_name: str, original: str | None) -> None:
        r = self.r[adapter_name]
        top_k = module_top_k(config, module_name, r)
        sizes = config.block_sizes.get(module_name, [r] * len(config.tasks))
        check_field(max(sizes) <= r, f"block_sizes[{module_name!r}]", sizes, f"at most r, here {r}")
        self.mora_rule[adapter_name] = Rule(config.routing, top_k, config.temperature, config.threshold)
        self.mora_sizes[adapter_name] = list(sizes)
        self.mora_frozen_top_k[adapter_name] = list(
            config.frozen_top_k.get(module_name, [top_k] * (len(config.tasks) - 1))
        )
        self.mora_tasks[adapter_name] = {f"{adapter_name}/{task}": i for i, task in enumerate(config.tasks, 1)}
        self.mora_A[adapter_name], self.mora_B[adapter_name] = self._fresh_experts(sizes[-1], config.init_weights)
        frozen = sum(sizes[:-1])
        if adapter_name == REFERENCE and original in self.mora_bank_A:
            self.mora_bank_A[adapter_name] = self.mora_bank_A[original].clone()
            self.mora_bank_B[adapter_name] = self.mora_bank_B[original].clone()
        elif len(sizes) > 1:  # about to be filled from a file
            device, dtype = self._weight_placement()
            self.mora_bank_A[adapter_name] = torch.zeros(frozen, self.in_features, device=device, dtype=dtype)
            self.mora_bank_B[adapter_name] = torch.zeros(self.out_features, frozen, device=device, dtype=dtype)

    def _fresh_experts(self, experts: int, zero_B: bool) -> tuple[nn.Linear, nn.Linear]:
        """Their A and B."""
        A = self.new_linear(self.in_features, experts, zero=False)
        return A, self.new_linear(experts, self.out_features, zero=zero_B)

    def blocks(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """A (r, I) and B (O, r) of each task, oldest first, the one in training last; fewer than r where pruned."""
        for A, B in self._stored(adapter_name):
            yield A, B.contiguous()

    def _stored(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """`blocks` as views of what the layer holds."""
        if adapter_name in self.mora_bank_A:
            sizes = self.mora_sizes[adapter_name][:-1]
            bank_A, bank_B = self.mora_bank_A[adapter_name], self.mora_bank_B[adapter_name]
            yield from zip(bank_A.split(sizes), bank_B.split(sizes, dim=1), strict=True)
        yield self.mora_A[adapter_name].weight, self.mora_B[adapter_name].weight

    def parts(self, adapter_name: str, blocks: int | None = None) -> Parts:
        """Of the first so many blocks, which then do what they did before the others came; None: of all."""
        As, Bs = zip(*self._stored(adapter_name), strict=True)
        ups = [Weight(B) for B in Bs[:blocks]]
        return Parts([Weight(A) for A in As[:blocks]], ups, self._gate(adapter_name, blocks))

    def row_names(self) -> list[str]:
        """Also "adapter/task": the adapter as it was when it had learnt that task, the later blocks off."""
        return [*self.r, *(name for tasks in self.mora_tasks.values() for name in tasks)]

    def of_row(self, name: str) -> tuple[str, Parts] | None:
        if name in self.r:
            return name, self.parts(name)
        adapter = the_only([adapter for adapter, tasks in self.mora_tasks.items() if name in tasks], name)
        return None if adapter is None else (adapter, self.parts(adapter, self.mora_tasks[adapter][name]))

    def _gate(self, adapter_name: str, blocks: int | None = None) -> Gate:
        rule = self.mora_rule[adapter_name]
        if rule.routing == "dense":
            return NO_GATE
        joint = rule.routing == "bank"
        top_k = [rule.top_k] if joint else [*self.mora_frozen_top_k[adapter_name], rule.top_k][:blocks]
        threshold = 0.0 if self.training else rule.threshold
        sizes = self.mora_sizes[adapter_name][:blocks] if joint else None
        usage = self.counting(adapter_name) if blocks is None else None  # whose counts are of all experts
        return SoftmaxGate(top_k, rule.temperature, threshold, sizes, usage, self.fused_gate)

    def is_routed(self, adapter_name: str) -> bool:
        return self.mora_rule[adapter_name].routing != "dense"

    def expert_count(self, adapter_name: str) -> int:
        return sum(self.mora_sizes[adapter_name])

    def top_k(self, adapter_name: str) -> int:
        return self.mora_rule[adapter_name].top_k

    def set_top_k(self, adapter_name: str, k: int) -> None:
        """K of the task in training ("bank": of all experts together); frozen blocks keep theirs."""
        self.mora_rule[adapter_name] = self.mora_rule[adapter_name]._replace(top_k=k)

    def choices(self, adapter_name: str) -> int:
        sizes = self.mora_sizes[adapter_name]
        experts = sizes[-1] if self.mora_rule[adapter_name].routing == "task" else sum(sizes)
        return min(experts, self.r[adapter_name])

    def fixed_experts(self, adapter_name: str) -> int:
        if self.mora_rule[adapter_name].routing != "task":
            return 0
        frozen = zip(self.mora_sizes[adapter_name][:-1], self.mora_frozen_top_k[adapter_name], strict=True)
        return sum(min(size, k) for size, k in frozen)

    def block_fields(self, adapter_name: str) -> dict[str, list[int] | None]:
        sizes, frozen = self.mora_sizes[adapter_name], self.mora_frozen_top_k[adapter_name]
        differs = any(k != self.top_k(adapter_name) for k in frozen)
        by_task = self.mora_rule[adapter_name].routing == "task"
        return {
            "block_sizes": list(sizes) if any(size != self.r[adapter_name] for size in sizes) else None,
            "frozen_top_k": list(frozen) if by_task and differs else None,
        }

    def is_static(self, adapter_name: str) -> bool:
        return self.mora_rule[adapter_name].routing == "dense"

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        A, B = zip(*self.blocks(adapter_name), strict=True)
        return at_least_float32(torch.cat(A).detach()), at_least_float32(torch.cat(B, dim=1).detach())

    def trained(self, adapter_name: str) -> Trained | None:
        A, B = self.mora_A[adapter_name].weight, self.mora_B[adapter_name].weight
        past = (self.mora_bank_A[adapter_name],) if adapter_name in self.mora_bank_A else ()
        return Trained(A, B, past) if A.requires_grad or B.requires_grad else None

    def fit_file(self, adapter_name: str, tensors: dict[str, Tensor], config: Any, module_name: str) -> bool:
        """PEFT would load what fits and drop the frozen experts without a word."""
        if "mora_A.weight" not in tensors:
            return False
        *frozen, trainable = self.mora_sizes[adapter_name]
        found = [len(tensors.get("mora_bank_A", ())), len(tensors["mora_A.weight"])]
        room = [sum(frozen), trainable]
        if found != room:
            raise ValueError(
                f"The file has {found[0]} frozen and {found[1]} trainable experts in module {module_name!r}, the "
                f"adapter {adapter_name!r} has {room[0]} and {room[1]} (its tasks: {', '.join(config.tasks)}): one of "
                "them has other tasks, or was pruned. Open the folder with PeftModel.from_pretrained, which reads its "
                "config. To resume a run, build the model as that run did: load the adapter of the earlier tasks and "
                "call start_task, or open the pruned one with PeftModel.from_pretrained(..., is_trainable=True)."
            )
        return False

    @torch.no_grad()
    def grown(self, adapter_name: str) -> tuple[Tensor, Tensor, nn.Linear, nn.Linear]:
        """What `grow` puts in place, computed without touching a thing: the bank's A and B with this task's experts,
        and r fresh ones (B = 0) for the next."""
        A, B = self.mora_A[adapter_name].weight.detach(), self.mora_B[adapter_name].weight.detach()
        device, dtype = A.device, A.dtype
        if adapter_name in self.mora_bank_A:
            A = torch.cat([self.mora_bank_A[adapter_name], A])
            B = torch.cat([self.mora_bank_B[adapter_name], B], dim=1)
        fresh_A, fresh_B = self._fresh_experts(self.r[adapter_name], zero_B=True)
        return A.clone(), B.clone(), fresh_A.to(device, dtype), fresh_B.to(device, dtype)

    def grow(self, adapter_name: str, task: str, *grown: Any) -> None:
        """Freeze this task's experts into the bank and go on with fresh ones, for a new one.

        Args:
            grown: as `grown` gives them.
        """
        bank_A, bank_B, A, B = grown
        self.mora_bank_A[adapter_name], self.mora_bank_B[adapter_name] = bank_A, bank_B
        self.mora_A[adapter_name], self.mora_B[adapter_name] = A, B
        self.mora_sizes[adapter_name].append(self.r[adapter_name])
        self.mora_tasks[adapter_name][f"{adapter_name}/{task}"] = len(self.mora_sizes[adapter_name])
        self.mora_frozen_top_k[adapter_name].append(self.top_k(adapter_name))
        self.usage.pop(adapter_name, None)  # counts of other experts
        for fresh in (A, B):
            fresh.requires_grad_(adapter_name in self.active_adapters)

    @torch.no_grad()
    def widen(self, adapter_name: str, rows: Tensor) -> None:
        """Append experts to the block in training: `rows` (n, I) to A, zeros to B. r grows, and the scale stays."""
        A, B = self.mora_A[adapter_name].weight.detach(), self.mora_B[adapter_name].weight.detach()
        bank = self.mora_bank_A, self.mora_bank_B
        frozen = [part[adapter_name] for part in bank if adapter_name in part]
        *past, size = self.mora_sizes[adapter_name]
        before, n = self.r[adapter_name], len(rows)
        tensors = [torch.cat([A, rows]), torch.cat([B, B.new_zeros(len(B), n)], dim=1), *frozen]
        with unmoved():  # `put` initialises what it then replaces
            self.put(adapter_name, [*past, size + n], tensors)
        self.r[adapter_name] = max(before, size + n)
        if self.top_k(adapter_name) == before:
            self.set_top_k(adapter_name, self.r[adapter_name])

    def without(self, adapter_name: str, stays: Tensor) -> tuple[list[int], list[Tensor]]:
        """The weights that `put` puts in place, computed without touching a thing.

        Args:
            stays: (R,) bool on the CPU, which experts stay, in the order of `blocks`.

        Returns:
            Experts left of each task; A and B of the trainable block, then, if there is a bank, its A and B.
        """
        masks = stays.split(self.mora_sizes[adapter_name])
        parts = [(self.mora_A[adapter_name].weight, self.mora_B[adapter_name].weight, masks[-1])]
        if adapter_name in self.mora_bank_A:
            frozen = torch.cat(masks[:-1])
            parts.append((self.mora_bank_A[adapter_name], self.mora_bank_B[adapter_name], frozen))
        places = [(A, B, mask.nonzero().flatten().to(A.device)) for A, B, mask in parts]
        tensors = [
            t for A, B, index in places for t in (A.detach().index_select(0, index), B.detach().index_select(1, index))
        ]
        return [int(mask.sum()) for mask in masks], tensors

    def put(self, adapter_name: str, sizes: list[int], tensors: list[Tensor]) -> None:
        """Go on with the experts that `without` has picked out, which are new parameters."""
        A, B, *bank = tensors
        trainable = self.mora_A[adapter_name].weight.requires_grad
        fresh = self._fresh_experts(sizes[-1], zero_B=True)
        for linear, values in zip(fresh, (A, B), strict=True):
            linear.weight = nn.Parameter(values.contiguous(), requires_grad=trainable)
        self.mora_A[adapter_name], self.mora_B[adapter_name] = fresh
        if bank:
            self.mora_bank_A[adapter_name], self.mora_bank_B[adapter_name] = (t.contiguous() for t in bank)
        self.mora_sizes[adapter_name] = sizes
        self.usage.pop(adapter_name, None)  # counts of other experts


class MoraExperts(ExpertWeights, MoraLinear):
    """MORA with routing "dense" on a parameter: r rank-1 updates for each of its experts and task."""


class MoraModel(ExpertModel):
    """A model with MORA layers; made by `get_peft_model(model, MoraConfig(...))`."""

    prefix = "mora_"
    tuner_layer_cls = MoraLinear
    expert_layer_cls = MoraExperts


@dataclass(frozen=True)
class TaskSummary:
    """What `start_task` did: the task's name, experts a module now frozen and in training, trainable parameters."""

    task: str
    frozen_experts: int
    trainable_experts: int
    trainable_parameters: int

    def __str__(self) -> str:
        return (
            f"task {self.task!r}: {self.frozen_experts} experts frozen, {self.trainable_experts} in training, over "
            f"all modules; {self.trainable_parameters:,} trainable parameters"
        )


def start_task(model: Any, name: str, adapter_name: str = "default") -> TaskSummary:
    """Begin a new task on a trained MORA adapter: freeze its experts and append r fresh ones to every module.

    With routing "task" or "dense" this changes no output by one bit. Make a new trainer (and so a new optimizer)
    afterwards: the trainable parameters are new objects.

    Args:
        model: a PeftModel, or any model with an injected MORA adapter.
        name: the new task's name; kept in the adapter's config.
        adapter_name: which adapter grows.

    Returns:
        A `TaskSummary`, with counts over all modules; `print` it.

    Raises:
        ValueError: no such MORA adapter, or a part of its model without the config; a name that the adapter already
            has, or an adapter that is merged.
    """
    layers = adapter_layers(model, adapter_name, MoraLinear)
    config = config_of(model, adapter_name)
    check_field(isinstance(name, str) and bool(name), "name", name, "a non-empty string")
    if name in config.tasks:
        raise ValueError(
            f"The adapter already has a task named {name!r} (its tasks: {', '.join(config.tasks)}). Give the new task "
            "a name of its own."
        )
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError("Cannot start a task on a merged adapter: call model.unmerge_adapter() first.")
    check_in_memory(layers, adapter_name)
    grown = {key: layer.grown(adapter_name) for key, layer in layers.items()}  # all of it before any of it counts
    for key, layer in layers.items():
        layer.grow(adapter_name, name, *grown[key])
    # A copy: TRL gives its reference adapter the same config object, and the reference does not grow.
    config = copy.deepcopy(config)
    config.tasks.append(name)
    config.inference_mode = False
    if any(adapter_name in layer.active_adapters for layer in layers.values()):
        set_requires_grad(model, adapter_name)  # `modules_to_save` too, if the adapter was loaded for inference
    set_config(model, adapter_name, config)
    record_routing(model, adapter_name)
    return TaskSummary(
        task=name,
        frozen_experts=sum(layer.mora_bank_A[adapter_name].shape[0] for layer in layers.values()),
        trainable_experts=sum(layer.r[adapter_name] for layer in layers.values()),
        trainable_parameters=sum(
            p.numel()
            for layer in layers.values()
            for p in (layer.mora_A[adapter_name].weight, layer.mora_B[adapter_name].weight)
        ),
    )
