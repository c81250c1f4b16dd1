"""Random numbers that depend on what they are for, and on nothing else.

The random numbers behind a cache, a sweep and its intervals come from a counter-based Philox
generator whose key is made from a name: the seed, the stage, and the id of what is drawn for. So
no result depends on the order in which runs, stages or prompts are processed, and equal names give
equal numbers, which makes differences between runs of one seed less noisy (common random numbers).
Two things draw from torch's own generator, seeded with the run's seed: the LoRA matrices of a
fine-tune, which peft initialises, and the training of the demo's language model and policy.

The functions differ in how a name becomes a key, because stored caches and ledgers hold results of
each: new code uses `stream`.
"""

import hashlib
from typing import Literal

from numpy.random import Generator, Philox


def stream(seed: int, *stage: str | int) -> Generator:
    """The generator of one stage, keyed by SHA-256 of "seed/stage/...", such as "0/order/3"."""
    return generator(sha256_key("/".join(map(str, (seed, *stage))), "little"))


def generator(key: int) -> Generator:
    """A generator of any distribution. Its draws may change with numpy's major versions."""
    return Generator(Philox(key=key))


def raw_words(key: int) -> Philox:
    """A generator of raw 64-bit words, which are the same in every version of numpy."""
    return Philox(key=key)


def sha256_key(name: str, order: Literal["little", "big"]) -> int:
    """The first 128 bits of SHA-256 of a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], order)


def blake2b_number(
    name: str, bits: int, order: Literal["little", "big"] = "big", person: bytes = b""
) -> int:
    """BLAKE2b of a name as a number of so many bits: a 128-bit key, or a 64-bit draw by itself.

    person: separates the numbers of one use from those of another.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=bits // 8, person=person).digest()
    return int.from_bytes(digest, order)
