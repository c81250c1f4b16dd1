"""Derives preference pairs from groups: all responses to one prompt, each with a gold score."""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from embrm.core.specs import Spec
from embrm.core.streams import blake2b_number, raw_words


class PairRule(Spec):
    """How pairs are drawn from a group. The default takes every pair whose gold scores differ."""

    gap: float = Field(default=0.0, ge=0)
    """Two responses are paired only when their gold scores differ by more than this."""
    per_prompt: int | None = Field(default=None, ge=0)
    """At most this many pairs per prompt, drawn at random; 0 derives no pairs."""
    length_balanced: bool = False
    """Keep, for each prompt, as many pairs with a longer chosen response as with a shorter one (in
    characters)."""
    # Serialized only when set, so that caches written before this key existed keep their identity.
    by_rank: bool = Field(default=False, exclude_if=operator.not_)
    """Use each response in at most one pair: best against worst, second best against second worst,
    and so on."""
    seed: int = 0
    """Seed of the random choice of pairs."""


@dataclass(frozen=True)
class Member:
    """A response in a group."""

    response: int
    """Row number in the dataset's responses; equal for equal texts."""
    response_id: str
    gold: float
    length: int
    """Compared by `length_balanced`: characters, or tokens where the text is not available."""
    model: str | None
    row: int
    """The caller's row number of this member, to find its source, model and so on again."""


def pair_members(
    group: Sequence[Member], rule: PairRule, prompt_id: str, others: Sequence[Member] = ()
) -> Iterator[tuple[Member, Member, float]]:
    """Yield (chosen, rejected, difference of their gold scores) for each pair of a group.

    With `others`, the group of another prompt, only pairs between the two groups are derived. A
    response that several models gave counts once, with its mean gold score. Members are sorted by
    content first, so the pairs do not depend on their order.
    """
    distinct: dict[int, list[Member]] = {}
    for member in sorted(
        [*group, *others], key=lambda one: (one.response_id, one.model or "", one.gold)
    ):
        distinct.setdefault(member.response, []).append(member)
    firsts = [same[0] for same in distinct.values()]
    gold = [math.fsum(one.gold for one in same) / len(same) for same in distinct.values()]
    own = {one.response for one in group}
    in_group = np.array([one.response in own for one in firsts])
    allowed = in_group[:, None] != in_group[None, :] if others else None
    chosen, rejected = derive_pairs(gold, [one.length for one in firsts], rule, prompt_id, allowed)
    for better, worse in zip(chosen.tolist(), rejected.tolist(), strict=True):
        yield firsts[better], firsts[worse], gold[better] - gold[worse]


def every_pair(
    gold: NDArray[np.float64], group: NDArray[np.int64], gap: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs whose gold scores differ by more than `gap`, for many groups at once.

    Equal to `derive_pairs` for each group with a rule that sets `gap` alone. gold, group: score
    and group number of each row, [N]; the rows of a group are adjacent. Returns the row numbers
    (chosen, rejected), int64 [pairs] each.
    """
    found = [np.zeros(0, np.int64)]
    for distance in range(1, len(gold)):
        first = np.flatnonzero(group[distance:] == group[:-distance])
        if not len(first):
            break
        second = first + distance
        for better, worse in ((first, second), (second, first)):
            wins = gold[better] - gold[worse] > gap
            found.append(better[wins] * len(gold) + worse[wins])
    chosen, rejected = np.divmod(np.sort(np.concatenate(found)), max(len(gold), 1))
    return chosen, rejected


def derive_pairs(
    gold: Sequence[float],
    lengths: Sequence[int],
    rule: PairRule,
    prompt_id: str,
    allowed: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Derive the pairs of one group: positions (chosen, rejected), int64 [pairs] each.

    gold, lengths: of the members of the group, [M] each. allowed: bool [M, M], which two members
    may form a pair; None allows all. The random choice uses Philox keyed on (seed, prompt_id), so
    a group's pairs depend on that group and the rule only. `length_balanced` draws equally many
    pairs with a longer and with a shorter chosen response, and drops pairs of equal length.
    """
    scores, sizes = np.asarray(gold, dtype=np.float64), np.asarray(lengths, dtype=np.int64)
    difference = scores[:, None] - scores[None, :]
    candidates = difference > rule.gap
    if allowed is not None:
        candidates &= allowed
    if rule.by_rank:
        rank = np.argsort(np.argsort(-scores, kind="stable"), kind="stable")
        candidates &= rank[:, None] + rank[None, :] == len(scores) - 1
    chosen, rejected = np.nonzero(candidates)
    # Raw random words, because Generator.permutation may change between numpy versions.
    key = blake2b_number(f"pairs:{rule.seed}:{prompt_id}", 128)
    draws = raw_words(key).random_raw(len(chosen))
    order = np.argsort(draws, kind="stable")
    if rule.length_balanced:
        surplus = sizes[chosen[order]] - sizes[rejected[order]]
        longer, shorter = order[surplus > 0], order[surplus < 0]
        half = min(len(longer), len(shorter))
        if rule.per_prompt is not None:
            half = min(half, rule.per_prompt // 2)
        kept = np.concatenate([longer[:half], shorter[:half]])
    else:
        kept = order[: rule.per_prompt]
    kept = np.sort(kept)
    return chosen[kept], rejected[kept]
