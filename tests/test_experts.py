"""Adapters on the fused experts of a mixture: values, gradients, files, merging, 4 bits, export, what is refused."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from helpers import LORA, METHODS, adapted, gradients, randomize, sft, tiny_gpt2, tiny_llama
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from peft_mora import MoraConfig, sparsify, start_task
from peft_mora.base import AdapterLinear
from peft_mora.experts import ExpertWeights
from peft_mora.export import effect_error, exact_lora, save_lora
from peft_mora.lora_file import read_lora


SIZES = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 64, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
MIXTURES = {  # GptOss keeps (experts, I, O), with biases beside it
    "mixtral": MixtralConfig(num_local_experts=3, **SIZES),
    "qwen3-moe": Qwen3MoeConfig(num_experts=3, moe_intermediate_size=24, **SIZES),
    "gpt-oss": GptOssConfig(num_local_experts=3, **SIZES),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
STATIC = ("mora-dense", "lori", "lori-sparse")


def mixture(name: str = "mixtral", four_bit: bool = False, experts: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXTURES[name], experts_implementation=experts)
    if four_bit:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        for layer in model.model.layers:
            for parameter in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(layer.mlp.experts, parameter, compress_statistics=True)
    return model


def on_experts(method: str, base: nn.Module | None = None, **fields) -> PeftModel:
    fields = {"target_modules": ["q_proj"], "target_parameters": BOTH, **fields}
    return adapted(METHODS[method], mixture() if base is None else base, **fields)


def expected(model: PeftModel, layer: ExpertWeights) -> torch.Tensor:
    """W + scaling · B_e A_e in float64, expert by expert, of what the layer stores."""
    weight = layer.base_parameter().detach().double().clone()
    rank, out = layer.r["default"] // layer.experts, layer.out_features
    if layer.prefix == "lori_":
        blocks = [(layer.lori_A["default"], layer.matrix_B("default", torch.float64))]
    else:
        blocks = list(layer.blocks("default"))
    for A, B in blocks:
        assert A.shape == (3 * rank, layer.in_features) and B.shape == (out, 3 * rank)
        for e in range(3):
            own = slice(e * rank, (e + 1) * rank)
            delta = layer.scaling["default"] * B.detach().double()[:, own] @ A.detach().double()[own]
            weight[e] += delta.T if layer.transposed else delta
    return weight


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("method", STATIC)
def test_every_expert_has_a_delta_of_its_own(method, name, inputs, tmp_path):
    model = on_experts(method, mixture(name))
    if method == "mora-dense":
        start_task(model, "second")
        randomize(model, seed=5)
    plain = mixture(name)
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, ExpertWeights):
                owner = path.removeprefix("base_model.model.").replace(".base_layer", "")
                assert layer.scaling["default"] == model.peft_config["default"].alpha / 4  # by an expert's own rank
                getattr(plain.get_submodule(owner), layer.parameter_name).copy_(expected(model, layer))
        for base, layer in zip(plain.model.layers, model.base_model.model.model.layers, strict=True):
            base.self_attn.q_proj.weight += layer.self_attn.q_proj.get_delta_weight("default")
    output = model(inputs).logits
    torch.testing.assert_close(output, plain(inputs).logits, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(inputs).logits, mixture(name)(inputs).logits)

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(mixture(name), tmp_path / "adapter")
    assert torch.equal(again(inputs).logits, output)
    model.merge_adapter()
    torch.testing.assert_close(model(inputs).logits, output, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(inputs).logits, output)

    save_lora(model, exact_lora(model), tmp_path / "lora")
    lora = PeftModel.from_pretrained(mixture(name), tmp_path / "lora")
    torch.testing.assert_close(lora(inputs).logits, output, rtol=1e-4, atol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any(isinstance(m, ExpertWeights) for m in merged.modules())
    torch.testing.assert_close(merged(inputs).logits, output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("method", ["mora-dense", "lori"])
def test_gradients_are_autograd_s_of_the_plain_sum_in_float64(method, name, inputs):
    model = on_experts(method, mixture(name, experts="eager").double(), target_modules=[]).double()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, ExpertWeights)}
    weights, leaves = {}, {}
    for path, layer in layers.items():
        A, B = (t.detach().clone().requires_grad_() for t in layer.blocks_by_expert("default"))
        owner = path.removeprefix("base_model.model.").replace(".base_layer", "")
        delta = layer.scaling["default"] * torch.einsum("eor,eri->eoi", B, A)
        delta = delta.transpose(1, 2) if layer.transposed else delta
        weights[f"{owner}.{layer.parameter_name}"] = layer.base_parameter().detach() + delta
        leaves[path] = A, B
    batch = {"input_ids": inputs, "labels": inputs}
    functional_call(mixture(name, experts="eager").double(), weights, kwargs=batch).loss.backward()
    found = gradients(model, inputs)
    for path, (A, B) in leaves.items():
        want = {"B": B.grad.transpose(0, 1).flatten(1)}
        want |= {"A": A.grad.flatten(0, 1)} if method == "mora-dense" else {}
        for x, grad in want.items():
            torch.testing.assert_close(found[f"{path}.{layers[path].prefix}{x}.default.weight"], grad)


@pytest.mark.parametrize("name", MIXTURES)
def test_parameters_alone_are_adapted_as_peft_s_lora_adapts_them(name):
    want = get_peft_model(mixture(name), LORA(target_parameters=BOTH))
    model = get_peft_model(mixture(name), METHODS["lori"](target_parameters=BOTH))
    assert model.targeted_module_names == want.targeted_module_names
    assert model.targeted_parameter_names == want.targeted_parameter_names
    assert not model.targeted_module_names and len(model.targeted_parameter_names) == 4


def test_a_forward_dequantises_each_parameter_once(inputs, monkeypatch):
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization

    model, calls, own = on_experts("lori", mixture(four_bit=True)), [], Bnb4bitParametrization.forward
    monkeypatch.setattr(Bnb4bitParametrization, "forward", lambda self, x: calls.append(1) or own(self, x))
    model(inputs)
    assert len(calls) == 4  # two of each of two layers


def test_experts_that_are_offloaded_are_refused(inputs, tmp_path):
    model = on_experts("lori").eval()
    places = {f"base_model.model.{name}": "cpu" for name in ("model.embed_tokens", "model.norm", "lm_head")}
    places |= {"base_model.model.model.rotary_emb": "cpu", "base_model.model.model.layers": "disk"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    with pytest.raises(ValueError, match="model.layers.0.mlp.experts.down_proj is offloaded"):
        model(inputs)


def test_a_second_adapter_joins_the_first_and_both_add_up(inputs):
    model = on_experts("lori", seed=1)
    model.add_adapter("other", METHODS["lori"](target_modules=["q_proj"], target_parameters=BOTH, init_weights=False))
    layers = [m for m in model.modules() if isinstance(m, ExpertWeights)]
    assert len(layers) == 4 and all(set(layer.r) == {"default", "other"} for layer in layers)
    model.base_model.set_adapter(["default", "other"])
    together = model(inputs).logits
    model.merge_adapter()
    torch.testing.assert_close(model(inputs).logits, together, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter("other")
    assert not torch.allclose(model(inputs).logits, together, atol=1e-3)


@pytest.mark.parametrize("method", ["mora-dense", "lori"])
def test_experts_in_4_bits_are_adapted_and_merged_as_they_are_there(method, inputs, tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    base = mixture(four_bit=True)
    chains = [p for layer in base.model.layers for p in layer.mlp.experts.parametrizations.values()]
    codes = [chain.original.clone() for chain in chains]
    plain = mixture()
    with torch.no_grad():
        for layer, other in zip(base.model.layers, plain.model.layers, strict=True):
            for name in ("gate_up_proj", "down_proj"):
                getattr(other.mlp.experts, name).copy_(getattr(layer.mlp.experts, name))
    model = on_experts(method, base)
    model.save_pretrained(tmp_path)
    want = PeftModel.from_pretrained(plain, tmp_path)(inputs).logits  # one file for 4 bits and 32
    torch.testing.assert_close(model(inputs).logits, want, rtol=1e-4, atol=1e-5)
    again = PeftModel.from_pretrained(mixture(four_bit=True), tmp_path)
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    assert all(grad.any() for grad in gradients(model, inputs).values())

    before = model(inputs).logits
    wants = {m: expected(model, m) for m in model.modules() if isinstance(m, ExpertWeights)}
    with pytest.warns(UserWarning, match="rounds the merged weight again.*reload the base in 16 bits"):
        model.merge_adapter()
    for layer, wanted in wants.items():
        rounded = dequantize_4bit(*quantize_4bit(wanted.float(), compress_statistics=True, quant_type="nf4"))
        assert (layer.base_parameter() - rounded).norm() < 1e-2 * rounded.norm()
    model.unmerge_adapter()
    assert torch.equal(model(inputs).logits, before)
    assert all(torch.equal(old, chain.original) for old, chain in zip(codes, chains, strict=True))


def test_a_trainer_trains_experts_over_a_4_bit_model(llama_folder, tmp_path):
    model = mixture(four_bit=True)
    config = MoraConfig(r=2, routing="dense", target_modules=["q_proj"], target_parameters=BOTH)
    trainer = sft(model, llama_folder, tmp_path, config, max_steps=2, gradient_checkpointing=True)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
        elif "mora_B" in name:
            assert parameter.any(), name
    modules = {type(m).__name__: m for m in model.modules()}
    assert all(len(chain) == 1 for chain in modules["ParametrizedMixtralExperts"].parametrizations.values())


def test_sparsify_ranks_the_entries_of_all_experts_together():
    model = on_experts("lori", target_modules=[])
    summary = sparsify(model, 0.75)
    kept = sum(p.numel() for name, p in model.named_parameters() if "lori_B" in name)
    assert summary.kept == round(0.25 * summary.total) == kept


@pytest.mark.parametrize("method", STATIC)
def test_a_second_adapter_on_other_parameters_is_refused_and_leaves_nothing(method, inputs, tmp_path):
    """Its file would name a parameter by its place among those of the first."""
    one = on_experts(method, target_parameters=BOTH[:1])
    one.save_pretrained(tmp_path)
    model = on_experts(method)
    before = model(inputs).logits
    config = METHODS[method](target_modules=["q_proj"], target_parameters=BOTH[:1])
    for add in (lambda: model.add_adapter("b", config), lambda: model.load_adapter(tmp_path, "b")):
        with pytest.raises(ValueError, match=r"target_parameters=\['experts.gate_up_proj'\] and adapter 'default' "):
            add()
        assert set(model.peft_config) == {"default"} and torch.equal(model(inputs).logits, before)
    model.add_adapter("b", METHODS[method](target_modules=["q_proj"]))  # none at all goes beside any


@pytest.mark.parametrize("combination_type", [None, "linear", "cat"])
def test_a_weighted_sum_of_adapters_on_experts_is_refused_and_leaves_nothing(combination_type):
    model = on_experts("lori")
    model.add_adapter("b", METHODS["lori"](target_modules=["q_proj"]))
    for adapters in (["default", "b"], ["b", "default"]):
        with pytest.raises(ValueError, match=r"\['default'\] have `target_parameters`.*set_adapter\(\[...\]\)"):
            model.add_weighted_adapter(adapters, [1.0, 0.5], "both", combination_type)
    assert set(model.peft_config) == {"default", "b"}
    assert not any("both" in layer.r for layer in model.modules() if isinstance(layer, AdapterLinear))


def test_what_would_be_wrong_is_refused_with_what_to_do(inputs, tmp_path):
    for method, match in {
        "mora": "routing='task' cannot adapt.*Give routing='dense'",
        "flylora": r"not single parameters: its update depends on the layer's input, which is seen inside.*"
        r"use a method whose update is one weight \(MoraConfig\(routing='dense'\) or LoriConfig\)",
        "furina": "its losses look at the layer's input, which is seen inside.*routing='dense'",
        "mtllora": "its update depends on the task of each row of the layer's input, which is.*routing='dense'",
    }.items():
        with pytest.raises(ValueError, match=match):
            METHODS[method](target_parameters=BOTH)
    for fields, match in (
        ({"dropout": 0.1}, "give dropout=0"),
        ({"layers_to_transform": [0], "target_modules": ["q_proj"]}, "give their full names"),
        ({"target_parameters": "experts"}, "`target_parameters` must be a list of names"),
    ):
        with pytest.raises(ValueError, match=match):
            METHODS["lori"](**{"target_parameters": BOTH, **fields})
    with pytest.raises(
        ValueError, match="q_proj.weight' is the weight of a linear module.*in `target_modules` instead"
    ):
        on_experts("lori", target_modules=[], target_parameters=["q_proj.weight"])
    model = on_experts("lori")
    with pytest.raises(ValueError, match="Rows of a batch cannot have adapters of their own.*model.set_adapter"):
        model(inputs, adapter_names=["default"] * len(inputs))
    with pytest.raises(ValueError, match="seen inside of their module alone.*exact_lora and save_lora need neither"):
        effect_error(model, {}, [])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a stack of updates, one for each expert.*merge_and_unload"):
        read_lora(tmp_path)


def test_a_tied_parameter_is_not_merged(inputs):
    model = adapted(
        METHODS["lori"], tiny_llama(tied=True), target_modules=[], target_parameters=["embed_tokens.weight"]
    )
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=r"into 'weight': another module has the very same parameter \(tied"):
        model.merge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_matrix_has_a_delta_of_its_own_shape_and_rows_may_be_named_while_it_is_off(inputs):
    model = adapted(METHODS["lori"], mixture(), target_modules=[], target_parameters=["gate.weight"]).eval()
    layer = next(m for m in model.modules() if isinstance(m, ExpertWeights))
    assert layer.get_delta_weight("default").shape == layer.base_parameter().shape and layer.trained("default") is None
    base = mixture().eval()
    with model.disable_adapter():
        assert torch.equal(model(inputs, adapter_names=["default"] * len(inputs)).logits, base(inputs).logits)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(inputs).logits, base(inputs).logits)


def test_what_a_module_has_in_front_of_its_parameter_stays(inputs):
    model = on_experts("lori", target_parameters=BOTH[:1]).eval()
    layer = next(m for m in model.modules() if isinstance(m, ExpertWeights))
    module, name = layer.get_base_layer(), layer.parameter_name
    own = vars(module)[name] = getattr(module, name).detach().clone()
    model(inputs)
    assert vars(module)[name] is own


def test_conv1d_and_computed_parameters_are_refused_and_wrappers_keep_the_mode(inputs):
    with pytest.raises(ValueError, match="c_attn.weight' is the weight of a linear module"):
        adapted(METHODS["lori"], tiny_gpt2(), target_modules=[], target_parameters=["c_attn.weight"])
    base = mixture().eval()
    inject_adapter_in_model(METHODS["lori"](target_modules=[], target_parameters=BOTH), base)
    wrappers = [m for m in base.modules() if isinstance(m, ExpertWeights)]
    assert wrappers and not any(wrapper.training for wrapper in wrappers)
    model = on_experts("lori", target_modules=[])
    layer = next(m for m in model.modules() if isinstance(m, ExpertWeights))
    parametrize.register_parametrization(layer.get_base_layer(), layer.parameter_name, nn.Identity())
    with pytest.raises(ValueError, match="is computed by Identity, and not by bitsandbytes"):
        model.merge_adapter()
