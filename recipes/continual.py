"""Learn tasks one after the other, in one way or several: TRL's SFTTrainer, and all tasks scored after each.

python recipes/continual.py                                        # three embedded tasks, offline, on a CPU
python recipes/continual.py --data DIR --tasks a,b,c --perplexity pages.jsonl
python recipes/continual.py --ways all --scorer answers            # what each way forgets, in minutes
python recipes/continual.py --data DIR --tasks dbpedia-1of4,warehouse,dbpedia-2of4   # embedded ones too, and parts
python recipes/continual.py --model Qwen/Qwen3-0.6B --device cuda --data DIR --tasks a,b --general arc_easy

--scorer lm-eval asks its evaluator; `answers` takes one forward a prompt (shared/scores.py), many times faster. No way
but `separate` is told which task a prompt is of. Stop a run at any point and give the same command again: it goes on
where it was. Every way and seed has a folder in --output.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from shared import runs, scores
from shared.base_model import find_base, load_base
from shared.lm_eval_tasks import (
    check_tasks,
    names_in_lm_eval,
    read_passages,
    write_lm_eval_perplexity,
    write_lm_eval_tasks,
)
from shared.tasks import find_task
from shared.training import adapter_config, make_trainer
from transformers import TrainerCallback, set_seed

from peft_mora import start_task
from trl_callbacks import OrthogonalProjectionCallback, continual_metrics
from trl_callbacks.general_text import check_source


class Way(NamedTuple):
    """How tasks are learnt one after the other."""

    routing: str  # of MORA, or lora
    scale: int  # alpha / r; a gated block's weights sum to 1, so its update is smaller than a LoRA's at the same alpha
    grows: bool  # each task gets parameters of its own
    projects: bool = False  # they leave alone what earlier tasks use
    protects: bool = False  # and what general text does, from the first task on


WAYS = {
    "separate": Way("lora", 2, False),
    "sequential": Way("lora", 2, False),
    "growing": Way("dense", 2, True),
    "bank": Way("bank", 6, True),
    "task": Way("task", 6, True),
    "dense+projection": Way("dense", 2, True, True),
    "bank+projection": Way("bank", 6, True, True),
    "task+projection": Way("task", 6, True, True),
    "dense+protection": Way("dense", 2, True, True, True),
    "task+protection": Way("task", 6, True, True, True),
}
ROOM = ["directions", "room left"]  # protected, and the share of a module's dimensions that is not: means over modules


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__, data=None, r=8, steps=45, batch_size=8, lr=1e-3, limit=None, output="out/continual")
    add = parser.add_argument
    add("--ways", nargs="+", default=["dense+protection"], choices=[*WAYS, "all"], help="to learn (%(default)s)")
    add("--seeds", nargs="+", type=runs.number, default=[0], help="of adapter and order; a run each (%(default)s)")
    add("--tasks", type=runs.names, default="warehouse,helpdesk,mood", help="in this order (%(default)s)")
    add("--words", type=runs.number, default=48, help="cut passages of --data to so many; 0: not at all (%(default)s)")
    add("--scorer", default="lm-eval", choices=("lm-eval", "answers"), help="(%(default)s)")
    add("--metrics", nargs="+", default=["greedy"], choices=scores.METRICS, help="write or rank it (%(default)s)")
    add("--general", type=runs.names, default=[], metavar="A,B", help="further lm-eval tasks, groups or tags to watch")
    add("--perplexity", metavar="FILE", help="JSON lines of passages to watch the perplexity of")
    add("--save-steps", type=runs.count, default=15, help="steps between checkpoints (%(default)s)")
    add("--adapter", type=runs.fields, default={}, metavar="JSON", help="fields of the adapter's config")
    add(
        "--protect", default="self", metavar="TEXT", help="what +protection keeps: self (sampled by the base) or JSONL"
    )
    add("--callback", type=runs.fields, default={}, metavar="JSON", help="arguments of the projection's callback")
    args = parser.parse_args()
    args.ways = list(WAYS) if "all" in args.ways else args.ways
    for name, make in (
        ("adapter", lambda way: first_config(way, args.tasks[0], args)),
        ("callback", lambda way: projection(way, None, args)),
    ):
        for way in args.ways:
            try:
                make(way)
            except (TypeError, ValueError) as error:  # else after minutes of scoring
                parser.error(f"--{name} {json.dumps(getattr(args, name))}: {error}")
    return args


def first_config(way: str, task: str, args: argparse.Namespace) -> Any:
    """Of the adapter that a way begins with."""
    routing, plain = WAYS[way].routing, WAYS[way].routing == "lora"
    own = {} if plain else {"routing": routing, "tasks": [task]}
    given = {"r": args.r, "alpha": WAYS[way].scale * args.r, **own, **args.adapter}
    return adapter_config("lora" if plain else "mora", **given)


def projection(way: str, before: Path | None, args: argparse.Namespace) -> list[OrthogonalProjectionCallback]:
    """The callback of a way that has one, behind the adapter in `before`."""
    if not WAYS[way].projects:
        return []
    memory = before / "subspace" if before is not None else None
    text = args.protect if WAYS[way].protects else None
    return [OrthogonalProjectionCallback(memory, protect=text, **args.callback)]


def train(
    way: str, seed: int, task: dict[str, Any], before: Path | None, folder: Path, base: str, args: argparse.Namespace
) -> None:
    """Learn one task on top of the adapter in `before`, from the last checkpoint in `folder` if there is one."""

    class Complete(TrainerCallback):
        def on_save(self, _: Any, state: Any, *__: Any, **___: Any) -> None:  # the last of all that is written
            (folder / f"checkpoint-{state.global_step}" / "complete").touch()

    set_seed(seed)
    model, tokenizer = load_base(base, args.device)
    if before is not None:
        model = PeftModel.from_pretrained(model, before, is_trainable=True)
        if WAYS[way].grows:
            start_task(model, task["name"])
    else:
        model = get_peft_model(model, first_config(way, task["name"], args))
    callbacks = [*projection(way, before, args), Complete()]
    trainer = make_trainer(
        model, tokenizer, task["train"], folder, args.steps, args.batch_size, args.lr, seed, callbacks=callbacks,
        save_strategy="steps", save_steps=args.save_steps, save_total_limit=2,
    )  # fmt: skip
    complete = sorted(folder.glob("checkpoint-*/complete"), key=lambda path: int(path.parent.name.split("-")[1]))
    trainer.train(resume_from_checkpoint=str(complete[-1].parent) if complete else None)
    trainer.save_model()
    (folder / "trained").touch()


def watched(names: list[str], manager: Any) -> list[str]:
    """The lm-eval tasks, and groups with a score of their own, that --general names."""
    found: list[str] = []
    for name in names:
        these = names_in_lm_eval(name, manager)
        if not these:
            raise SystemExit(f"--general: lm-eval knows no task {name}; `lm_eval ls tasks` has them all")
        found += these
    for name in found:
        entry = manager.task_index[name]
        if name in manager.all_groups and not entry.cfg.get("aggregate_metric_list"):
            raise SystemExit(f"--general: {name} is a group with no score of its own; name tasks of {entry.yaml_path}")
    return list(dict.fromkeys(found))


def score(
    adapter: Path | None, path: Path, tasks: dict[str, Any], columns: list[str], base: str, managers: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, float]:  # fmt: skip
    """Scores of the adapter as it is on disk, kept in `path` one by one: what that has already is not run again.

    Args:
        tasks: ours, by lm-eval's name; their greedy score is a column of its own, NAME_greedy.
        columns: these, and what else lm-eval knows.
        managers: lm-eval's TaskManager, of each column.
    """
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if set(columns) <= set(found):
        return found
    model, tokenizer = scores.load(base, adapter, args.device)
    for name in columns:
        task = tasks.get(name.removesuffix("_greedy"))
        if name in found:
            continue
        if task is not None and args.scorer == "answers":
            labels = task["labels"] if "label" in args.metrics else None
            values = scores.answers(model, tokenizer, task["test"][: args.limit], args.batch_size, labels)
            plain = name.removesuffix("_greedy")  # both columns from one pass
            both = {f"{plain}_greedy": values["greedy"], plain: values.get("label")}
            found |= {column: value for column, value in both.items() if column in columns}
        else:
            options = {"limit": args.limit, "bootstrap_iters": 0}
            shown = scores.lm_eval(model, tokenizer, [name], managers[name], args.batch_size, **options)
            named = [(key.split(","), value) for key, value in shown["results"][name].items()]  # METRIC,FILTER
            values = {key[0]: value for key, value in named if key[1:] and isinstance(value, (int, float))}
            best = ("acc", "exact_match", "word_perplexity")
            found[name] = next((values[k] for k in best if k in values), next(iter(values.values())))
        runs.write_json(path, found)
    return found


def protected(folder: Path) -> list[float]:
    """[mean number of protected directions a module, mean share of its dimensions that is left], or [] without any."""
    path = folder / "subspace" / "subspace.json"
    if not path.exists():
        return []
    groups = [g for g in json.loads(path.read_text(encoding="utf-8"))["groups"].values() for _ in g["modules"]]
    left = [1 - group["rank"] / group["dimensions"] for group in groups]
    return [sum(group["rank"] for group in groups) / len(groups), sum(left) / len(left)]


def show(head: list[str], stages: list[str], rows: list[list[float]], shares: int, title: str, folder: Path) -> None:
    """Print the scores after each stage, and write them as matrix.csv and, the first columns, as matrix.png."""
    from matplotlib.figure import Figure

    table = Table("", *head, title=title)
    for stage, values in zip(stages, rows, strict=True):
        table.add_row(stage, *(f"{value:.2f}" for value in values))
    Console(width=120).print(table)
    with open(folder / "matrix.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["", *head], *([s, *values] for s, values in zip(stages, rows, strict=True))])
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow([values[:shares] for values in rows], vmin=0, vmax=1))
    axes.set_xticks(range(shares), head[:shares], rotation=45, ha="right")
    axes.set_yticks(range(len(stages)), stages)
    figure.savefig(folder / "matrix.png", dpi=120)


def main() -> None:
    args = parse()
    from lm_eval.tasks import TaskManager

    output = Path(args.output).resolve()
    names = args.tasks
    learnt = [find_task(name, args.data, args.words) for name in names]
    known = TaskManager() if args.general else None  # thousands of files, which takes seconds
    args.general = watched(args.general, known)
    base = find_base(args.model, args.device)
    check_tasks(learnt)
    if args.perplexity:
        read_passages(args.perplexity)
    if any(WAYS[way].protects for way in args.ways):
        check_source(args.protect, base)
    content = {"base": Path(base).name, "records": runs.digest(learnt), **runs.files(args, "perplexity", "protect")}
    runs.claim(output, args, "device", "output", "ways", "seeds", "metrics", **content)
    tasks = dict(zip(write_lm_eval_tasks(learnt, output / "tasks"), learnt, strict=True))
    of_metric = {metric: [name + "_greedy" * (metric == "greedy") for name in tasks] for metric in args.metrics}
    general = list(args.general)
    if args.perplexity:
        general.append(write_lm_eval_perplexity(args.perplexity, output / "tasks"))
    columns = [*chain.from_iterable(of_metric.values()), *general]
    head = [*(f"{name} {metric}" for metric in args.metrics for name in names), *general]
    ours = TaskManager(include_path=str(output / "tasks"), include_defaults=False)
    managers = dict.fromkeys(columns, ours) | dict.fromkeys(args.general, known)

    common = (tasks, columns, base, managers, args)
    zero_shot = score(None, output / "zero_shot.json", *common)
    table = Table("way", "seed", *head, *(f"{key} {metric}" for metric in args.metrics for key in ("AA", "BWT")))
    for way, seed in product(args.ways, args.seeds):
        root, before, rows, room = output / f"{way}-{seed}", None, [zero_shot], [[0.0, 1.0]]
        for stage, task in enumerate(learnt):
            folder = root / f"{stage + 1}-{task['name']}"
            if not (folder / "trained").exists():
                train(way, seed, task, before, folder, base, args)
            rows.append(score(folder, folder / "scores.json", *common))
            room.append(protected(folder))
            before = None if way == "separate" else folder
        stages = ["zero-shot", *(f"after {name}" for name in names)]
        matrix = [[row[name] for name in columns] for row in rows]
        shown, more = (matrix, []) if [] in room else ([a + b for a, b in zip(matrix, room, strict=True)], ROOM)
        show([*head, *more], stages, shown, len(columns) - len(general), f"{way}, seed {seed}", root)
        last, found = list(matrix[-1]), []
        for i, (metric, ours) in enumerate(of_metric.items()):
            square = [[row[name] for name in ours] for row in rows]
            if way == "separate":  # each task by its own adapter, whatever came after
                own = [square[j + 1][j] for j in range(len(names))]
                last[i * len(names) : (i + 1) * len(names)] = own
                last[len(columns) - len(general) :] = [math.nan] * len(general)  # no one adapter's
                found += [f"{sum(own) / len(own):.3f}", ""]
            else:
                values = continual_metrics(square[1:], square[0])
                found += [f"{values[key]:.3f}" if key in values else "" for key in ("AA", "BWT")]
                print(f"{metric}: " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
        table.add_row(way, str(seed), *("" if math.isnan(value) else f"{value:.2f}" for value in last), *found)
    table.title = "after the last task (separate: each task by its own adapter)"
    Console(width=120).print(table)
    print(f"Every way's matrix.csv and matrix.png, and each task's adapter in a folder of its own, are in {output}")


if __name__ == "__main__":
    main()
