"""Finds the positions whose states predict response tokens, and samples them for token rows."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embrm.core.streams import raw_words, sha256_key

PositionsRule = Literal["random", "spaced"]
"""How token rows are sampled: see `token_positions`."""


def predicting_positions(n_prompt: int, length: int) -> range:
    """Positions whose states predict the response tokens: n_prompt - 1 to length - 2, inclusive.

    With n_prompt = 0 (no BOS and no prompt token), no state predicts the first token of the
    response, which is then left out of S and of the token rows.
    """
    return range(max(n_prompt - 1, 0), length - 1)


def token_positions(
    response_id: str,
    n_prompt: int,
    length: int,
    k: int,
    seed: int,
    rule: PositionsRule = "random",
) -> NDArray[np.int32]:
    """Sample k of a response's predicting positions, int32 and sorted; all if there are fewer.

    The sample depends on seed and response id only (they key a Philox stream), not on the order of
    extraction. "random": without replacement, the positions of the k smallest raw 64-bit
    draws. "spaced": evenly spaced from a random start (systematic sampling); every position is
    equally likely, as under "random", and a mean over the sample varies less where neighbouring
    positions are alike.
    """
    candidates = predicting_positions(n_prompt, length)
    n = len(candidates)
    stream = raw_words(sha256_key(f"{seed}:{response_id}", "big"))
    if rule == "spaced" and n > k > 0:
        # start + n·i runs through every number below n·k once over the n starts and k values of i,
        # and k of these numbers fall on each position: all positions are equally likely.
        start = int(stream.random_raw()) * n >> 64
        chosen = (start + n * np.arange(k)) // k
    else:
        chosen = np.sort(np.argsort(stream.random_raw(n), kind="stable")[:k])
    return (candidates.start + chosen).astype(np.int32)
