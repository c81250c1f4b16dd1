"""Ensembles in a sweep: how members are combined, what they are trained on, how they disagree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sweep_fixtures import results_fixture, toy_cache_fixture, training_fixture

from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.data.label_tables import LabelTable, write_label_table
from embrm.results.ledger import Results, open_results
from embrm.results.replay import replay
from embrm.results.rewards import scores
from embrm.results.weights import SavedRun, load_run
from embrm.studies.best_of_n.measure import measure_best_of_n
from embrm.studies.strength.measure import strengths
from embrm.sweeps import pack_trainer as pack_module
from embrm.sweeps.execute import sweep
from embrm.sweeps.material import laid_out
from embrm.sweeps.pack_trainer import Trainer
from embrm.sweeps.packs import Pack
from embrm.sweeps.selection import select
from embrm.sweeps.spec import Configuration, RunSpec, Selection, runs
from embrm.sweeps.training_pairs import as_trained, bootstrap_rows, with_rules
from embrm.sweeps.views import open_view
from embrm.training.heads import score_states
from embrm.training.row_store import RowStore

HEAD = """
baseline = "mean"
seeds = [3]
[defaults]
epochs = 4
batch_pairs = 16
lr = 0.03
members = 3
label_noise = 0.2
"""
SPEC = (
    HEAD
    + """
[[runs]]
name = "mean"
[[runs]]
name = "combined"
grid = { combine = ["min", "uwo", "lcb"] }
[[runs]]
name = "timid"
combine = "uwo"
penalty = 2.0
[[runs]]
name = "bagged"
combine = "lcb"
bootstrap = true
preprocess = "standardize"
[[runs]]
name = "standardized"
preprocess = "standardize"
[[runs]]
name = "one"
members = 1
"""
)
COMBINED = {"mean": "mean", "timid": "uwo"} | {
    f"combined[combine={kind}]": kind for kind in ("min", "uwo", "lcb")
}


cache = toy_cache_fixture(prompts=100)
training = training_fixture()
swept = results_fixture(SPEC)


def saved(swept: Results, config: str) -> SavedRun:
    return load_run(swept.folder, swept.find(f"{config}@3")["run_id"])


def heads(cache: Path, run: SavedRun) -> np.ndarray:
    """Rewards of every response of the cache under each member, float64 [members, n]."""
    states = RowStore(open_view(open_cache(cache), run.spec.state).read())
    rows = torch.arange(len(states.values))
    return score_states(run.parameters, run.preprocess, states, rows).double().numpy()


def trained_on(training: pl.DataFrame) -> np.ndarray:
    return np.union1d(training["chosen"], training["rejected"])


def by_hand(kind: str, r: np.ndarray, training: pl.DataFrame, penalty: float) -> np.ndarray:
    if kind == "mean":
        return r.mean(0)
    own = r[:, trained_on(training)]
    mean, sd = own.mean(1, keepdims=True), own.std(1, keepdims=True)
    z = (r - mean) / sd
    one = {
        "min": z.min(0),
        "uwo": z.mean(0) - penalty * z.var(0),
        "lcb": z.mean(0) - penalty * z.std(0),
    }[kind]
    return mean.mean() + sd.mean() * one


@pytest.mark.parametrize("config", COMBINED)
def test_all_commands_combine_members_by_the_formula(
    swept: Results, cache: Path, training: pl.DataFrame, config: str
) -> None:
    """The standardising moments are those of the training responses, in the weights file."""
    run = saved(swept, config)
    expected = by_hand(COMBINED[config], heads(cache, run), training, run.spec.penalty)
    table = scores(swept.folder, f"{config}@3")
    pairs = open_cache(cache).pairs
    for side in ("chosen", "rejected"):
        want = expected[pairs[side].to_numpy()]
        assert table[f"scores_{side}"].to_numpy() == pytest.approx(want, abs=1e-5)
    apart = pl.col("scores_chosen").cast(pl.Float64) - pl.col("scores_rejected")
    row = swept.find(f"{config}@3")
    for split in ("id", "ood/far"):
        margins = table.filter(split=split).select(apart).to_series()
        assert row[f"margin@{split}"] == pytest.approx(margins.mean(), rel=1e-12)
        assert row[f"accuracy@{split}"] == (margins > 0).mean()
    ledger = swept.ledger.filter(config=config).select("run_id", name="config")
    [chosen], _ = measure_best_of_n(swept, ledger, ns=[1, 4])
    far = open_cache(cache).members
    best = far.with_columns(r=pl.Series(expected[far["response"].to_numpy()]))
    gold = best.group_by("prompt_id").agg(pl.col("gold").sort_by("r").last())["gold"].mean()
    found = chosen.gold[:, 0, 1].mean() * chosen.gold_sd + chosen.gold_mean
    assert found == pytest.approx(gold, rel=1e-6)


def test_combinations_of_the_same_members_have_equal_heads_and_other_rewards(
    swept: Results,
) -> None:
    mean = saved(swept, "mean")
    assert mean.combination.reference is None
    for config in COMBINED:
        run = saved(swept, config)
        assert run.parameters.keys() == mean.parameters.keys()
        assert all(
            torch.equal(run.parameters[name], mean.parameters[name]) for name in run.parameters
        )
        assert (run.combination.reference is None) == (config == "mean")
    assert swept.ledger["margin@id"].n_unique() == swept.ledger.height
    assert saved(swept, "timid").combination.penalty == 2.0


def test_members_of_several_combinations_are_trained_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_cache(cache)
    selection = Selection(opened.cache_id, ("train",), 0.1)
    specs = [RunSpec(epochs=1, members=2, combine=kind) for kind in ("mean", "min", "lcb")]
    found = runs([Configuration(spec.combine, spec) for spec in specs], [0], selection, "native")
    trained: list[int] = []

    def counted(some: Any, data: Any) -> Any:
        trained.append(len(some))
        return original(some, data)

    original = pack_module.train
    monkeypatch.setattr(pack_module, "train", counted)
    with laid_out(opened, selection, found, tmp_path) as material:
        Trainer(material, "native").run(Pack(tuple(found)))
    assert trained == [1, 1]  # once for each member


def test_ensembles_have_the_same_bits_alone_in_a_pack(swept: Results) -> None:
    assert all(run.same_bits for run in replay(swept.folder, jobs=1).runs)


def test_the_auroc_of_disagreement_separates_splits_from_validation(
    swept: Results, cache: Path, training: pl.DataFrame
) -> None:
    opened = open_cache(cache)
    for config in ("mean", "combined[combine=min]", "bagged"):
        r = heads(cache, saved(swept, config))
        own = r[:, trained_on(training)]
        spread = ((r - own.mean(1, keepdims=True)) / own.std(1, keepdims=True)).std(0)
        row = swept.find(f"{config}@3")
        held = select(opened, Selection(opened.cache_id, ("train",), 0.1))[1]
        known = spread[trained_on(held)]
        for split in ("id", "ood/far"):
            there = spread[trained_on(opened.pairs.filter(split=split))]
            assert row[f"disagreement@{split}"] == pytest.approx(there.mean(), rel=1e-5)
            new = np.repeat([1, 0], [len(there), len(known)])
            area = roc_auc_score(new, np.concatenate([there, known]))
            assert row[f"disagreement_auroc@{split}"] == pytest.approx(area, abs=1e-9)
    one = swept.find("one@3")
    assert one["disagreement@id"] is one["disagreement_auroc@id"] is None


def test_without_validation_pairs_disagreement_has_no_auroc(cache: Path, tmp_path: Path) -> None:
    spec = tmp_path / "s.toml"
    spec.write_text(
        'validation = 0\nbaseline = "a"\nseeds = [0]\n[[runs]]\nname = "a"\nmembers = 2'
    )
    [row] = open_results(sweep(spec, cache, jobs=1)).ledger.to_dicts()
    assert row["disagreement@id"] > 0
    assert row["disagreement_auroc@id"] is None


def test_a_resample_draws_whole_prompts_with_replacement(training: pl.DataFrame) -> None:
    spec = RunSpec(members=2, bootstrap=True)
    table = as_trained(with_rules(training, [spec]), spec)
    count, unique = table["prompt_id"].n_unique(), []
    for seed in range(200):
        rows = bootstrap_rows(table, seed)
        assert (np.diff(rows) >= 0).all()
        times = np.bincount(rows, minlength=len(table))
        of_prompt = (
            table.with_columns(times=times).group_by("prompt_id").agg(pl.col("times").unique())
        )
        assert (of_prompt["times"].list.len() == 1).all()
        assert of_prompt["times"].explode().sum() == count
        unique.append((of_prompt["times"].explode() > 0).mean())
    assert np.mean(unique) == pytest.approx(1 - (1 - 1 / count) ** count, abs=0.01)
    assert np.array_equal(bootstrap_rows(table, 5), bootstrap_rows(table, 5))
    assert not np.array_equal(
        bootstrap_rows(table, 5), bootstrap_rows(table, spec.member(1).seed + 5)
    )
    other = spec.model_copy(update={"label_noise": 0.3})
    assert np.array_equal(
        bootstrap_rows(as_trained(with_rules(training, [other]), other), 5),
        bootstrap_rows(table, 5),
    )
    # A fold's prompts are resampled among themselves.
    fold = spec.model_copy(update={"fold": "0/2"})
    some = as_trained(with_rules(training, [fold]), fold)
    assert bootstrap_rows(some, 5).max() < len(some)


def test_a_member_is_trained_as_on_pairs_weighted_by_how_often_they_were_drawn(
    cache: Path, training: pl.DataFrame, tmp_path: Path
) -> None:
    """If one minibatch holds all pairs, the losses are equal, and so is validation."""
    drawn = RunSpec(members=2, bootstrap=True, seed=3)
    table = as_trained(with_rules(training, [drawn]), drawn)
    seeds = [drawn.member(number).seed for number in (0, 1)]
    text = f'baseline = "bagged"\nseeds = {seeds}\n[defaults]\nepochs = 20\nbatch_pairs = 512\n'
    text += '[[runs]]\nname = "bagged"\nmembers = 2\nbootstrap = true\n'
    made = {"rule": "test", "parameters": {}, "cache_id": "c", "embrm": "0"}
    for number, seed in enumerate(seeds):
        times = np.bincount(bootstrap_rows(table, seed), minlength=len(table)).astype(float)
        rows = table.select("pair_id", weight=pl.Series(times))
        path = tmp_path / f"{number}.parquet"
        write_label_table(path, LabelTable("labels", rows, made))
        text += f'[[runs]]\nname = "{number}"\nlabels = "{path}"\n'
    spec = tmp_path / "s.toml"
    spec.write_text(text)
    results = open_results(sweep(spec, cache, jobs=1))
    bagged = saved(results, "bagged").parameters["output.weight"]
    for number, seed in enumerate(seeds):
        row = results.find(f"{number}@{seed}")
        [alone] = load_run(results.folder, row["run_id"]).parameters["output.weight"]
        assert torch.allclose(bagged[number], alone, atol=1e-5)
        assert not torch.allclose(bagged[1 - number], alone, atol=1e-2)
    first, whole = results.find("0@3"), results.find("bagged@3")
    assert whole["validation_nll"] == pytest.approx(first["validation_nll"], abs=1e-5)
    assert whole["train_pairs"] == len(training) > first["train_pairs"]


def test_preprocessing_and_reference_are_fitted_to_all_training_pairs(
    swept: Results, cache: Path, training: pl.DataFrame
) -> None:
    bagged, other = (saved(swept, name) for name in ("bagged", "standardized"))
    assert bagged.preprocess.mean is not None
    assert torch.equal(bagged.preprocess.mean, other.preprocess.mean)
    assert torch.equal(bagged.preprocess.scale, other.preprocess.scale)
    own = heads(cache, bagged)[:, trained_on(training)]
    assert bagged.combination.reference is not None
    assert bagged.combination.reference.mean.numpy() == pytest.approx(own.mean(1), abs=1e-5)
    assert bagged.combination.reference.sd.numpy() == pytest.approx(own.std(1), rel=1e-5)
    assert not torch.equal(bagged.parameters["output.weight"], other.parameters["output.weight"])


def test_strength_reads_the_members_whatever_their_combination(swept: Results) -> None:
    tables = [strengths(swept.folder, name).rows for name in ("mean", "combined[combine=min]")]
    assert tables[0].equals(tables[1])


def test_fields_that_are_not_set_are_not_recorded(swept: Results) -> None:
    fields = {"combine", "penalty", "bootstrap"}
    assert not fields & RunSpec(members=3).model_dump().keys()
    assert not fields & json.loads(swept.find("mean@3")["spec"]).keys()
    explicit = RunSpec(members=3, combine="uwo", penalty=0.5)
    assert explicit.model_dump() == RunSpec(members=3, combine="uwo").model_dump()
    assert explicit.model_dump()["combine"] == "uwo"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"combine": "min"}, "combine = 'min' with members = 1: set members to 2 or more"),
        ({"bootstrap": True}, "bootstrap = true with members = 1: set members to 2 or more"),
        ({"members": 3, "penalty": 1.0}, "penalty = 1 with combine = 'mean': it is the λ of"),
        ({"members": 3, "combine": "min", "penalty": 1.0}, "penalty = 1 with combine = 'min'"),
        ({"members": 3, "combine": "uwo", "penalty": -1.0}, "penalty = -1.0"),
        ({"members": 3, "combine": "median"}, "combine = 'median'"),
    ],
)
def test_refusals(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        RunSpec.parse(fields, "run 'x'")
    assert "\n" not in str(caught.value)


def test_an_ensemble_with_a_head_that_diverged_has_diverged(cache: Path, tmp_path: Path) -> None:
    spec = tmp_path / "s.toml"
    wild = 'members = 2\ncombine = "min"\nbootstrap = true\nlr = 1e38\n'
    spec.write_text(f'baseline = "a"\nseeds = [0]\n[[runs]]\nname = "a"\n{wild}')
    [row] = open_results(sweep(spec, cache, jobs=1)).ledger.to_dicts()
    assert row["status"] == "diverged"
    assert row.get("disagreement@id") is None
