"""A budget of active experts: anneal K to it, divide it between layers, and see which experts work."""

from __future__ import annotations

import base64
import math
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from peft_mora import expert_usage, prune_experts
from peft_mora.checks import check_field, is_int, is_number
from peft_mora.routed import routed_layers, set_top_k
from peft_mora.usage import UsageMeter

from .host import HostCallback, keep_stopped, output_folder
from .usage_report import print_table, write_csv, write_heat_map


Schedule = Literal["cosine", "linear", "constant"]
DEAD = 0.01  # an expert that acts for less of the tokens is called dead, unless `prune_below` says otherwise


def annealed(start: float, target: float, progress: float, schedule: Schedule) -> float:
    """Mean active experts at `progress` (0..1, more is 1) of the way from start to target."""
    progress = min(1.0, progress)
    if schedule == "constant" or progress == 1:
        return target
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return target + (start - target) * left


def divide(total: int, limits: Sequence[int], needs: Sequence[float]) -> list[int]:
    """Integers k with 1 <= k_l <= limits_l that sum to `total`, as near to proportional to `needs` as that allows.

    Example:
        >>> divide(10, [8, 8, 8, 8], [1, 1, 2, 1])
        [2, 2, 4, 2]

    Raises:
        ValueError: `total` is not between the number of layers and the sum of their limits.
    """
    if not len(limits) <= total <= sum(limits):
        raise ValueError(f"Cannot divide {total} experts over {len(limits)} layers that take 1 to {list(limits)}.")
    low, high = 0.0, max((limit / need for limit, need in zip(limits, needs, strict=True)), default=0.0)
    for _ in range(100):  # the scale at which the clipped shares sum to the total
        scale = (low + high) / 2
        shares = [min(max(scale * need, 1.0), float(limit)) for need, limit in zip(needs, limits, strict=True)]
        low, high = (scale, high) if sum(shares) < total else (low, scale)
    ks = [math.floor(share + 1e-9) for share in shares] if limits else []
    # Largest remainder; equal ones are spread over the depth of the model (golden ratio), not piled up in its front.
    order = sorted(range(len(ks)), key=lambda i: (-round(shares[i] - ks[i], 6), i * 0.6180339887 % 1))
    for i in (order * 2)[: max(0, total - sum(ks)) + len(ks)]:
        if sum(ks) == total:
            break
        ks[i] += ks[i] < limits[i]
    return ks


class ActivationBudgetCallback(HostCallback, ExportableState):
    """Hold a MORA ("task", "bank"), FLYLORA or SMORA adapter to a mean number of active experts a token and a layer.

    *Active experts a token* of one layer is how many of its experts have a weight other than 0: `top_k` for FLYLORA
    and MORA's "bank"; for "task" min(K, size) summed over **all** blocks, the frozen ones of earlier tasks too. A
    frozen block keeps the K that it was trained with, so that an earlier task's routing never changes: the budget is
    spent on the block in training, and a target that leaves it less than one expert a layer is refused.

    The total over all layers, round(mean · layers), is held exactly at every step; K of a layer is an integer in 1..r,
    written to the config's `top_k_pattern`, so that a loaded adapter has it. K moves from `start` to `target` over the
    first `until` of the run and stays there. With `rebalance` the total is divided anew every `interval` steps in
    proportion to each layer's need: exp of the mean entropy of a token's routing weights before the choice, which is
    how many experts it would spread over (MORA: the softmax over all experts; FLYLORA: |h| / Σ|h|; SMORA: p / Σ p).
    Without it, layers keep the proportions that they came with.

    Counters run during training forwards only, and see no padding. Every logging step the trainer's logs get, over
    the tokens since the last one: `active_experts` (mean of the layers), `usage_entropy` (of the experts' shares, over
    log R, mean of the layers; 1 is all alike), `dead_experts` (share of experts under `prune_below`, or 0.01). At the
    end, `expert_usage.csv` and `expert_usage.png` (needs matplotlib) appear in `output_dir`, over the tokens since the
    target was reached (of the whole run, where that was its last step), and `peft_mora.expert_usage(model)` returns
    the same numbers.

    A run that resumes from a checkpoint repeats the unbroken one: needs and counts are in a file of its folder,
    `activation_budget-ADAPTER.safetensors`.

    Args:
        target: mean active experts a token and a layer; may be a fraction.
        start: the same at the first step. None is what the adapter has.
        schedule: "cosine", "linear", or "constant" for the target from the first step on.
        interval: steps between two divisions with `rebalance`, >= 1.
        rebalance: divide the total by measured need.
        prune_below: at the end, delete experts (not FLYLORA's) whose usage is below; see `peft_mora.prune_experts`.
        until: share of the run that the way to the target takes, in (0, 1].
        adapter_name: which adapter.

    Raises:
        ValueError: on construction for a wrong argument; at the start of training for an adapter without routing, a
            target or start that it cannot have, or `prune_below` where pruning is not possible; at the end when the
            run was stopped before the target was reached.

    Example:
        >>> callback = ActivationBudgetCallback(4, start=16, rebalance=True, prune_below=0.01)
        >>> SFTTrainer(..., peft_config=MoraConfig(r=16, target_modules="all-linear"), callbacks=[callback])
    """

    def __init__(
        self,
        target: float,
        *,
        start: float | None = None,
        schedule: Schedule = "cosine",
        interval: int = 50,
        rebalance: bool = False,
        prune_below: float | None = None,
        until: float = 0.5,
        adapter_name: str = "default",
    ) -> None:
        check_field(is_number(target) and target >= 1, "target", target, "a number >= 1")
        check_field(start is None or (is_number(start) and start >= 1), "start", start, "a number >= 1, or None")
        check_field(schedule in get_args(Schedule), "schedule", schedule, "'cosine', 'linear' or 'constant'")
        check_field(
            start is None or schedule != "constant", "start", start, "None with schedule='constant', which has no way"
        )
        check_field(is_int(interval) and interval >= 1, "interval", interval, "an integer >= 1")
        check_field(isinstance(rebalance, bool), "rebalance", rebalance, "True or False")
        check_field(
            prune_below is None or (is_number(prune_below) and 0 < prune_below <= 1),
            "prune_below",
            prune_below,
            "a number in (0, 1], or None",
        )
        check_field(is_number(until) and 0 < until <= 1, "until", until, "a number in (0, 1]")
        check_field(isinstance(adapter_name, str), "adapter_name", adapter_name, "an adapter's name")
        self.target, self.start, self.schedule, self.interval = target, start, schedule, interval
        self.rebalance, self.prune_below, self.until = rebalance, prune_below, until
        self.replaces_weights = prune_below is not None
        self.adapter_name = adapter_name
        self.sidecar = f"activation_budget-{adapter_name.replace('/', '_')}.safetensors"
        self._meter: UsageMeter | None = None
        self._limits: dict[str, int] = {}
        self._saved: dict[str, Any] | None = None  # what an older checkpoint's trainer_state.json has

    def refusals(self) -> dict[str, str]:
        found = {
            "data_parallel": "Experts cannot be counted under DataParallel, whose threads share one model. Start the "
            "script with `accelerate launch` or `torchrun`, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        }
        if self.prune_below is not None:
            pieces = (
                "`prune_below` replaces parameters, which DeepSpeed and FSDP hold in pieces. Leave it out, and call "
                "peft_mora.prune_experts on the saved adapter."
            )
            found |= {"deepspeed": pieces, "fsdp": pieces}
        return found

    def state(self) -> dict[str, Any]:
        """The arguments, for a trainer with `restore_callback_states_from_checkpoint`."""
        arguments = ("target", "start", "schedule", "interval", "rebalance", "prune_below", "until", "adapter_name")
        return {"args": {name: getattr(self, name) for name in arguments}, "attributes": {}}

    def kept(self) -> dict[str, Tensor]:
        meter = self._meter
        if meter is None:
            return {}
        counts = torch.stack([meter.hits, meter.begin, self._logged])
        return {
            **{f"counts.{name}": counts[:, place] for name, place in meter.places.items()},  # (3, R + 1) int64
            "entropy": meter.entropy,
            "needs": torch.tensor(self._needs, dtype=torch.float64),
            "begin_mean": torch.tensor(self._begin_mean, dtype=torch.float64),
        }

    def _restore(self, kept: dict[str, Tensor], meter: UsageMeter) -> None:
        counts = {name.removeprefix("counts."): t for name, t in kept.items() if name.startswith("counts.")}
        sizes = {name: place.stop - place.start for name, place in meter.places.items()}
        if sizes != {name: t.shape[1] for name, t in counts.items()}:
            raise ValueError(
                "The checkpoint's expert counts are of an adapter with other modules or other numbers of experts. "
                "Resume with the adapter that the run began with."
            )
        self._begin_mean, self._needs = kept["begin_mean"].item(), kept["needs"].tolist()
        rows = torch.cat([counts[name] for name in meter.places], dim=1).to(meter.hits.device)
        meter.hits, meter.begin, self._logged = (row.clone() for row in rows)
        meter.entropy.copy_(kept["entropy"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        layers = routed_layers(model, self.adapter_name)
        refusal = next((layer.prune_refusal for layer in layers.values() if layer.prune_refusal), "")
        if self.prune_below is not None and refusal:
            raise ValueError(f"`prune_below` cannot be had here: {refusal} Leave it out.")
        self._fixed = sum(layer.fixed_experts(self.adapter_name) for layer in layers.values())
        limits = {name: layer.choices(self.adapter_name) for name, layer in layers.items()}
        before, self._limits = self._limits, {name: limit for name, limit in limits.items() if limit > 0}
        self._layers = len(layers)
        unfinished, self._meter = self._meter, None
        current = {name: min(layers[name].top_k(self.adapter_name), limit) for name, limit in self._limits.items()}
        # The trainer begins anew, with a smaller batch, where memory has run out: K is on this very run's way down.
        if unfinished is None or before != self._limits or list(unfinished.layers.values()) != list(layers.values()):
            self._needs = [float(k) for k in current.values()]
            self._begin_mean = self.start or (self._fixed + sum(current.values())) / self._layers
        meter = UsageMeter(model, self.adapter_name, training_only=True)
        self._logged = meter.hits.clone()
        try:
            if state.global_step > 0:
                self._resume(args, state, meter)
            for name, mean in (("target", self.target), ("start", self._begin_mean)):
                self._check_mean(name, mean)
        except ValueError:
            meter.close()
            raise
        self._meter = meter
        if 0 < self._settled(state) <= state.global_step and not meter.begin.any():
            meter.mark()  # a run that resumes with fewer steps, at its target already
        self._set(model, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        meter = self._meter
        assert meter is not None
        meter.sync()
        if state.global_step == self._settled(state):
            meter.mark()
        if self.rebalance and state.global_step % self.interval == 0:
            self._measure_needs(meter)
        self._set(model, state)

    def metrics(self) -> dict[str, float]:
        if self._meter is None:
            return {}
        window = self._meter.hits - self._logged
        self._logged = self._meter.hits.clone()
        shares = [share for share in self._meter.shares(window).values() if len(share) and not share.isnan().any()]
        return usage_metrics(shares, self.prune_below or DEAD) if shares else {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        meter, self._meter = self._meter, None
        if meter is None:
            return
        meter.close()
        self._saved = None
        if not meter.hits.any():  # no step was taken
            return
        if state.global_step < (settled := self._settled(state)):
            kept = keep_stopped(model, args, state)
            raise ValueError(
                f"The run was stopped at step {state.global_step}, before the budget reached its target at {settled}: "
                f"K is still on its way from {self._begin_mean:g} to {self.target:g}. The adapter is kept as it is in "
                f"{kept}. Resume from a checkpoint, or train with a smaller `until`."
            )
        if torch.equal(meter.hits, meter.begin):  # the target was reached at the last step
            meter.begin = torch.zeros_like(meter.hits)
        shares = meter.shares(meter.hits - meter.begin)
        if idle := [name for name, share in shares.items() if share.isnan().any()]:
            kept = keep_stopped(model, args, state)
            raise ValueError(
                f"No token came through {len(idle)} of {len(shares)} modules, e.g. {idle[0]!r} (a vision tower, where "
                f"no batch has images), so how their experts are used is not known. The adapter is kept as it is in "
                f"{kept}. Leave such modules out of `target_modules`."
            )
        usage = expert_usage(model, self.adapter_name)
        top_k = {name: layer.top_k(self.adapter_name) for name, layer in meter.layers.items()}
        if state.is_world_process_zero:
            folder = output_folder(args)
            folder.mkdir(parents=True, exist_ok=True)
            written = [write_csv(folder / "expert_usage.csv", usage, top_k)]
            written += write_heat_map(folder / "expert_usage.png", usage)
            print_table(usage, top_k, self.prune_below or DEAD)
            print(f"expert usage written to {' and '.join(map(str, written))}")
        if self.prune_below is not None:
            one = {k: v[:1] for k, v in (meter.last_inputs or {}).items() if isinstance(v, Tensor)}  # logits are large
            summary = prune_experts(model, self.prune_below, self.adapter_name, inputs=one or None)
            meter.last_inputs = None
            if state.is_world_process_zero:
                print(f"{summary} (the inputs: a sequence of the last batch)")

    def saved(self, args: TrainingArguments, state: TrainerState) -> dict[str, Tensor] | None:
        """`kept` of the checkpoint's file; an older checkpoint has it in its trainer_state.json."""
        kept = super().saved(args, state)
        if kept is not None:
            return kept
        stored: Any = state.stateful_callbacks or {}
        entries = stored.get(type(self).__name__, [])
        old = self._saved
        for entry in entries if isinstance(entries, list) else [entries]:
            if entry["args"]["adapter_name"] == self.adapter_name:
                old = entry["attributes"].get("_saved")  # of several the last: the trainer appends
        return _unpacked(old) if old is not None else None

    def _resume(self, args: TrainingArguments, state: TrainerState, meter: UsageMeter) -> None:
        """Go on as the checkpoint has it, or without its file where K and the weights do not depend on that.

        Raises:
            ValueError: it lacks the file that they depend on, or is of a run without a budget.
        """
        budgeted = type(self).__name__ in (state.stateful_callbacks or {})
        known = self.start or self.schedule == "constant"
        by_counts = self.rebalance or self.prune_below is not None
        find = self.saved if budgeted and known and not by_counts else self.saved_here
        kept = find(args, state)
        if kept is not None:
            self._restore(kept, meter)
        else:
            step = state.global_step
            warnings.warn(f"The checkpoint has no {self.sidecar}: usage is counted from step {step} on.", stacklevel=3)

    def _check_mean(self, name: str, mean: float) -> None:
        least, most = self._fixed + len(self._limits), self._fixed + sum(self._limits.values())
        if not least <= _total(mean, self._layers) <= most:
            frozen = f" (frozen blocks alone wake {self._fixed / self._layers:g})" if self._fixed else ""
            raise ValueError(
                f"`{name}` is {mean:g} active experts a token and a layer, but this adapter can have "
                f"{least / self._layers:g} to {most / self._layers:g}{frozen}. Choose a number in between."
            )

    def _settled(self, state: TrainerState) -> int:
        """The step at which the target is reached."""
        there = self.schedule == "constant" or self._begin_mean == self.target
        return 0 if there else math.ceil(self.until * state.max_steps)

    def _set(self, model: Any, state: TrainerState) -> None:
        settled = self._settled(state)
        progress = state.global_step / settled if settled else 1.0
        mean = annealed(self._begin_mean, self.target, progress, self.schedule)
        if self.rebalance and self._meter is not None:  # some eight steps an interval tell the need well enough
            self._meter.need = state.global_step % max(1, self.interval // 8) == 0
        ks = divide(_total(mean, self._layers) - self._fixed, list(self._limits.values()), self._needs)
        set_top_k(model, dict(zip(self._limits, ks, strict=True)), self.adapter_name)

    def _measure_needs(self, meter: UsageMeter) -> None:
        nats, tokens = meter.entropy.double().cpu().unbind(-1)
        meter.entropy.zero_()
        measured = dict(zip(meter.places, (nats / tokens).exp().tolist(), strict=True))
        if all(math.isfinite(measured[name]) for name in self._limits):  # each of the layers has seen a token
            self._needs = [measured[name] for name in self._limits]


def usage_metrics(shares: Sequence[Tensor], dead_below: float) -> dict[str, float]:
    """Three numbers for the logs, from each layer's (R,) usage shares; see `ActivationBudgetCallback`."""
    entropies = []
    for share in shares:
        p = share / share.sum().clamp_min(1e-12)
        entropy = torch.special.entr(p).sum().item()
        entropies.append(min(1.0, entropy / math.log(len(share))) if len(share) > 1 else 1.0)
    every = torch.cat(list(shares))
    return {
        "active_experts": sum(share.sum().item() for share in shares) / len(shares),
        "usage_entropy": sum(entropies) / len(entropies),
        "dead_experts": (every < dead_below).float().mean().item(),
    }


def _total(mean: float, layers: int) -> int:
    return math.floor(mean * layers + 0.5)


def _unpacked(old: dict[str, Any]) -> dict[str, Tensor]:
    """What older checkpoints have in trainer_state.json, as `ActivationBudgetCallback.kept` has it."""

    def array(name: str, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(old[name]))), dtype=dtype)

    sizes = [experts + 1 for experts in old["modules"].values()]
    counts = array("counts", torch.int64).view(3, -1).split(sizes, dim=1)
    return {
        **{f"counts.{name}": rows for name, rows in zip(old["modules"], counts, strict=True)},
        "entropy": array("entropy", torch.float32).view(-1, 2),
        "needs": torch.tensor(old["needs"], dtype=torch.float64),
        "begin_mean": torch.tensor(old["begin_mean"], dtype=torch.float64),
    }
