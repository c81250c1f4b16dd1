"""Best-of-n sampling under a proxy reward: the expected gold score of the response it selects, the
KL divergence from the policy, and Gao's over-optimization curve.

From a prompt's pool of N responses n are drawn without replacement, and the one with the highest
proxy is selected. With the pool in ascending order of the proxy, the i-th response is selected in
C(i-1, n-1) of the C(N, n) subsets, so

    E[gold of the best of n] = Σ_{i≥n} C(i-1, n-1)/C(N, n) · gold_(i),

which is exact for this pool, unbiased for n fresh responses, and needs one sort for all n.
Responses that tie are selected with equal probability, so each counts with the mean gold of those
it ties with.

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
    """Pools of responses in ascending order of a proxy reward. Create it with `by`."""

    order: Indices  # [..., N]
    """Numbers of the responses, ascending by proxy."""
    proxy: Floats  # [..., N]
    """Their proxy rewards, in that order."""
    tied: NDArray[np.bool_]  # [..., N]
    """Whether a response has the same proxy as the one before it in that order."""

    @classmethod
    def by(cls, proxy: NDArray[np.floating]) -> Self:
        """Sort pools of N responses by `proxy` [..., N]; leading dimensions are pools and heads.

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
        """Expected value of the selected response for each n in `ns`, by the module's formula:
        float64 [..., len(ns)].

        values: float64 [..., N], such as gold, in the order of the proxy given to `by`; broadcast
            over missing leading dimensions.
        Raises: UserError for an n outside 1 … N.
        """
        values = np.broadcast_to(values, self.order.shape)
        ranked = np.take_along_axis(values, self.order, axis=-1)
        some = self.tied.any(axis=-1)
        if some.any():
            ranked[some] = _pooled(ranked[some], self.tied[some])
        return ranked @ weights(self.order.shape[-1], ns)

    def expected_proxy(self, ns: Sequence[int]) -> Floats:
        """Expected proxy reward of the selected response for each n: float64 [..., len(ns)]."""
        return self.proxy @ weights(self.order.shape[-1], ns)


def _pooled(values: Floats, tied: NDArray[np.bool_]) -> Floats:
    """Replace every value by the mean over its block of ties. Both: [pools, N]."""
    starts = np.flatnonzero(~tied)  # no block crosses pools: the first of a pool is never tied
    lengths = np.diff(starts, append=tied.size)
    means = np.add.reduceat(values.ravel(), starts) / lengths
    return np.repeat(means, lengths).reshape(values.shape)


def weights(size: int, ns: Sequence[int]) -> Floats:
    """Probability C(i-1, n-1)/C(N, n) that the i-th response of a pool of N = `size`, in ascending
    order, is the best of n: float64 [size, len(ns)]. Each column sums to 1.

    Computed from the top, w_N = n/N and w_{i-1} = w_i·(i-n)/(i-1), which cannot overflow.
    Raises: UserError for an n outside 1 … size.
    """
    wrong = next((n for n in ns if not 1 <= n <= size), None)
    if wrong is not None:
        raise UserError(f"n = {wrong}: choose 1 to {size}, the pools have {size} responses")
    n = np.asarray(ns, dtype=np.float64)
    ranks = np.arange(size, 1, -1, dtype=np.float64)[:, None]
    steps = np.maximum(ranks - n, 0) / (ranks - 1)
    return np.cumprod(np.concatenate([n[None] / size, steps]), axis=0)[::-1]


def kl_bound(ns: Sequence[int]) -> Floats:
    """Upper bound of KL(best of n ‖ policy), ln n - (n-1)/n, in nats: float64 [len(ns)].

    It is approached as all responses become improbable (Beirami et al. 2024, arXiv 2401.01879).
    """
    n = np.asarray(ns, dtype=np.float64)
    return np.log(n) - (n - 1) / n


def kl_estimate(n: int, S: Floats) -> Floats:
    """Terms whose mean over the selected responses estimates KL(best of n ‖ policy), in nats.

    S: log-probabilities of the selected responses under the policy, nats, at most 0. With
    ε = exp(S) and q = (1-ε)^n a term is (Beirami et al. 2024, arXiv 2401.01879)
        q·[ln n + (n-1)·ln(1-ε) - (n-1)/n] + (1-q)·ln[(1-q)/ε].
    It tends to `kl_bound` as ε → 0, and is 0 at ε = 1. Computed with
    ln[(1-q)/ε] = ln n + ln[(1-q)/(nε)], whose last term vanishes with ε, so that no precision is
    lost where ε underflows.
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
    """Gao's curve for best-of-n, gain = d·(α - β·d) at the distance d = √KL (Gao et al. 2022, arXiv
    2210.10760). alpha, beta: float64 [...]."""

    alpha: Floats
    beta: Floats

    @property
    def peak(self) -> Floats:
        """The distance d = α/2β of the curve's maximum; NaN unless α and β are positive."""
        peaked = (self.alpha > 0) & (self.beta > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(peaked, self.alpha / (2 * self.beta), np.nan)

    def drop(self, distance: float) -> Floats:
        """Maximum of the curve up to `distance`, minus its value there."""
        with np.errstate(divide="ignore", invalid="ignore"):
            highest = np.where(self.peak < distance, np.square(self.alpha) / (4 * self.beta), 0.0)
        return np.maximum(highest - distance * (self.alpha - self.beta * distance), 0.0)


def gao_fit(ns: Sequence[int], gains: Floats) -> Fit:
    """Fit Gao's curve by least squares over `ns`, at the distances √`kl_bound`.

    gains: float64 [..., len(ns)], expected gold of the best of n minus that of the best of 1.
    NaN where `ns` has fewer than two different n above 1.
    """
    d = np.sqrt(kl_bound(ns))
    if np.count_nonzero(np.unique(d)) < 2:
        nothing = np.full(gains.shape[:-1], np.nan)
        return Fit(nothing, nothing)
    solution = gains @ np.linalg.pinv(np.stack([d, -np.square(d)], axis=1)).T
    return Fit(solution[..., 0], solution[..., 1])
