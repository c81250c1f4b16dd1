"""Score every run of a sweep on published benchmarks (suites), where evaluation splits hold one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.cache.reader import Cache
from embrm.core.errors import UserError, nearest
from embrm.core.progress import progress
from embrm.metrics.intervals import REPLICATES, Replicates
from embrm.results.ledger import Results, cache_of
from embrm.results.rewards import member_scores, pair_scores, rewards_of_responses
from embrm.results.weights import load_run
from embrm.suites.registry import SUITES
from embrm.suites.scoring import by_length, check_items, replicate_suite
from embrm.sweeps.tables import read_tables

Rewards = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SuiteScores:
    """The scores of runs on one split that holds a suite."""

    split: str
    suite: str
    scores: dict[str, Replicates]
    """Name of a main score of the suite → its bootstrap replicates, one column per run. The overall
    score comes first."""
    longer: dict[str, float]
    """Name of a score → its value if the longer response is always preferred."""
    leaked: int
    """Number of prompts that also occur in training."""
    notes: tuple[str, ...] = ()
    """What is left out of the scores, such as items of which the cache holds only a part."""


def suite_splits(results: Results, named: Mapping[str, str]) -> dict[str, str]:
    """Find the suites that a sweep evaluates; returns evaluation split → suite.

    A split named SUITE or ood/SUITE holds that suite; `named` adds others (split → suite).
    Raises: UserError when `named` has a split that is not evaluated or an unknown suite, or when
    no split holds a suite.
    """
    for split, suite in named.items():
        if split not in results.evaluated:
            known = nearest(split, results.evaluated)
            raise UserError(f"{results.folder} evaluates no split {split!r}: {known}")
        if suite not in SUITES:
            raise UserError(f"no suite {suite!r}: {nearest(suite, SUITES)}")
    found = {split: named.get(split, split.removeprefix("ood/")) for split in results.evaluated}
    found = {split: suite for split, suite in found.items() if suite in SUITES}
    for split in found:
        if split in results.redivided:
            raise UserError(
                f"data_seeds of {results.folder} divide {split!r} again, so its runs are evaluated "
                "on different prompts: sweep with one data seed"
            )
    if not found:
        raise UserError(
            f"{results.folder} evaluates no split named after a suite, only "
            f"{', '.join(results.evaluated)}: say which holds one with suites (--suite SPLIT=SUITE)"
        )
    return found


def suite_scores(
    results: Results,
    runs: pl.DataFrame,
    *,
    named: Mapping[str, str] | None = None,
    cache: Path | None = None,
    replicates: int = REPLICATES,
) -> tuple[list[SuiteScores], list[str]]:
    """Score every run on the suites that the sweep evaluates.

    runs: has the column run_id, of runs with weights. named: split → suite, for splits that are not
    named after their suite. cache: the cache's current path, if it has moved. replicates: number of
    bootstrap replicates over prompts.

    Returns the scores on every split, and one sentence for every split that was left out.
    Raises: UserError when one of `named` cannot be scored, or no split can, or as `suite_splits`.
    """
    source = cache_of(results, cache)
    splits = suite_splits(results, named or {})
    tables = {}
    longer: dict[str, dict[str, float]] = {}
    notes: dict[str, tuple[str, ...]] = {}
    skipped = []
    for split, suite in splits.items():
        table = _table(results, source, split, suite)
        try:  # by length first, so that a split that does not fit its suite fails early
            longer[split], notes[split] = _scores_of_longer(suite, table, source.n_response)
            tables[split] = table
        except UserError as error:
            skipped.append(f"{split} is left out: {error}")
            if split in (named or {}) or len(skipped) == len(splits):
                raise UserError(f"{split} cannot be scored: {error}") from None
    rows = np.unique(
        np.concatenate(
            [table[end] for table in tables.values() for end in _response_columns(table)]
        )
    ).astype(np.int64)
    tokens = pl.Series(source.n_response[rows])
    saved = [load_run(results.folder, run_id) for run_id in runs["run_id"]]
    rewards = rewards_of_responses(source, saved, rows)
    found = []
    with progress("suites", len(tables) * len(rewards), "scores") as bar:
        for split, table in tables.items():
            suite, main = splits[split], SUITES[splits[split]].main
            # From rows of the cache to columns of `rewards`.
            table = table.with_columns(
                pl.Series(end, np.searchsorted(rows, table[end]))
                for end in _response_columns(table)
            )
            each = []
            for own in rewards:
                scored = _score(suite)(table, tokens, own)
                each.append(replicate_suite(suite, scored, replicates, main))
                bar.advance()
            scores = {name: _one_per_run([run[name] for run in each]) for name in main}
            leaked = len(results.leaked.get(split, []))
            found.append(SuiteScores(split, suite, scores, longer[split], leaked, notes[split]))
    return found, skipped


def _score(suite: str) -> Callable[[pl.DataFrame, pl.Series, Rewards], pl.DataFrame]:
    return member_scores if SUITES[suite].groups else pair_scores


def _scores_of_longer(
    suite: str, table: pl.DataFrame, n_response: NDArray[np.int32]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """The length baseline, and what is left out of all scores."""
    kind = SUITES[suite]
    missing = [f"column {name!r}" for name in kind.needs if name not in table.columns]
    if table.is_empty():
        missing = ["groups" if kind.groups else "pairs"]
    if missing:
        raise UserError(
            f'{suite} finds no {missing[0]} in the cache: extract its data with suite = "{suite}"'
        )
    none = np.zeros(len(n_response), np.float32)
    scored = _score(suite)(table, pl.Series(n_response), none)
    return by_length(suite, scored, only=kind.main), check_items(suite, scored).notes


def _table(results: Results, source: Cache, split: str, suite: str) -> pl.DataFrame:
    tables = read_tables(source, results.spec.scenarios, results.spec.data_seeds[0])
    return (tables.members if SUITES[suite].groups else tables.pairs).filter(split=split)


def _response_columns(table: pl.DataFrame) -> list[str]:
    """The columns whose values are rows of the cache's responses."""
    return [name for name in ("chosen", "rejected", "response") if name in table.columns]


def _one_per_run(runs: Sequence[Replicates]) -> Replicates:

    return Replicates(
        estimates=np.concatenate([run.estimates for run in runs]),
        draws=np.concatenate([run.draws for run in runs], axis=1),
        prompts=runs[0].prompts,
        bounds=runs[0].bounds,
    )
