"""What the callbacks bring: embedded tasks, each callback beside the same training without it, at several rates.

python recipes/measure/callbacks.py                                            # all of it, hours on a CPU
python recipes/measure/callbacks.py --scenes apart --ways lora coto osrm --rates 1e-3
python recipes/measure/callbacks.py --scenes mixed --tasks mood,helpdesk --seeds 0 1 2

mixed    all tasks in every batch: LoRA, the same with GradientSurgeryCallback, and MTLLORA
apart    an adapter for each of the first two tasks: LoRA, the same with each rule of AdapterPenaltyCallback, with
         start="osrm", and with RankGrowthCallback from half the rank; LoRA's, "coto"'s and "osrm"'s also merged, by
         rule "sum" and "mean"
prompts  one prompt through the first two tasks, with PromptProjectionCallback from the second on and without

Ways of a scene train as many parameters as a LoRA of rank --r, as nearly as they can. All test prompts are scored, by
a forward each; "apart" also has the perplexity of general passages that nothing was trained or aligned with, over the
base's, and KL(base ‖ adapted) there. A row comes as soon as it is scored; the same command goes on after it was
stopped, and more scenes, ways, rates and seeds join the same table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from peft import PromptTuningConfig
from transformers import set_seed


sys.path.append(str(Path(__file__).parent.parent))  # of `shared`
from shared import runs, scores
from shared.base_model import find_base, load_base
from shared.general_passages import HELD_OUT, PROTECTED
from shared.tasks import find_task
from shared.training import adapter_config, comparable, equal_rank, linear_shapes, make_trainer, train

from peft_mora import set_task
from peft_mora.merging import merge_adapters
from trl_callbacks import (
    AdapterPenaltyCallback,
    GradientSurgeryCallback,
    OrthogonalProjectionCallback,
    PromptProjectionCallback,
    RankGrowthCallback,
    TaskColumnCallback,
    protect,
)
from trl_callbacks.drift import drift
from trl_callbacks.general_text import read


KEY = ("scene", "way", "rate", "seed", "scored")
SHOWN = ("greedy", "label", "loss", "perplexity ratio", "kl", "parameters", "seconds a step")
# way of "apart": callbacks from (steps, r, folders with the other tasks' inputs)
APART: dict[str, Callable[[int, int, list[Path]], list[Any]]] = {
    "lora": lambda steps, r, others: [],
    "lorasculpt": lambda steps, r, others: [AdapterPenaltyCallback("lorasculpt", at=steps // 2)],
    "alignguard": lambda steps, r, others: [AdapterPenaltyCallback("alignguard", source=list(PROTECTED))],
    "coto": lambda steps, r, others: [AdapterPenaltyCallback("coto")],
    "osrm": lambda steps, r, others: [OrthogonalProjectionCallback(others, start="osrm")],
    "growth": lambda steps, r, others: [RankGrowthCallback(r, interval=max(1, steps // 12))],
}
MERGED = ("lora", "coto", "osrm")
WAYS = {"mixed": ("lora", "surgery", "mtllora"), "apart": (*APART,), "prompts": ("prompt", "projected")}


def parse() -> argparse.Namespace:
    every = list(dict.fromkeys(way for ways in WAYS.values() for way in ways))
    parser = runs.parser(__doc__, data=None, r=8, steps=60, batch_size=8, limit=None, output="out/callbacks")
    add = parser.add_argument
    add("--tasks", type=runs.names, default="mood,warehouse,helpdesk", metavar="A,B,…", help="(%(default)s)")
    add("--scenes", nargs="+", default=[*WAYS], choices=WAYS, help="(all)")
    add("--ways", nargs="+", default=every, choices=every, help="of each scene (all)")
    add("--rates", nargs="+", type=runs.rate, default=[1e-3, 2e-3], help="peak learning rates (%(default)s)")
    add("--prompt-rates", nargs="+", type=runs.rate, default=[0.01, 0.03], help="of prompts (%(default)s)")
    add("--prompt-steps", type=runs.count, default=200, help="of each task (%(default)s)")
    add("--virtual-tokens", type=runs.count, default=20, help="of the prompt (%(default)s)")
    add("--seeds", nargs="+", type=runs.number, default=[0], help="of the adapter and the order (%(default)s)")
    args = parser.parse_args()
    if len(args.tasks) < 2:
        parser.error("--tasks: give two or more")
    for option, way in (("steps", "lorasculpt"), ("r", "growth")):
        if "apart" in args.scenes and way in args.ways and getattr(args, option) < 2:
            parser.error(f"--{option} {getattr(args, option)}: {way} takes half of it, so at least 2")
    for scene in args.scenes:
        if not set(WAYS[scene]) & set(args.ways):
            parser.error(f"--scenes {scene} has none of --ways, but {', '.join(WAYS[scene])}")
    return args


class Bench:
    """The base, the tasks, and the rows made of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.output = args, Path(args.output).resolve()
        self.base = find_base(args.model, args.device)
        free = ("device", "output", "scenes", "ways", "rates", "prompt_rates", "seeds")
        self.tasks = [find_task(name, args.data) for name in args.tasks]
        runs.claim(self.output, args, *free, base=Path(self.base).name, records=runs.digest(self.tasks))
        self.rows = runs.Rows(self.output / "callbacks.csv", KEY, SHOWN)

    @cached_property
    def shapes(self) -> Counter[tuple[int, int]]:
        """Of the base's modules, for `equal_rank`."""
        return linear_shapes(load_base(self.base, self.args.device)[0])

    def missing(self, key: dict[str, Any], *scored: str) -> bool:
        return any(self.rows.find({**key, "scored": name}) is None for name in scored)

    def train(
        self, config: Any, records: list[Any], folder: Path, rate: float, seed: int, steps: int, more: list[Any]
    ):
        set_seed(seed)  # A is drawn before the trainer sets its own
        given = argparse.Namespace(**{**vars(self.args), "lr": rate, "seed": seed, "steps": steps})
        return train(self.base, config, records, folder, given, more)

    def score(
        self, keys: list[dict[str, Any]], name: str, opened: tuple[Any, Any], task: dict[str, Any], **more: Any
    ) -> None:
        """Add rows of one score, where they are missing."""
        keys = [key for key in keys if self.missing(key, name)]
        if keys:
            records = task["test"][: self.args.limit]
            # A gap of padding behind a prompt's virtual tokens is none that it has learnt with.
            size = 1 if keys[0]["scene"] == "prompts" else self.args.batch_size
            found = scores.answers(*opened, records, size, task["labels"])
            for key in keys:
                self.rows.add({**key, "scored": name}, found | more)

    def mixed(self, way: str, rate: float, seed: int) -> None:
        key = {"scene": "mixed", "way": way, "rate": rate, "seed": seed}
        names = [task["name"] for task in self.tasks]
        if not self.missing(key, *names):
            return
        method, given = ("mtllora", {"tasks": names, "seed": seed}) if way == "mtllora" else ("lora", {})
        r, _ = equal_rank(method, self.args.r, self.shapes, **given)
        callbacks = {"surgery": [GradientSurgeryCallback()], "mtllora": [TaskColumnCallback()]}.get(way, [])
        records = [{**record, "task": task["name"]} for task in self.tasks for record in task["train"]]
        config = adapter_config(method, **comparable(method, r), **given)
        steps = self.args.steps * len(names)
        trainer = self.train(config, records, self.output / "run", rate, seed, steps, callbacks)
        for task in self.tasks:
            if way == "mtllora":
                set_task(trainer.model, task["name"])
            opened = (trainer.model.eval(), trainer.processing_class)
            self.score([key], task["name"], opened, task, **cost(trainer))

    def apart(self, way: str, rate: float, seed: int) -> None:
        pair = self.tasks[:2]
        key = {"scene": "apart", "way": way, "rate": rate, "seed": seed}
        r = self.args.r // 2 if way == "growth" else self.args.r
        folders = [self.output / f"{way}-{task['name']}-{rate:g}-{seed}" for task in pair]
        for i, (task, folder) in enumerate(zip(pair, folders, strict=True)):
            if self.missing(key, task["name"]):
                others = [self.inputs(other) for other in pair if other is not task] if way == "osrm" else []
                callbacks = APART[way](self.args.steps, self.args.r, others)
                config = adapter_config("lora", **comparable("lora", r))
                # Adapters of two tasks begin with two A.
                trainer = self.train(config, task["train"], folder, rate, seed + i, self.args.steps, callbacks)
                opened = scores.load(self.base, folder, self.args.device)
                self.score([key], task["name"], opened, task, **kept(*opened), **cost(trainer))
        for rule in ("sum", "mean") if way in MERGED else ():
            merged = [f"{task['name']}, {rule}" for task in pair]
            if self.missing(key, *merged):
                folder = self.output / f"{way}-{rule}-{rate:g}-{seed}"
                if not folder.exists():
                    merge_adapters(folders, rule, output=folder)
                opened = scores.load(self.base, folder, self.args.device)
                found = kept(*opened)
                for name, task in zip(merged, pair, strict=True):
                    self.score([key], name, opened, task, **found)

    def inputs(self, task: dict[str, Any]) -> Path:
        """The memory of what goes into the base's modules on a task's training records."""
        folder = self.output / f"inputs-{task['name']}"
        if not folder.exists():
            model, tokenizer = load_base(self.base, self.args.device)
            texts = [f"{record['prompt']} {record['answer']}" for record in task["train"]]
            protect(model, texts, folder, tokenizer=tokenizer, whole=True)
        return folder

    def prompts(self, ways: list[str], rate: float, seed: int) -> None:
        one, two = self.tasks[:2]
        scored = (one["name"], f"{one['name']} after {two['name']}", two["name"])
        keys = {way: {"scene": "prompts", "way": way, "rate": rate, "seed": seed} for way in ways}
        if not any(self.missing(key, *scored) for key in keys.values()):
            return
        set_seed(seed)
        model, tokenizer = load_base(self.base, self.args.device)
        config = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=self.args.virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB"
        )
        options = (self.args.prompt_steps, self.args.batch_size, rate, seed)

        def learn(task: dict[str, Any], folder: Path, memory: Path | None, config: Any = None) -> Any:
            callbacks = [PromptProjectionCallback(memory)]  # without a memory it only keeps the prompt in float32
            trainer = make_trainer(model, tokenizer, task["train"], folder, *options, config, callbacks)
            trainer.train()
            return trainer

        first = learn(one, self.output / "prompt", None, config)
        model = first.model
        prompt = model.prompt_encoder["default"].embedding.weight
        learnt = prompt.detach().clone()
        self.score([*keys.values()], scored[0], (model.eval(), tokenizer), one, **cost(first))
        for way, key in keys.items():
            prompt.data = learnt.clone()
            memory = self.output / "prompt" / "subspace" if way == "projected" else None
            trainer = learn(two, self.output / f"prompt-{way}", memory)
            for name, task in zip(scored[1:], (one, two), strict=True):
                self.score([key], name, (model.eval(), tokenizer), task, **cost(trainer))


def kept(model: Any, tokenizer: Any) -> dict[str, float]:
    """Of general language, with the adapter: perplexity over the base's, and KL from it in nats a token."""
    found = drift(model, read(list(HELD_OUT), tokenizer, sys.maxsize, model))
    return {"perplexity ratio": found["perplexity"] / found["base_perplexity"], "kl": found["kl"]}


def cost(trainer: Any) -> dict[str, float]:
    """Parameters that train at the end, and seconds a step."""
    seconds = next(entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {"parameters": trained, "seconds a step": seconds / trainer.state.max_steps}


def markdown(rows: list[dict[str, str]]) -> str:
    """A table a scene, means over seeds: greedy accuracy, and × perplexity over the base's where it is known."""
    tables = []
    for scene in dict.fromkeys(row["scene"] for row in rows):
        here = [row for row in rows if row["scene"] == scene]
        scored = list(dict.fromkeys(row["scored"] for row in here))
        lines = []
        for way, rate in dict.fromkeys((row["way"], row["rate"]) for row in here):
            own = [row for row in here if (row["way"], row["rate"]) == (way, rate)]

            def mean(name: str, form: str, of: list[dict[str, str]]) -> str:
                values = [float(row[name]) for row in of if row[name]]
                return form.format(statistics.mean(values)) if values else ""

            cells = [
                ", ".join(filter(None, (mean("greedy", "{:.2f}", of), mean("perplexity ratio", "× {:.3f}", of))))
                for of in ([row for row in own if row["scored"] == name] for name in scored)
            ]
            seeds = str(len({row["seed"] for row in own}))
            lines.append(
                [way, rate, seeds, mean("parameters", "{:,.0f}", own), mean("seconds a step", "{:.2f}", own), *cells]
            )
        tables.append(
            f"{scene}\n\n" + runs.markdown(["way", "rate", "seeds", "parameters", "s a step", *scored], lines)
        )
    return "\n\n".join(tables)


def main() -> None:
    args = parse()
    bench = Bench(args)
    for seed, scene in product(args.seeds, args.scenes):
        ways = [way for way in WAYS[scene] if way in args.ways]
        if scene == "prompts":
            for rate in args.prompt_rates:
                bench.prompts(ways, rate, seed)
        else:
            for rate, way in product(args.rates, ways):
                getattr(bench, scene)(way, rate, seed)
    text = markdown(bench.rows.rows)
    (bench.output / "callbacks.md").write_text(text + "\n", encoding="utf-8")
    print(text, f"\ncallbacks.csv and callbacks.md are in {bench.output}", sep="\n")


if __name__ == "__main__":
    main()
