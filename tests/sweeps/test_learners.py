"""Learners in a sweep: ledger rows, reproducible bits, and refusals in one line."""

import shutil
import tomllib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import sklearn.linear_model
from toy_cache import toy_cache
from toy_groups import toy_groups

from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.data.splits import folds, holdout
from embrm.exports.run_model import open_run_model
from embrm.finetuning.choice import choose, rank
from embrm.finetuning.spec import FinetuneRun, check_fits
from embrm.results.ledger import open_results
from embrm.results.replay import replay
from embrm.results.rewards import scores
from embrm.results.weights import load_run
from embrm.studies.best_of_n.measure import measure_best_of_n
from embrm.studies.strength.measure import strengths
from embrm.sweeps.execute import sweep
from embrm.sweeps.material import laid_out
from embrm.sweeps.plan import plan_sweep
from embrm.sweeps.prepare import prepare_sweep
from embrm.sweeps.selection import with_gold
from embrm.sweeps.spec import RunSpec, Selection, SweepSpec, configurations
from embrm.sweeps.tables import read_tables
from embrm.sweeps.training_pairs import gold_as_trained
from embrm.training.heads import REWARDS
from embrm.training.learner_specs import LIBRARY_BYTES

HEAD = """
baseline = "bt"
seeds = [0, 1]
validation = 0.2
[scenarios]
pairs = { per_prompt = 8 }
[[runs]]
name = "bt"
epochs = 2
"""
LEARNERS = """
[[runs]]
name = "logistic"
learner = { kind = "logistic" }
grid = { label_noise = [0.0, 0.2] }
[[runs]]
name = "ridge"
preprocess = "standardize"
learner = { kind = "ridge", alpha = 2.0 }
[[runs]]
name = "part"
fold = "1/3"
learner = { kind = "ridge", alpha = 2.0 }
[[runs]]
name = "trees"
learner = { kind = "gradient_boosting", iterations = 6, features = 0.5 }
[[runs]]
name = "trees of all"
learner = { kind = "gradient_boosting", iterations = 6 }
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_groups(tmp_path_factory.mktemp("cache") / "toy")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    spec = tmp_path_factory.mktemp("sweeps") / "learners.toml"
    spec.write_text(HEAD + LEARNERS)
    return sweep(spec, cache, jobs=2)


def _contents(folder: Path) -> dict[str, bytes]:
    kept = ("ledger", "curves", "outcomes", "geometry", "prompts")
    paths = [*(folder / f"{name}.parquet" for name in kept), *folder.glob("weights/*")]
    return {path.name: path.read_bytes() for path in paths}


def test_the_ledger_has_learners_beside_heads(swept: Path) -> None:
    results = open_results(swept)
    ledger = results.ledger.sort("config", "seed")
    assert set(ledger["status"]) == {"ok"}
    assert ledger.height == 14
    rows = {row["config"]: row for row in ledger.to_dicts()}
    assert rows["logistic[label_noise=0.2]"]["head"] == "logistic C 1"
    assert [rows[name]["loss"] for name in ("bt", "ridge", "trees")] == [
        "bt", "squared error", "classifier",
    ]  # fmt: skip
    assert rows["ridge"]["train_pairs"] == 0 < rows["trees"]["train_pairs"]
    assert rows["ridge"]["accuracy@mutual"] == 1  # gold is linear in the states
    assert ledger["tau@mutual"].null_count() == ledger["weights_sha256"].null_count() == 0
    # Seeds change what draws by them, and nothing else.
    distinct = ledger.group_by("config").agg(pl.col("weights_sha256").n_unique()).rows()
    assert {name for name, count in distinct if count == 2} == {"bt", "trees"}
    assert set(results.geometry["run_id"]) == set(ledger["run_id"])
    curves = results.curves.filter(pl.col("run_id") == rows["trees"]["run_id"])
    assert curves.select("epoch", "step", "weight_norm").rows() == [(1, 6, None)]


def test_learners_do_not_depend_on_jobs_earlier_runs_or_other_runs(
    swept: Path, cache: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "again.toml"
    head, *entries = (HEAD + LEARNERS).split("[[runs]]")
    spec.write_text("[[runs]]".join([head, *reversed(entries)]))
    out = Path(shutil.copytree(swept, tmp_path / "again"))
    for place, path in enumerate(sorted(out.glob("weights/*"))):
        if place % 3:
            path.unlink()  # as where a sweep was killed: these runs are run again
    assert _contents(sweep(spec, cache, jobs=1, memory=4_000_000_000)) == _contents(swept)


def test_learners_replay_alone_to_the_bit(swept: Path) -> None:
    assert all(entry.same_bits for entry in replay(swept, sample=7, jobs=1).runs)


def test_ridge_is_fitted_to_gold_of_prompts_that_do_not_validate(swept: Path, cache: Path) -> None:
    results, opened = open_results(swept), open_cache(cache)
    selection = results.spec.selection(results.cache_id)
    states = opened.states("last").astype(np.float64)
    for name, spec in (("ridge", RunSpec()), ("part", RunSpec(fold="1/3"))):
        members = read_tables(opened, selection.scenarios).members.filter(split="train")
        held = holdout(members["prompt_id"], 0.2, 0)
        if spec.fold:
            held |= folds(members["prompt_id"], 3) == 1
        assert 0 < held.sum() < len(held)
        own = members.filter(~pl.Series(held))
        assert set(gold_as_trained(with_gold(opened, selection), spec)["response"]) == set(
            own["response"]
        )
        run = load_run(swept, results.ledger.filter(config=name)["run_id"][0])
        X = states[own["response"]]
        if run.preprocess.scale is not None and run.preprocess.mean is not None:
            X = (X - run.preprocess.mean.numpy()) / run.preprocess.scale.numpy()
        reference = sklearn.linear_model.Ridge(2.0).fit(X, own["gold"].to_numpy())
        w = run.parameters["output.weight"][0]
        np.testing.assert_allclose(w, reference.coef_, rtol=1e-4, atol=1e-6)


def test_all_readers_of_runs_accept_rewards_without_weights(swept: Path, cache: Path) -> None:
    results = open_results(swept)
    run_id = results.find("trees@0")["run_id"]
    rewards = load_run(swept, run_id).parameters[REWARDS][0].numpy()
    table = scores(swept, "trees@0")
    pairs = read_tables(open_cache(cache), results.spec.scenarios).pairs
    np.testing.assert_array_equal(table["scores_chosen"], rewards[pairs["chosen"]])
    np.testing.assert_array_equal(table["scores_rejected"], rewards[pairs["rejected"]])
    own = table.filter(split="mutual")
    accuracy = (own["scores_chosen"] > own["scores_rejected"]).sum() / (
        own["scores_chosen"] != own["scores_rejected"]
    ).sum()
    assert results.find(run_id)["accuracy@mutual"] == pytest.approx(accuracy)
    # Best of all of a group is its most rewarded response, or the mean of those that tie.
    runs = results.ledger.filter(pl.col("config") == "trees").select("run_id", name="config")
    [chosen], _ = measure_best_of_n(results, runs.filter(run_id=run_id), split="more", ns=[8])
    members = open_cache(cache).members.filter(split="more")
    members = members.with_columns(reward=pl.Series(rewards[members["response"].to_numpy()]))
    best = members.filter(pl.col("reward") == pl.col("reward").max().over("prompt_id"))
    expected = dict(best.group_by("prompt_id").agg(pl.col("gold").mean()).rows())
    found = chosen.gold[:, 0, -1] * chosen.gold_sd + chosen.gold_mean
    np.testing.assert_allclose(found, [expected[prompt] for prompt in chosen.prompt_ids])
    assert strengths(swept, "trees").rows["spread"].max() > 0  # type: ignore[operator]
    with pytest.raises(UserError, match=r"'logistic.label_noise=0.' is a fit that all seeds share"):
        strengths(swept, "logistic[label_noise=0]")


def test_commands_that_need_weights_refuse_stored_rewards(swept: Path) -> None:
    with pytest.raises(UserError, match=r"run trees@0 has no weights, .* embrm scores") as error:
        open_run_model(swept, "trees@0")
    assert "\n" not in str(error.value)
    assert open_run_model(swept, "logistic[label_noise=0]@1").parameters["output.weight"].shape


def test_a_fine_tune_takes_no_learner(swept: Path) -> None:
    results = open_results(swept)
    with pytest.raises(UserError, match="trees: learner 'gradient_boosting' is of frozen"):
        choose(results, rank(results, None), "bt,trees")
    spec = FinetuneRun.parse({"learner": {"kind": "ridge"}}, "test")
    with pytest.raises(UserError, match="learner = 'ridge alpha 1' with tune = 'full'"):
        check_fits(spec, "full", "run 'a'")


def test_the_plan_times_learners(swept: Path, cache: Path) -> None:
    planned = plan_sweep(swept.with_suffix(".toml"), cache, jobs=1, out=swept / "none")
    # All seeds of a configuration are one fit, but of heads and of trees that draw by them.
    assert (planned["configurations"], planned["packs"]) == (7, 9)
    assert planned["estimated_seconds"] > 0


def test_a_plan_ignores_that_random_pairs_have_no_minimum(
    swept: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embrm.training.learners._ITERATIONS", 1)
    planned = plan_sweep(swept.with_suffix(".toml"), cache, jobs=1, out=swept / "none")
    assert planned["estimated_seconds"] > 0


def test_memory_counts_the_rows_of_a_fit(swept: Path, cache: Path, tmp_path: Path) -> None:
    prepared = prepare_sweep(swept.with_suffix(".toml"), cache, None)

    def least(*names: str) -> float:
        runs = [run for run in prepared.runs if run.name in names]
        with (
            pytest.raises(UserError, match="1 workers need at least") as error,
            laid_out(prepared.cache, prepared.selection, runs, tmp_path, memory=1, jobs=1),
        ):
            pass
        return float(str(error.value).split("at least ")[1].split(" GB")[0])

    assert least("bt", "ridge") == pytest.approx(least("bt") + LIBRARY_BYTES / 1e9, abs=0.02)
    assert least("trees") > least("ridge")


def test_runs_without_a_learner_keep_their_ids() -> None:
    assert "learner" not in RunSpec().model_dump(mode="json")
    spec = RunSpec.parse({"learner": {"kind": "logistic"}}, "test")
    assert RunSpec.parse(spec.model_dump(mode="json"), "again") == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'learner = { kind = "svm" }',
            "learner = {'kind': 'svm'}: its kind must be one of 'logistic'",
        ),
        ("learner = { C = 1 }", "learner = {'C': 1}: 'kind' is missing in it"),
        ('learner = { kind = "logistic", alpha = 1 }', "unknown key 'learner.logistic.alpha'"),
        ('learner = { kind = "ridge", alpha = 0 }', "alpha = 0: must be greater than 0"),
        (
            'lr = 0.1\nlearner = { kind = "logistic" }',
            "lr = 0.1 with learner 'logistic', which does not read it: remove lr here, or from "
            "defaults",
        ),
        ('loss = "hinge"\nlearner = { kind = "logistic" }', "loss = 'hinge' with learner"),
        ('members = 3\nlearner = { kind = "ridge" }', "members = 3 with learner 'ridge'"),
        ('label_noise = 0.1\nlearner = { kind = "ridge" }', "label_noise = 0.1 with learner"),
        ('pairs_limit = 9\nlearner = { kind = "ridge" }', "pairs_limit = 9 with learner"),
        (
            'head = { kind = "mlp", widths = [4] }\nlearner = { kind = "logistic" }',
            "head = 'mlp 4' with learner 'logistic'",
        ),
        (
            'preprocess = "center"\nlearner = { kind = "gradient_boosting" }',
            "preprocess = 'center' with learner 'gradient_boosting'",
        ),
    ],
)
def test_fields_that_a_learner_does_not_read_are_refused_in_one_line(
    text: str, message: str
) -> None:
    values = tomllib.loads('baseline = "a"\n[[runs]]\nname = "a"\n' + text)
    with pytest.raises(UserError) as error:
        configurations(SweepSpec.parse(values, "s.toml"), "s.toml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


RIDGE = 'baseline = "a"\n[[runs]]\nname = "a"\nlearner = { kind = "ridge" }\n'


def test_missing_or_constant_gold_is_refused(tmp_path: Path) -> None:
    spec = tmp_path / "s.toml"
    spec.write_text(RIDGE)
    with pytest.raises(UserError, match=r"run 'a': learner 'ridge' reads gold, and train has no"):
        prepare_sweep(spec, toy_cache(tmp_path / "pairs"), None)

    def trained_on(gold: pl.Expr) -> Path:
        """A cache whose groups are those of the training split."""
        made = toy_cache(
            tmp_path / "groups",
            members=lambda table: table.with_columns(split=pl.lit("train"), gold=gold),
        )
        return made

    for gold, message in (
        (pl.lit(2.5), r"that of all \d+ training responses is 2.5: nothing"),
        (pl.when(pl.int_range(pl.len()) == 0).then(float("nan")).otherwise("gold"), "of 1 of"),
    ):
        with pytest.raises(UserError, match=message) as error:
            prepare_sweep(spec, trained_on(gold), None)
        assert "\n" not in str(error.value)
        shutil.rmtree(tmp_path / "groups")
    opened = open_cache(trained_on(pl.col("gold")))
    assert len(with_gold(opened, Selection(opened.cache_id, ("train",), 0.0))) == 48
    prepare_sweep(spec, opened.folder, None)
