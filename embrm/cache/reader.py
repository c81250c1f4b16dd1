"""Reads a finished cache, without torch.

All content is checked when it is read: sizes, checksums, row counts, and that vectors are finite.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from embrm.cache.manifest import (
    LM_HEAD,
    FileEntry,
    Manifest,
    read_manifest,
    responses_file,
    table_file,
    tokens_file,
)
from embrm.cache.schema import (
    RESPONSE_SCALARS,
    TOKEN_SCALARS,
    ShardLayout,
    Stored,
    TokenRows,
    all_finite,
    damaged,
    from_parquet,
    missing,
    vectors_of,
    widened,
)
from embrm.core.errors import UserError, nearest
from embrm.core.files import sha256


@dataclass(frozen=True, eq=False, repr=False)
class Cache:
    """A complete cache. Open it with `open_cache`; there is nothing to close.

    Every read raises UserError when a file is missing or damaged.
    """

    folder: Path
    manifest: Manifest
    layout: ShardLayout

    @property
    def cache_id(self) -> str:
        """Digest of everything that determines the content."""
        return self.manifest.cache_id

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the content: model, tokenizer, template, dtype, views, data and so on."""
        return self.manifest.identity

    def __repr__(self) -> str:
        return (
            f"Cache({str(self.folder)!r}: {self.manifest.n_responses:,} responses, "
            f"{self.manifest.tables['pairs'].rows:,} pairs, views {', '.join(self.views)}, "
            f"{self.dtype} [{self.width}], id {self.cache_id})"
        )

    @property
    def dtype(self) -> str:
        """Storage type of the states: float32, bfloat16 or float16."""
        return self.layout.dtype

    @property
    def width(self) -> int:
        """Length of a state vector."""
        return self.layout.width

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the stored views, sorted: the arguments of `states`."""
        return self.layout.views

    @cached_property
    def pairs(self) -> pl.DataFrame:
        """Preference pairs; `chosen` and `rejected` are rows of `responses` and `states`."""
        return self._table("pairs")

    @cached_property
    def members(self) -> pl.DataFrame:
        """Responses of groups with their gold scores; `response` is a row of `responses`."""
        return self._table("members")

    @property
    def groups(self) -> pl.DataFrame:
        """One row per prompt whose responses have gold scores: split, subset, prompt_id, and the
        lists `response` (rows of `responses`), `model` and `gold`."""
        keys = ("split", "subset", "prompt_id")
        return self.members.group_by(keys, maintain_order=True).agg("response", "model", "gold")

    @cached_property
    def exclusions(self) -> pl.DataFrame:
        """Rows, pairs and members that were left out, with the reason."""
        return self._table("exclusions")

    @cached_property
    def leaks(self) -> pl.DataFrame:
        """Evaluation prompts that also occur in training."""
        return self._table("leaks")

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have pairs or members, sorted."""
        return sorted({*self.pairs["split"], *self.members["split"]})

    @cached_property
    def responses(self) -> pl.DataFrame:
        """One row per response: ids, token counts, final token, S, and `norm.<view>` per view."""
        columns = [*RESPONSE_SCALARS, *(f"norm.{view}" for view in self.views)]
        return _frame(pa.concat_tables(self._read_responses(columns)))

    @cached_property
    def n_response(self) -> NDArray[np.int32]:
        """Number of tokens of each response, int32 [responses]; reads only that column."""
        parts = self._read_responses(["n_response"])
        return np.concatenate([part.column(0).to_numpy() for part in parts])

    @cached_property
    def n_token_rows(self) -> NDArray[np.int64]:
        """Number of token rows of each response, int64 [responses]; reads one column."""
        schema, count = self.layout.tokens(), self.manifest.n_responses
        owners = [
            self._read(tokens_file(index), shard.tokens, ["response"], schema)["response"]
            for index, shard in enumerate(self.manifest.shards)
            if shard and shard.tokens
        ]
        return sum((np.bincount(own, minlength=count) for own in owners), np.zeros(count, np.int64))

    def states(self, view: str) -> NDArray[np.float32]:
        """The states of one view, float32 [responses, width]; 16-bit states are widened exactly.

        Raises: UserError for a view that is not stored, or a state that is not finite.
        """
        return widened(self.stored_states(view))

    def stored_states(self, view: str) -> Stored:
        """The states of one view as they are stored, [responses, width]. Raises: as `states`."""
        out = np.empty((self.manifest.n_responses, self.width), self.layout.storage)
        first = 0
        for part in self.stored_shards(view):
            out[first : first + len(part)] = part
            first += len(part)
        return out

    def stored_shards(self, view: str) -> Iterator[Stored]:
        """Yield `stored_states` shard by shard, for a cache that is larger than memory."""
        if view not in self.views:
            raise UserError(f"view {view!r} is not in {self.folder}: {nearest(view, self.views)}")
        for index, table in enumerate(self._read_responses([f"state.{view}"])):
            yield self._vectors(table.column(0), responses_file(index))

    @cached_property
    def tokens(self) -> pl.DataFrame:
        """One line per token row: response, position, target, target_logit, logsumexp and, if
        logits were stored, `top_ids` and `top_logits`, arrays of k values.

        Raises: UserError when the cache has no token rows.
        """
        columns = self.token_rows().columns()
        names = [*TOKEN_SCALARS, *(("top_ids", "top_logits") if self.layout.top_k else ())]
        return pl.DataFrame({name: columns[name] for name in names})

    def token_rows(self) -> TokenRows[Stored]:
        """All token rows with their states, logits and tail means.

        Raises: UserError when the cache has no token rows.
        """
        return TokenRows.joined([*self.token_shards()])

    def token_shards(self) -> Iterator[TokenRows[Stored]]:
        """Yield `token_rows` shard by shard."""
        if not self.layout.has_token_rows:
            raise UserError(
                f"{self.folder} has no token rows: extract with token_rows = 8 (--token-rows 8) "
                "into another folder"
            )
        for index, shard in enumerate(self.manifest.shards):
            assert shard is not None  # open_cache refuses an incomplete cache
            assert shard.tokens is not None  # the layout has tokens, so every shard has
            yield self._token_shard(tokens_file(index), shard.tokens)

    def _token_shard(self, name: str, entry: FileEntry) -> TokenRows[Stored]:
        schema = self.layout.tokens()
        table = self._read(name, entry, schema.names, schema)
        columns: dict[str, Stored] = {own: table[own].to_numpy() for own in TOKEN_SCALARS}
        for own, (dtype, width) in self.layout.token_vectors().items():
            if width:
                columns[own] = vectors_of(table[own], dtype, width)
            else:  # a cache with top_k = 0, whose file lacks the column
                columns[own] = np.empty((table.num_rows, 0), dtype)
        self._check_finite(columns["state"], name)
        if "tail_mean" in columns:
            self._check_finite(columns["tail_mean"], name)
        return TokenRows(**columns)

    @cached_property
    def vocabulary(self) -> int:
        """Vocabulary size of the LM head, 0 without a head; reads only the header of its file."""
        path, entry = self.folder / LM_HEAD, self.manifest.lm_head
        assert entry is not None  # open_cache refuses an incomplete cache
        problem = wrong_size(path, entry)
        if problem:
            raise problem
        try:
            with safe_open(path, "np") as file:
                names = file.keys()
                return file.get_slice("weight").get_shape()[0] if "weight" in names else 0
        except SafetensorError as error:
            raise damaged(path, str(error)) from None

    def lm_head_bytes(self) -> bytes:
        """The safetensors file of the LM head; `embrm.cache.tensors` makes tensors of it."""
        entry = self.manifest.lm_head
        assert entry is not None  # open_cache refuses an incomplete cache
        return self._checked(LM_HEAD, entry)

    def _table(self, name: str) -> pl.DataFrame:
        content = self._checked(table_file(name), self.manifest.tables[name])
        return _frame(pq.read_table(pa.BufferReader(content)))

    def _checked(self, name: str, entry: FileEntry) -> bytes:
        """The content of a file, checked against its recorded digest."""
        path = self.folder / name
        if problem := wrong_size(path, entry):
            raise problem
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): check the path and its permissions"
            ) from None
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise _wrong_digest(path)
        return content

    def _read_responses(self, columns: list[str]) -> Iterator[pa.Table]:
        schema = self.layout.responses()
        for index, shard in enumerate(self.manifest.shards):
            assert shard is not None  # open_cache refuses an incomplete cache
            yield self._read(responses_file(index), shard.responses, columns, schema)

    def _read(self, name: str, entry: FileEntry, columns: list[str], schema: pa.Schema) -> pa.Table:
        table = from_parquet(self.folder / name, columns, schema)
        if table.num_rows != entry.rows:
            raise damaged(self.folder / name, f"{table.num_rows} rows instead of {entry.rows}")
        return table

    def _vectors(self, column: pa.ChunkedArray, name: str) -> Stored:
        vectors = vectors_of(column, self.layout.storage, self.width)
        self._check_finite(vectors, name)
        return vectors

    def _check_finite(self, vectors: Stored, name: str) -> None:
        if not all_finite(vectors):
            raise damaged(self.folder / name, "a vector is NaN or infinite")


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)  # a table never gives a Series
    return frame


def open_cache(folder: Path) -> Cache:
    """Open a complete cache. File sizes are checked now, contents when they are read.

    Raises: UserError when there is none, or it is incomplete, damaged or from a newer version.
    """
    manifest = read_manifest(folder)
    if not manifest.complete or manifest.layout is None:
        raise incomplete(folder, manifest)
    for name, entry in manifest.files().items():
        problem = wrong_size(folder / name, entry)
        if problem:
            raise problem
    return Cache(folder, manifest, manifest.layout)


def incomplete(folder: Path, manifest: Manifest) -> UserError:
    """The error for a cache that is not finished, or only a part of one."""
    done = f"{len(manifest.done)} of {len(manifest.share)} shards are finished"
    if manifest.part is None:
        return UserError(f"{folder} is incomplete ({done}): run the command that made it again")
    first = "" if manifest.finished else "run the command that made it again, then "
    return UserError(
        f"{folder} is only part {manifest.part.name} of a cache ({done}): {first}join all "
        f"{manifest.part.count} with embrm cache merge PART... --out FOLDER"
    )


def wrong_size(path: Path, entry: FileEntry) -> UserError | None:
    """The error for a file that is missing or has another size than recorded, else None."""
    if not path.is_file():
        return missing(path)
    size = path.stat().st_size
    return None if size == entry.bytes else damaged(path, f"{size} bytes instead of {entry.bytes}")


def wrong_bytes(path: Path, entry: FileEntry) -> UserError | None:
    """The error for a file whose bytes are not the recorded ones; None if they are."""
    problem = wrong_size(path, entry)
    if problem is None and sha256(path) != entry.sha256:
        return _wrong_digest(path)
    return problem


def _wrong_digest(path: Path) -> UserError:
    return damaged(path, "its SHA-256 is not the recorded one")
