"""Splits by prompt: holdouts and folds that depend on each prompt's id and the seed only."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from embrm.core.specs import Spec
from embrm.core.streams import blake2b_number


class Holdout(Spec):
    """Move a fraction of a dataset's prompts, with all their rows, to another split."""

    fraction: float = Field(gt=0, lt=1)
    """Share of the prompts to move."""
    split: str = Field(default="holdout", min_length=1)
    """The split to move them to."""
    seed: int = 0
    """Seed of the choice of prompts."""


def holdout(
    prompt_ids: Iterable[str], fraction: float, seed: int, purpose: str = "validation"
) -> NDArray[np.bool_]:
    """Choose the prompts to hold out: bool [N], true for about `fraction` of N distinct prompts.

    Whether a prompt is held out depends on its id, `fraction`, `seed` and `purpose`, not on the
    other prompts or their order. A larger fraction holds out a superset. `purpose` makes choices
    independent: without it, a validation split drawn with the same seed from the prompts that a
    holdout left over would be empty.
    """
    bound = int(fraction * 2**64)
    drawn = draws(prompt_ids, seed, purpose)
    return np.array([draw < bound for draw in drawn], dtype=np.bool_)


def folds(prompt_ids: Iterable[str], count: int, seed: int = 0) -> NDArray[np.int64]:
    """The fold of each prompt, int64 [N] in 0..count-1, which depends on its id, `count` and `seed`
    only."""
    drawn = draws(prompt_ids, seed, f"fold of {count}")
    return np.array([draw * count >> 64 for draw in drawn], dtype=np.int64)


def draws(ids: Iterable[str], seed: int, purpose: str) -> list[int]:
    """A pseudo-random 64-bit integer for each id: BLAKE2b of purpose, seed and id."""
    salt = f"{purpose}:{seed}:"
    known: dict[str, int] = {}
    answer = []
    for one in ids:
        draw = known.get(one)
        if draw is None:
            draw = known[one] = blake2b_number(salt + one, 64)
        answer.append(draw)
    return answer
