"""Measure extraction against calling the model directly, on the same texts and weights."""

import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embrm.core.errors import UserError
from embrm.core.files import write_bytes
from embrm.core.progress import progress
from embrm.core.sampling import evenly_spaced
from embrm.data.sources import parse_source
from embrm.extraction.engine import Request
from embrm.extraction.positions import predicting_positions
from embrm.extraction.probe import BATCH_TOKENS
from embrm.extraction.reading import batches_by_length, read, read_shards
from embrm.extraction.run import SHARD_ROWS, fill
from embrm.extraction.spec import ExtractSpec
from embrm.extraction.texts import PreparedTexts, prepare_texts
from embrm.extraction.transformers_engine import TransformersEngine, load_engine, padded
from embrm.extraction.vllm_engine import installed_version, load_vllm

PER_PROMPT = 10
"""Responses to each prompt in the part "prefix"."""

_MOST = 2048
"""Most responses that a part other than "writer" reads; one at a time, so many take minutes."""

_COMPARED = 64
"""Most responses that the part "batches" reads in batches of other sizes."""

_SCRIPT_TEXTS = 8
"""Texts in a batch of a plain script: the default batch size of the trainers of transformers."""

_SAME = "model alone, same batches"

_NO_POSITIONS = np.empty(0, np.int32)
_LOGIT_ROWS = 2048
"""Rows of logits that the bare model computes at once; more might not fit in a GPU's memory."""
_HEAD_WIDTH = 64
_VLLM_MEMORY = 0.5
"""Share of a GPU's memory for vLLM; the transformers engine needs the rest."""


@dataclass(frozen=True)
class Size:
    """Size of the model with random weights, a Llama.

    Raises: UserError for a width that is no multiple of 64, the width of an attention head.
    """

    width: int = 512
    layers: int = 6
    vocabulary: int = 16_384

    def __post_init__(self) -> None:
        if self.width % _HEAD_WIDTH:
            raise UserError(
                f"--width {self.width}: attention heads have a width of {_HEAD_WIDTH}: take a "
                "multiple of it"
            )


@dataclass(frozen=True)
class _Bench:
    """Settings of all parts.

    budget: most tokens in a batch; rounds: times that each row is measured; peak: floating-point
    operations per second of a large matrix product.
    """

    engine: TransformersEngine
    budget: int
    rounds: int
    peak: float


def measure_extraction(
    folder: Path,
    model: str | None = None,
    data: Sequence[str] = (),
    *,
    dtype: str = "float32",
    device: str = "auto",
    batch_tokens: int | None = None,
    responses: int = 32,
    rounds: int = 3,
    size: Size = Size(),
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Measure about `responses` texts; yields each part's name and rows once it is measured.

    model, data: as in `embrm extract`; without them, a model of `size` and synthetic pairs, written
    below `folder` and deleted at the end. Each of `rounds` rounds times every row of a part once,
    in random order, on all of torch's threads. Rates are those of a row's fastest round; "times"
    are medians over rounds of the ratio of seconds to another row's in the same round.
    Raises: UserError for data without a model, and whatever `embrm extract` refuses.
    """
    if data and not model:
        raise UserError("--data needs --model, whose tokenizer reads it: name both, or neither")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        here = Path(name)
        sources = data or [str(made_pairs(here / "pairs.jsonl", responses))]
        spec = ExtractSpec.parse(
            {
                "model": model or str(made_model(here / "model", size)),
                "data": [parse_source(source) for source in sources],
                "dtype": dtype,
                "engine": "transformers",
                "token_rows": 8,
            },
            "command line",
        )
        prepared = prepare_texts(spec)
        engine = load_engine(prepared.folder, dtype=dtype, device=device, top_k=spec.top_k)
        budget = engine.batch_tokens if batch_tokens is None else batch_tokens
        bench = _Bench(engine, budget, rounds, _peak(engine.head.weight))
        requests = prepared.requests(_whole_prompts(prepared, min(responses, _MOST)))
        yield "speed", _speed(bench, requests)
        yield "batches", _batches(bench, requests[:_COMPARED])
        yield "prefix", _prefix(bench, min(responses, _MOST), int(prepared.lengths.max()) // 2)
        some = spec.model_copy(update={"limit": max(1, responses // 2)})
        yield "writer", _writer(bench, prepare_texts(some), here / "cache")
        if installed_version():  # last, because vLLM keeps its processes and memory to the end
            try:
                rows = _vllm(bench, prepared, requests)
            except UserError as error:
                rows = [{"engine": "vllm", "left out": str(error)}]
            yield "vllm", rows


def _speed(bench: _Bench, requests: list[Request]) -> list[dict[str, Any]]:
    """Compare the engine with the model alone on the same texts, batched in several ways.

    "model alone" computes what every user of the model needs: states, and logits at the positions
    that predict the response. "plain script" calls the whole model with an attention mask, as its
    documentation does, and so computes logits at all positions.
    "tokens/s": tokens of the texts per second, where a prompt counts for each of its responses.
    "read": tokens that went through the model, padding included.
    "times": seconds relative to the engine's.
    "of peak": rate of the matrix products with weights that are needed, relative to the measured
    rate of a large matrix product.
    """
    engine, budget = bench.engine, bench.budget
    lengths = [len(request.ids) for request in requests]
    bare = [replace(request, positions=_NO_POSITIONS) for request in requests]
    own = engine.batches(bare, budget)
    few = [
        [*range(first, min(first + _SCRIPT_TEXTS, len(bare)))]
        for first in range(0, len(bare), _SCRIPT_TEXTS)
    ]

    def in_rows(some: Sequence[Request]) -> None:
        ids, places = padded(some)
        engine.model.set_attn_implementation(engine.environment["attention"])
        hidden = engine.model.base_model(input_ids=ids.to(engine.model.device), use_cache=False)
        _logits(engine, hidden.last_hidden_state.flatten(0, 1), places, some)

    def plainly(some: Sequence[Request]) -> None:
        ids, places = padded(some)
        mask = torch.zeros(ids.numel(), dtype=torch.int64)
        mask[torch.from_numpy(np.concatenate(places))] = 1
        engine.model.set_attn_implementation(engine.environment["attention"])
        engine.model(
            input_ids=ids.to(engine.model.device),
            attention_mask=mask.view_as(ids).to(engine.model.device),
            output_hidden_states=True,
            use_cache=False,
        )

    def each(
        one: Callable[[Sequence[Request]], None], batches: list[list[int]]
    ) -> Callable[[], None]:
        return partial(_each, one, bare, batches)

    ways: dict[str, Callable[[], object]] = {
        "engine": lambda: read(engine, bare, budget),
        "engine, 8 token rows": lambda: read(engine, requests, budget),
        _SAME: each(partial(_alone, engine), own),
        "model alone, sorted and padded": each(in_rows, batches_by_length(lengths, budget)),
        "model alone, unsorted and padded": each(in_rows, _in_order(lengths, budget)),
        f"model alone, unsorted, {_SCRIPT_TEXTS} a batch": each(in_rows, few),
        "model alone, one at a time": each(in_rows, [[index] for index in range(len(bare))]),
        f"plain script, {_SCRIPT_TEXTS} a batch, padded": each(plainly, few),
    }
    done = _timed(bench, ways, beside="engine")
    rows: list[dict[str, Any]] = [
        {
            "way": "limit: a matrix product",
            "tokens/s": None,
            "read": None,
            "padding": None,
            "times": None,
            "TFLOP/s": bench.peak / 1e12,
            "of peak": 1.0,
        }
    ]
    whole = sum(lengths)
    for way, (seconds, slots, times) in done.items():
        # Packed batches have no padding, and share prompts, so they may read fewer tokens.
        needed = min(slots, whole)
        rows.append(
            {
                "way": way,
                "tokens/s": whole / seconds,
                "read": slots,
                "padding": 1 - needed / slots,
                "times": times,
                **_utilisation(bench, requests, needed, seconds),
            }
        )
    return rows


def _batches(bench: _Bench, requests: list[Request]) -> list[dict[str, Any]]:
    """Compare the results of batches of other sizes with those of the benchmark's batch size.

    "state": largest ‖difference‖ / ‖state‖ over responses. "logsumexp": largest absolute difference
    over token rows. "S": largest difference relative to S over responses.
    """
    own = read(bench.engine, requests, bench.budget)
    rows = []
    for budget in BATCH_TOKENS:
        other = read(bench.engine, requests, budget)
        state = own.states["last"].float()
        error = (other.states["last"].float() - state).norm(dim=1) / state.norm(dim=1)
        logsumexp = np.abs(other.tokens.logsumexp - own.tokens.logsumexp)
        rows.append(
            {
                "tokens a batch": budget,
                "beside": bench.budget,
                "state": float(error.max()),
                "logsumexp": float(logsumexp.max()),
                "S": float(np.abs((other.S - own.S) / own.S).max()),
            }
        )
    return rows


def _prefix(bench: _Bench, responses: int, most: int) -> list[dict[str, Any]]:
    """Compare shared prompts with repeated ones, on random texts with ten responses per prompt.

    most: maximum number of tokens of a prompt, and of a response.
    "saved": share of the texts' tokens that did not go through the model. "could": that share if
    every prompt is read exactly once. "error": largest difference between components of states,
    relative to the largest component.
    """
    engine = bench.engine
    random = np.random.default_rng(0)
    vocabulary = engine.head.weight.shape[0]
    prompts = max(1, responses // PER_PROMPT)
    requests = []
    for n_prompt in _lengths(random, prompts, 120, 0.5).clip(1, most):
        prompt = random.integers(0, vocabulary, n_prompt)
        for n in _lengths(random, PER_PROMPT, 120, 0.5).clip(1, most):
            ids = np.concatenate([prompt, random.integers(0, vocabulary, n)]).astype(np.int32)
            requests.append(Request(ids, int(n_prompt), len(ids) - 1, _NO_POSITIONS))
    # Each part has one response of every prompt, so there are no prompts to share.
    apart = [requests[first::PER_PROMPT] for first in range(PER_PROMPT)]
    found: dict[str, Tensor] = {}

    def alone() -> None:
        parts = [read(engine, part, bench.budget).states["last"] for part in apart]
        found["alone"] = torch.stack(parts, dim=1).flatten(0, 1)

    def together() -> None:
        found["together"] = read(engine, requests, bench.budget).states["last"]

    ways = {"every response with its prompt": alone, "prompts shared": together}
    done = _timed(bench, ways, beside="prompts shared")
    whole = sum(len(request.ids) for request in requests)
    once = sum(request.n_prompt for request in requests[::PER_PROMPT])
    difference = (found["together"].float() - found["alone"].float()).abs().max()
    return [
        {
            "way": way,
            "tokens/s": whole / seconds,
            "read": slots,
            "saved": 1 - slots / whole,
            "could": (PER_PROMPT - 1) * once / whole,
            "times": times,
            "error": float(difference / found["alone"].float().abs().max()),
        }
        for way, (seconds, slots, times) in done.items()
    ]


def _vllm(bench: _Bench, prepared: PreparedTexts, requests: list[Request]) -> list[dict[str, Any]]:
    """Compare vLLM with the transformers engine, with token rows, on the texts of part "speed".

    "times": seconds relative to the model alone in the batches of the transformers engine. How many
    products vLLM's prefix cache saves is unknown, so "of peak" counts those that these batches need
    in every row.
    """
    on_cuda = bench.engine.model.device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()  # vLLM counts memory that torch has cached as occupied
    settings: dict[str, Any] = {"gpu_memory_utilization": _VLLM_MEMORY} if on_cuda else {}
    other = load_vllm(
        prepared.folder,
        dtype=prepared.spec.dtype,
        top_k=prepared.spec.top_k,
        max_length=int(prepared.lengths.max()),
        **settings,
    )
    own = bench.engine.batches(requests, bench.budget)
    ways: dict[str, Callable[[], object]] = {
        _SAME: partial(_each, partial(_alone, bench.engine), requests, own),
        "transformers": partial(read, bench.engine, requests, bench.budget),
        "vllm": partial(read, other, requests, other.batch_tokens),
    }
    done = _timed(bench, ways, beside=_SAME)
    whole = sum(len(request.ids) for request in requests)
    _, slots, _ = done[_SAME]
    return [
        {
            "engine": way,
            "tokens/s": whole / seconds,
            "times": times,
            **_utilisation(bench, requests, min(slots, whole), seconds),
        }
        for way, (seconds, _, times) in done.items()
    ]


def _writer(bench: _Bench, prepared: PreparedTexts, out: Path) -> list[dict[str, Any]]:
    """Compare an extraction with reading the same shards without writing anything.

    The model is loaded and the data prepared beforehand. Shards have their usual size, or an eighth
    of the responses if that is less. "times": what writing tables, LM head and shards costs.
    "waited": share of the seconds, median over rounds, in which the reading thread had finished a
    shard and waited until the previous one was written. It does not include the writing of tables,
    LM head and last shard, nor the processor time that the writing thread takes from a model on
    the CPU; "times" does.
    """
    rows = len(prepared.encoded)
    shard_rows = min(SHARD_ROWS, -(-rows // 8))
    folders = (out.with_name(f"{out.name}-{number}") for number in itertools.count())
    waits: list[float] = []

    def unwritten() -> None:
        ranges = (range(i, min(i + shard_rows, rows)) for i in range(0, rows, shard_rows))
        for _ in read_shards(bench.engine, map(prepared.requests, ranges), bench.budget):
            pass

    def written() -> None:
        start = time.perf_counter()
        waited = fill(
            prepared,
            bench.engine,
            next(folders),
            batch_tokens=bench.budget,
            shard_rows=shard_rows,
        )
        waits.append(waited / (time.perf_counter() - start))

    done = _timed(
        bench, {"without writing": unwritten, "extract": written}, beside="without writing"
    )
    return [
        {
            "way": way,
            "seconds": seconds,
            "times": times,
            "waited": float(np.median(waits)) if way == "extract" else 0.0,
        }
        for way, (seconds, _, times) in done.items()
    ]


def _timed(
    bench: _Bench, ways: Mapping[str, Callable[[], object]], beside: str
) -> dict[str, tuple[float, int, float]]:
    """Time `ways`. For each: seconds of the fastest round; tokens that went through the model in a
    round; median over rounds of its seconds relative to those of the way `beside`.

    Ratios within a round change little when the machine slows down for a while. The order is drawn
    anew for each round, because what one way leaves in memory and caches costs the next one some
    percent.
    """
    slots = 0

    def count(_: Any, inputs: tuple[Tensor, ...], __: Any) -> None:
        nonlocal slots
        slots += inputs[0].numel()

    handle = bench.engine.model.get_input_embeddings().register_forward_hook(count)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    read_by: dict[str, int] = {}
    order = np.random.default_rng(0)
    with torch.inference_mode(), progress("bench", bench.rounds * len(ways), "rounds") as bar:
        for _ in range(bench.rounds):
            for way in order.permutation(list(ways)).tolist():
                slots = 0
                start = time.perf_counter()
                ways[way]()
                if bench.engine.model.device.type == "cuda":
                    torch.cuda.synchronize(bench.engine.model.device)
                seconds[way].append(time.perf_counter() - start)
                read_by[way] = slots
                bar.advance()
    handle.remove()
    return {
        way: (min(own), read_by[way], float(np.median(np.divide(own, seconds[beside]))))
        for way, own in seconds.items()
    }


def _utilisation(
    bench: _Bench, requests: Sequence[Request], tokens: int, seconds: float
) -> dict[str, float]:
    """Rate of the matrix products with weights, and its share of the peak, if `tokens` tokens go
    through the model and logits are computed where they predict the responses."""
    base = sum(
        weight.numel()
        for module in bench.engine.model.base_model.modules()
        if not isinstance(module, torch.nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.ndim == 2
    )
    logits = sum(len(predicting_positions(r.n_prompt, len(r.ids))) for r in requests)
    rate = 2 * (base * tokens + bench.engine.head.weight.numel() * logits) / seconds
    return {"TFLOP/s": rate / 1e12, "of peak": rate / bench.peak}


def _each(
    one: Callable[[Sequence[Request]], None],
    requests: Sequence[Request],
    batches: Sequence[Sequence[int]],
) -> None:
    for batch in batches:
        one([requests[index] for index in batch])


def _alone(engine: TransformersEngine, requests: Sequence[Request]) -> None:
    """Compute the states of a batch, and logits where they predict the responses."""
    hidden, places = engine.hidden(requests)
    _logits(engine, hidden["last"], places, requests)


def _logits(
    engine: TransformersEngine,
    states: Tensor,
    places: Sequence[npt.NDArray[np.int64]],
    requests: Sequence[Request],
) -> None:
    spans = [predicting_positions(r.n_prompt, len(r.ids)) for r in requests]
    rows = [own[s.start : s.stop] for own, s in zip(places, spans, strict=True)]
    for some in torch.from_numpy(np.concatenate(rows)).to(states.device).split(_LOGIT_ROWS):
        engine.model.get_output_embeddings()(states[some])


def _in_order(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Batches of consecutive texts with at most `batch_tokens` tokens each, padding included."""
    batches: list[list[int]] = []
    most = 0
    for index, length in enumerate(lengths):
        most = max(most, length)
        if batches and (len(batches[-1]) + 1) * most <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            most = length
    return batches


def _whole_prompts(prepared: PreparedTexts, responses: int) -> list[int]:
    """Indices of all responses to evenly spaced prompts, about `responses` of them."""
    prompts = prepared.dataset.responses["prompt_id"].to_list()
    distinct = list(dict.fromkeys(prompts))
    count = max(1, min(len(distinct), responses * len(distinct) // len(prompts)))
    kept = {distinct[i] for i in evenly_spaced(len(distinct), count)}
    return [row for row, prompt in enumerate(prompts) if prompt in kept]


def _peak(weight: Tensor) -> float:
    """Operations per second of a large matrix product with the dtype and device of `weight`."""
    side = 8192 if weight.is_cuda else 2048
    a, b = (torch.randn(side, side, device=weight.device).to(weight.dtype) for _ in range(2))
    out = torch.mm(a, b)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def _lengths(random: np.random.Generator, count: int, median: float, spread: float) -> Any:
    """Log-normal lengths, int64 [count]."""
    return random.lognormal(np.log(median), spread, count).clip(1, 900).astype(np.int64)


def made_pairs(path: Path, responses: int) -> Path:
    """Write pairs of random words, with lengths like those of chats; returns `path`."""
    random = np.random.default_rng(0)
    pairs = max(1, responses // 2)
    lengths = np.stack([_lengths(random, pairs, median, 0.9) for median in (60, 150, 150)], axis=1)
    rows = []
    for three in lengths:
        texts = (" ".join(f"w{n}" for n in random.integers(0, 1000, size)) for size in three)
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def made_model(folder: Path, size: Size) -> Path:
    """Save a Llama with random weights and a tokenizer with one token per word; returns `folder`.

    As in current models, the sides of matrices are multiples that GPU kernels handle fast, and four
    attention heads share their keys and values if there are at least eight heads.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(1000))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    torch.manual_seed(0)
    heads = size.width // _HEAD_WIDTH
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        # Llama's rule: 8/3 of the width, up to a multiple of 256.
        intermediate_size=-(-8 * size.width // (3 * 256)) * 256,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=math.gcd(heads, max(1, heads // 4)),
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
