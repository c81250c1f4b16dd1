"""Files: old or new, never half; one writer a folder; a full disk is one line."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from embrm.errors import UserError
from embrm.files import TEMPORARY, exclusive, remove_temporaries, sha256, write_atomic, write_bytes


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
