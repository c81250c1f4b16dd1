"""Names of the published benchmarks that embrm can read and score."""

from embrm.suites import (
    hhh,
    judge_bench,
    mt_bench,
    ppe_best_of_k,
    ppe_correctness,
    ppe_human,
    reward_bench,
    reward_bench_2,
    rm_bench,
)
from embrm.suites.suite import Suite

MODULES = (
    *(reward_bench, reward_bench_2, rm_bench, judge_bench, hhh, mt_bench),
    *(ppe_human, ppe_correctness, ppe_best_of_k),
)
"""One module per benchmark; each defines `SUITE`."""

SUITES: dict[str, Suite] = {module.SUITE.name: module.SUITE for module in MODULES}
