"""Training a pack: P runs side by side over one shared minibatch order.

A pack shares head shape, preprocessing, minibatch size and seed; everything else (objective,
learning rate, decay, schedule, epochs, patience) is a vector over its slots. A run's result
depends on the run alone, never on its neighbours: to the bit under `embrm.train.numerics`, within
rounding elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.errors import UserError
from embrm.train.heads import (
    HeadSpec,
    Parameters,
    Preprocess,
    PreprocessKind,
    fit_preprocess,
    initialise,
    rewards,
    score,
    stream,
)
from embrm.train.objectives import Objective, ObjectiveBank, Pairs

_ADAM_EPS = 1e-8

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSpec(Objective):
    """One run: objective, head and optimisation."""

    head: HeadSpec = HeadSpec()
    """A table: see below."""
    preprocess: PreprocessKind = "none"
    """What is done to the states, by statistics of the training responses."""
    lr: float = Field(default=1e-3, gt=0)
    """AdamW's, at its highest."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled: w ← w - lr·weight_decay·w beside the Adam step (arXiv 1711.05101)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's."""
    epochs: int = Field(default=10, gt=0)
    """Passes over the training pairs, at most."""
    batch_pairs: int = Field(default=512, gt=0)
    """Pairs of a minibatch."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many epochs without a better validation NLL; None: run all epochs."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How lr falls to 0 over all epochs."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps in which the learning rate climbs linearly to lr."""
    seed: int = Field(default=0, ge=0)
    """Of initial weights, order and dropout; given by the sweep's seeds."""

    def pack_key(self) -> tuple[HeadSpec, PreprocessKind, int, int]:
        """Runs with equal keys, on the same data, may be trained in one pack."""
        return self.head, self.preprocess, self.batch_pairs, self.seed


@dataclass(frozen=True)
class TrainingData:
    """states: [responses, d] in their stored dtype; pairs index its rows.

    `validation` may be empty: then there is no early stopping and the last epoch is kept.
    """

    states: Tensor
    train: Pairs
    validation: Pairs


@dataclass(frozen=True)
class Trained:
    """One run's result.

    parameters: of the best epoch, each [1, ...]. curve: one row an epoch. diverged: the epoch
    whose loss or weights were not finite, else None; such a run has no best epoch (0).
    """

    parameters: Parameters
    preprocess: Preprocess
    curve: list[dict[str, Any]]
    best_epoch: int
    diverged: int | None


def train(pack: Sequence[TrainSpec], data: TrainingData) -> list[Trained]:
    """Train every run of `pack` on `data`; results in the order of `pack`.

    Each slot keeps the weights of the epoch with its lowest validation NLL. A slot that has
    stopped goes on being multiplied, unseen, until the last one has: its neighbours' bits do not
    feel it.

    Raises: UserError when there is no training pair, when a run asks for margins that the data
    does not have, or for early stopping without validation pairs.
    """
    _check(pack, data)
    first = pack[0]
    pairs = data.train
    batch = min(first.batch_pairs, len(pairs))
    steps = -(-len(pairs) // batch)
    weight = pairs.weight / pairs.weight.mean()  # the scale of the weights is not a learning rate
    soft_labels = bool((pairs.label != 1).any())
    objective = ObjectiveBank(pack, batch, soft_labels=soft_labels)
    rows = torch.cat([pairs.chosen, pairs.rejected]).unique()
    preprocess = fit_preprocess(first.preprocess, data.states, rows)
    parameters = {
        name: tensor.expand(len(pack), *tensor.shape[1:]).clone().requires_grad_()
        for name, tensor in initialise(first.head, data.states.shape[1], first.seed).items()
    }
    tensors = list(parameters.values())
    optimizer = AdamW(
        tensors, betas=[spec.betas for spec in pack], decay=[spec.weight_decay for spec in pack]
    )
    monitor = _Monitor(data, preprocess)
    slots = [_Slot(spec) for spec in pack]
    for epoch in range(1, max(spec.epochs for spec in pack) + 1):
        order = torch.from_numpy(stream(first.seed, "order", epoch).permutation(len(pairs)))
        dropout = stream(first.seed, "dropout", epoch)
        total = torch.zeros(len(pack), dtype=torch.float64)
        for step, some in enumerate(order.split(batch), start=(epoch - 1) * steps):
            both = torch.cat([pairs.chosen[some], pairs.rejected[some]])
            kept = [
                torch.from_numpy(dropout.random((len(both), width), dtype="float32"))
                .ge(first.head.dropout)
                .div(1 - first.head.dropout)
                for width in (first.head.widths if first.head.dropout else ())
            ]
            r = rewards(parameters, preprocess(data.states[both]), kept)
            loss = objective.data_loss(
                r[:, : len(some)],
                r[:, len(some) :],
                pairs.label[some],
                weight[some],
                None if pairs.margin is None else pairs.margin[some],
            ) + objective.weight_loss(tensors)
            gradients = torch.autograd.grad(loss.sum(), tensors)
            optimizer.step(gradients, [_rate(spec, step, spec.epochs * steps) for spec in pack])
            total += loss.detach().double() * len(some)
        train_loss = (total / len(pairs)).tolist()
        measured = monitor.measure(parameters)
        for index, slot in enumerate(slots):
            own = {name: tensor.detach()[index : index + 1] for name, tensor in parameters.items()}
            row = {"epoch": epoch, "step": epoch * steps, "train_loss": train_loss[index]}
            slot.end_epoch(row | {key: values[index] for key, values in measured.items()}, own)
        if not any(slot.active for slot in slots):
            break
    return [slot.result(preprocess) for slot in slots]


def _check(pack: Sequence[TrainSpec], data: TrainingData) -> None:
    if len({spec.pack_key() for spec in pack}) != 1:
        raise ValueError("the runs of a pack share head, preprocessing, minibatch size and seed")
    if not len(data.train):
        raise UserError("no training pairs: choose other train splits or a smaller validation")
    for spec in pack:
        if spec.margin_scale is not None and data.train.margin is None:
            raise UserError(
                f"margin_scale = {spec.margin_scale:g}, but some training pairs have no margin: "
                "use margin, or data with margins"
            )
        if spec.patience is not None and not len(data.validation):
            raise UserError(
                f"patience = {spec.patience}, but no pair is kept for validation: "
                "raise validation, or remove patience"
            )


class _Slot:
    """Early stopping and best weights of one run."""

    def __init__(self, spec: TrainSpec) -> None:
        self._spec = spec
        self._curve: list[dict[str, Any]] = []
        self._best: Parameters = {}
        self._best_epoch = 0
        self._best_nll = math.inf
        self._diverged: int | None = None
        self.active = True

    def end_epoch(self, row: dict[str, Any], parameters: Parameters) -> None:
        if not self.active:
            return
        self._curve.append(row)
        epoch, nll = row["epoch"], row["validation_nll"]
        finite = [row["train_loss"], row["weight_norm"], 0.0 if nll is None else nll]
        if not all(map(math.isfinite, finite)):
            self._diverged, self.active = epoch, False
            return
        if nll is None or nll < self._best_nll:
            self._best_nll = math.inf if nll is None else nll
            self._best_epoch = epoch
            self._best = {name: tensor.clone() for name, tensor in parameters.items()}
        patience = self._spec.patience or self._spec.epochs
        self.active = epoch < self._spec.epochs and epoch - self._best_epoch < patience

    def result(self, preprocess: Preprocess) -> Trained:
        if self._diverged is not None:
            return Trained({}, preprocess, self._curve, 0, self._diverged)
        return Trained(self._best, preprocess, self._curve, self._best_epoch, None)


class _Monitor:
    """What is measured after every epoch, for all slots at once."""

    def __init__(self, data: TrainingData, preprocess: Preprocess) -> None:
        self._pairs = pairs = data.validation
        rows, positions = torch.cat([pairs.chosen, pairs.rejected]).unique(return_inverse=True)
        self._chosen, self._rejected = positions.split(len(pairs)) if len(pairs) else (rows, rows)
        self._states = data.states[rows]
        self._preprocess = preprocess

    @torch.no_grad()
    def measure(self, parameters: Parameters) -> dict[str, list[Any]]:
        """Of every slot: validation NLL and accuracy (a tie is half right), both weighted by the
        pairs' weights; reward mean and population sd over the validation responses; ‖weights‖."""
        # One tensor after another: the order in which sum(0) adds depends on the number of slots.
        squares = torch.zeros(1)
        for tensor in parameters.values():
            squares = squares + (tensor * tensor).flatten(1).sum(1)
        norm = squares.sqrt()
        if not len(self._pairs):
            absent = [None] * len(norm)
            names = ("validation_nll", "validation_accuracy", "reward_mean", "reward_sd")
            return dict.fromkeys(names, absent) | {"weight_norm": norm.tolist()}
        r = score(parameters, self._preprocess, self._states)
        delta = r[:, self._chosen] - r[:, self._rejected]
        label, weight = self._pairs.label.double(), self._pairs.weight.double()
        nll = -(label * logsigmoid(delta) + (1 - label) * logsigmoid(-delta))
        right = label * (delta > 0) + (1 - label) * (delta < 0) + 0.5 * (delta == 0)
        # Not std(): its bits depend on the number of slots.
        centred = r.double() - r.double().mean(1, keepdim=True)
        return {
            "validation_nll": ((nll * weight).sum(1) / weight.sum()).tolist(),
            "validation_accuracy": ((right * weight).sum(1) / weight.sum()).tolist(),
            "reward_mean": r.double().mean(1).tolist(),
            "reward_sd": (centred * centred).mean(1).sqrt().tolist(),
            "weight_norm": norm.tolist(),
        }


class AdamW:
    """AdamW over a bank, as torch.optim.AdamW, with vectors of hyper-parameters over the slots.

    Only single-rounding operations (no fused multiply-add), so a slot's bits do not depend on
    where in a vector register its numbers fall.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        betas: Sequence[tuple[float, float]],
        decay: Sequence[float],
    ) -> None:
        self._tensors = tensors
        self._moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in tensors]
        self._betas, self._decay = betas, decay
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rates: Sequence[float]) -> None:
        """One update with learning rate `rates[p]` in slot p."""
        self._steps += 1
        bias = [(1 - b1**self._steps, 1 - b2**self._steps) for b1, b2 in self._betas]
        # Coefficients in float64, rounded once: [6, P].
        columns = torch.tensor(
            [
                (b1, 1 - b1, b2, 1 - b2, rate / c1, math.sqrt(c2), 1 - rate * decay)
                for (b1, b2), (c1, c2), rate, decay in zip(
                    self._betas, bias, rates, self._decay, strict=True
                )
            ],
            dtype=torch.float64,
        ).T.float()
        for tensor, gradient, (first, second) in zip(
            self._tensors, gradients, self._moments, strict=True
        ):
            b1, one_b1, b2, one_b2, rate, root, shrink = columns.reshape(
                7, -1, *[1] * (tensor.ndim - 1)
            )
            first.mul_(b1).add_(gradient * one_b1)
            second.mul_(b2).add_(gradient * gradient * one_b2)
            denominator = second.sqrt().div_(root).add_(_ADAM_EPS)
            tensor.mul_(shrink).sub_(first / denominator * rate)


def _rate(spec: TrainSpec, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`: warm-up, then the schedule down to 0."""
    warmup = spec.warmup * steps
    if step < warmup:
        return spec.lr * (step + 1) / math.ceil(warmup)
    progress = min(1.0, (step - warmup) / (steps - warmup))
    if spec.schedule == "cosine":
        return spec.lr * (1 + math.cos(math.pi * progress)) / 2
    if spec.schedule == "linear":
        return spec.lr * (1 - progress)
    return spec.lr
