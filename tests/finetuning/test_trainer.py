"""The trainer: step for step TRL's, and the same however a minibatch is cut or shared."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_finetune import weights, weights_are_close, with_groups, written
from torch import Tensor

from embrm.cache.reader import open_cache
from embrm.finetuning import trainer
from embrm.finetuning.inputs import read_inputs
from embrm.finetuning.run import finetune
from embrm.results.ledger import open_results
from embrm.sweeps.selection import select
from embrm.training.heads import initialise
from embrm.training.order import Order
from embrm.training.row_store import RowStore

ONE_EPOCH = """
[defaults]
epochs = 1
batch_pairs = 8
lr = 0.003
weight_decay = 0.1
pairs_limit = 30
[[runs]]
name = "bt"
"""
EVERYTHING = """
[defaults]
epochs = 2
batch_pairs = 8
lr = 0.003
pairs_limit = 21
[[runs]]
name = "bt"
head = { kind = "mlp", widths = [6], dropout = 0.3 }
bsr = 0.3
centering = 0.1
weight_decay = 0.1
regularizer = { kind = "grm-dpo", alpha = 0.2 }
[[runs]]
name = "ahead"
epochs = 1
bsr = 0.1
simcse = { of = "responses", dropout = 0.2, temperature = 0.3 }
metarm = { split = "far", eta = 0.05, responses = 3, prompts = 3 }
"""
"""The last minibatch has 5 pairs: one and a quarter micro-batch of 4, and of two processes' shares
the second is smaller."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_groups(tmp_path_factory.mktemp("world"))


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of every step that is trained from now on."""
    found: list[float] = []
    sum_over_processes = trainer.sum_over_processes

    def noted(value: Tensor) -> Tensor:
        result = sum_over_processes(value)
        if value.shape == (2,):
            found.append(float(result[0]))
        return result

    monkeypatch.setattr(trainer, "sum_over_processes", noted)
    return found


def test_bt_is_trls_reward_trainer_step_for_step(
    cache: Path, tmp_path: Path, losses: list[float]
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    # TRL knows neither weights nor soft labels: the data's are left out.
    data = [{"path": str(cache.parent / "pairs.jsonl"), "columns": {"label": "", "weight": ""}}]
    plain = made_again(cache, tmp_path, data)
    spec = written(tmp_path / "bt.toml", ONE_EPOCH)
    folder = finetune(spec, plain, device="cpu")

    opened = open_cache(plain)
    inputs = read_inputs(spec, plain)
    training = select(opened, inputs.selection)[0].head(30)
    chosen = torch.tensor(training["chosen"].to_numpy().astype(np.int64))
    states = RowStore(torch.empty(0, opened.width))
    order = torch.cat([*Order(chosen, states, 0).minibatches(1, 8)]).tolist()
    ids = [entry.ids.tolist() for entry in inputs.texts.encoded]
    rows = [
        {"chosen_ids": ids[training["chosen"][n]], "rejected_ids": ids[training["rejected"][n]]}
        for n in order
    ]
    model = AutoModelForSequenceClassification.from_pretrained(
        cache.parent / "model", num_labels=1, dtype=torch.float32
    )
    head = initialise(inputs.runs[0].spec.head, opened.width, 0)["output.weight"]
    with torch.no_grad():
        model.score.weight.copy_(head)
    theirs = RewardTrainer(
        model,
        RewardConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=8,
            learning_rate=0.003,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            max_grad_norm=1.0,
            num_train_epochs=1,
            optim="adamw_torch",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            dataset_num_proc=None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(cache.parent / "model"),
    )
    theirs.train()
    expected = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert len(expected) == -(-len(rows) // 8) > 3
    assert len(rows) % 8  # the last minibatch is a smaller one
    assert losses == pytest.approx(expected, rel=2e-5)
    ours = {name.removeprefix("bt "): tensor for name, tensor in weights(folder).items()}
    found = {f"backbone.{n}": t.detach() for n, t in theirs.model.model.named_parameters()}
    found["head.output.weight"] = theirs.model.score.weight.detach()
    weights_are_close(ours, found, cache.parent)


def made_again(cache: Path, folder: Path, data: list[dict[str, Any]]) -> Path:
    """Another cache of the same model."""
    from embrm.extraction.run import extract
    from embrm.extraction.spec import ExtractSpec

    values = open_cache(cache).manifest.extraction | {"data": data}
    return extract(ExtractSpec.parse(values, "test"), folder / "cache", device="cpu")


@pytest.mark.slow
def test_a_minibatch_is_the_same_however_it_is_cut_or_shared(
    cache: Path, tmp_path: Path, losses: list[float]
) -> None:
    whole = finetune(written(tmp_path / "whole.toml", EVERYTHING), cache, device="cpu")
    of_whole = [losses.pop(0) for _ in range(len(losses))]
    cut = finetune(written(tmp_path / "cut.toml", EVERYTHING, micro_pairs=4), cache, device="cpu")
    assert losses == pytest.approx(of_whole, rel=1e-5)
    shared = written(tmp_path / "shared.toml", EVERYTHING)
    command = [
        # accelerate starts several processes only where it is told multi_gpu, GPUs or not; on the
        # CPU they talk through gloo.
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0", "--module", "embrm"),
        *("finetune", str(shared), "--cache", str(cache), "--device", "cpu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_alone())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == 1
    both = tmp_path / "shared"
    assert open_results(both).environment["numerics"]["processes"] == 2
    weights_are_close(weights(cut), weights(whole), cache.parent)
    weights_are_close(weights(both), weights(whole), cache.parent)
    expected, ids = open_results(whole), ["run_id", "epoch"]
    for other in (cut, both):
        found = open_results(other)
        assert found.curves.sort(ids)["train_loss"].to_list() == pytest.approx(
            expected.curves.sort(ids)["train_loss"].to_list(), rel=1e-5
        )
        assert found.ledger["nll@id"].to_list() == pytest.approx(
            expected.ledger["nll@id"].to_list(), rel=1e-4
        )


def _alone() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
