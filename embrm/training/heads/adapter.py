"""Residual adapters, low-rank or with one hidden layer, between a state h and what reads it.

h̃ = h + up·down·h, or h̃ = h + up·ReLU(down·h + b). Initially up = 0, so that h̃ = h.
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
"""Names of an adapter's parameters: [P, r, d], [P, r] (only of kind "mlp") and [P, d, r]."""


@dataclass(frozen=True)
class Shift:
    """What the adapters add to n states, as the factors of inner[slot] @ up[slot]ᵀ.

    inner: float32 [n, r] for each slot. up: float32 [P, d, r].
    """

    inner: Sequence[Tensor]
    up: Tensor


def initialise(spec: AdapterSpec, width: int, random: np.random.Generator) -> Parameters:
    """Initialise one slot: down, and its bias, uniform within ±1/√d, and up = 0."""
    bound = width**-0.5
    down = random.uniform(-bound, bound, (1, spec.width, width)).astype(np.float32)
    parameters = {DOWN: torch.from_numpy(down)}
    if spec.kind == "mlp":
        bias = random.uniform(-bound, bound, (1, spec.width)).astype(np.float32)
        parameters[DOWN_BIAS] = torch.from_numpy(bias)
    parameters[UP] = torch.zeros(1, width, spec.width)
    return parameters


def shift_of(parameters: Parameters, X: Tensor) -> Shift | None:
    """Compute what the bank's adapters add to the states X [n, d]; None if it has no adapters."""
    return Shift(adapter_inner(parameters, X), parameters[UP]) if UP in parameters else None


def adapter_inner(parameters: Parameters, X: Tensor) -> Sequence[Tensor]:
    """Compute down·h, or ReLU(down·h + b), of states X float32 [n, d]: [n, r] for each slot."""
    inner = by_slot(X, parameters[DOWN])
    if DOWN_BIAS not in parameters:
        return inner
    return [torch.relu(x + bias) for x, bias in zip(inner, parameters[DOWN_BIAS], strict=True)]


def adapter_readouts(parameters: Parameters, vectors: Tensor) -> Sequence[Tensor]:
    """Compute the readouts vectors·up, [U, r] for each slot, of vectors [U, d] of the LM head.

    The product of such a vector with an adapter's shift up·inner is then readout·inner.
    """
    return by_slot(vectors, parameters[UP].transpose(1, 2))


def adapted(parameters: Parameters, X: Tensor) -> Tensor:
    """Compute h̃ [n, d] of the states X [n, d] under a bank of one slot; X without an adapter."""
    if UP not in parameters:
        return X
    return X + adapter_inner(parameters, X)[0] @ parameters[UP][0].T


def fold_adapter(parameters: Parameters, weight: Tensor) -> Tensor | None:
    """Fold adapters into linear heads `weight` [P, d] on h̃: equal heads on h, float64 [P, d].

    None if the adapter has a ReLU and is therefore not linear.
    """
    if UP not in parameters:
        return weight
    if DOWN_BIAS in parameters:
        return None
    up, down = parameters[UP].double(), parameters[DOWN].double()
    return weight + torch.einsum("pd,pdr,pre->pe", weight, up, down)
