"""Tests of verify: a change to any byte of any file is found."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cache import opened, shard, tables, write_cache

from embrm.cache.manifest import NAME, read_manifest, responses_file, tokens_file, write_manifest
from embrm.cache.schema import to_parquet, tokens_table
from embrm.cache.verify import verify
from embrm.core.errors import UserError
from embrm.core.files import TEMPORARY, sha256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "small"
    write_cache(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sound_cache_has_no_problems(tmp_path: Path, dtype: str) -> None:
    write_cache(tmp_path, dtype)
    assert verify(tmp_path) == []


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_changed_byte_of_any_file_is_found(folder: Path, data: st.DataObject) -> None:
    names = [NAME, *read_manifest(folder).files()]
    path = folder / data.draw(st.sampled_from(names))
    raw = path.read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    mask = data.draw(st.integers(1, 255))
    try:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :])
        [problem] = verify(folder)
        assert str(path) in problem or path.name == NAME
    finally:
        path.write_bytes(raw)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_cut_or_added_byte_is_found(folder: Path, data: st.DataObject) -> None:
    names = [NAME, *read_manifest(folder).files()]
    path = folder / data.draw(st.sampled_from(names))
    raw = path.read_bytes()
    length = data.draw(st.integers(0, len(raw) - 1))
    try:
        for changed in (raw[:length], raw[length + 1 :], raw + raw[length : length + 1]):
            path.write_bytes(changed)
            assert verify(folder) != []
    finally:
        path.write_bytes(raw)


def test_every_missing_file_is_found(folder: Path, tmp_path: Path) -> None:
    for name in [NAME, *read_manifest(folder).files()]:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        problems = verify(copy)
        assert len(problems) == 1, name
        assert "is missing" in problems[0] or name == NAME
        shutil.rmtree(copy)


def test_all_problems_are_listed(copy: Path) -> None:
    (copy / "notes.txt").write_text("?")
    (copy / "responses" / f"{TEMPORARY}part-00009.parquet").write_text("?")
    (copy / tokens_file(2)).unlink()
    cut = copy / responses_file(0)
    size = cut.stat().st_size
    cut.write_bytes(b"x")
    assert verify(copy) == [
        f"{copy / 'notes.txt'} is not part of this cache: remove it",
        f"{copy / 'responses' / f'{TEMPORARY}part-00009.parquet'} was left by a killed run: "
        "harmless, the next extract removes it",
        f"{cut} is damaged (1 bytes instead of {size}): "
        "delete it and run the command that made it again",
        f"{copy / tokens_file(2)} is missing: run the command that made it again",
    ]


def test_deleting_what_verify_names_and_extracting_again_repairs(copy: Path) -> None:
    path = copy / responses_file(0)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    [problem] = verify(copy)
    assert problem.endswith("delete it and run the command that made it again")
    path.unlink()
    write_cache(copy)
    assert verify(copy) == []


def test_an_incomplete_cache_is_reported(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        writer.write_shard(0, *shard(0))
    [problem] = verify(tmp_path)
    assert "is incomplete (1 of 5 shards are finished): run the command that made it" in problem


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("pairs", "chosen", 23, "pairs.chosen = 23 in 11 rows, must be 0 to 22"),
        ("pairs", "rejected", -1, "pairs.rejected = -1 in 11 rows, must be 0 to 22"),
        ("members", "response", None, "members.response = None in 4 rows, must be 0 to 22"),
    ],
)
def test_indices_out_of_range_are_found(
    tmp_path: Path, name: str, column: str, value: Any, message: str
) -> None:
    changed = tables()
    changed[name] = changed[name].with_columns(pl.lit(value, pl.Int32).alias(column))
    write_cache(tmp_path, tables=changed)
    [problem] = verify(tmp_path)
    assert message in problem


def test_a_missing_index_column_is_found(tmp_path: Path) -> None:
    write_cache(tmp_path, tables=tables() | {"members": pl.DataFrame({"split": ["a"]})})
    [problem] = verify(tmp_path)
    assert "members has no column 'response'" in problem


def test_token_rows_of_another_shard_are_found(copy: Path) -> None:
    # The writer would refuse them, so the shard and its entry are forged.
    manifest = read_manifest(copy)
    assert manifest.layout is not None
    _, tokens = shard(2)
    tokens.response[:] = np.arange(5)
    path = copy / tokens_file(2)
    with path.open("wb") as stream:
        to_parquet(tokens_table(tokens, manifest.layout), stream)
    entry = manifest.shards[2]
    assert entry is not None
    assert entry.tokens is not None
    forged = entry.tokens.model_copy(update={"bytes": path.stat().st_size, "sha256": sha256(path)})
    shards = list(manifest.shards)
    shards[2] = entry.model_copy(update={"tokens": forged})
    write_manifest(copy, manifest.model_copy(update={"shards": tuple(shards)}))
    [problem] = verify(copy)
    assert "tokens/part-00002.parquet: response = 0, must be 10 to 14" in problem


def test_a_wrong_row_count_is_found(copy: Path) -> None:
    manifest = read_manifest(copy)
    entry = manifest.tables["leaks"].model_copy(update={"rows": 3})
    tables = manifest.tables | {"leaks": entry}
    write_manifest(copy, manifest.model_copy(update={"tables": tables}))
    [problem] = verify(copy)
    assert "leaks has 0 rows instead of 3" in problem


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=f"no cache at {place}"):
            verify(place)
