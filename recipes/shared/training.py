"""One adapter's config and one SFTTrainer, for every method and every program."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from trl import SFTConfig, SFTTrainer

from peft_mora import METHODS
from peft_mora.base import AdapterLinear

from . import runs
from .base_model import load_base
from .tasks import to_dataset


NAMES = ("lora", *METHODS)

# What compares with LoRA at rank r and alpha 2r; a method that is not here takes LoRA's settings.
COMPARABLE = {
    "mora": lambda r: {"r": r, "alpha": 2 * r * r},  # a block's weights sum to 1: r times the alpha is LoRA's scale
    # A frozen projection cannot turn towards the task; four times the rank makes up for it at twice the parameters.
    "lori": lambda r: {"r": 4 * r, "alpha": 32 * r},
    "flylora": lambda r: {"r": 4 * r, "alpha": 32 * r, "top_k": r},
    # A quarter of the ranks act, and their weights sum to 1: alpha 2 a rank that acts is LoRA's scale.
    "smora": lambda r: {"r": r, "alpha": 2 * -(-r // 4), "top_k": -(-r // 4)},
    "furina": lambda r: {"r": max(1, r // 4), "alpha": 2 * max(1, r // 4)},  # of each of its four experts
}


def comparable(method: str, r: int) -> dict[str, Any]:
    """Arguments of `adapter_config` at which the methods compare with each other."""
    return COMPARABLE.get(method, lambda r: {"r": r, "alpha": 2 * r})(r)


def adapter_config(method: str, **given: Any) -> Any:
    """The one line that changes between methods: lora or one of METHODS, on all linear layers of a causal LM.

    `given` are fields of ours; LoRA gets them by its own names (alpha: lora_alpha), a seed those that have one.
    """
    given = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **given}
    config = LoraConfig if method == "lora" else METHODS[method].config
    if method == "lora":
        given = {f"lora_{name}" if name in ("alpha", "dropout") else name: value for name, value in given.items()}
    if "seed" not in {field.name for field in fields(config)}:
        given.pop("seed", None)
    return config(**given)


def linear_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """(inputs, outputs) of the modules that "all-linear" adapts: all but the output head."""
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return Counter((m.in_features, m.out_features) for m in linear)


def trainable(method: str, r: int, shapes: Counter[tuple[int, int]], **given: Any) -> int:
    """Parameters that a method trains at `comparable(method, r)`.

    Args:
        shapes: of the adapted modules, as `linear_shapes`.
        given: further fields of its config.
    """
    names = {f"m{i}": shape for i, shape in enumerate(shapes)}
    base = nn.ModuleDict({name: nn.Linear(*shape, device="meta") for name, shape in names.items()})
    model = get_peft_model(
        base, adapter_config(method, target_modules=[*names], task_type=None, **comparable(method, r), **given)
    )
    of_module = {
        name: sum(p.numel() for p in model.base_model.model[name].parameters() if p.requires_grad) for name in names
    }
    return sum(of_module[name] * shapes[shape] for name, shape in names.items())


def equal_rank(method: str, r: int, shapes: Counter[tuple[int, int]], **given: Any) -> tuple[int, int]:
    """The r of `comparable` at which a method trains as many parameters as a LoRA of rank r, as nearly as it can; and
    how many that are."""
    wanted, found = trainable("lora", r, shapes), []
    for rank in range(1, 8 * r + 1):
        found.append((rank, trainable(method, rank, shapes, **given)))
        if found[-1][1] >= wanted:
            break
    return min(found, key=lambda pair: abs(pair[1] - wanted))


def protectable(method: str) -> bool:
    """Whether OrthogonalProjectionCallback can hold it: it trains the A that reads a module's own input."""
    return method == "lora" or METHODS[method].model.tuner_layer_cls.trained is not AdapterLinear.trained


BENCH = (*NAMES, "lori-s")


def bench_rank(text: str) -> int:
    """Of `bench_config`; as the type of an argument."""
    r = runs.count(text)
    if r % 4:
        raise argparse.ArgumentTypeError(f"{r} has no quarter, which some methods wake: give a multiple of 4")
    return r


def bench_config(arm: str, r: int, **given: Any) -> Any:
    """Of one of BENCH, all at rank r and a quarter of the experts active where that is fixed; lori-s: packed B."""
    method = arm.removesuffix("-s")
    if arm == "lori-s":
        given = {"sparsity": 0.9, **given}
    if arm == "furina":
        r //= 4  # of each of its four experts
    if method != "lora" and isinstance(getattr(METHODS[method].config, "top_k", None), int):
        given = {"top_k": r // 4, **given}
    return adapter_config(method, r=r, alpha=2 * r, **given)


def make_trainer(
    model: Any, tokenizer: Any, records: list[dict[str, str]], folder: Path, steps: int, batch_size: int,
    lr: float = 1e-3, seed: int = 0, peft_config: Any = None, callbacks: Iterable[Any] = (), **options: Any,
) -> SFTTrainer:  # fmt: skip
    """TRL's trainer over records of prompt and answer, the loss on the answers; `options` are SFTConfig's."""
    settings = {
        # A constant rate ends wherever the last batches have pushed it; a linear decay learns less (LoRA, 40 steps:
        # .74 where a constant rate has .91).
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": steps // 3},
        "warmup_steps": steps // 10,
        "logging_steps": max(1, steps // 5),
        "max_length": 512,
        "gradient_checkpointing": False,  # a small model's activations fit, and recomputing them costs a third
        "use_cpu": model.device.type == "cpu",
        "save_strategy": "no",
        "report_to": "none",
    }
    config = SFTConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=lr, seed=seed,
        **(settings | options),
    )  # fmt: skip
    return SFTTrainer(
        model, args=config, train_dataset=to_dataset(records), processing_class=tokenizer, peft_config=peft_config,
        callbacks=list(callbacks),
    )  # fmt: skip


def train(
    base: str, peft_config: Any, records: list[dict[str, str]], folder: Path, args: Any, callbacks: Iterable[Any] = (),
    **options: Any,
) -> SFTTrainer:  # fmt: skip
    """Train one adapter on a fresh base and save it in `folder`; args has device, steps, batch_size, lr and seed, and
    `options` are SFTConfig's."""
    model, tokenizer = load_base(base, args.device)
    trainer = make_trainer(
        model, tokenizer, records, folder, args.steps, args.batch_size, args.lr, args.seed, peft_config, callbacks,
        **options,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer
