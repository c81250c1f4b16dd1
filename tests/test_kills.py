"""Twenty SIGKILLs at random moments of extract and of sweep: nothing lost, same bytes.

A driver process imports what the stage needs once, then forks the stage again and again, kills
each fork after a random time, and lets the last one finish. What a kill may lose is the shard or
pack in work, never a finished one: the driver reports how many each fork found and left.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from extract_models import save_model, tokenizer
from toy_cache import toy_cache

KILLS = 20

RUNS = 300
SWEEP = """
baseline = "bt[lr=0.001,weight_decay=0,batch_pairs=16]"
seeds = [0, 1, 2, 3, 4]
validation = 0.2
[defaults]
epochs = 4
batch_pairs = 16
[[runs]]
name = "bt"
grid = { lr = [0.001, 0.002, 0.003, 0.01], weight_decay = [0.0, 0.1], batch_pairs = [16, 24] }
[[runs]]
name = "bsr"
[runs.grid]
bsr = [0.0001, 0.001, 0.01, 0.1]
loss = ["bt", "hinge", "logitnorm"]
preprocess = ["none", "standardize"]
[[runs]]
name = "mlp"
head = { kind = "mlp", widths = [8] }
patience = 2
grid = { lr = [0.001, 0.003, 0.01, 0.03, 0.1], bsr = [0.0, 0.001, 0.01, 0.1] }
"""


def _extract(model: str, data: str, out: Path) -> None:
    from embrm.extraction.run import extract
    from embrm.extraction.spec import ExtractSpec

    spec = ExtractSpec.parse(
        {
            "model": model,
            "data": [{"path": data, "split": "train"}],
            "max_length": 128,
            "token_rows": 2,
            "top_k": 4,
        },
        "test",
    )
    extract(spec, out, device="cpu", batch_tokens=256, shard_rows=16)


def _sweep(spec: str, cache: str, out: Path) -> None:
    from embrm.sweeps.execute import sweep

    sweep(Path(spec), Path(cache), jobs=2, out=out)


def _finished(stage: str, out: Path) -> int:
    if stage == "sweep":
        return len(list(out.glob("parts/*/ledger.parquet")))
    manifest = out / "manifest.json"
    shards = json.loads(manifest.read_bytes())["shards"] if manifest.exists() else []
    return sum(shard is not None for shard in shards)


def _fork(stage: str, first: str, second: str, out: Path) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        (_extract if stage == "extract" else _sweep)(first, second, out)
        os._exit(0)
    return child


def _drive(stage: str, first: str, second: str, folder: Path) -> None:
    """Run the stage whole, then killed at random moments; print what was finished after each.

    The moments are uniform over the time a run takes. Where a fork gets through, "again"
    is printed and a new folder begun. The last one is left to finish.
    """
    start = time.monotonic()
    _, status = os.waitpid(_fork(stage, first, second, folder / "whole"), 0)
    seconds = time.monotonic() - start
    if status:
        sys.exit(1)
    moments, killed, out = random.Random(7), 0, folder / "killed"
    while killed < KILLS:
        child = _fork(stage, first, second, out)
        start = time.monotonic()
        moment = start + moments.uniform(0.01, seconds)
        ended = 0
        while not ended and time.monotonic() < moment:
            time.sleep(0.01)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            print(_finished(stage, out), flush=True)
        elif status:
            sys.exit(1)
        else:
            seconds = min(seconds, time.monotonic() - start)
            shutil.rmtree(out)
            print("again", flush=True)
    _, status = os.waitpid(_fork(stage, first, second, out), 0)
    sys.exit(bool(status))


def _contents(folder: Path) -> dict[str, bytes]:
    contents = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in (".lock", "timings.parquet")
        # Which runs shared a part depends on the kills; the tables made of the parts do not.
        and "parts" not in path.relative_to(folder).parts
    }
    if "sweep.json" in contents:
        header = json.loads(contents["sweep.json"])
        del header["environment"]  # the git revision
        contents["sweep.json"] = json.dumps(header).encode()
    return contents


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["extract", "sweep"])
def test_twenty_kills_lose_nothing_and_leave_the_same_bytes(stage: str, tmp_path: Path) -> None:
    if stage == "extract":
        save_model(tmp_path / "model", "llama-tied", tokenizer())
        rows = [
            {
                "prompt": f"river {i}?",
                "chosen": f"a boat {i} " * (1 + i % 9),
                "rejected": f"mud {i}",
            }
            for i in range(400)
        ]
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = [str(tmp_path / "model"), str(data)]
    else:
        (tmp_path / "sweep.toml").write_text(SWEEP)
        toy_cache(tmp_path / "cache", prompts=120)
        arguments = [str(tmp_path / "sweep.toml"), str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, __file__, stage, *arguments, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [[int(count) for count in part.split()] for part in done.stdout.split("again")]
    assert sum(map(len, counts)) == KILLS
    for part in counts:
        assert part == sorted(part), f"a kill lost finished work: {counts}"

    assert max(map(max, filter(None, counts))) > 0, f"no kill came in the middle: {counts}"
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "whole")
    if stage == "sweep":
        assert pl.read_parquet(tmp_path / "killed" / "ledger.parquet").height == RUNS


if __name__ == "__main__":
    _stage, _first, _second, _folder = sys.argv[1:]
    if _stage == "extract":
        import embrm.extraction.run
    import embrm.sweeps.execute  # noqa: F401

    _drive(_stage, _first, _second, Path(_folder))
