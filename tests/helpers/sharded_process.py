"""A process of a fine-tune whose weights accelerate shards, stopped in a step and started again.

accelerate shards on GPUs alone, though torch does on a CPU too: here it takes one for the other.
"""

import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from embrm.finetuning.run import finetune
from embrm.finetuning.trainer import RewardTrainer

STOPS = {2: "SHARDED_STATE_DICT", 5: "FULL_STATE_DICT", 7: "FULL_STATE_DICT"}
"""In the steps begun so far, counted from 1 over two runs of three steps with a checkpoint each: in
the second of the first run, and in the first and then the second of the other. With the layout of
the checkpoints from there on."""


class StoppedError(Exception):
    pass


def _as_on_gpus() -> None:
    begin = PartialState.__init__

    def changed(self: PartialState, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = changed  # type: ignore[method-assign]


def _stopping() -> None:
    end_step, steps = RewardTrainer.end_step, 0

    def changed(self: RewardTrainer) -> None:
        nonlocal steps
        steps += 1
        assert all(isinstance(own, DTensor) for own in self.model.parameters())
        assert all(isinstance(layer, FSDPModule) for layer in self.model.backbone.layers)
        if steps in STOPS:
            os.environ["FSDP_STATE_DICT_TYPE"] = STOPS[steps]
            raise StoppedError
        end_step(self)

    RewardTrainer.end_step = changed  # type: ignore[method-assign]


def main(spec: Path, cache: Path) -> None:
    _as_on_gpus()
    _stopping()
    os.environ["FSDP_STATE_DICT_TYPE"] = STOPS[min(STOPS)]
    for _ in STOPS:
        try:
            finetune(spec, cache, device="cpu")
        except StoppedError:
            continue
        raise AssertionError("not stopped")
    finetune(spec, cache, device="cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
