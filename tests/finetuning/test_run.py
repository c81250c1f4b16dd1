"""Fine-tunes end to end: results a sweep's readers read, one system with the sweep, failures."""

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.testing
import pytest
import safetensors.torch
import torch
from small_finetune import BT, made, written

from embrm.cache.reader import open_cache
from embrm.cache.tensors import to_tensor
from embrm.core.errors import UserError
from embrm.finetuning import finetuner, inputs, setup
from embrm.finetuning.batches import pad_texts
from embrm.finetuning.inference import score_texts
from embrm.finetuning.inputs import read_inputs
from embrm.finetuning.losses import StepLoss
from embrm.finetuning.model import load_tuned, new_model
from embrm.finetuning.run import finetune
from embrm.lm.loading import load_model
from embrm.reports.run import report
from embrm.results.ledger import open_results
from embrm.sweeps.execute import sweep

HEADS = """
[defaults]
epochs = 3
batch_pairs = 16
lr = 0.01
label_noise = 0.1
[[runs]]
name = "bt"
weight_decay = 0.1
warmup = 0.2
schedule = "cosine"
[[runs]]
name = "mlp"
head = { kind = "mlp", widths = [6], dropout = 0.2 }
loss = "logitnorm"
bsr = 0.05
patience = 1
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    spec = written(tmp_path_factory.mktemp("tuned") / "full.toml")
    return finetune(spec, cache, device="cpu")


def _weights(folder: Path, run_id: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "weights" / f"{run_id}.safetensors")


def test_frozen_it_is_the_sweep(cache: Path, tmp_path: Path) -> None:
    swept = open_results(sweep(written(tmp_path / "swept.toml", HEADS), cache, jobs=1))
    spec = written(tmp_path / "frozen.toml", HEADS, tune="frozen", micro_pairs=4)
    with pytest.raises(UserError, match="swept holds the results of a sweep: choose another"):
        finetune(spec, cache, out=swept.folder, device="cpu")
    frozen = open_results(finetune(spec, cache, device="cpu"))
    for config in ("bt", "mlp"):
        row, other = (found.find(f"{config}@0") for found in (swept, frozen))
        expected = _weights(swept.folder, row["run_id"])
        found = _weights(frozen.folder, other["run_id"])
        assert found.keys() == {f"head.{name}" for name in expected}
        for name, tensor in expected.items():
            assert (found[f"head.{name}"] - tensor).norm() < 1e-4 * tensor.norm(), name
        for name in ("epochs", "best_epoch", "train_pairs", "validation_pairs", "bsr_effective"):
            assert other[name] == row[name], name
        for name in ("train_loss", "validation_nll", "nll@id", "accuracy@id"):
            assert other[name] == pytest.approx(row[name], rel=1e-4), name
        geometry = [
            found.geometry.filter(run_id=own["run_id"]).sort("split").drop("run_id")
            for found, own in ((swept, row), (frozen, other))
        ]
        polars.testing.assert_frame_equal(*geometry, rel_tol=1e-3)
        assert geometry[0]["split"].to_list() == ["id", "train"]


def test_geometry_is_of_states_that_the_backbone_moved(tuned: Path, cache: Path) -> None:
    results = open_results(tuned)
    [path] = (tuned / "weights").iterdir()
    model, _ = load_tuned(path, load_model(cache.parent / "model", dtype="float32", device="cpu"))
    encoded = read_inputs(tuned.with_suffix(".toml"), cache).texts.encoded
    opened = open_cache(cache)
    pairs = opened.pairs.filter(pl.col("split") == "id")
    rows = np.union1d(pairs["chosen"], pairs["rejected"])  # fewer than a sample has
    found = [pad_texts([encoded[row]]) for row in rows]
    with torch.no_grad():
        after = torch.cat([model.pooled(one["ids"], one["final"]) for one in found])
        r = torch.cat([model(**one)[0] for one in found]).numpy()
    before = to_tensor(opened.stored_states("last"))[torch.from_numpy(rows).long()]
    row = results.geometry.row(by_predicate=pl.col("split") == "id", named=True)
    assert row["responses"] == len(rows)
    assert row["norm"] == pytest.approx(float(after.norm(dim=1).mean()), rel=1e-5)
    moved = ((after - before).norm(dim=1) / before.norm(dim=1)).mean()
    assert row["drift"] == pytest.approx(float(moved), rel=1e-4)
    assert row["drift"] > 0.01
    S = opened.responses["S"].to_numpy()[rows]
    assert row["corr_S"] == pytest.approx(np.corrcoef(r, S)[0, 1], rel=1e-4)
    assert row["kl_tokens"] is None


def test_results_are_read_as_a_sweeps(tuned: Path) -> None:
    results = open_results(tuned)
    row = results.find("bt@0")
    assert row["status"] == "ok"
    assert row["numerics"] == "cpu float32"
    assert row["accuracy@id"] is not None
    assert results.curves["epoch"].to_list() == [1, 2]
    assert set(results.outcomes["split"]) == {"id"}
    assert json.loads((tuned / "sweep.json").read_bytes())["finetune"]["tune"] == "full"
    assert report(tuned).files
    assert not (tuned / "checkpoints").exists()


def test_the_ledger_is_of_the_stored_weights(tuned: Path, cache: Path) -> None:
    row = open_results(tuned).find("bt@0")
    path = tuned / "weights" / f"{row['run_id']}.safetensors"
    base = load_model(cache.parent / "model", dtype="float32", device="cpu")
    model, header = load_tuned(path, base)
    assert header["tune"] == "full"
    assert header["cache_id"] == row["cache_id"]
    encoded = read_inputs(tuned.with_suffix(".toml"), cache).texts.encoded
    rows = [*range(len(encoded))]
    r = score_texts(model, encoded, rows, dtype=torch.float32, device=torch.device("cpu"))
    pairs = open_cache(cache).pairs.filter(pl.col("split") == "id")
    delta = r[pairs["chosen"].to_numpy()] - r[pairs["rejected"].to_numpy()]
    label, weight = pairs["label"].to_numpy(), pairs["weight"].to_numpy()
    nll = label * np.logaddexp(0, -delta) + (1 - label) * np.logaddexp(0, delta)
    assert row["nll@id"] == pytest.approx(float((weight * nll).sum() / weight.sum()), rel=1e-5)
    # In batches of any size, and alone.
    alone = [
        float(score_texts(model, encoded, [n], dtype=torch.float32, device=torch.device("cpu"))[0])
        for n in rows[:5]
    ]
    assert r[:5] == pytest.approx(alone, abs=1e-5)


def test_a_finished_folder_is_left_as_it_is(
    tuned: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched() -> dict[str, int]:
        return {
            str(path): path.stat().st_mtime_ns
            for path in tuned.rglob("*.*")
            if "parts" in path.parts or "weights" in path.parts
        }

    before = untouched()
    monkeypatch.setattr(inputs, "load_model", None)  # nothing is trained, so nothing is loaded
    assert finetune(tuned.with_suffix(".toml"), cache, device="cpu") == tuned
    assert untouched() == before


def test_lora_is_merged_into_what_it_changed(cache: Path, tmp_path: Path) -> None:
    lora = '[lora]\nrank = 2\nalpha = 8\ntargets = ["q_proj", "down_proj"]\n'
    spec = written(tmp_path / "lora.toml", lora + BT, tune="lora", gradient_checkpointing=True)
    results = open_results(finetune(spec, cache, device="cpu"))
    tensors = _weights(results.folder, results.ledger["run_id"][0])
    changed = {name for name in tensors if name.startswith("backbone.")}
    assert changed == {
        f"backbone.layers.{layer}.{name}.weight"
        for layer in range(3)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    base = load_model(cache.parent / "model", dtype="float32", device="cpu")
    for name in changed:
        difference = tensors[name] - base.base_model.state_dict()[name.removeprefix("backbone.")]
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 2


def test_bfloat16_stays_near_float32(tuned: Path, cache: Path, tmp_path: Path) -> None:
    folder = finetune(written(tmp_path / "bf.toml", dtype="bfloat16"), cache, device="cpu")
    rows = [open_results(one).find("bt@0") for one in (tuned, folder)]
    assert rows[1]["numerics"] == "cpu bfloat16"
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=0.05)
    assert rows[1]["train_loss"] != rows[0]["train_loss"]
    tensors = _weights(folder, rows[1]["run_id"])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_dtype_is_the_specs_and_not_the_launchers(
    tuned: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    folder = finetune(written(tmp_path / "full.toml"), cache, device="cpu")
    rows = [open_results(one).find("bt@0") for one in (tuned, folder)]
    assert rows[0]["train_loss"] == rows[1]["train_loss"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    two = BT + '[[runs]]\nname = "other"\nbsr = 0.1\n'
    spec = written(tmp_path / "wild.toml", two, save_steps=2)
    call, calls = StepLoss.__call__, 0

    def fourth_is_nan(self: StepLoss, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, R = call(self, *arguments, **named)
        return (loss * float("nan") if calls == 4 else loss), R

    made: list[weakref.ref[torch.nn.Module]] = []

    def alone(*arguments: Any, **named: Any) -> Any:
        assert not any(model() for model in made), "two models at once"
        model = new_model(*arguments, **named)
        made.append(weakref.ref(model))
        return model

    gc.disable()  # or chance would free what the stage must
    request.addfinalizer(gc.enable)
    monkeypatch.setattr(setup, "new_model", alone)
    monkeypatch.setattr(StepLoss, "__call__", fourth_is_nan)
    with pytest.raises(
        UserError, match=r"1 of 2 runs failed: bt seed 0: the loss of step 4 is not"
    ) as raised:
        finetune(spec, cache, device="cpu")
    (checkpoints,) = (tmp_path / "wild" / "checkpoints").iterdir()
    assert str(raised.value).endswith(f"is kept in {checkpoints}")
    folder = tmp_path / "wild"
    assert [path.name for path in folder.glob("checkpoints/*/checkpoint-*")] == ["checkpoint-2"]
    assert open_results(folder).ledger["config"].to_list() == ["other"]
    finetune(spec, cache, device="cpu")
    assert set(open_results(folder).ledger["config"]) == {"bt", "other"}


def test_out_of_memory_says_what_to_lower(
    tuned: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StepLoss, "__call__", full)
    with pytest.raises(
        UserError, match="out of memory with micro_pairs = 4: lower it, or set grad"
    ):
        finetune(written(tmp_path / "oom.toml", micro_pairs=4), cache, device="cpu")
    least = {"tune": "lora", "micro_pairs": 1, "gradient_checkpointing": True}
    with pytest.raises(UserError, match="with micro_pairs = 1: take a larger GPU"):
        finetune(written(tmp_path / "least.toml", **least), cache, device="cpu")
    monkeypatch.setattr(setup, "RewardTrainer", full)
    with pytest.raises(UserError, match="out of memory with the weights alone, which nothing in"):
        finetune(tmp_path / "oom.toml", cache, device="cpu")
    monkeypatch.setattr(finetuner, "score_texts", full)
    (run_id,) = open_results(tuned).ledger["run_id"]
    with pytest.raises(UserError, match="out of memory in evaluation: take a larger GPU"):
        finetuner.Finetuner(read_inputs(tmp_path / "oom.toml", cache), tmp_path, "cpu")._evaluate(
            tuned / "weights" / f"{run_id}.safetensors"
        )


def test_a_full_disk_is_one_line(
    cache: Path, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    out = small_disk(64) / "out"  # no room for the weights of the first checkpoint
    spec = written(tmp_path / "full.toml", save_steps=2)
    with pytest.raises(UserError, match=r"disk full while writing .*checkpoint-2: fin") as raised:
        finetune(spec, cache, out=out, device="cpu")
    assert "\n" not in str(raised.value)
