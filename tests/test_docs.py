"""Documentation that cannot drift: the command reference is the help, and blocks are run.

A fenced block's info string says what its commands need:
    ```bash            run by this suite, in the folder of a finished (shrunken) demo
    ```bash network    needs a hub, a GPU or minutes: only its options are checked
    ```bash setup      make targets and installation, run by hand and by CI
    ```toml finetune   a spec that commands read: its first line names the file
`python tests/test_docs.py` (make docs) rewrites docs/commands.md and docs/specs.md.
"""

import ast
import contextlib
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from small_demo import RECIPE, SMALL_SWEEP, WORLD
from typer.testing import CliRunner

import embrm
from embrm.adoption.run import adopt
from embrm.adoption.spec import AdoptSpec, ArraySource
from embrm.cache.verify import verify
from embrm.cli import app, main
from embrm.core.specs import Spec, read_toml
from embrm.data.groups import PairRule
from embrm.data.scenarios import Scenarios
from embrm.data.sources import SourceSpec
from embrm.data.splits import Holdout
from embrm.demo.run import demo
from embrm.extraction.dry_run import dry_run
from embrm.extraction.spec import ExtractSpec
from embrm.finetuning.contrast import SimcseSpec
from embrm.finetuning.meta import MetaSpec
from embrm.finetuning.spec import FinetuneRun, FinetuneSpec, LoraSpec
from embrm.sweeps.spec import MatchSpec, RunSpec, SweepSpec, configurations
from embrm.training.heads import AdapterSpec, HeadSpec
from embrm.training.learner_specs import GradientBoosting, Logistic, Ridge
from embrm.training.regularizers import Regularizer

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    ["extract"], ["cache", "adopt"], ["cache", "ls"], ["cache", "show"], ["cache", "verify"],
    ["cache", "merge"], ["cache", "probe"], ["sweep"], ["finetune"], ["confirm"], ["replay"],
    ["report"], ["bon"], ["scores"], ["suite"], ["suites"], ["labels", "annotate"],
    ["labels", "strength"], ["labels", "remedy"], ["labels", "show"], ["export"], ["score"],
    ["demo"], ["bench", "cache"], ["bench", "adopt"], ["bench", "sweep"], ["bench", "grm"],
    ["bench", "extract"], ["bench", "finetune"], ["bench", "evaluate"],
]  # fmt: skip
SPECS = {
    "Extraction": ExtractSpec,
    "Extraction: `[[data]]`": SourceSpec,
    "Extraction: `pairs` of `[[data]]`": PairRule,
    "Extraction: `holdout` of `[[data]]`": Holdout,
    "Adoption": AdoptSpec,
    "Adoption: `[[arrays]]`": ArraySource,
    "Sweep": SweepSpec,
    "Sweep: `scenarios`": Scenarios,
    "Sweep: `[defaults]` and `[[runs]]`": RunSpec,
    "Sweep: `head`": HeadSpec,
    "Sweep: `head.adapter`": AdapterSpec,
    "Sweep: `regularizer`": Regularizer,
    "Sweep: `match`": MatchSpec,
    "Sweep: `learner`, logistic": Logistic,
    "Sweep: `learner`, ridge": Ridge,
    "Sweep: `learner`, gradient_boosting": GradientBoosting,
    "Fine-tune": FinetuneSpec,
    "Fine-tune: `[lora]`": LoraSpec,
    "Fine-tune: `[defaults]` and `[[runs]]`": FinetuneRun,
    "Fine-tune: `simcse`": SimcseSpec,
    "Fine-tune: `metarm`": MetaSpec,
}
INHERITED = {FinetuneSpec: SweepSpec, FinetuneRun: RunSpec}
"""Its keys are those of the other too, which has a table of its own."""
BESIDE = {
    "Extraction": "| `out` | str | not given | Cache folder to write, such as cache/NAME. Required "
    "here or as the option --out, which takes precedence. |"
}
"""Rows of keys that a file may have beside the spec's own."""
QUICKSTART = ROOT / "docs" / "quickstart.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _help(command: list[str]) -> str:
    result = CliRunner().invoke(
        app, [*command, "--help"], prog_name="embrm", terminal_width=100, env={"COLUMNS": "100"}
    )
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def reference() -> str:
    """The text of docs/commands.md."""
    parts = ["# Commands\nWritten by `make docs` from the commands' own help.\n"]
    parts += [f"## embrm {' '.join(name)}\n```text\n{_help(name)}\n```\n" for name in COMMANDS]
    return "\n".join(parts)


def _type(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"(embrm|typing)(\.\w+)*\.", "", text).replace("|", "\\|")


def spec_reference() -> str:
    """The text of docs/specs.md: every key of the TOML specs, with its type and default."""
    parts = ["# Spec keys\nWritten by `make docs` from the specs themselves.\n"]
    for title, model in SPECS.items():
        beside = "Keys of its own, beside those of a sweep.\n\n" if model in INHERITED else ""
        parts.append(f"## {title}\n{beside}| key | type | default | meaning |\n|---|---|---|---|")
        hints = get_type_hints(model)  # without pydantic's constraints
        inherited = INHERITED[model].model_fields if model in INHERITED else {}
        for name, field in model.model_fields.items():
            if name in inherited:
                continue
            default = "required" if field.is_required() else _default(field)
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            parts.append(f"| `{name}` | {_type(hints[name])} | {default} | {meaning} |")
        parts += [BESIDE[title]] if title in BESIDE else []
        parts.append("")
    return "\n".join(parts)


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "not given"
    return "`{}`" if isinstance(value, Spec) else f"`{json.dumps(value)}`"


def test_the_spec_reference_is_the_specs() -> None:
    assert (ROOT / "docs" / "specs.md").read_text() == spec_reference(), "run `make docs`"


def test_the_command_reference_is_the_help() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == reference(), "run `make docs`"


def test_the_reference_covers_every_command() -> None:
    listed = {name[0] for name in COMMANDS}
    in_help = set(re.findall(r"^  (\w+) ", _help([]).split("Commands:")[1], re.MULTILINE))
    assert listed == in_help


def _commands(needs: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for info, body in re.findall(r"```bash ?(\w*)\n(.*?)```", page.read_text(), re.DOTALL):
            if info == needs:
                joined = body.replace("\\\n", " ")
                lines = [line.split(" #")[0].strip() for line in joined.splitlines()]
                found += [(page.name, line) for line in lines if line.startswith("embrm ")]
    return found


@pytest.mark.parametrize(("page", "command"), _commands("network"))
def test_options_of_commands_that_need_a_network_exist(page: str, command: str) -> None:
    words = shlex.split(command)[1:]
    name = next(known for known in COMMANDS if words[: len(known)] == known)
    text = _help(name)
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", text), f"{page}: {word} is not an option of {name}"


@pytest.fixture(scope="module")
def beside_a_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds runs/demo, finished but small."""
    folder = tmp_path_factory.mktemp("docs")
    out = folder / "runs" / "demo"
    out.mkdir(parents=True)
    (out / "demo.toml").write_text(SMALL_SWEEP)
    with contextlib.chdir(folder):
        demo(Path("runs/demo"), WORLD, RECIPE)
    for _, text in _toml_blocks(" finetune"):
        (folder / text.splitlines()[0].removeprefix("# ")).write_text(text)
    with contextlib.chdir(folder):
        for text in re.findall(r"```python\n(.*?)```", QUICKSTART.read_text(), re.DOTALL):
            exec(text, {})
    return folder


@pytest.mark.slow
def test_commands_of_the_docs_run(
    beside_a_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(beside_a_demo)
    commands = _commands("")
    assert commands
    for page, command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        code = None
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        assert not code, f"{page}: {command}: {capsys.readouterr().err}"


def _toml_blocks(info: str) -> list[tuple[str, str]]:
    return [
        (page.name, body)
        for page in PAGES
        for body in re.findall(rf"```toml{info}\n(.*?)```", page.read_text(), re.DOTALL)
    ]


@pytest.mark.parametrize(("page", "text"), _toml_blocks(""))
def test_sweep_specs_of_the_docs_are_valid(page: str, text: str) -> None:
    assert configurations(SweepSpec.parse(tomllib.loads(text), page), page)


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.toml")), ids=lambda p: p.name)
def test_tracked_sweep_specs_are_valid(path: Path) -> None:
    values = read_toml(path)
    if "runs" in values:
        assert configurations(SweepSpec.parse(values, path.name), path.name)
    else:  # how embrm confirm fine-tunes the runs that it is told
        asked = FinetuneSpec.parse(values | {"baseline": "a", "runs": [{"name": "a"}]}, path.name)
        assert configurations(asked, path.name)


def test_extraction_specs_of_the_docs_run(
    beside_a_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(beside_a_demo)
    blocks = _toml_blocks(" extract")
    assert blocks
    for page, text in blocks:
        values = tomllib.loads(text)
        assert dry_run(
            ExtractSpec.parse({k: v for k, v in values.items() if k != "out"}, page)
        ).tokens


def test_benchmarks_of_the_docs_are_known() -> None:
    [(page, text)] = _toml_blocks(" benchmarks")
    values = tomllib.loads(text)
    spec = ExtractSpec.parse({k: v for k, v in values.items() if k != "out"}, page)
    assert [source.split for source in spec.data] == ["ood/reward-bench", "ood/rm-bench"]


def test_specs_of_data_that_are_not_here_are_valid() -> None:
    [(page, text)] = _toml_blocks(" groups")
    assert len(ExtractSpec.parse(tomllib.loads(text), page).data) == 3


def test_adoption_specs_of_the_docs_run(
    beside_a_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(beside_a_demo)
    [(page, text)] = _toml_blocks(" adopt")
    out = adopt(AdoptSpec.parse(tomllib.loads(text), page), Path("cache/adopted-by-spec"))
    assert verify(out) == []


def test_python_of_the_docs_uses_the_public_api() -> None:
    for page in PAGES:
        for text in re.findall(r"```python.*\n(.*?)```", page.read_text(), re.DOTALL):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "embrm":
                    assert node.attr in embrm.__all__, f"{page.name}: embrm.{node.attr}"


def test_links_of_the_docs_lead_somewhere() -> None:
    folders = (ROOT, ROOT / "docs", ROOT / "sweeps", ROOT / "cache")
    for page in sorted(page for folder in folders for page in folder.glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


if __name__ == "__main__":
    (ROOT / "docs" / "commands.md").write_text(reference())
    (ROOT / "docs" / "specs.md").write_text(spec_reference())
    sys.exit(0)
