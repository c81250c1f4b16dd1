"""Calibration: how honest is sigmoid(Δ) as the probability that the chosen response is better.

Everywhere Δ = reward(chosen) - reward(rejected), float64 [pairs]. `weights` are float64 [pairs],
default 1. A soft label q is two weighted rows: Δ with weight q and -Δ with weight 1 - q.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit

Floats = NDArray[np.float64]

BINS = 15
"""Of confidence, in the calibration error."""

_SEARCH_FACTOR = 1e3
"""The temperature lies within this factor of the root mean square margin, either way."""


def fit_temperature(margins: Floats, weights: Floats | None = None) -> float:
    """The T > 0 that minimises mean -logsigmoid(Δ/T) (Guo et al. 2017, arXiv 1706.04599, eq. 9).

    The loss is convex in 1/T, so the root of its derivative, sought on a log scale by Brent's
    method, is the one minimum. T scales with the margins: fit(cΔ) = c·fit(Δ).

    NaN where nothing can be fitted: no pairs, or all margins zero; every pair right (the smaller
    T the better, which says nothing about other pairs); no better than chance (the larger T the
    better). The last two are told by a minimum outside the search, a factor 1,000 from the root
    mean square margin.
    """
    margins = np.asarray(margins, dtype=np.float64)
    weights = np.ones_like(margins) if weights is None else np.asarray(weights, dtype=np.float64)
    peak = float(np.abs(margins).max(initial=0.0))
    if peak == 0 or not weights.any():
        return float("nan")
    scaled = margins / peak  # squares of tiny margins would underflow
    scale = float(np.sqrt(np.average(np.square(scaled), weights=weights)))
    if scale == 0:  # every pair with a margin has weight zero
        return float("nan")
    scaled /= scale

    def slope(log_temperature: float) -> float:
        """-d loss / d(1/T), up to a positive factor: its sign says which way T must move."""
        return float(weights @ (scaled * expit(-scaled * np.exp(-log_temperature))))

    edge = float(np.log(_SEARCH_FACTOR))
    if slope(-edge) >= 0 or slope(edge) <= 0:
        return float("nan")
    log_temperature = float(brentq(slope, -edge, edge, xtol=1e-10))
    return float(np.exp(log_temperature) * scale * peak)


def expected_calibration_error(
    confidence: Floats, correct: Floats, weights: Floats, bins: int = BINS
) -> float:
    """Weighted mean over bins of |accuracy - mean confidence| (Guo et al. 2017, eq. 3).

    confidence: max(p, 1 - p) with p = sigmoid(Δ/temperature), in `bins` equal widths of [0.5, 1].
    correct: the part of a pair's weight whose label the sign of Δ agrees with; for a tie half its
    weight, what a coin toss would earn, so that it lies on the diagonal. NaN without pairs.
    """
    total = float(weights.sum())
    if total == 0:
        return float("nan")
    gaps = np.bincount(
        bins_of(confidence, bins), weights=correct - weights * confidence, minlength=bins
    )
    return float(np.abs(gaps).sum() / total)


def bins_of(confidence: Floats, bins: int = BINS) -> NDArray[np.int64]:
    """The bin of each, from 0: `bins` equal widths of [0.5, 1]."""
    return np.minimum(((confidence - 0.5) * (2 * bins)).astype(np.int64), bins - 1)
