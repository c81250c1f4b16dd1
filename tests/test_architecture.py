"""The house stays easy to read: imports run one way, and the sweep needs no language model."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "embrm"

# What each room may import, besides itself. The order is the flow of data.
GROUND = {"errors", "files", "specs", "progress", "provenance"}
MAY_IMPORT = {
    "data": GROUND,
    "cache": GROUND,
    "extract": GROUND | {"data", "cache"},
    "adopt": GROUND | {"data", "cache"},
    "train": GROUND,
    "evaluate": GROUND,
    "sweep": GROUND | {"data", "cache", "train", "evaluate"},
    "report": GROUND | {"cache", "evaluate", "sweep"},
    "finetune": GROUND | {"data", "cache", "extract", "train", "evaluate", "sweep", "report"},
    "export": GROUND
    | {"data", "cache", "extract", "train", "evaluate", "sweep", "report", "finetune"},
    "bench": GROUND
    | {"data", "cache", "extract", "adopt", "train", "evaluate", "sweep", "finetune"},
    "demo": GROUND | {"data", "extract", "sweep", "evaluate", "report", "export"},
}
MAY_IMPORT["cli"] = GROUND.union(*MAY_IMPORT.values(), MAY_IMPORT, {"interrupts"})
LANGUAGE_MODEL_LIBRARIES = {
    "transformers", "vllm", "trl", "peft", "accelerate", "datasets", "tokenizers",
}  # fmt: skip
MAY_LOAD_MODELS = {"extract", "finetune", "export", "demo"}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "embrm":
                yield from (f"embrm.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_run_one_way(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room, "__version__"}
    wrong = {
        f"{path.name} imports {name}"
        for path in (PACKAGE / room).rglob("*.py")
        for name in _imports(path)
        if name.startswith("embrm.") and name.split(".")[1] not in allowed
    }
    assert not wrong


def test_every_room_has_a_rule() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(MAY_IMPORT)


def test_language_model_libraries_stay_in_their_rooms() -> None:
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        for name in _imports(path)
        if name.split(".")[0] in LANGUAGE_MODEL_LIBRARIES
        and path.relative_to(PACKAGE).parts[0] not in MAY_LOAD_MODELS
        # The hub reader of preference data, inside the function that needs it.
        and not (name == "datasets" and path.name == "sources.py")
        # The models that extraction and fine-tuning are measured with, likewise.
        and path.relative_to(PACKAGE).as_posix()
        not in ("bench/extraction.py", "bench/finetuning.py")
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
            assert path == PACKAGE / "adopt" / "arrays.py", path


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
import embrm.adopt.run, embrm.train.bank, embrm.sweep.execute, embrm.report.run
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
