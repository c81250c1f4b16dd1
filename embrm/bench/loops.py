"""Other ways of training that sweeps are compared with.

Each function prepares its data from a cache and returns the function to be timed.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.bench.caches import HELD_OUT
from embrm.cache.reader import open_cache
from embrm.cache.tensors import to_tensor
from embrm.sweeps.material import to_pairs
from embrm.sweeps.selection import select
from embrm.sweeps.spec import Selection
from embrm.training.heads import HeadSpec
from embrm.training.pairs import Pairs

BATCH = 512
SKLEARN_EPOCHS = 20
"""Epochs that one scikit-learn fit to convergence is counted as."""

PROTOCOL = HeadSpec(kind="mlp", widths=(1024, 512))
_PROTOCOL_BATCH, _PROTOCOL_EPOCHS, _PROTOCOL_PATIENCE, _PROTOCOL_LR = 10_240, 30, 3, 1e-3


def tight_loop(cache: Path, validation: float, head: HeadSpec, runs: int) -> Callable[[], None]:
    """Train `runs` runs of one epoch, one after the other, with the sweep's mathematics in plain
    torch; without validation, evaluation and writing."""
    states, pairs = _training(cache, validation)

    def train(pairs: Pairs, runs: int) -> None:
        for seed in range(runs):
            torch.manual_seed(seed)
            model = module(head, states.shape[1])
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
            for some in torch.randperm(len(pairs)).split(BATCH):
                both = torch.cat([pairs.chosen[some], pairs.rejected[some]])
                rewards = model(states[both].float()).squeeze(1)
                loss = -logsigmoid(rewards[: len(some)] - rewards[len(some) :]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    few = Pairs(pairs.chosen[:BATCH], pairs.rejected[:BATCH], pairs.label, pairs.weight, None)
    train(few, 1)  # libraries initialise themselves on first use
    return partial(train, pairs, runs)


def logistic(cache: Path, validation: float) -> Callable[[], None]:
    """Fit scikit-learn's LogisticRegression to the differences of all pairs, to convergence."""
    states, pairs = _training(cache, validation)
    sign = np.where(np.arange(len(pairs)) % 2, 1, -1)
    differences = (states[pairs.chosen].float() - states[pairs.rejected].float()).numpy()
    differences *= sign[:, None]

    def fit() -> None:
        regression = LogisticRegression(fit_intercept=False, C=1 / (1e-3 * len(pairs)))
        regression.fit(differences, sign)

    return fit


class ProtocolRun(NamedTuple):
    """accuracy: on the held-out pairs, after the best epoch.
    epochs: number of epochs that were trained.
    best_seconds: time until the end of the best epoch.
    """

    accuracy: float
    epochs: int
    best_seconds: float


def protocol(cache: Path, seed: int) -> Callable[[], ProtocolRun]:
    """Train with a published protocol (arXiv 2502.04357 and its code): an MLP 1024-512, Adam, at
    most 30 epochs of minibatches of 10,240, patience 3, pairs materialised in float32.

    As published, early stopping and the choice of weights use the held-out pairs themselves.
    """
    opened = open_cache(cache)
    states = to_tensor(opened.stored_states("last"))
    sides = [
        [torch.tensor(own[side].to_numpy(), dtype=torch.int64) for side in ("chosen", "rejected")]
        for own in (opened.pairs.filter(split=name) for name in ("train", HELD_OUT))
    ]

    def run() -> ProtocolRun:
        start = time.perf_counter()
        torch.manual_seed(seed)
        (won, lost), (held_won, held_lost) = (
            (states[chosen].float(), states[rejected].float()) for chosen, rejected in sides
        )
        model = module(PROTOCOL, states.shape[1])
        optimizer = torch.optim.Adam(model.parameters(), lr=_PROTOCOL_LR)
        best, best_epoch, accuracy, best_seconds = float("inf"), 0, 0.0, 0.0
        for epoch in range(1, _PROTOCOL_EPOCHS + 1):
            for some in torch.randperm(len(won)).split(_PROTOCOL_BATCH):
                loss = -logsigmoid(model(won[some]) - model(lost[some])).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                margins = torch.cat(
                    [
                        model(left) - model(right)
                        for left, right in zip(
                            held_won.split(_PROTOCOL_BATCH),
                            held_lost.split(_PROTOCOL_BATCH),
                            strict=True,
                        )
                    ]
                )
            nll = float(-logsigmoid(margins).mean())
            if nll < best:
                best, best_epoch = nll, epoch
                accuracy = float((margins > 0).float().mean())
                best_seconds = time.perf_counter() - start
            elif epoch - best_epoch >= _PROTOCOL_PATIENCE:
                break
        return ProtocolRun(accuracy, epoch, best_seconds)

    return run


def module(head: HeadSpec, width: int) -> torch.nn.Module:
    """Build the head as a plain torch module. width: components of a state."""
    layers: list[torch.nn.Module] = []
    for outputs in head.widths:
        layers += [torch.nn.Linear(width, outputs), torch.nn.ReLU()]
        width = outputs
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 1, bias=False))


def _training(cache: Path, validation: float) -> tuple[Tensor, Pairs]:
    """States and training pairs that a sweep with this validation share would use."""
    opened = open_cache(cache)
    training, _ = select(opened, Selection(opened.cache_id, ("train",), validation))
    return to_tensor(opened.stored_states("last")), to_pairs(
        training.with_columns(margin=pl.lit(None, pl.Float64))
    )
