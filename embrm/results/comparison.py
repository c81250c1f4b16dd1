"""Compare the configurations of a finished sweep: ranking, paired differences to a baseline, and
bootstrap intervals. The report and the other studies read the result."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl

from embrm.core.errors import UserError, nearest
from embrm.metrics.geometry import MEASURES as GEOMETRY
from embrm.metrics.intervals import Replicates, compare, covered, mean, replicate
from embrm.metrics.outcomes import Outcomes
from embrm.metrics.robustness import noise_falls, noise_lines, scenario_falls
from embrm.results.distortion import measure_distortion
from embrm.results.ledger import Results, with_data_seed
from embrm.sweeps.ledger import training_name

MEASURES = (
    *("accuracy", "ties", "nll", "brier", "ece", "nll_calibrated", "brier_calibrated"),
    *("ece_calibrated", "margin", "reward_mean", "reward_sd", "tau", "length_accuracy"),
    *("disagreement", "disagreement_auroc"),
)
"""Metrics whose means over seeds the report shows, from the ledger's columns `metric@split`."""

MEAN = "mean"
"""Name of the mean over the evaluation splits, where a split's name is expected."""

_DETAILED = 4
"""Number of configurations, besides the baseline, whose accuracy is shown by subset."""

_MANY = 8
"""With more splits than this, results under label noise are shown for the mean over splits only."""


@dataclass(frozen=True)
class Comparison:
    """All results of a sweep that the report shows. Accuracies are shares in 0 … 1.

    Tables have one row per configuration (name) and, where they have the column, split. "Compared"
    stands for the columns of `intervals.compare`: the mean over seeds with its interval, and the
    difference to the baseline.

    splits: the evaluation splits that have results.
    ranked_by: what ranks the configurations: a split, the first part of some names, or "mean".
    ranked_splits: the splits that the ranking averages over. unranked_splits: those left out of it
        because they have fewer than two prompts.
    metric: the ranking's metric: accuracy, or tau (Kendall's τ-b) where there are groups only.
    ranking: rank, compared, and run_ids in the order of their seeds; best first.
    at_epoch_limit: configurations, in the ranking's order, with a run that used all its epochs
        before early stopping could end it.
    scores: split, metric, prompts, and compared.
    measures: split, name and `MEASURES`, means over seeds; null unless every seed has a value.
    subsets: split, subset, prompts, and compared; the best configurations and the baseline only.
    lengths: split, pairs, prompts, and the accuracy of preferring the longer response (estimate,
        low, high).
    leak_free: split, removed (a number of prompts), prompts, and compared, without the prompts that
        also occur in the train splits.
    validation: name, and the accuracy on the validation pairs, mean over seeds.
    geometry: split, name and `geometry.MEASURES`, aggregated as measures; empty where no run was
        measured. trained_on: the name that the training responses have in its column split.
    distortion: name, regularizer (its kind), kl and kl_sd (KL at the token rows of the training
        responses, nats: mean over seeds and standard deviation), twin (the configuration that
        differs in having no regularizer only), twin_kl, twin_kl_sd, estimate, low, high of the
        ranking's metric, and its difference to the twin (difference, difference_low,
        difference_high); configurations with a regularizer or an adapter, and twins, in the
        ranking's order. Null where undefined or not measured.
    scenarios: the splits that the sweep's scenarios made of groups, the nearest to training first.
    scenario_falls: metric, and compared, for the last scenario minus the first.
    noise: split (or "mean", over the ranked splits), line, label_noise, name, estimate, low, high,
        for configurations that differ in label noise only (`robustness.noise_lines`).
    noise_falls: split, and compared with the line as name, for the highest rate of label noise
        minus the lowest.
    unfinished: name, status, and number of the runs without a result.
    covered: a sentence on the sources of variation that the intervals cover.
    """

    title: str
    baseline: str | None
    splits: tuple[str, ...]
    ranked_by: str
    ranked_splits: tuple[str, ...]
    unranked_splits: tuple[str, ...]
    metric: str
    ranking: pl.DataFrame
    at_epoch_limit: tuple[str, ...]
    scores: pl.DataFrame
    measures: pl.DataFrame
    subsets: pl.DataFrame
    lengths: pl.DataFrame
    leak_free: pl.DataFrame
    validation: pl.DataFrame
    geometry: pl.DataFrame
    trained_on: str
    distortion: pl.DataFrame
    scenarios: tuple[str, ...]
    scenario_falls: pl.DataFrame
    noise: pl.DataFrame
    noise_falls: pl.DataFrame
    unfinished: pl.DataFrame
    covered: str

    def best(self, top: int) -> list[str]:
        """The first `top` configurations of the ranking, and the baseline where it is not one."""
        names = self.ranking["name"].to_list()[:top]
        baseline = self.baseline
        return names if baseline is None or baseline in names else [*names, baseline]

    def longer_is_better(self) -> float | None:
        """Accuracy of preferring the longer response, averaged over the ranked splits; None where
        the ranking's metric is tau."""
        if self.metric != "accuracy":
            return None
        ranked = self.lengths.filter(pl.col("split").is_in(self.ranked_splits))
        mean = ranked["estimate"].mean()
        return float(mean) if isinstance(mean, float) else None


@dataclass(frozen=True)
class ComparedTables:
    """The tables of a sweep that `compare_runs` reads.

    ledger: one row per run: run_id, config, seed, status, spec, epochs, best_epoch,
        validation_accuracy, and `metric@split` for every metric and split.
    prompts: split and the columns of `accuracy.PROMPTS`.
    outcomes: run_id, split and the lists `accuracy.OUTCOMES`, with one entry per prompt of the
        split, in the order of `prompts`.
    splits: evaluation splits in the order in which they are shown; those without results are left
        out.
    leaked: split → ids of its prompts that also occur in the train splits.
    geometry: run_id, split and `geometry.MEASURES`. trained_on: the name that the training
        responses have in its column split.
    scenarios: the splits that the sweep's scenarios made of groups, the nearest to training first.
    overlaps: scenario → `Replicates.overlap`.
    """

    title: str
    ledger: pl.DataFrame
    prompts: pl.DataFrame
    outcomes: pl.DataFrame
    splits: Sequence[str]
    leaked: Mapping[str, Collection[str]] = field(default_factory=dict)
    geometry: pl.DataFrame | None = None
    trained_on: str = "train"
    scenarios: Sequence[str] = ()
    overlaps: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Results) -> "ComparedTables":
        """Take the tables from stored results."""
        return cls(
            title=results.folder.name,
            ledger=results.ledger,
            prompts=results.prompts,
            outcomes=results.outcomes,
            splits=results.evaluated,
            leaked=results.leaked,
            geometry=results.geometry,
            trained_on=training_name(results.spec.train),
            scenarios=results.scenarios,
            overlaps=results.overlaps,
        )


def compare_results(
    results: Results, *, rank_by: str | None = None, baseline: str | None = None
) -> Comparison:
    """Compare the configurations of a stored sweep; see `compare_runs`.

    baseline: the configuration that others are compared with; by default that of the spec.
    """
    return compare_runs(ComparedTables.of(results), baseline or results.spec.baseline, rank_by)


def compare_runs(
    tables: ComparedTables, baseline: str | None, rank_by: str | None = None
) -> Comparison:
    """Compare the configurations of a sweep with each other and with `baseline`.

    rank_by: a split; or the first part of names, such as "ood" for the mean over all splits
        "ood/…"; or None for the mean over the splits whose names do not start with "train".

    Raises: UserError when no run has results, `rank_by` or `baseline` does not exist, or all runs
    of `baseline` diverged.
    """
    ledger = with_data_seed(tables.ledger).rename({"config": "name"})
    runs = _finished(tables, ledger, baseline)
    finished = ledger.join(runs, on="run_id", how="semi")
    parts = _outcomes(tables, runs)
    resampled = {
        (split, metric): replace(replicate(part, metric), overlap=tables.overlaps.get(split, 0.0))
        for split, part in parts.items()
        for metric in available_metrics(part)
    }
    ranked_splits, unranked_splits, metric = _ranked(rank_by, list(parts), resampled)
    ranked = mean(resampled[s, metric] for s in ranked_splits)
    ranking = _ranking(ranked, runs, baseline)
    at_limit = _at_epoch_limit(finished)
    scores = pl.concat(
        _tagged(result, runs, baseline, split=split, metric=name)
        for (split, name), result in resampled.items()
    )
    panels = _panels(ranked_splits, metric, resampled)
    noise, falls = _noise(noise_lines(finished), panels, scores, ranking, runs, baseline, metric)
    scenarios = tuple(split for split in tables.scenarios if split in parts)
    return Comparison(
        title=tables.title,
        baseline=baseline,
        splits=tuple(parts),
        ranked_by=rank_by or MEAN,
        ranked_splits=ranked_splits,
        unranked_splits=unranked_splits,
        metric=metric,
        ranking=ranking,
        at_epoch_limit=tuple(name for name in ranking["name"] if name in at_limit),
        scores=scores,
        measures=_measures(finished, list(parts)),
        subsets=_subsets(parts, ranking, runs, baseline),
        lengths=_stack([_length(split, part) for split, part in parts.items()]),
        leak_free=_leak_free(parts, tables.leaked, runs, baseline),
        validation=finished.group_by("name")
        .agg(pl.col("validation_accuracy").mean().alias("accuracy"))
        .sort("name"),
        geometry=_geometry(tables.geometry, runs, [tables.trained_on, *parts]),
        trained_on=tables.trained_on,
        distortion=measure_distortion(
            ledger, runs, tables.geometry, tables.trained_on, ranked, ranking
        ),
        scenarios=scenarios,
        scenario_falls=scenario_falls(resampled, scenarios, runs, baseline),
        noise=noise,
        noise_falls=falls,
        unfinished=ledger.join(runs, on="run_id", how="anti")
        .group_by("name", "status")
        .agg(pl.len().alias("runs"))
        .sort("name", "status"),
        covered=covered(runs),
    )


def _finished(tables: ComparedTables, ledger: pl.DataFrame, baseline: str | None) -> pl.DataFrame:
    """The runs that have results, sorted: run_id, name, data_seed and seed."""
    runs = (
        ledger.join(tables.outcomes, on="run_id", how="semi")
        .select("run_id", "name", "data_seed", "seed")
        .sort("name", "data_seed", "seed", "run_id")
    )
    if runs.is_empty():
        if not ledger.is_empty() and (ledger["status"] == "diverged").all():
            raise UserError(f"{tables.title}: all {ledger.height} runs diverged: lower lr")
        raise UserError(f"{tables.title} has no finished runs: run the sweep first")
    if baseline is not None and baseline not in runs["name"]:
        status = ledger.filter(pl.col("name") == baseline)["status"]
        if not status.is_empty() and (status == "diverged").all():
            raise UserError(
                f"baseline {baseline!r} diverged with every seed: choose another with baseline "
                "(--baseline)"
            )
        raise UserError(
            f"baseline = {baseline!r} has no finished runs: {nearest(baseline, set(runs['name']))}"
        )
    return runs


def _outcomes(tables: ComparedTables, runs: pl.DataFrame) -> dict[str, Outcomes]:
    """Outcomes of the runs on every split that has results."""
    return {
        split: Outcomes.of(
            tables.prompts.filter(pl.col("split") == split),
            tables.outcomes.filter(pl.col("split") == split),
            runs["run_id"].to_list(),
            runs["data_seed"].to_list(),
        )
        for split in tables.splits
        if split in tables.outcomes["split"]
    }


def _ranking(result: Replicates, runs: pl.DataFrame, baseline: str | None) -> pl.DataFrame:
    """`Comparison.ranking`, from the replicates of the ranking's metric."""
    ranking = compare(result, runs, baseline)
    ranking = ranking.sort("estimate", "name", descending=[True, False], nulls_last=True)
    return ranking.select(
        pl.col("estimate").rank("min", descending=True).cast(pl.Int64).alias("rank"), pl.all()
    ).join(
        runs.group_by("name", maintain_order=True).agg(pl.col("run_id").alias("run_ids")),
        on="name",
        maintain_order="left",
    )


def _leak_free(
    parts: Mapping[str, Outcomes],
    leaked: Mapping[str, Collection[str]],
    runs: pl.DataFrame,
    baseline: str | None,
) -> pl.DataFrame:
    """`Comparison.leak_free`: accuracy without the prompts that also occur in training."""
    found = []
    for split, part in parts.items():
        prompt_ids = part.prompts["prompt_id"]
        touched = prompt_ids.is_in(list(leaked.get(split, ())))
        if "accuracy" in available_metrics(part) and touched.any():
            rest = part.on(~touched)
            found.append(
                _tagged(replicate(rest, "accuracy"), runs, baseline, split=split).select(
                    "split",
                    pl.lit(prompt_ids.filter(touched).n_unique()).alias("removed"),
                    pl.exclude("split"),
                )
            )
    return _stack(found)


def _noise(
    lines: pl.DataFrame,
    panels: Sequence[tuple[str, Replicates]],
    scores: pl.DataFrame,
    ranking: pl.DataFrame,
    runs: pl.DataFrame,
    baseline: str | None,
    metric: str,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """`Comparison.noise` and `Comparison.noise_falls`, for `lines` as returned by `noise_lines`."""
    noise, falls = [], []
    for split, result in panels if lines.height else ():
        found = ranking if split == MEAN else scores.filter(split=split, metric=metric)
        found = found.select("name", "estimate", "low", "high")
        joined = lines.join(found, on="name", how="left", maintain_order="left")
        noise.append(joined.select(pl.lit(split).alias("split"), pl.all()))
        fallen = noise_falls(lines, result, runs, baseline)
        falls.append(fallen.select(pl.lit(split).alias("split"), pl.all()))
    return _stack(noise), _stack(falls)


def _subsets(
    parts: Mapping[str, Outcomes], ranking: pl.DataFrame, runs: pl.DataFrame, baseline: str | None
) -> pl.DataFrame:
    """`Comparison.subsets`: accuracy by subset, for the baseline and the best configurations."""
    top = [name for name in ranking["name"] if name != baseline][:_DETAILED]
    detailed = runs["name"].is_in([*top, *([baseline] if baseline else [])])
    return _stack(
        [
            _tagged(
                replicate(rows, "accuracy"),
                runs.filter(detailed),
                baseline,
                split=split,
                subset=subset,
            )
            for split, part in parts.items()
            if "accuracy" in available_metrics(part) and part.prompts["subset"].n_unique() > 1
            for subset, rows in _by_subset(part.by(detailed.arg_true().to_list()))
        ]
    )


def _at_epoch_limit(ledger: pl.DataFrame) -> set[str]:
    """Configurations with a run that used all its epochs before early stopping could end it."""
    limits = pl.Struct({"epochs": pl.Int64, "patience": pl.Int64})
    spec = pl.col("spec").str.json_decode(limits)
    reached = ledger.filter(
        pl.col("epochs") == spec.struct.field("epochs"),
        pl.col("epochs") - pl.col("best_epoch") < spec.struct.field("patience"),
    )
    return set(reached["name"])


def available_metrics(part: Outcomes) -> list[str]:
    """The metrics that a split has: accuracy if it has pairs, tau if it has groups."""
    return [
        metric
        for metric, present in (
            ("accuracy", (part.prompts["pairs"] > 0).any()),
            ("tau", not np.isnan(part.values["tau"]).all()),
        )
        if present
    ]


def _ranked(
    rank_by: str | None, splits: list[str], resampled: Mapping[tuple[str, str], Replicates]
) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """The splits that the ranking averages over, those too small for it, and the metric.

    A split with a single prompt has no interval, and neither would a mean over it have one.
    """
    wanted = splits
    if rank_by is not None:
        wanted = [name for name in splits if name == rank_by or name.startswith(f"{rank_by}/")]
        if not wanted:
            raise UserError(
                f"rank_by (--rank-by) = {rank_by!r} is not an evaluated split: "
                f"{nearest(rank_by, splits)}"
            )
    if rank_by is None and any(not split.startswith("train") for split in splits):
        wanted = [split for split in splits if not split.startswith("train")]
    for metric in ("accuracy", "tau"):
        having = [split for split in wanted if (split, metric) in resampled]
        large = [split for split in having if resampled[split, metric].prompts > 1] or having
        if having:
            return tuple(large), tuple(split for split in having if split not in large), metric
    raise UserError(
        f"{', '.join(wanted)}: neither pairs nor groups to rank by, choose another split with "
        "rank_by (--rank-by)"
    )


def _panels(
    splits: Sequence[str], metric: str, resampled: Mapping[tuple[str, str], Replicates]
) -> list[tuple[str, Replicates]]:
    """The ranked splits with their results, preceded by their mean if there are several; with more
    than `_MANY` the mean only."""
    alone = [(split, resampled[split, metric]) for split in splits]
    if len(alone) == 1:
        return alone
    return [(MEAN, mean(part for _, part in alone)), *(alone if len(alone) <= _MANY else [])]


def _tagged(
    result: Replicates, runs: pl.DataFrame, baseline: str | None, **tags: str | None
) -> pl.DataFrame:
    """`intervals.compare` of one result, with `tags` and the number of prompts as first columns."""
    return compare(result, runs, baseline).select(
        *(pl.lit(value, dtype=pl.String).alias(tag) for tag, value in tags.items()),
        pl.lit(result.prompts).alias("prompts"),
        pl.all(),
    )


def _by_subset(part: Outcomes) -> list[tuple[str | None, Outcomes]]:
    subsets = part.prompts["subset"]
    return [
        (subset, part.on(subsets.eq_missing(pl.Series([subset], dtype=pl.String))))
        for subset in subsets.unique().sort(nulls_last=True)
    ]


def _length(split: str, part: Outcomes) -> pl.DataFrame:
    """`Comparison.lengths` of one split: the accuracy of preferring the longer response."""
    if "accuracy" not in available_metrics(part):
        return pl.DataFrame()
    alone = pl.DataFrame({"name": ["length"], "seed": [0]})
    return compare(replicate(part, "length_accuracy"), alone, None).select(
        pl.lit(split).alias("split"),
        pl.lit(part.prompts["pairs"].sum()).alias("pairs"),
        pl.lit(part.prompts["prompt_id"].n_unique()).alias("prompts"),
        "estimate",
        "low",
        "high",
    )


def _geometry(geometry: pl.DataFrame | None, runs: pl.DataFrame, splits: list[str]) -> pl.DataFrame:
    if geometry is None or geometry.is_empty():
        return pl.DataFrame()
    return pl.concat(
        runs.join(geometry.filter(pl.col("split") == split), on="run_id", how="left")
        .group_by("name")
        .agg(
            _mean_over_seeds(name).alias(name)
            if name in geometry.columns
            else pl.lit(None, dtype=pl.Float64).alias(name)
            for name in GEOMETRY
        )
        .sort("name")
        .select(pl.lit(split).alias("split"), pl.all())
        for split in splits
    )


def _mean_over_seeds(column: str) -> pl.Expr:
    return pl.when(pl.col(column).null_count() == 0).then(pl.col(column).mean())


def _measures(ledger: pl.DataFrame, splits: list[str]) -> pl.DataFrame:
    return pl.concat(
        ledger.group_by("name")
        .agg(
            _mean_over_seeds(f"{metric}@{split}").alias(metric)
            if f"{metric}@{split}" in ledger.columns
            else pl.lit(None, dtype=pl.Float64).alias(metric)
            for metric in MEASURES
        )
        .sort("name")
        .select(pl.lit(split).alias("split"), pl.all())
        for split in splits
    )


def _stack(frames: list[pl.DataFrame]) -> pl.DataFrame:
    filled = [frame for frame in frames if not frame.is_empty()]
    return pl.concat(filled) if filled else pl.DataFrame()
