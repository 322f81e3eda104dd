"""What one adapted layer costs: forward and backward of every method beside the frozen base and PEFT's LoRA.

python recipes/measure/bench_layers.py   # bf16 bases in the shapes of three models, minutes on one core
python recipes/measure/bench_layers.py --compile --models smollm2

All arms of a shape share one base layer and take turns. tokens/s: median of the repeats, with quartiles; in CPU time
where one CPU thread does it all. peak: the most that tensors took during one forward and backward, by the profiler's
record of every allocation. kept: bytes that autograd saves, weights left out, in units of the bf16 input. MFLOP: the
adapter's forward for a token, active experts only; of the base, its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table


sys.path.append(str(Path(__file__).parent.parent))  # of `shared`
from shared import runs
from shared.training import BENCH, bench_config, bench_rank

from peft_mora import MtlLoraConfig


SHAPES = {  # in and out features of q_proj and of up_proj
    "smollm2": ((576, 576), (576, 1536)),
    "llama-3.2-1b": ((2048, 2048), (2048, 8192)),
    "llama-3-8b": ((4096, 4096), (4096, 14336)),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES, help="whose shapes (all)")
    parser.add_argument("--tokens", type=runs.count, default=256, help="T (%(default)s)")
    parser.add_argument("--r", type=bench_rank, default=16, help="rank of all methods (%(default)s)")
    parser.add_argument("--repeats", type=runs.several, default=15, help="timed rounds (%(default)s)")
    parser.add_argument("--device", type=runs.device, default="cpu", help="cpu, cuda, … (%(default)s)")
    parser.add_argument("--threads", type=runs.count, default=1, help="torch's, on a CPU (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile arms too; needs a C++ compiler, slow")
    parser.add_argument("--output", type=runs.folder, default="out/bench_layers", metavar="DIR", help="(%(default)s)")
    return parser.parse_args()


def arms(base: Any, r: int, compiled: bool) -> dict[str, Any]:
    """Layers over the one base, by the name of the arm."""

    def layer(arm: str, bf16: bool, lean: bool = True) -> Any:
        config = bench_config(arm, r, target_modules=["0"], task_type=None)
        model = get_peft_model(torch.nn.Sequential(base), config, autocast_adapter_dtype=not bf16)
        found = model.base_model.model[0].train()
        found.lean = lean
        return found

    found = {"base": base.requires_grad_(False), "lora": layer("lora", False), "lora-bf16": layer("lora", True)}
    for name in BENCH[1:]:
        found[f"{name} eager"], found[f"{name} lean"] = layer(name, True, False), layer(name, True)
        if compiled:
            found[f"{name} compiled"] = torch.compile(layer(name, True))
    return found


def megaflops(arm: str, inputs: int, outputs: int, r: int) -> float:
    """Multiplications and additions of the adapter's two products for one token, by the experts that act."""
    if arm == "base":
        return 2e-6 * inputs * outputs
    down, up = inputs * r, outputs * r
    if arm.startswith("lori-s"):
        up *= 0.1
    if arm.startswith("mtllora"):
        down, up = down + r * r, up * MtlLoraConfig.ups  # Λ, and each of the up-projections
    if arm.startswith("flylora"):
        down, up = down / 4, up / 4
    if arm.startswith("smora"):
        down, up = down + down / 4, up / 4  # the router is a product with all ranks
    return 2e-6 * (down + up)


def peak_mib(step: Callable[[], Any]) -> float:
    """The most that tensors take on top of what is there."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))) / 2**20


def kept(layer: Any, x: Any, g: Any) -> float:
    """What autograd keeps of a forward for its backward, weights left out, in units of x."""
    weights = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.backward(g)  # what is computed again there is not kept
    return sum(storages.values()) / x.nbytes


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.compile:
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    rows: list[dict[str, Any]] = []
    for model, (inputs, outputs) in [(name, shape) for name in args.models for shape in SHAPES[name]]:
        base = torch.nn.Linear(inputs, outputs, bias=False, device=args.device, dtype=torch.bfloat16)
        x = torch.randn(1, args.tokens, inputs, device=args.device, dtype=torch.bfloat16, requires_grad=True)
        g = torch.randn(1, args.tokens, outputs, device=args.device, dtype=torch.bfloat16)
        torch.compiler.reset()  # or its limit of compilations is reached after a few shapes, and the rest run eagerly
        layers = arms(base, args.r, args.compile)
        steps = {arm: (lambda layer=layer, x=x, g=g: layer(x).backward(g)) for arm, layer in layers.items()}
        seconds: dict[str, list[float]] = {arm: [] for arm in steps}
        # The thread's own time, where there is one alone: what else runs on the machine weighs less in it.
        clock = time.thread_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
        for turn in range(args.repeats + 3):  # three to warm up
            for arm, step in steps.items():
                begin = clock()
                step()
                runs.wait(args.device)
                seconds[arm] += [clock() - begin] if turn > 2 else []
        for arm, step in steps.items():
            low, middle, high = (args.tokens / s for s in reversed(statistics.quantiles(seconds[arm], n=4)))
            ratio = statistics.median(a / b for a, b in zip(seconds[arm], seconds["lora"], strict=True))
            rows.append({
                "model": model, "I": inputs, "O": outputs, "arm": arm, "tokens_per_s": middle, "q1": low, "q3": high,
                "time_by_lora": ratio, "peak_mib": peak_mib(step),
                "kept": kept(layers[arm], x, g),
                "mflop": megaflops(arm, inputs, outputs, args.r),
            })  # fmt: skip
    runs.write_csv(Path(args.output) / "bench_layers.csv", rows)
    headings = ("shape", "arm", "tokens/s (quartiles)", "time by lora's", "peak MiB", "kept", "MFLOP a token")
    table = Table(*headings, title=f"forward and backward of {args.tokens} tokens, r = {args.r}, {args.device}")
    for row in rows:
        table.add_row(
            f"{row['model']}\n{row['I']} x {row['O']}" if row["arm"] == "base" else "", row["arm"],
            f"{row['tokens_per_s']:.0f} ({row['q1']:.0f}-{row['q3']:.0f})", f"{row['time_by_lora']:.3f}",
            f"{row['peak_mib']:.2f}", f"{row['kept']:.3f}", f"{row['mflop']:.3f}",
            end_section=row["arm"] == list(layers)[-1],
        )  # fmt: skip
    Console(width=130).print(table)
    print(f"{args.output}/bench_layers.csv written")


if __name__ == "__main__":
    main()
