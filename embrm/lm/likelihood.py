"""Log-probabilities of tokens, without the logits of all positions in memory at once.

Logits are computed for one block of positions at a time, reduced to one number per position and
discarded; the backward pass computes them again. Only the states and one logsumexp per position are
kept.
"""

from typing import Any

import torch
from torch import Tensor

from embrm.lm.head import LmHead

_LOGIT_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20, "mps": 64 << 20}
"""Size of a block of float32 logits, by device type."""

_LEAST_ROWS = 64
"""Minimum number of positions in a block, for any size of the vocabulary."""


def log_probabilities(head: LmHead, states: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(z)[target], float32 [n], where z are the logits of `states` under `head`.

    states: [n, d]. targets: token ids int64 [n]. Differentiable in the states and in the head's
    weight and bias. Under autocast the matrix products use its dtype, the rest float32.
    """
    kind = states.device.type
    weight, bias = head.weight, head.bias
    if torch.is_autocast_enabled(kind):
        # Cast here, because the backward pass runs outside of autocast and must compute the same.
        dtype = torch.get_autocast_dtype(kind)
        states, weight = states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        found: Tensor = _LogProbabilities.apply(
            states, targets, weight, bias, head.scale, head.softcap
        )
    return found


class _LogProbabilities(torch.autograd.Function):
    """log p of the targets; its gradient is ∂ log p/∂z_j = [j = target] - p_j."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        head = LmHead(weight, bias, scale, softcap)
        found = states.new_empty(len(states), dtype=torch.float32)
        logsumexp = torch.empty_like(found)
        for part in _blocks(states, weight):
            logits = head.logits(states[part])
            logsumexp[part] = logits.logsumexp(1)
            found[part] = logits.gather(1, targets[part, None])[:, 0] - logsumexp[part]
        ctx.save_for_backward(states, targets, weight, bias, logsumexp)
        ctx.scale, ctx.softcap = scale, softcap
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        states, targets, weight, bias, logsumexp = ctx.saved_tensors
        head = LmHead(weight, bias, ctx.scale, ctx.softcap)
        of_states = torch.empty_like(states)
        of_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        )
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        for part in _blocks(states, weight):
            logits = head.logits(states[part])
            slopes = head.slopes(logits)
            products = logits.sub_(logsumexp[part, None]).exp_().neg_()
            ones = torch.ones_like(targets[part, None], dtype=products.dtype)
            products.scatter_add_(1, targets[part, None], ones)
            products.mul_(gradient[part, None]).mul_(slopes)  # now ∂loss/∂(W h)
            narrow = products.to(weight.dtype)
            of_states[part] = narrow @ weight
            if of_weight is not None:
                of_weight += narrow.T @ states[part]
            if of_bias is not None:
                of_bias += products.sum(0)
        return (
            of_states,
            None,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(weight.dtype),
            None,
            None,
        )


def _blocks(states: Tensor, weight: Tensor) -> list[slice]:
    rows = max(_LEAST_ROWS, _LOGIT_BYTES[states.device.type] // (4 * len(weight)))
    return [slice(first, first + rows) for first in range(0, len(states), rows)]
