"""Dropout in the backbone: the model's own is switched off, SimCSE's is by masks that are passed.

A mask is drawn once for all positions of a response, and from nothing but the seed, the place of
the minibatch and the response. Padding, the texts in the same batch, the number of processes and a
resumed run therefore change nothing.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from embrm.core.streams import stream


@dataclass(frozen=True)
class ViewMasks:
    """Draws the dropout masks under which a response is read twice, as two views.

    sites: places in the model where a mask is applied. width: components of a state. dropout: the
    probability that a component is dropped.
    """

    seed: int
    sites: int
    width: int
    dropout: float

    def of(self, epoch: int, minibatch: int, rows: list[int]) -> Tensor:
        """Return the factors float32 [sites, 2, rows, width] of the responses `rows`, 0 or
        1/(1 - dropout).

        epoch: from 1; minibatch: its number in the epoch. One mask serves all positions of a
        response (arXiv 1512.05287).
        """
        return torch.stack([self._of_response(epoch, minibatch, row) for row in rows], 2)

    def _of_response(self, *place: int) -> Tensor:
        random = stream(self.seed, "views", *place)
        drawn = torch.from_numpy(random.random((self.sites, 2, self.width), dtype="float32"))
        return drawn.ge(self.dropout).div(1 - self.dropout)


def switch_off_dropout(backbone: nn.Module) -> None:
    """Set every dropout probability in the backbone to 0.

    Dropout is either a module, or a number that an attention layer reads.
    """
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def apply_masks(masks: list[Tensor], backbone: nn.Module) -> int:
    """Make the backbone multiply by `masks`, one per site, in every forward step that finds any.

    masks: [rows, 1, d] each; the list is read at each forward step. The input of the first layer
    becomes x₀·m₀, and the output of layer l becomes xₗ₋₁ + (xₗ - xₗ₋₁)·mₗ, so that what the layer
    adds is dropped. This holds for every architecture. Returns the number of sites, which is 0 for
    a model without transformers' layers.
    """

    def mask_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (args[0] * masks[0], *args[1:]) if masks else None

    def mask_addition(site: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not masks:
            return None
        after, *rest = output if isinstance(output, tuple) else (output,)
        after = args[0] + (after - args[0]) * masks[site]
        return (after, *rest) if isinstance(output, tuple) else after

    layers = [own for own in backbone.modules() if isinstance(own, GradientCheckpointingLayer)]
    for site, layer in enumerate(layers, start=1):
        layer.register_forward_hook(partial(mask_addition, site))
    if layers:
        layers[0].register_forward_pre_hook(mask_input)
        return len(layers) + 1
    return 0
