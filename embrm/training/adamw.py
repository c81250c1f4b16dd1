"""AdamW for a bank of slots, and the learning-rate schedule."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from embrm.training.spec import TrainSpec

_ADAM_EPS = 1e-8


class AdamW:
    """The update of torch.optim.AdamW, with hyper-parameters that differ between slots.

    Every operation rounds once (there is no fused multiply-add), so that a slot's bits do not
    depend on where in a vector register its numbers lie.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: the parameters [P, ...], which `step` changes in place."""
        self.tensors = [*tensors]
        self._moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in tensors]
        self._steps = 0

    def keep(self, slots: Tensor) -> None:
        """Keep these slots only; `tensors` are new tensors afterwards."""
        self.tensors = [tensor[slots] for tensor in self.tensors]
        self._moments = [(first[slots], second[slots]) for first, second in self._moments]

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor],
        *,
        rates: Sequence[float],
        betas: Sequence[tuple[float, float]],
        decays: Sequence[float],
    ) -> None:
        """Update all slots; rates, betas and decays have one entry per slot."""
        self._steps += 1
        # Coefficients in float64, rounded once: [7, P].
        columns = torch.tensor(
            [
                _coefficients(rate, b1, b2, decay, self._steps)
                for rate, (b1, b2), decay in zip(rates, betas, decays, strict=True)
            ],
            dtype=torch.float64,
        ).T.float()
        for tensor, gradient, (first, second) in zip(
            self.tensors, gradients, self._moments, strict=True
        ):
            b1, one_b1, b2, one_b2, rate, eps, shrink = columns.to(tensor.device).reshape(
                7, -1, *[1] * (tensor.ndim - 1)
            )
            buffer = gradient * one_b1
            first.mul_(b1).add_(buffer)
            torch.mul(gradient, gradient, out=buffer)
            second.mul_(b2).add_(buffer.mul_(one_b2))
            torch.sqrt(second, out=buffer).add_(eps)
            torch.div(first, buffer, out=buffer).mul_(rate)
            if any(decays):
                tensor.mul_(shrink)
            tensor.sub_(buffer)


def _coefficients(
    rate: float, b1: float, b2: float, decay: float, steps: int
) -> tuple[float, float, float, float, float, float, float]:
    """Compute the factors of a step; bias corrections are moved into the learning rate and eps:
    rate/(1-b1ᵗ)·m / (√v/√(1-b2ᵗ) + eps) = rate·√(1-b2ᵗ)/(1-b1ᵗ)·m / (√v + eps·√(1-b2ᵗ))."""
    root = math.sqrt(1 - b2**steps)
    corrected = rate * root / (1 - b1**steps)
    return b1, 1 - b1, b2, 1 - b2, corrected, _ADAM_EPS * root, 1 - rate * decay


def rate(spec: TrainSpec, step: int, steps: int) -> float:
    """Compute the learning rate of step `step` (from 0) of `steps`: warm-up, then the schedule."""
    warmup = spec.warmup * steps
    if step < warmup:
        return spec.lr * (step + 1) / math.ceil(warmup)
    progress = min(1.0, (step - warmup) / (steps - warmup))
    if spec.schedule == "cosine":
        return spec.lr * (1 + math.cos(math.pi * progress)) / 2
    if spec.schedule == "linear":
        return spec.lr * (1 - progress)
    return spec.lr
