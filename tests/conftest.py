"""Fixtures every test file may use."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real preference data beside the checkout; the test skips where it is absent."""
    if not (_SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside this checkout: real-data test not run")
    return _SHARED
