"""Token rows of a made-up language model, with the dense float64 truth beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embrm.lm.head import LmHead
from embrm.training.row_store import RowStore
from embrm.training.token_rows import PackedLogits, TokenStore


@dataclass(frozen=True)
class Dense:
    """The whole vocabulary in float64. W: [V, d]; b: [V]; H: [N, d]; target: int64 [N]."""

    W: Tensor
    b: Tensor
    scale: float
    softcap: float | None
    H: Tensor
    target: Tensor

    def logits(self, H: Tensor) -> Tensor:
        z = self.scale * (H @ self.W.T + self.b)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def log_p(self, H: Tensor) -> Tensor:
        return self.logits(H).log_softmax(1)

    def gradients(self, H: Tensor) -> Tensor:
        """∂z_j/∂h at every state, [n, V, d], by autograd."""
        jacobian = torch.func.vmap(torch.func.jacrev(lambda h: self.logits(h[None])[0]))
        return jacobian(H)


def toy_tokens(
    held: Sequence[int] = (3, 1, 4, 0, 5, 2),
    *,
    width: int = 6,
    vocabulary: int = 23,
    top_k: int = 5,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: bool = False,
    tail_means: bool = True,
    seed: int = 0,
) -> tuple[TokenStore, Dense]:
    """Responses with so many token rows each; about every other target is none of the top-k."""
    random = np.random.default_rng(seed)
    n = sum(held)
    W, H = (random.standard_normal((rows, width)).astype(np.float32) for rows in (vocabulary, n))
    b = random.standard_normal(vocabulary).astype(np.float32) * bias
    target = torch.from_numpy(random.integers(0, vocabulary, n))
    wide = [torch.from_numpy(each).double() for each in (W, b, H)]
    dense = Dense(wide[0], wide[1], scale, softcap, wide[2], target)
    logits, log_p = dense.logits(dense.H), dense.log_p(dense.H)
    top_logits, top_ids = logits.topk(top_k, 1)
    # Some targets among the largest logits, at any place.
    inside = torch.arange(0, n, 2)
    target[inside] = top_ids[inside, inside % top_k]
    mass = log_p.exp().scatter(1, top_ids, 0.0).scatter(1, target[:, None], 0.0)
    means = torch.einsum("nv,nvd->nd", mass, dense.gradients(dense.H)) / mass.sum(1, keepdim=True)
    packed = PackedLogits.pack(
        target.int().numpy(),
        logits.gather(1, target[:, None])[:, 0].float().numpy(),
        logits.logsumexp(1).float().numpy(),
        top_ids.int().numpy(),
        top_logits.float().numpy(),
    )
    positions = np.array(held, np.int64) * 3 + 1
    weight = dense.W.float()
    data = TokenStore(
        states=RowStore(dense.H.float()),
        packed_logits=RowStore(packed.matrix),
        tail_means=RowStore(means.nan_to_num().float()) if tail_means else None,
        head=LmHead(weight, dense.b.float() if bias else None, scale, softcap),
        weight_rows=RowStore(weight),
        starts=np.cumsum([0, *held]),
        positions=positions,
        S=-random.exponential(20.0, len(held)),
    )
    return data, dense
