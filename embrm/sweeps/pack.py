"""A pack: runs that are trained together."""

from dataclasses import dataclass

from embrm.core.specs import content_id
from embrm.sweeps.spec import Run


@dataclass(frozen=True)
class Pack:
    """Runs that are trained together, with equal state, pairs and `TrainSpec.pack_key`."""

    runs: tuple[Run, ...]

    @property
    def pack_id(self) -> str:
        """The name of the folder with its part of the results."""
        return content_id([run.run_id for run in self.runs])
