"""Views derived from a cache, the token files of regularizers, and caches that lack something."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from extract_models import save_model, tokenizer
from small_cache import RESPONSES, SHARD_ROWS, TOP_K, WIDTH, opened, shard, write_cache
from toy_cache import TOP_K as TOY_TOP_K
from toy_cache import toy_cache

from embrm.cache import writer as writer_module
from embrm.cache.reader import Cache, open_cache
from embrm.cache.tensors import lm_head_tensors, to_tensor
from embrm.cli import main
from embrm.core.errors import UserError
from embrm.core.progress import progress
from embrm.extraction.run import extract
from embrm.extraction.spec import ExtractSpec
from embrm.results.ledger import open_results
from embrm.results.replay import replay
from embrm.sweeps.execute import sweep
from embrm.sweeps.mapped import TokenFiles
from embrm.sweeps.plan import plan_sweep
from embrm.sweeps.views import open_view, view_names
from embrm.training.regularizers import log_probability_change
from embrm.training.token_rows import PackedLogits


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of five shards. Every response has token rows; the first response has two, and one
    response begins its text."""
    folder = tmp_path_factory.mktemp("small") / "cache"
    head = {"weight": torch.randn(100, WIDTH).bfloat16(), "scale": torch.tensor([0.5])}
    with opened(folder, lm_head=lambda: head) as writer:
        for index in range(writer.n_shards):
            rows, tokens = shard(index)
            if index == 0:
                rows.n_prompt[3] = 0
            if index == 1:  # the one without token rows borrows some
                tokens = shard(0)[1]
                tokens = replace(tokens, response=tokens.response + SHARD_ROWS)
            if index == 0:
                tokens = replace(
                    tokens,
                    **{
                        name: np.concatenate([value[:1], value])
                        for name in ("response", "position", "target", "target_logit", "logsumexp",
                                     "top_ids", "top_logits")
                        for value in [getattr(tokens, name)]
                    },
                    state=np.concatenate([tokens.state[:1] * 5, tokens.state]),
                    tail_mean=np.concatenate([tokens.tail_mean[:1], tokens.tail_mean]),
                )  # fmt: skip
            writer.write_shard(index, rows, tokens)
        writer.finish()
    return open_cache(folder)


def _mean_of_rows(cache: Cache) -> torch.Tensor:
    rows = cache.token_rows()
    states, owner = to_tensor(rows.state), torch.from_numpy(rows.response)
    return torch.stack([states[owner == i].mean(0) for i in range(RESPONSES)])


def test_every_view_with_and_without_s(small: Cache) -> None:
    S = torch.from_numpy(small.responses["S"].to_numpy()).float()[:, None]
    bases = {name: to_tensor(small.stored_states(name)) for name in ("last", "mean", "layer:1")}
    bases["tokens"] = _mean_of_rows(small)
    assert {*view_names(small)} == {*bases, *(f"{name}+S" for name in bases)}
    for name, expected in bases.items():
        view = open_view(small, name)
        assert view.shape == tuple(expected.shape)
        assert view.size == expected.numel() * expected.element_size()
        torch.testing.assert_close(view.read(), expected)
        assert [len(part) for part in view.shards()] == [5, 5, 5, 5, 3]
        with_S = open_view(small, f"{name}+S")
        assert with_S.shape == (RESPONSES, WIDTH + 1)
        assert with_S.size == 4 * RESPONSES * (WIDTH + 1)
        torch.testing.assert_close(with_S.read(), torch.cat([expected, S], 1))


def test_views_of_16_bits_keep_s_in_32(tmp_path: Path) -> None:
    cache = open_cache(toy_cache(tmp_path / "toy", token_rows=3, S=-1234.567))
    pooled, rows = open_view(cache, "tokens"), cache.token_rows()
    first = to_tensor(rows.state[rows.response == 7]).float().mean(0)
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled.read()[7], first.bfloat16())
    assert pooled.size == pooled.read().numel() * 2
    with_S = open_view(cache, "last+S").read()
    assert with_S.dtype == torch.float32
    assert with_S[0, -1].item() == pytest.approx(-1234.567, rel=1e-7)
    assert torch.equal(with_S[:, :-1], torch.from_numpy(cache.states("last")))


def test_a_response_without_token_rows_is_refused_by_the_view_tokens(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache")
    view = open_view(open_cache(tmp_path / "cache"), "tokens")
    with pytest.raises(UserError, match=r"'tokens': 5 of responses 5\.\.\.9 have no token row"):
        view.read()


def test_token_files_hold_the_token_rows_of_all_shards(small: Cache, tmp_path: Path) -> None:
    with progress("", 5, "shards") as bar:
        files = TokenFiles.write(small, tmp_path, None, bar)
    data, rows = files.open(), small.token_rows()
    assert torch.equal(data.states.values, to_tensor(rows.state))
    assert data.tail_means is not None
    assert torch.equal(data.tail_means.values, to_tensor(rows.tail_mean))
    assert data.starts.tolist() == [0, *range(2, RESPONSES + 2)]
    scalars = small.responses
    positions = scalars["n_response"].to_numpy().copy()
    positions[3] -= 1  # its first token has no state before it
    assert data.positions.tolist() == positions.tolist()
    assert data.S.tolist() == scalars["S"].to_list()
    packed = PackedLogits(data.packed_logits.values)
    assert packed.target.tolist() == rows.target.tolist()
    assert packed.ids(TOP_K)[:, 1:].tolist() == rows.top_ids.tolist()
    logits = packed.logits(TOP_K)
    assert logits[:, 0].tolist() == rows.target_logit.tolist()
    assert logits[:, 1:-1].tolist() == rows.top_logits.tolist()
    assert packed.logsumexp.tolist() == rows.logsumexp.tolist()
    assert torch.equal(data.head.weight, lm_head_tensors(small)["weight"])
    assert (data.head.scale, data.head.softcap, data.head.bias) == (0.5, None, None)
    written = sum(path.stat().st_size for path in TokenFiles.paths(tmp_path).values())
    table = TokenFiles.paths(tmp_path)["responses"].stat().st_size
    assert written - table == pytest.approx(TokenFiles.size(small), abs=1000)  # safetensors' header
    with progress("", 5, "shards") as bar:
        half = TokenFiles.write(small, tmp_path, 0.5, bar)
    assert half.matrices["states"].resident == rows.state.nbytes // 2


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_an_extracted_cache_gives_back_the_log_probability_it_stores(
    kind: str, tmp_path: Path
) -> None:
    """Extraction, cache, files and reading agree on positions, targets, logits and soft-capping."""
    save_model(tmp_path / "model", kind, tokenizer(bos=True))
    pairs = [
        {"prompt": f"Who wrote page {i}?", "chosen": "The river was low. " * (1 + i % 3),
         "rejected": "Mud and boats", "split": "train"}
        for i in range(6)
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    values = {
        "model": str(tmp_path / "model"), "data": [{"path": str(tmp_path / "pairs.jsonl")}],
        "token_rows": 500, "top_k": 9, "tail_mean": True,
    }  # fmt: skip
    extract(ExtractSpec.parse(values, "test"), tmp_path / "cache", device="cpu", shard_rows=5)
    cache = open_cache(tmp_path / "cache")
    (tmp_path / "files").mkdir()
    with progress("", 3, "shards") as bar:
        data = TokenFiles.write(cache, tmp_path / "files", None, bar).open()
    assert (data.head.softcap is not None) == (kind == "gemma2")
    m, shift = len(data.S), None
    found = {}
    for top_k in (None, 4, "all"):
        tokens = data.read(torch.arange(m), rows=None, top_k=top_k, draws=np.zeros(m))
        own = tokens.log_p.gather(1, tokens.target[:, None])[:, 0] * tokens.share
        S = torch.zeros(m).index_add(0, tokens.response, own)
        assert S.tolist() == pytest.approx(data.S.tolist(), rel=1e-4, abs=1e-3)
        if shift is None:
            shift = 1e-2 * torch.randn(tokens.X.shape)
        vectors = tokens.vectors[tokens.candidates] if tokens.candidates is not None else None
        moved = (
            shift @ tokens.vectors.T
            if vectors is None
            else torch.einsum("ncd,nd->nc", vectors, shift)
        )
        found[top_k] = log_probability_change(tokens, moved)
    size = found["all"].norm()
    assert size > 1e-3
    for top_k in (None, 4):  # exact to first order, with the tail's mean
        assert (found[top_k] - found["all"]).norm() < 0.05 * size


# Bad input

HEAD = 'head = { adapter = { kind = "low-rank", width = 4 } }\n'
GRM = HEAD + 'regularizer = { kind = "grm-sft" }\n'


def _spec(folder: Path, *fields: str) -> Path:
    path = folder / "s.toml"
    entries = [f'[[runs]]\nname = "r{i}"\n{own}\n' for i, own in enumerate(fields)]
    path.write_text(
        'baseline = "r0"\nseeds = [0]\n[defaults]\nepochs = 2\nbatch_pairs = 16\n'
        + "".join(entries)
    )
    return path


BAD: list[tuple[dict[str, Any], str, list[str]]] = [
    ({}, GRM, ["'grm-sft' reads token rows", "has none", "--token-rows"]),
    ({}, 'regularizer = { kind = "fisher" }', ["'fisher' reads token rows", "--token-rows"]),
    ({}, 'state = "tokens"', ["state 'tokens'", "token rows", "--token-rows"]),
    ({}, 'state = "tokens+S"', ["state 'tokens+S'", "token rows", "--token-rows"]),
    ({"token_rows": 1}, GRM, ["has one token row a response", "--token-rows 32", "plug-in"]),
    ({"token_rows": 2, "lm_head": False}, GRM, ["'grm-sft' reads the LM head", "--model"]),
    (
        {"token_rows": 2},
        HEAD + 'regularizer = { kind = "preserve-kl", top_k = 7 }',
        ["top_k = 7", f"keeps {TOY_TOP_K} logits", "--top-k 7"],
    ),
    ({"token_rows": 2, "top_k": 0}, GRM, ["keeps 0 logits", "--top-k"]),
    (
        {"token_rows": 2, "S": math.nan},
        GRM,
        ["'grm-sft' reads S", "for 1 responses", "grm-dpo", "embrm extract"],
    ),
    (
        {"token_rows": 2, "S": math.nan},
        'state = "last+S"',
        ["'last+S' reads S", "for 1 responses", "state = 'last'", "embrm extract"],
    ),
    (
        {"token_rows": 2},
        'state = "last+S"\n' + HEAD,
        ["state 'last+S'", "after the final norm", "'last' or 'mean' or 'tokens'"],
    ),
    ({"token_rows": 2}, 'state = "last+T"', ["state 'last+T' is not in", "'last+S'"]),
    (
        {"token_rows": 2},
        "regularizer = { kind = 'grm-sft' }",
        ["without an adapter", "head.adapter"],
    ),
    ({"token_rows": 2}, GRM + 'preprocess = "center"', ["preprocess", "remove preprocess"]),
]


@pytest.mark.parametrize(("lacking", "fields", "parts"), BAD)
def test_errors_about_the_cache_are_one_line_and_exit_with_2(
    lacking: dict[str, Any],
    fields: str,
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # embrm writes no such cache; another program may.
    monkeypatch.setattr(writer_module, "_refuse_non_finite", lambda *_: None)
    cache = toy_cache(tmp_path / "toy", **lacking)
    spec = _spec(tmp_path, "", fields)
    monkeypatch.setattr(sys, "argv", ["embrm", "sweep", str(spec), "--cache", str(cache)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    words = capsys.readouterr().err
    assert "Traceback" not in words
    [line] = [line for line in words.splitlines() if line.startswith("error: ")]
    for part in ["run 'r1'", *parts]:
        assert part in line, line
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("state", ["layer:1", "prenorm"])
def test_adapters_need_states_after_the_final_norm(state: str, tmp_path: Path) -> None:
    def with_view(index: int) -> Any:
        rows, tokens = shard(index)
        views = {state if name == "layer:1" else name: v for name, v in rows.states.items()}
        norms = {state if name == "layer:1" else name: v for name, v in rows.norms.items()}
        return replace(rows, states=views, norms=norms), tokens

    pairs = pl.DataFrame(
        {
            "pair_id": [f"{i:016x}" for i in range(10)],
            "split": ["train"] * 5 + ["id"] * 5,
            "subset": pl.Series([None] * 10, dtype=pl.String),
            "prompt_id": [f"p{i}" for i in range(10)],
            "chosen": pl.Series(range(0, 20, 2), dtype=pl.Int32),
            "rejected": pl.Series(range(1, 20, 2), dtype=pl.Int32),
            "margin": [0.5] * 10,
            "label": [1.0] * 10,
            "weight": [1.0] * 10,
        }
    )
    members = pl.DataFrame(
        schema={"split": pl.String, "response": pl.Int32, "prompt_id": pl.String,
                "subset": pl.String, "gold": pl.Float64}
    )  # fmt: skip
    none = pl.DataFrame(schema={"row": pl.Int64})
    tables = {"pairs": pairs, "members": members, "exclusions": none, "leaks": none}
    with opened(tmp_path / "cache", tables=tables) as writer:
        for index in range(writer.n_shards):
            writer.write_shard(index, *with_view(index))
        writer.finish()
    for fields in (HEAD, 'regularizer = { kind = "fisher" }\n'):
        spec = _spec(tmp_path, fields + f'state = "{state}"')
        spec.write_text("validation = 0\n" + spec.read_text())
        with pytest.raises(UserError, match=f"state '{state}': adapters and regularizers act on "):
            plan_sweep(spec, tmp_path / "cache")


def test_runs_that_do_not_read_s_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_refuse_non_finite", lambda *_: None)
    cache = toy_cache(tmp_path / "toy", token_rows=2, S=math.nan)
    dpo = HEAD + 'regularizer = { kind = "grm-dpo", alpha = 0.3 }'
    ledger = open_results(sweep(_spec(tmp_path, "", dpo), cache, jobs=1)).ledger
    assert ledger["status"].to_list() == ["ok", "ok"]


@pytest.mark.slow
def test_a_sweep_of_every_kind_and_its_replay(tmp_path: Path) -> None:
    cache = toy_cache(tmp_path / "toy", token_rows=3)
    kinds = ["grm-sft", "grm-sft-unsquashed", "grm-dpo", "grm-dpo-noref", "preserve-kl",
             "preserve-fisher"]  # fmt: skip
    fields = [HEAD + f'regularizer = {{ kind = "{kind}", top_k = "all" }}' for kind in kinds]
    fields += ['regularizer = { kind = "fisher" }', HEAD, 'state = "tokens+S"']
    fields += [HEAD + 'regularizer = { kind = "grm-sft", alpha = 0 }']
    results = open_results(sweep(_spec(tmp_path, "", *fields), cache, jobs=1))
    assert results.ledger["status"].to_list() == ["ok"] * 11
    names = dict(results.ledger.select("run_id", "config").rows())
    regularized = {
        names[run] for run in results.curves.drop_nulls("regularizer")["run_id"].to_list()
    }
    assert regularized == {f"r{i}" for i in range(1, 8)}
    weights = dict(results.ledger.select("config", "weights_sha256").rows())
    assert weights["r8"] == weights["r10"]  # α = 0 adds nothing
    assert len({*weights.values()}) == 10
    found = replay(tmp_path / "s", cache=cache)
    assert len(found.runs) == 11
    assert all(run.same_bits for run in found.runs)
