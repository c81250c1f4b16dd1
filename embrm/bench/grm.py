"""What a regularizer through the frozen LM head costs, beside the same head without one."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embrm.bench.caches import Tokens, synthetic
from embrm.bench.processes import measure
from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.core.progress import progress
from embrm.core.streams import stream
from embrm.sweeps.material import Material, laid_out, to_pairs
from embrm.sweeps.spec import Run, RunSpec, Selection
from embrm.training.bank import train
from embrm.training.data import TrainingData
from embrm.training.numerics import settings
from embrm.training.order import Order

_HEAD = {"adapter": {"kind": "low-rank", "width": 16}}
_REGULARIZERS: dict[str, dict[str, Any] | None] = {
    "none (bt)": None,
    "grm-sft": {"kind": "grm-sft"},
    "grm-sft, 8 candidates": {"kind": "grm-sft", "top_k": 8},
    "grm-sft, 8 candidates, 1 token row": {"kind": "grm-sft", "top_k": 8, "token_rows": 1},
    "grm-sft, all token rows": {"kind": "grm-sft", "token_rows": "all"},
    "preserve-kl": {"kind": "preserve-kl"},
    "grm-dpo": {"kind": "grm-dpo"},
}
_MEMORY = 2_000_000_000
"""Bytes that the last regularizer is measured within once more."""


@dataclass(frozen=True)
class _Read:
    """Bytes of token rows and token vectors that one epoch reads, and the least it could: every
    token row that is used, and every token vector that occurs, once."""

    moved: int
    least: int


def measure_grm(
    folder: Path,
    cache: Path | None = None,
    *,
    runs: int = 16,
    regularizers: Sequence[str] = tuple(_REGULARIZERS),
    pairs: int = 45_000,
    width: int = 2048,
    tokens: Tokens = Tokens(),  # noqa: B008
) -> list[dict[str, Any]]:
    """One row a regularizer: one pack of `runs` linear heads on low-rank adapters, trained for an
    epoch on one thread, in a process set up as a worker is; and the last of them once more, within
    a limit of memory that parent and worker share.

    cache: its split "train" is trained on; without, `pairs` made-up pairs of width `width` below
    `folder`, with token rows as `tokens` says. "times bt": of the first row, the same head without
    a regularizer. "times least": bytes of token rows and token vectors read, to the least that must
    be; None where none are.
    Raises: UserError when the cache has no token rows or no split "train".
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here = cache or synthetic(Path(name) / "cache", {"train": pairs}, width, tokens=tokens)
        opened = open_cache(here)
        if opened.layout.top_k is None or "train" not in opened.splits:
            raise UserError(
                f"{here}: the cost is measured on token rows of a split 'train': extract with "
                "--token-rows 8"
            )
        cases = {regularizer: _runs(regularizer, runs) for regularizer in regularizers}
        rows: list[dict[str, Any]] = []
        selection = Selection(opened.cache_id, ("train",), 0.0)
        every = [run for own in cases.values() for run in own]

        def row(name: str, material: Material, own: Sequence[Run]) -> dict[str, Any]:
            done = measure(_pack, material, own, settings=settings("native"))
            read = _read(material, own[0].spec)
            seconds = done.seconds / runs
            return {
                "regularizer": name,
                "runs": runs,
                "seconds a run": seconds,
                "times bt": seconds / rows[0]["seconds a run"] if rows else 1.0,
                "GB read": read.moved / 1e9 if read else None,
                "times least": read.moved / read.least if read else None,
                "peak RSS MB": done.memory.rss / 1e6,
                "peak PSS MB": done.memory.pss / 1e6,
            }

        with progress("grm", len(cases) + 1, "packs") as bar:
            with laid_out(opened, selection, every, Path(name)) as material:
                for regularizer, own in cases.items():
                    rows.append(row(regularizer, material, own))
                    bar.advance()
            last, own = [*cases.items()][-1]
            with laid_out(opened, selection, own, Path(name), memory=_MEMORY, jobs=1) as material:
                rows.append(row(f"{last}, --memory {_MEMORY / 1e9:g}GB", material, own))
                bar.advance()
    return rows


def _runs(regularizer: str, runs: int) -> list[Run]:
    spec = RunSpec.model_validate(
        {
            "head": _HEAD,
            "regularizer": _REGULARIZERS[regularizer],
            "epochs": 1,
        }
    )
    many = [spec.model_copy(update={"lr": 1e-4 * (1 + index)}) for index in range(runs)]
    return [Run("", "", "", one) for one in many]


def _pack(material: Material, runs: Sequence[Run]) -> Callable[[], None]:
    data = _data(material)

    def work() -> None:
        train([run.spec for run in runs], data)

    return work


def _data(material: Material) -> TrainingData:
    return TrainingData(
        material.states["last"].open(),
        to_pairs(material.pairs("training")),
        to_pairs(material.pairs("validation")),
        material.tokens.open() if material.tokens else None,
    )


def _read(material: Material, spec: RunSpec) -> _Read | None:
    """What an epoch of `spec` reads of token rows and vectors, counted over its minibatches."""
    data, regularizer = _data(material), spec.active_regularizer
    if regularizer is None or data.tokens is None:
        return None
    sampling = regularizer.sampling
    tokens = data.tokens
    parts = [
        tokens.states,
        tokens.packed_logits,
        *([tokens.tail_means] if tokens.tail_means else []),
    ]
    row = sum(part.width * part.values.element_size() for part in parts)
    vector = tokens.head.weight.shape[1] * tokens.head.weight.element_size()
    draws = stream(spec.seed, "tokens", 1)
    rows, vectors = 0, 0
    used = torch.zeros(len(tokens.head.weight), dtype=torch.bool)
    seen = torch.zeros(len(tokens.states.values), dtype=torch.bool)
    order = Order(data.train.chosen, data.states, spec.seed)
    for some in order.minibatches(1, spec.batch_pairs):
        both = torch.stack([data.train.chosen[some], data.train.rejected[some]])
        responses, places = both.unique(return_inverse=True)
        chosen, rejected = places
        weighed = regularizer.responses_read(
            len(responses), chosen, rejected, data.train.label[some]
        ).numpy()
        drawn = draws.random(len(responses))[weighed]
        numbers, _ = tokens.sample(responses.numpy()[weighed], sampling.rows, drawn)
        ids = tokens.candidate_ids(torch.from_numpy(numbers), sampling.top_k).unique()
        rows, vectors = rows + len(numbers), vectors + len(ids)
        used[ids], seen[numbers] = True, True
    moved = rows * row + vectors * vector
    return _Read(moved, int(seen.sum()) * row + int(used.sum()) * vector)
