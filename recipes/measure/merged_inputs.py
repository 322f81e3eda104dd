"""At which strength do an adapter's modules see what they will see under a merged one?

python recipes/measure/merged_inputs.py --adapters DIR --merged FOLDER --data DIR --tasks dbpedia,yahoo,museum

DIR/lora-TASK and FOLDER are of a run of recipes/merge.py. For each task, ‖C - C_merged‖ / ‖C_merged‖ of the inputs on
its prompts, under its adapter at each strength and under the merged one: means over modules, and over each third of
the layers.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from peft_mora.inputs import batches_of
from peft_mora.lora_file import read_lora
from peft_mora.merging.inputs import Spread, Statistics, adapted, encoded, input_spreads
from peft_mora.merging.scaling import block_of


sys.path.append(str(Path(__file__).parent.parent))  # of `shared`
from shared import runs
from shared.base_model import find_base, load_base
from shared.tasks import find_task


DIRECTIONS = 32  # of each C, as in a merge that looks


def dense(C: Spread | None) -> Tensor:
    """(I, I) float64."""
    assert C is not None  # input_spreads has refused modules that see nothing
    return C.times(torch.eye(len(C.Q), dtype=torch.float64))


def distances(own: Statistics, merged: Statistics, modules: list[str]) -> list[float]:
    """The mean over all layers, and over each third of them."""
    found: dict[int, list[float]] = {}
    for name in modules:
        C, other = (dense(one.of(name)) for one in (own, merged))
        found.setdefault(block_of(name) or 0, []).append(float((C - other).norm() / other.norm()))
    layers = [fmean(gaps) for _, gaps in sorted(found.items())]
    cuts = [round(i * len(layers) / 3) for i in range(4)]
    return [fmean(layers)] + [fmean(layers[start:end]) for start, end in pairwise(cuts) if start < end]


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__, data=None)
    parser.add_argument("--tasks", type=runs.names, default="dbpedia,yahoo,museum", help="(%(default)s)")
    parser.add_argument("--adapters", required=True, metavar="DIR", help="with lora-TASK folders")
    parser.add_argument("--merged", required=True, metavar="FOLDER", help="the merged adapter")
    parser.add_argument("--prompts", type=runs.count, default=24, help="training prompts a task (%(default)s)")
    strengths = [0, 0.25, 0.5, 0.75, 1]
    parser.add_argument("--strengths", nargs="+", type=runs.finite, default=strengths, help="(%(default)s)")
    parser.add_argument("--seed", type=runs.number, default=0, help="of embedded tasks (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    model, tokenizer = load_base(find_base(args.model, args.device), args.device)
    table = Table("task", "strength", "all", "first third", "second", "last")
    for name in args.tasks:
        task = find_task(name, args.data, seed=args.seed)
        batches = batches_of(encoded([record["prompt"] for record in task["train"][: args.prompts]], tokenizer), 8)
        folder = Path(args.adapters) / f"lora-{name}"
        modules = list(read_lora(folder).loras)
        with adapted(model, args.merged) as under:
            merged = input_spreads(under, modules, batches, directions=DIRECTIONS)
        with adapted(model, folder) as under:
            for strength in args.strengths:
                own = input_spreads(under, modules, batches, directions=DIRECTIONS, strengths=strength)
                table.add_row(name, f"{strength:g}", *(f"{gap:.3f}" for gap in distances(own, merged, modules)))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
