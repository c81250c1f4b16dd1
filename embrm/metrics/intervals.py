"""Bootstrap intervals over prompts and seeds, and paired differences to a baseline.

The pairs of one prompt are not independent, so prompts are resampled, never pairs (a cluster
bootstrap). Replicate b gives prompt p the count c[b,p] ~ Poisson(1): the Poisson bootstrap, which
for ratios has the same variance as drawing prompts with replacement. A count depends on nothing but
b and the prompt's id, so all runs and all splits that contain a prompt share its counts.
Differences between runs are therefore paired, and a mean over splits accounts for prompts that
several of them contain. A metric is a ratio of sums, recomputed in every replicate:
accuracy = Σ c·wins / Σ c·(pairs - ties).

Seeds are a second source of variance, crossed with prompts. With k seeds the statistic is the mean
over them, and every replicate adds the mean of k draws, with replacement, from the observed
deviations of the seeds from their mean. The mean of such draws has variance (k-1)/k · s²/k, with s²
the unbiased variance between seeds, so the deviations are multiplied by √(k/(k-1)) to make it
s²/k. With one seed the interval covers prompts only. An interaction of seed and prompt is counted
in both terms, so 95 % intervals are somewhat wide (they cover 95 to 98 % where it dominates); with
two or three seeds and a large variance between seeds they are too narrow, as a bootstrap of two or
three values is.

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
"""Lowest and highest value of a metric. Replicates can lie beyond them, because seed deviations are
added to a value, so intervals are clipped."""

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
"""Terms are rounded to multiples of 2^-26, whose float64 sums are exact up to 2^27: the order of
summation and the number of threads cannot change a bit."""


@dataclass(frozen=True)
class Replicates:
    """A metric of every run, with its bootstrap replicates over prompts.

    estimates: float64 [runs], the observed values.
    draws: float64 [replicates, runs], the replicates.
    prompts: number of prompts that were resampled.
    bounds: lowest and highest value that the metric can have.
    Values are NaN where a denominator is zero.
    """

    estimates: Floats
    draws: Floats
    prompts: int
    bounds: tuple[float, float] = _UNBOUNDED


def prompt_counts(prompt_ids: Sequence[str], replicates: int = REPLICATES) -> NDArray[np.uint8]:
    """Poisson(1) counts of the bootstrap, uint8 [replicates, prompts].

    Each column is seeded by its prompt id alone (Chamandy et al. 2012 on the Poisson bootstrap).
    """
    counts = np.empty((replicates, len(prompt_ids)), dtype=np.uint8)
    for column, prompt_id in enumerate(prompt_ids):
        key = blake2b_number(prompt_id, 128, "little", b"embrm-bootstrap")
        counts[:, column] = generator(key).poisson(1.0, replicates)
    return counts


@lru_cache(maxsize=5)  # the parts of a suite, each of which every run of a sweep asks for again
def _kept(prompt_ids: tuple[str, ...], replicates: int) -> NDArray[np.uint8]:
    return prompt_counts(prompt_ids, replicates)


def cached_prompt_counts(prompt_ids: tuple[str, ...], replicates: int) -> Floats:
    """`prompt_counts` as float64, kept for calls that ask for the same prompts again."""
    return _kept(prompt_ids, replicates).astype(np.float64)


def replicate(outcomes: Outcomes, metric: str, replicates: int = REPLICATES) -> Replicates:
    """Resample one metric on one split for all runs.

    The result's columns are the runs, or a single one for length_accuracy, which no run changes.
    metric: accuracy, nll, brier, length_accuracy or tau, as the ratios of `Outcomes.ratio`.
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
    """Resample ratios Σ_p c_p·above_p / Σ_p c_p·below_p over prompts p, column by column, with the
    counts c of `prompt_counts`; c = 1 gives the estimates.

    prompt_ids: the prompt of each row; rows of the same prompt are added up first.
    above: float64 [rows, columns]. below: the same, or [rows, 1] for all columns.
    Terms are rounded to multiples of 2^-26, so they should be neither far below 1 nor above 1,000.
    """
    ids = prompt_ids.to_numpy()
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1])[: len(ids)])
    above, below = (
        np.add.reduceat(_fixed_point(terms)[order], starts, axis=0) for terms in (above, below)
    )
    useful = below.any(axis=1)  # prompts whose terms are all 0 are not counted as resampled
    above, below = above[useful], below[useful]
    weights = cached_prompt_counts(tuple(ids[starts][useful].tolist()), replicates)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Replicates(
            estimates=above.sum(axis=0) / below.sum(axis=0),
            draws=(weights @ above) / (weights @ below),
            prompts=len(above),
            bounds=bounds,
        )


def mean(parts: Iterable[Replicates]) -> Replicates:
    """Unweighted mean of one metric over several splits, replicate by replicate."""
    parts = list(parts)
    lows, highs = zip(*(part.bounds for part in parts), strict=True)
    return Replicates(
        estimates=np.mean([part.estimates for part in parts], axis=0),
        draws=np.mean([part.draws for part in parts], axis=0),
        prompts=min(part.prompts for part in parts),
        bounds=(float(np.mean(lows)), float(np.mean(highs))),
    )


def compare(replicates: Replicates, runs: pl.DataFrame, baseline: str | None) -> pl.DataFrame:
    """Average each configuration over its seeds, with 95 % intervals and paired differences to the
    configuration `baseline`.

    runs: name (of the configuration) and seed, one row per column of `replicates`.

    Returns one row per configuration, sorted by name:
        name, seeds (their number), estimate, low, high: the mean over seeds and the 2.5 and 97.5
            percentiles of its replicates, clipped to the metric's bounds;
        common_seeds, difference, difference_low, difference_high: configuration minus baseline,
            over the seeds that both have (common_seeds of them);
        p: two-sided, 2·Φ(-|difference|/sd), sd being the standard deviation of the difference's
            replicates. The share of replicates beyond 0 would not resolve below 1/2000, which is
            too coarse for Holm's adjustment over hundreds of configurations;
        p_holm: p adjusted by Holm's method over the table (`holm`).
    Null where undefined: intervals with fewer than two prompts, and differences for the baseline
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
    """p values adjusted by Holm's step-down method (Holm 1979), which bounds the chance of any
    false rejection: the i-th smallest of m becomes max_{j≤i} min(1, (m-j+1)·p_(j)).

    Nulls stay null and are not counted in m.
    """
    tests = p.drop_nulls().to_numpy()
    order = np.argsort(tests, kind="stable")
    steps = np.minimum(tests[order] * np.arange(len(tests), 0, -1), 1.0)
    adjusted = np.empty_like(tests)
    adjusted[order] = np.maximum.accumulate(steps)
    spread = np.full(len(p), np.nan)
    spread[p.is_not_null().to_numpy()] = adjusted
    return pl.Series(p.name, spread).fill_nan(None)


def _interval(estimates: Floats, draws: Floats, prompts: int) -> tuple[float, float, float, float]:
    """Mean over seeds [k], the 2.5 and 97.5 percentiles of its replicates, and their standard
    deviation."""
    k = len(estimates)
    nan = float("nan")
    if k == 0 or np.isnan(estimates).any():
        return nan, nan, nan, nan
    estimate = float(estimates.mean())
    if prompts < 2:
        return estimate, nan, nan, nan
    values = mean_over_seeds(estimates, draws)
    values = values[~np.isnan(values)]
    if not values.size:  # such as the separability of PPE, which is computed from all replicates
        return estimate, nan, nan, nan
    low, high = np.quantile(values, [0.025, 0.975])
    return estimate, float(low), float(high), float(values.std())


def mean_over_seeds(estimates: Floats, draws: Floats, stream: int = 0) -> Floats:
    """Replicates, over prompts and seeds, of the mean over k seeds: float64 [replicates].

    estimates: float64 [k]. draws: float64 [replicates, k], replicates over prompts. stream: below
    2^64; configurations with the same stream and number of seeds draw the same seeds, others draw
    independently. The module's docstring has the formula.
    """
    k = len(estimates)
    # draws.mean(axis=1) would sum in an order that depends on the memory layout.
    values = np.add.reduce([draws[:, seed] for seed in range(k)]) / k
    if k > 1:
        deviations = (estimates - float(estimates.mean())) * np.sqrt(k / (k - 1))
        values = values + _seed_draws(k, len(draws), stream) @ deviations
    return values


def _seed_draws(k: int, replicates: int, stream: int) -> Floats:
    """Share of each of k seeds among k draws with replacement: float64 [replicates, k]."""
    random = generator(k + (stream << 64))
    return random.multinomial(k, np.full(k, 1 / k), replicates) / k


def _p_value(difference: float, deviation: float) -> float:
    if difference == 0:
        return 1.0
    # Where all prompts have the same difference, its variance over other prompts is unknown.
    return float(2 * ndtr(-abs(difference) / deviation)) if deviation > 0 else float("nan")


def _fixed_point(terms: Floats) -> Floats:
    return np.rint(terms * _FIXED_POINT) / _FIXED_POINT
