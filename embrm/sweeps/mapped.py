"""Flat files that every worker maps: the states of a view, and the token rows of a cache."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl
import torch

from embrm.cache.reader import Cache
from embrm.cache.schema import Stored, TokenRows
from embrm.cache.tensors import lm_head_tensors, to_tensor
from embrm.core.files import TEMPORARY, disk_errors
from embrm.core.progress import Progress
from embrm.lm.head import LmHead
from embrm.training.row_store import RowStore
from embrm.training.token_rows import PackedLogits, TokenStore


@dataclass(frozen=True)
class MappedFile:
    """A matrix as a flat file of its rows.

    resident: bytes of it that a worker may keep in memory; None: as many as the system allows.
    """

    path: Path
    shape: tuple[int, int]
    dtype: torch.dtype
    resident: int | None

    def open(self) -> RowStore:
        """Map the file into memory."""
        return RowStore.of_file(self.path, self.shape, self.dtype, resident=self.resident)


def write_rows(path: Path, parts: Iterator[torch.Tensor], bar: Progress) -> None:
    """Write `parts` [n, width] one after another, reading one while the previous is written.

    Raises: UserError when the disk is full.
    """
    with disk_errors(path), path.open("wb") as file, ThreadPoolExecutor(1) as thread:
        before: Future[None] | None = None
        for part in parts:
            if before:
                before.result()
            before = thread.submit(_append, file, part)
            bar.advance()
        if before:
            before.result()


@dataclass(frozen=True)
class TokenFiles:
    """The files of a `TokenStore`, which workers map instead of receiving it.

    matrices: by the names that `_matrices` gives, and "weight", the weight of the LM head. head:
    the other tensors of the head. responses: an Arrow table of `positions_by_response`.
    """

    matrices: dict[str, MappedFile]
    head: dict[str, torch.Tensor]
    responses: Path

    def open(self) -> TokenStore:
        """Map the files into memory."""
        mapped = {name: file.open() for name, file in self.matrices.items()}
        return _store(mapped, self.head, pl.read_ipc(self.responses))

    @classmethod
    def write(cls, cache: Cache, folder: Path, share: float | None, bar: Progress) -> "TokenFiles":
        """Write the token rows of `cache` below `folder`, as the files that `paths` names.

        share: the fraction of every file that a worker may keep in memory; None: all.
        Raises: UserError when the disk is full, or the cache is damaged.
        """
        paths, head = cls.paths(folder), lm_head_tensors(cache)
        weight = head.pop("weight")
        columns = {"weight": (weight.shape[1], weight.dtype)}
        responses: list[np.ndarray] = []
        with disk_errors(folder), ExitStack() as opened:
            files = {name: opened.enter_context(paths[name].open("wb")) for name in _MATRICES}
            _append(files["weight"], weight)
            for rows in cache.token_shards():
                for name, matrix in _matrices(rows).items():
                    _append(files[name], matrix)
                    columns[name] = matrix.shape[1], matrix.dtype
                responses.append(rows.response)
                bar.advance()
            positions_by_response(cache, np.concatenate(responses)).write_ipc(
                paths["responses"], compression="uncompressed"
            )
        matrices = {}
        for name, (width, dtype) in columns.items():
            size = paths[name].stat().st_size
            shape = size // (width * dtype.itemsize), width
            resident = None if share is None else int(share * size)
            matrices[name] = MappedFile(paths[name], shape, dtype, resident)
        return cls(matrices, head, paths["responses"])

    @staticmethod
    def paths(folder: Path) -> dict[str, Path]:
        """Path of every file that `write` may make."""
        return {name: folder / f"{TEMPORARY}token-{name}" for name in (*_MATRICES, "responses")}

    @staticmethod
    def size(cache: Cache) -> int:
        """Bytes of the files that `write` makes, apart from the small table of responses."""
        layout = cache.layout
        rows = sum(s.tokens.rows for s in cache.manifest.shards if s and s.tokens)
        row = cache.width * layout.storage.itemsize * (1 + layout.tail_mean)
        head = cache.manifest.lm_head
        packed = 4 * PackedLogits.width(layout.top_k or 0)
        return rows * (row + packed) + (head.bytes if head else 0)


def first_tokens(cache: Cache) -> TokenStore:
    """The token rows of a cache's first shard, in memory."""
    return in_memory(cache, next(cache.token_shards()))


def in_memory(cache: Cache, rows: TokenRows[Stored]) -> TokenStore:
    """Some token rows of a cache, ascending by response, as a store in memory."""
    head = lm_head_tensors(cache)
    matrices = {"weight": head["weight"]} | _matrices(rows)
    stored = {name: RowStore(matrix) for name, matrix in matrices.items()}
    return _store(stored, head, positions_by_response(cache, rows.response))


_MATRICES = ("states", "packed_logits", "tail_means", "weight")
"""Names of the matrices of a `TokenStore`."""


def _matrices(rows: TokenRows[Stored]) -> dict[str, torch.Tensor]:
    """The matrices of a `TokenStore` with one row per token row."""
    packed = PackedLogits.pack(
        rows.target, rows.target_logit, rows.logsumexp, rows.top_ids, rows.top_logits
    )
    found = {"states": to_tensor(rows.state), "packed_logits": packed.matrix}
    if rows.tail_mean is not None:
        found["tail_means"] = to_tensor(rows.tail_mean)
    return found


def _store(
    matrices: Mapping[str, RowStore], head: Mapping[str, torch.Tensor], responses: pl.DataFrame
) -> TokenStore:
    """matrices: by the names in `_MATRICES`. head: tensors of the LM head, of which the weight is
    replaced by that of `matrices`. responses: see `positions_by_response`."""
    weight = matrices["weight"]
    return TokenStore(
        states=matrices["states"],
        packed_logits=matrices["packed_logits"],
        tail_means=matrices.get("tail_means"),
        head=LmHead.from_tensors({**head, "weight": weight.values}),
        weight_rows=weight,
        starts=np.append(responses["start"].to_numpy(), len(matrices["states"].values)),
        positions=responses["positions"].to_numpy(),
        S=responses["S"].to_numpy(),
    )


def positions_by_response(cache: Cache, response: np.ndarray) -> pl.DataFrame:
    """One row per response: start (its first token row), positions (how many have a state that
    predicts a token of it) and S. response: the response of each token row, ascending.
    """
    scalars = cache.responses.select("S", "n_prompt", "n_response")
    # A response that begins the sequence has no state before its first token.
    positions = scalars["n_response"] - (scalars["n_prompt"] == 0).cast(pl.Int32)
    return pl.DataFrame(
        {
            "start": np.searchsorted(response, np.arange(scalars.height)),
            "positions": positions.cast(pl.Int64),
            "S": scalars["S"],
        }
    )


def _append(file: BinaryIO, rows: torch.Tensor) -> None:
    file.write(rows.contiguous().view(torch.uint8).numpy().data)
