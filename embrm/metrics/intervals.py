"""Bootstrap intervals over prompts and seeds, and paired differences to a baseline.

The pairs of one prompt are not independent, so prompts are resampled, never pairs (a cluster
bootstrap). Replicate b gives prompt p the count c[b,p] ~ Poisson(1): the Poisson bootstrap, which
for ratios has the same variance as drawing prompts with replacement. A count depends on nothing but
b and the prompt's id, so all runs and all splits that contain a prompt share its counts.
Differences between runs are therefore paired, and a mean over splits accounts for prompts that
several of them contain. A metric is a ratio of sums, recomputed in every replicate:
accuracy = Σ c·wins / Σ c·(pairs - ties).

Seeds are a second source of variance, crossed with prompts. The replicates of the mean over k seeds
have the variance σ² that prompts cause, with that of their interaction with seeds: ι²/k, where ι²
is the variance over prompts of a seed's deviation from the mean of the seeds. ι² is also in s̃², the
variance between seeds, which `embrm.metrics.seed_variance` pools over configurations. What seeds do
to all prompts alike is the rest, so every replicate adds √(max(s̃² - ι², 0)/k)·t, where t is drawn
from Student's distribution with the degrees of freedom f of s̃²: with few, the rest is poorly known.
p is computed from the same sum of a normal variable of variance σ² and of that t. With one seed the
interval covers prompts only.

With several data seeds, what is said of seeds holds for data seeds: the value of each is the mean
over its k seeds, so the variance between data seeds holds that of seeds, over k. Data seeds are
independent, as runs of different data seeds share no random numbers. Where data seeds divide groups
into scenarios, divisions share training data, and s̃²/D over D divisions is replaced by
s̃²·(1/D + r), with r the share held out over the share trained on.

Sources: Owen and Eckles 2012 (arXiv 1106.2125) on crossed bootstraps and the variance components of
prompts and seeds; Chamandy et al. 2012 on the Poisson bootstrap; Behrens 1929 and Fisher 1935 on
sums of a t and another variable; Nadeau and Bengio 2003 (Machine Learning 52) on divisions that
overlap; Holm 1979 on the adjusted p.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import polars as pl
import polars.selectors as cs
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import chi2
from scipy.stats import t as student

from embrm.core.streams import blake2b_number, generator
from embrm.metrics.outcomes import Outcomes
from embrm.metrics.seed_variance import NONE, SeedVariance, of_differences, of_values

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
    overlap: r, share held out over share trained on, where data seeds divide prompts and models
        into scenarios; 0 where they do not.
    Values are NaN where a denominator is zero.
    """

    estimates: Floats
    draws: Floats
    prompts: int
    bounds: tuple[float, float] = _UNBOUNDED
    overlap: float = 0.0


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
        overlap=max(part.overlap for part in parts),
    )


def by_replicate(replicates: Replicates, runs: pl.DataFrame) -> tuple[Replicates, pl.DataFrame]:
    """Average the runs of a configuration and data seed over their seeds, where there are several
    data seeds: the means are then the independent replicates.

    runs: name, seed and, of sweeps with data seeds, data_seed, one row per column of `replicates`.
    Returns both with one column, or row, per replicate. Its number, the data seed, or the seed if
    there is one data seed only, is called seed.
    """
    if "data_seed" not in runs.columns or runs["data_seed"].n_unique() < 2:
        return replace(replicates, overlap=0.0), runs
    keys = runs.select("name", "data_seed").with_row_index("column")
    grouped = keys.group_by("name", "data_seed", maintain_order=True).agg("column")
    places = grouped["column"].to_list()
    averaged = replace(
        replicates,
        estimates=np.array([replicates.estimates[own].mean() for own in places]),
        draws=np.stack([over_seeds(replicates.draws[:, own]) for own in places], axis=1),
    )
    return averaged, grouped.select("name", seed="data_seed")


def covered(runs: pl.DataFrame) -> str:
    """A sentence on the sources of variation that the intervals of `compare` cover, and on those
    that they do not.

    runs: name, seed and perhaps data_seed of the runs.
    """
    seeds = "seeds (initialisation, order, dropout)"
    data = "data seeds (validation split, label flips, subsets, divisions)"
    redrawn = "data_seed" in runs.columns and runs["data_seed"].n_unique() > 1
    inside = ["prompts"]
    if redrawn or runs["seed"].n_unique() > 1:
        inside.append(seeds)
    if redrawn:
        inside.append(data)
    outside = [source for source in (seeds, data) if source not in inside]
    return (
        f"Intervals cover {' and '.join(inside)}; they do not cover "
        f"{', '.join([*outside, 'other training data'])} or another language model."
    )


def compare(
    replicates: Replicates,
    runs: pl.DataFrame,
    baseline: str | None,
    names: Collection[str] | None = None,
) -> pl.DataFrame:
    """Average each configuration over its seeds, with 95 % intervals and paired differences to the
    configuration `baseline`.

    runs: name (of the configuration), seed and perhaps data_seed, one row per column of
        `replicates`. With several data seeds, "seed" stands below for a data seed, whose value is
        the mean over its seeds. names: the configurations to return; None: all.

    The variance between seeds is pooled over the configurations that have all seeds in question and
    whose outcomes depend on the seed, whether they are returned or not.

    Returns one row per configuration, sorted by name:
        name, seeds (their number), estimate, low, high: the mean over seeds and its interval,
            clipped to the metric's bounds;
        common_seeds, difference, difference_low, difference_high: configuration minus baseline,
            over the seeds that both have (common_seeds of them);
        p: two-sided, that of |difference| over its standard deviation. The share of replicates
            beyond 0 would not resolve below 1/2000, which is too coarse for Holm's adjustment over
            hundreds of configurations;
        p_holm: p adjusted by Holm's method over the table (`holm`).
    Null where undefined: intervals with fewer than two prompts, and differences for the baseline
    itself, without common seeds, or without a baseline.
    """
    replicates, runs = by_replicate(replicates, runs)
    seeds_of: dict[str, dict[int, int]] = {}
    for column, (name, seed) in enumerate(runs.select("name", "seed").iter_rows()):
        seeds_of.setdefault(name, {})[seed] = column
    reference = seeds_of.get(baseline, {}) if baseline is not None else {}
    pools = _Pools(replicates, seeds_of, baseline)
    rows = []
    for name, columns in sorted(seeds_of.items()):
        if names is not None and name not in names:
            continue
        own = list(columns.values())
        estimate, low, high, _ = _interval(
            replicates.estimates[own],
            replicates.draws[:, own],
            replicates.prompts,
            pools.of_value(name, columns),
            replicates.overlap,
        )
        common = sorted(columns.keys() & reference.keys()) if name != baseline else []
        ours = [columns[seed] for seed in common]
        theirs = [reference[seed] for seed in common]
        difference, difference_low, difference_high, p = _interval(
            replicates.estimates[ours] - replicates.estimates[theirs],
            replicates.draws[:, ours] - replicates.draws[:, theirs],
            replicates.prompts,
            pools.of_difference(name, common),
            replicates.overlap,
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
                "p": p,
            }
        )
    table = pl.DataFrame(rows, schema=_COMPARISON).with_columns(cs.float().fill_nan(None))
    return table.with_columns(p_holm=holm(table["p"]))


class _Pools:
    """Variances between seeds of the configurations of one table."""

    def __init__(
        self, replicates: Replicates, seeds_of: dict[str, dict[int, int]], baseline: str | None
    ) -> None:
        self._replicates = replicates
        self._seeds_of = seeds_of
        self._baseline = baseline
        self._found: dict[tuple[int, ...], tuple[dict[str, SeedVariance], ...]] = {}

    def of_value(self, name: str, seeds: Iterable[int]) -> SeedVariance:
        return self._of(seeds)[0].get(name, NONE)

    def of_difference(self, name: str, seeds: Iterable[int]) -> SeedVariance:
        """Of the configuration minus the baseline. Where seeds change one of the two only, its
        variance is that of the difference."""
        values, differences = self._of(seeds)
        return differences.get(name) or values.get(name) or values.get(self._baseline or "", NONE)

    def _of(self, seeds: Iterable[int]) -> tuple[dict[str, SeedVariance], ...]:
        """Variances over these seeds of the values and of the differences to the baseline, by name,
        of all configurations that have the seeds and depend on them."""
        key = tuple(sorted(seeds))
        if key not in self._found:
            self._found[key] = self._pool(key) if len(key) > 1 else ({}, {})
        return self._found[key]

    def _pool(self, seeds: tuple[int, ...]) -> tuple[dict[str, SeedVariance], ...]:
        names, columns = [], list[list[int]]()
        for name, own in sorted(self._seeds_of.items()):
            if own.keys() >= set(seeds):
                places = [own[seed] for seed in seeds]
                if _depends(self._replicates, places):
                    names.append(name)
                    columns.append(places)
        if not names:
            return {}, {}
        table = np.array(columns).T  # [seeds, configurations]
        values, draws = self._replicates.estimates[table], self._replicates.draws[:, table]
        alone = dict(zip(names, of_values(values, draws), strict=True))
        if self._baseline not in names:
            return alone, {}
        differences = of_differences(values, draws, names.index(self._baseline))
        return alone, dict(zip(names, differences, strict=True))


def _depends(replicates: Replicates, places: list[int]) -> bool:
    """Whether these runs, which differ in their seeds only, have different outcomes on any prompt;
    equal means over prompts alone may be chance."""
    estimates, draws = replicates.estimates[places], replicates.draws[:, places]
    if np.isnan(estimates).any():
        return False
    return bool((estimates != estimates[0]).any() or (draws != draws[:, :1]).any())


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


def _interval(
    estimates: Floats, draws: Floats, prompts: int, seeds: SeedVariance, overlap: float
) -> tuple[float, float, float, float]:
    """Mean over seeds [k], its 95 % interval, and p of its difference from 0."""
    k = len(estimates)
    nan = float("nan")
    if k == 0 or np.isnan(estimates).any():
        return nan, nan, nan, nan
    estimate = float(estimates.mean())
    if prompts < 2:
        return estimate, nan, nan, nan
    values = over_seeds(draws)
    known = ~np.isnan(values)
    if not known.any():  # such as the separability of PPE, which is computed from all replicates
        return estimate, nan, nan, nan
    draws, values = draws[known], values[known]
    variance, rest = float(values.var()), 0.0
    if seeds.variance > 0:
        interaction = float((draws - values[:, None]).var(axis=0).sum()) / (k - 1)
        rest = max(seeds.variance * (1 + k * overlap) - interaction, 0.0) / k
        values = values + np.sqrt(rest) * _student_scores(len(known), seeds.freedom)[known]
    low, high = np.quantile(values, [0.025, 0.975])
    return estimate, float(low), float(high), _p_value(estimate, variance, rest, seeds.freedom)


def over_seeds(draws: Floats) -> Floats:
    """Mean of replicates over the seeds of a configuration. draws: float64 [replicates, seeds]."""
    # draws.mean(axis=1) would sum in an order that depends on the memory layout.
    k = draws.shape[1]
    return np.add.reduce([draws[:, seed] for seed in range(k)]) / k


@lru_cache(maxsize=64)
def _student_scores(replicates: int, freedom: float) -> Floats:
    """Quantiles of Student's t in an order that depends on their number alone: a sample without
    noise in its percentiles."""
    scores = student.ppf((np.arange(replicates) + 0.5) / replicates, freedom)
    return generator(0).permutation(scores)


def _p_value(difference: float, variance: float, rest: float, freedom: float) -> float:
    """P(|x| ≥ |difference|) of x = √variance·z + √rest·t, with z standard normal and t Student's:
    the mean of 2·Φ(-|difference|/√(variance + rest/w)) over w = χ²/freedom."""
    if difference == 0:
        return 1.0
    # Where all prompts have the same difference, its variance over other prompts is unknown.
    if variance + rest <= 0:
        return float("nan")
    if rest == 0:
        return float(2 * ndtr(-abs(difference) / np.sqrt(variance)))
    w, weights = _chi_squares(freedom)
    return float(weights @ (2 * ndtr(-abs(difference) / np.sqrt(variance + rest / w))))


@lru_cache(maxsize=64)
def _chi_squares(freedom: float) -> tuple[Floats, Floats]:
    """Values of χ²/freedom and weights that sum to 1, dense at 0, where far tails come from."""
    edges = np.linspace(0, 1, 401)
    middle = (edges[1:] + edges[:-1]) / 2
    return chi2.ppf(middle**4, freedom) / freedom, np.diff(edges**4)


def _fixed_point(terms: Floats) -> Floats:
    return np.rint(terms * _FIXED_POINT) / _FIXED_POINT
