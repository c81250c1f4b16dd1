"""Shards to Parquet and back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_cache import shard

from embrm.cache.schema import (
    DTYPES,
    Layout,
    decode,
    encode,
    from_parquet,
    responses_table,
    to_parquet,
    tokens_table,
)
from embrm.core.errors import UserError


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes: what equality of stored vectors means, NaN payloads and signed zeros included."""
    return tensor.flatten().view(torch.uint8)


@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    rows=st.integers(0, 9),
    width=st.integers(1, 17),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_bit_pattern_survives_encode_and_decode(
    dtype: str, rows: int, width: int, seed: int
) -> None:
    size = DTYPES[dtype].itemsize
    raw = np.random.default_rng(seed).integers(0, 256, (rows, width * size), dtype=np.uint8)
    states = torch.from_numpy(raw.ravel()).view(DTYPES[dtype]).reshape(rows, width)
    column = encode(states)
    assert column.type == pa.binary(width * size)
    assert torch.equal(bits(decode(pa.chunked_array([column]), DTYPES[dtype], width)), bits(states))
    halves = pa.chunked_array([column[: rows // 2], column[rows // 2 :]])
    assert torch.equal(bits(decode(halves, DTYPES[dtype], width)), bits(states))


def test_values_are_little_endian_one_after_another() -> None:
    assert encode(torch.tensor([[1.0, -2.0]]))[0].as_py().hex() == "0000803f000000c0"
    bfloat16 = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    assert encode(bfloat16)[0].as_py().hex() == "803f00c0"


def test_encode_takes_a_transposed_tensor() -> None:
    states = torch.arange(6.0).reshape(2, 3).T
    back = decode(pa.chunked_array([encode(states)]), torch.float32, 2)
    assert torch.equal(back, states)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_shard_survives_parquet(tmp_path: Path, dtype: str) -> None:
    rows, tokens = shard(0, dtype)
    layout = Layout.of(rows, tokens)
    assert (layout.dtype, layout.width, layout.top_k) == (dtype, 6, 3)
    assert layout.tail_mean
    path = tmp_path / "part.parquet"
    with path.open("wb") as stream:
        to_parquet(responses_table(rows, layout), stream)
    schema = layout.responses()
    table = from_parquet(path, schema.names, schema)
    for name in ("response_id", "prompt_id"):
        assert table[name].to_pylist() == getattr(rows, name)
    for name in ("n_prompt", "n_response", "truncated", "final_position", "final_token", "S"):
        np.testing.assert_array_equal(table[name].to_numpy(), getattr(rows, name))
    for view in layout.views:
        states = decode(table[f"state.{view}"], layout.torch_dtype, layout.width)
        assert torch.equal(states, rows.states[view])
        np.testing.assert_array_equal(table[f"norm.{view}"].to_numpy(), rows.norms[view].numpy())

    with path.open("wb") as stream:
        to_parquet(tokens_table(tokens, layout), stream)
    schema = layout.tokens()
    table = from_parquet(path, schema.names, schema)
    assert torch.equal(decode(table["state"], layout.torch_dtype, layout.width), tokens.states)
    top_ids = decode(table["top_ids"], torch.int32, 3)
    np.testing.assert_array_equal(top_ids.numpy(), tokens.top_ids)
    tail_means = decode(table["tail_mean"], layout.torch_dtype, layout.width)
    assert torch.equal(tail_means, tokens.tail_means)


def test_without_tail_means_files_are_as_before_them() -> None:
    rows, tokens = shard(0)
    layout = Layout.of(rows, replace(tokens, tail_means=None))
    assert layout.model_dump(mode="json").keys() == {"dtype", "width", "views", "top_k"}
    assert layout.tokens().names[-3:] == ["state", "top_ids", "top_logits"]


def test_one_column_is_read_without_the_others(tmp_path: Path) -> None:
    rows, tokens = shard(0)
    layout = Layout.of(rows, tokens)
    path = tmp_path / "part.parquet"
    with path.open("wb") as stream:
        to_parquet(responses_table(rows, layout), stream)
    table = from_parquet(path, ["state.layer:1"], layout.responses())
    assert table.column_names == ["state.layer:1"]


def test_dtype_and_width_are_in_the_schema_metadata() -> None:
    rows, tokens = shard(0, "bfloat16")
    schema = Layout.of(rows, tokens).responses()
    assert schema.metadata == {b"dtype": b"bfloat16", b"width": b"6"}


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    rows, tokens = shard(0, "bfloat16")
    layout = Layout.of(rows, tokens)
    path = tmp_path / "part.parquet"
    with path.open("wb") as stream:
        to_parquet(responses_table(rows, layout), stream)
    wider = layout.model_copy(update={"width": 7}).responses()
    with pytest.raises(UserError, match=r"part\.parquet is damaged \(its columns are not"):
        from_parquet(path, ["state.last"], wider)


def test_states_that_disagree_are_refused() -> None:
    rows, tokens = shard(0)
    assert tokens.tail_means is not None
    for narrow in (tokens.tail_means.half(), tokens.tail_means[:, 1:]):
        with pytest.raises(ValueError, match="differ"):
            Layout.of(rows, replace(tokens, tail_means=narrow))
    rows.states["mean"] = rows.states["mean"].to(torch.bfloat16)
    with pytest.raises(ValueError, match="differ"):
        Layout.of(rows, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": ["lst"]}, "unknown view 'lst'"),
        ({"dtype": "float17"}, "did you mean 'float16'"),
        ({"width": 0}, "greater than 0"),
    ],
)
def test_a_wrong_layout_is_one_line(change: dict, message: str) -> None:
    good = {"dtype": "float16", "width": 2, "views": ["last", "layer:12"], "top_k": None}
    assert Layout.parse(good, "layout").views == ("last", "layer:12")
    with pytest.raises(UserError, match=message):
        Layout.parse(good | change, "layout")
