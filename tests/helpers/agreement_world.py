"""Two stages whose true means are known, to count how often the intervals of agreement cover them.

`python tests/helpers/agreement_world.py` prints the numbers of docs/methods.md.
"""

import numpy as np
import polars as pl

from embrm.metrics.agreement import Stage, agreement, bias, kendall, regret, slope, spearman
from embrm.metrics.intervals import Replicates

OF_PROMPTS = 0.4
"""Standard deviation over prompts of what is a configuration's own; what they share has as much."""
SIZES = ((8, (2, 2), 300), (11, (5, 2), 112), (16, (3, 2), 800))
"""Configurations; seeds of the frozen and of the full stage; prompts."""
APART, AGREE = (1.0, 3.0, 8.0), (1.0, 0.7, 0.0)


def coverage(
    configurations: int,
    seeds: tuple[int, int],
    prompts: int,
    *,
    apart: float,
    agree: float,
    trials: int,
    replicates: int = 400,
) -> dict[str, float]:
    """Share of the trials whose 95 % interval covers what the noise-free means have.

    seeds: of the frozen and of the full stage. In each trial true means of both are drawn anew, of
    correlation `agree` and of standard deviation `apart` times the noise of a full stage's mean,
    half of whose variance is of the prompts and half of the seeds; what a seed does to all
    configurations alike has three times its standard deviation.
    """
    random = np.random.default_rng(0)
    of_seeds = OF_PROMPTS * np.sqrt(seeds[1] / prompts)
    noise = OF_PROMPTS * np.sqrt(2 / prompts)
    hits: dict[str, int] = {}
    for _ in range(trials):
        x, other = apart * noise * random.normal(size=(2, configurations))
        y = agree * x + np.sqrt(1 - agree**2) * other
        gains = np.delete(x - x[0], 0), np.delete(y - y[0], 0)
        true = {
            "spearman": spearman(x, y),
            "kendall": kendall(x, y),
            "regret": regret(x, y),
            "slope": slope(*gains),
            "bias": bias(*gains),
        }
        weights = random.poisson(1, (replicates, prompts)).astype(float)
        alike = random.normal(size=(prompts, 1, 1))
        stages = []
        for name, means, many in zip(("frozen", "full"), (x, y), seeds, strict=True):
            luck = of_seeds * random.normal(size=(many, configurations))
            luck += 3 * of_seeds * random.normal(size=(many, 1))
            each = alike + random.normal(size=(prompts, 1, configurations))
            each = (means + luck + OF_PROMPTS * each).reshape(prompts, -1)
            drawn = weights @ each / weights.sum(1, keepdims=True)
            runs = pl.DataFrame(
                [(f"c{k}", seed) for seed in range(many) for k in range(configurations)],
                schema=["name", "seed"],
                orient="row",
            )
            found = Replicates(each.mean(0), drawn, prompts)
            names = [f"c{k}" for k in range(configurations)]
            stages.append(Stage.of(found, runs, names, "accuracy", name))
        for row in agreement(*stages, 0).iter_rows(named=True):
            if row["statistic"] in true:
                covered = row["low"] - 1e-9 <= true[row["statistic"]] <= row["high"] + 1e-9
                hits[row["statistic"]] = hits.get(row["statistic"], 0) + covered
    return {name: count / trials for name, count in hits.items()}


if __name__ == "__main__":
    for configurations, seeds, prompts in SIZES:
        for apart in APART:
            for agree in AGREE:
                shares = coverage(
                    configurations, seeds, prompts, apart=apart, agree=agree, trials=400
                )
                told = " | ".join(f"{100 * share:.0f}" for share in shares.values())
                size = f"{configurations} configurations, {prompts} prompts"
                print(f"{size} | {apart:g} | {agree:g} | {told}", flush=True)
