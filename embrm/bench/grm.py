"""Measure what regularizers through the frozen LM head cost, relative to the same head without."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_PLUG_IN = {"estimator": "plug-in", "token_rows": 2}
_REGULARIZERS: dict[str, dict[str, Any] | None] = {
    "none (bt)": None,
    "grm-sft, plug-in, 2 token rows": {"kind": "grm-sft", **_PLUG_IN},
    "grm-sft, 2 token rows": {"kind": "grm-sft", "token_rows": 2},
    "grm-sft, 2 token rows, 8 candidates": {"kind": "grm-sft", "token_rows": 2, "top_k": 8},
    "grm-sft": {"kind": "grm-sft"},
    "preserve-kl": {"kind": "preserve-kl"},
    "grm-dpo, plug-in, 2 token rows": {"kind": "grm-dpo", **_PLUG_IN},
    "grm-dpo, 2 token rows": {"kind": "grm-dpo", "token_rows": 2},
    "grm-dpo": {"kind": "grm-dpo"},
}
PARTS = {
    "chosen responses": (
        "none (bt)",
        *(name for name in _REGULARIZERS if name.startswith("grm-sft")),
    ),
    "both responses": (
        "preserve-kl",
        *(name for name in _REGULARIZERS if name.startswith("grm-dpo")),
    ),
}
"""Regularizers by the token rows that they read: those of chosen responses only, or those of both
responses of a pair. The very first has no regularizer; all are compared with it."""
_MEMORY = 2_000_000_000
"""Bytes that the last regularizer is limited to when it is measured again, as "memory limit"."""


@dataclass(frozen=True)
class _Read:
    """Bytes of token rows and LM-head vectors that one epoch reads.

    moved: what is read, minibatch by minibatch.
    least: the same with every token row and every vector that is used read only once.
    """

    moved: int
    least: int


def measure_grm(
    folder: Path,
    cache: Path | None = None,
    *,
    runs: int = 16,
    parts: Mapping[str, Sequence[str]] = PARTS,
    pairs: int = 15_000,
    width: int = 2048,
    tokens: Tokens = Tokens(),  # noqa: B008
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Measure regularizers; yields each part's name and rows as soon as it is measured.

    A row is one pack of `runs` linear heads on low-rank adapters, trained for one epoch on one
    thread in a process set up like a sweep's worker. A last part "memory limit" trains the last
    regularizer again within a memory limit that the parent and the worker share.

    cache: trained on its split "train"; without it, on `pairs` synthetic pairs with states of
    `width` components and token rows as `tokens` says, written below `folder`.
    parts: names of regularizers for each part; the very first one must be "none (bt)".
    "times bt": seconds a run, relative to the same head without a regularizer.
    "times least": bytes of token rows and LM-head vectors that are read, relative to the least
    possible; None for a row that reads none.
    Raises: UserError if the cache has no token rows or no split "train".
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here = cache or synthetic(Path(name) / "cache", {"train": pairs}, width, tokens=tokens)
        opened = open_cache(here)
        if not opened.layout.has_token_rows or "train" not in opened.splits:
            raise UserError(
                f"{here}: this benchmark needs a split 'train' with token rows: extract it with "
                "--token-rows 8"
            )
        selection = Selection(opened.cache_id, ("train",), 0.0)
        unregularized: float | None = None

        def row(name: str, material: Material, own: Sequence[Run]) -> dict[str, Any]:
            nonlocal unregularized
            done = measure(_pack, material, own, settings=settings("native"))
            read = _read(material, own[0].spec)
            seconds = done.seconds / runs
            unregularized = unregularized or seconds
            return {
                "regularizer": name,
                "runs": runs,
                "seconds a run": seconds,
                "times bt": seconds / unregularized,
                "GB read": read.moved / 1e9 if read else None,
                "times least": read.moved / read.least if read else None,
                "peak RSS MB": done.memory.rss / 1e6,
                "peak PSS MB": done.memory.pss / 1e6,
            }

        cases = {name: _runs(name, runs) for names in parts.values() for name in names}
        every = [run for own in cases.values() for run in own]
        with laid_out(opened, selection, every, Path(name)) as material:
            for part, regularizers in parts.items():
                rows = []
                with progress(part, len(regularizers), "packs") as bar:
                    for regularizer in regularizers:
                        rows.append(row(regularizer, material, cases[regularizer]))
                        bar.advance()
                yield part, rows
        last, own = [*cases.items()][-1]
        with laid_out(opened, selection, own, Path(name), memory=_MEMORY, jobs=1) as material:
            yield "memory limit", [row(f"{last}, --memory {_MEMORY / 1e9:g}GB", material, own)]


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
    """Count what one epoch of `spec` reads over its minibatches; None without a regularizer."""
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
