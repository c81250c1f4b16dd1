"""Find items of a benchmark that a table of rewards holds in part or twice.

The benchmarks' own tools score whole files, so a table from which some responses are missing (those
that were too long to extract, say) has no counterpart there. Incomplete items are left out of every
score, pairs that the table repeats count once, and both are counted.
"""

from dataclasses import dataclass

import polars as pl

from embrm.core.errors import UserError


@dataclass(frozen=True, eq=False)
class Checked:
    """The rows of a table of rewards that are scored, and what was left out of it.

    incomplete: number of items that are left out because a part of them is missing. repeated:
    number of rows that are left out because they stand in the table already. notes: a sentence on
    each thing that was found.
    """

    table: pl.DataFrame
    incomplete: int = 0
    repeated: int = 0
    notes: tuple[str, ...] = ()


def once(table: pl.DataFrame, rewards: tuple[str, ...]) -> Checked:
    """Keep the first row of every pair_id; a table without that column stays as it is.

    Raises: UserError when the rows of one pair have different rewards.
    """
    if "pair_id" not in table.columns:
        return Checked(table)
    kept = table.unique("pair_id", keep="first", maintain_order=True)
    repeated = table.height - kept.height
    if not repeated:
        return Checked(table)
    others = table.unique(["pair_id", *rewards]).filter(pl.col("pair_id").is_duplicated())
    if others.height:
        raise UserError(
            f"pair {str(others['pair_id'].min())[:60]!r} is in the table twice, with different "
            "rewards: pass the rewards of one run"
        )
    return Checked(kept, 0, repeated, (f"{repeated} repeated rows count once",))


def whole_items(table: pl.DataFrame, key: list[str], complete: pl.Expr, what: str) -> Checked:
    """Leave out the items of which `complete` is false.

    key: columns that identify an item; `complete` is evaluated over an item's rows. what: the
    reason in the note, such as "without all of their rejected responses".
    """
    flagged = table.with_columns(complete.over(key).alias("_complete"))
    kept = flagged.filter("_complete").drop("_complete")
    lost = flagged.filter(~pl.col("_complete"))
    if lost.is_empty():
        return Checked(table)
    names = lost.group_by(key).first().group_by("subset").len().sort("subset")
    by_subset = ", ".join(f"{number} {name}".strip() for name, number in names.iter_rows())
    count = int(names["len"].sum())
    return Checked(kept, count, 0, (f"{count} items {what} are left out: {by_subset}",))
