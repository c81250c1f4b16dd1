"""A finished run as a reward model: its head, its fine-tuned backbone if any, and its cache."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embrm.cache.reader import Cache
from embrm.cache.tensors import to_tensor
from embrm.core.errors import UserError
from embrm.data.sources import SourceSpec
from embrm.extraction.choice import load_engine_for, with_engine
from embrm.extraction.engine import Batch, Engine, Request
from embrm.extraction.probe import refuse_other
from embrm.extraction.spec import ExtractSpec
from embrm.extraction.texts import PreparedTexts, prepare_texts
from embrm.extraction.transformers_engine import load_engine
from embrm.results.ledger import Results, cache_of, open_results, run_name
from embrm.results.weights import load_run, load_saved_model
from embrm.sweeps.views import TOKENS
from embrm.training.ensembles import Combination
from embrm.training.heads import REWARDS, Parameters, Preprocess, score_states
from embrm.training.row_store import RowStore

_WITH_S = "+S"


@dataclass(frozen=True)
class RunModel:
    """A finished run and all that scoring texts with it needs. Create it with `open_run_model`."""

    results: Results
    row: dict[str, Any]
    """The run's row of the ledger."""
    run: dict[str, Any]
    """The fields of its spec, as recorded in the weights file."""
    parameters: Parameters
    """The head, or the members of an ensemble: tensors [members, ...] (see `training.heads`)."""
    preprocess: Preprocess
    combination: Combination
    """How the rewards of the members become one reward."""
    backbone: dict[str, Tensor]
    """Fine-tuned weights, named as in the base model's state_dict; {} for a run of a sweep."""
    cache: Cache

    @property
    def name(self) -> str:
        """The run as CONFIGURATION@SEED, with /DATASEED unless the data seed is 0."""
        return run_name(self.row)

    @property
    def view(self) -> str:
        """The view of the cache whose states the head reads."""
        return str(self.run.get("state", "last"))

    def extraction(self, **changes: Any) -> ExtractSpec:
        """Return the spec that the cache was extracted with, with some fields changed.

        Raises: UserError when the cache was not made by embrm extract.
        """
        recorded = self.cache.manifest.extraction
        if not recorded:
            raise UserError(
                f"{self.cache.folder} does not say what it was extracted from, so its texts and "
                "model cannot be read: extract one with embrm extract"
            )
        recorded = recorded | changes
        return ExtractSpec.parse(recorded, str(self.cache.folder / "manifest.json"))

    def prepared(self, model: str | None) -> PreparedTexts:
        """Tokenize the cache's texts again: `encoded[i]` is response i of the cache.

        model: folder or hub id of the cache's model, if it has moved.
        Raises: UserError when model or data are missing, or are not those the cache was made from.
        """
        spec = self.extraction(**({"model": model, "revision": None} if model else {}))
        return self._prepared(spec, None)

    def prepared_for(self, data: Sequence[SourceSpec]) -> PreparedTexts:
        """Tokenize other data as the cache's texts were tokenized.

        Raises: UserError when the model is missing or is not the cache's, or for wrong data.
        """
        pooled = self.view.removesuffix(_WITH_S)
        rows = {} if pooled == TOKENS else {"token_rows": 0, "tail_mean": False}
        views = self.cache.manifest.extraction["states"] if pooled == TOKENS else [pooled]
        spec = self.extraction(
            data=[source.model_dump(mode="json", exclude_none=True) for source in data],
            states=views,
            limit=None,
            engine="auto",
            **rows,
        )
        return self._prepared(spec, ("model", "tokenizer"))

    def _prepared(self, spec: ExtractSpec, parts: Collection[str] | None) -> PreparedTexts:
        try:
            prepared = prepare_texts(spec)
        except UserError as error:
            raise UserError(f"{self.cache.folder}, read again as it was made: {error}") from None
        refuse_other(self.cache, prepared, parts)
        if self.backbone:  # fine-tuned weights are float32, whatever the cache's dtype
            spec = prepared.spec.model_copy(update={"dtype": "float32"})
            prepared = replace(prepared, spec=spec)
        return prepared

    def engine(self, prepared: PreparedTexts, device: str) -> Engine:
        """Return the engine that reads texts for this run: the cache's model, or the tuned one."""
        spec = prepared.spec
        if not self.backbone:
            return load_engine_for(replace(prepared, spec=with_engine(spec, device)), device)
        # The engine computes the run's own view only; the cache may hold others, or not this one.
        engine = load_engine(
            prepared.folder, dtype=spec.dtype, device=device, views=[self.view], top_k=spec.top_k
        )
        load_backbone(engine.model.base_model, self.backbone, self.name)
        return engine

    def rewards(self, batch: Batch, requests: Sequence[Request]) -> Tensor:
        """Return the rewards float32 [n] of requests that an engine has read into `batch`."""
        pooled = self.view.removesuffix(_WITH_S)
        states = _token_means(batch, requests) if pooled == TOKENS else batch.states[pooled]
        if pooled != self.view:
            S = torch.from_numpy(batch.S).float()
            states = torch.cat([states.float(), S[:, None]], 1)
        return self._score(states)

    def cached_rewards(self, rows: Sequence[int]) -> Tensor:
        """Return the rewards float32 [n] of responses of the cache from their cached states.

        rows: ascending numbers of responses. For runs of a sweep only: a fine-tuned backbone gives
        other states than the cache holds.
        """
        parts, first = [], 0
        for shard in map(to_tensor, self.cache.stored_shards(self.view)):
            parts.append(shard[[row - first for row in rows if 0 <= row - first < len(shard)]])
            first += len(shard)
        return self._score(torch.cat(parts))

    def _score(self, states: Tensor) -> Tensor:
        rows = torch.arange(len(states))
        return self.combination(
            score_states(self.parameters, self.preprocess, RowStore(states), rows)
        )


def open_run_model(folder: Path, run: str, cache: Path | None = None) -> RunModel:
    """Open a run of the results in `folder`.

    run: a run id, the beginning of one, or CONFIGURATION@SEED. cache: the cache folder, if it has
    moved.

    Raises: UserError for an unknown run, a run that diverged or has no weights, damaged weights, or
    another cache.
    """
    results = open_results(folder)
    row = results.find(run)
    if results.finetuned:
        model = load_saved_model(folder / "weights" / f"{row['run_id']}.safetensors")
        fields, parameters, backbone = model.header["run"], model.head, model.backbone
        preprocess, combination = Preprocess(None, None), Combination()
    else:
        head = load_run(folder, row["run_id"])
        if REWARDS in head.parameters:
            raise UserError(
                f"run {run_name(row)} has no weights, only its rewards of the "
                "cache's responses: read them with embrm scores, or name a run with a head or a "
                "linear learner"
            )
        fields, parameters, backbone = head.spec.model_dump(mode="json"), head.parameters, {}
        preprocess, combination = head.preprocess, head.combination
    source = cache_of(results, cache)
    return RunModel(results, row, fields, parameters, preprocess, combination, backbone, source)


def load_backbone(model: Any, backbone: dict[str, Tensor], name: str) -> None:
    """Copy fine-tuned weights into a base model, in the dtype of the model.

    Raises: UserError when the model lacks one of the tensors or has it in another shape.
    """
    own = model.state_dict()
    for tensor, values in backbone.items():
        there = own.get(tensor)
        if there is None or there.shape != values.shape:
            shape = "no such tensor" if there is None else f"shape {list(there.shape)}"
            raise UserError(
                f"run {name}: its weights have backbone tensor {tensor!r} of shape "
                f"{list(values.shape)}, the model has {shape}: name the model it was tuned from"
            )
    model.load_state_dict(backbone, strict=False)


def _token_means(batch: Batch, requests: Sequence[Request]) -> Tensor:
    """The mean of each request's token rows, [n, d], as `embrm.sweeps.views` pools cached ones."""
    counts = torch.tensor([len(request.positions) for request in requests])
    owner = torch.from_numpy(batch.tokens.response).long()
    states = to_tensor(batch.tokens.state)
    total = torch.zeros(len(requests), states.shape[1]).index_add_(0, owner, states.float())
    return (total / counts[:, None]).to(states.dtype)
