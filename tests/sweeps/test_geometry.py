"""Geometry of runs: against dense float64 softmaxes, alone and in packs, and in a sweep."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from strict_process import strict_process
from sweep_fixtures import sweep_fixture, toy_cache_fixture
from toy_cache import toy_cache
from toy_tokens import toy_tokens

from embrm.cache.reader import open_cache
from embrm.cache.tensors import to_tensor
from embrm.metrics.geometry import MEASURES, sample
from embrm.results.ledger import open_results
from embrm.results.weights import load_run
from embrm.sweeps import geometry as module
from embrm.sweeps.execute import sweep
from embrm.sweeps.geometry import Geometry, Sample, reward_positions
from embrm.sweeps.material import laid_out
from embrm.sweeps.pack_trainer import Trainer
from embrm.sweeps.packs import Pack
from embrm.sweeps.spec import Run, RunSpec, Selection, SweepSpec, configurations, runs
from embrm.training.heads import (
    UP,
    Parameters,
    Preprocess,
    adapted,
    initialise,
    score_states,
    stack,
)
from embrm.training.row_store import RowStore

NONE = Preprocess(None, None)
ADAPTER = {"kind": "linear", "adapter": {"kind": "low-rank", "width": 2}}
N, WIDTH = 12, 6
OF_ADAPTERS = ("drift", "drift_tokens", "kl_tokens", "kl_reward")


def spec(**fields: Any) -> RunSpec:
    return RunSpec.parse({"head": ADAPTER, **fields}, "test")


def head(seed: int, up: float = 0.3, **fields: Any) -> Parameters:
    parameters = initialise(spec(**fields).head, WIDTH, seed)
    if UP in parameters:
        random = torch.Generator().manual_seed(seed)
        parameters[UP] = up * torch.randn(parameters[UP].shape, generator=random)
    return parameters


class Setting:
    """Two splits of one toy language model's responses; each has one token row."""

    def __init__(self, **model: Any) -> None:
        self.tokens, self.dense = toy_tokens((1,) * N, width=WIDTH, tail_means=False, **model)
        random = np.random.default_rng(5)
        self.X = torch.from_numpy(random.standard_normal((N, WIDTH)).astype(np.float32))
        self.samples = {
            name: Sample(torch.arange(*rows), random.random(N)[slice(*rows)], -random.random(N))
            for name, rows in {"train": (0, 5), "ood": (5, N)}.items()
        }
        self.samples = {
            name: Sample(own.rows, own.lengths, own.S[own.rows.numpy()])
            for name, own in self.samples.items()
        }

    def measure(
        self, heads: dict[str, Parameters], *, tokens: bool = True, **fields: Any
    ) -> dict[tuple[str, str], dict[str, Any]]:
        geometry = Geometry(self.samples, self.tokens if tokens else None)
        states = RowStore(self.X)
        every = torch.arange(N)
        rewards = {
            run_id: score_states(own, NONE, states, every).mean(0).numpy()
            for run_id, own in heads.items()
        }
        table = geometry.measure(
            spec(**fields),
            states,
            NONE,
            heads,
            {
                run_id: {name: own[s.rows.numpy()] for name, s in self.samples.items()}
                for run_id, own in rewards.items()
            },
        )
        return {(row["run_id"], row["split"]): row for row in table.iter_rows(named=True)}

    def dense_kl(self, parameters: Parameters, H: torch.Tensor) -> float:
        wide = {name: tensor.double() for name, tensor in parameters.items()}
        before, after = self.dense.log_p(H), self.dense.log_p(adapted(wide, H))
        return (before.exp() * (before - after)).sum(1).mean().item()


MODELS: list[dict[str, Any]] = [{}, {"softcap": 2.0, "scale": 0.7}, {"bias": True}]


@pytest.mark.parametrize("model", MODELS)
def test_divergences_equal_those_of_dense_softmaxes(model: dict[str, Any]) -> None:
    setting, own = Setting(**model, top_k=23), head(1)
    found = setting.measure({"a": own})
    for name, at in setting.samples.items():
        row = found["a", name]
        token_rows = setting.dense.H[at.rows]
        assert row["kl_tokens"] == pytest.approx(setting.dense_kl(own, token_rows), rel=1e-4)
        moved = adapted(own, token_rows.float()) - token_rows
        drifts = moved.norm(dim=1) / token_rows.norm(dim=1)
        assert row["drift_tokens"] == pytest.approx(drifts.mean().item(), rel=1e-5)
        reward_states = setting.X[at.rows].double()
        assert row["kl_reward"] == pytest.approx(setting.dense_kl(own, reward_states), rel=1e-4)
        assert row["responses"] == len(at.rows)


@pytest.mark.parametrize("model", MODELS)
def test_truncated_divergences_of_large_vocabularies_are_close(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, own = Setting(**model), head(1)
    exact = setting.measure({"a": own})["a", "ood"]["kl_reward"]
    monkeypatch.setattr(module, "_EXACT", 0)
    assert setting.measure({"a": own})["a", "ood"]["kl_reward"] == pytest.approx(exact, rel=1e-3)
    errors = []
    for k in (20, 10, 2):
        monkeypatch.setattr(module, "_TOP_K", k)
        truncated = setting.measure({"a": own})["a", "ood"]["kl_reward"]
        errors.append(abs(truncated - exact) / exact)
    assert 1e-6 < errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.1


@pytest.mark.parametrize("words", [4, 23, 64])
def test_reward_positions_hold_the_largest_logits_whatever_is_read_at_a_time(
    words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WORDS", words)
    monkeypatch.setattr(module, "_TOP_K", 7)
    setting = Setting(softcap=2.0, scale=0.7, bias=True)
    found = reward_positions(setting.tokens.head, setting.tokens.weight_rows, setting.X)
    logits = setting.dense.logits(setting.X.double())
    values, ids = logits.topk(7, 1)
    assert found.logsumexp.numpy() == pytest.approx(logits.logsumexp(1).numpy(), rel=1e-5)
    assert torch.equal(found.ids(7)[:, 1:], ids)
    assert found.logits(7)[:, 1:-1].numpy() == pytest.approx(values.numpy(), rel=1e-4)
    assert torch.equal(found.target, ids[:, 0])


@pytest.mark.parametrize("exact", [0, 1 << 13])
def test_an_identity_adapter_moves_nothing(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EXACT", exact)
    setting = Setting()
    plain = head(1, head={"kind": "linear"})
    found = setting.measure({"a": head(1, up=0.0)})
    unmoved = setting.measure({"b": plain}, head={"kind": "linear"})
    for name in setting.samples:
        row = found["a", name]
        assert [row[key] for key in OF_ADAPTERS] == [0.0] * 4
        same = [key for key in MEASURES if key not in OF_ADAPTERS]
        assert {key: row[key] for key in same} == {key: unmoved["b", name][key] for key in same}


def test_undefined_geometry_is_null() -> None:
    setting = Setting()
    moving, plain = {"a": head(1)}, {"a": head(1, head={"kind": "linear"})}
    nothing = setting.measure(plain, head={"kind": "linear"})["a", "ood"]
    assert [key for key in MEASURES if nothing[key] is None] == [*OF_ADAPTERS]
    no_rows = setting.measure(moving, tokens=False)["a", "ood"]
    assert [key for key in MEASURES if no_rows[key] is None] == [*OF_ADAPTERS[1:]]
    pooled = setting.measure(moving, state="tokens")["a", "ood"]
    assert [key for key in MEASURES if pooled[key] is None] == ["kl_reward"]
    setting.samples["ood"].S[:] = np.nan
    assert setting.measure(moving)["a", "ood"]["corr_S"] is None
    one = setting.samples["ood"]
    setting.samples["ood"] = Sample(one.rows[:1], one.lengths[:1], one.S[:1])
    assert setting.measure(moving)["a", "ood"]["corr_length"] is None


def test_a_split_without_token_rows_has_no_divergence_there() -> None:
    setting = Setting()
    held = (0,) * 5 + (2,) * (N - 5)
    setting.tokens, _ = toy_tokens(held, width=WIDTH, tail_means=False)
    found = setting.measure({"a": head(1)})
    assert found["a", "train"]["kl_tokens"] is None
    assert found["a", "train"]["kl_reward"] > 0
    assert found["a", "ood"]["kl_tokens"] > 0


def test_geometry_is_measured_on_the_states_that_the_reward_reads() -> None:
    setting, own = Setting(), head(2)
    row = setting.measure({"a": own})["a", "ood"]
    at = setting.samples["ood"]
    before = setting.X[at.rows].numpy().astype(float)
    after = adapted(own, setting.X[at.rows]).numpy().astype(float)
    norms = np.linalg.norm(after, axis=1)
    reward = after @ own["output.weight"][0].numpy()
    assert row["norm"] == pytest.approx(norms.mean())
    assert row["norm_cv"] == pytest.approx(norms.std() / norms.mean())
    shift = np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)
    assert row["drift"] == pytest.approx(shift.mean(), rel=1e-5)
    assert row["corr_length"] == pytest.approx(np.corrcoef(reward, at.lengths)[0, 1], abs=1e-5)
    assert row["corr_S"] == pytest.approx(np.corrcoef(reward, at.S)[0, 1], abs=1e-5)


def test_geometry_of_an_ensemble_is_the_mean_over_its_members() -> None:
    setting, members = Setting(), [head(seed) for seed in (1, 2, 3)]
    alone = [setting.measure({"a": own})["a", "ood"] for own in members]
    together = setting.measure({"a": stack(members)})["a", "ood"]
    for name in ("norm", "norm_cv", "effective_rank", *OF_ADAPTERS):
        assert together[name] == pytest.approx(np.mean([row[name] for row in alone]))


SPEC = """
baseline = "plain"
seeds = [0, 1]
validation = 0.2
[defaults]
epochs = 2
batch_pairs = 16
lr = 0.01
[[runs]]
name = "plain"
[[runs]]
name = "adapted"
head = { kind = "linear", adapter = { kind = "low-rank", width = 2 } }
[[runs]]
name = "kept"
head = { kind = "linear", adapter = { kind = "low-rank", width = 2 } }
regularizer = { kind = "preserve-kl", weight = 10.0 }
"""


cache = toy_cache_fixture(prompts=300, token_rows=2)
swept = sweep_fixture(SPEC)


def test_a_sweep_stores_geometry_for_every_run_and_split(swept: Path) -> None:
    results = open_results(swept)
    table = results.geometry
    assert table.columns == ["run_id", "split", "responses", *MEASURES]
    assert table.select("run_id", "split").rows() == [
        (run_id, split)
        for run_id in results.ledger["run_id"]
        for split in ("id", "ood/far", "train")
    ]
    named = table.join(results.ledger.select("run_id", "config"), on="run_id")
    moved = named.filter(pl.col("config") != "plain")
    assert moved.select(MEASURES).null_count().sum_horizontal().item() == 0
    plain = named.filter(config="plain")
    assert plain["drift"].null_count() == plain["kl_tokens"].null_count() == plain.height
    # A penalty on what happens at token rows lowers it there.
    kl = dict(named.filter(split="train").group_by("config").agg(pl.col("kl_tokens").mean()).rows())
    assert kl["kept"] < 0.5 * kl["adapted"]


@pytest.mark.slow
def test_a_run_resumed_alone_has_the_same_geometry(
    swept: Path, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "later.toml"
    path.write_text(SPEC.partition('[[runs]]\nname = "adapted"')[0])
    sweep(path, cache, jobs=1)
    path.write_text(SPEC.partition('[[runs]]\nname = "kept"')[0])
    alone = open_results(sweep(path, cache, jobs=1)).geometry
    every = open_results(swept).geometry
    assert alone.height == 12
    assert alone.equals(every.filter(pl.col("run_id").is_in(alone["run_id"].implode())))


def test_adapters_on_a_cache_without_token_rows_have_only_drift(tmp_path: Path) -> None:
    path = tmp_path / "bare.toml"
    path.write_text(SPEC.partition('[[runs]]\nname = "kept"')[0])
    for name, made in {"rows": {}, "head": {"token_rows": 2, "lm_head": False}}.items():
        cache = toy_cache(tmp_path / name, **made)
        results = open_results(sweep(path, cache, jobs=1, out=tmp_path / f"of {name}"))
        found = results.geometry.filter(pl.col("drift").is_not_null())
        assert found["run_id"].n_unique() == 2
        assert found["kl_tokens"].null_count() == found["kl_reward"].null_count() == found.height


def test_the_training_responses_are_sampled_as_a_split(swept: Path, cache: Path) -> None:
    results, source = open_results(swept), open_cache(cache)
    row = results.ledger.filter(config="adapted").row(0, named=True)
    selection = Selection(source.cache_id, ("train",), 0.2)
    with laid_out(source, selection, [], swept.parent / "material") as material:
        trained_on = material.pairs("training")
    rows = sample(np.unique(trained_on.select("chosen", "rejected").to_numpy().astype(np.int64)))
    states = RowStore(to_tensor(source.stored_states("last")))
    saved = load_run(swept, row["run_id"])
    reward = score_states(saved.parameters, saved.preprocess, states, torch.from_numpy(rows))[
        0
    ].numpy()
    S = source.responses["S"].to_numpy()[rows]
    found = results.geometry.filter(run_id=row["run_id"], split="train").row(0, named=True)
    assert found["responses"] == 256
    assert found["corr_S"] == pytest.approx(np.corrcoef(reward, S)[0, 1], abs=1e-6)


def test_splits_that_are_not_evaluated_are_left_out(
    swept: Path, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "few.toml"
    path.write_text(SPEC.replace("seeds", 'evaluate = ["id"]\nseeds'))
    few = open_results(sweep(path, cache, jobs=1)).geometry
    every = open_results(swept).geometry
    assert few.equals(every.filter(pl.col("split") != "ood/far"))


@pytest.mark.slow
def test_a_sweep_of_an_older_embrm_without_geometry_resumes(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.toml"
    path.write_text(SPEC)
    out = sweep(path, cache, jobs=1)
    ledger = open_results(out).ledger
    for file in (out / "geometry.parquet", *out.glob("parts/*/geometry.parquet")):
        file.unlink()
    assert open_results(out).geometry.is_empty()
    path.write_text(SPEC + '[[runs]]\nname = "later"\nlr = 0.1\n')
    sweep(path, cache, jobs=1)
    results = open_results(out)
    assert results.ledger.height == ledger.height + 2
    later = set(results.ledger.filter(config="later")["run_id"])
    assert set(results.geometry["run_id"]) == later


def _rows(cache: Path, folder: Path, packs: list[list[Run]]) -> dict[str, list[Any]]:
    """Every run's rows of geometry, from packs trained one after the other by one worker."""
    source = open_cache(cache)
    found: dict[str, list[Any]] = {}
    every = [run for pack in packs for run in pack]
    selection = Selection(source.cache_id, ("train",), 0.2)
    with laid_out(source, selection, every, folder) as material:
        trainer = Trainer(material, "native")
        for pack in packs:
            files = trainer.run(Pack(tuple(pack)))
            [table] = [content for name, content in files.items() if "geometry" in name]
            for run in pack:
                found[run.run_id] = pl.read_parquet(table).filter(run_id=run.run_id).rows()
    return found


@pytest.fixture(scope="module")
def strict() -> Iterator[Callable[..., Any]]:
    with strict_process() as call:
        yield call


def test_a_run_has_the_same_bits_alone_and_in_a_pack(
    strict: Callable[..., Any], cache: Path, tmp_path: Path
) -> None:
    entry = {"head": ADAPTER, "epochs": 2, "batch_pairs": 16}
    kept = [entry | {"regularizer": {"kind": "preserve-kl", "weight": w}} for w in (0.1, 1.0, 9.0)]
    bare = [entry | {"lr": lr} for lr in (0.001, 0.01, 0.1)]
    named = [{"name": f"c{number}", **own} for number, own in enumerate([*kept, *bare])]
    asked = SweepSpec.parse({"baseline": "c0", "runs": named}, "test")
    selection = Selection("cache", ("train",), 0.2)
    found = runs(configurations(asked, "test"), [0], selection, "native")
    together = strict(_rows, cache, tmp_path / "a", [found[:3], found[3:]])
    # A run without a regularizer of its own, in a sweep where another has one, reads token rows.
    assert all(None not in row for own in together.values() for row in own)
    alone = strict(_rows, cache, tmp_path / "b", [[run] for run in reversed(found)])
    assert alone == together


def test_geometry_depends_on_the_pairs_that_preprocessing_is_fitted_to() -> None:
    """Folds and label tables change these pairs, so preprocessing differs within a sweep."""
    setting = Setting()
    fits = {"0/3": 1.0, "1/3": 4.0}
    parameters = initialise(RunSpec().head, WIDTH, 0)

    def norms(geometry: Geometry, fold: str) -> float:
        run = RunSpec(preprocess="standardize", fold=fold)
        fitted = Preprocess(torch.zeros(WIDTH), torch.full((WIDTH,), fits[fold]))
        rewarded = {"a": {name: np.zeros(len(s.rows)) for name, s in setting.samples.items()}}
        table = geometry.measure(run, RowStore(setting.X), fitted, {"a": parameters}, rewarded)
        return float(table["norm"][0])

    together = Geometry(setting.samples, None)
    for fold in fits:
        assert norms(together, fold) == norms(Geometry(setting.samples, None), fold)
    assert norms(together, "0/3") == pytest.approx(4 * norms(together, "1/3"))
