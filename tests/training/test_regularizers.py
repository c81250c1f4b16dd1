"""Regularizers against textbook formulas in float64, live language models, and no-op theorems."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from extract_models import CONFIGS
from torch import Tensor
from toy_tokens import Dense, toy_tokens
from transformers import AutoModelForCausalLM

from embrm.core.errors import UserError
from embrm.lm.head import LmHead
from embrm.training import regularizers as module
from embrm.training.bank import train
from embrm.training.curve import TrainedRun
from embrm.training.data import TrainingData
from embrm.training.heads import (
    DOWN,
    DOWN_BIAS,
    UP,
    AdapterSpec,
    HeadSpec,
    Parameters,
    adapted,
    adapter_inner,
    adapter_readouts,
    initialise,
    pair_rewards,
    stack,
)
from embrm.training.objectives import ObjectiveBank
from embrm.training.pairs import Pairs
from embrm.training.regularizers import (
    KINDS as ALL_KINDS,
)
from embrm.training.regularizers import (
    Regularizer,
    candidate_moves,
    direction_penalty,
    divergence,
    half_variance,
    is_nonlinear,
    log_probability_change,
    mean_fisher,
    regularize,
)
from embrm.training.row_sampling import summed
from embrm.training.row_store import RowStore
from embrm.training.spec import TrainSpec
from embrm.training.token_rows import PackedLogits, TokenBatch, TokenStore

GRM = tuple(name for name, kind in ALL_KINDS.items() if kind.of_pair)
KINDS = (*GRM, "preserve-kl", "preserve-fisher")
ADAPTERS = [AdapterSpec(kind="low-rank", width=3), AdapterSpec(kind="mlp", width=4)]
LM_HEADS = [{}, {"softcap": 1.5, "scale": 0.8, "bias": True}]

CHOSEN, REJECTED = torch.tensor([0, 2, 5, 4]), torch.tensor([1, 4, 2, 3])
"""Pairs that share responses; response 3 has no token row."""


def _specs(**fields: Any) -> list[Regularizer]:
    """One regularizer of each kind, with different α and weights."""
    of_grm = [
        Regularizer(
            kind=kind,
            alpha=0.05 * (1 + i),
            beta=0.1 * (1 + i),
            estimator="plug-in" if is_nonlinear(kind) else None,
            **fields,
        )
        for i, kind in enumerate(GRM)
    ]
    of_preserve = [Regularizer(kind=kind, weight=0.7, **fields) for kind in KINDS[len(GRM) :]]
    return of_grm + of_preserve


def _bank(adapter: AdapterSpec, width: int, slots: int, size: float = 0.2) -> Parameters:
    """Adapters that are not the identity, a different one in every slot."""
    bank = stack([initialise(HeadSpec(adapter=adapter), width, seed) for seed in range(slots)])
    bank[UP] = size * torch.randn(bank[UP].shape, generator=torch.Generator().manual_seed(3))
    return bank


def _read(data: TokenStore, top_k: Any = None, rows: int | None = None) -> TokenBatch:
    m = len(data.S)
    draws = np.random.default_rng(4).random(m)
    return data.read(torch.arange(m), rows=rows, top_k=top_k, draws=draws)


# Values and gradients


def _log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x.abs())) + torch.minimum(x, torch.zeros_like(x))


def _shift(parameters: Parameters, slot: int, X: Tensor) -> Tensor:
    """δ of one slot by the textbook formula."""
    inner = X @ parameters[DOWN][slot].T
    if DOWN_BIAS in parameters:
        inner = torch.clamp(inner + parameters[DOWN_BIAS][slot], min=0)
    return inner @ parameters[UP][slot].T


def _of_responses(
    spec: Regularizer, S: Tensor, change: Tensor, label: Tensor, weight: Tensor
) -> Tensor:
    """R of grm-*, from S and S̃ - S of the responses."""
    S = S + change

    def of_pairs(c: Tensor, r: Tensor) -> Tensor:
        return {
            "grm-sft": lambda: -_log_sigmoid(spec.beta * S[c]),
            "grm-sft-unsquashed": lambda: -S[c],
            "grm-dpo": lambda: -_log_sigmoid(spec.beta * (change[c] - change[r])),
            "grm-dpo-noref": lambda: -_log_sigmoid(spec.beta * (S[c] - S[r])),
        }[spec.kind]()

    each = label * of_pairs(CHOSEN, REJECTED) + (1 - label) * of_pairs(REJECTED, CHOSEN)
    return (weight * each).sum() / len(weight)


def _textbook(
    spec: Regularizer,
    dense: Dense,
    tokens: TokenBatch,
    shift: Tensor,
    label: Tensor,
    weight: Tensor,
) -> Tensor:
    """R over the whole vocabulary, in float64. shift: δ of the token rows, [n, d]."""
    X = tokens.X.double()
    log_p, log_q = dense.log_p(X), dense.log_p(X + shift)
    if spec.kind == "preserve-kl":
        return (log_p.exp() * (log_p - log_q)).sum(1).mean()
    if spec.kind == "preserve-fisher":
        first_order = torch.einsum("nvd,nd->nv", dense.gradients(X), shift)
        p = log_p.exp()
        mean = (p * first_order).sum(1)
        return 0.5 * ((p * first_order**2).sum(1) - mean**2).mean()
    change = (log_q - log_p).gather(1, tokens.target[:, None])[:, 0]
    per_response = [
        (tokens.share.double() * change)[tokens.response == i].sum() for i in range(len(tokens.S))
    ]
    return _of_responses(spec, tokens.S.double(), torch.stack(per_response), label, weight)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("lm_head", LM_HEADS, ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_values_and_gradients_equal_autograd_of_the_textbook_formulas(
    adapter: AdapterSpec, lm_head: dict[str, Any], rows: int | None, soft: bool
) -> None:
    """Every kind in one bank, through regularize(), against float64 autograd."""
    generator = torch.Generator().manual_seed(1)
    data, dense = toy_tokens(**lm_head)
    tokens = _read(data, "all", rows)
    specs = _specs()
    bank = _bank(adapter, 6, len(specs))
    label = torch.rand(4, generator=generator) if soft else torch.ones(4)
    weight = torch.rand(4, generator=generator) * 2
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in bank.items()}
    R, outputs, of_outputs = regularize(specs, leaves, tokens, CHOSEN, REJECTED, label, weight)
    adapters = [name for name in bank if name.startswith("adapter.")]
    found = torch.autograd.grad(outputs, [leaves[name] for name in adapters], of_outputs)

    wide = {name: tensor.double().requires_grad_() for name, tensor in bank.items()}
    expected = torch.stack(
        [
            _textbook(
                spec, dense, tokens, _shift(wide, slot, tokens.X.double()),
                label.double(), weight.double(),
            )
            for slot, spec in enumerate(specs)
        ]
    )  # fmt: skip
    torch.testing.assert_close(R.double(), expected.detach(), rtol=2e-5, atol=1e-6)
    factors = [*(0.05 * (1 + i) for i in range(4)), 0.7, 0.7]
    total = (expected * torch.tensor(factors, dtype=torch.float64)).sum()
    known = torch.autograd.grad(total, [wide[name] for name in adapters])
    for name, own, reference in zip(adapters, found, known, strict=True):
        for slot, spec in enumerate(specs):
            torch.testing.assert_close(
                own[slot].double(), reference[slot], rtol=1e-4,
                atol=2e-5 * reference[slot].abs().max().item(), msg=f"{spec.kind} {name}",
            )  # fmt: skip


@pytest.mark.parametrize("lm_head", LM_HEADS, ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_truncated_values_and_gradients_equal_those_of_a_model_with_a_tail_token(
    adapter: AdapterSpec, lm_head: dict[str, Any]
) -> None:
    """In the truncated model the tail is one more token, whose logit follows the mean gradient."""
    data, dense = toy_tokens(**lm_head)
    tokens, specs = _read(data, rows=2), _specs()
    assert tokens.candidates is not None
    bank = _bank(adapter, 6, len(specs))
    ones = torch.ones(4)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in bank.items()}
    R, outputs, of_outputs = regularize(specs, leaves, tokens, CHOSEN, REJECTED, ones, ones)
    adapters = [name for name in bank if name.startswith("adapter.")]
    found = torch.autograd.grad(outputs, [leaves[name] for name in adapters], of_outputs)

    wide = {name: tensor.double().requires_grad_() for name, tensor in bank.items()}
    X, total = tokens.X.double(), torch.zeros((), dtype=torch.float64)
    vectors = tokens.vectors.double()[tokens.candidates]
    u = tokens.uncapped.double()
    p = tokens.log_p.double().exp()
    p = p / p.sum(1, keepdim=True)
    for slot, spec in enumerate(specs):
        w = torch.einsum("ncd,nd->nc", vectors, _shift(wide, slot, X))
        cap = dense.softcap
        if cap is None:
            change, slopes = dense.scale * w, torch.full_like(w, dense.scale)
        else:
            change = cap * (torch.tanh((u + dense.scale * w) / cap) - torch.tanh(u / cap))
            slopes = dense.scale / torch.cosh(u / cap) ** 2
        change = torch.cat([change[:, :-1], w[:, -1:]], 1)
        first = torch.cat([(slopes * w)[:, :-1], w[:, -1:]], 1)
        log_z = torch.log((p * torch.exp(change)).sum(1))
        if spec.kind == "preserve-kl":
            value = (log_z - (p * change).sum(1)).mean()
        elif spec.kind == "preserve-fisher":
            value = 0.5 * ((p * first**2).sum(1) - (p * first).sum(1) ** 2).mean()
        else:
            of_rows = tokens.share.double() * (change[:, 0] - log_z)
            S = [of_rows[tokens.response == i].sum() for i in range(len(tokens.S))]
            value = _of_responses(
                spec, tokens.S.double(), torch.stack(S), ones.double(), ones.double()
            )
        assert R[slot].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), spec.kind
        total = total + spec.value_factor * value
    known = torch.autograd.grad(total, [wide[name] for name in adapters])
    for own, reference in zip(found, known, strict=True):
        scale = reference.abs().amax((1, 2) if reference.ndim == 3 else 1)
        difference = (own.double() - reference).abs().flatten(1).amax(1)
        assert (difference <= 2e-4 * scale).all()


def test_a_sampled_change_estimates_the_whole_without_bias() -> None:
    data, _ = toy_tokens((5,))
    bank = _bank(ADAPTERS[0], 6, 1)

    def change(rows: int | None, draw: float) -> float:
        tokens = data.read(torch.tensor([0]), rows=rows, top_k=None, draws=np.array([draw]))
        own = adapter_inner(bank, tokens.X)[0], adapter_readouts(bank, tokens.vectors)[0]
        return summed(tokens, log_probability_change(tokens, candidate_moves(tokens, *own))).item()

    whole = change(None, 0.0)
    assert whole * 5 / data.positions[0] == pytest.approx(
        sum(change(1, (i + 0.5) / 5) for i in range(5)) / data.positions[0], rel=1e-4
    )
    for rows in (1, 2, 3):
        mean = np.mean([change(rows, (i + 0.5) / 5) for i in range(5)])
        assert mean == pytest.approx(whole, rel=1e-4)


# The identity


@pytest.mark.parametrize("top_k", [None, 2, "all"])
@pytest.mark.parametrize("lm_head", LM_HEADS, ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_a_new_adapter_is_the_identity_to_the_bit(
    adapter: AdapterSpec, lm_head: dict[str, Any], top_k: Any
) -> None:
    data, _ = toy_tokens(**lm_head)
    tokens = _read(data, top_k)
    bank = initialise(HeadSpec(adapter=adapter), 6, 0)
    assert torch.equal(adapted(bank, tokens.X), tokens.X)
    own = adapter_inner(bank, tokens.X)[0], adapter_readouts(bank, tokens.vectors)[0]
    still = candidate_moves(tokens, *own)
    zeros = torch.zeros(len(tokens.X))
    assert torch.equal(tokens.S + summed(tokens, log_probability_change(tokens, still)), tokens.S)
    assert torch.equal(divergence(tokens, still), zeros)
    assert torch.equal(half_variance(tokens, still), zeros)
    specs, ones = _specs(), torch.ones(4)
    R, *_ = regularize(specs, stack([bank] * len(specs)), tokens, CHOSEN, REJECTED, ones, ones)
    found = dict(zip(KINDS, R.tolist(), strict=True))
    assert found["grm-dpo"] == torch.tensor(2.0).log().item()
    assert found["preserve-kl"] == found["preserve-fisher"] == 0
    S = torch.from_numpy(data.S)
    assert found["grm-sft-unsquashed"] == pytest.approx(-S[CHOSEN].mean().item(), rel=1e-6)


@pytest.mark.parametrize("lm_head", LM_HEADS, ids=str)
def test_fisher_is_the_divergence_to_second_order(lm_head: dict[str, Any]) -> None:
    data, _ = toy_tokens((30,), **lm_head)
    for top_k in (None, "all"):
        tokens = _double(_read(data, top_k))
        bank = {name: t.double() for name, t in _bank(ADAPTERS[0], 6, 1, 1.0).items()}
        errors = []
        for size in (0.008, 0.004, 0.002):
            own = adapter_inner(bank, tokens.X)[0], adapter_readouts(bank, tokens.vectors)[0]
            shift = candidate_moves(tokens, size * own[0], own[1])
            kl, fisher = divergence(tokens, shift), half_variance(tokens, shift)
            errors.append(((fisher - kl).abs().sum() / kl.sum()).item())
        assert errors[0] < 0.1
        for one, two in pairwise(errors):
            assert two / one == pytest.approx(0.5, abs=0.05)


def _double(tokens: TokenBatch) -> TokenBatch:
    names = ("X", "share", "S", "vectors", "uncapped", "log_p")
    return replace(tokens, **{name: getattr(tokens, name).double() for name in names})


# Live language models


@dataclass(frozen=True)
class Live:
    """A tiny language model in float64 and pairs of token sequences for it to read."""

    model: Any
    norm: Any
    ids: list[Tensor]
    n_prompt: list[int]
    softcap: float | None

    def read(self, adapter: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of every sequence: adapted states after the final norm, and the model's own logits."""
        seen: list[Tensor] = []

        def after_norm(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            seen.append(adapter(output))
            return seen[-1]

        hook = self.norm.register_forward_hook(after_norm)
        try:
            logits = [self.model(ids[None]).logits[0] for ids in self.ids]
        finally:
            hook.remove()
        return [(h[0], z) for h, z in zip(seen, logits, strict=True)]

    def targets(self, i: int) -> tuple[slice, Tensor]:
        """Positions of sequence i that predict its response, and what they predict."""
        n = self.n_prompt[i]
        return slice(n - 1, len(self.ids[i]) - 1), self.ids[i][n:]


@pytest.fixture(scope="module", params=["gpt2", "llama-untied", "gemma2"])
def live(request: pytest.FixtureRequest) -> Live:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Of float32 values, so that nothing is lost where States hold them.
            parameter.add_(torch.randn_like(parameter) * 0.2)
            parameter.copy_(parameter.float())
            parameter.requires_grad_(False)
    base = model.base_model
    norm = base.ln_f if request.param == "gpt2" else base.norm
    n_prompt, n_response = [4, 4, 1, 1, 6, 6], [5, 2, 7, 3, 1, 4]
    ids = [torch.randint(5, 380, (p + r,)) for p, r in zip(n_prompt, n_response, strict=True)]
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return Live(model, norm, ids, n_prompt, softcap)


LIVE_CHOSEN, LIVE_REJECTED = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5])


def _cached(live: Live) -> tuple[Tensor, TokenBatch]:
    """Last states [m, d] and all token rows over the whole vocabulary, float64, from one read."""
    found = live.read(lambda h: h)
    rows = [live.targets(i)[0] for i in range(len(found))]
    X = torch.cat([h[some] for (h, _), some in zip(found, rows, strict=True)])
    targets = [live.targets(i)[1] for i in range(len(found))]
    response = torch.cat([torch.full((len(t),), i) for i, t in enumerate(targets)])
    output = live.model.get_output_embeddings()
    weight, bias = output.weight, getattr(output, "bias", None)
    uncapped = torch.nn.functional.linear(X, weight, bias)
    z = torch.cat([z[some] for (_, z), some in zip(found, rows, strict=True)])
    log_p, target = z.log_softmax(1), torch.cat(targets)
    own = log_p.gather(1, target[:, None])[:, 0]
    return torch.stack([h[-1] for h, _ in found]), TokenBatch(
        X=X,
        response=response,
        share=torch.ones(len(X), dtype=torch.float64),
        S=torch.zeros(len(found), dtype=torch.float64).index_add(0, response, own),
        vectors=weight,
        candidates=None,
        target=target,
        uncapped=uncapped,
        log_p=log_p,
        head=LmHead(weight.float(), bias, 1.0, live.softcap),
    )


def _live_gradients(
    live: Live, spec: Regularizer, parameters: Parameters, S_ref: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of (1-α)·BT + α·R, or BT + weight·R, with the adapter inside the running model."""
    wide = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    before = live.read(lambda h: h)
    after = live.read(lambda h: h + _shift(wide, 0, h))
    r = torch.stack([h[-1] for h, _ in after]) @ wide["output.weight"][0]
    loss = -_log_sigmoid(r[LIVE_CHOSEN] - r[LIVE_REJECTED]).mean()
    S, kl = [], []
    for i, ((_, was), (_, now)) in enumerate(zip(before, after, strict=True)):
        rows, target = live.targets(i)
        log_p, log_q = was[rows].log_softmax(1), now[rows].log_softmax(1)
        S.append(log_q.gather(1, target[:, None]).sum())
        kl.append((log_p.exp() * (log_p - log_q)).sum(1))
    S_c, S_r = (torch.stack(S)[side] for side in (LIVE_CHOSEN, LIVE_REJECTED))
    ref = S_ref[LIVE_CHOSEN] - S_ref[LIVE_REJECTED]
    R = {
        "grm-sft": lambda: -_log_sigmoid(spec.beta * S_c).mean(),
        "grm-sft-unsquashed": lambda: -S_c.mean(),
        "grm-dpo": lambda: -_log_sigmoid(spec.beta * (S_c - S_r - ref)).mean(),
        "grm-dpo-noref": lambda: -_log_sigmoid(spec.beta * (S_c - S_r)).mean(),
        "preserve-kl": lambda: torch.cat(kl).mean(),
    }[spec.kind]()
    total = loss + spec.weight * R
    if spec.kind in GRM:
        total = (1 - spec.alpha) * loss + spec.alpha * R
    return torch.autograd.grad(total, [*wide.values()])


def _cached_gradients(
    spec: Regularizer, parameters: Parameters, last: Tensor, tokens: TokenBatch
) -> tuple[Tensor, ...]:
    """The same gradients by embrm's functions, combined as `embrm.training.bank` does."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    ones = torch.ones(len(LIVE_CHOSEN), dtype=last.dtype)
    objective = ObjectiveBank([TrainSpec()], len(ones), soft_labels=False)
    r = pair_rewards(leaves, last, LIVE_CHOSEN, LIVE_REJECTED, objective.totals, objective.means)
    loss = objective.data_loss(r, ones, ones, None) * spec.loss_factor
    _, outputs, of_outputs = regularize(
        [spec], leaves, tokens, LIVE_CHOSEN, LIVE_REJECTED, ones, ones
    )
    return torch.autograd.grad([loss.sum(), *outputs], [*leaves.values()], [None, *of_outputs])


def _close(found: Sequence[Tensor], known: Sequence[Tensor], tolerance: float) -> None:
    for own, reference in zip(found, known, strict=True):
        scale = reference.abs().max()
        assert scale > 0
        assert (own - reference).abs().max() <= tolerance * scale


LIVE_SPECS = [
    *(Regularizer(kind=kind, alpha=0.3, beta=0.1) for kind in GRM),
    Regularizer(kind="preserve-kl", weight=0.5),
]


@pytest.mark.parametrize("spec", LIVE_SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_gradients_from_cached_states_are_those_of_a_live_model(
    live: Live, adapter: AdapterSpec, spec: Regularizer
) -> None:
    """The adapter after the final norm, before the LM head and a reward head: what the cache gives
    in float64 is what backpropagation through the running model gives."""
    last, tokens = _cached(live)
    bank = {name: t.double() for name, t in _bank(adapter, last.shape[1], 1, 0.1).items()}
    known = _live_gradients(live, spec, bank, tokens.S)
    _close(_cached_gradients(spec, bank, last, tokens), known, 1e-8)


@pytest.mark.parametrize("spec", LIVE_SPECS, ids=lambda spec: spec.kind)
def test_stored_token_rows_give_the_gradients_of_a_live_model(
    live: Live, spec: Regularizer
) -> None:
    """Through TokenStore: states, logits and logsumexps are stored in float32, hence 1e-4."""
    last, tokens = _cached(live)
    data = _stored(live, tokens)
    m = len(tokens.S)
    read = data.read(torch.arange(m), rows=None, top_k="all", draws=np.zeros(m))
    bank = _bank(ADAPTERS[1], last.shape[1], 1, 0.1)
    wide = {name: t.double() for name, t in bank.items()}
    known = _live_gradients(live, spec, wide, tokens.S)
    found = _cached_gradients(spec, bank, last.float(), read)
    _close([own.double() for own in found], known, 1e-4)


def _stored(live: Live, tokens: TokenBatch) -> TokenStore:
    z, target = live.read(lambda h: h), tokens.target
    rows = torch.cat([logits[live.targets(i)[0]] for i, (_, logits) in enumerate(z)])
    top = rows.topk(8, 1)
    packed = PackedLogits.pack(
        target.int().numpy(),
        rows.gather(1, target[:, None])[:, 0].float().numpy(),
        rows.logsumexp(1).float().numpy(),
        top.indices.int().numpy(),
        top.values.float().numpy(),
    )
    held = tokens.response.bincount(minlength=len(tokens.S)).numpy()
    return TokenStore(
        states=RowStore(tokens.X.float()),
        packed_logits=RowStore(packed.matrix),
        tail_means=None,
        head=tokens.head,
        weight_rows=RowStore(tokens.head.weight),
        starts=np.cumsum([0, *held]),
        positions=held,
        S=tokens.S.numpy(),
    )


def test_log_probabilities_equal_the_masked_loss_of_transformers(live: Live) -> None:
    """Σ log p over the token rows is -loss·count with labels of -100 on the prompt; transformers
    computes it in float32."""
    _, tokens = _cached(live)
    data = _stored(live, tokens)
    m = len(tokens.S)
    read = data.read(torch.arange(m), rows=None, top_k=None, draws=np.zeros(m))
    summed = torch.zeros(m).index_add(0, read.response, read.share * read.log_p[:, 0])
    for i, ids in enumerate(live.ids):
        labels = ids.clone()
        labels[: live.n_prompt[i]] = -100
        loss = live.model(ids[None], labels=labels[None]).loss.item()
        expected = -loss * (len(ids) - live.n_prompt[i])
        assert tokens.S[i].item() == pytest.approx(expected, rel=1e-6)
        assert summed[i].item() == pytest.approx(expected, rel=1e-5)


# What does nothing


@pytest.mark.parametrize("kind", GRM)
def test_with_a_plain_head_the_regularizer_only_rescales_the_loss(live: Live, kind: str) -> None:
    """The no-op theorem: frozen states and LM head leave L_reg constant in the reward head."""
    alpha, beta = 0.3, 0.1
    last, tokens = _cached(live)
    v = initialise(HeadSpec(), last.shape[1], 0)["output.weight"][0].double().requires_grad_()
    found = live.read(lambda h: h)
    r = torch.stack([h[-1] for h, _ in found]) @ v
    bt = -_log_sigmoid(r[LIVE_CHOSEN] - r[LIVE_REJECTED]).mean()
    S = []
    for i, (_, z) in enumerate(found):
        rows, target = live.targets(i)
        S.append(z[rows].log_softmax(1).gather(1, target[:, None]).sum())
    S_c, S_r = (torch.stack(S)[side] for side in (LIVE_CHOSEN, LIVE_REJECTED))
    ref = (tokens.S[LIVE_CHOSEN], tokens.S[LIVE_REJECTED])
    R = {
        "grm-sft": -_log_sigmoid(beta * S_c).mean(),
        "grm-sft-unsquashed": -S_c.mean(),
        "grm-dpo": -_log_sigmoid(beta * (S_c - ref[0] - S_r + ref[1])).mean(),
        "grm-dpo-noref": -_log_sigmoid(beta * (S_c - S_r)).mean(),
    }[kind]
    assert not R.requires_grad  # nothing between the states and the LM head can be trained
    scaled, total = (1 - alpha) * bt, (1 - alpha) * bt + alpha * R
    (of_bt,) = torch.autograd.grad(bt, v, retain_graph=True)
    (of_scaled,) = torch.autograd.grad(scaled, v, retain_graph=True)
    (of_total,) = torch.autograd.grad(total, v)
    assert torch.equal(of_total, of_scaled)
    torch.testing.assert_close(of_total, (1 - alpha) * of_bt, rtol=1e-12, atol=1e-15)


# Training


def _training_data(
    pairs: int = 60, lm_head: dict[str, Any] | None = None, **of_pairs: Tensor
) -> tuple[TrainingData, Dense]:
    random = np.random.default_rng(6)
    responses = 40
    tokens, dense = toy_tokens(random.integers(0, 5, responses).tolist(), **(lm_head or {}))
    states = torch.from_numpy(random.standard_normal((responses, 6)).astype(np.float32))
    chosen, rejected = torch.from_numpy(
        np.stack([random.permutation(responses)[:2] for _ in range(pairs)]).T.copy()
    )
    ones = torch.ones(pairs)
    fields = {"label": ones, "weight": ones} | of_pairs
    train_pairs = Pairs(chosen, rejected, margin=None, **fields)
    some = Pairs(chosen[:9], rejected[:9], ones[:9], ones[:9], None)
    return TrainingData(RowStore(states), train_pairs, some, tokens), dense


def _bits(result: TrainedRun) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in result.parameters.items()}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_alpha_0_is_bradley_terry_with_that_adapter_to_the_bit(adapter: AdapterSpec) -> None:
    data, _ = _training_data()
    fields: dict[str, Any] = {
        "head": HeadSpec(adapter=adapter), "lr": 0.01, "epochs": 4, "batch_pairs": 16,
    }  # fmt: skip
    [bt] = train([TrainSpec(**fields)], data)
    for kind in GRM:
        nothing = Regularizer(kind=kind, alpha=0)
        [found] = train([TrainSpec(**fields, regularizer=nothing)], data)
        assert _bits(found) == _bits(bt)
        assert found.curve == bt.curve
        [without_rows] = train(
            [TrainSpec(**fields, regularizer=nothing)], replace(data, tokens=None)
        )
        assert _bits(without_rows) == _bits(bt)
        something = nothing.model_copy(update={"alpha": 0.01})
        [moved_away] = train([TrainSpec(**fields, regularizer=something)], data)
        assert _bits(moved_away) != _bits(bt)


@pytest.mark.parametrize("labels", ["soft", "flipped"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_torch_adamw_on_the_textbook_loss(kind: str, labels: str) -> None:
    """Four full-batch steps with weights and l2 against float64 autograd. With flipped labels
    grm-sft reads the better response of each pair alone."""
    generator = torch.Generator().manual_seed(7)
    label, weight = torch.rand(2, 60, generator=generator)
    if labels == "flipped":
        label = (label > 0.3).float()
    data, dense = _training_data(label=label, weight=weight)
    asked = {"alpha": 0.3, "beta": 0.2} if kind in GRM else {"weight": 2.0}
    if is_nonlinear(kind):
        asked["estimator"] = "plug-in"  # the textbook's
    regularizer = Regularizer(kind=kind, token_rows="all", top_k="all", **asked)
    head = HeadSpec(adapter=ADAPTERS[1])
    spec = TrainSpec(
        head=head, regularizer=regularizer, lr=0.02, epochs=4, batch_pairs=500, l2=0.01, seed=3
    )
    none = torch.empty(0, dtype=torch.int64)
    no_pairs = Pairs(none, none, none.float(), none.float(), None)
    [found] = train([spec], replace(data, validation=no_pairs))

    assert data.tokens is not None
    m = len(data.tokens.S)
    tokens = data.tokens.read(torch.arange(m), rows=None, top_k="all", draws=np.zeros(m))
    tokens = _double(tokens)
    w = weight.double() / weight.double().mean()
    q, pairs = label.double(), data.train
    used = torch.zeros(m, dtype=torch.bool)
    used[torch.cat([pairs.chosen, pairs.rejected])] = True
    own = used[tokens.response]
    wide = {n: t.double().requires_grad_() for n, t in initialise(head, 6, 3).items()}
    optimizer = torch.optim.AdamW([*wide.values()], lr=0.02, weight_decay=0)
    losses, values = [], []
    for _ in range(4):
        h = data.states.values.double()
        r = (h + _shift(wide, 0, h)) @ wide["output.weight"][0]
        delta = r[pairs.chosen] - r[pairs.rejected]
        loss = -(w * (q * _log_sigmoid(delta) + (1 - q) * _log_sigmoid(-delta))).mean()
        log_p = dense.log_p(dense.H)
        shift = _shift(wide, 0, dense.H)
        log_q = dense.log_p(dense.H + shift)
        if kind == "preserve-kl":
            R = (log_p.exp() * (log_p - log_q)).sum(1)[own].mean()
        elif kind == "preserve-fisher":
            first = shift @ dense.W.T
            p = log_p.exp()
            R = 0.5 * ((p * first**2).sum(1) - (p * first).sum(1) ** 2)[own].mean()
        else:
            change = (log_q - log_p).gather(1, dense.target[:, None])[:, 0] * tokens.share
            change = torch.zeros(m, dtype=torch.float64).index_add(0, tokens.response, change)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(globals(), "CHOSEN", pairs.chosen)
                patch.setitem(globals(), "REJECTED", pairs.rejected)
                R = _of_responses(regularizer, tokens.S, change, q, w)
        squares = sum((tensor**2).sum() for tensor in wide.values())
        factors = (0.7, 0.3) if kind in GRM else (1.0, 2.0)
        total = factors[0] * loss + factors[1] * R + 0.005 * squares
        losses.append(total.item())
        values.append(R.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert [row["train_loss"] for row in found.curve] == pytest.approx(losses, rel=1e-4)
    assert [row["regularizer"] for row in found.curve] == pytest.approx(values, rel=1e-4, abs=1e-6)
    for name, reference in wide.items():
        torch.testing.assert_close(
            found.parameters[name].double(), reference.detach(), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("kind", GRM)
def test_only_grm_sft_skips_responses(kind: str) -> None:
    """With hard labels, responses that are no pair's better one. With soft labels R reads all."""
    pairs = torch.tensor([0, 1, 2]), torch.tensor([1, 3, 4])
    regularizer = Regularizer(kind=kind)
    hard = regularizer.responses_read(6, *pairs, torch.tensor([1.0, 1.0, 0.0])).tolist()
    soft = regularizer.responses_read(5, *pairs, torch.tensor([0.9, 0.5, 0.1])).tolist()
    assert soft == [True] * 5
    assert hard == ([True, True, False, False, True, False] if "sft" in kind else [True] * 6)


# Fisher


def _dense_fisher(data: TokenStore, dense: Dense, responses: Sequence[int]) -> Tensor:
    p, g = dense.log_p(dense.H).exp(), dense.gradients(dense.H)
    each = []
    for i in responses:
        rows = range(data.starts[i], data.starts[i + 1])
        covariances = [torch.cov(g[t].T, correction=0, aweights=p[t]) for t in rows]
        if covariances:
            each.append(torch.stack(covariances).mean(0))
    return torch.stack(each).mean(0)


@pytest.mark.parametrize("lm_head", LM_HEADS, ids=str)
@pytest.mark.parametrize("top_k", [22, "all"])
def test_mean_fisher_equals_the_mean_covariance(lm_head: dict[str, Any], top_k: Any) -> None:
    """If all logits but one or two are cached. A tail of one token makes it exact."""
    data, dense = toy_tokens(top_k=22, **lm_head)
    responses = [0, 2, 3, 4]  # 3 has no token rows
    found = mean_fisher(data, torch.tensor(responses), top_k)
    known = _dense_fisher(data, dense, responses)
    torch.testing.assert_close(found.double(), known, rtol=1e-4, atol=1e-5 * known.max().item())
    eigenvalues = torch.linalg.eigvalsh(found.double())
    assert eigenvalues.min() > 0
    truncated = mean_fisher(toy_tokens(top_k=3, **lm_head)[0], torch.tensor(responses), 3).double()
    assert torch.linalg.eigvalsh(truncated).min() > -1e-6
    # Merging tokens into a tail loses the covariance within it, and adds none.
    assert torch.linalg.eigvalsh(known - truncated).min() > -1e-5


def test_mean_fisher_weights_responses_equally_however_many_are_read_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, dense = toy_tokens((4, 1, 3, 2, 1, 5, 0, 2))
    whole = mean_fisher(data, torch.arange(8), "all")
    monkeypatch.setattr(module, "FISHER_AT_ONCE", 3)
    torch.testing.assert_close(mean_fisher(data, torch.arange(8), "all"), whole)
    torch.testing.assert_close(
        whole.double(), _dense_fisher(data, dense, range(8)), rtol=1e-4, atol=1e-6
    )
    monkeypatch.setattr(module, "_FISHER_RESPONSES", 3)  # evenly spaced: 0, 3, 6
    torch.testing.assert_close(
        mean_fisher(data, torch.arange(8), "all").double(),
        _dense_fisher(data, dense, [0, 3, 6]), rtol=1e-4, atol=1e-6,
    )  # fmt: skip


def test_the_penalty_is_a_quadratic_form() -> None:
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(2))
    fisher = A @ A.T
    v = torch.randn(35, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    penalty = direction_penalty(fisher, v)
    wide = fisher.double()
    expected = torch.stack([own @ wide @ own for own in v.detach().double()])
    torch.testing.assert_close(penalty.detach().double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(penalty.sum(), v)
    known = 2 * v.detach().double() @ wide
    torch.testing.assert_close(gradient.double(), known, rtol=1e-5, atol=1e-5)


def test_a_fisher_run_minimises_its_loss() -> None:
    """It agrees with Newton's method on BT + weight·vᵀF̄v in float64."""
    data, dense = _training_data()
    assert data.tokens is not None
    weight = 0.05
    spec = TrainSpec(
        regularizer=Regularizer(kind="fisher", weight=weight, top_k="all"),
        lr=0.05, epochs=600, batch_pairs=500, schedule="cosine",
    )  # fmt: skip
    [found] = train([spec], data)
    used = sorted({*data.train.chosen.tolist(), *data.train.rejected.tolist()})
    F = _dense_fisher(data.tokens, dense, used)
    h = data.states.values.double()
    D = h[data.train.chosen] - h[data.train.rejected]
    v = torch.zeros(6, dtype=torch.float64)
    for _ in range(50):
        s = torch.sigmoid(-D @ v)
        gradient = -(s[:, None] * D).mean(0) + 2 * weight * F @ v
        hessian = (D * (s * (1 - s))[:, None]).T @ D / len(D) + 2 * weight * F
        v = v - torch.linalg.solve(hessian, gradient)
    last = found.curve[-1]
    best = -_log_sigmoid(D @ v).mean() + weight * v @ F @ v
    assert last["train_loss"] == pytest.approx(best.item(), rel=1e-4)
    assert last["regularizer"] == pytest.approx((v @ F @ v).item(), rel=1e-2)


# Specs


ADAPTER = {"adapter": {"kind": "low-rank", "width": 4}}


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (
            {"regularizer": {"kind": "grm-sft"}},
            ["'grm-sft'", "adapter", "head.adapter =", "fisher"],
        ),
        ({"regularizer": {"kind": "preserve-kl"}}, ["'preserve-kl'", "head.adapter ="]),
        ({"head": ADAPTER, "preprocess": "center"}, ["preprocess = 'center'", "remove preprocess"]),
        (
            {"regularizer": {"kind": "fisher"}, "preprocess": "standardize"},
            ["preprocess = 'standardize'", "remove preprocess"],
        ),
        (
            {"regularizer": {"kind": "fisher"}, "head": ADAPTER},
            ["'fisher'", "low-rank 4 adapter", "kind = 'preserve-fisher'"],
        ),
        (
            {"regularizer": {"kind": "fisher"}, "head": {"kind": "mlp", "widths": [3]}},
            ["'fisher'", "mlp 3", "linear head"],
        ),
        (
            {"regularizer": {"kind": "preserve-kl", "alpha": 0.1}, "head": ADAPTER},
            ["alpha", "preserve-kl", "weight"],
        ),
        (
            {"regularizer": {"kind": "preserve-fisher", "beta": 0.2}, "head": ADAPTER},
            ["beta", "preserve-fisher", "weight"],
        ),
        (
            {"regularizer": {"kind": "grm-dpo", "weight": 0.1}, "head": ADAPTER},
            ["grm-dpo", "alpha", "remove weight"],
        ),
        (
            {"regularizer": {"kind": "fisher", "token_rows": 3}},
            ["fisher", "remove token_rows"],
        ),
        ({"regularizer": {"kind": "grm-sft", "top_k": 0}, "head": ADAPTER}, ["top_k = 0", "'all'"]),
        (
            {"regularizer": {"kind": "grm-sft", "alpha": 1}, "head": ADAPTER},
            ["alpha", "less than 1"],
        ),
        ({"regularizer": {"kind": "grm-stf"}, "head": ADAPTER}, ["regularizer.kind", "'grm-sft'"]),
        (
            {"regularizer": {"kind": "grm-sft", "top_k": "some"}, "head": ADAPTER},
            ["top_k", "'all'"],
        ),
        (
            {"regularizer": {"kind": "grm-sft", "token_rows": 0}, "head": ADAPTER},
            ["token_rows = 0", "'all'"],
        ),
        ({"head": {"adapter": {"width": 0}}}, ["head.adapter.width", "greater than 0"]),
        ({"head": {"adapter": {"rank": 4}}}, ["rank", "width"]),
    ],
)
def test_invalid_regularizers_are_refused_in_one_line(
    fields: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        TrainSpec.parse(fields, "test")
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_a_regularizer_without_token_rows_is_refused() -> None:
    data, _ = _training_data()
    spec = TrainSpec(head=HeadSpec(adapter=ADAPTERS[0]), regularizer=Regularizer(kind="grm-dpo"))
    with pytest.raises(UserError, match=r"'grm-dpo' reads token rows.*--token-rows"):
        train([spec], replace(data, tokens=None))


def test_defaults_are_those_of_the_paper() -> None:
    assert (Regularizer(kind="grm-sft").alpha, Regularizer(kind="grm-sft").beta) == (0.01, 0.1)
    assert Regularizer(kind="grm-sft").loss_factor == 0.99
    assert math.isclose(Regularizer(kind="grm-sft").value_factor, 0.01)


@pytest.mark.parametrize("kind", [*KINDS, "fisher"])
def test_a_stored_spec_with_all_fields_can_be_read_again(kind: str) -> None:
    head = HeadSpec() if kind == "fisher" else HeadSpec(adapter=ADAPTERS[0])
    spec = TrainSpec.parse({"head": head.model_dump(), "regularizer": {"kind": kind}}, "test")
    assert TrainSpec.parse(spec.model_dump(mode="json"), "test") == spec
