"""Reward heads: train them here or in a sweep, and go on with what a sweep found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from embrm.api.arguments import (
    AnyPath,
    AnySpec,
    byte_size,
    cache_folder,
    names,
    numerics_mode,
    opened,
    optional_path,
    path,
    public,
    spec_source,
)
from embrm.core.errors import UserError

if TYPE_CHECKING:
    import polars as pl

    from embrm.api.results import SweepResults
    from embrm.api.trained import TrainedHead
    from embrm.cache.reader import Cache
    from embrm.reports.run import Report
    from embrm.results.replay import Replay
    from embrm.studies.benchmarks.table import Suites
    from embrm.studies.best_of_n.table import BestOfN
    from embrm.training.numerics import Numerics


@overload
def train(
    cache: Cache | AnyPath,
    specs: Mapping[str, Any],
    *,
    train: str | Sequence[str] = ...,
    validation: float = ...,
    numerics: Numerics = ...,
) -> TrainedHead: ...
@overload
def train(
    cache: Cache | AnyPath,
    specs: Sequence[Mapping[str, Any]],
    *,
    train: str | Sequence[str] = ...,
    validation: float = ...,
    numerics: Numerics = ...,
) -> list[TrainedHead]: ...


@public
def train(
    cache: Cache | AnyPath,
    specs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    train: str | Sequence[str] = "train",
    validation: float = 0.1,
    numerics: Numerics = "native",
    **misplaced: Any,
) -> TrainedHead | list[TrainedHead]:
    """Train reward heads in this process and evaluate them, with the bits that a sweep gives.

    specs: the keys of one run (`{"loss": "bt", "bsr": 1e-3, "seed": 1}`, see docs/specs.md), or
        several of them, which are trained side by side.
    train: the split or splits to train on; all others are evaluated. validation: share of the
        training prompts kept out for early stopping and the temperature.

    Returns one run for one spec, a list for several: weights, curve, metrics, and
    `rewards(split)` or `rewards(states)`.

    Raises: UserError for a wrong key or value, what the cache lacks, and keys of a run that are
    given as arguments instead of a mapping.
    """
    from embrm.api.trained import TrainedHead
    from embrm.results.in_process import train_here

    if misplaced:
        raise UserError(
            f"{next(iter(misplaced))} is no argument of train: give the keys of a run as a mapping,"
            f" such as embrm.train(cache, {misplaced!r})"
        )
    single = isinstance(specs, Mapping)
    found = train_here(
        opened(cache),
        _run_specs(specs),
        train=names(train, "train"),
        validation=validation,
        numerics=numerics_mode(numerics) or "native",
    )
    heads = [TrainedHead(opened(cache), result) for result in found]
    return heads[0] if single else heads


def _run_specs(
    specs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
) -> list[Mapping[str, Any]]:
    several = [specs] if isinstance(specs, Mapping) else specs
    listed = isinstance(several, Sequence) and not isinstance(several, str)
    if several is None or not listed or not all(isinstance(spec, Mapping) for spec in several):
        raise UserError(
            f"specs = {specs!r}: give the keys of a run as a mapping, such as {{'loss': 'bt'}}, or "
            "a list of such mappings"
        )
    return [*several]


@public
def sweep(
    spec: AnySpec,
    cache: Cache | AnyPath | None = None,
    *,
    out: AnyPath | None = None,
    jobs: int | None = None,
    memory: str | int | None = None,
    numerics: Numerics | None = None,
) -> SweepResults:
    """Train every run of a sweep that `out` does not hold yet; twin of `embrm sweep`.

    spec: a TOML file, or a mapping with its keys, for which `out` must be given.
    cache: instead of the spec's own. jobs: worker processes, one a core by default.
    memory: bytes of states to keep in memory ("4GB"); a larger cache is streamed, to the same bits.
    numerics: native, portable, cuda, cuda-tf32 or mps, instead of the spec's.

    Raises: UserError for anything wrong in spec or cache, and for runs that failed; finished runs
    are kept, and the same call goes on.
    """
    from embrm.sweeps.execute import sweep as run

    folder = run(
        spec_source(spec),
        cache_folder(cache),
        out=optional_path(out, "out"),
        jobs=jobs,
        memory=byte_size(memory, "memory"),
        numerics=numerics_mode(numerics),
    )
    return open_results(folder)


@public
def plan_sweep(
    spec: AnySpec,
    cache: Cache | AnyPath | None = None,
    *,
    out: AnyPath | None = None,
    jobs: int | None = None,
    numerics: Numerics | None = None,
) -> dict[str, Any]:
    """How many runs a sweep has, and about how long it takes; twin of `embrm sweep --dry-run`."""
    from embrm.sweeps.plan import plan_sweep as run

    return run(
        spec_source(spec),
        cache_folder(cache),
        jobs=jobs,
        out=optional_path(out, "out"),
        numerics=numerics_mode(numerics),
    )


@public
def open_results(folder: AnyPath) -> SweepResults:
    """Open the results of a sweep or a fine-tune.

    Its `ledger` has one row per run and every hyper-parameter as a column of its own;
    `scores(run)`, `best(split)`, `compare(other)` and `figures()` go on from there.

    Raises: UserError where there are no results, or damaged ones.
    """
    from embrm.api.results import SweepResults
    from embrm.results.ledger import open_results as run

    return SweepResults(run(path(folder, "folder")))


@public
def report(
    folder: AnyPath,
    *,
    rank_by: str | None = None,
    baseline: str | None = None,
    top: int = 20,
    cache: AnyPath | None = None,
    out: AnyPath | None = None,
) -> Report:
    """Rank a sweep's configurations and write tables and figures; twin of `embrm report`.

    rank_by: a split, "ood" for the mean over all "ood/...", None for the mean over all.
    baseline: the configuration that others are compared with, the spec's by default.
    """
    from embrm.reports.run import report as run

    return run(
        path(folder, "folder"),
        rank_by=rank_by,
        baseline=baseline,
        top=top,
        cache=optional_path(cache, "cache"),
        out=optional_path(out, "out"),
    )


@public
def replay(
    folder: AnyPath,
    *,
    run: str | None = None,
    sample: int | None = None,
    cache: AnyPath | None = None,
    jobs: int | None = None,
    memory: str | int | None = None,
) -> Replay:
    """Train stored runs again, each alone, and compare bits and metrics; twin of `embrm replay`.

    run: a run id or CONFIGURATION@SEED; sample: so many, evenly spaced; neither: all runs.
    """
    from embrm.results.replay import replay as again

    return again(
        path(folder, "folder"),
        run=run,
        sample=sample,
        cache=optional_path(cache, "cache"),
        jobs=jobs,
        memory=byte_size(memory, "memory"),
    )


@public
def best_of_n(
    folder: AnyPath,
    *,
    split: str | None = None,
    n: Sequence[int] | None = None,
    baseline: str | None = None,
    top: int = 20,
    cache: AnyPath | None = None,
    out: AnyPath | None = None,
) -> BestOfN:
    """Gold and proxy reward of the best of n responses under each head; twin of `embrm bon`.

    n: numbers of responses to choose from, such as [1, 4, 16].
    """
    from embrm.studies.best_of_n.table import best_of_n as run

    numbers = [n] if isinstance(n, int) else n
    if numbers is not None and not all(isinstance(one, int) and one > 0 for one in numbers):
        raise UserError(f"n = {n!r}: give whole numbers from 1, such as [1, 4, 16]")
    return run(
        path(folder, "folder"),
        split=split,
        ns=numbers,
        baseline=baseline,
        top=top,
        cache=optional_path(cache, "cache"),
        out=optional_path(out, "out"),
    )


@public
def benchmark_scores(
    folder: AnyPath,
    *,
    suites: Mapping[str, str] | None = None,
    baseline: str | None = None,
    top: int = 20,
    cache: AnyPath | None = None,
    out: AnyPath | None = None,
) -> Suites:
    """Score all runs of a sweep on its published benchmarks; twin of `embrm suites`.

    suites: evaluated split → suite, for splits that are not called after theirs.
    """
    from embrm.studies.benchmarks.table import suites as run

    if not isinstance(suites, Mapping | None):
        raise UserError(f"suites = {suites!r}: give a mapping of split to suite")
    return run(
        path(folder, "folder"),
        named=dict(suites or {}),
        baseline=baseline,
        top=top,
        cache=optional_path(cache, "cache"),
        out=optional_path(out, "out"),
    )


@public
def suite_scores(suite: str, scores: AnyPath, *, split: str | None = None) -> pl.DataFrame:
    """Score a file of rewards as a published benchmark's own tool does; twin of `embrm suite`.

    scores: a file that `embrm scores` or `embrm score` wrote.

    Returns one row per score; its columns incomplete and repeated are the numbers of items that the
    file holds only in part, and of rows that it repeats, which are in no score.
    """
    from embrm.suites.scoring import read_scores, score_suite

    return score_suite(suite, read_scores(path(scores, "scores"), suite, split))
