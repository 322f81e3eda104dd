"""Ranks that grow while they are learnt: each module gets more of them the more they matter there.

    g_l  = EMA over steps of  mean_i ( mean |A_i ∘ ∂A_i| + mean |B_i ∘ ∂B_i| )      over the r_l ranks i of module l
    the next rank goes to the module with the largest g_l / (r_l + 1), until the step's total is spent

After DR-LoRA (arXiv 2601.04823), reconstructed from its abstract and summaries: its saliency is a routing frequency
times a gradient-based importance of ranks; modules that see every token have frequency 1. B is 0 for a new rank, so
that growing changes no output, and the optimizer keeps what it knows of the old ones.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_mora.base import REFERENCE, set_config
from peft_mora.checks import check_field, is_int, is_number
from peft_mora.mora import MoraLinear
from peft_mora.routed import record_routing

from .factors import Factors, are_those, static_factors
from .host import HostCallback, callbacks_that


def saliency(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor) -> Tensor:
    """How much the loss feels a module's ranks: the mean over ranks of mean |A_i ∘ ∂A_i| + mean |B_i ∘ ∂B_i|.

    Args:
        A, grad_A: (r, I). B, grad_B: (O, r). Any float dtype.

    Returns:
        A scalar, float32.
    """
    return (A.float() * grad_A.float()).abs().mean() + (B.float() * grad_B.float()).abs().mean()


def allocate(total: int, ranks: Sequence[int], limits: Sequence[int], needs: Sequence[float]) -> list[int]:
    """Ranks that sum to `total` and are nowhere smaller than they are: one by one to the largest need / (rank + 1).

    Example:
        >>> allocate(8, [1, 1, 1], [6, 6, 6], [4.0, 1.0, 2.0])
        [5, 1, 2]

    Raises:
        ValueError: the limits do not leave room for so many.
    """
    if total > sum(limits):
        raise ValueError(f"Cannot give out {total} ranks over {len(ranks)} modules that take at most {list(limits)}.")
    grown = list(ranks)
    # Equal ones by the smaller rank, then in their order.
    heap = [(-need / (r + 1), r, i) for i, (r, need) in enumerate(zip(ranks, needs, strict=True)) if r < limits[i]]
    heapq.heapify(heap)
    for _ in range(total - sum(ranks)):
        _, r, i = heapq.heappop(heap)
        grown[i] = r + 1
        if r + 1 < limits[i]:
            heapq.heappush(heap, (-needs[i] / (r + 2), r + 1, i))
    return grown


class RankGrowthCallback(HostCallback):
    """Start a LoRA, or MORA with routing "dense", with few ranks and let them grow where they matter most.

    Every `interval` steps of the first `until` of the run, and at its end, the mean rank of the modules rises in a
    line from what the adapter has to `target`. New ranks have B = 0 and a fresh A: no output changes when they come.
    The scale alpha / r of each module stays what it was, by `rank_pattern` and `alpha_pattern` of the config, so that
    the adapter opens, merges and trains on as any other. Optimizers with a state of the weight's shape (AdamW, SGD,
    Lion, schedule-free) keep it, with zeros for what is new; the others are refused.

    A module that has no gradient in a step counts as 0 there; as long as it never had one, it gets no ranks.

    The trainer's logs get `rank_mean` and `rank_max`.

    To resume, open the checkpoint, whose ranks have grown, and give it to the trainer:
    `PeftModel.from_pretrained(base, checkpoint, is_trainable=True)`; then `train(resume_from_checkpoint=checkpoint)`.
    A preference trainer takes it for its reference as well; what the run began with has to be put in its place.

    Args:
        target: mean rank of the modules in the end; at least what the adapter has.
        interval: steps between two growths, >= 1.
        until: share of the run in which ranks grow, in (0, 1].
        limit: most ranks of a module; None is 2 · target.
        memory: how much of the saliency is the past's, β of its running mean, in [0, 1).
        adapter_name: which adapter; None is the one in training.

    Raises:
        ValueError: on construction for a wrong argument; at the start of training for an adapter whose update is not
            B·A, a target or limit that it cannot have, a callback beside it that holds weights, several processes,
            DeepSpeed or FSDP; at the first growth for an optimizer whose state cannot grow, or where so many modules
            have had no gradient that the others cannot take all ranks.

    Example:
        >>> callback = RankGrowthCallback(16, interval=20)
        >>> SFTTrainer(..., peft_config=LoraConfig(r=4, target_modules="all-linear"), callbacks=[callback])
    """

    sidecar = "rank_growth.safetensors"
    replaces_weights = True

    def __init__(
        self,
        target: float,
        *,
        interval: int = 50,
        until: float = 0.5,
        limit: int | None = None,
        memory: float = 0.9,
        adapter_name: str | None = None,
    ) -> None:
        check_field(is_number(target) and target >= 1, "target", target, "a number >= 1")
        check_field(is_int(interval) and interval >= 1, "interval", interval, "an integer >= 1")
        check_field(is_number(until) and 0 < until <= 1, "until", until, "a share of the run in (0, 1]")
        check_field(
            limit is None or (is_int(limit) and limit >= target), "limit", limit, f"an integer >= target ({target:g})"
        )
        check_field(is_number(memory) and 0 <= memory < 1, "memory", memory, "a number in [0, 1)")
        self.target, self.interval, self.until, self.memory = target, interval, until, memory
        self.limit = math.floor(2 * target) if limit is None else limit
        self.adapter_name = adapter_name
        self._factors: dict[str, Factors] = {}
        self._begin: list[int] = []  # each module's rank when the run began
        self._needs: Tensor | None = None  # (modules,) running mean of saliency, on the CPU
        self._used = torch.zeros(0, dtype=torch.bool)  # (modules,) whether each has had a gradient

    def refusals(self) -> dict[str, str]:
        replaces = (
            "RankGrowthCallback replaces parameters in the middle of a run, which DDP, FSDP and DeepSpeed do not "
            "allow. Use one process, or train with rank_pattern as a run in one process has found it."
        )
        return {
            "processes": replaces,
            "deepspeed": replaces,
            "fsdp": replaces,
            "layerwise": "An optimizer that steps within the backward (layer-wise, LOMO) leaves no gradient, by which "
            "ranks grow. Use another `optim`.",
            "best_model": "load_best_model_at_end could bring back a checkpoint with other ranks, which does not fit. "
            "Leave it out, and open the best checkpoint with PeftModel.from_pretrained.",
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        self._name, factors = static_factors(model, self.adapter_name, "RankGrowthCallback")
        if holding := callbacks_that("holds_weights"):
            raise ValueError(
                f"{holding[0]} holds on to the adapter's weights, which RankGrowthCallback replaces as they grow. "
                "Train with one of them."
            )
        before, self._factors = self._factors, factors
        # The trainer begins anew, with a smaller batch, where memory has run out: ranks may have grown already.
        again = are_those(factors, before)
        ranks = [len(pair.A) for pair in factors.values()]
        self._limits = [min(self.limit, pair.A.shape[1], len(pair.B)) for pair in factors.values()]
        if state.global_step > 0:
            _check_reference(model, self._name)
            kept = self.saved_here(args, state)
            self._begin, self._needs = kept["begin"].tolist(), kept.get("needs")
            self._used = kept.get("used", torch.zeros(len(ranks), dtype=torch.bool))
        elif not again:
            self._begin, self._needs = ranks, None
            self._used = torch.zeros(len(ranks), dtype=torch.bool)
        start, total = sum(self._begin), self._total(state.max_steps, state.max_steps)
        if not start <= total <= sum(map(max, self._limits, ranks)):
            raise ValueError(
                f"`target` is a mean rank of {self.target:g}, but the {len(ranks)} modules of this adapter have "
                f"{start / len(ranks):g} and can have {sum(self._limits) / len(ranks):g} (limit {self.limit}, or what "
                "their shape allows). Choose a number in between, a smaller r, or a larger `limit`."
            )

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        each, used = [], []
        for A, B, *_ in self._factors.values():
            grad_A, grad_B = (torch.zeros_like(p) if p.grad is None else p.grad for p in (A, B))
            each.append(saliency(A, B, grad_A, grad_B).cpu())
            used.append(bool(grad_A.any() or grad_B.any()))
        self._used = self._used | torch.tensor(used)
        found = torch.stack(each)
        if found.isfinite().all():  # else fp16's scaler leaves the step out
            self._needs = found if self._needs is None else self.memory * self._needs + (1 - self.memory) * found

    @torch.no_grad()
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        step, settled = state.global_step, math.ceil(self.until * state.max_steps)
        if step > settled or (step % self.interval and step != settled):
            return
        ranks = [len(pair.A) for pair in self._factors.values()]
        used = self._used.tolist()
        limits = [max(m, r) if acts else r for m, r, acts in zip(self._limits, ranks, used, strict=True)]
        if (end := self._total(state.max_steps, state.max_steps)) > sum(limits):
            idle = [name for name, acts in zip(self._factors, used, strict=True) if not acts]
            raise ValueError(
                f"{len(idle)} of {len(ranks)} modules have had no gradient up to step {step}, e.g. {idle[0]!r}: the "
                f"data does not use them, and they get no ranks. All modules together can have {sum(limits)} then, "
                f"and `target` needs {end}. Leave those out of target_modules; or, if later data uses them, choose a "
                "larger `limit` or `interval`."
            )
        total = max(sum(ranks), self._total(step, state.max_steps))
        needs = [0.0] * len(ranks) if self._needs is None else self._needs.tolist()
        grown = allocate(total, ranks, limits, needs)
        more = {name: new - old for name, old, new in zip(self._factors, ranks, grown, strict=True) if new > old}
        if more:
            before = self._factors
            generator = torch.Generator().manual_seed(2**20 * args.seed + step)
            add_ranks(model, self._name, before, more, generator)
            self._factors = static_factors(model, self._name, "RankGrowthCallback")[1]
            for name in more:
                for old, new in zip(before[name][:2], self._factors[name][:2], strict=True):
                    hand_over(optimizer, old, new)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._factors and state.is_world_process_zero:
            ranks = [len(pair.A) for pair in self._factors.values()]
            mean = sum(ranks) / len(ranks)
            print(f"ranks of {len(ranks)} modules: {min(ranks)} to {max(ranks)}, mean {mean:g}")
        self._factors = {}

    def metrics(self) -> dict[str, float]:
        ranks = [len(pair.A) for pair in self._factors.values()]
        return {"rank_mean": sum(ranks) / len(ranks), "rank_max": float(max(ranks))} if ranks else {}

    def kept(self) -> dict[str, Tensor]:
        needs = {} if self._needs is None else {"needs": self._needs}
        return {"begin": torch.tensor(self._begin), "used": self._used, **needs}

    def _total(self, step: int, steps: int) -> int:
        """Ranks of all modules together after a step."""
        start, end = sum(self._begin), math.floor(self.target * len(self._begin) + 0.5)
        return start + math.floor((end - start) * min(1.0, step / math.ceil(self.until * steps)) + 0.5)


@torch.no_grad()
def add_ranks(
    model: Any, adapter_name: str, factors: Mapping[str, Factors], more: Mapping[str, int], generator: torch.Generator
) -> None:
    """Append ranks to modules: rows of A as kaiming-uniform(a=√5) gives them, zeros to B; each scale stays.

    The weights are new parameters, and the config says every module's rank and alpha by name.

    Args:
        factors: of all modules of the adapter.
        more: module -> how many ranks it gets.
        generator: what A is drawn from, on the CPU.
    """
    for name, n in more.items():
        A, B, layer = factors[name].A, factors[name].B, factors[name].layer
        bound = A.shape[1] ** -0.5
        rows = (torch.rand(n, A.shape[1], generator=generator) * 2 * bound - bound).to(A)
        if isinstance(layer, MoraLinear):
            layer.widen(adapter_name, rows)
            continue
        down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        down.weight = nn.Parameter(torch.cat([A, rows]), requires_grad=A.requires_grad)
        up.weight = nn.Parameter(torch.cat([B, B.new_zeros(len(B), n)], dim=1), requires_grad=B.requires_grad)
        down.out_features = up.in_features = layer.r[adapter_name] = len(down.weight)
    config = copy.deepcopy(model.peft_config[adapter_name])
    ranks = {name: pair.layer.r[adapter_name] for name, pair in factors.items()}
    # A LoRA of `use_rslora` has alpha / √r for its scale.
    power = 0.5 if getattr(config, "use_rslora", False) else 1.0
    alphas = {name: factors[name].layer.scaling[adapter_name] * r**power for name, r in ranks.items()}
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    if all(isinstance(pair.layer, MoraLinear) for pair in factors.values()):
        set_config(model, adapter_name, config)
        record_routing(model, adapter_name)
        return
    for name, pair in factors.items():
        pair.layer.lora_alpha[adapter_name] = alphas[name]
    model.peft_config[adapter_name] = config


def _check_reference(model: nn.Module, adapter_name: str) -> None:
    """Refuse a preference run that resumes with what it has learnt as its reference: the trainer copies an adapter
    that it is given.

    Raises:
        ValueError: the reference adapter has the very weights of the one in training.
    """
    if REFERENCE not in getattr(model, "peft_config", {}):
        return
    learnt, reference = (
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        for name in (adapter_name, REFERENCE)
    )
    if learnt.keys() == reference.keys() and all(torch.equal(t, reference[key]) for key, t in learnt.items()):
        raise ValueError(
            f"The trainer has copied the adapter of the checkpoint as its reference, {REFERENCE!r}, and would compare "
            "it with itself. Where the run began with a fresh adapter its reference was the base: call "
            f"trainer.model.delete_adapter({REFERENCE!r}) before train(). Where it began with a trained one, give the "
            "trainer that as ref_model, merged into its base."
        )


def hand_over(optimizer: Any, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put `new`, which is `old` with rows or columns behind it, into the optimizer in its place, and its state too.

    Raises:
        ValueError: the state is in another form than the weight's.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    grown = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            if value.shape != old.shape or not value.is_floating_point():
                inner = getattr(optimizer, "optimizer", optimizer)
                raise ValueError(
                    f"The optimizer {type(inner).__name__} keeps {key!r} in another form than the weight it is of, "
                    "which cannot grow with it. Use optim='adamw_torch'."
                )
            # Of a schedule-free optimizer z is a weight; all else are moments.
            wide = new.detach().to(value.dtype).clone() if key == "z" else value.new_zeros(new.shape)
            wide[: old.shape[0], : old.shape[1]] = value
            value = wide
        grown[key] = value
    optimizer.state[new] = grown
