"""A worker process with the numerics of a sweep's workers, to check bits in."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from embrm.train.numerics import environment, strict


@contextmanager
def strict_process() -> Iterator[Callable[..., Any]]:
    """Gives call(function, *arguments), run in the worker; skips where torch has no MKL."""
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL: equal bits are not promised")
    context = multiprocessing.get_context("spawn")
    with (
        environment(strict()),
        ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool,
    ):
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
