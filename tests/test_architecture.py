"""The rules of CONTRIBUTING.md that can be checked by reading the code."""

import ast
import graphlib
import re
import subprocess
import sys
from collections import defaultdict
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


def test_the_readme_shows_the_rooms_of_the_table() -> None:
    shown = re.findall(r"^  (\w+)/ ", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert shown == [*ROOMS]


def _imports_on_loading(body: list[ast.stmt]) -> Iterator[str]:
    """Modules, and names that may be modules, that are imported when the module is."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield str(node.module)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif isinstance(node, ast.If | ast.Try):
            yield from _imports_on_loading([*node.body, *node.orelse])


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    graph = {
        name: set(_imports_on_loading(ast.parse(path.read_text()).body)) & set(modules)
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_function_is_long() -> None:
    long = {
        f"{node.name} of {path.relative_to(PACKAGE)}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 100  # type: ignore[operator]
    }
    assert not long


def test_a_public_name_has_one_meaning_in_all_rooms() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places[node.name].append(path.relative_to(PACKAGE).parts[0])
    shared = {
        name: rooms
        for name, rooms in places.items()
        if len({*rooms} - {"api", "cli", "__init__.py", "__main__.py"}) > 1
    }
    assert not shared


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not {"utils", "util", "helpers", "misc"} & {path.stem for path in PACKAGE.rglob("*.py")}


def test_tests_are_arranged_like_the_package() -> None:
    folders = {path.parent.relative_to(ROOT / "tests").parts[:1] for path in _tests()}
    assert {folder[0] for folder in folders if folder} <= {*ROOMS, "with_vllm"}


def test_no_test_file_imports_another() -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _tests()
        for name in _imports(path)
        if any(part.startswith("test_") for part in name.split("."))
    }
    assert not wrong


def _tests() -> list[Path]:
    return [*(ROOT / "tests").rglob("test_*.py")]


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
