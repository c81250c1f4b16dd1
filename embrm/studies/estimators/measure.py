"""Measure the errors of the regularizers' estimators on a cache's own token rows.

A regularizer reads a sample of a response's positions, and at each of them only the largest logits,
which are cached. Both approximations are compared with exact values over the whole vocabulary,
computed in float64 from the cached states and the LM head, so the language model is not needed.

Notation, as in `docs/methods.md`: δ is a shift of the state h of a position. At h, p is the next
token's distribution and ℓ the target's log-probability; at h + δ they are p̃ and ℓ̃. S and S̃ are the
sums of ℓ and ℓ̃ over the positions of a response. The tail is all tokens but the `top_k` with the
largest logits and the target.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embrm.cache.reader import Cache, open_cache
from embrm.cache.schema import TokenRows
from embrm.core.errors import UserError
from embrm.core.sampling import evenly_spaced
from embrm.lm.head import LmHead
from embrm.studies.estimators.bias import EstimatorBias, estimator_biases, sampled_pairs
from embrm.studies.estimators.shifts import ADAPTERS, DRIFTS, adapter_shifts
from embrm.sweeps.mapped import in_memory
from embrm.training.regularizers import candidate_moves, divergence, log_probability_change
from embrm.training.token_rows import PackedLogits, TokenStore

_LOGIT_BYTES = 128 << 20
"""Bytes of float64 logits per shift that are computed at a time."""

_VOCABULARY_BLOCK = 1 << 13
"""Number of tokens whose vectors are converted to float64 at a time."""


@dataclass(frozen=True)
class TruncationError:
    """The error of reading only `top_k` logits and the target's, at shifts of one mean drift.

    tail: probability of all other tokens, mean over the rows. The others are relative errors, √(sum
    of squared errors / sum of squared exact values): change is that of ℓ̃ - ℓ, change_gradient of
    ∂(ℓ̃ - ℓ)/∂δ, kl of KL(p ‖ p̃), and kl_gradient of ∂KL/∂δ.
    """

    drift: float
    top_k: int
    tail_mean: bool
    """Whether the tail moves by its cached mean; otherwise it is held fixed."""
    tail: float
    tail_95: float
    """95th percentile of the tail's probability."""
    tail_max: float
    change: float
    change_gradient: float
    kl: float
    kl_gradient: float


@dataclass(frozen=True)
class SamplingError:
    """The standard error of a response's S̃ - S if `token_rows` of its positions are read.

    nats: root mean square over responses. relative: nats divided by the root mean square of S̃ - S;
    None if the cached rows cannot distinguish S̃ - S from 0. Both are None if no response has two
    rows.
    """

    drift: float
    token_rows: int
    nats: float | None
    relative: float | None


@dataclass(frozen=True)
class EstimatorErrors:
    """The errors of a cache's estimators, and the smallest settings with an error up to `target`.

    grm_top_k, preserve_top_k: the smallest top_k for which the gradient of ℓ̃ - ℓ (of KL) has at
    most that relative error; None if no cached one does. token_rows: the smallest number of token
    rows with at most that relative error, otherwise all that are cached. token_rows_error: the
    relative error of that number.
    """

    responses: int
    rows: int
    vocabulary: int
    target: float
    truncation: tuple[TruncationError, ...]
    sampling: tuple[SamplingError, ...]
    grm_top_k: int | None
    preserve_top_k: int | None
    token_rows: int
    token_rows_error: float | None
    tail_mean: bool
    """Whether the cache has tail means, which every run then reads."""
    bias: tuple[EstimatorBias, ...]
    """The bias of grm-dpo by drift, token_rows and estimator; empty without two responses."""
    positions: float
    """Mean number of positions of the sampled responses."""
    pairs: int
    """Number of pairs whose bias is measured."""
    random_pairs: bool
    """Whether they are random pairs of the sampled responses, not training pairs of the cache."""
    dpo_token_rows: int | None
    """The smallest number of token rows with which the empirical-bayes estimate of grm-dpo has a
    gradient bias up to `target` and the right sign; None if no number has."""


def measure_estimators(folder: Path, *, sample: int = 64, target: float = 0.05) -> EstimatorErrors:
    """Compare estimators with exact values on the token rows of `sample` evenly spaced responses.

    target: relative error for which settings are recommended.
    Raises: UserError when the cache at `folder` cannot be opened or lacks what regularizers read.
    """
    cache = _usable(open_cache(folder))
    data = _sampled(cache, sample)
    if not len(data.states.values):
        raise UserError(
            f"{folder}: none of {sample} responses has token rows: raise sample (--sample)"
        )
    shifts = torch.stack([_shifts(data, drift) for drift in DRIFTS])
    changes, truncation = _compare(data, shifts)
    held = int(np.diff(data.starts).max())
    sampling = tuple(
        SamplingError(drift, rows, *sampling_error(data, change, rows))
        for drift, change in zip(DRIFTS, changes, strict=True)
        for rows in _powers_of_two(held)
    )
    chosen = evenly_spaced(cache.manifest.n_responses, sample)
    pairs = sampled_pairs(cache.pairs, chosen, np.diff(data.starts))
    biases = estimator_biases(data, pairs, _powers_of_two(held), DRIFTS)
    tail_mean, last = data.tail_means is not None, DRIFTS[-1]
    tried = [e for e in truncation if (e.drift, e.tail_mean) == (last, tail_mean)]
    found = [e for e in sampling if e.drift == last]
    within = (e for e in found if e.relative is not None and e.relative <= target)
    taken = next(within, found[-1])
    return EstimatorErrors(
        responses=len(data.positions),
        rows=len(data.states.values),
        vocabulary=len(data.head.weight),
        target=target,
        truncation=truncation,
        sampling=sampling,
        grm_top_k=next((e.top_k for e in tried if e.change_gradient <= target), None),
        preserve_top_k=next((e.top_k for e in tried if e.kl_gradient <= target), None),
        token_rows=taken.token_rows,
        token_rows_error=taken.relative,
        tail_mean=tail_mean,
        bias=biases,
        positions=float(data.positions.mean()),
        pairs=len(pairs),
        random_pairs=pairs.random,
        dpo_token_rows=next(
            (e.token_rows for e in biases if e.drift == last and e.trusted(target)), None
        ),
    )


def _usable(cache: Cache) -> Cache:
    folder, layout = cache.folder, cache.layout
    if not layout.has_token_rows:
        raise UserError(f"{folder} has no token rows: extract with token_rows = 8 (--token-rows 8)")
    if not layout.top_k:
        raise UserError(
            f"{folder} keeps 0 logits per token row: extract with top_k = 32 (--top-k 32)"
        )
    if not cache.vocabulary:
        raise UserError(f"{folder} has no LM head: extract one with embrm extract --model MODEL")
    return cache


def _sampled(cache: Cache, size: int) -> TokenStore:
    """The token rows of `size` evenly spaced responses."""
    chosen = evenly_spaced(cache.manifest.n_responses, size)
    shards = [rows.take(np.isin(rows.response, chosen)) for rows in cache.token_shards()]
    data = in_memory(cache, TokenRows.joined(shards))
    return replace(
        data,
        starts=np.append(data.starts[chosen], data.starts[-1]),
        positions=data.positions[chosen],
        S=data.S[chosen],
    )


def _shifts(data: TokenStore, drift: float) -> Tensor:
    """Shifts δ of all rows, float32 [N, d], with mean ‖δ‖/‖h‖ = drift.

    The random adapters shift the responses in turn.
    """
    X = data.states.values.double()
    owner = np.repeat(np.arange(len(data.positions)), np.diff(data.starts)) % ADAPTERS
    shifts = torch.zeros_like(X)
    for adapter in range(ADAPTERS):
        own = torch.from_numpy(owner == adapter)
        shifts[own] = adapter_shifts(X[own], adapter, drift)
    return shifts.float()


@dataclass(frozen=True)
class Changes:
    """The effect of D shifts δ on n rows, float64, in nats.

    change: ℓ̃ - ℓ, [D, n]. kl: KL(p ‖ p̃), [D, n]. change_gradient, kl_gradient: their gradients
    with respect to δ, [D, n, d].
    """

    change: Tensor
    change_gradient: Tensor
    kl: Tensor
    kl_gradient: Tensor


def exact_changes(head: LmHead, X: Tensor, target: Tensor, shifts: Tensor) -> Changes:
    """Compute the exact effect of the shifts, over the whole vocabulary in float64.

    X: [n, d]; target: int64 [n]; shifts: [D, n, d].
    """
    X, shifts = X.double(), shifts.double()
    points = torch.cat([X[None], X + shifts])
    z = torch.empty(*points.shape[:2], len(head.weight), dtype=torch.float64)
    for part, words, bias in _vocabulary(head):
        z[..., part] = points @ words.T + bias
    normaliser = head.capped_(z).logsumexp(-1, keepdim=True)
    log_p = z.sub_(normaliser)
    before, after = log_p[0], log_p[1:]

    def slopes(log_p: Tensor) -> Tensor | float:
        return head.slopes(log_p + normaliser[1:])

    own = after.gather(2, target[None, :, None].expand(len(shifts), -1, 1))
    kl = torch.zeros_like(own[..., 0])
    kl_gradient = torch.zeros_like(shifts)
    change_gradient = (slopes(own) * head.weight[target].double()).expand_as(shifts).clone()
    for part, words, _ in _vocabulary(head):
        p, moved_p, slope = before[:, part].exp(), after[..., part].exp(), slopes(after[..., part])
        kl += (p * (before[:, part] - after[..., part])).sum(-1)
        kl_gradient += ((moved_p - p) * slope) @ words
        change_gradient -= (moved_p * slope) @ words
    change = (own - before.gather(1, target[:, None]))[..., 0]
    return Changes(change, change_gradient, kl, kl_gradient)


def _vocabulary(head: LmHead) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of the vocabulary: token ids, and their vectors [n, d] and biases [n] in float64."""
    bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
    for first in range(0, len(head.weight), _VOCABULARY_BLOCK):
        part = slice(first, first + _VOCABULARY_BLOCK)
        yield part, head.weight[part].double(), bias[part].double()


def _estimated_changes(
    data: TokenStore, responses: Tensor, top_k: int, shifts: Tensor
) -> tuple[Changes, Tensor]:
    """The effect of the shifts as training estimates it, and the tails' probabilities [n].

    responses: int64; shifts: [D, n, d] of all their token rows.
    """
    draws = np.zeros(len(responses))  # all rows, in their order
    tokens = data.read(responses, rows=None, top_k=top_k, draws=draws)
    columns: list[tuple[Tensor, ...]] = []
    for shift in shifts:
        row: list[Tensor] = []
        for quantity in (log_probability_change, divergence):
            leaf = shift.clone().requires_grad_()
            value = quantity(tokens, candidate_moves(tokens, leaf, tokens.vectors))
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            row += [value.detach().double(), gradient.double()]
        columns.append(tuple(row))
    return Changes(*map(torch.stack, zip(*columns, strict=True))), tokens.log_p[:, -1].exp()


def _compare(data: TokenStore, shifts: Tensor) -> tuple[Tensor, tuple[TruncationError, ...]]:
    """Exact ℓ̃ - ℓ of all rows, [D, N], and the errors of truncation. shifts: [D, N, d]."""
    # With tail means, each top_k is also measured as if the cache had none.
    readings = [
        (top_k, held)
        for top_k in _powers_of_two(data.top_k)
        for held in ((data, replace(data, tail_means=None)) if data.tail_means else (data,))
    ]
    changes: list[Tensor] = []
    squares = torch.zeros(len(readings), len(shifts), 4, dtype=torch.float64)
    sizes = torch.zeros(len(shifts), 4, dtype=torch.float64)
    tails: list[list[Tensor]] = [[] for _ in readings]
    row_bytes = 8 * len(data.head.weight)
    at_once = max(1, _LOGIT_BYTES // (row_bytes * int(np.diff(data.starts).max())))
    for responses in torch.arange(len(data.positions)).split(at_once):
        rows = slice(*data.starts[[int(responses[0]), int(responses[-1]) + 1]].tolist())
        X, own = data.states.values[rows], shifts[:, rows]
        target = PackedLogits(data.packed_logits.values[rows]).target
        exact = exact_changes(data.head, X, target, own)
        changes.append(exact.change)
        sizes += _squares(exact)
        for reading, (top_k, held) in enumerate(readings):
            estimated, tail = _estimated_changes(held, responses, top_k, own)
            squares[reading] += _squares(estimated, exact)
            tails[reading].append(tail)
    relative = (squares / sizes.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    entries = []
    for reading, (top_k, held) in enumerate(readings):
        tail = torch.cat(tails[reading]).double()
        of_tail = [float(f) for f in (tail.mean(), tail.quantile(0.95), tail.max())]
        for drift, errors in zip(DRIFTS, relative[reading].tolist(), strict=True):
            means = held.tail_means is not None
            entries.append(TruncationError(drift, top_k, means, *of_tail, *errors))
    entries.sort(key=lambda entry: (entry.drift, entry.top_k, entry.tail_mean))
    return torch.cat(changes, 1), tuple(entries)


def _squares(changes: Changes, exact: Changes | None = None) -> Tensor:
    """Sums of squares [D, 4] of the four quantities, or of their differences from `exact`."""
    sums = []
    for name in ("change", "change_gradient", "kl", "kl_gradient"):
        values = getattr(changes, name)
        difference = values if exact is None else values - getattr(exact, name)
        sums.append(difference.square().flatten(1).sum(1))
    return torch.stack(sums, 1)


def sampling_error(
    data: TokenStore, change: Tensor, token_rows: int
) -> tuple[float | None, float | None]:
    """Compute nats and relative of `SamplingError`. change: float64 [N], ℓ̃ - ℓ of all rows.

    The estimate of S̃ - S from m of a response's |R| positions, drawn without replacement, has the
    variance |R|²/m·(1 - m/|R|)·s², where s² is the sample variance over its cached rows. On average
    the square of the estimate from all cached rows exceeds (S̃ - S)² by such a variance, which is
    therefore subtracted. Responses with several positions but one cached row have no s² and are
    left out.
    """

    variances, squares = [], []
    parts = np.split(change.numpy(), data.starts[1:-1])
    for held, positions in zip(parts, data.positions.tolist(), strict=True):
        if len(held) > 1 or len(held) == positions == 1:
            spread = held.var(ddof=1) if len(held) > 1 else 0.0
            of_rows, of_held = (
                positions**2 * (1 / n - 1 / positions) * spread
                for n in (min(token_rows, positions), len(held))
            )
            variances.append(of_rows)
            squares.append((positions * held.mean()) ** 2 - of_held)
    if not variances:
        return None, None
    variance, square = float(np.mean(variances)), float(np.mean(squares))
    return variance**0.5, (variance / square) ** 0.5 if square > 0 else None


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]
