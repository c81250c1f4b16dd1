"""SimCSE: loss and gradients are the textbook's, written out in float64, however it is cut."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from extract_models import save_model, tokenizer
from minibatch import CUTS, ENCODED, PAIRS, PREFERENCES, ROWS, micro
from small_finetune import BT, made, written
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.core.errors import UserError
from embrm.finetuning import setup
from embrm.finetuning.batches import PairTokens, pad_texts
from embrm.finetuning.contrast import contrast, info_nce, placed
from embrm.finetuning.dropout import ViewMasks
from embrm.finetuning.losses import StepLoss
from embrm.finetuning.model import RewardModel, new_model
from embrm.finetuning.run import finetune
from embrm.finetuning.spec import FinetuneRun, LoraSpec
from embrm.lm.loading import load_model
from embrm.lm.tokens import Encoded

KINDS = ("llama-tied", "qwen2", "gpt2", "gemma2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind, tokenizer()) for kind in KINDS}


def _model(folder: Path, run: FinetuneRun) -> RewardModel:
    causal = load_model(folder, dtype="float32", device="cpu")
    return new_model(causal, run.head, 0, "full", LoraSpec(), with_S=False).train()


def _view_masks(run: FinetuneRun) -> ViewMasks:
    """Of four sites: before three layers and in each."""
    assert run.simcse
    return ViewMasks(run.seed, 4, 32, run.simcse.dropout)


def _masks(run: FinetuneRun) -> Tensor:
    """Of all 14 places."""
    return _view_masks(run).of(1, 0, ROWS.tolist())


def _loops(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """InfoNCE, one cosine at a time."""

    def similar(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp((a @ b) / ((a @ a).sqrt() * (b @ b).sqrt()) / temperature)

    terms = [-torch.log(similar(a, b) / sum(similar(a, c) for c in second))
             for a, b in zip(first, second, strict=True)]  # fmt: skip
    return torch.stack(terms).mean()


def test_info_nce_is_the_formula() -> None:
    a, b = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (0.05, 1.0):
        found = float(info_nce(a, b, temperature))
        assert found == pytest.approx(float(_loops(a, b, temperature)), rel=1e-12)
    assert float(info_nce(a, 3 * b, 1.0)) == pytest.approx(float(info_nce(a, b, 1.0)))
    # Where views are equal: items at right angles, and items that are all one.
    apart = info_nce(torch.eye(5), torch.eye(5), 0.5)
    assert float(apart) == pytest.approx(math.log(1 + 4 * math.exp(-2)))
    assert float(info_nce(torch.ones(5, 3), torch.ones(5, 3), 0.05)) == pytest.approx(math.log(5))


def _step(
    model: RewardModel, run: FinetuneRun, cuts: list[range]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all pairs as one minibatch, in micro-batches."""
    assert run.simcse
    data = PairTokens(ENCODED, PREFERENCES, view_masks=_view_masks(run))
    read = [data.__getitems__(micro(cut)) for cut in cuts]
    with torch.no_grad():
        features = sum(
            placed(model(**one["text"])[3], one["within"]["places"], PAIRS) for one in read
        )
    total = torch.zeros(())
    for one in read:
        asks = contrast(run.simcse, features, **one["within"], share=one["share"])
        loss, _ = StepLoss(run, PAIRS, soft_labels=True)(
            *model(**one["text"]), **one["pairs"], contrast=asks
        )
        (one["share"] * loss).backward()
        total += one["share"] * loss.detach()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _state(backbone: Any, entry: Encoded, masks: Tensor) -> Tensor:
    """The pooled state of one text, layer by layer; masks: [sites, d]."""
    ids = torch.tensor(entry.ids[None].astype("int64"))
    positions = torch.arange(ids.shape[1])[None]
    if hasattr(backbone, "wte"):
        x, layers, norm = backbone.wte(ids) + backbone.wpe(positions), backbone.h, backbone.ln_f
        beside = {}
    else:
        x, layers, norm = backbone.embed_tokens(ids), backbone.layers, backbone.norm
        beside = {"position_embeddings": backbone.rotary_emb(x, positions)}
    x = x * masks[0]
    for layer, mask in zip(layers, masks[1:], strict=True):
        x = x + (layer(x, attention_mask=None, **beside) - x) * mask
    return norm(x)[0, entry.final_position]


def _textbook(folder: Path, run: FinetuneRun) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, of one text and one cosine at a time, by formulas written out here."""
    assert run.simcse
    backbone = load_model(folder, dtype="float32", device="cpu").double().base_model
    w = _model(folder, run).head.get_parameter("output.weight").detach().double().requires_grad_()
    masks = _masks(run).double()
    views = [
        [_state(backbone, ENCODED[row], masks[:, view, ROWS.tolist().index(row)])
         for row in range(12)]
        for view in range(2)
    ]  # fmt: skip
    r = torch.stack(views[0]) @ w
    p, delta = PREFERENCES, r[PREFERENCES.chosen] - r[PREFERENCES.rejected]
    label, weight = p.label.double(), (p.weight / p.weight.mean()).double()
    pair_loss = -(label * logsigmoid(delta) + (1 - label) * logsigmoid(-delta))
    if run.simcse.of == "differences":
        pairs = [*zip(p.chosen.tolist(), p.rejected.tolist(), strict=True)]
        views = [[x[c] - x[j] for c, j in pairs] + [x[j] - x[c] for c, j in pairs] for x in views]
    items = _loops(torch.stack(views[0]), torch.stack(views[1]), run.simcse.temperature)
    loss = (weight * pair_loss).mean() + run.simcse.weight * items
    loss.backward()
    found = {"head.output.weight": w.grad}
    for name, parameter in backbone.named_parameters():
        if parameter.grad is not None:
            found[f"backbone.{name}"] = parameter.grad
    return loss.detach(), found


@pytest.mark.parametrize(
    ("kind", "of"),
    [("llama-tied", "responses"), ("llama-tied", "differences"), ("gpt2", "responses")],
)
def test_a_step_is_the_textbooks(folders: dict[str, Path], kind: str, of: str) -> None:
    asked = {"of": of, "weight": 0.7, "dropout": 0.2, "temperature": 0.1}
    run = FinetuneRun.parse({"simcse": asked}, "test")
    expected, textbook = _textbook(folders[kind], run)
    whole = torch.cat([gradient.flatten() for gradient in textbook.values()]).norm()
    for cuts in CUTS:
        loss, gradients = _step(_model(folders[kind], run), run, cuts)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        assert gradients.keys() == textbook.keys()
        for name, gradient in gradients.items():
            apart = (gradient.double() - textbook[name]).norm()
            assert apart <= 1e-4 * textbook[name].norm() + 1e-6 * whole, name


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_of_every_architecture(folders: dict[str, Path], kind: str) -> None:
    run = FinetuneRun.parse({"simcse": {}}, "test")
    model = _model(folders[kind], run)
    assert model.sites == 4
    whole = pad_texts([ENCODED[row] for row in ROWS])
    plain = model(**whole)[0]
    r, _, _, features = model(**whole, masks=_masks(run))
    difference = (features[0] - features[1]).norm(dim=1) / features[0].norm(dim=1)
    assert 0.05 < difference.min() <= difference.max() < 1.5
    assert (r - plain).abs().min() > 0
    # Alone and in other company a text has the same views.
    alone = model(**pad_texts([ENCODED[ROWS[3]]]), masks=_masks(run)[:, :, 3:4])[3]
    assert torch.allclose(alone[:, 0], features[:, 3], atol=1e-4)
    # Nothing is dropped any more where nothing is asked to be, as in evaluation.
    assert torch.equal(model(**whole)[0], plain)
    # Without dropout the views are one, and the model's own states.
    ones = torch.ones_like(_masks(run))
    r, _, _, features = model(**whole, masks=ones)
    assert torch.allclose(features[0], features[1], atol=1e-5)
    assert torch.allclose(r, plain, atol=1e-4)


def test_activations_computed_again_are_dropped_alike(folders: dict[str, Path]) -> None:
    run = FinetuneRun.parse({"simcse": {"dropout": 0.3}}, "test")
    found = []
    for again in (False, True):
        model = _model(folders["llama-tied"], run)
        if again:
            model.gradient_checkpointing_enable()
        found.append(_step(model, run, CUTS[1])[1])
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-5, atol=1e-6), name


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = made(tmp_path / "world")
    with_table = BT + "simcse = {{ {} }}\n"
    for text, fields, message in (
        ("", {"tune": "frozen"}, "simcse with tune = 'frozen': acts on states that move: set tune"),
        ("dropout = 1.0", {}, "simcse.dropout"),
        ("temperature = 0.0", {}, "simcse.temperature"),
        ("weight = 0.0", {}, "simcse.weight"),
        ('of = "pairs"', {}, "simcse.of"),
    ):
        spec = written(tmp_path / "wrong.toml", with_table.format(text), **fields)
        with pytest.raises(UserError, match=message) as raised:
            finetune(spec, cache, device="cpu")
        assert "\n" not in str(raised.value)
    monkeypatch.setattr(setup, "new_model", _without_layers)
    with pytest.raises(UserError, match="simcse: the model's layers are not transformers' own"):
        finetune(written(tmp_path / "other.toml", with_table.format("")), cache, device="cpu")


def _without_layers(*arguments: Any, **named: Any) -> RewardModel:
    model = new_model(*arguments, **named)
    model.sites = 0
    return model
