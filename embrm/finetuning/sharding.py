"""Weights sharded over several devices by accelerate: which ways a fine-tune supports."""

import os
from collections.abc import Mapping

from accelerate.utils import parse_flag_from_env

from embrm.core.errors import UserError
from embrm.finetuning.spec import FinetuneRun, Tune

_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""Ways of accelerate beside FSDP, by the environment variable that switches each on."""


def check_sharding(runs: Mapping[str, FinetuneRun], tune: Tune, where: str) -> None:
    """Refuse a launch under which these runs, by name, cannot be trained.

    Raises: UserError when accelerate was told to shard weights in an unsupported way.
    """
    for variable, kind in _UNSUPPORTED.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"{where}: with {kind} a fine-tune cannot read whole weights and float32 inputs: "
                "launch it with --use_fsdp --fsdp_version 2, or without"
            )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    version, wrapped = os.environ.get("FSDP_VERSION", "1"), os.environ.get("FSDP_AUTO_WRAP_POLICY")
    if version != "2":
        raise UserError(
            f"{where}: fsdp_version = {version}: it flattens the weights that a head is made of: "
            "launch it with --fsdp_version 2"
        )
    if wrapped == "SIZE_BASED_WRAP":
        raise UserError(
            f"{where}: fsdp_auto_wrap_policy = {wrapped!r} may part the head from its weights: "
            "launch it with TRANSFORMER_BASED_WRAP"
        )
    if tune == "lora":
        raise UserError(
            f"{where}: tune = 'lora' with FSDP: adapters are merged from whole weights: launch it "
            "without"
        )
    for name, run in runs.items():
        if run.metarm is not None:
            raise UserError(
                f"{where}: run {name!r}: metarm with FSDP: it looks ahead by whole weights: "
                "launch it without"
            )


def read_everywhere() -> None:
    """Make every process load the base model's weights.

    By default accelerate lets the first process load them and gives the others random ones. Here
    every process checks and scores with a model of its own.
    """
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
