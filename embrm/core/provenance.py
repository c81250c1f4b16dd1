"""Where a result came from: versions, machine, numerics and code state, as a plain dict."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from embrm import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "polars", "scipy")


def provenance() -> dict[str, Any]:
    """Versions, platform, CPU, thread and numerics settings, git revision of the working folder.

    Nothing here is hashed into an id: it explains a difference, it does not define a result.
    No host name, user name or path is recorded.
    """
    versions = {"embrm": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "numerics": {
            name: os.environ[name]
            for name in ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")
            if name in os.environ
        },
        "git": _git_revision(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def _git_revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
