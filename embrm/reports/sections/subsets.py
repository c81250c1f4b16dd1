"""Accuracy on the subsets of the evaluation splits."""

from embrm.core.formatting import short_text
from embrm.core.table import Table
from embrm.results.comparison import Comparison


def subset_tables(comparison: Comparison, _top: int) -> list[Table]:
    """One row per subset; columns for the configurations that `Comparison.subsets` holds."""
    if comparison.subsets.is_empty():
        return []
    order = [name for name in comparison.ranking["name"] if name in comparison.subsets["name"]]
    found = {
        (row["split"], row["subset"], row["name"]): row
        for row in comparison.subsets.iter_rows(named=True)
    }
    cells = comparison.subsets.select("split", "subset").unique(maintain_order=True).rows()
    return [
        Table(
            "Accuracy % by subset",
            ("split", "subset", "prompts", *order),
            tuple(
                (
                    split,
                    subset if subset is not None else "(none)",
                    str(found[split, subset, order[0]]["prompts"]),
                    *(short_text(found[split, subset, name], "accuracy") for name in order),
                )
                for split, subset in cells
            ),
            left=2,
        )
    ]
