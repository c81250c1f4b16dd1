"""Confirming a sweep end to end on a tiny language model, resumed; and what its spec may say."""

import json
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from small_finetune import made
from small_stage import small_stage

import embrm.finetuning.confirm
from embrm.cli import main
from embrm.core.errors import UserError
from embrm.data.groups import PairRule
from embrm.data.scenarios import Scenarios
from embrm.finetuning.choice import choose, rank
from embrm.finetuning.confirm import confirm, finetune_values
from embrm.finetuning.finetuner import Finetuner
from embrm.finetuning.run import RunsFailedError
from embrm.finetuning.spec import FinetuneSpec
from embrm.results.ledger import open_results
from embrm.sweeps.execute import sweep

SWEEP = """
baseline = "bt[lr=0.01]"
seeds = [0, 1, 2]
validation = 0.2
[defaults]
epochs = 3
batch_pairs = 16
lr = 0.01
[[runs]]
name = "bt"
grid = { lr = [0.01, 0.1] }
[[runs]]
name = "bsr"
bsr = 0.1
[[runs]]
name = "hinge"
loss = "hinge"
[[runs]]
name = "logitnorm"
loss = "logitnorm"
preprocess = "center"
[[runs]]
name = "plain"
preprocess = "standardize"
"""
FULL = """
seeds = [3, 4]
tune = "lora"
lora = { rank = 2, alpha = 4.0 }
[defaults]
epochs = 1
batch_pairs = 8
lr = 0.003
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a tiny model and a finished sweep of it, `swept`."""
    folder = tmp_path_factory.mktemp("confirm")
    made(folder)
    (folder / "swept.toml").write_text(SWEEP)
    sweep(folder / "swept.toml", folder / "cache", jobs=1)
    (folder / "full.toml").write_text(FULL)
    return folder


@contextmanager
def training_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the runs that a fine-tune trains meanwhile."""
    trained: list[str] = []
    finish = Finetuner.finish

    def counted(self: Any, run: Any) -> None:
        trained.append(f"{run.name}@{run.spec.seed}")
        finish(self, run)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "finish", counted)
        yield trained


@pytest.mark.slow
def test_a_sweep_is_confirmed_and_what_is_done_is_not_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "tuned"
    with training_counted(monkeypatch) as trained:
        confirm(folder / "swept", "baseline,bsr", folder / "full.toml", out=out)
    assert sorted(trained) == ["bsr@3", "bsr@4", "bt[lr=0.01]@3", "bt[lr=0.01]@4"]

    command = ["confirm", folder / "swept", "--runs", "baseline,bsr,hinge,bt[lr=0.1],plain"]
    command += ["--spec", folder / "full.toml", "--out", out, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["embrm", *map(str, command)])
    with training_counted(monkeypatch) as trained, pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert trained == ["hinge@3", "hinge@4"]  # only what is new
    shown = capsys.readouterr().out
    assert "Frozen against fine-tuned ranking, 5 configurations" in shown
    assert "n/a: 3 fine-tuned configurations: it needs 4." in " ".join(shown.split())

    content = json.loads((out / "confirm.json").read_text())
    full = {match["name"]: match["full"] for match in content["matches"]}
    assert full == {
        "bt[lr=0.01]": "bt[lr=0.01]",
        "bt[lr=0.1]": "bt[lr=0.01]",
        "plain": "bt[lr=0.01]",
        "bsr": "bsr",
        "hinge": "hinge",
    }
    results = open_results(out)
    assert results.ledger.height == 6
    runs = {row["config"]: json.loads(row["spec"]) for row in results.ledger.iter_rows(named=True)}
    assert (runs["bsr"]["bsr"], runs["bsr"]["bsr_batch"]) == (0.1, 16)
    assert {(run["lr"], run["batch_pairs"], run["epochs"]) for run in runs.values()} == {
        (0.003, 8, 1)
    }
    # The points are the two ledgers' own means over seeds.
    for stage, own in (("frozen", open_results(folder / "swept")), ("full", results)):
        expected = own.ledger.filter(config="hinge")["accuracy@id"].mean()
        point = next(
            row
            for row in content["points"]
            if (row["split"], row["metric"], row["name"]) == ("id", "accuracy", "hinge")
        )
        assert point[f"{stage}_estimate"] == pytest.approx(expected, abs=1e-6)


def test_a_run_that_fails_is_told_and_the_others_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The fine-tune itself is stood in for: its results are there but for one configuration's."""
    skills = {"bt": 0.6, "hinge": 0.7, "bsr": 0.8}
    specs: dict[str, dict[str, Any]] = {"hinge": {"loss": "hinge"}, "bsr": {"bsr": 0.1}}
    frozen = small_stage(tmp_path / "s", skills, specs)
    cache_id = open_results(folder / "swept").cache_id
    header = json.loads((frozen / "sweep.json").read_text()) | {"cache_id": cache_id}
    (frozen / "sweep.json").write_text(json.dumps(header))

    def fails(*_: object, out: Path, device: str) -> Path:
        assert device == "cpu"
        (out / "finetune.toml").unlink()
        out.rmdir()
        small_stage(out, {"bt": 0.6, "hinge": 0.7}, specs, stage=1, cache_id=cache_id)
        raise RunsFailedError("1 of 3 runs failed: bsr seed 3: its loss is nan")

    monkeypatch.setattr(embrm.finetuning.confirm, "finetune", fails)
    (tmp_path / "full.toml").write_text("seeds = [3]")
    with pytest.raises(UserError, match=r"1 of 3 runs failed: .*; the others are compared in"):
        confirm(
            frozen, "top:3", tmp_path / "full.toml", folder / "cache", out=tmp_path / "o",
            device="cpu",
        )  # fmt: skip
    content = json.loads((tmp_path / "o" / "confirm.json").read_text())
    assert [match["name"] for match in content["matches"]] == ["hinge", "bt"]
    assert content["untuned"] == [
        {"name": "bsr", "rank": 1, "reason": "its fine-tune has not finished"}
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'baseline = "bt"',
            r"full.toml: baseline: the sweep and runs \(--runs\) say which: remove it",
        ),
        ('[[runs]]\nname = "x"', r"full.toml: runs: the sweep and runs \(--runs\) say which"),
        ('[defaults]\nloss = "hinge"', r"defaults\.loss: the sweep's configurations settle it"),
        ("[defaults]\npairs_limit = 9", r"defaults\.pairs_limit: .*: remove it, defaults may"),
        ('train = ["tran"]', r"train = \['tran'\], and the sweep has \('train',\): remove it"),
        ("scenarios = {}", r"scenarios = \{\}, and the sweep has None: remove it"),
        ("validation = 0.3", r"validation = 0\.3, and the sweep has 0\.2: remove it"),
        (
            'evaluate = ["idd"]',
            "evaluate names 'idd', which the sweep has not .*: did you mean 'id",
        ),
        ('tune = "half"', "full.toml: tune = 'half'"),
        ("seeds = []", "full.toml: seeds = "),
        ("sedes = [1]", "unknown key 'sedes': did you mean 'seeds'"),
        ("defaults = 3", "full.toml: defaults = 3"),
    ],
)
def test_a_spec_that_says_what_the_sweep_settles_is_one_line(
    folder: Path, text: str, message: str
) -> None:
    results = open_results(folder / "swept")
    choice = choose(results, rank(results, None), "top:3,baseline")
    with pytest.raises(UserError, match=message) as error:
        finetune_values(results, choice, tomllib.loads(text), "full.toml")
    assert "\n" not in str(error.value)


def test_a_missing_spec_and_another_cache_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no spec at"):
        confirm(folder / "swept", "top:3,baseline", tmp_path / "none.toml")
    other = made(tmp_path / "other", prompts=12)
    with pytest.raises(UserError, match="but the run was trained on"):
        confirm(folder / "swept", "top:3,baseline", folder / "full.toml", other)
    assert not (folder / "full").exists()


def test_the_sweeps_own_folder_is_not_written_to(folder: Path) -> None:
    before = sorted((folder / "swept").rglob("*"))
    spec = folder / "swept" / ".." / "swept.toml"  # whose default is the sweep's folder
    for out in (None, folder / "tuned" / ".." / "swept"):
        with pytest.raises(UserError, match="is the sweep's own folder: name another") as error:
            confirm(folder / "swept", "baseline,bsr", spec, out=out)
        assert "\n" not in str(error.value)
    assert sorted((folder / "swept").rglob("*")) == before


def test_the_sweeps_data_and_the_specs_own_settings_are_both_there(folder: Path) -> None:
    results = open_results(folder / "swept")
    choice = choose(results, rank(results, None), "baseline,bsr")
    values = finetune_values(results, choice, tomllib.loads(FULL), "full.toml")
    assert values["train"] == ["train"]
    assert values["evaluate"] == ["id"]
    assert values["validation"] == 0.2
    assert values["baseline"] == "bt[lr=0.01]"
    assert values["seeds"] == [3, 4]
    assert values["tune"] == "lora"
    assert {run["name"] for run in values["runs"]} == {"bsr", "bt[lr=0.01]"}
    assert tomllib.loads(tomli_w.dumps(values)) == values


def test_what_a_sweep_divides_is_divided_alike_in_the_fine_tune(folder: Path) -> None:
    results = open_results(folder / "swept")
    rule = Scenarios(prompts=0.3, pairs=PairRule(gap=0.5), cross_prompt=True)
    divided = replace(results, spec=results.spec.model_copy(update={"scenarios": rule}))
    choice = choose(results, rank(results, None), "baseline,bsr")
    values = finetune_values(divided, choice, tomllib.loads(FULL), "full.toml")
    written = tomllib.loads(tomli_w.dumps(values))
    assert FinetuneSpec.parse(written, "finetune.toml").scenarios == rule
    other = tomllib.loads(FULL) | {"scenarios": {"prompts": 0.4}}
    with pytest.raises(UserError, match=r"scenarios = .*0\.4.*, and the sweep has .*0\.3"):
        finetune_values(divided, choice, other, "full.toml")
