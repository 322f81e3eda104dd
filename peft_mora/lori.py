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
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from .base import adapter_layers, check_field, is_int, is_number
from .lean import DENSE, Block, Gate
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


class PackedB(nn.Module):
    """The trained entries of a sparse B: `weight` (kept,), in row-major order of their places in (O, r)."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kept))

    def extra_repr(self) -> str:
        return f"kept={self.weight.numel()}"


class Packed(NamedTuple):
    """A sparse B (O, r) by the places of its trained entries and of those that an earlier task has frozen."""

    shape: tuple[int, int]
    places: Tensor
    frozen_places: Tensor | None
    frozen: Tensor | None

    def dense(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        flat = values.new_zeros(self.shape[0] * self.shape[1], dtype=dtype)
        if self.frozen_places is not None and self.frozen is not None:
            flat = flat.index_copy(0, self.frozen_places, self.frozen.to(dtype))
        return flat.index_copy(0, self.places, values.to(dtype)).view(self.shape)

    def pack(self, grad: Tensor) -> Tensor:
        return grad.reshape(-1).index_select(0, self.places)


def pack_bits(mask: Tensor) -> Tensor:
    """(n,) bool -> (ceil(n / 8),) uint8, eight to a byte: a kept entry at sparsity 0.9 costs 1.25 bytes of index."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """Inverse of `pack_bits`: (n,) bool, on the device of `bits`. In torch, so that torch.compile can trace it."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).flatten()[:n].bool()


class LoriLinear(SeededLinear):
    """`lori_A` (r, I) frozen; `lori_B` (O, r) dense, or packed with `lori_mask`, the places of its entries as bits.

    `lori_frozen_B` and `lori_frozen_mask` hold entries kept from an earlier task (`sparsify(onto=...)`); they take no
    part in training.
    """

    prefix = "lori_"
    adapter_layer_names = ("lori_B",)
    projection_names = ("lori_A",)
    other_param_names = (
        "lori_A", "lori_checksum", "lori_mask", "lori_frozen_mask", "lori_frozen_B", "lori_places",
        "lori_frozen_places", "module_names", "r", "scaling", "dropout",
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

    def create_weights(self, adapter_name: str, config: LoriConfig, module_name: str, twin: str | None) -> None:
        self.create_projection(adapter_name, config, module_name, twin)
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
            places = torch.arange(self.size(adapter_name)) < frozen  # right in number; the file brings the rest
            self.set_frozen(adapter_name, places, torch.zeros(frozen))
        if twin is not None and twin in self.lori_mask:
            for entries in (self.lori_mask, self.lori_frozen_mask, self.lori_frozen_B):
                if twin in entries:
                    entries[adapter_name] = entries[twin].clone()

    def draw_projection(self, adapter_name: str, config: LoriConfig, module_name: str) -> tuple[Tensor, ...]:
        shape, bound = (self.r[adapter_name], self.in_features), 1 / math.sqrt(self.in_features)
        if config.seed is None:
            return (torch.zeros(shape),)
        return (as_projection(generator(config.seed, module_name).uniform(-bound, bound, shape)),)

    def _random_mask(self, adapter_name: str, config: LoriConfig, module_name: str, kept: int | None) -> Tensor:
        n = self.size(adapter_name)
        kept = round((1 - (config.sparsity or 0)) * n) if kept is None else kept
        mask = torch.zeros(n, dtype=torch.bool)
        mask[torch.from_numpy(generator(config.seed or 0, module_name, "mask").permutation(n)[:kept])] = True
        return mask

    def set_packed(self, adapter_name: str, mask: Tensor, values: Tensor) -> None:
        """Make B packed: `mask` (O·r,) bool says where, `values` (kept,) what."""
        device, dtype = self._weight_placement()
        packed = PackedB(int(mask.sum()))
        if not packed.weight.is_meta:
            packed.weight.data.copy_(values)
            packed.to(device, dtype)
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
        for entries in (self.lori_places, self.lori_frozen_places):
            if adapter_name in entries:
                del entries[adapter_name]

    def is_packed(self, adapter_name: str) -> bool:
        return isinstance(self.lori_B[adapter_name], PackedB)

    def dense_B(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        """B (O, r) in `dtype`, differentiable with respect to its trained entries."""
        weight, form = self.lori_B[adapter_name].weight, self._form(adapter_name)
        return weight.to(dtype) if form is None else form.dense(weight, dtype)

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
            if torch.compiler.is_compiling():  # nonzero would break the graph; a sort has a shape known beforehand
                trained = cache is self.lori_places
                kept = self.lori_B[adapter_name].weight if trained else self.lori_frozen_B[adapter_name]
                return mask.byte().argsort(descending=True, stable=True)[: kept.numel()]
            with torch.inference_mode(False):  # training goes on with these after an evaluation made them
                cache[adapter_name] = mask.nonzero().squeeze(1).clone()
        return cache[adapter_name]

    def parts(self, adapter_name: str) -> tuple[list[Block], Gate]:
        weight = self.lori_B[adapter_name].weight
        return [Block(self.lori_A[adapter_name], weight, B_form=self._form(adapter_name))], DENSE

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lori_A[adapter_name].float(), self.dense_B(adapter_name, torch.float32).detach()


def _forget_old_places(layer: LoriLinear, incompatible_keys: Any) -> None:
    for adapter_name in layer.r:
        layer.forget_places(adapter_name)


class LoriModel(SeededModel):
    """A model with LORI layers; made by `get_peft_model(model, LoriConfig(...))`."""

    prefix = "lori_"
    tuner_layer_cls = LoriLinear

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Take the form (dense or packed) and the number of entries from the file: a trainer that resumes after
        `sparsify` loads into the dense adapter that its script has just made."""
        changed = False
        for module_name, layer in model.named_modules():
            if isinstance(layer, LoriLinear) and adapter_name in layer.r:
                name = (
                    module_name if module_name.startswith("base_model.model.") else f"base_model.model.{module_name}"
                )
                changed |= _take_form(layer, adapter_name, name, state_dict)
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if changed:
            _record_form(model, adapter_name)
        return state

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
            ValueError: an unknown adapter, a name that is taken, numbers that do not match, or "linear" over different
                A's.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise ValueError(f"Adapter(s) {unknown} do not exist; the model has {sorted(self.peft_config)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter {adapter_name!r} already exists: delete it first or choose another name.")
        if len(weights) != len(adapters):
            raise ValueError(f"{len(adapters)} adapters need {len(adapters)} weights, got {len(weights)}.")
        check_field(
            combination_type in (None, "linear", "cat"), "combination_type", combination_type, "'linear' or 'cat'"
        )
        layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, LoriLinear) and any(adapter in layer.r for adapter in adapters)
        }
        same_A = all(_share_projection(layer, adapters) for layer in layers.values())
        if combination_type == "linear" and not same_A:
            raise ValueError(
                "combination_type='linear' needs adapters with the same projection A (same seed and rank). These have "
                "different ones: use combination_type='cat'."
            )
        linear = same_A if combination_type is None else combination_type == "linear"
        combined = {name: _combine(layer, adapters, weights, linear) for name, layer in layers.items()}
        config = copy.deepcopy(self.peft_config[adapters[0]])
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


def _share_projection(layer: LoriLinear, adapters: list[str]) -> bool:
    projections = [layer.lori_A[name] for name in adapters if name in layer.r]
    return all(torch.equal(A, projections[0]) for A in projections)


def _combine(layer: LoriLinear, adapters: list[str], weights: list[float], linear: bool) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) in float32 with B·A = Σ_t weights[t] · ΔW_t."""
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


def _take_form(layer: LoriLinear, adapter_name: str, module_name: str, state_dict: dict[str, Tensor]) -> bool:
    """Give a layer the form that its weights have in the file; say whether that was a change."""
    values = state_dict.get(f"{module_name}.lori_B.weight")
    if values is None:
        return False
    current = layer.lori_B[adapter_name].weight
    frozen = state_dict.get(f"{module_name}.lori_frozen_B")
    held = layer.lori_frozen_B[adapter_name].shape if adapter_name in layer.lori_frozen_B else None
    layer.forget_places(adapter_name)
    if values.shape == current.shape and held == (frozen.shape if frozen is not None else None):
        return False
    if values.dim() == 2:
        layer.lori_B[adapter_name] = layer.new_linear(layer.r[adapter_name], layer.out_features, zero=True)
        for entries in (layer.lori_mask, layer.lori_frozen_mask, layer.lori_frozen_B):
            if adapter_name in entries:
                del entries[adapter_name]
    else:
        packed = state_dict[f"{module_name}.lori_mask"]
        if len(packed) != math.ceil(layer.size(adapter_name) / 8):
            raise ValueError(
                f"The mask of module {module_name!r} in the file does not fit B ({layer.out_features}, "
                f"{layer.r[adapter_name]}) of this model: the adapter belongs to another base model or has another r."
            )
        mask = unpack_bits(packed, layer.size(adapter_name))
        layer.set_packed(adapter_name, mask, values)
        if frozen is not None:
            bits = state_dict[f"{module_name}.lori_frozen_mask"]
            layer.set_frozen(adapter_name, unpack_bits(bits, layer.size(adapter_name)), frozen)
        else:
            for entries in (layer.lori_frozen_mask, layer.lori_frozen_B):
                if adapter_name in entries:
                    del entries[adapter_name]
    layer.lori_B[adapter_name].to(current.dtype).requires_grad_(current.requires_grad)
    return True


def _record_form(model: nn.Module, adapter_name: str, sparsity: float | None = None) -> None:
    """Write what the layers hold into the adapter's config (a copy: a twin may share the object)."""
    config = copy.deepcopy(model.peft_config[adapter_name])
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
    size = sum(layer.size(adapter_name) for layer in packed.values())
    actual = 1 - sum(config.kept_entries.values()) / size if packed else None
    config.sparsity = actual if sparsity is None else sparsity
    model.peft_config[adapter_name] = config


@dataclass(frozen=True)
class SparsitySummary:
    """What `sparsify` did: entries of B kept and in all, the global threshold on |B|, share kept by module (0..1)."""

    kept: int
    total: int
    threshold: float
    share: dict[str, float]

    def __str__(self) -> str:
        low, high = min(self.share.values()), max(self.share.values())
        return (
            f"{self.kept:,} of {self.total:,} entries of B kept (|B| >= {self.threshold:.3g}), "
            f"{low:.1%} to {high:.1%} a module"
        )


@torch.no_grad()
def sparsify(
    model: nn.Module, sparsity: float = 0.9, adapter_name: str = "default", onto: str | None = None
) -> SparsitySummary:
    """Turn a calibrated LoRI-D adapter into LoRI-S: keep the largest entries of B over all modules, restarted at 0.

    A stays what it is. B is packed from here on, so its parameters are new objects: make a new optimizer (or use
    `LoriCalibrationCallback`, which does all of this inside one training run).

    Args:
        model: a PeftModel, or any model with an injected LORI adapter, trained densely for a while.
        sparsity: share of B's entries to drop, in [0, 1).
        adapter_name: which adapter.
        onto: name of a LORI adapter with the same A that holds an earlier task. The result starts from that adapter's
            B instead of from 0: its entries outside the new mask are kept and frozen, those inside go on training.

    Returns:
        A `SparsitySummary`; `print` it.

    Raises:
        ValueError: no such adapter, one that is packed already, merged, untrained (B = 0) or not finite; or `onto` has
            another A. Nothing is changed then.
    """
    check_field(is_number(sparsity) and 0 <= sparsity < 1, "sparsity", sparsity, "a number in [0, 1)")
    layers = adapter_layers(model, adapter_name, LoriLinear)
    if any(layer.is_packed(adapter_name) for layer in layers.values()):
        raise ValueError(
            f"Adapter {adapter_name!r} is sparse already. Calibrate a new dense one (LoriConfig without `sparsity`) "
            "and sparsify that; pass onto=... to build on this one."
        )
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError("Cannot sparsify a merged adapter: call model.unmerge_adapter() first.")
    magnitudes = torch.cat(
        [layer.lori_B[adapter_name].weight.float().abs().flatten().cpu() for layer in layers.values()]
    )
    if not torch.isfinite(magnitudes).all():
        raise ValueError(
            "B has entries that are not finite: the calibration run has diverged. Lower its learning rate."
        )
    if not magnitudes.any():
        raise ValueError(
            "B is 0 everywhere, so there is nothing to choose by: train the dense adapter for some steps first, or "
            "use LoriCalibrationCallback."
        )
    for name, layer in layers.items():
        if onto is not None and (onto not in layer.r or not _share_projection(layer, [adapter_name, onto])):
            raise ValueError(
                f"Adapter {onto!r} has another projection A than {adapter_name!r} in module {name!r}, so their B's do "
                "not add up. Give both configs the same seed, r and target_modules."
            )
    kept = max(1, round((1 - sparsity) * magnitudes.numel()))
    top = magnitudes.topk(kept)
    mask = torch.zeros(magnitudes.numel(), dtype=torch.bool)
    mask[top.indices.cpu()] = True
    masks = mask.split([layer.size(adapter_name) for layer in layers.values()])
    for layer, chosen in zip(layers.values(), masks, strict=True):
        old = layer.lori_B[adapter_name].weight
        start = torch.zeros(chosen.numel()) if onto is None else layer.dense_B(onto, torch.float32).flatten().cpu()
        layer.set_packed(adapter_name, chosen, start[chosen])
        layer.lori_B[adapter_name].to(old.device, old.dtype).requires_grad_(old.requires_grad)
        rest = (start != 0) & ~chosen
        if rest.any():
            layer.set_frozen(adapter_name, rest, start[rest])
    _record_form(model, adapter_name, sparsity)
    return SparsitySummary(
        kept=kept,
        total=magnitudes.numel(),
        threshold=top.values[-1].item(),
        share={name: chosen.float().mean().item() for name, chosen in zip(layers, masks, strict=True)},
    )
