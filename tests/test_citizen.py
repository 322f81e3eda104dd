"""Everything else that people do with a LoRA: it works for every method, or is refused with a reason.

docs/compatibility.md is the table of both.
"""

import io
import json
import os
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import LORA, METHODS, adapted, ranks, reopened, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

from peft_mora.base import AdapterLinear
from peft_mora.lean import _AddUpdate


LAYERS = ["q_proj", "down_proj"]


def first_layer(model: nn.Module) -> AdapterLinear:
    return next(m for m in model.modules() if isinstance(m, AdapterLinear))


def test_trainability_is_that_of_a_lora_at_every_step(make_config, tmp_path):
    """`load_adapter(is_trainable=True)` leaves the inactive adapter trainable in peft 0.21.2: so do we."""

    def history(make) -> list:
        def seen() -> None:
            names = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
            steps.append((names, list(model.active_adapters)))

        steps: list = []
        folder = tmp_path / make().peft_type
        model = get_peft_model(tiny_llama(), make(target_modules=LAYERS))
        seen()
        model.save_pretrained(folder)
        for step in (
            lambda: model.load_adapter(str(folder), "frozen"),
            lambda: model.load_adapter(str(folder), "trained", is_trainable=True),
            lambda: model.base_model.set_adapter(["default", "trained"]),
            lambda: model.set_adapter("frozen"),
            lambda: model.set_requires_grad("trained"),
            lambda: model.set_requires_grad(["frozen", "trained"], requires_grad=False),
            lambda: model.set_adapter("default", inference_mode=True),
            lambda: model.delete_adapter("frozen"),
        ):
            step()
            seen()
            with model.disable_adapter():
                seen()
        for train in (False, True):
            model = PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=train)
            seen()
        model = get_peft_model(tiny_llama(), make(target_modules=LAYERS, inference_mode=True))
        seen()
        return steps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert history(make_config) == history(LORA)


# Which modules


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"target_modules": r".*layers\.1\..*(q|v)_proj"}, 2),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, 8),
        ({"target_modules": LAYERS, "layers_to_transform": [0], "layers_pattern": "layers"}, 2),
        ({"target_modules": LAYERS, "layers_to_transform": 1, "layers_pattern": ["layers", "h"]}, 2),
    ],
)
def test_modules_are_chosen_as_peft_chooses_them(make_config, fields, count):
    ours = get_peft_model(tiny_llama(), make_config(**fields)).targeted_module_names
    assert len(ours) == count
    assert set(ours) == set(get_peft_model(tiny_llama(), LORA(**fields)).targeted_module_names)


tied_llama = partial(tiny_llama, tied=True)


def test_a_tied_output_layer_is_adapted_and_merged_beside_the_embeddings(method, make_config, inputs, tmp_path):
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        model = adapted(make_config, tied_llama(), target_modules=["q_proj", "lm_head"])
    want, head = model(inputs).logits, model.base_model.model.lm_head
    embeddings = model.get_input_embeddings().weight.clone()
    assert head.base_layer.weight is model.get_input_embeddings().weight
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        again = reopened(model, tmp_path, tied_llama())
    assert torch.equal(again(inputs).logits, want)
    with model.disable_adapter():
        assert torch.equal(model(inputs).logits, tied_llama()(inputs).logits)
    if not METHODS[method].merges:
        return
    model.merge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    torch.testing.assert_close(model(inputs).logits, want, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(inputs).logits, want) and head.weight is model.get_input_embeddings().weight
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(inputs).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_and_modules_that_are_trained_beside_the_adapter_are_saved(make_config, tied, inputs, tmp_path):
    base, modules = (tied_llama, None) if tied else (tiny_llama, ["lm_head"])
    config = make_config(target_modules=["q_proj"], modules_to_save=modules, trainable_token_indices=[5, 6])
    model = get_peft_model(base(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    assert torch.equal(reopened(model.eval(), tmp_path, base())(inputs).logits, model(inputs).logits)


@pytest.mark.parametrize("module", [nn.Conv2d(3, 3, 1), nn.Embedding(4, 4), nn.MultiheadAttention(4, 1)])
def test_a_module_that_is_not_linear_is_refused_with_a_way_out(family, module):
    with pytest.raises(ValueError, match=rf"layer \({type(module).__name__}\) is not supported.*modules_to_save"):
        get_peft_model(nn.ModuleDict({"layer": module}), METHODS[family](target_modules=["layer"]))


def test_a_linear_module_that_is_never_called_is_refused(family):
    fields = {"target_modules": "all-linear"}
    for refused in (True, False):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 1), "q": nn.Linear(4, 4)})
        match = r"attention.out_proj belongs to an nn.MultiheadAttention.*exclude_modules=\['attention.out_proj'\]"
        with pytest.raises(ValueError, match=match) if refused else nullcontext():
            get_peft_model(model, METHODS[family](**fields))
        fields["exclude_modules"] = ["attention.out_proj"]


def test_fields_of_lora_that_do_not_exist_here_are_refused_by_name(family):
    for field in "bias use_dora use_rslora lora_alpha fan_in_fan_out ensure_weight_tying".split():
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{field}'"):
            METHODS[family](**{field: True})


# Several adapters in one


def test_combining_by_weights_works_for_lori_and_is_refused_elsewhere(family):
    model = adapted(family, target_modules=LAYERS)
    if family == "lori":
        model.add_weighted_adapter(["default"], [0.5], "mix")
        assert "mix" in model.peft_config
        return
    refusal = rf"{METHODS[family].title} adapters cannot be combined by weights.*set_adapter.*\(LoriConfig\)"
    with pytest.raises(TypeError, match=refusal):
        model.add_weighted_adapter(["default"], [0.5], "mix")


# Memory and files


def test_a_model_on_meta_gets_its_adapter_on_meta_and_loads_later(make_config, inputs, tmp_path):
    model = adapted(make_config)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        base = tiny_llama()
        empty = get_peft_model(base, make_config(target_modules="all-linear"))
    assert all(p.is_meta for p in empty.parameters())
    empty = empty.to_empty(device="cpu")
    missing = empty.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys and not missing.missing_keys
    rotary = dict(model.named_buffers())
    for name, buffer in empty.named_buffers():
        if "rotary" in name:  # not in a state dict; transformers' from_pretrained makes it again
            buffer.copy_(rotary[name])
    assert torch.equal(empty.eval()(inputs).logits, model(inputs).logits)


def test_moving_to_another_device_takes_everything_along(make_config):
    model = adapted(make_config)
    model(torch.ones(1, 3, dtype=torch.long))  # what is made when it is needed is there now
    model.to("meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_torch_save_of_the_whole_model(make_config, inputs):
    model = adapted(make_config)
    want = model(inputs).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(inputs).logits, want)
    again.add_adapter("other", make_config(target_modules=LAYERS))


@pytest.mark.parametrize("warm", [False, True])
def test_a_plain_state_dict_brings_all_that_the_output_depends_on(make_config, inputs, warm):
    """Also into an adapter of another seed, whose projection and mask are other ones."""
    source = adapted(make_config)
    seed = {"seed": 1} if hasattr(make_config(), "seed") else {}
    target = get_peft_model(tiny_llama(), make_config(target_modules="all-linear", **seed)).eval()
    if warm:
        target(inputs)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(inputs).logits, source(inputs).logits)


def test_the_model_card_says_how_to_load_the_adapter(family, tmp_path, llama_folder):
    model = adapted(family, AutoModelForCausalLM.from_pretrained(llama_folder))
    (tmp_path / "README.md").write_text("---\nmeta: hello\n---\nWhat I wrote.\n")
    for _ in range(2):  # saving again adds nothing
        model.save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert "meta: hello" in card and "What I wrote." in card and "library_name: peft" in card
        assert f"base_model: {llama_folder}" in card
        assert card.count("pip install peft-mora") == card.count("import peft_mora") == 1
        assert f"a {METHODS[family].title} adapter" in card and f"`{llama_folder}`" in card
    code = card.split("```python\n")[1].split("```")[0]
    scope = {"base_model": AutoModelForCausalLM.from_pretrained(llama_folder)}
    exec(code.replace("path/to/this/folder", str(tmp_path)), scope)
    assert type(scope["model"]).__name__.startswith("PeftModel")


def test_a_config_saved_on_its_own_writes_no_card(family, tmp_path):
    METHODS[family](target_modules=LAYERS).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["adapter_config.json"]


# What PEFT reports


def test_layer_and_model_status(family, capsys):
    model = adapted(family, target_modules=LAYERS)
    model.add_adapter("other", METHODS[family](target_modules=["q_proj"]))
    status = model.get_model_status()
    assert status.adapter_model_type == METHODS[family].model.__name__
    assert status.num_adapter_layers == 4 and status.enabled is True and status.merged_adapters == []
    assert status.active_adapters == ["default"] and sorted(status.available_adapters) == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert status.trainable_params == model.get_nb_trainable_parameters()[0] > 0
    types = [layer.module_type for layer in model.get_layer_status()]
    assert types == [f"{family}.{type(first_layer(model)).__name__}"] * 4
    model.print_trainable_parameters()
    assert f"trainable params: {status.trainable_params:,}" in capsys.readouterr().out


# Graphs


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_torch_compile_finds_no_graph_break_in_a_layer_which_takes_the_plain_path(form, training, monkeypatch):
    torch._dynamo.reset()
    apply, calls = _AddUpdate.apply, []
    monkeypatch.setattr(_AddUpdate, "apply", lambda *args: calls.append(1) or apply(*args))
    models = [adapted(form).train(training) for _ in "ab"]  # a load-balance offset moves in between
    layer, twin = map(first_layer, models)
    x = torch.randn(2, 5, 64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not calls
    want = twin(x)
    assert calls
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(dx, torch.autograd.grad(want.sum(), x)[0])


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(make_config, inputs):
    torch._dynamo.reset()
    losses = {}
    for compiled in (False, True):
        model = adapted(make_config, target_modules=["q_proj"]).train()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses[compiled] = []
        for _ in range(3):
            loss = run(input_ids=inputs, labels=inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[compiled].append(loss.item())
        losses[compiled] += [b.abs().sum().item() for name, b in model.named_buffers() if "_offset" in name]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_torch_export_of_a_layer(make_config):
    layer = first_layer(adapted(make_config))
    x = torch.randn(2, 5, 64)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))
    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    exported, other = torch.export.export(layer, (x,), dynamic_shapes=(sizes,)), torch.randn(3, 7, 64)
    torch.testing.assert_close(exported.module()(other), layer(other))
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(other), layer(other))


# Generation


def test_left_and_right_padding_give_the_same_answers_with_a_cache_and_without(make_config):
    model = adapted(make_config)
    text = torch.tensor([[1, 7, 9, 4, 12]])
    want = model(text).logits[0]
    for left in (True, False):
        pad = torch.zeros(1, 3, dtype=torch.long)
        ids = torch.cat([pad, text] if left else [text, pad], dim=1)
        mask = (ids != 0).long()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0]
        torch.testing.assert_close(logits[3:] if left else logits[:5], want, rtol=1e-4, atol=1e-5)
    alone = model.generate(text, max_new_tokens=4, do_sample=False, use_cache=False)[0, 5:]
    batch = torch.cat([torch.cat([pad, text], dim=1), torch.tensor([[1, 5, 5, 6, 7, 8, 9, 10]])])
    padded = model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=4, do_sample=False)[0, 8:]
    assert alone.tolist() == padded[: len(alone)].tolist()


# Two processes


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("two")
    ranks(f"import two_processes; two_processes.main(rank, {str(folder)!r})", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_ddp_needs_no_find_unused_parameters_averages_gradients_and_counts_the_experts_of_all_ranks(method, results):
    assert [result[f"under_ddp/{method}"] for result in results] == ["ok", "ok"]


@pytest.mark.slow
def test_fsdp2_computes_the_same_gradients_and_gives_the_weights_back(method, results):
    assert [result[f"under_fsdp2/{method}"] for result in results] == ["ok", "ok"]


# Architectures

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**SMALL, "num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 64}
HEADS = {"head_dim": 16}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
ARCHITECTURES = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, **HEADS),
    "gemma": GemmaConfig(**GROUPED, **HEADS),
    "mistral": MistralConfig(**GROUPED),
    "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=64, bos_token_id=1, eos_token_id=2),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48, max_position_embeddings=64),
    "t5": T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0),
    "classifier": LlamaConfig(**GROUPED, num_labels=3),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**GROUPED, **HEADS, **MOE),
}


def build(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    auto = {"t5": AutoModelForSeq2SeqLM, "classifier": AutoModelForSequenceClassification}
    return auto.get(architecture, AutoModelForCausalLM).from_config(ARCHITECTURES[architecture]).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(family, inputs, tmp_path, architecture):
    extra, batch = {}, {"input_ids": inputs, "labels": inputs}
    if architecture == "classifier":
        extra, batch["labels"] = {"modules_to_save": ["score"], "task_type": "SEQ_CLS"}, torch.tensor([0, 1, 2])
    model = adapted(family, build(architecture), **extra)
    got = model(**batch)
    assert not torch.allclose(got.logits, build(architecture)(**batch).logits)
    model.train()(**batch).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    again = reopened(model.eval(), tmp_path, build(architecture))
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    if architecture != "classifier":
        want = model.generate(input_ids=inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(again.generate(input_ids=inputs, max_new_tokens=3, do_sample=False), want)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("mixtral", "qwen3_moe")])
def test_default_targets_are_those_of_a_lora(family, architecture):
    ours, loras = (get_peft_model(build(architecture), form()) for form in (METHODS[family], LORA))
    assert set(ours.targeted_module_names) == set(loras.targeted_module_names)


def test_default_targets_of_mixtures_are_the_attention_or_have_to_be_given(family):
    """LoRA's own defaults do not fit Mixtral under transformers 5 (peft 0.21.2 raises there)."""
    model = get_peft_model(build("mixtral"), METHODS[family]())
    assert {name.rsplit(".", 1)[1] for name in model.targeted_module_names} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(build("qwen3_moe"), METHODS[family]())


def test_fused_experts_of_a_mixture_are_left_alone_and_named(family):
    """transformers 5 keeps the experts of a mixture in one 3-d parameter: no linear module, nothing to wrap."""
    model = adapted(family, build("qwen3_moe"))
    assert not any("experts" in name for name in model.targeted_module_names)
    experts = build("qwen3_moe").model.layers[0].mlp.experts
    assert not any(isinstance(m, nn.Linear) for m in experts.modules())
    with pytest.raises(ValueError, match=rf"experts \({type(experts).__name__}\) is not supported.*modules_to_save"):
        adapted(family, build("qwen3_moe"), target_modules=["experts"])


# Bad input


def test_the_file_of_another_base_is_refused(make_config, tmp_path):
    adapted(make_config).save_pretrained(tmp_path)
    refusal = "size mismatch for|another base model|is not the one that this adapter was trained with"
    with pytest.raises((RuntimeError, ValueError), match=refusal):
        PeftModel.from_pretrained(build("llama"), tmp_path)


def test_a_file_with_no_weights_of_the_method_is_reported(make_config, tmp_path):
    adapted(make_config).save_pretrained(tmp_path)
    save_file({"something": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="Found missing adapter keys while loading the checkpoint"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
