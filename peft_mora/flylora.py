"""FLYLORA: the frozen sparse projection is the router.

    h = x Aᵀ                         A frozen: each row has p = round(density · I) non-zeros ~ N(0, 1 / r²)
    S = the K experts with the largest |h_i| + d_i                              ("signed": the largest h_i + d_i)
    y = base(x) + (alpha / r) · Σ_{i in S} h_i B_i
    d_i += balance_rate · sign(mean(c) - c_i)       once per backward in training; c_i = how often i was chosen
d only ranks; it never multiplies the output. The gradient flows to x through the selected experts.

Source: "FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise Mixture-of-Experts",
arXiv 2510.08396, whose text selects by magnitude (the default here) and whose code selects by sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .balance import BalancedGate, BalancedLinear, MaskedModel, Step
from .checks import check_field, is_int, is_number
from .lean import Parts, Wanted, Weight, index_dtype
from .routed import Counter, RoutedConfig, module_top_k
from .routing import select_by_magnitude, select_by_sign
from .seeded import SeededConfig, SeededLinear, SeededModel, as_projection, generator


Selection = Literal["magnitude", "signed"]


@dataclass
class FlyLoraConfig(SeededConfig, RoutedConfig):
    """Config of a FLYLORA adapter.

    Example:
        >>> FlyLoraConfig(r=32, top_k=8, target_modules="all-linear")
    """

    method: ClassVar[str] = "FLYLORA"

    r: int = field(default=32, metadata={"help": "Rank: how many rank-1 experts a module has."})
    alpha: float = field(default=64, metadata={"help": "The update is scaled by alpha / r."})
    top_k: int = field(default=8, metadata={"help": "K: experts that are active for a token, 1 <= top_k <= r."})
    density: float | None = field(
        default=None, metadata={"help": "Share of non-zeros in each row of A, in (0, 1]. None is top_k / r."}
    )
    selection: Selection = field(
        default="magnitude",
        metadata={"help": "Select by |h| + d ('magnitude', the paper) or h + d ('signed', its code)."},
    )
    balance_rate: float = field(default=1e-3, metadata={"help": "Step of the load-balance offset d, >= 0; 0 is off."})

    def __post_init__(self) -> None:
        super().__post_init__()
        smallest = min([self.r, *self.rank_pattern.values()])
        check_field(is_int(self.top_k) and self.top_k >= 1, "top_k", self.top_k, "an integer >= 1")
        check_field(self.top_k <= smallest, "top_k", self.top_k, f"<= r (here {smallest} at the least)")
        check_field(
            self.density is None or (is_number(self.density) and 0 < self.density <= 1),
            "density",
            self.density,
            "a number in (0, 1], or None for top_k / r",
        )
        check_field(self.selection in get_args(Selection), "selection", self.selection, "'magnitude' or 'signed'")
        check_field(
            is_number(self.balance_rate) and self.balance_rate >= 0, "balance_rate", self.balance_rate, "a number >= 0"
        )


class Columns(NamedTuple):
    """A sparse A (r, I) by the columns (r, p) of its values."""

    columns: Tensor
    in_features: int

    def matrix(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        zeros = values.new_zeros(len(values), self.in_features, dtype=dtype)
        return zeros.scatter_(1, self.columns.long(), values.to(dtype))

    def pack(self, grad: Tensor) -> Tensor:
        return grad.gather(1, self.columns.long())


class Made(NamedTuple):
    """A (r, I), made of these values as of this version of them."""

    of: Tensor
    version: int
    A: Tensor


class LayersA(NamedTuple):
    """The form of a layer's A: the layer makes the matrix, and holds on to it."""

    layer: FlyLoraLinear
    adapter_name: str

    def matrix(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return self.layer.matrix_A(self.adapter_name, dtype)

    def pack(self, grad: Tensor) -> Tensor:
        raise NotImplementedError("A is frozen")


class SelectionGate(BalancedGate):
    """The K selected projections of one forward, the others 0.

    What is saved is K values and their experts. Where that is more than all of h, it is h, and the offset as it is
    now, by which the backward selects again.
    """

    def __init__(self, selection: Selection, k: int, offset: Tensor, step: Step | None, usage: Counter | None) -> None:
        super().__init__(step, usage)
        self.selection, self.k, self.offset = selection, k, offset

    def _select(self, h: Tensor, offset: Tensor) -> Tensor:
        return (select_by_magnitude if self.selection == "magnitude" else select_by_sign)(h, offset, self.k)

    def plain(self, hs: list[Tensor]) -> list[Tensor]:
        (h,) = hs
        self.chosen = torch.zeros_like(h).scatter_(-1, self._select(h, self.offset), 1)
        self._count(h, self.chosen)
        return [h * self.chosen]

    def forward(
        self, hs: list[Tensor], tensors: Sequence[Tensor], shape: torch.Size, wanted: Wanted
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        (h,) = hs
        index = self._select(h, self.offset)
        values = h.gather(-1, index)
        gated = torch.zeros_like(h).scatter_(-1, index, values)
        if self.usage is not None:
            chosen = torch.zeros_like(h).scatter_(-1, index, 1)
            self._count(h.view(*shape, -1), chosen.view(*shape, -1))
        if not (wanted.any_dh or any(wanted.ups)):
            return [gated], []
        if self.step is not None:
            self.real = self.step.real_rows(h, shape)
        dtype = index_dtype(h.shape[-1])
        if self.k * (h.element_size() + dtype.itemsize) < h.shape[-1] * h.element_size():
            return [gated], [values, index.to(dtype)]
        return [gated], [h, self.offset.clone()]

    def backward(
        self,
        saved: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        grads: list[Tensor | None],
        wanted: Wanted,
    ) -> tuple[list[Tensor | None], list[Tensor | None], tuple[()]]:
        values, index = saved
        assert values is not None and index is not None
        if index.is_floating_point():
            index = self._select(values, index)
            values = values.gather(-1, index)
        index = index.long()
        zeros = values.new_zeros(len(values), len(self.offset))
        chosen = zeros.scatter(-1, index, 1)
        self.count_choices(chosen)
        (grad,) = grads
        return [zeros.scatter_(-1, index, values)], [None if grad is None else grad.mul_(chosen)], ()

    def _count(self, h: Tensor, chosen: Tensor) -> None:
        if self.usage is None:
            return
        self.usage.add(chosen)
        if self.usage.needed:
            self.usage.add_need(F.normalize(h.detach().float().abs(), p=1, dim=-1))


class FlyLoraLinear(SeededLinear, BalancedLinear):
    """`flylora_A` (r, p) values and `flylora_index` (r, p) their columns, frozen; `flylora_B` (O, r) trained;
    `flylora_offset` (r,) the load-balance offset d, float32."""

    flylora_A: Any
    flylora_index: Any
    flylora_B: Any
    flylora_offset: Any
    prefix = "flylora_"
    adapter_layer_names = ("flylora_B",)
    projection_names = ("flylora_A", "flylora_index")
    other_param_names = (
        "flylora_A", "flylora_index", "flylora_checksum", "flylora_offset", "flylora_rule",
        "flylora_made", "balance", "module_names", "usage", "unchecked",
        "r", "scaling", "dropout",
    )  # fmt: skip
    merge_refusal = (
        "Cannot merge a FLYLORA adapter: which experts are active depends on the input, so no single weight equals "
        "it. Keep it unmerged (model.unload() gives the base back), or train with LoriConfig, whose frozen projection "
        "merges exactly."
    )

    prune_refusal = (
        "the frozen projection of FLYLORA comes from the seed with all of its experts. Lower `top_k` to wake fewer of "
        "them, or train with a smaller r."
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.flylora_made: dict[str, Made] = {}
        self.flylora_rule: dict[str, tuple[Selection, int, float]] = {}

    def create_weights(self, adapter_name: str, config: FlyLoraConfig, module_name: str, original: str | None) -> None:
        r = self.r[adapter_name]
        top_k = module_top_k(config, module_name, r)
        self.flylora_rule[adapter_name] = (config.selection, top_k, config.balance_rate)
        self.create_projection(adapter_name, config, module_name, original)
        self.flylora_B[adapter_name] = self.new_linear(r, self.out_features, zero=config.init_weights)
        self.create_offset(adapter_name, original, config.inference_mode)

    def draw_projection(self, adapter_name: str, config: FlyLoraConfig, module_name: str) -> tuple[Tensor, ...]:
        r = self.r[adapter_name]
        density = config.top_k / r if config.density is None else config.density
        p = max(1, round(density * self.in_features))
        if config.seed is None:
            return torch.zeros(r, p), torch.zeros(r, p, dtype=torch.int32)
        random = generator(config.seed, module_name)
        columns = np.stack([np.sort(random.permutation(self.in_features)[:p]) for _ in range(r)])
        return as_projection(random.standard_normal((r, p)) / r), torch.from_numpy(columns.astype(np.int32))

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.flylora_made = {}  # made of the copy that only this replica has
        return replica

    def top_k(self, adapter_name: str) -> int:
        return self.flylora_rule[adapter_name][1]

    def set_top_k(self, adapter_name: str, k: int) -> None:
        selection, _, rate = self.flylora_rule[adapter_name]
        self.flylora_rule[adapter_name] = (selection, k, rate)

    def balance_rate(self, adapter_name: str) -> float:
        return self.flylora_rule[adapter_name][2]

    def matrix_A(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """A (r, I) in `dtype`. Stored sparse; at densities of 1/4 a dense product is the faster one, and A in 16 bits
        takes no more than its float32 values with their columns: it is made once, not in every forward and backward.
        """
        values = self.flylora_A[adapter_name]
        if torch.compiler.is_compiling() or values.is_inference():
            return self._columns(adapter_name).matrix(values, dtype)
        made = self.flylora_made.get(adapter_name)
        if made is None or made.of is not values or made.version != values._version or made.A.dtype != dtype:
            with torch.inference_mode(False):  # training goes on with it after an evaluation made it
                made = Made(values, values._version, self._columns(adapter_name).matrix(values.clone(), dtype))
            self.flylora_made[adapter_name] = made
        return made.A

    def _columns(self, adapter_name: str) -> Columns:
        return Columns(self.flylora_index[adapter_name], self.in_features)

    def parts(self, adapter_name: str) -> Parts:
        selection, k, _ = self.flylora_rule[adapter_name]
        offset, B = self.current_offset(adapter_name), self.flylora_B[adapter_name].weight
        gate = SelectionGate(selection, k, offset, self.step(adapter_name, offset, B), self.counting(adapter_name))
        return Parts([Weight(self.flylora_A[adapter_name], LayersA(self, adapter_name))], [Weight(B)], gate)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.matrix_A(adapter_name, torch.float32), self.flylora_B[adapter_name].weight.detach().float()


class FlyLoraModel(SeededModel, MaskedModel):
    """A model with FLYLORA layers; made by `get_peft_model(model, FlyLoraConfig(...))`."""

    prefix = "flylora_"
    tuner_layer_cls = FlyLoraLinear
