"""recipes/merge.py and recipes/export.py on a tiny model."""

import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from helpers import (
    METHODS,
    STATIC,
    adapted,
    csv_rows,
    inputs_of,
    jsonl,
    load_recipe,
    quantized,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from shared.tasks import find_task
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)

from peft_mora import export
from peft_mora.export import effect_error, exact_lora, exportable_layers, fit_lora, lora_errors, save_lora
from peft_mora.lora_file import Lora, read_lora
from peft_mora.quantization import save_plain
from trl_callbacks.subspace import Subspace


ROUTED = tuple(name for name in METHODS if name not in STATIC)


def assert_same(lora: PeftModel, model: PeftModel, inputs: torch.Tensor) -> None:
    """Equal logits in float64, where only the rounding of (alpha / r)·B to the file's float32 is left."""
    got, want = (m.eval().double()(inputs).logits for m in (lora, model))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert (got - model(inputs).logits).abs().max() > 0.1


@pytest.mark.parametrize("method", STATIC)
def test_an_exact_lora_opened_by_plain_peft_gives_the_same_logits(method, inputs, tmp_path):
    patterns = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"down_proj": 5}}
    model = adapted(method, tasks=2 if method == "mora-dense" else 1, **patterns)
    loras = exact_lora(model)
    config = save_lora(model, loras, tmp_path / "lora")
    if method in ("mora-dense", "lori"):  # the adapter's own file is read as its layers compute
        model.save_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(read_lora(tmp_path / "adapter").loras, loras, rtol=0, atol=0)
        shutil.rmtree(tmp_path / "adapter")
    assert_same(PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora"), model, inputs)
    written = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and written["r"] == written["lora_alpha"] == config.r
    assert config.r == {"mora-dense": 12, "furina": 18}.get(method, 6)
    assert not written["rank_pattern"] and not written["alpha_pattern"]
    assert set(written["target_modules"]) == set("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    state = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert {len(t) if "lora_A" in k else t.shape[1] for k, t in state.items()} == {config.r}
    key = r"base_model\.model\.model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight"
    assert len(state) == 28 and all(re.fullmatch(key, name) for name in state)
    assert os.listdir(tmp_path) == ["lora"]  # no temporary folder is left


def test_conv1d_modules_and_a_part_of_the_layers_are_exported_as_they_are(inputs, tmp_path):
    model = adapted("lori", tiny_gpt2(), exclude_modules=r".*h\.0\..*")
    save_lora(model, exact_lora(model), tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora")
    assert_same(plain, model, inputs)
    assert set(plain.targeted_module_names) == set(model.targeted_module_names)


def test_what_a_plain_lora_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No LoRA equals adapter 'default'.*fit_lora"):
        exact_lora(adapted("mora", tiny_llama()))
    with pytest.raises(ValueError, match="modules_to_save=.*no place"):
        exact_lora(adapted("lori", tiny_llama(), modules_to_save=["lm_head"], exclude_modules=["lm_head"]))
    model = adapted("lori", tiny_llama())
    with pytest.raises(ValueError, match="no MORA, LORI, .* adapter named 'typo'"):
        exact_lora(model, "typo")
    with model.disable_adapter(), pytest.raises(ValueError, match="as it works alone"):
        exact_lora(model)
    with pytest.raises(FileExistsError, match="delete it"):
        save_lora(model, exact_lora(model), tmp_path)


def test_a_lora_of_a_part_of_the_modules_is_no_export(tmp_path):
    model = adapted("mora", tiny_llama())
    for batches in ([], iter(padded(0))):  # a generator is empty after one pass
        with pytest.raises(
            ValueError, match="adapted modules saw no input, or zeros alone, e.g. 'model.layers.*as a list"
        ):
            fit_lora(model, batches, gram_bytes=1)
    loras = fit_lora(model, padded(0))
    (_, *rest) = loras.items()
    with pytest.raises(ValueError, match="The adapter has 14 modules, and there are 13 LoRAs, not alike in"):
        save_lora(model, dict(rest), tmp_path / "part")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no token to measure"):
        effect_error(model, loras, [])


def test_an_effect_is_measured_by_next_tokens_alone():
    model = adapted("lori", tiny_bert(BertForSequenceClassification), target_modules=["query"])
    with pytest.raises(ValueError, match="BertForSequenceClassification gives none"):
        effect_error(model, exact_lora(model), padded(1))


def test_what_is_not_finite_is_never_exported_as_exact_or_close():
    """No comparison with NaN is true, also not `error > bound`."""
    for method in ("lori", "mora"):
        model = adapted(method)
        loras = exact_lora(model) if method == "lori" else fit_lora(model, padded(0))
        with torch.no_grad():
            norm = model.get_base_model().model.norm.weight
            norm[3] = float("nan")
            with pytest.raises(ValueError, match="with the adapter, or the base alone, are not finite"):
                effect_error(model, loras, padded(1))
            norm[3] = 1.0
            name, (A, B) = next(iter(loras.items()))
            wrong = loras | {name: (A, B / 0)}
            with pytest.raises(ValueError, match="logits of the model with the LoRA are not finite"):
                effect_error(model, {n: Lora(*lora) for n, lora in wrong.items()}, padded(1))
            with pytest.raises(ValueError, match=f"in module '{name}' is not finite"):
                lora_errors(model, {n: Lora(*lora) for n, lora in wrong.items()}, padded(1))
            model.get_base_model().model.embed_tokens.weight[5] = float("inf")
            with pytest.raises(ValueError, match="What goes into module .* is not finite"):
                fit_lora(model, padded(0))
            next(p for n, p in model.named_parameters() if n.endswith(f"{method}_B.default.weight"))[0, 0] = torch.nan
        with pytest.raises(ValueError, match="'default' has values that are not finite.*e.g. in 'model.layers.0"):
            exact_lora(model) if method == "lori" else fit_lora(model, padded(0))


def padded(seed: int, rows: int = 24, columns: int = 12) -> list[dict[str, torch.Tensor]]:
    """Batches of right-padded random tokens; garbage under the padding must not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, columns), generator=generator)
    lengths = torch.randint(3, columns + 1, (rows, 1), generator=generator)
    mask = (torch.arange(columns) < lengths).long()
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(8), mask.split(8), strict=True)]


def output_errors(model: PeftModel, lora: PeftModel, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The same figures by another way: layer outputs less the base's, of both models, on the first one's inputs."""
    sums: dict = {}
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}
    for batch in batches:
        with inputs_of(layers) as inputs, torch.no_grad():
            model(**batch)
        real = batch["attention_mask"].bool()
        for name, layer in layers.items():
            x, other = inputs[name][0][real].float(), lora.get_submodule(name)
            base = layer.base_layer(x).float()
            y = layer(x).float() - base
            old = sums.get(name, (0, 0))
            error = (other(x).float() - base - y).square().sum().item()
            sums[name] = (old[0] + error, old[1] + y.square().sum().item())
    return {name.removeprefix("base_model.model."): (e / y) ** 0.5 for name, (e, y) in sums.items()}


@torch.no_grad()
def logit_error(model: PeftModel, lora: PeftModel, batches: list[dict[str, torch.Tensor]]) -> float:
    """The overall figure from two plain models."""
    adapter, base, plain = [], [], []
    for batch in batches:
        real = batch["attention_mask"].bool()
        adapter.append(model(**batch).logits[real].float())
        plain.append(lora(**batch).logits[real].float())
        with model.disable_adapter():
            base.append(model(**batch).logits[real].float())
    adapter, base, plain = (torch.cat(x) - torch.cat(x).mean(-1, keepdim=True) for x in (adapter, base, plain))
    return ((plain - adapter).norm() / (base - adapter).norm()).item()


def test_a_forward_that_fails_leaves_no_hook_behind():
    model = adapted("lori", tiny_llama())
    loras = exact_lora(model)
    calls = []

    def fail_at_the_third(*_) -> None:  # the adapter's, the base's, then the LoRA's by hooks
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(fail_at_the_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        effect_error(model, loras, padded(1))
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", ROUTED)
def test_a_fitted_lora_s_error_on_other_inputs_is_what_an_independent_measurement_finds(method, tmp_path):
    model = adapted(method, tiny_llama())
    seen, unseen = padded(0, rows=64), padded(1)
    loras = fit_lora(model, seen)
    by_module, effect = lora_errors(model, loras, unseen), effect_error(model, loras, unseen)
    assert len(by_module) == 14 and all(0 < e < 1.5 for e in by_module.values()) and 0.01 < effect.error < 1
    save_lora(model, loras, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    assert output_errors(model, plain, unseen) == pytest.approx(by_module, rel=1e-4)
    assert logit_error(model, plain, unseen) == pytest.approx(effect.error, rel=1e-4)
    assert effect.same_token_base < effect.same_token <= 1
    # on the inputs it was fitted on it is closest: no other rank or damping does better there
    fitted = lora_errors(model, fit_lora(model, seen, ridge=1e-9), seen)
    for other in (fit_lora(model, seen, rank=2, ridge=1e-9), fit_lora(model, seen, ridge=1.0)):
        worse = lora_errors(model, other, seen)
        assert all(fitted[name] < worse[name] for name in fitted)
    assert model.active_adapters == ["default"] and not model.training


class Live(TorchDispatchMode):
    """The most bytes at a time of tensors that operations have made and that `counts` says yes to."""

    def __init__(self, counts: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self.counts, self.most = counts, 0
        self.made: list[weakref.ref] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.made += [weakref.ref(x) for x in tree_leaves(made) if isinstance(x, torch.Tensor) and self.counts(x)]
        storages = [x.untyped_storage() for ref in self.made if (x := ref()) is not None]
        self.most = max(self.most, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        return made


def words(model: torch.nn.Module, count: int) -> torch.nn.Module:
    model.resize_token_embeddings(count)
    return model


@torch.no_grad()
def test_the_effect_is_the_plain_formula_s_a_few_tokens_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOKENS", 7)
    model, batches = adapted("mora", words(tiny_llama(), 4000)), padded(1)
    loras = fit_lora(model, batches)
    save_lora(model, loras, tmp_path / "lora")
    lora = PeftModel.from_pretrained(words(tiny_llama(), 4000), tmp_path / "lora").eval()
    effect = effect_error(model, loras, batches)
    assert logit_error(model, lora, batches) == pytest.approx(effect.error, rel=1e-4)
    same = []
    for batch in batches:
        found = [m(**batch).logits[batch["attention_mask"].bool()].argmax(-1) for m in (model, lora)]
        with model.disable_adapter():
            found.append(model(**batch).logits[batch["attention_mask"].bool()].argmax(-1))
        same.append(torch.stack([found[0] == other for other in found[1:]]))
    assert torch.cat(same, 1).double().mean(1).tolist() == pytest.approx(effect[1:])
    with Live(lambda x: x.shape[-1:] == (4000,) and len(x) != 64) as live:  # not the head's weight
        effect_error(model.bfloat16(), loras, batches)
    row = 4000 * 4  # bytes of a token's logits in float32
    assert live.most <= 2 * 8 * 12 * row / 2 + 5 * 7 * row < 3 * 8 * 12 * row / 2


def test_the_memory_for_fitting_is_what_was_asked_for():
    model, batches = adapted("mora"), padded(0)
    for budget in (4, 6):  # in XᵀX of the widest module
        with Live(lambda x: x.dtype == torch.float64 and x.dim() == 2 and x.shape[0] == x.shape[1] >= 64) as live:
            fit_lora(model, batches, gram_bytes=budget * 8 * 128**2)
        assert 2 * 8 * 128**2 < live.most <= budget * 8 * 128**2


def test_fitting_in_several_passes_gives_the_same_loras():
    model = adapted("mora", tiny_llama())
    whole, parts = fit_lora(model, padded(0)), fit_lora(model, padded(0), gram_bytes=1)
    assert all(torch.equal(a, b) for name in whole for a, b in zip(whole[name], parts[name], strict=True))


def test_a_routed_adapter_with_nothing_to_choose_is_fitted_exactly():
    """FLYLORA with top_k = r is linear: regression has to find ΔW itself."""
    model = adapted("flylora", top_k=4, alpha=4)
    loras = fit_lora(model, padded(0, rows=64), ridge=1e-12)
    assert effect_error(model, loras, padded(1)).error < 1e-4


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Two tasks in the tiny model's words, each with answers of its own."""
    answers = {"sky": ("red", "blue"), "way": ("north", "south")}
    for name, labels in answers.items():
        for split, middle in (("train", "a on the"), ("test", "the under a")):
            records = [
                {"prompt": f"{word} {animal} {name}", "answer": label}
                for word in middle.split()
                for animal, label in zip(("cat", "dog"), labels, strict=True)
            ]
            jsonl(tmp_path / "data" / name / f"{split}.jsonl", *records)
    return tmp_path / "data"


def saved(method, llama_folder, folder) -> Path:
    adapted(method, quantized(llama_folder)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lori-sparse", "mora-dense"])
def test_the_export_recipe_writes_what_peft_opens(method, llama_folder, tasks, tmp_path, inputs, run_recipe, capsys):
    adapter = saved(method, llama_folder, tmp_path / "adapter")
    command = (adapter, "--output", tmp_path / "lora", "--data", tasks, "--task", "sky", "--device", "cpu")
    printed = run_recipe("export", *command)
    assert "exact, but for rounding in 16 bits" in printed
    assert float(re.search(r"other texts: (\S+)", printed).group(1)) < 0.05
    assert "vLLM: --enable-lora --max-lora-rank 8\n" in printed  # of rank 4; it does not take 4
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    assert_same(lora, PeftModel.from_pretrained(tiny_llama(), adapter), inputs)
    with pytest.raises(SystemExit):
        run_recipe("export", *command)
    assert "exists: delete it" in capsys.readouterr().err


def test_the_base_that_a_server_loads_has_the_weights_that_the_adapter_was_trained_over(
    llama_folder, tasks, tmp_path, inputs, run_recipe
):
    adapter, to = saved("lori", llama_folder, tmp_path / "adapter"), tmp_path / "base16"
    common = (adapter, "--output", tmp_path / "lora", "--data", tasks, "--task", "sky", "--device", "cpu")
    with pytest.raises(SystemExit, match="is not quantised: a server loads it as it is"):
        run_recipe("export", *common, "--bits", 16, "--base-to", to)
    assert not (tmp_path / "lora").exists()
    assert f"--base {to}\n" in run_recipe("export", *common, "--base-to", to)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["base_model_name_or_path"] == str(to)
    plain, four_bit = AutoModelForCausalLM.from_pretrained(to), quantized(llama_folder)
    original = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert getattr(plain.config, "quantization_config", None) is None and plain.dtype == torch.bfloat16
    for name, module in plain.named_modules():
        if isinstance(own := four_bit.get_submodule(name), Linear4bit):
            weight = dequantize_4bit(own.weight.data, own.weight.quant_state)
            assert torch.equal(module.weight, weight)
            assert not torch.equal(module.weight, original.get_submodule(name).weight)
    assert AutoTokenizer.from_pretrained(to).get_vocab() == AutoTokenizer.from_pretrained(llama_folder).get_vocab()
    served = PeftModel.from_pretrained(plain, tmp_path / "lora")(inputs).logits.float()
    trained = PeftModel.from_pretrained(four_bit, adapter)(inputs).logits.float()
    elsewhere = PeftModel.from_pretrained(original, tmp_path / "lora")(inputs).logits.float()
    assert (served - trained).norm() < 0.3 * (elsewhere - trained).norm()  # the rest is rounding in bfloat16


@pytest.mark.parametrize("method", ["mora", "flylora"])
def test_the_export_recipe_refuses_above_its_bound_and_writes_nothing(
    method, llama_folder, tasks, tmp_path, run_recipe
):
    adapter = saved(method, llama_folder, tmp_path / "adapter")
    command = [adapter, "--output", tmp_path / "out/lora", "--data", tasks, "--task", "sky", "--device", "cpu"]
    with pytest.raises(SystemExit, match="Nothing written: the error .* above --max-error 0.001.*--force"):
        run_recipe("export", *command, "--max-error", "0.001")
    assert not (tmp_path / "out").exists()
    told = run_recipe("export", *command, "--max-error", "0.001", "--force")
    printed = float(re.findall(r"other texts: (\S+)", told)[-1])
    # by hand, over the test texts that are no training texts
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    fitted, test = ((tasks / f"sky/{split}.jsonl").read_text().splitlines() for split in ("train", "test"))
    records = [json.loads(line) for line in test if line not in fitted]
    assert 0 < len(records) < len(test)
    batch = tokenizer([f"{r['prompt']} {r['answer']}" for r in records], return_tensors="pt")
    model = PeftModel.from_pretrained(quantized(llama_folder), adapter).eval()
    loras = PeftModel.from_pretrained(quantized(llama_folder), tmp_path / "out/lora").eval()
    # printed in two digits, and the two add up in bfloat16 in another order
    assert logit_error(model, loras, [dict(batch)]) == pytest.approx(printed, rel=0.1)


def test_the_export_recipe_says_in_a_line_what_it_cannot_and_opens_every_class_of_base(
    llama_folder, tasks, tmp_path, run_recipe
):
    def run(name: str) -> str:
        how = ("--data", tasks, "--task", "sky", "--device", "cpu", "--bits", 4 if name == "embedding" else 16)
        return run_recipe("export", tmp_path / name, "--output", tmp_path / f"{name}-lora", *how)

    tiny_t5().save_pretrained(tmp_path / "t5")
    for name, method, kind, base, fields in (
        ("no-task", "mtllora", AutoModelForCausalLM, llama_folder, {"default_task": None}),
        ("classifier", "lori", AutoModelForSequenceClassification, llama_folder, {"task_type": "SEQ_CLS"}),
        ("routed", "mora", AutoModel, llama_folder, {"task_type": "FEATURE_EXTRACTION"}),
        ("embedding", "lori", AutoModel, llama_folder, {"task_type": "FEATURE_EXTRACTION"}),
        ("seq2seq", "lori", AutoModelForSeq2SeqLM, tmp_path / "t5", {"task_type": "SEQ_2_SEQ_LM"}),
    ):
        targets = ["q", "v"] if name == "seq2seq" else ["q_proj"]
        model = adapted(method, kind.from_pretrained(base), target_modules=targets, **fields)
        model.save_pretrained(tmp_path / name)
        why = {
            "no-task": "Choose one first: peft_mora.set_task",
            "classifier": "modules_to_save=.*Train without it",
            "routed": "is over a LlamaModel, which gives none",
        }
        if name in why:
            with pytest.raises(SystemExit, match=why[name]):
                run(name)
            assert not (tmp_path / f"{name}-lora").exists()
        else:
            assert "exact, but for rounding in 16 bits; not measured" in run(name)
            want = {name: B @ A for name, (A, B) in exact_lora(model).items()}
            found = {name: B @ A for name, (A, B) in read_lora(tmp_path / f"{name}-lora").loras.items()}
            torch.testing.assert_close(found, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bound", ["nan", "inf", "-0.1"])
def test_the_export_recipe_takes_no_bound_that_nothing_is_above(bound, run_recipe, capsys):
    with pytest.raises(SystemExit):
        run_recipe("export", "adapter", "--output", "out", f"--max-error={bound}")
    assert "is not a finite number >= 0" in capsys.readouterr().err


OWN = ("sky alone", "way alone", "each task its own")


def test_the_merge_recipe_scores_every_method_s_combinations(llama_folder, tasks, tmp_path, run_recipe):
    command = [
        "--model",
        llama_folder,
        "--data",
        tasks,
        "--methods",
        "lori",
        "flylora",
        "furina",
        "--output",
        tmp_path / "out",
    ]
    run_recipe("merge", *command, *"--tasks sky --steps 1 --device cpu --rules mean --rank 2 --weights 1 0.5".split())
    rows = csv_rows(tmp_path / "out/merge.csv")
    assert [(row["method"], row["combined by"], row["weight"]) for row in rows] == [
        ("base", "no adapter", ""),
        *(("lori", name, "") for name in OWN[::2]),
        *(("lori", "exact sum", weight) for weight in ("1", "0.5")),
        ("lori", "mean", ""),
        *(("flylora", name, "") for name in OWN[::2]),
        *(("flylora", "active together", weight) for weight in ("1", "0.5")),
        *(("furina", name, "") for name in OWN[::2]),
        *(("furina", "active together", weight) for weight in ("1", "0.5")),
        ("furina", "mean", ""),
    ]


def test_the_merge_recipe_scores_every_combination_and_goes_on_with_more(
    llama_folder, tasks, tmp_path, run_recipe, monkeypatch
):
    records = [{"text": "the cat sat on the red mat"}, {"text": "a dog ran under the log"}]
    passages = jsonl(tmp_path / "passages.jsonl", *records)
    recipe, output = load_recipe("merge"), tmp_path / "out"
    command = ["--model", llama_folder, "--data", tasks, "--perplexity", passages, "--output", output]
    command += "--tasks sky,way --ranks 4,2 --seeds 3 --steps 20 --lr 0.03 --device cpu".split()
    options = "--ways cat linear --methods lora --weights 1 --rules two-passes robust mean --rank 2 --prompts 4"
    told = run_recipe(recipe, *command, *options.split())
    rows = csv_rows(output / "merge.csv")
    assert [(row["method"], row["combined by"], row["weight"]) for row in rows] == [
        ("base", "no adapter", ""),
        *(("lora", name, "") for name in OWN),
        ("lora", "cat", "1"),  # PEFT has no "linear" of rank 4 and 2, and that is said
        *(("lora", rule, "") for rule in ("two-passes", "mean")),
    ]
    assert "linear, refused: " in told and "robust, refused: " in told and "‖ΔW‖" in told and "kept_rest" in told
    lora = {row["combined by"]: row for row in rows if row["method"] == "lora"}
    base, alone, merged = rows[0], lora["each task its own"], lora["two-passes"]
    assert float(base["greedy"]) == 0 and float(base["label"]) > 0
    for row in (alone, merged):
        scores = [float(row[task]) for task in ("sky", "way")]
        assert float(row["greedy"]) == pytest.approx(sum(scores) / 2)
        learnt = [t for t in ("sky", "way") if float(alone[t]) >= max(float(base[f"{t} label"]), 0.5) + 0.1]
        assert row["learnt"] == f"{len(learnt)} of 2" and learnt
        kept = sum(float(row[t]) for t in learnt) / sum(float(alone[t]) for t in learnt)
        assert float(row["kept"]) == pytest.approx(kept)
    worst = max(float(lora[f"{task} alone"]["perplexity"]) for task in ("sky", "way"))
    assert float(alone["perplexity"]) == worst != float(base["perplexity"])
    report = json.loads((output / "seed-3/lora-merged-two-passes-2-4/merge_report.json").read_text())
    assert report["rule"] == "inputs" and report["options"]["passes"] == 2 and report["rank"] == 2
    assert [a["rank"] for a in report["adapters"]] == [4, 2]
    assert (output / "seed-3/lora-merged-two-passes-2-4/interference.png").read_bytes()[1:4] == b"PNG"

    monkeypatch.setattr(recipe, "train", None)  # what is there is not trained again
    more = "--reuse --methods lora --rank 2 --rules two-passes inputs mean --prompts 2 --weights 1 --ways svd".split()
    run_recipe(recipe, *command, *more, "--settings", "{}", '{"floor": 0, "last": 0.25}', '{"passes": 1}')
    again = csv_rows(output / "merge.csv")
    assert again[: len(rows)] == rows
    assert [tuple(row[name] for name in ("combined by", "rank", "settings")) for row in again[len(rows) :]] == [
        ("svd", "2", ""),
        ("two-passes", "2", ""),
        ("two-passes", "2", '{"floor": 0, "last": 0.25}'),
        ("two-passes", "2", '{"passes": 1}'),
        ("inputs", "2", ""),
        ("inputs", "2", '{"floor": 0, "last": 0.25}'),
    ]  # "mean" was there
    run = json.loads((output / "run.json").read_text())
    assert run.pop("whole") is False
    (output / "run.json").write_text(json.dumps(run))  # of a version that had no such switch
    of_train = ["--score-on", "train", "--prompts", 4, "--metrics", "greedy"]
    run_recipe(recipe, *command, *more[:6], "mean", "--ways", *of_train)
    on_train = [row for row in csv_rows(output / "merge.csv") if row["scored"] != "test"]
    assert {row["scored"] for row in on_train} == {"train: 4"}  # of both tasks
    assert len(on_train) == 5 and all(float(row["sky"] or 0) in (0, 0.5, 1) for row in on_train)  # of two records
    assert on_train[0]["sky label"] and on_train[0]["label"]  # of the base, whose labels say what is learnt
    assert all(row["sky label"] == row["label"] == "" for row in on_train[1:]) and on_train[-1]["learnt"]
    run_recipe(recipe, *command, *more[:6], "mean", "--ways", *of_train, "label")  # what was not asked for is made
    again = [row for row in csv_rows(output / "merge.csv") if row["scored"] != "test"]
    assert [row["combined by"] for row in again] == [row["combined by"] for row in on_train]
    assert all(float(row["label"]) > 0 for row in (again[0], *again[3:])) and again[1]["sky label"]
    of_train[3] = 5  # one record less is left over to score on
    run_recipe(recipe, *command, *more[:6], "mean", "--ways", *of_train)
    others = [row for row in csv_rows(output / "merge.csv") if row["scored"] == "train: 2"]
    assert [row["combined by"] for row in others] == [row["combined by"] for row in on_train]
    with pytest.raises(SystemExit, match="is a run with other arguments.*'r': "):
        run_recipe(recipe, *command, "--reuse", "--r", 2)
    run = json.loads((output / "run.json").read_text())
    assert run["program"] == f"{recipe.__name__}.py"
    (output / "run.json").write_text(json.dumps(run | {"program": "continual.py"}))
    with pytest.raises(SystemExit, match=r"is a run of continual\.py, not of .*; give another --output"):
        run_recipe(recipe, *command)  # which would delete it
    assert len(csv_rows(output / "merge.csv")) > 5 and "continual.py" in (output / "run.json").read_text()


def test_the_merge_recipe_s_adapters_learn_whole_texts_and_write_prompts(
    llama_folder, tasks, tmp_path, run_recipe, monkeypatch
):
    monkeypatch.setattr("peft_mora.merging.written.LIKELIER", -9.0)  # they have learnt little
    command = ["--model", llama_folder, "--data", tasks, "--output", tmp_path / "out", "--whole"]
    command += "--tasks sky,way --steps 4 --device cpu --methods lora --ways --rank 2 --metrics greedy".split()
    run_recipe("merge", *command, *"--rules two-passes inputs mean --prompts self 2 --score-on train".split())
    rows = [(row["combined by"], row["prompts"]) for row in csv_rows(tmp_path / "out/merge.csv")[-5:]]
    assert rows == [(rule, n) for rule in ("two-passes", "inputs") for n in ("self", "2")] + [("mean", "")]
    told = json.loads((tmp_path / "out/seed-0/lora-merged-two-passes-2-self/merge_report.json").read_text())
    assert told["options"]["prompts"] == "self"
    own = load_file(tmp_path / "out/seed-0/lora-sky/adapter_model.safetensors")
    answers = [x for x in command if x != "--whole"]
    run_recipe("merge", *answers[:5], tmp_path / "answers", *answers[6:], "--rules", "mean")
    other = load_file(tmp_path / "answers/seed-0/lora-sky/adapter_model.safetensors")
    assert own.keys() == other.keys() and not any(
        torch.equal(x, other[name]) for name, x in own.items() if "lora_B" in name
    )


def test_the_merge_recipe_s_adapters_leave_protected_text_alone(llama_folder, tasks, tmp_path, run_recipe):
    pages = jsonl(
        tmp_path / "pages.jsonl", {"text": "the cat sat on the red mat"}, {"text": "a dog ran under the log"}
    )
    command = ["--model", llama_folder, "--data", tasks, "--protect", pages, "--output", tmp_path / "out"]
    command += "--tasks sky,way --steps 4 --device cpu --methods lora --ways --rules mean --metrics greedy".split()
    run_recipe("merge", *command)
    memory = Subspace.load(tmp_path / "out/protected")
    for folder in ("lora-sky", "lora-way", "lora-merged-mean-sum"):
        loras = read_lora(tmp_path / "out/seed-0" / folder).loras
        assert loras and all(
            (A.double() @ memory.right[memory.group_of(n)].double()).norm() < 1e-5 * A.norm()
            for n, (A, _) in loras.items()
        )
    assert csv_rows(tmp_path / "out/merge.csv")[-1]["combined by"] == "mean"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "label"], "greedy has to be there"),
        (["--ranks", "8,4"], "--ranks has 2 ranks for 3 tasks"),
        (["--settings", '{"density": 0.1}', "--rules", "two-passes"], "no rule of --rules takes that"),
        (["--settings", '{"strength": 2}'], "`strength` must be a share in [0, 1]"),
        (["--settings", '{"passes": 0}'], "`passes` must be an integer >= 1"),
        (["--settings", '{"distill": -1}'], "`distill` must be a number of steps >= 0"),
        (["--settings", '{"strengths": []}', "--rules", "inputs"], "`strengths` must be a share in [0, 1]"),
        (["--settings", '{"weights": [1, 2]}', "--rules", "mean"], "3 adapters need 3 weights, got 2"),
        (["--settings", '{"weights": [1, 1, -2]}', "--rules", "mean"], "The weights add up to 0"),
        (["--settings", '{"weights": [1, 1, -2]}', "--rules", "inputs"], "This rule weighs squared errors"),
        (["--settings", '{"factor": "two"}', "--rules", "iso-c"], "`factor` must be a number"),
        (["--settings", '{"then": "mean"}', "--rules", "dare"], "`then` must be 'sum' or 'ties'"),
        (["--settings", '{"block": 2}', "--rules", "opcm"], "`block` must be"),
        (["--prompts", "self", "--rules", "inputs"], "--prompts self needs --whole"),
        (["--prompts", "self", "--whole", "--settings", '{"last": 0}'], "--prompts self reads no last"),
        (["--settings", '{"ridge": 0}', "--rules", "least-squares"], "`ridge` must be a number > 0"),
        (["--protect", "self", "--methods", "lora", "lori"], "--protect: the projection cannot hold lori"),
    ],
)
def test_the_merge_recipe_refuses_what_would_have_no_effect(arguments, message, run_recipe, capsys):
    with pytest.raises(SystemExit):
        run_recipe("merge", *arguments)
    assert message in capsys.readouterr().err


@pytest.fixture
def merge_run(llama_folder, tasks, tmp_path, run_recipe):
    """merge.py with its common arguments, in tmp_path / "out"."""

    def run(*arguments) -> str:
        common = ["--model", llama_folder, "--data", tasks, "--output", tmp_path / "out", "--device", "cpu"]
        common += "--tasks sky,way --steps 1 --ways --rules mean --metrics greedy --methods lora".split()
        return run_recipe("merge", *common, *arguments)

    return run


def test_a_new_merge_run_leaves_no_adapter_of_the_old_one(merge_run, tmp_path):
    """Else --reuse would take it as trained with the new arguments."""
    out = tmp_path / "out"
    merge_run("--methods", "lora", "furina")
    mine = [out / "seed-0" / "notes-of-mine", out / "seed-final" / "lora-mine", tmp_path / "elsewhere"]
    for folder in mine:
        folder.mkdir(parents=True)
    (out / "seed-0" / "lora-linked").symlink_to(tmp_path / "elsewhere")
    (out / "seed-0" / "lora-notes.txt").write_text("mine")
    merge_run("--seeds", 7, "--tasks", "sky", "--steps", 2)
    left = {path.parent.relative_to(out).as_posix() for path in out.glob("seed-*/*/adapter_config.json")}
    assert left == {"seed-7/lora-sky", "seed-7/lora-merged-mean-sum"}
    assert all(folder.exists() for folder in mine) and (out / "seed-0" / "lora-notes.txt").exists()
    assert not (out / "seed-0" / "lora-linked").is_symlink()


def test_a_merge_run_with_wrong_arguments_deletes_nothing(merge_run, tasks, tmp_path, monkeypatch):
    merge_run("--tasks", "sky")
    paths = [path for path in (tmp_path / "out").glob("**/*") if "tasks" not in path.parts[-2:]]
    assert len(paths) > 5
    none = jsonl(tmp_path / "none.jsonl", {"title": "a cat"})
    monkeypatch.setattr("peft_mora.opening.with_adapter", None)
    for wrong in (
        ["--tasks", "sky,wya"],
        ["--methods", "smora", "--tasks", "sky", "--r", -1],
        ["--protect", none],
        ["--protect", tmp_path / "no.jsonl"],
        ["--perplexity", tmp_path / "no.jsonl"],
        ["--perplexity", jsonl(tmp_path / "empty.jsonl")],
        ["--score-on", "train"],
        ["--model", tmp_path / "no"],
    ):
        with pytest.raises((SystemExit, ValueError, FileNotFoundError)):
            merge_run(*wrong)
        assert all(path.exists() for path in paths), wrong


def test_merge_refuses_files_that_say_something_else_now(merge_run, tasks, tmp_path):
    pages = jsonl(tmp_path / "pages.jsonl", {"text": "the cat sat on the red mat"})
    arguments = ["--tasks", "sky", "--reuse", "--perplexity", pages, "--protect", pages]
    merge_run(*arguments)
    jsonl(pages, {"text": "a dog ran under the log"})
    with pytest.raises(SystemExit, match=r"\(there, here\): \{'perplexity content': .* 'protect content': "):
        merge_run(*arguments)
    jsonl(tasks / "sky" / "test.jsonl", {"prompt": "the cat", "answer": "red"}, {"prompt": "the", "answer": "blue"})
    written = {path: path.read_bytes() for path in (tmp_path / "out" / "seed-0" / "tasks").iterdir()}
    with pytest.raises(SystemExit, match=r"\(there, here\): \{'records': "):
        merge_run(*arguments)
    assert written and all(path.read_bytes() == found for path, found in written.items())


@pytest.mark.parametrize(("extra", "seeds"), [([], [5, 6, 7]), (["--same-a"], [5, 5, 5])])
def test_each_task_s_adapter_is_drawn_from_a_seed_of_its_own(extra, seeds, tmp_path, monkeypatch):
    recipe, drawn = load_recipe("merge"), []

    def train(base, config, records, folder, args, callbacks) -> None:
        assert callbacks == []
        drawn.append((torch.initial_seed(), args.seed, config.r))

    monkeypatch.setattr(recipe, "train", train)
    monkeypatch.setattr(sys, "argv", ["merge.py", "--seed", "5", "--ranks", "8,4,16", *extra])
    args = recipe.parse()
    found = [find_task(name) for name in args.tasks]
    recipe.Run(args.seeds[0], "lora", "base", found, None, tmp_path, None, args).train()
    assert drawn == [(seed, seed, r) for seed, r in zip(seeds, (8, 4, 16), strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_output_layer_is_exported_where_its_weight_is_its_own(method, tmp_path):
    for tied in (False, True):
        model = adapted(method, tiny_llama(tied=tied), target_modules=["q_proj", "lm_head"])
        if tied:
            with pytest.raises(ValueError, match="'lm_head', whose weight is the embeddings' too.*`target_modules`"):
                exportable_layers(model)
        else:
            assert "lm_head" in exportable_layers(model)


def test_a_lora_of_what_does_nothing_is_infinitely_far_and_none_of_less_is_measured(inputs):
    model = get_peft_model(tiny_llama(), METHODS["lori"](target_modules="all-linear")).eval()
    batch = {"input_ids": inputs}
    loras = {name: Lora(A, B + 1) for name, (A, B) in exact_lora(model).items()}
    assert (
        effect_error(model, loras, [batch]).error == float("inf") == max(lora_errors(model, loras, [batch]).values())
    )
    assert effect_error(model, exact_lora(model), [batch]).error == 0
    loras.popitem()
    for measured in (effect_error, lora_errors):
        with pytest.raises(ValueError, match="there are 13 LoRAs, not alike in"):
            measured(model, loras, [batch])


def test_inputs_that_say_nothing_are_refused_by_a_fit(inputs):
    model = adapted("mora")
    with pytest.raises(ValueError, match="14 of 14 adapted modules saw no input"):
        fit_lora(model, [{"input_ids": inputs, "attention_mask": torch.zeros_like(inputs)}])
    with pytest.raises(ValueError, match="`ridge` must be a number >= 0"):
        fit_lora(model, [{"input_ids": inputs}], ridge=-1)
    with pytest.raises(ValueError, match="give a larger `ridge` than 0, or more text"):
        fit_lora(model, [{"input_ids": inputs[:1, :3]}], ridge=0)


def test_measuring_leaves_a_frozen_adapter_frozen_and_takes_loras_of_its_sizes_alone(inputs, tmp_path):
    adapted("lori").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loras = exact_lora(model)
    assert effect_error(model, loras, [{"input_ids": inputs}]).error < 1e-3
    assert not any(p.requires_grad for p in model.parameters())
    name = next(iter(loras))
    A, B = loras[name]
    with pytest.raises(ValueError, match=f"not alike in {name!r}"):
        save_lora(model, {**loras, name: Lora(A[:, 1:], B)}, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_base_that_is_not_copied_keeps_its_adapter(inputs, tmp_path):
    model = adapted("lori")
    before = model(inputs).logits
    with pytest.raises(ValueError, match="is not quantised, so a server loads it as it is"):
        export.save_with_base(model, exact_lora(model), tmp_path / "lora", tmp_path / "base", tmp_path)
    assert torch.equal(model(inputs).logits, before) and not any(tmp_path.iterdir())


def test_a_tokenizer_that_cannot_be_written_is_an_error(llama_folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_plain(tiny_llama(), tmp_path / "whole", llama_folder)
    assert not (tmp_path / "whole").exists()
