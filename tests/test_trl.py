"""TRL's own trainers over an NF4 base: train, save, resume, evaluate, and DPO's reference."""

import pytest
import torch
from helpers import LORA, METHODS, adapted, gradients, losses, quantized, reopened, sft, texts, tiny_llama, trl_trainer
from peft import PeftModel

from peft_mora import start_task


def trained(method, folder, output, resume=None, **arguments):
    """Four steps of a fresh adapter on NF4."""
    torch.manual_seed(0)
    arguments |= {"max_steps": 4, "save_steps": 2}
    trainer = sft(quantized(folder), folder, output, METHODS[method](target_modules="all-linear"), **arguments)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}  # TRL's cast on NF4
    if arguments.get("eval_strategy"):
        trainer.evaluate()
    torch.manual_seed(1)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def test_sft_over_nf4_trains_saves_and_resumes_to_the_same_losses_also_with_evaluations(
    form, llama_folder, tmp_path, inputs
):
    whole = trained(form, llama_folder, tmp_path / "whole", eval_strategy="steps", eval_steps=1)
    resumed = trained(form, llama_folder, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2")
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    whole.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(quantized(llama_folder), str(tmp_path / "adapter")).eval()
    want = whole.model.eval()(inputs).logits
    assert torch.equal(again(inputs).logits, want)
    with again.disable_adapter():
        assert not torch.equal(again(inputs).logits, want)


def test_a_second_task_trains_only_its_own_experts(llama_folder, tmp_path):
    model = adapted("mora", quantized(llama_folder))
    start_task(model, "b")
    bank = {k: v.clone() for k, v in model.state_dict().items() if "mora_bank" in k}
    fresh = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = sft(model, llama_folder, tmp_path, weight_decay=0.1, max_steps=3)
    trainer.train()
    after = trainer.model.state_dict()
    assert bank and all(torch.equal(after[key], value) for key, value in bank.items())
    assert any(not torch.equal(after[key], value) for key, value in fresh.items())


@pytest.mark.parametrize(("method", "tasks"), [*((method, 1) for method in METHODS), ("mora", 2), ("mora-dense", 2)])
def test_dpo_s_reference_equals_the_trained_adapter(method, tasks, llama_folder, tmp_path, inputs):
    trained = adapted(method, quantized(llama_folder), tasks=tasks)
    model = reopened(trained, tmp_path / "trained", quantized(llama_folder), is_trainable=True)
    with model.disable_adapter():
        base = model.eval()(inputs).logits
    pairs = {"prompt": texts()["text"], "chosen": [" yes"] * 24, "rejected": [" no"] * 24}
    trainer = trl_trainer("DPO", None, llama_folder, tmp_path, pairs, model, max_steps=1)
    model = trainer.model
    assert set(model.peft_config) == {"default", "ref"}
    trained = model.eval()(inputs).logits
    model.set_adapter("ref")
    assert torch.equal(model(inputs).logits, trained) and not torch.equal(trained, base)
    model.set_adapter("default")
    trainer.train()
    # With an equal reference both policies agree, the margin is 0 and the loss is log 2 in the first step.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    model.set_adapter("ref")
    assert torch.equal(model.eval()(inputs).logits, trained)
    model.set_adapter("default")
    assert not torch.equal(model(inputs).logits, trained)
    assert gradients(model.train(), inputs)


def test_sft_refuses_an_adapted_output_layer_as_for_lora(llama_folder, tmp_path):
    """README.md says so."""
    for method in (LORA, METHODS["mora"]):
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            sft(tiny_llama(), llama_folder, tmp_path, method(target_modules=["q_proj", "lm_head"]))
