"""Read a benchmark's file: recognise its layout, and turn its rows into pairs or group members.

What a benchmark's score needs besides the texts is kept in columns that every pair has: `subset`
is the part of the benchmark that it belongs to. `chosen_model` and `rejected_model` are the models
that wrote the responses; for RM-Bench they hold the styles instead, for JudgeBench the places of
the responses (A and B), and for RewardBench 2 the item's id, in the subset Ties, and its number
of pairs.
"""

import json
from collections.abc import Sequence
from typing import Any

from embrm.core.errors import UserError
from embrm.core.text import listed
from embrm.suites.registry import SUITES
from embrm.suites.suite import Layout, Row

Columns = dict[str, list[Any]]


def layout_of(suite: str, name: str, found: Sequence[str]) -> Layout:
    """Choose the layout of a file with the columns `found`. Raises: UserError where none fits."""
    layouts = SUITES[suite].layouts
    missing = {layout: [need for need in layout.needs if need not in found] for layout in layouts}
    closest = min(layouts, key=lambda layout: len(missing[layout]))
    if missing[closest]:
        raise UserError(
            f"{name}: not the layout of suite {suite!r}, whose columns are "
            f"{', '.join(closest.needs)}: there is no column {missing[closest][0]!r} in "
            f"{listed(found)}"
        )
    return closest


def arrange(
    suite: str, name: str, layout: Layout, raw: Columns, rows: Sequence[int], subset: str
) -> tuple[Columns, list[int], list[int]]:
    """Turn rows of a file into pairs or group members.

    raw: the file's columns. rows: their row numbers in the file. subset: that of the pairs whose
    rows do not name one.

    Returns the columns of the pairs or members, the row number that each comes from, and the
    numbers of the rows that give none (a tied vote, or no pair sampled from a question).

    Raises: UserError naming a row that does not fit the layout, or when no row gives a pair.
    """
    made: list[tuple[int, Row]] = []
    undecided = []
    for index, row in enumerate(rows):
        try:
            found = list(layout.rows({column: raw[column][index] for column in raw}))
        except (ValueError, TypeError) as error:  # a value, or its type, does not fit the layout
            raise UserError(
                f"{name}: row {row + 1} does not fit suite {suite!r}: {error}: "
                "check the file, or read it without suite"
            ) from None
        made += [
            (row, one | {"subset": subset if one["subset"] is None else one["subset"]})
            for one in found
        ]
        if not found:
            undecided.append(row)
    merge = SUITES[suite].merge
    if merge:
        same: dict[str, list[tuple[int, Row]]] = {}
        for row, pair in made:
            same.setdefault(_texts(pair), []).append((row, pair))
        made = [(alike[0][0], merge([pair for _, pair in alike])) for alike in same.values()]
    if not made:
        raise UserError(f"{name}: no row gives a pair, all are ties: choose another split")
    columns = {field: [pair[field] for _, pair in made] for field in made[0][1]}
    return columns, [row for row, _ in made], undecided


def _texts(pair: Row) -> str:
    """A key that is equal for pairs of the same two responses, whichever of them is chosen."""
    sides = sorted(json.dumps(pair[side], sort_keys=True) for side in ("chosen", "rejected"))
    return json.dumps([pair["subset"], pair.get("prompt"), sides])
