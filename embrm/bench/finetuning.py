"""Measure fine-tuning against TRL's RewardTrainer and the bare backbone, on the same pairs."""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from embrm.bench.extraction import Size, made_model, made_pairs
from embrm.bench.processes import Measured, Prepare, measure
from embrm.bench.sweeps import cores
from embrm.core.errors import UserError
from embrm.core.progress import progress
from embrm.data.sources import parse_source
from embrm.extraction.reading import read
from embrm.extraction.spec import ExtractSpec
from embrm.extraction.texts import PreparedTexts, prepare_texts
from embrm.extraction.transformers_engine import load_engine
from embrm.finetuning.batches import Minibatches, PairTokens
from embrm.finetuning.losses import StepLoss
from embrm.finetuning.model import RewardModel
from embrm.finetuning.spec import FinetuneRun
from embrm.finetuning.trainer import RewardTrainer, Validation
from embrm.lm.loading import find_device, load_model
from embrm.lm.tokens import Encoded
from embrm.sweeps.material import to_pairs
from embrm.training.heads import initialise
from embrm.training.order import Order
from embrm.training.row_store import RowStore

_TURNS = 4
"""Micro-batches per optimizer step in the rows that accumulate gradients."""

_LIMIT = "limit: bare backbone"
_TRL = "TRL"
_BT = "bt"


@dataclass(frozen=True)
class Task:
    """What every row trains on: one epoch over `pairs`, with `batch` pairs per optimizer step.

    model: folder of the model.
    encoded: token ids of all responses.
    S: float32 [responses], log-probability of each response under the model; NaN for responses
    that are in no pair.
    kind: device type, such as "cpu" or "cuda".
    out: folder for what the trainers write.
    """

    model: Path
    encoded: list[Encoded]
    pairs: pl.DataFrame
    S: npt.NDArray[np.float32]
    batch: int
    dtype: str
    kind: str
    out: Path

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.pairs) // self.batch

    def run(self, regularizer: str | None = None) -> FinetuneRun:
        """Run of a fine-tuning spec with a linear head."""
        own = {"kind": regularizer} if regularizer else None
        return FinetuneRun.model_validate(
            {"batch_pairs": self.batch, "epochs": 1, "lr": 1e-5, "regularizer": own}
        )

    @property
    def order(self) -> Order:
        """Order of the pairs, the same in every row."""
        return Order(to_pairs(self.pairs).chosen, RowStore(torch.empty(0, 1)), self.run().seed)

    @property
    def timed_tokens(self) -> int:
        """Tokens of the texts in all steps but the first, without padding."""
        lengths = np.array([len(entry.ids) for entry in self.encoded])
        some = torch.cat([*self.order.minibatches(1, self.batch)])[self.batch :].numpy()
        both = self.pairs.select("chosen", "rejected").to_numpy()[some]
        return int(lengths[both].sum())

    def autocast(self) -> torch.autocast:
        """Context for arithmetic in `dtype`; weights are always float32."""
        dtype = getattr(torch, self.dtype)
        return torch.autocast(self.kind, dtype=dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class _Trained:
    """Result of one row.

    seconds: wall time of all steps but the first.
    core_seconds: processor time of the same steps, summed over threads.
    loss: of the first step, before any weight has changed.
    bytes: peak memory allocated on a GPU, 0 without one.
    """

    seconds: float
    core_seconds: float
    loss: float | None
    bytes: int


def measure_finetuning(
    folder: Path,
    model: str | None = None,
    data: str | None = None,
    *,
    dtype: str = "float32",
    device: str = "auto",
    batch_pairs: int = 4,
    steps: int = 3,
    rounds: int = 1,
    size: Size = Size(),  # noqa: B008
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Measure full fine-tuning; yields each part's name and rows as soon as it is measured.

    Each row trains the whole model for `steps` optimizer steps of `batch_pairs` pairs, in a fresh
    process on all cores. The rows of a part are repeated `rounds` times, alternating, and the
    fastest round of each counts. The part "trl" compares Bradley-Terry training with TRL and with
    the bare backbone (forward and backward steps without an optimizer); "grm" compares the GRM
    regularizers with Bradley-Terry, which is measured again next to them.

    model, data: as in `embrm extract`; without them, a model of `size` and synthetic pairs, written
    below `folder` and deleted at the end.
    "tokens/s": tokens of the texts per second, padding not counted.
    "core seconds": processor time of the timed steps, summed over threads; other programs on the
    machine change it less than wall time.
    "peak MB": memory allocated on a GPU, otherwise resident memory of the process with its
    libraries.
    "first loss": before any weight has changed.
    Raises: UserError for data without a model, a `batch_pairs` that 4 does not divide, too few
    pairs, and whatever `embrm extract` refuses.
    """
    if data and not model:
        raise UserError("--data needs --model, whose tokenizer reads it: name both, or neither")
    if batch_pairs % _TURNS:
        raise UserError(
            f"--batch-pairs {batch_pairs}: is also cut into {_TURNS} micro-batches: take a multiple"
        )
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: a model is fine-tuned in float32 or bfloat16: use one")
    parts: dict[str, dict[str, tuple[Prepare, *tuple[Any, ...]]]] = {
        "trl": {
            _LIMIT: (_bare,),
            _TRL: (_theirs, 1),
            f"{_TRL}, {_TURNS} micro-batches": (_theirs, _TURNS),
            _BT: (_ours,),
            f"{_BT}, {_TURNS} micro-batches": (_ours, None, _TURNS),
        },
        "grm": {
            _BT: (_ours,),
            "grm-sft": (_ours, "grm-sft"),
            "grm-sft, all logits at once": (_ours, "grm-sft", 1, _AllLogits),
            "grm-dpo": (_ours, "grm-dpo"),
            "grm-dpo, a second model": (_ours, "grm-dpo", 1, RewardModel, _SecondModel),
        },
    }
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here, count = Path(name), batch_pairs * steps
        source = parse_source(data or str(made_pairs(here / "pairs.jsonl", 2 * count)))
        spec = ExtractSpec.parse(
            {
                "model": model or str(made_model(here / "model", size)),
                "data": [source.model_copy(update={"limit": source.limit or 2 * count})],
            },
            "command line",
        )
        kind = find_device(device).type
        task = _task(prepare_texts(spec), count, batch_pairs, dtype, kind, here / "trained")
        for part, ways in parts.items():
            found: dict[str, list[Measured]] = {way: [] for way in ways}
            with progress(part, rounds * len(ways), "rounds") as bar:
                for _ in range(rounds):
                    for way, (work, *arguments) in ways.items():
                        found[way].append(measure(work, task, *arguments, threads=cores()))
                        bar.advance()
            yield part, _rows(found, task.timed_tokens)


def _task(
    prepared: PreparedTexts, count: int, batch: int, dtype: str, kind: str, out: Path
) -> Task:
    """The first `count` pairs, and the log-probabilities S of their responses."""
    # TRL has neither weights of pairs nor soft labels, so no row uses them.
    pairs = prepared.dataset.pairs.head(count).with_columns(
        label=pl.lit(1.0), weight=pl.lit(1.0), margin=pl.lit(None, pl.Float64)
    )
    if len(pairs) < count:
        raise UserError(
            f"--data has {len(pairs)} pairs, and --steps times --batch-pairs asks for {count}: "
            "lower one of them"
        )
    rows = np.unique(pairs.select("chosen", "rejected").to_numpy()).tolist()
    engine = load_engine(prepared.folder, dtype="float32", device=kind)
    S = np.full(len(prepared.encoded), np.nan, np.float32)
    S[rows] = read(engine, prepared.requests(rows), engine.batch_tokens).S
    return Task(prepared.folder, prepared.encoded, pairs, S, batch, dtype, kind, out)


def _rows(found: dict[str, list[Measured]], tokens: int) -> list[dict[str, Any]]:
    """Rows of one part, compared with the limit, TRL and Bradley-Terry if the part has them."""
    trained: dict[str, list[_Trained]] = {
        way: [done.values[0] for done in rounds] for way, rounds in found.items()
    }
    speed = {way: tokens / min(one.seconds for one in trained[way]) for way in found}
    peak = {
        way: max(one.bytes for one in trained[way]) or min(done.memory.rss for done in found[way])
        for way in found
    }
    speeds = {"of limit": _LIMIT, "times TRL": _TRL, "times bt": _BT}
    peaks = {"peak to TRL": _TRL, "peak to bt": _BT}
    return [
        {
            "way": way,
            "tokens/s": speed[way],
            **{name: speed[way] / speed[other] for name, other in speeds.items() if other in found},
            "core seconds": min(one.core_seconds for one in trained[way]),
            "peak MB": peak[way] / 1e6,
            **{name: peak[way] / peak[other] for name, other in peaks.items() if other in found},
            "first loss": trained[way][0].loss,
        }
        for way in found
    ]


class _AllLogits(RewardModel):
    """Computes log-probabilities from all logits at once: float32 [n, length, V] of logits, and a
    log-softmax of the same size."""

    _last: Tensor | None = None

    def _states(self, ids: Tensor) -> Tensor:
        self._last = super()._states(ids)
        return self._last

    def forward(
        self,
        ids: Tensor,
        final: Tensor,
        kept: Sequence[Tensor] = (),
        predicting: Tensor | None = None,
        targets: Tensor | None = None,
        counts: Sequence[int] = (),
        masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        r, _, squares, features = super().forward(ids, final, kept, masks=masks)
        states, self._last = self._last, None
        every = self._lm_head().logits(states).log_softmax(-1).flatten(0, 1)  # type: ignore[arg-type]
        each = every[predicting, targets]
        S = torch.stack([part.sum() for part in each.split([*counts])])
        return r, S, squares, features


class _SecondModel(RewardTrainer):
    """Computes the reference log-probabilities with a second model that reads every batch too."""

    def __init__(self, model: RewardModel, args: Any, **settings: Any) -> None:
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        super().__init__(model, args, **settings)
        self._reference = reference.to(args.device)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any
    ) -> Any:
        with torch.no_grad():
            S = self._reference(**inputs["text"])[1]
        own = inputs | {"pairs": inputs["pairs"] | {"reference": S}}
        return super().compute_loss(model, own, *rest, **named)


def _ours(
    task: Task,
    regularizer: Literal["grm-sft", "grm-dpo"] | None = None,
    turns: int = 1,
    model: type[RewardModel] = RewardModel,
    trainer: type[RewardTrainer] = RewardTrainer,
) -> Callable[[], _Trained]:
    """Prepare embrm's trainer. turns: micro-batches per optimizer step."""
    from transformers import TrainingArguments

    run, pairs = task.run(regularizer), to_pairs(task.pairs)
    causal = load_model(task.model, dtype="float32", device="cpu")
    head = initialise(run.head, causal.get_input_embeddings().embedding_dim, run.seed)
    with_S = regularizer is not None
    steps = task.steps + 1  # beyond the end, so that nothing is evaluated or saved
    args = TrainingArguments(**_settings(task, turns), eval_steps=steps, save_steps=steps)
    made = trainer(
        model(causal, head, tune="full", with_S=with_S),
        _on_one_gpu(args),
        run=run,
        train_dataset=_tokens(task, run),
        minibatches=_minibatches(task, turns),
        loss=StepLoss(run, task.batch, soft_labels=False),
        validation=Validation(pairs, task.encoded),
        dtype=getattr(torch, task.dtype),
        save_best=lambda *_: None,
        bar=None,
    )
    return lambda: _train(made, task.kind)


def _theirs(task: Task, turns: int) -> Callable[[], _Trained]:
    """Prepare TRL's RewardTrainer with its own defaults, except where they change the task."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback
    from transformers.utils import logging
    from trl import RewardConfig
    from trl import RewardTrainer as Theirs

    logging.set_verbosity_error()  # it would warn that the reward head is new
    logging.disable_progress_bar()
    run = task.run()
    ids = [entry.ids.tolist() for entry in task.encoded]
    chosen, rejected = task.pairs["chosen"], task.pairs["rejected"]
    order = torch.cat([*task.order.minibatches(1, task.batch)]).tolist()
    rows = [{"chosen_ids": ids[chosen[n]], "rejected_ids": ids[rejected[n]]} for n in order]
    model = AutoModelForSequenceClassification.from_pretrained(
        task.model, num_labels=1, dtype=torch.float32, local_files_only=True
    )
    with torch.no_grad():
        weight = model.score.weight
        weight.copy_(initialise(run.head, weight.shape[1], run.seed)["output.weight"])
    args = RewardConfig(
        **_settings(task, turns), train_sampling_strategy="sequential", max_length=None
    )
    tokenizer = AutoTokenizer.from_pretrained(task.model, local_files_only=True)
    made = Theirs(
        model,
        _on_one_gpu(args),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    made.remove_callback(PrinterCallback)
    return lambda: _train(made, task.kind)


def _bare(task: Task) -> Callable[[], _Trained]:
    """Prepare forward and backward steps of the backbone over the batches of Bradley-Terry."""
    backbone = load_model(task.model, dtype="float32", device=task.kind).base_model
    tokens = _tokens(task, task.run())

    def work() -> _Trained:
        ends = []
        for micro in _minibatches(task, 1):
            text = tokens.__getitems__(micro)["text"]
            ids, final = text["ids"].to(task.kind), text["final"].to(task.kind)
            with task.autocast():
                states = backbone(input_ids=ids, use_cache=False).last_hidden_state
            states[torch.arange(len(ids), device=ids.device), final].sum().backward()
            backbone.zero_grad()
            ends.append(_now(task.kind))
        return _trained(ends, None, task.kind)

    return work


def _settings(task: Task, turns: int) -> dict[str, Any]:
    """Arguments of both trainers."""
    return {
        "output_dir": str(task.out),
        "per_device_train_batch_size": task.batch // turns,
        "gradient_accumulation_steps": turns,
        "learning_rate": task.run().lr,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "max_grad_norm": 1.0,
        "use_cpu": task.kind == "cpu",
        "bf16": task.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "logging_first_step": True,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }


def _on_one_gpu(args: Any) -> Any:
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _train(trainer: Any, kind: str) -> _Trained:
    from transformers import TrainerCallback

    ends = []

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(_now(kind))

    trainer.add_callback(Ends())
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    return _trained(ends, loss, kind)


def _minibatches(task: Task, turns: int) -> Minibatches:
    pairs, run = to_pairs(task.pairs), task.run()
    lengths = torch.tensor([len(entry.ids) for entry in task.encoded])
    return Minibatches(
        pairs,
        task.order,
        run.head,
        run.seed,
        batch=task.batch,
        micro=task.batch // turns,
        process=0,
        processes=1,
        lengths=torch.maximum(lengths[pairs.chosen], lengths[pairs.rejected]),
    )


def _tokens(task: Task, run: FinetuneRun) -> PairTokens:
    return PairTokens(
        task.encoded, to_pairs(task.pairs), run.active_regularizer, torch.from_numpy(task.S)
    )


def _trained(ends: Sequence[npt.NDArray[np.float64]], loss: float | None, kind: str) -> _Trained:
    """ends: clock times at the end of every step, as `_now` returns them."""
    seconds, core_seconds = (ends[-1] - ends[0]).tolist()
    allocated = torch.cuda.max_memory_allocated() if kind == "cuda" else 0
    return _Trained(seconds, core_seconds, loss, allocated)


def _now(kind: str) -> npt.NDArray[np.float64]:
    """Wall time and processor time of this process, float64 [2] in seconds."""
    if kind == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])
