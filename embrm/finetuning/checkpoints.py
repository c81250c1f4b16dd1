"""Checkpoints of a run: which of them are complete, and the removal of those that are superseded.

transformers writes a checkpoint as a folder of several files. A marker file is written last, so
that a folder without it, left by a process that was killed, is never resumed from.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from embrm.core.files import write_bytes
from embrm.core.specs import canonical_json

_MARKER = "embrm.json"


def mark_complete(checkpoint: Path, progress: dict[str, Any]) -> None:
    """Write the marker of a complete checkpoint, with the run's own progress in it."""
    write_bytes(checkpoint / _MARKER, canonical_json(progress).encode())


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return what `mark_complete` wrote."""
    progress: dict[str, Any] = json.loads((checkpoint / _MARKER).read_bytes())
    return progress


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None if there is none."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{_MARKER}")]
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """Return the step after which a checkpoint was written; 0 for None."""
    return 0 if checkpoint is None else int(checkpoint.name.partition("-")[2])


def remove_superseded(folder: Path, checkpoint: Path, best: str) -> None:
    """Remove all checkpoints but `checkpoint`, and all best weights but those named `best`."""
    for path in folder.iterdir():
        superseded = path.name.startswith("best-") and path.stem != best
        if superseded or (path.name.startswith("checkpoint-") and path != checkpoint):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        # The marker goes first: a folder that is only half removed must not look complete.
        (path / _MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink()
