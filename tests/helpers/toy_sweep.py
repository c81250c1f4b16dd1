"""A sweep of a toy cache: Bradley-Terry with two seeds, and the runs that a test adds."""

from pathlib import Path

from embrm.sweeps.execute import sweep

SPEC = """
baseline = "bt"
seeds = [0, 1]
validation = 0.2
[defaults]
epochs = 2
[[runs]]
name = "bt"
"""

MEAN_STATE = """
[[runs]]
name = "mean state"
state = "mean"
"""


def toy_sweep(folder: Path, cache: Path, runs: str) -> Path:
    """The results folder of the sweep, below `folder`. runs: TOML of the runs beside "bt"."""
    path = folder / "one.toml"
    path.write_text(SPEC + runs)
    return sweep(path, cache, jobs=1)
