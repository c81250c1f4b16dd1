"""Accuracy on the splits that share prompts with the training data, without these prompts."""

from embrm.core.formatting import short_text
from embrm.core.table import Table
from embrm.reports.sections.layout import across_tables
from embrm.results.comparison import Comparison


def leak_free_tables(comparison: Comparison, top: int) -> list[Table]:
    """One row per configuration, one column per split; none where no split shares prompts."""
    if comparison.leak_free.is_empty():
        return []
    shown = comparison.best(top)
    found = {(row["split"], row["name"]): row for row in comparison.leak_free.iter_rows(named=True)}
    splits = [split for split in comparison.splits if (split, shown[0]) in found]
    left = "; ".join(
        f"{split}: {found[split, shown[0]]['removed']} removed, "
        f"{found[split, shown[0]]['prompts']} left"
        for split in splits
    )
    return [
        Table(
            "Accuracy % without prompts seen in training",
            ("configuration", *across),
            tuple(
                (name, *(short_text(found[split, name], "accuracy") for split in across))
                for name in shown
            ),
            f"Prompts: {left}.",
        )
        for across in across_tables(splits)
    ]
