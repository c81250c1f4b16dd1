"""A published benchmark: where it is, how its files are read, and how it is scored."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from embrm.metrics.intervals import Replicates

Row = dict[str, Any]

Scorer = Callable[[pl.DataFrame, int, Collection[str] | None], dict[str, Replicates]]
"""(rewards of one run as a table, number of replicates, names of the wanted scores or None for
all) → these scores."""


@dataclass(frozen=True)
class Layout:
    """One layout in which a benchmark's files come.

    needs: columns that it is recognised by. also: columns that are used if present; a name that
    ends in "_" stands for all columns that begin with it. rows: from a row of the file to rows of
    pairs, or to members of a group, with subset None where the row names none; it raises ValueError
    for a row that does not fit.
    """

    needs: tuple[str, ...]
    also: tuple[str, ...]
    rows: Callable[[Row], Iterable[Row]]

    def columns(self, found: Sequence[str]) -> list[str]:
        """The columns that are read, of those that a file has."""
        families = tuple(name for name in self.also if name.endswith("_"))
        return [
            name
            for name in found
            if name in self.needs or name in self.also or name.startswith(families or ("\0",))
        ]


@dataclass(frozen=True)
class Suite:
    """A benchmark. To add one, write its module with a `SUITE` and name it in `registry.MODULES`.

    name: what specs and commands call it. hub, hub_split: where it is published, and the split that
    is scored. layouts: the first whose columns a file has is used. merge: makes one row of rows of
    pairs with the same texts, which a dataset holds once. groups: whether its rows are members of
    groups instead of pairs.

    scores: how one run's rewards are scored. main: the scores that a table over many runs shows,
    the overall score first; higher is better. needs: columns of the rewards' table besides subset,
    prompt_id and `rewards`. lengths: token counts that take the rewards' place in the length
    baseline.
    """

    name: str
    hub: str
    hub_split: str | None
    layouts: tuple[Layout, ...]
    scores: Scorer
    main: tuple[str, ...]
    merge: Callable[[Sequence[Row]], Row] | None = None
    groups: bool = False
    needs: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ("scores_chosen", "scores_rejected")
    lengths: tuple[str, ...] = ("tokens_chosen", "tokens_rejected")
