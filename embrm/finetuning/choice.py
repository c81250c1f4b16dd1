"""Which configurations of a sweep to fine-tune, and what of them a fine-tune takes over."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from embrm.core.errors import UserError, nearest
from embrm.core.specs import canonical_json, content_id
from embrm.results.comparison import compare_runs
from embrm.studies.confirmation.measure import Excluded, Match
from embrm.sweeps.ledger import Results
from embrm.sweeps.spec import RunSpec
from embrm.training.objectives import Objective
from embrm.training.regularizers import GRM

_HIGHER = ("accuracy", "tau")
_LOWER = ("nll", "brier", "ece", "nll_calibrated", "brier_calibrated", "ece_calibrated")
"""Metrics of the ledger that can rank, by which end is best."""

_DATA = {"pairs_limit", "label_noise", "labels", "fold"}
"""Fields of a run beside its objective that say what it learns from."""

_COUNTED = re.compile(r"(top|random|spread):(.*)")


@dataclass(frozen=True)
class SweepRanking:
    """Names of a sweep's configurations, best first; ranked_splits: those that `embrm report`
    averages over."""

    names: tuple[str, ...]
    ranked_splits: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """What to fine-tune.

    matches: best first. excluded: all configurations of the sweep that cannot be. runs: entries
    for the fine-tune's spec, each a name and what differs from the defaults of `RunSpec`.
    baseline: the name among them of the sweep's baseline.
    """

    matches: tuple[Match, ...]
    excluded: tuple[Excluded, ...]
    runs: tuple[dict[str, Any], ...]
    baseline: str


def rank(results: Results, rank_by: str | None) -> SweepRanking:
    """Rank as `embrm report` does, or by METRIC@SPLIT: a column of the ledger, mean over seeds.

    rank_by: as in `embrm report`, or METRIC@SPLIT. Configurations without a finished run, or for
    METRIC@SPLIT without a value in one of them, have no rank.
    Raises: UserError when `rank_by` names nothing, or no run has finished.
    """
    at = rank_by is not None and "@" in rank_by
    comparison = compare_runs(
        results.folder.name,
        results.ledger,
        results.prompts,
        results.outcomes,
        results.evaluated,
        results.spec.baseline,
        None if at else rank_by,
    )
    names = comparison.ranking["name"].to_list()
    if rank_by is not None and at:
        metric = rank_by.partition("@")[0]
        known = [
            column
            for column in results.ledger.columns
            if column.partition("@")[0] in (*_HIGHER, *_LOWER) and "@" in column
        ]
        if rank_by not in known:
            raise UserError(f"rank_by = {rank_by!r} is no metric@split: {nearest(rank_by, known)}")
        means = (
            results.ledger.filter(pl.col("config").is_in(names), pl.col("status") == "ok")
            .group_by("config")
            .agg(pl.when(pl.col(rank_by).null_count() == 0).then(pl.col(rank_by).mean()))
            .drop_nulls()
            .sort(rank_by, "config", descending=[metric in _HIGHER, False])
        )
        names = means["config"].to_list()
    return SweepRanking(tuple(names), comparison.ranked_splits)


def choose(results: Results, ranking: SweepRanking, wanted: str) -> Choice:
    """Choose configurations by `wanted`, a list with commas of

    top:N, the N best; spread:N, N evenly spaced in rank, the best and the last among them;
    baseline; names; random:N, the N first of those not chosen otherwise, by a hash of their
    content. top, spread and random pass over configurations that cannot be fine-tuned.

    Two that differ in nothing that a fine-tune takes over become one run of it, named after the
    baseline or else the better.

    Raises: UserError for a wrong list, a baseline that is missing or cannot be fine-tuned, or
    fewer than two different objectives.
    """
    rows = {
        row["config"]: row
        for row in results.ledger.filter(pl.col("status") == "ok")
        .sort("seed", descending=True)
        .iter_rows(named=True)
    }
    specs = {
        name: RunSpec.parse(json.loads(rows[name]["spec"]), f"{results.folder}: run {name!r}")
        for name in ranking.names
    }
    ranks = {name: place for place, name in enumerate(ranking.names, start=1)}
    reasons = {name: reason for name in ranks if (reason := _obstacle(specs[name])) is not None}
    able = [name for name in ranking.names if name not in reasons]
    chosen = _parse(results, wanted, able, ranks, rows)

    baseline = results.spec.baseline
    if baseline not in chosen:
        raise UserError(
            f"--runs {wanted!r} leaves out {baseline!r}, which gains are measured from: "
            "add baseline"
        )
    if baseline in reasons:
        raise UserError(
            f"baseline {baseline!r} cannot be fine-tuned: {reasons[baseline]}: run the sweep with "
            "another baseline"
        )
    taken = sorted((name for name in chosen if name not in reasons), key=ranks.__getitem__)
    objectives = {name: _objective(specs[name], rows[name]["train_pairs"]) for name in taken}
    full: dict[str, str] = {}
    for name in (baseline, *taken):
        full.setdefault(canonical_json(objectives[name]), name)
    if len(full) < 2:
        dropped = [f"{name}: {reasons[name]}" for name in chosen if name in reasons][:3]
        raise UserError(
            f"--runs {wanted!r} comes to one objective to fine-tune, and there is nothing to "
            f"compare: choose more{''.join(f'; {entry}' for entry in dropped)}"
        )
    matches = tuple(
        Match(
            name=name,
            rank=ranks[name],
            by=", ".join(chosen[name]),
            full=full[canonical_json(objectives[name])],
            left=_left(specs[name]),
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


def _parse(
    results: Results,
    wanted: str,
    able: Sequence[str],
    ranks: dict[str, int],
    rows: dict[str, dict[str, Any]],
) -> dict[str, list[str]]:
    """Configuration → the parts of `wanted` that chose it."""
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", wanted)]  # a grid's names hold ","
    chosen: dict[str, list[str]] = {}
    # Random ones last, wherever they stand: not among the others.
    for part in sorted(parts, key=lambda part: part.startswith("random:")):
        counted = _COUNTED.fullmatch(part)
        if counted:
            names = _count(counted[1], counted[2], part, able, chosen, rows)
        elif part == "baseline":
            names = [results.spec.baseline]
        else:
            names = [part]
        for name in names:
            if name not in ranks:
                known = results.ledger.filter(pl.col("config") == name)
                if len(known):
                    raise UserError(
                        f"--runs: {name!r} has no run that ended well and was evaluated: "
                        "leave it out"
                    )
                valid = {*ranks, "top:N", "random:N", "spread:N", "baseline"}
                raise UserError(
                    f"--runs: {name!r} is no configuration of {results.folder}: "
                    f"{nearest(name, valid)}"
                )
            chosen.setdefault(name, []).append(part)
    return chosen


def _count(
    kind: str,
    number: str,
    part: str,
    able: Sequence[str],
    chosen: dict[str, list[str]],
    rows: dict[str, dict[str, Any]],
) -> list[str]:
    if not number.isdecimal() or int(number) == 0:
        raise UserError(f"--runs: {part!r}: write a number of at least 1, such as {kind}:4")
    count = int(number)
    if kind == "random":
        able = sorted(
            (name for name in able if name not in chosen),
            key=lambda name: content_id(["confirm", rows[name]["config_id"]]),
        )
    if count > len(able):
        raise UserError(f"--runs: {part!r}, and {len(able)} can be fine-tuned: lower it")
    if kind == "spread":
        places = np.linspace(0, len(able) - 1, count).round().astype(int)
        return [able[place] for place in places]
    return list(able[:count])


def _obstacle(spec: RunSpec) -> str | None:
    """Why a fine-tune cannot do what this configuration does."""
    regularizer = spec.active_regularizer
    if spec.state != "last":
        return f"state = {spec.state!r}: a fine-tune reads the last position"
    if spec.data_smoothing:
        return f"data_smoothing = {spec.data_smoothing:g}: a fine-tune keeps its labels"
    if spec.members > 1:
        return f"members = {spec.members}: a fine-tune is of one model"
    if spec.learner:
        return f"learner {spec.learner.kind!r} is of frozen states"
    if regularizer and regularizer.kind not in GRM:
        return f"regularizer {regularizer.kind!r} is of frozen states"
    return None


def _objective(spec: RunSpec, training_pairs: int) -> dict[str, Any]:
    """What a fine-tune takes over: fields that differ from their defaults."""
    fields = spec.model_dump(
        mode="json", include={*Objective.model_fields} | _DATA, exclude_defaults=True
    )
    fields.pop("bsr_batch", None)
    if spec.bsr:
        # λ·B_ref is the coefficient; unless given B_ref is the minibatch, which may differ there.
        fields["bsr_batch"] = spec.bsr_batch or min(spec.batch_pairs, training_pairs)
    head = spec.head.model_dump(mode="json", exclude={"adapter"}, exclude_defaults=True)
    if head:
        fields["head"] = head
    if regularizer := spec.active_regularizer:
        fields["regularizer"] = regularizer.model_dump(
            mode="json", include={"kind", "alpha", "beta"}
        )
    return fields


def _left(spec: RunSpec) -> tuple[str, ...]:
    """What a fine-tune does not take over of what a configuration may be about."""
    left = []
    if spec.preprocess != "none":
        left.append(f"preprocess = {spec.preprocess}")
    if spec.head.adapter:
        left.append(f"adapter {spec.head.adapter}")
    if spec.weight_decay:
        left.append(f"weight_decay = {spec.weight_decay:g}")
    return tuple(left)
