"""The rows of one shard as numpy arrays, and their conversion to and from Parquet.

Nothing here needs torch. numpy has no bfloat16, so a bfloat16 vector is stored as uint16: its bits,
which are the upper half of a float32. `embrm.cache.tensors` gives the same memory as torch tensors.
"""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, field_validator

from embrm.core.errors import UserError, nearest
from embrm.core.specs import Spec

Stored = NDArray[Any]
"""Vectors [rows, width] as they are stored: float32, float16, or uint16 for bfloat16 bits."""

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
}
"""Name of a storage type → the numpy type that holds its bytes."""

_LARGEST_FINITE = {"float32": 0x7F7FFFFF, "bfloat16": 0x7F7F, "float16": 0x7BFF}
"""Bit pattern of the largest finite number; those of infinity and NaN are greater."""

_VIEW = re.compile(r"last|mean|prenorm|layer:(0|[1-9]\d*)")


@dataclass(frozen=True)
class ShardRows:
    """The responses of one shard, in response order. Every array has one entry per response."""

    first: int
    """Index of the first row among all responses of the cache."""
    response_id: list[str]
    prompt_id: list[str]
    n_prompt: NDArray[np.int32]
    """Tokens of the prompt."""
    n_response: NDArray[np.int32]
    """Tokens of the response."""
    truncated: NDArray[np.bool_]
    """Whether tokens were cut to fit the maximum length."""
    final_position: NDArray[np.int32]
    """Position of the rightmost token that is not padding, counted from 0."""
    final_token: NDArray[np.int32]
    """Token id at the final position."""
    S: NDArray[np.float64] | None
    """Summed log-probability of the response tokens, in nats. None, stored as NaN, for adopted
    states, whose language model is unknown."""
    states: dict[str, Stored]
    """View name → states [rows, width]."""
    norms: dict[str, NDArray[np.float32]]
    """View name → Euclidean norms [rows], taken before the states were cast to the storage type."""


Column = TypeVar("Column")
Other = TypeVar("Other")


@dataclass(frozen=True)
class TokenRows(Generic[Column]):
    """Token rows: sampled positions of responses, of a batch, a shard or a whole cache.

    Its fields are the columns of a shard's file of token rows, under the same names. They are
    numpy arrays (`TokenRows[Stored]`), or tensors where an engine computes them.
    """

    response: Column
    """Index of the response among all of the cache (of a batch: among its requests), int32 [rows].
    """
    position: Column
    """Position whose state predicts `target`, counted from 0, int32 [rows]."""
    target: Column
    """Token id that follows the position, int32 [rows]."""
    target_logit: Column
    """Logit of the target, float32 [rows]."""
    logsumexp: Column
    """Over the whole vocabulary, float32 [rows]; log-probability = target_logit - logsumexp."""
    state: Column
    """States after the final norm, [rows, width]."""
    top_ids: Column
    """Token ids of the k largest logits, int32 [rows, k]."""
    top_logits: Column
    """The k largest logits, descending, float32 [rows, k]."""
    tail_mean: Column | None = None
    """Mean of ∂logit/∂state over the tail, [rows, width]: every token that is neither the target
    nor among the k largest, weighted by its probability. Zero where the tail's probability is under
    1e-6. None where the cache has none."""

    def columns(self) -> dict[str, Column]:
        """The columns by name, without `tail_mean` if it is None."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in found.items() if column is not None}

    def map(self, change: Callable[[Column], Other]) -> "TokenRows[Other]":
        """A table with `change` applied to each column."""
        return TokenRows(**{name: change(column) for name, column in self.columns().items()})

    def take(self: "TokenRows[Stored]", rows: NDArray[Any]) -> "TokenRows[Stored]":
        """Select rows by their numbers, or by a mask, bool [rows]."""
        return self.map(lambda column: column[rows])

    @staticmethod
    def joined(parts: "Sequence[TokenRows[Stored]]") -> "TokenRows[Stored]":
        """Concatenate tables; either all have tail means or none."""
        columns = [part.columns() for part in parts]
        return TokenRows(
            **{name: np.concatenate([own[name] for own in columns]) for name in columns[0]}
        )


def known_views(views: tuple[str, ...]) -> tuple[str, ...]:
    """Return `views` unchanged. Raises: ValueError for a name that is not a view."""
    for view in views:
        if not _VIEW.fullmatch(view):
            raise ValueError(f"unknown view {view!r}: valid: last, mean, prenorm, layer:K")
    return views


class ShardLayout(Spec):
    """The columns that every shard of one cache has."""

    dtype: str
    """Storage type of the states, a key of STORAGE."""
    width: PositiveInt
    """Components of a state."""
    views: tuple[str, ...]
    """Sorted names of the stored states: last, mean, prenorm, layer:K."""
    top_k: int | None
    """Largest logits that are kept of a token row; None in a cache without token rows."""
    tail_mean: bool = Field(default=False, exclude_if=operator.not_)
    """Whether token rows have tail means. Serialized only when true, so that manifests of
    older caches, which have none, keep their bytes."""

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, dtype: str) -> str:
        if dtype not in STORAGE:
            raise ValueError(nearest(dtype, STORAGE))
        return dtype

    @field_validator("views")
    @classmethod
    def _known_views(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        return known_views(views)

    @classmethod
    def of(cls, rows: ShardRows, tokens: TokenRows[Stored] | None) -> "ShardLayout":
        """The layout of one shard.

        Raises: ValueError when its vectors differ in type or width, or a norm is missing.
        """
        vectors = [*rows.states.values()]
        if tokens:
            vectors += [tokens.state]
            vectors += [] if tokens.tail_mean is None else [tokens.tail_mean]
        shapes = {(storage_name(array), array.shape[1]) for array in vectors}
        if len(shapes) != 1 or rows.states.keys() != rows.norms.keys():
            raise ValueError(
                f"states of one shard differ: {sorted(shapes)}, norms: {[*rows.norms]}"
            )
        [(dtype, width)] = shapes
        return cls(
            dtype=dtype,
            width=width,
            views=tuple(sorted(rows.states)),
            top_k=tokens.top_ids.shape[1] if tokens else None,
            tail_mean=bool(tokens and tokens.tail_mean is not None),
        )

    @property
    def has_token_rows(self) -> bool:
        """Whether the cache has token rows; with top_k = 0 they hold no logits."""
        return self.top_k is not None

    @property
    def storage(self) -> np.dtype[Any]:
        """The numpy type that holds a component of a state."""
        return STORAGE[self.dtype]

    def responses(self) -> pa.Schema:
        """Columns of a file of responses."""
        return self._schema(
            *_RESPONSE_COLUMNS,
            *((f"norm.{view}", pa.float32()) for view in self.views),
            *((f"state.{view}", self._vector()) for view in self.views),
        )

    def tokens(self) -> pa.Schema:
        """Columns of a file of token rows. `top_ids` and `top_logits` are absent when top_k = 0."""
        vectors = self.token_vectors().items()
        return self._schema(
            *_TOKEN_COLUMNS,
            *((name, pa.binary(kind.itemsize * size)) for name, (kind, size) in vectors if size),
        )

    def token_vectors(self) -> dict[str, tuple[np.dtype[Any], int]]:
        """The columns of `TokenRows` that hold a vector per row → type and number of components."""
        state, k = (self.storage, self.width), self.top_k or 0
        vectors = {
            "state": state,
            "top_ids": (np.dtype("<i4"), k),
            "top_logits": (np.dtype("<f4"), k),
            "tail_mean": state,
        }
        return {name: of for name, of in vectors.items() if self.tail_mean or name != "tail_mean"}

    def _vector(self) -> pa.DataType:
        return pa.binary(self.width * self.storage.itemsize)

    def _schema(self, *columns: tuple[str, pa.DataType]) -> pa.Schema:
        fields = [pa.field(name, kind, nullable=False) for name, kind in columns]
        return pa.schema(fields, {"dtype": self.dtype, "width": str(self.width)})


_RESPONSE_COLUMNS = (
    ("response_id", pa.string()),
    ("prompt_id", pa.string()),
    ("n_prompt", pa.int32()),
    ("n_response", pa.int32()),
    ("truncated", pa.bool_()),
    ("final_position", pa.int32()),
    ("final_token", pa.int32()),
    ("S", pa.float64()),
)
_TOKEN_COLUMNS = (
    ("response", pa.int32()),
    ("position", pa.int32()),
    ("target", pa.int32()),
    ("target_logit", pa.float32()),
    ("logsumexp", pa.float32()),
)
RESPONSE_SCALARS = [name for name, _ in _RESPONSE_COLUMNS]
"""Columns with one value per row that every file of responses has."""
TOKEN_SCALARS = [name for name, _ in _TOKEN_COLUMNS]
"""Columns with one value per row that every file of token rows has."""


def responses_table(rows: ShardRows, layout: ShardLayout) -> pa.Table:
    """One row per response. Raises: pyarrow.ArrowInvalid when columns differ in length."""
    columns = [getattr(rows, name) for name in RESPONSE_SCALARS]
    if rows.S is None:
        columns[RESPONSE_SCALARS.index("S")] = np.full(len(rows.response_id), np.nan)
    columns += [rows.norms[view] for view in layout.views]
    columns += [rows.states[view] for view in layout.views]
    return _table(columns, layout.responses())


def tokens_table(tokens: TokenRows[Stored], layout: ShardLayout) -> pa.Table:
    """One row per token row. Raises: pyarrow.ArrowInvalid when columns differ in length."""
    schema, columns = layout.tokens(), tokens.columns()
    return _table([columns[name] for name in schema.names], schema)


def _table(columns: list, schema: pa.Schema) -> pa.Table:
    arrays = [
        binary_column(column)
        if pa.types.is_fixed_size_binary(field.type)
        else pa.array(column, field.type)
        for column, field in zip(columns, schema, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def storage_name(vectors: Stored) -> str:
    """The name in STORAGE of the vectors' type, or numpy's name of a type that is not stored."""
    names = (name for name, kind in STORAGE.items() if kind == vectors.dtype)
    return next(names, vectors.dtype.name)


def binary_column(vectors: NDArray[Any]) -> pa.FixedSizeBinaryArray:
    """[rows, width] of any type → one fixed-size binary value per row, without a copy if the array
    is contiguous."""
    rows, width = vectors.shape
    raw = np.ascontiguousarray(vectors).reshape(-1).view(np.uint8)
    kind = pa.binary(width * vectors.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(kind, rows, [None, pa.py_buffer(raw)])


def vectors_of(column: pa.ChunkedArray, dtype: np.dtype[Any], width: int) -> NDArray[Any]:
    """A fixed-size binary column → a copy as an array [rows, width]."""
    out = np.empty((len(column), width), dtype)
    size = width * out.itemsize
    target = out.view(np.uint8)
    first = 0
    for chunk in column.chunks:
        raw = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size)
        target[first : first + len(chunk)] = raw.reshape(len(chunk), size)
        first += len(chunk)
    return out


def all_finite(vectors: Stored) -> bool:
    """Whether no component is NaN or infinite, without a copy of the vectors."""
    if not vectors.size:
        return True
    largest, bits = _LARGEST_FINITE[storage_name(vectors)], 8 * vectors.itemsize
    # A float is a sign and a magnitude. Read as a signed integer, the maximum is the largest
    # positive magnitude; read as unsigned, it is the largest negative one, if there is any.
    positive = int(vectors.view(f"<i{vectors.itemsize}").max())
    negative = int(vectors.view(f"<u{vectors.itemsize}").max()) - (1 << (bits - 1))
    return positive <= largest and negative <= largest


def widened(vectors: Stored) -> NDArray[np.float32]:
    """The vectors as float32, which holds every bfloat16 and float16 number exactly."""
    if vectors.dtype != STORAGE["bfloat16"]:
        return vectors.astype(np.float32, copy=False)
    wide = vectors.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def to_parquet(table: pa.Table, sink: Any) -> None:
    """Write a Parquet file of one row group to a stream; equal tables give equal bytes.

    Vectors are plain uncompressed pages, because states hardly compress and plain pages are read at
    memory speed. Every page carries a CRC, so that a reader checks just the columns it reads.
    """
    names = table.column_names
    vectors = {f.name for f in table.schema if pa.types.is_fixed_size_binary(f.type)}
    pq.write_table(
        table,
        sink,
        row_group_size=max(table.num_rows, 1),
        compression={name: "NONE" if name in vectors else "ZSTD" for name in names},
        use_dictionary=[name for name in names if name not in vectors],
        write_statistics=[name for name in names if name not in vectors],
        write_page_checksum=True,
    )


def from_parquet(path: Path, columns: Sequence[str], layout_schema: pa.Schema) -> pa.Table:
    """Read the named columns of a shard, and verify the checksums of their pages.

    Raises: UserError when the file is missing, damaged, or has other columns than the schema.
    """
    if not path.is_file():
        raise missing(path)
    try:
        with pa.memory_map(str(path)) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            table = file.read(columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, str(error).splitlines()[0]) from None
    # No checksum covers a file's footer, and code that reads the table trusts its metadata.
    expected = pa.schema([layout_schema.field(name) for name in columns], layout_schema.metadata)
    if not table.schema.equals(expected, check_metadata=True):
        raise damaged(path, "its columns are not those of the manifest")
    return table


def missing(path: Path) -> UserError:
    """The error for a cache file that is not there."""
    return UserError(f"{path} is missing: run the command that made it again")


def damaged(path: Path, problem: str) -> UserError:
    """The error for a cache file whose content is not what the writer wrote."""
    return UserError(
        f"{path} is damaged ({problem}): delete it and run the command that made it again"
    )
