"""Tests of the spec of an extraction: invalid ones are refused in one line."""

import pytest
from extract_world import spec_of

from embrm.core.errors import UserError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"states": ["lasst"]}, "unknown view 'lasst'"),
        ({"states": ["last", "last"]}, "no view twice"),
        ({"states": []}, "at least one view"),
        ({"dtype": "auto"}, "dtype"),
        ({"max_length": 0}, "max_length"),
        ({"token_row": 3}, "did you mean 'token_rows'"),
        ({"data": []}, "data"),
        ({"seed": -1}, "seed"),
        ({"token_rows": 0}, "tail_mean = true needs token rows, but token_rows = 0"),
        ({"token_positions": "evenly"}, "token_positions"),
    ],
)
def test_invalid_specs_are_refused(world: dict[str, str], changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        spec_of(world, **changes)
