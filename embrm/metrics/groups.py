"""Rank agreement inside groups: all responses of one prompt, each with a gold score."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_BATCHED = 128
"""Members up to which every two are compared: at most 64 bytes of gold signs a response."""

_CELLS = 1 << 16
"""Comparisons made at once, so that they stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class _Batch:
    """Groups of equal size, every two members of which are compared."""

    groups: Indices  # [groups]
    members: Indices  # [size, groups]
    first: Indices  # [comparisons], rows of members
    second: Indices  # [comparisons]
    signs: NDArray[np.int8]  # [comparisons, groups], of the differences in gold
    decided: Indices  # [groups], comparisons that gold decides

    def taus(self, rewards: Floats) -> Floats:
        values = rewards[self.members]
        first, second = values[self.first], values[self.second]
        signs = np.subtract(first > second, first < second, dtype=np.int8)
        agreement = np.add.reduce(signs * self.signs, axis=0, dtype=np.int64)
        decided = np.count_nonzero(signs, axis=0) * self.decided
        with np.errstate(invalid="ignore"):
            return agreement / np.sqrt(decided)


@dataclass(frozen=True, eq=False)
class Rankings:
    """The gold order inside groups, against which any number of rewards is compared."""

    count: int
    batches: tuple[_Batch, ...]
    large: tuple[tuple[int, Indices, Floats], ...]
    """Groups too large to compare every two: number, members, gold."""

    @classmethod
    def of(cls, responses: Indices, gold: Floats, groups: Indices, count: int) -> Self:
        """Responses int64 [n], each with its gold score float64 [n] and the number of its group
        int64 [n], 0 ≤ group < count."""
        order = np.argsort(groups, kind="stable")
        sizes = np.bincount(groups, minlength=count)
        starts = np.cumsum(sizes) - sizes
        batches = []
        for size in np.unique(sizes[(sizes > 1) & (sizes <= _BATCHED)]):
            first, second = np.triu_indices(size, k=1)
            equal = np.flatnonzero(sizes == size)
            at_once = max(1, _CELLS // len(first))
            for own in (equal[i : i + at_once] for i in range(0, len(equal), at_once)):
                rows = order[starts[own] + np.arange(size)[:, None]]
                values = gold[rows]
                signs = np.sign(values[first] - values[second]).astype(np.int8)
                decided = np.count_nonzero(signs, axis=0)
                batches.append(_Batch(own, responses[rows], first, second, signs, decided))
        large = []
        for group in np.flatnonzero(sizes > _BATCHED):
            rows = order[starts[group] : starts[group] + sizes[group]]
            large.append((int(group), responses[rows], gold[rows]))
        return cls(count, tuple(batches), tuple(large))

    def taus(self, rewards: Floats) -> Floats:
        """Kendall's τ-b of every group: float64 [count]; `rewards` float64 of all responses.

        τ-b = Σ s·t / √(Σ s² · Σ t²) over every two responses of a group, with s and t the signs
        of their differences in reward and gold: the cosine between the two (Kendall 1945). NaN
        where it is undefined: fewer than two responses, or one side constant.
        """
        taus = np.full(self.count, np.nan)
        for batch in self.batches:
            taus[batch.groups] = batch.taus(rewards)
        if self.large:
            from scipy.stats import kendalltau  # slow to load, and large groups are rare
        for group, members, gold in self.large:
            # Not method="auto": only the p value differs, and nobody asks for it.
            taus[group] = kendalltau(rewards[members], gold, method="asymptotic").statistic
        return taus
