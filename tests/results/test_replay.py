"""Replayed runs have the bits of the sweep; differences are found, measured and explained."""

import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from sweep_fixtures import sweep_fixture, toy_cache_fixture
from toy_cache import toy_cache

from embrm.core.errors import UserError
from embrm.results.ledger import open_results
from embrm.results.replay import replay

SPEC = """
baseline = "bt"
seeds = [0, 1]
validation = 0.2
[defaults]
epochs = 4
patience = 2
batch_pairs = 16
[[runs]]
name = "bt"
[[runs]]
name = "bsr"
grid = { bsr = [0.01, 0.1], loss = ["bt", "hinge"] }
[[runs]]
name = "wild"
lr = 1e30
[[runs]]
name = "mlp"
head = { kind = "mlp", widths = [8], dropout = 0.2 }
"""


cache = toy_cache_fixture()
swept = sweep_fixture(SPEC)


def test_every_run_trained_alone_has_the_bits_of_the_sweep(swept: Path) -> None:
    before = {path: path.read_bytes() for path in swept.rglob("*") if path.is_file()}
    result = replay(swept, jobs=1)
    assert len(result.runs) == 14
    assert all(entry.same_bits and entry.within_tolerance for entry in result.runs)
    assert "numerics.MKL_CBWR" not in result.environment
    assert {path: path.read_bytes() for path in swept.rglob("*") if path.is_file()} == before


def test_a_sample_is_spread_over_the_ledger_and_one_run_can_be_named(swept: Path) -> None:
    ledger = open_results(swept).ledger["run_id"].to_list()
    assert [entry.run_id for entry in replay(swept, sample=2, jobs=1).runs] == [
        ledger[0],
        ledger[-1],
    ]
    [only] = replay(swept, run=ledger[3], jobs=1).runs
    assert only.run_id == ledger[3]


def test_a_changed_metric_is_found(swept: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(swept, tmp_path / "swept"))
    path = folder / "ledger.parquet"
    ledger = pl.read_parquet(path)
    run = ledger.filter(pl.col("config") == "bt")["run_id"][0]
    own = pl.col("run_id") == run
    better = pl.when(own).then(pl.col("accuracy@id") + 0.02).otherwise(pl.col("accuracy@id"))
    ledger.with_columns(better.alias("accuracy@id")).write_parquet(path)
    [found] = replay(folder, run=run, jobs=1).runs
    assert not found.same_bits
    assert not found.within_tolerance
    assert found.metric == "accuracy@id"
    assert found.difference == pytest.approx(0.02)


def test_the_distance_to_changed_weights_is_measured(swept: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(swept, tmp_path / "swept"))
    ledger = pl.read_parquet(folder / "ledger.parquet")
    run = ledger.filter(pl.col("config") == "bt")["run_id"][0]
    ledger.with_columns(
        pl.when(pl.col("run_id") == run)
        .then(pl.lit("0" * 64))
        .otherwise(pl.col("weights_sha256"))
        .alias("weights_sha256")
    ).write_parquet(folder / "ledger.parquet")
    path = folder / "weights" / f"{run}.safetensors"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({k: v * 1.25 for k, v in load_file(path).items()}, path, metadata=metadata)
    [found] = replay(folder, run=run, jobs=1).runs
    assert not found.same_bits
    assert found.weights == pytest.approx(0.2)
    assert found.within_tolerance


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL there is one mode")
def test_other_arithmetic_is_reported_and_linear_heads_agree_within_the_tolerance(
    swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    ledger = open_results(swept).ledger
    run = ledger.filter(pl.col("config") == "bt")["run_id"][0]
    result = replay(swept, run=run, jobs=1)
    assert result.environment["numerics.MKL_CBWR"][1] == "COMPATIBLE"
    assert result.runs[0].within_tolerance
    assert result.runs[0].weights < 1e-4


def test_unknown_runs_samples_caches_and_folders_are_refused(swept: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run 'zzz'"):
        replay(swept, run="zzz")
    with pytest.raises(UserError, match="sample = 0"):
        replay(swept, sample=0)
    with pytest.raises(UserError, match="but the run was trained on"):
        replay(swept, cache=toy_cache(tmp_path / "other", seed=5))
    with pytest.raises(UserError, match="no sweep results"):
        replay(tmp_path)
