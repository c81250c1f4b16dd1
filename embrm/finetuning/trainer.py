"""transformers' Trainer with the sweep's loss, order, optimizer and early stopping.

Everything else is the Trainer's: devices, processes, accelerate's plugins (FSDP, DeepSpeed),
autocast, gradient accumulation and checkpointing, clipping, checkpoints, trackers.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast, reduce
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
from embrm.core.files import disk_errors, write_bytes
from embrm.core.progress import Progress
from embrm.core.specs import canonical_json
from embrm.extraction.engine import by_length
from embrm.finetuning.batches import Minibatches, PairTokens, texts
from embrm.finetuning.contrast import Contrast, contrast, placed
from embrm.finetuning.losses import StepLoss
from embrm.finetuning.meta import Groups, discrimination
from embrm.finetuning.model import RewardModel
from embrm.finetuning.spec import FinetuneRun
from embrm.lm.tokens import Encoded
from embrm.training.bank import VALIDATION, Course, rate, validation_metrics
from embrm.training.objectives import Pairs

_MARKER = "embrm.json"
"""Written last: a checkpoint without it counts for nothing."""

_SCORED_TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 8192}
"""Tokens of a batch that is only scored, padding included."""


class NotFiniteError(UserError):
    """A loss, weight or reward of a run was not: its last checkpoint is kept."""


@dataclass(frozen=True)
class Validation:
    """Pairs to validate on, and the texts of all responses."""

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
        groups: Groups | None = None,
    ) -> None:
        """save_best: keeps an epoch's tensors, told on the main process alone. groups: what a run
        with metarm looks ahead by."""
        self._run, self._minibatches, self._loss = run, minibatches, loss
        self._validation, self._dtype, self._save_best = validation, dtype, save_best
        self.course = Course(run)
        self._bar = bar
        self._waiting: list[dict[str, Any]] = []
        self._known: list[Tensor] = []
        self._groups = groups
        self._theta: list[Tensor] = []
        self._step: list[Tensor] = []
        self._epoch = [0.0, 0.0]
        self._size = 0
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, callbacks=[_Steps(self)]
        )
        self.remove_callback(PrinterCallback)
        if self.is_fsdp_enabled:
            # It would have weights, and the rewards too, in bfloat16. See `_read`.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    # What a step reads

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every process reads its own share of a minibatch; there is nothing to distribute."""
        return _Loader(self.train_dataset, self._minibatches)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a minibatch, which `compute_loss` may need to see together."""
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waiting, self._known = found[0], []
        return found

    # What a step minimises

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """A micro-batch's part of the loss, times the number of processes: gradients are averaged
        over them, and the minibatch's is their sum."""
        if self._groups is not None and not self._theta:
            self._look_ahead(self._groups)
        needed = self._loss.needs_mean or self._run.simcse is not None
        if needed and not self._known and len(self._waiting) > 1:
            self._known = [*map(summed, self._read_beforehand(model))]
        r, S, squares, features = self._read(model, inputs["text"])
        share = inputs["share"]
        if needed and not self._known:
            self._known = [*map(summed, self._seen(inputs, r, features))]
        loss, R = self._loss(
            r,
            S,
            squares,
            features,
            **inputs["pairs"],
            mean_reward=self._known[0] if self._loss.needs_mean else None,
            contrast=self._contrast(inputs),
        )
        self._step.append(share * torch.stack([loss.detach(), R]))
        self._size = inputs["size"]
        loss = share * loss * self.args.world_size
        return (loss, r) if return_outputs else loss

    def _read(self, model: torch.nn.Module, text: dict[str, Any]) -> Any:
        """What `RewardModel.forward` gives, in the run's arithmetic: accelerate leaves autocast out
        where it shards."""
        dtype = self._dtype
        with torch.autocast(self.args.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return model(**text)

    def _read_beforehand(self, model: torch.nn.Module) -> list[Tensor]:
        """Of the minibatch, by a forward step of all this process's micro-batches: see `_seen`."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        seen = []
        # Forked: LoRA's dropout shall fall alike when they are trained on.
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for waiting in self._waiting:
                inputs = self._prepare_inputs(waiting)
                r, _, _, features = self._read(model, inputs["text"])
                seen.append(self._seen(inputs, r, features))
        return [sum(parts[1:], start=parts[0]) for parts in zip(*seen, strict=True)]

    def _seen(self, inputs: dict[str, Any], r: Tensor, features: Tensor | None) -> list[Tensor]:
        """What a micro-batch adds to r̄ and, with SimCSE, to the features of its minibatch."""
        share = inputs["share"]
        found = [share * r.detach().mean()]
        if features is not None:
            # Nothing where a pair only stands in.
            there = placed(features, inputs["within"]["places"], inputs["size"])
            found.append(there * (share > 0))
        return found

    def _contrast(self, inputs: dict[str, Any]) -> Contrast | None:
        """SimCSE's part of a micro-batch, with the features of its minibatch known."""
        if self._run.simcse is None or not inputs["share"]:
            return None
        return contrast(self._run.simcse, self._known[1], **inputs["within"], share=inputs["share"])

    # Where a step takes its gradient

    def _look_ahead(self, groups: Groups) -> None:
        """MetaRM: θ → θ' = θ + η·∇J; `end_step` puts θ back. Every process reads some prompts."""
        parameters = [own for own in self.model.parameters() if own.requires_grad]
        self._theta = [own.detach().clone() for own in parameters]
        gradient = [torch.zeros_like(own) for own in parameters]
        drawn = groups.draw(self.state.global_step)
        own = drawn[self.args.process_index :: self.args.world_size]
        # No more texts at a time than of a micro-batch, but all of a prompt's.
        at_once = max(1, 2 * self.args.per_device_train_batch_size // drawn.shape[1])
        for first in range(0, len(own), at_once):
            some = own[first : first + at_once]
            found = texts([self._validation.encoded[row] for row in some.flatten().tolist()])
            r = self._read(self.model, self._prepare_inputs(found))[0]
            J = discrimination(r.view(some.shape)).sum() / len(drawn)
            parts = torch.autograd.grad(J, parameters, allow_unused=True)
            for total, part in zip(gradient, parts, strict=True):
                if part is not None:
                    total += part
        with torch.no_grad():
            for weight, total in zip(parameters, gradient, strict=True):
                weight += groups.eta * summed(total)

    def end_step(self) -> None:
        """Before the weights change: the step's loss. Raises: NotFiniteError."""
        if self._theta:
            trained = (own for own in self.model.parameters() if own.requires_grad)
            with torch.no_grad():
                for weight, was in zip(trained, self._theta, strict=True):
                    weight.copy_(was)
            self._theta = []
        loss, R = summed(torch.stack(self._step).sum(0)).tolist()
        self._step = []
        step = self.state.global_step + 1
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss of step {step} is not finite: lower lr or max_grad_norm, or raise "
                f"warmup; the last checkpoint is kept in {self.args.output_dir}"
            )
        self._epoch = [self._epoch[0] + loss * self._size, self._epoch[1] + R * self._size]
        if self._bar:
            self._bar.advance()

    # Optimizer and learning rate, as a sweep's

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW. A head decays whole; of a backbone norms and biases do not, as is usual."""
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
        """The sweep's learning rate of every step."""
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
        """Validate; keep the best weights, and stop early."""
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
        # Sharded weights are gathered on the main process alone.
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
        """Rewards float32 [rows] of these responses."""
        return scored(
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
        """Only what is trained: the rest is the base model's."""
        if state_dict is None and isinstance(self.model, RewardModel):
            trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
            state = self.model.state_dict()
            state_dict = {name: state[name] for name in state if name in trained}
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """What is not trained is not in a checkpoint."""
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
        wrong = sorted(trained.intersection(load_result.missing_keys)) + load_result.unexpected_keys
        if wrong:
            raise UserError(
                f"{self.args.output_dir} holds a checkpoint of another model ({wrong[0]}): delete "
                "the folder"
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """transformers' checkpoint, and a marker of ours once it is complete."""
        folder = Path(str(self.args.output_dir))
        own = folder / f"checkpoint-{self.state.global_step}"
        with disk_errors(own):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            content = {
                "curve": self.course.curve,
                "epoch": self._epoch,
                "sharded": self.is_fsdp_enabled,
            }
            write_bytes(own / _MARKER, canonical_json(content).encode())
            for path in folder.iterdir():
                stale = path.name.startswith("best-") and path.stem != self.best_name
                if stale or (path.name.startswith("checkpoint-") and path != own):
                    _remove(path)

    @property
    def best_name(self) -> str:
        """Stem of the file of the best epoch so far."""
        return f"best-{self.course.best_epoch}"

    def resume(self) -> None:
        """Train to the end, from the last complete checkpoint if there is one."""
        folder = Path(str(self.args.output_dir))
        last = last_checkpoint(folder)
        if last is not None:
            content = json.loads((last / _MARKER).read_bytes())
            sharded = content.get("sharded", False)  # of which older ones say nothing
            if sharded != self.is_fsdp_enabled:
                how = "with" if sharded else "without"
                raise UserError(
                    f"{last} was written {how} FSDP: launch it so again, or delete the folder"
                )
            for row in content["curve"]:
                self.course.end_epoch(row, {})
            self._epoch = content["epoch"]
        self.train(resume_from_checkpoint=None if last is None else str(last))


class _Steps(TrainerCallback):
    """When to validate and when to write a checkpoint."""

    def __init__(self, trainer: RewardTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer.end_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Before a checkpoint of the same step, so that a resumed run does not miss it.
        control.should_evaluate = state.global_step % args.eval_steps == 0
        control.should_save = state.global_step % args.save_steps == 0


class _Loader(DataLoader[Any]):
    """Whatever the batch sampler yields is read by `__getitems__` of the data set, as one."""

    def __init__(self, data: PairTokens, minibatches: Minibatches) -> None:
        super().__init__(data, batch_sampler=minibatches, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """What the Trainer calls before every epoch, from 0."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def _as_it_is(batch: Any) -> Any:
    return batch


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete one; what a kill left incomplete is no checkpoint."""
    steps = {
        int(path.parent.name.partition("-")[2]): path.parent
        for path in folder.glob(f"checkpoint-*/{_MARKER}")
    }
    return steps[max(steps)] if steps else None


def _remove(path: Path) -> None:
    if path.is_dir():
        (path / _MARKER).unlink(missing_ok=True)  # first: half a folder must not look complete
        shutil.rmtree(path)
    else:
        path.unlink()


def summed(value: Tensor) -> Tensor:
    """Over all processes."""
    found: Tensor = reduce(value, "sum")
    return found


@torch.no_grad()
def scored(
    model: torch.nn.Module,
    encoded: Sequence[Encoded],
    rows: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
    advance: Callable[[int], object] = lambda _: None,
    of: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> NDArray[np.float32]:
    """Rewards float32 [rows] of responses, in batches of like length; each process reads some.

    The batches do not depend on the number of processes. of: what is read instead of rewards, from
    the ids and the final positions of n texts: [n, ...].
    """
    read = of or (lambda ids, final: model(ids, final)[0])
    was_training = model.training
    model.eval()
    batches = by_length([len(encoded[row].ids) for row in rows], _SCORED_TOKENS[device.type])
    found = torch.zeros(len(rows), device=device)
    # Every process takes as many turns: with sharded weights a forward step is a common one.
    for turn in range(-(-len(batches) // processes)):
        place = turn * processes + process
        batch = batches[min(place, len(batches) - 1)]
        text = texts([encoded[rows[index]] for index in batch])
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            own = read(text["ids"].to(device), text["final"].to(device)).float()
        if not turn:
            found = own.new_zeros(len(rows), *own.shape[1:])
        if place < len(batches):
            found[torch.tensor(batch, device=device)] = own
        advance(len(batch))
    model.train(was_training)
    values: NDArray[np.float32] = summed(found).cpu().numpy()
    return values
