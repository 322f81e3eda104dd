"""The CPU trap of bitsandbytes: evaluating must not change what training computes."""

import warnings

import pytest
import torch
from conftest import METHODS, gradients, quantized, randomize
from peft import get_peft_model

from peft_mora import use_exact_4bit_kernels


bnb_functional = pytest.importorskip("bitsandbytes.functional")
packs = pytest.mark.skipif(
    not bnb_functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16: nothing is packed"
)


def relative_error(got: dict, want: dict) -> float:
    """A gradient that is missing counts as zero."""
    difference = sum((got.get(name, torch.zeros(())) - want[name]).double().square().sum() for name in want)
    return float((difference / sum(g.double().square().sum() for g in want.values())).sqrt())


def adapt(model, method="mora"):
    torch.manual_seed(0)
    model = get_peft_model(model, METHODS[method](target_modules=["q_proj", "down_proj"]))
    randomize(model)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_between_steps_changes_no_gradient(llama_folder, inputs, method):
    model = adapt(quantized(llama_folder), method)
    want = gradients(model.train(), inputs)
    with torch.no_grad():
        evaluated = model.eval()(inputs).logits
    assert all(torch.equal(g, want[name]) for name, g in gradients(model.train(), inputs).items())
    assert torch.equal(evaluated, model.eval()(inputs).logits)


@packs
def test_without_us_evaluation_would_destroy_gradients(llama_folder, inputs):
    """The test above could not fail on a bitsandbytes without the trap; this one says that the trap is there."""
    model = adapt(quantized(llama_folder))
    want = gradients(model.train(), inputs)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model.eval()(inputs)
    assert relative_error(gradients(model.train(), inputs), want) > 0.1


@packs
def test_a_base_evaluated_before_the_adapter_is_unpacked_with_a_warning(llama_folder, inputs):
    want = gradients(adapt(quantized(llama_folder)).train(), inputs)
    model = quantized(llama_folder).eval()
    with torch.no_grad():
        model(inputs)
    with pytest.warns(UserWarning, match="repacked.*use_exact_4bit_kernels"):
        model = adapt(model)
    assert relative_error(gradients(model.train(), inputs), want) < 0.03


def test_a_base_prepared_by_hand_stays_exact(llama_folder, inputs):
    want = gradients(adapt(quantized(llama_folder)).train(), inputs)
    model = quantized(llama_folder).eval()
    assert use_exact_4bit_kernels(model) == 14
    with torch.no_grad():
        model(inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*repacked.*")
        model = adapt(model)
    assert relative_error(gradients(model.train(), inputs), want) == 0


def test_a_model_without_4bit_layers_is_left_alone():
    assert use_exact_4bit_kernels(torch.nn.Linear(2, 2)) == 0
