"""What a training step costs: each method under TRL's own SFTTrainer on a 4-bit base, beside PEFT's LoRA.

python recipes/measure/bench_training.py                       # SmolLM2-135M in NF4, twenty minutes on a quiet core
python recipes/measure/bench_training.py --methods lora mora --dropout 0.05 --checkpointing

Time: one trainer per method, all in one process, taking turns step by step, so that noise hits all alike. A step is
what lies between on_step_begin and on_step_end. Ratios are paired: a method's step by LoRA's of the same turn. The C
library is told to keep freed memory, or what it gives back and takes again drowns what is compared.
Memory: one fresh process per method. "peak" is the weights and the optimizer's state, plus the most that tensors took
on top during one step, by the profiler's record of every allocation; "rss" is the process's own peak, torch and all.
"""

from __future__ import annotations

import argparse
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

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from peft_mora import METHODS


sys.path.append(str(Path(__file__).parent.parent))  # of `shared`
from shared import runs, training
from shared.base_model import find_base, load_base
from shared.tasks import find_task


ARMS = (*training.BENCH, *(f"{name}-plain" for name in METHODS))


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__, r=16, steps=20, batch_size=8, output="out/bench_training")
    parser.set_defaults(device="cpu")
    parser.add_argument("--methods", nargs="+", default=ARMS, choices=ARMS, help="first one: the measure")
    parser.add_argument("--threads", type=runs.count, default=1, help="torch's, on a CPU (%(default)s)")
    parser.add_argument("--tokens", type=runs.count, default=128, help="a sample; short ones joined (%(default)s)")
    parser.add_argument("--dropout", type=runs.below_one, default=0.0, help="of all methods (%(default)s, as PEFT's)")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, TRL's default")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if len(set(args.methods)) < len(args.methods):
        parser.error(f"--methods {' '.join(args.methods)}: each once, as it is its own measure otherwise")
    if args.steps < 2:
        parser.error("--steps: at least 2, for the spread")
    try:
        training.bench_rank(str(args.r))
    except argparse.ArgumentTypeError as error:
        parser.error(f"--r: {error}")
    return args


def make_trainer(method: str, steps: int, callback: Any, args: argparse.Namespace) -> Any:
    model, tokenizer = load_base(find_base(args.model, args.device), args.device)
    config = training.bench_config(method.removesuffix("-plain"), args.r, dropout=args.dropout)
    trainer = training.make_trainer(
        model, tokenizer, find_task("helpdesk")["train"], Path(args.output) / method, steps, args.batch_size,
        peft_config=config, callbacks=[callback], packing=True, packing_strategy="wrapped", max_length=args.tokens,
        gradient_checkpointing=args.checkpointing, logging_strategy="no", disable_tqdm=True,
        include_num_input_tokens_seen="all",
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
    steps = args.steps + 2  # two to warm up
    turn, baton = [0], threading.Condition()
    failed: list[BaseException] = []  # a trainer that will take no turn any more

    class Turns(TrainerCallback):
        def __init__(self, place: int) -> None:
            self.place, self.steps, self.seen, self.holds = place, [], 0, False

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.holds = baton.acquire()
            baton.wait_for(lambda: failed or turn[0] % len(args.methods) == self.place)
            if failed:
                raise RuntimeError("another trainer has failed")
            runs.wait(args.device)
            self.begin = time.perf_counter(), time.thread_time()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            runs.wait(args.device)
            clock, cpu = time.perf_counter() - self.begin[0], time.thread_time() - self.begin[1]
            self.steps.append((clock, cpu, int(state.num_input_tokens_seen) - self.seen))
            self.seen = int(state.num_input_tokens_seen)
            turn[0] += 1
            self.pass_on()

        def pass_on(self) -> None:
            baton.notify_all()
            self.holds = False
            baton.release()

    def run(method: str) -> None:
        try:
            trainers[method].train()
        except BaseException as error:
            failed.append(error)
            with baton:
                baton.notify_all()
        finally:
            if callbacks[method].holds:  # it has failed within a step
                callbacks[method].pass_on()

    callbacks = {method: Turns(place) for place, method in enumerate(args.methods)}
    trainers = {method: make_trainer(method, steps, callbacks[method], args) for method in args.methods}
    threads = [threading.Thread(target=run, args=[method]) for method in args.methods]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return {method: callback.steps[2:] for method, callback in callbacks.items()}


def memory(method: str, args: argparse.Namespace) -> dict[str, float]:
    """MiB of one method, measured in this process, which does nothing else."""

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
        "rss_mib": runs.resident_mib(),
    }


def main() -> None:
    args = parse()
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
    runs.write_csv(Path(args.output) / "bench_training.csv", rows)
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
