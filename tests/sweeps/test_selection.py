"""Data seeds: what is drawn again, names and ids of runs, and everything that reads such runs."""

import hashlib
import shutil
from pathlib import Path

import polars as pl
import pytest
from sweep_fixtures import results_fixture, toy_cache_fixture
from toy_groups import toy_groups

from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.metrics.intervals import covered
from embrm.reports.run import report
from embrm.results.comparison import compare_results
from embrm.results.in_process import train_here
from embrm.results.ledger import Results, open_results, run_name
from embrm.results.replay import replay
from embrm.results.rewards import scores
from embrm.results.two_sweeps import compare_sweeps
from embrm.studies.best_of_n.measure import measure_best_of_n
from embrm.studies.strength.measure import strengths
from embrm.sweeps.execute import sweep
from embrm.sweeps.plan import plan_sweep
from embrm.sweeps.prepare import prepare_sweep
from embrm.sweeps.spec import SweepSpec

HEAD = """
baseline = "bt"
seeds = [0, 1]
validation = 0.2
defaults = { epochs = 3, batch_pairs = 16, lr = 0.03 }
"""
RUNS = """
[[runs]]
name = "bt"
[[runs]]
name = "mlp"
head = { kind = "mlp", widths = [4] }
[[runs]]
name = "few"
label_noise = 0.3
pairs_limit = 60
fold = "1/3"
"""

cache = toy_cache_fixture(prompts=100)
swept = results_fixture(HEAD + "data_seeds = [0, 3]" + RUNS)
plain = results_fixture(HEAD + RUNS)


def _draw(purpose: str, seed: int, one: str) -> float:
    digest = hashlib.blake2b(f"{purpose}:{seed}:{one}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def test_data_seed_0_has_the_runs_of_a_sweep_without_data_seeds(
    swept: Results, plain: Results
) -> None:
    own = swept.ledger.filter(data_seed=0).drop("data_seed").sort("run_id")
    assert own.equals(plain.ledger.sort("run_id"))
    assert "data_seed" not in plain.ledger.columns
    assert "data_seeds" not in plain.spec.model_dump()
    assert swept.ledger["run_id"].n_unique() == swept.ledger.height == 12
    assert swept.ledger["weights_sha256"].n_unique() == 12


@pytest.mark.parametrize("seed", [0, 3])
def test_validation_folds_subsets_and_flips_are_drawn_with_the_data_seed(
    swept: Results, cache: Path, seed: int
) -> None:
    row = swept.ledger.filter(config="few", seed=1, data_seed=seed).row(0, named=True)
    pairs = open_cache(cache).pairs.filter(split="train").sort("pair_id").to_dicts()
    validation = [
        one["pair_id"] for one in pairs if _draw("validation", seed, one["prompt_id"]) < 0.2
    ]
    rest = [one for one in pairs if one["pair_id"] not in validation]
    if seed:
        rest.sort(key=lambda one: _draw("pairs", seed, one["pair_id"]))
    kept = [
        one["pair_id"]
        for one in rest[:60]
        if int(_draw("fold of 3", seed, one["prompt_id"]) * 3) != 1
    ]
    used = scores(swept.folder, run_name(row))
    assert {*used.filter(used="validation")["pair_id"]} == {*validation}
    assert {*used.filter(used="train")["pair_id"]} == {*kept}
    assert row["train_pairs"] == len(kept)
    flipped = {one for one in kept if _draw("label noise", seed, one) < 0.3}
    assert 0 < len(flipped) < len(kept)


@pytest.mark.filterwarnings("ignore:torch has multiplied matrices")
def test_runs_in_this_process_have_the_ids_of_the_sweep(swept: Results, cache: Path) -> None:
    spec = {"name": "bt", "epochs": 3, "batch_pairs": 16, "lr": 0.03, "data_seed": 3}
    opened = open_cache(cache)
    here = train_here(opened, [spec, {**spec, "data_seed": 0}], validation=0.2)
    for found, name in zip(here, ("bt@0/3", "bt@0"), strict=True):
        row = swept.find(name)
        assert found.run.run_id == row["run_id"]
        assert found.row["validation_nll"] == pytest.approx(row["validation_nll"], rel=1e-5)
        assert found.selection.data_seed == found.run.spec.data_seed


def test_names_say_the_data_seed(swept: Results) -> None:
    for data_seed, name in ((0, "bt@1"), (3, "bt@1/3")):
        row = swept.find(name)
        assert (row["config"], row["seed"], row["data_seed"]) == ("bt", 1, data_seed)
        assert run_name(row) == name
    with pytest.raises(UserError, match=r"add a seed: bt@0, bt@1, bt@0/3, bt@1/3$"):
        swept.find("bt")
    with pytest.raises(UserError, match="no run 'bt@0/1'"):
        swept.find("bt@0/1")


def test_replays_give_the_same_bits(swept: Results) -> None:
    found = replay(swept.folder)
    assert len(found.runs) == 12
    assert all(run.same_bits for run in found.runs)


def test_a_resumed_sweep_gives_the_same_ledger(swept: Results, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(swept.folder, folder)
    for part in sorted(folder.glob("parts/*"))[::2]:
        shutil.rmtree(part)
    spec = tmp_path / "again.toml"
    spec.write_text(HEAD + "data_seeds = [0, 3]" + RUNS)
    sweep(spec, cache, jobs=1, out=folder)
    for name in ("ledger", "outcomes", "prompts", "curves", "geometry"):
        file = f"{name}.parquet"
        assert (folder / file).read_bytes() == (swept.folder / file).read_bytes()


def test_a_configuration_is_the_mean_over_data_seeds(swept: Results, tmp_path: Path) -> None:
    comparison = report(swept.folder, out=tmp_path).comparison
    [split, *_] = comparison.splits
    own = comparison.scores.filter(split=split, name="few", metric="accuracy").row(0, named=True)
    assert own["seeds"] == own["common_seeds"] == 2
    runs = swept.ledger.filter(config="few")
    assert own["estimate"] == pytest.approx(runs[f"accuracy@{split}"].mean())
    text = (tmp_path / "report.md").read_text()
    assert "3 configurations, 12 runs." in text
    assert (
        "Intervals cover prompts and seeds (initialisation, order, dropout) and data seeds" in text
    )
    both = compare_sweeps(swept, swept)
    assert set(both["difference"]) == {0}
    assert set(both["common_seeds"]) == {2}


def test_the_sentence_on_what_intervals_cover() -> None:
    one = pl.DataFrame({"name": ["a"], "seed": [0]})
    assert covered(one).startswith("Intervals cover prompts; they do not cover seeds (")
    two = pl.DataFrame({"name": ["a", "a"], "seed": [0, 1], "data_seed": [0, 0]})
    assert "; they do not cover data seeds (validation split" in covered(two)
    all_of_it = pl.DataFrame({"name": ["a", "a"], "seed": [0, 0], "data_seed": [0, 1]})
    assert covered(all_of_it).endswith("; they do not cover other training data or another "
                                       "language model.")  # fmt: skip


def test_strengths_of_several_data_seeds_are_refused(swept: Results) -> None:
    with pytest.raises(
        UserError, match=r"'bt' in .* has data seeds 0, 3, which train on different"
    ):
        strengths(swept.folder, "bt")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ("data_seeds = []", "data_seeds = .*at least 1"),
        ("data_seeds = [0, -1]", "data_seeds.*greater than or equal to 0"),
        ("data_seeds = [0, 2, 2]", "data_seeds names 2 twice: remove one"),
        ("data_seeds = [0, 1]\ndefaults = { data_seed = 1 }", "data_seed = 1: seeds belong to the"),
        (
            "data_seeds = [0, 1]\nvalidation = 0",
            r"data_seeds = \[0, 1\] with validation = 0, .* nothing can be drawn again, remove",
        ),
    ],
)
def test_bad_data_seeds(fields: str, line: str, cache: Path, tmp_path: Path) -> None:
    spec = tmp_path / "s.toml"
    spec.write_text(f'baseline = "bt"\n{fields}\n[[runs]]\nname = "bt"')
    with pytest.raises(UserError, match=line) as caught:
        prepare_sweep(spec, cache, None)
    assert "\n" not in str(caught.value)


DIVIDED = (
    HEAD.replace("[0, 1]", "[0]")
    + """
data_seeds = [0, 1, 2]
[scenarios]
splits = ["train", "more"]
models = 0.4
prompts = 0.3
pairs = { per_prompt = 3 }
[[runs]]
name = "bt"
[[runs]]
name = "two"
loss = "hinge"
"""
)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_groups(tmp_path_factory.mktemp("groups") / "toy", models=16)


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory, groups: Path) -> Results:
    spec = tmp_path_factory.mktemp("divided") / "divided.toml"
    spec.write_text(DIVIDED)
    return open_results(sweep(spec, groups, jobs=1))


def test_a_data_seed_divides_as_its_own_sweep_does(
    divided: Results, groups: Path, tmp_path: Path
) -> None:
    """Other runs of the sweep change nothing, and each data seed has its own prompts."""
    spec = tmp_path / "s.toml"
    spec.write_text(DIVIDED.replace("[0, 1, 2]", "[2]"))
    alone = open_results(sweep(spec, groups, jobs=1))
    assert divided.ledger.filter(data_seed=2).equals(alone.ledger)
    prompts = divided.prompts.filter(data_seed=2, split="prompt").drop("data_seed")
    assert prompts.equals(alone.prompts.filter(split="prompt"))
    others = divided.prompts.filter(data_seed=1, split="prompt")
    assert {*others["prompt_id"]} != {*prompts["prompt_id"]}
    assert divided.prompts.filter(split="ood/far")["data_seed"].null_count() > 0
    shifted = SweepSpec.parse(
        {"scenarios": {"seed": 2}, "baseline": "a", "runs": [{"name": "a"}]}, "test"
    )
    assert shifted.scenarios is not None
    assert shifted.scenarios.overlap("model") == pytest.approx(1 / 3)
    assert shifted.scenarios.overlap("prompt") == pytest.approx(1 / 4)
    assert shifted.scenarios.overlap("ood/far") == 0


def test_results_on_divisions_are_means_over_them(divided: Results, groups: Path) -> None:
    comparison = compare_results(divided)
    for split in ("id", "prompt", "model", "mutual", "ood/far"):
        for name in ("bt", "two"):
            row = comparison.scores.filter(split=split, name=name, metric="accuracy")
            mean = divided.ledger.filter(config=name)[f"accuracy@{split}"].mean()
            assert row["estimate"][0] == pytest.approx(mean)
            assert row["low"][0] < mean < row["high"][0]
    assert all(run.same_bits for run in replay(divided.folder).runs)
    table = scores(divided.folder, "bt@0/1").filter(split="mutual")
    right = (table["scores_chosen"] > table["scores_rejected"]).mean()
    assert right == pytest.approx(divided.find("bt@0/1")["accuracy@mutual"])
    assert plan_sweep(Path(f"{divided.folder}.toml"), groups)["finished"] == 6


def test_studies_on_divided_groups_are_refused_by_name(divided: Results, tmp_path: Path) -> None:
    runs = divided.ledger.select("run_id", name="config")
    with pytest.raises(UserError, match=r"data_seeds of .* divide the groups of .*prompt"):
        measure_best_of_n(divided, runs)
    found = report(divided.folder, out=tmp_path)
    assert found.notes == (
        "no reliability diagrams: data_seeds divide the groups again, so runs are evaluated on "
        "different prompts",
    )
