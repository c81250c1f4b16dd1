"""One pack of work: train its runs, evaluate them, and hand back the files to keep."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embrm.evaluate.calibration import fit_temperature
from embrm.evaluate.geometry import sample
from embrm.specs import canonical_json, content_id
from embrm.sweep.geometry import Geometry, Sample
from embrm.sweep.grid import Run, RunSpec
from embrm.sweep.ledger import OUTCOMES_SCHEMA, TABLES, parquet, training_name, weights_file
from embrm.sweep.material import Material, to_pairs
from embrm.train import numerics
from embrm.train.bank import Trained, TrainingData, train
from embrm.train.heads import score, stack
from embrm.train.numerics import Numerics
from embrm.train.states import States

Rewards = NDArray[np.float32]

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

_CURVES = pl.Schema(
    {
        "run_id": pl.String(),
        "epoch": pl.Int64(),
        "step": pl.Int64(),
        "train_loss": pl.Float64(),
        "regularizer": pl.Float64(),
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


class Trainer:
    """Trains and evaluates packs on one material, in a process begun with `numerics`."""

    def __init__(self, material: Material, mode: Numerics) -> None:
        self._material, self._mode = material, mode
        self._states: dict[str, States] = {}
        self._tokens = material.tokens.open() if material.tokens else None
        self._data: dict[tuple[str, int | None, float], TrainingData] = {}
        self._training, self._validation = material.pairs("training"), material.pairs("validation")
        self._splits = material.splits()
        self._label = self._validation["label"].to_numpy()
        self._weight = self._validation["weight"].to_numpy()
        samples = self._samples()
        # Rewards are wanted of these responses alone.
        sides = [self._validation[side].to_numpy() for side in ("chosen", "rejected")]
        split_rows = [split.rows for split in self._splits.values()]
        sampled = [own.rows.numpy() for own in samples.values()]
        rows = np.unique(np.concatenate([*sides, *split_rows, *sampled]).astype(np.int64))
        self._rows = torch.from_numpy(rows)
        self._chosen, self._rejected = (np.searchsorted(rows, side) for side in sides)
        self._places = {
            name: np.searchsorted(rows, split.rows) for name, split in self._splits.items()
        }
        self._geometry = Geometry(samples, self._tokens)
        self._sampled = {
            name: np.searchsorted(rows, own.rows.numpy()) for name, own in samples.items()
        }

    def run(self, pack: Pack) -> dict[str, bytes]:
        """Train and evaluate `pack`: the files to write below the results folder, in order."""
        start = time.time()
        asked = pack.runs[0].spec
        data = self._training_data(asked)
        trained = _train([run.spec for run in pack.runs], data)
        after_training = time.time()
        rewards = self._rewards(trained, data)
        after_scoring = time.time()
        files: dict[str, bytes] = {}
        ledger: list[dict[str, Any]] = []
        curves: list[dict[str, Any]] = []
        outcomes: list[dict[str, Any]] = []
        cache_id = self._material.selection.cache_id
        for run, result, own in zip(pack.runs, trained, rewards, strict=True):
            row = {"cache_id": cache_id, **self._outcome(run, result, own is not None, data)}
            curves += [{"run_id": run.run_id, **point} for point in result.curve]
            if own is not None:
                row["temperature"] = temperature = self._temperature(own)
                content, row["weights_sha256"] = weights_file(
                    run, cache_id, result.parameters, result.preprocess
                )
                files[f"weights/{run.run_id}.safetensors"] = content
                for name, split in self._splits.items():
                    metrics, sums = split.evaluate(own[self._places[name]], temperature)
                    row |= {f"{metric}@{name}": value for metric, value in metrics.items()}
                    outcomes.append({"run_id": run.run_id, "split": name, **sums})
            ledger.append(row)
        geometry = self._measured(pack, trained, rewards, data)
        end = time.time()
        runs = len(pack.runs)
        tables = {
            "curves": pl.DataFrame(curves, schema=_CURVES),
            "outcomes": pl.DataFrame(
                {name: [row[name] for row in outcomes] for name in OUTCOMES_SCHEMA},
                schema=OUTCOMES_SCHEMA,
            ),
            "geometry": geometry,
            "timings": pl.DataFrame(
                {
                    "run_id": [run.run_id for run in pack.runs],
                    "started": start,
                    "seconds": (end - start) / runs,
                    "train_seconds": (after_training - start) / runs,
                    "score_seconds": (after_scoring - after_training) / runs,
                    "evaluate_seconds": (end - after_scoring) / runs,
                    "pack_seconds": end - start,
                    "pack_runs": runs,
                }
            ),
            "ledger": _ledger(ledger),
        }
        folder = f"parts/{pack.pack_id}"
        return files | {f"{folder}/{name}.parquet": parquet(tables[name]) for name in TABLES}

    def _samples(self) -> dict[str, Sample]:
        """What geometry is measured on: of every split, and of the training pairs' responses,
        whatever a run's limit."""
        trained_on = [self._training[side].to_numpy() for side in ("chosen", "rejected")]
        responses = self._material.responses()
        lengths, S = (responses[name].cast(pl.Float64).to_numpy() for name in responses.columns)
        name = training_name(self._material.selection.train)
        every = {name: np.unique(np.concatenate(trained_on).astype(np.int64))}
        every |= {name: split.rows for name, split in self._splits.items()}
        some = {name: sample(rows) for name, rows in every.items()}
        return {
            name: Sample(torch.from_numpy(rows), lengths[rows], S[rows])
            for name, rows in some.items()
        }

    def _measured(
        self,
        pack: Pack,
        trained: Sequence[Trained],
        rewards: Sequence[Rewards | None],
        data: TrainingData,
    ) -> pl.DataFrame:
        """Geometry of the runs that did not diverge."""
        heads, rewarded = {}, {}
        for run, result, own in zip(pack.runs, trained, rewards, strict=True):
            if own is not None:
                heads[run.run_id] = result.parameters
                rewarded[run.run_id] = {name: own[at] for name, at in self._sampled.items()}
        spec, preprocess = pack.runs[0].spec, trained[0].preprocess
        return self._geometry.measure(spec, data.states, preprocess, heads, rewarded)

    def _training_data(self, spec: RunSpec) -> TrainingData:
        key = view, pairs_limit, noise = spec.data_key()
        if key not in self._data:
            if view not in self._states:
                self._states[view] = self._on_device(self._material.states[view].open())
            self._data[key] = TrainingData(
                self._states[view],
                to_pairs(self._training.head(pairs_limit or self._training.height), noise),
                to_pairs(self._validation),
                self._tokens,
            )
        return self._data[key]

    def _on_device(self, states: States) -> States:
        device = numerics.device(self._mode)
        return states if device.type == "cpu" else States(states.values.to(device))

    def _rewards(self, trained: Sequence[Trained], data: TrainingData) -> list[Rewards | None]:
        """Rewards of the responses `_rows` under every run; None where not all are finite."""
        rewards: list[Rewards | None] = [None] * len(trained)
        good = [index for index, result in enumerate(trained) if result.diverged is None]
        if good:
            bank = stack([trained[index].parameters for index in good])
            scored = score(bank, trained[0].preprocess, data.states, self._rows)
            of_runs = scored.unflatten(0, (len(good), -1)).mean(1).numpy()
            for index, own in zip(good, of_runs, strict=True):
                rewards[index] = own if np.isfinite(own).all() else None
        return rewards

    def _temperature(self, rewards: Rewards) -> float:
        """Fitted on the validation pairs; a soft label counts for both directions."""
        margins = rewards[self._chosen].astype(np.float64) - rewards[self._rejected]
        label, weight = self._label, self._weight
        if (label == 1).all():
            return fit_temperature(margins, weight)
        return fit_temperature(
            np.concatenate([margins, -margins]),
            np.concatenate([weight * label, weight * (1 - label)]),
        )

    def _outcome(
        self, run: Run, result: Trained, finite: bool, data: TrainingData
    ) -> dict[str, Any]:
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
            "numerics": numerics.in_use(self._mode),
        }


def _train(specs: Sequence[RunSpec], data: TrainingData) -> list[Trained]:
    """Train the runs of a pack, ensembles one member after the other.

    An ensemble's parameters are its members', [members, ...]; its curve and best epoch are the
    first member's, and it has diverged where any member has.
    """
    members = [
        train([spec.member(number) for spec in specs], data) for number in range(specs[0].members)
    ]
    return [_ensemble(heads) for heads in zip(*members, strict=True)]


def _ensemble(heads: Sequence[Trained]) -> Trained:
    diverged = next((head.diverged for head in heads if head.diverged is not None), None)
    if len(heads) == 1 or heads[0].diverged is not None:
        return heads[0]
    if diverged is not None:
        return replace(heads[0], parameters={}, best_epoch=0, diverged=diverged)
    return replace(heads[0], parameters=stack([head.parameters for head in heads]))


def _ledger(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    metrics = dict.fromkeys(name for row in rows for name in row if "@" in name)
    schema = _LEDGER | dict.fromkeys(metrics, pl.Float64())
    return pl.DataFrame(rows, schema=schema).with_columns(pl.col(pl.Float64).fill_nan(None))
