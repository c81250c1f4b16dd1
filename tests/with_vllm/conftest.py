"""These tests run in an environment of their own: make test-vllm."""

import os
from pathlib import Path

import pytest

from embrm.extraction.vllm_engine import installed_version

# One process and quiet logs: a test then starts an engine in seconds and sees its errors.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, saying why, where there is no vLLM; where it is, its own warnings are no errors."""
    mark = pytest.mark.filterwarnings("ignore")
    if installed_version() is None:
        mark = pytest.mark.skip(reason="vLLM is not installed here: make test-vllm")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(mark)
