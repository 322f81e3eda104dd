"""PEFT's duties, one matrix: what every method must do the same way. A new method is a row in helpers.FORMS."""

import copy
import weakref
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
from helpers import METHODS, STATIC, adapted, gradients, quantized, randomize, reopened, tiny_gpt2, tiny_llama
from peft import (
    LoraConfig,
    PeftConfig,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import peft_mora
from peft_mora import prune_experts, record_usage, set_task, sparsify, start_task
from peft_mora.base import AdapterLinear, AdapterModel
from peft_mora.routed import routed_layers, set_top_k


def test_output_changes_with_the_adapter_and_not_without(make_config, inputs):
    want = tiny_llama()(inputs).logits
    fresh = get_peft_model(tiny_llama(), make_config(target_modules="all-linear")).eval()
    assert torch.equal(fresh(inputs).logits, want)
    model = adapted(make_config)
    assert not torch.allclose(model(inputs).logits, want)
    with model.disable_adapter():
        assert torch.equal(model(inputs).logits, want)
    base, state = model.unload(), tiny_llama().state_dict()
    assert not any(isinstance(m, BaseTunerLayer) for m in base.modules()) and base.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.state_dict().items())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_bit_exact(make_config, inputs, tmp_path, low_cpu_mem_usage, dtype):
    model = adapted(make_config, tiny_llama().to(dtype))
    again = reopened(model, tmp_path, tiny_llama().to(dtype), low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    saved, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[k], loaded[k]) and saved[k].dtype == loaded[k].dtype for k in saved)
    in_file = any(key.endswith(("_A", "_index")) for key in saved)  # a projection that the seed draws
    assert in_file == getattr(model.peft_config["default"], "save_projection", False)
    want, got = model.peft_config["default"].to_dict(), again.peft_config["default"].to_dict()
    for values in (want, got):  # what PEFT itself sets while saving and loading
        for name in ("inference_mode", "auto_mapping", "base_model_name_or_path"):
            values.pop(name)
    assert want == got


def test_several_adapters_of_different_rank_do_not_disturb_each_other(make_config, inputs, tmp_path):
    model = adapted(make_config)
    first = model(inputs).logits
    model.add_adapter("other", make_config(target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 6}))
    assert torch.equal(model(inputs).logits, first)
    model.set_adapter("other")
    randomize(model, seed=11)
    second = model(inputs).logits
    assert not torch.allclose(first, second)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".other." in name for name in trainable)
    again = reopened(model, tmp_path, adapter_name="default")
    again.load_adapter(str(tmp_path / "other"), "other")
    assert torch.equal(again(inputs).logits, first)
    again.set_adapter("other")
    assert torch.equal(again(inputs).logits, second)


def test_two_active_adapters_add_up(make_config, inputs):
    model = adapted(make_config)
    model.add_adapter("other", make_config(target_modules=["q_proj"]))
    model.set_adapter("other")
    randomize(model, seed=11)
    layer = next(m for m in model.modules() if isinstance(m, AdapterLinear))
    x = torch.randn(2, 3, 64)
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs[name] = layer(x) - layer.base_layer(x)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x) - layer.base_layer(x), outputs["default"] + outputs["other"])


def test_each_row_of_a_mixed_batch_gets_its_own_adapter(make_config, inputs):
    model = adapted(make_config)
    model.add_adapter("other", make_config(target_modules="all-linear"))
    model.set_adapter("other")
    randomize(model, seed=11)
    want = [None] * 3
    for row, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        want[row] = model(inputs[row : row + 1]).logits[0]
    with model.disable_adapter():
        want[2] = model(inputs[2:]).logits[0]
    got = model(inputs, adapter_names=["default", "other", "__base__"]).logits
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)
    generated = model.generate(inputs, adapter_names=["default", "other", "__base__"], max_new_tokens=3, num_beams=2)
    assert generated.shape == (3, 14)
    with pytest.raises(ValueError, match="non-existing adapter.*typo"):
        model(inputs, adapter_names=["default", "typo", "__base__"])
    with pytest.raises(ValueError, match="same as the number of inputs"):
        model(inputs, adapter_names=["default"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(inputs, adapter_names=["default"] * 3)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_any_base_dtype_trains_and_keeps_its_output_dtype(make_config, inputs, base_dtype, autocast_adapter_dtype):
    config = make_config(target_modules="all-linear")
    model = get_peft_model(tiny_llama().to(base_dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    randomize(model)
    trainable = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trainable == {torch.float32 if autocast_adapter_dtype else base_dtype}
    assert model(inputs).logits.dtype == base_dtype
    assert all(torch.isfinite(g).all() for g in gradients(model, inputs).values())
    assert model.half()(inputs).logits.dtype == torch.float16


def test_float32_and_bfloat16_adapters_agree_on_a_bfloat16_base(make_config, inputs):
    model = adapted(make_config, tiny_llama().to(torch.bfloat16))
    want = model(inputs).logits.float()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()  # what TRL does on a quantised base
    torch.testing.assert_close(model(inputs).logits.float(), want, rtol=0.05, atol=0.05)


def test_autocast_runs(make_config, inputs):
    model = adapted(make_config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(inputs).logits
    close = torch.isclose(got.float(), model(inputs).logits, rtol=0.1, atol=0.1)
    assert close.float().mean() > 0.95  # a near-tie may wake another expert in bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_computes_as_its_dequantised_twin(make_config, inputs, llama_folder, bits):
    model = adapted(make_config, quantized(llama_folder, bits))
    for layer in model.modules():
        if isinstance(layer, AdapterLinear):
            x = torch.randn(2, 3, layer.in_features, dtype=torch.bfloat16)
            update = layer(x) - layer.base_layer(x)
            twin = copy.deepcopy(layer)
            twin.base_layer = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.bfloat16)
            torch.testing.assert_close(update, twin(x) - twin.base_layer(x), rtol=0.05, atol=0.1)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(gradients(model.train(), inputs)) == trainable


@pytest.mark.parametrize("method", STATIC, indirect=True)
@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-4), (16, 0.1), (8, 0.02), (4, 0.15)])
def test_a_merge_is_the_sum_and_is_undone_bit_for_bit(make_config, inputs, llama_folder, bits, tolerance):
    """On 16 and 32 bits by the logits; requantising by the weights, where NF4's own error on a Gaussian is 0.09."""
    base = (
        quantized(llama_folder, bits) if bits < 16 else tiny_llama().to({32: torch.float32, 16: torch.bfloat16}[bits])
    )
    model = adapted(make_config, base)
    before, layer = model(inputs).logits, next(m for m in model.modules() if isinstance(m, AdapterLinear))
    weight, want = layer.get_base_weight(), layer.get_base_weight().float() + layer.get_delta_weight("default")
    for _ in range(2):
        with pytest.warns(UserWarning, match="rounds the merged weight again") if bits < 16 else nullcontext():
            model.merge_adapter(safe_merge=True)
        merged = model(inputs).logits
        if bits < 16:
            assert (layer.get_base_weight().float() - want).norm() < tolerance * want.norm()
        else:
            torch.testing.assert_close(merged, before, rtol=tolerance, atol=tolerance)
        assert not torch.equal(layer.get_base_weight(), weight)
        model.unmerge_adapter()
        assert torch.equal(model(inputs).logits, before) and torch.equal(layer.get_base_weight(), weight)
    plain = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, BaseTunerLayer) for m in plain.modules()) and torch.equal(
        plain(inputs).logits, merged
    )


@pytest.mark.parametrize("method", STATIC)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_what_merges_converts_to_a_plain_lora(method, make, inputs):
    tasks = 2 if method == "mora-dense" else 1
    model = adapted(method, make(), tasks=tasks)
    want = model(inputs).logits
    layer = next(m for m in model.modules() if isinstance(m, AdapterLinear))
    config, state = convert_to_lora(model, rank=len(layer.factors("default")[0]))
    plain = get_peft_model(make(), config).eval()
    assert isinstance(config, LoraConfig) and not set_peft_model_state_dict(plain, state).unexpected_keys
    torch.testing.assert_close(plain(inputs).logits, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(inputs).logits, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", STATIC)
def test_merge_and_unload_keeps_one_unmerged_weight_at_a_time(method, monkeypatch):
    model = adapted(method)
    layers = [weakref.ref(m) for m in model.modules() if isinstance(m, AdapterLinear)]
    replace, held = AdapterModel._replace_module, []

    def counted(*args):
        replace(*args)
        held.append(sum(bool(layer()._before_merge) for layer in layers if layer() is not None))

    monkeypatch.setattr(AdapterModel, "_replace_module", counted)
    model.merge_and_unload()
    assert held == [1] * len(layers)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in STATIC], indirect=True)
def test_what_depends_on_the_input_refuses_to_merge(make_config):
    model = adapted(make_config)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match="depends on the input.* train with (MoraConfig.routing='dense'|LoriConfig)"
        ):
            merge()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)
    base = tiny_llama().state_dict()
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.unload().state_dict().items())


def test_a_merge_is_of_the_adapters_that_are_named(inputs):
    """Of both it is refused before a module has changed; of the one that has a sum it is done, whichever is active."""

    def both():
        model = adapted("mora-dense", target_modules=["q_proj"])
        model.add_adapter("task", METHODS["mora"](r=4, target_modules=["v_proj"], init_weights=False))
        model.set_adapter("task")
        return model

    for merge in ("merge_adapter", "merge_and_unload"):
        model = both()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match="depends on the input"):
            getattr(model, merge)(adapter_names=["default", "task"])
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())
        with pytest.raises(ValueError, match="The model has no adapter 'other' to merge; it has 'default' and 'task'"):
            getattr(model, merge)(adapter_names=["default", "other"])
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())
    model = both()
    model.set_adapter("default")
    want = model(inputs).logits
    model.set_adapter("task")
    model.merge_adapter(["default"])
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["default"])(inputs).logits, want)
    with pytest.raises(ValueError, match="depends on the input"):  # the active one again, where none is named
        both().merge_adapter()


@pytest.mark.parametrize("method", STATIC, indirect=True)
def test_a_merge_into_float64_is_of_float64(make_config, inputs):
    model = adapted(make_config).double()
    want = model(inputs).logits
    torch.testing.assert_close(model.merge_and_unload()(inputs).logits, want, rtol=0, atol=1e-12)


def test_patterns_choose_rank_scale_and_layers_also_after_saving(make_config, tmp_path):
    """Of two that match, the longest: PEFT sorts the keys when it writes the file and takes the first."""
    model = adapted(
        make_config,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 7, "q_proj": 5, r"self_attn\.q_proj": 6},
        alpha_pattern={"v_proj": 21},
        layers_to_transform=[1],
        exclude_modules=["k_proj", "layers.9.q_proj"],
    )
    for m in (model, reopened(model, tmp_path)):
        layers = {name.rsplit(".", 1)[1]: m for name, m in m.named_modules() if isinstance(m, AdapterLinear)}
        assert set(m.targeted_module_names) == {f"model.layers.1.self_attn.{name}" for name in layers}
        assert {name: layer.r["default"] for name, layer in layers.items()} == {"q_proj": 6, "v_proj": 7}
        assert layers["v_proj"].scaling["default"] == 3


def test_dropout_acts_in_training_only(make_config, inputs):
    model = adapted(make_config, dropout=0.5)
    assert torch.equal(model(inputs).logits, adapted(make_config)(inputs).logits)
    model.train()
    assert not torch.equal(model(inputs).logits, model(inputs).logits)


def test_every_field_has_a_help_text(family):
    own = [f for f in fields(peft_mora.METHODS[family].config) if f.name not in {f.name for f in fields(PeftConfig)}]
    assert own and all(f.metadata.get("help") for f in own)


CHANGES = {
    "sparsify": ("lori", lambda part: sparsify(part, 0.5)),
    "start_task": ("mora", lambda part: start_task(part, "more")),
    "prune_experts": ("mora", lambda part: prune_experts(part, 0.9)),
    "set_top_k": ("mora", lambda part: set_top_k(part, dict.fromkeys(routed_layers(part), 1))),
    "set_task": ("mtllora", lambda part: set_task(part, 0)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_part_of_the_model_without_the_config_is_refused_and_left_as_it_is(what):
    method, change = CHANGES[what]
    model = adapted(method)
    tokens = torch.tensor([[4, 5, 6, 7]])
    with record_usage(model) if method == "mora" else nullcontext():
        want = model(tokens).logits
    settings = copy.deepcopy(vars(model.peft_config["default"]))
    with pytest.raises(ValueError, match="ModuleList has layers of adapter 'default', but not its config.*pass the"):
        change(model.base_model.model.model.layers)
    assert torch.equal(model(tokens).logits, want) and vars(model.peft_config["default"]) == settings
    change(model)  # of the whole one both change; a task that is yet to be learnt adds nothing
    assert vars(model.peft_config["default"]) != settings
    assert torch.equal(model(tokens).logits, want) == (what == "start_task")
