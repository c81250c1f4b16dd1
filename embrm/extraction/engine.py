"""The interface of extraction engines: how they are loaded, what they read and return.

An engine is a module that is listed in `embrm.extraction.engines.ENGINES` and has the functions of
`EngineModule`; its `open_engine` returns an object with the interface `Engine`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from embrm.cache.schema import Stored, TokenRows
from embrm.lm.head import LmHead

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest relative difference, per dtype, that may be due to the order of arithmetic."""


@dataclass(frozen=True)
class Request:
    """One token sequence for an engine to read.

    ids: int32 [length], prompt then response. n_prompt: how many of them are the prompt.
    final_position: position of the token whose state is pooled. positions: int32, sorted, where
    token rows are to be stored; the state at position p predicts the token at p + 1.
    """

    ids: NDArray[np.int32]
    n_prompt: int
    final_position: int
    positions: NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """What an engine returns for n requests, in their order, on the CPU.

    states: view → [n, d] in the model's dtype, the mean view included. norms: view → float32 [n],
    taken before the cast to that dtype. S: float64 [n], log-probability of the response in nats.
    tokens: the token rows of all requests, one request after another, with tail means where they
    were asked for; `response` is the index of the request.
    """

    states: dict[str, Tensor]
    norms: dict[str, Tensor]
    S: NDArray[np.float64]
    tokens: TokenRows[Stored]


class Engine(Protocol):
    """A loaded language model. Its answer to a request must not depend on the other requests in the
    batch, except for rounding."""

    head: LmHead
    width: int
    """Length of a state vector."""
    batch_tokens: int
    """Default token budget of a batch on this device, padding included."""
    environment: dict[str, Any]
    """Engine name, device and settings, as recorded in the cache's manifest."""

    def batches(self, requests: Sequence[Request], batch_tokens: int) -> list[list[int]]:
        """Partition the requests into batches, given as lists of their indices. The result must
        depend on the requests and the budget only."""
        ...

    def forward(self, batches: Iterable[Sequence[Request]]) -> Iterator[Batch]:
        """Yield the answer to each batch, in order. The next batch may be started before that."""
        ...


@dataclass(frozen=True)
class EngineSettings:
    """Arguments for loading an engine.

    folder: a model saved by save_pretrained. dtype: float32, bfloat16 or float16. device: auto,
    cpu, cuda, cuda:1 or mps. views, top_k, tail_mean: what to compute for a request, as in
    `ExtractSpec`. max_length: tokens of the longest request. tensor_parallel: GPUs that share
    the model. compiled: whether to use torch.compile.
    """

    folder: Path
    dtype: str
    device: str = "auto"
    views: tuple[str, ...] = ("last",)
    top_k: int = 0
    tail_mean: bool = False
    max_length: int | None = None
    trust_remote_code: bool = False
    tensor_parallel: int = 1
    compiled: bool = False


class EngineModule(Protocol):
    """The functions that the module of an engine must have."""

    def suits(self, views: Sequence[str], device: str) -> bool:
        """Whether `engine = "auto"` chooses this engine for these views on this machine."""
        ...

    def refuse_unusable(self, views: Sequence[str]) -> None:
        """Raise UserError unless the engine is installed and can give all these views."""
        ...

    def open_engine(self, settings: EngineSettings) -> Engine:
        """Load the model. Raises: UserError when the engine does not support a setting, refuses the
        model, or the device is absent or too small."""
        ...
