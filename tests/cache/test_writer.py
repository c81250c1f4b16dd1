"""Tests of writing a cache: resumed after kills, full disks and lost files with the same bytes."""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_cache import (
    ENVIRONMENT,
    IDENTITY,
    SHARD_ROWS,
    digests,
    lm_head,
    opened,
    shard,
    write_cache,
    write_missing,
)

from embrm.cache import writer
from embrm.cache.manifest import NAME, read_manifest, responses_file, tokens_file
from embrm.cache.tensors import to_tensor
from embrm.cache.verify import verify
from embrm.core.errors import UserError
from embrm.core.files import TEMPORARY

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of an uninterrupted cache."""
    folder = tmp_path_factory.mktemp("whole") / "small"
    write_cache(folder)
    assert verify(folder) == []
    return digests(folder)


def test_equal_input_gives_equal_bytes(tmp_path: Path, whole: dict[str, str]) -> None:
    write_cache(tmp_path / "again")
    assert digests(tmp_path / "again") == whole


def test_shards_may_be_written_in_any_order(tmp_path: Path, whole: dict[str, str]) -> None:
    with opened(tmp_path) as writer:
        for index in (4, 0, 3, 1, 2):
            writer.write_shard(index, *shard(index))
        writer.finish()
    assert digests(tmp_path) == whole


def test_shards_may_be_written_by_several_threads(tmp_path: Path, whole: dict[str, str]) -> None:
    with opened(tmp_path) as writer:
        with ThreadPoolExecutor(5) as threads:
            # list() raises here what a thread raised
            list(threads.map(lambda index: writer.write_shard(index, *shard(index)), range(5)))
        writer.finish()
    assert digests(tmp_path) == whole


def test_the_digest_covers_all_pieces_of_a_file(
    tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_PIECE_BYTES", 7)
    write_cache(tmp_path)
    assert digests(tmp_path) == whole
    assert verify(tmp_path) == []


def test_a_resumed_cache_is_byte_identical(tmp_path: Path, whole: dict[str, str]) -> None:
    for stop in range(5):
        with opened(tmp_path) as writer:
            assert writer.done == frozenset(range(stop))
            writer.write_shard(stop, *shard(stop))
    with opened(tmp_path) as writer:
        write_missing(writer)
    assert digests(tmp_path) == whole


def test_a_finished_cache_is_not_changed(tmp_path: Path) -> None:
    write_cache(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}

    def never() -> dict[str, torch.Tensor]:
        raise AssertionError("lm_head asked for again")

    with opened(tmp_path, lm_head=never, environment={"engine": "other"}) as writer:
        write_missing(writer)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    lock = tmp_path / ".lock"
    assert {**before, lock: 0} == {**after, lock: 0}


def test_a_cache_interrupted_at_any_rename_resumes_to_the_same_bytes(
    whole: dict[str, str], stopped_at_every_rename: Callable[..., Iterator[Path]]
) -> None:
    stops = 0
    for folder in stopped_at_every_rename(write_cache):
        stops += 1
        finished = digests(folder)
        write_cache(folder)
        assert digests(folder) == whole
        # Nothing that was finished has changed.
        assert all(whole[name] == digest for name, digest in finished.items() if name != NAME)
    # 5 shards of 2 files and a manifest each, 4 tables and the head with a manifest, first and last
    assert stops == 5 * 3 + 5 + 3


@pytest.mark.slow
def test_a_cache_killed_at_random_moments_resumes_to_the_same_bytes(
    tmp_path: Path, whole: dict[str, str]
) -> None:
    folder = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
    moments = random.Random(5)
    kills, seconds = 0, 0.08
    while kills < 6:
        command = [sys.executable, str(HELPERS / "small_cache.py"), str(folder)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert child.stdout is not None
        with child, child.stdout:
            assert child.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, seconds))
            child.kill()
            if "finished" in child.stdout.read():
                # It finished before the kill: start again, and kill earlier.
                assert digests(folder) == whole
                shutil.rmtree(folder)
                seconds /= 2
            else:
                kills += 1
    write_cache(folder)
    assert digests(folder) == whole


def test_resuming_trusts_the_manifest_not_the_files(tmp_path: Path, whole: dict[str, str]) -> None:
    with opened(tmp_path) as writer:
        writer.write_shard(0, *shard(0))
    # The state after a kill between a file's rename and its entry, or in the middle of a write.
    (tmp_path / responses_file(1)).write_bytes(b"half a shard")
    (tmp_path / "tokens" / f"{TEMPORARY}part-00001.parquet").write_bytes(b"half")
    with opened(tmp_path) as writer:
        assert writer.done == {0}
        write_missing(writer)
    assert digests(tmp_path) == whole


@pytest.mark.parametrize(
    "name",
    [
        responses_file(2),
        tokens_file(2),
        tokens_file(1),
        "pairs.parquet",
        "leaks.parquet",
        "lm_head.safetensors",
    ],
)
@pytest.mark.parametrize("cut", [None, 0, 10])
def test_a_lost_file_is_written_again_with_a_warning(
    tmp_path: Path,
    whole: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    name: str,
    cut: int | None,
) -> None:
    write_cache(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if cut is not None:
        path.write_bytes(content[:cut])
    with opened(tmp_path) as writer:
        assert not read_manifest(tmp_path).complete
        write_missing(writer)
    assert capsys.readouterr().err == (
        f"warning: {path} is missing or has the wrong size: it is written again\n"
    )
    assert digests(tmp_path) == whole


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        with pytest.raises(UserError, match="is being written by another embrm process"):
            write_cache(tmp_path)
        write_missing(writer)
    write_cache(tmp_path)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (IDENTITY | {"dtype": "bfloat16"}, "dtype = 'float32', not 'bfloat16': use the same"),
        (
            IDENTITY | {"max_tokens": 256, "model": {"revision": "r2"}},
            "max_tokens = 512, not 256 (also: model.revision): use the same settings or another",
        ),
        (IDENTITY | {"template": "none"}, "template = None, not 'none': use"),
        (IDENTITY | {"template": {}}, "template = None, not {}: use"),
        ({"dtype": "float32", "max_tokens": 512, "views": ["last"]}, "model.revision = 'r1', not"),
        (IDENTITY | {"views": ["x" * 99]}, "views = ['last'], not ['" + "x" * 55 + "...: use"),
    ],
)
def test_another_identity_is_refused(
    tmp_path: Path, identity: dict[str, Any], message: str
) -> None:
    write_cache(tmp_path)
    before = digests(tmp_path)
    with pytest.raises(UserError) as error:
        write_cache(tmp_path, identity=identity)
    assert f"{tmp_path} was extracted with {message}" in str(error.value)
    assert "\n" not in str(error.value)
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [({"shard_rows": 8}, "shard_rows = 5, not 8"), ({"n_responses": 22}, "n_responses = 23, not")],
)
def test_another_division_into_shards_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_cache(tmp_path)
    with pytest.raises(UserError, match=message):
        write_cache(tmp_path, **change)


def test_identities_are_compared_regardless_of_key_order_and_types(tmp_path: Path) -> None:
    write_cache(tmp_path)
    other = {**dict(reversed(IDENTITY.items())), "views": ("last",)}
    write_cache(tmp_path, identity=other)


def test_environment_and_extraction_do_not_change_the_id(tmp_path: Path) -> None:
    write_cache(tmp_path / "a")
    write_cache(tmp_path / "b", environment={"engine": "b"}, extraction={"batch": 7}, data={})
    a, b = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert a.cache_id == b.cache_id
    assert a.shards == b.shards
    assert b.environments == ({"engine": "b"},)


def test_a_new_environment_is_recorded_when_it_writes(tmp_path: Path) -> None:
    other = ENVIRONMENT | {"device": "cuda"}
    with opened(tmp_path) as writer:
        writer.write_shard(0, *shard(0))
    with opened(tmp_path, environment=other):
        pass
    assert read_manifest(tmp_path).environments == (ENVIRONMENT,)
    with opened(tmp_path, environment=other) as writer:
        writer.write_shard(1, *shard(1))
    write_cache(tmp_path)
    assert read_manifest(tmp_path).environments == (ENVIRONMENT, other)


def test_a_folder_with_other_content_is_refused_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / f"{TEMPORARY}x").write_text("also precious")
    with pytest.raises(
        UserError, match=r"is not a cache \(it has 'thesis\.txt' but no manifest\.json\)"
    ):
        write_cache(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{TEMPORARY}x", "thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_text("")
    with pytest.raises(UserError, match="is a file: name a folder"):
        write_cache(path)
    with pytest.raises(UserError, match="choose another folder"):
        write_cache(path / "below")


def test_a_damaged_manifest_stops_a_resume(tmp_path: Path) -> None:
    write_cache(tmp_path)
    manifest = tmp_path / NAME
    manifest.write_bytes(manifest.read_bytes()[:-20])
    before = digests(tmp_path)
    with pytest.raises(UserError, match="damaged: restore it from a copy or extract into a new"):
        write_cache(tmp_path)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("view", ["last", "layer:1"])
def test_the_error_about_a_non_finite_state_names_it(
    tmp_path: Path, dtype: str, value: float, view: str
) -> None:
    with opened(tmp_path) as writer:
        writer.write_shard(0, *shard(0, dtype))
        rows, tokens = shard(2, dtype)
        to_tensor(rows.states[view])[3, 5] = value
        with pytest.raises(UserError) as error:
            writer.write_shard(2, rows, tokens)
        assert writer.done == {0}
    assert str(error.value) == (
        f"state {view!r} of response {2 * SHARD_ROWS + 3:016x} is NaN or infinite: "
        "extract in float32 or bfloat16, and check the model's weights"
    )


@pytest.mark.parametrize(
    "field", ["S", "norm 'mean'", "token state", "token top_logits", "token tail_mean"]
)
def test_other_non_finite_numbers_are_refused_too(tmp_path: Path, field: str) -> None:
    rows, tokens = shard(2)
    places: dict[str, Any] = {
        "S": rows.S,
        "norm 'mean'": rows.norms["mean"],
        "token state": tokens.state,
        "token top_logits": tokens.top_logits,
        "token tail_mean": tokens.tail_mean,
    }
    places[field][1] = np.nan
    with (
        opened(tmp_path) as writer,
        pytest.raises(UserError, match=f"^{field} of response 000000000000000b is NaN"),
    ):
        writer.write_shard(2, rows, tokens)


def test_a_shard_of_another_layout_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        writer.write_shard(0, *shard(0))
        message = r"shard 1 has dtype = 'float32', not 'float16': extract into a new folder"
        with pytest.raises(UserError, match=message):
            writer.write_shard(1, *shard(1, "float16"))
        with pytest.raises(UserError, match=r"tail_mean = True, not False \(also: top_k\)"):
            writer.write_shard(1, shard(1)[0], None)
        rows, tokens = shard(1)
        with pytest.raises(UserError, match="tail_mean = True, not False:"):
            writer.write_shard(1, rows, dataclasses.replace(tokens, tail_mean=None))


def test_one_of_two_concurrent_first_shards_determines_the_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither shard is stored before the layouts of both are known.
    both = threading.Barrier(2, timeout=20)
    refuse = writer._refuse_non_finite
    monkeypatch.setattr(writer, "_refuse_non_finite", lambda *rows: (both.wait(), refuse(*rows)))

    def write(index: int, dtype: str) -> str:
        try:
            made.write_shard(index, *shard(index, dtype))
        except UserError as error:
            both.wait()
            return str(error)
        return ""

    with opened(tmp_path) as made, ThreadPoolExecutor(2) as threads:
        errors = [*threads.map(write, (0, 1), ("float32", "float16"))]
    assert sorted(map(bool, errors)) == [False, True]
    assert "extract into a new folder" in max(errors)


def test_invalid_calls_raise_value_errors(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        writer.write_shard(0, *shard(0))
        with pytest.raises(ValueError, match="shard 0 holds"):
            writer.write_shard(0, *shard(0))
        with pytest.raises(ValueError, match="shard 2 holds"):
            writer.write_shard(2, *shard(1))
        with pytest.raises(ValueError, match="name responses outside"):
            writer.write_shard(2, shard(2)[0], shard(3)[1])
        with pytest.raises(ValueError, match="1 of 5 shards"):
            writer.finish()


def test_a_cache_may_have_no_sampled_positions(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        for index in range(writer.n_shards):
            writer.write_shard(index, shard(index)[0], None)
        writer.finish()
    assert not (tmp_path / "tokens").exists()
    assert verify(tmp_path) == []


def test_sampled_positions_may_have_no_top_logits(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        for index in range(writer.n_shards):
            rows, tokens = shard(index)
            none = {name: getattr(tokens, name)[:, :0] for name in ("top_ids", "top_logits")}
            writer.write_shard(index, rows, dataclasses.replace(tokens, **none))
        writer.finish()
    assert verify(tmp_path) == []


def test_a_full_disk_keeps_finished_shards(
    small_disk: Callable[[int], Path], whole: dict[str, str]
) -> None:
    disk = small_disk(128)
    folder = disk / "cache"
    ballast = disk / "ballast"
    stops = 0
    for free_pages in range(4, 32):
        ballast.write_bytes(b"")
        ballast.write_bytes(bytes(4096 * (32 - free_pages)))
        refusal = ""
        try:
            write_cache(folder)
        except UserError as error:
            refusal = str(error)
        if refusal:
            assert "disk full while writing" in refusal
            assert "run the same command again" in refusal
            stops += 1
            ballast.unlink()
            if (folder / NAME).exists():
                have = digests(folder)
                assert all(have[name] == whole[name] for name in read_manifest(folder).files())
        else:
            break
    assert stops >= 3
    assert digests(folder) == whole


def test_the_head_is_stored_on_the_cpu_and_contiguous(tmp_path: Path, whole: dict) -> None:
    strided = lm_head()["weight"].T.contiguous().T
    assert not strided.is_contiguous()
    write_cache(tmp_path, lm_head=lambda: {"weight": strided.requires_grad_()})
    assert digests(tmp_path) == whole
