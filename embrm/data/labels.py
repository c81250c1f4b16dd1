"""Labels: reads and checks the numeric fields of a row: margin, label, weight and gold score."""

import math

from embrm.core.text import quoted
from embrm.data.forms import RowError
from embrm.data.tables import Columns

_LARGEST = 3.4e38
"""Just below the largest float32: heads are trained in float32, where more would be infinite."""


def pair_numbers(columns: Columns, index: int) -> tuple[float | None, float, float]:
    """The margin (None where unknown), label and weight (1.0 without such a column) of a row.

    Raises: RowError with reason missing_value, or nan_label for a value that is not a number or out
    of range. The detail begins with the field's name.
    """
    margin = None
    if "margin" in columns:
        margin = finite_number(columns["margin"][index], "margin", "nan_label")
    return margin, _ranged(columns, "label", index, 1.0), _ranged(columns, "weight", index)


def _ranged(columns: Columns, name: str, index: int, most: float = math.inf) -> float:
    if name not in columns:
        return 1.0
    value = finite_number(columns[name][index], name, "nan_label")
    if value is None:
        raise RowError("missing_value", f"{name} is null")
    if not 0 <= value <= most:
        rule = "in [0, 1]" if most == 1 else "at least 0"
        raise RowError("nan_label", f"{name} out of range: {value!r} is not {rule}")
    return value


def finite_number(value: object, name: str, reason: str) -> float | None:
    """Convert a cell to a float that is finite in float32; None for a missing value.

    Raises: RowError with `reason` for anything else.
    """
    if value is None or value == "":
        return None
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise RowError(reason, f"{name} {quoted(value)} is not a number") from None
    if not abs(found) <= _LARGEST:
        raise RowError(reason, f"{name} is {found}, not a finite float32")
    return found
