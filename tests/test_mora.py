"""What only MORA does: the layer against a float64 reference, growth, and the three routings."""

from collections import OrderedDict

import pytest
import torch
from helpers import adapted, randomize, reopened, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_mora import MoraConfig, MoraLinear, start_task
from peft_mora.routing import softmax_gate


def net() -> nn.Module:
    """One linear module with odd sizes."""
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(lin=nn.Linear(13, 9).double()))


def grown(routing: str, tasks: int = 3, **kwargs) -> nn.Module:
    """A `net` with `tasks` blocks of four experts, all of them trained (random)."""
    return adapted(MoraConfig, net(), tasks=tasks, r=4, alpha=6, target_modules=["lin"], routing=routing, **kwargs)


def reference(layer: MoraLinear, x, training: bool):
    """The rule of the module docstring, written out, over all experts at once."""
    gate = layer.mora_rule["default"]
    A = torch.cat([A for A, _ in layer.blocks("default")])
    B = torch.cat([B for _, B in layer.blocks("default")], dim=1)
    h = x @ A.T
    threshold = 0.0 if training else gate.threshold
    if gate.routing == "dense":
        w = torch.ones_like(h)
    elif gate.routing == "bank":
        w = softmax_gate(h, gate.top_k, gate.temperature, threshold)
    else:
        w = torch.cat([softmax_gate(b, gate.top_k, gate.temperature, threshold) for b in h.split(4, -1)], -1)
    return layer.base_layer(x) + layer.scaling["default"] * (w * h) @ B.T


@pytest.mark.parametrize("routing", ["task", "bank", "dense"])
@pytest.mark.parametrize("training", [True, False])
def test_layer_equals_the_reference_in_values_and_gradients(routing, training):
    model = grown(routing, top_k=2, temperature=0.3, threshold=0.3).train(training)
    layer = model.base_model.model.lin
    x = torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True)
    got, want = model(x), reference(layer, x, training)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    leaves, upstream = [x, layer.mora_A["default"].weight, layer.mora_B["default"].weight], torch.randn_like(got)
    grads = (torch.autograd.grad(y, leaves, upstream) for y in (got, want))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("routing", ["task", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_starting_a_task_changes_no_output_by_one_bit(routing, dtype, training, inputs):
    model = get_peft_model(tiny_llama().to(dtype), MoraConfig(r=5, routing=routing, target_modules="all-linear"))
    model.train(training)
    randomize(model)
    for task in ("b", "c", "d"):
        before = model(inputs).logits
        start_task(model, task)
        assert torch.equal(model(inputs).logits, before)
        randomize(model, seed=ord(task))
        assert not torch.equal(model(inputs).logits, before)


def test_a_frozen_block_keeps_its_routing_when_the_bank_grows():
    """routing="task": what block 1 adds to the output is the same number whatever comes after it."""
    alone, three = grown("task", tasks=1, top_k=2), grown("task", tasks=3, top_k=2)
    x = torch.randn(7, 13, dtype=torch.float64)
    lin = three.base_model.model.lin
    for value in (lin.mora_B["default"].weight.data, lin.mora_bank_B["default"][:, 4:]):
        value.zero_()
    assert torch.equal(three(x), alone(x))


def test_loading_a_grown_file_into_an_adapter_without_room_is_refused(tmp_path):
    """The trainer's resume loads into the adapter that is there; PEFT would drop the bank without a word."""
    grown("task", tasks=2).save_pretrained(tmp_path / "two")
    grown("task", tasks=1).save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="4 frozen and 4 trainable experts.*has 0 and 4.*start_task"):
        grown("task", tasks=1).load_adapter(str(tmp_path / "two"), "default")
    with pytest.raises(ValueError, match="0 frozen and 4 trainable experts.*has 4 and 4"):
        grown("task", tasks=2).load_adapter(str(tmp_path / "one"), "default")
    again = grown("task", tasks=2)
    again.load_adapter(str(tmp_path / "two"), "default")


def test_an_adapter_loaded_for_inference_trains_after_start_task(tmp_path):
    config = MoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = reopened(get_peft_model(tiny_llama(), config), tmp_path)
    start_task(model, "next")
    assert not model.peft_config["default"].inference_mode
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n in dict(model.named_parameters()) if "mora_" in n or "modules_to_save" in n}


def test_start_task_says_what_it_did_and_refuses_what_would_be_wrong():
    model = grown("dense", tasks=1)
    summary = start_task(model, "second")
    assert (summary.task, summary.frozen_experts, summary.trainable_experts) == ("second", 4, 4)
    assert "4 experts frozen" in str(summary)
    with pytest.raises(ValueError, match="already has a task named 'second'"):
        start_task(model, "second")
    with pytest.raises(ValueError, match="no MORA adapter named 'other'; it has 'default'"):
        start_task(model, "third", adapter_name="other")
    with pytest.raises(ValueError, match="`name` must be a non-empty string"):
        start_task(model, "")
    with pytest.raises(ValueError, match="no MORA adapter at all"):
        start_task(get_peft_model(net(), LoraConfig(target_modules=["lin"])), "x")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        start_task(model, "third")


@pytest.mark.parametrize(
    "change",
    [
        {"r": 6},
        {"alpha": 32},
        {"top_k": 1},
        {"temperature": 0.05},
        {"threshold": 0.5},
        {"routing": "dense"},
        {"rank_pattern": {"lin": 2}},
        {"alpha_pattern": {"lin": 3}},
    ],
)
def test_every_field_of_the_rule_has_an_effect(change):
    def output(**kwargs):
        model = adapted(MoraConfig, net(), **{"r": 4, "target_modules": ["lin"], **kwargs})
        return model(torch.linspace(-1, 1, 26, dtype=torch.float64).reshape(2, 13))

    assert not torch.allclose(output(), output(**change))


def test_a_row_name_that_two_adapters_have_is_refused():
    model = get_peft_model(tiny_llama(), MoraConfig(r=4, tasks=["b/c"], target_modules=["q_proj"]), adapter_name="a")
    model.add_adapter("a/b", MoraConfig(r=4, tasks=["c"], target_modules=["q_proj"]))
    ids = torch.randint(4, 60, (2, 5))
    with pytest.raises(ValueError, match="Row name 'a/b/c' is of a task of 'a' and 'a/b': which one is not said"):
        model.eval()(input_ids=ids, adapter_names=["a/b/c"] * 2)


def test_a_task_that_cannot_start_in_a_later_module_starts_in_none(inputs, monkeypatch):
    model = adapted(MoraConfig, r=4)
    before, made, new_linear = model(inputs).logits, [], MoraLinear.new_linear

    def failing(self, *args, **kwargs):
        made.append(self)
        if len(made) == 7:
            raise RuntimeError("out of memory")
        return new_linear(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(MoraLinear, "new_linear", failing)
        start_task(model, "second")
    assert torch.equal(model(inputs).logits, before) and model.peft_config["default"].tasks == ["initial"]
    assert {tuple(m.mora_sizes["default"]) for m in model.modules() if isinstance(m, MoraLinear)} == {(4,)}
    start_task(model, "second")
    assert {tuple(m.mora_sizes["default"]) for m in model.modules() if isinstance(m, MoraLinear)} == {(4, 4)}
