"""What only SMORA does: a router that is trained, an offset inside of its weights, experts that are pruned."""

import pytest
import torch
from helpers import adapted, gradients, quantized, sft, tiny_llama
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from peft_mora import SMoraConfig, SMoraLinear, expert_usage, prune_experts, record_usage
from peft_mora.balance import balance_step
from peft_mora.export import effect_error, fit_lora
from peft_mora.routed import routed_layers, set_top_k
from trl_callbacks import ActivationBudgetCallback, OrthogonalProjectionCallback


def smora(base=None, **kwargs) -> PeftModel:
    return adapted(SMoraConfig, base, **{"r": 6, "top_k": 2, "alpha": 3, "balance_rate": 1e-3, **kwargs}).train()


def layers(model) -> list[SMoraLinear]:
    return [m for m in model.modules() if isinstance(m, SMoraLinear)]


def net(**kwargs) -> PeftModel:
    torch.manual_seed(0)
    return smora(nn.Sequential(nn.Linear(13, 9)).double(), **{"target_modules": ["0"], **kwargs})


def reference(layer: SMoraLinear, x: torch.Tensor, alpha: float, k: int, P: int) -> torch.Tensor:
    """The rule, one token and one rank at a time, in float64."""
    A, B, W = (getattr(layer, f"smora_{name}")["default"].weight for name in "ABW")
    b = layer.smora_offset["default"].double()
    rows = []
    for token in x.reshape(-1, layer.in_features):
        q = torch.sigmoid(W @ token) + b
        kept = sorted(range(len(q)), key=lambda i: -q[i].item())[:k]
        g = {i: q[i] / sum(q[j] for j in kept) for i in kept}
        rows.append(alpha * sum(g[i // P] * (A[i] @ token) * B[:, i] for i in range(len(A)) if i // P in kept))
    return torch.stack(rows).reshape(*x.shape[:-1], layer.out_features)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize(("top_k", "partition"), [(1, 1), (4, 1), (6, 1), (2, 2), (3, 2)])
def test_layer_equals_the_reference_in_values_and_gradients(top_k, partition, lean, monkeypatch):
    monkeypatch.setattr(SMoraLinear, "lean", lean)
    model = net(top_k=top_k, rank_partition=partition)
    (layer,) = layers(model)
    layer.smora_offset["default"] = torch.linspace(-0.2, 0.3, 6 // partition)
    x = torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True)
    got = model(x) - layer.base_layer(x)
    want = reference(layer, x, 3, top_k, partition)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    tensors = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(tensors) == 4
    upstream = torch.randn_like(got)
    grads = (torch.autograd.grad(y, tensors, upstream, retain_graph=True) for y in (got, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_the_offset_moves_by_the_choices_once_a_backward_in_training(use_reentrant, inputs):
    """Whatever recomputes the forward, and by real tokens alone."""
    model = smora(rank_partition=2, top_k=1)
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    mask = torch.ones_like(inputs)
    mask[1, 7:] = 0
    batch = {"input_ids": inputs, "attention_mask": mask, "labels": inputs}
    model.eval()(**batch).loss.backward()
    assert not any(layer.smora_offset["default"].any() for layer in layers(model))
    with record_usage(model.train()) as meter:
        loss = model(**batch).loss
        meter.sync()
    loss.backward()
    for name, place in meter.places.items():
        want = balance_step(torch.zeros(3), meter.hits[place][:-1], 1e-3)  # of three experts, then the tokens
        assert want.any() and torch.equal(model.get_submodule(name).smora_offset["default"], want), name


def test_scores_that_underflow_give_no_update_and_no_nan():
    model = net(top_k=2)
    (layer,) = layers(model)
    layer.double().smora_W["default"].weight.data.fill_(-1e4)
    x = torch.ones(3, 13, dtype=torch.float64, requires_grad=True)
    y = model(x)
    assert torch.equal(y, layer.base_layer(x))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "change",
    [
        {"r": 8}, {"alpha": 4}, {"top_k": 3}, {"rank_partition": 2}, {"balance_rate": 0.4},
        {"rank_pattern": {"0": 4}}, {"alpha_pattern": {"0": 9}}, {"top_k_pattern": {"0": 1}},
        {"kept_experts": {"0": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_every_field_of_the_rule_has_an_effect(change):
    def output(**kwargs):
        model, x = net(**kwargs), torch.linspace(-1, 1, 65, dtype=torch.float64).reshape(5, 13)
        model(x).sum().backward()  # the offset moves
        return model(x)

    assert not torch.allclose(output(), output(**change), atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 6, "top_k": 2, "rank_partition": 4}, "`rank_partition` must be a divisor of `r`, which is 6"),
        ({"r": 6, "top_k": 1, "rank_partition": 3, "rank_pattern": {"a": 4}}, r"divisor of `rank_pattern\['a'\]`"),
        ({"r": 8, "top_k": 5, "rank_partition": 2}, "`top_k` must be .* from 1 to r / rank_partition .here 4"),
        ({"r": 8, "top_k": 2, "rank_partition": 2, "top_k_pattern": {"a": 5}}, r"`top_k_pattern\['a'\]`.*here 4"),
        ({"r": 8, "kept_experts": {"a": -1}}, "`kept_experts` must be"),
    ],
)
def test_experts_that_the_rank_does_not_give_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SMoraConfig(**{"top_k": 2, **fields})


def test_a_pruned_adapter_reloads_bit_for_bit_and_trains_on(inputs, tmp_path):
    model = smora(rank_partition=2, r=8).eval()
    for layer in layers(model):
        layer.smora_offset["default"] += torch.tensor([0.0, -2.0, 0.0, 0.0])  # its second expert never acts
    with record_usage(model):
        model(inputs)
    never = expert_usage(model)
    assert all(share.shape == (4,) and share[1] == 0 for share in never.values())
    want = {name: int((share == 0).sum()) for name, share in never.items()}
    before = model(inputs).logits
    summary = prune_experts(model, 1e-6, inputs={"input_ids": inputs})
    assert dict(summary) == want and summary.experts == 14 * 4 and summary.change < 1e-5
    torch.testing.assert_close(model(inputs).logits, before, rtol=1e-4, atol=1e-5)
    names = list(routed_layers(model))
    assert model.peft_config["default"].kept_experts[names[0].removeprefix("base_model.model.")] == 4 - want[names[0]]
    with pytest.raises(ValueError, match="from 1 to r .here 4"):
        set_top_k(model, {names[0]: 5})
    set_top_k(model, {names[0]: 4})  # more than it has left wakes them all
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).eval()
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    assert set(gradients(again.train(), inputs)) == {n for n, p in again.named_parameters() if p.requires_grad}
    again.add_adapter("ref", again.peft_config["default"])  # TRL's reference
    assert all(layer.expert_count("ref") == layer.expert_count("default") for layer in layers(again))
    for layer in layers(model):  # nothing left at all
        layer.put("default", *layer.without("default", torch.zeros(layer.expert_count("default"), dtype=torch.bool)))
    model.train()(input_ids=inputs, labels=inputs).loss.backward()
    assert torch.equal(model.eval()(inputs).logits, tiny_llama()(inputs).logits)


def test_a_budget_anneals_k_and_prunes_at_the_end(llama_folder, tmp_path, inputs):
    torch.manual_seed(0)
    config = SMoraConfig(r=6, top_k=6, target_modules="all-linear")
    callback = ActivationBudgetCallback(2, interval=2, rebalance=True, prune_below=0.05)
    trainer = sft(quantized(llama_folder), llama_folder, tmp_path / "run", config, [callback])
    trainer.train()
    active = [entry["active_experts"] for entry in trainer.state.log_history if "active_experts" in entry]
    assert active[0] == pytest.approx(6) and active[-1] == pytest.approx(2)
    assert len(set(callback._needs)) > 1
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(quantized(llama_folder), str(tmp_path / "adapter")).eval()
    assert torch.equal(again(inputs).logits, trainer.model.eval()(inputs).logits)
    assert sum(layer.top_k("default") for layer in layers(again)) == 28


def test_what_is_protected_is_left_alone_whatever_the_router_says(llama_folder, tmp_path):
    """A starts and stays outside of the directions: W_g moves, and h is 0 there."""
    torch.manual_seed(0)
    config = SMoraConfig(r=6, top_k=2, target_modules=["q_proj", "down_proj"])
    callback = OrthogonalProjectionCallback(protect=["the cat sat on the mat"], energy=0.9)
    trainer = sft(quantized(llama_folder), llama_folder, tmp_path, config, [callback], max_steps=3)
    trainer.train()
    assert trainer.state.log_history[-2]["leakage"] < 1e-6
    state = get_peft_model_state_dict(trainer.model)
    assert all(value.any() for name, value in state.items() if "smora_B" in name)


def test_with_nothing_to_choose_and_one_weight_for_all_the_fit_is_exact():
    """K = R and a router of zeros: y = (alpha / R) B·A·x, which regression has to find."""
    model = smora(top_k=6).eval()
    for layer in layers(model):
        layer.smora_W["default"].weight.data.zero_()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 64, (64, 12), generator=generator)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(32)]
    assert effect_error(model, fit_lora(model, batches, ridge=1e-12), batches).error < 1e-3


def test_a_frozen_adapter_is_pruned_frozen_and_counts_its_new_experts(inputs):
    model = smora(rank_partition=2, r=8).eval()
    for layer in layers(model):
        layer.smora_offset["default"] += torch.tensor([0.0, -2.0, 0.0, 0.0])
    model.requires_grad_(False)
    with record_usage(model):
        model(inputs)
    prune_experts(model, 1e-6)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="No token was counted"):
        expert_usage(model)
    with record_usage(model):
        model(inputs)
    sizes = {name: layer.expert_count("default") for name, layer in routed_layers(model).items()}
    assert {name: len(share) for name, share in expert_usage(model).items()} == sizes and max(sizes.values()) < 4
