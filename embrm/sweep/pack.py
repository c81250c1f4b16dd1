"""One pack of work: select its pairs, train, evaluate, and hand back the files to keep."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embrm.cache.reader import Cache, open_cache
from embrm.data.splits import holdout
from embrm.errors import UserError
from embrm.evaluate.accuracy import PROMPT_SCHEMA, evaluate_split
from embrm.evaluate.calibration import fit_temperature
from embrm.specs import canonical_json, content_id
from embrm.sweep.grid import Run, Selection
from embrm.sweep.ledger import TABLES, parquet, weights_file
from embrm.train import numerics
from embrm.train.bank import Trained, TrainingData, train
from embrm.train.heads import score, stack
from embrm.train.objectives import Pairs

Rewards = NDArray[np.float32]
Split = tuple[pl.DataFrame, pl.DataFrame]

_LEDGER: dict[str, Any] = {
    "run_id": pl.String(),
    "config_id": pl.String(),
    "config": pl.String(),
    "seed": pl.Int64(),
    "cache_id": pl.String(),
    "status": pl.String(),
    "diverged_epoch": pl.Int64(),
    "state": pl.String(),
    "head": pl.String(),
    "loss": pl.String(),
    "spec": pl.String(),
    "bsr_effective": pl.Float64(),
    "train_pairs": pl.Int64(),
    "validation_pairs": pl.Int64(),
    "epochs": pl.Int64(),
    "best_epoch": pl.Int64(),
    "train_loss": pl.Float64(),
    "validation_nll": pl.Float64(),
    "validation_accuracy": pl.Float64(),
    "temperature": pl.Float64(),
    "weights_sha256": pl.String(),
    "numerics": pl.String(),
}

_PROMPTS = pl.Schema({"run_id": pl.String(), "split": pl.String(), **PROMPT_SCHEMA})

_CURVES = pl.Schema(
    {
        "run_id": pl.String(),
        "epoch": pl.Int64(),
        "step": pl.Int64(),
        "train_loss": pl.Float64(),
        "validation_nll": pl.Float64(),
        "validation_accuracy": pl.Float64(),
        "reward_mean": pl.Float64(),
        "reward_sd": pl.Float64(),
        "weight_norm": pl.Float64(),
    }
)


@dataclass(frozen=True)
class Pack:
    """Runs trained together: equal in state, pairs and `TrainSpec.pack_key`."""

    runs: tuple[Run, ...]

    @property
    def pack_id(self) -> str:
        """Name of its part folder."""
        return content_id([run.run_id for run in self.runs])


def select(
    cache: Cache, selection: Selection, pairs_limit: int | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Training and validation pairs of `cache`, both sorted by pair id.

    The sides are split by prompt; the limit takes the first training pairs by pair id, a hash,
    and leaves the validation pairs alone.
    """
    pairs = cache.pairs.filter(pl.col("split").is_in(selection.train)).sort("pair_id")
    held = pl.Series(holdout(pairs["prompt_id"], selection.validation, 0))
    training = pairs.filter(~held)
    return training.head(pairs_limit or training.height), pairs.filter(held)


@lru_cache(maxsize=1)
def open_once(folder: Path, cache_id: str) -> Cache:
    cache = open_cache(folder)
    if cache.cache_id != cache_id:
        raise UserError(f"{folder} changed during the sweep: run it again")
    return cache


@lru_cache(maxsize=1)
def states_once(folder: Path, cache_id: str, view: str) -> torch.Tensor:
    return open_once(folder, cache_id).states(view)


@lru_cache(maxsize=1)
def evaluation_splits(
    folder: Path, selection: Selection
) -> dict[str, tuple[pl.DataFrame, pl.DataFrame]]:
    """Pairs and members of every split that is not trained on."""
    cache = open_once(folder, selection.cache_id)
    return {
        split: (
            cache.pairs.filter(pl.col("split") == split),
            cache.members.filter(pl.col("split") == split),
        )
        for split in cache.splits
        if split not in selection.train
    }


def run_pack(folder: Path, selection: Selection, pack: Pack) -> dict[str, bytes]:
    """Train and evaluate `pack`: the files to write below the results folder, in order."""
    start = time.time()
    cache = open_once(folder, selection.cache_id)
    asked = pack.runs[0].spec
    states = states_once(folder, selection.cache_id, asked.state)
    training, validation = select(cache, selection, asked.pairs_limit)
    data = TrainingData(states, to_pairs(training), to_pairs(validation))
    trained = train([run.spec for run in pack.runs], data)
    rewards = _all_rewards(trained, states)
    files: dict[str, bytes] = {}
    ledger: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    prompts: list[pl.DataFrame] = []
    for run, result, own in zip(pack.runs, trained, rewards, strict=True):
        row = {"cache_id": selection.cache_id, **_outcome(run, result, own is not None, data)}
        curves += [{"run_id": run.run_id, **point} for point in result.curve]
        if own is not None:
            row["temperature"] = temperature = _temperature(own, validation)
            content, row["weights_sha256"] = weights_file(
                run, selection.cache_id, result.parameters, result.preprocess
            )
            files[f"weights/{run.run_id}.safetensors"] = content
            for split, (pairs, members) in evaluation_splits(folder, selection).items():
                metrics, table = evaluate_split(
                    pairs, members, cache.responses["n_response"].to_numpy(), own, temperature
                )
                row |= {f"{name}@{split}": value for name, value in metrics.items()}
                identity = [pl.lit(run.run_id).alias("run_id"), pl.lit(split).alias("split")]
                prompts.append(table.select(*identity, pl.all()))
        ledger.append(row)
    seconds = time.time() - start
    tables = {
        "curves": pl.DataFrame(curves, schema=_CURVES),
        "prompts": pl.concat([_PROMPTS.to_frame(), *prompts]),
        "timings": pl.DataFrame(
            {
                "run_id": [run.run_id for run in pack.runs],
                "started": start,
                "seconds": seconds / len(pack.runs),
                "pack_seconds": seconds,
                "pack_runs": len(pack.runs),
            }
        ),
        "ledger": _ledger(ledger),
    }
    folder_of = f"parts/{pack.pack_id}"
    return files | {f"{folder_of}/{name}.parquet": parquet(tables[name]) for name in TABLES}


def to_pairs(table: pl.DataFrame) -> Pairs:
    def tensor(column: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(table[column].to_numpy(), dtype=dtype)

    return Pairs(
        chosen=tensor("chosen", torch.int64),
        rejected=tensor("rejected", torch.int64),
        label=tensor("label", torch.float32),
        weight=tensor("weight", torch.float32),
        margin=None if table["margin"].null_count() else tensor("margin", torch.float32),
    )


def _all_rewards(trained: Sequence[Trained], states: torch.Tensor) -> list[Rewards | None]:
    """Rewards of every response under every run; None where they are not all finite."""
    rewards: list[Rewards | None] = [None] * len(trained)
    good = [index for index, result in enumerate(trained) if result.diverged is None]
    if good:
        bank = stack([trained[index].parameters for index in good])
        scored = score(bank, trained[0].preprocess, states).numpy()
        for index, own in zip(good, scored, strict=True):
            rewards[index] = own if np.isfinite(own).all() else None
    return rewards


def _temperature(rewards: Rewards, validation: pl.DataFrame) -> float:
    """Fitted on the validation pairs; a soft label counts for both directions."""
    margins = rewards[validation["chosen"].to_numpy()].astype(np.float64)
    margins -= rewards[validation["rejected"].to_numpy()]
    label, weight = validation["label"].to_numpy(), validation["weight"].to_numpy()
    if (label == 1).all():
        return fit_temperature(margins, weight)
    return fit_temperature(
        np.concatenate([margins, -margins]), np.concatenate([weight * label, weight * (1 - label)])
    )


def _outcome(run: Run, result: Trained, finite: bool, data: TrainingData) -> dict[str, Any]:
    """The ledger's row of a run, without evaluation."""
    spec = run.spec
    diverged = result.diverged if finite or result.diverged else result.best_epoch
    best = result.curve[result.best_epoch - 1] if finite else {}
    kept = ("train_loss", "validation_nll", "validation_accuracy")
    return {
        "run_id": run.run_id,
        "config_id": run.config_id,
        "config": run.name,
        "seed": spec.seed,
        "status": "ok" if finite else "diverged",
        "diverged_epoch": diverged,
        "state": spec.state,
        "head": str(spec.head),
        "loss": spec.loss,
        "spec": canonical_json(spec.model_dump(mode="json")),
        "bsr_effective": spec.bsr_effective(min(spec.batch_pairs, len(data.train))),
        "train_pairs": len(data.train),
        "validation_pairs": len(data.validation),
        "epochs": len(result.curve),
        "best_epoch": result.best_epoch if finite else None,
        **{name: best.get(name) for name in kept},
        "numerics": numerics.in_use(),
    }


def _ledger(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    metrics = dict.fromkeys(name for row in rows for name in row if "@" in name)
    schema = _LEDGER | dict.fromkeys(metrics, pl.Float64())
    return pl.DataFrame(rows, schema=schema).with_columns(pl.col(pl.Float64).fill_nan(None))
