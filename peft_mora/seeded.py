"""Frozen random projections from a seed.

Each module has its own generator, seeded by (seed, module name), so the projection depends neither on the order of
modules nor on device or dtype. It is saved with the adapter unless `save_projection=False`; then it is drawn again on
load, and a checksum in the file decides whether it is the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from .base import AdapterConfig, AdapterLinear, AdapterModel
from .checks import check_field, is_int


@dataclass
class SeededConfig(AdapterConfig):
    """Fields of a method whose projection A is random and frozen."""

    seed: int | None = field(
        default=0,
        metadata={
            "help": "A is drawn from (seed, module name). None: A comes from nowhere but the adapter file, as after "
            "`add_weighted_adapter` over different seeds."
        },
    )
    save_projection: bool = field(
        default=True, metadata={"help": "Save A. False leaves it out of the file and draws it again from the seed."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(
            self.seed is None or (is_int(self.seed) and self.seed >= 0), "seed", self.seed, "an integer >= 0 or None"
        )
        check_field(isinstance(self.save_projection, bool), "save_projection", self.save_projection, "True or False")
        check_field(
            self.save_projection or self.seed is not None,
            "save_projection",
            self.save_projection,
            "True when `seed` is None: nothing could draw this projection again",
        )


def generator(seed: int, module_name: str, purpose: str = "A") -> np.random.RandomState:
    """A random stream for one module.

    NumPy's `RandomState` because its streams are frozen by NumPy's own policy; torch's normal generator takes another
    path on other CPUs.
    """
    digest = hashlib.sha256(f"{seed}/{module_name}/{purpose}".encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype=np.uint32))


def as_projection(values: np.ndarray) -> Tensor:
    """float32 values that bfloat16 holds exactly: a projection is then the same number in every dtype."""
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float()


def checksum(*tensors: Tensor) -> Tensor:
    """() int64, the first 63 bits of a SHA-256 over the tensors.

    Float tensors count as float16: of the values that `as_projection` gives, all dtypes keep that much, also after
    `model.half()`, which rounds the smallest of them.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        exact = tensor.half().view(torch.int16) if tensor.is_floating_point() else tensor
        digest.update(exact.numpy().tobytes())
    return torch.tensor(int.from_bytes(digest.digest()[:8], "little") >> 1)


class Checksums(BufferDict):
    """adapter name -> () int64. What a loader puts in is noted in `unchecked`."""

    def __init__(self, unchecked: dict[str, bool]) -> None:
        super().__init__(persistent=True)
        self.unchecked = unchecked

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._buffers:
            self.unchecked[name] = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.unchecked.update((name, True) for name in self._buffers if f"{prefix}{name}" in state_dict)


class SeededLinear(AdapterLinear):
    """A layer with a frozen projection in buffers, next to a trainable `<prefix>B`."""

    projection_names: ClassVar[tuple[str, ...]]  # the buffers that the seed draws; `<prefix>checksum` is over them

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.unchecked: dict[str, bool] = {}  # adapter name -> whether a loader has put its checksum in
        for name in self.projection_names:
            setattr(self, name, BufferDict(persistent=True))
        setattr(self, f"{self.prefix}checksum", Checksums(self.unchecked))
        setattr(self, f"{self.prefix}B", nn.ModuleDict())

    def draw_projection(self, adapter_name: str, config: Any, module_name: str) -> tuple[Tensor, ...]:
        """The tensors of `projection_names`, on the CPU, from `config.seed`; zeros of the right shape for None."""
        raise NotImplementedError

    def create_projection(self, adapter_name: str, config: Any, module_name: str, original: str | None) -> None:
        """Put the projection of a new adapter in place: drawn, or its original's, which may have no seed."""
        drawn = (
            self.projection(original)
            if original is not None and original in self.r
            else self.draw_projection(adapter_name, config, module_name)
        )
        self.set_projection(adapter_name, tuple(tensor.clone() for tensor in drawn))
        self.unchecked[adapter_name] = False

    def projection(self, adapter_name: str) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)[adapter_name] for name in self.projection_names)

    def set_projection(self, adapter_name: str, tensors: tuple[Tensor, ...]) -> None:
        device, _ = self._weight_placement()
        for name, tensor in zip(self.projection_names, tensors, strict=True):
            getattr(self, name)[adapter_name] = tensor.to(device)
        getattr(self, f"{self.prefix}checksum")[adapter_name] = checksum(*tensors).to(device)

    def fit_file(self, adapter_name: str, tensors: dict[str, Tensor], config: Any, module_name: str) -> bool:
        """Put in what the seed draws where the file left it out, and check that it is what the file was made with."""
        drawn = zip(self.projection_names, self.projection(adapter_name), strict=True)
        used = [tensors.setdefault(name, tensor) for name, tensor in drawn]
        self._compare(used, tensors.get(f"{self.prefix}checksum"), repr(module_name), f" (here {config.seed})")
        return False

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self.unchecked and not torch.compiler.is_compiling():
            self.check_projections(adapter_names or self.active_adapters)
        return super().forward(x, *args, adapter_names=adapter_names, **kwargs)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        self.check_projections([adapter_name])
        return super().get_delta_weight(adapter_name)

    def train(self, mode: bool = True) -> Any:
        """Also the first call after loading, by whatever loads: transformers' own loader does not go by `fit_file`."""
        self.check_projections(self.active_adapters)
        return super().train(mode)

    def check_projections(self, adapter_names: Sequence[str]) -> None:
        """Compare with their checksums the projections that may have come from a file, once for each loading.

        Args:
            adapter_names: those that count now.

        Raises:
            ValueError: a projection is not what the file was made with, or the file has no checksum.
        """
        for adapter_name in self.unchecked.keys() & {*adapter_names}:
            told = self.unchecked[adapter_name]
            tensors = self.projection(adapter_name)
            if self.is_empty(adapter_name) or any(tensor.is_meta for tensor in tensors):
                continue
            expected = getattr(self, f"{self.prefix}checksum")[adapter_name]
            weights = self.weights(adapter_name)
            if told or any(map(_is_loaded, weights)):
                # Under ZeRO-3 buffers are filled in place, and lose their mark when they are moved.
                has_checksum = told or _is_loaded(expected) or hasattr(weights[0], "ds_id")
                module = f"{self.module_names[adapter_name]!r} of adapter {adapter_name!r}"
                self._compare(tensors, expected if has_checksum else None, module)
            self.unchecked.pop(adapter_name, None)

    def _compare(self, tensors: Sequence[Tensor], expected: Tensor | None, module: str, seed: str = "") -> None:
        if expected is None:
            raise ValueError(
                f"The file has no `{self.prefix}checksum` for module {module}, which every saved adapter has, "
                "so it cannot be known whether this projection A is the one that the adapter was trained with. Take "
                "the file as it was saved."
            )
        found = int(checksum(*tensors))
        if found != int(expected):
            raise ValueError(
                f"The projection A of module {module} is not the one that this adapter was trained with: its "
                f"checksum is {found}, the file says {int(expected)}. The file is damaged, or it was saved with "
                f"save_projection=False and the seed{seed} or the module's name in the model has changed since. Load "
                "it into the model class that it was trained with, or save it again there with save_projection=True."
            )


def _is_loaded(tensor: Tensor) -> bool:
    """Whether transformers' loader has left its mark."""
    return getattr(tensor, "_is_hf_initialized", False)


class SeededModel(AdapterModel):
    """Leaves the projection out of the file where the config says so."""

    tuner_layer_cls: type[SeededLinear]

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.save_projection:
            return state
        endings = tuple(f".{name}.{adapter_name}" for name in cls.tuner_layer_cls.projection_names)
        return {key: value for key, value in state.items() if not key.endswith(endings)}
