"""The public API: the results of the commands, and one-line errors for what users can cause."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from toy_cache import toy_cache

import embrm

# What tests do before uses MKL, and then it does not become strict: bits are tested in processes.
pytestmark = pytest.mark.filterwarnings("ignore:torch has multiplied matrices")

SPEC: dict[str, Any] = {
    "baseline": "bt",
    "seeds": [0, 1],
    "defaults": {"epochs": 2, "batch_pairs": 16},
    "runs": [
        {"name": "bt"},
        {"name": "bsr", "grid": {"bsr": [0.01, 0.1]}},
        {"name": "mlp", "head": {"kind": "mlp", "widths": [8]}},
    ],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> embrm.Cache:
    return embrm.open_cache(toy_cache(tmp_path_factory.mktemp("api") / "cache"))


@pytest.fixture(scope="module")
def results(cache: embrm.Cache, tmp_path_factory: pytest.TempPathFactory) -> embrm.SweepResults:
    return embrm.sweep(SPEC, cache, out=tmp_path_factory.mktemp("api") / "sweep", jobs=1)


def test_every_public_name_exists_and_is_documented() -> None:
    for name in embrm.__all__:
        assert getattr(embrm, name).__doc__, name
    assert set(dir(embrm)) == {*embrm.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'sweeps_'"):
        _ = embrm.sweeps_  # type: ignore[attr-defined]


def test_a_cache_gives_numpy_and_polars(cache: embrm.Cache) -> None:
    X = cache.states("last")
    assert X.dtype == np.float32
    assert X.shape == (240, 12)
    assert cache.responses.height == 240
    assert {"chosen", "rejected", "prompt_id"} <= set(cache.pairs.columns)
    assert cache.groups.height == 12
    assert cache.exclusions.is_empty()


def test_the_ledger_has_a_column_for_every_hyper_parameter(results: embrm.SweepResults) -> None:
    ledger = results.ledger
    assert ledger.filter(config="bsr[bsr=0.1]")["bsr"].to_list() == [0.1, 0.1]
    assert ledger.filter(config="mlp")["head.widths"].to_list() == [[8], [8]]
    assert ledger.filter(config="bt")["head.kind"].to_list() == ["linear", "linear"]
    assert ledger["max_epochs"].unique().to_list() == [2]
    assert ledger["lr"].unique().to_list() == [1e-3]
    assert ledger["members"].unique().to_list() == [1]
    assert ledger["combine"].unique().to_list() == ["mean"]
    keys = json.loads(ledger["spec"][0])
    for key, value in keys.items():
        if not isinstance(value, dict) and key != "epochs":
            assert key in ledger.columns, key


def test_the_best_configuration_leads_the_ranking(results: embrm.SweepResults) -> None:
    ranking = results.ranking("id")
    best = results.best("id")
    assert best["config"] == ranking["name"][0]
    assert best["low"] <= best["estimate"] <= best["high"]
    assert len(best["run_ids"]) == 2
    report = embrm.report(results.folder, rank_by="id", out=results.folder / "report")
    assert report.comparison.ranking.equals(ranking)


def test_figures_are_those_of_the_report(results: embrm.SweepResults) -> None:
    figures = results.figures("id")
    assert figures["ranked.png"].startswith(b"\x89PNG")
    report = embrm.report(results.folder, rank_by="id", out=results.folder / "report")
    written = {path.name: path.read_bytes() for path in report.files if path.suffix == ".png"}
    assert {name: figures[name] for name in written if name in figures} == {
        name: content for name, content in written.items() if name in figures
    }


def test_scores_are_those_of_the_command(results: embrm.SweepResults) -> None:
    table = results.scores("bt@0")
    assert {"scores_chosen", "scores_rejected", "used"} <= set(table.columns)
    own = table.filter(split="id")
    accuracy = (own["scores_chosen"] > own["scores_rejected"]).mean()
    row = results.ledger.filter(config="bt", seed=0)
    assert accuracy == pytest.approx(row["accuracy@id"][0])


def test_a_sweep_compared_with_itself_differs_nowhere(results: embrm.SweepResults) -> None:
    table = results.compare(results.folder)
    assert set(table["config"]) == {"bt", "bsr[bsr=0.01]", "bsr[bsr=0.1]", "mlp"}
    assert (table["difference"] == 0).all()
    assert table["estimate"].equals(table["other_estimate"], check_names=False)
    assert (table["common_seeds"] == 2).all()


def test_two_sweeps_are_compared_by_hand(
    cache: embrm.Cache, results: embrm.SweepResults, tmp_path: Path
) -> None:
    other = embrm.sweep(
        SPEC | {"defaults": {"epochs": 9, "batch_pairs": 16, "lr": 0.1}},
        cache,
        out=tmp_path / "other",
        jobs=1,
    )
    row = results.compare(other).row(
        by_predicate=(pl.col("config") == "bt")
        & (pl.col("split") == "id")
        & (pl.col("metric") == "accuracy"),
        named=True,
    )
    means = [found.ledger.filter(config="bt")["accuracy@id"].mean() for found in (results, other)]
    assert row["estimate"] == pytest.approx(means[0])
    assert row["difference"] == pytest.approx(means[0] - means[1])
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]


def test_training_here_returns_weights_curve_and_rewards(cache: embrm.Cache) -> None:
    run = embrm.train(cache, {"epochs": 3, "batch_pairs": 16, "seed": 5})
    assert run.status == "ok"
    assert run.spec.seed == 5
    assert run.curve.height == 3
    w = run.weights["output.weight"]
    assert w.shape == (1, 12)
    X = cache.states("last")
    assert run.rewards(X) == pytest.approx(X @ w[0], rel=1e-5, abs=1e-6)
    table = run.rewards("id")
    assert table["scores_chosen"].to_numpy() == pytest.approx(
        run.rewards(X)[cache.pairs.filter(split="id")["chosen"].to_numpy()]
    )
    assert run.metrics["accuracy@id"] is not None
    assert "linear" in repr(run)


def test_several_runs_are_in_the_order_of_their_specs(cache: embrm.Cache) -> None:
    runs = embrm.train(cache, [{"epochs": 1, "bsr": x} for x in (0.1, 0.0, 0.1)])
    assert [run.spec.bsr for run in runs] == [0.1, 0.0, 0.1]
    assert runs[0].run_id == runs[2].run_id != runs[1].run_id
    assert embrm.train(cache, [{"epochs": 1}])[0].name == "run 0"


_BITS = """
import embrm, polars as pl
cache = embrm.open_cache("cache")
spec = {spec!r}
named = [run | spec["defaults"] for run in spec["runs"] if "grid" not in run]
runs = embrm.train(cache, [run | {{"seed": seed}} for run in named for seed in (0, 1)])
results = embrm.sweep(spec, "cache", out="sweep", jobs=2)
ledger = {{row["run_id"]: row for row in results.stored.ledger.to_dicts()}}
same = [
    all(value == run._result.row.get(key) for key, value in ledger[run.run_id].items())
    for run in runs
]
print(len(same), all(same))
"""


@pytest.mark.parametrize("how", [pytest.param("script", marks=pytest.mark.slow), "-c"])
def test_a_plain_script_sweeps_and_trains_to_the_same_bits(tmp_path: Path, how: str) -> None:
    """Without a guard of __main__; workers must not run the script again."""
    toy_cache(tmp_path / "cache")
    code = _BITS.format(spec=SPEC)
    (tmp_path / "script.py").write_text(code)
    command = ["script.py"] if how == "script" else ["-c", code]
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "True"]


def refused(call: Any, *parts: str) -> None:
    with pytest.raises(embrm.UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_bad_input_is_one_line(
    cache: embrm.Cache, results: embrm.SweepResults, tmp_path: Path
) -> None:
    run = embrm.train(cache, {"epochs": 1})
    gone = tmp_path / "gone"
    refused(lambda: embrm.open_cache(gone), str(gone))
    refused(lambda: embrm.open_cache(""), "folder = ''")
    refused(lambda: embrm.open_cache(3), "folder = 3")  # type: ignore[arg-type]
    refused(lambda: cache.states("lost"), "'lost'", "did you mean 'last'?")
    refused(lambda: cache.tokens, "has no token rows")
    refused(lambda: run.rewards("idd"), "'idd'", "did you mean 'id'?")
    refused(lambda: run.rewards(np.zeros((3, 5))), "[3, 5]", "[n, 12]")
    refused(lambda: embrm.train(cache, {"lrr": 1}), "'lrr'", "did you mean 'lr'?")
    refused(lambda: embrm.train(cache, {"loss": "btt"}), "did you mean 'bt'?")
    refused(lambda: embrm.train(cache, []), "specs is empty")
    refused(lambda: embrm.train(cache, "bt"), "specs = 'bt'")  # type: ignore[call-overload]
    refused(lambda: embrm.train(cache, {"grid": {"lr": [1]}}), "embrm.sweep")
    refused(lambda: embrm.train(cache, {}, train="trane"), "'trane'", "did you mean 'train'?")
    refused(lambda: embrm.train(42, {}), "cache = 42")  # type: ignore[call-overload]
    refused(lambda: embrm.sweep(SPEC, cache), "out is missing")
    refused(lambda: embrm.sweep(SPEC | {"seds": 1}, cache, out=gone), "'seds'", "'seeds'")
    refused(lambda: embrm.sweep(tmp_path / "no.toml", cache), "no.toml")
    refused(lambda: embrm.sweep(SPEC, cache, out=gone, memory="4 pounds"), "'4 pounds'")
    refused(lambda: embrm.sweep(SPEC, gone, out=tmp_path / "out"), str(gone))
    refused(lambda: embrm.open_results(gone), "no sweep results")
    refused(lambda: results.scores("bt@7"), "bt@7")
    refused(lambda: results.best("idd"), "'idd'")
    refused(lambda: results.ranking("id", baseline="b"), "'b'")
    refused(lambda: results.compare(gone), "no sweep results")
    refused(lambda: embrm.replay(results.folder, run="no@0"), "no@0")
    refused(lambda: embrm.suite_scores("rm-bench", gone), "must end in .parquet")
    refused(lambda: embrm.probe_regularizers(gone), str(gone))
    refused(lambda: embrm.extract(out=gone), "model")
    refused(lambda: embrm.extract(model="m", data="x.jsonl"), "out (--out) is missing")
    refused(lambda: embrm.extract(model="m", data="x", out=gone, top_kk=3), "top_kk")
    refused(lambda: embrm.adopt(out=gone), "states is missing")
    refused(lambda: embrm.read_labels(gone), str(gone))


def test_arguments_of_a_wrong_type_are_one_line(
    cache: embrm.Cache, results: embrm.SweepResults, tmp_path: Path
) -> None:
    call: Any = embrm  # what a type checker would refuse
    own: Any = results
    head: Any = embrm.train(cache, {"epochs": 1})
    at, gone = results.folder, tmp_path / "gone"
    refused(lambda: own.scores(0), "run = 0: give text")
    refused(lambda: own.scores(None), "run = None: give text")
    refused(lambda: own.ranking(0), "split = 0: give text")
    refused(lambda: own.figures(top="x"), "top = 'x': give a whole number")
    refused(lambda: own.figures(top=True), "top = True: give a whole number")
    refused(lambda: own.compare(3), "folder = 3")
    refused(lambda: call.train(cache, None), "specs = None: give the keys of a run as a mapping")
    refused(lambda: call.train(cache, 3), "specs = 3: give the keys of a run as a mapping")
    refused(lambda: call.train(cache, loss="bt", epochs=1), "embrm.train(cache, {'loss': 'bt', ")
    refused(lambda: call.train(cache, {}, train=3), "train = 3: give a name or a list of names")
    refused(lambda: call.train(cache, {}, validation="x"), "validation = 'x': give a number")
    refused(lambda: call.train(cache, {}, numerics="gpu"), "numerics (--numerics) = 'gpu'")
    refused(lambda: call.sweep(SPEC, cache, out=gone, numerics=3), "numerics (--numerics) = 3")
    refused(lambda: call.sweep(SPEC, cache, out=gone, jobs="x"), "jobs = 'x'")
    refused(lambda: call.sweep(SPEC, cache, out=gone, memory=[1]), "memory = [1]", "'4GB'")
    refused(lambda: call.best_of_n(at, n="4"), "n = '4': give whole numbers")
    refused(lambda: call.benchmark_scores(at, suites="x"), "suites = 'x': give a mapping")
    refused(lambda: call.suite_scores(3, gone), "suite = 3: give text")
    refused(lambda: call.merge("x", gone), "parts = 'x': give a list")
    refused(lambda: call.merge(3, gone), "parts = 3: give a list")
    refused(lambda: call.probe(cache.folder, device=3), "device = 3: give text")
    refused(lambda: call.extract(model="m", data=3, out=gone), "data = 3")
    refused(lambda: call.extract_shard(model="m", data="x", out=gone, shard=0), "shard = 0")
    refused(lambda: call.adopt(out=gone, states=3), "states = 3: give a name or a list")
    refused(lambda: call.annotate_labels(SPEC, gone, quality="x"), "quality = 'x': give a number")
    refused(lambda: call.measure_strengths(at, 3, gone), "configuration = 3: give text")
    refused(lambda: call.confirm(at, 3, gone), "runs = 3: give text")
    refused(lambda: call.export(at, "bt@0", gone, custom=3), "custom = 3: give True or False")
    refused(lambda: call.score(3, "x.jsonl"), "model = 3")
    refused(lambda: head.rewards({}), "of = {}", "[n, 12]")
    refused(lambda: cache.states(3), "view 3 ", "valid: last, mean")  # type: ignore[arg-type]


def test_what_is_missing_has_the_name_that_it_is_given_by(tmp_path: Path) -> None:
    refused(lambda: embrm.extract(), "model (--model) is missing")
    refused(lambda: embrm.extract(model="m"), "data (--data) is missing")
    refused(lambda: embrm.extract(modle="m"), "unknown key 'modle': did you mean 'model'?")
    refused(lambda: embrm.extract("x.jsonl"), "x.jsonl is a data file", "data (--data)")
    missing = tmp_path / "no-model"  # every argument of extract is one of its plan
    refused(
        lambda: embrm.plan_extraction(model=missing, data="x.jsonl", out=tmp_path / "q"),
        f"model = '{missing}'",
    )


def test_a_path_of_something_else_is_named(
    cache: embrm.Cache, results: embrm.SweepResults, tmp_path: Path
) -> None:
    refused(lambda: embrm.verify(tmp_path / "nope"), "no cache at", "nope")
    refused(lambda: embrm.open_cache(results.folder), "holds the results of a sweep, not a cache")
    refused(lambda: embrm.open_results(cache.folder), "is a cache: name the results folder")
    spec = results.folder.with_suffix(".toml")
    refused(lambda: embrm.open_results(spec), f"is a spec; its results are in {results.folder}")


def test_the_name_of_an_unknown_run_leads_to_a_known_one(results: embrm.SweepResults) -> None:
    refused(lambda: results.scores("btt@1"), "no run 'btt@1'", "did you mean 'bt@1'?")
    refused(lambda: results.scores("bsr@0"), "configurations of bsr: 'bsr[bsr=0.01]', 'bsr[bsr=")
    refused(lambda: results.scores("bt@7"), "seeds of bt: 0, 1")
    refused(lambda: results.scores("bt"), "add a seed: bt@0, bt@1")
    refused(lambda: results.scores("zzzz"), "name a run id or CONFIGURATION@SEED, such as ")


def test_a_deleted_cache_is_named(tmp_path: Path) -> None:
    import shutil

    cache = embrm.open_cache(toy_cache(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache")
    refused(lambda: cache.states("last"), str(tmp_path / "cache"))
    refused(lambda: cache.pairs, str(tmp_path / "cache"))


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "datasets", "tokenizers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import embrm
try:
    embrm.extract(model="m", data="x.jsonl", out="cache")
except embrm.UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "which is not installed" in done.stdout, done.stderr
    assert "'.[extract]'" in done.stdout


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, embrm\n"
        "print({'torch', 'polars', 'pyarrow', 'numpy', 'pydantic', 'transformers'}"
        " & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_reading_and_a_sweep_with_nothing_to_do_need_no_torch(
    cache: embrm.Cache, results: embrm.SweepResults
) -> None:
    code = (
        "import sys, embrm\n"
        f"cache = embrm.open_cache({str(cache.folder)!r})\n"
        "cache.states('last'), cache.pairs, cache.groups\n"
        f"results = embrm.open_results({str(results.folder)!r})\n"
        "results.ledger, results.best('id'), results.compare(results)\n"
        f"embrm.sweep({SPEC!r}, cache, out={str(results.folder)!r})\n"  # nothing to do
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
