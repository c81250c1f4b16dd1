"""The arithmetic of a process that trains: which instructions, how many threads, which device.

On the CPU a run's bits depend on the run alone: one thread, and MKL's strict mode. By default MKL
may pick another kernel for another position in a matrix, and small states then give a head other
bits in slot 5 than in slot 0. In strict mode every element of a product is summed in one order,
whatever its position; on one thread that costs next to nothing.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from embrm.core.errors import UserError
from embrm.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

Numerics = Literal["native", "portable", "cuda", "cuda-tf32", "mps"]
"""native: this CPU's widest instructions. portable: AVX2 alone, so that x86 machines agree. cuda:
an NVIDIA GPU in full float32; cuda-tf32: with its shorter products. mps: an Apple GPU. On a GPU,
and on CPUs without MKL, runs repeat within a tolerance and not to the bit."""

_MKL_CBWR_ALL, _MKL_CBWR_STRICT = -1, 0x10000
"""MKL's constants: ask for all of its reproducibility mode, and the flag of strict mode in it."""

_STEADY = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
    # Keep freed memory: the same buffers are wanted again in the next step.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


def settings(numerics: Numerics) -> dict[str, str]:
    """Environment of a process that trains, to be set before it loads any library.

    With native numerics a value the user has set for MKL_CBWR wins.
    """
    if numerics == "portable":
        return _STEADY | {
            "MKL_CBWR": "AVX2,STRICT",
            "ATEN_CPU_CAPABILITY": "avx2",
            "OPENBLAS_CORETYPE": "Haswell",
            "NPY_DISABLE_CPU_FEATURES": " ".join(_beyond_avx2()),
        }
    widest = "AVX512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "AVX2"
    return _STEADY | {"MKL_CBWR": os.environ.get("MKL_CBWR", f"{widest},STRICT")}


def _beyond_avx2() -> list[str]:
    """Names of what numpy would use here beside AVX2; naming what it has not would be refused."""
    config: Any = np.show_config(mode="dicts")
    found = config["SIMD Extensions"].get("found", [])
    return [name for name in found if name.startswith(("AVX512", "X86_V4"))]


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


def on_cpu(numerics: Numerics) -> bool:
    """Whether these numerics compute on the CPU."""
    return numerics in ("native", "portable")


def device(numerics: Numerics) -> torch.device:
    """Where these numerics compute."""
    return torch.device("cpu" if on_cpu(numerics) else numerics.partition("-")[0])


def why_unavailable(numerics: Numerics) -> str | None:
    """What this machine lacks for these numerics, if anything."""
    if numerics.startswith("cuda") and not torch.cuda.is_available():
        return "torch finds no CUDA GPU here"
    if numerics == "mps" and not torch.backends.mps.is_available():
        return "torch finds no Apple GPU here"
    if numerics == "portable" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "they need an x86 CPU with AVX2"
    return None


def begin(numerics: Numerics) -> None:
    """Make this process compute so; its environment must have been `settings`."""
    torch.set_num_threads(1)
    short = numerics == "cuda-tf32"
    torch.backends.cuda.matmul.allow_tf32 = short
    torch.backends.cudnn.allow_tf32 = short


def in_use(numerics: Numerics) -> str:
    """What a worker computes with, as the ledger records it."""
    where = device(numerics)
    if where.type == "cuda":
        return f"{numerics} {torch.cuda.get_device_name()}"
    if where.type == "mps":
        return numerics
    capability = torch.backends.cpu.get_cpu_capability()
    if not torch.backends.mkl.is_available():
        return f"{numerics} {capability} without MKL"
    return f"{numerics} {capability} MKL_CBWR={os.environ.get('MKL_CBWR', '')}"


@contextmanager
def begin_here(numerics: Numerics) -> Iterator[None]:
    """Compute as a worker does in a process that was not started as one, within the block.

    One thread is used, and MKL is asked for its strict mode, which it accepts until it is first
    used. Where it was used before, results are right but may differ from a sweep's in the last
    bits; a warning says so. Where MKL accepts, this process stays in strict mode and MKL_CBWR stays
    set, so that its child processes compute as it does.

    Raises: UserError for portable numerics, which must be set before torch is loaded.
    """
    lacking = why_unavailable(numerics)
    if lacking:
        raise UserError(f"numerics = {numerics!r}: {lacking}: use native numerics")
    wanted = settings(numerics)
    if numerics == "portable" and any(
        os.environ.get(name) != wanted[name] for name in ("MKL_CBWR", "ATEN_CPU_CAPABILITY")
    ):
        raise UserError(
            "numerics = 'portable' must be set before torch is loaded: use embrm.sweep, whose "
            "workers do so"
        )
    asked = "MKL_CBWR" not in os.environ
    os.environ.setdefault("MKL_CBWR", wanted["MKL_CBWR"])
    if _strict() is False:
        if asked:  # neither the ledger nor later child processes are told what does not hold here
            del os.environ["MKL_CBWR"]
        warnings.warn(
            "torch has multiplied matrices before embrm could ask for reproducible bits: results "
            "may differ from a sweep's in the last bits. Call embrm.train first, or set "
            f"MKL_CBWR={wanted['MKL_CBWR']} before Python starts",
            stacklevel=2,
        )
    threads = torch.get_num_threads()
    begin(numerics)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _strict() -> bool | None:
    """Whether MKL is in strict mode; None where torch has no MKL, or does not tell."""
    if not torch.backends.mkl.is_available():
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        mode = ctypes.CDLL(str(library)).mkl_serv_cbwr_get(_MKL_CBWR_ALL)
    except (OSError, AttributeError):
        return None
    return bool(mode & _MKL_CBWR_STRICT)
