"""Tests of extraction by several processes: balanced, and the bytes of one, even after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from extract_models import save_model, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from embrm.cache.merge import merge
from embrm.cache.reader import open_cache
from embrm.cache.verify import verify
from embrm.core.errors import UserError
from embrm.extraction import run
from embrm.extraction.parts import Share
from embrm.extraction.run import extract
from embrm.extraction.spec import ExtractSpec

SHARD_ROWS = 16


def shares(count: int) -> list[Share]:
    return [Share(index, count) for index in range(count)]


def digests(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_shares_are_parsed_from_the_command_line() -> None:
    assert Share.parse("0/1") == Share(0, 1)
    assert Share.parse("3/12") == Share(3, 12)
    assert Share(3, 12).folder(Path("cache/big")) == Path("cache/big.3-of-12")


@pytest.mark.parametrize(
    "text",
    ["4/4", "0/0", "1", "", "/", "-1/4", "1/-4", "1.0/4", "1/4/2", "a/b", " 1/4", "9" * 5000],
)
def test_invalid_shares_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"write i/n with i from 0 to n - 1") as error:
        Share.parse(text)
    assert len(str(error.value)) < 200


@given(tokens=st.lists(st.integers(1, 5000), min_size=1, max_size=60), count=st.integers(1, 70))
def test_parts_have_every_shard_once_and_their_share_of_the_tokens(
    tokens: list[int], count: int
) -> None:
    parts = [share.part(tokens) for share in shares(count)]
    assert [shard for part in parts for shard in part.shards] == [*range(len(tokens))]
    assert [(part.index, part.count) for part in parts] == [(i, count) for i in range(count)]
    for part in parts:
        assert sum(tokens[shard] for shard in part.shards) <= sum(tokens) / count + max(tokens)


def test_equal_shards_are_divided_equally() -> None:
    for count in range(1, 8):
        for each in range(1, 4):
            sizes = [len(share.part([9] * (count * each)).shards) for share in shares(count)]
            assert sizes == [each] * count
    # By tokens, not by shards: one long shard weighs as much as eight short ones.
    assert [len(share.part([8] + [1] * 8).shards) for share in shares(2)] == [1, 8]


def write_pairs(path: Path, texts: list[tuple[int, int]]) -> Path:
    rows = [
        {
            "prompt": f"river {i % 7} names?",
            "chosen": f"a boat {i} " * chosen,
            "rejected": f"mud {i} " * rejected,
        }
        for i, (chosen, rejected) in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spec_of(model: Path, data: Path) -> ExtractSpec:
    values: dict[str, Any] = {
        "model": str(model),
        "data": [{"path": str(data), "split": "train"}],
        "max_length": 128,
        "token_rows": 2,
        "top_k": 4,
    }
    return ExtractSpec.parse(values, "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama-tied", tokenizer())


@given(
    texts=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=14),
    count=st.integers(1, 5),
    shard_rows=st.integers(1, 9),
)
@settings(max_examples=12, deadline=None)
@pytest.mark.slow
def test_any_number_of_processes_gives_the_bytes_of_one(
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[tuple[int, int]],
    count: int,
    shard_rows: int,
) -> None:
    """Including more processes than shards, of which some have empty parts."""
    root = tmp_path_factory.mktemp("split")
    spec = spec_of(model, write_pairs(root / "data.jsonl", texts))
    prepared = run.prepare_texts(spec)
    engine = run.load_engine_for(prepared, "cpu")
    with pytest.MonkeyPatch.context() as patch:  # load the model once, which is not under test
        patch.setattr(run, "prepare_texts", lambda *_, **__: prepared)
        patch.setattr(run, "load_engine_for", lambda *_, **__: engine)
        how: dict[str, Any] = {"device": "cpu", "batch_tokens": 100, "shard_rows": shard_rows}
        whole = extract(spec, root / "whole", **how)
        parts = [extract(spec, root / "out", share=share, **how) for share in shares(count)]
    assert [part.name for part in parts] == [f"out.{i}-of-{count}" for i in range(count)]
    assert not (root / "out").exists()
    out = merge(parts, root / "out")
    assert digests(out) == digests(whole)
    assert verify(out) == []


def _driver(model: str, data: str, root: Path) -> None:
    """Fork an extraction whole, then two parts side by side; kill one in the middle and restart it.

    The parts wait after every shard, so that the kill cannot come too late.
    """
    from embrm.cache.writer import CacheWriter

    spec = spec_of(Path(model), Path(data))
    write = CacheWriter.write_shard

    def slowly(*arguments: Any) -> None:
        write(*arguments)
        time.sleep(0.3)

    def start(out: Path, share: Share | None) -> int:
        child = os.fork()
        if child == 0:
            CacheWriter.write_shard = slowly if share else write  # type: ignore[method-assign]
            extract(spec, out, device="cpu", batch_tokens=256, shard_rows=SHARD_ROWS, share=share)
            os._exit(0)
        return child

    def finished(share: Share) -> int:
        manifest = share.folder(root / "parts") / "manifest.json"
        shards = json.loads(manifest.read_bytes())["shards"] if manifest.exists() else []
        return sum(shard is not None for shard in shards)

    def ended(child: int) -> int:
        return os.waitpid(child, 0)[1]

    first, second = shares(2)
    statuses = [ended(start(root / "whole", None))]
    beside, victim = start(root / "parts", first), start(root / "parts", second)
    while finished(second) < 2:
        if os.waitpid(victim, os.WNOHANG)[0]:
            sys.exit("the part to be killed ended by itself")
        time.sleep(0.01)
    os.kill(victim, signal.SIGKILL)
    print(os.WTERMSIG(ended(victim)), finished(first), finished(second), flush=True)
    statuses += [ended(start(root / "parts", second)), ended(beside)]
    print(finished(first), finished(second), flush=True)
    sys.exit(any(statuses))


@pytest.mark.slow
def test_two_processes_one_killed_and_restarted_give_the_bytes_of_one(
    model: Path, tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "data.jsonl", [(1 + i % 9, 1 + i % 4) for i in range(80)])
    done = subprocess.run(
        [sys.executable, __file__, str(model), str(data), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    killed, ended = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    signal_number, _, left = killed
    assert signal_number == signal.SIGKILL
    assert 2 <= left < ended[1], "the kill did not come in the middle"
    assert sum(ended) == 10  # 160 responses
    parts = [share.folder(tmp_path / "parts") for share in shares(2)]
    with pytest.raises(UserError, match="part 1/2 of a cache"):
        open_cache(parts[1])
    out = merge(parts, tmp_path / "parts")
    assert digests(out) == digests(tmp_path / "whole")
    assert verify(out) == []
    for part in parts:
        shutil.rmtree(part)
    assert verify(out) == []
    assert open_cache(out).states("last").shape == (160, 32)


if __name__ == "__main__":
    _model, _data, _root = sys.argv[1:]
    _driver(_model, _data, Path(_root))
