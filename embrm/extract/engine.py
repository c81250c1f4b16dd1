"""What every engine gives: states and language-model statistics, computed by one function.

An engine runs the language model; what is computed from its post-norm states (logits, their
logsumexp, the log-probability S of the response) is computed here, so that two engines can only
differ by the states themselves.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LOGIT_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20, "mps": 64 << 20}
"""Size of a float32 block of logits: about the cache of a CPU, far below the memory of a GPU."""


@dataclass(frozen=True)
class LmHead:
    """The map from post-norm states to logits: softcap·tanh(scale·(W h + b) / softcap).

    weight: [V, d]; bias: [V] or None; scale: Cohere's logit_scale, 1 / Granite's logits_scaling,
    Falcon-H1's lm_head_multiplier, otherwise 1; softcap: Gemma-2's final_logit_softcapping
    (arXiv 2408.00118, section 2) or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_model(cls, model: Any) -> "LmHead":
        """The head of a transformers causal LM, tied or not. The engine checks that it fits."""
        config = model.config.get_text_config()
        output = model.get_output_embeddings()
        scale = 1.0
        if config.model_type.startswith("granite"):
            scale = 1.0 / config.logits_scaling
        elif config.model_type.startswith("cohere"):
            scale = config.logit_scale
        elif config.model_type == "falcon_h1":
            scale = config.lm_head_multiplier
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(output.weight, getattr(output, "bias", None), scale, softcap)

    def logits(self, states: Tensor) -> Tensor:
        """Float32 logits [n, V] of states [n, d]; the product is in the model's dtype."""
        logits = torch.nn.functional.linear(states, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def tensors(self) -> dict[str, Tensor]:
        """What a cache stores of the head: weight, scale, and bias and softcap where they exist."""
        stored = {"weight": self.weight.detach().cpu().contiguous()}
        if self.bias is not None:
            stored["bias"] = self.bias.detach().cpu().contiguous()
        stored["scale"] = torch.tensor([self.scale], dtype=torch.float32)
        if self.softcap is not None:
            stored["softcap"] = torch.tensor([self.softcap], dtype=torch.float32)
        return stored


@dataclass(frozen=True)
class TokenStatistics:
    """LM statistics of n positions: float32 [n] target_logit and logsumexp; the k largest logits,
    float32 [n, k], descending, and their int32 ids."""

    target_logit: Tensor
    logsumexp: Tensor
    top_logits: Tensor
    top_ids: Tensor

    def cpu(self) -> "TokenStatistics":
        """The same on the CPU."""
        return TokenStatistics(
            self.target_logit.cpu(), self.logsumexp.cpu(), self.top_logits.cpu(), self.top_ids.cpu()
        )


def statistics(head: LmHead, states: Tensor, targets: Tensor, top_k: int = 0) -> TokenStatistics:
    """Statistics of states [n, d] whose next tokens are targets int64 [n], without ever holding
    all logits: log p(target) = target_logit - logsumexp.
    """
    n, vocabulary, device = len(states), head.weight.shape[0], states.device
    rows = max(16, _LOGIT_BYTES[device.type] // (4 * vocabulary))
    k = min(top_k, vocabulary)
    target_logit = torch.empty(n, dtype=torch.float32, device=device)
    logsumexp = torch.empty_like(target_logit)
    top_logits = torch.empty(n, k, dtype=torch.float32, device=device)
    top_ids = torch.empty(n, k, dtype=torch.int32, device=device)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        logits = head.logits(states[part])
        target_logit[part] = logits.gather(1, targets[part, None])[:, 0]
        if k:
            top_logits[part], ids = logits.topk(k, dim=1)
            top_ids[part] = ids.int()
        largest = logits.amax(1, keepdim=True)
        logsumexp[part] = logits.sub_(largest).exp_().sum(1).log_().add_(largest[:, 0])
    return TokenStatistics(target_logit, logsumexp, top_logits, top_ids)


@dataclass(frozen=True)
class Request:
    """One sequence for an engine to read.

    ids: int32 [length]; n_prompt: how many of them are the prompt; final_position: the pooled
    token; positions: int32, sorted, where token rows are wanted (the state at p predicts p + 1).
    """

    ids: npt.NDArray[np.int32]
    n_prompt: int
    final_position: int
    positions: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """What an engine gives for n requests, in their order, on the CPU.

    states: view → [n, d] in the model's dtype (the mean view too); norms: view → float32 [n],
    taken before the cast; S: float64 [n]. Token rows, all requests' positions one after another:
    token_states [rows, d], targets int32 [rows] and their statistics.
    """

    states: dict[str, Tensor]
    norms: dict[str, Tensor]
    S: npt.NDArray[np.float64]
    token_states: Tensor
    targets: Tensor
    tokens: TokenStatistics


class Engine(Protocol):
    """A language model that can be read. Its answer must not depend on what shares a batch."""

    head: LmHead
    width: int
    batch_tokens: int
    """Tokens of a batch, padding included, that suit the device."""
    environment: dict[str, Any]

    def forward(self, requests: Sequence[Request]) -> Batch:
        """Read the requests as one batch."""
        ...


def predicting_positions(n_prompt: int, length: int) -> range:
    """Positions whose states predict the response tokens: n_prompt - 1 … length - 2.

    A response that begins the sequence (no BOS, no prompt token in common) has no state before its
    first token, which then counts neither in S nor among the token rows.
    """
    return range(max(n_prompt - 1, 0), length - 1)


def token_positions(
    response_id: str, n_prompt: int, length: int, k: int, seed: int
) -> npt.NDArray[np.int32]:
    """k predicting positions drawn without replacement, sorted; all of them when fewer exist.

    The draw is a counter-based stream (Philox) keyed by seed and response id alone, so it depends
    neither on order nor on what was extracted before: positions of the k smallest raw 64-bit draws.
    """
    candidates = predicting_positions(n_prompt, length)
    digest = hashlib.sha256(f"{seed}:{response_id}".encode()).digest()
    draws = np.random.Philox(key=int.from_bytes(digest[:16])).random_raw(len(candidates))
    chosen = np.sort(np.argsort(draws, kind="stable")[:k])
    return (candidates.start + chosen).astype(np.int32)


def read(
    engine: Engine,
    requests: Sequence[Request],
    batch_tokens: int,
    advance: Callable[[int], object] = lambda _: None,
) -> Batch:
    """Read any number of requests, in batches of like length of at most `batch_tokens` tokens,
    padding included (a longer request is read alone). Results are in the order of the requests.

    `advance` is told the tokens of each finished batch.
    """
    lengths = [len(request.ids) for request in requests]
    order: list[int] = []
    parts: list[Batch] = []
    for batch in _by_length(lengths, batch_tokens):
        parts.append(engine.forward([requests[index] for index in batch]))
        order.extend(batch)
        advance(sum(lengths[index] for index in batch))
    back = torch.from_numpy(np.argsort(order))
    owner = np.repeat(order, [len(requests[index].positions) for index in order])
    back_tokens = torch.from_numpy(np.argsort(owner, kind="stable"))

    return Batch(
        states={v: torch.cat([part.states[v] for part in parts])[back] for v in parts[0].states},
        norms={v: torch.cat([part.norms[v] for part in parts])[back] for v in parts[0].norms},
        S=np.concatenate([part.S for part in parts])[back.numpy()],
        token_states=torch.cat([part.token_states for part in parts])[back_tokens],
        targets=torch.cat([part.targets for part in parts])[back_tokens],
        tokens=TokenStatistics(
            torch.cat([part.tokens.target_logit for part in parts])[back_tokens],
            torch.cat([part.tokens.logsumexp for part in parts])[back_tokens],
            torch.cat([part.tokens.top_logits for part in parts])[back_tokens],
            torch.cat([part.tokens.top_ids for part in parts])[back_tokens],
        ),
    )


def _by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
