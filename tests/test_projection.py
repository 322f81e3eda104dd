"""Orthogonal projection in TRL's own trainer over an NF4 base: what is protected stays, to 1e-5."""

import json
import math
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import At, given_statistics, inputs_of, losses, quantized, ranks, texts, tiny_llama
from peft import AdaLoraConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_linalg import covariance
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import SFTConfig, SFTTrainer

from peft_mora import FlyLoraConfig, LoriConfig, MoraConfig, start_task
from peft_mora.fingerprint import fingerprint
from peft_mora.inputs import InputStatistics
from trl_callbacks import OrthogonalProjectionCallback
from trl_callbacks.factors import trainable_factors
from trl_callbacks.subspace import Subspace


def sft(model, folder, output, callback=None, **kwargs) -> SFTTrainer:
    callbacks = [] if callback is None else [callback] if isinstance(callback, TrainerCallback) else callback
    options = {"weight_decay": 0.01, "save_strategy": "no", **kwargs}
    return helpers.sft(model, folder, output, callbacks=callbacks, **options)


ROUTINGS = ("task", "bank", "dense")


@pytest.fixture(scope="module")
def first_task(llama_folder, tmp_path_factory):
    """{kind: folder} of an adapter trained on task one, with its subspace at energy .9."""
    folders = {}
    for kind in (*ROUTINGS, "lora"):
        output = tmp_path_factory.mktemp(f"one-{kind}")
        torch.manual_seed(0)
        config = LoraConfig(r=4) if kind == "lora" else MoraConfig(r=4, routing=kind)
        config.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        model = get_peft_model(quantized(llama_folder), config)
        trainer = sft(model, llama_folder, output, OrthogonalProjectionCallback(energy=0.9))
        trainer.train()
        trainer.save_model()
        folders[kind] = output
    return folders


def second_task(kind, folders, llama_folder, active=("two", "one")):
    """The model that goes on to task two, with fresh weights in training; LoRAs are `active` in this order."""
    torch.manual_seed(1)
    if kind != "lora":
        model = PeftModel.from_pretrained(quantized(llama_folder), folders[kind], is_trainable=True)
        start_task(model, "two")
        return model
    model = PeftModel.from_pretrained(quantized(llama_folder), folders[kind], adapter_name="one")
    model.add_adapter("two", LoraConfig(r=4, target_modules=model.peft_config["one"].target_modules))
    model.base_model.set_adapter(list(active))
    model.set_requires_grad("one", requires_grad=False)
    return model


class Worst(TrainerCallback):
    """The largest ‖ΔW V‖ / ‖ΔW‖ of any module after any step, from the plain product in float64."""

    def __init__(self, memory):
        self.subspace = Subspace.load(memory)
        self.leak, self.moved = 0.0, 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, pair in trainable_factors(model, None)[1].items():
            delta = pair.B.detach().double() @ pair.A.detach().double()
            V = self.subspace.right[self.subspace.group_of(name)].double()
            if delta.norm() > 0:
                self.leak = max(self.leak, (delta @ V).norm().item() / delta.norm().item())
            self.moved = max(self.moved, delta.norm().item())


@pytest.fixture
def second(first_task, llama_folder, tmp_path):
    """Make the run of task two: its model, its trainer under `callback(memory, **arguments)` and `callbacks` after it,
    and a `Worst` of the first task's memory. `options` are SFTConfig's."""

    def make(
        kind="task", callback=OrthogonalProjectionCallback, callbacks=(), output="two", options=None, **arguments
    ):
        model, memory = second_task(kind, first_task, llama_folder), first_task[kind] / "subspace"
        worst, projection = Worst(memory), callback(**{"memory": memory, **arguments})
        made = [projection, worst, *callbacks]
        return model, sft(model, llama_folder, tmp_path / output, made, **(options or {})), worst

    return make


class GradientOnly(OrthogonalProjectionCallback):
    def on_optimizer_step(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("kind", ["task", pytest.param("bank", marks=pytest.mark.slow), "dense", "lora"])
def test_adamw_steps_stay_out_of_the_protected_span(kind, second):
    leaks = {}
    for callback in (OrthogonalProjectionCallback, GradientOnly):
        model, trainer, worst = second(kind, callback)
        refused = pytest.raises(ValueError, match="saved are not those that were projected")
        with refused if callback is GradientOnly else nullcontext():
            trainer.train()
        assert worst.moved > 1e-2
        leaks[callback] = worst.leak
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert leaks[OrthogonalProjectionCallback] <= 1e-5
    assert leaks[GradientOnly] >= 1e-2


@pytest.mark.parametrize("start", ["contrast", "osrm"])
def test_inputs_of_one_module_are_held_at_a_time(start, second, monkeypatch):
    """Where the budget has room for one Σ x xᵀ, no more than one is there when the model is called for the next. All
    of them would not fit beside a large model."""
    each, there = InputStatistics.each, []

    def watched(self, sets):
        found = []

        def look(names):
            there.append(sum(C() is not None for C in found))
            looked = self.look(names)
            found.extend(weakref.ref(C) for C in looked.values())
            return looked

        yield from each(replace(self, look=look, budget_gib=0), sets)

    monkeypatch.setattr(InputStatistics, "each", watched)
    second("dense", start=start)[1].train()
    assert len(there) == 2 * 8 and max(there) == 1  # before the first step and after the last


@pytest.mark.parametrize("start", ["random", "inputs", "contrast"])
def test_full_energy_keeps_the_outputs_on_protected_inputs(start, first_task, llama_folder, tmp_path):
    """Inputs of a module are stored, protected in full, and give the same outputs after training on task two."""
    model = second_task("dense", first_task, llama_folder)
    factors = trainable_factors(model, None)[1]
    generator = torch.Generator().manual_seed(5)
    subspace = Subspace.load(first_task["dense"] / "subspace")
    stored = {}
    for name, pair in factors.items():
        group = subspace.group_of(name)
        if group not in stored:
            stored[group] = torch.randn(20, pair.A.shape[1], generator=generator)
            subspace.right[group] = torch.linalg.qr(stored[group].T)[0]
    subspace.save(tmp_path / "memory")
    model.eval()
    before = {name: pair.layer(stored[subspace.group_of(name)]) for name, pair in factors.items()}
    model.train()
    callback = OrthogonalProjectionCallback(tmp_path / "memory", energy=1.0, start=start)
    sft(model, llama_folder, tmp_path / "two", callback).train()
    model.eval()
    other = torch.randn(20, 64, generator=generator)
    for name, pair in trainable_factors(model, None)[1].items():
        after = pair.layer(stored[subspace.group_of(name)])
        scale = before[name].norm()
        assert (after - before[name]).norm() <= 1e-5 * scale, name
        if pair.A.shape[1] == 64:
            update = torch.nn.functional.linear(torch.nn.functional.linear(other, pair.A), pair.B)
            assert update.norm() > 1e-3 * scale  # other inputs do get an update


def test_metrics_reach_the_trainers_logs_and_what_task_two_used_the_memory(first_task, second, tmp_path):
    _, trainer, _ = second(energy=0.97)
    trainer.train()
    one, two = Subspace.load(first_task["task"] / "subspace"), Subspace.load(tmp_path / "two" / "subspace")
    ranks = [V.shape[1] for V in one.right.values()]
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 6
    for entry in entries:
        assert entry["protected_rank_mean"] == pytest.approx(sum(ranks) / len(ranks))
        assert entry["protected_rank_max"] == max(ranks)
        assert 0 <= entry["leakage"] <= 1e-5
    removed = [entry["gradient_removed"] for entry in entries[1:]]  # A has no gradient in the first step: B is 0
    assert all(0 < share <= 1 for share in removed)
    assert [task["name"] for task in two.tasks] == ["initial", "two"] and two.groups == one.groups
    grown = 0
    for group, V in two.right.items():
        k = one.right[group].shape[1]
        assert torch.equal(V[:, :k], one.right[group])
        torch.testing.assert_close(V.T @ V, torch.eye(V.shape[1]), atol=1e-5, rtol=0)
        grown += V.shape[1] - k
    assert grown > 0


def test_gradients_are_projected_before_the_step_and_their_share_is_logged(second):
    """Adam's moments see none of the protected directions."""
    shares, leaks = [], []

    class Seen(OrthogonalProjectionCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            grads = [[p.grad for p in c.parameters if p.grad is not None] for c in self._constraints]
            before = [torch.cat([g.double() for g in some]) if some else torch.zeros(1) for some in grads]
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            left = 0.0
            for constraint, some in zip(self._constraints, grads, strict=True):
                for g in map(torch.Tensor.double, some):
                    leaks.append(float((g @ constraint.basis.double()).norm() / g.norm().clamp_min(1e-30)))
                    left += float(g.square().sum())
            total = float(sum(x.square().sum() for x in before))
            shares.append(((total - left) / total) ** 0.5 if total else 0.0)

    _, trainer, _ = second("dense", Seen, start="random")
    trainer.train()
    logged = [entry.get("gradient_removed", 0.0) for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(shares, rel=1e-3, abs=1e-6) and max(shares) > 0.05
    assert max(leaks) <= 1e-5


def test_run_resumed_in_the_middle_of_a_task_repeats_the_unbroken_one(second, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    run = {"start": "contrast", "room": 6, "options": options}
    _, whole, _ = second(output="whole", **run)
    whole.train()
    _, resumed, worst = second(output="resumed", **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert worst.leak <= 1e-5
    saved = load_file(tmp_path / "whole" / "checkpoint-3" / "adapter_model.safetensors")
    assert {t.dtype for name, t in saved.items() if "mora_A" in name} == {torch.float32}


@pytest.mark.parametrize(
    "began, start",
    [
        ("two one", "contrast"),
        ("one two", "random"),
        pytest.param("two one", "random", marks=pytest.mark.slow),
        pytest.param("one two", "contrast", marks=pytest.mark.slow),
    ],
)
def test_a_second_lora_resumes_beside_the_first_and_repeats_the_unbroken_run(
    start, began, first_task, llama_folder, tmp_path
):
    """transformers leaves the first active adapter alone active, and makes the optimizer of its weights."""

    def run(output, active):
        model = second_task("lora", first_task, llama_folder, active.split())
        callback = OrthogonalProjectionCallback(first_task["lora"] / "subspace", start=start)
        options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
        return sft(model, llama_folder, tmp_path / output, callback, **options)

    whole = run("whole", began)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = run("resumed", "two one")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    assert resumed.model.active_adapters == began.split()
    for (name, p), q in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad == (".two." in name), name
    with pytest.raises(ValueError, match=r"trains adapter 'two'.*here 'one'.*set_adapter\(\['two', 'one'\]\)"):
        run("wrong", "one two").train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "orthogonal_projection.safetensors").unlink()
    with pytest.raises(ValueError, match="does not say which .*'one', 'two'.* were active"):
        run("silent", "two one").train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    "start, match", [("contrast", "has no orthogonal_projection"), ("random", "without this callback")]
)
def test_checkpoint_that_was_trained_without_the_callback_is_refused(
    start, match, first_task, second, llama_folder, tmp_path
):
    model = second_task("task", first_task, llama_folder)
    sft(model, llama_folder, tmp_path / "free", save_strategy="steps", save_steps=3).train()
    _, trainer, _ = second(start=start)
    with pytest.raises(ValueError, match=match):
        trainer.train(resume_from_checkpoint=str(tmp_path / "free" / "checkpoint-3"))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": False},
        {"max_grad_norm": 1e-3},
        {"optim": "adamw_torch"},
        {"optim": "lion_32bit"},
        {"optim": "paged_adamw_8bit"},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
def test_guarantee_holds_with(options, second):
    _, trainer, worst = second(options=options)
    trainer.train()
    assert worst.moved > 0 and worst.leak <= 1e-5


class ScheduleFree(torch.optim.Optimizer):
    """z steps, x is the mean of all z, and the weights are .9 x + .1 z in training and x in evaluation."""

    def __init__(self, model, key):
        self.key = key
        super().__init__([p for p in model.parameters() if p.requires_grad], {"lr": 0.03, "train_mode": True, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault(self.key, p.detach().clone())
                x = p.lerp(z, 1 - 1 / 0.9)
                z.sub_(group["lr"] * p.grad.sign())
                p.copy_(x.lerp_(z, 1 / group["k"]).lerp_(z, 0.1))

    @torch.no_grad()
    def _swap(self, mode, share):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    p.lerp_(self.state[p].get(self.key, p), share)
            group["train_mode"] = mode

    def eval(self):
        self._swap(False, 1 - 1 / 0.9)

    def train(self):
        self._swap(True, 0.1)


def leak_of_file(folder, memory):
    """The largest ‖ΔW V‖ / ‖ΔW‖ in a saved LoRA."""
    tensors, subspace = load_file(folder / "adapter_model.safetensors"), Subspace.load(memory)
    found = []
    for group, names in subspace.groups.items():
        for name in names:
            A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
            found.append((B @ A @ subspace.right[group].double()).norm().item() / (B @ A).norm().item())
    return max(found)


@pytest.mark.parametrize("key", ["z", "unknown"])
def test_weights_that_are_saved_are_held_also_where_others_are_stepped(key, first_task, second, tmp_path):
    """A schedule-free optimizer saves an average; where its parts cannot be reached, the run is refused."""
    memory = first_task["lora"] / "subspace"
    options = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps"}
    model, trainer, _ = second("lora", output=".", options=options)
    trainer.optimizer = ScheduleFree(model, key)
    if key == "z":
        trainer.train()
        assert leak_of_file(tmp_path / "checkpoint-3" / "two", memory) <= 1e-5
        assert leak_of_file(tmp_path / "checkpoint-6" / "two", memory) <= 1e-5
    else:
        with pytest.raises(ValueError, match="saved are not those that were projected"):
            trainer.train()
        assert leak_of_file(tmp_path / "checkpoint-3" / "two", memory) >= 5e-3
    leakage = [entry["leakage"] for entry in trainer.state.log_history if "leakage" in entry]
    assert max(leakage) <= 1e-5 if key == "z" else leakage[-1] >= 5e-3  # of what is saved


def test_steps_within_the_backward_are_projected_after_it(second):
    """As layer-wise optimizers do: no gradient is left when the trainer steps."""
    model, trainer, worst = second("task")

    def step(p):
        p.data.add_(p.grad, alpha=-0.1)
        p.grad = None

    for p in (p for p in model.parameters() if p.requires_grad):
        p.register_post_accumulate_grad_hook(step)
    trainer.args.optim = "galore_adamw_layerwise"
    trainer.optimizer = LayerWiseDummyOptimizer()
    trainer.train()
    assert worst.moved > 1e-3 and worst.leak <= 1e-5


def test_an_average_over_the_steps_starts_where_they_start(first_task, llama_folder, tmp_path):
    class Average(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.average = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}

        def on_step_end(self, args, state, control, **kwargs):
            for p, average in self.average.items():
                average.lerp_(p.detach(), 0.1)

        def on_train_end(self, args, state, control, **kwargs):
            for p, average in self.average.items():
                p.data.copy_(average)

    memory = first_task["lora"] / "subspace"
    model = second_task("lora", first_task, llama_folder)
    worst = Worst(memory)
    callbacks = [Average(), OrthogonalProjectionCallback(memory)]
    sft(model, llama_folder, tmp_path, callbacks).train()
    worst.on_step_end(None, None, None, model=model)
    assert worst.leak <= 1e-5 and worst.moved > 0


def test_a_run_that_begins_anew_with_a_smaller_batch_goes_on(second, tmp_path):
    """auto_find_batch_size: memory runs out in step 3, and the trainer begins again with the weights as they are."""
    out = At(3, "memory")
    model, trainer, worst = second("lora", callbacks=[out], options={"auto_find_batch_size": True}, room=6)
    trainer.train()
    assert out.done and trainer.state.global_step == 6
    assert worst.leak <= 1e-5 and worst.moved > 1e-2
    for pair in trainable_factors(model, None)[1].values():
        assert torch.linalg.matrix_rank(pair.A.detach(), rtol=1e-4) <= 6
    assert len(Subspace.load(tmp_path / "two" / "subspace").tasks) == 2


def test_a_skipped_step_moves_nothing_and_leaves_the_metrics_finite(second):
    """What fp16's loss scaling does on overflow: gradients that are not finite, and a step that is left out."""

    class Overflowing(OrthogonalProjectionCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 2:
                for pair in trainable_factors(model, None)[1].values():
                    pair.A.grad.fill_(math.inf)
                self.before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
                self.step, optimizer.step = optimizer.step, lambda *a, **k: None
            super().on_pre_optimizer_step(args, state, control, **kwargs)

        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            super().on_optimizer_step(args, state, control, **kwargs)
            if state.global_step == 2:
                optimizer.step = self.step
                after = [p.detach() for p in model.parameters() if p.requires_grad]
                torch.testing.assert_close(after, self.before, rtol=1e-5, atol=1e-6)

    _, trainer, worst = second(callback=Overflowing)
    trainer.train()
    assert worst.leak <= 1e-5
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "gradient_removed" not in entries[2]
    assert all(math.isfinite(entry["gradient_removed"]) for entry in entries[3:])


class Start(TrainerCallback):
    """A of each module before the first step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.A = {name: pair.A.detach().clone() for name, pair in trainable_factors(model, None)[1].items()}


def test_start_from_inputs_sees_more_of_the_new_task(second, llama_folder):
    seen = {}
    for start in ("random", "inputs", "contrast"):
        began = Start()
        model, trainer, _ = second(start=start, callbacks=[began], output=start, options={"max_steps": 1})
        trainer.train()
        tokenizer = AutoTokenizer.from_pretrained(llama_folder)
        with inputs_of({"gate": model.get_base_model().model.layers[1].mlp.gate_proj}) as inputs, torch.no_grad():
            model(**tokenizer(list(texts()["text"]), return_tensors="pt"))
        A = began.A["model.layers.1.mlp.gate_proj"]
        seen[start] = (inputs["gate"][0].float() @ A.T).norm().item() / A.norm().item()
    assert seen["inputs"] > 1.5 * seen["random"]
    assert seen["contrast"] > 1.2 * seen["random"]


@pytest.mark.parametrize("start", ["inputs", "contrast"])
def test_room_holds_the_rows_to_a_few_directions(start, second):
    began = Start()
    model, trainer, worst = second("dense", start=start, room=3, callbacks=[began])
    trainer.train()
    assert worst.leak <= 1e-5 and worst.moved > 1e-2
    for name, pair in trainable_factors(model, None)[1].items():
        both = torch.cat([began.A[name], pair.A.detach()]).double()
        values = torch.linalg.svdvals(both)  # 4 rows at the start and 4 at the end, in 3 dimensions
        assert values[2] > 1e-3 and values[3] < 1e-5 * values[0]
        assert (began.A[name] - pair.A.detach()).norm() > 1e-3


def test_osrm_starts_where_the_other_tasks_inputs_are_weakest_and_holds_nothing(llama_folder, tmp_path):
    base = tiny_llama()
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"]))
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    others = []
    for task in (1, 2):
        memory = Subspace("inputs", fingerprint(base), seen_energy=1.0)
        spread = {name: covariance(64, 64, seed=10 * task + i, decay=0.9) for i, name in enumerate(names)}
        memory.add_inputs(given_statistics(spread, {name: (name,) for name in names}), 0.5, None)
        memory.save(tmp_path / str(task))
        others.append(spread)
    C = {name: others[0][name] / others[0][name].trace() + others[1][name] / others[1][name].trace() for name in names}
    began, callback = Start(), OrthogonalProjectionCallback([tmp_path / "1", tmp_path / "2"], start="osrm")
    ratios = []

    class Ratio(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            found = {n: pair.A.detach().double() for n, pair in trainable_factors(model, None)[1].items()}
            own = {name: callback._now.old_covariance(name, torch.float64) for name in names}
            over = sum((A @ C[n] @ A.T).trace() / 2 for n, A in found.items())
            ratios.append(math.sqrt(over / sum((A @ own[n] @ A.T).trace() for n, A in found.items())))

    trainer = sft(model, llama_folder, tmp_path / "run", [callback, began, Ratio()], max_steps=3)
    trainer.train()
    for name, A in began.A.items():
        values = torch.linalg.eigvalsh(C[name])
        torch.testing.assert_close(A @ A.T, torch.eye(3), atol=1e-5, rtol=0)
        weakest = float((A.double() @ C[name] @ A.double().T).trace())
        assert weakest == pytest.approx(float(values[:3].sum()), rel=1e-3) and weakest < values[3:6].sum() / 1.3
        V = Subspace.load(tmp_path / "1").right[name]
        moved = trainable_factors(model, None)[1][name].A.detach() - A
        assert (moved @ V).norm() > 1e-3
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["osrm_ratio"] for entry in logged] == pytest.approx(ratios, rel=1e-3)
    assert ratios[0] < ratios[-1] and "leakage" not in logged[0]
    whole = Subspace.load(tmp_path / "run" / "subspace")
    assert {F.shape for F in whole.seen.values()} == {(64, 64)} and set(whole.weights.values()) == {3}


def test_osrm_needs_the_other_tasks_inputs_and_a_fresh_adapter(first_task, llama_folder, tmp_path):
    memory = first_task["lora"] / "subspace"
    model = PeftModel.from_pretrained(quantized(llama_folder), first_task["lora"], is_trainable=True)
    with pytest.raises(ValueError, match="trained already.*add_adapter"):
        sft(model, llama_folder, tmp_path, OrthogonalProjectionCallback(memory, start="osrm")).train()
    blind = Subspace.load(memory)
    blind.seen, blind.weights = {}, {}
    blind.save(tmp_path / "blind")
    model = second_task("lora", first_task, llama_folder)
    with pytest.raises(ValueError, match="No `memory` says what goes into module.*whole=True"):
        sft(model, llama_folder, tmp_path, OrthogonalProjectionCallback(tmp_path / "blind", start="osrm")).train()


def test_base_weights_protect_the_first_task_on_both_sides(llama_folder, tmp_path):
    model = get_peft_model(quantized(llama_folder), MoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    weight = model.get_base_model().model.layers[0].mlp.down_proj.get_base_weight().double()
    sft(model, llama_folder, tmp_path, OrthogonalProjectionCallback(source="base_weights", max_rank=20)).train()
    pair = trainable_factors(model, None)[1]["model.layers.0.mlp.down_proj"]
    delta = pair.B.detach().double() @ pair.A.detach().double()
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    assert delta.norm() > 1e-3
    assert (delta @ Vh[:20].T).norm() <= 1e-5 * delta.norm()
    assert (U[:, :20].T @ delta).norm() <= 1e-5 * delta.norm()


def test_base_weights_without_energy_keep_more_where_a_layer_changes_less(llama_folder, tmp_path):
    base = tiny_llama()
    base.model.layers[1].mlp.down_proj.weight.data *= 300  # its output is another direction than its input
    model = get_peft_model(base, MoraConfig(r=4, target_modules=["q_proj"]))
    callback = OrthogonalProjectionCallback(source="base_weights", energy=None)
    sft(model, llama_folder, tmp_path, callback, max_steps=1).train()
    ranks = [V.shape[1] for V in Subspace.load(tmp_path / "subspace").right.values()]
    assert ranks[0] == round(0.8 * 64)
    assert round(0.1 * 64) <= ranks[1] < ranks[0]


def test_base_weights_without_energy_keep_as_many_where_the_run_resumes(llama_folder, tmp_path):
    """A trained adapter changes how much a layer changes what goes through it."""

    def run(output):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
        callback = OrthogonalProjectionCallback(source="base_weights", energy=None)
        options = {"learning_rate": 0.03, "save_strategy": "steps", "save_steps": 3}
        return sft(model, llama_folder, tmp_path / output, callback, **options)

    whole, resumed = run("whole"), run("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    one, other = (Subspace.load(tmp_path / name / "subspace") for name in ("whole", "resumed"))
    assert {name: V.shape for name, V in one.right.items()} == {name: V.shape for name, V in other.right.items()}


@pytest.mark.parametrize(
    "given", [{"source": ["inputs"]}, {"start": ""}, {"start": 0}, {"memory": ""}, {"memory": ["a", ""]}]
)
def test_arguments_that_are_none_are_refused_by_name(given):
    with pytest.raises(ValueError, match=f"`{next(iter(given))}` must be"):
        OrthogonalProjectionCallback(**given)


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_past_adapters_are_avoided_without_a_memory(kind, second, tmp_path):
    model, trainer, _ = second(kind, memory=None, source="past_adapters")
    old = {name: pair.past_A[0].detach().double() for name, pair in trainable_factors(model, None)[1].items()}
    trainer.train()
    for name, pair in trainable_factors(model, None)[1].items():
        delta = pair.B.detach().double() @ pair.A.detach().double()
        assert (delta @ old[name].T).norm() <= 1e-5 * delta.norm() * old[name].norm()
    assert {V.shape[1] for V in Subspace.load(tmp_path / "two" / "subspace").right.values()} == {8}


def test_modules_that_no_past_adapter_had_are_free(llama_folder, tmp_path):
    model = get_peft_model(quantized(llama_folder), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["two", "one"])
    model.set_requires_grad("one", requires_grad=False)
    trainer = sft(model, llama_folder, tmp_path, OrthogonalProjectionCallback(source="past_adapters"))
    trainer.train()
    pairs = trainable_factors(model, None)[1]
    assert {name.rsplit(".", 1)[-1]: len(pair.past_A) for name, pair in pairs.items()} == {"q_proj": 1, "v_proj": 0}
    for pair in pairs.values():
        delta = pair.B.detach().double() @ pair.A.detach().double()
        assert delta.norm() > 1e-3
        for A in pair.past_A:
            assert (delta @ A.detach().double().T).norm() <= 1e-5 * delta.norm() * A.norm()
    assert max(entry.get("leakage", 0) for entry in trainer.state.log_history) <= 1e-5


def test_a_callback_that_is_used_again_sketches_the_new_run_alone(llama_folder, tmp_path):
    callback = OrthogonalProjectionCallback(source="gradients")
    found = []
    for output in ("one", "two"):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), MoraConfig(r=4, target_modules=["q_proj"]))
        sft(model, llama_folder, tmp_path / output, callback, max_steps=2).train()
        found.append(Subspace.load(tmp_path / output / "subspace").right)
    assert {name: V.shape for name, V in found[0].items()} == {name: V.shape for name, V in found[1].items()}
    for name, V in found[0].items():
        torch.testing.assert_close(found[1][name].abs(), V.abs(), atol=1e-4, rtol=1e-3)


def test_gradients_are_sketched_and_the_sketch_survives_a_resume(llama_folder, tmp_path):
    def run(output):
        torch.manual_seed(0)
        model = get_peft_model(quantized(llama_folder), MoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        callback = OrthogonalProjectionCallback(source="gradients", energy=0.98)
        return sft(model, llama_folder, output, callback, save_strategy="steps", save_steps=3)

    run(tmp_path / "whole").train()
    resumed = run(tmp_path / "whole")
    (tmp_path / "whole" / "subspace").rename(tmp_path / "expected")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, found = Subspace.load(tmp_path / "expected"), Subspace.load(tmp_path / "whole" / "subspace")
    assert all(V.shape[1] > 0 for V in expected.right.values())
    for name, V in expected.right.items():
        torch.testing.assert_close(found.right[name].abs(), V.abs(), atol=1e-4, rtol=1e-3)
    elsewhere = run(tmp_path / "elsewhere")
    (tmp_path / "whole" / "checkpoint-3" / "orthogonal_projection.safetensors").unlink()
    with pytest.raises(ValueError, match="has no orthogonal_projection.safetensors"):
        elsewhere.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


@pytest.mark.parametrize("skipped", [True, False])
def test_gradients_that_are_not_finite_are_no_directions(skipped, llama_folder, tmp_path):
    """Of a step that fp16's scaler skips nothing is taken, also where one module's gradient is finite; of one that was
    made the run has diverged."""

    class Broken(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.before = dict(source.sketches)

        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 2:
                pair = trainable_factors(model, None)[1]["model.layers.1.self_attn.q_proj"]
                pair.A.grad.fill_(math.nan)
                if skipped:
                    optimizer.step = lambda *args, **kwargs: None
                    optimizer._is_overflow = True

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 3:
                self.after = dict(source.sketches)
                del optimizer.step
                optimizer._is_overflow = False

    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), MoraConfig(r=4, target_modules=["q_proj"]))
    callback, broken = OrthogonalProjectionCallback(source="gradients"), Broken()
    source = callback.source
    trainer = sft(model, llama_folder, tmp_path, [callback, broken])
    if not skipped:
        with pytest.raises(ValueError, match="layers.1.self_attn.q_proj' is NaN or inf"):
            trainer.train()
        return
    trainer.train()
    assert broken.before.keys() == broken.after.keys()
    assert all(torch.equal(broken.before[name], broken.after[name]) for name in broken.before)
    assert all(V.shape[1] > 0 for V in Subspace.load(tmp_path / "subspace").right.values())


def test_inputs_that_are_not_finite_are_refused_and_leave_no_memory(llama_folder, tmp_path):
    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.get_input_embeddings().weight.data[5] = math.inf

    model = get_peft_model(tiny_llama(), MoraConfig(r=4, target_modules=["q_proj"]))
    trainer = sft(model, llama_folder, tmp_path, [OrthogonalProjectionCallback(), Broken()], max_steps=1)
    with pytest.raises(ValueError, match=r"inputs of module 'model\.layers\.0\.self_attn\.q_proj' are not finite"):
        trainer.train()
    assert not (tmp_path / "subspace").exists()


def test_the_adapter_is_kept_where_its_subspace_cannot_be_written(llama_folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    model = get_peft_model(tiny_llama(), MoraConfig(r=4, target_modules=["q_proj"]))
    trainer = sft(model, llama_folder, tmp_path, [OrthogonalProjectionCallback()], max_steps=1)
    monkeypatch.setattr(Subspace, "save", full)
    with pytest.raises(RuntimeError, match=r"OSError: No space left on device\. The adapter is in .*stopped-1"):
        trainer.train()
    assert (tmp_path / "stopped-1/adapter_model.safetensors").exists()


def test_a_task_that_adapts_fewer_modules_is_remembered_in_all(llama_folder, tmp_path):
    """Its inputs to the others go through what the first task made of them, and the third may change that."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), adapter_name="one")
    sft(model, llama_folder, tmp_path / "one", OrthogonalProjectionCallback(max_rank=2)).train()
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["two", "one"])
    model.set_requires_grad("one", requires_grad=False)
    callback = OrthogonalProjectionCallback(tmp_path / "one" / "subspace", energy=0.9, calibration_batches=12)
    trainer = sft(model, llama_folder, tmp_path / "two", callback)
    trainer.train()
    one, two = (Subspace.load(tmp_path / name / "subspace") for name in ("one", "two"))
    assert one.groups == two.groups and all(two.weights[group] > weight for group, weight in one.weights.items())
    batches = list(trainer.get_train_dataloader())
    with inputs_of({"down": model.get_base_model().model.layers[1].mlp.down_proj}) as inputs, torch.no_grad():
        for batch in batches:
            model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    rows = [x[batch["attention_mask"].bool()] for x, batch in zip(inputs["down"], batches, strict=True)]
    x, V = torch.cat(rows), two.right["model.layers.1.mlp.down_proj"]
    assert (x @ V).square().sum() >= 0.9 * (1 - 1e-5) * x.square().sum()
    one.source = "gradients"
    one.save(tmp_path / "gradients")
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    callback = OrthogonalProjectionCallback(tmp_path / "gradients", source="gradients")
    with pytest.raises(ValueError, match="adapted 2 modules that this adapter does not.*down_proj"):
        sft(model, llama_folder, tmp_path / "three", callback).train()


def test_the_first_tasks_run_is_as_without_the_callback_also_with_dropout(llama_folder, tmp_path):
    def run(name, callback=None):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
        trainer = sft(model, llama_folder, tmp_path / name, callback, max_steps=3)
        trainer.train()
        return losses(trainer)

    assert run("with", OrthogonalProjectionCallback()) == run("without")


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(16, 2)


def tiny_moe():
    return AutoModelForCausalLM.from_config(
        MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    )


@pytest.mark.parametrize(
    "base, config, match",
    [
        (tiny_llama, LoriConfig(r=4, target_modules=["q_proj"]), "Use MoraConfig .*LORI, FLYLORA.* A that is frozen"),
        (tiny_llama, FlyLoraConfig(r=4, top_k=2, target_modules=["q_proj"]), "LORI, FLYLORA.* A that is frozen"),
        (tiny_llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "Use MoraConfig"),
        (tiny_llama, LoraConfig(target_modules=["q_proj"], use_dora=True), "DoraLinearVariant.*Use LoraConfig"),
        (tiny_llama, LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5]), "ALoraLinearVariant"),
        (tiny_llama, LoraConfig(target_modules=["q_proj"], lora_bias=True), "Use LoraConfig without it"),
        (tiny_llama, LoraConfig(target_modules=["q_proj", "embed_tokens"]), "Leave embeddings out"),
        (tiny_llama, AdaLoraConfig(target_modules=["q_proj"], total_step=9), "singular values and ranks"),
        (tiny_moe, LoraConfig(target_parameters=["experts.down_proj"]), "'down_proj', whose input.*target_parameters"),
        (
            tiny_moe,
            MoraConfig(routing="dense", target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
            "'down_proj', whose input.*target_parameters",
        ),
        (Attention, LoraConfig(target_modules=["attention"]), "Leave nn.MultiheadAttention out"),
    ],
    ids=[
        "lori",
        "flylora",
        "prompt",
        "dora",
        "alora",
        "bias",
        "embedding",
        "adalora",
        "parameters",
        "ours",
        "attention",
    ],
)
def test_adapters_that_it_cannot_protect_are_refused_with_what_would_work(base, config, match, tmp_path):
    model = get_peft_model(base(), config)
    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=match):
        OrthogonalProjectionCallback().on_init_end(arguments, None, None, model=model)


@pytest.mark.parametrize("kind", ["task", "lora"])
def test_going_on_with_trained_weights_is_refused(kind, first_task, llama_folder, tmp_path):
    model = PeftModel.from_pretrained(quantized(llama_folder), first_task[kind], is_trainable=True)
    trainer = sft(model, llama_folder, tmp_path, OrthogonalProjectionCallback(first_task[kind] / "subspace"))
    with pytest.raises(ValueError, match="start_task"):
        trainer.train()


def test_data_without_inputs_is_refused_before_the_training_and_not_after_it(llama_folder, tmp_path):
    """GRPO's loader gives prompts."""
    model = get_peft_model(quantized(llama_folder), MoraConfig(r=4, target_modules=["q_proj"]))
    callback = OrthogonalProjectionCallback()
    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    state = SimpleNamespace(global_step=0)
    prompts = DataLoader([{"prompt": "the cat"}] * 8, collate_fn=list)
    with pytest.raises(ValueError, match="no input_ids, but records.*source='gradients' or 'past_adapters'"):
        callback.on_train_begin(arguments, state, None, model=model, train_dataloader=prompts)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", False])
def test_a_start_from_weights_of_its_own_is_named(init, first_task, llama_folder, tmp_path):
    model = PeftModel.from_pretrained(tiny_llama(), first_task["lora"], adapter_name="one")
    model.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    model.base_model.set_adapter(["two", "one"])
    model.set_requires_grad("one", requires_grad=False)
    subspace = Subspace.load(first_task["lora"] / "subspace")
    subspace.model = fingerprint(model.get_base_model())
    subspace.save(tmp_path / "memory")
    trainer = sft(model, llama_folder, tmp_path / "two", OrthogonalProjectionCallback(tmp_path / "memory"))
    with pytest.raises(ValueError, match=f"init_lora_weights={init!r}, with which B is not 0"):
        trainer.train()


@pytest.mark.parametrize("start", ["random", "contrast"])
def test_a_model_of_pictures_keeps_its_first_task(start, tmp_path):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(8)]
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1", "fc2"])
    model = get_peft_model(ViTForImageClassification(config), lora, adapter_name="one")

    def train(name, callback):
        arguments = {"max_steps": 3, "report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
        trainer = Trainer(model, TrainingArguments(str(tmp_path / name), **arguments), train_dataset=data)
        trainer.add_callback(callback)
        trainer.train()
        return [entry["leakage"] for entry in trainer.state.log_history if "leakage" in entry]

    train("one", OrthogonalProjectionCallback())
    model.add_adapter("two", lora)
    model.base_model.set_adapter(["two", "one"])
    model.set_requires_grad("one", requires_grad=False)
    leakage = train("two", OrthogonalProjectionCallback(tmp_path / "one" / "subspace", start=start))
    assert len(leakage) == 3 and 0 < max(leakage) <= 1e-5


def test_other_weights_and_a_second_adapter_in_training_are_refused(first_task, second, llama_folder, tmp_path):
    model, trainer, _ = second()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="more parameters are trainable"):
        trainer.train()
    model = second_task("lora", first_task, llama_folder)
    model.set_requires_grad("one", requires_grad=True)
    with pytest.raises(ValueError, match="Several adapters are in training"):
        sft(model, llama_folder, tmp_path, OrthogonalProjectionCallback(first_task["lora"] / "subspace"))


def test_a_memory_of_other_modules_another_source_or_its_own_output_is_refused(first_task, second, tmp_path):
    memory = first_task["task"] / "subspace"

    def attempt(**arguments):
        second(**arguments)[1].train()

    fewer = Subspace.load(memory)
    fewer.groups.pop("model.layers.1.mlp.down_proj")
    fewer.right.pop("model.layers.1.mlp.down_proj")
    fewer.save(tmp_path / "fewer")
    with pytest.raises(ValueError, match=r"no basis for module 'model\.layers\.1\.mlp\.down_proj'"):
        attempt(memory=tmp_path / "fewer")
    with pytest.raises(ValueError, match="source='inputs': go on with that"):
        attempt(source="gradients")
    with pytest.raises(ValueError, match="output_dir of its own"):
        attempt(output=first_task["task"])
    assert Subspace.load(memory)  # still there
    text = json.loads((memory / "subspace.json").read_text())
    text["model"] |= {name: "0" for name in text["model"] if name.startswith("weights_sha256")}
    other = tmp_path / "other"
    Subspace.load(memory).save(other)
    (other / "subspace.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="another base model"):
        attempt(memory=other)


def test_added_after_the_trainer_was_made_it_says_so(first_task, llama_folder, tmp_path):
    trainer = sft(second_task("task", first_task, llama_folder), llama_folder, tmp_path)
    trainer.add_callback(OrthogonalProjectionCallback(first_task["task"] / "subspace"))
    with pytest.raises(ValueError, match="constructor"):
        trainer.train()


def test_full_bases_are_refused_and_short_ones_warned_of(first_task, second, tmp_path):
    subspace = Subspace.load(first_task["task"] / "subspace")
    for size, name in ((64, "full"), (60, "short")):
        subspace.right = {g: torch.linalg.qr(torch.randn(len(V), len(V)))[0][:, : size if len(V) == 64 else 4]
                          for g, V in subspace.right.items()}  # fmt: skip
        subspace.save(tmp_path / name)
    with pytest.raises(ValueError, match="fill all 64 dimensions of the input of module '.*_proj'"):
        second(memory=tmp_path / "full")[1].train()
    with pytest.warns(UserWarning, match="less than 10% of their dimensions left to this task"):
        second(memory=tmp_path / "short", options={"max_steps": 1})[1].train()


@pytest.mark.slow
def test_two_processes_hold_the_same_directions_and_the_guarantee(first_task, llama_folder, tmp_path):
    """DDP: bases over both processes' data, one file, equal weights on both."""
    body = f"""
        import json
        from pathlib import Path
        from test_projection import *
        folders = {{"task": Path({str(first_task["task"])!r})}}
        model, memory = second_task("task", folders, {llama_folder!r}), folders["task"] / "subspace"
        worst = Worst(memory)
        callbacks = [OrthogonalProjectionCallback(memory, start="contrast"), worst]
        sft(model, {llama_folder!r}, {str(tmp_path / "two")!r}, callbacks, ddp_backend="gloo").train()
        pairs = trainable_factors(model, None)[1].values()
        torch.save([[p.A.detach(), p.B.detach()] for p in pairs], f"{tmp_path}/weights{{rank}}.pt")
        with open(f"{tmp_path}/{{rank}}.json", "w") as file:
            json.dump([worst.leak, worst.moved], file)
        """
    ranks(body, tmp_path)
    for rank in ("0", "1"):
        leak, moved = json.loads((tmp_path / f"{rank}.json").read_text())
        assert leak <= 1e-5 and moved > 1e-2
    one, two = (torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert len(Subspace.load(tmp_path / "two" / "subspace").tasks) == 2
