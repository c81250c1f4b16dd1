"""Verifies a cache: every byte of every file, and that indices and numbers are valid."""

from collections.abc import Iterator
from pathlib import Path

from embrm.cache.manifest import NAME, Manifest, read_manifest, tokens_file
from embrm.cache.reader import Cache, incomplete, open_cache, wrong_bytes
from embrm.core.errors import UserError
from embrm.core.files import TEMPORARY


def verify(folder: Path) -> list[str]:
    """List the problems of the cache at `folder`, one line each; empty if it is sound.

    Raises: UserError where there is no cache, not even an unfinished one.
    """
    if not (folder / NAME).exists() and not (folder / "responses").exists():
        read_manifest(folder)  # raises: without either there is nothing to verify
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    problems = [*_listing(folder, manifest)]
    damaged = [*_bytes(folder, manifest)]
    if manifest.complete and not damaged:
        # The bytes are as recorded, so the content can only be wrong by a mistake of the writer.
        try:
            problems += _content(open_cache(folder))
        except UserError as error:
            problems.append(str(error))
    return problems + damaged


def _listing(folder: Path, manifest: Manifest) -> Iterator[str]:
    if not (manifest.complete or (manifest.part and manifest.finished)):
        yield str(incomplete(folder, manifest))
    expected = {*manifest.files(), NAME, ".lock"}
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(TEMPORARY):
            yield f"{path} was left by a killed run: harmless, the next extract removes it"
        elif not path.is_dir() and path.relative_to(folder).as_posix() not in expected:
            yield f"{path} is not part of this cache: remove it"


def _bytes(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name, entry in manifest.files().items():
        problem = wrong_bytes(folder / name, entry)
        if problem:
            yield str(problem)


def _content(cache: Cache) -> Iterator[str]:
    n = cache.manifest.n_responses
    for name, entry in cache.manifest.tables.items():
        rows = getattr(cache, name).height
        if rows != entry.rows:
            yield f"{cache.folder}: {name} has {rows} rows instead of {entry.rows}"
    for name, column in (("pairs", "chosen"), ("pairs", "rejected"), ("members", "response")):
        indices = getattr(cache, name).get_column(column, default=None)
        if indices is None:
            yield f"{cache.folder}: {name} has no column {column!r}: extract into a new folder"
            continue
        wrong = indices.is_null() | (indices < 0) | (indices >= n)
        if wrong.any():
            yield (
                f"{cache.folder}: {name}.{column} = {indices.filter(wrong)[0]} in {wrong.sum()} "
                f"rows, must be 0 to {n - 1}: extract into a new folder"
            )
    if cache.responses.height != n:
        yield f"{cache.folder}: {cache.responses.height} responses instead of {n}"
    for view in cache.views:
        for _ in cache.stored_shards(view):  # reading checks shape and finiteness
            pass
    if cache.layout.has_token_rows:
        for index, tokens in enumerate(cache.token_shards()):
            owners = cache.manifest.rows_of(index)
            wrong_rows = (tokens.response < owners.start) | (tokens.response >= owners.stop)
            if wrong_rows.any():
                yield (
                    f"{cache.folder / tokens_file(index)}: response = "
                    f"{tokens.response[wrong_rows][0]}, must be {owners.start} to "
                    f"{owners.stop - 1}: extract into a new folder"
                )
    _ = cache.vocabulary  # reading it checks the header of the LM head's file
