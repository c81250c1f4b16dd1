"""What is kept of a trained run: its ledger row, outcomes by prompt, curve and times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.core.specs import canonical_json
from embrm.metrics.accuracy import EvaluationSplit
from embrm.metrics.calibration import fit_temperature
from embrm.sweeps.ledger import OUTCOMES_SCHEMA
from embrm.sweeps.spec import Run, RunSpec

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


@dataclass(frozen=True, eq=False)
class _Validation:
    """The validation pairs: places of their responses among the evaluated rows."""

    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]
    label: NDArray[np.float64]
    weight: NDArray[np.float64]

    @classmethod
    def of(cls, pairs: pl.DataFrame, rows: NDArray[np.int64]) -> Self:
        chosen, rejected = (
            np.searchsorted(rows, pairs[side].to_numpy()) for side in ("chosen", "rejected")
        )
        return cls(chosen, rejected, pairs["label"].to_numpy(), pairs["weight"].to_numpy())


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The data that runs are evaluated on, prepared once for all of them. Create it with `of`.

    rows: int64 [n], the distinct responses whose rewards are needed, ascending. All other indices
        are places among these.
    """

    rows: NDArray[np.int64]
    splits: dict[str, EvaluationSplit]
    _places: dict[str, NDArray[np.int64]]
    _validation: _Validation

    @classmethod
    def of(
        cls,
        validation: pl.DataFrame,
        splits: dict[str, EvaluationSplit],
        others: Sequence[NDArray[np.int64]] = (),
    ) -> Self:
        """Prepare the splits.

        validation: the pairs that the temperature is fitted to. others: further responses whose
        rewards are needed.
        """
        sides = [validation[side].to_numpy() for side in ("chosen", "rejected")]
        split_rows = [split.rows for split in splits.values()]
        rows = np.unique(np.concatenate([*sides, *split_rows, *others]).astype(np.int64))
        return cls(
            rows=rows,
            splits=splits,
            _places={name: np.searchsorted(rows, split.rows) for name, split in splits.items()},
            _validation=_Validation.of(validation, rows),
        )

    def validated_on(self, validation: pl.DataFrame) -> Self:
        """The same evaluation with other labels or weights of the validation pairs, or fewer of
        them."""
        return replace(self, _validation=_Validation.of(validation, self.rows))

    def measure(
        self, run_id: str, rewards: Rewards
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Evaluate rewards float32 [n] of the responses `rows`.

        Returns the ledger's temperature and `metric@split` columns, and the rows of the outcomes.
        """
        temperature = self._temperature(rewards)
        columns, outcomes = {"temperature": temperature}, []
        for name, split in self.splits.items():
            metrics, sums = split.evaluate(rewards[self._places[name]], temperature)
            columns |= {f"{metric}@{name}": value for metric, value in metrics.items()}
            outcomes.append({"run_id": run_id, "split": name, **sums})
        return columns, outcomes

    def disagreement(self, spread: NDArray[np.float64]) -> dict[str, float]:
        """The ledger's columns on the disagreement of an ensemble's members, float64 [n] on `rows`.

        For every split: the mean over its responses, and the area under the ROC curve for telling
        them from the validation pairs' responses by it, P(larger there) + ½·P(equal).
        """
        pairs = self._validation
        known = np.sort(spread[np.union1d(pairs.chosen, pairs.rejected)])
        columns: dict[str, float] = {}
        for name, places in self._places.items():
            own = spread[places]
            below, up_to = (np.searchsorted(known, own, side) for side in ("left", "right"))
            area = (below + up_to).mean() / (2 * known.size) if known.size else float("nan")
            columns[f"disagreement@{name}"] = float(own.mean())
            columns[f"disagreement_auroc@{name}"] = float(area)
        return columns

    def _temperature(self, rewards: Rewards) -> float:
        """The temperature that fits the validation pairs; soft labels count in both directions."""
        pairs = self._validation
        margins = rewards[pairs.chosen].astype(np.float64) - rewards[pairs.rejected]
        label, weight = pairs.label, pairs.weight
        if (label == 1).all():
            return fit_temperature(margins, weight)
        return fit_temperature(
            np.concatenate([margins, -margins]),
            np.concatenate([weight * label, weight * (1 - label)]),
        )


def ledger_row(
    run: Run,
    curve: Sequence[Mapping[str, Any]],
    best_epoch: int,
    *,
    finite: bool,
    diverged: int | None,
    cache_id: str,
    train_pairs: int,
    validation_pairs: int,
    bsr_effective: float,
    numerics: str,
) -> dict[str, Any]:
    """A run's row of the ledger, without its evaluation.

    finite: whether the run has weights and finite rewards. diverged: the epoch in which a loss or
    weight was not finite.
    """
    spec = run.spec
    best = curve[best_epoch - 1] if finite else {}
    kept = ("train_loss", "validation_nll", "validation_accuracy")
    return {
        "run_id": run.run_id,
        "config_id": run.config_id,
        "config": run.name,
        "seed": spec.seed,
        "cache_id": cache_id,
        "status": "ok" if finite else "diverged",
        "diverged_epoch": diverged if finite or diverged else best_epoch,
        "state": spec.state,
        "head": str(spec.learner or spec.head),
        "loss": spec.learner.loss if spec.learner else spec.loss,
        "spec": canonical_json(spec.model_dump(mode="json")),
        **_extensions(spec),
        **({"data_seed": spec.data_seed} if spec.data_seed else {}),
        "bsr_effective": bsr_effective,
        "train_pairs": train_pairs,
        "validation_pairs": validation_pairs,
        "epochs": len(curve),
        "best_epoch": best_epoch if finite else None,
        **{name: best.get(name) for name in kept},
        "numerics": numerics,
    }


def _extensions(spec: RunSpec) -> dict[str, str]:
    """The column `extensions`, which only runs with user-defined parts have."""
    used = spec.extensions()
    return {"extensions": canonical_json({n: vars(p) for n, p in used.items()})} if used else {}


def part_tables(
    ledger: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Mapping[str, Any]],
    *,
    start: float,
    trained: float,
    scored: float,
    end: float,
) -> dict[str, pl.DataFrame]:
    """All tables of runs that were trained together, except geometry.

    start, trained, scored, end: times in seconds at which training began, and training, scoring
    and evaluation ended.
    """
    runs = len(ledger)
    return {
        "curves": pl.DataFrame(curves, schema=_CURVES),
        "outcomes": pl.DataFrame(
            {name: [row[name] for row in outcomes] for name in OUTCOMES_SCHEMA},
            schema=OUTCOMES_SCHEMA,
        ),
        "timings": pl.DataFrame(
            {
                "run_id": [row["run_id"] for row in ledger],
                "started": start,
                "seconds": (end - start) / runs,
                "train_seconds": (trained - start) / runs,
                "score_seconds": (scored - trained) / runs,
                "evaluate_seconds": (end - scored) / runs,
                "pack_seconds": end - start,
                "pack_runs": runs,
            }
        ),
        "ledger": _ledger(ledger),
    }


def _ledger(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    metrics = dict.fromkeys(name for row in rows for name in row if "@" in name)
    schema = _LEDGER | dict.fromkeys(metrics, pl.Float64())
    if any("extensions" in row for row in rows):
        schema["extensions"] = pl.String()
    if any("data_seed" in row for row in rows):
        schema["data_seed"] = pl.Int64()
    return pl.DataFrame(rows, schema=schema).with_columns(pl.col(pl.Float64).fill_nan(None))
