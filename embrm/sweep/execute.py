"""Running a sweep: packs of runs over worker processes, resumable at any moment."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from embrm.cache.reader import Cache, open_cache
from embrm.errors import UserError, nearest
from embrm.evaluate.accuracy import evaluate_split
from embrm.files import exclusive, remove_temporaries
from embrm.progress import progress
from embrm.provenance import provenance
from embrm.specs import read_toml
from embrm.sweep.grid import Run, Selection, SweepSpec, configurations, runs
from embrm.sweep.ledger import finished, write_results
from embrm.sweep.pack import Pack, evaluation_splits, select, states_once, to_pairs
from embrm.sweep.workers import run_packs, worker_count
from embrm.train.bank import TrainingData, train
from embrm.train.heads import SLOTS, HeadSpec, Preprocess, initialise, score
from embrm.train.numerics import strict

_TIMED_STEPS = 8
_START_SECONDS = 5.0
"""What a worker needs to start: imports and opening the cache."""

_MLP_SLOTS = 8
"""Runs in a pack of MLPs: they gain less from company than linear heads do."""


@dataclass(frozen=True)
class _Prepared:
    """A sweep checked against its cache."""

    spec: SweepSpec
    cache: Cache
    selection: Selection
    runs: list[Run]
    evaluate: list[str]


def sweep(
    spec_path: Path, cache: Path | None = None, *, jobs: int | None = None, out: Path | None = None
) -> Path:
    """Train and evaluate every run of the spec that `out` does not hold yet; returns `out`.

    cache: folder, instead of the spec's own. jobs: worker processes, default one a core.
    out: results folder, default the spec's path without `.toml`.
    Raises: UserError for anything wrong in the spec or cache, and at the end for failed runs;
    whatever has finished by then is kept and compacted.
    """
    prepared = _prepare(spec_path, cache)
    jobs = worker_count(jobs)
    out = out or spec_path.with_suffix("")
    with exclusive(out):
        remove_temporaries(out)
        done = finished(out)
        todo = [run for run in prepared.runs if run.run_id not in done]
        failures: dict[str, str] = {}
        interrupted = False
        with progress(
            "training", len(prepared.runs), "runs", len(prepared.runs) - len(todo)
        ) as bar:
            try:
                failures = run_packs(
                    prepared.cache.folder,
                    prepared.selection,
                    _packs(todo),
                    jobs=jobs,
                    out=out,
                    bar=bar,
                )
            except KeyboardInterrupt:
                interrupted = True
        header = {
            "cache": str(prepared.cache.folder),
            "cache_id": prepared.cache.cache_id,
            "leaked": _leaked(prepared),
            "environment": {**provenance(), "numerics": strict()},
        }
        write_results(out, prepared.spec, prepared.runs, prepared.evaluate, header)
    if interrupted:
        raise KeyboardInterrupt
    if failures:
        listed = "; ".join(f"{run}: {why}" for run, why in [*failures.items()][:5])
        more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
        raise UserError(
            f"{len(failures)} of {len(prepared.runs)} runs failed, the others are kept: "
            f"{listed}{more}"
        )
    return out


def plan(
    spec_path: Path, cache: Path | None = None, *, jobs: int | None = None, out: Path | None = None
) -> dict[str, Any]:
    """What `sweep` would do, and about how long it would take. Writes nothing.

    The estimate times a few minibatches of one pack of each kind, and one evaluation.
    """
    prepared = _prepare(spec_path, cache)
    jobs = worker_count(jobs)
    done = finished(out or spec_path.with_suffix(""))
    todo = [run for run in prepared.runs if run.run_id not in done]
    packs = _packs(todo)
    return {
        "cache": str(prepared.cache.folder),
        "cache_id": prepared.cache.cache_id,
        "configurations": len({run.config_id for run in prepared.runs}),
        "seeds": len(prepared.spec.seeds),
        "runs": len(prepared.runs),
        "finished": len(prepared.runs) - len(todo),
        "packs": len(packs),
        "jobs": jobs,
        "evaluate": prepared.evaluate,
        "estimated_seconds": round(_estimate(prepared, packs, jobs), 1),
    }


def _prepare(spec_path: Path, cache_folder: Path | None) -> _Prepared:
    where = str(spec_path)
    spec = SweepSpec.parse(read_toml(spec_path), where)
    found = configurations(spec, where)
    folder = cache_folder or (Path(spec.cache) if spec.cache else None)
    if folder is None:
        raise UserError(f"{where}: cache is missing: add cache = 'cache/NAME', or pass --cache")
    cache = open_cache(folder)
    for field, names in (("train", spec.train), ("evaluate", spec.evaluate or ())):
        for name in names:
            if name not in cache.splits:
                raise UserError(
                    f"{where}: {field} split {name!r} is not in {folder}: "
                    f"{nearest(name, cache.splits)}"
                )
    selection = Selection(cache.cache_id, spec.train, spec.validation)
    training, validation = select(cache, selection)
    if not len(training):
        raise UserError(
            f"{where}: no training pairs in {', '.join(spec.train)}: choose other train splits"
        )
    if spec.validation and not len(validation):
        raise UserError(
            f"{where}: validation = {spec.validation:g} keeps no prompt of "
            f"{training['prompt_id'].n_unique()}: raise it, or set validation = 0"
        )
    for side, pairs in (("training", training), ("validation", validation)):
        if len(pairs) and not pairs["weight"].sum():
            raise UserError(f"{where}: every {side} pair has weight 0: give some a weight above 0")
    others = [split for split in cache.splits if split not in spec.train]
    if not others:
        raise UserError(
            f"{where}: {folder} has no split to evaluate on beside {', '.join(spec.train)}: "
            "extract one with another --data, or hold out prompts with holdout in its spec"
        )
    no_margin = training["margin"].null_count()
    for configuration in found:
        run = f"{where}: run {configuration.name!r}"
        asked = configuration.spec
        if asked.state not in cache.views:
            raise UserError(
                f"{run}: state {asked.state!r} is not in {folder}: "
                f"{nearest(asked.state, cache.views)}"
            )
        if asked.pairs_limit and asked.pairs_limit > len(training):
            raise UserError(
                f"{run}: pairs_limit = {asked.pairs_limit}, but there are {len(training)} "
                "training pairs: lower or remove it"
            )
        if asked.margin_scale is not None and no_margin:
            raise UserError(
                f"{run}: margin_scale = {asked.margin_scale:g}, but {no_margin} of "
                f"{len(training)} training pairs have no margin: use margin instead"
            )
    return _Prepared(
        spec=spec,
        cache=cache,
        selection=selection,
        runs=runs(found, spec.seeds, selection),
        evaluate=list(spec.evaluate) if spec.evaluate is not None else others,
    )


def _leaked(prepared: _Prepared) -> dict[str, list[str]]:
    """Evaluation split → ids of its prompts that also occur in the train splits.

    The cache's report knows equal prompts of unequal spelling for splits named train; equal ids
    are leaks whatever a split that is trained on is called.
    """
    cache, trained_on = prepared.cache, pl.col("split").is_in(prepared.spec.train)
    trained = cache.pairs.filter(trained_on)["prompt_id"].implode()
    found: dict[str, list[str]] = {}
    for split in prepared.evaluate:
        reported = cache.leaks.filter(
            pl.col("train_split").is_in(prepared.spec.train), pl.col("eval_split") == split
        )["prompt_ids"]
        asked = pl.concat(
            table.filter(pl.col("split") == split)["prompt_id"]
            for table in (cache.pairs, cache.members)
        )
        shared = {*reported.explode().drop_nulls(), *asked.filter(asked.is_in(trained))}
        if shared:
            found[split] = sorted(shared)
    return found


def _packs(todo: Sequence[Run]) -> list[Pack]:
    """Runs that can share a pack, largest packs of one state first."""
    groups: dict[Any, list[Run]] = {}
    for run in todo:
        spec = run.spec
        groups.setdefault((spec.state, spec.pairs_limit, spec.pack_key()), []).append(run)
    packs = []
    for group in groups.values():
        width = SLOTS if group[0].spec.head.kind == "linear" else _MLP_SLOTS
        packs += [Pack(tuple(group[i : i + width])) for i in range(0, len(group), width)]
    # A worker keeps one state in memory, so packs of a state come together.
    return sorted(packs, key=lambda pack: (pack.runs[0].spec.state, -_cost(pack)))


def _cost(pack: Pack) -> float:
    """Rough share of the work, to start large packs first."""
    first = pack.runs[0].spec
    return max(run.spec.epochs for run in pack.runs) * (1 + sum(first.head.widths) * len(pack.runs))


def _estimate(prepared: _Prepared, packs: Sequence[Pack], jobs: int) -> float:
    """Seconds: a few timed minibatches of a pack of every kind, and one timed evaluation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    total = 0.0
    rates: dict[Any, float] = {}
    evaluation: dict[str, float] = {}
    try:
        for pack in packs:
            first = pack.runs[0].spec
            arguments = prepared.cache.folder, prepared.cache.cache_id, first.state
            training, validation = select(prepared.cache, prepared.selection, first.pairs_limit)
            steps = -(-len(training) // first.batch_pairs)
            key = first.state, first.head, first.batch_pairs, len(pack.runs)
            if key not in rates:
                sample = training.head(_TIMED_STEPS * first.batch_pairs)
                data = TrainingData(
                    states_once(*arguments), to_pairs(sample), to_pairs(validation.head(0))
                )
                specs = [
                    run.spec.model_copy(update={"epochs": 1, "patience": None}) for run in pack.runs
                ]
                start = time.perf_counter()
                train(specs, data)
                rates[key] = (time.perf_counter() - start) / -(-len(sample) // first.batch_pairs)
            if first.state not in evaluation:
                states = states_once(*arguments)
                start = time.perf_counter()
                bank = initialise(HeadSpec(), states.shape[1], 0)
                own = score(bank, Preprocess(None, None), states)[0].numpy()
                for pairs, members in evaluation_splits(
                    prepared.cache.folder, prepared.selection
                ).values():
                    n_response = prepared.cache.responses["n_response"].to_numpy()
                    evaluate_split(pairs, members, n_response, own, 1.0)
                evaluation[first.state] = time.perf_counter() - start
            epochs = max(run.spec.epochs for run in pack.runs)
            total += epochs * steps * rates[key] + len(pack.runs) * evaluation[first.state]
    finally:
        torch.set_num_threads(threads)
    return total / min(jobs, max(1, len(packs))) + (_START_SECONDS if packs else 0.0)
