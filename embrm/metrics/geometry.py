"""Geometry of states: how long they are, how many directions they fill, how far they were moved.

Measured on a sample of a split's responses, the same for every run: see `sample`.
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
"""Responses of a split that are measured. The effective rank cannot exceed it."""

MEASURES = (
    *("norm", "norm_sd", "norm_cv", "effective_rank", "drift", "drift_tokens"),
    *("kl_tokens", "kl_reward", "corr_length", "corr_S"),
)
"""Of a run on a split; formulas and what has none: `docs/methods.md`."""

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it modulo 1 are spread evenly, and keep in step with no other period."""


def spread(count: int) -> Floats:
    """So many numbers in [0, 1), evenly spread in every stretch of them; no random ones."""
    return np.modf(np.arange(count, dtype=np.float64) * GOLDEN)[0]


def sample(rows: Indices) -> Indices:
    """At most `SAMPLE` of `rows`, ascending, one of each of as many equal stretches.

    Which one of a stretch is spread over its places: every second response may be a rejected one.
    """
    taken = min(len(rows), SAMPLE)
    ends = np.arange(taken + 1) * len(rows) // max(1, taken)
    return rows[ends[:-1] + (spread(taken) * np.diff(ends)).astype(np.int64)]


def shape(states: Tensor) -> dict[str, float]:
    """Mean, population sd and CV (sd / mean) of the norms of states [n, d], and `effective_rank`;
    all NaN where there are none."""
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
    """exp(-Σ p ln p), p the singular values of states float64 [n, d] divided by their sum; NaN
    where all are 0 (Roy and Vetterli 2007). The states are not centred: a mean counts as one
    direction.

    The singular values are the roots of the eigenvalues of the smaller Gram matrix.
    """
    gram = states @ states.T if len(states) <= states.shape[1] else states.T @ states
    if not gram.any():
        return float("nan")
    squares = torch.linalg.eigvalsh(gram)
    # What is below the rounding of the largest is none: its root would count.
    least = squares[-1] * len(squares) * torch.finfo(squares.dtype).eps
    values = squares[squares > least].sqrt()
    p = values / values.sum()
    return float((-(p * p.log()).sum()).exp())


def drift(before: Tensor, after: Tensor) -> float:
    """Mean ‖after - before‖ / ‖before‖ of states [n, d]."""
    moved = (after - before).double().norm(dim=1)
    return float((moved / before.double().norm(dim=1)).mean())


def correlation(x: Floats, y: Floats) -> float:
    """Pearson's, over the entries where both are finite; NaN where either does not vary."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 2:
        return float("nan")
    x, y = (values[both] - values[both].mean() for values in (x, y))
    size = float(np.sqrt((x * x).sum()) * np.sqrt((y * y).sum()))
    return float((x * y).sum()) / size if size else float("nan")
