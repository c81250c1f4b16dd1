"""Sweeps with scenarios: five splits made of one cache of groups."""

from pathlib import Path

import polars as pl
import pytest
from toy_cache import toy_cache
from toy_groups import toy_groups

from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.data.scenarios import SCENARIOS, Scenarios
from embrm.reports.run import report
from embrm.results.ledger import Results, open_results
from embrm.results.replay import replay
from embrm.results.rewards import scores
from embrm.studies.best_of_n.measure import measure_best_of_n
from embrm.sweeps.execute import sweep
from embrm.sweeps.plan import plan_sweep
from embrm.sweeps.prepare import prepare_sweep
from embrm.sweeps.spec import Selection, SweepSpec
from embrm.sweeps.tables import read_tables

SPEC = """
baseline = "bt"
seeds = [0]
scenarios = {{ splits = ["train", "more"], models = 0.4, {rule} }}
defaults = {{ epochs = 20, batch_pairs = 64, lr = 0.03 }}
[[runs]]
name = "bt"
"""


def _spec(path: Path, rule: str = "seed = 0") -> Path:
    path.write_text(SPEC.format(rule=rule))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_groups(tmp_path_factory.mktemp("cache") / "toy")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Results:
    return open_results(sweep(_spec(tmp_path_factory.mktemp("s") / "s.toml"), cache, jobs=1))


def test_a_sweep_is_evaluated_on_every_scenario_and_on_other_splits(results: Results) -> None:
    [row] = results.ledger.to_dicts()
    for split in SCENARIOS[1:]:
        assert row[f"accuracy@{split}"] > 0.9  # gold is linear in the states
        assert row[f"tau@{split}"] > 0.8
    assert "accuracy@ood/far" in row
    assert "accuracy@more" not in row
    assert set(results.prompts["split"]) == {*SCENARIOS[1:], "ood/far"}


def test_shared_prompts_are_reported_and_responses_are_never_shared(
    results: Results, cache: Path, tmp_path: Path
) -> None:
    prompts = {
        split: set(results.prompts.filter(split=split)["prompt_id"]) for split in SCENARIOS[1:]
    }
    assert set(results.leaked) == {"id", "model", "ood/far"}
    for split in ("id", "model"):
        assert set(results.leaked[split]) == prompts[split]
    assert len(prompts["prompt"]) == len(prompts["mutual"]) > 0
    sizes = plan_sweep(_spec(tmp_path / "s.toml"), cache)["splits"]
    assert set(sizes) == {*SCENARIOS, "ood/far"}
    for split in SCENARIOS[1:]:
        assert sizes[split]["responses_trained_on"] == 0
        assert sizes[split]["prompts_trained_on"] == len(results.leaked.get(split, []))
    assert sizes["train"]["responses_trained_on"] == sizes["train"]["responses"]


def test_the_report_says_which_prompts_training_has_seen(results: Results, tmp_path: Path) -> None:
    report(results.folder, out=tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    for split in SCENARIOS[1:]:
        [row] = [line for line in lines if line.startswith(f"| {split} |")]
        assert row.endswith(f"| {len(results.leaked.get(split, []))} |")
    assert any(line.startswith("Prompts: id: ") and ", 0 left" in line for line in lines)


def test_replays_and_scores_read_the_same_pairs(results: Results, cache: Path) -> None:
    assert all(run.same_bits for run in replay(results.folder).runs)
    table = scores(results.folder, "bt@0")
    found = read_tables(open_cache(cache), results.spec.scenarios)
    assert table["pair_id"].equals(found.pairs["pair_id"])
    right = (table["scores_chosen"] > table["scores_rejected"]).to_list()
    by_split = table.with_columns(right=pl.Series(right)).group_by("split").agg(pl.mean("right"))
    [row] = results.ledger.to_dicts()
    for split, share in by_split.filter(pl.col("split") != "train").rows():
        assert row[f"accuracy@{split}"] == pytest.approx(share)


def test_best_of_n_chooses_among_the_responses_of_a_scenario(results: Results, cache: Path) -> None:
    runs = results.ledger.select("run_id", name="config")
    [found], _ = measure_best_of_n(results, runs, split="prompt", ns=[1, 2])
    members = read_tables(open_cache(cache), results.spec.scenarios).members.filter(split="prompt")
    assert set(found.prompt_ids) == set(members["prompt_id"])
    by_prompt = members.group_by("prompt_id").agg(pl.mean("gold"))
    assert found.gold_mean == pytest.approx(by_prompt["gold"].mean())
    assert found.gold[:, 0, 1].mean() > found.gold[:, 0, 0].mean() + 0.3


def test_the_rule_is_part_of_a_runs_identity(results: Results, cache: Path, tmp_path: Path) -> None:
    def run_id(rule: str) -> str:
        [run] = prepare_sweep(_spec(tmp_path / "s.toml", rule), cache, None).runs
        return run.run_id

    own = results.ledger["run_id"][0]
    others = [run_id(rule) for rule in ("seed = 1", "prompts = 0.3", "pairs = { per_prompt = 5 }")]
    assert len({own, *others}) == 4
    assert run_id("prompts = 0.2") == own  # the default, spelt out


def test_without_the_table_nothing_is_recorded() -> None:
    spec = SweepSpec(baseline="bt", runs=({"name": "bt"},))
    assert "scenarios" not in spec.model_dump()
    assert spec.selection("cache") == Selection("cache", ("train",), 0.1)


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ('splits = ["trian"]', "split 'trian' is not in .*toy, which has more, ood/far, train:"),
        ('splits = ["ood/far"]', ".*toy has a split 'train' already: add it to"),
        ("models = 0.01", "models = 0.01 holds out none of 8 models"),
    ],
)
def test_errors_name_the_spec(rule: str, line: str, cache: Path, tmp_path: Path) -> None:
    spec = tmp_path / "s.toml"
    spec.write_text(f'baseline = "a"\nscenarios = {{ {rule} }}\n[[runs]]\nname = "a"')
    with pytest.raises(UserError, match=f"s.toml: scenarios: {line}"):
        plan_sweep(spec, cache)


def test_caches_without_groups_models_or_free_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a split 'id' already: add it to"):
        read_tables(open_cache(toy_cache(tmp_path / "pairs")), Scenarios())
    nameless = toy_groups(tmp_path / "nameless", named=False)
    with pytest.raises(UserError, match="384 of 384 responses in 'train' have no model"):
        read_tables(open_cache(nameless), Scenarios())
