"""Language-model statistics of states: logits, their logsumexp and the log-probability of tokens.

Every engine computes them here from its post-norm states, so that two engines can only differ in
the states.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from embrm.cache.schema import TokenRows
from embrm.lm.head import NO_TAIL, LmHead

_LOGIT_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20, "mps": 64 << 20}
"""Bytes of a block of float32 logits, by device type: a CPU's cache, or some GPU memory."""

_LOGIT_ROWS = 256
"""Minimum rows of a block: with fewer, reading the head's weights takes longer than the product."""


def response_statistics(
    head: LmHead,
    states: Tensor,
    targets: Tensor,
    spans: Sequence[range],
    positions: Sequence[ArrayLike],
    top_k: int = 0,
    *,
    tail_mean: bool = False,
) -> tuple[Tensor, TokenRows[Tensor]]:
    """The log-probabilities of all response tokens, and the token rows of the responses.

    states: [n, d], all states that predict a response token, one response after another. targets:
    int64 [n], the tokens they predict. spans: for each response, the positions of these states in
    its sequence. positions: for each response, ascending, those of them to make token rows of.

    Returns log p of every token, float32 [n], whose sum over a response is S, and the token rows,
    whose `response` numbers the responses of this call. They have the k = `top_k` largest logits
    (all of a smaller vocabulary) and, with `tail_mean`, tail means in the states' dtype.

    A tail mean is E_tail[∂z_j/∂h] = Σ_j p_j·slope_j·w_j / Σ_j p_j over the tail, every token that
    is neither the target nor among the k largest: p is the softmax over the whole vocabulary, w_j
    are the head's rows, and slope_j = scale·(1 - (z_j/softcap)²), or scale without soft-capping. It
    is zero where the tail's probability is under 1e-6.

    Logits are computed in blocks of rows, so that they are never all in memory.
    """
    n, vocabulary, device = len(states), head.weight.shape[0], states.device
    rows = max(_LOGIT_ROWS, _LOGIT_BYTES[device.type] // (4 * vocabulary))
    k = min(top_k, vocabulary)
    firsts = np.cumsum([0, *map(len, spans)])[:-1]
    asked = [np.asarray(own, dtype=np.int64) for own in positions]
    among = np.concatenate(
        [own - span.start + first for own, span, first in zip(asked, spans, firsts, strict=True)]
    )
    target_logit = torch.empty(n, dtype=torch.float32, device=device)
    logsumexp = torch.empty_like(target_logit)
    top_logits = torch.empty(len(among), k, dtype=torch.float32, device=device)
    top_ids = torch.empty(len(among), k, dtype=torch.int32, device=device)
    tail_means = states.new_empty(len(among), states.shape[1]) if tail_mean else None
    among_there = to_device(among, device)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        first, last = np.searchsorted(among, [part.start, part.stop])
        kept = slice(first, last)
        wanted = among_there[kept] - start
        logits = head.logits(states[part])
        target_logit[part] = logits.gather(1, targets[part, None])[:, 0]
        if k:
            top_logits[kept], ids = logits[wanted].topk(k, dim=1)
            top_ids[kept] = ids.int()
        slopes = head.slopes(logits[wanted]) if tail_mean else 1.0
        # One pass instead of four (maximum, difference, exponential, sum). On a CPU the result
        # overwrites the logits, because writing another block would take as long again.
        logp = torch.log_softmax(logits, dim=1, out=logits if device.type == "cpu" else None)
        logsumexp[part] = target_logit[part] - logp.gather(1, targets[part, None])[:, 0]
        if tail_means is not None:
            p = logp[wanted].exp_()
            p.scatter_(1, targets[part][wanted, None], 0.0)
            p.scatter_(1, top_ids[kept].long(), 0.0)
            tail = p.sum(1, keepdim=True)
            means = _weighted_sum(p.mul_(slopes), head.weight) / tail
            tail_means[kept] = means.where(tail >= NO_TAIL, 0.0)
    tokens = TokenRows(
        response=torch.arange(len(asked), dtype=torch.int32).repeat_interleave(
            torch.tensor([len(own) for own in asked])
        ),
        position=torch.from_numpy(np.concatenate(asked).astype(np.int32)),
        target=targets[among_there].int(),
        target_logit=target_logit[among_there],
        logsumexp=logsumexp[among_there],
        state=states[among_there],
        top_ids=top_ids,
        top_logits=top_logits,
        tail_mean=tail_means,
    )
    return target_logit - logsumexp, tokens


def _weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """The product of float32 [n, V] and [V, d] of any dtype, widened to float32 in blocks."""
    size = max(1, _LOGIT_BYTES[rows.device.type] // (4 * rows.shape[1]))
    out = weights.new_zeros(len(weights), rows.shape[1])
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        out.addmm_(weights[:, block], rows[block].float())
    return out


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """The values as a tensor on the device.

    For a GPU they go through pinned memory, because a copy from pageable memory waits until the GPU
    has finished all earlier work.
    """
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
