"""SimCSE: two views of a response, under dropout, are to be alike, and unlike other responses.

L_cl = mean over items i of -log( e^{cos(a_i, b_i)/τ} / Σ_j e^{cos(a_i, b_j)/τ} ), a and b the two
views of the items' features (arXiv 2104.08821; for reward models arXiv 2401.06080). The items are
those of the whole minibatch, so L_cl is no sum over micro-batches; but with ∂L_cl/∂feature known of
every feature, each micro-batch's part of the gradient is that of its features times it (gradient
caching, arXiv 2101.06983).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from embrm.core.specs import Spec
from embrm.core.streams import stream


class SimcseSpec(Spec):
    """A contrastive loss beside the pair loss, which then is of the first of the two views."""

    of: Literal["responses", "differences"] = "responses"
    """Items are f of every response of the minibatch, f its final state; or f_c - f_r and f_r - f_c
    of every pair."""
    weight: float = Field(default=1.0, gt=0)
    """β: loss + β·L_cl."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Of what enters the first layer and of what every layer adds, in either view."""
    temperature: float = Field(default=0.05, gt=0)
    """τ."""


@dataclass(frozen=True)
class ViewMasks:
    """Where the dropout masks of views come from: they depend on nothing but what is named here.

    sites: places in the model where something is dropped; width: of its states.
    """

    seed: int
    sites: int
    width: int
    dropout: float

    def of(self, epoch: int, minibatch: int, rows: list[int]) -> Tensor:
        """Factors float32 [sites, 2, rows, width] of these responses in a minibatch of an epoch.

        One mask is for all positions of a response (arXiv 1512.05287), so that padding and the
        texts beside it change nothing.
        """
        return torch.stack([self._of_response(epoch, minibatch, row) for row in rows], 2)

    def _of_response(self, *place: int) -> Tensor:
        random = stream(self.seed, "views", *place)
        drawn = torch.from_numpy(random.random((self.sites, 2, self.width), dtype="float32"))
        return drawn.ge(self.dropout).div(1 - self.dropout)


@dataclass(frozen=True)
class Contrast:
    """What L_cl of a minibatch asks of a micro-batch's features.

    value: L_cl. gradient: float32 [2, 2b, d], ∂L_cl/∂features over the micro-batch's share.
    """

    value: Tensor
    gradient: Tensor

    def part(self, features: Tensor) -> Tensor:
        """A number whose mean over micro-batches, weighted by their shares, is L_cl, and its
        gradient L_cl's."""
        return self.value + ((features - features.detach()) * self.gradient).sum()


def placed(features: Tensor, places: Tensor, size: int) -> Tensor:
    """float32 [2, 2·size, d]: a micro-batch's features where they are in the minibatch, else 0."""
    found = features.new_zeros(2, 2 * size, features.shape[2])
    found[:, places] = features.detach()
    return found


def contrast(
    asked: SimcseSpec, features: Tensor, distinct: Tensor, places: Tensor, share: float
) -> Contrast:
    """Of a micro-batch at these places int64 [2b] of the minibatch, which is this share of it.

    features: float32 [2, 2n, d], of the n pairs' chosen, then rejected responses in both views.
    distinct: int64 [m], places among the 2n of one of each distinct response, since one that
    several pairs share must not be its own negative.
    """
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        if asked.of == "responses":
            items = features[:, distinct]
        else:
            chosen, rejected = features.chunk(2, 1)
            items = torch.cat([chosen - rejected, rejected - chosen], 1)
        value = info_nce(items[0], items[1], asked.temperature)
        (gradient,) = torch.autograd.grad(value, features)
    return Contrast(value.detach(), gradient[:, places] / share)


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """L_cl of items [n, d] in two views; see above."""
    cosines = normalize(first, dim=1) @ normalize(second, dim=1).T
    return cross_entropy(cosines / temperature, torch.arange(len(first), device=first.device))
