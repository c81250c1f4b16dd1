"""Tests of the probe: passes a sound cache, fails an altered one, refuses other inputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from extract_models import save_model, tokenizer
from extract_world import make, spec_of, write_pairs
from tampering import set_column, tamper
from typer.testing import CliRunner

from embrm.cli import app
from embrm.core.errors import UserError
from embrm.extraction.probe import probe


@pytest.fixture(scope="module")
def cache(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(world, tmp_path_factory.mktemp("probe") / "cache")


def test_a_sound_cache_passes(cache: Path) -> None:
    result = probe(cache, sample=20, device="cpu", batch_tokens=(1, 300))
    assert result.within_tolerance
    assert result.tolerance == 1e-4
    assert result.engine == result.made_by == "transformers"
    assert result.pairs == 10
    assert 10 < result.responses <= 20
    seen = {(entry.quantity, entry.batch_tokens) for entry in result.deviations}
    assert seen == {(q, b) for q in ("last", "mean", "S", "logsumexp") for b in (1, 300)}
    for entry in result.deviations:
        assert entry.relative < 1e-5
        assert entry.orders_changed == (None if entry.quantity == "logsumexp" else 0)


def test_bfloat16_passes_within_its_own_tolerance(world: dict[str, str], tmp_path: Path) -> None:
    spec = spec_of(world, dtype="bfloat16", token_rows=0, tail_mean=False)
    result = probe(make(world, tmp_path / "half", spec), sample=20, device="cpu")
    assert result.within_tolerance
    assert result.tolerance == 5e-2


def _swapped_states(table: pa.Table) -> pa.Table:
    return set_column(
        table, "state.last", table["state.last"].take(np.arange(table.num_rows)[::-1])
    )


def _shifted_sums(table: pa.Table) -> pa.Table:
    return set_column(table, "S", pa.array(-table["S"].to_numpy()))


@pytest.mark.parametrize(("change", "quantity"), [(_swapped_states, "last"), (_shifted_sums, "S")])
def test_a_cache_with_altered_numbers_fails(
    cache: Path, tmp_path: Path, change, quantity: str
) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "other"))
    tamper(folder, change)
    result = probe(folder, sample=96, device="cpu", batch_tokens=(1,))
    assert not result.within_tolerance
    for entry in result.deviations:
        assert (entry.relative > 1e-4) == (entry.quantity == quantity)
        assert bool(entry.orders_changed) == (entry.quantity == quantity)


def test_the_command_reports_whether_a_cache_is_within_the_tolerance(
    cache: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    tamper(other, _shifted_sums)
    words = ["cache", "probe", "--sample", "8", "--device", "cpu"]
    sound, broken = (CliRunner().invoke(app, [*words, str(folder)]) for folder in (cache, other))
    assert sound.output.splitlines()[-1] == (
        "every relative error is within the tolerance of float32, 0.0001"
    )
    assert "within" not in broken.output
    assert isinstance(broken.exception, UserError)
    assert "a relative error is over the tolerance of float32, 0.0001" in str(broken.exception)
    for folder, within in ((cache, True), (other, False)):
        done = CliRunner().invoke(app, [*words, str(folder), "--json"])
        assert json.loads(done.stdout)["within_tolerance"] is within


def test_other_weights_or_data_are_refused(tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "pairs.jsonl"
    save_model(model, "llama-tied", tokenizer())
    write_pairs(data)
    here = {"model": str(model), "data": str(data)}
    folder = make(here, tmp_path / "cache", spec_of(here))
    save_model(model, "llama-tied", tokenizer(), seed=1)
    with pytest.raises(UserError, match="the model named in its spec has changed"):
        probe(folder, device="cpu")
    save_model(model, "llama-tied", tokenizer())
    rows = data.read_text().splitlines()
    data.write_text("\n".join([*rows[:-1], json.dumps(json.loads(rows[-1]) | {"chosen": "mud"})]))
    with pytest.raises(UserError, match="the data named in its spec has changed"):
        probe(folder, device="cpu")


def test_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cache"):
        probe(tmp_path)
