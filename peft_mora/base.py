"""The base that every method of this package stands on: config fields, layer, model.

A method adds a file with three small classes: a config with its own fields, a layer that says which weights it keeps
and what they add to the output, and a model that names the two. Injection, dtypes, quantised bases, several adapters,
merging, mixed batches and the file format are written here, once.

Layout (it decides the file format): everything of an adapter hangs directly on the layer as `<prefix>xxx`, keyed by
adapter name. Trainable weights are `nn.Linear` entries of an `nn.ModuleDict` (`mora_B.default.weight`), because TRL
finds them by `.default.` in the name; frozen tensors are persistent buffers in a `BufferDict`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial, reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch
from peft.config import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
    onload_layer,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    PeftType,
    get_quantization_kwargs,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from . import registry
from .checks import check_field, is_indices, is_int, is_names, is_number, listed
from .inputs import modules_back, removed_after, towers
from .lean import Parts, add_update, can_run, plain_add_update
from .model_card import complete_card
from .quantization import check_codes, frozen_base, is_bare, use_exact_4bit_kernels


BASE_ADAPTER = "__base__"  # PEFT's name for "no adapter" in a mixed batch
REFERENCE = "ref"  # TRL's name for the copy of a trained adapter that its preference trainers compare with


def matching_key(patterns: dict[str, Any], module_name: str) -> str:
    """The key of `rank_pattern` or `alpha_pattern` that counts for a module: its own name, else the longest match.

    PEFT takes the first match, but sorts the keys when it writes the file: where two match, a LoRA has other ranks
    after loading. If none matches, the result is no key of `patterns`.
    """
    if module_name in patterns:
        return module_name
    return get_pattern_key(sorted(patterns, key=lambda key: (-len(key), key)), module_name)


def check_pattern(name: str, pattern: str, within: str = "{}") -> None:
    """Refuse what is neither a module name nor a regular expression.

    Args:
        name: of the field.
        pattern: what it has.
        within: the expression that PEFT puts that into.

    Raises:
        ValueError: it does not compile.
    """
    try:
        re.compile(within.format(pattern))
    except re.error as error:
        raise ValueError(
            f"`{name}` has {pattern!r}, which is no regular expression ({error.msg}). Write a module's name, as "
            "'q_proj', or an expression, as '.*_proj'."
        ) from None


def check_patterns(name: str, patterns: Any) -> None:
    """Refuse a field that is no dict by module names or regular expressions.

    Raises:
        ValueError: names the field, and the key that does not compile.
    """
    ok = isinstance(patterns, dict) and is_names(list(patterns))
    check_field(ok, name, patterns, "a dict with module names or regular expressions as keys")
    for key in patterns:
        check_pattern(name, key, r"(.*\.)?({})$")


@dataclass
class AdapterConfig(PeftConfig):
    """Fields that all methods share; their names and meaning are those of PEFT's own configs.

    Raises:
        ValueError: on construction, naming the field whose value is out of range.
    """

    method: ClassVar[str]  # name of the PeftType
    by_input: ClassVar[str] = "its update depends on the layer's input"  # why it cannot have `target_parameters`
    on_parameters: ClassVar[str] = ""  # how to make one that can, where the class's name does not say it

    r: int = field(
        default=8, metadata={"help": "Rank: rank-1 experts a module (and, where the method grows, a task)."}
    )
    alpha: float = field(default=16, metadata={"help": "The update is scaled by alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in [0, 1)."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt: name endings, a regular expression, or 'all-linear'. None takes PEFT's default "
            "for the architecture."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone: name endings or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt. Needs `target_modules` as a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list that `layers_to_transform` counts in, e.g. 'layers'."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name or regular expression -> r, where it differs."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Module name or regular expression -> alpha, where it differs."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and save, e.g. a classification head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained as well; see PEFT's LoraConfig."}
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parameters to adapt that are no linear module's, by name endings: a mixture's fused experts, "
            "['experts.gate_up_proj', 'experts.down_proj']. Only where the update is one weight for all inputs."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True starts as an identity (B = 0). False starts with a random update, for tests."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            ok = value is None or isinstance(value, str) or is_names(value)
            check_field(ok, name, value, "a list of names, a string or None")
            if isinstance(value, str):
                check_pattern(name, value)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        check_field(is_int(self.r) and self.r > 0, "r", self.r, "a positive integer")
        check_field(is_number(self.alpha) and self.alpha > 0, "alpha", self.alpha, "a positive number")
        check_field(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")
        check_field(isinstance(self.init_weights, bool), "init_weights", self.init_weights, "True or False")
        check_field(isinstance(self.inference_mode, bool), "inference_mode", self.inference_mode, "True or False")
        layers, pattern, tokens = self.layers_to_transform, self.layers_pattern, self.trainable_token_indices
        ok = layers is None or is_indices(layers if isinstance(layers, list) else [layers])
        check_field(ok, "layers_to_transform", layers, "an index, a list of indices or None")
        ok = pattern is None or isinstance(pattern, str) or is_names(pattern)
        check_field(ok, "layers_pattern", pattern, "a name, a list of names or None")
        for value in [pattern] if isinstance(pattern, str) else pattern or []:
            check_pattern("layers_pattern", value, r"(?:^|.*?\.){}\.")
        # A bare string would be taken letter by letter.
        ok = self.modules_to_save is None or is_names(self.modules_to_save)
        check_field(ok, "modules_to_save", self.modules_to_save, "a list of names or None")
        self._check_target_parameters()
        by_module = tokens if isinstance(tokens, dict) else {"": tokens if tokens is not None else []}
        ok = is_names(list(by_module)) and all(map(is_indices, by_module.values()))
        check_field(
            ok, "trainable_token_indices", tokens, "a list of token ids, or a dict of such lists by module name"
        )
        for name in ("rank_pattern", "alpha_pattern"):
            check_patterns(name, getattr(self, name))
        for key, rank in self.rank_pattern.items():
            check_field(is_int(rank) and rank > 0, f"rank_pattern[{key!r}]", rank, "a positive integer")
        for key, alpha in self.alpha_pattern.items():
            check_field(is_number(alpha) and alpha > 0, f"alpha_pattern[{key!r}]", alpha, "a positive number")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` has no effect with `target_modules` as a string ('all-linear' or a regular "
                        "expression): give `target_modules` as a list of name endings, or put the layers into the "
                        "expression."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`: say which layers, e.g. [0, 1].")

    def _check_target_parameters(self) -> None:
        names = self.target_parameters
        self.target_parameters = list(names) if isinstance(names, (tuple, set)) else names
        check_field(names is None or is_names(self.target_parameters), "target_parameters", names, "a list of names")
        if not names:
            return
        if refusal := self.parameters_refusal():
            raise ValueError(refusal)
        if self.dropout:
            raise ValueError(
                f"`dropout` is on an adapter's input, which a parameter does not have: give dropout=0 (here "
                f"{self.dropout}) with `target_parameters`."
            )
        if self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` does not choose among `target_parameters`: give their full names, with the "
                "layers in them, instead."
            )

    def parameters_refusal(self) -> str:
        """Why `target_parameters` cannot be had with this config; empty where they can."""
        able = [
            method.config.on_parameters or method.config.__name__
            for method in registry.registered.values()
            if hasattr(method.model, "expert_layer_cls")
        ]
        return (
            f"{self.method} adapts linear modules, not single parameters: {self.by_input}, which is seen inside of "
            "the module alone. Name linear modules in `target_modules` instead of "
            f"`target_parameters`, or use a method whose update is one weight ({listed(able)})."
        )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config as PEFT does, and say in the model card beside it, if PEFT wrote one, how to load it."""
        super().save_pretrained(save_directory, **kwargs)
        complete_card(Path(save_directory), self.method, self.base_model_name_or_path)


class Trained(NamedTuple):
    """A (r, I) and B (O, r) in training, and the frozen A's of the same adapter before them, oldest first; `through`
    are further parameters, which change nothing where A·x is 0."""

    A: nn.Parameter
    B: nn.Parameter
    past_A: tuple[Tensor, ...] = ()
    through: tuple[nn.Parameter, ...] = ()


class AdapterLinear(nn.Module, BaseTunerLayer):  # PEFT's "all-linear" looks for "Linear" in the name
    """One adapted linear module: `y = base(x) + (alpha / r) · update(x)`, whatever the base's class or precision.

    A method implements `create_weights`, `parts` and `factors`.
    """

    cast_input_dtype_enabled = True  # for peft.helpers to switch off: here weights are cast, and inputs never are
    lean: ClassVar[bool] = True  # the fast path of lean.py; False takes its plain twin
    prefix: ClassVar[str]
    weight_name: str = "weight"  # of the base's parameter that is adapted
    merge_refusal: ClassVar[str] = ""  # why an adapter of this method has no static ΔW, and what to call instead

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.in_features, self.out_features = self._features()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout = nn.ModuleDict()  # modules, for TRL's `disable_dropout` to find; what they do is `add_update`'s
        self.module_names: dict[str, str] = {}  # this module's name as the adapter's config knows it
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_tower = False  # of a vision-language model: it sees patches, and no rows of the batch
        self.shares_weight = False  # another module has the very same weight (tied embeddings); known when merging
        self._before_merge: list[Any] = []  # what `unmerge` puts back; in a list so that it is no submodule

    def _features(self) -> tuple[int, int]:
        """I and O."""
        features: Any = _get_in_out_features(self.get_base_layer())
        return features

    # What a method says

    def create_weights(self, adapter_name: str, config: Any, module_name: str, original: str | None) -> None:
        """Make the weights of a new adapter on the base's device, in the base's dtype where that is a float.

        Args:
            adapter_name: key of the new entries.
            config: the adapter's config; `self.r[adapter_name]` is set already.
            module_name: name of this module in the model, for weights that come from a seed.
            original: an adapter on this layer made from the very same config object, unchanged since, or None. Copy
                its frozen random buffers, which may have no seed; for the adapter `REFERENCE` also what it has learnt
                in buffers, as TRL then copies the parameters, and them alone.
        """
        raise NotImplementedError

    def parts(self, adapter_name: str) -> Parts:
        """What the adapter adds to the output, before scaling. Called once a forward."""
        raise NotImplementedError

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) of all experts, float32 or wider. Where ΔW is static, it is scaling · B·A."""
        raise NotImplementedError

    def row_names(self) -> list[str]:
        """What a row of a mixed batch may be named: the adapters, and what else `of_row` knows."""
        return list(self.r)

    def of_row(self, name: str) -> tuple[str, Parts] | None:
        """The adapter that a row of this name goes through, and what of it; None: the row gets the base alone."""
        return (name, self.parts(name)) if name in self.r else None

    def trained(self, adapter_name: str) -> Trained | None:
        """A and B in training, where it is y = B·A·x of the layer's own input; None if A is frozen, or nothing trains:
        no choice of A then keeps what is learnt from inputs that are to be left alone."""
        return None

    def fit_file(self, adapter_name: str, tensors: dict[str, Tensor], config: Any, module_name: str) -> bool:
        """Look at what a file has for this layer before PEFT loads it.

        Args:
            adapter_name: whose weights it will be.
            tensors: the file's, by their names on the layer without the adapter's ("mora_A.weight"); what the file
                leaves out on purpose is to be added here.
            config: the adapter's config.
            module_name: this module's name in the model, for errors.

        Returns:
            Whether the layer had to take another form to fit the file, which the config then has to say.

        Raises:
            ValueError: the tensors are not those of this layer's adapter; names the module and what to do.
        """
        return False

    def is_static(self, adapter_name: str) -> bool:
        """Whether the adapter's update is one ΔW for all inputs, so that it can be merged."""
        return not self.merge_refusal

    def lora_refusal(self, adapter_name: str) -> str:
        """Why no plain LoRA equals the adapter as it is set now, where it can be set to have one, and how; else ""."""
        return ""

    # Adding an adapter

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        alpha: float,
        config: AdapterConfig,
        module_name: str = "",
        inference_mode: bool = False,
        original: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to this layer; PEFT calls this for each module that the config matches."""
        check_adapter_name(adapter_name)
        self.r[adapter_name] = r
        self.scaling[adapter_name] = alpha / r
        self.dropout[adapter_name] = nn.Dropout(config.dropout)
        self.module_names[adapter_name] = module_name
        self.create_weights(adapter_name, config, module_name, original)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def new_linear(self, in_features: int, out_features: int, zero: bool) -> nn.Linear:
        """A trainable weight (out, in) on the base's device: zeros, or kaiming-uniform(a=√5) as `nn.Linear` does."""
        with warnings.catch_warnings():  # experts that were all pruned leave nothing to initialise
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            linear = nn.Linear(in_features, out_features, bias=False)
        if zero:
            nn.init.zeros_(linear.weight)
        device, dtype = self._weight_placement()
        return linear if linear.weight.is_meta else linear.to(device, dtype)

    def _weight_placement(self) -> tuple[torch.device | None, torch.dtype | None]:
        base = self.get_base_layer()
        device, dtype = self._get_base_layer_device_and_dtype(base)
        if device is None:  # HQQ and others keep no `weight`
            device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), None)
        if device is not None and device.type == "meta":
            device = None
        return device, dtype if dtype is not None and dtype.is_floating_point else None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move, never cast. PEFT calls this after loading with `low_cpu_mem_usage=True`; its own version rounds a
        float32 file to the dtype of a bfloat16 base and breaks the bit-exact round trip."""
        device = device if device is not None else self._weight_placement()[0]
        if device is None or self.is_empty(adapter_name):
            return
        for name in (*self.adapter_layer_names, *self.other_param_names):
            entries = getattr(self, name)
            if isinstance(entries, (nn.ModuleDict, BufferDict)) and adapter_name in entries:
                entries[adapter_name] = entries[adapter_name].to(device)

    def weights(self, adapter_name: str) -> tuple[Any, ...]:
        """The adapter's trainable weights, in the order of `adapter_layer_names`."""
        return tuple(getattr(self, name)[adapter_name].weight for name in self.adapter_layer_names)

    def is_empty(self, adapter_name: str) -> bool:
        """Whether the adapter's weights are still on the meta device, to be filled from a file."""
        weights = [getattr(self, name) for name in self.adapter_layer_names]
        return any(p.is_meta for w in weights if adapter_name in w for p in w[adapter_name].parameters())

    def is_offloaded(self, adapter_names: Iterable[str]) -> bool:
        """Whether weights of these adapters are on the meta device; one of each is looked at, at every forward."""
        weights = getattr(self, self.adapter_layer_names[0])
        return any(weights[name].weight.is_meta for name in adapter_names)

    @contextmanager
    def onloaded(self, adapter_names: Iterable[str]) -> Iterator[None]:
        """The adapters' weights are there for the length of the block, though accelerate offloads them.

        Its hooks bring a module's weights where the module is called, and an adapter's are read without that.

        Raises:
            ValueError: they are nowhere, or are to be trained.
        """
        names = list(adapter_names)
        hooked = [
            (module, module._hf_hook)
            for part, module in self.named_modules()
            if not part.startswith("base_layer") and getattr(getattr(module, "_hf_hook", None), "offload", False)
        ]
        for module, hook in hooked:
            hook.pre_forward(module)
        try:
            if self.is_offloaded(names):
                raise ValueError(
                    f"Weights of {listed(map(repr, names), 'and')} on {self.module_names[names[0]]} are on the meta "
                    "device and have no values: their base is offloaded to disk, or weights were never loaded. Put "
                    "the whole base into memory (device_map=None), or open the saved adapter over it: "
                    "PeftModel.from_pretrained(base, FOLDER)."
                )
            trained = any(weight.requires_grad for name in names for weight in self.weights(name))
            if trained and self.training and torch.is_grad_enabled():
                raise ValueError(
                    f"Weights of {self.module_names[names[0]]} are offloaded by accelerate, which drops what they "
                    "learn. Train with the whole model on the device (a 4-bit base needs the least memory), or call "
                    "model.eval()."
                )
            yield
        finally:
            for module, hook in hooked:
                hook.post_forward(module, None)

    # Computing

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        mixed = None if self.disable_adapters else adapter_names
        wanted = self.active_adapters if mixed is None else {name.partition("/")[0] for name in mixed} | {*mixed}
        names = [name for name in wanted if name in self.r]
        if self.is_offloaded(names) and not (x.is_meta or self.disable_adapters or self.merged):
            with self.onloaded(names):
                return self.forward(x, *args, adapter_names=adapter_names, **kwargs)
        if mixed is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=mixed, **kwargs)
        if self.disable_adapters and self.merged:
            with onload_layer(self):  # accelerate may have the weight elsewhere
                self.unmerge()
        base_layer = self.base_layer
        if self.disable_adapters or self.merged or not names:
            return base_layer(x, *args, **kwargs)
        if not (self.lean and can_run(x)):
            result = base_layer(x, *args, **kwargs)
            for adapter_name in names:
                result = self._add(result, adapter_name, x)
            return result
        bare = is_bare(base_layer)
        base = frozen_base(base_layer, x) if bare and torch.is_grad_enabled() and not args and not kwargs else None
        if base is None:
            result = base_layer(x, *args, **kwargs)
        else:  # add_update does its share of the backward: one node and one sum of (T, I) less
            with torch.no_grad():
                result = base_layer(x)
        # Nobody else holds a known base's output, autograd included, unless it is a view, as F.linear's with a bias.
        in_place = bare and type(result) is Tensor and result._base is None and result.is_contiguous()
        for adapter_name in names:
            result = self._add(result, adapter_name, x, add_update, in_place, base)
            base = None
        return result

    def _add(
        self, result: Tensor, adapter_name: str, x: Tensor, add: Any = plain_add_update, *args: Any,
        parts: Parts | None = None,
    ) -> Tensor:  # fmt: skip
        dropout = self.dropout[adapter_name].p if self.training else 0.0
        return add(result, x, *(parts or self.parts(adapter_name)), self.scaling[adapter_name], dropout, *args)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Row i of the batch goes through adapter `adapter_names[i]`."""
        self.check_rows("adapter_names")
        if len(adapter_names) != len(x):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name in dict.fromkeys(adapter_names):
            found = self.of_row(adapter_name)
            if found is None:
                continue
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter_name], device=x.device)
            add = add_update if self.lean and can_run(x) else plain_add_update
            own, parts = found
            updated = self._add(result.index_select(0, rows), own, x.index_select(0, rows), add, parts=parts)
            result = result.index_copy(0, rows, updated)
        return result

    def check_rows(self, argument: str) -> None:
        """Refuse an argument that says something of each row of the batch where this layer sees no such rows.

        Raises:
            ValueError: the layer is in a tower.
        """
        if self.in_tower:
            raise ValueError(
                f"`{argument}` is for rows of the batch, and an adapted layer of a vision tower sees images or "
                "patches, of which a row may have none or several. Adapt the language model only "
                "(exclude_modules=r'(?!.*language_model).*'), or answer rows of one adapter or task at a time."
            )

    # Merging

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW = (alpha / r) · B·A, float32 or wider, in the layout of the base's weight: (O, I), for `Conv1D` (I, O).

        Raises:
            ValueError: the update depends on the input, so there is no ΔW; the message says what to call instead.
        """
        if not self.is_static(adapter_name):
            raise ValueError(self.merge_refusal)
        if self.is_offloaded([adapter_name]):
            with self.onloaded([adapter_name]):
                return self.get_delta_weight(adapter_name)
        A, B = self.factors(adapter_name)
        delta = self.scaling[adapter_name] * (B @ A)
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def check_merge(self, adapter_names: list[str]) -> None:
        """Refuse what `merge` cannot do.

        Raises:
            ValueError: an adapter has no static ΔW, or the base's quantisation cannot be written to.
        """
        if any(name in self.r and not self.is_static(name) for name in adapter_names):
            raise ValueError(self.merge_refusal)
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"Cannot merge into a base quantised with {backend.backend_name}: its weight cannot be written back. "
                "Keep the adapter unmerged, or reload the base in 16 bits and merge there."
            )
        check_codes(self.get_base_layer())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the given (default: the active) adapters to the base's weight.

        The weight before the merge is kept until `unmerge`, which puts it back bit for bit. `merge_and_unload` drops
        it again layer by layer.

        Raises:
            ValueError: an adapter has no static ΔW, the base's quantisation cannot be written to, or, with
                `safe_merge`, the result is not finite. Nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        self.check_merge(names)
        weight = self.get_base_weight()
        merged = self._shifted(weight, names, 1)
        if safe_merge and not torch.isfinite(merged).all():
            broken = [name for name in names if not torch.isfinite(self.get_delta_weight(name)).all()]
            which = broken or names  # each is finite, and their sum with the base is too large for its dtype
            raise ValueError(f"NaNs detected in the merged weights. The adapter {which} seems to be broken")
        before = self._before_merge[0] if self.merged else self._keep_weight(weight)
        self.set_base_weight(merged)
        self._before_merge = [before, bits_of(self.get_base_weight())]
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the weight from before `merge` back, bit for bit, for all merged adapters at once. Where an adapter of
        another model around this one, or inside of it, has changed the weight since, ΔW is taken off it instead, as
        PEFT does."""
        if not self.merged:
            return
        before, written = self._before_merge
        weight = self.get_base_weight()
        now = bits_of(weight)
        cast = now[0] != written[0]  # as the weight from before will be
        if now == written or cast or isinstance(before, BaseTunerLayer):  # or a whole adapter, as it was with its base
            self._put_back(before)
        else:
            self.set_base_weight(self._shifted(weight, self.merged_adapters, -1))
        self._before_merge = []
        self.merged_adapters.clear()

    def _shifted(self, weight: Tensor, adapter_names: list[str], sign: int) -> Tensor:
        """A weight with the adapters' ΔW, or less it, in its dtype, added up in the wider one."""
        delta = reduce(torch.add, map(self.get_delta_weight, adapter_names))
        wide = weight.to(torch.promote_types(weight.dtype, delta.dtype))
        return torch.add(wide, delta.to(weight.device), alpha=sign).to(weight.dtype)

    def _keep_weight(self, weight: Tensor) -> Any:
        """What `_put_back` will need of the base that a merge is about to write to, which may be made anew."""
        backend, base = self.quantization_backend, self.get_base_layer()
        if backend is not None:
            whole = self.base_layer
            self.base_layer = copy.deepcopy(whole)
            warn_of_rounding(backend.backend_name)
            return whole
        if self.shares_weight:  # give this layer a weight of its own, or the other module would change as well
            before = base.weight
            base.weight = nn.Parameter(weight, requires_grad=False)
            return before
        return weight

    def _put_back(self, before: Any) -> None:
        base = self.get_base_layer()
        if isinstance(before, nn.Parameter):
            base.weight = before  # shared again
        elif self.quantization_backend is None:
            base.weight.data = before.to(base.weight.device, base.weight.dtype)
        else:
            self.base_layer = before.to(self._weight_placement()[0])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` gives an equal plain LoRA: it does where ΔW is static."""
        names = [adapter_name] if adapter_name in self.r else self.active_adapters
        return all(self.is_static(name) for name in names if name in self.r)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return self.prefix.removesuffix("_") + "." + super().__repr__()


def bits_of(weight: Tensor) -> tuple[torch.dtype, int]:
    """A weight's dtype, and the sum of its elements' bits, read as integers: whatever the order, it is the same."""
    weight = weight.to_local() if hasattr(weight, "to_local") else weight  # of a DTensor, this process's part
    as_integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    bits = weight.contiguous().view(as_integer).flatten()
    return weight.dtype, int(sum(part.sum(dtype=torch.int64) for part in bits.split(2**22)))  # which are made int64


def warn_of_rounding(backend_name: str) -> None:
    warnings.warn(
        f"Merging into a base quantised with {backend_name} rounds the merged weight again: outputs differ from the "
        "unmerged adapter's. For an exact merge reload the base in 16 bits and merge there.",
        stacklevel=4,
    )


class AdapterModel(BaseTuner):
    """Puts `layer_cls` around the matched modules of a model; PEFT makes it from the config's `peft_type`."""

    tuner_layer_cls: type[AdapterLinear]
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._dtype_settled: set[str] = set()
        self._original: str | None = None  # of the adapter that is being added; see `create_weights`
        self._to_merge: list[str] | None = None  # the adapters that a merge was asked for by name
        registry.guard_optimizers()
        super().__init__(*args, **kwargs)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        use_exact_4bit_kernels(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own. A config object may come again, as it was for a twin, or changed for another adapter: those that
        it has made before then keep one that is as it was."""
        config: Any = self.peft_config[adapter_name]
        others = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        made = getattr(config, "_made", None)
        self._original = others[0] if others and made == own_fields(config) else None
        if others and self._original is None and made is not None:
            before = copy.deepcopy(config)
            vars(before).update(made)
            self.peft_config.update(dict.fromkeys(others, before))
        before = dict(model.named_modules())
        layers = [m for m in before.values() if isinstance(m, AdapterLinear) and adapter_name not in m.r]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:  # it may have come onto some of the modules
            modules_back(model, before)
            for layer in layers:
                if adapter_name in layer.r:
                    layer.delete_adapter(adapter_name)
            raise
        for module in towers(model):
            if isinstance(module, AdapterLinear):
                module.in_tower = True
        set_config(self, adapter_name, config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        alpha_key = matching_key(peft_config.alpha_pattern, current_key)
        rank_key = matching_key(peft_config.rank_pattern, current_key)
        arguments: dict[str, Any] = {
            "r": peft_config.rank_pattern.get(rank_key, peft_config.r),
            "alpha": peft_config.alpha_pattern.get(alpha_key, peft_config.alpha),
            "config": peft_config,
            "module_name": current_key,
            "inference_mode": peft_config.inference_mode,
            "original": self._original,
        }
        if isinstance(target, self.tuner_layer_cls) and parameter_name == getattr(target, "parameter_name", None):
            target.update_layer(adapter_name, **arguments)
            return
        layer = self._wrap(target, peft_config, current_key, parameter_name)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, **arguments)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trainable until it is set active
        self._replace_module(parent, target_name, layer, target)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """What PEFT refuses for LoRA: Mamba's fused kernels take the weights of some modules and never call them."""
        try:
            as_lora: Any = SimpleNamespace(peft_type="LORA")
            super()._check_target_module_compatiblity(as_lora, model, target_name)
        except ValueError as error:
            raise ValueError(str(error).replace("PEFT:LORA", f"PEFT:{peft_config.method}")) from None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's own also copies `weight`, which trained tokens and some quantised layers do not have, and moves the
        adapter to the base's device, where it has been made; on a base on meta it has not. What is drawn stays: a file
        need not bring it."""
        setattr(parent, child_name, new_module)
        if isinstance(new_module, AdapterLinear) and any(p.is_meta for p in new_module.get_base_layer().parameters()):
            for part, module in new_module.named_modules():
                if not part.startswith("base_layer"):
                    for name, weight in module.named_parameters(recurse=False):
                        setattr(module, name, nn.Parameter(weight.detach().to("meta"), weight.requires_grad))

    def _wrap(
        self, target: nn.Module, config: AdapterConfig, module_name: str, parameter_name: str | None
    ) -> AdapterLinear:
        kwargs = get_quantization_kwargs(self)
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        backend = resolve_quantization_backend(base_layer, **kwargs)
        is_linear = isinstance(base_layer, (nn.Linear, Conv1D)) if backend is None else backend.layer_type == "linear"
        if not is_linear:
            raise ValueError(
                f"Target module {module_name} ({type(base_layer).__name__}) is not supported: {config.method} adapts "
                "torch.nn.Linear, transformers' Conv1D and the quantised linear layers that PEFT knows. Leave it out "
                "of `target_modules`, or train it in full with `modules_to_save`."
            )
        if type(base_layer) is NonDynamicallyQuantizableLinear:
            raise ValueError(
                f"Target module {module_name} belongs to an nn.MultiheadAttention, which takes its weight and never "
                f"calls it: an adapter on it would do nothing. Leave it out: exclude_modules=[{module_name!r}]."
            )
        # In the mode of what it replaces: transformers' load_adapter does not call eval() again in all releases.
        return self.tuner_layer_cls(target, **kwargs).train(target.training)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Upcast 16-bit weights when the adapter is made, once.

        PEFT asks for it again whenever weights are loaded into an adapter that is there already, which is how the
        trainer resumes. TRL has cast the adapter to bfloat16 on a quantised base by then; upcasting it would go on in
        another precision than the run that was interrupted.
        """
        if adapter_name not in self._dtype_settled:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        layers = [layer for layer in self.model.modules() if isinstance(layer, AdapterLinear)]
        if not any(layer.is_empty(adapter_name) for layer in layers):
            self._dtype_settled.add(adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """PEFT's remapping, of a file that every layer has had a look at (`AdapterLinear.fit_file`)."""
        files: dict[str, dict[str, Tensor]] = {}  # module -> its tensors
        others: dict[str, Tensor] = {}
        for key, tensor in state_dict.items():
            module_name, dot, rest = key.rpartition(f".{cls.prefix}")
            (files.setdefault(module_name, {}) if dot else others)[f"{cls.prefix}{rest}" if dot else key] = tensor
        changed = False
        for name, layer in model.named_modules():
            # A file has PEFT's prefix; a model that was injected into, without a PeftModel, has not.
            found = next((files[n] for n in (name, f"base_model.model.{name}") if n in files), None)
            if found and isinstance(layer, cls.tuner_layer_cls) and adapter_name in layer.r:
                changed |= layer.fit_file(adapter_name, found, config, name)
        fitted = {f"{module}.{key}": tensor for module, found in files.items() for key, tensor in found.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, {**fitted, **others})
        if changed:
            cls.record_form(model, adapter_name)
        return remapped

    @classmethod
    def record_form(cls, model: nn.Module, adapter_name: str) -> None:
        """Write into the adapter's config what form its layers have taken."""

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._dtype_settled.discard(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        """PEFT's own. It tells no check which adapters it was asked for."""
        with self._merging(adapter_names):
            super().merge_adapter(adapter_names, *args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        with self._merging(kwargs.get("adapter_names")):
            return super()._unload_and_optionally_merge(*args, **kwargs)

    @contextmanager
    def _merging(self, adapter_names: list[str] | None) -> Iterator[None]:
        self._to_merge = adapter_names
        try:
            yield
        finally:
            self._to_merge = None

    def _check_merge_allowed(self) -> None:
        """Refuse before the first module is touched, so that a refused merge leaves the model as it was."""
        super()._check_merge_allowed()
        if unknown := [name for name in self._to_merge or () if name not in self.peft_config]:
            raise ValueError(
                f"The model has no adapter {listed(map(repr, unknown))} to merge; it has "
                f"{listed(map(repr, self.peft_config), 'and')}."
            )
        owners = Counter(id(p) for m in self.model.modules() for p in m._parameters.values() if p is not None)
        for layer in self.model.modules():
            if isinstance(layer, AdapterLinear):
                layer.shares_weight = owners[id(layer.get_base_layer()._parameters.get(layer.weight_name))] > 1
                layer.check_merge(layer.active_adapters if self._to_merge is None else self._to_merge)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused, except where a method says how.

        Raises:
            TypeError: always; the message says what to do instead.
        """
        able = [
            method.config.__name__
            for method in registry.registered.values()
            if method.model.add_weighted_adapter is not AdapterModel.add_weighted_adapter
        ]
        raise TypeError(
            f"{self.tuner_layer_cls.prefix.removesuffix('_').upper()} adapters cannot be combined by weights. To add "
            "their updates up, make them active together: model.base_model.set_adapter([...]). For weights, train "
            f"adapters that combine exactly ({listed(able)})."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one a row of the batch, to every adapted layer for the length of one call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode: call model.eval() first."
            )
        known = {name for m in self.modules() if isinstance(m, AdapterLinear) for name in m.row_names()}
        unknown = sorted(set(adapter_names) - {BASE_ADAPTER} - set(self.peft_config) - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        refuse_part_of_adapter(self, set(adapter_names) - {BASE_ADAPTER} - set(self.peft_config))
        num_beams = kwargs.get("num_beams") or 1
        beams = [name for name in adapter_names for _ in range(num_beams)]
        # Beam search repeats the inputs of the decoder only.
        encoder = self.model.get_encoder() if num_beams > 1 and hasattr(self.model, "get_encoder") else None
        in_encoder = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()

        hooks = [
            module.register_forward_pre_hook(
                partial(_add_adapter_names, adapter_names=list(adapter_names) if module in in_encoder else beams),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, (AdapterLinear, AuxiliaryTrainingWrapper))
        ]
        with removed_after(hooks):
            yield


def _add_adapter_names(module: nn.Module, args: Any, kwargs: dict, adapter_names: list[str]) -> tuple[Any, dict]:
    return args, {**kwargs, "adapter_names": adapter_names}


def refuse_part_of_adapter(model: nn.Module, parts: set[str]) -> None:
    """Row names that are less than an adapter ("adapter/task") where modules are trained in full, which no task has on
    its own.

    Raises:
        ValueError: there are both.
    """
    if parts and any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        raise ValueError(
            f"Rows cannot be named {', '.join(map(repr, sorted(parts)))} on a model with modules_to_save or trained "
            "tokens: those are as the last task left them. Name the whole adapter, or train without them."
        )


def own_fields(config: AdapterConfig) -> dict[str, Any]:
    """What the config says of the adapter, without what PEFT writes into any config."""
    names = (f.name for f in fields(config) if f.name not in PeftConfig.__dataclass_fields__)
    return {name: copy.deepcopy(getattr(config, name)) for name in names}


def set_config(model: Any, adapter_name: str, config: AdapterConfig) -> None:
    """Give an adapter the config that its layers are made by, with a note of what it says: it may be changed later."""
    vars(config)["_made"] = own_fields(config)
    adapters_of(model)[adapter_name] = config


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """Adapter name -> its config; also where a module of `model` has the adapters, as in sentence-transformers."""
    for module in model.modules():
        if isinstance(configs := getattr(module, "peft_config", None), dict):
            return configs
    return {}


def config_of(model: nn.Module, adapter_name: str) -> Any:
    """An adapter's config, for what changes it along with the layers.

    Raises:
        ValueError: `model` is a part of the model that has it.
    """
    configs = adapters_of(model)
    if adapter_name not in configs:
        raise ValueError(
            f"This {type(model).__name__} has layers of adapter {adapter_name!r}, but not its config, which has to "
            "say the same: pass the model that the adapter was added to, or one that holds it."
        )
    return configs[adapter_name]


def check_in_memory(layers: Mapping[str, Any], adapter_name: str) -> None:
    """Refuse layers whose weights are to be read or changed as a whole, and are not there.

    Raises:
        ValueError: naming the first of them.
    """
    if away := [name for name, layer in layers.items() if layer.is_offloaded([adapter_name])]:
        raise ValueError(
            f"Weights of {adapter_name!r} on {away[0]} are on the meta device: accelerate offloads them, or they were "
            "never loaded. Put the whole model into memory for this (device_map=None)."
        )


def check_adapter_name(name: Any) -> None:
    """Refuse a name that PyTorch's modules do not take, before anything is kept under it.

    Raises:
        ValueError: it has a dot, or they have something of that name themselves.
    """
    ok = isinstance(name, str) and bool(name) and "." not in name and not hasattr(nn.ModuleDict(), name)
    check_field(ok, "adapter_name", name, "a name without dots, and none that PyTorch's modules have as theirs")


def adapter_layers(model: nn.Module, adapter_name: str, layer_cls: type[AdapterLinear]) -> dict[str, Any]:
    """The layers of `model` that hold the adapter, by name.

    Raises:
        ValueError: there is none; the message lists the adapters of that method that the model has.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, layer_cls)}
    found = {name: layer for name, layer in layers.items() if adapter_name in layer.r}
    if not found:
        method = layer_cls.prefix.removesuffix("_").upper()
        names = sorted({n for layer in layers.values() for n in layer.r})
        raise ValueError(
            f"The model has no {method} adapter named {adapter_name!r}; it has "
            + (f"{', '.join(map(repr, names))}: pass adapter_name=..." if names else f"no {method} adapter at all.")
        )
    return found
