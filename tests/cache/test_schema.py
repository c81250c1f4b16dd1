"""Tests of the conversion of shards to Parquet and back."""

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
    STORAGE,
    ShardLayout,
    all_finite,
    binary_column,
    from_parquet,
    responses_table,
    to_parquet,
    tokens_table,
    vectors_of,
    widened,
)
from embrm.cache.tensors import to_stored, to_tensor
from embrm.core.errors import UserError


@given(
    dtype=st.sampled_from(sorted(STORAGE)),
    rows=st.integers(0, 9),
    width=st.integers(1, 17),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_bit_pattern_survives_parquet_and_torch(
    dtype: str, rows: int, width: int, seed: int
) -> None:
    kind = STORAGE[dtype]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, width * kind.itemsize), np.uint8)
    states = raw.view(kind)
    column = binary_column(states)
    assert column.type == pa.binary(width * kind.itemsize)
    halves = pa.chunked_array([column[: rows // 2], column[rows // 2 :]])
    for chunked in (pa.chunked_array([column]), halves):
        read = vectors_of(chunked, kind, width)
        assert (read.dtype, read.shape, read.tobytes()) == (kind, states.shape, states.tobytes())
    tensor = to_tensor(states)
    assert tensor.dtype == getattr(torch, dtype)
    assert to_stored(tensor).tobytes() == states.tobytes()
    np.testing.assert_array_equal(widened(states), tensor.float().numpy())


@given(dtype=st.sampled_from(sorted(STORAGE)), seed=st.integers(0, 2**32 - 1))
def test_all_finite_agrees_with_torch(dtype: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    kind = STORAGE[dtype]
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, -torch.nan])
    values = torch.cat([edges.to(getattr(torch, dtype)), to_tensor(raw_numbers(random, kind))])
    some = to_stored(values[torch.from_numpy(random.integers(0, len(values), (2, 3)))])
    assert all_finite(some) == bool(to_tensor(some).isfinite().all())
    assert all_finite(some[:0])


def raw_numbers(random: np.random.Generator, kind: np.dtype) -> np.ndarray:
    return random.integers(0, 256, 8 * kind.itemsize, np.uint8).view(kind)


def test_vectors_are_stored_as_consecutive_little_endian_values() -> None:
    values = torch.tensor([[1.0, -2.0]])
    assert binary_column(to_stored(values))[0].as_py().hex() == "0000803f000000c0"
    assert binary_column(to_stored(values.bfloat16()))[0].as_py().hex() == "803f00c0"


def test_a_transposed_array_is_stored_by_rows() -> None:
    states = np.arange(6, dtype=np.float32).reshape(2, 3).T
    back = vectors_of(pa.chunked_array([binary_column(states)]), STORAGE["float32"], 2)
    np.testing.assert_array_equal(back, states)


@pytest.mark.parametrize("dtype", sorted(STORAGE))
def test_a_shard_survives_parquet(tmp_path: Path, dtype: str) -> None:
    rows, tokens = shard(0, dtype)
    layout = ShardLayout.of(rows, tokens)
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
        states = vectors_of(table[f"state.{view}"], layout.storage, layout.width)
        np.testing.assert_array_equal(states, rows.states[view])
        np.testing.assert_array_equal(table[f"norm.{view}"].to_numpy(), rows.norms[view])

    with path.open("wb") as stream:
        to_parquet(tokens_table(tokens, layout), stream)
    schema = layout.tokens()
    table = from_parquet(path, schema.names, schema)
    states = vectors_of(table["state"], layout.storage, layout.width)
    np.testing.assert_array_equal(states, tokens.state)
    top_ids = vectors_of(table["top_ids"], np.dtype(np.int32), 3)
    np.testing.assert_array_equal(top_ids, tokens.top_ids)
    tail_means = vectors_of(table["tail_mean"], layout.storage, layout.width)
    np.testing.assert_array_equal(tail_means, tokens.tail_mean)


def test_files_without_tail_means_have_the_older_schema() -> None:
    rows, tokens = shard(0)
    layout = ShardLayout.of(rows, replace(tokens, tail_mean=None))
    assert layout.model_dump(mode="json").keys() == {"dtype", "width", "views", "top_k"}
    assert layout.tokens().names[-3:] == ["state", "top_ids", "top_logits"]


def test_one_column_is_read_without_the_others(tmp_path: Path) -> None:
    rows, tokens = shard(0)
    layout = ShardLayout.of(rows, tokens)
    path = tmp_path / "part.parquet"
    with path.open("wb") as stream:
        to_parquet(responses_table(rows, layout), stream)
    table = from_parquet(path, ["state.layer:1"], layout.responses())
    assert table.column_names == ["state.layer:1"]


def test_dtype_and_width_are_in_the_schema_metadata() -> None:
    rows, tokens = shard(0, "bfloat16")
    schema = ShardLayout.of(rows, tokens).responses()
    assert schema.metadata == {b"dtype": b"bfloat16", b"width": b"6"}


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    rows, tokens = shard(0, "bfloat16")
    layout = ShardLayout.of(rows, tokens)
    path = tmp_path / "part.parquet"
    with path.open("wb") as stream:
        to_parquet(responses_table(rows, layout), stream)
    wider = layout.model_copy(update={"width": 7}).responses()
    with pytest.raises(UserError, match=r"part\.parquet is damaged \(its columns are not"):
        from_parquet(path, ["state.last"], wider)


def test_states_of_different_types_or_widths_are_refused() -> None:
    rows, tokens = shard(0)
    assert tokens.tail_mean is not None
    for narrow in (tokens.tail_mean.astype(np.float16), tokens.tail_mean[:, 1:]):
        with pytest.raises(ValueError, match="differ"):
            ShardLayout.of(rows, replace(tokens, tail_mean=narrow))
    rows.states["mean"] = rows.states["mean"].astype(np.uint16)
    with pytest.raises(ValueError, match="differ"):
        ShardLayout.of(rows, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": ["lst"]}, "unknown view 'lst'"),
        ({"dtype": "float17"}, "did you mean 'float16'"),
        ({"width": 0}, "greater than 0"),
    ],
)
def test_an_invalid_layout_is_a_one_line_error(change: dict, message: str) -> None:
    good = {"dtype": "float16", "width": 2, "views": ["last", "layer:12"], "top_k": None}
    assert ShardLayout.parse(good, "layout").views == ("last", "layer:12")
    with pytest.raises(UserError, match=message):
        ShardLayout.parse(good | change, "layout")
