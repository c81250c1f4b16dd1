"""Tests of the descriptions that `embrm cache ls` and `embrm cache show` print."""

from pathlib import Path

import pytest
from small_cache import ENVIRONMENT, IDENTITY, opened, shard, write_cache

from embrm.cache.listing import describe_cache, list_caches
from embrm.cache.manifest import NAME
from embrm.core.errors import UserError
from embrm.core.specs import content_id


def test_a_complete_cache_is_described(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    write_cache(folder, "bfloat16")
    shown = describe_cache(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*.*") if path.name != NAME)
    expected = {
        "name": "small",
        "cache_id": content_id(IDENTITY),
        "model": "tiny",
        "dtype": "bfloat16",
        "width": 6,
        "views": ["last", "layer:1", "mean"],
        "responses": 23,
        "pairs": 11,
        "members": 4,
        "exclusions": 1,
        "leaks": 0,
        "token_rows": 18,
        "top_k": 3,
        "tail_mean": True,
        "bytes": size,
        "files": 15,
        "state": "complete",
        "identity": IDENTITY,
        "environments": [ENVIRONMENT],
    }
    assert {name: shown[name] for name in expected} == expected


def test_caches_in_every_state_are_listed(tmp_path: Path) -> None:
    write_cache(tmp_path / "b-complete")
    with opened(tmp_path / "a-started") as writer:
        writer.write_shard(0, *shard(0))
    with opened(tmp_path / "c-empty"):
        pass
    write_cache(tmp_path / "d-corrupt")
    (tmp_path / "d-corrupt" / NAME).write_text("{")
    (tmp_path / "no-cache").mkdir()
    (tmp_path / "README.md").write_text("")
    table = list_caches(tmp_path)
    assert table["name"].to_list() == ["a-started", "b-complete", "c-empty", "d-corrupt"]
    states = table["state"].to_list()
    assert states[:3] == ["1 of 5 shards", "complete", "0 of 5 shards"]
    assert "is damaged" in states[3]
    assert table.row(1)[1:7] == (
        content_id(IDENTITY),
        "tiny",
        "float32",
        "last, layer:1, mean",
        23,
        11,
    )
    assert table["tokens"].to_list() == ["5, top 3, tail mean", "18, top 3, tail mean", "", None]


def test_a_folder_without_caches_is_an_empty_list(tmp_path: Path) -> None:
    assert list_caches(tmp_path).is_empty()
    with pytest.raises(UserError, match="no folder"):
        list_caches(tmp_path / "nowhere")
