"""Tests of adoption: correct values, identical bytes after interruption, usable in sweeps."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
from command_line import Outcome
from small_cache import digests

from embrm.adoption.arrays import open_states
from embrm.adoption.run import adopt
from embrm.adoption.spec import AdoptSpec, parse_arrays
from embrm.cache.manifest import read_manifest
from embrm.cache.reader import Cache, open_cache
from embrm.cache.tensors import to_tensor
from embrm.cache.verify import verify
from embrm.cache.writer import CacheWriter
from embrm.cli import main
from embrm.core.errors import UserError
from embrm.results.ledger import open_results

N, K, D = 40, 4, 6
WEIGHTS = np.random.default_rng(7).standard_normal(D)


def world(seed: int, prompts: int = N) -> tuple[np.ndarray, np.ndarray]:
    """States float32 [prompts, K, D] and a gold score that is linear in them."""
    random = np.random.default_rng(seed)
    states = 2 * random.standard_normal((prompts, 1, D)) + random.standard_normal((prompts, K, D))
    states = states.astype(np.float32)
    return states, states @ WEIGHTS


def saved(folder: Path, name: str, values: np.ndarray) -> str:
    np.save(folder / f"{name}.npy", values)
    return str(folder / f"{name}.npy")


def write_world(folder: Path) -> list[str]:
    """Write the files of two splits; returns the command-line options that name them."""
    words = []
    for seed, split in enumerate(("train", "id")):
        states, gold = world(seed)
        words += ["--states", f"{split}={saved(folder, split, states)}"]
        words += ["--gold", f"{split}={saved(folder, f'{split}-gold', gold)}"]
    return words


def adopted(folder: Path, *sources: dict[str, Any], **options: Any) -> Cache:
    spec = AdoptSpec.parse({"arrays": sources}, "test")
    adopt(spec, folder / "cache", **options)
    assert verify(folder / "cache") == []
    return open_cache(folder / "cache")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("layout", ["prompts", "responses", "list"])
def test_a_round_trip_of_every_layout(tmp_path: Path, layout: str, dtype: str) -> None:
    states, gold = world(0)
    tensor = torch.from_numpy(states).to(getattr(torch, dtype))
    source: dict[str, Any] = {"states": str(tmp_path / "states.safetensors"), "split": "train"}
    random = np.random.default_rng(1)
    if layout == "list":
        order = random.permutation(N * K)
        tensor = tensor.view(-1, D)[torch.from_numpy(order)]
        prompts = [f"prompt {row // K}" for row in order]
        table = pl.DataFrame({"prompt_id": prompts, "gold": gold.flatten()[order]})
        table.write_parquet(tmp_path / "rows.parquet")
        source["rows"] = str(tmp_path / "rows.parquet")
    else:
        source["gold"] = saved(tmp_path, "gold", gold)
        if layout == "responses":
            tensor = tensor.transpose(0, 1).contiguous()
    safetensors.torch.save_file({"states": tensor}, source["states"])
    cache = adopted(tmp_path, source, shard_bytes=11 * D * tensor.element_size())
    expected = tensor.view(-1, D)
    if dtype == "float64":
        expected = expected.float()
    assert cache.dtype == str(expected.dtype).removeprefix("torch.")
    # Each response has the state and the gold score of the row that its member refers to.
    assert cache.members["response"].to_list() == [*range(N * K)]
    row = torch.tensor(cache.members["row"].to_numpy())
    assert sorted(row.tolist()) == [*range(N * K)]
    assert torch.equal(to_tensor(cache.stored_states("last")), expected[row])
    want = tensor.view(-1, D).double().numpy()[row.numpy()] @ WEIGHTS
    np.testing.assert_allclose(cache.members["gold"], want, atol=0.1)
    assert cache.responses["response_id"].n_unique() == N * K
    assert cache.responses["prompt_id"].equals(cache.members["prompt_id"])
    assert cache.members["prompt_id"].value_counts()["count"].to_list() == [K] * N
    norms = torch.from_numpy(cache.states("last")).norm(dim=1).numpy()
    np.testing.assert_allclose(cache.responses["norm.last"], norms, rtol=1e-6)
    assert cache.responses["S"].is_nan().all()


def test_pairs_are_all_responses_of_different_gold_within_a_prompt(tmp_path: Path) -> None:
    states, gold = world(0)
    gold[3, 1] = gold[3, 2]
    models = tmp_path / "models.txt"
    models.write_text("a\nb\nc\nd\n")
    source = {
        "states": saved(tmp_path, "train", states),
        "gold": saved(tmp_path, "gold", gold),
        "models": str(models),
    }
    cache = adopted(tmp_path, source)
    pairs = cache.pairs
    assert pairs.height == N * K * (K - 1) // 2 - 1
    assert pairs["pair_id"].n_unique() == pairs.height
    assert cache.splits == ["train"]  # the file name without its suffix
    flat = gold.flatten()
    for side, model in (("chosen", "chosen_model"), ("rejected", "rejected_model")):
        place = pairs[side].to_numpy() % K
        assert pairs[model].to_list() == ["abcd"[k] for k in place]
    difference = flat[pairs["chosen"].to_numpy()] - flat[pairs["rejected"].to_numpy()]
    assert (difference > 0).all()
    assert np.array_equal(pairs["margin"].to_numpy(), difference)
    assert (pairs["chosen"] // K == pairs["rejected"] // K).all()
    assert pairs["row"].to_list() == pairs["chosen"].to_list()
    (tmp_path / "few").mkdir()
    few = adopted(tmp_path / "few", {**source, "pairs": {"per_prompt": 2, "gap": 0.5}}).pairs
    assert (few["prompt_id"].value_counts()["count"] <= 2).all()
    assert {*few["pair_id"]} < {*pairs["pair_id"]}  # a pair's id does not depend on the rule
    assert (few["margin"] > 0.5).all()
    (tmp_path / "none").mkdir()
    assert adopted(tmp_path / "none", {**source, "pairs": {"per_prompt": 0}}).pairs.is_empty()
    with pytest.raises(
        UserError, match="gap = 1000, but no two responses of a prompt differ by more"
    ):
        adopted(tmp_path / "nothing", {**source, "pairs": {"gap": 1000}})


def test_excluded_rows_are_only_in_the_exclusions(tmp_path: Path) -> None:
    states, gold = world(0)
    states[2, 1], states[5, 0, 2], gold[7, 3] = 0, np.nan, np.nan
    source = {
        "states": saved(tmp_path, "train", states),
        "gold": saved(tmp_path, "gold", gold),
    }
    cache = adopted(tmp_path, source)
    lost = {2 * K + 1: "zero_vector", 5 * K: "nan_state", 7 * K + 3: "nan_gold"}
    assert dict(cache.exclusions.select("row", "reason").rows()) == lost
    assert cache.manifest.n_responses == N * K - 3
    assert not {*cache.members["row"]} & {*lost}
    row = torch.tensor(cache.members["row"].to_numpy())
    assert torch.equal(
        to_tensor(cache.stored_states("last")), torch.from_numpy(states).view(-1, D)[row]
    )
    assert cache.manifest.data["exclusions"] == dict.fromkeys(sorted(lost.values()), 1)
    checks = [finding["check"] for finding in cache.manifest.data["lint"]]
    assert {"gold scores", "NaN or infinite", "zero vectors"} <= {*checks}


def test_sorted_responses_are_shuffled_with_their_states_and_gold(tmp_path: Path) -> None:
    states, gold = world(0)
    order = np.argsort(-gold, axis=1)
    states, gold = np.take_along_axis(states, order[..., None], 1), np.sort(gold)[:, ::-1]
    source = {
        "states": saved(tmp_path, "train", states.transpose(1, 0, 2).copy()),
        "gold": saved(tmp_path, "gold", gold.copy()),
        "order": "responses",
    }
    cache = adopted(tmp_path, source, shard_bytes=300)
    row = cache.members["row"].to_numpy()  # response k of prompt n is row k·N + n
    assert np.array_equal(row % N, np.repeat(np.arange(N), K))
    place = row // N
    assert not np.array_equal(place.reshape(N, K), np.tile(np.arange(K), (N, 1)))
    assert torch.equal(
        to_tensor(cache.stored_states("last")), torch.from_numpy(states[row % N, place])
    )
    assert np.array_equal(cache.members["gold"].to_numpy(), gold[row % N, place])
    [fixed] = [one for one in cache.manifest.data["lint"] if one["done"] == "fixed"
               and one["check"] == "sorted by gold"]  # fmt: skip
    assert fixed["count"] == N


def test_the_cache_id_depends_on_the_content_not_on_the_files(tmp_path: Path) -> None:
    states, gold = world(0)
    sources = []
    for name, write in {
        "a.npy": lambda path: np.save(path, states),
        "b.pt": lambda path: torch.save({"x": torch.from_numpy(states)}, path),
        "c.safetensors": lambda path: safetensors.torch.save_file(
            {"x": torch.from_numpy(states)}, path
        ),
    }.items():
        write(tmp_path / name)
        path = saved(tmp_path, "gold", gold)
        sources.append({"states": str(tmp_path / name), "gold": path, "split": "train"})
    ids = set()
    for index, source in enumerate(sources):
        (tmp_path / str(index)).mkdir()
        ids.add(adopted(tmp_path / str(index), source).cache_id)
    assert len(ids) == 1
    for index, change in enumerate(
        ({"split": "id"}, {"pairs": {"per_prompt": 3}}, {"holdout": {"fraction": 0.5}})
    ):
        (tmp_path / f"other-{index}").mkdir()
        ids.add(adopted(tmp_path / f"other-{index}", sources[0] | change).cache_id)
    changed = gold.copy()
    changed[0, 0] += 1
    (tmp_path / "gold").mkdir()
    other = sources[0] | {"gold": saved(tmp_path / "gold", "gold", changed)}
    ids.add(adopted(tmp_path / "gold", other).cache_id)
    assert len(ids) == 5


def test_a_cache_of_another_array_is_not_overwritten(tmp_path: Path) -> None:
    states, gold = world(0)
    source = {"states": saved(tmp_path, "a", states), "gold": saved(tmp_path, "gold", gold)}
    adopted(tmp_path, source)
    saved(tmp_path, "a", states + 1)
    with pytest.raises(UserError, match=r"use the same settings or another out \(--out\)"):
        adopted(tmp_path, source)


def test_held_out_prompts_go_to_another_split(tmp_path: Path) -> None:
    states, gold = world(0)
    source = {
        "states": saved(tmp_path, "train", states),
        "gold": saved(tmp_path, "gold", gold),
        "holdout": {"fraction": 0.3, "split": "id"},
    }
    cache = adopted(tmp_path, source)
    sides = cache.members.group_by("prompt_id").agg(pl.col("split").n_unique(), pl.len())
    assert (sides["split"] == 1).all()
    assert (sides["len"] == K).all()
    assert 3 <= cache.members.filter(split="id")["prompt_id"].n_unique() <= 21
    assert {*cache.pairs["split"]} == {"train", "id"}


def test_prompts_in_two_splits_are_listed_as_leaks(tmp_path: Path) -> None:
    states, gold = world(0)
    both = {"states": saved(tmp_path, "a", states), "gold": saved(tmp_path, "gold", gold)}
    cache = adopted(tmp_path, both | {"split": "train"}, both | {"split": "id"})
    assert cache.leaks.select("eval_split", "prompts_shared").rows() == [("id", N)]
    assert cache.responses["response_id"].n_unique() == 2 * N * K
    texts = [f"Prompt {row // K} " for row in range(N * K)]
    sources = []
    for split, prompts in (("train", texts), ("id", [text.lower() for text in texts[: 2 * K]])):
        table = {"prompt": prompts, "gold": gold.flatten()[: len(prompts)]}
        pl.DataFrame(table).write_csv(tmp_path / f"{split}.csv")
        path = saved(tmp_path, split, world(len(prompts))[0].reshape(-1, D)[: len(prompts)])
        sources.append({"states": path, "rows": str(tmp_path / f"{split}.csv"), "split": split})
    (tmp_path / "texts").mkdir()
    cache = adopted(tmp_path / "texts", *sources)
    assert cache.leaks.select("eval_split", "prompts_shared").rows() == [("id", 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": "rows.csv"}, "has three axes: give gold"),
        ({"gold": None}, "have no gold scores: add gold"),
        ({"gold": "absent.npy"}, "no array at absent.npy"),
        ({"models": "absent.txt"}, "no file of models at absent.txt"),
        ({"pairs": {"length_balanced": True}}, "lengths of adopted responses are unknown"),
        ({"order": "prompt"}, "'prompts' or 'responses'"),
        ({"key": "x"}, "leave its name 'x' out"),
        ({"state": "x"}, "unknown key '?state'?|unknown key"),
    ],
)
def test_invalid_sources_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    states, gold = world(0)
    source = {"states": saved(tmp_path, "train", states), "gold": saved(tmp_path, "gold", gold)}
    with pytest.raises(UserError, match=message) as caught:
        adopted(tmp_path, {k: v for k, v in (source | change).items() if v is not None})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_sources_that_do_not_match_are_refused(tmp_path: Path) -> None:
    states, gold = world(0)
    good = {"states": saved(tmp_path, "a", states), "gold": saved(tmp_path, "gold", gold)}
    for values, message in (
        (
            states[..., :4].copy(),
            "b.npy has width 4, .*a.npy has 6: adopt them into separate caches",
        ),
        (states.astype(np.float16), "has dtype torch.float16"),
        (states, "contain the same states, both for split 'train': leave one out"),
    ):
        other = {"states": saved(tmp_path, "b", values), "gold": good["gold"]}
        with pytest.raises(UserError, match=message):
            adopted(tmp_path, good | {"split": "train"}, other | {"split": "train"})
    flat = saved(tmp_path, "flat", states.reshape(-1, D))
    for extra, message in (
        ({}, r"\(rows, width\): name a table with one row per state by rows"),
        ({"order": "prompts"}, "has two axes: leave order out"),
    ):
        with pytest.raises(UserError, match=message):
            adopted(tmp_path, {"states": flat, "gold": good["gold"]} | extra)


def test_command_line_options_make_a_spec() -> None:
    spec = parse_arrays(
        ["train=a.npy", "ood/x=b.pt"], ["train=g.npy"], ["ood/x=r.csv"],
        order="prompts", models=None, pairs="per_prompt = 4, gap = 0.5",
    )  # fmt: skip
    first, second = spec.arrays
    assert (first.split, first.states, first.gold, first.rows) == ("train", "a.npy", "g.npy", None)
    assert (second.split, second.gold, second.rows) == ("ood/x", None, "r.csv")
    assert (first.order, first.pairs.per_prompt, first.pairs.gap) == ("prompts", 4, 0.5)
    alone = parse_arrays(["a.npy"], ["g.npy"], [], order=None, models=None, pairs=None)
    assert (alone.arrays[0].split, alone.arrays[0].gold) == (None, "g.npy")


BAD_COMMANDS: list[tuple[list[str], str]] = [
    (["--gold", "g.npy"], "--states is missing"),
    (["--states", "a.npy"], "have no gold scores"),
    (
        ["--states", "a.npy", "--gold", "x=g.npy"],
        "gold (--gold) = 'x=g.npy': no states (--states) have that split",
    ),
    (["--states", "=a.npy"], "write [SPLIT=]PATH"),
    (["--states", "x=a.npy", "--states", "x=b.npy"], "'a.npy' has the same split"),
    (["--states", "a.npy", "--gold", "g.npy", "--pairs", "4"], "write keys and values"),
    (["--states", "a.npy", "--gold", "g.npy", "--pairs", "most = 4"], "unknown key"),
    (["spec.toml", "--gold", "g.npy"], "--gold is for adopting without a spec"),
    (["absent.toml"], "no spec at absent.toml"),
]


@pytest.mark.parametrize(("words", "message"), BAD_COMMANDS)
def test_errors_of_the_command_line_are_one_line(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["embrm", "cache", "adopt", *words, "--out", "cache/x"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


SWEEP = """
baseline = "bt"
seeds = [0]
validation = 0.2
[defaults]
epochs = 8
lr = 0.05
[[runs]]
name = "bt"
[[runs]]
name = "mlp"
head = { kind = "mlp", widths = [8] }
"""
REFUSED = {
    'head = { adapter = { width = 2 } }\nregularizer = { kind = "grm-sft" }': "reads token rows",
    'regularizer = { kind = "fisher" }': "reads token rows",
    'state = "last+S"': "reads S",
    'state = "tokens"': "made of token rows",
}


def test_an_adopted_cache_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embrm: Callable[..., Outcome]
) -> None:
    monkeypatch.chdir(tmp_path)

    code, out, _ = embrm("cache", "adopt", *write_world(tmp_path), "--out", "cache")
    assert code == 0
    assert "axis order" in out
    assert "next: embrm sweep" in out
    assert "axis order" in embrm("cache", "show", "cache")[1]
    shown = json.loads(embrm("cache", "show", "cache", "--json")[1])
    assert [one["check"] for one in shown["lint"]] == ["axis order", "axis order"]
    code, _, err = embrm("cache", "probe", "cache")
    assert code == 2
    assert "was adopted from arrays, so there is no model" in err
    for index, (fields, message) in enumerate(REFUSED.items()):
        Path(f"bad-{index}.toml").write_text(f'{SWEEP}\n[[runs]]\nname = "bad"\n{fields}\n')
        code, _, err = embrm("sweep", f"bad-{index}.toml", "--cache", "cache", "--dry-run")
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1
    Path("sweep.toml").write_text(SWEEP)
    assert embrm("sweep", "sweep.toml", "--cache", "cache", "--jobs", "1")[0] == 0
    ledger = open_results(Path("sweep")).ledger
    assert ledger["status"].to_list() == ["ok", "ok"]
    assert (ledger["accuracy@id"] > 0.7).all()  # gold is linear in the states
    assert (ledger["tau@id"] > 0.4).all()
    assert ledger["length_accuracy@id"].is_null().all()  # because lengths are unknown


def test_a_killed_adoption_continues_to_the_same_bytes(tmp_path: Path) -> None:
    words = write_world(tmp_path)
    sources = [
        {"states": words[i + 1].partition("=")[2], "gold": words[i + 3].partition("=")[2],
         "split": words[i + 1].partition("=")[0]}
        for i in (0, 4)
    ]  # fmt: skip
    (tmp_path / "whole").mkdir()
    adopted(tmp_path / "whole", *sources, shard_bytes=SHARD)
    whole = digests(tmp_path / "whole" / "cache")
    spec = AdoptSpec.parse({"arrays": sources}, "test").model_dump_json()
    folder = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, __file__, str(folder), spec])
    done = 0
    while process.poll() is None and done < 3:
        time.sleep(0.002)
        if (folder / "manifest.json").exists():
            done = len(read_manifest(folder).done)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = read_manifest(folder)
    assert 3 <= len(kept.done) < len(kept.shards), "the process finished before it was killed"
    before = {name: (folder / name).stat().st_mtime_ns for name in kept.files()}
    adopted(tmp_path, *sources, shard_bytes=SHARD)
    assert digests(folder) == whole
    assert all((folder / name).stat().st_mtime_ns == then for name, then in before.items())


def test_a_full_disk_stops_adoption_and_keeps_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, gold = world(0)
    source = {"states": saved(tmp_path, "a", states), "gold": saved(tmp_path, "gold", gold)}
    (tmp_path / "whole").mkdir()
    adopted(tmp_path / "whole", source, shard_bytes=SHARD)
    threads, begun, write = torch.get_num_threads(), [], CacheWriter.write_shard

    def fill_the_disk(writer: CacheWriter, index: int, *rows: Any) -> None:
        begun.append(index)
        if index == 3:
            raise UserError("disk full")
        if index > 3:
            time.sleep(0.2)  # long enough for the failure to be noticed
        write(writer, index, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", fill_the_disk)
        with pytest.raises(UserError, match="disk full"):
            adopted(tmp_path, source, shard_bytes=SHARD)
    assert torch.get_num_threads() == threads
    shards = read_manifest(tmp_path / "cache").shards
    assert len(begun) < len(shards)  # no shard is begun after the failure
    assert [index for index, entry in enumerate(shards) if entry] == sorted({*begun} - {3})
    adopted(tmp_path, source, shard_bytes=SHARD)
    assert digests(tmp_path / "cache") == digests(tmp_path / "whole" / "cache")


SHARD = 16 * D * 4
"""Bytes of the states of sixteen responses."""


def test_shards_have_the_given_size(tmp_path: Path) -> None:
    states, gold = world(0)
    source = {"states": saved(tmp_path, "a", states), "gold": saved(tmp_path, "gold", gold)}
    cache = adopted(tmp_path, source, shard_bytes=7 * D * 4 + 1)
    assert cache.manifest.shard_rows == 7
    assert len(cache.manifest.shards) == -(-N * K // 7)
    assert open_states(Path(source["states"])).rows == N * K


if __name__ == "__main__":
    adopt(AdoptSpec.model_validate_json(sys.argv[2]), Path(sys.argv[1]), shard_bytes=SHARD)
