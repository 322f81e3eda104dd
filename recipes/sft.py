"""TRL's own SFT script (`trl sft`) with one more choice: --peft_method lora, mora, lori, …

python recipes/sft.py                      # MORA on the embedded helpdesk task, offline, on a CPU
python recipes/sft.py --peft_method lori   # the same with another adapter
python recipes/sft.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara \\
    --load_in_4bit --use_bnb_nested_quant --dtype bfloat16 \\
    --peft_method mora --lora_r 16 --lora_alpha 512 --lora_target_modules all-linear --top_k 8

TRL's flags keep their names and meaning (`trl sft --help`, also --config FILE.yaml and accelerate launch), but that an
adapter is always trained: --use_peft needs not be given.
--lora_r, --lora_alpha, --lora_dropout, --lora_target_modules and --lora_modules_to_save are those of every method.
--dataset_name is a name on the Hub, a JSONL file, a folder with train.jsonl or one that save_to_disk wrote, or an
embedded task; its records have prompt and answer (or completion), messages, or text. Without --model_name_or_path it
is a small run on the embedded model, with settings that suit it; flags still change them.
"""

from __future__ import annotations

import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from functools import partial
from typing import Any, Literal, get_origin, get_type_hints

import torch
import trl
from shared.base_model import EMBEDDED, find_base
from shared.data import read_dataset
from shared.training import NAMES, comparable
from transformers import AutoTokenizer, TrainerCallback
from trl.scripts import sft

from peft_mora import METHODS, use_exact_4bit_kernels
from peft_mora.base import AdapterConfig
from trl_callbacks import ActivationBudgetCallback, LoriCalibrationCallback, TaskColumnCallback


SMALL_RUN = {
    "model_name_or_path": EMBEDDED, "dataset_name": "helpdesk", "output_dir": "out/sft", "dtype": "bfloat16",
    "lora_target_modules": ["all-linear"], "max_steps": 60, "learning_rate": 1e-3, "warmup_steps": 6,
    "lr_scheduler_type": "constant_with_warmup", "gradient_checkpointing": False, "save_strategy": "no",
    "report_to": "none", "use_cpu": not torch.cuda.is_available(),
}  # fmt: skip
SIMPLE = {int, float, bool, str, int | None, float | None, bool | None, str | None}


def own_fields() -> list[tuple[str, Any, Any]]:
    """The methods' config fields of a simple type, as arguments: help and, where none is given, default are theirs."""
    shared = {f.name for f in fields(AdapterConfig)} | {"seed"}  # --lora_r and the like, and --seed
    types: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for name, method in METHODS.items():
        hints = get_type_hints(method.config)
        for f in fields(method.config):
            hint = hints[f.name]
            if f.name not in shared and (hint in SIMPLE or get_origin(hint) is Literal):
                types.setdefault(f.name, hint | None)
                texts[f.name] = f"{texts.get(f.name, '')} [{name}, {f.default}] {f.metadata['help']}".strip()
    return [(name, types[name], field(default=None, metadata={"help": texts[name]})) for name in types]


@dataclass
class MethodArguments(make_dataclass("OwnFields", own_fields())):
    """In brackets: which --peft_method, and its default."""

    peft_method: str = field(default="mora", metadata={"help": "Adapter to train.", "choices": NAMES})
    calibration_steps: int | None = field(
        default=None,
        metadata={"help": "[lori] Train densely for so many steps, then only the (1 - sparsity) that matter."},
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "[mtllora] Names of the tasks; each record has its own in `task`."}
    )
    active_experts: float | None = field(
        default=None, metadata={"help": "[mora, flylora, smora] Anneal to so many active experts a token and a layer."}
    )


class ExactKernels(TrainerCallback):
    """Our adapters do this by themselves; after an evaluation on a CPU, plain LoRA would train on wrong gradients."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        use_exact_4bit_kernels(model)


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    pass


def main() -> None:
    types = (MethodArguments, trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    parser = trl.TrlParser(types, description=__doc__, formatter_class=Help)
    lora = {f.name: f.default for f in fields(trl.ModelConfig) if f.name in ("lora_r", "lora_alpha", "lora_dropout")}
    parser.set_defaults_with_config(**dict.fromkeys(lora))  # None is "not given": a method's own default counts
    parser.set_defaults_with_config(use_peft=True)
    flags = {argument.split("=")[0].replace("-", "_") for argument in sys.argv[1:] if len(argument) > 2}
    small = "__config" not in flags and not any("__model_name_or_path".startswith(flag) for flag in flags)
    if small:
        parser.set_defaults_with_config(**SMALL_RUN)
    method_args, script_args, args, model_args, mixture = parser.parse_args_and_config(fail_with_unknown_args=False)
    method = method_args.peft_method
    if not model_args.use_peft:
        parser.error("this trains an adapter, and --use_peft is false: all weights are trained by `trl sft`")
    if small:
        model_args.lora_r = model_args.lora_r or comparable(method, 8)["r"]
        model_args.lora_alpha = model_args.lora_alpha or comparable(method, 8)["alpha"]

    given = {name: value for name, value in asdict(method_args).items() if value is not None and name != "peft_method"}
    callbacks: list[TrainerCallback] = [ExactKernels()]
    if "active_experts" in given:
        callbacks.append(ActivationBudgetCallback(given.pop("active_experts")))  # it says which adapters have experts
    if "tasks" in given:
        callbacks.append(TaskColumnCallback())
    if "calibration_steps" in given:
        callbacks.append(LoriCalibrationCallback(given.pop("sparsity", 0.9), given.pop("calibration_steps")))
    if small:
        given = {name: v for name, v in comparable(method, 8).items() if name not in ("r", "alpha")} | given
    names = {f.name for f in fields(METHODS[method].config)} if method in METHODS else set()
    for name in given.keys() - names:
        parser.error(f"--{name} is no field of {method}; leave it out, or choose another --peft_method")
    for name in ("use_dora", "use_rslora", "lora_target_parameters"):
        if method != "lora" and getattr(model_args, name):
            parser.error(f"--{name} is LoRA's own; leave it out, or take --peft_method lora")

    def get_peft_config(model_args: trl.ModelConfig) -> Any:
        if method == "lora":
            for name, default in lora.items():
                if getattr(model_args, name) is None:
                    setattr(model_args, name, default)
            config = trls_get_peft_config(model_args)
            config.revision = revision
            return config
        common = {"r": model_args.lora_r, "alpha": model_args.lora_alpha, "dropout": model_args.lora_dropout}
        common = {name: value for name, value in common.items() if value is not None}
        common |= {"seed": args.seed} if "seed" in names else {}
        return METHODS[method].config(
            task_type=model_args.lora_task_type, target_modules=model_args.lora_target_modules,
            modules_to_save=model_args.lora_modules_to_save, revision=revision, **common, **given,
        )  # fmt: skip

    revision = None if model_args.model_revision == "main" else model_args.model_revision
    quantised = model_args.load_in_4bit or model_args.load_in_8bit
    embedded = model_args.model_name_or_path == EMBEDDED
    if embedded:
        bits = 16 if quantised else 4  # 16: by the flags, on loading
        model_args.model_name_or_path = find_base(bits=bits, device="cpu" if args.use_cpu else args.device.type)

    def get_dataset(_: trl.DatasetMixtureConfig) -> dict[str, Any]:
        checked = {}
        split = args.packing and args.packing_strategy != "bfd"  # then nothing is cut off
        if not split and not args.chat_template_path:  # a template that is not loaded yet
            model, trust = model_args.model_name_or_path, args.trust_remote_code
            options = {"revision": model_args.model_revision, "trust_remote_code": trust}
            checked = {"tokenizer": AutoTokenizer.from_pretrained(model, **options), "max_length": args.max_length}
        parts = [script_args.dataset_train_split]
        parts += [script_args.dataset_test_split] if args.eval_strategy != "no" else []
        script_args.dataset_name = name  # for the model card
        found = {part: read_dataset(name, part, script_args.dataset_config, **checked) for part in parts}
        if method == "mtllora" and "tasks" not in given and "task" in found[parts[0]].column_names:
            parser.error(f"the records of {name} name their task: give the tasks' names, --tasks A B")
        return found

    # TRL's main asks its own package for each of these when it runs.
    trls_get_peft_config = trl.get_peft_config
    trl.get_peft_config, trl.SFTTrainer = get_peft_config, partial(trl.SFTTrainer, callbacks=callbacks)
    name = script_args.dataset_name
    if name and not mixture.datasets and not script_args.dataset_streaming:
        trl.get_dataset, mixture.datasets, script_args.dataset_name = get_dataset, [name], None
    sft.main(script_args, args, model_args, mixture)
    sixteen = "" if quantised or embedded else " --bits 16"
    print(f"Evaluate it: python recipes/score.py --adapter {args.output_dir}{sixteen} --task ...")
    nf4 = model_args.load_in_4bit and model_args.bnb_4bit_quant_type == "nf4" and model_args.use_bnb_nested_quant
    if quantised and not nf4:
        print("  over a base in NF4 with nested quantisation, which this run's was not: its scores are another base's")


if __name__ == "__main__":
    main()
