"""How much does a model forget? Learn tasks one after the other in several ways, and score all of them after each.

python recipes/forgetting.py --data DIR                               # dbpedia, SST-2, yahoo, agnews; every way
python recipes/forgetting.py --methods growing dense+projection       # on the embedded tasks, offline

Two scores of the first token after the prompt: greedy (it is the label's, among all tokens) and label (among the first
tokens of the labels; chance is a floor that hides forgetting). No way but `separate` is told what task a prompt is of.
Every stage is kept in --output: the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import data


# name: (adapter, alpha / r, whether each task gets parameters of its own, whether they are projected). The weights of
# a gated block sum to 1, so its update is smaller than a LoRA's at the same alpha.
WAYS = {
    "separate": ("lora", 2, False, False),
    "sequential": ("lora", 2, False, False),
    "growing": ("dense", 2, True, False),
    "bank": ("bank", 6, True, False),
    "task": ("task", 6, True, False),
    "dense+projection": ("dense", 2, True, True),
    "task+projection": ("task", 6, True, True),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(WAYS), choices=WAYS, help="ways to learn (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run of each way for each (%(default)s)")
    parser.add_argument("--data", metavar="DIR", help="read DIR/TASK/{train,test}.jsonl instead of embedded tasks")
    parser.add_argument("--tasks", nargs="+", help="in this order (dbpedia SST-2 yahoo agnews; or the embedded ones)")
    parser.add_argument("--words", type=int, default=48, help="cut passages to so many words (%(default)s)")
    parser.add_argument("--model", default=data.EMBEDDED, metavar="NAME_OR_DIR", help="base (SmolLM2-135M from PyPI)")
    parser.add_argument("--device", help="cpu, cuda, … (cuda where there is one)")
    parser.add_argument("--steps", type=int, default=45, help="optimizer steps a task (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--r", type=int, default=8, help="rank, or experts a task (%(default)s)")
    parser.add_argument("--adapter", type=json.loads, default={}, metavar="JSON", help="arguments of the config")
    parser.add_argument("--callback", type=json.loads, default={}, metavar="JSON", help="arguments of the callback")
    parser.add_argument("--output", default="out/forgetting", metavar="DIR", help="where it all goes (%(default)s)")
    return parser.parse_args()


def adapter_config(way: str, r: int, given: dict[str, Any]) -> Any:
    from peft import LoraConfig

    from peft_mora import MoraConfig

    adapter, scale, _, _ = WAYS[way]
    common = {"r": r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if adapter == "lora":
        return LoraConfig(**{"lora_alpha": scale * r, **common, **given})
    return MoraConfig(**{"routing": adapter, "alpha": scale * r, **common, **given})


def learn(way: str, seed: int, tasks: list[dict[str, Any]], folders: list[Path], args: argparse.Namespace) -> Any:
    """Train the last of `tasks` on top of what folders[-2] holds, save to folders[-1], and return the model."""
    from peft import PeftModel, get_peft_model
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from peft_mora import start_task
    from trl_callbacks import OrthogonalProjectionCallback

    _, _, grows, projects = WAYS[way]
    set_seed(seed)
    model, tokenizer = data.load_base(args.base, args.device)
    if len(tasks) == 1 or way == "separate":
        model = get_peft_model(model, adapter_config(way, args.r, args.adapter))
    else:
        model = PeftModel.from_pretrained(model, folders[-2], is_trainable=True)
        if grows:
            start_task(model, tasks[-1]["name"])
    callbacks = []
    if projects:
        memory = folders[-2] / "subspace" if len(tasks) > 1 else None
        callbacks = [OrthogonalProjectionCallback(memory, **args.callback)]
    config = SFTConfig(
        output_dir=str(folders[-1]),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="warmup_stable_decay",  # a constant rate ends wherever the last batches have pushed it
        lr_scheduler_kwargs={"num_decay_steps": args.steps // 3},
        warmup_steps=args.steps // 10,
        logging_steps=max(1, args.steps // 5),
        max_length=512,
        gradient_checkpointing=False,
        use_cpu=args.device == "cpu",
        seed=seed,
        save_strategy="no",
        report_to="none",
    )
    train = data.to_dataset(tasks[-1]["train"])
    trainer = SFTTrainer(model, args=config, train_dataset=train, processing_class=tokenizer, callbacks=callbacks)
    trainer.train()
    trainer.save_model()
    return trainer.model, tokenizer


def score(model: Any, tokenizer: Any, task: dict[str, Any], batch_size: int) -> dict[str, float]:
    """Share of test prompts whose first token is right, among all tokens and among the labels' first tokens."""
    import torch

    firsts = torch.tensor([tokenizer(" " + label, add_special_tokens=False).input_ids[0] for label in task["labels"]])
    if len(set(firsts.tolist())) < len(firsts):
        raise ValueError(f"Two labels of {task['name']} begin with the same token: {task['labels']}.")
    records = sorted(task["test"], key=lambda record: len(record["prompt"]))
    tokenizer.padding_side = "left"
    hits = {"greedy": 0, "label": 0}
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        inputs = tokenizer([r["prompt"] for r in batch], return_tensors="pt", padding=True).to(model.device)
        positions = (inputs.attention_mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(**inputs, position_ids=positions, logits_to_keep=1).logits[:, -1].float().cpu()
        right = firsts[[task["labels"].index(r["answer"]) for r in batch]]
        hits["greedy"] += int((logits.argmax(-1) == right).sum())
        hits["label"] += int((firsts[logits[:, firsts].argmax(-1)] == right).sum())
    return {name: count / len(records) for name, count in hits.items()}


def run(way: str, seed: int, tasks: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The scores of every task after every stage, as rows; a stage that is on disk is not run again."""
    root = Path(args.output) / f"{way}-{seed}"
    folders = [root / f"{i}-{task['name']}" for i, task in enumerate(tasks)]
    rows: list[dict[str, Any]] = []
    for stage, folder in enumerate(folders):
        path = folder / "scores.json"
        if not path.exists():
            model, tokenizer = learn(way, seed, tasks[: stage + 1], folders[: stage + 1], args)
            model.eval()
            seen = tasks[stage : stage + 1] if way == "separate" else tasks[: stage + 1]
            found = {task["name"]: score(model, tokenizer, task, args.batch_size) for task in seen}
            data.write_json(path, found)
            print(f"{way}, seed {seed}, after {tasks[stage]['name']}: {found}", flush=True)
        scores = json.loads(path.read_text(encoding="utf-8"))
        rows += [{"way": way, "seed": seed, "stage": stage, "task": name, **s} for name, s in scores.items()]
    return rows


def main() -> None:
    args = parse()
    import torch
    from rich.console import Console
    from rich.table import Table

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    data.claim(Path(args.output), args, "device", "output", "methods", "seeds")
    names = args.tasks or (["dbpedia", "SST-2", "yahoo", "agnews"] if args.data else list(data.TASKS))
    tasks = [data.read_task(args.data, n, args.words) if args.data else data.make_task(n) for n in names]
    embedded = args.model == data.EMBEDDED
    args.base = data.embedded_model() if embedded else data.nf4_folder(args.model, Path(args.output) / "base-nf4")
    table = Table("method", "seed", *names, "AA", "BWT", title="label / greedy accuracy after the last task")
    for seed in args.seeds:
        for way in args.methods:
            scores = {(row["stage"], row["task"]): row for row in run(way, seed, tasks, args)}
            learnt = [scores[stage, name] for stage, name in enumerate(names)]
            last = learnt if way == "separate" else [scores[len(names) - 1, name] for name in names]
            cells = [f"{end['label']:.2f}/{end['greedy']:.2f}" for end in last]
            aa = {s: mean(end[s] for end in last) for s in ("label", "greedy")}
            bwt = {s: mean(end[s] - r[s] for end, r in zip(last[:-1], learnt, strict=False)) for s in aa}
            table.add_row(way, str(seed), *cells, *(f"{m['label']:.3f}/{m['greedy']:.3f}" for m in (aa, bwt)))
    Console().print(table)
    print(f"Every stage's adapter and scores are in {args.output}.")


if __name__ == "__main__":
    main()
