"""What PEFT's own test-suite asks of a tuner, on a small MLP and a tiny Llama. LoRA goes through every check as well:
a check that LoRA fails would be a wrong check, and one that only ours fail would be a surprise for its users."""

import copy
import sys
import textwrap
import warnings

import pytest
import torch
from helpers import LORA, METHODS, STATIC, randomize, reopened, tiny_llama
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig
from trl.trainer.utils import disable_dropout_in_model

from peft_mora import record_usage, sparsify, start_task


CONFIGS = {"lora": LORA, **METHODS}
MERGES = [name for name, form in CONFIGS.items() if form.merges]
MERGING = pytest.mark.parametrize("method", MERGES, indirect=True)


@pytest.fixture(params=CONFIGS)
def method(request):
    return request.param


@pytest.fixture
def make_config(method):
    """Not an identity unless asked for, so that every check sees the adapter."""
    return lambda init_weights=False, **kw: CONFIGS[method](init_weights=init_weights, **kw)


class MLP(nn.Module):
    """The model of PEFT's custom-model tests: lin0, ReLU, lin1, log-softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.relu, self.drop = nn.Linear(10, 20), nn.ReLU(), nn.Dropout(0.5)
        self.lin1, self.sm = nn.Linear(20, 6), nn.LogSoftmax(dim=-1)

    def forward(self, x):
        return self.sm(self.lin1(self.drop(self.relu(self.lin0(x)))))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval()


X = torch.arange(90, dtype=torch.float32).view(9, 10) / 45 - 1


def adapted(make_config, targets=("lin0", "lin1"), base=None, **kwargs) -> PeftModel:
    base = mlp() if base is None else base
    torch.manual_seed(1)
    return get_peft_model(base, make_config(target_modules=list(targets), **kwargs)).eval()


def two_adapters(make_config, first=("lin0",), second=("lin0", "lin1"), **kwargs) -> PeftModel:
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


def test_training_reaches_the_adapter_and_nothing_else(method, make_config):
    model, prefix = adapted(make_config), CONFIGS[method].prefix
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (prefix in name) != torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("safe", [True, False])
def test_parameters_after_loading_are_the_trained_ones(make_config, tmp_path, safe):
    model = adapted(make_config, init_weights=True)
    assert torch.equal(model(X), mlp()(X))
    train(model)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    assert not (tmp_path / "config.json").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing missing, nothing unexpected
        again = PeftModel.from_pretrained(mlp(), tmp_path)
    assert torch.equal(again(X), model(X)) and not torch.equal(model(X), mlp()(X))
    for name, buffer in model.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer) and (buffer.any() or "offset" not in name), name
    result = again.load_adapter(str(tmp_path), "second")
    assert not result.missing_keys and not result.unexpected_keys
    again.set_adapter("second")
    assert torch.equal(again(X), model(X))


def test_a_layer_has_the_attributes_of_its_base_and_names_its_method(method, make_config):
    layer = adapted(make_config).base_model.model.lin0
    assert (layer.in_features, layer.out_features) == (10, 20) and layer.get_base_layer() is layer.base_layer
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    text = repr(layer)
    assert f"{CONFIGS[method].title.lower()}." in text and "(default)" in text and "base_layer" in text


@pytest.mark.parametrize("name", ["test-adapter", "my_adapter", "0"])
def test_any_adapter_name_is_kept(make_config, tmp_path, name):
    torch.manual_seed(1)
    model = get_peft_model(mlp(), make_config(target_modules=["lin0"]), adapter_name=name).eval()
    assert any(f".{name}" in key for key in model.state_dict()) and model.active_adapters == [name]
    assert torch.equal(reopened(model, tmp_path, mlp(), name, adapter_name="default")(X), model(X))


def test_deleting_the_active_adapter_falls_back_and_leaves_nothing_and_the_name_is_free_again(make_config, tmp_path):
    model = two_adapters(make_config, ["lin0", "lin1"])
    model.set_adapter("other")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("other")
    assert model.active_adapters == ["default"] and "other" not in model.peft_config
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for attribute in layer.adapter_layer_names + layer.other_param_names:
                assert "other" not in getattr(layer, attribute), attribute
    want = model(X)
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    assert model.active_adapters == [] and torch.equal(model.base_model(X), mlp()(X))
    model.load_adapter(str(tmp_path), "default")
    model.set_adapter("default")
    assert torch.equal(model(X), want)


@MERGING
def test_named_adapters_merge_and_the_rest_stays(make_config):
    model = two_adapters(make_config)
    first = model(X)
    model.set_adapter("other")
    second = model(X)
    model.base_model.set_adapter(["default", "other"])
    both = model(X)
    assert not torch.allclose(first, both)
    for names, want in ((["default"], first), (["other"], second), (["default", "other"], both)):
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True, adapter_names=names)
        assert type(merged) is MLP
        torch.testing.assert_close(merged(X), want, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(X), both, rtol=1e-4, atol=1e-5)
    model.merge_adapter()  # both are there already
    torch.testing.assert_close(model(X), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), both, rtol=1e-5, atol=1e-6)


@MERGING
def test_a_merge_is_made_once_survives_a_new_adapter_and_is_undone_by_disabling(make_config):
    model = adapted(make_config, ["lin0"])
    want = model(X)
    model.merge_adapter()
    once = model(X)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert torch.equal(model(X), once)
    torch.testing.assert_close(once, want, rtol=1e-4, atol=1e-5)
    model.add_adapter("other", make_config(target_modules=["lin0", "lin1"]))
    torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(X), mlp()(X), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        model(X, adapter_names=["default"] * 9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@MERGING
def test_safe_merge_names_the_broken_adapter_and_no_other_and_changes_nothing(method, make_config, value):
    model, prefix = two_adapters(make_config), CONFIGS[method].prefix
    for name, parameter in model.named_parameters():
        if prefix in name and ".other." in name:
            parameter.data[0] = value
    model.base_model.set_adapter(["default", "other"])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"NaNs detected in .*adapter (other|\['other'\]) seems to be broken"):
            model.merge_and_unload(safe_merge=True)
    base, after = mlp().state_dict(), model.unload().state_dict()
    assert method == "lora" or all(torch.equal(after[name], p) for name, p in base.items())  # LoRA merged the first


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


def test_low_cpu_mem_usage_loads_the_same_model(make_config, tmp_path):
    model = adapted(make_config)
    again = reopened(model, tmp_path, mlp(), low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
    again.load_adapter(str(tmp_path), "other", low_cpu_mem_usage=True)
    again.set_adapter("other")
    assert torch.equal(again(X), model(X))
    empty = get_peft_model(mlp(), make_config(target_modules=["lin0", "lin1"]), low_cpu_mem_usage=True)
    assert any(p.is_meta for p in empty.parameters())
    empty.load_adapter(str(tmp_path), "default", low_cpu_mem_usage=True)
    assert torch.equal(empty.eval()(X), model(X))


def test_a_mixed_batch_uses_each_adapter_s_own_head_and_none_while_they_are_disabled(make_config):
    model = two_adapters(make_config, ["lin0"], ["lin0"], modules_to_save=["lin1"])
    for name in ("default", "other"):
        model.set_adapter(name)
        train(model)
    second = model(X[3:6])
    model.set_adapter("default")
    names = ["default"] * 3 + ["other"] * 3 + ["__base__"] * 3
    want = torch.cat([model(X[:3]), second, mlp()(X[6:])])
    torch.testing.assert_close(model(X, adapter_names=names), want, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(X, adapter_names=names), mlp()(X))


def replicas(model: nn.Module, monkeypatch, devices=("cpu", "cpu")) -> list[nn.Module]:
    """As nn.DataParallel makes them: only the copy to other devices is replaced. No gradient comes back from meta."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def copied(t: torch.Tensor, device: str, detach: bool) -> torch.Tensor:
        if device == "meta":
            return t.detach().to(device).requires_grad_(t.requires_grad)
        return t.detach().clone() if detach else t.clone()

    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[copied(t, device, detach) for t in tensors] for device in devices],
    )
    return module.replicate(model, devices)


def test_replicas_of_data_parallel_train_as_the_model_itself(make_config, monkeypatch):
    """Two steps of 5 and 4 rows; what selection is balanced by moves by the counts of both halves. FURINA's losses are
    means over a batch, which two halves do not add up to."""
    wanted = {"selection_weight": 0.0, "balance_weight": 0.0, "balance_rate": 1e-3}
    fields = {name: value for name, value in wanted.items() if hasattr(make_config(), name)}

    def trained(parallel: bool) -> dict[str, torch.Tensor]:
        model = adapted(make_config, **fields).train()
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

    want = trained(False)
    torch.testing.assert_close(trained(True), want, rtol=1e-5, atol=1e-6)
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


@pytest.mark.parametrize("change", [{}, {"r": 6}, {"seed": 1}, {"sparsity": 0.25}], ids=str)
def test_a_config_object_used_again_makes_a_fresh_adapter_of_what_it_says_now(
    method, make_config, inputs, tmp_path, change
):
    config = make_config(init_weights=True, target_modules=["q_proj", "down_proj"])
    if not all(hasattr(config, field) for field in change):
        pytest.skip("no such field")
    model = get_peft_model(tiny_llama(), config).train()
    randomize(model)
    model(input_ids=inputs, labels=inputs).loss.backward()  # FLYLORA's offset moves
    first = model.eval()(inputs).logits
    for field, value in change.items():
        setattr(config, field, value)
    model.add_adapter("other", config)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.r["other"] == config.r
    model.set_adapter("other")
    assert torch.equal(model(inputs).logits, tiny_llama()(inputs).logits)
    randomize(model, seed=8)
    second = model(inputs).logits

    alone = get_peft_model(tiny_llama(), copy.deepcopy(config)).eval()
    randomize(alone, seed=8)
    if method.startswith(("lori", "flylora")):  # not those whose A comes from the global generator
        torch.testing.assert_close(second, alone(inputs).logits)
    assert torch.equal(reopened(model, tmp_path, name="other")(inputs).logits, second)
    if method != "lora":  # whose first adapter is saved with the changed r, and does not open
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        assert torch.equal(again(inputs).logits, first)


@pytest.mark.parametrize("trained", [True, False])
def test_the_reference_of_a_preference_trainer_is_the_adapter_as_it_is(method, make_config, inputs, trained):
    """TRL adds "ref" by the config object of the adapter, then copies the parameters by name, and nothing else."""
    model = get_peft_model(tiny_llama(), make_config(target_modules=["q_proj", "down_proj"])).train()
    if trained:
        model(input_ids=inputs, labels=inputs).loss.backward()
        if method.startswith("mora"):
            start_task(model, "second")
        if method == "lori":
            sparsify(model, 0.5)
        randomize(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    want = model.eval()(inputs).logits
    model.set_adapter("ref")
    assert torch.equal(model(inputs).logits, want)


def test_peft_s_helper_that_leaves_inputs_in_their_dtype_changes_nothing_here(make_config):
    model, x = adapted(make_config).eval(), torch.randn(3, 10)
    want = model(x)
    with disable_input_dtype_casting(model):
        assert torch.equal(model(x), want)


def test_trl_switches_its_dropout_off_as_a_lora_s(method, make_config, inputs):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), make_config(target_modules="all-linear", dropout=0.5)).train()
    randomize(model)
    assert not torch.equal(model(inputs).logits, model(inputs).logits)
    disable_dropout_in_model(model)
    want = model(inputs).logits
    assert torch.equal(model(inputs).logits, want)
    model.delete_adapter("default")


def test_lora_plus_gives_b_its_ratio_or_is_refused_with_the_lines_that_do(method, make_config):
    model = adapted(make_config)
    fields = {"lr": 1e-3, "loraplus_lr_ratio": 16.0}
    if method == "lora":
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **fields)
    else:
        with pytest.raises(ValueError, match="create_loraplus_optimizer finds A and B by the names") as refusal:
            create_loraplus_optimizer(model, torch.optim.AdamW, **fields)
        learnt = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        with pytest.raises(ValueError, match="create_lorafa_optimizer finds A and B by the names"):
            create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
        assert learnt == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        *lines, last = textwrap.dedent(str(refusal.value).split("\n", 1)[1]).splitlines()
        scope = {"model": model, "torch": torch, "lr": 1e-3, "ratio": 16.0}
        exec("\n".join([*lines, f"optimizer = {last}"]), scope)
        optimizer = scope["optimizer"]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(16e-3 if "_B." in name else 1e-3)


@pytest.mark.parametrize("targets", [["in_proj"], ["in_proj", "out_proj"], "all-linear"], ids=str)
def test_modules_that_a_fused_kernel_never_calls_are_refused(method, make_config, targets, inputs):
    torch.manual_seed(0)
    mamba = MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)
    base = AutoModelForCausalLM.from_config(mamba)
    if targets != ["in_proj"]:
        with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models") as refusal:
            get_peft_model(base, make_config(target_modules=targets))
        assert method.split("-")[0].upper() in str(refusal.value)
        return
    model = get_peft_model(base, make_config(target_modules=targets)).train()
    model(input_ids=inputs, labels=inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_replica_on_another_device_takes_nothing_to_it(make_config, monkeypatch):
    """Which a device without numbers shows: its forward and backward run, and the other replica trains as ever."""
    model = adapted(make_config).train()
    here, there = replicas(model, monkeypatch, ("cpu", "meta"))
    here(X).sum().backward()
    there(X.to("meta")).sum().backward()
    state = get_peft_model_state_dict(model)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(value.is_meta for value in state.values())
    assert all(value.any() for name, value in state.items() if "offset" in name)


@pytest.mark.parametrize("form", METHODS)
@pytest.mark.parametrize("name", ["a.b", "half"])
def test_a_name_that_modules_cannot_have_leaves_nothing_behind(form, name):
    model = get_peft_model(MLP(), METHODS[form](target_modules=["lin0"]))
    with pytest.raises(ValueError, match="`adapter_name` must be a name without dots"):
        model.add_adapter(name, METHODS[form](target_modules=["lin0"]))
    assert list(model.peft_config) == ["default"] == list(model.base_model.model.lin0.r)


@pytest.mark.parametrize(
    ("inner", "outer"), [("lora", "lora"), ("lora", "lori"), ("lori", "lora"), ("mora-dense", "lori")]
)
def test_merges_of_an_adapted_model_in_another_one_are_taken_apart_again(inner, outer):
    """PEFT unmerges in the order in which it merged, so that none finds the weight as it left it."""
    model = mlp()
    for method in (inner, outer):
        torch.manual_seed(len(method))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a second time
            model = get_peft_model(model, CONFIGS[method](init_weights=False, target_modules=["lin0", "lin1"])).eval()
    want = model(X)
    model.merge_adapter()
    assert not torch.allclose(
        model.get_submodule("base_model.model.base_model.model.lin0").get_base_layer().weight, mlp().lin0.weight
    )
    torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-6)
    for name in ("lin0", "lin1"):
        layer = model.get_submodule(f"base_model.model.base_model.model.{name}").get_base_layer()
        torch.testing.assert_close(layer.weight, getattr(mlp(), name).weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", STATIC)
def test_a_weight_goes_back_bit_for_bit_after_several_merges_and_in_the_dtype_of_its_model(method):
    model = two_adapters(METHODS[method])
    for name in ("default", "other"):
        model.merge_adapter([name])
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.lin0.base_layer.weight, mlp().lin0.weight)
    model.merge_adapter()
    model.half()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.lin0.base_layer.weight, mlp().lin0.weight.half())


@pytest.mark.parametrize("form", METHODS)
def test_an_adapter_that_fails_at_a_later_module_leaves_nothing_behind(form, monkeypatch):
    layer_cls, made = METHODS[form].model.tuner_layer_cls, []
    create = layer_cls.create_weights

    def failing(self, *args):
        made.append(self)
        if len(made) == 2:
            raise RuntimeError("out of memory")
        create(self, *args)

    def config():
        return METHODS[form](target_modules=["lin0", "lin1"], init_weights=False)

    model = mlp()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(layer_cls, "create_weights", failing)
        get_peft_model(model, config())
    assert len(made) == 2 and not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    model = get_peft_model(model, config()).eval()
    before = model(X)
    assert not torch.allclose(before, mlp()(X))
    made.clear()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(layer_cls, "create_weights", failing)
        model.add_adapter("b", config())
    assert len(made) == 2 and not any(
        "b" in layer.r for layer in (model.base_model.model.lin0, model.base_model.model.lin1)
    )
    assert torch.equal(model(X), before)
    model.add_adapter("b", METHODS[form](target_modules=["lin1"]))
    keys = get_peft_model_state_dict(model, adapter_name="b")
    assert keys and all("lin1" in key for key in keys)


def test_what_fails_around_an_adapter_of_the_same_name_leaves_that_one(monkeypatch):
    inner = get_peft_model(mlp(), METHODS["mora"](target_modules=["lin0", "lin1"], init_weights=False)).eval()
    before, create, made = inner(X), METHODS["lori"].model.tuner_layer_cls.create_weights, []

    def failing(self, *args):
        made.append(self)
        if len(made) == 2:
            raise RuntimeError("out of memory")
        create(self, *args)

    monkeypatch.setattr(METHODS["lori"].model.tuner_layer_cls, "create_weights", failing)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="out of memory"):
        warnings.simplefilter("ignore")
        get_peft_model(inner, METHODS["lori"](target_modules=["lin0", "lin1"]))
    assert torch.equal(inner(X), before)
    kinds = {type(m).__name__ for m in inner.modules() if isinstance(m, BaseTunerLayer)}
    assert kinds == {"MoraLinear"}
