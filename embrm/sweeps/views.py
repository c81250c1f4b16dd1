"""The states that a run can be trained on: the cache's views, and features made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from embrm.cache.reader import Cache
from embrm.core.errors import UserError, nearest
from embrm.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from embrm.cache import tensors
else:
    torch, tensors = LazyModule("torch"), LazyModule("embrm.cache.tensors")

TOKENS = "tokens"
"""Mean of the states of a response's sampled token rows. A linear head on it gives the mean reward
over these positions."""

_WITH_S = "+S"
"""Suffix of a view with one more component: S, the response's log-probability in nats, which is a
control for GRM."""

AFTER_FINAL_NORM = ("last", "mean", TOKENS)
"""Views in the space that the LM head reads, where an adapter can act."""


@dataclass(frozen=True)
class View:
    """The states of one view of a cache. Create it with `open_view`."""

    cache: Cache
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """Number of responses and of components."""
        return self.cache.manifest.n_responses, self.cache.width + self._adds_s

    @property
    def dtype(self) -> torch.dtype:
        """The cache's dtype, or float32 with S, which is too large for 16 bits."""
        return torch.float32 if self._adds_s else tensors.torch_dtype(self.cache)

    @property
    def size(self) -> int:
        """Size of all states in bytes."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def shards(self) -> Iterator[torch.Tensor]:
        """The states shard by shard.

        Raises: UserError where the cache is damaged, or a response has no token row to pool.
        """
        base = self.name.removesuffix(_WITH_S)
        stored = map(tensors.to_tensor, self.cache.stored_shards(base))
        parts = self._pooled() if base == TOKENS else stored
        if not self._adds_s:
            yield from parts
            return
        S = torch.from_numpy(self.cache.responses["S"].to_numpy().astype(np.float32))
        first = 0
        for part in parts:
            own = S[first : first + len(part)]
            first += len(part)
            yield torch.cat([part.float(), own[:, None]], 1)

    def read(self) -> torch.Tensor:
        """The states of all responses, [responses, components]."""
        return torch.cat([*self.shards()])

    @property
    def _adds_s(self) -> bool:
        return self.name.endswith(_WITH_S)

    def _pooled(self) -> Iterator[torch.Tensor]:
        first = 0
        for shard, rows in zip(self.cache.manifest.shards, self.cache.token_shards(), strict=True):
            assert shard is not None  # open_cache refuses incomplete caches.
            count = shard.responses.rows
            owner = torch.from_numpy(rows.response.astype(np.int64)) - first
            held = owner.bincount(minlength=count)
            if not held.all():
                missing = int((held == 0).sum())
                raise UserError(
                    f"state {TOKENS!r}: {missing} of responses {first}...{first + count - 1} have "
                    "no token row: take state = 'last' or 'mean'"
                )
            total = torch.zeros(count, self.cache.width).index_add_(
                0, owner, tensors.to_tensor(rows.state).float()
            )
            first += count
            yield (total / held[:, None]).to(self.dtype)


def view_names(cache: Cache) -> list[str]:
    """The names that `open_view` takes for this cache."""
    bases = [*cache.views, *([TOKENS] if cache.layout.has_token_rows else [])]
    return [*bases, *(base + _WITH_S for base in bases)]


def open_view(cache: Cache, name: str) -> View:
    """The view of that name: last, mean, prenorm, layer:K or tokens, with or without "+S".

    Raises: UserError for a view that the cache does not have.
    """
    names, base = view_names(cache), name.removesuffix(_WITH_S)
    if base == TOKENS and not cache.layout.has_token_rows:
        raise UserError(
            f"state {name!r} is made of token rows, and {cache.folder} has none: "
            "extract with token_rows = 8 (--token-rows 8)"
        )
    if name not in names:
        raise UserError(f"state {name!r} is not in {cache.folder}: {nearest(name, names)}")
    if name != base and (missing := missing_S(cache)):
        raise UserError(
            f"state {name!r} reads S, the responses' log-probability, and {cache.folder} lacks it "
            f"for {missing} responses: take state = {base!r}, or extract them with embrm extract"
        )
    return View(cache, name)


def missing_S(cache: Cache) -> int:  # noqa: N802
    """Number of responses whose log-probability S is unknown."""
    return int(cache.responses["S"].is_finite().not_().sum())
