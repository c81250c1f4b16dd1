"""Tests of reading a cache: it gives what was written, or refuses damaged content."""

import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from counted_calls import calls_of
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from small_cache import IDENTITY, RESPONSES, opened, shard, tables, write_cache
from toy_cache import toy_cache

from embrm.cache.manifest import (
    NAME,
    FileEntry,
    Manifest,
    read_manifest,
    responses_file,
    tokens_file,
    write_manifest,
)
from embrm.cache.reader import Cache, open_cache
from embrm.cache.schema import ShardRows, binary_column, responses_table, to_parquet
from embrm.cache.tensors import lm_head_tensors, to_stored, to_tensor
from embrm.core.errors import UserError
from embrm.core.files import sha256
from embrm.core.specs import content_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "small"
    write_cache(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_written_cache_is_read_back(tmp_path: Path, dtype: str) -> None:
    write_cache(tmp_path, dtype)
    cache = open_cache(tmp_path)
    assert (cache.dtype, cache.width, cache.views) == (dtype, 6, ("last", "layer:1", "mean"))
    assert cache.cache_id == content_id(IDENTITY)
    assert cache.splits == ["groups", "ood", "train"]
    for name, table in tables().items():
        assert_frame_equal(getattr(cache, name), table)
    shards = [shard(index, dtype) for index in range(5)]
    for view in cache.views:
        states = to_tensor(cache.stored_states(view))
        expected = to_tensor(np.concatenate([rows.states[view] for rows, _ in shards]))
        assert states.dtype == getattr(torch, dtype)
        assert torch.equal(states, expected)
        assert cache.states(view).dtype == np.float32
        np.testing.assert_array_equal(cache.states(view), expected.float().numpy())
        assert [len(part) for part in cache.stored_shards(view)] == [5, 5, 5, 5, 3]
        norms = np.concatenate([rows.norms[view] for rows, _ in shards])
        np.testing.assert_array_equal(cache.responses[f"norm.{view}"], norms)
    assert cache.responses["response_id"].to_list() == [f"{i:016x}" for i in range(RESPONSES)]
    for name in ("n_prompt", "n_response", "truncated", "final_position", "final_token", "S"):
        expected = np.concatenate([getattr(rows, name) for rows, _ in shards])
        column = cache.responses[name].to_numpy()
        assert column.dtype == expected.dtype
        np.testing.assert_array_equal(column, expected)
    got = cache.token_rows()
    assert got.tail_mean is not None
    assert to_tensor(got.tail_mean).dtype == getattr(torch, dtype)
    for field in fields(got):
        expected = np.concatenate([getattr(tokens, field.name) for _, tokens in shards])
        assert getattr(got, field.name).dtype == expected.dtype
        np.testing.assert_array_equal(getattr(got, field.name), expected)
        if field.name in cache.tokens.columns:
            np.testing.assert_array_equal(cache.tokens[field.name].to_numpy(), expected)
    owners = np.concatenate([tokens.response for _, tokens in shards])
    assert cache.n_token_rows.tolist() == [(owners == row).sum() for row in range(RESPONSES)]
    assert torch.equal(lm_head_tensors(cache)["weight"], torch.arange(48.0).reshape(8, 6))


def test_the_vocabulary_size_is_read_from_the_header_only(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    head = copy / "lm_head.safetensors"
    content = head.read_bytes()
    head.write_bytes(content[:-4] + b"else")  # a number, not the header
    assert open_cache(copy).vocabulary == 8
    head.write_bytes(b"\xff" * len(content))
    with pytest.raises(UserError, match=r"lm_head\.safetensors is damaged"):
        _ = open_cache(copy).vocabulary
    write_cache(tmp_path / "headless", lm_head=dict)
    assert open_cache(tmp_path / "headless").vocabulary == 0


def test_everything_is_read_without_torch(folder: Path) -> None:
    code = """
import sys
from pathlib import Path
from embrm.cache import listing, merge, verify
from embrm.cache.reader import open_cache
folder = Path(sys.argv[1])
cache = open_cache(folder)
print([cache.states(view).shape for view in cache.views], cache.tokens.shape, cache.vocabulary)
print(cache.responses.height, cache.pairs.height, cache.members.height, cache.exclusions.height)
print(verify.verify(folder), listing.describe_cache(folder)["state"])
heavy = {"torch", "transformers", "datasets", "matplotlib", "scipy", "sklearn"}
print([name for name in heavy if sys.modules.get(name)])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        "[(23, 6), (23, 6), (23, 6)] (18, 7) 8",
        "23 11 4 1",
        "[] complete",
        "[]",
    ], done.stderr


def test_states_can_be_changed_without_changing_the_cache(folder: Path) -> None:
    cache = open_cache(folder)
    cache.states("last")[:] = 0
    assert np.abs(cache.states("last")).sum() > 0


def test_without_sampled_positions(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        for index in range(writer.n_shards):
            writer.write_shard(index, shard(index)[0], None)
        writer.finish()
    with pytest.raises(UserError, match="has no token rows: extract with token_rows"):
        open_cache(tmp_path).token_rows()


def test_without_tail_means(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        for index in range(writer.n_shards):
            rows, tokens = shard(index)
            writer.write_shard(index, rows, replace(tokens, tail_mean=None))
        writer.finish()
    assert '"tail_mean"' not in (tmp_path / NAME).read_text()
    assert open_cache(tmp_path).token_rows().tail_mean is None


def test_an_unknown_view_names_the_nearest(folder: Path) -> None:
    cache = open_cache(folder)
    with pytest.raises(UserError, match=r"view 'layer:2' is not in .*: did you mean 'layer:1'\?"):
        cache.states("layer:2")
    with pytest.raises(UserError, match="valid: last, layer:1, mean"):
        cache.states("zzz")


@pytest.mark.parametrize("done", [0, 2, 5])
def test_an_incomplete_cache_is_refused(tmp_path: Path, done: int) -> None:
    with opened(tmp_path) as writer:
        for index in range(done):
            writer.write_shard(index, *shard(index))
    message = rf"is incomplete \({done} of 5 shards are finished\): run the command that made it"
    with pytest.raises(UserError, match=message):
        open_cache(tmp_path)


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cache at"):
        open_cache(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", [responses_file(1), tokens_file(4), "members.parquet", "lm_head.safetensors"]
)
def test_a_missing_or_truncated_file_is_refused_on_opening(
    folder: Path, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError) as error:
        open_cache(copy)
    assert str(error.value) == (
        f"{path} is damaged ({size - 1} bytes instead of {size}): "
        "delete it and run the command that made it again"
    )
    path.unlink()
    with pytest.raises(UserError, match="is missing: run the command that made it again"):
        open_cache(copy)


@pytest.mark.parametrize(
    "name", [responses_file(1), tokens_file(4), "members.parquet", "lm_head.safetensors"]
)
def test_a_file_lost_after_opening_is_a_one_line_error(
    folder: Path, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    cache = open_cache(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{Path(name).name} is (damaged|missing)"):
        everything(cache)


def everything(cache: Cache) -> list[bytes]:
    """The whole content of a cache, as bytes."""
    frames = [cache.pairs, cache.members, cache.exclusions, cache.leaks, cache.responses]
    tokens = cache.token_rows()
    assert tokens.tail_mean is not None
    head = lm_head_tensors(cache)["weight"].numpy()
    arrays = [*map(cache.stored_states, cache.views), head, *vars(tokens).values()]
    return [frame.write_csv().encode() for frame in frames] + [a.tobytes() for a in arrays]


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_flipped_byte_is_refused_or_changes_nothing(folder: Path, data: st.DataObject) -> None:
    # Some bytes of a Parquet file do not affect its content (statistics, the writer's name);
    # `verify` finds changes there, but a reader may ignore them.
    intact = everything(open_cache(folder))
    name = data.draw(st.sampled_from(sorted(read_manifest(folder).files())))
    path = folder / name
    raw = path.read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    mask = data.draw(st.integers(1, 255))
    try:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :])
        refusal = ""
        try:
            assert everything(open_cache(folder)) == intact
        except UserError as error:
            refusal = str(error)
        assert not refusal or (str(path) in refusal and "\n" not in refusal)
    finally:
        path.write_bytes(raw)


def test_a_flipped_state_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / responses_file(3)
    vector = binary_column(shard(3)[0].states["mean"])[2].as_py()
    content = path.read_bytes()
    assert content.count(vector) == 1
    path.write_bytes(content.replace(vector, bytes([vector[0] ^ 1]) + vector[1:]))
    cache = open_cache(copy)
    cache.states("last")
    with pytest.raises(UserError, match=r"part-00003\.parquet is damaged \(.*CRC.*\): delete it"):
        cache.states("mean")


def test_a_flipped_tail_mean_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / tokens_file(3)
    tail_means = shard(3)[1].tail_mean
    assert tail_means is not None
    vector = binary_column(tail_means)[2].as_py()
    content = path.read_bytes()
    assert content.count(vector) == 1
    path.write_bytes(content.replace(vector, bytes([vector[0] ^ 1]) + vector[1:]))
    with pytest.raises(UserError, match=r"tokens/part-00003\.parquet is damaged \(.*CRC.*\)"):
        open_cache(copy).token_rows()


@pytest.mark.parametrize("flipped", [b"dtyp\xff", b"dtypf"])
def test_flipped_metadata_of_a_footer_is_refused(
    folder: Path, tmp_path: Path, flipped: bytes
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / responses_file(0)
    content = path.read_bytes()
    assert content.count(b"dtype") == 1
    path.write_bytes(content.replace(b"dtype", flipped))
    with pytest.raises(UserError, match=r"part-00000\.parquet is damaged"):
        _ = open_cache(copy).responses


def forge(folder: Path, index: int, rows: ShardRows) -> None:
    """Replace a shard without the writer's checks, and update the manifest to match."""
    manifest = read_manifest(folder)
    assert manifest.layout is not None
    path = folder / responses_file(index)
    with path.open("wb") as stream:
        to_parquet(responses_table(rows, manifest.layout), stream)
    entry = manifest.shards[index]
    assert entry is not None
    changed = entry.responses.model_copy(
        update={"bytes": path.stat().st_size, "sha256": sha256(path)}
    )
    shards = list(manifest.shards)
    shards[index] = entry.model_copy(update={"responses": changed})
    write_manifest(folder, manifest.model_copy(update={"shards": tuple(shards)}))


def test_a_nan_that_another_program_wrote_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    rows, _ = shard(1)
    rows.states["last"][0, 0] = float("nan")
    forge(copy, 1, rows)
    with pytest.raises(UserError, match=r"part-00001\.parquet is damaged \(a vector is NaN"):
        open_cache(copy).states("last")


def test_a_shard_of_another_length_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    forge(copy, 1, shard(4)[0])
    with pytest.raises(UserError, match=r"damaged \(3 rows instead of 5\)"):
        open_cache(copy).states("last")


def test_a_newer_format_version_is_refused_on_opening(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    text = (copy / NAME).read_text()
    (copy / NAME).write_text(text.replace('"version":1', '"version":9'))
    with pytest.raises(UserError, match="cache format version 9"):
        open_cache(copy)


def test_work_depends_on_the_number_of_shards_not_of_rows(tmp_path: Path) -> None:
    """Eleven shards of 4 and of 4,096 rows take the same number of calls."""

    def calls_to_read(size: int) -> int:
        folder = tmp_path / str(size)
        states = torch.randn(11 * size, 192, generator=torch.Generator().manual_seed(0))
        with opened(folder, n_responses=11 * size, shard_rows=size) as writer:
            for index, part in enumerate(states.split(size)):
                ones = np.ones(size, np.int32)
                rows = ShardRows(
                    index * size,
                    [f"{index * size + row:016x}" for row in range(size)],
                    ["p"] * size,
                    *(ones, ones, ones > 0, ones, ones, -ones.astype(np.float64)),
                    states={"last": to_stored(part)},
                    norms={"last": part.norm(dim=1).numpy()},
                )
                writer.write_shard(index, rows, None)
            writer.finish()
        assert np.array_equal(open_cache(folder).states("last"), states.numpy())
        cache = open_cache(folder)
        return calls_of(lambda: cache.states("last"))

    few, many = calls_to_read(4), calls_to_read(4096)
    assert many < 1.2 * few  # larger files are hashed in more pieces


def test_tables_keep_their_types(folder: Path) -> None:
    cache = open_cache(folder)
    assert cache.pairs.schema["chosen"] == pl.Int32
    assert cache.pairs.schema["subset"] == pl.String
    assert cache.leaks.schema == tables()["leaks"].schema


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_program_in_the_documentation_reads_the_same_states(tmp_path: Path, dtype: str) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "cache-format.md"
    program, _ = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict = {}
    exec(program, names)
    write_cache(tmp_path, dtype)
    cache = open_cache(tmp_path)
    for view in cache.views:
        read = names["read_states"](tmp_path, view)
        np.testing.assert_array_equal(read, cache.states(view))


def test_the_documentation_names_every_column_and_key(folder: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "cache-format.md"
    text = page.read_text()
    manifest = read_manifest(folder)
    assert manifest.layout is not None
    columns = {
        name.partition(".")[0]
        for schema in (manifest.layout.responses(), manifest.layout.tokens())
        for name in schema.names
    }
    for name in {*columns, *Manifest.model_fields, *FileEntry.model_fields}:
        assert re.search(rf"[`\"]{name}\b", text), name


def test_groups_have_one_row_per_prompt(tmp_path: Path) -> None:
    cache = open_cache(toy_cache(tmp_path / "cache"))
    groups = cache.groups
    assert groups["prompt_id"].n_unique() == groups.height == 12
    assert groups["response"].list.len().to_list() == [4] * 12
    assert (
        groups.explode("response", "model", "gold")
        .select(cache.members.columns)
        .equals(cache.members)
    )


def test_the_repr_of_a_cache_describes_it(tmp_path: Path) -> None:
    cache = open_cache(toy_cache(tmp_path / "cache"))
    assert cache.identity["toy"] == 0
    shown = repr(cache)
    assert "240 responses" in shown
    assert "views last, mean" in shown
    assert cache.cache_id in shown
