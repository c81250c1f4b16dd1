"""Products of states with the weights of all slots of a bank, whose bits do not depend on P."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from embrm.core.lazy import LazyModule

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import functional as F  # noqa: N812
else:
    F = LazyModule("torch.nn.functional")

_COLUMNS = 32
"""A product with the states has a multiple of this many columns. MKL multiplies the remaining
columns by other kernels, whose bits would depend on the number of slots."""


def product(X: Tensor, weight: Tensor) -> Tensor:
    """Compute X @ weightᵀ, [n, columns], of X [n, d] and weight [columns, d]."""
    columns = len(weight)
    padded = F.pad(weight, (0, 0, 0, -columns % _COLUMNS))
    return (X @ padded.T)[:, :columns]


def by_slot(X: Tensor, weights: Tensor) -> Sequence[Tensor]:
    """Compute X @ weights[slot]ᵀ, [n, columns], for all slots of weights [P, columns, d]."""
    both = product(X, weights.flatten(0, 1)).view(len(X), *weights.shape[:2])
    return both.transpose(0, 1).contiguous().unbind()
