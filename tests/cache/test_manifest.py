"""Tests of the manifest: round trip, and refusal of any change to it."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_cache import IDENTITY, write_cache

from embrm.cache.manifest import NAME, Manifest, read_manifest, write_manifest
from embrm.core.errors import UserError
from embrm.core.specs import canonical_json, content_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("manifest") / "small"
    write_cache(path)
    return path


def test_a_written_manifest_is_read_back(folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(folder)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert (tmp_path / NAME).read_bytes() == (folder / NAME).read_bytes()


def test_cache_id_is_the_digest_of_the_identity(folder: Path) -> None:
    assert read_manifest(folder).cache_id == content_id(IDENTITY)


def test_a_manifest_is_canonical_json_with_its_own_digest(folder: Path) -> None:
    text = (folder / NAME).read_text()
    body = json.loads(text)
    assert canonical_json(body) + "\n" == text
    digest = body.pop("digest")
    assert hashlib.sha256(canonical_json(body).encode()).hexdigest() == digest


def test_a_manifest_from_before_tail_means_can_be_read(folder: Path, tmp_path: Path) -> None:
    body = json.loads((folder / NAME).read_text())
    body.pop("digest")
    assert body["layout"].pop("tail_mean") is True
    assert body["layout"].keys() == {"dtype", "width", "views", "top_k"}
    body["digest"] = hashlib.sha256(canonical_json(body).encode()).hexdigest()
    (tmp_path / NAME).write_text(canonical_json(body) + "\n")
    layout = read_manifest(tmp_path).layout
    assert layout is not None
    assert layout.tail_mean is False


def test_files_lists_every_finished_file(folder: Path) -> None:
    on_disk = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (NAME, ".lock")
    }
    assert {*read_manifest(folder).files()} == on_disk


@given(data=st.data())
def test_a_truncated_manifest_is_refused(folder: Path, data: st.DataObject) -> None:
    path = folder / NAME
    raw = path.read_bytes()
    length = data.draw(st.integers(0, len(raw) - 1))
    try:
        path.write_bytes(raw[:length])
        with pytest.raises(UserError, match=r"manifest\.json is damaged: restore it from a copy"):
            read_manifest(folder)
    finally:
        path.write_bytes(raw)


@given(data=st.data())
def test_any_changed_byte_is_refused(folder: Path, data: st.DataObject) -> None:
    path = folder / NAME
    raw = path.read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    mask = data.draw(st.integers(1, 255))
    try:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :])
        with pytest.raises(UserError):
            read_manifest(folder)
    finally:
        path.write_bytes(raw)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"7", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"format":"embrm-cache"}'],
)
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match="is damaged: restore it"):
        read_manifest(tmp_path)


def test_a_newer_format_version_is_refused(folder: Path, tmp_path: Path) -> None:
    body = json.loads((folder / NAME).read_text()) | {"version": 2, "novelty": 1}
    (tmp_path / NAME).write_text(json.dumps(body))
    with pytest.raises(
        UserError, match="cache format version 2, but this embrm reads up to 1: upgrade"
    ):
        read_manifest(tmp_path)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no cache at .*: check the path, or make it with embrm"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no cache at"):
        read_manifest(tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        {"cache_id": "0" * 16},
        {"n_responses": 26},
        {"layout": None},
        {"lm_head": None},
        {"tables": {}},
    ],
)
def test_a_forged_manifest_is_refused(folder: Path, tmp_path: Path, change: dict) -> None:
    # The digest is correct, so only the consistency checks can detect it.
    write_manifest(tmp_path, read_manifest(folder).model_copy(update=change))
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(tmp_path)


@given(n=st.integers(1, 50), size=st.integers(1, 60))
def test_shards_partition_the_responses(n: int, size: int) -> None:
    count = -(-n // size)
    manifest = Manifest(
        cache_id=content_id({}),
        identity={},
        environments=(),
        extraction={},
        data={},
        n_responses=n,
        shard_rows=size,
        shards=(None,) * count,
    )
    rows = [row for index in range(count) for row in manifest.rows_of(index)]
    assert rows == [*range(n)]
