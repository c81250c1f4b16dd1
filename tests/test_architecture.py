"""The house stays easy to read: imports run one way, and the sweep needs no language model."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "embrm"

LANGUAGE_MODEL_LIBRARIES = {
    "transformers", "vllm", "trl", "peft", "accelerate", "datasets", "tokenizers",
}  # fmt: skip


def _rooms() -> dict[str, set[str]]:
    """Room → the language model libraries it may import, in the order of CONTRIBUTING's table."""
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| ([^|]*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    return {
        room: LANGUAGE_MODEL_LIBRARIES
        if libraries == "yes"
        else {*re.findall(r"`(\w+)`", libraries)}
        for room, libraries in rows
    }


ROOMS = _rooms()
"""A room imports from those before it."""


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "embrm":
                yield from (f"embrm.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    allowed = [*ROOMS][: [*ROOMS].index(room) + 1]
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in (PACKAGE / room).rglob("*.py")
        for name in _imports(path)
        if name.startswith("embrm.") and name.split(".")[1] not in [*allowed, "__version__"]
    }
    assert not wrong


def test_every_room_is_in_the_table() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_language_model_libraries_stay_in_their_rooms(room: str) -> None:
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in (PACKAGE / room).rglob("*.py")
        for name in _imports(path)
        if name.split(".")[0] in LANGUAGE_MODEL_LIBRARIES - ROOMS[room]
    }
    assert not wrong


def test_nothing_loads_or_writes_pickles() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not {"pickle", "dill", "joblib", "cloudpickle"} & set(_imports(path)), path
        assert "allow_pickle=True" not in path.read_text(), path
        for call in _torch_loads(path):
            safe = {word.arg: word.value for word in call.keywords}.get("weights_only")
            assert isinstance(safe, ast.Constant), path
            assert safe.value is True, path
            assert path == PACKAGE / "adoption" / "arrays.py", path


def _torch_loads(path: Path) -> Iterator[ast.Call]:
    """Calls of torch.load, by whatever name; safetensors.torch.load is another function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert "load" not in {alias.name for alias in node.names}, path
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            yield node


def test_what_loads_pickles_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import torch\nsafetensors.torch.load(b)\nx = torch.load(\n    'a.pt')\n")
    assert len([*_torch_loads(path)]) == 1
    path.write_text("from torch import load\n")
    with pytest.raises(AssertionError):
        [*_torch_loads(path)]


def test_the_base_install_sweeps_without_transformers() -> None:
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {LANGUAGE_MODEL_LIBRARIES!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import embrm.cli, embrm.cache.reader, embrm.cache.verify, embrm.cache.listing
import embrm.adoption.run, embrm.training.bank, embrm.sweeps.execute, embrm.reports.run
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom embrm.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'polars', 'pyarrow', 'transformers', 'matplotlib', 'pydantic'}\n"
        "print(heavy & set(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()", done.stderr
