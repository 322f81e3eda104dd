"""What a frozen base model makes of a prompt: the mean over its tokens of the hidden state after one layer or two.

    φ(prompt) = [ĥ_l for l in layers] / √|layers|      h_l = mean over real tokens t of ĥ_l,t      ĥ = h / |h|
Each token counts with the same length: in many models the first one is a hundred times as long as all others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.hooks import RemovableHandle

from .checks import check_field, is_int
from .inputs import positions, removed_after, towers, with_field


class _Enough(Exception):
    """The layers that were asked for have run."""


class HiddenStates:
    """The hidden states of a decoder after some of its layers.

    Args:
        base: a transformers model without an encoder, or with adapters injected into it; not a PeftModel.
        layers: counted from 1; the state after layer 8 has gone through 8 of them.

    Raises:
        ValueError: the model has an encoder and a decoder, no list of layers, or fewer layers.
    """

    def __init__(self, base: Any, layers: Sequence[int]) -> None:
        if getattr(base.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(base).__name__} has an encoder and a decoder; a TaskRouter reads the layers of a decoder. "
                "Choose the adapter by hand: model(..., adapter_names=[...])."
            )
        self.stack: Any = base.get_decoder() if hasattr(base, "get_decoder") else None
        self.stack = self.stack or getattr(base, base.base_model_prefix, base)
        self.blocks = decoder_layers(base)
        ok = bool(layers) and all(is_int(layer) and 1 <= layer <= len(self.blocks) for layer in layers)
        check_field(
            ok, "layers", list(layers), f"layers from 1 to {len(self.blocks)}, which is all that the model has"
        )
        self.layers = sorted(set(layers))
        self.looking = False  # whether `of` runs, for hooks of the model that are for other forwards

    def watch(self, done: Callable[[list[Tensor]], None]) -> list[RemovableHandle]:
        """Call done([(B, S, I)] * len(layers)) in every forward, once the last of the layers has run; until the hooks
        are removed."""
        found: list[Tensor] = []

        def see(layer: int, module: nn.Module, args: tuple, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            if layer == self.layers[-1]:
                states, found[:] = list(found), []
                done(states)

        return [self.blocks[n - 1].register_forward_hook(partial(see, n)) for n in self.layers]

    @torch.no_grad()
    def of(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Run the model on `input_ids` or `inputs_embeds`, `attention_mask`, `position_ids` up to the last of the
        layers and no further; without a cache and without what is behind the layers."""
        states: list[Tensor] = []

        def enough(found: list[Tensor]) -> None:
            states.extend(found)
            raise _Enough

        accepted = inspect.signature(self.stack.forward).parameters
        given = {name: value for name, value in {**inputs, "use_cache": False}.items() if value is not None}
        mask = given.get("attention_mask")
        if mask is not None and "position_ids" not in given:
            given["position_ids"] = positions(mask)
        self.looking = True
        with removed_after(self.watch(enough)):
            try:
                self.stack(**{name: value for name, value in given.items() if name in accepted})
            except _Enough:
                return states
            finally:
                self.looking = False
        raise RuntimeError(f"A forward of {type(self.stack).__name__} did not go through its layers {self.layers}.")


def decoder_layers(base: Any) -> nn.ModuleList:
    """The list of a transformers model's layers.

    Raises:
        ValueError: none has as many as the config says.
    """
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    depth = getattr(config, "num_hidden_layers", None)
    beside = towers(base)  # of images, which may have as many
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and module not in beside:
            return module
    raise ValueError(
        f"{type(base).__name__} has no list of {depth} layers, which its config speaks of. Give a TaskRouter features "
        "of your own, (prompts, dimensions) tensors, instead of prompts."
    )


def pooled(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """φ of each row: (B, len(states)·I) float32 on the CPU, of norm 1.

    Args:
        states: (B, S, I) after each layer, any float dtype. mask: (B, S), 0 where a token does not count.
    """
    parts = []
    for h in states:  # of a model that is spread over several devices each on its own
        counts = mask.to(h.device, torch.float32)[..., None]
        parts.append(normalize((normalize(h.float(), dim=-1) * counts).sum(dim=1), dim=-1).cpu())
    return torch.cat(parts, dim=-1) / len(parts) ** 0.5


def real_tokens(ids: Tensor, padding: Sequence[int | None]) -> Tensor:
    """(B, S) 1 or 0, where nothing says which tokens are real: what a row ends in of token 0 and of `padding` is none.

    lm-eval pads with 0 on the right and gives no mask. A text that really ends so loses one kind of token to count.
    """
    other = torch.ones_like(ids, dtype=torch.bool)
    for token in {0, *(token for token in padding if token is not None)}:
        other &= ids != token
    other[:, 0] = True
    return other.flip(-1).cumsum(-1).flip(-1).clamp_max(1)


@contextmanager
def adapters_off(base: nn.Module) -> Iterator[None]:
    """The base alone for the length of a block, whatever wraps it; who trains stays as it is.

    Raises:
        ValueError: an adapter is merged into the base's weights.
    """
    layers: list[Any] = [m for m in base.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(
            "An adapter is merged into the base, whose features a TaskRouter needs: model.unmerge_adapter() first."
        )
    with with_field(layers, "_disable_adapters", True):
        yield
