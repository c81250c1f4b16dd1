"""transformers' Trainer with the sweep's loss, order of pairs, optimizer and early stopping.

Everything else is the Trainer's own: devices, processes, FSDP, autocast, gradient accumulation and
checkpointing, clipping, checkpoints and trackers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from embrm.core.errors import UserError
from embrm.core.files import disk_errors
from embrm.core.progress import Progress
from embrm.finetuning.batches import Minibatches, PairTokens, pad_texts
from embrm.finetuning.checkpoints import (
    last_checkpoint,
    mark_complete,
    read_progress,
    remove_superseded,
)
from embrm.finetuning.contrast import Contrast, contrast, placed
from embrm.finetuning.inference import score_texts, sum_over_processes
from embrm.finetuning.losses import StepLoss
from embrm.finetuning.meta import UnlabelledGroups, discrimination
from embrm.finetuning.model import RewardModel
from embrm.finetuning.spec import FinetuneRun
from embrm.lm.tokens import Encoded
from embrm.training.adamw import rate
from embrm.training.curve import VALIDATION, TrainingCurve, validation_metrics
from embrm.training.pairs import Pairs


class NotFiniteError(UserError):
    """A loss, weight or reward of a run is not finite; its last checkpoint is kept."""


@dataclass(frozen=True)
class Validation:
    """The validation pairs, and the token ids of all responses, which their rows index."""

    pairs: Pairs
    encoded: Sequence[Encoded]


class RewardTrainer(Trainer):
    """Trains a `RewardModel` on `PairTokens` in the order of `Minibatches`."""

    loss_is_scaled_for_ga = True
    optimizer: Any
    lr_scheduler: Any
    control: TrainerControl

    def __init__(
        self,
        model: RewardModel,
        args: TrainingArguments,
        *,
        run: FinetuneRun,
        train_dataset: PairTokens,
        minibatches: Minibatches,
        loss: StepLoss,
        validation: Validation,
        dtype: torch.dtype,
        save_best: Callable[[int, dict[str, Tensor]], None],
        bar: Progress | None,
        groups: UnlabelledGroups | None = None,
    ) -> None:
        """save_best: stores an epoch's tensors; called on the main process only. groups: the
        responses that a run with metarm looks ahead on."""
        self._run, self._minibatches, self._loss = run, minibatches, loss
        self._validation, self._dtype, self._save_best = validation, dtype, save_best
        self.course = TrainingCurve(run)
        self._bar, self._groups = bar, groups
        # Of the current minibatch: this process's micro-batches; its mean reward and, with SimCSE,
        # its features; its number of pairs; (loss, R) of the micro-batches read so far.
        self._micro_batches: list[dict[str, Any]] = []
        self._whole: list[Tensor] = []
        self._size = 0
        self._losses: list[Tensor] = []
        # Sums of (loss, R) over the pairs of the current epoch.
        self._epoch = [0.0, 0.0]
        # With metarm, the weights before the look-ahead.
        self._weights_before: list[Tensor] = []
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, callbacks=[_Steps(self)]
        )
        self.remove_callback(PrinterCallback)
        if self.is_fsdp_enabled:
            # The plugin's policy would put weights and rewards in bfloat16; `_read` uses autocast.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    # What a step reads

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this process, whose batch sampler has taken its share already."""
        return _Loader(self.train_dataset, self._minibatches)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of a minibatch, and keep them for losses of the whole of it."""
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches, self._whole = found[0], []
        return found

    # What a step minimises

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """Return a micro-batch's part of the minibatch's loss, times the number of processes.

        The minibatch's gradient is the sum over processes, and the Trainer averages over them.
        """
        if self._groups is not None and not self._weights_before:
            self._look_ahead(self._groups)
        needs_whole = self._loss.needs_mean or self._run.simcse is not None
        if needs_whole and not self._whole and len(self._micro_batches) > 1:
            self._whole = [*map(sum_over_processes, self._read_minibatch(model))]
        r, S, squares, features = self._read(model, inputs["text"])
        share = inputs["share"]
        if needs_whole and not self._whole:
            self._whole = [*map(sum_over_processes, self._contribution(inputs, r, features))]
        loss, R = self._loss(
            r,
            S,
            squares,
            features,
            **inputs["pairs"],
            mean_reward=self._whole[0] if self._loss.needs_mean else None,
            contrast=self._contrast(inputs),
        )
        self._losses.append(share * torch.stack([loss.detach(), R]))
        self._size = inputs["size"]
        loss = share * loss * self.args.world_size
        return (loss, r) if return_outputs else loss

    def _read(self, model: torch.nn.Module, text: dict[str, Any]) -> Any:
        """`RewardModel.forward` under the run's autocast, which accelerate omits with FSDP."""
        dtype = self._dtype
        with torch.autocast(self.args.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return model(**text)

    def _read_minibatch(self, model: torch.nn.Module) -> list[Tensor]:
        """This process's part of `_whole`, by a forward step without gradients of every
        micro-batch."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        contributions = []
        # Forked, so that LoRA's dropout is the same when the micro-batches are trained on.
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for micro_batch in self._micro_batches:
                inputs = self._prepare_inputs(micro_batch)
                r, _, _, features = self._read(model, inputs["text"])
                contributions.append(self._contribution(inputs, r, features))
        return [sum(parts[1:], start=parts[0]) for parts in zip(*contributions, strict=True)]

    def _contribution(
        self, inputs: dict[str, Any], r: Tensor, features: Tensor | None
    ) -> list[Tensor]:
        """What a micro-batch adds to r̄ and, with SimCSE, to the features of its minibatch."""
        share = inputs["share"]
        found = [share * r.detach().mean()]
        if features is not None:
            # The pair of a micro-batch with share 0 stands in for none and contributes nothing.
            at_places = placed(features, inputs["within"]["places"], inputs["size"])
            found.append(at_places * (share > 0))
        return found

    def _contrast(self, inputs: dict[str, Any]) -> Contrast | None:
        """SimCSE's value and gradient for a micro-batch, from the features of its minibatch."""
        if self._run.simcse is None or not inputs["share"]:
            return None
        return contrast(self._run.simcse, self._whole[1], **inputs["within"], share=inputs["share"])

    # MetaRM, and the end of a step

    def _look_ahead(self, groups: UnlabelledGroups) -> None:
        """MetaRM's look-ahead θ → θ' = θ + η·∇J, until `end_step` restores θ.

        Each process reads some of the step's prompts.
        """
        parameters = self._trained_parameters()
        self._weights_before = [parameter.detach().clone() for parameter in parameters]
        gradient = [torch.zeros_like(parameter) for parameter in parameters]
        drawn = groups.draw(self.state.global_step)
        own = drawn[self.args.process_index :: self.args.world_size]
        # As many texts at a time as a micro-batch has, but at least all responses to one prompt.
        at_once = max(1, 2 * self.args.per_device_train_batch_size // drawn.shape[1])
        for first in range(0, len(own), at_once):
            some = own[first : first + at_once]
            found = pad_texts([self._validation.encoded[row] for row in some.flatten().tolist()])
            r = self._read(self.model, self._prepare_inputs(found))[0]
            J = discrimination(r.view(some.shape)).sum() / len(drawn)
            parts = torch.autograd.grad(J, parameters, allow_unused=True)
            for total, part in zip(gradient, parts, strict=True):
                if part is not None:
                    total += part
        with torch.no_grad():
            for parameter, total in zip(parameters, gradient, strict=True):
                parameter += groups.eta * sum_over_processes(total)

    def _trained_parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def end_step(self) -> None:
        """End a step after its gradients and before the optimizer's: restore the weights that
        MetaRM moved, and record the step's loss.

        Raises: NotFiniteError when the loss is not finite.
        """
        if self._weights_before:
            with torch.no_grad():
                for parameter, before in zip(
                    self._trained_parameters(), self._weights_before, strict=True
                ):
                    parameter.copy_(before)
            self._weights_before = []
        loss, R = sum_over_processes(torch.stack(self._losses).sum(0)).tolist()
        self._losses = []
        step = self.state.global_step + 1
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss of step {step} is not finite: lower lr or max_grad_norm, or raise "
                f"warmup; the last checkpoint is kept in {self.args.output_dir}"
            )
        self._epoch = [self._epoch[0] + loss * self._size, self._epoch[1] + R * self._size]
        if self._bar:
            self._bar.advance()

    # The sweep's optimizer and learning rate

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create AdamW. Weight decay acts on the whole head, as in a sweep, and on the backbone's
        weight matrices, but not on its norms and biases."""
        if self.optimizer is None:
            source = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(source))
            groups: dict[float, list[Tensor]] = {self._run.weight_decay: [], 0.0: []}
            for name, parameter in source.named_parameters():
                if parameter.requires_grad:
                    decays = name in decayed or ".head." in f".{name}"
                    groups[self._run.weight_decay if decays else 0.0].append(parameter)
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": group, "weight_decay": decay}
                    for decay, group in groups.items()
                    if group
                ],
                lr=self._run.lr,
                betas=self._run.betas,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Create the scheduler that gives the sweep's learning rate at every step."""
        if self.lr_scheduler is None:
            run = self._run
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: rate(run, step, num_training_steps) / run.lr,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # The end of an epoch

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate, store the weights if they are the best so far, and stop early if asked to."""
        pairs = self._validation.pairs
        epoch = len(self.course.curve) + 1
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": self.state.global_step,
            "train_loss": self._epoch[0] / len(self.train_dataset),
            "regularizer": self._epoch[1] / len(self.train_dataset)
            if self.course.regularized
            else None,
        }
        self._epoch = [0.0, 0.0]
        if len(pairs):
            rows, places = torch.cat([pairs.chosen, pairs.rejected]).unique(return_inverse=True)
            r = self.score(self._validation.encoded, rows.tolist())
            metrics = validation_metrics(torch.from_numpy(r)[None], pairs, *places.view(2, -1))
            row |= {name: values[0] for name, values in metrics.items()}
        else:
            row |= dict.fromkeys(VALIDATION)
        state = self.accelerator.get_state_dict(self.model_wrapped)
        # Sharded weights are gathered on the main process only.
        squares = [state[name].float().square().sum() for name in state if name.startswith("head.")]
        norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
        row["weight_norm"] = float(broadcast(norm.to(self.args.device)))
        if not all(map(math.isfinite, [row["weight_norm"], row["validation_nll"] or 0.0])):
            raise NotFiniteError(
                f"weights or rewards are not finite after epoch {epoch}: lower lr or "
                f"max_grad_norm; the last checkpoint is kept in {self.args.output_dir}"
            )
        self.course.end_epoch(row, {})
        if self.course.best_epoch == epoch and self.args.should_save:
            self._save_best(epoch, self.accelerator.unwrap_model(self.model).stored(state))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        if not self.course.active:
            self.control.should_training_stop = True
            self.control.should_save = False
        numbers = {f"eval_{name}": value for name, value in row.items() if value is not None}
        if self.args.report_to:
            self.log(dict(numbers))
        return numbers

    def score(self, encoded: Sequence[Encoded], rows: Sequence[int]) -> NDArray[np.float32]:
        """Return the rewards, float32 [rows], of these responses."""
        return score_texts(
            self.model,
            encoded,
            rows,
            dtype=self._dtype,
            device=self.args.device,
            process=self.args.process_index,
            processes=self.args.world_size,
        )

    # Checkpoints

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Save the trained weights only: the others are the base model's."""
        if state_dict is None and isinstance(self.model, RewardModel):
            trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
            state = self.model.state_dict()
            state_dict = {name: state[name] for name in state if name in trained}
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint of another model; weights that are not trained may be missing."""
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
        wrong = sorted(trained.intersection(load_result.missing_keys)) + load_result.unexpected_keys
        if wrong:
            raise UserError(
                f"{self.args.output_dir} holds a checkpoint of another model ({wrong[0]}): delete "
                "the folder"
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint as transformers does, mark it complete, and remove older ones."""
        folder = Path(str(self.args.output_dir))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        with disk_errors(checkpoint):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            progress = {
                "curve": self.course.curve,
                "epoch": self._epoch,
                "sharded": self.is_fsdp_enabled,
            }
            mark_complete(checkpoint, progress)
            remove_superseded(folder, checkpoint, self.best_name)

    @property
    def best_name(self) -> str:
        """Stem of the file with the weights of the best epoch so far."""
        return f"best-{self.course.best_epoch}"

    def resume(self) -> None:
        """Train to the end, from the last complete checkpoint if there is one.

        Raises: NotFiniteError for a loss, weight or reward that is not finite; UserError for a
        checkpoint that was written with FSDP and is resumed without, or the other way round.
        """
        last = last_checkpoint(Path(str(self.args.output_dir)))
        if last is not None:
            progress = read_progress(last)
            sharded = progress.get("sharded", False)  # absent from older checkpoints
            if sharded != self.is_fsdp_enabled:
                how = "with" if sharded else "without"
                raise UserError(
                    f"{last} was written {how} FSDP: launch it so again, or delete the folder"
                )
            for row in progress["curve"]:
                self.course.end_epoch(row, {})
            self._epoch = progress["epoch"]
        self.train(resume_from_checkpoint=None if last is None else str(last))


class _Steps(TrainerCallback):
    """Tells the Trainer when to validate and when to write a checkpoint."""

    def __init__(self, trainer: RewardTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer.end_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # The Trainer evaluates before it saves, so a resumed run does not miss an evaluation.
        control.should_evaluate = state.global_step % args.eval_steps == 0
        control.should_save = state.global_step % args.save_steps == 0


class _Loader(DataLoader[Any]):
    """Passes each item of the batch sampler to the data set's `__getitems__` as it is."""

    def __init__(self, data: PairTokens, minibatches: Minibatches) -> None:
        super().__init__(data, batch_sampler=minibatches, collate_fn=_unchanged)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to read next, from 0; the Trainer calls this before every epoch."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _unchanged(batch: Any) -> Any:
    return batch
