"""Language-model quantities computed over the whole vocabulary."""

import numpy as np
import torch
from numpy.typing import NDArray

from embrm.cache.schema import TokenRows
from embrm.extraction.statistics import response_statistics
from embrm.lm.head import LmHead


def statistics_of(
    head: LmHead,
    states: torch.Tensor,
    targets: torch.Tensor,
    top_k: int = 0,
    *,
    tail_mean: bool = False,
    among: NDArray[np.int64] | None = None,
) -> TokenRows[torch.Tensor]:
    """The token rows of one response that consists of these states; `among`: which are sampled."""
    positions = np.arange(len(states)) if among is None else among
    spans = [range(len(states))]
    return response_statistics(
        head, states, targets, spans, [positions], top_k, tail_mean=tail_mean
    )[1]


def dense_tail_mean(
    head: LmHead, state: torch.Tensor, target: int, top_ids: torch.Tensor
) -> torch.Tensor:
    """E_tail[∂z_j/∂h] in float64: every token's own gradient by autograd, weighted one by one."""
    weight = head.weight.detach().double()
    bias = 0 if head.bias is None else head.bias.detach().double()

    def logits(h: torch.Tensor) -> torch.Tensor:
        z = head.scale * (weight @ h + bias)
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    state = state.detach().double()
    gradients = torch.autograd.functional.jacobian(logits, state)
    p = torch.softmax(logits(state), 0)
    tail = torch.ones_like(p, dtype=torch.bool)
    tail[top_ids.long()] = False
    tail[target] = False
    if p[tail].sum() < 1e-6:
        return torch.zeros_like(state)
    return (p[tail, None] * gradients[tail]).sum(0) / p[tail].sum()
