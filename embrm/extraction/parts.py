"""Divides one extraction among several processes, each of which makes whole shards."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from embrm.cache.manifest import Part
from embrm.core.errors import UserError
from embrm.core.text import quoted


@dataclass(frozen=True)
class Share:
    """One of several processes: number `index`, counted from 0, of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Parse i/n. Raises: UserError unless 0 ≤ i < n."""
        numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        share = cls(int(numbers[1]), int(numbers[2])) if numbers else None
        if share is None or share.index >= share.count:
            raise UserError(
                f"shard (--shard) = {quoted(text)}: write i/n with i from 0 to n - 1, "
                "such as 0/4, 1/4, 2/4 and 3/4 for four processes"
            )
        return share

    def folder(self, out: Path) -> Path:
        """The folder of this part, beside the cache at `out`: cache/NAME.0-of-4."""
        return Path(f"{out}.{self.index}-of-{self.count}")

    def part(self, tokens: Sequence[int]) -> Part:
        """The shards of this part, given the number of tokens of every shard of the cache.

        The sequence of all tokens is cut into `count` stretches of equal length, and a shard
        belongs to the stretch that contains its middle. So the parts are contiguous, cover all
        shards and depend on the data only. A part has at most one shard's tokens more than an equal
        stretch. With few shards, some parts are empty.
        """
        ends = accumulate(tokens, initial=0)
        total = sum(tokens)
        owners = [
            self.count * (2 * start + size) // (2 * total)
            for start, size in zip(ends, tokens, strict=False)
        ]
        first = sum(owner < self.index for owner in owners)
        return Part(
            index=self.index,
            count=self.count,
            first=first,
            stop=first + owners.count(self.index),
        )
