"""Gradients of the tasks of a batch: taken apart in a plain SFTTrainer, and combined as PCGrad's page says."""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import At, lora_config, losses, quantized, sft, tiny_llama
from test_mtl_lora import config, mixed, preferences
from torch.nn import functional as F
from transformers import TrainerCallback

from trl_callbacks import GradientSurgeryCallback, TaskColumnCallback


class Watch(TrainerCallback):
    """Put a gradient of no task beside the others, as a penalty does, and see what the optimizer gets."""

    def __init__(self, beside: float = 0.0) -> None:
        self.beside, self.grads, self.trainer, self.tasks = beside, [], None, {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.trainer is not None and state.global_step == state.max_steps - 1:
            self.tasks = by_task(self.trainer)
        for p in model.parameters():
            if p.requires_grad and self.beside:
                p.grad = torch.full_like(p, self.beside)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).clone())


def contradicting():
    """Three tasks that answer the same prompts, of unlike lengths, in their own ways."""
    from datasets import Dataset

    answers = {"b": "yes yes yes", "a": "no", "c": "red no red"}
    rows = [(f"the cat {word}", task) for word in ("sat", "ran", "on", "under the") for task in answers]
    return Dataset.from_list([{"prompt": prompt, "completion": f" {answers[t]}", "task": t} for prompt, t in rows])


def run(folder, output, callbacks, base=None, adapter=None, data=None, **arguments):
    adapter = adapter or lora_config(init_weights=False, r=4, target_modules="all-linear")
    torch.manual_seed(0)
    arguments = {"train_dataset": data or contradicting(), "max_steps": 1, "save_strategy": "no", **arguments}
    return sft(base or tiny_llama().double(), folder, output, adapter, callbacks, **arguments)


def by_task(trainer) -> dict[str, torch.Tensor]:
    """Gradient of each task's share of the token-mean loss over all of the data, with plain logits."""
    model, data = trainer.model.train(), trainer.train_dataset
    tokens = sum(label != -100 for row in data for label in row["labels"][1:])
    found = {}
    for row in data:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        loss = F.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum") / tokens
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        flat = torch.cat([grad.flatten() for grad in grads])
        found[row["task"]] = found.get(row["task"], 0) + flat
    return found


def test_the_step_is_pcgrad_s_of_the_tasks_own_gradients_over_all_micro_batches(llama_folder, tmp_path):
    watch, surgery = Watch(beside=0.25), GradientSurgeryCallback(seed=3)
    trainer = run(
        llama_folder, tmp_path, [watch, surgery],
        max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=3, max_grad_norm=0.0,
    )  # fmt: skip
    watch.trainer, step, parts = trainer, trainer.training_step, []

    def seen(*args):
        parts.append(trainer.current_gradient_accumulation_steps)
        return step(*args)

    trainer.training_step = seen
    trainer.train()
    assert len(parts) > 2 * 24 and sum(1 / n for n in parts) == pytest.approx(8)  # what a mean of a forward counts
    grads = [grad for _, grad in sorted(watch.tasks.items())]  # of the last step, by when they contradict each other
    generator = torch.Generator().manual_seed((3 << 32) + 7)
    want = torch.zeros_like(grads[0])
    for i, grad in enumerate(grads):
        for j in torch.randperm(3, generator=generator).tolist():
            if j != i and grad @ grads[j] < 0:
                grad = grad - (grad @ grads[j]) / (grads[j] @ grads[j]) * grads[j]
        want += grad
    torch.testing.assert_close(watch.grads[-1], want + 0.25, rtol=1e-6, atol=1e-9)
    total = sum(grads)
    assert (want - total).norm() > 0.05 * total.norm()
    entry = trainer.state.log_history[7]
    pairs = [grads[i] @ grads[j] < 0 for i in range(3) for j in range(i)]
    assert entry["gradient_conflicts"] == pytest.approx(sum(pairs) / 3)
    assert entry["gradient_changed"] == pytest.approx(((want - total).norm() / total.norm()).item(), rel=1e-4)


def test_where_nothing_is_changed_the_run_is_the_trainer_s_own(llama_folder, tmp_path):
    surgery = GradientSurgeryCallback()
    surgery.rule = lambda products, generator: torch.ones(len(products), dtype=products.dtype)
    watches = Watch(), Watch()
    plain, taken = (
        run(llama_folder, tmp_path, callbacks, max_steps=3, eval_strategy="steps", eval_steps=2)
        for callbacks in ([watches[0]], [watches[1], surgery])
    )
    for trainer in (plain, taken):
        trainer.train()
        trainer.evaluate()  # whose batches have a column that LoRA's model does not know
    assert losses(taken) == pytest.approx(losses(plain), rel=1e-6)
    for a, b in zip(*(watch.grads for watch in watches), strict=True):  # clipped, by the norm of the sum
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    assert "training_step" not in vars(taken) or taken.training_step.__func__ is type(taken).training_step


def test_several_trainers_of_one_model_leave_what_one_leaves(llama_folder, tmp_path):
    base = tiny_llama().double()
    model = run(llama_folder, tmp_path, [GradientSurgeryCallback()], base).model
    before = len(model._forward_pre_hooks)
    args = {"max_steps": 1, "save_strategy": "no", "train_dataset": contradicting()}
    sft(model, llama_folder, tmp_path, callbacks=[GradientSurgeryCallback()], **args)
    assert len(model._forward_pre_hooks) == before == 1


def test_over_nf4_with_tasks_of_their_own_it_resumes_to_the_same_losses(llama_folder, tmp_path):
    def trained(output, resume=None):
        trainer = run(
            llama_folder, output, [TaskColumnCallback(), GradientSurgeryCallback()], quantized(llama_folder),
            config(target_modules="all-linear"), max_steps=4, save_strategy="steps", save_steps=2,
            gradient_checkpointing=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    assert all("gradient_conflicts" in entry for entry in whole.state.log_history if "loss" in entry)


def test_it_is_refused_where_there_are_no_gradients_of_tasks(llama_folder, tmp_path):
    with pytest.raises(ValueError, match="All records are of one task, 'a'"):
        run(llama_folder, tmp_path, [GradientSurgeryCallback()], data=mixed(tasks=("a",)))
    with pytest.raises(ValueError, match="no column 'kind'; it has prompt"):
        run(llama_folder, tmp_path, [GradientSurgeryCallback(column="kind")])
    late = run(llama_folder, tmp_path, None)
    late.add_callback(GradientSurgeryCallback())
    with pytest.raises(ValueError, match="constructor"):
        late.train()
    with pytest.raises(ValueError, match="`column` must be the same in all callbacks"):
        run(llama_folder, tmp_path, [GradientSurgeryCallback(column="prompt"), GradientSurgeryCallback()])
    with pytest.raises(ValueError, match="preference trainers"):
        GradientSurgeryCallback()._step_by_task(None, {"task": ["a", "b"]}, None)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
def test_a_trainer_whose_loss_is_no_sum_over_tokens_is_refused_at_its_construction(name, llama_folder, tmp_path):
    match = f"a sum over tokens.*{name}Trainer's loss is another.*Train with SFTTrainer"
    with pytest.raises(ValueError, match=match):
        preferences(name, llama_folder, tmp_path, GradientSurgeryCallback())


def test_a_run_after_one_that_an_error_ended_is_its_own(llama_folder, tmp_path):
    """Without the callback it takes nothing apart, with it once."""

    class Break(TrainerCallback):
        on = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.on:
                raise InterruptedError

    calls, surgery, breaking = [], GradientSurgeryCallback(), Break()
    surgery._combine, combine = lambda: calls.append(combine()), surgery._combine
    trainer = run(llama_folder, tmp_path, [surgery, breaking], max_steps=2, per_device_train_batch_size=4)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            trainer.train()
    assert len(calls) == 2
    breaking.on = False
    trainer.train()
    assert len(calls) == 4 and trainer.training_step.__func__ is type(trainer).training_step
    breaking.on = True
    with pytest.raises(InterruptedError):
        trainer.train()
    breaking.on = False
    trainer.remove_callback(surgery)
    trainer.train()
    assert len(calls) == 5


def test_it_goes_on_where_a_run_begins_anew_with_a_smaller_batch(llama_folder, tmp_path):
    out, options = At(1, "memory"), {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 2}
    trainer = run(llama_folder, tmp_path, [GradientSurgeryCallback(), out], **options)
    trainer.train()
    assert out.done and trainer.training_step.__func__ is type(trainer).training_step
    assert all("gradient_changed" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_a_rule_of_torchjd_s_is_for_the_mean_and_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ImportError, match=r'pip install "torchjd\[cagrad\]>=0.18".*pcgrad'):
        GradientSurgeryCallback("cagrad")
    shares = SimpleNamespace(MGDAWeighting=lambda: lambda products: torch.tensor([0.25, 0.75]).double())
    monkeypatch.setitem(sys.modules, "torchjd", SimpleNamespace(aggregation=shares))
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", shares)
    assert GradientSurgeryCallback("mgda").rule(torch.eye(2).double(), None).tolist() == [0.5, 1.5]
