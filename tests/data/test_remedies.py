"""Tests of remedies: labels corrected by rank in preference strength."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from embrm.core.errors import UserError
from embrm.data.label_tables import LabelTable
from embrm.data.remedies import Remedy, apply_remedy

STRENGTHS = [-2.0, -1.0, -0.5, 0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0]
LABELS = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]


def _strengths() -> LabelTable:
    """Ten pairs in random order; the number in pair_id is the rank in strength ("p0": weakest)."""
    rows = pl.DataFrame(
        {
            "pair_id": [f"p{number}" for number in range(10)],
            "label": LABELS,
            "strength": STRENGTHS,
        }
    )
    return LabelTable(
        "strengths", rows.sample(fraction=1.0, shuffle=True, seed=2), {"cache_id": "c"}
    )


def _apply(**fields: Any) -> dict[str, list[float]]:
    table = apply_remedy(Remedy.parse(fields, "test"), _strengths())
    assert table.kind == "labels"
    rows = table.rows.sort("pair_id").drop("pair_id")
    return {name: rows[name].to_list() for name in rows.columns}


def test_flip_inverts_the_labels_of_the_weakest_pairs() -> None:
    assert _apply(flip=[0, 0.3]) == {"label": [0.0, 1.0, 0.0, *LABELS[3:]]}


def test_a_range_may_begin_above_zero() -> None:
    turned = [1 - label for label in LABELS[5:7]]
    assert _apply(flip=[0.5, 0.7])["label"] == [*LABELS[:5], *turned, *LABELS[7:]]


def test_smooth_moves_labels_towards_their_opposite() -> None:
    found = _apply(smooth=[0, 0.2], epsilon=0.2)["label"]
    assert found == [0.8, 0.2, *LABELS[2:]]


def test_soft_labels_are_the_probability_that_the_ensemble_gives() -> None:
    """Strength is in the direction of the label, so the reward difference is ± the strength."""
    found = _apply(soft=[0, 1])["label"]
    difference = np.where(np.array(LABELS) == 1, STRENGTHS, -np.array(STRENGTHS))
    assert found == pytest.approx((1 / (1 + np.exp(-difference))).tolist())
    assert _apply(soft=[0, 1], flip=[0, 0.5])["label"] == pytest.approx(found)


def test_margins_are_strengths_in_the_direction_of_the_final_label() -> None:
    found = _apply(margin=[0, 0.5], flip=[0, 0.2])
    assert found["margin"] == [2.0, 1.0, -0.5, 0.0, 0.1, 0, 0, 0, 0, 0]
    assert found["label"][:2] == [0.0, 1.0]


def test_dropped_pairs_have_weight_zero() -> None:
    found = _apply(drop=[0, 0.2], smooth=[0.2, 0.4])
    assert found["weight"] == [0.0, 0.0, *[1.0] * 8]
    assert found["label"] == [1.0, 0.0, 0.9, 0.9, *LABELS[4:]]


def test_keep_drops_all_other_pairs() -> None:
    assert _apply(keep=[0.2, 0.5]) == {
        "label": LABELS,
        "weight": [0.0, 0.0, *[1.0] * 3, *[0.0] * 5],
    }
    assert _apply(keep=[0.2, 1]) == _apply(drop=[0, 0.2])
    with pytest.raises(UserError, match="drop and keep exclude each other"):
        Remedy.parse({"drop": [0, 0.1], "keep": [0.2, 1]}, "test")


def test_equal_strengths_are_ordered_by_pair_id() -> None:
    rows = pl.DataFrame({"pair_id": ["b", "a"], "label": [1.0, 1.0], "strength": [1.0, 1.0]})
    table = apply_remedy(Remedy(flip=(0, 0.5)), LabelTable("strengths", rows, {"cache_id": "c"}))
    assert dict(table.rows.select("pair_id", "label").rows()) == {"a": 0.0, "b": 1.0}


def test_provenance_includes_the_remedy_and_that_of_the_strengths() -> None:
    table = apply_remedy(Remedy(flip=(0, 0.1)), _strengths())
    assert table.provenance["parameters"] == {
        "flip": [0.0, 0.1],
        "strengths": {"cache_id": "c"},
    }
    assert table.provenance["cache_id"] == "c"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "a remedy needs an operation: give flip, smooth, soft, margin, drop or keep"),
        ({"flip": [0.2, 0.2]}, r"flip = .*: a range is \[from, to\] with 0 <= from < to"),
        ({"drop": [-0.1, 0.2]}, r"drop = .*: a range is \[from, to\] with 0 <= from < to"),
        ({"soft": [0, 0.5], "smooth": [0.4, 1]}, "overlap, but both set the label: move one"),
        ({"smooth": [0, 1], "epsilon": 0.5}, "epsilon = 0.5: must be less than 0.5"),
    ],
)
def test_invalid_remedies_are_refused(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        Remedy.parse(fields, "test")
