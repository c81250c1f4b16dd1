"""Measure the size and reading time of states in several Parquet encodings.

Caches use plain uncompressed pages because of these measurements.
"""

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from embrm.cache.schema import STORAGE, binary_column, vectors_of
from embrm.cache.tensors import to_stored

_ENCODINGS = (
    ("PLAIN", "NONE"),
    ("PLAIN", "ZSTD"),
    ("BYTE_STREAM_SPLIT", "NONE"),
    ("BYTE_STREAM_SPLIT", "ZSTD"),
)
_REPEATS = 5


def measure_encodings(states: NDArray[np.float32] | None = None) -> list[dict[str, Any]]:
    """Size and fastest reading time of each encoding, relative to plain uncompressed pages.

    states: float32 [rows, width], measured as float32 and as bfloat16. None for normally
    distributed values whose scale differs between components, as it does in hidden states.
    Files are kept in memory. All have page checksums, as those of a cache do.
    """
    if states is None:
        random = torch.Generator().manual_seed(0)
        values = torch.randn(20_000, 512, generator=random)
        states = (values * torch.randn(512, generator=random).exp()).numpy()
    rows = []
    for dtype in ("float32", "bfloat16"):
        column = binary_column(to_stored(torch.from_numpy(states).to(getattr(torch, dtype))))
        base: tuple[int, float] | None = None
        for encoding, compression in _ENCODINGS:
            content = _file(column, encoding, compression)
            seconds = min(_seconds(content, STORAGE[dtype]) for _ in range(_REPEATS))
            size, fastest = base = base or (content.size, seconds)
            rows.append(
                {
                    "dtype": dtype,
                    "encoding": encoding.lower(),
                    "compression": compression.lower(),
                    "size": round(content.size / size, 3),
                    "read_time": round(seconds / fastest, 2),
                }
            )
    return rows


def _file(column: pa.FixedSizeBinaryArray, encoding: str, compression: str) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"state": column}),
        sink,
        compression=compression,
        use_dictionary=False,
        column_encoding=encoding,
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue()


def _seconds(content: pa.Buffer, dtype: np.dtype[Any]) -> float:
    """Seconds to read a file in memory into an array."""
    start = time.perf_counter()
    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
    column = file.read(use_threads=False).column(0)
    vectors_of(column, dtype, column.type.byte_width // dtype.itemsize)
    return time.perf_counter() - start
