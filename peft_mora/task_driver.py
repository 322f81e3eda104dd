"""Sends each row of a batch through the adapter that a router chose for it, inside a model's own forward and generate.

At the first forward of an answer (no KV cache yet) the base's features decide, and the decision travels with the
cache: every later token of the answer goes the way that its prompt went. The adapters' layers then get PEFT's own
`adapter_names`, a name a row. Everything hangs on hooks of the base model, so it does not matter who calls it: a
PeftModel, transformers with an injected adapter, `pipeline`, lm-eval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .base import BASE_ADAPTER, AdapterLinear, refuse_part_of_adapter
from .inputs import output_head
from .task_features import HiddenStates, adapters_off, pooled, real_tokens


MARK = "_peft_mora_rows"  # where a KV cache carries the decision


class Rows(NamedTuple):
    """What a batch goes through: y = weights · y(first) + (1 - weights) · y(second), row by row.

    Args:
        first: name of each row's adapter, as `row_names` has it.
        second: of another one; None: the first alone.
        weights: (B,) of the first, in [1/2, 1].
    """

    first: list[str]
    second: list[str] | None = None
    weights: Tensor | None = None

    def repeated(self, rows: int) -> Rows:
        """For a batch in which each row stands several times in a row, as in beam search.

        Raises:
            ValueError: that does not give so many.
        """
        times, rest = divmod(rows, len(self.first))
        if rest or not times:
            raise ValueError(
                f"A batch of {rows} rows goes on from a KV cache whose {len(self.first)} prompts were routed. Start "
                "from the prompts: generate(input_ids=...) without past_key_values."
            )
        if times == 1:
            return self
        first = [name for name in self.first for _ in range(times)]
        second = None if self.second is None else [name for name in self.second for _ in range(times)]
        return Rows(first, second, None if self.weights is None else self.weights.repeat_interleave(times))


class Driver:
    """Hooks that route a base model's batches.

    Args:
        base: a transformers model with adapters injected into it; not a PeftModel.
        states: of the same model.
        choose: (B, D) features to the rows' adapters.

    Raises:
        ValueError: the adapters are of a kind whose layers take no `adapter_names`, or a router drives the model.
    """

    def __init__(self, base: Any, states: HiddenStates, choose: Callable[[Tensor], Rows]) -> None:
        for driver in [getattr(hook, "__self__", None) for hook in base._forward_pre_hooks.values()]:
            if isinstance(driver, Driver) and driver.is_over():
                driver.end()
            elif isinstance(driver, Driver):
                raise ValueError(
                    "Another router drives this model, and the rows would go its way: call its detach() first "
                    "(TaskRouter.of(model).detach() where it came with the model's folder)."
                )
        self.base, self.states, self.choose = base, states, choose
        self.rows: Rows | None = None  # of the forward that runs
        self.answer: dict[str, Any] | None = None  # what a running `generate` knows
        self.hooked: dict[int, nn.Module] = {}
        self.early = False  # an adapted module lies before the layer that is looked at
        self.watching: list[RemovableHandle] = []
        self.handles = [
            base.register_forward_pre_hook(self._enter, with_kwargs=True),
            base.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]
        self.generate: Any = base.generate if hasattr(base, "generate") else None
        if self.generate is not None:
            base.generate = self._generate
        try:
            self._hook_layers()
        except ValueError:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        if vars(self.base).get("generate") == self._generate:
            del self.base.generate

    def end(self) -> None:
        """Leave a base whose adapters are gone as it was before them: also without what a folder brought along."""
        self.remove()
        for name, child in list(self.base.named_children()):
            if getattr(child, "driver", None) is self:
                delattr(self.base, name)

    def is_over(self) -> bool:
        """Whether the adapters were unloaded from the base, or merged into it; others may have come since."""
        hooked = set(self.hooked.values())  # a copy of the model has other ids than the keys
        return bool(hooked) and hooked.isdisjoint(self.base.modules())

    def check(self, names: Iterable[str]) -> None:
        """Refuse, as a mixed batch does, the names of one task's rows beside modules that are trained in full.

        Raises:
            ValueError: there are both.
        """
        adapters = {name for layer in self.hooked.values() for name in getattr(layer, "r", ())}
        refuse_part_of_adapter(self.base, set(names) - adapters - {BASE_ADAPTER} if adapters else set())

    def names(self) -> set[str]:
        """What rows may be named here, beside the base."""
        found: set[str] = set()
        for layer in self.hooked.values():
            if isinstance(layer, AdapterLinear):
                found.update(layer.row_names())
            elif isinstance(layer, BaseTunerLayer):
                found.update(layer._all_available_adapter_names())
        return found

    def _hook_layers(self) -> None:
        """Also the layers of adapters that were loaded after the last time."""
        wrapped: list[Any] = [
            m for m in self.base.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]
        new = [m for m in wrapped if id(m) not in self.hooked]
        for layer in new:
            if not hasattr(layer, "_mixed_batch_forward"):
                raise ValueError(
                    f"{type(layer).__name__} layers take no adapter for each row of a batch (PEFT: adapter_names), so "
                    "no router can drive them. Use LoRA or an adapter of peft_mora, or one prompt at a time: "
                    "model.set_adapter(router.route([prompt]).names[0])."
                )
            self.hooked[id(layer)] = layer
            self.handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self._after))
        if new:
            late = [m for block in self.states.blocks[self.states.layers[-1] :] for m in block.modules()]
            head = output_head(self.base)
            behind = {id(m) for m in (*late, *(head.modules() if head is not None else ()))}
            self.early = any(key not in behind for key in self.hooked)

    # A forward of the base

    def _enter(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.states.looking:
            return
        self.rows = None
        known = None if self.answer is None else self.answer.get("rows")
        if known is None and self.is_over():
            self.end()
            return
        if base.training:
            raise ValueError(
                "A TaskRouter is attached and the model is in training mode, where a batch cannot mix rows of several "
                "adapters and of none. Call model.eval() to use it, or router.detach() to train."
            )
        if any(getattr(layer, "disable_adapters", False) for layer in self.hooked.values()):
            return
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        embeds: Any = kwargs.get("inputs_embeds")
        batch, length = (ids if ids is not None else embeds).shape[:2]
        cache = kwargs.get("past_key_values")
        if known is None and cache is not None and cache.get_seq_length() > 0:
            known = getattr(cache, MARK, None)
            if known is None:
                raise ValueError(
                    "A forward goes on from a KV cache that no router has seen, so the adapter of its prompts is not "
                    "known. Start from the prompts, or call router.detach()."
                )
        if known is not None:
            self.rows = known.repeated(batch)
            return
        if not length:
            raise ValueError("The batch has no tokens: there is nothing to route its rows by.")
        self._hook_layers()
        mask = self._mask(kwargs, batch, length)
        counted = mask
        if counted is None:
            padding = getattr(self.base.config, "pad_token_id", None)
            counted = torch.ones(batch, length) if ids is None else real_tokens(ids, [padding])
        if self.early:
            inputs = {"input_ids": ids, "inputs_embeds": embeds, "attention_mask": mask}
            with adapters_off(self.base):
                states = self.states.of({**inputs, "position_ids": kwargs.get("position_ids")})
            self._decide(states, counted)
        else:  # the features are on the way, before the first adapter
            self.watching = self.states.watch(lambda states: self._decide(states, counted))

    def _mask(self, kwargs: dict, batch: int, length: int) -> Tensor | None:
        """(B, S) of the forward, or where that is made for a static cache, of the answer's prompts; None: neither."""
        asked = None if self.answer is None else self.answer.get("attention_mask")
        for mask in (kwargs.get("attention_mask"), asked):
            if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length and batch % len(mask) == 0:
                return mask.repeat_interleave(batch // len(mask), dim=0)  # beams and samples stand side by side
        return None

    def _decide(self, states: Sequence[Tensor], counted: Tensor) -> None:
        with torch.no_grad():
            self.rows = self.choose(pooled(states, counted))
        if self.answer is not None:
            self.answer["rows"] = self.rows

    def _leave(self, base: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.states.looking:
            return
        while self.watching:
            self.watching.pop().remove()
        cache = kwargs.get("past_key_values")
        cache = cache if cache is not None else getattr(output, "past_key_values", None)
        if cache is not None and self.rows is not None and not isinstance(cache, tuple):
            setattr(cache, MARK, self.rows)
        self.rows = None

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        before, self.answer = self.answer, {"attention_mask": kwargs.get("attention_mask")}
        try:
            return self.generate(*args, **kwargs)
        finally:
            self.answer = before

    # A forward of one of its layers

    def _before(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        rows = self.rows
        if rows is None or "adapter_names" in kwargs:
            return None
        if rows.second is None:
            return args, {**kwargs, "adapter_names": rows.first}
        if any("adapter_names" in getattr(hook, "keywords", ()) for hook in layer._forward_pre_hooks.values()):
            return None  # PEFT's, behind this one: names that are given by hand
        x, *rest = args
        return (torch.cat([x, x]), *rest), {**kwargs, "adapter_names": rows.first + rows.second}

    def _after(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        rows = self.rows
        if rows is None or rows.second is None or rows.weights is None or len(output) != 2 * len(rows.first):
            return None
        first, second = output.chunk(2)
        w = rows.weights.to(output.device, torch.float32).view(-1, *[1] * (output.dim() - 1))
        return (w * first.float() + (1 - w) * second.float()).to(output.dtype)
