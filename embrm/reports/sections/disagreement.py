"""How far the heads of an ensemble disagree, and whether that reveals unfamiliar responses."""

import polars as pl

from embrm.core.formatting import MISSING, number_text
from embrm.core.table import Table
from embrm.reports.sections.layout import across_tables
from embrm.results.comparison import Comparison

_NOTE = (
    "Before the slash: standard deviation over the heads of a configuration, whose rewards are "
    "standardised on the training responses, averaged over the responses of the split. After it: "
    "AUROC with which this standard deviation tells responses of the split from those of the "
    "validation pairs; 0.5 is chance, and above it the heads disagree more on the split."
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
