"""Heads of many runs at once: parameters have a leading dimension of slots, one slot a run.

The states are multiplied by the weights of all slots in one product. A head's arithmetic is the
same alone and beside others: under `embrm.training.numerics` an element of a product has the same
bits wherever it stands (see `products`), and nothing behind the first product has a shape that
depends on the number of slots.
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
    from embrm.training.states import States

    Parameters = dict[str, Tensor]
else:
    torch = LazyModule("torch")
    Parameters = dict

REWARDS = "rewards"
"""The only parameter of a run without weights: its rewards of every response of the cache, [P, n].
Trees have no weights that a file could hold without code."""

_ROWS = 512
"""States widened to float32 at a time when many are scored."""


def initialise(head: HeadSpec, width: int, seed: int) -> Parameters:
    """Initial parameters of one slot: a float32 tensor [1, ...] for each name.

    width: components of a state. A head begins with the same weights with and without an adapter.
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
    """Rewards float32 [P, n] of states X float32 [n, d] under each slot.

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
    """Rewards of B pairs of the states X float32 [n, d]; chosen and rejected are rows of X.

    totals, means: the slots whose sums r_c + r_r, and whose mean sums, are wanted.
    """
    from embrm.training.pairs import PairRewards

    if kind_of(parameters) is linear and UP not in parameters:
        return linear.pair_rewards(parameters, X, chosen, rejected, totals, means)
    r = rewards(parameters, X, kept)
    return PairRewards.of(r[:, chosen], r[:, rejected], totals, means)


def score_states(
    parameters: Parameters, preprocess: Preprocess, states: States, rows: Tensor
) -> Tensor:
    """Rewards float32 [P, n] of the states in `rows` int64 [n], without dropout, on the CPU.

    Rows in ascending order are read fastest. Where the parameters are `REWARDS`, `rows` are
    responses of the cache, and the states are not read.
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
    """P, the number of slots of a bank."""
    return len(next(iter(parameters.values())))
