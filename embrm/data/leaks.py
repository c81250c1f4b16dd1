"""Leaks: finds evaluation prompts that also occur in a training split."""

import json
from dataclasses import dataclass, field

import polars as pl

from embrm.data.dataset import Dataset

LEAKS: dict[str, pl.DataType] = {
    "train_split": pl.String(),
    "eval_split": pl.String(),
    "prompts_shared": pl.Int64(),
    "eval_prompts": pl.Int64(),
    "pairs_touched": pl.Int64(),
    "prompt_ids": pl.List(pl.String),
}


def is_train(split: str) -> bool:
    """Whether a split is for training: its name is "train" or begins with "train/"."""
    return split == "train" or split.startswith("train/")


def leaks(dataset: Dataset) -> pl.DataFrame:
    """List overlaps of training and evaluation prompts: one row per (train, eval) split with any.

    Columns: train_split, eval_split, prompts_shared (evaluation prompts that occur in training),
    eval_prompts (all prompts of the evaluation split), pairs_touched (evaluation pairs on shared
    prompts), prompt_ids (the shared evaluation prompts, sorted; evaluation can leave them out).

    Prompts are compared by their user turns, ignoring case, whitespace and whether they are text or
    chat. A single-turn prompt matches an equal one, and a dialogue whose last user turn equals it.
    Two dialogues match only when all their user turns do, because a common last turn such as "why?"
    would be a false alarm.
    """
    prompts = {
        prompt_id: _user_turns(kind, prompt)
        for prompt_id, kind, prompt in dataset.responses.select("prompt_id", "kind", "prompt")
        .unique("prompt_id", keep="first", maintain_order=True)
        .iter_rows()
    }
    uses = pl.concat(
        [dataset.pairs.select("split", "prompt_id"), dataset.members.select("split", "prompt_id")]
    ).unique()
    splits: dict[str, list[str]] = {}
    for split, prompt_id in uses.sort("split", "prompt_id").iter_rows():
        splits.setdefault(split, []).append(prompt_id)
    found = []
    for train, trained in splits.items():
        if not is_train(train):
            continue
        seen = _Seen()
        for prompt_id in trained:
            seen.add(prompts[prompt_id])
        for split, asked in splits.items():
            shared = [] if is_train(split) else [x for x in asked if prompts[x] in seen]
            if shared:
                touched = dataset.pairs.filter(
                    (pl.col("split") == split) & pl.col("prompt_id").is_in(shared)
                ).height
                found.append((train, split, len(shared), len(asked), touched, shared))
    return pl.DataFrame(found, schema=LEAKS, orient="row")


@dataclass
class _Seen:
    """The user turns of a training split's prompts; `turns in seen` tells whether they match."""

    whole: set[tuple[str, ...]] = field(default_factory=set)
    last: set[str] = field(default_factory=set)

    def add(self, turns: tuple[str, ...]) -> None:
        self.whole.add(turns)
        self.last.add(turns[-1])

    def __contains__(self, turns: tuple[str, ...]) -> bool:
        if turns in self.whole or turns[-1:] in self.whole:
            return True
        return len(turns) == 1 and turns[0] in self.last


def _user_turns(kind: str, prompt: str) -> tuple[str, ...]:
    """The normalised user turns of a prompt; a text prompt counts as one turn."""
    if kind == "text":
        return (_normalised(prompt),)
    turns = [turn["content"] for turn in json.loads(prompt) if turn["role"] == "user"]
    return tuple(map(_normalised, turns)) or (_normalised(prompt),)


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold()
