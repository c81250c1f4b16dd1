"""Caches: extract, adopt, open, list, verify, merge and probe them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embrm.api.arguments import (
    AnyData,
    AnyPath,
    AnySpec,
    names,
    path,
    public,
    sources,
    spec_source,
)
from embrm.core.errors import UserError

if TYPE_CHECKING:
    import polars as pl

    from embrm.cache.reader import Cache
    from embrm.extraction.dry_run import DryRun
    from embrm.extraction.probe import ProbeResult
    from embrm.extraction.spec import ExtractSpec
    from embrm.studies.estimators.measure import EstimatorErrors


@public
def extract(
    spec: AnySpec | None = None,
    out: AnyPath | None = None,
    *,
    data: AnyData | Sequence[AnyData] | None = None,
    device: str = "auto",
    tensor_parallel: int = 1,
    batch_tokens: int | None = None,
    compiled: bool = False,
    **fields: Any,
) -> Cache:
    """Cache a language model's final states over preference data; twin of `embrm extract`.

    spec: a TOML file or a mapping of `ExtractSpec`'s keys; `fields` (model, states, max_length,
        dtype, token_rows, ...: see docs/specs.md) are added to it and take precedence.
    out: the cache folder. A killed call is resumed by the same call.
    data: one source or several, each `[SPLIT=]PATH_OR_HUB_ID` or a mapping of a `[[data]]` table.
    device: auto, cpu, cuda, cuda:1 or mps. batch_tokens: token budget of a batch, padding included.
    compiled: run the model through torch.compile.

    Raises: UserError for a wrong field, model or data, and where `embrm[extract]` is not installed.
    """
    from embrm.cache.reader import open_cache
    from embrm.extraction.run import extract as run

    parsed, folder = _extraction(spec, out, data, fields)
    made = run(
        parsed,
        folder,
        device=device,
        tensor_parallel=tensor_parallel,
        batch_tokens=batch_tokens,
        compiled=compiled,
    )
    return open_cache(made)


@public
def extract_shard(
    spec: AnySpec | None = None,
    out: AnyPath | None = None,
    *,
    shard: str,
    data: AnyData | Sequence[AnyData] | None = None,
    device: str = "auto",
    tensor_parallel: int = 1,
    batch_tokens: int | None = None,
    compiled: bool = False,
    **fields: Any,
) -> Path:
    """Do the part `shard` ("i/n", i from 0) of an extraction that n processes share; its folder.

    All other arguments are those of `extract`; `merge` joins the n folders into the cache.
    """
    from embrm.extraction.parts import Share
    from embrm.extraction.run import extract as run

    parsed, folder = _extraction(spec, out, data, fields)
    return run(
        parsed,
        folder,
        device=device,
        tensor_parallel=tensor_parallel,
        batch_tokens=batch_tokens,
        compiled=compiled,
        share=Share.parse(shard),
    )


@public
def plan_extraction(
    spec: AnySpec | None = None,
    out: AnyPath | None = None,
    *,
    data: AnyData | Sequence[AnyData] | None = None,
    device: str = "auto",
    tensor_parallel: int = 1,
    batch_tokens: int | None = None,
    compiled: bool = False,
    **fields: Any,
) -> DryRun:
    """Count the rows, tokens, bytes and seconds of an extraction; twin of `extract --dry-run`.

    The arguments are those of `extract`. Nothing is written, so `out` may be left out.
    """
    from embrm.extraction.dry_run import dry_run

    parsed, _ = _extraction(spec, "unwritten" if out is None else out, data, fields)
    return dry_run(
        parsed,
        device=device,
        tensor_parallel=tensor_parallel,
        batch_tokens=batch_tokens,
        compiled=compiled,
    )


def _extraction(
    spec: AnySpec | None,
    out: AnyPath | None,
    data: AnyData | Sequence[AnyData] | None,
    fields: Mapping[str, Any],
) -> tuple[ExtractSpec, Path]:
    """The parsed spec, and the folder to write."""
    from embrm.core.specs import spec_values
    from embrm.data.tables import READERS
    from embrm.extraction.spec import ExtractSpec

    if isinstance(spec, str | PathLike) and Path(spec).suffix in READERS:
        raise UserError(f"{spec} is a data file, not a TOML spec: pass it as data (--data)")
    values, where = spec_values({} if spec is None else spec_source(spec))
    named = values.pop("out", None)
    if named is not None and not isinstance(named, str | PathLike):
        raise UserError(f"{where}: out = {named!r}: name a folder, such as out = 'cache/NAME'")
    values |= {name: value for name, value in fields.items() if value is not None}
    if data is not None:
        values["data"] = sources(data)
    if isinstance(values.get("model"), PathLike):
        values["model"] = str(values["model"])
    if isinstance(values.get("states"), str):
        values["states"] = [view.strip() for view in values["states"].split(",")]
    if spec is None and values.keys() <= ExtractSpec.model_fields.keys():
        for name, remedy in (
            ("model", "name a folder or a hub id"),
            ("data", "name files or hub ids of preference data"),
        ):
            if not values.get(name):
                raise UserError(f"{name} (--{name}) is missing: {remedy}, or give a TOML spec")
    parsed = ExtractSpec.parse(values, where)
    if out is None and named is None:
        raise UserError("out (--out) is missing: name the cache folder to write, as cache/NAME")
    return parsed, path(out if out is not None else named or "", "out")


@public
def adopt(
    spec: AnySpec | None = None,
    out: AnyPath | None = None,
    *,
    states: Sequence[str] = (),
    gold: Sequence[str] = (),
    rows: Sequence[str] = (),
    order: str | None = None,
    models: str | None = None,
    pairs: str | None = None,
) -> Cache:
    """Make a cache of arrays of states that another program computed; twin of `embrm cache adopt`.

    spec: a TOML file or mapping of `[[arrays]]`, or instead of it: states, gold, rows: files as
        `[SPLIT=]PATH`; order: "prompts" or "responses", the first axis of three; models: a text
        file of the responses' models; pairs: how pairs are derived, "per_prompt = 4, gap = 0.5".
    """
    from embrm.adoption.run import adopt as run
    from embrm.adoption.spec import AdoptSpec, parse_arrays
    from embrm.cache.reader import open_cache
    from embrm.core.specs import spec_values

    if out is None:
        raise UserError("out is missing: name the cache folder to write, such as cache/NAME")
    if spec is not None:
        given = {"states": states, "gold": gold, "rows": rows, "order": order, "models": models,
                 "pairs": pairs}  # fmt: skip
        for name, value in given.items():
            if value:
                raise UserError(f"{name} is for adopting without a spec: put it into the spec")
        values, where = spec_values(spec_source(spec))
        parsed = AdoptSpec.parse(values, where)
    elif states:
        parsed = parse_arrays(
            names(states, "states"),
            names(gold, "gold"),
            names(rows, "rows"),
            order=order,
            models=models,
            pairs=pairs,
        )
    else:
        raise UserError("states is missing: name an array of states, or give a spec")
    return open_cache(run(parsed, path(out, "out")))


@public
def open_cache(folder: AnyPath) -> Cache:
    """Open a finished cache for reading; no torch is loaded.

    Its `states(view)` are numpy float32 [responses, d]; `responses`, `pairs`, `groups`, `tokens`,
    `exclusions` and `leaks` are polars tables.

    Raises: UserError where there is no cache, or an unfinished or damaged one.
    """
    from embrm.cache.reader import open_cache as run

    return run(path(folder, "folder"))


@public
def list_caches(root: AnyPath = "cache") -> pl.DataFrame:
    """The caches below a folder, one row each; twin of `embrm cache ls`."""
    from embrm.cache.listing import list_caches as run

    return run(path(root, "root"))


@public
def verify(folder: AnyPath) -> list[str]:
    """Check every byte of a cache against its manifest; the problems found, one line each.

    Raises: UserError where there is no cache.
    """
    from embrm.cache.verify import verify as run

    return run(path(folder, "folder"))


@public
def merge(parts: Iterable[AnyPath], out: AnyPath) -> Cache:
    """Join the parts that `extract_shard` made into one cache; twin of `embrm cache merge`."""
    from embrm.cache.merge import merge as run
    from embrm.cache.reader import open_cache

    if isinstance(parts, str | PathLike) or not isinstance(parts, Iterable):
        raise UserError(f"parts = {parts!r}: give a list of the folders")
    return open_cache(run([path(part, "parts") for part in parts], path(out, "out")))


@public
def probe(
    folder: AnyPath, *, sample: int = 64, device: str = "auto", engine: str | None = None
) -> ProbeResult:
    """Extract a sample of a cache again at other batch sizes; twin of `embrm cache probe`."""
    from embrm.extraction.probe import probe as run

    return run(path(folder, "folder"), sample=sample, device=device, engine=engine)


@public
def probe_regularizers(
    folder: AnyPath, *, sample: int = 64, target: float = 0.05
) -> EstimatorErrors:
    """Compare the regularizers' estimators with exact values over the whole vocabulary.

    Twin of `embrm cache probe --regularizer`. target: relative error for which settings are
    recommended.
    """
    from embrm.studies.estimators.measure import measure_estimators

    return measure_estimators(path(folder, "folder"), sample=sample, target=target)
