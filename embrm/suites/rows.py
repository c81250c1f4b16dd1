"""Rows of pairs, from rows of published files: what several benchmarks share."""

from collections.abc import Iterator, Sequence
from typing import Any

from embrm.core.text import quoted
from embrm.suites.suite import Row

TRIO = ("prompt", "chosen", "rejected")
MODELS = ("chosen_model", "rejected_model")
GENERATORS = ("chosen_gen", "rejected_gen")

_WINNERS = {"model_a": 0, "model_b": 1}

_OTHER_SIDE = {"chosen": "rejected", "rejected": "chosen"}


def plain_pair(row: Row) -> Iterator[Row]:
    """The pair of a row with prompt, chosen, rejected and subset."""
    models = {name: row.get(name) for name in MODELS}
    yield {field: row[field] for field in (*TRIO, "subset")} | models


def pair_row(
    prompt: object, texts: Sequence[object], subset: object, models: Sequence[object]
) -> Row:
    """A pair as a row; texts and models: of the chosen and the rejected response."""
    return {
        "prompt": prompt,
        "chosen": texts[0],
        "rejected": texts[1],
        "subset": subset,
        "chosen_model": models[0],
        "rejected_model": models[1],
    }


def list_of(row: Row, column: str, count: int | None = None) -> list[Any]:
    """A column's list, of `count` entries. Raises: ValueError where it is none."""
    value = row[column]
    if not isinstance(value, list) or not value or count not in (None, len(value)):
        raise ValueError(f"{column} {quoted(value)} is not a list of {count or 'some'}")
    return value


def winner_of(row: Row) -> int | None:
    """The better response of a row with winner model_a, model_b or tie: 0, 1, None for a tie."""
    winner = str(row["winner"])
    if winner not in _WINNERS and not winner.startswith("tie"):
        raise ValueError(f"winner {quoted(winner)} is neither model_a, model_b nor a tie")
    return _WINNERS.get(winner)


def swapped(pair: Row) -> Row:
    """The same pair with the chosen and the rejected side exchanged."""
    sides = {field: field.split("_")[0] for field in pair}
    return {
        field: pair[field.replace(side, _OTHER_SIDE[side])] if side in _OTHER_SIDE else pair[field]
        for field, side in sides.items()
    }
