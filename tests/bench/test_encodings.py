"""The encodings benchmark reports ratios to plain pages of the same dtype."""

import numpy as np
import pytest

from embrm.bench.encodings import measure_encodings


def test_ratios_are_relative_to_plain_pages_of_the_same_dtype() -> None:
    rows = measure_encodings(np.random.default_rng(0).standard_normal((500, 16), np.float32))
    assert len(rows) == 8
    for row in rows:
        if (row["encoding"], row["compression"]) == ("plain", "none"):
            assert (row["size"], row["read_time"]) == (1, 1)
        assert row["read_time"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compressible_states_take_less_space_compressed(dtype: str) -> None:
    sizes = {
        (row["dtype"], row["encoding"], row["compression"]): row["size"]
        for row in measure_encodings(np.ones((2000, 16), np.float32))
    }
    assert sizes[dtype, "plain", "zstd"] < 0.2
    assert sizes[dtype, "byte_stream_split", "zstd"] < 0.2
    assert sizes[dtype, "byte_stream_split", "none"] == pytest.approx(1, abs=0.05)
