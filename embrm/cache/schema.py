"""What a shard holds, and its one translation to and from Parquet."""

from dataclasses import dataclass

import numpy as np
import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Storage types of the states; a vector is its values' little-endian bytes, one after another."""


@dataclass(frozen=True)
class ShardRows:
    """The responses of one shard, in response order. Every array has one entry a row."""

    first: int
    """Index of the first row among all responses of the cache."""
    response_id: list[str]
    prompt_id: list[str]
    n_prompt: np.ndarray
    """int32, tokens of the prompt."""
    n_response: np.ndarray
    """int32, tokens of the response."""
    truncated: np.ndarray
    """bool, tokens were cut."""
    final_position: np.ndarray
    """int32, position of the final (rightmost non-pad) token, counted from 0."""
    final_token: np.ndarray
    """int32, its token id."""
    S: np.ndarray
    """float64, summed log-probability of the response tokens, in nats."""
    states: dict[str, torch.Tensor]
    """View name → [rows, width] in the cache's dtype."""
    norms: dict[str, torch.Tensor]
    """View name → float32 [rows], Euclidean norm taken before any cast."""


@dataclass(frozen=True)
class TokenRows:
    """Sampled response positions: of one shard when written, of the whole cache when read."""

    response: np.ndarray
    """int32, index of the response among all responses of the cache."""
    position: np.ndarray
    """int32, position whose state predicts `target`, counted from 0."""
    target: np.ndarray
    """int32, token id that follows."""
    target_logit: np.ndarray
    """float32."""
    logsumexp: np.ndarray
    """float32, over the whole vocabulary; log-probability = target_logit - logsumexp."""
    states: torch.Tensor
    """[rows, width] post-norm states in the cache's dtype."""
    top_ids: np.ndarray
    """int32 [rows, k], ids of the k largest logits."""
    top_logits: np.ndarray
    """float32 [rows, k]."""
