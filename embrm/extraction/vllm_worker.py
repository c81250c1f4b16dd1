"""What runs inside vLLM's worker processes: the LM head, and the choice of what leaves them.

vLLM hands the head of its token pooler every state of a finished sequence. Here that head is
replaced by one that computes the statistics where the states are and passes on the rows asked for,
so a few kilobytes a response cross processes and not [length, d]. vLLM imports this module by
name; it is not imported here.
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
from embrm.extraction.engine import Request, of_responses, predicting_positions
from embrm.lm.head import LmHead
from embrm.lm.tokens import reason_of


def load_head(folder: Path, dtype: str, *, trust_remote_code: bool = False) -> LmHead:
    """The LM head of the model at `folder`, on the CPU; no other weight is read.

    A model without memory ("meta") says what its head's tensors are called, tied or not.

    Raises: UserError when the model has no such head, or the folder no tensor of those names.
    """
    remote = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **remote)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **remote)
        head = LmHead.from_model(model)
    except Exception as error:  # whatever an unusual architecture makes of being built this way
        raise UserError(
            f"model {folder}: the LM head that vLLM leaves out is not found "
            f"({reason_of(error)}): use --engine transformers"
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
            f"model {folder}: no tensor {' or '.join(map(repr, names))} for the LM head that "
            "vLLM leaves out: use --engine transformers"
        )

    bias = None if head.bias is None else stored(head.bias)
    return replace(head, weight=stored(head.weight), bias=bias)


def wish(request: Request) -> dict[str, Any]:
    """What `Selection` must know of a request, in plain numbers and counted from its end, where
    no hit of the prefix cache shifts it.

    targets: the tokens predicted, the last of them at the end; n_response: tokens of the response;
    final: how far the pooled token is from the last; positions: indices among the targets.
    """
    length = len(request.ids)
    predicting = predicting_positions(request.n_prompt, length)
    return {
        "targets": request.ids[predicting.start + 1 :].tolist(),
        "n_response": length - request.n_prompt,
        "final": length - 1 - request.final_position,
        "positions": (request.positions - predicting.start).tolist(),
    }


@dataclass(frozen=True)
class Selection:
    """Which numbers of a sequence are kept.

    head: on the device of the states; views: of "last" and "mean"; top_k and tail_mean: see
    `statistics`.
    """

    head: LmHead
    views: tuple[str, ...]
    top_k: int
    tail_mean: bool

    def of(
        self, sequences: Sequence[Tensor], wishes: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Tensor] | None]:
        """The answers to wishes from post-norm states [rows, d] of the last rows of sequences.

        None where a prefix-cache hit has swallowed a row that is needed. On the CPU, a dict each:
        S float64 [1]; state.VIEW [1, d] and norm.VIEW float32 [1]; states [positions, d], targets
        int32 [positions] and their statistics by name, as in `Batch`.
        """
        whole = [
            index
            for index, (rows, asked) in enumerate(zip(sequences, wishes, strict=True))
            if len(rows) > max(len(asked["targets"]), asked["final"])
        ]
        answers: list[dict[str, Tensor] | None] = [None] * len(sequences)
        if whole:
            found = self._of_whole([sequences[i] for i in whole], [wishes[i] for i in whole])
            for index, answer in zip(whole, found, strict=True):
                answers[index] = answer
        return answers

    def _of_whole(
        self, sequences: list[Tensor], wishes: list[Mapping[str, Any]]
    ) -> list[dict[str, Tensor]]:
        device, dtype = self.head.weight.device, self.head.weight.dtype
        spans = [len(asked["targets"]) for asked in wishes]
        positions = [asked["positions"] for asked in wishes]
        predicting = torch.cat(
            [rows[len(rows) - 1 - n : -1] for rows, n in zip(sequences, spans, strict=True)]
        )
        targets = torch.tensor(
            [target for asked in wishes for target in asked["targets"]],
            dtype=torch.int64,
            device=device,
        )
        terms, kept = of_responses(
            self.head, predicting, targets, spans, positions, self.top_k, tail_mean=self.tail_mean
        )
        counts = [len(own) for own in positions]
        rows = {name: tensor.cpu().split(counts) for name, tensor in kept.items()}
        one = [1] * len(wishes)
        for view in self.views:
            state = torch.stack(
                [
                    each[-asked["n_response"] :].float().mean(0)
                    if view == "mean"
                    else each[-1 - asked["final"]]
                    for each, asked in zip(sequences, wishes, strict=True)
                ]
            )
            rows[f"state.{view}"] = state.to(dtype).cpu().split(one)
            rows[f"norm.{view}"] = state.float().norm(dim=1).cpu().split(one)
        return [
            {"S": own.sum()[None]} | {name: parts[index] for name, parts in rows.items()}
            for index, own in enumerate(terms.cpu().double().split(spans))
        ]


def pack(answer: dict[str, Tensor] | None) -> Tensor:
    """An answer as uint8 [bytes], the one tensor a request that vLLM passes on; None has none."""
    content = safetensors.torch.save(answer) if answer else b""
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def unpack(packed: Tensor) -> dict[str, Tensor] | None:
    """The answer that `pack` was given."""
    return safetensors.torch.load(packed.numpy().tobytes()) if len(packed) else None


class SelectingHead(torch.nn.Module):
    """Stands in for the head of vLLM's token pooler."""

    def __init__(self, selection: Selection) -> None:
        super().__init__()
        self._selection = selection

    def forward(self, pooled_data: list[Tensor | None], pooling_metadata: Any) -> list[Any]:
        """Packed answers; None where a prefill is not finished. It must not raise: that would end
        the engine for every request."""
        finished = {index: rows for index, rows in enumerate(pooled_data) if rows is not None}
        wishes = [pooling_metadata.pooling_params[index].extra_kwargs for index in finished]
        answers = map(pack, self._selection.of([*finished.values()], wishes))
        packed = dict(zip(finished, answers, strict=True))
        return [packed.get(index) for index in range(len(pooled_data))]


class Extension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`)."""

    model_runner: Any

    def embrm_logit_rule(self) -> tuple[float, float | None] | None:
        """Scale and soft cap of the model's own logits; None where the model does not say.

        The pooling runner leaves the head's weights out, but not the object that knows these.
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
        """Put `SelectingHead` in place; False where this vLLM has no place for it."""
        model = self.model_runner.get_model()
        poolers = getattr(model.pooler, "poolers_by_task", {})
        pooler: Any = poolers.get("token_embed")
        if not isinstance(getattr(pooler, "head", None), torch.nn.Module):
            return False
        head = load_head(Path(folder), dtype, trust_remote_code=trust_remote_code)
        device = next(model.parameters()).device
        bias = None if head.bias is None else head.bias.to(device)
        head = replace(head, weight=head.weight.to(device), bias=bias)
        pooler.head = SelectingHead(Selection(head, tuple(views), top_k, tail_mean))
        return True
