"""Kendall's τ-b between rewards and gold scores within groups: all responses of one prompt."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_BATCHED = 128
"""Largest group whose members are compared pair by pair, with at most 64 bytes of stored signs per
response. Larger groups go to scipy."""

_CELLS = 1 << 16
"""Number of comparisons in a batch, small enough for the processor's cache."""


@dataclass(frozen=True, eq=False)
class _Batch:
    """Groups of equal size, with the signs of all pairwise differences in gold."""

    groups: Indices  # [groups]
    members: Indices  # [size, groups]
    first: Indices  # [comparisons], rows of members
    second: Indices  # [comparisons]
    signs: NDArray[np.int8]  # [comparisons, groups], signs of the differences in gold
    decided: Indices  # [groups], number of comparisons in which gold does not tie

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
    """The order of gold within groups, prepared once to compare the rewards of many runs with."""

    count: int
    batches: tuple[_Batch, ...]
    large: tuple[tuple[int, Indices, Floats], ...]
    """Groups with more than `_BATCHED` members: number, members, gold."""

    @classmethod
    def of(cls, responses: Indices, gold: Floats, groups: Indices, count: int) -> Self:
        """Prepare groups.

        responses: int64 [n], numbers of the members. gold: float64 [n], their gold scores. groups:
        int64 [n], the numbers of their groups, 0 ≤ group < count.
        """
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
        """Kendall's τ-b of every group: float64 [count].

        rewards: float64 [responses], of all responses.

        τ-b = Σ s·t / √(Σ s² · Σ t²) over the pairs of responses of a group, where s and t are the
        signs of the pair's differences in reward and in gold (Kendall 1945). NaN where undefined:
        with fewer than two responses, or all rewards or all gold scores equal.
        """
        taus = np.full(self.count, np.nan)
        for batch in self.batches:
            taus[batch.groups] = batch.taus(rewards)
        if self.large:
            from scipy.stats import kendalltau  # slow to load, and large groups are rare
        for group, members, gold in self.large:
            # The method concerns the p value only, which is not used; this one is fast.
            taus[group] = kendalltau(rewards[members], gold, method="asymptotic").statistic
        return taus
