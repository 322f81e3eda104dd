"""The environment of every test, and the fixtures of all files. CPU, no network."""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
CACHE = tempfile.TemporaryDirectory(prefix="peft-mora-")  # for 4-bit copies of the tiny models
os.environ["PEFT_MORA_CACHE"] = CACHE.name
TRACKIO = tempfile.TemporaryDirectory(prefix="trackio-")  # trackio asks where to write when TRL imports it
os.environ["TRACKIO_DIR"] = TRACKIO.name
os.environ["TOKENIZERS_PARALLELISM"] = "false"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package at every import

import accelerate.utils.imports
import datasets.arrow_dataset
import datasets.fingerprint
import jinja2
import pytest
import torch
from helpers import METHODS, WORDS, load_recipe, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import peft_mora


torch.set_num_threads(1)  # two test processes on two cores; OpenMP threads fighting over them cost 4x

# What the hosts do over and over, and no test is about. The same template of a model card a thousand times:
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)
# is there a peft, at every step:
accelerate.utils.imports._is_package_available = functools.cache(accelerate.utils.imports._is_package_available)
# a hash of each function that is mapped over a data set, to find what an earlier process has computed:
for module in (datasets.fingerprint, datasets.arrow_dataset):
    module.update_fingerprint = lambda *arguments: datasets.fingerprint.generate_random_fingerprint()
# and a traceback for each kind of device that is not there, in `torch.manual_seed`.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None


@pytest.fixture(autouse=True, scope="module")
def what_is_there_stays():
    """A trainer collects garbage as it begins, through all that torch and the hosts have imported: 0.3 s each time, as
    much as the rest of a tiny run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


@pytest.fixture
def make_config(method):
    return METHODS[method]


@pytest.fixture(params=[pytest.param(m, marks=() if m in peft_mora.METHODS else pytest.mark.slow) for m in METHODS])
def form(request) -> str:
    """As `method`, for what takes long: a method's other forms than its first are slow cases."""
    return request.param


@pytest.fixture(params=peft_mora.METHODS)
def family(request) -> str:
    """Each method in its first form alone: for what its other forms cannot change."""
    return request.param


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> str:
    """A saved bf16 tiny Llama with a word-level tokenizer beside it."""
    folder = str(tmp_path_factory.mktemp("llama"))
    tiny_llama().to(torch.bfloat16).save_pretrained(folder)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def inputs() -> torch.Tensor:
    """(3, 11) token ids; odd on purpose."""
    return torch.randint(4, 24, (3, 11), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def run_recipe(monkeypatch, capsys):
    """Run a recipe, by name or loaded, as a person would; gives what it printed."""

    def run(recipe, *arguments) -> str:
        recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
        trl = sys.modules.get("trl")
        for name in ("get_peft_config", "get_dataset", "SFTTrainer") if trl else ():
            monkeypatch.setattr(trl, name, getattr(trl, name))  # sft.py puts its own there; afterwards TRL's are back
        monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", *map(str, arguments)])
        recipe.main()
        return capsys.readouterr().out

    return run
