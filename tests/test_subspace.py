"""What goes into modules, and the files that protected directions are kept in."""

import json

import pytest
import torch
from conftest import quantized, tiny_gpt2, tiny_llama
from peft import get_peft_model
from test_linalg import covariance

from peft_mora import MoraConfig
from peft_mora.inputs import real_rows
from trl_callbacks import subspace as S


def test_old_inputs_are_remembered_to_their_energy_and_their_trace_in_full():
    subspace = make_subspace()
    one, two = covariance(8, 8, seed=1), covariance(8, 8, seed=2)
    subspace.remember("q", one)
    subspace.remember("q", 7 * two)  # every task has the same weight, however many tokens it had
    both = one / one.trace() + two / two.trace()
    kept = subspace.old_covariance("q").double()
    torch.testing.assert_close(kept.trace(), torch.tensor(2.0, dtype=torch.float64), rtol=1e-5, atol=0)
    assert torch.linalg.eigvalsh(both - kept).abs().max() < 0.05 * 2


# Inputs of a model


def adapted(model, **kwargs):
    model = get_peft_model(model, MoraConfig(r=2, target_modules="all-linear", **kwargs))
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "mora_A")}
    return model, layers


def padded_batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids}


def seen_inputs(model, layers, batches) -> dict[str, torch.Tensor]:
    """Every real token's input of every module, by the plainest of means."""
    seen: dict[str, list] = {name: [] for name in layers}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0].detach().double()))
        for n, m in layers.items()
    ]
    model.eval()
    for batch in batches:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    masks = torch.cat([b["attention_mask"].reshape(-1) for b in batches]).bool()
    return {n: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs])[masks] for n, xs in seen.items()}


@pytest.mark.parametrize("budget_gib", [4.0, 1e-6], ids=["one pass", "a pass for each input"])
def test_statistics_are_of_real_tokens_and_shared_inputs_share_them(budget_gib):
    model, layers = adapted(tiny_llama())
    batches = [padded_batch(), padded_batch()]
    model.train()
    found = S.input_statistics(model, layers, batches, budget_gib)
    assert model.training
    expected = seen_inputs(model, layers, batches)
    for group, modules in found.groups.items():
        for name in modules:
            x = expected[name]
            torch.testing.assert_close(found.covariance[group].double(), x.T @ x, rtol=1e-5, atol=1e-5)
    sharing = {tuple(name.rsplit(".", 1)[-1] for name in modules) for modules in found.groups.values()}
    assert sharing == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    assert len(found.groups) == 8


def test_module_that_saw_no_input_is_an_error():
    model, layers = adapted(tiny_llama())
    with pytest.raises(ValueError, match="saw no input"):
        S.input_statistics(model, {**layers, "idle": torch.nn.Linear(2, 2)}, [padded_batch()])


@pytest.mark.parametrize("shape", [(7, 4), (5, 2, 4), (1, 10, 4)])
def test_tokens_that_do_not_fit_the_mask_are_an_error(shape):
    with pytest.raises(ValueError, match="padding in 'lone'.*target_modules"):
        real_rows(torch.zeros(shape), torch.ones(2, 5), "lone")


def test_real_rows_are_those_of_the_mask_in_either_shape():
    x, mask = torch.arange(24.0).view(2, 3, 4), torch.tensor([[1, 1, 0], [0, 1, 1]])
    want = torch.stack([x[0, 0], x[0, 1], x[1, 1], x[1, 2]])
    assert torch.equal(real_rows(x, mask, "lone"), want) and torch.equal(real_rows(x.view(6, 4), mask, "lone"), want)


# Files


def make_subspace(model=None) -> S.Subspace:
    V = torch.linalg.qr(torch.randn(8, 3))[0]
    described = S.fingerprint(model if model is not None else tiny_llama())
    return S.Subspace("inputs", described, [{"name": "one"}], {"q": ("q", "k")}, {"q": V}, {"q": V[:, :1]})


def test_subspace_comes_back_from_its_files_as_it_was(tmp_path):
    subspace = make_subspace()
    subspace.remember("q", covariance(8, 5).float())
    subspace.save(tmp_path / "subspace")
    again = S.Subspace.load(tmp_path / "subspace")
    assert (again.source, again.model, again.tasks, again.groups) == (
        subspace.source, subspace.model, subspace.tasks, subspace.groups,
    )  # fmt: skip
    assert torch.equal(again.right["q"], subspace.right["q"]) and torch.equal(again.left["q"], subspace.left["q"])
    torch.testing.assert_close(again.old_covariance("q"), subspace.old_covariance("q"), atol=1e-3, rtol=1e-2)
    assert [path.name for path in tmp_path.iterdir()] == ["subspace"]  # nothing temporary is left


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"basis\.safetensors is missing"):
        S.Subspace.load(tmp_path)
    make_subspace().save(tmp_path / "s")
    text = json.loads((tmp_path / "s" / "subspace.json").read_text())
    text["groups"]["q"]["rank"] = 2
    (tmp_path / "s" / "subspace.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="not of the same run"):
        S.Subspace.load(tmp_path / "s")
    (tmp_path / "s" / "subspace.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold a subspace"):
        S.Subspace.load(tmp_path / "s")


def test_another_base_model_is_refused_by_what_differs(tmp_path):
    subspace = make_subspace(tiny_llama())
    with pytest.raises(ValueError, match="weights_sha256"):
        subspace.check_model(S.fingerprint(tiny_llama(seed=1)), tmp_path)
    with pytest.raises(ValueError, match="model_type 'llama' there, 'gpt2' here"):
        subspace.check_model(S.fingerprint(tiny_gpt2()), tmp_path)


def test_fingerprint_is_the_same_quantised_adapted_and_in_another_dtype(llama_folder):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    expected = S.fingerprint(plain)
    assert S.fingerprint(plain.to(torch.bfloat16)) == expected
    assert S.fingerprint(quantized(llama_folder)) == expected
    model = get_peft_model(
        quantized(llama_folder), MoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[1])
    )
    assert S.fingerprint(model.get_base_model()) == expected
