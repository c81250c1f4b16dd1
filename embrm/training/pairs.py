"""Preference pairs as tensors, and the rewards of a minibatch of them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """N preference pairs, as indices into the rows of the states; every tensor is [N].

    chosen, rejected: int64. label: float32, the probability that the chosen response is the better
    one. weight: float32. margin: float32, or None where some pair has none.
    """

    chosen: Tensor
    rejected: Tensor
    label: Tensor
    weight: Tensor
    margin: Tensor | None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def relative_weight(self) -> Tensor:
        """Divide the weights by their mean, so that their scale changes no step; float32 [N]."""
        return self.weight / self.weight.mean()

    def take(self, rows: Tensor) -> "Pairs":
        """Select the pairs with these numbers, int64; a number may occur several times."""
        margin = None if self.margin is None else self.margin[rows]
        return Pairs(
            self.chosen[rows], self.rejected[rows], self.label[rows], self.weight[rows], margin
        )

    def to(self, device: torch.device) -> "Pairs":
        """Copy the pairs to a device."""
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
    """Rewards of a minibatch of B pairs under P slots, as far as their objectives read them.

    difference: r_c - r_r, float32 [P, B]. total: r_c + r_r, float32 [Q, B], of the Q slots in
    `ObjectiveBank.totals`. mean_reward: the mean r̄ of the 2B rewards, float32 [M], of the M slots
    in `ObjectiveBank.means`.
    """

    difference: Tensor
    total: Tensor
    mean_reward: Tensor

    @classmethod
    def of(cls, chosen: Tensor, rejected: Tensor, totals: Tensor, means: Tensor) -> "PairRewards":
        """Combine the rewards of the chosen and the rejected responses, both [P, B]."""
        total = chosen + rejected
        return cls(chosen - rejected, total[totals], total[means].mean(1) / 2)
