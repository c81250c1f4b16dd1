"""A made-up sweep and the made-up fine-tune of its configurations."""

from pathlib import Path

import polars as pl
from small_stage import small_stage

from embrm.results.ledger import Results, open_results
from embrm.studies.confirmation.measure import Confirmation, Excluded, Match

FROZEN = {"a|b $x$": 0.75, "a-lr": 0.74, "hinge": 0.68, "bt": 0.6, "low": 0.5, "worse": 0.4}
FULL = {"a|b $x$": 0.8, "hinge": 0.72, "bt": 0.74, "low": 0.6, "worse": None}
MATCHES = tuple(
    Match(name, rank, "top:6", "a|b $x$" if name == "a-lr" else name, ())
    for rank, name in enumerate(FROZEN, start=1)
)
EXCLUDED = (Excluded("mean", 7, "state = 'mean'"), Excluded("tokens", 9, "state = 'mean'"))


def frozen_results(folder: Path) -> Results:
    return open_results(small_stage(folder / "swept", FROZEN))


def full_results(folder: Path) -> Results:
    # With other seeds than the sweep: nothing may match seeds of the two stages.
    return open_results(small_stage(folder / "tuned", FULL, seeds=(7, 8), stage=1))


def statistic(confirmation: Confirmation, name: str, split: str, metric: str) -> float | None:
    """A statistic of the agreement of the two stages."""
    return confirmation.agreement.filter(
        pl.col("statistic") == name, pl.col("split") == split, pl.col("metric") == metric
    )["value"][0]
