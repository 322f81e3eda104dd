"""TRL's own trainers over an NF4 base: train, save, resume, evaluate, and DPO's reference."""

import pytest
import torch
from conftest import METHODS, WORDS, gradients, quantized, randomize
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_mora import start_task


def texts(n: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(WORDS), (n, 8), generator=generator).tolist()
    return Dataset.from_dict({"text": [" ".join(WORDS[i] for i in row) for row in picks]})


def sft(model, folder, output, peft_config=None, callbacks=None, **kwargs) -> SFTTrainer:
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
        **kwargs,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(output), **arguments),
        train_dataset=texts(),
        eval_dataset=texts(4),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_sft_over_nf4_trains_saves_and_resumes_to_the_same_losses(method, llama_folder, tmp_path, inputs):
    def run(output, **kwargs):
        torch.manual_seed(0)
        config = METHODS[method](target_modules="all-linear")
        return sft(quantized(llama_folder), llama_folder, output, config, **kwargs)

    whole = run(tmp_path / "whole")
    trainable = [p for p in whole.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.bfloat16}  # TRL's cast on a quantised base
    whole.train()
    # Six steps of a tiny model: a single one may go up, by the rounding of its products alone.
    assert sum(losses(whole)[-3:]) / 3 < losses(whole)[0]

    # save_steps=3 has left a checkpoint in the middle: a new trainer goes on from it
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed)[-3:] == losses(whole)[-3:]

    whole.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(quantized(llama_folder), str(tmp_path / "adapter")).eval()
    assert torch.equal(again(inputs).logits, whole.model.eval()(inputs).logits)


@pytest.mark.parametrize("method", METHODS)
def test_evaluating_during_training_changes_no_loss(method, llama_folder, tmp_path):
    histories = []
    for evaluate in ("no", "steps"):
        torch.manual_seed(0)
        config = METHODS[method](target_modules="all-linear")
        trainer = sft(
            quantized(llama_folder),
            llama_folder,
            tmp_path,
            config,
            eval_strategy=evaluate,
            eval_steps=1,
            save_steps=100,
        )
        if evaluate == "steps":
            trainer.evaluate()
        torch.manual_seed(1)
        trainer.train()
        histories.append(losses(trainer))
    assert histories[0] == histories[1]


def test_a_second_task_trains_only_its_own_experts(llama_folder, tmp_path):
    model = get_peft_model(quantized(llama_folder), METHODS["mora"](target_modules="all-linear"))
    randomize(model)
    start_task(model, "b")
    bank = {k: v.clone() for k, v in model.state_dict().items() if "mora_bank" in k}
    fresh = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = sft(model, llama_folder, tmp_path, weight_decay=0.1)
    trainer.train()
    after = trainer.model.state_dict()
    assert bank and all(torch.equal(after[key], value) for key, value in bank.items())
    assert any(not torch.equal(after[key], value) for key, value in fresh.items())


def test_gradient_checkpointing_in_the_trainer_gives_the_same_losses(llama_folder, tmp_path):
    histories = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = METHODS["mora"](target_modules="all-linear")
        trainer = sft(
            quantized(llama_folder), llama_folder, tmp_path, config, gradient_checkpointing=checkpointing, max_steps=3
        )
        trainer.train()
        histories.append(losses(trainer))
    assert histories[0] == histories[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tasks", [1, 2])
def test_dpo_s_reference_equals_the_trained_adapter(method, tasks, llama_folder, tmp_path, inputs):
    if tasks > 1 and not method.startswith("mora"):
        pytest.skip("only MORA grows")
    model = get_peft_model(quantized(llama_folder), METHODS[method](target_modules="all-linear"))
    randomize(model)
    if tasks == 2:
        start_task(model, "b")
        randomize(model, seed=5)
    model.save_pretrained(tmp_path / "trained")
    model = PeftModel.from_pretrained(quantized(llama_folder), str(tmp_path / "trained"), is_trainable=True)
    with model.disable_adapter():
        base = model.eval()(inputs).logits
    sentences = texts()["text"]
    pairs = Dataset.from_dict({"prompt": sentences, "chosen": [" yes"] * 24, "rejected": [" no"] * 24})
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            bf16=False, logging_steps=1, learning_rate=1e-2,
        ),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(llama_folder),
    )  # fmt: skip
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
