"""Calibration: how well predicted probabilities match how often they are right."""

from collections.abc import Sequence

import polars as pl

from embrm.core.formatting import number_text, value_text
from embrm.core.table import Table
from embrm.reports.sections.layout import mean_over_splits, splits_label
from embrm.results.comparison import Comparison

_COLUMNS = {
    "NLL": "nll",
    "NLL at T": "nll_calibrated",
    "Brier": "brier",
    "Brier at T": "brier_calibrated",
    "ECE": "ece",
    "ECE at T": "ece_calibrated",
    "margin": "margin",
    "reward sd": "reward_sd",
    "ties %": "ties",
}
"""Column of the table → metric of the ledger."""

_WITH_TEMPERATURE = "at T: with margins divided by the temperature fitted on the validation pairs."
_WITHOUT_TEMPERATURE = (
    "n/a at T: no temperature could be fitted, because there are no validation pairs or because "
    "the head of at least one seed ranks all of them correctly, or no more than chance would."
)


def calibration_tables(comparison: Comparison, top: int) -> list[Table]:
    """Means over the splits that the ranking averages over."""
    return [_table(comparison, comparison.best(top), comparison.ranked_splits)]


def calibration_tables_by_split(comparison: Comparison, top: int) -> list[Table]:
    """One table per evaluation split."""
    shown = comparison.best(top)
    return [_table(comparison, shown, (split,)) for split in comparison.splits]


def _table(comparison: Comparison, shown: list[str], splits: Sequence[str]) -> Table:
    ranks = dict(comparison.ranking.select("name", "rank").iter_rows())
    measures = comparison.measures.filter(pl.col("split").is_in(splits))
    rows = []
    fitted = set()
    for name in shown:
        own = measures.filter(pl.col("name") == name)
        values = {metric: mean_over_splits(own[metric]) for metric in _COLUMNS.values()}
        if values["nll"] is not None:
            fitted.add(values["nll_calibrated"] is not None)
        rows.append(
            (
                str(ranks[name] or ""),
                name,
                *(
                    value_text(value, "accuracy") if metric == "ties" else number_text(value)
                    for metric, value in values.items()
                ),
            )
        )
    notes = {True: _WITH_TEMPERATURE, False: _WITHOUT_TEMPERATURE}
    return Table(
        f"Calibration: {splits_label(splits)}",
        ("#", "configuration", *_COLUMNS),
        tuple(rows),
        " ".join(note for known, note in notes.items() if known in fitted),
        left=2,
        wide=("Brier", "Brier at T"),
    )
