"""Flat files that every worker maps: states of a view, and what regularizers read."""

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
from embrm.cache.tensors import lm_head_tensors, to_tensor, torch_dtype
from embrm.core.files import TEMPORARY, disk_errors
from embrm.core.progress import Progress
from embrm.training.states import States
from embrm.training.tokens import LmHead, TokenData, facts


@dataclass(frozen=True)
class MappedFile:
    """Rows of one shape as one flat file.

    resident: bytes of it that a worker may keep in memory; None: whatever the system lets it.
    """

    path: Path
    shape: tuple[int, int]
    dtype: torch.dtype
    resident: int | None

    def open(self) -> States:
        """Map it."""
        return States.of_file(self.path, self.shape, self.dtype, resident=self.resident)


def write_rows(path: Path, parts: Iterator[torch.Tensor], bar: Progress) -> None:
    """Write `parts` [n, width] one after another, each read while the one before is written.

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
    """`TokenData` as files. responses: an Arrow table of starts, positions and S by response."""

    states: MappedFile
    facts: MappedFile
    tail_means: MappedFile | None
    weight: MappedFile
    head: dict[str, torch.Tensor]
    responses: Path

    def open(self) -> TokenData:
        """Map them."""
        table = pl.read_ipc(self.responses)
        starts = table["start"].to_numpy()
        return TokenData(
            states=self.states.open(),
            facts=self.facts.open(),
            tail_means=self.tail_means.open() if self.tail_means else None,
            head=LmHead.of(self.head, self.weight.open()),
            starts=np.append(starts, self.states.shape[0]).astype(np.int64),
            positions=table["positions"].to_numpy(),
            S=table["S"].to_numpy(),
        )

    @classmethod
    def write(cls, cache: Cache, folder: Path, share: float | None, bar: Progress) -> "TokenFiles":
        """Write the token rows of `cache` below `folder`, as the files that `paths` names.

        share: the part of every file that a worker may keep in memory; None: all.
        Raises: UserError when the disk is full, or the cache is damaged.
        """
        paths, layout = cls.paths(folder), cache.layout
        assert layout.top_k is not None  # a sweep that needs token rows is checked first
        head = lm_head_tensors(cache)
        shapes = {
            "states": (cache.width, torch_dtype(cache)),
            "facts": (3 + 2 * layout.top_k, torch.float32),
            **({"tail_means": (cache.width, torch_dtype(cache))} if layout.tail_mean else {}),
            "weight": (head["weight"].shape[1], head["weight"].dtype),
        }
        responses: list[np.ndarray] = []
        with disk_errors(folder), ExitStack() as opened:
            files = {name: opened.enter_context(paths[name].open("wb")) for name in shapes}
            _append(files["weight"], head["weight"])
            for rows in cache.token_shards():
                columns = (rows.target, rows.target_logit, rows.logsumexp)
                found = facts(*columns, rows.top_ids, rows.top_logits)
                _append(files["facts"], torch.from_numpy(found))
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
            facts=mapped("facts"),
            tail_means=mapped("tail_means") if layout.tail_mean else None,
            weight=mapped("weight"),
            head={name: tensor for name, tensor in head.items() if name != "weight"},
            responses=paths["responses"],
        )

    @staticmethod
    def paths(folder: Path) -> dict[str, Path]:
        """Every file that `write` may make."""
        names = ("states", "facts", "tail_means", "weight", "responses")
        return {name: folder / f"{TEMPORARY}token-{name}" for name in names}

    @staticmethod
    def size(cache: Cache) -> int:
        """Bytes of the files that `write` makes, but for the table."""
        layout = cache.layout
        rows = sum(s.tokens.rows for s in cache.manifest.shards if s and s.tokens)
        row = cache.width * layout.storage.itemsize * (1 + layout.tail_mean)
        head = cache.manifest.lm_head
        return rows * (row + 4 * (3 + 2 * (layout.top_k or 0))) + (head.bytes if head else 0)


def first_tokens(cache: Cache) -> TokenData:
    """The token rows of a cache's first shard, in memory."""
    rows, head = next(cache.token_shards()), lm_head_tensors(cache)
    known = facts(rows.target, rows.target_logit, rows.logsumexp, rows.top_ids, rows.top_logits)
    table = positions_by_response(cache, rows.response)
    return TokenData(
        states=States(to_tensor(rows.states)),
        facts=States(torch.from_numpy(known)),
        tail_means=None if rows.tail_means is None else States(to_tensor(rows.tail_means)),
        head=LmHead.of(head, States(head["weight"])),
        starts=np.append(table["start"].to_numpy(), len(rows.response)),
        positions=table["positions"].to_numpy(),
        S=table["S"].to_numpy(),
    )


def positions_by_response(cache: Cache, response: np.ndarray) -> pl.DataFrame:
    """start, positions and S of every response; response: that of each token row, ascending."""
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
