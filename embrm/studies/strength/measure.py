"""Strength of preference: what heads trained on the pairs say of each pair (arXiv 2401.06080)."""

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
from embrm.sweeps.training import as_trained, with_rules

DECILES = 10


def strengths(
    folder: Path, name: str, cache: Path | None = None, *, out_of_fold: bool = False
) -> LabelTable:
    """Mean and population standard deviation of the members' reward differences, for every
    training pair, in the direction of the label that they were trained on.

    The members are the heads of all seeds of a configuration of the sweep in `folder`.
    name: the configuration; out of fold, the entry whose grid is `fold`: there each pair is judged
    by the heads that did not see its prompt. In sample, as in the paper, every head judges what
    it was trained on.
    cache: where the cache is now, if it has moved.

    Raises: UserError when there is no such configuration, one of its runs has no weights, a fold is
    missing, or a pair has fewer than two members.
    """
    results = open_results(folder)
    members = _members(results, name, out_of_fold=out_of_fold)
    source = cache_of(results, cache)
    spec = members[0].spec.model_copy(update={"fold": None})
    training, _ = select(source, results.spec.selection(results.cache_id))
    training = training.with_columns(gold="margin")  # a label table may have other margins
    pairs = as_trained(with_rules(training, [spec]), spec)
    differences, fold = _differences(source, members, pairs)
    judged = np.ones(differences.shape, np.bool_)
    if out_of_fold:
        judged = fold[:, None] == folds(pairs["prompt_id"], members[0].spec.fold_of[1])
    if judged.sum(0).min() < 2:
        raise UserError(
            f"{name!r} in {folder}: some pairs are judged by {judged.sum(0).min()} heads: strength "
            "and its spread need at least two, add seeds (and every fold)"
        )
    mean = differences.mean(0, where=judged)
    spread = np.sqrt(((differences - mean) ** 2).mean(0, where=judged))
    side = np.where(pairs["label"].to_numpy() >= 0.5, 1.0, -1.0)
    rows = pairs.select(
        "pair_id",
        "prompt_id",
        "label",
        strength=pl.Series(side * mean),
        spread=pl.Series(spread),
        gold=pl.col("gold") * pl.Series(side),
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
    for member in members:
        if not out_of_fold and member.spec.fold:
            raise UserError(
                f"{name!r} left out a fold of its pairs: pass --out-of-fold with the entry's name"
            )
        learner = member.spec.learner
        if learner and not learner.seeded:
            raise UserError(
                f"{name!r} is a fit that all seeds share (learner {learner.kind!r}), so its heads "
                "agree by nature: take a trained head, or trees with features below 1"
            )
    return members


def _differences(
    cache: Cache, runs: Sequence[SavedRun], pairs: pl.DataFrame
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The reward difference Δ = r(chosen) - r(rejected) of every head on every pair, float64
    [heads, pairs], and the fold that each head was not trained on, int64 [heads]."""
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
    """What the pairs are like, by tenths of their strength, weakest first.

    Columns: decile (from 1), pairs, strength (mean), lowest, highest, spread (mean), negative
    (share whose strength is below 0), right (share whose label agrees with gold, of the pairs
    whose gold is known and not 0; null where there are none), gold (mean).
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
    """The pairs, weakest first, and as decile the tenth that each is in, from 1."""
    ordered = strengths.sort("strength", "pair_id").with_row_index("place")
    decile = (pl.col("place") * DECILES // len(ordered) + 1).cast(pl.Int64)
    return ordered.with_columns(decile=decile).drop("place")
