"""How proxy and gold reward change while policies are optimised, with intervals.

Proxy rewards are standardised: for each reward model, by the mean and standard deviation of its
rewards of the reference policy's answers. Gold rewards are in the world's own units.
Over-optimisation is a gold reward that falls while the proxy keeps rising (arXiv 2210.10760).
Its size is measured by cross-fitting: the best step is chosen on one half of the prompts and the
fall from it is measured on the other half, and vice versa. Choosing and measuring on the same
prompts would show a fall even for pure noise.

Intervals are 95 % bootstrap intervals over prompts and seeds (`embrm.metrics.intervals`).
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from embrm.core.drawing import BLACK, CURVES, drawn, new_figure, short_name
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
"""Each measure and its name in the table. Gains are from the reference policy to the last step."""


@dataclass(frozen=True)
class PolicyCurves:
    """Means over each prompt's answers at every evaluated step.

    policies: one row a policy, with the name of its reward head and its seed. values: one float64
    array [steps, prompts, policies] for each of gold, proxy, kl, right and words.
    """

    steps: list[int]
    prompts: list[str]
    policies: pl.DataFrame
    values: dict[str, Floats]


def policy_curves(answers: pl.DataFrame) -> PolicyCurves:
    """Average the rows of `policy.train_policy`, which have the added columns name and seed."""
    policies = answers.select("name", "seed").unique().sort("name", "seed")
    steps = sorted(answers["step"].unique())
    prompts = sorted(answers["prompt"].unique())
    keys = ["step", "prompt", "name", "seed"]
    columns = ["gold", "proxy", "kl", "right", "words"]
    means = answers.group_by(keys).agg(pl.col(columns).mean()).sort(keys)
    shape = (len(steps), len(prompts), policies.height)
    values = {name: means[name].to_numpy().reshape(shape) for name in columns}
    start = answers.filter(pl.col("step") == steps[0]).group_by("name", "seed")
    scale = start.agg(mean=pl.col("proxy").mean(), sd=pl.col("proxy").std()).sort("name", "seed")
    values["proxy"] = (values["proxy"] - scale["mean"].to_numpy()) / scale["sd"].to_numpy()
    return PolicyCurves(steps, prompts, policies, values)


def curves(measured: PolicyCurves, baseline: str) -> pl.DataFrame:
    """Compare the reward heads at every step, in gold, proxy and KL.

    Returns the columns of `intervals.compare`, preceded by step and measure.
    """
    return pl.concat(
        _compared(measured, measured.values[measure][index], baseline).select(
            pl.lit(step).alias("step"), pl.lit(measure).alias("measure"), pl.all()
        )
        for measure in ("gold", "proxy", "kl")
        for index, step in enumerate(measured.steps)
    )


def outcomes(measured: PolicyCurves, baseline: str) -> pl.DataFrame:
    """Compare the reward heads in every measure of `MEASURES`.

    Returns the columns of `intervals.compare`, preceded by measure.
    """
    found = {
        "kl": measured.values["kl"][-1],
        **{name: _gain(measured.values[name]) for name in ("proxy", "gold", "right", "words")},
        "gold_at_kl": _gold_at_equal_kl(measured),
        "fall": _fall(measured.values["gold"]),
    }
    return pl.concat(
        _compared(measured, found[measure], baseline).select(
            pl.lit(measure).alias("measure"), pl.all()
        )
        for measure in MEASURES
    )


def _gain(values: Floats) -> Floats:
    return values[-1] - values[0]


def _gold_at_equal_kl(measured: PolicyCurves) -> Floats:
    """Gain in gold at the largest KL that every policy reaches, float64 [prompts, policies].

    Between two evaluated steps, gold is interpolated linearly in the policy's mean KL.
    """
    kl, gold = measured.values["kl"].mean(axis=1), measured.values["gold"]
    reached = np.maximum.accumulate(kl)  # [steps, policies], never decreasing
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
    """Gold at a policy's best step minus gold at its last, float64 [prompts, policies].

    The best step for each half of the prompts is chosen on the other half.
    """
    halves = np.arange(gold.shape[1]) % 2 == 0
    out = np.empty_like(gold[0])
    for half in (halves, ~halves):
        best = gold[:, ~half].mean(axis=1).argmax(axis=0)  # [policies]
        for policy, step in enumerate(best):
            out[half, policy] = gold[step, half, policy] - gold[-1, half, policy]
    return out


def _compared(measured: PolicyCurves, values: Floats, baseline: str) -> pl.DataFrame:
    """Intervals of one measure. values: float64 [prompts, policies]."""
    weights = prompt_counts(measured.prompts).astype(np.float64)
    replicates = Replicates(
        estimates=values.mean(axis=0),
        draws=(weights @ values) / weights.sum(axis=1, keepdims=True),
        prompts=len(measured.prompts),
    )
    return compare(replicates, measured.policies, baseline)


def table(found: pl.DataFrame, baseline: str) -> Table:
    """The table of `outcomes`."""
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
    """Say of every reward head whether it was over-optimised and whether it beats the baseline."""
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
            told = "not distinguishable from"
            if low is not None and high is not None and (low > 0 or high < 0):
                told = "above" if low > 0 else "below"
            where = "at the last step" if measure == "gold" else "at the same KL"
            gap = _interval(row["difference"], low, high)
            lines.append(f"- {name}: {told} {baseline} in gold {where}: {gap}.")
    return "\n".join(lines)


def policy_figures(by_step: pl.DataFrame, baseline: str) -> dict[str, bytes]:
    """Draw gold and proxy reward against √KL, one line per reward head; file name → content.

    by_step: the result of `curves`.
    """
    return drawn({"overoptimisation": lambda: _draw(by_step, baseline)})


def _draw(by_step: pl.DataFrame, baseline: str) -> Figure:
    names = sorted(by_step["name"].unique(), key=lambda name: (name != baseline, name))
    titles = {"gold": "Gold reward", "proxy": "Proxy reward (sd of the reference's)"}
    figure, axes = new_figure(3.0, len(titles))
    for axis, (measure, title) in zip(axes, titles.items(), strict=True):
        colors = iter(CURVES)
        for name in names:
            is_baseline = name == baseline
            color = BLACK if is_baseline else next(colors)
            own = by_step.filter(pl.col("name") == name).sort("step")
            kl = own.filter(pl.col("measure") == "kl")["estimate"].to_numpy()
            rewards = own.filter(pl.col("measure") == measure).drop_nulls("estimate")
            x = np.sqrt(np.maximum(kl, 0.0))
            axis.plot(
                x,
                rewards["estimate"].to_numpy(),
                "D" if is_baseline else "o",
                linestyle=(0, (4, 2)) if is_baseline else "-",
                color=color,
                markersize=3.5,
                linewidth=1.5,
                label=short_name(name),
            )
            low, high = (rewards[column].to_numpy() for column in ("low", "high"))
            axis.vlines(x, low, high, color=color, alpha=0.5, lw=1.0)
        axis.set_title(title)
        axis.set_xlabel("√KL to the reference (√nats)")
        axis.grid()
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
    return figure
