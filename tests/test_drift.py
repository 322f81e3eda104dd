"""How far an adapter has carried the model from its base on general text, in the logs and within a bound."""

import math

import pytest
import torch
from helpers import LORA, adapted, padded, quantized, sft
from peft import get_peft_model
from transformers import AutoTokenizer, TrainerCallback

from peft_mora import MoraConfig
from trl_callbacks import DriftCallback, OrthogonalProjectionCallback
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


class Breaks(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)


def test_a_diverged_adapter_is_not_taken_to_be_within_the_bound(llama_folder, tmp_path):
    with pytest.raises(ValueError, match="At step 4 the adapter's answers to general text are not finite"):
        trained(llama_folder, tmp_path, Breaks(), DriftCallback(TEXT, interval=2, tokens=32, max_kl=1.0))
