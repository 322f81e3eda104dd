"""LORI: frozen random A, trained B, and of B only the entries that matter.

    y = base(x) + (alpha / r) · (x Aᵀ) Bᵀ        A random, frozen, from the seed; B starts at 0
LoRI-D trains all of B. LoRI-S trains a share 1 - sparsity of its entries: those with the largest |B| after a dense
calibration run, by one threshold over all modules, starting again from 0 with the same A. It is kept packed: the
trainable parameter holds the kept values and nothing else, so gradients, optimizer state and file shrink with it, and
the other entries are 0 by construction. The update is one ΔW = (alpha / r) · B·A: it merges and converts exactly.

Source: "LoRI: Reducing Cross-Task Interference in Multi-Task Low-Rank Adaptation", arXiv 2504.07448.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from .base import REFERENCE, adapter_layers, check_adapter_name, config_of, set_config
from .checks import as_float, check_field, is_int, is_number
from .experts import ExpertModel, ExpertWeights
from .lean import Parts, Weight
from .packed import Packed, PackedB, pack_bits, unpack_bits
from .routing import at_least_float32
from .seeded import SeededConfig, SeededLinear, SeededModel, as_projection, generator


@dataclass
class LoriConfig(SeededConfig):
    """Config of a LORI adapter.

    Example:
        >>> LoriConfig(r=32, target_modules="all-linear")  # LoRI-D; `sparsify(model, 0.9)` makes it LoRI-S
    """

    method: ClassVar[str] = "LORI"

    r: int = field(default=32, metadata={"help": "Rank."})
    alpha: float = field(default=64, metadata={"help": "The update is scaled by alpha / r."})
    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "Share of B's entries that are not trained, in [0, 1). None trains all (LoRI-D). Given at "
            "construction, the entries to train are drawn at random from the seed; `sparsify` chooses them by "
            "magnitude after a calibration run instead, and sets this."
        },
    )
    kept_entries: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name -> trained entries of B. Written by `sparsify`."}
    )
    frozen_entries: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Module name -> entries of B frozen from an earlier task. Written by `sparsify(onto=...)`."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(
            self.sparsity is None or (is_number(self.sparsity) and 0 <= self.sparsity < 1),
            "sparsity",
            self.sparsity,
            "a number in [0, 1), or None for a dense B",
        )
        for name in ("kept_entries", "frozen_entries"):
            value = getattr(self, name)
            ok = isinstance(value, dict) and all(is_int(count) and count >= 0 for count in value.values())
            check_field(ok, name, value, "a dict of integers >= 0, as `sparsify` writes it")

    def parameters_refusal(self) -> str:
        return ""


class LoriLinear(SeededLinear):
    """`lori_A` (r, I) frozen; `lori_B` (O, r) dense, or packed with `lori_mask`, the places of its entries as bits.

    `lori_frozen_B` and `lori_frozen_mask` hold entries kept from an earlier task (`sparsify(onto=...)`); they take no
    part in training.
    """

    lori_A: Any
    lori_B: Any
    prefix = "lori_"
    adapter_layer_names = ("lori_B",)
    projection_names = ("lori_A",)
    other_param_names = (
        "lori_A", "lori_checksum", "lori_mask", "lori_frozen_mask", "lori_frozen_B", "lori_places",
        "lori_frozen_places", "module_names", "unchecked", "r", "scaling", "dropout",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.lori_mask = BufferDict(persistent=True)
        self.lori_frozen_mask = BufferDict(persistent=True)
        self.lori_frozen_B = BufferDict(persistent=True)
        self.lori_places = BufferDict(persistent=False)  # what the masks say, as int64 places; made when needed
        self.lori_frozen_places = BufferDict(persistent=False)
        self.register_load_state_dict_post_hook(_forget_old_places)

    def size(self, adapter_name: str) -> int:
        """Entries of a dense B."""
        return self.out_features * self.r[adapter_name]

    def create_weights(self, adapter_name: str, config: LoriConfig, module_name: str, original: str | None) -> None:
        self.create_projection(adapter_name, config, module_name, original)
        if config.sparsity is None:
            self.lori_B[adapter_name] = self.new_linear(self.r[adapter_name], self.out_features, config.init_weights)
            return
        kept = config.kept_entries.get(module_name)
        mask = self._random_mask(adapter_name, config, module_name, kept)
        self.set_packed(adapter_name, mask, torch.zeros(int(mask.sum())))
        weight = self.lori_B[adapter_name].weight
        if not config.init_weights and not weight.is_meta:
            nn.init.uniform_(weight, -1 / math.sqrt(self.r[adapter_name]), 1 / math.sqrt(self.r[adapter_name]))
        frozen = config.frozen_entries.get(module_name, 0)
        if frozen:
            # Right in number; the file brings the rest.
            places = torch.arange(self.size(adapter_name), device="cpu") < frozen
            self.set_frozen(adapter_name, places, torch.zeros(frozen))
        learnt = (self.lori_frozen_mask, self.lori_frozen_B) if adapter_name == REFERENCE else ()
        for entries in (self.lori_mask, *learnt):
            if original in entries:
                entries[adapter_name] = entries[original].clone()

    def draw_projection(self, adapter_name: str, config: LoriConfig, module_name: str) -> tuple[Tensor, ...]:
        shape, bound = (self.r[adapter_name], self.in_features), 1 / math.sqrt(self.in_features)
        if config.seed is None:
            return (torch.zeros(shape),)
        return (as_projection(generator(config.seed, module_name).uniform(-bound, bound, shape)),)

    def _random_mask(self, adapter_name: str, config: LoriConfig, module_name: str, kept: int | None) -> Tensor:
        n = self.size(adapter_name)
        kept = round((1 - (config.sparsity or 0)) * n) if kept is None else kept
        mask = torch.zeros(n, dtype=torch.bool, device="cpu")  # also where new tensors are made on meta
        mask[torch.from_numpy(generator(config.seed or 0, module_name, "mask").permutation(n)[:kept])] = True
        return mask

    def set_packed(self, adapter_name: str, mask: Tensor, values: Tensor, dtype: torch.dtype | None = None) -> None:
        """Make B packed: `mask` (O·r,) bool says where, `values` (kept,) what, in `dtype` or else the base's."""
        device, base_dtype = self._weight_placement()
        packed = PackedB(int(mask.sum()))
        if not packed.weight.is_meta:
            packed.weight.data.copy_(values)
            packed.to(device, dtype or base_dtype)
        self.lori_B[adapter_name] = packed
        self.lori_mask[adapter_name] = pack_bits(mask).to(device)
        self.forget_places(adapter_name)

    def set_frozen(self, adapter_name: str, mask: Tensor, values: Tensor) -> None:
        """Entries of B that count but do not train: `mask` (O·r,) bool, `values` (frozen,) float32."""
        device, _ = self._weight_placement()
        self.lori_frozen_mask[adapter_name] = pack_bits(mask).to(device)
        self.lori_frozen_B[adapter_name] = values.detach().float().clone().to(device)
        self.forget_places(adapter_name)

    def forget_places(self, adapter_name: str) -> None:
        self._drop(adapter_name, self.lori_places, self.lori_frozen_places)

    def is_packed(self, adapter_name: str) -> bool:
        return isinstance(self.lori_B[adapter_name], PackedB)

    def matrix_B(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """B (O, r) in `dtype`, differentiable with respect to its trained entries."""
        weight, form = self.lori_B[adapter_name].weight, self._form(adapter_name)
        return weight.to(dtype) if form is None else form.matrix(weight, dtype)

    def _form(self, adapter_name: str) -> Packed | None:
        """How B is made of its parameter; None where it is its parameter."""
        if not self.is_packed(adapter_name):
            return None
        frozen = frozen_places = None
        if adapter_name in self.lori_frozen_B:
            frozen = self.lori_frozen_B[adapter_name]
            frozen_places = self._places(adapter_name, self.lori_frozen_mask, self.lori_frozen_places)
        places = self._places(adapter_name, self.lori_mask, self.lori_places)
        return Packed((self.out_features, self.r[adapter_name]), places, frozen_places, frozen)

    def _places(self, adapter_name: str, masks: BufferDict, cache: BufferDict) -> Tensor:
        if adapter_name not in cache:
            mask = unpack_bits(masks[adapter_name], self.size(adapter_name))
            if torch.compiler.is_compiling() or mask.is_meta:  # nonzero's shape is not known beforehand, a sort's is
                trained = cache is self.lori_places
                kept = self.lori_B[adapter_name].weight if trained else self.lori_frozen_B[adapter_name]
                return mask.byte().argsort(descending=True, stable=True)[: kept.numel()]
            with torch.inference_mode(False):  # training goes on with these after an evaluation made them
                cache[adapter_name] = mask.nonzero().squeeze(1).clone()
        return cache[adapter_name]

    def fit_file(self, adapter_name: str, tensors: dict[str, Tensor], config: Any, module_name: str) -> bool:
        """Take the form (dense or packed) and the number of entries from the file: a trainer that resumes after
        `sparsify` loads into the dense adapter that its script has just made."""
        changed = self._take_form(adapter_name, tensors, module_name)
        return super().fit_file(adapter_name, tensors, config, module_name) or changed

    def _take_form(self, adapter_name: str, tensors: dict[str, Tensor], module_name: str) -> bool:
        values, frozen = tensors.get("lori_B.weight"), tensors.get("lori_frozen_B")
        if values is None:
            return False
        current = self.lori_B[adapter_name].weight
        held = self.lori_frozen_B[adapter_name].shape if adapter_name in self.lori_frozen_B else None
        self.forget_places(adapter_name)
        if values.shape == current.shape and held == (None if frozen is None else frozen.shape):
            return False
        n = self.size(adapter_name)
        if values.dim() == 2:
            self.lori_B[adapter_name] = self.new_linear(self.r[adapter_name], self.out_features, zero=True)
            self._drop(adapter_name, self.lori_mask, self.lori_frozen_mask, self.lori_frozen_B)
        elif len(tensors["lori_mask"]) != math.ceil(n / 8):
            raise ValueError(
                f"The mask of module {module_name!r} in the file does not fit B ({self.out_features}, "
                f"{self.r[adapter_name]}) of this model: the adapter belongs to another base model or has another r."
            )
        else:
            self.set_packed(adapter_name, unpack_bits(tensors["lori_mask"], n), values, current.dtype)
            if frozen is None:
                self._drop(adapter_name, self.lori_frozen_mask, self.lori_frozen_B)
            else:
                self.set_frozen(adapter_name, unpack_bits(tensors["lori_frozen_mask"], n), frozen)
        self.lori_B[adapter_name].to(current.dtype).requires_grad_(current.requires_grad)
        return True

    def _drop(self, adapter_name: str, *buffers: BufferDict) -> None:
        for entries in buffers:
            if adapter_name in entries:
                del entries[adapter_name]

    def parts(self, adapter_name: str) -> Parts:
        B = Weight(self.lori_B[adapter_name].weight, self._form(adapter_name))
        return Parts([Weight(self.lori_A[adapter_name])], [B])

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        A = at_least_float32(self.lori_A[adapter_name])
        return A, self.matrix_B(adapter_name, A.dtype).detach()


def _forget_old_places(layer: LoriLinear, incompatible_keys: Any) -> None:
    for adapter_name in layer.r:
        layer.forget_places(adapter_name)


class LoriExperts(ExpertWeights, LoriLinear):
    """LORI on a parameter: A of every expert frozen, one B for each, dense or packed over all of them."""


class LoriModel(ExpertModel, SeededModel):
    """A model with LORI layers; made by `get_peft_model(model, LoriConfig(...))`."""

    prefix = "lori_"
    tuner_layer_cls = LoriLinear
    expert_layer_cls = LoriExperts

    @classmethod
    def record_form(cls, model: nn.Module, adapter_name: str) -> None:
        record_form(model, adapter_name)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str | None = None
    ) -> None:
        """Combine adapters into a new one whose update is exactly Σ_t weights[t] · ΔW_t.

        Args:
            adapters: names of LORI adapters on this model.
            weights: one factor each.
            adapter_name: name of the new, dense adapter.
            combination_type: "linear" adds the B's and keeps r, which needs the adapters to have the same A (same
                seed, rank and module); "cat" stacks A's and B's to rank Σr. None takes "linear" where it is possible.

        Raises:
            ValueError: an unknown adapter, a name that is taken, numbers that do not match, "linear" over different
                A's, or an adapter that trains more than its B's or has `target_parameters`. Nothing is changed then.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise ValueError(f"Adapter(s) {unknown} do not exist; the model has {sorted(self.peft_config)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter {adapter_name!r} already exists: delete it first or choose another name.")
        check_adapter_name(adapter_name)
        if len(weights) != len(adapters):
            raise ValueError(f"{len(adapters)} adapters need {len(adapters)} weights, got {len(weights)}.")
        factors = [as_float(weight) for weight in weights]
        check_field(all(map(math.isfinite, factors)), "weights", weights, "finite numbers")
        check_field(
            combination_type in (None, "linear", "cat"), "combination_type", combination_type, "'linear' or 'cat'"
        )
        for field_name in ("modules_to_save", "trainable_token_indices"):
            having = [name for name in adapters if getattr(self.peft_config[name], field_name)]
            if having:
                raise ValueError(
                    f"Adapter(s) {having} have `{field_name}`: what they have trained there has no weighted sum, and "
                    "the new adapter would have the base model's. Combine adapters that were trained without it."
                )
        having = [name for name in adapters if getattr(self.peft_config[name], "target_parameters", None)]
        if having:
            raise ValueError(
                f"Adapter(s) {having} have `target_parameters`, and the new adapter is made of linear modules alone. "
                "To add the updates up, make the adapters active together: model.base_model.set_adapter([...])."
            )
        layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, LoriLinear) and any(adapter in layer.r for adapter in adapters)
        }
        for layer in layers.values():
            layer.check_projections(adapters)
        same_A = all(share_projection(layer, adapters) for layer in layers.values())
        if combination_type == "linear" and not same_A:
            raise ValueError(
                "combination_type='linear' needs adapters with the same projection A (same seed and rank). These have "
                "different ones: use combination_type='cat'."
            )
        linear = same_A if combination_type is None else combination_type == "linear"
        combined = {name: _combine(layer, adapters, factors, linear) for name, layer in layers.items()}
        config: Any = copy.deepcopy(self.peft_config[adapters[0]])
        config.target_modules, config.exclude_modules = set(layers), None
        config.layers_to_transform = config.layers_pattern = None
        config.rank_pattern = {name: A.shape[0] for name, (A, _) in combined.items()}
        config.alpha_pattern = dict(config.rank_pattern)  # scaling 1: the weights are in B
        config.r = config.alpha = max(config.rank_pattern.values())
        config.sparsity, config.kept_entries, config.frozen_entries = None, {}, {}
        config.seed = config.seed if linear and all(adapters[0] in layer.r for layer in layers.values()) else None
        config.save_projection = config.save_projection or config.seed is None
        config.inference_mode = True
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for name, (A, B) in combined.items():
            layers[name].set_projection(adapter_name, (A,))
            layers[name].lori_B[adapter_name].weight = nn.Parameter(B, requires_grad=False)


def share_projection(layer: LoriLinear, adapters: list[str]) -> bool:
    projections = [layer.lori_A[name] for name in adapters if name in layer.r]
    return all(torch.equal(A, projections[0]) for A in projections)


def _combine(layer: LoriLinear, adapters: list[str], weights: list[float], linear: bool) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R), float32 or wider, with B·A = Σ_t weights[t] · ΔW_t."""
    present = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.r]
    As, Bs = zip(
        *(
            (A, weight * layer.scaling[name] * B)
            for name, weight in present
            for A, B in [layer.factors(name)]
        ),
        strict=True,
    )  # fmt: skip
    return (As[0], torch.stack(Bs).sum(0)) if linear else (torch.cat(As), torch.cat(Bs, dim=1))


def record_form(model: Any, adapter_name: str, sparsity: float | None = None) -> None:
    """Write what the layers hold into the adapter's config (a copy: a twin may share the object)."""
    config = copy.deepcopy(config_of(model, adapter_name))
    layers = {
        layer.module_names[adapter_name]: layer
        for layer in adapter_layers(model, adapter_name, LoriLinear).values()
    }  # fmt: skip
    packed = {name: layer for name, layer in layers.items() if layer.is_packed(adapter_name)}
    config.kept_entries = {name: layer.lori_B[adapter_name].weight.numel() for name, layer in packed.items()}
    config.frozen_entries = {
        name: layer.lori_frozen_B[adapter_name].numel()
        for name, layer in packed.items()
        if adapter_name in layer.lori_frozen_B
    }
    if packed and sparsity is None:
        size = sum(layer.size(adapter_name) for layer in packed.values())
        sparsity = _asked_sparsity(sum(config.kept_entries.values()), size)
    config.sparsity = sparsity
    set_config(model, adapter_name, config)


def _asked_sparsity(kept: int, size: int) -> float:
    """The shortest number that leaves so many: a trainer that resumes has the file's tensors, and not its config."""
    shortest = (round(1 - kept / size, digits) for digits in range(1, 16))
    return next((s for s in shortest if max(1, round((1 - s) * size)) == kept), 1 - kept / size)
