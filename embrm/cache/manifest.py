"""The manifest of a cache: its identity, its finished files, and their sizes and digests."""

import hashlib
import json
import operator
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from embrm.cache.schema import ShardLayout
from embrm.core.errors import UserError
from embrm.core.files import write_bytes
from embrm.core.specs import Spec, canonical_json, content_id

VERSION: Final = 1
NAME = "manifest.json"
LM_HEAD = "lm_head.safetensors"
TABLES = ("pairs", "members", "exclusions", "leaks")


class FileEntry(Spec):
    """Size and digest of a finished file."""

    rows: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ShardEntry(Spec):
    """The files of a finished shard; `tokens` is None in a cache without token rows."""

    responses: FileEntry
    tokens: FileEntry | None


class Part(Spec):
    """The part of a cache that one of several processes makes: its shards `first` to `stop` - 1.

    Part 0 also holds the files that are not sharded: the tables and the LM head.
    """

    index: NonNegativeInt
    """Number of this part, from 0."""
    count: PositiveInt
    """Number of parts."""
    first: NonNegativeInt
    stop: NonNegativeInt

    @property
    def name(self) -> str:
        """The part as the command line names it, such as 0/4."""
        return f"{self.index}/{self.count}"

    @property
    def shards(self) -> range:
        """Indices of its shards among those of the cache; there may be none."""
        return range(self.first, self.stop)


class Manifest(Spec):
    """The content of manifest.json without its digest. `files` gives the names of the files."""

    format: Literal["embrm-cache"] = "embrm-cache"
    version: Literal[1] = VERSION
    cache_id: str
    """`content_id` of `identity`."""
    identity: dict[str, Any]
    """Everything that determines the content of the cache."""
    environments: tuple[dict[str, Any], ...]
    """The machines and package versions that wrote the cache, without repetitions, in order."""
    extraction: dict[str, Any]
    """The spec with which the states can be extracted again."""
    data: dict[str, Any]
    """Counts of the dataset's splits and exclusions."""
    n_responses: PositiveInt
    shard_rows: PositiveInt
    """Responses per shard; the last shard may have fewer."""
    layout: ShardLayout | None = None
    """Columns of every shard; None until the first shard is finished."""
    tables: dict[str, FileEntry] = Field(default_factory=dict)
    lm_head: FileEntry | None = None
    """File of the LM head, whose `rows` counts its tensors."""
    shards: tuple[ShardEntry | None, ...]
    """One entry per shard, None where it is not finished."""
    part: Part | None = Field(default=None, exclude_if=operator.not_)
    """None, and not written, in a whole cache."""
    complete: bool = False
    """Whether all files are there; always false for a part, see `finished`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cache_id != content_id(self.identity):
            raise ValueError("cache_id is not the digest of identity")
        if len(self.shards) != -(-self.n_responses // self.shard_rows):
            raise ValueError("shards do not cover the responses")
        if any(self.shards) and self.layout is None:
            raise ValueError("a finished shard without a layout")
        if self.complete and (self.part or not self.finished):
            raise ValueError("complete, but files are missing")
        if not self.done <= {*self.share} <= {*range(len(self.shards))}:
            raise ValueError("shards outside the part, or a part outside the shards")
        return self

    @property
    def done(self) -> frozenset[int]:
        """Indices of the finished shards."""
        return frozenset(index for index, entry in enumerate(self.shards) if entry)

    @property
    def share(self) -> range:
        """Indices of the shards that belong into this folder: all, or those of its part."""
        return self.part.shards if self.part else range(len(self.shards))

    @property
    def finished(self) -> bool:
        """Whether all files that belong into this folder are finished."""
        unsharded = self.lm_head is not None and self.tables.keys() == {*TABLES}
        return self.done == {*self.share} and (unsharded or not self.has_tables)

    @property
    def has_tables(self) -> bool:
        """Whether tables and LM head belong into this folder: a whole cache, or part 0."""
        return self.part is None or self.part.index == 0

    def rows_of(self, index: int) -> range:
        """The responses of shard `index`."""
        first = index * self.shard_rows
        return range(first, min(first + self.shard_rows, self.n_responses))

    def files(self) -> dict[str, FileEntry]:
        """Path of every finished file below the cache folder → its entry."""
        found = {table_file(name): entry for name, entry in self.tables.items()}
        if self.lm_head:
            found[LM_HEAD] = self.lm_head
        for index, shard in enumerate(self.shards):
            if shard:
                found[responses_file(index)] = shard.responses
                if shard.tokens:
                    found[tokens_file(index)] = shard.tokens
        return found

    def to_bytes(self) -> bytes:
        """The bytes of manifest.json: canonical JSON with its own digest, and a newline."""
        body = self.model_dump(mode="json")
        body["digest"] = hashlib.sha256(canonical_json(body).encode()).hexdigest()
        return (canonical_json(body) + "\n").encode()


def table_file(name: str) -> str:
    """Path of a table's file below the cache folder."""
    return f"{name}.parquet"


def responses_file(index: int) -> str:
    """Path of a shard's responses below the cache folder."""
    return f"responses/part-{index:05d}.parquet"


def tokens_file(index: int) -> str:
    """Path of a shard's token rows below the cache folder."""
    return f"tokens/part-{index:05d}.parquet"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of `folder` atomically."""
    write_bytes(folder / NAME, manifest.to_bytes())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the cache at `folder`, and check that no byte of it was changed.

    Raises: UserError when there is none, when it is damaged, or when a newer embrm wrote it.
    """
    path = folder / NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if (folder / "sweep.json").exists():
            raise UserError(
                f"{folder} holds the results of a sweep, not a cache: name the cache's folder"
            ) from None
        raise UserError(
            f"no cache at {folder} (no {NAME}): check the path, or make it with embrm extract"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions"
        ) from None
    try:
        body = json.loads(raw)
        if body["format"] == "embrm-cache" and body["version"] > VERSION:
            raise UserError(
                f"{folder} has cache format version {body['version']}, but this embrm reads up to "
                f"{VERSION}: upgrade embrm"
            )
        del body["digest"]
        manifest = Manifest.model_validate(body)
        if manifest.to_bytes() == raw:
            return manifest
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(
        f"{path} is damaged: restore it from a copy or extract into a new folder; "
        "without it the finished shards cannot be trusted"
    )
