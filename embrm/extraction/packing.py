"""Packs many texts into one sequence without padding; responses to the same prompt share it.

Attention is the only layer that mixes tokens, so only attention needs to know where each text
begins. A shared prompt is computed once: its tokens precede those of the responses, and each
response attends to the prompt and to itself. The states equal those of the texts read alone, up to
rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from embrm.extraction.engine import Request
from embrm.extraction.statistics import to_device

ATTENTION = "embrm-packed"
"""The name under which transformers finds `_attend`."""

NOTED = "embrm-packed-noted"
"""The name under which transformers finds `_attend_and_note`, which records sliding windows."""

_MIN_SHARED_PROMPT = 8
"""Minimum length of a prompt to be shared. For a shorter one, sharing costs more than computing it
again, because it adds a call to attention and a copy of keys and values in every layer."""

_MAX_COPIES = 8
"""Limit on the tokens of a batch when a shared prompt is counted in each text, as a multiple of the
token budget. It bounds memory: every layer copies the prompt's keys and values for each text."""


class Segment(NamedTuple):
    """Tokens start:stop of a packed sequence, consecutive tokens of one text.

    They attend to each other, causally, and to all tokens begin:end, a prompt shared with other
    texts (begin = end: no shared prompt).
    """

    start: int
    stop: int
    begin: int
    end: int


class _Offsets(NamedTuple):
    """The segments as arguments of the attention kernel for variable lengths.

    queries, keys: int32 [segments + 1], cumulative numbers of queries and keys. most_queries,
    most_keys: the largest numbers in a segment. places: int64, positions of all keys in the packed
    sequence.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    places: Tensor


@dataclass(frozen=True)
class Packed:
    """Requests as one sequence of T tokens.

    ids: int64 [1, T]. positions: int64 [1, T], of each token in its text. segments: cover the
    sequence, in order. places: for each request, the indices of its tokens in the sequence, int64
    [length].
    """

    ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    places: list[npt.NDArray[np.int64]]

    @cached_property
    def offsets(self) -> _Offsets:
        queries = np.array([stop - start for start, stop, _, _ in self.segments])
        keys = queries + [end - begin for _, _, begin, end in self.segments]
        places = [
            np.concatenate([np.arange(begin, end), np.arange(start, stop)])
            for start, stop, begin, end in self.segments
        ]
        device = self.ids.device

        def firsts(counts: npt.NDArray[np.int64]) -> Tensor:
            return to_device(np.cumsum([0, *counts], dtype=np.int32), device)

        return _Offsets(
            firsts(queries),
            firsts(keys),
            int(queries.max()),
            int(keys.max()),
            to_device(np.concatenate(places), device),
        )


def pack_texts(requests: Sequence[Request], device: torch.device) -> Packed:
    """Pack the requests into one sequence, in which a shared prompt occurs once."""
    ids: list[npt.NDArray[np.int32]] = []
    positions: list[npt.NDArray[np.int64]] = []
    segments: list[Segment] = []
    places = [np.empty(0, np.int64)] * len(requests)

    def add(tokens: npt.NDArray[np.int32], begin: int, end: int) -> npt.NDArray[np.int64]:
        start = segments[-1].stop if segments else 0
        stop = start + len(tokens)
        if len(tokens):
            ids.append(tokens)
            positions.append(np.arange(end - begin, end - begin + len(tokens)))
            segments.append(Segment(start, stop, begin, end))
        return np.arange(start, stop)

    for group in _by_prompt(requests):
        shared = _shared(requests, group)
        prompt = add(requests[group[0]].ids[:shared], 0, 0)
        begin, end = (int(prompt[0]), int(prompt[-1]) + 1) if shared else (0, 0)
        for index in group:
            places[index] = np.concatenate([prompt, add(requests[index].ids[shared:], begin, end)])
    return Packed(
        to_device(np.concatenate(ids).astype(np.int64)[None], device),
        to_device(np.concatenate(positions)[None], device),
        tuple(segments),
        places,
    )


def batches(requests: Sequence[Request], batch_tokens: int) -> list[list[int]]:
    """Partition requests into batches to pack, given as their indices.

    A batch has at most `batch_tokens` tokens if a shared prompt is counted once, and at most eight
    times as many if it is counted in each text; a longer request is alone in its batch. Texts that
    share a prompt begin a new batch unless they all fit into the last one. If they need several
    batches, each of these reads the prompt again.
    """
    made: list[list[int]] = []
    room = copies = 0
    for group in _by_prompt(requests):
        shared = _shared(requests, group)
        own = [len(requests[index].ids) - shared for index in group]
        if not made or (shared and room < shared + sum(own)):
            made.append([])
            room, copies = batch_tokens, _MAX_COPIES * batch_tokens
        room -= shared
        for index, tokens in zip(group, own, strict=True):
            if made[-1] and (tokens > room or shared + tokens > copies):
                made.append([])
                room, copies = batch_tokens - shared, _MAX_COPIES * batch_tokens
            made[-1].append(index)
            room -= tokens
            copies -= shared + tokens
    return made


def _by_prompt(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of the requests grouped by prompt, in the order of first occurrence."""
    groups: dict[bytes, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.ids[: request.n_prompt].tobytes(), []).append(index)
    return list(groups.values())


def _shared(requests: Sequence[Request], group: Sequence[int]) -> int:
    """Number of leading tokens that the texts of one prompt share: the whole prompt, or 0."""
    n_prompt = requests[group[0]].n_prompt
    return n_prompt if len(group) > 1 and n_prompt >= _MIN_SHARED_PROMPT else 0


def _attend(
    module: Any,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    *,
    packed: Packed,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within the texts of a packed sequence, as a transformers attention function.

    query: [1, heads, T, d]; key, value: [1, key heads, T, d], where the number of key heads divides
    that of heads. Returns [1, T, heads, d], and None for the attention weights. softcap: scores
    become softcap·tanh(scores / softcap) (Gemma-2, arXiv 2408.00118, section 2). sliding_window:
    number of keys that a query attends to, including its own; None: all keys up to its own.
    """
    if query.is_cuda and query.dtype != torch.float32 and softcap is None:
        out = _attend_at_once(query, key, value, packed.offsets, scaling, sliding_window)
        return out, None
    parts = []
    for start, stop, begin, end in packed.segments:
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        shared = end - begin
        window = sliding_window if sliding_window and sliding_window < shared + stop - start else 0
        # A causal kernel skips the masked half of the scores; with an explicit mask, all of them
        # are computed. If the prompt is shorter than the rest, reading it again is cheaper.
        again = 0 < shared < stop - start and softcap is None and not window
        if shared:
            k, v = (
                torch.cat([tensor[:, :, begin:end], own], dim=2)
                for tensor, own in ((key, k), (value, v))
            )
        if again:
            q = torch.cat([query[:, :, begin:end], q], dim=2)
        if softcap is not None:
            parts.append(_capped(q, k, v, _causal(q, k, window), scaling, softcap))
            continue
        mask = _causal(q, k, window) if window or (shared and not again) else None
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(out[:, :, shared:] if again else out)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _causal(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Causal mask, bool [queries, keys], where the last query is at the last key.

    window: keys that a query attends to, including its own; 0: no limit.
    """
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return mask.triu(keys - queries - window + 1) if window else mask


def _attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: _Offsets,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention of all segments in one call to flash attention, for half precision on a GPU."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = varlen_attn(
        q,
        k[offsets.places],
        v[offsets.places],
        offsets.queries,
        offsets.keys,
        offsets.most_queries,
        offsets.most_keys,
        scale=scaling,
        # Keys before a query (-1: no limit) and none after it: causal, aligned at the last key.
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    times = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(times, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    weights = torch.softmax(scores.float().masked_fill(~mask, -torch.inf), dim=-1)
    return weights.to(query.dtype) @ value


def _attend_and_note(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    windows: list[tuple[int | None, int]],
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Call `_attend`, and append to `windows` the sliding window of the model's mask (None: it made
    no mask) and the one passed to attention; 0 means no window."""
    masked = None if attention_mask is None else int(attention_mask)
    windows.append((masked, sliding_window or 0))
    return _attend(module, query, key, value, None, sliding_window=sliding_window, **more)


def _window_of_mask(*_: Any, local_size: int | None = None, **__: Any) -> Tensor:
    """Replaces the mask function: returns the size of the window or chunk it would have applied."""
    return torch.full((1, 1, 1, 1), local_size or 0)


# Not compiled, because it depends on where texts begin, so every batch would be traced again.
AttentionInterface.register(ATTENTION, torch.compiler.disable(_attend))
AttentionInterface.register(NOTED, _attend_and_note)
AttentionMaskInterface.register(NOTED, _window_of_mask)
