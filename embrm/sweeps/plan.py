"""A dry run of a sweep: its runs, and an estimate of the time that they take."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embrm.core.errors import UserError
from embrm.core.specs import SpecSource
from embrm.sweeps.execute import results_folder
from embrm.sweeps.ledger import finished
from embrm.sweeps.mapped import first_tokens
from embrm.sweeps.matching import match_rates
from embrm.sweeps.packs import Pack, packs
from embrm.sweeps.prepare import PreparedSweep, prepare_sweep, step_warnings
from embrm.sweeps.selection import evaluation_splits
from embrm.sweeps.spec import RunSpec
from embrm.sweeps.tables import read_tables
from embrm.sweeps.views import open_view
from embrm.sweeps.workers import worker_count
from embrm.training.bank import train
from embrm.training.data import TrainingData
from embrm.training.learner_specs import GradientBoosting, Learner
from embrm.training.learners import Gold, fit
from embrm.training.numerics import Numerics, on_cpu
from embrm.training.pairs import Pairs
from embrm.training.row_store import RowStore

_TIMED_STEPS = 8
_TIMED_TREES = 4
_START_SECONDS = 5.0
"""Seconds that a worker needs to start, for imports and reading states."""


def plan_sweep(
    spec: SpecSource,
    cache: Path | None = None,
    *,
    jobs: int | None = None,
    out: Path | None = None,
    numerics: Numerics | None = None,
) -> dict[str, Any]:
    """Say what `sweep` would do and estimate how long it would take, without writing anything.

    The estimate is for this CPU: a few minibatches of each kind of pack and one evaluation are
    timed.
    """
    prepared = prepare_sweep(spec, cache, numerics)
    mode = prepared.spec.numerics
    jobs = worker_count(jobs, mode)
    folder = results_folder(spec, out)
    asked = prepared
    prepared = match_rates(asked, folder, jobs=jobs, memory=None, train=False)
    warnings = step_warnings(prepared)
    unmatched = {run.name for run in asked.runs if run.spec.match} if prepared is asked else ()
    if unmatched:
        warnings.append(
            f"match has yet to choose the learning rates of {len(unmatched)} configurations: "
            "packs and estimated_seconds leave out the runs of that search"
        )
    done = finished(folder)
    todo = [run for run in prepared.runs if run.run_id not in done]
    found = packs(
        todo,
        jobs=jobs,
        training_pairs=prepared.training_pairs,
        gpu=not on_cpu(mode),
    )
    return {
        "cache": str(prepared.cache.folder),
        "cache_id": prepared.cache.cache_id,
        "configurations": len({run.config_id for run in prepared.runs}),
        "seeds": len(prepared.spec.seeds),
        "data_seeds": len(prepared.spec.data_seeds),
        "runs": len(prepared.runs),
        "finished": len(prepared.runs) - len(todo),
        "packs": len(found),
        "jobs": jobs,
        "evaluate": prepared.evaluate,
        "splits": read_tables(
            prepared.cache, prepared.spec.scenarios, prepared.spec.data_seeds[0]
        ).sizes(prepared.spec.train),
        "warnings": warnings,
        "estimated_seconds": round(_estimate(prepared, found, jobs), 1),
    }


def _estimate(prepared: PreparedSweep, found: Sequence[Pack], jobs: int) -> float:
    """Estimated seconds, from a few timed minibatches of each kind of pack and one evaluation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        total = 0.0
        evaluation = _evaluation_seconds(prepared) if found else 0.0
        steps_of: dict[Any, float] = {}
        for pack in found:
            first = pack.runs[0].spec
            if first.learner:
                seconds = _fit_seconds(prepared, first, first.learner)
                total += seconds + len(pack.runs) * evaluation
                continue
            key = first.state, first.pack_key(), first.members, len(pack.runs)
            if key not in steps_of:
                steps_of[key] = _step_seconds(prepared, pack)
            steps = -(-(first.pairs_limit or prepared.training_pairs) // first.batch_pairs)
            epochs = max(run.spec.epochs for run in pack.runs)
            steps *= first.members
            total += epochs * steps * steps_of[key] + len(pack.runs) * evaluation
    finally:
        torch.set_num_threads(threads)
    return total / min(jobs, max(1, len(found))) + (_START_SECONDS if found else 0.0)


def _made_up(prepared: PreparedSweep, spec: RunSpec) -> TrainingData:
    """Training data of a few minibatches, of random pairs of the cache's first shard."""
    cache = prepared.cache
    states = RowStore(next(open_view(cache, spec.state).shards()))
    pairs = min(_TIMED_STEPS * spec.batch_pairs, prepared.training_pairs)
    rows = torch.randint(len(states.values), (2, pairs), generator=torch.Generator().manual_seed(0))
    one, none = torch.ones(pairs), torch.zeros(0)
    return TrainingData(
        states,
        Pairs(rows[0], rows[1], one, one, one),
        Pairs(none.long(), none.long(), none, none, None),
        first_tokens(cache) if spec.active_regularizer else None,
    )


def _fit_seconds(prepared: PreparedSweep, spec: RunSpec, learner: Learner) -> float:
    """Estimated seconds of one fit, assumed proportional to the pairs and the trees of boosting."""
    data = _made_up(prepared, spec)
    trees = 1.0
    if isinstance(learner, GradientBoosting):
        few = min(_TIMED_TREES, learner.iterations)
        learner, trees = learner.model_copy(update={"iterations": few}), learner.iterations / few
    gold = Gold(data.train.chosen, torch.linspace(0, 1, len(data.train), dtype=torch.float64))
    start = time.perf_counter()
    with suppress(UserError):  # Random pairs may not converge even if the sweep's pairs do.
        fit(learner, spec.preprocess, 0, data, gold)
    share = (spec.pairs_limit or prepared.training_pairs) / len(data.train)
    return (time.perf_counter() - start) * share * trees


def _step_seconds(prepared: PreparedSweep, pack: Pack) -> float:
    """Seconds of one minibatch of a pack."""
    first = pack.runs[0].spec
    data = _made_up(prepared, first)
    pairs = len(data.train)
    # Members are trained, not ensembles.
    heads = dict.fromkeys(run.spec.member(0) for run in pack.runs)
    specs = [spec.model_copy(update={"epochs": 1, "patience": None}) for spec in heads]
    start = time.perf_counter()
    train(specs, data)
    return (time.perf_counter() - start) / -(-pairs // first.batch_pairs)


def _evaluation_seconds(prepared: PreparedSweep) -> float:
    """Seconds to evaluate one run on all evaluation splits."""
    splits = evaluation_splits(prepared.cache, prepared.selection).values()
    random = np.random.default_rng(0)
    rewards = [random.standard_normal(len(split.rows), np.float32) for split in splits]
    start = time.perf_counter()
    for split, own in zip(splits, rewards, strict=True):
        split.evaluate(own, 1.0)
    return time.perf_counter() - start
