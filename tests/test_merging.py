"""Merging adapters: what comes in, each rule against its formula on dense float64 matrices, what comes out."""

import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import LORA, METHODS, adapted, quantized, randomize, tiny_gpt2, tiny_llama, tiny_t5
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_mora.inputs import load_tokenizer
from peft_mora.lora_file import PREFIX, Lora, read_lora, write_lora
from peft_mora.merging import RULES, collect_inputs, merge_adapters, merge_into_base, rules, scaling, sequential
from peft_mora.merging.core import canonical, core_space, reduced, to_lora
from peft_mora.merging.inputs import Inputs, Spread, Statistics, at_strength, encoded, inputs, output_energy, spread
from peft_mora.merging.inputs import adapted as put_onto
from peft_mora.merging.lego import lego, robust
from peft_mora.quantization import nf4_config


pytestmark = pytest.mark.filterwarnings(
    "ignore:The plain sum of three", "ignore:rule='robust' adds up", "ignore:No input statistics"
)
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
SIZES = dict(zip(LAYERS, ((20, 16), (16, 24), (20, 16)), strict=True))  # (O, I)


def loras(seed: int, rank: int = 3, modules=LAYERS) -> dict[str, Lora]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Lora(
            torch.randn(rank, SIZES[name][1], generator=generator) * 0.3,
            torch.randn(SIZES[name][0], rank, generator=generator) * 0.3,
        )
        for name in modules
    }


def folder(path: Path, seed: int, rank: int = 3, modules=LAYERS, **fields) -> Path:
    write_lora(path / f"task{seed}", loras(seed, rank, modules), **{"base_model_name_or_path": "base", **fields})
    return path / f"task{seed}"


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """Unequal ranks; the last one lacks a module."""
    return [folder(tmp_path, 1), folder(tmp_path, 2, rank=5), folder(tmp_path, 3, rank=2, modules=LAYERS[:2])]


def dense(source) -> dict[str, Tensor]:
    """ΔW (O, I) float64 of a folder, a report or factors; zeros where a module is missing."""
    if isinstance(source, Path):
        source = read_lora(source).loras
    found = getattr(source, "loras", source)
    zero = {name: torch.zeros(size, dtype=torch.float64) for name, size in SIZES.items()}
    return zero | {name: B.double() @ A.double() for name, (A, B) in found.items()}


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, delta in want.items():
        assert (got[name] - delta).norm() <= tolerance * max(1.0, float(delta.norm())), name


# The core space


def test_the_core_space_holds_every_update_and_a_shared_A_makes_it_smaller():
    tasks = [loras(seed, rank)[LAYERS[0]] for seed, rank in ((1, 3), (2, 5))]
    tasks.append(Lora(tasks[0].A, torch.randn(20, 3)))
    tasks.append(Lora(torch.zeros(0, 16), torch.zeros(20, 0)))
    space, cores = core_space(tasks)
    assert space.V.shape == (16, 8) and space.U.shape == (20, 11) and not cores[3].any()
    for (A, B), core in zip(tasks, cores, strict=True):
        torch.testing.assert_close(space.U @ core @ space.V.T, B.double() @ A.double(), rtol=0, atol=1e-6)
    for basis in space:
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))


def test_truncation_is_the_nearest_of_its_rank_and_shares_the_singular_values_evenly():
    space, cores = core_space([loras(1)[LAYERS[0]], loras(2)[LAYERS[0]]])
    delta = space.U @ sum(cores) @ space.V.T
    U, S, Vh = torch.linalg.svd(delta)
    A, B = to_lora(space, sum(cores), 4)
    torch.testing.assert_close(B @ A, (U[:, :4] * S[:4]) @ Vh[:4])
    torch.testing.assert_close(A.norm(dim=1), S[:4].sqrt())
    torch.testing.assert_close(B.norm(dim=0), S[:4].sqrt())
    torch.testing.assert_close(reduced(Lora(torch.eye(16), delta), 4).A.abs(), A.abs())


def test_the_svd_gauge_depends_on_the_update_only():
    A, B = (x.double() for x in loras(1)[LAYERS[0]])
    G = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    one, other = canonical(Lora(A, B)), canonical(Lora(torch.linalg.inv(G) @ A, B @ G))
    torch.testing.assert_close(one.A, other.A)
    torch.testing.assert_close(one.B, other.B)
    torch.testing.assert_close(one.B @ one.A, B @ A)
    torch.testing.assert_close(one.A @ one.A.T, one.B.T @ one.B)


# What holds for every rule


@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("ties", "dare", "iso-c", "iso-cts", "robust")])
def test_one_adapter_with_weight_1_is_the_same_function(rule, tmp_path):
    one = folder(tmp_path, 1)
    options = {"rank": 3} if rule == "lego" else {}
    close(dense(merge_adapters([one], rule, **options)), dense(one))


@pytest.mark.parametrize("rule", [rule for rule, row in RULES.items() if not row.ordered and rule != "robust"])
def test_the_order_of_the_adapters_does_not_matter(rule, three):
    weights = [1.0, 0.5, 2.0] if rule != "inputs" else [1.0] * 3  # whose statistics these have not
    report = merge_adapters(three, rule, weights=weights, rank=4)
    other = merge_adapters([three[2], three[0], three[1]], rule, weights=[weights[2], *weights[:2]], rank=4)
    assert report.rank <= 4 and not report.ordered
    close(dense(other), dense(report))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("robust", "slao")])
@pytest.mark.parametrize("rank", [2, "sum", 0.9])
def test_the_rank_is_at_most_what_was_asked_for_and_plain_peft_opens_the_file(rule, rank, three, tmp_path):
    report = merge_adapters(three, rule, rank=rank, output=tmp_path / "merged")
    assert report.rank <= {2: 2, "sum": 10, 0.9: 10}[rank]
    saved = json.loads((tmp_path / "merged/adapter_config.json").read_text())
    assert saved["r"] == saved["lora_alpha"] == report.rank and saved["base_model_name_or_path"] == "base"
    close(dense(tmp_path / "merged"), dense(report), 0)


def test_an_energy_takes_the_smallest_one_rank_that_keeps_it(three):
    full = merge_adapters(three, "sum")
    energy = sum(torch.linalg.svdvals(delta)[:10].square() for delta in dense(full).values())
    share = energy.cumsum(0) / energy.sum()
    rank = merge_adapters(three, "sum", rank=0.8).rank
    assert share[rank - 1] >= 0.8 > share[rank - 2]


def two_linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(10, 9, bias=False), torch.nn.Linear(9, 7, bias=False))


def test_merged_adapters_are_the_sum_of_their_functions_in_plain_peft(inputs, tmp_path):
    """LoRAs with rslora, patterns and other targets; LORI, MORA "dense", FURINA: outputs add up on a linear model."""
    configs = [
        LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["0"]),
        LoraConfig(r=4, rank_pattern={"0": 2}, alpha_pattern={"0": 9}, target_modules=["0", "1"]),
        METHODS["mora-dense"](target_modules=["0"]),
        METHODS["lori"](target_modules=["0"]),
        METHODS["furina"](target_modules=["0"]),
    ]
    folders, x, outputs = [], torch.randn(5, 10), []
    weights = [1.0, -0.5, 0.25, 2.0, -1.5]
    for i, config in enumerate(configs):
        model = get_peft_model(two_linear(), config)
        randomize(model, seed=i)
        model.save_pretrained(tmp_path / str(i))
        folders.append(tmp_path / str(i))
        layer = model.base_model.model[0]
        outputs.append((layer(x) - layer.base_layer(x)).detach())
    merge_adapters(folders, "sum", weights=weights, output=tmp_path / "merged")
    layer = PeftModel.from_pretrained(two_linear(), tmp_path / "merged").base_model.model[0]
    want = sum(w * y for w, y in zip(weights, outputs, strict=True))
    torch.testing.assert_close(layer(x) - layer.base_layer(x), want, rtol=1e-4, atol=1e-4)


def test_the_gauge_of_an_adapter_matters_only_where_that_is_asked_for(three, tmp_path):
    G = torch.diag(torch.tensor([3.0, 0.5, 1.0]))
    other = {name: Lora(torch.linalg.inv(G) @ A, B @ G) for name, (A, B) in loras(1).items()}
    write_lora(tmp_path / "other", other, base_model_name_or_path="base")
    for rule in ("lego", "ties"):
        results = [
            dense(merge_adapters([first, three[1]], rule, rank=4, canonical=gauge))
            for gauge in (True, False)
            for first in (three[0], tmp_path / "other")
        ]
        close(results[1], results[0])
        assert any((results[3][name] - results[2][name]).norm() > 1e-2 for name in LAYERS)


# What is refused


def test_adapters_that_have_no_common_sum_are_refused_by_name(three, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    base = folder(elsewhere, 4, base_model_name_or_path="other")
    with pytest.raises(ValueError, match=r"different base_model_name_or_path: 'base' .*task1.* and 'other'"):
        merge_adapters([three[0], base], "sum")
    with pytest.raises(ValueError, match="different task_type"):
        tasks = [folder(elsewhere / t, 1, task_type=t) for t in ("CAUSAL_LM", "SEQ_CLS")]
        merge_adapters(tasks, "sum")
    write_lora(elsewhere / "shape", {LAYERS[0]: Lora(torch.ones(2, 16), torch.ones(21, 2))})
    with pytest.raises(ValueError, match=r"q_proj' is 20 x 16 in .*task1 and 21 x 16 in .*shape"):
        merge_adapters([three[0], elsewhere / "shape"], "sum")
    head = "base_model.model.head.weight"
    for i in (1, 2):
        write_lora(elsewhere / f"head{i}", loras(i), saved={head: torch.full((2, 2), i)}, modules_to_save=["head"])
    with pytest.raises(ValueError, match="modules_to_save of .*head1 and .*head2 differ"):
        merge_adapters([elsewhere / "head1", elsewhere / "head2"], "sum")
    with pytest.raises(ValueError, match="`folders` has .*head1 twice: give it once"):
        merge_adapters([elsewhere / "head1", elsewhere / "../elsewhere/head1"], "mean")
    shutil.copytree(elsewhere / "head1", elsewhere / "again")
    merge_adapters([elsewhere / "head1", elsewhere / "again"], "mean", output=tmp_path / "merged")
    assert set(read_lora(tmp_path / "merged").saved) == {head}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "soup"}, "`rule` must be 'inputs', 'sum'"),
        ({"rank": 0}, "`rank` must be 'sum', an integer"),
        ({"rank": 1.5}, "`rank` must be"),
        ({"folders": iter("ab")}, "`folders` must be a list of folders"),
        ({"weights": 0.5}, "`weights` must be a list of numbers"),
        ({"seed": "abc"}, "`seed` must be an integer"),
        ({"prompts": ["the cat"]}, "`prompts` must be a mapping of each folder to its texts, or 'self'"),
        ({"rule": "inputs", "ridge": "much"}, "`ridge` must be a number > 0"),  # though there are no statistics
        ({"weights": [1.0]}, "3 adapters need 3 weights, got 1"),
        ({"weights": [1.0, 2.0, float("nan")]}, "finite numbers"),
        ({"before": ["pca"]}, "`before` must be a list of 'norm' or 'pico'"),
        ({"after": "match"}, "`after` must be a list"),
        ({"after": ["svc"], "alpha": 0}, "`alpha` must be a number > 0"),
        ({"rule": "mean", "alpha": 0.5}, "rule='mean' takes no options, got alpha"),
        ({"density": 0.5}, "takes no options, got density"),
        ({"passes": 3, "strength": 0.5}, "passes and strength would change nothing: what reads it is rule="),
        ({"rule": "inputs", "passes": 1}, "passes would change nothing: what reads it is rule='inputs'"),
        ({"rule": "inputs", "batch_size": 2}, "batch_size would change nothing: what reads it is `model`"),
        ({"rule": "ties", "drop": 0.5}, "takes space and density, got drop"),
        ({"rule": "ties", "density": 0}, r"`density` must be a share in \(0, 1\]"),
        ({"rule": "mean", "weights": [1, -1, 0]}, "add up to 0"),
        ({"rule": "least-squares", "weights": [1, -1, 1]}, "weighs squared errors"),
        ({"rule": "opcm", "block": 2.0}, r"`block` must be a share in \[0, 1\]"),
        ({"rule": "opcm", "block": "half"}, "`block` must be"),
        ({"rule": "lore", "rounds": 2.5}, "`rounds` must be an integer >= 1"),
        ({"rule": "lore", "rounds": 0}, "`rounds` must be an integer >= 1"),
        ({"rule": "lore", "amount": "N"}, "`amount` must be a number, or None"),
        ({"rule": "robust"}, r"ranks \[2, 3, 5\]"),
        ({"rule": "slao"}, r"A is \(5, \d+\) after \(3, \d+\)"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message, three):
    with pytest.raises(ValueError, match=message):
        merge_adapters(**{"folders": three, "rule": "sum", **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"rule": "sum", "weights": [1e200] * 3},
        {"rule": "mean", "weights": [1e308] * 3},  # no SVD of it
        {"rule": "iso-c", "factor": 1e308},
        {"rule": "mean", "after": ["lines"], "beta": 1e300},
        {"rule": "lego", "weights": [1e300] * 3, "rank": 4},
    ],
)
def test_a_merge_that_would_not_be_finite_is_refused(arguments, three, tmp_path):
    with pytest.raises(ValueError, match=r"merged update .* lead out of float32: give less extreme ones"):
        merge_adapters(three, output=tmp_path / "merged", **arguments)
    assert not (tmp_path / "merged").exists()


def test_a_refused_merge_writes_nothing_and_an_existing_folder_is_left_alone(three, tmp_path):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(FileExistsError, match="delete it"):
        merge_adapters(three, "sum", output=three[0])
    with pytest.raises(ValueError):
        merge_adapters(three, "robust", output=tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == before


def test_three_and_more_are_warned_of_the_plain_sum(three):
    with pytest.warns(UserWarning, match="plain sum of three and more"):
        report = merge_adapters(three, "sum")
    assert len(report.warnings) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not merge_adapters(three[:2], "sum").warnings


def test_adapters_that_were_not_trained_merge_to_nothing(tmp_path):
    for seed in (1, 2):
        zero = {name: Lora(A, 0 * B) for name, (A, B) in loras(seed).items()}
        write_lora(tmp_path / f"zero{seed}", zero)
    for rule in RULES:
        report = merge_adapters([tmp_path / "zero1", tmp_path / "zero2"], rule, output=tmp_path / rule)
        assert report.norm == 0 and all(not delta.any() for delta in dense(tmp_path / rule).values()), rule


# The report


def test_two_folders_of_one_name_are_two_adapters(tmp_path):
    first, second = folder(tmp_path / "a", 1), tmp_path / "b" / "task1"
    write_lora(second, loras(2), base_model_name_or_path="base")
    report = merge_adapters([first, second], "sum")
    close(dense(report), {name: dense(first)[name] + dense(second)[name] for name in LAYERS})
    assert "a/task1" in str(report) and "b/task1" in str(report)


def test_the_report_has_norms_angles_and_what_truncation_kept_of_each(three, tmp_path):
    report = merge_adapters(three, "mean", rank=3, weights=[1, 2, 0], output=tmp_path / "merged")
    deltas = [torch.cat([delta.flatten() for delta in dense(path).values()]) for path in three]
    norms = [float(delta.norm()) for delta in deltas]
    assert [a.norm for a in report.adapters] == pytest.approx(norms, rel=1e-5)
    assert [a.share for a in report.adapters] == pytest.approx([n**2 / sum(n**2 for n in norms) for n in norms])
    cosine = torch.cosine_similarity(deltas[0], deltas[1], dim=0)
    assert report.cosine[0][1] == report.cosine[1][0] == pytest.approx(float(cosine), abs=1e-5)
    assert report.cosine[2][2] == pytest.approx(1)
    merged = dense(report)
    assert report.norm == pytest.approx(float(torch.stack([m.square().sum() for m in merged.values()]).sum().sqrt()))
    kept = 0.0
    for name, delta in dense(three[1]).items():
        U, _, Vh = torch.linalg.svd(merged[name])
        kept += float((U[:, :3].T @ delta @ Vh[:3].T).square().sum())
    assert report.adapters[1].kept == pytest.approx(kept / norms[1] ** 2, rel=1e-4)
    both = [torch.linalg.qr(read_lora(path).loras[LAYERS[2]].A.double().T).Q for path in three[:2]]
    alone = [torch.linalg.qr(read_lora(path).loras[name].A.double().T).Q for name in LAYERS[:2] for path in three[:2]]
    rows = [float((a.T @ b).square().sum() / 3) for a, b in (both, alone[:2], alone[2:])]
    assert report.rows[0][1] == pytest.approx(sum(rows) / 3, rel=1e-5)
    text = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert text["rule"] == "mean" and text["rank"] == 3 and len(text["adapters"][0]["sha256"]) == 64
    assert "loras" not in text and "task2" in str(report)


# The rules, each by its formula on dense float64 matrices


def updates(ranks=(3, 5, 2), size=(20, 16)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    kind = {"dtype": torch.float64, "generator": generator}
    return [torch.randn(size[0], r, **kind) @ torch.randn(r, size[1], **kind) for r in ranks]


def in_core_space(rule, deltas: list[Tensor], *args, **options) -> Tensor:
    """ΔW (O, I) by a rule on cores."""
    factors = [reduced(Lora(torch.eye(delta.shape[1], dtype=torch.float64), delta)) for delta in deltas]
    space, cores = core_space(factors)
    return space.U @ rule(cores, *args, **options) @ space.V.T


def polar(X: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def top(X: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].T


def test_sums_and_means_are_those_of_the_updates():
    deltas, weights = updates(), [1.0, -2.0, 0.5]
    want = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
    torch.testing.assert_close(in_core_space(rules.sum_cores, deltas, weights), want)
    torch.testing.assert_close(in_core_space(rules.mean_cores, deltas, weights), want / -0.5)


def test_tsv_makes_singular_vectors_of_all_orthogonal():
    deltas = updates()
    parts = [top(delta, r) for delta, r in zip(deltas, (3, 5, 2), strict=True)]
    U, S, V = (torch.cat(x, dim=-1) for x in zip(*parts, strict=True))
    want = 0.5 * polar(U) @ torch.diag(S) @ polar(V).T
    torch.testing.assert_close(in_core_space(rules.tsv, deltas, [1.0] * 3, factor=0.5), want)


def test_iso_replaces_the_values_of_the_sum_by_their_mean_over_the_support():
    deltas = updates()
    U, S, V = top(sum(deltas), 10)
    torch.testing.assert_close(in_core_space(rules.iso_c, deltas, [1.0] * 3), S.mean() * U @ V.T, rtol=0, atol=1e-4)
    scaled = in_core_space(rules.iso_c, deltas, [1.0] * 3, factor=1.5)
    torch.testing.assert_close(scaled, 1.5 * S.mean() * U @ V.T, rtol=0, atol=1e-4)
    one = rules.iso_c([torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))], [1.0])
    assert one.diagonal().tolist() == pytest.approx([2, 2, 0], rel=1e-5)


def test_a_cut_of_isotropic_values_keeps_what_was_largest():
    delta = torch.diag(torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64))
    space, cores = core_space([reduced(Lora(torch.eye(3, dtype=torch.float64), delta))])
    A, B = to_lora(space, rules.iso_c(cores, [1.0]), 1)
    torch.testing.assert_close(B @ A, torch.diag(torch.tensor([0.0, 3, 0], dtype=torch.float64)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rank", "own"), [(2, 1), (4, 1), (8, 1), (10, 2)])
def test_iso_cts_leaves_each_adapter_its_share_of_directions_and_one_at_least(rank, own):
    cores = [torch.randn(3 * rank, 3 * rank, generator=torch.Generator().manual_seed(t)).double() for t in range(3)]
    got = rules.iso_cts(cores, [1.0] * 3)
    U = torch.linalg.svd(sum(cores))[0]
    k = 3 * rank - 3 * own
    inside = torch.linalg.svdvals(U[:, :k].T @ torch.linalg.svd(got)[0][:, : 3 * rank])
    assert len(inside) == k and (got - rules.iso_c(cores, [1.0] * 3)).norm() > 0.01 * got.norm()


def test_iso_cts_gives_each_adapter_directions_of_its_own():
    deltas = updates()
    total = sum(deltas)
    k = 7  # of 10 directions one goes to each of three adapters at common=.7
    found = [top(total, k)]
    for delta in deltas:
        found.append(top(delta - found[0][0] @ found[0][0].T @ delta, 1))
    U, S, V = (torch.cat(x, dim=-1) for x in zip(*found, strict=True))
    want = S.mean() * polar(U) @ polar(V).T
    got = in_core_space(rules.iso_cts, deltas, [1.0] * 3, common=0.7, factor=0.5)
    torch.testing.assert_close(got, 0.5 * want, rtol=0, atol=1e-4)
    same = in_core_space(rules.iso_c, deltas, [1.0] * 3)
    torch.testing.assert_close(in_core_space(rules.iso_cts, deltas, [1.0] * 3, common=1), same, rtol=0, atol=1e-4)


def test_least_squares_minimises_what_it_says_it_minimises():
    deltas, weights = updates(), [1.0, 2.0, 0.5]
    got = in_core_space(rules.least_squares, deltas, weights, ridge=0.1).requires_grad_()
    gram = sum(w * delta.T @ delta for w, delta in zip(weights, deltas, strict=True))
    lam = 0.1 * torch.linalg.eigvalsh(gram)[-5:].mean()
    mean = sum(w * delta for w, delta in zip(weights, deltas, strict=True)) / 3.5
    errors = [w * ((got - d) @ d.T).square().sum() for w, d in zip(weights, deltas, strict=True)]
    (sum(errors) + lam * (got - mean).square().sum()).backward()
    assert got.grad.norm() < 1e-8 * gram.norm()


def test_least_squares_of_nearly_equal_adapters_does_not_blow_up():
    one, other = updates((4, 4))
    other = one + 1e-3 * other
    found = in_core_space(rules.least_squares, [one, -other], [1.0, 1.0])
    assert found.norm() < one.norm()


def test_lore_splits_into_a_common_and_low_rank_rests():
    deltas = updates()
    stacked = torch.stack(deltas)
    mu = 0.3 * max(torch.linalg.svdvals(delta)[0] for delta in deltas)
    rests = torch.zeros_like(stacked)
    for _ in range(20):
        common = (stacked - rests).mean(0)
        U, S, Vh = torch.linalg.svd(stacked - common, full_matrices=False)
        rests = U @ torch.diag_embed((S - mu).clamp_min(0)) @ Vh
    want = (stacked - rests).mean(0) + 2 * rests.mean(0)
    torch.testing.assert_close(in_core_space(rules.lore, deltas, [1.0] * 3, threshold=0.3, amount=2), want)
    whole, all_three = (in_core_space(rules.lore, deltas, [1.0] * 3, **given) for given in ({}, {"amount": 3}))
    assert torch.equal(whole, all_three)
    mean = in_core_space(rules.lore, deltas, [1.0] * 3, threshold=0.3, amount=1)
    torch.testing.assert_close(mean, stacked.mean(0))


def test_opcm_leaves_out_the_diagonal_and_the_leading_block_of_what_comes_later():
    """Against the full space, where the old update has a direction for every pair of axes."""
    deltas = updates((6, 6, 6), (6, 6))
    total, norms = deltas[0], [deltas[0].norm()]
    for delta in deltas[1:]:
        U, S, Vh = torch.linalg.svd(total)
        P = U.T @ delta @ Vh.T
        P.fill_diagonal_(0)
        k = int((S.cumsum(0) < 0.5 * S.sum()).sum()) + 1
        P[:k, :k] = 0
        total, norms = total + U @ P @ Vh, [*norms, delta.norm()]
    eye = torch.eye(6, dtype=torch.float64)
    A, B = sequential.opcm([Lora(eye, delta) for delta in deltas], [1.0] * 3)
    torch.testing.assert_close(B @ A, total * (sum(norms) / 3 / total.norm()))


def test_opcm_needs_no_more_memory_for_more_adapters_and_adds_what_is_orthogonal():
    merged = sequential.Opcm(rank=4)
    for seed in range(6):
        merged.add(loras(seed)[LAYERS[0]])
        assert merged.total.A.shape == (min(4, 3 * (seed + 1)), 16)
    one, other = torch.zeros(6, 6).double(), torch.zeros(6, 6).double()
    one[:2, :2], other[2:4, 2:4] = torch.eye(2), torch.eye(2)
    eye = torch.eye(6, dtype=torch.float64)
    A, B = sequential.opcm([Lora(eye, one), Lora(eye, other)], [1.0, 1.0])
    torch.testing.assert_close(B @ A, (one + other) / 2**0.5)


def test_slao_takes_the_newest_A_and_moves_B(tmp_path):
    tasks = [loras(seed) for seed in (1, 2, 3)]
    folders = [folder(tmp_path, seed) for seed in (1, 2, 3)]
    got = dense(merge_adapters(folders, "slao"))
    for name in LAYERS:
        B = tasks[0][name].B.double()
        B = B + (tasks[1][name].B - B) / 2**0.5
        B = B + (tasks[2][name].B - B) / 3**0.5
        torch.testing.assert_close(got[name], B @ tasks[2][name].A.double(), rtol=0, atol=1e-5)


def test_lego_clusters_pairs_whatever_their_sign():
    a, b = torch.tensor([[1.0, 0, 0, 0]]).double(), torch.tensor([[2.0], [0], [0]]).double()
    c, d = torch.tensor([[0, 1.0, 0, 0]]).double(), torch.tensor([[0], [3.0], [0]]).double()
    near = a + 0.1 * c
    A, B = lego([Lora(a, b), Lora(-near, -b), Lora(c, d)], [1.0] * 3, rank=2)
    pairs = torch.stack([torch.cat([x.flatten(), b.flatten()]) for x in (a, near)])
    center = pairs.mean(0) * pairs.norm(dim=1).mean() / pairs.mean(0).norm()
    want = center[4:, None] @ center[None, :4] + d @ c
    torch.testing.assert_close(B @ A, want / 2**0.5)  # √(r / k), r = 1
    A, B = lego([Lora(a, b), Lora(a, b)], [1.0, -1.0], rank=2)
    torch.testing.assert_close(B @ A, torch.zeros(3, 4).double())


@pytest.mark.parametrize("k", range(1, 8))
def test_lego_takes_equal_pairs_for_one(k):
    eye = torch.eye(6, dtype=torch.float64)
    one = Lora(eye[:3] * torch.tensor([[3.0], [2.0], [1.0]]), eye[:, :3])
    A, B = lego([one, one], [1.0, 1.0], rank=k)
    assert len(A) == min(k, 3)
    if k >= 3:
        torch.testing.assert_close(B @ A, one.B @ one.A)
    other = Lora(eye[3:5] * torch.tensor([[2.5], [1.5]]), eye[:, 3:5])
    (A, B), (C, D) = lego([one, one, other], [1.0] * 3, rank=k), lego([other, one, one], [1.0] * 3, rank=k)
    torch.testing.assert_close(D @ C, B @ A)


def test_robust_adds_up_pruned_factors_with_scaled_rows():
    tasks = [Lora(*(x.double() for x in loras(seed)[LAYERS[0]])) for seed in (1, 2)]
    kept, scales = [], []
    for A, B in tasks:
        few = [x * (x.abs() >= x.abs().flatten().sort().values[-int(0.2 * x.numel())]) for x in (A, B)]
        kept.append(few)
        scales.append(A.abs().sum(1) / few[0].abs().sum(1))
    total = sum(scales)
    want = sum(B * s / total for (_, B), s in zip(kept, scales, strict=True)) @ sum(A for A, _ in kept)
    with pytest.warns(UserWarning, match="do not point the same way"):
        A, B = robust(tasks, [1.0, 1.0])
    torch.testing.assert_close(B @ A, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        robust([tasks[0], Lora(tasks[0].A + 0.1, tasks[1].B)], [1.0, 1.0])


def test_ties_keeps_the_largest_entries_over_all_modules(three):
    report = merge_adapters(three[:2], "ties", density=0.3)
    cores, spaces = {}, {}
    for name in LAYERS:
        spaces[name], cores[name] = core_space([canonical(read_lora(path).loras[name]) for path in three[:2]])
    entries = [torch.cat([c[t].abs().flatten() for c in cores.values()]) for t in (0, 1)]
    least = [e.sort().values[-int(0.3 * len(e))] for e in entries]
    assert report.space == "core"
    for name, (one, other) in cores.items():
        kept = torch.stack([one * (one.abs() >= least[0]), other * (other.abs() >= least[1])])
        sign = torch.where(kept.sum(0) >= 0, 1, -1)
        agree = kept * (kept.sign() == sign)
        mean = agree.sum(0) / (agree != 0).sum(0).clamp_min(1)
        torch.testing.assert_close(dense(report)[name], spaces[name].U @ mean @ spaces[name].V.T, rtol=0, atol=1e-5)


def test_dare_draws_by_seed_and_adapter_and_keeps_the_expectation(three, tmp_path):
    first = dense(merge_adapters(three, "dare", drop=0.4))
    close(dense(merge_adapters(three, "dare", drop=0.4)), first, 0)
    assert any((dense(merge_adapters(three, "dare", drop=0.4, seed=1))[n] - first[n]).norm() > 0.1 for n in LAYERS)
    close(dense(merge_adapters(three, "dare", drop=0.0)), dense(merge_adapters(three, "sum")))
    mean = {name: torch.zeros(size).double() for name, size in SIZES.items()}
    state = torch.get_rng_state()
    for seed in range(60):
        for name, delta in dense(merge_adapters(three, "dare", drop=0.2, seed=seed)).items():
            mean[name] += delta / 60
    assert torch.equal(torch.get_rng_state(), state)
    close(mean, dense(merge_adapters(three, "sum")), 0.2)


def test_dare_draws_for_each_adapter_on_its_own(three, tmp_path):
    write_lora(
        tmp_path / "same", {n: Lora(2 * A, B / 2) for n, (A, B) in loras(1).items()}, base_model_name_or_path="base"
    )
    twice = {name: 2 * delta for name, delta in dense(merge_adapters(three[:1], "dare")).items()}
    both = dense(merge_adapters([three[0], tmp_path / "same"], "dare"))
    assert all((both[name] - delta).norm() > 0.1 * delta.norm() for name, delta in twice.items())


def test_rules_that_peft_has_too_give_what_its_classes_give(tmp_path):
    """`add_weighted_adapter` on a model whose adapters have one rank and scale 1, where PEFT's own are right."""

    def model() -> PeftModel:
        config = LoraConfig(r=3, lora_alpha=3, target_modules=["0", "1"])
        model = get_peft_model(two_linear(), config, adapter_name="first")
        model.add_adapter("second", config)
        for seed, name in enumerate(("first", "second")):
            model.set_adapter(name)
            randomize(model, seed)
        return model

    model().save_pretrained(tmp_path)
    folders = [tmp_path / "first", tmp_path / "second"]
    for kind, rule, arguments, own in (
        ("cat", "sum", {}, {}),
        ("svd", "sum", {"rank": 2}, {"svd_rank": 2}),
        ("ties_svd", "ties", {"rank": 3, "density": 0.4, "space": "full"}, {"density": 0.4, "svd_rank": 3}),
    ):
        plain = model()
        plain.add_weighted_adapter(["first", "second"], [0.7, 1.3], "both", combination_type=kind, **own)
        report = merge_adapters(folders, rule, weights=[0.7, 1.3], **arguments)
        for name, (A, B) in report.loras.items():
            want = plain.base_model.model[int(name)].get_delta_weight("both")
            torch.testing.assert_close(B @ A, want, rtol=1e-4, atol=1e-5)


# Before and after


def test_norm_brings_the_updates_of_a_module_to_their_mean_length(three):
    deltas = [dense(path) for path in three]
    got = dense(merge_adapters(three, "sum", before=["norm"]))
    for name in LAYERS:
        here = [delta[name] for delta in deltas if delta[name].norm() > 0]
        mean = sum(delta.norm() for delta in here) / len(here)
        torch.testing.assert_close(got[name], sum(d * mean / d.norm() for d in here), rtol=0, atol=1e-5)


def test_pico_counts_a_shared_output_direction_once():
    eye = torch.eye(4, dtype=torch.float64)
    shared, own = eye[:, :1], [eye[:, 1:2], eye[:, 2:3]]
    tasks = [Lora(torch.randn(2, 5).double(), torch.cat([shared, mine], dim=1)) for mine in own]
    for before, after, mine in zip(tasks, scaling.pico(tasks), own, strict=True):
        torch.testing.assert_close(shared.T @ after.B, shared.T @ before.B / 2)
        torch.testing.assert_close(mine.T @ after.B, mine.T @ before.B)


def test_match_brings_each_module_to_the_mean_length_of_the_updates(three):
    report = merge_adapters(three, "mean", after=["match"])
    for name, delta in dense(report).items():
        norms = [dense(path)[name].norm() for path in three if dense(path)[name].norm() > 0]
        assert float(delta.norm()) == pytest.approx(float(sum(norms) / len(norms)), rel=1e-4)


def calibrated(M: Tensor, deltas: list[Tensor], alpha: float = 0.1) -> Tensor:
    """SVC as its paper has it: on whole matrices, a direction at a time."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    for r in range(int((S > 1e-9).sum())):
        shares = [float((U[:, r] @ M) @ (U[:, r] @ D) / (U[:, r] @ D).square().sum()) for D in deltas]
        if min(shares) > 0:
            S[r] /= max(sum(shares) / len(shares), alpha)
    return U @ S.diag() @ Vh


@pytest.mark.parametrize("alpha", [0.1, 2.5])
def test_svc_is_the_papers_calibration(alpha):
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 3, 9), (12, 3), (3, 12, 3))
    rows, shared, own = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    tasks = [Lora(A + 1, shared + 0.1 * B) for A, B in zip(rows, own, strict=True)]
    deltas = [B @ A for A, B in tasks]
    merged = Lora(torch.cat([A for A, _ in tasks]), torch.cat([B for _, B in tasks], dim=1))
    A, B = scaling.svc(merged, [*tasks, Lora(torch.zeros(1, 9), torch.ones(12, 1))], alpha=alpha)
    wanted = calibrated(sum(deltas), deltas, alpha)
    torch.testing.assert_close(B @ A, wanted)
    assert (wanted - sum(deltas)).norm() > 0.2 * wanted.norm()
    lengths = A.norm(dim=1)
    assert torch.equal(lengths, lengths.sort(descending=True).values)
    torch.testing.assert_close(lengths, B.norm(dim=0))


def test_svc_counts_what_all_have_once_and_leaves_what_one_has(three):
    one = loras(0)[LAYERS[0]]
    twin = scaling.svc(Lora(one.A, 3 * one.B), [one] * 3)
    torch.testing.assert_close(twin.B @ twin.A, one.B.double() @ one.A.double())
    eye = torch.eye(4, dtype=torch.float64)
    apart = [Lora(eye[:1], eye[:, :1]), Lora(eye[1:2], eye[:, 1:2])]
    A, B = scaling.svc(Lora(eye[:2], 5 * eye[:, :2]), apart)
    torch.testing.assert_close(B @ A, 5 * eye[:, :2] @ eye[:2])
    plain, got = (dense(merge_adapters(three, "sum", after=after)) for after in ((), ["svc"]))
    for name in LAYERS:
        found = [dense(path)[name].double() for path in three]
        close({name: got[name].double()}, {name: calibrated(plain[name].double(), [d for d in found if d.norm() > 0])})


def test_lines_weighs_blocks_by_their_depth(three):
    plain, got = (dense(merge_adapters(three, "mean", after=after)) for after in ((), ["lines"]))
    total = {name: sum(dense(path)[name] for path in three) for name in LAYERS}
    alpha = sum(t.abs().sum() for t in total.values()) / (3 * sum(m.abs().sum() for m in plain.values()))
    assert float(alpha) == pytest.approx(1, rel=1e-5)
    for name in LAYERS:
        close({name: got[name]}, {name: plain[name] * (alpha + 1.0 * (name == LAYERS[2]))})
    found = dense(merge_adapters(three, "sum", after=["lines"]))
    close(found, {name: total[name] * (1 / 3 + 1.0 * (name == LAYERS[2])) for name in LAYERS})  # alpha is a third
    assert scaling.lines({"model.layers.0.q": 0, "model.layers.1.q": 1, "lm_head": None}, 0.5)["lm_head"] == 1.5
    half = dense(merge_adapters(three, "mean", after=["lines"], beta=0.5))
    close({LAYERS[2]: half[LAYERS[2]]}, {LAYERS[2]: plain[LAYERS[2]] * 1.5})


# With what each adapter saw


def covariances(n: int, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(n, 40, size, dtype=torch.float64, generator=generator) * torch.linspace(2, 0.1, size)
    return list(rows.mT @ rows / 40)


def merged_by_inputs(tasks, spreads, weights=(1.0, 1.0, 1.0), **options) -> Tensor:
    A, B = inputs(tasks, weights, spreads, **options)
    return B @ A


@pytest.fixture
def tasks() -> list[Lora]:
    return [loras(seed, rank)[LAYERS[0]] for seed, rank in ((1, 3), (2, 5), (3, 2))]


def test_a_spread_is_its_leading_directions_and_the_mean_of_the_rest():
    C = covariances(1)[0]
    values, Q = torch.linalg.eigh(C)
    found = spread(C, 3)
    want = Q[:, -3:] @ torch.diag(values[-3:]) @ Q[:, -3:].T
    want = want + values[:-3].mean() * (torch.eye(16) - Q[:, -3:] @ Q[:, -3:].T)
    X = torch.randn(16, 4, dtype=torch.float64)
    torch.testing.assert_close(found.times(X), want @ X, rtol=1e-5, atol=1e-5)
    assert found.trace() == pytest.approx(float(C.trace()), rel=1e-6)
    torch.testing.assert_close(spread(C, 16).times(X), C @ X, rtol=1e-5, atol=1e-5)


def test_a_wide_spread_is_found_by_iteration_and_holds_what_the_leading_directions_hold():
    size, values = 1100, torch.arange(1, 1101, dtype=torch.float64) ** -1.0
    vectors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    C = (vectors.Q * values) @ vectors.Q.T
    found = spread(C, 32)
    assert found.Q.shape == (size, 32) and found.trace() == pytest.approx(float(values.sum()), rel=1e-5)
    held = ((found.Q.double().T @ C) * found.Q.double().T).sum()
    assert float(held) == pytest.approx(float(values[:32].sum()), rel=1e-3)
    torch.testing.assert_close(found.values.double(), values[:32], rtol=0.01, atol=0)


@pytest.mark.parametrize("directions", [2, 16])
def test_the_closed_form_minimises_the_error_on_what_each_adapter_saw(tasks, directions):
    """Two directions of each of three go through Woodbury's identity, sixteen through the dense system."""
    spreads = [spread(C, directions) for C in covariances(3)]
    weights, deltas = (1.0, 0.5, 2.0), [B.double() @ A.double() for A, B in tasks]
    dense_C = [s.times(torch.eye(16, dtype=torch.float64)) for s in spreads]
    w = [u / (d @ C @ d.T).trace() for u, d, C in zip(weights, deltas, dense_C, strict=True)]
    lam = 0.05 * sum(wt * C for wt, C in zip(w, dense_C, strict=True)).diagonal().mean() / 3.5
    got = merged_by_inputs(tasks, spreads, weights, ridge=0.05, floor=0).requires_grad_()
    losses = [
        wt * ((got - d) @ C @ (got - d).T).trace() + u * lam * (got - d).square().sum()
        for wt, u, d, C in zip(w, weights, deltas, dense_C, strict=True)
    ]
    sum(losses).backward()
    assert got.grad.norm() < 1e-9 * got.norm() and float(w[0]) > 0


def test_adapters_that_saw_other_directions_are_each_kept_as_they_were(tasks):
    eye = torch.eye(16)
    spreads = [Spread(eye[:, 5 * t : 5 * t + 5], torch.ones(5), 0.0) for t in range(3)]
    got = merged_by_inputs(tasks, spreads, ridge=1e-6)
    for t, (A, B) in enumerate(tasks):
        seen = slice(5 * t, 5 * t + 5)
        torch.testing.assert_close(got[:, seen], (B.double() @ A.double())[:, seen], rtol=0, atol=1e-4)
    mean = sum(B.double() @ A.double() for A, B in tasks) / 3
    torch.testing.assert_close(got[:, 15], mean[:, 15], rtol=0, atol=1e-4)  # the ridge pulls towards the mean


def test_sums_of_one_adapter_after_the_other_are_exact_in_any_order(tasks):
    tasks = tasks + [loras(seed, 6)[LAYERS[0]] for seed in (4, 5, 6)]  # 28 rows in all, O is 20
    spreads = [spread(C, 4) for C in covariances(6)]
    want = merged_by_inputs(tasks, spreads, [1.0] * 6, floor=0)
    for order in (range(6), (3, 5, 0, 1, 4, 2)):
        sums = Inputs()
        for t in order:
            sums.add(tasks[t], spreads[t])
        A, B = sums.result()
        assert A.shape[0] <= 20
        torch.testing.assert_close(B @ A, want)


def test_sums_of_many_adapters_take_no_more_memory_and_are_those_of_all_at_once():
    tasks, spreads = [loras(seed, 6)[LAYERS[0]] for seed in range(20)], [spread(C, 4) for C in covariances(20)]
    sums, sizes = Inputs(), []
    for lora, C in zip(tasks, spreads, strict=True):
        sums.add(lora, C)
        sizes.append(sum(t.numel() for kept in (sums.A, sums.AC, sums.B, sums.halves) for t in kept))
    assert max(sizes[10:]) <= 2 * 20 * 16 + 20 * 20 + 2 * 16 * 16 + 6 * (2 * 16 + 20)
    eye = torch.eye(16, dtype=torch.float64)
    weighted = [C.times(eye) / output_energy(lora, C) for lora, C in zip(tasks, spreads, strict=True)]
    lam = 0.01 * sum(weighted).trace() / 16 / 20
    deltas = [lora.B.double() @ lora.A.double() for lora in tasks]
    right = sum(delta @ (C + lam * eye) for delta, C in zip(deltas, weighted, strict=True))
    A, B = sums.result()
    torch.testing.assert_close(B @ A, right @ torch.linalg.inv(sum(weighted) + 20 * lam * eye), rtol=1e-8, atol=1e-10)


def test_an_adapter_that_hardly_responds_to_its_inputs_is_not_weighted_without_bound(tasks):
    spreads = [spread(C, 4) for C in covariances(3)]
    weak = Lora(tasks[2].A, 1e-4 * tasks[2].B)
    plain = merged_by_inputs([*tasks[:2], weak], spreads, floor=0)
    floored = merged_by_inputs([*tasks[:2], weak], spreads, floor=0.1)

    def error(got: Tensor, t: int) -> float:
        A, B = tasks[t]
        difference = Lora(torch.eye(16, dtype=torch.float64), got - B.double() @ A.double())
        return output_energy(difference, spreads[t]) / output_energy(tasks[t], spreads[t])

    assert error(floored, 0) + error(floored, 1) < 0.8 * (error(plain, 0) + error(plain, 1))
    energies = [output_energy(lora, C) for lora, C in zip([*tasks[:2], weak], spreads, strict=True)]
    sums = Inputs()
    for lora, C, energy in zip([*tasks[:2], weak], spreads, energies, strict=True):
        sums.add(lora, C, output=max(energy, 0.1 * sum(energies) / 3))
    A, B = sums.result()
    torch.testing.assert_close(floored, B @ A)


def test_an_adapter_of_weight_0_changes_nothing_of_the_others(tasks):
    spreads = [spread(C, 4) for C in covariances(3)]
    loud = Lora(tasks[0].A, 1e3 * tasks[0].B)
    weak = Lora(tasks[2].A, 1e-2 * tasks[2].B)
    A, B = inputs([tasks[1], weak], [1.0, 2.0], spreads[1:])
    torch.testing.assert_close(merged_by_inputs([loud, tasks[1], weak], spreads, [0.0, 1.0, 2.0]), B @ A)


def test_without_statistics_another_rule_is_taken_and_said(three):
    with pytest.warns(UserWarning, match="No input statistics in .*task1.*rule='iso-c'.*collect_inputs"):
        report = merge_adapters(three)
    assert report.rule == "iso-c" and report.options == {"factor": 2.0} and len(report.warnings) == 1
    close(dense(report), dense(merge_adapters(three, "iso-c", factor=2.0)))
    with pytest.warns(UserWarning, match="rule='sum'"):
        assert merge_adapters(three[:2]).rule == "sum"


def test_what_is_done_after_a_merge_stays_as_it_was_asked_for_under_another_rule(three):
    with pytest.warns(UserWarning, match="No input statistics"):
        report = merge_adapters(three, after=["svc"], alpha=5.0)
    close(dense(report), dense(merge_adapters(three, "iso-c", factor=2.0, after=["svc"], alpha=5.0)))
    assert report.options == {"factor": 2.0, "alpha": 5.0}
    assert (
        dense(report)[LAYERS[0]] - dense(merge_adapters(three, "iso-c", factor=2.0, after=["svc"]))[LAYERS[0]]
    ).norm() > 0.1


TEXTS = {"task1": ["the cat sat on the mat", "a dog ran", "no"], "task2": ["big blue log", "yes the small red cat"]}


@pytest.fixture
def trained(llama_folder, tmp_path) -> tuple[torch.nn.Module, list[Path]]:
    """A base model and two adapters of it; the second one on other modules and of another rank."""
    for i, (name, targets) in enumerate({"task1": ["q_proj", "up_proj"], "task2": ["q_proj", "v_proj"]}.items()):
        base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=2 + i, lora_alpha=8, target_modules=targets))
        randomize(model, seed=i)
        model.save_pretrained(tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    return base, [tmp_path / name for name in TEXTS]


@pytest.mark.parametrize("strengths", [(0.0, 0.5, 1.0), (0.5,), (1.0,), (0.0, 1.0)])
def test_statistics_are_of_real_tokens_and_last_ones_under_shares_of_the_adapter(strengths, trained, llama_folder):
    base, folders = trained
    before = {name: p.clone() for name, p in base.named_parameters()}
    options = {} if len(strengths) == 3 else {"strengths": strengths if len(strengths) > 1 else strengths[0]}
    found = collect_inputs(base, TEXTS["task1"], folders[0], directions=64, last=0.25, **options)
    after = dict(base.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())
    assert found.prompts == 3 and found.groups["model.layers.1.mlp.up_proj"] == ("model.layers.1.mlp.up_proj",)

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    model = PeftModel.from_pretrained(base, folders[0]).eval()
    rows: list[Tensor] = []
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.register_forward_pre_hook(lambda _, args: rows.append(args[0][0].detach().double()))
    for strength in strengths:
        with rescale_adapter_scale(model, strength):
            for text in TEXTS["task1"]:
                model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    every, ends = torch.cat(rows), torch.stack([sample[-1] for sample in rows])
    want = 0.75 * every.T @ every / len(every) + 0.25 * ends.T @ ends / len(ends)
    got = found.of("model.layers.1.mlp.up_proj").times(torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert found.tokens * len(strengths) == len(every)

    loaded = Statistics.load(folders[0])
    assert loaded.groups == found.groups and loaded.strengths == found.strengths == strengths
    for name, one in found.spreads.items():
        torch.testing.assert_close(loaded.spreads[name].Q.float(), one.Q, rtol=0, atol=1e-3)
        assert torch.equal(loaded.spreads[name].values, one.values) and loaded.spreads[name].rest == one.rest


@pytest.mark.parametrize("name", ["lora", "lori", "mora-dense", "furina"])
def test_half_an_adapter_is_half_of_its_update_and_whole_again_afterwards(name):
    config = LoraConfig(r=4, target_modules=["q_proj"]) if name == "lora" else METHODS[name](target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(), config).eval()
    randomize(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    base, whole = layer.base_layer(x), layer(x)
    with pytest.raises(KeyError), at_strength(model, 0.5):
        torch.testing.assert_close(layer(x) - base, (whole - base) / 2, rtol=1e-4, atol=1e-6)
        raise KeyError
    assert torch.equal(layer(x), whole)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base's weights.*unmerge_adapter"), at_strength(model, 0.5):
        pass


def test_the_report_has_what_each_adapter_adds_to_the_outputs_of_another(three):
    spreads = [spread(C, 4) for C in covariances(3)]
    for path, C in zip(three, spreads, strict=True):
        Statistics({LAYERS[0]: C}, {LAYERS[0]: (LAYERS[0],)}, 1, 1).save(path)
    report, deltas = merge_adapters(three, rank=3), [dense(path)[LAYERS[0]] for path in three]
    merged = dense(report)[LAYERS[0]]
    for t, C in enumerate(spreads):
        root = torch.linalg.cholesky(C.times(torch.eye(16, dtype=torch.float64)))
        own = (deltas[t] @ root).norm()
        want = [float((delta @ root).norm() / own) for delta in deltas]
        assert report.interference[t] == pytest.approx(want, rel=1e-2)  # directions are in 16 bits
        assert report.adapters[t].output_error == pytest.approx(
            float(((merged - deltas[t]) @ root).norm() / own), rel=1e-2
        )
    assert merge_adapters(three, "mean").interference is None


def test_an_adapter_that_does_nothing_is_interfered_with_by_no_number(tmp_path, three):
    nothing = {name: Lora(A, torch.zeros_like(B)) for name, (A, B) in loras(9).items()}
    write_lora(tmp_path / "untrained", nothing, base_model_name_or_path="base")
    folders = [three[0], tmp_path / "untrained"]
    for path in folders:
        Statistics({LAYERS[0]: spread(covariances(1)[0], 4)}, {LAYERS[0]: (LAYERS[0],)}, 1, 1).save(path)
    found = merge_adapters(folders).interference
    assert found[0] == [1.0, 0.0] and found[1] is None


def test_lori_s_own_sum_is_that_of_the_files(tmp_path):
    """Over one base, at the rank of its seeds; `merge_adapters` gives the same updates without a model."""
    model = get_peft_model(tiny_llama(), METHODS["lori"](target_modules=["q_proj"], seed=0), adapter_name="one")
    model.add_adapter("two", METHODS["lori"](target_modules=["q_proj", "up_proj"], seed=1))
    model.base_model.set_adapter(["one", "two"])
    randomize(model)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "both")
    report = merge_adapters([tmp_path / "one", tmp_path / "two"], "sum", weights=[0.5, 2.0])
    for name, (A, B) in report.loras.items():
        want = model.get_base_model().get_submodule(name).get_delta_weight("both")
        torch.testing.assert_close(B @ A, want, rtol=1e-4, atol=1e-5)


def state_of(model: torch.nn.Module) -> tuple:
    modules = {
        name: (id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }
    return modules, {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}, sorted(vars(model))


@pytest.mark.parametrize("fault", [None, "another base", "out of memory"])
def test_the_base_is_afterwards_as_it_was_also_where_an_adapter_does_not_load(fault, trained, tmp_path, monkeypatch):
    base, folders = trained
    base.train()
    base.model.layers[0].eval()
    base.lm_head.requires_grad_(False)
    before = state_of(base)
    folder = folders[0]
    if fault == "another base":
        write_lora(
            folder := tmp_path / "other", {"model.layers.1.mlp.up_proj": Lora(torch.ones(2, 64), torch.ones(96, 2))}
        )
    if fault == "out of memory":
        monkeypatch.setattr(PeftModel, "load_adapter", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no room")))
    expected = {
        None: warnings.catch_warnings(),
        "another base": pytest.raises(
            ValueError, match="up_proj' by 96 x 64, which is 128 x 64 in the model: it is of an"
        ),
        "out of memory": pytest.raises(MemoryError, match="no room"),
    }[fault]
    with expected:
        collect_inputs(base, TEXTS["task1"], folder)
    assert state_of(base) == before


def test_a_model_with_an_adapter_in_it_is_refused_and_stays(trained):
    base, folders = trained
    base.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "mine")
    x = torch.arange(5)[None]
    own = base.eval()(x).logits
    before = state_of(base)
    prompts = {path: TEXTS[path.name] for path in folders}
    for look in (
        lambda: collect_inputs(base, TEXTS["task1"], folders[0]),
        lambda: merge_adapters(folders, model=base, prompts=prompts),
    ):
        with pytest.raises(ValueError, match="has an adapter in it already.*give the bare base model"):
            look()
    assert state_of(base) == before and torch.equal(base(x).logits, own)


def test_an_encoder_decoder_is_refused_where_it_would_be_looked_at(tmp_path, llama_folder):
    model = get_peft_model(tiny_t5(), LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    randomize(model)
    model.save_pretrained(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    with pytest.raises(ValueError, match="into the decoder of an encoder-decoder.*a rule that needs no inputs"):
        collect_inputs(tiny_t5(), TEXTS["task1"], tmp_path / "one", tokenizer)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma", "t5"])
def test_a_folder_without_a_tokenizer_has_none_though_transformers_makes_one_up(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) > 0
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer: save it there, or give one as `tokenizer`"):
        load_tokenizer(tmp_path)


def test_a_folder_of_which_transformers_makes_no_tokenizer_is_said_to_have_none(tmp_path):
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} has no tokenizer that opens \(.*\): save it there"):
        load_tokenizer(tmp_path)


def test_no_tokenizer_that_knows_no_word_goes_beside_a_merged_model(tmp_path):
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"))
    randomize(model)
    model.save_pretrained(tmp_path / "one")
    merge_into_base(tmp_path / "one", tmp_path / "whole", base=tmp_path / "base")
    assert not [path.name for path in (tmp_path / "whole").iterdir() if "token" in path.name]


@pytest.mark.parametrize("method", ["furina", "mtllora"])
def test_adapters_that_watch_the_model_leave_no_watch_behind(method, llama_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    adapted(method, tiny_llama()).save_pretrained(tmp_path / "one")
    before = state_of(base)
    with put_onto(base, tmp_path / "one") as model:
        model(torch.tensor([[3, 4]]))
        assert state_of(base) != before
    assert state_of(base) == before


def test_prompts_beyond_the_models_positions_are_refused(llama_folder, tmp_path):
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    randomize(model)
    model.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="A prompt has .* tokens, and the model has 64 positions"):
        collect_inputs(
            model.unload(), ["the cat " * 40], tmp_path / "one", AutoTokenizer.from_pretrained(llama_folder)
        )


def test_answers_have_to_fit_the_model_s_positions_as_well(llama_folder, tmp_path):
    base, tokenizer = tiny_gpt2(), AutoTokenizer.from_pretrained(llama_folder)
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
        randomize(model, seed=seed)
        model.save_pretrained(folder)
        base = model.unload()
    given = {"model": base, "tokenizer": tokenizer, "prompts": {key: ["the cat " * 30] for key in folders}}
    with pytest.raises(ValueError, match="60 tokens and an answer up to 16 .*, and the model has 64 positions"):
        merge_adapters(folders, **given)
    assert merge_adapters(folders, **given, answer_tokens=4).tried
    assert merge_adapters(folders, **given, strength=0.5).tried == {}


def test_sums_of_nothing_are_refused():
    lora = Lora(torch.ones(1, 3), torch.ones(2, 1))
    empty, nothing = Inputs(), Inputs()
    nothing.add(lora, None, weight=0.0)
    for sums in (empty, nothing):
        with pytest.raises(ValueError, match="Nothing was added that counts"):
            sums.result()
    with pytest.raises(ValueError, match="`weight` must be a number >= 0"):
        empty.add(lora, None, weight=-1.0)
    for rank in (0, -1, "a"):
        with pytest.raises(ValueError, match="`rank` must be an integer >= 1, or None"):
            sequential.Opcm(rank)
    for merged in (Inputs(), sequential.Opcm(), sequential.Slao()):
        merged.add(lora) if not isinstance(merged, Inputs) else merged.add(lora, None)
        for other in (Lora(torch.ones(1, 4), lora.B), Lora(lora.A, torch.ones(5, 1))):
            with pytest.raises(ValueError, match="cannot follow one of 2 x 3"):
                merged.add(other) if not isinstance(merged, Inputs) else merged.add(other, None)


@pytest.mark.parametrize("value", [{"lora_alpha": None}, {"lora_alpha": float("nan")}, {"alpha_pattern": {"q": "1"}}])
def test_a_config_with_no_scale_is_refused_by_its_file(trained, value):
    _, (folder, *_) = trained
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | value))
    with pytest.raises(ValueError, match="adapter_config.json has a lora_alpha or alpha_pattern that is none"):
        read_lora(folder)


def test_what_requantising_loses_is_of_the_layers_that_are_quantised_and_in_their_blocks(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4_config())
    base.save_pretrained(tmp_path / "nf4")
    fields = {"r": 2, "target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    adapted(LoraConfig, base, **fields).save_pretrained(tmp_path / "adapter")
    done = merge_into_base(tmp_path / "adapter", tmp_path / "whole", dtype=torch.float32, requantize=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=nf4_config())
    again = quantised.dequantize(torch.float32)
    loras = {name: lora for name, lora in read_lora(tmp_path / "adapter").loras.items() if name != "lm_head"}
    assert done.loss.keys() == loras.keys() and loras
    for name, (A, B) in loras.items():
        lost = (again.get_submodule(name).weight - merged.get_submodule(name).weight.T).norm()  # a Linear4bit
        assert done.loss[name] == pytest.approx(float(lost / (B @ A).norm()), rel=0.02)


def test_prompts_are_read_to_their_end_unless_a_length_is_given(trained):
    base, folders = trained
    text = "the cat " * 45
    found = [collect_inputs(base, [text], folders[0], max_length=length).tokens for length in (None, 7)]
    assert found[0] >= 90 and found[1] == 7


def test_prompts_are_read_as_each_is_alone_whatever_the_tokenizer_pads_with(llama_folder, tmp_path):
    """Padded on the left and without position ids, GPT-2 would number the tokens of a short text from its padding."""
    base = tiny_gpt2()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    randomize(model)
    model.save_pretrained(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(llama_folder, padding_side="left")
    tokenizer.pad_token = None
    base = model.unload()
    both = [collect_inputs(base, TEXTS["task1"], tmp_path / "one", tokenizer, batch_size=size) for size in (8, 1)]
    eye = torch.eye(len(both[0].spreads["transformer.h.0.mlp.c_fc"].Q), dtype=torch.float64)
    for module in both[0].spreads:
        together, alone = (found.of(module).times(eye) for found in both)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert tokenizer.pad_token is None and tokenizer.padding_side == "left"


def test_statistics_of_other_weights_or_a_damaged_file_are_refused(trained):
    base, folders = trained
    collect_inputs(base, TEXTS["task1"], folders[0])
    file = folders[0] / "input_statistics.safetensors"
    kept, found = file.read_bytes(), Statistics.load(folders[0])
    assert all(found.save(folders[0]).read_bytes() == kept for _ in range(8))
    (folders[1] / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="made with other weights of the adapter.*collect_inputs"):
        merge_adapters(folders)
    file.write_bytes(b"no")
    with pytest.raises(ValueError, match="is damaged.*collect_inputs writes it anew"):
        merge_adapters(folders)
    broken = collect_inputs(base, TEXTS["task1"], folders[0])
    broken.spreads["model.layers.1.mlp.up_proj"].values[0] = float("nan")
    broken.save(folders[0])
    with pytest.raises(ValueError, match="is damaged.*up_proj.values' is not finite"):
        merge_adapters(folders)


@pytest.mark.parametrize(
    "texts", [[], ["", ""], None, "the cat", {"a": ["the cat"]}, ["a", 5], [["the", "cat"]], [b"a"]]
)
def test_what_is_no_list_of_texts_is_refused(texts, trained):
    base, folders = trained
    with pytest.raises(ValueError, match=r"`texts(\[...\])?` must be"):
        collect_inputs(base, texts, folders[0])
    assert not (folders[0] / "input_statistics.safetensors").exists()
    if texts is not None:
        with pytest.raises(ValueError, match=rf"`prompts\['{folders[1]}'\](\[...\])?` must be"):
            merge_adapters(folders, model=base, prompts={folders[0]: ["the cat"], folders[1]: texts})


def test_a_folder_s_prompts_are_given_once(trained):
    base, folders = trained
    prompts = {folders[0]: ["the cat"], f"{folders[0]}/": ["a dog"], folders[1]: ["the cat"]}
    with pytest.raises(ValueError, match=f"`prompts` has {folders[0]} twice"):
        merge_adapters(folders, model=base, prompts=prompts)


def test_statistics_are_of_the_adapter_in_the_folder(trained, llama_folder):
    base, folders = trained
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    want = collect_inputs(base, TEXTS["task1"], folders[0], tokenizer)
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="one")
    model.load_adapter(folders[1], "two")
    got = collect_inputs(model, TEXTS["task1"], folders[0], tokenizer)
    for name, one in want.spreads.items():
        torch.testing.assert_close(got.spreads[name].values, one.values)
    (folders[0] / "input_statistics.safetensors").unlink()
    model.set_adapter("two")
    with pytest.raises(ValueError, match=r"active adapter \('two'\) is not the one in .*task1: make that one active"):
        collect_inputs(model, TEXTS["task1"], folders[0], tokenizer)
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"active adapter \('one' and 'two'\)"):
        collect_inputs(model, TEXTS["task1"], folders[0], tokenizer)
    model.base_model.set_adapter("one")
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["one"].weight.mul_(1.1)
    with pytest.raises(ValueError, match="save it again if it has been trained since"):
        collect_inputs(model, TEXTS["task1"], folders[0], tokenizer)
    another = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match="it is of another base model"):
        collect_inputs(another, TEXTS["task1"], folders[0], tokenizer)
    assert not (folders[0] / "input_statistics.safetensors").exists()


def test_arguments_of_another_kind_are_refused_by_name(trained):
    base, folders = trained
    prompts = {folder: ["the cat"] for folder in folders}
    for call, said in (
        (lambda: merge_adapters([None]), r"`folders\[...\]` must be the folder of an adapter, got None"),
        (lambda: merge_adapters(folders, ["sum"]), "`rule` must be"),
        (lambda: merge_adapters(folders, "sum", before=None), "`before` must be a list"),
        (lambda: merge_adapters(folders, "sum", after=[[1]]), "`after` must be a list"),
        (lambda: merge_adapters(folders, model="name", prompts=prompts), "`model` must be the base model itself"),
        (lambda: collect_inputs("name", ["the cat"], folders[0]), "`model` must be the base model itself"),
        (lambda: collect_inputs(base, ["the cat"], folders[0], max_length=0), "`max_length` must be an integer >= 1"),
        (lambda: merge_adapters(folders, "sum", learning_rate=1e-3), "learning_rate would change nothing"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize("given", [{"weights": [1, 1, 2]}, {"ridge": 0.1}, {"floor": 0}])
def test_without_statistics_what_is_asked_of_them_is_refused(given, three):
    with pytest.raises(ValueError, match="No input statistics in .*: without them rule='inputs'.*ask for. Write them"):
        merge_adapters(three, **given)


def test_the_merged_config_says_what_the_adapters_say_together(tmp_path):
    same = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}
    a, b = (folder(tmp_path, seed, **same) for seed in (1, 2))
    merge_adapters([a, b], "sum", output=tmp_path / "alike")
    config = json.loads((tmp_path / "alike/adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"] and config["layers_to_transform"] == [0, 1]
    c = folder(tmp_path, 3, target_modules=["q_proj", "mlp.down_proj"], fan_in_fan_out=True, auto_mapping={"x": "y"})
    merge_adapters([c, a], "sum", output=tmp_path / "apart")
    config = json.loads((tmp_path / "apart/adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(LAYERS) and config["layers_to_transform"] is None
    assert config["fan_in_fan_out"] and config["auto_mapping"] is None


def test_what_16_bits_do_not_hold_is_no_model(trained, llama_folder, tmp_path):
    folder = tmp_path / "large"
    write_lora(
        folder, {"model.layers.0.mlp.up_proj": Lora(torch.full((1, 64), 300.0), torch.full((128, 1), 300.0))},
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with pytest.raises(ValueError, match="not finite in torch.float16: give dtype=torch.bfloat16"):
        merge_into_base(folder, tmp_path / "whole", base=llama_folder, dtype=torch.float16)
    assert not (tmp_path / "whole").exists()
    merge_into_base(folder, tmp_path / "whole", base=llama_folder)


def test_one_pass_is_what_side_files_give_and_a_second_one_looks_under_the_merged(trained, llama_folder, tmp_path):
    base, folders = trained
    names = set(dict(base.named_modules()))
    for path in folders:
        collect_inputs(base, TEXTS[path.name], path, directions=8, strengths=0.5)
    files = merge_adapters(folders, rank=4, output=tmp_path / "files")
    prompts = {str(path): TEXTS[path.name] for path in folders}
    given = {"rank": 4, "model": base, "prompts": prompts, "directions": 8}
    one, two = (merge_adapters(folders, passes=n, strength=0.5, **given) for n in (1, 2))
    assert set(dict(base.named_modules())) == names
    assert files.rule == one.rule == "inputs" and two.options == {
        "passes": 2, "directions": 8, "last": 0.5, "strength": 0.5
    }  # fmt: skip
    assert one.options == {**two.options, "passes": 1}
    reader = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(llama_folder))  # a processor
    full = merge_adapters(folders, tokenizer=reader, strength=1, **given)
    assert full.options == {**two.options, "strength": 1}
    assert any((full.loras[n].B @ full.loras[n].A - B @ A).norm() > 1e-3 for n, (A, B) in two.loras.items())
    for name, (A, B) in one.loras.items():
        torch.testing.assert_close(files.loras[name].B @ files.loras[name].A, B @ A, rtol=0, atol=2e-2)
    assert any((two.loras[n].B @ two.loras[n].A - B @ A).norm() > 1e-3 for n, (A, B) in one.loras.items())
    plain = merge_adapters(folders, "mean", rank=4)
    assert all(a.output_error < 0.7 for a in files.adapters) and plain.adapters[0].output_error is None
    assert PeftModel.from_pretrained(base, tmp_path / "files")


def test_a_4_bit_base_is_looked_at_and_left_as_it_was(trained, llama_folder):
    _, folders = trained
    base = quantized(llama_folder)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    prompts = {path: TEXTS[path.name] for path in folders}
    report = merge_adapters(folders, model=base, prompts=prompts)
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], t) for name, t in before.items())
    assert all(adapter.output_error < 0.7 for adapter in report.adapters)


def test_what_an_adapter_saves_in_full_does_not_stay_in_the_base(llama_folder, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path / "task1")
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    before, head = {name: tensor.clone() for name, tensor in base.state_dict().items()}, base.lm_head
    ids = torch.arange(5)[None]
    own = base(ids).logits
    with put_onto(base, tmp_path / "task1") as with_adapter:
        assert not torch.allclose(with_adapter(ids).logits, own)
    assert base.lm_head is head and base.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert torch.equal(base(ids).logits, own)


def test_prompts_need_a_base_model_and_every_folder(trained):
    base, folders = trained
    prompts = {path: TEXTS[path.name] for path in folders}
    for arguments, message in (
        ({"prompts": prompts}, "go together"),
        ({"rule": "tsv", "model": base, "prompts": prompts}, "with rule='inputs'"),
        ({"model": base, "prompts": {folders[0]: ["a"]}}, "`prompts` has no texts for .*task2"),
        ({"model": base, "prompts": prompts, "passes": 0}, "`passes` must be"),
        ({"model": base, "prompts": prompts, "strength": []}, "`strength` must be a share"),
        ({"model": base, "prompts": prompts, "strength": [0.5, 2]}, "`strength` must be a share"),
        ({"model": base, "prompts": prompts, "weights": [1, -1]}, "weighs squared errors"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_adapters(folders, **arguments)
    with pytest.raises(ValueError, match="is a PeftModel: give the base"):
        merge_adapters(folders, model=PeftModel.from_pretrained(base, folders[0]), prompts=prompts)


# Into the base's weights


@pytest.fixture
def over_nf4(llama_folder, tmp_path) -> tuple[Path, Path]:
    """A base that is saved in NF4, and an adapter trained on it."""
    for part in (quantized(llama_folder), AutoTokenizer.from_pretrained(llama_folder)):
        part.save_pretrained(tmp_path / "nf4")
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    adapted(LoraConfig, base, **fields).save_pretrained(tmp_path / "adapter")
    return tmp_path / "nf4", tmp_path / "adapter"


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def test_an_adapter_goes_into_the_dequantised_base_and_never_into_4_bits(over_nf4, llama_folder, inputs, tmp_path):
    nf4, adapter = over_nf4
    done = merge_into_base(adapter, tmp_path / "whole", dtype=torch.float32, requantize=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "whole/config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "whole")("the cat") and done.dequantized
    plain = AutoModelForCausalLM.from_pretrained(nf4).dequantize(torch.float32).float()
    before = logits(plain, inputs)
    want = logits(PeftModel.from_pretrained(plain, adapter), inputs)
    torch.testing.assert_close(logits(merged, inputs), want, rtol=1e-4, atol=1e-4)
    assert (want - before).abs().max() > 0.1

    again = quantized(str(tmp_path / "whole")).dequantize(torch.float32)
    off = whole = 0.0
    for name, (A, B) in read_lora(adapter).loras.items():
        lost = (again.get_submodule(name).weight - merged.get_submodule(name).weight).square().sum()
        assert done.loss[name] == pytest.approx(float(lost.sqrt() / (B @ A).norm()), rel=0.02)  # bf16 on the way
        off, whole = off + lost, whole + (B @ A).square().sum()
    assert done.total == pytest.approx(float((off / whole).sqrt()), rel=0.02) and f"{done.total:.2f}" in str(done)


def test_the_16_bit_base_is_taken_where_it_is_given(over_nf4, llama_folder, inputs, tmp_path):
    _, adapter = over_nf4
    done = merge_into_base(adapter, tmp_path / "whole", base=llama_folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert merged.dtype == torch.bfloat16 and not done.dequantized and done.total is None
    plain = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    for name, (A, B) in read_lora(adapter).loras.items():
        want = (plain.get_submodule(name).weight.float() + B @ A).bfloat16()
        assert torch.equal(merged.get_submodule(name).weight, want)
    with pytest.raises(FileExistsError, match="delete it"):
        merge_into_base(adapter, tmp_path / "whole")


@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens"])
def test_an_output_head_and_embeddings_that_are_tied_do_not_follow_each_other(trained, tmp_path):
    base = tiny_llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    head, saved = Lora(torch.randn(2, 64), torch.randn(64, 2)), {}
    if trained == "embed_tokens":
        saved = {"saved": {f"{PREFIX}model.embed_tokens.weight": torch.randn(64, 64)}, "modules_to_save": [trained]}
    loras = {"lm_head" if trained == "lm_head" else "model.layers.0.self_attn.q_proj": head}
    write_lora(tmp_path / "adapter", loras, base_model_name_or_path=str(tmp_path / "base"), **saved)
    merge_into_base(tmp_path / "adapter", tmp_path / "whole", dtype=torch.float32)
    merged, before = AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), base.get_input_embeddings().weight
    new = before + head.B @ head.A if trained == "lm_head" else next(iter(saved["saved"].values()))
    want = {"lm_head": (before, new), "embed_tokens": (new, before)}[trained]
    for part, weight in zip((merged.get_input_embeddings(), merged.lm_head), want, strict=True):
        torch.testing.assert_close(part.weight, weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["lora", "lori", "mora-dense", "furina"])
def test_an_adapted_head_as_peft_saves_it_merges_and_goes_into_the_base(method, tied, inputs, tmp_path):
    """With the base's own weight beside its factors."""
    tiny_llama(tied=tied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fields = {"target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
    model = adapted(LORA if method == "lora" else method, base, **fields)
    model.save_pretrained(tmp_path / "one")
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / "one/adapter_model.safetensors")
    merge_adapters([tmp_path / "one"], "sum", output=tmp_path / "merged")
    for name in ("one", "merged"):
        merge_into_base(tmp_path / name, tmp_path / f"{name}-whole", dtype=torch.float32)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-whole")
        torch.testing.assert_close(logits(whole, inputs), logits(model, inputs), rtol=1e-4, atol=1e-4)


def test_the_adapters_tokenizer_stays_with_the_merged_one_and_two_are_told_of(llama_folder, tmp_path, monkeypatch):
    folders = [folder(tmp_path, seed) for seed in (1, 2, 3)]
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(folders[0])
    tokenizer(["the cat sat"], truncation=True, max_length=2, padding="max_length")  # which its file then says
    tokenizer.save_pretrained(folders[1])
    merge_adapters(folders, "mean", output=tmp_path / "both")  # the third has none
    assert AutoTokenizer.from_pretrained(tmp_path / "both").chat_template == tokenizer.chat_template
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folders[1])
    with pytest.warns(UserWarning, match="task1 and .*task2 hold different tokenizers or chat templates"):
        report = merge_adapters(folders, "mean", output=tmp_path / "other")
    assert not (tmp_path / "other/tokenizer_config.json").exists() and "different tokenizers" in report.warnings[0]
    (folders[1] / "tokenizer_config.json").write_text("{")
    monkeypatch.setattr("peft_mora.merging._Merge", None)  # it is said before the work
    with pytest.raises(ValueError, match="task2/tokenizer_config.json is damaged .*: save the tokenizer there again"):
        merge_adapters(folders, "mean", output=tmp_path / "third")


def test_a_prompt_has_no_end_of_text_that_its_tokenizer_adds():
    class Ends:
        """[1] text [2], as Llama's with add_eos_token; or only [2] before it, which begins and ends texts."""

        eos_token_id = 2

        def __init__(self, before, behind):
            self.before, self.behind = before, behind

        def __call__(self, texts, add_special_tokens=True):
            def ids(text):
                found = [5 + ord(c) for c in text if c != "$"] + [2] * text.count("$")
                return [*self.before, *found, *self.behind] if add_special_tokens else found

            return {"input_ids": ids(texts) if isinstance(texts, str) else [ids(text) for text in texts]}

    def of(tokenizer, **given):
        return [row.tolist() for row in encoded(["b", "b$"], tokenizer, **given)]

    assert of(Ends([1], [2])) == [[1, 103, 2], [1, 103, 2, 2]]
    assert of(Ends([1], [2]), open_end=True) == [[1, 103], [1, 103, 2]]
    assert of(Ends([2], []), open_end=True) == [[2, 103], [2, 103, 2]]


def test_what_is_of_another_model_or_task_goes_into_no_base(over_nf4, llama_folder, tmp_path):
    nf4, adapter = over_nf4
    resized = {"saved": {f"{PREFIX}lm_head.weight": torch.randn(1, 64)}, "modules_to_save": ["lm_head"]}
    fits = {"model.layers.0.self_attn.q_proj": Lora(torch.randn(2, 64), torch.randn(64, 2))}
    AutoModelForSequenceClassification.from_pretrained(llama_folder).save_pretrained(tmp_path / "headless")
    classifier = {"base_model_class": "LlamaForSequenceClassification"}
    write_lora(tmp_path / "resized", fits, base_model_name_or_path=str(nf4), **resized)
    for arguments, message in (
        ({"adapter": tmp_path / "resized"}, "'lm_head.weight' is 64 x 64 in .*nf4, and 1 x 64 in the adapter"),
        ({"base": str(nf4), "dtype": torch.int8}, "`dtype` must be a torch dtype"),
        ({"base": torch.nn.Linear(1, 1)}, "`base` must be the folder or the name of a model, got a Linear"),
        (
            {"adapter": folder(tmp_path, 1, base_model_name_or_path=str(nf4))},
            "is 64 x 128 in .*nf4, and its update 16 x 24",
        ),
        ({"adapter": folder(tmp_path, 2, base_model_name_or_path=None)}, "does not say which model it is for"),
        ({"adapter": folder(tmp_path, 3, task_type="SEQ_CLS")}, "is for SEQ_CLS"),
        ({"adapter": folder(tmp_path, 4, auto_mapping=classifier)}, "is for LlamaForSequenceClassification"),
        (
            {"adapter": folder(tmp_path, 6, auto_mapping=None), "base": str(tmp_path / "headless")},
            "headless has no 'lm_head.weight': it is no causal language model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            merge_into_base(**{"adapter": adapter, "output": tmp_path / "whole", **arguments})
    assert not (tmp_path / "whole").exists()
