"""Penalties on a plain low-rank update while it is learnt, and what goes with them: masks, modules left out.

    "lorasculpt"  λ · mean ‖M ∘ (B·A)‖_F, M large where |W| is; A and B keep their largest entries from a step on
    "alignguard"  λ_A Σ_i f_i ‖ΔW v_i‖² + λ_T ‖δ_T‖² + λ_C Σ η |δ_A| |δ_T|, with δ_A = ΔW V Vᵀ, δ_T = ΔW - δ_A
    "coto"        no penalty: in each step a module's adapter acts with a probability that rises to 1

A loss that a model adds to its own does not reach SFTTrainer's. So the penalty's gradient is what the parameters'
`grad` holds when a step begins: the step's backwards add to it, and clipping and the optimizer see the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_mora import use_exact_4bit_kernels
from peft_mora.base import AdapterLinear
from peft_mora.checks import check_field, is_int, is_number
from peft_mora.inputs import base_of, device_of, eval_mode, real_rows, removed_after, writes_text
from peft_mora.linalg import shrink_sketch, spectrum
from peft_mora.routing import at_least_float32

from .constraint import averages
from .factors import Factors, are_those, base_weight, static_factors
from .general_text import Batch, read, sample
from .host import HostCallback, StepInPlace, callbacks_that, keep_stopped


# Tensors in, tensors out


def weight_importance(W: Tensor, omega: float = 1.0) -> Tensor:
    """M = tanh(ω |1 / ln(|W| / ‖W‖_F + 1e-15)|): near 0 for small weights, larger for large ones.

    Args:
        W: (O, I) float, a base's weight; not all 0.
        omega: ω > 0, how steep.

    Returns:
        (O, I) in [0, 1], same dtype.
    """
    return torch.tanh(omega / (W.abs() / W.norm() + 1e-15).log().abs())


def conflict(A: Tensor, B: Tensor, M: Tensor) -> Tensor:
    """‖M ∘ (B·A)‖_F: how much of an update lies where M is large (LoRASculpt, arXiv 2503.16843).

    Args:
        A: (r, I). B: (O, r). M: (O, I). One float dtype.

    Returns:
        A scalar; at B·A = 0 its gradient is 0.
    """
    return torch.linalg.vector_norm(M * (B @ A))


def largest(weight: Tensor, keep: float) -> Tensor:
    """Bool of `weight`'s shape, True at its int(keep · numel), at least one, entries of the largest magnitude."""
    kept = weight.abs().flatten().topk(max(1, int(keep * weight.numel()))).indices
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    return mask.index_fill_(0, kept, True).view_as(weight)


def split_penalty(
    delta: Tensor,
    V: Tensor,
    shares: Tensor,
    weights: tuple[float, float, float],
    beta: float = 1.0,
    tau: float = 0.0,
) -> Tensor:
    """Keep an update small where aligned behaviour is sensitive, small elsewhere, and the two parts apart.

    With δ_A = ΔW V Vᵀ and δ_T = ΔW - δ_A:
        λ_A Σ_i f_i ‖ΔW v_i‖² + λ_T ‖δ_T‖² + λ_C Σ_ij (1 + β σ(|ΔW_ij| - τ)) |δ_A|_ij |δ_T|_ij
    AlignGuard-LoRA (arXiv 2508.02079), reconstructed from second-hand formulas. Its geodesic term, the squared cosine
    of δ_A and δ_T, is 0 for parts that a projection splits, and is left out.

    Args:
        delta: ΔW (O, I), any float dtype.
        V: (I, k) orthonormal: directions of the input that aligned behaviour depends on most.
        shares: (k,) f, the Fisher information in each of them.
        weights: λ_A, λ_T, λ_C.
        beta, tau: how much more a large entry counts in the collision, and from which size on.

    Returns:
        A scalar.
    """
    inside = delta @ V  # (O, k)
    aligned = inside @ V.T
    rest = delta - aligned
    overlap = (1 + beta * torch.sigmoid(delta.abs() - tau)) * aligned.abs() * rest.abs()
    alignment, task, collision = weights
    return alignment * (shares * inside.square()).sum() + task * rest.square().sum() + collision * overlap.sum()


def active_share(step: int, steps: int, until: float = 0.75, start: float = 0.0) -> float:
    """The probability that a module's adapter acts in a step: from `start` to 1 in a line over the first
    ceil(until · steps) steps, then 1 (CoTo, arXiv 2506.05713)."""
    return min(1.0, start + (1 - start) * step / math.ceil(until * steps))


def draw_active(count: int, share: float, seed: int) -> list[bool]:
    """Which of `count` modules act: each with probability `share`, but at least one. The same for the same seed."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return (drawn < share).index_fill(0, drawn.argmin(), True).tolist()


def fisher_rows(x: Tensor, grad: Tensor) -> Tensor:
    """Rows R with RᵀR = GᵀG, for the gradient G = gradᵀ·x (O, I) of a weight by one sample, without forming G.

    Args:
        x: (T, I) what went into the module. grad: (T, O) of its output. One float dtype.

    Returns:
        (T, I).
    """
    values, vectors = spectrum(grad @ grad.T)
    return (vectors * values.sqrt()).T @ x


# The rules: when, and of what


@dataclass
class Run:
    """What a rule may look at."""

    model: Any
    adapter_name: str
    factors: dict[str, Factors]
    tokenizer: Any
    steps: int
    seed: int
    again: bool  # the trainer begins anew where memory has run out, with the weights as they are


class Rule:
    """One method. Its fields are what the callback takes as options."""

    name: ClassVar[str]

    def refusals(self) -> dict[str, str]:
        return {}

    def begin(self, run: Run, kept: Mapping[str, Tensor] | None) -> None:
        """Before the first step; `kept` is what `state` gave for the checkpoint that the run resumes from."""

    def penalty(self, name: str, A: Tensor, B: Tensor, pair: Factors, scaling: float) -> Tensor | None:
        """Of one module's A and B, float32 or wider; the callback takes the mean of all modules'."""
        return None

    def step_begins(self, run: Run, step: int) -> None:
        """Once for each of the optimizer's steps, from within an event of the trainer's."""

    def stepped(self, run: Run, optimizer: Any) -> None:
        """Right after the optimizer's step."""

    def step_ends(self, run: Run, step: int) -> None: ...

    def end(self, run: Run, step: int) -> str:
        """What is missing for the rule to have done its work, as half a sentence; "" for nothing."""
        return ""

    def keeps(self, step: int) -> bool:
        """Whether a checkpoint of this step must have what `state` gives."""
        return False

    def state(self) -> dict[str, Tensor]:
        return {}

    def metrics(self) -> dict[str, float]:
        return {}


@dataclass
class LoRASculpt(Rule):
    """Sparse A and B, and a penalty on updates of the base's large weights (LoRASculpt, arXiv 2503.16843)."""

    name: ClassVar[str] = "lorasculpt"

    weight: float = 1e-3
    keep: float = 0.1
    at: int | None = 100
    omega: float = 1.0

    def __post_init__(self) -> None:
        check_field(is_number(self.weight) and self.weight >= 0, "weight", self.weight, "a number >= 0")
        check_field(is_number(self.keep) and 0 < self.keep <= 1, "keep", self.keep, "a share in (0, 1]")
        check_field(self.at is None or (is_int(self.at) and self.at >= 1), "at", self.at, "a step >= 1, or None")
        check_field(is_number(self.omega) and self.omega > 0, "omega", self.omega, "a number > 0")
        self._masks: dict[str, Tensor] = {}

    def refusals(self) -> dict[str, str]:
        if self.at is None:
            return {}
        return {
            "best_model": "load_best_model_at_end could bring back the weights from before they were made sparse. "
            "Leave it out, or train with at=None, which makes nothing sparse."
        }

    def begin(self, run: Run, kept: Mapping[str, Tensor] | None) -> None:
        if self.at is not None and self.at >= run.steps:
            raise ValueError(
                f"The run has {run.steps} steps and at={self.at}: A and B would never be made sparse. Lower `at`, "
                "train for longer, or write at=None, which makes nothing sparse."
            )
        if self.at is not None and (holding := callbacks_that("sets_weights")):
            raise ValueError(
                f"{holding[0]} puts the adapter's weights back to where it holds them, and 'lorasculpt' sets entries "
                f"of A and B to 0 from step {self.at} on. Each undoes what the other has done: in the end the weights "
                "are not sparse, or not where they are held. Write at=None, which makes nothing sparse, or train with "
                "one of the two callbacks."
            )
        self._masks = {}
        for name, mask in (kept or {}).items():
            module, which = name.rsplit(".", 1)
            self._masks[name] = mask.to(getattr(run.factors[module], which).device)

    def penalty(self, name: str, A: Tensor, B: Tensor, pair: Factors, scaling: float) -> Tensor | None:
        if self.weight == 0:
            return None
        return self.weight * conflict(A, B, weight_importance(base_weight(pair.layer), self.omega).to(A))

    def step_ends(self, run: Run, step: int) -> None:
        if step == self.at:
            for name, weight in _weights(run.factors).items():
                self._masks[name] = largest(weight.detach(), self.keep)
            self.stepped(run, None)

    def stepped(self, run: Run, optimizer: Any) -> None:
        for name, weight in _weights(run.factors).items() if self._masks else ():
            for held in (weight.data, *averages(optimizer, [weight])):
                held.mul_(self._masks[name])

    def end(self, run: Run, step: int) -> str:
        return f"A and B are made sparse at {self.at}" if self.at is not None and step < self.at else ""

    def keeps(self, step: int) -> bool:
        return self.at is not None and step >= self.at

    def state(self) -> dict[str, Tensor]:
        return self._masks


@dataclass
class AlignGuard(Rule):
    """Keep the update from what aligned behaviour depends on (AlignGuard-LoRA, arXiv 2508.02079; reconstructed)."""

    name: ClassVar[str] = "alignguard"

    source: Any = "self"
    directions: int = 16
    tokens: int = 2048
    alignment: float = 0.25
    task: float = 0.5
    collision: float = 0.1
    beta: float = 1.0
    tau: float = 0.0

    def __post_init__(self) -> None:
        for field in ("directions", "tokens"):
            value = getattr(self, field)
            check_field(is_int(value) and value >= 1, field, value, "an integer >= 1")
        for field in ("alignment", "task", "collision", "beta", "tau"):
            value = getattr(self, field)
            check_field(is_number(value) and value >= 0, field, value, "a number >= 0")
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}  # module -> V (I, k), its shares (k,)

    def begin(self, run: Run, kept: Mapping[str, Tensor] | None) -> None:
        if run.again:
            return
        base = base_of(run.model)
        if not writes_text(base):
            raise ValueError(
                "'alignguard' keeps what the likelihood of text depends on, by the next tokens of a causal language "
                f"model, and {type(base).__name__} gives none. Train without it, or use rule='lorasculpt'."
            )
        devices = {name: pair.A.device for name, pair in run.factors.items()}
        if kept is not None:
            self._bases = {
                name: (kept[f"{name}.V"].to(device), kept[f"{name}.shares"].to(device))
                for name, device in devices.items()
            }
            return
        trained = next((name for name, pair in run.factors.items() if bool(pair.B.detach().any())), None)
        if trained is not None:
            raise ValueError(
                f"Adapter {run.adapter_name!r} has been trained already (B of module {trained!r} is not 0), and "
                "'alignguard' is about the change since its directions were found. Begin with a fresh adapter."
            )
        self._bases = fisher_directions(run, self.source, self.tokens, self.directions)

    def penalty(self, name: str, A: Tensor, B: Tensor, pair: Factors, scaling: float) -> Tensor | None:
        V, shares = (t.to(A) for t in self._bases[name])
        weights = (self.alignment, self.task, self.collision)
        return split_penalty(scaling * (B @ A), V, shares, weights, self.beta, self.tau)

    def keeps(self, step: int) -> bool:
        return True

    def state(self) -> dict[str, Tensor]:
        return {
            name: t for n, (V, shares) in self._bases.items() for name, t in ((f"{n}.V", V), (f"{n}.shares", shares))
        }


@dataclass
class CoTo(Rule):
    """Modules whose adapter is left out, ever fewer as training goes on (CoTo, arXiv 2506.05713)."""

    name: ClassVar[str] = "coto"

    until: float = 0.75
    start: float = 0.0

    def __post_init__(self) -> None:
        check_field(is_number(self.until) and 0 < self.until <= 1, "until", self.until, "a share of the run in (0, 1]")
        check_field(is_number(self.start) and 0 <= self.start < 1, "start", self.start, "a probability in [0, 1)")
        self._step = StepInPlace()
        self._shares: list[float] = []

    def refusals(self) -> dict[str, str]:
        return {
            "generates": "'coto' leaves modules out in a training step, in which this trainer also writes its "
            "completions and compares with what wrote them: that would be another model. Use it with SFTTrainer or "
            "DPOTrainer."
        }

    def begin(self, run: Run, kept: Mapping[str, Tensor] | None) -> None:
        self._step.put_back()  # an error has ended the run before this one within a step
        self._shares = []
        for name, pair in run.factors.items():
            if isinstance(pair.layer, AdapterLinear) and pair.past_A:
                raise ValueError(
                    f"Module {name!r} has frozen experts of earlier tasks in the same adapter, which 'coto' would "
                    "switch off as well. Use it for the first task, or with a LoRA of its own for each task."
                )

    def step_begins(self, run: Run, step: int) -> None:
        share = active_share(step, run.steps, self.until, self.start)
        active = draw_active(len(run.factors), share, 2**20 * run.seed + step)
        left_out = [pair.layer.scaling for pair, acts in zip(run.factors.values(), active, strict=True) if not acts]

        def partial_step(whole: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            with switched_off(left_out, run.adapter_name):
                return whole(*args, **kwargs)

        self._step.put(partial_step)
        self._shares.append(sum(active) / len(active))

    def stepped(self, run: Run, optimizer: Any) -> None:
        self._step.put_back()

    def end(self, run: Run, step: int) -> str:
        self._step.put_back()
        return ""

    def metrics(self) -> dict[str, float]:
        shares, self._shares = self._shares, []
        return {"active_adapters": sum(shares) / len(shares)} if shares else {}


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (LoRASculpt, AlignGuard, CoTo)}


@contextmanager
def switched_off(scalings: Sequence[dict[str, float]], adapter_name: str) -> Iterator[None]:
    """The adapter's scale is 0 in each layer's `scalings` for the length of a block, whatever ends it."""
    values = [scaling[adapter_name] for scaling in scalings]
    try:
        for scaling in scalings:
            scaling[adapter_name] = 0.0
        yield
    finally:
        for scaling, value in zip(scalings, values, strict=True):
            scaling[adapter_name] = value


def _weights(factors: Mapping[str, Factors]) -> dict[str, nn.Parameter]:
    """ "module.A" and "module.B" -> the parameter."""
    return {f"{name}.{which}": getattr(pair, which) for name, pair in factors.items() for which in ("A", "B")}


def fisher_directions(run: Run, source: Any, tokens: int, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Directions of each module's input in which the text's likelihood is most sensitive to its weight.

    They are eigenvectors of F = Σ_n G_nᵀ G_n, the empirical Fisher information of W (O, I) summed over outputs, with
    G_n the gradient of W by the mean log-likelihood of sequence n; kept as a sketch, so that no (I, I) is formed.

    Returns:
        Module -> V (I, k) orthonormal and the shares (k,) of tr F in each, strongest first; float32.
    """
    use_exact_4bit_kernels(run.model)
    if source == "self":
        batches = sample(run.model, run.tokenizer, tokens)
    else:
        batches = read(source, run.tokenizer, tokens, run.model)
    sketches: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def hook(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        x, real = args[0].detach(), mask

        def see(grad: Tensor) -> None:
            rows = fisher_rows(real_rows(x, real, name).float(), real_rows(grad, real, name).float())
            sketches[name] = shrink_sketch(torch.cat([sketches.get(name, rows[:0]), rows]), max(64, 2 * count))

        if output.requires_grad:
            output.register_hook(see)

    handles = [pair.layer.register_forward_hook(partial(hook, name)) for name, pair in run.factors.items()]
    device = device_of(run.model)
    with eval_mode(run.model), removed_after(handles), torch.enable_grad():
        for batch in _rows(batches):
            mask = batch["attention_mask"]
            inputs = {name: t.to(device) for name, t in batch.items()}
            real = inputs["attention_mask"][0].bool()
            logits = run.model(**inputs, use_cache=False).logits[0, :-1].float()
            loss = F.cross_entropy(logits[real[1:] & real[:-1]], inputs["input_ids"][0, 1:][real[1:] & real[:-1]])
            torch.autograd.grad(loss, [pair.B for pair in run.factors.values()], allow_unused=True)
    missing = [name for name in run.factors if name not in sketches or not bool(sketches[name].any())]
    if missing:
        raise ValueError(
            f"The likelihood of `source` does not depend on {len(missing)} adapted modules, e.g. {missing[0]!r}: give "
            "more text, or leave them out of target_modules."
        )
    found = {}
    for name, rows in sketches.items():
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        found[name] = (Vh[:count].T.contiguous(), S[:count].square() / S.square().sum())
    return found


def _rows(batches: list[Batch]) -> list[Batch]:
    """A sequence at a time: a Fisher information is of single samples' gradients."""
    return [
        {key: t[i : i + 1] for key, t in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))
    ]


class AdapterPenaltyCallback(HostCallback):
    """Train a LoRA, or MORA with routing "dense", under a penalty on its update B·A.

    The gradient of the penalty is added once a step, whatever the accumulation, before clipping; nothing has to be
    added to the model's loss, which SFTTrainer would not see. The trainer's logs get `penalty_RULE`, the mean since
    the last entry; `loss` stays the task's own. (They get `active_adapters` under "coto", which has no penalty.)

    Args:
        rule: which method; the rest are its options.
            "lorasculpt" (LoRASculpt, arXiv 2503.16843): `weight` (1e-3) times the mean over modules of ‖M ∘ B·A‖_F, M
                near 0 for small weights of the base and larger for large ones (`omega`, 1.0); after `at` steps (100;
                None for never) the share `keep` (0.1) of largest entries of each A and each B stays, and the rest is 0
                from then on. The base's weight is dequantised, and an (O, I) matrix formed, once a step and module.
            "alignguard" (AlignGuard-LoRA, arXiv 2508.02079; reconstructed from second-hand formulas): ΔW is split by
                `directions` (16) of each module's input that the likelihood of `source` depends on most (`source` as
                for `protect`, or "self"; `tokens`, 2048), and `alignment` (0.25), `task` (0.5) and `collision` (0.1)
                weigh the two parts and their overlap (`beta` 1.0, `tau` 0.0). Needs a fresh adapter.
            "coto" (CoTo, arXiv 2506.05713): in each step each module's adapter acts with a probability that rises
                from `start` (0.0) to 1 in the first `until` (0.75) of the run; at least one acts.
        adapter_name: which adapter; None is the one in training.
        options: as above.

    Raises:
        ValueError: an unknown rule, a wrong option; at the start of training an adapter whose update is not B·A, a run
            that ends before the rule has done its work, "lorasculpt" with `at` beside a callback that sets weights
            itself, "alignguard" with a model that is no causal language model, DeepSpeed or FSDP; at the end, a run
            that was stopped before.
        TypeError: an option that the rule does not have.

    Example:
        >>> callback = AdapterPenaltyCallback("lorasculpt", weight=1e-3, keep=0.1, at=100)
        >>> SFTTrainer(..., peft_config=LoraConfig(r=16, target_modules="all-linear"), callbacks=[callback])
    """

    holds_weights = True

    def __init__(self, rule: str, *, adapter_name: str | None = None, **options: Any) -> None:
        check_field(isinstance(rule, str) and rule in RULES, "rule", rule, "one of " + ", ".join(map(repr, RULES)))
        self.rule = RULES[rule](**options)
        self.adapter_name = adapter_name
        self.sidecar = f"adapter_penalty-{rule}.safetensors"
        self._run: Run | None = None
        self._begun = -1  # the last step that has begun
        self._sum: Tensor | None = None  # of the penalties since the last log entry
        self._count = 0

    def refusals(self) -> dict[str, str]:
        pieces = "which a callback cannot add a penalty's to. Use DDP or one GPU: the trainable part is small."
        return {
            "deepspeed": f"DeepSpeed keeps gradients in buffers of its own, {pieces}",
            "fsdp": f"FSDP holds parameters and gradients in pieces, {pieces}",
            **self.rule.refusals(),
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        name, factors = static_factors(model, self.adapter_name, "AdapterPenaltyCallback")
        again = self._run is not None and are_those(factors, self._run.factors)
        tokenizer = kwargs.get("processing_class")
        run = Run(model, name, factors, tokenizer, state.max_steps, args.seed, again and state.global_step == 0)
        kept = None
        if state.global_step > 0:
            kept = (self.saved_here if self.rule.keeps(state.global_step) else self.saved)(args, state)
        self.rule.begin(run, kept)
        self._run, self._begun, self._sum, self._count = run, -1, None, 0

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        run = self._run
        assert run is not None
        if state.global_step == self._begun:  # an epoch has ended within the step, whose gradients are still there
            return
        self._begun = state.global_step
        self.rule.step_begins(run, state.global_step)
        scaler = getattr(optimizer, "scaler", None)  # fp16: gradients are scaled until the step
        value = add_gradients(run, self.rule, 1.0 if scaler is None else scaler.get_scale())
        if value is not None:
            self._sum = value if self._sum is None else self._sum + value
            self._count += 1

    @torch.no_grad()
    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert self._run is not None
        self.rule.stepped(self._run, optimizer)

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._run is not None
        self.rule.step_ends(self._run, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        run, self._run = self._run, None
        if run is not None and (missing := self.rule.end(run, state.global_step)):
            raise ValueError(
                f"The run was stopped at step {state.global_step}, and {missing}. The adapter is kept as it is in "
                f"{keep_stopped(model, args, state)}. Resume from a checkpoint."
            )

    def metrics(self) -> dict[str, float]:
        found = self.rule.metrics()
        if self._sum is not None:
            found[f"penalty_{self.rule.name}"] = float(self._sum) / self._count
        self._sum, self._count = None, 0
        return found

    def kept(self) -> dict[str, Tensor]:
        return self.rule.state()


def add_gradients(run: Run, rule: Rule, scale: float = 1.0) -> Tensor | None:
    """Add `scale` times the gradient of the rule's penalty to the `grad` of each A and B in training.

    A module at a time, so that its (O, I) matrices alone are there at once.

    Returns:
        The penalty, the mean over the modules; None where the rule has none.
    """
    total: Tensor | None = None
    for name, pair in run.factors.items():
        weights = [p for p in (pair.A, pair.B) if p.requires_grad]
        with torch.enable_grad():
            A, B = (at_least_float32(p) for p in (pair.A, pair.B))
            value = rule.penalty(name, A, B, pair, pair.layer.scaling[run.adapter_name])
        if value is None:
            continue
        value = value / len(run.factors)
        for p, grad in zip(weights, torch.autograd.grad(value, weights), strict=True):
            grad = scale * grad
            p.grad = grad if p.grad is None else p.grad + grad
        value = value.detach()
        total = value if total is None else total + value.to(total.device)
    return total
