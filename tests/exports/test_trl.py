"""TRL takes an exported folder as it is, and its trainers see the rewards that embrm sees."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from export_world import write_sweep

from embrm.exports.exported import load_exported
from embrm.exports.run import export
from embrm.exports.run_model import open_run_model

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl", reason="TRL is not installed here: pip install '.[finetune]'")

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and what it imports

QUIET: dict[str, Any] = {
    "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep, with its run "bt" exported to rm."""
    folder = tmp_path_factory.mktemp("trl") / "world"
    results = write_sweep(folder, "bt")
    export(results, "bt@0", folder / "rm", device="cpu")
    return folder


def conversations(world: Path) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """The cache's pairs as TRL's conversations, and their rewards by the sweep, [pairs, 2]."""
    trained = open_run_model(world / "sweep", "bt@0")
    prepared = trained.prepared(None)
    rewards = trained.cached_rewards(range(len(prepared.encoded)))
    texts = prepared.dataset.responses
    pairs = prepared.dataset.pairs.select("chosen", "rejected")
    rows = [
        {
            "prompt": [{"role": "user", "content": texts["prompt"][chosen]}],
            "chosen": [{"role": "assistant", "content": texts["response"][chosen]}],
            "rejected": [{"role": "assistant", "content": texts["response"][rejected]}],
        }
        for chosen, rejected in pairs.rows()
    ]
    return rows, rewards[torch.from_numpy(pairs.cast(pl.Int64).to_numpy())]


def test_the_reward_trainer_evaluates_to_the_rewards_of_the_run(
    world: Path, tmp_path: Path
) -> None:
    rows, rewards = conversations(world)
    data = datasets.Dataset.from_list(rows)
    trainer = trl.RewardTrainer(
        model=str(world / "rm"),
        args=trl.RewardConfig(
            output_dir=str(tmp_path), per_device_eval_batch_size=len(rows), max_length=None, **QUIET
        ),
        train_dataset=data,
        eval_dataset=data,
    )
    found = trainer.evaluate()
    won, lost = rewards.T
    expected = {
        "min_reward": rewards.min(),
        "mean_reward": rewards.mean(),
        "max_reward": rewards.max(),
        "margin": (won - lost).mean(),
        "accuracy": (won > lost).float().mean(),
        "loss": -torch.nn.functional.logsigmoid(won - lost).mean(),
    }
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(float(value), abs=1e-4), name


def test_grpo_is_rewarded_as_the_run_would(world: Path, tmp_path: Path) -> None:
    """A folder as reward_funcs: no function of ours stands between."""
    rows, rewards = conversations(world)
    prompts = [row["prompt"] for row in rows]
    trainer = trl.GRPOTrainer(
        model=str(world / "model"),
        reward_funcs=str(world / "rm"),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2, **QUIET
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )
    assert trainer.reward_funcs[0].config.pad_token_id == 0
    completions = [row["chosen"] for row in rows]
    found = trainer._calculate_rewards(
        [{"prompt": prompt} for prompt in prompts], prompts, completions, [[0]] * len(rows)
    )
    assert (found[:, 0].cpu() - rewards[:, 0]).abs().max() < 1e-4


def test_plain_text_wants_its_eos(world: Path) -> None:
    """TRL's online trainers append none to plain text: the reward is then of another token."""
    exported = load_exported(world / "rm", device="cpu")
    eos = exported.tokenizer.eos_token
    with torch.no_grad():
        values = [
            float(exported.model(**exported.tokenizer(f"a page{end}", return_tensors="pt")).logits)
            for end in ("", eos)
        ]
    assert abs(values[0] - values[1]) > 1e-3
