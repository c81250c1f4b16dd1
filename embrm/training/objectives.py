"""What a head is trained to minimise: a pair loss, penalties on the rewards, and l2.

A pair loss is one function and one entry of `LOSSES`; a penalty is one field of `Objective`, one
function and one entry of `PENALTIES`. `ObjectiveBank` computes them for all slots of a bank, and
the fine-tune computes them by the same object with one slot.

Rewards of a minibatch of B pairs are float32 [P, B], one row per slot. Pair losses are written with
`logsigmoid`, which is accurate for every float32; log(sigmoid(x) + eps) would have no gradient for
pairs that are ranked confidently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pydantic import Field, field_validator, model_validator

from embrm.core.errors import nearest
from embrm.core.lazy import LazyModule
from embrm.core.specs import Spec
from embrm.training.extensions import REGISTER_FIRST, Extension, Extensions, check_function

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F  # noqa: N812

    from embrm.training.pairs import PairRewards
else:
    torch, F = LazyModule("torch"), LazyModule("torch.nn.functional")

_ROOT_EPS = 1e-12
"""Added under LogitNorm's root, where the gradient at r_c = r_r = 0 would be 0/0. It is far below
the square of any reward that matters, so no other value changes visibly."""


# Pair losses


def bt(difference: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Bradley-Terry: -logsigmoid(Δ - m), with Δ = r_c - r_r.

    Bradley and Terry 1952; with a margin m, Llama 2 (arXiv 2307.09288).
    """
    return -F.logsigmoid(difference - margin)


def hinge(difference: Tensor, margin: Tensor | float = 1.0) -> Tensor:
    """Hinge loss: max(0, m - Δ), with Δ = r_c - r_r (a baseline of arXiv 2505.07271)."""
    return torch.relu(margin - difference)


def logitnorm(chosen: Tensor, rejected: Tensor) -> Tensor:
    """LogitNorm: -logsigmoid(Δ / √(r_c² + r_r²)).

    arXiv 2205.09310, for rewards as in arXiv 2505.07271. The argument lies within ±√2 and does not
    change when all rewards are scaled.
    """
    norm = torch.sqrt(chosen * chosen + rejected * rejected + _ROOT_EPS)
    return -F.logsigmoid((chosen - rejected) / norm)


def bt_dr(chosen: Tensor, rejected: Tensor) -> Tensor:
    """BT-DR: -logsigmoid(Δ) - logsigmoid(r_c) - logsigmoid(-r_r) (baseline of arXiv 2505.07271)."""
    return -F.logsigmoid(chosen - rejected) - F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def classifier(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Pointwise classifier of won and lost: (-logsigmoid(r_c) - logsigmoid(-r_r)) / 2.

    arXiv 2502.04357.
    """
    return -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)) / 2


@dataclass(frozen=True)
class PairLoss:
    """A loss of one pair, computed elementwise.

    function: (difference, margin) → loss where `default_margin` is a number, else
    (chosen, rejected) → loss; tensors float32 [slots, pairs] in and out.
    default_margin: the margin of runs that set none; None: the loss has no margin and reads both
    rewards. smoothable: whether label smoothing does more than rescale it.
    """

    function: Callable[..., Tensor]
    default_margin: float | None = None
    smoothable: bool = True

    @property
    def of_difference(self) -> bool:
        """Whether it reads r_c - r_r alone, and takes a margin."""
        return self.default_margin is not None


LOSSES = Extensions(
    "loss",
    {
        "bt": PairLoss(bt, default_margin=0.0),
        # Within the margin, smoothing would only rescale the gradient, by 1 - 2ε.
        "hinge": PairLoss(hinge, default_margin=1.0, smoothable=False),
        "logitnorm": PairLoss(logitnorm),
        "bt_dr": PairLoss(bt_dr),
        "classifier": PairLoss(classifier),
    },
)
"""Pair losses by their name in a spec."""


def register_loss(
    name: str, function: Callable[..., Tensor], *, default_margin: float | None = None
) -> None:
    """Make a pair loss of your own available as `loss = name` in specs given from Python.

    function: (chosen, rejected) → loss, elementwise on float32 tensors [slots, pairs] of rewards,
        differentiable; with `default_margin`, (difference, margin) → loss instead.

    The ledger records the module and the SHA-256 of its source. Define the function in a module
    that can be imported: a sweep's worker processes import it too.

    Raises: UserError for the name of a built-in loss, for anything but a function of two arguments,
    and where the source cannot be found.
    """
    check_function(function, 2, "loss", name)
    LOSSES.register(name, PairLoss(function, default_margin), Extension.of(function, "loss", name))


# Penalties


def bsr(mean_reward: Tensor) -> Tensor:
    """Batch-wise sum-to-zero: r̄² [P], with r̄ the mean of the minibatch's 2B rewards, [P].

    The term is λ·B_ref·r̄², as in the published code (arXiv 2505.07271); the paper's prose has no
    factor B.
    """
    return mean_reward * mean_reward


def bsr_tangent(factor: Tensor, mean_reward: Tensor, batch_mean: Tensor) -> Tensor:
    """Batch-wise sum-to-zero of one part of a minibatch: factor·r̄·(2·r̄ₖ - r̄), [P].

    This is the tangent of factor·r̄² at r̄. Weighted by the parts' shares of the minibatch, the
    values of all parts sum to factor·r̄², and their gradients to its gradient.

    mean_reward: r̄ₖ [P], the mean reward of the part; batch_mean: r̄ [P], of the whole minibatch.
    """
    return factor * batch_mean * (2 * mean_reward - batch_mean)


def centering(total: Tensor) -> Tensor:
    """Centering: the mean over pairs of (r_c + r_r)², [P], of r_c + r_r [P, B].

    TRL's `center_rewards_coefficient` (arXiv 2312.09244).
    """
    return (total * total).mean(1)


@dataclass(frozen=True)
class Penalty:
    """A penalty on the rewards of a minibatch.

    function: of the minibatch's mean reward r̄, [P], where `of_batch_mean`; else of r_c + r_r of
    every pair, [P, B]. Gives [P].
    coefficient: its factor under an objective with minibatches of so many pairs; 0: not used.
    tangent: for a penalty of the batch mean, (factor, mean reward of a part, mean reward of the
    minibatch) → [P], the tangent of factor·function at the latter. The fine-tune adds it up over
    micro-batches.
    """

    function: Callable[[Tensor], Tensor]
    coefficient: Callable[[Objective, int], float]
    tangent: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    @property
    def of_batch_mean(self) -> bool:
        """Whether it is a function of the mean reward of the whole minibatch."""
        return self.tangent is not None


class Objective(Spec):
    """Pair loss, margins, smoothing and penalties of one run.

    A pair whose chosen response is better with probability q costs q·f(r_c, r_r) +
    (1-q)·f(r_r, r_c). Here q is the pair's own label p, pulled towards its opposite by label
    smoothing: q = p(1-ε) + (1-p)ε. For Bradley-Terry that is -(1-ε)·logsigmoid(Δ) -
    ε·logsigmoid(-Δ) (arXiv 2401.06080).
    """

    loss: str = "bt"
    """bt, hinge, logitnorm, bt_dr or classifier."""
    margin: float | None = Field(default=None, ge=0)
    """Margin m of bt and hinge, the same for every pair. Not given: 0 for bt, 1 for hinge."""
    margin_scale: float | None = Field(default=None, gt=0)
    """Margins from the data: m = margin_scale · the pair's margin, for bt and hinge."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """ε: the probability that a label is wrong."""
    bsr: float = Field(default=0.0, ge=0)
    """λ of batch-wise sum-to-zero: λ·B_ref·r̄² is added to the loss."""
    bsr_batch: int | None = Field(default=None, gt=0)
    """B_ref of batch-wise sum-to-zero. Not given: the minibatch size. Set it to keep λ·B_ref the
    same while batch_pairs changes, or as in a published run."""
    centering: float = Field(default=0.0, ge=0)
    """c of centering: c·mean (r_c + r_r)² is added to the loss."""
    l2: float = Field(default=0.0, ge=0)
    """(l2/2)·‖parameters‖² is added to the loss."""

    @field_validator("loss")
    @classmethod
    def _known(cls, loss: str) -> str:
        if loss not in LOSSES:
            raise ValueError(f"unknown loss: {nearest(loss, LOSSES)}{REGISTER_FIRST}")
        return loss

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        has_margin = self.margin is not None or self.margin_scale is not None
        if has_margin and not LOSSES[self.loss].of_difference:
            others = [name for name, loss in LOSSES.items() if loss.of_difference]
            raise ValueError(
                f"loss = {self.loss!r} has no margin: remove margin and margin_scale, "
                f"or take loss = {' or '.join(map(repr, others))}"
            )
        if self.margin is not None and self.margin_scale is not None:
            raise ValueError(
                "margin and margin_scale are both given: a pair has one margin, keep one of them"
            )
        if self.label_smoothing and not LOSSES[self.loss].smoothable:
            raise ValueError(
                f"label_smoothing with loss = {self.loss!r} only rescales it: remove "
                "label_smoothing, or take loss = 'bt'"
            )
        if self.bsr_batch is not None and not self.bsr:
            raise ValueError("bsr_batch without bsr does nothing: set bsr, or remove bsr_batch")
        return self

    @property
    def reads_batch_mean(self) -> bool:
        """Whether a penalty depends on the mean reward of the whole minibatch."""
        return any(p.of_batch_mean and p.coefficient(self, 1) > 0 for p in PENALTIES)

    def bsr_effective(self, batch: int) -> float:
        """λ·B_ref, the factor of r̄², for minibatches of `batch` pairs."""
        return self.bsr * (self.bsr_batch or batch)


PENALTIES = (
    Penalty(bsr, Objective.bsr_effective, bsr_tangent),
    Penalty(centering, lambda objective, _: objective.centering),
)
"""Every penalty on rewards, in the order in which they are added."""


class ObjectiveBank:
    """The objectives of P slots as vectors, so that one call serves all of them.

    totals, means: int64, the slots whose objective reads r_c + r_r of every pair, and the mean
    reward of the minibatch. Terms that a run does not use are skipped, so they cannot change its
    bits.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        batch: int,
        *,
        soft_labels: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        """batch: pairs of a minibatch. soft_labels: whether some label is not 1."""

        def vector(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        def slots(chosen: Sequence[bool]) -> Tensor:
            return torch.tensor(chosen, device=device).nonzero()[:, 0]

        def places(of: Tensor) -> Tensor:
            place = torch.zeros(len(objectives), dtype=torch.int64, device=device)
            place[of] = torch.arange(len(of), device=device)
            return place

        margins = [_fixed_margin(objective) for objective in objectives]
        self._margin = vector(margins)[:, None]
        self._margin_scale = vector([o.margin_scale or 0.0 for o in objectives])[:, None]
        self._smoothing = vector([o.label_smoothing for o in objectives])[:, None]
        factors = {p: [p.coefficient(o, batch) for o in objectives] for p in PENALTIES}
        reads_total = [not LOSSES[o.loss].of_difference for o in objectives]
        reads_mean = [False for _ in objectives]
        for penalty, values in factors.items():
            reads = reads_mean if penalty.of_batch_mean else reads_total
            reads[:] = [old or value > 0 for old, value in zip(reads, values, strict=True)]
        self.totals, self.means = slots(reads_total), slots(reads_mean)
        self._place_of_total, self._place_of_mean = places(self.totals), places(self.means)
        used = {p: slots([value > 0 for value in values]) for p, values in factors.items()}
        self._penalties = [
            (penalty, own, vector(factors[penalty])[own])
            for penalty, own in used.items()
            if len(own)
        ]
        self._decayed = slots([o.l2 > 0 for o in objectives])
        self._l2 = vector([o.l2 for o in objectives])[self._decayed]
        # Slots of one loss are computed together. Whether a slot also needs the swapped direction
        # depends on the slot alone, never on its neighbours, so that its bits do too.
        kinds = [(o.loss, soft_labels or o.label_smoothing > 0) for o in objectives]
        self._groups = [
            (LOSSES[loss], soft, slots([own == (loss, soft) for own in kinds]))
            for loss, soft in dict.fromkeys(kinds)
        ]
        self._order = torch.cat([own for _, _, own in self._groups]).argsort()

    def data_loss(
        self,
        rewards: PairRewards,
        label: Tensor,
        weight: Tensor,
        margin: Tensor | None,
        batch_mean: Tensor | None = None,
    ) -> Tensor:
        """Mean weighted pair loss plus penalties, [P].

        label, weight, margin: of the B pairs, [B]; labels may differ between slots, [P, B].
        batch_mean: where the B pairs are a part of the minibatch, the mean reward of all of it,
            [M]. Penalties of that mean are then added by their tangents, after all others.
        """
        margins = self._margin
        if margin is not None:
            margins = margins + self._margin_scale * margin
        probability = label * (1 - self._smoothing) + (1 - label) * self._smoothing
        losses = []
        for loss, soft, slots in self._groups:
            difference = rewards.difference.index_select(0, slots)
            if loss.of_difference:
                value = loss.function(difference, margins[slots])
                swapped = loss.function(-difference, margins[slots]) if soft else value
            else:
                total = rewards.total[self._place_of_total[slots]]
                chosen, rejected = (total + difference) / 2, (total - difference) / 2
                value = loss.function(chosen, rejected)
                swapped = loss.function(rejected, chosen) if soft else value
            if soft:
                q = probability[slots]
                value = q * value + (1 - q) * swapped
            losses.append(value)
        found = (torch.cat(losses).index_select(0, self._order) * weight).mean(1)
        tangents = []
        for penalty, slots, factor in self._penalties:
            if penalty.tangent is None:
                value = penalty.function(rewards.total[self._place_of_total[slots]])
            elif batch_mean is None:
                value = penalty.function(rewards.mean_reward[self._place_of_mean[slots]])
            else:
                place = self._place_of_mean[slots]
                part_mean = rewards.mean_reward[place]
                tangents.append((slots, penalty.tangent(factor, part_mean, batch_mean[place])))
                continue
            found = found.index_add(0, slots, factor * value)
        for slots, value in tangents:
            found = found.index_add(0, slots, value)
        return found

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


def _fixed_margin(objective: Objective) -> float:
    """The margin that all pairs share, 0 where margins come from the data."""
    if objective.margin_scale:
        return 0.0
    if objective.margin is not None:
        return objective.margin
    return LOSSES[objective.loss].default_margin or 0.0
