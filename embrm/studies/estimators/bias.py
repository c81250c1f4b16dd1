"""Measure the bias that reading few positions gives a GRM term which is not linear in S̃.

The error of a linear estimate averages out over minibatches; that of grm-dpo does not, because the
expectation of its loss at an estimate of S̃ is not its loss at S̃. The bias is measured by drawing
rows again and again from responses of which every position is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from embrm.core.sampling import evenly_spaced
from embrm.core.streams import stream
from embrm.studies.estimators.shifts import ADAPTERS, adapter_shifts
from embrm.training.regularizers import (
    KINDS,
    Regularizer,
    candidate_moves,
    log_probability_change,
)
from embrm.training.row_sampling import PairEnds, PairValues, empirical_bayes, plug_in, summed
from embrm.training.token_rows import TokenBatch, TokenStore

Estimator = Literal["plug-in", "empirical-bayes"]
_ESTIMATORS: tuple[Estimator, ...] = ("plug-in", "empirical-bayes")

_DRAWS = 32
"""Number of random draws of rows per adapter."""

_PAIRS, _FEWEST_PAIRS = 512, 16
"""Most pairs of a minibatch, and the fewest training pairs that are preferred to random ones."""


@dataclass(frozen=True)
class EstimatorBias:
    """The bias of grm-dpo (β = 0.1) if `token_rows` positions of each response are read.

    loss: mean over adapters and draws of estimate - exact value. gradient: bias of the derivative
    in the scale of the shift, Σ|mean over draws of estimate - exact| / Σ|exact|, sums over the
    adapters, where the divisor excludes what sampling the cached rows adds; None if it is 0.
    gradient_error: the standard error of `gradient` that comes from drawing finitely often.
    """

    drift: float
    token_rows: int
    estimator: Estimator
    loss: float
    gradient: float | None
    gradient_error: float | None
    sign_agrees: bool
    """Whether the mean of the estimated derivatives has the sign of the exact one with every
    adapter."""

    def trusted(self, target: float) -> bool:
        """Whether runs, which take empirical-bayes by default, may rely on so many rows."""
        small = self.gradient is not None and self.gradient <= target
        return self.estimator == "empirical-bayes" and small and self.sign_agrees


@dataclass(frozen=True)
class PairSample:
    """Pairs whose bias is measured: numbers of sampled responses, int64 [B] each."""

    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]
    random: bool
    """Whether they are random pairs of responses, not training pairs of the cache."""

    def __len__(self) -> int:
        return len(self.chosen)


def sampled_pairs(
    pairs: pl.DataFrame, chosen: NDArray[np.int64], held: NDArray[np.int64]
) -> PairSample:
    """Take at most 512 evenly spaced pairs (a minibatch by default) of responses with token rows.

    pairs: those of the cache. chosen: the cache's numbers of the sampled responses, ascending.
    held: their numbers of token rows. If fewer than 16 pairs of the split "train" have both
    responses in the sample, the sampled responses are paired at random, each used once.
    """
    usable = np.flatnonzero(held > 0)
    train = pairs.filter(pl.col("split") == "train")
    if len(train):
        ends = [train[name].to_numpy().astype(np.int64) for name in ("chosen", "rejected")]
        both = np.logical_and(*(np.isin(end, chosen[usable]) for end in ends))
        own = [np.searchsorted(chosen, end[both]) for end in ends]
        if len(own[0]) >= _FEWEST_PAIRS:
            some = evenly_spaced(len(own[0]), _PAIRS)
            return PairSample(own[0][some], own[1][some], random=False)
    count = min(_PAIRS, len(usable) // 2)
    mixed = stream(0, "estimators", "pairs").permutation(usable)
    return PairSample(mixed[:count], mixed[count : 2 * count], random=True)


def estimator_biases(
    data: TokenStore, pairs: PairSample, token_rows: Sequence[int], drifts: Sequence[float]
) -> tuple[EstimatorBias, ...]:
    """Measure the biases of both estimators of grm-dpo at every drift and number of rows.

    A response with |R| positions and M cached rows stands for one whose |R| positions repeat the
    cached rows, each |R|/M times rounded up or down. The exact value is that at all |R| positions.
    token_rows is ascending and ends with the largest number that is cached.

    Every adapter moves all responses, in the direction in which it raises the mean of
    (S̃_c - S_c) - (S̃_r - S_r), as grm-dpo asks.
    """
    if not len(pairs):
        return ()
    used = np.unique([pairs.chosen, pairs.rejected])
    read = data.read(torch.from_numpy(used), rows=None, top_k=None, draws=np.zeros(len(used)))
    world = Positions.of(read, np.diff(data.starts)[used], data.positions[used])
    chosen, rejected = (
        torch.from_numpy(np.searchsorted(used, end)) for end in (pairs.chosen, pairs.rejected)
    )
    of_pair, spec = KINDS["grm-dpo"].of_pair, Regularizer(kind="grm-dpo", beta=0.1)
    assert of_pair is not None

    def values(S: Tensor, change: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        return of_pair(spec, S, change, chosen, rejected)

    draws = [world.shuffled(draw) for draw in range(_DRAWS)]
    found: list[EstimatorBias] = []
    for drift in drifts:
        measured: dict[tuple[int, Estimator], list[Bias]] = {}
        moved = [_moved(read, world, (chosen, rejected), i, drift) for i in range(ADAPTERS)]
        for rows in token_rows:
            samples = [world.first(draw, rows) for draw in draws]
            for estimator in _ESTIMATORS:
                if estimator == "plug-in" or rows > 1:
                    measured[rows, estimator] = [
                        mean_bias(world, samples, x, values, (chosen, rejected), estimator)
                        for x in moved
                    ]
        found += without_inflation(drift, measured)
    return tuple(found)


@dataclass(frozen=True)
class Positions:
    """All positions of m responses.

    tokens: their token rows, of which only `response`, `share` and S are replaced and read. N: the
    number of positions, [m]. owner: the response of each position, [n], ascending. row: the token
    row that it repeats, [n]. place: its number within the response, [n].
    """

    tokens: TokenBatch
    N: Tensor
    owner: Tensor
    row: Tensor
    place: Tensor

    @classmethod
    def of(
        cls, tokens: TokenBatch, held: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> "Positions":
        """held: the number of token rows of each response, M [m]. positions: |R| [m]."""
        owner = np.repeat(np.arange(len(held)), positions)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(positions) - positions, positions)
        row = (np.cumsum(held) - held)[owner] + place % held[owner]
        return cls(
            replace(tokens, S=torch.zeros(len(held), dtype=torch.float64)),
            *map(torch.from_numpy, (positions, owner, row, place)),
        )

    def shuffled(self, draw: int) -> Tensor:
        """The positions of each response in a random order, [n]."""
        keys = stream(0, "estimators", "rows", draw).random(len(self.owner))
        return torch.from_numpy(np.lexsort((keys, self.owner.numpy())))

    def first(self, order: Tensor, rows: int) -> tuple[Tensor, TokenBatch]:
        """The token rows of the first `rows` positions of each response, and a batch of them."""
        taken = order[self.place < rows]
        owner = self.owner[taken]
        share = self.N.double() / self.N.clamp_max(rows)
        return self.row[taken], replace(self.tokens, response=owner, share=share[owner])

    def sums(self, each: Tensor) -> Tensor:
        """Sums over the positions of each response, [m]. each: a value of every token row."""
        return each.new_zeros(len(self.N)).index_add(0, self.owner, each[self.row])

    def spread(self, one: Tensor, other: Tensor) -> Tensor:
        """Covariance of two values of token rows over the positions of each response, [m]."""
        mean = self.sums(one) / self.N
        centred = (one[self.row] - mean[self.owner]) * other[self.row]
        total = centred.new_zeros(len(self.N)).index_add(0, self.owner, centred)
        return total / (self.N - 1).clamp_min(1)


Moved = tuple[Tensor, Tensor]
"""x_t = ℓ̃_t - ℓ_t of each token row, and its derivative in the scale of the shift, float64 [n]."""


def _moved(
    tokens: TokenBatch, world: Positions, ends: PairEnds, adapter: int, drift: float
) -> Moved:
    """What the adapter changes, in the direction in which it favours the chosen responses."""
    shift = adapter_shifts(tokens.X.double(), adapter, drift).float()
    x = changes_along(tokens, shift)
    change = world.sums(x[0])
    favours = (change[ends[0]] - change[ends[1]]).mean() >= 0
    return x if favours else changes_along(tokens, -shift)


def changes_along(tokens: TokenBatch, shift: Tensor) -> Moved:
    """Compute x_t, and its derivative in s at s = 1, where s·δ shifts the states.

    shift: δ, [n, d].
    """
    scale = torch.ones(len(shift), 1, requires_grad=True)
    x = log_probability_change(tokens, candidate_moves(tokens, scale * shift, tokens.vectors))
    (slope,) = torch.autograd.grad(x.sum(), scale)
    return x.detach().double(), slope[:, 0].double()


@dataclass(frozen=True)
class Bias:
    """Bias of a value and of its derivative, their standard errors, and the exact derivative."""

    loss: float
    slope: float
    slope_error: float
    exact_slope: float


def mean_bias(
    world: Positions,
    samples: Sequence[tuple[Tensor, TokenBatch]],
    moved: Moved,
    values: PairValues,
    ends: PairEnds,
    estimator: Estimator,
) -> Bias:
    """Average estimate - exact value over the samples.

    The noise of the means is reduced by control variates: estimates of the mean over the pairs of
    Δ, its derivative, Δ² and its derivative, and of the estimates' variance, whose expectations are
    known (Owen 2013, Monte Carlo theory, methods and examples, ch. 8).
    """
    estimate = plug_in if estimator == "plug-in" else empirical_bayes
    x, slope = moved
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def derived(value: Tensor) -> list[float]:
        (gradient,) = torch.autograd.grad(value, scale)
        return [value.item(), gradient.item()]

    whole = world.sums(x) + scale * world.sums(slope)
    exact = derived(values(world.tokens.S + whole, whole, *ends).mean())
    rows = int(torch.bincount(samples[0][1].response).max())
    known = _known(world, moved, ends, rows)
    errors, controls = [], []
    for places, tokens in samples:
        each = x[places] + scale * slope[places]
        found = derived(estimate(values, tokens, each, ends))
        errors.append(np.subtract(found, exact))
        controls.append(_controls(tokens, x[places], slope[places], ends, rows) - known)
    return _regressed(np.stack(errors), torch.stack(controls).numpy(), exact[1])


def _regressed(
    errors: NDArray[np.float64], controls: NDArray[np.float64], exact_slope: float
) -> Bias:
    """errors: of value and derivative, [draws, 2]. controls: with expectation 0, [draws, c]."""
    scaled = controls / np.maximum(np.abs(controls).max(0), np.finfo(float).tiny)
    design = np.column_stack([np.ones(len(scaled)), scaled])
    fitted, _, rank, _ = np.linalg.lstsq(design, errors, rcond=1e-9)
    rest = errors - design @ fitted
    # The variance of the intercept in a least-squares fit.
    variance = (rest[:, 1] ** 2).sum() / (len(rest) - rank)
    error = float(np.sqrt(variance * np.linalg.pinv(design.T @ design, 1e-9)[0, 0]))
    return Bias(float(fitted[0, 0]), float(fitted[0, 1]), error, exact_slope)


def _pair_terms(change: Tensor, slope: Tensor, ends: PairEnds) -> Tensor:
    """Means over the pairs of Δ, its derivative, Δ², and Δ times its derivative."""
    one, two = (of[ends[0]] - of[ends[1]] for of in (change, slope))
    return torch.stack([one.mean(), two.mean(), (one * one).mean(), (one * two).mean()])


def _known(world: Positions, moved: Moved, ends: PairEnds, rows: int) -> Tensor:
    """Expectations of the controls over all samples of `rows` positions per response."""
    x, slope = moved
    N = world.N.double()
    factor = N * N * (1 / N.clamp_max(rows) - 1 / N)
    spreads = [factor * world.spread(x, other) for other in (x, slope)]
    added = torch.stack([(of[ends[0]] + of[ends[1]]).mean() for of in spreads])
    terms = _pair_terms(world.sums(x), world.sums(slope), ends)
    terms[2:] += added
    return torch.cat([terms, added]) if rows > 1 else terms


def _controls(tokens: TokenBatch, x: Tensor, slope: Tensor, ends: PairEnds, rows: int) -> Tensor:
    m = len(tokens.S)
    terms = _pair_terms(summed(tokens, x), summed(tokens, slope), ends)
    if rows == 1:
        return terms
    K = torch.bincount(tokens.response, minlength=m).double()
    N = x.new_zeros(m).index_add(0, tokens.response, tokens.share)
    factor = N * N * (1 / K - 1 / N)
    mean = x.new_zeros(m).index_add(0, tokens.response, x) / K
    centred = x - mean[tokens.response]
    added = []
    for other in (x, slope):
        total = x.new_zeros(m).index_add(0, tokens.response, centred * other)
        spread = factor * total / (K - 1).clamp_min(1)
        added.append((spread[ends[0]] + spread[ends[1]]).mean())
    return torch.cat([terms, torch.stack(added)])


def without_inflation(
    drift: float, measured: Mapping[tuple[int, Estimator], Sequence[Bias]]
) -> list[EstimatorBias]:
    """Relate biases to the exact derivatives of the responses, not of those that stand for them.

    measured: of every adapter, by token_rows and estimator. The means of M cached rows differ
    between responses by sampling too. To second order this adds to an exact derivative what the
    plug-in estimate from M rows adds, which is therefore subtracted; it is 0 where all positions
    are cached.
    """
    cached = max(rows for rows, _ in measured)
    added = [one.slope for one in measured[cached, "plug-in"]]
    return [
        _pooled(
            drift,
            rows,
            estimator,
            [
                replace(one, exact_slope=one.exact_slope - more)
                for one, more in zip(found, added, strict=True)
            ],
        )
        for (rows, estimator), found in measured.items()
    ]


def _pooled(drift: float, rows: int, estimator: Estimator, found: Sequence[Bias]) -> EstimatorBias:
    size = sum(abs(one.exact_slope) for one in found)
    error = sum(one.slope_error**2 for one in found) ** 0.5
    return EstimatorBias(
        drift=drift,
        token_rows=rows,
        estimator=estimator,
        loss=sum(one.loss for one in found) / len(found),
        gradient=sum(abs(one.slope) for one in found) / size if size else None,
        gradient_error=error / size if size else None,
        sign_agrees=all(
            (one.exact_slope + one.slope) * one.exact_slope > 0 or one.slope == one.exact_slope == 0
            for one in found
        ),
    )
