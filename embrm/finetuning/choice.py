"""The choice of a sweep's configurations to fine-tune, and the settings they keep."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from embrm.core.errors import UserError, nearest
from embrm.core.sampling import evenly_spaced
from embrm.core.specs import canonical_json, content_id
from embrm.results.comparison import compare_results
from embrm.results.ledger import Results
from embrm.studies.confirmation.measure import Excluded, Match
from embrm.sweeps.spec import RunSpec
from embrm.training.objectives import Objective

# Metrics of the ledger that can rank configurations, by which end is the better one.
_HIGHER_IS_BETTER = ("accuracy", "tau")
_LOWER_IS_BETTER = (
    *("nll", "brier", "ece"),
    *("nll_calibrated", "brier_calibrated", "ece_calibrated"),
)

_DATA_FIELDS = {"pairs_limit", "label_noise", "labels", "fold"}
"""Fields of a run, beside its objective, that choose its training data and labels."""

_COUNTED_ENTRY = re.compile(r"(top|random|spread):(.*)")


@dataclass(frozen=True)
class SweepRanking:
    """The names of a sweep's configurations, best first.

    ranked_splits: the evaluation splits that `embrm report` averages over.
    """

    names: tuple[str, ...]
    ranked_splits: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The configurations to fine-tune.

    matches: the chosen configurations, best first. excluded: all configurations of the sweep that
    cannot be fine-tuned. runs: the entries of the fine-tune's spec, each a name and the fields that
    differ from the defaults of `RunSpec`. baseline: the entry that stands for the sweep's baseline.
    """

    matches: tuple[Match, ...]
    excluded: tuple[Excluded, ...]
    runs: tuple[dict[str, Any], ...]
    baseline: str


def rank(results: Results, rank_by: str | None) -> SweepRanking:
    """Rank a sweep's configurations.

    rank_by: as in `embrm report`; or METRIC@SPLIT, a column of the ledger, whose mean over seeds
    ranks. Configurations without a finished run have no rank; nor have, for METRIC@SPLIT, those
    without a value in one of their runs.
    Raises: UserError when `rank_by` names nothing, or no run has finished.
    """
    by_column = rank_by is not None and "@" in rank_by
    comparison = compare_results(results, rank_by=None if by_column else rank_by)
    names = comparison.ranking["name"].to_list()
    if rank_by is not None and by_column:
        metric = rank_by.partition("@")[0]
        known = [
            column
            for column in results.ledger.columns
            if column.partition("@")[0] in (*_HIGHER_IS_BETTER, *_LOWER_IS_BETTER) and "@" in column
        ]
        if rank_by not in known:
            raise UserError(
                f"rank_by (--rank-by) = {rank_by!r} is no metric@split: {nearest(rank_by, known)}"
            )
        means = (
            results.ledger.filter(pl.col("config").is_in(names), pl.col("status") == "ok")
            .group_by("config")
            .agg(pl.when(pl.col(rank_by).null_count() == 0).then(pl.col(rank_by).mean()))
            .drop_nulls()
            .sort(rank_by, "config", descending=[metric in _HIGHER_IS_BETTER, False])
        )
        names = means["config"].to_list()
    return SweepRanking(tuple(names), comparison.ranked_splits)


def choose(results: Results, ranking: SweepRanking, wanted: str) -> Choice:
    """Choose configurations to fine-tune by `wanted`, a comma-separated list of

    - top:N, the N best;
    - spread:N, N evenly spaced in rank, the best and the last among them;
    - random:N, N of those that no other entry chose, by a hash of their content;
    - baseline, the sweep's baseline; and names of configurations.

    top, spread and random skip configurations that cannot be fine-tuned. Configurations that differ
    only in settings that a fine-tune does not keep become one run, named after the baseline if it
    is among them, and otherwise after the best.

    Raises: UserError for a wrong list, a baseline that is not chosen or cannot be fine-tuned, or
    fewer than two different objectives.
    """
    rows = {
        row["config"]: row
        for row in results.ledger.filter(pl.col("status") == "ok")
        .sort("seed", descending=True)
        .iter_rows(named=True)
    }
    specs = {
        name: RunSpec.stored(json.loads(rows[name]["spec"]), f"{results.folder}: run {name!r}")
        for name in ranking.names
    }
    ranks = {name: place for place, name in enumerate(ranking.names, start=1)}
    reasons = {
        name: reason for name in ranks if (reason := _why_not_tunable(specs[name])) is not None
    }
    able = [name for name in ranking.names if name not in reasons]
    chosen = _parse_choice(results, wanted, able, ranks, rows)

    baseline = results.spec.baseline
    if baseline not in chosen:
        raise UserError(
            f"runs (--runs) = {wanted!r} leaves out {baseline!r}, which gains are measured from: "
            "add baseline"
        )
    if baseline in reasons:
        raise UserError(
            f"baseline {baseline!r} cannot be fine-tuned: {reasons[baseline]}: run the sweep with "
            "another baseline"
        )
    taken = sorted((name for name in chosen if name not in reasons), key=ranks.__getitem__)
    objectives = {name: _kept_fields(specs[name], rows[name]["train_pairs"]) for name in taken}
    full: dict[str, str] = {}
    for name in (baseline, *taken):
        full.setdefault(canonical_json(objectives[name]), name)
    if len(full) < 2:
        dropped = [f"{name}: {reasons[name]}" for name in chosen if name in reasons][:3]
        raise UserError(
            f"runs (--runs) = {wanted!r} comes to one objective to fine-tune, and there is nothing "
            "to "
            f"compare: choose more{''.join(f'; {entry}' for entry in dropped)}"
        )
    matches = tuple(
        Match(
            name=name,
            rank=ranks[name],
            by=", ".join(chosen[name]),
            full=full[canonical_json(objectives[name])],
            left=_dropped_settings(specs[name]),
        )
        for name in taken
    )
    return Choice(
        matches=matches,
        excluded=tuple(Excluded(name, ranks[name], reasons[name]) for name in reasons),
        runs=tuple(
            {"name": name, **objectives[name]} for name in taken if name in {*full.values()}
        ),
        baseline=baseline,
    )


def _parse_choice(
    results: Results,
    wanted: str,
    able: Sequence[str],
    ranks: dict[str, int],
    rows: dict[str, dict[str, Any]],
) -> dict[str, list[str]]:
    """Each chosen configuration with the entries of `wanted` that chose it."""
    # A comma in square brackets belongs to the name of a configuration from a grid.
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", wanted)]
    chosen: dict[str, list[str]] = {}
    # random:N comes last, wherever it stands, because it leaves out what the others chose.
    for part in sorted(parts, key=lambda part: part.startswith("random:")):
        counted = _COUNTED_ENTRY.fullmatch(part)
        if counted:
            names = _counted(counted[1], counted[2], part, able, chosen, rows)
        elif part == "baseline":
            names = [results.spec.baseline]
        else:
            names = [part]
        for name in names:
            if name not in ranks:
                known = results.ledger.filter(pl.col("config") == name)
                if len(known):
                    raise UserError(
                        f"runs (--runs): {name!r} has no run that ended well and was evaluated: "
                        "leave it out"
                    )
                valid = {*ranks, "top:N", "random:N", "spread:N", "baseline"}
                raise UserError(
                    f"runs (--runs): {name!r} is no configuration of {results.folder}: "
                    f"{nearest(name, valid)}"
                )
            chosen.setdefault(name, []).append(part)
    return chosen


def _counted(
    kind: str,
    number: str,
    part: str,
    able: Sequence[str],
    chosen: dict[str, list[str]],
    rows: dict[str, dict[str, Any]],
) -> list[str]:
    """The configurations that the entry `part`, which reads kind:number, chooses."""
    if not number.isdecimal() or int(number) == 0:
        raise UserError(f"runs (--runs): {part!r}: write a number of at least 1, such as {kind}:4")
    count = int(number)
    if kind == "random":
        able = sorted(
            (name for name in able if name not in chosen),
            key=lambda name: content_id(["confirm", rows[name]["config_id"]]),
        )
    if count > len(able):
        raise UserError(f"runs (--runs): {part!r}, and {len(able)} can be fine-tuned: lower it")
    if kind == "spread":
        return [able[place] for place in evenly_spaced(len(able), count, nearest=True)]
    return list(able[:count])


def _why_not_tunable(spec: RunSpec) -> str | None:
    """Why a fine-tune cannot train this configuration, or None if it can."""
    regularizer = spec.active_regularizer
    if spec.state != "last":
        return f"state = {spec.state!r}: a fine-tune reads the last position"
    if spec.data_smoothing:
        return f"data_smoothing = {spec.data_smoothing:g}: a fine-tune keeps its labels"
    if spec.members > 1:
        return f"members = {spec.members}: a fine-tune is of one model"
    if spec.learner:
        return f"learner {spec.learner.kind!r} is of frozen states"
    if regularizer and not regularizer.is_grm:
        return f"regularizer {regularizer.kind!r} is of frozen states"
    return None


def _kept_fields(spec: RunSpec, training_pairs: int) -> dict[str, Any]:
    """The fields that a fine-tune takes over, where they differ from their defaults."""
    fields = spec.model_dump(
        mode="json", include={*Objective.model_fields} | _DATA_FIELDS, exclude_defaults=True
    )
    fields.pop("bsr_batch", None)
    if spec.bsr:
        # The coefficient is λ·B_ref, and B_ref defaults to the minibatch size, which the fine-tune
        # may change: B_ref is therefore given.
        fields["bsr_batch"] = spec.bsr_batch or min(spec.batch_pairs, training_pairs)
    head = spec.head.model_dump(mode="json", exclude={"adapter"}, exclude_defaults=True)
    if head:
        fields["head"] = head
    if regularizer := spec.active_regularizer:
        fields["regularizer"] = regularizer.model_dump(
            mode="json", include={"kind", "alpha", "beta"}
        )
    return fields


def _dropped_settings(spec: RunSpec) -> tuple[str, ...]:
    """Settings of a configuration that its fine-tune does not take over."""
    dropped = []
    if spec.preprocess != "none":
        dropped.append(f"preprocess = {spec.preprocess}")
    if spec.head.adapter:
        dropped.append(f"adapter {spec.head.adapter}")
    if spec.weight_decay:
        dropped.append(f"weight_decay = {spec.weight_decay:g}")
    return tuple(dropped)
