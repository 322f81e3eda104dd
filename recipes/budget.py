"""What a budget of active experts buys: quality against experts a token and a layer, one training run a budget.

python recipes/budget.py                                # MORA, r = 8, budgets 8 4 2 1, embedded helpdesk task
python recipes/budget.py --method flylora --r 32 --budgets 32 16 8 4
python recipes/budget.py --step-time                    # what counting costs: step time with and without
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import data


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="mora", choices=("mora", "flylora"), help="(%(default)s)")
    parser.add_argument("--r", type=int, default=8, help="experts a layer; each run starts with all (%(default)s)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[8, 4, 2, 1], help="mean active experts (8 4 2 1)")
    parser.add_argument("--rebalance", action="store_true", help="divide the total between layers by measured need")
    parser.add_argument("--task", default="helpdesk", choices=data.TASKS, help="embedded task (%(default)s)")
    parser.add_argument("--model", default=data.EMBEDDED, metavar="NAME_OR_DIR", help="base (SmolLM2-135M from PyPI)")
    parser.add_argument("--device", help="cpu, cuda, … (cuda where there is one)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps a run (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of adapter and order (%(default)s)")
    parser.add_argument("--output", default="out/budget", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--step-time", action="store_true", help="only compare step times with and without counters")
    return parser.parse_args()


def adapter_config(args: argparse.Namespace) -> Any:
    from peft_mora import FlyLoraConfig, MoraConfig

    common = {"r": args.r, "alpha": 6 * args.r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    mora = args.method == "mora"
    return MoraConfig(temperature=0.1, **common) if mora else FlyLoraConfig(top_k=args.r, density=0.25, **common)


def evaluate(model: Any, tokenizer: Any, task: dict[str, Any]) -> tuple[float, float]:
    """Share of test prompts whose own label scores highest, and the mean loss of that label's first token, in nats."""
    import torch

    labels = [tokenizer(" " + label, add_special_tokens=False).input_ids[0] for label in task["labels"]]  # all differ
    right = loss = 0.0
    for record in task["test"]:
        ids = tokenizer(record["prompt"], return_tensors="pt").to(model.device)
        with torch.no_grad():
            scores = model.eval()(**ids).logits[0, -1].float().log_softmax(-1)
        answer = task["labels"].index(record["answer"])
        right += int(scores[labels].argmax()) == answer
        loss -= scores[labels[answer]].item()
    return right / len(task["test"]), loss / len(task["test"])


def train(budget: float, base: Path, task: dict[str, Any], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run that starts with all experts and ends at `budget`; a row of the table."""
    from peft import PeftModel
    from trl import SFTConfig, SFTTrainer

    from trl_callbacks import ActivationBudgetCallback

    model, tokenizer = data.load_base(base, args.device)
    config = SFTConfig(
        output_dir=str(folder), max_steps=args.steps, per_device_train_batch_size=args.batch_size, max_length=512,
        learning_rate=args.lr, lr_scheduler_type="constant_with_warmup", warmup_steps=args.steps // 10,
        logging_steps=max(1, args.steps // 4), gradient_checkpointing=False, use_cpu=args.device == "cpu",
        seed=args.seed, save_strategy="no", report_to="none",
    )  # fmt: skip
    callback = ActivationBudgetCallback(budget, interval=max(1, args.steps // 8), rebalance=args.rebalance)
    trainer = SFTTrainer(
        model, args=config, train_dataset=data.to_dataset(task["train"]), processing_class=tokenizer,
        peft_config=adapter_config(args), callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    logged = [entry for entry in trainer.state.log_history if "active_experts" in entry][-1]
    # from disk, on a fresh base: K of every layer comes from the adapter's config
    accuracy, loss = evaluate(PeftModel.from_pretrained(data.load_base(base, args.device)[0], folder), tokenizer, task)
    measured = {key: logged[key] for key in ("active_experts", "usage_entropy", "dead_experts")}
    return {"budget": budget, "accuracy": accuracy, "loss": loss, **measured}


def step_time(base: Path, task: dict[str, Any], args: argparse.Namespace) -> None:
    """Forward, backward and a plain optimizer step over one batch, with and without counters, taking turns."""
    import torch
    from peft import get_peft_model

    from peft_mora.usage import UsageMeter

    model, tokenizer = data.load_base(base, args.device)
    model = get_peft_model(model, adapter_config(args)).train()
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
            torch.cuda.synchronize() if args.device.startswith("cuda") else None
            times += [time.perf_counter() - begin] if step else []
    for name, times in arms.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratio = statistics.median(t / t0 for t, t0 in zip(times, arms["no counters"], strict=True))
        print(f"{name:18} median {middle:.3f} s, quartiles {low:.3f} to {high:.3f}, paired ratio {ratio:.4f}")


def main() -> None:
    args = parse()
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(args.output).resolve()
    task = data.make_task(args.task)
    base = data.embedded_model() if args.model == data.EMBEDDED else Path(args.model)
    if args.step_time:
        return step_time(base, task, args)
    rows = [train(budget, base, task, output / f"{args.method}-{budget:g}", args) for budget in args.budgets]
    print(*rows, sep="\n")
    with open(output / "budget.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    from matplotlib.figure import Figure

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
