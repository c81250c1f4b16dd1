"""A stored sweep of every kind of run by embrm 0.3.0 can be read, and trained again to its bits.

tests/golden/sweep-0.3.0.tar.gz holds a made-up cache, a spec, and the results that release 0.3.0
made of them with portable numerics. If the bits of training change on purpose, raise
`TRAINING_VERSION` in embrm/sweeps/spec.py and store a sweep of that release beside this one.
"""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from scipy.special import expit
from strict_process import strict_process

from embrm.cache.verify import verify
from embrm.reports.run import report
from embrm.results.ledger import open_results
from embrm.results.replay import replay
from embrm.results.weights import load_run
from embrm.sweeps.execute import sweep
from embrm.sweeps.prepare import prepare_sweep
from embrm.sweeps.spec import TRAINING_VERSION

ARCHIVE = Path(__file__).parents[1] / "golden" / "sweep-0.3.0.tar.gz"

ARITHMETIC = "952d71de0a5ab9e4b8ca1e988e73213bc69548b7dfd4fc6d8eea2786a66d1d6a"
"""Digest of `arithmetic` on the processor that made the sweep."""


AS_BEFORE = """\
grid = { regularizer = [
    { kind = "grm-sft", token_rows = 2, estimator = "plug-in" },
    { kind = "grm-dpo", token_rows = 2, estimator = "plug-in" },
    { kind = "preserve-kl" },
] }
"""


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    # Since 0.4.0, regularizers that are not linear in S̃ have another estimator by default.
    spec = tmp_path / "sweep.toml"
    entry = 'grid = { "regularizer.kind" = ["grm-sft", "grm-dpo", "preserve-kl"] }'
    assert entry in spec.read_text()
    spec.write_text(spec.read_text().replace(entry, AS_BEFORE))
    return tmp_path


def arithmetic() -> str:
    """Digest of some products and functions here: other processors may round differently."""
    digest = hashlib.sha256()
    random = np.random.default_rng(0)
    for rows, columns, inner in ((32, 32, 12), (7, 64, 12), (96, 32, 12), (16, 4, 8), (40, 12, 40)):
        a, b = (
            torch.from_numpy(random.standard_normal(s)) for s in ((rows, inner), (inner, columns))
        )
        digest.update((a.float() @ b.float()).numpy().tobytes())
        digest.update((a @ b).numpy().tobytes())
    x = torch.from_numpy(random.standard_normal(999)).float()
    for values in (x.exp(), x.square().log(), x.abs().sqrt(), torch.nn.functional.logsigmoid(x)):
        digest.update(values.numpy().tobytes())
    digest.update(expit(x.numpy()).tobytes())
    digest.update(x.view(27, 37).logsumexp(1).numpy().tobytes())
    return digest.hexdigest()


def test_the_cache_is_sound_and_the_results_are_read(golden: Path) -> None:
    assert verify(golden / "cache") == []
    results = open_results(golden / "sweep")
    assert results.environment["versions"]["embrm"] == "0.3.0"
    assert (results.ledger["status"] == "ok").all()
    for run_id in results.ledger["run_id"]:
        assert load_run(results.folder, run_id).cache_id == results.cache_id
    shown = report(results.folder, cache=golden / "cache", out=golden / "report")
    assert set(shown.comparison.ranking["name"]) == set(results.ledger["config"])


def test_ids_are_those_of_the_release(golden: Path) -> None:
    prepared = prepare_sweep(golden / "sweep.toml", golden / "cache", None)
    stored = open_results(golden / "sweep").ledger
    assert {run.run_id: run.config_id for run in prepared.runs} == dict(
        stored.select("run_id", "config_id").rows()
    )


def test_a_corrected_default_does_not_take_older_runs_for_its_own(golden: Path) -> None:
    spec = golden / "sweep.toml"
    spec.write_text(spec.read_text().replace(', token_rows = 2, estimator = "plug-in"', ""))
    found = {run.run_id: run for run in prepare_sweep(spec, golden / "cache", None).runs}
    stored = open_results(golden / "sweep").ledger
    new = [run.spec.regularizer for id_, run in found.items() if id_ not in {*stored["run_id"]}]
    assert {own.kind for own in new if own} == {"grm-sft", "grm-dpo"}


def test_nothing_is_trained_again(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr("embrm.sweeps.workers.Workers.run", refuse)
    path = golden / "sweep" / "ledger.parquet"
    before = pl.read_parquet(path)
    sweep(golden / "sweep.toml", golden / "cache")
    # The estimator is written out in the names of three configurations.
    assert_frame_equal(
        pl.read_parquet(path).drop("config").sort("run_id"), before.drop("config").sort("run_id")
    )


def test_training_gives_the_bits_of_the_release(golden: Path) -> None:
    with strict_process("portable") as call:
        here = call(arithmetic)
    if here != ARITHMETIC or not torch.__version__.startswith("2.13.0"):
        pytest.skip(
            f"torch {torch.__version__} computes otherwise on this processor than where the sweep "
            "was made: bits cannot be compared"
        )
    found = replay(golden / "sweep", cache=golden / "cache", jobs=1)
    other = [run.config for run in found.runs if not run.same_bits]
    assert not other, (
        f"training gives other bits than in 0.3.0: {', '.join(other)}. Undo the change, or, if it "
        f"is meant, raise TRAINING_VERSION (now {TRAINING_VERSION}), so that older runs "
        "are not taken for new ones"
    )


def test_a_changed_bit_is_noticed(golden: Path) -> None:
    """The comparison fails if a weight differs; here one bit of a stored digest is changed."""
    path = golden / "sweep" / "ledger.parquet"
    ledger = pl.read_parquet(path)
    changed = ledger.with_columns(
        weights_sha256=pl.when(pl.col("config") == "bt")
        .then(pl.lit("0") + pl.col("weights_sha256").str.slice(1))
        .otherwise("weights_sha256")
    )
    changed.write_parquet(path)
    found = replay(golden / "sweep", run="bt@0", cache=golden / "cache", jobs=1)
    assert not found.runs[0].same_bits
