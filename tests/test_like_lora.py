"""What PEFT's own test-suite asks of a tuner, on a small MLP and a tiny Llama. LoRA goes through every check as well:
a check that LoRA fails would be a wrong check, and one that only ours fail would be a surprise for its users."""

import copy
import re
import sys
import warnings

import pytest
import torch
from conftest import METHODS, STATIC, tiny_llama
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_mora import record_usage


def lora(init_weights=True, dropout=0.0, **kwargs) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, init_lora_weights=init_weights, **kwargs)


CONFIGS = {"lora": lora, **METHODS}
MERGES = ("lora", *STATIC)


@pytest.fixture(params=CONFIGS)
def method(request):
    return request.param


@pytest.fixture
def make_config(method):
    """Not an identity unless asked for, so that every check sees the adapter."""
    return lambda init_weights=False, **kw: CONFIGS[method](init_weights=init_weights, **kw)


class MLP(nn.Module):
    """The model of PEFT's custom-model tests: lin0, ReLU, lin1, log-softmax."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 6, bias=bias)
        self.sm = nn.LogSoftmax(dim=-1)

    def forward(self, x):
        x = x.to(self.lin0.weight.dtype)
        return self.sm(self.lin1(self.drop(self.relu(self.lin0(x)))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(10, 10)

    def forward(self, x):
        return torch.relu(self.lin(x))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def mlp(cls: type[nn.Module] = MLP) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


X = torch.arange(90, dtype=torch.float32).view(9, 10) / 45 - 1
TARGETS = pytest.mark.parametrize("targets", [["lin0"], ["lin1"], ["lin0", "lin1"]], ids="+".join)


def adapted(make_config, targets=("lin0", "lin1"), base=None, seed=1, **kwargs) -> PeftModel:
    base = mlp() if base is None else base
    torch.manual_seed(seed)
    return get_peft_model(base, make_config(target_modules=list(targets), **kwargs)).eval()


def two_adapters(make_config, first=("lin0",), second=("lin1",), **kwargs) -> PeftModel:
    model = adapted(make_config, first, **kwargs)
    torch.manual_seed(2)
    model.add_adapter("other", make_config(target_modules=list(second), **kwargs))
    return model.eval()


def train(model: nn.Module, steps: int = 3, lr: float = 0.5) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.nll_loss(model(X), torch.arange(9) % 6).backward()
        optimizer.step()
    model.eval()


def ours(name: str, method: str) -> bool:
    return f"{method.split('-')[0]}_" in name


@TARGETS
def test_training_reaches_the_adapter_and_nothing_else(method, make_config, targets):
    model = adapted(make_config, targets)
    nn.functional.nll_loss(model.train()(X), torch.arange(9) % 6).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ours(name, method), name
        assert parameter.requires_grad == ours(name, method), name


@TARGETS
def test_only_the_adapter_s_parameters_are_updated(method, make_config, targets):
    model = adapted(make_config, targets)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ours(name, method), name


@TARGETS
@pytest.mark.parametrize("safe", [True, False])
def test_parameters_after_loading_are_the_trained_ones(make_config, tmp_path, targets, safe):
    model = adapted(make_config, targets, init_weights=True)
    assert torch.equal(model(X), mlp()(X))
    train(model)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    assert not (tmp_path / "config.json").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing missing, nothing unexpected
        again = PeftModel.from_pretrained(mlp(), tmp_path)
    assert torch.equal(again(X), model(X)) and not torch.equal(model(X), mlp()(X))
    result = again.load_adapter(str(tmp_path), "second")
    assert not result.missing_keys and not result.unexpected_keys
    again.set_adapter("second")
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_16_bit_models_take_float32_inputs_and_give_finite_outputs(make_config, dtype, autocast_adapter_dtype):
    config = make_config(target_modules=["lin0", "lin1"])
    model = get_peft_model(mlp().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    output = model(X)
    assert output.dtype == dtype and torch.isfinite(output).all()
    output.sum().backward()


def test_a_layer_keeps_the_features_and_attributes_of_its_base(make_config):
    layer = adapted(make_config).base_model.model.lin0
    assert (layer.in_features, layer.out_features) == (10, 20)
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    assert layer.get_base_layer() is layer.base_layer


def test_repr_names_the_method_and_its_adapters(method, make_config):
    text = repr(adapted(make_config))
    assert f"{method.split('-')[0]}." in text and "(default)" in text and "base_layer" in text


@pytest.mark.parametrize("name", ["test-adapter", "my_adapter", "0"])
def test_any_adapter_name_is_kept(make_config, tmp_path, name):
    torch.manual_seed(1)
    model = get_peft_model(mlp(), make_config(target_modules=["lin0"]), adapter_name=name).eval()
    assert any(f".{name}" in key for key in model.state_dict()) and model.active_adapters == [name]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mlp(), tmp_path / name, adapter_name="default")
    assert torch.equal(again(X), model(X))


def test_disabled_adapters_stay_disabled_after_the_context(make_config):
    model, base = adapted(make_config), mlp()(X)
    with_adapter = model(X)
    assert not torch.allclose(with_adapter, base)
    with model.disable_adapter():
        assert not model.get_model_status().enabled
        assert torch.equal(model(X), base)
    assert model.get_model_status().enabled and torch.equal(model(X), with_adapter)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert not model.get_model_status().enabled and torch.equal(model(X), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(model(X), with_adapter)


@pytest.mark.parametrize("method", MERGES, indirect=True)
def test_disabling_undoes_a_merge(make_config):
    model = adapted(make_config)
    with_adapter = model(X)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(X), mlp()(X), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(X), with_adapter, rtol=1e-5, atol=1e-6)


def test_deleting_the_active_adapter_falls_back_and_leaves_nothing(make_config):
    model = two_adapters(make_config, ["lin0", "lin1"], ["lin0", "lin1"])
    model.set_adapter("other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("other")
    assert model.active_adapters == ["default"] and "other" not in model.peft_config
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for attribute in layer.adapter_layer_names + layer.other_param_names:
                assert "other" not in getattr(layer, attribute), attribute
    model(X)
    model.delete_adapter("default")
    assert model.active_adapters == [] and torch.equal(model.base_model(X), mlp()(X))


def test_deleting_an_inactive_adapter_changes_nothing(make_config):
    model = two_adapters(make_config, ["lin0", "lin1"], ["lin0", "lin1"])
    want = model(X)
    model.delete_adapter("other")
    assert model.active_adapters == ["default"] and torch.equal(model(X), want)


def test_unknown_adapters_raise(make_config):
    model = adapted(make_config)
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        model.delete_adapter("unknown")
    with pytest.raises(ValueError, match="Adapter unknown not found|not found"):
        model.set_adapter("unknown")
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained("/nonexistent", selected_adapters=["unknown"])


def test_unload_gives_the_base_model_back(make_config):
    model = adapted(make_config)
    model.add_adapter("other", make_config(target_modules=["lin0"]))
    base = model.unload()
    assert type(base) is MLP and not any(isinstance(m, BaseTunerLayer) for m in base.modules())
    assert torch.equal(base(X), mlp()(X)) and base.state_dict().keys() == mlp().state_dict().keys()


@pytest.mark.parametrize("method", MERGES, indirect=True)
def test_merging_twice_warns_and_adds_once(make_config):
    model = adapted(make_config)
    want = model(X)
    model.merge_adapter()
    once = model(X)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert torch.equal(model(X), once)
    torch.testing.assert_close(once, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", MERGES, indirect=True)
def test_named_adapters_merge_and_the_rest_stays(make_config):
    model = two_adapters(make_config, ["lin0"], ["lin0", "lin1"])
    first = model(X)
    model.set_adapter("other")
    second = model(X)
    model.base_model.set_adapter(["default", "other"])
    both = model(X)
    for names, want in ((["default"], first), (["other"], second), (["default", "other"], both)):
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True, adapter_names=names)
        assert type(merged) is MLP
        torch.testing.assert_close(merged(X), want, rtol=1e-4, atol=1e-5)


def test_active_adapters_are_summed_merged_and_unmerged(method, make_config):
    model = two_adapters(make_config, ["lin0"], ["lin1"])
    model.base_model.set_adapter(["default", "other"])
    both = model(X)
    model.set_adapter("default")
    assert not torch.allclose(model(X), both)
    model.base_model.set_adapter(["default", "other"])
    if method in MERGES:
        model.merge_adapter()
        torch.testing.assert_close(model(X), both, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(X), both, rtol=1e-5, atol=1e-6)
    assert model.get_model_status().active_adapters == ["default", "other"]


@pytest.mark.parametrize("method", MERGES, indirect=True)
def test_an_adapter_may_be_added_while_another_one_is_merged(make_config):
    model = adapted(make_config, ["lin0"])
    want = model(X)
    model.merge_adapter()
    torch.manual_seed(2)
    model.add_adapter("other", make_config(target_modules=["lin0", "lin1"]))
    torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", MERGES, indirect=True)
def test_safe_merge_refuses_broken_weights_and_changes_nothing(method, make_config, value):
    model = adapted(make_config)
    for name, parameter in model.named_parameters():
        if ours(name, method):
            parameter.data[0] = value
    for _ in range(2):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter .*default.* seems"):
            model.merge_and_unload(safe_merge=True)
    for name, parameter in model.named_parameters():
        assert ours(name, method) or torch.isfinite(parameter).all()


@pytest.mark.parametrize("method", MERGES, indirect=True)
def test_a_merged_model_saves_and_loads_as_a_plain_one(make_config, inputs, tmp_path):
    model = adapted(make_config, ["q_proj", "down_proj"], base=tiny_llama())
    want = model(inputs).logits
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(inputs).logits, want, rtol=1e-3, atol=1e-4)


def test_layer_indices_choose_fewer_parameters(make_config):
    def count(**kwargs):
        return adapted(make_config, ["lin"], mlp(Deep), **kwargs).get_nb_trainable_parameters()[0]

    one = count(layers_to_transform=1, layers_pattern="layers")
    assert count() == 3 * one and count(layers_to_transform=[0, 2], layers_pattern=["layers"]) == 2 * one


def test_an_adapter_of_another_type_cannot_join(method, make_config):
    model = adapted(make_config)
    other = LoraConfig(target_modules=["lin0"]) if method != "lora" else CONFIGS["mora"](target_modules=["lin0"])
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", other)
    model(X)


def test_selected_adapters_are_saved_alone(make_config, tmp_path):
    model = two_adapters(make_config)
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert (tmp_path / "one/other/adapter_config.json").exists()
    assert not (tmp_path / "one/adapter_config.json").exists()


def test_loading_with_a_config_uses_that_very_config(make_config, tmp_path):
    adapted(make_config).save_pretrained(tmp_path)
    config = make_config(target_modules=["lin0", "lin1"])
    assert PeftModel.from_pretrained(mlp(), tmp_path, config=config).peft_config["default"] is config


def test_each_adapter_keeps_its_own_modules_to_save(make_config, tmp_path):
    model = adapted(make_config, ["lin0"], modules_to_save=["lin1"])
    train(model)
    model.add_adapter("other", make_config(target_modules=["lin0"]))
    first = model(X)
    model.set_adapter("other")
    second = model(X)
    train(model)
    trained = model(X)
    assert not torch.allclose(second, trained)
    model.set_adapter("default")
    assert torch.equal(model(X), first)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mlp(), tmp_path)
    again.load_adapter(str(tmp_path / "other"), "other")
    assert torch.equal(again(X), first)
    again.set_adapter("other")
    assert torch.equal(again(X), trained)


def test_missing_weights_are_named_in_a_warning(make_config, tmp_path):
    adapted(make_config, ["lin0"]).save_pretrained(tmp_path)
    config = make_config(target_modules=["lin0", "lin1"])
    with pytest.warns(UserWarning, match="Found missing adapter keys while loading the checkpoint.*lin1"):
        PeftModel.from_pretrained(mlp(), tmp_path, config=config)


def test_injection_puts_weights_on_meta_and_loading_brings_them_back(make_config):
    source = inject_adapter_in_model(make_config(target_modules=["lin0", "lin1"]), mlp())
    state = get_peft_model_state_dict(source)
    for given in (None, state):
        model = inject_adapter_in_model(
            make_config(target_modules=["lin0", "lin1"]), mlp(), low_cpu_mem_usage=True, state_dict=given
        )
        assert any(p.is_meta for p in model.parameters())
        result = set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
        assert not result.unexpected_keys
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert torch.equal(model.eval()(X), source.eval()(X))


def test_state_dict_keys_do_not_hold_the_adapter_s_name(method, make_config):
    for name in ("default", "other"):
        torch.manual_seed(1)
        model = get_peft_model(mlp(), make_config(target_modules=["lin0"]), adapter_name=name)
        state = get_peft_model_state_dict(model, adapter_name=name)
        assert state and all(ours(key, method) and name not in key for key in state)


def test_low_cpu_mem_usage_loads_the_same_model(make_config, tmp_path):
    model = adapted(make_config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
    again.load_adapter(str(tmp_path), "other", low_cpu_mem_usage=True)
    again.set_adapter("other")
    assert torch.equal(again(X), model(X))
    empty = get_peft_model(mlp(), make_config(target_modules=["lin0", "lin1"]), low_cpu_mem_usage=True)
    assert any(p.is_meta for p in empty.parameters())
    empty.load_adapter(str(tmp_path), "default", low_cpu_mem_usage=True)
    assert torch.equal(empty.eval()(X), model(X))


def test_rank_pattern_that_matches_nothing_is_warned_about(make_config):
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match any targeted module"):
        adapted(make_config, ["lin0"], rank_pattern={"nowhere": 8})


def test_an_adapter_name_inside_the_prefix_is_refused(method, make_config):
    name = method.split("-")[0]
    with pytest.warns(UserWarning, match=f"Adapter name '{name}' should not be contained in the prefix"):
        get_peft_model(mlp(), make_config(target_modules=["lin0"]), adapter_name=name)


def test_a_half_bias_free_model_works(make_config):
    torch.manual_seed(0)
    model = adapted(make_config, base=MLP(bias=False).eval())
    train(model)
    assert torch.isfinite(model(X)).all()


def three_ways(make_config) -> tuple[PeftModel, torch.Tensor]:
    """A model with two adapters that train a head each, and what rows 0-2, 3-5 and 6-8 of X give one by one."""
    model = adapted(make_config, ["lin0"], modules_to_save=["lin1"])
    torch.manual_seed(2)
    model.add_adapter("other", make_config(target_modules=["lin0"], modules_to_save=["lin1"]))
    for name in ("default", "other"):
        model.set_adapter(name)
        train(model)
    second = model(X[3:6])
    model.set_adapter("default")
    with model.disable_adapter():
        third = model(X[6:])
    return model, torch.cat([model(X[:3]), second, third])


NAMES = ["default"] * 3 + ["other"] * 3 + ["__base__"] * 3


def test_a_mixed_batch_uses_each_adapter_s_own_head(make_config):
    model, want = three_ways(make_config)
    torch.testing.assert_close(model(X, adapter_names=NAMES), want, rtol=1e-4, atol=1e-5)


def test_a_mixed_batch_while_adapters_are_disabled_is_the_base_model(make_config):
    model = two_adapters(make_config)
    names = ["default"] * 5 + ["other"] * 4
    with model.disable_adapter():
        assert torch.equal(model(X, adapter_names=names), mlp()(X))
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(X, adapter_names=names), mlp()(X))


@pytest.mark.parametrize("method", MERGES, indirect=True)
def test_a_mixed_batch_while_adapters_are_merged_is_refused(make_config):
    model = two_adapters(make_config)
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        model(X, adapter_names=["default"] * 9)


def test_embeddings_can_be_passed_instead_of_tokens(make_config, inputs):
    model = adapted(make_config, ["q_proj"], base=tiny_llama())
    embeds = model.get_input_embeddings()(inputs)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(inputs).logits)
    assert not embeds.requires_grad
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(inputs).requires_grad


def test_the_model_class_follows_the_task_type(make_config, inputs):
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), make_config(target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM)).eval()
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert model.generate(inputs, max_new_tokens=2).shape == model.generate(input_ids=inputs, max_new_tokens=2).shape


def test_an_adapter_wraps_only_what_it_names(make_config):
    model = adapted(make_config, ["lin0"])
    assert model.targeted_module_names == ["lin0"]
    assert type(model.base_model.model.lin1) is nn.Linear
    with pytest.raises(ValueError, match=re.escape("not found in the base model")):
        adapted(make_config, ["conv"])
    with pytest.raises(ValueError, match="All modules were excluded"):
        adapted(make_config, ["lin0"], exclude_modules=r".*|^$")


def replicas(model: nn.Module, monkeypatch) -> list[nn.Module]:
    """Two, as nn.DataParallel makes them, on one device: only the copy to other devices is replaced."""
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [
            [t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices
        ],
    )
    return module.replicate(model, [0, 1])


def test_replicas_of_data_parallel_train_as_the_model_itself(make_config, monkeypatch):
    """Two steps of 5 and 4 rows; what selection is balanced by moves by the counts of both halves."""

    def trained(parallel: bool) -> dict[str, torch.Tensor]:
        model = adapted(make_config).train()
        model.base_model.model.drop.p = 0.0
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            if parallel:
                rows = zip(replicas(model, monkeypatch), X.split(5), strict=True)
                output = torch.cat([replica(part) for replica, part in rows])
            else:
                output = model(X)
            nn.functional.nll_loss(output, torch.arange(9) % 6).backward()
            optimizer.step()
        return get_peft_model_state_dict(model)

    want, got = trained(False), trained(True)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
    assert all(value.any() for name, value in want.items() if "offset" in name)


@pytest.mark.parametrize("method", ["mora", "flylora"], indirect=True)
def test_usage_is_not_counted_in_replicas(make_config, monkeypatch):
    model = adapted(make_config)
    with record_usage(model), pytest.raises(RuntimeError, match="under nn.DataParallel.*CUDA_VISIBLE_DEVICES=0"):
        replicas(model, monkeypatch)[0](X)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}], ids=["tokens", "tokens and a module"])
def test_unloading_gives_the_base_back_with_or_without_trained_tokens(method, make_config, inputs, merge, extra):
    model = adapted(make_config, ["q_proj"], base=tiny_llama(), trainable_token_indices=[5, 6], **extra)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * parameter.requires_grad)
    want = model(inputs).logits
    if merge and method not in MERGES:
        with pytest.raises(ValueError, match="Cannot merge"):
            model.merge_and_unload()
        assert torch.equal(model(inputs).logits, want)
        return
    plain = model.merge_and_unload() if merge else model.unload()
    assert not any(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in plain.modules())
    got = plain(inputs).logits
    if merge:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    elif not extra:  # a module that was trained as a whole stays, as with LoRA
        assert torch.equal(got, tiny_llama()(inputs).logits)


@pytest.mark.parametrize("method", MERGES, indirect=True)
def test_safe_merge_names_the_broken_adapter_and_no_other(method, make_config):
    model = two_adapters(make_config, second=("lin0", "lin1"))
    for name, parameter in model.named_parameters():
        if ours(name, method) and ".other." in name:
            parameter.data[0] = float("nan")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"The adapter (other|\['other'\]) seems to be broken"):
        model.merge_and_unload(safe_merge=True)
