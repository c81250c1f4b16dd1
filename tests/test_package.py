"""What is published: the source distribution is complete, and the wheel works outside the checkout.

The wheel is installed into a new virtual environment that borrows the other libraries from the
environment of the tests, so that nothing is downloaded; embrm itself can only come from the wheel.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from embrm import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
UNPUBLISHED = {".gitignore"}
DEMO = """
import sys
from pathlib import Path

import embrm
from embrm.demo.run import demo
from small_demo import RECIPE, WORLD

if __name__ == "__main__":
    assert Path(embrm.__file__).is_relative_to(sys.prefix), embrm.__file__
    demo(Path("runs/demo"), WORLD, RECIPE)
"""


def _run(*words: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def files() -> set[str]:
    """The files of this checkout that are not ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs into a distribution is not known")
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    return {name for name in _run(*command, cwd=ROOT).splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def built(files: set[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, made from a clean copy, and the wheel, made from the former."""
    folder = tmp_path_factory.mktemp("package")
    for name in files:
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist")
    _run(*build, folder / "source", cwd=folder)
    [sdist], [wheel] = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def test_the_source_distribution_has_every_file(files: set[str], built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert files - held == UNPUBLISHED


def test_the_wheel_has_the_package_and_nothing_else(
    files: set[str], built: tuple[Path, Path]
) -> None:
    held = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    assert held == {name for name in files if name.startswith("embrm/")}
    assert "embrm/py.typed" in held


def test_the_description_leads_nowhere_that_does_not_exist(built: tuple[Path, Path]) -> None:
    archive = zipfile.ZipFile(built[1])
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == __version__
    text = metadata.get_payload()
    assert "make demo" in text
    assert not re.findall(r"\]\((?!https?:|#)", text)


def test_the_wheel_runs_the_demo_and_a_sweep(built: tuple[Path, Path], tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    # Its own pip, without PYTHONPATH: a pip that finds the tests' embrm, in their environment or in
    # the checkout, takes it for the one asked for and installs nothing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str | Path) -> str:
        return _run(*words, cwd=tmp_path, environment=environment)

    run(python, "-m", "pip", "install", "--no-index", "--no-deps", built[1])
    # A folder named in a .pth file is searched, but its own .pth files, such as that of an
    # editable embrm, are not read.
    [packages] = (venv / "lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copy(ROOT / "tests" / "helpers" / "small_demo.py", tmp_path)
    (tmp_path / "small.py").write_text(DEMO)
    run(python, "small.py")
    embrm = venv / "bin" / "embrm"
    assert run(embrm, "--version").strip() == __version__
    sweep = Path("mine.toml")
    shutil.copy(tmp_path / "runs" / "demo" / "demo.toml", tmp_path / sweep)
    run(embrm, "sweep", sweep, "--cache", "runs/demo/cache")
    run(embrm, "report", "mine")
    assert (tmp_path / "mine" / "report.md").exists()
