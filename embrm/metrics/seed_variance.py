"""The variance of a metric between seeds, pooled over configurations that are like each other.

Two or three seeds tell little of how much seeds matter: an interval that takes their variance s² at
face value is far too narrow whenever they happen to agree. Configurations of one comparison
therefore lend each other degrees of freedom. In units of v, the variance over prompts of one run's
value or difference, which is well known, their true variances between seeds are assumed to be
drawn from one distribution. Its mean is estimated by ρ₀ = s₀²/v₀ and the variance of each
configuration is shrunk towards it,

    s̃² = λ·ρ₀·v + (1-λ)·s²,    f = min(d/(1-λ), D).

In units of v, because a configuration that ranks nearly all prompts like the baseline, whatever the
seed, cannot differ from it by much, nor can seeds change that.

d = k-1 are the degrees of freedom of s² from k seeds, D those of s₀². This is Smyth's moderated
variance (d₀·s₀² + d·s²)/(d₀ + d) with d₀ + d degrees of freedom (2004, "Linear models and empirical
Bayes methods for assessing differential expression"), where λ = d₀/(d₀ + d). λ = min(1, V/T): of T,
the spread of the C ratios s²/v, which is C/(C-1) times their mean squared distance from ρ₀, V is
what chance makes of it if the true ratios are equal, the mean of 2·(s²/v)²/(d+2), which is unbiased
for 2ρ²/d (as in Opgen-Rhein and Strimmer 2007, "Accurate ranking of differentially expressed genes
by a distribution-free shrinkage approach"). Configurations are pooled entirely where their ratios
look alike, and less where they do not. With C = 1, s̃² = s².

s₀² rests on the table of C configurations by k seeds, split as in an analysis of variance: the mean
square A = C·Var_j(ȳ_j) of the seeds, with k-1 degrees of freedom, holds what a seed does to all
configurations alike; that of the remainder, B, has (C-1)(k-1).

    of a value:        s₀² = (A + (C-1)·B)/C, the mean of the s²,
                       D = (k-1)·(A + (C-1)·B)²/(A² + (C-1)·B²), Satterthwaite's (1946)
    of a difference:   s₀² = 2B, the mean over all pairs of configurations, and D = (C-1)(k-1)

v₀ is the mean of v over the same configurations or pairs. The mean over the pairs with the baseline
alone would have the luck of the baseline's few seeds in all its terms.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SeedVariance:
    """A variance between seeds, s̃², and its degrees of freedom f."""

    variance: float = 0.0
    freedom: float = float("inf")


NONE = SeedVariance()
"""Of what no seed changes, and of one seed, which does not show a variance."""


def of_values(values: Floats, draws: Floats) -> list[SeedVariance]:
    """Pool the variances between seeds of like configurations.

    values: float64 [seeds, configurations], with at least two seeds.
    draws: float64 [replicates, seeds, configurations], bootstrap replicates over prompts.
    """
    k, C = values.shape
    shared, own = C * float(values.mean(axis=1).var(ddof=1)), (C - 1) * _remainder(values)
    spread = shared**2 + own**2 / max(C - 1, 1)
    freedom = (k - 1) * (shared + own) ** 2 / spread if spread > 0 else float(k - 1)
    squares, over_prompts = values.var(axis=0, ddof=1), _over_prompts(draws, values)
    return _shrunk(
        squares, over_prompts, (shared + own) / C, float(over_prompts.mean()), k - 1, freedom
    )


def of_differences(values: Floats, draws: Floats, baseline: int) -> list[SeedVariance]:
    """Pool the variances between seeds of the differences of like configurations to one of them.

    values, draws: as in `of_values`. baseline: a column of them.
    Returns one entry per column; that of the baseline is `NONE`.
    """
    k, C = values.shape
    others = [place for place in range(C) if place != baseline]
    squares = (values[:, others] - values[:, [baseline]]).var(axis=0, ddof=1)
    over_prompts = _over_prompts(draws[..., others] - draws[..., [baseline]], values)
    centred = draws - draws.mean(axis=2, keepdims=True)
    of_pairs = 2 * float(_over_prompts(centred, values).sum()) / max(C - 1, 1)
    freedom = float((C - 1) * (k - 1))
    pooled = _shrunk(squares, over_prompts, 2 * _remainder(values), of_pairs, k - 1, freedom)
    pooled.insert(baseline, NONE)
    return pooled


def _remainder(values: Floats) -> float:
    """Mean square of the remainder, B; 0 for one configuration."""
    k, C = values.shape
    rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    return float((rest**2).sum()) / max((C - 1) * (k - 1), 1)


def _over_prompts(draws: Floats, values: Floats) -> Floats:
    """v: the variance over prompts of one run, mean over seeds: float64 [configurations]; 0 where
    it is no more than the rounding of `values`."""
    draws = draws[~np.isnan(draws).any(axis=(1, 2))]
    if not len(draws):
        return np.zeros(draws.shape[2])
    found = draws.var(axis=0).mean(axis=0)
    return np.where(found > (1e-12 * np.abs(values).max()) ** 2, found, 0.0)


def _shrunk(
    squares: Floats, over_prompts: Floats, pooled: float, scale: float, d: int, freedom: float
) -> list[SeedVariance]:
    """s̃² and f from s², v, s₀², v₀, d and D. Without any variance over prompts, v = v₀ = 1; a
    configuration that alone has none keeps its s²."""
    if not scale > 0:
        over_prompts, scale = np.ones_like(squares), 1.0
    like = over_prompts > 0
    ratios, mean = squares[like] / over_prompts[like], pooled / scale
    C = len(ratios)
    spread = float(((ratios - mean) ** 2).mean()) * C / (C - 1) if C > 1 else 0.0
    chance = float((2 * ratios**2 / (d + 2)).mean()) if C else 0.0
    weight = 1.0 if spread <= chance else chance / spread
    own = freedom if weight == 1 else min(d / (1 - weight), freedom)
    return [
        SeedVariance(float(weight * mean * over + (1 - weight) * square), max(own, float(d)))
        if over > 0
        else SeedVariance(float(square), float(d))
        for square, over in zip(squares, over_prompts, strict=True)
    ]
