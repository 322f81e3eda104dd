"""Write an adapter as a plain LoRA, for tools that know nothing else (vLLM, llama.cpp's convert_lora_to_gguf.py).

python recipes/export.py out/demo/lori-helpdesk --output out/lora                  # LORI, MORA "dense": exact
python recipes/export.py out/demo/mora-helpdesk --task helpdesk --output out/lora  # routed: the closest LoRA, if close
python recipes/export.py out/demo/lori-helpdesk --output out/lora --base-to out/base16  # and the base for a server

An update that is one ΔW leaves as it is, at its own rank. MORA "task" and "bank", FLYLORA and SMORA choose experts for
every token, so no LoRA equals them: each module gets the one that comes closest on a task's training texts. On its
test texts the error is measured by module and overall: |LoRA's logits - adapter's| / |base's logits - adapter's|.
Above --max-error nothing is written, unless --force. --base-to writes the 4-bit base that the adapter was trained
over, in 16 bits, for a server (docs/serving.md).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType
from rich.console import Console
from rich.table import Table
from shared import runs, scores
from shared.base_model import EMBEDDED, find_base
from shared.tasks import find_task
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_mora import METHODS, use_exact_4bit_kernels
from peft_mora.export import (
    check_apart,
    check_linear_alone,
    effect_error,
    exact_lora,
    exportable_layers,
    fit_lora,
    lora_errors,
    save_lora,
    save_with_base,
)
from peft_mora.info import adapter_info, vllm_options
from peft_mora.inputs import writes_text
from peft_mora.lora_file import Lora
from peft_mora.opening import base_class, revision_of, with_adapter
from peft_mora.quantization import nf4_config


def parse() -> argparse.Namespace:
    parser = runs.parser(__doc__, model=None, data=None, batch_size=16)
    parser.add_argument("adapter", type=Path, help="folder of a saved MORA, LORI or FLYLORA adapter")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the LoRA; must not exist yet")
    parser.add_argument("--task", default="helpdesk", help="whose texts: embedded, or in --data (%(default)s)")
    runs.add_records(parser)
    parser.add_argument(
        "--rank", type=runs.count, help="of a fitted LoRA (as many as there are experts; more cannot help)"
    )
    parser.add_argument("--ridge", type=runs.bound, default=1e-4, help="damping of the fit, × mean x² (%(default)s)")
    parser.add_argument(
        "--max-error",
        type=runs.bound,
        default=0.1,
        help="share of the effect on logits that may be lost (%(default)s)",
    )
    parser.add_argument("--bits", type=int, default=4, choices=(4, 16), help="4: an NF4 copy of it (%(default)s)")
    parser.add_argument(
        "--base-to", type=Path, metavar="DIR", help="the quantised base in 16 bits, for servers; must not exist yet"
    )
    parser.add_argument("--force", action="store_true", help="write it whatever the error")
    args = parser.parse_args()
    for option, folder in (("--output", args.output), ("--base-to", args.base_to)):
        if folder is not None and folder.exists():
            parser.error(f"{folder} exists: delete it or choose another {option}")
    if args.base_to:
        try:
            check_apart(args.output, args.base_to)
        except ValueError as error:
            parser.error(str(error))
    return args


def batches(tokenizer: Any, records: list[dict[str, str]], size: int, device: str) -> list[Any]:
    tokenizer.padding_side = "right"
    texts = [f"{record['prompt']} {record['answer']}" for record in records]
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [tokenizer(part, return_tensors="pt", padding=True).to(device) for part in parts]


def error_table(errors: dict[str, float]) -> Any:
    """A row a layer and a column a kind of module, in percent."""
    rows: dict[str, dict[str, float]] = {}
    for name, error in errors.items():
        layer = re.match(r".*?\.\d+(?=\.)", name)
        rows.setdefault(layer.group() if layer else "", {})[name.rsplit(".", 1)[-1]] = error
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("relative output error, %", *columns, title="on the test texts")
    for layer, row in rows.items():
        table.add_row(layer, *(f"{100 * row[c]:.2g}" if c in row else "" for c in columns))
    return table


def main() -> None:
    args = parse()
    try:
        export(args)
    except (ValueError, OSError) as error:  # what the library refuses, with what to do
        raise SystemExit(str(error)) from None


def opened(args: argparse.Namespace, base: str) -> tuple[Any, Any]:
    """(model, tokenizer; None where it writes no text) with the adapter, over the class that it was trained over."""
    revision = revision_of(args.adapter, base)
    name = base if base == EMBEDDED else find_base(base, args.device, 16, **revision)
    kind = AutoModelForCausalLM if base == EMBEDDED else base_class(args.adapter, name)
    if kind.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return scores.load(find_base(base, args.device, args.bits, **revision), args.adapter, args.device)
    there = getattr(AutoConfig.from_pretrained(name), "quantization_config", None)
    options = {"quantization_config": nf4_config()} if args.bits == 4 and there is None else {}
    model = kind.from_pretrained(name, dtype=torch.bfloat16, device_map=args.device, **options)
    use_exact_4bit_kernels(model)
    tokenizer = None
    if writes_text(model):  # of images and text
        tokenizer = AutoTokenizer.from_pretrained(scores.tokenizer_of(name, args.adapter))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return with_adapter(model, args.adapter).eval(), tokenizer


def export(args: argparse.Namespace) -> None:
    task = find_task(args.task, args.data, args.passage_words, args.seed)
    config = PeftConfig.from_pretrained(args.adapter)
    kind, ours = PeftType(config.peft_type).value, [method.config.method for method in METHODS.values()]
    if kind not in ours:
        why = "a plain LoRA already: serve it as it is" if kind == "LORA" else f"and this exports {', '.join(ours)}"
        raise SystemExit(f"{args.adapter} is {kind}, {why}")
    found = adapter_info(args.adapter)
    if not found.merges and not found.routed:
        raise SystemExit(f"{args.adapter}: {found.refusal}")
    check_linear_alone(vars(config), args.adapter)
    base = args.model or config.base_model_name_or_path
    if not base:
        raise SystemExit(f"{args.adapter} does not say which base it is for: give it as --model NAME_OR_DIR")
    model, tokenizer = opened(args, base)
    if args.base_to and getattr(model.get_base_model(), "hf_quantizer", None) is None:
        raise SystemExit(f"{base} is not quantised: a server loads it as it is. Leave out --base-to")
    exact = all(layer.is_static("default") for layer in exportable_layers(model).values())
    if exact and args.rank is not None:
        raise SystemExit(
            f"{args.adapter} leaves exactly, at its own rank: leave out --rank (peft-mora merge cuts one)"
        )
    if not writes_text(model.get_base_model()):
        kind = type(model.get_base_model()).__name__
        if not exact:
            raise SystemExit(
                f"How close a LoRA comes is measured by next tokens, and {args.adapter} is over a {kind}, which gives "
                "none: serve the adapter itself, or train one that merges"
            )
        print(f"exact, but for rounding in 16 bits; not measured, as a {kind} gives no next tokens")
        return write(model, exact_lora(model), args, exact)
    fitted = set() if exact else {(record["prompt"], record["answer"]) for record in task["train"]}  # is no measure
    test = [record for record in task["test"] if (record["prompt"], record["answer"]) not in fitted]
    if not test:
        raise SystemExit(f"all test texts of {args.task} are training texts too: give others to measure with")
    seen, unseen = (batches(tokenizer, part, args.batch_size, args.device) for part in (task["train"], test))
    loras = exact_lora(model) if exact else fit_lora(model, seen, rank=args.rank, ridge=args.ridge)
    how = "exact, but for rounding in 16 bits" if exact else f"fitted on {len(task['train'])} texts"
    if config.target_parameters:
        print(f"{how}; not measured, as experts' inputs are seen inside of their module alone")
        return write(model, loras, args, exact)
    Console(width=120).print(error_table(lora_errors(model, loras, unseen)))
    effect = effect_error(model, loras, unseen)
    print(f"{how}; error of the adapter's effect on logits, {len(test)} other texts: {effect.error:.2g}")
    print(f"next token as the adapter's: LoRA {effect.same_token:.1%}, base alone {effect.same_token_base:.1%}")
    if not exact and not effect.error <= args.max_error and not args.force:
        raise SystemExit(
            f"Nothing written: the error {effect.error:.2g} is above --max-error {args.max_error:g}. Serve the "
            "adapter itself with transformers and PEFT; or train one that exports exactly (LoriConfig, "
            'MoraConfig(routing="dense")); or write it all the same with --force, and evaluate it.'
        )
    write(model, loras, args, exact)


def write(model: Any, loras: dict[str, Lora], args: argparse.Namespace, exact: bool) -> None:
    to = (model, loras, args.output)
    text = writes_text(model.get_base_model())
    config = save_with_base(*to, args.base_to, args.adapter) if args.base_to else save_lora(*to)
    server = f"; vLLM: {vllm_options(config.r, exact)}" if text else ""
    print(f"LoRA of rank {config.r} in {args.output}{server}")
    if args.base_to:
        print(f"its base in 16 bits in {args.base_to}; llama.cpp: convert_lora_to_gguf.py --base {args.base_to}")


if __name__ == "__main__":
    main()
