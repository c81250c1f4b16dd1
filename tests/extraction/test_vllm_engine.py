"""The vLLM engine with a stand-in for vLLM: what it asks for, what it makes of the answers, what
it refuses. Parity with the real one is in tests/with_vllm."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from extract_models import CONFIGS, VOCABULARY, save_config, save_model, tokenizer
from extract_world import make, spec_of
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, PhiConfig

from embrm.cache.manifest import NAME
from embrm.cache.reader import open_cache
from embrm.cache.tensors import to_tensor
from embrm.core.errors import UserError
from embrm.extraction import vllm_engine
from embrm.extraction.choice import with_engine
from embrm.extraction.engine import Request
from embrm.extraction.parts import Share
from embrm.extraction.positions import token_positions
from embrm.extraction.probe import probe
from embrm.extraction.run import extract
from embrm.extraction.transformers_engine import load_engine
from embrm.extraction.vllm_engine import VllmEngine, load_vllm
from embrm.extraction.vllm_worker import WorkerExtension, deserialize, load_head, serialize
from embrm.lm.head import LmHead

BLOCK = 8
PROMPT = 20
LONGEST = 60


class Pooler(torch.nn.Module):
    """A token pooler; without a head of its own it passes on float32 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.head: torch.nn.Module = torch.nn.Identity()

    def pool(self, rows: torch.Tensor, params: Any) -> torch.Tensor:
        """One finished request beside one whose prefill is not finished."""
        if isinstance(self.head, torch.nn.Identity):
            return rows.float()
        metadata = SimpleNamespace(pooling_params=[params, params])
        unfinished, packed = self.head([None, rows], metadata)
        assert unfinished is None
        return packed


class StandIn:
    """`vllm.LLM` as far as embrm uses it, prefix cache of whole blocks included."""

    tasks: tuple[str, ...] = ("token_embed",)
    logit_rule: tuple[float, float | None] | None = None
    """The logit rule that its model reports; None: the true one."""
    forgets = False
    """Whether rows of cached blocks are missing even if the cache is to be skipped."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        path, dtype = arguments["model"], getattr(torch, arguments["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.pooler, self.seen = Pooler(), set()
        self.calls: list[tuple[int, int]] = []
        worker = WorkerExtension()
        worker.model_runner = SimpleNamespace(get_model=lambda: self.worker_model())
        self.worker = worker

    def worker_model(self) -> torch.nn.Module:
        head = LmHead.from_model(self.model)
        model = torch.nn.Module()
        model.embedding = self.model.get_input_embeddings()
        model.pooler = SimpleNamespace(poolers_by_task=dict.fromkeys(self.tasks, self.pooler))
        if self.logit_rule != ():
            model.logits_processor = torch.nn.Identity()
            scale, cap = self.logit_rule or (head.scale, head.softcap)
            model.logits_processor.scale, model.logits_processor.soft_cap = scale, cap
        return model

    def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(self.worker, name)(*args)]

    def reset_prefix_cache(self) -> None:
        self.seen.clear()

    @torch.inference_mode()
    def encode(
        self, prompts: Sequence[Any], params: Sequence[Any], *, pooling_task: str, use_tqdm: bool
    ) -> list[Any]:
        assert (pooling_task, use_tqdm) == ("token_embed", False)
        outputs, computed = [], 0
        for prompt, param in zip(prompts, params, strict=True):
            ids = prompt["prompt_token_ids"]
            states = self.model.base_model(torch.tensor([ids])).last_hidden_state[0]
            blocks = [tuple(ids[:end]) for end in range(BLOCK, len(ids), BLOCK)]
            hit = 0
            if self.forgets or not param.skip_reading_prefix_cache:
                while hit < len(blocks) and blocks[hit] in self.seen:
                    hit += 1
            self.seen.update(blocks)
            computed += len(ids) - hit * BLOCK
            data = self.pooler.pool(states[hit * BLOCK :], param)
            outputs.append(SimpleNamespace(outputs=SimpleNamespace(data=data)))
        self.calls.append((len(prompts), computed))
        return outputs


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """A stand-in installed as vLLM 0.32 for the CPU."""

    class Fresh(StandIn):
        pass

    platform = SimpleNamespace(
        device_type="cpu", get_device_name=lambda: "cpu", get_device_total_memory=lambda: 10**6
    )
    parts = {
        "vllm": {"LLM": Fresh, "PoolingParams": SimpleNamespace},
        "vllm.config": {"PoolerConfig": SimpleNamespace},
        "vllm.platforms": {"current_platform": platform},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: "0.32.0")
    return Fresh


def requests() -> list[Request]:
    """Three responses to each of two prompts, one of which begins as another does; and one
    response that begins its sequence."""
    random = np.random.default_rng(0)
    out = []
    for prompt in range(2):
        asked = random.integers(5, 380, size=PROMPT)
        responses = [random.integers(5, 380, size=n) for n in (1, 30, LONGEST - PROMPT)]
        responses[2][:15] = responses[1][:15]
        for number, response in enumerate(responses):
            ids = np.concatenate([asked, response]).astype(np.int32)
            positions = token_positions(f"{prompt}.{number}", PROMPT, len(ids), 3, seed=0)
            out.append(Request(ids, PROMPT, len(ids) - 1 - (number == 1), positions))
    alone = random.integers(5, 380, size=9).astype(np.int32)
    out.append(Request(alone, 0, 8, token_positions("alone", 0, 9, 3, seed=0)))
    return [out[index] for index in random.permutation(len(out))]


WANTED: dict[str, Any] = {"views": ("last", "mean"), "top_k": 4, "tail_mean": True}


def load(folder: Path, **options: Any) -> VllmEngine:
    return load_vllm(folder, **{"dtype": "float32", "max_length": LONGEST} | WANTED | options)


def assert_parity(engine: VllmEngine, folder: Path) -> None:
    found = next(engine.forward([requests()]))
    reference = load_engine(folder, dtype="float32", device="cpu", **WANTED)
    expected = next(reference.forward([requests()]))
    own, others = (each.tokens.map(to_tensor).columns() for each in (found, expected))
    assert torch.equal(own["target"], others["target"])
    assert pytest.approx(expected.S, abs=1e-4) == found.S
    pairs = [(found.states[view], expected.states[view]) for view in WANTED["views"]]
    pairs += [(found.norms[view], expected.norms[view]) for view in WANTED["views"]]
    pairs += [(own[name], part) for name, part in others.items()]
    for left, right in pairs:
        assert left.dtype == right.dtype
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "gpt2", "gemma2", "granite", "cohere"])
@pytest.mark.usefixtures("vllm")
def test_rows_selected_in_the_worker_equal_those_of_the_transformers_engine(
    model_folders: dict[str, Path], kind: str
) -> None:
    engine = load(model_folders[kind])
    assert_parity(engine, model_folders[kind])
    assert engine.environment["rows"] == "selected in the worker"
    # Two prompts of 20 share 16 tokens, and one response of each shares 32 and is read again.
    lengths = [21, 50, 60] * 2 + [9]
    # One of the two that begin alike comes second: of 50 tokens in one prompt, 60 in the other.
    expected = [(7, sum(lengths) - 2 * (16 + 32)), (2, 50 + 60)]
    assert engine._llm.calls == expected
    next(engine.forward([requests()]))  # what was read before changes nothing
    assert engine._llm.calls == expected * 2


def test_without_a_pooler_head_rows_are_selected_in_the_driver(
    vllm: type[StandIn], model_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    vllm.tasks = ("embed",)
    engine = load(model_folders["gemma2"])
    warned = capsys.readouterr().err
    assert "no pooler head where 0.32 has one" in warned
    assert warned.count("\n") == 1
    assert_parity(engine, model_folders["gemma2"])
    assert engine.environment["rows"] == "selected in the driver"
    assert [count for count, _ in engine._llm.calls] == [7, 2]


def test_missing_rows_are_an_error(vllm: type[StandIn], model_folders: dict[str, Path]) -> None:
    vllm.forgets = True
    with pytest.raises(UserError, match="fewer states than tokens for 2 responses"):
        next(load(model_folders["llama-tied"]).forward([requests()]))


@pytest.mark.parametrize(
    ("rule", "line"),
    [((2.0, 0.5), r"\(2.0, 0.5\), but embrm with \(1.0, 0.5\)"), ((), "does not say")],
)
def test_logits_that_differ_from_those_of_the_head_are_refused(
    vllm: type[StandIn], model_folders: dict[str, Path], rule: Any, line: str
) -> None:
    vllm.logit_rule = rule
    with pytest.raises(UserError, match=line):
        load(model_folders["gemma2"])


@pytest.mark.parametrize(
    ("ids", "line"),
    [
        ([7] * (LONGEST + 1), "a response has 61 tokens, but vLLM was started for 1 to 60"),
        ([], "a response has 0 tokens"),
        ([7, VOCABULARY], "token id 400 is outside the model's vocabulary of 400"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_requests_that_vllm_would_fail_on_are_refused_before(
    model_folders: dict[str, Path], ids: list[int], line: str
) -> None:
    engine = load(model_folders["llama-tied"])
    nothing = np.array([], dtype=np.int32)
    other = Request(np.array(ids, dtype=np.int32), 1, 0, nothing)
    with pytest.raises(UserError, match=line):
        next(engine.forward([[*requests(), other]]))
    assert engine._llm.calls == []


def test_failures_of_vllm_are_reported_in_one_line(
    vllm: type[StandIn], model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory\nand much more")

    engine = load(model_folders["llama-tied"])
    monkeypatch.setattr(vllm, "encode", fail)
    with pytest.raises(
        UserError,
        match=r"vLLM stopped .'out of memory'.: see its log above; finished shards are kept",
    ):
        next(engine.forward([requests()]))
    monkeypatch.setattr(vllm, "__init__", fail)
    with pytest.raises(UserError, match=r"vLLM does not start with it .'out of memory'."):
        load(model_folders["llama-tied"])


@pytest.mark.usefixtures("vllm")
def test_vllm_is_started_with_the_dtype_and_room_for_the_head(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(model_folders["llama-tied"], dtype="bfloat16", enforce_eager=True)
    asked = engine._llm.arguments
    assert asked["dtype"] == "bfloat16"
    assert asked["max_model_len"] == LONGEST
    assert asked["enforce_eager"]
    tokens = next(engine.forward([requests()])).tokens
    assert engine.head.weight.dtype == to_tensor(tokens.state).dtype
    monkeypatch.setattr(sys.modules["vllm.platforms"].current_platform, "device_type", "cuda")
    asked = load(model_folders["llama-tied"])._llm.arguments
    assert asked["gpu_memory_utilization"] == pytest.approx(0.9 - VOCABULARY * 32 * 4 / 10**6)
    assert "kv_cache_memory_bytes" not in asked
    with pytest.raises(UserError, match=r"device = 'cpu': .* is built for cuda"):
        load(model_folders["llama-tied"], device="cpu")


def test_answers_are_serialized_and_deserialized() -> None:
    answer = {
        "S": torch.tensor([1 / 3], dtype=torch.float64),
        "states": torch.randn(2, 3).bfloat16(),
        "top_ids": torch.tensor([[2**31 - 1, 0]], dtype=torch.int32),
    }
    packed = serialize(answer)
    assert (packed.dtype, packed.ndim) == (torch.uint8, 1)
    back = deserialize(packed)
    assert back is not None
    assert back.keys() == answer.keys()
    assert all(torch.equal(back[name], part) for name, part in answer.items())
    assert all(back[name].dtype == part.dtype for name, part in answer.items())
    assert deserialize(serialize(None)) is None


BIASED = PhiConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1)


@pytest.mark.parametrize("kind", [*CONFIGS, "biased"])
def test_the_head_read_alone_equals_that_of_the_whole_model(
    model_folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = model_folders.get(kind) or save_config(tmp_path, BIASED, tokenizer())
    found = load_head(folder, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = LmHead.from_model(model)
    assert torch.equal(found.weight, expected.weight)
    assert (found.scale, found.softcap) == (expected.scale, expected.softcap)
    assert (found.bias is None) == (expected.bias is None) == (kind != "biased")
    if found.bias is not None:
        assert torch.equal(found.bias, expected.bias)


def _renamed(source: Path, target: Path, name: Callable[[str], str]) -> Path:
    """A copy of a model whose tensors have other names."""
    save_model(target, "gpt2", tokenizer())
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    renamed = {name(key): tensor for key, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, target / "model.safetensors")
    return target


def test_tensors_may_lack_the_prefix_but_not_be_absent(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    whole = load_head(model_folders["gpt2"], "float32")
    bare = _renamed(model_folders["gpt2"], tmp_path / "bare", lambda key: key.split(".", 1)[1])
    assert torch.equal(load_head(bare, "float32").weight, whole.weight)
    other = _renamed(model_folders["gpt2"], tmp_path / "other", lambda key: f"model.{key}")
    with pytest.raises(UserError, match=r"no tensor 'transformer.wte.weight' or 'lm_head.weight'"):
        load_head(other, "float32")


def test_a_model_without_a_head_is_refused_in_one_line(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPT2LMHeadModel, "get_output_embeddings", lambda _: None)
    with pytest.raises(UserError, match="its LM head, which vLLM does not load, is not found"):
        load_head(model_folders["gpt2"], "float32")


@pytest.mark.parametrize(
    ("version", "line"),
    [
        (None, "vLLM is not installed: pip install 'vllm==0.32.\\*'"),
        ("0.31.2", "vLLM 0.31.2 is older than 0.32"),
        ("0.9.1", "vLLM 0.9.1 is older than 0.32"),
    ],
)
def test_absent_and_old_versions_are_refused_before_the_data_is_read(
    world: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    line: str,
) -> None:
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: version)
    spec = spec_of(world | {"data": str(tmp_path / "absent.jsonl")}, engine="vllm")
    with pytest.raises(UserError, match=line):
        make(world, tmp_path / "cache", spec)


def test_a_newer_version_is_used_with_a_warning(
    vllm: type[StandIn],
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: "0.33.1")
    assert isinstance(load(model_folders["llama-tied"])._llm, vllm)
    assert "vLLM 0.33.1: embrm is tested with 0.32" in capsys.readouterr().err


@pytest.mark.parametrize("view", ["prenorm", "layer:1"])
@pytest.mark.usefixtures("vllm")
def test_views_that_vllm_does_not_give_are_refused(world: dict[str, str], view: str) -> None:
    with pytest.raises(UserError, match=f"view '{view}' .*: use engine = 'transformers' "):
        with_engine(spec_of(world, states=["last", view], engine="vllm"), "auto")


@pytest.mark.parametrize(
    ("version", "cuda", "device", "views", "engine"),
    [
        ("0.32.1", True, "auto", ["last"], "vllm"),
        ("0.32.1", True, "cuda", ["last", "mean"], "vllm"),
        ("0.32.1", True, "cpu", ["last"], "transformers"),
        ("0.32.1", True, "auto", ["prenorm"], "transformers"),
        ("0.32.1", False, "auto", ["last"], "transformers"),
        ("0.33.0", False, "auto", ["last"], "transformers"),
        ("0.33.0", True, "cpu", ["last"], "transformers"),
        ("0.33.0", True, "auto", ["prenorm"], "transformers"),
        (None, True, "auto", ["last"], "transformers"),
    ],
)
def test_auto_chooses_vllm_only_where_it_works(
    world: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    cuda: bool,
    device: str,
    views: list[str],
    engine: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert with_engine(spec_of(world, states=views), device).engine == engine
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ("0.33.1", "add engine = 'vllm' (--engine vllm) to use it anyway"),
        ("0.31.2", "install vllm==0.32.*"),
    ],
)
def test_auto_warns_of_an_untested_version(
    world: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert with_engine(spec_of(world), "auto").engine == "transformers"
    warned = f"warning: vLLM {version} is installed, but embrm is tested with 0.32: using "
    assert capsys.readouterr().err == f"{warned}transformers instead; {remedy}\n"


@pytest.mark.usefixtures("vllm")
def test_a_cache_names_its_engine_and_no_other_can_continue_it(
    world: dict[str, str], tmp_path: Path
) -> None:
    ours = make(world, tmp_path / "ours", spec_of(world, engine="vllm", limit=8))
    other = make(world, tmp_path / "other", spec_of(world, engine="transformers", limit=8))
    for folder, engine, stranger in [
        (ours, "vllm", "transformers"),
        (other, "transformers", "vllm"),
    ]:
        difference = f"was extracted with engine = '{engine}', not '{stranger}'"
        with pytest.raises(UserError, match=difference):
            make(world, folder, spec_of(world, engine=stranger, limit=8))
        manifest = open_cache(folder).manifest
        assert manifest.environments[0]["engine"] == engine
        assert manifest.identity.get("engine", "transformers") == engine
        for reader in (None, stranger):
            result = probe(folder, sample=20, device="cpu", batch_tokens=(300,), engine=reader)
            assert (result.made_by, result.engine) == (engine, reader or engine)
            assert result.within_tolerance
            assert all(not entry.orders_changed for entry in result.deviations)


@pytest.mark.usefixtures("vllm")
def test_auto_continues_a_cache_with_the_engine_that_began_it(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if another engine would be chosen for a new cache."""
    unasked = {"engine": "auto", "limit": 8}
    ours = make(world, tmp_path / "ours", spec_of(world, engine="vllm", limit=8))
    manifest = (ours / NAME).read_bytes()
    make(world, ours, spec_of(world, **unasked))  # on CPU, where it would be transformers
    assert (ours / NAME).read_bytes() == manifest
    part = make(world, tmp_path / "parts", spec_of(world, **unasked), share=Share(0, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec = spec_of(world, **unasked)
    assert with_engine(spec, "auto").engine == "vllm"
    assert with_engine(spec, "auto", part).engine == "transformers"
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: None)
    with pytest.raises(UserError, match="vLLM is not installed"):
        with_engine(spec, "auto", ours)


def test_tensor_parallel_is_for_vllm(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tensor_parallel = 2 is for vLLM"):
        make(world, tmp_path / "cache", tensor_parallel=2)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("engine", ["vllm", "auto"])
def test_compile_is_for_transformers(
    world: dict[str, str], tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"vLLM compiles by itself\): leave it out"):
        extract(spec_of(world, engine=engine), tmp_path / "cache", compiled=True)
    assert not (tmp_path / "cache").exists()
