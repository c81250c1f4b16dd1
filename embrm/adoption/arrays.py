"""Arrays in other programs' files: mapped, no object unpickled, read once before they are used."""

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
"""Of an array, read at once."""

_STORED = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.float32: torch.float32,
    torch.float64: torch.float32,
}
"""Types that states may have → the type they are stored in."""


@dataclass(frozen=True)
class ArrayFile:
    """An array in a file, not read yet. Make it with `open_array`."""

    path: Path
    key: str | None
    """Its name, in a file that holds several."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """How errors and exclusions call it: the file with its folder."""
        return "/".join(self.path.parts[-2:])

    def map(self) -> Tensor:
        """The array, its pages read where they are touched.

        Mapped anew each time: when the tensor goes, its pages go from this process's memory.
        """
        return _READERS[self.path.suffix](self.path, self.key)


@dataclass(frozen=True)
class StateArray:
    """States in a file, seen as [rows, width]: whatever axes come before the last are flattened."""

    file: ArrayFile

    @property
    def width(self) -> int:
        """Values in a state."""
        return self.file.shape[-1]

    @property
    def rows(self) -> int:
        """States, the axes before the last flattened."""
        return int(np.prod(self.file.shape[:-1]))

    @property
    def dtype(self) -> torch.dtype:
        """The type the states are stored in: the file's, or float32 for float64."""
        return _STORED[self.file.dtype]

    @property
    def block(self) -> int:
        """Rows to read at once."""
        return max(1, BLOCK_BYTES // (self.width * self.file.dtype.itemsize))

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """These rows, of which there is one at least, [len(rows), width] of `dtype`: mapped where
        they follow one another in the file and need no cast, else copied."""
        states = self.file.map().view(-1, self.width)
        if (np.diff(rows) == 1).all():
            return states[rows[0] : rows[-1] + 1].to(self.dtype)
        # As bytes, for numpy knows no bfloat16; by numpy, whose large arrays are of huge pages.
        taken = torch.from_numpy(states.view(torch.uint8).numpy()[rows])
        return taken.view(self.file.dtype).to(self.dtype)

    def same(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether row left[i] equals row right[i], bool [len(left)]."""
        found = np.zeros(len(left), np.bool_)
        for first in range(0, len(left), self.block):
            part = slice(first, first + self.block)
            found[part] = (self.take(left[part]) == self.take(right[part])).all(1).numpy()
        return found


@dataclass(frozen=True)
class Scan:
    """What one reading of a `StateArray` tells; arrays have one entry per row."""

    sha256: str
    """Hex digest of the values as the file stores them, in order: the same in every kind of
    file."""
    norms: NDArray[np.float32]
    """Euclidean norms, in float32; not finite where a value is NaN or infinite, or where the norm
    is beyond float32."""
    marks: NDArray[np.float32]
    """The middle value: rows of one norm and mark are almost surely equal."""
    constant: NDArray[np.bool_]
    """All values are one number."""


def open_array(path: Path, key: str | None = None) -> ArrayFile:
    """The array in a .npy, .pt or .safetensors file, under `key` where it holds several.

    Raises: UserError for a file that is missing, damaged, or holds anything but numbers: nothing
    is ever unpickled.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise UserError(
            f"{path}: unknown kind of array {quoted(path.suffix)}: "
            f"one of {', '.join(_READERS)} can be read"
        )
    if not path.is_file():
        raise UserError(f"no array at {path}: check the path")
    try:
        tensor = reader(path, key)
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"{path} may not be read: check its permissions") from None
    except Exception as error:  # numpy, torch and safetensors raise what they like
        # What torch says about pickles is advice to load them all the same.
        pickled = type(error).__name__ == "UnpicklingError"
        why = "it holds Python objects" if pickled else first_line(error)
        raise UserError(
            f"{path} is not a whole array of numbers ({why}): write it again, as one array "
            "without Python objects"
        ) from None
    if not tensor.is_contiguous():
        raise UserError(
            f"{path}: its values are not in the order of its axes (C order): save a contiguous copy"
        )
    return ArrayFile(path, key, (*tensor.shape,), tensor.dtype)


def open_states(path: Path, key: str | None = None) -> StateArray:
    """States in a file, of two or three axes. Raises: UserError as `open_array`, and for an array
    that holds no states."""
    file = open_array(path, key)
    if len(file.shape) not in (2, 3) or 0 in file.shape:
        raise UserError(
            f"{path} has shape {file.shape}: states have (prompts, responses, width), "
            "(responses, prompts, width) or (rows, width)"
        )
    if file.dtype not in _STORED:
        known = ", ".join(_name(dtype) for dtype in _STORED)
        raise UserError(f"{path} holds {_name(file.dtype)}: states are {known}: convert it")
    return StateArray(file)


def read_numbers(path: Path, key: str | None) -> tuple[NDArray[np.float64], str]:
    """A whole small array as float64, and the SHA-256 of its values as stored. Raises: UserError
    as `open_array`."""
    tensor = open_array(path, key).map()
    return tensor.double().numpy().copy(), hashlib.sha256(_bytes(tensor)).hexdigest()


def scan(array: StateArray) -> Scan:
    """Read all of `array`, a block at a time."""
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
    """(first row, mapped rows) of one block after another."""
    for first in range(0, array.rows, array.block):
        yield first, array.file.map().view(-1, array.width)[first : first + array.block]


def _constant(values: Tensor) -> NDArray[np.bool_]:
    if values.shape[1] == 1:
        return (values[:, 0] == 0).numpy()
    found = (values[:, 0] == values[:, -1]).numpy()  # seldom, and much less to read
    for row in np.flatnonzero(found):
        found[row] = bool((values[row] == values[row, 0]).all())
    return found


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_npy(path: Path, key: str | None) -> Tensor:
    _refuse_key(path, key)
    # Pages are mapped copy-on-write: torch wants to be able to write, and nothing does.
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    if array.dtype.isnative and array.dtype.kind in "biuf":
        return torch.from_numpy(array)
    raise UserError(
        f"{path} holds {array.dtype.str}: numbers of this machine's byte order can be read: "
        "convert it, or write bfloat16 as .safetensors"
    )


def _read_pt(path: Path, key: str | None) -> Tensor:
    # weights_only: tensors and plain containers alone, no code runs.
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
        raise UserError(f"{path} holds one array: leave its name {quoted(key)} out")


def _chosen(path: Path, key: str | None, names: Mapping[str, object]) -> str:
    if not names:
        raise UserError(f"{path} holds no array: write one into it")
    if key is None and len(names) == 1:
        return next(iter(names))
    if key is None:
        raise UserError(f"{path} holds {listed([*names])}: name one of them by key or gold_key")
    if key not in names:
        raise UserError(f"{path} holds no array {quoted(key)}: {nearest(key, names)}")
    return key


_READERS: dict[str, Callable[[Path, str | None], Tensor]] = {
    ".npy": _read_npy,
    ".pt": _read_pt,
    ".safetensors": _read_safetensors,
}
