"""What an adapter costs to train and to keep: parameters, optimizer state and file, LORI beside PEFT's LoRA.

python recipes/measure/adapter_size.py                       # SmolLM2-135M, r = 32, all linear modules
python recipes/measure/adapter_size.py --model Qwen/Qwen3-0.6B --r 16
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from peft_mora import sparsify


sys.path.append(str(Path(__file__).parent.parent))  # of `shared`
from shared import runs
from shared.base_model import find_base
from shared.training import adapter_config


COLUMNS = ("adapter", "trainable parameters", "optimizer MiB", "file MiB", "parameters ×", "optimizer ×", "file ×")


def measure(make_base: Any, config: Any, sparsity: float | None) -> tuple[int, float, float]:
    """Trainable parameters, AdamW's state in MiB after one step, and the saved adapter in MiB; float32 adapters."""
    torch.manual_seed(0)
    model = get_peft_model(make_base(), config)
    if sparsity is not None:  # stands for a calibration run: which entries are kept does not change how many
        for name, parameter in model.named_parameters():
            if "lori_B" in name:
                torch.nn.init.normal_(parameter)
        print(sparsify(model, sparsity), file=sys.stderr)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return sum(p.numel() for p in trained), state / 2**20, size / 2**20


def main() -> None:
    parser = runs.parser(__doc__, r=32, device=None)
    parser.add_argument("--sparsity", type=runs.below_one, default=0.9, help="of LoRI-S (%(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="write the table there as well")
    args = parser.parse_args()

    folder = find_base(args.model, bits=16)
    rows = []
    bare, sparse = "without the projection", f"LoRI-S {args.sparsity:g}"
    for name, method, own, sparsity in (
        ("PEFT LoRA", "lora", {}, None),
        ("LoRI-D", "lori", {}, None),
        (f"LoRI-D, {bare}", "lori", {"save_projection": False}, None),
        (sparse, "lori", {}, args.sparsity),
        (f"{sparse}, {bare}", "lori", {"save_projection": False}, args.sparsity),
    ):
        config = adapter_config(method, r=args.r, alpha=2 * args.r, **own)
        figures = measure(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), config, sparsity)
        rows.append((name, *figures))
    table = Table(*COLUMNS, title=f"{Path(folder).name}, r = {args.r}, all-linear, float32 adapters, AdamW")
    written = []
    for name, *figures in rows:
        shares = [figure / reference for figure, reference in zip(figures, rows[0][1:], strict=True)]
        cells = [f"{figures[0]:,}", f"{figures[1]:.2f}", f"{figures[2]:.2f}", *(f"{share:.3f}" for share in shares)]
        table.add_row(name, *cells)
        written.append(dict(zip(COLUMNS, (name, *figures, *shares), strict=True)))
    Console(width=120).print(table)
    if args.csv:
        runs.write_csv(Path(args.csv), written)
        print(f"written to {args.csv}")


if __name__ == "__main__":
    main()
