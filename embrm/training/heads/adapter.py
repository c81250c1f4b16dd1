"""Residual adapters between a state and all that reads it: low-rank, or an MLP of one layer.

h̃ = h + up·down·h, or h + up·ReLU(down·h + b). An adapter begins as the identity, with up = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from embrm.core.lazy import LazyModule
from embrm.training.heads.products import by_slot

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from embrm.training.heads.bank import Parameters
    from embrm.training.heads.spec import AdapterSpec
else:
    torch = LazyModule("torch")

DOWN, DOWN_BIAS, UP = "adapter.down.weight", "adapter.down.bias", "adapter.up.weight"
"""Parameters of an adapter: [P, r, d], [P, r] (of kind "mlp" alone) and [P, d, r]."""


@dataclass(frozen=True)
class Shift:
    """What an adapter adds to n states, in factors: up[slot] @ inner[slot].

    inner: float32 [n, r] of each slot. up: float32 [P, d, r].
    """

    inner: Sequence[Tensor]
    up: Tensor


def initialise(spec: AdapterSpec, width: int, random: np.random.Generator) -> Parameters:
    """Initial parameters of one slot: down (and its bias) uniform within ±1/√d, up 0."""
    bound = width**-0.5
    down = random.uniform(-bound, bound, (1, spec.width, width)).astype(np.float32)
    parameters = {DOWN: torch.from_numpy(down)}
    if spec.kind == "mlp":
        bias = random.uniform(-bound, bound, (1, spec.width)).astype(np.float32)
        parameters[DOWN_BIAS] = torch.from_numpy(bias)
    parameters[UP] = torch.zeros(1, width, spec.width)
    return parameters


def shift_of(parameters: Parameters, X: Tensor) -> Shift | None:
    """What the bank's adapters add to the states X [n, d]; None where it has none."""
    return Shift(adapter_inner(parameters, X), parameters[UP]) if UP in parameters else None


def adapter_inner(parameters: Parameters, X: Tensor) -> Sequence[Tensor]:
    """down·h, or ReLU(down·h + b), of states X float32 [n, d]: [n, r] of each slot."""
    inner = by_slot(X, parameters[DOWN])
    if DOWN_BIAS not in parameters:
        return inner
    return [torch.relu(x + bias) for x, bias in zip(inner, parameters[DOWN_BIAS], strict=True)]


def adapter_readouts(parameters: Parameters, vectors: Tensor) -> Sequence[Tensor]:
    """vectors·up, [U, r] of each slot, of vectors [U, d] that are multiplied with states.

    What such a vector reads of an adapter's shift up·inner is then readout·inner.
    """
    return by_slot(vectors, parameters[UP].transpose(1, 2))


def adapted(parameters: Parameters, X: Tensor) -> Tensor:
    """h̃ [n, d] of the states X [n, d] under a bank of one slot; X itself without an adapter."""
    if UP not in parameters:
        return X
    return X + adapter_inner(parameters, X)[0] @ parameters[UP][0].T


def fold_adapter(parameters: Parameters, weight: Tensor) -> Tensor | None:
    """The weights [P, d] that a linear head `weight` [P, d] has on h instead of h̃, float64.

    None where a ReLU is in the way.
    """
    if UP not in parameters:
        return weight
    if DOWN_BIAS in parameters:
        return None
    up, down = parameters[UP].double(), parameters[DOWN].double()
    return weight + torch.einsum("pd,pdr,pre->pe", weight, up, down)
