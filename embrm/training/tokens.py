"""Token rows: the sampled response positions that regularizers read, and the frozen LM head.

An adapter moves a cached state h_t by δ_t. What that does to the language model is computed from
the cached logits and the change it makes to them: the logit of a candidate token j changes by
w_j·δ_t (through logit scale and soft-capping), so at δ = 0 nothing changes, to the bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from embrm.training.states import States

TopK = int | Literal["all"] | None
"""Candidate tokens of a position beside its target: so many of the largest logits, all that the
cache holds (None), or the whole vocabulary."""

WHOLE_VOCABULARY = 1 << 15
"""Tokens of the largest vocabulary that is computed exactly: all logits of a minibatch are held."""

_NO_TAIL = 1e-6
"""Probability that float32 logits cannot tell from none."""


@dataclass(frozen=True)
class LmHead:
    """z = softcap·tanh(scale·(W h + b) / softcap), or without the softcap.

    weight: [V, d]; bias: float32 [V] or None.
    """

    weight: States
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], weight: States) -> "LmHead":
        """That of a cache: `tensors` as `Cache.lm_head` returns them, with `weight` for its own."""
        bias, softcap = tensors.get("bias"), tensors.get("softcap")
        return cls(
            weight,
            None if bias is None else bias.float(),
            float(tensors["scale"]),
            None if softcap is None else float(softcap),
        )

    def logits(self, states: Tensor) -> Tensor:
        """Of states [n, d], over the whole vocabulary: [n, V]."""
        weight = self.weight.take(torch.arange(len(self.weight.values))).to(states.dtype)
        z = torch.nn.functional.linear(states, weight, self.bias) * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def uncapped(self, z: Tensor) -> Tensor:
        """The logits before soft-capping."""
        if self.softcap is None:
            return z
        share = (z / self.softcap).clamp(-1 + 2**-23, 1 - 2**-23)
        return self.softcap * torch.atanh(share)

    def changes(self, uncapped: Tensor, moved: Tensor) -> Tensor:
        """What logits change by when w·h changes by `moved`."""
        change = moved if self.scale == 1 else moved * self.scale
        if self.softcap is None:
            return change
        before = torch.tanh(uncapped / self.softcap)
        return self.softcap * (torch.tanh((uncapped + change) / self.softcap) - before)

    def slopes(self, uncapped: Tensor) -> Tensor:
        """∂z / ∂(w·h)."""
        if self.softcap is None:
            return torch.full_like(uncapped, self.scale)
        return self.scale * (1 - torch.tanh(uncapped / self.softcap) ** 2)


@dataclass(frozen=True)
class TokenRows:
    """Token rows of a minibatch, each with C candidates: its target, the largest logits, and last
    its tail, every other token; or the whole vocabulary in its order.

    X: float32 [n, d]. response: int64 [n], which of the minibatch's m responses, ascending. share:
    float32 [n], positions of the response that a row stands for, |R|/k. S: float32 [m].
    vectors: float32 [U, d], ∂(w·h)/∂h of the tokens that are somebody's candidate; a tail's is
    ∂z/∂h, averaged over it where the cache has tail means, else 0. candidates: int64 [n, C], rows
    of `vectors`; None: they are the whole vocabulary, C = U = V. target: int64 [n], the column of
    the target. uncapped: float32 [n, C]. log_p: float32 [n, C], -inf where a candidate is void.
    """

    X: Tensor
    response: Tensor
    share: Tensor
    S: Tensor
    vectors: Tensor
    candidates: Tensor | None
    target: Tensor
    uncapped: Tensor
    log_p: Tensor
    head: LmHead

    def to(self, device: torch.device) -> "TokenRows":
        """The same, there."""
        if device.type == "cpu":
            return self
        head, bias = self.head, self.head.bias
        return replace(
            self,
            X=self.X.to(device),
            response=self.response.to(device),
            share=self.share.to(device),
            S=self.S.to(device),
            vectors=self.vectors.to(device),
            candidates=None if self.candidates is None else self.candidates.to(device),
            target=self.target.to(device),
            uncapped=self.uncapped.to(device),
            log_p=self.log_p.to(device),
            head=head if bias is None else replace(head, bias=bias.to(device)),
        )

    def changes(self, moved: Tensor) -> Tensor:
        """Changes of the candidates' logits, [n, C], when vectors·h changes by `moved`."""
        if self.candidates is None:
            return self.head.changes(self.uncapped, moved)
        candidates = self.head.changes(self.uncapped[:, :-1], moved[:, :-1])
        return torch.cat([candidates, moved[:, -1:]], 1)

    def slopes(self) -> Tensor:
        """First-order factors of `changes`, [n, C]."""
        slopes = self.head.slopes(self.uncapped)
        if self.candidates is not None:
            slopes[:, -1] = 1
        return slopes


@dataclass(frozen=True)
class TokenData:
    """The token rows of all responses, on the CPU.

    states: [N, d], after the final norm. facts: float32 [N, 3 + 2k], as `facts` makes them.
    tail_means: [N, d] or None. starts: int64 [responses + 1]: rows starts[i]:starts[i + 1] are
    those of response i. positions: int64 [responses], |R|. S: float64 [responses].
    """

    states: States
    facts: States
    tail_means: States | None
    head: LmHead
    starts: NDArray[np.int64]
    positions: NDArray[np.int64]
    S: NDArray[np.float64]

    @property
    def top_k(self) -> int:
        """Largest logits kept of a position."""
        return (self.facts.width - 3) // 2

    def sample(
        self, responses: NDArray[np.int64], rows: int | None, draws: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """At most `rows` token rows of each response [m], evenly spaced: row numbers [n], and which
        of the responses they belong to.

        draws: uniform in [0, 1), [m]: where the spacing begins, so that every row of a response is
        as likely as any other.
        """
        first = self.starts[responses]
        held = self.starts[responses + 1] - first
        taken = held if rows is None else np.minimum(held, rows)
        owner = np.repeat(np.arange(len(held)), taken)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(taken) - taken, taken)
        begin = (draws * held).astype(np.int64)[owner]
        spread = number * held[owner] // taken[owner]
        return first[owner] + (begin + spread) % held[owner], owner

    def read(
        self, responses: Tensor, *, rows: int | None, top_k: TopK, draws: NDArray[np.float64]
    ) -> TokenRows:
        """Token rows of distinct responses int64 [m]; its X, vectors: overwritten by the next."""
        own = responses.numpy()
        numbers, owner = self.sample(own, rows, draws)
        places = torch.from_numpy(numbers)
        taken = np.bincount(owner, minlength=len(own))
        share = (self.positions[own] / np.maximum(taken, 1))[owner]
        facts = self.facts.take(places)
        X = self.states.take(places)
        if top_k == "all":
            vocabulary = torch.arange(len(self.head.weight.values))
            logits = self.head.logits(X)
            log_p = logits - logits.logsumexp(1, keepdim=True)
            candidates, vectors = None, self.head.weight.take(vocabulary)
            target = facts[:, 0].contiguous().view(torch.int32).long()
        else:
            ids, logits, log_p = _truncated(facts, self.top_k, top_k)
            tails = self._tails(facts, ids.shape[1] - 1, places)
            vectors, candidates = self._vectors(ids, tails)
            target = torch.zeros(len(X), dtype=torch.int64)
        return TokenRows(
            X=X,
            response=torch.from_numpy(owner),
            share=torch.from_numpy(share.astype(np.float32)),
            S=torch.from_numpy(self.S[own].astype(np.float32)),
            vectors=vectors,
            candidates=candidates,
            target=target,
            uncapped=self.head.uncapped(logits),
            log_p=log_p,
            head=self.head,
        )

    def candidate_ids(self, rows: Tensor, top_k: TopK) -> Tensor:
        """Tokens whose vectors `read` wants for token rows int64 [n]: [n, candidates]."""
        if top_k == "all":
            return torch.arange(len(self.head.weight.values)).expand(len(rows), -1)
        k = top_k if self.tail_means is None else None
        return _truncated(self.facts.take(rows), self.top_k, k)[0]

    def let_go(self) -> None:
        """Return the pages used so far to the system."""
        for states in (self.states, self.facts, self.tail_means, self.head.weight):
            if states is not None:
                states.let_go()

    def _tails(self, facts: Tensor, k: int, places: Tensor) -> Tensor:
        """Vectors of the tails beyond the k largest logits: [n, d]; [1, d], 0, without means."""
        if self.tail_means is None:
            return torch.zeros(1, self.states.width)
        means = self.tail_means.take(places)
        if k == self.top_k:
            return means
        # The cached tail is what lies beyond all cached logits: those beyond the k join it.
        ids, logits, log_p = _truncated(facts, self.top_k, None)
        p, slopes = log_p.exp(), self.head.slopes(self.head.uncapped(logits))
        used, where = ids[:, 1 + k :].unique(return_inverse=True)
        weights = (p * slopes)[:, 1 + k : -1]
        words = self.head.weight.take(used)
        joining = embedding_bag(where, words, per_sample_weights=weights, mode="sum")
        mass = p[:, 1 + k :].sum(1, keepdim=True)
        return (joining + means * p[:, -1:]) / mass.clamp_min(_NO_TAIL)

    def _vectors(self, ids: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of tokens `ids` [n, C - 1] and of the tails, and the candidates' rows there."""
        used, where = ids.unique(return_inverse=True)
        vectors = self.head.weight.take(used, spare=len(tails))
        vectors[len(used) :] = tails
        own = torch.arange(len(tails)).expand(len(ids))[:, None]
        return vectors, torch.cat([where, len(used) + own], 1)


def facts(
    target: NDArray[np.int32],
    target_logit: NDArray[np.float32],
    logsumexp: NDArray[np.float32],
    top_ids: NDArray[np.int32],
    top_logits: NDArray[np.float32],
) -> NDArray[np.float32]:
    """What `TokenData.facts` holds of token rows; ids are int32 bits in float32 columns."""
    columns: Sequence[NDArray[np.float32]] = (
        target.view(np.float32)[:, None],
        target_logit[:, None],
        logsumexp[:, None],
        top_ids.view(np.float32),
        top_logits,
    )
    return np.concatenate(columns, axis=1)


def _truncated(facts: Tensor, held: int, wanted: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [n, C - 1], and logits and log-probabilities [n, C], with the tail as the last.

    A target that is also among the largest logits counts once.
    """
    k = held if wanted is None else wanted
    ids = torch.cat([facts[:, :1], facts[:, 3 : 3 + k]], 1).view(torch.int32).long()
    logits = torch.cat([facts[:, 1:2], facts[:, 3 + held : 3 + held + k]], 1)
    log_p = logits - facts[:, 2:3]
    void = torch.zeros_like(ids, dtype=torch.bool)
    void[:, 1:] = ids[:, 1:] == ids[:, :1]
    log_p = log_p.masked_fill(void, -torch.inf)
    tail = 1 - log_p.double().exp().sum(1, keepdim=True)
    log_tail = torch.where(tail > _NO_TAIL, tail.clamp_min(_NO_TAIL).log(), -torch.inf).float()
    none = torch.zeros_like(log_tail)
    return ids, torch.cat([logits, none], 1), torch.cat([log_p, log_tail], 1)
