"""What an adapter costs to train and to keep: parameters, optimizer state and file, LORI beside PEFT's LoRA.

python recipes/adapter_size.py                       # SmolLM2-135M, r = 32, all linear modules
python recipes/adapter_size.py --model Qwen/Qwen3-0.6B --r 16
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

import data


COLUMNS = ("adapter", "trainable parameters", "optimizer MiB", "file MiB", "parameters ×", "optimizer ×", "file ×")


def measure(make_base: Any, config: Any, sparsity: float | None) -> tuple[int, float, float]:
    """Trainable parameters, AdamW's state in MiB after one step, and the saved adapter in MiB; float32 adapters."""
    import torch
    from peft import get_peft_model

    from peft_mora import sparsify

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=data.EMBEDDED, metavar="NAME_OR_DIR", help="base (SmolLM2-135M from PyPI)")
    parser.add_argument("--r", type=int, default=32, help="rank (%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of LoRI-S (%(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="write the table there as well")
    args = parser.parse_args()

    import torch
    from peft import LoraConfig
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM

    from peft_mora import LoriConfig

    folder = data.embedded_model(quantized=False) if args.model == data.EMBEDDED else args.model
    shared = {"r": args.r, "target_modules": "all-linear"}
    rows = []
    for name, config, sparsity in (
        ("PEFT LoRA", LoraConfig(lora_alpha=2 * args.r, **shared), None),
        ("LoRI-D", LoriConfig(alpha=2 * args.r, **shared), None),
        ("LoRI-D, without the projection", LoriConfig(alpha=2 * args.r, save_projection=False, **shared), None),
        (f"LoRI-S {args.sparsity:g}", LoriConfig(alpha=2 * args.r, **shared), args.sparsity),
        (
            f"LoRI-S {args.sparsity:g}, without the projection",
            LoriConfig(alpha=2 * args.r, save_projection=False, **shared),
            args.sparsity,
        ),
    ):
        figures = measure(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), config, sparsity)
        rows.append((name, *figures))
    table = Table(*COLUMNS, title=f"{Path(folder).name}, r = {args.r}, all-linear, float32 adapters, AdamW")
    written = []
    for name, *figures in rows:
        shares = [figure / reference for figure, reference in zip(figures, rows[0][1:], strict=True)]
        cells = [f"{figures[0]:,}", f"{figures[1]:.2f}", f"{figures[2]:.2f}", *(f"{share:.3f}" for share in shares)]
        table.add_row(name, *cells)
        written.append([name, *figures, *shares])
    Console(width=120).print(table)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *written])
        print(f"written to {args.csv}")


if __name__ == "__main__":
    main()
