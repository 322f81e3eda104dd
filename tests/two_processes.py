"""What two gloo processes do for test_citizen.py: every method under DDP and FSDP2, against one process;
usage counts and load-balance offsets are those of both."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import helpers
import torch
import torch.distributed as dist
from helpers import METHODS, gradients
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_mora import expert_usage
from peft_mora.usage import UsageMeter


def adapted(method: str) -> PeftModel:
    model = helpers.adapted(method, target_modules=["q_proj", "down_proj"])
    model.add_adapter("idle", METHODS[method](target_modules=["k_proj"]))  # frozen: no part of any reduction
    return model.train()


def batch(rank: int) -> torch.Tensor:
    return torch.randint(4, 24, (2, 7), generator=torch.Generator().manual_seed(rank))


def expected(method: str) -> dict[str, torch.Tensor]:
    """Mean over the two ranks' batches, in one process."""
    with alone():
        parts = [gradients(adapted(method), batch(rank)) for rank in range(2)]
    return {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}


@contextmanager
def alone():
    """What each rank runs at its own pace."""
    reduce, dist.all_reduce = dist.all_reduce, lambda counts: None
    try:
        yield
    finally:
        dist.all_reduce = reduce


def compare(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> str:
    if got.keys() != want.keys():
        return f"gradients of {sorted(got.keys() ^ want.keys())}"
    worst = max((got[name] - want[name]).abs().max().item() for name in want)
    return "ok" if worst < 1e-5 else f"gradients differ by {worst}"


def under_ddp(method: str, rank: int) -> str:
    model = adapted(method)
    # Experts that no token woke are rows of a parameter, not parameters: nothing is unused.
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    got = gradients(wrapped, batch(rank))
    one, together = adapted(method), torch.cat([batch(0), batch(1)])
    routed = [] if METHODS[method].merges else [model, one]
    meters = [UsageMeter(m, training_only=True, need=True) for m in routed]
    wrapped(input_ids=batch(rank), labels=batch(rank)).loss.backward()
    for meter in meters[:1] * 2:  # the second time there is nothing new
        meter.sync()
    with alone():
        one(input_ids=together, labels=together).loss.backward()
        for meter in meters[1:]:
            meter.sync()
    if meters:
        (hits, entropy), (want, whole) = ((meter.hits, meter.entropy) for meter in meters)
        same = torch.equal(hits, want) and torch.allclose(entropy, whole, rtol=1e-5, atol=1e-4)
        usage, shares = expert_usage(model), expert_usage(one)
        if not (same and all(torch.equal(usage[name], share) and share.any() for name, share in shares.items())):
            return "experts are not counted over both batches together"
    for (name, offset), (_, want) in zip(model.named_buffers(), one.named_buffers(), strict=True):
        if "_offset.default" in name and not (torch.equal(offset, want) and offset.any()):
            return "the load-balance offset is not that of both batches together"
    return compare({name.removeprefix("module."): g for name, g in got.items()}, expected(method))


def under_fsdp2(method: str, rank: int) -> str:
    model, want = adapted(method), expected(method)
    reference = {key: value.clone() for key, value in model.state_dict().items()}
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    got = {name: grad.full_tensor() for name, grad in gradients(model, batch(rank)).items()}
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    for key, value in state.items():  # rank 0 has the whole of it, the others as well without cpu_offload
        if "offset" not in key and not torch.equal(value, reference[key]):
            return f"{key} is not what it was before sharding"
    return compare(got, want)


def main(rank: int, folder: str) -> None:
    results = {}
    for method in METHODS:
        for check in (under_ddp, under_fsdp2):
            try:
                results[f"{check.__name__}/{method}"] = check(method, rank)
            except Exception as error:
                results[f"{check.__name__}/{method}"] = f"{type(error).__name__}: {error}"
            dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
