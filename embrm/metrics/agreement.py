"""Agreement of two rankings of the same configurations: heads on frozen states (the frozen stage)
against fine-tuned backbones (the full stage), with bootstrap intervals.

Both stages evaluate the same configurations on the same prompts. Every statistic is computed from
means over seeds, and again in every replicate of the bootstrap of `embrm.metrics.intervals`, which
uses the same prompts in both stages. Seeds are drawn, with replacement, separately for each
configuration and stage: their variance is not pooled, since the statistics average over it.

Before seeds are drawn, the effect that a seed has on all configurations of a stage alike is
subtracted, since it cannot change any of these statistics: the mean deviation of the K
configurations that have the seed. This removes 1/K of each configuration's own variance, so the
remainder is scaled by √(K/(K-1)). With one seed per configuration the intervals cover prompts only.
Configurations are not resampled: the intervals are about those that were chosen.

Noise in the observed means biases a rank correlation towards 0 and a regret upwards, and a
replicate has this noise twice. The mean of the replicates therefore differs from the observed
value, by b, about as much as the observed value differs from that of noise-free means. The
percentile interval is widened by 2b in that direction. Where the stages agree almost perfectly and
configurations are close, it still covers less than 95 %: docs/methods.md tabulates its coverage in
simulations. The statistics themselves are not corrected for noise; `halves` estimates the highest
ρ that the noise of the seeds permits.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata

from embrm.core.streams import blake2b_number, generator
from embrm.metrics.intervals import Replicates, over_seeds

Floats = NDArray[np.float64]

FEWEST = 4
"""Fewest configurations for a rank correlation, or a line through their gains: with three, two of
the six possible orders have |ρ| = 1 by chance."""

LOWER_IS_BETTER = ("nll", "brier")

STATISTICS = (
    *("spearman", "kendall", "ordered", "regret", "slope", "intercept", "bias"),
    *("halves_full", "halves_frozen"),
)
"""Rows of the table that `agreement` returns, in order."""

_BOUNDS = {
    "spearman": (-1.0, 1.0),
    "kendall": (-1.0, 1.0),
    "ordered": (0.0, 1.0),
    "regret": (0.0, np.inf),
}

_SCHEMA = {
    "statistic": pl.String(),
    "value": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "reason": pl.String(),
}

_HALVED = 8
"""`halves` uses at most this many common seeds, which can be halved in 70 ways."""

_DIGITS = 12
"""Decimals to which means over seeds are rounded, so that means that differ only by the rounding of
sums in another order tie."""


@dataclass(frozen=True, eq=False)
class Stage:
    """One metric of the configurations in one stage, signed so that larger is better.

    names: of the configurations; a name may occur twice, where two frozen configurations share one
        fine-tune.
    values: float64 [configurations], means over seeds.
    draws: float64 [replicates, configurations], bootstrap replicates over prompts and seeds.
    seeds: float64 [seeds, configurations], for the seeds that all configurations have.
    prompts: number of prompts that were resampled.
    """

    names: tuple[str, ...]
    values: Floats
    draws: Floats
    seeds: Floats
    prompts: int

    @classmethod
    def of(
        cls, replicates: Replicates, runs: pl.DataFrame, names: Sequence[str], metric: str, of: str
    ) -> "Stage":
        """Average the runs of the configurations `names`, each of which has at least one.

        runs: name and seed, one row per column of `replicates`. of: name of the stage; the seeds of
        stages with different names are drawn independently.
        """
        columns: dict[str, dict[int, int]] = {}
        for column, (name, seed) in enumerate(runs.select("name", "seed").iter_rows()):
            columns.setdefault(name, {})[seed] = column
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        estimates, draws = sign * replicates.estimates, sign * replicates.draws
        once = {name: columns[name] for name in names}
        deviations: dict[int, list[float]] = {}  # of all configurations, by seed
        for own in once.values():
            middle = estimates[[*own.values()]].mean()
            for seed, column in own.items():
                deviations.setdefault(seed, []).append(estimates[column] - middle)
        resampled = {}
        for name, own in once.items():
            places = [*own.values()]
            middle = estimates[places].mean()
            alone = np.array(
                [
                    _without_shared(estimates[column] - middle, deviations[seed])
                    for seed, column in own.items()
                ]
            )
            resampled[name] = _mean_over_seeds(alone, draws[:, places], _stream(of, name))
        common = sorted(set.intersection(*(set(own) for own in once.values())))
        return cls(
            names=tuple(names),
            values=np.round([estimates[[*once[name].values()]].mean() for name in names], _DIGITS),
            draws=np.column_stack([resampled[name] for name in names]),
            seeds=np.array([[estimates[once[name][seed]] for name in names] for seed in common]),
            prompts=replicates.prompts,
        )


def _without_shared(deviation: float, deviations: Sequence[float]) -> float:
    """A configuration's deviation with a seed from its mean, minus the part that is shared with
    all configurations that have the seed. deviations: theirs, its own among them."""
    K = len(deviations)
    return deviation if K == 1 else float((deviation - np.mean(deviations)) * np.sqrt(K / (K - 1)))


def _mean_over_seeds(estimates: Floats, draws: Floats, stream: int) -> Floats:
    """Replicates, over prompts and seeds, of the mean over k seeds: float64 [replicates].

    Each adds the mean of k draws, with replacement, of the seeds' deviations from their mean, which
    are multiplied by √(k/(k-1)) so that it has the unbiased variance s²/k.

    estimates: float64 [k]. draws: float64 [replicates, k], replicates over prompts. stream: below
    2^64; configurations with the same stream and number of seeds draw the same seeds, others draw
    independently.
    """
    k = len(estimates)
    values = over_seeds(draws)
    if k > 1:
        deviations = (estimates - float(estimates.mean())) * np.sqrt(k / (k - 1))
        values = values + _seed_draws(k, len(draws), stream) @ deviations
    return values


def _seed_draws(k: int, replicates: int, stream: int) -> Floats:
    """Share of each of k seeds among k draws with replacement: float64 [replicates, k]."""
    random = generator(k + (stream << 64))
    return random.multinomial(k, np.full(k, 1 / k), replicates) / k


def spearman(x: Floats, y: Floats) -> Floats:
    """Spearman's ρ over the last axis: Pearson's r of the ranks, with tied entries at their mean
    rank (Spearman 1904). NaN where one side is constant."""
    x, y = (rankdata(side, axis=-1) for side in (x, y))
    x, y = (side - side.mean(axis=-1, keepdims=True) for side in (x, y))
    return _ratio((x * y).sum(axis=-1), np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1)))


def kendall(x: Floats, y: Floats) -> Floats:
    """Kendall's τ-b over the last axis: (C - D)/√(P_x·P_y), with C concordant and D discordant
    pairs, P_x pairs not tied in x and P_y not tied in y (Kendall 1945). NaN where one side is
    constant."""
    of_x, of_y = _signs(x), _signs(y)
    decided = np.abs(of_x).sum(axis=-1) * np.abs(of_y).sum(axis=-1)
    return _ratio((of_x * of_y).sum(axis=-1), np.sqrt(decided))


def ordered(x: Floats, y: Floats) -> Floats:
    """C/(C + D) over the last axis: the share of concordant pairs among those that tie in neither x
    nor y. NaN where there are none."""
    alike = _signs(x) * _signs(y)
    return _ratio((alike > 0).sum(axis=-1), (alike != 0).sum(axis=-1))


def regret(x: Floats, y: Floats) -> Floats:
    """max y - y[argmax x] over the last axis: what choosing by x loses. Where several entries have
    the largest x, their mean y counts."""
    best = x == x.max(axis=-1, keepdims=True)
    return y.max(axis=-1) - (y * best).sum(axis=-1) / best.sum(axis=-1)


def slope(x: Floats, y: Floats) -> Floats:
    """Slope of the least-squares line of y on x over the last axis, Σ(x-x̄)y / Σ(x-x̄)²; NaN where x
    is constant."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return _ratio((centred * y).sum(axis=-1), (centred * centred).sum(axis=-1))


def intercept(x: Floats, y: Floats) -> Floats:
    """Intercept of the least-squares line of y on x over the last axis, ȳ - slope·x̄."""
    return y.mean(axis=-1) - slope(x, y) * x.mean(axis=-1)


def bias(x: Floats, y: Floats) -> Floats:
    """Mean of x - y over the last axis: above 0 where x overestimates y."""
    return (x - y).mean(axis=-1)


def halves(stage: Stage) -> float:
    """Split-half reliability: Spearman's ρ between the means over two halves of the seeds that all
    configurations have, averaged over all ways of halving them.

    Each configuration name counts once. It underestimates the reliability of the means over all
    seeds, because a half has half of them, and does not contain the noise of the prompts, which
    both halves share. NaN with fewer than two common seeds.
    """
    _, once = np.unique(stage.names, return_index=True)
    seeds = stage.seeds[:_HALVED]
    if len(seeds) < 2:
        return float("nan")
    found = []
    for half in itertools.combinations(range(len(seeds)), len(seeds) // 2):
        rest = [seed for seed in range(len(seeds)) if seed not in half]
        one, other = (seeds[rows].mean(axis=0)[once] for rows in (list(half), rest))
        found.append(spearman(np.round(one, _DIGITS), np.round(other, _DIGITS)))
    return float(np.mean(found))


def agreement(frozen: Stage, full: Stage, baseline: int | None) -> pl.DataFrame:
    """Compute `STATISTICS` for one split: one row each, with the columns statistic, value, low and
    high (95 % interval), and reason (why value is null).

    frozen, full: the same configurations in the same order, at least two.
    baseline: position of the baseline, from which gains are measured; None where it was not
        fine-tuned.

    spearman, kendall, ordered, regret: the functions of that name, with x the frozen and y the full
    values. slope, intercept, bias: the same with the gains over the baseline; gains that the frozen
    stage predicts exactly give 1, 0 and 0. halves_full, halves_frozen: `halves` of each stage,
    without an interval. Regret, intercept and bias are in the metric's units.
    """
    distinct = len(set(full.names))
    few = f"{distinct} fine-tuned configurations: it needs {FEWEST}" if distinct < FEWEST else ""
    if np.isnan(frozen.values).any() or np.isnan(full.values).any():
        return pl.DataFrame(
            [_row(name, reason="a configuration lacks a value here") for name in STATISTICS],
            schema=_SCHEMA,
        )
    usable = ~(np.isnan(frozen.draws).any(axis=1) | np.isnan(full.draws).any(axis=1))
    sides = [
        (frozen.values, full.values),
        (frozen.draws[usable], full.draws[usable]),
    ]
    gains = (
        [] if baseline is None else [(_gains(x, baseline), _gains(y, baseline)) for x, y in sides]
    )
    resampled = min(frozen.prompts, full.prompts) > 1

    def row(
        name: str, of: Callable[[Floats, Floats], Floats], inputs: list[tuple[Floats, Floats]]
    ) -> dict[str, object]:
        if not inputs:
            return _row(name, reason="the baseline has no fine-tuned run")
        value = float(of(*inputs[0]))
        if np.isnan(value):
            return _row(name, reason="all configurations have the same value in a stage")
        draws = of(*inputs[1])
        draws = draws[~np.isnan(draws)]
        if not resampled or not len(draws):
            return _row(name, value)
        low, high = _interval(value, draws, _BOUNDS.get(name, (-np.inf, np.inf)))
        return _row(name, value, low, high)

    rows = [
        _row(name, reason=few) if few and needs_many else row(name, of, inputs)
        for name, of, inputs, needs_many in (
            ("spearman", spearman, sides, True),
            ("kendall", kendall, sides, True),
            ("ordered", ordered, sides, False),
            ("regret", regret, sides, False),
            ("slope", slope, gains, True),
            ("intercept", intercept, gains, True),
            ("bias", bias, gains, False),
        )
    ]
    for name, stage in (("halves_full", full), ("halves_frozen", frozen)):
        value = halves(stage)
        if few:
            rows.append(_row(name, reason=few))
        elif np.isnan(value):
            why = (
                "fewer than two seeds that all configurations have"
                if len(stage.seeds) < 2
                else "all configurations have the same value with some seeds"
            )
            rows.append(_row(name, reason=why))
        else:
            rows.append(_row(name, value))
    return pl.DataFrame(rows, schema=_SCHEMA)


def _row(
    statistic: str,
    value: float | None = None,
    low: float | None = None,
    high: float | None = None,
    reason: str | None = None,
) -> dict[str, object]:
    return {"statistic": statistic, "value": value, "low": low, "high": high, "reason": reason}


def _interval(value: float, draws: Floats, bounds: tuple[float, float]) -> tuple[float, float]:
    """Percentile interval of `draws`, extended by twice their bias against it, within `bounds`."""
    low, high = np.quantile(draws, [0.025, 0.975])
    correction = 2 * (value - draws.mean())
    low, high = np.clip([low + min(correction, 0), high + max(correction, 0)], *bounds)
    return float(low), float(high)


def _gains(values: Floats, baseline: int) -> Floats:
    """Gains of all other configurations over the one at position `baseline`."""
    return np.delete(values - values[..., [baseline]], baseline, axis=-1)


def _signs(values: Floats) -> NDArray[np.int8]:
    """Sign of the difference of every two entries along the last axis, int8 [..., pairs]."""
    first, second = np.triu_indices(values.shape[-1], k=1)
    one, other = values[..., first], values[..., second]
    return np.subtract(one > other, one < other, dtype=np.int8)


def _ratio(above: Floats, below: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below == 0, np.nan, above / below)


def _stream(*words: str) -> int:
    return blake2b_number("\0".join(words), 64, person=b"embrm-seeds")
