"""What a training step costs: each method under TRL's own SFTTrainer on a 4-bit base, beside PEFT's LoRA.

python recipes/bench_training.py                       # SmolLM2-135M in NF4, twenty minutes on a quiet core
python recipes/bench_training.py --methods lora mora --dropout 0.05 --checkpointing

Time: one trainer per method, all in one process, taking turns step by step, so that noise hits all alike. A step is
what lies between on_step_begin and on_step_end. Ratios are paired: a method's step by LoRA's of the same turn. The C
library is told to keep freed memory, or what it gives back and takes again drowns what is compared.
Memory: one fresh process per method. "peak" is the weights and the optimizer's state, plus the most that tensors took
on top during one step, by the profiler's record of every allocation; "rss" is the process's own peak, torch and all.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import statistics
import subprocess
import sys
import threading
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import data


METHODS = ("lora", "mora", "mora-plain", "lori", "lori-plain", "lori-s", "flylora", "flylora-plain")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="first one: the measure")
    parser.add_argument("--model", default=data.EMBEDDED, metavar="NAME_OR_DIR", help="base (SmolLM2-135M from PyPI)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's, on a CPU (%(default)s)")
    parser.add_argument("--r", type=int, default=16, help="rank of all methods, on all linear layers (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each method (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a step (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of each sample, short ones joined (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of all methods (%(default)s, as in PEFT's LoRA)")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, TRL's default")
    parser.add_argument("--output", default="out/bench_training", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


def adapter_config(method: str, r: int, dropout: float) -> Any:
    from peft import LoraConfig

    from peft_mora import FlyLoraConfig, LoriConfig, MoraConfig

    name, common = method.removesuffix("-plain"), {"r": r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    common["lora_dropout" if name == "lora" else "dropout"] = dropout
    return {
        "lora": lambda: LoraConfig(lora_alpha=2 * r, **common),
        "mora": lambda: MoraConfig(alpha=2 * r * r, **common),
        "lori": lambda: LoriConfig(alpha=2 * r, **common),
        "lori-s": lambda: LoriConfig(alpha=2 * r, sparsity=0.9, **common),
        "flylora": lambda: FlyLoraConfig(alpha=2 * r, top_k=r // 4, **common),
    }[name]()


def make_trainer(method: str, steps: int, callback: Any, args: argparse.Namespace) -> Any:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = data.load_base(
        data.embedded_model() if args.model == data.EMBEDDED else args.model, args.device
    )
    config = SFTConfig(
        output_dir=str(Path(args.output) / method), max_steps=steps, per_device_train_batch_size=args.batch_size,
        packing=True, packing_strategy="wrapped", max_length=args.tokens, gradient_checkpointing=args.checkpointing,
        use_cpu=args.device == "cpu", save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
        include_num_input_tokens_seen="all",
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args=config, train_dataset=data.to_dataset(data.make_task("helpdesk")["train"]),
        processing_class=tokenizer, peft_config=adapter_config(method, args.r, args.dropout), callbacks=[callback],
    )  # fmt: skip
    for module in trainer.model.modules():
        if method.endswith("-plain") and hasattr(module, "lean"):
            module.lean = False
    return trainer


def keep_freed_memory() -> None:
    """Stop glibc from giving freed blocks back to the kernel and faulting them in again: with two trainers in one
    process that took 2.1 of 5.8 s a step on a CPU, and not the same share of each.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        arena_max, mmap_threshold, trim_threshold = -8, -3, -1  # of malloc.h
        for option, value in ((arena_max, 1), (mmap_threshold, 2**30), (trim_threshold, 2**31 - 1)):
            mallopt(option, value)


def times(args: argparse.Namespace) -> dict[str, list[tuple[float, float, int]]]:
    """Seconds by the clock, seconds of the thread and tokens of each timed step, by method."""
    from transformers import TrainerCallback

    steps = args.steps + 2  # two to warm up
    turn, baton = [0], threading.Condition()

    class Turns(TrainerCallback):
        def __init__(self, place: int) -> None:
            self.place, self.steps, self.seen = place, [], 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            baton.acquire()
            baton.wait_for(lambda: turn[0] % len(args.methods) == self.place)
            self.begin = time.perf_counter(), time.thread_time()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            clock, cpu = time.perf_counter() - self.begin[0], time.thread_time() - self.begin[1]
            self.steps.append((clock, cpu, int(state.num_input_tokens_seen) - self.seen))
            self.seen = int(state.num_input_tokens_seen)
            turn[0] += 1
            baton.notify_all()
            baton.release()

    callbacks = {method: Turns(place) for place, method in enumerate(args.methods)}
    trainers = [make_trainer(method, steps, callbacks[method], args) for method in args.methods]
    threads = [threading.Thread(target=trainer.train) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {method: callback.steps[2:] for method, callback in callbacks.items()}


def memory(method: str, args: argparse.Namespace) -> dict[str, float]:
    """MiB of one method, measured in this process, which does nothing else."""
    import torch
    from transformers import TrainerCallback

    class Profile(TrainerCallback):
        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == 2:
                self.profiler = torch.profiler.profile(profile_memory=True)
                self.profiler.__enter__()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == 3:
                self.profiler.__exit__(None, None, None)

    callback = Profile()
    trainer = make_trainer(method, 3, callback, args)
    trainer.train()
    events = [e for e in callback.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    step = max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    state = [t for s in trainer.optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.dim()]
    made = [d.A for m in trainer.model.modules() for d in getattr(m, "flylora_made", {}).values()]
    weights = [*trainer.model.parameters(), *trainer.model.buffers(), *made]
    still = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*weights, *state)}.values())
    return {
        "peak_mib": (still + step) / 2**20,
        "step_mib": step / 2**20,
        "optimizer_mib": sum(t.nbytes for t in state) / 2**20,
        "rss_mib": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10,
    }


def main() -> None:
    args = parse()
    import torch
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(args.threads)
    if args.memory_of:
        return print(json.dumps(memory(args.memory_of, args)))
    keep_freed_memory()
    measured, first, rows = times(args), args.methods[0], []
    for method in args.methods:
        run = [sys.executable, *sys.argv, "--memory-of", method]
        used = json.loads(subprocess.run(run, check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        clocks, cpus, tokens = zip(*measured[method], strict=True)
        low, middle, high = statistics.quantiles(clocks, n=4)
        row: dict[str, Any] = {"method": method, "steps": len(clocks), "step_s": middle, "q1_s": low, "q3_s": high}
        for key, own, theirs in (("ratio", clocks, 0), ("cpu_ratio", cpus, 1)):
            paired = [a / b[theirs] for a, b in zip(own, measured[first], strict=True)]
            row[f"{key}_q1"], row[key], row[f"{key}_q3"] = statistics.quantiles(paired, n=4)
        row |= {"tokens_per_s": sum(tokens) / sum(clocks), **used}
        rows.append(row)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    with open(Path(args.output) / "bench_training.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    headings = ("method", "step, s", f"by {first}'s", "CPU time", "tokens/s", "peak MiB", "optimizer MiB", "rss MiB")
    title = (
        f"SFTTrainer steps of {args.batch_size} x {args.tokens} tokens, r = {args.r}, all-linear, dropout "
        f"{args.dropout}, {'' if args.checkpointing else 'no '}gradient checkpointing, {args.device}"
    )
    table = Table(*headings, title=title)
    for row in rows:
        peak, state = (row[key] / rows[0][key] for key in ("peak_mib", "optimizer_mib"))
        table.add_row(
            row["method"],
            f"{row['step_s']:.3f} ({row['q1_s']:.3f}-{row['q3_s']:.3f})",
            f"{row['ratio']:.3f} ({row['ratio_q1']:.3f}-{row['ratio_q3']:.3f})",
            f"{row['cpu_ratio']:.3f} ({row['cpu_ratio_q1']:.3f}-{row['cpu_ratio_q3']:.3f})",
            f"{row['tokens_per_s']:.0f}",
            f"{row['peak_mib']:.1f} ({peak:.3f})",
            f"{row['optimizer_mib']:.2f} ({state:.3f})",
            f"{row['rss_mib']:.0f}",
        )
    Console(width=140).print(table)
    print(f"{args.output}/bench_training.csv written")


if __name__ == "__main__":
    main()
