"""What goes into modules of any model: forwards in eval mode, hooks, which tokens are real, Σ x xᵀ. Torch only."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


Key = TypeVar("Key")
LOUDEST = 16.0  # median squared norms that one token may count as in a sum over tokens


def fit_mask(mask: Tensor, shape: Sequence[int], name: str, cached: bool = False) -> Tensor:
    """Which tokens of a module's input are real: `mask` (B, S) as bool in the input's shape without its last axis.

    Args:
        mask: the model's attention mask, 0 where a token is padding.
        shape: (B, S) or (B·S,); or (B,), a row for each sequence, as a pooler has: all of them are real.
        name: of the module, for the error.
        cached: a shape (B, S'), S' < S, is of the last tokens, whose predecessors are in a KV cache.

    Raises:
        ValueError: the tokens are not those of the mask.
    """
    batch, length = mask.shape
    if tuple(shape) == (batch,) and length > 1:
        return torch.ones(batch, dtype=torch.bool, device=mask.device)
    if cached and len(shape) == 2 and shape[0] == batch and shape[1] <= length:
        mask = mask[:, length - shape[1] :]
    elif tuple(shape) not in ((batch, length), (batch * length,)):
        raise ValueError(
            f"Cannot tell which tokens are padding in {name}, whose inputs have shape {tuple(shape)} before the last "
            f"axis while the attention mask has {tuple(mask.shape)}. Leave such modules (experts of a mixture, what "
            "reads images inside of a language model) out of `target_modules`, and call one adapter at a time instead "
            "of passing adapter_names."
        )
    return mask.bool().reshape(*shape)


def real_rows(x: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """(T, I) rows of an input (B, S, I) or (B·S, I) of module `name` whose token is no padding by `mask` (B, S).

    Raises:
        ValueError: the tokens are not those of the mask.
    """
    if mask is None:
        return x.reshape(-1, x.shape[-1])
    return x[fit_mask(mask, x.shape[:-1], repr(name)).to(x.device)]


def base_of(model: Any) -> Any:
    """The model that a PeftModel holds; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def writes_text(model: Any) -> bool:
    """Whether it is a causal language model, one token after the other."""
    return bool(getattr(model, "can_generate", bool)()) and not getattr(model.config, "is_encoder_decoder", False)


def towers(model: Any) -> set[nn.Module]:
    """What a model has beside the stack that reads its tokens, with all that is in it: vision and audio towers, and
    what carries their outputs over. Empty for a model of text, and for an encoder-decoder.

    Patches and frames go in there, of which the attention mask of the text says nothing.
    """
    base = base_of(model)
    if not hasattr(base, "get_decoder") or getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return set()
    tokens = base.get_decoder()
    stack = getattr(base, getattr(base, "base_model_prefix", "") or "", base)
    parts = set(stack.modules()) if isinstance(stack, nn.Module) else set()
    return parts - set(tokens.modules()) - {stack} if tokens in parts else set()


def room(model: Any) -> int | None:
    """How many tokens a text may have, of a model with a table of positions (GPT-2, BERT); None without one."""
    beside, found = towers(model), []
    for name, module in base_of(model).named_modules():
        last = name.rpartition(".")[2]
        of_text = module not in beside and "image" not in name and "vision" not in name
        if isinstance(module, nn.Embedding) and of_text and (last == "wpe" or "position" in last):
            before = 2 if getattr(module, "offset", module.padding_idx) else 0  # OPT, RoBERTa
            found.append(module.num_embeddings - before)
    return min(found, default=None)


def check_patches(batch: Mapping[str, Any]) -> None:
    """Refuse a batch with padding in its images or sounds, for layers of a tower.

    Raises:
        ValueError: a mask beside the text's has zeros.
    """
    known = ("attention_mask", "decoder_attention_mask")
    for name, mask in batch.items():
        if name.endswith("mask") and name not in known and isinstance(mask, Tensor) and not bool(mask.all()):
            raise ValueError(
                f"The batch's `{name}` has zeros: images (or sounds) are padded, and which patches in a tower are "
                "padding is known to the tower alone. Adapt the language model only "
                "(exclude_modules=r'(?!.*language_model).*'), or give images of one size."
            )


def placeholders(model: Any) -> list[int]:
    """The tokens in whose place images, videos and sounds go; [] for a model of text."""
    config = getattr(model, "config", None)
    names = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
    found = [getattr(config, name, None) for name in names]
    return sorted({token for token in found if isinstance(token, int)})


def check_text(model: Any, batches: Iterable[Mapping[str, Any]], what: str) -> None:
    """Refuse tokens in whose place images go, for a forward without the images.

    Args:
        what: whose text it is, and what to do instead, for the error.

    Raises:
        ValueError: a batch's `input_ids` have such a token.
    """
    stand_ins = placeholders(model)
    if stand_ins and any(bool(torch.isin(b["input_ids"].cpu(), torch.tensor(stand_ins)).any()) for b in batches):
        raise ValueError(f"The text has tokens that stand for images, which are not shown to the model here: {what}")


def text_tokenizer(processor: Any) -> Any:
    """The tokenizer of a model's processor, which takes images first, with the processor's chat template where it has
    none of its own; a tokenizer is its own."""
    tokenizer = getattr(processor, "tokenizer", processor)
    template = getattr(processor, "chat_template", None)
    if tokenizer is not processor and template is not None and tokenizer.chat_template is None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def load_tokenizer(name: Any, **options: Any) -> Any:
    """The tokenizer of a folder or a name.

    Raises:
        ValueError: it has none: from a model's config alone transformers makes one that knows no words.
    """
    from transformers import AutoTokenizer

    if not name:
        raise ValueError("The model has no tokenizer, as it came from no folder: give one as `tokenizer`.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), **options)
    except ValueError as error:  # mostly, there are no files that it is made of
        why = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{name} has no tokenizer that opens ({why}): save it there, or give one as `tokenizer`."
        ) from error
    added = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    if not set(tokenizer.get_vocab()) - added - {"▁"}:
        raise ValueError(f"{name} has no tokenizer: save it there, or give one as `tokenizer`.")
    return tokenizer


def check_length(model: nn.Module, rows: Sequence[Any], answer: int = 0) -> None:
    """Refuse prompts with more tokens than a model has positions, where it keeps a table of them (GPT-2, BERT).

    Args:
        answer: tokens that are written behind them.

    Raises:
        ValueError: naming both numbers.
    """
    there, longest = room(model), max(map(len, rows), default=0)
    if there is not None and longest + answer > there:
        more = f" and an answer up to {answer} (`answer_tokens`)" if answer else ""
        raise ValueError(
            f"A prompt has {longest} tokens{more}, and the model has {there} positions: give shorter ones."
        )


def positions(mask: Tensor) -> Tensor:
    """position_ids (B, S) int64 of an attention mask (B, S): a real token's number among its sequence's."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def left_padded(rows: Sequence[Tensor], pad: int = 0) -> dict[str, Tensor]:
    """input_ids, attention_mask and position_ids (B, S) int64 of sequences of tokens (S,), padded on the left: to be
    continued, or so that their last tokens are in one place."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}


def right_padded(rows: Sequence[Any], pad: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, S) int64 of sequences of tokens (tensors or lists), padded on the right: to be
    read, as every model numbers real tokens from 0 there."""
    ids, mask = (torch.full((len(rows), max(map(len, rows))), value) for value in (pad, 0))
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.as_tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def batches_of(rows: Sequence[Any], size: int) -> list[dict[str, Tensor]]:
    """`right_padded` batches of `size` sequences each, the last of what is left."""
    return [right_padded(rows[start : start + size]) for start in range(0, len(rows), size)]


def recomputing() -> bool:
    """Whether a backward runs, and forwards in it are checkpointing's."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def before_backward(module: nn.Module, output: Any, act: Callable[[], None]) -> None:
    """Call `act` as soon as a gradient comes to the output of a module's forward, tensors in mappings and sequences,
    and so before checkpointing computes any part of it again. In a compiled model only where its modules say that they
    are checkpointed: it breaks the graph."""
    if torch.is_grad_enabled() and (
        not torch.compiler.is_compiling()
        or any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    ):
        _on_gradient(output, act)


@torch.compiler.disable
def _on_gradient(output: Any, act: Callable[[], None]) -> None:
    if isinstance(output, Tensor):
        if output.requires_grad:
            output.register_hook(lambda grad: act())
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            _on_gradient(part, act)


class LatestMask:
    """The attention mask of a model's latest forward: for layers that count tokens, while it runs and, where reentrant
    checkpointing computes them again, in its backward.

    Attributes:
        by_device: the sequences of a forward, each as its shape (B, S) and its mask in bool, None for no mask: a
            decoder's own and its encoder's. Replicas of `nn.DataParallel`, each on its device, run at once.
    """

    def __init__(self) -> None:
        self.by_device: dict[torch.device, list[tuple[torch.Size, Tensor | None]]] = {}
        self.handles: list[RemovableHandle] = []

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Look at the mask of each call of modules that take one.

        A mask that is not (B, S), such as (B, 1, S, S), changes nothing where a module further out has had the other
        one; the outermost has none then.
        The innermost of them recall theirs: a model's output holds its encoder's too, whose mask is another.
        """
        names = {module: list(inspect.signature(module.forward).parameters) for module in modules}
        takes = {module: found.index("attention_mask") for module, found in names.items() if "attention_mask" in found}
        inner = {part for module in takes for part in module.modules() if part is not module}
        for module, place in takes.items():
            hook = partial(self._see, place, module not in inner)
            self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if not any(part in takes for part in module.modules() if part is not module):
                self.handles.append(module.register_forward_hook(self._recall, with_kwargs=True))

    def _see(self, place: int, outermost: bool, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = kwargs.get("attention_mask", args[place] if place < len(args) else None)
        mask = given if isinstance(given, Tensor) and given.dim() == 2 else None
        if given is not None and mask is None and not outermost:
            return
        others = (t for t in (*args, *kwargs.values()) if t is not given)
        found = next((t for t in (mask, *others) if isinstance(t, Tensor)), None)
        if found is None:
            return
        sequences: list[tuple[torch.Size, Tensor | None]] = [(found.shape[:2], None if mask is None else mask.bool())]
        encoder = kwargs.get("encoder_attention_mask")
        if isinstance(encoder, Tensor) and encoder.dim() == 2:
            sequences.append((encoder.shape, encoder.bool()))
        if torch.compiler.is_compiling():  # a graph that looks at what was there is compiled again in the second step
            self.by_device = {found.device: sequences}
        else:
            self.by_device[found.device] = sequences

    def _recall(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """The backward of this forward will find its mask again, also where other forwards came in between."""
        device = next((t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if device in self.by_device:
            masks = self.by_device[device]
            before_backward(module, output, lambda: self.by_device.update({device: masks}))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "by_device": {}}


def watched(model: Any) -> LatestMask:
    """A `LatestMask` of the model and of what a trainer may call in its place: its stack of layers, its two halves."""
    latest = LatestMask()
    halves = [getattr(model, name)() for name in ("get_encoder", "get_decoder") if hasattr(model, name)]
    stack = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    latest.watch(module for module in (model, stack, *halves) if isinstance(module, nn.Module))
    return latest


def rows_of(
    masks: Mapping[torch.device, list[tuple[torch.Size, Tensor | None]]], device: torch.device, shape: Sequence[int]
) -> Tensor | None:
    """(T, 1) bool, which rows of a layer's input are real tokens, by a `LatestMask.by_device`.

    None if all are, or if they are no sequence of the model's: those that a mixture sends to an expert. Of two
    sequences of one shape it is the decoder's.

    Args:
        device: the input's.
        shape: the input's without its last axis.
    """
    if not masks:
        return None
    for found, mask in masks[device] if device in masks else next(iter(masks.values())):
        if tuple(shape) in (tuple(found), (found.numel(),)):
            return None if mask is None else mask.reshape(-1, 1).to(device)
    return None


@contextmanager
def with_field(owners: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Several objects' field at one value for the length of a block, and as each had it after it."""
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            setattr(owner, name, own)


@contextmanager
def trainable_as_before(model: nn.Module) -> Iterator[None]:
    """What is frozen stays frozen: PEFT makes all active adapters trainable when it switches them on, and freezes the
    base when it puts one onto it."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad = trainable


def modules_back(model: nn.Module, before: Mapping[str, nn.Module]) -> None:
    """Put a model's modules where they were, by name, from the outside in."""
    for name, module in before.items():
        if name and model.get_submodule(name) is not module:
            model.set_submodule(name, module)


def generating_by(model: Any, config: Any) -> AbstractContextManager[None]:
    """A GenerationConfig in the place of the model's own for the length of a block: as an argument, `generate` would
    complete it by the model's repetition penalty, beams and so on."""
    base = base_of(model)
    # A PeftModel hands one of its own, where it was given one, on to its base.
    owners = [base, *([model] if model is not base and "generation_config" in vars(model) else [])]
    return with_field(owners, "generation_config", config)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for the length of a block; every module then as it was, for a part may not have been in
    training mode before."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def unmoved() -> AbstractContextManager[None]:
    """torch's generators go on after the block as if it had drawn nothing: also a card's, which `torch.manual_seed`
    moves whatever the block computes on."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generators begin at a seed in the block, and are `unmoved` after it."""
    with unmoved():
        torch.manual_seed(seed)
        yield


@contextmanager
def removed_after(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks for the length of a block, also if a forward in it fails."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_head(model: Any) -> nn.Module | None:
    """What makes logits of hidden states in a model, or in the one that a PeftModel holds; None where nothing does."""
    base = base_of(model)
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def contiguous_head(model: Any) -> AbstractContextManager[None]:
    """The output head gets contiguous inputs for the length of a block.

    Of several texts the last hidden states (B, n, D) are a slice. In bfloat16, on a CPU and without gradients, torch
    multiplies one by bmm, for which oneDNN copies the whole (V, D) weight once for each text: seconds a batch.
    """
    head = output_head(model)
    hooks = [] if head is None else [head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))]
    return removed_after(hooks)


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs; of one that accelerate offloads as a whole, where it computes."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    there = (weight.device for weight in model.parameters() if not weight.is_meta)
    return next(chain(there, (torch.device(place) for place in places if place is not None)), torch.device("cpu"))


@torch.no_grad()
def visit(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    look: Callable[[str, Tensor, Tensor, Tensor | None], None],
) -> None:
    """Call the model with each batch, in eval mode, and look(name, x, y, mask) at each call of the modules.

    x is the module's first argument, y its (first) output, mask the batch's `attention_mask` or None. In the decoder
    of an encoder-decoder it is `decoder_attention_mask`, else where there is a label, but for modules that read what
    the encoder gave. In the towers of a vision-language model it is None: all patches are real.

    Args:
        model: any model; it is in eval mode during the call, and as before after it.
        modules: by name; of `model`.
        batches: keyword arguments of the model's forward. What the forward does not take is left out, and so are
            labels, but where a decoder has its inputs from them. No logits but the last token's are computed where
            the model can do so and `modules` does not ask for them.
        look: called without gradients.

    Raises:
        ValueError: as `check_patches`, where modules of a tower are among them.
    """
    base = base_of(model)
    accepted = inspect.signature(base.forward).parameters
    device = device_of(model)
    head = output_head(base)
    options = {"use_cache": False, "logits_to_keep": 1}
    stack = getattr(base, getattr(base, "base_model_prefix", "") or "", base)
    cut = set(stack.modules()).difference(head.modules() if head is not None else ())  # BERT has layers behind them
    if not cut.issuperset(modules.values()):
        del options["logits_to_keep"]
    options = {name: value for name, value in options.items() if name in accepted}
    decoder = base.get_decoder() if getattr(getattr(base, "config", None), "is_encoder_decoder", False) else None
    beside = towers(base).intersection(modules.values())
    mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    encoded: Tensor | None = None  # what the decoder reads of the encoder, from the decoder's call on

    def enter_decoder(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal encoded
        encoded = inspect.signature(module.forward).bind(*args, **kwargs).arguments["encoder_hidden_states"]

    def hook(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
        decoding = encoded is not None and x.data_ptr() != encoded.data_ptr()
        real = None if module in beside else decoder_mask if decoding else mask
        look(name, x, output[0] if isinstance(output, tuple) else output, real)

    hooks = [module.register_forward_hook(partial(hook, n), with_kwargs=True) for n, module in modules.items()]
    if decoder is not None:
        hooks.append(decoder.register_forward_pre_hook(enter_decoder, with_kwargs=True))
    with eval_mode(model), removed_after(hooks), contiguous_head(model):
        for batch in batches:
            mask, decoder_mask, encoded = batch.get("attention_mask"), batch.get("decoder_attention_mask"), None
            labels = batch.get("labels")
            if decoder_mask is None and isinstance(labels, Tensor) and labels.dim() == 2:
                decoder_mask = labels != -100
            left_out = {"labels", "shift_labels"}
            if decoder is not None and not any(f"decoder_{name}" in batch for name in ("input_ids", "inputs_embeds")):
                left_out.remove("labels")
            inputs = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
                # Sequence lengths of padding-free batches go through **kwargs to the attention.
                if (name in accepted and name not in left_out) or name.startswith(("cu_seq_lens", "max_length"))
            }
            if beside:
                check_patches(inputs)
            model(**inputs, **options)


def quietened(rows: Tensor) -> Tensor:
    """Rows (T, I), the longest cut to `LOUDEST` times the median ‖x‖² of those that are not 0; NaN where ‖x‖² is not
    finite."""
    squares = rows.square().sum(dim=1, keepdim=True)
    some = squares[squares > 0]
    most = LOUDEST * some.median() if len(some) else 1.0
    share = (most / squares.clamp_min(torch.finfo(rows.dtype).tiny)).sqrt().clamp_max(1)
    return rows * share.where(squares.isfinite(), torch.nan)


@dataclass(frozen=True)
class InputStatistics:
    """Which modules share an input, and Σ x xᵀ of each distinct one, found when it is asked for.

    Args:
        groups: group -> the modules that share an input; a group is named after the first one called with it.
        sizes: group -> I, the numbers of that input.
        look: some groups -> their Σ x xᵀ (I, I), float32 on the model's device.
        budget_gib: GiB of matrices held at a time.
    """

    groups: dict[str, tuple[str, ...]]
    sizes: dict[str, int]
    look: Callable[[Sequence[str]], dict[str, Tensor]]
    budget_gib: float = 4.0

    def each(self, sets: Sequence[Sequence[str]]) -> Iterator[list[Tensor]]:
        """The matrices of each set of groups in turn: those of as many sets as the budget has room for are found at
        once, of one set at least, and dropped before the next are."""
        costs = {i: sum(4 * self.sizes[name] ** 2 for name in names) for i, names in enumerate(sets)}
        for part in parts(costs, self.budget_gib * 2**30):
            found = self.look(list(dict.fromkeys(name for i in part for name in sets[i])))
            for i in part:
                yield [found[name] for name in sets[i]]
            found.clear()

    def all(self) -> dict[str, Tensor]:
        """Those of every group, held at once."""
        return {group: C for group, (C,) in zip(self.groups, self.each([[g] for g in self.groups]), strict=True)}


def input_statistics(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Any]],
    budget_gib: float = 4.0,
) -> InputStatistics:
    """Σ x xᵀ of what goes into each module over the real tokens of some batches, which stream through the model.

    A token counts as `LOUDEST` typical ones at most. Where a first token has hundreds of times the norm of the others
    (an attention sink: two modules of SmolLM2), it is one direction, and without a limit it would be all of the sum.

    Modules that are called with the very same tensor (q/k/v; gate/up) share one matrix. Each matrix takes 4·I² bytes
    and all of them at once would not fit beside a large model, so they are found as they are asked for, with as many
    passes of the batches as `budget_gib` makes necessary. The model is to stay as it is meanwhile. Where there are
    several processes, all must ask for the same.

    Args:
        model, modules, batches: as `visit`; the inputs are (..., I), `attention_mask` (B, S) marks padding.
        budget_gib: GiB of matrices held at a time; at least one is.

    Raises:
        ValueError: a module was never called, or its tokens are not those of the attention mask; when its matrix is
            asked for: it got NaN or inf.
    """
    groups, sizes = shared_inputs(model, modules, batches[0])

    def look(names: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def add(name: str, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
            rows = quietened(real_rows(x, mask, name).float())
            if name not in found:
                found[name] = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
            found[name].addmm_(rows.T, rows)

        visit(model, {name: modules[name] for name in names}, batches, add)
        for name in names:
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(found[name])
            if not found[name].isfinite().all():
                raise ValueError(
                    f"The inputs of module {name!r} are not finite (NaN, inf, or squares beyond float32): the model "
                    "has diverged, or a batch is broken."
                )
        return found

    return InputStatistics(groups, sizes, look, budget_gib)


def shared_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """Which modules are called with the very same tensor, by one forward: group -> modules, and group -> I.

    Raises:
        ValueError: as `input_statistics`.
    """
    groups: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    group_of: dict[str, str] = {}
    seen: dict[int, tuple[weakref.ref, str]] = {}

    def see(name: str, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        if mask is not None:
            fit_mask(mask, x.shape[:-1], repr(name))
        reference, group = seen.get(id(x), (None, name))
        if reference is None or reference() is not x:  # an id is given again once its tensor is gone
            group = group_of.get(name, name)
            seen[id(x)] = (weakref.ref(x), group)
        if name not in group_of:
            group_of[name] = group
            groups.setdefault(group, []).append(name)
            sizes[group] = x.shape[-1]

    visit(model, modules, [batch], see)
    missing = [name for name in modules if name not in group_of]
    if missing:
        raise ValueError(
            f"{len(missing)} adapted modules saw no input in a forward of the data, e.g. {missing[0]!r}, so what they "
            "must keep cannot be known. Leave them out of `target_modules`; a vision tower never sees text, and "
            "images only where the first batch has some."
        )
    return {name: tuple(members) for name, members in groups.items()}, sizes


def layer_similarity(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Mean cosine, over real tokens, between what goes into each decoder layer and what comes out of it."""
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in layers}

    def add(name: str, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        x, y = (real_rows(rows, mask, name).float() for rows in (x, y))
        cosine = torch.cosine_similarity(x, y, dim=-1)
        sums[name] += torch.stack([cosine.sum(), torch.ones_like(cosine).sum()]).double().cpu()

    visit(model, layers, batches, add)
    if dist.is_available() and dist.is_initialized():
        stacked = torch.stack(list(sums.values()))
        stacked = stacked.to(device_of(model))
        dist.all_reduce(stacked)
        sums = dict(zip(sums, stacked.cpu(), strict=True))
    return {name: float(total / count) for name, (total, count) in sums.items()}


def parts(sizes: Mapping[Key, float], budget: float) -> Iterator[list[Key]]:
    """Keys in their order, as many at a time as `budget` has room for; at least one."""
    part: list[Key] = []
    used = 0.0
    for name, size in sizes.items():
        if part and used + size > budget:
            yield part
            part, used = [], 0.0
        part.append(name)
        used += size
    if part:
        yield part
