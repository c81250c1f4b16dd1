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

    def take(self, rows: Tensor) -> "Pairs":
        """The pairs with these numbers, int64; a number may occur several times."""
        margin = None if self.margin is None else self.margin[rows]
        return Pairs(
            self.chosen[rows], self.rejected[rows], self.label[rows], self.weight[rows], margin
        )

    def to(self, device: torch.device) -> "Pairs":
        """The same pairs on another device."""
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
    `ObjectiveBank.totals`. mean_total: the mean of r_c + r_r over the pairs, float32 [M], of the M
    slots in `ObjectiveBank.means`.
    """

    difference: Tensor
    total: Tensor
    mean_total: Tensor
