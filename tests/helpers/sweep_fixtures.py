"""Make the fixtures that tests of whole sweeps share: `cache = toy_cache_fixture()` in a module."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from toy_cache import toy_cache

from embrm.cache.reader import open_cache
from embrm.results.ledger import Results, open_results
from embrm.sweeps.execute import sweep
from embrm.sweeps.selection import select
from embrm.sweeps.spec import Selection


def toy_cache_fixture(**options: Any) -> Any:
    """A fixture: the folder of a toy cache. options: those of `toy_cache`."""

    @pytest.fixture(scope="module")
    def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return toy_cache(tmp_path_factory.mktemp("cache") / "toy", **options)

    return cache


def training_fixture() -> Any:
    """A fixture: the training pairs of the module's fixture `cache`, less 10 % for validation."""

    @pytest.fixture(scope="module")
    def training(cache: Path) -> pl.DataFrame:
        opened = open_cache(cache)
        return select(opened, Selection(opened.cache_id, ("train",), 0.1))[0]

    return training


def sweep_fixture(spec: str) -> Any:
    """A fixture: the results folder of the sweep `spec` (TOML) of the module's fixture `cache`."""

    @pytest.fixture(scope="module")
    def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
        return _swept(tmp_path_factory, spec, cache)

    return swept


def results_fixture(spec: str) -> Any:
    """A fixture: the same as `sweep_fixture`, with the results opened."""

    @pytest.fixture(scope="module")
    def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Results:
        return open_results(_swept(tmp_path_factory, spec, cache))

    return swept


def _swept(tmp_path_factory: pytest.TempPathFactory, spec: str, cache: Path) -> Path:
    path = tmp_path_factory.mktemp("sweeps") / "first.toml"
    path.write_text(spec)
    return sweep(path, cache, jobs=1)
