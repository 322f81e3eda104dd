"""MTLLORA: one LoRA for several tasks at once, with a small part of its own for each.

    y = base(x) + (alpha / r) · (Σ_i p_i B_i) Λ_t A x        p = softmax(w_t / temperature) over the n up-projections
for a row of task t. A (r, I) and the B_i (O, r) serve all tasks; Λ_t (r, r) turns the projection and w_t (n,) weighs
the B_i for one task alone. Λ_t starts as the identity and is kept as Λ_t - I: it trains in bfloat16 on a quantised
base, which has no number between 1 and 1.0078. B_i starts at 0, and w_t at random: equal weights would keep the B_i
equal for good. For one task it is one ΔW, which merges.

Source: "MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning", arXiv 2410.09437, and its released code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import AdapterConfig, AdapterLinear, AdapterModel, adapter_layers, config_of, set_config
from .checks import check_field, is_int, is_number, listed, task_names
from .lean import Gate, Parts, Wanted, Weight
from .routing import at_least_float32
from .row_tasks import Rows, RowTasks, place, the_only


@dataclass
class MtlLoraConfig(AdapterConfig):
    """Config of an MTLLORA adapter.

    Example:
        >>> MtlLoraConfig(tasks=["maths", "code"], r=8, target_modules="all-linear")
    """

    method: ClassVar[str] = "MTLLORA"
    by_input: ClassVar[str] = "its update depends on the task of each row of the layer's input"

    tasks: list[str] = field(
        default_factory=lambda: ["initial"],
        metadata={"help": "Names of the tasks; a batch says of which each row is, by name or by place in this list."},
    )
    default_task: str | None = field(
        default=None,
        metadata={"help": "Task of batches that do not say theirs. None: they are refused, unless there is one task."},
    )
    ups: int = field(default=3, metadata={"help": "n: up-projections B_i, which each task weighs in its own way."})
    temperature: float = field(default=0.5, metadata={"help": "Softmax temperature of those weights, > 0."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = task_names(self.tasks)
        ok = self.default_task is None or self.default_task in self.tasks
        check_field(ok, "default_task", self.default_task, f"one of the tasks {self.tasks}, or None")
        check_field(is_int(self.ups) and self.ups >= 1, "ups", self.ups, "an integer >= 1")
        check_field(
            is_number(self.temperature) and self.temperature > 0, "temperature", self.temperature, "a number > 0"
        )


class Rule(NamedTuple):
    """What a layer knows of an adapter's tasks; `default` is a place in `tasks`."""

    tasks: tuple[str, ...]
    default: int | None
    temperature: float


class TaskGate(Gate):
    """u = p_t ⊗ (Λ_t h) of one forward, the n activations side by side.

    Args:
        turn: (N·r, r), Λ_t - I of each task, one below the other.
        w: (N, n).
        tasks: the task of each row, (rows,) int64, or the one of them all.
        rows: what the rows are checked against; None where there is one task.
    """

    def __init__(self, turn: Tensor, w: Tensor, temperature: float, tasks: int | Tensor, rows: Rows | None) -> None:
        self.tensors = [turn, w]
        self.temperature, self.tasks, self.rows = temperature, tasks, rows

    def plain(self, hs: list[Tensor]) -> list[Tensor]:
        (h,) = hs
        u = self._mixed(h.reshape(-1, h.shape[-1]), self.tensors, h.shape[:-1])
        return [u.reshape(*h.shape[:-1], u.shape[-1])]

    def forward(
        self, hs: list[Tensor], tensors: Sequence[Tensor], shape: torch.Size, wanted: Wanted
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        return [self._mixed(hs[0], tensors, shape)], [hs[0]]

    def _mixed(self, h: Tensor, tensors: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """(T, r) to (T, n·r)."""
        if self.rows is not None:
            self.rows.check(shape)
        turn, p = self._of_rows(h, tensors)
        return _outer(p.to(h.dtype), self._turned(h, turn))

    def _of_rows(self, h: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Λ_t - I (rows, r, r) in the dtype of h and p_t (rows, n) in float32 or wider, of each row's task."""
        turn, w = tensors
        r = h.shape[-1]
        at = slice(self.tasks, self.tasks + 1) if isinstance(self.tasks, int) else self.tasks
        logits = at_least_float32(w[at].to(h.dtype))
        return turn.reshape(-1, r, r)[at].to(h.dtype), (logits / self.temperature).softmax(-1)

    def _turned(self, h: Tensor, turn: Tensor) -> Tensor:
        """(rows, S, r)."""
        by_row = _by_row(h, len(turn))
        return torch.baddbmm(by_row, by_row, turn.mT)

    def backward(
        self,
        saved: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        grads: list[Tensor | None],
        wanted: Wanted,
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        (h,) = saved
        assert h is not None
        turn, p = self._of_rows(h, tensors)
        z = self._turned(h, turn)
        u = _outer(p.to(h.dtype), z)
        if grads[0] is None:
            return [u], [None], [None, None]
        rows, n = p.shape
        du = grads[0].reshape(rows, len(h) // rows, n, h.shape[-1])
        dz = (du * p.to(h.dtype)[:, None, :, None]).sum(2)
        d_turn = d_w = None
        if wanted.gate[0]:
            d_turn = self._by_task(dz.mT @ _by_row(h, rows), tensors[0]).to(tensors[0].dtype)
        if wanted.gate[1]:
            dp = torch.einsum("bsnr,bsr->bn", du.to(p.dtype), z.to(p.dtype))
            # p_i Σ_j p_j (dp_i - dp_j): dp_i less its mean would cancel where one p is nearly 1.
            difference = dp.unsqueeze(2) - dp.unsqueeze(1)
            d_logits = p * (p.unsqueeze(1) * difference).sum(-1)
            d_w = self._by_task(d_logits / self.temperature, tensors[1])
            d_w = d_w.to(tensors[1].dtype)
        dh = torch.baddbmm(dz, dz, turn).reshape(h.shape) if wanted.any_dh else None
        return [u], [dh], [d_turn, d_w]

    def _by_task(self, found: Tensor, like: Tensor) -> Tensor:
        """Sums over the rows (rows, ..) of each task, in the shape of `like`, whose rows are the tasks' in order.

        By a product with zeros and ones: index_add is not reproducible on a GPU."""
        flat = found.reshape(len(found), -1)
        tasks = like.numel() // flat.shape[1]
        at = torch.tensor([self.tasks], device=found.device) if isinstance(self.tasks, int) else self.tasks
        return (F.one_hot(at, tasks).to(flat.dtype).T @ flat).reshape(like.shape)


def _by_row(h: Tensor, rows: int) -> Tensor:
    """(T, r) to (rows, T / rows, r)."""
    return h.reshape(rows, -1, h.shape[-1])  # a size that is worked out here would be a constant of a trace


def _outer(p: Tensor, z: Tensor) -> Tensor:
    """p_i z of each i side by side: (rows, n) and (rows, S, r) to (rows·S, n·r)."""
    return (z.unsqueeze(2) * p[:, None, :, None]).flatten(2).flatten(0, 1)


class MtlLoraLinear(AdapterLinear):
    """`mtllora_A` (r, I); `mtllora_B` (O, n·r), the up-projections side by side; `mtllora_turn` (N·r, r), Λ_t - I one
    below the other; `mtllora_w` (N, n)."""

    prefix = "mtllora_"
    adapter_layer_names = ("mtllora_A", "mtllora_B", "mtllora_turn", "mtllora_w")
    other_param_names = ("mtllora_rule", "module_names", "r", "scaling", "dropout")
    merge_refusal = (
        "Cannot merge an MTLLORA adapter without a task: each task has an update of its own. Choose one first: "
        "peft_mora.set_task(model, NAME)."
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.mtllora_A = nn.ModuleDict()
        self.mtllora_B = nn.ModuleDict()
        self.mtllora_turn = nn.ModuleDict()
        self.mtllora_w = nn.ModuleDict()
        self.mtllora_rule: dict[str, Rule] = {}
        self.row_tasks = RowTasks()  # the model's, where it is part of one

    def create_weights(self, adapter_name: str, config: MtlLoraConfig, module_name: str, original: str | None) -> None:
        r, n, tasks = self.r[adapter_name], config.ups, len(config.tasks)
        self.mtllora_A[adapter_name] = self.new_linear(self.in_features, r, zero=False)
        self.mtllora_B[adapter_name] = self.new_linear(n * r, self.out_features, zero=config.init_weights)
        self.mtllora_turn[adapter_name] = self.new_linear(r, tasks * r, zero=True)
        self.mtllora_w[adapter_name] = self.new_linear(n, tasks, zero=False)
        self.mtllora_rule[adapter_name] = Rule(tuple(config.tasks), _default(config), config.temperature)

    def parts(self, adapter_name: str, task: int | None = None) -> Parts:
        """Of one task; None: of each row's."""
        rule, turn = self.mtllora_rule[adapter_name], self._weight("turn", adapter_name)
        rows = self.row_tasks.rows
        tasks = rows.places(rule.tasks, turn.device) if task is None else task
        tasks = rule.default if tasks is None else tasks
        if tasks is None:
            raise ValueError(
                f"Adapter {adapter_name!r} serves {listed(map(repr, rule.tasks), 'and')}, and the batch does not say "
                "of which task its rows are. Pass task=[...], a name or number for each row (in a trainer: a `task` "
                "column, and trl_callbacks.TaskColumnCallback()); or choose one for all: peft_mora.set_task(model, "
                "NAME)."
            )
        if not isinstance(tasks, int):
            self.check_rows("task")
        checked = None if isinstance(tasks, int) else rows
        gate = TaskGate(turn, self._weight("w", adapter_name), rule.temperature, tasks, checked)
        return Parts([Weight(self._weight("A", adapter_name))], [Weight(self._weight("B", adapter_name))], gate)

    def _weight(self, name: str, adapter_name: str) -> Any:
        return getattr(self, f"mtllora_{name}")[adapter_name].weight

    def row_names(self) -> list[str]:
        """Also "adapter/task"."""
        return [*self.r, *(f"{name}/{task}" for name, rule in self.mtllora_rule.items() for task in rule.tasks)]

    def of_row(self, name: str) -> tuple[str, Parts] | None:
        if name in self.r:
            return name, self.parts(name)
        found = {
            adapter: i
            for adapter, rule in self.mtllora_rule.items()
            for i, task in enumerate(rule.tasks)
            if name == f"{adapter}/{task}"
        }
        adapter = the_only(list(found), name)
        return None if adapter is None else (adapter, self.parts(adapter, found[adapter]))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged and not self.disable_adapters:
            self._check_merged()
        return super().forward(x, *args, **kwargs)

    def _check_merged(self) -> None:
        """Refuse rows of another task than the one that the weight has been merged for."""
        for adapter_name in self.merged_adapters:
            rule = self.mtllora_rule[adapter_name]
            tasks = self.row_tasks.rows.places(rule.tasks, torch.device("cpu"))
            if tasks is not None and (isinstance(tasks, Tensor) or tasks != rule.default):
                assert rule.default is not None
                raise ValueError(
                    f"Adapter {adapter_name!r} is merged for task {rule.tasks[rule.default]!r}, and the batch has "
                    "rows of another: call model.unmerge_adapter() first."
                )

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if self.row_tasks.rows.names is not None:
            raise ValueError(
                "`task` and `adapter_names` cannot be given together: name the task of a row in adapter_names, as "
                "'adapter/task'."
            )
        return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)

    def is_static(self, adapter_name: str) -> bool:
        return self.mtllora_rule[adapter_name].default is not None

    def lora_refusal(self, adapter_name: str) -> str:
        return self.merge_refusal.replace("Cannot merge", "No LoRA equals")

    @torch.no_grad()
    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (r, I) and (Σ_i p_i B_i) Λ_t (O, r) of the default task.

        Raises:
            ValueError: it has none.
        """
        rule = self.mtllora_rule[adapter_name]
        if rule.default is None:
            raise ValueError(self.merge_refusal)
        A, B, turn, w = map(at_least_float32, self.weights(adapter_name))
        r, p = len(A), (w[rule.default] / rule.temperature).softmax(-1)
        up = torch.einsum("onr,n->or", B.reshape(len(B), -1, r), p)
        return A, up + up @ turn.reshape(-1, r, r)[rule.default]


def _default(config: MtlLoraConfig) -> int | None:
    """The place of the task of batches that do not say theirs."""
    if config.default_task is not None:
        return config.tasks.index(config.default_task)
    return 0 if len(config.tasks) == 1 else None


class MtlLoraModel(AdapterModel):
    """A model with MTLLORA layers; made by `get_peft_model(model, MtlLoraConfig(...))`. The PeftModel's forward and
    `generate` take `task`, a name or number for each row."""

    prefix = "mtllora_"
    tuner_layer_cls = MtlLoraLinear

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        layers = [module for module in model.modules() if isinstance(module, MtlLoraLinear)]
        tasks = next((layer.row_tasks for layer in layers if layer.row_tasks.handles), None)
        if tasks is None:
            tasks = RowTasks()
            tasks.watch(model)
        for layer in layers:
            layer.row_tasks = tasks

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's own; the base's `generate`, which refuses what it does not know, takes `task` in here."""
        task = kwargs.pop("task", None)
        base: Any = self.model
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            if task is None or not hasattr(base, "generate") or torch.compiler.is_compiling():
                yield
                return
            own, generate = vars(base).get("generate"), base.generate
            layer = next(module for module in base.modules() if isinstance(module, MtlLoraLinear))

            def for_rows(*args: Any, task: Any, **kwargs: Any) -> Any:
                names = ("inputs", "input_ids", "inputs_embeds", getattr(base, "main_input_name", ""))
                prompts = next((p for p in (*args[:1], *map(kwargs.get, names)) if isinstance(p, Tensor)), None)
                with layer.row_tasks.answering(task, prompts):
                    return generate(*args, **kwargs)

            base.generate = for_rows
            try:
                yield
            finally:
                del base.generate
                if own is not None:
                    base.generate = own

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        layers = (module for module in self.model.modules() if isinstance(module, MtlLoraLinear))
        row_tasks = {id(layer.row_tasks): layer.row_tasks for layer in layers}
        base = super()._unload_and_optionally_merge(*args, **kwargs)  # may refuse
        for tasks in row_tasks.values():
            tasks.remove()
        return base


def set_task(model: Any, task: str | int | None, adapter_name: str = "default") -> None:
    """Choose the task of batches that do not say theirs, for inference, merging and export; kept in the config.

    Args:
        model: a PeftModel, or any model with an injected MTLLORA adapter.
        task: its name or place in the config's `tasks`; None: such batches are refused, unless there is one task.
        adapter_name: which adapter.

    Raises:
        ValueError: no such MTLLORA adapter or task, a part of its model without the config, or an adapter that is
            merged.
    """
    layers = adapter_layers(model, adapter_name, MtlLoraLinear)
    config = copy.deepcopy(config_of(model, adapter_name))
    config.default_task = None if task is None else config.tasks[place(task, config.tasks)]
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError("Cannot change the task of a merged adapter: call model.unmerge_adapter() first.")
    for layer in layers.values():
        layer.mtllora_rule[adapter_name] = layer.mtllora_rule[adapter_name]._replace(default=_default(config))
    set_config(model, adapter_name, config)
