"""Tables: reads local JSONL, JSON, CSV and Parquet files as columns of Python values."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from embrm.core.errors import UserError
from embrm.core.text import first_line, quoted

Columns = dict[str, list[Any]]
Choose = Callable[[Sequence[str]], Sequence[str]]
"""Called with the names of all columns; returns the names of those to read."""


def read_file(path: Path, choose: Choose) -> tuple[Columns, list[int]]:
    """Read the chosen columns of a file; returns them and each row's position in the file, from 0.

    Raises: UserError for a file that is missing, damaged, or of an unknown type.
    """
    if not path.exists():
        raise UserError(f"no dataset at {path}: check the path")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name one file in it ({', '.join(READERS)})")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise UserError(
            f"{path}: unknown file type {quoted(path.suffix)}: "
            f"convert it to one of {', '.join(READERS)}"
        )
    try:
        return reader(path, choose)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: convert it, or check its suffix") from None
    except PermissionError:
        raise UserError(f"no permission to read {path}: change its permissions") from None


def _read_parquet(path: Path, choose: Choose) -> tuple[Columns, list[int]]:
    try:
        frame = pl.read_parquet(path, columns=list(choose(list(pl.read_parquet_schema(path)))))
        height = frame.height if frame.width else pl.scan_parquet(path).select(pl.len()).collect()
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{path} is not a complete Parquet file ({first_line(error)}): copy it again"
        ) from None
    count = height if isinstance(height, int) else int(height.item())
    return frame.to_dict(as_series=False), list(range(count))


def _read_csv(path: Path, choose: Choose) -> tuple[Columns, list[int]]:
    try:
        # All cells are read as text: guessed types would turn the response "007" into 7.
        frame = pl.read_csv(path, infer_schema=False).fill_null("")
    except pl.exceptions.NoDataError:
        return {}, []
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{path} is not a complete CSV file ({first_line(error)}): fix or copy it again"
        ) from None
    names = choose(frame.columns)
    columns = {name: _decoded_cells(frame[name].to_list()) for name in names}
    return columns, list(range(frame.height))


def _decoded_cells(cells: list[Any]) -> list[Any]:
    """Decode a column whose cells are all JSON lists (messages or losers); others are unchanged."""
    if not all(cell.startswith("[") for cell in cells):
        return cells
    try:
        return [json.loads(cell) for cell in cells]
    except (ValueError, RecursionError):
        return cells


def _read_jsonl(path: Path, choose: Choose) -> tuple[Columns, list[int]]:
    records, rows = [], []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream):
            if line.isspace():
                continue
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                # Overlong numbers raise a plain ValueError, deep nesting a RecursionError.
                # Only the message: the decoder's own line number is always 1 here.
                why = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
                raise UserError(
                    f"{path}: line {number + 1} is not JSON ({why}): fix or remove it"
                ) from None
            rows.append(number)
    return _columns_of(path, records, choose), rows


def _read_json(path: Path, choose: Choose) -> tuple[Columns, list[int]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON ({first_line(error)}): "
            "if it holds one object per line, name it .jsonl"
        ) from None
    if isinstance(content, list):
        return _columns_of(path, content, choose), list(range(len(content)))
    if not isinstance(content, dict):
        raise UserError(f"{path} contains {quoted(content)}: write a list of objects")
    lengths = {len(cells) if isinstance(cells, list) else -1 for cells in content.values()}
    if len(lengths) > 1 or -1 in lengths:
        raise UserError(
            f"{path} is one object, but its values are not lists of equal length: "
            "write a list of objects, or an object of columns"
        )
    names = choose(list(content))
    return {name: content[name] for name in names}, list(range(max(lengths, default=0)))


def _columns_of(path: Path, records: list[Any], choose: Choose) -> Columns:
    for position, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(
                f"{path}: record {position + 1} is {quoted(record)}, not an object: "
                'write {"prompt": ..., "chosen": ..., "rejected": ...}'
            )
    names = choose(list(dict.fromkeys(name for record in records for name in record)))
    return {name: [record.get(name) for record in records] for name in names}


READERS: dict[str, Callable[[Path, Choose], tuple[Columns, list[int]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
