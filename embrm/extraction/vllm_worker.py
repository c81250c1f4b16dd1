"""The part of the vLLM engine that runs in vLLM's worker processes.

vLLM passes all states of a finished sequence to the head of its token pooler. Here that head is
replaced by one that computes the statistics in the worker and returns only the requested rows, so
that a few kilobytes per response are copied between processes instead of all states [length, d].
vLLM imports this module by its name; this module does not import vLLM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from embrm.core.errors import UserError
from embrm.extraction.engine import Request
from embrm.extraction.positions import predicting_positions
from embrm.extraction.statistics import response_statistics
from embrm.lm.head import LmHead
from embrm.lm.tokens import reason_of


def load_head(folder: Path, dtype: str, *, trust_remote_code: bool = False) -> LmHead:
    """The LM head of the model at `folder`, on the CPU; no other weight is read.

    The model is built on torch's meta device to find which tensors its head has, tied or not.

    Raises: UserError when the model has no such head, or the folder no tensor of those names.
    """
    remote = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **remote)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **remote)
        head = LmHead.from_model(model)
    except Exception as error:  # unusual architectures may raise anything here
        raise UserError(
            f"model {folder}: its LM head, which vLLM does not load, is not found "
            f"({reason_of(error)}): use engine = 'transformers' (--engine transformers)"
        ) from None

    def stored(part: Tensor) -> Tensor:
        parameters = model.named_parameters(remove_duplicate=False)
        names = [name for name, parameter in parameters if parameter is part]
        base = f"{model.base_model_prefix}."  # left out by some checkpoints, such as GPT-2's
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                held = set(file.keys())
                for name in [*names, *(name.removeprefix(base) for name in names)]:
                    if name in held:
                        return file.get_tensor(name).to(getattr(torch, dtype))
        raise UserError(
            f"model {folder}: no tensor {' or '.join(map(repr, names))} for the LM head, which "
            "vLLM does not load: use engine = 'transformers' (--engine transformers)"
        )

    bias = None if head.bias is None else stored(head.bias)
    return replace(head, weight=stored(head.weight), bias=bias)


def wanted_rows(request: Request) -> dict[str, Any]:
    """Describe for `RowSelection` what a request needs, as plain numbers that vLLM can pass on.

    The rows of a sequence are indexed from its end, because the states of a prefix that vLLM finds
    in its cache are missing at the start. targets: the predicted tokens. n_response: number of
    response tokens. final: distance of the pooled token from the last. start: position whose state
    predicts the first target. positions: of the token rows.
    """
    length = len(request.ids)
    predicting = predicting_positions(request.n_prompt, length)
    return {
        "targets": request.ids[predicting.start + 1 :].tolist(),
        "n_response": length - request.n_prompt,
        "final": length - 1 - request.final_position,
        "start": predicting.start,
        "positions": request.positions.tolist(),
    }


@dataclass(frozen=True)
class RowSelection:
    """Selects what to keep of the states of a sequence.

    head: on the device of the states. views: some of "last" and "mean". top_k, tail_mean: see
    `response_statistics`.
    """

    head: LmHead
    views: tuple[str, ...]
    top_k: int
    tail_mean: bool

    def answers(
        self, sequences: Sequence[Tensor], wanted: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Tensor] | None]:
        """One answer per sequence, from the post-norm states [rows, d] of its last rows.

        wanted: the result of `wanted_rows` for each sequence. An answer has, on the CPU, S as
        float64 [1], state.VIEW [1, d] and norm.VIEW float32 [1] per view, and tokens.COLUMN per
        column of its token rows. It is None if a needed row is missing because the sequence's
        prefix was in vLLM's cache.
        """
        whole = [
            index
            for index, (rows, wanted_of) in enumerate(zip(sequences, wanted, strict=True))
            if len(rows) > max(len(wanted_of["targets"]), wanted_of["final"])
        ]
        answers: list[dict[str, Tensor] | None] = [None] * len(sequences)
        if whole:
            found = self._answers_to_whole(
                [sequences[i] for i in whole], [wanted[i] for i in whole]
            )
            for index, answer in zip(whole, found, strict=True):
                answers[index] = answer
        return answers

    def _answers_to_whole(
        self, sequences: list[Tensor], wanted: list[Mapping[str, Any]]
    ) -> list[dict[str, Tensor]]:
        device, dtype = self.head.weight.device, self.head.weight.dtype
        spans = [len(wanted_of["targets"]) for wanted_of in wanted]
        positions = [wanted_of["positions"] for wanted_of in wanted]
        predicting = torch.cat(
            [rows[len(rows) - 1 - n : -1] for rows, n in zip(sequences, spans, strict=True)]
        )
        targets = torch.tensor(
            [target for wanted_of in wanted for target in wanted_of["targets"]],
            dtype=torch.int64,
            device=device,
        )
        ranges = [
            range(wanted_of["start"], wanted_of["start"] + n)
            for wanted_of, n in zip(wanted, spans, strict=True)
        ]
        terms, tokens = response_statistics(
            self.head, predicting, targets, ranges, positions, self.top_k, tail_mean=self.tail_mean
        )
        counts = [len(own) for own in positions]
        rows = {
            f"tokens.{name}": column.cpu().split(counts)
            for name, column in tokens.columns().items()
        }
        one = [1] * len(wanted)
        for view in self.views:
            state = torch.stack(
                [
                    each[-wanted_of["n_response"] :].float().mean(0)
                    if view == "mean"
                    else each[-1 - wanted_of["final"]]
                    for each, wanted_of in zip(sequences, wanted, strict=True)
                ]
            )
            rows[f"state.{view}"] = state.to(dtype).cpu().split(one)
            rows[f"norm.{view}"] = state.float().norm(dim=1).cpu().split(one)
        return [
            {"S": own.sum()[None]} | {name: parts[index] for name, parts in rows.items()}
            for index, own in enumerate(terms.cpu().double().split(spans))
        ]


def serialize(answer: dict[str, Tensor] | None) -> Tensor:
    """An answer as uint8 [bytes], because vLLM passes on one tensor per request; None as empty."""
    content = safetensors.torch.save(answer) if answer else b""
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def deserialize(content: Tensor) -> dict[str, Tensor] | None:
    """The inverse of `serialize`."""
    return safetensors.torch.load(content.numpy().tobytes()) if len(content) else None


class SelectingHead(torch.nn.Module):
    """Replaces the head of vLLM's token pooler."""

    def __init__(self, selection: RowSelection) -> None:
        super().__init__()
        self._selection = selection

    def forward(self, pooled_data: list[Tensor | None], pooling_metadata: Any) -> list[Any]:
        """Return serialized answers; None for a request whose prefill is not finished.

        It must not raise an error, which would stop the engine for all requests.
        """
        finished = {index: rows for index, rows in enumerate(pooled_data) if rows is not None}
        wanted = [pooling_metadata.pooling_params[index].extra_kwargs for index in finished]
        answers = map(serialize, self._selection.answers([*finished.values()], wanted))
        by_index = dict(zip(finished, answers, strict=True))
        return [by_index.get(index) for index in range(len(pooled_data))]


class WorkerExtension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`)."""

    model_runner: Any

    def embrm_logit_rule(self) -> tuple[float, float | None] | None:
        """Scale and softcap with which vLLM's model computes logits; None if they are unknown.

        The pooling runner does not load the head's weights, but keeps the object with these two.
        """
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "soft_cap") and hasattr(module, "scale"):
                return float(module.scale), module.soft_cap
        return None

    def embrm_select(
        self,
        folder: str,
        dtype: str,
        views: list[str],
        top_k: int,
        tail_mean: bool,
        trust_remote_code: bool,
    ) -> bool:
        """Install a `SelectingHead`; returns False if this vLLM has no head to replace."""
        model = self.model_runner.get_model()
        poolers = getattr(model.pooler, "poolers_by_task", {})
        pooler: Any = poolers.get("token_embed")
        if not isinstance(getattr(pooler, "head", None), torch.nn.Module):
            return False
        head = load_head(Path(folder), dtype, trust_remote_code=trust_remote_code)
        device = next(model.parameters()).device
        bias = None if head.bias is None else head.bias.to(device)
        head = replace(head, weight=head.weight.to(device), bias=bias)
        pooler.head = SelectingHead(RowSelection(head, tuple(views), top_k, tail_mean))
        return True
