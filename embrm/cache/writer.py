"""Writes a cache shard by shard. Finished shards are kept however the process ends."""

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from embrm.cache.manifest import (
    LM_HEAD,
    NAME,
    TABLES,
    FileEntry,
    Manifest,
    Part,
    ShardEntry,
    read_manifest,
    responses_file,
    table_file,
    tokens_file,
    write_manifest,
)
from embrm.cache.schema import (
    STORAGE,
    ShardLayout,
    ShardRows,
    Stored,
    TokenRows,
    all_finite,
    responses_table,
    to_parquet,
    tokens_table,
    widened,
)
from embrm.core.errors import UserError
from embrm.core.files import TEMPORARY, disk_errors, exclusive, remove_temporaries, write_atomic
from embrm.core.specs import canonical_json, content_id

if TYPE_CHECKING:
    from torch import Tensor

_PIECE_BYTES = 256 << 10
"""Size of the pieces in which a file is hashed and written, so that a piece is still in the
processor's cache when it is written. Linux puts writes of 2 MB and more into huge pages, which took
ten times as long on a virtual machine whose host had to allocate them."""


class CacheWriter:
    """Adds shards to a cache, from any thread. Create it with `open_writer`."""

    def __init__(self, folder: Path, manifest: Manifest, environment: dict[str, Any]) -> None:
        self._folder, self._manifest, self._environment = folder, manifest, environment
        self._lock = threading.Lock()

    @property
    def done(self) -> frozenset[int]:
        """Indices of the finished shards."""
        return self._manifest.done

    @property
    def n_shards(self) -> int:
        """Number of shards that the cache will have."""
        return len(self._manifest.shards)

    def write_shard(self, index: int, rows: ShardRows, tokens: TokenRows[Stored] | None) -> None:
        """Store shard `index`; its entry reaches the manifest after its files are safely on disk.

        Pass `tokens` for every shard or for none; a shard without token rows passes a table of
        zero rows.
        Raises: UserError when a number is not finite or the shard's layout is not the cache's.
        """
        expected = self._manifest.rows_of(index)
        given = range(rows.first, rows.first + len(rows.response_id))
        share = self._manifest.share
        if given != expected or index in self.done or index not in share:
            raise ValueError(
                f"shard {index} holds {expected}, got {given}; of {share}, done: {self.done}"
            )
        if tokens and not np.isin(tokens.response, expected).all():
            raise ValueError(f"token rows of shard {index} name responses outside {expected}")
        layout = ShardLayout.of(rows, tokens)
        with self._lock:  # of shards written at the same time, the first decides the layout
            known = self._manifest.layout or layout
            self._manifest = self._manifest.model_copy(update={"layout": known})
        if layout != known:
            raise UserError(
                f"shard {index} has {difference(known, layout)}: extract into a new folder"
            )
        _refuse_non_finite(rows, tokens)
        stored = ShardEntry(
            responses=self._store_table(responses_file(index), responses_table(rows, layout)),
            tokens=self._store_table(tokens_file(index), tokens_table(tokens, layout))
            if tokens
            else None,
        )
        with self._lock:
            shards = list(self._manifest.shards)
            shards[index] = stored
            self._update(shards=tuple(shards))

    def finish(self) -> None:
        """Mark a whole cache as complete. Raises: ValueError while a shard is missing."""
        if not self._manifest.finished:
            raise ValueError(f"{len(self.done)} of {len(self._manifest.share)} shards are finished")
        if not self._manifest.part and not self._manifest.complete:
            self._update(complete=True)

    def store_tables(
        self,
        tables: Mapping[str, pl.DataFrame],
        lm_head: "Callable[[], dict[str, Tensor]]",
    ) -> None:
        """Store the tables and the LM head, unless they are stored already.

        lm_head: returns the head's tensors; called only if they are needed.
        """
        have = self._manifest
        if not have.has_tables:
            return
        entries = {
            name: have.tables.get(name) or self._store_table(table_file(name), _arrow(tables[name]))
            for name in TABLES
        }
        head = have.lm_head
        if head is None:
            from embrm.cache.tensors import lm_head_content  # torch, which nothing else here needs

            tensors = lm_head()
            content = lm_head_content(tensors)
            head = self._store(LM_HEAD, len(tensors), lambda stream: stream.write(content))
        if (entries, head) != (have.tables, have.lm_head):
            self._update(tables=entries, lm_head=head)

    def _store_table(self, name: str, table: pa.Table) -> FileEntry:
        return self._store(name, table.num_rows, lambda stream: to_parquet(table, stream))

    def _store(self, name: str, rows: int, write: Callable[["_Digested"], object]) -> FileEntry:
        digested = _Digested()
        write_atomic(self._folder / name, lambda stream: write(digested.onto(stream)))
        return FileEntry(rows=rows, bytes=digested.bytes, sha256=digested.sha256.hexdigest())

    def _update(self, **changes: Any) -> None:
        environments = self._manifest.environments
        if self._environment not in environments:
            environments = (*environments, self._environment)
        manifest = self._manifest.model_copy(update={**changes, "environments": environments})
        write_manifest(self._folder, manifest)
        self._manifest = manifest


class _Digested:
    """A stream that counts and hashes the bytes that are written to it.

    Size and digest are those of the intended bytes, so that reading detects when a disk stored
    others.
    """

    closed = False

    def __init__(self) -> None:
        self.sha256, self.bytes = hashlib.sha256(), 0

    def onto(self, stream: IO[bytes]) -> "_Digested":
        """Make this object write to `stream`; returns it."""
        self._stream = stream
        return self

    def write(self, content: bytes) -> int:
        for first in range(0, len(content), _PIECE_BYTES):
            piece = memoryview(content)[first : first + _PIECE_BYTES]
            self.sha256.update(piece)
            self._stream.write(piece)
        self.bytes += len(content)
        return len(content)

    def flush(self) -> None:
        """Do nothing: pyarrow calls this at the end, but the stream's owner flushes it."""


@contextmanager
def open_writer(
    folder: Path,
    *,
    identity: dict[str, Any],
    environment: dict[str, Any],
    extraction: dict[str, Any],
    data: dict[str, Any],
    tables: Mapping[str, pl.DataFrame],
    n_responses: int,
    shard_rows: int,
    lm_head: "Callable[[], dict[str, Tensor]]",
    part: Part | None = None,
) -> Iterator[CacheWriter]:
    """Begin or resume the cache at `folder`; no other process can write it until this one is done.

    identity: determines the content; the cache id is its digest. environment, extraction, data:
    recorded in the manifest. tables: the dataset's pairs, members, exclusions and leaks. lm_head:
    returns the tensors of the LM head. part: write only this part of the cache, for `merge` to join
    with the others.

    Raises: UserError when the folder contains anything else, a cache of another identity or a
    damaged manifest, when another process is writing it, or when the disk is full.
    """
    refuse_foreign(folder)
    with exclusive(folder):
        with disk_errors(folder):
            remove_temporaries(folder)
        manifest = Manifest(
            cache_id=content_id(identity),
            identity=_plain(identity),
            environments=(_plain(environment),),
            extraction=_plain(extraction),
            data=_plain(data),
            n_responses=n_responses,
            shard_rows=shard_rows,
            shards=(None,) * -(-n_responses // shard_rows),
            part=part,
        )
        if (folder / NAME).exists():
            manifest = _resumed(folder, manifest)
        else:
            write_manifest(folder, manifest)
        writer = CacheWriter(folder, manifest, _plain(environment))
        writer.store_tables(tables, lm_head)
        yield writer


def _resumed(folder: Path, fresh: Manifest) -> Manifest:
    """The stored manifest, rewritten without the entries of missing or truncated files."""
    stored = read_manifest(folder)
    differs = difference(defining(stored), defining(fresh))
    if differs:
        raise UserError(
            f"{folder} was extracted with {differs}: use the same settings or another out (--out)"
        )
    lost = {
        name for name, entry in stored.files().items() if not _has_size(folder / name, entry.bytes)
    }
    if not lost:
        return stored
    for name in sorted(lost):
        print(
            f"warning: {folder / name} is missing or has the wrong size: it is written again",
            file=sys.stderr,
        )
    kept = stored.model_copy(
        update={
            "complete": False,
            "tables": {n: e for n, e in stored.tables.items() if table_file(n) not in lost},
            "lm_head": None if LM_HEAD in lost else stored.lm_head,
            "shards": tuple(
                None if lost & {responses_file(index), tokens_file(index)} else shard
                for index, shard in enumerate(stored.shards)
            ),
        }
    )
    write_manifest(folder, kept)
    return kept


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def refuse_foreign(folder: Path) -> None:
    """Raises: UserError when `folder` is a file, or a folder with anything but a cache."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the cache")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = sorted(n for n in names if n != ".lock" and not n.startswith(TEMPORARY))
    if foreign and NAME not in names:
        raise UserError(
            f"{folder} is not a cache (it has {foreign[0]!r} but no {NAME}): choose another out "
            "(--out)"
        )


def _refuse_non_finite(rows: ShardRows, tokens: TokenRows[Stored] | None) -> None:
    numbers: dict[str, NDArray[Any]] = {} if rows.S is None else {"S": rows.S}
    numbers |= {f"state {view!r}": states for view, states in rows.states.items()}
    numbers |= {f"norm {view!r}": norms for view, norms in rows.norms.items()}
    _refuse_rows(numbers, rows.response_id)
    if tokens:
        owners = [rows.response_id[index - rows.first] for index in tokens.response]
        floats = {  # or the bits of bfloat16, as uint16
            f"token {name}": column
            for name, column in tokens.columns().items()
            if column.dtype != np.int32
        }
        _refuse_rows(floats, owners)


def _refuse_rows(numbers: Mapping[str, NDArray[Any]], owners: Sequence[str]) -> None:
    for name, values in numbers.items():
        if values.dtype in STORAGE.values():
            if all_finite(values):
                continue
            values = widened(values)
        wrong = ~np.isfinite(values)
        if wrong.any():
            row = int(np.nonzero(wrong)[0][0])
            raise UserError(
                f"{name} of response {owners[row]} is NaN or infinite: "
                "extract in float32 or bfloat16, and check the model's weights"
            )


def _arrow(table: pl.DataFrame) -> pa.Table:
    return table.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """The value after a round trip through JSON, to compare it with a stored manifest."""
    plain: dict[str, Any] = json.loads(canonical_json(value))
    return plain


def defining(manifest: Manifest) -> dict[str, Any]:
    """The fields that are equal in all manifests of the same extraction."""
    part = manifest.part
    return {
        "engine": "transformers",  # unless the identity names another
        **manifest.identity,
        "n_responses": manifest.n_responses,
        "shard_rows": manifest.shard_rows,
        "part": part and f"{part.name}, shards from {part.first} to before {part.stop}",
    }


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping, keyed by dotted paths."""
    if isinstance(value, ShardLayout):
        value = dict(value)
    if not isinstance(value, dict) or not value:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{name}.{key}" if name else key)
    return flat


def difference(was: dict[str, Any] | ShardLayout, given: dict[str, Any] | ShardLayout) -> str:
    """The first field that differs, with both values, and the names of further ones; "" if none."""
    stored, given = _flat(was), _flat(given)
    known = sorted(stored.keys() | given.keys(), key=lambda name: (_explains(name), name))
    names = [
        name
        for name in known
        if name not in stored or name not in given or stored[name] != given[name]
    ]
    if not names:
        return ""
    first, *others = names
    also = f" (also: {', '.join(others[:5])})" if others else ""
    return f"{first} = {_short(stored.get(first))}, not {_short(given.get(first))}{also}"


def _explains(name: str) -> int:
    """The order in which differing fields are named.

    States come first, and data before the counts that follow from it; but settings come before
    data, because digests of data differ whenever any setting of the texts does.
    """
    counts = ("n_responses", "shard_rows", "part", "data.token_ids")
    last = 3 if name in counts else 2 if name.startswith("data.") else 1
    return 0 if name.startswith("states.") else last


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
