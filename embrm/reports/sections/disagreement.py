"""How far the heads of an ensemble disagree, and whether that reveals unfamiliar responses."""

import polars as pl

from embrm.core.formatting import MISSING, number_text
from embrm.core.table import Table
from embrm.reports.sections.layout import across_tables
from embrm.results.comparison import Comparison

_NOTE = (
    "Standard deviation over a configuration's heads, standardised on the training responses, mean "
    "over a split's responses / how well it tells them from those of validation: 0.5 is chance, "
    "and more a sign that the heads know what is new to them."
)


def disagreement_tables(comparison: Comparison, top: int) -> list[Table]:
    """One row per configuration with several heads, one column per split."""
    known = comparison.measures.filter(pl.col("disagreement").is_not_null())
    found = {
        (row["split"], row["name"]): " / ".join(
            number_text(row[metric]) for metric in ("disagreement", "disagreement_auroc")
        )
        for row in known.iter_rows(named=True)
    }
    names = [name for name in comparison.best(top) if name in known["name"]]
    splits = [split for split in comparison.splits if split in known["split"]]
    return [
        Table(
            "Disagreement of ensembles / its AUROC",
            ("configuration", *across),
            tuple(
                (name, *(found.get((split, name), MISSING) for split in across)) for name in names
            ),
            _NOTE,
        )
        for across in across_tables(splits if names else [])
    ]
