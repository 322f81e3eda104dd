"""What orthogonal projection costs: one SFTTrainer run whose steps take turns with and without it.

python recipes/projection_cost.py                       # 300 protected directions a module, SmolLM2 in NF4, on a CPU
python recipes/projection_cost.py --rank 100 --room 16  # A held inside 16 directions instead
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import data


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=300, help="protected directions a module (%(default)s)")
    parser.add_argument("--room", type=int, help="directions that A may move in (all that are not protected)")
    parser.add_argument("--method", default="task", choices=("task", "bank", "dense"), help="routing (%(default)s)")
    parser.add_argument("--r", type=int, default=8, help="experts a task (%(default)s)")
    parser.add_argument("--model", default=data.EMBEDDED, metavar="NAME_OR_DIR", help="base (SmolLM2-135M from PyPI)")
    parser.add_argument("--device", help="cpu, cuda, … (cuda where there is one)")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of steps to time (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a step (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    import torch
    from peft import get_peft_model
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from peft_mora import MoraConfig
    from trl_callbacks import OrthogonalProjectionCallback
    from trl_callbacks.projection import trainable_factors
    from trl_callbacks.subspace import Subspace, fingerprint

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    base = data.embedded_model() if args.model == data.EMBEDDED else args.model
    model, tokenizer = data.load_base(base, args.device)
    model = get_peft_model(model, MoraConfig(r=args.r, routing=args.method, target_modules="all-linear"))

    memory = Subspace("inputs", fingerprint(model.get_base_model()))
    for name, pair in trainable_factors(model, None)[1].items():
        lead = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        memory.groups[lead] = (*memory.groups.get(lead, ()), name)
        if lead not in memory.right:
            memory.right[lead] = torch.linalg.qr(torch.randn(pair.A.shape[1], args.rank))[0]
    mib = sum(V.numel() for V in memory.right.values()) * 4 / 2**20

    class EveryOther(OrthogonalProjectionCallback):
        """Projects in odd steps only, whose time is compared with that of the step before."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % 2:
                super().on_pre_optimizer_step(args, state, control, **kwargs)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % 2:
                super().on_optimizer_step(args, state, control, **kwargs)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize() if args.device.startswith("cuda") else None
            self.begin = time.perf_counter()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            torch.cuda.synchronize() if args.device.startswith("cuda") else None
            times[state.global_step - 1] = time.perf_counter() - self.begin

    times: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        memory.save(Path(folder) / "memory")
        start = "random" if args.room is None else "inputs"
        callback = EveryOther(Path(folder) / "memory", start=start, room=args.room, calibration_batches=1)
        config = SFTConfig(
            output_dir=folder, max_steps=2 * args.pairs + 2, per_device_train_batch_size=args.batch_size,
            gradient_checkpointing=False, use_cpu=args.device == "cpu", logging_strategy="no", save_strategy="no",
            report_to="none",
        )  # fmt: skip
        # One batch for every step, so that the pairs differ in the projection alone.
        records = data.make_task("helpdesk")["train"][: args.batch_size]
        train = data.to_dataset(records)
        callbacks = [callback, Clock()]
        SFTTrainer(model, args=config, train_dataset=train, processing_class=tokenizer, callbacks=callbacks).train()
    steps = range(2, 2 * args.pairs + 2, 2)  # the first pair is warm-up
    for name, values in (("without", [times[s] for s in steps]), ("with projection", [times[s + 1] for s in steps])):
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:16} median {middle:.3f} s a step, quartiles {low:.3f} to {high:.3f}")
    low, middle, high = statistics.quantiles([times[s + 1] / times[s] for s in steps], n=4)
    print(
        f"paired ratio {middle:.4f}, quartiles {low:.4f} to {high:.4f}, {args.pairs} pairs; bases take {mib:.0f} MiB"
    )


if __name__ == "__main__":
    main()
