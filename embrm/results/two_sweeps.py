"""Compare two sweeps: paired differences of the configurations that both have."""

import polars as pl

from embrm.core.errors import UserError
from embrm.metrics.intervals import compare, holm, replicate
from embrm.metrics.outcomes import Outcomes
from embrm.results.comparison import available_metrics
from embrm.results.ledger import Results

_SIDES = ("this", "other")


def compare_sweeps(this: Results, other: Results) -> pl.DataFrame:
    """Compare configurations of the same name on the splits that both sweeps evaluate.

    Returns one row per split, metric (accuracy, or tau for groups) and configuration: estimate and
    other_estimate (means over seeds), common_seeds, difference (this minus other, over the common
    seeds) with its 95 % bootstrap interval over prompts and seeds, p, and p_holm (Holm's adjustment
    over the whole table).

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
            sides = [_outcomes(results, split, prompts) for results in (this, other)]
            for metric in available_metrics(sides[0][1]):
                found += [_row(split, metric, name, sides) for name in names]
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


def _outcomes(results: Results, split: str, prompts: pl.DataFrame) -> tuple[pl.DataFrame, Outcomes]:
    runs = _finished(results).select("run_id", "config", "seed").sort("config", "seed")
    own = results.outcomes.filter(pl.col("split") == split)
    return runs, Outcomes.of(prompts, own, runs["run_id"].to_list())


def _row(
    split: str, metric: str, name: str, sides: list[tuple[pl.DataFrame, Outcomes]]
) -> pl.DataFrame:
    chosen, parts = [], []
    for side, (runs, outcomes) in zip(_SIDES, sides, strict=True):
        places = (runs["config"] == name).arg_true().to_list()
        chosen.append(pl.DataFrame({"name": side, "seed": runs["seed"].gather(places)}))
        parts.append(outcomes.by(places))
    both = Outcomes.side_by_side(parts)
    table = compare(replicate(both, metric), pl.concat(chosen), "other")
    here, there = (table.filter(name=side) for side in _SIDES)
    return pl.DataFrame({"split": split, "metric": metric, "config": name}).hstack(
        here.select(
            "estimate",
            pl.lit(there["estimate"][0]).alias("other_estimate"),
            *("common_seeds", "difference", "difference_low", "difference_high", "p"),
        )
    )
