"""The evaluation splits: their sizes, and how well the length of a response predicts preference."""

import polars as pl

from embrm.core.formatting import MISSING, range_text, value_text
from embrm.core.table import Table
from embrm.results.comparison import Comparison


def split_tables(comparison: Comparison, _top: int) -> list[Table]:
    """One row per evaluation split."""
    lengths = {row["split"]: row for row in comparison.lengths.iter_rows(named=True)}
    removed = (
        dict(comparison.leak_free.select("split", "removed").unique().iter_rows())
        if not comparison.leak_free.is_empty()
        else {}
    )
    rows = []
    for split in comparison.splits:
        scores = comparison.scores.filter(pl.col("split") == split)
        length = lengths.get(split)
        rows.append(
            (
                split,
                f"{length['pairs']:,.0f}" if length else "0",
                str(length["prompts"] if length else scores["prompts"].max() or 0),
                f"{value_text(length['estimate'], 'accuracy')} "
                f"{range_text(length['low'], length['high'], 'accuracy')}"
                if length
                else MISSING,
                str(removed.get(split, 0)),
            )
        )
    return [
        Table(
            title="Evaluation splits",
            columns=("split", "pairs", "prompts", "longer is better %", "prompts seen in training"),
            rows=tuple(rows),
            note="Longer is better: accuracy of always preferring the longer response.",
        )
    ]
