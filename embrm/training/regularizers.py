"""Regularizers through the frozen LM head: what a run adds to its loss beside rewards and weights.

All read the sampled token rows of a minibatch's responses (`embrm.training.tokens`), and what an
adapter's shift δ_t changes about the cached language model there. Formulas and sources:
`docs/methods.md`. With frozen states they act on an adapter alone: a plain head moves no state, and
then grm-* only rescales the pair loss (a test proves it), so a spec without one is refused.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn.functional import embedding_bag, logsigmoid

from embrm.core.specs import Spec
from embrm.training.heads import Parameters, adapter_inner, adapter_readouts, product
from embrm.training.tokens import TokenBatch, TokenStore, TopK

GRM = ("grm-sft", "grm-sft-unsquashed", "grm-dpo", "grm-dpo-noref")
"""Kinds of arXiv 2406.10216, weighted (1 - α) and α."""

READS_S = ("grm-sft", "grm-sft-unsquashed", "grm-dpo-noref")
"""Kinds that read the cached log-probability S itself; grm-dpo reads its change alone."""

_ONE_SIDED = ("grm-sft", "grm-sft-unsquashed")
"""Kinds that read the better response of a pair alone."""

_ADAPTER_FREE = "fisher"


class Regularizer(Spec):
    """One regularizer of a run.

    grm-* (arXiv 2406.10216): (1-α)·loss + α·R, with S̃ = S + (|R|/k)·Σ_t (ℓ̃_t - ℓ_t) a response's
    log-probability under the adapted states:
      grm-sft: R = mean -logsigmoid(β·S̃_c); grm-sft-unsquashed: R = mean -S̃_c;
      grm-dpo: R = mean -logsigmoid(β·((S̃_c - S_c) - (S̃_r - S_r)));
      grm-dpo-noref: R = mean -logsigmoid(β·(S̃_c - S̃_r)).
    A pair whose chosen response is better with probability p has p times this, and 1-p times the
    same with c and r exchanged, as in the pair loss.
    preserve-*: loss + weight·R, over the token rows of all responses:
      preserve-kl: R = mean KL(p_t ‖ p̃_t); preserve-fisher: R = mean ½·Var_{j~p_t}(z̃_j - z_j), its
      second order.
    fisher, for linear heads without an adapter: loss + weight·vᵀF̄v, F̄ the mean over responses of
      Cov_{j~p_t}(∂z_j/∂h): what moving all states along v would do.
    """

    kind: Literal[
        "grm-sft",
        "grm-sft-unsquashed",
        "grm-dpo",
        "grm-dpo-noref",
        "preserve-kl",
        "preserve-fisher",
        "fisher",
    ]
    """grm-sft, grm-sft-unsquashed, grm-dpo, grm-dpo-noref, preserve-kl, preserve-fisher, fisher."""
    alpha: float = Field(default=0.01, ge=0, lt=1)
    """α of grm-*. 0: nothing is added, to the bit."""
    beta: float = Field(default=0.1, gt=0)
    """β of grm-*."""
    weight: float = Field(default=1.0, ge=0)
    """Of preserve-* and fisher."""
    token_rows: int | Literal["all"] = 2
    """Token rows of a response in a minibatch, drawn anew each epoch; all: those cached."""
    top_k: int | Literal["all"] | None = None
    """Candidates of a position beside its target: so many of the largest logits, those cached
    (None), or all: the whole vocabulary, exactly."""

    @field_validator("token_rows", "top_k", mode="before")
    @classmethod
    def _some_or_all(cls, count: object) -> object:
        if count not in (None, "all") and not (isinstance(count, int) and count > 0):
            raise ValueError("take a number of at least 1, or 'all'")
        return count

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        # Not model_fields_set: a stored spec names every field, and is read again to replay it.
        fields = type(self).model_fields
        given = {name for name in fields if getattr(self, name) != fields[name].default}
        if self.kind in GRM and "weight" in given:
            raise ValueError(f"{self.kind} is weighted by alpha: remove weight")
        if self.kind not in GRM:
            for field in ("alpha", "beta"):
                if field in given:
                    raise ValueError(f"{field} is of grm-*: {self.kind} has a weight")
        if self.kind == _ADAPTER_FREE and "token_rows" in given:
            raise ValueError("fisher is computed once, from all token rows: remove token_rows")
        return self

    @property
    def moves_states(self) -> bool:
        """Whether it acts on an adapter."""
        return self.kind != _ADAPTER_FREE

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return (self.alpha if self.kind in GRM else self.weight) > 0

    @property
    def of_loss(self) -> float:
        """Factor of the pair loss and its penalties."""
        return 1 - self.alpha if self.kind in GRM else 1.0

    @property
    def of_value(self) -> float:
        """Factor of R."""
        return self.alpha if self.kind in GRM else self.weight

    @property
    def reads(self) -> tuple[bool, int | None, TopK]:
        """Whether of both responses of a pair or of the better one, how many token rows of each,
        and of how many candidates: runs that read the same may share a pack."""
        rows = None if self.token_rows == "all" else self.token_rows
        return self.kind not in _ONE_SIDED, rows, self.top_k

    def weighed(self, responses: int, chosen: Tensor, rejected: Tensor, label: Tensor) -> Tensor:
        """Which of so many responses R depends on, bool; chosen, rejected: of the pairs, as numbers
        of them; label: theirs."""
        if self.kind not in _ONE_SIDED:
            return torch.ones(responses, dtype=torch.bool, device=label.device)
        weighed = torch.zeros(responses, dtype=torch.bool, device=label.device)
        weighed[chosen[label > 0]] = True
        weighed[rejected[label < 1]] = True
        return weighed


def regularize(
    specs: Sequence[Regularizer],
    parameters: Parameters,
    tokens: TokenBatch,
    chosen: Tensor,
    rejected: Tensor,
    label: Tensor,
    weight: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """R of P slots, float32 [P], and outputs of theirs with gradients of Σ of_value·R.

    parameters: of those slots alone, with an adapter. chosen, rejected: int64 [B], the pairs as
    numbers of the m responses; label, weight: theirs, [B], the weights of mean 1. The slots are
    differentiated one after the other, so that what is kept of the token rows is one slot's.
    """
    inner = adapter_inner(parameters, tokens.X)
    readouts = adapter_readouts(parameters, tokens.vectors)
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for spec, own_inner, own_readouts in zip(specs, inner, readouts, strict=True):
        leaves = [leaf.detach().requires_grad_() for leaf in (own_inner, own_readouts)]
        value = of_slot(spec, tokens, moved(tokens, *leaves), chosen, rejected, label, weight)
        gradients += torch.autograd.grad(spec.of_value * value, leaves)
        outputs += [own_inner, own_readouts]
        values.append(value.detach())
    return torch.stack(values), outputs, gradients


def of_slot(
    spec: Regularizer,
    tokens: TokenBatch,
    moved: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    label: Tensor,
    weight: Tensor,
) -> Tensor:
    """R of one slot, a scalar; see `Regularizer` for the formulas.

    moved: what the candidates' w·h have changed by, [n, C].
    """
    if spec.kind == "preserve-fisher":
        return half_variance(tokens, moved).mean()
    if spec.kind == "preserve-kl":
        return divergence(tokens, moved).mean()
    change = summed_change(tokens, moved)
    return grm(spec, tokens.S + change, change, chosen, rejected, label, weight)


def grm(
    spec: Regularizer,
    S: Tensor,
    change: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    label: Tensor,
    weight: Tensor,
) -> Tensor:
    """R of grm-*, a scalar: the mean over B pairs.

    S, change: log-probabilities of responses, [m], and what they have changed by since the
    reference; chosen, rejected: int64 [B], numbers of responses; label, weight: [B].
    """

    def of_pairs(better: Tensor, worse: Tensor) -> Tensor:
        if spec.kind == "grm-sft-unsquashed":
            return -S[better]
        if spec.kind == "grm-sft":
            return -logsigmoid(spec.beta * S[better])
        compared = change if spec.kind == "grm-dpo" else S
        return -logsigmoid(spec.beta * (compared[better] - compared[worse]))

    each = label * of_pairs(chosen, rejected) + (1 - label) * of_pairs(rejected, chosen)
    return (each * weight).mean()


def log_probability_change(tokens: TokenBatch, moved: Tensor) -> Tensor:
    """ℓ̃_t - ℓ_t [n] of the targets; both logsumexps in the same arithmetic, so 0 at no change."""
    changes = tokens.changes(moved)
    own = changes.gather(1, tokens.target[:, None])[:, 0]
    return own - _normaliser_change(tokens, changes)


def summed_change(tokens: TokenBatch, moved: Tensor) -> Tensor:
    """Estimate of S̃ - S [m]: (|R|/k)·Σ over a response's k token rows of ℓ̃_t - ℓ_t."""
    each = tokens.share * log_probability_change(tokens, moved)
    return each.new_zeros(len(tokens.S)).index_add(0, tokens.response, each)


def divergence(tokens: TokenBatch, moved: Tensor) -> Tensor:
    """KL(p_t ‖ p̃_t) [n], in nats: log Σ p e^Δz - Σ p Δz."""
    changes = tokens.changes(moved)
    expected = (tokens.log_p.exp() * changes).sum(1)
    return _normaliser_change(tokens, changes) - expected


def half_variance(tokens: TokenBatch, moved: Tensor) -> Tensor:
    """½·Var_{j~p_t}(∂z_j/∂h·δ_t) [n]: `divergence` to second order in δ."""
    p, first_order = tokens.log_p.exp(), tokens.slopes() * moved
    mean = (p * first_order).sum(1, keepdim=True)
    return (p * (first_order - mean).square()).sum(1) / 2


def _normaliser_change(tokens: TokenBatch, changes: Tensor) -> Tensor:
    return (tokens.log_p + changes).logsumexp(1) - tokens.log_p.logsumexp(1)


def moved(tokens: TokenBatch, inner: Tensor, readouts: Tensor) -> Tensor:
    """What w_j·h_t changes by, [n, C], at candidates j of rows t: readouts[j]·inner[t].

    inner [n, r], readouts [U, r]: of `adapter_inner` and `adapter_readouts`.
    """
    if tokens.candidates is None:
        return inner @ readouts.T
    return _Moved.apply(inner, readouts, tokens.candidates)


class _Moved(torch.autograd.Function):
    """One gather serves both directions."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, readouts: Tensor, candidates: Tensor) -> Tensor:
        gathered = readouts.index_select(0, candidates.flatten()).view(*candidates.shape, -1)
        ctx.save_for_backward(inner, gathered, candidates)
        ctx.vectors = len(readouts)
        return (gathered * inner[:, None, :]).sum(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        inner, gathered, candidates = ctx.saved_tensors
        (gradient,) = gradients
        of_inner = torch.bmm(gradient[:, None, :], gathered)[:, 0]
        each = (gradient[:, :, None] * inner[:, None, :]).flatten(0, 1)
        of_readouts = each.new_zeros(ctx.vectors, each.shape[1])
        return of_inner, of_readouts.index_add_(0, candidates.flatten(), each), None


_FISHER_RESPONSES = 4096
"""Responses that F̄ is averaged over, evenly spaced: it costs d² operations a token vector."""

FISHER_AT_ONCE = 512
"""Of them, read at a time."""


def mean_fisher(data: TokenStore, responses: Tensor, top_k: TopK) -> Tensor:
    """F̄ float32 [d, d]: mean over responses of the mean over their token rows of
    Cov_{j~p_t}(∂z_j/∂h) = E[g gᵀ] - E[g] E[g]ᵀ, g = ∂z_j/∂h, with a tail as one token of mean g.

    responses: int64, distinct. The reward position is no token row: its next token is near
    certain, and F near 0 there.
    """
    step = -(-len(responses) // _FISHER_RESPONSES)
    some = responses[::step].numpy()
    held = torch.from_numpy(some[data.starts[some + 1] > data.starts[some]])
    total = torch.zeros(data.states.width, data.states.width, dtype=torch.float64)
    for part in held.split(FISHER_AT_ONCE):
        tokens = data.read(part, rows=None, top_k=top_k, draws=np.zeros(len(part)))
        rows = torch.bincount(tokens.response, minlength=len(part))[tokens.response, None]
        slopes, p = tokens.slopes(), tokens.log_p.exp()
        p = p / p.sum(1, keepdim=True)
        each = (p * slopes.square() / rows).flatten()
        candidates = tokens.candidates
        if candidates is None:
            candidates = torch.arange(p.shape[1]).expand_as(p).contiguous()
        counted = each.new_zeros(len(tokens.vectors)).index_add(0, candidates.flatten(), each)
        means = embedding_bag(candidates, tokens.vectors, per_sample_weights=p * slopes, mode="sum")
        second = tokens.vectors.T @ (tokens.vectors * counted[:, None])
        total += second - means.T @ (means / rows)
        data.release_pages()
    return (total / max(1, len(held))).float()


def direction_penalty(fisher: Tensor, weights: Tensor) -> Tensor:
    """vᵀF̄v [P] of linear heads v [P, d]; fisher: [d, d]."""
    return (weights * product(fisher, weights).T.contiguous()).sum(1)
