"""Tests of the numeric fields of a row: margin, label, weight and gold."""

import pytest

from embrm.data.forms import RowError
from embrm.data.labels import finite_number, pair_numbers

NAN, INF = float("nan"), float("inf")


def test_defaults_without_the_columns() -> None:
    assert pair_numbers({}, 0) == (None, 1.0, 1.0)


def test_numbers_may_be_given_as_text() -> None:
    columns = {"margin": [None, "-2.5"], "label": [0, "1"], "weight": [0, 3]}
    assert pair_numbers(columns, 0) == (None, 0.0, 0.0)
    assert pair_numbers(columns, 1) == (-2.5, 1.0, 3.0)


@pytest.mark.parametrize(
    ("column", "value", "reason", "detail"),
    [
        ("margin", NAN, "nan_label", "margin is nan, not a finite float32"),
        ("margin", INF, "nan_label", "margin is inf, not a finite float32"),
        ("margin", 1e39, "nan_label", "margin is 1e+39, not a finite float32"),
        ("margin", 10**400, "nan_label", "is not a number"),
        ("margin", "high", "nan_label", "margin 'high' is not a number"),
        ("margin", [1], "nan_label", "margin [1] is not a number"),
        ("label", NAN, "nan_label", "label is nan"),
        ("label", 1.01, "nan_label", "label out of range: 1.01 is not in [0, 1]"),
        ("label", -0.01, "nan_label", "label out of range: -0.01 is not in [0, 1]"),
        ("label", None, "missing_value", "label is null"),
        ("label", "", "missing_value", "label is null"),
        ("weight", NAN, "nan_label", "weight is nan"),
        ("weight", -1, "nan_label", "weight out of range: -1.0 is not at least 0"),
        ("weight", None, "missing_value", "weight is null"),
    ],
)
def test_invalid_numbers_are_refused_with_a_reason(
    column: str, value: object, reason: str, detail: str
) -> None:
    with pytest.raises(RowError) as caught:
        pair_numbers({column: [value]}, 0)
    assert caught.value.args[0] == reason
    assert detail in caught.value.args[1]
    assert len(caught.value.args[1]) < 120


def test_an_invalid_number_is_refused_with_the_given_reason() -> None:
    with pytest.raises(RowError, match="nan_gold"):
        finite_number("x", "gold", "nan_gold")
    assert finite_number(None, "gold", "nan_gold") is None
