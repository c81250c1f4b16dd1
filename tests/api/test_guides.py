"""docs/python.md, docs/first-steps.ipynb and docs/extending.md, run as a reader would run them."""

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from extract_world import write_pairs
from nbclient import NotebookClient
from small_demo import RECIPE, SMALL_SWEEP, WORLD
from toy_cache import toy_cache

import embrm
from embrm.extraction import engines
from embrm.suites.registry import SUITES
from embrm.training.heads import HEADS

DOCS = Path(__file__).parents[2] / "docs"

pytestmark = pytest.mark.filterwarnings("ignore:torch has multiplied matrices")


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """What follows "python" on the fence, and the code, of every Python block of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    yield from re.findall(r"```python ?([\w-]*)\n(.*?)```", text, re.DOTALL)


def test_every_line_of_the_guide_runs(world: dict[str, str], tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    pairs = write_pairs(tmp_path / "pairs.jsonl", prompts=60)
    with contextlib.chdir(tmp_path):
        for info, code in blocks("python.md"):
            exec(code, names)
            if info == "network":  # what the reader names there is replaced by what is here
                names |= {"model": world["model"], "data": [str(pairs)]}
    assert names["found"].pairs.height
    assert (tmp_path / "rewards" / "mine" / "config.json").exists()


@pytest.fixture(scope="module")
def beside_a_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from embrm.demo.run import demo

    folder = tmp_path_factory.mktemp("notebook")
    out = folder / "runs" / "demo"
    out.mkdir(parents=True)
    (out / "demo.toml").write_text(SMALL_SWEEP)
    with contextlib.chdir(folder):
        demo(Path("runs/demo"), WORLD, RECIPE)
    return folder


def test_the_notebook_runs(beside_a_demo: Path) -> None:
    """In a real kernel, whose worker processes cannot import what a cell defines."""
    notebook = nbformat.read(DOCS / "first-steps.ipynb", as_version=4)
    resources = {"metadata": {"path": str(beside_a_demo)}}
    done = NotebookClient(notebook, timeout=300, resources=resources).execute()
    assert (beside_a_demo / "runs" / "notebook" / "ranked.png").read_bytes().startswith(b"\x89PNG")
    assert any(cell.get("outputs") for cell in done.cells)


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(DOCS / "first-steps.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path that holds the modules of docs/extending.md."""
    for name, code in blocks("extending.md"):
        if name.startswith("my_"):
            (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    # Put back after an addition:
    monkeypatch.setattr(engines, "ENGINES", engines.ENGINES)
    monkeypatch.setitem(SUITES, "topics", SUITES["hhh"])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def test_every_addition_of_the_guide_works(own_modules: Path, world: dict[str, str]) -> None:
    cache = embrm.open_cache(toy_cache(own_modules / "cache" / "toy", token_rows=4))
    names: dict[str, Any] = {
        "embrm": embrm, "cache": cache, "model": world["model"], "data": [world["data"]],
    }  # fmt: skip
    used = [name for name, code in blocks("extending.md") if name.startswith("uses-")]
    assert {*used} == {
        f"uses-{part}" for part in ("loss", "head", "regularizer", "suite", "engine")
    }
    runs = {}
    for name, code in blocks("extending.md"):
        if name.startswith("uses-"):
            exec(code, names)
            runs[name] = names.get("run")
    assert runs["uses-loss"].spec.loss == "focal"
    assert runs["uses-head"].weights["signs.weight"].shape == (1, 24)
    assert runs["uses-regularizer"].curve["regularizer"].is_not_null().all()
    assert names["made"].identity["engine"] == "one-by-one"
    [pair] = names["topics"].pairs.to_dicts()
    assert (pair["split"], pair["subset"]) == ("ood/topics", "water")
    usual = embrm.extract(model=world["model"], data=[world["data"]], out="cache/usual")
    assert names["made"].states("last") == pytest.approx(usual.states("last"), rel=1e-4, abs=1e-5)


def test_a_sweep_with_parts_of_ones_own_is_trained_by_workers_and_replayed(
    own_modules: Path,
) -> None:
    toy_cache(own_modules / "cache" / "toy")
    import my_heads  # type: ignore[import-not-found]
    import my_losses  # type: ignore[import-not-found]

    assert my_heads.describe(None) == "signs"
    spec = {
        "baseline": "focal",
        "seeds": [0],
        "defaults": {"epochs": 2},
        "runs": [
            {"name": "focal", "loss": "focal"},
            {"name": "signs", "head": {"kind": "signs"}},
            {"name": "bt"},
        ],
    }
    results = embrm.sweep(spec, "cache/toy", out="sweeps/own", jobs=2)
    recorded = dict(results.ledger.select("config", "extensions").rows())
    assert recorded["bt"] is None
    assert '"module":"my_losses"' in recorded["focal"]
    assert all(run.same_bits for run in embrm.replay("sweeps/own").runs)
    assert results.scores("signs@0").height
    # Another source under the same name is another loss.
    path = Path(my_losses.__file__)
    path.write_text(path.read_text().replace("return -", "return -2 * "))
    del sys.modules["my_losses"]
    import my_losses as changed  # type: ignore[import-not-found]  # noqa: F401

    with pytest.raises(embrm.UserError, match="loss focal of module my_losses is another"):
        embrm.replay("sweeps/own", run="focal@0")
    again = embrm.sweep(spec, "cache/toy", out="sweeps/own", jobs=1)
    ids = [dict(r.ledger.select("config", "run_id").rows()) for r in (results, again)]
    assert ids[0]["focal"] != ids[1]["focal"]
    assert ids[0]["bt"] == ids[1]["bt"]


def test_what_workers_could_not_import_is_refused_by_a_sweep(tmp_path: Path) -> None:
    code = "def own(chosen, rejected):\n    return (rejected - chosen).exp()\n"
    path = tmp_path / "cell.py"
    path.write_text(code)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, str(path), "exec"), names)
    function = names["own"]
    function.__module__ = "__main__"
    embrm.register_loss("own-of-a-cell", function)
    cache = toy_cache(tmp_path / "cache")
    spec = {"baseline": "a", "runs": [{"name": "a", "loss": "own-of-a-cell", "epochs": 1}]}
    with pytest.raises(embrm.UserError, match="move it to a module"):
        embrm.sweep(spec, cache, out=tmp_path / "sweep")
    assert embrm.train(cache, {"loss": "own-of-a-cell", "epochs": 1}).status == "ok"


def test_built_in_names_cannot_be_taken() -> None:
    with pytest.raises(embrm.UserError, match="loss 'bt' is built in"):
        embrm.register_loss("bt", lambda chosen, rejected: rejected - chosen)
    with pytest.raises(embrm.UserError, match="use letters, digits"):
        embrm.register_loss("a b", lambda chosen, rejected: rejected - chosen)


def test_a_loss_is_a_function_of_two_arguments() -> None:
    def one(chosen: Any) -> Any:
        return chosen

    def two(chosen: Any, rejected: Any) -> Any:
        return rejected - chosen

    with pytest.raises(embrm.UserError, match=r"arguments \(chosen.*called with 2"):
        embrm.register_loss("one-argument", one)
    with pytest.raises(embrm.UserError, match="is a partial: write it with def"):
        embrm.register_loss("a-partial", functools.partial(two))
    with pytest.raises(embrm.UserError, match="'empty' lacks check, .*EXPORTED"):  # noqa: RUF043
        embrm.register_head("empty", functools)  # type: ignore[arg-type]


def test_a_regularizer_has_one_function_of_the_right_arguments() -> None:
    def of_position(tokens: Any, moved: Any) -> Any:
        return tokens.changes(moved).sum(1)

    for kind, problem in (
        (embrm.RegularizerKind(), "neither of of_pair and of_position: give one"),
        (embrm.RegularizerKind(of_position, of_position), "has both of"),
        (embrm.RegularizerKind(of_pair=of_position), "called with 5"),
        (embrm.RegularizerKind(of_position=functools.partial(of_position)), "write it with def"),
    ):
        with pytest.raises(embrm.UserError, match=problem):
            embrm.register_regularizer("mine", kind)


class _Doubled:
    """A head of one's own that names its parameter as the linear head does."""

    EXPORTED = False

    def check(self, spec: Any) -> None: ...

    def describe(self, spec: Any) -> str:  # noqa: ARG002
        return "doubled"

    def owns(self, parameters: Any) -> bool:
        return set(parameters) == {"output.weight"}

    def initialise(self, spec: Any, width: int, random: np.random.Generator) -> Any:  # noqa: ARG002
        return {"output.weight": torch.zeros(1, width)}

    def rewards(self, parameters: Any, X: Any, kept: Any, shift: Any) -> Any:  # noqa: ARG002
        return 2 * (X @ parameters["output.weight"].T).T

    def fold(self, parameters: Any) -> None: ...


def test_a_head_with_the_parameters_of_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HEADS, "_parts", dict(HEADS))
    monkeypatch.setattr(HEADS, "_sources", {})
    embrm.register_head("doubled", _Doubled())
    cache = toy_cache(tmp_path / "cache")
    with pytest.raises(embrm.UserError, match="owned by linear and doubled"):
        embrm.train(cache, {"head": {"kind": "doubled"}, "epochs": 1})
