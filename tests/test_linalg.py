"""The linear algebra behind projection, merging and export, in float64, against its definitions."""

import pytest
import torch

from peft_mora import linalg


def covariance(size: int, rank: int, seed: int = 0, decay: float = 0.7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]
    return Q @ torch.diag(decay ** torch.arange(rank, dtype=torch.float64)) @ Q.T


def is_orthonormal(V: torch.Tensor, atol: float = 1e-10) -> bool:
    return torch.allclose(V.T @ V, torch.eye(V.shape[1], dtype=V.dtype), atol=atol)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_fewest_directions_that_reach_the_energy(energy):
    C = covariance(23, 11)
    V = linalg.leading_directions(C, energy)
    share = ((V.T @ C @ V).trace() / C.trace()).item()
    assert is_orthonormal(V)
    assert share >= energy - 1e-9
    fewer = V[:, :-1]
    assert ((fewer.T @ C @ fewer).trace() / C.trace()).item() < energy
    assert V.shape[1] <= 11  # the null space is never protected


def test_energy_that_is_held_already_counts():
    first, second = covariance(17, 6, seed=1), covariance(17, 6, seed=2)
    held = linalg.leading_directions(first, 0.95)
    new = linalg.leading_directions(second, 0.95, held=held)
    both = torch.cat([held, new], dim=1)
    assert is_orthonormal(both)
    assert (both.T @ second @ both).trace() / second.trace() >= 0.95 - 1e-9
    assert linalg.leading_directions(first, 0.95, held=both).shape == (17, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_covariance_that_is_not_finite_has_no_directions(value):
    C = covariance(6, 6).float()
    C[2, 2] = value
    with pytest.raises(ValueError, match="no leading directions"):
        linalg.leading_directions(C, 0.95)


def test_max_rank_counts_held_and_new_together():
    held = linalg.leading_directions(covariance(17, 6, seed=1), None, max_rank=4)
    assert held.shape[1] == 4
    assert linalg.leading_directions(covariance(17, 6, seed=2), None, max_rank=7, held=held).shape[1] == 3
    assert linalg.leading_directions(covariance(17, 6, seed=2), 0.99, max_rank=3, held=held).shape[1] == 0


def test_projected_rows_are_orthogonal_and_projecting_again_changes_nothing():
    V = linalg.leading_directions(covariance(19, 7), 0.99)
    rows = torch.randn(5, 19, dtype=torch.float64)
    out = linalg.project_out(rows, V)
    assert (out @ V).abs().max() < 1e-12
    torch.testing.assert_close(linalg.project_out(out, V), out)
    torch.testing.assert_close(out + rows @ V @ V.T, rows)


def test_orthonormal_spans_what_is_new_and_drops_repeats():
    held = linalg.leading_directions(covariance(13, 4), 1.0)
    fresh = torch.randn(13, 3, dtype=torch.float64)
    found = linalg.orthonormal(torch.cat([fresh, fresh @ torch.randn(3, 2, dtype=torch.float64), held], dim=1), held)
    assert found.shape == (13, 3)
    assert is_orthonormal(torch.cat([held, found], dim=1))
    rest = linalg.project_out(linalg.project_out(fresh.T, held), found)
    assert rest.abs().max() < 1e-10
    assert linalg.orthonormal(held, held).shape[1] == 0


def test_update_norms_equal_the_norms_of_the_whole_update():
    A, B = torch.randn(3, 11, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    V = torch.linalg.qr(torch.randn(11, 4, dtype=torch.float64))[0]
    inside, whole = linalg.update_norms(A, B, V)
    torch.testing.assert_close(inside, ((B @ A) @ V).square().sum())
    torch.testing.assert_close(whole, (B @ A).square().sum())


@pytest.mark.parametrize("rank", [3, 12])
def test_frequent_directions_bound_holds(rank):
    """Of a stream of no more directions than it has it loses none."""
    rows = torch.randn(40, rank, dtype=torch.float64) * torch.linspace(3, 0.1, rank, dtype=torch.float64)
    rows = rows @ torch.linalg.qr(torch.randn(12, rank, dtype=torch.float64))[0].T
    sketch = rows[:0]
    cut = 0.0
    for part in rows.split(8):
        whole = torch.cat([sketch, part])
        cut += float(torch.linalg.svdvals(whole)[5].square())
        sketch = linalg.shrink_sketch(whole, 5)
    assert sketch.shape == (5, 12)
    difference = torch.linalg.eigvalsh(rows.T @ rows - sketch.T @ sketch)
    assert difference.min() > -1e-9  # never more than was there
    assert difference.max() <= cut + 1e-9  # and at most the sum of what was cut
    assert rank > 3 or cut < 1e-9


def test_weakest_directions_are_those_of_the_smallest_eigenvalues_and_near_the_rows_where_all_are_alike():
    C, near = covariance(9, 9), torch.randn(3, 9, dtype=torch.float64)
    V = linalg.weakest_directions(C, 3, near)
    assert is_orthonormal(V)
    assert (V.T @ C @ V).trace() == pytest.approx(float(torch.linalg.eigvalsh(C)[:3].sum()), rel=1e-9)
    C, N = covariance(9, 4), linalg.leading_directions(covariance(9, 4), 1.0)
    V = linalg.weakest_directions(C + 0.01 * torch.eye(9), 3, near)
    rows = linalg.project_out(near, N)
    assert is_orthonormal(V) and (V.T @ C @ V).trace().abs() < 1e-9
    torch.testing.assert_close(linalg.project_out(rows, V), torch.zeros_like(rows), rtol=0, atol=1e-9)


def test_the_bound_is_above_both_and_no_larger_than_it_must_be():
    one, other = covariance(9, 5, seed=1), 2 * covariance(9, 7, seed=2)
    bound = linalg.upper_bound(one, other)
    for below in (one, other):
        assert torch.linalg.eigvalsh(bound - below).min() > -1e-12
    assert ((bound - one) @ (bound - other)).norm() < 1e-12  # what it has over one it has not over the other: least
    torch.testing.assert_close(bound, linalg.upper_bound(other, one))
    assert bound.trace() < (one + other).trace() - 0.5
    torch.testing.assert_close(linalg.upper_bound(one + other, other), one + other)


def test_contrast_maximises_the_ratio_of_new_to_old():
    X, Y = (torch.randn(60, 14, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    Y = Y * torch.linspace(3, 0.2, 14, dtype=torch.float64)
    new, old = X.T @ X, 2 * Y.T @ Y / Y.square().sum()  # a bound on old tasks, at trace 2
    V = linalg.leading_directions(old, None, max_rank=4)
    U = linalg.contrast_directions(new, old, V, 3)
    assert is_orthonormal(torch.cat([V, U], dim=1))

    def ratio(u):
        ridge = 0.1 / 14 * u @ u
        return (u @ new @ u / new.trace()) / (u @ old @ u + ridge)

    best = ratio(U[:, 0])
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):  # no other direction of the complement does better, near or far
        far = linalg.project_out(torch.randn(14, generator=generator, dtype=torch.float64), V)
        near = U[:, 0] + 0.05 * far / far.norm()
        assert ratio(far) <= best + 1e-9 and ratio(near) <= best + 1e-9
    assert linalg.contrast_directions(new, old, V, 99).shape == (14, 10)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_reduced_rank_regression_reaches_the_least_error_that_its_rank_allows(rank, ridge):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    z = torch.randn(40, 5, generator=generator, dtype=torch.float64) + x[:, :5].abs()
    A, C = linalg.reduced_rank_regression(x.T @ x, x.T @ z, rank, ridge)
    assert A.shape == (rank, 7) and C.shape == (5, rank)
    # the same problem without damping, on rows that stand for the damping; its bound by Eckart and Young
    damping = (ridge * x.square().sum() / 7).sqrt()
    x, z = torch.cat([x, damping * torch.eye(7)]), torch.cat([z, torch.zeros(7, 5)])
    best = x @ torch.linalg.pinv(x) @ z
    bound = (z - best).square().sum() + torch.linalg.svdvals(best)[rank:].square().sum()
    assert (z - x @ A.T @ C.T).square().sum().item() == pytest.approx(bound.item(), rel=1e-12)
    torch.testing.assert_close(C.T @ C, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("near", [torch.zeros(2, 6), torch.eye(6)[:1].repeat(2, 1)])
def test_the_weakest_directions_are_weak_whatever_they_are_to_be_near(near):
    covariance = torch.diag(torch.tensor([0.0, 0, 0, 0, 5, 9], dtype=torch.float64))
    found = linalg.weakest_directions(covariance, 2, near.double())
    torch.testing.assert_close(found.T @ found, torch.eye(2, dtype=torch.float64))
    assert (covariance @ found).abs().max() < 1e-8


def test_directions_of_no_input_are_directions_all_the_same():
    old, V = torch.eye(6, dtype=torch.float64) / 6, torch.eye(6, dtype=torch.float64)[:, :2]
    found = linalg.contrast_directions(torch.zeros(6, 6, dtype=torch.float64), old, V, 3)
    torch.testing.assert_close(found.T @ found, torch.eye(3, dtype=torch.float64))
    assert (V.T @ found).abs().max() < 1e-10


def test_what_is_held_reaches_the_energy_alone():
    C = torch.diag(torch.tensor([9.0, 1, 0.1, 0.1], dtype=torch.float64))
    held = torch.eye(4, dtype=torch.float64)[:, :1]
    assert linalg.leading_directions(C, 0.8, held=held).shape[1] == 0
