"""Measure the preference strength of training pairs with an ensemble of heads (arXiv 2401.06080).

Weak and negative strengths point to wrong labels; `embrm.data.remedies` corrects labels by them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm import __version__
from embrm.cache.reader import Cache
from embrm.core.errors import UserError, nearest
from embrm.data.label_tables import LabelTable
from embrm.data.splits import folds
from embrm.results.ledger import Results, cache_of, open_results
from embrm.results.rewards import head_rewards
from embrm.results.weights import SavedRun, load_run
from embrm.sweeps.selection import select
from embrm.sweeps.training_pairs import as_trained, with_rules

DECILES = 10
"""Number of groups of equal size that `with_decile` divides the pairs into."""


def strengths(
    folder: Path, name: str, cache: Path | None = None, *, out_of_fold: bool = False
) -> LabelTable:
    """Measure the preference strength of every training pair of the sweep in `folder`.

    The ensemble is the heads of all seeds of the configuration `name`. The strength of a pair is
    the mean over the heads of the reward difference Δ = r(chosen) - r(rejected), with the opposite
    sign where the heads were trained to prefer the rejected response (label < 0.5). Its spread is
    the population standard deviation of Δ over the heads.

    out_of_fold: evaluate each pair only by the heads that were not trained on its prompt. `name` is
    then the entry of the spec whose grid lists every fold. Otherwise all heads evaluate all pairs,
    those they were trained on included, as in the paper.
    cache: the cache's current path, if it has moved.

    Returns a label table of the kind "strengths" (see `embrm.data.label_tables`).
    Raises: UserError when there is no such configuration, one of its runs has no weights, all seeds
    share one fit, or fewer than two heads evaluate a pair, as when a fold is missing.
    """
    results = open_results(folder)
    members = _members(results, name, out_of_fold=out_of_fold)
    source = cache_of(results, cache)
    spec = members[0].spec.model_copy(update={"fold": None})
    selection = results.spec.selection(results.cache_id).drawn(spec.data_seed)
    training, _ = select(source, selection)
    # Copied before the run's label table is applied, which may replace the margins.
    training = training.with_columns(gold="margin")
    pairs = as_trained(with_rules(training, [spec]), spec)
    differences, fold = _differences(source, members, pairs)
    used = np.ones(differences.shape, np.bool_)
    if out_of_fold:
        used = fold[:, None] == folds(
            pairs["prompt_id"], members[0].spec.fold_of[1], spec.data_seed
        )
    fewest = used.sum(0).min()
    if fewest < 2:
        raise UserError(
            f"{name!r} in {folder}: some pairs are evaluated by {fewest} heads, but a strength "
            "and its spread need at least 2: sweep it with more seeds"
            f"{' and with every fold' if out_of_fold else ''}"
        )
    mean = differences.mean(0, where=used)
    spread = np.sqrt(((differences - mean) ** 2).mean(0, where=used))
    sign = np.where(pairs["label"].to_numpy() >= 0.5, 1.0, -1.0)
    rows = pairs.select(
        "pair_id",
        "prompt_id",
        "label",
        strength=pl.Series(sign * mean),
        spread=pl.Series(spread),
        gold=pl.col("gold") * pl.Series(sign),
    )
    provenance = {
        "rule": f"strength {'out of fold' if out_of_fold else 'in sample'}",
        "parameters": {
            "run": spec.model_dump(mode="json", exclude={"seed"}),
            "run_ids": sorted(member.run_id for member in members),
        },
        "cache_id": results.cache_id,
        "embrm": __version__,
    }
    return LabelTable("strengths", rows, provenance)


def _members(results: Results, name: str, *, out_of_fold: bool) -> list[SavedRun]:
    ledger = results.ledger
    named = pl.col("config") == name
    if out_of_fold:
        named = pl.col("config").str.starts_with(f"{name}[fold=")
    found = ledger.filter(named)
    if found.is_empty():
        if out_of_fold:
            remedy = "add grid = { fold = ['0/5', '1/5', '2/5', '3/5', '4/5'] } to the entry"
        else:
            remedy = nearest(name, set(ledger["config"]))
        raise UserError(
            f"no {'folds of ' if out_of_fold else ''}{name!r} in {results.folder}: {remedy}"
        )
    members = [load_run(results.folder, run_id) for run_id in found["run_id"]]
    data_seeds = sorted({member.spec.data_seed for member in members})
    if len(data_seeds) > 1:
        raise UserError(
            f"{name!r} in {results.folder} has data seeds {', '.join(map(str, data_seeds))}, which "
            "train on different pairs: sweep it with one data seed"
        )
    for member in members:
        if not out_of_fold and member.spec.fold:
            raise UserError(
                f"{name!r} was trained without fold {member.spec.fold}: pass out_of_fold "
                "(--out-of-fold) with "
                "the name of its entry in the spec"
            )
        learner = member.spec.learner
        if learner and not learner.seeded:
            raise UserError(
                f"{name!r} is a fit that all seeds share (learner {learner.kind!r}), so its heads "
                "are identical and have no spread: take a configuration without learner, or "
                "gradient boosting with features below 1"
            )
    return members


def _differences(
    cache: Cache, runs: Sequence[SavedRun], pairs: pl.DataFrame
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Reward differences Δ of every head on every pair, float64 [heads, pairs], and the fold that
    each head was not trained on, int64 [heads], -1 where there is none."""
    ends = pairs.select("chosen", "rejected").to_numpy().astype(np.int64)
    rows, places = np.unique(ends, return_inverse=True)
    chosen, rejected = places.reshape(ends.shape).T
    differences, fold = [], []
    for place, rewards in head_rewards(cache, runs, rows):
        wide = rewards.double().numpy()
        differences.append(wide[:, chosen] - wide[:, rejected])
        fold += [runs[place].spec.fold_of[0]] * len(rewards)
    return np.concatenate(differences), np.array(fold, dtype=np.int64)


def deciles(strengths: pl.DataFrame) -> pl.DataFrame:
    """Summarize the rows of a "strengths" label table by decile of strength, weakest first.

    Columns: decile (from 1), pairs (number), strength (mean), lowest and highest (strength), spread
    (mean), negative (share of strengths below 0), right (share of the labels that agree with gold,
    among pairs whose gold difference is known and not 0; null if there are none), gold (mean gold
    difference in the direction of the label).

    """
    known = pl.col("gold").filter(pl.col("gold") != 0)
    return (
        with_decile(strengths)
        .group_by("decile", maintain_order=True)
        .agg(
            pairs=pl.len(),
            strength=pl.col("strength").mean(),
            lowest=pl.col("strength").min(),
            highest=pl.col("strength").max(),
            spread=pl.col("spread").mean(),
            negative=(pl.col("strength") < 0).mean(),
            right=(known > 0).mean(),
            gold=pl.col("gold").mean(),
        )
    )


def with_decile(strengths: pl.DataFrame) -> pl.DataFrame:
    """Sort pairs by strength, weakest first, and add the column decile, int64 from 1."""

    ordered = strengths.sort("strength", "pair_id").with_row_index("place")
    decile = (pl.col("place") * DECILES // len(ordered) + 1).cast(pl.Int64)
    return ordered.with_columns(decile=decile).drop("place")
