"""Splits by prompt: a prompt's side depends on its id and the seed, on nothing else."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from embrm.core.specs import Spec
from embrm.core.streams import blake2b_number


class Holdout(Spec):
    """Move a fraction of a dataset's prompts, with all their rows, to another split."""

    fraction: float = Field(gt=0, lt=1)
    """Share of the prompts that is moved."""
    split: str = Field(default="holdout", min_length=1)
    """The split that they are moved to."""
    seed: int = 0
    """Seed of the choice of prompts."""


def holdout(
    prompt_ids: Iterable[str], fraction: float, seed: int, purpose: str = "validation"
) -> NDArray[np.bool_]:
    """Which prompts are held out: bool [len(prompt_ids)], true for about `fraction` of the prompts.

    Equal ids get equal answers, a larger fraction holds out a superset, and the answer for a prompt
    depends neither on the order nor on the other prompts. `purpose` separates the draws: without
    it, a validation split taken from what a holdout of the same seed left over would be empty."""
    bound = int(fraction * 2**64)
    drawn = draws(prompt_ids, seed, purpose)
    return np.array([draw < bound for draw in drawn], dtype=np.bool_)


def folds(prompt_ids: Iterable[str], count: int) -> NDArray[np.int64]:
    """The fold of each prompt, int64 [len(prompt_ids)], from its id and `count` alone."""
    drawn = draws(prompt_ids, 0, f"fold of {count}")
    return np.array([draw * count >> 64 for draw in drawn], dtype=np.int64)


def draws(ids: Iterable[str], seed: int, purpose: str) -> list[int]:
    """A number of 64 bits for each id, from the id, the seed and the purpose alone."""
    salt = f"{purpose}:{seed}:"
    known: dict[str, int] = {}
    answer = []
    for one in ids:
        draw = known.get(one)
        if draw is None:
            draw = known[one] = blake2b_number(salt + one, 64)
        answer.append(draw)
    return answer
