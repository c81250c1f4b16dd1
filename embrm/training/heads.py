"""Reward heads on cached states, many at a time: parameters carry a leading slot dimension.

Slot p of a bank is one run's head. The states are multiplied by the weights of all slots at once,
and a head's arithmetic is the same alone and beside any others: in `embrm.training.numerics` an
element of a product has the same bits whatever its position and however many columns there are,
if they are a multiple of `_COLUMNS`: products are filled up with zeros. Everything behind the first
product has a shape that does not depend on the number of slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from embrm.core.specs import Spec
from embrm.core.streams import stream
from embrm.training.objectives import PairRewards
from embrm.training.states import States

Parameters = dict[str, Tensor]

DOWN, DOWN_BIAS, UP = "adapter.down.weight", "adapter.down.bias", "adapter.up.weight"
"""An adapter's parameters: [P, r, d], [P, r], [P, d, r]."""

REWARDS = "rewards"
"""The one parameter of what has no weights: its rewards of every response of the cache, [P, n]."""

_COLUMNS = 32
"""A product with the states has a multiple of this many columns: other kernels multiply a rest."""

_PAIRS = 64
"""Pairs whose states are subtracted at a time."""

_ROWS = 512
"""States widened at a time when many are scored."""


class AdapterSpec(Spec):
    """A residual adapter between a state and all that reads it: h̃ = h + up·down·h, or
    h + up·ReLU(down·h + b). It begins as the identity: up = 0."""

    kind: Literal["low-rank", "mlp"] = "low-rank"
    width: int = Field(default=16, gt=0)
    """Rank, or hidden units."""

    def __str__(self) -> str:
        return f"{self.kind} {self.width}"


class HeadSpec(Spec):
    """A head's shape: reward = w·h, or an MLP with ReLU and dropout after each hidden layer."""

    kind: Literal["linear", "mlp"] = "linear"
    widths: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Hidden layers of an mlp."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """After every hidden layer of an mlp."""
    adapter: AdapterSpec | None = None
    """A table: see below. The head reads h̃ instead of h."""

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if self.kind == "linear" and (self.widths or self.dropout):
            raise ValueError('widths and dropout need kind = "mlp"')
        if self.kind == "mlp" and not self.widths:
            raise ValueError("an mlp needs widths, such as widths = [64]")
        return self

    def __str__(self) -> str:
        adapter = f" on {self.adapter} adapter" if self.adapter else ""
        if self.kind == "linear":
            return f"linear{adapter}"
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"mlp {'-'.join(map(str, self.widths))}{dropout}{adapter}"


def initialise(head: HeadSpec, width: int, seed: int) -> Parameters:
    """Initial parameters of one slot, float32: a tensor [1, ...] for each name.

    width: components of a state. The reward layer has no bias, because a bias cancels in every
    margin; its weights are N(0, 1/(fan_in + 1)) (arXiv 2505.07271, code). Hidden layers, and an
    adapter's down, are drawn as torch.nn.Linear draws them: weights and bias uniform within
    ±1/√fan_in. A head begins alike with and without an adapter.
    """
    random = stream(seed, "init")
    state_width, parameters = width, {}
    for layer, outputs in enumerate(head.widths):
        bound = width**-0.5
        for name, shape in (("weight", (1, outputs, width)), ("bias", (1, outputs))):
            values = random.uniform(-bound, bound, shape).astype(np.float32)
            parameters[f"hidden.{layer}.{name}"] = torch.from_numpy(values)
        width = outputs
    values = (random.standard_normal((1, width)) / np.sqrt(width + 1)).astype(np.float32)
    parameters["output.weight"] = torch.from_numpy(values)
    if head.adapter:
        inner, bound = head.adapter.width, state_width**-0.5
        down = random.uniform(-bound, bound, (1, inner, state_width)).astype(np.float32)
        parameters[DOWN] = torch.from_numpy(down)
        if head.adapter.kind == "mlp":
            bias = random.uniform(-bound, bound, (1, inner)).astype(np.float32)
            parameters[DOWN_BIAS] = torch.from_numpy(bias)
        parameters[UP] = torch.zeros(1, state_width, inner)
    return parameters


def stack(slots: Sequence[Parameters]) -> Parameters:
    """One bank [P, ...] out of several."""
    return {name: torch.cat([slot[name] for slot in slots]) for name in slots[0]}


def rewards(parameters: Parameters, X: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
    """Rewards float32 [P, n] of states X float32 [n, d] under each slot.

    kept: one dropout mask [n, width] a hidden layer, holding 0 or 1/(1 - p), shared by the slots.
    """
    layers = sum(name.startswith("hidden.") for name in parameters) // 2
    last = parameters["output.weight"]
    inner = adapter_inner(parameters, X) if UP in parameters else None
    if not layers:
        direct = product(X, last).T.contiguous()
        if inner is None:
            return direct
        ups = parameters[UP]
        shifts = [own @ (last[slot] @ ups[slot]) for slot, own in enumerate(inner)]
        return direct + torch.stack(shifts)
    first = parameters["hidden.0.weight"]
    outputs = []
    for slot, activations in enumerate(_by_slot(X, first)):
        if inner is not None:
            activations = activations + inner[slot] @ (first[slot] @ parameters[UP][slot]).T
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


def adapter_inner(parameters: Parameters, X: Tensor) -> Sequence[Tensor]:
    """What up is multiplied by at the states X float32 [n, d]: [n, r] of each slot."""
    inner = _by_slot(X, parameters[DOWN])
    if DOWN_BIAS not in parameters:
        return inner
    return [torch.relu(x + bias) for x, bias in zip(inner, parameters[DOWN_BIAS], strict=True)]


def adapter_readouts(parameters: Parameters, vectors: Tensor) -> Sequence[Tensor]:
    """vectors·up, [U, r] of each slot, of vectors [U, d] that read a state: what they read of an
    adapter's shift up·inner is readouts·inner."""
    return _by_slot(vectors, parameters[UP].transpose(1, 2))


def adapted(parameters: Parameters, X: Tensor) -> Tensor:
    """h̃ of the states X [n, d] under a bank of one slot: [n, d]; without an adapter X itself."""
    if UP not in parameters:
        return X
    return X + adapter_inner(parameters, X)[0] @ parameters[UP][0].T


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

    totals, means: the slots whose sums, and whose mean sums, are wanted. A linear head is applied
    to h_c - h_r, and to h_c + h_r only for those: half the products where none is.
    """
    if len(parameters) > 1:
        r = rewards(parameters, X, kept)
        won, lost = r[:, chosen], r[:, rejected]
        total = won + lost
        return PairRewards(won - lost, total[totals], total[means].mean(1))
    weight = parameters["output.weight"]
    pairs = len(chosen)
    apart = X.new_empty(pairs, X.shape[1])
    sums = X.new_empty(pairs if len(totals) else 0, X.shape[1])
    for first in range(0, pairs, _PAIRS):  # few enough to stay in the processor's cache
        some = slice(first, first + _PAIRS)
        won, lost = X.index_select(0, chosen[some]), X.index_select(0, rejected[some])
        torch.sub(won, lost, out=apart[some])
        if len(totals):
            torch.add(won, lost, out=sums[some])
    difference = product(apart, weight).T.contiguous()
    total = weight.new_empty(0, pairs)
    if len(totals):
        total = product(sums, weight[totals]).T.contiguous()
    mean_total = weight.new_empty(0)
    if len(means):
        uses = torch.cat([chosen, rejected]).bincount(minlength=len(X)).to(X.dtype)
        mean_total = (weight[means] * (uses @ X / pairs)).sum(1)
    return PairRewards(difference, total, mean_total)


def _by_slot(X: Tensor, weights: Tensor) -> Sequence[Tensor]:
    """X @ weights[slot]ᵀ of each slot, in one product: [n, d] by [P, columns, d]."""
    both = product(X, weights.flatten(0, 1)).view(len(X), *weights.shape[:2])
    return both.transpose(0, 1).contiguous().unbind()


def product(X: Tensor, weight: Tensor) -> Tensor:
    """X @ weightᵀ: [n, d] by [columns, d]."""
    columns = len(weight)
    padded = F.pad(weight, (0, 0, 0, -columns % _COLUMNS))
    return (X @ padded.T)[:, :columns]


@dataclass(frozen=True)
class Preprocess:
    """What is done to a state before the head sees it: (h - mean) / scale, both float32 [d]."""

    mean: Tensor | None
    scale: Tensor | None

    def __call__(self, X: Tensor) -> Tensor:
        """States float32 [n, d], changed in place."""
        if self.mean is None or self.scale is None:
            return X
        return X.sub_(self.mean).div_(self.scale)

    def to(self, device: torch.device) -> "Preprocess":
        """The same, there."""
        if self.mean is None or self.scale is None:
            return self
        return Preprocess(self.mean.to(device), self.scale.to(device))


PreprocessKind = Literal["none", "center", "standardize"]


def fit_preprocess(kind: PreprocessKind, states: States, rows: Tensor) -> Preprocess:
    """Mean, and for "standardize" population standard deviation, of the states in `rows`.

    rows: distinct training responses, int64. Moments are summed in float64, in two passes. A
    component that never varies keeps scale 1.
    """
    if kind == "none":
        return Preprocess(None, None)
    total = torch.zeros(states.width, dtype=torch.float64)
    for some in rows.split(_ROWS):
        total += states.take(some).cpu().double().sum(0)
    states.let_go()
    mean = total / len(rows)
    scale = torch.ones_like(mean)
    if kind == "standardize":
        squares = torch.zeros_like(mean)
        for some in rows.split(_ROWS):
            squares += (states.take(some).cpu().double() - mean).square().sum(0)
        states.let_go()
        spread = (squares / len(rows)).sqrt()
        scale = torch.where(spread > 0, spread, scale)
    return Preprocess(mean.float(), scale.float())


@torch.no_grad()
def score(parameters: Parameters, preprocess: Preprocess, states: States, rows: Tensor) -> Tensor:
    """Rewards float32 [P, n] of the states in `rows` int64 [n], without dropout; on the CPU.

    Rows in ascending order are read fastest. Where the parameters are `REWARDS`, `rows` are those
    of the cache, and the states are not read.
    """
    if REWARDS in parameters:
        return parameters[REWARDS][:, rows]
    device = states.values.device
    parameters = {name: tensor.to(device) for name, tensor in parameters.items()}
    preprocess = preprocess.to(device)
    out = torch.empty(len(parameters["output.weight"]), len(rows))
    for some, part in zip(rows.split(_ROWS), out.split(_ROWS, dim=1), strict=True):
        part.copy_(rewards(parameters, preprocess(states.take(some))))
    states.let_go()
    return out
