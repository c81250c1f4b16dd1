"""The linear head: reward = w·h, without a bias, because a bias cancels in every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from embrm.core.lazy import LazyModule
from embrm.training.heads.products import product

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from embrm.training.heads.adapter import Shift
    from embrm.training.heads.bank import Parameters
    from embrm.training.heads.spec import HeadSpec
    from embrm.training.pairs import PairRewards
else:
    torch = LazyModule("torch")

WEIGHT = "output.weight"
"""Name of the parameter w, [P, d]."""

EXPORTED = True

_PAIRS = 64
"""Number of pairs whose states are subtracted at a time, so that they stay in the CPU's cache."""


def check(spec: HeadSpec) -> None:
    """Raise ValueError for fields of an MLP."""
    if spec.widths or spec.dropout:
        raise ValueError('widths and dropout need kind = "mlp"')


def describe(spec: HeadSpec) -> str:  # noqa: ARG001
    """Describe the head in words."""
    return "linear"


def owns(parameters: Parameters) -> bool:
    """Whether these are a linear head's parameters."""
    return set(parameters) == {WEIGHT}


def initialise(spec: HeadSpec, width: int, random: np.random.Generator) -> Parameters:  # noqa: ARG001
    """Draw w ~ N(0, 1/(d + 1)), float32 [1, d], as the code of arXiv 2505.07271 does."""
    return {WEIGHT: reward_layer(width, random)}


def reward_layer(width: int, random: np.random.Generator) -> Tensor:
    """Draw the weights of a layer from `width` inputs to the reward, float32 [1, width]."""
    values = (random.standard_normal((1, width)) / np.sqrt(width + 1)).astype(np.float32)
    return torch.from_numpy(values)


def rewards(
    parameters: Parameters,
    X: Tensor,
    kept: Sequence[Tensor],  # noqa: ARG001
    shift: Shift | None,
) -> Tensor:
    """Compute rewards [P, n] of states X [n, d]: w·h, plus w·up·inner if an adapter shifts h."""
    weight = parameters[WEIGHT]
    direct = product(X, weight).T.contiguous()
    if shift is None:
        return direct
    moved = [own @ (weight[slot] @ shift.up[slot]) for slot, own in enumerate(shift.inner)]
    return direct + torch.stack(moved)


def pair_rewards(
    parameters: Parameters,
    X: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    totals: Tensor,
    means: Tensor,
) -> PairRewards:
    """Compute `heads.pair_rewards` of linear heads without adapters by fewer products.

    r_c - r_r = w·(h_c - h_r) is one product per pair. r_c + r_r = w·(h_c + h_r) is
    computed only for the slots in `totals`. The mean reward, which batch-wise sum-to-zero needs for
    the slots in `means`, is w times the mean of the minibatch's 2B states.
    """
    from embrm.training.pairs import PairRewards

    weight, pairs = parameters[WEIGHT], len(chosen)
    apart = X.new_empty(pairs, X.shape[1])
    sums = X.new_empty(pairs if len(totals) else 0, X.shape[1])
    for first in range(0, pairs, _PAIRS):
        some = slice(first, first + _PAIRS)
        won, lost = X.index_select(0, chosen[some]), X.index_select(0, rejected[some])
        torch.sub(won, lost, out=apart[some])
        if len(totals):
            torch.add(won, lost, out=sums[some])
    difference = product(apart, weight).T.contiguous()
    total = weight.new_empty(0, pairs)
    if len(totals):
        total = product(sums, weight[totals]).T.contiguous()
    mean_reward = weight.new_empty(0)
    if len(means):
        uses = torch.cat([chosen, rejected]).bincount(minlength=len(X)).to(X.dtype)
        mean_reward = (weight[means] * (uses @ X / pairs)).sum(1) / 2
    return PairRewards(difference, total, mean_reward)


def fold(parameters: Parameters) -> Tensor:
    """Return the weights w, float64 [P, d]."""
    return parameters[WEIGHT].double()
