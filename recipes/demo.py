"""Train an adapter on a 4-bit base with TRL's own SFTTrainer, and see with lm-eval what it learnt and what it kept.

python recipes/demo.py                                   # MORA on the embedded helpdesk task, offline, on a CPU
python recipes/demo.py --protect none                    # faster, and what becomes of general text without protection
python recipes/demo.py --method lora mora lori flylora   # one row each
python recipes/demo.py --model Qwen/Qwen3-0.6B --data my_data --task my_task --device cuda --protect self

General text is protected where the method trains its A (MORA, LoRA): twelve passages of shared/general_passages.py.
The perplexity is that of twelve others.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shared import report, runs, scores
from shared.base_model import EMBEDDED, find_base
from shared.embedded_tasks import TASKS
from shared.general_passages import PROTECTED
from shared.lm_eval_tasks import write_lm_eval_perplexity, write_lm_eval_tasks
from shared.tasks import find_task
from shared.training import NAMES, adapter_config, comparable, protectable, train

from trl_callbacks import OrthogonalProjectionCallback
from trl_callbacks.general_text import check_source


DEFAULT_TASK = "helpdesk"  # LoRA ends at .97 on two seeds
MAX_DRIFT = 0.02  # of the verdict


def parse() -> argparse.Namespace:
    parser = runs.parser(
        __doc__, data=None, r=8, steps=60, batch_size=8, lr=1e-3, limit=None, seed=0, output="out/demo"
    )
    parser.add_argument("--method", nargs="+", default=["mora"], choices=NAMES, help="adapters to train (mora)")
    parser.add_argument(
        "--task", help=f"embedded task ({DEFAULT_TASK}; or {', '.join(TASKS)}), or a folder's name in --data"
    )
    parser.add_argument(
        "--protect", default=EMBEDDED, metavar="TEXT",
        help="general text to keep: embedded, none, self (sampled by the base, slow), or JSONL (%(default)s)",
    )  # fmt: skip
    args = parser.parse_args()
    if args.data and not args.task:
        parser.error("--data DIR needs --task NAME, a folder in DIR")
    return args


def start_peak(device: str) -> None:
    """Forget the peak so far, so that each row shows its own."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: str) -> float:
    """Most memory since start_peak: of tensors on a GPU, of the whole process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    return runs.resident_mib()


def main() -> None:
    args = parse()
    from lm_eval.tasks import TaskManager

    name = args.task or DEFAULT_TASK
    task = find_task(name, args.data, seed=args.seed)
    output = Path(args.output).resolve()
    tasks = output / "tasks"
    (task_name,) = write_lm_eval_tasks([task], tasks)
    general = write_lm_eval_perplexity(EMBEDDED, tasks)
    text = {EMBEDDED: list(PROTECTED), "none": None}.get(args.protect, args.protect)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    base = find_base(args.model, args.device)
    check_source(text, base)

    def score(adapter: Path | None = None) -> Any:
        """What lm-eval says of the task and of passages that nothing was protected with."""
        model, tokenizer = scores.load(base, adapter, args.device)
        options = {"limit": args.limit, "bootstrap_iters": 0, "log_samples": True}
        return scores.lm_eval(model, tokenizer, [task_name, general], manager, args.batch_size, **options)

    before = score()
    head = ("method", "accuracy before", "after", "perplexity before", "after", "trainable parameters")
    table, verdicts = Table(*head, "seconds", "peak MiB", title=name), []
    for method in args.method:
        folder = output / f"{method}-{name}"
        start_peak(args.device)
        begin = time.perf_counter()
        config = adapter_config(method, seed=args.seed, **comparable(method, args.r))
        protects = text is not None and protectable(method)
        callbacks = [OrthogonalProjectionCallback(protect=text)] if protects else []
        trainer = train(base, config, task["train"], folder, args, callbacks)
        for memory in () if protects else ("subspace", "protected"):  # an earlier run's, in its place now
            shutil.rmtree(folder / memory, ignore_errors=True)
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        seconds, peak = time.perf_counter() - begin, peak_mib(args.device)
        del trainer  # or it is in the next row's memory too
        found = report.rows(before, score(folder), [task_name, general], [general])
        accuracy, perplexity = (
            next(row for row in found if row["judged"] and row["general"] is g) for g in (False, True)
        )
        shown = [f"{accuracy[when]:.2f}" for when in ("before", "after")]
        shown += [f"{perplexity[when]:.1f}" for when in ("before", "after")]
        table.add_row(method, *shown, f"{trainable:,}", f"{seconds:.0f}", f"{peak:.0f}")
        how = "general text protected" if protects else "nothing protected"
        verdicts.append(f"{method}, {how}: {report.judge(found, MAX_DRIFT)['verdict']}")
    Console(width=120).print(table)
    print(*verdicts, sep="\n")
    print(f"Saved in {output}: " + ", ".join(f"{method}-{name}" for method in args.method))
    print("Evaluate one again with plain lm-eval:")
    print(" ", scores.plain_lm_eval(base, folder, [task_name], tasks, args.device, args.limit))


if __name__ == "__main__":
    main()
