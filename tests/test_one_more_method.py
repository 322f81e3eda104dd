"""One more method is one file and one row: the one that CONTRIBUTING.md writes has what the others have."""

import importlib.util
import re
import sys
from pathlib import Path

import peft.mapping as mapping
import pytest
import torch
from helpers import reopened
from peft import PeftType, get_peft_model
from torch import nn

from peft_mora import registry
from peft_mora.routed import routed_layers


CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"
FILE = re.search(r"```python\n(.*?)```", CONTRIBUTING.read_text("utf-8"), re.DOTALL)[1]


@pytest.fixture
def dummy(tmp_path, monkeypatch):
    """The file imported and its row registered; PEFT afterwards as before."""
    (tmp_path / "dummy_method.py").write_text(FILE)
    spec = importlib.util.spec_from_file_location("dummy_method", tmp_path / "dummy_method.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dummy_method", module)
    spec.loader.exec_module(module)
    mappings = [getattr(mapping, name) for name in vars(mapping) if name.startswith("PEFT_TYPE_TO_")]
    before = [dict(entries) for entries in mappings]
    monkeypatch.setattr(registry, "registered", dict(registry.registered))
    registry.register(module.DummyConfig, module.DummyModel)
    yield module
    for entries, old in zip(mappings, before, strict=True):
        entries.clear()
        entries.update(old)
    registry.remove_member(PeftType, "DUMMY")


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def test_it_trains_saves_loads_and_merges(dummy, tmp_path):
    model = get_peft_model(base(), dummy.DummyConfig(r=2, target_modules=["0", "2"]))
    x = torch.randn(7, 6)
    assert torch.equal(model(x), base()(x))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # after the first step B is not 0, and A learns
        model(x).square().sum().backward()
        optimizer.step()
    trained = model.eval()(x)
    assert not torch.allclose(trained, base()(x))
    loaded = reopened(model, tmp_path / "adapter", base())
    assert torch.equal(loaded(x), trained)
    torch.testing.assert_close(loaded.merge_and_unload()(x), trained)


def test_messages_that_list_methods_have_it(dummy):
    model = get_peft_model(base(), dummy.DummyConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="'default' \\(DUMMY\\) has no routing"):
        routed_layers(model)
    from peft_mora import MoraConfig

    other = get_peft_model(base(), MoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="combine exactly \\(LoriConfig or DummyConfig\\)"):
        other.add_weighted_adapter(["default"], [1.0], "mix")
