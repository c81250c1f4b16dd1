"""Rank agreement inside groups: all responses of one prompt, each with a gold score."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def kendall_tau(rewards: Floats, gold: Floats) -> float:
    """Kendall's τ-b of two rankings, float64 [responses] each.

    τ-b = Σ s(i,j)·t(i,j) / √(Σ s² · Σ t²) over all pairs i, j with s, t the signs of the
    differences: the cosine between the two sign matrices (Kendall 1945). NaN where it is
    undefined: fewer than two responses, or one side constant.
    """
    signs = np.sign(np.subtract.outer(rewards, rewards))
    gold_signs = np.sign(np.subtract.outer(gold, gold))
    norms = np.vdot(signs, signs) * np.vdot(gold_signs, gold_signs)
    return float(np.vdot(signs, gold_signs) / np.sqrt(norms)) if norms else float("nan")


def kendall_taus(rewards: Floats, gold: Floats, groups: NDArray[np.int64], count: int) -> Floats:
    """τ-b of every group: float64 [count], NaN for a group that is empty or undefined.

    `groups` int64 [responses] numbers the group of each response, 0 ≤ group < count.
    """
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups, minlength=count))
    taus = np.full(count, np.nan)
    for group in np.unique(groups):
        members = order[ends[group - 1] if group else 0 : ends[group]]
        taus[group] = kendall_tau(rewards[members], gold[members])
    return taus
