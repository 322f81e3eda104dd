"""What goes into modules: which tokens are real, a model in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def real_rows(x: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """(T, I) rows of an input (B, S, I) or (B·S, I) of module `name` whose token is no padding by `mask` (B, S).

    Raises:
        ValueError: the tokens are not those of the mask.
    """
    if mask is None:
        return x.reshape(-1, x.shape[-1])
    if x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        raise ValueError(
            f"Cannot tell which tokens are padding in {name!r}, whose inputs have shape {tuple(x.shape)} while the "
            f"attention mask has {tuple(mask.shape)}. Leave such modules (experts of a mixture, vision towers) out of "
            "`target_modules`."
        )
    return x.reshape(-1, x.shape[-1])[mask.reshape(-1).to(x.device, torch.bool)]


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
