"""Joins the parts that several processes made into one cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from embrm.cache.manifest import NAME, FileEntry, Manifest, Part, read_manifest, write_manifest
from embrm.cache.reader import incomplete, wrong_bytes, wrong_size
from embrm.cache.schema import ShardLayout
from embrm.cache.writer import defining, difference, refuse_foreign
from embrm.core.errors import UserError
from embrm.core.files import disk_errors, exclusive, link_or_copy, remove_temporaries
from embrm.core.progress import progress


@dataclass(frozen=True)
class _Piece:
    folder: Path
    manifest: Manifest
    part: Part


def merge(folders: Sequence[Path], out: Path) -> Path:
    """Join all parts of a cache, in any order, into the whole cache at `out`, and return `out`.

    The result has the bytes that one process would have written. Its files are hard links of the
    parts' files, or copies where links are not possible; each is checked by its SHA-256. The parts
    are left unchanged. The manifest is written last, so that a merge that was interrupted at any
    moment can be run again and ends with the same bytes.

    Raises: UserError when a part is missing, unfinished, damaged, named twice or of another
    extraction, when `out` contains something else, or when the disk is full.
    """
    pieces = sorted((_piece(folder) for folder in folders), key=lambda piece: piece.part.index)
    _refuse_unlike(pieces)
    begun, whole = _unstarted(pieces[0].manifest), _joined(pieces)
    sources = {name: piece.folder for piece in pieces for name in piece.manifest.files()}
    refuse_foreign(out)
    with exclusive(out):
        with disk_errors(out):
            remove_temporaries(out)
        if not (out / NAME).exists():
            write_manifest(out, begun)
        else:
            _refuse_other(out, read_manifest(out), whole)
        files = whole.files()
        with progress("merge", sum(entry.bytes for entry in files.values()), "bytes") as bar:
            for name, entry in files.items():
                _take(sources[name] / name, out / name, entry)
                bar.advance(entry.bytes)
        write_manifest(out, whole)
    return out


def _refuse_other(out: Path, stored: Manifest, whole: Manifest) -> None:
    """Raises: UserError unless `out` was merged from these parts or has no finished file."""
    found = difference(defining(stored), defining(whole))
    if not found and stored.files() and stored != whole:
        found = f"{len(stored.done)} finished shards of its own"
    if found:
        raise UserError(f"{out} holds another cache ({found}): choose another out (--out)")


def _piece(folder: Path) -> _Piece:
    manifest = read_manifest(folder)
    if manifest.part is None:
        raise UserError(
            f"{folder} is a whole cache, not a part of one: name the folders that "
            "embrm extract --shard wrote"
        )
    return _Piece(folder, manifest, manifest.part)


def _refuse_unlike(pieces: Sequence[_Piece]) -> None:
    """Raises: UserError unless `pieces`, sorted by index, are all the finished parts of a cache."""
    first, layout = pieces[0], _layout(pieces)
    # A part without shards has no layout; it is compared as if it had the others'.
    settings = [
        defining(piece.manifest) | {"part": None, "layout": piece.manifest.layout or layout}
        for piece in pieces
    ]
    for piece, own in zip(pieces, settings, strict=True):
        if differs := difference(settings[0], own):
            raise UserError(
                f"{first.folder} was extracted with {differs} as in {piece.folder}: "
                "merge parts of the same settings"
            )
        if piece.part.count != first.part.count:
            raise UserError(
                f"{first.folder} is part {first.part.name} and {piece.folder} part "
                f"{piece.part.name}: merge parts of the same number"
            )
    for before, after in pairwise(pieces):
        if before.part.index == after.part.index:
            raise UserError(
                f"{before.folder} and {after.folder} are both part {after.part.name}: "
                "name each part once"
            )
    count = first.part.count
    missing = sorted({*range(count)} - {piece.part.index for piece in pieces})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"missing part {missing[0]}/{count}{more} beside {first.folder}: name its folder too, "
            f"or extract it with --shard {missing[0]}/{count}"
        )
    for piece in pieces:
        if not piece.manifest.finished:
            raise incomplete(piece.folder, piece.manifest)
    for shard in range(len(first.manifest.shards)):
        owners = [piece for piece in pieces if shard in piece.part.shards]
        if len(owners) != 1:
            named = ", ".join(str(piece.folder) for piece in owners) or "no part"
            raise UserError(
                f"shard {shard} is in {named}: these parts were not shared out by one version of "
                "embrm; extract them all with the same one"
            )


def _layout(pieces: Sequence[_Piece]) -> ShardLayout | None:
    return next((piece.manifest.layout for piece in pieces if piece.manifest.layout), None)


def _unstarted(manifest: Manifest) -> Manifest:
    """The manifest of the whole cache before any file is finished."""
    return Manifest(
        cache_id=manifest.cache_id,
        identity=manifest.identity,
        environments=manifest.environments,
        extraction=manifest.extraction,
        data=manifest.data,
        n_responses=manifest.n_responses,
        shard_rows=manifest.shard_rows,
        shards=(None,) * len(manifest.shards),
    )


def _joined(pieces: Sequence[_Piece]) -> Manifest:
    """The manifest of the whole cache, with the environments of all parts that wrote a file."""
    first = pieces[0].manifest
    seen = [e for piece in pieces if piece.manifest.files() for e in piece.manifest.environments]
    environments = [e for index, e in enumerate(seen) if e not in seen[:index]]
    shards = [piece.manifest.shards[shard] for piece in pieces for shard in piece.part.shards]
    return Manifest(
        **dict(_unstarted(first))
        | {
            "environments": tuple(environments),
            "layout": _layout(pieces),
            "tables": first.tables,
            "lm_head": first.lm_head,
            "shards": tuple(shards),
            "complete": True,
        }
    )


def _take(source: Path, path: Path, entry: FileEntry) -> None:
    """Link or copy a file of a part to `path`, unless an interrupted merge has already done so."""
    if wrong_bytes(path, entry) is None:
        return
    if problem := wrong_size(source, entry):
        raise problem
    link_or_copy(source, path)
    if problem := wrong_bytes(path, entry):
        raise wrong_bytes(source, entry) or problem
