"""What a fine-tune asks for: a sweep's spec, and how the model itself is trained."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from embrm.core.errors import UserError
from embrm.core.specs import Spec
from embrm.data.sources import SourceSpec
from embrm.finetuning.contrast import SimcseSpec
from embrm.finetuning.meta import MetaSpec
from embrm.sweeps.spec import RunSpec, SweepSpec
from embrm.training.regularizers import GRM

Tune = Literal["full", "lora", "frozen"]


class FinetuneRun(RunSpec):
    """One run: objective, head and optimisation, as in a sweep, and what needs states that move."""

    # Recorded only where they are set: other runs keep their ids.
    simcse: SimcseSpec | None = Field(default=None, exclude_if=lambda found: found is None)
    """A table: a contrastive loss over two views of the minibatch, see below."""
    metarm: MetaSpec | None = Field(default=None, exclude_if=lambda found: found is None)
    """A table: gradients are taken ahead of the weights, see below."""

    @model_validator(mode="after")
    def _moves_something(self) -> Self:
        # Here the states move. What a trained backbone leaves no room for `unfit` names.
        return self


class LoraSpec(Spec):
    """Low-rank adapters of the backbone (arXiv 2106.09685), by peft."""

    rank: int = Field(default=32, gt=0)
    """Of every adapter."""
    alpha: float = Field(default=64.0, gt=0)
    """An adapter's product is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Before an adapter."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get one; none: q_proj, k_proj, v_proj and o_proj where the
    model has them, otherwise all."""


class FinetuneSpec(SweepSpec):
    """A fine-tune as its TOML file says it: all that a sweep's says, and the fields below."""

    model: str | None = None
    """Folder or hub id of the model, where it is no longer where the cache was made."""
    data: tuple[SourceSpec, ...] | None = Field(default=None, min_length=1)
    """The datasets, a `[[data]]` table each, where they are no longer where the cache was made."""
    tune: Tune = "full"
    """full: all weights; lora: low-rank adapters; frozen: the head alone, as a sweep does."""
    lora: LoraSpec = LoraSpec()
    """A table: see below."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the backbone; its weights are kept in float32 all the same."""
    micro_pairs: int | None = Field(default=None, gt=0)
    """Pairs of a forward step on each device; None: all that are the device's of a minibatch."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward step: less memory, about a third more time."""
    max_grad_norm: float | None = Field(default=None, ge=0)
    """Gradients are scaled down to this norm; 0: never; None: 1, and never where frozen."""
    save_steps: int = Field(default=200, gt=0)
    """A checkpoint to resume from is written every so many steps."""
    bsr_scope: Literal["batch", "micro"] = "batch"
    """What r̄ of bsr is a mean over. batch: the whole minibatch, exactly; micro: the pairs of one
    forward step on one device, as the code of arXiv 2505.07271."""
    report_to: tuple[str, ...] = ()
    """Trackers, by transformers' names, such as tensorboard or wandb."""

    @model_validator(mode="after")
    def _no_field_of_sweeps(self) -> Self:
        if self.numerics != "native":
            raise ValueError(
                f"numerics = {self.numerics!r} is of sweeps: remove it, and choose with --device"
            )
        if self.lora != LoraSpec() and self.tune != "lora":
            raise ValueError(f"lora with tune = {self.tune!r} does nothing: set tune = 'lora'")
        if self.bsr_scope == "micro" and self.micro_pairs is None:
            raise ValueError("bsr_scope = 'micro' needs micro_pairs: set it")
        return self

    @property
    def clip(self) -> float:
        """Largest norm of a gradient; 0: any."""
        if self.max_grad_norm is None:
            return 0.0 if self.tune == "frozen" else 1.0
        return self.max_grad_norm

    @property
    def as_sweep(self) -> SweepSpec:
        """The fields that a sweep has."""
        return SweepSpec(**{name: getattr(self, name) for name in SweepSpec.model_fields})

    def identity(self, run: RunSpec) -> dict[str, Any]:
        """What defines a run's result beside its own fields and the pairs: what changes no more
        than rounding, such as micro_pairs, is not in it."""
        settings: dict[str, Any] = {"tune": self.tune, "dtype": self.dtype, "clip": self.clip}
        if self.tune == "lora":
            settings["lora"] = self.lora.model_dump(mode="json")
        if run.bsr and self.bsr_scope == "micro":
            settings["bsr_scope"] = self.bsr_scope
            settings["micro_pairs"] = self.micro_pairs
        return {"finetune": settings}


def check_fits(run: FinetuneRun, tune: Tune, where: str) -> None:
    """Raises: UserError when `run`, read from `where`, asks for what cannot be tuned so."""
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
            run.learner is not None,
            f"learner = {str(run.learner)!r}",
            "embrm sweep fits it to frozen states; remove it here",
        ),
    ]
    if regularizer is not None:
        kind, of_grm = f"regularizer {regularizer.kind!r}", regularizer.kind in GRM
        still = "acts on states that move: set tune = 'full' or 'lora', or sweep it with an adapter"
        wrong += [
            (not of_grm, kind, "is made for frozen states: embrm sweep trains it"),
            (frozen, kind, still),
        ]
        wrong += [
            (
                getattr(regularizer, field) != type(regularizer).model_fields[field].default,
                f"regularizer.{field} = {getattr(regularizer, field)!r}",
                "a fine-tune reads every token and the whole vocabulary: remove it",
            )
            for field in ("token_rows", "top_k")
        ]
    for refused, found, remedy in wrong:
        if refused:
            raise UserError(f"{where}: {found} with tune = {tune!r}: {remedy}")


def micro_pairs(spec: FinetuneSpec, run: RunSpec, processes: int, where: str) -> int:
    """Pairs of a forward step on each of so many processes.

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
