"""Compare two sweeps: paired differences of the configurations that both have."""

from dataclasses import replace

import numpy as np
import polars as pl
import polars.selectors as cs

from embrm.core.errors import UserError
from embrm.metrics.intervals import Replicates, compare, holm, replicate
from embrm.metrics.outcomes import Outcomes
from embrm.results.comparison import available_metrics
from embrm.results.ledger import Results, with_data_seed

_SIDES = ("this", "other")
_SEEDS = ("data_seed", "seed")
_ZERO = ""  # which names no configuration


def compare_sweeps(this: Results, other: Results) -> pl.DataFrame:
    """Compare configurations of the same name on the splits that both sweeps evaluate.

    Returns one row per split, metric (accuracy, or tau for groups) and configuration: estimate and
    other_estimate (means over seeds), common_seeds, difference (this minus other, over the common
    seeds) with its 95 % bootstrap interval over prompts and seeds, p, and p_holm (Holm's adjustment
    over the whole table). The variance of the differences between seeds is pooled over the
    configurations (`embrm.metrics.seed_variance`).

    Raises: UserError where the sweeps share no configuration, or no split with the same prompts.
    """
    names = sorted({*_finished(this)["config"]} & {*_finished(other)["config"]})
    if not names:
        raise UserError(
            f"{this.folder} and {other.folder} have no finished configuration of the same name: "
            "compare sweeps whose specs share some"
        )
    found = []
    for split in this.evaluated:
        prompts = _prompts(this, split)
        if split in other.evaluated and prompts.equals(_prompts(other, split)):
            sides = [_outcomes(results, split, prompts, names) for results in (this, other)]
            overlap = max(one.overlaps.get(split, 0.0) for one in (this, other))
            found += [
                _table(split, metric, sides, overlap) for metric in available_metrics(sides[0][1])
            ]
    if not found:
        raise UserError(
            f"{this.folder} and {other.folder} have no evaluation split with the same prompts: "
            "compare sweeps of the same data"
        )
    table = pl.concat(found)
    return table.with_columns(p_holm=holm(table["p"]))


def _finished(results: Results) -> pl.DataFrame:
    return results.ledger.filter(status="ok")


def _prompts(results: Results, split: str) -> pl.DataFrame:
    return results.prompts.filter(pl.col("split") == split).drop("split")


def _outcomes(
    results: Results, split: str, prompts: pl.DataFrame, names: list[str]
) -> tuple[pl.DataFrame, Outcomes]:
    runs = with_data_seed(_finished(results)).filter(pl.col("config").is_in(names))
    runs = runs.select("run_id", pl.col("config").alias("name"), *_SEEDS).sort("name", *_SEEDS)
    own = results.outcomes.filter(pl.col("split") == split)
    outcomes = Outcomes.of(prompts, own, runs["run_id"].to_list(), runs["data_seed"].to_list())
    return runs, outcomes


def _table(
    split: str, metric: str, sides: list[tuple[pl.DataFrame, Outcomes]], overlap: float
) -> pl.DataFrame:
    """One row per configuration."""
    both = replicate(Outcomes.side_by_side([outcomes for _, outcomes in sides]), metric)
    both = replace(both, overlap=overlap)
    runs = pl.concat(
        runs.select("name", *_SEEDS, side=pl.lit(side))
        for side, (runs, _) in zip(_SIDES, sides, strict=True)
    ).with_columns(estimate=both.estimates)
    means = runs.group_by("name", "side").agg(pl.col("estimate").mean()).pivot("side", index="name")
    return (
        means.select("name", estimate=_SIDES[0], other_estimate=_SIDES[1])
        .join(_differences(both, runs), on="name", how="left")
        .sort("name")
        .select(
            pl.lit(split).alias("split"),
            pl.lit(metric).alias("metric"),
            pl.col("name").alias("config"),
            *("estimate", "other_estimate"),
            pl.col("common_seeds").fill_null(0),
            *("difference", "difference_low", "difference_high", "p"),
        )
        .with_columns(cs.float().fill_nan(None))
    )


def _differences(both: Replicates, runs: pl.DataFrame) -> pl.DataFrame:
    """`intervals.compare` of each run minus the run of the same name and seed in the other sweep,
    to a configuration that is 0 throughout: the variance of the differences between seeds is pooled
    over configurations.

    runs: name, data_seed, seed and side, one row per column of `both`.
    """
    places = runs.with_row_index("place").pivot("side", index=["name", *_SEEDS], values="place")
    common = places.drop_nulls().sort("name", *_SEEDS)
    ours, theirs = (common[side].to_list() for side in _SIDES)
    seeds = common.select(_SEEDS).unique().sort(_SEEDS)
    changes = Replicates(
        np.append(both.estimates[ours] - both.estimates[theirs], np.zeros(len(seeds))),
        np.pad(both.draws[:, ours] - both.draws[:, theirs], ((0, 0), (0, len(seeds)))),
        both.prompts,
        overlap=both.overlap,
    )
    zeros = seeds.select(pl.lit(_ZERO).alias("name"), *_SEEDS)
    compared = compare(changes, pl.concat([common.select("name", *_SEEDS), zeros]), _ZERO)
    return compared.select(
        "name", "common_seeds", "difference", "difference_low", "difference_high", "p"
    )
