"""What a budget of active experts buys: quality against experts a token and a layer, one training run a budget.

python recipes/measure/budget.py                                # MORA, r = 8, budgets 8 4 2 1, embedded helpdesk task
python recipes/measure/budget.py --method flylora --r 32 --budgets 32 16 8 4
python recipes/measure/budget.py --step-time                    # what counting costs: step time with and without
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import get_peft_model

from peft_mora import METHODS
from peft_mora.usage import UsageMeter
from trl_callbacks import ActivationBudgetCallback


sys.path.append(str(Path(__file__).parent.parent))  # of `shared`
from shared import runs, scores, training
from shared.base_model import find_base, load_base
from shared.embedded_tasks import TASKS
from shared.tasks import find_task


ROUTED = [name for name, method in METHODS.items() if hasattr(method.config, "top_k")]
OWN = {"flylora": {"density": 0.25}}


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__, r=8, steps=40, batch_size=8, lr=1e-3, output="out/budget")
    parser.add_argument("--seed", type=runs.number, default=0, help="of the adapter and the order (%(default)s)")
    parser.add_argument("--method", default="mora", choices=ROUTED, help="(%(default)s)")
    parser.add_argument("--budgets", type=runs.rate, nargs="+", default=[8, 4, 2, 1], help="mean active (8 4 2 1)")
    parser.add_argument("--rebalance", action="store_true", help="divide the total between layers by measured need")
    parser.add_argument("--task", default="helpdesk", choices=TASKS, help="embedded task (%(default)s)")
    parser.add_argument("--step-time", action="store_true", help="only compare step times with and without counters")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: at least 2, of which the last is at the budget")
    for budget in args.budgets:
        if not 1 <= budget <= args.r:
            parser.error(f"--budgets {budget:g}: from 1 to --r, {args.r} experts")
    return args


def routed_config(args: argparse.Namespace) -> Any:
    """All experts active at the start."""
    own = OWN.get(args.method, {})
    return training.adapter_config(args.method, r=args.r, alpha=6 * args.r, top_k=args.r, **own)


def train(budget: float, base: str, task: dict[str, Any], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run that starts with all experts and ends at `budget`; a row of the table."""
    callback = ActivationBudgetCallback(budget, interval=max(1, args.steps // 8), rebalance=args.rebalance)
    trainer = training.train(base, routed_config(args), task["train"], folder, args, [callback])
    logged = [entry for entry in trainer.state.log_history if "active_experts" in entry][-1]
    model, tokenizer = scores.load(base, folder, args.device)  # K of every layer comes from the adapter's config
    found = scores.answers(model, tokenizer, task["test"], args.batch_size, task["labels"])
    measured = {key: logged[key] for key in ("active_experts", "usage_entropy", "dead_experts")}
    return {"budget": budget, "accuracy": found["label"], "loss": found["loss"], **measured}


def step_time(base: str, task: dict[str, Any], args: argparse.Namespace) -> None:
    """Forward, backward and a plain optimizer step over one batch, with and without counters, taking turns."""
    model, tokenizer = load_base(base, args.device)
    model = get_peft_model(model, routed_config(args)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    prompts = [record["prompt"] for record in task["train"][: args.batch_size]]
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(args.device)
    arms: dict[str, list[float]] = {"no counters": [], "counters": [], "counters and need": []}
    for step in range(args.steps + 1):  # the first is warm-up
        for name, times in arms.items():
            meter = UsageMeter(model, need="need" in name) if name != "no counters" else None
            begin = time.perf_counter()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            if meter is not None:
                meter.sync()
                meter.close()
            runs.wait(args.device)
            times += [time.perf_counter() - begin] if step else []
    for name, times in arms.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(t / t0 for t, t0 in zip(times, arms["no counters"], strict=True))
        print(f"{name:18} median {middle:.3f} s, quartiles {low:.3f} to {high:.3f}, paired ratio {ratio:.4f}")


def main() -> None:
    args = parse()
    output = Path(args.output).resolve()
    task = find_task(args.task)
    base = find_base(args.model, args.device)
    if args.step_time:
        return step_time(base, task, args)
    rows = [train(budget, base, task, output / f"{args.method}-{budget:g}", args) for budget in args.budgets]
    print(*rows, sep="\n")
    runs.write_csv(output / "budget.csv", rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for key in ("accuracy", "loss"):
        axes.plot([row["active_experts"] for row in rows], [row[key] for row in rows], "o-", label=key)
    axes.set(xlabel="active experts a token and a layer", title=f"{args.method}, r = {args.r}, {args.task}", ylim=0)
    axes.legend()
    figure.savefig(output / "budget.png", dpi=120)
    print(f"budget.csv and budget.png written to {output}")


if __name__ == "__main__":
    main()
