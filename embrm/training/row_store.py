"""Matrices that training reads by rows: states, token rows and LM-head weights.

They are in memory, or mapped from a file that may be larger than memory. All processes that train
map the same flat file of rows and share its pages; released pages are read again when needed. No
result depends on how much of the file stays in memory.
"""

import mmap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 8 << 20
"""States are shuffled and read ahead in blocks of about this size."""

WINDOW_BLOCKS = 16
"""Number of blocks whose pairs are shuffled together."""

WINDOW_BYTES = WINDOW_BLOCKS * BLOCK_BYTES
"""Bytes of a window: reading is fastest if so much of the states stays in memory."""

_PART_BYTES = 512 << 10

_MAPPED_BYTES = 2 << 20
"""Linux may map this many bytes around a page when it is first read."""


class RowStore:
    """A matrix [rows, width] in its stored dtype, of which rows are taken as float32.

    Arguments called rows are row numbers, int64 [n].
    """

    def __init__(self, values: Tensor, mapping: mmap.mmap | None = None, resident: int = 0) -> None:
        """values: the matrix, on the device that reads it. mapping: the file that they are mapped
        from, if at most `resident` bytes of it may stay in memory."""
        self.values = values
        self._mapping, self._resident = mapping, resident
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._touched = np.zeros(len(mapping) // _MAPPED_BYTES + 2 if mapping else 0, np.bool_)

    @classmethod
    def of_file(
        cls, path: Path, shape: tuple[int, int], dtype: torch.dtype, *, resident: int | None
    ) -> "RowStore":
        """Map a file of rows. resident: the bytes of it that may stay in memory; None: no limit."""
        with path.open("rb") as file:
            # Copy on write, because torch wants a writable buffer; nothing is written to it.
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        values = torch.frombuffer(mapping, dtype=dtype).reshape(shape)
        return cls(values) if resident is None else cls(values, mapping, resident)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.values.shape[1]

    @property
    def block_rows(self) -> int:
        """Number of rows in a block; it depends on the shape and dtype of the matrix alone."""
        return max(1, BLOCK_BYTES // self._row_bytes)

    def take(self, rows: Tensor, spare: int = 0) -> Tensor:
        """Read rows into float32 [n + spare, width], a buffer that the next call overwrites.

        The last `spare` rows are uninitialised, for the caller to fill.
        """
        rows = rows.to(self.values.device)
        whole = self._buffer(torch.float32, len(rows) + spare)
        wide = whole[: len(rows)]
        # In parts that stay in the processor's cache until they are converted.
        size = max(1, _PART_BYTES // self._row_bytes) if rows.device.type == "cpu" else len(rows)
        for some, part in zip(rows.split(size), wide.split(size), strict=True):
            if self.values.dtype == torch.float32:
                self._read(some, part)
            else:
                narrow = self._buffer(self.values.dtype, len(some))
                self._read(some, narrow)
                part.copy_(narrow)
        return whole

    def read_ahead(self, blocks: Iterable[int]) -> None:
        """Ask the system to load these blocks in the background."""
        if self._mapping is not None:
            size = self.block_rows * self._row_bytes
            for block in blocks:
                first = block * size // mmap.PAGESIZE * mmap.PAGESIZE
                end = min((block + 1) * size, len(self._mapping))
                self._mapping.madvise(mmap.MADV_WILLNEED, first, end - first)

    def release_pages(self) -> None:
        """Return the pages used so far to the system; they are read again when needed."""
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)
            self._touched[:] = False

    @property
    def _row_bytes(self) -> int:
        return self.width * self.values.element_size()

    def _read(self, rows: Tensor, out: Tensor) -> None:
        """Copy rows to `out`; first release the mapped pages if they would become too many."""
        if self._mapping is not None:
            # Linux aligns what it maps around a page in memory, not in the file.
            start = self.values.data_ptr() % _MAPPED_BYTES + rows.numpy() * self._row_bytes
            end = start + self._row_bytes - 1
            wanted = np.unique([start // _MAPPED_BYTES, end // _MAPPED_BYTES])
            allowed = max(1, self._resident // _MAPPED_BYTES)
            if len(wanted) > allowed and len(rows) > 1:
                half = len(rows) // 2
                self._read(rows[:half], out[:half])
                self._read(rows[half:], out[half:])
                return
            new = len(wanted) - np.count_nonzero(self._touched[wanted])
            if np.count_nonzero(self._touched) + new > allowed:
                self.release_pages()
            self._touched[wanted] = True
        torch.index_select(self.values, 0, rows, out=out)

    def _buffer(self, dtype: torch.dtype, rows: int) -> Tensor:
        buffer = self._buffers.get(dtype)
        if buffer is None or len(buffer) < rows:
            buffer = torch.empty(rows, self.width, dtype=dtype, device=self.values.device)
            self._buffers[dtype] = buffer
        return buffer[:rows]
