"""Fixtures every test file may use."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Outcome

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell has its background jobs ignore Ctrl-C, and so would all that tests start there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Child processes that tests start find the helpers and this checkout, as tests do.
_HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_HERE / "helpers"), str(_HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real preference data beside the checkout; the test skips where it is absent."""
    if not (_SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside this checkout: real-data test not run")
    return _SHARED


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a real file system of so many KiB; the test skips where that is not allowed."""
    mounted = []

    def mount(kibibytes: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    gc.collect()  # a file that an error left half written stays open until then
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def stopped_at_every_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Path], object]], Iterator[Path]]:
    """Interrupt work at every rename of a file: each call on a new folder gets one rename further.

    Yields each folder as the interrupt has left it, until the work ends without one.
    """
    real = Path.replace
    left = 0

    def replace(source: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return real(source, target)

    def stopped(work: Callable[[Path], object]) -> Iterator[Path]:
        nonlocal left
        for when in range(1, 1000):
            folder = tmp_path / f"stopped-{when}"
            left = when
            try:
                work(folder)
            except KeyboardInterrupt:
                yield folder
            else:
                return

    monkeypatch.setattr(Path, "replace", replace)
    return stopped


@pytest.fixture
def embrm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Run a command line in this process."""

    from embrm.cli import main

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["embrm", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a tiny model and of a preference file; see `extract_world`."""
    from extract_world import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models by name; see `extract_models`."""
    from extract_models import CONFIGS, save_model, tokenizer

    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind, tokenizer()) for kind in CONFIGS}


@pytest.fixture(scope="session")
def extracted(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that extracting `world` makes."""
    from extract_world import make

    return make(world, tmp_path_factory.mktemp("cache") / "whole")
