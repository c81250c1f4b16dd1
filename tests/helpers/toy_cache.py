"""A tiny cache through the real writer: random states whose first direction carries the gold."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch
from dense_lm import statistics_of

from embrm.cache.schema import ShardRows, Stored, TokenRows
from embrm.cache.tensors import to_stored
from embrm.cache.writer import open_writer
from embrm.core.specs import content_id
from embrm.lm.head import LmHead

_NO_EXCLUSIONS = pl.DataFrame(schema={"row": pl.Int64})
_NO_LEAKS = pl.DataFrame(
    schema={
        "train_split": pl.String,
        "eval_split": pl.String,
        "prompt_ids": pl.List(pl.String),
    }
)


VOCABULARY, TOP_K = 40, 6
"""Tokens of the language model whose token rows a toy cache may have, and logits kept of a row."""


def toy_cache(
    folder: Path,
    *,
    prompts: int = 60,
    width: int = 12,
    seed: int = 0,
    margins: bool = True,
    token_rows: int | None = None,
    top_k: int = TOP_K,
    S: float | None = None,
    lm_head: bool = True,
    per_prompt: int = 4,
    members: Callable[[pl.DataFrame], pl.DataFrame] = lambda table: table,
) -> Path:
    """`per_prompt` responses a prompt, an even number; splits train, id and ood/far (its members
    are groups of all of a prompt's).

    token_rows: so many of every response, with tail means. S: of the first response, instead of
    its own. lm_head: whether its weights are there. members: what to make of the group members.
    """
    random = np.random.default_rng(seed)
    n = prompts * per_prompt
    states = random.standard_normal((n, width)).astype(np.float32)
    gold = states @ (random.standard_normal(width) / width**0.5)
    prompt_id = [content_id(["prompt", seed, row // per_prompt]) for row in range(n)]
    split = [
        ("train", "train", "train", "id", "ood/far")[row // per_prompt % 5] for row in range(n)
    ]
    pairs = []
    for row in range(0, n, 2):
        noisy = gold[row] - gold[row + 1] + 0.3 * random.standard_normal()
        chosen, rejected = (row, row + 1) if noisy > 0 else (row + 1, row)
        pairs.append(
            {
                "pair_id": content_id([split[row], chosen, rejected, seed]),
                "split": split[row],
                "subset": "even" if row % 8 else None,
                "prompt_id": prompt_id[row],
                "chosen": chosen,
                "rejected": rejected,
                "margin": abs(float(noisy)) if margins or row % 3 else None,
                "label": 1.0,
                "weight": 1.0,
            }
        )
    types = {"chosen": pl.Int32, "rejected": pl.Int32, "margin": pl.Float64, "subset": pl.String}
    far = [row for row in range(n) if split[row] == "ood/far"]
    listed = pl.DataFrame(
        {
            "split": ["ood/far"] * len(far),
            "subset": pl.Series([None] * len(far), dtype=pl.String),
            "prompt_id": [prompt_id[row] for row in far],
            "response": pl.Series(far, dtype=pl.Int32),
            "model": ["m"] * len(far),
            "gold": [float(gold[row]) for row in far],
        }
    )
    stored = torch.from_numpy(states).to(torch.bfloat16)
    views = {"last": stored, "mean": stored.flip(1).contiguous()}
    tables = {
        "pairs": pl.DataFrame(pairs, schema_overrides=types),
        "members": members(listed),
        "exclusions": _NO_EXCLUSIONS,
        "leaks": _NO_LEAKS,
    }
    identity = {"toy": seed, "prompts": prompts, "width": width, "margins": margins}
    head = LmHead(torch.zeros(1, width))
    if token_rows is not None:
        identity |= {"token_rows": token_rows, "top_k": top_k, "S": str(S), "lm_head": lm_head}
        weight = np.random.default_rng([seed, 1]).standard_normal((VOCABULARY, width))
        head = LmHead(torch.from_numpy(weight / width**0.5).bfloat16())
    with open_writer(
        folder,
        identity=identity,
        environment={},
        extraction={},
        data={},
        tables=tables,
        n_responses=n,
        shard_rows=n,
        lm_head=lambda: head.tensors() if lm_head else {"scale": torch.ones(1)},
    ) as writer:
        rows = ShardRows(
            first=0,
            response_id=[content_id(["response", row]) for row in range(n)],
            prompt_id=prompt_id,
            n_prompt=np.full(n, 5, np.int32),
            n_response=random.integers(1, 50, n).astype(np.int32),
            truncated=np.zeros(n, bool),
            final_position=np.full(n, 9, np.int32),
            final_token=np.zeros(n, np.int32),
            S=-random.random(n),
            states={name: to_stored(view) for name, view in views.items()},
            norms={name: view.float().norm(dim=1).numpy() for name, view in views.items()},
        )
        if S is not None:
            rows.S[0] = S
        tokens = None if token_rows is None else _token_rows(rows, head, token_rows, top_k, seed)
        if 0 not in writer.done:
            writer.write_shard(0, rows, tokens)
        writer.finish()
    return folder


def _token_rows(
    rows: ShardRows, head: LmHead, most: int, top_k: int, seed: int
) -> TokenRows[Stored]:
    """At most so many token rows of every response, of states drawn for them."""
    random = np.random.default_rng([seed, 2])
    held = np.minimum(rows.n_response, most)
    count, width = int(held.sum()), head.weight.shape[1]
    states = torch.from_numpy(random.standard_normal((count, width)) * 2).bfloat16()
    target = random.integers(0, VOCABULARY, count).astype(np.int32)
    found = statistics_of(
        LmHead(head.weight.float()),
        states.float(),
        torch.from_numpy(target).long(),
        top_k,
        tail_mean=True,
    )
    assert found.tail_mean is not None
    ends = np.cumsum(held)
    return TokenRows(
        response=np.repeat(np.arange(len(held)), held).astype(np.int32),
        position=(rows.n_prompt[0] + np.arange(count) - np.repeat(ends - held, held)).astype(
            np.int32
        ),
        target=target,
        target_logit=found.target_logit.numpy(),
        logsumexp=found.logsumexp.numpy(),
        state=to_stored(states),
        top_ids=found.top_ids.numpy(),
        top_logits=found.top_logits.numpy(),
        tail_mean=to_stored(found.tail_mean.bfloat16()),
    )
