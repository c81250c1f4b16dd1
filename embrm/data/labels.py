"""Labels: the numbers beside a row of text, checked."""

import math

from embrm.core.text import quoted
from embrm.data.forms import RowError
from embrm.data.tables import Columns

_LARGEST = 3.4e38
"""Heads are trained in float32: beyond this a margin is infinite there."""


def pair_numbers(columns: Columns, index: int) -> tuple[float | None, float, float]:
    """margin (None where unknown), label and weight (1 without such a column) of a row.

    Raises: RowError with missing_value, or nan_label for what is no number or out of range. Its
    detail begins with the field's name.
    """
    margin = (
        number(columns["margin"][index], "margin", "nan_label") if "margin" in columns else None
    )
    return margin, _ranged(columns, "label", index, 1.0), _ranged(columns, "weight", index)


def _ranged(columns: Columns, name: str, index: int, most: float = math.inf) -> float:
    if name not in columns:
        return 1.0
    value = number(columns[name][index], name, "nan_label")
    if value is None:
        raise RowError("missing_value", f"{name} is null")
    if not 0 <= value <= most:
        rule = "in [0, 1]" if most == 1 else "at least 0"
        raise RowError("nan_label", f"{name} out of range: {value!r} is not {rule}")
    return value


def number(value: object, name: str, reason: str) -> float | None:
    """A float, finite in float32; None for a missing value. Raises: RowError with `reason`."""
    if value is None or value == "":
        return None
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise RowError(reason, f"{name} {quoted(value)} is not a number") from None
    if not abs(found) <= _LARGEST:
        raise RowError(reason, f"{name} is {found}, not a finite float32")
    return found
