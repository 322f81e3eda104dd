"""What only FURINA does: directions and one magnitude, and losses that arrive without a router or a callback."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import adapted, sft, texts, tiny_bert, tiny_llama
from peft import PeftModel, get_peft_model
from test_like_lora import replicas
from torch import nn
from transformers import BertForMaskedLM, TrainerCallback

from peft_mora import FurinaConfig, FurinaLinear
from peft_mora.furina import EPS, LossGate, loss_scale


OFF = {"selection_weight": 0.0, "balance_weight": 0.0}


def furina(base=None, **kwargs) -> PeftModel:
    return adapted(FurinaConfig, base, **{"r": 2, "experts": 3, "alpha": 3, **kwargs}).train()


def layers(model) -> dict[str, FurinaLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, FurinaLinear)}


def net(**kwargs) -> PeftModel:
    torch.manual_seed(0)
    return furina(nn.Sequential(nn.Linear(13, 9)).double(), **{"target_modules": ["0"], **kwargs})


def experts(layer: FurinaLinear) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """W of the shared expert and Ŵ (O, I) of the others, whole, with their rows' norms taken one by one."""
    A, B, _ = (weight.to(layer.furina_A["default"].weight) for weight in layer.weights("default"))
    r = layer.r["default"]
    shared, *Ws = (B[:, i : i + r] @ A[i : i + r] for i in range(0, len(A), r))
    return shared, [torch.stack([row / (row.norm() + EPS) for row in W]) for W in Ws]


def update(layer: FurinaLinear, x: torch.Tensor) -> torch.Tensor:
    shared, units = experts(layer)
    v = layer.furina_v["default"].weight[:, 0]
    return layer.scaling["default"] * (x @ shared.T + sum(v * (x @ W.T) for W in units))


def losses(layer: FurinaLinear, x: torch.Tensor, top_k=1, selection=0.01, balance=0.01) -> torch.Tensor:
    """Of tokens (T, I), token by token."""
    _, units = experts(layer)
    n = torch.stack([(x @ W.T).norm(dim=-1) for W in units], dim=-1)
    s = n / n.sum(-1, keepdim=True)
    kept = s.topk(top_k, dim=-1)
    share = torch.stack([row.sum() for row in kept.values]).mean()
    F = torch.stack([(kept.indices == e).any(-1).double().mean() for e in range(len(units))]).to(s) / top_k
    return selection * (1 - share) + balance * len(units) * (F * s.mean(0)).sum()


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize(
    "weights", [OFF, {"selection_weight": 3.0, "balance_weight": 7.0, "selected": 2}], ids=["0", "on"]
)
def test_layer_equals_the_reference_in_values_and_gradients_of_loss_and_losses(weights, lean, monkeypatch):
    """Through the norms too, and into x: what is there equals autograd's of (update · g) + losses."""
    monkeypatch.setattr(FurinaLinear, "lean", lean)
    model = net(**weights)
    (layer,) = layers(model).values()
    x = torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True)
    got = model(x) - layer.base_layer(x)
    want = update(layer, x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert type(layer._gate("default", torch.eye(2))).__name__ == ("Gate" if weights is OFF else "LossGate")
    tensors = [x, *(p for p in layer.parameters() if p.requires_grad)]
    g = torch.randn_like(got)
    total = (want * g).sum()
    if weights is not OFF:
        total = total + losses(layer, x.flatten(0, 1), 2, 3.0, 7.0)
    pairs = zip(torch.autograd.grad(got, tensors, g), torch.autograd.grad(total, tensors), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert len(tensors) == 4


class Watch(TrainerCallback):
    """The gradients of the first step, as the optimizer gets them, and what the model was called with."""

    def __init__(self) -> None:
        self.batches, self.grads = [], {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(lambda module, args, kwargs: self.batches.append(kwargs), with_kwargs=True)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_in_sft_trainer_the_step_is_that_of_the_total_loss(checkpointing, llama_folder, tmp_path):
    """Two micro-batches with padding: TRL's loss, and the mean of the losses of all modules over real tokens."""
    fields = {"r": 2, "experts": 3, "selection_weight": 0.5, "balance_weight": 0.8, "target_modules": "all-linear"}
    model = adapted(FurinaConfig, **fields)
    watch = Watch()
    options = {"max_steps": 1, "max_grad_norm": 0, "gradient_checkpointing": checkpointing is not None}
    if checkpointing is not None:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
    short = [{"text": " ".join(row["text"].split()[: 3 + i % 5])} for i, row in enumerate(texts())]
    options |= {"train_dataset": Dataset.from_list(short), "learning_rate": 0.0}
    trainer = sft(model, llama_folder, tmp_path, callbacks=[watch], **options)
    trainer.train()
    assert len(watch.batches) == 2

    twin = adapted(FurinaConfig, **{**fields, **OFF}).train()
    inputs: dict[str, torch.Tensor] = {}
    for name, layer in layers(twin).items():
        layer.lean = False
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs.__setitem__(name, args[0]))
    labelled = sum((batch["labels"][:, 1:] != -100).sum() for batch in watch.batches)
    assert any((batch["attention_mask"] == 0).any() for batch in watch.batches)
    for batch in watch.batches:
        logits = twin(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum") / labelled
        real = batch["attention_mask"].bool()
        own = [losses(layer, inputs[name][real], 1, 0.5, 0.8) for name, layer in layers(twin).items()]
        (loss + sum(own) / 2).backward()
    want = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert watch.grads.keys() == want.keys() and len(want) == 42
    for name, grad in want.items():
        torch.testing.assert_close(watch.grads[name], grad, rtol=2e-3, atol=1e-5 * grad.abs().max().item(), msg=name)


def trainer_that(does):
    """One in fp16 that sees two GPUs and accumulates four micro-batches."""

    class Trainer:
        current_gradient_accumulation_steps = 4
        args = SimpleNamespace(n_gpu=2)
        accelerator = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 1024.0), mixed_precision="fp16")

        def training_step(self):
            return [does() for _ in "a"]

    return Trainer()


def test_the_scale_is_that_of_the_trainer_on_the_stack():
    """Also where it sees several GPUs and makes no replicas: a quantised base is on one of them."""
    trainer = trainer_that(loss_scale)
    assert loss_scale() == 1 and trainer.training_step() == [256.0]
    trainer.accelerator.scaler = None
    with pytest.raises(ValueError, match="Train in bf16, or without them: FurinaConfig"):
        trainer.training_step()


def test_replicas_in_their_threads_share_the_scale_of_the_trainer_that_made_them(monkeypatch):
    model, scales = net(), []

    def gate(G, losses, scale, masks):
        scales.append(scale)
        return LossGate(G, losses, scale, masks)

    monkeypatch.setattr("peft_mora.furina.LossGate", gate)
    make = partial(replicas, model, monkeypatch)
    trainer = trainer_that(make)
    for copies in (make(), *trainer.training_step()):
        with ThreadPoolExecutor(1) as pool:
            list(pool.map(lambda replica: replica(torch.ones(3, 13, dtype=torch.float64)), copies))
    assert scales == [0.5, 0.5, 128.0, 128.0]
    trainer.accelerator.scaler = None
    with pytest.raises(ValueError, match="Train in bf16"):
        trainer.training_step()


BERT = partial(tiny_bert, BertForMaskedLM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.mark.parametrize("base", [tiny_llama, BERT], ids=["llama", "bert"])
@pytest.mark.parametrize("compiled", [False, True])
def test_reentrant_checkpointing_finds_the_padding_of_the_forward_that_it_computes_again(compiled, base, inputs):
    masks = torch.ones(2, 3, 11, dtype=torch.long)
    masks[0, :, 2:], masks[1, :, 8:] = 0, 0

    def grads(checkpointing: bool):
        model = furina(base(), target_modules="all-linear", selection_weight=5.0, balance_weight=3.0)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": True})
        run = torch.compile(model, backend="aot_eager") if compiled and checkpointing else model
        sum(run(input_ids=inputs, attention_mask=mask, labels=inputs).loss for mask in masks).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    torch.compiler.reset()
    torch.testing.assert_close(grads(True), grads(False), rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_is_the_base_and_every_part_of_it_learns(inputs):
    model = get_peft_model(tiny_llama(), FurinaConfig(r=2, target_modules="all-linear", **OFF)).train()
    assert torch.equal(model.eval()(inputs).logits, tiny_llama()(inputs).logits)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        model.train()(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
    assert all(
        p.isfinite().all() and not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before
    )


def test_experts_of_zeros_have_a_gradient_of_0_and_no_nan():
    model = net(selection_weight=1.0)
    (layer,) = layers(model).values()
    layer.furina_B["default"].weight.data.zero_()
    model(torch.ones(3, 13, dtype=torch.float64)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "change",
    [
        {"r": 3}, {"alpha": 4}, {"experts": 2}, {"selected": 2}, {"selection_weight": 2.0}, {"balance_weight": 2.0},
        {"rank_pattern": {"0": 4}}, {"alpha_pattern": {"0": 9}},
    ],
    ids=str,
)  # fmt: skip
def test_every_field_of_the_rule_has_an_effect(change):
    def trained(**kwargs):
        model, x = net(**kwargs), torch.linspace(-1, 1, 65, dtype=torch.float64).reshape(5, 13)
        for _ in range(2):
            model(x).square().sum().backward()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data -= 0.1 * parameter.grad
        return model(x)

    assert not torch.allclose(trained(), trained(**change), atol=1e-5)
