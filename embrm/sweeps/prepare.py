"""Checking a sweep against its cache before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from embrm.cache.reader import Cache, open_cache
from embrm.core.errors import UserError, nearest
from embrm.core.specs import SpecSource, spec_values
from embrm.core.text import listed
from embrm.sweeps.selection import select, with_gold
from embrm.sweeps.spec import (
    Configuration,
    Run,
    RunSpec,
    Selection,
    SweepSpec,
    configurations,
    runs,
)
from embrm.sweeps.tables import read_tables
from embrm.sweeps.training_pairs import (
    as_trained,
    as_validated,
    gold_as_trained,
    pinned,
    with_rules,
)
from embrm.sweeps.views import AFTER_FINAL_NORM, missing_S, open_view
from embrm.training.numerics import Numerics
from embrm.training.regularizers import WHOLE_VOCABULARY


@dataclass(frozen=True)
class PreparedSweep:
    """A sweep checked against its cache.

    evaluate: the splits to evaluate on. training_pairs: how many pairs there are to train on.
    """

    spec: SweepSpec
    cache: Cache
    selection: Selection
    runs: list[Run]
    evaluate: list[str]
    training_pairs: int


def prepare_sweep(
    source: SpecSource, cache_folder: Path | None, numerics: Numerics | None
) -> PreparedSweep:
    """Read a sweep's spec, open its cache, and check one against the other.

    cache_folder, numerics: instead of the spec's own.
    Raises: UserError for anything wrong in the spec or cache.
    """
    values, where = spec_values(source)
    spec = SweepSpec.parse(values, where)
    spec = spec.model_copy(update={"numerics": numerics or spec.numerics})
    found = pin(configurations(spec, where), where)
    return check_sweep(spec, found, cache_for(spec, cache_folder, where), where)


def check_sweep(
    spec: SweepSpec, found: Sequence[Configuration], cache: Cache, where: str
) -> PreparedSweep:
    """Check the configurations `found` of a spec, read from `where`, against a cache.

    Raises: UserError for what the cache lacks.
    """
    selection, training_pairs, evaluate = check_data(spec, found, cache, where)
    _check_regularizers(found, cache, where)
    for seed in spec.data_seeds:
        _check_gold(found, cache, selection.drawn(seed), where)
    for configuration in found:
        run = f"{where}: run {configuration.name!r}"
        asked = configuration.spec
        try:
            open_view(cache, asked.state)
        except UserError as error:
            raise UserError(f"{run}: {error}") from None
        if (asked.head.adapter or asked.regularizer) and asked.state not in AFTER_FINAL_NORM:
            raise UserError(
                f"{run}: state {asked.state!r}: adapters and regularizers act on states after the "
                f"final norm: take state = {' or '.join(map(repr, AFTER_FINAL_NORM))}"
            )
    return PreparedSweep(
        training_pairs=training_pairs,
        spec=spec,
        # Opened again, to free the tables read so far during the sweep.
        cache=open_cache(cache.folder),
        selection=selection,
        runs=runs(found, spec.seeds, selection, spec.numerics, spec.data_seeds),
        evaluate=evaluate,
    )


FEW_STEPS = 100
"""Optimizer steps in all below which a warning says so: AdamW hardly moves the weights in them."""


def step_warnings(prepared: PreparedSweep) -> list[str]:
    """One line that names the configurations of very few optimizer steps; none if there are none.

    Steps are counted without early stopping, in which a run may take fewer.
    """
    few: dict[str, int] = {}
    for run in prepared.runs:
        spec = run.spec
        pairs = spec.pairs_limit or prepared.training_pairs
        steps = spec.epochs * -(-pairs // spec.batch_pairs)
        if spec.learner is None and steps < FEW_STEPS:
            few[run.name] = steps
    if not few:
        return []
    low, high = min(few.values()), max(few.values())
    count = f"{low}" if low == high else f"{low} to {high}"
    return [
        f"{listed([*few][:3])}{f' and {len(few) - 3} more' if len(few) > 3 else ''}: "
        f"{count} optimizer steps in all: lower batch_pairs or raise epochs"
    ]


def cache_for(spec: SweepSpec, folder: Path | None, where: str) -> Cache:
    """Open the cache in `folder`, or the spec's own. Raises: UserError when neither is given."""
    folder = folder or (Path(spec.cache) if spec.cache else None)
    if folder is None:
        raise UserError(
            f"{where}: cache is missing: add cache = 'cache/NAME', or pass cache (--cache)"
        )
    return open_cache(folder)


def check_data(
    spec: SweepSpec, found: Sequence[Configuration], cache: Cache, where: str
) -> tuple[Selection, int, list[str]]:
    """Find which pairs are trained on, how many there are, and the splits to evaluate on.

    The selection and the number of pairs are those of the first data seed.

    Raises: UserError where `cache` lacks splits, pairs or margins that the spec read from `where`
    asks for, with any of its data seeds.
    """
    selection = spec.selection(cache.cache_id)
    checked = [
        _check_draw(
            spec,
            found,
            cache,
            selection.drawn(seed),
            f"{where}: data seed {seed}" if seed else where,
        )
        for seed in spec.data_seeds
    ]
    return selection, *checked[0]


def _check_draw(
    spec: SweepSpec,
    found: Sequence[Configuration],
    cache: Cache,
    selection: Selection,
    where: str,
) -> tuple[int, list[str]]:
    """`check_data` for one data seed: the number of pairs, and the splits to evaluate on."""
    folder = cache.folder
    try:
        splits = read_tables(cache, spec.scenarios, selection.data_seed).splits
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for field, names in (("train", spec.train), ("evaluate", spec.evaluate or ())):
        for name in names:
            if name not in splits:
                raise UserError(
                    f"{where}: {field} split {name!r} is not in {folder}: {nearest(name, splits)}"
                )
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
    others = [split for split in splits if split not in spec.train]
    if not others:
        raise UserError(
            f"{where}: {folder} has no split to evaluate on beside {', '.join(spec.train)}: "
            "extract one with more data (--data), or hold out prompts with holdout in its spec"
        )
    for configuration in found:
        run = f"{where}: run {configuration.name!r}"
        asked = configuration.spec.model_copy(update={"data_seed": selection.data_seed})
        if asked.pairs_limit and asked.pairs_limit > len(training):
            raise UserError(
                f"{run}: pairs_limit = {asked.pairs_limit}, but there are {len(training)} "
                "training pairs: lower or remove it"
            )
        pairs = training
        if asked.labels or asked.fold:
            try:
                pairs = as_trained(with_rules(training, [asked]), asked)
                if spec.validation_labels == "noisy":
                    validated = with_rules(validation, [asked], "validation")
                    validated = as_validated(validated, asked, spec.validation_labels)
                    _check_validated(validated, spec.validation)
            except UserError as error:
                raise UserError(f"{run}: {error}") from None
            if not pairs["weight"].sum():
                raise UserError(
                    f"{run}: its label table and fold leave no pair to train on: change one of them"
                )
        no_margin = pairs["margin"].null_count()
        if asked.margin_scale is not None and no_margin:
            raise UserError(
                f"{run}: margin_scale = {asked.margin_scale:g}, but {no_margin} of "
                f"{len(pairs)} training pairs have no margin: use margin instead"
            )
    return len(training), list(spec.evaluate) if spec.evaluate else others


def _check_validated(pairs: pl.DataFrame, share: float) -> None:
    if share and not pairs["weight"].sum():
        raise UserError(
            "its label table leaves no validation pair: give some a weight above 0, or take "
            "validation_labels = 'clean'"
        )


def pin(found: Sequence[Configuration], where: str) -> list[Configuration]:
    """Add the digest of its label table to every configuration that has one.

    Raises: UserError when a table is missing, or two configurations differ only in its path.
    """
    known: dict[RunSpec, str] = {}
    out = []
    for one in found:
        if one.spec.labels is None:
            out.append(one)
            continue
        try:
            labels = pinned(one.spec.labels)
        except UserError as error:
            raise UserError(f"{where}: run {one.name!r}: {error}") from None
        content = one.spec.model_copy(update={"labels": labels.partition("#")[2]})
        if known.setdefault(content, one.name) != one.name:
            raise UserError(
                f"{where}: runs {known[content]!r} and {one.name!r} have label tables of the same "
                "content: remove one"
            )
        out.append(replace(one, spec=one.spec.model_copy(update={"labels": labels})))
    return out


def _check_regularizers(found: Sequence[Configuration], cache: Cache, where: str) -> None:
    """Raise UserError unless the cache has what the regularizers of `found` read."""
    users = [
        (f"{where}: run {one.name!r}", regularizer)
        for one in found
        if (regularizer := one.spec.active_regularizer)
    ]
    if not users:
        return
    layout, folder = cache.layout, cache.folder
    S_missing = missing_S(cache)
    for run, regularizer in users:
        kind = f"regularizer {regularizer.kind!r}"
        if not layout.has_token_rows:
            raise UserError(
                f"{run}: {kind} reads token rows, and {folder} has none: "
                "extract with token_rows = 8 (--token-rows 8)"
            )
        if regularizer.estimator == "empirical-bayes" and cache.n_token_rows.max(initial=0) < 2:
            raise UserError(
                f"{run}: {kind}: {folder} has one token row a response, which does not show how "
                "positions differ: extract with token_rows = 32 (--token-rows 32), or take "
                "estimator = 'plug-in'"
            )
        if not cache.vocabulary:
            raise UserError(
                f"{run}: {kind} reads the LM head, and {folder} has none: extract one with embrm "
                "extract --model"
            )
        if regularizer.top_k == "all":
            if cache.vocabulary > WHOLE_VOCABULARY:
                raise UserError(
                    f"{run}: top_k = 'all' with {cache.vocabulary} tokens: it is for vocabularies "
                    f"of at most {WHOLE_VOCABULARY}: leave top_k out"
                )
        elif (layout.top_k or 0) < (regularizer.top_k or 1):
            raise UserError(
                f"{run}: top_k = {regularizer.top_k or 1}, and {folder} keeps {layout.top_k} "
                "logits a token row: lower it, or extract with "
                f"top_k = {regularizer.top_k or 32} (--top-k {regularizer.top_k or 32})"
            )
        if regularizer.reads_S and S_missing:
            raise UserError(
                f"{run}: {kind} reads S, the responses' log-probability, and {folder} lacks it for "
                f"{S_missing} responses: take grm-dpo or preserve-kl, or extract them with embrm "
                "extract"
            )


def _check_gold(
    found: Sequence[Configuration], cache: Cache, selection: Selection, where: str
) -> None:
    """Raise UserError unless the training splits have the gold that learners of `found` read."""
    asked = [one for one in found if one.spec.learner and one.spec.learner.reads_gold]
    table = with_gold(cache, selection) if asked else None
    for one in asked:
        assert table is not None
        assert one.spec.learner is not None
        run = f"{where}: run {one.name!r}: learner {one.spec.learner.kind!r} reads gold"
        asked_now = one.spec.model_copy(update={"data_seed": selection.data_seed})
        gold = gold_as_trained(table, asked_now)["gold"]
        if gold.is_empty():
            raise UserError(
                f"{run}, and {', '.join(selection.train)} has no group members to train on: train "
                "on groups of responses with gold scores, or take another learner"
            )
        bad = int(gold.is_finite().not_().sum())
        if bad:
            raise UserError(
                f"{run}: that of {bad} of {len(gold)} training responses is not finite: remove "
                "them from the data and extract again"
            )
        if gold.n_unique() == 1:
            raise UserError(
                f"{run}, and that of all {len(gold)} training responses is {gold[0]:g}: nothing "
                "can be learned from it, take another learner or other data"
            )


def leaked(cache: Cache, spec: SweepSpec, evaluate: Sequence[str]) -> dict[str, list[str]]:
    """Evaluation split → ids of its prompts that also occur in the train splits.

    The cache's own report also finds prompts that differ in spelling alone, but only for splits
    called train; equal ids are found for any training split. With several data seeds, a prompt is
    listed if it occurs in training with any of them.
    """
    drawn = spec.data_seeds if spec.scenarios else spec.data_seeds[:1]
    each = [_leaked(cache, spec, evaluate, data_seed) for data_seed in drawn]
    return {
        split: sorted(set().union(*(own.get(split, set()) for own in each)))
        for split in evaluate
        if any(split in own for own in each)
    }


def _leaked(
    cache: Cache, spec: SweepSpec, evaluate: Sequence[str], data_seed: int
) -> dict[str, set[str]]:
    tables = read_tables(cache, spec.scenarios, data_seed)
    trained = tables.pairs.filter(pl.col("split").is_in(spec.train))["prompt_id"].implode()
    # For a split that scenarios divide, the report does not say which part has the prompt.
    sources = spec.scenarios.splits if spec.scenarios else spec.train
    found: dict[str, set[str]] = {}
    for split in evaluate:
        reported = cache.leaks.filter(
            pl.col("train_split").is_in(sources), pl.col("eval_split") == split
        )["prompt_ids"]
        asked = pl.concat(
            table.filter(pl.col("split") == split)["prompt_id"]
            for table in (tables.pairs, tables.members)
        )
        shared = {*reported.explode().drop_nulls(), *asked.filter(asked.is_in(trained))}
        if shared:
            found[split] = shared
    return found
