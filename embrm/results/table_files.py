"""Tables of results as files of their own, in the format that the file's name says."""

from collections.abc import Callable
from pathlib import Path

import polars as pl

from embrm.core.errors import UserError
from embrm.core.files import write_bytes
from embrm.sweeps.ledger import parquet

_CONTENT: dict[str, Callable[[pl.DataFrame], bytes]] = {
    ".parquet": parquet,
    ".jsonl": lambda table: table.write_ndjson().encode(),
    ".csv": lambda table: table.write_csv().encode(),
}


def check_table_name(path: Path) -> None:
    """Raises: UserError for a name that ends in no known format."""
    if path.suffix not in _CONTENT:
        raise UserError(f"out (--out) = {path}: its name must end in {', '.join(_CONTENT)}")


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Write `table` atomically. Raises: UserError for a name that ends in no known format."""
    check_table_name(path)
    write_bytes(path, _CONTENT[path.suffix](table))
