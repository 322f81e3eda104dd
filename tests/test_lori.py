"""What only LORI does: seeded projections, global magnitude masks, packed training, exact combination."""

import copy
import json
import math
import shutil

import pytest
import torch
from helpers import METHODS, adapted, gradients, randomize, reopened, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from peft_mora import FlyLoraConfig, LoriConfig, LoriLinear, sparsify
from peft_mora.base import AdapterLinear
from peft_mora.packed import unpack_bits
from peft_mora.seeded import SeededLinear


def lori(base=None, **kwargs) -> PeftModel:
    return adapted(LoriConfig, base, **{"r": 4, "alpha": 8, **kwargs})


def sparse(sparsity: float, base=None, values: int = 9) -> PeftModel:
    """Calibrated, made sparse and trained."""
    model = lori(base)
    sparsify(model, sparsity)
    randomize(model, values)
    return model


def add(model: PeftModel, name: str = "second", values: int = 12, onto: str | None = None, **kwargs) -> None:
    """One more adapter, calibrated and active; with `onto`, made sparse (0.8) as the task after that one."""
    model.add_adapter(name, LoriConfig(**{"r": 4, "alpha": 8, "target_modules": "all-linear", **kwargs}))
    model.set_adapter(name)
    randomize(model, values)
    if onto:
        sparsify(model, 0.8, adapter_name=name, onto=onto)


def layers(model) -> dict[str, LoriLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoriLinear)}


def three_steps(model: PeftModel, inputs) -> torch.optim.Optimizer:
    """Of an AdamW whose weight decay would move entries that have no gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        gradients(model, inputs)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("sparsity", [None, 0.6])
def test_layer_equals_the_reference_in_values_and_gradients(sparsity):
    model = lori(nn.Sequential(nn.Linear(13, 9)).double(), target_modules=["0"], sparsity=sparsity)
    (layer,) = layers(model).values()
    x = torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True)
    A, B = layer.lori_A["default"].double(), layer.lori_B["default"].weight
    weights = [x, B]
    if sparsity is not None:
        mask = unpack_bits(layer.lori_mask["default"], 36)
        B = torch.zeros(36, dtype=torch.float64).masked_scatter(mask, B).view(9, 4)
    want, upstream = layer.base_layer(x) + (8 / 4) * (x @ A.T) @ B.T, torch.randn(2, 5, 9, dtype=torch.float64)
    both = ([y, *torch.autograd.grad(y, weights, upstream)] for y in (model(x), want))
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)


def test_the_projection_depends_on_seed_and_module_name_only():
    def projections(base, **kwargs):
        config = LoriConfig(**{"r": 4, "target_modules": "all-linear", **kwargs})
        return {name: layer.lori_A["default"] for name, layer in layers(get_peft_model(base, config)).items()}

    want = projections(tiny_llama())
    torch.manual_seed(99)
    for other in (
        projections(tiny_llama(seed=5).to(torch.bfloat16)),
        projections(tiny_llama().half()),
        projections(tiny_llama(), target_modules=["o_proj", "q_proj"]),
    ):
        assert all(torch.equal(A.float(), want[name]) for name, A in other.items())
    changed = projections(tiny_llama(), seed=1)
    assert not any(torch.equal(A, want[name]) for name, A in changed.items())
    first, second = list(want.values())[:2]
    assert first.shape != second.shape or not torch.equal(first, second)
    for A in want.values():  # kaiming-uniform(a=√5), as nn.Linear and LoRA
        bound = 1 / math.sqrt(A.shape[1])
        assert A.abs().max() <= bound * 1.01 and abs(A.std() / (bound / math.sqrt(3)) - 1) < 0.25
        assert torch.equal(A.bfloat16().float(), A)


SEEDED = pytest.mark.parametrize("method", ["lori", "flylora"])


@SEEDED
def test_a_projection_that_differs_is_refused_by_name(method, tmp_path):
    adapted(method, save_projection=False).save_pretrained(tmp_path)
    config = METHODS[method].config.from_pretrained(str(tmp_path))
    config.seed = 5
    with pytest.raises(ValueError, match=r"projection A of module '.*q_proj'.*seed \(here 5\)"):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path), config=config)
    adapted(method).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    state[f"base_model.model.model.layers.0.mlp.down_proj.{method}_A"][0, 0] += 1
    save_file(state, file)
    with pytest.raises(ValueError, match="projection A of module '.*down_proj'"):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


REFUSED = r"projection A of module '{}\..*q_proj'.*Load it into the model class.*save_projection=True"


@SEEDED
def test_transformers_refuses_another_projection_too(method, llama_folder, inputs, tmp_path):
    """It fills the tensors itself; another model class has other names, and so draws another A."""
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    model = adapted(method, base, save_projection=False, target_modules=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path / "right")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "right")(inputs).logits, model(inputs).logits)
    with pytest.raises(ValueError, match=REFUSED.format("layers")):
        AutoModel.from_pretrained(tmp_path / "right")
    other = shutil.copytree(tmp_path / "right", tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "seed": 5}))
    with pytest.raises(ValueError, match=REFUSED.format("model.layers")):
        AutoModelForCausalLM.from_pretrained(other)
    to_train = tiny_llama().eval()
    to_train.load_adapter(str(other), is_trainable=True)
    for use in (lambda: to_train(inputs), to_train.train):
        with pytest.raises(ValueError, match=REFUSED.format("model.layers")):
            use()
    file = tmp_path / "right" / "adapter_model.safetensors"
    save_file({k: tensor for k, tensor in load_file(file).items() if "checksum" not in k}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="no `.*_checksum` for module 'model.*q_proj'.*Take the file as it was saved"):
        AutoModelForCausalLM.from_pretrained(file.parent)


@SEEDED
def test_what_transformers_fills_in_place_is_compared_too(method, inputs):
    """As under ZeRO-3, where a buffer's mark is gone once it was moved."""

    def filled(source, moved):
        model, state = adapted(method), source.state_dict()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if f"{method}_B" in name or "checksum" in name:
                tensor.data.copy_(state[name])
                tensor._is_hf_initialized = True
            if f"{method}_B" in name:
                tensor.ds_id = 0
        for module in model.modules():
            if isinstance(module, SeededLinear):
                module.unchecked["default"] = False
                checksums = getattr(module, f"{method}_checksum")._buffers
                checksums["default"] = checksums["default"].clone() if moved else checksums["default"]
        return model

    for moved in (False, True):
        filled(adapted(method), moved)(inputs)
        with pytest.raises(ValueError, match=REFUSED.format("model.layers")):
            filled(adapted(method, seed=5), moved)(inputs)


@SEEDED
def test_a_state_dict_with_another_projection_is_refused(method, inputs):
    """Also by a copy, and a whole one is not."""
    model, other = adapted(method), adapted(method, seed=5)
    state = copy.deepcopy(other.state_dict())
    other.load_state_dict({k: tensor for k, tensor in model.state_dict().items() if "checksum" in k}, strict=False)
    for refusing in (other, copy.deepcopy(other)):
        with pytest.raises(ValueError, match=REFUSED.format("model.layers")):
            refusing(inputs)
    model.load_state_dict(state)
    other.load_state_dict(state)
    assert torch.equal(model(inputs).logits, other(inputs).logits)


@pytest.mark.parametrize("config", [LoriConfig, FlyLoraConfig])
def test_a_half_precision_model_saves_a_file_that_opens(config, tmp_path):
    """float16 rounds the smallest of 16,384 bfloat16 values; the checksum must not mind."""
    net = nn.Sequential(nn.Linear(4096, 4))
    reopened(get_peft_model(copy.deepcopy(net), config(r=16, target_modules=["0"])).half(), tmp_path, net)


@pytest.mark.parametrize("method", ["lori-sparse", "flylora"])
def test_training_goes_on_after_an_evaluation_in_inference_mode(method, inputs, monkeypatch):
    """With what was made in it and is kept: places of entries, and the matrix of a sparse projection."""
    model = adapted(method)
    with torch.inference_mode():
        model(inputs)
    assert gradients(model, inputs)
    monkeypatch.setattr(AdapterLinear, "lean", False)  # where autograd holds them
    assert gradients(model, inputs)


def test_a_file_without_frozen_entries_leaves_none_behind(tmp_path, inputs):
    plain = sparse(0.5)
    plain.eval().save_pretrained(tmp_path)
    model = sparse(0.5, values=4)
    add(model, onto="default")
    model.load_adapter(str(tmp_path), "second")
    assert torch.equal(model.eval()(inputs).logits, plain(inputs).logits)


def test_sparsify_keeps_the_largest_entries_over_all_modules(inputs):
    model = lori()
    dense, before = {}, {}
    for i, (name, layer) in enumerate(layers(model).items()):  # of different magnitude: they get different shares
        dense[name] = layer.lori_B["default"].weight.data.mul_(1 + i).clone()
        before[name] = layer.lori_A["default"].clone()
    total = sum(B.numel() for B in dense.values())
    summary = sparsify(model, 0.9)
    assert summary.kept == round(0.1 * total) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.get_nb_trainable_parameters()[0] == summary.kept and summary.total == total
    threshold = torch.cat([B.abs().flatten() for B in dense.values()]).sort(descending=True).values[summary.kept - 1]
    assert summary.threshold == threshold
    for name, layer in layers(model).items():
        layer.lori_B["default"].weight.data.fill_(1.0)
        assert torch.equal(layer.matrix_B("default", torch.float32) == 1, dense[name].abs() >= threshold)
        layer.lori_B["default"].weight.data.zero_()
        assert torch.equal(layer.lori_A["default"], before[name])
    assert torch.equal(model.eval()(inputs).logits, tiny_llama()(inputs).logits)  # B restarts from 0
    assert min(summary.share.values()) < 0.5 * max(summary.share.values()) and "entries of B kept" in str(summary)


def test_entries_off_the_mask_stay_zero_under_adamw_with_weight_decay(inputs):
    model = lori()
    sparsify(model, 0.8)
    for layer in layers(model).values():
        layer.lori_B["default"].weight.data.fill_(1.0)
    off = {name: layer.matrix_B("default", torch.float32) == 0 for name, layer in layers(model).items()}
    optimizer = three_steps(model, inputs)
    for name, layer in layers(model).items():
        B = layer.matrix_B("default", torch.float32)
        assert (B[off[name]] == 0).all() and (B[~off[name]] != 1).all()
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim() > 0)
    assert state == 2 * model.get_nb_trainable_parameters()[0]


def test_loading_takes_the_form_of_the_file_into_an_adapter_that_is_there(tmp_path, inputs):
    saved = {"sparse": sparse(0.7).eval(), "dense": lori()}
    for name, want in saved.items():
        want.save_pretrained(tmp_path / name)
    model = lori()
    randomize(model, seed=8)
    for name in ("sparse", "dense", "sparse"):
        want = saved[name]
        model.load_adapter(str(tmp_path / name), "default", is_trainable=True)
        assert torch.equal(model.eval()(inputs).logits, want(inputs).logits)
        assert model.get_nb_trainable_parameters() == want.get_nb_trainable_parameters()
        assert model.peft_config["default"].kept_entries == want.peft_config["default"].kept_entries


@pytest.mark.parametrize("same_seed", [True, False])
def test_combined_adapters_are_the_exact_weighted_sum(same_seed, tmp_path, inputs):
    model = lori()
    for i, name in enumerate(("b", "c")):
        add(model, name, values=20 + i, alpha=8 + i, seed=0 if same_seed else i + 1)
    sparsify(model, 0.5, adapter_name="c")
    randomize(model, seed=30)
    weights = {"default": 0.5, "b": -1.25, "c": 2.0}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    for layer in layers(model).values():
        want = sum(w * layer.get_delta_weight(name) for name, w in weights.items())
        torch.testing.assert_close(layer.get_delta_weight("sum"), want, rtol=1e-5, atol=1e-6)
        assert layer.r["sum"] == (4 if same_seed else 12)
    model.set_adapter("sum")
    again = reopened(model.eval(), tmp_path, name="sum")
    assert torch.equal(again(inputs).logits, model(inputs).logits)


def test_combining_refuses_what_it_cannot_do_exactly():
    model = lori()
    model.add_adapter("b", LoriConfig(r=4, seed=5, target_modules="all-linear"))
    for names, weights, new, how, message in (
        (["default", "b"], [1, 1], "sum", "linear", "same projection A.*combination_type='cat'"),
        (["default", "x"], [1, 1], "sum", None, "do not exist"),
        (["default", "b"], [1], "sum", None, "2 adapters need 2 weights, got 1"),
        (["default"], [1], "b", None, "'b' already exists"),
        (["default"], [1], "sum", "svd", "`combination_type`"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(names, weights, new, combination_type=how)
    assert set(model.peft_config) == {"default", "b"}


def test_a_second_task_moves_no_entry_outside_its_own_mask(tmp_path, inputs):
    model = sparse(0.8)
    first = {name: layer.matrix_B("default", torch.float32).detach() for name, layer in layers(model).items()}
    task1 = model.eval()(inputs).logits
    add(model, onto="default")
    assert torch.equal(model(inputs).logits, task1)  # it starts as task 1
    three_steps(model, inputs)
    moved, kept, overlap = 0, 0, 0
    for name, layer in layers(model).items():
        mask = unpack_bits(layer.lori_mask["second"], layer.size("second")).view(layer.out_features, 4)
        B = layer.matrix_B("second", torch.float32)
        assert torch.equal(B[~mask], first[name][~mask])
        moved += (B[mask] != first[name][mask]).sum().item()
        kept += mask.sum().item()
        overlap += (mask & (first[name] != 0)).sum().item()
    assert moved == kept == model.get_nb_trainable_parameters()[0]
    assert 0.1 < overlap / kept < 0.3  # masks of 20 % overlap in 20 % by chance
    again = reopened(model, tmp_path, name="second")
    assert torch.equal(again(inputs).logits, model.eval()(inputs).logits)


def test_sparsify_refuses_what_would_be_wrong():
    fresh = get_peft_model(tiny_llama(), LoriConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="B is 0 everywhere"):
        sparsify(fresh)
    model = lori()
    with pytest.raises(ValueError, match="`sparsity` must be a number in"):
        sparsify(model, 1.0)
    with pytest.raises(ValueError, match="no LORI adapter named 'x'"):
        sparsify(model, adapter_name="x")
    with pytest.raises(ValueError, match="no LORI adapter at all"):
        sparsify(adapted("mora"))
    model.add_adapter("other", LoriConfig(r=4, seed=7, target_modules="all-linear"))
    with pytest.raises(ValueError, match="another projection A"):
        sparsify(model, onto="other")
    broken = copy.deepcopy(model)
    next(iter(layers(broken).values())).lori_B["default"].weight.data[0, 0] = float("nan")
    before = {key: value.clone() for key, value in broken.state_dict().items()}
    with pytest.raises(ValueError, match="not finite: the calibration run has diverged"):
        sparsify(broken)
    assert all(torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in broken.state_dict().items())
    sparsify(model)
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(model)


def test_a_projection_from_nowhere_must_be_saved():
    with pytest.raises(ValueError, match="`save_projection` must be True when `seed` is None"):
        LoriConfig(seed=None, save_projection=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [8, 24])
def test_a_second_task_starts_as_the_first_whatever_its_alpha_and_the_base_s_dtype(alpha, dtype, inputs):
    model = sparse(0.8, tiny_llama().to(dtype))
    add(model, onto="default", alpha=alpha)
    for layer in layers(model).values():
        assert layer.lori_B["second"].weight.dtype == torch.float32
        torch.testing.assert_close(
            layer.get_delta_weight("second"), layer.get_delta_weight("default"), rtol=1e-6, atol=1e-8
        )


def test_a_second_task_over_fewer_modules_is_refused_and_changes_nothing(inputs):
    model = lori()
    add(model, target_modules=["q_proj", "v_proj"])
    before = model(inputs).logits
    with pytest.raises(ValueError, match=r"'default' adapts 10 modules that 'second' does not.*same `target_modules`"):
        sparsify(model, 0.8, adapter_name="second", onto="default")
    assert torch.equal(model(inputs).logits, before) and model.peft_config["second"].sparsity is None


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}])
def test_combining_refuses_what_has_no_weighted_sum(fields):
    (field,) = fields
    model = lori(**fields)
    model.add_adapter("b", LoriConfig(r=4, target_modules="all-linear"))
    for names in (["default"], ["b", "default"]):
        with pytest.raises(ValueError, match=rf"\['default'\] have `{field}`.*Combine adapters that were trained"):
            model.add_weighted_adapter(names, [1.0] * len(names), "sum")
    assert set(model.peft_config) == {"default", "b"}


@pytest.mark.parametrize("config", [LoriConfig, FlyLoraConfig])
@pytest.mark.parametrize("save_projection", [True, False])
def test_a_file_without_its_checksum_is_refused(config, save_projection, tmp_path):
    model = get_peft_model(tiny_llama(), config(r=8, save_projection=save_projection, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "checksum" not in key}, file)
    with pytest.raises(ValueError, match="no `.*_checksum` for module '.*q_proj'.*Take the file as it was saved"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.333, 0.0])
def test_a_resumed_adapter_s_config_has_the_sparsity_that_was_asked_for(sparsity, tmp_path):
    """A trainer that resumes loads the file into the dense adapter of its script."""
    model = lori()
    sparsify(model, sparsity)
    model.save_pretrained(tmp_path)
    again = lori()
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert again.peft_config["default"].sparsity == model.peft_config["default"].sparsity == sparsity


def logits(model, seed=0):
    ids = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("fields", [{"rank_pattern": {"q_proj": 2}}, {"exclude_modules": ["up_proj"]}])
def test_a_sum_of_one_adapter_is_that_adapter_whatever_its_config_says_of_modules(fields):
    model = adapted("lori", r=4, alpha=16, **fields)
    want = logits(model)
    model.add_adapter("wide", LoriConfig(r=4, target_modules=["up_proj"]))  # which the first may leave out
    model.add_weighted_adapter(["default", "wide"], [1.0, 0.0], "sum")
    assert all(not p.requires_grad for name, p in model.named_parameters() if ".sum." in name)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["a.b", "", 5, "half"])
def test_a_name_that_modules_cannot_have_is_refused_before_anything_changes(name):
    model = adapted("lori")
    with pytest.raises(ValueError, match="`adapter_name` must be a name without dots"):
        model.add_weighted_adapter(["default"], [1.0], name)
    layers = [module for module in model.modules() if isinstance(module, LoriLinear)]
    assert list(model.peft_config) == ["default"] and all(list(layer.r) == ["default"] for layer in layers)


@pytest.mark.parametrize("weights", [[float("nan")], ["x"], [None], "1", [10**400]])
def test_weights_that_are_no_numbers_are_refused(weights):
    model = adapted("lori")
    with pytest.raises(ValueError, match="`weights` must be finite numbers"):
        model.add_weighted_adapter(["default"], weights, "sum")
    with pytest.raises(ValueError, match="`alpha` must be"):
        LoriConfig(alpha=10**400)
    model.add_weighted_adapter(["default"], torch.tensor([0.5]), "less")


def test_a_state_that_is_loaded_over_a_used_one_has_its_own_places():
    model = adapted("lori")
    sparsify(model, 0.5)
    randomize(model)
    fresh = copy.deepcopy(model)
    before, state = logits(model), model.state_dict()
    masks = [key for key in state if key.endswith("lori_mask.default")]
    assert masks and all(state[key].dtype == torch.uint8 for key in masks)
    other = {key: tensor.flip(0) if key in masks else tensor for key, tensor in state.items()}
    for each in (model, fresh):
        each.load_state_dict(other)
    torch.testing.assert_close(logits(model), logits(fresh))
    assert not torch.allclose(logits(model), before, atol=1e-3)


@SEEDED
def test_an_adapter_that_failed_to_load_stops_none_but_itself(method, inputs, tmp_path):
    smaller = tiny_llama()
    smaller.config.hidden_size = 32
    adapted(method, AutoModelForCausalLM.from_config(smaller.config)).save_pretrained(tmp_path)
    model = adapted(method)
    before = model(inputs).logits
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(str(tmp_path), "other")
    for mode in (True, False):
        assert torch.equal(model.train(mode)(inputs).logits, before)
    with pytest.raises(ValueError, match="of adapter 'other' is not the one"):
        model.base_model.set_adapter("other")
        model(inputs)


def test_a_projection_that_differs_is_in_no_sum_and_no_merge(inputs):
    model = adapted("lori")
    model.add_adapter("b", METHODS["lori"](target_modules="all-linear"))
    state = {key: x + (("lori_A.b" in key) & x.is_floating_point()) for key, x in model.state_dict().items()}
    model.load_state_dict(state)
    model(inputs)  # of the other
    for use in (
        lambda: model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "both"),
        lambda: model.merge_adapter(["b"]),
    ):
        with pytest.raises(ValueError, match="of adapter 'b' is not the one"):
            use()
    assert set(model.peft_config) == {"default", "b"}
