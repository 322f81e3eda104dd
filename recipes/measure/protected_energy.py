"""What a memory of general text holds of other text, and the room that it takes. Trains nothing.

python recipes/measure/protected_energy.py --protect self --look pages.jsonl chats.jsonl        # minutes on a CPU
python recipes/measure/protected_energy.py --protect wiki.jsonl wiki.jsonl+self --tokens 2560 10240 --look pages.jsonl

A row each source, number of tokens and energy: directions and room as means over the inputs of modules (one of q, k
and v; one of gate and up), then for each text of --look the share of its inputs' energy, Σ x xᵀ, that the directions
hold: mean over the inputs, and the tenth that is held least. What is not held is what an adapter may change.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from peft_mora.inputs import input_statistics
from peft_mora.linalg import spectrum
from trl_callbacks.general_text import ENERGY, TOKENS, Batch, linear_layers, read, sample


sys.path.append(str(Path(__file__).parent.parent))  # of `shared`
from shared import runs
from shared.base_model import find_base, load_base


COLUMNS = ("source", "tokens", "energy", "directions", "room")


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__, output="out/protected_energy")
    add = parser.add_argument
    add(
        "--protect", nargs="+", default=["self"], metavar="TEXT", help="self, JSONL, or A+B in equal parts; a row each"
    )
    add("--look", nargs="+", required=True, metavar="FILE", help="other text: JSONL, or self (of another seed)")
    add("--tokens", nargs="+", type=runs.count, default=[TOKENS], help="that a memory is made of (%(default)s)")
    add("--energy", nargs="+", type=runs.share, default=[0.9, ENERGY, 0.98, 0.99], help="of the memory (%(default)s)")
    add("--look-tokens", type=runs.count, default=5120, help="of each text of --look (%(default)s)")
    args = parser.parse_args()
    for option, sources in (("--protect", args.protect), ("--look", args.look)):
        names = [title(source) for source in sources]
        if option == "--look" and (taken := next((name for name in names if name in COLUMNS), None)):
            parser.error(f"{option}: {taken} would be two columns of one name: rename the file")
        if twice := next((name for name in names if names.count(name) > 1), None):
            parser.error(f"{option}: {twice} would be the name of two: rename a file")
    return args


def text(source: str, tokens: int, model: Any, tokenizer: Any, seed: int) -> list[Batch]:
    found = []
    for part in (parts := source.split("+")):
        left = tokens // len(parts)
        found += sample(model, tokenizer, left, seed) if part == "self" else read(part, tokenizer, left, model)
    return found


def title(source: str) -> str:
    return "+".join(Path(part).stem for part in source.split("+"))


@torch.no_grad()
def main() -> None:
    args = parse()
    for part in (part for source in (*args.protect, *args.look) for part in source.split("+")):
        if part != "self" and not Path(part).is_file():
            raise SystemExit(f"{part} is no file")
    model, tokenizer = load_base(find_base(args.model, args.device), args.device)
    layers = linear_layers(model)
    names = [title(source) for source in args.look]
    looked = [
        input_statistics(model, layers, text(source, args.look_tokens, model, tokenizer, seed=1)).all()
        for source in args.look
    ]
    rows: list[dict[str, Any]] = []
    for source in args.protect:
        for tokens in args.tokens:
            batches = text(source, tokens, model, tokenizer, seed=0)
            found = input_statistics(model, layers, batches).all()
            there = sum(int(batch["attention_mask"].sum()) for batch in batches)  # a file may have less, self in rows
            ranks: dict[float, list[float]] = {energy: [] for energy in args.energy}
            room: dict[float, list[float]] = {energy: [] for energy in args.energy}
            held: dict[tuple[float, str], list[float]] = {(e, name): [] for e in args.energy for name in names}
            for group, covariance in found.items():
                values, vectors = spectrum(covariance)
                shares = {}
                for name, other in zip(names, looked, strict=True):
                    along = ((other[group] @ vectors) * vectors).sum(0).cumsum(0)
                    shares[name] = along / other[group].trace()
                for energy in args.energy:
                    k = min(len(values), int((values.cumsum(0) < energy * values.sum()).sum()) + 1)  # rounding, at 1
                    ranks[energy].append(k)
                    room[energy].append(1 - k / len(values))
                    for name, share in shares.items():
                        held[energy, name].append(float(share[k - 1]))
            for energy in args.energy:
                values = (title(source), there, energy, fmean(ranks[energy]), fmean(room[energy]))
                row = dict(zip(COLUMNS, values, strict=True))
                for name in names:
                    least = sorted(held[energy, name])[: max(1, len(found) // 10)]
                    row |= {name: fmean(held[energy, name]), f"{name}, least tenth": fmean(least)}
                rows.append(row)
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    runs.write_csv(Path(args.output) / "protected_energy.csv", rows)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=150).print(table)
    print(f"{args.output}/protected_energy.csv written")


if __name__ == "__main__":
    main()
