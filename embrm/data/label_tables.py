"""Label tables: what is said of pairs beside the data, in files that say how they were made.

A Parquet file with one row per pair, keyed by pair_id, and its provenance in the file's metadata
(key "embrm", canonical JSON). Two kinds:

    labels      any of label (probability that chosen is better), weight (0: leave the pair out) and
                margin; a sweep's run takes them instead of the data's
    strengths   prompt_id; label, as the members were trained on it; strength and spread, the mean
                and population standard deviation over members of the reward difference in the
                direction of that label; gold, the data's margin in that direction, or null
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
    """rows: pair_id and the columns of its kind, as above. provenance: rule, parameters, cache_id
    and the version of embrm; canonical JSON."""

    kind: Kind
    rows: pl.DataFrame
    provenance: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """16 hex digits over kind and rows in the order of pair ids, whatever file they are in."""
        rows = self.rows.select(sorted(self.rows.columns)).sort("pair_id")
        return content_id([self.kind, rows.to_dict(as_series=False)])

    def counts(self) -> dict[str, int]:
        """Of labels: pairs, those whose label is turned round (below one half), soft (neither 0 nor
        1), and those left out (weight 0)."""
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
    """Write atomically; equal tables give equal bytes. Raises: UserError for another suffix."""
    if path.suffix != ".parquet":
        raise UserError(f"--out {path}: a label table is a .parquet file: name it so")
    header = {"kind": table.kind, "digest": table.digest, **table.provenance}
    stream = io.BytesIO()
    rows = table.rows.sort("pair_id").rechunk()
    rows.write_parquet(stream, compression="zstd", metadata={_KEY: canonical_json(header)})
    write_bytes(path, stream.getvalue())


def read_label_table(path: Path, kind: Kind) -> LabelTable:
    """The table at `path`. Raises: UserError for what `open_label_table` does, or another kind."""
    table = open_label_table(path)
    if table.kind != kind:
        maker = {"labels": "annotate or remedy", "strengths": "strength"}[kind]
        raise UserError(
            f"{path} holds {table.kind}, not {kind}: make them with embrm labels {maker}"
        )
    return table


def open_label_table(path: Path) -> LabelTable:
    """The table at `path`, of either kind.

    Raises: UserError when it is missing, damaged, no label table, or holds a value out of range.
    """
    try:
        header = pl.read_parquet_metadata(path).get(_KEY)
        rows = pl.read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"no label table at {path}: make it with embrm labels") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} is not a whole Parquet file: {first_line(error)}") from None
    provenance = _provenance(path, header)
    kind, digest = provenance.pop("kind"), provenance.pop("digest")
    table = LabelTable(kind, rows, provenance)
    _check(path, rows, kind)
    if table.digest != digest:
        raise UserError(f"{path} is not as it was written: make it again with embrm labels")
    return table


def _provenance(path: Path, header: str | None) -> dict[str, Any]:
    try:
        found = json.loads(header or "")
        if found["kind"] in _COLUMNS and isinstance(found["digest"], str):
            return dict(found)
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path} is no label table (it does not say how it was made): see embrm labels")


def _check(path: Path, rows: pl.DataFrame, kind: Kind) -> None:
    """Columns, and values that training can use."""
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
        raise UserError(f"{path} names a pair twice: make it again with embrm labels")
    if kind != "labels":
        return
    limits = {"label": (0.0, 1.0), "weight": (0.0, 3.4e38), "margin": (-3.4e38, 3.4e38)}
    for name in names:
        within = rows[name].is_between(*limits[name]) & rows[name].is_not_nan()
        wrong = rows.filter(~within.fill_null(False))
        if wrong.height:
            raise UserError(
                f"{path}: {name} = {wrong[name][0]} in {wrong.height} of {rows.height} rows: it is "
                f"a number from {limits[name][0]:g} to {limits[name][1]:g}: make it again"
            )
