"""Training a pack: P runs side by side over one shared minibatch order.

A pack shares head shape, preprocessing, minibatch size and seed; everything else (objective,
learning rate, decay, schedule, epochs, patience) is a vector over its slots. A run's result
depends on the run alone, never on its neighbours: to the bit under `embrm.training.numerics`,
within rounding elsewhere.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.core.errors import UserError
from embrm.core.streams import stream
from embrm.training.heads import (
    HeadSpec,
    Parameters,
    Preprocess,
    PreprocessKind,
    fit_preprocess,
    initialise,
    pair_rewards,
    score,
)
from embrm.training.objectives import Objective, ObjectiveBank, Pairs
from embrm.training.order import Order
from embrm.training.regularizers import Regularizer, direction_penalty, mean_fisher, regularize
from embrm.training.states import States
from embrm.training.tokens import TokenBatch, TokenStore, TopK

_ADAM_EPS = 1e-8

_MEASURED_SLOTS = 8
"""Slots whose validation rewards are measured at a time: it takes several copies of them."""

VALIDATION = ("validation_nll", "validation_accuracy", "reward_mean", "reward_sd")
"""What `validation_metrics` gives."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSpec(Objective):
    """One run: objective, head and optimisation."""

    head: HeadSpec = HeadSpec()
    """A table: see below."""
    regularizer: Regularizer | None = None
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
    # Recorded only where it is set: other runs keep their ids.
    data_smoothing: float = Field(default=0.0, ge=0, lt=1, exclude_if=operator.not_)
    """β of iterative data smoothing: after every epoch each label moves towards the run's own
    probability by this share (arXiv 2401.16335)."""
    seed: int = Field(default=0, ge=0)
    """Of initial weights, order and dropout; given by the sweep's seeds."""

    @model_validator(mode="after")
    def _head_fits(self) -> Self:
        regularizer, adapter = self.regularizer, self.head.adapter
        if (adapter or regularizer) and self.preprocess != "none":
            raise ValueError(
                f"preprocess = {self.preprocess!r}: adapters and regularizers act on the states "
                "as the LM head reads them: remove preprocess"
            )
        if regularizer and not regularizer.moves_states and str(self.head) != "linear":
            raise ValueError(
                f"regularizer 'fisher' with head {str(self.head)!r}: it is for a linear head "
                "without an adapter: take one, or kind = 'preserve-fisher'"
            )
        if self.data_smoothing and self.active_regularizer:
            raise ValueError(
                "data_smoothing with a regularizer: its labels would be those of the data, "
                "remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _moves_something(self) -> Self:
        # A method of its own: where a backbone is trained there is another rule under this name.
        regularizer = self.regularizer
        if regularizer and regularizer.moves_states and not self.head.adapter:
            raise ValueError(
                f"regularizer {regularizer.kind!r} without an adapter does nothing on frozen "
                "states: add head.adapter = { kind = 'low-rank' }, or take kind = 'fisher'"
            )
        return self

    @property
    def active_regularizer(self) -> Regularizer | None:
        """The regularizer, if it adds anything."""
        return self.regularizer if self.regularizer and self.regularizer.active else None

    def pack_key(self) -> tuple[Any, ...]:
        """Runs with equal keys, on the same data, may be trained in one pack."""
        regularizer = self.active_regularizer
        read = regularizer and (regularizer.moves_states, *regularizer.reads)
        moving = self.data_smoothing > 0
        return self.head, self.preprocess, self.batch_pairs, self.seed, read, moving


@dataclass(frozen=True)
class TrainingData:
    """Pairs, on the CPU, index the rows of `states`; training runs where the states are.

    `validation` may be empty: then there is no early stopping and the last epoch is kept. tokens:
    for regularizers. whole: what this is a resample of, and what preprocessing and F̄ are fitted on.
    """

    states: States
    train: Pairs
    validation: Pairs
    tokens: TokenStore | None = None
    whole: "TrainingData | None" = None
    _fitted: dict[PreprocessKind, Preprocess] = field(default_factory=dict, init=False, repr=False)
    _fishers: dict[TopK, Tensor] = field(default_factory=dict, init=False, repr=False)

    def resampled(self, rows: Tensor) -> "TrainingData":
        """Trained on these of its pairs, by number, int64, any several times; what is fitted to
        all of them stays."""
        return replace(self, train=self.train.take(rows), whole=self)

    def preprocess(self, kind: PreprocessKind) -> Preprocess:
        """Fitted on the training responses, once."""
        if self.whole is not None:
            return self.whole.preprocess(kind)
        if kind not in self._fitted:
            self._fitted[kind] = fit_preprocess(kind, self.states, self.responses())
        return self._fitted[kind]

    def fisher(self, top_k: TopK) -> Tensor:
        """F̄ of the training responses, once."""
        assert self.tokens is not None  # a pack that needs them is checked first
        if self.whole is not None:
            return self.whole.fisher(top_k)
        if top_k not in self._fishers:
            self._fishers[top_k] = mean_fisher(self.tokens, self.responses(), top_k)
        return self._fishers[top_k]

    def responses(self) -> Tensor:
        """The training responses, int64, ascending."""
        return torch.cat([self.train.chosen, self.train.rejected]).unique()


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
    stopped leaves the bank at the end of its epoch: its neighbours' bits do not feel it.

    Raises: UserError when there is no training pair, when a run asks for margins or token rows that
    the data does not have, or for early stopping without validation pairs.
    """
    _check(pack, data)
    first = pack[0]
    device = data.states.values.device
    fitted = data.preprocess(first.preprocess)
    preprocess, pairs = fitted.to(device), data.train.to(device)
    batch = min(first.batch_pairs, len(pairs))
    weight = pairs.weight / pairs.weight.mean()  # the scale of the weights is not a learning rate
    order = Order(data.train.chosen, data.states, first.seed)
    bank = _Bank(pack, data, batch)
    moving = _MovingLabels(pack, data, fitted) if first.data_smoothing else None
    slots = [Course(spec) for spec in pack]
    active = slots
    monitor = Monitor(data, fitted)
    for epoch in range(1, max(spec.epochs for spec in pack) + 1):
        dropout = stream(first.seed, "dropout", epoch)
        positions = stream(first.seed, "tokens", epoch)
        total = torch.zeros(len(active), dtype=torch.float64)
        total_R = torch.zeros(len(active), dtype=torch.float64)
        for some in order.minibatches(epoch, batch):
            some = some.to(device)
            rows, places = torch.cat([pairs.chosen[some], pairs.rejected[some]]).unique(
                return_inverse=True
            )
            kept = [
                torch.from_numpy(dropout.random((len(rows), width), dtype="float32"))
                .ge(first.head.dropout)
                .div(1 - first.head.dropout)
                .to(device)
                for width in (first.head.widths if first.head.dropout else ())
            ]
            chosen, rejected = places.view(2, -1)
            label = pairs.label[some]
            tokens = None
            if data.tokens is not None and bank.reads_tokens is not None:
                draws = positions.random(len(rows))
                tokens = _read(data.tokens, bank.reads_tokens, rows, chosen, rejected, label, draws)
            loss, R = bank.step(
                preprocess(data.states.take(rows)),
                chosen,
                rejected,
                kept,
                (
                    label if moving is None else moving.labels[:, some],
                    weight[some],
                    None if pairs.margin is None else pairs.margin[some],
                ),
                tokens,
            )
            total += loss.cpu().double() * len(some)
            total_R += R.cpu().double() * len(some)
        if data.tokens is not None:
            data.tokens.release_pages()
        train_loss, train_R = (total / len(pairs)).tolist(), (total_R / len(pairs)).tolist()
        measured = monitor.measure(bank.parameters)
        for index, slot in enumerate(active):
            own = {name: tensor[index : index + 1] for name, tensor in bank.parameters.items()}
            row = {"epoch": epoch, "step": bank.steps, "train_loss": train_loss[index]}
            row["regularizer"] = train_R[index] if slot.regularized else None
            slot.end_epoch(row | {key: values[index] for key, values in measured.items()}, own)
        going_on = [index for index, slot in enumerate(active) if slot.active]
        if not going_on:
            break
        if moving is not None:
            moving.follow(bank.parameters)
        if len(going_on) < len(active):
            bank.keep(going_on)
            if moving is not None:
                moving.keep(going_on)
            active = [active[index] for index in going_on]
    return [slot.result(fitted) for slot in slots]


class _Bank:
    """Parameters, optimizer and objectives of the slots that are still training."""

    def __init__(self, pack: Sequence[TrainSpec], data: TrainingData, batch: int) -> None:
        first, device = pack[0], data.states.values.device
        self.parameters = {
            name: tensor.expand(len(pack), *tensor.shape[1:]).clone().to(device)
            for name, tensor in initialise(first.head, data.states.width, first.seed).items()
        }
        self.steps = 0
        self._batch = batch
        self._steps_per_epoch = -(-len(data.train) // batch)
        self._soft_labels = bool((data.train.label != 1).any()) or first.data_smoothing > 0
        first_regularizer = first.active_regularizer
        self.reads_tokens: Regularizer | None = None
        self._fisher: Tensor | None = None
        if first_regularizer and first_regularizer.moves_states:
            self.reads_tokens = first_regularizer
        elif first_regularizer:
            self._fisher = data.fisher(first_regularizer.top_k).to(device)
        self._optimizer = AdamW([*self.parameters.values()])
        self._set_pack(pack)

    def keep(self, slots: Sequence[int]) -> None:
        """Go on with these slots alone."""
        chosen = torch.tensor(slots)
        self._optimizer.keep(chosen)
        self.parameters = dict(zip(self.parameters, self._optimizer.tensors, strict=True))
        self._set_pack([self._pack[slot] for slot in slots])

    def _set_pack(self, pack: Sequence[TrainSpec]) -> None:
        device = self.parameters["output.weight"].device
        self._pack = pack
        self._objective = ObjectiveBank(
            pack, self._batch, soft_labels=self._soft_labels, device=device
        )
        self._regularizers = [
            spec.active_regularizer for spec in pack if spec.active_regularizer is not None
        ]
        self._factors = [
            torch.tensor(values, device=device)
            for values in (
                [regularizer.of_loss for regularizer in self._regularizers],
                [regularizer.of_value for regularizer in self._regularizers],
            )
        ]

    def step(
        self,
        X: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        kept: Sequence[Tensor],
        of_pairs: tuple[Tensor, Tensor, Tensor | None],
        tokens: tuple[TokenBatch, Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """One update on the pairs (X[chosen], X[rejected]); of each slot before it, its loss and
        its regularizer R, [P].

        of_pairs: their label ([B], or of each slot [P, B]), weight and margin. tokens: what `_read`
        returns, where the pack reads token rows.
        """
        objective = self._objective
        tensors = [tensor.requires_grad_() for tensor in self.parameters.values()]
        r = pair_rewards(
            self.parameters, X, chosen, rejected, objective.totals, objective.means, kept
        )
        loss = objective.data_loss(r, *of_pairs)
        R = torch.zeros_like(loss)
        outputs: list[Tensor] = []
        output_gradients: Sequence[Tensor | None] = []
        if self._regularizers:
            # A pack's slots all have a regularizer, or none has: `pack_key`.
            of_loss, of_value = self._factors
            loss = loss * of_loss
            if tokens is not None:
                R, outputs, output_gradients = regularize(
                    self._regularizers, self.parameters, *tokens, *of_pairs[:2]
                )
            elif self._fisher is not None:
                penalty = direction_penalty(self._fisher, self.parameters["output.weight"])
                loss, R = loss + of_value * penalty, penalty.detach()
        loss = loss + objective.weight_loss(tensors)
        gradients = torch.autograd.grad([loss.sum(), *outputs], tensors, [None, *output_gradients])
        if tokens is not None:
            loss = loss + of_value * R
        for tensor in tensors:
            tensor.requires_grad_(False)
        self._optimizer.step(
            gradients,
            rates=[
                rate(spec, self.steps, spec.epochs * self._steps_per_epoch) for spec in self._pack
            ],
            betas=[spec.betas for spec in self._pack],
            decays=[spec.weight_decay for spec in self._pack],
        )
        self.steps += 1
        return loss.detach(), R


class _MovingLabels:
    """Iterative data smoothing: y ← (1-β)·y + β·sigmoid(Δ), of each slot and training pair."""

    def __init__(
        self, pack: Sequence[TrainSpec], data: TrainingData, preprocess: Preprocess
    ) -> None:
        pairs, device = data.train, data.states.values.device
        self.labels = pairs.label.to(device).expand(len(pack), -1).clone()
        """float32 [P, N]."""
        self._beta = torch.tensor([[spec.data_smoothing] for spec in pack], device=device)
        self._rows, places = torch.cat([pairs.chosen, pairs.rejected]).unique(return_inverse=True)
        self._chosen, self._rejected = places[: len(pairs)], places[len(pairs) :]
        self._states, self._preprocess = data.states, preprocess

    @torch.no_grad()
    def follow(self, parameters: Parameters) -> None:
        """Move the labels towards what the heads say of their pairs now."""
        r = score(parameters, self._preprocess, self._states, self._rows)
        delta = r.index_select(1, self._chosen) - r.index_select(1, self._rejected)
        # Not torch's sigmoid: its bits depend on where in a vector register a number falls.
        said = torch.from_numpy(expit(delta.numpy())).to(self.labels.device)
        self.labels = (1 - self._beta) * self.labels + self._beta * said

    def keep(self, slots: Sequence[int]) -> None:
        """Go on with these slots alone."""
        chosen = torch.tensor(slots)
        self.labels, self._beta = self.labels[chosen], self._beta[chosen]


def _read(
    data: TokenStore,
    regularizer: Regularizer,
    rows: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    label: Tensor,
    draws: NDArray[np.float64],
) -> tuple[TokenBatch, Tensor, Tensor]:
    """Token rows of those of the responses `rows` that the regularizer weighs, and the chosen and
    the rejected of each pair as numbers of those: any number where its weight is 0.

    chosen, rejected: places in `rows`; label: of the pairs; draws: of the rows.
    """
    weighed = regularizer.weighed(len(rows), chosen, rejected, label)
    number = (weighed.cumsum(0) - 1).clamp_min(0)
    _, k, top_k = regularizer.reads
    tokens = data.read(rows[weighed].cpu(), rows=k, top_k=top_k, draws=draws[weighed.cpu().numpy()])
    return tokens.to(rows.device), number[chosen], number[rejected]


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
        if spec.active_regularizer and data.tokens is None:
            raise UserError(
                f"regularizer {spec.active_regularizer.kind!r} reads token rows, and there are "
                "none: use a cache extracted with --token-rows"
            )


class Course:
    """One run's epochs: its curve, its best weights, and whether it goes on."""

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
        """Add an epoch: its row of the curve, and the weights at its end."""
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

    def result(self, preprocess: Preprocess) -> Trained:
        """What came of it."""
        if self._diverged is not None:
            return Trained({}, preprocess, self.curve, 0, self._diverged)
        return Trained(self._best, preprocess, self.curve, self.best_epoch, None)


class Monitor:
    """What is measured after every epoch, for all slots at once."""

    def __init__(self, data: TrainingData, preprocess: Preprocess) -> None:
        self._pairs = pairs = data.validation
        self._rows, places = torch.cat([pairs.chosen, pairs.rejected]).unique(return_inverse=True)
        self._chosen, self._rejected = places[: len(pairs)], places[len(pairs) :]
        self._states = data.states
        self._preprocess = preprocess

    @torch.no_grad()
    def measure(self, parameters: Parameters) -> dict[str, list[Any]]:
        """Of every slot: `validation_metrics`, and ‖weights‖."""
        # One tensor after another: the order in which sum(0) adds depends on the number of slots.
        squares = torch.zeros(1)
        for tensor in parameters.values():
            squares = squares + (tensor * tensor).flatten(1).sum(1).cpu()
        norm = squares.sqrt()
        if not len(self._pairs):
            absent = [None] * len(norm)
            return dict.fromkeys(VALIDATION, absent) | {"weight_norm": norm.tolist()}
        r = score(parameters, self._preprocess, self._states, self._rows)
        parts = [
            validation_metrics(some, self._pairs, self._chosen, self._rejected)
            for some in r.split(_MEASURED_SLOTS)
        ]
        found = {name: [value for part in parts for value in part[name]] for name in parts[0]}
        return found | {"weight_norm": norm.tolist()}


def validation_metrics(
    r: Tensor, pairs: Pairs, chosen: Tensor, rejected: Tensor
) -> dict[str, list[Any]]:
    """Of rewards float32 [P, n] of the responses of `pairs`: NLL and accuracy (a tie is half
    right), both weighted by the pairs' weights, and reward mean and population sd; a list [P] each.

    chosen, rejected: int64 [pairs], places among the n responses.
    """
    delta = r.index_select(1, chosen) - r.index_select(1, rejected)
    label, weight = pairs.label.double(), pairs.weight.double()
    nll = -(label * logsigmoid(delta) + (1 - label) * logsigmoid(-delta))
    right = label * (delta > 0) + (1 - label) * (delta < 0) + 0.5 * (delta == 0)
    # Not std(): its bits depend on the number of slots.
    wide = r.double()
    mean = wide.mean(1, keepdim=True)
    return {
        "validation_nll": ((nll * weight).sum(1) / weight.sum()).tolist(),
        "validation_accuracy": ((right * weight).sum(1) / weight.sum()).tolist(),
        "reward_mean": mean[:, 0].tolist(),
        "reward_sd": (wide - mean).square().mean(1).sqrt().tolist(),
    }


class AdamW:
    """AdamW over a bank, as torch.optim.AdamW, with vectors of hyper-parameters over the slots.

    Only single-rounding operations (no fused multiply-add), so a slot's bits do not depend on
    where in a vector register its numbers fall; one buffer, so that a step allocates nothing.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: [P, ...], changed in place."""
        self.tensors = [*tensors]
        self._moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in tensors]
        self._steps = 0

    def keep(self, slots: Tensor) -> None:
        """Go on with these slots alone; `tensors` are new ones."""
        self.tensors = [tensor[slots] for tensor in self.tensors]
        self._moments = [(first[slots], second[slots]) for first, second in self._moments]

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor],
        *,
        rates: Sequence[float],
        betas: Sequence[tuple[float, float]],
        decays: Sequence[float],
    ) -> None:
        """One update; learning rates, betas and weight decays are those of each slot."""
        self._steps += 1
        # Coefficients in float64, rounded once: [7, P].
        columns = torch.tensor(
            [
                _coefficients(rate, b1, b2, decay, self._steps)
                for rate, (b1, b2), decay in zip(rates, betas, decays, strict=True)
            ],
            dtype=torch.float64,
        ).T.float()
        for tensor, gradient, (first, second) in zip(
            self.tensors, gradients, self._moments, strict=True
        ):
            b1, one_b1, b2, one_b2, rate, eps, shrink = columns.to(tensor.device).reshape(
                7, -1, *[1] * (tensor.ndim - 1)
            )
            buffer = gradient * one_b1
            first.mul_(b1).add_(buffer)
            torch.mul(gradient, gradient, out=buffer)
            second.mul_(b2).add_(buffer.mul_(one_b2))
            torch.sqrt(second, out=buffer).add_(eps)
            torch.div(first, buffer, out=buffer).mul_(rate)
            if any(decays):
                tensor.mul_(shrink)
            tensor.sub_(buffer)


def _coefficients(
    rate: float, b1: float, b2: float, decay: float, steps: int
) -> tuple[float, float, float, float, float, float, float]:
    """Factors of a step: the bias corrections are moved into the learning rate and eps, as
    rate/(1-b1ᵗ)·m / (√v/√(1-b2ᵗ) + eps) = rate·√(1-b2ᵗ)/(1-b1ᵗ)·m / (√v + eps·√(1-b2ᵗ))."""
    root = math.sqrt(1 - b2**steps)
    corrected = rate * root / (1 - b1**steps)
    return b1, 1 - b1, b2, 1 - b2, corrected, _ADAM_EPS * root, 1 - rate * decay


def rate(spec: TrainSpec, step: int, steps: int) -> float:
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
