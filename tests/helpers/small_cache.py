"""A small cache with everything in it; run as a program, it writes one, to be killed meanwhile."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from embrm.cache.schema import ShardRows, Stored, TokenRows
from embrm.cache.tensors import to_stored
from embrm.cache.writer import CacheWriter, open_writer

RESPONSES, SHARD_ROWS, WIDTH, TOP_K = 23, 5, 6, 3
IDENTITY = {"model": {"revision": "r1"}, "dtype": "float32", "max_tokens": 512, "views": ["last"]}
ENVIRONMENT = {"engine": "test", "device": "cpu"}


def tables() -> dict[str, pl.DataFrame]:
    index = pl.Series(range(0, RESPONSES - 1, 2), dtype=pl.Int32)
    return {
        "pairs": pl.DataFrame(
            {
                "pair_id": [f"pair-{i}" for i in index],
                "split": ["train"] * 6 + ["ood"] * (len(index) - 6),
                "subset": [None] * len(index),
                "chosen": index,
                "rejected": index + 1,
                "margin": [float("nan"), None, *([0.5] * (len(index) - 2))],
            },
            schema_overrides={"subset": pl.String},
        ),
        "members": pl.DataFrame(
            {"split": ["groups"] * 4, "response": [0, 1, 2, 22], "gold": [0.1, -2.0, 3.5, 0.0]},
            schema_overrides={"response": pl.Int32},
        ),
        "exclusions": pl.DataFrame({"source": ["a.jsonl"], "row": [7], "reason": ["identical"]}),
        "leaks": pl.DataFrame(schema={"train_split": pl.String, "prompts_shared": pl.Int64}),
    }


def lm_head() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(8 * WIDTH, dtype=torch.float32).reshape(8, WIDTH)}


def shard(index: int, dtype: str = "float32") -> tuple[ShardRows, TokenRows[Stored]]:
    first = index * SHARD_ROWS
    n = min(SHARD_ROWS, RESPONSES - first)
    random = np.random.default_rng(index)
    states = torch.from_numpy(random.standard_normal((n, WIDTH)).astype(np.float32))
    counts = random.integers(1, 100, (4, n), dtype=np.int32)

    def stored(values: torch.Tensor) -> Stored:
        return to_stored(values.to(getattr(torch, dtype)))

    rows = ShardRows(
        first=first,
        response_id=[f"{first + row:016x}" for row in range(n)],
        prompt_id=[f"prompt-{(first + row) // 2}" for row in range(n)],
        n_prompt=counts[0],
        n_response=counts[1],
        truncated=counts[2] > 50,
        final_position=counts[0] + counts[1] - 1,
        final_token=counts[3],
        S=-random.exponential(size=n),
        states={
            "last": stored(states),
            "mean": stored(states / 2),
            "layer:1": stored(-states),
        },
        norms={
            "last": states.norm(dim=1).numpy(),
            "mean": (states.norm(dim=1) / 2).numpy(),
            "layer:1": states.norm(dim=1).numpy(),
        },
    )
    m = 0 if index == 1 else n  # one shard without token rows
    tokens = TokenRows(
        response=np.arange(first, first + m, dtype=np.int32),
        position=counts[0][:m],
        target=counts[1][:m],
        target_logit=random.standard_normal(m).astype(np.float32),
        logsumexp=random.standard_normal(m).astype(np.float32),
        state=stored(states[:m] * 3),
        top_ids=random.integers(0, 8, (m, TOP_K), dtype=np.int32),
        top_logits=random.standard_normal((m, TOP_K)).astype(np.float32),
        tail_mean=stored(states[:m] / 7),
    )
    return rows, tokens


def opened(folder: Path, **changes: Any) -> Any:
    """`open_writer` with the settings above, some of them changed."""
    settings: dict[str, Any] = {
        "identity": IDENTITY,
        "environment": ENVIRONMENT,
        "extraction": {"model": "tiny"},
        "data": {"splits": {"train": {"pairs": 6}}},
        "tables": tables(),
        "n_responses": RESPONSES,
        "shard_rows": SHARD_ROWS,
        "lm_head": lm_head,
    }
    return open_writer(folder, **(settings | changes))


def write_missing(writer: CacheWriter, dtype: str = "float32") -> None:
    for index in range(writer.n_shards):
        if index not in writer.done:
            writer.write_shard(index, *shard(index, dtype))
    writer.finish()


def write_cache(folder: Path, dtype: str = "float32", **changes: Any) -> None:
    with opened(folder, **changes) as writer:
        write_missing(writer, dtype)


def digests(folder: Path) -> dict[str, str]:
    """Path below the folder → digest, for every file but the lock."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


if __name__ == "__main__":
    print("ready", flush=True)
    write_cache(Path(sys.argv[1]))
    print("finished", flush=True)
