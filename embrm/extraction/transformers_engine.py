"""The transformers engine, the reference implementation, on CPU, CUDA or MPS.

This module has the functions of `EngineModule`.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from embrm.cache.schema import TokenRows
from embrm.cache.tensors import to_stored
from embrm.core.errors import UserError
from embrm.extraction import packing
from embrm.extraction.engine import TOLERANCE, Batch, EngineSettings, Request
from embrm.extraction.packing import Packed, pack_texts
from embrm.extraction.positions import predicting_positions
from embrm.extraction.reading import batches_by_length
from embrm.extraction.statistics import response_statistics, to_device
from embrm.lm.head import LmHead
from embrm.lm.loading import load_model
from embrm.lm.tokens import reason_of

BATCH_TOKENS = {"cpu": 2048, "cuda": 65536, "mps": 16384}
"""Default token budget of a batch, padding included, by device type."""


def suits(views: Sequence[str], device: str) -> bool:  # noqa: ARG001
    """Always true: this engine gives every view on every device."""
    return True


def refuse_unusable(views: Sequence[str]) -> None:
    """Never raises: see `suits`. A view that the model lacks is refused on loading."""


def open_engine(settings: EngineSettings) -> "TransformersEngine":
    """Load the engine for an extraction. Raises: UserError as `load_engine` does."""
    if settings.tensor_parallel > 1:
        raise UserError(
            f"tensor_parallel = {settings.tensor_parallel} is for vLLM only: add engine = 'vllm' "
            "(--engine vllm), "
            "or leave it out"
        )
    return load_engine(
        settings.folder,
        dtype=settings.dtype,
        device=settings.device,
        views=settings.views,
        top_k=settings.top_k,
        tail_mean=settings.tail_mean,
        trust_remote_code=settings.trust_remote_code,
        compiled=settings.compiled,
    )


def load_engine(
    folder: Path,
    *,
    dtype: str,
    device: str = "auto",
    views: Sequence[str] = ("last",),
    top_k: int = 0,
    tail_mean: bool = False,
    trust_remote_code: bool = False,
    compiled: bool = False,
) -> "TransformersEngine":
    """Load the causal LM at `folder` as an engine. compiled: use torch.compile.

    Raises: UserError when the model cannot be loaded (see `load_model`), when the engine refuses it
    (see `TransformersEngine`), or when torch.compile fails on it.
    """
    model = load_model(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    engine = TransformersEngine(model, views, top_k, tail_mean)
    if compiled:
        engine.compile()
    return engine


class TransformersEngine:
    """A causal LM in memory. Create it with `load_engine`."""

    def __init__(
        self, model: Any, views: Sequence[str], top_k: int, tail_mean: bool = False
    ) -> None:
        """Wrap a model that is in evaluation mode.

        Raises: UserError when its logits are not those of `LmHead`, when a state depends on later
        tokens, or when the model lacks one of the views.
        """
        self.head = LmHead.from_model(model)
        self.width: int = self.head.weight.shape[1]
        self.batch_tokens = BATCH_TOKENS[model.device.type]
        self.environment: dict[str, Any] = {
            "engine": "transformers",
            "attention": model.config._attn_implementation,
            "device": _device_name(model.device),
        }
        self.model = model
        self._views = tuple(views)
        self._top_k = top_k
        self._tail_mean = tail_mean
        self._layers = [int(view.removeprefix("layer:")) for view in views if ":" in view]
        self._before_norm: Tensor | None = None
        self._own_attention: str = model.config._attn_implementation
        self._longest_packed = 0
        if model.base_model is model:
            raise UserError(
                f"{type(model).__name__} has no base model, whose output embrm caches: "
                "use another architecture"
            )
        with torch.inference_mode():
            self._check_layers()
            if "prenorm" in views:
                self._hook_final_norm()
            self._check_logits()
            self._check_causality()
            why_not = self._try_packing()
        if why_not:
            print(
                f"warning: {type(model).__name__} is read in padded batches, and a shared prompt "
                f"again for each response: if texts were packed, {why_not}",
                file=sys.stderr,
            )
        elif self._longest_packed < sys.maxsize:
            print(
                f"warning: texts of more than {self._longest_packed:,} tokens, the attention "
                f"window of {type(model).__name__}, are read in padded batches, prompts included",
                file=sys.stderr,
            )
        self.environment["batches"] = "padded" if why_not else "packed"

    def compile(self) -> None:
        """Compile the base model with torch.compile, for batches of any size.

        Raises: UserError when compiling fails or changes the states.
        """
        ids, none = self._probe_ids().cpu().numpy().astype(np.int32), np.empty(0, np.int32)
        requests = [Request(text, 9, len(text) - 1, none) for text in (ids, ids[:12])]
        expected = self.hidden(requests)[0]["last"]
        self.model.base_model.compile(dynamic=True)
        reason = None
        try:
            if not self._close(self.hidden(requests)[0]["last"], expected):
                reason = "it changes the states"
        except Exception as error:  # without a compiler, or for models it cannot compile
            reason = reason_of(error)
        if reason:
            raise UserError(
                f"torch.compile fails on {type(self.model).__name__} ({reason}): "
                "leave out compiled (--compile)"
            )
        self.environment["compiled"] = True

    def batches(self, requests: Sequence[Request], batch_tokens: int) -> list[list[int]]:
        """Batches to pack if the texts can be packed, else of texts of similar length."""
        lengths = [len(request.ids) for request in requests]
        some = [index for index, length in enumerate(lengths) if length <= self._longest_packed]
        rest = [index for index, length in enumerate(lengths) if length > self._longest_packed]
        packed = packing.batches([requests[index] for index in some], batch_tokens)
        alike = batches_by_length([lengths[index] for index in rest], batch_tokens)
        return [
            *([some[index] for index in batch] for batch in packed),
            *([rest[index] for index in batch] for batch in alike),
        ]

    def forward(self, batches: Iterable[Sequence[Request]]) -> Iterator[Batch]:
        """Read each batch packed, or right-padded if a text is too long to be packed.

        A GPU reads the next batch while an answer is copied and yielded, unless the model has to
        wait for a value on the CPU (as padded masks and longrope do).
        """
        before: _Answer | None = None
        for requests in batches:
            try:
                begun = self._begin(requests)
            except UserError:
                if before:  # yield it first: it may complete a shard
                    yield before.batch()
                raise
            if before:
                yield before.batch()
            before = begun
        if before:
            yield before.batch()

    def _begin(self, requests: Sequence[Request]) -> "_Answer":
        try:
            return self._read(requests)
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory on {self.model.device} with a batch of "
                f"{sum(len(request.ids) for request in requests):,} tokens: lower batch_tokens "
                "(--batch-tokens); "
                "finished shards are kept"
            ) from None
        except TorchDynamoException as error:  # a shape that compile() did not try
            raise UserError(
                f"torch.compile fails on {type(self.model).__name__} ({reason_of(error)}): run "
                "again without compiled (--compile); finished shards are kept"
            ) from None

    @torch.inference_mode()
    def _read(self, requests: Sequence[Request]) -> "_Answer":
        hidden, places = self.hidden(requests)
        post, dtype = hidden["last"], self.head.weight.dtype
        entries = list(zip(requests, places, strict=True))
        spans = [predicting_positions(request.n_prompt, len(request.ids)) for request in requests]
        final = _joined([own[[r.final_position]] for r, own in entries], post.device)
        pooled = {
            view: torch.stack([_mean(post, own[r.n_prompt :]) for r, own in entries])
            if view == "mean"
            else hidden[view][final]
            for view in self._views
        }
        predicting = [own[s.start : s.stop] for own, s in zip(places, spans, strict=True)]
        targets = [r.ids[s.start + 1 : s.stop + 1] for r, s in zip(requests, spans, strict=True)]
        terms, tokens = response_statistics(
            self.head,
            post[_joined(predicting, post.device)],
            _joined(targets, post.device),
            spans,
            [request.positions for request in requests],
            self._top_k,
            tail_mean=self._tail_mean,
        )
        return _Answer.copied(
            states={view: state.to(dtype) for view, state in pooled.items()},
            norms={view: state.float().norm(dim=1) for view, state in pooled.items()},
            terms=terms,
            tokens=tokens,
            spans=spans,
        )

    @torch.inference_mode()
    def hidden(
        self, requests: Sequence[Request]
    ) -> tuple[dict[str, Tensor], list[npt.NDArray[np.int64]]]:
        """Run the model on one batch, without computing statistics.

        Returns view → states [places, d], always with "last", and for each request the indices of
        its tokens in them, int64 [length].

        No attention mask is passed. In a padded batch, causal attention keeps tokens from attending
        to the padding on their right, and positions count from the left; without a mask, the fast
        causal kernels are used. `_check_causality` tests that the model is causal. For packed
        batches see `embrm.extraction.packing`.
        """
        device = self.model.device
        if max(len(request.ids) for request in requests) <= self._longest_packed:
            packed = pack_texts(requests, device)
            hidden = self._hidden_packed(packed)
            places = packed.places
        else:
            self._use_attention(self._own_attention)
            ids, places = padded(requests)
            hidden = self._hidden(to_device(ids.numpy(), device))
        return {view: states.flatten(0, 1) for view, states in hidden.items()}, places

    def _use_attention(self, implementation: str) -> None:
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)

    def _hidden_packed(
        self, packed: Packed, attention: str = packing.ATTENTION, **inputs: Any
    ) -> dict[str, Tensor]:
        self._use_attention(attention)
        return self._hidden(packed.ids, position_ids=packed.positions, packed=packed, **inputs)

    def _hidden(self, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
        """View → states [n, length, d] of ids int64 [n, length], always with "last"."""
        output = self.model.base_model(
            input_ids=ids, use_cache=False, output_hidden_states=bool(self._layers), **inputs
        )
        hidden = {"last": output.last_hidden_state}
        if self._before_norm is not None:
            hidden["prenorm"] = self._before_norm
        for layer in self._layers:
            hidden[f"layer:{layer}"] = output.hidden_states[layer]
        return hidden

    def _check_layers(self) -> None:
        layers = self.model.config.get_text_config().num_hidden_layers
        for layer in self._layers:
            if layer >= layers:
                raise UserError(
                    f"states: view 'layer:{layer}' is not in this model: use layer:0 (embeddings) "
                    f"to layer:{layers - 1}; the output of the last layer is 'prenorm'"
                )

    def _hook_final_norm(self) -> None:
        """Record the input of the final norm: the module whose output is that of the base model."""
        produced: list[tuple[torch.nn.Module, Tensor]] = []

        def note(module: torch.nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor) and "norm" in type(module).__name__.lower():
                produced.append((module, output))

        def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._before_norm = inputs[0]

        base = self.model.base_model
        handles = [module.register_forward_hook(note) for module in base.modules()]
        last = self._hidden(self._probe_ids()[None])["last"]
        for handle in handles:
            handle.remove()
        norms = [module for module, output in produced if output.data_ptr() == last.data_ptr()]
        if not norms:
            raise UserError(
                "states: view 'prenorm' is not in this model, which does not end with a norm: "
                "leave it out"
            )
        norms[-1].register_forward_pre_hook(keep)

    def _probe_ids(self) -> Tensor:
        """A short sequence, int64 [16], spread over the vocabulary."""
        vocabulary = self.head.weight.shape[0]
        return torch.arange(16, device=self.model.device) * (vocabulary // 16)

    def _check_logits(self) -> None:
        ids = self._probe_ids()[None]
        expected = self.model(input_ids=ids, use_cache=False).logits[0].float()
        if not expected.isfinite().all():
            raise UserError(
                f"{type(self.model).__name__} gives logits that are NaN or infinite: "
                "check its weights; a model trained in bfloat16 may not fit float16"
            )
        if not self._close(self.head.logits(self._hidden(ids)["last"][0]), expected):
            raise UserError(
                f"{type(self.model).__name__} computes its logits in a way that embrm does not "
                "support, so S and token rows would be wrong: use another architecture"
            )

    def _check_causality(self) -> None:
        ids = self._probe_ids()
        both = torch.stack([ids, torch.where(torch.arange(16, device=ids.device) < 6, ids, 0)])
        alone = self._hidden(ids[None, :6])["last"][0]
        if not self._close(self._hidden(both)["last"][1, :6], alone):
            raise UserError(
                f"{type(self.model).__name__} is not causal (a token's state depends on later "
                "tokens): use a causal LM"
            )

    def _try_packing(self) -> str | None:
        """Enable packing if packed texts have the same states as texts read alone.

        Returns None, or the reason why texts cannot be packed.
        """
        config = self.model.config.get_text_config()
        ids = self._probe_ids().cpu().numpy().astype(np.int32)
        texts = [(ids[:11], 9), (np.concatenate([ids[:9], ids[:2:-1]]), 9), (ids[::-1], 0)]
        none = np.empty(0, np.int32)
        requests = [Request(text, prompt, len(text) - 1, none) for text, prompt in texts]
        alone = torch.cat([self.hidden([request])[0]["last"] for request in requests])
        reason = None
        try:
            packed = pack_texts(requests, self.model.device)
            hidden = self._hidden_packed(packed)["last"]
            # Llama 4 scales queries by their position in the sequence, in steps longer than these
            # texts, so the comparison below would not detect it.
            if getattr(config, "attn_temperature_tuning", False):
                reason = "a token's attention would depend on where its text is packed"
            elif not self._close(hidden[0][np.concatenate(packed.places)], alone):
                reason = "a token's state would depend on other texts"
        except Exception as error:  # any error of a model that does not support packed texts
            reason = reason_of(error)
        if reason:
            self._use_attention(self._own_attention)
        else:
            self._longest_packed = self._longest_packable(packed)
        return reason

    def _longest_packable(self, packed: Packed) -> int:
        """Maximum length of a text that can be packed.

        Packed attention applies the sliding windows that the model passes to it, but not a window
        or chunk (Llama 4) that is only in the model's mask. Texts up to the length of that window
        or chunk are not affected by it.
        """
        config = self.model.config.get_text_config()
        windows: list[tuple[int | None, int]] = []
        try:
            self._hidden_packed(packed, packing.NOTED, windows=windows)
            told = all(masked == own for masked, own in windows)
        except Exception:  # models that make their own masks may raise anything here
            told = False
        window = None if told and windows else getattr(config, "sliding_window", None)
        chunk = getattr(config, "attention_chunk_size", None)
        return min((size for size in (window, chunk) if size), default=sys.maxsize)

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        limit = TOLERANCE[str(self.head.weight.dtype).removeprefix("torch.")]
        error = (found.float() - expected.float()).abs().max()
        return bool(error <= limit * expected.float().abs().max())


@dataclass(frozen=True)
class _Answer:
    """The answer to a batch while it is copied from the device.

    states, norms, tokens: as in `Batch`; valid once the event `arrived` has happened (None: at
    once). terms: log p of every predicted token; `spans` has as many positions for each request.
    """

    states: dict[str, Tensor]
    norms: dict[str, Tensor]
    terms: Tensor
    tokens: TokenRows[Tensor]
    spans: Sequence[range]
    arrived: torch.cuda.Event | None

    @classmethod
    def copied(
        cls,
        *,
        states: dict[str, Tensor],
        norms: dict[str, Tensor],
        terms: Tensor,
        tokens: TokenRows[Tensor],
        spans: Sequence[range],
    ) -> "_Answer":
        """Copy the tensors to the CPU; from a GPU, without waiting until they are computed."""
        on_gpu = terms.is_cuda

        def copy(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", non_blocking=on_gpu)

        found = cls(
            {view: copy(each) for view, each in states.items()},
            {view: copy(each) for view, each in norms.items()},
            copy(terms),
            tokens.map(copy),
            spans,
            torch.cuda.Event() if on_gpu else None,
        )
        if found.arrived:
            found.arrived.record(torch.cuda.current_stream(terms.device))
        return found

    def batch(self) -> Batch:
        """Wait for the copies, and sum the log-probabilities of each response to S."""
        if self.arrived:
            self.arrived.synchronize()
        terms = self.terms.double().split([len(span) for span in self.spans])
        return Batch(
            states=self.states,
            norms=self.norms,
            S=np.array([float(part.sum()) for part in terms]),
            tokens=self.tokens.map(to_stored),
        )


def padded(requests: Sequence[Request]) -> tuple[Tensor, list[npt.NDArray[np.int64]]]:
    """Token ids of the requests, int64 [requests, longest], padded on the right with token 0.

    Also returns, for each request, the indices of its tokens in the flattened ids, int64 [length].
    """
    ids = np.zeros((len(requests), max(len(request.ids) for request in requests)), np.int64)
    for row, request in zip(ids, requests, strict=True):
        row[: len(request.ids)] = request.ids
    firsts = ids.shape[1] * np.arange(len(requests))
    places = [
        first + np.arange(len(request.ids)) for first, request in zip(firsts, requests, strict=True)
    ]
    return torch.from_numpy(ids), places


def _joined(parts: Sequence[npt.NDArray[Any]], device: torch.device) -> Tensor:
    return to_device(np.concatenate(parts).astype(np.int64), device)


def _mean(states: Tensor, places: npt.NDArray[np.int64]) -> Tensor:
    """Mean state of a response; its tokens are adjacent in packed and in padded batches."""
    return states[int(places[0]) : int(places[-1]) + 1].float().mean(0)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
