"""Ranks that grow within an SFTTrainer run: no output changes as they come, the optimizer goes on, files open."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import At, lora_config, losses, quantized, randomize, sft, tiny_llama, trl_trainer
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from peft_mora import MoraConfig, SMoraConfig, start_task
from trl_callbacks import AdapterPenaltyCallback, RankGrowthCallback
from trl_callbacks.factors import static_factors
from trl_callbacks.growth import add_ranks, allocate, hand_over, saliency


MODULES = ["q_proj", "v_proj", "down_proj"]


def dense(**fields):
    return MoraConfig(routing="dense", alpha=8, **fields)


def adapted(make, base=None, **fields):
    torch.manual_seed(0)
    return get_peft_model(base or tiny_llama(), make(**{"r": 2, "target_modules": MODULES, **fields}))


def run(model, folder, output, *callbacks, **options):
    options = {"save_strategy": "no", "lr_scheduler_type": "constant", **options}
    return sft(model, folder, output, callbacks=list(callbacks), **options)


def pairs(model):
    return static_factors(model, None, "test")[1]


def ranks(model):
    return [len(pair.A) for pair in pairs(model).values()]


def outputs(model, ids):
    model.eval()
    with torch.no_grad():
        found = model(ids).logits.double()
    model.train()
    return found


class Watch(TrainerCallback):
    """Behind the growth: at the end of each step the ranks, and what has changed of the state and the outputs."""

    def __init__(self, ids):
        self.ids, self.ranks, self.totals, self.grown = ids, [], [], 0

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before = {n: (p.A.detach(), p.B.detach(), p.layer.scaling["default"]) for n, p in pairs(model).items()}
        self.state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
        self.parameters = {n: (p.A, p.B) for n, p in pairs(model).items()}
        self.output = outputs(model, self.ids)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        torch.testing.assert_close(outputs(model, self.ids), self.output, rtol=1e-4, atol=1e-5)
        inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert inside == {id(p) for p in model.parameters() if p.requires_grad} and len(optimizer.state) == len(inside)
        for name, pair in pairs(model).items():
            A, B, scaling = self.before[name]
            r = len(A)
            assert torch.equal(pair.A[:r], A) and torch.equal(pair.B[:, :r], B) and not pair.B[:, r:].any()
            assert pair.layer.scaling["default"] == scaling
            for old, new in zip(self.parameters[name], (pair.A, pair.B), strict=True):
                for key, value in self.state[old].items():
                    now = optimizer.state[new][key]
                    if now.dim():
                        assert not now[value.shape[0] :].any() and not now[:, value.shape[1] :].any()
                        now = now[: value.shape[0], : value.shape[1]]
                    assert torch.equal(now, value)
            self.grown += len(pair.A) > r
        self.ranks.append(ranks(model))
        self.totals.append(sum(self.ranks[-1]))


@pytest.mark.parametrize("make", [lora_config, dense])
def test_ranks_grow_by_saliency_and_nothing_else_changes_as_they_do(make, inputs, llama_folder, tmp_path):
    model, watch = adapted(make), Watch(inputs)
    trainer = run(model, llama_folder, tmp_path, RankGrowthCallback(5, interval=2, until=0.7), watch, max_steps=8)
    trainer.train()
    assert watch.totals == [12, 18, 18, 24, 24, 30, 30, 30] and watch.grown >= 6  # 6 modules from 2 to 5 by step 6
    assert (torch.tensor(watch.ranks).diff(dim=0) >= 0).all()
    assert len(set(ranks(model))) > 1 and max(ranks(model)) <= 10
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["rank_mean"] for entry in logged] == [total / 6 for total in watch.totals]
    assert logged[-1]["rank_max"] == max(ranks(model))
    moved = [bool(pair.B[:, 2:].any()) for pair in pairs(model).values() if len(pair.A) > 2]
    assert all(moved)  # what is new learns


@pytest.mark.parametrize("make", [lora_config, dense])
def test_a_grown_adapter_is_saved_opened_merged_and_trained_on(make, inputs, llama_folder, tmp_path):
    model = adapted(make)
    run(model, llama_folder, tmp_path / "run", RankGrowthCallback(4, interval=2), max_steps=4).train()
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved", is_trainable=True)
    assert ranks(again) == ranks(model) and len(set(ranks(model))) > 1
    assert [p.layer.scaling for p in pairs(again).values()] == [p.layer.scaling for p in pairs(model).values()]
    torch.testing.assert_close(outputs(again, inputs), expected, rtol=0, atol=0)
    if make is dense:
        start_task(again, "two")
        torch.testing.assert_close(outputs(again, inputs), expected, rtol=0, atol=1e-6)
        assert [len(pair.past_A[0]) for pair in pairs(again).values()] == ranks(model)
        callback = RankGrowthCallback(6, interval=1, until=0.5)
        run(again, llama_folder, tmp_path / "two", callback, max_steps=2).train()
        assert sum(ranks(again)) == 36
        grown = outputs(again, inputs)
        again.save_pretrained(tmp_path / "grown")
        third = PeftModel.from_pretrained(tiny_llama(), tmp_path / "grown")
        torch.testing.assert_close(outputs(third, inputs), grown, rtol=0, atol=0)
    merged = model.eval().merge_and_unload()
    torch.testing.assert_close(merged(inputs).logits.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_repeats_the_unbroken_one(llama_folder, tmp_path):
    def make(output, model=None):
        callback = RankGrowthCallback(4, interval=2, until=0.7)
        model = model or adapted(dense, quantized(llama_folder))
        return run(model, llama_folder, tmp_path / output, callback, save_strategy="steps", save_steps=3)

    whole = make("whole")
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = make("resumed", PeftModel.from_pretrained(quantized(llama_folder), checkpoint, is_trainable=True))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed) == losses(whole) and ranks(resumed.model) == ranks(whole.model)
    with pytest.raises(ValueError, match="Open the folder with PeftModel.from_pretrained"):
        make("third").train(resume_from_checkpoint=checkpoint)


def test_what_a_preference_run_has_learnt_is_not_its_reference_when_it_resumes(llama_folder, tmp_path):
    def make(output, model=None):
        pairs = {"prompt": ["a cat", "a dog"] * 4, "chosen": [" sat"] * 8, "rejected": [" ran"] * 8}
        config = None if model else lora_config(r=2, target_modules=MODULES)
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        model = model or tiny_llama()
        trainer = trl_trainer("DPO", config, llama_folder, tmp_path / output, pairs, model, **options)
        trainer.add_callback(RankGrowthCallback(4, interval=1))
        return trainer

    whole = make("whole")
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = make("resumed", PeftModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True))
    with pytest.raises(ValueError, match=r"would compare it with itself.*trainer.model.delete_adapter\('ref'\)"):
        resumed.train(resume_from_checkpoint=checkpoint)
    resumed.model.delete_adapter("ref")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed)[-2:] == losses(whole)[-2:]


class Tower:
    """A Llama with one more module, which acts in some steps alone, as a VLM's tower or an expert does."""

    def __init__(self, *steps):
        self.trainer, self.base = None, tiny_llama()
        mlp = self.base.model.layers[0].mlp
        mlp.tower = nn.Linear(64, 64)

        def act(mlp, args, output):
            return output + mlp.tower(args[0]) if self.trainer.state.global_step in steps else output

        mlp.register_forward_hook(act)

    def train(self, folder, output, callback, checkpoint=None, **options):
        """The ranks of the tower and of the six other modules after each step, and the trainer."""
        if checkpoint:
            model = PeftModel.from_pretrained(self.base, checkpoint, is_trainable=True)
        else:
            model = adapted(lora_config, self.base, target_modules=[*MODULES, "tower"])
        seen = []

        class Keep(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                found = {name: len(pair.A) for name, pair in pairs(model).items()}
                seen.append((found.pop(TOWER), *found.values()))

        self.trainer = run(model, folder, output, callback, Keep(), **options)
        self.trainer.train(resume_from_checkpoint=checkpoint)
        return seen, self.trainer


TOWER = "model.layers.0.mlp.tower"


def test_a_module_without_a_gradient_gets_no_ranks_and_leaves_the_others_theirs(llama_folder, tmp_path):
    seen, _ = Tower().train(llama_folder, tmp_path, RankGrowthCallback(4, interval=2, until=0.7), max_steps=8)
    assert [sum(found) for found in seen[1::2]] == [19, 23, 28, 28]  # 7 modules from 2 to 4 by step 6
    assert {tower for tower, *_ in seen} == {2} and len(set(seen[-1][1:])) > 2  # the others by their saliency
    seen, _ = Tower(2, 3).train(llama_folder, tmp_path, RankGrowthCallback(4, interval=2, until=0.7), max_steps=8)
    assert seen[1][0] == 2 and seen[3][0] > 2  # from when on it has one


def test_a_run_of_whose_modules_too_few_have_a_gradient_is_refused_at_the_first_growth(llama_folder, tmp_path):
    callback = RankGrowthCallback(4, interval=2, until=1.0, limit=4)
    with pytest.raises(ValueError, match=rf"1 of 7 modules .* step 2, e.g. '{TOWER}'.*26 .*needs 28.*target_modules"):
        Tower().train(llama_folder, tmp_path, callback)


def test_a_resumed_run_knows_which_modules_have_had_a_gradient(llama_folder, tmp_path):
    """The tower's is of the first step, where its saliency is 0, for B is."""

    def train(output, **options):
        callback = RankGrowthCallback(4, interval=4, until=1.0, limit=4)
        return Tower(0).train(llama_folder, tmp_path / output, callback, save_strategy="steps", **options)

    seen, whole = train("whole")
    ends, resumed = train("resumed", checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert ends == seen[3:] and seen[-1] == (4,) * 7 and losses(resumed) == losses(whole)


def test_a_run_that_begins_anew_with_a_smaller_batch_grows_no_further_than_its_target(llama_folder, tmp_path):
    model = adapted(lora_config, quantized(llama_folder))
    callbacks = [RankGrowthCallback(4, interval=2, until=1.0), At(3, "memory")]
    run(model, llama_folder, tmp_path, *callbacks, auto_find_batch_size=True).train()
    assert sum(ranks(model)) == 24


@pytest.mark.parametrize("rslora", [False, True])
def test_new_ranks_leave_the_update_and_the_scale_as_they_are(rslora):
    model = adapted(lora_config, use_rslora=rslora)
    randomize(model)
    before = {n: (pair.B @ pair.A).detach() for n, pair in pairs(model).items()}
    scales = [pair.layer.scaling["default"] for pair in pairs(model).values()]
    add_ranks(model, "default", pairs(model), dict.fromkeys(before, 3), torch.Generator().manual_seed(0))
    for name, pair in pairs(model).items():
        assert len(pair.A) == pair.layer.r["default"] == 5
        assert 0 < pair.A[2:].abs().max() <= pair.A.shape[1] ** -0.5
        down, up, r = pair.layer.lora_A["default"], pair.layer.lora_B["default"], 5
        assert down.out_features == up.in_features == r
        alpha = pair.layer.lora_alpha["default"]
        assert alpha / (r**0.5 if rslora else r) == pytest.approx(pair.layer.scaling["default"])
        torch.testing.assert_close((pair.B @ pair.A).detach(), before[name])
    assert [pair.layer.scaling["default"] for pair in pairs(model).values()] == scales
    config = model.peft_config["default"]
    twin = adapted(
        lora_config, use_rslora=rslora, rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern
    )
    assert [pair.layer.scaling["default"] for pair in pairs(twin).values()] == pytest.approx(scales)
    assert ranks(twin) == [5] * 6


def test_an_optimizer_whose_state_has_another_shape_is_refused():
    old, new = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4, 3))
    for state in ({"exp_avg_sq_row": torch.ones(2)}, {"state1": torch.ones(2, 3, dtype=torch.uint8)}):
        optimizer = SimpleNamespace(param_groups=[{"params": [old]}], state={old: state})
        with pytest.raises(ValueError, match=f"keeps '{next(iter(state))}' in another form.*adamw_torch"):
            hand_over(optimizer, old, new)
    optimizer = SimpleNamespace(param_groups=[{"params": [old]}], state={old: {"z": 5 * torch.ones(2, 3), "k": 3}})
    hand_over(optimizer, old, new)
    assert optimizer.state[new]["k"] == 3 and optimizer.state[new]["z"].sum(1).tolist() == [15, 15, 3, 3]


def test_saliency_and_allocation_are_their_formulas():
    A, B, dA, dB = (torch.randn(s, dtype=torch.float64) for s in ((2, 5), (3, 2), (2, 5), (3, 2)))
    each = [(A[i] * dA[i]).abs().mean() + (B[:, i] * dB[:, i]).abs().mean() for i in (0, 1)]
    torch.testing.assert_close(saliency(A, B, dA, dB), (sum(each) / 2).float())
    assert allocate(8, [1, 1, 1], [6, 6, 6], [4.0, 1.0, 2.0]) == [5, 1, 2]
    assert allocate(9, [1, 1, 1], [3, 6, 6], [9.0, 0.0, 0.0]) == [3, 3, 3]  # equal ones evenly
    assert allocate(3, [1, 1, 1], [1, 1, 1], [1.0, math.inf, 0.0]) == [1, 1, 1]
    with pytest.raises(ValueError, match="Cannot give out 10"):
        allocate(10, [1, 1, 1], [3, 3, 3], [1.0, 1.0, 1.0])


def test_what_cannot_grow_is_refused_before_the_first_step(llama_folder, tmp_path):
    def attempt(model, *others, target=4, **arguments):
        run(model, llama_folder, tmp_path, RankGrowthCallback(target, **arguments), *others).train()

    with pytest.raises(ValueError, match="`target` is a mean rank of 1, but .* have 2"):
        attempt(adapted(lora_config), target=1)
    with pytest.raises(ValueError, match=r"can have 53\.3333 \(limit 130, or what their shape allows"):
        attempt(adapted(lora_config), target=65)
    with pytest.raises(ValueError, match=r"chooses its experts by the input.*routing='dense'"):
        attempt(adapted(MoraConfig))
    with pytest.raises(ValueError, match="AdapterPenaltyCallback holds on to the adapter's weights"):
        attempt(adapted(lora_config), AdapterPenaltyCallback("coto"))
    with pytest.raises(ValueError, match="RankGrowthCallback"):
        attempt(adapted(SMoraConfig, r=8))


def test_needs_are_a_running_mean_of_saliencies():
    model = adapted(dense)
    callback = RankGrowthCallback(4, memory=0.75)
    callback._factors = pairs(model)
    callback._used = torch.zeros(len(callback._factors), dtype=torch.bool)
    found, generator = [], torch.Generator().manual_seed(0)
    for _ in range(3):
        for A, B, *_ in callback._factors.values():
            A.grad, B.grad = (torch.randn(p.shape, generator=generator) for p in (A, B))
        found.append(torch.stack([saliency(A, B, A.grad, B.grad) for A, B, *_ in callback._factors.values()]))
        callback.on_pre_optimizer_step(None, None, None)
    want = 0.75 * (0.75 * found[0] + 0.25 * found[1]) + 0.25 * found[2]
    torch.testing.assert_close(callback._needs, want)
