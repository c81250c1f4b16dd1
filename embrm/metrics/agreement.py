"""How far the ranking by one stage tells the ranking by another: frozen states against full tuning.

Both stages evaluate the same configurations on the same prompts. Every statistic is computed from
the means over seeds, and again in every replicate of the bootstrap of `embrm.metrics.intervals`:
a replicate has the same prompts in both stages, and draws seeds anew within each configuration of
each stage. What a seed does to all configurations of a stage alike moves no statistic here, and is
taken out before seeds are drawn: the mean, over the K configurations that have the seed, of their
deviations. It takes a K-th of each configuration's own variance with it, so what is left is scaled
by √(K/(K-1)); of a seed that one configuration has nothing is taken. With one seed there is nothing
to draw, and the interval covers prompts only. Configurations are not resampled: they were chosen,
and another choice may agree otherwise.

The observed means are noisy, and a replicate adds as much noise once more. Noise draws a rank
correlation towards 0, and a regret up: a replicate's is on average as far from the observed one, b,
as that is from the one of noise-free means. The percentile interval is therefore widened by 2b on
the side from which noise draws; unwidened it misses the agreement of noise-free means more often
than not where that is close to perfect. Widened it still falls short there, the more the closer the
configurations: noise hides more than the doubled noise shows. docs/methods.md has its coverage in
simulations. The values themselves are as observed: what noise of the seeds leaves of perfect
agreement is the ceiling, `halves`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata

from embrm.core.streams import blake2b_number
from embrm.metrics.intervals import Replicates, over_seeds

Floats = NDArray[np.float64]

FEWEST = 4
"""Configurations that a rank correlation or a line through their gains needs: of three, two orders
in six agree by chance with |ρ| = 1."""

LOWER_IS_BETTER = ("nll", "brier")

STATISTICS = (
    *("spearman", "kendall", "ordered", "regret", "slope", "intercept", "bias"),
    *("halves_full", "halves_frozen"),
)
"""What `agreement` tells of a split, in its order."""

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
"""Common seeds of which every halving is taken, at most 70 of them."""

_DIGITS = 12
"""Means equal to this many digits are tied: sums over seeds in another order are not more equal."""


@dataclass(frozen=True, eq=False)
class Stage:
    """One metric of the same configurations in one stage; larger is better.

    names: of the configurations, where two may be one; values: float64 [configurations], means
    over seeds; draws: float64 [replicates, configurations], resampled over prompts and seeds;
    seeds: float64 [common seeds, configurations]; prompts: how many were resampled.
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
        """The configurations `names`, each of which has a run.

        runs: name and seed, one row per column of `replicates`. of: what the stage is called: its
        seeds are drawn apart from another's.
        """
        columns: dict[str, dict[int, int]] = {}
        for column, (name, seed) in enumerate(runs.select("name", "seed").iter_rows()):
            columns.setdefault(name, {})[seed] = column
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        estimates, draws = sign * replicates.estimates, sign * replicates.draws
        once = {name: columns[name] for name in names}
        luck: dict[int, list[float]] = {}
        for own in once.values():
            middle = estimates[[*own.values()]].mean()
            for seed, column in own.items():
                luck.setdefault(seed, []).append(estimates[column] - middle)
        resampled = {}
        for name, own in once.items():
            places = [*own.values()]
            middle = estimates[places].mean()
            alone = np.array(
                [_own(estimates[column] - middle, luck[seed]) for seed, column in own.items()]
            )
            resampled[name] = over_seeds(alone, draws[:, places], _stream(of, name))
        common = sorted(set.intersection(*(set(own) for own in once.values())))
        return cls(
            names=tuple(names),
            values=np.round([estimates[[*once[name].values()]].mean() for name in names], _DIGITS),
            draws=np.column_stack([resampled[name] for name in names]),
            seeds=np.array([[estimates[once[name][seed]] for name in names] for seed in common]),
            prompts=replicates.prompts,
        )


def _own(deviation: float, luck: Sequence[float]) -> float:
    """What of a configuration's deviation in a seed is its own. luck: the deviations in this seed
    of all configurations that have it."""
    K = len(luck)
    return deviation if K == 1 else float((deviation - np.mean(luck)) * np.sqrt(K / (K - 1)))


def spearman(x: Floats, y: Floats) -> Floats:
    """Spearman's ρ over the last axis, ties at their mean rank; NaN where one side is constant."""
    x, y = (rankdata(side, axis=-1) for side in (x, y))
    x, y = (side - side.mean(axis=-1, keepdims=True) for side in (x, y))
    return _ratio((x * y).sum(axis=-1), np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1)))


def kendall(x: Floats, y: Floats) -> Floats:
    """Kendall's τ-b over the last axis; NaN where one side is constant."""
    of_x, of_y = _signs(x), _signs(y)
    decided = np.abs(of_x).sum(axis=-1) * np.abs(of_y).sum(axis=-1)
    return _ratio((of_x * of_y).sum(axis=-1), np.sqrt(decided))


def ordered(x: Floats, y: Floats) -> Floats:
    """Share of the pairs along the last axis that both sides order, ordered alike; NaN for none."""
    alike = _signs(x) * _signs(y)
    return _ratio((alike > 0).sum(axis=-1), (alike != 0).sum(axis=-1))


def regret(x: Floats, y: Floats) -> Floats:
    """Best y minus the y of the best by x (several: their mean), over the last axis."""
    best = x == x.max(axis=-1, keepdims=True)
    return y.max(axis=-1) - (y * best).sum(axis=-1) / best.sum(axis=-1)


def slope(x: Floats, y: Floats) -> Floats:
    """Of the least-squares line of y on x, over the last axis; NaN where x is constant."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return _ratio((centred * y).sum(axis=-1), (centred * centred).sum(axis=-1))


def intercept(x: Floats, y: Floats) -> Floats:
    """Of that line: y where x = 0."""
    return y.mean(axis=-1) - slope(x, y) * x.mean(axis=-1)


def bias(x: Floats, y: Floats) -> Floats:
    """Mean of x - y over the last axis: above 0 where x promises too much."""
    return (x - y).mean(axis=-1)


def halves(stage: Stage) -> float:
    """The ρ that noise of the seeds leaves: between two halves of the seeds that all have.

    Mean over all ways of halving them; every configuration counts once. Each half has half the
    seeds, so the means over all of them are less noisy than this tells; the prompts are the same,
    so their noise is not in it. NaN with fewer than two seeds.
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
    """`STATISTICS` of one split, a row each: statistic, value, low and high (95 %), reason.

    frozen, full: the same configurations in the same order, at least two; some may be one and the
    same in full. baseline: the column that gains are measured from, if it is there.

    spearman, kendall, ordered: of the two rankings, `ordered` the share of pairs ordered alike.
    regret: the best full value minus that of the configuration the frozen stage ranks first.
    slope, intercept: of the line of full on frozen gains over the baseline; a cheap stage that
    tells gains exactly has 1 and 0. bias: mean frozen minus mean full gain.
    halves_full, halves_frozen: `halves` of each stage, without an interval.
    Gains and regret are in the metric's units, positive where better.

    Undefined values are null, with the reason.
    """
    distinct = len(set(full.names))
    few = f"{distinct} fine-tuned configurations: it needs {FEWEST}" if distinct < FEWEST else ""
    if np.isnan(frozen.values).any() or np.isnan(full.values).any():
        return pl.DataFrame(
            [_row(name, reason="a configuration has no value here") for name in STATISTICS],
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
            return _row(name, reason="all configurations are level in a stage")
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
            why = "fewer than two seeds that all have" if len(stage.seeds) < 2 else "level seeds"
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
    """Percentiles of `draws`, widened by twice their bias on its side, within `bounds`."""
    low, high = np.quantile(draws, [0.025, 0.975])
    correction = 2 * (value - draws.mean())
    low, high = np.clip([low + min(correction, 0), high + max(correction, 0)], *bounds)
    return float(low), float(high)


def _gains(values: Floats, baseline: int) -> Floats:
    """Of all others over the configuration in the column `baseline`."""
    return np.delete(values - values[..., [baseline]], baseline, axis=-1)


def _signs(values: Floats) -> NDArray[np.int8]:
    """Which of every two entries of the last axis is larger, int8 [..., pairs]."""
    first, second = np.triu_indices(values.shape[-1], k=1)
    one, other = values[..., first], values[..., second]
    return np.subtract(one > other, one < other, dtype=np.int8)


def _ratio(above: Floats, below: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below == 0, np.nan, above / below)


def _stream(*words: str) -> int:
    return blake2b_number("\0".join(words), 64, person=b"embrm-seeds")
