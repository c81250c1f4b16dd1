"""Reading a finished cache. What is read is proven first: sizes, checksums, row counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
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
    Layout,
    TokenRows,
    damaged,
    decode,
    from_parquet,
)
from embrm.core.errors import UserError, nearest
from embrm.core.files import sha256


@dataclass(frozen=True, eq=False)
class Cache:
    """A complete cache. Open it with `open_cache`.

    Every read raises UserError when a file is missing or damaged.
    """

    folder: Path
    manifest: Manifest
    layout: Layout

    @property
    def cache_id(self) -> str:
        """Digest of everything that defines the content."""
        return self.manifest.cache_id

    @property
    def dtype(self) -> str:
        """Storage type of the states: float32, bfloat16 or float16."""
        return self.layout.dtype

    @property
    def width(self) -> int:
        """Values in a state."""
        return self.layout.width

    @property
    def views(self) -> tuple[str, ...]:
        """Names that `states` takes, sorted."""
        return self.layout.views

    @cached_property
    def pairs(self) -> pl.DataFrame:
        """Preference pairs; `chosen` and `rejected` are rows of `responses` and `states`."""
        return self._table("pairs")

    @cached_property
    def members(self) -> pl.DataFrame:
        """Responses of groups with their gold scores; `response` is a row of `responses`."""
        return self._table("members")

    @cached_property
    def exclusions(self) -> pl.DataFrame:
        """Source rows left out, with the reason."""
        return self._table("exclusions")

    @cached_property
    def leaks(self) -> pl.DataFrame:
        """Evaluation prompts that occur in training."""
        return self._table("leaks")

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have pairs or members, sorted."""
        return sorted({*self.pairs["split"], *self.members["split"]})

    @cached_property
    def responses(self) -> pl.DataFrame:
        """One row a response: ids, token counts, final token, S, and `norm.<view>` of each view."""
        columns = [*RESPONSE_SCALARS, *(f"norm.{view}" for view in self.views)]
        frame = pl.from_arrow(pa.concat_tables(self._read_responses(columns)))
        assert isinstance(frame, pl.DataFrame)  # a table never gives a Series
        return frame

    @cached_property
    def n_response(self) -> NDArray[np.int32]:
        """Tokens of every response, int32 [responses]: `responses` without the rest."""
        parts = self._read_responses(["n_response"])
        return np.concatenate([part.column(0).to_numpy() for part in parts])

    @cached_property
    def n_token_rows(self) -> NDArray[np.int64]:
        """Sampled positions of every response, int64 [responses]: `token_rows` without the rest."""
        schema, count = self.layout.tokens(), self.manifest.n_responses
        owners = [
            self._read(tokens_file(index), shard.tokens, ["response"], schema)["response"]
            for index, shard in enumerate(self.manifest.shards)
            if shard and shard.tokens
        ]
        return sum((np.bincount(own, minlength=count) for own in owners), np.zeros(count, np.int64))

    def states(self, view: str) -> torch.Tensor:
        """The states of one view, [responses, width] in the cache's dtype.

        Raises: UserError for a view that is not stored, or a state that is not finite.
        """
        out = torch.empty(self.manifest.n_responses, self.width, dtype=self.layout.torch_dtype)
        first = 0
        for part in self.state_shards(view):
            out[first : first + len(part)] = part
            first += len(part)
        return out

    def state_shards(self, view: str) -> Iterator[torch.Tensor]:
        """`states`, one shard at a time: for a cache larger than memory."""
        if view not in self.views:
            raise UserError(f"view {view!r} is not in {self.folder}: {nearest(view, self.views)}")
        for index, table in enumerate(self._read_responses([f"state.{view}"])):
            yield self._decode_vectors(table.column(0), responses_file(index))

    def token_rows(self) -> TokenRows:
        """All sampled response positions. Raises: UserError when none were sampled."""
        shards = [*self.token_shards()]
        columns = {
            name: np.concatenate([getattr(shard, name) for shard in shards])
            for name in (*TOKEN_SCALARS, "top_ids", "top_logits")
        }
        tails = [shard.tail_means for shard in shards if shard.tail_means is not None]
        return TokenRows(
            states=torch.cat([shard.states for shard in shards]),
            tail_means=torch.cat(tails) if tails else None,
            **columns,
        )

    def token_shards(self) -> Iterator[TokenRows]:
        """`token_rows`, one shard at a time."""
        k, schema = self.layout.top_k, self.layout.tokens()
        if k is None:
            raise UserError(
                f"{self.folder} has no sampled token positions: extract with some, "
                "into another folder"
            )
        for index, shard in enumerate(self.manifest.shards):
            assert shard is not None  # open_cache refuses an incomplete cache
            assert shard.tokens is not None  # the layout has tokens, so every shard has
            table = self._read(tokens_file(index), shard.tokens, schema.names, schema)
            rows = table.num_rows
            yield TokenRows(
                **{name: table[name].to_numpy() for name in TOKEN_SCALARS},
                states=self._decode_vectors(table["state"], tokens_file(index)),
                top_ids=decode(table["top_ids"], torch.int32, k).numpy()
                if k
                else np.empty((rows, 0), np.int32),
                top_logits=decode(table["top_logits"], torch.float32, k).numpy()
                if k
                else np.empty((rows, 0), np.float32),
                tail_means=self._decode_vectors(table["tail_mean"], tokens_file(index))
                if self.layout.tail_mean
                else None,
            )

    @cached_property
    def vocabulary(self) -> int:
        """Tokens that the language model's head knows, 0 without one: `lm_head` unread."""
        path, entry = self.folder / LM_HEAD, self.manifest.lm_head
        assert entry is not None  # open_cache refuses an incomplete cache
        problem = wrong_size(path, entry)
        if problem:
            raise problem
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                return file.get_slice("weight").get_shape()[0] if "weight" in names else 0
        except SafetensorError as error:
            raise damaged(path, str(error)) from None

    def lm_head(self) -> dict[str, torch.Tensor]:
        """The language model's head, as extract stored it."""
        entry = self.manifest.lm_head
        assert entry is not None  # open_cache refuses an incomplete cache
        return safetensors.torch.load(self._proven(LM_HEAD, entry))

    def _table(self, name: str) -> pl.DataFrame:
        content = self._proven(table_file(name), self.manifest.tables[name])
        frame = pl.from_arrow(pq.read_table(pa.BufferReader(content)))
        assert isinstance(frame, pl.DataFrame)  # a table never gives a Series
        return frame

    def _proven(self, name: str, entry: FileEntry) -> bytes:
        """A whole file whose digest is the recorded one."""
        path = self.folder / name
        problem = wrong_bytes(path, entry)
        if problem:
            raise problem
        return path.read_bytes()

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

    def _decode_vectors(self, column: pa.ChunkedArray, name: str) -> torch.Tensor:
        vectors = decode(column, self.layout.torch_dtype, self.width)
        # aminmax passes NaN on, and is many times faster than isfinite of every number.
        if vectors.numel() and not all(torch.isfinite(end) for end in torch.aminmax(vectors)):
            raise damaged(self.folder / name, "it holds a vector that is NaN or infinite")
        return vectors


def open_cache(folder: Path) -> Cache:
    """Open a complete cache; sizes are checked now, content as it is read.

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
    """The error for a file that is missing or longer or shorter than recorded, if it is."""
    if not path.is_file():
        return UserError(f"{path} is missing: run the command that made it again")
    size = path.stat().st_size
    return None if size == entry.bytes else damaged(path, f"{size} bytes instead of {entry.bytes}")


def wrong_bytes(path: Path, entry: FileEntry) -> UserError | None:
    """The error for a file that is not byte for byte as recorded, if it is not."""
    problem = wrong_size(path, entry)
    if problem is None and sha256(path) != entry.sha256:
        return damaged(path, "its SHA-256 is not the recorded one")
    return problem
