"""Stored results: weights and their digest, deterministic Parquet, errors about damage."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from embrm.core.errors import UserError
from embrm.metrics import accuracy
from embrm.results.ledger import open_results
from embrm.results.weights import load_run
from embrm.sweeps import ledger as ledger_module
from embrm.sweeps.ledger import OUTCOMES_SCHEMA, finished, parquet, write_results
from embrm.sweeps.spec import Run, RunSpec, SweepSpec
from embrm.sweeps.weights import weights_file
from embrm.training.heads import HeadSpec, Preprocess, initialise

NONE = Preprocess(None, None)


def _run(name: str, **fields: object) -> Run:
    return Run(name, f"id-{name}", f"config-{name}", RunSpec.parse(fields, "test"))


def _store(folder: Path, run: Run, preprocess: Preprocess = NONE) -> str:
    parameters = initialise(run.spec.head, 5, 0)
    content, digest = weights_file(run, "cache", parameters, preprocess)
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    (folder / "weights" / f"{run.run_id}.safetensors").write_bytes(content)
    return digest


@pytest.mark.parametrize("head", [HeadSpec(), HeadSpec(kind="mlp", widths=(3, 2))])
@pytest.mark.parametrize("preprocess", [NONE, Preprocess(torch.randn(5), torch.ones(5))])
def test_a_stored_run_comes_back_bit_for_bit(
    tmp_path: Path, head: HeadSpec, preprocess: Preprocess
) -> None:
    run = _run("a", head=head.model_dump(), bsr=0.5)
    _store(tmp_path, run, preprocess)
    loaded = load_run(tmp_path, "id-a")
    assert loaded.spec == run.spec
    assert loaded.cache_id == "cache"
    expected = initialise(head, 5, 0)
    assert loaded.parameters.keys() == expected.keys()
    assert all(torch.equal(loaded.parameters[name], expected[name]) for name in expected)
    if preprocess.mean is None:
        assert loaded.preprocess == NONE
    else:
        assert loaded.preprocess.mean is not None
        assert torch.equal(loaded.preprocess.mean, preprocess.mean)


def test_the_digest_depends_on_exactly_the_bits_of_the_tensors() -> None:
    one = initialise(HeadSpec(), 5, 0)
    other = {"output.weight": one["output.weight"].clone()}
    run, renamed = _run("a"), _run("b")
    digest = weights_file(run, "cache", one, NONE)[1]
    assert weights_file(renamed, "cache", other, NONE)[1] == digest
    bits = other["output.weight"].view(torch.int32)
    bits[0, 3] ^= 1
    assert weights_file(run, "cache", other, NONE)[1] != digest
    moved = Preprocess(torch.zeros(5), torch.ones(5))
    assert weights_file(run, "cache", one, moved)[1] != digest


def test_equal_tables_are_equal_bytes() -> None:
    table = pl.DataFrame(
        {"run_id": [f"{i:05d}" for i in range(3000)], "x": [0.5, None, 2.0] * 1000}
    )
    chunks = pl.concat([table[2000:], table[:2000]], rechunk=False).sort("run_id")
    assert parquet(table) == parquet(chunks)


PROMPTS = pl.DataFrame(
    [(split, None, f"p{number}", 1.0, 1.0, 0.0) for split in ("id", "far") for number in range(5)],
    schema={"split": pl.String()} | accuracy.PROMPTS,
    orient="row",
)


def _outcomes(run_ids: list[str]) -> pl.DataFrame:
    """Random numbers that depend only on the run."""
    rows = [
        {"run_id": run_id, "split": split}
        | {
            name: np.random.default_rng([*run_id.encode(), len(split), place]).random(5).tolist()
            for place, name in enumerate(accuracy.OUTCOMES)
        }
        for run_id in run_ids
        for split in ("id", "far")
    ]
    return pl.DataFrame(rows, schema=OUTCOMES_SCHEMA)


def _part(folder: Path, part: str, run_ids: list[str], value: float) -> None:
    rows = {"run_id": run_ids}
    n = len(run_ids)
    tables = {
        "ledger": pl.DataFrame(rows).with_columns(
            pl.lit("old name").alias("config"),
            pl.lit(0).alias("seed"),
            pl.lit("ok").alias("status"),
            pl.lit(value).alias("accuracy@id"),
            pl.lit(value).alias("accuracy@far"),
        ),
        "curves": pl.DataFrame({**rows, "epoch": [1] * n}),
        "outcomes": _outcomes(run_ids),
        "timings": pl.DataFrame(rows),
    }
    for name, table in tables.items():
        path = folder / "parts" / part / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(parquet(table))
    (folder / "weights").mkdir(exist_ok=True)
    for run_id in run_ids:
        (folder / "weights" / f"{run_id}.safetensors").touch()


SPEC = SweepSpec.parse({"baseline": "a", "runs": [{"name": "a"}, {"name": "b", "bsr": 1}]}, "test")
HEADER: dict[str, object] = {"cache": "cache/x", "cache_id": "c", "leaked": {}, "environment": {}}


def test_tables_hold_the_current_runs_and_splits(tmp_path: Path) -> None:
    _part(tmp_path, "1", ["id-b", "id-dropped"], 0.5)
    _part(tmp_path, "2", ["id-a"], 0.25)
    (tmp_path / "parts" / "unfinished").mkdir()
    assert finished(tmp_path).keys() == {"id-a", "id-b", "id-dropped"}
    write_results(tmp_path, SPEC, [_run("b"), _run("a"), _run("c")], ["id"], HEADER, PROMPTS)
    results = open_results(tmp_path)
    assert results.ledger.columns == ["run_id", "config", "seed", "status", "accuracy@id"]
    assert results.ledger.rows() == [("id-a", "a", 0, "ok", 0.25), ("id-b", "b", 0, "ok", 0.5)]
    assert results.curves["run_id"].to_list() == ["id-a", "id-b"]
    assert results.prompts.equals(PROMPTS.filter(split="id"))
    assert results.outcomes.equals(_outcomes(["id-a", "id-b"]).filter(split="id"))
    assert results.spec == SPEC
    assert results.cache_id == "c"
    for name in ("id-a", "a@0"):
        assert results.find(name)["run_id"] == "id-a"
    with pytest.raises(UserError, match="add a seed: a@0"):
        results.find("a")
    with pytest.raises(UserError, match="2 run ids begin with it"):
        results.find("id")
    with pytest.raises(UserError, match="no run 'id-x' in"):
        results.find("id-x")


def test_outcomes_have_the_same_bytes_whatever_the_parts_and_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"r{number:02d}" for number in range(11)]
    ids = [f"id-{name}" for name in names]
    partitions = ([ids], [[run_id] for run_id in reversed(ids)], [ids[::2], ["id-old"], ids[1::2]])
    contents = set()
    for cells, found in ((1 << 22, 1), (50, 3)):
        monkeypatch.setattr(ledger_module, "_CELLS", cells)
        for number, parts in enumerate(partitions):
            folder = tmp_path / f"{cells}-{number}"
            for part, own in enumerate(parts):
                _part(folder, str(part), own, 0.5)
            runs = [_run(name) for name in names]
            write_results(folder, SPEC, runs, ["far", "id"], HEADER, PROMPTS)
            results = open_results(folder)
            assert results.outcomes.equals(_outcomes(ids).sort("run_id", "split"))
            assert results.prompts["split"].to_list() == ["far"] * 5 + ["id"] * 5
            assert pq.ParquetFile(folder / "outcomes.parquet").num_row_groups == found
            contents.add((found, (folder / "outcomes.parquet").read_bytes()))
    assert len(contents) == 2


def test_a_sweep_in_which_all_diverged_has_empty_outcomes(tmp_path: Path) -> None:
    _part(tmp_path, "1", ["id-a"], 0.5)
    path = tmp_path / "parts" / "1" / "outcomes.parquet"
    path.write_bytes(parquet(_outcomes([])))
    write_results(tmp_path, SPEC, [_run("a")], ["id"], HEADER, PROMPTS)
    outcomes = open_results(tmp_path).outcomes
    assert outcomes.is_empty()
    assert outcomes.schema == OUTCOMES_SCHEMA


def test_a_run_without_its_weights_is_not_finished(tmp_path: Path) -> None:
    _part(tmp_path, "1", ["id-a", "id-b"], 0.5)
    (tmp_path / "weights" / "id-a.safetensors").unlink()
    assert finished(tmp_path).keys() == {"id-b"}


def test_missing_and_damaged_results_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep results in"):
        open_results(tmp_path / "nothing")
    _part(tmp_path, "1", ["id-a"], 0.5)
    write_results(tmp_path, SPEC, [_run("a")], ["id"], HEADER, PROMPTS)
    good = (tmp_path / "sweep.json").read_bytes()
    for bad in (b"", good[:40], b"[]", b'{"spec": {}}', b"\xff"):
        (tmp_path / "sweep.json").write_bytes(bad)
        with pytest.raises(UserError, match=r"sweep\.json"):
            open_results(tmp_path)
    (tmp_path / "sweep.json").write_bytes(good)
    ledger = tmp_path / "ledger.parquet"
    ledger.write_bytes(ledger.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"ledger\.parquet is damaged"):
        open_results(tmp_path)


def test_damaged_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    run = _run("a")
    _store(tmp_path, run)
    path = tmp_path / "weights" / "id-a.safetensors"
    good = path.read_bytes()
    for bad in (b"", good[:20], good[:-3]):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="is damaged"):
            load_run(tmp_path, "id-a")
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    assert set(header["__metadata__"]) == {"embrm"}  # one key, so the order is fixed
    path.write_bytes(good.replace(b"embrm-head 1", b"embrm-head 9"))
    with pytest.raises(UserError, match="has format 'embrm-head 9'"):
        load_run(tmp_path, "id-a")
