"""The fast path against its plain twin, what it keeps for the backward, and when it writes into the base's output."""

import functools
from contextlib import nullcontext

import pytest
import torch
import torch.utils.checkpoint
from helpers import METHODS, adapted, gradients, quantized, randomize, tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from peft_mora import FlyLoraConfig, FurinaConfig, LoriConfig, MoraConfig, SMoraConfig, lean, record_usage, start_task
from peft_mora.base import AdapterLinear
from peft_mora.flylora import Columns, SelectionGate
from peft_mora.furina import Losses, LossGate
from peft_mora.inputs import removed_after
from peft_mora.lean import NO_GATE, Base, Gate, Parts, Weight, add_update, plain_add_update
from peft_mora.mora import SoftmaxGate
from peft_mora.mtl_lora import TaskGate
from peft_mora.packed import Packed
from peft_mora.smora import RouterGate


def pairs(*blocks, gate=NO_GATE):
    """Parts of A, B, A, B, ..: weights, or tensors that are taken as they are."""
    weights = [w if isinstance(w, Weight) else Weight(w) for w in blocks]
    return Parts(weights[::2], weights[1::2], gate)


def fixed(t):
    return t.requires_grad_(False)


def bank(new, r):
    return fixed(new(r, 13)), fixed(new(11, r))


def softmax(*top_k, threshold=0.0, bank=None):
    return SoftmaxGate(list(top_k), 0.3, threshold, bank, None)


def packed_B(new):
    """With entries frozen by an earlier task."""
    places = torch.randperm(55, generator=torch.Generator().manual_seed(1))
    form = Packed((11, 5), places[:9], places[9:14], torch.linspace(-1, 1, 5))
    return pairs(fixed(new(5, 13)), Weight(new(9), form))


def sparse_A(new):
    index = torch.tensor([[0, 4, 12], [1, 2, 3], [5, 6, 11], [0, 7, 8]], dtype=torch.int32)
    A = Weight(fixed(new(4, 3)), Columns(index, 13))
    return pairs(A, new(11, 4), gate=SelectionGate("magnitude", 2, torch.zeros(4), None, None))


def router(new, r, gate):
    """Two downs, one up."""
    return Parts([Weight(new(r, 13)), Weight(new(r // gate.partition, 13))], [Weight(new(11, r))], gate)


def experts_with_losses(new):
    """Of three blocks, the first of them shared; the gate leaves h alone and adds to its gradient."""
    half = new(2, 3, 3).detach()
    gate = LossGate((half @ half.mT).requires_grad_(), Losses(1, 3.0, 5.0), 0.5, {})
    return Parts([Weight(new(9, 13))], [Weight(new(11, 9))], gate)


class Mixture(Gate):
    """u_j = softmax(w)_j · (x Aᵀ): one down, several ups, and weights of the gate's own that train."""

    def __init__(self, w):
        self.tensors = [w]

    def plain(self, hs):
        return [hs[0] * share for share in self.tensors[0].softmax(0)]

    def forward(self, hs, tensors, shape, wanted):
        return [hs[0] * share for share in tensors[0].softmax(0).to(hs[0].dtype)], [hs[0]]

    def backward(self, saved, tensors, grads, wanted):
        (h,), p = saved, tensors[0].softmax(0)
        us = [h * share for share in p.to(h.dtype)]
        if grads[0] is None:
            return us, [None], [None]
        dh = sum(du * share for du, share in zip(grads, p.to(h.dtype), strict=True))
        dp = torch.stack([(du * h).sum() for du in grads]).to(p.dtype)
        return us, [dh], [p * (dp - (p * dp).sum()) if wanted.gate[0] else None]


# Each makes Parts of tensors that `new(*shape)` gives.
CASES = {
    "dense": lambda new: pairs(new(5, 13), new(11, 5)),
    "dense_frozen_A": lambda new: pairs(fixed(new(5, 13)), new(11, 5)),
    "dense_bank": lambda new: pairs(*bank(new, 4), new(5, 13), new(11, 5)),
    "softmax": lambda new: pairs(new(5, 13), new(11, 5), gate=softmax(5)),
    "softmax_top_k": lambda new: pairs(new(5, 13), new(11, 5), gate=softmax(2)),
    "softmax_threshold": lambda new: pairs(new(5, 13), new(11, 5), gate=softmax(4, threshold=0.2)),
    # two frozen blocks, one of them pruned to nothing
    "softmax_by_task": lambda new: pairs(*bank(new, 3), *bank(new, 0), new(5, 13), new(11, 5), gate=softmax(2, 2, 3)),
    # one softmax over frozen and trainable experts: the gradient couples them
    "softmax_bank": lambda new: pairs(*bank(new, 3), new(5, 13), new(11, 5), gate=softmax(4, bank=[3, 5])),
    "selection": lambda new: pairs(
        fixed(new(7, 13)), new(11, 7), gate=SelectionGate("magnitude", 2, torch.linspace(-0.3, 0.3, 7), None, None)
    ),
    # 6 of 7: values and indices would be more than all of h
    "selection_of_most": lambda new: pairs(
        fixed(new(7, 13)), new(11, 7), gate=SelectionGate("signed", 6, torch.zeros(7), None, None)
    ),
    "sparse_A": sparse_A,
    "packed_B": packed_B,
    "tasks": lambda new: pairs(new(5, 13), new(11, 10), gate=TaskGate(new(15, 5), new(3, 2), 0.3, 1, None)),
    "router": lambda new: router(new, 5, RouterGate(2, 1, 5.0, torch.linspace(-0.2, 0.2, 5), None, None)),
    "router_by_pairs": lambda new: router(new, 6, RouterGate(2, 2, 6.0, torch.zeros(3), None, None)),
    "experts_with_losses": experts_with_losses,
    "several_ups": lambda new: Parts([Weight(new(5, 13))], [Weight(new(11, 5)) for _ in "abc"], Mixture(new(3))),
    # of which one is frozen: the mixing weights need the ups' gradients all the same
    "several_ups_on_a_frozen_A": lambda new: Parts(
        [Weight(fixed(new(5, 13)))], [Weight(new(11, 5)), Weight(fixed(new(11, 5)))], Mixture(new(2))
    ),
}
SHAPES = [(3, 7, 13), (5, 13), (13,), (2, 0, 13)]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


assert_close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


class Problem:
    """y0 = x Wᵀ and an update on it, in one dtype, from one seed: the same numbers for each path."""

    def __init__(self, case, shape=(3, 7, 13), dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)

        def new(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        self.W = new(11, 13).requires_grad_(False)
        self.parts = case(new)
        self.x, self.g = new(*shape), new(*shape[:-1], 11).requires_grad_(False)
        self.own = [*(w.values for w in (*self.parts.downs, *self.parts.ups)), *self.parts.gate.tensors]
        self.weights = [t for t in self.own if t.requires_grad]

    def run(self, add, *args):
        y = add(self.x @ self.W.T, self.x, *self.parts, 1.7, *args)
        return [y, *torch.autograd.grad(y, [self.x, *self.weights], self.g)]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_the_plain_twin_s(case, shape, in_place):
    problem = Problem(case, shape)
    want = problem.run(plain_add_update)
    assert_close(problem.run(add_update, 0.0, in_place), want)
    with torch.no_grad():
        assert_close([add_update(problem.x @ problem.W.T, problem.x, *problem.parts, 1.7, 0.0, in_place)], want[:1])


@pytest.mark.parametrize(("dropout", "transposed"), [(0.0, False), (0.4, False), (0.4, True)])
def test_the_gradient_passes_gradcheck_also_with_the_forward_s_dropout_mask(case, dropout, transposed):
    """Also of rows that are columns in memory, as a convolution over time leaves them."""
    problem = Problem(case, (2, 13))
    if isinstance(problem.parts.gate, LossGate):
        pytest.skip("its gradient is not of the value alone; tests/test_furina.py has the whole")

    def f(x, *weights):
        torch.default_generator.manual_seed(5)  # torch's own also takes down a traceback for each kind of device
        x = x.t().contiguous().t() if transposed else x
        return add_update(x @ problem.W.T, x, *problem.parts, 1.7, dropout, True)

    assert torch.autograd.gradcheck(f, (problem.x, *problem.weights))


def test_a_base_outside_of_autograd_gives_the_same_gradients(case):
    problem = Problem(case)
    want = problem.run(plain_add_update)
    y0 = (problem.x @ problem.W.T).detach()
    y = add_update(y0, problem.x, *problem.parts, 1.7, 0.0, True, Base(problem.W))
    assert y.data_ptr() == y0.data_ptr()
    assert_close([y, *torch.autograd.grad(y, [problem.x, *problem.weights], problem.g)], want)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
def test_rounding_stays_within_the_dtype_s(case, dtype, tolerance):
    """Against float64 on the same rounded numbers, by the largest entry. bfloat16 has steps of 0.004 to 0.008; a
    near-tie may wake another expert for a token there, so nine tokens of ten are compared."""
    low = Problem(case, (10, 19, 13), dtype)
    exact = Problem(case, (10, 19, 13), dtype)
    exact.W, exact.g = exact.W.double(), exact.g.double()
    exact.x = exact.x.detach().double().requires_grad_()
    for t in exact.own:
        t.data = t.data.double()
    results = zip(low.run(add_update, 0.0, True), exact.run(plain_add_update), strict=True)
    for i, (got, want) in enumerate(results):
        error = (got.double() - want).abs() / want.abs().max()
        if i < 2:  # y and dx, token by token
            error = error.flatten(0, -2).amax(-1).sort().values[: int(0.9 * 190)]
        assert got.dtype == dtype and error.max() < tolerance * (1 if i < 2 else 3), (i, error.max())


def test_second_derivatives_are_refused_with_what_to_do(case):
    problem = Problem(case)
    y = add_update(problem.x @ problem.W.T, problem.x, *problem.parts, 1.7)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*lean = False"):
        torch.autograd.grad(y.sum(), problem.x, create_graph=True)


def test_weights_are_cast_down_to_the_input(case):
    """bfloat16 x, float32 weights: a float32 product anywhere would show in the dtype of what is kept."""
    problem = Problem(case, dtype=torch.float32)
    kept = []
    x = problem.x.detach().bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = add_update((x @ problem.W.bfloat16().T), x, *problem.parts, 1.7, 0.0, True)
    own = {t.untyped_storage().data_ptr() for t in problem.own}
    floats = [t for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in own and t.dim() == 2]
    assert y.dtype == torch.bfloat16 and all(t.dtype == torch.bfloat16 for t in floats)
    for parameter, grad in zip(problem.weights, torch.autograd.grad(y.sum(), problem.weights), strict=True):
        assert grad.dtype == parameter.dtype == torch.float32 and grad.isfinite().all()


# An input that is a product


def saved(y) -> set[int]:
    """Where in memory what y's backward keeps begins."""
    return {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}


def of_product(problem, add, after=lambda x: x, *args):
    """y over x = silu(gate) · up, as in front of a down_proj, and every gradient."""
    gate, up = (problem.x.detach() + shift for shift in (0.5, -0.25))
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    x = after(nn.functional.silu(gate) * up)
    y = add(x @ problem.W.T, x, *problem.parts, 1.7, *args)
    kept = add is add_update and x.data_ptr() in saved(y)
    return [y, *torch.autograd.grad(y, [*leaves, *problem.weights], problem.g)], kept


def doubled_behind_autograd_s_back(x):
    with torch.no_grad():
        return x.mul_(2)


@pytest.mark.parametrize("written_into", [False, True])
def test_a_product_is_made_again_from_factors_that_autograd_keeps_anyhow_or_kept_if_written_into(case, written_into):
    problem, after = Problem(case), doubled_behind_autograd_s_back if written_into else lambda x: x
    got, keeps_x = of_product(problem, add_update, after)
    assert keeps_x == (written_into and any(A.values.requires_grad for A in problem.parts.downs))
    assert_close(got, of_product(problem, plain_add_update, after)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_product_made_again_is_the_same_bit_for_bit(dropout, monkeypatch):
    problem = Problem(CASES["softmax_bank"], dtype=torch.bfloat16)

    def run():
        torch.manual_seed(2)
        return of_product(problem, add_update, lambda x: x, dropout)

    got, keeps_x = run()
    monkeypatch.setattr(lean, "_saved_tensors_hooks", lambda _: True)
    want, kept_x = run()
    assert kept_x and not keeps_x and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_product_changed_through_data_needs_the_plain_path(monkeypatch):
    """No version counter tells of it: docs/performance.md says so, and what to do."""
    layer, factors = one_layer(METHODS["mora-dense"], nn.Linear(16, 12)), torch.randn(2, 5, 16).requires_grad_()

    def dA() -> torch.Tensor:
        x = factors[0] * factors[1]
        x.data.mul_(2)
        return torch.autograd.grad(layer(x).sum(), layer.mora_A["default"].weight)[0]

    got = dA()
    monkeypatch.setattr(AdapterLinear, "lean", False)
    torch.testing.assert_close(dA(), 2 * got)


def test_a_factor_that_was_written_into_is_an_error_as_ever():
    problem = Problem(CASES["dense"])
    up = problem.x * 1.5
    x = torch.sigmoid(problem.x) * up
    y = add_update(x @ problem.W.T, x, *problem.parts, 1.7)
    up.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_product_whose_factors_are_freed_is_kept_itself():
    problem = Problem(CASES["dense"])
    x = torch.sigmoid(problem.x) * problem.x
    x.sum().backward()
    y = add_update(x.detach() @ problem.W.T, x, *problem.parts, 1.7)
    assert x.data_ptr() in saved(y)


@pytest.mark.parametrize("product_inside", [False, True])
@pytest.mark.parametrize("layer_inside", [False, True])
def test_hooks_on_saved_tensors_are_not_set_off(product_inside, layer_inside):
    """The layer, the product in front of it or both under hooks: x is kept as ever, and nothing is unpacked early."""
    problem, unpacked = Problem(CASES["dense"]), []
    hooks = (lambda t: t.clone(), lambda t: unpacked.append(1) or t)
    x, W = problem.x, problem.W
    with torch.autograd.graph.saved_tensors_hooks(*hooks) if product_inside else nullcontext():
        x = torch.sigmoid(x) * x
    with torch.autograd.graph.saved_tensors_hooks(*hooks) if layer_inside else nullcontext():
        y = add_update(x.detach() @ W.T, x, *problem.parts, 1.7)
    assert not unpacked
    tensors = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == x.shape]
    kept = any(torch.equal(t, x) for t in tensors)
    assert kept == (product_inside or layer_inside)
    y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_product_out_of_a_checkpoint_gives_the_same_gradients(use_reentrant):
    """Activation functions are often all that is checkpointed."""
    problem = Problem(CASES["dense"])

    def product(x):
        return torch.sigmoid(x) * x

    def grads(x):
        y = add_update(x @ problem.W.T, x, *problem.parts, 1.7)
        return torch.autograd.grad(y, [problem.x, *problem.weights], problem.g)

    want = grads(product(problem.x))
    if use_reentrant:  # knows backward() only
        y = torch.utils.checkpoint.checkpoint(product, problem.x, use_reentrant=True)
        add_update(y @ problem.W.T, y, *problem.parts, 1.7).backward(problem.g)
        got = [problem.x.grad, *(w.grad for w in problem.weights)]
    else:
        got = grads(torch.utils.checkpoint.checkpoint(product, problem.x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Dropout


def test_dropout_drops_its_share_and_rescales_the_rest():
    x = torch.ones(400, 50)
    h = add_update(torch.zeros(400, 50), x, *pairs(torch.eye(50), torch.eye(50)), 1.0, 0.3)
    torch.testing.assert_close(h.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert (h == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_dropout_again(make_config, inputs, use_reentrant):
    model = adapted(make_config, dropout=0.4).train()
    model.enable_input_require_grads()

    def step():
        torch.manual_seed(3)
        return gradients(model, inputs)

    want = step()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    got = step()
    assert all(torch.equal(got[name], want[name]) for name in want)


# The layers


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_a_model_s_gradients_equal_those_of_the_plain_path(make_config, inputs, base, monkeypatch):
    model = adapted(make_config, base()).double()

    def run():
        torch.manual_seed(0)  # GPT-2 has dropout of its own
        return model.eval()(inputs).logits, gradients(model.train(), inputs)

    got = run()
    monkeypatch.setattr(AdapterLinear, "lean", False)
    want = run()
    torch.testing.assert_close(got[0], want[0])
    assert want[1]
    torch.testing.assert_close(got[1], want[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_on_a_quantised_base_has_the_plain_path_s_gradients(make_config, llama_folder, bits, monkeypatch):
    """In bfloat16, by the norm. Where experts are chosen, a near-tie may fall the other way."""
    model = adapted(make_config, quantized(llama_folder, bits)).train()
    for layer in [m for m in model.modules() if isinstance(m, AdapterLinear)][:7]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, 17, layer.in_features, generator=generator).bfloat16().requires_grad_()
        g = torch.randn(3, 17, layer.out_features, generator=generator).bfloat16()
        weights = [p for p in layer.parameters() if p.requires_grad]
        results, layer.training = {}, False  # a load-balance offset would move in between
        for path in (True, False):
            monkeypatch.setattr(AdapterLinear, "lean", path)
            y = layer(x)
            results[path] = [y, *torch.autograd.grad(y, [x, *weights], g)]
            assert ("AddUpdate" in type(y.grad_fn).__name__) == path
        for got, want in zip(results[True], results[False], strict=True):
            assert (got - want).float().norm() < 0.05 * want.float().norm()


def one_layer(config, base: nn.Module) -> AdapterLinear:
    model = get_peft_model(nn.Sequential(base), config(target_modules=["0"]))
    randomize(model)
    return model.base_model.model[0]


def shares_memory(layer: AdapterLinear, x: torch.Tensor) -> bool:
    """Whether the layer's output is its base's output, written into."""
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_mora.base.add_update", lambda y0, *args: outputs.append(y0) or add_update(y0, *args))
        return layer(x).data_ptr() == outputs[0].data_ptr()


def test_the_update_is_added_into_the_base_s_own_output_also_under_a_default_device(make_config):
    layer = one_layer(make_config, nn.Linear(16, 12, bias=False))
    for context in (nullcontext(), torch.device("cpu")):
        with context:
            assert shares_memory(layer, torch.randn(3, 5, 16, requires_grad=True))


def test_nothing_is_written_into_an_output_that_somebody_saw(make_config):
    x = torch.randn(3, 5, 16, requires_grad=True)

    class Saving(nn.Linear):
        def forward(self, x):
            return super().forward(x).exp()  # exp's backward needs its output

    layer = one_layer(make_config, Saving(16, 12))
    layer(x).sum().backward()  # autograd refuses it if the output has been written into
    assert not shares_memory(layer, x)

    layer = one_layer(make_config, nn.Linear(16, 12, bias=False))  # a hook that changes the input has a gradient
    layer.base_layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layer.lean, layer.training = False, False  # a load-balance offset would move in between
    (want,) = torch.autograd.grad(layer(x).sum(), x)
    layer.lean = True
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], want)


def keeping(function, kept):
    """As a profiler or a cache wraps a function."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        kept.append(function(*args, **kwargs))
        return kept[-1]

    return wrapper


class KeepsLinear(TorchFunctionMode):
    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is nn.functional.linear:
            self.kept.append(result)
        return result


@pytest.mark.parametrize(
    "where", ["hook", "forward", "class forward", "class call", "F.linear", "function mode", "global hook"]
)
def test_an_output_kept_by_a_hook_or_by_what_wraps_the_base_stays_the_base_s(make_config, where, monkeypatch):
    layer = one_layer(make_config, nn.Linear(16, 12, bias=False))
    x, kept, hooks = torch.randn(3, 5, 16, requires_grad=True), [], []
    if where == "hook":
        layer.base_layer.register_forward_hook(lambda module, args, output: kept.append(output))
    if where == "global hook":
        hooks.append(register_module_forward_hook(lambda module, args, output: kept.append(output)))
    place, name = {
        "forward": (layer.base_layer, "forward"),
        "class forward": (nn.Linear, "forward"),
        "class call": (nn.Module, "__call__"),
        "F.linear": (nn.functional, "linear"),
    }.get(where, (None, None))
    if place:
        monkeypatch.setattr(place, name, keeping(getattr(place, name), kept))
    with KeepsLinear(kept) if where == "function mode" else nullcontext(), removed_after(hooks):
        y = (layer.forward if where == "class call" else layer)(x)
    torch.testing.assert_close(kept[0], x @ layer.base_layer.weight.T)
    assert not torch.allclose(y, kept[0])


def test_selective_checkpointing_that_keeps_the_products_gives_the_same_gradients(make_config, inputs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    model = adapted(make_config, base=tiny_llama()).train()
    if hasattr(model.peft_config["default"], "block_sizes"):
        start_task(model, "second")
        randomize(model)
    model.enable_input_require_grads()
    want = gradients(model, inputs)
    model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": functools.partial(create_selective_checkpoint_contexts, list(products))}
    )
    torch.testing.assert_close(gradients(model, inputs), want, rtol=1e-4, atol=1e-5)


def test_a_trained_base_keeps_its_gradient(make_config):
    layer = one_layer(make_config, nn.Linear(16, 12))
    layer.base_layer.requires_grad_(True)
    x = torch.randn(3, 5, 16)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.base_layer.weight.grad, x.sum((0, 1)).expand(12, 16))
    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((12,), 15.0))


class Opaque(torch.Tensor):
    """A frozen weight that is a class of its own, as torchao's are: it goes into F.linear and no other product."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.addmm_, torch.addmm, torch.mm, torch.matmul):
            raise NotImplementedError(function)
        if function is nn.functional.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_weight_of_a_class_of_its_own_is_left_to_the_base(make_config, inputs):
    model = adapted(make_config)
    expected = gradients(model, inputs)
    for layer in (m for m in model.modules() if isinstance(m, AdapterLinear)):
        base = layer.get_base_layer()
        base.weight = nn.Parameter(base.weight.data.as_subclass(Opaque), requires_grad=False)
        assert type(base.weight) is Opaque
    torch.testing.assert_close(gradients(model, inputs), expected)


def test_functorch_takes_the_plain_path(make_config):
    layer, x = one_layer(make_config, nn.Linear(16, 12)).eval(), torch.randn(4, 16)
    want = torch.autograd.functional.jacobian(lambda x: layer(x).sum(0), x)
    torch.testing.assert_close(torch.func.jacrev(lambda x: layer(x).sum(0))(x), want)


def test_forward_mode_differentiation_takes_the_plain_path(make_config):
    layer, x, v = one_layer(make_config, nn.Linear(16, 12)).eval(), torch.randn(4, 16), torch.randn(4, 16)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
    want = torch.autograd.functional.jacobian(lambda x: (layer(x) @ torch.ones(12)).sum(), x)
    assert (got @ torch.ones(12)).sum().item() == pytest.approx((want * v).sum().item(), rel=1e-4)


@pytest.mark.parametrize("frozen", ["the second adapter", "both, over a trained base"])
def test_a_frozen_adapter_leaves_the_gradients_of_what_is_trained_beside_it(make_config, frozen, inputs, monkeypatch):
    """In the first layer nothing of such an adapter's part wants a gradient but the output that it adds to."""

    def gradient():
        model = adapted(make_config, tiny_llama()).train()
        model.add_adapter("two", model.peft_config["default"])
        randomize(model, seed=2)
        model.base_model.set_adapter(["default", "two"])
        model.set_requires_grad("two", False)
        if "both" in frozen:
            model.set_requires_grad("default", False)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("q_proj.base_layer" in name)
        model(input_ids=inputs, labels=inputs).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    got = gradient()
    monkeypatch.setattr(AdapterLinear, "lean", False)
    want = gradient()
    assert got.keys() == want.keys() and got
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, form in METHODS.items() if not form.merges])
def test_usage_and_offsets_do_not_depend_on_the_path(name, inputs, monkeypatch):
    def run():
        model = adapted(METHODS[name], tiny_llama().double()).train()
        with record_usage(model) as meter:
            for _ in range(3):
                model(input_ids=inputs, labels=inputs).loss.backward()
            meter.sync()
        return meter.hits, [b.clone() for n, b in model.named_buffers() if "_offset" in n]

    hits, offsets = run()
    monkeypatch.setattr(AdapterLinear, "lean", False)
    want_hits, want_offsets = run()
    assert hits.sum() > 0 and torch.equal(hits, want_hits)
    assert all(torch.equal(a, b) and b.abs().sum() > 0 for a, b in zip(offsets, want_offsets, strict=True))


# Bytes

TOKENS, WIDTH, R = 512, 1024, 16
WIDTHS = (1024, 256, 256)  # q, k, v with grouped heads
BYTES = {
    "mora": (1.1, lambda: MoraConfig(r=R, target_modules=["q", "k", "v"])),
    "mora-top-4": (1.1, lambda: MoraConfig(r=R, top_k=4, target_modules=["q", "k", "v"])),
    "mora-bank": (1.1, lambda: MoraConfig(r=R, routing="bank", target_modules=["q", "k", "v"])),
    "mora-dense": (1.1, lambda: MoraConfig(r=R, routing="dense", target_modules=["q", "k", "v"])),
    "lori": (0.05, lambda: LoriConfig(r=R, target_modules=["q", "k", "v"])),
    "lori-sparse": (0.05, lambda: LoriConfig(r=R, sparsity=0.9, target_modules=["q", "k", "v"])),
    "flylora": (0.05, lambda: FlyLoraConfig(r=R, top_k=4, target_modules=["q", "k", "v"])),
    "smora": (1.1, lambda: SMoraConfig(r=R, top_k=4, target_modules=["q", "k", "v"])),
    # and B~, an intermediate, in float32
    "furina": (1.2, lambda: FurinaConfig(r=R // 4, experts=3, target_modules=["q", "k", "v"])),
    "flylora-most": (0.05, lambda: FlyLoraConfig(r=R, top_k=12, target_modules=["q", "k", "v"])),
}


def kept(config, dropout: float = 0.0, autocast: bool = False) -> float:
    """What q, k and v on one bfloat16 input keep for the backward, by distinct storage, in units of that input;
    weights and buffers, which are there anyway, do not count."""
    torch.manual_seed(0)
    base = {name: nn.Linear(WIDTH, width, bias=False) for name, width in zip("qkv", WIDTHS, strict=True)}
    model = nn.ModuleDict(base).bfloat16()
    config.dropout = config.lora_dropout = dropout
    model = get_peft_model(model, config).train()
    randomize(model)
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    layers = model.base_model.model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=autocast):
        ys = [layers[name](x) for name in "qkv"]
    sum(y.float().sum() for y in ys).backward()
    assert x.grad is not None and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return sum(size for pointer, size in storages.items() if pointer not in there) / (2 * TOKENS * WIDTH)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", BYTES)
def test_bytes_kept_for_the_backward(name, dropout):
    most, config = BYTES[name]
    assert kept(config(), dropout) <= most
    assert kept(config(), dropout, autocast=True) <= most


def test_a_gated_mlp_s_product_is_not_kept(make_config, inputs):
    """The layer in front of which a Llama multiplies keeps the factors, which the MLP keeps for itself."""
    model = adapted(make_config).train()
    model.enable_input_require_grads()
    found = []

    def look(module, args, y):
        found.append(args[0].data_ptr() in saved(y))

    downs = [m for n, m in model.named_modules() if n.endswith("down_proj") and isinstance(m, AdapterLinear)]
    hooks = [m.register_forward_hook(look) for m in downs]
    want = gradients(model, inputs)
    assert found == [False] * len(downs) != []
    for hook in hooks:
        hook.remove()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(model, inputs)  # under the hooks of checkpointing the input itself is kept
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_bytes_that_peft_s_lora_keeps():
    def lora():
        return LoraConfig(r=R, target_modules=["q", "k", "v"])

    assert kept(lora()) == pytest.approx(6.09, abs=0.02)  # a float32 copy of x for each projection, and h
    assert kept(lora(), autocast=True) == pytest.approx(3.19, abs=0.02)
    assert kept(lora(), dropout=0.1) == pytest.approx(12.09, abs=0.02)  # x after dropout and its mask, float32
    assert kept(lora(), dropout=0.1, autocast=True) == pytest.approx(9.19, abs=0.02)
