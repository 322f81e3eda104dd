"""What each adapter saw, kept beside it, and the merge that disturbs its outputs there least.

    C_t = E[x xᵀ] of what goes into a module on prompts of adapter t, half over all tokens, half over last ones, a
          third each without the adapter, at half of its strength and at all of it: what comes under a merged one
    ΔW = argmin Σ_t w_t ‖(ΔW - ΔW_t) C_t^½‖² + λ Σ_t ‖ΔW - ΔW_t‖²
       = Σ_t ΔW_t (w_t C_t + λI) · (Σ_t w_t C_t + NλI)⁻¹                      RegMean, arXiv 2212.09849, with this
       ridge
ΔW_t = B_t A_t, so the result is the old B's over new rows: rank <= Σr without an SVD. C_t is kept as its leading
directions and one number for all others, so that the system is solved in their few dimensions (Woodbury).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checks import check_field, is_int, is_number, listed
from ..files import check_writable, whole_file
from ..inputs import (
    base_of,
    batches_of,
    check_length,
    check_text,
    load_tokenizer,
    modules_back,
    parts,
    real_rows,
    seeded,
    shared_inputs,
    text_tokenizer,
    trainable_as_before,
    unmoved,
    visit,
    writes_text,
)
from ..lora_file import PREFIX, TENSORS, Lora, LoraFile, digest, read_lora
from ..quantization import use_exact_4bit_kernels
from .core import check_size
from .written import own_texts


FILE = "input_statistics.safetensors"
VERSION = 1
STRENGTHS = (0.0, 0.5, 1.0)  # docs/merging-measured.md has what they give
LAST = 0.5
HOOKS = [
    f"_forward_{kind}"
    for kind in ("hooks", "hooks_with_kwargs", "hooks_always_called", "pre_hooks", "pre_hooks_with_kwargs")
]


class Spread(NamedTuple):
    """C = rest·I + Q diag(values - rest) Qᵀ: Q (I, k) orthonormal, of any float dtype, values (k,) >= rest >= 0."""

    Q: Tensor
    values: Tensor
    rest: float

    def times(self, X: Tensor) -> Tensor:
        """C·X for X (I, m), float64."""
        return self.rest * X + self.half @ (self.half.T @ X)

    @property
    def half(self) -> Tensor:
        """H (I, k) float64 with C = rest·I + H Hᵀ."""
        return self.Q.double() * (self.values.double() - self.rest).clamp_min(0).sqrt()

    def trace(self) -> float:
        return self.rest * len(self.Q) + float(self.half.square().sum())


def spread(C: Tensor, directions: int) -> Spread:
    """The leading directions of a covariance (I, I), and the mean of the other eigenvalues; its trace stays."""
    size, k = len(C), min(directions, len(C))
    if size > 1024 and k < size // 4:  # by iteration: a tenth of eigh's time at 1536, seconds for minutes at 14336
        with seeded(0):
            _, values, Q = torch.svd_lowrank(C.float(), q=k + 8, niter=6)
    else:
        values, Q = (x.flip(-1) for x in torch.linalg.eigh(C.double()))
    values, Q = values[:k].clamp_min(0), Q[:, :k]
    rest = max(0.0, float(C.diagonal().double().sum() - values.double().sum())) / max(1, size - k)
    return Spread(Q.float().cpu(), values.float().cpu(), rest)


@dataclass(frozen=True)
class Statistics:
    """C of each distinct input.

    Args:
        spreads: group -> C; groups: group -> the modules that share that input.
        prompts, tokens: how many were looked at.
        strengths: of the adapter meanwhile, shares of its scale; C is the mean over them.
    """

    spreads: dict[str, Spread]
    groups: dict[str, tuple[str, ...]]
    prompts: int
    tokens: int
    strengths: tuple[float, ...] = (1.0,)

    def of(self, module: str) -> Spread | None:
        return next((self.spreads[group] for group, modules in self.groups.items() if module in modules), None)

    def save(self, folder: str | Path, weights: str | None = None) -> Path:
        """Write FOLDER/input_statistics.safetensors beside the adapter that they are of; directions in 16 bits.

        Args:
            weights: `digest` of the adapter, if it is not in `folder` yet.
        """
        tensors = {}
        for name, (Q, values, rest) in self.spreads.items():
            tensors[f"{name}.directions"] = Q.half().contiguous()
            tensors[f"{name}.values"] = torch.cat([values.float(), torch.tensor([rest])])
        text = {
            "version": VERSION, "groups": self.groups, "prompts": self.prompts, "tokens": self.tokens,
            "strengths": self.strengths, "adapter_sha256": weights or digest(folder),
        }  # fmt: skip
        path = Path(folder) / FILE
        with whole_file(path) as written:
            save_file(tensors, written, {"statistics": json.dumps(text)})  # of two entries the order would vary
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Statistics | None:
        """What `save` wrote; None where there is nothing.

        Raises:
            ValueError: the file is damaged, or of other weights than the adapter's.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        again = "collect_inputs writes it anew; or delete it."
        try:
            with safe_open(path, "pt") as file:
                text = json.loads(file.metadata()["statistics"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            groups = {name: tuple(modules) for name, modules in text["groups"].items()}
            spreads = {
                name: Spread(found[f"{name}.directions"], values[:-1], float(values[-1]))
                for name in groups
                for values in [found[f"{name}.values"]]
            }
            strengths = tuple(text.get("strengths", [text.get("strength", 1.0)]))  # files of before: one
            statistics = cls(spreads, groups, text["prompts"], text["tokens"], strengths)
            version, adapter = text["version"], text["adapter_sha256"]
            if broken := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
                raise ValueError(f"{broken[0]!r} is not finite")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:  # JSON's is a ValueError
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): {again}") from error
        if version != VERSION or adapter != digest(folder):
            what = f"has version {version}" if version != VERSION else "was made with other weights of the adapter"
            raise ValueError(f"{path} {what}: {again}")
        return statistics


def collect_inputs(
    model: nn.Module,
    texts: Sequence[str] | str,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    directions: int = 32,
    last: float = LAST,
    strengths: float | Sequence[float] = STRENGTHS,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Statistics:
    """See what goes into an adapter's modules on some of its prompts, and keep that beside it.

    Nothing of the texts is kept but `directions` directions of each distinct input (32: about 6 MB for a model of
    135 M parameters, whose adapter of r = 8 has 5). 8 to 64 prompts of the kind that the adapter is for; no labels.

    Args:
        model: the base model, onto which the adapter is put for the length of the call; or a PeftModel with the
            adapter active.
        texts: prompts, as the model is given them; or "self": what the adapter writes itself, which is refused of
            one that has not learnt whole texts; all of their tokens count alike.
        folder: the saved adapter; FOLDER/input_statistics.safetensors is written.
        tokenizer: None takes the one saved with the adapter, or else the model's.
        directions: k of every C; the others have one mean.
        last: share of C that is over last tokens alone, 0..1.
        strengths: shares of its scale that the adapter has meanwhile, 0..1, each in turn; C is the mean over them.
        max_length: tokens of a text that are read, from its first on; None: all, for what a prompt asks for is mostly
            its end.

    Raises:
        ValueError: as `read_lora`; the model is not the adapter's base, or has another adapter active; no texts; a
            module that saw no input.
        PermissionError: the folder cannot be written to.
    """
    check_field(is_int(batch_size) and batch_size >= 1, "batch_size", batch_size, "an integer >= 1")
    ok = max_length is None or (is_int(max_length) and max_length >= 1)
    check_field(ok, "max_length", max_length, "an integer >= 1, or None for all")
    file = read_lora(folder)
    check_writable(folder)
    check_base(base_of(model), file)
    if isinstance(model, PeftModel):
        check_active(model, file)
    own = isinstance(texts, str) and texts == "self"
    if own and (last != LAST or max_length is not None):
        raise ValueError("`last` and `max_length` are of texts that are given, not of 'self': leave them out.")
    tokenizer = tokenizer or saved_tokenizer(model, folder)
    with adapted(model, folder) as with_adapter:
        if own:
            check_unmerged(with_adapter, 0.0)  # a look without the adapter would take it out of the weights
            rows, last = own_texts(with_adapter, tokenizer, folder, batch_size), 0.0
        else:
            rows = encoded(texts, tokenizer, max_length, writes_text(with_adapter.get_base_model()))
        check_length(with_adapter.get_base_model(), rows)
        batches = batches_of(rows, batch_size)
        statistics = input_spreads(
            with_adapter, list(file.loras), batches, directions=directions, last=last, strengths=strengths
        )
    statistics.save(folder)
    return statistics


@contextmanager
def adapted(model: nn.Module, folder: str | Path, trainable: bool = False) -> Iterator[PeftModel]:
    """A base model with an adapter for the length of a block, and as it was after it; a PeftModel as it is. In 4 bits
    the layers keep the kernels of training: else bitsandbytes repacks the base at its first forward on some CPUs, and
    rounds it."""
    use_exact_4bit_kernels(model)
    if isinstance(model, PeftModel):
        yield model
        return
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "The model has an adapter in it already (model.add_adapter), which would take part in all that is looked "
            "at: give the bare base model."
        )
    if away := next((name for name, weight in model.named_parameters() if weight.is_meta), None):
        raise ValueError(
            f"The model's {away!r} is on the meta device (accelerate offloads it), and opening an adapter there would "
            "change the model for good: put the whole model into memory, or load it in 4 bits."
        )
    before = dict(model.named_modules())
    modes = [(module, module.training) for module in before.values()]
    described, with_adapter = "peft_config" in vars(model), None
    hooks = [(found := getattr(module, kind), dict(found)) for module in before.values() for kind in HOOKS]
    with trainable_as_before(model):
        try:
            with unmoved():  # PEFT draws A before it reads the file
                with_adapter = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
            yield with_adapter
        finally:
            if with_adapter is not None:
                with_adapter.unload()
            for found, own in hooks:
                found.clear()
                found.update(own)
            modules_back(model, before)  # also where an adapter broke off in loading
            if not described:
                vars(model).pop("peft_config", None)
            for module, training in modes:
                module.training = training


def check_base(model: nn.Module, file: LoraFile) -> None:
    """Refuse an adapter whose modules a base model has not, or has with other sizes; and what is no model.

    Raises:
        ValueError: naming the module.
    """
    check_field(isinstance(model, nn.Module), "model", model, "the base model itself, loaded")
    there = dict(model.named_modules())
    for name, (A, B) in file.loras.items():
        layer: Any = there.get(name)
        given = tuple(getattr(layer, field, None) for field in ("out_features", "in_features"))
        if isinstance(layer, Conv1D):
            given = tuple(reversed(layer.weight.shape))
        if layer is None or (None not in given and given != (len(B), A.shape[1])):
            has = "which the model has not" if layer is None else f"which is {given[0]} x {given[1]} in the model"
            raise ValueError(
                f"The adapter in {file.folder} updates {name!r} by {len(B)} x {A.shape[1]}, {has}: it is of another "
                "base model. Give the one that its adapter_config.json names."
            )


def check_active(model: PeftModel, file: LoraFile) -> None:
    """Refuse a PeftModel whose active adapter is not the one that a folder holds.

    Raises:
        ValueError: its weights or its scale are others, or several are active, or none.
    """
    active = list(model.active_adapters)
    if len(active) == 1:
        state = get_peft_model_state_dict(model, adapter_name=active[0], save_embedding_layers=False)
        stored = load_file(file.folder / TENSORS)
        config, scale = model.peft_config[active[0]], ("lora_alpha", "alpha", "alpha_pattern", "use_rslora")
        if (
            all(key in stored and _near(tensor.cpu(), stored[key]) for key, tensor in state.items())
            and all(any(key.startswith(f"{PREFIX}{name}.") for key in state) for name in file.loras)
            and all(getattr(config, key, None) == file.config[key] for key in scale if key in file.config)
        ):
            return
    raise ValueError(
        f"The model's active adapter ({listed(map(repr, active), 'and') if active else 'none'}) is not the one in "
        f"{file.folder}: make that one active (model.set_adapter), save it again if it has been trained since, or "
        "give the bare base model."
    )


def _near(tensor: Tensor, saved: Tensor) -> bool:
    """Equal but for a change of dtype."""
    if tensor.shape != saved.shape:
        return False
    saved = saved.double()
    return float((tensor.double() - saved).norm()) <= 0.01 * float(saved.norm())


def scaled_layers(model: PeftModel) -> list[Any]:
    """The layers whose updates have a scale."""
    tuned = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return [layer for layer in tuned if hasattr(layer, "scaling")]


def check_unmerged(model: PeftModel, strength: float) -> None:
    """Refuse another strength than 1 of an adapter that is merged into the base's weights.

    Raises:
        ValueError: saying what to do.
    """
    if strength != 1 and any(layer.merged for layer in scaled_layers(model)):
        raise ValueError(
            f"An adapter that is merged into the base's weights cannot be seen at {strength} of its strength: "
            "call model.unmerge_adapter() first, or give strength=1."
        )


@contextmanager
def at_strength(model: PeftModel, strength: float) -> Iterator[None]:
    """A model's adapters at a share of their updates for the length of a block.

    Raises:
        ValueError: an adapter is merged into the base's weights.
    """
    layers = scaled_layers(model)
    check_unmerged(model, strength)
    own = [dict(layer.scaling) for layer in layers]
    try:
        for layer, scaling in zip(layers, own, strict=True):
            layer.scaling.update({name: strength * scale for name, scale in scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, own, strict=True):
            layer.scaling.update(scaling)


def encoded(
    texts: Sequence[str],
    tokenizer: Any,
    max_length: int | None = None,
    open_end: bool = False,
    name: str = "texts",
) -> list[Tensor]:
    """Token ids (S,) int64 of each text that has any, as many as `max_length`; of a processor, its tokenizer's.

    Args:
        open_end: something is to be written behind the texts: without the end of a text that some tokenizers add.
        name: what the texts are called, for errors.

    Raises:
        ValueError: none has, or they are no list of texts.
    """
    several = isinstance(texts, Iterable) and not isinstance(texts, str | bytes | Mapping)
    some = list(texts) if several else []
    for text in some:
        check_field(isinstance(text, str), f"{name}[...]", text, "a text each")
    check_field(bool(some), name, texts, "a list of texts, at least one")
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    tokenizer = text_tokenizer(tokenizer)
    found = (copy.deepcopy(tokenizer) if cut else tokenizer)(some, **cut)["input_ids"]
    if open_end:
        added = [list(tokenizer("a", add_special_tokens=special)["input_ids"])[-1:] for special in (True, False)]
        if added[0] != added[1] and added[0] == [tokenizer.eos_token_id]:
            found = [ids[:-1] if list(ids[-1:]) == added[0] else ids for ids in found]
    rows = [torch.tensor(ids) for ids in found if len(ids)]
    check_field(bool(rows), name, texts, "a list of texts, at least one with tokens")
    return rows


def submodules(model: PeftModel, names: Sequence[str]) -> dict[str, nn.Module]:
    """By their names in the base model."""
    base: Any = model.get_base_model()
    return {name: base.get_submodule(name) for name in names}


def check_looking(directions: int, last: float, strengths: Any) -> tuple[float, ...]:
    """The strengths; refuse arguments of `input_spreads`."""
    check_field(is_int(directions) and directions >= 1, "directions", directions, "an integer >= 1")
    check_share("last", last)
    return check_strengths("strengths", strengths)


def check_system(ridge: float = 0.01, floor: float = 0.1) -> None:
    """Refuse arguments of `inputs`."""
    check_field(is_number(ridge) and ridge > 0, "ridge", ridge, "a number > 0")
    check_field(is_number(floor) and floor >= 0, "floor", floor, "a number >= 0")


def check_share(name: str, value: Any) -> None:
    check_field(is_number(value) and 0 <= value <= 1, name, value, "a share in [0, 1]")


def check_strengths(name: str, given: Any) -> tuple[float, ...]:
    """One strength or several; refuse what is none."""
    several = isinstance(given, Sequence) and not isinstance(given, str)
    found = tuple(given) if several else (given,)
    check_field(bool(found), name, given, "a share in [0, 1], or several")
    for one in found:
        check_share(name, one)
    return found


def input_spreads(
    model: PeftModel,
    modules: Sequence[str],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    directions: int = 16,
    last: float = 0.5,
    strengths: float | Sequence[float] = 1.0,
    budget_gib: float = 4.0,
) -> Statistics:
    """C of the inputs of some modules (by their names in the base model) over prompts.

    Args:
        batches: input_ids and attention_mask (B, S), int64.
        strengths: shares of their scale that the model's adapters have meanwhile, 0..1; C is the mean over them.

    Raises:
        ValueError: a module saw no input, or one that is not finite; tokens stand for images; an encoder-decoder.
    """
    strengths = check_looking(directions, last, strengths)
    tokens = int(sum(batch["attention_mask"].sum() for batch in batches))
    prompts = sum(len(batch["input_ids"]) for batch in batches)
    each_token, each_prompt = 1 / tokens / len(strengths), 1 / prompts / len(strengths)
    found = submodules(model, modules)
    if getattr(model.get_base_model().config, "is_encoder_decoder", False):
        raise ValueError(
            "A prompt does not go into the decoder of an encoder-decoder: merge its adapters by a rule that needs no "
            "inputs."
        )
    check_text(model, batches, "give prompts without images, or merge by a rule that needs no inputs.")
    groups, sizes = shared_inputs(model, found, batches[0])
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        rows = real_rows(x, mask, name).float()
        if name not in sums:
            sums[name] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        if mask is not None and x.shape[:-1] == mask.shape[:1]:  # a pooler, whose rows are prompts
            sums[name].addmm_(rows.T, rows, alpha=each_prompt)
            return
        sums[name].addmm_(rows.T, rows, alpha=(1 - last) * each_token)
        if last and mask is not None:
            ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1).to(x.device)
            rows = x.reshape(*mask.shape, -1)[torch.arange(len(ends), device=x.device), ends].float()
            sums[name].addmm_(rows.T, rows, alpha=last * each_prompt)

    spreads = {}
    for part in parts({name: 4 * size**2 for name, size in sizes.items()}, budget_gib * 2**30):
        for share in strengths:
            with at_strength(model, share):
                visit(model, {name: found[name] for name in part}, batches, add)
        for name in part:
            if not sums[name].isfinite().all():
                raise ValueError(
                    f"The inputs of module {name!r} are not finite (NaN, inf, or squares beyond float32): the adapter "
                    "has diverged, or the base does not go with it."
                )
            spreads[name] = spread(sums.pop(name), directions)
    return Statistics(spreads, groups, prompts, tokens, strengths)


class Inputs:
    """The sums of one module, to which adapters are added one at a time: exact, in any order, and no more than
    2·O·I + O² + 2·I² numbers, however many there are. It is `inputs` with floor=0: a floor is a share of the mean over
    all adapters, which sums of some do not know. Against one that hardly responds to its inputs give more `output`.

    Args:
        ridge: ε, of λ = ε · mean(diag Σ w_t C_t) / Σ weights.
    """

    def __init__(self, ridge: float = 0.01) -> None:
        check_system(ridge)
        self.ridge = ridge
        self.B: list[Tensor] = []
        self.A: list[Tensor] = []  # rows weight · A_t
        self.AC: list[Tensor] = []  # rows w_t A_t C_t
        self.halves: list[Tensor] = []
        self.rest = self.trace = self.weight = 0.0

    def add(self, lora: Lora, C: Spread | None, weight: float = 1.0, output: float | None = None) -> None:
        """One adapter with its inputs.

        Args:
            lora: its ΔW. C: None: its inputs are not known, so that it takes part in the ridge only.
            weight: >= 0; of the adapter. output: E‖ΔW_t x‖², by which its error is divided, so that every adapter's
                output counts alike; None computes it.

        Raises:
            ValueError: a weight that is none, or an update of another size than those before.
        """
        check_field(is_number(weight) and weight >= 0, "weight", weight, "a number >= 0")
        A, B = lora.A.double(), lora.B.double()
        check_size(lora, Lora(self.A[0], self.B[0]) if self.A else None)
        output = output_energy(lora, C) if output is None else output
        self.weight += weight
        if C is not None and output > 0:
            w = weight / output
            self.AC.append(w * C.times(A.T).T)
            self.halves.append(w**0.5 * C.half)
            if sum(H.shape[1] for H in self.halves) > 2 * len(C.Q):  # no more than I are ever needed
                self.halves = [torch.linalg.qr(torch.cat(self.halves, dim=1).T).R.T]
            self.rest += w * C.rest
            self.trace += w * C.trace()
        else:
            self.AC.append(torch.zeros_like(A))
        self.A.append(weight * A)
        self.B.append(B)
        if sum(map(len, self.A)) > len(B):  # no more than O rows are ever needed
            stacked = torch.cat(self.B, dim=1)
            self.A, self.AC = [stacked @ torch.cat(self.A)], [stacked @ torch.cat(self.AC)]
            self.B = [torch.eye(len(B), dtype=B.dtype)]

    def result(self) -> Lora:
        """A (R, I), B (O, R) float64.

        Raises:
            ValueError: nothing was added, or with weight 0 alone.
        """
        if not self.weight > 0:
            raise ValueError("Nothing was added that counts: add(lora, C) first, with a weight > 0.")
        A, B = torch.cat(self.A), torch.cat(self.B, dim=1)
        size = A.shape[1]
        if self.trace <= 0:  # nothing is known of any input, or all updates are 0: the weighted mean
            return Lora(A / self.weight, B)
        lam = self.ridge * self.trace / size / self.weight
        rows, g = torch.cat(self.AC) + lam * A, self.rest + self.weight * lam
        H = torch.cat(self.halves, dim=1)
        if H.shape[1] < size:  # (gI + H Hᵀ)⁻¹ = (I - H (gI + HᵀH)⁻¹ Hᵀ) / g
            inner = H.T @ H + g * torch.eye(H.shape[1], dtype=H.dtype)
            solved = rows - torch.cholesky_solve(H.T @ rows.T, torch.linalg.cholesky(inner)).T @ H.T
            return Lora(solved / g, B)
        G = H @ H.T + g * torch.eye(size, dtype=H.dtype)
        return Lora(torch.cholesky_solve(rows.T, torch.linalg.cholesky(G)).T, B)


def inputs(
    loras: Sequence[Lora],
    weights: Sequence[float],
    spreads: Sequence[Spread | None],
    *,
    ridge: float = 0.01,
    floor: float = 0.1,
) -> Lora:
    """The merged update of one module.

    Args:
        spreads: C_t of each adapter.
        ridge: ε of λ.
        floor: the least output energy that an adapter counts with, as a share of the mean of those of weight > 0: one
            that hardly responds to its own inputs would be weighted without bound (w_t = 1 / E‖ΔW_t x‖²). 0 is none.
    """
    check_system(ridge, floor)
    energies = [output_energy(lora, C) for lora, C in zip(loras, spreads, strict=True)]
    known = [energy for energy, weight in zip(energies, weights, strict=True) if energy > 0 and weight > 0]
    least = floor * sum(known) / max(1, len(known))
    sums = Inputs(ridge)
    for lora, C, weight, energy in zip(loras, spreads, weights, energies, strict=True):
        sums.add(lora, C, weight, max(energy, least))
    return sums.result()


def output_energy(lora: Lora, C: Spread | None) -> float:
    """E‖ΔW x‖² = tr(ΔW C ΔWᵀ) over the inputs; 0 where they are not known."""
    if C is None:
        return 0.0
    A, B = lora.A.double(), lora.B.double()
    return float(((B.T @ B) * (A @ C.times(A.T))).sum().clamp_min(0))


def output_error(lora: Lora, merged: Lora, C: Spread | None) -> float:
    """E‖(ΔW - ΔW_t) x‖² of an adapter over its own inputs; 0 where they are not known."""
    difference = Lora(torch.cat([merged.A, lora.A]), torch.cat([merged.B, -lora.B], dim=1))
    return output_energy(difference, C)


def output_energies(loras: Sequence[Lora], spreads: Sequence[Spread | None]) -> Tensor:
    """E‖ΔW_s x‖² over the inputs of t: (N, N) float64, a row for each t; 0 where its inputs are not known."""
    ranks = [len(lora.A) for lora in loras]
    grams = [lora.B.double().T @ lora.B.double() for lora in loras]
    A = torch.cat([lora.A.double() for lora in loras])
    square = A @ A.T
    found = torch.zeros(len(loras), len(loras), dtype=torch.float64)
    for t, C in enumerate(spreads):
        if C is not None:
            seen = A @ C.half
            blocks = (C.rest * square + seen @ seen.T).split(ranks)
            for s, (gram, rows) in enumerate(zip(grams, blocks, strict=True)):
                found[t, s] = (gram * rows.split(ranks, dim=1)[s]).sum().clamp_min(0)
    return found


def texts_of(prompts: Mapping[Any, Sequence[str]], folders: Sequence[Path]) -> list[Sequence[str]]:
    """The prompts of each folder.

    Raises:
        ValueError: a folder has none, or is there twice.
    """
    by_folder: dict[Path, Sequence[str]] = {}
    for key, texts in prompts.items():
        folder = Path(key).resolve()
        if by_folder.setdefault(folder, texts) is not texts:
            raise ValueError(f"`prompts` has {folder} twice: give its texts once, in one list.")
    missing = [str(folder) for folder in folders if folder.resolve() not in by_folder]
    if missing:
        raise ValueError(f"`prompts` has no texts for {', '.join(missing)}: give {{folder: [text, ...]}} for each.")
    return [by_folder[folder.resolve()] for folder in folders]


def saved_tokenizer(model: Any, folder: str | Path) -> Any:
    """The one beside the adapter, else the model's."""
    own = (Path(folder) / "tokenizer_config.json").is_file()
    return load_tokenizer(folder if own else base_of(model).config._name_or_path)
