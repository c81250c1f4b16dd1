"""Geometry of hidden states: norms, effective rank, and how far an adapter or fine-tune moves them.

Measured on a sample of a split's responses that is the same for every run: see `sample`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embrm.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

SAMPLE = 256
"""Largest number of responses measured on a split, hence the largest possible effective rank."""

MEASURES = (
    *("norm", "norm_sd", "norm_cv", "effective_rank", "drift", "drift_tokens"),
    *("kl_tokens", "kl_reward", "corr_length", "corr_S"),
)
"""Measures of a run on a split. docs/methods.md (Geometry) has all formulas, and the runs for which
a measure is undefined."""

GOLDEN = (5**0.5 - 1) / 2
"""Inverse golden ratio. Its multiples modulo 1 are a low-discrepancy sequence, which does not
resonate with a period in the data."""


def spread(count: int) -> Floats:
    """A deterministic low-discrepancy sequence of `count` numbers in [0, 1): the multiples of
    `GOLDEN` modulo 1 (an additive recurrence)."""
    return np.modf(np.arange(count, dtype=np.float64) * GOLDEN)[0]


def sample(rows: Indices) -> Indices:
    """At most `SAMPLE` of `rows`, ascending: one from each of as many equally long stretches.

    The position within a stretch varies by `spread`, because a fixed one might always meet the
    rejected response where chosen and rejected ones alternate.
    """
    taken = min(len(rows), SAMPLE)
    ends = np.arange(taken + 1) * len(rows) // max(1, taken)
    return rows[ends[:-1] + (spread(taken) * np.diff(ends)).astype(np.int64)]


def norms_and_rank(states: Tensor) -> dict[str, float]:
    """Mean, population standard deviation and coefficient of variation (sd/mean) of the Euclidean
    norms of states float [n, d], and their `effective_rank`; NaN without states."""
    wide = states.double()
    norms = wide.norm(dim=1)
    mean, sd = float(norms.mean()), float(norms.std(correction=0))
    return {
        "norm": mean,
        "norm_sd": sd,
        "norm_cv": sd / mean if mean else float("nan"),
        "effective_rank": effective_rank(wide),
    }


def effective_rank(states: Tensor) -> float:
    """Effective rank exp(-Σ p_i·ln p_i) of states float64 [n, d], p being their singular values
    divided by the sum of these (Roy and Vetterli 2007); NaN where all are 0.

    The states are not centred, so their mean counts as a direction. The singular values are
    computed as square roots of the eigenvalues of the smaller Gram matrix.
    """
    gram = states @ states.T if len(states) <= states.shape[1] else states.T @ states
    if not gram.any():
        return float("nan")
    squares = torch.linalg.eigvalsh(gram)
    # Eigenvalues below the rounding error of the largest are taken as 0: their roots would count.
    least = squares[-1] * len(squares) * torch.finfo(squares.dtype).eps
    values = squares[squares > least].sqrt()
    p = values / values.sum()
    return float((-(p * p.log()).sum()).exp())


def drift(before: Tensor, after: Tensor) -> float:
    """Mean over states [n, d] of ‖after - before‖/‖before‖."""
    moved = (after - before).double().norm(dim=1)
    return float((moved / before.double().norm(dim=1)).mean())


def correlation(x: Floats, y: Floats) -> float:
    """Pearson's r = Σ(x-x̄)(y-ȳ)/√(Σ(x-x̄)²·Σ(y-ȳ)²) over the entries where both are finite; NaN
    where one is constant."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 2:
        return float("nan")
    x, y = (values[both] - values[both].mean() for values in (x, y))
    size = float(np.sqrt((x * x).sum()) * np.sqrt((y * y).sum()))
    return float((x * y).sum()) / size if size else float("nan")
