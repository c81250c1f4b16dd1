"""vLLM against the transformers engine on random models of four families, on the CPU."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extract_models import save_config, tokenizer
from lm_families import FAMILIES

from embrm.cache.tensors import to_tensor
from embrm.core.errors import UserError
from embrm.extraction import vllm_worker
from embrm.extraction.engine import Batch, Engine, Request
from embrm.extraction.positions import token_positions
from embrm.extraction.transformers_engine import load_engine
from embrm.extraction.vllm_engine import VllmEngine, load_vllm

BLOCK = 32
LONGEST = 160
PROMPT = 70

WANTED: dict[str, Any] = {"views": ("last", "mean"), "top_k": 4, "tail_mean": True}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        name: save_config(root / name, config, tokenizer()) for name, config in FAMILIES.items()
    }


def requests() -> list[Request]:
    """Four responses to each of four prompts; the last repeats 40 tokens of the one before."""
    random = np.random.default_rng(0)
    out = []
    for prompt in range(4):
        asked = random.integers(5, 380, size=PROMPT)
        responses = [random.integers(5, 380, size=n) for n in (1, 25, 60, LONGEST - PROMPT)]
        responses[3][:40] = responses[2][:40]
        for number, response in enumerate(responses):
            ids = np.concatenate([asked, response]).astype(np.int32)
            positions = token_positions(f"{prompt}.{number}", PROMPT, len(ids), 3, seed=0)
            # The pooled token of one of them stands before its last, as before padding.
            out.append(Request(ids, PROMPT, len(ids) - 1 - (number == 1), positions))
    return [out[index] for index in random.permutation(len(out))]


@contextmanager
def vllm_engine(folder: Path, **settings: Any) -> Iterator[VllmEngine]:
    base = {"dtype": "float32", "device": "cpu", "max_length": LONGEST}
    small = {"block_size": BLOCK, "kv_cache_memory_bytes": 64 << 20}
    yield load_vllm(folder, **base | small | WANTED | settings)
    gc.collect()


def reference(folder: Path, dtype: str = "float32") -> Batch:
    engine: Engine = load_engine(folder, dtype=dtype, device="cpu", **WANTED)
    return next(engine.forward([requests()]))


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Every number of a batch."""
    return {
        **{f"state {view}": states for view, states in batch.states.items()},
        **{f"norm {view}": norms for view, norms in batch.norms.items()},
        "S": torch.from_numpy(batch.S),
        **{f"token {name}": to_tensor(column) for name, column in batch.tokens.columns().items()},
    }


def count_rows(engine: VllmEngine, calls: list[tuple[int, int]]) -> None:
    """Note of each call the requests and the tokens computed, those of cached prefixes left out."""
    encode = engine._llm.encode

    def counted(prompts: Sequence[Any], *args: Any, **options: Any) -> Any:
        outputs = encode(prompts, *args, **options)
        computed = sum(len(o.prompt_token_ids) - o.num_cached_tokens for o in outputs)
        calls.append((len(outputs), computed))
        return outputs

    engine._llm.encode = counted


def expected_rows() -> list[tuple[int, int]]:
    """The two calls by arithmetic: whole blocks of a prefix seen before are not computed, and a
    request whose first response token was predicted in one is read again from its start."""
    seen: set[bytes] = set()
    computed, again = 0, []
    for request in sorted(requests(), key=lambda request: request.ids.tobytes()):
        blocks = [request.ids[:end].tobytes() for end in range(BLOCK, len(request.ids), BLOCK)]
        hit = 0
        while hit < len(blocks) and blocks[hit] in seen:
            hit += 1
        seen.update(request.ids[:end].tobytes() for end in range(BLOCK, LONGEST + 1, BLOCK))
        computed += len(request.ids) - hit * BLOCK
        if hit * BLOCK > request.n_prompt - 1:
            again.append(len(request.ids))
    return [(len(requests()), computed), (len(again), sum(again))]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("step", [64, 8192])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_parity(
    folders: dict[str, Path], family: str, step: int, prefix_caching: bool
) -> None:
    """A step of 64 tokens computes most sequences in chunks."""
    calls: list[tuple[int, int]] = []
    with vllm_engine(
        folders[family],
        enable_prefix_caching=prefix_caching,
        enable_chunked_prefill=step == 64,
        max_num_batched_tokens=step,
    ) as engine:
        count_rows(engine, calls)
        found = tensors(next(engine.forward([requests()])))
        next(engine.forward([requests()]))
        assert engine.environment["rows"] == "selected in the worker"
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :]  # nothing cached is left
    expected = tensors(reference(folders[family]))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert found[name].shape == values.shape, name
        if values.is_floating_point():
            assert (found[name] - values).abs().max() < 1e-4, name
        else:
            assert (found[name] == values).all(), name
    if not prefix_caching:
        assert calls == [(16, sum(len(request.ids) for request in requests()))] * 2
    elif family != "gemma2":  # whose windows keep other blocks
        assert calls == expected_rows() * 2
        assert calls[1][0] == 4
    else:
        assert calls[0][1] < sum(len(request.ids) for request in requests())


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_parity(tmp_path: Path, family: str) -> None:
    """Weights less wild than for float32: with those, rounding alone moves states further."""
    folder = save_config(tmp_path, FAMILIES[family], tokenizer(), noise=0.1)
    with vllm_engine(folder, dtype="bfloat16") as engine:
        found = next(engine.forward([requests()]))
    expected = reference(folder, "bfloat16")
    for view in WANTED["views"]:
        assert found.states[view].dtype == torch.bfloat16
        cosine = torch.cosine_similarity(
            found.states[view].double(), expected.states[view].double(), dim=1
        )
        assert cosine.min() > 0.999
    assert np.abs(found.tokens.logsumexp - expected.tokens.logsumexp).max() < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_parity(
    folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One family with the engine in a process of its own too, as it is outside these tests."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(family == "llama")))
    # By itself the CPU build wants a NUMA node for each of the two workers.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with vllm_engine(folders[family], tensor_parallel=2) as engine:
        found = tensors(next(engine.forward([requests()])))
        assert engine.environment["tensor_parallel"] == 2
    for name, values in tensors(reference(folders[family])).items():
        assert (found[name].double() - values.double()).abs().max() < 1e-4, name


def test_without_a_place_for_the_hook_all_states_come_and_say_the_same(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_worker.WorkerExtension, "embrm_select", lambda *_: False)
    calls: list[tuple[int, int]] = []
    with vllm_engine(folders["llama"]) as engine:
        count_rows(engine, calls)
        found = tensors(next(engine.forward([requests()])))
        assert engine.environment["rows"] == "selected in the driver"
    assert "all states are copied between processes" in capsys.readouterr().err
    assert calls == expected_rows()
    for name, values in tensors(reference(folders["llama"])).items():
        assert (found[name].double() - values.double()).abs().max() < 1e-4, name


def test_what_vllm_does_not_start_with_is_refused_in_one_line(folders: dict[str, Path]) -> None:
    one_line = pytest.raises(UserError, match=r"vLLM does not start with it .*transformers\)$")
    with one_line as refused, vllm_engine(folders["llama"], tensor_parallel=3):
        pass
    assert "divisible" in str(refused.value)
    assert "\n" not in str(refused.value)
