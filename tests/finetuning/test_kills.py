"""Fine-tunes killed at their weakest moments and started again end with the same bytes.

A driver process imports what they need once and forks: one fork runs undisturbed, others kill
themselves where they are told to, the last one finishes.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_finetune import with_groups, written

SPECS = {
    "full": """
[defaults]
epochs = 2
batch_pairs = 8
lr = 0.003
[[runs]]
name = "bt"
head = { kind = "mlp", widths = [6], dropout = 0.3 }
""",
    "lora": """
[lora]
rank = 2
dropout = 0.2
[defaults]
epochs = 2
batch_pairs = 8
lr = 0.01
[[runs]]
name = "bt"
bsr = 0.3
regularizer = { kind = "grm-sft", alpha = 0.1, beta = 0.01 }
simcse = { dropout = 0.2 }
metarm = { split = "far", eta = 0.5, responses = 3 }
""",
}
FIELDS: dict[str, dict[str, object]] = {
    "full": {"save_steps": 2},
    "lora": {"save_steps": 2, "tune": "lora", "micro_pairs": 4},
}


def _kill_at(moment: str) -> None:
    """Have this process kill itself at the moment: before the call of a function, the nth."""
    from embrm.finetuning import checkpoints, finetuner, trainer

    name, _, number = moment.partition(":")
    owner, function = {
        "step": (trainer.RewardTrainer, "end_step"),
        "marker": (checkpoints, "write_bytes"),
        "rotation": (checkpoints, "_remove"),
        "best": (finetuner, "move_into_place"),
        "weights": (finetuner, "link_or_copy"),
        "part": (finetuner, "write_bytes"),
    }[name]
    called, wanted = 0, int(number)
    original: Callable[..., Any] = getattr(owner, function)

    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal called
        called += 1
        if called == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(owner, function, watched)


def _drive(root: Path, cache: Path) -> None:
    import torch

    from embrm.finetuning.run import finetune

    def fork(spec: Path, out: Path, moment: str) -> int:
        child = os.fork()
        if not child:
            if moment:
                _kill_at(moment)
            finetune(spec, cache, out=out, device="cpu")
            os._exit(0)
        return os.waitpid(child, 0)[1]

    assert torch.get_num_threads() == 1
    # Ten steps, five an epoch; a checkpoint after every second but the last. Killed before the
    # first epoch's weights have their name; in step 8; with checkpoint 8 incomplete; with 6 and 8
    # complete; in step 10; when all is trained; with half of the tables written.
    moments = {
        "full": ["best:1", "step:4", "marker:1", "rotation:1", "step:2", "weights:1", "part:2"],
        "lora": ["step:8"],
    }
    for name, text in SPECS.items():
        spec = written(root / f"{name}.toml", text, **FIELDS[name])
        assert fork(spec, root / f"{name}-whole", "") == 0
        ends = [fork(spec, root / f"{name}-killed", moment) for moment in (*moments[name], "")]
        assert ends == [signal.SIGKILL] * len(moments[name]) + [0], ends
        assert not (root / f"{name}-killed" / "checkpoints").exists()


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    cache = with_groups(root / "world")
    done = subprocess.run(
        [sys.executable, __file__, str(root), str(cache)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        },
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_killed_and_started_again_is_uninterrupted_to_the_bit(driven: Path, name: str) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (".lock", "timings.parquet", "sweep.json")
        }

    whole, killed = (content(driven / f"{name}-{kind}") for kind in ("whole", "killed"))
    assert any(path.startswith("weights/") for path in whole)
    assert whole == killed


if __name__ == "__main__":
    _drive(Path(sys.argv[1]), Path(sys.argv[2]))
