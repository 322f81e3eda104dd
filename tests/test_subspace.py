"""The linear algebra behind orthogonal projection, in float64, and the files that it is kept in."""

import json

import pytest
import torch
from conftest import quantized, tiny_gpt2, tiny_llama
from peft import get_peft_model

from peft_mora import MoraConfig
from peft_mora.inputs import real_rows
from trl_callbacks import subspace as S


def covariance(size: int, rank: int, seed: int = 0, decay: float = 0.7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]
    return Q @ torch.diag(decay ** torch.arange(rank, dtype=torch.float64)) @ Q.T


def is_orthonormal(V: torch.Tensor) -> bool:
    return torch.allclose(V.T @ V, torch.eye(V.shape[1], dtype=V.dtype), atol=1e-10)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_fewest_directions_that_reach_the_energy(energy):
    C = covariance(23, 11)
    V = S.leading_directions(C, energy)
    share = ((V.T @ C @ V).trace() / C.trace()).item()
    assert is_orthonormal(V)
    assert share >= energy - 1e-9
    fewer = V[:, :-1]
    assert ((fewer.T @ C @ fewer).trace() / C.trace()).item() < energy
    assert V.shape[1] <= 11  # the null space is never protected


def test_energy_that_is_held_already_counts():
    first, second = covariance(17, 6, seed=1), covariance(17, 6, seed=2)
    held = S.leading_directions(first, 0.95)
    new = S.leading_directions(second, 0.95, held=held)
    both = torch.cat([held, new], dim=1)
    assert is_orthonormal(both)
    assert (both.T @ second @ both).trace() / second.trace() >= 0.95 - 1e-9
    assert S.leading_directions(first, 0.95, held=both).shape == (17, 0)


def test_max_rank_counts_held_and_new_together():
    held = S.leading_directions(covariance(17, 6, seed=1), None, max_rank=4)
    assert held.shape[1] == 4
    assert S.leading_directions(covariance(17, 6, seed=2), None, max_rank=7, held=held).shape[1] == 3
    assert S.leading_directions(covariance(17, 6, seed=2), 0.99, max_rank=3, held=held).shape[1] == 0


def test_projected_rows_are_orthogonal_and_projecting_again_changes_nothing():
    V = S.leading_directions(covariance(19, 7), 0.99)
    rows = torch.randn(5, 19, dtype=torch.float64)
    out = S.project_out(rows, V)
    assert (out @ V).abs().max() < 1e-12
    torch.testing.assert_close(S.project_out(out, V), out)
    torch.testing.assert_close(out + rows @ V @ V.T, rows)


def test_orthonormal_spans_what_is_new_and_drops_repeats():
    held = S.leading_directions(covariance(13, 4), 1.0)
    fresh = torch.randn(13, 3, dtype=torch.float64)
    found = S.orthonormal(torch.cat([fresh, fresh @ torch.randn(3, 2, dtype=torch.float64), held], dim=1), held)
    assert found.shape == (13, 3)
    assert is_orthonormal(torch.cat([held, found], dim=1))
    rest = S.project_out(S.project_out(fresh.T, held), found)
    assert rest.abs().max() < 1e-10
    assert S.orthonormal(held, held).shape[1] == 0


def test_leakage_equals_the_norms_of_the_whole_update():
    A, B = torch.randn(3, 11, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    V = torch.linalg.qr(torch.randn(11, 4, dtype=torch.float64))[0]
    inside, whole = S.leakage(A, B, V)
    torch.testing.assert_close(inside, ((B @ A) @ V).square().sum())
    torch.testing.assert_close(whole, (B @ A).square().sum())


def test_frequent_directions_bound_holds():
    rows = torch.randn(40, 12, dtype=torch.float64) * torch.linspace(3, 0.1, 12, dtype=torch.float64)
    sketch = rows[:0]
    cut = 0.0
    for part in rows.split(8):
        whole = torch.cat([sketch, part])
        cut += float(torch.linalg.svdvals(whole)[5].square())
        sketch = S.shrink_sketch(whole, 5)
    assert sketch.shape == (5, 12)
    difference = torch.linalg.eigvalsh(rows.T @ rows - sketch.T @ sketch)
    assert difference.min() > -1e-9  # never more than was there
    assert difference.max() <= cut + 1e-9  # and at most the sum of what was cut


def test_frequent_directions_keep_a_low_rank_stream_exactly():
    rows = torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 12, dtype=torch.float64)
    sketch = S.shrink_sketch(torch.cat([S.shrink_sketch(rows[:15], 5), rows[15:]]), 5)
    torch.testing.assert_close(sketch.T @ sketch, rows.T @ rows)


def test_contrast_maximises_the_ratio_of_new_to_old():
    X, Y = (torch.randn(60, 14, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    new, old = X.T @ X, (Y * torch.linspace(3, 0.2, 14, dtype=torch.float64)).T @ (Y * torch.linspace(3, 0.2, 14))
    V = S.leading_directions(old, None, max_rank=4)
    U = S.contrast_directions(new, old, V, 3)
    assert is_orthonormal(torch.cat([V, U], dim=1))

    def ratio(u):
        ridge = 0.1 / 14 * u @ u
        return (u @ new @ u / new.trace()) / (u @ old @ u / old.trace() + ridge)

    best = ratio(U[:, 0])
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):  # no other direction of the complement does better, near or far
        far = S.project_out(torch.randn(14, generator=generator, dtype=torch.float64), V)
        near = U[:, 0] + 0.05 * far / far.norm()
        assert ratio(far) <= best + 1e-9 and ratio(near) <= best + 1e-9
    assert S.contrast_directions(new, old, V, 99).shape == (14, 10)


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
