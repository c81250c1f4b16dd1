"""Specs: strictness, error lines, and ids that follow content alone."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from embrm.core.errors import UserError
from embrm.core.specs import Spec, canonical_json, content_id, read_toml


class Inner(Spec):
    widths: tuple[int, ...] = ()
    dropout: float = Field(0.0, ge=0, lt=1)


class Outer(Spec):
    names: tuple[str, ...]
    learning_rate: float = Field(1e-3, gt=0)
    heads: tuple[Inner, ...] = ()
    maybe: Inner | None = None


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"learnin_rate": 1.0}, "unknown key 'learnin_rate': did you mean 'learning_rate'?"),
        (
            {"heads": [{"width": [3]}]},
            "unknown key 'heads.0.width': did you mean 'widths'?",
        ),
        ({"maybe": {"dropot": 0.1}}, "unknown key 'maybe.dropot': did you mean 'dropout'?"),
        ({"names": "ann"}, "names = 'ann': write a list, such as names = [\"ann\"]"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0: must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan: must be a finite number"),
        (
            {"heads": [{"dropout": 1.0}]},
            "heads.0.dropout = 1.0: must be less than 1",
        ),
    ],
)
def test_errors_are_one_line_with_field_value_rule(values: dict[str, object], line: str) -> None:
    with pytest.raises(UserError) as caught:
        Outer.parse({"names": ["ann"]} | values, "spec.toml")
    assert str(caught.value) == f"spec.toml: {line}"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner,
                                                                max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=4), json_values, max_size=5))
def test_ids_ignore_key_order_and_survive_a_round_trip(value: dict[str, object]) -> None:
    backwards = dict(reversed(list(value.items())))
    assert content_id(value) == content_id(backwards)
    assert content_id(json.loads(canonical_json(value))) == content_id(value)


@given(json_values, json_values)
def test_different_content_has_different_ids(first: object, second: object) -> None:
    same = canonical_json(first) == canonical_json(second)
    assert (content_id(first) == content_id(second)) == same


def test_reading_toml_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no spec at"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(UserError, match="is a folder"):
        read_toml(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("a = [1,")
    with pytest.raises(UserError, match="not valid TOML"):
        read_toml(broken)
