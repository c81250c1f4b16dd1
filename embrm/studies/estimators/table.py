"""Show the errors of the regularizers' estimators: tables, recommended settings and advice."""

from typing import Literal

from embrm.core.table import Table
from embrm.studies.estimators.measure import EstimatorErrors
from embrm.training.regularizers import WHOLE_VOCABULARY


def estimator_tables(errors: EstimatorErrors) -> tuple[Table, Table]:
    """Make the tables of the errors from truncating the vocabulary and from sampling token rows."""
    truncation = tuple(
        (
            f"{entry.drift:g}",
            f"{entry.top_k:,}",
            "yes" if entry.tail_mean else "no",
            *map(_short, (entry.tail, entry.tail_95, entry.tail_max)),
            *map(_short, (entry.change, entry.change_gradient, entry.kl, entry.kl_gradient)),
        )
        for entry in errors.truncation
    )
    sampling = tuple(
        (f"{entry.drift:g}", f"{entry.token_rows:,}", _short(entry.nats), _short(entry.relative))
        for entry in errors.sampling
    )
    columns = ("drift", "top_k", "tail mean", "tail", "95 %", "largest")
    measured = ("ℓ̃ - ℓ", "gradient", "KL", "its gradient")
    return (
        Table(
            "top_k: probability of the tail, and relative errors of ℓ̃ - ℓ, of KL and of gradients",
            columns + measured,
            truncation,
            "drift: mean ‖δ‖/‖h‖ of the shifts δ of the states h. tail: probability of the tokens "
            "that are not kept, its mean, 95th percentile and largest value over the rows. ℓ̃ - ℓ: "
            "change of the target's log-probability, then its gradient in δ. KL: KL(p ‖ p̃), then "
            "its gradient.",
        ),
        Table(
            "token_rows: standard error of a response's S̃ - S in one minibatch",
            ("drift", "token_rows", "nats", "relative"),
            sampling,
            "token_rows: positions read per response. relative: the error divided by the root mean "
            "square of S̃ - S.",
        ),
    )


def recommendations(errors: EstimatorErrors) -> list[str]:
    """The smallest settings within the target error, one per line, after a line on the sample."""
    error = errors.token_rows_error
    reached = error is not None and error <= errors.target
    rest = "" if reached else f", all cached: error {_short(error)}"
    return [
        f"{errors.responses:,} responses, {errors.rows:,} token rows, {errors.vocabulary:,} "
        f"tokens. For a relative error of {errors.target:g} at drift "
        f"{errors.truncation[-1].drift:g}:",
        f"grm-*: top_k = {_setting(errors.grm_top_k, advice(errors, 'grm'))}",
        f"grm-*: token_rows = {errors.token_rows}{rest}",
        f"preserve-*: top_k = {_setting(errors.preserve_top_k, advice(errors, 'preserve'))}",
    ]


def _setting(top_k: int | None, otherwise: str) -> str:
    return f"none cached: {otherwise}" if top_k is None else f"{top_k:,}"


def advice(errors: EstimatorErrors, regularizer: Literal["grm", "preserve"]) -> str:
    """A clause that says what to do if no cached top_k reaches the target for a regularizer.

    Tail means make ∂(ℓ̃ - ℓ)/∂δ exact at δ = 0, so they help "grm". They do not help ∂KL/∂δ
    ("preserve"), which vanishes at δ = 0 and whose first order in δ depends on the covariance of
    the tail.

    """

    mean_helps = regularizer == "grm" and not errors.tail_mean
    text = f"extract with {'--tail-mean or ' if mean_helps else ''}a larger --top-k"
    if errors.vocabulary <= WHOLE_VOCABULARY:
        text += f", or take 'all' {errors.vocabulary:,} tokens"
    return text


def _short(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2g}"
