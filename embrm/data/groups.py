"""Pairs derived from a group: all responses of one prompt, each with a gold score."""

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
    """At most this many pairs a prompt, drawn at random; none of them when 0."""
    length_balanced: bool = False
    """The longer response (in characters) is chosen in exactly half of a prompt's pairs."""
    # Recorded only where it is set: older caches keep their bytes.
    by_rank: bool = Field(default=False, exclude_if=operator.not_)
    """A response is in one pair: the best against the worst, the second best against the second
    worst, and so on."""
    seed: int = 0


@dataclass(frozen=True)
class Member:
    """A response in a group."""

    response: int
    """Its number, the same for equal responses."""
    response_id: str
    gold: float
    length: int
    """What `length_balanced` compares: characters, or tokens where there is no text."""
    model: str | None
    row: int
    """Where it stands in the table of its group."""


def pair_members(
    group: Sequence[Member], rule: PairRule, prompt_id: str, others: Sequence[Member] = ()
) -> Iterator[tuple[Member, Member, float]]:
    """(chosen, rejected, difference of their gold scores) of every pair of a group; with `others`,
    the group of another prompt, of every pair between the two.

    A response given by several models counts once, with its mean gold score. Sorting by content
    makes the pairs independent of the order of the members.
    """
    distinct: dict[int, list[Member]] = {}
    for member in sorted(
        [*group, *others], key=lambda one: (one.response_id, one.model or "", one.gold)
    ):
        distinct.setdefault(member.response, []).append(member)
    firsts = [same[0] for same in distinct.values()]
    gold = [math.fsum(one.gold for one in same) / len(same) for same in distinct.values()]
    own = {one.response for one in group}
    side = np.array([one.response in own for one in firsts])
    allowed = side[:, None] != side[None, :] if others else None
    ends = derive_pairs(gold, [one.length for one in firsts], rule, prompt_id, allowed)
    for better, worse in zip(*(side.tolist() for side in ends), strict=True):
        yield firsts[better], firsts[worse], gold[better] - gold[worse]


def every_pair(
    gold: NDArray[np.float64], group: NDArray[np.int64], gap: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What `derive_pairs` gives under a rule of `gap` alone, for many groups at once.

    gold, group: of every row, those of a group one after another. Returns rows (chosen, rejected),
    int64 [pairs].
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
    """Positions (chosen, rejected), int64 [pairs], in a group with `gold` scores and `lengths`.

    Random numbers come from Philox keyed on (seed, prompt_id): a group's pairs depend on that
    group and the rule alone. Under `length_balanced` the side with more candidates gives up its
    surplus, and pairs of equal length, which are on neither side, are left out.
    allowed: bool [members, members], which two may be a pair; None: any.
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
    # Raw words, because Generator.permutation may change with numpy's versions.
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
