"""Folders written by release 0.1 (before the rooms were moved) open bit for bit: what is loaded is what they hold."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from trl_callbacks.subspace import Subspace


WRITTEN = Path(__file__).parent / "written_by_0.1"
OUTPUTS = load_file(WRITTEN / "outputs.safetensors")  # of each adapter, by the code that wrote it
LATER = {"target_parameters": None}  # fields that there have been since, and what they are in an older file
ADAPTERS = sorted(folder.name for folder in WRITTEN.iterdir() if (folder / "adapter_config.json").exists())


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 7))


def config(folder: Path) -> dict:
    fields = json.loads((folder / "adapter_config.json").read_text())
    return {**LATER, **fields, "peft_version": None, "target_modules": sorted(fields["target_modules"])}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_loaded_and_saved_again_as_it_was(name, tmp_path):
    model = PeftModel.from_pretrained(base(), WRITTEN / name)
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (WRITTEN / name, tmp_path))
    assert before.keys() == after.keys() and config(WRITTEN / name) == config(tmp_path)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype, key
    state = model.state_dict()
    for key, tensor in before.items():
        stored = f"{key.removesuffix('.weight')}.default{'.weight' if key.endswith('.weight') else ''}"
        assert torch.equal(state[stored], tensor), key
    x = torch.linspace(-1, 1, 50).view(5, 10)
    torch.testing.assert_close(model.eval()(x), OUTPUTS[name], rtol=1e-5, atol=1e-6)


def test_a_subspace_is_loaded_and_saved_again_as_it_was(tmp_path):
    subspace = Subspace.load(WRITTEN / "subspace")
    subspace.save(tmp_path / "subspace")
    before, after = (load_file(folder / "subspace" / "basis.safetensors") for folder in (WRITTEN, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    before, after = ((folder / "subspace" / "subspace.json").read_text() for folder in (WRITTEN, tmp_path))
    assert before == after
