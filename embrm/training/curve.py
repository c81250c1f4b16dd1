"""Runs epoch by epoch: validation metrics, the best epoch's weights, and early stopping."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.training.data import TrainingData
from embrm.training.heads.bank import Parameters, score_states
from embrm.training.heads.preprocess import Preprocess
from embrm.training.pairs import Pairs
from embrm.training.spec import TrainSpec

_MEASURED_SLOTS = 8
"""Number of slots measured at a time, because measuring needs several copies of their rewards."""

VALIDATION = ("validation_nll", "validation_accuracy", "reward_mean", "reward_sd")
"""Names of the metrics that `validation_metrics` returns."""


@dataclass(frozen=True)
class TrainedRun:
    """The result of training one run.

    parameters: of the best epoch, each [1, ...]. curve: one row per epoch. diverged: the epoch
    whose loss or weights were not finite, else None; such a run has no parameters and best epoch 0.
    """

    parameters: Parameters
    preprocess: Preprocess
    curve: list[dict[str, Any]]
    best_epoch: int
    diverged: int | None


class TrainingCurve:
    """The epochs of one run so far: its curve, its best weights, and whether it goes on."""

    def __init__(self, spec: TrainSpec) -> None:
        self._spec = spec
        self.curve: list[dict[str, Any]] = []
        self._best: Parameters = {}
        self.best_epoch = 0
        self._best_nll = math.inf
        self._diverged: int | None = None
        self.active = True
        self.regularized = spec.active_regularizer is not None

    def end_epoch(self, row: dict[str, Any], parameters: Parameters) -> None:
        """Record an epoch: its row of the curve, and the parameters at its end."""
        if not self.active:
            return
        self.curve.append(row)
        epoch, nll = row["epoch"], row["validation_nll"]
        finite = [row["train_loss"], row["weight_norm"], 0.0 if nll is None else nll]
        if not all(map(math.isfinite, finite)):
            self._diverged, self.active = epoch, False
            return
        if nll is None or nll < self._best_nll:
            self._best_nll = math.inf if nll is None else nll
            self.best_epoch = epoch
            self._best = {name: tensor.cpu().clone() for name, tensor in parameters.items()}
        patience = self._spec.patience or self._spec.epochs
        self.active = epoch < self._spec.epochs and epoch - self.best_epoch < patience

    def result(self, preprocess: Preprocess) -> TrainedRun:
        """Return the run's result, after its last epoch."""
        if self._diverged is not None:
            return TrainedRun({}, preprocess, self.curve, 0, self._diverged)
        return TrainedRun(self._best, preprocess, self.curve, self.best_epoch, None)


class ValidationMonitor:
    """Measures all slots on the validation pairs after every epoch."""

    def __init__(self, data: TrainingData, preprocess: Preprocess) -> None:
        self._pairs = pairs = data.validation
        self._rows, places = torch.cat([pairs.chosen, pairs.rejected]).unique(return_inverse=True)
        self._chosen, self._rejected = places[: len(pairs)], places[len(pairs) :]
        self._states = data.states
        self._preprocess = preprocess

    @torch.no_grad()
    def measure(self, parameters: Parameters) -> dict[str, list[Any]]:
        """Compute the `validation_metrics` and the weight norm of every slot."""
        # Tensors are added one by one, because the order of a sum over all depends on P.
        squares = torch.zeros(1)
        for tensor in parameters.values():
            squares = squares + (tensor * tensor).flatten(1).sum(1).cpu()
        norm = squares.sqrt()
        if not len(self._pairs):
            absent = [None] * len(norm)
            return dict.fromkeys(VALIDATION, absent) | {"weight_norm": norm.tolist()}
        r = score_states(parameters, self._preprocess, self._states, self._rows)
        parts = [
            validation_metrics(some, self._pairs, self._chosen, self._rejected)
            for some in r.split(_MEASURED_SLOTS)
        ]
        found = {name: [value for part in parts for value in part[name]] for name in parts[0]}
        return found | {"weight_norm": norm.tolist()}


def validation_metrics(
    r: Tensor, pairs: Pairs, chosen: Tensor, rejected: Tensor
) -> dict[str, list[Any]]:
    """Measure weighted NLL and accuracy, and mean and population sd of rewards; a list [P] of each.

    r: float32 [P, n], rewards of the responses of `pairs`. chosen, rejected: int64 [pairs], places
    among the n responses. A tie counts as half right.
    """
    delta = r.index_select(1, chosen) - r.index_select(1, rejected)
    label, weight = pairs.label.double(), pairs.weight.double()
    nll = -(label * logsigmoid(delta) + (1 - label) * logsigmoid(-delta))
    right = label * (delta > 0) + (1 - label) * (delta < 0) + 0.5 * (delta == 0)
    # torch.std is not used because its bits depend on the number of slots.
    wide = r.double()
    mean = wide.mean(1, keepdim=True)
    return {
        "validation_nll": ((nll * weight).sum(1) / weight.sum()).tolist(),
        "validation_accuracy": ((right * weight).sum(1) / weight.sum()).tolist(),
        "reward_mean": mean[:, 0].tolist(),
        "reward_sd": (wide - mean).square().mean(1).sqrt().tolist(),
    }
