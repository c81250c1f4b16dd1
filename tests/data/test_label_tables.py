"""Tests of label tables: round trip, digest, and refusal of damaged or invalid files."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from embrm.core.errors import UserError
from embrm.data.label_tables import (
    LabelTable,
    open_label_table,
    read_label_table,
    write_label_table,
)

ROWS = pl.DataFrame({"pair_id": ["b", "a"], "label": [1.0, 0.25], "weight": [0.0, 2.0]})
MADE = {"rule": "test", "parameters": {"q": 1.5}, "cache_id": "c", "embrm": "0"}


def test_a_written_table_is_read_back_with_its_provenance(tmp_path: Path) -> None:
    table = LabelTable("labels", ROWS, MADE)
    write_label_table(tmp_path / "labels" / "one.parquet", table)
    found = read_label_table(tmp_path / "labels" / "one.parquet", "labels")
    assert found.provenance == MADE
    assert found.rows.equals(ROWS.sort("pair_id"))
    assert found.digest == table.digest
    assert found.counts() == {"pairs": 2, "turned": 1, "soft": 1, "left_out": 1}


def test_the_digest_depends_on_the_content_only(tmp_path: Path) -> None:
    table = LabelTable("labels", ROWS, MADE)
    assert LabelTable("labels", ROWS.reverse().select("weight", "label", "pair_id"), {}).digest == (
        table.digest
    )
    for name, value in (("pair_id", "c"), ("label", 0.5), ("weight", 3.0)):
        other = ROWS.with_columns(pl.when(pl.col("pair_id") == "a").then(pl.lit(value))
                                  .otherwise(name).alias(name))  # fmt: skip
        assert LabelTable("labels", other, MADE).digest != table.digest
    paths = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    write_label_table(paths[0], table)
    write_label_table(paths[1], LabelTable("labels", ROWS.reverse(), MADE))
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"label": [1.0, 1.5]}, "label = 1.5 in 1 of 2 rows, but it must be from 0 to 1"),
        ({"label": [None, 1.0]}, "label = None in 1 of 2 rows"),
        ({"margin": [float("nan"), 1.0]}, "margin = nan in 1 of 2 rows"),
        ({"weight": [-1.0, 1.0]}, "weight = -1.0 in 1 of 2 rows"),
        ({"pair_id": ["a", "a"], "label": [1.0, 1.0]}, "has a pair_id twice"),
        ({"lable": [1.0, 1.0]}, "has the columns pair_id String, lable Float64: a table of labels"),
        ({"label": ["1", "0"]}, "has the columns pair_id String, label String: a table of labels"),
        ({}, "has the columns pair_id String: a table of labels has"),
    ],
)
def test_invalid_columns_and_values_are_refused(
    columns: dict[str, Any], line: str, tmp_path: Path
) -> None:
    rows = pl.DataFrame({"pair_id": ["a", "b"], **columns})
    path = tmp_path / "wrong.parquet"
    _written(path, rows)
    with pytest.raises(UserError, match=line) as caught:
        open_label_table(path)
    assert "\n" not in str(caught.value)


def _written(path: Path, rows: pl.DataFrame) -> None:
    rows.write_parquet(path, metadata={"embrm": '{"kind":"labels","digest":"x"}'})


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    with pytest.raises(UserError, match=r"no label table at .*one\.parquet: make it with embrm"):
        open_label_table(path)
    path.write_text("pair_id,label")
    with pytest.raises(UserError, match="is not a complete Parquet file"):
        open_label_table(path)
    ROWS.write_parquet(path)
    with pytest.raises(UserError, match="is not a label table"):
        open_label_table(path)
    ROWS.write_parquet(path, metadata={"embrm": "[1]"})
    with pytest.raises(UserError, match="is not a label table"):
        open_label_table(path)
    _written(path, ROWS)
    with pytest.raises(UserError, match="was changed after it was written"):
        open_label_table(path)
    write_label_table(path, LabelTable("labels", ROWS, MADE))
    with pytest.raises(UserError, match="holds labels, not strengths: make them with embrm labels"):
        read_label_table(path, "strengths")
    with pytest.raises(UserError, match="a label table is a Parquet file"):
        write_label_table(tmp_path / "one.csv", LabelTable("labels", ROWS, MADE))
