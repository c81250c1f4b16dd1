"""Tests of sources: file types, the hub, column mapping, row selection, and error messages."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from embrm.core.errors import UserError
from embrm.data.sources import SourceSpec, parse_source, read_rows

ROWS = [
    {"prompt": "p 0", "chosen": "a", "rejected": "b", "margin": 1.5},
    {"prompt": "p 1", "chosen": "007", "rejected": 'd "quoted"\nline', "margin": 2.0},
]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        pl.DataFrame(rows).write_csv(path)
    else:
        pl.DataFrame(rows).write_parquet(path)
    return path


def _refused(spec: SourceSpec) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_type_gives_the_same_table(tmp_path: Path, suffix: str) -> None:
    table = read_rows(SourceSpec(path=str(_write(tmp_path / f"mine{suffix}", ROWS))))
    assert {field: table.columns[field] for field in ("prompt", "chosen", "rejected")} == {
        field: [row[field] for row in ROWS] for field in ("prompt", "chosen", "rejected")
    }
    assert list(map(float, table.columns["margin"])) == [1.5, 2.0]
    assert table.rows == [0, 1]
    assert table.split == "mine"
    assert table.name == f"{tmp_path.name}/mine{suffix}"


def test_json_may_be_an_object_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}))
    assert read_rows(SourceSpec(path=str(path))).columns["chosen"] == ["a", "007"]


def test_jsonl_rows_are_lines_and_absent_keys_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"prompt": "p"}\n\n{"chosen": "c"}\n', encoding="utf-8")
    table = read_rows(SourceSpec(path=str(path)))
    assert table.rows == [0, 2]
    assert table.columns == {"prompt": ["p", None], "chosen": [None, "c"]}


def test_csv_holds_messages_as_json_and_empty_cells_as_empty_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    cell = json.dumps([{"role": "user", "content": "hi"}])
    pl.DataFrame({"prompt": [cell, cell], "chosen": ["[1] not JSON", ""]}).write_csv(path)
    table = read_rows(SourceSpec(path=str(path)))
    assert table.columns["prompt"] == [json.loads(cell)] * 2
    assert table.columns["chosen"] == ["[1] not JSON", ""]


def test_column_names_are_recognized_and_a_mapping_takes_precedence(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c", "output": "o", "generator": "g", "score": 1}
    path = _write(tmp_path / "x.jsonl", [row | {"logit": 2}])
    assert read_rows(SourceSpec(path=str(path))).columns == {
        "prompt": ["p"],
        "response": ["c"],
        "model": ["g"],
        "gold": [1],
    }
    mapped = SourceSpec(path=str(path), columns={"gold": "logit", "prompt": "output"})
    assert read_rows(mapped).columns == {
        "prompt": ["o"],
        "response": ["c"],
        "model": ["g"],
        "gold": [2],
    }


@pytest.mark.parametrize("cell", ["[" * 200_000, "[" + "1" * 5000 + "]"])
def test_csv_cells_that_are_not_decodable_json_stay_text(tmp_path: Path, cell: str) -> None:
    (tmp_path / "x.csv").write_text(f"prompt\n{cell}\n")
    assert read_rows(SourceSpec(path=str(tmp_path / "x.csv"))).columns["prompt"] == [cell]


def test_a_field_mapped_to_nothing_is_left_out(tmp_path: Path) -> None:
    path = str(_write(tmp_path / "x.jsonl", [row | {"split": "a"} for row in ROWS]))
    table = read_rows(SourceSpec(path=path, columns={"margin": "", "split": ""}))
    assert sorted(table.columns) == ["chosen", "prompt", "rejected"]
    assert "where names ''" in _refused(SourceSpec(path=path, where={"": 1}))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_where_keeps_rows_and_their_numbers(tmp_path: Path, suffix: str) -> None:
    rows = [{"chosen": str(n), "turn": n % 2, "clean": n < 3} for n in range(5)]
    path = str(_write(tmp_path / f"x{suffix}", rows))
    assert read_rows(SourceSpec(path=path, where={"turn": 1})).rows == [1, 3]
    assert read_rows(SourceSpec(path=path, where={"turn": 1, "clean": True})).rows == [1]
    assert read_rows(SourceSpec(path=path, where={"chosen": "4"})).columns["chosen"] == ["4"]
    message = _refused(SourceSpec(path=path, where={"turn": 7}))
    assert "where turn = 7 keeps no row: the column has " in message


def test_where_distinguishes_true_from_one(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", [{"chosen": "a", "flag": True}, {"chosen": "b", "flag": 1}])
    assert read_rows(SourceSpec(path=str(path), where={"flag": 1})).rows == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "a", "unknown file type '.txt': convert it to one of .jsonl, .json, .csv"),
        ("x.parquet", "PAR1 rubbish", "is not a complete Parquet file"),
        ("x.jsonl", '{"a": 1}\n{"a": ', "line 2 is not JSON"),
        ("x.jsonl", "[1]\n", "record 1 is [1], not an object"),
        ("x.jsonl", "", "no rows"),
        ("x.csv", "", "no rows"),
        ("x.csv", "prompt,chosen\n", "no rows"),
        ("x.csv", 'a,b\n1,2,3\n"', "is not a complete CSV file"),
        ("x.json", "[]", "no rows"),
        ("x.json", "{}", "no rows"),
        ("x.jsonl", '{"a": 1}\n{"a": ' + "1" * 5000 + "}", "line 2 is not JSON (Exceeds the limit"),
        ("x.jsonl", "[" * 200_000, "line 1 is not JSON (maximum recursion depth"),
        ("x.json", '[{"a": ' + "1" * 5000 + "}]", "is not JSON (Exceeds the limit"),
        ("x.json", "[" * 200_000, "is not JSON (maximum recursion depth"),
        ("x.json", '{"a": 1}\n{"a": 2}', "name it .jsonl"),
        ("x.json", "3", "contains 3: write a list of objects"),
        ("x.json", '{"a": [1, 2], "b": [1]}', "not lists of equal length"),
        ("x.json", '[{"a": 1}, 2]', "record 2 is 2, not an object"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    assert message in _refused(SourceSpec(path=str(tmp_path / name)))


def test_an_empty_parquet_file_is_refused(tmp_path: Path) -> None:
    pl.DataFrame(schema={"prompt": pl.String}).write_parquet(tmp_path / "x.parquet")
    assert "no rows" in _refused(SourceSpec(path=str(tmp_path / "x.parquet")))


def test_non_utf8_files_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    assert "not UTF-8" in _refused(SourceSpec(path=str(tmp_path / "x.jsonl")))
    assert "is a folder" in _refused(SourceSpec(path=str(tmp_path)))
    assert "no dataset at" in _refused(SourceSpec(path=str(tmp_path / "absent.csv")))


def test_an_error_about_a_missing_column_suggests_the_nearest_name(tmp_path: Path) -> None:
    path = str(_write(tmp_path / "x.jsonl", ROWS))
    message = _refused(SourceSpec(path=path, columns={"chosen": "chosn"}))
    assert "columns names 'chosn', which is not a column: did you mean 'chosen'?" in message
    message = _refused(SourceSpec(path=path, where={"margn": 1}))
    assert "where names 'margn', which is not a column: did you mean 'margin'?" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either path or hub"),
        ({"path": "x", "hub": "a/b"}, "either path or hub"),
        ({"path": "x", "config": "main"}, "config belongs to a hub dataset"),
        ({"path": "x", "columns": {"chosenn": "c"}}, "did you mean 'chosen'?"),
        (
            {"path": "x", "columns": {"accepted": "chosen"}},
            'the field comes first, write columns = { chosen = "accepted" }',
        ),
        ({"path": "x", "limit": 0}, "limit = 0"),
        ({"path": "x", "spilt": "train"}, "did you mean 'split'?"),
        ({"path": "x", "pairs": {"gapp": 1}}, "did you mean 'gap'?"),
        ({"path": "x", "holdout": {"fraction": 2}}, "holdout.fraction = 2"),
    ],
)
def test_a_spec_is_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        SourceSpec.parse(values, "spec.toml")
    assert message in str(caught.value)


def test_data_arguments_of_the_command_line_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.jsonl").write_text("{}")
    Path("here").mkdir()
    Path("here/data").write_text("")
    for text, wanted in {
        "x.parquet": {"path": "x.parquet"},
        "train=x.parquet": {"path": "x.parquet", "split": "train"},
        "ood/hhh=far/away/x.csv": {"path": "far/away/x.csv", "split": "ood/hhh"},
        "a=b.jsonl": {"path": "a=b.jsonl"},
        "id=a=b.jsonl": {"path": "a=b.jsonl", "split": "id"},
        "Anthropic/hh-rlhf": {"hub": "Anthropic/hh-rlhf"},
        "ood=Anthropic/hh-rlhf": {"hub": "Anthropic/hh-rlhf", "split": "ood"},
        "here/data": {"path": "here/data"},
        "here/x.jsonl": {"path": "here/x.jsonl"},
        "/somewhere/data": {"path": "/somewhere/data"},
        "../data": {"path": "../data"},
    }.items():
        assert parse_source(text) == SourceSpec.parse(wanted, "test"), text
    for text in ("", "train=", "=x.parquet"):
        with pytest.raises(UserError, match=r"write \[SPLIT=\]PATH_OR_HUB_ID"):
            parse_source(text)
    with pytest.raises(UserError, match="write SPLIT=PATH, train=here/data"):
        parse_source("train:here/data")


def test_without_the_datasets_package_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = _refused(SourceSpec(hub="a/b"))
    assert "pip install '.[extract]'" in message


class _FakePart:
    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns
        self.column_names = list(columns)
        self.num_rows = len(next(iter(columns.values())))

    def select_columns(self, names: list[str]) -> "_FakePart":
        return _FakePart({name: self.columns[name] for name in names})

    def to_dict(self) -> dict[str, list[Any]]:
        return self.columns


def _fake_hub(monkeypatch: pytest.MonkeyPatch, loaded: object) -> list[dict[str, Any]]:
    calls = []

    def load_dataset(place: str, **options: Any) -> object:
        calls.append({"place": place, **options})
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_all_splits_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "train": _FakePart({"chosen": ["a", "b"], "rejected": ["c", "d"], "image": [0, 0]}),
        "test": _FakePart({"chosen": ["e"], "rejected": ["f"]}),
    }
    calls = _fake_hub(monkeypatch, parts)
    table = read_rows(SourceSpec(hub="a/b", config="main", revision="abc"))
    assert calls == [{"place": "a/b", "name": "main", "revision": "abc", "split": None}]
    assert table.columns == {
        "chosen": ["a", "b", "e"],
        "rejected": ["c", "d", "f"],
        "split": ["train", "train", "test"],
    }
    assert table.rows == [0, 1, 0]
    assert read_rows(SourceSpec(hub="a/b", where={"split": "test"})).columns["chosen"] == ["e"]


def test_the_splits_of_a_hub_dataset_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_hub(monkeypatch, {"test": _FakePart({"chosen": ["e"], "rejected": ["f"]})})
    table = read_rows(SourceSpec(hub="a/b", columns={"split": ""}, where={"split": "test"}))
    assert table.columns == {"chosen": ["e"], "rejected": ["f"]}
    assert "" not in table.found


def test_one_split_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_hub(monkeypatch, _FakePart({"chosen": ["e"], "rejected": ["f"]}))
    table = read_rows(SourceSpec(hub="a/b", hub_split="test"))
    assert table.columns["split"] == ["test"]


def test_a_failure_of_the_hub_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_hub(monkeypatch, ConnectionError("no route\nto host"))
    message = _refused(SourceSpec(hub="a/b"))
    assert message.startswith("a/b: not a file here, and the hub did not give it (no route)")


def test_the_real_datasets_package_reads_a_local_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="the extra 'extract' is not installed")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        _write(folder / f"{split}.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = read_rows(SourceSpec(hub="owner/name"))
    assert table.columns["chosen"] == ["a", "007"] * 2
    assert table.columns["split"] == ["train", "train", "test", "test"]
