"""Score an adapter on the 4-bit base that it was trained on with lm-eval, through the kernels of training.

python recipes/score.py --adapter out/sft                            # the embedded helpdesk task
python recipes/score.py --adapter out/sft --task arc_easy hellaswag --limit 200 --baseline
python recipes/score.py --adapter out/sft --task my_task --data my_data --perplexity passages.jsonl
python recipes/score.py --adapter out/sft --task helpdesk --perplexity embedded --report --max-drift 0.02

--adapter is a folder that PEFT opens (MORA, LORI, FLYLORA, LoRA, …); without it the base alone is scored. --task takes
names that lm-eval knows (its own, or those of --include_path), folders NAME/{train,test}.jsonl in --data, and embedded
tasks. The last line printed is the plain `lm_eval` command for the same thing. --report writes a page, before and
after; with --max-drift the status is 1 where what is to be kept (--general, --perplexity) has lost more than that.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from shared import report, runs, scores
from shared.base_model import EMBEDDED, find_base
from shared.embedded_tasks import TASKS
from shared.lm_eval_tasks import names_in_lm_eval, read_passages, write_lm_eval_perplexity, write_lm_eval_tasks
from shared.tasks import find_task, is_task

from peft_mora.files import whole_file
from peft_mora.lora_file import check_base_kept
from peft_mora.opening import revision_of
from trl_callbacks.drift import drift
from trl_callbacks.general_text import read


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__, model=None, data=None, limit=None, output="out/score")
    parser.add_argument("--adapter", metavar="DIR", help="adapter to score (none: the base alone)")
    parser.add_argument("--baseline", action="store_true", help="score the base without the adapter as well")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16), help="4: an NF4 copy of it (%(default)s)")
    parser.add_argument("--task", "--tasks", nargs="+", default=[], metavar="NAME", help="what to score (helpdesk)")
    parser.add_argument("--include_path", metavar="DIR", help="more lm-eval task files")
    parser.add_argument("--general", nargs="+", default=[], metavar="NAME", help="tasks to score that are to be kept")
    parser.add_argument(
        "--perplexity", metavar="FILE",
        help=f"JSONL passages (text or page), or {EMBEDDED}, a few that are here: is the language kept?",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="write report.html, before and after (with --baseline)")
    parser.add_argument(
        "--max-drift", type=runs.bound, metavar="SHARE",
        help="exit with 1 where general perplexity grew, or a score of --general fell, by more (with --report)",
    )  # fmt: skip
    runs.add_records(parser)
    parser.add_argument("--apply_chat_template", action="store_true", help="ask as in a chat (trained on messages)")
    parser.add_argument("--batch_size", type=runs.count, default=8, help="(%(default)s)")
    args = parser.parse_args()
    try:
        args.task, args.general = (runs.names(",".join(names)) if names else [] for names in (args.task, args.general))
    except argparse.ArgumentTypeError as error:
        parser.error(f"--task, --general: {error}")
    if not args.task and not args.general and not args.perplexity:
        args.task = ["helpdesk"]
    args.report = args.report or args.max_drift is not None
    args.baseline = args.baseline or args.report
    if args.report and not args.adapter:
        parser.error("a report is of an adapter and its base: give --adapter DIR")
    if args.max_drift is not None and not args.general and not args.perplexity:
        parser.error(
            "--max-drift bounds what is lost of general ability, and nothing here measures that: give --perplexity "
            f"FILE, --perplexity {EMBEDDED}, or --general NAME, a task that the adapter was not trained on"
        )
    return args


def write_tasks(args: argparse.Namespace, folder: Path) -> tuple[list[str], list[str], set[str]]:
    """Write the tasks that are not lm-eval's into `folder`; (their names, the names that lm-eval has to know, which of
    all are to be kept)."""
    folder.mkdir(parents=True, exist_ok=True)
    ours, known, general = [], [], set()
    for name in dict.fromkeys([*args.task, *args.general]):
        if is_task(name, args.data):
            ours.append(find_task(name, args.data, args.passage_words, args.seed))
        else:
            known.append(name)
    general.update(name for name in known if name in args.general)
    written = []
    for task, name in zip(ours, write_lm_eval_tasks(ours, folder), strict=True):
        both = [name, f"{name}_greedy"]
        written += both
        general.update(both if task["name"] in args.general else ())
    if args.perplexity:
        written.append(write_lm_eval_perplexity(args.perplexity, folder))
        general.add(written[-1])
    return written, known, general


def make_report(
    args: argparse.Namespace, results: dict[str, Any], names: list[str], general: set[str], base: str, model: Any,
    passages: list[Any],
) -> dict[str, Any]:  # fmt: skip
    """All that report.html shows, as results.json has it."""
    names = sorted(names, key=general.__contains__)  # what is to be kept comes last
    found = report.rows(results["base"], results["adapter"], names, general)
    drifts = None
    if passages:
        tokens = sum(int(batch["attention_mask"][:, 1:].sum()) for batch in passages)
        drifts = drift(model, passages) | {"tokens": tokens, "passages": len(passages)}
    config = model.peft_config["default"]
    fields = ("r", "alpha", "lora_alpha", "top_k", "routing", "sparsity", "density")
    method = {field: getattr(config, field) for field in fields if getattr(config, field, None) is not None}
    versions = {"python": platform.python_version()}
    for package in ("peft-mora", "torch", "peft", "transformers", "bitsandbytes", "lm-eval"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from its folder, or a 16-bit base
            continue
    conditions = {
        "base": base,
        "adapter": str(args.adapter),
        "method": ", ".join([config.peft_type.value, *(f"{field} {value}" for field, value in method.items())]),
        "samples": f"the first {args.limit} of each task" if args.limit else "all",
        "prompts": "through the chat template" if args.apply_chat_template else "as they are",
        "device": args.device,
        "versions": ", ".join(f"{package} {number}" for package, number in versions.items()),
        "command": shlex.join(["python", "recipes/score.py", *sys.argv[1:]]),
    }
    return {**report.judge(found, args.max_drift), "rows": found, "drift": drifts, "conditions": conditions}


def main() -> None:
    args = parse()
    if args.perplexity not in (None, EMBEDDED) and not Path(args.perplexity).is_file():
        raise SystemExit(f"--perplexity {args.perplexity}: no such file; give JSON lines of passages, or {EMBEDDED}")
    from lm_eval.tasks import TaskManager

    output = Path(args.output).resolve()
    tasks = output / "tasks"
    written, known, general = write_tasks(args, tasks)
    names = written + known
    folders = [str(tasks), *([args.include_path] if args.include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(names_in_lm_eval(name, manager) for name in known):
        manager = TaskManager(include_path=folders)  # thousands of files, which takes seconds
    meant = {name: names_in_lm_eval(name, manager) for name in known}
    if unknown := [name for name in known if not meant[name]]:
        raise SystemExit(
            f"lm-eval knows no task {', '.join(unknown)}. Give one of its own (`lm_eval ls tasks`), a folder with its "
            f"YAML as --include_path, the folder of NAME/*.jsonl as --data, or one of {', '.join(TASKS)}"
        )
    names = list(dict.fromkeys(chain.from_iterable(meant.get(name, [name]) for name in names)))
    general = set(chain.from_iterable(meant.get(name, [name]) for name in general))
    base, revision = args.model or EMBEDDED, {}
    if args.adapter:
        try:
            config = PeftConfig.from_pretrained(args.adapter)
        except ValueError as error:
            raise SystemExit(f"--adapter {args.adapter}: {error}") from error
        if config.task_type not in (None, "CAUSAL_LM"):
            raise SystemExit(
                f"{args.adapter} is of {config.task_type}, and language models (CAUSAL_LM) are scored here"
            )
        if args.baseline:
            check_base_kept({args.adapter: config})
        base = args.model or config.base_model_name_or_path
        if not base:
            raise SystemExit(f"{args.adapter} does not say which base it is for: give it as --model NAME_OR_DIR")
        revision = revision_of(args.adapter, base)
    base = find_base(base, args.device, args.bits, **revision)
    model, tokenizer = scores.load(base, args.adapter, args.device)
    passages = []
    if args.report and args.perplexity:
        passages = read(read_passages(args.perplexity)[: args.limit], tokenizer, sys.maxsize, model)

    def score() -> dict[str, Any]:
        options = {"limit": args.limit, "apply_chat_template": args.apply_chat_template, "log_samples": args.report}
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
    files = {}
    if args.report:
        record["report"] = make_report(args, results, names, general, base, model, passages)
        for found in results.values():
            del found["samples"]
        files["report.html"] = report.page(record["report"])
    else:
        (output / "report.html").unlink(missing_ok=True)  # an earlier run's, whose numbers these are not
    files["results.json"] = json.dumps(record, indent=1, default=str, ensure_ascii=False) + "\n"
    for name, text in files.items():
        with whole_file(output / name) as file:
            file.write_text(text, encoding="utf-8")
    if args.report:
        print(record["report"]["verdict"])
        print(f"Before and after, on one page: {output / 'report.html'}")
    print(f"Everything lm-eval reports: {output / 'results.json'}. The same with plain lm-eval:")
    more = f" --batch_size {args.batch_size}"
    more += " --apply_chat_template" if args.apply_chat_template else ""
    for group, folder in ((written, tasks), (known, args.include_path)):  # it takes one folder at a time
        if group:
            print(" ", scores.plain_lm_eval(base, args.adapter, group, folder, args.device, args.limit) + more)
    if args.report and record["report"]["within"] is False:
        raise SystemExit(record["report"]["verdict"])  # status 1, and the sentence on stderr


if __name__ == "__main__":
    main()
