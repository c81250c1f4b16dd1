"""Extraction: a spec in, a verified cache folder out, resumable at any moment."""

import hashlib
import operator
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field, field_validator, model_validator

from embrm.cache.manifest import NAME, Manifest, read_manifest
from embrm.cache.schema import ShardRows, TokenTable, known_views
from embrm.cache.tensors import to_stored
from embrm.cache.writer import open_writer
from embrm.core.errors import UserError
from embrm.core.progress import progress
from embrm.core.provenance import provenance
from embrm.core.specs import Spec
from embrm.data.dataset import Dataset, load
from embrm.data.leaks import leaks
from embrm.data.sources import SourceSpec
from embrm.extraction import vllm_engine
from embrm.extraction.engine import (
    Batch,
    Engine,
    PositionsRule,
    Request,
    predicting_positions,
    read,
    read_shards,
    token_positions,
)
from embrm.extraction.parts import Share
from embrm.extraction.transformers_engine import load_engine
from embrm.lm.loading import digest, load_config, longest, model_folder
from embrm.lm.tokens import Encoded, TokenPolicy, encode, load_tokenizer, token_policy

SHARD_ROWS = 2048

_SAMPLE_TOKENS = 1 << 16  # of a dry run at most: seconds on a GPU

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt", "*.tiktoken")

EngineName = Literal["auto", "transformers", "vllm"]

_RULES: dict[PositionsRule, str] = {
    "random": "without replacement",
    "spaced": "evenly spaced from a random start",
}


class ExtractSpec(Spec):
    """What defines an extraction. Settings that must not change its result are arguments of
    `extract`, not fields: device, token budget of a batch, torch.compile."""

    model: str
    """A folder saved by save_pretrained, or a hub id."""
    revision: str | None = None
    """Of a hub model: a branch, tag or commit."""
    data: tuple[SourceSpec, ...] = Field(min_length=1)
    """The datasets, a `[[data]]` table each."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """The tokenizer's chat template, or prompt and response joined; auto: chat if there is one."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of prompt and response together; None: 2,048, or what the model reads if less."""
    truncation: Literal["drop", "left"] = "drop"
    """A longer text is dropped, or loses the left of its prompt."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the model and storage of the states."""
    states: tuple[str, ...] = ("last",)
    """Views to store: last, mean, prenorm, layer:K."""
    token_rows: int = Field(default=0, ge=0)
    """Sampled positions a response."""
    # What came after the first caches is recorded only where it is set: others keep their bytes.
    token_positions: PositionsRule = Field(
        default="random", exclude_if=lambda rule: rule == "random"
    )
    """random: drawn without replacement; spaced: evenly spaced from a random start."""
    top_k: int = Field(default=32, ge=0)
    """Largest logits kept at a sampled position."""
    tail_mean: bool = Field(default=False, exclude_if=operator.not_)
    """Keep at a sampled position the mean gradient of all other logits, a vector like a state."""
    seed: int = Field(default=0, ge=0)
    """Of the sampled positions."""
    engine: EngineName = Field(default="auto", exclude_if=lambda engine: engine != "vllm")
    """What runs the model; auto: vllm where it is installed on CUDA and has the views, otherwise
    transformers. Two engines agree within the dtype's tolerance, not in their bytes."""
    pad_token: str | None = None
    """A vocabulary token that serves as pad token."""
    allow_pad_eos: bool = False
    """Accept a pad token that is the EOS token: the final position is then before it."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    limit: int | None = Field(default=None, ge=1)
    """For every source that sets no limit of its own."""

    @field_validator("states")
    @classmethod
    def _known_views(cls, states: tuple[str, ...]) -> tuple[str, ...]:
        known_views(states)
        if not states or len(set(states)) < len(states):
            raise ValueError("name at least one view, and each once")
        return states

    @model_validator(mode="after")
    def _tails_have_rows(self) -> "ExtractSpec":
        if self.tail_mean and not self.token_rows:
            raise ValueError(
                "tail_mean = true needs sampled positions, and token_rows = 0: set token_rows"
            )
        return self


@dataclass(frozen=True)
class Prepared:
    """Everything known before the model runs; `encoded` has one entry a row of the dataset."""

    spec: ExtractSpec
    folder: Path
    dataset: Dataset
    encoded: list[Encoded]
    leaks: pl.DataFrame
    identity: dict[str, Any]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of every response, prompt included."""
        return np.array([len(entry.ids) for entry in self.encoded], dtype=np.int64)

    def requests(self, rows: range | list[int]) -> list[Request]:
        """What an engine is asked for these rows of the dataset."""
        ids = self.dataset.responses["response_id"]
        return [
            Request(
                entry.ids,
                entry.n_prompt,
                entry.final_position,
                token_positions(
                    ids[row],
                    entry.n_prompt,
                    len(entry.ids),
                    self.spec.token_rows,
                    self.spec.seed,
                    self.spec.token_positions,
                ),
            )
            for row, entry in ((row, self.encoded[row]) for row in rows)
        ]


@dataclass(frozen=True)
class Plan:
    """What an extraction would do."""

    responses: int
    prompts: int
    splits: dict[str, dict[str, int]]
    """Split → pairs, prompts, responses."""
    tokens: int
    cache_bytes: dict[str, int]
    """Part of the cache → its size, and the total: all but Parquet's headers and the tables."""
    exclusions: dict[str, int]
    """Reason → source rows left out."""
    leaks: pl.DataFrame
    tokens_per_second: float
    """Measured on a sample of the data; prompts that many responses share are faster."""
    seconds: float


def prepare(spec: ExtractSpec) -> Prepared:
    """Load the data, tokenise it, exclude what cannot be read, and name the result's identity.

    Raises: UserError for anything wrong with the model's folder, its tokenizer or the data.
    """
    remote = spec.trust_remote_code
    folder = model_folder(spec.model, spec.revision, trust_remote_code=remote)
    config = load_config(folder, trust_remote_code=remote)
    tokenizer = load_tokenizer(folder, trust_remote_code=remote)
    policy = token_policy(
        tokenizer,
        template=spec.template,
        max_length=longest(config, spec.max_length),
        truncation=spec.truncation,
        pad_token=spec.pad_token,
        allow_pad_eos=spec.allow_pad_eos,
    )
    dataset = load([_limited(source, spec.limit) for source in spec.data])
    encoded, drops = encode(dataset.responses, tokenizer, policy)
    dataset, kept = exclude(dataset, encoded, drops)
    largest = max(int(entry.ids.max()) for entry in kept)
    vocabulary = config.get_text_config().vocab_size
    if largest >= vocabulary:
        raise UserError(
            f"model {spec.model}: its tokenizer gives token id {largest}, the model knows "
            f"{vocabulary} ids: use the tokenizer the model was trained with"
        )
    identity = _identity(spec, folder, policy, dataset, kept)
    return Prepared(spec, folder, dataset, kept, leaks(dataset), identity)


def _limited(source: SourceSpec, limit: int | None) -> SourceSpec:
    return source if source.limit else source.model_copy(update={"limit": limit})


def exclude(
    dataset: Dataset, encoded: list[Encoded | None], drops: pl.DataFrame
) -> tuple[Dataset, list[Encoded]]:
    """Leave out the dropped responses, and the pairs whose two sides became the same tokens."""
    identical = []
    for pair, chosen, rejected in (
        dataset.pairs.select("chosen", "rejected").with_row_index().rows()
    ):
        left, right = encoded[chosen], encoded[rejected]
        if left and right and np.array_equal(left.ids, right.ids):
            cut = left.truncated or right.truncated
            reason = "truncated_to_identical" if cut else "identical"
            identical.append((pair, reason, f"both are the same {len(left.ids)} tokens"))
    if drops.height or identical:
        schema = {"pair": pl.Int32, "reason": pl.String, "detail": pl.String}
        by_id = dict(zip(dataset.responses["response_id"], encoded, strict=True))
        dataset = dataset.without(drops, pl.DataFrame(identical, schema=schema, orient="row"))
        encoded = [by_id[response_id] for response_id in dataset.responses["response_id"]]
    return dataset, [entry for entry in encoded if entry]


def _identity(
    spec: ExtractSpec,
    folder: Path,
    policy: TokenPolicy,
    dataset: Dataset,
    encoded: list[Encoded],
) -> dict[str, Any]:
    """Everything that defines the content of the cache, and nothing else: no path, no device."""
    tokens = hashlib.sha256()
    for entry in encoded:
        tokens.update(f"{len(entry.ids)} {entry.n_prompt} {entry.final_position}\n".encode())
        tokens.update(entry.ids.tobytes())
    return {
        "model": {
            "weights": digest(folder, "*.safetensors"),
            "config": digest(folder, "config.json"),
            "dtype": spec.dtype,
        },
        "tokenizer": {
            "files": digest(folder, *_TOKENIZER_FILES),
            "template": policy.template,
            "chat_template": policy.chat_template
            and hashlib.sha256(policy.chat_template.encode()).hexdigest(),
            "bos": policy.bos if policy.add_bos else None,
            "eos": policy.eos if policy.template == "plain" else "as the template ends",
            "pad": policy.pad,
            "max_length": policy.max_length,
            "truncation": policy.truncation,
        },
        "states": {
            "views": sorted(spec.states),
            "norm": "post final norm, except prenorm and layer:K",
            "position": "rightmost token that is not the pad token; mean: all response tokens",
        },
        "token_rows": {
            "rule": f"Philox keyed by SHA-256 of seed:response_id, {_RULES[spec.token_positions]}",
            "rows": spec.token_rows,
            "top_k": spec.top_k,
            "seed": spec.seed,
            # Named only where it is there: caches made before it keep their ids.
            **({"tail_mean": True} if spec.tail_mean else {}),
        }
        if spec.token_rows
        else None,
        "data": {"dataset": dataset.digest(), "token_ids": tokens.hexdigest()},
        **({"engine": "vllm"} if spec.engine == "vllm" else {}),
    }


def plan(
    spec: ExtractSpec,
    *,
    device: str = "auto",
    batch_tokens: int | None = None,
    tensor_parallel: int = 1,
    compiled: bool = False,
) -> Plan:
    """What `extract` would do, with its speed measured on one sample batch. Writes nothing."""
    check_batch(batch_tokens)
    prepared = prepare(with_engine(spec, device))
    engine = engine_for(prepared, device, tensor_parallel, compiled=compiled)
    budget = engine.batch_tokens if batch_tokens is None else batch_tokens
    lengths = prepared.lengths
    # Every n-th response by length, one batch budget in all, stands for the whole.
    share = max(1, int(lengths.sum() // min(budget, _SAMPLE_TOKENS)))
    share = min(share, len(lengths))  # a response longer than the budget is read alone
    sample = [int(row) for row in np.argsort(lengths, kind="stable")[share // 2 :: share]]
    read(engine, prepared.requests(sample[:1]), budget)  # the first call also allocates
    start = time.perf_counter()
    read(engine, prepared.requests(sample), budget)
    speed = float(lengths[sample].sum()) / (time.perf_counter() - start)
    return Plan(
        responses=len(lengths),
        prompts=prepared.dataset.responses["prompt_id"].n_unique(),
        splits=prepared.dataset.split_counts(),
        tokens=int(lengths.sum()),
        cache_bytes=_cache_bytes(prepared, engine),
        exclusions=prepared.dataset.reason_counts(),
        leaks=prepared.leaks,
        tokens_per_second=speed,
        seconds=float(lengths.sum()) / speed,
    )


def check_batch(batch_tokens: int | None) -> None:
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(
            f"batch_tokens = {batch_tokens}: a batch holds at least 1 token: leave it out"
        )


def _cache_bytes(prepared: Prepared, engine: Engine) -> dict[str, int]:
    """Size of the vectors and scalars, which is the cache up to Parquet's headers and tables."""
    spec, rows = prepared.spec, len(prepared.encoded)
    width = engine.width * engine.head.weight.element_size()
    sampled = sum(
        min(spec.token_rows, len(predicting_positions(entry.n_prompt, len(entry.ids))))
        for entry in prepared.encoded
    )
    parts = {
        "states": rows * len(spec.states) * width,
        "token_states": sampled * width,
        "top_logits": sampled * 8 * min(spec.top_k, len(engine.head.weight)),
        "tail_means": sampled * width if spec.tail_mean else 0,
        "lm_head": sum(tensor.nbytes for tensor in engine.head.tensors().values()),
        "scalars": rows * (4 * len(spec.states) + 61) + sampled * 20,
    }
    return parts | {"total": sum(parts.values())}


def extract(
    spec: ExtractSpec,
    out: Path,
    *,
    device: str = "auto",
    batch_tokens: int | None = None,
    tensor_parallel: int = 1,
    compiled: bool = False,
    shard_rows: int = SHARD_ROWS,
    share: Share | None = None,
) -> Path:
    """Make the cache of `spec` at `out`, or finish it; returns `out`.

    With a `share`, one process of several: only its part of the cache, beside `out`, whose folder
    is returned. `merge` joins the parts to the bytes that one process writes.

    Stopped at any moment and run again, it keeps the finished shards and ends with the same bytes
    (on the same machine, with the same `batch_tokens` and `compiled`; otherwise within the dtype's
    tolerance).

    Raises: UserError for anything the user can put right.
    """
    check_batch(batch_tokens)
    out = share.folder(out) if share else out
    prepared = prepare(with_engine(spec, device, out))
    engine = engine_for(prepared, device, tensor_parallel, compiled=compiled)
    budget = engine.batch_tokens if batch_tokens is None else batch_tokens
    fill(prepared, engine, out, batch_tokens=budget, shard_rows=shard_rows, share=share)
    return out


def fill(
    prepared: Prepared,
    engine: Engine,
    out: Path,
    *,
    batch_tokens: int,
    shard_rows: int = SHARD_ROWS,
    share: Share | None = None,
) -> float:
    """Make the cache, or the share's part of it, at `out`, or finish it, with a loaded engine.

    Returns the seconds in which the thread that reads, done with a shard, waited until the one
    before was written.
    Raises: see `extract`.
    """
    lengths = prepared.lengths
    ranges = [
        range(first, min(first + shard_rows, len(lengths)))
        for first in range(0, len(lengths), shard_rows)
    ]
    tokens = [int(lengths[rows].sum()) for rows in ranges]
    part = share.part(tokens) if share else None
    shards = part.shards if part else range(len(ranges))
    with open_writer(
        out,
        identity=prepared.identity,
        environment=provenance() | engine.environment | {"batch_tokens": batch_tokens},
        extraction=prepared.spec.model_dump(mode="json"),
        data={
            "splits": prepared.dataset.split_counts(),
            "exclusions": prepared.dataset.reason_counts(),
            "rules": prepared.dataset.rules,
        },
        tables={
            "pairs": prepared.dataset.pairs,
            "members": prepared.dataset.members,
            "exclusions": prepared.dataset.exclusions,
            "leaks": prepared.leaks,
        },
        n_responses=len(lengths),
        shard_rows=shard_rows,
        lm_head=engine.head.tensors,
        part=part,
    ) as writer:
        whole, done = (sum(tokens[index] for index in some) for some in (shards, writer.done))
        with (
            progress("extract", whole, "tokens", done) as bar,
            ThreadPoolExecutor(1, "writer") as thread,
        ):
            # A shard is written while the next is read; at most one waits, so memory is bounded.
            # Leaving the block, however it ends, waits for the shard in flight.
            writing: Future[None] = thread.submit(lambda: None)
            waited = 0.0
            left = [index for index in shards if index not in writer.done]
            asked = (prepared.requests(ranges[index]) for index in left)
            answers = read_shards(engine, asked, batch_tokens, bar.advance)
            for index, (requests, batch) in zip(left, answers, strict=True):
                start = time.perf_counter()
                writing.result()
                waited += time.perf_counter() - start
                shard = _shard(prepared, ranges[index], requests, batch)
                writing = thread.submit(writer.write_shard, index, *shard)
            writing.result()
        writer.finish()
    return waited


def with_engine(spec: ExtractSpec, device: str, out: Path | None = None) -> ExtractSpec:
    """`spec` with the engine named that it gets: unless it names one, what began the cache at
    `out`, and for a new cache what this machine has.

    Raises: UserError when that is vLLM, and vLLM is not installed or cannot give its views; when
    the manifest at `out` is damaged.
    """
    engine = spec.engine
    if engine == "auto" and out and (out / NAME).exists():
        engine = made_by(read_manifest(out))
    if engine == "auto":
        fits = device in ("auto", "cuda") and vllm_engine.usable(spec.states)
        engine = "vllm" if fits else "transformers"
    elif engine == "vllm":
        vllm_engine.refuse_unusable(spec.states)
    return spec.model_copy(update={"engine": engine})


def made_by(manifest: Manifest) -> EngineName:
    """The engine that read what a cache holds."""
    return "vllm" if manifest.identity.get("engine") == "vllm" else "transformers"


def engine_for(
    prepared: Prepared, device: str, tensor_parallel: int = 1, *, compiled: bool = False
) -> Engine:
    """The engine that an extraction runs, `tensor_parallel` GPUs together, or `compiled`.

    Raises: see `load_engine` and `load_vllm`.
    """
    spec = prepared.spec
    wanted: dict[str, Any] = {
        "dtype": spec.dtype,
        "device": device,
        "views": spec.states,
        "top_k": spec.top_k,
        "tail_mean": spec.tail_mean,
        "trust_remote_code": spec.trust_remote_code,
    }
    if spec.engine == "vllm":
        if compiled:
            raise UserError(
                "--compile is for the transformers engine, and vLLM compiles by itself: leave it "
                "out, or add --engine transformers"
            )
        return vllm_engine.load_vllm(
            prepared.folder,
            max_length=int(prepared.lengths.max()),
            tensor_parallel=tensor_parallel,
            **wanted,
        )
    if tensor_parallel > 1:
        raise UserError(
            f"tensor_parallel = {tensor_parallel} is for vLLM: add --engine vllm, or leave it out"
        )
    return load_engine(prepared.folder, compiled=compiled, **wanted)


def _shard(
    prepared: Prepared, rows: range, requests: Sequence[Request], batch: Batch
) -> tuple[ShardRows, TokenTable | None]:
    encoded = [prepared.encoded[row] for row in rows]
    responses = prepared.dataset.responses[rows.start : rows.stop]
    shard = ShardRows(
        first=rows.start,
        response_id=responses["response_id"].to_list(),
        prompt_id=responses["prompt_id"].to_list(),
        n_prompt=np.array([entry.n_prompt for entry in encoded], dtype=np.int32),
        n_response=np.array([entry.n_response for entry in encoded], dtype=np.int32),
        truncated=np.array([entry.truncated for entry in encoded], dtype=np.bool_),
        final_position=np.array([entry.final_position for entry in encoded], dtype=np.int32),
        final_token=np.array([entry.final_token for entry in encoded], dtype=np.int32),
        S=batch.S,
        states={view: to_stored(states) for view, states in batch.states.items()},
        norms={view: norms.numpy() for view, norms in batch.norms.items()},
    )
    if not prepared.spec.token_rows:
        return shard, None
    counts = [len(request.positions) for request in requests]
    tail_means = batch.tokens.tail_means
    return shard, TokenTable(
        response=np.repeat(np.array(rows, dtype=np.int32), counts),
        position=np.concatenate([request.positions for request in requests]),
        target=batch.targets.numpy(),
        target_logit=batch.tokens.target_logit.numpy(),
        logsumexp=batch.tokens.logsumexp.numpy(),
        states=to_stored(batch.token_states),
        top_ids=batch.tokens.top_ids.numpy(),
        top_logits=batch.tokens.top_logits.numpy(),
        tail_means=None if tail_means is None else to_stored(tail_means),
    )
