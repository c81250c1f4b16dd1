"""Rewards of single pairs under one stored run."""

from pathlib import Path

import polars as pl

from embrm.sweep.ledger import cache_of, load_run, open_results
from embrm.train.heads import score


def scores(folder: Path, run_id: str, cache: Path | None = None) -> pl.DataFrame:
    """Every pair of the cache under run `run_id` of the sweep in `folder`.

    Columns: pair_id, split, subset, prompt_id, scores_chosen, scores_rejected (float32, the field
    names of reward-bench), in the cache's order. Recomputed from the stored weights: the bits of
    the ledger's metrics on the same machine with one thread.

    cache: where the cache is now, if it has moved.
    Raises: UserError for an unknown run, one without weights, or a cache the run was not made on.
    """
    run = load_run(folder, run_id)
    source = cache_of(open_results(folder), cache)
    rewards = score(run.parameters, run.preprocess, source.states(run.spec.state))[0].numpy()
    return source.pairs.select(
        "pair_id",
        "split",
        "subset",
        "prompt_id",
        pl.Series("scores_chosen", rewards[source.pairs["chosen"].to_numpy()]),
        pl.Series("scores_rejected", rewards[source.pairs["rejected"].to_numpy()]),
    )
