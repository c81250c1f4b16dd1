"""Engine: statistics against full logits, position draws, batching; the transformers engine
against a plain forward of one sequence at a time."""

import json
import shutil
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from extract_models import CONFIGS, VOCABULARY, save_model, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from embrm.core.errors import UserError
from embrm.extraction.engine import Batch, Request
from embrm.extraction.positions import PositionsRule, predicting_positions, token_positions
from embrm.extraction.reading import batches_by_length, read, read_shards
from embrm.extraction.statistics import response_statistics, token_statistics
from embrm.extraction.transformers_engine import TransformersEngine, load_engine
from embrm.lm.head import LmHead
from embrm.lm.loading import load_config, load_model, longest, model_folder

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
    engine = load_engine(
        folders[kind], dtype="float32", device="cpu", views=VIEWS, top_k=5, tail_mean=True
    )
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
                assert int(batch.tokens["target"][row]) == target
                _near(batch.tokens["states"][row], expected["post"][position])
                _near(batch.tokens["target_logit"][row], logits[target], scale=logits)
                _near(batch.tokens["logsumexp"][row], logits.logsumexp(0))
                _near(batch.tokens["top_logits"][row], logits.topk(5).values)
                _near(logits[batch.tokens["top_ids"][row].long()], logits.topk(5).values)
                top_ids = batch.tokens["top_ids"][row]
                tail = dense_tail_mean(engine.head, expected["post"][position], target, top_ids)
                _near(batch.tokens["tail_means"][row], tail)
            row += 1
    assert row == len(together.tokens["target"]) > 0


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


@pytest.mark.parametrize(
    ("dtype", "has", "warns"),
    [
        ("bfloat16", {"avx2": True}, True),
        ("bfloat16", {"avx512_bf16": True}, False),
        ("float16", {"avx512_bf16": True}, True),
        ("float16", {"fp16_arith": True, "avx512_fp16": False}, False),
        ("float32", {}, False),
    ],
)
def test_a_dtype_that_the_processor_lacks_is_warned_of(
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    has: dict[str, bool],
    warns: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    load_model(folders["gpt2"], dtype=dtype, device="cpu")
    warned = capsys.readouterr().err
    assert (f"dtype = '{dtype}': this processor has no arithmetic in it" in warned) == warns
    assert warned.count("\n") == warns


def dense_tail_mean(
    head: LmHead, state: torch.Tensor, target: int, top_ids: torch.Tensor
) -> torch.Tensor:
    """E_tail[∂z_j/∂h] in float64: every token's own gradient by autograd, weighted one by one."""
    weight = head.weight.detach().double()
    bias = 0 if head.bias is None else head.bias.detach().double()

    def logits(h: torch.Tensor) -> torch.Tensor:
        z = head.scale * (weight @ h + bias)
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    state = state.detach().double()
    gradients = torch.autograd.functional.jacobian(logits, state)
    p = torch.softmax(logits(state), 0)
    tail = torch.ones_like(p, dtype=torch.bool)
    tail[top_ids.long()] = False
    tail[target] = False
    if p[tail].sum() < 1e-6:
        return torch.zeros_like(state)
    return (p[tail, None] * gradients[tail]).sum(0) / p[tail].sum()


HEADS = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "soft-capped": {"softcap": 1.5},
    "all": {"bias": torch.linspace(-1, 1, 300), "scale": 0.5, "softcap": 2.0},
}


@pytest.mark.parametrize("top_k", [0, 1, 7, 299, 300])
@pytest.mark.parametrize("kind", HEADS)
def test_tail_means_equal_a_dense_computation(kind: str, top_k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    head = LmHead(torch.randn(300, 12, generator=generator), **HEADS[kind])
    states = torch.randn(40, 12, generator=generator)
    order = head.logits(states).argsort(dim=1, descending=True)
    # Targets among the largest logits in even rows, the first left out and others in odd ones.
    targets = order[:, min(max(top_k - 1, 0), 299)].clone()
    targets[1::2] = order[1::2, min(top_k, 299)]
    targets[3::4] = order[3::4, min(top_k + 20, 299)]
    found = token_statistics(head, states, targets, top_k, tail_mean=True)
    for row, state in enumerate(states):
        expected = dense_tail_mean(head, state, int(targets[row]), found["top_ids"][row])
        assert (found["tail_means"][row] - expected).abs().max() <= 1e-5
    if top_k == 300:
        assert not found["tail_means"].any()
    plain = token_statistics(head, states, targets, top_k)
    assert "tail_means" not in plain
    assert torch.equal(plain["logsumexp"], found["logsumexp"])


def test_a_tail_too_unlikely_for_float32_has_no_mean() -> None:
    # Token 0 is the target and nearly sure, token 1 is nearly all of the tail.
    head = LmHead(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    for gap, there in ((-13.0, True), (-15.0, False)):  # exp(-13.82) = 1e-6
        found = token_statistics(
            head, torch.tensor([[gap, gap - 40]]), torch.tensor([0]), tail_mean=True
        )["tail_means"]
        assert torch.allclose(found, torch.tensor([[float(there), 0.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tail_means_of_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    # So wide that the head is widened in several blocks, the last one not full.
    generator = torch.Generator().manual_seed(0)
    vocabulary, width = 9000, 512
    head = LmHead((torch.randn(vocabulary, width, generator=generator) / 40).to(dtype))
    states = torch.randn(20, width, generator=generator).to(dtype)
    targets = torch.arange(20)
    found = token_statistics(head, states, targets, 5, tail_mean=True)
    assert found["tail_means"] is not None
    assert found["tail_means"].dtype == dtype
    # The logits are the model's own, in its dtype: what is left is one rounding of the result.
    odds = torch.softmax(head.logits(states).double(), 1)
    odds.scatter_(1, targets[:, None], 0).scatter_(1, found["top_ids"].long(), 0)
    expected = odds @ head.weight.double() / odds.sum(1, keepdim=True)
    error = (found["tail_means"].double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps * expected.abs() + 1e-7).all()


def test_tail_means_are_what_other_logits_are_to_first_order() -> None:
    """lse over the tail moves by mean·δ: the use that a regularizer makes of them."""
    generator = torch.Generator().manual_seed(1)
    head = LmHead(torch.randn(50, 6, generator=generator), softcap=3.0)
    states = torch.randn(9, 6, generator=generator)
    found = token_statistics(head, states, torch.zeros(9, dtype=torch.long), 4, tail_mean=True)
    assert found["tail_means"] is not None
    out = torch.zeros(9, 50, dtype=torch.bool).scatter(1, found["top_ids"].long(), True)
    out[:, 0] = True

    def tails(h: torch.Tensor) -> torch.Tensor:
        z = 3 * torch.tanh(h @ head.weight.double().T / 3)
        return z.masked_fill(out, -torch.inf).logsumexp(1)

    delta = 1e-3 * torch.randn(9, 6, generator=generator, dtype=torch.float64)
    moved = tails(states.double() + delta) - tails(states.double())
    predicted = (found["tail_means"].double() * delta).sum(1)
    assert (moved - predicted).abs().max() < 0.01 * moved.abs().max()


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 300])
@pytest.mark.parametrize("vocabulary", [7, 60_000])
def test_statistics_in_chunks_equal_full_logits(rows: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    head = LmHead(torch.randn(vocabulary, 8), torch.randn(vocabulary), scale=0.5, softcap=4.0)
    states, targets = torch.randn(rows, 8), torch.randint(0, vocabulary, (rows,))
    found = token_statistics(head, states, targets, top_k=9)
    logits = 4 * torch.tanh(0.5 * (states @ head.weight.T + head.bias) / 4)
    k = min(9, vocabulary)
    assert torch.allclose(found["target_logit"], logits[torch.arange(rows), targets], atol=1e-5)
    assert torch.allclose(found["logsumexp"], logits.logsumexp(1), atol=1e-5)
    assert torch.allclose(found["top_logits"], logits.topk(k).values, atol=1e-5)
    assert torch.allclose(logits.gather(1, found["top_ids"].long()), found["top_logits"], atol=1e-5)


@pytest.mark.parametrize("vocabulary", [60, 60_000])
def test_largest_logits_of_some_rows_are_those_of_all(vocabulary: int) -> None:
    torch.manual_seed(0)
    head = LmHead(torch.randn(vocabulary, 8), softcap=4.0)
    states, targets = torch.randn(300, 8), torch.randint(0, vocabulary, (300,))
    among = np.array([0, 3, 255, 256, 263, 299])
    every = token_statistics(head, states, targets, 5, tail_mean=True)
    found = token_statistics(head, states, targets, 5, tail_mean=True, among=among)
    assert torch.equal(found["logsumexp"], every["logsumexp"])
    assert torch.equal(found["top_ids"], every["top_ids"][among])
    assert torch.equal(found["top_logits"], every["top_logits"][among])
    assert every["tail_means"] is not None
    assert torch.allclose(found["tail_means"], every["tail_means"][among], atol=1e-6)


def test_statistics_survive_logits_beyond_the_range_of_exp() -> None:
    head = LmHead(torch.eye(3) * 1000)
    found = token_statistics(head, torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([1]))
    assert found["logsumexp"].tolist() == [1000.0]
    assert found["target_logit"].tolist() == [-1000.0]
    assert found["top_ids"].shape == (1, 0)


def test_statistics_of_nothing_are_empty() -> None:
    nothing = torch.empty(0, 3), torch.empty(0, dtype=torch.long)
    found = token_statistics(LmHead(torch.eye(3)), *nothing, 2)
    assert found["logsumexp"].shape == (0,)
    assert "tail_means" not in found
    assert found["top_logits"].shape == (0, 2)
    found = token_statistics(LmHead(torch.eye(3)), *nothing, tail_mean=True)
    assert found["tail_means"].shape == (0, 3)


@given(
    n_prompt=st.integers(0, 50),
    n_response=st.integers(1, 80),
    k=st.integers(0, 20),
    seed=st.integers(0, 9),
    rule=st.sampled_from(get_args(PositionsRule)),
)
@settings(max_examples=200, deadline=None)
def test_drawn_positions_are_distinct_sorted_and_predict_the_response(
    n_prompt: int, n_response: int, k: int, seed: int, rule: PositionsRule
) -> None:
    length = n_prompt + n_response
    drawn = token_positions("id", n_prompt, length, k, seed, rule)
    allowed = predicting_positions(n_prompt, length)
    assert len(drawn) == min(k, len(allowed))
    assert all(position in allowed for position in drawn)
    assert (np.diff(drawn) > 0).all()
    assert (drawn == token_positions("id", n_prompt, length, k, seed, rule)).all()
    if rule == "spaced" and len(drawn) == k > 0:
        n = len(allowed)
        assert set(np.diff(drawn)) <= {n // k, -(-n // k)}
        assert drawn[0] - allowed.start < n / k
        assert allowed.stop - drawn[-1] <= -(-n // k)


def test_drawn_positions_depend_on_seed_and_id_and_are_uniform() -> None:
    draws = np.array([token_positions(str(i), 10, 30, 4, 0) for i in range(4000)])
    counts = np.bincount(draws.ravel(), minlength=30)
    assert counts[:9].sum() == 0
    assert counts[29] == 0
    # 20 positions, 4 of 20 drawn: 800 expected each, standard deviation 25.
    assert np.abs(counts[9:29] - 800).max() < 5 * 25
    assert (draws[0] != token_positions("0", 10, 30, 4, 1)).any()


@pytest.mark.parametrize(("n", "k"), [(20, 4), (23, 5), (7, 6), (100, 8), (9, 1)])
def test_every_position_is_as_likely_under_the_spaced_rule(
    n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 2^64 raw draws fall into n intervals of a size; k of n draw a position."""
    counts = np.zeros(n, int)
    for i in range(n):
        samples = []
        for raw in (-(-(i << 64) // n), -(-(i + 1 << 64) // n) - 1):  # an interval's two ends
            stream = SimpleNamespace(random_raw=lambda raw=raw: raw)
            monkeypatch.setattr(np.random, "Philox", lambda stream=stream, **_: stream)
            samples.append(token_positions("id", 1, n + 1, k, 0, "spaced").tolist())
        assert samples[0] == samples[1]
        assert len(samples[0]) == k
        counts[samples[0]] += 1
    assert (counts == k).all()


def test_spaced_positions_depend_on_seed_and_id_and_are_uniform() -> None:
    draws = np.array([token_positions(str(i), 10, 30, 3, 0, "spaced") for i in range(4000)])
    counts = np.bincount(draws.ravel(), minlength=30)
    assert counts.sum() == counts[9:29].sum() == 12_000
    # 20 positions, 3 of 20 drawn: 600 expected each, standard deviation 23.
    assert np.abs(counts[9:29] - 600).max() < 5 * 23
    seeds = [token_positions("0", 10, 30, 3, seed, "spaced").tolist() for seed in range(9)]
    assert any(drawn != seeds[0] for drawn in seeds)


@pytest.mark.parametrize(
    ("rule", "drawn"), [("random", [9, 10, 19, 26]), ("spaced", [10, 15, 20, 25])]
)
def test_the_draw_is_frozen(rule: PositionsRule, drawn: list[int]) -> None:
    """Caches made by one version resume in the next: the streams may never change."""
    assert token_positions("0123456789abcdef", 10, 30, 4, 7, rule).tolist() == drawn


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    budget=st.integers(1, 200),
    shard_rows=st.integers(1, 30),
    ahead=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_reading_in_batches_keeps_order_and_budget(
    lengths: list[int], budget: int, shard_rows: int, ahead: int
) -> None:
    requests = [
        Request(np.full(n, i, np.int32), 0, n - 1, np.arange(i % 3, dtype=np.int32))
        for i, n in enumerate(lengths)
    ]
    shards = [requests[i : i + shard_rows] for i in range(0, len(requests), shard_rows)]
    engine, seen = _Echo(ahead), []
    answers = list(read_shards(engine, shards, budget, seen.append))
    assert [asked for asked, _ in answers] == shards
    S = [S for _, batch in answers for S in batch.S]
    assert list(range(len(lengths))) == S
    states = torch.cat([batch.states["last"] for _, batch in answers])
    assert states[:, 0].tolist() == list(range(len(lengths)))
    targets = torch.cat([batch.tokens["target"] for _, batch in answers])
    assert targets.tolist() == [i for i in range(len(lengths)) for _ in range(i % 3)]
    assert sum(seen) == sum(lengths)
    for shape in engine.shapes:
        assert shape[0] == 1 or shape[0] * shape[1] <= budget


def test_the_next_shard_is_begun_before_one_is_handed_on(folders: dict[str, Path]) -> None:
    """And no more than its first batch, so that a device has work and memory is bounded."""
    engine = load_engine(folders["gpt2"], dtype="float32", device="cpu")
    begun: list[int] = []
    begin = engine._begin
    engine._begin = lambda some: (begun.append(len(some)), begin(some))[1]  # type: ignore[method-assign]
    first, second = requests_of(), requests_of()[:3]
    answers = read_shards(engine, [first, second], 1)
    next(answers)
    assert begun == [1] * (len(first) + 1)
    next(answers)
    assert begun == [1] * (len(first) + 3)


class _Echo:
    """An engine that answers with the first id of each request, some batches late."""

    width, batch_tokens, environment = 1, 1, {}
    head = LmHead(torch.eye(1))

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self.shapes: list[tuple[int, int]] = []

    def batches(self, requests, batch_tokens):
        return batches_by_length([len(r.ids) for r in requests], batch_tokens)

    def forward(self, batches):
        begun = deque()
        for requests in batches:
            begun.append(self._answer(requests))
            if len(begun) > self.ahead:
                yield begun.popleft()
        yield from begun

    def _answer(self, requests):
        self.shapes.append((len(requests), max(len(r.ids) for r in requests)))
        first = torch.tensor([float(r.ids[0]) for r in requests])
        tokens = torch.cat(
            [first[i : i + 1].expand(len(r.positions)) for i, r in enumerate(requests)]
        )
        return Batch(
            states={"last": first[:, None]},
            norms={"last": first},
            S=first.double().numpy(),
            tokens={
                "states": tokens[:, None],
                "target": tokens.int(),
                "target_logit": tokens,
                "logsumexp": tokens,
                "top_logits": tokens[:, None],
                "top_ids": tokens.int()[:, None],
            },
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


@pytest.mark.parametrize("device", ["tpu", "cuda:2", "cuda:x", "cuda:-1", "cpu:x"])
def test_devices_that_are_not_there_are_refused(
    folders: dict[str, Path], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=f"device = '{device}' is not available here"):
        load_engine(folders["gpt2"], dtype="float32", device=device)


def test_views_that_are_not_there_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="layer:3"):
        load_engine(folders["gpt2"], dtype="float32", device="cpu", views=("layer:3",))


def test_logits_of_an_unknown_kind_are_refused(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama-tied"]).eval()
    model.lm_head.register_forward_hook(lambda *call: call[-1] * 1.01)
    with pytest.raises(UserError, match="computes its logits in a way embrm does not know"):
        TransformersEngine(model, ("last",), 0)


def test_a_model_without_a_base_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama-tied"]).eval()
    monkeypatch.setattr(type(model), "base_model_prefix", "nothing")
    with pytest.raises(UserError, match="does not say which part of it gives the states"):
        TransformersEngine(model, ("last",), 0)


def test_out_of_memory_says_what_to_lower(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(folders["gpt2"], dtype="float32", device="cpu")

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("embrm.extraction.transformers_engine.response_statistics", full)
    with pytest.raises(UserError, match=r"out of memory on cpu .*: lower --batch-tokens"):
        next(engine.forward([requests_of()]))


def test_a_shard_that_was_read_is_given_before_the_next_one_fails(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(folders["gpt2"], dtype="float32", device="cpu")
    whole = read(engine, requests_of(), 512).S

    def full(head: LmHead, states: torch.Tensor, *more: Any, **options: Any) -> Any:
        if len(states) == LENGTHS[2][1]:
            raise torch.OutOfMemoryError
        return response_statistics(head, states, *more, **options)

    monkeypatch.setattr("embrm.extraction.transformers_engine.response_statistics", full)
    answers = read_shards(engine, [requests_of()[:2], requests_of()[2:]], 1)
    _, first = next(answers)
    assert np.allclose(first.S, whole[:2])
    with pytest.raises(UserError, match="out of memory"):
        next(answers)


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
