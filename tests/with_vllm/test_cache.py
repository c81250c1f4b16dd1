"""A whole cache through vLLM, by the command line, then compared with the other engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from extract_models import save_config, tokenizer
from extract_world import write_pairs
from lm_families import FAMILIES
from typer.testing import CliRunner

from embrm.cache.reader import open_cache
from embrm.cli import app
from embrm.core.errors import UserError


def run(*arguments: str | Path) -> Any:
    """The JSON that a command prints. Raises: what the command raises."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    if done.exception:
        raise done.exception
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """An extraction through vLLM; the command that made it."""
    root = tmp_path_factory.mktemp("cache")
    save_config(root / "model", FAMILIES["llama"], tokenizer(bos=True))
    data = write_pairs(root / "pairs.jsonl")
    command = ["extract", "--model", root / "model", "--data", data, "--max-length", "200"]
    command += ["--states", "last,mean", "--token-rows", "3", "--out", root / "cache"]
    run(*command, "--engine", "vllm")
    return command


def test_the_cache_says_which_engine_made_it(made: list[str | Path]) -> None:
    cache = open_cache(Path(made[-1]))
    assert cache.manifest.identity["engine"] == "vllm"
    assert cache.manifest.environments[0]["engine"] == "vllm"
    assert cache.manifest.extraction["engine"] == "vllm"
    assert cache.pairs.height == 48


def test_another_engine_does_not_finish_it(made: list[str | Path]) -> None:
    with pytest.raises(UserError, match="engine = 'vllm', not 'transformers'"):
        run(*made, "--engine", "transformers")


@pytest.mark.parametrize("engine", ["transformers", None])
def test_probe_compares_the_engines(made: list[str | Path], engine: str | None) -> None:
    chosen = ["--engine", engine] if engine else []
    result = run("cache", "probe", made[-1], *chosen)
    assert (result["made_by"], result["engine"]) == ("vllm", engine or "vllm")
    assert {d["quantity"] for d in result["deviations"]} == {"last", "mean", "S", "logsumexp"}
    for deviation in result["deviations"]:
        assert deviation["relative"] < result["tolerance"]
        assert not deviation["orders_changed"]
