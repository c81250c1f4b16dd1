"""Preprocessing: what is done to a state before the head reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from embrm.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from embrm.training.row_store import RowStore
else:
    torch = LazyModule("torch")

PreprocessKind = Literal["none", "center", "standardize"]

_ROWS = 512
"""Number of states that are converted to float32 at a time."""


@dataclass(frozen=True)
class Preprocess:
    """Replaces h by (h - mean) / scale. mean, scale: float32 [d]; both None: h is not changed."""

    mean: Tensor | None
    scale: Tensor | None

    def __call__(self, X: Tensor) -> Tensor:
        """Preprocess states float32 [n, d], in place."""
        if self.mean is None or self.scale is None:
            return X
        return X.sub_(self.mean).div_(self.scale)

    def to(self, device: torch.device) -> Preprocess:
        """Copy mean and scale to a device."""
        if self.mean is None or self.scale is None:
            return self
        return Preprocess(self.mean.to(device), self.scale.to(device))


def fit_preprocess(kind: PreprocessKind, states: RowStore, rows: Tensor) -> Preprocess:
    """Fit the mean, and for "standardize" the population standard deviation, of some states.

    rows: distinct training responses, int64. Moments are summed in float64, in two passes. A
    component that never varies keeps scale 1.
    """
    if kind == "none":
        return Preprocess(None, None)
    total = torch.zeros(states.width, dtype=torch.float64)
    for some in rows.split(_ROWS):
        total += states.take(some).cpu().double().sum(0)
    states.release_pages()
    mean = total / len(rows)
    scale = torch.ones_like(mean)
    if kind == "standardize":
        squares = torch.zeros_like(mean)
        for some in rows.split(_ROWS):
            squares += (states.take(some).cpu().double() - mean).square().sum(0)
        states.release_pages()
        spread = (squares / len(rows)).sqrt()
        scale = torch.where(spread > 0, spread, scale)
    return Preprocess(mean.float(), scale.float())
