"""Accuracy and Kendall's τ-b on every evaluation split, and differences to the baseline."""

import polars as pl

from embrm.core.formatting import short_difference_text, short_text
from embrm.core.table import Table
from embrm.reports.sections.layout import across_tables
from embrm.results.comparison import Comparison

_HALF_WIDTH = "Plus or minus: half the width of the 95 % interval."


def accuracy_tables(comparison: Comparison, top: int) -> list[Table]:
    """Accuracy on the splits with pairs, one column per split."""
    return _tables(comparison, comparison.best(top), "accuracy", "Accuracy %")


def tau_tables(comparison: Comparison, top: int) -> list[Table]:
    """Kendall's τ-b on the splits with groups, one column per split."""
    return _tables(comparison, comparison.best(top), "tau", "Kendall tau-b")


def _tables(comparison: Comparison, shown: list[str], metric: str, label: str) -> list[Table]:
    """A table of estimates, then one of differences to the baseline, for each set of splits."""
    scores = comparison.scores.filter(pl.col("metric") == metric)
    found = {(row["split"], row["name"]): row for row in scores.iter_rows(named=True)}
    others = [name for name in shown if name != comparison.baseline]
    tables = []
    for splits in across_tables([s for s in comparison.splits if s in scores["split"]]):
        columns = ("configuration", *splits)
        rows = [
            (name, *(short_text(found[split, name], metric) for split in splits)) for name in shown
        ]
        if metric == "accuracy":
            lengths = {row["split"]: row for row in comparison.lengths.iter_rows(named=True)}
            cells = (short_text(lengths[split], metric) for split in splits)
            rows.append(("(longer is better)", *cells))
        tables.append(Table(f"{label} by split", columns, tuple(rows), _HALF_WIDTH))
        if comparison.baseline is None or not others:
            continue
        tables.append(
            Table(
                f"{label} minus {comparison.baseline} by split",
                columns,
                tuple(
                    (name, *(short_difference_text(found[split, name], metric) for split in splits))
                    for name in others
                ),
                f"{_HALF_WIDTH} Triangle: the interval of the paired difference excludes 0, "
                "without adjustment for the number of comparisons.",
            )
        )
    return tables
