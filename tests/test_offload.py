"""Models that accelerate keeps on disk in part: what works there in eval mode, and what is refused."""

import pytest
import torch
from accelerate import dispatch_model
from helpers import METHODS, adapted, randomize, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_mora import MoraConfig, TaskRouter, start_task
from peft_mora.export import exportable_layers
from peft_mora.merging import collect_inputs, merge_into_base
from trl_callbacks import protect


DISK = {"model.layers.1": "disk"}
CPU = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
PLACES = {f"base_model.model.{name}": place for name, place in {**CPU, **DISK}.items()}


def dispatched(model, folder):
    """The PEFT model, a layer of which accelerate takes to disk."""
    return dispatch_model(model, PLACES, main_device="cpu", offload_dir=folder, force_hooks=True)


def offloaded_base(folder):
    """A tiny Llama whose second layer is on disk, and its whole twin."""
    tiny_llama().save_pretrained(folder)
    options = {"device_map": {**CPU, **DISK}, "offload_folder": folder / "offload"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval(), AutoModelForCausalLM.from_pretrained(folder)


def test_offloaded_weights_are_there_when_they_are_read_and_are_not_trained(make_config, inputs, tmp_path):
    model = adapted(make_config).eval()
    want = model(inputs).logits
    offloaded = dispatched(model, tmp_path)
    assert any(p.is_meta for name, p in model.named_parameters() if ".default." in name)
    assert torch.equal(offloaded(inputs).logits, want)
    assert torch.equal(offloaded(inputs, adapter_names=["default"] * 3).logits, want)
    assert any(p.is_meta for name, p in model.named_parameters() if ".default." in name)  # and are away again
    offloaded.train().requires_grad_(False)
    assert offloaded(inputs).logits.isfinite().all()  # nothing learns
    for name, parameter in offloaded.named_parameters():
        parameter.requires_grad_(".default." in name)
    with pytest.raises(ValueError, match=r"q_proj are offloaded by accelerate, which drops what they learn"):
        offloaded(inputs)


def test_a_saved_adapter_is_opened_over_an_offloaded_base(make_config, inputs, tmp_path, monkeypatch):
    base, whole = offloaded_base(tmp_path / "base")
    model = get_peft_model(whole, make_config(target_modules="all-linear"))
    randomize(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)  # PEFT writes what it moves to disk below the working directory
    # On a machine without a GPU "auto" would bring all of it into memory.
    monkeypatch.setattr("peft.peft_model.infer_auto_device_map", lambda *args, **kwargs: PLACES)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter", offload_folder=str(tmp_path / "offload"))
    assert torch.equal(again.eval()(inputs).logits, model(inputs).logits)


def test_an_offloaded_adapter_that_is_merged_can_be_switched_off(inputs, tmp_path):
    model = adapted(MoraConfig, routing="dense").eval()
    offloaded = dispatched(model, tmp_path)
    want = offloaded(inputs).logits
    with offloaded.disable_adapter():
        plain = offloaded(inputs).logits
    offloaded.merge_adapter()
    torch.testing.assert_close(offloaded(inputs).logits, want)
    with offloaded.disable_adapter():
        assert torch.equal(offloaded(inputs).logits, plain)
    assert torch.equal(offloaded(inputs).logits, want)


def test_an_offloaded_adapter_is_not_changed_or_exported(inputs, tmp_path):
    model = adapted(MoraConfig).eval()
    want = model(inputs).logits
    offloaded = dispatched(model, tmp_path)
    with pytest.raises(ValueError, match=r"Weights of 'default' on .*layers.1.* are on the meta device: accelerate"):
        start_task(offloaded, "second")
    with pytest.raises(ValueError, match="are on the meta device: accelerate"):
        exportable_layers(offloaded)
    assert torch.equal(offloaded(inputs).logits, want)


@pytest.mark.parametrize("method", ["mora", "lori"])
def test_a_router_drives_offloaded_adapters(method, inputs, tmp_path):
    def answer(offloaded):
        model = adapted(method)
        model.add_adapter("b", METHODS[method](target_modules="all-linear"))
        randomize(model)
        model = dispatched(model.eval(), tmp_path) if offloaded else model.eval()
        router = TaskRouter(model)
        for seed, name in enumerate(("default", "b")):
            router.add_task(name, torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)))
        router.attach()
        return model(inputs).logits, router.last

    (want, tasks), (found, same) = map(answer, (False, True))
    assert torch.equal(found, want) and same == tasks


def test_what_looks_at_a_base_works_offloaded_or_refuses_it(inputs, tmp_path, llama_folder):
    base, whole = offloaded_base(tmp_path / "base")
    tokenizer, texts = AutoTokenizer.from_pretrained(llama_folder), ["the cat sat", "a dog ran under"]
    found, want = (TaskRouter(model, tokenizer) for model in (base, whole))
    assert found.fingerprint == want.fingerprint
    torch.testing.assert_close(found.features(texts), want.features(texts))
    protect(base, texts, tmp_path / "memory", tokenizer=tokenizer)
    before = base(inputs).logits
    get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is on the meta device .accelerate offloads it.*whole model into memory"):
        collect_inputs(base, texts, tmp_path / "lora", tokenizer)
    assert torch.equal(base(inputs).logits, before)
    with pytest.raises(ValueError, match=r"leaves 9 weights of .* out of memory \('model.layers.1.*as \"cpu\""):
        merge_into_base(tmp_path / "lora", tmp_path / "merged", base=tmp_path / "base", device={**CPU, **DISK})
    assert not (tmp_path / "merged").exists()


def test_an_adapter_without_values_is_not_computed_with(family, inputs, tmp_path):
    base, _ = offloaded_base(tmp_path / "base")
    model = get_peft_model(base, METHODS[family](target_modules="all-linear")).eval()  # its own is on meta there
    with pytest.raises(ValueError, match=r"'default' on model.layers.1.self_attn.q_proj are on the meta device"):
        model(inputs)
