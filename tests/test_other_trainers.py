"""TRL's preference, reward and reinforcement trainers, and transformers' own adapter functions."""

import types

import pytest
import torch
import trl.trainer.grpo_trainer as grpo
from helpers import LORA, METHODS, WORDS, adapted, losses, quantized, randomize, sft, tiny_llama, trl_trainer
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration

from peft_mora import start_task
from peft_mora.base import AdapterLinear
from peft_mora.merging.inputs import FILE
from trl_callbacks import InputStatisticsCallback, OrthogonalProjectionCallback
from trl_callbacks.input_statistics import prompts_of


# Of each method the first form that merges and the first that does not. FLYLORA stands for SMORA and MORA "dense" for
# FURINA, which differ in what a layer computes; tests/test_trl.py has all of them in SFT and DPO.
KINDS = [*{(form.config, form.merges): name for name, form in reversed(METHODS.items())}.values()]
KINDS = [name for name in KINDS if name not in ("smora", "furina")]
FOUR = pytest.mark.parametrize("method", KINDS)
N = 12
PROMPTS = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(4)) for i in range(N)]
PAIRS = {"prompt": PROMPTS, "chosen": [" yes cat"] * N, "rejected": [" no dog"] * N}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train_and_check(trainer, base, folder, inputs) -> None:
    """The adapter moves, all of it and nothing else, and what is saved computes the same."""
    before, frozen = weights(trainer.model), {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    after = weights(trainer.model)
    assert before and all(not torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if not p.requires_grad)
    trainer.save_model(str(folder / "adapter"))
    again = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    assert torch.equal(again(inputs).logits, trainer.model.eval()(inputs).logits)


@torch.no_grad()
def log_probs(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, T - 1) log-probability of each token after the first."""
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits.float()
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def sums(model: nn.Module, batch: dict) -> torch.Tensor:
    """(2, B / 2) summed log-probabilities of chosen and rejected completions."""
    tokens = log_probs(model, batch["input_ids"], batch["attention_mask"]) * batch["completion_mask"][:, 1:]
    return torch.stack(tokens.sum(-1).chunk(2))


def test_a_second_lora_beside_a_frozen_one_is_refused_where_a_reference_adapter_takes_its_place(
    llama_folder, tmp_path
):
    """TRL makes the reference of "default", and sets "default" alone active after each look at it."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LORA(r=2, target_modules=["q_proj"]))
    randomize(model)
    model.add_adapter("two", LORA(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["two", "default"])
    model.set_requires_grad("default", requires_grad=False)
    trainer = trl_trainer("DPO", None, llama_folder, tmp_path, PAIRS, model=model, gradient_checkpointing=False)
    trainer.add_callback(OrthogonalProjectionCallback())
    with pytest.raises(ValueError, match=r"\['two', 'default'\] are active together.*adapter, 'ref'.*start_task"):
        trainer.train()


def test_an_adapter_that_is_switched_off_in_training_is_an_error(llama_folder, tmp_path):
    class Off(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.base_model.set_adapter("other")
                model.set_requires_grad("default", requires_grad=True)

    model = get_peft_model(tiny_llama(), LORA(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LORA(r=2, target_modules=["q_proj"]))
    trainer = sft(model, llama_folder, tmp_path, callbacks=[OrthogonalProjectionCallback(), Off()])
    with pytest.raises(
        ValueError, match=r"No weight of adapter 'default' has a gradient in step 2.*now active: \['other"
    ):
        trainer.train()


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_what_a_preference_run_s_adapter_saw_are_its_prompts_once_each(name, llama_folder, tmp_path):
    data = PAIRS if name == "DPO" else {"prompt": PROMPTS, "completion": [" yes cat"] * N, "label": [True, False] * 6}
    trainer = trl_trainer(name, METHODS["lori"](target_modules=["q_proj"]), llama_folder, tmp_path, data)
    callback = InputStatisticsCallback(4, prompts=8)
    trainer.add_callback(callback)
    rows = [prompt.tolist() for batch in trainer.get_train_dataloader() for prompt in prompts_of(batch)]
    wanted = trainer.processing_class(PROMPTS, add_special_tokens=False).input_ids
    assert len(rows) == N and sorted(row[-4:] for row in rows) == sorted(ids[-4:] for ids in wanted)
    trainer.train()
    assert (tmp_path / FILE).is_file()


@pytest.mark.parametrize(("method", "precompute"), [*((method, False) for method in KINDS), ("mora", True)])
def test_dpo_s_reference_of_a_fresh_adapter_is_the_base_model(method, precompute, llama_folder, tmp_path, inputs):
    trainer = trl_trainer("DPO", method, llama_folder, tmp_path, PAIRS, beta=0.5, precompute_ref_log_probs=precompute)
    train_and_check(trainer, quantized(llama_folder), tmp_path, inputs)
    assert set(trainer.model.peft_config) == {"default"}
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    # after training the policy has left; the loss by hand, with a base model that never saw an adapter
    batch = next(iter(trainer.get_train_dataloader()))
    policy, reference = sums(trainer.model, batch), sums(quantized(llama_folder), batch)
    chosen, rejected = policy - reference
    want = -nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean()
    with torch.no_grad():
        got = trainer.compute_loss(trainer.model.eval(), batch)
    assert got.item() == pytest.approx(want.item(), rel=0.02)
    assert abs(want.item() - 0.6931) > 0.02  # the same loss against the policy itself would be ln 2


@FOUR
def test_kto_runs_with_the_base_as_reference(method, llama_folder, tmp_path, inputs):
    labels = {"completion": [" yes cat", " no dog"] * (N // 2), "label": [True, False] * (N // 2)}
    trainer = trl_trainer("KTO", method, llama_folder, tmp_path, {"prompt": PROMPTS, **labels})
    train_and_check(trainer, quantized(llama_folder), tmp_path, inputs)
    assert set(trainer.model.peft_config) == {"default"}
    first, *_, last = losses(trainer)
    assert first == pytest.approx(0.5, abs=1e-3)  # 1 - sigmoid(0): policy and reference agree
    assert abs(last - 0.5) > 1e-3  # and no longer: the reference is not the policy


def rl(name, method, folder, output, model=None, beta=0.1, **kwargs):
    kwargs |= {"beta": beta, "num_generations": 4, "max_completion_length": 6}
    return trl_trainer(name, method, folder, output, {"prompt": PROMPTS}, model, **kwargs)


@FOUR
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_grpo_and_rloo_take_the_base_as_reference(method, name, llama_folder, tmp_path, inputs):
    trainer = rl(name, method, llama_folder, tmp_path)
    seen = []  # (trainer step, adapters on, tokens, mask, log-probs)
    compute = trainer._get_per_token_logps_and_entropies

    def spy(model, ids, mask, keep, *args, **kwargs):
        found = compute(model, ids, mask, keep, *args, **kwargs)
        enabled = not next(m for m in trainer.model.modules() if isinstance(m, AdapterLinear)).disable_adapters
        seen.append((trainer.state.global_step, enabled, ids, mask, found[0].detach()))
        return found

    trainer._get_per_token_logps_and_entropies = spy
    train_and_check(trainer, quantized(llama_folder), tmp_path, inputs)
    assert set(trainer.model.peft_config) == {"default"}
    history = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6) and abs(history[-1]["kl"]) > 1e-4
    references = [entry for entry in seen if not entry[1]]
    assert {step for step, *_ in references} == set(range(3))  # one a step, also after the policy has moved
    base = quantized(llama_folder)
    for _, _, ids, mask, got in references:
        want = log_probs(base, ids, mask)[:, -got.shape[1] :]
        real = mask[:, -got.shape[1] :].bool()
        torch.testing.assert_close(got[real].float(), want[real], rtol=0.02, atol=0.02)


@FOUR
def test_a_reward_model_trains_its_head_and_the_adapter(method, llama_folder, tmp_path, inputs):
    def base():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(llama_folder, num_labels=1, dtype=torch.float32)

    config = METHODS[method](target_modules="all-linear", modules_to_save=["score"], task_type="SEQ_CLS")
    train_and_check(trl_trainer("Reward", config, llama_folder, tmp_path, PAIRS, base()), base(), tmp_path, inputs)


class FakeVLLM(VLLMGeneration):
    """TRL's class with a vLLM that only takes weights: what is synced is TRL's own code."""

    def _init_vllm(self):
        self.received = {}
        model = types.SimpleNamespace(
            load_weights=lambda pairs: self.received.update({k: v.clone() for k, v in pairs})
        )
        runner = types.SimpleNamespace(model_runner=types.SimpleNamespace(model=model))
        executor = types.SimpleNamespace(model_executor=types.SimpleNamespace(driver_worker=runner))
        self.llm = types.SimpleNamespace(llm_engine=executor, reset_prefix_cache=lambda: None)

    def generate(self, prompts, **kwargs):
        raise StopIteration("weights are synced, nothing to generate with")


def test_a_trainer_that_merges_for_vllm_refuses_a_routed_adapter_and_serves_a_static_one(
    method, llama_folder, tmp_path, inputs, monkeypatch
):
    monkeypatch.setattr(grpo, "VLLMGeneration", FakeVLLM)
    model = adapted(method)
    trainer = rl("GRPO", None, llama_folder, tmp_path, model, beta=0.0, use_vllm=True)
    want, before = trainer.model.eval()(inputs).logits, {k: v.clone() for k, v in trainer.model.state_dict().items()}
    if not METHODS[method].merges:
        with pytest.raises(ValueError, match=f"Cannot merge a {METHODS[method].title} adapter.*unmerged"):
            trainer.train()
        assert not trainer.vllm_generation.received
    else:
        with pytest.raises(StopIteration):
            trainer.train()
        served = tiny_llama().eval()
        served.load_state_dict(trainer.vllm_generation.received)
        torch.testing.assert_close(served(inputs).logits, want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


# transformers' own functions: an adapter without a PeftModel around it


def injected(make_config, base, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    base.add_adapter(make_config(target_modules=["q_proj", "down_proj"], **kwargs))
    randomize(base)
    return base.eval()


def test_transformers_switches_an_adapter_off_and_on_keeps_several_and_deletes_them(make_config, inputs):
    model = injected(make_config, tiny_llama())
    first, base = model(inputs).logits, tiny_llama().eval()(inputs).logits
    model.disable_adapters()
    assert torch.equal(model(inputs).logits, base) and not torch.allclose(first, base)
    model.enable_adapters()
    assert torch.equal(model(inputs).logits, first)
    torch.manual_seed(1)
    model.add_adapter(make_config(target_modules=["k_proj"], init_weights=False), "other")
    second = model.eval()(inputs).logits
    assert model.active_adapters() == ["other"] and not torch.allclose(first, second)
    model.set_adapter(["default", "other"])
    both = model(inputs).logits
    assert not torch.allclose(both, first) and not torch.allclose(both, second)
    model.set_adapter("default")
    assert torch.equal(model(inputs).logits, first)
    model.delete_adapter("other")
    assert torch.equal(model(inputs).logits, first)
    model.delete_adapter("default")
    assert torch.equal(model(inputs).logits, base)
    model.add_adapter(make_config(target_modules=["q_proj"]))  # the name is free again


@pytest.mark.parametrize("bits", [None, 4])
def test_transformers_saves_and_loads_an_adapter_in_peft_s_format(make_config, bits, llama_folder, inputs, tmp_path):
    def base():
        return quantized(llama_folder) if bits else AutoModelForCausalLM.from_pretrained(llama_folder)

    model = injected(make_config, base())
    if hasattr(model.peft_config["default"], "block_sizes"):  # frozen experts come back too
        start_task(model, "second")
        randomize(model, seed=5)
    want = model(inputs).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists() and not (tmp_path / "model.safetensors").exists()
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path).eval()(inputs).logits, want)
    loaded = base()
    loaded.load_adapter(str(tmp_path), "named")
    assert loaded.active_adapters() == ["named"] and torch.equal(loaded.eval()(inputs).logits, want)
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "named" in n)
    loaded.load_adapter(str(tmp_path), "second", is_trainable=True)
    assert torch.equal(loaded.eval()(inputs).logits, want)  # the new one becomes active, or none does
    state = model.get_adapter_state_dict()
    direct = base()
    direct.load_adapter(peft_config=model.peft_config["default"], adapter_state_dict=state)
    assert torch.equal(direct.eval()(inputs).logits, want)
    if not bits:  # the folder opens as a model: the base comes from adapter_config.json
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(inputs).logits, want)
