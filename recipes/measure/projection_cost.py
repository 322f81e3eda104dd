"""What orthogonal projection costs: one SFTTrainer run whose steps take turns with and without it.

python recipes/measure/projection_cost.py   # 300 protected directions a module, SmolLM2 in NF4, on a CPU
python recipes/measure/projection_cost.py --rank 100 --room 16  # A held inside 16 directions instead
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import TrainerCallback

from peft_mora.fingerprint import fingerprint
from trl_callbacks import OrthogonalProjectionCallback
from trl_callbacks.projection import trainable_factors
from trl_callbacks.subspace import Subspace


sys.path.append(str(Path(__file__).parent.parent))  # of `shared`
from shared import runs
from shared.base_model import find_base, load_base
from shared.tasks import find_task
from shared.training import adapter_config, make_trainer


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__, r=8, batch_size=8)
    parser.add_argument("--rank", type=runs.count, default=300, help="protected directions a module (%(default)s)")
    parser.add_argument("--room", type=runs.count, help="directions that A may move in (all that are not protected)")
    parser.add_argument("--method", default="task", choices=("task", "bank", "dense"), help="routing (%(default)s)")
    parser.add_argument("--pairs", type=runs.several, default=30, help="pairs of steps to time (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    model, tokenizer = load_base(find_base(args.model, args.device), args.device)
    model = get_peft_model(model, adapter_config("mora", r=args.r, routing=args.method))
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
            runs.wait(args.device)
            self.begin = time.perf_counter()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            runs.wait(args.device)
            times[state.global_step - 1] = time.perf_counter() - self.begin

    times: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        memory.save(Path(folder) / "memory")
        start = "random" if args.room is None else "inputs"
        callback = EveryOther(Path(folder) / "memory", start=start, room=args.room, calibration_batches=1)
        # One batch for every step, so that the pairs differ in the projection alone.
        records = find_task("helpdesk")["train"][: args.batch_size]
        trainer = make_trainer(
            model, tokenizer, records, Path(folder), 2 * args.pairs + 2, args.batch_size,
            callbacks=[callback, Clock()], logging_strategy="no",
        )  # fmt: skip
        trainer.train()
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
