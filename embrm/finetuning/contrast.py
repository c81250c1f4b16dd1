"""SimCSE: two views of a response under dropout are drawn together, and away from other responses.

L_cl is the mean over items i of -log( e^{cos(a_i, b_i)/τ} / Σ_j e^{cos(a_i, b_j)/τ} ), where a and
b are the features of the items in the two views (arXiv 2104.08821; for reward models arXiv
2401.06080). The items are those of the whole minibatch, so L_cl is not a sum over micro-batches.
But once ∂L_cl/∂feature is known for every feature, a micro-batch's part of the gradient is the
product of this with the gradient of its own features (gradient caching, arXiv 2101.06983).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from embrm.core.specs import Spec


class SimcseSpec(Spec):
    """A contrastive loss that is added to the pair loss, which is then that of the first view."""

    of: Literal["responses", "differences"] = "responses"
    """The items that are contrasted. responses: the final state f of every response of the
    minibatch; differences: f_c - f_r and f_r - f_c of every pair."""
    weight: float = Field(default=1.0, gt=0)
    """β: β·L_cl is added to the loss."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout probability of the first layer's input and of what every layer adds, in each view."""
    temperature: float = Field(default=0.05, gt=0)
    """τ, by which cosines are divided."""


@dataclass(frozen=True)
class Contrast:
    """L_cl of a minibatch, as seen from one of its micro-batches.

    value: L_cl. gradient: float32 [2, 2b, d], ∂L_cl/∂features of the micro-batch's 2b responses,
    divided by the micro-batch's share of the minibatch.
    """

    value: Tensor
    gradient: Tensor

    def part(self, features: Tensor) -> Tensor:
        """Return a term whose sum over micro-batches, weighted by their shares, has the value and
        the gradient of L_cl.

        features: float32 [2, 2b, d], the micro-batch's, with gradients.
        """
        return self.value + ((features - features.detach()) * self.gradient).sum()


def placed(features: Tensor, places: Tensor, size: int) -> Tensor:
    """Return a micro-batch's features at its places in the minibatch, and 0 at all others:
    float32 [2, 2·size, d]."""
    found = features.new_zeros(2, 2 * size, features.shape[2])
    found[:, places] = features.detach()
    return found


def contrast(
    spec: SimcseSpec, features: Tensor, distinct: Tensor, places: Tensor, share: float
) -> Contrast:
    """Return L_cl and its gradient for the micro-batch at `places` of a minibatch.

    features: float32 [2, 2n, d], of the n pairs' chosen, then rejected responses in both views.
    distinct: int64 [m], one place among the 2n of each distinct response: a response that several
    pairs share must not be its own negative. places: int64 [2b]. share: the micro-batch's part of
    the minibatch.
    """
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        if spec.of == "responses":
            items = features[:, distinct]
        else:
            chosen, rejected = features.chunk(2, 1)
            items = torch.cat([chosen - rejected, rejected - chosen], 1)
        value = info_nce(items[0], items[1], spec.temperature)
        (gradient,) = torch.autograd.grad(value, features)
    return Contrast(value.detach(), gradient[:, places] / share)


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return L_cl of n items, whose features in the two views are [n, d] each."""
    cosines = normalize(first, dim=1) @ normalize(second, dim=1).T
    return cross_entropy(cosines / temperature, torch.arange(len(first), device=first.device))
