"""Calibration of sigmoid(Δ) as the probability that the chosen response is better: temperature
scaling and the expected calibration error (Guo et al. 2017, arXiv 1706.04599).

Δ = r_chosen - r_rejected, float64 [pairs]; `weights` are float64 [pairs], by default 1. Pass a soft
label q as two entries: Δ with weight q and -Δ with weight 1 - q.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit

Floats = NDArray[np.float64]

BINS = 15
"""Number of bins of the expected calibration error."""

_SEARCH_FACTOR = 1e3
"""Temperatures are sought between the root mean square margin divided and multiplied by this."""


def fit_temperature(margins: Floats, weights: Floats | None = None) -> float:
    """Fit the temperature T > 0 that minimises mean -logsigmoid(Δ/T) (temperature scaling, Guo et
    al. 2017, arXiv 1706.04599, eq. 9).

    The loss is convex in 1/T, so the root of its derivative, found on a log scale by Brent's
    method, is the only minimum. T scales with the margins: T(c·Δ) = c·T(Δ).

    NaN where there is no minimum: without pairs, with all margins zero, when every pair is right
    (the loss falls as T → 0), and when the rewards are no better than chance (it falls as T → ∞).
    The last two are recognised by a minimum more than a factor of 1,000 from the root mean square
    margin.
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
        """-d loss/d(1/T), up to a positive factor; its root is the minimum."""
        return float(weights @ (scaled * expit(-scaled * np.exp(-log_temperature))))

    edge = float(np.log(_SEARCH_FACTOR))
    if slope(-edge) >= 0 or slope(edge) <= 0:
        return float("nan")
    log_temperature = float(brentq(slope, -edge, edge, xtol=1e-10))
    return float(np.exp(log_temperature) * scale * peak)


def expected_calibration_error(
    confidence: Floats, correct: Floats, weights: Floats, bins: int = BINS
) -> float:
    """Expected calibration error Σ_b (n_b/n)·|accuracy_b - mean confidence_b| (Guo et al. 2017,
    arXiv 1706.04599, eq. 3); NaN without pairs.

    Pairs are binned by confidence into `bins` bins of equal width over [0.5, 1]; n is the weight.

    confidence: float64 [pairs], max(p, 1 - p) with p = sigmoid(Δ/T).
    correct: float64 [pairs], the part of a pair's weight whose label agrees with the sign of Δ;
        half of its weight for a tie, whose confidence is 0.5.
    """
    total = float(weights.sum())
    if total == 0:
        return float("nan")
    gaps = np.bincount(
        bins_of(confidence, bins), weights=correct - weights * confidence, minlength=bins
    )
    return float(np.abs(gaps).sum() / total)


def bins_of(confidence: Floats, bins: int = BINS) -> NDArray[np.int64]:
    """The bin of each confidence, numbered from 0: `bins` bins of equal width over [0.5, 1]."""
    return np.minimum(((confidence - 0.5) * (2 * bins)).astype(np.int64), bins - 1)
