"""The spec of a fine-tune: a sweep's spec, and how the model itself is trained."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from embrm.core.errors import UserError
from embrm.core.specs import Spec
from embrm.data.sources import SourceSpec
from embrm.finetuning.contrast import SimcseSpec
from embrm.finetuning.meta import MetaSpec
from embrm.sweeps.spec import RunSpec, SweepSpec
from embrm.training.regularizers import is_nonlinear

_UNSAMPLED = {"token_rows": 2, "estimator": "plug-in"}

Tune = Literal["full", "lora", "frozen"]


class FinetuneRun(RunSpec):
    """A run with a sweep's objective, head and optimisation, and objectives of fine-tunes only."""

    # Recorded only where they are set, so that other runs keep the ids of older versions.
    simcse: SimcseSpec | None = Field(default=None, exclude_if=lambda found: found is None)
    """A table: adds a contrastive loss over two views of the minibatch; see below."""
    metarm: MetaSpec | None = Field(default=None, exclude_if=lambda found: found is None)
    """A table: takes gradients at weights that look ahead (MetaRM); see below."""

    @model_validator(mode="before")
    @classmethod
    def _samples_nothing(cls, values: Any) -> Any:
        # A fine-tune computes a regularizer exactly. What says how a sweep samples token rows has
        # one value here, so that it is in no run's id; `check_fits` refuses any other.
        regularizer = values.get("regularizer") if isinstance(values, dict) else None
        if not isinstance(regularizer, dict) or not is_nonlinear(str(regularizer.get("kind"))):
            return values
        return values | {"regularizer": _UNSAMPLED | regularizer}

    @model_validator(mode="after")
    def _moves_something(self) -> Self:
        # Replaces the check of a sweep, which refuses regularizers that need states to move. Here
        # the backbone moves them; `check_fits` refuses what does not fit a fine-tune.
        return self


class LoraSpec(Spec):
    """Low-rank adapters of the backbone (arXiv 2106.09685), trained by peft."""

    rank: int = Field(default=32, gt=0)
    """Rank of every adapter."""
    alpha: float = Field(default=64.0, gt=0)
    """An adapter's product is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of an adapter's input."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers with adapters. Empty: q_proj, k_proj, v_proj and o_proj, or all
    linear layers in a model that has none of these."""


class FinetuneSpec(SweepSpec):
    """A fine-tune's TOML file: all fields of a sweep's, and those below."""

    run_spec: ClassVar[type[RunSpec]] = FinetuneRun

    model: str | None = None
    """Folder or hub id of the model, if it has moved since the cache was made."""
    data: tuple[SourceSpec, ...] | None = Field(default=None, min_length=1)
    """The datasets, a `[[data]]` table each, if they have moved since the cache was made."""
    tune: Tune = "full"
    """What is trained. full: all weights; lora: head and low-rank adapters; frozen: the head alone,
    as in a sweep."""
    lora: LoraSpec = LoraSpec()
    """A table: the adapters of tune = "lora"; see below."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the backbone, by autocast; its weights stay in float32."""
    micro_pairs: int | None = Field(default=None, gt=0)
    """Pairs of a forward step on each device. Not given: the device's whole part of a minibatch."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward step: less memory, about a third more time."""
    max_grad_norm: float | None = Field(default=None, ge=0)
    """Largest gradient norm, to which larger gradients are scaled down. 0: no limit. Not given:
    1, and no limit with tune = "frozen"."""
    save_steps: int = Field(default=200, gt=0)
    """Steps between checkpoints to resume from."""
    bsr_scope: Literal["batch", "micro"] = "batch"
    """Pairs that r̄ of bsr is the mean over. batch: the whole minibatch; micro: those of one forward
    step on one device, as in the code of arXiv 2505.07271."""
    report_to: tuple[str, ...] = ()
    """Experiment trackers, by transformers' names, such as tensorboard or wandb."""

    @model_validator(mode="after")
    def _no_field_of_sweeps(self) -> Self:
        if self.numerics != "native":
            raise ValueError(
                f"numerics = {self.numerics!r} is of sweeps: remove it, and choose with device "
                "(--device)"
            )
        if self.data_seeds != (0,):
            raise ValueError(
                f"data_seeds = {list(self.data_seeds)} is of sweeps: remove it, a fine-tune has "
                "data seed 0"
            )
        if self.lora != LoraSpec() and self.tune != "lora":
            raise ValueError(f"lora with tune = {self.tune!r} does nothing: set tune = 'lora'")
        if self.bsr_scope == "micro" and self.micro_pairs is None:
            raise ValueError("bsr_scope = 'micro' needs micro_pairs: set it")
        return self

    @property
    def clip(self) -> float:
        """Largest gradient norm; 0 for no limit."""
        if self.max_grad_norm is None:
            return 0.0 if self.tune == "frozen" else 1.0
        return self.max_grad_norm

    @property
    def as_sweep(self) -> SweepSpec:
        """The fields that a sweep has too, as a sweep's spec."""
        return SweepSpec(**{name: getattr(self, name) for name in SweepSpec.model_fields})

    def identity(self, run: RunSpec) -> dict[str, Any]:
        """Return what defines a run's result beside its own fields and its pairs, for its id.

        Settings that change a result by rounding only, such as micro_pairs, are left out.
        """
        settings: dict[str, Any] = {"tune": self.tune, "dtype": self.dtype, "clip": self.clip}
        if self.tune == "lora":
            settings["lora"] = self.lora.model_dump(mode="json")
        if run.reads_batch_mean and self.bsr_scope == "micro":
            settings["bsr_scope"] = self.bsr_scope
            settings["micro_pairs"] = self.micro_pairs
        return {"finetune": settings}


def check_fits(run: FinetuneRun, tune: Tune, where: str) -> None:
    """Refuse a run that a fine-tune of this kind cannot train.

    where: where the run was read from, for the message. Raises: UserError.
    """
    frozen, regularizer = tune == "frozen", run.active_regularizer
    wrong: list[tuple[bool, str, str]] = [
        (
            run.head.adapter is not None,
            f"head.adapter = {str(run.head.adapter)!r}",
            "embrm sweep trains it" if frozen else "the backbone itself moves: remove it",
        ),
        (
            run.preprocess != "none",
            f"preprocess = {run.preprocess!r}",
            "embrm sweep fits it to frozen states; remove it here",
        ),
        (
            run.state != "last",
            f"state = {run.state!r}",
            "a fine-tune reads the final position alone: remove it",
        ),
        (
            run.data_smoothing > 0,
            f"data_smoothing = {run.data_smoothing:g}",
            "embrm sweep moves the labels of frozen states; make a label table, and remove it here",
        ),
        (
            run.members > 1,
            f"members = {run.members}",
            "fine-tune with several seeds instead, and remove it",
        ),
        (
            run.simcse is not None and frozen,
            "simcse",
            "acts on states that move: set tune = 'full' or 'lora'",
        ),
        (
            run.match is not None,
            f"match.kl = {run.match.kl if run.match else 0:g}",
            "embrm sweep chooses learning rates; give lr here",
        ),
        (
            run.learner is not None,
            f"learner = {str(run.learner)!r}",
            "embrm sweep fits it to frozen states; remove it here",
        ),
    ]
    if regularizer is not None:
        kind, of_grm = f"regularizer {regularizer.kind!r}", regularizer.is_grm
        still = "acts on states that move: set tune = 'full' or 'lora', or sweep it with an adapter"
        wrong += [
            (not of_grm, kind, "is made for frozen states: embrm sweep trains it"),
            (frozen, kind, still),
        ]
        wrong += [
            (
                getattr(regularizer, field) not in unset,
                f"regularizer.{field} = {getattr(regularizer, field)!r}",
                "a fine-tune reads every token and the whole vocabulary: remove it",
            )
            for field, unset in (
                ("token_rows", (_UNSAMPLED["token_rows"],)),
                ("top_k", (None,)),
                ("estimator", (None, _UNSAMPLED["estimator"])),
            )
        ]
    for refused, found, remedy in wrong:
        if refused:
            raise UserError(f"{where}: {found} with tune = {tune!r}: {remedy}")


def micro_pairs(spec: FinetuneSpec, run: RunSpec, processes: int, where: str) -> int:
    """Return the number of pairs of a forward step on each of `processes` processes.

    Raises: UserError when a minibatch does not divide into such steps.
    """
    if spec.micro_pairs is None:
        if run.batch_pairs % processes:
            raise UserError(
                f"{where}: batch_pairs = {run.batch_pairs} does not divide among {processes} "
                "processes: take a multiple"
            )
        return run.batch_pairs // processes
    if run.batch_pairs % (spec.micro_pairs * processes):
        raise UserError(
            f"{where}: batch_pairs = {run.batch_pairs} is no multiple of micro_pairs = "
            f"{spec.micro_pairs} times {processes} processes: change one of them"
        )
    return spec.micro_pairs
