"""The MLP head: hidden layers with ReLU and dropout, then a linear reward layer without a bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from embrm.core.lazy import LazyModule
from embrm.training.heads.linear import WEIGHT, reward_layer
from embrm.training.heads.products import by_slot

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F  # noqa: N812

    from embrm.training.heads.adapter import Shift
    from embrm.training.heads.bank import Parameters
    from embrm.training.heads.spec import HeadSpec
else:
    torch, F = LazyModule("torch"), LazyModule("torch.nn.functional")

EXPORTED = True


def check(spec: HeadSpec) -> None:
    """Raise ValueError for an MLP without hidden layers."""
    if not spec.widths:
        raise ValueError("an mlp needs widths, such as widths = [64]")


def describe(spec: HeadSpec) -> str:
    """Describe the head in words."""
    dropout = f" dropout {spec.dropout:g}" if spec.dropout else ""
    return f"mlp {'-'.join(map(str, spec.widths))}{dropout}"


def dropout_masks(spec: HeadSpec, n: int, random: np.random.Generator) -> list[Tensor]:
    """Draw a mask float32 [n, width] of 0 or 1/(1 - p) for each hidden layer; none if p = 0."""
    p = spec.dropout
    return [
        torch.from_numpy(random.random((n, width), dtype="float32")).ge(p).div(1 - p)
        for width in (spec.widths if p else ())
    ]


def owns(parameters: Parameters) -> bool:
    """Whether these are an MLP's parameters."""
    hidden = {name for name in parameters if name.startswith("hidden.")}
    return bool(hidden) and set(parameters) - hidden == {"output.weight"}


def initialise(spec: HeadSpec, width: int, random: np.random.Generator) -> Parameters:
    """Draw hidden layers as torch.nn.Linear does: weights and bias uniform within ±1/√fan_in.

    Names: hidden.K.weight [1, outputs, inputs], hidden.K.bias [1, outputs], and output.weight,
    which is drawn as for the linear head.
    """
    parameters: Parameters = {}
    for layer, outputs in enumerate(spec.widths):
        bound = width**-0.5
        for name, shape in (("weight", (1, outputs, width)), ("bias", (1, outputs))):
            values = random.uniform(-bound, bound, shape).astype(np.float32)
            parameters[f"hidden.{layer}.{name}"] = torch.from_numpy(values)
        width = outputs
    return {**parameters, WEIGHT: reward_layer(width, random)}


def rewards(
    parameters: Parameters, X: Tensor, kept: Sequence[Tensor], shift: Shift | None
) -> Tensor:
    """Compute rewards [P, n] of states X [n, d], with one product for all first layers."""
    layers = sum(name.startswith("hidden.") for name in parameters) // 2
    first, last = parameters["hidden.0.weight"], parameters[WEIGHT]
    outputs = []
    for slot, activations in enumerate(by_slot(X, first)):
        if shift is not None:
            activations = activations + shift.inner[slot] @ (first[slot] @ shift.up[slot]).T
        for layer in range(layers):
            bias = parameters[f"hidden.{layer}.bias"][slot]
            if layer:
                weight = parameters[f"hidden.{layer}.weight"][slot]
                activations = F.linear(activations, weight)
            activations = torch.relu(activations + bias)
            if kept:
                activations = activations * kept[layer]
        outputs.append(activations @ last[slot])
    return torch.stack(outputs)


def fold(parameters: Parameters) -> None:  # noqa: ARG001
    """Return None: an MLP is not linear in the states."""
    return
