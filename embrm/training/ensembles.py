"""Ensembles: how the rewards of several heads become one, and how far the heads disagree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from torch import Tensor

Combine = Literal["mean", "min", "uwo", "lcb"]

PENALTY = 0.5
"""λ of best of n in arXiv 2310.02743."""


@dataclass(frozen=True)
class Reference:
    """What members are standardised on: mean and population standard deviation of the rewards of
    each over the responses of the training pairs, float32 [members]. A member that never varies has
    z = 0 there, and no part in the scale s of `Combination`."""

    mean: Tensor
    sd: Tensor

    @classmethod
    def of(cls, rewards: Tensor) -> Self:
        """Of rewards [members, n]."""
        wide = rewards.double()
        mean = wide.mean(1, keepdim=True)
        sd = (wide - mean).square().mean(1).sqrt()
        return cls(mean[:, 0].float(), sd.float())

    def standardised(self, rewards: Tensor) -> Tensor:
        """z = (r - mean) / sd, float64 [members, n], of rewards [members, n]."""
        sd = self.sd.double().where(self.sd > 0, 1.0)
        return (rewards.double() - self.mean.double()[:, None]) / sd[:, None]

    def disagreement(self, rewards: Tensor) -> Tensor:
        """Population standard deviation of z over the members, float64 [n], of rewards
        [members, n]."""
        return _variance(self.standardised(rewards)).sqrt()


@dataclass(frozen=True)
class Combination:
    """How the rewards r_i of a run's heads become one.

    mean: the mean of r_i. The others standardise the members first, so that none weighs more for
    its scale, and give the result the scale that rewards have, with m the mean of the members'
    means and s that of their standard deviations:

        min  m + s·min z_i, the worst case (arXiv 2310.02743)
        uwo  m + s·(mean z_i - penalty·variance of z_i) (arXiv 2310.02743)
        lcb  m + s·(mean z_i - penalty·standard deviation of z_i) (arXiv 2401.16635)

    Both moments are the population's. reference: for these three.
    """

    kind: Combine = "mean"
    penalty: float = PENALTY
    reference: Reference | None = None

    def __call__(self, rewards: Tensor) -> Tensor:
        """float32 [n], of rewards float32 [members, n]."""
        if self.kind == "mean":
            return rewards.mean(0)
        assert self.reference is not None  # the weights of such a run come with it
        z = self.reference.standardised(rewards)
        if self.kind == "min":
            combined = z.amin(0)
        elif self.kind == "uwo":
            combined = z.mean(0) - self.penalty * _variance(z)
        else:
            combined = z.mean(0) - self.penalty * _variance(z).sqrt()
        mean, sd = self.reference.mean.double().mean(), self.reference.sd.double()
        scale = sd.sum() / (sd > 0).sum().clamp(min=1)
        return (mean + scale * combined).float()


def _variance(z: Tensor) -> Tensor:
    return (z - z.mean(0)).square().mean(0)
