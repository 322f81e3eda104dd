"""What is read from a folder is data: nothing in it is unpickled, no Python file in it runs (SECURITY.md)."""

import json
import pickle
import shlex
from pathlib import Path

import pytest
import torch
from helpers import LORA, METHODS, adapted
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_mora import TaskRouter
from peft_mora.info import adapter_info
from peft_mora.lora_file import read_lora
from peft_mora.merging import collect_inputs, merge_adapters
from peft_mora.merging.inputs import Statistics
from peft_mora_command import main
from trl_callbacks import protect
from trl_callbacks.subspace import Subspace


TEXTS = ["the cat sat on the mat", "north south east west"]
NAMES = "adapter_model pytorch_model model training_args optimizer router basis subspace input_statistics".split()
CODE = "__init__ adapter_config adapter_model router subspace modeling configuration tokenization custom setup".split()


class Payload:
    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return Path.touch, (self.ran,)


def plant(folder: Path, ran: Path) -> None:
    """A pickle and a Python file that leave a mark, under every name that a loader could look for."""
    data = pickle.dumps(Payload(ran))
    for name in NAMES:
        for end in ("bin", "pt", "pth", "pkl"):
            (folder / f"{name}.{end}").write_bytes(data)
    for name in CODE:
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    for file in ("tokenizer_config.json", "config.json"):  # as remote code is named
        path = folder / file
        if path.exists():
            classes = {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M",
                       "AutoTokenizer": ["tokenization.T", "tokenization.T"]}  # fmt: skip
            path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": classes}))


def test_a_planted_pickle_and_planted_code_do_not_run(llama_folder, tmp_path, capsys):
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists()  # the mark is one that would be seen
    ran.unlink()

    def base():
        return AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    for name, method in (("one", "lora"), ("two", "mora-dense"), ("three", "mora")):
        model = adapted(LORA if method == "lora" else METHODS[method], base(), task_type="CAUSAL_LM")
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        plant(tmp_path / name, ran)
        PeftModel.from_pretrained(base(), tmp_path / name)
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)
        base().load_adapter(str(tmp_path / name))
        adapter_info(tmp_path / name)
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    texts = dict.fromkeys(folders, TEXTS)
    for folder in folders:
        read_lora(folder)
        collect_inputs(base(), TEXTS, folder, tokenizer)
        assert Statistics.load(folder) is not None
    merge_adapters(folders, output=tmp_path / "merged")
    merge_adapters(folders, model=base(), prompts=texts, tokenizer=tokenizer, output=tmp_path / "looked")
    main(["export", folders[1], "--output", str(tmp_path / "exported")])

    memory = protect(base(), TEXTS, tmp_path / "memory", tokenizer=tokenizer)
    plant(tmp_path / "memory", ran)
    assert Subspace.load(tmp_path / "memory").tasks == memory.tasks

    driven = PeftModel.from_pretrained(base(), tmp_path / "one", "one")
    router = TaskRouter(driven, tokenizer, layers=1)
    router.add_task("one", TEXTS)
    router.attach()
    router.save(tmp_path / "router")
    router.save_pretrained(tmp_path / "routed")
    for folder in ("router", "routed"):
        plant(tmp_path / folder, ran)
    assert TaskRouter.load(tmp_path / "router", base(), tokenizer).route(TEXTS).names
    PeftModel.from_pretrained(base(), tmp_path / "routed")
    assert not ran.exists()


def test_a_name_in_a_strangers_folder_is_no_command_and_no_line_of_its_own(tmp_path):
    base = "meta llama; touch ran\n  serve    rm -rf ~\x1b[2J"
    for name, method in (("lora", LORA), ("lori", METHODS["lori"])):
        adapted(method, task_type="CAUSAL_LM").save_pretrained(tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
        found = adapter_info(tmp_path / name)
        assert shlex.split(found.serve[-1])[:4] == ["vllm", "serve", base, "--enable-lora"]
        lines = str(found).split("\n")
        assert all(line.isprintable() for line in lines)
        assert [line.split()[0] for line in lines].count("serve") == 1


def test_an_adapter_that_has_a_pickle_alone_is_not_opened(llama_folder, tmp_path):
    ran = tmp_path / "ran"
    adapted("lori", task_type="CAUSAL_LM").save_pretrained(tmp_path / "one")
    (tmp_path / "one/adapter_model.safetensors").unlink()
    plant(tmp_path / "one", ran)
    with pytest.raises(FileNotFoundError, match="safetensors is missing"):
        read_lora(tmp_path / "one")
    with pytest.raises(pickle.UnpicklingError):  # PEFT reads such a file, tensors alone
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder), tmp_path / "one")
    assert not ran.exists()
