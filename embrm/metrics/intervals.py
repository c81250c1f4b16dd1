"""Intervals: bootstrap over prompts, jointly with seeds, and differences to a baseline.

The pairs of one prompt are not independent, so prompts are resampled, never pairs. Replicate b
gives prompt p the count c[b,p] ~ Poisson(1) (the Poisson bootstrap; for ratios it has the same
variance as drawing prompts with replacement). The counts depend on nothing but the prompt's id,
so all runs and all splits that contain the prompt share them: differences between runs are
paired, and a mean over splits knows which splits overlap. A metric is a ratio of sums, recomputed
in every replicate: accuracy = Σ c·wins / Σ c·(pairs - ties).

Seeds are a second, crossed source of variance. With k seeds the statistic is the mean over them,
and every replicate adds the mean of k draws, with replacement, from the observed deviations of
the seeds from their mean. Such draws have variance (k-1)/k · s²/k, with s² the unbiased variance
between seeds, so the deviations are inflated by √(k/(k-1)) to make it s²/k. With one seed there
is nothing to draw and the interval covers prompts only. What a seed and a prompt do together is
counted in both terms, so intervals err on the wide side (95 to 98 % where that dominates); with
two or three seeds and large seed variance they err on the narrow side, as any bootstrap of three
values does.

Sources: Owen and Eckles 2012 (arXiv 1106.2125) on crossed bootstraps; Chamandy et al. 2012 on the
Poisson bootstrap; Holm 1979 on the adjusted p.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import polars as pl
import polars.selectors as cs
from numpy.typing import NDArray
from scipy.special import ndtr

from embrm.core.streams import blake2b_number, generator
from embrm.metrics.outcomes import Outcomes

Floats = NDArray[np.float64]

REPLICATES = 2000

_UNBOUNDED = (-np.inf, np.inf)
_BOUNDS = {"accuracy": (0.0, 1.0), "length_accuracy": (0.0, 1.0), "tau": (-1.0, 1.0)}
"""Lowest and highest value of a metric: draws of seeds added to draws of prompts can pass them."""

_COMPARISON: dict[str, pl.DataType] = {
    "name": pl.String(),
    "seeds": pl.Int64(),
    "estimate": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "common_seeds": pl.Int64(),
    "difference": pl.Float64(),
    "difference_low": pl.Float64(),
    "difference_high": pl.Float64(),
    "p": pl.Float64(),
}

_FIXED_POINT = 2.0**26
"""Sums of multiples of 2^-26 are exact up to 2^27, so their bits depend on no order or thread."""


@dataclass(frozen=True)
class Replicates:
    """A metric of every run, observed and resampled over prompts.

    estimates: float64 [runs]; draws: float64 [replicates, runs]; prompts: how many were
    resampled; bounds: lowest and highest value the metric can have. NaN where a denominator is
    zero.
    """

    estimates: Floats
    draws: Floats
    prompts: int
    bounds: tuple[float, float] = _UNBOUNDED


def prompt_counts(prompt_ids: Sequence[str], replicates: int = REPLICATES) -> NDArray[np.uint8]:
    """Poisson(1) counts, uint8 [replicates, prompts]; a column depends on its prompt id alone."""
    counts = np.empty((replicates, len(prompt_ids)), dtype=np.uint8)
    for column, prompt_id in enumerate(prompt_ids):
        key = blake2b_number(prompt_id, 128, "little", b"embrm-bootstrap")
        counts[:, column] = generator(key).poisson(1.0, replicates)
    return counts


@lru_cache(maxsize=5)  # the parts of a suite, each of which every run of a sweep asks for again
def _kept(prompt_ids: tuple[str, ...], replicates: int) -> NDArray[np.uint8]:
    return prompt_counts(prompt_ids, replicates)


def kept_counts(prompt_ids: tuple[str, ...], replicates: int) -> Floats:
    """`prompt_counts` as float64, drawn once for callers that ask for the same prompts again."""
    return _kept(prompt_ids, replicates).astype(np.float64)


def replicate(outcomes: Outcomes, metric: str, replicates: int = REPLICATES) -> Replicates:
    """Resample one metric on one split for all runs at once.

    Columns of the result follow the runs; one alone where all runs are alike.
    metric: accuracy, nll, brier, length_accuracy or tau.
    """
    return resample(
        outcomes.prompts["prompt_id"],
        *outcomes.ratio(metric),
        bounds=_BOUNDS.get(metric, _UNBOUNDED),
        replicates=replicates,
    )


def resample(
    prompt_ids: pl.Series,
    above: Floats,
    below: Floats,
    *,
    bounds: tuple[float, float] = _UNBOUNDED,
    replicates: int = REPLICATES,
) -> Replicates:
    """Resample ratios of sums over prompts: the columns of `above` to those of `below`.

    above: float64 [rows, columns], below: the same or [rows, 1]; a row belongs to the prompt at its
    place in `prompt_ids`, and rows of the same prompt are added up. Numbers should be neither far
    below 1 nor above a thousand: they are rounded to multiples of 2^-26.
    """
    ids = prompt_ids.to_numpy()
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: len(ids)])
    above, below = (
        np.add.reduceat(_fixed_point(terms)[order], starts, axis=0) for terms in (above, below)
    )
    useful = below.any(axis=1)  # a prompt with nothing to count cannot inform an interval
    above, below = above[useful], below[useful]
    weights = kept_counts(tuple(ids[starts][useful].tolist()), replicates)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Replicates(
            estimates=above.sum(axis=0) / below.sum(axis=0),
            draws=(weights @ above) / (weights @ below),
            prompts=len(above),
            bounds=bounds,
        )


def mean(parts: Iterable[Replicates]) -> Replicates:
    """The unweighted mean of one metric over several splits."""
    parts = list(parts)
    lows, highs = zip(*(part.bounds for part in parts), strict=True)
    return Replicates(
        estimates=np.mean([part.estimates for part in parts], axis=0),
        draws=np.mean([part.draws for part in parts], axis=0),
        prompts=min(part.prompts for part in parts),
        bounds=(float(np.mean(lows)), float(np.mean(highs))),
    )


def compare(replicates: Replicates, runs: pl.DataFrame, baseline: str | None) -> pl.DataFrame:
    """Estimates with 95 % intervals, and paired differences to the configuration `baseline`.

    runs: name (of the configuration) and seed, one row per column of `replicates`.

    Returns one row per configuration, sorted by name:
        name, seeds, estimate, low, high: the mean over the seeds and its interval, cut at the
            metric's bounds;
        difference, difference_low, difference_high: configuration minus baseline, over the
            seeds both have (common_seeds of them);
        p: two-sided, from the difference over the standard deviation of its replicates (counting
            replicates cannot resolve below 1/2000, and the adjustment for hundreds of
            configurations needs that);
        p_holm: adjusted so that the chance of any false claim in the table stays below 5 %.
    Null where undefined: intervals with fewer than two prompts, differences of the baseline
    itself, without common seeds, or without a baseline.
    """
    seeds_of: dict[str, dict[int, int]] = {}
    for column, (name, seed) in enumerate(runs.select("name", "seed").iter_rows()):
        seeds_of.setdefault(name, {})[seed] = column
    reference = seeds_of.get(baseline, {}) if baseline is not None else {}
    rows = []
    for name, columns in sorted(seeds_of.items()):
        own = list(columns.values())
        estimate, low, high, _ = _interval(
            replicates.estimates[own], replicates.draws[:, own], replicates.prompts
        )
        common = sorted(columns.keys() & reference.keys()) if name != baseline else []
        ours = [columns[seed] for seed in common]
        theirs = [reference[seed] for seed in common]
        difference, difference_low, difference_high, deviation = _interval(
            replicates.estimates[ours] - replicates.estimates[theirs],
            replicates.draws[:, ours] - replicates.draws[:, theirs],
            replicates.prompts,
        )
        rows.append(
            {
                "name": name,
                "seeds": len(own),
                "estimate": estimate,
                "low": float(np.clip(low, *replicates.bounds)),
                "high": float(np.clip(high, *replicates.bounds)),
                "common_seeds": len(common),
                "difference": difference,
                "difference_low": difference_low,
                "difference_high": difference_high,
                "p": _p_value(difference, deviation),
            }
        )
    table = pl.DataFrame(rows, schema=_COMPARISON).with_columns(cs.float().fill_nan(None))
    return table.with_columns(p_holm=holm(table["p"]))


def holm(p: pl.Series) -> pl.Series:
    """Holm's step-down adjusted p values; nulls stay null and are not counted as tests."""
    tests = p.drop_nulls().to_numpy()
    order = np.argsort(tests, kind="stable")
    steps = np.minimum(tests[order] * np.arange(len(tests), 0, -1), 1.0)
    adjusted = np.empty_like(tests)
    adjusted[order] = np.maximum.accumulate(steps)
    spread = np.full(len(p), np.nan)
    spread[p.is_not_null().to_numpy()] = adjusted
    return pl.Series(p.name, spread).fill_nan(None)


def _interval(estimates: Floats, draws: Floats, prompts: int) -> tuple[float, float, float, float]:
    """Mean over seeds [k], its 2.5 and 97.5 percentiles, and the deviation of its replicates."""
    k = len(estimates)
    nan = float("nan")
    if k == 0 or np.isnan(estimates).any():
        return nan, nan, nan, nan
    estimate = float(estimates.mean())
    if prompts < 2:
        return estimate, nan, nan, nan
    values = over_seeds(estimates, draws)
    values = values[~np.isnan(values)]
    if not values.size:  # a statistic of the replicates, which has none of its own
        return estimate, nan, nan, nan
    low, high = np.quantile(values, [0.025, 0.975])
    return estimate, float(low), float(high), float(values.std())


def over_seeds(estimates: Floats, draws: Floats, stream: int = 0) -> Floats:
    """Replicates of the mean over k seeds: prompts and seeds resampled. float64 [replicates].

    estimates: float64 [k]; draws: float64 [replicates, k]. stream: below 2^64; configurations of
    one stream and equally many seeds draw the same seeds, those of others draw their own.
    """
    k = len(estimates)
    # Not draws.mean(axis=1): that sums in an order that depends on the memory layout.
    values = np.add.reduce([draws[:, seed] for seed in range(k)]) / k
    if k > 1:
        deviations = (estimates - float(estimates.mean())) * np.sqrt(k / (k - 1))
        values = values + _seed_draws(k, len(draws), stream) @ deviations
    return values


def _seed_draws(k: int, replicates: int, stream: int) -> Floats:
    """Share of each of k seeds among k draws with replacement, float64 [replicates, k]."""
    random = generator(k + (stream << 64))
    return random.multinomial(k, np.full(k, 1 / k), replicates) / k


def _p_value(difference: float, deviation: float) -> float:
    if difference == 0:
        return 1.0
    # A deviation of zero (every prompt alike) carries no information about other prompts.
    return float(2 * ndtr(-abs(difference) / deviation)) if deviation > 0 else float("nan")


def _fixed_point(terms: Floats) -> Floats:
    return np.rint(terms * _FIXED_POINT) / _FIXED_POINT
