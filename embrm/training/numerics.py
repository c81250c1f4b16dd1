"""The arithmetic of a process that trains: which instructions, how many threads, which device.

On the CPU one thread and MKL's strict mode make a run's bits independent of the runs that it is
trained with. By default MKL may choose different kernels for different positions in a matrix, so
that the same head can get other bits in slot 5 than in slot 0. In strict mode every element of a
product is summed in the same order, whatever its position; on one thread that costs next to
nothing.
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
"""native: this CPU's widest instructions. portable: AVX2 only, which gives the same bits on all x86
machines. cuda: an NVIDIA GPU in full float32. cuda-tf32: the same with TF32 products. mps: an Apple
GPU. On a GPU, and on CPUs without MKL, runs repeat within a tolerance, not to the bit."""

_MKL_CBWR_ALL, _MKL_CBWR_STRICT = -1, 0x10000
"""MKL's constants: the argument that queries the whole reproducibility mode, and the bit of strict
mode in the answer."""

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
    """List the environment variables that a training process needs before it loads any library.

    With native numerics, a value of MKL_CBWR that the user has set is kept.
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
    """List the instruction sets beyond AVX2 that numpy finds here; it refuses to disable others."""
    config: Any = np.show_config(mode="dicts")
    found = config["SIMD Extensions"].get("found", [])
    return [name for name in found if name.startswith(("AVX512", "X86_V4"))]


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables within the block, for the child processes started there."""
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
    """Return the torch device that these numerics use."""
    return torch.device("cpu" if on_cpu(numerics) else numerics.partition("-")[0])


def why_unavailable(numerics: Numerics) -> str | None:
    """Say what this machine lacks for these numerics; None if it has all."""
    if numerics.startswith("cuda") and not torch.cuda.is_available():
        return "torch finds no CUDA GPU here"
    if numerics == "mps" and not torch.backends.mps.is_available():
        return "torch finds no Apple GPU here"
    if numerics == "portable" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "they need an x86 CPU with AVX2"
    return None


def begin(numerics: Numerics) -> None:
    """Apply the numerics to this process, which was started with the environment `settings`."""
    torch.set_num_threads(1)
    short = numerics == "cuda-tf32"
    torch.backends.cuda.matmul.allow_tf32 = short
    torch.backends.cudnn.allow_tf32 = short


def in_use(numerics: Numerics) -> str:
    """Describe the numerics and the hardware that a worker uses, for the ledger."""
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
    """Within the block, compute as a sweep's worker does, in a process that is none.

    One thread is used, and MKL is asked for its strict mode. MKL accepts that only before its first
    product; after it, results are correct but may differ from a sweep's in the last bits, and a
    warning says so. If MKL accepts, this process stays in strict mode, and MKL_CBWR stays set so
    that its child processes compute as it does.

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
        if asked:  # It did not take effect, so the ledger must not record it.
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
    """Whether MKL is in strict mode; None if torch has no MKL, or this cannot be found out."""
    if not torch.backends.mkl.is_available():
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        mode = ctypes.CDLL(str(library)).mkl_serv_cbwr_get(_MKL_CBWR_ALL)
    except (OSError, AttributeError):
        return None
    return bool(mode & _MKL_CBWR_STRICT)
