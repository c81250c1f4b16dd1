"""Train P runs side by side: each has a slot of one bank, and all read the same minibatches.

Runs trained together share head shape, preprocessing, minibatch size and seed; objective, learning
rate, decay, schedule, epochs and patience are vectors over the slots. A run's result depends on the
run alone, never on its neighbours: to the bit under `embrm.training.numerics`, within rounding
elsewhere. `embrm.bench.reference` trains one run in the same way in plain torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor

from embrm.core.errors import UserError
from embrm.core.streams import stream
from embrm.training.adamw import AdamW, rate
from embrm.training.curve import TrainedRun, TrainingCurve, ValidationMonitor
from embrm.training.data import TrainingData
from embrm.training.heads import HeadSpec, dropout_masks, initialise, pair_rewards
from embrm.training.objectives import ObjectiveBank
from embrm.training.order import Order
from embrm.training.pairs import Pairs
from embrm.training.regularizers import Regularizer, direction_penalty, regularize
from embrm.training.smoothing import MovingLabels
from embrm.training.spec import TrainSpec
from embrm.training.token_rows import TokenBatch


def train(pack: Sequence[TrainSpec], data: TrainingData) -> list[TrainedRun]:
    """Train every run of `pack` on `data`; results in the order of `pack`.

    Each slot keeps the parameters of the epoch with its lowest validation NLL. A slot that has
    stopped leaves the bank at the end of its epoch, which does not change its neighbours' bits.

    Raises: UserError when there is no training pair, when a run asks for margins or token rows that
    the data does not have, or for early stopping without validation pairs.
    """
    _check(pack, data)
    first = pack[0]
    device = data.states.values.device
    fitted = data.preprocess(first.preprocess)
    batch = min(first.batch_pairs, len(data.train))
    order = Order(data.train.chosen, data.states, first.seed)
    bank = _Bank(pack, data, batch)
    minibatches = _Minibatches(data, data.train.to(device), bank.reads_tokens, first.head)
    preprocess = fitted.to(device)
    moving = MovingLabels(pack, data, fitted) if first.data_smoothing else None
    curves = [TrainingCurve(spec) for spec in pack]
    active = curves
    monitor = ValidationMonitor(data, fitted)
    for epoch in range(1, max(spec.epochs for spec in pack) + 1):
        dropout = stream(first.seed, "dropout", epoch)
        token_draws = stream(first.seed, "tokens", epoch)
        total = torch.zeros(len(active), dtype=torch.float64)
        total_R = torch.zeros(len(active), dtype=torch.float64)
        for some in order.minibatches(epoch, batch):
            read = minibatches.read(some.to(device), dropout, token_draws)
            labels = read.label if moving is None else moving.labels[:, read.pairs]
            loss, R = bank.step(preprocess(data.states.take(read.rows)), read, labels)
            total += loss.cpu().double() * len(some)
            total_R += R.cpu().double() * len(some)
        if data.tokens is not None:
            data.tokens.release_pages()
        measured = monitor.measure(bank.parameters)
        losses, values = (total / len(data.train)).tolist(), (total_R / len(data.train)).tolist()
        for index, curve in enumerate(active):
            own = {name: tensor[index : index + 1] for name, tensor in bank.parameters.items()}
            row = {"epoch": epoch, "step": bank.steps, "train_loss": losses[index]}
            row["regularizer"] = values[index] if curve.regularized else None
            curve.end_epoch(row | {key: value[index] for key, value in measured.items()}, own)
        going_on = [index for index, curve in enumerate(active) if curve.active]
        if not going_on:
            break
        if moving is not None:
            moving.update(bank.parameters)
        if len(going_on) < len(active):
            bank.keep(going_on)
            if moving is not None:
                moving.keep(going_on)
            active = [active[index] for index in going_on]
    return [curve.result(fitted) for curve in curves]


@dataclass(frozen=True)
class _Minibatch:
    """B pairs, and the n distinct responses in them.

    pairs: int64 [B], numbers of the training pairs. rows: int64 [n], the responses as rows of the
    states. chosen, rejected: int64 [B], places among the n responses. label, weight, margin: of the
    pairs. kept: a dropout mask [n, width] of each hidden layer. tokens: token rows of those of the
    n responses that the regularizer reads.
    """

    pairs: Tensor
    rows: Tensor
    chosen: Tensor
    rejected: Tensor
    label: Tensor
    weight: Tensor
    margin: Tensor | None
    kept: Sequence[Tensor]
    tokens: TokenBatch | None


class _Minibatches:
    """Reads the minibatches that all slots share."""

    def __init__(
        self,
        data: TrainingData,
        pairs: Pairs,
        regularizer: Regularizer | None,
        head: HeadSpec,
    ) -> None:
        """pairs: the training pairs, on the device of the states. regularizer: that of the runs, if
        it reads token rows in every minibatch."""
        self._pairs, self._tokens, self._head = pairs, data.tokens, head
        self._regularizer = regularizer
        self._weight = pairs.relative_weight

    def read(self, pairs: Tensor, dropout: Generator, token_draws: Generator) -> _Minibatch:
        """Read the minibatch of these pairs, drawing from the epoch's random streams."""
        own = self._pairs
        rows, places = torch.cat([own.chosen[pairs], own.rejected[pairs]]).unique(
            return_inverse=True
        )
        kept = [mask.to(rows.device) for mask in dropout_masks(self._head, len(rows), dropout)]
        chosen, rejected = places.view(2, -1)
        label = own.label[pairs]
        tokens = None
        if self._tokens is not None and self._regularizer is not None:
            sampling = self._regularizer.sampling
            tokens = self._tokens.read(
                rows.cpu(),
                rows=sampling.rows,
                top_k=sampling.top_k,
                draws=token_draws.random(len(rows)),
                wanted=self._regularizer.responses_read(len(rows), chosen, rejected, label).cpu(),
            ).to(rows.device)
        margin = None if own.margin is None else own.margin[pairs]
        weight = self._weight[pairs]
        return _Minibatch(pairs, rows, chosen, rejected, label, weight, margin, kept, tokens)


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
        """Keep these slots only."""
        chosen = torch.tensor(slots)
        self._optimizer.keep(chosen)
        self.parameters = dict(zip(self.parameters, self._optimizer.tensors, strict=True))
        self._set_pack([self._pack[slot] for slot in slots])

    def _set_pack(self, pack: Sequence[TrainSpec]) -> None:
        device = next(iter(self.parameters.values())).device
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
                [regularizer.loss_factor for regularizer in self._regularizers],
                [regularizer.value_factor for regularizer in self._regularizers],
            )
        ]

    def step(self, X: Tensor, read: _Minibatch, label: Tensor) -> tuple[Tensor, Tensor]:
        """Update all slots on a minibatch; returns the loss and the regularizer R before it, [P].

        X: preprocessed states [n, d] of the minibatch's responses. label: of its pairs, [B], or of
        each slot, [P, B].
        """
        objective = self._objective
        tensors = [tensor.requires_grad_() for tensor in self.parameters.values()]
        r = pair_rewards(
            self.parameters,
            X,
            read.chosen,
            read.rejected,
            objective.totals,
            objective.means,
            read.kept,
        )
        loss = objective.data_loss(r, label, read.weight, read.margin)
        R = torch.zeros_like(loss)
        outputs: list[Tensor] = []
        output_gradients: Sequence[Tensor | None] = []
        if self._regularizers:
            # Either all slots have a regularizer, or none has: see `TrainSpec.pack_key`.
            loss_factor, value_factor = self._factors
            loss = loss * loss_factor
            if read.tokens is not None:
                R, outputs, output_gradients = regularize(
                    self._regularizers,
                    self.parameters,
                    read.tokens,
                    read.chosen,
                    read.rejected,
                    label,
                    read.weight,
                )
            elif self._fisher is not None:
                penalty = direction_penalty(self._fisher, self.parameters["output.weight"])
                loss, R = loss + value_factor * penalty, penalty.detach()
        loss = loss + objective.weight_loss(tensors)
        gradients = torch.autograd.grad([loss.sum(), *outputs], tensors, [None, *output_gradients])
        if read.tokens is not None:
            loss = loss + value_factor * R
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
                "none: use a cache extracted with token_rows (--token-rows)"
            )
