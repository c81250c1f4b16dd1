"""Products of an adapter's factors at the candidate tokens of each position."""

from typing import Any

import torch
from torch import Tensor


class CandidateProducts(torch.autograd.Function):
    """Computes readouts[candidates]·inner, [n, C]; forward and backward share one gather.

    inner: float32 [n, r]. readouts: float32 [U, r]. candidates: int64 [n, C], rows of readouts.
    """

    @staticmethod
    def forward(ctx: Any, inner: Tensor, readouts: Tensor, candidates: Tensor) -> Tensor:
        gathered = readouts.index_select(0, candidates.flatten()).view(*candidates.shape, -1)
        ctx.save_for_backward(inner, gathered, candidates)
        ctx.vectors = len(readouts)
        return (gathered * inner[:, None, :]).sum(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        inner, gathered, candidates = ctx.saved_tensors
        (gradient,) = gradients
        of_inner = torch.bmm(gradient[:, None, :], gathered)[:, 0]
        each = (gradient[:, :, None] * inner[:, None, :]).flatten(0, 1)
        of_readouts = each.new_zeros(ctx.vectors, each.shape[1])
        return of_inner, of_readouts.index_add_(0, candidates.flatten(), each), None
