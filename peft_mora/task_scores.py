"""Which task a feature belongs to, and whether it belongs to any: in closed form, float64, from each task's own rows.

    W = (Σ_t S_t + λI)⁻¹ [m_1 .. m_T]        S_t = mean of φφᵀ over t's rows, m_t = mean of φ (with a bias in φ)
    s = φᵀ W                                  the task with the largest is the one
    r_t = |φ|² - φᵀ nS_t (nS_t + μI)⁻¹ φ      what of φ the n rows of task t do not hold
    familiarity = (s_t - mean) / sd  -  (log r_t - mean) / sd      over t's own rows, each left out of the fit
Sums of the tasks in the order of their names: the same rows give the same numbers bit for bit, whoever came first.

Sources: ridge regression by sums a class, Any-SSR (arXiv 2503.13575); the residual is the predictive variance of
Gaussian-process regression, a Mahalanobis distance under S_t that shrinks to the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import ridge_regression


NONE = "none"  # the class of general text, and the answer where no task is near
PRIOR = 8  # rows that the spread over all tasks counts as, beside a task's own


class Span(NamedTuple):
    """One task's rows (n, D) and the Cholesky factor (n, n) of their Gram matrix with μ on its diagonal."""

    rows: Tensor
    factor: Tensor

    def residual(self, X: Tensor) -> Tensor:
        """(N,) r of rows X (N, D)."""
        half = torch.linalg.solve_triangular(self.factor, self.rows @ X.T, upper=False)
        return (X.square().sum(dim=1) - half.square().sum(dim=0)).clamp_min(1e-12)


class Scores:
    """The fit.

    Args:
        rows: task -> (n, D) features, any float dtype; NONE is general text, if it is there.
        ridge: λ, as a share of the mean of the diagonal of Σ_t S_t; μ is the same share of a row's mean square.

    Attributes:
        names: the classes: tasks in the order of their names, then NONE if it is there.
    """

    def __init__(self, rows: Mapping[str, Tensor], ridge: float) -> None:
        tasks = sorted(name for name in rows if name != NONE)
        self.names = [*tasks, *([NONE] if NONE in rows else [])]
        parts = [_with_bias(rows[name]) for name in self.names]
        X = torch.cat(parts)
        label = torch.tensor([c for c, part in enumerate(parts) for _ in range(len(part))])
        Y = torch.nn.functional.one_hot(label, len(parts)).double()
        weights = torch.cat([torch.full((len(part),), 1 / len(part), dtype=torch.float64) for part in parts])
        self.W, leverage = ridge_regression(X, Y, weights, ridge)
        left_out = (X @ self.W - leverage[:, None] * Y) / (1 - leverage[:, None]).clamp_min(1e-12)  # (N, C)
        self.sharpness = _sharpness(left_out, label)
        self.spans: list[Span] = []
        own: list[Tensor] = []  # (n, 2) of each task: s and log r of its rows, each left out
        for c, part in enumerate(parts[: len(tasks)]):
            gram = part @ part.T
            mu = ridge * gram.diagonal().mean()
            span = Span(part, torch.linalg.cholesky(gram + mu * torch.eye(len(part), dtype=torch.float64)))
            self.spans.append(span)
            inside = span.residual(part)
            outside = (inside / (1 - inside / mu).clamp_min(1e-12)).log()
            own.append(torch.stack([left_out[label == c, c], outside], dim=1))
        self.mean = torch.stack([x.mean(dim=0) for x in own])  # (T, 2)
        centred = [x - mean for x, mean in zip(own, self.mean, strict=True)]
        all_over = torch.cat(centred).square().mean(dim=0)
        spread = [(x.square().sum(dim=0) + PRIOR * all_over) / (len(x) + PRIOR) for x in centred]
        self.sd = torch.stack(spread).sqrt().clamp_min(1e-6)
        known = [self._familiarity(x, torch.full((len(x),), c)) for c, x in enumerate(own)]
        self.known = torch.cat(known).sort().values

    def probabilities(self, features: Tensor) -> Tensor:
        """(N, C) float64, rows of which sum to 1: how likely each class is, if it is one of them."""
        return ((_with_bias(features) @ self.W) * self.sharpness).softmax(dim=1)

    def tasks_of(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest task of each row, (N,) int64, and how usual the row is for it, (N,) float64 in (0, 1]: the
        share of all tasks' own rows that are as unfamiliar, each left out of the fit. What is likelier general text,
        NONE, has 0."""
        X = _with_bias(features)
        s = X @ self.W
        best = s[:, : len(self.spans)].argmax(dim=1)
        r = torch.stack([span.residual(X) for span in self.spans], dim=1).log()
        pairs = torch.stack([s.gather(1, best[:, None])[:, 0], r.gather(1, best[:, None])[:, 0]], dim=1)
        familiarity = self._familiarity(pairs, best)
        rank = torch.searchsorted(self.known, familiarity, right=True)
        # Beyond the least usual row that is known the share falls as a normal distribution's, or few rows would never
        # get below 1 / (1 + rows).
        width = self.known.square().mean().sqrt().clamp_min(1e-6)
        beyond = torch.special.log_ndtr(familiarity / width) - torch.special.log_ndtr(self.known[0] / width)
        far = beyond.clamp_max(0).exp().clamp_min(1e-300)  # 0 is what general text has
        usual = (1 + rank).double().where(rank > 0, far) / (1 + len(self.known))
        return best, usual.where(s.argmax(dim=1) < len(self.spans), torch.zeros_like(usual))

    def _familiarity(self, pairs: Tensor, task: Tensor) -> Tensor:
        z = (pairs - self.mean[task]) / self.sd[task]
        return z[:, 0] - z[:, 1]


def _with_bias(features: Tensor) -> Tensor:
    X = features.double()
    return torch.cat([X, X.new_ones(len(X), 1)], dim=1)


def _sharpness(left_out: Tensor, label: Tensor) -> float:
    """What the scores are multiplied by before the softmax: what makes the labels of rows that were left out
    likeliest, were one more of them wrong than is. Else a fit without a mistake would be certain of everything."""
    candidates = torch.logspace(0, 2, 81, dtype=torch.float64)
    logs = (left_out[None] * candidates[:, None, None]).log_softmax(dim=2)  # (81, N, C)
    right = logs.gather(2, label[None, :, None].expand(len(candidates), -1, 1)).mean(dim=(1, 2))
    mistaken = logs.mean(dim=(1, 2))
    return float(candidates[(right + mistaken / len(label)).argmax()])
