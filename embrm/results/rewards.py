"""Rewards of a cache's responses under stored runs, computed again from the weights."""

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
from embrm.sweeps.training import as_trained, with_rules
from embrm.sweeps.views import open_view
from embrm.training.heads import REWARDS, score_states
from embrm.training.states import States

_PAIR = (
    *("pair_id", "split", "used", "subset", "prompt_id", "source", "row"),
    *("chosen_model", "rejected_model", "label", "weight"),
)
"""Columns of a pair that are given beside its rewards, if the cache has them."""


def scores(folder: Path, run: str, cache: Path | None = None) -> pl.DataFrame:
    """Score every pair that a sweep reads by one of its runs.

    run: a run id, the beginning of one, or CONFIGURATION@SEED.

    Columns: pair_id, split, used ("train", "validation" or "evaluation"), subset, prompt_id, source
    and row (where the pair stands in the data), chosen_model, rejected_model, label, weight,
    tokens_chosen, tokens_rejected (of the responses), scores_chosen, scores_rejected (float32, the
    field names of reward-bench), in the cache's order. On the same machine with one thread they
    have the bits that the ledger's metrics were computed from.

    cache: where the cache is now, if it has moved.
    Raises: UserError for an unknown run, one without weights, or a cache the run was not made on.
    """
    results = open_results(folder)
    saved = load_run(folder, results.find(run)["run_id"])
    source = cache_of(results, cache)
    [rewards] = rewarded(source, [saved], np.arange(source.manifest.n_responses))
    selection = results.spec.selection(results.cache_id)
    training, validation = select(source, selection)
    training = as_trained(with_rules(training, [saved.spec]), saved.spec)
    pair = pl.col("pair_id")
    used = (
        pl.when(pair.is_in(training["pair_id"].implode()))
        .then(pl.lit("train"))
        .when(pair.is_in(validation["pair_id"].implode()))
        .then(pl.lit("validation"))
        .when(pl.col("split").is_in(selection.train))
        .then(None)  # beyond the run's limit, in its left-out fold, or with weight 0
        .otherwise(pl.lit("evaluation"))
    )
    pairs = read_tables(source, selection.scenarios).pairs.with_columns(used.alias("used"))
    return pair_scores(pairs, source.responses["n_response"], rewards)


def pair_scores(
    pairs: pl.DataFrame, tokens: pl.Series, rewards: NDArray[np.float32]
) -> pl.DataFrame:
    """Pairs with the tokens and the scores of both responses; columns as of `scores`.

    tokens, rewards: of all responses, which the pairs' chosen and rejected index.
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
    """Group members with the tokens and the score of their responses; see `pair_scores`."""
    rows = members["response"].to_numpy()
    return members.with_columns(
        tokens=tokens.gather(rows), score=pl.Series(rewards[rows], dtype=pl.Float32)
    )


def reward_of(run: SavedRun, states: torch.Tensor) -> NDArray[np.float32]:
    """Rewards float32 [n] of any states float32 [n, d] of the view that the run reads.

    Raises: UserError for a run of trees, whose rewards are stored in place of weights.
    """
    if REWARDS in run.parameters:
        raise UserError(
            f"run {run.run_id} keeps the rewards of its cache's responses and has no weights: it "
            "cannot score other states, take a run with a head"
        )
    heads = score_states(run.parameters, run.preprocess, States(states), torch.arange(len(states)))
    return run.combination(heads).numpy()


def rewarded(
    cache: Cache, runs: Sequence[SavedRun], rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Rewards float32 [runs, n] of the cache's responses `rows` int64 [n], which are ascending.

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
        states, every = States(torch.cat(parts)), torch.arange(len(rows))
        for place, run in enumerate(runs):
            if run.spec.state == name:
                # Runs without weights store rewards of all responses of the cache.
                at = torch.from_numpy(rows) if REWARDS in run.parameters else every
                yield place, score_states(run.parameters, run.preprocess, states, at)
