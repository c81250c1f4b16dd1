"""A worker process with the numerics of a sweep's workers, to check bits in."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from embrm.training.numerics import Numerics, begin, environment, settings


@contextmanager
def strict_process(numerics: Numerics = "native") -> Iterator[Callable[..., Any]]:
    """Gives call(function, *arguments), run in the worker; skips where torch has no MKL."""
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL: equal bits are not promised")
    context = multiprocessing.get_context("spawn")
    with (
        environment(settings(numerics)),
        ProcessPoolExecutor(1, context, begin, (numerics,)) as pool,
    ):
        yield lambda function, *arguments, **named: pool.submit(
            function, *arguments, **named
        ).result()
