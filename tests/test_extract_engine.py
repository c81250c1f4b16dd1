"""Engine: statistics against full logits, position draws, batching; the transformers engine
against a plain forward of one sequence at a time."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from extract_models import CONFIGS, VOCABULARY, save_model, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from embrm.errors import UserError
from embrm.extract.engine import (
    Batch,
    LmHead,
    Request,
    TokenStatistics,
    predicting_positions,
    read,
    statistics,
    token_positions,
)
from embrm.extract.transformers_engine import (
    TransformersEngine,
    load_config,
    load_engine,
    longest,
    model_folder,
)

VIEWS = ("last", "mean", "prenorm", "layer:0", "layer:2")
LENGTHS = [(3, 2), (1, 1), (5, 40), (0, 7), (60, 3), (17, 17), (2, 90)]
"""(prompt, response) tokens; a response without a prompt too."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    fast = tokenizer()
    return {kind: save_model(root / kind, kind, fast) for kind in CONFIGS}


def requests_of(k: int = 4) -> list[Request]:
    random = np.random.default_rng(0)
    made = []
    for number, (prompt, response) in enumerate(LENGTHS):
        length = prompt + response
        ids = random.integers(3, VOCABULARY, length).astype(np.int32)
        positions = token_positions(str(number), prompt, length, k, 0)
        made.append(Request(ids, prompt, length - 1 - (number == 2), positions))
    return made


def plain_forward(folder: Path, kind: str, request: Request) -> dict:
    """One sequence through transformers alone: full logits, log_softmax, hidden states."""
    # Gemma-2 defines capped attention scores, which only eager attention computes.
    eager = {"attn_implementation": "eager"} if kind == "gemma2" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager).eval()
    norm = model.base_model.ln_f if kind == "gpt2" else model.base_model.norm
    entered = []
    norm.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    ids = torch.from_numpy(request.ids.astype(np.int64))[None]
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    logits = output.logits[0]
    logprobs = torch.log_softmax(logits.double(), -1)
    first = max(request.n_prompt, 1)
    final = request.final_position
    post = output.hidden_states[-1][0]
    return {
        "last": post[final],
        "mean": post[request.n_prompt :].mean(0),
        "prenorm": entered[0][0, final],
        "layer:0": output.hidden_states[0][0, final],
        "layer:2": output.hidden_states[2][0, final],
        "S": sum(float(logprobs[t - 1, request.ids[t]]) for t in range(first, ids.shape[1])),
        "post": post,
        "logits": logits,
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_states_s_and_token_rows_equal_a_plain_forward(folders: dict[str, Path], kind: str) -> None:
    engine = load_engine(folders[kind], dtype="float32", device="cpu", views=VIEWS, top_k=5)
    requests = requests_of()
    together = read(engine, requests, 100_000)
    alone = read(engine, requests, 1)
    row = 0
    for i, request in enumerate(requests):
        expected = plain_forward(folders[kind], kind, request)
        for batch in (together, alone):
            assert batch.S[i] == pytest.approx(expected["S"], rel=1e-4)
            for view in VIEWS:
                _near(batch.states[view][i], expected[view])
                assert float(batch.norms[view][i]) == pytest.approx(
                    float(expected[view].norm()), rel=1e-4
                )
        for position in request.positions:
            logits = expected["logits"][position]
            target = int(request.ids[position + 1])
            for batch in (together, alone):
                assert int(batch.targets[row]) == target
                _near(batch.token_states[row], expected["post"][position])
                _near(batch.tokens.target_logit[row], logits[target], scale=logits)
                _near(batch.tokens.logsumexp[row], logits.logsumexp(0))
                _near(batch.tokens.top_logits[row], logits.topk(5).values)
                _near(logits[batch.tokens.top_ids[row].long()], logits.topk(5).values)
            row += 1
    assert row == len(together.targets) > 0


def _near(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    limit = 1e-4 * (expected if scale is None else scale).abs().max()
    assert (found - expected).abs().max() <= limit


def test_gemma2_caps_matter(folders: dict[str, Path]) -> None:
    """Without its caps the same weights give other numbers, so the parity above means something."""
    engine = load_engine(folders["gemma2"], dtype="float32", device="cpu", top_k=1)
    assert engine.environment["attention"] == "eager"
    assert engine.head.softcap == 0.5
    states = torch.randn(3, 32)
    capped = engine.head.logits(states)
    assert capped.abs().max() <= 0.5
    free = LmHead(engine.head.weight).logits(states)
    assert (capped - free).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "gemma2"])
def test_half_precision_runs_near_float32(folders: dict[str, Path], kind: str, dtype: str) -> None:
    views = ("last", "mean")
    half = load_engine(folders[kind], dtype=dtype, device="cpu", views=views, top_k=3)
    full = load_engine(folders[kind], dtype="float32", device="cpu", views=views, top_k=3)
    low, high = read(half, requests_of(), 512), read(full, requests_of(), 512)
    for view in views:
        assert str(low.states[view].dtype) == f"torch.{dtype}"
        assert low.norms[view].dtype == torch.float32
        error = (low.states[view].float() - high.states[view]).norm()
        assert 0 < error < 0.1 * high.states[view].norm()
    assert np.allclose(low.S, high.S, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("vocabulary", [7, 60_000])
def test_statistics_in_chunks_equal_full_logits(rows: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    head = LmHead(torch.randn(vocabulary, 8), torch.randn(vocabulary), scale=0.5, softcap=4.0)
    states, targets = torch.randn(rows, 8), torch.randint(0, vocabulary, (rows,))
    found = statistics(head, states, targets, top_k=9)
    logits = 4 * torch.tanh(0.5 * (states @ head.weight.T + head.bias) / 4)
    k = min(9, vocabulary)
    assert torch.allclose(found.target_logit, logits[torch.arange(rows), targets], atol=1e-5)
    assert torch.allclose(found.logsumexp, logits.logsumexp(1), atol=1e-5)
    assert torch.allclose(found.top_logits, logits.topk(k).values, atol=1e-5)
    assert torch.allclose(logits.gather(1, found.top_ids.long()), found.top_logits, atol=1e-5)


def test_statistics_survive_logits_beyond_the_range_of_exp() -> None:
    head = LmHead(torch.eye(3) * 1000)
    found = statistics(head, torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([1]))
    assert found.logsumexp.tolist() == [1000.0]
    assert found.target_logit.tolist() == [-1000.0]
    assert found.top_ids.shape == (1, 0)


def test_statistics_of_nothing_are_empty() -> None:
    found = statistics(LmHead(torch.eye(3)), torch.empty(0, 3), torch.empty(0, dtype=torch.long), 2)
    assert found.logsumexp.shape == (0,)
    assert found.top_logits.shape == (0, 2)


@given(
    n_prompt=st.integers(0, 50),
    n_response=st.integers(1, 80),
    k=st.integers(0, 20),
    seed=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_drawn_positions_are_distinct_sorted_and_predict_the_response(
    n_prompt: int, n_response: int, k: int, seed: int
) -> None:
    length = n_prompt + n_response
    drawn = token_positions("id", n_prompt, length, k, seed)
    allowed = predicting_positions(n_prompt, length)
    assert len(drawn) == min(k, len(allowed))
    assert all(position in allowed for position in drawn)
    assert (np.diff(drawn) > 0).all()
    assert (drawn == token_positions("id", n_prompt, length, k, seed)).all()


def test_drawn_positions_depend_on_seed_and_id_and_are_uniform() -> None:
    draws = np.array([token_positions(str(i), 10, 30, 4, 0) for i in range(4000)])
    counts = np.bincount(draws.ravel(), minlength=30)
    assert counts[:9].sum() == 0
    assert counts[29] == 0
    # 20 positions, 4 of 20 drawn: 800 expected each, standard deviation 25.
    assert np.abs(counts[9:29] - 800).max() < 5 * 25
    assert (draws[0] != token_positions("0", 10, 30, 4, 1)).any()


def test_the_draw_is_frozen() -> None:
    """Caches made by one version resume in the next: the stream may never change."""
    assert token_positions("0123456789abcdef", 10, 30, 4, 7).tolist() == FROZEN


FROZEN = [9, 10, 19, 26]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), budget=st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_reading_in_batches_keeps_order_and_budget(lengths: list[int], budget: int) -> None:
    requests = [
        Request(np.full(n, i, np.int32), 0, n - 1, np.arange(i % 3, dtype=np.int32))
        for i, n in enumerate(lengths)
    ]
    engine, seen = _Echo(), []
    batch = read(engine, requests, budget, seen.append)
    assert batch.S.tolist() == list(range(len(lengths)))
    assert batch.states["last"][:, 0].tolist() == list(range(len(lengths)))
    expected = [i for i in range(len(lengths)) for _ in range(i % 3)]
    assert batch.targets.tolist() == expected
    assert sum(seen) == sum(lengths)
    for shape in engine.shapes:
        assert shape[0] == 1 or shape[0] * shape[1] <= budget


class _Echo:
    """An engine that answers with the first id of each request."""

    width, batch_tokens, environment = 1, 1, {}
    head = LmHead(torch.eye(1))

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def forward(self, requests):
        self.shapes.append((len(requests), max(len(r.ids) for r in requests)))
        first = torch.tensor([float(r.ids[0]) for r in requests])
        tokens = torch.cat(
            [first[i : i + 1].expand(len(r.positions)) for i, r in enumerate(requests)]
        )
        return Batch(
            states={"last": first[:, None]},
            norms={"last": first},
            S=first.double().numpy(),
            token_states=tokens[:, None],
            targets=tokens.int(),
            tokens=TokenStatistics(tokens, tokens, tokens[:, None], tokens.int()[:, None]),
        )


def _edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["llama-untied"], tmp_path / "model"))


def test_unknown_models_are_refused_in_one_line(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "nobody/nothing", "./nowhere", "nothing"):
        with pytest.raises(UserError, match="no such folder") as caught:
            model_folder(name, None)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        model_folder(str(tmp_path), None)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        model_folder(str(copy), None)


def test_a_model_without_lm_head_is_refused(copy: Path) -> None:
    model = LlamaForSequenceClassification(CONFIGS["llama-untied"])
    model.save_pretrained(copy)
    with pytest.raises(UserError, match="LlamaForSequenceClassification has no LM head"):
        load_config(copy)
    _edit_config(copy, architectures=None)
    load_config(copy)
    with pytest.raises(UserError, match=r"lack 'lm_head\.weight'"):
        load_engine(copy, dtype="float32", device="cpu")


def test_an_encoder_is_refused(copy: Path) -> None:
    _edit_config(copy, model_type="t5", architectures=None)
    with pytest.raises(UserError, match="cannot be loaded as a causal LM") as caught:
        load_engine(copy, dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)


def test_damaged_weights_and_configs_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_engine(copy, dtype="float32", device="cpu")
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_config(copy)


def test_lengths_beyond_the_models_positions_are_refused(copy: Path) -> None:
    assert longest(load_config(copy), 255) == 255
    assert longest(load_config(copy), None) == 256
    with pytest.raises(UserError, match="set max_length to 256 or less"):
        longest(load_config(copy), 257)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    _edit_config(copy, rope_parameters=rope | {"original_max_position_embeddings": 128})
    assert longest(load_config(copy), None) == 128
    with pytest.raises(UserError, match="depend on the batch"):
        longest(load_config(copy), 129)


def test_devices_and_views_that_are_not_there_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="device = 'tpu'"):
        load_engine(folders["gpt2"], dtype="float32", device="tpu")
    with pytest.raises(UserError, match="layer:3"):
        load_engine(folders["gpt2"], dtype="float32", device="cpu", views=("layer:3",))


def test_logits_of_an_unknown_kind_are_refused(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama-tied"]).eval()
    model.lm_head.register_forward_hook(lambda *call: call[-1] * 1.01)
    with pytest.raises(UserError, match="computes its logits in a way embrm does not know"):
        TransformersEngine(model, ("last",), 0)


def test_weights_that_are_not_numbers_are_refused(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama-tied"]).eval()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(UserError, match="logits that are NaN"):
        TransformersEngine(model, ("last",), 0)


def test_a_model_that_looks_ahead_is_refused(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama-tied"]).eval()
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UserError, match="is not causal"):
        TransformersEngine(model, ("last",), 0)


def test_a_model_without_final_norm_has_no_prenorm(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama-tied"]).eval()
    model.model.norm = torch.nn.Identity()
    with pytest.raises(UserError, match="'prenorm' is not in this model"):
        TransformersEngine(model, ("prenorm",), 0)
