"""Seconds and peak memory of merging adapters of a large model's size; synthetic, so no model is needed.

python recipes/measure/bench_merge.py                                # 8B: 32 layers, 7 modules, six adapters of r = 16
python recipes/measure/bench_merge.py --layers 2 --rules sum ties --rank 16

Each rule runs in a process of its own, reading and writing folders included. PEFT's "svd" combination, which forms
ΔW, is timed on one module, a 4096 x 4096 one, beside the same by merge_adapters.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

from peft_mora.lora_file import Lora, write_lora
from peft_mora.merging import RULES, merge_adapters
from peft_mora.merging.inputs import Spread, Statistics


sys.path.append(str(Path(__file__).parent.parent))  # of `shared`
from shared import runs


HIDDEN, KEYS, BETWEEN = 4096, 1024, 14336
SHAPES = {  # (O, I)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (BETWEEN, HIDDEN),
    "mlp.up_proj": (BETWEEN, HIDDEN),
    "mlp.down_proj": (HIDDEN, BETWEEN),
}
SHARED = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=runs.count, default=32, help="(%(default)s)")
    parser.add_argument("--adapters", type=runs.count, default=6, help="(%(default)s)")
    parser.add_argument("--r", type=runs.count, default=16, help="rank of each (%(default)s)")
    parser.add_argument("--rank", type=runs.merged_rank, default="sum", help="of the merged, or a share (%(default)s)")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES), help="(all)")
    parser.add_argument("--threads", type=runs.count, default=2, help="(%(default)s)")
    parser.add_argument("--output", default="out/bench_merge.csv", metavar="CSV", help="(%(default)s)")
    parser.add_argument("--one", nargs=2, metavar=("RULE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if Path(args.output).is_dir():
        parser.error(f"--output {args.output} is a folder: name the CSV file")
    return args


def write_adapters(folder: Path, args: argparse.Namespace) -> None:
    """Random A and B from other seeds, 16 directions of each distinct input beside them."""
    for t in range(args.adapters):
        generator = torch.Generator().manual_seed(t)
        loras, spreads, groups = {}, {}, {}
        for layer in range(args.layers):
            for kind, (out, size) in SHAPES.items():
                name = f"model.layers.{layer}.{kind}"
                A, B = torch.randn(args.r, size, generator=generator), torch.randn(out, args.r, generator=generator)
                loras[name] = Lora(A / size**0.5, B / size**0.5)
                group = f"model.layers.{layer}.{SHARED.get(kind, kind)}"
                groups.setdefault(group, []).append(name)
                if group == name:
                    Q = torch.linalg.qr(torch.randn(size, 16, generator=generator)).Q
                    spreads[name] = Spread(Q, torch.logspace(3, 1, 16), 1.0)
        adapter = folder / f"task{t}"
        write_lora(adapter, loras, base_model_name_or_path="synthetic")
        Statistics(spreads, {name: tuple(members) for name, members in groups.items()}, 64, 4096).save(adapter)


def run_one(rule: str, folder: Path, args: argparse.Namespace) -> None:
    """In a process of its own: seconds by the clock and of the processor, and peak GiB, as JSON."""
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    rank = args.r if rule in ("lego", "opcm") and args.rank == "sum" else args.rank  # k clusters, or a budget
    before = runs.resident_mib()
    start, processor = time.perf_counter(), time.process_time()
    report = merge_adapters(sorted(folder.glob("task*")), rule, rank=rank, output=folder / rule)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    peak = runs.resident_mib()
    row = {"rule": report.rule, "rank": report.rank, "seconds": round(seconds, 1), "processor": round(processor, 1)}
    print(json.dumps({**row, "peak GiB": round(peak / 2**10, 2), "of that imports": round(before / 2**10, 2)}))


def peft_svd(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of PEFT's "svd" and of merge_adapters for one 4096 x 4096 module, to rank r."""
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN, bias=False))
    names = [f"task{t}" for t in range(args.adapters)]
    config = LoraConfig(r=args.r, lora_alpha=args.r, target_modules=["0"], init_lora_weights=False)
    peft_model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, config)
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder, selected_adapters=names)
        start = time.perf_counter()
        merge_adapters([Path(folder) / name for name in names], "mean", rank=args.r)
        ours = time.perf_counter() - start
    start = time.perf_counter()
    peft_model.add_weighted_adapter(
        names, [1 / len(names)] * len(names), "both", combination_type="svd", svd_rank=args.r, svd_full_matrices=False
    )
    return time.perf_counter() - start, ours


def main() -> None:
    args = parse()
    if args.one:
        run_one(args.one[0], Path(args.one[1]), args)
        return
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), args)
        for rule in args.rules:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", rule, folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    shape = f"{args.layers} layers, {args.adapters} adapters of r = {args.r}, {args.threads} threads"
    table = Table(*rows[0], title=shape)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    theirs, ours = peft_svd(args)
    print(f"one {HIDDEN} x {HIDDEN} module to rank {args.r}: PEFT svd {theirs:.1f} s, merge_adapters {ours:.2f} s")
    runs.write_csv(Path(args.output), rows)
    print(f"{args.output} written")


if __name__ == "__main__":
    main()
