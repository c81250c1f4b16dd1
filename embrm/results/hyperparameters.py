"""Hyper-parameters of the runs in a ledger: every field of a run's spec as a column of its own."""

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from embrm.sweeps.spec import RunSpec

RENAMED = {"epochs": "max_epochs"}
"""Spec key → column, where the ledger has a column of that name with another meaning: its `epochs`
are those that a run was trained for."""


def with_hyperparameters(ledger: pl.DataFrame) -> pl.DataFrame:
    """Add a column for every key of the runs' specs that the ledger does not have yet.

    ledger: one row per run, with its spec as JSON in the column `spec`, where keys that later
    releases have added are left out while they have their default. A key of a table gets a dotted
    name such as `head.widths` or `regularizer.alpha`; null means that the run has no such setting.
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
    """Numbers, text or lists of one type; JSON text where a key has values of several types."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        kind: Any = float if float in kinds else int
        return pl.Series(name, [None if v is None else kind(v) for v in values], strict=True)
    if len(kinds) <= 1:
        return pl.Series(name, values)
    return pl.Series(name, [None if v is None else json.dumps(v) for v in values], dtype=pl.String)
