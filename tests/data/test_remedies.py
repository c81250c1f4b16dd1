"""Remedies by percentile of strength."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from embrm.core.errors import UserError
from embrm.data.label_tables import LabelTable
from embrm.data.remedies import Remedy, remedied

STRENGTHS = [-2.0, -1.0, -0.5, 0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0]
LABELS = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]


def _strengths() -> LabelTable:
    """Ten pairs in another order than that of their strength; "p0" is the weakest."""
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
    table = remedied(Remedy.parse(fields, "test"), _strengths())
    assert table.kind == "labels"
    rows = table.rows.sort("pair_id").drop("pair_id")
    return {name: rows[name].to_list() for name in rows.columns}


def test_flip_turns_the_lowest_round() -> None:
    assert _apply(flip=[0, 0.3]) == {"label": [0.0, 1.0, 0.0, *LABELS[3:]]}


def test_a_range_may_lie_anywhere() -> None:
    turned = [1 - label for label in LABELS[5:7]]
    assert _apply(flip=[0.5, 0.7])["label"] == [*LABELS[:5], *turned, *LABELS[7:]]


def test_smoothing_pulls_labels_to_their_opposite() -> None:
    found = _apply(smooth=[0, 0.2], epsilon=0.2)["label"]
    assert found == [0.8, 0.2, *LABELS[2:]]


def test_soft_labels_are_the_heads_own_probability() -> None:
    """Whatever label they were trained on: the chosen side's difference is ± the strength."""
    found = _apply(soft=[0, 1])["label"]
    difference = np.where(np.array(LABELS) == 1, STRENGTHS, -np.array(STRENGTHS))
    assert found == pytest.approx((1 / (1 + np.exp(-difference))).tolist())
    assert _apply(soft=[0, 1], flip=[0, 0.5])["label"] == pytest.approx(found)


def test_margins_are_strengths_of_the_final_label() -> None:
    found = _apply(margin=[0, 0.5], flip=[0, 0.2])
    assert found["margin"] == [2.0, 1.0, -0.5, 0.0, 0.1, 0, 0, 0, 0, 0]
    assert found["label"][:2] == [0.0, 1.0]


def test_dropped_pairs_have_no_weight() -> None:
    found = _apply(drop=[0, 0.2], smooth=[0.2, 0.4])
    assert found["weight"] == [0.0, 0.0, *[1.0] * 8]
    assert found["label"] == [1.0, 0.0, 0.9, 0.9, *LABELS[4:]]


def test_what_is_kept_is_what_is_not_dropped() -> None:
    assert _apply(keep=[0.2, 0.5]) == {
        "label": LABELS,
        "weight": [0.0, 0.0, *[1.0] * 3, *[0.0] * 5],
    }
    assert _apply(keep=[0.2, 1]) == _apply(drop=[0, 0.2])
    with pytest.raises(UserError, match="drop and keep both choose pairs"):
        Remedy.parse({"drop": [0, 0.1], "keep": [0.2, 1]}, "test")


def test_equal_strengths_are_told_apart_by_id() -> None:
    rows = pl.DataFrame({"pair_id": ["b", "a"], "label": [1.0, 1.0], "strength": [1.0, 1.0]})
    table = remedied(Remedy(flip=(0, 0.5)), LabelTable("strengths", rows, {"cache_id": "c"}))
    assert dict(table.rows.select("pair_id", "label").rows()) == {"a": 0.0, "b": 1.0}


def test_provenance_holds_the_rule_and_where_strengths_came_from() -> None:
    table = remedied(Remedy(flip=(0, 0.1)), _strengths())
    assert table.provenance["parameters"] == {
        "flip": [0.0, 0.1],
        "strengths": {"cache_id": "c"},
    }
    assert table.provenance["cache_id"] == "c"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "a remedy does something: give flip, smooth, soft, margin, drop or keep"),
        ({"flip": [0.2, 0.2]}, "flip = .*: a range goes from a share to a larger one"),
        ({"drop": [-0.1, 0.2]}, "drop = .*: a range goes from a share to a larger one"),
        ({"soft": [0, 0.5], "smooth": [0.4, 1]}, "overlap: a pair has one label, move one"),
        ({"smooth": [0, 1], "epsilon": 0.5}, "epsilon = 0.5: input should be less than 0.5"),
    ],
)
def test_refusals(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        Remedy.parse(fields, "test")
