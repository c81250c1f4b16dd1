"""Geometry of the hidden states that the reward reads, and how far adapters moved them."""

from collections.abc import Sequence

import polars as pl

from embrm.core.formatting import MISSING, number_text, small_text
from embrm.core.table import Table
from embrm.metrics.geometry import SAMPLE
from embrm.reports.sections.layout import mean_over_splits, splits_label
from embrm.results.comparison import Comparison

_COLUMNS = {
    "norm": "norm",
    "CV": "norm_cv",
    "effective rank": "effective_rank",
    "drift": "drift",
    "drift token rows": "drift_tokens",
    "KL token rows": "kl_tokens",
    "KL reward position": "kl_reward",
    "corr length": "corr_length",
    "corr S": "corr_S",
}
"""Column of the table → measure of `embrm.metrics.geometry`."""

_OF_ANY_SIZE = ("norm_cv", "kl_tokens", "kl_reward")
"""Measures that may be tiny: shown with two significant digits, not three decimals."""

_MOVED = (
    "Drift: how far training moved the states, relative to their norm. Compare it with the drift "
    "at token rows, the positions before the last token where regularizers act: an adapter may "
    "move the state that the reward reads and leave those at token rows alone. KL, in nats, is "
    "near 0 wherever the next token is nearly certain, as it often is at the reward position."
)
_NOT_MOVED = (
    "n/a: drift needs an adapter or a fine-tune, and KL an adapter; columns of token rows need a "
    "cache that has them; KL at the reward position needs state = last."
)
_SAMPLED = (
    f"Measured on at most {SAMPLE} responses of each split, which bounds the effective rank, and, "
    "except in columns of token rows, on the states that the reward reads. CV: standard "
    "deviation of the norms / their mean. corr: correlation of the reward with the response's "
    "length in tokens, and with S, its log-probability under the language model."
)


def moved_geometry_tables(comparison: Comparison, top: int) -> list[Table]:
    """The tables of a sweep in which an adapter or a fine-tune moved the states."""
    return _tables(comparison, comparison.best(top)) if _states_moved(comparison) else []


def unmoved_geometry_tables(comparison: Comparison, top: int) -> list[Table]:
    """The tables of a sweep in which all states are as they were extracted."""
    return [] if _states_moved(comparison) else _tables(comparison, comparison.best(top))


def _states_moved(comparison: Comparison) -> bool:
    geometry = comparison.geometry
    return not geometry.is_empty() and geometry["drift"].null_count() < geometry.height


def _tables(comparison: Comparison, shown: list[str]) -> list[Table]:
    """One of the training responses, one of the splits named ood... (else the ranked splits)."""
    if comparison.geometry.is_empty():
        return []
    outside = tuple(split for split in comparison.splits if split.startswith("ood"))
    trained = _table(comparison, shown, (comparison.trained_on,))
    evaluated = _table(comparison, shown, outside or comparison.ranked_splits)
    return [trained, evaluated]


def _table(comparison: Comparison, shown: list[str], splits: Sequence[str]) -> Table:
    ranks = dict(comparison.ranking.select("name", "rank").iter_rows())
    measures = comparison.geometry.filter(
        pl.col("split").is_in(splits), pl.col("name").is_in(shown)
    )
    columns = {
        label: name
        for label, name in _COLUMNS.items()
        if measures[name].null_count() < measures.height
    }
    rows = []
    for name in shown:
        own = measures.filter(pl.col("name") == name)
        values = {column: mean_over_splits(own[column]) for column in columns.values()}
        rows.append(
            (
                str(ranks[name] or ""),
                name,
                *(
                    small_text(value) if column in _OF_ANY_SIZE else number_text(value)
                    for column, value in values.items()
                ),
            )
        )
    if splits == (comparison.trained_on,):
        notes = [_MOVED] if "drift token rows" in columns else []
    else:
        notes = [_NOT_MOVED] if any(MISSING in row for row in rows) else []
        notes.append(_SAMPLED)
    return Table(
        f"Geometry: {splits_label(splits)}",
        ("#", "configuration", *columns),
        tuple(rows),
        " ".join(notes),
        left=2,
        wide=("norm", "corr S"),
    )
