"""Banks: the heads of many runs in tensors with a leading dimension of slots, one slot per run.

The states are multiplied by the weights of all slots in one product. A head's bits do not depend on
the other slots: under `embrm.training.numerics` an element of a product has the same bits at any
position (see `products`), and no shape after the first product depends on the number of slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from embrm.core.errors import UserError
from embrm.core.lazy import LazyModule
from embrm.core.streams import stream
from embrm.training.heads import adapter, linear
from embrm.training.heads.adapter import UP, shift_of
from embrm.training.heads.kinds import HEADS, kind_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from embrm.training.heads.preprocess import Preprocess
    from embrm.training.heads.spec import HeadSpec
    from embrm.training.pairs import PairRewards
    from embrm.training.row_store import RowStore

    Parameters = dict[str, Tensor]
else:
    torch = LazyModule("torch")
    Parameters = dict

REWARDS = "rewards"
"""Name of the only parameter of a run by trees, whose models are not stored: its rewards of every
response of the cache, [P, n]."""

_ROWS = 512
"""Number of states that are scored at a time."""


def initialise(head: HeadSpec, width: int, seed: int) -> Parameters:
    """Initialise one slot: name → float32 tensor [1, ...].

    width: components of a state. An adapter does not change the initial weights of the head.
    """
    random = stream(seed, "init")
    kind = HEADS[head.kind]
    parameters = kind.initialise(head, width, random)
    if head.adapter:
        parameters |= adapter.initialise(head.adapter, width, random)
    if kind_of(parameters) is not kind:
        raise UserError(
            f"head {head.kind!r}: its owns() does not accept the parameters of its initialise(), "
            f"{', '.join(parameters)}"
        )
    return parameters


def stack(slots: Sequence[Parameters]) -> Parameters:
    """Join banks into one, [P, ...]."""
    return {name: torch.cat([slot[name] for slot in slots]) for name in slots[0]}


def rewards(parameters: Parameters, X: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
    """Compute the rewards float32 [P, n] of states X float32 [n, d] under each slot.

    kept: a dropout mask [n, width] of each hidden layer, of 0 or 1/(1 - p), shared by the slots.
    """
    return kind_of(parameters).rewards(parameters, X, kept, shift_of(parameters, X))


def pair_rewards(
    parameters: Parameters,
    X: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    totals: Tensor,
    means: Tensor,
    kept: Sequence[Tensor] = (),
) -> PairRewards:
    """Compute the rewards of B pairs of the states X float32 [n, d]; pairs are rows of X.

    totals, means: the slots that need r_c + r_r of every pair, and those that need the mean reward.
    """
    from embrm.training.pairs import PairRewards

    if kind_of(parameters) is linear and UP not in parameters:
        return linear.pair_rewards(parameters, X, chosen, rejected, totals, means)
    r = rewards(parameters, X, kept)
    return PairRewards.of(r[:, chosen], r[:, rejected], totals, means)


def score_states(
    parameters: Parameters, preprocess: Preprocess, states: RowStore, rows: Tensor
) -> Tensor:
    """Compute rewards float32 [P, n], on the CPU, of the states in `rows` int64 [n], no dropout.

    Rows in ascending order are read fastest. If the parameters are `REWARDS`, `rows` are responses
    of the cache, and no states are read.
    """
    if REWARDS in parameters:
        return parameters[REWARDS][:, rows]
    device = states.values.device
    parameters = {name: tensor.to(device) for name, tensor in parameters.items()}
    preprocess = preprocess.to(device)
    with torch.no_grad():
        out = torch.empty(slots_of(parameters), len(rows))
        for some, part in zip(rows.split(_ROWS), out.split(_ROWS, dim=1), strict=True):
            part.copy_(rewards(parameters, preprocess(states.take(some))))
    states.release_pages()
    return out


def slots_of(parameters: Parameters) -> int:
    """Count the slots of a bank."""
    return len(next(iter(parameters.values())))
