"""Learning rates chosen so that Bradley-Terry distorts the language model as far as asked."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from toy_cache import toy_cache

import embrm
from embrm.core.errors import UserError
from embrm.results.ledger import open_results
from embrm.results.replay import replay
from embrm.sweeps.execute import sweep
from embrm.sweeps.matching import FOLDER, TOLERANCE, match_rates, twin
from embrm.sweeps.plan import plan_sweep
from embrm.sweeps.prepare import prepare_sweep
from embrm.sweeps.spec import RunSpec

ADAPTER = {"adapter": {"kind": "low-rank", "width": 2}}
BASE = {"epochs": 4, "batch_pairs": 32, "head": ADAPTER}


def _spec(kl: float = 0.02, **sweep_keys: Any) -> dict[str, Any]:
    return {
        "baseline": "bt",
        "seeds": [0, 1],
        "validation": 0,
        "defaults": BASE | {"match": {"kl": kl}},
        "runs": [
            {"name": "bt"},
            {"name": "smooth", "label_smoothing": 0.1},
            {"name": "dpo", "regularizer": {"kind": "grm-dpo", "alpha": 0.2}},
            {"name": "short", "epochs": 2},
        ],
        **sweep_keys,
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_cache(tmp_path_factory.mktemp("cache") / "toy", prompts=80, token_rows=4)


@pytest.fixture(scope="module")
def swept(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(_spec(), cache, out=tmp_path_factory.mktemp("matched") / "sweep", jobs=1)


def _token_kl(folder: Path) -> dict[str, float]:
    results = open_results(folder)
    names = results.ledger.select("run_id", "config")
    rows = results.geometry.filter(pl.col("split") == "train").join(names, on="run_id")
    return dict(rows.group_by("config").agg(pl.col("kl_tokens").mean()).rows())


def test_the_twin_moves_as_far_as_asked(swept: Path) -> None:
    kl = _token_kl(swept)
    assert kl["bt"] == pytest.approx(0.02, rel=TOLERANCE)
    assert kl["short"] == pytest.approx(0.02, rel=TOLERANCE)
    assert kl["dpo"] != pytest.approx(kl["bt"], rel=1e-3)


def test_configurations_with_one_twin_share_its_learning_rate(swept: Path) -> None:
    ledger = embrm.open_results(swept).ledger
    rates = dict(ledger.select("config", "lr").rows())
    assert rates["bt"] == rates["smooth"] == rates["dpo"]
    assert rates["short"] > rates["bt"]  # half the steps
    assert set(ledger["match.kl"]) == {0.02}


def test_a_second_call_trains_nothing_again_and_a_replay_needs_no_search(
    swept: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_sweep(_spec(), cache, out=swept, jobs=1)
    assert (plan["runs"], plan["finished"]) == (8, 8)
    assert not any("learning rates" in line for line in plan["warnings"])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished run was trained again")

    with monkeypatch.context() as patch:
        patch.setattr("embrm.sweeps.workers.Workers.run", refuse)
        sweep(_spec(), cache, out=swept, jobs=1)
    assert replay(swept, run="dpo@1", jobs=1).runs[0].same_bits


def test_a_search_that_was_stopped_goes_on_to_the_same_rates(
    swept: Path, cache: Path, tmp_path: Path
) -> None:
    parts = sorted((swept / FOLDER / "parts").iterdir())
    for kept in (swept / FOLDER / "weights", parts[0]):
        target = tmp_path / FOLDER / kept.relative_to(swept / FOLDER)
        target.mkdir(parents=True)
        for path in kept.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
    prepared = prepare_sweep(_spec(), cache, None)
    found = match_rates(prepared, tmp_path, jobs=1, memory=None)
    assert [run.run_id for run in found.runs] == [
        run.run_id for run in match_rates(prepared, swept, jobs=1, memory=None).runs
    ]


def test_a_dry_run_before_the_search_leaves_rates_open(cache: Path, tmp_path: Path) -> None:
    plan = plan_sweep(_spec(), cache, out=tmp_path / "none", jobs=1)
    assert (plan["runs"], plan["finished"]) == (8, 0)
    assert any("learning rates of 4 configurations" in line for line in plan["warnings"])
    assert not (tmp_path / "none").exists()


def test_the_twin_has_the_same_head_data_and_optimisation_and_nothing_else() -> None:
    spec = RunSpec.parse(
        {
            **BASE,
            "bsr": 0.1,
            "margin": 1.0,
            "members": 3,
            "combine": "uwo",
            "penalty": 0.5,
            "label_noise": 0.25,
            "weight_decay": 0.1,
            "regularizer": {"kind": "grm-sft"},
            "match": {"kl": 0.1},
        },
        "test",
    )
    kept = {**BASE, "label_noise": 0.25, "weight_decay": 0.1}
    assert twin(spec) == RunSpec.parse(kept, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defaults": BASE | {"match": {"kl": 1e9}}}, "no learning rate .* the nearest is"),
        ({"defaults": BASE | {"match": {"kl": 0}}}, "greater than 0"),
        ({"defaults": BASE | {"match": {"kl": 0.1}, "lr": 0.1}}, "match, which chooses it"),
        (
            {
                "defaults": {"match": {"kl": 0.1}},
                "runs": [{"name": "bt", "head": {"kind": "linear"}}],
            },
            "without an adapter",
        ),
    ],
)
def test_what_cannot_be_matched_is_refused(
    cache: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sweep(_spec(**change), cache, out=tmp_path / "sweep", jobs=1)


def test_a_cache_without_token_rows_cannot_be_matched(tmp_path: Path) -> None:
    bare = toy_cache(tmp_path / "bare", prompts=20)
    spec = _spec(runs=[{"name": "bt"}])
    with pytest.raises(UserError, match="--token-rows"):
        sweep(spec, bare, out=tmp_path / "sweep", jobs=1)


def test_training_in_this_process_needs_a_learning_rate(cache: Path) -> None:
    with pytest.raises(UserError, match=r"embrm\.sweep"):
        embrm.train(embrm.open_cache(cache), {"match": {"kl": 0.1}, "head": ADAPTER})
