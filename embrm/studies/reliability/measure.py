"""Reliability of stored runs on every evaluation split, from rewards computed again."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from embrm.metrics.reliability import reliability as binned
from embrm.results.ledger import Results, cache_of
from embrm.sweeps.selection import evaluation_splits


def measure_reliability(
    results: Results, names: Sequence[str], cache: Path | None = None
) -> pl.DataFrame:
    """Of the configurations `names`, all their finished seeds together, on every evaluation split
    with pairs.

    cache: where it is now, if it has moved.

    Columns: split, name, at_temperature (whether margins are divided by the temperature of their
    run; only where every seed has one) and those of `metrics.reliability.reliability`.
    Raises: UserError when the cache is not there or another one, or runs have no heads to score
    with, as those of a fine-tune.
    """
    runs = results.ledger.filter(pl.col("config").is_in(names), pl.col("status") == "ok").sort(
        "config", "seed"
    )
    source = cache_of(results, cache)
    # torch is loaded here, where heads score: not by a report whose cache is not there.
    from embrm.results.rewards import rewarded
    from embrm.results.weights import load_run

    every = evaluation_splits(source, results.spec.selection(results.cache_id))
    splits = {name: every[name] for name in results.evaluated if name in every}
    splits = {name: split for name, split in splits.items() if split.weight.any()}
    if not splits:
        return pl.DataFrame()
    rows = np.unique(np.concatenate([split.rows for split in splits.values()]))
    saved = [load_run(results.folder, run_id) for run_id in runs["run_id"]]
    rewards = rewarded(source, saved, rows)
    fitted = runs["temperature"].to_numpy()
    found = []
    for split_name, split in splits.items():
        here = rewards[:, np.searchsorted(rows, split.rows)]
        for name in names:
            own = (runs["config"] == name).to_numpy()
            for at_temperature, temperatures in (
                (False, np.ones(own.sum())),
                (True, fitted[own]),
            ):
                if np.isnan(temperatures).any():
                    continue
                found.append(
                    binned(split, here[own], temperatures).select(
                        pl.lit(split_name).alias("split"),
                        pl.lit(name).alias("name"),
                        pl.lit(at_temperature).alias("at_temperature"),
                        pl.all(),
                    )
                )
    return pl.concat(found)
