"""Every method on the same tasks at equal trainable parameters, each at several learning rates.

python recipes/measure/methods.py                                           # all methods, two embedded tasks
python recipes/measure/methods.py --tasks mood --methods lora smora furina --rates 1e-3
python recipes/measure/methods.py --data DIR --tasks agnews --seeds 0 1 2   # DIR/agnews/{train,test}.jsonl

The rank of a method is the one at which its trainable parameters come nearest to a LoRA's of rank --r, the rest of its
settings those at which methods compare (shared/training.py). All test prompts are scored, by a forward each. A row
comes as soon as a run has ended; the same command goes on after it was stopped, and more methods, tasks, rates and
seeds join the same table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Any

from transformers import set_seed


sys.path.append(str(Path(__file__).parent.parent))  # of `shared`
from shared import runs, scores
from shared.base_model import find_base, load_base
from shared.tasks import find_task
from shared.training import NAMES, adapter_config, comparable, equal_rank, linear_shapes, make_trainer, trainable


KEY = ("task", "method", "rate", "seed")
SHOWN = ("greedy", "label", "loss", "seconds a step")


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__, data=None, r=8, steps=60, batch_size=8, limit=None, output="out/methods")
    add = parser.add_argument
    add("--tasks", type=runs.names, default="mood,warehouse", metavar="A,B", help="(%(default)s)")
    add("--methods", nargs="+", default=NAMES, choices=NAMES, help="(all)")
    add("--rates", nargs="+", type=runs.rate, default=[5e-4, 1e-3, 2e-3], help="peak learning rates (%(default)s)")
    add("--seeds", nargs="+", type=runs.number, default=[0], help="of the adapter and the order (%(default)s)")
    return parser.parse_args()


def train_and_score(
    base: str, config: Any, task: dict[str, Any], rate: float, seed: int, folder: Path, args: argparse.Namespace
) -> dict[str, float]:
    set_seed(seed)
    model, tokenizer = load_base(base, args.device)
    trainer = make_trainer(model, tokenizer, task["train"], folder, args.steps, args.batch_size, rate, seed, config)
    seconds = trainer.train().metrics["train_runtime"]
    found = scores.answers(
        trainer.model.eval(), tokenizer, task["test"][: args.limit], args.batch_size, task["labels"]
    )
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {**found, "seconds a step": seconds / args.steps, "parameters": trained}


def markdown(rows: list[dict[str, str]]) -> str:
    """The best rate of each method on each task, by greedy accuracy and then by label, and what the others give."""
    rates = sorted({row["rate"] for row in rows}, key=float)
    head = ["task", "method", "r", "parameters", "best rate", "greedy", "label", "s a step"]
    head += [f"greedy, label at {float(rate):g}" for rate in rates]
    lines = []
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        means = {
            rate: [statistics.mean(float(row[name]) for row in own if row["rate"] == rate) for name in SHOWN]
            for rate in dict.fromkeys(row["rate"] for row in own)
        }
        best = max(means, key=lambda rate: means[rate][:2])
        greedy, label, _, seconds = means[best]
        shown = ["{:.2f}, {:.2f}".format(*means[rate][:2]) if rate in means else "" for rate in rates]
        lines.append([
            task, method, own[0]["r"], f"{int(own[0]['parameters']):,}", f"{float(best):g}", f"{greedy:.2f}",
            f"{label:.2f}", f"{seconds:.2f}", *shown,
        ])  # fmt: skip
    return runs.markdown(head, lines)


def main() -> None:
    args = parse()
    output = Path(args.output).resolve()
    base = find_base(args.model, args.device)
    tasks = {name: find_task(name, args.data) for name in args.tasks}
    content = {"base": Path(base).name, **{f"records of {name}": runs.digest(task) for name, task in tasks.items()}}
    runs.claim(output, args, "device", "output", "methods", "tasks", "rates", "seeds", **content)
    shapes = linear_shapes(load_base(base, args.device)[0])
    ranks = {method: equal_rank(method, args.r, shapes) for method in args.methods}
    for method, (r, parameters) in ranks.items():
        of_lora = parameters / trainable("lora", args.r, shapes)
        print(f"{method}: {comparable(method, r)}, {parameters:,} trainable parameters, {of_lora:.2f} of LoRA's")
    rows = runs.Rows(output / "methods.csv", KEY, SHOWN, ["r", "parameters"])
    for seed, (name, task), rate, method in product(args.seeds, tasks.items(), args.rates, args.methods):
        key = {"task": name, "method": method, "rate": rate, "seed": seed}
        if rows.find(key) is None:
            config = adapter_config(method, seed=seed, **comparable(method, ranks[method][0]))
            found = train_and_score(base, config, task, rate, seed, output / "run", args)
            rows.add(key, {**found, "r": config.r})
    text = markdown(rows.rows)
    (output / "methods.md").write_text(text + "\n", encoding="utf-8")
    print(text, f"\nmethods.csv and methods.md are in {output}")


if __name__ == "__main__":
    main()
