"""Helpers that turn rows of published files into pairs, shared by the modules of the benchmarks."""

from collections.abc import Iterator, Sequence
from typing import Any

from embrm.core.text import quoted
from embrm.suites.suite import Row

TRIO = ("prompt", "chosen", "rejected")
MODELS = ("chosen_model", "rejected_model")
GENERATORS = ("chosen_gen", "rejected_gen")

FAILED = "$ERROR$"
"""What PPE's tool writes in place of a reward that could not be computed, and reads as -inf."""

_WINNERS = {"model_a": 0, "model_b": 1}

_OTHER_SIDE = {"chosen": "rejected", "rejected": "chosen"}


def plain_pair(row: Row) -> Iterator[Row]:
    """The pair of a row that has the columns prompt, chosen, rejected and subset."""
    models = {name: row.get(name) for name in MODELS}
    yield {field: row[field] for field in (*TRIO, "subset")} | models


def pair_row(
    prompt: object, texts: Sequence[object], subset: object, models: Sequence[object]
) -> Row:
    """A pair as a row. texts, models: first of the chosen, then of the rejected response."""
    return {
        "prompt": prompt,
        "chosen": texts[0],
        "rejected": texts[1],
        "subset": subset,
        "chosen_model": models[0],
        "rejected_model": models[1],
    }


def list_of(row: Row, column: str, count: int | None = None) -> list[Any]:
    """The list in a column of a row. Raises: ValueError unless it is a list that is not empty, with
    `count` entries if given."""
    value = row[column]
    if not isinstance(value, list) or not value or count not in (None, len(value)):
        raise ValueError(f"{column} {quoted(value)} is not a list of {count or 'some'} values")
    return value


def winner_of(row: Row) -> int | None:
    """Number of the better response by a row's winner: 0 for model_a, 1 for model_b, None for a
    tie (any value that begins with "tie")."""
    winner = str(row["winner"])
    if winner not in _WINNERS and not winner.startswith("tie"):
        raise ValueError(f"winner {quoted(winner)} is not model_a, model_b or tie")
    return _WINNERS.get(winner)


def swapped(pair: Row) -> Row:
    """The same pair with the chosen and the rejected response exchanged."""
    sides = {field: field.split("_")[0] for field in pair}
    return {
        field: pair[field.replace(side, _OTHER_SIDE[side])] if side in _OTHER_SIDE else pair[field]
        for field, side in sides.items()
    }
