"""A sweep held against the fine-tune of some of its configurations: numbers and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from embrm.core.errors import UserError
from embrm.core.formatting import MISSING, range_text, value_text
from embrm.core.table import Table
from embrm.metrics.agreement import Stage, agreement
from embrm.metrics.intervals import Replicates, compare, mean, replicate
from embrm.metrics.outcomes import Outcomes
from embrm.results.comparison import MEAN, metrics
from embrm.sweeps.ledger import Results

_VALUE = ("estimate", "low", "high")
_GAIN = ("difference", "difference_low", "difference_high")
"""Columns of `intervals.compare` that a stage's points keep."""

_LABELS = {"accuracy": "accuracy %", "tau": "Kendall tau-b", "nll": "NLL"}


@dataclass(frozen=True)
class Match:
    """A configuration of the sweep and the one that was fine-tuned for it.

    rank: in the sweep, from 1; by: what chose it; full: its name in the fine-tune, which others of
    the same objective share; left: what of it only frozen states have or the fine-tune sets anew.
    """

    name: str
    rank: int
    by: str
    full: str
    left: tuple[str, ...]


@dataclass(frozen=True)
class Excluded:
    """A configuration of the sweep that cannot be fine-tuned."""

    name: str
    rank: int
    reason: str


@dataclass(frozen=True)
class Confirmation:
    """How far the frozen ranking holds in the fine-tune.

    splits: compared; after them, where the ranking averages over several, comes their mean.
    matches: the configurations compared, best frozen first. untuned: those without a finished
    fine-tune, with the reason. excluded: all of the sweep that none can be made of.
    points: split, metric, name, full_name, and for either stage, frozen_ and full_, the columns
    `estimate`, `low`, `high`, `difference` (to the baseline), its `low` and `high`, as the report
    of that stage has them.
    agreement: split, metric, prompts and the columns of `agreement.agreement`.
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

    baseline: one of the sweep's. ranked_splits: those that the mean is taken over.

    Raises: UserError when the two are not of one cache, data or split, or fewer than two
    configurations were fine-tuned to the end.
    """
    if full.cache_id != frozen.cache_id:
        raise UserError(
            f"{full.folder} was made with cache {full.cache_id}, {frozen.folder} with "
            f"{frozen.cache_id}: confirm a sweep with a fine-tune of the same cache"
        )
    tuned = _runs(full, {match.full for match in matches})
    compared = tuple(match for match in matches if match.full in tuned["name"])
    if len({match.full for match in compared}) < 2:
        raise UserError(
            f"{full.folder} has finished runs of fewer than 2 of the configurations: "
            "there is nothing to compare, lower lr or fine-tune more"
        )
    ran = _runs(frozen, {match.name for match in compared})
    place = next((i for i, match in enumerate(compared) if match.name == baseline), None)
    splits = [split for split in frozen.evaluated if split in full.prompts["split"]]
    if not splits:
        raise UserError(
            f"{full.folder} and {frozen.folder} have no evaluation split in common: "
            "leave evaluate out of the fine-tune's spec"
        )
    resampled: dict[tuple[str, str], tuple[Replicates, Replicates]] = {}
    for split in splits:
        cheap, dear = _part(frozen, split, ran), _part(full, split, tuned)
        seen = ("subset", "prompt_id", "pairs")
        if not cheap.prompts.select(seen).equals(dear.prompts.select(seen)):
            raise UserError(
                f"split {split!r} has other prompts in {full.folder} than in {frozen.folder}: "
                "run the older of the two again"
            )
        found = metrics(cheap)
        for metric in [*found, *(["nll"] if "accuracy" in found else [])]:
            resampled[split, metric] = replicate(cheap, metric), replicate(dear, metric)
    for metric in ("accuracy", "tau", "nll"):
        parts = [
            resampled[split, metric] for split in ranked_splits if (split, metric) in resampled
        ]
        if len(parts) > 1:
            resampled[MEAN, metric] = mean(x for x, _ in parts), mean(y for _, y in parts)
    points, agreements = [], []
    for (split, metric), (x, y) in resampled.items():
        tags = [pl.lit(split).alias("split"), pl.lit(metric).alias("metric")]
        points.append(_points(x, y, ran, tuned, compared, baseline).select(*tags, pl.all()))
        result = agreement(
            Stage.of(x, ran, [match.name for match in compared], metric, "frozen"),
            Stage.of(y, tuned, [match.full for match in compared], metric, "full"),
            place,
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


def confirmation_tables(confirmation: Confirmation) -> list[Table]:
    """What the terminal shows: agreement of ranks and gains, configurations, what is left out."""
    return [
        _ranks(confirmation),
        _gains(confirmation),
        *_configurations(confirmation, _leading(confirmation)),
        *_left_out(confirmation),
    ]


def further_confirmation_tables(confirmation: Confirmation) -> list[Table]:
    """What only the Markdown adds: the configurations on every split and by every metric."""
    shown = _leading(confirmation)
    rest = confirmation.points.select("split", "metric").unique(maintain_order=True).rows()
    return [
        table
        for split, metric in rest
        if (split, metric) != shown
        for table in _configurations(confirmation, (split, metric))
    ]


def _runs(results: Results, names: set[str]) -> pl.DataFrame:
    """run_id, name and seed of the finished runs of the configurations `names`."""
    return (
        results.ledger.rename({"config": "name"})
        .filter(pl.col("name").is_in(list(names)))
        .join(results.outcomes, on="run_id", how="semi")
        .select("run_id", "name", "seed")
        .sort("name", "seed", "run_id")
    )


def _part(results: Results, split: str, runs: pl.DataFrame) -> Outcomes:
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
    ran: pl.DataFrame,
    tuned: pl.DataFrame,
    matches: Sequence[Match],
    baseline: str,
) -> pl.DataFrame:
    full_baseline = next((match.full for match in matches if match.name == baseline), None)
    pairs = pl.DataFrame(
        [(match.name, match.full) for match in matches],
        schema={"name": pl.String, "full_name": pl.String},
        orient="row",
    )
    for prefix, key, table in (
        ("frozen", "name", compare(x, ran, baseline)),
        ("full", "full_name", compare(y, tuned, full_baseline)),
    ):
        columns = table.select(
            pl.col("name").alias(key), pl.col("seeds", *_VALUE, *_GAIN).name.prefix(f"{prefix}_")
        )
        pairs = pairs.join(columns, on=key, how="left", maintain_order="left")
    return pairs


def _leading(confirmation: Confirmation) -> tuple[str, str]:
    """The split and metric shown first: those of the sweep's ranking."""
    shown = set(confirmation.points.select("split", "metric").unique().rows())
    wanted = [MEAN, *confirmation.ranked_splits, *confirmation.splits]
    return next(
        (split, metric)
        for metric in ("accuracy", "tau")
        for split in wanted
        if (split, metric) in shown
    )


def _where(confirmation: Confirmation, split: str) -> str:
    return f"mean over {', '.join(confirmation.ranked_splits)}" if split == MEAN else split


def _found(confirmation: Confirmation) -> list[tuple[str, str, dict[str, dict[str, float | None]]]]:
    """Of every split and metric its statistics by name; the mean first, then metric by metric."""
    cells = confirmation.agreement.select("split", "metric").unique(maintain_order=True).rows()
    found: dict[tuple[str, str], dict[str, dict[str, float | None]]] = {cell: {} for cell in cells}
    for row in confirmation.agreement.iter_rows(named=True):
        found[row["split"], row["metric"]][row["statistic"]] = row
    order = sorted(found, key=lambda cell: ([*_LABELS].index(cell[1]), cell[0] != MEAN))
    return [(split, metric, found[split, metric]) for split, metric in order]


def _text(row: dict[str, float | None], metric: str, sign: str = "") -> str:
    interval = range_text(row["low"], row["high"], metric, sign)
    return f"{value_text(row['value'], metric, sign)} {interval}".strip()


def _resampled(confirmation: Confirmation) -> str:
    """What intervals are over: a stage of one seed has none to draw."""
    one = [
        name
        for name, column in (("frozen", "frozen_seeds"), ("fine-tuned", "full_seeds"))
        if (confirmation.points[column] == 1).all()
    ]
    if len(one) == 2:
        return "prompts only: one seed"
    return "prompts and seeds" + (f" ({one[0]}: prompts only: one seed)" if one else "")


def _ranks(confirmation: Confirmation) -> Table:
    rows = [
        (
            split,
            _LABELS[metric],
            _text(found["spearman"], ""),
            _text(found["kendall"], ""),
            _text(found["ordered"], "accuracy"),
            _text(found["halves_full"], ""),
            _text(found["halves_frozen"], ""),
        )
        for split, metric, found in _found(confirmation)
    ]
    notes = [
        f"Square brackets: 95 % intervals, bootstrap over {_resampled(confirmation)}, of these "
        "configurations: others may agree otherwise. They reach up to the agreement that noise may "
        "hide.",
        "ordered: twos of configurations that both stages order alike.",
        "halves: rho between two halves of a stage's own seeds: what the noise of half the seeds "
        "leaves of perfect agreement.",
        *_reasons(confirmation, ("spearman", "kendall", "ordered", "halves_full", "halves_frozen")),
    ]
    return Table(
        f"Frozen against fine-tuned ranking, {len(confirmation.matches)} configurations",
        ("split", "by", "Spearman rho", "Kendall tau-b", "ordered %", "halves full", "frozen"),
        tuple(rows),
        " ".join(notes),
        left=2,
    )


def _gains(confirmation: Confirmation) -> Table:
    rows = [
        (
            split,
            _LABELS[metric],
            _text(found["regret"], metric),
            _text(found["slope"], ""),
            _text(found["intercept"], metric, "+"),
            _text(found["bias"], metric, "+"),
        )
        for split, metric, found in _found(confirmation)
    ]
    notes = [
        "regret: the best fine-tuned value minus that of the configuration ranked first by frozen "
        "states.",
        "slope, intercept: of the line of fine-tuned on frozen gains; 1 and 0 if frozen gains were "
        "exact. Noise of frozen gains alone flattens it, and the best of many are partly lucky.",
        "bias: mean frozen minus mean fine-tuned gain. Gains of NLL are what it falls by.",
        *_reasons(confirmation, ("regret", "slope", "intercept", "bias")),
    ]
    return Table(
        f"Regret, and gains over {confirmation.baseline}",
        ("split", "by", "regret", "slope", "intercept", "bias"),
        tuple(rows),
        " ".join(notes),
        left=2,
    )


def _reasons(confirmation: Confirmation, statistics: tuple[str, ...]) -> list[str]:
    """Why some of the statistics are missing."""
    found = confirmation.agreement.filter(pl.col("statistic").is_in(statistics))["reason"]
    return [f"{MISSING}: {reason}." for reason in found.drop_nulls().unique(maintain_order=True)]


def _configurations(confirmation: Confirmation, cell: tuple[str, str]) -> list[Table]:
    split, metric = cell
    points = confirmation.points.filter(pl.col("split") == split, pl.col("metric") == metric)
    rows = []
    for match, row in zip(confirmation.matches, points.iter_rows(named=True), strict=True):
        stages = []
        for stage in ("frozen", "full"):
            for names, sign in ((_VALUE, ""), (_GAIN, "+")):
                value, low, high = (row[f"{stage}_{name}"] for name in names)
                text = value_text(value, metric, sign)
                stages.append(f"{text} {range_text(low, high, metric, sign)}".strip())
        if match.name == confirmation.baseline:
            stages[1] = "baseline"
        if match.full == confirmation.baseline:
            stages[3] = "baseline"
        rows.append(
            (
                str(match.rank),
                match.name,
                "" if match.full == match.name else match.full,
                *stages,
                f"{row['frozen_seeds']}, {row['full_seeds']}",
                match.by,
                "; ".join(match.left),
            )
        )
    notes = ["#: rank in the sweep. Two configurations fine-tuned as one share its runs."]
    return [
        Table(
            f"{_LABELS[metric][0].upper()}{_LABELS[metric][1:]}: {_where(confirmation, split)}",
            (
                *("#", "configuration", "tuned as", "frozen", "gain", "tuned", "its gain"),
                *("seeds", "chosen by", "not taken over"),
            ),
            tuple(rows),
            " ".join(notes),
            left=3,
            wide=("seeds", "chosen by", "not taken over"),
        )
    ]


def _left_out(confirmation: Confirmation) -> list[Table]:
    by_reason: dict[str, list[Excluded]] = {}
    for entry in (*confirmation.untuned, *confirmation.excluded):
        by_reason.setdefault(entry.reason, []).append(entry)
    if not by_reason:
        return []
    rows = [
        (reason, str(len(entries)), min(entries, key=lambda entry: entry.rank).name,
         str(min(entry.rank for entry in entries)))
        for reason, entries in by_reason.items()
    ]  # fmt: skip
    return [
        Table(
            "Configurations of the sweep that are not compared",
            ("reason", "configurations", "best of them", "its rank"),
            tuple(rows),
        )
    ]
