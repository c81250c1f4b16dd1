"""Numerics in a process that was not started as a worker."""

import os
import subprocess
import sys

import pytest


def test_refused_strict_mode_is_not_left_in_the_environment() -> None:
    code = """
import os, warnings
import torch
torch.rand(64, 64) @ torch.rand(64, 64)
from embrm.training.numerics import begin_here, in_use
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with begin_here("native"):
        inside = in_use("native")
if caught:
    assert "STRICT" not in inside, inside
    assert "MKL_CBWR" not in os.environ
    print("warned")
"""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if "warned" not in done.stdout:
        pytest.skip("torch has no MKL here, or does not tell its mode")
