"""Matched distortion: the learning rate at which Bradley-Terry moves the language model as far as a
sweep asks for.

A regularizer can only protect what training would distort, so runs are compared where plain
Bradley-Terry distorts as much as, for example, a fine-tune does. The distortion is the token KL of
the training responses (`kl_tokens` of the geometry): mean KL(p_t ‖ p̃_t) in nats at token rows.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from embrm.core.errors import UserError
from embrm.core.specs import canonical_json
from embrm.sweeps.ledger import finished, read_table, training_name
from embrm.sweeps.prepare import PreparedSweep
from embrm.sweeps.run_training import train_runs
from embrm.sweeps.spec import Configuration, Run, RunSpec, runs
from embrm.training.objectives import Objective

RATES = tuple(float(f"{10 ** (exponent / 2):.3g}") for exponent in range(-8, 1))
"""Learning rates that are tried first: two a decade from 1e-4 to 1."""

_BETWEEN = 5
"""Rates that are tried next, between the two whose KL lie around the one asked for."""

TOLERANCE = 0.05
"""A KL is reached within this share of it."""

_ROUNDS = 5

_ENSEMBLE = ("members", "combine", "penalty", "bootstrap")

FOLDER = "matching"
"""Folder of the runs of a search, in the results folder."""


def twin(spec: RunSpec) -> RunSpec:
    """The Bradley-Terry run that `spec` is matched to: its head, data and optimisation, with no
    regularizer, no other objective and no ensemble."""
    fields = (*Objective.model_fields, *_ENSEMBLE, "regularizer", "match")
    return spec.model_copy(update={name: RunSpec.model_fields[name].default for name in fields})


@dataclass
class _Search:
    """The search for one learning rate. measured: rate → mean token KL over seeds,
    infinite where a run diverged."""

    spec: RunSpec
    kl: float
    measured: dict[float, float] = field(default_factory=dict)
    rounds: int = 0

    @property
    def best(self) -> float:
        """The rate whose KL is nearest to the one asked for, by their ratio."""
        return min(self.measured, key=lambda rate: abs(_log(self.measured[rate]) - _log(self.kl)))

    @property
    def reached(self) -> bool:
        return abs(self.measured[self.best] / self.kl - 1) <= TOLERANCE if self.measured else False

    def next_rates(self) -> list[float]:
        """What to try next; none when the search has ended."""
        if not self.measured:
            return [*RATES]
        if self.reached or self.rounds >= _ROUNDS:
            return []
        rates = sorted(self.measured)
        for low, high in itertools.pairwise(rates):
            if self.measured[low] < self.kl <= self.measured[high]:
                steps = [(high / low) ** (i / (_BETWEEN + 1)) for i in range(1, _BETWEEN + 1)]
                return [r for s in steps if (r := float(f"{low * s:.3g}")) not in self.measured]
        return []


def match_rates(
    prepared: PreparedSweep, out: Path, *, jobs: int, memory: int | None, train: bool = True
) -> PreparedSweep:
    """Give every run with `match` the learning rate that its twin needs.

    Twins are trained below `out` with the seeds and data seeds of the sweep, whose mean KL counts,
    and found there again when the sweep is resumed. train: False leaves rates that are not known
    yet as they are.

    Raises: UserError for a KL that no learning rate reaches, naming the nearest, and for a cache
    without token rows.
    """
    searches: dict[str, _Search] = {}
    for run in prepared.runs:
        if run.spec.match is not None:
            searches.setdefault(_key(run.spec), _Search(twin(run.spec), run.spec.match.kl))
    if not searches:
        return prepared
    if not prepared.cache.layout.has_token_rows or not prepared.cache.vocabulary:
        raise UserError(
            f"match: {prepared.cache.folder} has no token rows to measure a token KL at: use a "
            "cache that embrm extract made with --token-rows"
        )
    folder = out / FOLDER
    while asked := {key: rates for key, own in searches.items() if (rates := own.next_rates())}:
        tried = {key: _runs(prepared, searches[key].spec, rates) for key, rates in asked.items()}
        every = {run.run_id: run for own in tried.values() for run in own}
        done = finished(folder)
        todo = [run for run_id, run in every.items() if run_id not in done]
        if todo and not train:
            return prepared
        failures = train_runs(
            prepared, todo, folder, jobs=jobs, memory=memory, label="matching learning rates"
        )
        if failures:
            first, why = next(iter(failures.items()))
            raise UserError(f"{len(failures)} runs failed while matching, first {first}: {why}")
        kl = _token_kl(folder, [*every], training_name(prepared.spec.train))
        for key, own in tried.items():
            for rate in {run.spec.lr for run in own}:
                of_seeds = [kl[run.run_id] for run in own if run.spec.lr == rate]
                searches[key].measured[rate] = sum(of_seeds) / len(of_seeds)
            searches[key].rounds += 1
    for search in searches.values():
        _refuse_unreached(search)
    found = {run.name: Configuration(run.name, _at(run.spec, searches)) for run in prepared.runs}
    return replace(prepared, runs=_every(prepared, [*found.values()]))


def _key(spec: RunSpec) -> str:
    content = twin(spec).model_dump(mode="json", exclude={"lr", "seed", "data_seed"})
    return canonical_json({"twin": content, "kl": spec.match.kl if spec.match else None})


def _at(spec: RunSpec, searches: dict[str, _Search]) -> RunSpec:
    if spec.match is None:
        return spec
    return spec.model_copy(update={"lr": searches[_key(spec)].best})


def _runs(prepared: PreparedSweep, spec: RunSpec, rates: Sequence[float]) -> list[Run]:
    found = [
        Configuration(f"match[lr={rate:g}]", spec.model_copy(update={"lr": rate})) for rate in rates
    ]
    return _every(prepared, found)


def _every(prepared: PreparedSweep, found: Sequence[Configuration]) -> list[Run]:
    spec = prepared.spec
    return runs(found, spec.seeds, prepared.selection, spec.numerics, spec.data_seeds)


def _token_kl(folder: Path, run_ids: Sequence[str], split: str) -> dict[str, float]:
    """The token KL of finished runs on the training responses; infinite where one diverged."""
    parts = finished(folder)
    kl = dict.fromkeys(run_ids, math.inf)
    for part in {parts[run_id] for run_id in run_ids}:
        rows = read_table(part / "geometry.parquet").filter(
            pl.col("split") == split, pl.col("kl_tokens").is_not_null()
        )
        kl |= {
            run_id: value
            for run_id, value in rows.select("run_id", "kl_tokens").rows()
            if run_id in kl
        }
    return kl


def _refuse_unreached(search: _Search) -> None:
    if search.reached:
        return
    rate, kl = search.best, search.measured[search.best]
    if math.isinf(kl):
        raise UserError(
            f"match.kl = {search.kl:g}: Bradley-Terry diverged at every learning rate from "
            f"{RATES[0]:g} to {RATES[-1]:g}: change batch_pairs or the adapter"
        )
    raise UserError(
        f"match.kl = {search.kl:g}: no learning rate from {RATES[0]:g} to {RATES[-1]:g} was found "
        f"at which the token KL of Bradley-Terry is within {TOLERANCE:.0%} of it; the nearest is "
        f"{kl:.3g} at lr = {rate:g}: ask for that, or change epochs or the adapter"
    )


def _log(kl: float) -> float:
    return math.log(max(kl, 1e-12)) if kl < math.inf else 1e6
