"""Functions of log-probabilities that are estimated from sampled token rows.

S̃ - S of a response is a sum over its N positions, and a minibatch reads K of them. The estimate
(N/K)·Σ_t x_t, with x_t = ℓ̃_t - ℓ_t, has the right mean, but a function f of it that is not linear
has not: where f is convex, as -logsigmoid is, E f(estimate) exceeds f(S̃) by about half of f'' times
the estimate's variance. That variance grows with the square of an adapter's shift, so the excess
acts as a ridge penalty that pulls the adapter back. Here no row is multiplied by a derivative of f
that the row itself has influenced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from embrm.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from embrm.training.token_rows import TokenBatch
else:
    torch = LazyModule("torch")

PairValues = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]
"""(S, change, chosen, rejected) → the value of each pair, [B]. S and change: [m]; chosen and
rejected: int64 [B], numbers of the m responses. Called with copies of responses and pairs, it gives
the values of the copied pairs, [copies·B]."""

PairEnds = tuple["Tensor", "Tensor"]
"""The chosen and the rejected response of each pair: int64 [B] each, numbers of responses."""


def plug_in(values: PairValues, tokens: TokenBatch, each: Tensor, pairs: PairEnds) -> Tensor:
    """The mean of f(estimate) over the pairs, a scalar: exact where every position is read.

    each: x_t of the token rows, [n].
    """
    change = summed(tokens, each)
    return values(tokens.S + change, change, *pairs).mean()


def summed(tokens: TokenBatch, each: Tensor) -> Tensor:
    """Estimate of a sum over all positions of each response, [m]: (N/K)·Σ_t x_t."""
    return each.new_zeros(len(tokens.S)).index_add(0, tokens.response, tokens.share * each)


def cross_fitted(values: PairValues, tokens: TokenBatch, each: Tensor, pairs: PairEnds) -> Tensor:
    """The mean of f over the pairs, a scalar whose gradient has no ridge from sampling.

    The gradient is Σ_t (N/K)·c_t·∇x_t over the rows t of all responses, where

        c_t = (K/N)·f'(all K rows) + (1 - K/N)·f'(the K - 1 other rows of the response).

    For K of N positions drawn without replacement, the other rows correlate with t by -1/N of its
    variance, and all rows by 1/K - 1/N; the two weights make these covariances cancel exactly. So
    E Σ_t c_t·∇x_t differs from f'(S̃)·∇S̃ only in that f' is averaged over estimates of S̃ from K - 1
    rows; that bias is ½f'''·variance to first order, which is 0 for -logsigmoid at 0. With K = N
    the gradient is exact. It needs K ≥ 2 where N > 1.

    The value is f(all rows) less its jackknife estimate of bias, which corrects it to first order.

    each: x_t of the token rows, [n].
    """
    if bool((tokens.share == 1).all()):
        return plug_in(values, tokens, each, pairs)
    m, own, response = len(tokens.S), each.detach(), tokens.response
    taken = torch.bincount(response, minlength=m)
    place = torch.arange(len(own), device=own.device) - (taken.cumsum(0) - taken)[response]
    K = taken[response]
    unseen = 1 - 1 / tokens.share  # 1 - K/N

    change = summed(tokens, own).requires_grad_()
    of_all = values(tokens.S + change, change, *pairs)
    (slope,) = torch.autograd.grad(of_all.mean(), change)

    # Row j of `others` has every response's change without its j-th row; where a response has no
    # such row, it has all of them, and what is computed from it is not used.
    copies = int(taken.max())
    others = change.detach().expand(copies, m).clone()
    rest = own.new_zeros(m).index_add(0, response, own)[response] - own
    others[place, response] = tokens.share * K / (K - 1).clamp_min(1) * rest
    others.requires_grad_()
    changes = torch.cat([others.flatten(), change.detach()])
    S = tokens.S.repeat(copies + 1) + changes
    copied = torch.arange(copies, device=own.device)[:, None] * m
    whole = torch.full_like(copied, copies * m)
    chosen, rejected = pairs
    without = [
        values(S, changes, (at_c + chosen).flatten(), (at_r + rejected).flatten())
        for at_c, at_r in ((copied, whole), (whole, copied))
    ]
    of_others = [value.view(copies, -1) for value in without]
    (slopes,) = torch.autograd.grad((of_others[0] + of_others[1]).mean(1).sum(), others)

    c = (1 - unseen) * slope[response] + unseen * slopes[place, response]
    gradient_carrier = (tokens.share * c * each).sum()
    share_unseen = own.new_zeros(m)
    share_unseen[response] = unseen
    value = of_all.detach()
    for of_side, side in zip(of_others, pairs, strict=True):
        rows = taken[side]
        read = torch.arange(copies, device=own.device)[:, None] < rows
        excess = ((of_side.detach() - of_all.detach()) * read).sum(0) / rows.clamp_min(1)
        value = value - share_unseen[side] * (rows - 1) * excess
    return value.mean() + gradient_carrier - gradient_carrier.detach()
