"""Files: old or new, never half; one writer a folder; a full disk is one line."""

import errno
import multiprocessing
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import save_file

from embrm.core.errors import UserError
from embrm.core.files import (
    TEMPORARY,
    disk_errors,
    exclusive,
    link_or_copy,
    remove_temporaries,
    sha256,
    write_atomic,
    write_bytes,
)


def test_a_failing_writer_leaves_the_old_content_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def half(stream: IO[bytes]) -> None:
        stream.write(b"ne")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_atomic(path, half)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_disk_full_is_one_line_and_keeps_the_old_file(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64)
    path = disk / "file"
    write_bytes(path, b"old")
    with pytest.raises(UserError, match="disk full while writing"):
        write_bytes(path, b"x" * 200_000)
    assert path.read_bytes() == b"old"
    assert list(disk.iterdir()) == [path]


@pytest.mark.parametrize("save", [torch.save, lambda tensors, path: save_file(tensors, path)])
def test_disk_full_is_one_line_where_a_library_writes(
    small_disk: Callable[[int], Path], save: Callable[[dict[str, torch.Tensor], Path], None]
) -> None:
    path = small_disk(64) / "file"
    with pytest.raises(UserError, match="disk full while writing"), disk_errors(path):
        save({"a": torch.zeros(100_000)}, path)


def test_an_error_that_is_not_the_disks_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="another reason"), disk_errors(tmp_path):
        raise RuntimeError("another reason")


def test_a_path_below_a_file_is_one_line(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"")
    with pytest.raises(UserError, match="cannot write"):
        write_bytes(tmp_path / "file" / "child", b"")


def test_remove_temporaries_takes_only_what_kills_left(tmp_path: Path) -> None:
    write_bytes(tmp_path / "sub" / "kept", b"")
    (tmp_path / "sub" / f"{TEMPORARY}part").write_bytes(b"half")
    remove_temporaries(tmp_path)
    assert [entry.name for entry in (tmp_path / "sub").iterdir()] == ["kept"]


def _hold(folder: Path, held: "multiprocessing.synchronize.Event") -> None:
    with exclusive(folder):
        held.set()
        multiprocessing.Event().wait()


def test_a_folder_has_one_writer_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, held))
    holder.start()
    assert held.wait(30)
    with pytest.raises(UserError, match="another embrm process"), exclusive(tmp_path):
        pass
    holder.kill()
    holder.join()
    with exclusive(tmp_path):
        pass


def test_sha256_of_a_known_message(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == known


@pytest.mark.parametrize("number", [0, errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EIO])
def test_link_or_copy_replaces_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A refusal that a copy cannot help is not taken for one that it can."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    source, path = tmp_path / "source", tmp_path / "sub" / "file"
    write_bytes(source, b"new")
    write_bytes(path, b"old")
    if number:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            link_or_copy(source, path)
        assert path.read_bytes() == b"old"
    else:
        link_or_copy(source, path)
        link_or_copy(source, path)
        assert path.read_bytes() == b"new"
        assert path.samefile(source) == (number == 0)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_copy_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with (tmp_path / "source").open("wb") as stream:
        stream.truncate(64 << 20)
    tracemalloc.start()
    try:
        link_or_copy(tmp_path / "source", tmp_path / "file")
        assert sha256(tmp_path / "file") == sha256(tmp_path / "source")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
