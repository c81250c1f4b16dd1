"""A sweep checked against its cache, before anything is trained."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from embrm.cache.reader import Cache, open_cache
from embrm.errors import UserError, nearest
from embrm.specs import read_toml
from embrm.sweep.grid import Run, Selection, SweepSpec, configurations, runs
from embrm.sweep.material import select
from embrm.train.numerics import Numerics


@dataclass(frozen=True)
class Prepared:
    """A sweep checked against its cache."""

    spec: SweepSpec
    cache: Cache
    selection: Selection
    runs: list[Run]
    evaluate: list[str]
    training_pairs: int


def prepare(spec_path: Path, cache_folder: Path | None, numerics: Numerics | None) -> Prepared:
    """Read the spec, open its cache, and check one against the other.

    cache_folder, numerics: instead of the spec's own.
    Raises: UserError for anything wrong in the spec or cache.
    """
    where = str(spec_path)
    spec = SweepSpec.parse(read_toml(spec_path), where)
    spec = spec.model_copy(update={"numerics": numerics or spec.numerics})
    found = configurations(spec, where)
    folder = cache_folder or (Path(spec.cache) if spec.cache else None)
    if folder is None:
        raise UserError(f"{where}: cache is missing: add cache = 'cache/NAME', or pass --cache")
    cache = open_cache(folder)
    for field, names in (("train", spec.train), ("evaluate", spec.evaluate or ())):
        for name in names:
            if name not in cache.splits:
                raise UserError(
                    f"{where}: {field} split {name!r} is not in {folder}: "
                    f"{nearest(name, cache.splits)}"
                )
    selection = Selection(cache.cache_id, spec.train, spec.validation)
    training, validation = select(cache, selection)
    if not len(training):
        raise UserError(
            f"{where}: no training pairs in {', '.join(spec.train)}: choose other train splits"
        )
    if spec.validation and not len(validation):
        raise UserError(
            f"{where}: validation = {spec.validation:g} keeps no prompt of "
            f"{training['prompt_id'].n_unique()}: raise it, or set validation = 0"
        )
    for side, pairs in (("training", training), ("validation", validation)):
        if len(pairs) and not pairs["weight"].sum():
            raise UserError(f"{where}: every {side} pair has weight 0: give some a weight above 0")
    others = [split for split in cache.splits if split not in spec.train]
    if not others:
        raise UserError(
            f"{where}: {folder} has no split to evaluate on beside {', '.join(spec.train)}: "
            "extract one with another --data, or hold out prompts with holdout in its spec"
        )
    no_margin = training["margin"].null_count()
    for configuration in found:
        run = f"{where}: run {configuration.name!r}"
        asked = configuration.spec
        if asked.state not in cache.views:
            raise UserError(
                f"{run}: state {asked.state!r} is not in {folder}: "
                f"{nearest(asked.state, cache.views)}"
            )
        if asked.pairs_limit and asked.pairs_limit > len(training):
            raise UserError(
                f"{run}: pairs_limit = {asked.pairs_limit}, but there are {len(training)} "
                "training pairs: lower or remove it"
            )
        if asked.margin_scale is not None and no_margin:
            raise UserError(
                f"{run}: margin_scale = {asked.margin_scale:g}, but {no_margin} of "
                f"{len(training)} training pairs have no margin: use margin instead"
            )
    return Prepared(
        training_pairs=len(training),
        spec=spec,
        cache=open_cache(folder),  # without the tables read so far: a sweep takes hours
        selection=selection,
        runs=runs(found, spec.seeds, selection, spec.numerics),
        evaluate=list(spec.evaluate) if spec.evaluate is not None else others,
    )


def leaked(prepared: Prepared) -> dict[str, list[str]]:
    """Evaluation split → ids of its prompts that also occur in the train splits.

    The cache's report knows equal prompts of unequal spelling for splits named train; equal ids
    are leaks whatever a split that is trained on is called.
    """
    cache, trained_on = prepared.cache, pl.col("split").is_in(prepared.spec.train)
    trained = cache.pairs.filter(trained_on)["prompt_id"].implode()
    found: dict[str, list[str]] = {}
    for split in prepared.evaluate:
        reported = cache.leaks.filter(
            pl.col("train_split").is_in(prepared.spec.train), pl.col("eval_split") == split
        )["prompt_ids"]
        asked = pl.concat(
            table.filter(pl.col("split") == split)["prompt_id"]
            for table in (cache.pairs, cache.members)
        )
        shared = {*reported.explode().drop_nulls(), *asked.filter(asked.is_in(trained))}
        if shared:
            found[split] = sorted(shared)
    return found
