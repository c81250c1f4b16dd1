"""Losses and gradients of a step are the textbook's in float64, however the minibatch is cut."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extract_models import save_model, tokenizer
from minibatch import CUTS, ENCODED, PAIRS, PREFERENCES, micro
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.finetuning.batches import PairTokens
from embrm.finetuning.losses import StepLoss
from embrm.finetuning.model import RewardModel, new_model
from embrm.finetuning.spec import FinetuneRun, LoraSpec
from embrm.lm.loading import load_model
from embrm.training.objectives import ObjectiveBank
from embrm.training.pairs import PairRewards

RUNS: dict[str, dict[str, Any]] = {
    "bt": {},
    "margins": {"margin_scale": 0.5},
    "smoothing": {"label_smoothing": 0.1},
    "hinge": {"loss": "hinge"},
    "logitnorm": {"loss": "logitnorm"},
    "bt_dr": {"loss": "bt_dr"},
    "classifier": {"loss": "classifier"},
    "bsr": {"bsr": 0.3},
    "bsr of a reference batch": {"bsr": 0.3, "bsr_batch": 2},
    "centering and l2": {"centering": 0.2, "l2": 0.1},
    "grm-sft": {"regularizer": {"kind": "grm-sft", "alpha": 0.3, "beta": 0.01}},
    "grm-sft-unsquashed": {"regularizer": {"kind": "grm-sft-unsquashed", "alpha": 0.3}},
    "grm-dpo": {"regularizer": {"kind": "grm-dpo", "alpha": 0.3}},
    "grm-dpo-noref": {"regularizer": {"kind": "grm-dpo-noref", "alpha": 0.3}, "bsr": 0.2},
    "mlp": {"head": {"kind": "mlp", "widths": [5, 4]}, "bsr": 0.3},
}


REFERENCE = torch.linspace(-150, -20, 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    kinds = ("llama-tied", "llama-untied", "gemma2", "gpt2")
    return {kind: save_model(root / kind, kind, tokenizer()) for kind in kinds}


def _step(
    model: RewardModel, run: FinetuneRun, cuts: list[range]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all pairs as one minibatch, in micro-batches."""
    data = PairTokens(ENCODED, PREFERENCES, run.active_regularizer, REFERENCE)
    read = [data.__getitems__(micro(cut)) for cut in cuts]
    loss_of = StepLoss(run, PAIRS, soft_labels=True)
    mean = None
    if loss_of.needs_mean:
        with torch.no_grad():
            mean = sum(one["share"] * model(**one["text"])[0].mean() for one in read)
    total = torch.zeros(())
    for one in read:
        loss, _ = loss_of(*model(**one["text"]), **one["pairs"], mean_reward=mean)
        (one["share"] * loss).backward()
        total += one["share"] * loss.detach()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return total, found


def _textbook(folder: Path, run: FinetuneRun) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, from all logits of one text at a time, by formulas written out here."""
    causal = load_model(folder, dtype="float32", device="cpu").double()
    start = new_model(causal, run.head, 0, "full", LoraSpec(), with_S=False)
    head = {n: p.detach().double().requires_grad_() for n, p in start.head.named_parameters()}
    r, S = [], []
    for entry in ENCODED:
        ids = torch.from_numpy(entry.ids.astype(np.int64))
        output = causal(input_ids=ids[None], output_hidden_states=True)
        x = output.hidden_states[-1][0, entry.final_position]
        for layer in range(len(run.head.widths)):
            x = torch.relu(head[f"hidden.{layer}.weight"] @ x + head[f"hidden.{layer}.bias"])
        r.append(head["output.weight"] @ x)
        logp = torch.log_softmax(output.logits[0], 1)
        first = max(entry.n_prompt, 1)
        S.append(logp[first - 1 : -1].gather(1, ids[first:, None]).sum())
    R, LP, ref = torch.stack(r), torch.stack(S), REFERENCE.double()
    p = PREFERENCES
    label, margin = p.label.double(), p.margin.double()
    w = (p.weight / p.weight.mean()).double()
    c, j = p.chosen, p.rejected
    q = label * (1 - run.label_smoothing) + (1 - label) * run.label_smoothing

    def f(a: Tensor, b: Tensor) -> Tensor:
        m = 0 if run.margin_scale is None else run.margin_scale * margin
        return {
            "bt": lambda: -logsigmoid(a - b - m),
            "hinge": lambda: (1 - (a - b)).clamp_min(0),
            "logitnorm": lambda: -logsigmoid((a - b) / (a * a + b * b).sqrt()),
            "bt_dr": lambda: -logsigmoid(a - b) - logsigmoid(a) - logsigmoid(-b),
            "classifier": lambda: -(logsigmoid(a) + logsigmoid(-b)) / 2,
        }[run.loss]()

    rc, rr = R[c], R[j]
    loss = (w * (q * f(rc, rr) + (1 - q) * f(rr, rc))).mean()
    mean = torch.cat([rc, rr]).mean()
    loss = loss + run.bsr * (run.bsr_batch or PAIRS) * mean**2
    loss = loss + run.centering * ((rc + rr) ** 2).mean()
    if run.regularizer:
        kind, beta = run.regularizer.kind, run.regularizer.beta

        def g(a: Tensor, b: Tensor) -> Tensor:
            moved = (LP[a] - ref[a]) - (LP[b] - ref[b])
            return {
                "grm-sft": -logsigmoid(beta * LP[a]),
                "grm-sft-unsquashed": -LP[a],
                "grm-dpo": -logsigmoid(beta * moved),
                "grm-dpo-noref": -logsigmoid(beta * (LP[a] - LP[b])),
            }[kind]

        alpha = run.regularizer.alpha
        loss = (1 - alpha) * loss + alpha * (w * (label * g(c, j) + (1 - label) * g(j, c))).mean()
    loss = loss + run.l2 / 2 * sum((tensor**2).sum() for tensor in head.values())
    loss.backward()
    found = {f"head.{name}": tensor.grad for name, tensor in head.items()}
    for name, parameter in causal.named_parameters():
        if parameter.grad is not None:
            inner = name.removeprefix(causal.base_model_prefix + ".")
            found[f"backbone.{inner}" if inner != name else name] = parameter.grad
    return loss.detach(), found


def _compare(folder: Path, run: FinetuneRun) -> None:
    causal = load_model(folder, dtype="float32", device="cpu")
    with_S = run.regularizer is not None
    model = new_model(causal, run.head, 0, "full", LoraSpec(), with_S=with_S).train()
    expected, textbook = _textbook(folder, run)
    whole = torch.cat([gradient.flatten() for gradient in textbook.values()]).norm()
    for cuts in CUTS:
        model.zero_grad()
        loss, gradients = _step(model, run, cuts)
        assert float(loss) == pytest.approx(float(expected), rel=2e-6)
        assert gradients.keys() == textbook.keys()
        for name, gradient in gradients.items():
            apart = (gradient.double() - textbook[name]).norm()
            assert apart <= 1e-4 * textbook[name].norm() + 1e-7 * whole, name


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_the_textbooks(folders: dict[str, Path], name: str) -> None:
    _compare(folders["llama-tied"], FinetuneRun.parse(RUNS[name], name))


@pytest.mark.parametrize("kind", ["llama-untied", "gemma2", "gpt2"])
def test_log_probabilities_are_those_of_every_kind_of_head(
    folders: dict[str, Path], kind: str
) -> None:
    _compare(folders[kind], FinetuneRun.parse(RUNS["grm-dpo-noref"], kind))


@pytest.mark.parametrize("with_S", [False, True])
def test_an_lm_head_is_kept_only_where_it_is_used(folders: dict[str, Path], with_S: bool) -> None:
    causal = load_model(folders["llama-untied"], dtype="float32", device="cpu")
    weight = weakref.ref(causal.lm_head.weight)
    model = new_model(causal, FinetuneRun().head, 0, "full", LoraSpec(), with_S=with_S)
    del causal
    gc.collect()
    assert (weight() is not None) == with_S
    assert model.backbone is not None


def test_bsr_of_a_micro_batch_is_its_own_mean() -> None:
    run = FinetuneRun.parse({"bsr": 0.3}, "test")
    r = torch.tensor([1.0, 2.0, -0.5, 0.25])
    of_pairs = {"label": torch.ones(2), "weight": torch.ones(2), "margin": None}
    loss, _ = StepLoss(run, 8, soft_labels=False, mean_over=2)(r, None, torch.zeros(()), **of_pairs)
    bt = -logsigmoid(r[:2] - r[2:]).mean()
    assert float(loss) == pytest.approx(float(bt + 0.3 * 2 * r.mean() ** 2))


def test_bsr_of_a_cut_minibatch_has_the_bits_of_its_formula() -> None:
    """λ·B_ref·r̄·(2·r̄ₖ - r̄) is added last, as releases from 0.3.0 on have done."""
    fields: dict[str, Any] = {"loss": "logitnorm", "centering": 0.1}
    loss = StepLoss(FinetuneRun(**fields, bsr=0.3), 13, soft_labels=False)
    bank = ObjectiveBank([FinetuneRun(**fields)], 13, soft_labels=False)
    assert loss.needs_mean
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        r = torch.randn(10, generator=random)
        mean, weight = torch.randn((), generator=random), torch.rand(5, generator=random)
        found, expected = r.clone().requires_grad_(), r.clone().requires_grad_()
        label, zero = torch.ones(5), torch.zeros(())
        value, _R = loss(
            found, None, zero, label=label, weight=weight, margin=None, mean_reward=mean
        )
        won, lost = expected.chunk(2)
        total = (won + lost)[None]
        rewards = PairRewards((won - lost)[None], total[bank.totals], torch.zeros(0))
        formula = bank.data_loss(rewards, label, weight, None)[0]
        formula = formula + 0.3 * 13 * mean * (total.mean() - mean)
        assert torch.equal(value, formula)
        (0.7 * value).backward()
        (0.7 * formula).backward()
        assert found.grad is not None
        assert expected.grad is not None
        assert torch.equal(found.grad, expected.grad)
