"""The demo end to end, shrunk: files, report, guide, and a second run that does less."""

from pathlib import Path

import polars as pl
import pytest
from small_demo import RECIPE, SMALL_SWEEP, WORLD

from embrm.cache.reader import open_cache
from embrm.cache.verify import verify
from embrm.core.specs import read_toml
from embrm.demo.run import SPLITS, demo
from embrm.sweeps.spec import SweepSpec, configurations

PACKAGE = Path(__file__).parents[2] / "embrm" / "demo"


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.parquet"
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    out.mkdir()
    (out / "demo.toml").write_text(SMALL_SWEEP)
    demo(out, WORLD, RECIPE)
    return out


def test_the_cache_is_sound_and_has_every_split(finished: Path) -> None:
    cache = open_cache(finished / "cache")
    assert verify(finished / "cache") == []
    assert set(cache.splits) == set(SPLITS)
    assert cache.pairs.filter(pl.col("split") == "train").height == 60 * WORLD.pairs_per_prompt
    assert cache.members.height == 12 * 6


def test_every_run_is_in_the_ledger_and_the_report(finished: Path) -> None:
    ledger = pl.read_parquet(finished / "demo" / "ledger.parquet")
    assert ledger.height == 4
    text = (finished / "demo" / "report.md").read_text()
    assert all(split in text for split in SPLITS if split != "train")
    assert list((finished / "demo" / "figures").glob("*.svg"))


def test_the_same_command_again_keeps_everything(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_below(finished)
    monkeypatch.setattr("embrm.demo.tiny_lm._optimise", None)  # training the model would fail
    engine = "embrm.extraction.transformers_engine.TransformersEngine"
    monkeypatch.setattr(f"{engine}._begin", None)  # so would a forward pass
    demo(finished, WORLD, RECIPE)
    assert bytes_below(finished) == before
    said = capsys.readouterr().out
    for clue in ("What to look at", "ranked.png", "(longer is better)", "needs a network"):
        assert clue in said
    assert f"embrm sweep {finished / 'demo.toml'} --cache {finished / 'cache'}" in said


def test_the_shipped_sweep_is_as_large_as_promised() -> None:
    spec = SweepSpec.parse(read_toml(PACKAGE / "demo.toml"), "demo.toml")
    found = configurations(spec, "demo.toml")
    assert len(found) >= 20
    assert len(found) * len(spec.seeds) >= 60
    assert len(spec.seeds) == 3
