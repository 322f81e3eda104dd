"""How far an adapter has carried the model from its base on general text, in the logs and within a bound."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import LORA, At, adapted, losses, padded, quantized, randomize, sft, texts, tiny_llama
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_projection import ScheduleFree
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_mora import LoriConfig, MoraConfig, MtlLoraConfig, set_task, start_task
from trl_callbacks import (
    AdapterPenaltyCallback,
    DriftCallback,
    LoriCalibrationCallback,
    OrthogonalProjectionCallback,
    TaskColumnCallback,
)
from trl_callbacks.drift import drift
from trl_callbacks.general_text import read


TEXT = ["the cat sat on the mat", "a dog ran under the log", "north south east west yes no"]


@pytest.mark.parametrize("config", ["mora-dense", "mora", LORA])
def test_drift_is_perplexity_and_kl_of_real_next_tokens(config):
    model = adapted(config)
    given = padded()
    wanted = (given["attention_mask"][:, 1:] * given["attention_mask"][:, :-1]).bool()
    with torch.no_grad():
        new = model(**given).logits[:, :-1][wanted].double().log_softmax(-1)
        with model.disable_adapter():
            old = model(**given).logits[:, :-1][wanted].double().log_softmax(-1)
    target = given["input_ids"][:, 1:][wanted]
    at = torch.arange(len(target))
    expected = {
        "perplexity": math.exp(-new[at, target].mean()),
        "base_perplexity": math.exp(-old[at, target].mean()),
        "kl": float((old.exp() * (old - new)).sum(-1).mean()),
    }
    model.train()
    found = drift(model, [given])
    assert model.training and found == pytest.approx(expected, rel=1e-4) and found["kl"] > 1e-3


def test_an_adapter_that_is_far_off_is_measured_and_one_of_nan_has_drifted_by_nan():
    model = adapted(LORA, target_modules=["lm_head"])
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1e3)
    found = drift(model, [padded()])
    assert found["perplexity"] == math.inf and 709 < found["kl"] < math.inf
    model = adapted("mora-dense")
    next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)
    found = drift(model, [padded()])
    assert math.isnan(found["kl"]) and math.isnan(found["perplexity"]) and math.isfinite(found["base_perplexity"])


def test_a_soft_prompt_s_own_places_are_no_tokens():
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    given = padded()
    wanted = given["attention_mask"].bool()[:, 1:] & given["attention_mask"].bool()[:, :-1]
    with torch.no_grad():
        new = model(**given).logits[:, 4:-1][wanted].log_softmax(-1)
    found = drift(model, [given])
    target = given["input_ids"][:, 1:][wanted]
    assert found["perplexity"] == pytest.approx(math.exp(-new[torch.arange(len(target)), target].mean()), rel=1e-4)
    assert found["kl"] > 1e-3


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_transformers_own_trainer_needs_no_tokenizer_where_one_lies_with_the_model(
    with_tokenizer, llama_folder, tmp_path
):
    rows = [{"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1], "labels": [3, 4, 5]}] * 4
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True)
    for callback in (
        DriftCallback(TEXT, tokens=32),
        OrthogonalProjectionCallback(protect=TEXT),
        AdapterPenaltyCallback("alignguard", source=TEXT),
    ):
        base = AutoModelForCausalLM.from_pretrained(llama_folder)
        if not with_tokenizer:
            base.config.name_or_path = base.config._name_or_path = str(tmp_path)
        model = get_peft_model(base, LORA(r=2, target_modules=["q_proj"]))
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        with (
            nullcontext() if with_tokenizer else pytest.raises(ValueError, match="Give the trainer one, processing_c")
        ):
            trainer.train()


def test_a_model_without_next_tokens_is_refused_before_the_first_step(tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    model = get_peft_model(LlamaForSequenceClassification(config), LORA(r=2, target_modules=["q_proj"]))
    rows = [{"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1], "labels": 1}] * 4
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="causal language model, and LlamaForSequenceClassification gives none"):
        Trainer(model, arguments, train_dataset=rows, callbacks=[DriftCallback(TEXT)]).train()


def test_an_adapter_that_has_to_be_told_tasks_is_measured_by_its_default_and_refused_without(llama_folder, tmp_path):
    """Before the first step, and not at the first measurement; rows in training go on to say theirs."""
    data = texts().add_column("task", ["a", "b"] * 12)
    trainer = sft(
        tiny_llama(), llama_folder, tmp_path, MtlLoraConfig(tasks=["a", "b"], r=2, target_modules=["q_proj"]),
        [TaskColumnCallback(), DriftCallback(TEXT, interval=2, tokens=32)], train_dataset=data, eval_dataset=None,
        max_steps=2, save_strategy="no",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"'default' has a part for each of 'a' and 'b' and no default.*set_task"):
        trainer.train()
    assert trainer.state.global_step == 0
    set_task(trainer.model, "b")
    trainer.train()
    assert trainer.state.log_history[1]["drift_kl"] > 0


def test_an_adapter_that_has_changed_the_base_is_refused_which_would_be_compared_with_what_that_left(
    llama_folder, tmp_path
):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    trainer = sft(tiny_llama(), llama_folder, tmp_path, config, [DriftCallback(TEXT)], save_strategy="no")
    for run in (trainer.train, lambda: drift(trainer.model, [padded()])):
        with pytest.raises(
            ValueError, match="'default' was initialised by 'pissa', which changes the base model's we"
        ):
            run()
    assert trainer.state.global_step == 0


def test_a_second_one_is_refused_whose_numbers_would_be_lost(llama_folder, tmp_path):
    several = [DriftCallback(TEXT), DriftCallback(["red log"], interval=2)]
    trainer = sft(tiny_llama(), llama_folder, tmp_path, LORA(r=2, target_modules=["q_proj"]), several)
    with pytest.raises(ValueError, match=r"DriftCallback and DriftCallback for .*Give all texts to one, Drift"):
        trainer.train()
    assert trainer.state.global_step == 0


def beside_a_frozen_one():
    """A fresh LoRA "two" in training beside a frozen "one", both active."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LORA(target_modules=["q_proj"]), adapter_name="one")
    randomize(model)
    model.add_adapter("two", LORA(target_modules=["q_proj"]))
    model.base_model.set_adapter(["two", "one"])
    model.set_requires_grad("one", requires_grad=False)
    return model


def test_a_measurement_leaves_frozen_adapters_frozen_also_where_it_fails():
    model = beside_a_frozen_one()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert sum(before.values()) == 4
    drift(model, [padded()])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before

    def fails(module, args):
        if not any(p.requires_grad for p in model.parameters()):
            raise MemoryError

    model.get_base_model().lm_head.register_forward_pre_hook(fails)
    with pytest.raises(MemoryError):
        drift(model, [padded()])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("source", [TEXT, "self"])
def test_a_run_beside_a_frozen_adapter_is_as_without_measurements(source, llama_folder, tmp_path):
    def run(*callbacks):
        trainer = sft(beside_a_frozen_one(), llama_folder, tmp_path, callbacks=list(callbacks), save_strategy="no")
        trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
        return losses(trainer), norms, {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}

    free, measured = run(), run(DriftCallback(source, interval=2, tokens=32, max_kl=1.0))
    assert free[:2] == measured[:2] and free[2].keys() == measured[2].keys()


def test_a_bound_holds_beside_a_frozen_adapter(llama_folder, tmp_path):
    held_out = read(TEXT, AutoTokenizer.from_pretrained(llama_folder), 32)
    bound = 1.1 * drift(beside_a_frozen_one(), held_out)["kl"]
    callback = DriftCallback(TEXT, interval=2, tokens=32, max_kl=bound)
    options = {"callbacks": [callback], "save_strategy": "no", "learning_rate": 0.3}
    trainer = sft(beside_a_frozen_one(), llama_folder, tmp_path, **options)
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "drift_kept" in entry]
    assert len(found) == 3 and max(entry["drift_kl"] for entry in found) <= bound
    assert min(entry["drift_kept"] for entry in found) < 1


def trained(llama_folder, output, *callbacks, **arguments):
    torch.manual_seed(0)
    model = get_peft_model(quantized(llama_folder), MoraConfig(r=4, routing="dense", target_modules="all-linear"))
    trainer = sft(model, llama_folder, output, callbacks=list(callbacks), save_strategy="no", **arguments)
    trainer.train()
    return trainer


@pytest.mark.parametrize("source", [TEXT, "self"])
def test_drift_is_logged_at_each_interval_and_at_the_last_step(source, llama_folder, tmp_path, capsys):
    trainer = trained(llama_folder, tmp_path, DriftCallback(source, interval=4, tokens=32))
    steps = {entry["step"]: entry["drift_kl"] for entry in trainer.state.log_history if "drift_kl" in entry}
    assert list(steps) == [4, 6] and steps[6] > 0.01
    assert f"KL {steps[6]:.4f} nats a token" in capsys.readouterr().out


def test_an_adapter_is_held_within_the_bound_and_within_its_constraints(llama_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    held_out = read(TEXT, tokenizer, 100)
    free = drift(trained(llama_folder, tmp_path / "free").model, held_out)["kl"]
    projection = OrthogonalProjectionCallback(protect=["a small red dog", "the big blue cat"], energy=0.5)
    callback = DriftCallback(TEXT, interval=2, tokens=100, max_kl=free / 20)
    trainer = trained(llama_folder, tmp_path / "held", projection, callback)
    assert 0 < drift(trainer.model, held_out)["kl"] <= free / 20
    entries = [entry for entry in trainer.state.log_history if "drift_kept" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6] and min(entry["drift_kept"] for entry in entries) < 1
    assert all(entry["leakage"] < 1e-5 for entry in entries)


@pytest.mark.parametrize("logging_steps", [4, 500])
def test_a_measurement_is_in_the_logs_of_its_step_whatever_the_logging_steps(logging_steps, llama_folder, tmp_path):
    callback = DriftCallback(TEXT, interval=3, tokens=32)
    trainer = trained(llama_folder, tmp_path, callback, logging_steps=logging_steps, max_steps=5)
    steps = {entry["step"]: "drift_kl" in entry for entry in trainer.state.log_history if "loss" in entry}
    assert steps == {3: True, **({4: False} if logging_steps == 4 else {}), 5: True}


def test_a_resumed_run_has_the_bound_that_it_began_with(llama_folder, tmp_path):
    """The checkpoint's own weights are beyond it: they are of a step between two measurements."""

    def run(output, max_kl=1e-4):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), MoraConfig(r=4, routing="dense", target_modules="all-linear"))
        callback = DriftCallback(TEXT, interval=4, tokens=100, max_kl=max_kl)
        return sft(model, llama_folder, tmp_path / output, callbacks=[callback])

    whole = run("whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = run("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    found = [[e for e in t.state.log_history if "drift_kept" in e] for t in (whole, resumed)]
    assert [e["step"] for e in found[1]] == [4, 6] and max(e["drift_kl"] for e in found[1]) <= 1e-4
    assert [e["drift_kl"] for e in found[0]] == [e["drift_kl"] for e in found[1]]
    with pytest.raises(ValueError, match="resumes with max_kl=1e-05, but .* are within 0.0001"):
        run("tighter", 1e-5).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "drift.safetensors").unlink()
    with pytest.raises(ValueError, match="resumes at step 3, but the checkpoint has no drift.safetensors"):
        run("without").train(resume_from_checkpoint=str(checkpoint))


def test_a_run_that_resumes_another_adapters_bound_is_refused(llama_folder, tmp_path):
    """transformers trains the first active adapter, which is the frozen one here."""

    def run(order):
        model = beside_a_frozen_one()
        model.base_model.set_adapter(order)
        model.set_requires_grad("one", requires_grad=False)
        callback = DriftCallback(TEXT, interval=4, tokens=32, max_kl=1.0)
        return sft(model, llama_folder, tmp_path, callbacks=[callback])

    run(["two", "one"]).train()
    with pytest.raises(ValueError, match=r"other parameters in training.*lora_A.*set_adapter\(\[NAME, OLD\]\)"):
        run(["one", "two"]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_an_adapter_that_is_beyond_the_bound_before_the_first_step_is_refused(llama_folder, tmp_path):
    model = adapted(MoraConfig, r=4, routing="dense").train()
    start_task(model, "two")
    callback = DriftCallback(TEXT, tokens=32, max_kl=1e-3)
    for _ in range(2):
        with pytest.raises(ValueError, match="Before the first step the adapter is .* nats .*max_kl is 0.001"):
            sft(model, llama_folder, tmp_path, callbacks=[callback]).train()


def test_a_run_that_is_stopped_between_two_measurements_ends_within_the_bound(llama_folder, tmp_path, capsys):
    held_out = read(TEXT, AutoTokenizer.from_pretrained(llama_folder), 100)
    free = trained(llama_folder, tmp_path, At(3, "stop"), DriftCallback(TEXT, interval=50, tokens=100))
    found = drift(free.model, held_out)["kl"]
    assert free.state.global_step == 3 and found > 1e-4
    assert f"KL {found:.4f} nats a token\n" in capsys.readouterr().out
    held = trained(llama_folder, tmp_path, At(3, "stop"), DriftCallback(TEXT, interval=50, tokens=100, max_kl=1e-4))
    assert drift(held.model, held_out)["kl"] <= 1e-4
    assert "(brought back to within max_kl=0.0001: " in capsys.readouterr().out


def test_the_best_checkpoint_is_held_too(llama_folder, tmp_path):
    """It is the only one that was evaluated, of a step between two measurements."""
    every = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}

    def run(name, max_kl):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), MoraConfig(r=4, routing="dense", target_modules="all-linear"))
        callback = DriftCallback(TEXT, interval=3, tokens=100, max_kl=max_kl)
        trainer = sft(model, llama_folder, tmp_path / name, callbacks=[callback], load_best_model_at_end=True, **every)
        trainer.train()
        assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-5"
        return drift(trainer.model, read(TEXT, AutoTokenizer.from_pretrained(llama_folder), 100))["kl"]

    assert run("free", None) > 1e-4 >= run("held", 1e-4)


def test_what_a_schedule_free_optimizer_evaluates_is_held_and_resumes(llama_folder, tmp_path):
    """It steps other weights than it evaluates and saves, and a second sequence that draws them on."""
    held_out = read(TEXT, AutoTokenizer.from_pretrained(llama_folder), 100)

    def run(output, max_kl=1e-4):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LORA(r=4, target_modules="all-linear"))
        callback = DriftCallback(TEXT, interval=2, tokens=100, max_kl=max_kl)
        trainer = sft(
            model, llama_folder, tmp_path / output, callbacks=[callback], eval_strategy="steps", eval_steps=2
        )
        trainer.optimizer = ScheduleFree(model, "z")
        return trainer

    free, held, resumed = run("free", None), run("held"), run("resumed")
    free.train()
    assert drift(free.model, held_out)["kl"] > 1e-4
    held.train()
    assert drift(held.model, held_out)["kl"] <= 1e-4
    saved = PeftModel.from_pretrained(tiny_llama(), tmp_path / "held" / "checkpoint-6")
    assert 0 < drift(saved, held_out)["kl"] <= 1e-4
    resumed.train(resume_from_checkpoint=str(tmp_path / "held" / "checkpoint-3"))
    assert losses(resumed) == losses(held)
    for name, p in held.model.named_parameters():
        assert torch.equal(p, resumed.model.get_parameter(name)), name


def test_a_run_that_begins_anew_with_a_smaller_batch_keeps_its_bound(llama_folder, tmp_path):
    """Memory runs out in step 3, where the weights are beyond it."""
    out = At(3, "memory")
    callback = DriftCallback(TEXT, interval=4, tokens=100, max_kl=1e-4)
    trainer = trained(llama_folder, tmp_path, callback, out, auto_find_batch_size=True)
    assert out.done and trainer.state.global_step == 6
    found = [entry for entry in trainer.state.log_history if "drift_kept" in entry]
    assert len(found) == 2 and max(entry["drift_kl"] for entry in found) <= 1e-4


def test_what_replaces_parameters_or_holds_them_in_pieces_is_refused_with_a_bound(llama_folder, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoriConfig(r=4, target_modules=["q_proj"]))
    switch = LoriCalibrationCallback(calibration_steps=2)
    switch.replaces_weights = False  # as somebody else's callback, which says nothing of itself
    callbacks = [switch, DriftCallback(TEXT, interval=3, tokens=32, max_kl=1.0)]
    with pytest.raises(ValueError, match="At step 3 the parameters in training are not those that the run began with"):
        sft(model, llama_folder, tmp_path, callbacks=callbacks, save_strategy="no").train()
    plain = {"world_size": 1, "n_gpu": 1, "deepspeed": None, "fsdp": [], "load_best_model_at_end": False}
    for kind, message in (("deepspeed", "steps copies of the weights"), ("fsdp", "holds the weights in pieces")):
        run = SimpleNamespace(**{**plain, kind: ["x"]})
        DriftCallback(TEXT).refuse(run)
        with pytest.raises(ValueError, match=message):
            DriftCallback(TEXT, max_kl=1.0).refuse(run)


class Breaks(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)


def test_a_diverged_adapter_is_not_taken_to_be_within_the_bound(llama_folder, tmp_path):
    with pytest.raises(ValueError, match="At step 4 the adapter's answers to general text are not finite"):
        trained(llama_folder, tmp_path, Breaks(), DriftCallback(TEXT, interval=2, tokens=32, max_kl=1.0))


def test_what_went_beyond_the_bound_comes_back_towards_the_last_measurement(monkeypatch):
    callback = DriftCallback(TEXT, max_kl=1.0)
    weight = torch.nn.Parameter(torch.zeros(2))
    callback._held, callback._within = {"w": weight}, {"w": torch.zeros(2)}
    kls = iter([0.5, 3.0, 2.0, 0.9, 3.0, 0.9])  # within; beyond, at a half as well, and within at a quarter; at a half
    monkeypatch.setattr(callback, "_measure", lambda model: {"kl": next(kls)})
    reached = []
    for step, value in enumerate((1.0, 2.0, 3.0)):
        with torch.no_grad():
            weight.fill_(value)
        callback._hold(None, SimpleNamespace(global_step=step), None, {"w": weight})
        reached.append((float(weight.detach()[0]), callback._found["kept"]))
    assert reached == [(1.0, 1.0), (1.25, 0.25), (2.125, 0.5)]
