"""Expand the specs in a ledger into columns, one for every hyperparameter of the runs."""

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from embrm.sweeps.spec import RunSpec

RENAMED = {"epochs": "max_epochs"}
"""Key of a run's spec → its column, where the ledger has another column of the key's name: its
`epochs` is the number of epochs that a run was trained for, the spec's is the maximum."""


def with_hyperparameters(ledger: pl.DataFrame) -> pl.DataFrame:
    """Add a column for every key of the runs' specs that the ledger has no column for.

    ledger: one row per run, with its spec as JSON in the column `spec`. Keys of nested tables get
    dotted names, such as `head.widths` or `regularizer.alpha`. Null means that the run's spec has
    no such key. Keys that the stored JSON omits because they have their default (those added in
    later releases) are filled in.
    """
    if ledger.is_empty():
        return ledger
    defaults = {
        name: field.default
        for name, field in RunSpec.model_fields.items()
        if field.exclude_if is not None
    }
    rows = [
        {
            RENAMED.get(name, name): value
            for name, value in _flat({**defaults, **json.loads(spec)}).items()
        }
        for spec in ledger["spec"]
    ]
    names = dict.fromkeys(name for row in rows for name in row if name not in ledger.columns)
    columns = {name: _column(name, [row.get(name) for row in rows]) for name in names}
    return ledger.with_columns(**columns)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _column(name: str, values: list[Any]) -> pl.Series:
    """A column of numbers, text or lists; of JSON text where the values are of several types."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        kind: Any = float if float in kinds else int
        return pl.Series(name, [None if v is None else kind(v) for v in values], strict=True)
    if len(kinds) <= 1:
        return pl.Series(name, values)
    return pl.Series(name, [None if v is None else json.dumps(v) for v in values], dtype=pl.String)
