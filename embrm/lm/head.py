"""The LM head: logits of final hidden states, and how logits change when states do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NO_TAIL = 1e-6
"""Probability below which the tail, all tokens whose logits are not kept, counts as none: float32
logits do not resolve it."""


@dataclass(frozen=True)
class LmHead:
    """The map from post-norm states h to logits: z = softcap·tanh(scale·(W h + b) / softcap).

    weight: W, [V, d], in memory or mapped from a file; bias: b, [V] or None; scale: Cohere's
    logit_scale, 1 / Granite's logits_scaling, Falcon-H1's lm_head_multiplier, otherwise 1; softcap:
    Gemma-2's final_logit_softcapping (arXiv 2408.00118, section 2). Without a softcap (None),
    z = scale·(W h + b).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_model(cls, model: Any) -> "LmHead":
        """The head of a transformers causal LM, whether or not its weight is tied.

        The extraction engine checks that the logits computed by this head are the model's.
        """
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

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "LmHead":
        """The inverse of `tensors()`; the bias becomes float32."""
        bias, softcap = tensors.get("bias"), tensors.get("softcap")
        return cls(
            tensors["weight"],
            None if bias is None else bias.float(),
            float(tensors["scale"]),
            None if softcap is None else float(softcap),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The head as a cache stores it: weight, scale, and bias and softcap if they exist."""
        stored = {"weight": self.weight.detach().cpu().contiguous()}
        if self.bias is not None:
            stored["bias"] = self.bias.detach().cpu().contiguous()
        stored["scale"] = torch.tensor([self.scale], dtype=torch.float32)
        if self.softcap is not None:
            stored["softcap"] = torch.tensor([self.softcap], dtype=torch.float32)
        return stored

    def logits(self, states: Tensor) -> Tensor:
        """Float32 logits [n, V] of states [n, d]; the product is in the weight's dtype."""
        return self.capped_(torch.nn.functional.linear(states, self.weight, self.bias).float())

    def capped_(self, products: Tensor) -> Tensor:
        """Turn products W h + b, of any shape, into logits in place: apply scale and softcap."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def slopes(self, logits: Tensor) -> Tensor | float:
        """∂z/∂(W h) at these logits, of the same shape; a single number without a softcap."""
        if self.softcap is None:
            return self.scale
        return self._slopes(logits / self.softcap)

    def uncapped(self, logits: Tensor) -> Tensor:
        """The logits before soft-capping, scale·(W h + b); finite even for a logit at its cap."""
        if self.softcap is None:
            return logits
        share = (logits / self.softcap).clamp(-1 + 2**-23, 1 - 2**-23)
        return self.softcap * torch.atanh(share)

    def slopes_of_uncapped(self, uncapped: Tensor) -> Tensor:
        """∂z/∂(W h) where the logits before soft-capping are `uncapped`, of the same shape."""
        if self.softcap is None:
            return torch.full_like(uncapped, self.scale)
        return self._slopes(torch.tanh(uncapped / self.softcap))

    def changes(self, uncapped: Tensor, moved: Tensor) -> Tensor:
        """The change of the logits when W h changes by `moved`; all have the same shape."""
        change = moved if self.scale == 1 else moved * self.scale
        if self.softcap is None:
            return change
        before = torch.tanh(uncapped / self.softcap)
        return self.softcap * (torch.tanh((uncapped + change) / self.softcap) - before)

    def _slopes(self, share: Tensor) -> Tensor:
        """scale·(1 - (z/softcap)²), computed in place of z/softcap."""
        return share.square_().neg_().add_(1.0).mul_(self.scale)
