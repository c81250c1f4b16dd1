"""Random adapters whose shifts of the states the estimators are tried at."""

import torch
from torch import Tensor

from embrm.core.streams import stream

DRIFTS = (0.01, 0.1)
"""Mean ‖δ‖/‖h‖ of the shifts δ of states h that are tried; the recommendations are for the last."""

ADAPTERS = 4
"""Number of random adapters."""

_RANK = 16


def adapter_shifts(X: Tensor, adapter: int, drift: float) -> Tensor:
    """Compute the shifts δ = up·down·h of states X float64 [n, d], with mean ‖δ‖/‖h‖ = drift.

    up and down are Gaussian matrices of the random adapter of this number.
    """
    down, up = stream(0, "estimators", adapter).standard_normal((2, _RANK, X.shape[1]))
    raw = X @ torch.from_numpy(down).T @ torch.from_numpy(up)
    ratio = raw.norm(dim=1) / X.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return raw * (drift / ratio.mean())
