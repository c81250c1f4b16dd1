"""Threads: a container's quota is respected, and so is what the user has set."""

import os
from pathlib import Path

import pytest

from embrm.core import threads
from embrm.core.threads import set_thread_defaults, usable_cpus


@pytest.fixture(autouse=True)
def eight_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight CPUs without a quota, and the file where one would stand."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "environ", {})
    return tmp_path / "cpu.max"


def openmp() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("OMP_")}


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("max 100000", 8),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("6400000 100000", 8),
        ("garbage", 8),
    ],
)
def test_a_quota_bounds_the_cpus(eight_cpus: Path, text: str, cpus: int) -> None:
    eight_cpus.write_text(text)
    assert usable_cpus() == cpus


def test_without_a_quota_the_number_of_threads_is_left_to_torch() -> None:
    assert usable_cpus() == 8
    set_thread_defaults()
    assert openmp() == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_a_quota_becomes_the_number_of_threads(eight_cpus: Path) -> None:
    eight_cpus.write_text("250000 100000")
    set_thread_defaults()
    assert openmp()["OMP_NUM_THREADS"] == "2"


def test_what_the_user_has_set_is_kept(eight_cpus: Path) -> None:
    eight_cpus.write_text("250000 100000")
    chosen = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}
    os.environ.update(chosen)
    set_thread_defaults()
    assert openmp() == chosen
