"""Options that follow from a spec's source are those that follow from the spec itself."""

from typing import Any

import pytest

from embrm.cli.spec_options import spec_fields
from embrm.extraction.spec import ExtractSpec

FIELDS = spec_fields("embrm.extraction.spec", "ExtractSpec")


def test_every_field_but_the_datasets_has_an_option() -> None:
    assert [*FIELDS] == [name for name in ExtractSpec.model_fields if name != "data"]


@pytest.mark.parametrize("name", FIELDS)
def test_descriptions_and_defaults_are_the_specs(name: str) -> None:
    _, description, default = FIELDS[name]
    field = ExtractSpec.model_fields[name]
    if name != "engine":  # its description is computed, and the command gives its own
        assert description == " ".join((field.description or "").split())
    assert default == (None if field.is_required() else field.default)


@pytest.mark.parametrize(("name", "value"), [("top_k", 3), ("tail_mean", True), ("dtype", "b")])
def test_types_are_the_specs(name: str, value: Any) -> None:
    assert isinstance(value, FIELDS[name][0])
