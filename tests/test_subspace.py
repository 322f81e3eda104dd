"""The files that protected directions are kept in, and which base model they are of."""

import copy
import json

import pytest
import torch
from helpers import given_statistics, quantized, tiny_gpt2, tiny_llama
from peft import get_peft_model
from test_linalg import covariance, is_orthonormal

from peft_mora import MoraConfig
from peft_mora.fingerprint import HASHES, differences, fingerprint
from peft_mora.linalg import upper_bound
from trl_callbacks import subspace as S


def test_old_inputs_are_remembered_to_their_energy_and_the_bounds_trace_in_full():
    subspace = make_subspace()
    one, two = (C / C.trace() for C in (covariance(8, 8, seed=1), covariance(8, 8, seed=2)))
    subspace.remember("q", one)
    subspace.remember("q", 7 * two)  # every task has the same weight, however many tokens it had
    bound = upper_bound(one, two)
    kept = subspace.old_covariance("q").double()
    assert subspace.weights["q"] == pytest.approx(float(bound.trace()), rel=1e-2) and 1 < subspace.weights["q"] < 1.9
    torch.testing.assert_close(kept.trace(), bound.trace(), rtol=1e-2, atol=0)
    assert torch.linalg.eigvalsh(bound - kept).abs().max() < 0.05
    A = torch.randn(3, 8)
    want = float((A.double() @ kept @ A.double().T).trace() / kept.trace())
    assert subspace.reach("q", A) == pytest.approx(want, rel=1e-4)
    whole = S.Subspace("inputs", {}, seen_energy=1.0)
    for C in (one, 7 * two):
        whole.remember("q", C)
    torch.testing.assert_close(whole.old_covariance("q", torch.float64), one + two, rtol=1e-6, atol=1e-7)


def test_a_task_is_not_hidden_by_the_number_of_others():
    """One task has its inputs where many have none: the contrast sees it at its own strength, in any order."""
    size = 8
    often, once = torch.zeros(size, size), torch.zeros(size, size)
    often[:4, :4], once[4:, 4:] = torch.eye(4), torch.eye(4)
    for order in ((once, *[often] * 9), (*[often] * 5, once, *[often] * 4), (*[often] * 9, once)):
        subspace = make_subspace()
        for C in order:
            subspace.remember("q", C)
        assert subspace.weights["q"] == pytest.approx(2, rel=0.1)
        for C in (often, once):
            assert torch.linalg.eigvalsh(subspace.old_covariance("q") - C / 4).min() > -0.02


def make_subspace(model=None) -> S.Subspace:
    V = torch.linalg.qr(torch.randn(8, 3))[0]
    described = fingerprint(model if model is not None else tiny_llama())
    return S.Subspace("inputs", described, [{"name": "one"}], {"q": ("q", "k")}, {"q": V}, {"q": V[:, :1]})


def test_inputs_go_behind_the_directions_of_the_group_that_has_the_modules():
    subspace = make_subspace()
    before = subspace.right["q"]
    seen = {"k": covariance(8, 6, seed=1).float(), "o": covariance(5, 3, seed=2).float()}
    subspace.add_inputs(given_statistics(seen, {"k": ("k", "q"), "o": ("o",)}), 0.95, None)
    assert subspace.groups == {"q": ("q", "k"), "o": ("o",)} and subspace.weights == {"q": 1, "o": 1}
    V = subspace.right["q"]
    assert torch.equal(V[:, :3], before) and is_orthonormal(V.double(), atol=1e-5)
    assert (V.T @ seen["k"] @ V).trace() >= 0.95 * seen["k"].trace() - 1e-5
    subspace.append("new", torch.eye(4)[:, :2], outputs=torch.eye(3)[:, :1])
    assert subspace.groups["new"] == ("new",) and subspace.left["new"].shape == (3, 1)


def test_each_group_learns_of_the_inputs_of_its_modules_and_counts_the_task_once():
    """q, k and v get copies of their input in one task and one tensor in the next, and the other way round."""
    one, two = covariance(8, 3, seed=1).float(), covariance(8, 4, seed=2).float()
    qkv = ("q", "k", "v")
    copies = given_statistics(dict.fromkeys(qkv, one), {name: (name,) for name in qkv})
    shared = given_statistics({"q": two}, {"q": (*qkv, "new")})
    for parts, groups in (
        ((copies, shared), {"q": ("q",), "k": ("k",), "v": ("v",), "new": ("new",)}),
        ((shared, copies), {"q": (*qkv, "new")}),
    ):
        subspace = S.Subspace("inputs", {})
        for part in parts:
            subspace.add_inputs(part, 0.99, None)
        assert subspace.groups == groups
        assert all(1 < weight < 2 for group, weight in subspace.weights.items() if group != "new")
        assert subspace.weights.get("new", 1) == 1
        for group in groups:
            V = subspace.right[group]
            for C in (two,) if group == "new" else (one, two):
                assert (V.T @ C @ V).trace() >= 0.99 * C.trace() - 1e-5
            tasks = [C / C.trace() for C in ((two,) if group == "new" else (one, two))]
            bound = tasks[0] if group == "new" else upper_bound(*tasks)
            assert torch.linalg.eigvalsh(bound - subspace.old_covariance(group)).abs().max() < 0.05


def test_a_module_whose_inputs_are_all_padding_is_refused():
    with pytest.raises(ValueError, match="module 'q' are 0 or padding"):
        make_subspace().add_inputs(given_statistics({"q": torch.zeros(8, 8)}, {"q": ("q",)}), 0.95, None)


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


def test_a_memory_replaces_an_earlier_one_and_nothing_else(tmp_path):
    subspace = make_subspace()
    for _ in range(2):
        subspace.save(tmp_path / "subspace")
    (tmp_path / "subspace" / "README.md").write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "subspace").iterdir()}
    with pytest.raises(FileExistsError, match=r"holds 'README.md', which would be deleted"):
        make_subspace(tiny_llama(seed=1)).save(tmp_path / "subspace")
    assert {path: path.read_bytes() for path in (tmp_path / "subspace").iterdir()} == before


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
        subspace.check_model(fingerprint(tiny_llama(seed=1)), tmp_path)
    with pytest.raises(ValueError, match="model_type 'llama' there, 'gpt2' here"):
        subspace.check_model(fingerprint(tiny_gpt2()), tmp_path)


def in_dtypes(model):
    """Fingerprints of a checkpoint, loaded in each float dtype."""
    return [fingerprint(copy.deepcopy(model).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_16_bits_is_one_model_in_every_dtype_small_weights_and_all(stored, tmp_path):
    model = tiny_llama()
    model.get_input_embeddings().weight.data *= torch.logspace(-8, 2, 64)  # below what float16 tells from 0, too
    found = in_dtypes(model.to(stored))
    assert [one[HASHES[1]] for one in found] == 3 * [found[0][HASHES[1]]]
    assert not [differences(there, here) for there in found for here in found if differences(there, here)]
    first = [one[HASHES[0]] for one in found]
    assert first[0] == first[1] and (first[1] == first[2]) == (stored == torch.float16)
    other = fingerprint(tiny_llama(seed=1))
    assert [line.split()[0] for line in differences(found[0], other)] == [HASHES[0]]
    make_subspace(model.bfloat16()).save(tmp_path / "s")
    S.Subspace.load(tmp_path / "s").check_model(found[2], "s")


def test_a_fingerprint_of_before_is_of_the_model_that_it_was_taken_of():
    model = tiny_llama()
    model.get_input_embeddings().weight.data *= 1e-4
    full, brain, half = in_dtypes(model.bfloat16())
    old = [{key: value for key, value in one.items() if key != HASHES[1]} for one in (full, brain, half)]
    for there in old[:2]:  # with the bits that float16 does not have
        assert differences(there, full) == differences(there, brain) == [] != differences(there, half)
        assert differences(full, there) == []
    assert not any(differences(old[2], here) for here in (full, brain, half))
    assert differences({}, full) == [] and differences({**old[0], "vocab_size": 3}, full) == [
        "vocab_size 3 there, 64 here"
    ]


def test_a_checkpoint_in_float32_is_one_model_in_float32_and_bfloat16():
    full, brain, half = in_dtypes(tiny_llama())
    assert differences(full, brain) == [] != differences(brain, half)


def test_fingerprint_is_the_same_quantised_adapted_and_in_another_dtype(llama_folder):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    expected = fingerprint(plain)
    assert fingerprint(plain.to(torch.bfloat16)) == expected
    assert fingerprint(quantized(llama_folder)) == expected
    model = get_peft_model(
        quantized(llama_folder), MoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[1])
    )
    assert fingerprint(model.get_base_model()) == expected
