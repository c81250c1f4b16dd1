"""Token rows: the sampled response positions that regularizers read, and the frozen LM head.

An adapter shifts a cached state h_t by δ_t. The effect on the language model is computed from the
cached logits and their change: the logit of a candidate token j changes by w_j·δ_t (through logit
scale and soft-capping), so that δ = 0 changes nothing, exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from embrm.lm.head import NO_TAIL, LmHead
from embrm.training.row_store import RowStore

TopK = int | Literal["all"] | None
"""Candidate tokens of a token row beside its target: this many of the largest logits, all that the
cache holds (None), or the whole vocabulary ("all")."""


@dataclass(frozen=True)
class TokenBatch:
    """Token rows of some or all of the m responses of a minibatch, each with C candidate tokens.

    The candidates are the target, the largest logits, and in the last column the tail, which stands
    for every other token; or the whole vocabulary in its own order.

    X: float32 [n, d], states. response: int64 [n], index of the response in the minibatch,
    ascending. share: float32 [n], how many of its response's positions a row stands for, |R|/k.
    S: float32 [m], log-probability of the responses. vectors: float32 [U, d], ∂(w·h)/∂h of every
    token that is a candidate of some row; that of a tail is ∂z/∂h averaged over it where the cache
    has tail means, else 0. candidates: int64 [n, C], rows of `vectors`; None: the candidates are
    the whole vocabulary, C = U = V. target: int64 [n], column of the target. uncapped: float32
    [n, C], logits before soft-capping. log_p: float32 [n, C], -inf for a column without a token.
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

    def to(self, device: torch.device) -> "TokenBatch":
        """A copy on the device; of the head, only scale and softcap are read there."""
        if device.type == "cpu":
            return self
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
        )

    def changes(self, moved: Tensor) -> Tensor:
        """How much the candidates' logits change, [n, C], when vectors·h changes by `moved`."""
        if self.candidates is None:
            return self.head.changes(self.uncapped, moved)
        candidates = self.head.changes(self.uncapped[:, :-1], moved[:, :-1])
        return torch.cat([candidates, moved[:, -1:]], 1)

    def slopes(self) -> Tensor:
        """Derivatives of `changes` at moved = 0, [n, C]."""
        slopes = self.head.slopes_of_uncapped(self.uncapped)
        if self.candidates is not None:
            slopes[:, -1] = 1
        return slopes


@dataclass(frozen=True)
class PackedLogits:
    """Targets and largest logits of n token rows in one matrix, so that a row is read in one piece.

    matrix: float32 [n, 3 + 2K], K the number of largest logits. Columns: target, target_logit,
    logsumexp, K top_ids, K top_logits. Token ids are int32 whose bits are stored as float32.

    The methods read only the k ≤ K largest logits. The candidates of a row are its target, the k
    largest, and the tail, which stands for all other tokens.
    """

    matrix: Tensor

    @classmethod
    def pack(
        cls,
        target: NDArray[np.int32],
        target_logit: NDArray[np.float32],
        logsumexp: NDArray[np.float32],
        top_ids: NDArray[np.int32],
        top_logits: NDArray[np.float32],
    ) -> "PackedLogits":
        """Pack the columns of token rows: three [n] and two [n, K]."""
        columns: Sequence[NDArray[np.float32]] = (
            target.view(np.float32)[:, None],
            target_logit[:, None],
            logsumexp[:, None],
            top_ids.view(np.float32),
            top_logits,
        )
        return cls(torch.from_numpy(np.concatenate(columns, axis=1)))

    @staticmethod
    def width(top_k: int) -> int:
        """Columns of a matrix with `top_k` largest logits."""
        return 3 + 2 * top_k

    @property
    def top_k(self) -> int:
        """K, the number of largest logits that a row holds."""
        return (self.matrix.shape[1] - 3) // 2

    @property
    def target(self) -> Tensor:
        """The targets' token ids, int64 [n]."""
        return _token_ids(self.matrix[:, 0])

    @property
    def logsumexp(self) -> Tensor:
        """Logsumexp over the whole vocabulary, [n]."""
        return self.matrix[:, 2]

    def ids(self, k: int) -> Tensor:
        """Token ids of the target and the k largest logits, int64 [n, 1 + k]."""
        return _token_ids(torch.cat([self.matrix[:, :1], self.matrix[:, 3 : 3 + k]], 1))

    def logits(self, k: int) -> Tensor:
        """Logits of the candidates, [n, 2 + k]; that of the tail is 0."""
        first = 3 + self.top_k
        own, largest = self.matrix[:, 1:2], self.matrix[:, first : first + k]
        return torch.cat([own, largest, torch.zeros_like(own)], 1)

    def log_p(self, k: int) -> Tensor:
        """Log-probabilities of the candidates, [n, 2 + k].

        -inf for a target's second column, where it is also among the k largest, and for a tail too
        unlikely to be told from none.
        """
        ids = self.ids(k)
        void = torch.zeros_like(ids, dtype=torch.bool)
        void[:, 1:] = ids[:, 1:] == ids[:, :1]
        log_p = (self.logits(k)[:, :-1] - self.logsumexp[:, None]).masked_fill(void, -torch.inf)
        tail = 1 - log_p.double().exp().sum(1, keepdim=True)
        log_tail = torch.where(tail >= NO_TAIL, tail.clamp_min(NO_TAIL).log(), -torch.inf)
        return torch.cat([log_p, log_tail.float()], 1)


def _token_ids(column: Tensor) -> Tensor:
    """int64 token ids of int32 bits in float32."""
    return column.contiguous().view(torch.int32).long()


@dataclass(frozen=True)
class TokenStore:
    """The token rows of all responses, in memory or mapped from files, on the CPU.

    states: [N, d], after the final norm. packed_logits: the matrix of a `PackedLogits`. tail_means:
    [N, d] or None. weight_rows: the rows of head.weight, read as needed. starts:
    int64 [responses + 1]; rows starts[i]:starts[i + 1] belong to response i. positions:
    int64 [responses], |R|, the number of positions that rows were sampled from. S:
    float64 [responses], log-probability of the response.
    """

    states: RowStore
    packed_logits: RowStore
    tail_means: RowStore | None
    head: LmHead
    weight_rows: RowStore
    starts: NDArray[np.int64]
    positions: NDArray[np.int64]
    S: NDArray[np.float64]

    @property
    def top_k(self) -> int:
        """Number of largest logits that are kept of a token row."""
        return PackedLogits(self.packed_logits.values).top_k

    def sample(
        self, responses: NDArray[np.int64], rows: int | None, draws: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """At most `rows` token rows of each response [m], evenly spaced from a random start.

        draws: uniform in [0, 1), [m]; they decide where the spacing begins, so that all rows of a
        response are equally likely. Returns row numbers [n] and the index of their response [n].
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
        self,
        responses: Tensor,
        *,
        rows: int | None,
        top_k: TopK,
        draws: NDArray[np.float64],
        wanted: Tensor | None = None,
    ) -> TokenBatch:
        """Token rows of distinct responses int64 [m], sampled by `sample`.

        wanted: bool [m], the responses whose token rows are read; None: all. The next call
        overwrites the memory of the batch's `X` and `vectors`.
        """
        own = responses.numpy()
        read = np.arange(len(own)) if wanted is None else np.flatnonzero(wanted.numpy())
        numbers, owner = self.sample(own[read], rows, draws[read])
        owner = read[owner]
        places = torch.from_numpy(numbers)
        taken = np.bincount(owner, minlength=len(own))
        share = (self.positions[own] / np.maximum(taken, 1))[owner]
        packed = PackedLogits(self.packed_logits.take(places))
        X = self.states.take(places)
        if top_k == "all":
            candidates, vectors = None, self.weight_rows.take(torch.arange(len(self.head.weight)))
            logits = replace(self.head, weight=vectors).logits(X)
            log_p = logits - logits.logsumexp(1, keepdim=True)
            target = packed.target
        else:
            k = self.top_k if top_k is None else top_k
            logits, log_p = packed.logits(k), packed.log_p(k)
            vectors, candidates = self._vectors(packed.ids(k), self._tails(packed, k, places))
            target = torch.zeros(len(X), dtype=torch.int64)
        return TokenBatch(
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
        """Tokens whose vectors `read` needs for token rows int64 [n]: ids [n, candidates]."""
        if top_k == "all":
            return torch.arange(len(self.head.weight)).expand(len(rows), -1)
        k = self.top_k if top_k is None or self.tail_means is not None else top_k
        return PackedLogits(self.packed_logits.take(rows)).ids(k)

    def release_pages(self) -> None:
        """Let the system reclaim the memory of the mapped files read so far."""
        for states in (self.states, self.packed_logits, self.tail_means, self.weight_rows):
            if states is not None:
                states.release_pages()

    def _tails(self, packed: PackedLogits, k: int, places: Tensor) -> Tensor:
        """Vectors of the tails beyond the k largest logits, [n, d]; without tail means one zero
        vector [1, d]."""
        if self.tail_means is None:
            return torch.zeros(1, self.states.width)
        means = self.tail_means.take(places)
        if k == self.top_k:
            return means
        # The cached tail lies beyond all cached logits; those beyond the k largest join it.
        uncapped = self.head.uncapped(packed.logits(self.top_k))
        p, slopes = packed.log_p(self.top_k).exp(), self.head.slopes_of_uncapped(uncapped)
        used, where = packed.ids(self.top_k)[:, 1 + k :].unique(return_inverse=True)
        weights = (p * slopes)[:, 1 + k : -1]
        words = self.weight_rows.take(used)
        joining = embedding_bag(where, words, per_sample_weights=weights, mode="sum")
        mass = p[:, 1 + k :].sum(1, keepdim=True)
        return (joining + means * p[:, -1:]) / mass.clamp_min(NO_TAIL)

    def _vectors(self, ids: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [U, d] of the tokens `ids` [n, C - 1] and of the tails, and for every candidate
        its row among them, int64 [n, C]."""
        used, where = ids.unique(return_inverse=True)
        vectors = self.weight_rows.take(used, spare=len(tails))
        vectors[len(used) :] = tails
        own = torch.arange(len(tails)).expand(len(ids))[:, None]
        return vectors, torch.cat([where, len(used) + own], 1)
