"""What only FLYLORA does: sparse seeded projections, the implicit router, a load-balance offset that moves once."""

import pytest
import torch
from helpers import METHODS, adapted, tiny_llama, tiny_t5
from peft import PeftModel, get_peft_model
from torch import nn

from peft_mora import FlyLoraConfig, FlyLoraLinear, record_usage
from peft_mora.base import AdapterLinear
from peft_mora.routing import balance_step, select_by_magnitude, select_by_sign


def flylora(base=None, **kwargs) -> PeftModel:
    return adapted(FlyLoraConfig, base, **{"r": 6, "top_k": 2, "alpha": 12, **kwargs}).train()


def layers(model) -> list[FlyLoraLinear]:
    return [m for m in model.modules() if isinstance(m, FlyLoraLinear)]


def offsets(model) -> list[torch.Tensor]:
    return [layer.flylora_offset["default"].clone() for layer in layers(model)]


def unbalanced(use_reentrant: bool | None = None) -> PeftModel:
    """A large rate: a recompute that saw a moved offset would select other experts. Checkpointing unless None."""
    model = flylora(balance_rate=0.5, alpha=60)
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


def grads(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(layer: FlyLoraLinear, x: torch.Tensor, selection: str, k: int) -> torch.Tensor:
    """The rule, one token and one expert at a time, in float64."""
    A = torch.zeros(layer.r["default"], layer.in_features, dtype=torch.float64)
    A.scatter_(1, layer.flylora_index["default"].long(), layer.flylora_A["default"].double())
    B, d = layer.flylora_B["default"].weight, layer.flylora_offset["default"]
    rows = []
    for token in x.reshape(-1, layer.in_features):
        h = A @ token
        key = [(abs(h[i]) + d[i] if selection == "magnitude" else h[i] + d[i]).item() for i in range(len(h))]
        chosen = sorted(range(len(h)), key=lambda i: -key[i])[:k]
        rows.append(sum(h[i] * B[:, i] for i in chosen) * layer.scaling["default"])
    return torch.stack(rows).reshape(*x.shape[:-1], layer.out_features)


@pytest.mark.parametrize("selection", ["magnitude", "signed"])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_layer_equals_the_reference_in_values_and_gradients(selection, top_k):
    net = nn.Sequential(nn.Linear(13, 9)).double()
    model = flylora(net, target_modules=["0"], top_k=top_k, density=0.4, selection=selection).eval()
    (layer,) = layers(model)
    layer.flylora_offset["default"] = torch.linspace(-0.3, 0.3, 6)
    x = torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True)
    upstream, weight = torch.randn(2, 5, 9, dtype=torch.float64), layer.flylora_B["default"].weight
    got, want = (
        [y, *torch.autograd.grad(y, [x, weight], upstream)]
        for y in (model(x) - layer.base_layer(x), reference(layer, x, selection, top_k))
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_every_row_of_a_has_the_same_number_of_entries_of_the_right_size():
    model = flylora(r=32, top_k=8)
    for layer in layers(model):
        values, index = layer.flylora_A["default"], layer.flylora_index["default"]
        p = round(8 / 32 * layer.in_features)
        assert values.shape == index.shape == (32, p)
        assert all(len(set(row.tolist())) == p for row in index)
        assert abs(values.std() * 32 - 1) < 0.15
        assert torch.equal((layer.matrix_A("default", torch.float32) != 0).sum(1), (values != 0).sum(1))


def test_magnitude_keeps_more_of_a_gaussian_s_energy_than_sign():
    """methods.md §3: 71 % against 45 % at 8 of 32."""
    h = torch.randn(20000, 32, generator=torch.Generator().manual_seed(0))
    share = {
        select.__name__: (h.gather(-1, select(h, torch.zeros(32), 8)).square().sum() / h.square().sum()).item()
        for select in (select_by_magnitude, select_by_sign)
    }
    assert share["select_by_magnitude"] == pytest.approx(0.71, abs=0.01)
    assert share["select_by_sign"] == pytest.approx(0.45, abs=0.01)


def test_the_offset_moves_towards_balance_and_never_multiplies_the_output():
    offset = balance_step(torch.zeros(4), torch.tensor([10, 0, 5, 5]), rate=0.1)
    torch.testing.assert_close(offset, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    model = flylora(r=4, top_k=4).eval()
    x = torch.randint(4, 24, (2, 6))
    before = model(x).logits
    for layer in layers(model):
        layer.flylora_offset["default"] += torch.randn(4)
    assert torch.equal(model(x).logits, before)  # with K = R it has nothing to decide


def test_the_offset_moves_once_per_training_backward_and_not_otherwise(inputs):
    model = flylora(balance_rate=0.01)
    start = offsets(model)

    def moved() -> bool:
        return any(not torch.equal(a, b) for a, b in zip(offsets(model), start, strict=True))

    model.eval()(input_ids=inputs, labels=inputs).loss.backward()
    assert not moved()
    model.train()
    with torch.no_grad():
        model(inputs)
    with record_usage(model) as meter:
        loss = model(input_ids=inputs, labels=inputs).loss
        meter.sync()
    assert not moved()
    loss.backward()
    assert moved()
    for (name, place), offset in zip(meter.places.items(), offsets(model), strict=True):
        hits = meter.hits[place][:-1]  # of the six experts, then the tokens
        assert torch.equal(offset, balance_step(torch.zeros(6), hits, 0.01)), name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_selects_the_same_in_forward_and_recompute_and_counts_once(use_reentrant, inputs, monkeypatch):
    def run(checkpointing: bool):
        model = unbalanced(use_reentrant if checkpointing else None)
        selections: dict[int, list[torch.Tensor]] = {}

        def spy(h, offset, k):
            index = select_by_magnitude(h, offset, k)
            selections.setdefault(offset.data_ptr(), []).append(index.clone())
            return index

        monkeypatch.setattr("peft_mora.flylora.select_by_magnitude", spy)
        steps = []
        for _ in range(2):
            selections.clear()
            model.zero_grad()
            model(input_ids=inputs, labels=inputs).loss.backward()
            steps.append(grads(model))
            seen = 2 if checkpointing else 1
            assert len(selections) == len(layers(model))
            for indices in selections.values():
                # non-reentrant recomputation stops once it has what backward needs, so the last layer may be skipped
                assert len(indices) in ({seen} if use_reentrant or not checkpointing else {1, 2})
                assert all(torch.equal(index, indices[0]) for index in indices)
        return steps, offsets(model)

    (plain, plain_offsets), (recomputed, recomputed_offsets) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain_offsets, recomputed_offsets, strict=True))
    for want, got in zip(plain, recomputed, strict=True):
        assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_two_forwards_before_one_backward_are_recomputed_with_the_offset_and_padding_they_had(
    padded, use_reentrant, inputs
):
    masks = torch.ones(2, 3, 11, dtype=torch.long)
    if padded:
        masks[0, :, 2:], masks[1, :, 8:] = 0, 0

    def run(use_reentrant: bool | None):
        model = unbalanced(use_reentrant)
        batches = zip((inputs, inputs.flip(0, 1)), masks, strict=True)
        sum(model(input_ids=x, attention_mask=mask, labels=x).loss for x, mask in batches).backward()
        model.state_dict()  # nothing waits when it is saved
        return grads(model), offsets(model)

    (want, want_offsets), (got, got_offsets) = run(None), run(use_reentrant)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(got_offsets, want_offsets, strict=True))
    assert any((offset.abs() > 0.6).any() for offset in got_offsets)  # two steps of 0.5


@pytest.mark.parametrize("between", [True, False], ids=["a forward without gradients between", "two backwards"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_finds_the_padding_of_its_own_forward_in_any_order(use_reentrant, between, inputs):
    masks = torch.ones(2, 3, 11, dtype=torch.long)
    masks[0, :, 2:], masks[1, :, 8:] = 0, 0

    def run(use_reentrant: bool | None):
        model = unbalanced(use_reentrant)
        first, second = ({"input_ids": inputs, "attention_mask": mask, "labels": inputs} for mask in masks)
        losses = [model(**first).loss]
        with torch.set_grad_enabled(not between):
            losses.append(model(**second).loss)
        for loss in losses[: 1 if between else 2]:
            loss.backward()
        model.state_dict()  # nothing waits when it is saved
        return offsets(model)

    assert all(map(torch.equal, run(use_reentrant), run(None)))


def test_weights_that_are_loaded_get_no_step_of_the_forwards_before(inputs):
    model = unbalanced()
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for _ in range(2):
            model(inputs)  # may be computed again: the step of the next backward waits for the optimizer's
    model(input_ids=inputs, labels=inputs).loss.backward()
    model.load_state_dict({name: value for name, value in saved.items() if "offset" not in name}, strict=False)
    assert all(layer.balance["default"].steps for layer in layers(model))
    model.load_state_dict(saved)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("method", ["flylora", "smora"])
def test_one_token_without_a_batch_counts_once(method, lean, monkeypatch):
    monkeypatch.setattr(AdapterLinear, "lean", lean)
    x = torch.linspace(-1, 1, 13)

    def moved(x):
        model = adapted(method, nn.Sequential(nn.Linear(13, 9)), target_modules=["0"], balance_rate=0.1).train()
        model(x).sum().backward()
        (offset,) = (value for name, value in model.named_buffers() if "offset" in name)
        return offset

    assert moved(x).any() and torch.equal(moved(x), moved(x[None]))


@pytest.mark.parametrize(("rate", "trainable"), [(0.0, True), (0.1, False)])
def test_the_offset_does_not_move_at_rate_0_nor_while_the_adapter_is_frozen(rate, trainable, inputs):
    model = flylora(balance_rate=rate)
    model.enable_input_require_grads()
    for layer in layers(model):
        layer.flylora_B["default"].requires_grad_(trainable)
    model(input_ids=inputs, labels=inputs).loss.backward()
    assert all((offset == 0).all() for offset in offsets(model))


def test_the_offset_is_in_float32_whatever_is_made_by_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = METHODS["flylora"](target_modules="all-linear")
        model = get_peft_model(tiny_llama(), config, autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for name, t in model.named_buffers() if "offset" in name} == {torch.float32}


def test_casting_the_model_leaves_the_offset_in_float32(inputs):
    model = flylora(balance_rate=0.3)
    model(input_ids=inputs, labels=inputs).loss.backward()
    before = offsets(model)
    after = offsets(model.bfloat16())
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left, lean, inputs, monkeypatch):
    monkeypatch.setattr(FlyLoraLinear, "lean", lean)

    def moved(pads: int) -> list[torch.Tensor]:
        model = flylora(balance_rate=0.1)
        ids, mask = inputs.repeat(1, 2), torch.ones(3, 22, dtype=torch.long)
        ids, mask = (torch.cat([t, t.new_zeros(3, pads)][:: -1 if left else 1], dim=1) for t in (ids, mask))
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        labels = ids.masked_fill(mask == 0, -100)
        model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels).loss.backward()
        return offsets(model)

    for got, want in zip(moved(40), moved(0), strict=True):
        assert torch.equal(got, want) and want.any()


@pytest.mark.parametrize("form", ["none", "by pairs of tokens"])
def test_a_forward_without_a_mask_of_rows_counts_all_tokens_also_after_one_with(form, inputs):
    size = inputs.shape[1]
    pairs = torch.ones(len(inputs), 1, size, size, dtype=torch.bool).tril()
    given = {} if form == "none" else {"attention_mask": pairs}

    def moved(masked_before: bool) -> list[torch.Tensor]:
        model = flylora(balance_rate=0.1)
        if masked_before:
            with torch.no_grad():
                model.eval()(input_ids=inputs, attention_mask=torch.ones_like(inputs).tril())
        model.train()(**given, input_ids=inputs, labels=inputs).loss.backward()
        return offsets(model)

    assert all(torch.equal(got, want) for got, want in zip(moved(True), moved(False), strict=True))


def test_unloading_takes_the_hooks_that_see_the_mask_away(inputs):
    model = flylora()
    assert any(m._forward_pre_hooks for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.unload().modules())


def test_gradient_caching_gives_the_gradients_of_the_whole_batch(inputs):
    """All chunks without gradients first, then each again: they must select by one offset (rate .5 moves it far)."""

    def embed(model, ids):
        return model.base_model.model.model(input_ids=ids).last_hidden_state.mean(1)

    def contrast(e):
        return (e @ e.T).logsumexp(-1).sum()

    whole = unbalanced()
    contrast(embed(whole, inputs)).backward()
    model = unbalanced()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    chunks = inputs.split(1)
    with torch.no_grad():
        cached = torch.cat([embed(model, chunk) for chunk in chunks]).requires_grad_()
    contrast(cached).backward()
    for chunk, grad in zip(chunks, cached.grad.split(1), strict=True):
        assert not any(offset.any() for offset in offsets(model))
        embed(model, chunk).backward(grad)
    assert grads(whole)
    torch.testing.assert_close(grads(model), grads(whole), rtol=1e-4, atol=1e-6)
    optimizer.step()
    assert all(offset.abs().max() == pytest.approx(1.5) for offset in offsets(model))  # three backwards of .5


@pytest.mark.parametrize("held", [True, False])
def test_an_adapter_opened_for_inference_moves_its_offset_only_with_its_weights(held, inputs, tmp_path):
    """A trainer that switches to a reference adapter and back makes it trainable, after its optimizer was made."""
    flylora().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).train()
    model.set_adapter("default")
    weights = [p for p in model.parameters() if p.requires_grad] if held else [nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW(weights, lr=0.1, fused=True)
    for _ in range(3):
        model(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
        model.zero_grad()
    model.state_dict()  # as saving does
    largest = max(offset.abs().max().item() for offset in offsets(model))
    assert largest == (pytest.approx(0.003) if held else 0)


def test_compiled_forwards_before_their_backwards_each_take_their_step():
    def moved(compiled: bool) -> torch.Tensor:
        torch._dynamo.reset()
        model = flylora(nn.Sequential(nn.Linear(13, 9)), target_modules=["0"], balance_rate=0.1)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        x = torch.randn(2, 30, 13, generator=torch.Generator().manual_seed(0)) + 1
        for loss in [run(part).sum() for part in x]:
            loss.backward()
        return offsets(model)[0]

    torch.manual_seed(0)
    want = moved(False)
    torch.manual_seed(0)
    assert torch.equal(moved(True), want) and want.abs().max() == pytest.approx(0.2)


def test_padding_does_not_count_after_a_merge_that_was_refused():
    model = adapted("flylora")
    watching = [layer.latest_mask for layer in model.modules() if isinstance(layer, FlyLoraLinear)]
    with pytest.raises(ValueError, match="Cannot merge"):
        model.merge_and_unload()
    assert watching and all(mask.handles for mask in watching)
    model.unload()
    assert not any(mask.handles for mask in watching)


def test_an_encoder_s_padding_does_not_count_in_either_half(inputs):
    """The decoder's keys and values of its attention to the encoder are made of the encoder's tokens."""

    def moved(pads: int) -> list[torch.Tensor]:
        model = flylora(tiny_t5(), target_modules="all-linear", balance_rate=0.1)
        ids, mask = (torch.cat([t, t.new_zeros(3, pads)], dim=1) for t in (inputs, torch.ones_like(inputs)))
        model(input_ids=ids, attention_mask=mask, labels=inputs[:, :7].contiguous()).loss.backward()
        return offsets(model)

    assert len(moved(0)) == 16 and all(torch.equal(a, b) for a, b in zip(moved(40), moved(0), strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_encoder_is_computed_again_with_its_own_padding(use_reentrant, inputs):
    """Its output is the model's, too, and the decoder's sequence as long as its own."""
    mask = (torch.arange(11) < torch.tensor([[4], [7], [11]])).long()

    def moved(checkpointing: bool) -> list[torch.Tensor]:
        model = flylora(tiny_t5(), target_modules=["q"], balance_rate=0.1).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=inputs, attention_mask=mask, labels=inputs).loss.backward()
        return offsets(model)

    assert all(map(torch.equal, moved(True), moved(False)))


@pytest.mark.slow
def test_a_compiled_model_leaves_padding_out_and_is_compiled_once(inputs):
    def moved(compiled: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = flylora(target_modules=["q_proj"], balance_rate=0.1).train()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for real in (3, 9):
            mask = (torch.arange(11) < real).long().expand(3, 11)
            run(input_ids=inputs, attention_mask=mask, labels=inputs).loss.backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
        return offsets(model)

    assert all(torch.equal(got, want) for got, want in zip(moved(True), moved(False), strict=True))


def test_a_projection_that_is_loaded_over_a_used_one_is_used():
    ids = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    model, other = adapted("flylora", seed=0), adapted("flylora", seed=1)
    with torch.no_grad():
        before, want = model(input_ids=ids).logits, other(input_ids=ids).logits
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(input_ids=ids).logits, want)
    assert not torch.allclose(before, want, atol=1e-3)
