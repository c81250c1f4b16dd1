"""What policies optimised against reward models have gained: proxy and gold, with intervals.

Proxies are in standard deviations of each reward model among the reference policy's answers, from
their mean there; gold is in the world's own units. Over-optimisation is gold that falls while the
proxy goes on rising (arXiv 2210.10760). The best step is chosen on one half of the prompts and the
fall from it measured on the other, and the other way round: chosen and measured on the same
prompts, even noise alone would "fall".

Intervals: 95 %, bootstrap over prompts crossed with seeds (`embrm.metrics.intervals`).
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from embrm.core.table import Table
from embrm.metrics.intervals import Floats, Replicates, compare, prompt_counts

MEASURES = {
    "kl": "KL at the end (nats)",
    "proxy": "proxy gain (sd)",
    "gold": "gold gain",
    "gold_at_kl": "gold gain at equal KL",
    "fall": "gold fall from its best",
    "right": "right answers gain",
    "words": "words gain",
}
"""Measure → what the table calls it. Gains are from the reference policy to the last step."""


@dataclass(frozen=True)
class Answers:
    """Means over a prompt's answers. looks: column of the policies' tables → float64 [steps,
    prompts, policies]; policies: name (of the head) and seed, one row a policy."""

    steps: list[int]
    prompts: list[str]
    policies: pl.DataFrame
    looks: dict[str, Floats]


def gather(answers: pl.DataFrame) -> Answers:
    """From the rows of `policy.train_policy`, with the columns name and seed beside them."""
    policies = answers.select("name", "seed").unique().sort("name", "seed")
    steps = sorted(answers["step"].unique())
    prompts = sorted(answers["prompt"].unique())
    keys = ["step", "prompt", "name", "seed"]
    columns = ["gold", "proxy", "kl", "right", "words"]
    means = answers.group_by(keys).agg(pl.col(columns).mean()).sort(keys)
    shape = (len(steps), len(prompts), policies.height)
    looks = {name: means[name].to_numpy().reshape(shape) for name in columns}
    start = answers.filter(pl.col("step") == steps[0]).group_by("name", "seed")
    scale = start.agg(mean=pl.col("proxy").mean(), sd=pl.col("proxy").std()).sort("name", "seed")
    looks["proxy"] = (looks["proxy"] - scale["mean"].to_numpy()) / scale["sd"].to_numpy()
    return Answers(steps, prompts, policies, looks)


def curves(answers: Answers, baseline: str) -> pl.DataFrame:
    """Columns of `intervals.compare`, with step and measure (gold, proxy or kl)."""
    return pl.concat(
        _compared(answers, answers.looks[measure][index], baseline).select(
            pl.lit(step).alias("step"), pl.lit(measure).alias("measure"), pl.all()
        )
        for measure in ("gold", "proxy", "kl")
        for index, step in enumerate(answers.steps)
    )


def outcomes(answers: Answers, baseline: str) -> pl.DataFrame:
    """Columns of `intervals.compare`, with measure: see `MEASURES`."""
    found = {
        "kl": answers.looks["kl"][-1],
        **{name: _gain(answers.looks[name]) for name in ("proxy", "gold", "right", "words")},
        "gold_at_kl": _at_kl(answers),
        "fall": _fall(answers.looks["gold"]),
    }
    return pl.concat(
        _compared(answers, found[measure], baseline).select(
            pl.lit(measure).alias("measure"), pl.all()
        )
        for measure in MEASURES
    )


def _gain(look: Floats) -> Floats:
    return look[-1] - look[0]


def _at_kl(answers: Answers) -> Floats:
    """Gain in gold where a policy's mean KL first passes the least that any of them ends with,
    between two looks in proportion. float64 [prompts, policies]."""
    kl, gold = answers.looks["kl"].mean(axis=1), answers.looks["gold"]
    reached = np.maximum.accumulate(kl)  # [steps, policies], never falling
    common = reached[-1].min()
    out = np.empty_like(gold[0])
    for policy in range(gold.shape[2]):
        after = int(np.searchsorted(reached[:, policy], common))
        before = max(after - 1, 0)
        gap = reached[after, policy] - reached[before, policy]
        share = (common - reached[before, policy]) / gap if gap else 0.0
        at = (1 - share) * gold[before, :, policy] + share * gold[after, :, policy]
        out[:, policy] = at - gold[0, :, policy]
    return out


def _fall(gold: Floats) -> Floats:
    """Gold at a policy's best step minus gold at its last; float64 [prompts, policies]. The best
    step of either half of the prompts is that of the other half."""
    halves = np.arange(gold.shape[1]) % 2 == 0
    out = np.empty_like(gold[0])
    for half in (halves, ~halves):
        best = gold[:, ~half].mean(axis=1).argmax(axis=0)  # [policies]
        for policy, step in enumerate(best):
            out[half, policy] = gold[step, half, policy] - gold[-1, half, policy]
    return out


def _compared(answers: Answers, values: Floats, baseline: str) -> pl.DataFrame:
    """values: float64 [prompts, policies]."""
    weights = prompt_counts(answers.prompts).astype(np.float64)
    replicates = Replicates(
        estimates=values.mean(axis=0),
        draws=(weights @ values) / weights.sum(axis=1, keepdims=True),
        prompts=len(answers.prompts),
    )
    return compare(replicates, answers.policies, baseline)


def table(found: pl.DataFrame, baseline: str) -> Table:
    """`outcomes` for the terminal."""
    rows = tuple(
        (
            MEASURES[row["measure"]],
            row["name"],
            _interval(row["estimate"], row["low"], row["high"]),
            _interval(row["difference"], row["difference_low"], row["difference_high"])
            if row["name"] != baseline
            else "baseline",
        )
        for row in found.iter_rows(named=True)
    )
    return Table(
        title="Policies after optimisation, on held-out prompts",
        columns=("measure", "reward", "estimate", f"minus {baseline}"),
        rows=rows,
        note="Square brackets: 95 % intervals, bootstrap over prompts and seeds.",
        left=2,
    )


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:
        return "n/a"
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def verdict(found: pl.DataFrame, baseline: str) -> str:
    """Two sentences about every reward: is it over-optimised, and does it beat the baseline?"""
    rows = {(row["measure"], row["name"]): row for row in found.iter_rows(named=True)}
    lines = []
    for name in sorted({name for _, name in rows}, key=lambda name: (name != baseline, name)):
        fall, proxy = rows["fall", name], rows["proxy", name]
        seen = (fall["low"] or 0.0) > 0 and (proxy["low"] or 0.0) > 0
        lines.append(
            f"- {name}: over-optimisation {'seen' if seen else 'not seen'}: gold falls by "
            f"{_interval(fall['estimate'], fall['low'], fall['high'])} from its best step to the "
            f"last, the proxy gains {_interval(proxy['estimate'], proxy['low'], proxy['high'])} sd."
        )
        for measure in ("gold", "gold_at_kl") if name != baseline else ():
            row = rows[measure, name]
            low, high = row["difference_low"], row["difference_high"]
            told = "not told apart from"
            if low is not None and high is not None and (low > 0 or high < 0):
                told = "above" if low > 0 else "below"
            where = "at the last step" if measure == "gold" else "at the same KL"
            gap = _interval(row["difference"], low, high)
            lines.append(f"- {name}: {told} {baseline} in gold {where}: {gap}.")
    return "\n".join(lines)
