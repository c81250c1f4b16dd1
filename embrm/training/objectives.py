"""What a head is trained to minimise: pair loss + reward penalties + l2, for a bank of slots.

Shapes: rewards of a minibatch of B pairs are float32 [P, B], one row a slot. Every pair loss goes
through `logsigmoid`, which is exact for any float32, and never through log(sigmoid + eps), which
takes the gradient from confidently wrong pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.core.errors import nearest
from embrm.core.specs import Spec

_ROOT_EPS = 1e-12
"""Under LogitNorm's root: without it the gradient at r_c = r_r = 0 is 0/0. It is far below the
square of any reward that matters (1e-6), so it changes no other value visibly."""


def bt(difference: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-logsigmoid(Δ - m), Δ = r_c - r_r (Bradley and Terry 1952; with m: arXiv 2307.09288)."""
    return -logsigmoid(difference - margin)


def hinge(difference: Tensor, margin: Tensor | float = 1.0) -> Tensor:
    """max(0, m - Δ) (baseline of arXiv 2505.07271)."""
    return torch.relu(margin - difference)


def logitnorm(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-logsigmoid(Δ / √(r_c² + r_r²)) (arXiv 2205.09310; for rewards as in 2505.07271).

    The argument lies within ±√2 and does not change when all rewards are scaled.
    """
    norm = torch.sqrt(chosen * chosen + rejected * rejected + _ROOT_EPS)
    return -logsigmoid((chosen - rejected) / norm)


def bt_dr(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-logsigmoid(Δ) - logsigmoid(r_c) - logsigmoid(-r_r) (baseline of arXiv 2505.07271)."""
    return -logsigmoid(chosen - rejected) - logsigmoid(chosen) - logsigmoid(-rejected)


def classifier(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(-logsigmoid(r_c) - logsigmoid(-r_r)) / 2: won or lost, pointwise (arXiv 2502.04357)."""
    return -(logsigmoid(chosen) + logsigmoid(-rejected)) / 2


def bsr(mean_total: Tensor) -> Tensor:
    """r̄² [P], r̄ the mean of the minibatch's 2B rewards, half the mean of r_c + r_r.

    The penalty is λ·B_ref·r̄², the published code's form (arXiv 2505.07271); the paper's prose has
    no factor B.
    """
    mean = mean_total / 2
    return mean * mean


def centering(total: Tensor) -> Tensor:
    """mean (r_c + r_r)² [P] (TRL's center_rewards_coefficient; arXiv 2312.09244)."""
    return (total * total).mean(1)


_OF_DIFFERENCES = {"bt": bt, "hinge": hinge}
"""They see Δ alone, and take a margin."""
_OF_REWARDS = {"logitnorm": logitnorm, "bt_dr": bt_dr, "classifier": classifier}


class Objective(Spec):
    """Pair loss, margins, smoothing and penalties of one run.

    A pair whose chosen response is better with probability q costs q·f(r_c, r_r) +
    (1-q)·f(r_r, r_c): q is the pair's own label p, pulled towards its opposite by label smoothing,
    q = p(1-ε) + (1-p)ε. For bt that is -(1-ε)·logsigmoid(Δ) - ε·logsigmoid(-Δ) (arXiv 2401.06080).
    Hinge takes no smoothing: within the margin it would only rescale the gradient, by 1-2ε.
    """

    loss: str = "bt"
    """bt, hinge, logitnorm, bt_dr or classifier."""
    margin: float | None = Field(default=None, ge=0)
    """m of bt and hinge, the same for every pair. None: 0 for bt, 1 for hinge."""
    margin_scale: float | None = Field(default=None, gt=0)
    """m = margin_scale · the pair's margin in the data, for bt and hinge."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """ε: the chance that a label is wrong."""
    bsr: float = Field(default=0.0, ge=0)
    """λ of batch-wise sum-to-zero: λ·B_ref·r̄² is added."""
    bsr_batch: int | None = Field(default=None, gt=0)
    """B_ref; None: the minibatch size."""
    centering: float = Field(default=0.0, ge=0)
    """c: c·mean (r_c + r_r)² is added."""
    l2: float = Field(default=0.0, ge=0)
    """(l2/2)·‖parameters‖² is added to the mean pair loss."""

    @field_validator("loss")
    @classmethod
    def _known(cls, loss: str) -> str:
        known = {**_OF_DIFFERENCES, **_OF_REWARDS}
        if loss not in known:
            raise ValueError(f"unknown loss: {nearest(loss, known)}")
        return loss

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        has_margin = self.margin is not None or self.margin_scale is not None
        if has_margin and self.loss not in _OF_DIFFERENCES:
            raise ValueError(
                f"loss = {self.loss!r} has no margin: remove margin and margin_scale, "
                f"or take loss = {' or '.join(map(repr, _OF_DIFFERENCES))}"
            )
        if self.margin is not None and self.margin_scale is not None:
            raise ValueError(
                "margin and margin_scale are both given: a pair has one margin, keep one of them"
            )
        if self.label_smoothing and self.loss == "hinge":
            raise ValueError(
                "label_smoothing with loss = 'hinge' only rescales it: remove label_smoothing, "
                "or take loss = 'bt'"
            )
        if self.bsr_batch is not None and not self.bsr:
            raise ValueError("bsr_batch without bsr does nothing: set bsr, or remove bsr_batch")
        return self

    def bsr_effective(self, batch: int) -> float:
        """λ·B_ref, the factor of r̄², for minibatches of `batch` pairs."""
        return self.bsr * (self.bsr_batch or batch)


@dataclass(frozen=True)
class Pairs:
    """Preference pairs as rows of the states. All tensors [N].

    chosen, rejected: int64. label: float32, probability that chosen is better. weight: float32.
    margin: float32, or None when some pair has none.
    """

    chosen: Tensor
    rejected: Tensor
    label: Tensor
    weight: Tensor
    margin: Tensor | None

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, rows: Tensor) -> "Pairs":
        """Some of the pairs, by number, int64; any of them several times."""
        margin = None if self.margin is None else self.margin[rows]
        return Pairs(
            self.chosen[rows], self.rejected[rows], self.label[rows], self.weight[rows], margin
        )

    def to(self, device: torch.device) -> "Pairs":
        """The same pairs there."""
        margin = None if self.margin is None else self.margin.to(device)
        return Pairs(
            self.chosen.to(device),
            self.rejected.to(device),
            self.label.to(device),
            self.weight.to(device),
            margin,
        )


@dataclass(frozen=True)
class PairRewards:
    """Rewards of a minibatch of B pairs under P slots.

    difference: r_c - r_r, float32 [P, B]. total: r_c + r_r of the slots `ObjectiveBank.totals`,
    float32 [Q, B]. mean_total: its mean over the pairs, of the slots `ObjectiveBank.means`,
    float32 [M].
    """

    difference: Tensor
    total: Tensor
    mean_total: Tensor


class ObjectiveBank:
    """The objectives of P slots as vectors, so that one call serves the whole bank.

    totals, means: int64, the slots whose objective looks at r_c + r_r of every pair, and at its
    mean. What a slot does not ask for is not added to it, not even as zero.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        batch: int,
        *,
        soft_labels: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        def vector(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        def slots(chosen: Sequence[bool]) -> Tensor:
            return torch.tensor(chosen, device=device).nonzero()[:, 0]

        defaults = {"hinge": 1.0}
        margins = [
            o.margin if o.margin is not None else defaults.get(o.loss, 0.0) for o in objectives
        ]
        self._margin = vector(
            [0.0 if o.margin_scale else m for o, m in zip(objectives, margins, strict=True)]
        )[:, None]
        self._margin_scale = vector([o.margin_scale or 0.0 for o in objectives])[:, None]
        self._smoothing = vector([o.label_smoothing for o in objectives])[:, None]
        self.totals = slots([o.loss in _OF_REWARDS or o.centering > 0 for o in objectives])
        self.means = slots([o.bsr > 0 for o in objectives])
        self._bsr = vector([o.bsr_effective(batch) for o in objectives])[self.means]
        self._centred = slots([o.centering > 0 for o in objectives])
        self._centering = vector([o.centering for o in objectives])[self._centred]
        self._decayed = slots([o.l2 > 0 for o in objectives])
        self._l2 = vector([o.l2 for o in objectives])[self._decayed]
        # Slots of one loss are computed together. Whether a slot also needs the swapped direction
        # is its own matter, never its neighbours', so that its bits are its own too.
        kinds = [(o.loss, soft_labels or o.label_smoothing > 0) for o in objectives]
        self._groups = [
            (kind, slots([own == kind for own in kinds])) for kind in dict.fromkeys(kinds)
        ]
        self._order = torch.cat([own for _, own in self._groups]).argsort()
        self._place = torch.zeros(len(objectives), dtype=torch.int64, device=device)
        self._place[self.totals] = torch.arange(len(self.totals), device=device)

    def data_loss(
        self, rewards: PairRewards, label: Tensor, weight: Tensor, margin: Tensor | None
    ) -> Tensor:
        """Mean weighted pair loss plus reward penalties, [P].

        label, weight, margin: of the B pairs; a label may be of each slot, [P, B].
        """
        margins = self._margin
        if margin is not None:
            margins = margins + self._margin_scale * margin
        probability = label * (1 - self._smoothing) + (1 - label) * self._smoothing
        losses = []
        for (loss, soft), slots in self._groups:
            difference = rewards.difference.index_select(0, slots)
            if loss in _OF_DIFFERENCES:
                pair_loss = _OF_DIFFERENCES[loss]
                value = pair_loss(difference, margins[slots])
                swapped = pair_loss(-difference, margins[slots]) if soft else value
            else:
                total = rewards.total[self._place[slots]]
                chosen, rejected = (total + difference) / 2, (total - difference) / 2
                value = _OF_REWARDS[loss](chosen, rejected)
                swapped = _OF_REWARDS[loss](rejected, chosen) if soft else value
            if soft:
                q = probability[slots]
                value = q * value + (1 - q) * swapped
            losses.append(value)
        total_loss = (torch.cat(losses).index_select(0, self._order) * weight).mean(1)
        if len(self.means):
            total_loss = total_loss.index_add(0, self.means, self._bsr * bsr(rewards.mean_total))
        if len(self._centred):
            spread = centering(rewards.total[self._place[self._centred]])
            total_loss = total_loss.index_add(0, self._centred, self._centering * spread)
        return total_loss

    def weight_loss(self, parameters: Sequence[Tensor]) -> Tensor:
        """(l2/2)·‖parameters‖² of each slot, [P]."""
        none = torch.zeros(len(parameters[0]), device=parameters[0].device)
        if not len(self._decayed):
            return none
        squares = torch.zeros_like(self._l2)
        for tensor in parameters:
            flat = tensor[self._decayed].flatten(1)
            squares = squares + (flat * flat).sum(1)
        return none.index_add(0, self._decayed, self._l2 / 2 * squares)
