"""How far runs with a regularizer move the language model's predictions, beside the same runs
without one: only what training distorts can be protected."""

from collections.abc import Iterable
from typing import Any

import polars as pl

from embrm.core.formatting import (
    MISSING,
    short_difference_text,
    small_text,
    value_text,
)
from embrm.core.table import Table
from embrm.results.comparison import Comparison

_LARGE = 10
"""Values of at least this are shown without decimals, smaller ones with two digits."""

_NO_TWIN = "none in this sweep: add it"

_EXPLAINED = (
    "Token KL: mean KL, in nats, between the next-token predictions before and after training, at "
    "token rows of the training responses; mean over seeds ± standard deviation. BT twin: the "
    "configuration with the same spec, its pair loss included, and no regularizer. A regularizer "
    "can only protect predictions that training distorts, so compare regularizers at matched "
    "distortion: where their twins have the same token KL, such as that of a fine-tune (match in "
    "the sweep's runs chooses learning rates for it). At a twin's KL of 0.02 nats there is next to "
    "nothing to protect, and a difference near 0 is no verdict on the regularizer."
)
_PAIRED = (
    "minus twin: paired difference, plus or minus half its 95 % interval; triangle: the interval "
    "excludes 0, not adjusted for the number of rows."
)
_ADD = (
    f"{_NO_TWIN}: without a run that has the same keys and no regularizer, what the regularizer "
    "changes is unknown."
)
_NOT_MEASURED = (
    f"{MISSING}: token KL needs an adapter, a cache with token rows and an LM head, and a value "
    "for every seed; it is not measured for fine-tunes."
)


def distortion_tables(comparison: Comparison, top: int) -> list[Table]:
    """One row per configuration with a regularizer at token rows, below its twin's row; none where
    no configuration among the best `top` has one."""
    if comparison.distortion.is_empty():
        return []
    regularized = comparison.distortion.filter(pl.col("regularizer").is_not_null())
    best = comparison.best(top)
    shown = regularized.filter(pl.col("name").is_in(best))
    if shown.is_empty():
        return []
    rows = [_cells(comparison, row) for row in _grouped(comparison, shown)]
    label = "accuracy %" if comparison.metric == "accuracy" else "Kendall tau-b"
    return [
        Table(
            f"Distortion: token KL of {comparison.trained_on}",
            ("#", "configuration", "BT twin", "token KL", "twin's KL", label, "minus twin"),
            tuple(rows),
            " ".join(_notes(comparison, shown, regularized.height - shown.height)),
            left=3,
        )
    ]


def _grouped(comparison: Comparison, shown: pl.DataFrame) -> Iterable[dict[str, Any]]:
    """Each twin, followed by the configurations that it is the twin of, in the ranking's order."""
    every = {row["name"]: row for row in comparison.distortion.iter_rows(named=True)}
    for twin in shown["twin"].unique(maintain_order=True):
        if twin in every:
            yield every[twin]
        yield from shown.filter(pl.col("twin").eq_missing(pl.lit(twin))).iter_rows(named=True)


def _cells(comparison: Comparison, row: dict[str, Any]) -> tuple[str, ...]:
    name, twin, metric = row["name"], row["twin"], comparison.metric
    ranks = dict(comparison.ranking.select("name", "rank").iter_rows())
    is_twin = row["regularizer"] is None
    finished = twin is None or twin in ranks
    return (
        str(ranks[name] or ""),
        name,
        "is the twin" if is_twin else twin or _NO_TWIN,
        _kl_text(row["kl"], row["kl_sd"]),
        *(
            ("", value_text(row["estimate"], metric), "")
            if is_twin
            else (
                _kl_text(row["twin_kl"], row["twin_kl_sd"]) if finished else "no finished runs",
                value_text(row["estimate"], metric),
                short_difference_text(row, metric),
            )
        ),
    )


def _kl_text(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return MISSING
    text = f"{mean:.0f}" if mean >= _LARGE else small_text(mean)
    if sd is None:
        return text
    return f"{text}±{sd:.0f}" if sd >= _LARGE else f"{text}±{sd:.1g}"


def _notes(comparison: Comparison, shown: pl.DataFrame, left_out: int) -> list[str]:
    notes = [_EXPLAINED, _PAIRED]
    if shown["twin"].null_count():
        notes.append(_ADD)
    finished = shown.filter(pl.col("twin").is_in(comparison.ranking["name"].implode()))
    if shown["kl"].null_count() or finished["twin_kl"].null_count():
        notes.append(_NOT_MEASURED)
    if left_out:
        notes.append(f"{left_out} more configurations with a regularizer in report.json.")
    return notes
