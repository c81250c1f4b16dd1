"""One run of a fine-tune from its start, or last checkpoint, to its stored part of the results."""

import shutil
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import safetensors.torch
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from numpy.typing import NDArray

from embrm.cache.tensors import to_tensor
from embrm.core.files import TEMPORARY, disk_errors, link_or_copy, move_into_place, write_bytes
from embrm.core.progress import progress
from embrm.core.specs import canonical_json
from embrm.finetuning.checkpoints import last_checkpoint, step_of
from embrm.finetuning.inference import score_texts
from embrm.finetuning.inputs import FinetuneInputs, run_spec
from embrm.finetuning.model import load_tuned
from embrm.finetuning.setup import build_trainer, memory_remedies, micro_pairs_of, out_of_memory
from embrm.finetuning.spec import FinetuneRun
from embrm.finetuning.trainer import RewardTrainer, Validation
from embrm.metrics.geometry import drift, norms_and_rank
from embrm.sweeps.evaluation import Evaluation, ledger_row, part_tables
from embrm.sweeps.geometry import measured_row, samples
from embrm.sweeps.ledger import GEOMETRY_SCHEMA, TABLES, parquet
from embrm.sweeps.material import to_pairs
from embrm.sweeps.selection import evaluation_splits, select
from embrm.sweeps.spec import Run
from embrm.sweeps.training_pairs import as_trained, as_validated, with_rules
from embrm.sweeps.weights import MODEL_FORMAT, tensors_digest
from embrm.training.pairs import Pairs


class Finetuner:
    """Trains, evaluates and stores the runs of a fine-tune, one after another."""

    def __init__(self, inputs: FinetuneInputs, out: Path, device: str) -> None:
        """out: the results folder. device: cpu, cuda or mps."""
        self._inputs, self._out, self._device = inputs, out, device
        cache, selection = inputs.cache, inputs.selection
        self.splits = evaluation_splits(cache, selection)
        self._training, self._validation = select(cache, selection)
        responses = cache.responses.select("n_response", "S")
        self._samples = samples(responses, self._training, selection.train, self.splits)
        sampled = [sample.rows.numpy() for sample in self._samples.values()]
        self._evaluation = Evaluation.of(self._validation, self.splits, sampled)
        self._sampled_rows = np.unique(np.concatenate(sampled))
        # Drift is the distance that fine-tuning moves a state from the base model's.
        self._states_before = to_tensor(cache.stored_states("last")[self._sampled_rows]).float()
        name = torch.cuda.get_device_name() if device == "cuda" else device
        self.numerics = f"{name} {inputs.spec.dtype}"

    def finish(self, run: Run) -> None:
        """Train `run`, evaluate its stored weights, and write its part of the results.

        Raises: UserError as `RewardTrainer.resume` and `build_trainer` do.
        """
        start = time.time()
        folder = self._out / "checkpoints" / run.run_id
        validation = self._validated(run_spec(run))
        trainer = self._train(run, folder, to_pairs(validation))
        course, best = trainer.course, folder / f"{trainer.best_name}.safetensors"
        train_pairs, main = len(trainer.train_dataset), trainer.args.should_save
        trainer.accelerator.wait_for_everyone()
        # Evaluation loads another model: the trained one, its gradients and moments must go first.
        trainer.accelerator.free_memory()
        del trainer
        clear_device_cache(garbage_collection=True)
        trained = time.time()
        rewards, states = self._evaluate(best)
        scored = time.time()
        if main:
            row = ledger_row(
                run,
                course.curve,
                course.best_epoch,
                finite=True,
                diverged=None,
                cache_id=self._inputs.cache.cache_id,
                train_pairs=train_pairs,
                validation_pairs=len(validation),
                bsr_effective=self._bsr_effective(run, train_pairs),
                numerics=self.numerics,
            )
            row["weights_sha256"] = tensors_digest(safetensors.torch.load_file(best))
            evaluation = self._evaluation.validated_on(validation)
            columns, outcomes = evaluation.measure(run.run_id, rewards)
            curves = [{"run_id": run.run_id, **point} for point in course.curve]
            tables = part_tables(
                [row | columns],
                curves,
                outcomes,
                start=start,
                trained=trained,
                scored=scored,
                end=time.time(),
            )
            tables["geometry"] = self._geometry(run, rewards, states)
            self._store(run, best, tables)
        PartialState().wait_for_everyone()

    def _validated(self, spec: FinetuneRun) -> pl.DataFrame:
        """The validation pairs of a run, with the labels that it validates on."""
        labels, pairs = self._inputs.selection.validation_labels, self._validation
        if labels == "noisy":
            pairs = with_rules(pairs, [spec], "validation")
        return as_validated(pairs, spec, labels)

    def _train(self, run: Run, folder: Path, validation: Pairs) -> RewardTrainer:
        """Train `run` to its end, from its last checkpoint if it has one."""
        spec = run_spec(run)
        pairs = to_pairs(as_trained(with_rules(self._training, [spec]), spec))
        micro = micro_pairs_of(self._inputs, spec)
        steps = -(-len(pairs) // min(spec.batch_pairs, len(pairs)))
        shown = progress(
            f"fine-tune {run.name} seed {spec.seed}",
            steps * spec.epochs,
            "steps",
            step_of(last_checkpoint(folder)),
        )
        with shown if PartialState().is_main_process else nullcontext() as bar:
            trainer = build_trainer(
                self._inputs,
                spec,
                pairs,
                Validation(validation, self._inputs.texts.encoded),
                folder,
                device=self._device,
                save_best=lambda epoch, tensors: self._save_best(run, folder, epoch, tensors),
                bar=bar,
            )
            remedies = memory_remedies(self._inputs.spec, micro)
            with out_of_memory(f"with micro_pairs = {micro}", *remedies):
                trainer.resume()
        return trainer

    def _bsr_effective(self, run: Run, train_pairs: int) -> float:
        """λ·B_ref, the factor of r̄² in the run's loss."""
        spec = self._inputs.spec
        if spec.bsr_scope == "micro" and spec.micro_pairs is not None:
            return run.spec.bsr_effective(spec.micro_pairs)
        return run.spec.bsr_effective(min(run.spec.batch_pairs, train_pairs))

    def _save_best(
        self, run: Run, folder: Path, epoch: int, tensors: dict[str, torch.Tensor]
    ) -> None:
        """Store the weights of the best epoch so far as they will be stored in the results."""
        header = {
            "format": MODEL_FORMAT,
            "cache_id": self._inputs.cache.cache_id,
            "run": run.spec.model_dump(mode="json"),
            "tune": self._inputs.spec.tune,
            "model": self._inputs.cache.manifest.identity["model"],
        }
        path = folder / f"best-{epoch}.safetensors"
        temporary = path.with_name(TEMPORARY + path.name)
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            metadata = {"embrm": canonical_json(header)}
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        move_into_place(temporary, path)

    def _evaluate(self, path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Rewards of all evaluated responses, and states of `_sampled_rows`, under the stored
        model."""
        processes = PartialState()
        model, _ = load_tuned(path, self._inputs.base_model())
        read = partial(
            score_texts,
            model.to(processes.device),
            self._inputs.texts.encoded,
            dtype=getattr(torch, self._inputs.spec.dtype),
            device=processes.device,
            process=processes.process_index,
            processes=processes.num_processes,
        )
        rows = self._evaluation.rows.tolist()
        with out_of_memory("in evaluation"), progress("evaluate", len(rows), "responses") as bar:
            rewards = read(rows, advance=bar.advance)
            return rewards, read(self._sampled_rows.tolist(), read=model.pooled)

    def _geometry(
        self, run: Run, rewards: NDArray[np.float32], states: NDArray[np.float32]
    ) -> pl.DataFrame:
        """The rows of the geometry table, of the tuned model's own states.

        rewards: of the evaluated responses; states: of `_sampled_rows`.
        """
        after, rows = torch.from_numpy(states), []
        for split, sample in self._samples.items():
            places = np.searchsorted(self._sampled_rows, sample.rows.numpy())
            found = norms_and_rank(after[places])
            if self._inputs.spec.tune != "frozen":
                found["drift"] = drift(self._states_before[places], after[places])
            r = rewards[np.searchsorted(self._evaluation.rows, sample.rows.numpy())]
            rows.append(measured_row(run.run_id, split, sample, found, r))
        return pl.DataFrame(rows, schema=GEOMETRY_SCHEMA)

    def _store(self, run: Run, best: Path, tables: dict[str, pl.DataFrame]) -> None:
        """Write the run's weights and tables, in the order that makes a killed process resumable,
        and remove its checkpoints."""
        link_or_copy(best, self._out / "weights" / f"{run.run_id}.safetensors")
        for name in (name for name in TABLES if name in tables):
            path = self._out / "parts" / run.run_id / f"{name}.parquet"
            write_bytes(path, parquet(tables[name]))
        shutil.rmtree(best.parent)
        if not any(best.parent.parent.iterdir()):
            best.parent.parent.rmdir()
