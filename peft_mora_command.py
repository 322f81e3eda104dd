"""The command `peft-mora`, which is `python -m peft_mora` too: each of its verbs is a call of the library.

It stands above both packages, and nothing imports it but the entrances. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from typing import Any


RUN = """usage: peft-mora run PROGRAM [ARGS ...]
       python -m peft_mora PROGRAM [ARGS ...]

Run PROGRAM with the adapter types of peft_mora known to PEFT. PROGRAM is a Python file, "-m MODULE", or the name of an
installed command:
  python -m peft_mora train.py --lr 1e-4
  python -m peft_mora -m trl.scripts.sft --help
  python -m peft_mora lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks arc_easy"""

WHAT = """
  info     what an adapter's folder is: method, tasks, experts, size, whether it merges, what serves it
  merge    adapters of one base into one plain LoRA
  export   an adapter as a plain LoRA, exact, or the closest one where experts are chosen for every token
  route    which task's adapter a prompt is for; make, extend and ask a router
  protect  a memory of text that later training leaves as it is
  run      a program, with the adapter types known to PEFT"""

USAGE = f"""usage: peft-mora VERB ...                     (python -m peft_mora VERB ... is the same)
{WHAT}

  peft-mora info out/mora
  peft-mora merge out/maths out/code --output out/both
  peft-mora VERB --help

{RUN}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb. What it refuses is one line on stderr and status 1; a wrong command line has status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if arguments else 2)
    verb, *rest = arguments
    if verb == "--version":
        from importlib.metadata import version

        print(version("peft-mora"))
    elif verb == "run":
        run(rest)
    elif verb in VERBS:
        call, args = parse(verb, rest)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package at every import
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the hosts' to their own callers
                call(args)
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (ValueError, OSError, ImportError) as error:  # what the library refuses, with what to do
            raise SystemExit(f"peft-mora {verb}: {' '.join(str(error).split())}") from None
    else:
        run(arguments)


def parse(verb: str, arguments: list[str]) -> tuple[Callable[[Any], None], Any]:
    """What to call, and with what."""
    parser = argparse.ArgumentParser(
        prog=f"peft-mora {verb}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    call = VERBS[verb](parser)
    return call, parser.parse_intermixed_args(arguments)


def run(arguments: list[str]) -> None:
    """Run a file, a module or an installed command in this process, as Python would."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(RUN)
        raise SystemExit(0 if arguments else 2)
    import peft_mora  # noqa: F401

    program, *rest = arguments
    if program == "-m":
        if not rest:
            raise SystemExit("python -m peft_mora -m needs the name of a module, e.g. -m trl.scripts.sft")
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif os.path.isfile(program):
        sys.argv = [program, *rest]
        if not getattr(sys.flags, "safe_path", False):  # Python 3.11's -P leaves the folder out
            sys.path[0] = os.path.dirname(os.path.abspath(program))  # as `python FILE` does
        runpy.run_path(program, run_name="__main__")
    else:
        commands = entry_points(group="console_scripts", name=program)
        if not commands:
            raise SystemExit(f"{program}: no such file, and no installed package has a command of that name.")
        sys.argv = [program, *rest]
        raise SystemExit(next(iter(commands)).load()())


def info(parser: argparse.ArgumentParser) -> Callable[[Any], None]:
    parser.description = """What an adapter is, by its config and the headers of its weights: no model is loaded.

  peft-mora info out/mora
  peft-mora info out/mora --json"""
    parser.add_argument("folder", help="of a saved adapter of any PEFT method, or of adapters with their router")
    parser.add_argument("--json", action="store_true", help="all of it, for programs")

    def call(args: Any) -> None:
        from dataclasses import asdict

        from peft_mora.info import adapter_info

        found = adapter_info(args.folder)
        print(json.dumps({**asdict(found), "serve": found.serve}, indent=1) if args.json else found)

    return call


def merge(parser: argparse.ArgumentParser) -> Callable[[Any], None]:
    parser.description = """Merge adapters of one base model (LoRA, and those here that merge) into one plain LoRA.

  peft-mora merge out/maths out/code --output out/both
  peft-mora merge out/maths out/code --output out/both --rule tsv --rank 8
  peft-mora merge out/maths out/code --output out/both --model BASE --prompts maths.jsonl code.jsonl --distill 64

With prompts of each adapter's task, or input statistics beside the adapters, the merged update is the one that
disturbs least what each adapter computes on its own inputs; with --distill it then learns each one's answers to its
prompts. The rules, and --prompts self, which needs no data: docs/merging.md."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="of saved adapters")
    parser.add_argument("--output", required=True, metavar="DIR", help="the merged LoRA; must not exist yet")
    parser.add_argument("--rule", default="inputs", help="of peft_mora.merging.RULES (%(default)s)")
    parser.add_argument(
        "--rank", default="sum", type=merged_rank, help="sum, a number, or a share of the energy (%(default)s)"
    )
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument("--weights", **several, type=finite, metavar="W", help="one a folder (1)")
    parser.add_argument("--before", **several, default=[], metavar="STEP", help="norm, pico")
    parser.add_argument("--after", **several, default=[], metavar="STEP", help="match, svc, lines")
    parser.add_argument("--seed", type=int, default=0, help="of rules that draw (%(default)s)")
    parser.add_argument(
        "--options", type=_options, default={}, metavar="JSON", help="of the rule: '{\"density\": 0.1}'"
    )
    parser.add_argument(
        "--prompts", **several, metavar="FILE",
        help="one a folder, in their order: JSON lines (prompt or text) or lines of text; or self: what each adapter "
        "writes, where it has learnt whole texts; needs --model",
    )  # fmt: skip
    parser.add_argument(
        "--distill", type=number, default=0, metavar="STEPS",
        help="of learning the adapters' answers to --prompts (none)",
    )  # fmt: skip
    _add_model(parser, "the base model, with --prompts")

    def call(args: Any) -> None:
        from peft_mora.files import check_new
        from peft_mora.lora_file import read_config
        from peft_mora.merging import check_arguments, check_rule, merge_adapters

        check_new(args.output)
        if args.distill and "distill" in args.options:
            raise ValueError("--distill and --options have steps each: give them once.")
        if args.model is None and (args.load_in_4bit or args.device):
            raise ValueError("--load-in-4bit and --device are of --model: give the base model, or leave them out.")
        given: dict[str, Any] = {"distill": args.distill, **args.options}
        if (args.prompts is None) != (args.model is None):
            raise ValueError("--model and --prompts go together: give both, or neither.")
        if args.prompts is not None:
            texts: Any = "self"
            if args.prompts != ["self"]:
                if len(args.prompts) != len(args.folders):
                    raise ValueError(f"--prompts has {len(args.prompts)} files for {len(args.folders)} folders.")
                texts = {folder: read_texts(file) for folder, file in zip(args.folders, args.prompts, strict=True)}
            for folder in args.folders:
                read_config(folder)
            more = signature(merge_adapters).parameters
            options = {name: value for name, value in args.options.items() if name not in more}
            check_arguments(args.rule, args.rank, args.before, args.after, options)
            if args.weights is not None and len(args.weights) != len(args.folders):
                raise ValueError(f"--weights has {len(args.weights)} numbers for {len(args.folders)} folders.")
            check_rule(args.rule, args.weights or [1.0] * len(args.folders), options)
            given |= {"model": load_model(args, args.folders[0]), "prompts": texts}
        how = (args.rule, args.rank, args.weights, args.before, args.after, args.seed, args.output)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the report has them
            report = merge_adapters(args.folders, *how, **given)
        print(report)
        print(f"A plain LoRA and merge_report.json are in {args.output}")

    return call


def export(parser: argparse.ArgumentParser) -> Callable[[Any], None]:
    parser.description = """Write an adapter of this package as a plain LoRA, for tools that know nothing else.

  peft-mora export out/lori --output out/lora
  peft-mora export out/lori --output out/lora --model BASE --load-in-4bit --base-to out/base16
  peft-mora export out/mora --output out/lora --texts train.jsonl --test-texts test.jsonl

Of an update that is one matrix a module (what merges) the LoRA is exact, and the base's weights are not read,
only its config. Where experts are chosen for every token, the closest LoRA on --texts is fitted, its error on
--test-texts measured, and nothing written where that is above --max-error. A server is to load the weights that the
adapter was trained over: of a base in 4 bits, those that --base-to writes (docs/serving.md)."""
    parser.add_argument("folder", help="of a saved adapter")
    parser.add_argument("--output", required=True, metavar="DIR", help="the LoRA; must not exist yet")
    parser.add_argument("--texts", metavar="FILE", help="to fit on: JSON lines (prompt and answer, or text), or lines")
    parser.add_argument(
        "--test-texts", metavar="FILE", help="others, to measure the error on (every fourth of --texts)"
    )
    parser.add_argument("--rank", type=count, help="of a fitted LoRA (as many as there are experts; more cannot help)")
    parser.add_argument(
        "--max-error",
        type=bound,
        default=0.1,
        help="share of the effect on logits that may be lost (%(default)s)",
    )
    parser.add_argument(
        "--base-to", metavar="DIR", help="the quantised base in 16 bits, for servers; must not exist yet"
    )
    _add_model(parser, "the base model (the one that the adapter names)")

    def call(args: Any) -> None:
        from peft_mora.export import (
            check_apart,
            check_linear_alone,
            effect_error,
            exact_lora,
            fit_lora,
            save_lora,
            save_with_base,
        )
        from peft_mora.files import check_new
        from peft_mora.info import TEXT, adapter_info, vllm_options
        from peft_mora.inputs import batches_of, check_length, writes_text
        from peft_mora.lora_file import read_config
        from peft_mora.merging.inputs import encoded, saved_tokenizer
        from peft_mora.opening import with_adapter

        def load() -> Any:
            base = load_model(args, args.folder)
            if args.base_to and getattr(base, "hf_quantizer", None) is None:
                raise ValueError(
                    f"{args.model} is not quantised: a server loads it as it is. Leave out --base-to, or give "
                    "--load-in-4bit where the adapter was trained over it in NF4."
                )
            return base

        def write(model: Any, loras: Any, said: str) -> None:
            to = (model, loras, args.output)
            config = save_with_base(*to, args.base_to, args.folder) if args.base_to else save_lora(*to)
            server = f"; vLLM: {vllm_options(config.r, not found.routed)}" if found.opens == TEXT else ""
            print(f"{said}LoRA of rank {config.r} in {args.output}{server}")
            if args.base_to:
                print(f"its base in 16 bits in {args.base_to}")

        found = adapter_info(args.folder)
        if found.lora == "is":
            raise ValueError(f"{args.folder} is a plain LoRA already: serve it as it is.")
        if found.merges is None:
            raise ValueError(f"{args.folder} is of PEFT's {found.method}, and this exports adapters of this package.")
        if found.method == "LORA":
            raise ValueError(
                found.refusal or f"{args.folder} is a LoRA with {', '.join(found.also)}: serve it in PEFT."
            )
        check_linear_alone(read_config(args.folder), args.folder)
        for option, folder in (("--output", args.output), ("--base-to", args.base_to)):
            if folder and Path(folder).exists():
                raise ValueError(f"{folder} exists: delete it or choose another {option}.")
            if folder:
                check_new(folder)
        if args.base_to:
            check_apart(args.output, args.base_to)
        args.model = args.model or found.base
        if args.model is None:
            raise ValueError(f"{args.folder} does not say which base it is for: give it as --model NAME_OR_DIR.")
        if found.merges:
            fitted = {"--texts": args.texts, "--test-texts": args.test_texts, "--rank": args.rank}
            if idle := [option for option, value in fitted.items() if value is not None]:
                raise ValueError(
                    f"{args.folder} ({found.method}) leaves exactly, at its own rank: {', '.join(idle)} would change "
                    "nothing. Leave that out; peft-mora merge FOLDER --rank R cuts an adapter to a rank."
                )
            there = load() if args.base_to else _without_weights(args.model, args.folder)
            write(model := with_adapter(there, args.folder), exact_lora(model), "exact; ")
            return
        if not found.routed:
            raise ValueError(found.refusal)
        if args.texts is None:
            raise ValueError(
                f"{args.folder} ({found.method}) chooses experts for every token, so no LoRA equals it: give --texts "
                "FILE, texts of its task, to fit the closest one on."
            )
        texts = list(dict.fromkeys(read_texts(args.texts, answers=True)))  # one that is fitted is no measure
        if args.test_texts:
            given, fit_on = read_texts(args.test_texts, answers=True), set(texts)
            test = [text for text in dict.fromkeys(given) if text not in fit_on]
            if not test:
                raise ValueError(f"All of {args.test_texts} is in {args.texts} too: give texts that are not fitted.")
        elif len(texts) > 1:
            test, texts = texts[::4], [text for i, text in enumerate(texts) if i % 4]
        else:
            raise ValueError(f"{args.texts} has one text: give at least two, to fit on and to measure.")
        base = load()
        if not writes_text(base):
            raise ValueError(
                f"How close a LoRA comes is measured by next tokens, and {args.folder} is over a "
                f"{type(base).__name__}, which gives none: serve the adapter itself, or train one that merges."
            )
        tokenizer = saved_tokenizer(base, args.folder)
        both = [encoded(part, tokenizer) for part in (texts, test)]
        check_length(base, [*both[0], *both[1]])
        model = with_adapter(base, args.folder).eval()
        seen, unseen = (
            [
                {name: x.to(model.device) for name, x in batch.items()}
                for batch in batches_of(rows, max(1, min(8, 8192 // max(map(len, rows)))))
            ]
            for rows in both
        )
        loras = fit_lora(model, seen, rank=args.rank)
        effect = effect_error(model, loras, unseen)
        said = (
            f"fitted on {len(texts)} texts; error of the effect on logits, {len(test)} others: {effect.error:.2g}; "
            f"next token as the adapter's: LoRA {effect.same_token:.1%}, base alone {effect.same_token_base:.1%}"
        )
        if not effect.error <= args.max_error:
            raise ValueError(f"Nothing written: {said}. Above --max-error {args.max_error:g}.")
        write(model, loras, f"{said}\n")

    return call


def route(parser: argparse.ArgumentParser) -> Callable[[Any], None]:
    parser.description = """Which task's adapter a prompt is for: make a router, ask it, put it before adapters.

  peft-mora route out/router --model BASE --add pets=pets.jsonl walks=walks.jsonl
  peft-mora route out/router --model BASE "a small dog sat" "west east south"
  peft-mora route out/router --remove walks
  peft-mora route out/router --model BASE --adapters pets=out/pets walks=out/walks --output out/routed

A router is a few prompts' features of each task, solved and not trained. The last line writes the adapters and the
router as one folder, which PEFT, pipeline and lm-eval open as they open an adapter."""
    parser.add_argument("router", help="folder of the router; --add makes it where it is not there")
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="to route: each is printed with its task, or none"
    )
    parser.add_argument("--file", help="of prompts to route: JSON lines (prompt, text) or lines of text")
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--add", **several, metavar="TASK=FILE", help="learn tasks from a few prompts each")
    parser.add_argument("--remove", **several, metavar="TASK", help="forget tasks")
    parser.add_argument("--adapters", **several, metavar="TASK=DIR", help="an adapter for each task")
    parser.add_argument("--output", metavar="DIR", help="with --adapters: the folder of them all and the router")
    parser.add_argument(
        "--false-alarms", type=below_one, metavar="SHARE", help="of a new router: known prompts that may be none"
    )
    _add_model(parser, "the base model")

    def call(args: Any) -> None:
        from peft_mora import TaskRouter
        from peft_mora.files import check_own
        from peft_mora.lora_file import read_config
        from peft_mora.opening import with_adapter
        from peft_mora.task_router import FILES, check_routed

        added, adapters = _pairs(args.add, "--add"), _pairs(args.adapters, "--adapters")
        texts = [*args.prompts, *(read_texts(args.file) if args.file else [])]
        if bool(adapters) != bool(args.output):
            raise ValueError("--adapters and --output go together: TASK=DIR of each task, and the folder to write.")
        if args.false_alarms is not None and (not added or Path(args.router).exists()):
            raise ValueError("--false-alarms is of a new router, which --add makes where none is there: leave it out.")
        if (added or texts or adapters) and args.model is None:
            raise ValueError("A router reads prompts with the base model: give it as --model NAME_OR_DIR.")
        new = {name: read_texts(file) for name, file in added.items()}
        if new or args.remove:
            check_own(args.router, FILES)
        if adapters:
            check_routed(args.output)
        for folder in adapters.values():
            read_config(folder)
        if not new:
            TaskRouter.load(args.router, None)  # is it there?
        model: Any = load_model(args) if args.model else None
        if Path(args.router).exists() or not new:
            router = TaskRouter.load(args.router, model)
        else:
            options = {} if args.false_alarms is None else {"false_alarms": args.false_alarms}
            router = TaskRouter(model, **options)
        for name in args.remove:
            router.remove_task(name)
        for name, prompts in new.items():
            if name in router.tasks:
                raise ValueError(f"The router has a task {name!r} already: --remove {name} forgets it first.")
            router.add_task(name, prompts)
        if unknown := adapters.keys() - set(router.tasks):
            raise ValueError(
                f"The router has no task {', '.join(map(repr, sorted(unknown)))}, but {', '.join(router.tasks)}: "
                "--add TASK=FILE teaches it one, or leave its adapter out."
            )
        if new or args.remove:
            router.save(args.router)
        if new or args.remove or not (texts or adapters):
            print(f"{args.router} knows {', '.join(router.tasks) or 'no task'}")
        if texts:
            routes = router.route(texts)
            for text, name, row in zip(texts, routes.names, routes.probabilities.tolist(), strict=True):
                print(f"{name}\t{max(row):.3f}\t{' '.join(text.split())}")
        if adapters:
            own = module_names(adapters, router.tasks)
            for name, folder in adapters.items():
                model = with_adapter(model, folder, own[name])
            router.attach(model.eval(), adapters=own)
            router.save_pretrained(args.output)
            print(f"{len(adapters)} adapters and the router are in {args.output}")

    return call


def protect(parser: argparse.ArgumentParser) -> Callable[[Any], None]:
    parser.description = """Write a memory of text, for OrthogonalProjectionCallback to leave as it is. Trains nothing.

  peft-mora protect Qwen/Qwen3-0.6B --output out/general --load-in-4bit
  peft-mora protect Qwen/Qwen3-0.6B --output out/general --source pages.jsonl --tokens 20480

In the training script: OrthogonalProjectionCallback("out/general")."""
    parser.add_argument("model", help="base model: a folder, or a name on the Hub")
    parser.add_argument("--source", default="self", help="self: text that it samples; or JSON lines (%(default)s)")
    parser.add_argument("--output", required=True, metavar="DIR", help="the memory; an earlier one there is replaced")
    parser.add_argument(
        "--energy", type=share, help="share of the inputs' energy that is held (the library's default)"
    )
    parser.add_argument("--tokens", type=count, help="to look at (the library's default)")
    _add_model(parser)

    def call(args: Any) -> None:
        from trl_callbacks import protect
        from trl_callbacks.general_text import TOKENS, check_source
        from trl_callbacks.subspace import Subspace

        Subspace.check_folder(args.output)
        given = {name: getattr(args, name) for name in ("energy", "tokens") if getattr(args, name) is not None}
        if args.source != "self":
            if not Path(args.source).is_file():
                raise ValueError(f"--source {args.source}: no such file; give JSON lines, or self.")
            check_base(args.model)
            check_source(args.source, args.model, args.tokens or TOKENS)
        model = load_model(args)
        found = protect(model, args.source, args.output, **given)
        ranks = [len(basis.T) for basis in found.right.values()]
        print(
            f"{args.output}: {found.tasks[-1]['tokens']} tokens, {len(ranks)} inputs, "
            f"{sum(ranks) / len(ranks):.0f} directions each on average"
        )

    return call


VERBS = {"info": info, "merge": merge, "export": export, "route": route, "protect": protect}


def _add_model(parser: argparse.ArgumentParser, what: str = "") -> None:
    if what:
        parser.add_argument("--model", metavar="NAME_OR_DIR", help=what)
    parser.add_argument("--device", help="cpu, cuda, … (a GPU where there is one)")
    parser.add_argument("--load-in-4bit", action="store_true", help="the base in NF4 (bitsandbytes)")


def load_model(args: Any, folder: str | None = None) -> Any:
    """The base model of --model, on --device, in 4 bits if asked, with the kernels of training; of the class that the
    adapter in a folder was trained over, else a causal language model."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from peft_mora import use_exact_4bit_kernels
    from peft_mora.opening import base_class, revision_of
    from peft_mora.quantization import nf4_config

    check_base(args.model)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    options: dict[str, Any] = {"quantization_config": nf4_config()} if args.load_in_4bit else {}
    kind = AutoModelForCausalLM
    if folder:
        kind, options = base_class(folder, args.model), options | revision_of(folder, args.model)
    try:
        model = kind.from_pretrained(args.model, dtype="auto", device_map=device, **options)
    except SafetensorError as error:
        raise ValueError(f"The weights of {args.model} are damaged ({error}): download or save them again.") from error
    use_exact_4bit_kernels(model)
    return model.eval()


def check_device(device: str) -> None:
    """Refuse what torch cannot compute on here.

    Raises:
        ValueError: no such device, or a torch that is built without it.
    """
    import torch

    try:
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: torch cannot use it here ({error}).") from error


def check_base(name_or_dir: str) -> None:
    """Refuse what is neither a folder nor can be a name on the Hub, and an adapter's folder, which transformers opens
    as its base with the adapter in it.

    Raises:
        ValueError: with what to give.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if Path(name_or_dir, "adapter_config.json").exists():
        raise ValueError(f"{name_or_dir} is an adapter: give its base model (peft-mora info {name_or_dir} names it).")
    if not Path(name_or_dir).exists():
        try:
            validate_repo_id(name_or_dir)
        except HFValidationError as error:
            raise ValueError(f"{name_or_dir} is no folder here, and no name on the Hub: give the base's.") from error


def _without_weights(base: str, folder: str) -> Any:
    """The base model of its config alone, for what needs names and shapes."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    from peft_mora.lora_file import PREFIX, TENSORS
    from peft_mora.opening import base_class, revision_of

    check_base(base)
    kind, config = base_class(folder, base), AutoConfig.from_pretrained(base, **revision_of(folder, base))
    with torch.device("meta"):
        make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        model = make(config, dtype=torch.float32)
    with safe_open(Path(folder) / TENSORS, "pt") as file:  # of an adapted head PEFT saves the base's weight too
        saved = {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in file.keys()}  # noqa: SIM118
    written = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in saved}
    nothing = torch.zeros(())  # seen at every place of every weight: adapters are made where a base's weights are
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:  # what is tied stays tied
                place = torch.zeros(weight.shape) if id(weight) in written else nothing.expand(weight.shape)
                made.setdefault(id(weight), torch.nn.Parameter(place, requires_grad=False))
                module._parameters[name] = made[id(weight)]
    return model


def read_texts(path: str, answers: bool = False) -> list[str]:
    """Texts of a file: JSON lines with `text`, `page` or `prompt` (with `answers` and its `answer` or `completion`),
    else every line that is not empty.

    Raises:
        ValueError: there is none, or a record without one; names the file and the line.
    """
    from peft_mora.json_lines import read_jsonl, read_lines

    if path.removesuffix(".gz").endswith((".jsonl", ".json")):
        found = [_text_of(record, f"{path}:{number}", answers) for number, record in read_jsonl(path)]
    else:
        found = [line for _, line in read_lines(path)]
    if not found:
        raise ValueError(f"{path} has no text in it.")
    return found


def _text_of(record: Any, place: str, answers: bool) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{place} is no object; write one a line, with 'text' or 'prompt'.")
    text = next((record[name] for name in ("text", "page", "prompt") if name in record), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no text: write a non-empty 'text' or 'prompt'.")
    if not answers or "prompt" not in record:
        return text
    name = "answer" if "answer" in record else "completion"
    answer = record.get(name, "")
    if not isinstance(answer, (str, int, float)):
        raise ValueError(f"{place} has a {type(answer).__name__} as {name!r}: write it as text, as the prompt is.")
    return text + (f" {answer}" if name == "answer" else str(answer))


def _pairs(given: list[str], flag: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if wrong := next(
        (text for text, (name, _, value) in zip(given, pairs, strict=True) if not (name and value)), None
    ):
        raise ValueError(f"{flag} {wrong}: write TASK=PATH.")
    names = [name for name, _, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{flag} has {twice} twice, of which one would be left out: name each once.")
    return {name: value for name, _, value in pairs}


def module_names(tasks: Iterable[str], known: Sequence[str]) -> dict[str, str]:
    """Names for the tasks' adapters, which are entries of a ModuleDict: without a dot, none of its own ("keys"), and
    no other known task's, which would find an adapter by its name."""
    from torch.nn import ModuleDict

    found: dict[str, str] = {}
    own = ModuleDict()
    for task in tasks:
        name = task.replace(".", "_")
        while hasattr(own, name) or name in found.values() or (name != task and name in known):
            name += "_"
        found[task] = name
    return found


# Arguments of `merge_adapters` that are flags here, or cannot be written in JSON.
NO_OPTIONS = "folders model prompts tokenizer rule rank weights before after seed output".split()


def _options(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object: write a rule's options as '{{\"density\": 0.1}}'")
    if own := [name for name in NO_OPTIONS if name in found]:
        raise argparse.ArgumentTypeError(f"{own[0]!r} is no option of a rule; --help has what is a flag")
    return found


def _number(text: str, fits: Callable[[float], bool], wanted: str) -> float:
    """As the type of an argument; NaN and infinity are none."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and fits(found)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return found


def _integer(text: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= {least}")
    return int(text)


# Types of arguments, of the programs in recipes/ too.
finite = partial(_number, fits=lambda x: True, wanted="a finite number")
rate = partial(_number, fits=lambda x: x > 0, wanted="a finite number > 0")
bound = partial(_number, fits=lambda x: x >= 0, wanted="a finite number >= 0, e.g. 0.1")
share = partial(_number, fits=lambda x: 0 < x <= 1, wanted="a share in (0, 1]")
below_one = partial(_number, fits=lambda x: 0 <= x < 1, wanted="a number in [0, 1)")
number, count, several = (partial(_integer, least=least) for least in range(3))


def merged_rank(text: str) -> str | int | float:
    """What --rank of a merged adapter takes."""
    found: Any
    try:
        found = text if text == "sum" else int(text) if text.isdecimal() else float(text)
    except ValueError:
        found = 0
    if found != "sum" and not (found >= 1 if isinstance(found, int) else 0 < found < 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not sum, an integer >= 1, or a share of the energy in (0, 1)")
    return found


if __name__ == "__main__":
    main()
