"""What a shard holds, and its one translation to and from Parquet."""

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, PositiveInt, field_validator

from embrm.core.errors import UserError, nearest
from embrm.core.specs import Spec

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Storage types of the states; a vector is its values' little-endian bytes, one after another."""

_VIEW = re.compile(r"last|mean|prenorm|layer:(0|[1-9]\d*)")


@dataclass(frozen=True)
class ShardRows:
    """The responses of one shard, in response order. Every array has one entry a row."""

    first: int
    """Index of the first row among all responses of the cache."""
    response_id: list[str]
    prompt_id: list[str]
    n_prompt: np.ndarray
    """int32, tokens of the prompt."""
    n_response: np.ndarray
    """int32, tokens of the response."""
    truncated: np.ndarray
    """bool, tokens were cut."""
    final_position: np.ndarray
    """int32, position of the final (rightmost non-pad) token, counted from 0."""
    final_token: np.ndarray
    """int32, its token id."""
    S: np.ndarray | None
    """float64, summed log-probability of the response tokens, in nats; None, and NaN in the file,
    where no language model is known."""
    states: dict[str, torch.Tensor]
    """View name → [rows, width] in the cache's dtype."""
    norms: dict[str, torch.Tensor]
    """View name → float32 [rows], Euclidean norm taken before any cast."""


@dataclass(frozen=True)
class TokenRows:
    """Sampled response positions: of one shard when written, of the whole cache when read."""

    response: np.ndarray
    """int32, index of the response among all responses of the cache."""
    position: np.ndarray
    """int32, position whose state predicts `target`, counted from 0."""
    target: np.ndarray
    """int32, token id that follows."""
    target_logit: np.ndarray
    """float32."""
    logsumexp: np.ndarray
    """float32, over the whole vocabulary; log-probability = target_logit - logsumexp."""
    states: torch.Tensor
    """[rows, width] post-norm states in the cache's dtype."""
    top_ids: np.ndarray
    """int32 [rows, k], ids of the k largest logits."""
    top_logits: np.ndarray
    """float32 [rows, k]."""
    tail_means: torch.Tensor | None = None
    """[rows, width] in the cache's dtype: ∂logit/∂state averaged over the tail, every token that is
    neither the target nor among the k largest; zero where the tail's probability is under 1e-6."""


def known_views(views: tuple[str, ...]) -> tuple[str, ...]:
    """`views` as they are. Raises: ValueError for a name that is none."""
    for view in views:
        if not _VIEW.fullmatch(view):
            raise ValueError(f"unknown view {view!r}: valid: last, mean, prenorm, layer:K")
    return views


class Layout(Spec):
    """The shape of every shard of one cache."""

    dtype: str
    """Key of DTYPES."""
    width: PositiveInt
    """Values in a state."""
    views: tuple[str, ...]
    """Sorted names of the stored states: last, mean, prenorm, layer:K."""
    top_k: int | None
    """Logits kept at a sampled position; None where no positions were sampled."""
    tail_mean: bool = Field(default=False, exclude_if=operator.not_)
    """Whether a sampled position has the mean of its tail; not written where it has none, so that
    manifests have the one spelling they had before."""

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, dtype: str) -> str:
        if dtype not in DTYPES:
            raise ValueError(nearest(dtype, DTYPES))
        return dtype

    @field_validator("views")
    @classmethod
    def _known_views(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        return known_views(views)

    @classmethod
    def of(cls, rows: ShardRows, tokens: TokenRows | None) -> "Layout":
        """The layout a shard has. Raises: ValueError when its tensors disagree."""
        tail_means = tokens.tail_means if tokens else None
        tensors = [*rows.states.values(), *([tokens.states] if tokens else [])]
        tensors += [tail_means] if tail_means is not None else []
        shapes = {(str(tensor.dtype).removeprefix("torch."), tensor.shape[1]) for tensor in tensors}
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
            tail_mean=tail_means is not None,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the states."""
        return DTYPES[self.dtype]

    def responses(self) -> pa.Schema:
        """Columns of a response file."""
        return self._schema(
            *_RESPONSE_COLUMNS,
            *((f"norm.{view}", pa.float32()) for view in self.views),
            *((f"state.{view}", self._vector()) for view in self.views),
        )

    def tokens(self) -> pa.Schema:
        """Columns of a token file. With top_k = 0 the two top columns are absent, and without tail
        means theirs."""
        top = pa.binary(4 * (self.top_k or 0))
        return self._schema(
            *_TOKEN_COLUMNS,
            ("state", self._vector()),
            *([("top_ids", top), ("top_logits", top)] if self.top_k else []),
            *([("tail_mean", self._vector())] if self.tail_mean else []),
        )

    def _vector(self) -> pa.DataType:
        return pa.binary(self.width * self.torch_dtype.itemsize)

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
"""Columns of a response file beside its states and norms."""
TOKEN_SCALARS = [name for name, _ in _TOKEN_COLUMNS]
"""Columns of a token file beside its states, top logits and tail means."""


def responses_table(rows: ShardRows, layout: Layout) -> pa.Table:
    """One row a response. Raises: pyarrow.ArrowInvalid when columns differ in length."""
    columns = [getattr(rows, name) for name in RESPONSE_SCALARS]
    if rows.S is None:
        columns[RESPONSE_SCALARS.index("S")] = np.full(len(rows.response_id), np.nan)
    columns += [rows.norms[view].numpy(force=True) for view in layout.views]
    columns += [encode(rows.states[view]) for view in layout.views]
    return _table(columns, layout.responses())


def tokens_table(tokens: TokenRows, layout: Layout) -> pa.Table:
    """One row a sampled position. Raises: pyarrow.ArrowInvalid when columns differ in length."""
    columns = [getattr(tokens, name) for name in TOKEN_SCALARS]
    columns.append(encode(tokens.states))
    if layout.top_k:
        columns.append(encode(torch.from_numpy(tokens.top_ids.astype(np.int32, copy=False))))
        columns.append(encode(torch.from_numpy(tokens.top_logits.astype(np.float32, copy=False))))
    if tokens.tail_means is not None:
        columns.append(encode(tokens.tail_means))
    return _table(columns, layout.tokens())


def _table(columns: list, schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def encode(vectors: torch.Tensor) -> pa.FixedSizeBinaryArray:
    """[rows, width] of any dtype → one fixed-size binary value a row, without a copy on CPU."""
    rows, width = vectors.shape
    # Flat, for torch gives no bytes view of a matrix without rows.
    raw = vectors.detach().cpu().flatten().view(torch.uint8).numpy()
    kind = pa.binary(width * vectors.element_size())
    return pa.FixedSizeBinaryArray.from_buffers(kind, rows, [None, pa.py_buffer(raw)])


def decode(column: pa.ChunkedArray, dtype: torch.dtype, width: int) -> torch.Tensor:
    """A fixed-size binary column → [rows, width], one copy."""
    out = torch.empty(len(column), width, dtype=dtype)
    target = out.view(torch.uint8).numpy()
    size = target.shape[1]
    first = 0
    for chunk in column.chunks:
        raw = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size)
        target[first : first + len(chunk)] = raw.reshape(len(chunk), size)
        first += len(chunk)
    return out


def to_parquet(table: pa.Table, sink: Any) -> None:
    """Write a Parquet file of one row group to a stream; equal tables give equal bytes.

    Vectors are plain uncompressed pages: states hardly compress, and plain pages read at memory
    speed. Every page carries a CRC, so a reader proves just the columns it reads.
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
    """Named columns of a shard, their pages' checksums verified.

    Raises: UserError when the file is missing, damaged, or has other columns than the schema.
    """
    try:
        with pa.memory_map(str(path)) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            table = file.read(columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, str(error).splitlines()[0]) from None
    # No checksum covers a file's footer, and what reads the table next trusts its metadata.
    expected = pa.schema([layout_schema.field(name) for name in columns], layout_schema.metadata)
    if not table.schema.equals(expected, check_metadata=True):
        raise damaged(path, "its columns are not those the manifest announces")
    return table


def damaged(path: Path, problem: str) -> UserError:
    """The error for a cache file that cannot be what the writer wrote."""
    return UserError(
        f"{path} is damaged ({problem}): delete it and run the command that made it again"
    )
