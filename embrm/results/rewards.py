"""Compute rewards of stored runs from their weights, for a cache's responses or other states."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embrm.cache.reader import Cache
from embrm.core.errors import UserError
from embrm.results.ledger import cache_of, open_results
from embrm.results.weights import SavedRun, load_run
from embrm.sweeps.selection import select
from embrm.sweeps.tables import read_tables
from embrm.sweeps.training_pairs import as_trained, with_rules
from embrm.sweeps.views import open_view
from embrm.training.heads import REWARDS, score_states
from embrm.training.row_store import RowStore

_PAIR = (
    *("pair_id", "split", "used", "subset", "prompt_id", "source", "row"),
    *("chosen_model", "rejected_model", "label", "weight"),
)
"""Columns of a pair that are copied into a table of scores, if the cache has them."""


def scores(folder: Path, run: str, cache: Path | None = None) -> pl.DataFrame:
    """Score every pair that a sweep reads with one of its runs.

    run: a run id, the beginning of one, or CONFIGURATION@SEED.
    cache: where the cache is now, if it has moved.

    Returns one row per pair, in the cache's order: pair_id, split, used ("train", "validation",
    "evaluation", or null for a pair of a train split that the run did not use), subset, prompt_id,
    source and row (the pair's place in the data), chosen_model, rejected_model, label, weight,
    tokens_chosen, tokens_rejected (numbers of response tokens), scores_chosen, scores_rejected
    (rewards, float32, named as in the reward-bench package). On the same machine, with one thread,
    they have the bits from which the ledger's metrics were computed.

    Raises: UserError for an unknown run, a run without weights, or another cache.
    """
    results = open_results(folder)
    saved = load_run(folder, results.find(run)["run_id"])
    source = cache_of(results, cache)
    [rewards] = rewards_of_responses(source, [saved], np.arange(source.manifest.n_responses))
    selection = results.spec.selection(results.cache_id).drawn(saved.spec.data_seed)
    training, validation = select(source, selection)
    training = as_trained(with_rules(training, [saved.spec]), saved.spec)
    pair = pl.col("pair_id")
    used = (
        pl.when(pair.is_in(training["pair_id"].implode()))
        .then(pl.lit("train"))
        .when(pair.is_in(validation["pair_id"].implode()))
        .then(pl.lit("validation"))
        .when(pl.col("split").is_in(selection.train))
        .then(None)  # beyond `pairs_limit`, in the fold left out, or with weight 0
        .otherwise(pl.lit("evaluation"))
    )
    pairs = read_tables(source, selection.scenarios, selection.data_seed).pairs.with_columns(
        used.alias("used")
    )
    return pair_scores(pairs, source.responses["n_response"], rewards)


def pair_scores(
    pairs: pl.DataFrame, tokens: pl.Series, rewards: NDArray[np.float32]
) -> pl.DataFrame:
    """Add the number of tokens and the reward of both responses to pairs; columns as in `scores`.

    tokens: int [responses]. rewards: float32 [responses]. Both are indexed by the pairs' chosen and
    rejected.
    """
    ends = {name: pairs[name].to_numpy() for name in ("chosen", "rejected")}
    return pairs.select(
        *(name for name in _PAIR if name in pairs.columns),
        *(tokens.gather(rows).alias(f"tokens_{name}") for name, rows in ends.items()),
        *(pl.Series(f"scores_{name}", rewards[rows]) for name, rows in ends.items()),
    )


def member_scores(
    members: pl.DataFrame, tokens: pl.Series, rewards: NDArray[np.float32]
) -> pl.DataFrame:
    """Add tokens and score, the number of tokens and the reward, to group members; see
    `pair_scores`."""
    rows = members["response"].to_numpy()
    return members.with_columns(
        tokens=tokens.gather(rows), score=pl.Series(rewards[rows], dtype=pl.Float32)
    )


def rewards_of_states(run: SavedRun, states: torch.Tensor) -> NDArray[np.float32]:
    """Rewards float32 [n] of states float32 [n, d], pooled as the run's `state` says.

    Raises: UserError for a learner such as boosted trees, of which rewards are stored, not weights.
    """
    if REWARDS in run.parameters:
        raise UserError(
            f"run {run.run_id} has no weights, only the rewards of its cache's responses: "
            "it cannot score other states, choose a run with a head"
        )
    heads = score_states(
        run.parameters, run.preprocess, RowStore(states), torch.arange(len(states))
    )
    return run.combination(heads).numpy()


def rewards_of_responses(
    cache: Cache, runs: Sequence[SavedRun], rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Rewards float32 [runs, n] of the responses `rows` int64 [n] of a cache, ascending.

    The heads of a run are combined as its spec says.
    """
    rewards = np.empty((len(runs), len(rows)), np.float32)
    for place, heads in head_rewards(cache, runs, rows):
        rewards[place] = runs[place].combination(heads).numpy()
    return rewards


def head_rewards(
    cache: Cache, runs: Sequence[SavedRun], rows: NDArray[np.int64]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the index of each run and the rewards of its heads, float32 [heads, n].

    rows: int64 [n], ascending rows of the cache's responses. Runs come grouped by their view of the
    states, because every view is read only once.
    """
    for name in sorted({run.spec.state for run in runs}):
        parts, first = [], 0
        for shard in open_view(cache, name).shards():
            own = rows[(rows >= first) & (rows < first + len(shard))] - first
            parts.append(shard[torch.from_numpy(own)])
            first += len(shard)
        states, every = RowStore(torch.cat(parts)), torch.arange(len(rows))
        for place, run in enumerate(runs):
            if run.spec.state == name:
                # Runs without weights store the rewards of all responses of the cache.
                at = torch.from_numpy(rows) if REWARDS in run.parameters else every
                yield place, score_states(run.parameters, run.preprocess, states, at)
