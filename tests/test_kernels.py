"""The gate's Triton kernels: on a card, or without one in Triton's interpreter, and compiled for one."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from helpers import METHODS, adapted, gradients

import peft_mora
from peft_mora import expert_usage, record_usage
from peft_mora.mora import MoraLinear
from peft_mora.routing import expert_scores, gated_softmax, gated_softmax_backward


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # what may be lost, of the largest entry


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from peft_mora import kernels

    if DEVICE == "cpu" and not kernels.INTERPRETED:
        pytest.skip("no CUDA device")
    return kernels


def twin(h, index, temperature, threshold):
    """w·h of the experts kept, differentiable."""
    scores = expert_scores(h)
    logits = scores / temperature
    if index is not None:
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index.long(), logits.gather(-1, index.long()))
    return h * torch.where(scores < (threshold or -2), 0.0, torch.softmax(logits, dim=-1))


def assert_near(got, want, tolerance):
    assert got.shape == want.shape and (got.double() - want).abs().max() <= tolerance * want.abs().max()


def compare(h, top_k, temperature, threshold):
    """The kernel and torch's operations, both against float64; whom the kernel keeps, exactly."""
    grad, tolerance = torch.randn_like(h), DTYPES[h.dtype]
    gated, weights, index = gated_softmax(h, top_k, temperature, threshold, fused=True)
    assert (gated.dtype, weights.dtype) == (h.dtype, torch.float32)
    if top_k < h.shape[-1]:
        assert index.dtype == torch.uint8
        assert torch.equal(index.long(), h.argsort(dim=-1, descending=True, stable=True)[..., :top_k])
    else:
        assert index is None
    wide = h.double().requires_grad_()
    want = twin(wide, index, temperature, threshold)
    want.backward(grad.double())
    assert_near(gated, want, tolerance)
    assert_near(weights * h, want, tolerance)
    for fused in (True, False):
        again, dh = gated_softmax_backward(h, index, grad, temperature, threshold, fused=fused)
        assert again.dtype == dh.dtype == h.dtype
        assert_near(again, want, tolerance)
        assert_near(dh, wide.grad, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("R", "dtype"), zip((1, 5, 8, 16, 16, 16, 64, 100, 256), 3 * list(DTYPES), strict=True))
def test_values_and_gradients_are_those_of_float64(kernels, R, dtype):
    """The rows are not a multiple of a program's."""
    torch.manual_seed(R)
    h = torch.randn(19 if R < 64 else 3, R, device=DEVICE).to(dtype)
    settings = [(0.01, 0.0), (0.1, 0.0), (0.1, 0.2), (1.0, 0.0), (1.0, 0.05)]
    for i, top_k in enumerate(sorted({1, 3, min(R - 1, 20) or 1, R, R + 3})):
        compare(h, top_k, *settings[i % len(settings)])
    compare(h.view(1, -1, R).expand(2, -1, -1)[:, ::2], 4, 0.1, 0.0)  # not contiguous, three dimensions


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_level_experts_and_tokens_without_a_direction(kernels, top_k):
    """The first of equals are kept, exactly K; a row of zeros, and one below the smallest norm, stay finite."""
    h = torch.randint(-1, 2, (40, 8), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).float()
    h[:3] = torch.tensor([[0.0], [1.0], [-1.0]], device=DEVICE)
    h[3] *= 3e-13
    for dtype in DTYPES:
        compare(h.to(dtype), top_k, 0.1, 0.0)
        compare(h.to(dtype), top_k, 0.3, 0.1)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_with_a_nan_is_nan_and_the_others_are_not(kernels):
    h = torch.randn(5, 6, device=DEVICE)
    h[1, 2], h[3, 4] = torch.nan, torch.inf
    for top_k in (2, 6):
        gated, _, index = gated_softmax(h, top_k, 0.1, fused=True)
        dh = gated_softmax_backward(h, index, torch.ones_like(h), 0.1, fused=True)[1]
        for found in (gated, dh):
            assert found.isnan().any(1).tolist() == [False, True, False, True, False]
        assert index is None or (index < 6).all()


@pytest.mark.gpu
def test_what_the_kernel_does_not_take_is_computed_without(kernels, monkeypatch):
    empty = torch.empty(0, 4, device=DEVICE)
    assert gated_softmax(empty, 2, 0.1, fused=True)[0].shape == empty.shape
    monkeypatch.setattr(kernels, "_launch", None)
    for h in (torch.randn(3, 8, device=DEVICE).double(), torch.randn(3, 257, device=DEVICE)):
        _, weights, index = gated_softmax(h, 2, 0.1, fused=True)
        assert weights.dtype == h.dtype and index.dtype == torch.int64
        gated_softmax_backward(h, index, h, 0.1, fused=True)
    h = torch.randn(3, 8, device=DEVICE)
    compiled = torch.compile(lambda h: gated_softmax(h, 2, 0.1, fused=True)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(h), gated_softmax(h, 2, 0.1)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["mora", "mora-bank"])
def test_a_model_with_the_fused_gate_is_the_model_without(kernels, form, inputs, monkeypatch):
    """Of two tasks; gradients in training, thresholds and counts in evaluation."""
    plain = adapted(METHODS[form], r=5, tasks=2, target_modules=["k_proj", "down_proj"]).to(DEVICE)
    fused, inputs = copy.deepcopy(plain), inputs.to(DEVICE)
    layers = [module for module in fused.modules() if isinstance(module, MoraLinear)]
    for layer in layers:
        layer.fused_gate = True
    calls, launch = [], kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda kernel, *rest: (calls.append(kernel), launch(kernel, *rest)))
    want, got = gradients(plain.train(), inputs), gradients(fused.train(), inputs)
    assert calls.count(kernels._forward) == len(layers) * (1 if form == "mora-bank" else 2)
    assert calls.count(kernels._backward) >= len(layers)
    assert want.keys() == got.keys() != set()
    for name, grad in got.items():
        assert (grad - want[name]).norm() <= 1e-4 * want[name].norm(), name
    with torch.no_grad(), record_usage(plain.eval()), record_usage(fused.eval()):
        torch.testing.assert_close(fused(inputs).logits, plain(inputs).logits, rtol=1e-4, atol=1e-5)
    usage, counted = expert_usage(fused), expert_usage(plain)
    assert usage.keys() == counted.keys() and all(torch.equal(share, counted[name]) for name, share in usage.items())


@pytest.mark.slow
def test_the_kernels_are_right_in_tritons_interpreter():
    """In a process of its own: Triton has to know before it is imported."""
    pytest.importorskip("triton", minversion="3.7")  # whose interpreter knows numpy 2.4
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and " skipped" not in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def test_they_compile_for_a_card(monkeypatch, tmp_path):
    """The interpreter takes what the compiler does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from peft_mora import kernels

    numbers = {"rows": "i32", "top_k": "i32", "temperature": "fp32", "threshold": "fp32"}
    for R, selects in ((16, True), (100, False), (256, True)):
        constants = {**kernels.tile(R), "SELECTS": selects, "CUTS": selects}
        for kernel in (kernels._forward, kernels._backward):
            pointers = {name: "*bf16" for name in kernel.arg_names if name.endswith("_ptr")}
            types = {**pointers, "index_ptr": "*u8", **numbers, **dict.fromkeys(constants, "constexpr")}
            made = compile(ASTSource(kernel, types, constants), GPUTarget("cuda", 90, 32), {"num_warps": 1})
            assert made.asm["cubin"]


def test_without_triton_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "peft_mora.kernels", raising=False)
    monkeypatch.delattr(peft_mora, "kernels", raising=False)
    with pytest.raises(ImportError, match="`fused_gate` is a Triton kernel, and Triton is not installed"):
        gated_softmax(torch.ones(2, 3), 2, 0.1, fused=True)
    assert gated_softmax(torch.ones(2, 3), 2, 0.1)[0].shape == (2, 3)
