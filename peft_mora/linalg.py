"""Directions, projections, sketches and regression: tensors in, tensors out. Knows nothing of anything else here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """Of a symmetric matrix (I, I) that is nowhere negative: eigenvalues (I,), falling, and (I, I) their columns."""

    values: Tensor
    vectors: Tensor


def spectrum(matrix: Tensor) -> Spectrum:
    """Of a covariance, in float32 or float64.

    Raises:
        ValueError: it, or its Frobenius norm, is not finite.
    """
    if not torch.linalg.matrix_norm(matrix).isfinite():
        raise ValueError("The covariance has NaN or inf, or a norm beyond its dtype: it has no leading directions.")
    values, vectors = torch.linalg.eigh(matrix)
    return Spectrum(values.flip(0).clamp_min(0), vectors.flip(1))


def project_out(rows: Tensor, V: Tensor) -> Tensor:
    """The part of each row that is orthogonal to span V: `rows - (rows V) Vᵀ`.

    Args:
        rows: (..., I), any float dtype.
        V: (I, k) orthonormal columns, in the same dtype.

    Returns:
        (..., I) in the same dtype.
    """
    return rows - (rows @ V) @ V.T


def leading_directions(
    covariance: Tensor,
    energy: float | None = None,
    max_rank: int | None = None,
    held: Tensor | None = None,
    known: Spectrum | None = None,
) -> Tensor:
    """The fewest new directions that, with those held already, keep an energy share of the inputs (GPM, eq. 5 and 9).

    With `C = Σ x xᵀ`, held basis V and the eigenvalues λ of `(I - V Vᵀ) C (I - V Vᵀ)` in falling order, the smallest k
    with `tr(Vᵀ C V) + Σ_{i<=k} λ_i >= energy · tr(C)`.

    Args:
        covariance: (I, I) symmetric, float32 or float64: the sum of x xᵀ, not centred.
        energy: share to keep, in (0, 1]. None keeps all that is there, up to `max_rank`.
        max_rank: most directions that held and new ones may be together; None for no limit.
        held: (I, k0) orthonormal columns, or None.
        known: the covariance's spectrum, if it is known: where nothing is held it is not computed again.

    Returns:
        (I, k) orthonormal columns, orthogonal to `held`, strongest first, in the covariance's dtype. k may be 0.

    Raises:
        ValueError: the covariance, or its Frobenius norm, is not finite.
    """
    size = covariance.shape[0]
    held = covariance.new_zeros(size, 0) if held is None else held.to(covariance)
    total = covariance.diagonal().sum()
    inside = ((held.T @ covariance) * held.T).sum()
    norm = torch.linalg.matrix_norm(covariance)
    if held.shape[1] or known is None:
        rest = project_out(project_out(covariance, held).T, held)
        known = spectrum((rest + rest.T) / 2)
    values, vectors = known
    # Below the rounding of the largest eigenvalue there is noise and the null space of what is held.
    noise = 10 * torch.finfo(covariance.dtype).eps * norm
    most = min(int((values > noise).sum()), size - held.shape[1])
    if energy is not None:
        missing = energy * total - inside - noise
        most = min(most, int((values.cumsum(0) < missing).sum()) + 1 if missing > 0 else 0)
    if max_rank is not None:
        most = min(most, max(0, max_rank - held.shape[1]))
    return torch.linalg.qr(project_out(vectors[:, :most].T, held).T)[0]


def orthonormal(vectors: Tensor, held: Tensor | None = None) -> Tensor:
    """An orthonormal basis of what `vectors` (I, n) span beyond `held` (I, k0): (I, k), k <= n, same dtype.

    Directions below 1e-4 of the longest vector are dropped: they are what rounding has left of `held`.
    """
    if vectors.shape[1] == 0:
        return vectors
    smallest = 1e-4 * vectors.norm(dim=0).max()
    if held is not None:
        vectors = project_out(project_out(vectors.T, held), held).T  # twice: once leaves a rounding's worth behind
    U, S, _ = torch.linalg.svd(vectors, full_matrices=False)
    return U[:, S.gt(smallest)]


def update_norms(A: Tensor, B: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """‖ΔW V‖² and ‖ΔW‖² (Frobenius) of ΔW = B·A, without forming ΔW: `‖B M‖² = tr(Mᵀ (Bᵀ B) M)`.

    Args:
        A: (r, I). B: (O, r). V: (I, k). One float dtype.

    Returns:
        Two scalars; the square root of their ratio is the leakage, 0..1.
    """
    gram = B.T @ B  # (r, r)
    protected = A @ V
    return ((gram @ protected) * protected).sum().clamp_min(0), ((gram @ A) * A).sum().clamp_min(0)


def shrink_sketch(rows: Tensor, size: int) -> Tensor:
    """Frequent Directions (Liberty 2013; CoSO, arXiv 2505.11816): n rows to `size` rows that keep rowsᵀrows nearly.

    With singular values σ, every σ_i becomes √(σ_i² - σ_{size+1}²). `0 ⪯ rowsᵀrows - resultᵀresult ⪯ σ_{size+1}² I`.

    Args:
        rows: (n, I) float.
        size: rows to keep, >= 1.

    Returns:
        (min(n, size), I) in the same dtype.
    """
    if len(rows) <= size:
        return rows
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    cut = S[size] if size < len(S) else S.new_zeros(())
    return (S[:size].square() - cut.square()).clamp_min(0).sqrt()[:, None] * Vh[:size]


def upper_bound(one: Tensor, other: Tensor) -> Tensor:
    """The symmetric matrix of least trace that is nowhere below either of two: (A + B + |A - B|) / 2.

    vᵀ·bound·v is at least vᵀ A v and vᵀ B v for every v, and equals A where A is above B everywhere.

    Args:
        one, other: (I, I) symmetric, in one float32 or float64 dtype.

    Returns:
        (I, I) symmetric, in that dtype.
    """
    values, vectors = torch.linalg.eigh(other - one)
    more = vectors * values.clamp_min(0).sqrt()
    return one + more @ more.T


def contrast_directions(new: Tensor, old: Tensor, V: Tensor, count: int, ridge: float = 0.1) -> Tensor:
    """Directions outside of V in which new inputs are strong and old ones weak.

    Maximises `vᵀ C_new v / vᵀ (C_old + ridge/I) v`, one generalised eigenvector after the other, with tr C_new = 1.
    What is learnt along them reaches the new inputs, and old inputs hardly have a part there to be changed. The ridge
    is a share of the mean energy of a direction; without it, directions that neither task uses would win.

    Args:
        new: (I, I) Σ x xᵀ of the new task's inputs, of any scale, float32 or float64.
        old: (I, I) a bound on every old task's Σ x xᵀ at trace 1, same dtype.
        V: (I, k) orthonormal, same dtype.
        count: directions wanted.

    Returns:
        (I, m) orthonormal, orthogonal to V, m = min(count, I - k); the first n columns span the n best.
    """
    size, held = V.shape
    eye = torch.eye(size, dtype=V.dtype, device=V.device)
    N = torch.linalg.qr(V, mode="complete")[0][:, held:] if held else eye  # (I, I - k) the complement
    old = N.T @ (old + ridge / size * eye) @ N
    L = torch.linalg.cholesky(old)
    new = new / new.trace() if new.trace() > 0 else new  # of no input any direction is as good
    half = torch.linalg.solve_triangular(L, N.T @ new @ N, upper=False)
    ratio = torch.linalg.solve_triangular(L, half.T, upper=False)
    vectors = torch.linalg.eigh((ratio + ratio.T) / 2)[1].flip(1)[:, :count]
    found = torch.linalg.qr(N @ torch.linalg.solve_triangular(L.T, vectors, upper=True))[0]
    return torch.linalg.qr(project_out(found.T, V).T)[0]


def weakest_directions(covariance: Tensor, count: int, near: Tensor) -> Tensor:
    """Directions in which inputs are weakest: eigenvectors of the smallest eigenvalues (OSRM, arXiv 2505.22934).

    Where more directions are equally weak than are wanted, those that span `near`'s part in them.

    Args:
        covariance: (I, I) symmetric, float64.
        count: directions wanted, r <= I.
        near: (r, I) rows, float64.

    Returns:
        (I, r) orthonormal columns, weakest first.
    """
    values, vectors = torch.linalg.eigh(covariance)
    bound, slack = values[count - 1], 1e-6 * values[count - 1].abs() + torch.finfo(values.dtype).eps * values[-1]
    first, last = int((values < bound - slack).sum()), int((values <= bound + slack).sum())
    if last == count:
        return vectors[:, :count]
    equal = vectors[:, first:last]
    rest = torch.linalg.qr(equal.T @ near.T, mode="complete")[0][:, : count - first]  # whatever near's part is
    return torch.cat([vectors[:, :first], equal @ rest], dim=1)


def reduced_rank_regression(xx: Tensor, xz: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """The linear map of rank <= k that predicts z from x best: least |Z - X·Aᵀ·Cᵀ|² + λ·|C·A|².

    It is the ridge regression's solution, projected onto the k leading directions of what that predicts.

    Args:
        xx: (I, I) XᵀX, float64.
        xz: (I, R) XᵀZ, float64.
        rank: k, 1 <= k <= R.
        ridge: λ as a share of the mean of XᵀX's diagonal, >= 0. At 0 XᵀX must be invertible.

    Returns:
        A (k, I) and C (R, k), whose columns are orthonormal; z is predicted as C·A·x.
    """
    damped = xx + ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    full = torch.cholesky_solve(xz, torch.linalg.cholesky(damped))
    C = torch.linalg.eigh(xz.T @ full).eigenvectors[:, -rank:]  # eigenvalues ascend
    return (full @ C).T, C


def ridge_regression(X: Tensor, Y: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """W with least Σ_i w_i |y_i - x_i W|² + λ|W|², and each row's leverage.

    With h_i the leverage, the fit without row i predicts `(x_i W - h_i y_i) / (1 - h_i)` for it. Solved over rows or
    over columns, whichever are fewer.

    Args:
        X: (N, D) float64. Y: (N, C) float64. weights: (N,) float64, > 0.
        ridge: λ as a share of the mean of the diagonal of Σ_i w_i x_i x_iᵀ, > 0.

    Returns:
        W (D, C) and the leverages (N,) in [0, 1).
    """
    rows = X * weights.sqrt()[:, None]
    targets = Y * weights.sqrt()[:, None]
    N, D = X.shape
    damping = ridge * rows.square().sum() / D
    gram = rows @ rows.T if N < D else rows.T @ rows
    solver = torch.linalg.cholesky(gram + damping * torch.eye(len(gram), dtype=X.dtype))
    if N < D:
        inverse = torch.cholesky_inverse(solver)
        return rows.T @ (inverse @ targets), 1 - damping * inverse.diagonal()  # gram · inverse = 1 - damping · inverse
    half = torch.linalg.solve_triangular(solver, rows.T, upper=False)  # (D, N)
    return torch.cholesky_solve(rows.T @ targets, solver), half.square().sum(dim=0)
