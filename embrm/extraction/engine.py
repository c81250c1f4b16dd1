"""What every engine gives: states and language-model statistics, computed by one function.

An engine runs the language model; what is computed from its post-norm states (logits, their
logsumexp, the log-probability S of the response) is computed here, so that two engines can only
differ by the states themselves.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embrm.lm.head import LmHead

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest relative difference that the order of arithmetic alone may cause, per dtype."""

_LOGIT_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20, "mps": 64 << 20}
"""Size of a float32 block of logits, and of their log-probabilities: about the cache of a CPU, far
below the memory of a GPU."""

_LOGIT_ROWS = 256
"""Fewest rows of a block: with fewer, reading the head's weights takes longer than the product."""

_NO_TAIL = 1e-6
"""A tail's probability under which float32 logits hold nothing to average."""

PositionsRule = Literal["random", "spaced"]
"""How token rows are sampled: see `token_positions`."""


@dataclass(frozen=True)
class TokenStatistics:
    """LM statistics of n positions: float32 [n] target_logit and logsumexp; the k largest logits,
    float32 [n, k], descending, and their int32 ids; where asked for, the tail means [n, d] in the
    states' dtype.

    A tail mean is E_tail[∂z_j/∂h] = Σ_j p_j·slope_j·w_j / Σ_j p_j over the tail, every token that
    is neither the target nor among the k largest: p the softmax over the whole vocabulary, w_j the
    head's rows, slope_j = scale·(1 - (z_j/softcap)²), or scale without soft-capping. It is zero
    where the tail's probability is under 1e-6.
    """

    target_logit: Tensor
    logsumexp: Tensor
    top_logits: Tensor
    top_ids: Tensor
    tail_means: Tensor | None = None


def statistics(
    head: LmHead,
    states: Tensor,
    targets: Tensor,
    top_k: int = 0,
    *,
    tail_mean: bool = False,
    among: npt.NDArray[np.int64] | None = None,
) -> TokenStatistics:
    """Statistics of states [n, d] whose next tokens are targets int64 [n], without ever holding
    all logits: log p(target) = target_logit - logsumexp.

    among: ascending, the m rows whose largest logits and tail means are wanted, which are then
    [m, ...]; None: all.
    """
    n, vocabulary, device = len(states), head.weight.shape[0], states.device
    rows = max(_LOGIT_ROWS, _LOGIT_BYTES[device.type] // (4 * vocabulary))
    k = min(top_k, vocabulary)
    among = np.arange(n) if among is None else among
    target_logit = torch.empty(n, dtype=torch.float32, device=device)
    logsumexp = torch.empty_like(target_logit)
    top_logits = torch.empty(len(among), k, dtype=torch.float32, device=device)
    top_ids = torch.empty(len(among), k, dtype=torch.int32, device=device)
    tail_means = states.new_empty(len(among), states.shape[1]) if tail_mean else None
    among_there = to_device(among, device)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        first, last = np.searchsorted(among, [part.start, part.stop])
        kept = slice(first, last)
        wanted = among_there[kept] - start
        logits = head.logits(states[part])
        target_logit[part] = logits.gather(1, targets[part, None])[:, 0]
        if k:
            top_logits[kept], ids = logits[wanted].topk(k, dim=1)
            top_ids[kept] = ids.int()
        slopes = head.slopes(logits[wanted]) if tail_mean else 1.0
        # One pass, where maximum, difference, exponential and sum would be four; on a CPU it puts
        # its result where the logits were, since to write another block takes as long.
        logp = torch.log_softmax(logits, dim=1, out=logits if device.type == "cpu" else None)
        logsumexp[part] = target_logit[part] - logp.gather(1, targets[part, None])[:, 0]
        if tail_means is not None:
            p = logp[wanted].exp_()
            p.scatter_(1, targets[part][wanted, None], 0.0)
            p.scatter_(1, top_ids[kept].long(), 0.0)
            tail = p.sum(1, keepdim=True)
            means = _weighted_sum(p.mul_(slopes), head.weight) / tail
            tail_means[kept] = means.where(tail >= _NO_TAIL, 0.0)
    return TokenStatistics(target_logit, logsumexp, top_logits, top_ids, tail_means)


def _weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """float32 [n, V] by [V, d] of any dtype, which is widened to float32 a block at a time."""
    size = max(1, _LOGIT_BYTES[rows.device.type] // (4 * rows.shape[1]))
    out = weights.new_zeros(len(weights), rows.shape[1])
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        out.addmm_(weights[:, block], rows[block].float())
    return out


def of_responses(
    head: LmHead,
    states: Tensor,
    targets: Tensor,
    spans: Sequence[int],
    positions: Sequence[npt.ArrayLike],
    top_k: int = 0,
    *,
    tail_mean: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is kept of responses, given all their states [n, d] that predict a token, one response
    after another, and the tokens predicted, int64 [n].

    spans: how many of them each response has; positions: for each response, ascending, which of
    its own are its token rows. Returns log p of each token, float32 [n], whose sums are S, and the
    token rows, one after another: states [rows, d], targets int32 [rows] and the fields of their
    `TokenStatistics` by name. Logits are computed once for both.
    """
    firsts = np.cumsum([0, *spans])[:-1]
    own = [first + np.asarray(some) for first, some in zip(firsts, positions, strict=True)]
    among = np.concatenate(own).astype(np.int64)
    found = statistics(head, states, targets, top_k, tail_mean=tail_mean, among=among)
    at = to_device(among, states.device)
    rows = {
        "states": states[at],
        "targets": targets[at].int(),
        "target_logit": found.target_logit[at],
        "logsumexp": found.logsumexp[at],
        "top_logits": found.top_logits,
        "top_ids": found.top_ids,
    }
    if found.tail_means is not None:
        rows["tail_means"] = found.tail_means
    return found.target_logit - found.logsumexp, rows


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The values on the device; on a GPU by way of pinned memory, as a copy from other memory
    waits until all that was asked of the GPU before is done."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Request:
    """One sequence for an engine to read.

    ids: int32 [length]; n_prompt: how many of them are the prompt; final_position: the pooled
    token; positions: int32, sorted, where token rows are wanted (the state at p predicts p + 1).
    """

    ids: npt.NDArray[np.int32]
    n_prompt: int
    final_position: int
    positions: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """What an engine gives for n requests, in their order, on the CPU.

    states: view → [n, d] in the model's dtype (the mean view too); norms: view → float32 [n],
    taken before the cast; S: float64 [n]. Token rows, all requests' positions one after another:
    token_states [rows, d], targets int32 [rows] and their statistics.
    """

    states: dict[str, Tensor]
    norms: dict[str, Tensor]
    S: npt.NDArray[np.float64]
    token_states: Tensor
    targets: Tensor
    tokens: TokenStatistics


class Engine(Protocol):
    """A language model that can be read. Its answer must not depend on what shares a batch."""

    head: LmHead
    width: int
    batch_tokens: int
    """Tokens of a batch, padding included, that suit the device."""
    environment: dict[str, Any]

    def batches(self, requests: Sequence[Request], batch_tokens: int) -> list[list[int]]:
        """Indices of the requests to read together, each once, as the requests alone decide."""
        ...

    def forward(self, batches: Iterable[Sequence[Request]]) -> Iterator[Batch]:
        """The answer to each batch, in their order. It may begin to read the next batch before it
        gives the answer to one."""
        ...


def predicting_positions(n_prompt: int, length: int) -> range:
    """Positions whose states predict the response tokens: n_prompt - 1 … length - 2.

    A response that begins the sequence (no BOS, no prompt token in common) has no state before its
    first token, which then counts neither in S nor among the token rows.
    """
    return range(max(n_prompt - 1, 0), length - 1)


def token_positions(
    response_id: str,
    n_prompt: int,
    length: int,
    k: int,
    seed: int,
    rule: PositionsRule = "random",
) -> npt.NDArray[np.int32]:
    """k predicting positions drawn without replacement, sorted; all of them when fewer exist.

    The draw is a counter-based stream (Philox) keyed by seed and response id alone, so it depends
    neither on order nor on what was extracted before.
    "random": positions of the k smallest raw 64-bit draws. "spaced": evenly spaced from a random
    start (systematic sampling): each position is as likely as any other, as under "random", and a
    mean over the sample varies less where neighbours are alike.
    """
    candidates = predicting_positions(n_prompt, length)
    n = len(candidates)
    digest = hashlib.sha256(f"{seed}:{response_id}".encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16]))
    if rule == "spaced" and n > k > 0:
        # The n starts and k multiples of n are every number under n·k once: k of them a position.
        start = int(stream.random_raw()) * n >> 64
        chosen = (start + n * np.arange(k)) // k
    else:
        chosen = np.sort(np.argsort(stream.random_raw(n), kind="stable")[:k])
    return (candidates.start + chosen).astype(np.int32)


def read(
    engine: Engine,
    requests: Sequence[Request],
    batch_tokens: int,
    advance: Callable[[int], object] = lambda _: None,
) -> Batch:
    """Read any number of requests: see `read_shards`."""
    [(_, answer)] = read_shards(engine, [requests], batch_tokens, advance)
    return answer


def read_shards(
    engine: Engine,
    shards: Iterable[Sequence[Request]],
    batch_tokens: int,
    advance: Callable[[int], object] = lambda _: None,
) -> Iterator[tuple[Sequence[Request], Batch]]:
    """The requests of each shard, and the answer to all of them in their order.

    They are read in the engine's batches of at most `batch_tokens` tokens, padding included (a
    longer request is read alone); no batch has requests of two shards, but the engine may read the
    first of the next shard while the caller has this one. `advance` is told the tokens of each
    finished batch.
    """
    asked: deque[tuple[Sequence[Request], list[list[int]]]] = deque()

    def batches() -> Iterator[list[Request]]:
        for requests in shards:
            asked.append((requests, engine.batches(requests, batch_tokens)))
            for batch in asked[-1][1]:
                yield [requests[index] for index in batch]

    parts: list[Batch] = []
    for part in engine.forward(batches()):
        requests, order = asked[0]
        advance(sum(len(requests[index].ids) for index in order[len(parts)]))
        parts.append(part)
        if len(parts) == len(order):
            answer = _in_order(requests, order, parts)
            # Kept any longer, they would be held beside the answer while it is written.
            parts = []
            asked.popleft()
            yield requests, answer


def _in_order(
    requests: Sequence[Request], batches: Sequence[Sequence[int]], parts: Sequence[Batch]
) -> Batch:
    """The answers to batches of requests, given by their indices, as one in the requests' order."""
    order = [index for batch in batches for index in batch]
    back = torch.from_numpy(np.argsort(order))
    owner = np.repeat(order, [len(requests[index].positions) for index in order])
    back_tokens = torch.from_numpy(np.argsort(owner, kind="stable"))
    tails = [part.tokens.tail_means for part in parts if part.tokens.tail_means is not None]

    return Batch(
        states={v: torch.cat([part.states[v] for part in parts])[back] for v in parts[0].states},
        norms={v: torch.cat([part.norms[v] for part in parts])[back] for v in parts[0].norms},
        S=np.concatenate([part.S for part in parts])[back.numpy()],
        token_states=torch.cat([part.token_states for part in parts])[back_tokens],
        targets=torch.cat([part.targets for part in parts])[back_tokens],
        tokens=TokenStatistics(
            torch.cat([part.tokens.target_logit for part in parts])[back_tokens],
            torch.cat([part.tokens.logsumexp for part in parts])[back_tokens],
            torch.cat([part.tokens.top_logits for part in parts])[back_tokens],
            torch.cat([part.tokens.top_ids for part in parts])[back_tokens],
            torch.cat(tails)[back_tokens] if tails else None,
        ),
    )


def by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of sequences of like length, at most `batch_tokens` tokens with padding to a batch;
    a longer sequence goes alone."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
