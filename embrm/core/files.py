"""Durable files: a reader sees the old content or the new content, never half of either."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from embrm.core.errors import UserError

TEMPORARY = ".tmp-"
"""Prefix of files being written. A file that carries it is rubbish left by a kill."""

_REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
}  # fmt: skip

_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}
"""Another file system, one without hard links, or a file that may not have another."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into a one-line error.

    Also where a library that writes by itself tells of it in an exception of its own.
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"disk full while writing {path}: finished work is kept; "
                "free some space and run the same command again"
            ) from None
        if number in _REFUSED:
            raise UserError(
                f"cannot write {path}: {os.strerror(number).lower()}; choose another folder"
            ) from None
        raise


def _number(error: Exception) -> int:
    """Its errno, which polars and safetensors have in their text alone; 0: none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    # torch.save's writer does not say why it got less far than it should; hardly ever another why.
    cut = re.search(r"inline_container.*(unexpected pos|PytorchStreamWriter)", str(error))
    return int(found[1]) if found else errno.ENOSPC if cut else 0


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write through `write(stream)` to a temporary name, fsync, rename over `path`."""
    temporary = path.with_name(TEMPORARY + path.name)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically."""
    write_atomic(path, lambda stream: stream.write(content))


def move_into_place(temporary: Path, path: Path) -> None:
    """Give a finished file its name, atomically: fsync, rename over `path`."""
    with disk_errors(path):
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)


def link_or_copy(source: Path, path: Path) -> None:
    """Make `path` a hard link of `source`, or a copy where there can be none, atomically."""
    temporary = path.with_name(TEMPORARY + path.name)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(source)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            with source.open("rb") as content:
                write_atomic(path, lambda stream: shutil.copyfileobj(content, stream, 1 << 20))
            return
        temporary.replace(path)
        temporary.unlink(missing_ok=True)  # a link onto itself is not renamed
        _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed writer left below `folder`."""
    for leftover in folder.rglob(f"{TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for one writing process; the lock goes with the process, however it ends.

    Raises: UserError when another process holds it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is being written by another embrm process: wait for it or stop it first"
            ) from None
        yield
