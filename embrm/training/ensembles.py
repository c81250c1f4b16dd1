"""Ensembles: how the rewards of several heads become one, and how far the heads disagree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from torch import Tensor

Combine = Literal["mean", "min", "uwo", "lcb"]

PENALTY = 0.5
"""Default weight of the penalty: λ of best-of-n selection in arXiv 2310.02743."""


@dataclass(frozen=True)
class Reference:
    """Mean and population standard deviation of each member's rewards, float32 [members].

    Both are over the responses of the training pairs. A member whose rewards are all equal there
    gets z = 0 for them, and is left out of the scale s of `Combination`.
    """

    mean: Tensor
    sd: Tensor

    @classmethod
    def of(cls, rewards: Tensor) -> Self:
        """Compute the moments of rewards [members, n]."""
        wide = rewards.double()
        mean = wide.mean(1, keepdim=True)
        sd = (wide - mean).square().mean(1).sqrt()
        return cls(mean[:, 0].float(), sd.float())

    def standardised(self, rewards: Tensor) -> Tensor:
        """Standardise rewards r [members, n]: z = (r - mean) / sd, float64 [members, n]."""
        sd = self.sd.double().where(self.sd > 0, 1.0)
        return (rewards.double() - self.mean.double()[:, None]) / sd[:, None]

    def disagreement(self, rewards: Tensor) -> Tensor:
        """Measure how far rewards [members, n] disagree: the population standard deviation of z
        over the members, float64 [n]."""
        return _variance(self.standardised(rewards)).sqrt()


@dataclass(frozen=True)
class Combination:
    """Combines the rewards r_i of an ensemble's members into one.

    Kind "mean" averages r_i. The other kinds first standardise the members, so that none has more
    weight because of its scale, and then return to the scale of rewards: m is the mean of the
    members' means, and s the mean of their standard deviations.

        min  m + s·min z_i, the worst case (arXiv 2310.02743)
        uwo  m + s·(mean z_i - penalty·variance of z_i) (arXiv 2310.02743)
        lcb  m + s·(mean z_i - penalty·standard deviation of z_i) (arXiv 2401.16635)

    Variance and standard deviation are the population's, over the members. These three kinds need
    `reference`.
    """

    kind: Combine = "mean"
    penalty: float = PENALTY
    reference: Reference | None = None

    def __call__(self, rewards: Tensor) -> Tensor:
        """Combine rewards float32 [members, n] into float32 [n]."""
        if self.kind == "mean":
            return rewards.mean(0)
        assert self.reference is not None  # It is stored with the weights of such runs.
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
