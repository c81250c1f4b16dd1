"""Describe a published benchmark: where it is published, how its files are read and scored."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from embrm.metrics.intervals import Replicates
from embrm.suites.items import Checked

Row = dict[str, Any]

Scorer = Callable[[pl.DataFrame, int, Collection[str] | None], dict[str, Replicates]]
"""(table with the rewards of one run, number of bootstrap replicates, names of the wanted scores or
None for all) → name of a score → its estimate and replicates."""


@dataclass(frozen=True)
class Layout:
    """One set of columns in which a benchmark's files are published.

    needs: columns by which the layout is recognised. also: columns that are used if present; a name
    that ends in "_" stands for all columns that begin with it. rows: turns a row of the file into
    pairs, or members of a group, whose subset is None where the row does not name it; it raises
    ValueError for a row that does not fit.
    """

    needs: tuple[str, ...]
    also: tuple[str, ...]
    rows: Callable[[Row], Iterable[Row]]

    def columns(self, found: Sequence[str]) -> list[str]:
        """Those of a file's columns that this layout reads."""
        families = tuple(name for name in self.also if name.endswith("_"))
        return [
            name
            for name in found
            if name in self.needs or name in self.also or name.startswith(families or ("\0",))
        ]


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    To add one, write a module that defines `SUITE` and add it to `registry.MODULES`.

    name: its name in specs and commands. hub, hub_split: the Hugging Face dataset, and the split of
    it that is scored. layouts: the first whose columns a file has is used. merge: combines pairs
    of the same two texts into one, since a dataset holds each pair once. groups: whether its rows
    give members of groups instead of pairs.

    scores: computes the scores of one run. main: the scores shown in a table over many runs, the
    overall score first; higher is better for all. needs: columns that the scored table must have
    besides subset, prompt_id and those of `rewards`. rewards: the columns of rewards. lengths: the
    columns of token counts that replace them in the length baseline. check: leaves out the items of
    which the table holds only a part. failed: what the benchmark's tool writes in place of a reward
    that could not be computed, and reads as -inf.
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
    check: Callable[[pl.DataFrame], Checked] | None = None
    failed: str | None = None
