"""Flat files that every worker maps: the states of a view, and the token rows of a cache."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl
import torch

from embrm.cache.reader import Cache
from embrm.cache.schema import TokenTable
from embrm.cache.tensors import lm_head_tensors, to_tensor, torch_dtype
from embrm.core.files import TEMPORARY, disk_errors
from embrm.core.progress import Progress
from embrm.lm.head import LmHead
from embrm.training.states import States
from embrm.training.tokens import TokenStore, token_matrix


@dataclass(frozen=True)
class MappedFile:
    """A matrix as a flat file of its rows.

    resident: bytes of it that a worker may keep in memory; None: as many as the system allows.
    """

    path: Path
    shape: tuple[int, int]
    dtype: torch.dtype
    resident: int | None

    def open(self) -> States:
        """Map the file into memory."""
        return States.of_file(self.path, self.shape, self.dtype, resident=self.resident)


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

    head: the LM head's tensors but for its weight. responses: an Arrow table with one row per
    response and the columns start, positions and S.
    """

    states: MappedFile
    token_matrix: MappedFile
    tail_means: MappedFile | None
    weight: MappedFile
    head: dict[str, torch.Tensor]
    responses: Path

    def open(self) -> TokenStore:
        """Map the files into memory."""
        table = pl.read_ipc(self.responses)
        starts, weight_rows = table["start"].to_numpy(), self.weight.open()
        return TokenStore(
            states=self.states.open(),
            token_matrix=self.token_matrix.open(),
            tail_means=self.tail_means.open() if self.tail_means else None,
            head=LmHead.from_tensors({**self.head, "weight": weight_rows.values}),
            weight_rows=weight_rows,
            starts=np.append(starts, self.states.shape[0]).astype(np.int64),
            positions=table["positions"].to_numpy(),
            S=table["S"].to_numpy(),
        )

    @classmethod
    def write(cls, cache: Cache, folder: Path, share: float | None, bar: Progress) -> "TokenFiles":
        """Write the token rows of `cache` below `folder`, as the files that `paths` names.

        share: the fraction of every file that a worker may keep in memory; None: all.
        Raises: UserError when the disk is full, or the cache is damaged.
        """
        paths, layout = cls.paths(folder), cache.layout
        assert layout.top_k is not None  # a sweep that needs token rows is checked first
        head = lm_head_tensors(cache)
        shapes = {
            "states": (cache.width, torch_dtype(cache)),
            "token_matrix": (3 + 2 * layout.top_k, torch.float32),
            **({"tail_means": (cache.width, torch_dtype(cache))} if layout.tail_mean else {}),
            "weight": (head["weight"].shape[1], head["weight"].dtype),
        }
        responses: list[np.ndarray] = []
        with disk_errors(folder), ExitStack() as opened:
            files = {name: opened.enter_context(paths[name].open("wb")) for name in shapes}
            _append(files["weight"], head["weight"])
            for rows in cache.token_shards():
                _append(files["token_matrix"], _token_matrix(rows))
                _append(files["states"], to_tensor(rows.states))
                if rows.tail_means is not None:
                    _append(files["tail_means"], to_tensor(rows.tail_means))
                responses.append(rows.response)
                bar.advance()
            positions_by_response(cache, np.concatenate(responses)).write_ipc(
                paths["responses"], compression="uncompressed"
            )

        def mapped(name: str) -> MappedFile:
            (width, dtype), size = shapes[name], paths[name].stat().st_size
            resident = None if share is None else int(share * size)
            return MappedFile(
                paths[name], (size // (width * dtype.itemsize), width), dtype, resident
            )

        return cls(
            states=mapped("states"),
            token_matrix=mapped("token_matrix"),
            tail_means=mapped("tail_means") if layout.tail_mean else None,
            weight=mapped("weight"),
            head={name: tensor for name, tensor in head.items() if name != "weight"},
            responses=paths["responses"],
        )

    @staticmethod
    def paths(folder: Path) -> dict[str, Path]:
        """Path of every file that `write` may make."""
        names = ("states", "token_matrix", "tail_means", "weight", "responses")
        return {name: folder / f"{TEMPORARY}token-{name}" for name in names}

    @staticmethod
    def size(cache: Cache) -> int:
        """Bytes of the files that `write` makes, apart from the small table of responses."""
        layout = cache.layout
        rows = sum(s.tokens.rows for s in cache.manifest.shards if s and s.tokens)
        row = cache.width * layout.storage.itemsize * (1 + layout.tail_mean)
        head = cache.manifest.lm_head
        return rows * (row + 4 * (3 + 2 * (layout.top_k or 0))) + (head.bytes if head else 0)


def first_tokens(cache: Cache) -> TokenStore:
    """The token rows of a cache's first shard, in memory."""
    return in_memory(cache, next(cache.token_shards()))


def in_memory(cache: Cache, rows: TokenTable) -> TokenStore:
    """Some token rows of a cache, ascending by response, as a store in memory."""
    head = LmHead.from_tensors(lm_head_tensors(cache))
    table = positions_by_response(cache, rows.response)
    return TokenStore(
        states=States(to_tensor(rows.states)),
        token_matrix=States(_token_matrix(rows)),
        tail_means=None if rows.tail_means is None else States(to_tensor(rows.tail_means)),
        head=head,
        weight_rows=States(head.weight),
        starts=np.append(table["start"].to_numpy(), len(rows.response)),
        positions=table["positions"].to_numpy(),
        S=table["S"].to_numpy(),
    )


def _token_matrix(rows: TokenTable) -> torch.Tensor:
    return torch.from_numpy(
        token_matrix(rows.target, rows.target_logit, rows.logsumexp, rows.top_ids, rows.top_logits)
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
