"""Tests of merge: the joined parts have the bytes of a single process; refusals in one line."""

import errno
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cache import ENVIRONMENT, IDENTITY, digests, opened, shard, write_cache

from embrm.cache.listing import list_caches, splits
from embrm.cache.manifest import NAME, Part, read_manifest, responses_file, write_manifest
from embrm.cache.merge import merge
from embrm.cache.reader import open_cache
from embrm.cache.verify import verify
from embrm.core.errors import UserError

SHARDS = 5


def write_part(folder: Path, part: Part, stop: int | None = None, **changes: Any) -> Path:
    """Finish the part, or only its shards before `stop`."""
    with opened(folder, part=part, **changes) as writer:
        for index in part.shards[:stop]:
            if index not in writer.done:
                writer.write_shard(index, *shard(index))
        if stop is None:
            writer.finish()
    return folder


def cut(*bounds: int) -> list[Part]:
    """Write parts with the given bounds, which together have every shard."""
    edges = [0, *bounds, SHARDS]
    count = len(edges) - 1
    return [
        Part(index=index, count=count, first=edges[index], stop=edges[index + 1])
        for index in range(count)
    ]


def write_parts(root: Path, *bounds: int, **changes: Any) -> list[Path]:
    return [write_part(root / f"part-{p.index}", p, **changes) for p in cut(*bounds)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the cache that one process writes."""
    folder = tmp_path_factory.mktemp("whole") / "small"
    write_cache(folder)
    return digests(folder)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return write_parts(tmp_path, 2, 3)


def refused(folders: list[Path], out: Path, message: str) -> None:
    """Assert that the merge is refused in one line and writes nothing."""
    before = digests(out)
    with pytest.raises(UserError) as error:
        merge(folders, out)
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert digests(out) == before


@given(
    bounds=st.lists(st.integers(0, SHARDS), max_size=4).map(sorted),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=15, deadline=None)
def test_any_split_in_any_order_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    whole: dict[str, str],
    bounds: list[int],
    order: random.Random,
) -> None:
    root = tmp_path_factory.mktemp("split")
    folders = write_parts(root, *bounds)
    before = [digests(folder) for folder in folders]
    order.shuffle(folders)
    out = merge(folders, root / "out")
    assert digests(out) == whole
    assert verify(out) == []
    assert [digests(root / f"part-{index}") for index in range(len(folders))] == before


def test_files_are_linked_or_copied(
    tmp_path: Path, parts: list[Path], whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = merge(parts, tmp_path / "linked")
    assert (linked / responses_file(2)).samefile(parts[1] / responses_file(2))

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    copied = merge(parts, tmp_path / "copied")
    assert not (copied / responses_file(2)).samefile(parts[1] / responses_file(2))
    assert digests(linked) == digests(copied) == whole


@pytest.mark.parametrize("links", [True, False])
def test_a_merge_interrupted_at_any_rename_ends_with_the_same_bytes(
    parts: list[Path],
    whole: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    stopped_at_every_rename: Callable[..., Iterator[Path]],
    links: bool,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    stops = 0
    for out in stopped_at_every_rename(partial(merge, parts)):
        stops += 1
        with pytest.raises(UserError, match=r"is incomplete|no cache at"):
            open_cache(out)
        merge(parts, out)
        assert digests(out) == whole
    # 5 shards of 2 files, 4 tables, the head, and the manifest first and last
    assert stops == 5 * 2 + 4 + 1 + 2


def test_merging_again_changes_nothing(
    tmp_path: Path, parts: list[Path], whole: dict[str, str]
) -> None:
    out = merge(parts, tmp_path / "out")
    merge(parts, out)
    assert digests(out) == whole
    write_cache(out)  # the extraction then has nothing left to do
    assert digests(out) == whole


def test_an_interrupted_merge_can_be_extracted_instead(
    tmp_path: Path, parts: list[Path], whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "hardlink_to", refuse)
        with pytest.raises(KeyboardInterrupt):
            merge(parts, tmp_path / "out")
    write_cache(tmp_path / "out")
    assert digests(tmp_path / "out") == whole


def test_a_full_disk_is_a_one_line_error_and_the_merge_can_continue(
    parts: list[Path],
    whole: dict[str, str],
    small_disk: Callable[[int], Path],
) -> None:
    disk = small_disk(128)  # another file system, so files are copied
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(4096 * 20))
    with pytest.raises(UserError, match=r"disk full while writing .*: finished work is kept"):
        merge(parts, disk / "out")
    ballast.unlink()
    assert digests(merge(parts, disk / "out")) == whole


def test_environments_of_all_parts_that_wrote_a_file_are_kept(tmp_path: Path) -> None:
    """In the order of the parts. Spec and data are those of the first part."""
    first, second, third = cut(2, 5)
    one, other, idle = (ENVIRONMENT | {"device": name} for name in ("cuda", "mps", "none"))
    write_part(tmp_path / "0", first, stop=1, environment=one)
    write_part(tmp_path / "0", first, environment=other, extraction={"model": "never kept"})
    write_part(tmp_path / "1", second, environment=one, extraction={"model": "elsewhere"})
    write_part(tmp_path / "2", third, environment=idle)
    merged = read_manifest(merge([tmp_path / name for name in "210"], tmp_path / "out"))
    assert merged.environments == (one, other)
    assert merged.extraction == {"model": "tiny"}


def test_opening_a_part_says_that_it_must_be_merged(tmp_path: Path, parts: list[Path]) -> None:
    for folder in parts:
        assert verify(folder) == []
    with pytest.raises(UserError) as error:
        open_cache(parts[1])
    assert str(error.value) == (
        f"{parts[1]} is only part 1/3 of a cache (1 of 1 shards are finished): "
        "join all 3 with embrm cache merge PART... --out FOLDER"
    )
    started = write_part(tmp_path / "started", cut(1)[1], stop=2)
    unfinished = (
        f"{started} is only part 1/2 of a cache (2 of 4 shards are finished): "
        "run the command that made it again, then join all 2 with embrm cache merge PART... "
        "--out FOLDER"
    )
    with pytest.raises(UserError) as error:
        open_cache(started)
    assert str(error.value) == unfinished
    assert verify(started) == [unfinished]
    assert list_caches(tmp_path)["state"].to_list() == [
        "part 0/3, 2 of 2 shards",
        "part 1/3, 1 of 1 shards",
        "part 2/3, 2 of 2 shards",
        "part 1/2, 2 of 4 shards",
    ]
    assert [row["left out"] for row in splits(parts[1])] == ["see part 0"]


def test_only_the_first_part_has_the_tables_and_the_head(parts: list[Path]) -> None:
    for folder, names in zip(
        parts, [{"pairs.parquet", "lm_head.safetensors"}, set()], strict=False
    ):
        found = {path.name for path in folder.iterdir()}
        assert found & {"pairs.parquet", "lm_head.safetensors"} == names

    def never() -> Any:
        raise AssertionError("lm_head asked for")

    write_part(parts[2].with_name("again"), cut(2, 3)[2], lm_head=never)


def test_a_part_resumes_as_the_same_part_alone(tmp_path: Path, whole: dict[str, str]) -> None:
    first, second = cut(3)
    write_part(tmp_path / "0", first, stop=2)
    for other, message in (
        (second, r"part = '0/2, shards from 0 to before 3', not '1/2, shards from 3 to before 5'"),
        (
            cut(2)[0],
            r"part = '0/2, shards from 0 to before 3', not '0/2, shards from 0 to before 2'",
        ),
        (None, r"part = '0/2, shards from 0 to before 3', not None"),
    ):
        with pytest.raises(UserError, match=message), opened(tmp_path / "0", part=other):
            pass
    with opened(tmp_path / "0", part=first) as writer, pytest.raises(ValueError, match="2 of 3"):
        writer.finish()
    with opened(tmp_path / "0", part=first) as writer, pytest.raises(ValueError, match="of range"):
        writer.write_shard(3, *shard(3))
    write_part(tmp_path / "0", first)
    write_part(tmp_path / "1", second)
    assert digests(merge([tmp_path / "0", tmp_path / "1"], tmp_path / "out")) == whole


def test_only_the_manifest_of_a_part_has_the_key_part(tmp_path: Path, parts: list[Path]) -> None:
    write_cache(tmp_path / "whole")
    assert '"part"' not in (tmp_path / "whole" / NAME).read_text()
    assert '"part":{"count":3,"first":2,"index":1,"stop":3}' in (parts[1] / NAME).read_text()


@pytest.mark.parametrize(
    "change",
    [{"complete": True}, {"part": cut(2)[1]}, {"part": Part(index=1, count=2, first=0, stop=6)}],
)
def test_a_forged_part_is_refused(parts: list[Path], change: dict[str, Any]) -> None:
    write_manifest(parts[0], read_manifest(parts[0]).model_copy(update=change))
    refused(parts, parts[0].with_name("out"), "is damaged")


# Refusals


def test_a_missing_part_is_refused(tmp_path: Path, parts: list[Path]) -> None:
    out = tmp_path / "out"
    refused(
        [parts[2], parts[0]],
        out,
        rf"^missing part 1/3 beside {parts[0]}: name its folder too, or extract it with "
        r"--shard 1/3$",
    )
    refused([parts[1]], out, r"^missing part 0/3 and 1 more beside ")


def test_a_part_named_twice_is_refused(tmp_path: Path, parts: list[Path]) -> None:
    copy = Path(shutil.copytree(parts[1], tmp_path / "copy"))
    for folders, named in (
        ([*parts, parts[1]], f"{parts[1]} and {parts[1]}"),
        ([*parts, copy], f"{parts[1]} and {copy}"),
    ):
        refused(folders, tmp_path / "out", f"^{named} are both part 1/3: name each part once$")


def test_parts_of_different_counts_are_refused(tmp_path: Path, parts: list[Path]) -> None:
    other = write_part(tmp_path / "other", cut(2)[1])
    message = f"^{parts[0]} is part 0/3 and {other} part 1/2: merge parts of the same number$"
    refused([parts[0], other], tmp_path / "out", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": IDENTITY | {"dtype": "bfloat16"}}, "dtype = 'float32', not 'bfloat16'"),
        ({"n_responses": 22}, "n_responses = 23, not 22"),
    ],
)
def test_parts_of_different_extractions_are_refused(
    tmp_path: Path, parts: list[Path], changes: dict[str, Any], message: str
) -> None:
    other = tmp_path / "other"
    with opened(other, part=cut(2, 3)[1], **changes):
        pass
    message = f"^{parts[0]} was extracted with {message} as in {other}: merge parts of the same"
    refused([parts[0], other, parts[2]], tmp_path / "out", message)


def test_parts_with_other_shards_or_layouts_are_refused(tmp_path: Path, parts: list[Path]) -> None:
    with opened(tmp_path / "rows", part=cut(2, 3)[1], shard_rows=8, n_responses=23):
        pass
    message = r"shard_rows = 5, not 8 as in"
    refused([parts[0], tmp_path / "rows", parts[2]], tmp_path / "out", message)
    with opened(tmp_path / "half", part=cut(2, 3)[1]) as writer:
        writer.write_shard(2, *shard(2, "float16"))
    message = r"layout.dtype = 'float32', not 'float16' as in"
    refused([parts[0], tmp_path / "half", parts[2]], tmp_path / "out", message)


def test_an_unfinished_part_is_refused(tmp_path: Path, parts: list[Path]) -> None:
    first, _, last = cut(2, 3)
    started = write_part(tmp_path / "started", last, stop=1)
    message = r"started is only part 2/3 of a cache \(1 of 2 shards are finished\): run the command"
    refused([parts[0], parts[1], started], tmp_path / "out", message)
    # The state after a kill before the tables were written.
    without = read_manifest(parts[0]).model_copy(update={"tables": {}})
    write_manifest(parts[0], without)
    message = r"part-0 is only part 0/3 of a cache \(2 of 2 shards are finished\): run the command"
    refused(parts, tmp_path / "out", message)
    write_part(parts[0], first)
    merge(parts, tmp_path / "out")


def test_shards_in_two_parts_or_in_none_are_refused(tmp_path: Path, parts: list[Path]) -> None:
    for name, part, message in (
        ("twice", cut(1, 3)[1], rf"^shard 1 is in {parts[0]}, .*twice: these parts were not"),
        ("never", Part(index=1, count=3, first=2, stop=2), "^shard 2 is in no part: these"),
    ):
        other = write_part(tmp_path / name, part)
        refused([parts[0], other, parts[2]], tmp_path / "out", message)


def test_folders_that_are_not_parts_are_refused(tmp_path: Path, parts: list[Path]) -> None:
    write_cache(tmp_path / "whole")
    out = tmp_path / "out"
    refused([*parts, tmp_path / "whole"], out, r"whole is a whole cache, not a part of one: name")
    refused([*parts, tmp_path / "none"], out, r"no cache at .*none")


@pytest.mark.parametrize("how", ["flipped", "cut", "lost"])
def test_a_damaged_part_is_named_and_merges_after_repair(
    tmp_path: Path, parts: list[Path], whole: dict[str, str], how: str
) -> None:
    path, out = parts[2] / responses_file(3), tmp_path / "out"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if how != "lost":
        path.write_bytes(content if how == "flipped" else content[:-1])
    with pytest.raises(UserError, match=rf"^{path} is (damaged|missing)"):
        merge(parts, out)
    with pytest.raises(UserError, match="is incomplete"):
        open_cache(out)
    path.unlink(missing_ok=True)
    write_part(parts[2], cut(2, 3)[2], environment=ENVIRONMENT)
    assert digests(merge(parts, out)) == whole


def test_an_output_folder_with_other_content_is_refused(tmp_path: Path, parts: list[Path]) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    refused(parts, foreign, r"is not a cache \(it has 'thesis\.txt' but no manifest\.json")
    write_cache(tmp_path / "other", identity=IDENTITY | {"dtype": "float16"})
    refused(parts, tmp_path / "other", r"holds another cache \(dtype = 'float16', not 'float32'\)")
    with opened(tmp_path / "begun") as writer:
        writer.write_shard(0, *shard(0))
    refused(
        parts, tmp_path / "begun", r"begun holds another cache \(1 finished shards of its own\)"
    )
    refused(
        parts,
        parts[0],
        r"part-0 holds another cache \(part = '0/3, .*: choose another out \(--out\)",
    )


def test_an_output_folder_that_is_being_written_is_refused(
    tmp_path: Path, parts: list[Path]
) -> None:
    with opened(tmp_path / "out"), pytest.raises(UserError, match="by another embrm process"):
        merge(parts, tmp_path / "out")
