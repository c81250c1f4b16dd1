"""The spec of a sweep, and its expansion into configurations and runs with content ids."""

import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from embrm.core.errors import UserError, nearest
from embrm.core.spec_errors import ELSEWHERE
from embrm.core.specs import Spec, content_id
from embrm.data.scenarios import Scenarios
from embrm.training.ensembles import PENALTY, Combine
from embrm.training.learner_specs import Learner
from embrm.training.numerics import Numerics
from embrm.training.regularizers import is_nonlinear
from embrm.training.spec import TrainSpec

ValidationLabels = Literal["clean", "noisy"]

TRAINING_VERSION = "0.3.0"
"""The release since which training has given the same bits. It is part of every run's identity in
place of the package's version, so that a new release finds the runs of older ones. Raise it to the
coming release whenever a change alters a bit of any stored result, and never otherwise;
tests/sweeps/test_golden.py fails when it is forgotten."""


class MatchSpec(Spec):
    """A learning rate chosen by how far it lets plain Bradley-Terry move the language model."""

    kl: float = Field(gt=0)
    """Mean KL(p ‖ p̃) in nats at the token rows of the training responses that the run without
    regularizer, other objective or ensemble is to reach, within 5 %."""


class RunSpec(TrainSpec):
    """One run: which data it reads from the cache, and how it is trained."""

    state: str = "last"
    """View of the cache: "last", "mean", "prenorm" or "layer:K"; or "tokens", the mean of a
    response's sampled token rows. With "+S" the response's log-probability is one more
    component."""
    pairs_limit: int | None = Field(default=None, gt=0)
    """Train on this many pairs, the first ones by pair id (a hash), so that smaller limits are
    subsets of larger ones."""
    label_noise: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the training pairs whose label is flipped. A hash of the pair id chooses them: the
    same pairs for every seed, and a higher share includes those of a lower one. Validation pairs
    keep their labels unless validation_labels = "noisy"."""
    # Fields that were added later are recorded only if set, so that other runs keep their ids.
    labels: str | None = Field(default=None, exclude_if=lambda path: path is None)
    """A table made by embrm labels, whose labels, weights and margins replace those of the training
    pairs; pairs of weight 0 are left out. The table's content is part of the run's identity."""
    fold: str | None = Field(default=None, exclude_if=lambda fold: fold is None)
    """"i/k": divide the training prompts into k folds and train on all but fold i, counted from
    0."""
    members: int = Field(default=1, gt=0)
    """Number of heads in an ensemble. Each is trained with its own seed, and their rewards are
    combined."""
    combine: Combine = Field(default="mean", exclude_if=lambda kind: kind == "mean")
    """How the rewards of the members are combined: mean; or, standardised on the training
    responses, min, uwo (mean - λ·variance) or lcb (mean - β·standard deviation)."""
    penalty: float = Field(default=PENALTY, ge=0, le=100, exclude_if=lambda value: value == PENALTY)
    """λ of combine = "uwo", β of combine = "lcb"."""
    bootstrap: bool = Field(default=False, exclude_if=operator.not_)
    """Train each member on a bootstrap resample of the training prompts."""
    match: MatchSpec | None = Field(default=None, exclude_if=lambda match: match is None)
    """A table: lr is chosen so that plain Bradley-Terry distorts as asked; see below."""
    data_seed: int = Field(default=0, ge=0, lt=2**15, exclude_if=operator.not_)
    """Seed of what is drawn of the data: validation prompts, flipped labels, the pairs of
    pairs_limit, folds, and the division into scenarios. Set by data_seeds, not in an entry."""
    learner: Learner | None = Field(default=None, exclude_if=lambda learner: learner is None)
    """A table: see below. scikit-learn fits this learner in place of a head; keys that it does not
    read must keep their defaults."""

    @classmethod
    def stored(cls, values: Mapping[str, Any], where: str) -> Self:
        """The spec of a finished run, from what was stored with it.

        A regularizer stored without an estimator had the only one before 0.4.0, plug-in, while in
        a new spec no estimator means the default of its kind.

        Raises: UserError as `parse`.
        """
        values = dict(values)
        regularizer = values.get("regularizer")
        if regularizer and "estimator" not in regularizer and is_nonlinear(regularizer["kind"]):
            values["regularizer"] = regularizer | {"estimator": "plug-in"}
        return cls.parse(values, where)

    def member(self, number: int) -> "RunSpec":
        """The spec of one head of the ensemble; the first has the run's seed.

        How members are combined does not affect a member, so those fields have their defaults.
        """
        alone = {"combine": "mean", "penalty": PENALTY}
        return self.model_copy(update={"seed": self.own_seed + number * 2**32, **alone})

    @property
    def own_seed(self) -> int:
        """The seed of initial weights, order and dropout: runs of different data seeds share no
        random numbers, so that their means are independent replicates."""
        return self.seed + self.data_seed * 2**48

    @model_validator(mode="after")
    def _combines_something(self) -> Self:
        if self.members == 1 and (self.combine != "mean" or self.bootstrap):
            field = "bootstrap = true" if self.bootstrap else f"combine = {self.combine!r}"
            raise ValueError(f"{field} with members = 1: set members to 2 or more, or remove it")
        if self.penalty != PENALTY and self.combine not in ("uwo", "lcb"):
            raise ValueError(
                f"penalty = {self.penalty:g} with combine = {self.combine!r}: it is the λ of "
                "'uwo' and the β of 'lcb': take one of them, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _match_can_be_measured(self) -> Self:
        if self.match is not None and self.head.adapter is None:
            raise ValueError(
                f"match.kl = {self.match.kl:g} without an adapter: nothing moves the language "
                "model, add head.adapter or remove match"
            )
        return self

    @model_validator(mode="after")
    def _fold_exists(self) -> Self:
        if self.fold is not None and not 0 <= self.fold_of[0] < self.fold_of[1] >= 2:
            raise ValueError(
                f"fold = {self.fold!r}: write i/k with 0 ≤ i < k and k at least 2, such as '0/5'"
            )
        return self

    @model_validator(mode="after")
    def _learner_reads_all(self) -> Self:
        learner = self.learner
        if learner is None:
            return self
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in learner.reads and value != field.default:
                shown = value if isinstance(value, int | float | str) else str(value)
                raise ValueError(
                    f"{name} = {shown!r} with learner {learner.kind!r}, which does not read "
                    f"it: remove {name} here, or from defaults"
                )
        return self

    @property
    def fold_of(self) -> tuple[int, int]:
        """i and k of `fold`; (-1, 0) if there is none or it cannot be read."""
        found = re.fullmatch(r"(\d+)/(\d+)", self.fold or "")
        return (int(found[1]), int(found[2])) if found else (-1, 0)

    @property
    def relabels(self) -> bool:
        """Whether the run's labels may differ from the cache's."""
        return bool(self.label_noise or self.labels)

    def data_key(self) -> tuple[Any, ...]:
        """Runs with equal keys are trained on the same data."""
        key = self.state, self.pairs_limit, self.label_noise, self.labels, self.fold
        return *key, self.bootstrap, self.data_seed

    def pack_key(self) -> tuple[Any, ...]:
        """See `TrainSpec`. The runs of a pack with a learner share one fit."""
        if self.learner is None:
            return super().pack_key()
        return self.learner, self.preprocess, self.own_seed if self.learner.seeded else None


class SweepSpec(Spec):
    """A sweep, as its TOML file describes it.

    `defaults` and every entry of `runs` hold fields of `RunSpec` but the seeds. An entry adds a
    `name` and may add `grid`, a table of field = list of values whose product is taken; a dotted
    field such as "head.widths" reaches into a table. A table given in an entry replaces the one
    in `defaults`.
    """

    run_spec: ClassVar[type[RunSpec]] = RunSpec
    """The spec of one of its runs."""

    cache: str | None = None
    """Cache folder; the option --cache takes precedence."""
    train: Annotated[tuple[str, ...], Field(min_length=1)] = ("train",)
    """Splits that are trained on."""
    # Recorded only where it is set, so that older sweeps keep their bytes.
    scenarios: Scenarios | None = Field(default=None, exclude_if=lambda rule: rule is None)
    """A table: divide groups into the splits train, id, prompt, model and mutual; see below."""
    evaluate: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Splits that runs are evaluated on. Not given: all that are not trained on."""
    validation: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the training prompts kept out for early stopping and the temperature."""
    validation_labels: ValidationLabels = Field(
        default="clean", exclude_if=lambda labels: labels == "clean"
    )
    """Labels of the validation pairs of runs with label_noise or a label table. clean: those of the
    cache. noisy: flipped and replaced by the same rules as training labels, as where validation
    pairs are split off a noisy training set."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    """Every configuration is trained once with each seed."""
    data_seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**15)], ...], Field(min_length=1)
    ] = Field(default=(0,), exclude_if=lambda seeds: tuple(seeds) == (0,))
    """Every configuration is trained with each seed on each of these draws of validation prompts,
    flipped labels, limited pairs, folds and scenarios. 0 gives the draws of a sweep without
    data_seeds."""
    numerics: Numerics = "native"
    """native: this CPU's widest instructions. portable: AVX2 only, which is slower and gives the
    same bits on every x86 machine. cuda, cuda-tf32, mps: a GPU, where runs repeat within a
    tolerance."""
    baseline: str
    """The configuration that the report compares all others with."""
    defaults: dict[str, Any] = Field(default_factory=dict)
    """Keys that apply to every run; see below."""
    runs: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    """One table per entry: a name, keys as below, and optionally a grid of key = list of values."""

    @model_validator(mode="before")
    @classmethod
    def _keys_of_runs_are_in_runs(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            own = ELSEWHERE.get(key, key)
            elsewhere = own in cls.run_spec.model_fields and own not in cls.model_fields
            if elsewhere and own not in ("seed", "data_seed"):
                raise ValueError(
                    f"{own} is a key of runs: write it below [defaults], for all runs, or in a "
                    "[[runs]] table"
                    if own == key
                    else f"unknown key {key!r}: did you mean {own!r}, a key of [defaults] and "
                    "[[runs]]?"
                )
        return values

    @model_validator(mode="after")
    def _lists_name_things_once(self) -> Self:
        for field in ("train", "evaluate", "seeds", "data_seeds"):
            values = getattr(self, field) or ()
            for value in values:
                if values.count(value) > 1:
                    raise ValueError(f"{field} names {value!r} twice: remove one")
        for split in self.evaluate or ():
            if split in self.train:
                raise ValueError(f"split {split!r} is trained on: remove it from evaluate")
        return self

    def selection(self, cache_id: str) -> "Selection":
        """The selection of pairs that this sweep makes in a cache with its first data seed."""
        return Selection(
            cache_id,
            self.train,
            self.validation,
            self.scenarios,
            self.validation_labels,
            self.data_seeds[0],
        )


@dataclass(frozen=True)
class Configuration:
    """A named configuration of a sweep; together with a seed it is a run."""

    name: str
    spec: RunSpec


@dataclass(frozen=True)
class Selection:
    """Which pairs of a cache are trained on and which validate; part of every run's identity."""

    cache_id: str
    train: tuple[str, ...]
    validation: float
    scenarios: Scenarios | None = None
    validation_labels: ValidationLabels = "clean"
    data_seed: int = 0

    def drawn(self, data_seed: int) -> "Selection":
        """The same selection with another data seed, which belongs to the run's spec in its id."""
        return replace(self, data_seed=data_seed)


@dataclass(frozen=True)
class Run:
    """One configuration with one seed and data seed. `run_id` and `config_id` hash its content, not
    its name."""

    name: str
    run_id: str
    config_id: str
    spec: RunSpec

    @property
    def title(self) -> str:
        """NAME seed SEED, and the data seed unless it is 0."""
        data = f" data seed {self.spec.data_seed}" if self.spec.data_seed else ""
        return f"{self.name} seed {self.spec.seed}{data}"


def configurations(sweep: SweepSpec, where: str) -> list[Configuration]:
    """Expand a sweep, read from `where`, into its configurations, in the order of the spec.

    Raises: UserError for a wrong field (naming the entry), two configurations of one name or of
    one content, or a baseline that none of them is.
    """
    kind = sweep.run_spec
    found: dict[str, Configuration] = {}
    contents: dict[RunSpec, str] = {}
    for index, entry in enumerate(sweep.runs):
        for name, fields in _expand(entry, sweep.defaults, f"{where}: runs[{index}]"):
            for field in ("seed", "data_seed"):
                if field in fields:
                    raise UserError(
                        f"{where}: run {name!r}: {field} = {fields[field]!r}: "
                        f"seeds belong to the whole sweep, write {field}s = [...] at the top"
                    )
            for key in fields:
                if key in type(sweep).model_fields and key not in kind.model_fields:
                    raise UserError(
                        f"{where}: run {name!r}: {key} is a key of the whole spec: write it at the "
                        "top, above [defaults] and [[runs]]"
                    )
            if "match" in fields and "lr" in fields:
                raise UserError(
                    f"{where}: run {name!r}: lr = {fields['lr']!r} beside match, which chooses it: "
                    "remove lr here, or from defaults"
                )
            spec = kind.parse(fields, f"{where}: run {name!r}")
            if name in found:
                raise UserError(f"{where}: two runs are named {name!r}: rename one")
            if spec in contents:
                raise UserError(
                    f"{where}: runs {contents[spec]!r} and {name!r} are the same configuration: "
                    "remove one"
                )
            _check_patience(sweep, spec, f"{where}: run {name!r}")
            contents[spec] = name
            found[name] = Configuration(name, spec)
    _check_data_seeds(sweep, [*contents], where)
    if sweep.baseline not in found:
        raise UserError(
            f"{where}: baseline = {sweep.baseline!r} is no run of this sweep: "
            f"{nearest(sweep.baseline, found)}"
        )
    return [*found.values()]


def runs(
    found: Sequence[Configuration],
    seeds: Sequence[int],
    selection: Selection,
    numerics: Numerics,
    data_seeds: Sequence[int] = (0,),
) -> list[Run]:
    """Every configuration of a sweep with every data seed and seed."""
    return identified(found, seeds, selection, {"numerics": numerics}, data_seeds)


def identified(
    found: Sequence[Configuration],
    seeds: Sequence[int],
    selection: Selection,
    settings: dict[str, Any],
    data_seeds: Sequence[int] = (0,),
) -> list[Run]:
    """Every configuration with every data seed and seed, trained with these settings.

    A run's ids depend on its own content, the settings and `TRAINING_VERSION` alone: a release
    that trains to other bits must not pass off older results as its own.
    """
    read: dict[str, Any] = {
        "embrm": TRAINING_VERSION,
        "cache_id": selection.cache_id,
        "train": sorted(selection.train),
        "validation": selection.validation,
        **settings,
    }
    if selection.scenarios:  # Added only if present, so that other runs keep their ids.
        read["scenarios"] = selection.scenarios.model_dump(mode="json")
    out = []
    for configuration in found:
        content = configuration.spec.model_dump(mode="json", exclude={"seed", "data_seed"})
        if configuration.spec.labels:  # `pin` has made it PATH#DIGEST.
            content["labels"] = configuration.spec.labels.partition("#")[2]
        if used := configuration.spec.extensions():
            content["extensions"] = {name: part.digest for name, part in used.items()}
        own = read
        if selection.validation_labels == "noisy" and configuration.spec.relabels:
            own = {**read, "validation_labels": "noisy"}
        for data_seed, seed in itertools.product(data_seeds, seeds):
            drawn = {"data_seed": data_seed} if data_seed else {}  # others keep their ids
            out.append(
                Run(
                    name=configuration.name,
                    run_id=content_id({**own, "run": {**content, "seed": seed, **drawn}}),
                    config_id=content_id({**own, "run": content}),
                    spec=configuration.spec.model_copy(
                        update={"seed": seed, "data_seed": data_seed}
                    ),
                )
            )
    return out


def _check_data_seeds(sweep: SweepSpec, specs: Sequence[RunSpec], where: str) -> None:
    drawn = [spec.label_noise or spec.pairs_limit or spec.fold for spec in specs]
    if sweep.data_seeds != (0,) and not (sweep.validation or sweep.scenarios or any(drawn)):
        raise UserError(
            f"{where}: data_seeds = {list(sweep.data_seeds)} with validation = 0, and without "
            "label_noise, pairs_limit, fold and scenarios: nothing can be drawn again, remove "
            "data_seeds or raise validation"
        )


def _check_patience(sweep: SweepSpec, spec: RunSpec, where: str) -> None:
    if spec.patience is not None and not sweep.validation:
        raise UserError(
            f"{where}: patience = {spec.patience} with validation = 0: early stopping needs "
            "validation pairs, raise validation or remove patience"
        )


def _expand(
    entry: dict[str, Any], defaults: dict[str, Any], where: str
) -> list[tuple[str, dict[str, Any]]]:
    """The (name, fields) of an entry, or of every point of its grid."""
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: name = {name!r}: a run needs a name, such as name = 'bt'")
    grid = entry.get("grid", {})
    if not isinstance(grid, dict):
        raise UserError(f"{where}: grid = {grid!r}: write a table, such as grid.lr = [1e-3, 1e-4]")
    for field, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"{where}: grid.{field} = {values!r}: write a list of values, "
                "and quote a dotted field"
            )
    base = {**defaults, **{key: entry[key] for key in entry if key not in ("name", "grid")}}
    # A dotted field is named by its last part if that is unambiguous.
    last = [field.rpartition(".")[2] for field in grid]
    labels = [
        name if last.count(name) == 1 else field for field, name in zip(grid, last, strict=True)
    ]
    points = []
    for values in itertools.product(*grid.values()):
        fields = deepcopy(base)
        for field, value in zip(grid, values, strict=True):
            _set(fields, field, value, where)
        label = ",".join(f"{key}={_short(v)}" for key, v in zip(labels, values, strict=True))
        points.append((f"{name}[{label}]" if label else name, fields))
    return points


def _set(fields: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    *path, last = dotted.split(".")
    for key in path:
        fields = fields.setdefault(key, {})
        if not isinstance(fields, dict):
            raise UserError(f"{where}: grid field {dotted!r}: {key} is not a table: remove the dot")
    fields[last] = value


def _short(value: Any) -> str:
    """A grid value in a configuration's name: 0.001, mlp, 64-32."""
    if isinstance(value, list):
        return "-".join(map(_short, value))
    if isinstance(value, dict):
        return " ".join(f"{key} {_short(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
