"""How many CPUs this process may use, and how the threads of the libraries behave."""

import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""CPU time granted to a Linux container: microseconds (or "max") and the period they are for."""


def usable_cpus() -> int:
    """The number of CPUs this process may use, by its affinity mask and its container's quota."""
    cpus = _cpus_of_the_affinity()
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):  # not in a container, or in one without a quota
        return cpus


def _cpus_of_the_affinity() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def set_thread_defaults() -> None:
    """Set the variables that OpenMP reads, where the user has not; call it before torch is loaded.

    Threads that wait for one another sleep instead of spinning. Spinning is faster by a little
    where every thread has a CPU to itself; on a busy machine it keeps the CPU from the thread
    that is waited for, which made the training of the demo's language model seven times slower.
    Torch starts one thread a CPU of the affinity mask and does not know of a container's quota,
    so a smaller quota is passed on as the number of threads.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if usable_cpus() < _cpus_of_the_affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))
