"""The CPU trap of bitsandbytes: evaluating must not change what training computes."""

import warnings

import pytest
import torch
from helpers import METHODS, STATIC, adapted, gradients, quantized, randomize
from peft import get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_mora import base, use_exact_4bit_kernels
from peft_mora.base import AdapterLinear
from peft_mora.quantization import dequantized, frozen_base
from trl_callbacks.factors import base_weight


bnb_functional = pytest.importorskip("bitsandbytes.functional")
packs = pytest.mark.skipif(
    not bnb_functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16: nothing is packed"
)

TARGETS = ["q_proj", "down_proj"]


def relative_error(got: dict, want: dict) -> float:
    """A gradient that is missing counts as zero."""
    difference = sum((got.get(name, torch.zeros(())) - want[name]).double().square().sum() for name in want)
    return float((difference / sum(g.double().square().sum() for g in want.values())).sqrt())


@pytest.fixture
def want(llama_folder, inputs) -> dict[str, torch.Tensor]:
    """Gradients of an adapter on a base that has only trained."""
    return gradients(adapted("mora", quantized(llama_folder), target_modules=TARGETS).train(), inputs)


def test_evaluation_between_steps_changes_no_gradient(llama_folder, inputs, make_config):
    model = adapted(make_config, quantized(llama_folder), target_modules=TARGETS)
    want = gradients(model.train(), inputs)
    with torch.no_grad():
        evaluated = model.eval()(inputs).logits
    assert all(torch.equal(g, want[name]) for name, g in gradients(model.train(), inputs).items())
    assert torch.equal(evaluated, model.eval()(inputs).logits)


@packs
def test_without_us_evaluation_would_destroy_gradients(llama_folder, inputs, want):
    """The test above could not fail on a bitsandbytes without the trap; this one says that the trap is there."""
    model = adapted("mora", quantized(llama_folder), target_modules=TARGETS)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model.eval()(inputs)
    assert relative_error(gradients(model.train(), inputs), want) > 0.1


@packs
def test_a_base_evaluated_before_the_adapter_is_unpacked_with_a_warning(llama_folder, inputs, want):
    model = quantized(llama_folder).eval()
    with torch.no_grad():
        model(inputs)
    with pytest.warns(UserWarning, match="repacked.*use_exact_4bit_kernels"):
        model = adapted("mora", model, target_modules=TARGETS)
    assert relative_error(gradients(model.train(), inputs), want) < 0.03


def test_a_base_prepared_by_hand_stays_exact_and_one_without_4_bit_layers_is_left_alone(llama_folder, inputs, want):
    assert use_exact_4bit_kernels(nn.Linear(2, 2)) == 0
    model = quantized(llama_folder).eval()
    assert use_exact_4bit_kernels(model) == 14
    with torch.no_grad():
        model(inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*repacked.*")
        model = adapted("mora", model, target_modules=TARGETS)
    assert relative_error(gradients(model.train(), inputs), want) == 0


class Packed(nn.Module):
    """A quantised linear layer without a `weight`, as GPTQ's (qweight) and HQQ's (W_q)."""

    def __init__(self, name: str, linear: nn.Linear) -> None:
        super().__init__()
        self.name, self.in_features, self.out_features = name, linear.in_features, linear.out_features
        setattr(self, name, nn.Parameter((linear.weight.detach() * 64).round().to(torch.int8), requires_grad=False))

    def dequantize(self) -> torch.Tensor:
        return getattr(self, self.name).float() / 64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dequantize().to(x.dtype).T


class Requantizes(ForwardOnlyQuantizationBackend):
    """Puts another layer in the place of the old one, as HQQ does."""

    supports_merge = True

    def get_base_weight(self, base_layer):
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer, weight_data):
        linear = nn.Linear(weight_data.shape[1], weight_data.shape[0])
        linear.weight.data = weight_data
        peft_layer.base_layer = Packed(peft_layer.get_base_layer().name, linear)


def packed_model(method: str, name: str, monkeypatch) -> nn.Module:
    """A plain layer in front of the packed one."""
    backend = {"qweight": ForwardOnlyQuantizationBackend("gptq"), "W_q": Requantizes("hqq")}[name]
    monkeypatch.setattr(
        base, "resolve_quantization_backend", lambda layer, **_: backend if isinstance(layer, Packed) else None
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 12, bias=False), Packed(name, nn.Linear(12, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT does not know the class
        model = get_peft_model(net, METHODS[method](target_modules=["0", "1"]))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("name", ["qweight", "W_q"])
def test_bases_without_a_weight_attribute_train_merge_and_unload(method, name, monkeypatch):
    model = packed_model(method, name, monkeypatch)
    layers = model.base_model.model
    assert layers[1]._weight_placement()[0] == torch.device("cpu")  # where new weights of the adapter go
    x = torch.randn(5, 10)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    want = model.eval()(x)  # after the backward, which moves a load-balance offset
    first = layers[0].weight.clone()
    if method not in STATIC or name == "qweight":
        with pytest.raises(ValueError, match="Cannot merge (a|into a base quantised with gptq)"):
            model.merge_adapter()
        assert torch.equal(layers[0].weight, first)  # refused before the plain layer was touched
    else:
        with pytest.warns(UserWarning, match="quantised with hqq rounds"):
            model.merge_adapter()
        assert (model(x) - want).abs().max() < 0.3 < want.abs().max()
        model.unmerge_adapter()
    torch.testing.assert_close(model(x), want)
    plain = model.unload()
    assert type(plain[1]) is Packed
    torch.testing.assert_close(plain(x), plain[1](x @ first.T))


def test_8_bit_layers_that_keep_their_weight_train_and_are_not_read(llama_folder, inputs):
    def base():
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
        return AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config, device_map="cpu")

    model = adapted("lori", base(), target_modules=TARGETS)
    want = model(inputs).logits
    layer = next(module for module in model.modules() if isinstance(module, AdapterLinear))
    refused = (model.merge_adapter, lambda: dequantized(base(), torch.float32), lambda: base_weight(layer))
    for attempt in refused:
        with pytest.raises(ValueError, match=r"8-bit layer keeps its weight in \w+ .*llm_int8_has_fp16_weight"):
            attempt()
    assert torch.equal(model(inputs).logits, want)
    assert gradients(model.train(), inputs)


def test_a_base_is_read_only_where_it_computes_as_its_weight_says():
    x = torch.randn(2, 3)
    layer = nn.Linear(3, 4).requires_grad_(False)
    assert frozen_base(layer, x) is not None
    assert frozen_base(layer, x.double()) is None  # of another dtype
    layer.bias.requires_grad_(True)
    assert frozen_base(layer, x) is None  # the bias trains
    layer.bias.requires_grad_(False)
    layer.weight.requires_grad_(True)
    assert frozen_base(layer, x) is None

    class Own(nn.Parameter):
        pass

    layer.weight = Own(layer.weight.detach(), requires_grad=False)
    assert frozen_base(layer, x) is None  # of a class that may compute otherwise
