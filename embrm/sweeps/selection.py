"""Which rows of a cache a sweep trains on, validates on and evaluates on."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.cache.reader import Cache
from embrm.data.scenarios import SCENARIOS
from embrm.data.splits import draws, holdout
from embrm.metrics.accuracy import EvaluationSplit
from embrm.sweeps.spec import Selection
from embrm.sweeps.tables import Tables, read_tables

TRAINED_ON = ("chosen", "rejected", "label", "weight", "margin")
_PAIRS = ("split", "chosen", "rejected", "prompt_id", "subset", "label", "weight")
_MEMBERS = ("split", "response", "prompt_id", "subset", "gold")


def select(cache: Cache, selection: Selection) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The training and the validation pairs of `cache`, divided by prompt.

    They are sorted by pair id, which is a hash, so their order is random but fixed; with a data
    seed, by another hash of seed and id.
    """
    tables = _tables(cache, selection)
    trained_on = tables.pairs.lazy().filter(pl.col("split").is_in(selection.train))
    pairs = trained_on.select("pair_id", "prompt_id", *TRAINED_ON).sort("pair_id").collect()
    seed = selection.data_seed
    if seed:
        pairs = pairs[np.argsort(np.array(draws(pairs["pair_id"], seed, "pairs"), np.uint64))]
    held = pl.Series(holdout(pairs["prompt_id"], selection.validation, seed))
    return pairs.filter(~held), pairs.filter(held)


def with_gold(cache: Cache, selection: Selection) -> pl.DataFrame:
    """Group members of the training prompts: response int64, prompt_id and gold, by response."""
    members = _tables(cache, selection).members
    found = members.filter(pl.col("split").is_in(selection.train)).select(
        pl.col("response").cast(pl.Int64), "prompt_id", "gold"
    )
    held = pl.Series(
        holdout(found["prompt_id"], selection.validation, selection.data_seed), dtype=pl.Boolean
    )
    return found.filter(~held).sort("response", maintain_order=True)


def evaluation_splits(cache: Cache, selection: Selection) -> dict[str, EvaluationSplit]:
    """Every split that is not trained on, prepared for evaluation."""
    return splits_of(*evaluated_tables(cache, selection), cache.n_response)


def evaluated_tables(cache: Cache, selection: Selection) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The pairs and the group members of all splits that are not trained on."""
    other = ~pl.col("split").is_in(selection.train)
    tables = _tables(cache, selection)
    return tables.pairs.filter(other).select(_PAIRS), tables.members.filter(other).select(_MEMBERS)


def splits_of(
    pairs: pl.DataFrame, members: pl.DataFrame, n_response: NDArray[np.int32]
) -> dict[str, EvaluationSplit]:
    return {
        split: EvaluationSplit.of(
            pairs.filter(pl.col("split") == split),
            members.filter(pl.col("split") == split),
            n_response,
        )
        for split in sorted({*pairs["split"], *members["split"]})
    }


def prompts_of(cache: Cache, selection: Selection, data_seeds: Sequence[int]) -> pl.DataFrame:
    """The `prompt_table` of a sweep.

    Where several data seeds divide groups into scenarios, the column data_seed says whose prompts
    these are; it is null for splits that are the same for all.
    """
    drawn = data_seeds if selection.scenarios else data_seeds[:1]
    found = [prompt_table(evaluation_splits(cache, selection.drawn(seed))) for seed in drawn]
    if len(found) == 1:
        return found[0]
    divided = pl.col("split").is_in(SCENARIOS)
    of_each = [
        table.filter(divided).with_columns(data_seed=pl.lit(seed, pl.Int64))
        for seed, table in zip(drawn, found, strict=True)
    ]
    same = found[0].filter(~divided).with_columns(data_seed=pl.lit(None, pl.Int64))
    return pl.concat([same, *of_each]).sort("split", maintain_order=True)


def _tables(cache: Cache, selection: Selection) -> Tables:
    return read_tables(cache, selection.scenarios, selection.data_seed)


def prompt_table(splits: Mapping[str, EvaluationSplit]) -> pl.DataFrame:
    """The prompts of all splits: split and `accuracy.PROMPTS`, which are the same for every run."""
    return pl.concat(
        split.prompts.select(pl.lit(name).alias("split"), pl.all())
        for name, split in splits.items()
    )
