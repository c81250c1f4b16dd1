"""Random numbers that depend on what they are for, and on nothing else."""

import hashlib

import numpy as np


def stream(seed: int, *stage: str | int) -> np.random.Generator:
    """Random numbers of one stage: a Philox stream keyed by the seed and the stage's name.

    Nothing depends on the order in which runs or stages execute. Runs of one seed share their
    streams (common random numbers), so that differences between objectives are less noisy.
    """
    name = "/".join(map(str, (seed, *stage)))
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
