"""Describes caches, complete or not, from their manifests."""

from pathlib import Path
from typing import Any

import polars as pl

from embrm.cache.manifest import NAME, read_manifest
from embrm.core.errors import UserError

_COLUMNS = {
    "name": pl.String,
    "cache_id": pl.String,
    "model": pl.String,
    "dtype": pl.String,
    "views": pl.String,
    "responses": pl.Int64,
    "pairs": pl.Int64,
    "tokens": pl.String,
    "bytes": pl.Int64,
    "state": pl.String,
}

_COUNTS = ("pairs", "prompts", "responses")


def describe_cache(folder: Path) -> dict[str, Any]:
    """Describe the cache at `folder`, finished or not, from its manifest.

    Raises: UserError when there is no cache, or its manifest is damaged.
    """
    manifest = read_manifest(folder)
    layout, files = manifest.layout, manifest.files()
    tokens = [shard.tokens.rows for shard in manifest.shards if shard and shard.tokens]
    part = f"part {manifest.part.name}, " if manifest.part else ""
    finished = f"{part}{len(manifest.done)} of {len(manifest.share)} shards"
    return {
        "name": folder.name,
        "cache_id": manifest.cache_id,
        "model": str(manifest.extraction.get("model", "")),  # an adopted cache has none
        "dtype": layout.dtype if layout else "",
        "width": layout.width if layout else None,
        "views": list(layout.views) if layout else [],
        "responses": manifest.n_responses,
        **{name: entry.rows for name, entry in manifest.tables.items()},
        "token_rows": sum(tokens),
        "top_k": layout.top_k if layout else None,
        "tail_mean": layout.tail_mean if layout else None,
        "bytes": sum(entry.bytes for entry in files.values()),
        "files": len(files),
        "state": "complete" if manifest.complete else finished,
        "identity": manifest.identity,
        "environments": list(manifest.environments),
        "extraction": manifest.extraction,
        "data": manifest.data,
        "lint": manifest.data.get("lint", []),
    }


def list_caches(root: Path) -> pl.DataFrame:
    """One row per cache in the folders directly below `root`, sorted by name.

    `state` is "complete", "K of N shards", "part 0/4, K of N shards", or the reason why the
    manifest cannot be read. Raises: UserError when there is no folder `root`.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}: name the folder that holds the caches")
    rows = []
    for path in sorted(root.glob(f"*/{NAME}")):
        try:
            described = describe_cache(path.parent)
            described["views"] = ", ".join(described["views"])
            described["tokens"] = _tokens(described)
        except UserError as error:
            described = {"name": path.parent.name, "state": str(error)}
        rows.append({name: described.get(name) for name in _COLUMNS})
    return pl.DataFrame(rows, schema=_COLUMNS)


def _tokens(described: dict[str, Any]) -> str:
    """The token rows as text such as "438,204, top 32, tail mean"; "" without any."""
    if described["top_k"] is None:
        return ""
    tail = ", tail mean" if described["tail_mean"] else ""
    return f"{described['token_rows']:,}, top {described['top_k']}{tail}"


def splits(folder: Path) -> list[dict[str, Any]]:
    """One row per split of the cache at `folder`, with its counts and what was left out of it.

    Keys: split, pairs, prompts, responses, `left out` (such as "3 over_long, 1 empty_response") and
    `seen in training` (prompts). If a cache is made in parts, only part 0 has the last two.
    """
    manifest = read_manifest(folder)
    counts: dict[str, dict[str, int]] = manifest.data.get("splits", {})
    out: dict[str, list[str]] = {}
    leaked: dict[str, int] = {}
    if {"exclusions", "leaks"} <= manifest.tables.keys():
        exclusions = pl.read_parquet(folder / "exclusions.parquet")
        grouped = exclusions.group_by("split", "reason").len().sort("split", "len", descending=True)
        for split, reason, count in grouped.rows():
            out.setdefault(split, []).append(f"{count:,} {reason}")
        leaks = pl.read_parquet(folder / "leaks.parquet")
        leaked = dict(leaks.group_by("eval_split").agg(pl.col("prompts_shared").max()).rows())
    nothing, none = ("none", 0) if manifest.has_tables else ("see part 0", "see part 0")
    return [
        {
            "split": split,
            **{name: counts.get(split, {}).get(name, 0) for name in _COUNTS},
            "left out": ", ".join(out.get(split, [])) or nothing,
            "seen in training": leaked.get(split, none),
        }
        for split in sorted(counts.keys() | out.keys())
    ]
