"""States of responses as training reads them, in memory or mapped from a file larger than it.

A flat file of rows is mapped by every process that trains: they share its pages, and pages that
are let go of can be read again. Nothing a run computes depends on how much stays in memory.
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
"""Blocks whose pairs are shuffled together."""

WINDOW_BYTES = WINDOW_BLOCKS * BLOCK_BYTES
"""States that are best kept in memory at a time."""

_PART_BYTES = 512 << 10

_MAPPED_BYTES = 2 << 20
"""Linux may map this much around a page that is touched."""


class States:
    """[responses, width] in their stored dtype, widened to float32 as they are taken.

    Shapes: rows and row numbers are int64 [n].
    """

    def __init__(self, values: Tensor, mapping: mmap.mmap | None = None, resident: int = 0) -> None:
        """values: the states, on the device that trains. mapping: the file they are mapped from,
        if no more than `resident` bytes of it shall stay in memory."""
        self.values = values
        self._mapping, self._resident = mapping, resident
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._touched = np.zeros(len(mapping) // _MAPPED_BYTES + 2 if mapping else 0, np.bool_)

    @classmethod
    def of_file(
        cls, path: Path, shape: tuple[int, int], dtype: torch.dtype, *, resident: int | None
    ) -> "States":
        """Map a file of rows. resident: bytes of it to keep in memory; None: as many as the system
        lets us."""
        with path.open("rb") as file:
            # Copy on write, because torch wants a buffer it could write to; it never does.
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        values = torch.frombuffer(mapping, dtype=dtype).reshape(shape)
        return cls(values) if resident is None else cls(values, mapping, resident)

    @property
    def width(self) -> int:
        """Components of a state."""
        return self.values.shape[1]

    @property
    def block_rows(self) -> int:
        """Rows of a block: it depends on the states' shape and dtype alone."""
        return max(1, BLOCK_BYTES // self._row_bytes)

    def take(self, rows: Tensor, spare: int = 0) -> Tensor:
        """float32 [n + spare, width], in a buffer that the next call overwrites; what the spare
        rows at its end hold is the caller's affair."""
        rows = rows.to(self.values.device)
        whole = self._buffer(torch.float32, len(rows) + spare)
        wide = whole[: len(rows)]
        # In parts that stay in the processor's cache between being read and being widened.
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
        """Have the system fetch these blocks while others are worked on."""
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
        """Copy rows to `out`; let go of others first when too many pages would be mapped."""
        if self._mapping is not None:
            # What is mapped around a page is aligned in memory, not in the file.
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
