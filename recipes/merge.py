"""Adapters trained apart, then used as one: each task's accuracy with its own adapter, and with all of them combined.

python recipes/merge.py                                  # three embedded tasks, every method, on a CPU
python recipes/merge.py --methods lora lori --weights 0.5
python recipes/merge.py --methods lora --ways svd ties --rules two-passes inputs tsv mean --rank 8
python recipes/merge.py --model Qwen/Qwen3-0.6B --data my_data --tasks a,b,c --device cuda

LoRA and LORI are merged into one plain LoRA by the rules of peft_mora.merging (--rules; "inputs" and "two-passes" look
at --prompts training prompts of each task), and combined by PEFT's add_weighted_adapter, in several ways of which only
"cat" is the exact sum of the updates, or by LORI's own, which always is. FLYLORA and MORA choose experts for every
token, so no single file equals their sum: all adapters are active together, each chooses on its own, and the updates
add up. Their weights go into the adapters' scaling, which the choice does not depend on.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path
from typing import Any

from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from shared import runs, scores
from shared.base_model import find_base, load_base
from shared.tasks import find_task
from shared.training import NAMES, adapter_config, comparable, train

from peft_mora import METHODS
from peft_mora.base import AdapterLinear
from peft_mora.merging import RULES, merge_adapters


TWO_PASSES = "two-passes"
LORA_WAYS = ("cat", "linear", "ties", "dare_ties")  # "svd" as well: minutes on a CPU


def parse() -> argparse.Namespace:
    parser = runs.parser(
        __doc__, data=None, r=8, steps=40, batch_size=8, lr=1e-3, limit=None, seed=0, output="out/merge"
    )
    parser.add_argument(
        "--tasks", type=runs.names, default="helpdesk,warehouse,museum", metavar="A,B,C", help="(%(default)s)"
    )
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES, help="(all)")
    parser.add_argument(
        "--ways", nargs="+", default=LORA_WAYS, help="LoRA: combination_type; svd takes minutes on a CPU"
    )
    parser.add_argument("--weights", nargs="+", type=float, help="of every adapter; a row each (1 and 1 / tasks)")
    parser.add_argument(
        "--rules", nargs="*", default=[TWO_PASSES, "inputs", "tsv"], choices=[TWO_PASSES, *RULES],
        help="of peft_mora.merging, for LoRA and LORI (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rank", default="sum", type=rank, help="of the merged: sum, a number, or an energy (%(default)s)"
    )
    parser.add_argument("--prompts", type=int, default=64, help="training prompts a task to look at (%(default)s)")
    parser.add_argument("--reuse", action="store_true", help="take adapters that are in --output, train the others")
    return parser.parse_args()


def rank(text: str) -> str | int | float:
    return text if text == "sum" else float(text) if "." in text else int(text)


def ways(method: str, args: argparse.Namespace) -> list[str]:
    if method == "lora":
        return args.ways
    return ["exact sum" if "add_weighted_adapter" in vars(METHODS[method].model) else "active together"]


def combine(model: Any, method: str, way: str, weight: float, names: list[str]) -> None:
    """Make the weighted combination of the named adapters the active one."""
    if way == "active together":
        model.base_model.set_adapter(names)
        for layer in (m for m in model.modules() if isinstance(m, AdapterLinear)):
            layer.scaling.update({name: layer.scaling[name] * weight for name in names})
        return
    extra = {"density": 0.5} if "ties" in way else {"svd_full_matrices": False} if way == "svd" else {}
    options = {"combination_type": way, **extra} if method == "lora" else {}  # LORI has one way, the exact sum
    model.add_weighted_adapter(names, [weight] * len(names), "combined", **options)
    model.set_adapter("combined")


def merge(rule: str, base: str, folders: list[Path], tasks: list[dict], folder: Path, args: argparse.Namespace) -> str:
    """Merge by one rule into `folder`, and say how the report found it."""
    looking: dict[str, Any] = {}
    if rule in (TWO_PASSES, "inputs"):
        model, tokenizer = load_base(base, args.device)
        prompts = [[record["prompt"] for record in task["train"][: args.prompts]] for task in tasks]
        looking = {"model": model, "tokenizer": tokenizer, "prompts": dict(zip(folders, prompts, strict=True))}
        looking["passes"] = 2 if rule == TWO_PASSES else 1
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    name = "inputs" if rule == TWO_PASSES else rule
    return str(merge_adapters(folders, name, args.rank, seed=args.seed, output=folder, **looking))


def measure(method: str, base: str, folders: list[Path], tasks: list[dict], args: argparse.Namespace) -> list[list]:
    """The method's rows: how it was combined, the weight, and each task's accuracy."""
    names = [f"task{i}" for i in range(len(folders))]

    def open_adapters() -> tuple[Any, Any]:
        model, tokenizer = scores.load(base, folders[0], args.device, names[0])
        for name, folder in zip(names[1:], folders[1:], strict=True):
            model.load_adapter(folder, name)
        return model.eval(), tokenizer

    def score(task: dict[str, Any], active: str | None = None) -> float:
        if active:
            model.set_adapter(active)
        return scores.answers(model, tokenizer, task["test"][: args.limit], 4 * args.batch_size)["greedy"]

    model, tokenizer = open_adapters()
    rows = []
    if method == args.methods[0]:
        with model.disable_adapter():
            rows.append(["base", "no adapter", "", *map(score, tasks)])
    rows.append([method, "each task its own", "", *map(score, tasks, names)])
    for way in ways(method, args):
        for weight in args.weights:
            model, tokenizer = open_adapters()
            combine(model, method, way, weight, names)
            rows.append([method, way, f"{weight:.3g}", *map(score, tasks)])
    for rule in args.rules if "active together" not in ways(method, args) else ():
        folder = folders[0].parent / f"{method}-merged-{rule}"
        print(merge(rule, base, folders, tasks, folder, args), flush=True)
        model, tokenizer = scores.load(base, folder, args.device)
        rows.append([method, f"{rule}, rank {model.peft_config['default'].r}", "", *map(score, tasks)])
    return rows


def main() -> None:
    args = parse()
    names = args.tasks
    tasks = [find_task(name, args.data, seed=args.seed) for name in names]
    args.weights = args.weights or [1.0, 1 / len(tasks)]
    output = Path(args.output).resolve()
    base = find_base(args.model, args.device)
    header = ["method", "combined by", "weight", *names, "mean"]
    table = Table(*header, title=f"accuracy (greedy), {args.steps} steps a task")
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "merge.csv", "w", newline="") as file:
        csv.writer(file).writerow(header)
        for method in args.methods:
            folders = [output / f"{method}-{name}" for name in names]
            for i, (task, folder) in enumerate(zip(tasks, folders, strict=True)):
                if args.reuse and (folder / "adapter_config.json").exists():
                    there = PeftConfig.from_pretrained(folder).base_model_name_or_path
                    if there != base:
                        raise SystemExit(f"{folder} was trained on {there}, not on {base}: give another --output")
                else:
                    # A seed for each: random projections of their own keep the updates apart.
                    config = adapter_config(method, seed=args.seed + i, **comparable(method, args.r))
                    train(base, config, task["train"], folder, args)
            for row in measure(method, base, folders, tasks, args):
                row.append(sum(row[3:]) / len(tasks))
                table.add_row(*row[:3], *(f"{score:.2f}" for score in row[3:]), end_section=row[1] == "no adapter")
                csv.writer(file).writerow(row)
            file.flush()  # a method's rows are there before the next one is trained
    Console(width=120).print(table)
    print(f"Adapters and merge.csv are in {output}")


if __name__ == "__main__":
    main()
