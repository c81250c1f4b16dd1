"""Splits by prompt: a prompt's side depends on its id and the seed, on nothing else."""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from embrm.core.specs import Spec


class Holdout(Spec):
    """Move a fraction of a dataset's prompts, with all their rows, to another split."""

    fraction: float = Field(gt=0, lt=1)
    """Of the prompts."""
    split: str = Field(default="holdout", min_length=1)
    """Where they go."""
    seed: int = 0


def holdout(
    prompt_ids: Iterable[str], fraction: float, seed: int, purpose: str = "validation"
) -> NDArray[np.bool_]:
    """Which prompts are held out: bool [len(prompt_ids)], true for about `fraction` of the prompts.

    Equal ids get equal answers, a larger fraction holds out a superset, and neither order nor
    company matters. `purpose` separates the draws: without it, a validation split taken from what
    a holdout of the same seed left over would be empty.
    """
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
            digest = hashlib.blake2b((salt + one).encode(), digest_size=8).digest()
            draw = known[one] = int.from_bytes(digest, "big")
        answer.append(draw)
    return answer
