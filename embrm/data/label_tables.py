"""Label tables: Parquet files with other labels, or measured preference strengths, for pairs.

A table has one row per pair, keyed by pair_id, and says in the file's metadata (key "embrm",
canonical JSON) how it was made. There are two kinds:

    labels      any of label (probability that chosen is better), weight (0 leaves the pair out) and
                margin; a run that names the table uses them in place of the dataset's own
    strengths   measured by an ensemble of reward heads. prompt_id; label, as used to train the
                ensemble; strength and spread, the mean and population standard deviation over its
                heads of the reward difference in the direction of that label; gold, the dataset's
                margin in that direction, or null
"""

import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl

from embrm.core.errors import UserError
from embrm.core.files import write_bytes
from embrm.core.specs import canonical_json, content_id
from embrm.core.text import first_line

Kind = Literal["labels", "strengths"]

_KEY = "embrm"
_LABELS = ("label", "weight", "margin")
_COLUMNS: dict[str, tuple[str, ...]] = {
    "labels": _LABELS,
    "strengths": ("prompt_id", "label", "strength", "spread", "gold"),
}


@dataclass(frozen=True)
class LabelTable:
    """A label table in memory.

    rows: pair_id and the columns of its kind, as above. provenance: how it was made (rule,
    parameters, cache_id, embrm's version), of JSON types.
    """

    kind: Kind
    rows: pl.DataFrame
    provenance: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """Hash (16 hex digits) of kind and rows; independent of the order of rows and columns."""
        rows = self.rows.select(sorted(self.rows.columns)).sort("pair_id")
        return content_id([self.kind, rows.to_dict(as_series=False)])

    def counts(self) -> dict[str, int]:
        """Counts for a table of labels: pairs, and how many of them are "turned" (label below 0.5),
        "soft" (label neither 0 nor 1) and "left_out" (weight 0)."""
        columns = {"label": 1.0, "weight": 1.0}
        absent = {k: pl.lit(v) for k, v in columns.items() if k not in self.rows.columns}
        rows, label = self.rows.with_columns(**absent), pl.col("label")
        conditions = {
            "turned": label < 0.5,
            "soft": (label > 0) & (label < 1),
            "left_out": pl.col("weight") == 0,
        }
        return {"pairs": rows.height} | {k: rows.filter(v).height for k, v in conditions.items()}


def write_label_table(path: Path, table: LabelTable) -> None:
    """Write the table atomically; equal tables give equal bytes.

    Raises: UserError for a path that does not end in .parquet.
    """
    if path.suffix != ".parquet":
        raise UserError(
            f"out (--out) = {path}: a label table is a Parquet file: end its name in .parquet"
        )
    header = {"kind": table.kind, "digest": table.digest, **table.provenance}
    stream = io.BytesIO()
    rows = table.rows.sort("pair_id").rechunk()
    rows.write_parquet(stream, compression="zstd", metadata={_KEY: canonical_json(header)})
    write_bytes(path, stream.getvalue())


def read_label_table(path: Path, kind: Kind) -> LabelTable:
    """Read the table at `path`. Raises: UserError as `open_label_table`, and for the other kind."""
    table = open_label_table(path)
    if table.kind != kind:
        maker = {"labels": "annotate or remedy", "strengths": "strength"}[kind]
        raise UserError(
            f"{path} holds {table.kind}, not {kind}: make them with embrm labels {maker}"
        )
    return table


def open_label_table(path: Path) -> LabelTable:
    """Read the table at `path`, of either kind.

    Raises: UserError when the file is missing, damaged, no label table, or has invalid values.
    """
    try:
        header = pl.read_parquet_metadata(path).get(_KEY)
        rows = pl.read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"no label table at {path}: make it with embrm labels") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"{path} is not a complete Parquet file ({first_line(error)}): "
            "make it again with embrm labels"
        ) from None
    provenance = _provenance(path, header)
    kind, digest = provenance.pop("kind"), provenance.pop("digest")
    table = LabelTable(kind, rows, provenance)
    _check(path, rows, kind)
    if table.digest != digest:
        raise UserError(f"{path} was changed after it was written: make it again with embrm labels")
    return table


def _provenance(path: Path, header: str | None) -> dict[str, Any]:
    try:
        found = json.loads(header or "")
        if found["kind"] in _COLUMNS and isinstance(found["digest"], str):
            return dict(found)
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(
        f"{path} is not a label table (its metadata has no provenance): make one with embrm labels"
    )


def _check(path: Path, rows: pl.DataFrame, kind: Kind) -> None:
    """Refuse wrong columns, repeated pairs, and values outside their range."""
    known = _COLUMNS[kind]
    names = {*rows.columns} - {"pair_id"}
    complete = names == {*known} if kind == "strengths" else names and names <= {*known}
    types = {name: pl.String if name.endswith("_id") else pl.Float64 for name in rows.columns}
    if "pair_id" not in rows.columns or not complete or rows.schema != types:
        found = ", ".join(f"{name} {dtype}" for name, dtype in rows.schema.items())
        raise UserError(
            f"{path} has the columns {found}: a table of {kind} has pair_id, {', '.join(known)}, "
            "ids as text and the others as 64-bit floats: make it again with embrm labels"
        )
    if rows["pair_id"].is_duplicated().any():
        raise UserError(f"{path} has a pair_id twice: make it again with embrm labels")
    if kind != "labels":
        return
    limits = {"label": (0.0, 1.0), "weight": (0.0, 3.4e38), "margin": (-3.4e38, 3.4e38)}
    for name in names:
        within = rows[name].is_between(*limits[name]) & rows[name].is_not_nan()
        wrong = rows.filter(~within.fill_null(False))
        if wrong.height:
            raise UserError(
                f"{path}: {name} = {wrong[name][0]} in {wrong.height} of {rows.height} rows, but "
                f"it must be from {limits[name][0]:g} to {limits[name][1]:g}: "
                "make it again with embrm labels"
            )
