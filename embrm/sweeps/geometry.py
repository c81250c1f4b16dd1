"""The geometry of a sweep's runs: what `embrm.metrics.geometry` defines, measured in the workers.

The same responses are measured for every run. What is the same for all runs is computed once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from embrm.lm.head import LmHead
from embrm.metrics.accuracy import EvaluationSplit
from embrm.metrics.geometry import MEASURES, correlation, drift, norms_and_rank, spread
from embrm.metrics.geometry import sample as evenly
from embrm.sweeps.ledger import GEOMETRY_SCHEMA, training_name
from embrm.sweeps.spec import RunSpec
from embrm.training.heads import (
    UP,
    Parameters,
    Preprocess,
    adapted,
    adapter_inner,
    adapter_readouts,
)
from embrm.training.regularizers import candidate_moves, divergence
from embrm.training.row_store import RowStore
from embrm.training.token_rows import PackedLogits, TokenBatch, TokenStore, TopK

REWARD_POSITION = "last"
"""The view for which KL at the reward position is measured: its states are those of one position,
while a mean of states predicts no next token."""

_TOKEN_ROWS = 1
"""Most token rows of a response that are measured."""

_TOP_K = 64
"""Number of largest logits that are kept of a reward position."""

_EXACT = 1 << 13
"""Largest vocabulary of which every logit is compared at the reward position. Where the next token
is nearly certain, many unlikely tokens make up the divergence."""

_WORDS = 4096
"""Tokens whose logits are computed at a time."""


@dataclass(frozen=True)
class Sample:
    """The responses of a split that are measured.

    rows: int64 [n], ascending. lengths: float64 [n], tokens. S: float64 [n], log-probabilities.
    """

    rows: Tensor
    lengths: NDArray[np.float64]
    S: NDArray[np.float64]


def samples(
    responses: pl.DataFrame,
    training: pl.DataFrame,
    train: Sequence[str],
    splits: Mapping[str, EvaluationSplit],
) -> dict[str, Sample]:
    """Choose the responses to measure, of every split and of all training pairs.

    responses: n_response and S of every response. train: the splits that are trained on.
    """
    trained_on = [training[side].to_numpy() for side in ("chosen", "rejected")]
    lengths, S = (responses[of].cast(pl.Float64).to_numpy() for of in ("n_response", "S"))
    every = {training_name(train): np.unique(np.concatenate(trained_on).astype(np.int64))}
    every |= {name: split.rows for name, split in splits.items()}
    some = {name: evenly(rows) for name, rows in every.items()}
    return {
        name: Sample(torch.from_numpy(rows), lengths[rows], S[rows]) for name, rows in some.items()
    }


def measured_row(
    run_id: str,
    split: str,
    sample: Sample,
    found: Mapping[str, float],
    rewards: NDArray[np.float32],
) -> dict[str, Any]:
    """A row of `GEOMETRY_SCHEMA`, with null for undefined numbers.

    found: measures of the states of `sample`; correlations of its rewards with length and S are
    added.
    """
    r = rewards.astype(np.float64)
    of_rewards = {
        "corr_length": correlation(r, sample.lengths),
        "corr_S": correlation(r, sample.S),
    }
    row = dict.fromkeys(MEASURES, math.nan) | dict(found) | of_rewards
    return {"run_id": run_id, "split": split, "responses": len(r)} | {
        name: x if math.isfinite(x) else None for name, x in row.items()
    }


@dataclass(frozen=True)
class Geometry:
    """Measures runs on the same samples.

    samples: split → responses. tokens: the token rows, where the sweep reads some.
    """

    samples: dict[str, Sample]
    tokens: TokenStore | None
    _shapes: dict[Any, dict[str, dict[str, float]]] = field(default_factory=dict, repr=False)
    _rewarded: dict[str, TokenStore] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def measure(
        self,
        spec: RunSpec,
        states: RowStore,
        preprocess: Preprocess,
        heads: Mapping[str, Parameters],
        rewards: Mapping[str, Mapping[str, NDArray[np.float32]]],
    ) -> pl.DataFrame:
        """Measure the runs of a pack: `GEOMETRY_SCHEMA`, one row per run and split.

        spec: of any run of the pack. heads: run id → parameters; for an ensemble's adapters the
        numbers are means over its members. rewards: run id → split → rewards of the sample. Heads
        are measured one by one, so that their bits do not depend on each other.
        """
        rows: list[dict[str, Any]] = []
        for split, sample in self.samples.items():
            moving = {run_id: _slots(own) for run_id, own in heads.items() if UP in own}
            measured: dict[str, dict[str, float]] = {run_id: {} for run_id in heads}
            if len(moving) < len(heads):
                unmoved = self._shape(spec, split, states, preprocess)
                measured = {run_id: dict(unmoved) for run_id in heads}
            if moving:
                X = preprocess(states.take(sample.rows).cpu())
                for run_id, slots in moving.items():
                    measured[run_id] = _mean([_moved_by(slot, X) for slot in slots])
                if self.tokens is not None:
                    self._divergences(spec, split, states, moving, measured)
            for run_id, found in measured.items():
                r = rewards[run_id][split]
                rows.append(measured_row(run_id, split, sample, found, r))
        states.release_pages()
        return pl.DataFrame(rows, schema=GEOMETRY_SCHEMA)

    def _shape(
        self, spec: RunSpec, split: str, states: RowStore, preprocess: Preprocess
    ) -> dict[str, float]:
        """Measures of the states themselves, computed once for all heads that read them."""
        # These fields choose the training pairs, which preprocessing is fitted to.
        cut = spec.pairs_limit, spec.fold, spec.labels
        key = spec.state, spec.preprocess, cut if preprocess.mean is not None else None
        known = self._shapes.setdefault(key, {})
        if split not in known:
            known[split] = norms_and_rank(preprocess(states.take(self.samples[split].rows).cpu()))
        return known[split]

    def _divergences(
        self,
        spec: RunSpec,
        split: str,
        states: RowStore,
        moving: Mapping[str, Sequence[Parameters]],
        measured: dict[str, dict[str, float]],
    ) -> None:
        """Add to `found` the mean KL of every run at token rows and at the reward position, and the
        drift at token rows."""
        assert self.tokens is not None
        rows = self.samples[split].rows
        exact = len(self.tokens.head.weight) <= _EXACT
        found: list[tuple[str, TokenStore, Tensor, TopK]] = [("kl_tokens", self.tokens, rows, None)]
        if spec.state == REWARD_POSITION:
            own = self._rewarded_at(split, states)
            found.append(("kl_reward", own, torch.arange(len(rows)), "all" if exact else None))
        for name, data, responses, top_k in found:
            if (data.starts[responses] == data.starts[responses + 1]).all():
                continue  # No response has a token row.
            draws = spread(len(responses))
            tokens = data.read(responses, rows=_TOKEN_ROWS, top_k=top_k, draws=draws)
            for run_id, slots in moving.items():
                measured[run_id] |= _mean([{name: _divergence(tokens, slot)} for slot in slots])
                if data is self.tokens:
                    drifts = [drift(tokens.X, adapted(slot, tokens.X)) for slot in slots]
                    measured[run_id]["drift_tokens"] = sum(drifts) / len(drifts)
            data.release_pages()

    def _rewarded_at(self, split: str, states: RowStore) -> TokenStore:
        """The sample's reward positions, as if each were the only token row of its response."""
        assert self.tokens is not None
        if not self._rewarded:
            every = [sample.rows for sample in self.samples.values()]
            X = states.take(torch.cat(every)).cpu().clone()
            packed = reward_positions(self.tokens.head, self.tokens.weight_rows, X)
            counts = [len(rows) for rows in every]
            for name, own, found in zip(
                self.samples, X.split(counts), packed.matrix.split(counts), strict=True
            ):
                self._rewarded[name] = replace(
                    self.tokens,
                    states=RowStore(own),
                    packed_logits=RowStore(found),
                    tail_means=None,
                    starts=np.arange(len(own) + 1),
                    positions=np.ones(len(own), np.int64),
                    S=np.zeros(len(own)),
                )
        return self._rewarded[split]


def reward_positions(head: LmHead, weight_rows: RowStore, X: Tensor) -> PackedLogits:
    """Targets and largest logits at positions that are not cached token rows.

    X: their states, [n, d]. The target is the likeliest token. The vocabulary is read in parts,
    once.
    """
    top_logits, top_ids = X.new_empty(len(X), 0), torch.empty(len(X), 0, dtype=torch.int64)
    normaliser = X.new_full((len(X),), -torch.inf)
    for words in torch.arange(len(head.weight)).split(_WORDS):
        bias = None if head.bias is None else head.bias[words]
        logits = replace(head, weight=weight_rows.take(words), bias=bias).logits(X)
        normaliser = torch.logaddexp(normaliser, logits.logsumexp(1))
        both = torch.cat([top_logits, logits], 1)
        every = torch.cat([top_ids, words.expand(len(X), -1)], 1)
        top_logits, places = both.topk(min(_TOP_K, both.shape[1]), 1)
        top_ids = every.gather(1, places)
    weight_rows.release_pages()
    ids, top = top_ids.int().numpy(), top_logits.numpy()
    return PackedLogits.pack(ids[:, 0].copy(), top[:, 0], normaliser.numpy(), ids, top)


def _slots(parameters: Parameters) -> list[Parameters]:
    """The slots of a bank as banks of one slot."""
    count = len(parameters[UP])
    return [
        {name: tensor[slot : slot + 1] for name, tensor in parameters.items()}
        for slot in range(count)
    ]


def _mean(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def _moved_by(parameters: Parameters, X: Tensor) -> dict[str, float]:
    after = adapted(parameters, X)
    return {**norms_and_rank(after), "drift": drift(X, after)}


def _divergence(tokens: TokenBatch, parameters: Parameters) -> float:
    """Mean KL(p ‖ p̃) of the rows under a bank of one slot with an adapter."""
    [inner] = adapter_inner(parameters, tokens.X)
    [readouts] = adapter_readouts(parameters, tokens.vectors)
    return float(divergence(tokens, candidate_moves(tokens, inner, readouts)).double().mean())
