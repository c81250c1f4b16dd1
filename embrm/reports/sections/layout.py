"""What several sections of the report share: how splits are laid out in tables and averaged."""

from collections.abc import Iterable, Sequence

import polars as pl

_MOST_ACROSS = 8
"""Largest number of split columns in one table: with the names, they fit 100 terminal columns."""


def across_tables(splits: Sequence[str]) -> Iterable[Sequence[str]]:
    """Divide splits over as few tables as hold `_MOST_ACROSS` each, as evenly as possible."""
    if not splits:
        return []
    count = -(-len(splits) // _MOST_ACROSS)
    size = -(-len(splits) // count)
    return [splits[start : start + size] for start in range(0, len(splits), size)]


def splits_label(splits: Sequence[str]) -> str:
    """Name what a table's numbers are measured on: one split, or the mean over several."""
    return splits[0] if len(splits) == 1 else f"mean over {', '.join(splits)}"


def mean_over_splits(values: pl.Series) -> float | None:
    """Average the values that are not null; None if all are."""
    mean = values.mean()
    return float(mean) if isinstance(mean, float) else None
