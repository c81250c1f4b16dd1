"""The arithmetic in which a run's bits depend on the run alone: one thread, MKL's strict mode.

By default MKL may pick another kernel for another position in a matrix, and small states then
give a head other bits in slot 5 than in slot 0. In strict mode every element of a product is
summed in one order, whatever its position; on one thread that costs next to nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def strict() -> dict[str, str]:
    """Environment of a process that trains, to be set before it loads torch.

    Uses this machine's widest instruction set; a value the user has set for MKL_CBWR wins.
    """
    widest = "AVX512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "AVX2"
    return {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "POLARS_MAX_THREADS": "1",
        "MKL_CBWR": os.environ.get("MKL_CBWR", f"{widest},STRICT"),
    }


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that child processes started within the block inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def in_use() -> str:
    """This process's instruction set and MKL mode, as the ledger records them."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability} MKL_CBWR={os.environ.get('MKL_CBWR', '')}"
