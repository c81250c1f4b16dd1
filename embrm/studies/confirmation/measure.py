"""Measure how far a sweep on frozen states ranks its configurations as fine-tuning would.

The two stages are the sweep ("frozen") and the fine-tune of its configurations ("full").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from embrm.core.errors import UserError
from embrm.metrics.agreement import Stage, agreement
from embrm.metrics.intervals import Replicates, compare, mean, replicate
from embrm.metrics.outcomes import Outcomes
from embrm.results.comparison import MEAN, available_metrics
from embrm.results.ledger import Results

VALUE = ("estimate", "low", "high")
"""Columns of `intervals.compare` with a configuration's own value and its 95 % interval."""

GAIN = ("difference", "difference_low", "difference_high")
"""Columns of `intervals.compare` with the difference to the baseline and its 95 % interval."""

METRICS = ("accuracy", "tau", "nll")
"""Metrics that can be compared, in the order in which they are reported."""


@dataclass(frozen=True)
class Match:
    """A configuration of the sweep and the fine-tuned configuration that it is compared with."""

    name: str
    """Name in the sweep."""
    rank: int
    """Rank in the sweep, from 1."""
    by: str
    """The entries of --runs that chose it."""
    full: str
    """Name in the fine-tune. Configurations that differ only in settings that a fine-tune does not
    use have the same."""
    left: tuple[str, ...]
    """Settings that the fine-tune does not take over, because they exist for frozen states alone or
    the fine-tune sets them itself."""


@dataclass(frozen=True)
class Excluded:
    """A configuration of the sweep that is not compared, its rank in the sweep, and the reason."""

    name: str
    rank: int
    reason: str


@dataclass(frozen=True)
class Confirmation:
    """The comparison of a sweep with the fine-tune of some of its configurations.

    baseline: the configuration of the sweep over which gains are measured.
    splits: the evaluation splits that are compared. ranked_splits: those of them that the sweep's
    ranking averages over; if there are several, their mean is one more split, named `MEAN`.
    matches: the configurations compared, in the order of the sweep's ranking. untuned: chosen
    configurations without a finished fine-tune. excluded: configurations that cannot be fine-tuned.
    points: one row per split, metric and configuration: `split`, `metric`, `name`, `full_name`,
    and, with the prefixes `frozen_` and `full_`, `seeds` and the columns `VALUE` and `GAIN`, as
    `embrm report` computes them for either results folder.
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

    excluded: configurations that cannot be fine-tuned, for the record. baseline: the configuration
    of the sweep over which gains are measured. ranked_splits: the splits to average over.

    Raises: UserError when the two stages have different caches, prompts or splits, or when fewer
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
            f"{full.folder} has finished runs of fewer than 2 of the configurations, so there is "
            "no ranking to compare: fine-tune more of them, or lower lr if they diverged"
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
    """The columns run_id, name and seed of all evaluated runs of the configurations `names`."""
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
    """Bootstrap replicates of both stages by (split, metric), the means over ranked splits last.

    Raises: UserError when the stages evaluated different prompts of a split.
    """
    found: dict[tuple[str, str], tuple[Replicates, Replicates]] = {}
    for split in splits:
        x, y = _outcomes(frozen, split, frozen_runs), _outcomes(full, split, tuned_runs)
        identity = ("subset", "prompt_id", "pairs")
        if not x.prompts.select(identity).equals(y.prompts.select(identity)):
            raise UserError(
                f"split {split!r} has other prompts in {full.folder} than in {frozen.folder}: "
                "run the older of the two again"
            )
        known = available_metrics(x)
        for metric in [*known, *(["nll"] if "accuracy" in known else [])]:
            found[split, metric] = replicate(x, metric), replicate(y, metric)
    for metric in METRICS:
        parts = [found[split, metric] for split in ranked_splits if (split, metric) in found]
        if len(parts) > 1:
            of_frozen, of_full = zip(*parts, strict=True)
            found[MEAN, metric] = mean(of_frozen), mean(of_full)
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
    """The rows of `Confirmation.points` for one split and metric, one per match."""

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
