"""A tiny cache of groups: every model answers every prompt, gold is linear in the states."""

from pathlib import Path

import numpy as np
import polars as pl
import torch

from embrm.cache.schema import ShardRows
from embrm.cache.tensors import to_stored
from embrm.cache.writer import open_writer
from embrm.core.specs import content_id
from embrm.data.collector import MEMBERS, PAIRS, pair_id_of

WIDTH = 6


def toy_groups(folder: Path, *, prompts: int = 60, models: int = 8, named: bool = True) -> Path:
    """Splits train and more (groups, the first four fifths and the rest) and ood/far (pairs).

    named: whether the members have a model.
    """
    random = np.random.default_rng(0)
    n = prompts * models
    states = torch.from_numpy(random.standard_normal((n, WIDTH)).astype(np.float32))
    gold = (states @ torch.from_numpy(random.standard_normal(WIDTH)).float()).double()
    prompt_id = [content_id(["prompt", row // models]) for row in range(n)]
    response_id = [content_id(["response", row]) for row in range(n)]
    members = pl.DataFrame(
        {
            "split": ["train" if row < 0.8 * n else "more" for row in range(n)],
            "subset": [None] * n,
            "prompt_id": prompt_id,
            "response": list(range(n)),
            "model": [f"model-{row % models}" if named else None for row in range(n)],
            "gold": gold.tolist(),
            "source": ["toy"] * n,
            "row": list(range(n)),
        },
        schema=MEMBERS,
    )
    far = list(range(0, n, 4 * models))
    pairs = pl.DataFrame(
        {
            "pair_id": [pair_id_of("ood/far", str(row), str(row + 1)) for row in far],
            "split": "ood/far",
            "prompt_id": [prompt_id[row] for row in far],
            "chosen": far,
            "rejected": [row + 1 for row in far],
            "label": 1.0,
            "weight": 1.0,
            "source": "toy",
            "row": far,
        }
    )
    pairs = pl.concat([pl.DataFrame(schema=PAIRS), pairs], how="diagonal_relaxed").cast(PAIRS)
    leaks = {"train_split": pl.String, "eval_split": pl.String, "prompt_ids": pl.List(pl.String)}
    with open_writer(
        folder,
        identity={"toy groups": [prompts, models, named]},
        environment={},
        extraction={},
        data={},
        tables={
            "pairs": pairs,
            "members": members,
            "exclusions": pl.DataFrame(schema={"row": pl.Int64}),
            "leaks": pl.DataFrame(schema=leaks),
        },
        n_responses=n,
        shard_rows=n,
        lm_head=lambda: {"scale": torch.ones(1)},
    ) as writer:
        rows = ShardRows(
            first=0,
            response_id=response_id,
            prompt_id=prompt_id,
            n_prompt=np.full(n, 5, np.int32),
            n_response=random.integers(1, 50, n).astype(np.int32),
            truncated=np.zeros(n, bool),
            final_position=np.full(n, 9, np.int32),
            final_token=np.zeros(n, np.int32),
            S=-random.random(n),
            states={"last": to_stored(states)},
            norms={"last": states.norm(dim=1).numpy()},
        )
        if 0 not in writer.done:
            writer.write_shard(0, rows, None)
        writer.finish()
    return folder
