"""Adapters trained apart and a router that picks one for each prompt, beside other ways to have one model of them.

python recipes/route.py                                            # four embedded tasks, adapters trained here, a CPU
python recipes/route.py --data DIR --tasks SST-2,amazon,yahoo,agnews,dbpedia,helpdesk,mood --unknown gsm8k.jsonl
python recipes/route.py --look --prompts 8 16 32 64                 # routing alone, on training prompts: no adapter
python recipes/route.py --bank out/continual/task+projection-0/4-agnews --others projected=out/continual/…/4-agnews

Ways: base (no adapter), told (each task its own adapter: the bound), router (peft_mora.TaskRouter; top2: the two
likeliest, weighted; always: never the base), similar (the nearest task by cosine of mean features, as LoraRetriever
does it), arrow (PEFT's), merged (one LoRA of all, peft_mora.merging), bank (a MORA adapter of all tasks: all blocks,
told, routed). Answers are generated, all tasks' prompts mixed in a batch. A task is a folder in --data, or embedded.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, PeftConfig, PeftModel, create_arrow_model
from rich.console import Console
from rich.table import Table
from shared import runs, scores
from shared.base_model import find_base, load_base
from shared.data import read_records
from shared.tasks import find_task
from shared.training import adapter_config, train
from torch.nn.functional import normalize
from transformers import AutoConfig, GenerationConfig

from peft_mora import TaskRouter
from peft_mora.inputs import contiguous_head, generating_by
from peft_mora.merging import merge_adapters
from peft_mora.opening import with_adapter


WAYS = ("base", "told", "router", "top2", "always", "similar", "arrow", "merged")
TITLE = "greedy accuracy of whole answers; routed: share sent to its task; unseen: none, its task not fitted"
LEARNT = ("r", "steps", "batch_size", "lr", "seed", "bare")  # what an adapter is made with, beside base and records
POOL = 160  # training prompts a task that --look draws from; what is not drawn is held out
CHAT = """\
Hi! How are you today? Can you write me a short poem about autumn?
What should I cook tonight with rice and eggs?|Explain to me like I am five why the sky is blue.
Give me three tips to sleep better.|Translate "good morning" into French.
Write a polite email to my landlord about a broken heater.
What is the capital of Australia, and how many people live there?|I feel a bit lonely lately. What can I do?
Plan a weekend in Rome for two people.|How do I reverse a list in Python?|Tell me a joke about cats.
What is the difference between a virus and a bacterium?|Summarise the plot of Hamlet in two lines.
Which exercises are good for my back?|Can you recommend a book about space travel?|How long do I boil an egg?
Write a product description for a wooden chair.|What does the word "serendipity" mean?
Fix this sentence: me go store now.|Who was Marie Curie?|I need a name for my new coffee shop.
Is it safe to drink rain water?|How can I learn to play chess?|What is a good present for my grandmother?
Convert 30 degrees Celsius to Fahrenheit.|Write a haiku about the sea.
Please make this text shorter: the meeting will take place on Monday at noon in the large room.
Thanks, that helped a lot!|Why do cats purr?|Give me a list of five European rivers.
How do I remove a wine stain?|What is compound interest?"""


def parse() -> argparse.Namespace:
    parser = runs.parser(
        __doc__, data=None, r=8, steps=45, batch_size=8, lr=1e-3, limit=None, seed=0, output="out/route"
    )
    add = parser.add_argument
    add("--tasks", type=runs.names, default="warehouse,helpdesk,mood,museum", help="folders in --data, or embedded")
    add("--words", type=runs.number, default=48, help="cut passages of --data to so many; 0: not at all (%(default)s)")
    add("--adapters", metavar="DIR", help="LoRAs, DIR/TASK or DIR/lora-TASK, learnt at --seed (none: trained now)")
    add("--ways", nargs="*", default=WAYS, choices=WAYS, help="(all; none where --bank alone is asked for)")
    add("--bank", metavar="DIR", help="a MORA adapter that has learnt the tasks, one after the other")
    add("--others", nargs="*", default=[], type=pair, metavar="NAME=DIR", help="further adapters, one model for all")
    add("--prompts", nargs="+", type=runs.count, default=[64], help="of training a task to fit with (%(default)s)")
    add(
        "--layers",
        nargs="+",
        type=runs.count,
        help="hidden states to route by; --look: each alone (8/30 of the depth)",
    )
    add("--false-alarms", type=runs.below_one, default=0.05, help="known prompts that may be none (%(default)s)")
    add("--general", metavar="FILE", help="JSON lines of general text, as the router's class none (none)")
    add("--unknown", nargs="*", default=[], metavar="FILE", help="JSON lines (text, page, question) no task is about")
    add("--perplexity", metavar="FILE", help="JSON lines of passages: is the general language kept?")
    add("--bare", action="store_true", help='tasks without their instructions: passages and "Answer:"')
    add("--look", action="store_true", help="routing alone, on training prompts: no adapter is needed")
    add("--seeds", nargs="+", type=runs.number, default=[0, 1], help="of --look's draws (%(default)s)")
    args = parser.parse_args()
    if not (args.ways or args.bank or args.others or args.look):
        parser.error("--ways without a way: name some, or give --bank or --others")
    args.ways = list(dict.fromkeys(args.ways))
    if "none" in args.tasks:
        parser.error("--tasks: a task named none would be what a router calls rows of no task: give it another name")
    rows = [*WAYS, *(name for name, _ in args.others)]
    if len(args.prompts) > 1 and not args.look:
        parser.error("--prompts takes several numbers with --look only: a run fits with one")
    if "similar" in args.ways and not args.look and args.prompts[0] < 2:
        parser.error("--prompts 1: similar holds each prompt of a task against its others; take 2, or other --ways")
    if twice := next((name for name in rows if rows.count(name) > 1), None):
        parser.error(f"{twice} would be two rows of one name: give it another in --others")
    return args


def pair(text: str) -> tuple[str, str]:
    """Of "NAME=DIR": (NAME, DIR); as the type of an argument."""
    name, _, folder = text.partition("=")
    if not (name and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=DIR")
    return name, folder


def read_texts(path: str | Path, words: int) -> list[str]:
    found = []
    for number, record in read_records(Path(path)):
        text = next((record[key] for key in ("text", "page", "question") if key in record), None)
        if not isinstance(text, str) or not text.strip():
            raise SystemExit(f"{path}:{number}: no text; write a non-empty string as text, page or question")
        found.append(text)
    if not found:
        raise SystemExit(f"{path} has no records: write one JSON object a line, with text, page or question")
    return [" ".join(text.split()[:words]) for text in found]


def without_instruction(prompt: str) -> str:
    """The passage alone: what is between the first lines (question, options) and "Answer:"; of one line the first
    sentence."""
    lines = prompt.removesuffix("Answer:").strip().split("\n")
    if len(lines) == 1:
        return re.split(r"(?<=[.?!\"])\s", lines[0])[0]
    start = 2 if re.match(r"[ \t]*Options?:", lines[1]) else 1
    return "\n".join(lines[start:]).strip() or prompt


def unknown_texts(args: argparse.Namespace) -> dict[str, list[str]]:
    sets = {"chat": CHAT.replace("\n", "|").split("|")}
    for file in [*args.unknown, *([args.perplexity] if args.perplexity else [])]:
        name = f"{Path(file).parent.name}/{Path(file).stem}"
        if name in sets:
            raise SystemExit(f"{name} would be the name of two: rename a file of --unknown and --perplexity")
        sets[name] = read_texts(file, 64)[:150]
    return sets


# Routing alone


def look(
    tasks: list[dict[str, Any]], unknown: dict[str, list[str]], general: list[str], base: str,
    args: argparse.Namespace, output: Path,
) -> None:  # fmt: skip
    """Layers and numbers of prompts, each draw a row: how many held-out training prompts go to their task, how many
    are taken for unknown, and of the unknown how many are."""
    model, tokenizer = load_base(base, args.device)
    depth = model.config.num_hidden_layers
    shares = (1 / 30, 4 / 30, 8 / 30, 0.4, 0.6, 0.8)
    layers = sorted(set(args.layers or [max(1, round(depth * share)) for share in shares]))
    reader = TaskRouter(model, tokenizer, layers=layers)

    def read(prompts: list[str]) -> list[torch.Tensor]:  # by layer (n, I)
        return [normalize(part, dim=-1) for part in reader.features(prompts).chunk(len(layers), dim=1)]

    pools = {task["name"]: [record["prompt"] for record in task["train"][:POOL]] for task in tasks}
    known = {name: read(prompts) for name, prompts in pools.items()}
    bare = {task["name"]: read([record["passage"] for record in task["train"][:POOL]]) for task in tasks}
    strange = {name: read(prompts) for name, prompts in unknown.items()}
    none = read(general) if general else None
    rows = []
    for i, layer in enumerate(layers):
        for count in args.prompts:
            for seed in args.seeds:
                generator = torch.Generator().manual_seed(seed)
                draws = {name: torch.randperm(len(pools[name]), generator=generator) for name in pools}

                def fit(source: dict[str, list[torch.Tensor]], left_out: str = "", i=i, draws=draws, n=count) -> Any:
                    rows = {name: features[i][draws[name][:n]] for name, features in source.items()}
                    rows |= {} if none is None else {"none": none[i]}
                    return router_of(rows, args.false_alarms, left_out)

                def right(router: Any, source: Any, none: bool, i=i, draws=draws, n=count) -> float:
                    found = []
                    for name, features in source.items():
                        names, p = router.route(features[i][draws[name][n:]])
                        best = names if none else [router.classes[c] for c in p.argmax(dim=1).tolist()]
                        found += [one == name for one in best]
                    return statistics.mean(found)

                router = fit(known)
                alarms = [
                    one == "none"
                    for name, features in known.items()
                    for one in router.route(features[i][draws[name][count:]]).names
                ]
                one_of = known if len(known) > 1 else {}  # with one task no other is left to know
                unseen = [share_none(fit(known, name), known[name][i]) for name in one_of]
                rows.append(
                    {
                        "layer": layer, "prompts": count, "seed": seed,
                        "right": right(router, known, none=False), "false alarms": statistics.mean(alarms),
                        "bare": right(router, bare, none=False),
                        "bare, fitted bare": right(fit(bare), bare, none=False),
                        **{f"none: {name}": share_none(router, features[i]) for name, features in strange.items()},
                        "none: unseen task": statistics.mean(unseen) if unseen else "",
                        "its worst": min(unseen, default=""),
                    }
                )  # fmt: skip
    table = Table(*rows[0], title=f"routing alone, {len(tasks)} tasks")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)
    runs.write_csv(output / "look.csv", rows)
    cost(model, tokenizer, [record["prompt"] for record in tasks[0]["test"]], args)


def router_of(rows: dict[str, torch.Tensor], alarms: float, left_out: str) -> TaskRouter:
    """Fitted with the features of all classes but one."""
    router = TaskRouter(false_alarms=alarms)
    for name, own in rows.items():
        if name != left_out:
            router.add_task(name, own)
    return router


def share_none(router: TaskRouter, prompts: Any) -> float:
    return statistics.mean(name == "none" for name in router.route(prompts).names)


def share_unseen(rows: dict[str, torch.Tensor], features: torch.Tensor, truth: list[str], alarms: float) -> float:
    """Test prompts of each task in turn that are taken for none by a router of all others."""
    found: list[str] = []
    for task in sorted(set(truth)):
        own = features[torch.tensor([name == task for name in truth])]
        found += router_of(rows, alarms, task).route(own).names
    return found.count("none") / len(found)


@torch.no_grad()
def cost(model: Any, tokenizer: Any, prompts: list[str], args: argparse.Namespace) -> None:
    """Print how long the partial forward takes beside the whole of a prefill."""
    router = TaskRouter(model, tokenizer, layers=args.layers if args.layers and len(args.layers) == 1 else None)
    batch = tokenizer(prompts[: args.batch_size], return_tensors="pt", padding=True).to(model.device)
    states: Any = router._states
    seconds: dict[str, list[float]] = {"whole": [], "part": []}
    ways = {"whole": lambda: model(**batch, logits_to_keep=1), "part": lambda: states.of(batch)}
    with contiguous_head(model):
        for name, run in [*ways.items()] * 7:
            start = time.perf_counter()
            run()
            runs.wait(args.device)
            seconds[name].append(time.perf_counter() - start)
    whole, part = (1000 * statistics.median(seconds[name][2:]) for name in ("whole", "part"))
    print(
        f"features of {len(batch.input_ids)} x {batch.input_ids.shape[1]} tokens after layer {router.layers}: "
        f"{part:.1f} ms; the whole prefill: {whole:.1f} ms ({part / whole:.2f} of it)"
    )


# With adapters


class Similar:
    """The nearest task by cosine of mean features; nearer than all but a share of the task's own prompts, or none."""

    def __init__(self, features: dict[str, torch.Tensor], false_alarms: float) -> None:
        self.names = list(features)
        self.means = torch.stack([normalize(x.mean(dim=0), dim=0) for x in features.values()])
        own = [
            (normalize((x.sum(dim=0) - x) / (len(x) - 1), dim=1) * x).sum(dim=1) for x in features.values()
        ]  # each prompt against the mean of the others
        self.least = torch.cat(own).quantile(false_alarms)

    def route(self, features: torch.Tensor, none: bool = True) -> list[str]:
        values, best = (features @ self.means.T).max(dim=1)
        return [
            "none" if none and value < self.least else self.names[i]
            for value, i in zip(values.tolist(), best.tolist(), strict=True)
        ]


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, records: list[dict[str, str]], batch_size: int, rows: list[str] | None = None
) -> dict[str, float]:
    """Share of each task's prompts that greedy decoding answers right, to the last token of the answer.

    Args:
        records: prompt, answer and task.
        rows: of each record the name of its adapter in a mixed batch; None: as the model is.
    """
    right: dict[str, list[bool]] = {}
    order = sorted(range(len(records)), key=lambda i: len(records[i]["prompt"]))
    for start in range(0, len(order), batch_size):
        part = [records[i] for i in order[start : start + batch_size]]
        prompts = [record["prompt"] for record in part]
        wanted = []
        for record in part:
            full = tokenizer(f"{record['prompt']} {record['answer']}").input_ids
            wanted.append(full[scores.common_length(full, tokenizer(record["prompt"]).input_ids) :])
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        given = {} if rows is None else {"adapter_names": [rows[i] for i in order[start : start + batch_size]]}
        longest = max(map(len, wanted))
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=longest, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=model.generation_config.eos_token_id,
        )  # fmt: skip
        with contiguous_head(model), generating_by(model, greedy):
            out = model.generate(**batch, **given)[:, batch.input_ids.shape[1] :]
        for record, answer, new in zip(part, wanted, out.tolist(), strict=True):
            right.setdefault(record["task"], []).append(new[: len(answer)] == answer)
    return {task: statistics.mean(values) for task, values in right.items()}


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Over the tokens of all texts, each text one forward: through a router its own adapter, or none."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :512].to(model.device)
        if ids.shape[1] > 1:
            logits = model(ids).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return float(torch.tensor(total / count).exp())


def adapters(tasks: list[dict[str, Any]], base: str, args: argparse.Namespace, output: Path) -> list[Path]:
    """Folders of a LoRA for each task: those of --adapters, or trained now, unless they are there."""
    folders = []
    for task in tasks:
        name = task["name"]
        if args.adapters:
            places = [Path(args.adapters) / folder for folder in (name, f"lora-{name}")]
            folder = next((place for place in places if is_adapter(place)), None)
            if folder is None:
                raise SystemExit(
                    f"{args.adapters} has no adapter for {name!r}: neither {name} nor lora-{name} is there"
                )
        else:
            folder = output / "adapters" / name
            if is_adapter(folder) and not (folder / "run.json").exists():
                raise SystemExit(
                    f"{folder} does not say how it was trained: give {folder.parent} as --adapters to take it as it "
                    "is, or another --output"
                )
            learnt = argparse.Namespace(**{key: getattr(args, key) for key in LEARNT})
            runs.claim(folder, learnt, base=base, records=runs.digest(task["train"]))
        folders.append(folder.resolve())
    for task, folder in zip(tasks, folders, strict=True):
        if not is_adapter(folder):
            train(base, adapter_config("lora", r=args.r, alpha=2 * args.r), task["train"], folder, args)
    return folders


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def main() -> None:
    args = parse()
    output = Path(args.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    tasks = [find_task(name, args.data, args.words, args.seed) for name in args.tasks]
    for record in (record for task in tasks for split in ("train", "test") for record in task[split]):
        record["passage"] = without_instruction(record["prompt"])
        if args.bare:
            record["prompt"] = f"{record['passage']}\nAnswer:"
    most = max(args.prompts)
    for task in tasks if args.look else ():
        if most >= (pool := len(task["train"][:POOL])):
            raise SystemExit(f"--look --prompts {most} leaves none of {task['name']}'s {pool} to look at: give fewer")
    for folder in (args.bank, *(folder for _, folder in args.others)):
        if folder:
            found: Any = PeftConfig.from_pretrained(folder)  # before minutes of other ways
            if folder == args.bank and (lacks := set(args.tasks) - set(getattr(found, "tasks", ()))):
                raise SystemExit(f"--bank {folder} is no MORA adapter that has learnt {', '.join(sorted(lacks))}")
    unknown = unknown_texts(args)
    passages = read_texts(args.perplexity, 400) if args.perplexity else []
    general = read_texts(args.general, 64) if args.general else []
    base = find_base(args.model, args.device)
    depth = AutoConfig.from_pretrained(base).get_text_config().num_hidden_layers
    if max(args.layers or [1]) > depth:
        raise SystemExit(f"--layers {max(args.layers)}: the base has {depth}")
    if args.look:
        look(tasks, unknown, general, base, args, output)
        return
    folders = adapters(tasks, base, args, output) if args.ways else []
    # Rows of other ways stay, so they have to be of the same records and adapters, and found in the same way.
    content = {"base": base, "records": runs.digest(tasks), **runs.files(args, "general", "perplexity")}
    content |= {f"{file} content": runs.digest(Path(file)) for file in args.unknown}
    content |= {f"adapter {f.name}": runs.digest(f / "adapter_model.safetensors") for f in folders}
    begun = (output / "run.json").exists()
    free = ("device", "output", "ways", "adapters", "bank", "others", "look", "seeds")
    runs.claim(output, args, *free, **content)
    count = args.prompts[0]
    records = [{**record, "task": task["name"]} for task in tasks for record in task["test"][: args.limit]]
    prompts = [record["prompt"] for record in records]
    truth = [record["task"] for record in records]
    path = output / "route.csv"
    rows: list[dict[str, Any]] = [*runs.read_csv(path)] if begun else []

    def add(way: str, greedy: dict[str, float], model: Any = None, **more: float) -> None:
        """A row, kept at once: a way takes minutes. Without a model where nothing tells which task a passage is of."""
        row: dict[str, Any] = {"way": way, **dict.fromkeys(("routed", "bare", "unseen"), ""), **greedy}
        row["mean"] = statistics.mean(greedy.values())
        row |= {f"none: {name}": "" for name in unknown} | {"perplexity": ""} | more
        if passages and model is not None:
            row["perplexity"] = perplexity(model, tokenizer, passages)
        rows[:] = [*(other for other in rows if other["way"] != way), row]
        runs.write_csv(path, rows)
        print(f"{way}: {row['mean']:.3f}", flush=True)

    def share(found: list[str], wanted: list[str]) -> float:
        return statistics.mean(one == other for one, other in zip(found, wanted, strict=True))

    first, *rest = folders or [None]
    model, tokenizer = scores.load(base, first, args.device, tasks[0]["name"])
    for task, folder in zip(tasks[1:], rest, strict=False):
        with_adapter(model, folder, task["name"])
    model.eval()
    size = 4 * args.batch_size
    fit = {task["name"]: [record["prompt"] for record in task["train"][:count]] for task in tasks}
    router = TaskRouter(model, tokenizer, layers=args.layers, false_alarms=args.false_alarms)
    for name, some in fit.items():
        router.add_task(name, some)
    if general:
        router.add_task("none", general)
    features = router.features(prompts)
    bare = router.features([record["passage"] for record in records])
    strange = {f"none: {name}": router.features(texts) for name, texts in unknown.items()}
    nones = {name: share_none(router, texts) for name, texts in strange.items()}
    columns = {"routed": share(router.route(features).names, truth), "bare": share(router.route(bare).names, truth)}
    if len(tasks) > 1:
        columns["unseen"] = share_unseen(router.rows, features, truth, args.false_alarms)
    for way in args.ways:
        if way == "base":
            with model.disable_adapter():
                add(way, generate(model, tokenizer, records, size), model)
        elif way == "told":
            add(way, generate(model, tokenizer, records, size, truth))
        elif way in ("router", "top2", "always"):
            router.attach(mode="top2" if way == "top2" else "top1", none=way != "always")
            best = router.scores.probabilities(features).argmax(dim=1).tolist()
            always = {"routed": share([router.classes[i] for i in best], truth)}
            add(
                way,
                generate(model, tokenizer, records, size),
                model,
                **(always if way == "always" else columns | nones),
            )
            router.detach()
            if way == "router":
                router.save(output / "router")
        elif way == "similar":
            similar = Similar({task: router.rows[task] for task in router.tasks}, args.false_alarms)
            found = similar.route(features)
            names = ["__base__" if name == "none" else name for name in found]
            more = {"routed": share(found, truth), "bare": share(similar.route(bare), truth)}
            more |= {name: similar.route(texts).count("none") / len(texts) for name, texts in strange.items()}
            add(way, generate(model, tokenizer, records, size, names), **more)
        elif way == "arrow":
            config = ArrowConfig(top_k=min(3, len(folders)), router_temperature=1.0, rng_seed=0)
            plain, _ = load_base(base, args.device)
            arrow = create_arrow_model(plain, [str(folder) for folder in folders], config).eval()
            add(way, generate(arrow, tokenizer, records, size), arrow)
            del arrow, plain
        else:
            plain, _ = load_base(base, args.device)
            looking = dict(zip(folders, fit.values(), strict=True))
            shutil.rmtree(output / "merged", ignore_errors=True)
            how = {"model": plain, "tokenizer": tokenizer, "prompts": looking, "passes": 2}
            print(merge_adapters(folders, "inputs", "sum", output=output / "merged", **how))
            merged, _ = scores.load(base, output / "merged", args.device)
            add(way, generate(merged, tokenizer, records, size), merged)
            del merged, plain
    for name, folder in args.others:
        other, _ = scores.load(base, folder, args.device)
        add(name, generate(other, tokenizer, records, size), other)
    if args.bank:
        of_bank(*scores.load(base, args.bank, args.device), router, records, truth, size, add, columns | nones)
    show(rows, output)


def of_bank(
    model: PeftModel, tokenizer: Any, router: TaskRouter, records: list[dict[str, str]], truth: list[str], size: int,
    add: Any, more: dict[str, float],
) -> None:  # fmt: skip
    """A MORA adapter's rows: all blocks, the task's own state told, and routed by the same router."""
    add("bank, all blocks", generate(model, tokenizer, records, size), model)
    rows = [f"default/{task}" for task in truth]
    add("bank, told", generate(model, tokenizer, records, size, rows), model)
    router.attach(model)
    add("bank, router", generate(model, tokenizer, records, size), model, **more)
    router.detach()


def show(rows: list[dict[str, Any]], output: Path) -> None:
    table = Table(*rows[0], title=TITLE)
    for way, *values in (row.values() for row in rows):
        table.add_row(way, *(f"{float(value):.3f}" if value != "" else "" for value in values))
    Console(width=200).print(table)
    print(f"Adapters, the router and route.csv are in {output}")


if __name__ == "__main__":
    main()
