"""Adapter folders without a model: ΔW of each module as two factors, read and written as PEFT does.

LoRA:                 ΔW = s·B·A, s = lora_alpha / r, or lora_alpha / √r with use_rslora; patterns as PEFT takes them
LORI, FURINA, …:      ΔW by the layer itself, made over an empty base
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.config import PeftConfig  # not from peft itself, which may be only half imported when it imports us
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import registry
from .base import matching_key
from .checks import check_field, is_names, is_number, listed
from .files import whole_folder


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Fields of a LoraConfig that leave ΔW = s·B·A, or say what it is.
PLAIN = set(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora modules_to_save init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core loftq_config "
    "eva_config corda_config lora_ga_config velora_config qalora_group_size ensure_weight_tying runtime_config".split()
)
VELORA = ".lora_velora_embed"  # of a backward that keeps less in memory; forward, and merging, are LoRA's
HEADS = ("lm_head", "embed_out")  # names of output heads, which may be tied to the embeddings
ENDS = (*HEADS, "embed_tokens", "wte", "word_embeddings", "embed_in", "shared")  # of a model's words
# Initialisations that leave the base model's weights alone.
BASE_KEPT = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
AS_PLAIN = (
    "Save it with model.save_pretrained(folder, path_initial_model_for_weight_conversion=...), which makes a plain "
    "LoRA of it"
)


class Lora(NamedTuple):
    """ΔW = B·A of one module, float32 or wider: A (k, I), B (O, k), scaling in B."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class LoraFile:
    """What an adapter's folder holds.

    Args:
        folder: where it is.
        config: its adapter_config.json.
        loras: module's name in the base model -> its ΔW; of a LoRA it is read when it is asked for.
        saved: further tensors (`modules_to_save`), by their keys in the file.
    """

    folder: Path
    config: dict[str, Any]
    loras: Mapping[str, Lora]
    saved: dict[str, Tensor]


class _Stored(Mapping[str, Lora]):
    """A LoRA's factors, read, brought to float32 and scaled when they are asked for.

    The file is mapped for that long only: six 8B-sized adapters are 1 GiB that merging has no use for all at once.
    """

    def __init__(self, file: Path, scales: dict[str, float]) -> None:
        self.file, self.scales = file, scales

    def __getitem__(self, name: str) -> Lora:
        scale = self.scales[name]
        with safe_open(self.file, "pt") as file:
            A, B = (_wide(file.get_tensor(f"{PREFIX}{name}.lora_{x}.weight")) for x in "AB")
        return Lora(A, B if scale == 1 else scale * B)

    def __iter__(self) -> Iterator[str]:
        return iter(self.scales)

    def __len__(self) -> int:
        return len(self.scales)


def read_lora(folder: str | Path) -> LoraFile:
    """Read the folder of a LoRA, or of an adapter of this package whose update is one ΔW a module.

    Raises:
        FileNotFoundError: a file is missing. ValueError: the files are damaged, or the adapter is more or other than
            ΔW = s·B·A over the base model that it names; the message says what and what to do.
    """
    folder = Path(folder)
    config = read_config(folder)
    with damage_named(folder):
        tensors = load_file(folder / TENSORS)
    method = config.get("peft_type")
    if method == "LORA":
        check_plain(config, folder)
        loras, rest = _lora_factors(config, tensors, folder)
    elif isinstance(method, str) and method.lower() in registry.registered:
        loras, rest = _own_factors(method, tensors, folder)
    else:
        known = listed(("LORA", *map(str.upper, registry.registered)))
        raise ValueError(
            f"{folder} has an adapter of type {method!r}, which this does not read: {known} it does, as far as their "
            "update is one B·A a module."
        )
    # PEFT writes the frozen weight of an adapted output head too (save_embedding_layers="auto").
    frozen = {f"{PREFIX}{name}.base_layer.{kind}" for name in loras for kind in ("weight", "bias")}
    rest = {key: tensor for key, tensor in rest.items() if key not in frozen}
    kept = tuple(config.get("modules_to_save") or ())
    tied = " (ensure_weight_tying, which adapts or saves a head and its embeddings together)"
    why = tied if config.get("ensure_weight_tying") else ""
    for key in rest:
        owner, _, kind = key.removeprefix(PREFIX).rpartition(".")
        if not _saved_in_full(owner, kept):
            end = owner.rpartition(".")[2] in ENDS and kind in ("weight", "bias")
            if end and not why and not config.get("trainable_token_indices"):
                raise ValueError(
                    f"{folder} holds {key!r}, which its config does not name as trained: PEFT saves embeddings and "
                    "head beside an adapter whose base was resized (resize_token_embeddings). Save it with "
                    "model.save_pretrained(folder, save_embedding_layers=False), and give the resized base, saved, as "
                    "its base; or train the adapter with them in `modules_to_save`."
                )
            raise ValueError(
                f"{folder} holds {key!r}, which is no factor of a linear module's update: embeddings, convolutions "
                f"and single parameters are not read{why}. Train the adapter without them."
            )
    if not loras:
        raise ValueError(f"{folder} holds no LoRA weights: save the adapter again.")
    return LoraFile(folder, config, loras, rest)


def read_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json of an adapter's folder.

    Raises:
        FileNotFoundError: it or the weights are missing. ValueError: it is no JSON object, or a field of it is of
            another kind than PEFT writes.
    """
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing: give the folder that model.save_pretrained wrote (with "
                "safe_serialization, PEFT's default)."
            )
    with damage_named(folder):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds a {type(config).__name__}")
        _check_config(config)
        return config


def _check_config(config: Mapping[str, Any]) -> None:
    """Refuse fields of another kind than PEFT writes.

    Raises:
        ValueError: naming the field.
    """
    for key in ("base_model_name_or_path", "revision", "task_type"):
        check_field(isinstance(config.get(key), str | None), key, config.get(key), "a name, or null")
    for key in ("target_modules", "modules_to_save"):
        names = config.get(key)
        check_field(names is None or isinstance(names, str) or is_names(names), key, names, "a list of names")
    tables = {
        "auto_mapping": "a table, or null", "rows": "a table of names", "adapters": "a table of configs",
        "router": "a table",
    }  # fmt: skip
    for key, what in tables.items():
        table = config.get(key)
        check_field(table is None or isinstance(table, dict), key, table, what)
    for name, entry in (config.get("adapters") or {}).items():
        ok = isinstance(entry, dict) and isinstance(entry.get("peft_type"), str)
        check_field(ok, f"adapters[{name!r}]", entry, "a config with its peft_type")
    rows, tasks = (config.get("rows") or {}).values(), config.get("tasks")
    check_field(is_names(list(rows)), "rows", config.get("rows"), "a table of names")
    check_field(tasks is None or is_names(tasks), "tasks", tasks, "a list of names")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key)
        check_field(patterns is None or isinstance(patterns, dict), key, patterns, "a table of names to numbers")
        for pattern in patterns or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"`{key}` has {pattern!r}, which is no pattern: {error}") from error


def _saved_in_full(owner: str, names: Iterable[str]) -> bool:
    """Whether `modules_to_save` has a module, or one that it is in: PEFT takes all whose path ends with a name."""
    parts = owner.split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(path.endswith(name) for path in paths for name in names)


@contextmanager
def damage_named(folder: str | Path) -> Iterator[None]:
    """A file that cannot be read is a ValueError that names the folder."""
    try:
        yield
    except (ValueError, SafetensorError, RecursionError) as error:  # JSON's and Unicode's are ValueErrors
        raise ValueError(f"{folder} is damaged ({type(error).__name__}: {error}): save the adapter again.") from error


def empty_layer(config: Any, name: str, in_features: int, out_features: int) -> Any:
    """The layer that PEFT would make of a module for an adapter of this package, over a base without weights.

    Args:
        config: of the adapter. name: the module's in the base model.
    """
    r = config.rank_pattern.get(matching_key(config.rank_pattern, name), config.r)
    alpha = config.alpha_pattern.get(matching_key(config.alpha_pattern, name), config.alpha)
    layer_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].tuner_layer_cls
    layer = layer_cls(nn.Linear(in_features, out_features, bias=False, device="meta"))
    layer.update_layer("default", r, alpha, config, name, inference_mode=True)
    return layer


def digest(folder: str | Path) -> str:
    """SHA-256 of an adapter's weights file: which weights something is of."""
    found = hashlib.sha256()
    with open(Path(folder) / TENSORS, "rb") as file:
        while part := file.read(2**22):
            found.update(part)
    return found.hexdigest()


def check_plain(config: Mapping[str, Any], folder: str | Path) -> None:
    """Refuse a LoRA's config that says more than ΔW = s·B·A, or means other weights than its base model's.

    Raises:
        ValueError: naming the field and what to do.
    """
    if config.get("use_dora"):
        raise ValueError(
            f"{folder} is a DoRA (use_dora=True): its magnitudes rescale the base model's weights, so its update is "
            "no B·A. Train it with use_dora=False."
        )
    if config.get("lora_bias") or config.get("bias", "none") != "none":
        field = "lora_bias" if config.get("lora_bias") else "bias"
        raise ValueError(
            f"{folder} trains biases ({field}={config[field]!r}), which B·A leaves out. Train it with lora_bias=False "
            "and bias='none'."
        )
    init = config.get("init_lora_weights", True)
    if init not in BASE_KEPT:
        raise ValueError(
            f"{folder} was initialised by {init!r}, which changes the base model's weights: its factors mean nothing "
            f"over the base model as it was. {AS_PLAIN}."
        )
    if config.get("trainable_token_indices"):
        raise ValueError(
            f"{folder} trains embeddings of tokens (trainable_token_indices), which are no linear module's update. "
            "Train it without."
        )
    # A newer PEFT's fields are unknown here: a value that is not empty may change what the factors mean.
    others = [
        name for name, value in config.items() if name not in PLAIN and value not in (None, False, {}, [], "none")
    ]
    if others:
        raise ValueError(
            f"{folder} has {listed((f'{name}={config[name]!r}' for name in others), 'and')}: such an update is not "
            "known to be s·B·A. Train a plain LoRA."
        )


def check_base_kept(configs: Mapping[str, Any]) -> None:
    """Refuse an adapter that has changed the base model's weights for all others, and for rows without an adapter.

    Args:
        configs: name -> PeftConfig, or what its file says.

    Raises:
        ValueError: naming the adapter and what to do.
    """
    for name, config in configs.items():
        said = config if isinstance(config, Mapping) else vars(config)
        init = said.get("init_lora_weights", True)
        if init not in BASE_KEPT:
            raise ValueError(
                f"Adapter {name!r} was initialised by {init!r}, which changes the base model's weights: others, and "
                f"the base alone, would answer over what it has left. {AS_PLAIN}, and load that."
            )


def write_lora(
    folder: str | Path,
    loras: Mapping[str, Lora],
    *,
    saved: Mapping[str, Tensor] | None = None,
    experts: Mapping[str, int] | None = None,
    beside: Callable[[Path], None] | None = None,
    **fields: Any,
) -> LoraConfig:
    """Write ΔW's as PEFT writes a LoRA; plain `PeftModel.from_pretrained` opens it bit for bit.

    All modules get one rank (padded with zeros) and lora_alpha = r: a reader that does not know rank_pattern and
    alpha_pattern still computes the same. The folder appears complete or not at all.

    Args:
        folder: adapter_config.json and adapter_model.safetensors go in here.
        loras: module's name in the base model -> its ΔW.
        experts: module's name -> experts of the adapted parameter: A (experts·k, I), expert after expert, and B
            (O, k·experts), rank after rank; `target_parameters` in `fields` has to name it.
        saved: further tensors by their keys in the file; `modules_to_save` in `fields` has to name their modules.
        beside: called with the folder before it appears, to write further files.
        fields: of the LoraConfig; `target_modules` is the modules' names if it is not given.

    Raises:
        FileExistsError: the folder exists.
    """
    stacks = {name: (experts or {}).get(name, 1) for name in loras}
    rank = max([1, *(len(lora.A) // stacks[name] for name, lora in loras.items())])
    config = LoraConfig(**{"target_modules": sorted(loras), "inference_mode": True, **fields}, r=rank, lora_alpha=rank)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in (saved or {}).items()}
    for name, (A, B) in loras.items():
        if missing := rank - len(A) // stacks[name]:
            A = nn.functional.pad(A.view(stacks[name], -1, A.shape[1]), (0, 0, 0, missing)).view(-1, A.shape[1])
            B = nn.functional.pad(B, (0, missing * stacks[name]))  # its ranks are the slow index
        state |= {f"{PREFIX}{name}.lora_{x}.weight": t.detach().cpu().contiguous() for x, t in (("A", A), ("B", B))}
    with whole_folder(folder) as written:
        config.save_pretrained(str(written))
        save_file(state, written / TENSORS, {"format": "pt"})
        if beside is not None:
            beside(written)
    return config


def check_finite(module: str, factors: Iterable[Tensor], whose: Any, instead: str) -> None:
    """Refuse an update of NaN or infinity.

    Raises:
        ValueError: naming whose it is, the module and what to do.
    """
    if not all(factor.isfinite().all() for factor in factors):
        raise ValueError(f"{whose} has values that are not finite, e.g. in {module!r} (NaN, inf): {instead}.")


def lora_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of one module, as PEFT takes it: the first pattern that matches, in the file's order."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config.get("lora_alpha", 8))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _lora_factors(
    config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> tuple[Mapping[str, Lora], dict[str, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match and tensor.dim() == 2:
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif not key.endswith(VELORA):
            rest[key] = tensor
    scales = {}
    ranks, alphas = (config.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    if not all(is_number(alpha) for alpha in (config.get("lora_alpha", 8), *alphas.values())):
        raise ValueError(
            f"{folder / CONFIG} has a lora_alpha or alpha_pattern that is none: a number, and a table of names to "
            "numbers. Save the adapter again."
        )
    for name, pair in pairs.items():
        rank = ranks.get(get_pattern_key(list(ranks), name), config.get("r", 8))
        if pair.keys() != {"A", "B"} or not len(pair["A"]) == pair["B"].shape[1] == rank:
            shapes = ", ".join(f"lora_{x} {tuple(t.shape)}" for x, t in sorted(pair.items()))
            raise ValueError(
                f"{folder}: module {name!r} has {shapes} and rank {rank} by {CONFIG}. The file is damaged or not of "
                "this config: save the adapter again."
            )
        _check_floats(name, pair.values(), folder)
        check_finite(name, pair.values(), folder, "save the adapter again")
        scales[name] = lora_scale(config, name, rank)
    return _Stored(folder / TENSORS, scales), rest


def _own_factors(method: str, tensors: dict[str, Tensor], folder: Path) -> tuple[dict[str, Lora], dict[str, Tensor]]:
    """The layer that PEFT would make, over an empty base of the file's sizes, filled from the file."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    if config.target_parameters:
        raise ValueError(
            f"{folder} adapts parameters (target_parameters={config.target_parameters!r}): a stack of updates, one "
            "for each expert, which is no linear module's B·A. Merge it into its base (model.merge_and_unload()), or "
            "train it without."
        )
    layer_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(method)].tuner_layer_cls
    files: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, dot, own = key.removeprefix(PREFIX).rpartition(f".{layer_cls.prefix}")
        if dot:
            files.setdefault(name, {})[f"{layer_cls.prefix}{own}"] = tensor
        else:
            rest[key] = tensor
    loras = {}
    for name, found in files.items():
        r = config.rank_pattern.get(matching_key(config.rank_pattern, name), config.r)
        ends = ("A", "A.weight", "B.weight")
        _check_floats(name, [found[key] for x in ends if (key := layer_cls.prefix + x) in found], folder)
        layer = empty_layer(config, name, *_sizes(found, layer_cls.prefix, r, name, folder))
        if not layer.is_static("default"):
            if refusal := layer.lora_refusal("default"):
                raise ValueError(f"{folder}: {refusal}")
            raise ValueError(
                f"{folder} is a {method} adapter whose active experts depend on the input, so no B·A equals it. Fit "
                f"the closest LoRA first (peft-mora export {folder} --texts FILE --output DIR) and give DIR."
            )
        layer.fit_file("default", found, config, name)
        wanted = {key: t for key, t in layer.state_dict().items() if ".default" in key}
        state = {key.replace(".weight", ".default.weight") if ".weight" in key else f"{key}.default": t
                 for key, t in found.items()}  # fmt: skip
        wrong = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
        if wrong or state.keys() - wanted.keys():
            raise ValueError(
                f"{folder}: {(wrong or sorted(state.keys() - wanted.keys()))[0]!r} of module {name!r} does not fit "
                f"{CONFIG}. The file is damaged or not of this config: save the adapter again."
            )
        _check_floats(name, [state[key] for key, tensor in wanted.items() if tensor.is_floating_point()], folder)
        layer.load_state_dict(state, strict=False)
        A, B = layer.factors("default")
        check_finite(name, (A, B), folder, "save the adapter again")
        loras[name] = Lora(_wide(A), layer.scaling["default"] * _wide(B))
    return loras, rest


def _sizes(tensors: dict[str, Tensor], prefix: str, r: int, name: str, folder: Path) -> tuple[int, int]:
    """I and O of a module, of what the file has for it."""
    A, B = tensors.get(f"{prefix}A", tensors.get(f"{prefix}A.weight")), tensors.get(f"{prefix}B.weight")
    if A is None or B is None:
        raise ValueError(
            f"{folder} leaves out the projection of module {name!r} (save_projection=False), and with it the module's "
            "size. Load it onto its base model and write a plain LoRA (peft-mora export), or save it again "
            "with save_projection=True."
        )
    mask = tensors.get(f"{prefix}mask")
    fits = A.dim() == 2 and (B.dim() == 2 or (B.dim() == 1 and mask is not None and mask.dim() == 1))
    if not fits or not A.shape[1] or (B.dim() == 2 and not len(B)):
        shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)}{'' if mask is not None else ' without a mask'}"
        raise ValueError(
            f"{folder}: module {name!r} has {shapes}, which are no factors of an update. The file is damaged: save "
            "the adapter again."
        )
    if B.dim() == 2:
        return A.shape[1], B.shape[0]
    packed = len(tensors[f"{prefix}mask"])  # bytes: eight entries of B each
    outs = [out for out in range(8 * packed // r + 1) if -(-out * r // 8) == packed]
    if len(outs) != 1:
        raise ValueError(
            f"{folder} packs B of module {name!r} at r = {r}, of which its rows cannot be told without the base "
            "model. Write a plain LoRA of it: peft-mora export."
        )
    return A.shape[1], outs[0]


def _check_floats(module: str, factors: Iterable[Tensor], folder: Path) -> None:
    for factor in factors:
        if not factor.is_floating_point() or factor.itemsize < 2:
            raise ValueError(
                f"{folder}: module {module!r} is stored as {factor.dtype}, which is no float of 16 bits or more: save "
                "the adapter again, in float32, bfloat16 or float16."
            )


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
