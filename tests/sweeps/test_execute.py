"""Sweeps of a tiny cache: reproducible bytes, errors in one line, stops and resumption."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sweep_fixtures import sweep_fixture, toy_cache_fixture
from toy_cache import toy_cache

from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.results.ledger import open_results
from embrm.results.rewards import scores
from embrm.sweeps import workers
from embrm.sweeps.execute import sweep
from embrm.sweeps.ledger import finished
from embrm.sweeps.plan import plan_sweep
from embrm.sweeps.selection import select
from embrm.sweeps.spec import RunSpec, Selection
from embrm.sweeps.training_pairs import as_trained

SPEC = """
baseline = "bt"
seeds = [0, 1]
defaults = { epochs = 3, batch_pairs = 16, lr = 0.01 }

[[runs]]
name = "bt"

[[runs]]
name = "bsr"
grid = { bsr = [0.01, 0.1] }

[[runs]]
name = "mlp"
state = "mean"
head = { kind = "mlp", widths = [6], dropout = 0.1 }
preprocess = "standardize"
patience = 1

[[runs]]
name = "wild"
lr = 1e38

[[runs]]
name = "few"
pairs_limit = 40
margin_scale = 0.5
"""


cache = toy_cache_fixture()
swept = sweep_fixture(SPEC)


def _contents(folder: Path) -> dict[str, bytes]:
    """All result files except timings and parts; of sweep.json only the spec and the cache."""
    contents = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in ("timings.parquet", ".lock")
        and "parts" not in path.parts
    }
    header = json.loads(contents["sweep.json"])
    del header["environment"]  # the git revision moves while somebody works beside the test
    return contents | {"sweep.json": json.dumps(header).encode()}


def test_the_ledger_has_a_row_for_every_run(swept: Path) -> None:
    results = open_results(swept)
    ledger = results.ledger
    assert sorted(zip(ledger["config"], ledger["seed"], strict=True)) == sorted(
        (name, seed)
        for name in ("bt", "bsr[bsr=0.01]", "bsr[bsr=0.1]", "mlp", "wild", "few")
        for seed in (0, 1)
    )
    assert ledger["run_id"].is_sorted()
    wild = ledger.filter(pl.col("config") == "wild")
    assert wild["status"].to_list() == ["diverged"] * 2
    assert wild["diverged_epoch"].to_list() == [1, 1]
    assert wild["accuracy@id"].null_count() == wild["weights_sha256"].null_count() == 2
    good = ledger.filter(pl.col("status") == "ok")
    assert good.height == 10
    assert good["accuracy@id"].null_count() == good["tau@ood/far"].null_count() == 0
    assert good["weights_sha256"].n_unique() == 10
    bsr = ledger.filter(pl.col("config") == "bsr[bsr=0.1]")
    assert bsr["bsr_effective"].to_list() == [pytest.approx(1.6)] * 2
    assert set(ledger.filter(pl.col("config") == "few")["train_pairs"]) == {40}
    assert set(results.curves["run_id"]) == set(ledger["run_id"])
    assert set(results.outcomes["run_id"]) == set(good["run_id"])
    assert set(results.prompts["split"]) == {"id", "ood/far"}
    assert set(results.timings["run_id"]) == set(ledger["run_id"])
    pairs_of = dict(results.prompts.group_by("split").agg(pl.col("pairs").sum()).rows())
    for run_id, split, wins, ties in results.outcomes.select(
        "run_id", "split", pl.col("wins").list.sum(), pl.col("ties").list.sum()
    ).rows():
        accuracy = wins / (pairs_of[split] - ties)
        assert results.find(run_id)[f"accuracy@{split}"] == pytest.approx(accuracy)


def test_stored_weights_give_the_scores_the_ledger_was_made_from(swept: Path, cache: Path) -> None:
    results = open_results(swept)
    for config in ("bsr[bsr=0.1]", "mlp"):
        row = results.ledger.filter(pl.col("config") == config).row(0, named=True)
        table = scores(swept, row["run_id"], cache)
        assert table.columns == [
            "pair_id", "split", "used", "subset", "prompt_id", "label", "weight", "tokens_chosen",
            "tokens_rejected", "scores_chosen", "scores_rejected",
        ]  # fmt: skip
        used = dict(table["used"].value_counts().rows())
        assert used["train"] == row["train_pairs"]
        assert used["validation"] == row["validation_pairs"]
        assert set(table.filter(pl.col("split") != "train")["used"]) == {"evaluation"}
        own = table.filter(pl.col("split") == "id")
        right = (own["scores_chosen"] > own["scores_rejected"]).mean()
        assert row["accuracy@id"] == pytest.approx(right)
        margin = (own["scores_chosen"].cast(float) - own["scores_rejected"]).mean()
        assert row["margin@id"] == pytest.approx(margin, rel=1e-4)


def test_scores_of_unknown_runs_are_refused(swept: Path, tmp_path: Path) -> None:
    results = open_results(swept)
    with pytest.raises(UserError, match="no run 'zzz'"):
        scores(swept, "zzz")
    wild = results.ledger.filter(pl.col("config") == "wild")["run_id"][0]
    with pytest.raises(UserError, match=r"\(diverged\) has no weights"):
        scores(swept, wild)
    other = toy_cache(tmp_path / "other", seed=5)
    good = results.ledger.filter(pl.col("status") == "ok")["run_id"][0]
    with pytest.raises(UserError, match="but the run was trained on"):
        scores(swept, good, other)


def test_results_do_not_depend_on_jobs_order_or_earlier_runs(
    swept: Path, cache: Path, tmp_path: Path
) -> None:
    head, *entries = SPEC.split("[[runs]]")
    spec = tmp_path / "second.toml"
    # First half of the runs, in another order; then all of them, with two workers.
    spec.write_text("[[runs]]".join([head, *entries[2::-1]]))
    sweep(spec, cache, jobs=2)
    kept = set(finished(tmp_path / "second"))
    spec.write_text("[[runs]]".join([head, *reversed(entries)]))
    out = sweep(spec, cache, jobs=2)
    first, second = _contents(swept), _contents(out)
    del first["sweep.json"], second["sweep.json"]  # holds the spec in its own order
    assert first == second
    # and a spec that drops runs shows the others only
    spec.write_text("[[runs]]".join([head, *entries[:2]]))
    sweep(spec, cache, jobs=2)
    assert set(open_results(out).ledger["config"]) == {"bt", "bsr[bsr=0.01]", "bsr[bsr=0.1]"}
    assert kept < set(finished(out))


def test_finished_runs_are_not_run_again(
    swept: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _contents(swept)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", None)  # would fail if it were used
    spec = swept.with_suffix(".toml")
    assert sweep(spec, cache) == swept
    assert _contents(swept) == before
    renamed = spec.with_name("renamed.toml")
    renamed.write_text(
        SPEC.replace('"bt"', '"plain"').replace("seeds =", "evaluate = ['id']\nseeds =")
    )
    sweep(renamed, cache, out=swept)
    results = open_results(swept)
    assert "plain" in set(results.ledger["config"])
    assert set(results.prompts["split"]) == {"id"}
    sweep(spec, cache)
    assert _contents(swept) == before


def test_the_plan_counts_and_writes_nothing(cache: Path, swept: Path, tmp_path: Path) -> None:
    spec = tmp_path / "s.toml"
    spec.write_text(SPEC)
    planned = plan_sweep(spec, cache, jobs=2)
    assert (planned["configurations"], planned["runs"], planned["finished"]) == (6, 12, 0)
    assert planned["estimated_seconds"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["s.toml"]
    assert plan_sweep(spec, cache, out=swept)["finished"] == 12


def test_configurations_of_very_few_steps_are_named(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec: dict[str, Any] = {
        "baseline": "few",
        "seeds": [0],
        "runs": [
            {"name": "few", "epochs": 3, "batch_pairs": 512},
            {"name": "many", "epochs": 100, "batch_pairs": 8},
            {"name": "limited", "epochs": 2, "batch_pairs": 8, "pairs_limit": 9},
            {"name": "fitted", "learner": {"kind": "logistic"}},
        ],
    }
    line = "'few', 'limited': 3 to 4 optimizer steps in all: lower batch_pairs or raise epochs"
    assert plan_sweep(spec, cache, out=tmp_path / "out", jobs=1)["warnings"] == [line]
    fewer = spec | {"runs": spec["runs"][:1]}
    for said in (True, False):  # the second time, there is nothing left to train
        sweep(fewer, cache, out=tmp_path / "out", jobs=1)
        line = "warning: 'few': 3 optimizer steps in all: lower batch_pairs or raise epochs\n"
        assert (line in capsys.readouterr().err) == said


def test_validation_pairs_and_limits_are_chosen_by_hash(cache: Path) -> None:
    opened = open_cache(cache)
    selection = Selection(opened.cache_id, ("train",), 0.3)
    training, validation = select(opened, selection)
    assert len(validation)
    assert not set(training["prompt_id"]) & set(validation["prompt_id"])
    assert len(training) + len(validation) == (opened.pairs["split"] == "train").sum()
    small, large = (as_trained(training, RunSpec(pairs_limit=limit)) for limit in (10, 20))
    assert set(small["pair_id"]) < set(large["pair_id"]) < set(training["pair_id"])


BASE = 'baseline = "a"\n'
RUN = '[[runs]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + 'train = ["trian"]\n' + RUN, "train split 'trian' is not in .*'train'"),
        (BASE + 'evaluate = ["ood"]\n' + RUN, "evaluate split 'ood' is not in .*toy: "),
        (BASE + RUN + 'state = "lats"', "run 'a': state 'lats' is not in .*: did you mean 'last'"),
        (BASE + RUN + "pairs_limit = 5000", "pairs_limit = 5000, but there are 64 training pairs"),
        (BASE + "validation = 0.0001\n" + RUN, "validation = 0.0001 keeps no prompt of"),
    ],
)
def test_errors_name_what_the_cache_lacks(
    text: str, message: str, cache: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "s.toml"
    spec.write_text(text)
    for act in (plan_sweep, sweep):
        with pytest.raises(UserError, match=message):
            act(spec, cache)
    assert not (tmp_path / "s").exists()


def test_other_refusals(cache: Path, tmp_path: Path) -> None:
    spec = tmp_path / "s.toml"
    spec.write_text(BASE + RUN + "margin_scale = 1")
    with pytest.raises(UserError, match="training pairs have no margin"):
        plan_sweep(spec, toy_cache(tmp_path / "bare", margins=False))
    spec.write_text(BASE + RUN)
    with pytest.raises(UserError, match="cache is missing"):
        sweep(spec)
    with pytest.raises(UserError, match="jobs = 0"):
        sweep(spec, cache, jobs=0)
    with pytest.raises(UserError, match="no spec at"):
        sweep(tmp_path / "none.toml", cache)
    damaged = tmp_path / "s" / "parts" / "x" / "ledger.parquet"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"is damaged: delete the folder .*/parts/x and"):
        sweep(spec, cache)


def test_a_failed_run_is_named_and_the_others_are_kept(cache: Path, tmp_path: Path) -> None:
    spec = tmp_path / "s.toml"
    # Past what can be allocated: an error in the worker that no check foresees.
    spec.write_text(
        BASE
        + "seeds = [0]\ndefaults = { epochs = 1 }\n"
        + RUN
        + '[[runs]]\nname = "huge"\nhead = { kind = "mlp", widths = [4, 4000000000000] }\n'
    )
    with pytest.raises(UserError, match="1 of 2 runs failed, the others are kept: huge seed 0: "):
        sweep(spec, cache, jobs=1)
    assert open_results(tmp_path / "s").ledger["config"].to_list() == ["a"]


MANY = """
baseline = "r[lr=0.01,widths=2]"
seeds = [0, 1, 2]
defaults = { epochs = 10, batch_pairs = 8, head = { kind = "mlp", widths = [2] } }
[[runs]]
name = "r"
[runs.grid]
lr = [0.01, 0.02]
"head.widths" = [[2], [3], [4], [5], [6], [7]]
"""


SCRIPT = """
import sys
from pathlib import Path
from embrm.core.errors import UserError
from embrm.sweeps.execute import sweep
if __name__ == "__main__":
    try:
        sweep(Path(sys.argv[1]), Path(sys.argv[2]), jobs=2)
    except (UserError, KeyboardInterrupt) as error:
        sys.exit(f"stopped: {error}")
"""


def _stop(spec: Path, cache: Path, parts: int, delay: float, how: str) -> str:
    """Run the sweep until `parts` packs and `delay` seconds have passed; its last words."""
    script = spec.with_suffix(".py")
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(spec), str(cache)],
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    out = spec.with_suffix("")
    while process.poll() is None and len([*out.glob("parts/*/ledger.parquet")]) < parts:
        time.sleep(0.005)
    time.sleep(delay)
    if how == "kill the writer":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT if how == "ctrl-c" else signal.SIGKILL)
    _, words = process.communicate()
    for _ in range(1000):  # no worker outlives its writer
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return words
        time.sleep(0.01)
    raise AssertionError("a worker outlived its writer")


@pytest.mark.slow
def test_a_stopped_and_resumed_sweep_has_the_same_results(cache: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole.toml", tmp_path / "stopped.toml"
    for spec in (whole, stopped):
        spec.write_text(MANY)
    sweep(whole, cache, jobs=2)
    choose = random.Random(4)
    out, done = tmp_path / "stopped", 0
    for how in ("kill the writer", "ctrl-c", "kill all"):
        parts = done // 2 + choose.randint(1, 4)
        words = _stop(stopped, cache, parts, choose.random() * 0.1, how)
        before, done = done, len(finished(out))
        assert before < done < 36
        if how == "ctrl-c":
            assert "stopped: " in words
            assert "Traceback" not in words
            assert len(open_results(out).ledger) == done
    sweep(stopped, cache, jobs=1)
    assert _contents(out) == _contents(tmp_path / "whole")
    assert len(open_results(out).ledger) == 36
