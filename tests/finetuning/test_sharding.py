"""Sharded weights: trained, kept and resumed as whole ones are, or refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_finetune import BT, made, weights, weights_are_close, written

from embrm.core.errors import UserError
from embrm.finetuning import trainer
from embrm.finetuning.inputs import read_inputs
from embrm.finetuning.run import finetune
from embrm.results.ledger import open_results

HELPERS = Path(__file__).parents[1] / "helpers"

RUNS = """
[defaults]
epochs = 1
batch_pairs = 8
lr = 0.003
pairs_limit = 21
[[runs]]
name = "bt"
[[runs]]
name = "grm"
head = { kind = "mlp", widths = [6], dropout = 0.3 }
bsr = 0.3
l2 = 0.1
weight_decay = 0.1
regularizer = { kind = "grm-dpo", alpha = 0.2 }
"""
"""Three minibatches each, the last one of 5 pairs; micro-batches of 2 on each of 2 processes."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose LM head is its embedding."""
    return made(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
def test_sharded_weights_are_trained_and_resumed_as_whole_ones(cache: Path, tmp_path: Path) -> None:
    whole = finetune(written(tmp_path / "whole.toml", RUNS), cache, device="cpu")
    spec = written(tmp_path / "sharded.toml", RUNS, micro_pairs=2, save_steps=1)
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--use_fsdp", "--fsdp_version", "2"),
        *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *(str(HELPERS / "sharded_process.py"), str(spec), str(cache)),
    ]
    alone = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | alone
    )
    assert done.returncode == 0, done.stderr
    sharded = tmp_path / "sharded"
    weights_are_close(weights(sharded), weights(whole), cache.parent)
    found, expected, ids = open_results(sharded), open_results(whole), ["run_id", "epoch"]
    for column in ("train_loss", "weight_norm", "validation_nll"):
        assert found.curves.sort(ids)[column].to_list() == pytest.approx(
            expected.curves.sort(ids)[column].to_list(), rel=1e-5
        )
    assert found.ledger["nll@id"].to_list() == pytest.approx(
        expected.ledger["nll@id"].to_list(), rel=1e-4
    )


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"USE_FSDP": "true"}, r"fsdp_version = 1: .*launch it with --fsdp_version 2"),
        ({"USE_DEEPSPEED": "true"}, r"with DeepSpeed .*launch it with --use_fsdp"),
        (
            {"USE_PARALLELISM_CONFIG": "true"},
            r"with a parallelism config .*with --use_fsdp",
        ),
    ],
)
def test_what_would_train_other_weights_is_refused(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: dict[str, str],
    message: str,
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=message):
        read_inputs(written(tmp_path / "full.toml"), cache)


def test_what_fsdp_cannot_wrap_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    read_inputs(written(tmp_path / "full.toml"), cache)
    with pytest.raises(UserError, match=r"tune = 'lora' with FSDP: .*launch it without"):
        read_inputs(written(tmp_path / "lora.toml", tune="lora"), cache)
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    with pytest.raises(UserError, match=r"'SIZE_BASED_WRAP' .*TRANSFORMER_BASED_WRAP"):
        read_inputs(written(tmp_path / "full.toml"), cache)


def test_a_checkpoint_is_resumed_as_it_was_written(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = written(tmp_path / "stopped.toml", BT, save_steps=2)
    end_step = trainer.RewardTrainer.end_step

    def third_is_the_last(self: trainer.RewardTrainer) -> None:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        end_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.RewardTrainer, "end_step", third_is_the_last)
        with pytest.raises(KeyboardInterrupt):
            finetune(spec, cache, device="cpu")
    (marker,) = (tmp_path / "stopped" / "checkpoints").glob("*/checkpoint-2/embrm.json")
    marker.write_text(marker.read_text().replace('"sharded":false', '"sharded":true'))
    with pytest.raises(UserError, match=r"checkpoint-2 was written with FSDP: .*or delete"):
        finetune(spec, cache, device="cpu")
