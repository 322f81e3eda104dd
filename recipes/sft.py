"""TRL's own SFT script (`trl sft`) with one more choice: --peft_method lora, mora, lori or flylora.

python recipes/sft.py                      # MORA on the embedded helpdesk task, offline, on a CPU
python recipes/sft.py --peft_method lori   # the same with another adapter
python recipes/sft.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara --load_in_4bit \\
    --dtype bfloat16 --peft_method mora --lora_r 16 --lora_alpha 512 --lora_target_modules all-linear --top_k 8

All of TRL's flags keep their names and meaning (`trl sft --help`, also --config FILE.yaml and accelerate launch).
--lora_r, --lora_alpha, --lora_dropout, --lora_target_modules and --lora_modules_to_save are those of every method.
--dataset_name is a name on the Hub, a JSONL file, a folder with train.jsonl or one that save_to_disk wrote, or an
embedded task; its records have prompt and answer (or completion), messages, or text. Without --model_name_or_path it
is a small run on the embedded model, with settings that suit it; flags still change them.
"""

from __future__ import annotations

import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import data
import torch
import trl
from transformers import AutoTokenizer, TrainerCallback
from trl.scripts import sft

from peft_mora import FlyLoraConfig, LoriConfig, MoraConfig, use_exact_4bit_kernels
from trl_callbacks import ActivationBudgetCallback, LoriCalibrationCallback


CONFIGS: dict[str, Any] = {"mora": MoraConfig, "lori": LoriConfig, "flylora": FlyLoraConfig}
SMALL_RUN = {
    "model_name_or_path": data.EMBEDDED, "dataset_name": "helpdesk", "output_dir": "out/sft", "dtype": "bfloat16",
    "lora_target_modules": ["all-linear"], "max_steps": 60, "learning_rate": 1e-3, "warmup_steps": 6,
    "lr_scheduler_type": "constant_with_warmup", "gradient_checkpointing": False, "save_strategy": "no",
    "report_to": "none", "use_cpu": not torch.cuda.is_available(),
}  # fmt: skip
# (r, alpha) there: a MORA block's weights sum to 1, and a frozen projection needs more rank (recipes/demo.py)
SMALL_SCALE = {"lora": (8, 16), "mora": (8, 128), "lori": (32, 256), "flylora": (32, 256)}


def option(name: str, **metadata: Any) -> Any:
    """A method's config field as an argument: help and, where it is not given, default are the config's."""
    found = {method: f for method, config in CONFIGS.items() for f in fields(config) if f.name == name}
    text = " ".join(f"[{method}, {f.default}] {f.metadata['help']}" for method, f in found.items())
    return field(default=None, metadata={"help": text, **metadata})


@dataclass
class MethodArguments:
    """In brackets: which --peft_method, and its default."""

    peft_method: str = field(default="mora", metadata={"help": "Adapter to train.", "choices": ["lora", *CONFIGS]})
    top_k: int | None = option("top_k")
    routing: str | None = option("routing", choices=["task", "bank", "dense"])
    temperature: float | None = option("temperature")
    threshold: float | None = option("threshold")
    sparsity: float | None = option("sparsity")
    save_projection: bool | None = option("save_projection")
    density: float | None = option("density")
    selection: str | None = option("selection", choices=["magnitude", "signed"])
    balance_rate: float | None = option("balance_rate")
    calibration_steps: int | None = field(
        default=None,
        metadata={"help": "[lori] Train densely for so many steps, then only the (1 - sparsity) that matter."},
    )
    active_experts: float | None = field(
        default=None, metadata={"help": "[mora, flylora] Anneal to so many active experts a token and a layer."}
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
    flags = {argument.split("=")[0].replace("-", "_") for argument in sys.argv[1:]}
    small = not flags & {"__model_name_or_path", "__config"}
    if small:
        parser.set_defaults_with_config(**SMALL_RUN)
    method_args, script_args, args, model_args, mixture = parser.parse_args_and_config(fail_with_unknown_args=False)
    method = method_args.peft_method
    if small:
        model_args.lora_r = model_args.lora_r or SMALL_SCALE[method][0]
        model_args.lora_alpha = model_args.lora_alpha or SMALL_SCALE[method][1]

    given = {name: value for name, value in asdict(method_args).items() if value is not None and name != "peft_method"}
    callbacks: list[TrainerCallback] = [ExactKernels()]
    if "active_experts" in given:
        callbacks.append(ActivationBudgetCallback(given.pop("active_experts")))  # it says which adapters have experts
    if "calibration_steps" in given:
        callbacks.append(LoriCalibrationCallback(given.pop("sparsity", 0.9), given.pop("calibration_steps")))
    names = {f.name for f in fields(CONFIGS[method])} if method in CONFIGS else set()
    for name in given.keys() - names:
        parser.error(f"--{name} is no field of {method}; leave it out, or choose another --peft_method")
    for name in ("use_dora", "use_rslora", "lora_target_parameters"):
        if method != "lora" and getattr(model_args, name):
            parser.error(f"--{name} is LoRA's own; leave it out, or take --peft_method lora")

    def get_peft_config(model_args: trl.ModelConfig) -> Any:
        if method == "lora":
            model_args.use_peft = True
            for name, default in lora.items():
                if getattr(model_args, name) is None:
                    setattr(model_args, name, default)
            return trls_get_peft_config(model_args)
        common = {"r": model_args.lora_r, "alpha": model_args.lora_alpha, "dropout": model_args.lora_dropout}
        common = {name: value for name, value in common.items() if value is not None}
        common |= {"seed": args.seed} if "seed" in names else {}
        return CONFIGS[method](
            task_type=model_args.lora_task_type, target_modules=model_args.lora_target_modules,
            modules_to_save=model_args.lora_modules_to_save, **common, **given,
        )  # fmt: skip

    if model_args.model_name_or_path == data.EMBEDDED:
        quantized = not (model_args.load_in_4bit or model_args.load_in_8bit)  # else by the flags, on loading
        model_args.model_name_or_path = str(data.embedded_model(quantized=quantized))

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
        return {part: data.read_dataset(name, part, script_args.dataset_config, **checked) for part in parts}

    # TRL's main asks its own package for each of these when it runs.
    trls_get_peft_config = trl.get_peft_config
    trl.get_peft_config, trl.SFTTrainer = get_peft_config, partial(trl.SFTTrainer, callbacks=callbacks)
    name = script_args.dataset_name
    if name and not mixture.datasets and not script_args.dataset_streaming:
        trl.get_dataset, mixture.datasets, script_args.dataset_name = get_dataset, [name], None
    sft.main(script_args, args, model_args, mixture)
    print(f"Evaluate it: python recipes/evaluate.py --adapter {args.output_dir} --task ...")


if __name__ == "__main__":
    main()
