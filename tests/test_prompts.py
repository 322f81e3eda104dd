"""Projection of a prompt's realised step in SFTTrainer, over PEFT's prompt tuning."""

import pytest
import torch
from helpers import At, losses, quantized, sft, tiny_llama, tiny_t5
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_callbacks import PromptProjectionCallback
from trl_callbacks.prompts import embedding_covariance, the_prompt
from trl_callbacks.subspace import Subspace


def prompted(base, config=PromptTuningConfig, task="CAUSAL_LM"):
    torch.manual_seed(0)
    return get_peft_model(base, config(task_type=task, num_virtual_tokens=3))


def run(model, folder, output, *callbacks, **options):
    options = {"weight_decay": 0.1, "save_strategy": "no", "max_steps": 4, **options}
    return sft(model, folder, output, callbacks=list(callbacks), **options)


@pytest.fixture(scope="module")
def memory(llama_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    run(prompted(quantized(llama_folder)), llama_folder, folder, PromptProjectionCallback(energy=0.8)).train()
    return folder / "subspace"


def test_a_folder_with_other_files_is_refused_before_a_step(llama_folder, tmp_path):
    notes = tmp_path / "subspace" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    trainer = run(prompted(quantized(llama_folder)), llama_folder, tmp_path, PromptProjectionCallback())
    with pytest.raises(FileExistsError, match="holds 'notes.txt', which would be deleted"):
        trainer.train()
    assert trainer.state.global_step == 0 and notes.read_text() == "mine"


class Worst(TrainerCallback):
    """The largest share of the prompt's change that is in V, and outside of U, after any step, in float64."""

    def __init__(self, memory):
        self.V = Subspace.load(memory).right["prompt"].double()
        self.leak, self.moved = 0.0, 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.prompt = the_prompt(model, None)[1]
        self.start = self.prompt.detach().double().clone()

    def on_step_end(self, args, state, control, **kwargs):
        self.change = self.prompt.detach().double() - self.start
        self.leak = max(self.leak, float((self.change @ self.V).norm() / self.change.norm()))
        self.moved = max(self.moved, float(self.change.norm()))


def test_steps_below_the_rounding_of_the_prompt_are_saved(memory, llama_folder, tmp_path):
    """At 1e-6 the first step is a hundred times what float32 keeps of rows of norm 8."""
    callback = PromptProjectionCallback(memory)
    trainer = run(
        prompted(quantized(llama_folder)), llama_folder, tmp_path, callback, learning_rate=1e-6, weight_decay=0.0,
        save_strategy="steps", save_steps=1, max_steps=2,
    )  # fmt: skip
    trainer.train()
    logged = [entry["prompt_leakage"] for entry in trainer.state.log_history if "prompt_leakage" in entry]
    assert max(logged) > 1e-3  # of a change of 1e-6, by rounding alone
    assert (tmp_path / "checkpoint-2").is_dir()


def test_the_first_task_s_prompt_is_in_float32_as_the_next_one_s(llama_folder, tmp_path):
    model = prompted(quantized(llama_folder))
    prompt = model.prompt_encoder["default"].embedding.weight
    prompt.data = prompt.data.bfloat16()  # as TRL leaves it
    run(model, llama_folder, tmp_path, PromptProjectionCallback())
    assert prompt.dtype == torch.float32


class GradientOnly(PromptProjectionCallback):
    def on_optimizer_step(self, *args, **kwargs):
        pass


@pytest.mark.parametrize("pretrained", [None, 0.9])
def test_adamw_steps_of_the_prompt_stay_out_of_earlier_tasks_embeddings(pretrained, memory, llama_folder, tmp_path):
    model, worst = prompted(quantized(llama_folder)), Worst(memory)
    callback = PromptProjectionCallback(memory, pretrained=pretrained)
    trainer = run(model, llama_folder, tmp_path, callback, worst)
    trainer.train()
    assert worst.prompt.dtype == torch.float32 and worst.moved > 1e-2 and worst.leak <= 1e-5
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {entry["prompt_protected_rank"] for entry in logged} == {worst.V.shape[1]} and len(logged) == 4
    assert all(entry["prompt_leakage"] <= 1e-5 for entry in logged)
    table = model.get_base_model().get_input_embeddings().weight.double()
    values, vectors = torch.linalg.eigh(table.T @ table)
    k = int((values.flip(0).cumsum(0) < 0.9 * values.sum()).sum()) + 1
    rows = torch.cat([vectors[:, -k:].T, worst.V.T])  # the change is in the span of both, if `pretrained`
    outside = worst.change - worst.change @ torch.linalg.pinv(rows) @ rows
    share = float(outside.norm() / worst.change.norm())
    assert share <= 1e-5 if pretrained else share > 1e-2
    two = Subspace.load(tmp_path / "subspace")
    assert len(two.tasks) == 2 and torch.equal(two.right["prompt"][:, : worst.V.shape[1]].double(), worst.V)


def test_the_gradient_alone_does_not_keep_it_out(memory, llama_folder, tmp_path):
    worst = Worst(memory)
    trainer = run(prompted(quantized(llama_folder)), llama_folder, tmp_path, GradientOnly(memory), worst)
    with pytest.raises(ValueError, match="has moved where it must not"):
        trainer.train()
    assert worst.leak >= 1e-2


def test_the_directions_hold_their_energy_of_the_real_tokens_embeddings():
    embeddings = tiny_llama().get_input_embeddings()
    ids = torch.randint(4, 24, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = embedding_covariance(embeddings, [{"input_ids": ids, "attention_mask": mask}] * 2)
    rows = embeddings.weight[ids[mask.bool()]].detach()
    torch.testing.assert_close(found, 2 * rows.T @ rows)


def test_a_resumed_run_repeats_the_unbroken_one_from_where_the_prompt_began(memory, llama_folder, tmp_path):
    def make(output):
        options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        model = prompted(quantized(llama_folder))
        return run(model, llama_folder, tmp_path / output, PromptProjectionCallback(memory), **options)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    with torch.no_grad():
        the_prompt(resumed.model, None)[1].add_(1)  # of another start: the checkpoint's counts
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    assert torch.equal(the_prompt(resumed.model, None)[1], the_prompt(whole.model, None)[1])
    start = load_file(checkpoint / "prompt_projection.safetensors")["start"]
    moved = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")["prompt_embeddings"] - start
    V = Subspace.load(memory).right["prompt"]
    assert (moved @ V).norm() <= 1e-5 * moved.norm() and moved.norm() > 1e-2
    (checkpoint / "prompt_projection.safetensors").unlink()
    with pytest.raises(ValueError, match="has no prompt_projection.safetensors"):
        make("third").train(resume_from_checkpoint=str(checkpoint))


def test_what_it_cannot_hold_is_refused_with_what_would_work(memory, llama_folder, tmp_path):
    def attempt(model, memory=None, **arguments):
        run(model, llama_folder, tmp_path, PromptProjectionCallback(memory, **arguments)).train()

    for config, match in (
        (LoraConfig(target_modules=["q_proj"]), "is of type LORA.*OrthogonalProjectionCallback"),
        (PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "is of type P_TUNING"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "is of type PREFIX_TUNING"),
    ):
        with pytest.raises(ValueError, match=match):
            the_prompt(get_peft_model(tiny_llama(), config), None)
    with pytest.raises(ValueError, match="Use PromptTuningConfig"):
        attempt(tiny_llama())
    with pytest.raises(ValueError, match="encoder-decoder's prompt"):
        the_prompt(prompted(tiny_t5(), task="SEQ_2_SEQ_LM"), None)
    with pytest.raises(ValueError, match="another base model"):
        attempt(prompted(tiny_llama(seed=1)), memory)
    subspace = Subspace.load(memory)
    subspace.right["prompt"] = torch.eye(64)
    subspace.save(tmp_path / "full")
    with pytest.raises(ValueError, match="fill all 64 dimensions"):
        attempt(prompted(quantized(llama_folder)), tmp_path / "full")
    subspace.source = "inputs"
    subspace.save(tmp_path / "inputs")
    with pytest.raises(ValueError, match="is for OrthogonalProjectionCallback"):
        attempt(prompted(quantized(llama_folder)), tmp_path / "inputs")
    model = prompted(quantized(llama_folder))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="1 more parameters are trainable"):
        attempt(model, memory)


def test_a_run_that_begins_anew_with_a_smaller_batch_goes_on_from_the_same_start(memory, llama_folder, tmp_path):
    model, worst = prompted(quantized(llama_folder)), Worst(memory)
    callbacks = [PromptProjectionCallback(memory), worst, At(2, "memory")]
    trainer = run(model, llama_folder, tmp_path, *callbacks, auto_find_batch_size=True)
    start = the_prompt(model, None)[1].detach().double().clone()
    trainer.train()
    change = the_prompt(model, None)[1].detach().double() - start
    assert trainer.state.global_step == 4 and (change @ worst.V).norm() <= 1e-5 * change.norm()


def test_the_prompt_s_gradient_is_projected_before_the_step(memory, llama_folder, tmp_path):
    found = []

    class Seen(PromptProjectionCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            grad, V = self._prompt.grad, self._constraint.basis
            before = float((grad @ V).norm() / grad.norm())
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            found.append((before, float((grad @ V).norm() / grad.norm())))

    run(prompted(quantized(llama_folder)), llama_folder, tmp_path, Seen(memory)).train()
    assert found and all(before > 1e-2 and after <= 1e-5 for before, after in found)
