"""What many tests write: the table of methods, tiny models, adapted ones, a short trainer run, several processes."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    TrainerCallback,
)

import peft_mora
from peft_mora import start_task
from peft_mora.inputs import InputStatistics


class Form(NamedTuple):
    """One way to use a method. `METHODS["lori"](target_modules=...)` is a small config of it."""

    config: Callable[..., Any]
    model: type
    merges: bool
    fields: dict[str, Any]

    def __call__(self, **fields):
        return self.config(**{**self.fields, **fields})

    @property
    def prefix(self) -> str:
        """Of its parameters: "lori_"."""
        return self.model.prefix

    @property
    def title(self) -> str:
        """As errors have it: "LORI"."""
        return self().peft_type.value


# A new method is a row here: its forms, as (does it merge?, what a small config of rank 4 has besides).
FORMS = {
    "mora": {
        "": (False, {"top_k": 2}),
        "bank": (False, {"top_k": 2, "routing": "bank", "temperature": 0.1, "threshold": 0.2}),
        "dense": (True, {"routing": "dense"}),
    },
    "lori": {
        "": (True, {"alpha": 8}),
        "sparse": (True, {"alpha": 8, "sparsity": 0.5, "save_projection": False}),
    },
    "flylora": {
        "": (False, {"top_k": 2, "alpha": 32}),
        "signed": (False, {"top_k": 2, "alpha": 32, "selection": "signed", "save_projection": False}),
    },
    "mtllora": {"": (True, {"tasks": ["a", "b"], "default_task": "b"})},
    "smora": {"": (False, {"top_k": 2, "alpha": 8})},
    "furina": {"": (True, {"r": 2, "experts": 2, "alpha": 4})},
}
METHODS = {
    f"{name}-{form}" if form else name: Form(method.config, method.model, merges, {"r": 4, **fields})
    for name, method in peft_mora.METHODS.items()
    for form, (merges, fields) in FORMS[name].items()
}
STATIC = tuple(name for name, form in METHODS.items() if form.merges)


def lora_config(init_weights=True, alpha=8, dropout=0.0, **kwargs) -> LoraConfig:
    """PEFT's own, under the names that ours have for the same."""
    return LoraConfig(init_lora_weights=init_weights, lora_alpha=alpha, lora_dropout=dropout, **kwargs)


LORA = Form(lora_config, LoraModel, True, {"r": 4})  # the control beside METHODS
PREFIXES = tuple({form.prefix for form in (LORA, *METHODS.values())})
WORDS = "the a cat dog sat ran on under mat log red blue big small yes no north south east west".split()
RECIPES = Path(__file__).parent.parent / "recipes"


def tiny_llama(seed: int = 0, tied: bool = False, **kwargs) -> nn.Module:
    """Two layers, hidden size 64, 64 words: everything that real Llamas have, in 0.1 M parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config, **kwargs)


def tiny_gpt2(seed: int = 0) -> nn.Module:
    """Its linear layers are transformers' `Conv1D`, which keeps the weight transposed."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2)
    )


def tiny_bert(head: type, **fields) -> nn.Module:
    """An encoder of one layer, hidden size 32, with a head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return head(BertConfig(**sizes, vocab_size=40, num_labels=3, **fields)).eval()


def tiny_t5() -> nn.Module:
    """An encoder and a decoder of one layer each, hidden size 32; no dropout of its own."""
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=64, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return AutoModelForSeq2SeqLM.from_config(config)


def quantized(folder: str, bits: int = 4, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    nf4 = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    config = BitsAndBytesConfig(load_in_4bit=True, **nf4) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=device, dtype=dtype)


def randomize(model: nn.Module, seed: int = 3) -> None:
    """Give the trainable adapter weights values as training would: an adapter with B = 0 tests nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(prefix in name for prefix in PREFIXES):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def adapted(config: str | Callable[..., Any], base: nn.Module | None = None, *, tasks: int = 1, **fields) -> PeftModel:
    """In eval mode, with values as after training. `config` is a name in METHODS or makes a config of `fields`, the
    base a tiny Llama; `tasks` > 1 are MORA's."""
    torch.manual_seed(0)
    make = METHODS[config] if isinstance(config, str) else config
    base = tiny_llama() if base is None else base
    model = get_peft_model(base, make(**{"target_modules": "all-linear", **fields}))
    randomize(model)
    for task in range(1, tasks):
        start_task(model, f"task{task}")
        randomize(model, seed=task)
    return model.eval()


def reopened(model: PeftModel, folder, base: nn.Module | None = None, name: str = "", **options) -> PeftModel:
    """Saved into `folder`, and its adapter (or the one that is called `name`) opened over `base`, a tiny Llama."""
    model.save_pretrained(folder)
    base = tiny_llama() if base is None else base
    return PeftModel.from_pretrained(base, Path(folder, name), **options).eval()


def gradients(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of one step; load-balance offsets, which move with every backward, are put back."""
    offsets = {name: buffer.clone() for name, buffer in model.named_buffers() if "_offset" in name}
    model.zero_grad()
    model(input_ids=inputs, labels=inputs).loss.backward()
    for name, buffer in model.named_buffers():
        if name in offsets:
            buffer.copy_(offsets[name])
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def inputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What goes into each module meanwhile, a tensor a forward."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach()))
        for name, module in modules.items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


def given_statistics(covariance: dict[str, torch.Tensor], groups: dict[str, tuple[str, ...]]) -> InputStatistics:
    """Statistics that need no model."""
    sizes = {name: len(C) for name, C in covariance.items()}
    return InputStatistics(groups, sizes, lambda names: {name: covariance[name] for name in names})


def padded() -> dict[str, torch.Tensor]:
    """Three rows of 11, 7 and 4 real tokens, padded on either side."""
    ids = torch.randint(4, 24, (3, 11), generator=torch.Generator().manual_seed(7))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 7:], mask[2, :7] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def jsonl(path: Path, *records) -> Path:
    """Lines of JSON, or of what is a string as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_task(folder: Path, labels: tuple[str, ...]) -> None:
    """Twelve records of the tiny model's words to train on and six to test, a label each."""
    for split, n in (("train", 12), ("test", 6)):
        rows = [{"prompt": f"the {WORDS[i]} is", "answer": labels[i % 2]} for i in range(n)]
        jsonl(folder / f"{split}.jsonl", *rows)


def csv_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def texts(n: int = 24):
    """A data set of n sentences of eight words."""
    from datasets import Dataset

    picks = torch.randint(0, len(WORDS), (n, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"text": [" ".join(WORDS[i] for i in row) for row in picks]})


def sft(model: nn.Module, folder: str, output, peft_config=None, callbacks=None, processing_class=None, **arguments):
    """TRL's trainer, not yet run: six steps of 2 x 2 sentences. `folder` has the tokenizer, if none is given, `output`
    gets what is written, `arguments` are SFTConfig's, and other data sets."""
    from trl import SFTConfig, SFTTrainer

    data = {name: arguments.pop(f"{name}_dataset", texts(n)) for name, n in (("train", 24), ("eval", 4))}

    tiny = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(output), **{**tiny, **arguments}),
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=processing_class or AutoTokenizer.from_pretrained(folder),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def trl_trainer(name: str, method, folder: str, output, data: dict, model=None, **arguments):
    """TRL's `name`Trainer, not yet run: three steps of four rows on a 4-bit base. `method` is one of METHODS, or the
    config; a `model` that has its adapter needs none. `arguments` are the config's."""
    import trl
    from datasets import Dataset

    torch.manual_seed(0)
    arguments = {
        "output_dir": str(output), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "seed": 0,
        **arguments,
    }  # fmt: skip
    rewards = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
    return getattr(trl, f"{name}Trainer")(
        model=model or quantized(folder),
        args=getattr(trl, f"{name}Config")(**arguments),
        train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=METHODS[method](target_modules="all-linear") if isinstance(method, str) else method,
        **rewards if name in ("GRPO", "RLOO") else {},
    )


class At(TrainerCallback):
    """Do something once, at the end of a step: stop the run, interrupt it, or run out of memory as CUDA does."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what, self.done = step, what, False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.done:
            self.done = True
            if self.what == "stop":
                control.should_training_stop = True
            elif self.what == "interrupt":
                raise KeyboardInterrupt
            else:
                raise RuntimeError("CUDA out of memory.")


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ranks(body: str, folder, world: int = 2, timeout: float = 300) -> None:
    """Run `body` in `world` processes of one gloo group, with `rank`, `torch` and `dist` at hand; tests can be
    imported, and a Trainer finds the group. When one of them fails, the others, which would wait for it, end too.

    Raises:
        AssertionError: with the last lines of each that failed, or that `timeout` seconds were not enough.
    """
    program = (
        f"import sys, torch, torch.distributed as dist\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(RECIPES)!r}]\n"
        f"rank = int(sys.argv[1])\n"
        f"dist.init_process_group('gloo', init_method='file://{folder}/rendezvous', rank=rank, world_size={world})\n"
        f"{textwrap.dedent(body)}\n"
        f"dist.destroy_process_group()\n"
    )
    logs = [Path(folder, f"rank{rank}.log") for rank in range(world)]
    runs = []
    try:
        for rank, log in enumerate(logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
            place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # accelerate asks for them, and takes the group
            with log.open("w") as file:
                command = [sys.executable, "-c", program, str(rank)]
                runs.append(subprocess.Popen(command, env=os.environ | place, stdout=file, stderr=file))
        end = time.monotonic() + timeout
        while None in (codes := [run.poll() for run in runs]) and not any(codes):
            assert time.monotonic() < end, f"not done after {timeout} seconds: {codes}"
            time.sleep(0.05)
    finally:
        for run in runs:
            run.kill()
            run.wait()
    told = [f"rank {rank} ended with {code}:\n{logs[rank].read_text()[-2000:]}" for rank, code in enumerate(codes)]
    assert codes == [0] * world, "\n".join(text for text, code in zip(told, codes, strict=True) if code != 0)


def load_recipe(name: str):
    """By its path."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their types up there
    spec.loader.exec_module(module)
    return module
