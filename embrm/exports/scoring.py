"""Scoring: rewards of any preference or group data under an exported model or a run.

An exported model reads texts through the tokenizer saved with it. A run reads them as its cache was
read, with any view that a cache can have. A text's reward does not depend on the texts in the same
batch, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embrm.core.errors import UserError
from embrm.core.progress import progress
from embrm.data.dataset import Dataset, load
from embrm.data.sources import SourceSpec
from embrm.exports.exported import ExportedModel, load_exported
from embrm.exports.run_model import RunModel, open_run_model
from embrm.extraction.reading import batches_by_length, check_batch_tokens, read
from embrm.extraction.texts import PreparedTexts, exclude
from embrm.extraction.transformers_engine import BATCH_TOKENS
from embrm.lm.loading import model_folder
from embrm.lm.tokens import Encoded, encode
from embrm.metrics.accuracy import EvaluationSplit

_ROWS = 2048
"""Responses whose states are in memory at a time."""

METRICS = ("pairs", "accuracy", "ties", "tau", "length_accuracy", "reward_mean", "reward_sd")
"""Metrics of every split, as `embrm.metrics.accuracy` defines them."""


@dataclass(frozen=True)
class Scores:
    """The rewards of a data set, float32.

    pairs: pair_id, split, subset, prompt_id, source, row (the pair's place in its source),
        chosen_model, rejected_model, label, weight, tokens_chosen, tokens_rejected (lengths of the
        responses), scores_chosen and scores_rejected (their rewards).
    members: one row per response of a group: split, subset, prompt_id, response_id, source, row,
        model, gold, tokens and score; empty without groups.
    splits: one row per split, with its name and `METRICS`.
    exclusions: the number of source rows left out, by reason.
    """

    pairs: pl.DataFrame
    members: pl.DataFrame
    splits: pl.DataFrame
    exclusions: dict[str, int]


def score(
    model: str,
    data: Sequence[SourceSpec],
    *,
    cache: Path | None = None,
    batch_tokens: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> Scores:
    """Score `data` with `model`.

    model: a folder that embrm export wrote; a folder or hub id of any sequence classifier with one
    label; or RESULTS_FOLDER:RUN. cache: a run's cache, if it has moved. batch_tokens: tokens of a
    batch, padding included. dtype: the dtype to load a folder's model in, instead of its own.

    Raises: UserError for anything wrong with model, run or data, and for rewards that are not
    finite.
    """
    check_batch_tokens(batch_tokens)
    run = _run_of(model)
    if run is None:
        if cache is not None:
            raise UserError(f"cache (--cache) is for RESULTS_FOLDER:RUN, and the model is {model}")
        exported = load_exported(model_folder(model, None), dtype=dtype, device=device)
        dataset = load(data)
        encoded, drops = encode(dataset.responses, exported.tokenizer, exported.policy)
        dataset, kept = exclude(dataset, encoded, drops)
        _refuse_unknown_tokens(model, exported, kept)
        rewards = _exported_rewards(exported, kept, batch_tokens)
    else:
        if dtype is not None:
            raise UserError(
                f"dtype (--dtype) is for a model's folder: a run has its cache's; drop {dtype}"
            )
        run_model = open_run_model(*run, cache)
        prepared = run_model.prepared_for(data)
        dataset, kept = prepared.dataset, prepared.encoded
        rewards = _run_rewards(run_model, prepared, batch_tokens, device)
    return _scores(dataset, kept, rewards)


def _run_of(model: str) -> tuple[Path, str] | None:
    """The results folder and the run of RESULTS_FOLDER:RUN; None if `model` is no such name."""
    folder, colon, run = model.partition(":")
    is_run = colon and not Path(model).exists() and Path(folder).is_dir()
    if not is_run and (Path(model) / "sweep.json").exists():
        raise UserError(f"{model} holds many runs: name one, such as {model}:CONFIGURATION@SEED")
    return (Path(folder), run) if is_run else None


def _refuse_unknown_tokens(model: str, exported: ExportedModel, texts: Sequence[Encoded]) -> None:
    largest = max(int(text.ids.max()) for text in texts)
    known = exported.model.get_input_embeddings().num_embeddings
    if max(largest, exported.policy.pad) >= known:
        raise UserError(
            f"model {model}: its tokenizer gives token id {max(largest, exported.policy.pad)}, the "
            f"model knows {known} ids: use the tokenizer the model was trained with"
        )


def _exported_rewards(
    exported: ExportedModel, texts: Sequence[Encoded], batch_tokens: int | None
) -> torch.Tensor:
    budget = batch_tokens or BATCH_TOKENS[exported.model.device.type]
    lengths = [len(text.ids) for text in texts]
    with progress("score", sum(lengths), "tokens") as bar:
        return exported.rewards(texts, batches_by_length(lengths, budget), advance=bar.advance)


def _run_rewards(
    run_model: RunModel, prepared: PreparedTexts, batch_tokens: int | None, device: str
) -> torch.Tensor:
    engine = run_model.engine(prepared, device)
    budget = batch_tokens or engine.batch_tokens
    parts = []
    with progress("score", int(prepared.lengths.sum()), "tokens") as bar:
        for first in range(0, len(prepared.encoded), _ROWS):
            rows = range(first, min(first + _ROWS, len(prepared.encoded)))
            requests = prepared.requests(rows)
            batch = read(engine, requests, budget, bar.advance)
            parts.append(run_model.rewards(batch, requests))
    return torch.cat(parts)


def _scores(dataset: Dataset, texts: Sequence[Encoded], rewards: torch.Tensor) -> Scores:
    values = rewards.numpy()
    n_response = np.array([text.n_response for text in texts], dtype=np.int32)
    ends = {name: dataset.pairs[name].to_numpy() for name in ("chosen", "rejected")}
    pairs = dataset.pairs.select(
        *("pair_id", "split", "subset", "prompt_id", "source", "row"),
        *("chosen_model", "rejected_model", "label", "weight"),
        *(pl.Series(f"tokens_{name}", n_response[rows]) for name, rows in ends.items()),
        *(pl.Series(f"scores_{name}", values[rows]) for name, rows in ends.items()),
    )
    listed = dataset.members["response"].to_numpy()
    members = dataset.members.select(
        *("split", "subset", "prompt_id"),
        dataset.responses["response_id"].gather(dataset.members["response"]),
        *("source", "row", "model", "gold"),
        pl.Series("tokens", n_response[listed]),
        pl.Series("score", values[listed]),
    )
    names = pl.concat([dataset.pairs["split"], dataset.members["split"]]).unique().sort()
    splits = pl.DataFrame(
        [{"split": name, **_metrics(dataset, name, n_response, values)} for name in names],
        schema={"split": pl.String, **dict.fromkeys(METRICS, pl.Float64)},
    ).with_columns(pl.col(METRICS).fill_nan(None))
    exclusions = dataset.exclusions.group_by("reason").len().sort("reason")
    return Scores(pairs, members, splits, dict(exclusions.rows()))


def _metrics(
    dataset: Dataset, split: str, n_response: NDArray[np.int32], values: NDArray[np.float32]
) -> dict[str, Any]:
    own = pl.col("split") == split
    part = EvaluationSplit.of(dataset.pairs.filter(own), dataset.members.filter(own), n_response)
    metrics, _ = part.evaluate(values[part.rows], float("nan"))
    return {name: metrics[name] for name in METRICS}
