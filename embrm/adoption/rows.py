"""Rows: determines the split, prompt, response model and gold score of each state in an array."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.adoption.arrays import StateArray
from embrm.adoption.findings import Finding
from embrm.core.errors import UserError
from embrm.core.specs import canonical_json
from embrm.core.text import listed
from embrm.data.collector import EXCLUSIONS, Schema
from embrm.data.forms import RowError
from embrm.data.labels import finite_number
from embrm.data.sources import SourceSpec, SourceTable, read_rows

Order = Literal["prompts", "responses"]
"""First axis of an array of three axes: (prompts, responses, width) or (responses, prompts, width).
"""

ROWS: Schema = {
    "row": pl.Int64,
    "split": pl.String,
    "subset": pl.String,
    "prompt": pl.Int64,
    "model": pl.String,
    "gold": pl.Float64,
}


@dataclass(frozen=True)
class Rows:
    """The states of one array that have a gold score.

    An array of three axes is called a grid; for an array of two axes, a table describes each row.

    table: columns `ROWS`, sorted by prompt for a grid, else in the order of the file. `row` is the
        row in the array, with all axes but the last flattened; `prompt` numbers the prompts.
    exclusions: the rows without a valid gold score; columns `embrm.data.collector.EXCLUSIONS`.
    prompts: the texts or names of the prompts by number; None for a grid, which has none.
    grid: (number of prompts, number of responses); None without a grid.
    order: the first axis of the grid; None without a grid.
    sha256: digest of gold scores, models and table; part of the cache's identity.
    """

    table: pl.DataFrame
    exclusions: pl.DataFrame
    prompts: list[str] | None
    grid: tuple[int, int] | None
    order: Order | None
    sha256: str
    findings: tuple[Finding, ...] = ()


def from_grid(
    states: StateArray,
    gold: NDArray[np.float64],
    sha256: str,
    *,
    split: str,
    order: Order | None,
    models: Sequence[str] | None,
) -> Rows:
    """Rows of an array of shape (prompts, responses, width) or (responses, prompts, width).

    gold: shaped like the first two axes, in either order, optionally with a last axis of length 1.
    sha256: digest of gold. order: None takes the longer axis for the prompts. models: the response
    model at each position of the responses axis, the same for every prompt.

    Raises: UserError when the shapes do not match, or both axes are equally long and `order` is
    None.
    """
    name, (first, second) = states.file.name, states.file.shape[:2]
    gold = gold[..., 0] if gold.ndim == 3 and gold.shape[2] == 1 else gold
    if gold.shape not in ((first, second), (second, first)):
        raise UserError(
            f"{name} has shape {states.file.shape}, its gold scores {gold.shape}: the scores must "
            f"have shape ({first}, {second}) or ({second}, {first})"
        )
    findings = []
    if order is None:
        if first == second:
            raise UserError(
                f"{name} has shape {states.file.shape}, where prompts and responses cannot be told "
                "apart: set order = prompts or order = responses, the first axis"
            )
        order = "prompts" if first > second else "responses"
        detail = f"the longer axis, {max(first, second):,}, is taken for the prompts"
        findings.append(Finding(name, split, "axis order", "reported", None, detail))
    if gold.shape != (first, second):
        detail = f"gold scores have their axes in the other order, {gold.shape}: transposed"
        findings.append(Finding(name, split, "axis order", "fixed", None, detail))
        gold = gold.T
    places = np.arange(first * second).reshape(first, second)
    if order == "responses":
        gold, places = gold.T, places.T
    prompts, responses = gold.shape
    if models is not None and len(models) != responses:
        raise UserError(
            f"{name} has {responses} responses per prompt, but models has {len(models)} lines: "
            "write one model per response"
        )
    count = gold.size
    table = pl.DataFrame(
        {
            "row": places.flatten(),
            "split": pl.repeat(split, count, eager=True),
            "subset": pl.repeat(None, count, dtype=pl.String, eager=True),
            "prompt": np.repeat(np.arange(prompts), responses),
            "model": [*models] * prompts if models else pl.repeat(None, count, eager=True),
            "gold": gold.flatten(),
        },
        schema=ROWS,
    )
    kept, exclusions, lost = _finite_gold(table, name)
    digest = hashlib.sha256(canonical_json([sha256, models]).encode()).hexdigest()
    grid = prompts, responses
    return Rows(kept, exclusions, None, grid, order, digest, (*findings, *lost))


def from_table(
    states: StateArray,
    path: Path,
    columns: dict[str, str],
    gold: tuple[NDArray[np.float64], str] | None,
    *,
    split: str | None,
) -> Rows:
    """Rows of an array of shape (rows, width), described by a table with one row per state.

    The table at `path` needs a column prompt or prompt_id, and gold unless `gold` gives the scores
    (and their digest). It may have model, split and subset. columns: maps these fields to columns
    of the table whose names differ.

    Raises: UserError as `read_rows`, for a missing column, and when the lengths differ.
    """
    found = _read(path, columns)
    count = len(found.rows)
    if count != states.rows:
        raise UserError(
            f"{states.file.name} has {states.rows:,} rows, but {found.name} has {count:,}: "
            "write one row per state, in the same order"
        )
    if gold is None and "gold" not in found.columns:
        raise UserError(
            f"{found.name} has no column gold ({listed(found.found)}): name it in columns, or "
            "give gold as an array"
        )
    if gold is not None and gold[0].size != count:
        raise UserError(
            f"{states.file.name} has {count:,} rows, its gold scores have shape {gold[0].shape}: "
            f"the scores must have shape ({count},)"
        )
    if split is not None and "split" in found.columns:
        raise UserError(
            f"{found.name} has a column split, but split {split!r} was given: leave one of them "
            'out, the column with columns = { split = "" }'
        )
    numbers: dict[str, int] = {}
    values: dict[str, list[Any]] = {name: [] for name in ROWS}
    lost: dict[str, list[Any]] = {name: [] for name in EXCLUSIONS}
    for row in range(count):
        own = split or _text(_cell(found, "split", row)) or states.file.path.stem
        try:
            prompt = _text(_cell(found, "prompt", row))
            if prompt is None:
                raise RowError("missing_value", "prompt is null")
            cell = _cell(found, "gold", row) if gold is None else gold[0].flat[row]
            score = finite_number(cell, "gold", "nan_gold")
            if score is None:
                raise RowError("missing_value", "gold is null")
        except RowError as error:
            _append(lost, (states.file.name, row, own, *error.args))
            continue
        place = numbers.setdefault(prompt, len(numbers))
        texts = (_text(_cell(found, "subset", row)), place, _text(_cell(found, "model", row)))
        _append(values, (row, own, *texts, score))
    table, exclusions = pl.DataFrame(values, schema=ROWS), pl.DataFrame(lost, schema=EXCLUSIONS)
    digest = hashlib.sha256((gold[1] if gold else "").encode())
    for column in table.get_columns():
        digest.update(canonical_json([column.name, column.to_list()]).encode())
    digest.update(canonical_json([*numbers]).encode())
    return Rows(table, exclusions, [*numbers], None, None, digest.hexdigest(), _counted(exclusions))


def _read(path: Path, columns: dict[str, str]) -> SourceTable:
    spec = SourceSpec.parse({"path": str(path), "columns": columns}, "rows")
    found = read_rows(spec)
    if "prompt" not in found.columns and "prompt_id" in found.found:
        columns = {**columns, "prompt": "prompt_id"}
        found = read_rows(spec.model_copy(update={"columns": columns}))
    if "prompt" not in found.columns:
        raise UserError(
            f"{found.name} has no column prompt or prompt_id ({listed(found.found)}): name it in "
            "columns"
        )
    return found


def _cell(table: SourceTable, field: str, row: int) -> Any:
    column = table.columns.get(field)
    return None if column is None else column[row]


def _text(value: Any) -> str | None:
    """A cell as valid Unicode text, messages as JSON; None for an empty cell."""
    if value is None or value == "":
        return None
    text = value if isinstance(value, str | int) else canonical_json(value)
    return str(text).encode(errors="replace").decode()


def _append(columns: dict[str, list[Any]], values: Sequence[Any]) -> None:
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)


def _finite_gold(
    table: pl.DataFrame, name: str
) -> tuple[pl.DataFrame, pl.DataFrame, tuple[Finding, ...]]:
    finite = table["gold"].cast(pl.Float32).is_finite()  # heads are trained in float32
    lost = table.filter(~finite)
    exclusions = excluded(lost, name, "nan_gold", [f"gold is {x}" for x in lost["gold"]])
    return table.filter(finite), exclusions, _counted(exclusions)


def excluded(table: pl.DataFrame, name: str, reason: str, details: Sequence[str]) -> pl.DataFrame:
    """Exclusions for all rows of `table`, which has the columns `ROWS`, from the source `name`."""
    return table.select(
        pl.lit(name).alias("source"),
        "row",
        "split",
        pl.lit(reason).alias("reason"),
        pl.Series("detail", details, dtype=pl.String),
    )


def _counted(exclusions: pl.DataFrame) -> tuple[Finding, ...]:
    """One finding for each split and reason of the exclusions."""
    grouped = exclusions.group_by("source", "split", "reason", maintain_order=True)
    return tuple(
        Finding(source, split, "gold scores", "excluded", count, f"{reason}: {first}")
        for source, split, reason, count, first in grouped.agg(
            pl.len(), first=pl.col("detail").first()
        ).rows()
    )
