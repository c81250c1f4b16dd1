"""Label tables, folds and noise in a sweep; strengths and annotations made from one."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sweep_fixtures import toy_cache_fixture, training_fixture
from toy_groups import toy_groups

from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.data.label_tables import LabelTable, read_label_table, write_label_table
from embrm.data.splits import folds, holdout
from embrm.results.ledger import Results, open_results
from embrm.results.replay import replay
from embrm.results.rewards import scores
from embrm.studies.annotation import annotation
from embrm.studies.strength.measure import deciles, strengths
from embrm.sweeps.execute import sweep
from embrm.sweeps.prepare import prepare_sweep
from embrm.sweeps.spec import RunSpec
from embrm.sweeps.training_pairs import as_trained, with_rules

MADE = {"rule": "test", "parameters": {}, "cache_id": "c", "embrm": "0"}

HEAD = """
baseline = "bt"
seeds = [0, 1]
defaults = { epochs = 4, batch_pairs = 16, lr = 0.03 }
[[runs]]
name = "bt"
"""


def _table(path: Path, rows: pl.DataFrame) -> Path:
    write_label_table(path, LabelTable("labels", rows, MADE))
    return path


cache = toy_cache_fixture(prompts=100)
training = training_fixture()


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory, training: pl.DataFrame) -> dict[str, Path]:
    """same: the data's own labels; noisy: as label_noise = 0.2 flips; half: without every other
    pair; margins: twice the data's."""
    folder = tmp_path_factory.mktemp("labels")
    ids = training.select("pair_id")
    flipped = holdout(training["pair_id"], 0.2, 0, "label noise")
    half = pl.Series([float(row % 2) for row in range(len(training))])
    rows = {
        "same": ids.with_columns(label=pl.lit(1.0)),
        "noisy": ids.with_columns(label=pl.Series(1.0 - flipped)),
        "half": ids.with_columns(label=pl.lit(1.0), weight=half),
        "margins": ids.with_columns(margin=training["margin"] * 2),
    }
    return {name: _table(folder / f"{name}.parquet", table) for name, table in rows.items()}


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, tables: dict[str, Path]
) -> Results:
    text = HEAD
    for name, path in tables.items():
        text += f'[[runs]]\nname = "{name}"\nlabels = "{path}"\n'
        text += "margin_scale = 0.5\n" if name == "margins" else ""
    text += '[[runs]]\nname = "noise"\nlabel_noise = 0.2\n'
    text += '[[runs]]\nname = "margin"\nmargin_scale = 1.0\n'
    text += '[[runs]]\nname = "folds"\ngrid = { fold = ["0/3", "1/3", "2/3"] }\n'
    spec = tmp_path_factory.mktemp("sweeps") / "labels.toml"
    spec.write_text(text)
    return open_results(sweep(spec, cache, jobs=1))


def _column(results: Results, config: str, name: str) -> list[Any]:
    return results.ledger.filter(config=config).sort("seed")[name].to_list()


@pytest.mark.parametrize(
    ("table", "run"), [("same", "bt"), ("noisy", "noise"), ("margins", "margin")]
)
def test_a_label_table_equals_the_corresponding_field_of_a_run(
    swept: Results, table: str, run: str
) -> None:
    """Weights have the same bits, but the runs have different ids."""
    assert _column(swept, table, "weights_sha256") == _column(swept, run, "weights_sha256")
    assert not set(_column(swept, table, "run_id")) & set(_column(swept, run, "run_id"))
    assert (
        len({*_column(swept, "bt", "weights_sha256"), *_column(swept, "noise", "weights_sha256")})
        == 4
    )


def test_pairs_without_weight_and_of_the_fold_are_left_out(
    swept: Results, training: pl.DataFrame
) -> None:
    assert set(_column(swept, "half", "train_pairs")) == {len(training) // 2}
    assert set(_column(swept, "bt", "train_pairs")) == {len(training)}
    own = folds(training["prompt_id"], 3)
    for fold in range(3):
        trained_on = _column(swept, f"folds[fold={fold}/3]", "train_pairs")
        assert set(trained_on) == {int((own != fold).sum())}
    assert set(_column(swept, "half", "validation_pairs")) == set(
        _column(swept, "bt", "validation_pairs")
    )


def test_a_replay_reads_the_table_again_and_refuses_another(
    swept: Results, tables: dict[str, Path], training: pl.DataFrame
) -> None:
    assert replay(swept.folder, run="noisy@1").runs[0].same_bits
    path = tables["noisy"]
    before = path.read_bytes()
    try:
        _table(path, training.select("pair_id", label=pl.lit(0.5)))
        with pytest.raises(UserError, match=r"has become another table .*: restore it"):
            replay(swept.folder, run="noisy@1")
    finally:
        path.write_bytes(before)


def test_ids_follow_the_content_of_a_table_not_its_path(
    cache: Path, tables: dict[str, Path], tmp_path: Path
) -> None:
    def run_ids(path: Path) -> list[str]:
        spec = tmp_path / "s.toml"
        spec.write_text(HEAD + f'labels = "{path}"')
        return [run.run_id for run in prepare_sweep(spec, cache, None).runs]

    copy = tmp_path / "copy.parquet"
    copy.write_bytes(tables["same"].read_bytes())
    assert run_ids(copy) == run_ids(tables["same"])
    assert not set(run_ids(copy)) & set(run_ids(tables["half"]))


def test_fields_that_are_not_set_are_not_recorded() -> None:
    assert not {"labels", "fold"} & RunSpec().model_dump().keys()


def test_refusals(
    cache: Path, tables: dict[str, Path], training: pl.DataFrame, tmp_path: Path
) -> None:
    few = _table(tmp_path / "few.parquet", training.select("pair_id", label=pl.lit(1.0)).head(3))
    none = _table(tmp_path / "none.parquet", training.select("pair_id", weight=pl.lit(0.0)))
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(tables["same"].read_bytes())
    lines = {
        f'labels = "{tmp_path / "no.parquet"}"': "run 'x': no label table at .*: make it with",
        f'labels = "{few}"': f"lacks {len(training) - 3} of the {len(training)} training pairs,",
        f'labels = "{none}"': "its label table and fold leave no pair to train on",
        f'labels = "{tables["same"]}"\n[[runs]]\nname = "y"\nlabels = "{copy}"': (
            "runs 'x' and 'y' have label tables of the same content: remove one"
        ),
        'fold = "3/3"': "fold = '3/3': write i/k with 0 ≤ i < k and k at least 2",
        'fold = "1"': "fold = '1': write i/k",
    }
    for fields, line in lines.items():
        spec = tmp_path / "s.toml"
        spec.write_text(f'{HEAD}[[runs]]\nname = "x"\n{fields}')
        with pytest.raises(UserError, match=line) as caught:
            prepare_sweep(spec, cache, None)
        assert "\n" not in str(caught.value)


def test_noise_comes_after_the_table_and_the_limit_before_it(
    training: pl.DataFrame, tables: dict[str, Path]
) -> None:
    spec = RunSpec(labels=str(tables["half"]), label_noise=0.2, pairs_limit=20)
    rows = as_trained(with_rules(training, [spec]), spec)
    assert rows["pair_id"].to_list() == training["pair_id"][:20].to_list()[1::2]
    flipped = holdout(rows["pair_id"], 0.2, 0, "label noise")
    assert rows["label"].to_list() == (1.0 - flipped).tolist()


def _differences(swept: Results, run: str) -> pl.DataFrame:
    table = scores(swept.folder, run)
    difference = pl.col("scores_chosen").cast(pl.Float64) - pl.col("scores_rejected")
    return table.select("pair_id", "prompt_id", "used", difference.alias(run))


def test_strength_is_the_mean_and_population_sd_over_seeds(
    swept: Results, training: pl.DataFrame
) -> None:
    for name, side in (("bt", None), ("noise", -1)):
        table = strengths(swept.folder, name)
        members = [_differences(swept, f"{name}@{seed}") for seed in (0, 1)]
        both = members[0].join(members[1], on="pair_id").filter(used="train").sort("pair_id")
        values = both.select(f"{name}@0", f"{name}@1").to_numpy()
        rows = table.rows.sort("pair_id")
        assert rows["pair_id"].to_list() == both["pair_id"].to_list()
        sign = np.where(rows["label"] == 1, 1, side or 1)
        assert rows["strength"].to_numpy() == pytest.approx(sign * values.mean(1))
        assert rows["spread"].to_numpy() == pytest.approx(values.std(1))
        margin = training.sort("pair_id")["margin"].to_numpy()
        assert rows["gold"].to_numpy() == pytest.approx(sign * margin)
    assert (rows["label"] == 0).sum() > 0


def test_out_of_fold_strengths_come_from_heads_not_trained_on_the_prompt(
    swept: Results, training: pl.DataFrame
) -> None:
    rows = strengths(swept.folder, "folds", out_of_fold=True).rows.sort("pair_id")
    own = folds(training.sort("pair_id")["prompt_id"], 3)
    for fold in range(3):
        name = f"folds[fold={fold}/3]"
        heads = [_differences(swept, f"{name}@{seed}").sort("pair_id") for seed in (0, 1)]
        values = np.stack([
            head.filter(pl.col("pair_id").is_in(rows["pair_id"].implode()))[f"{name}@{seed}"]
            for seed, head in enumerate(heads)
        ])  # fmt: skip
        mine = own == fold
        assert rows["strength"].to_numpy()[mine] == pytest.approx(values.mean(0)[mine])
        assert rows["spread"].to_numpy()[mine] == pytest.approx(values.std(0)[mine])
        unseen = heads[0].filter(pl.col("pair_id").is_in(rows["pair_id"].implode()))
        assert (unseen["used"].is_null().to_numpy() == mine).all()
    assert not np.allclose(
        rows["strength"], strengths(swept.folder, "bt").rows.sort("pair_id")["strength"]
    )


def test_strength_refusals(swept: Results) -> None:
    for name, out_of_fold, line in (
        ("b", False, "no 'b' in .*: "),
        ("bt", True, "no folds of 'bt' in .*: add grid = { fold"),
        (
            "folds[fold=0/3]",
            False,
            "was trained without fold 0/3: pass out_of_fold .--out-of-fold. with",
        ),
    ):
        with pytest.raises(UserError, match=line.replace("[", r"\[").replace("{", r"\{")):
            strengths(swept.folder, name, out_of_fold=out_of_fold)


def test_deciles() -> None:
    rows = pl.DataFrame(
        {
            "pair_id": [f"{number:03}" for number in range(100)],
            "strength": [float(number - 25) for number in range(100)],
            "spread": [0.5] * 100,
            "gold": [-1.0] * 10 + [0.0] * 10 + [None] * 10 + [2.0] * 70,
        }
    )
    found = deciles(rows.sample(fraction=1.0, shuffle=True, seed=0))
    assert found["decile"].to_list() == list(range(1, 11))
    assert set(found["pairs"]) == {10}
    assert found["negative"].to_list() == [1, 1, 0.5, *[0.0] * 7]
    assert found["right"].to_list() == [0.0, None, None, *[1.0] * 7]
    assert found["gold"].to_list() == [-1.0, 0.0, None, *[2.0] * 7]
    assert found["lowest"][0] == -25
    assert found["highest"][9] == 74
    assert deciles(rows.head(3))["pairs"].to_list() == [1, 1, 1]


def test_annotations_follow_gold_and_report_their_error(tmp_path: Path, cache: Path) -> None:
    groups = toy_groups(tmp_path / "groups")
    spec = tmp_path / "s.toml"
    spec.write_text(HEAD + '[scenarios]\nsplits = ["train", "more"]\nmodels = 0.4')
    good, poor = (annotation(spec, groups, quality=quality) for quality in (1e6, 0.5))
    assert good.error == good.expected == 0
    assert set(good.labels.rows["label"]) == {1.0}
    assert poor.error == pytest.approx(poor.expected, abs=0.06)
    assert poor.error == pytest.approx((poor.labels.rows["label"] == 0).mean())
    write_label_table(tmp_path / "poor.parquet", poor.labels)
    assert (
        read_label_table(tmp_path / "poor.parquet", "labels").provenance["parameters"]["quality"]
        == 0.5
    )
    spec.write_text(
        spec.read_text().replace(
            'name = "bt"', f'name = "bt"\nlabels = "{tmp_path / "poor.parquet"}"'
        )
    )
    [first, _] = prepare_sweep(spec, groups, None).runs
    assert first.spec.labels.endswith(poor.labels.digest)
    spec.write_text(HEAD)
    with pytest.raises(UserError, match="an annotator reads gold scores, but train has pairs"):
        annotation(spec, cache, quality=1)
    with pytest.raises(UserError, match="quality = -1: give a number of at least 0"):
        annotation(spec, cache, quality=-1)


NOISY = (
    'validation_labels = "noisy"\n'
    + HEAD
    + """
[[runs]]
name = "noise"
label_noise = 0.2
patience = 2
"""
)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Results]:
    """The same sweep with noisy and with clean validation labels."""
    folder = tmp_path_factory.mktemp("validated")
    texts = {"noisy": NOISY, "clean": NOISY.replace('"noisy"', '"clean"')}
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
    return {name: open_results(sweep(folder / f"{name}.toml", cache, jobs=1)) for name in texts}


def test_without_label_noise_both_validation_labels_are_one_run(noisy: dict[str, Results]) -> None:
    for column in ("run_id", "weights_sha256", "temperature", "validation_nll"):
        clean, flipped = (_column(noisy[name], "bt", column) for name in ("clean", "noisy"))
        assert clean == flipped
    ids = [{*_column(noisy[name], "noise", "run_id")} for name in ("clean", "noisy")]
    assert not ids[0] & ids[1]
    assert "validation_labels" not in noisy["clean"].spec.model_dump()


@pytest.mark.parametrize("labels", ["clean", "noisy"])
def test_noisy_validation_labels_are_flipped_by_the_rule_of_training(
    noisy: dict[str, Results], labels: str
) -> None:
    """Validation accuracy, NLL and temperature follow from the rewards and the flipped labels."""
    results = noisy[labels]
    for seed in (0, 1):
        row = results.find(f"noise@{seed}")
        pairs = scores(results.folder, row["run_id"]).filter(used="validation")
        flip = holdout(pairs["pair_id"], 0.2, 0, "label noise") & (labels == "noisy")
        assert flip.any() == (labels == "noisy")
        sign = np.where(flip, -1.0, 1.0)
        margin = sign * (pairs["scores_chosen"] - pairs["scores_rejected"]).to_numpy().astype(float)
        assert row["validation_accuracy"] == pytest.approx((margin > 0).mean())
        assert row["validation_nll"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)
        if row["temperature"] is not None:
            grid = np.geomspace(0.5, 2, 41) * row["temperature"]
            losses = [np.log1p(np.exp(-margin / T)).mean() for T in grid]
            assert int(np.argmin(losses)) == 20


def test_a_label_table_replaces_noisy_validation_labels(
    noisy: dict[str, Results], cache: Path, training: pl.DataFrame, tmp_path: Path
) -> None:
    pairs = open_cache(cache).pairs.filter(split="train").select("pair_id")
    flipped = holdout(pairs["pair_id"], 0.2, 0, "label noise")
    whole = _table(tmp_path / "whole.parquet", pairs.with_columns(label=pl.Series(1.0 - flipped)))
    spec = tmp_path / "s.toml"
    spec.write_text(NOISY.replace("label_noise = 0.2", f'labels = "{whole}"'))
    results = open_results(sweep(spec, cache, jobs=1))
    for column in ("weights_sha256", "best_epoch", "temperature", "validation_accuracy"):
        assert _column(results, "noise", column) == _column(noisy["noisy"], "noise", column)
    assert replay(results.folder, run="noise@1").runs[0].same_bits
    half = _table(tmp_path / "half.parquet", training.select("pair_id", label=pl.lit(1.0)))
    spec.write_text(NOISY.replace("label_noise = 0.2", f'labels = "{half}"'))
    left = len(pairs) - len(training)
    with pytest.raises(UserError, match=f"lacks {left} of the {left} validation pairs, .*'clean'"):
        prepare_sweep(spec, cache, None)
    none = pairs.with_columns(
        weight=pl.col("pair_id").is_in(training["pair_id"].implode()).cast(pl.Float64)
    )
    weightless = _table(tmp_path / "none.parquet", none)
    spec.write_text(NOISY.replace("label_noise = 0.2", f'labels = "{weightless}"'))
    with pytest.raises(UserError, match="run 'noise': its label table leaves no validation pair"):
        prepare_sweep(spec, cache, None)
