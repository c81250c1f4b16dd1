"""Regularizers that limit how an adapter changes the language model's predictions.

They read token rows of a minibatch's responses (`embrm.training.token_rows`) and compute, through
the frozen LM head, how an adapter's shift δ_t of the states changes the predictions there. Formulas
and sources are in `docs/methods.md`. All kinds but "fisher" need an adapter, and a spec without one
is refused: a plain head moves no state, so that grm-* would only rescale the pair loss (a test
proves it).

A kind of regularizer is one function and one entry of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from embrm.core.errors import UserError, nearest
from embrm.core.lazy import LazyModule
from embrm.core.specs import Spec
from embrm.training.extensions import REGISTER_FIRST, Extension, Extensions, check_function
from embrm.training.heads.adapter import adapter_inner, adapter_readouts
from embrm.training.heads.products import product
from embrm.training.row_sampling import empirical_bayes, plug_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F  # noqa: N812

    from embrm.training.heads.bank import Parameters
    from embrm.training.token_rows import TokenBatch, TokenStore, TopK
else:
    torch, F = LazyModule("torch"), LazyModule("torch.nn.functional")

WHOLE_VOCABULARY = 1 << 15
"""Largest vocabulary for which top_k = "all" is allowed, since memory must hold all logits of a
minibatch."""


@dataclass(frozen=True)
class RegularizerKind:
    """The function that a kind of regularizer computes: of pairs or of positions, never both.

    of_pair: for grm-*, (spec, S, change, better, worse) → the value of each pair, [B]. S [m] are
        log-probabilities of responses and change [m] what the adapter changed about them; better
        and worse [B] are numbers of responses.
    of_position: for preserve-*, (tokens, moved) → the value of each token row, [n]. moved [n, C]
        are the changes of the candidates' w·h; `tokens.changes` gives those of their logits.
    Neither is given for "fisher", which is computed from the head alone.

    one_sided: whether `of_pair` reads only the better response. reads_S: whether it reads the
    cached log-probability S itself, and not only its change. linear: whether `of_pair` is linear in
    S and change, so that sampling token rows does not bias it.
    """

    of_pair: Callable[[Regularizer, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    of_position: Callable[[TokenBatch, Tensor], Tensor] | None = None
    one_sided: bool = False
    reads_S: bool = False  # noqa: N815
    linear: bool = False


def _sft(spec: Regularizer, S: Tensor, _: Tensor, better: Tensor, __: Tensor) -> Tensor:
    return -F.logsigmoid(spec.beta * S[better])


def _sft_unsquashed(_: Regularizer, S: Tensor, __: Tensor, better: Tensor, ___: Tensor) -> Tensor:
    return -S[better]


def _dpo(spec: Regularizer, _: Tensor, change: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    return -F.logsigmoid(spec.beta * (change[better] - change[worse]))


def _dpo_noref(spec: Regularizer, S: Tensor, _: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    return -F.logsigmoid(spec.beta * (S[better] - S[worse]))


def divergence(tokens: TokenBatch, moved: Tensor) -> Tensor:
    """Compute KL(p_t ‖ p̃_t) of each token row, [n], in nats: log Σ p e^Δz - Σ p Δz.

    moved: the changes of the candidates' w·h, [n, C].
    """
    changes = tokens.changes(moved)
    expected = (tokens.log_p.exp() * changes).sum(1)
    return _normaliser_change(tokens, changes) - expected


def half_variance(tokens: TokenBatch, moved: Tensor) -> Tensor:
    """Compute `divergence` to second order in δ: ½·Var_{j~p_t}(∂z_j/∂h·δ_t), [n]."""
    p, first_order = tokens.log_p.exp(), tokens.slopes() * moved
    mean = (p * first_order).sum(1, keepdim=True)
    return (p * (first_order - mean).square()).sum(1) / 2


KINDS = Extensions(
    "regularizer",
    {
        "grm-sft": RegularizerKind(of_pair=_sft, one_sided=True, reads_S=True),
        "grm-sft-unsquashed": RegularizerKind(
            of_pair=_sft_unsquashed, one_sided=True, reads_S=True, linear=True
        ),
        "grm-dpo": RegularizerKind(of_pair=_dpo),
        "grm-dpo-noref": RegularizerKind(of_pair=_dpo_noref, reads_S=True),
        "preserve-kl": RegularizerKind(of_position=divergence),
        "preserve-fisher": RegularizerKind(of_position=half_variance),
        "fisher": RegularizerKind(),
    },
)
"""Kinds of regularizers by their name in a spec."""


def register_regularizer(name: str, kind: RegularizerKind) -> None:
    """Make a regularizer of your own available as `regularizer = { kind = name }` from Python.

    The ledger records the module of its function and the SHA-256 of that module's source.

    Raises: UserError for the name of a built-in kind, and unless `kind` has one function, written
    with def, of five arguments (`of_pair`) or two (`of_position`).
    """
    if (kind.of_pair is None) == (kind.of_position is None):
        which = "neither" if kind.of_pair is None else "both"
        raise UserError(f"regularizer {name!r} has {which} of of_pair and of_position: give one")
    function, arguments = (kind.of_pair, 5) if kind.of_pair else (kind.of_position, 2)
    check_function(function, arguments, "regularizer", name)
    KINDS.register(name, kind, Extension.of(function, "regularizer", name))


def is_nonlinear(kind: str) -> bool:
    """Whether R of this kind is a function of S̃ that is not linear, which sampling can bias."""
    known = KINDS.get(kind)
    return known is not None and known.of_pair is not None and not known.linear


class Sampling(NamedTuple):
    """Which token rows of a minibatch a regularizer reads."""

    both: bool
    """Whether it reads both responses of a pair, or only the better one."""
    rows: int | None
    """Largest number of token rows of a response; None: all."""
    top_k: TopK


class Regularizer(Spec):
    """One regularizer of a run.

    grm-* (arXiv 2406.10216): (1-α)·loss + α·R, with S̃ = S + (|R|/k)·Σ_t (ℓ̃_t - ℓ_t) a response's
    log-probability under the adapted states:
      grm-sft: R = mean -logsigmoid(β·S̃_c); grm-sft-unsquashed: R = mean -S̃_c;
      grm-dpo: R = mean -logsigmoid(β·((S̃_c - S_c) - (S̃_r - S_r)));
      grm-dpo-noref: R = mean -logsigmoid(β·(S̃_c - S̃_r)).
    With a label p, the value of a pair is p times this plus 1-p times the same with c and r
    exchanged, as in the pair loss.
    preserve-*: loss + weight·R, over the token rows of all responses:
      preserve-kl: R = mean KL(p_t ‖ p̃_t); preserve-fisher: R = mean ½·Var_{j~p_t}(z̃_j - z_j), its
      second order.
    fisher, for linear heads without an adapter: loss + weight·vᵀF̄v, F̄ the mean over responses of
      Cov_{j~p_t}(∂z_j/∂h): to second order, twice the KL that shifting all states by v causes.
    """

    kind: str
    """grm-sft, grm-sft-unsquashed, grm-dpo, grm-dpo-noref, preserve-kl, preserve-fisher, fisher."""
    alpha: float = Field(default=0.01, ge=0, lt=1)
    """α of grm-*. With 0, results have the same bits as without a regularizer."""
    beta: float = Field(default=0.1, gt=0)
    """β of grm-*."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of preserve-* and fisher."""
    token_rows: int | Literal["all"] = 2
    """Number of a response's token rows that a minibatch reads, drawn anew in each epoch;
    all: every cached one, which is the default of grm-sft, grm-dpo and grm-dpo-noref."""
    estimator: Literal["empirical-bayes", "plug-in"] | None = Field(
        default=None, exclude_if=lambda value: value != "empirical-bayes"
    )
    """How grm-sft, grm-dpo and grm-dpo-noref, which are not linear in S̃, are estimated from sampled
    positions. empirical-bayes (the default): the expectation given the positions; plug-in: as
    before 0.4.0, which pulls an adapter back as a ridge penalty does."""
    top_k: int | Literal["all"] | None = None
    """Candidate tokens of a token row, besides its target: this many of the largest cached logits,
    all cached logits (None), or the whole vocabulary ("all")."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_its_kind(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not is_nonlinear(str(values.get("kind"))):
            return values
        return {"token_rows": "all", "estimator": "empirical-bayes"} | values

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of regularizer: {nearest(kind, KINDS)}{REGISTER_FIRST}")
        return kind

    @field_validator("token_rows", "top_k", mode="before")
    @classmethod
    def _some_or_all(cls, count: object) -> object:
        if count not in (None, "all") and not (isinstance(count, int) and count > 0):
            raise ValueError("take a number of at least 1, or 'all'")
        return count

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        # model_fields_set would not do: the stored spec that a replay reads sets every field.
        fields = type(self).model_fields
        given = {name for name in fields if getattr(self, name) != fields[name].default}
        if self.is_grm and "weight" in given:
            raise ValueError(f"{self.kind} is weighted by alpha: remove weight")
        if not self.is_grm:
            for field in ("alpha", "beta"):
                if field in given:
                    raise ValueError(f"{field} is of grm-*: {self.kind} has a weight")
        if not self.moves_states and "token_rows" in given:
            raise ValueError("fisher is computed once, from all token rows: remove token_rows")
        if self.estimator is not None and not is_nonlinear(self.kind):
            raise ValueError(
                f"estimator is of grm-sft, grm-dpo and grm-dpo-noref: {self.kind} is linear in "
                "what is sampled, remove estimator"
            )
        if self.estimator == "empirical-bayes" and self.token_rows == 1:
            raise ValueError(
                "token_rows = 1 says nothing of how positions differ, which the estimator needs: "
                "take at least 2, or 'all'"
            )
        return self

    @property
    def is_grm(self) -> bool:
        """Whether it weights loss and R by 1 - α and α, as those of arXiv 2406.10216 do."""
        return KINDS[self.kind].of_pair is not None

    @property
    def reads_S(self) -> bool:  # noqa: N802
        """Whether it reads the cached log-probability S itself; grm-dpo reads only its change."""
        return KINDS[self.kind].reads_S

    @property
    def moves_states(self) -> bool:
        """Whether it needs an adapter, which moves the states; "fisher" acts on a plain head."""
        kind = KINDS[self.kind]
        return kind.of_pair is not None or kind.of_position is not None

    @property
    def active(self) -> bool:
        """Whether its weight is not 0."""
        return (self.alpha if self.is_grm else self.weight) > 0

    @property
    def loss_factor(self) -> float:
        """Factor of the pair loss and its penalties."""
        return 1 - self.alpha if self.is_grm else 1.0

    @property
    def value_factor(self) -> float:
        """Factor of R."""
        return self.alpha if self.is_grm else self.weight

    @property
    def sampling(self) -> Sampling:
        """Which token rows it reads. Runs that read the same ones may share a pack."""
        rows = None if self.token_rows == "all" else self.token_rows
        return Sampling(not KINDS[self.kind].one_sided, rows, self.top_k)

    def responses_read(
        self, responses: int, chosen: Tensor, rejected: Tensor, label: Tensor
    ) -> Tensor:
        """Mark the responses of a minibatch that R depends on, bool [responses].

        chosen, rejected: int64 [B], numbers of the pairs' responses. label: of the pairs.
        """
        if not KINDS[self.kind].one_sided:
            return torch.ones(responses, dtype=torch.bool, device=label.device)
        read = torch.zeros(responses, dtype=torch.bool, device=label.device)
        read[chosen[label > 0]] = True
        read[rejected[label < 1]] = True
        return read


def regularize(
    specs: Sequence[Regularizer],
    parameters: Parameters,
    tokens: TokenBatch,
    chosen: Tensor,
    rejected: Tensor,
    label: Tensor,
    weight: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute R of P slots, and its gradients with respect to the outputs of their adapters.

    parameters: of these slots, with an adapter. chosen, rejected: int64 [B], the pairs' responses
    as numbers of the m responses of `tokens`. label, weight: [B], weights of mean 1.

    Returns R float32 [P], the adapters' outputs, and the gradients of Σ value_factor·R with respect
    to them. Slots are differentiated one after another, so that memory holds the intermediate
    values of only one.
    """
    inner = adapter_inner(parameters, tokens.X)
    readouts = adapter_readouts(parameters, tokens.vectors)
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for spec, own_inner, own_readouts in zip(specs, inner, readouts, strict=True):
        leaves = [leaf.detach().requires_grad_() for leaf in (own_inner, own_readouts)]
        value = slot_value(
            spec, tokens, candidate_moves(tokens, *leaves), chosen, rejected, label, weight
        )
        gradients += torch.autograd.grad(spec.value_factor * value, leaves)
        outputs += [own_inner, own_readouts]
        values.append(value.detach())
    return torch.stack(values), outputs, gradients


def slot_value(
    spec: Regularizer,
    tokens: TokenBatch,
    moved: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    label: Tensor,
    weight: Tensor,
) -> Tensor:
    """Compute R of one slot, a scalar, by the formulas of `Regularizer`.

    moved: the changes of the candidates' w·h, [n, C].
    """
    of_position = KINDS[spec.kind].of_position
    if of_position is not None:
        return of_position(tokens, moved).mean()
    each = log_probability_change(tokens, moved)

    def values(S: Tensor, change: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        copies = len(chosen) // len(label)
        of_pairs = label.repeat(copies), weight.repeat(copies)
        return grm_values(spec, S, change, chosen, rejected, *of_pairs)

    estimate = empirical_bayes if spec.estimator == "empirical-bayes" else plug_in
    return estimate(values, tokens, each, (chosen, rejected))


def grm_values(
    spec: Regularizer,
    S: Tensor,
    change: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    label: Tensor,
    weight: Tensor,
) -> Tensor:
    """Compute the weighted value of each of B pairs, [B], whose mean is R of grm-*.

    S, change: float32 [m], log-probabilities of responses, and what the adapter changed about them.
    chosen, rejected: int64 [B], numbers of responses. label, weight: [B]. Source: arXiv 2406.10216.
    """
    of_pair = KINDS[spec.kind].of_pair
    assert of_pair is not None  # Callers pass only grm-*.
    forward = of_pair(spec, S, change, chosen, rejected)
    swapped = of_pair(spec, S, change, rejected, chosen)
    return (label * forward + (1 - label) * swapped) * weight


def log_probability_change(tokens: TokenBatch, moved: Tensor) -> Tensor:
    """Compute ℓ̃_t - ℓ_t of the targets, [n].

    It is exactly 0 if nothing has moved, because both logsumexps are computed in the same way.
    """
    changes = tokens.changes(moved)
    own = changes.gather(1, tokens.target[:, None])[:, 0]
    return own - _normaliser_change(tokens, changes)


def _normaliser_change(tokens: TokenBatch, changes: Tensor) -> Tensor:
    return (tokens.log_p + changes).logsumexp(1) - tokens.log_p.logsumexp(1)


def candidate_moves(tokens: TokenBatch, inner: Tensor, readouts: Tensor) -> Tensor:
    """Compute the change of w_j·h_t at the candidates j of each token row t, [n, C].

    It is readouts[j]·inner[t], of inner [n, r] from `adapter_inner` and readouts [U, r] from
    `adapter_readouts`.
    """
    from embrm.training.candidate_products import CandidateProducts

    if tokens.candidates is None:
        return inner @ readouts.T
    return CandidateProducts.apply(inner, readouts, tokens.candidates)


_FISHER_RESPONSES = 4096
"""Most responses that F̄ is averaged over, evenly spaced; each token vector costs d² operations."""

FISHER_AT_ONCE = 512
"""Number of these responses that are read at a time."""


def mean_fisher(data: TokenStore, responses: Tensor, top_k: TopK) -> Tensor:
    """Average Cov_{j~p_t}(∂z_j/∂h) over each response's token rows, then over responses: F̄ [d, d].

    With g = ∂z_j/∂h, the covariance is E[g gᵀ] - E[g] E[g]ᵀ; the tail counts as one token, with the
    mean of its tokens' g. The result is float32. responses: int64, distinct. Reward positions are
    not token rows; their next token is nearly certain, so that they would add almost nothing.
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
        means = F.embedding_bag(
            candidates, tokens.vectors, per_sample_weights=p * slopes, mode="sum"
        )
        second = tokens.vectors.T @ (tokens.vectors * counted[:, None])
        total += second - means.T @ (means / rows)
        data.release_pages()
    return (total / max(1, len(held))).float()


def direction_penalty(fisher: Tensor, weights: Tensor) -> Tensor:
    """Compute vᵀF̄v, [P], of linear heads v [P, d]. fisher: F̄ [d, d]."""
    return (weights * product(fisher, weights).T.contiguous()).sum(1)
