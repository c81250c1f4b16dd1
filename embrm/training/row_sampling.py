"""Functions of log-probabilities that are estimated from sampled token rows.

S̃ - S of a response is a sum of x_t = ℓ̃_t - ℓ_t over its N positions, and a minibatch reads K of
them. The estimate (N/K)·Σ_t x_t has the right mean, but a function f of it that is not linear has
not: where f is convex, as -logsigmoid is, E f(estimate) exceeds f(S̃) by about half of f'' times the
estimate's variance. That variance grows with the square of an adapter's shift, so the excess acts
as a ridge penalty that pulls the adapter back. `empirical_bayes` estimates the mean of f over the
pairs without that excess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embrm.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from embrm.training.token_rows import TokenBatch
else:
    torch = LazyModule("torch")

PairValues = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]
"""(S, change, chosen, rejected) → the value f of each pair, [B]. S and change: log-probabilities of
responses and what the adapter changed about them, [m]; chosen and rejected: int64 [B], numbers of
responses. Called with copies of the pairs one after another, it gives the values of all of them."""

PairEnds = tuple["Tensor", "Tensor"]
"""The chosen and the rejected response of each pair: int64 [B] each, numbers of responses."""

_NODES = (
    (-2.8569700138728056, 0.011257411327720693),
    (-1.3556261799742659, 0.22207592200561266),
    (0.0, 0.5333333333333333),
    (1.3556261799742659, 0.22207592200561266),
    (2.8569700138728056, 0.011257411327720693),
)
"""Points and weights of five-point Gauss-Hermite quadrature over the standard normal."""


def plug_in(values: PairValues, tokens: TokenBatch, each: Tensor, pairs: PairEnds) -> Tensor:
    """The mean of f(estimate) over the pairs, a scalar: exact where every position is read.

    each: x_t of the token rows, [n].
    """
    change = summed(tokens, each)
    return values(tokens.S + change, change, *pairs).mean()


def summed(tokens: TokenBatch, each: Tensor) -> Tensor:
    """Estimate of a sum over all positions of each response, [m]: (N/K)·Σ_t x_t."""
    return each.new_zeros(len(tokens.S)).index_add(0, tokens.response, tokens.share * each)


def empirical_bayes(
    values: PairValues, tokens: TokenBatch, each: Tensor, pairs: PairEnds
) -> Tensor:
    """The mean over the pairs of E(f | token rows), a scalar; differentiable in `each`.

    x̄, the mean of x_t over a response's N positions, is taken to be normal over the responses of
    the minibatch, with one mean μ for chosen and one for rejected responses and the same variance
    τ², and x_t normal around x̄ with variance s². They are estimated by a random-effects analysis of
    variance (Searle, Casella and McCulloch 1992, Variance Components, ch. 3). Given a mean of K
    rows, S̃ - S = N·x̄ then is normal with

        mean N·(μ + ρ·(mean of the rows - μ)), variance N²·(1 - ρ)·τ², ρ = τ²/(τ² + v),

    with v = s²·(1/K - 1/N) the variance of a mean of K positions drawn without replacement. By the
    law of total expectation the mean of E(f | rows) is that of f(S̃), at every shift, so that its
    derivative is right too. What bias is left comes from the normal model and from estimating μ, τ²
    and s² from one minibatch. It is exact where every position is read.

    each: x_t of the token rows, [n].
    """
    if bool((tokens.share == 1).all()):
        return plug_in(values, tokens, each, pairs)
    sample = _Sample.of(tokens, each)
    own = [_responses(sample, ends) for ends in pairs]
    spread = (own[0][1] + own[1][1]) / (own[0][2] + own[1][2]).clamp_min(1)
    chosen, rejected = (_posterior(sample, mu, spread.clamp_min(0)) for mu, *_ in own)
    m, points = len(tokens.S), [(a, b, u * v) for a, u in _NODES for b, v in _NODES]
    at = torch.arange(len(points), device=each.device)[:, None] * 2 * m
    change = torch.cat(
        [
            side
            for a, b, _ in points
            for side in (chosen[0] + a * chosen[1], rejected[0] + b * rejected[1])
        ]
    )
    ends = (at + pairs[0]).flatten(), (at + m + pairs[1]).flatten()
    found = values(tokens.S.repeat(2 * len(points)) + change, change, *ends)
    weights = torch.tensor([weight for *_, weight in points], device=each.device, dtype=each.dtype)
    return (weights[:, None] * found.view(len(points), -1)).sum(0).mean()


@dataclass(frozen=True)
class _Sample:
    """K [m], N [m] and the mean of x_t over the K rows [m] of each response; the variance v [m] of
    such a mean."""

    K: Tensor
    N: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, tokens: TokenBatch, x: Tensor) -> _Sample:
        m, response = len(tokens.S), tokens.response
        K = torch.bincount(response, minlength=m)
        N = x.new_ones(m)
        N[response] = tokens.share * K[response]
        mean = x.new_zeros(m).index_add(0, response, x) / K.clamp_min(1)
        within = (x - mean[response]).square().sum() / (K - 1).clamp_min(0).sum().clamp_min(1)
        return cls(K, N, mean, within * (1 / K.clamp_min(1) - 1 / N).clamp_min(0))


def _responses(sample: _Sample, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Analysis of variance of the responses `ends`: μ, and a sum of squares whose expectation is τ²
    times the third number."""
    K = sample.K * (torch.bincount(ends, minlength=len(sample.K)) > 0)
    rows = K.sum().clamp_min(1)
    mu = (K * sample.mean).sum() / rows
    between = (K * (sample.mean - mu).square()).sum()
    expected = ((K - K * K / rows) * sample.variance).sum()
    return mu, between - expected, rows - (K * K).sum() / rows


def _posterior(sample: _Sample, mu: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of S̃ - S given the rows, [m] each. spread: τ²."""
    total = spread + sample.variance
    kept = torch.where(total > 0, spread / torch.where(total > 0, total, 1), 1)
    rest = sample.N * sample.N * (1 - kept) * spread
    # Without the inner choice, the derivative of a root of 0 would be infinite.
    deviation = torch.where(rest > 0, torch.where(rest > 0, rest, 1).sqrt(), 0)
    return sample.N * (mu + kept * (sample.mean - mu)), deviation
