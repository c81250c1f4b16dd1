"""Arrays: memory-maps .npy, .pt and .safetensors files of other programs without unpickling."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from embrm.core.errors import UserError, nearest
from embrm.core.progress import progress
from embrm.core.text import first_line, listed, quoted

BLOCK_BYTES = 64 << 20
"""Bytes of an array that are read at a time."""

_STORED = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.float32: torch.float32,
    torch.float64: torch.float32,
}
"""Allowed dtypes of states, and the dtype that a cache stores each in."""


@dataclass(frozen=True)
class ArrayFile:
    """A memory-mappable array in a file; `open_array` makes one."""

    path: Path
    key: str | None
    """Name of the array in a file of several."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Name in errors and exclusions: the file with its parent folder."""
        return "/".join(self.path.parts[-2:])

    def map(self) -> Tensor:
        """Memory-map the array.

        Each call makes a new mapping, so that deleting the tensor releases its pages from memory.
        """
        return _READERS[self.path.suffix](self.path, self.key)


@dataclass(frozen=True)
class StateArray:
    """States in a file, viewed as [rows, width]: all axes but the last are flattened."""

    file: ArrayFile

    @property
    def width(self) -> int:
        """Length of a state vector."""
        return self.file.shape[-1]

    @property
    def rows(self) -> int:
        """Number of states."""
        return int(np.prod(self.file.shape[:-1]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that a cache stores them in: that of the file, but float32 for float64."""
        return _STORED[self.file.dtype]

    @property
    def block(self) -> int:
        """Rows to read at a time."""
        return max(1, BLOCK_BYTES // (self.width * self.file.dtype.itemsize))

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """The states of the given rows (at least one): [len(rows), width] of `dtype`.

        A view of the mapping if the rows are consecutive and need no cast, else a copy.
        """
        states = self.file.map().view(-1, self.width)
        if (np.diff(rows) == 1).all():
            return states[rows[0] : rows[-1] + 1].to(self.dtype)
        # As bytes, because numpy has no bfloat16; with numpy, because it allocates huge pages.
        taken = torch.from_numpy(states.view(torch.uint8).numpy()[rows])
        return taken.view(self.file.dtype).to(self.dtype)

    def equal_rows(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether row left[i] equals row right[i]: bool [len(left)]."""
        found = np.zeros(len(left), np.bool_)
        for first in range(0, len(left), self.block):
            part = slice(first, first + self.block)
            found[part] = (self.take(left[part]) == self.take(right[part])).all(1).numpy()
        return found


@dataclass(frozen=True)
class Scan:
    """Digest and row statistics of a `StateArray`, from one pass; the arrays are [rows]."""

    sha256: str
    """Hex digest of the values in order, in the file's dtype; equal for every file type."""
    norms: NDArray[np.float32]
    """Euclidean norms; not finite if a value is NaN or infinite, or if the norm overflows."""
    marks: NDArray[np.float32]
    """The middle value of each row: rows with equal norm and mark are very likely equal."""
    constant: NDArray[np.bool_]
    """Whether all values of the row are the same number."""


def open_array(path: Path, key: str | None = None) -> ArrayFile:
    """Open the array in a .npy, .pt or .safetensors file; `key` names it in a file of several.

    No Python object is ever unpickled. Raises: UserError for a file that is missing or damaged, or
    that contains anything but numbers.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise UserError(
            f"{path}: unknown file type {quoted(path.suffix)}: "
            f"convert it to one of {', '.join(_READERS)}"
        )
    if not path.is_file():
        raise UserError(f"no array at {path}: check the path")
    try:
        tensor = reader(path, key)
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"no permission to read {path}: change its permissions") from None
    except Exception as error:  # numpy, torch and safetensors raise various types
        # torch's own message about pickles advises to load them anyway.
        pickled = type(error).__name__ == "UnpicklingError"
        why = "it holds Python objects" if pickled else first_line(error)
        raise UserError(
            f"{path} is not a complete array of numbers ({why}): write it again, as one array "
            "without Python objects"
        ) from None
    if not tensor.is_contiguous():
        raise UserError(f"{path} is not contiguous in C order: save a contiguous copy")
    return ArrayFile(path, key, (*tensor.shape,), tensor.dtype)


def open_states(path: Path, key: str | None = None) -> StateArray:
    """Open an array of states, with two or three axes.

    Raises: UserError as `open_array`, and for another number of axes, an empty one, or a dtype that
    states cannot have.
    """
    file = open_array(path, key)
    if len(file.shape) not in (2, 3) or 0 in file.shape:
        raise UserError(
            f"{path} has shape {file.shape}: states have (prompts, responses, width), "
            "(responses, prompts, width) or (rows, width)"
        )
    if file.dtype not in _STORED:
        known = ", ".join(_name(dtype) for dtype in _STORED)
        raise UserError(f"{path} has dtype {_name(file.dtype)}: convert it to one of {known}")
    return StateArray(file)


def read_numbers(path: Path, key: str | None) -> tuple[NDArray[np.float64], str]:
    """Read a whole (small) array as float64; returns it and the SHA-256 of its stored values.

    Raises: UserError as `open_array`.
    """
    tensor = open_array(path, key).map()
    return tensor.double().numpy().copy(), hashlib.sha256(_bytes(tensor)).hexdigest()


def scan(array: StateArray) -> Scan:
    """Compute the `Scan` of an array, reading one block at a time."""
    digest = hashlib.sha256()
    norms, marks = np.empty(array.rows, np.float32), np.empty(array.rows, np.float32)
    constant = np.zeros(array.rows, np.bool_)
    with (
        progress(f"reading {array.file.name}", array.rows, "rows") as bar,
        ThreadPoolExecutor(1, "digest") as thread,
    ):
        for first, block in _blocks(array):
            hashing = thread.submit(digest.update, _bytes(block))
            values = block.float()
            own = slice(first, first + len(values))
            norms[own] = torch.linalg.vector_norm(values, dim=1).numpy()
            marks[own] = values[:, array.width // 2].numpy()
            constant[own] = _constant(values)
            hashing.result()
            bar.advance(len(values))
    return Scan(digest.hexdigest(), norms, marks, constant)


def _blocks(array: StateArray) -> Iterator[tuple[int, Tensor]]:
    """Yield (number of the first row, mapped rows) for each block."""
    for first in range(0, array.rows, array.block):
        yield first, array.file.map().view(-1, array.width)[first : first + array.block]


def _constant(values: Tensor) -> NDArray[np.bool_]:
    if values.shape[1] == 1:
        return (values[:, 0] == 0).numpy()
    found = (values[:, 0] == values[:, -1]).numpy()  # a cheap test that few rows pass
    for row in np.flatnonzero(found):
        found[row] = bool((values[row] == values[row, 0]).all())
    return found


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_npy(path: Path, key: str | None) -> Tensor:
    _refuse_key(path, key)
    # Copy-on-write, because torch warns about read-only arrays; nothing writes to it.
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    if array.dtype.isnative and array.dtype.kind in "biuf":
        return torch.from_numpy(array)
    raise UserError(
        f"{path} has dtype {array.dtype.str}: convert it to numbers in this machine's byte order, "
        "or write bfloat16 as .safetensors"
    )


def _read_pt(path: Path, key: str | None) -> Tensor:
    # weights_only loads only tensors and plain containers, and runs no code from the file.
    content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    if isinstance(content, Tensor):
        _refuse_key(path, key)
        return content.detach()
    tensors = content if isinstance(content, dict) else {}
    tensors = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    return tensors[_chosen(path, key, tensors)].detach()


def _read_safetensors(path: Path, key: str | None) -> Tensor:
    with safe_open(path, framework="pt") as file:
        name = _chosen(path, key, dict.fromkeys(file.keys()))
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _refuse_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise UserError(f"{path} contains a single array: leave its name {quoted(key)} out")


def _chosen(path: Path, key: str | None, names: Mapping[str, object]) -> str:
    if not names:
        raise UserError(f"{path} contains no array: write one into it")
    if key is None and len(names) == 1:
        return next(iter(names))
    if key is None:
        raise UserError(f"{path} contains {listed([*names])}: choose one with key or gold_key")
    if key not in names:
        raise UserError(f"{path} contains no array {quoted(key)}: {nearest(key, names)}")
    return key


_READERS: dict[str, Callable[[Path, str | None], Tensor]] = {
    ".npy": _read_npy,
    ".pt": _read_pt,
    ".safetensors": _read_safetensors,
}
