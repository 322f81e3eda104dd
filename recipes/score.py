"""Score an adapter on the 4-bit base that it was trained on with lm-eval, through the kernels of training.

python recipes/score.py --adapter out/sft                            # the embedded helpdesk task
python recipes/score.py --adapter out/sft --task arc_easy hellaswag --limit 200 --baseline
python recipes/score.py --adapter out/sft --task my_task --data my_data --perplexity passages.jsonl

--adapter is a folder that PEFT opens (MORA, LORI, FLYLORA, LoRA, …); without it the base alone is scored. --task takes
names that lm-eval knows (its own, or those of --include_path), folders NAME/{train,test}.jsonl in --data, and embedded
tasks. The last line printed is the plain `lm_eval` command for the same thing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from shared import runs, scores
from shared.base_model import EMBEDDED, find_base
from shared.embedded_tasks import TASKS
from shared.lm_eval_tasks import write_lm_eval_perplexity, write_lm_eval_tasks
from shared.tasks import find_task


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__, model=None, data=None, limit=None, output="out/score")
    parser.add_argument("--adapter", metavar="DIR", help="adapter to score (none: the base alone)")
    parser.add_argument("--baseline", action="store_true", help="score the base without the adapter as well")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16), help="4: an NF4 copy of it (%(default)s)")
    parser.add_argument("--task", "--tasks", nargs="+", default=[], metavar="NAME", help="what to score (helpdesk)")
    parser.add_argument("--include_path", metavar="DIR", help="more lm-eval task files")
    parser.add_argument("--perplexity", metavar="FILE", help="JSONL passages (text or page): is the language kept?")
    parser.add_argument(
        "--passage_words", type=int, default=48, metavar="N",
        help="cut the passages of --data tasks to N words, as demo.py trains; 0: not at all, as sft.py (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--apply_chat_template", action="store_true", help="ask as in a chat (trained on messages)")
    parser.add_argument("--batch_size", type=int, default=8, help="(%(default)s)")
    args = parser.parse_args()
    args.task = runs.names(",".join(args.task))
    if not args.task and not args.perplexity:
        args.task = ["helpdesk"]
    return args


def write_tasks(args: argparse.Namespace, folder: Path) -> tuple[list[str], list[str]]:
    """Write the tasks that are not lm-eval's into `folder`; (their names, the names that lm-eval has to know)."""
    folder.mkdir(parents=True, exist_ok=True)
    ours, known = [], []
    for name in args.task:
        if name in TASKS or (args.data and (Path(args.data) / name).is_dir()):
            ours.append(find_task(name, args.data, args.passage_words or None))
        else:
            known.append(name)
    written = [task + kind for task in write_lm_eval_tasks(ours, folder) for kind in ("", "_greedy")]
    return written + ([write_lm_eval_perplexity(args.perplexity, folder)] if args.perplexity else []), known


def main() -> None:
    args = parse()
    from lm_eval.tasks import TaskManager

    output = Path(args.output).resolve()
    tasks = output / "tasks"
    written, known = write_tasks(args, tasks)
    names = written + known
    folders = [str(tasks), *([args.include_path] if args.include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in known):
        manager = TaskManager(include_path=folders)  # thousands of files, which takes seconds
    if unknown := [name for name in known if not manager.match_tasks([name])]:
        raise SystemExit(
            f"lm-eval knows no task {', '.join(unknown)}. Give one of its own (`lm_eval ls tasks`), a folder with its "
            f"YAML as --include_path, the folder of NAME/*.jsonl as --data, or one of {', '.join(TASKS)}"
        )
    base = args.model or EMBEDDED
    if args.adapter and not args.model:
        base = PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
        if not base:
            raise SystemExit(f"{args.adapter} does not say which base it is for: give it as --model NAME_OR_DIR")
    base = find_base(base, args.device, args.bits)
    model, tokenizer = scores.load(base, args.adapter, args.device)

    def score() -> dict[str, Any]:
        options = {"limit": args.limit, "apply_chat_template": args.apply_chat_template}
        return scores.lm_eval(model, tokenizer, names, manager, args.batch_size, **options)

    results = {"adapter" if args.adapter else "base": score()}
    if args.baseline and args.adapter:
        with model.disable_adapter():
            results["base"] = score()

    table = Table("task", "metric", *results, "±", "samples", title=f"{args.adapter or 'no adapter'} on {base}")
    shown = next(iter(results.values()))
    for name, metrics in shown["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            columns = [f"{found['results'][name][key]:.4g}" for found in results.values()]
            samples = shown.get("n-samples", {}).get(name, {}).get("effective", "")
            table.add_row(name, metric, *columns, f"{error:.2g}" if isinstance(error, float) else "", str(samples))
    Console(width=120).print(table)
    record = {"model": base, "adapter": args.adapter, "limit": args.limit, **results}
    (output / "results.json").write_text(json.dumps(record, indent=1, default=str, ensure_ascii=False) + "\n")
    print(f"Everything lm-eval reports: {output / 'results.json'}. The same with plain lm-eval:")
    more = f" --batch_size {args.batch_size}" + (f" --limit {args.limit}" if args.limit else "")
    more += " --apply_chat_template" if args.apply_chat_template else ""
    for group, folder in ((written, tasks), (known, args.include_path)):  # it takes one folder at a time
        if group:
            print(" ", scores.plain_lm_eval(base, args.adapter, group, folder, args.device) + more)


if __name__ == "__main__":
    main()
