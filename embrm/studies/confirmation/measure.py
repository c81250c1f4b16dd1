"""How far a sweep's ranking holds when its configurations are fine-tuned: the numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from embrm.core.errors import UserError
from embrm.metrics.agreement import Stage, agreement
from embrm.metrics.intervals import Replicates, compare, mean, replicate
from embrm.metrics.outcomes import Outcomes
from embrm.results.comparison import MEAN, metrics
from embrm.results.ledger import Results

VALUE = ("estimate", "low", "high")
"""Columns of `intervals.compare` with a configuration's own value and its 95 % interval."""

GAIN = ("difference", "difference_low", "difference_high")
"""Columns of `intervals.compare` with the difference to the baseline and its 95 % interval."""

METRICS = ("accuracy", "tau", "nll")
"""Metrics that can be compared, in the order in which they are reported."""


@dataclass(frozen=True)
class Match:
    """A configuration of the sweep and the fine-tuned configuration that stands for it.

    name: the configuration in the sweep. rank: its rank there, from 1. by: the entries of --runs
    that chose it. full: its name in the fine-tune; configurations that differ only in what a
    fine-tune does not use share one. left: settings that the fine-tune does not take over, because
    they exist for frozen states alone or the fine-tune sets them itself.
    """

    name: str
    rank: int
    by: str
    full: str
    left: tuple[str, ...]


@dataclass(frozen=True)
class Excluded:
    """A configuration of the sweep that is not compared, its rank from 1, and the reason."""

    name: str
    rank: int
    reason: str


@dataclass(frozen=True)
class Confirmation:
    """The comparison of a sweep with the fine-tune of some of its configurations.

    splits: the evaluation splits that are compared. ranked_splits: those of them that the sweep's
    ranking averages over; if there are several, their mean is reported as a split of its own.
    matches: the configurations compared, in the sweep's order. untuned: chosen configurations
    without a finished fine-tune. excluded: configurations of the sweep that cannot be fine-tuned.
    points: one row per split, metric and configuration: `split`, `metric`, `name`, `full_name`,
    and with the prefixes `frozen_` and `full_` the columns `seeds`, `VALUE` and `GAIN`, computed
    as `embrm report` computes them for each results folder.
    agreement: `split`, `metric`, `prompts` and the columns of `metrics.agreement.agreement`.
    """

    title: str
    baseline: str
    splits: tuple[str, ...]
    ranked_splits: tuple[str, ...]
    matches: tuple[Match, ...]
    untuned: tuple[Excluded, ...]
    excluded: tuple[Excluded, ...]
    points: pl.DataFrame
    agreement: pl.DataFrame


def compare_stages(
    frozen: Results,
    full: Results,
    matches: Sequence[Match],
    excluded: Sequence[Excluded],
    baseline: str,
    ranked_splits: Sequence[str],
) -> Confirmation:
    """Compare the sweep `frozen` with `full`, the fine-tune of its configurations `matches`.

    baseline: the configuration of the sweep from which gains are measured. ranked_splits: the
    splits that the mean is taken over.

    Raises: UserError when the two results are of different caches, data or splits, or when fewer
    than two different configurations have a finished fine-tune.
    """
    if full.cache_id != frozen.cache_id:
        raise UserError(
            f"{full.folder} was made with cache {full.cache_id}, {frozen.folder} with "
            f"{frozen.cache_id}: confirm a sweep with a fine-tune of the same cache"
        )
    tuned_runs = _finished_runs(full, {match.full for match in matches})
    compared = tuple(match for match in matches if match.full in tuned_runs["name"])
    if len({match.full for match in compared}) < 2:
        raise UserError(
            f"{full.folder} has finished runs of fewer than 2 of the configurations: "
            "there is nothing to compare, lower lr or fine-tune more"
        )
    frozen_runs = _finished_runs(frozen, {match.name for match in compared})
    splits = _common_splits(frozen, full)
    baseline_place = next(
        (place for place, match in enumerate(compared) if match.name == baseline), None
    )
    points, agreements = [], []
    resampled = _resampled(frozen, full, splits, frozen_runs, tuned_runs, ranked_splits)
    for (split, metric), (x, y) in resampled.items():
        tags = [pl.lit(split).alias("split"), pl.lit(metric).alias("metric")]
        table = _points(x, y, frozen_runs, tuned_runs, compared, baseline)
        points.append(table.select(*tags, pl.all()))
        result = agreement(
            Stage.of(x, frozen_runs, [match.name for match in compared], metric, "frozen"),
            Stage.of(y, tuned_runs, [match.full for match in compared], metric, "full"),
            baseline_place,
        )
        prompts = pl.lit(min(x.prompts, y.prompts)).alias("prompts")
        agreements.append(result.select(*tags, prompts, pl.all()))
    return Confirmation(
        title=frozen.folder.name,
        baseline=baseline,
        splits=tuple(splits),
        ranked_splits=tuple(split for split in ranked_splits if split in splits),
        matches=compared,
        untuned=tuple(
            Excluded(match.name, match.rank, _why_untuned(full, match.full))
            for match in matches
            if match not in compared
        ),
        excluded=tuple(excluded),
        points=pl.concat(points),
        agreement=pl.concat(agreements),
    )


def _finished_runs(results: Results, names: set[str]) -> pl.DataFrame:
    """Columns run_id, name and seed of the evaluated runs of the configurations `names`."""
    return (
        results.ledger.rename({"config": "name"})
        .filter(pl.col("name").is_in(list(names)))
        .join(results.outcomes, on="run_id", how="semi")
        .select("run_id", "name", "seed")
        .sort("name", "seed", "run_id")
    )


def _common_splits(frozen: Results, full: Results) -> list[str]:
    splits = [split for split in frozen.evaluated if split in full.prompts["split"]]
    if not splits:
        raise UserError(
            f"{full.folder} and {frozen.folder} have no evaluation split in common: "
            "leave evaluate out of the fine-tune's spec"
        )
    return splits


def _resampled(
    frozen: Results,
    full: Results,
    splits: Sequence[str],
    frozen_runs: pl.DataFrame,
    tuned_runs: pl.DataFrame,
    ranked_splits: Sequence[str],
) -> dict[tuple[str, str], tuple[Replicates, Replicates]]:
    """Bootstrap replicates of both stages for every split and metric; last, the means over the
    ranked splits.

    Raises: UserError when the stages evaluated different prompts of a split.
    """
    found: dict[tuple[str, str], tuple[Replicates, Replicates]] = {}
    for split in splits:
        cheap, costly = _outcomes(frozen, split, frozen_runs), _outcomes(full, split, tuned_runs)
        identity = ("subset", "prompt_id", "pairs")
        if not cheap.prompts.select(identity).equals(costly.prompts.select(identity)):
            raise UserError(
                f"split {split!r} has other prompts in {full.folder} than in {frozen.folder}: "
                "run the older of the two again"
            )
        known = metrics(cheap)
        for metric in [*known, *(["nll"] if "accuracy" in known else [])]:
            found[split, metric] = replicate(cheap, metric), replicate(costly, metric)
    for metric in METRICS:
        parts = [found[split, metric] for split in ranked_splits if (split, metric) in found]
        if len(parts) > 1:
            found[MEAN, metric] = mean(x for x, _ in parts), mean(y for _, y in parts)
    return found


def _outcomes(results: Results, split: str, runs: pl.DataFrame) -> Outcomes:
    return Outcomes.of(
        results.prompts.filter(pl.col("split") == split),
        results.outcomes.filter(pl.col("split") == split),
        runs["run_id"].to_list(),
    )


def _why_untuned(full: Results, name: str) -> str:
    status = full.ledger.filter(pl.col("config") == name)["status"]
    if not status.is_empty() and (status == "diverged").all():
        return "its fine-tune diverged in every seed"
    return "its fine-tune has not finished"


def _points(
    x: Replicates,
    y: Replicates,
    frozen_runs: pl.DataFrame,
    tuned_runs: pl.DataFrame,
    matches: Sequence[Match],
    baseline: str,
) -> pl.DataFrame:
    """The rows of `Confirmation.points` of one split and metric, a row per match."""
    full_baseline = next((match.full for match in matches if match.name == baseline), None)
    pairs = pl.DataFrame(
        [(match.name, match.full) for match in matches],
        schema={"name": pl.String, "full_name": pl.String},
        orient="row",
    )
    for prefix, key, table in (
        ("frozen", "name", compare(x, frozen_runs, baseline)),
        ("full", "full_name", compare(y, tuned_runs, full_baseline)),
    ):
        columns = table.select(
            pl.col("name").alias(key), pl.col("seeds", *VALUE, *GAIN).name.prefix(f"{prefix}_")
        )
        pairs = pairs.join(columns, on=key, how="left", maintain_order="left")
    return pairs
