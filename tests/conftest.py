"""Tiny models and the one list of methods that the whole suite is parametrised over. CPU, no network."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
TRACKIO = tempfile.TemporaryDirectory(prefix="trackio-")  # trackio asks where to write when TRL imports it
os.environ["TRACKIO_DIR"] = TRACKIO.name
os.environ["TOKENIZERS_PARALLELISM"] = "false"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package at every import

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from peft_mora import FlyLoraConfig, LoriConfig, MoraConfig


torch.set_num_threads(1)  # two test processes on two cores; OpenMP threads fighting over them cost 4x

# A new method is a row here.
METHODS = {
    "mora": lambda **kw: MoraConfig(r=4, top_k=2, **kw),
    "mora-bank": lambda **kw: MoraConfig(r=4, top_k=2, routing="bank", temperature=0.1, threshold=0.2, **kw),
    "mora-dense": lambda **kw: MoraConfig(r=4, routing="dense", **kw),
    "lori": lambda **kw: LoriConfig(r=4, alpha=8, **kw),
    "lori-sparse": lambda **kw: LoriConfig(r=4, alpha=8, sparsity=0.5, save_projection=False, **kw),
    "flylora": lambda **kw: FlyLoraConfig(r=4, top_k=2, alpha=32, **kw),
    "flylora-signed": lambda **kw: FlyLoraConfig(
        r=4, top_k=2, alpha=32, selection="signed", save_projection=False, **kw
    ),
}
STATIC = ("mora-dense", "lori", "lori-sparse")

WORDS = "the a cat dog sat ran on under mat log red blue big small yes no north south east west".split()


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def make_config(method):
    return METHODS[method]


def tiny_llama(seed: int = 0, **kwargs) -> nn.Module:
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
    )
    return AutoModelForCausalLM.from_config(config, **kwargs)


def tiny_gpt2(seed: int = 0) -> nn.Module:
    """Its linear layers are transformers' `Conv1D`, which keeps the weight transposed."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2)
    )


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> str:
    """A saved bf16 tiny Llama with a word-level tokenizer beside it."""
    folder = str(tmp_path_factory.mktemp("llama"))
    tiny_llama().to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordLevel(
            {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {w: i + 4 for i, w in enumerate(WORDS)}, "<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def quantized(folder: str, bits: int = 4) -> nn.Module:
    config = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )


@pytest.fixture
def inputs() -> torch.Tensor:
    """(3, 11) token ids; odd on purpose."""
    return torch.randint(4, 24, (3, 11), generator=torch.Generator().manual_seed(7))


def randomize(model: nn.Module, prefixes: tuple[str, ...] = ("mora_", "lori_", "flylora_"), seed: int = 3) -> None:
    """Give the trainable adapter weights values as training would: an adapter with B = 0 tests nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(prefix in name for prefix in prefixes):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def run_two_ranks(body: str, folder) -> None:
    """Run `body` in two gloo processes of this folder, with `rank`, `torch`, `dist` and the group set up."""
    program = (
        f"import sys, torch, torch.distributed as dist\n"
        f"sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})\n"
        f"rank = int(sys.argv[1])\n"
        f"dist.init_process_group('gloo', init_method='file://{folder}/rendezvous', rank=rank, world_size=2)\n"
        f"{textwrap.dedent(body)}\n"
        f"dist.destroy_process_group()\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for run in runs:
        _, error = run.communicate(timeout=120)
        assert run.returncode == 0, error[-2000:]


def gradients(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of one step; FLYLORA's load-balance offset, which moves with every backward, is put back."""
    offsets = {name: buffer.clone() for name, buffer in model.named_buffers() if "flylora_offset" in name}
    model.zero_grad()
    model(input_ids=inputs, labels=inputs).loss.backward()
    for name, buffer in model.named_buffers():
        if name in offsets:
            buffer.copy_(offsets[name])
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


RECIPES = Path(__file__).parent.parent / "recipes"


def load_recipe(name: str):
    """By its path: a plain `import evaluate` is the package of that name."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their types up there
    spec.loader.exec_module(module)
    return module
