"""What a sequence of tasks has left of each of them: the usual numbers of continual learning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from peft_mora.checks import as_float


def continual_metrics(scores: Sequence[Sequence[float]], zero_shot: Sequence[float] | None = None) -> dict[str, float]:
    """Average accuracy, backward transfer, forgetting and forward transfer of N tasks learnt in order.

    With R[i][j] the score on task j after learning task i (Lopez-Paz and Ranzato 2017; Chaudhry et al. 2018):
        AA = mean_j R[N][j]                        BWT = mean_{j<N} (R[N][j] - R[j][j])
        forgetting = mean_{j<N} (max_{i<N} R[i][j] - R[N][j])
        FWT = mean_{j>0} (R[j-1][j] - zero_shot[j])

    Args:
        scores: N rows of N numbers, higher is better.
        zero_shot: N scores of the base model; without them there is no FWT.

    Returns:
        "AA", and with two tasks or more "BWT", "forgetting" and, with `zero_shot`, "FWT".

    Raises:
        ValueError: the scores are not square, `zero_shot` is of another length, or one that counts is not finite.

    Example:
        >>> continual_metrics([[0.75, 0.25], [0.5, 1.0]], zero_shot=[0.0, 0.125])
        {'AA': 0.75, 'BWT': -0.25, 'forgetting': 0.25, 'FWT': 0.125}
    """
    rows = [list(row) if isinstance(row, Iterable) else [] for row in (scores if isinstance(scores, Iterable) else [])]
    n = len(rows)
    if n == 0 or any(len(row) != n for row in rows) or (zero_shot is not None and len(zero_shot) != n):
        raise ValueError(
            f"Scores must be N rows of N numbers, one row after each task, got rows of {[len(row) for row in rows]}"
            + (f" and {len(zero_shot)} zero-shot scores." if zero_shot is not None else ".")
        )

    def R(i: int, j: int) -> float:
        return _finite(rows[i][j])

    found = {"AA": mean(R(n - 1, j) for j in range(n))}
    if n > 1:
        earlier = range(n - 1)
        found["BWT"] = mean(R(n - 1, j) - R(j, j) for j in earlier)
        found["forgetting"] = mean(max(R(i, j) for i in earlier) - R(n - 1, j) for j in earlier)
        if zero_shot is not None:
            found["FWT"] = mean(R(j - 1, j) - _finite(zero_shot[j]) for j in range(1, n))
    return found


def _finite(score: Any) -> float:
    """A score that counts.

    Raises:
        ValueError: it is no finite number.
    """
    found = as_float(score)
    if not math.isfinite(found):
        raise ValueError(
            f"Scores are finite numbers, got {score!r}: score each task after all that it is compared with."
        )
    return found
