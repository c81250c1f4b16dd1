"""Twenty SIGKILLs at random moments of extract and of sweep: nothing lost, same bytes.

A driver process imports what the stage needs once, then forks the stage again and again, kills
each fork after a random time, and lets the last one finish. What a kill may lose is the shard or
pack in work, never a finished one: the driver reports how many each fork found and left.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from extract_models import save_model, tokenizer
from toy_cache import toy_cache

KILLS = 20

SWEEP = """
baseline = "bt[lr=0.001]"
seeds = [0, 1, 2]
validation = 0.2
[defaults]
epochs = 3
batch_pairs = 16
[[runs]]
name = "bt"
grid = { lr = [0.001, 0.002, 0.003, 0.01], weight_decay = [0.0, 0.1] }
[[runs]]
name = "bsr"
grid = { bsr = [0.0001, 0.001, 0.01, 0.1], loss = ["bt", "hinge", "logitnorm"] }
[[runs]]
name = "mlp"
head = { kind = "mlp", widths = [8] }
grid = { lr = [0.001, 0.003], bsr = [0.0, 0.01] }
"""
SWEEP = SWEEP.replace('baseline = "bt[lr=0.001]"', 'baseline = "bt[lr=0.001,weight_decay=0]"')


def _extract(model: str, data: str, out: Path) -> None:
    from embrm.extract.run import ExtractSpec, extract

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
    from embrm.sweep.execute import sweep

    sweep(Path(spec), Path(cache), jobs=2, out=out)


def _finished(stage: str, out: Path) -> int:
    if stage == "sweep":
        return len(list(out.glob("parts/*/ledger.parquet")))
    manifest = out / "manifest.json"
    shards = json.loads(manifest.read_bytes())["shards"] if manifest.exists() else []
    return sum(shard is not None for shard in shards)


def _drive(stage: str, first: str, second: str, out: Path, kills: int) -> None:
    """Run the stage, killed `kills` times on the way; print what was finished after each."""
    run: Callable[[str, str, Path], None] = _extract if stage == "extract" else _sweep
    moments = random.Random(7)
    killed = 0
    longest = 0.4
    while True:
        child = os.fork()
        if child == 0:
            os.setsid()
            run(first, second, out)
            os._exit(0)
        if killed < kills:
            time.sleep(moments.uniform(0.0, longest))
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if killed == kills:
            sys.exit(status)
        if status:  # killed before its end
            killed += 1
            print(_finished(stage, out), flush=True)
            # As the work shrinks, later moments must still come: start-up takes a while.
            longest = min(longest * 1.15, 4.0)
        else:
            killed = kills  # it got through; the remaining moments never came
            print("done", flush=True)


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
    progress = {}
    for name, kills in (("killed", KILLS), ("whole", 0)):
        done = subprocess.run(
            [sys.executable, __file__, stage, *arguments, str(tmp_path / name), str(kills)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        progress[name] = done.stdout.split()
    counts = progress["killed"]
    assert len(counts) == KILLS, counts
    assert "done" not in counts, "the stage finished before the last kill: give it more work"
    numbers = [int(count) for count in counts]
    assert numbers == sorted(numbers), f"a kill lost finished work: {numbers}"
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "whole")


if __name__ == "__main__":
    _stage, _first, _second, _out, _kills = sys.argv[1:]
    if _stage == "extract":
        import embrm.extract.run
    import embrm.sweep.execute  # noqa: F401

    _drive(_stage, _first, _second, Path(_out), int(_kills))
