"""Best of n under a proxy: what is expected of the response that a reward would choose.

Of a prompt's pool of N responses n are drawn, and the one the proxy rewards most is taken. With
the pool in ascending order of the proxy, the i-th is taken in C(i-1, n-1) of the C(N, n) subsets:

    E[gold of the best of n] = Σ_{i≥n} C(i-1, n-1)/C(N, n) · gold_(i),

exact for this pool and unbiased for a fresh one, at every n from a single sort. Responses that tie
are taken with equal chances, so each counts with the mean gold of its block.

Sources: Nakano et al. 2021 (WebGPT, arXiv 2112.09332) and Hilton and Gao 2022 (Measuring Goodhart's
law) on the estimator; Beirami et al. 2024 (arXiv 2401.01879) on the divergence; Gao et al. 2022
(arXiv 2210.10760) on the fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlog1py

from embrm.core.errors import UserError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Pools in ascending order of a proxy. Create it with `by`."""

    order: Indices  # [..., N]
    proxy: Floats  # [..., N]
    """In that order."""
    tied: NDArray[np.bool_]  # [..., N]
    """Whether the response before has the same proxy."""

    @classmethod
    def by(cls, proxy: NDArray[np.floating]) -> Self:
        """proxy: [..., N], any number of pools of equal size, under any number of heads.

        Raises: UserError when a reward is not finite.
        """
        if not np.isfinite(proxy).all():
            raise UserError(
                f"{np.count_nonzero(~np.isfinite(proxy))} of {proxy.size} rewards are not finite: "
                "leave the run out"
            )
        order = np.argsort(proxy, axis=-1)
        ranked = np.take_along_axis(proxy, order, axis=-1)
        tied = np.zeros(ranked.shape, np.bool_)
        np.equal(ranked[..., 1:], ranked[..., :-1], out=tied[..., 1:])
        return cls(order, ranked.astype(np.float64), tied)

    def expected(self, values: Floats, ns: Sequence[int]) -> Floats:
        """Expected value of the response taken, for each n: float64 [..., n].

        values: float64 [..., N] of the responses in the order they were given in; leading
        dimensions that are missing are the same for all heads.
        Raises: UserError for an n that is not in 1 … N.
        """
        values = np.broadcast_to(values, self.order.shape)
        ranked = np.take_along_axis(values, self.order, axis=-1)
        some = self.tied.any(axis=-1)
        if some.any():
            ranked[some] = _pooled(ranked[some], self.tied[some])
        return ranked @ weights(self.order.shape[-1], ns)

    def expected_proxy(self, ns: Sequence[int]) -> Floats:
        """Expected proxy of the response taken, for each n: float64 [..., n]."""
        return self.proxy @ weights(self.order.shape[-1], ns)


def _pooled(values: Floats, tied: NDArray[np.bool_]) -> Floats:
    """Every value replaced by the mean of its block of ties; [pools, N] both."""
    starts = np.flatnonzero(~tied)  # a pool's first response ties with none before, so starts one
    lengths = np.diff(starts, append=tied.size)
    means = np.add.reduceat(values.ravel(), starts) / lengths
    return np.repeat(means, lengths).reshape(values.shape)


def weights(size: int, ns: Sequence[int]) -> Floats:
    """Probability that the i-th of a pool of `size`, ascending, is the best of n: [size, n].

    From the top, w_N = n/N and w_{i-1} = w_i·(i-n)/(i-1): nothing overflows, and each column sums
    to 1. Raises: UserError for an n that is not in 1 … size.
    """
    wrong = next((n for n in ns if not 1 <= n <= size), None)
    if wrong is not None:
        raise UserError(f"n = {wrong}: a pool of {size} has the best of 1 to {size}: change n")
    n = np.asarray(ns, dtype=np.float64)
    ranks = np.arange(size, 1, -1, dtype=np.float64)[:, None]
    steps = np.maximum(ranks - n, 0) / (ranks - 1)
    return np.cumprod(np.concatenate([n[None] / size, steps]), axis=0)[::-1]


def kl_bound(ns: Sequence[int]) -> Floats:
    """KL(best of n ‖ the policy), nats: at most ln n - (n-1)/n, and that where no response is
    likely. float64 [n]."""
    n = np.asarray(ns, dtype=np.float64)
    return np.log(n) - (n - 1) / n


def kl_estimate(n: int, S: Floats) -> Floats:
    """The divergence at responses of log-probability S (nats, at most 0) under the policy.

    With ε = exp(S) and q = (1-ε)^n,
        q·[ln n + (n-1)·ln(1-ε) - (n-1)/n] + (1-q)·ln[(1-q)/ε];
    its mean over the responses taken estimates KL(best of n ‖ the policy). As ε → 0 it becomes
    `kl_bound`; a response that is certain adds 0. Written with ln[(1-q)/ε] = ln n + ln[(1-q)/(nε)],
    whose last term vanishes with ε, so that even an ε too small for a float costs no digits.
    """
    probability = np.exp(np.minimum(S, 0.0))
    with np.errstate(divide="ignore"):
        tries = n * np.log1p(-probability)  # -∞ where the response is certain
    never, ever = np.exp(tries), -np.expm1(tries)
    ratio = np.divide(ever, n * probability, out=np.ones_like(ever), where=probability > 0)
    inside = xlog1py((n - 1) * never, -probability) - (n - 1) / n * never
    return np.maximum(np.log(n) + inside + ever * np.log(ratio), 0.0)


@dataclass(frozen=True, eq=False)
class Fit:
    """Gao's curve of best of n, gain = d·(α - β·d) at distance d = √KL. alpha, beta: [...]."""

    alpha: Floats
    beta: Floats

    @property
    def peak(self) -> Floats:
        """The distance α/2β from which on gold falls; NaN where the curve has no peak."""
        peaked = (self.alpha > 0) & (self.beta > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(peaked, self.alpha / (2 * self.beta), np.nan)

    def drop(self, distance: float) -> Floats:
        """How much lower the curve is at `distance` than at its highest before."""
        with np.errstate(divide="ignore", invalid="ignore"):
            highest = np.where(self.peak < distance, np.square(self.alpha) / (4 * self.beta), 0.0)
        return np.maximum(highest - distance * (self.alpha - self.beta * distance), 0.0)


def gao_fit(ns: Sequence[int], gains: Floats) -> Fit:
    """Least squares over n of gains [..., n]: gold of the best of n, minus that of the best of 1.

    Distances are √`kl_bound`. NaN with fewer than two n above 1.
    """
    d = np.sqrt(kl_bound(ns))
    if np.count_nonzero(np.unique(d)) < 2:
        nothing = np.full(gains.shape[:-1], np.nan)
        return Fit(nothing, nothing)
    solution = gains @ np.linalg.pinv(np.stack([d, -np.square(d)], axis=1)).T
    return Fit(solution[..., 0], solution[..., 1])
