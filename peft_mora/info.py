"""What an adapter's folder holds, from its config and the headers of its weights. No model, no tensor is loaded."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import peft
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import safe_open
from transformers import AutoConfig

from . import registry
from .base import matching_key
from .checks import check_field
from .lora_file import HEADS, PREFIX, TENSORS, check_plain, damage_named, empty_layer, read_config


ROUTED_FOLDER = "TASK_ROUTER"  # adapters and their router, as task_router.py writes them
# What opens a model: by the task type, or by the end of the name of the class that was trained. A pipeline of
# transformers, or where it has none for that, a class of PEFT.
TEXT = "text-generation"
BY_TASK = {
    "CAUSAL_LM": TEXT,
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "FEATURE_EXTRACTION": "feature-extraction",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
}
BY_CLASS = {
    "ForCausalLM": TEXT,
    "LMHeadModel": TEXT,
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForQuestionAnswering": "AutoPeftModelForQuestionAnswering",
}
MOST = 2**16  # rank that is looked at: what a file says is not allocated
LABELS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # a row each
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # all that its --max-lora-rank takes


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank of vLLM that holds this rank; None: there is none."""
    return next((size for size in VLLM_RANKS if size >= rank), None)


def vllm_options(rank: int, exact: bool) -> str:
    """What vLLM takes to serve a LoRA of this rank; or that it does not, and what to do with one that is exact, or
    fitted."""
    if (size := vllm_rank(rank)) is not None:
        return f"--enable-lora --max-lora-rank {size}"
    less = "merge it into its base (merge_into_base)" if exact else "fit it at a lower --rank"
    return f"no: it takes ranks up to {VLLM_RANKS[-1]}, {less}"


@dataclass(frozen=True)
class AdapterInfo:
    """What `adapter_info` found; `print` it.

    Args:
        folder: where it is.
        method: of its config, with what decides how it acts: "MORA, routing task".
        base: the base model that it names, or None.
        tasks: names of the tasks that it says it has learnt, or that its router knows, in their order.
        adapters: of a folder with a router, the method of each adapter in it.
        ranks: module -> rank of its update, frozen parts too; experts, where the method chooses among them; 0 where it
            has no rank.
        routed: whether an input decides which of them act.
        merges: whether its update is one matrix a module; None: of a method that is not known here.
        refusal: why it does not merge, and what to do; "" where it does.
        lora: "is" one that every reader of LoRA files opens, "exports" as one exactly, or "no".
        also: further things that are trained or lie beside it.
        parameters: numbers in the file. bytes: of all files of the folder itself. dtypes: of the weights.
        asks_task: whether it answers only once a task is chosen.
        opens: what opens it, a pipeline of transformers or a class of PEFT ("AutoPeftModel").
        labels: of a classifier that is saved with it.
    """

    folder: str
    method: str
    base: str | None
    tasks: list[str]
    adapters: dict[str, str]
    ranks: dict[str, int]
    routed: bool
    merges: bool | None
    refusal: str
    lora: Literal["is", "exports", "no"]
    also: list[str]
    parameters: int
    bytes: int
    dtypes: list[str] = field(default_factory=list)
    asks_task: bool = False
    opens: str = TEXT
    labels: int | None = None

    @property
    def serve(self) -> list[str]:
        """Shell commands that serve it, in their order; the last one stays. Of what writes no text, what opens it."""
        base, folder = shlex.quote(self.base or "BASE"), shlex.quote(self.folder)
        path = Path(self.folder)
        path = path if path.name not in ("", "..") else path.resolve()
        name = path.name or "adapter"
        rank = vllm_rank(max(self.ranks.values(), default=1))
        if self.lora != "no" and rank is not None and self.opens == TEXT:
            export = []
            if self.lora == "exports":
                path = Path(f"{path}-lora")
                export = [f"peft-mora export {folder} --output {shlex.quote(str(path))}"]
            item = f"{shlex.quote(name)}={shlex.quote(str(path))}"
            if {"=", ","} & {*name, *str(path)}:  # vLLM cuts NAME=PATH there
                item = shlex.quote(json.dumps({"name": name, "path": str(path)}))
            modules = f"--lora-modules {item}"
            return [*export, f"vllm serve {base} --enable-lora --max-lora-rank {rank} {modules}"]
        if self.opens.startswith("AutoPeft"):
            imports, model = f"from peft import {self.opens}", "model"
            made = f"model = {self.opens}.from_pretrained({json.dumps(self.folder)})"
            asked = ""
        else:
            imports, model = "from transformers import pipeline", "pipe.model"
            labels = f', model_kwargs={{"num_labels": {self.labels}}}' if self.labels else ""
            made = f"pipe = pipeline({json.dumps(self.opens)}, {json.dumps(self.folder)}{labels})"
            asked = '; pipe("...")'
        program = f"{imports}; {made}{asked}"
        if self.asks_task:
            chosen = f"set_task({model}, {json.dumps(self.tasks[0])})"
            program = f"{imports}; from peft_mora import set_task; {made}; {chosen}{asked}"
        return [f"python -c {shlex.quote(program)}"]

    def __str__(self) -> str:
        kinds = Counter(module.removesuffix(".base_layer").rsplit(".", 1)[-1] for module in self.ranks)
        modules = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
        smallest, largest = min(self.ranks.values(), default=0), max(self.ranks.values(), default=0)
        ranks = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
        what = "experts" if self.routed else "rank"
        merges = {True: "yes, into its base", False: f"no. {self.refusal}", None: "as its method does in PEFT"}
        rows = {
            "method": self.method,
            "base": self.base or "not named",
            "tasks": ", ".join(self.tasks),
            "adapters": ", ".join(f"{name} ({method})" for name, method in self.adapters.items()),
            "modules": f"{len(self.ranks)}: {modules}" if modules else "",
            what: f"{ranks} a module" if largest or (self.routed and self.ranks) else "",
            "also": ", ".join(self.also),
            "size": f"{self.parameters:,} numbers ({', '.join(self.dtypes)}), {self.bytes / 1e6:.1f} MB in files",
            "merges": merges[self.merges],
            "note": self.refusal if self.merges else "",
            "serve": self.serve[0],
        }
        lines = [f"  {name:8} {_printable(value)}" for name, value in rows.items() if value]
        return "\n".join([self.folder, *lines, *(f"{'':11}{_printable(command)}" for command in self.serve[1:])])


def adapter_info(folder: str | Path) -> AdapterInfo:
    """Look at the folder of any PEFT adapter, or of adapters with their router.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged, or the method is one that PEFT and this
            package do not know.
    """
    folder = Path(folder)
    config = read_config(folder)
    kind = str(config.get("peft_type"))
    with damage_named(folder), safe_open(folder / TENSORS, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
        dtypes = sorted({part.get_dtype() for part in slices.values()})
    adapters = {name: str(entry["peft_type"]) for name, entry in config.get("adapters", {}).items()}
    known: dict[str, str] = {str(method.value): prefix for method, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()}
    prefixes = [known.get(method, "") for method in (adapters.values() or [kind])]
    if kind != ROUTED_FOLDER and kind not in PeftType.__members__:
        raise ValueError(
            f"{folder} has an adapter of type {kind!r}, which peft {peft.__version__} does not know: install the "
            "release, or the package, that it was saved with."
        )
    method, routed, merges, refusal, asks_task = kind, False, None, "", False
    lora: Literal["is", "exports", "no"] = "no"
    ranks = _ranks(shapes, prefixes, apart=kind == ROUTED_FOLDER)
    if kind == ROUTED_FOLDER:
        method, merges = "adapters and a router that picks one for each prompt", False
        refusal = "Merge the adapters' own folders instead (peft-mora merge)."
    elif kind == "LORA":
        merges = True
        try:
            check_plain(config, folder)
            lora = "is"
        except ValueError as error:
            refusal = str(error)
    elif kind.lower() in registry.registered:
        own: Any = PeftConfig.from_pretrained(str(folder))
        # What it says of single modules does not matter here, and need not fit a layer of any size.
        plainly = replace(own, **{f.name: {} for f in fields(own) if isinstance(getattr(own, f.name), dict)})
        check_field(own.r <= MOST, "r", own.r, f"a rank up to {MOST:,}")
        plainly = replace(plainly, ups=1) if hasattr(own, "ups") else plainly
        layer = empty_layer(plainly, "", 8, 8)  # of no size that a file says
        merges, routed = layer.is_static("default"), getattr(layer, "is_routed", lambda _: False)("default")
        refusal = "" if merges else layer.lora_refusal("default") or layer.merge_refusal
        lora = "exports" if merges else "no"
        asks_task = len(config.get("tasks") or ()) > 1 and getattr(own, "default_task", "") is None
        expert = getattr(own, "rank_partition", 1)  # ranks of an expert
        ranks = {
            name: (own.rank_pattern.get(matching_key(own.rank_pattern, name), own.r) if rows is None else rows)
            // (expert if routed else 1)
            for name, rows in ranks.items()
        }
        chosen = {name: getattr(own, name, None) for name in ("routing", "default_task", "top_k", "sparsity")}
        method = ", ".join([kind, *(f"{name} {value}" for name, value in chosen.items() if value is not None)])
    if merges and (head := _tied_head(config, ranks)):
        lora = "no"
        tied = f"It adapts {head!r}, whose weight is the embeddings' too, and no server of LoRA files opens that."
        refusal = refusal or tied
    also = [f"{name} in full" for name in config.get("modules_to_save") or ()]
    also += ["embeddings of some tokens"] if config.get("trainable_token_indices") else []
    also += ["fused experts of a mixture"] if config.get("target_parameters") else []
    lora = "no" if also else lora  # which LoRA files have no place for that all readers know
    also += ["input statistics, for merging"] if (folder / "input_statistics.safetensors").is_file() else []
    also += ["a memory of protected directions (subspace)"] if (folder / "subspace").is_dir() else []
    opens = _opens(config)
    tasks = config.get("tasks") or list(config.get("rows", {}))
    return AdapterInfo(
        str(folder), method, config.get("base_model_name_or_path"), tasks, adapters,
        {name: rows or 0 for name, rows in ranks.items()}, routed, merges, refusal,
        lora, also, sum(map(prod, shapes.values())),
        sum(path.stat().st_size for path in folder.iterdir() if path.is_file()), dtypes, asks_task, opens,
        next((shape[0] for key, shape in shapes.items() if key.endswith(LABELS)), None) if "class" in opens else None,
    )  # fmt: skip


def _opens(config: dict[str, Any]) -> str:
    """By the task type or the class that was trained; as a causal language model where it says neither."""
    task, named = config.get("task_type"), (config.get("auto_mapping") or {}).get("base_model_class")
    if task is None and named is None:
        return TEXT
    found = BY_TASK.get(str(task)) if task else None
    return found or next((opens for end, opens in BY_CLASS.items() if str(named).endswith(end)), "AutoPeftModel")


def _tied_head(config: dict[str, Any], modules: Iterable[str]) -> str | None:
    """An adapted output head whose weight is the embeddings' too, where the base lies here and says so."""
    heads = [name for name in modules if name.rsplit(".", 1)[-1] in HEADS]
    base = config.get("base_model_name_or_path")
    if not heads or not isinstance(base, str) or not Path(base).is_dir():
        return None
    try:
        found = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
    except (OSError, ValueError):  # no config, or of a kind that is not known here
        return None
    return heads[0] if getattr(found, "tie_word_embeddings", False) else None


def _printable(text: str) -> str:
    """What a stranger's file says stays in its line: no line break, nothing that moves a terminal's cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _ranks(shapes: dict[str, tuple[int, ...]], prefixes: list[str], apart: bool) -> dict[str, int | None]:
    """Module -> rows of all its A's; the columns of its B where the file has no A; None where it has neither.

    Args:
        apart: the keys name adapters, of which a row goes through one: the largest counts.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    for key, shape in shapes.items():
        if not key.startswith(PREFIX):  # what all modules share
            continue
        for prefix in filter(None, prefixes):
            name, dot, own = key.removeprefix(PREFIX).rpartition(f".{prefix}")
            if dot:
                kind, _, rest = own.partition(".")
                sides = found.setdefault(name, {}).setdefault(rest.partition(".")[0] if apart else "", {})
                factor = apart or rest in ("", "weight") or rest.isdigit()
                if kind[-1:] in ("A", "B") and len(shape) == 2 and factor:
                    sides[kind[-1]] = sides.get(kind[-1], 0) + (shape[0] if kind[-1] == "A" else shape[1])
                break
    ranks = {name: [one.get("A", one.get("B")) for one in adapters.values()] for name, adapters in found.items()}
    return {name: max((rank for rank in each if rank is not None), default=None) for name, each in ranks.items()}
