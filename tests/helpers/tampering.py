"""Caches that are well formed and say something else than they should."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embrm.cache.manifest import FileEntry, read_manifest, write_manifest
from embrm.core.files import sha256


def tamper(folder: Path, change) -> None:
    """Replace a shard by a well-formed one that says something else, checksums made to fit."""
    path = folder / "responses/part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(change(table), path, compression="none")
    manifest = read_manifest(folder)
    shard = manifest.shards[0]
    assert shard is not None
    entry = FileEntry(rows=table.num_rows, bytes=path.stat().st_size, sha256=sha256(path))
    shards = (shard.model_copy(update={"responses": entry}), *manifest.shards[1:])
    write_manifest(folder, manifest.model_copy(update={"shards": shards}))


def set_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, values)
