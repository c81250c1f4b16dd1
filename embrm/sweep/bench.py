"""How fast heads train here: the bank against the ways it replaces, in one run, on one thread.

Everything is measured on the same synthetic states and pairs, for one epoch or less, and said as
heads·pairs a second: training pairs seen, times heads that saw them. Evaluation is left out.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.sweep.grid import RunSpec
from embrm.train.bank import TrainingData, train
from embrm.train.heads import HeadSpec
from embrm.train.objectives import Pairs

_BATCH = 512
_LOOP_RUNS = 2
_REFERENCE, _REFERENCE_BATCH = HeadSpec(kind="mlp", widths=(1024, 512)), 10_240
"""Head and minibatch of the published protocol (arXiv 2502.04357); its pairs are materialised."""


def measure_training(
    *, runs: int = 256, mlp_runs: int = 16, pairs: int = 45_000, width: int = 2048
) -> list[dict[str, Any]]:
    """One row a way of training: heads·pairs/s, ratio to the loop of the same head, GFLOP/s.

    runs, mlp_runs: heads in the bank's rows. The loops and the reference train as many heads as
    give a steady figure. GFLOP/s counts forward and backward products of the head alone.
    The first rows are the machine's own limits: a large float32 product, and a copy of memory.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_limits(), *_training(runs, mlp_runs, pairs, width)]
    finally:
        torch.set_num_threads(threads)


def _limits() -> list[dict[str, Any]]:
    a = torch.randn(2048, 2048)
    seconds = _fastest(lambda: a @ a)
    block = torch.empty(64 << 20, dtype=torch.uint8)
    copied = _fastest(lambda: block.clone())
    return [
        _row("limit: float32 product 2048 x 2048 x 2048", gflops=2 * 2048**3 / seconds / 1e9),
        _row(
            "limit: copy of 64 MiB, GB/s read and written", gflops=2 * block.numel() / copied / 1e9
        ),
    ]


def _training(runs: int, mlp_runs: int, pairs: int, width: int) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    states = torch.randn(pairs, width, generator=random).bfloat16()
    chosen, rejected = torch.randint(pairs, (2, pairs), generator=random)
    ones = torch.ones(pairs)
    data = TrainingData(states, Pairs(chosen, rejected, ones, ones, None), _no_pairs())
    rows = []
    for head, count in ((HeadSpec(), runs), (_mlp(64), mlp_runs), (_mlp(256), mlp_runs)):
        loop = _LOOP_RUNS * pairs / _seconds(partial(_loop, head, data, _LOOP_RUNS))
        specs = [RunSpec(head=head, lr=1e-3 * 1.01**i, epochs=1) for i in range(count)]
        bank = count * pairs / _seconds(partial(train, specs, data))
        products = _products(head, width)
        rows += [
            _row(f"{head}: loop of single runs", loop, 1.0, loop * products / 1e9),
            _row(f"{head}: bank of {count}", bank, bank / loop, bank * products / 1e9),
        ]
        if head.kind == "linear":
            speed = pairs / _seconds(partial(_logistic, data))
            # One fit runs to convergence; a head of the bank has seen 20 epochs by then.
            rows.append(_row("linear: scikit-learn to convergence, as 20 epochs", 20 * speed,
                             20 * speed / loop))  # fmt: skip
    speed = pairs / _seconds(partial(_reference_epoch, data))
    operations = speed * _products(_REFERENCE, width) / 1e9
    rows.append(_row("mlp 1024-512: published protocol", speed, None, operations))
    return rows


def _loop(head: HeadSpec, data: TrainingData, runs: int) -> None:
    """The same mathematics, one run after the other, as tight as plain torch lets it be."""
    for seed in range(runs):
        torch.manual_seed(seed)
        model = _module(head, data.states.shape[1])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        order = torch.randperm(len(data.train))
        for some in order.split(_BATCH):
            both = torch.cat([data.train.chosen[some], data.train.rejected[some]])
            rewards = model(data.states[both].float()).squeeze(1)
            loss = -logsigmoid(rewards[: len(some)] - rewards[len(some) :]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _reference_epoch(data: TrainingData) -> None:
    """One of the published protocol's 30 epochs: pairs materialised in float32."""
    model = _module(_REFERENCE, data.states.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    left, right = (data.states[rows].float() for rows in (data.train.chosen, data.train.rejected))
    for some in torch.randperm(len(left)).split(_REFERENCE_BATCH):
        loss = -logsigmoid(model(left[some]) - model(right[some])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _logistic(data: TrainingData) -> None:
    chosen, rejected = data.states[data.train.chosen], data.states[data.train.rejected]
    differences = (chosen.float() - rejected.float()).numpy()
    sign = np.where(np.arange(len(differences)) % 2, 1, -1)
    n = len(differences)
    LogisticRegression(fit_intercept=False, C=1 / (1e-3 * n)).fit(differences * sign[:, None], sign)


def _module(head: HeadSpec, width: int) -> torch.nn.Module:
    layers: list[torch.nn.Module] = []
    for outputs in head.widths:
        layers += [torch.nn.Linear(width, outputs), torch.nn.ReLU()]
        width = outputs
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 1, bias=False))


def _products(head: HeadSpec, width: int) -> int:
    """Floating-point operations a pair: two responses; forward, and the weights' gradient; and
    the gradient of every layer's input but the first."""
    sizes = [width, *head.widths, 1]
    layers = [a * b for a, b in pairwise(sizes)]
    return 2 * 2 * (2 * sum(layers) + sum(layers[1:]))


def _mlp(width: int) -> HeadSpec:
    return HeadSpec(kind="mlp", widths=(width,))


def _no_pairs() -> Pairs:
    none = torch.zeros(0, dtype=torch.int64)
    return Pairs(none, none, torch.zeros(0), torch.zeros(0), None)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _fastest(work: Callable[[], Tensor]) -> float:
    return min(_seconds(work) for _ in range(5))


def _row(
    what: str, speed: float | None = None, ratio: float | None = None, gflops: float | None = None
) -> dict[str, Any]:
    return {
        "what": what,
        "heads*pairs/s": speed and round(speed),
        "times the loop": ratio and round(ratio, 2),
        "GFLOP/s": gflops and round(gflops, 1),
    }
