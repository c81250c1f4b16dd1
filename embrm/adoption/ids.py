"""Ids of prompts, responses and pairs: 64-bit hashes, computed for a whole column at once."""

import hashlib
from collections.abc import Iterable

import numpy as np
import polars as pl
from numpy.typing import NDArray

Ids = NDArray[np.uint64]


def text_ids(texts: Iterable[str]) -> Ids:
    """The id of each text: its 64-bit BLAKE2b hash."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def combined_ids(ids: Ids, others: NDArray[np.integer]) -> Ids:
    """Combine ids with other numbers, elementwise, by SplitMix64 (Steele et al. 2014).

    Not symmetric: combined_ids(a, b) and combined_ids(b, a) differ.
    """
    x = ids ^ (others.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))  # modulo 2**64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hex_ids(ids: Ids) -> pl.Series:
    """The ids as text, 16 hex digits each."""
    raw = pl.Series(ids.astype(">u8").view(np.uint8).reshape(-1, 8))
    return raw.cast(pl.List(pl.UInt8)).cast(pl.Binary).bin.encode("hex")
