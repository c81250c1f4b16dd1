"""Training and evaluating one pack: runs that are trained together, one slot of a bank each."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embrm.sweeps.evaluation import Evaluation, Rewards, ledger_row, part_tables
from embrm.sweeps.geometry import Geometry, samples
from embrm.sweeps.ledger import TABLES, parquet
from embrm.sweeps.material import Material, to_pairs
from embrm.sweeps.packs import Pack
from embrm.sweeps.spec import RunSpec
from embrm.sweeps.training_pairs import as_trained, as_validated, bootstrap_rows, gold_as_trained
from embrm.sweeps.weights import weights_file
from embrm.training import numerics
from embrm.training.bank import train
from embrm.training.curve import TrainedRun
from embrm.training.data import TrainingData
from embrm.training.ensembles import Combination, Reference
from embrm.training.heads import score_states, stack
from embrm.training.learner_specs import Learner
from embrm.training.learners import Gold, fit
from embrm.training.numerics import Numerics
from embrm.training.row_store import RowStore
from embrm.training.token_rows import TokenStore


@dataclass(frozen=True)
class _Scored:
    """A run's rewards, float32 [n], and the disagreement of an ensemble's members, float64 [n]."""

    rewards: Rewards
    combination: Combination
    disagreement: NDArray[np.float64] | None


@dataclass(frozen=True)
class _Draw:
    """What the runs of one data seed share: pairs, evaluation splits and measured responses.

    rows: the responses that are scored. sampled: split → places of its measured responses in them.
    """

    training: pl.DataFrame
    validation: pl.DataFrame
    evaluation: Evaluation
    geometry: Geometry
    rows: torch.Tensor
    sampled: dict[str, NDArray[np.int64]]

    @classmethod
    def of(cls, material: Material, tokens: TokenStore | None, data_seed: int) -> "_Draw":
        training, validation = (
            material.pairs(side, data_seed) for side in ("training", "validation")
        )
        splits = material.splits(data_seed)
        found = samples(material.responses(data_seed), training, material.selection.train, splits)
        sampled = {name: own.rows.numpy() for name, own in found.items()}
        evaluation = Evaluation.of(validation, splits, [*sampled.values()])
        rows = evaluation.rows
        return cls(
            training,
            validation,
            evaluation,
            Geometry(found, tokens),
            torch.from_numpy(rows),
            {name: np.searchsorted(rows, own) for name, own in sampled.items()},
        )


class Trainer:
    """Trains and evaluates packs of one sweep, in a process that `numerics.begin` has set up."""

    def __init__(self, material: Material, mode: Numerics) -> None:
        self._material, self._mode = material, mode
        self._states: dict[str, RowStore] = {}
        self._tokens = material.tokens.open() if material.tokens else None
        self._data: dict[tuple[Any, ...], tuple[TrainingData, Evaluation]] = {}
        self._draws: dict[int, _Draw] = {}

    def run(self, pack: Pack) -> dict[str, bytes]:
        """Train and evaluate `pack`; returns the files to write below the results folder."""
        start = time.time()
        asked = pack.runs[0].spec
        draw = self._draw(asked)
        data, evaluation = self._read(asked, draw)
        if asked.learner:
            trained = [self._fitted(asked, asked.learner, data)] * len(pack.runs)
        else:
            trained = self._train([run.spec for run in pack.runs], data, draw)
        after_training = time.time()
        scored = self._scored(pack, trained, data, draw)
        after_scoring = time.time()
        files: dict[str, bytes] = {}
        ledger: list[dict[str, Any]] = []
        curves: list[dict[str, Any]] = []
        outcomes: list[dict[str, Any]] = []
        cache_id = self._material.selection.cache_id
        for run, result, own in zip(pack.runs, trained, scored, strict=True):
            row = ledger_row(
                run,
                result.curve,
                result.best_epoch,
                finite=own is not None,
                diverged=result.diverged,
                cache_id=cache_id,
                train_pairs=0 if asked.learner and asked.learner.reads_gold else len(data.train),
                validation_pairs=len(data.validation),
                bsr_effective=run.spec.bsr_effective(min(run.spec.batch_pairs, len(data.train))),
                numerics=numerics.in_use(self._mode),
            )
            curves += [{"run_id": run.run_id, **point} for point in result.curve]
            if own is not None:
                content, row["weights_sha256"] = weights_file(
                    run,
                    cache_id,
                    result.parameters,
                    result.preprocess,
                    own.combination.reference,
                )
                files[f"weights/{run.run_id}.safetensors"] = content
                columns, sums = evaluation.measure(run.run_id, own.rewards)
                row |= columns
                if own.disagreement is not None:
                    row |= evaluation.disagreement(own.disagreement)
                outcomes += sums
            ledger.append(row)
        geometry = self._measured(pack, trained, scored, data, draw)
        tables = part_tables(
            ledger,
            curves,
            outcomes,
            start=start,
            trained=after_training,
            scored=after_scoring,
            end=time.time(),
        )
        tables["geometry"] = geometry
        folder = f"parts/{pack.pack_id}"
        return files | {f"{folder}/{name}.parquet": parquet(tables[name]) for name in TABLES}

    def _fitted(self, spec: RunSpec, learner: Learner, data: TrainingData) -> TrainedRun:
        gold = None
        if learner.reads_gold:
            table = gold_as_trained(self._material.gold(spec.data_seed), spec)
            gold = Gold(*(torch.tensor(table[name].to_numpy()) for name in ("response", "gold")))
        return fit(learner, spec.preprocess, spec.own_seed, data, gold)

    def _measured(
        self,
        pack: Pack,
        trained: Sequence[TrainedRun],
        scored: Sequence[_Scored | None],
        data: TrainingData,
        draw: _Draw,
    ) -> pl.DataFrame:
        """The geometry of the runs that did not diverge."""
        heads, rewarded = {}, {}
        for run, result, own in zip(pack.runs, trained, scored, strict=True):
            if own is not None:
                heads[run.run_id] = result.parameters
                rewarded[run.run_id] = {n: own.rewards[at] for n, at in draw.sampled.items()}
        spec, preprocess = pack.runs[0].spec, trained[0].preprocess
        return draw.geometry.measure(spec, data.states, preprocess, heads, rewarded)

    def _draw(self, spec: RunSpec) -> _Draw:
        seed = spec.data_seed
        if seed not in self._draws:
            self._draws[seed] = _Draw.of(self._material, self._tokens, seed)
        return self._draws[seed]

    def _read(self, spec: RunSpec, draw: _Draw) -> tuple[TrainingData, Evaluation]:
        """The run's training and validation pairs, and the evaluation that has the latter."""
        key, view = spec.data_key(), spec.state
        if key not in self._data:
            if view not in self._states:
                self._states[view] = self._on_device(self._material.states[view].open())
            labels = self._material.selection.validation_labels
            validation = as_validated(draw.validation, spec, labels)
            data = TrainingData(
                self._states[view],
                to_pairs(as_trained(draw.training, spec)),
                to_pairs(validation),
                self._tokens,
            )
            self._data[key] = data, draw.evaluation.validated_on(validation)
        return self._data[key]

    def _on_device(self, states: RowStore) -> RowStore:
        device = numerics.device(self._mode)
        return states if device.type == "cpu" else RowStore(states.values.to(device))

    def _train(self, specs: Sequence[RunSpec], data: TrainingData, draw: _Draw) -> list[TrainedRun]:
        """Train the runs of a pack; the members of ensembles one after another.

        Runs that differ only in how members are combined are trained once. An ensemble's parameters
        are those of its members, [members, ...]. Its curve and best epoch are the first member's,
        and it has diverged if any member has.
        """
        asked = [spec.member(0) for spec in specs]
        distinct = [*dict.fromkeys(asked)]
        members = []
        for number in range(specs[0].members):
            heads = [spec.member(number) for spec in distinct]
            members.append(train(heads, _seen(heads[0], data, draw.training)))
        found = map(_ensemble, zip(*members, strict=True))
        known = dict(zip(distinct, found, strict=True))
        return [known[spec] for spec in asked]

    def _scored(
        self, pack: Pack, trained: Sequence[TrainedRun], data: TrainingData, draw: _Draw
    ) -> list[_Scored | None]:
        """The rewards of the evaluated responses under every run; None where not all are finite."""
        found: list[_Scored | None] = [None] * len(trained)
        good = [index for index, result in enumerate(trained) if result.diverged is None]
        if not good:
            return found
        bank = stack([trained[index].parameters for index in good])

        def by_run(rows: torch.Tensor) -> torch.Tensor:
            scored = score_states(bank, trained[0].preprocess, data.states, rows)
            return scored.unflatten(0, (len(good), -1))

        several = pack.runs[0].spec.members > 1
        on_training = by_run(data.responses()) if several else None
        for place, (index, heads) in enumerate(zip(good, by_run(draw.rows), strict=True)):
            spec = pack.runs[index].spec
            reference, disagreement = None, None
            if on_training is not None:
                reference = Reference.of(on_training[place])
                disagreement = reference.disagreement(heads).numpy()
            combination = Combination(
                spec.combine, spec.penalty, None if spec.combine == "mean" else reference
            )
            rewards = combination(heads).numpy()
            if np.isfinite(rewards).all():
                found[index] = _Scored(rewards, combination, disagreement)
        return found


def _seen(member: RunSpec, data: TrainingData, training: pl.DataFrame) -> TrainingData:
    """The training data of a member: all of it, or its bootstrap resample."""
    if not member.bootstrap:
        return data
    rows = bootstrap_rows(as_trained(training, member), member.seed)
    return data.resampled(torch.from_numpy(rows))


def _ensemble(heads: Sequence[TrainedRun]) -> TrainedRun:
    diverged = next((head.diverged for head in heads if head.diverged is not None), None)
    if len(heads) == 1 or heads[0].diverged is not None:
        return heads[0]
    if diverged is not None:
        return replace(heads[0], parameters={}, best_epoch=0, diverged=diverged)
    return replace(heads[0], parameters=stack([head.parameters for head in heads]))
