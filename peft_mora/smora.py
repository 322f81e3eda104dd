"""SMORA: a learned router over the ranks of one LoRA.

    p = sigmoid(x W_gᵀ)                   q = p + b                                                     (float32)
    S = the K experts with the largest q                     g_i = q_i / Σ_{j in S} q_j
    y = base(x) + alpha · Σ_{i in S} g_i h_i B_i             h = x Aᵀ
    b_i += balance_rate · sign(mean(c) - c_i)                once a backward in training; c_i = how often i was chosen
W_g (R, I) is trained and has no bias; b is not trained, and it is inside of the weights as in the released code. With
`rank_partition` P an expert is P neighbouring ranks that share a row of W_g, and K counts experts.

Source: "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning" (SMoRA),
arXiv 2501.15103, whose code writes the scale as (alpha / K) · K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .balance import Balance, BalancedGate, BalancedLinear, MaskedModel, Step
from .base import Trained
from .checks import check_field, is_int, is_number
from .lean import Parts, Wanted, Weight, index_dtype
from .routed import Counter, RoutedConfig, module_top_k
from .routing import at_least_float32, kept_sigmoids, kept_sigmoids_backward, sigmoid_gate


@dataclass
class SMoraConfig(RoutedConfig):
    """Config of a SMORA adapter.

    Example:
        >>> SMoraConfig(r=64, top_k=8, target_modules="all-linear")
    """

    method: ClassVar[str] = "SMORA"

    r: int = field(default=64, metadata={"help": "Rank: all ranks of a module, of which a token wakes a part."})
    alpha: float = field(
        default=16, metadata={"help": "The update is scaled by alpha: the weights of the active experts sum to 1."}
    )
    top_k: int = field(
        default=8, metadata={"help": "K: experts that are active for a token, 1 <= top_k <= r / rank_partition."}
    )
    rank_partition: int = field(
        default=1, metadata={"help": "P: neighbouring ranks that make one expert, with one entry of the router."}
    )
    balance_rate: float = field(default=1e-5, metadata={"help": "Step of the load-balance offset b, >= 0; 0 is off."})
    kept_experts: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name -> experts left, where `prune_experts` has deleted some."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        P = self.rank_partition
        check_field(is_int(P) and P >= 1, "rank_partition", P, "an integer >= 1")
        for name, r in {"r": self.r, **{f"rank_pattern[{k!r}]": r for k, r in self.rank_pattern.items()}}.items():
            check_field(r % P == 0, "rank_partition", P, f"a divisor of `{name}`, which is {r}")
        ranks = [self.r, *self.rank_pattern.values()]
        rule = f"an integer from 1 to r / rank_partition (here {min(ranks) // P} at the least)"
        check_field(is_int(self.top_k) and 1 <= self.top_k <= min(ranks) // P, "top_k", self.top_k, rule)
        for key, k in self.top_k_pattern.items():
            rule = f"an integer from 1 to r / rank_partition (here {max(ranks) // P} at the most)"
            check_field(k <= max(ranks) // P, f"top_k_pattern[{key!r}]", k, rule)
        check_field(
            is_number(self.balance_rate) and self.balance_rate >= 0, "balance_rate", self.balance_rate, "a number >= 0"
        )
        kept = self.kept_experts
        ok = isinstance(kept, dict) and all(is_int(count) and count >= 0 for count in kept.values())
        check_field(ok, "kept_experts", kept, "a dict of integers >= 0, as `prune_experts` writes it")


class Rule(NamedTuple):
    """The fields of an adapter as one of its layers uses them."""

    top_k: int
    partition: int
    balance_rate: float


class RouterGate(BalancedGate):
    """u = w·h of one forward, of projections h (T, R) and router's scores (T, E), with w = scale · g in float32.

    What is saved is the h and scores of the experts kept, and which they are.

    Args:
        top_k: K.
        partition: P = R / E.
        scale: what the weights sum to.
        offset: (E,) b.
        step, usage: as for `BalancedGate`.
    """

    def __init__(
        self, top_k: int, partition: int, scale: float, offset: Tensor, step: Step | None, usage: Counter | None
    ) -> None:
        super().__init__(step, usage)
        self.top_k, self.partition, self.scale, self.offset = top_k, partition, scale, offset

    def _weights(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., R) weights, (..., K) which experts, (..., E) 1 for these."""
        g, index = sigmoid_gate(scores, self.offset, self.top_k)
        w = g * self.scale
        w = w if self.partition == 1 else w.repeat_interleave(self.partition, -1)
        return w, index, torch.zeros_like(g).scatter_(-1, index, 1)

    def plain(self, hs: list[Tensor]) -> list[Tensor]:
        h, scores = hs
        w, _, self.chosen = self._weights(scores)
        self._count(scores, self.chosen)
        return [(w * h).to(h.dtype)]

    def forward(
        self, hs: list[Tensor], tensors: Sequence[Tensor], shape: torch.Size, wanted: Wanted
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        h, scores = hs
        w, index, chosen = self._weights(scores)
        if self.usage is not None:
            self._count(scores.view(*shape, -1), chosen.view(*shape, -1))
        u = torch.mul(w, h, out=torch.empty_like(h))
        if not (wanted.any_dh or any(wanted.ups)):
            return [u], []
        if self.step is not None:
            self.real = self.step.real_rows(h, shape)
        kept = h.gather(-1, self._ranks(index)), scores.gather(-1, index)
        return [u], [*kept, index.to(index_dtype(scores.shape[-1])), self.offset.clone()]

    def backward(
        self,
        saved: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        grads: list[Tensor | None],
        wanted: Wanted,
    ) -> tuple[list[Tensor | None], list[Tensor | None], tuple[()]]:
        h, scores, index, offset = saved
        assert h is not None and scores is not None and index is not None and offset is not None
        index, (grad,) = index.long(), grads
        ranks, E = self._ranks(index), len(offset)
        zeros = h.new_zeros(len(h), E * self.partition)
        self.count_choices(h.new_zeros(len(h), E, dtype=torch.float32).scatter_(-1, index, 1))
        p, g, total = kept_sigmoids(scores, offset, index)
        w = (g * self.scale).repeat_interleave(self.partition, -1)
        u = zeros.scatter(-1, ranks, (w * h).to(h.dtype))
        if grad is None:
            return [u], [None, None], ()
        du = at_least_float32(grad.gather(-1, ranks))
        dg = (du * h).unflatten(-1, (-1, self.partition)).sum(-1) * self.scale
        ds = kept_sigmoids_backward(p, g, total, dg).to(h.dtype)
        dh = zeros.scatter_(-1, ranks, (du * w).to(h.dtype))
        return [u], [dh, h.new_zeros(len(h), E).scatter_(-1, index, ds)], ()

    def _ranks(self, index: Tensor) -> Tensor:
        """(T, K·P) which ranks the experts (T, K) are."""
        if self.partition == 1:
            return index
        each = torch.arange(self.partition, device=index.device)
        return (index[..., None] * self.partition + each).flatten(-2)

    def _count(self, scores: Tensor, chosen: Tensor) -> None:
        if self.usage is None:
            return
        self.usage.add(chosen)
        if self.usage.needed:
            self.usage.add_need(F.normalize(torch.sigmoid(scores.detach().float()), p=1, dim=-1))


class SMoraLinear(BalancedLinear):
    """`smora_A` (R, I), `smora_B` (O, R) and the router `smora_W` (R / P, I), trained; `smora_offset` (R / P,) the
    load-balance offset b, float32. R is r, less what was pruned."""

    smora_A: Any
    smora_B: Any
    smora_W: Any
    smora_offset: Any
    prefix = "smora_"
    adapter_layer_names = ("smora_A", "smora_B", "smora_W")
    other_param_names = (
        "smora_offset", "smora_rule", "balance", "module_names", "usage", "r", "scaling", "dropout",
    )  # fmt: skip
    merge_refusal = (
        "Cannot merge a SMORA adapter: which experts are active depends on the input, so no single weight equals it. "
        "Keep it unmerged (model.unload() gives the base back), or train with MoraConfig(routing='dense'), which "
        "merges exactly."
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.smora_A = nn.ModuleDict()
        self.smora_B = nn.ModuleDict()
        self.smora_W = nn.ModuleDict()
        self.smora_rule: dict[str, Rule] = {}

    def create_weights(self, adapter_name: str, config: SMoraConfig, module_name: str, original: str | None) -> None:
        experts = self.r[adapter_name] // config.rank_partition
        top_k = module_top_k(config, module_name, experts)
        self.smora_rule[adapter_name] = Rule(top_k, config.rank_partition, config.balance_rate)
        kept = config.kept_experts.get(module_name, experts)
        check_field(kept <= experts, f"kept_experts[{module_name!r}]", kept, f"at most r / rank_partition: {experts}")
        R = kept * config.rank_partition
        self.smora_A[adapter_name] = self.new_linear(self.in_features, R, zero=False)
        self.smora_B[adapter_name] = self.new_linear(R, self.out_features, zero=config.init_weights)
        self.smora_W[adapter_name] = self.new_linear(self.in_features, kept, zero=False)
        self.create_offset(adapter_name, original, config.inference_mode)

    def expert_count(self, adapter_name: str) -> int:
        return self.smora_W[adapter_name].weight.shape[0]

    def choices(self, adapter_name: str) -> int:
        return self.expert_count(adapter_name)

    def largest_top_k(self, adapter_name: str) -> int:
        return self.r[adapter_name] // self.smora_rule[adapter_name].partition

    def top_k(self, adapter_name: str) -> int:
        return self.smora_rule[adapter_name].top_k

    def set_top_k(self, adapter_name: str, k: int) -> None:
        self.smora_rule[adapter_name] = self.smora_rule[adapter_name]._replace(top_k=k)

    def balance_rate(self, adapter_name: str) -> float:
        return self.smora_rule[adapter_name].balance_rate

    def block_fields(self, adapter_name: str) -> dict[str, Any]:
        experts = self.expert_count(adapter_name)
        return {"kept_experts": experts if experts != self.largest_top_k(adapter_name) else None}

    def parts(self, adapter_name: str) -> Parts:
        A, B, W = self.weights(adapter_name)
        offset, rule = self.current_offset(adapter_name), self.smora_rule[adapter_name]
        step, usage = self.step(adapter_name, offset, B), self.counting(adapter_name)
        # The layer scales by alpha / r, the rule by alpha.
        gate = RouterGate(rule.top_k, rule.partition, self.r[adapter_name], offset, step, usage)
        return Parts([Weight(A), Weight(W)], [Weight(B)], gate)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        A, B, _ = self.weights(adapter_name)
        return A.detach().float(), B.detach().float()

    def trained(self, adapter_name: str) -> Trained | None:
        A, B, W = self.weights(adapter_name)
        return Trained(A, B, through=(W,)) if A.requires_grad or B.requires_grad else None

    def without(self, adapter_name: str, stays: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The weights that `put` puts in place, computed without touching a thing.

        Args:
            stays: (E,) bool on the CPU, which experts stay.

        Returns:
            `stays`; A, B and W of the experts that do.
        """
        A, B, W = (weight.detach() for weight in self.weights(adapter_name))
        experts = stays.to(A.device)
        ranks = experts.repeat_interleave(self.smora_rule[adapter_name].partition)
        return stays, [A[ranks], B[:, ranks].contiguous(), W[experts]]

    def put(self, adapter_name: str, stays: Tensor, tensors: list[Tensor]) -> None:
        """Go on with the experts that `without` has picked out, which are new parameters."""
        offset, balance = self.smora_offset[adapter_name], self.balance[adapter_name]
        balance.settle(offset, self.balance_rate(adapter_name), self.balanced_weight(adapter_name))
        self.smora_offset[adapter_name] = offset[stays.to(offset.device)]
        self.balance[adapter_name] = Balance(balance.doubts)
        for name, values in zip(self.adapter_layer_names, tensors, strict=True):
            trains = getattr(self, name)[adapter_name].weight.requires_grad
            linear = self.new_linear(values.shape[1], values.shape[0], zero=True)
            linear.weight = nn.Parameter(values, requires_grad=trains)
            getattr(self, name)[adapter_name] = linear
        self.usage.pop(adapter_name, None)  # counts of other experts


class SMoraModel(MaskedModel):
    """A model with SMORA layers; made by `get_peft_model(model, SMoraConfig(...))`."""

    prefix = "smora_"
    tuner_layer_cls = SMoraLinear
