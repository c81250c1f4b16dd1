"""Measure the calibration of stored runs, for the report's reliability diagrams.

The ledger has one calibration error per run and split; the bins need the rewards of every pair,
which are computed again from the stored heads and the cached states.
"""

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
    """Compute the bins of a reliability diagram for configurations, on every split with pairs.

    names: configurations; the finished seeds of each are pooled. cache: the cache's current path,
    if it has moved.

    Columns: split, name, at_temperature (whether reward differences are divided by the temperature
    that each run fitted on its validation pairs), and those of `metrics.reliability.reliability`.
    There are no rows at the temperature for a configuration if one of its seeds has none.
    Raises: UserError when the cache is missing or has another id, or a run has no stored head, such
    as a fine-tuned model.
    """
    runs = results.ledger.filter(pl.col("config").is_in(names), pl.col("status") == "ok").sort(
        "config", "seed"
    )
    source = cache_of(results, cache)
    # Imported late, so that a report without its cache does not load torch.

    from embrm.results.rewards import rewards_of_responses
    from embrm.results.weights import load_run

    every = evaluation_splits(source, results.spec.selection(results.cache_id))
    splits = {name: every[name] for name in results.evaluated if name in every}
    splits = {name: split for name, split in splits.items() if split.weight.any()}
    if not splits:
        return pl.DataFrame()
    rows = np.unique(np.concatenate([split.rows for split in splits.values()]))
    saved = [load_run(results.folder, run_id) for run_id in runs["run_id"]]
    rewards = rewards_of_responses(source, saved, rows)
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
