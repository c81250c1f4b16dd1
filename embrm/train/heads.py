"""Reward heads on cached states, many at a time: parameters carry a leading slot dimension.

Slot p of a bank is one run's head. A head's arithmetic is the same alone and beside any others:
the linear bank multiplies in blocks of `SLOTS` columns, filled up with zeros, because the bits of
a matrix product depend on its shape; an MLP's matrices are multiplied slot by slot. That the bits
do not depend on the position in the block either takes `embrm.train.numerics`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from embrm.specs import Spec

Parameters = dict[str, Tensor]

SLOTS = 32
"""Columns of one linear block."""

_ROWS = 4096
"""States widened at a time when all of them are scored."""


class HeadSpec(Spec):
    """A head's shape: reward = w·h, or an MLP with ReLU and dropout after each hidden layer."""

    kind: Literal["linear", "mlp"] = "linear"
    widths: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Hidden layers of an mlp."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """After every hidden layer of an mlp."""

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if self.kind == "linear" and (self.widths or self.dropout):
            raise ValueError('widths and dropout need kind = "mlp"')
        if self.kind == "mlp" and not self.widths:
            raise ValueError("an mlp needs widths, such as widths = [64]")
        return self

    def __str__(self) -> str:
        if self.kind == "linear":
            return "linear"
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"mlp {'-'.join(map(str, self.widths))}{dropout}"


def stream(seed: int, *stage: str | int) -> np.random.Generator:
    """Random numbers of one stage: a Philox stream keyed by the seed and the stage's name.

    Nothing depends on the order in which runs or stages execute. Runs of one seed share their
    streams (common random numbers), so that differences between objectives are less noisy.
    """
    name = "/".join(map(str, (seed, *stage)))
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def initialise(head: HeadSpec, width: int, seed: int) -> Parameters:
    """Initial parameters of one slot, float32: a tensor [1, ...] for each name.

    width: components of a state. The reward layer has no bias, because a bias cancels in every
    margin; its weights are N(0, 1/(fan_in + 1)) (arXiv 2505.07271, code). Hidden layers are
    drawn as torch.nn.Linear draws them: weights and bias uniform within ±1/√fan_in.
    """
    random = stream(seed, "init")
    parameters = {}
    for layer, outputs in enumerate(head.widths):
        bound = width**-0.5
        for name, shape in (("weight", (1, outputs, width)), ("bias", (1, outputs))):
            values = random.uniform(-bound, bound, shape).astype(np.float32)
            parameters[f"hidden.{layer}.{name}"] = torch.from_numpy(values)
        width = outputs
    values = (random.standard_normal((1, width)) / np.sqrt(width + 1)).astype(np.float32)
    parameters["output.weight"] = torch.from_numpy(values)
    return parameters


def stack(slots: Sequence[Parameters]) -> Parameters:
    """One bank [P, ...] out of several."""
    return {name: torch.cat([slot[name] for slot in slots]) for name in slots[0]}


def rewards(parameters: Parameters, X: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
    """Rewards float32 [P, n] of states X float32 [n, d] under each slot.

    kept: one dropout mask [n, width] a hidden layer, holding 0 or 1/(1 - p), shared by the slots.
    """
    hidden = len(parameters) // 2
    if not hidden:
        return _linear(parameters["output.weight"], X)
    # The copies give every slot's matrices the alignment of a fresh tensor: bits may depend on it.
    slots = {name: [t.clone() for t in bank.unbind()] for name, bank in parameters.items()}
    outputs = []
    for slot, last in enumerate(slots["output.weight"]):
        activations = X
        for layer in range(hidden):
            weight, bias = (slots[f"hidden.{layer}.{name}"][slot] for name in ("weight", "bias"))
            activations = torch.relu(F.linear(activations, weight, bias))
            if kept:
                activations = activations * kept[layer]
        outputs.append(activations @ last)
    return torch.stack(outputs)


def _linear(weight: Tensor, X: Tensor) -> Tensor:
    slots = weight.shape[0]
    padded = F.pad(weight, (0, 0, 0, -slots % SLOTS))
    blocks = [(X @ block.T).T for block in padded.split(SLOTS)]
    return torch.cat(blocks).contiguous()[:slots]


@dataclass(frozen=True)
class Preprocess:
    """What is done to a state before the head sees it: (h - mean) / scale, both float32 [d]."""

    mean: Tensor | None
    scale: Tensor | None

    def __call__(self, states: Tensor) -> Tensor:
        """States in their stored dtype [n, d] to float32 [n, d]."""
        wide = states.float()
        if self.mean is None or self.scale is None:
            return wide
        return (wide - self.mean) / self.scale


PreprocessKind = Literal["none", "center", "standardize"]


def fit_preprocess(kind: PreprocessKind, states: Tensor, rows: Tensor) -> Preprocess:
    """Mean, and for "standardize" population standard deviation, of `states[rows]`.

    rows: distinct training responses, int64. Moments are summed in float64, in two passes. A
    component that never varies keeps scale 1.
    """
    if kind == "none":
        return Preprocess(None, None)
    total = torch.zeros(states.shape[1], dtype=torch.float64)
    for some in rows.split(_ROWS):
        total += states[some].double().sum(0)
    mean = total / len(rows)
    scale = torch.ones_like(mean)
    if kind == "standardize":
        squares = torch.zeros_like(mean)
        for some in rows.split(_ROWS):
            squares += (states[some].double() - mean).square().sum(0)
        spread = (squares / len(rows)).sqrt()
        scale = torch.where(spread > 0, spread, scale)
    return Preprocess(mean.float(), scale.float())


@torch.no_grad()
def score(parameters: Parameters, preprocess: Preprocess, states: Tensor) -> Tensor:
    """Rewards float32 [P, n] of `states` [n, d] in their stored dtype, without dropout."""
    chunks = [rewards(parameters, preprocess(some)) for some in states.split(_ROWS)]
    return torch.cat(chunks, dim=1)
