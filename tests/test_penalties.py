"""Penalties on B·A inside SFTTrainer: their gradient is autograd's on loss + penalty, and what goes with them."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import lora_config, losses, quantized, randomize, ranks, sft, texts, tiny_gpt2, tiny_llama
from peft import get_peft_model
from safetensors.torch import load_file
from test_host import PLAIN
from transformers import AutoTokenizer, Trainer, TrainerCallback

from peft_mora import FlyLoraConfig, MoraConfig, start_task
from trl_callbacks import AdapterPenaltyCallback, DriftCallback, OrthogonalProjectionCallback
from trl_callbacks.factors import base_weight, static_factors
from trl_callbacks.general_text import read
from trl_callbacks.penalties import (
    LoRASculpt,
    Run,
    active_share,
    add_gradients,
    draw_active,
    fisher_directions,
    fisher_rows,
    largest,
)


TEXT = ["the cat sat on the mat", "a dog ran under the log", "north south east west yes no"]


def dense(**fields):
    return MoraConfig(routing="dense", alpha=8, **fields)


def adapted(make, base=None, r=4, modules=("q_proj", "down_proj")):
    torch.manual_seed(0)
    return get_peft_model(base or tiny_llama(), make(r=r, target_modules=list(modules)))


def run(model, folder, output, *callbacks, **options):
    return sft(model, folder, output, callbacks=list(callbacks), **{"save_strategy": "no", **options})


class Beginning(Trainer):
    """Of a trainer what a callback sees as its run of eight steps begins."""

    def __init__(self, *callbacks):
        self.callback_handler = SimpleNamespace(callbacks=callbacks)

    def train(self, model, step, output_dir):
        arguments = SimpleNamespace(**PLAIN, seed=0, output_dir=output_dir)
        state = SimpleNamespace(global_step=step, max_steps=8)
        self.callback_handler.callbacks[0].on_train_begin(arguments, state, None, model=model)


def begin(model, rule="lorasculpt", others=(), step=0, output_dir="nowhere", **options):
    """A callback as its run begins."""
    callback = AdapterPenaltyCallback(rule, **options)
    Beginning(callback, *others).train(model, step, output_dir)
    return callback


def entries(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def scalings(model):
    return [pair.layer.scaling["default"] for pair in static_factors(model, None, "")[1].values()]


def watch_backward(trainer, see):
    """Call `see` before each backward."""
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **kwargs: (see(), backward(loss, **kwargs))


def by_hand(rule, pair, scaling, callback):
    """The penalty of one module as its rule is written down, from autograd's own A and B."""
    if rule == "lorasculpt":
        W = pair.layer.get_base_weight()
        share = W.abs() / W.square().sum().sqrt()
        M = (2 * (1 / (share + 1e-15).log()).abs()).tanh()
        return 0.5 * (M * (pair.B @ pair.A)).square().sum().sqrt()
    name = next(n for n, p in callback._run.factors.items() if p.A is pair.A)
    V, shares = (t.double() for t in callback.rule._bases[name])
    delta = scaling * pair.B @ pair.A
    aligned = sum(torch.outer(delta @ v, v) for v in V.T)
    rest = delta - aligned
    fisher = sum(f * (delta @ v).dot(delta @ v) for f, v in zip(shares, V.T, strict=True))
    eta = 1 + 1 / (1 + (0.01 - delta.abs()).exp())
    return 0.3 * fisher + 0.2 * rest.square().sum() + 0.7 * (eta * aligned.abs() * rest.abs()).sum()


OPTIONS = {
    "lorasculpt": {"weight": 0.5, "at": None, "omega": 2.0},
    "alignguard": {
        "source": TEXT, "directions": 3, "alignment": 0.3, "task": 0.2, "collision": 0.7, "tau": 0.01,
    },
}  # fmt: skip


@pytest.mark.parametrize("rule", OPTIONS)
@pytest.mark.parametrize("make", [lora_config, dense])
def test_every_gradient_is_that_of_loss_plus_penalty_once_a_step_and_before_clipping(
    rule, make, llama_folder, tmp_path
):
    model = adapted(make, tiny_llama().double())
    model.double()
    callback = AdapterPenaltyCallback(rule, **OPTIONS[rule])
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    norm = 1e-2

    class Compare(TrainerCallback):
        """`wanted` is autograd's, summed over the backwards of a step; the penalty is in the first alone."""

        compared, wanted = 0, None

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step > 0:  # with B = 0 the norm has no gradient, and autograd's of a root is NaN
                total = math.sqrt(sum(float(g.square().sum()) for g in self.wanted))
                for p, g in zip(parameters.values(), self.wanted, strict=True):
                    torch.testing.assert_close(p.grad, g * norm / (total + 1e-6), rtol=1e-9, atol=1e-15)
                self.compared += 1
            self.wanted = None

    compare = Compare()
    trainer = run(model, llama_folder, tmp_path, callback, compare, max_steps=3, max_grad_norm=norm)
    backward, values = trainer.accelerator.backward, []

    def spy(loss, **kwargs):
        whole = loss
        if compare.wanted is None and trainer.state.global_step > 0:
            name, factors = static_factors(model, None, "")
            each = [by_hand(rule, pair, pair.layer.scaling[name], callback) for pair in factors.values()]
            penalty = sum(each) / len(each)
            values.append(float(penalty.detach()))
            whole = loss + penalty
        found = torch.autograd.grad(whole, list(parameters.values()), retain_graph=True)
        compare.wanted = found if compare.wanted is None else [a + b for a, b in zip(compare.wanted, found)]  # noqa: B905
        backward(loss, **kwargs)

    trainer.accelerator.backward = spy
    trainer.train()
    assert compare.compared == 2 and len(parameters) == 8
    assert entries(trainer, f"penalty_{rule}") == pytest.approx([0.0, *values], rel=1e-6)
    assert min(values) > 1e-4


def uneven(model, folder, output, *callbacks, **options):
    """Three micro-batches an epoch and two a step: the second step begins in one epoch and ends in the next."""
    data = texts(6).to_iterable_dataset()
    return run(model, folder, output, *callbacks, train_dataset=data, max_steps=3, max_grad_norm=0, **options)


def test_the_penalty_counts_once_in_a_step_that_an_epoch_ends_within(llama_folder, tmp_path):
    found, micro_batches = {}, []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
            found.setdefault(state.global_step, []).append(torch.cat(grads).clone())

    for weight in (0.0, 0.5):
        model = adapted(lora_config, tiny_llama().double()).double()
        randomize(model)
        callback = AdapterPenaltyCallback("lorasculpt", weight=weight, at=None)
        trainer = uneven(model, llama_folder, tmp_path, callback, Keep(), learning_rate=0.0)
        model.register_forward_hook(lambda *_, trainer=trainer: micro_batches.append(trainer.state.global_step))
        trainer.train()
    assert micro_batches == 2 * [0, 0, 1, 1, 1, 2, 2, 2]
    first, *others = (penalised - plain for plain, penalised in found.values())
    assert first.norm() > 1e-2 and len(others) == 2
    for penalty in others:
        torch.testing.assert_close(penalty, first, rtol=1e-6, atol=1e-9)
    value = add_gradients(Run(model, *static_factors(model, None, ""), None, 8, 0, False), callback.rule)
    assert entries(trainer, "penalty_lorasculpt") == pytest.approx([float(value)] * 3)


def test_the_penalty_is_scaled_as_fp16_scales_gradients():
    model = adapted(lora_config)
    randomize(model)
    name, factors = static_factors(model, None, "")
    pair = next(iter(factors.values()))
    assert add_gradients(Run(model, name, factors, None, 8, 0, False), LoRASculpt()) > 0
    plain, pair.A.grad = pair.A.grad, None
    optimizer = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 1024.0))
    begin(model, at=None).on_step_begin(None, SimpleNamespace(global_step=0), None, optimizer=optimizer)
    assert torch.equal(pair.A.grad, 1024 * plain) and plain.any()


def test_a_and_b_keep_their_largest_entries_under_adamw_and_after_a_resume(llama_folder, tmp_path):
    def sculpted(output):
        callback = AdapterPenaltyCallback("lorasculpt", keep=0.25, at=2)
        options = {"save_strategy": "steps", "weight_decay": 0.1, "lr_scheduler_type": "constant"}
        return run(adapted(dense, quantized(llama_folder)), llama_folder, output, callback, **options)

    class Masks(TrainerCallback):
        seen, after = None, None

        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
            if state.global_step == 2:
                self.seen = [w != 0 for w in weights]
            self.after = weights

    whole, masks = sculpted(tmp_path / "whole"), Masks()
    whole.add_callback(masks)
    whole.train()
    for kept, weight in zip(masks.seen, masks.after, strict=True):
        assert int(kept.sum()) == int(0.25 * weight.numel())
        assert not weight[~kept].any() and weight[kept].all()
    resumed = sculpted(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for p, weight in zip((p for p in resumed.model.parameters() if p.requires_grad), masks.after, strict=True):
        assert torch.equal(p.detach(), weight)


def test_a_run_without_its_masks_or_stopped_before_them_is_refused(tmp_path):
    model = adapted(dense)
    with pytest.raises(ValueError, match="step 3, but the checkpoint has no adapter_penalty-lorasculpt"):
        begin(model, at=2, step=3, output_dir=tmp_path)
    callback = begin(model, at=2)
    with pytest.raises(ValueError, match="stopped at step 1, and A and B are made sparse at 2.*stopped-1"):
        callback.on_train_end(
            SimpleNamespace(output_dir=tmp_path, should_save=True), SimpleNamespace(global_step=1), None, model=model
        )
    assert (tmp_path / "stopped-1" / "adapter_model.safetensors").is_file()


def test_largest_keeps_a_share_of_the_entries():
    weight = torch.tensor([[3.0, -5.0, 0.1], [0.0, 4.0, -0.2]])
    assert largest(weight, 0.5).tolist() == [[True, True, False], [False, True, False]]


def test_fisher_directions_are_eigenvectors_of_the_weight_gradients(llama_folder, tmp_path):
    """Against autograd's gradient of the base's own weight, a sequence at a time, in float64."""
    model = adapted(lora_config, tiny_llama().double())
    model.double()
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    name, factors = static_factors(model, None, "")
    found = fisher_directions(Run(model, name, factors, tokenizer, 9, 0, False), TEXT, 2048, 4)
    for module, pair in factors.items():
        W = pair.layer.get_base_layer().weight.requires_grad_(True)
        C = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float64)
        for batch in read(TEXT, tokenizer, 2048):
            G = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, W)[0]
            C += G.T @ G
        W.requires_grad_(False)
        values, vectors = torch.linalg.eigh(C)
        V, shares = (t.double() for t in found[module])
        torch.testing.assert_close(shares, (values.flip(0) / values.sum())[:4], rtol=1e-4, atol=1e-7)
        assert (V.T @ vectors[:, -1]).norm() == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(((C @ V) * V).sum(), values[-4:].sum(), rtol=1e-4, atol=0)
    x, g = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    rows = fisher_rows(x, g)
    torch.testing.assert_close(rows.T @ rows, (g.T @ x).T @ (g.T @ x))


def test_alignguard_goes_on_with_the_directions_that_it_found(llama_folder, tmp_path):
    def guarded(output):
        callback = AdapterPenaltyCallback("alignguard", source=TEXT, directions=3, task=0.05)
        options = {"save_strategy": "steps", "lr_scheduler_type": "constant"}
        return run(adapted(dense, quantized(llama_folder)), llama_folder, output, callback, **options)

    whole = guarded(tmp_path / "whole")
    whole.train()
    resumed = guarded(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert entries(resumed, "penalty_alignguard") == entries(whole, "penalty_alignguard")
    kept = load_file(tmp_path / "whole" / "checkpoint-6" / "adapter_penalty-alignguard.safetensors")
    assert kept["model.layers.1.mlp.down_proj.V"].shape == (128, 3)


def test_coto_leaves_modules_out_ever_less_and_whole_outside_of_a_step(llama_folder, tmp_path):
    model = adapted(dense, modules=["q_proj", "v_proj", "o_proj"])
    factors = static_factors(model, None, "")[1]
    acting, moved = [], []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            moved.append([bool(pair.B.grad.any()) for pair in factors.values()])

        def on_step_end(self, args, state, control, **kwargs):
            assert scalings(model) == [2.0] * 6

    trainer = run(model, llama_folder, tmp_path, AdapterPenaltyCallback("coto"), Watch(), max_steps=8)
    assert trainer.args.gradient_checkpointing  # so that backward runs the modules again
    watch_backward(trainer, lambda: acting.append([s != 0 for s in scalings(model)]))
    trainer.train()
    draws = [draw_active(6, active_share(step, 8), step) for step in range(8)]
    assert acting == [draw for draw in draws for _ in range(2)]
    assert moved == draws  # a module that is left out learns nothing
    shares = [sum(draw) / 6 for draw in draws]
    assert shares[0] == pytest.approx(1 / 6) and shares[6:] == [1.0, 1.0] and len(set(shares)) > 2
    assert entries(trainer, "active_adapters") == pytest.approx(shares)
    assert [active_share(step, 8) for step in (0, 3, 6, 8)] == [0, 0.5, 1, 1]
    drawn = torch.tensor([draw_active(10, 0.3, seed) for seed in range(500)])
    assert drawn.any(dim=1).all() and drawn.float().mean() == pytest.approx(0.3, abs=0.02)


def test_coto_is_whole_again_whatever_ends_a_step(llama_folder, tmp_path):
    """An interrupt, and memory that runs out, where the trainer begins anew."""
    model, acting = adapted(lora_config), []
    trainer = run(
        model, llama_folder, tmp_path, AdapterPenaltyCallback("coto"), max_steps=3, auto_find_batch_size=True
    )
    interrupt = KeyboardInterrupt()
    errors = [interrupt, None, None, RuntimeError("CUDA out of memory."), *[None] * 6, interrupt]  # of the backwards

    def see():
        acting.append([s != 0 for s in scalings(model)])
        if errors and (error := errors.pop(0)):
            raise error

    watch_backward(trainer, see)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert scalings(model) == [2.0] * 4 and sum(acting[0]) == 1
    trainer.train()
    draws = [draw_active(4, active_share(step, 3), step) for step in range(3)]
    assert acting == [draws[step] for step in (0, *(0, 0, 1), *(0, 0, 1, 1, 2, 2))] and draws[0] != draws[1]
    assert scalings(model) == [2.0] * 4
    assert trainer.training_step.__func__ is type(trainer).training_step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(AdapterPenaltyCallback)
    trainer.train()
    assert acting[11:] == [[True] * 4] * 6


def test_coto_is_whole_in_an_evaluation_that_comes_within_a_step(llama_folder, tmp_path):
    model, evaluated = adapted(lora_config), []
    trainer = uneven(model, llama_folder, tmp_path, AdapterPenaltyCallback("coto"), eval_strategy="epoch")
    model.register_forward_hook(lambda *_: None if model.training else evaluated.append(scalings(model)))
    trainer.train()
    assert len(evaluated) > 1 and all(each == [2.0] * 4 for each in evaluated)
    assert entries(trainer, "active_adapters") == [sum(draw_active(4, active_share(i, 3), i)) / 4 for i in range(3)]


def test_masks_beside_a_callback_that_sets_weights_itself_are_refused(tmp_path):
    model = adapted(lora_config)
    holding = [DriftCallback(TEXT, max_kl=0.1), OrthogonalProjectionCallback(protect=TEXT)]
    free = [DriftCallback(TEXT), OrthogonalProjectionCallback(), AdapterPenaltyCallback("coto")]
    free.append(OrthogonalProjectionCallback(tmp_path, start="osrm"))
    begin(model, at=2, others=free)
    for callback in holding:
        with pytest.raises(ValueError, match=rf"{type(callback).__name__} puts .* from step 2 on.*at=None.*one of"):
            begin(model, at=2, others=[*free, callback])
    begin(model, at=None, others=holding)
    begin(model, "coto", others=holding)


def test_adapters_and_runs_that_it_cannot_work_on_are_refused():
    with pytest.raises(ValueError, match=r"chooses its experts by the input.*routing='dense'"):
        begin(adapted(MoraConfig))
    with pytest.raises(ValueError, match="needs one adapter in training that has an A and a B"):
        begin(adapted(FlyLoraConfig, r=8))
    with pytest.raises(ValueError, match="works on B·A alone. Use LoraConfig without it"):
        begin(get_peft_model(tiny_llama(), lora_config(target_modules=["q_proj"], use_dora=True)))
    with pytest.raises(ValueError, match="run has 8 steps and at=100"):
        begin(adapted(lora_config))
    trained = adapted(dense)
    randomize(trained)
    with pytest.raises(ValueError, match="trained already.*fresh adapter"):
        begin(trained, "alignguard", source=TEXT)
    start_task(trained, "two")
    with pytest.raises(ValueError, match="frozen experts of earlier tasks.*'coto'"):
        begin(trained, "coto")


def test_the_base_weight_is_out_by_in_for_all_layouts(llama_folder):
    pair = next(iter(static_factors(adapted(lora_config, tiny_gpt2(), modules=["c_attn"]), None, "")[1].values()))
    assert base_weight(pair.layer).shape == (144, 48)
    pair = next(iter(static_factors(adapted(lora_config, quantized(llama_folder)), None, "")[1].values()))
    assert base_weight(pair.layer).shape == (64, 64) and base_weight(pair.layer).dtype == torch.float32


def penalised_gradients(folder, output, weight, world):
    """A and B's gradients in the first step, for an adapter that has been trained."""
    model, found = adapted(dense), []
    randomize(model)

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.extend(p.grad.clone() for p in model.parameters() if p.requires_grad)

    callbacks = [AdapterPenaltyCallback("lorasculpt", weight=weight, at=None), Keep()]
    options = {"max_steps": 1, "max_grad_norm": 0, "ddp_backend": "gloo" if world > 1 else None}
    run(model, folder, output, *callbacks, **options).train()
    return found


@pytest.mark.slow
def test_two_processes_count_the_penalty_once(llama_folder, tmp_path):
    body = f"""
        from test_penalties import *
        found = [penalised_gradients({llama_folder!r}, "{tmp_path}", weight, 2) for weight in (0.0, 5.0)]
        torch.save(found, f"{tmp_path}/{{rank}}.pt")
        """
    ranks(body, tmp_path)
    alone = [penalised_gradients(llama_folder, tmp_path, weight, 1) for weight in (0.0, 5.0)]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for i in range(8):
        penalty = alone[1][i] - alone[0][i]
        assert torch.equal(one[1][i], two[1][i]) and penalty.norm() > 1e-2
        torch.testing.assert_close(one[1][i] - one[0][i], penalty, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rule", [["coto"], None, "no"])
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(ValueError, match="`rule` must be one of"):
        AdapterPenaltyCallback(rule)


def test_the_logged_penalty_is_the_mean_since_the_last_entry():
    callback = AdapterPenaltyCallback("lorasculpt")
    callback._sum, callback._count = torch.tensor(3.0), 4
    assert callback.metrics()["penalty_lorasculpt"] == 0.75
    assert "penalty_lorasculpt" not in callback.metrics()
