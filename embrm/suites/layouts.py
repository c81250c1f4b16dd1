"""Reading a benchmark's file: which of its layouts it has, and its rows as pairs or members.

What a benchmark's score needs beyond texts goes into fields that every pair has: `subset` is what
is averaged over, and `chosen_model` and `rejected_model` tell apart what made the responses: a
model, RM-Bench's styles, or the id of an item of RewardBench 2's Ties.
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
    """The layout of a file with the columns `found`. Raises: UserError where none fits."""
    layouts = SUITES[suite].layouts
    missing = {layout: [need for need in layout.needs if need not in found] for layout in layouts}
    closest = min(layouts, key=lambda layout: len(missing[layout]))
    if missing[closest]:
        raise UserError(
            f"{name}: not the layout of suite {suite!r}, which has {', '.join(closest.needs)}: "
            f"no column {missing[closest][0]!r} in {listed(found)}"
        )
    return closest


def arrange(
    suite: str, name: str, layout: Layout, raw: Columns, rows: Sequence[int], subset: str
) -> tuple[Columns, list[int], list[int]]:
    """Fields of pairs or members, the row of the file each is from, and the rows that give none:
    ties of votes, and groups where all responses are alike.

    subset: of those whose rows name none.
    Raises: UserError naming a row that does not fit the layout, or when no row gives a pair.
    """
    made: list[tuple[int, Row]] = []
    undecided = []
    for index, row in enumerate(rows):
        try:
            found = list(layout.rows({column: raw[column][index] for column in raw}))
        except (ValueError, TypeError) as error:  # a value of another type than the layout has
            raise UserError(
                f"{name}: row {row + 1} is not of suite {suite!r}: {error}: "
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
        raise UserError(f"{name}: every row is a tie, so there is no pair: name another split")
    columns = {field: [pair[field] for _, pair in made] for field in made[0][1]}
    return columns, [row for row, _ in made], undecided


def _texts(pair: Row) -> str:
    """What two rows of one pair have in common, whichever response either prefers."""
    sides = sorted(json.dumps(pair[side], sort_keys=True) for side in ("chosen", "rejected"))
    return json.dumps([pair["subset"], pair.get("prompt"), sides])
