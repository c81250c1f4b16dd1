"""Why states are stored plain: what other encodings of the same column save and cost."""

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

    states: float32 [rows, width], stored as float32 and as bfloat16. Without them, normal values
    whose scale differs between dimensions, as that of hidden states does. Nothing is written to
    disk; all encodings carry page checksums, as a cache does.
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
    """Time from a file in memory to an array."""
    start = time.perf_counter()
    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
    column = file.read(use_threads=False).column(0)
    vectors_of(column, dtype, column.type.byte_width // dtype.itemsize)
    return time.perf_counter() - start
