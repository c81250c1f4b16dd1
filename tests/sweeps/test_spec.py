"""Grids: expansion, names, content ids, and one-line refusals."""

from pathlib import Path
from typing import Any

import pytest

from embrm.core.errors import UserError
from embrm.core.specs import read_toml
from embrm.sweeps.spec import Configuration, Selection, SweepSpec, configurations, runs

SELECTION = Selection("cache", ("train",), 0.1)


def _configurations(text: str, tmp_path: Path) -> list[Configuration]:
    path = tmp_path / "s.toml"
    path.write_text(text)
    return configurations(SweepSpec.parse(read_toml(path), "s.toml"), "s.toml")


def test_a_grid_is_a_product_over_defaults(tmp_path: Path) -> None:
    found = _configurations(
        """
        baseline = "bt"
        defaults = { lr = 0.01, epochs = 3, head = { kind = "mlp", widths = [8] } }
        [[runs]]
        name = "bt"
        head = { kind = "linear" }
        [[runs]]
        name = "bsr"
        epochs = 5
        [runs.grid]
        bsr = [0.01, 1e-4]
        "head.widths" = [[64], [64, 32]]
        """,
        tmp_path,
    )
    assert [c.name for c in found] == [
        "bt",
        "bsr[bsr=0.01,widths=64]",
        "bsr[bsr=0.01,widths=64-32]",
        "bsr[bsr=0.0001,widths=64]",
        "bsr[bsr=0.0001,widths=64-32]",
    ]
    assert str(found[0].spec.head) == "linear"
    assert [str(c.spec.head) for c in found[1:3]] == ["mlp 64", "mlp 64-32"]
    assert [c.spec.epochs for c in found] == [3, 5, 5, 5, 5]
    assert {c.spec.lr for c in found} == {0.01}


def _ids(text: str, tmp_path: Path, selection: Selection = SELECTION) -> dict[str, str]:
    found = _configurations('baseline = "a"\n' + text, tmp_path)
    return {
        f"{run.name} {run.spec.seed}": run.run_id
        for run in runs(found, (0, 1), selection, "native")
    }


def test_ids_depend_on_content_alone(tmp_path: Path) -> None:
    first = _ids('[[runs]]\nname = "a"\nlr = 1\n[[runs]]\nname = "b"\nbsr = 0.1', tmp_path)
    # other order, other spelling, a default instead of a field
    second = _ids(
        'defaults = { bsr = 0.1 }\n[[runs]]\nname = "b"\n[[runs]]\nname = "a"\nlr = 1.0\nbsr = 0',
        tmp_path,
    )
    assert first == second
    assert len(set(first.values())) == 4
    renamed = _ids('[[runs]]\nname = "a"\nbsr = 0.1', tmp_path)
    assert renamed["a 0"] == first["b 0"]
    other = [
        _ids('[[runs]]\nname = "a"\nlr = 1', tmp_path, selection)["a 0"]
        for selection in (
            SELECTION,
            Selection("other", ("train",), 0.1),
            Selection("cache", ("id",), 0.1),
            Selection("cache", ("train",), 0.2),
        )
    ]
    assert other[0] == first["a 0"]
    assert len(set(other)) == 4


def test_seeds_share_a_configuration(tmp_path: Path) -> None:
    found = _configurations('baseline = "a"\n[[runs]]\nname = "a"', tmp_path)
    three = runs(found, (0, 1, 7), SELECTION, "native")
    assert [run.spec.seed for run in three] == [0, 1, 7]
    assert len({run.config_id for run in three}) == 1
    assert len({run.run_id for run in three}) == 3


TOP = 'baseline = "a"\n'
A = '[[runs]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("baselin = 'a'\n" + TOP + A, "unknown key 'baselin': did you mean 'baseline'?"),
        (A, "baseline is missing"),
        (TOP, "runs is missing"),
        (TOP + "runs = []", "runs = "),
        (TOP + "[[run]]\nname = 'a'", "s.toml: unknown key 'run': did you mean 'runs'?"),
        ("epochs = 3\n" + TOP + A, "s.toml: epochs is a key of runs: write it below [defaults]"),
        ("learning_rate = 3\n" + TOP + A, "unknown key 'learning_rate': did you mean 'lr', a key"),
        ("seed = 3\n" + TOP + A, "unknown key 'seed': did you mean 'seeds'?"),
        (TOP + A + "scenarios = {}", "run 'a': scenarios is a key of the whole spec: write it at"),
        (TOP + A + "learning_rate = 1", "unknown key 'learning_rate': did you mean 'lr'?"),
        (TOP + A + "num_train_epochs = 1", "'num_train_epochs': did you mean 'epochs'?"),
        (TOP + A + "warmup_ratio = 0.1", "unknown key 'warmup_ratio': did you mean 'warmup'?"),
        (
            TOP + A + "per_device_train_batch_size = 8",
            "unknown key 'per_device_train_batch_size': did you mean 'batch_pairs'?",
        ),
        (
            TOP + A + "center_rewards_coefficient = 0.1",
            "unknown key 'center_rewards_coefficient': did you mean 'centering'?",
        ),
        ("seeds = 3\n" + TOP + A, "seeds = 3: write a list, such as seeds = [0, 1, 2]"),
        ("train = 'a'\n" + TOP + A, "train = 'a': write a list, such as train = [\"train\"]"),
        (TOP + "runs = 3", "runs = 3: write tables, [[runs]]"),
        ("scenarios = 3\n" + TOP + A, "scenarios = 3: write a table with keys of splits, prompts"),
        (
            TOP + A + "head = 'mlp'",
            "head = 'mlp': write a table, such as head = { kind = \"mlp\", widths = [64] }",
        ),
        (
            TOP + A + "learner = 'ridge'",
            "learner = 'ridge': write a table, such as learner = { kind = \"ridge\" }",
        ),
        (
            TOP + A + "learner = { kind = 'rigde' }",
            "its kind must be one of 'logistic', 'ridge', 'gradient_boosting'",
        ),
        (TOP + A + "learner = {}", "learner = {}: 'kind' is missing in it: add it"),
        (TOP + A + "head = { kind = 'mlp', widths = 64 }", "such as widths = [64]"),
        (TOP + A + "epochs = 1.5", "epochs = 1.5: write a whole number, such as epochs = 10"),
        (TOP + A + "bootstrap = 'x'", "bootstrap = 'x': write true or false"),
        (TOP + A + "state = 3", "state = 3: write text, in quotes"),
        (TOP + A + "betas = [0.9]", "betas.1 is missing: add it"),
        (TOP + A + "betas = [0.9, 0.9, 0.9]", "must have at most 2 entries"),
        (TOP + A + "schedule = 'cos'", "must be 'constant', 'cosine' or 'linear'"),
        (TOP + A + "bsrr = 1", "s.toml: run 'a': unknown key 'bsrr': did you mean 'bsr'?"),
        (TOP + A + "loss = 'hinj'", "run 'a': loss = 'hinj': unknown loss: did you mean 'hinge'?"),
        (TOP + A + "bsr = -1", "run 'a': bsr = -1: must be greater than or equal to 0"),
        (TOP + A + "l2 = nan", "run 'a': l2 = nan: must be a finite number"),
        (TOP + A + "seed = 3", "seeds belong to the whole sweep"),
        (TOP + A + "grid = { seed = [1] }", "seeds belong to the whole sweep"),
        (TOP + A + "grid = 3", "grid = 3: write a table"),
        (TOP + A + "grid = { lr = 0.1 }", "grid.lr = 0.1: write a list"),
        (TOP + A + "grid = { lr = [] }", "grid.lr = []: write a list"),
        (TOP + A + "grid = { lr = [-0.1] }", "run 'a[lr=-0.1]': lr = -0.1"),
        (TOP + A + "lr = 1\ngrid = { 'lr.x' = [1] }", "lr is not a table"),
        (TOP + "[[runs]]\nlr = 1", "runs[0]: name = None: a run needs a name"),
        (TOP + A + A, "two runs are named 'a'"),
        (TOP + A + "[[runs]]\nname = 'b'", "'a' and 'b' are the same configuration"),
        (TOP + A + "grid = { lr = [1, 1.0] }", "two runs are named 'a[lr=1]'"),
        ('baseline = "aa"\n' + A, "baseline = 'aa' is no run of this sweep: did you mean 'a'?"),
        (TOP + "seeds = [1, 1]\n" + A, "seeds names 1 twice"),
        (TOP + "seeds = []\n" + A, "seeds = []"),
        (TOP + "seeds = [-1]\n" + A, "seeds.0 = -1"),
        (TOP + "evaluate = ['train']\n" + A, "split 'train' is trained on"),
        (TOP + "validation = 0.9\n" + A, "validation = 0.9"),
        (
            TOP + "validation = 0\n" + A + "patience = 2",
            "run 'a': patience = 2 with validation = 0",
        ),
        (TOP + A + "head = { kind = 'mlp' }", "an mlp needs widths"),
        (TOP + A + "head.widht = [3]", "unknown key 'head.widht': did you mean 'widths'?"),
        (TOP + A + "epochs = 0", "epochs = 0"),
        (TOP + A + "lr = 'fast'", "lr = 'fast': write a number, such as lr = 0.001"),
    ],
)
def test_invalid_specs_are_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        _configurations(text, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_spec_survives_a_round_trip_through_json() -> None:
    values: dict[str, Any] = {
        "baseline": "a",
        "runs": [{"name": "a", "grid": {"lr": [0.1]}, "head": {"widths": [3], "kind": "mlp"}}],
    }
    spec = SweepSpec.parse(values, "test")
    assert SweepSpec.parse(spec.model_dump(mode="json"), "again") == spec
