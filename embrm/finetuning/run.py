"""Fine-tuning: a spec and a cache in, results in a sweep's layout out, resumable at any moment."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import safetensors.torch
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from numpy.typing import NDArray
from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

from embrm.cache.reader import Cache
from embrm.cache.tensors import to_tensor, torch_dtype
from embrm.cache.writer import difference
from embrm.core.errors import UserError, nearest
from embrm.core.files import (
    TEMPORARY,
    disk_errors,
    exclusive,
    link_or_copy,
    move_into_place,
    remove_temporaries,
    write_bytes,
)
from embrm.core.progress import progress
from embrm.core.provenance import provenance
from embrm.core.specs import canonical_json, read_toml
from embrm.extraction.engine import TOLERANCE
from embrm.extraction.run import ExtractSpec
from embrm.extraction.run import Prepared as Texts
from embrm.extraction.run import prepare as prepare_texts
from embrm.finetuning.batches import Minibatches, PairTokens, texts
from embrm.finetuning.contrast import ViewMasks
from embrm.finetuning.losses import StepLoss
from embrm.finetuning.meta import Groups, group_rows
from embrm.finetuning.model import RewardModel, load_tuned, new_model
from embrm.finetuning.sharding import check_sharding, read_everywhere
from embrm.finetuning.spec import FinetuneRun, FinetuneSpec, check_fits, micro_pairs
from embrm.finetuning.trainer import (
    NotFiniteError,
    RewardTrainer,
    Validation,
    last_checkpoint,
    scored,
)
from embrm.lm.loading import find_device, load_model
from embrm.lm.tokens import reason_of
from embrm.metrics.geometry import drift, shape
from embrm.sweeps.evaluation import Evaluation, ledger_row, part_tables
from embrm.sweeps.geometry import measured_row, samples
from embrm.sweeps.ledger import (
    GEOMETRY_SCHEMA,
    MODEL_FORMAT,
    TABLES,
    finished,
    parquet,
    tensors_digest,
    write_results,
)
from embrm.sweeps.material import evaluation_splits, prompt_table, select, to_pairs
from embrm.sweeps.prepare import cache_for, check, leaked, pin
from embrm.sweeps.spec import Configuration, Run, RunSpec, Selection, configurations, identified
from embrm.sweeps.tables import read_tables
from embrm.sweeps.training import as_trained, with_rules
from embrm.training.order import Order
from embrm.training.states import States

_CHECKED = 8
"""Responses whose cached S is compared with the model's."""


class RunsFailedError(UserError):
    """The loss of some runs, not of all, was not finite; the results of the others are there."""


@dataclass(frozen=True)
class Prepared:
    """A fine-tune checked against its cache."""

    where: str
    spec: FinetuneSpec
    cache: Cache
    selection: Selection
    runs: list[Run]
    evaluate: list[str]
    texts: Texts


def prepare(spec_path: Path, cache_folder: Path | None) -> Prepared:
    """Read the spec, open its cache, read the texts again, and check one against the other.

    Raises: UserError for anything wrong in the spec, the cache, the model's folder or the data.
    """
    where = str(spec_path)
    spec = FinetuneSpec.parse(read_toml(spec_path), where)
    found = pin(configurations(spec, where, FinetuneRun), where)
    for configuration in found:
        check_fits(_asked(configuration), spec.tune, f"{where}: run {configuration.name!r}")
    _check_trackers(spec, where)
    check_sharding({one.name: _asked(one) for one in found}, spec.tune, where)
    cache = cache_for(spec, cache_folder, where)
    selection, _, evaluate = check(spec, found, cache, where)
    for configuration in found:
        try:
            _group_rows(cache, selection, _asked(configuration))
        except UserError as error:
            raise UserError(f"{where}: run {configuration.name!r}: {error}") from None
    runs = [
        run
        for configuration in found
        for run in identified(
            [configuration], spec.seeds, selection, spec.identity(configuration.spec)
        )
    ]
    prepared = Prepared(
        where, spec, cache, selection, runs, evaluate, _texts_of(cache, spec, where)
    )
    if any(run.spec.active_regularizer for run in runs):
        _check_reference(prepared)
    return prepared


def _asked(one: Configuration | Run) -> FinetuneRun:
    """Its spec: a fine-tune's, as `configurations` was told."""
    return cast(FinetuneRun, one.spec)


def _group_rows(
    cache: Cache, selection: Selection, asked: FinetuneRun
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """What metarm draws from, none without it. Raises: see `group_rows`."""
    if asked.metarm is None:
        return []
    members = read_tables(cache, selection.scenarios).members
    return group_rows(
        members.select("split", "prompt_id", "response"), asked.metarm, selection.train
    )


def _check_trackers(spec: FinetuneSpec, where: str) -> None:
    for name in spec.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"{where}: report_to = {name!r}: {nearest(name, INTEGRATION_TO_CALLBACK)}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"{where}: report_to = {name!r} is not installed ({reason_of(error)}): install it, "
                "or remove it"
            ) from None


def _texts_of(cache: Cache, spec: FinetuneSpec, where: str) -> Texts:
    """The texts the cache was made of. Raises: UserError when they, the tokenizer or the model
    are not what they were."""
    extraction = cache.manifest.extraction
    if not extraction:
        raise UserError(
            f"{where}: {cache.folder} does not say what it was extracted from: extract one with "
            "embrm extract"
        )
    moved: dict[str, Any] = {"engine": "transformers"}
    if spec.model is not None:
        moved |= {"model": spec.model, "revision": None}
    if spec.data is not None:
        moved["data"] = spec.data
    found = prepare_texts(ExtractSpec.parse(extraction | moved, str(cache.folder)))
    was = {name: value for name, value in cache.manifest.identity.items() if name != "engine"}
    differs = difference(was, found.identity)
    if differs:
        raise UserError(
            f"{where}: {cache.folder} was extracted with {differs}: name the model and the data "
            "it was made from, with model and data"
        )
    return found


def _check_reference(prepared: Prepared) -> None:
    """Whether the cached S is the model's own, on some responses; it stands for a second model."""
    cache, encoded = prepared.cache, prepared.texts.encoded
    S = cache.responses["S"].to_numpy()
    missing = int((~np.isfinite(S)).sum())
    if missing:
        raise UserError(
            f"{prepared.where}: grm-* compares with S, the responses' log-probability, and "
            f"{cache.folder} lacks it for {missing} responses: extract them with embrm extract"
        )
    rows = np.unique(np.linspace(0, len(S) - 1, _CHECKED).astype(int)).tolist()
    model = RewardModel(
        _causal(prepared), {"output.weight": torch.zeros(1, cache.width)}, with_S=True
    )
    with torch.inference_mode():
        found = model.eval()(**texts([encoded[row] for row in rows], [True] * len(rows)))[1]
    apart = np.abs(found.double().numpy() - S[rows]) / np.abs(S[rows])
    if not apart.max() <= TOLERANCE[cache.dtype]:
        raise UserError(
            f"{prepared.where}: {cache.folder} holds S = {S[rows[int(apart.argmax())]]:g} of a "
            f"response for which the model gives {float(found[int(apart.argmax())]):g}: "
            "check it with embrm cache probe"
        )


def _causal(prepared: Prepared) -> Any:
    """The base model, in float32 on the CPU."""
    found = prepared.texts
    return load_model(
        found.folder,
        dtype="float32",
        device="cpu",
        trust_remote_code=found.spec.trust_remote_code,
    )


def finetune(
    spec_path: Path, cache: Path | None = None, *, out: Path | None = None, device: str = "auto"
) -> Path:
    """Train and evaluate every run of the spec that `out` does not hold yet; returns `out`.

    cache: folder, instead of the spec's own. out: results folder, default the spec's path without
    `.toml`, in a sweep's layout (`embrm.sweeps.ledger`). device: auto, cpu, cuda or mps.

    Started by `accelerate launch` or torchrun, the processes train together.

    Raises: UserError for anything wrong in spec, cache, model or data, where memory runs out, and
    at the end for runs whose loss was not finite; whatever has finished by then is kept.
    """
    if ":" in device:
        raise UserError(f"device = {device!r}: choose GPUs with CUDA_VISIBLE_DEVICES")
    read_everywhere()
    kind = find_device(device).type
    processes = PartialState(cpu=kind == "cpu")
    prepared = prepare(spec_path, cache)
    spec, main = prepared.spec, processes.is_main_process
    out = out or spec_path.with_suffix("")
    _refuse_sweep(out)
    for run in prepared.runs:
        micro_pairs(spec, run.spec, processes.num_processes, f"{prepared.where}: run {run.name!r}")
    with exclusive(out) if main else nullcontext():
        if main:
            remove_temporaries(out)
        processes.wait_for_everyone()
        done = finished(out)
        failures: dict[str, str] = {}
        stage = _Stage(prepared, out, kind)
        for run in prepared.runs:
            if run.run_id not in done:
                try:
                    stage.finish(run)
                except NotFiniteError as error:
                    failures[f"{run.name} seed {run.spec.seed}"] = str(error)
                # Here, where an exception no longer holds the trainer, which refers to itself.
                clear_device_cache(garbage_collection=True)
        if main:
            _write(prepared, out, stage)
        processes.wait_for_everyone()
    if failures:
        listed = "; ".join(f"{run}: {why}" for run, why in [*failures.items()][:5])
        kind_of_failure = RunsFailedError if len(failures) < len(prepared.runs) else UserError
        raise kind_of_failure(f"{len(failures)} of {len(prepared.runs)} runs failed: {listed}")
    return out


def _refuse_sweep(out: Path) -> None:
    try:
        header = json.loads((out / "sweep.json").read_bytes())
    except (OSError, ValueError):
        return  # none, or damaged: written anew
    if "finetune" not in header:
        raise UserError(f"{out} holds the results of a sweep: choose another folder with --out")


def _write(prepared: Prepared, out: Path, stage: "_Stage") -> None:
    spec, cache = prepared.spec, prepared.cache
    header = {
        "cache": str(cache.folder),
        "cache_id": cache.cache_id,
        "leaked": leaked(cache, spec, prepared.evaluate),
        "environment": {
            **provenance(),
            "numerics": {"mode": stage.numerics, "processes": PartialState().num_processes},
        },
        "finetune": spec.model_dump(mode="json"),
    }
    write_results(
        out, spec.as_sweep, prepared.runs, prepared.evaluate, header, prompt_table(stage.splits)
    )


@contextmanager
def _out_of_memory(when: str, *remedies: str) -> Iterator[None]:
    """In one line, with what may help before a larger GPU."""
    try:
        yield
    except torch.OutOfMemoryError:
        listed = ", or ".join([*remedies, "take a larger GPU"])
        raise UserError(f"out of memory {when}: {listed}; the last checkpoint is kept") from None


def _lighter(spec: FinetuneSpec, micro: int) -> list[str]:
    """What of the spec would make a step of so many pairs smaller."""
    found = {
        "lower it": micro > 1,
        "set gradient_checkpointing = true": not spec.gradient_checkpointing,
        "set tune = 'lora'": spec.tune == "full",
    }
    return [remedy for remedy in found if found[remedy]]


def _view_masks(asked: FinetuneRun, model: RewardModel) -> ViewMasks | None:
    """For SimCSE. Raises: UserError for a model in which no dropout can be placed."""
    if asked.simcse is None:
        return None
    if not model.sites:
        raise UserError(
            "simcse: the model's layers are not transformers' own, and there is nowhere to drop: "
            "remove it"
        )
    width = model.backbone.config.get_text_config().hidden_size
    return ViewMasks(asked.seed, model.sites, width, asked.simcse.dropout)


class _Stage:
    """What all runs of a fine-tune share."""

    def __init__(self, prepared: Prepared, out: Path, kind: str) -> None:
        self._prepared, self._out, self._kind = prepared, out, kind
        self.splits = evaluation_splits(prepared.cache, prepared.selection)
        self._training, validation = select(prepared.cache, prepared.selection)
        cache, train = prepared.cache, prepared.selection.train
        responses = cache.responses.select("n_response", "S")
        self._samples = samples(responses, self._training, train, self.splits)
        sampled = [own.rows.numpy() for own in self._samples.values()]
        self._evaluation = Evaluation.of(validation, self.splits, sampled)
        # Of the base model, at the final position: what a backbone moves away from.
        self._sampled = np.unique(np.concatenate(sampled))
        self._before = to_tensor(cache.stored_states("last")[self._sampled]).float()
        self._validation = Validation(to_pairs(validation), prepared.texts.encoded)
        self._dtype = getattr(torch, prepared.spec.dtype)
        name = torch.cuda.get_device_name() if kind == "cuda" else kind
        self.numerics = f"{name} {prepared.spec.dtype}"

    def finish(self, run: Run) -> None:
        """Train `run`, evaluate what is stored of it, and write its part."""
        start = time.time()
        folder = self._out / "checkpoints" / run.run_id
        trainer = self._train(run, folder)
        course, best = trainer.course, folder / f"{trainer.best_name}.safetensors"
        train_pairs, main = len(trainer.train_dataset), trainer.args.should_save
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
        del trainer
        clear_device_cache(garbage_collection=True)
        trained = time.time()
        rewards, states = self._score(best)
        scored_at = time.time()
        if main:
            cache = self._prepared.cache
            row = ledger_row(
                run,
                course.curve,
                course.best_epoch,
                finite=True,
                diverged=None,
                cache_id=cache.cache_id,
                train_pairs=train_pairs,
                validation_pairs=len(self._validation.pairs),
                bsr_effective=self._bsr_effective(run, train_pairs),
                numerics=self.numerics,
            )
            row["weights_sha256"] = tensors_digest(safetensors.torch.load_file(best))
            columns, outcomes = self._evaluation.measure(run.run_id, rewards)
            curves = [{"run_id": run.run_id, **point} for point in course.curve]
            tables = part_tables(
                [row | columns],
                curves,
                outcomes,
                start=start,
                trained=trained,
                scored=scored_at,
                end=time.time(),
            )
            tables["geometry"] = self._geometry(run, rewards, states)
            link_or_copy(best, self._out / "weights" / f"{run.run_id}.safetensors")
            for name in (name for name in TABLES if name in tables):
                path = self._out / "parts" / run.run_id / f"{name}.parquet"
                write_bytes(path, parquet(tables[name]))
            shutil.rmtree(folder)
            if not any(folder.parent.iterdir()):
                folder.parent.rmdir()
        PartialState().wait_for_everyone()

    def _bsr_effective(self, run: Run, train_pairs: int) -> float:
        micro = self._prepared.spec.micro_pairs
        of_micro = self._prepared.spec.bsr_scope == "micro" and micro is not None
        batch = min(run.spec.batch_pairs, train_pairs)
        return run.spec.bsr_effective(micro if of_micro and micro else batch)

    def _train(self, run: Run, folder: Path) -> RewardTrainer:
        """A trainer that has trained `run`, from its last checkpoint on."""
        spec, cache, asked = self._prepared.spec, self._prepared.cache, _asked(run)
        pairs = to_pairs(as_trained(with_rules(self._training, [asked]), asked))
        batch, processes = min(asked.batch_pairs, len(pairs)), PartialState()
        micro = micro_pairs(spec, asked, processes.num_processes, self._prepared.where)
        # Blocks are those of the cache's states, of which none are needed here.
        states = States(torch.empty(0, cache.width, dtype=torch_dtype(cache)))
        lengths = torch.from_numpy(self._prepared.texts.lengths)
        longer = torch.maximum(lengths[pairs.chosen], lengths[pairs.rejected])
        minibatches = Minibatches(
            pairs,
            Order(pairs.chosen, states, asked.seed),
            asked.head,
            asked.seed,
            batch=batch,
            micro=micro,
            process=processes.process_index,
            processes=processes.num_processes,
            # Where r̄ is of a micro-batch, which pairs it has is part of the method.
            lengths=longer if spec.bsr_scope == "batch" else None,
        )
        regularizer = asked.active_regularizer
        S = torch.from_numpy(cache.responses["S"].to_numpy().astype(np.float32))
        model = new_model(
            _causal(self._prepared),
            asked.head,
            asked.seed,
            spec.tune,
            spec.lora,
            with_S=regularizer is not None,
        )
        data = PairTokens(
            self._prepared.texts.encoded, pairs, regularizer, S, _view_masks(asked, model)
        )
        loss = StepLoss(
            asked,
            batch,
            soft_labels=bool((pairs.label != 1).any()),
            bsr_of=micro if spec.bsr_scope == "micro" else None,
        )
        groups = None
        if asked.metarm is not None:
            rows = _group_rows(cache, self._prepared.selection, asked)
            groups = Groups(asked.metarm, rows, asked.seed)
        steps = -(-len(pairs) // batch)
        args = self._arguments(asked, folder, steps, micro, minibatches.turns)
        last = last_checkpoint(folder)
        done = 0 if last is None else int(last.name.partition("-")[2])
        title = f"fine-tune {run.name} seed {asked.seed}"
        shown = progress(title, steps * asked.epochs, "steps", done)
        with shown if processes.is_main_process else nullcontext() as bar:
            # It moves the weights, always float32, to the device.
            with _out_of_memory("with the weights alone, which nothing in the spec makes smaller"):
                trainer = RewardTrainer(
                    model,
                    args,
                    run=asked,
                    train_dataset=data,
                    minibatches=minibatches,
                    loss=loss,
                    validation=self._validation,
                    dtype=self._dtype,
                    save_best=lambda epoch, tensors: self._save_best(run, folder, epoch, tensors),
                    bar=bar,
                    groups=groups,
                )
            with _out_of_memory(f"with micro_pairs = {micro}", *_lighter(spec, micro)):
                trainer.resume()
        return trainer

    def _arguments(
        self, asked: RunSpec, folder: Path, steps: int, micro: int, accumulation: int
    ) -> TrainingArguments:
        """steps: minibatches of an epoch."""
        spec = self._prepared.spec
        # accelerate launch sets it to its own default, which a Trainer in float32 would follow.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if spec.dtype == "bfloat16" else "no"
        args = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=asked.epochs,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            seed=asked.seed % 2**32,
            use_cpu=self._kind == "cpu",
            bf16=spec.dtype == "bfloat16",
            gradient_checkpointing=spec.gradient_checkpointing,
            max_grad_norm=spec.clip,
            # Their times are set by a callback: see `trainer`.
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
        # Several GPUs are for several processes; the Trainer would otherwise share them among
        # threads of one.
        args._n_gpu = min(args.n_gpu, 1)
        return args

    def _save_best(
        self, run: Run, folder: Path, epoch: int, tensors: dict[str, torch.Tensor]
    ) -> None:
        header = {
            "format": MODEL_FORMAT,
            "cache_id": self._prepared.cache.cache_id,
            "run": run.spec.model_dump(mode="json"),
            "tune": self._prepared.spec.tune,
            "model": self._prepared.cache.manifest.identity["model"],
        }
        path = folder / f"best-{epoch}.safetensors"
        temporary = path.with_name(TEMPORARY + path.name)
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            metadata = {"embrm": canonical_json(header)}
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        move_into_place(temporary, path)

    def _geometry(
        self, run: Run, rewards: NDArray[np.float32], states: NDArray[np.float32]
    ) -> pl.DataFrame:
        """What a sweep measures, of the states that the tuned model gives; drift is from the base
        model's. rewards: of what is evaluated; states: of `_sampled`."""
        after, rows = torch.from_numpy(states), []
        for split, sample in self._samples.items():
            own = np.searchsorted(self._sampled, sample.rows.numpy())
            found = shape(after[own])
            if self._prepared.spec.tune != "frozen":
                found["drift"] = drift(self._before[own], after[own])
            r = rewards[np.searchsorted(self._evaluation.rows, sample.rows.numpy())]
            rows.append(measured_row(run.run_id, split, sample, found, r))
        return pl.DataFrame(rows, schema=GEOMETRY_SCHEMA)

    def _score(self, path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Rewards of all responses that are evaluated, and pooled states of those that geometry is
        measured on, under the stored model."""
        processes = PartialState()
        model, _ = load_tuned(path, _causal(self._prepared))
        read = partial(
            scored,
            model.to(processes.device),
            self._prepared.texts.encoded,
            dtype=self._dtype,
            device=processes.device,
            process=processes.process_index,
            processes=processes.num_processes,
        )
        rows = self._evaluation.rows.tolist()
        with _out_of_memory("in evaluation"), progress("evaluate", len(rows), "responses") as bar:
            rewards = read(rows, advance=bar.advance)
            return rewards, read(self._sampled.tolist(), of=model.pooled)
