"""Which rows of a cache a sweep trains on, validates on and evaluates on."""

from collections.abc import Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.cache.reader import Cache
from embrm.data.splits import holdout
from embrm.metrics.accuracy import EvaluationSplit
from embrm.sweeps.spec import Selection
from embrm.sweeps.tables import read_tables

TRAINED_ON = ("chosen", "rejected", "label", "weight", "margin")
_PAIRS = ("split", "chosen", "rejected", "prompt_id", "subset", "label", "weight")
_MEMBERS = ("split", "response", "prompt_id", "subset", "gold")


def select(cache: Cache, selection: Selection) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The training and the validation pairs of `cache`, divided by prompt, sorted by pair id.

    Pair ids are hashes, so their order is random but fixed.
    """
    tables = read_tables(cache, selection.scenarios)
    trained_on = tables.pairs.lazy().filter(pl.col("split").is_in(selection.train))
    pairs = trained_on.select("pair_id", "prompt_id", *TRAINED_ON).sort("pair_id").collect()
    held = pl.Series(holdout(pairs["prompt_id"], selection.validation, 0))
    return pairs.filter(~held), pairs.filter(held)


def with_gold(cache: Cache, selection: Selection) -> pl.DataFrame:
    """Group members of the training prompts: response int64, prompt_id and gold, by response."""
    members = read_tables(cache, selection.scenarios).members
    found = members.filter(pl.col("split").is_in(selection.train)).select(
        pl.col("response").cast(pl.Int64), "prompt_id", "gold"
    )
    held = pl.Series(holdout(found["prompt_id"], selection.validation, 0), dtype=pl.Boolean)
    return found.filter(~held).sort("response", maintain_order=True)


def evaluation_splits(cache: Cache, selection: Selection) -> dict[str, EvaluationSplit]:
    """Every split that is not trained on, prepared for evaluation."""
    return splits_of(*evaluated_tables(cache, selection), cache.n_response)


def evaluated_tables(cache: Cache, selection: Selection) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The pairs and the group members of all splits that are not trained on."""
    other = ~pl.col("split").is_in(selection.train)
    tables = read_tables(cache, selection.scenarios)
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


def prompt_table(splits: Mapping[str, EvaluationSplit]) -> pl.DataFrame:
    """The prompts of all splits: split and `accuracy.PROMPTS`, which are the same for every run."""
    return pl.concat(
        split.prompts.select(pl.lit(name).alias("split"), pl.all())
        for name, split in splits.items()
    )
