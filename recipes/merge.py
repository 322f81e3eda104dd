"""Adapters trained apart, then used as one: each task's accuracy with its own adapter, and with all of them merged.

python recipes/merge.py                                  # three embedded tasks, every method, on a CPU
python recipes/merge.py --methods lora --rules two-passes inputs iso-c mean --ways cat ties svd --merged-ranks sum 16 8
python recipes/merge.py --methods lora --data DIR --tasks agnews,museum --ranks 8,4 --seeds 0 100 --perplexity FILE
python recipes/merge.py --methods lora --reuse --rules two-passes --settings '{"floor": 0}' '{"passes": 3}' \\
    --score-on train                          # the second line's adapters again; choose settings on training records

One set of adapters is trained for each seed and method, task i from seed S + i, and merged by every rule, rank,
setting and number of prompts; a row of OUTPUT/merge.csv each, as it comes. --reuse takes what is there already. With
--protect they learn outside of what general text needs, which is what others' inputs are closest to: merged without
data they keep more.

LoRA, LORI and FURINA are merged into one plain LoRA by the rules of peft_mora.merging (--rules): "inputs" from
statistics of --prompts training prompts that lie beside each adapter, "two-passes" by looking again under the merged
adapter; with --settings '{"distill": 64}' it learns each one's answers to these prompts then. With --prompts self they
need no data: each adapter writes what it is looked at with, for which --whole lets it learn whole texts. LoRAs are
also combined by PEFT's add_weighted_adapter (--ways), of which only "cat" is the exact sum of the updates, and LORIs
by their own, which always is. FLYLORA, SMORA and MORA choose experts for every token, so no single file equals their
sum: all adapters are active together, each chooses on its own, and the updates add up. Their weights go into the
adapters' scaling, which the choice does not depend on.

kept: greedy accuracy over that of each task's own adapter, of the means over tasks that are learnt; kept_rest: over
the others. A task is learnt where its own adapter's greedy accuracy is at least .1 above chance: the base's accuracy
in choosing among the labels, or 1 / labels where that is more. Perplexity of "each task its own" is the worst of them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import chain, product
from pathlib import Path
from typing import Any

from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from shared import runs, scores
from shared.base_model import find_base, load_base
from shared.lm_eval_tasks import write_lm_eval_perplexity, write_lm_eval_tasks
from shared.tasks import find_task
from shared.training import NAMES, adapter_config, comparable, protectable, train
from transformers import set_seed

from peft_mora import METHODS
from peft_mora.base import AdapterLinear
from peft_mora.merging import (
    AFTER,
    RULES,
    MergeReport,
    check_arguments,
    check_looks,
    check_rule,
    collect_inputs,
    merge_adapters,
    options_of,
)
from peft_mora.merging.adapters import check_weights
from peft_mora.merging.inputs import check_looking
from peft_mora.opening import with_adapter
from trl_callbacks import OrthogonalProjectionCallback, protect
from trl_callbacks.general_text import check_source


TWO_PASSES = "two-passes"
SELF = "self"
OF_PROMPTS = {"last", "answer_tokens", "max_length"}
LORA_WAYS = ("cat", "linear", "ties", "dare_ties")
PRUNED = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
EVERY_WAY = ("cat", "linear", "svd", *PRUNED, *(f"{way}_svd" for way in PRUNED))  # with svd: minutes on a CPU
MARGIN = 0.1  # above chance: two standard errors of a hundred prompts
KEY = ("seed", "method", "combined by", "rank", "weight", "prompts", "settings", "scored")
SHOWN = ("greedy", "label", "kept", "kept_rest", "perplexity")
ENDS = {"greedy": "", "label": " label"}  # of the columns of a task
ARGUMENTS = {"before", "after", "weights", "canonical"}
ANY_RULE = ARGUMENTS | {*chain.from_iterable(map(options_of, AFTER.values()))}
LOOKING = {  # a rule looks with what the first takes, by default as the second does
    "inputs": (check_looking, collect_inputs),
    TWO_PASSES: (check_looks, merge_adapters),
}


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__, data=None, r=8, steps=40, batch_size=8, lr=1e-3, limit=None, output="out/merge")
    add = parser.add_argument
    add("--seeds", nargs="+", type=runs.number, default=[0], help="task i's adapter and order: S + i (%(default)s)")
    add("--same-a", action="store_true", help="all adapters of a run from one seed, S")
    add("--tasks", type=runs.names, default="helpdesk,warehouse,museum", metavar="A,B,C", help="(%(default)s)")
    add("--ranks", type=numbers, metavar="R,R,R", help="of each task's adapter (--r for all)")
    add("--protect", metavar="SOURCE", help="of the training: self, or a file, whose directions adapters leave alone")
    add("--methods", nargs="+", default=NAMES, choices=NAMES, help="(all)")
    add("--ways", nargs="*", default=LORA_WAYS, choices=EVERY_WAY, help="LoRA: combination_type (%(default)s)")
    add("--weights", nargs="+", type=runs.finite, help="of every adapter in these ways; a row each (1 and 1 / tasks)")
    add(
        "--rules", nargs="*", default=[TWO_PASSES, "inputs", "iso-c"], choices=[TWO_PASSES, *RULES],
        help="of peft_mora.merging, for what merges (%(default)s)",
    )  # fmt: skip
    add(
        "--merged-ranks", "--rank", nargs="+", default=["sum"], type=runs.merged_rank, metavar="RANK",
        help="of the merged, also in the ways with svd: sum, numbers, or energies; a row each (%(default)s)",
    )  # fmt: skip
    add("--whole", action="store_true", help="adapters learn whole texts, and not answers alone: they write prompts")
    add(
        "--prompts", nargs="+", type=prompts, default=[64], metavar="N",
        help=f"training prompts a task to look at, or {SELF}: what each adapter writes (%(default)s)",
    )  # fmt: skip
    add(
        "--settings", nargs="+", action="extend", type=runs.fields, metavar="JSON",
        help="arguments of merge_adapters, a row each for every rule that takes them all ({})",
    )  # fmt: skip
    add("--perplexity", metavar="FILE", help="JSON lines of passages (text or page): is the language kept?")
    add("--scorer", default="answers", choices=("answers", "lm-eval"), help="a forward a prompt, or its evaluator")
    add(
        "--metrics", nargs="+", default=scores.METRICS, choices=scores.METRICS,
        help="greedy alone is quicker; the base has both (both)",
    )  # fmt: skip
    add("--score-on", default="test", choices=("test", "train"), help="train: records that are no prompts")
    add("--reuse", action="store_true", help="take adapters and rows that are in --output, make the others")
    args = parser.parse_args()
    args.settings = args.settings or [{}]
    if "greedy" not in args.metrics:
        parser.error("--metrics: what is kept is of greedy accuracy, so greedy has to be there")
    if args.protect and (free := [method for method in args.methods if not protectable(method)]):
        parser.error(
            f"--protect: the projection cannot hold {', '.join(free)}, whose A is frozen or no A of the input"
        )
    if args.ranks and len(args.ranks) != len(args.tasks):
        parser.error(f"--ranks has {len(args.ranks)} ranks for {len(args.tasks)} tasks")
    if SELF in args.prompts and not args.whole:
        parser.error(f"--prompts {SELF} needs --whole: adapters that learn answers alone write no prompts")
    for settings in args.settings:
        if args.prompts == [SELF] and (idle := settings.keys() & OF_PROMPTS):
            parser.error(f"--settings {json.dumps(settings)}: --prompts {SELF} reads no {', '.join(sorted(idle))}")
        if settings and not any(takes(rule, settings) for rule in args.rules):
            known = {rule: sorted(names_of(rule)) for rule in args.rules}
            parser.error(f"--settings {json.dumps(settings)}: no rule of --rules takes that, but {known}")
        for rule in args.rules:
            try:
                check_settings(rule, settings, len(args.tasks))
            except (TypeError, ValueError) as error:
                parser.error(f"--settings {json.dumps(settings)}: {error}")
    return args


def prompts(text: str) -> int | str:
    return text if text == SELF else runs.count(text)


def numbers(text: str) -> list[int]:
    return [runs.count(part) for part in text.split(",")]


def looks_with(rule: str) -> set[str]:
    """What a rule takes to look at the adapters with."""
    return set(inspect.signature(LOOKING[rule][0]).parameters) - {"model"} if rule in LOOKING else set()


def names_of(rule: str) -> set[str]:
    """What a rule takes as its settings."""
    return ANY_RULE | set(RULES["inputs" if rule == TWO_PASSES else rule].options()) | looks_with(rule)


def takes(rule: str, settings: Mapping[str, Any]) -> bool:
    return settings.keys() <= names_of(rule)


def check_settings(rule: str, settings: Mapping[str, Any], tasks: int) -> None:
    """Refuse values that no merge takes, in settings that the rule does."""
    if takes(rule, settings):
        before, after = settings.get("before", ()), settings.get("after", ())
        weights, looks = check_weights(settings.get("weights"), tasks), looks_with(rule)
        options = {name: value for name, value in settings.items() if name not in ARGUMENTS | looks}
        named = "inputs" if rule == TWO_PASSES else rule
        check_arguments(named, "sum", before, after, options)
        check_rule(named, weights, options)
        if rule in LOOKING:
            check, looking = LOOKING[rule]
            defaults = inspect.signature(looking).parameters
            check(**{name: settings.get(name, defaults[name].default) for name in looks})


class Scorer:
    """Accuracy of tasks and perplexity of passages, of any model."""

    def __init__(self, tasks: list[dict[str, Any]], folder: Path, args: argparse.Namespace) -> None:
        from lm_eval.tasks import TaskManager

        self.tasks, self.args, self.size = {task["name"]: task for task in tasks}, args, 4 * args.batch_size
        self.on = args.score_on  # as rows say it; how many records are left over depends on --prompts
        if args.score_on == "train":
            self.tasks = {name: {**task, "test": held_out(task, args)} for name, task in self.tasks.items()}
            self.on = f"train: {sum(len(task['test']) for task in self.tasks.values())}"
        self.own = dict(zip(self.tasks, write_lm_eval_tasks(list(self.tasks.values()), folder), strict=True))
        self.passages = write_lm_eval_perplexity(args.perplexity, folder) if args.perplexity else None
        self.manager = TaskManager(include_path=str(folder), include_defaults=False)

    def task(self, model: Any, tokenizer: Any, name: str, metrics: Sequence[str]) -> dict[str, float]:
        """{NAME: greedy accuracy, NAME label: accuracy among its labels}, those of `metrics`."""
        if self.args.scorer == "answers":
            task = self.tasks[name]
            labels = task["labels"] if "label" in metrics else None
            found = scores.answers(model, tokenizer, task["test"][: self.args.limit], self.size, labels)
            return {name + ENDS[metric]: found[metric] for metric in metrics}
        ours = self.own[name]
        options = {"limit": self.args.limit, "bootstrap_iters": 0}
        every = {"greedy": (f"{ours}_greedy", "exact_match,label"), "label": (ours, "acc,none")}
        asked = {name + ENDS[metric]: every[metric] for metric in metrics}
        own = [task for task, _ in asked.values()]
        results = scores.lm_eval(model, tokenizer, own, self.manager, self.size, **options)["results"]
        return {column: results[task][value] for column, (task, value) in asked.items()}

    def perplexity(self, model: Any, tokenizer: Any) -> dict[str, float]:
        if self.passages is None:
            return {}
        found = scores.word_perplexity(model, tokenizer, self.passages, self.manager, self.args.batch_size)
        return {"perplexity": found}

    def __call__(self, model: Any, tokenizer: Any, metrics: Sequence[str]) -> dict[str, float]:
        found = self.perplexity(model, tokenizer)
        for name in self.tasks:
            found |= self.task(model, tokenizer, name, metrics)
        return found


def held_out(task: dict[str, Any], args: argparse.Namespace) -> list[dict[str, str]]:
    """The last training records, as many as test ones, without those that are looked at as prompts."""
    rest = task["train"][max([0, *(count for count in args.prompts if count != SELF)]) :]
    if not rest:
        raise SystemExit(f"--score-on train: all {len(task['train'])} records of {task['name']} are --prompts")
    return rest[-(args.limit or len(task["test"])) :]


def means(row: Mapping[str, Any], tasks: list[Any]) -> dict[str, float]:
    """Of the accuracies that the row has, over all tasks."""
    values = {key: [row.get(task["name"] + end, "") for task in tasks] for key, end in ENDS.items()}
    return {key: sum(map(float, found)) / len(tasks) for key, found in values.items() if "" not in found}


def summary(
    row: Mapping[str, Any], base: Mapping[str, Any], own: Mapping[str, Any], tasks: list[Any]
) -> dict[str, Any]:
    """Means over tasks, and what is kept of the own adapters' greedy accuracy."""
    names = [task["name"] for task in tasks]
    floor = {t["name"]: max(float(base[f"{t['name']} label"]), 1 / len(t["labels"])) + MARGIN for t in tasks}
    learnt = [name for name in names if float(own[name]) >= floor[name]]

    def ratio(part: list[str]) -> float | str:
        whole = sum(float(own[name]) for name in part)
        return sum(float(row[name]) for name in part) / whole if whole else ""

    return {
        **means(row, tasks),
        "kept": ratio(learnt),
        "kept_rest": ratio([name for name in names if name not in learnt]),
        "learnt": f"{len(learnt)} of {len(names)}",
    }


def has_sum(method: str) -> bool:
    """Whether the method's updates have one sum."""
    return method == "lora" or "add_weighted_adapter" in vars(METHODS[method].model)


def merges(method: str) -> bool:
    """Whether the method's folders are one ΔW a module, as it is configured here."""
    return has_sum(method) or not METHODS[method].model.tuner_layer_cls.merge_refusal


def combine(model: Any, method: str, way: str, weight: float, rank: int | None, names: list[str]) -> None:
    """Make the weighted combination of the named adapters the active one."""
    if way == "active together":
        model.base_model.set_adapter(names)
        for layer in (m for m in model.modules() if isinstance(m, AdapterLinear)):
            layer.scaling.update({name: layer.scaling[name] * weight for name in names})
        return
    options: dict[str, Any] = {}
    if method == "lora":  # LORI has one way, the exact sum
        options = {"combination_type": way}
        options |= {"density": 0.5} if any(kind in way for kind in ("ties", "dare", "prune")) else {}
        options |= {"svd_full_matrices": False, "svd_rank": rank} if "svd" in way else {}
    model.add_weighted_adapter(names, [weight] * len(names), "combined", **options)
    model.set_adapter("combined")


class Run:
    """One seed's adapters of one method, and all rows that are made of them."""

    def __init__(
        self, seed: int, method: str, base: str, tasks: list[Any], score: Any, output: Path, rows: runs.Rows, args: Any
    ) -> None:
        self.seed, self.method, self.base, self.tasks, self.rows, self.args = seed, method, base, tasks, rows, args
        self.output = output / f"seed-{seed}"
        self.folders = [self.output / f"{method}-{task['name']}" for task in tasks]
        self.names = [f"task{i}" for i in range(len(tasks))]  # a task's name may be none of a module
        self.ranks = args.ranks or [args.r] * len(tasks)
        self.score = score
        self.opened: tuple[Any, Any] | None = None
        self.looked: tuple[Any, ...] | None = None  # what the statistics beside the adapters are of

    def key(self, by: str, **more: Any) -> dict[str, Any]:
        return {"seed": self.seed, "method": self.method, "combined by": by, "scored": self.score.on, **more}

    def has(self, key: Mapping[str, Any], *tasks: str) -> bool:
        """Whether a row is there with all that is asked of these tasks; of none, of all of them together."""
        columns = [name + ENDS[metric] for name in tasks for metric in self.args.metrics]
        return self.rows.find(key, columns or self.args.metrics) is not None

    def bare(self) -> tuple[Any, Any]:
        """The base to look through."""
        self.opened = self.opened or load_base(self.base, self.args.device)
        return self.opened

    def adapters(self) -> tuple[Any, Any]:
        model, tokenizer = scores.load(self.base, self.folders[0], self.args.device, self.names[0])
        for name, folder in zip(self.names[1:], self.folders[1:], strict=True):
            with_adapter(model, folder, name)
        return model.eval(), tokenizer

    def train(self) -> None:
        for i, (task, folder) in enumerate(zip(self.tasks, self.folders, strict=True)):
            if self.args.reuse and (folder / "adapter_config.json").exists():
                there = PeftConfig.from_pretrained(folder).base_model_name_or_path
                if there != self.base:
                    raise SystemExit(f"{folder} was trained on {there}, not on {self.base}: give another --output")
                continue
            seed = self.seed + (0 if self.args.same_a else i)
            set_seed(seed)  # A is drawn before the trainer sets its own
            config = adapter_config(self.method, seed=seed, **comparable(self.method, self.ranks[i]))
            own = argparse.Namespace(**{**vars(self.args), "seed": seed})
            options = {"completion_only_loss": False} if self.args.whole else {}
            train(self.base, config, task["train"], folder, own, self.callbacks(), **options)

    def callbacks(self) -> list[Any]:
        """With --protect, A anywhere outside of what the text needs; all adapters of a run share its memory."""
        if not self.args.protect:
            return []
        memory = self.output.parent / "protected"
        if not memory.exists():
            model, tokenizer = self.bare()
            protect(model, self.args.protect, memory, tokenizer=tokenizer)
        return [OrthogonalProjectionCallback(memory, start="random")]

    def own(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The rows of the base, and of each task with its own adapter."""
        base_key = {**self.key("no adapter"), "method": "base"}
        names = [task["name"] for task in self.tasks]
        keys = [self.key(f"{name} alone") for name in names]
        together = self.key("each task its own")
        if self.rows.find(base_key) and self.has(together) and all(map(self.has, keys, names)):
            return self.rows.find(base_key) or {}, self.rows.find(together) or {}
        model, tokenizer = self.adapters()
        if self.rows.find(base_key) is None:
            with model.disable_adapter():
                found = self.score(model, tokenizer, scores.METRICS)  # its labels are what is learnt above
            self.rows.add(base_key, found | means(found, self.tasks))
        for key, name, task in zip(keys, self.names, self.tasks, strict=True):
            if not self.has(key, task["name"]):
                model.set_adapter(name)
                found = self.score.task(model, tokenizer, task["name"], self.args.metrics)
                self.rows.add(key, found | self.score.perplexity(model, tokenizer))
        every = {}
        for key, task in zip(keys, self.tasks, strict=True):
            row = self.rows.find(key) or {}
            every |= {name: row[name] for name in (task["name"] + end for end in ENDS.values())}
        worst = [row["perplexity"] for key in keys if (row := self.rows.find(key) or {}) and row["perplexity"]]
        every |= {"perplexity": max(worst, key=float)} if worst else {}
        base = self.rows.find(base_key) or {}
        if not self.has(together):
            self.rows.add(together, every | summary(every, base, every, self.tasks))
        return base, self.rows.find(together) or {}

    def add(self, key: dict[str, Any], opened: tuple[Any, Any], seconds: float | str = "") -> None:
        base, own = self.own()
        found = self.score(*opened, self.args.metrics)
        self.rows.add(key, found | summary(found, base, own, self.tasks) | {"seconds": seconds})

    def combined(self) -> Iterator[tuple[dict[str, Any], str, float, int | None]]:
        """The rows of what the method or PEFT combines: key, way, weight, rank."""
        every = ["exact sum" if has_sum(self.method) else "active together"]
        for way in self.args.ways if self.method == "lora" else every:
            whole = sum(self.ranks)
            cuts = [whole if k == "sum" else k for k in self.args.merged_ranks if not isinstance(k, float)]
            for k, weight in product(cuts if "svd" in way else [None], self.args.weights):
                yield self.key(way, weight=exactly(weight), rank="" if k is None else k), way, weight, k

    def merged(self) -> Iterator[tuple[dict[str, Any], str, Any, int | str, dict[str, Any]]]:
        """The rows of our rules: key, rule, rank, prompts, settings."""
        for rule in self.args.rules if merges(self.method) else ():
            counts = self.args.prompts if rule in LOOKING else [0]
            for count, settings, k in product(counts, self.args.settings, self.args.merged_ranks):
                if takes(rule, settings):
                    shown = json.dumps(settings) if settings else ""
                    yield self.key(rule, rank=k, prompts=count or "", settings=shown), rule, k, count, settings

    def merge(self, rule: str, k: Any, count: int | str, settings: dict[str, Any]) -> tuple[Path, float]:
        """Merge by one rule into a folder of its own; (it, seconds of looking and merging)."""
        short = sha256(json.dumps(settings).encode()).hexdigest()[:8] if settings else ""
        parts = (self.method, "merged", rule, k, count or "", short)
        folder = self.output / "-".join(str(part) for part in parts if part != "")
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        texts: Any = SELF
        if isinstance(count, int):
            texts = [[record["prompt"] for record in task["train"][:count]] for task in self.tasks]
            texts = dict(zip(self.folders, texts, strict=True))
        start, given = time.perf_counter(), dict(settings)
        if rule == TWO_PASSES:
            model, tokenizer = self.bare()
            given = {"model": model, "tokenizer": tokenizer, "prompts": texts, "passes": 2, **given}
        elif rule == "inputs":
            look = {name: given.pop(name) for name in looks_with(rule) & given.keys()}
            if self.looked != (count, *look.items()):
                model, tokenizer = self.bare()
                for adapter in self.folders:
                    collect_inputs(model, texts if texts == SELF else texts[adapter], adapter, tokenizer, **look)
                self.looked = (count, *look.items())
        name = "inputs" if rule == TWO_PASSES else rule
        report = merge_adapters(self.folders, name, k, seed=self.seed, output=folder, **given)
        seconds = time.perf_counter() - start
        print(report, flush=True)
        plot(report, [task["name"] for task in self.tasks], folder / "interference.png")
        return folder, seconds

    def __call__(self) -> None:
        self.train()
        self.own()
        for key, way, weight, k in self.combined():
            if not self.has(key):
                model, tokenizer = self.adapters()
                start = time.perf_counter()
                with said(way):
                    combine(model, self.method, way, weight, k, self.names)
                    self.add(key, (model, tokenizer), time.perf_counter() - start)
        for key, *how in self.merged():
            if not self.has(key):
                with said(how[0]):
                    folder, seconds = self.merge(*how)
                    self.add(key, scores.load(self.base, folder, self.args.device), seconds)


@contextmanager
def said(name: str) -> Iterator[None]:
    """A combination that these adapters do not allow is no row, and the run goes on."""
    try:
        yield
    except ValueError as error:
        print(f"{name}, refused: {error}", flush=True)


def plot(report: MergeReport, names: list[str], path: Path) -> None:
    """Cosines of the updates, and how much one adds to another's outputs."""
    from matplotlib.figure import Figure

    tables = {"cosine of updates": report.cosine}
    if report.interference is not None:
        empty = [float("nan")] * len(names)
        tables["column's ΔW x / row's, row's x"] = [row or empty for row in report.interference]
    figure = Figure(figsize=(len(tables) * (3 + 0.5 * len(names)), 2.5 + 0.5 * len(names)), layout="constrained")
    for axes, (title, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        axes.imshow(table, vmin=0, vmax=1)
        axes.set_title(title)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.5 else "white")
    figure.savefig(path, dpi=120)


def exactly(number: float) -> str:
    """As short as it can be without being another."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def mean(values: list[str]) -> str:
    return f"{sum(map(float, values)) / len(values):.3f}" if values else ""


def show(rows: list[dict[str, Any]], names: list[str], title: str) -> None:
    """Means over seeds, a row each."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEY[1:]), []).append(row)
    columns = [*SHOWN, "learnt", *names]
    table = Table(*KEY[1:], "seeds", *columns, title=title)
    for key, found in groups.items():
        values = [[row[name] for row in found if row[name] != ""] for name in columns]
        cells = [
            " ".join(dict.fromkeys(part)) if name == "learnt" else mean(part)
            for name, part in zip(columns, values, strict=True)
        ]
        table.add_row(*key, str(len(found)), *cells)
    Console(width=max(120, 15 * (len(columns) + len(KEY)))).print(table)


def clear(output: Path) -> None:
    """Delete a run: all its adapters, of whatever method and seed, and what says how they were made the last."""
    shutil.rmtree(output / "protected", ignore_errors=True)
    for folder in list(output.glob("seed-*/*-*")):
        if re.fullmatch(r"seed--?\d+", folder.parent.name) and folder.is_dir() and folder.name.split("-")[0] in NAMES:
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    for path in (output / "merge.csv", output / "run.json"):
        path.unlink(missing_ok=True)


def main() -> None:
    args = parse()
    args.weights = args.weights or [1.0, 1 / len(args.tasks)]
    output = Path(args.output).resolve()
    # What can be wrong with the arguments is found before anything is deleted.
    tasks = {seed: [find_task(name, args.data, seed=seed) for name in args.tasks] for seed in args.seeds}
    for method, r in product(args.methods, args.ranks or [args.r]):
        adapter_config(method, **comparable(method, r))
    base = find_base(args.model, args.device)
    check_source(args.protect, base)
    free = "device output seeds methods ways weights rules merged_ranks prompts settings metrics score_on reuse"
    records = runs.digest([find_task(name, args.data) for name in args.tasks])  # the same for all seeds
    content = {"base": base, "records": records, **runs.files(args, "perplexity", "protect")}
    claim = partial(runs.claim, output, args, *free.split(), **content)
    if args.reuse:
        claim()
    else:
        runs.check_program(output)  # before it is deleted
    scorers = {seed: Scorer(tasks[seed], output / f"seed-{seed}" / "tasks", args) for seed in args.seeds}
    if not args.reuse:
        clear(output)
        claim()
    of_tasks = [name + end for end in ENDS.values() for name in args.tasks]
    rows = runs.Rows(output / "merge.csv", KEY, SHOWN, ["learnt", "seconds", *of_tasks], args.reuse)
    for seed, method in product(args.seeds, args.methods):
        Run(seed, method, base, tasks[seed], scorers[seed], output, rows, args)()
    show(rows.rows, args.tasks, f"means over seeds, {args.steps} steps a task")
    print(f"Adapters, merged ones with their reports and interference.png, and merge.csv are in {output}")


if __name__ == "__main__":
    main()
