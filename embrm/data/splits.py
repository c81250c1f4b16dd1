"""Splits by prompt: a prompt's side depends on its id and the seed, on nothing else."""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from embrm.specs import Spec


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
    salt = f"{purpose}:{seed}:"
    bound = int(fraction * 2**64)
    sides: dict[str, bool] = {}
    answer = []
    for prompt_id in prompt_ids:
        side = sides.get(prompt_id)
        if side is None:
            draw = hashlib.blake2b((salt + prompt_id).encode(), digest_size=8).digest()
            side = sides[prompt_id] = int.from_bytes(draw, "big") < bound
        answer.append(side)
    return np.array(answer, dtype=np.bool_)
