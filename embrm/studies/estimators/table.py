"""Show the errors of the regularizers' estimators: tables, recommended settings and advice."""

from typing import Literal

from embrm.core.table import Table
from embrm.studies.estimators.measure import EstimatorErrors
from embrm.training.regularizers import WHOLE_VOCABULARY

_ROUNDING = 1e-9


def estimator_tables(errors: EstimatorErrors) -> tuple[Table, ...]:
    """Make the tables of the errors from truncating the vocabulary and from sampling token rows,
    and of the bias of grm-dpo."""
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
        *_bias_table(errors),
    )


def _bias_table(errors: EstimatorErrors) -> tuple[Table, ...]:
    if not errors.bias:
        return ()
    rows = tuple(
        (
            f"{entry.drift:g}",
            f"{entry.token_rows:,}",
            entry.estimator,
            _short(entry.loss),
            _short(entry.gradient),
            _short(entry.gradient_error),
            "right" if entry.sign_agrees else "wrong",
        )
        for entry in errors.bias
    )
    kind = "random pairs of responses" if errors.random_pairs else "training pairs"
    return (
        Table(
            "token_rows: bias of grm-dpo (β = 0.1) from reading some of a response's positions",
            ("drift", "token_rows", "estimator", "loss bias", "gradient bias", "±", "sign"),
            rows,
            f"Over {errors.pairs:,} {kind}, one minibatch. Responses of about "
            f"{errors.positions:.0f} positions, which repeat the cached rows. loss bias: mean "
            "estimate - exact value, in nats. gradient bias: that of the derivative in the scale "
            "of the shift, relative to the exact one; ±: its standard error; sign: whether "
            "the estimated derivative has that of the exact one with every adapter.",
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
        f"grm-dpo: token_rows = {_dpo_setting(errors)}",
        f"preserve-*: top_k = {_setting(errors.preserve_top_k, advice(errors, 'preserve'))}",
    ]


def _setting(top_k: int | None, otherwise: str) -> str:
    return f"none cached: {otherwise}" if top_k is None else f"{top_k:,}"


def _dpo_setting(errors: EstimatorErrors) -> str:
    if errors.dpo_token_rows is not None:
        # The bias at all cached rows vanishes only where every position is cached.
        partly = (errors.bias[-1].gradient or 0) > _ROUNDING
        rest = "; the cache lacks positions, which makes the bias look smaller" if partly else ""
        return f"{errors.dpo_token_rows:,}, empirical-bayes{rest}"
    if not errors.bias:
        return "none: a bias needs two responses with token rows: raise --sample"
    found = [e for e in errors.bias if e.estimator == "empirical-bayes"]
    if not found:
        return (
            "none: one cached row says nothing of how positions differ: extract with more "
            "--token-rows"
        )
    last = found[-1]
    sign = "" if last.sign_agrees else " of the wrong sign"
    return (
        "none: grm-dpo cannot be trusted on this cache at this drift (gradient bias "
        f"{_short(last.gradient)}{sign} at all {last.token_rows:,} rows of about "
        f"{errors.positions:.0f}): extract with more --token-rows"
    )


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
