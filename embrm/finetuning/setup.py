"""The set-up of one run: its model, data, loss and trainer from the inputs of the fine-tune."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import TrainingArguments

from embrm.cache.tensors import torch_dtype
from embrm.core.errors import UserError
from embrm.core.progress import Progress
from embrm.finetuning.batches import Minibatches, PairTokens
from embrm.finetuning.dropout import ViewMasks
from embrm.finetuning.inputs import FinetuneInputs
from embrm.finetuning.losses import StepLoss
from embrm.finetuning.meta import UnlabelledGroups
from embrm.finetuning.model import RewardModel, new_model
from embrm.finetuning.spec import FinetuneRun, FinetuneSpec, micro_pairs
from embrm.finetuning.trainer import RewardTrainer, Validation
from embrm.training.order import Order
from embrm.training.pairs import Pairs
from embrm.training.row_store import RowStore

SaveBest = Callable[[int, dict[str, Tensor]], None]
"""Stores the weights of an epoch, given its number and the tensors."""


@contextmanager
def out_of_memory(when: str, *remedies: str) -> Iterator[None]:
    """Turn torch's out-of-memory error into one line that names what may help."""
    try:
        yield
    except torch.OutOfMemoryError:
        listed = ", or ".join([*remedies, "take a larger GPU"])
        raise UserError(f"out of memory {when}: {listed}; the last checkpoint is kept") from None


def memory_remedies(spec: FinetuneSpec, micro: int) -> list[str]:
    """Return the settings of `spec` that would make a step of `micro` pairs need less memory."""
    remedies = {
        "lower it": micro > 1,
        "set gradient_checkpointing = true": not spec.gradient_checkpointing,
        "set tune = 'lora'": spec.tune == "full",
    }
    return [remedy for remedy, possible in remedies.items() if possible]


def micro_pairs_of(inputs: FinetuneInputs, run: FinetuneRun) -> int:
    """Return how many pairs a forward step of the run has on each of the running processes."""
    return micro_pairs(inputs.spec, run, PartialState().num_processes, inputs.where)


def build_trainer(
    inputs: FinetuneInputs,
    run: FinetuneRun,
    pairs: Pairs,
    validation: Validation,
    folder: Path,
    *,
    device: str,
    save_best: SaveBest,
    bar: Progress | None,
) -> RewardTrainer:
    """Build the trainer of `run` on its training pairs; it writes checkpoints to `folder`.

    device: cpu, cuda or mps.
    Raises: UserError when the device has no room for the weights, or the model has no place for
    SimCSE's dropout.
    """
    spec = inputs.spec
    batch, micro = min(run.batch_pairs, len(pairs)), micro_pairs_of(inputs, run)
    minibatches = _minibatches(inputs, run, pairs, batch, micro)
    regularizer = run.active_regularizer
    model = new_model(
        inputs.base_model(),
        run.head,
        run.seed,
        spec.tune,
        spec.lora,
        with_S=regularizer is not None,
    )
    S = torch.from_numpy(inputs.cache.responses["S"].to_numpy().astype(np.float32))
    data = PairTokens(inputs.texts.encoded, pairs, regularizer, S, _view_masks(run, model))
    loss = StepLoss(
        run,
        batch,
        soft_labels=bool((pairs.label != 1).any()),
        mean_over=micro if spec.bsr_scope == "micro" else None,
    )
    groups = None
    if run.metarm is not None:
        groups = UnlabelledGroups(run.metarm, inputs.unlabelled_groups(run), run.seed)
    args = _training_arguments(
        spec,
        run,
        folder,
        device,
        steps=-(-len(pairs) // batch),
        micro=micro,
        accumulation=minibatches.turns,
    )
    # The trainer moves the weights, which are always float32, to the device.
    with out_of_memory("with the weights alone, which nothing in the spec makes smaller"):
        return RewardTrainer(
            model,
            args,
            run=run,
            train_dataset=data,
            minibatches=minibatches,
            loss=loss,
            validation=validation,
            dtype=getattr(torch, spec.dtype),
            save_best=save_best,
            bar=bar,
            groups=groups,
        )


def _minibatches(
    inputs: FinetuneInputs, run: FinetuneRun, pairs: Pairs, batch: int, micro: int
) -> Minibatches:
    """The sweep's minibatches of `batch` pairs, in this process's micro-batches."""
    cache, processes = inputs.cache, PartialState()
    # The sweep's order depends on the size of a state, but reads no state.
    states = RowStore(torch.empty(0, cache.width, dtype=torch_dtype(cache)))
    lengths = torch.from_numpy(inputs.texts.lengths)
    longer = torch.maximum(lengths[pairs.chosen], lengths[pairs.rejected])
    return Minibatches(
        pairs,
        Order(pairs.chosen, states, run.seed),
        run.head,
        run.seed,
        batch=batch,
        micro=micro,
        process=processes.process_index,
        processes=processes.num_processes,
        # Where r̄ is the mean of a micro-batch, its pairs must not be chosen by their lengths.
        lengths=longer if inputs.spec.bsr_scope == "batch" else None,
    )


def _view_masks(run: FinetuneRun, model: RewardModel) -> ViewMasks | None:
    if run.simcse is None:
        return None
    if not model.sites:
        raise UserError(
            "simcse: the model's layers are not transformers' own, and there is nowhere to drop: "
            "remove it"
        )
    width = model.backbone.config.get_text_config().hidden_size
    return ViewMasks(run.seed, model.sites, width, run.simcse.dropout)


def _training_arguments(
    spec: FinetuneSpec,
    run: FinetuneRun,
    folder: Path,
    device: str,
    *,
    steps: int,
    micro: int,
    accumulation: int,
) -> TrainingArguments:
    """Arguments of transformers' Trainer. steps: minibatches of an epoch."""
    # accelerate launch sets this variable to its own default, and a Trainer in float32 follows it.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if spec.dtype == "bfloat16" else "no"
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=run.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        seed=run.seed % 2**32,
        use_cpu=device == "cpu",
        bf16=spec.dtype == "bfloat16",
        gradient_checkpointing=spec.gradient_checkpointing,
        max_grad_norm=spec.clip,
        # A callback of `RewardTrainer` says when to evaluate and when to save.
        eval_strategy="no",
        save_strategy="no",
        eval_steps=steps,
        save_steps=spec.save_steps,
        logging_strategy="steps" if spec.report_to else "no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[*spec.report_to] or "none",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
    )
    # Several GPUs serve several processes; by default the Trainer would share them among threads
    # of one process.
    args._n_gpu = min(args.n_gpu, 1)
    return args
