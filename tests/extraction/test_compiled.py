"""Tests of torch.compile: the same states for batches of any size, or a one-line error."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extract_models import CONFIGS, SIZES, save_config, tokenizer
from extract_world import make, spec_of
from packed_texts import SHARED, VIEWS, texts
from transformers import MistralConfig

from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.extraction.dry_run import dry_run
from embrm.extraction.reading import read
from embrm.extraction.transformers_engine import load_engine

WANTED: dict[str, Any] = {"dtype": "float32", "device": "cpu", "views": VIEWS, "top_k": 3}
OTHERS = texts([11, 2, 33], [[6, 25, 3], [40], [8, 2]], seed=1)
CXX = os.environ.get("CXX", "g++")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.set_default_backend(None)
    torch.compiler.reset()


def near_eager(folder: Path) -> None:
    """Compiled and not, over texts that are packed and texts beyond a window, which are padded;
    then other texts, for which nothing may be compiled again."""
    plain = load_engine(folder, **WANTED)
    engine = load_engine(folder, compiled=True, **WANTED)
    assert engine.environment == plain.environment | {"compiled": True}
    for requests, stance in ((SHARED, "default"), (OTHERS, "fail_on_recompile")):
        expected = read(plain, requests, 120)
        with torch.compiler.set_stance(stance):
            found = read(engine, requests, 120)
        for view in VIEWS:
            error = (found.states[view] - expected.states[view]).abs().max()
            assert error <= 1e-4 * expected.states[view].abs().max()
        assert found.tokens.logsumexp == pytest.approx(expected.tokens.logsumexp, rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mistral"])
def test_compiled_states_equal_those_of_the_model(kind: str, tmp_path: Path) -> None:
    torch.compiler.set_default_backend("eager")
    window = MistralConfig(**SIZES, sliding_window=24)
    near_eager(save_config(tmp_path, CONFIGS.get(kind, window), tokenizer()))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(CXX), reason=f"no C++ compiler {CXX} on this machine")
def test_states_of_inductor_equal_those_of_the_model(tmp_path: Path) -> None:
    near_eager(save_config(tmp_path, CONFIGS["llama-tied"], tokenizer()))


def test_the_manifest_records_compilation(world: dict[str, str], tmp_path: Path) -> None:
    torch.compiler.set_default_backend("eager")
    spec = spec_of(world, limit=4)
    manifests = [
        open_cache(make(world, tmp_path / str(compiled), spec, compiled=compiled)).manifest
        for compiled in (False, True)
    ]
    assert manifests[0].cache_id == manifests[1].cache_id
    assert [entry.environments[0].get("compiled") for entry in manifests] == [None, True]
    assert dry_run(spec, device="cpu", compiled=True).tokens_per_second > 0


def test_the_error_without_a_compiler_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_config(tmp_path / "model", CONFIGS["llama-tied"], tokenizer())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(
            UserError, match=r"torch\.compile fails on Llama.*: leave out compiled"
        ) as caught,
    ):
        load_engine(folder, compiled=True, **WANTED)
    assert "\n" not in str(caught.value)
    assert "C++ compiler" in str(caught.value)


def test_states_that_compiling_changes_are_refused(tmp_path: Path) -> None:
    def wrong(graph: torch.fx.GraphModule, _: Any) -> Any:
        def louder(output: Any) -> Any:
            real = isinstance(output, torch.Tensor) and output.is_floating_point()
            return output * 1.01 if real else output

        return lambda *inputs: tuple(louder(output) for output in graph(*inputs))

    torch.compiler.set_default_backend(wrong)
    folder = save_config(tmp_path, CONFIGS["llama-tied"], tokenizer())
    with pytest.raises(
        UserError, match=r"\(it changes the states\): leave out compiled \(--compile\)"
    ):
        load_engine(folder, compiled=True, **WANTED)


def test_a_later_failure_to_compile_is_a_one_line_error(tmp_path: Path) -> None:
    able = True

    def until_then(graph: torch.fx.GraphModule, _: Any) -> Any:
        if not able:
            raise NotImplementedError
        return graph

    torch.compiler.set_default_backend(until_then)
    folder = save_config(tmp_path, CONFIGS["llama-tied"], tokenizer())
    engine = load_engine(folder, compiled=True, **WANTED)
    engine._longest_packed, able = 24, False
    with pytest.raises(UserError, match=r"fails on Llama.*: run again without c") as caught:
        read(engine, SHARED, 120)  # longer texts are padded: another graph
    assert "\n" not in str(caught.value)
