"""The pairs and group members that a sweep reads: the cache's, or those that scenarios make."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import polars as pl

from embrm.cache.reader import Cache
from embrm.core.errors import UserError
from embrm.data.scenarios import SCENARIOS, Scenarios, divide


@dataclass(frozen=True)
class Tables:
    """Pairs and group members, with the columns of the cache's tables of the same names."""

    pairs: pl.DataFrame
    members: pl.DataFrame

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have pairs or members, sorted."""
        return sorted({*self.pairs["split"], *self.members["split"]})

    def sizes(self, train: Sequence[str]) -> dict[str, dict[str, int]]:
        """Split → numbers of pairs, prompts and responses, and how many of its prompts and
        responses also occur in the splits `train`."""
        ends = pl.concat(
            [
                self.pairs.select("split", "prompt_id", response="chosen"),
                self.pairs.select("split", "prompt_id", response="rejected"),
                self.members.select("split", "prompt_id", "response"),
            ]
        ).unique()
        trained = ends.filter(pl.col("split").is_in(train))
        pairs = dict(self.pairs.group_by("split").len().rows())
        seen = {name: pl.col(name).is_in(trained[name].implode()) for name in ends.columns[1:]}
        used = ends.group_by("split").agg(
            prompts=pl.col("prompt_id").n_unique(),
            responses=pl.col("response").n_unique(),
            prompts_trained_on=pl.col("prompt_id").filter(seen["prompt_id"]).n_unique(),
            responses_trained_on=pl.col("response").filter(seen["response"]).n_unique(),
        )
        names = used.columns[1:]
        return {
            split: {"pairs": pairs.get(split, 0), **dict(zip(names, counts, strict=True))}
            for split, *counts in used.sort("split").rows()
        }


@lru_cache(maxsize=1)  # Dividing takes seconds, and several callers need the result.
def read_tables(cache: Cache, scenarios: Scenarios | None, data_seed: int = 0) -> Tables:
    """Read the tables of `cache`; with scenarios, their splits replace those that they divide.

    data_seed: see `scenarios.divide`.

    Raises: UserError for what `divide` refuses, or when the cache already has a split of a name
    that scenarios give.
    """
    if scenarios is None:
        return Tables(cache.pairs, cache.members)
    for name in scenarios.splits:
        if name not in cache.splits:
            raise UserError(
                f"scenarios: split {name!r} is not in {cache.folder}, which has "
                f"{', '.join(cache.splits)}: name those whose groups shall be divided"
            )
    others = [split for split in cache.splits if split not in scenarios.splits]
    for name in SCENARIOS:
        if name in others:
            raise UserError(
                f"scenarios: {cache.folder} has a split {name!r} already: add it to "
                "scenarios.splits, or extract it under another name"
            )
    pairs, members = divide(cache.members, cache.responses, scenarios, data_seed)
    kept = pl.col("split").is_in(others)
    return Tables(
        pl.concat([pairs, cache.pairs.filter(kept)], how="diagonal"),
        pl.concat([members, cache.members.filter(kept)]),
    )
